"""Reading the files of a data tree one by one: what each holds by its header, and whether it is what it should be.

Who calls this knows what the file is for and says it: here ``Wrong`` says what was found and what was expected, the
loaders make a ``UserError`` of it and ``inspection`` a line of its report. Nothing is executed: no pickle is read.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import h5py
import nibabel as nib
import numpy as np
from nibabel.freesurfer.mghformat import MGHHeader
from scipy.io import loadmat

MGH_HEADER = 284  # bytes before the data
_BLOCK = 32  # trials of a session that are read at once: 20 MB of NSD's

Result = TypeVar("Result")


class Wrong(Exception):  # noqa: N818 (it is not shown to anybody as it is)
    """A file is not what it should be: what was found, and what was expected."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"{found}; expected {expected}")
        self.found, self.expected = found, expected


@dataclass(frozen=True)
class Design:
    """NSD's experiment. All values count from 0."""

    seen: np.ndarray  # subjects x columns: NSD ids
    shared: np.ndarray  # NSD ids that every subject was to see, ascending
    order: np.ndarray  # column of ``seen`` shown in each trial; the same for all subjects

    def check(self) -> None:
        """Raise ``Wrong`` unless the shared images have the first columns of every subject."""
        columns = np.sort(self.seen[:, : self.shared.size], axis=1)
        if not (columns == self.shared).all() or len(np.unique(self.shared)) != self.shared.size:
            raise Wrong("sharedix and subjectim disagree", "sharedix in the first columns of every row of subjectim")


def read(path: Path, what: str, reader: Callable[[Path], Result]) -> Result:
    """Return what ``reader`` makes of the file.

    Raises:
        Wrong: there is no such file (``what`` says what it holds), or the reader found it to be something else.
    """
    if not path.is_file():
        raise Wrong("missing", what)
    return reader(path)


# --- betas ------------------------------------------------------------------------------------------------------------


def mgh_shape(path: Path) -> tuple[int, int]:
    """Return vertices and frames of an uncompressed float32 ``.mgh`` file, from its header and its size."""
    try:
        with path.open("rb") as file:
            header = MGHHeader.from_fileobj(file, check=False)
        x, y, z, frames = (int(d) for d in header["dims"])
        dtype = header.get_data_dtype()
    except Exception as error:  # nibabel raises many kinds for a damaged header
        raise Wrong(
            f"no readable .mgh header ({error or type(error).__name__})", "an uncompressed .mgh file"
        ) from error
    if min(x, y, z, frames) < 1 or (y, z) != (1, 1) or dtype != np.dtype(">f4"):
        raise Wrong(f"{dtype.name} ({x}, {y}, {z}, {frames})", "float32 (vertices, 1, 1, trials)")
    size, whole = path.stat().st_size, mgh_bytes(x, frames)
    if size < whole:
        raise Wrong(f"truncated ({size} bytes)", f"at least {whole} bytes for {x} vertices x {frames} trials")
    return x, frames


def mgh_bytes(vertices: int, frames: int) -> int:
    """Return the size of an ``.mgh`` file without its optional footer."""
    return MGH_HEADER + 4 * vertices * frames


def read_mgh(path: Path, columns: np.ndarray, frames: slice | None = None) -> np.ndarray:
    """Read some vertices of an ``.mgh`` file: ``frames x vertices`` float32.

    A few frames are in memory at a time beside the result: a file of NSD's is half a gigabyte.
    """
    vertices, n = mgh_shape(path)
    start, stop, _ = (frames or slice(None)).indices(n)
    out = np.empty((stop - start, len(columns)), np.float32)
    with path.open("rb") as file:
        file.seek(mgh_bytes(vertices, start))
        for first in range(start, stop, _BLOCK):
            count = min(_BLOCK, stop - first)
            block = np.fromfile(file, ">f4", count * vertices).reshape(count, vertices)
            out[first - start : first - start + count] = block[:, columns]
    return out


def zscore(betas: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """Z-score each vertex over the trials of its session (population standard deviation, as in the official code).

    A vertex that does not vary becomes 0, and so does one that has no data in the whole session (NaN in every trial):
    it lay outside the scanned volume.

    Args:
        betas: ``trials x V`` float32.
        vertices: ``V`` numbers of the vertices, to name one that is wrong.

    Raises:
        Wrong: a value is NaN or infinite while others of its vertex are not.
    """
    bad = ~np.isfinite(betas)
    if bad.any():
        nowhere = np.isnan(betas).all(0)
        bad[:, nowhere] = False
        if bad.any():
            trial, column = np.argwhere(bad)[0]
            raise Wrong(
                f"beta of vertex {vertices[column]}, trial {trial} is {betas[trial, column]} ({bad.sum()} such values)",
                "finite values inside the mask",
            )
        betas = np.where(nowhere, np.float32(0), betas)
    mean = betas.mean(0, dtype=np.float64)
    sd = betas.std(0, dtype=np.float64)
    scale = np.divide(1.0, sd, out=np.zeros_like(sd), where=sd > 0)
    return ((betas - mean) * scale).astype(np.float32)


# --- images and design ------------------------------------------------------------------------------------------------


def brick_shape(path: Path, square: bool = True) -> tuple[int, int, int]:
    """Return number, height and width of the images in an HDF5 file's ``imgBrick``."""
    form = "uint8 (n, side, side, 3)" if square else "uint8 (n, height, width, 3)"
    try:
        with h5py.File(path, "r") as file:
            brick = file.get("imgBrick")
            if not isinstance(brick, h5py.Dataset):
                raise Wrong(
                    f"no imgBrick (holds {', '.join(file) or 'nothing'})",
                    "imgBrick, n x side x side x 3 uint8" if square else "imgBrick, n x height x width x 3 uint8",
                )
            shape, dtype = brick.shape, brick.dtype
    except OSError as error:
        raise Wrong(f"damaged ({error})", "a whole HDF5 file") from error
    if len(shape) != 4 or shape[3] != 3 or (square and shape[1] != shape[2]) or 0 in shape or dtype != np.uint8:
        raise Wrong(f"imgBrick is {dtype} {shape}", form)
    return int(shape[0]), int(shape[1]), int(shape[2])


def read_brick(path: Path, ids: np.ndarray) -> np.ndarray:
    """Read images of an ``imgBrick`` in the order asked for: ``n x height x width x 3`` uint8."""
    unique, where = np.unique(ids, return_inverse=True)
    with h5py.File(path, "r") as file:
        brick = file["imgBrick"]
        out = np.empty((len(unique), *brick.shape[1:]), np.uint8)
        breaks = np.flatnonzero(np.diff(unique) != 1) + 1  # runs of neighbours are read at once
        for run in np.split(np.arange(len(unique)), breaks):
            if len(run):
                out[run[0] : run[-1] + 1] = brick[unique[run[0]] : unique[run[-1]] + 1]
    return out if np.array_equal(where, np.arange(len(unique))) else out[where]


def _matrices(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    try:
        return {name: np.asarray(value) for name, value in loadmat(path, variable_names=names).items()}
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise Wrong(f"damaged ({error})", "a MATLAB file") from error


def _whole_numbers(name: str, array: np.ndarray, limit: int) -> np.ndarray:
    if not np.array_equal(array, np.rint(array)) or array.min() < 1 or array.max() > limit:
        raise Wrong(f"{name} runs from {array.min()} to {array.max()}", f"whole numbers from 1 to {limit}")
    return array.astype(np.int64) - 1


def read_design(path: Path, n_images: int) -> Design:
    """Read NSD's ``masterordering``, ``subjectim`` and ``sharedix``: presence, shapes, ranges."""
    names = ["subjectim", "sharedix", "masterordering"]
    matrices = _matrices(path, names)
    for name in names:
        if name not in matrices:
            raise Wrong(f"no {name}", "masterordering, subjectim and sharedix")
        array = matrices[name]
        if array.ndim != 2 or array.size == 0 or (name != "subjectim" and array.shape[0] != 1):
            raise Wrong(f"{name} is {array.shape}", "one row; subjectim one row a subject")
    seen = _whole_numbers("subjectim", matrices["subjectim"], n_images)
    shared = _whole_numbers("sharedix", matrices["sharedix"], n_images)[0]
    order = _whole_numbers("masterordering", matrices["masterordering"], seen.shape[1])[0]
    return Design(seen, np.sort(shared), order)


def read_synthetic_order(path: Path, n_images: int) -> np.ndarray:
    """Read which of NSD-Synthetic's images each trial showed, from 0."""
    matrices = _matrices(path, ["masterordering"])
    array = matrices.get("masterordering", np.empty(0))
    if array.ndim != 2 or array.size == 0 or array.shape[0] != 1:
        raise Wrong(
            f"masterordering is {array.shape}" if array.size else "no masterordering", "masterordering, one row"
        )
    return _whole_numbers("masterordering", array, n_images)[0]


def read_stim_info(path: Path) -> list[tuple[int, bool]]:
    """Read NSD id and ``shared1000`` of each line of NSD's list of images."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            missing = {"nsdId", "shared1000"} - set(rows.fieldnames or ())
            if missing:
                raise Wrong(f"no column {', '.join(sorted(missing))}", "NSD's columns")
            return [(int(row["nsdId"]), row["shared1000"].strip().lower() in ("true", "1")) for row in rows]
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise Wrong(f"damaged ({error})", "a CSV file") from error


# --- arrays and anatomy -----------------------------------------------------------------------------------------------


def npy_header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type of a ``.npy`` file of numbers, from its header and its size."""
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            start = file.tell()
    except (OSError, ValueError, EOFError) as error:
        raise Wrong(f"damaged ({error})", "a .npy file") from error
    if dtype.hasobject:
        raise Wrong("holds Python objects, which are not read", "a .npy file of numbers")
    size, whole = path.stat().st_size, start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size < whole:
        raise Wrong(f"truncated ({size} bytes)", f"{whole} bytes for {dtype.name} {shape}")
    return shape, dtype


def read_mask(path: Path, vertices: int) -> np.ndarray:
    """Read the mask of the vertices in use of one hemisphere; return their numbers, ascending."""
    try:
        mask = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise Wrong(f"damaged ({error})", "a .npy file") from error
    if mask.shape != (vertices,) or not np.isin(mask, (0, 1)).all() or not mask.any():
        raise Wrong(f"{mask.dtype} {mask.shape}", f"{vertices} zeros and ones, as the betas have vertices")
    return np.flatnonzero(mask)


def read_label(path: Path) -> np.ndarray:
    """Read a label of fsaverage's vertices from an ``.mgz`` file: ``vertices`` float32, above 0 inside."""
    try:
        return np.asarray(nib.load(path).dataobj, np.float32).reshape(-1)
    except Exception as error:  # nibabel raises many kinds for a damaged file
        raise Wrong(f"damaged ({error})", "a FreeSurfer .mgz file") from error


def read_surface(path: Path) -> np.ndarray:
    """Read the coordinates of a FreeSurfer surface, or of a GIFTI one (``.gii``): ``vertices x 3`` float32, mm."""
    try:
        if path.suffix == ".gii":
            points = nib.load(path).agg_data("pointset")
        else:
            points = nib.freesurfer.read_geometry(path)[0]
        points = np.asarray(points, np.float32)
    except Exception as error:  # nibabel raises many kinds for a damaged file
        raise Wrong(f"damaged ({error})", "a FreeSurfer surface") from error
    if points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
        raise Wrong(f"coordinates are {points.shape}", "three finite coordinates a vertex")
    return points


_NOTHING = (b"unknown", b"medial_wall", b"???")  # Schaefer's: Background+FreeSurfer_Defined_Medial_Wall


def read_annotation(path: Path) -> tuple[np.ndarray, int]:
    """Read a FreeSurfer annotation: each vertex's parcel, from 1 (0: none), and the number of parcels."""
    try:
        labels, _, names = nib.freesurfer.read_annot(path)
    except Exception as error:  # nibabel raises many kinds for a damaged file
        raise Wrong(f"damaged ({error})", "a FreeSurfer .annot file; copy it again") from error
    unlabelled = [k for k, label in enumerate(names) if label.lower().endswith(_NOTHING)]
    compact = np.cumsum([k not in unlabelled for k in range(len(names))])
    numbers = np.where((labels < 0) | np.isin(labels, unlabelled), 0, compact[labels])
    return numbers.astype(np.int64), int(compact[-1])
