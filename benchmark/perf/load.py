"""Entry ``load``: training samples of a BIT, drawn at random from arrays on disk in the paper's shapes.

The reference reads one sample at a time from HDF5 files, contiguous and not compressed, and stacks a batch of them, as
a ``Dataset`` under a ``DataLoader`` would. Both sides read from the system's file cache: what is measured is the work
of reading, not the disk.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from benchmark.devices import as_float32
from benchmark.official_weights import NSD_VOXELS
from benchmark.perf.entries import Floor, Job, Part, Results
from benchmark.shards import collect, write_shards
from benchmark.stages.bit import Pool
from benchmark.stages.prepare import Prepared

_BATCH = 64


@dataclass(frozen=True)
class _Sizes:
    voxels: tuple[int, ...]  # of each subject
    seen: int  # images of each subject
    external: int
    side: int
    batches: int


def _sizes(job: Job) -> _Sizes:
    if job.quick:
        return _Sizes((300, 280), 20, 30, 16, 3)
    return _Sizes(NSD_VOXELS, 50, 200, 224, 100)


@dataclass(frozen=True)
class _Stored:
    """The same values twice: as the stages keep them, and in HDF5 files."""

    folder: tempfile.TemporaryDirectory[str]  # removed with this
    pool: Pool
    order: list[tuple[Tensor, np.ndarray]]  # subjects and target rows of each batch: what is to be read

    @property
    def root(self) -> Path:
        return Path(self.folder.name)


def _stored(job: Job) -> _Stored:
    """Write recordings (float16), the external images' predicted ones (float16) and images (uint8) at random."""
    sizes = _sizes(job)
    folder = tempfile.TemporaryDirectory()
    root, rng = Path(folder.name), np.random.default_rng(0)
    subjects = range(1, len(sizes.voxels) + 1)
    known = sizes.seen * len(sizes.voxels)
    images = rng.integers(0, 256, (known + sizes.external, sizes.side, sizes.side, 3), np.uint8)
    np.save(root / "images.npy", images[:known])
    np.save(root / "external.npy", images[known:])
    with h5py.File(root / "images.h5", "w") as file:
        file["images"] = images
    for subject, width in zip(subjects, sizes.voxels, strict=True):
        betas = rng.standard_normal((sizes.seen, width), np.float32).astype(np.float16)
        np.save(root / f"betas_subj{subject}.npy", betas)
        np.save(root / f"ids_subj{subject}.npy", np.arange(sizes.seen) * len(sizes.voxels) + subject - 1)
        with h5py.File(root / f"betas_subj{subject}.h5", "w") as file:
            file["betas"] = betas
    predicted = rng.standard_normal((sizes.external, sum(sizes.voxels)), np.float32).astype(np.float16)
    write_shards(root / "shards", sizes.external, lambda rows: {"betas": predicted[rows]}, batch=64)
    collect(root / "shards", root)
    with h5py.File(root / "external.h5", "w") as file:
        file["betas"] = predicted
    meta = {
        "image_size": sizes.side,
        "subjects": list(subjects),
        "n_voxels": list(sizes.voxels),
        "train_ids": list(range(known)),
        "validation_ids": [],
        "shared_ids": [],
    }
    (root / "meta.json").write_text(json.dumps(meta))
    pool = Pool(Prepared(root), root, fraction=None, seed=0)
    order = [(batch.subject, batch.rows) for batch in _batches(pool, job)]
    return _Stored(folder, pool, order)


def _batches(pool: Pool, job: Job) -> list[_Batch]:
    """Draw batches as a stage does and make float32 of them as a step does; keep what tells them apart."""
    kept = []
    for step in range(_sizes(job).batches):
        batch = pool.draw(_BATCH, step, torch.Generator().manual_seed(step))
        kept.append(_Batch(_some(as_float32(batch.betas, job.device)), batch.subject, batch.rows))
    return kept


@dataclass(frozen=True)
class _Batch:
    betas: Tensor
    subject: Tensor
    rows: np.ndarray


def _some(betas: Tensor) -> Tensor:
    """Every 97th voxel: enough to tell recordings apart, and little to keep."""
    return betas[:, ::97].clone()


def _few(images: np.ndarray) -> np.ndarray:
    """Every 31st row of pixels."""
    return images[:, ::31].copy()


# --- one sample at a time ---------------------------------------------------------------------------------------------


def reference_recordings(stored: _Stored, job: Job) -> Results:
    """The recordings of every batch, a sample at a time from HDF5."""
    data = stored.pool.data
    starts = np.concatenate([[0], np.cumsum(data.n_voxels)])
    own = [h5py.File(stored.root / f"betas_subj{subject}.h5")["betas"] for subject in data.subjects]
    external = h5py.File(stored.root / "external.h5")["betas"]

    def sample(subject: int, row: int) -> Tensor:
        if row < len(data.target_ids):
            betas = own[subject][np.searchsorted(data.seen_ids[subject], data.target_ids[row])]
        else:
            betas = external[row - len(data.target_ids), starts[subject] : starts[subject + 1]]
        padded = np.zeros(max(data.n_voxels), np.float32)
        padded[: len(betas)] = betas
        return torch.from_numpy(padded)

    read = [
        _some(torch.stack([sample(int(s), int(row)) for s, row in zip(subject, rows, strict=True)]))
        for subject, rows in stored.order
    ]
    return {"recordings": torch.cat(read).numpy()}


def reference_images(stored: _Stored, job: Job) -> Results:
    """The images of every batch, one at a time from HDF5."""
    images = h5py.File(stored.root / "images.h5")["images"]
    return {"images": np.concatenate([_few(np.stack([images[row] for row in rows])) for _, rows in stored.order])}


# --- ours -------------------------------------------------------------------------------------------------------------


def our_recordings(stored: _Stored, job: Job) -> Results:
    """The same batches, drawn from the pool that stages ``lowlevel``, ``semantic`` and ``joint`` train on."""
    batches = _batches(stored.pool, job)
    return {"recordings": torch.cat([batch.betas for batch in batches]).numpy()}


def our_images(stored: _Stored, job: Job) -> Results:
    """The same images, as stage ``lowlevel`` reads them for targets that it computes."""
    return {"images": np.concatenate([_few(stored.pool.data.target_images(rows)) for _, rows in stored.order])}


# --- the least that either can do -------------------------------------------------------------------------------------


def _recordings_floor(job: Job) -> Floor:
    """Each value read as float16, converted and written as float32."""
    sizes = _sizes(job)
    values = float(sizes.batches * _BATCH * max(sizes.voxels))
    return Floor(operations=values, nbytes=6 * values)


def _images_floor(job: Job) -> Floor:
    """Each byte read and written."""
    sizes = _sizes(job)
    values = 3.0 * sizes.batches * _BATCH * sizes.side**2
    return Floor(operations=values, nbytes=2 * values)


PARTS: tuple[Part, ...] = (
    Part("recordings, 6400 samples", _stored, our_recordings, reference_recordings, _recordings_floor),
    Part("images of 224 pixels, 6400 samples", _stored, our_images, reference_images, _images_floor),
)
TOLERANCES: Mapping[str, float] = {"recordings": 0.0, "images": 0.0}
