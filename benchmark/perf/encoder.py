"""Entry ``encoder``: a training step's passes through the brain encoder, from tapped features to all gradients.

The reference is the equations of :mod:`methods.brain_it.encoder` as they stand there: every sampled voxel of every
image makes its query, looks at all positions, and passes the MLP. Sizes are the paper's: 5 taps of 257 positions and
1024 channels, 32 images, 5,000 voxels each, with dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from benchmark.perf.entries import Floor, Job, Part, Results
from benchmark.perf.gradients import comparable, tolerances
from methods.brain_it.encoder import BrainEncoder, _TapReader
from methods.brain_it.losses import encoder_loss


@dataclass(frozen=True)
class _Sizes:
    batch: int = 32
    voxels: int = 5_000
    subject: int = 39_548
    taps: int = 5
    positions: int = 257
    channels: int = 1024
    embed: int = 256
    inner: int = 128


_PAPER = _Sizes()
_SMALL = _Sizes(batch=3, voxels=40, subject=60, taps=2, positions=17, channels=24, embed=16, inner=8)
_PARAMETERS = (
    "voxel_embedding",
    "position",
    "readout",
    "readers.0.norm.weight",
    "readers.0.reduce.weight",
    "readers.0.query.weight",
    "readers.0.query.bias",
    "readers.0.key.weight",
    "readers.0.pooled_norm.weight",
    "readers.1.mlp.0.weight",
    "readers.1.mlp.2.bias",
)
_RESULTS = ("activity", "features", *_PARAMETERS)


@dataclass(frozen=True)
class _Inputs:
    encoder: BrainEncoder
    features: list[Tensor]  # taps x (B, P, C)
    voxels: Tensor  # B x V
    measured: Tensor  # B x V


def _sizes(job: Job) -> _Sizes:
    return _SMALL if job.quick else _PAPER


def _prepare(job: Job) -> _Inputs:
    sizes = _sizes(job)
    torch.manual_seed(1)
    encoder = BrainEncoder(
        [sizes.subject], [sizes.channels] * sizes.taps, sizes.positions, embed_dim=sizes.embed, inner=sizes.inner
    )
    with torch.no_grad():  # attention that is far from uniform, as after training
        encoder.voxel_embedding.mul_(0.5 / encoder.voxel_embedding.std())
    shape = sizes.batch, sizes.positions, sizes.channels
    # They need gradients: adapters in the backbone train with the encoder.
    features = [torch.randn(shape).to(job.device).requires_grad_() for _ in range(sizes.taps)]
    voxels = torch.randint(sizes.subject, (sizes.batch, sizes.voxels)).to(job.device)
    return _Inputs(encoder.to(job.device), features, voxels, torch.randn(voxels.shape).to(job.device))


def _step(inputs: _Inputs, predict: Callable[[BrainEncoder, list[Tensor], Tensor], Tensor]) -> Results:
    torch.manual_seed(2)  # dropout
    activity = predict(inputs.encoder, inputs.features, inputs.voxels)
    encoder_loss(activity, inputs.measured).backward()
    parameters = dict(inputs.encoder.named_parameters())
    trained = [inputs.features[0], *(parameters[name] for name in _PARAMETERS)]
    gradients = [cast(Tensor, tensor.grad) for tensor in trained]
    return comparable(dict(zip(_RESULTS, (activity, *gradients), strict=True)))


def ours(inputs: _Inputs, job: Job) -> Results:
    """Activity and gradients by the encoder that training uses."""
    return _step(inputs, lambda encoder, features, voxels: encoder(features, voxels))


def plain(encoder: BrainEncoder, features: list[Tensor], voxels: Tensor) -> Tensor:
    """Activity (B, V) by the equations, with the encoder's parameters."""
    e = encoder.voxel_embedding[voxels]
    found = []
    for tap, tokens in zip(encoder.readers, features, strict=True):
        tap = cast(_TapReader, tap)
        f = tap.reduce(tap.norm(tokens))
        keys = tap.key(f) + encoder.position
        attention = (tap.query(e) @ keys.transpose(1, 2)).softmax(-1)
        x = tap.dropout(tap.pooled_norm(attention @ f))
        found.append(x + tap.mlp(x))
    return (torch.cat(found, -1) * (e @ encoder.readout)).sum(-1)


def reference(inputs: _Inputs, job: Job) -> Results:
    """The same by the equations."""
    return _step(inputs, plain)


def _floor(job: Job) -> Floor:
    """Scores, weighted sums, the MLP and the read-out of every voxel, forward and twice backward; the table's rows."""
    s = _sizes(job)
    each = 2 * s.positions * (s.embed + s.inner) + 2 * 2 * s.inner * 4 * s.inner + 2 * s.embed * s.inner
    scene = 2 * s.positions * (s.channels * s.inner + s.inner * s.embed + s.embed**2)
    operations = 3.0 * s.batch * s.taps * (s.voxels * each + scene)
    features = 2 * 4 * s.batch * s.taps * s.positions * s.channels
    return Floor(operations, features + 4.0 * s.embed * (2 * s.batch * s.voxels + s.subject))


PARTS: tuple[Part, ...] = (Part("forward and backward", _prepare, ours, reference, _floor),)
TOLERANCES: Mapping[str, float] = tolerances(_RESULTS, 5e-3)
