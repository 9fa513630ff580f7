"""From a data tree to a prepared store: what ``python -m benchmark.data prepare`` does.

Session after session, and run of images after run of images, so that memory is bounded whatever the subject, and so
that a killed process loses the run under way and nothing else: the same command goes on. What is there is checked by
its digest before it is taken for done. ``recipes`` says how each array is made, ``prepared`` what is in a store.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmark.data import paths
from benchmark.data.algonauts import Algonauts
from benchmark.data.arrays import damages
from benchmark.data.images import STORED
from benchmark.data.nsd import NSD
from benchmark.data.prepared import MANIFEST, Manifest, PreparedData, is_store, subject_folder
from benchmark.data.recipes import WORK, Job, Recipes, Rows, Step, Table
from benchmark.data.release import NEEDED, NSD_RELEASE, OPTIONAL, PARTS, SIZES, Release
from benchmark.data.sources import Kind, open_tree
from benchmark.data.synthetic import Synthetic
from benchmark.data.wording import gigabytes
from benchmark.errors import RunError, UserError, did_you_mean
from benchmark.progress import Progress
from benchmark.store import sha256_file, write_json

_LOCK = ".lock"
_SPARE = 64 * 2**20  # bytes for tables and marks
_EXTERNAL = "external.parquet"


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` did."""

    data: PreparedData
    reused: bool
    """Whether everything was there already."""
    notes: tuple[str, ...]
    """What was left out because the tree does not have it, a sentence each."""


def prepare(
    root: Path | str,
    out: Path | str,
    parts: Sequence[str] | None = None,
    subjects: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
    external: int | None = None,
    source: Kind = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
    release: Release = NSD_RELEASE,
) -> Prepared:
    """Turn the data tree at ``root`` into a store in ``out``, or go on with the one that is there, or add to it.

    Args:
        root: NSD, the Algonauts 2023 release or a miniature.
        out: the store's folder; new, empty, or a store of the same tree.
        parts: of ``PARTS``; default: betas, images and external, and of the others what the tree has.
        subjects: from 1; default: all that the tree has.
        sizes: sides of the images in pixels; default: 256, 224 and 112, or the tree's own where that is smaller.
        external: at most so many external images; default: all.
        source: ``nsd`` or ``algonauts`` where the tree has both.
        workers: threads that resize images; default: one for each processor, at most sixteen.
        progress: shows bars; default: nothing.
        release: the published numbers that NSD itself must have.

    Raises:
        UserError: something that was asked for is not in the tree, or is wrong, or ``out`` holds something else.
        RunError: the disk is too small.
    """
    for name in parts or ():
        if name not in PARTS:
            raise UserError(f"no part '{name}'{did_you_mean(name, PARTS)}; choose from {', '.join(PARTS)}")
    wrong = [size for size in sizes or () if not 8 <= size <= 4096]
    if wrong:
        raise UserError(f"images of {wrong[0]} pixels: expected sizes from 8 to 4096")
    if external is not None and external < 0:
        raise UserError(f"{external} external images: expected 0 or more")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; expected a folder, or a name that is free")
    if is_store(Path(root)):
        raise UserError(f"{root}: is a prepared store already; name the data tree that it was made of")
    own = {_LOCK, WORK}
    if out.is_dir() and not is_store(out) and any(path.name not in own for path in out.iterdir()):
        raise UserError(f"{out}: is not empty and is no prepared store; choose another folder with --out")
    tree = open_tree(root, source, subjects, release)
    preparation = _Preparation(tree, out, parts, sizes, external, workers, progress or Progress(enabled=False))
    return preparation.run()


class _Preparation:
    """One call of ``prepare``."""

    def __init__(
        self,
        tree: NSD | Algonauts,
        out: Path,
        parts: Sequence[str] | None,
        sizes: Sequence[int] | None,
        external: int | None,
        workers: int | None,
        progress: Progress,
    ) -> None:
        self.tree, self.out, self.external_limit, self.progress = tree, out, external, progress
        self.workers = workers or min(16, _processors())
        self.surfaces = tuple(s for s in paths.SURFACE_NAMES if self._both(tree.surface_file(h, s) for h in _SIDES))
        self.atlases = tuple(
            short for short, name in paths.ATLASES.items() if self._both(paths.annotation(h, name) for h in _SIDES)
        )
        self.notes: list[str] = []
        self.parts = self._choose(parts)
        own = tree.image_size
        self.sizes = tuple(sorted(set(sizes or (SIZES if own >= STORED else (own,))), reverse=True))
        self.recipes = Recipes(tree, out, self.sizes)
        self.manifest = Manifest.read(out) if is_store(out) else Manifest(out)

    # --- what is to be made -------------------------------------------------------------------------------------------

    def _both(self, names: Iterator[str]) -> bool:
        return all((self.tree.root / name).is_file() for name in names)

    def _choose(self, asked: Sequence[str] | None) -> tuple[str, ...]:
        """Return the parts to make; an optional one that the tree lacks is left out, unless it was asked for."""
        tree = self.tree
        there = {"atlases": bool(self.atlases), "surfaces": bool(self.surfaces), "synthetic": False, "ncsnr": False}
        if isinstance(tree, NSD):
            there["synthetic"] = any((tree.root / paths.synthetic_betas(s, "lh")).is_file() for s in tree.subjects)
            there["ncsnr"] = self._both(paths.ncsnr(s, h) for s in tree.subjects for h in _SIDES)
        if asked is None:
            self.notes += [f"left out {name}: not in {tree.root}" for name in OPTIONAL if not there[name]]
            return (*NEEDED, *(name for name in OPTIONAL if there[name]))
        absent = [name for name in asked if not there.get(name, True)]
        if absent:
            raise UserError(
                f"{tree.root}: has no {absent[0]}, which --parts names\ntype python -m benchmark.data check {tree.root}"
            )
        return tuple(name for name in PARTS if name in asked)

    def _jobs(self) -> list[Job]:
        tree, recipes = self.tree, self.recipes
        jobs: list[Job] = []
        if "images" in self.parts:
            jobs.append(recipes.images())
        if "external" in self.parts:
            jobs.append(self._external())
        if "betas" in self.parts:
            make = recipes.nsd_betas if isinstance(tree, NSD) else recipes.algonauts_betas
            jobs += [make(subject) for subject in tree.subjects]
        if "synthetic" in self.parts and isinstance(tree, NSD):
            synthetic = Synthetic.open(tree)
            jobs += [recipes.synthetic(synthetic, subject) for subject in synthetic.subjects]
        return jobs

    def _external(self) -> Job:
        """List the photographs that are RGB, once: it takes a look at every file's header."""
        identity = self.recipes.external_identity(self.external_limit)
        entry = self.manifest.tables.get(_EXTERNAL)
        if entry and entry["identity"] == identity and self._written(_EXTERNAL):
            return self.recipes.external(pq.read_table(self.out / _EXTERNAL)["file"].to_pylist(), identity)
        for size in self.sizes:  # before the list of the images that are there is replaced
            name = f"external_{size}.npy"
            if self._finished(name):
                there = self.manifest.arrays[name].identity
                if any(there.get(key) != value for key, value in identity.items()):
                    self._refuse(name, there, identity)
        source = self.tree.external
        names: list[str] = []
        with self.progress.bar("external images: colours", total=len(source.files), share=True) as bar:
            for name in source.files:
                if self.external_limit is not None and len(names) >= self.external_limit:
                    break
                if source.is_rgb(name):
                    names.append(name)
                bar.advance(1)
        if not names and self.external_limit != 0:
            source.coloured(())  # says what is missing
        self._write(Table(_EXTERNAL, {"file": pa.array(names, pa.string())}, identity))
        return self.recipes.external(names, identity)

    # --- making it ----------------------------------------------------------------------------------------------------

    def run(self) -> Prepared:
        """Make what is not there."""
        with _readable_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            with _locked(self.out):
                (self.out / WORK).mkdir(exist_ok=True)
                self._remember_tree()
                before = json.dumps(self.manifest.as_json(), sort_keys=True)
                jobs = self._jobs()
                self._check_finished(jobs)
                self._check_room(jobs)
                for job in jobs:
                    self._do(job)
                self._describe_voxels()
                self._conclude()
                reused = json.dumps(self.manifest.as_json(), sort_keys=True) == before
        return Prepared(PreparedData.open(self.out), reused, tuple(self.notes))

    def _remember_tree(self) -> None:
        """Note in a new store what it is made of; refuse to add another tree's data to one that is there."""
        tree, about = self.tree, self.manifest.about
        own: dict[str, Any] = {
            "kind": tree.kind,
            "published": tree.published,
            "image_size": tree.image_size,
            "shared_ids": tree.shared_ids.tolist(),
        }
        if not about:
            empty = {"complete": False, "parts": [], "sizes": [], "subjects": [], "n_voxels": {}, "sessions": {}}
            self.manifest.about = {**own, "limits": list(tree.limits), **empty}
            self._save()
            return
        different = [name for name, value in own.items() if about.get(name) != value]
        if different:
            raise UserError(
                f"{self.out}: was made of another data tree than {tree.root} ({different[0]} differs); "
                "choose another folder with --out"
            )
        there = about["sizes"]
        if there and there != list(self.sizes) and {"images", "external", "synthetic"} & set(self.parts):
            numbers = " ".join(map(str, there))
            raise UserError(
                f"{self.out}: has images of {numbers} pixels, not {' '.join(map(str, self.sizes))}\n"
                f"type --sizes {numbers}, or choose another folder with --out"
            )

    def _finished(self, name: str) -> bool:
        """Return whether an array is in the manifest and on the disk, by its size."""
        record = self.manifest.arrays.get(name)
        return record is not None and next(damages(self.out / name, record, digests=False), None) is None

    def _check_finished(self, jobs: Sequence[Job]) -> None:
        """Refuse an array that is there and was made of something else; note what is left of one under way."""
        for job in jobs:
            for name, writer in job.writers.items():
                record = self.manifest.arrays.get(name)
                if record is None or not self._finished(name):
                    writer.glance()
                elif dict(record.identity) != writer.identity or record.shape != writer.shape:
                    self._refuse(name, record.identity, writer.identity)

    def _refuse(self, name: str, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        different = ", ".join(key for key, value in now.items() if there.get(key) != value) or "shape"
        raise UserError(
            f"{self.out / name}: was made of other data or with other settings ({different})\n"
            f"choose another folder with --out, or make it anew: rm {self.out / name}"
        )

    def _check_room(self, jobs: Sequence[Job]) -> None:
        """Refuse to begin what the disk cannot hold."""
        need = work = 0
        for job in jobs:
            open_ones = [writer for name, writer in job.kept.items() if not self._finished(name)]
            need += sum(writer.left_bytes for writer in open_ones)
            if open_ones:  # one job after the other: the largest counts
                work = max(work, sum(w.left_bytes for name, w in job.writers.items() if name not in job.kept))
        if not need:
            return
        need += work + _SPARE
        free = shutil.disk_usage(self.out).free
        if need > free:
            raise RunError(
                f"{self.out}: needs {gigabytes(need)} more, its disk has {gigabytes(free)} free\n"
                "free some space, choose another --out, or ask for less with --parts, --subjects, --sizes or --external"
            )

    def _do(self, job: Job) -> None:
        """Make what is left of a job and enter it in the manifest."""
        if all(self._finished(name) for name in job.kept):
            for table in job.tables:
                if not self._written(table.name):
                    self._write(table)
            return
        for name in job.kept:
            self.manifest.arrays.pop(name, None)  # one of them is damaged: all are made from the same rows
        there = sum(writer.nbytes - writer.left_bytes for writer in job.writers.values())
        with self.progress.bar(f"{job.steps[0].title}: checking what is there", total=there, share=True) as bar:
            for writer in job.writers.values():
                writer.open(bar.advance)
        for step in job.steps:
            self._fill(step)
        self.manifest.arrays.update({name: writer.finish() for name, writer in job.kept.items()})
        for table in job.tables:
            self._write(table)
        self._save()
        for writer in job.writers.values():
            writer.forget()

    def _fill(self, step: Step) -> None:
        writers = step.writers
        first = next(iter(writers.values()))
        open_runs = {name: set(writer.todo) for name, writer in writers.items()}
        todo = sorted(set().union(*open_runs.values()))
        wanted = {run: [name for name, runs in open_runs.items() if run in runs] for run in todo}
        left = sum(stop - start for start, stop in map(first.bounds, todo))
        rows = first.shape[0]
        with self.progress.bar(step.title, total=rows, start=rows - left, share=True) as bar:
            workers = self.workers if step.parallel else 1
            for run, made in _in_order(lambda run: step.make(run, wanted[run]), todo, workers):
                for name, values in made.items():
                    writers[name].write(run, values)
                start, stop = first.bounds(run)
                bar.advance(stop - start)

    def _describe_voxels(self) -> None:
        """Write what is known of each voxel; quickly made, so it is made every time."""
        tree = self.tree
        if not {"betas", "atlases", "surfaces", "ncsnr"} & set(self.parts):
            return
        for subject in tree.subjects:
            vertices = [tree.vertices(subject, hemisphere) for hemisphere in _SIDES]
            name = f"{subject_folder(subject)}/voxels.parquet"
            identity = {"vertices": self.recipes.vertices(subject)}
            voxels: dict[str, Any] = {}
            if self._written(name) and self.manifest.tables[name]["identity"] == identity:
                table = pq.read_table(self.out / name)  # what an earlier call knew stays
                voxels = {column: table[column].to_numpy() for column in table.column_names}
            voxels["hemisphere"] = np.repeat([0, 1], [len(v) for v in vertices]).astype(np.int8)
            voxels["vertex"] = np.concatenate(vertices).astype(np.int32)
            if "ncsnr" in self.parts and isinstance(tree, NSD):
                voxels["ncsnr"] = tree.ncsnr(subject)
            for atlas in self.atlases if "atlases" in self.parts else ():
                voxels[atlas] = tree.parcels(subject, atlas).astype(np.int32)
            for surface in self.surfaces if "surfaces" in self.parts else ():
                points = tree.coordinates(subject, surface)
                voxels |= {f"{surface}_{axis}": points[:, k] for k, axis in enumerate("xyz")}
            self._write(Table(name, voxels, identity))

    def _written(self, name: str) -> bool:
        """Return whether a table is in the manifest and on the disk, as it was written."""
        path, entry = self.out / name, self.manifest.tables.get(name)
        return entry is not None and path.is_file() and sha256_file(path) == entry["sha256"]

    def _write(self, table: Table) -> None:
        """Write a table and enter it in the manifest."""
        path = self.out / table.name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        pq.write_table(pa.table(dict(table.columns)), temporary)
        os.replace(temporary, path)
        entry = {"bytes": path.stat().st_size, "sha256": sha256_file(path), "identity": dict(table.identity)}
        if self.manifest.tables.get(table.name) != entry:
            self.manifest.tables[table.name] = entry
            self._save()

    def _conclude(self) -> None:
        """Say in the manifest what the store now holds, and clear away what no array needs."""
        tree, about = self.tree, self.manifest.about
        about["parts"] = [part for part in PARTS if part in {*about["parts"], *self.parts}]
        if {"images", "external", "synthetic"} & set(self.parts):
            about["sizes"] = list(self.sizes)
        if "betas" in self.parts:
            about["subjects"] = sorted({*about["subjects"], *tree.subjects})
            about["limits"] = list(tree.limits)
            for subject in tree.subjects:
                about["n_voxels"][str(subject)] = tree.n_voxels(subject)
                if isinstance(tree, NSD):
                    about["sessions"][str(subject)] = tree.sessions[subject]
        about["complete"] = True
        self._save()
        shutil.rmtree(self.out / WORK, ignore_errors=True)
        for ending in (".part", ".marks", ".tmp"):  # of settings that were given up, of processes that were killed
            for leftover in [*self.out.glob(f"*{ending}"), *self.out.glob(f"*/*{ending}")]:
                leftover.unlink()

    def _save(self) -> None:
        write_json(self.out / MANIFEST, self.manifest.as_json())


_SIDES = paths.HEMISPHERES


def _in_order(make: Callable[[int], Rows], runs: Sequence[int], workers: int) -> Iterator[tuple[int, Rows]]:
    """Yield what ``make`` makes of each run, in order; a few are under way at once."""
    if workers < 2 or len(runs) < 2:
        for run in runs:
            yield run, make(run)
        return
    pool = ThreadPoolExecutor(workers)
    under_way: deque[tuple[int, Future[Rows]]] = deque()
    try:
        for run in runs:
            under_way.append((run, pool.submit(make, run)))
            if len(under_way) > workers + 1:
                number, future = under_way.popleft()
                yield number, future.result()
        while under_way:
            number, future = under_way.popleft()
            yield number, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of the store; the kernel frees the lock of one that dies."""
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is preparing this store; wait for it") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            raise UserError(
                f"{folder}: is on a file system without file locks ({error.strerror}), which keep two processes apart; "
                "choose a folder on another one with --out"
            ) from error
        yield


@contextlib.contextmanager
def _readable_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"{folder}: the disk is full; what is finished stays\nfree some space and type the same command"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{error.filename or folder}: {error.strerror}; choose another --out") from error
        raise


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
