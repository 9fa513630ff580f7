"""Stages ``simulate`` and ``prepare``: from an NSD tree to arrays that training can map into memory."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.context import StageContext
from benchmark.data.images import prepare_images
from benchmark.data.nsd import NSD
from benchmark.data.prepared import PreparedData, is_store, subject_folder
from benchmark.data.settings import SimulationSettings
from benchmark.data.simulate import simulate
from benchmark.data.sources import open_tree
from benchmark.data.splits import make_splits
from benchmark.errors import UserError

TREE = "nsd"  # folder of the simulated tree inside the stage's folder
CHUNK = 256


def run_simulate(ctx: StageContext) -> dict[str, Any]:
    """Write a miniature NSD with the settings in the config; where it says ``complete``, with NSD-Synthetic beside."""
    settings = SimulationSettings(**ctx.config["settings"])
    simulate(ctx.out / TREE, settings, progress=ctx.progress, complete=ctx.config.get("complete", False))
    return {"subjects": settings.subjects, "images": settings.n_images, "sessions": settings.n_sessions}


def run(ctx: StageContext) -> dict[str, Any]:
    """Read the data; write images, averaged betas and the split; without the subject that a transfer leaves out.

    Outputs: ``images.npy`` (images x S x S x 3 uint8, row = NSD id), ``external.npy`` (likewise), for each subject
    ``betas_subjX.npy`` (images seen x voxels: z-scored per session, repeats averaged; float32, from a store float16)
    with ``ids_subjX.npy`` (ascending NSD ids), and ``meta.json``.
    """
    source = source_of(ctx)
    subjects = source.subjects
    if "leave_out" in ctx.config:
        subjects = without(source, ctx.config["leave_out"])
    count = _store_images(ctx, source) if isinstance(source, PreparedData) else _tree_images(ctx, source)
    write_averages(ctx, source, subjects)
    return {**write_meta(ctx, source, subjects), "external images": count}


def without(source: NSD | PreparedData, subject: int) -> tuple[int, ...]:
    """Return the subjects of the data but one.

    Raises:
        UserError: the data do not have it, or nobody else.
    """
    named = ", ".join(map(str, source.subjects))
    if subject not in source.subjects:
        raise UserError(f"transfer.subject is {subject}; the data have subjects {named}")
    others = tuple(other for other in source.subjects if other != subject)
    if not others:
        raise UserError(f"transfer.subject is {subject}, and the data have nobody else to train the base models on")
    return others


def check_transfer(source: NSD | PreparedData, subject: int) -> None:
    """Refuse data that a transfer to ``subject`` cannot be made with.

    Raises:
        UserError: no such subject, nobody else, or no single trials.
    """
    without(source, subject)
    try:
        source.trials(subject)
    except UserError as error:
        raise UserError(
            f"a transfer takes single trials of the new subject's first session: {error}\n"
            "name with --data a tree of NSD, or a store that was made of one"
        ) from error


def write_meta(ctx: StageContext, source: NSD | PreparedData, subjects: Sequence[int]) -> dict[str, Any]:
    """Split what the subjects saw as the config says, and write ``meta.json``; return how much there is."""
    splits = make_splits(source, subjects, ctx.config["validation_seed"], ctx.config["validation_fraction"])
    meta = {
        "image_size": ctx.config["image_size"],
        "subjects": list(subjects),
        "n_voxels": [source.n_voxels(subject) for subject in subjects],
        "train_ids": np.sort(np.concatenate(list(splits.train.values()))).tolist(),
        "validation_ids": np.sort(np.concatenate(list(splits.validation.values()))).tolist(),
        "shared_ids": np.asarray(source.shared_ids).tolist(),
    }
    (ctx.out / "meta.json").write_text(json.dumps(meta) + "\n")
    return {
        "subjects": len(subjects),
        "voxels": sum(meta["n_voxels"]),
        "train images": len(meta["train_ids"]),
        "validation images": len(meta["validation_ids"]),
        "test images": len(splits.test),
    }


def source_of(ctx: StageContext) -> NSD | PreparedData:
    """Open what a stage reads: the tree that was simulated for it, or what ``--data`` names.

    Raises:
        UserError: neither is there, or something in it is wrong.
    """
    root = ctx.inputs[TREE] / TREE if TREE in ctx.inputs else ctx.data
    if root is None:
        raise UserError("no data: name the folder of an NSD tree or of a prepared store with --data DIR")
    return open_data(root)


def open_data(root: Path) -> NSD | PreparedData:
    """Open what ``--data`` names: a store of ``python -m benchmark.data prepare``, or an NSD tree.

    Raises:
        UserError: it is neither, or something in it is wrong; names the file.
    """
    if is_store(root):
        return PreparedData.open(root)
    tree = open_tree(root)
    if not isinstance(tree, NSD):
        raise UserError(
            f"{root}: the Algonauts 2023 release; prepare it first, and name the store with --data:\n"
            f"python -m benchmark.data prepare {root} --out STORE"
        )
    return tree


def _store_images(ctx: StageContext, store: PreparedData) -> int:
    """Take the images of a prepared store, without copying them where the file system can; return the external ones."""
    size, limit = ctx.config["image_size"], ctx.config["external_images"]
    ids = store.image_ids
    if np.array_equal(ids, np.arange(len(ids))):
        take(store.root / f"images_{size}.npy", ctx.out / "images.npy", store.images(size))
    else:  # rows are NSD ids here; images that the store lacks stay black, and nothing reads them
        shape = (int(ids.max()) + 1, size, size, 3)
        images = np.lib.format.open_memmap(ctx.out / "images.npy", "w+", np.uint8, shape)
        for start in range(0, len(ids), CHUNK):
            images[ids[start : start + CHUNK]] = store.images(size)[start : start + CHUNK]
        images.flush()
    count = len(store.external_names) if limit is None else min(limit, len(store.external_names))
    if count and count == len(store.external_names):
        take(store.root / f"external_{size}.npy", ctx.out / "external.npy", store.external(size))
    else:
        some = store.external(size)[:count] if count else np.empty((0, size, size, 3), np.uint8)
        np.save(ctx.out / "external.npy", some)
    return count


def take(source: Path, target: Path, array: np.ndarray) -> None:
    """Give a file a second name; copy it where that cannot be. ``array`` is what it holds."""
    assert len(array)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _tree_images(ctx: StageContext, nsd: NSD) -> int:
    """Read the images of an NSD tree; return the number of external images."""
    size = ctx.config["image_size"]
    images = np.lib.format.open_memmap(ctx.out / "images.npy", "w+", np.uint8, (nsd.n_images, size, size, 3))
    with ctx.progress.bar("images", total=nsd.n_images) as bar:
        for start in range(0, nsd.n_images, CHUNK):
            ids = np.arange(start, min(start + CHUNK, nsd.n_images))
            images[ids] = prepare_images(nsd.images(ids), size)
            bar.advance(len(ids))
    images.flush()
    count = len(nsd.external) if ctx.config["external_images"] != 0 else 0
    if ctx.config["external_images"] is not None:
        count = min(count, ctx.config["external_images"])
    external = np.lib.format.open_memmap(ctx.out / "external.npy", "w+", np.uint8, (count, size, size, 3))
    with ctx.progress.bar("external images", total=count) as bar:
        for start in range(0, count, CHUNK):
            rows = np.arange(start, min(start + CHUNK, count))
            external[rows] = nsd.external.images(rows, size)
            bar.advance(len(rows))
    external.flush()
    return count


def write_averages(ctx: StageContext, source: NSD | PreparedData, subjects: Sequence[int]) -> None:
    """Write the subjects' averaged betas, and the images that they saw, as :func:`run` says."""
    with ctx.progress.bar("betas", total=len(subjects)) as bar:
        for subject in subjects:
            if isinstance(source, PreparedData):
                file = source.root / subject_folder(subject) / "averaged.npy"
                take(file, ctx.out / f"betas_subj{subject}.npy", source.averaged(subject))
                ids, _ = source.seen(subject)
            else:
                seen = source.load_betas(subject)
                np.save(ctx.out / f"betas_subj{subject}.npy", seen.betas.astype(np.float32))
                ids = seen.image_ids
            np.save(ctx.out / f"ids_subj{subject}.npy", ids.astype(np.int64))
            bar.advance(1, f"subject {subject}")


@dataclass(frozen=True)
class Samples:
    """Recordings and what they show, a row each: position of the subject, row of its betas, NSD id."""

    subject: np.ndarray
    row: np.ndarray
    image: np.ndarray

    def __len__(self) -> int:
        """Return the number of recordings."""
        return len(self.image)


class Prepared:
    """What stage ``prepare`` wrote, mapped into memory.

    *Target rows* number the images that training may see: training and validation images in ascending NSD id, then the
    external ones.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = json.loads((folder / "meta.json").read_text())
        self.image_size: int = meta["image_size"]
        self.subjects: tuple[int, ...] = tuple(meta["subjects"])
        self.n_voxels: tuple[int, ...] = tuple(meta["n_voxels"])
        self.train_ids = np.array(meta["train_ids"], np.int64)
        self.validation_ids = np.array(meta["validation_ids"], np.int64)
        self.shared_ids = np.array(meta["shared_ids"], np.int64)
        self.target_ids = np.sort(np.concatenate([self.train_ids, self.validation_ids]))

    def restricted(self, train_ids: np.ndarray) -> Prepared:
        """Return the same data with these training images alone; target rows keep their numbers.

        Raises:
            ValueError: an image that is not a training image.
        """
        if not np.isin(train_ids, self.train_ids).all():
            raise ValueError("restricted: an image that is not in the training set")
        fewer = copy.copy(self)
        fewer.train_ids = np.unique(train_ids)
        return fewer

    @cached_property
    def images(self) -> np.ndarray:
        """All NSD images: n x S x S x 3 uint8."""
        return np.load(self.folder / "images.npy", mmap_mode="r")

    @cached_property
    def external(self) -> np.ndarray:
        """Images without fMRI: n x S x S x 3 uint8."""
        return np.load(self.folder / "external.npy", mmap_mode="r")

    @property
    def n_targets(self) -> int:
        """Target rows in all."""
        return len(self.target_ids) + len(self.external)

    def target_images(self, rows: np.ndarray) -> np.ndarray:
        """Return the images of target rows: n x S x S x 3 uint8."""
        known = len(self.target_ids)
        out = np.empty((len(rows), self.image_size, self.image_size, 3), np.uint8)
        for image, row in zip(out, rows.tolist(), strict=True):  # each is copied once: an array of numbers would twice
            image[:] = self.images[self.target_ids[row]] if row < known else self.external[row - known]
        return out

    def target_rows(self, ids: np.ndarray) -> np.ndarray:
        """Return the target rows of NSD ids (which must be training or validation images)."""
        rows = np.searchsorted(self.target_ids, ids)
        if not np.array_equal(self.target_ids[np.minimum(rows, len(self.target_ids) - 1)], ids):
            raise ValueError("target_rows: an image that is in neither the training nor the validation set")
        return rows

    @cached_property
    def betas(self) -> list[np.ndarray]:
        """For each subject: images seen x voxels, float32 or float16."""
        return [np.load(self.folder / f"betas_subj{s}.npy", mmap_mode="r") for s in self.subjects]

    @cached_property
    def seen_ids(self) -> list[np.ndarray]:
        """For each subject: NSD ids of the rows of its betas, ascending."""
        return [np.load(self.folder / f"ids_subj{s}.npy") for s in self.subjects]

    def test_ids(self, subjects: Sequence[int]) -> np.ndarray:
        """Return the shared images that all of these subjects (from 1) saw, ascending.

        Raises:
            UserError: a subject that is not in the data, or no image that all saw.
        """
        ids = self.shared_ids
        for subject in subjects:
            if subject not in self.subjects:
                have = ", ".join(map(str, self.subjects))
                raise UserError(f"generation.subjects names subject {subject}; the data has subjects {have}")
            ids = np.intersect1d(ids, self.seen_ids[self.subjects.index(subject)])
        if not len(ids):
            raise UserError(f"no shared image was seen by all of subjects {', '.join(map(str, subjects))}")
        return ids

    def samples(self, ids: np.ndarray) -> Samples:
        """Return every subject's recording of each of these images, subject after subject."""
        subjects, rows, images = [], [], []
        for position, seen in enumerate(self.seen_ids):
            row = np.flatnonzero(np.isin(seen, ids))
            subjects.append(np.full(len(row), position))
            rows.append(row)
            images.append(seen[row])
        return Samples(np.concatenate(subjects), np.concatenate(rows), np.concatenate(images))

    def padded_betas(self, subject: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Return recordings as B x (most voxels of any subject) float32, zero on the right where one has fewer."""
        import torch

        out = np.zeros((len(row), max(self.n_voxels)), self.betas_dtype)
        self.put_betas(out, np.arange(len(row)), subject, row)
        return torch.from_numpy(out).float().numpy()  # seven times as fast as numpy

    @cached_property
    def betas_dtype(self) -> np.dtype[Any]:
        """What holds every subject's betas: float16 or float32."""
        return np.result_type(*(betas.dtype for betas in self.betas))

    def put_betas(self, out: np.ndarray, places: np.ndarray, subject: np.ndarray, row: np.ndarray) -> None:
        """Write recordings into the rows ``places`` of ``out`` (B x at least so many voxels), on the left."""
        for place, s, r in zip(places.tolist(), subject.tolist(), row.tolist(), strict=True):
            out[place, : self.n_voxels[s]] = self._plain_betas[s][r]

    @cached_property
    def _plain_betas(self) -> list[np.ndarray]:
        """The mapped arrays as arrays of the ordinary class, of which a row is taken faster."""
        return [betas.view(np.ndarray) for betas in self.betas]
