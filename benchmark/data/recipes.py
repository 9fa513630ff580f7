"""How each array of a prepared store is made of a data tree, run of rows by run of rows.

A recipe knows nothing of disks that fill up or processes that are killed: that is ``prepare``'s and ``arrays``' part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.data import paths
from benchmark.data.algonauts import Algonauts
from benchmark.data.arrays import ArrayWriter
from benchmark.data.images import STORED, prepare_images
from benchmark.data.nsd import NSD
from benchmark.data.prepared import subject_folder
from benchmark.data.synthetic import Synthetic
from benchmark.data.tree import file_digest

RECIPE = 1  # raised whenever the same data would give other arrays
IMAGE_RUN = 64  # images that are finished together
BETA_RUN = 256  # averaged recordings that are finished together
WORK = ".work"

Rows = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Step:
    """Arrays that are written in step: the same runs of the same rows."""

    title: str
    writers: Mapping[str, ArrayWriter]  # name in the store -> writer
    make: Callable[[int, Sequence[str]], Rows]  # number of a run, names that are wanted -> rows of each
    parallel: bool = False


@dataclass(frozen=True)
class Table:
    """A table that belongs to the arrays of a job."""

    name: str
    columns: Mapping[str, Any]
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """Arrays that are finished together, in steps of which a later one may read what an earlier one wrote."""

    steps: tuple[Step, ...]
    tables: tuple[Table, ...] = ()

    @property
    def writers(self) -> dict[str, ArrayWriter]:
        """All arrays, by name."""
        return {name: writer for step in self.steps for name, writer in step.writers.items()}

    @property
    def kept(self) -> dict[str, ArrayWriter]:
        """Those that stay in the store."""
        return {name: writer for name, writer in self.writers.items() if not name.startswith(WORK)}


class Recipes:
    """The recipes of one tree and one store.

    Args:
        tree: what is read.
        out: the store's folder.
        sizes: sides of the images in pixels.
    """

    def __init__(self, tree: NSD | Algonauts, out: Path, sizes: Sequence[int]) -> None:
        self.tree, self.out, self.sizes = tree, out, tuple(sizes)

    def _writer(
        self, name: str, shape: Sequence[int], dtype: Any, run: int, identity: Mapping[str, Any]
    ) -> ArrayWriter:
        return ArrayWriter(self.out / name, shape, dtype, run, {"recipe": RECIPE, **identity})

    def _digest(self, names: Sequence[str]) -> str:
        """Return one digest of some of the tree's files (or folders of images)."""
        own = {name: self.tree.file_digests.get(name, "") for name in names}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()

    # --- images -------------------------------------------------------------------------------------------------------

    def images(self) -> Job:
        """NSD's images, or those of the Algonauts release, in ascending NSD id."""
        tree, ids = self.tree, self.tree.image_ids
        if isinstance(tree, NSD):
            digest = file_digest(tree.root / paths.STIMULI)
        else:
            folders = [paths.algonauts_images(s, split) for s in tree.subjects for split in ("training", "test")]
            digest = self._digest(folders)
        writers = self._image_writers("images", len(ids), {"images": digest})

        def make(run: int, names: Sequence[str]) -> Rows:
            start, stop = next(iter(writers.values())).bounds(run)
            return self._resized(tree.images(ids[start:stop]), names, writers)

        shared = np.isin(ids, tree.shared_ids)
        table = Table("images.parquet", {"nsd_id": ids, "shared": shared}, {"images": digest})
        return Job((Step("images", writers, make, parallel=True),), (table,))

    def external_identity(self, limit: int | None) -> dict[str, Any]:
        """Return what the external images are made of."""
        return {"folder": self.tree.file_digests.get(paths.EXTERNAL, ""), "limit": limit}

    def external(self, names: Sequence[str], identity: Mapping[str, Any]) -> Job:
        """Photographs without fMRI, by their names."""
        source = self.tree.external
        writers = self._image_writers("external", len(names), identity)

        def make(run: int, wanted: Sequence[str]) -> Rows:
            start, stop = next(iter(writers.values())).bounds(run)
            rows: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
            for name in names[start:stop]:  # one by one: they differ in size
                for array, row in self._resized(source.square(name)[None], wanted, writers).items():
                    rows[array].append(row)
            return {name: np.concatenate(parts) for name, parts in rows.items()}

        return Job((Step("external images", writers, make, parallel=True),))

    def _image_writers(self, prefix: str, count: int, identity: Mapping[str, Any]) -> dict[str, ArrayWriter]:
        identity = {**identity, "by_way_of": STORED if STORED in self.sizes else None}
        names = {f"{prefix}_{size}.npy": (count, size, size, 3) for size in self.sizes}
        return {name: self._writer(name, shape, np.uint8, IMAGE_RUN, identity) for name, shape in names.items()}

    def _resized(self, raw: np.ndarray, names: Sequence[str], writers: Mapping[str, ArrayWriter]) -> Rows:
        """Resize square images to every size that is wanted, by way of 256 pixels as the official code does."""
        stored = prepare_images(raw, STORED) if raw.shape[1] > STORED or STORED in self.sizes else raw
        return {name: prepare_images(stored, writers[name].shape[1]) for name in names}

    # --- recordings ---------------------------------------------------------------------------------------------------

    def nsd_betas(self, subject: int) -> Job:
        """Z-score session after session into single trials, then average them.

        Between the two steps the trials stay in float32, so that averages are rounded once.
        """
        nsd = self.tree
        assert isinstance(nsd, NSD)
        shown = nsd.trials(subject).reshape(-1)
        session, voxels = nsd.trials_per_session, nsd.n_voxels(subject)
        sessions = range(1, nsd.sessions[subject] + 1)
        files = [paths.betas(subject, hemisphere, k) for hemisphere in paths.HEMISPHERES for k in sessions]
        identity = {"betas": self._digest(files), "vertices": self.vertices(subject), "shown": array_digest(shown)}
        folder = subject_folder(subject)
        ids, row_of_trial, repeats = np.unique(shown, return_inverse=True, return_counts=True)
        ends = np.cumsum(repeats)
        by_image = np.argsort(row_of_trial, kind="stable")  # the trials of each image, in the order of the experiment
        scored_name, trials_name = f"{WORK}/{folder}_scored.npy", f"{folder}/trials.npy"
        shape = (len(shown), voxels)
        scored = self._writer(scored_name, shape, np.float32, session, identity)
        trials = self._writer(trials_name, shape, np.float16, session, identity)
        averaged_name = f"{folder}/averaged.npy"
        averaged = self._writer(averaged_name, (len(ids), voxels), np.float16, BETA_RUN, identity)

        def score(run: int, names: Sequence[str]) -> Rows:
            return dict.fromkeys(names, nsd.session_betas(subject, run + 1))

        def average(run: int, names: Sequence[str]) -> Rows:
            start, stop = averaged.bounds(run)
            first, last = ends[start] - repeats[start], ends[stop - 1]
            own = scored.read(by_image[first:last])
            out = np.zeros((stop - start, voxels), np.float32)
            for row, trial in zip(np.repeat(np.arange(stop - start), repeats[start:stop]), own, strict=True):
                out[row] += trial  # one after the other, as the loader adds them: the same to the last bit
            return dict.fromkeys(names, out / repeats[start:stop, None].astype(np.float32))

        numbers = np.arange(len(shown))
        trial_columns = {
            "session": numbers // session + 1,
            "trial": numbers % session,
            "nsd_id": shown,
            "shared": np.isin(shown, nsd.shared_ids),
        }
        return Job(
            (
                Step(f"subject {subject}: sessions", {scored_name: scored, trials_name: trials}, score),
                Step(f"subject {subject}: averages", {averaged_name: averaged}, average),
            ),
            (
                Table(f"{folder}/trials.parquet", trial_columns, identity),
                self._averages_table(subject, ids, repeats, identity),
            ),
        )

    def algonauts_betas(self, subject: int) -> Job:
        """Copy averages that are averages already."""
        tree = self.tree
        assert isinstance(tree, Algonauts)
        ids, repeats = tree.seen(subject)
        files = [paths.algonauts_betas(subject, hemisphere) for hemisphere in paths.HEMISPHERES]
        identity = {"betas": self._digest(files), "vertices": self.vertices(subject), "shown": array_digest(ids)}
        name = f"{subject_folder(subject)}/averaged.npy"
        averaged = self._writer(name, (len(ids), tree.n_voxels(subject)), np.float16, BETA_RUN, identity)

        def make(run: int, names: Sequence[str]) -> Rows:
            return dict.fromkeys(names, tree.beta_rows(subject, *averaged.bounds(run)))

        step = Step(f"subject {subject}: averages", {name: averaged}, make)
        return Job((step,), (self._averages_table(subject, ids, repeats, identity),))

    def _averages_table(self, subject: int, ids: np.ndarray, repeats: np.ndarray, identity: Mapping[str, Any]) -> Table:
        columns = {"nsd_id": ids, "repeats": repeats, "shared": np.isin(ids, self.tree.shared_ids)}
        return Table(f"{subject_folder(subject)}/averaged.parquet", columns, identity)

    def vertices(self, subject: int) -> list[str]:
        """Return a digest of the vertices in use of each hemisphere."""
        return [array_digest(self.tree.vertices(subject, hemisphere)) for hemisphere in paths.HEMISPHERES]

    # --- NSD-Synthetic ------------------------------------------------------------------------------------------------

    def synthetic(self, synthetic: Synthetic, subject: int) -> Job:
        """NSD-Synthetic's averaged recordings of a subject, and what that subject saw."""
        nsd = synthetic.nsd
        files = [paths.SYNTHETIC_STIMULI, paths.SYNTHETIC_DESIGN, paths.synthetic_colour_stimuli(subject)]
        files += [paths.synthetic_betas(subject, hemisphere) for hemisphere in paths.HEMISPHERES]
        identity = {"synthetic": self._digest(files), "vertices": self.vertices(subject)}
        folder = subject_folder(subject)
        ids, repeats = np.unique(synthetic.order, return_counts=True)
        betas_name = f"{folder}/synthetic.npy"
        betas = self._writer(betas_name, (len(ids), nsd.n_voxels(subject)), np.float16, len(ids), identity)
        writers = self._image_writers(f"{folder}/synthetic", synthetic.n_images, identity)

        def recordings(run: int, names: Sequence[str]) -> Rows:
            return dict.fromkeys(names, synthetic.load_betas(subject).betas)

        def pictures(run: int, names: Sequence[str]) -> Rows:
            numbers = np.arange(*next(iter(writers.values())).bounds(run))
            return self._resized(synthetic.images(subject, numbers, min(synthetic.sides)), names, writers)

        title = f"subject {subject}: NSD-Synthetic"
        return Job(
            (
                Step(title, {betas_name: betas}, recordings),
                Step(f"{title}, images", writers, pictures, parallel=True),
            ),
            (Table(f"{folder}/synthetic.parquet", {"image": ids, "repeats": repeats}, identity),),
        )


def array_digest(values: np.ndarray) -> str:
    """Return the SHA-256 of an array of whole numbers."""
    return hashlib.sha256(np.ascontiguousarray(values, np.int64).tobytes()).hexdigest()
