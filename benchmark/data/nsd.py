"""The one loader: reads NSD, and the miniature NSD, which differs in the numbers of sessions, voxels and pixels only.

A tree has the folders of NSD's public bucket (``paths``). Everything is checked when it is opened, from headers and
sizes alone; betas are read one session of one hemisphere at a time.

Public numbers: subjects count from 1 (NSD's file names); NSD ids, sessions' trials and vertices count from 0; sessions
from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import numpy as np

from benchmark.data import formats, paths
from benchmark.data.formats import Wrong
from benchmark.data.release import NSD_RELEASE, Release
from benchmark.data.tree import Tree
from benchmark.errors import UserError
from benchmark.progress import Progress


@dataclass(frozen=True)
class SubjectBetas:
    """One subject's answers, averaged over repeats."""

    image_ids: np.ndarray  # n int64 NSD ids, ascending
    betas: np.ndarray  # n x V float32, z-scored within sessions; left hemisphere first
    repeats: np.ndarray  # n int64: trials behind each row; 0 where it is not known


@dataclass(frozen=True)
class TrialBetas:
    """One subject's answers, trial by trial, in the order of the experiment."""

    image_ids: np.ndarray  # n int64 NSD ids
    betas: np.ndarray  # n x V float32, z-scored within sessions; left hemisphere first
    session: np.ndarray  # n int64, from 1
    trial: np.ndarray  # n int64, from 0 within the session


def read_design(
    path: Path, n_images: int, wrong: Callable[[str, str], UserError]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read NSD's ``nsd_expdesign.mat``; all values count from 0.

    Args:
        path: the file.
        n_images: NSD ids run up to here.
        wrong: makes the error to raise, from what was found and what was expected.

    Returns:
        ``subjectim`` (subjects x images), ``sharedix`` (ascending) and ``masterordering`` (trials).
    """
    try:
        design = formats.read_design(path, n_images)
    except Wrong as error:
        raise wrong(error.found, error.expected) from error
    return design.seen, design.shared, design.order


class NSD(Tree):
    """An opened data tree. Build it with ``NSD.open``.

    Attributes:
        root: the tree's folder.
        kind: ``nsd``, or ``miniature`` where ``simulation`` says how it was made.
        published: whether this is NSD itself, by its vertices; its published numbers are then asserted.
        subjects: those whose betas are present (or were asked for), ascending, from 1.
        image_size: side of the stored images in pixels.
        n_images: number of images.
        shared_ids: NSD ids that every subject was to see, ascending.
        sessions: sessions of each subject.
        trials_per_session: the same for all.
    """

    def __init__(self, root: Path, release: Release = NSD_RELEASE) -> None:
        super().__init__(root)
        self.kind = "miniature" if (root / paths.SETTINGS).is_file() else "nsd"
        self.release = release
        self.n_images = 0
        self.sessions: dict[int, int] = {}
        self.trials_per_session = 0
        self._order: np.ndarray = np.empty(0, np.int64)  # image column of each trial, 0-based
        self._seen: np.ndarray = np.empty((0, 0), np.int64)  # subjects x columns: NSD ids, 0-based

    # --- opening ------------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        root: Path | str,
        subjects: Sequence[int] | None = None,
        sessions: Mapping[int, int] | None = None,
        release: Release = NSD_RELEASE,
    ) -> NSD:
        """Open the tree at ``root`` and check it: presence, sizes, shapes, types, ranges, and that the counts agree.

        Args:
            root: folder that holds ``nsddata``, ``nsddata_betas``, ``nsddata_stimuli``, ``algonauts_2023``.
            subjects: read these only (from 1); default: all whose betas are present.
            sessions: sessions expected of each subject; default: as many as the design has, or, for NSD itself, as were
                released.
            release: the published numbers that NSD itself, known by its vertices, must have.

        Raises:
            UserError: something is missing, half-written or of the wrong shape; names the file, the expectation and the
                remedy.
        """
        nsd = cls(Path(root), release)
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

    def _read_stimuli(self) -> None:
        self.n_images, self.image_size, _ = self._read(
            paths.STIMULI, "the images (HDF5 with imgBrick)", formats.brick_shape
        )
        self.image_ids = np.arange(self.n_images)

    def _read_design(self) -> None:
        def reader(path: Path) -> formats.Design:
            design = formats.read_design(path, self.n_images)
            design.check()
            return design

        what = "the order of images (masterordering, subjectim, sharedix)"
        design = self._read(paths.DESIGN, what, reader)
        self._order, self._seen, self.shared_ids = design.order, design.seen, design.shared

    def _check_stim_info(self) -> None:
        rows = self._read(paths.STIM_INFO, "the list of images (one line an image)", formats.read_stim_info)
        if len(rows) != self.n_images:
            raise self._wrong(paths.STIM_INFO, f"{len(rows)} lines", f"{self.n_images}, as imgBrick has images")
        if sorted(i for i, is_shared in rows if is_shared) != self.shared_ids.tolist():
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
        vertices, trials = self._header(first, "betas of session 1")
        if len(self._order) % trials:
            raise self._wrong(first, f"{trials} trials", f"a divisor of the design's {len(self._order)} trials")
        self.trials_per_session = self.trials_per_session or trials
        if self.kind == "nsd" and vertices == self.release.vertices and not self.published:
            self.published = True
            self._check_published()
        designed = len(self._order) // trials
        released = self.release.sessions.get(subject, designed) if self.published else designed
        expected = (sessions or {}).get(subject, min(released, designed))
        for hemisphere in paths.HEMISPHERES:
            for session in range(1, expected + 1):
                relative = paths.betas(subject, hemisphere, session)
                shape = self._header(relative, f"betas of session {session} of {expected}")
                want = self._n_vertices.setdefault((subject, hemisphere), shape[0]), self.trials_per_session
                if shape != want:
                    raise self._wrong(relative, f"{shape[0]} vertices x {shape[1]} trials", f"{want[0]} x {want[1]}")
        self.sessions[subject] = expected
        for side, hemisphere in enumerate(paths.HEMISPHERES):
            used = self._read_mask(subject, hemisphere)
            if self.published and len(used) != self.release.voxels[subject][side]:
                raise self._wrong(
                    paths.mask(subject, hemisphere),
                    f"{len(used)} vertices in use",
                    f"{self.release.voxels[subject][side]}, as the Algonauts 2023 release has for subject {subject}",
                )
            self._masks[subject, hemisphere] = used

    def _check_published(self) -> None:
        """Hold NSD itself against its published numbers."""
        release = self.release
        for relative, what, found, expected in (
            (paths.STIMULI, "images", self.n_images, release.images),
            (paths.STIMULI, "pixels a side", self.image_size, release.image_side),
            (paths.DESIGN, "shared images", len(self.shared_ids), release.shared),
            (paths.DESIGN, "subjects", len(self._seen), len(release.sessions)),
            (paths.DESIGN, "images a subject", self._seen.shape[1], release.images_per_subject),
            (paths.DESIGN, "trials", len(self._order), release.trials_designed),
            (paths.betas(1, "lh", 1), "trials", self.trials_per_session, release.trials_per_session),
        ):
            if found != expected:
                raise self._wrong(relative, f"{found} {what}", f"NSD's {expected}")

    def _header(self, relative: str, what: str) -> tuple[int, int]:
        """Return vertices and trials of an uncompressed ``.mgh`` file after checking its type and size."""
        return self._read(relative, what, formats.mgh_shape)

    def _read_mask(self, subject: int, hemisphere: str) -> np.ndarray:
        """Return the vertices in use: by the Algonauts mask, or made as it was made, from NSD's own labels."""
        vertices = self._n_vertices[subject, hemisphere]
        relative = paths.mask(subject, hemisphere)
        labels = paths.general_labels(hemisphere)
        if (self.root / relative).is_file() or not all((self.root / label).is_file() for label in labels):
            return self._read(
                relative, "the mask of the vertices to use", lambda path: formats.read_mask(path, vertices)
            )
        inside = np.zeros(vertices, bool)
        for label in labels:
            values = self._read(label, "a label of the visual cortex", formats.read_label)
            if len(values) != vertices:
                raise self._wrong(label, f"{len(values)} vertices", f"{vertices}, as the betas have")
            inside |= values > 0
        used = np.flatnonzero(inside)
        for session in range(1, self.sessions[subject] + 1):  # a vertex without data has none in the whole session
            path = self.root / paths.betas(subject, hemisphere, session)
            used = used[np.isfinite(formats.read_mgh(path, used, slice(0, 1))[0])]
        return used

    # --- images and design --------------------------------------------------------------------------------------------

    def images(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Read images by NSD id, in the order asked for: ``n x image_size x image_size x 3`` uint8."""
        wanted = np.asarray(ids, np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.n_images):
            raise ValueError(f"NSD ids {wanted.min()}..{wanted.max()}; expected 0..{self.n_images - 1}")
        return formats.read_brick(self.root / paths.STIMULI, wanted)

    def trials(self, subject: int) -> np.ndarray:
        """Return the NSD id shown in each of a subject's trials: ``sessions x trials_per_session`` int64."""
        self._require(subject)
        order = self._order[: self.sessions[subject] * self.trials_per_session]
        return self._seen[subject - 1, order].reshape(self.sessions[subject], self.trials_per_session)

    def seen(self, subject: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the NSD ids that a subject saw, ascending, and how often."""
        ids, repeats = np.unique(self.trials(subject), return_counts=True)
        return ids, repeats

    # --- betas --------------------------------------------------------------------------------------------------------

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

        A vertex that does not vary within a session becomes 0 there. One session is in memory at a time, beside the
        result; ``prepare`` keeps the result on the disk.

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
        with (progress or Progress(enabled=False)).bar(f"betas of subject {subject}", total=len(chosen)) as bar:
            for k, session in enumerate(chosen):
                own = rows[k * self.trials_per_session : (k + 1) * self.trials_per_session]
                for row, trial in zip(own, self.session_betas(subject, session), strict=True):
                    out[row] += trial
                bar.advance(1)
        if average:
            out /= repeats[:, None].astype(np.float32)
            return SubjectBetas(ids, out, repeats)
        session_of_trial = np.repeat(np.array(chosen, np.int64), self.trials_per_session)
        return TrialBetas(
            image_of_trial, out, session_of_trial, np.tile(np.arange(self.trials_per_session), len(chosen))
        )

    def session_betas(self, subject: int, session: int) -> np.ndarray:
        """Read one session (from 1): ``trials x V`` float32, z-scored over its trials, left hemisphere first."""
        files = [paths.betas(subject, hemisphere, session) for hemisphere in paths.HEMISPHERES]
        return self.scored(subject, files, f"betas of session {session} of {self.sessions[subject]}")

    def scored(self, subject: int, files: Sequence[str], what: str) -> np.ndarray:
        """Read one session's betas of both hemispheres: ``trials x V`` float32, each vertex z-scored over the trials.

        Args:
            subject: whose vertices are read.
            files: of the left and of the right hemisphere, below the root.
            what: what they hold, for the error when one is missing.
        """
        shapes = [self._header(file, what) for file in files]
        out = np.empty((shapes[0][1], self.n_voxels(subject)), np.float32)
        start = 0
        for hemisphere, file, shape in zip(paths.HEMISPHERES, files, shapes, strict=True):
            expected = self._n_vertices[subject, hemisphere], len(out)
            if shape != expected:
                raise self._wrong(file, f"{shape[0]} vertices x {shape[1]} trials", f"{expected[0]} x {expected[1]}")
            used = self.vertices(subject, hemisphere)
            betas = formats.read_mgh(self.root / file, used)
            try:
                out[:, start : start + len(used)] = formats.zscore(betas, used)
            except Wrong as wrong:
                raise self._wrong(file, wrong.found, wrong.expected) from wrong
            start += len(used)
        return out

    def ncsnr(self, subject: int) -> np.ndarray:
        """Return the noise-ceiling signal-to-noise ratio of each voxel: ``V`` float32; 0 where NSD has NaN."""
        parts = []
        for hemisphere in paths.HEMISPHERES:
            used, relative = self.vertices(subject, hemisphere), paths.ncsnr(subject, hemisphere)
            vertices, frames = self._header(relative, "the ncsnr of each vertex")
            if (vertices, frames) != (self._n_vertices[subject, hemisphere], 1):
                raise self._wrong(
                    relative, f"{vertices} vertices x {frames}", f"{self._n_vertices[subject, hemisphere]} x 1"
                )
            parts.append(np.nan_to_num(formats.read_mgh(self.root / relative, used)[0], nan=0.0))
        return np.concatenate(parts)

    # --- identity -----------------------------------------------------------------------------------------------------

    def _digested(self) -> Iterator[str]:
        yield from (paths.STIMULI, paths.DESIGN, paths.STIM_INFO)
        yield from (paths.SYNTHETIC_DESIGN, paths.SYNTHETIC_STIMULI)
        for subject in self.subjects:
            yield paths.synthetic_colour_stimuli(subject)
            for hemisphere in paths.HEMISPHERES:
                yield from (paths.betas(subject, hemisphere, k + 1) for k in range(self.sessions[subject]))
                yield from (paths.mask(subject, hemisphere), paths.ncsnr(subject, hemisphere))
                yield paths.synthetic_betas(subject, hemisphere)
        for hemisphere in paths.HEMISPHERES:
            yield from paths.general_labels(hemisphere)
