"""What every frozen network of the benchmark is: named features of images in [0, 1], evaluation mode, fixed weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FeatureNetwork(nn.Module):
    """A frozen network that returns named feature maps or pooled vectors of images in [0, 1].

    Gradients flow to the images (DIP needs them), never to the weights.

    Attributes:
        name: the network's name in the registry and in protocols.
        digest: SHA-256 of its weights file; ``random-SEED`` where the weights are drawn.
    """

    name: str
    digest: str

    def freeze(self) -> None:
        """Put the network into its one state: evaluation mode, no gradients for weights, channels-last."""
        self.eval().requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stay in evaluation mode whatever the surrounding model does."""
        return super().train(False)

    def features(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return the named layers of ``images`` (B x 3 x H x W, float in [0, 1])."""
        raise NotImplementedError
