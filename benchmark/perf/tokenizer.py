"""Entry ``tokenizer``: Brain Tokens of one subject's recordings and their gradients, at the paper's sizes.

The reference is ``torch_geometric.nn.TransformerConv`` on the graph of kept voxels and clusters
(:class:`methods.brain_it.tokenizer.ReferenceTokenizer`). One example is measured beside a batch: the difference, shared
out, is what each example more costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmark.perf.entries import Floor, Job, Part, Results
from benchmark.perf.gradients import comparable, tolerances
from methods.brain_it.tokenizer import BrainTokenizer, ReferenceTokenizer, VoxelLayout, sample_voxels


@dataclass(frozen=True)
class Sizes:
    """Of a subject, its clusters, the tokens, and the voxels drawn for each example."""

    voxels: int = 39_548
    clusters: int = 128
    dim: int = 512
    draws: int = 15_000

    @property
    def kept(self) -> float:
        """Voxels that are drawn at least once, on average."""
        return self.voxels * (1 - (1 - 1 / self.voxels) ** self.draws)


PAPER, SMALL = Sizes(), Sizes(voxels=900, clusters=16, dim=32, draws=340)
BATCH, SMALL_BATCH = 32, 3
_RESULTS = ("tokens", "voxel table", "cluster table", "query weight", "key weight", "value weight", "skip bias", "norm")


@dataclass(frozen=True)
class _Inputs:
    tokenizer: BrainTokenizer
    betas: Tensor  # B x voxels
    subject: Tensor  # B
    keep: Tensor  # B x voxels
    incoming: Tensor  # B x clusters x dim, the gradient of the tokens


def _sizes(job: Job, batch: int) -> tuple[Sizes, int]:
    return (SMALL, min(batch, SMALL_BATCH)) if job.quick else (PAPER, batch)


def _prepare(job: Job, batch: int) -> _Inputs:
    sizes, batch = _sizes(job, batch)
    generator = torch.Generator().manual_seed(1)
    # Sizes of clusters differ as those of a mixture do: the largest has some ten times the voxels of the smallest.
    share = 0.2 + torch.rand(sizes.clusters, generator=generator) ** 2
    labels = torch.multinomial(share, sizes.voxels, replacement=True, generator=generator)
    torch.manual_seed(2)
    tokenizer = BrainTokenizer(VoxelLayout.build([labels], sizes.clusters), sizes.dim)
    with torch.no_grad():  # attention that is far from uniform, as after training
        tokenizer.voxel_embeddings.mul_(100)
        tokenizer.cluster_embeddings.mul_(100)
        tokenizer.lin_query.weight.mul_(10)
    return _Inputs(
        tokenizer.to(job.device),
        torch.randn(batch, sizes.voxels, generator=generator).to(job.device),
        torch.zeros(batch, dtype=torch.int64, device=job.device),
        sample_voxels(sizes.voxels, sizes.draws, batch, generator).to(job.device),
        torch.randn(batch, sizes.clusters, sizes.dim, generator=generator).to(job.device),
    )


def _gradients(tokenizer: nn.Module, inputs: _Inputs, prefix: str) -> Results:
    tokens = tokenizer(inputs.betas, inputs.subject, inputs.keep)
    (tokens * inputs.incoming).sum().backward()
    gradients = {name.removeprefix("conv."): parameter.grad for name, parameter in tokenizer.named_parameters()}
    names = ("voxel_embeddings", "cluster_embeddings", "lin_query.weight", "lin_key.weight", "lin_value.weight")
    values = [tokens, *(gradients[name] for name in (*names, "lin_skip.bias", "norm.weight"))]
    return comparable({prefix + name: value for name, value in zip(_RESULTS, values, strict=True)})


def ours(inputs: _Inputs, job: Job, prefix: str) -> Results:
    """Tokens and gradients by the tokenizer that training uses."""
    return _gradients(inputs.tokenizer, inputs, prefix)


def reference(inputs: _Inputs, job: Job, prefix: str) -> Results:
    """The same by PyG."""
    return _gradients(ReferenceTokenizer.from_fast(inputs.tokenizer), inputs, prefix)


def operations(sizes: Sizes, batch: int) -> float:
    """Return the operations of a forward and a backward pass that no form avoids.

    Three products of weights and kept rows (the sum, and its gradients for weights and rows), and three of each token
    with the value map.
    """
    return 3 * 2.0 * batch * sizes.dim * (sizes.kept + sizes.clusters * sizes.dim)


def _floor(job: Job, batch: int) -> Floor:
    """The voxel table read for the scores, which fix the weights; read again backward; its gradient written."""
    sizes, batch = _sizes(job, batch)
    table = 4 * sizes.voxels * sizes.dim
    return Floor(operations(sizes, batch), 3 * table + 4 * batch * (sizes.voxels + 2 * sizes.clusters * sizes.dim))


def _part(name: str, batch: int) -> Part:
    prefix = f"{name}: "
    return Part(
        name,
        partial(_prepare, batch=batch),
        partial(ours, prefix=prefix),
        partial(reference, prefix=prefix),
        partial(_floor, batch=batch),
    )


PARTS: tuple[Part, ...] = (_part("one example", 1), _part(f"{BATCH} examples", BATCH))
TOLERANCES: Mapping[str, float] = tolerances([f"{part.name}: {name}" for part in PARTS for name in _RESULTS], 2e-3)
