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
* the values sum to ``W_v (sum_v alpha_cv x_v e_v) + b_v``: for all examples of a subject a matrix product of weights
  and rows of the voxel table, then one ``dim x dim`` map per token instead of one per voxel.

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

# Numbers of the voxel table that are worked on at a time: 2**20 floats (4 MB) stay in a core's share of the cache.
_BLOCK_ELEMENTS_CPU = 2**20
_BLOCK_ELEMENTS_GPU = 2**25
_PADDING = 1 / 16  # of a block that may be padding whatever it holds: less than another block costs


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
    drawn = uniform.mul_(limit).long().clamp_(max=limit - 1)
    mask = torch.zeros(batch, int(limit.max()) if width is None else width, dtype=torch.bool, device=generator.device)
    if mask.is_cuda:
        return mask.scatter_(1, drawn, True)
    for row, own in zip(mask.numpy(), drawn.numpy(), strict=True):  # a fourth of scatter's time
        row[own] = True
    return mask


@dataclass(frozen=True, eq=False)
class _Block:
    """Some cells (one cluster of one subject each) of about the same size as one rectangle: what is computed at a time.

    Attributes:
        subjects: (k,) the cells' subjects, as positions in their group.
        clusters: (k,) the cells' clusters.
        voxels: (k, m) the subject's own indices of a cell's voxels; where a cell has fewer, its first is repeated.
        rows: (k * m,) where these are in the voxel table.
        padding: (k, 1, m) bool, what is such a repetition; None where nothing is.
    """

    subjects: Tensor
    clusters: Tensor
    voxels: Tensor
    rows: Tensor
    padding: Tensor | None


def _blocks(layout: VoxelLayout, group: Sequence[int], n_rows: int, device: torch.device) -> list[_Block]:
    """Cut the voxels of some subjects into blocks of about ``n_rows`` rows, cells of like size together."""
    bounds = layout.bounds[list(group)].numpy()
    sizes = np.diff(bounds).ravel()
    largest_first = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    starts = np.array(layout.starts)[list(group)]
    order = layout.order[list(group)].numpy()
    blocks = []
    while len(largest_first):
        size = int(sizes[largest_first[0]])
        padded = size * np.arange(1, len(largest_first) + 1)
        waste = padded - sizes[largest_first].cumsum()
        fits = (padded <= n_rows) & (waste <= np.maximum(padded // 4, _PADDING * n_rows))
        count = max(1, len(fits) if fits.all() else int(fits.argmin()))
        cells, largest_first = largest_first[:count], largest_first[count:]
        subjects, clusters = np.divmod(cells, layout.n_clusters)
        place = np.arange(size)
        padding = place >= sizes[cells, None]
        voxels = order[subjects[:, None], bounds[subjects, clusters, None] + np.where(padding, 0, place)]
        rows = (voxels + starts[subjects, None]).ravel()

        def tensor(index: np.ndarray) -> Tensor:
            return torch.from_numpy(index).to(device)

        repeated = tensor(padding[:, None]) if padding.any() else None
        blocks.append(_Block(tensor(subjects), tensor(clusters), tensor(voxels), tensor(rows), repeated))
    return blocks


@dataclass(frozen=True, eq=False)
class _Work:
    """A block and the examples that have it: (k, b) each cell's examples, the batch's size where it has fewer."""

    block: _Block
    examples: Tensor
    ragged: bool
    """Whether any cell has fewer."""


class _ClusterAttention(torch.autograd.Function):
    """Softmax attention of every cluster to its voxels, one block at a time.

    With x the activations of a cluster's kept voxels, E their rows of the table and u the cluster's vector::

        P = softmax over voxels of x * (E u),    pooled = (P * x) E

    The rows of a block stay in the cache from the scores to the weighted sums, and all examples of a subject read them
    in one matrix product. Voxels that are not kept take part with weight zero, which costs less than to look up, for
    each example, the rows of those that are. The backward pass gathers the rows again and writes each row's gradient
    once. Activations are (k, b, m), rows (k, m, dim), for k cells of m voxels and b examples.
    """

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, vectors: Tensor, betas: Tensor, keep: Tensor | None, work: Sequence[_Work]
    ) -> tuple[Tensor, Tensor]:
        batch, n_clusters = len(betas), len(vectors)
        # One example more, for what stands where a cell has fewer examples.
        pooled = betas.new_zeros((batch + 1) * n_clusters, table.shape[1])
        filled = betas.new_zeros((batch + 1) * n_clusters)
        saved = []
        for part in work:
            rows, own = _operands(table, vectors, part.block)
            scale = (rows * own).sum(-1).unsqueeze(1)
            place = _place(part, betas.shape)
            x = betas.reshape(-1).index_select(0, place.view(-1)).view_as(place)
            absent = _absent(part, keep, place, batch)
            score = x * scale
            if absent is not None:
                x.masked_fill_(absent, 0)
                score.masked_fill_(absent, -torch.inf)
            # Where no voxel is kept there is no largest score; weights and their sum are zero.
            score -= score.amax(-1, keepdim=True).clamp_(min=torch.finfo(score.dtype).min)
            weight = score.exp_()
            total = weight.sum(-1, keepdim=True)
            weight /= total.clamp(min=1)
            weighted = weight * x
            tokens = _tokens(part, batch + 1, n_clusters)
            pooled.index_add_(0, tokens, (weighted @ rows).flatten(0, 1))  # each once, so it fills in
            filled.index_add_(0, tokens, total.flatten().sign_())
            saved += [scale, x, weight, weighted]
        ctx.save_for_backward(table, vectors, *saved)
        ctx.work, ctx.shape = work, betas.shape
        ctx.mark_non_differentiable(filled)
        return pooled[: batch * n_clusters], filled[: batch * n_clusters]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        table, vectors, *saved = ctx.saved_tensors
        of_table, of_vectors, of_betas, *_ = ctx.needs_input_grad
        grad_table = torch.zeros_like(table) if of_table else None
        grad_vectors = torch.zeros_like(vectors) if of_vectors else None
        grad_betas = grad.new_zeros(ctx.shape) if of_betas else None
        with torch.autocast(grad.device.type, enabled=False):
            for number, part in enumerate(ctx.work):
                block = part.block
                scale, x, weight, weighted = saved[4 * number : 4 * number + 4]
                rows, own = _operands(table, vectors, block)
                tokens = _tokens(part, ctx.shape[0], len(vectors))
                incoming = grad.index_select(0, tokens).view(*x.shape[:2], -1)
                # Through the weighted sum, then through the softmax.
                grad_weighted = incoming @ rows.transpose(1, 2)
                through = grad_weighted * weighted
                grad_score = torch.addcmul(through, weight, through.sum(-1, keepdim=True), value=-1)
                grad_scale = (grad_score * x).sum(1, keepdim=True)
                if grad_table is not None:
                    # The outer products of the weighted sum and of the scores, as one. Padding adds zero to a row.
                    left = torch.cat([weighted, grad_scale], 1)
                    right = torch.cat([incoming, own], 1)
                    grad_table.index_add_(0, block.rows, (left.transpose(1, 2) @ right).flatten(0, 1))
                if grad_vectors is not None:
                    grad_vectors.index_add_(0, block.clusters, (grad_scale @ rows).squeeze(1))
                if grad_betas is not None:
                    grad_x = grad_weighted * weight + grad_score * scale
                    grad_betas.view(-1).index_add_(0, _place(part, ctx.shape).view(-1), grad_x.view(-1))
        return grad_table, grad_vectors, grad_betas, None, None


def _operands(table: Tensor, vectors: Tensor, block: _Block) -> tuple[Tensor, Tensor]:
    """Rows of the table in a block (k, m, dim), and each cell's vector (k, 1, dim)."""
    own = vectors.index_select(0, block.clusters).unsqueeze(1)
    return table.index_select(0, block.rows).view(len(own), -1, own.shape[-1]), own


def _tokens(part: _Work, batch: int, n_clusters: int) -> Tensor:
    """Where the tokens of a block are among ``batch`` examples' (k * b,); of what is absent, some token of the last."""
    examples = part.examples.clamp(max=batch - 1) if part.ragged else part.examples
    return (examples * n_clusters + part.block.clusters.unsqueeze(1)).flatten()


def _place(part: _Work, shape: torch.Size) -> Tensor:
    """Where the activations of a block are in the flat betas; of what is absent, some place that there is."""
    batch, width = shape
    examples = part.examples.clamp(max=batch - 1) if part.ragged else part.examples
    return examples.unsqueeze(2) * width + part.block.voxels.unsqueeze(1)


def _absent(part: _Work, keep: Tensor | None, place: Tensor, batch: int) -> Tensor | None:
    """Which activations of a block take no part: not kept, or padding of either kind; None where all do."""
    absent = part.block.padding
    if part.ragged:
        beyond = (part.examples == batch).unsqueeze(2)
        absent = beyond if absent is None else absent | beyond
    if keep is not None:
        dropped = ~keep.reshape(-1).index_select(0, place.view(-1)).view_as(place)
        absent = dropped if absent is None else dropped | absent
    return absent


class BrainTokenizer(nn.Module):
    """Brain tokens of a mixed-subject batch, exactly as PyG's ``TransformerConv`` with its defaults, but fast.

    Args:
        layout: the subjects' voxels and clusters.
        dim: width D of embeddings and tokens.
    """

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

        self._known_blocks: dict[tuple[int, torch.device], list[_Block]] = {}  # by the first subject of a group

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
        table = self.voxel_embeddings
        with torch.autocast(betas.device.type, enabled=False):
            query = self.lin_query(self.cluster_embeddings) / math.sqrt(self.dim)
            # The key bias cannot change a softmax. It enters with weight zero so that it has a gradient, of zero, as
            # PyG's has: distributed training fails on parameters that take no part.
            vectors = query @ self.lin_key.weight + 0.0 * self.lin_key.bias
            work = self._work(subject, table.device)
            pooled, filled = _ClusterAttention.apply(table, vectors, betas.to(table.dtype), keep, work)
        return pooled, filled

    def _work(self, subject: Tensor, device: torch.device) -> list[_Work]:
        """Which blocks the batch needs, and for which examples."""
        elements = _BLOCK_ELEMENTS_GPU if device.type == "cuda" else _BLOCK_ELEMENTS_CPU
        n_rows = max(1, elements // self.dim)
        together = max(1, n_rows // self.layout.max_voxels)  # subjects in a group
        positions = subject.tolist()
        work = []
        for first in range(0, self.layout.n_subjects, together):
            group = range(first, min(first + together, self.layout.n_subjects))
            examples = [[k for k, position in enumerate(positions) if position == member] for member in group]
            most = max(map(len, examples))
            if not most:
                continue
            if (first, device) not in self._known_blocks:
                self._known_blocks[first, device] = _blocks(self.layout, group, n_rows, device)
            ragged = min(map(len, examples)) < most
            slots = torch.tensor([own + [len(positions)] * (most - len(own)) for own in examples], device=device)
            work += [_Work(block, slots[block.subjects], ragged) for block in self._known_blocks[first, device]]
        return work


class ReferenceTokenizer(nn.Module):
    """The readable form of :class:`BrainTokenizer`: the same function and parameters, written with PyG.

    It modulates every kept voxel and runs ``torch_geometric.nn.TransformerConv`` on the bipartite graph, voxel ->
    cluster, of the batch, hence holds tensors of size batch x voxels x dim. Tests hold the fast form to it.
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
        """Build a reference on the weights of a fast tokenizer: the same memory, gradients of its own."""
        with torch.device("meta"):
            reference = cls(tokenizer.layout, tokenizer.dim)
        weights = tokenizer.state_dict()
        named = {f"conv.{name}" if name.startswith("lin_") else name: value for name, value in weights.items()}
        reference.load_state_dict(named, assign=True)
        return reference

    def forward(self, betas: Tensor, subject: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens (B, C, dim) of each example; arguments and errors as :meth:`BrainTokenizer.forward`."""
        _check_shapes(self.layout, betas, subject, keep)
        sources, targets, modulated = [], [], []
        n_clusters, first = self.layout.n_clusters, 0
        for example, position in enumerate(subject.tolist()):
            rows = self.layout.rows(position)
            n_voxels = self.layout.n_voxels[position]
            local = torch.arange(n_voxels) if keep is None else keep[example, :n_voxels].nonzero().flatten().cpu()
            modulated.append(betas[example, local, None] * self.voxel_embeddings[rows][local])
            sources.append(torch.arange(first, first + len(local)))
            targets.append(example * n_clusters + self.layout.labels[rows][local])
            first += len(local)
        edges = torch.stack([torch.cat(sources), torch.cat(targets)]).to(betas.device)
        clusters = self.cluster_embeddings.repeat(len(subject), 1)
        tokens = self.conv((torch.cat(modulated), clusters), edges)
        return self.norm(F.relu(tokens.view(len(subject), n_clusters, self.dim)))


def _check_shapes(layout: VoxelLayout, betas: Tensor, subject: Tensor, keep: Tensor | None) -> None:
    expected = (len(subject), layout.max_voxels)
    if betas.shape != expected or (keep is not None and keep.shape != expected):
        got = f"betas {tuple(betas.shape)}" + ("" if keep is None else f", keep {tuple(keep.shape)}")
        raise ValueError(f"{len(subject)} examples of this layout need betas and keep of shape {expected}, got {got}")
