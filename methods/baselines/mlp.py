"""A multi-layer perceptron from voxels to image-feature tokens, of the class of MindEye.

After MindEye (Scotti et al., NeurIPS 2023), whose backbone is residual blocks of linear layer, LayerNorm, GELU and
dropout with one linear head for all tokens, and MindEye2 (Scotti et al., ICML 2024), which shares it between subjects
by a linear map of each subject's voxels into one hidden space (there called ridge, for its weight decay).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """A linear map for each subject, then one network for all; called as a BIT is, so that the same code trains it.

    Args:
        n_voxels: voxels of each subject.
        hidden: width of the shared space (MindEye: 4096).
        blocks: residual blocks (MindEye: 4).
        dropout: after each activation (MindEye: 0.15 in the blocks).
        n_queries: tokens T of an image.
        out_dim: width of a token.

    Raises:
        ValueError: no subject, or one without voxels.
    """

    def __init__(
        self,
        n_voxels: Sequence[int],
        *,
        hidden: int = 4096,
        blocks: int = 4,
        dropout: float = 0.15,
        n_queries: int,
        out_dim: int,
    ) -> None:
        super().__init__()
        if not n_voxels or min(n_voxels) < 1:
            raise ValueError(f"MLP needs subjects with a voxel or more each, got {list(n_voxels)}")
        self.n_voxels = tuple(n_voxels)
        self.n_queries = n_queries
        self.subjects = nn.ModuleList(nn.Linear(count, hidden) for count in n_voxels)
        self.start = _activation(hidden, dropout)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, hidden), _activation(hidden, dropout)) for _ in range(blocks)
        )
        self.head = nn.Linear(hidden, n_queries * out_dim)

    def forward(
        self, betas: Tensor, subject: Tensor, keep: Tensor | None = None, queries: Tensor | None = None
    ) -> Tensor:
        """Predict image features.

        Args:
            betas: (B, V_max) z-scored activations, padded on the right for subjects with fewer voxels.
            subject: (B,) int64, each example's subject as a 0-based position in ``n_voxels``.
            keep: (B, V_max) bool, the voxels that take part; all where None. The others are dropped as dropout does:
                those that stay are scaled up.
            queries: (B, n) int64, the tokens to return for each example; all, in order, where None.

        Returns:
            (B, n_queries, out_dim), or (B, n, out_dim) with ``queries``.

        Raises:
            ValueError: the shapes do not fit the subjects or each other.
        """
        expected = (len(subject), max(self.n_voxels))
        if betas.shape != expected or (keep is not None and keep.shape != expected):
            got = f"betas {tuple(betas.shape)}" + ("" if keep is None else f", keep {tuple(keep.shape)}")
            raise ValueError(f"{len(subject)} examples need betas and keep of shape {expected}, got {got}")
        if queries is not None and (queries.ndim != 2 or len(queries) != len(subject)):
            raise ValueError(f"queries must have shape ({len(subject)}, n), got {tuple(queries.shape)}")
        x = self.start(self._shared(betas, subject, keep))
        for block in self.blocks:
            x = x + block(x)
        tokens = self.head(x).unflatten(1, (self.n_queries, -1))
        if queries is None:
            return tokens
        return tokens.gather(1, queries.unsqueeze(2).expand(-1, -1, tokens.shape[2]))

    def _shared(self, betas: Tensor, subject: Tensor, keep: Tensor | None) -> Tensor:
        """Map each example with its own subject's linear layer: (B, hidden)."""
        parts, places = [], []
        for position in subject.unique().tolist():
            rows = (subject == position).nonzero().squeeze(1)
            count = self.n_voxels[position]
            x = betas[rows, :count]
            if keep is not None:
                kept = keep[rows, :count]
                x = x * kept * (count / kept.sum(1, keepdim=True).clamp(min=1))
            parts.append(self.subjects[position](x))
            places.append(rows)
        return torch.cat(parts)[torch.cat(places).argsort()]


def _activation(width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.GELU(), nn.Dropout(dropout))
