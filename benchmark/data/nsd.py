"""The one loader: reads NSD, and the miniature NSD, which differs in the numbers of sessions, voxels and pixels only.

A tree has the folders of NSD's public bucket (``paths``). Everything is checked when it is opened, from headers and
sizes alone; betas are read one session of one hemisphere at a time.

Public numbers: subjects count from 1 (NSD's file names); NSD ids, sessions' trials and vertices count from 0; sessions
from 1.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, overload

import h5py
import nibabel as nib
import numpy as np
from nibabel.freesurfer.mghformat import MGHHeader
from PIL import Image
from scipy.io import loadmat

from benchmark.data import paths
from benchmark.data.images import centre_crop, prepare_images
from benchmark.errors import UserError, did_you_mean
from benchmark.progress import Progress

MGH_HEADER = 284  # bytes before the data
NSD_VERTICES = 163_842
NSD_SESSIONS: Mapping[int, int] = {1: 40, 2: 40, 3: 32, 4: 30, 5: 40, 6: 32, 7: 40, 8: 30}
"""Sessions that were released for each subject; the design lists 40 for all."""
_WHOLE = 64 * 2**20  # files up to this size enter the digest whole


@dataclass(frozen=True)
class SubjectBetas:
    """One subject's answers, averaged over repeats."""

    image_ids: np.ndarray  # n int64 NSD ids, ascending
    betas: np.ndarray  # n x V float32, z-scored within sessions; left hemisphere first
    repeats: np.ndarray  # n int64: trials behind each row


@dataclass(frozen=True)
class TrialBetas:
    """One subject's answers, trial by trial, in the order of the experiment."""

    image_ids: np.ndarray  # n int64 NSD ids
    betas: np.ndarray  # n x V float32, z-scored within sessions; left hemisphere first
    session: np.ndarray  # n int64, from 1
    trial: np.ndarray  # n int64, from 0 within the session


class External:
    """Images without fMRI: the RGB photographs of a folder in the order of their names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def names(self) -> tuple[str, ...]:
        """File names, ascending; grayscale files are left out, as in the official code."""
        files = sorted(self.folder.glob("*.jpg")) if self.folder.is_dir() else []
        names = []
        for path in files:
            try:
                with Image.open(path) as image:
                    if image.mode == "RGB":
                        names.append(path.name)
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be read as an image ({error}); delete it or download it again"
                ) from error
        if not names:
            raise UserError(
                f"{self.folder}: expected RGB photographs (*.jpg), found none; "
                "unpack COCO's unlabeled2017 there, or turn external images off"
            )
        return tuple(names)

    def __len__(self) -> int:
        return len(self.names)

    def images(self, indices: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
        """Read images by their place among ``names``: centre-cropped, resized; ``n x size x size x 3`` uint8."""
        out = np.empty((len(indices), size, size, 3), np.uint8)
        for row, index in enumerate(indices):
            path = self.folder / self.names[int(index)]
            try:
                with Image.open(path) as image:
                    pixels = centre_crop(np.asarray(image))
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be read as an image ({error}); delete it or download it again"
                ) from error
            out[row] = prepare_images(pixels[None], size)[0]
        return out


class NSD:
    """An opened data tree. Build it with ``NSD.open``.

    Attributes:
        root: the tree's folder.
        subjects: those whose betas are present (or were asked for), ascending, from 1.
        image_size: side of the stored images in pixels.
        n_images: number of images.
        shared_ids: NSD ids that every subject was to see, ascending.
        sessions: sessions of each subject.
        trials_per_session: the same for all.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.subjects: tuple[int, ...] = ()
        self.image_size = 0
        self.n_images = 0
        self.shared_ids: np.ndarray = np.empty(0, np.int64)
        self.sessions: dict[int, int] = {}
        self.trials_per_session = 0
        self.external = External(root / paths.EXTERNAL)
        self._order: np.ndarray = np.empty(0, np.int64)  # image column of each trial, 0-based
        self._seen: np.ndarray = np.empty((0, 0), np.int64)  # subjects x columns: NSD ids, 0-based
        self._n_vertices: dict[tuple[int, str], int] = {}
        self._masks: dict[tuple[int, str], np.ndarray] = {}  # vertices in use, ascending

    # --- opening ------------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls, root: Path | str, subjects: Sequence[int] | None = None, sessions: Mapping[int, int] | None = None
    ) -> NSD:
        """Open the tree at ``root`` and check it: presence, sizes, shapes, types, ranges, and that the counts agree.

        Args:
            root: folder that holds ``nsddata``, ``nsddata_betas``, ``nsddata_stimuli``, ``algonauts_2023``.
            subjects: read these only (from 1); default: all whose betas are present.
            sessions: sessions expected of each subject; default: as many as the design has, or, for NSD itself, as were
                released.

        Raises:
            UserError: something is missing, half-written or of the wrong shape; names the file, the expectation and the
                remedy.
        """
        nsd = cls(Path(root))
        if not nsd.root.is_dir():
            raise UserError(
                f"{root}: no such data folder; make a miniature one: python -m benchmark.data simulate {root}"
            )
        nsd._read_stimuli()
        nsd._read_design()
        nsd._check_stim_info()
        nsd._find_subjects(subjects)
        for subject in nsd.subjects:
            nsd._check_subject(subject, sessions)
        return nsd

    def _wrong(self, relative: str, found: str, expected: str) -> UserError:
        if (self.root / paths.SETTINGS).is_file():
            remedy = f"make the tree anew: rm -r {self.root}; python -m benchmark.data simulate {self.root}"
        elif relative.startswith("algonauts_2023"):
            remedy = "get it from the Algonauts 2023 release (roi_masks of each subject)"
        else:
            remedy = f"download it again: s3://natural-scenes-dataset/{relative}"
        return UserError(f"{self.root / relative}: {found}; expected {expected}\n{remedy}")

    def _file(self, relative: str, what: str) -> Path:
        path = self.root / relative
        if not path.is_file():
            raise self._wrong(relative, "missing", what)
        return path

    def _read_stimuli(self) -> None:
        path = self._file(paths.STIMULI, "the images (HDF5 with imgBrick)")
        try:
            with h5py.File(path, "r") as file:
                brick = file.get("imgBrick")
                if not isinstance(brick, h5py.Dataset):
                    names = ", ".join(file) or "nothing"
                    raise self._wrong(
                        paths.STIMULI, f"no imgBrick (holds {names})", "imgBrick, n x side x side x 3 uint8"
                    )
                shape, dtype = brick.shape, brick.dtype
        except OSError as error:
            raise self._wrong(paths.STIMULI, f"damaged ({error})", "a whole HDF5 file") from error
        if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or 0 in shape or dtype != np.uint8:
            raise self._wrong(paths.STIMULI, f"imgBrick is {dtype} {shape}", "uint8 (n, side, side, 3)")
        self.n_images, self.image_size = int(shape[0]), int(shape[1])

    def _read_design(self) -> None:
        path = self._file(paths.DESIGN, "the order of images (masterordering, subjectim, sharedix)")
        try:
            design = loadmat(path, variable_names=["masterordering", "subjectim", "sharedix"])
        except Exception as error:  # scipy raises many kinds for a damaged file
            raise self._wrong(paths.DESIGN, f"damaged ({error})", "a MATLAB file") from error
        arrays: list[np.ndarray] = []
        limit = self.n_images
        for name in ("subjectim", "sharedix", "masterordering"):
            if name not in design:
                raise self._wrong(paths.DESIGN, f"no {name}", "masterordering, subjectim and sharedix")
            array = np.asarray(design[name])
            if array.ndim != 2 or array.size == 0 or (name != "subjectim" and array.shape[0] != 1):
                raise self._wrong(paths.DESIGN, f"{name} is {array.shape}", "one row; subjectim one row a subject")
            limit = arrays[0].shape[1] if name == "masterordering" else limit
            if not np.array_equal(array, np.rint(array)) or array.min() < 1 or array.max() > limit:
                raise self._wrong(
                    paths.DESIGN, f"{name} runs from {array.min()} to {array.max()}", f"whole numbers from 1 to {limit}"
                )
            arrays.append(array.astype(np.int64) - 1)
        seen, shared, order = arrays
        columns = np.sort(seen[:, : shared.size], axis=1)
        self.shared_ids = np.sort(shared[0])
        if not (columns == self.shared_ids).all() or len(np.unique(self.shared_ids)) != shared.size:
            raise self._wrong(
                paths.DESIGN,
                "sharedix and subjectim disagree",
                "sharedix in the first columns of every row of subjectim",
            )
        self._order, self._seen = order[0], seen

    def _check_stim_info(self) -> None:
        path = self._file(paths.STIM_INFO, "the list of images (one line an image)")
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = csv.DictReader(file)
                missing = {"nsdId", "shared1000"} - set(rows.fieldnames or ())
                shared = (
                    []
                    if missing
                    else [(int(r["nsdId"]), r["shared1000"].strip().lower() in ("true", "1")) for r in rows]
                )
        except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
            raise self._wrong(paths.STIM_INFO, f"damaged ({error})", "a CSV file") from error
        if missing:
            raise self._wrong(paths.STIM_INFO, f"no column {', '.join(sorted(missing))}", "NSD's columns")
        if len(shared) != self.n_images:
            raise self._wrong(paths.STIM_INFO, f"{len(shared)} lines", f"{self.n_images}, as imgBrick has images")
        if sorted(i for i, is_shared in shared if is_shared) != self.shared_ids.tolist():
            raise self._wrong(
                paths.STIM_INFO, "shared1000 disagrees with sharedix of the design", "the same images in both"
            )

    def _find_subjects(self, wanted: Sequence[int] | None) -> None:
        present = [s for s in range(1, len(self._seen) + 1) if (self.root / paths.betas_folder(s)).is_dir()]
        if not present:
            raise self._wrong(
                paths.betas_folder(1), "no such folder, nor that of another subject", "betas of at least one subject"
            )
        absent = sorted(set(wanted or ()) - set(present))
        if absent:
            raise UserError(f"{self.root}: no betas of subject {absent[0]}; present: {', '.join(map(str, present))}")
        self.subjects = tuple(sorted(set(wanted))) if wanted else tuple(present)

    def _check_subject(self, subject: int, sessions: Mapping[int, int] | None) -> None:
        first = paths.betas(subject, "lh", 1)
        self._file(first, "betas of session 1")
        vertices, trials = self._header(first)
        if len(self._order) % trials:
            raise self._wrong(first, f"{trials} trials", f"a divisor of the design's {len(self._order)} trials")
        self.trials_per_session = self.trials_per_session or trials
        designed = len(self._order) // trials
        released = NSD_SESSIONS.get(subject, designed) if vertices == NSD_VERTICES else designed
        expected = (sessions or {}).get(subject, min(released, designed))
        for session in range(1, expected + 1):
            for hemisphere in paths.HEMISPHERES:
                relative = paths.betas(subject, hemisphere, session)
                self._file(relative, f"betas of session {session} of {expected}")
                shape = self._header(relative)
                want = self._n_vertices.setdefault((subject, hemisphere), shape[0]), self.trials_per_session
                if shape != want:
                    raise self._wrong(relative, f"{shape[0]} vertices x {shape[1]} trials", f"{want[0]} x {want[1]}")
                if session == 1:
                    self._read_mask(subject, hemisphere, shape[0])
        self.sessions[subject] = expected

    def _header(self, relative: str) -> tuple[int, int]:
        """Return vertices and trials of an uncompressed ``.mgh`` file after checking its type and size."""
        path = self.root / relative
        try:
            with path.open("rb") as file:
                header = MGHHeader.from_fileobj(file, check=False)
            x, y, z, frames = (int(d) for d in header["dims"])
            dtype = header.get_data_dtype()
        except Exception as error:  # nibabel raises many kinds for a damaged header
            raise self._wrong(
                relative, f"no readable .mgh header ({error or type(error).__name__})", "an uncompressed .mgh file"
            ) from error
        if min(x, y, z, frames) < 1 or (y, z) != (1, 1) or dtype != np.dtype(">f4"):
            raise self._wrong(relative, f"{dtype.name} ({x}, {y}, {z}, {frames})", "float32 (vertices, 1, 1, trials)")
        size, whole = path.stat().st_size, MGH_HEADER + 4 * x * frames
        if size < whole:
            raise self._wrong(
                relative, f"truncated ({size} bytes)", f"at least {whole} bytes for {x} vertices x {frames} trials"
            )
        return x, frames

    def _read_mask(self, subject: int, hemisphere: str, vertices: int) -> None:
        relative = paths.mask(subject, hemisphere)
        path = self._file(relative, "the mask of the vertices to use")
        try:
            mask = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise self._wrong(relative, f"damaged ({error})", "a .npy file") from error
        if mask.shape != (vertices,) or not np.isin(mask, (0, 1)).all() or not mask.any():
            raise self._wrong(
                relative, f"{mask.dtype} {mask.shape}", f"{vertices} zeros and ones, as the betas have vertices"
            )
        self._masks[subject, hemisphere] = np.flatnonzero(mask)

    # --- images and design --------------------------------------------------------------------------------------------

    def images(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Read images by NSD id, in the order asked for: ``n x image_size x image_size x 3`` uint8."""
        wanted = np.asarray(ids, np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.n_images):
            raise ValueError(f"NSD ids {wanted.min()}..{wanted.max()}; expected 0..{self.n_images - 1}")
        unique, where = np.unique(wanted, return_inverse=True)
        out = np.empty((len(unique), self.image_size, self.image_size, 3), np.uint8)
        with h5py.File(self.root / paths.STIMULI, "r") as file:
            brick = file["imgBrick"]
            breaks = np.flatnonzero(np.diff(unique) != 1) + 1  # runs of neighbours are read at once
            for run in np.split(np.arange(len(unique)), breaks):
                if len(run):
                    out[run[0] : run[-1] + 1] = brick[unique[run[0]] : unique[run[-1]] + 1]
        return out[where]

    def trials(self, subject: int) -> np.ndarray:
        """Return the NSD id shown in each of a subject's trials: ``sessions x trials_per_session`` int64."""
        self._require(subject)
        order = self._order[: self.sessions[subject] * self.trials_per_session]
        return self._seen[subject - 1, order].reshape(self.sessions[subject], self.trials_per_session)

    def seen(self, subject: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the NSD ids that a subject saw, ascending, and how often."""
        ids, repeats = np.unique(self.trials(subject), return_counts=True)
        return ids, repeats

    def _require(self, subject: int) -> None:
        if subject not in self.subjects:
            raise UserError(f"{self.root}: no subject {subject}; open: {', '.join(map(str, self.subjects))}")

    # --- voxels -------------------------------------------------------------------------------------------------------

    def vertices(self, subject: int, hemisphere: str) -> np.ndarray:
        """Return the vertices in use on a hemisphere (``lh`` or ``rh``), ascending."""
        self._require(subject)
        return self._masks[subject, hemisphere]

    def n_voxels(self, subject: int) -> int:
        """Return the number of voxels (vertices in use) of both hemispheres."""
        return sum(len(self.vertices(subject, h)) for h in paths.HEMISPHERES)

    @overload
    def load_betas(
        self,
        subject: int,
        average: Literal[True] = ...,
        sessions: Sequence[int] | None = ...,
        progress: Progress | None = ...,
    ) -> SubjectBetas: ...

    @overload
    def load_betas(
        self,
        subject: int,
        average: Literal[False],
        sessions: Sequence[int] | None = ...,
        progress: Progress | None = ...,
    ) -> TrialBetas: ...

    def load_betas(
        self,
        subject: int,
        average: bool = True,
        sessions: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> SubjectBetas | TrialBetas:
        """Read a subject's betas, left hemisphere first, each vertex z-scored over a session's trials (official code).

        A vertex that does not vary within a session becomes 0 there. One session of one hemisphere is in memory at a
        time, beside the result.

        Args:
            subject: from 1.
            average: over the repeats of each image; else single trials.
            sessions: read these only (from 1); default: all.
            progress: shows a bar; default: nothing.

        Raises:
            UserError: a beta inside the mask is NaN or infinite (names file, vertex and trial), or a file cannot be
                read.
        """
        shown = self.trials(subject)
        chosen = list(sessions) if sessions is not None else list(range(1, self.sessions[subject] + 1))
        if not chosen or not set(chosen) <= set(range(1, self.sessions[subject] + 1)):
            raise UserError(f"sessions {chosen} of subject {subject}: expected some of 1..{self.sessions[subject]}")
        image_of_trial = shown[np.array(chosen) - 1].reshape(-1)
        ids, row_of_trial, repeats = np.unique(image_of_trial, return_inverse=True, return_counts=True)
        rows = row_of_trial if average else np.arange(len(image_of_trial))
        out = np.zeros((len(ids) if average else len(rows), self.n_voxels(subject)), np.float32)
        with (progress or Progress(enabled=False)).bar(f"betas of subject {subject}", total=2 * len(chosen)) as bar:
            for k, session in enumerate(chosen):
                own = rows[k * self.trials_per_session : (k + 1) * self.trials_per_session]
                start = 0
                for hemisphere in paths.HEMISPHERES:
                    betas = self._session(subject, hemisphere, session)
                    columns = slice(start, start + betas.shape[1])
                    for row, trial in zip(own, betas, strict=True):
                        out[row, columns] += trial
                    start = columns.stop
                    bar.advance(1)
        if average:
            out /= repeats[:, None].astype(np.float32)
            return SubjectBetas(ids, out, repeats)
        session_of_trial = np.repeat(np.array(chosen, np.int64), self.trials_per_session)
        return TrialBetas(
            image_of_trial, out, session_of_trial, np.tile(np.arange(self.trials_per_session), len(chosen))
        )

    def _session(self, subject: int, hemisphere: str, session: int) -> np.ndarray:
        """Read one file: ``trials x vertices in use`` float32, z-scored over trials."""
        relative = paths.betas(subject, hemisphere, session)
        vertices, trials = self._header(relative)
        used = self.vertices(subject, hemisphere)
        file = np.memmap(self.root / relative, ">f4", "r", MGH_HEADER, (trials, vertices))
        betas = np.empty((trials, len(used)), np.float32)
        for start in range(0, trials, 64):
            betas[start : start + 64] = file[start : start + 64][:, used]
        bad = ~np.isfinite(betas)
        if bad.any():
            trial, column = np.argwhere(bad)[0]
            found = f"beta of vertex {used[column]}, trial {trial} is {betas[trial, column]} ({bad.sum()} such values)"
            raise self._wrong(relative, found, "finite values inside the mask")
        mean = betas.mean(0, dtype=np.float64)
        sd = betas.std(0, dtype=np.float64)
        scale = np.divide(1.0, sd, out=np.zeros_like(sd), where=sd > 0)
        return ((betas - mean) * scale).astype(np.float32)

    def ncsnr(self, subject: int) -> np.ndarray:
        """Return the noise-ceiling signal-to-noise ratio of each voxel: ``V`` float32; 0 where NSD has NaN."""
        parts = []
        for hemisphere in paths.HEMISPHERES:
            used, relative = self.vertices(subject, hemisphere), paths.ncsnr(subject, hemisphere)
            self._file(relative, "the ncsnr of each vertex")
            vertices, frames = self._header(relative)
            if (vertices, frames) != (self._n_vertices[subject, hemisphere], 1):
                raise self._wrong(
                    relative, f"{vertices} vertices x {frames}", f"{self._n_vertices[subject, hemisphere]} x 1"
                )
            values = np.fromfile(self.root / relative, ">f4", vertices, offset=MGH_HEADER)
            parts.append(np.nan_to_num(values[used].astype(np.float32), nan=0.0))
        return np.concatenate(parts)

    def coordinates(self, subject: int) -> np.ndarray:
        """Return each voxel's place on fsaverage's pial surface: ``V x 3`` float32, mm (right, anterior, superior)."""
        parts = []
        for hemisphere in paths.HEMISPHERES:
            relative = paths.surface(hemisphere)
            path = self._file(relative, "the surface (for 3-D coordinates)")
            try:
                points = np.asarray(nib.freesurfer.read_geometry(path)[0], np.float32)
            except Exception as error:
                raise self._wrong(relative, f"damaged ({error})", "a FreeSurfer surface") from error
            parts.append(self._pick(relative, points, subject, hemisphere))
        return np.concatenate(parts)

    def parcels(self, subject: int, name: str = "schaefer-400") -> np.ndarray:
        """Return each voxel's parcel in an atlas: ``V`` int64, 0 = none; the right side's numbers follow the left's.

        Args:
            subject: from 1.
            name: ``schaefer-400``, ``schaefer-1000``, or what stands between ``lh.`` and ``.annot`` in another atlas's
                file name.
        """
        parts, offset = [], 0
        for hemisphere in paths.HEMISPHERES:
            relative = paths.annotation(hemisphere, paths.ATLASES.get(name, name))
            path = self.root / relative
            if not path.is_file():
                present = [p.name[3:-6] for p in sorted((self.root / paths.LABELS).glob(f"{hemisphere}.*.annot"))]
                known = [short for short, long in paths.ATLASES.items() if long in present] + present
                raise UserError(
                    f"{path}: no such atlas{did_you_mean(name, known)}; expected an .annot file for each hemisphere"
                )
            try:
                labels, _, names = nib.freesurfer.read_annot(path)
            except Exception as error:
                raise UserError(
                    f"{path}: damaged ({error}); expected a FreeSurfer .annot file; copy it again"
                ) from error
            nothing = (b"unknown", b"medial_wall", b"???")  # Schaefer's: Background+FreeSurfer_Defined_Medial_Wall
            unlabelled = [k for k, label in enumerate(names) if label.lower().endswith(nothing)]
            compact = np.cumsum([k not in unlabelled for k in range(len(names))])
            numbers = np.where((labels < 0) | np.isin(labels, unlabelled), 0, compact[labels] + offset)
            parts.append(self._pick(relative, numbers.astype(np.int64), subject, hemisphere))
            offset += int(compact[-1])
        return np.concatenate(parts)

    def _pick(self, relative: str, values: np.ndarray, subject: int, hemisphere: str) -> np.ndarray:
        expected = self._n_vertices[subject, hemisphere]
        if len(values) != expected:
            raise self._wrong(relative, f"{len(values)} vertices", f"{expected}, as the betas have")
        return values[self.vertices(subject, hemisphere)]

    # --- identity -----------------------------------------------------------------------------------------------------

    def digest(self) -> str:
        """Return a SHA-256 that identifies the content of everything this loader can read of the opened subjects.

        Files up to 64 MiB enter whole; of larger ones the size and nine blocks spread from the first byte to the last.
        Computed once.
        """
        text = json.dumps(self.file_digests, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def file_digests(self) -> dict[str, str]:
        """SHA-256 of each file (of the folder of external images: one for all), by path below the root."""
        names = [paths.STIMULI, paths.DESIGN, paths.STIM_INFO]
        for subject in self.subjects:
            for hemisphere in paths.HEMISPHERES:
                names += [paths.betas(subject, hemisphere, k + 1) for k in range(self.sessions[subject])]
                names += [paths.mask(subject, hemisphere), paths.ncsnr(subject, hemisphere)]
        for folder, pattern in ((paths.SURFACES, "*.pial"), (paths.LABELS, "*.annot")):
            names += sorted(f"{folder}/{p.name}" for p in (self.root / folder).glob(pattern))
        digests = {name: _file_digest(self.root / name) for name in names if (self.root / name).is_file()}
        external = sorted((self.root / paths.EXTERNAL).glob("*.jpg"))
        if external:
            sizes = [p.stat().st_size for p in external]
            step = 1 if sum(sizes) <= _WHOLE else max(1, len(external) // 256)
            lines = [
                f"{p.name} {size} {_file_digest(p) if k % step == 0 else ''}"
                for k, (p, size) in enumerate(zip(external, sizes, strict=True))
            ]
            digests[paths.EXTERNAL] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        return digests


def _file_digest(path: Path) -> str:
    size = path.stat().st_size
    block = 2**16
    with path.open("rb") as file:
        if size <= _WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        sha = hashlib.sha256(str(size).encode())
        for k in range(9):
            file.seek((size - block) * k // 8)
            sha.update(file.read(block))
    return sha.hexdigest()
