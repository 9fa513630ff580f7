"""The Brain-Interaction Transformer (BIT): from an fMRI sample to image-feature tokens (Brain-IT, Sec. 3).

Brain tokens Z (one per functional cluster) are refined by self-attention blocks; learned query tokens Q, one per image
feature, read from them in cross-attention blocks, one before the first self block and one after each:

    Q <- Q + C_0(Z, Q);   for i = 1..depth:   Z <- Self_i(Z);   Q <- Q + C_i(Z, Q)

and a linear head maps Q to the features. The block details, which the paper leaves open, follow the official code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.brain_it.tokenizer import BrainTokenizer, VoxelLayout


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., dim)."""
        return self.fc2(F.gelu(self.fc1(x)))


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, n, dim) to (B, heads, n, dim / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head self-attention; q, k and v from one linear map without bias, in this order."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, n, dim) to (B, n, dim)."""
        q, k, v = (_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head cross-attention whose query is used as it comes: no norm and no W_q (official code)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, z: Tensor, q: Tensor) -> Tensor:
        """Read (B, n, dim) from (B, C, dim) brain tokens with (B, n, dim) queries."""
        k, v = (_heads(part, self.heads) for part in self.kv(z).chunk(2, dim=-1))
        return self.proj(F.scaled_dot_product_attention(_heads(q, self.heads), k, v).transpose(1, 2).flatten(2))


class SelfBlock(nn.Module):
    """Pre-norm transformer block on the brain tokens."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, z: Tensor) -> Tensor:
        """Map brain tokens (B, C, dim) to brain tokens (B, C, dim)."""
        z = z + self.attn(self.norm1(z))
        return z + self.mlp(self.norm2(z))


class CrossBlock(nn.Module):
    """What the queries read from the brain tokens: ``y + MLP(LN2(y))`` with ``y = attention(Q, LN1(Z))``.

    Attention has no residual of its own; the caller adds the one residual, ``Q + C(Z, Q)``.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, z: Tensor, q: Tensor) -> Tensor:
        """Update (B, n, dim) of the queries (B, n, dim) from the brain tokens (B, C, dim)."""
        y = self.attn(self.norm1(z), q)
        return y + self.mlp(self.norm2(y))


class BIT(nn.Module):
    """Brain tokenizer, cross-transformer and linear head; the paper's sizes are the defaults.

    Parameters correspond one to one to those of the official decoder checkpoints:

        official                    here
        voxel_embed                 tokenizer.voxel_embeddings
        centers                     tokenizer.cluster_embeddings
        conv_centers.lin_*          tokenizer.lin_*               (key, query, value, skip)
        norm_centers.*              tokenizer.norm.*
        pred_tokens                 query_tokens
        blocks.i.*                  blocks.i.*                    (norm1, attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2)
        block_crosses.i.*           block_crosses.i.*             (norm1, attn.kv, attn.proj, norm2, mlp.fc1, mlp.fc2)
        proj.*                      proj.*

    Linear layers start from PyTorch's default initialisation.

    Args:
        layout: the subjects' voxels and clusters.
        dim: width of all tokens.
        depth: self-attention blocks; there is one cross-attention block more.
        heads: attention heads; must divide ``dim``.
        mlp_ratio: hidden width of the MLPs over ``dim``.
        n_queries: query tokens T: 256 for the semantic branch (CLIP), 7190 for the low-level branch (VGG).
        out_dim: width of the predicted features: 1664 (CLIP) or 512 (VGG).

    Raises:
        ValueError: ``heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        layout: VoxelLayout,
        *,
        dim: int = 512,
        depth: int = 5,
        heads: int = 8,
        mlp_ratio: float = 4,
        n_queries: int,
        out_dim: int,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"BIT needs a width that its heads divide, got dim={dim} with heads={heads}")
        self.tokenizer = BrainTokenizer(layout, dim)
        self.query_tokens = nn.Parameter(torch.randn(n_queries, dim) * (0.1 / (2 * math.sqrt(dim))))
        self.blocks = nn.ModuleList(SelfBlock(dim, heads, mlp_ratio) for _ in range(depth))
        self.block_crosses = nn.ModuleList(CrossBlock(dim, heads, mlp_ratio) for _ in range(depth + 1))
        self.proj = nn.Linear(dim, out_dim)

    def forward(
        self, betas: Tensor, subject: Tensor, keep: Tensor | None = None, queries: Tensor | None = None
    ) -> Tensor:
        """Predict image features; queries do not see each other, so a subset gets the values of the full output.

        Args:
            betas: (B, V_max) z-scored activations, padded on the right for subjects with fewer voxels.
            subject: (B,) int64, each example's subject as a 0-based position in the layout.
            keep: (B, V_max) bool, the voxels that take part; all where None.
            queries: (B, n) int64, the query positions to compute for each example; all, in order, where None.

        Returns:
            (B, n_queries, out_dim), or (B, n, out_dim) with ``queries``.

        Raises:
            ValueError: the shapes do not fit the layout or each other.
        """
        if queries is None:
            q = self.query_tokens.expand(len(subject), -1, -1)
        elif queries.ndim == 2 and len(queries) == len(subject):
            q = F.embedding(queries, self.query_tokens)
        else:
            raise ValueError(f"queries must have shape ({len(subject)}, n), got {tuple(queries.shape)}")
        z = self.tokenizer(betas, subject, keep)
        q = q + self.block_crosses[0](z, q)
        for block, cross in zip(self.blocks, self.block_crosses[1:], strict=True):
            z = block(z)
            q = q + cross(z, q)
        return self.proj(q)
