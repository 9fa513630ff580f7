"""The Algonauts 2023 release: NSD's betas already averaged, as a fallback for those who have not the raw ones.

It holds less than NSD (``Algonauts.limits`` says what): the last three sessions were withheld, repeats are averaged,
and single trials are not in it. Rows of its arrays follow the names of its images, which hold their NSD ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image

from benchmark.data import formats, paths
from benchmark.data.nsd import SubjectBetas
from benchmark.data.release import NSD_RELEASE, Release
from benchmark.data.tree import Tree, files_digest
from benchmark.errors import UserError

SPLITS = {"training": "train", "test": "test"}
"""Folder of a split, and how the names of its images begin."""
_ANY_ID = 10**9


class Algonauts(Tree):
    """An opened Algonauts 2023 release. Build it with ``Algonauts.open``.

    Attributes:
        root: the folder that holds ``algonauts_2023``.
        subjects: those whose training betas are present (or were asked for), ascending, from 1.
        shared_ids: NSD ids of the shared images as far as they are known from NSD's design, or else from the names of
            images: those that more than one subject saw.
        limits: what cannot be done with this release.
    """

    def __init__(self, root: Path, release: Release = NSD_RELEASE) -> None:
        super().__init__(root)
        self.kind = "algonauts"
        self.release = release
        self._ids: dict[tuple[int, str], np.ndarray] = {}  # subject, split -> NSD ids in the order of the files
        self._files: dict[int, str] = {}  # NSD id -> an image of it, below the root

    @classmethod
    def open(cls, root: Path | str, subjects: Sequence[int] | None = None, release: Release = NSD_RELEASE) -> Algonauts:
        """Open the release under ``root`` and check it, from headers, sizes and names alone.

        Raises:
            UserError: something is missing or of the wrong shape; names the file and the expectation.
        """
        data = cls(Path(root), release)
        folder = data.root / paths.ALGONAUTS
        present = [s for s in range(1, 9) if (data.root / paths.algonauts_betas(s, "lh")).is_file()]
        if not present:
            raise UserError(
                f"{folder}: no averaged betas of the Algonauts 2023 release; "
                f"expected {paths.algonauts_betas(1, 'lh').removeprefix(paths.ALGONAUTS + '/')} or another subject's\n"
                f"type python -m benchmark.data check {root}"
            )
        absent = sorted(set(subjects or ()) - set(present))
        if absent:
            raise UserError(f"{folder}: no betas of subject {absent[0]}; present: {', '.join(map(str, present))}")
        data.subjects = tuple(sorted(set(subjects))) if subjects else tuple(present)
        for subject in present:  # the others' names are needed to tell shared images
            data._read_names(subject)
        for subject in data.subjects:
            data._check_subject(subject)
        data.image_ids = np.unique(np.concatenate([data._ids[s, split] for s in data.subjects for split in SPLITS]))
        data._read_first_image()
        data._find_shared(present)
        data.limits = data._find_limits()
        return data

    def _read_names(self, subject: int) -> None:
        for split, start in SPLITS.items():
            relative = paths.algonauts_images(subject, split)
            names = sorted(p.name for p in (self.root / relative).glob("*.png"))
            ids = np.empty(len(names), np.int64)
            for k, name in enumerate(names):
                match = re.fullmatch(rf"{start}-(\d+)_nsd-(\d+)\.png", name)
                if match is None or int(match[1]) != k + 1:
                    raise self._wrong(
                        f"{relative}/{name}", f"image number {k + 1} by its place", f"{start}-{k + 1:04d}_nsd-NNNNN.png"
                    )
                ids[k] = int(match[2])
                self._files.setdefault(int(match[2]), f"{relative}/{name}")
            if not names and split == "training":
                raise self._wrong(relative, "no images", "train-0001_nsd-NNNNN.png and so on")
            if (np.diff(ids) <= 0).any():
                raise self._wrong(relative, "the NSD ids in the names do not ascend", "ascending NSD ids")
            self._ids[subject, split] = ids

    def _check_subject(self, subject: int) -> None:
        images = len(self._ids[subject, "training"])
        for side, hemisphere in enumerate(paths.HEMISPHERES):
            mask = paths.mask(subject, hemisphere)
            what = "the mask of the vertices to use"
            vertices = int(np.prod(self._read(mask, what, formats.npy_header)[0]))
            used = self._read(mask, what, partial(formats.read_mask, vertices=vertices))
            relative = paths.algonauts_betas(subject, hemisphere)
            shape, dtype = self._read(relative, "the averaged betas", formats.npy_header)
            if shape != (images, len(used)) or dtype != np.float32:
                raise self._wrong(relative, f"{dtype} {shape}", f"float32 ({images} images, {len(used)} vertices)")
            if self._is_the_release(vertices) and len(used) != self.release.voxels[subject][side]:
                expected = self.release.voxels[subject][side]
                raise self._wrong(mask, f"{len(used)} vertices in use", f"{expected} for subject {subject}")
            self._n_vertices[subject, hemisphere] = vertices
            self._masks[subject, hemisphere] = used
        if self._is_the_release(self._n_vertices[subject, "lh"]):
            for split, expected in (
                ("training", self.release.algonauts_training[subject]),
                ("test", self.release.algonauts_test[subject]),
            ):
                found = len(self._ids[subject, split])
                if found != expected:
                    raise self._wrong(paths.algonauts_images(subject, split), f"{found} images", f"{expected}")

    def _is_the_release(self, vertices: int) -> bool:
        """Return whether this is the release itself, by its vertices; its published numbers are then asserted."""
        return vertices == self.release.vertices and not (self.root / paths.SETTINGS).is_file()

    def _read_first_image(self) -> None:
        relative = self._files[int(self.image_ids[0])]
        try:
            with Image.open(self.root / relative) as image:
                width, height = image.size
        except OSError as error:
            raise self._wrong(relative, f"cannot be read as an image ({error})", "a PNG file") from error
        if width != height:
            raise self._wrong(relative, f"{width} x {height} pixels", "a square image")
        self.image_size = width

    def _find_shared(self, present: Sequence[int]) -> None:
        if (self.root / paths.DESIGN).is_file():
            design = self._read(paths.DESIGN, "", lambda path: formats.read_design(path, _ANY_ID))
            self.shared_ids = design.shared
            return
        if len(present) < 2:
            raise UserError(
                f"{self.root / paths.ALGONAUTS}: with subject {present[0]} alone it cannot be told which images are "
                f"shared\nadd another subject's folder, or {paths.DESIGN} of NSD"
            )
        everybodys = np.concatenate([self._ids[s, split] for s in present for split in SPLITS])
        ids, viewers = np.unique(everybodys, return_counts=True)  # nobody has an image in both splits
        self.shared_ids = ids[viewers > 1]
        complete = set(present) & set(self.release.complete_subjects)
        published = self._is_the_release(self._n_vertices[self.subjects[0], "lh"])
        if published and len(complete) > 1 and len(self.shared_ids) != self.release.shared:
            raise self._wrong(
                paths.ALGONAUTS,
                f"{len(self.shared_ids)} images that more than one subject saw",
                f"{self.release.shared}",
            )

    def _find_limits(self) -> tuple[str, ...]:
        tested = self.shared_ids
        for subject in self.subjects:
            tested = np.intersect1d(tested, self._ids[subject, "training"])
        most = max(self.release.sessions.values()) - self.release.algonauts_withheld
        return (
            "no single trials: a new subject's 1 h, 30 min or 15 min of data cannot be taken from it",
            f"averages over at most {most} sessions (the last {self.release.algonauts_withheld} were withheld), "
            "of an unknown number of repeats",
            f"{len(tested)} test images that subjects {', '.join(map(str, self.subjects))} have in common, "
            f"instead of NSD's {self.release.shared}",
            f"{len(self.image_ids)} images in all, instead of NSD's {self.release.images}: distractors are drawn from "
            "fewer",
        )

    # --- what it holds ----------------------------------------------------------------------------------------------

    def seen(self, subject: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the NSD ids of a subject's averaged recordings, ascending, and zeros: the repeats are not known."""
        self._require(subject)
        ids = self._ids[subject, "training"]
        return ids, np.zeros(len(ids), np.int64)

    def trials(self, subject: int) -> NoReturn:
        """Refuse: the release has no single trials."""
        raise UserError(
            f"{self.root / paths.ALGONAUTS}: the Algonauts 2023 release has no single trials of subject {subject}\n"
            "transfer with 1 h, 30 min or 15 min of data needs NSD's own betas; type python -m benchmark.data check "
            f"{self.root}"
        )

    def load_betas(self, subject: int) -> SubjectBetas:
        """Read a subject's averaged betas; ``repeats`` are 0, for they are not known."""
        ids, repeats = self.seen(subject)
        return SubjectBetas(ids, self.beta_rows(subject, 0, len(ids)), repeats)

    def beta_rows(self, subject: int, start: int, stop: int) -> np.ndarray:
        """Read rows ``start .. stop-1`` of a subject's averaged betas: ``rows x V`` float32, left hemisphere first."""
        self._require(subject)
        parts = []
        for hemisphere in paths.HEMISPHERES:
            relative = paths.algonauts_betas(subject, hemisphere)
            rows = np.array(np.load(self.root / relative, mmap_mode="r", allow_pickle=False)[start:stop])
            if not np.isfinite(rows).all():
                row = start + int(np.argwhere(~np.isfinite(rows))[0, 0])
                raise self._wrong(relative, f"row {row} has values that are not finite", "finite values")
            parts.append(rows)
        return np.concatenate(parts, axis=1)

    def images(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Read images by NSD id, in the order asked for: ``n x image_size x image_size x 3`` uint8."""
        out = np.empty((len(ids), self.image_size, self.image_size, 3), np.uint8)
        for row, image_id in enumerate(np.asarray(ids, np.int64).tolist()):
            if image_id not in self._files:
                raise ValueError(f"NSD id {image_id}: the release has no such image")
            relative = self._files[image_id]
            try:
                with Image.open(self.root / relative) as image:
                    pixels = np.asarray(image)
            except OSError as error:
                raise self._wrong(relative, f"cannot be read as an image ({error})", "a PNG file") from error
            if pixels.shape != out.shape[1:] or pixels.dtype != np.uint8:
                raise self._wrong(relative, f"{pixels.dtype} {pixels.shape}", f"uint8 {out.shape[1:]}")
            out[row] = pixels
        return out

    # --- identity -----------------------------------------------------------------------------------------------------

    def _digested(self) -> Iterator[str]:
        yield paths.DESIGN
        for subject in self.subjects:
            for hemisphere in paths.HEMISPHERES:
                yield from (paths.mask(subject, hemisphere), paths.algonauts_betas(subject, hemisphere))

    @cached_property
    def file_digests(self) -> dict[str, str]:
        """SHA-256 of each file, and of each folder of images."""
        digests = dict(super().file_digests)
        for subject in self.subjects:
            for split in SPLITS:
                relative = paths.algonauts_images(subject, split)
                files = sorted((self.root / relative).glob("*.png"))
                if files:
                    digests[relative] = files_digest(files)
        return digests
