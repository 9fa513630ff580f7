"""The Brain Tokenizer: from the voxels of any subject to one token per functional cluster (Brain-IT, Sec. 3).

Every voxel ``v`` of every subject owns a learned embedding ``e_v``; an fMRI sample modulates it, ``m_v = x_v e_v``. One
attention layer, a PyG ``TransformerConv`` whose edges run from each voxel to its cluster only, pools the voxels of a
cluster into a token:

    alpha_cv = softmax over v in cluster c of (W_q c + b_q) . (W_k m_v + b_k) / sqrt(dim)
    token_c  = (W_s c + b_s) + sum_v alpha_cv (W_v m_v + b_v)

followed by ReLU and LayerNorm (official code; the paper does not show them).

:class:`ReferenceTokenizer` is that sentence written with PyG. :class:`BrainTokenizer` computes the same function, and
the same gradients, from the remark that a modulated voxel is a scalar times a vector:

* the score is ``x_v s_v`` plus ``q_c . b_k / sqrt(dim)``, where ``s_v = e_v . (W_k' q_c) / sqrt(dim)`` is one number
  per voxel whatever the batch; the second term is constant within a cluster, so the softmax cancels it;
* the values sum to ``W_v (sum_v alpha_cv x_v e_v) + b_v``: a weighted sum of rows of the voxel table, then one
  ``dim x dim`` map per token instead of one per voxel.

Nothing of size batch x voxels x dim is ever built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class VoxelLayout:
    """All subjects' voxels, and the cluster of each (the voxel-to-cluster mapping, V2C).

    The voxels of subject ``s`` (0-based position) are rows ``starts[s] : starts[s] + n_voxels[s]`` of one voxel table:
    subjects are concatenated in order. Use :meth:`build`.

    Attributes:
        n_clusters: number of clusters C, shared by all subjects; a cluster may be empty for some subject.
        n_voxels: voxels of each subject.
        labels: (N,) int64, cluster of each row of the voxel table.
        order: (S, V_max) int64, each subject's own voxel indices sorted by cluster, zero-padded on the right.
        bounds: (S, C + 1) int64, ``order[s, bounds[s, c] : bounds[s, c + 1]]`` are the members of cluster ``c``.
    """

    n_clusters: int
    n_voxels: tuple[int, ...]
    labels: Tensor
    order: Tensor
    bounds: Tensor

    @classmethod
    def build(cls, labels: Sequence[np.ndarray | Tensor], n_clusters: int) -> VoxelLayout:
        """Describe the voxels of ``len(labels)`` subjects.

        Args:
            labels: one integer vector per subject, the cluster of each of its voxels, in 0..n_clusters-1.
            n_clusters: number of clusters, empty ones included.

        Raises:
            ValueError: no subject, a subject without voxels, or labels that are not integers in range.
        """
        if not labels:
            raise ValueError("VoxelLayout needs the cluster labels of at least one subject, got none")
        vectors = [np.asarray(vector) for vector in labels]
        for subject, vector in enumerate(vectors):
            if vector.ndim != 1 or vector.size == 0 or vector.dtype.kind not in "iu":
                raise ValueError(
                    f"labels of subject at position {subject}: expected a non-empty 1-D integer vector, "
                    f"got shape {vector.shape} of {vector.dtype}"
                )
            if vector.min() < 0 or vector.max() >= n_clusters:
                raise ValueError(
                    f"labels of subject at position {subject}: expected values in 0..{n_clusters - 1}, "
                    f"got {vector.min()}..{vector.max()}"
                )
        order = np.zeros((len(vectors), max(vector.size for vector in vectors)), dtype=np.int64)
        bounds = np.zeros((len(vectors), n_clusters + 1), dtype=np.int64)
        for subject, vector in enumerate(vectors):
            order[subject, : vector.size] = np.argsort(vector, kind="stable")
            bounds[subject, 1:] = np.cumsum(np.bincount(vector, minlength=n_clusters))
        return cls(
            n_clusters=n_clusters,
            n_voxels=tuple(vector.size for vector in vectors),
            labels=torch.from_numpy(np.concatenate(vectors).astype(np.int64)),
            order=torch.from_numpy(order),
            bounds=torch.from_numpy(bounds),
        )

    @property
    def n_subjects(self) -> int:
        """Number of subjects S."""
        return len(self.n_voxels)

    @property
    def max_voxels(self) -> int:
        """Voxels of the largest subject: the width V_max of a batch of betas."""
        return max(self.n_voxels)

    @property
    def total_voxels(self) -> int:
        """Rows N of the voxel table."""
        return sum(self.n_voxels)

    @property
    def starts(self) -> tuple[int, ...]:
        """First row of each subject in the voxel table."""
        return tuple(int(start) for start in np.cumsum((0, *self.n_voxels[:-1])))

    def rows(self, subject: int) -> slice:
        """Rows of the voxel table that belong to the subject at this position."""
        start = self.starts[subject]
        return slice(start, start + self.n_voxels[subject])


def sample_voxels(
    n_voxels: int | Tensor, n_draws: int, batch: int, generator: torch.Generator, width: int | None = None
) -> Tensor:
    """Draw the voxels that each training example keeps: with replacement, a repeated draw counting once.

    Brain-IT draws 15,000 per example; the official edge builder keeps one edge per voxel, so duplicates carry no extra
    weight.

    Args:
        n_voxels: voxels to draw from, one number for all examples or a (batch,) vector for a mixed-subject batch.
        n_draws: draws per example.
        batch: number of examples.
        generator: source of randomness; the mask lives on its device.
        width: columns of the mask; the largest ``n_voxels`` where not given.

    Returns:
        (batch, width) bool, True for kept voxels; at most ``n_draws`` in a row.
    """
    limit = torch.as_tensor(n_voxels, device=generator.device).expand(batch).unsqueeze(1)
    uniform = torch.rand(batch, n_draws, generator=generator, device=generator.device, dtype=torch.float64)
    drawn = (uniform * limit).long().clamp(max=limit - 1)
    mask = torch.zeros(batch, int(limit.max()) if width is None else width, dtype=torch.bool, device=generator.device)
    return mask.scatter_(1, drawn, True)


class _ClusterDot(torch.autograd.Function):
    """Inner product of each row of a table with the vector of its cluster, one subject at a time.

    Autograd on ``(table * vectors[labels]).sum(1)`` keeps two tensors as large as the voxel table (650 MB each for the
    eight subjects of NSD) and adds all rows of a cluster into one row, which is slow on a GPU. Here the temporaries are
    one subject wide, and the gradient of the cluster vectors is a weighted bag of table rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        vectors: Tensor,
        labels: Tensor,
        members: Tensor,
        bounds: Tensor,
        sizes: tuple[int, ...],
    ) -> Tensor:
        ctx.save_for_backward(table, vectors, labels, members, bounds)
        ctx.sizes = sizes
        parts = zip(table.split(sizes), labels.split(sizes), strict=True)
        return torch.cat([(vectors.index_select(0, label) * rows).sum(1) for rows, label in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, vectors, labels, members, bounds = ctx.saved_tensors
        grad_table = grad_vectors = None
        if ctx.needs_input_grad[0]:
            grad_table = torch.empty_like(table)
            for out, label, weight in zip(*(t.split(ctx.sizes) for t in (grad_table, labels, grad)), strict=True):
                torch.index_select(vectors, 0, label, out=out).mul_(weight.unsqueeze(1))
        if ctx.needs_input_grad[1]:
            weight = grad.index_select(0, members)
            bags = F.embedding_bag(
                members, table, bounds, mode="sum", per_sample_weights=weight, include_last_offset=True
            )
            grad_vectors = bags.view(len(ctx.sizes), *vectors.shape).sum(0)
        return grad_table, grad_vectors, None, None, None, None


def _softmax_by_group(score: Tensor, group: Tensor, n_groups: int) -> Tensor:
    """Softmax of a flat vector within each group; groups without an entry simply do not occur."""
    peak = score.new_full((n_groups,), -math.inf).scatter_reduce(0, group, score.detach(), "amax")
    weight = torch.exp(score - peak.index_select(0, group))
    return weight / weight.new_zeros(n_groups).index_add(0, group, weight).index_select(0, group)


class BrainTokenizer(nn.Module):
    """Brain tokens of a mixed-subject batch, exactly as PyG's ``TransformerConv`` with its defaults, but fast.

    Args:
        layout: the subjects' voxels and clusters.
        dim: width D of embeddings and tokens.
    """

    labels: Tensor
    order: Tensor
    members: Tensor
    member_bounds: Tensor
    starts: Tensor
    n_voxels: Tensor

    def __init__(self, layout: VoxelLayout, dim: int = 512) -> None:
        super().__init__()
        self.layout = layout
        self.dim = dim
        std = 0.1 / (2 * math.sqrt(dim))  # official code
        self.voxel_embeddings = nn.Parameter(torch.randn(layout.total_voxels, dim) * std)
        self.cluster_embeddings = nn.Parameter(torch.randn(layout.n_clusters, dim) * std)
        # nn.Linear draws its weight and bias from the same distributions as PyG's Linear.
        self.lin_key = nn.Linear(dim, dim)
        self.lin_query = nn.Linear(dim, dim)
        self.lin_value = nn.Linear(dim, dim)
        self.lin_skip = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

        starts = torch.tensor(layout.starts, device="cpu")
        members = [layout.order[s, :n] + starts[s] for s, n in enumerate(layout.n_voxels)]
        cells = (layout.bounds[:, :-1] + starts.unsqueeze(1)).flatten()
        total = torch.tensor([layout.total_voxels], device="cpu")
        for name, value in {
            "labels": layout.labels,
            "order": layout.order,
            "members": torch.cat(members),  # (N,) rows of the table sorted by subject, then cluster
            "member_bounds": torch.cat([cells, total]),  # (S * C + 1,) where each cell begins in `members`
            "starts": starts,
            "n_voxels": torch.tensor(layout.n_voxels, device="cpu"),
        }.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, betas: Tensor, subject: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens of each example.

        Args:
            betas: (B, V_max) z-scored activations, padded on the right for subjects with fewer voxels.
            subject: (B,) int64, each example's subject as a 0-based position in the layout.
            keep: (B, V_max) bool, the voxels that take part (see :func:`sample_voxels`); all where None.

        Returns:
            (B, C, dim) tokens. A cluster without a voxel gets ``norm(relu(lin_skip(cluster embedding)))``.

        Raises:
            ValueError: the shapes do not fit the layout or each other.
        """
        _check_shapes(self.layout, betas, subject, keep)
        pooled, filled = self._pool(betas, subject, keep)
        values = F.linear(pooled, self.lin_value.weight)
        # The weights of a cluster sum to one, or to zero where it is empty: so much of the value bias it gets.
        values = torch.addmm(values, filled.unsqueeze(1), self.lin_value.bias.unsqueeze(0))
        tokens = values.view(len(subject), -1, self.dim) + self.lin_skip(self.cluster_embeddings)
        return self.norm(F.relu(tokens))

    def _pool(self, betas: Tensor, subject: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention-weighted sum of modulated voxels (B * C, dim), and which clusters have any voxel (B * C), 0 or 1.

        In float32 (or wider) under autocast too: the scores enter an exponential.
        """
        n_clusters, n_examples = self.layout.n_clusters, len(subject)
        with torch.autocast(betas.device.type, enabled=False):
            scale = self._score_scale()

            # One entry per example and kept voxel, sorted by example, then cluster.
            order = self.order[subject]
            present = torch.arange(order.shape[1], device=order.device) < self.n_voxels[subject].unsqueeze(1)
            if keep is not None:
                present = present & keep.gather(1, order)
            example, place = present.nonzero(as_tuple=True)
            local = order[example, place]
            voxel = local + self.starts[subject].index_select(0, example)
            group = example * n_clusters + self.labels.index_select(0, voxel)
            activation = betas.to(scale.dtype)[example, local]

            weight = _softmax_by_group(activation * scale.index_select(0, voxel), group, n_examples * n_clusters)
            size = torch.bincount(group, minlength=n_examples * n_clusters)
            pooled = F.embedding_bag(
                voxel,
                self.voxel_embeddings,
                F.pad(size.cumsum(0), (1, 0)),
                mode="sum",
                per_sample_weights=weight * activation,
                include_last_offset=True,
            )
        return pooled, (size > 0).to(pooled.dtype)

    def _score_scale(self) -> Tensor:
        """(N,) factor s_v that turns a voxel's activation into its attention score."""
        query = self.lin_query(self.cluster_embeddings) / math.sqrt(self.dim)
        # The key bias cannot change a softmax. It enters with weight zero so that it has a gradient, of zero, as PyG's
        # has: distributed training fails on parameters that take no part.
        key_side = query @ self.lin_key.weight + 0.0 * self.lin_key.bias
        return _ClusterDot.apply(
            self.voxel_embeddings, key_side, self.labels, self.members, self.member_bounds, self.layout.n_voxels
        )


class ReferenceTokenizer(nn.Module):
    """The readable form of :class:`BrainTokenizer`: the same function and parameters, written with PyG.

    It modulates every voxel and runs ``torch_geometric.nn.TransformerConv`` on the bipartite voxel -> cluster graph of
    the batch, hence holds tensors of size batch x voxels x dim. Tests hold the fast form to it.
    """

    def __init__(self, layout: VoxelLayout, dim: int = 512) -> None:
        super().__init__()
        from torch_geometric.nn import TransformerConv  # only this class needs PyG

        self.layout = layout
        self.dim = dim
        std = 0.1 / (2 * math.sqrt(dim))
        self.voxel_embeddings = nn.Parameter(torch.randn(layout.total_voxels, dim) * std)
        self.cluster_embeddings = nn.Parameter(torch.randn(layout.n_clusters, dim) * std)
        self.conv = TransformerConv(dim, dim)
        self.norm = nn.LayerNorm(dim)

    @classmethod
    def from_fast(cls, tokenizer: BrainTokenizer) -> ReferenceTokenizer:
        """Build a reference with a copy of the weights of a fast tokenizer, in its dtype and on its device."""
        reference = cls(tokenizer.layout, tokenizer.dim).to(tokenizer.voxel_embeddings)
        weights = tokenizer.state_dict()
        reference.load_state_dict({f"conv.{k}" if k.startswith("lin_") else k: v for k, v in weights.items()})
        return reference

    def forward(self, betas: Tensor, subject: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens (B, C, dim) of each example; arguments and errors as :meth:`BrainTokenizer.forward`."""
        _check_shapes(self.layout, betas, subject, keep)
        sources, targets, modulated = [], [], []
        n_clusters, first = self.layout.n_clusters, 0
        for example, position in enumerate(subject.tolist()):
            rows = self.layout.rows(position)
            n_voxels = self.layout.n_voxels[position]
            modulated.append(betas[example, :n_voxels, None] * self.voxel_embeddings[rows])
            local = torch.arange(n_voxels) if keep is None else keep[example, :n_voxels].nonzero().flatten().cpu()
            sources.append(first + local)
            targets.append(example * n_clusters + self.layout.labels[rows][local])
            first += n_voxels
        edges = torch.stack([torch.cat(sources), torch.cat(targets)]).to(betas.device)
        clusters = self.cluster_embeddings.repeat(len(subject), 1)
        tokens = self.conv((torch.cat(modulated), clusters), edges)
        return self.norm(F.relu(tokens.view(len(subject), n_clusters, self.dim)))


def _check_shapes(layout: VoxelLayout, betas: Tensor, subject: Tensor, keep: Tensor | None) -> None:
    expected = (len(subject), layout.max_voxels)
    if betas.shape != expected or (keep is not None and keep.shape != expected):
        got = f"betas {tuple(betas.shape)}" + ("" if keep is None else f", keep {tuple(keep.shape)}")
        raise ValueError(f"{len(subject)} examples of this layout need betas and keep of shape {expected}, got {got}")
