"""Transfer to a new subject: trained models take in another brain, of which little was recorded (Brain-IT, App. D.4).

Whatever is particular to a voxel is one vector; all else is shared by all voxels of all subjects. So a new subject is a
new table of vectors, and its training leaves the rest of every model as it is, to the bit:

1. the encoder gets a table drawn at random, which learns from the new subject's few recordings;
2. each new voxel takes the cluster of the known voxel whose encoder embedding is nearest
   (`methods.brain_it.clustering.nearest_voxel_labels`), and in each BIT starts from that voxel's embedding there;
3. the tables of the BITs learn from recordings and, three times as often, from what the adapted encoder predicts for
   photographs that nobody saw (:func:`mixed`).

The paper says that encoder embeddings initialise the BITs'. The two differ in width (256 and 512), so what it means is
read from the official code: by way of the nearest known voxel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

ENCODER_TABLE = "voxel_embedding"
"""Name of the voxel table in `methods.brain_it.encoder.BrainEncoder`."""
BIT_TABLE = "tokenizer.voxel_embeddings"
"""Name of the voxel table in `methods.brain_it.transformer.BIT`."""


def adopt(model: nn.Module, trained: Mapping[str, Tensor], table: str, start: Tensor | None = None) -> nn.Parameter:
    """Give a model of a new subject's voxels the trained weights of another model, all frozen but its voxel table.

    Args:
        model: built for the new subject; otherwise of the sizes of the trained one.
        trained: the trained model's tensors by name (its own voxel table, of other voxels, is not read).
        table: name of the voxel table in both.
        start: (voxels, width) where the new table starts; where None, it stays as the model was built.

    Returns:
        The new table, the one parameter of ``model`` that requires a gradient.

    Raises:
        ValueError: ``model`` has no such table, it is of another size than ``start``, or a tensor is missing,
            unexpected or of another shape.
    """
    known = dict(model.named_parameters())
    if table not in known:
        raise ValueError(f"adopt: the model has no parameter '{table}'")
    own = known[table]
    if start is not None and start.shape != own.shape:
        raise ValueError(f"adopt: a start of {tuple(start.shape)} for a voxel table of {tuple(own.shape)}")
    begins = own.detach() if start is None else start
    try:
        model.load_state_dict({**trained, table: begins})
    except RuntimeError as error:
        raise ValueError(f"adopt: the trained tensors do not fit: {error}") from error
    model.requires_grad_(False)
    own.requires_grad_(True)
    return own


def frozen_digest(model: nn.Module) -> str:
    """Return a SHA-256 of every tensor of a model that training may not change, names and bits.

    These are the parameters that require no gradient, and all buffers that are saved with the model.
    """
    saved = model.state_dict(keep_vars=True)
    digest = hashlib.sha256()
    for name in sorted(saved):
        value = saved[name]
        if not isinstance(value, Tensor) or (isinstance(value, nn.Parameter) and value.requires_grad):
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def epoch_length(n_real: int, n_predicted: int, every: int = 4) -> int:
    """Return the samples of an epoch of :func:`mixed`: ``every`` times the recordings; these alone without others."""
    return n_real * every if n_predicted else n_real


def mixed(
    positions: NDArray[np.integer[Any]], n_real: int, n_predicted: int, *, every: int = 4, seed: int = 0
) -> NDArray[np.int64]:
    """Return which samples stand at positions of the training: every fourth of an epoch a recording (official code).

    An epoch is ``every`` times as long as there are recordings. Its items are shuffled; item ``i`` is recording
    ``i / every`` where that is whole, and else an image drawn at random for which a response was predicted. So each
    recording occurs once an epoch, and among ``every`` times as many samples. Position ``p`` gives the same sample
    whatever was asked before, which is what a resumed training needs.

    Args:
        positions: from 0 over the whole training, ascending or not.
        n_real: recordings.
        n_predicted: images with a predicted response; with none, an epoch is the recordings, shuffled.
        every: one sample in so many is a recording (Brain-IT: 4).
        seed: of the order of each epoch, and of what it draws.

    Returns:
        int64, one for each position: recordings as 0..n_real-1, predicted ones as n_real..n_real+n_predicted-1.

    Raises:
        ValueError: no recording, or ``every`` below 1.
    """
    if n_real < 1 or n_predicted < 0 or every < 1:
        raise ValueError(
            f"mixed: {n_real} recordings, {n_predicted} predicted, one in {every}; expected 1, 0, 1 or more"
        )
    step = every if n_predicted else 1
    length = epoch_length(n_real, n_predicted, every)
    positions = np.asarray(positions, np.int64)
    out = np.empty(positions.shape, np.int64)
    for epoch in np.unique(positions // length):
        rng = np.random.default_rng([seed, int(epoch)])
        item = rng.permutation(length)
        drawn = rng.integers(n_predicted, size=length) if n_predicted else np.zeros(length, np.int64)
        samples = np.where(item % step == 0, item // step, n_real + drawn)
        here = positions // length == epoch
        out[here] = samples[positions[here] % length]
    return out
