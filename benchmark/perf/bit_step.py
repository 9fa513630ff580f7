"""Entry ``bit-step``: one training step of each branch's Brain Interaction Transformer, from recordings to new weights.

The reference is the paper's configuration written plainly: PyG's tokenizer, attention with its whole matrix of weights,
InfoNCE with its whole matrix of logits, torch's optimiser as it comes. All sizes are the paper's except the batch: a
host's memory holds an eighth of it (8 of 64 examples, 16 of 128) in float32. Since InfoNCE grows with its square, a
smaller batch has fewer logits for each example, on either side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmark.config import BranchConfig, paper
from benchmark.perf import infonce, tokenizer
from benchmark.perf.entries import Floor, Job, Part, Results
from benchmark.perf.gradients import comparable, tolerances
from benchmark.stages.bit import build_bit
from benchmark.training import _optimiser
from methods.brain_it.attention import attention_weights
from methods.brain_it.losses import multi_layer_info_nce
from methods.brain_it.tokenizer import ReferenceTokenizer, VoxelLayout, sample_voxels
from methods.brain_it.transformer import BIT, CrossAttention, CrossBlock, SelfAttention, SelfBlock, _heads
from methods.brain_it.vgg_tokens import FeatureTokens, TokenLayer

Branch = Literal["lowlevel", "semantic"]

_NSD = (39_548,) * 5 + (39_198, 39_548, 39_511)  # voxels of the eight subjects
_SHARE = 8  # of the paper's batch
_VGG = FeatureTokens(
    (
        TokenLayer(64, 112, 2, 2, 512),
        TokenLayer(128, 56, 2, 1, 512),
        TokenLayer(256, 28, sampled=128),
        TokenLayer(512, 14, sampled=64),
        TokenLayer(512, 7, sampled=16),
    ),
    512,
)
_SMALL_VGG = FeatureTokens((TokenLayer(4, 8, 2, 2, 12), TokenLayer(16, 4, sampled=5)), 16)
_PARAMETERS = (
    "tokenizer.voxel_embeddings",
    "tokenizer.cluster_embeddings",
    "tokenizer.norm.weight",
    "query_tokens",
    "blocks.0.attn.qkv.weight",
    "block_crosses.0.attn.kv.weight",
    "block_crosses.1.mlp.fc1.weight",
    "proj.weight",
)
_RESULTS = ("loss", *_PARAMETERS)


@dataclass(frozen=True)
class _Sizes:
    """Of a branch, its subjects and its targets."""

    config: BranchConfig
    voxels: tuple[int, ...]
    clusters: int
    batch: int
    layers: FeatureTokens | None  # what InfoNCE distinguishes; None for a squared error
    queries: int
    asked: int  # queries that are computed for each example
    out: int

    @property
    def tokenizer(self) -> tokenizer.Sizes:
        """Sizes of its tokenizer, an example's voxels being the largest subject's."""
        draws = self.config.voxels_per_example
        assert draws is not None
        return tokenizer.Sizes(max(self.voxels), self.clusters, self.config.dim, draws)


@dataclass(frozen=True)
class _Inputs:
    bit: BIT
    sizes: _Sizes
    betas: Tensor  # B x most voxels
    subject: Tensor  # B
    keep: Tensor  # B x most voxels
    queries: Tensor | None  # B x asked
    true: Tensor  # B x asked x out


def _sizes(job: Job, branch: Branch) -> _Sizes:
    variant = paper()
    config: BranchConfig = variant.lowlevel if branch == "lowlevel" else variant.semantic
    voxels: tuple[int, ...] = _NSD
    clusters, batch, layers, queries, out = variant.clustering.n_clusters, config.batch // _SHARE, _VGG, 256, 1664
    if job.quick:
        config = config.model_copy(update={"dim": 32, "depth": 2, "heads": 4, "voxels_per_example": 60})
        voxels, clusters, batch, layers, queries, out = (150, 130, 150), 9, 4, _SMALL_VGG, 14, 24
    if branch == "semantic":
        return _Sizes(config, voxels, clusters, batch, None, queries, queries, out)
    asked = sum(layers.sampled_sizes)
    return _Sizes(config, voxels, clusters, batch, layers, layers.tokens, asked, layers.width)


def _prepare(job: Job, branch: Branch) -> _Inputs:
    sizes = _sizes(job, branch)
    generator = torch.Generator().manual_seed(1)
    labels = [torch.randint(sizes.clusters, (count,), generator=generator) for count in sizes.voxels]
    torch.manual_seed(2)
    layout = VoxelLayout.build(labels, sizes.clusters)
    bit = build_bit(sizes.config.model_dump(), layout, sizes.queries, sizes.out)
    with torch.no_grad():  # gradients that do not drown in rounding, as they would at the start
        for table in (bit.tokenizer.voxel_embeddings, bit.tokenizer.cluster_embeddings, bit.query_tokens):
            table.mul_(100)
    subject = torch.randint(len(sizes.voxels), (sizes.batch,), generator=generator)
    counts = torch.tensor(sizes.voxels)[subject]
    betas = torch.randn(sizes.batch, max(sizes.voxels), generator=generator)
    betas.masked_fill_(torch.arange(betas.shape[1]) >= counts.unsqueeze(1), 0)
    draws = sizes.tokenizer.draws
    keep = sample_voxels(counts, draws, sizes.batch, generator, width=betas.shape[1])
    asked = None if sizes.layers is None else sizes.layers.sample_positions(sizes.batch, generator)
    true = torch.randn(sizes.batch, sizes.asked, sizes.out, generator=generator)
    return _Inputs(
        bit.to(job.device),
        sizes,
        betas.to(job.device),
        subject.to(job.device),
        keep.to(job.device),
        None if asked is None else asked.to(job.device),
        true.to(job.device),
    )


def _results(bit: nn.Module, loss: Tensor, branch: Branch) -> Results:
    parameters = {name.replace(".conv.", "."): parameter for name, parameter in bit.named_parameters()}
    gradients = [cast(Tensor, parameters[name].grad) for name in _PARAMETERS]
    values = zip(_RESULTS, (loss, *gradients), strict=True)
    return comparable({f"{branch}: {name}": value for name, value in values})


# --- ours -------------------------------------------------------------------------------------------------------------


def ours(inputs: _Inputs, job: Job, branch: Branch) -> Results:
    """One step with the model, the losses and the optimiser that training uses."""
    bit, layers = inputs.bit, inputs.sizes.layers
    training = inputs.sizes.config.training
    groups = [{"params": list(bit.parameters()), "lr": training.optimiser.lr, "weight_decay": 0.01}]
    optimiser = _optimiser(groups, training, inputs.betas.device)
    predicted = bit(inputs.betas, inputs.subject, inputs.keep, inputs.queries)
    if layers is None:
        loss = functional.mse_loss(predicted, inputs.true)
    else:
        loss = multi_layer_info_nce(predicted, inputs.true, layers.sampled_sizes)
    loss.backward()
    optimiser.step()
    return _results(bit, loss, branch)


# --- the plain way ----------------------------------------------------------------------------------------------------


class PlainBIT(nn.Module):
    """A BIT's parameters, used plainly."""

    def __init__(self, bit: BIT) -> None:
        super().__init__()
        self.tokenizer = ReferenceTokenizer.from_fast(bit.tokenizer)
        self.query_tokens, self.proj = bit.query_tokens, bit.proj
        self.blocks, self.block_crosses = bit.blocks, bit.block_crosses

    def forward(self, betas: Tensor, subject: Tensor, keep: Tensor, queries: Tensor | None) -> Tensor:
        """Predict image features, as :meth:`BIT.forward`."""
        z = self.tokenizer(betas, subject, keep)
        q = self.query_tokens.expand(len(betas), -1, -1) if queries is None else self.query_tokens[queries]
        crosses = [cast(CrossBlock, cross) for cross in self.block_crosses]
        q = q + _cross(crosses[0], z, q)
        for block, cross in zip(self.blocks, crosses[1:], strict=True):
            z = _self(cast(SelfBlock, block), z)
            q = q + _cross(cross, z, q)
        return cast(Tensor, self.proj(q))


def _attend(weights: Tensor, v: Tensor, attention: CrossAttention | SelfAttention) -> Tensor:
    return cast(Tensor, attention.proj((weights @ _heads(v, attention.heads)).transpose(1, 2).flatten(2)))


def _cross(block: CrossBlock, z: Tensor, q: Tensor) -> Tensor:
    z = block.norm1(z)
    y = _attend(attention_weights(block.attn, z, q), block.attn.kv(z).chunk(2, dim=-1)[1], block.attn)
    return cast(Tensor, y + block.mlp(block.norm2(y)))


def _self(block: SelfBlock, z: Tensor) -> Tensor:
    q, k, v = block.attn.qkv(block.norm1(z)).chunk(3, dim=-1)
    q, k = _heads(q, block.attn.heads), _heads(k, block.attn.heads)
    weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
    z = z + _attend(weights, v, block.attn)
    return cast(Tensor, z + block.mlp(block.norm2(z)))


def reference(inputs: _Inputs, job: Job, branch: Branch) -> Results:
    """The same step, written plainly."""
    bit, layers = PlainBIT(inputs.bit), inputs.sizes.layers
    optimiser = torch.optim.AdamW(bit.parameters(), lr=inputs.sizes.config.training.optimiser.lr)
    predicted = bit(inputs.betas, inputs.subject, inputs.keep, inputs.queries)
    if layers is None:
        loss = functional.mse_loss(predicted, inputs.true)
    else:
        sides = (x.split(layers.sampled_sizes, 1) for x in (predicted, inputs.true))
        losses = [infonce.full_info_nce(p.flatten(0, 1), t.flatten(0, 1)) for p, t in zip(*sides, strict=True)]
        loss = torch.stack(losses).mean()
    loss.backward()
    optimiser.step()
    return _results(bit, loss, branch)


# --- the least that either can do -------------------------------------------------------------------------------------


def operations(job: Job, branch: Branch) -> float:
    """Return the operations of a step that no form avoids: all matrix products, forward and twice that backward."""
    s = _sizes(job, branch)
    dim, depth, c, n = s.config.dim, s.config.depth, s.clusters, s.asked
    cross = 4 * c * dim**2 + 4 * n * c * dim + 18 * n * dim**2
    own = 24 * c * dim**2 + 4 * c**2 * dim
    transformer = 3.0 * s.batch * ((depth + 1) * cross + depth * own + 2 * n * dim * s.out)
    logits = [] if s.layers is None else [infonce.operations(s.batch * k, s.out) for k in s.layers.sampled_sizes]
    return transformer + tokenizer.operations(s.tokenizer, s.batch) + sum(logits)


def _floor(job: Job, branch: Branch) -> Floor:
    """Every parameter, gradient and moment read and written once by the optimiser."""
    s = _sizes(job, branch)
    parameters = (sum(s.voxels) + s.queries) * s.config.dim
    return Floor(operations(job, branch), 7 * 4.0 * parameters)


def _whole(job: Job, branch: Branch) -> float:
    """How many of these steps have as many examples as the paper's training of the branch."""
    training = _sizes(job, branch).config.training
    return float(training.total_steps * training.accumulate * _SHARE)


def _part(name: str, branch: Branch) -> Part:
    return Part(
        name,
        prepare=partial(_prepare, branch=branch),
        ours=partial(ours, branch=branch),
        reference=partial(reference, branch=branch),
        floor=partial(_floor, branch=branch),
        whole=partial(_whole, branch=branch),
    )


PARTS: tuple[Part, ...] = (_part("low-level, 8 examples", "lowlevel"), _part("semantic, 16 examples", "semantic"))
TOLERANCES: Mapping[str, float] = tolerances(
    [f"{branch}: {name}" for branch in ("lowlevel", "semantic") for name in _RESULTS], 2e-2
)
