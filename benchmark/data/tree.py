"""What all data trees have in common: where they lie, their errors, their vertices, their anatomy, their digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from benchmark.data import formats, paths
from benchmark.data.external import External
from benchmark.data.formats import Wrong
from benchmark.errors import UserError, did_you_mean

Result = TypeVar("Result")
_WHOLE = 64 * 2**20  # files up to this size enter the digest whole


class Tree:
    """A folder of recordings and images. ``NSD.open`` and ``Algonauts.open`` make one.

    Attributes:
        root: the tree's folder.
        kind: what it is.
        subjects: those whose recordings are present (or were asked for), ascending, from 1.
        image_size: side of the stored images in pixels.
        image_ids: NSD ids of the images that are present, ascending.
        shared_ids: NSD ids that every subject was to see, ascending.
        limits: what cannot be done with this data, a sentence each.
        published: whether this is NSD itself, whose published numbers are asserted.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.kind: Literal["nsd", "miniature", "algonauts"] = "nsd"
        self.subjects: tuple[int, ...] = ()
        self.image_size = 0
        self.image_ids: np.ndarray = np.empty(0, np.int64)
        self.shared_ids: np.ndarray = np.empty(0, np.int64)
        self.limits: tuple[str, ...] = ()
        self.published = False
        self.external = External(root / paths.EXTERNAL)
        self._n_vertices: dict[tuple[int, str], int] = {}
        self._masks: dict[tuple[int, str], np.ndarray] = {}  # vertices in use, ascending

    # --- reading, and errors that name the file ---------------------------------------------------------------------

    def _wrong(self, relative: str, found: str, expected: str) -> UserError:
        if (self.root / paths.SETTINGS).is_file():
            remedy = f"make the tree anew: rm -r {self.root}; python -m benchmark.data simulate {self.root}"
        elif relative.startswith(paths.ALGONAUTS):
            remedy = "get it from the Algonauts 2023 release; see python -m benchmark.data check"
        elif relative.startswith("nsd"):
            remedy = f"download it again: s3://natural-scenes-dataset/{relative}"
        else:
            remedy = f"see python -m benchmark.data check {self.root}"
        return UserError(f"{self.root / relative}: {found}; expected {expected}\n{remedy}")

    def _read(self, relative: str, what: str, reader: Callable[[Path], Result]) -> Result:
        """Return what ``reader`` makes of a file; ``what`` says what it holds, should it be missing."""
        try:
            return formats.read(self.root / relative, what, reader)
        except Wrong as wrong:
            raise self._wrong(relative, wrong.found, wrong.expected) from wrong

    def _require(self, subject: int) -> None:
        if subject not in self.subjects:
            raise UserError(f"{self.root}: no subject {subject}; open: {', '.join(map(str, self.subjects))}")

    # --- what every kind of tree answers in its own way -------------------------------------------------------------

    def seen(self, subject: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the NSD ids that a subject saw, ascending, and how often (0: not known)."""
        raise NotImplementedError

    def images(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Read images by NSD id, in the order asked for: ``n x image_size x image_size x 3`` uint8."""
        raise NotImplementedError

    def _digested(self) -> Iterator[str]:
        """Yield the files that this kind of tree consists of, by path below the root; they need not exist."""
        raise NotImplementedError

    # --- voxels -----------------------------------------------------------------------------------------------------

    def vertices(self, subject: int, hemisphere: str) -> np.ndarray:
        """Return the vertices in use on a hemisphere (``lh`` or ``rh``), ascending."""
        self._require(subject)
        return self._masks[subject, hemisphere]

    def n_voxels(self, subject: int) -> int:
        """Return the number of voxels (vertices in use) of both hemispheres."""
        return sum(len(self.vertices(subject, h)) for h in paths.HEMISPHERES)

    def coordinates(self, subject: int, surface: str = paths.SURFACE_NAMES[0]) -> np.ndarray:
        """Return each voxel's place on one of fsaverage's surfaces: ``V x 3`` float32, mm (right, anterior, superior).

        Args:
            subject: from 1.
            surface: ``pial``, ``white``, ``inflated`` or ``sphere``; FreeSurfer's own file, or GIFTI (``.gii``).
        """
        if surface not in paths.SURFACE_NAMES:
            raise UserError(
                f"no surface '{surface}'{did_you_mean(surface, paths.SURFACE_NAMES)}; "
                f"choose from {', '.join(paths.SURFACE_NAMES)}"
            )
        parts = []
        for hemisphere in paths.HEMISPHERES:
            relative = self.surface_file(hemisphere, surface)
            points = self._read(relative, "the surface (for 3-D coordinates)", formats.read_surface)
            parts.append(self._pick(relative, points, subject, hemisphere))
        return np.concatenate(parts)

    def surface_file(self, hemisphere: str, surface: str) -> str:
        """Return the file of a surface: FreeSurfer's, or a GIFTI one that stands in its place."""
        name = paths.surface(hemisphere, surface)
        there = [n for n in (name, f"{name}.gii", f"{name}.surf.gii") if (self.root / n).is_file()]
        return there[0] if there else name

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
                numbers, count = formats.read_annotation(path)
            except Wrong as wrong:
                raise UserError(f"{path}: {wrong}") from wrong
            numbers = np.where(numbers > 0, numbers + offset, 0)
            parts.append(self._pick(relative, numbers, subject, hemisphere))
            offset += count
        return np.concatenate(parts)

    def _pick(self, relative: str, values: np.ndarray, subject: int, hemisphere: str) -> np.ndarray:
        self._require(subject)
        expected = self._n_vertices[subject, hemisphere]
        if len(values) != expected:
            raise self._wrong(relative, f"{len(values)} vertices", f"{expected}, as the betas have")
        return values[self.vertices(subject, hemisphere)]

    # --- identity ---------------------------------------------------------------------------------------------------

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
        names = list(self._digested())
        for hemisphere in paths.HEMISPHERES:
            names += [self.surface_file(hemisphere, surface) for surface in paths.SURFACE_NAMES]
        names += sorted(f"{paths.LABELS}/{p.name}" for p in (self.root / paths.LABELS).glob("*.annot"))
        digests = {name: file_digest(self.root / name) for name in names if (self.root / name).is_file()}
        external = [self.root / paths.EXTERNAL / name for name in self.external.files]
        if external:
            digests[paths.EXTERNAL] = files_digest(external)
        return digests


def file_digest(path: Path) -> str:
    """Return a SHA-256 of a file's content: of all of it up to 64 MiB, else of its size and nine blocks."""
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


def files_digest(files: Sequence[Path]) -> str:
    """Return a SHA-256 of many files: their names, their sizes, and the content of all, or of 256 where it is much."""
    sizes = [p.stat().st_size for p in files]
    step = 1 if sum(sizes) <= _WHOLE else max(1, len(files) // 256)
    lines = [
        f"{p.name} {size} {file_digest(p) if k % step == 0 else ''}"
        for k, (p, size) in enumerate(zip(files, sizes, strict=True))
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
