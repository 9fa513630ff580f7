"""A multi-layer perceptron in a BIT's place: sizes and rate are MindEye's, all else is the branch's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveInt

from methods.predictors import Network

if TYPE_CHECKING:
    from torch import nn


class MLPNetwork(Network):
    """A linear map for each subject, then one network for all (the class of MindEye)."""

    title: ClassVar[str] = "MLP"

    hidden: PositiveInt = Field(4096, description="Width of the space that all subjects share.")
    blocks: PositiveInt = Field(4, description="Residual blocks.")
    dropout: float = Field(0.15, ge=0, lt=1, description="After each activation.")

    def build(self, n_voxels: Sequence[int], tokens: int, width: int) -> nn.Module:
        """Return a fresh MLP."""
        from methods.baselines.mlp import MLP

        sizes = {"hidden": self.hidden, "blocks": self.blocks}
        return MLP(n_voxels, **sizes, dropout=self.dropout, n_queries=tokens, out_dim=width)
