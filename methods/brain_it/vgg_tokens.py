"""Feature maps of a convolutional network as tokens, and back (Brain-IT, Sec. D.2; sizes from the official code).

The low-level branch predicts one token per position and layer of VGG-16. Large maps are first merged: a window of
positions becomes one token. Narrow tokens are replicated up to the common width; predictions are un-merged by averaging
the copies and the overlaps, and the resulting maps are what the deep image prior inverts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class TokenLayer:
    """One feature map and how it is cut into tokens.

    Attributes:
        channels: channels of the map.
        size: height and width of the map, in positions.
        window: side of the square of positions that becomes one token.
        stride: step between neighbouring windows, in positions; smaller than `window` means that they overlap.
        sampled: tokens drawn per image in a training step; None draws all.

    Raises:
        ValueError: if the windows do not cover the map exactly, or more tokens are to be sampled than there are.
    """

    channels: int
    size: int
    window: int = 1
    stride: int = 1
    sampled: int | None = None

    def __post_init__(self) -> None:
        if min(self.channels, self.size, self.window, self.stride) < 1:
            raise ValueError(f"{self}: channels, size, window and stride must be at least 1")
        if self.window > self.size or self.stride > self.window or (self.size - self.window) % self.stride:
            raise ValueError(
                f"{self}: {self.window}x{self.window} windows at stride {self.stride} do not cover a map of size "
                f"{self.size}; choose stride <= window and (size - window) divisible by the stride"
            )
        if self.sampled is not None and not 1 <= self.sampled <= self.tokens:
            raise ValueError(f"{self}: sampled must lie between 1 and the layer's {self.tokens} tokens")

    @property
    def grid(self) -> int:
        """Tokens along one side."""
        return (self.size - self.window) // self.stride + 1

    @property
    def tokens(self) -> int:
        """Tokens of the layer."""
        return self.grid**2

    @property
    def dim(self) -> int:
        """Numbers in one token before replication."""
        return self.channels * self.window**2


@dataclass(frozen=True)
class FeatureTokens:
    """The layers whose tokens, in this order, make up the low-level target of an image.

    A token holds its window ordered (channel, dy, dx); the tokens of a layer are row-major. A token narrower than
    `width` is repeated cyclically up to it: two whole copies for the 256-dimensional tokens of the paper.

    Raises:
        ValueError: if a layer's tokens are wider than `width`.
    """

    layers: tuple[TokenLayer, ...]
    width: int = 512

    def __post_init__(self) -> None:
        for number, layer in enumerate(self.layers, start=1):
            if layer.dim > self.width:
                raise ValueError(f"layer {number}: a token has {layer.dim} numbers, more than width={self.width}")

    @property
    def layer_sizes(self) -> tuple[int, ...]:
        """Tokens of every layer."""
        return tuple(layer.tokens for layer in self.layers)

    @property
    def sampled_sizes(self) -> tuple[int, ...]:
        """Tokens drawn from every layer in a training step."""
        return tuple(layer.tokens if layer.sampled is None else layer.sampled for layer in self.layers)

    @property
    def tokens(self) -> int:
        """Tokens of an image, all layers together."""
        return sum(self.layer_sizes)

    def merge(self, maps: Sequence[Tensor]) -> Tensor:
        """Cut feature maps into tokens.

        Args:
            maps: one (B, channels, size, size) tensor a layer.

        Returns:
            (B, tokens, width), layer after layer.

        Raises:
            ValueError: if number or shapes of the maps differ from the layers.
        """
        if len(maps) != len(self.layers):
            raise ValueError(f"expected {len(self.layers)} feature maps, one a layer, got {len(maps)}")
        merged = []
        for number, (layer, features) in enumerate(zip(self.layers, maps, strict=True), start=1):
            if tuple(features.shape[1:]) != (layer.channels, layer.size, layer.size):
                raise ValueError(
                    f"feature map {number}: expected shape (B, {layer.channels}, {layer.size}, {layer.size}), "
                    f"got {tuple(features.shape)}"
                )
            windows = F.unfold(features, layer.window, stride=layer.stride).transpose(1, 2)
            merged.append(windows[..., self._copied_from(layer, windows.device)])
        return torch.cat(merged, dim=1)

    def unmerge(self, tokens: Tensor) -> list[Tensor]:
        """Put tokens back into feature maps, averaging replicated numbers and overlapping windows.

        Args:
            tokens: (B, tokens, width).

        Returns:
            One (B, channels, size, size) tensor a layer; the inverse of `merge` on tokens that it made.

        Raises:
            ValueError: if the tokens have another shape.
        """
        if tokens.ndim != 3 or tuple(tokens.shape[1:]) != (self.tokens, self.width):
            raise ValueError(f"expected tokens of shape (B, {self.tokens}, {self.width}), got {tuple(tokens.shape)}")
        maps = []
        for layer, part in zip(self.layers, tokens.split(self.layer_sizes, dim=1), strict=True):
            source = self._copied_from(layer, part.device)
            copies = torch.bincount(source, minlength=layer.dim).to(part.dtype)
            windows = part.new_zeros(*part.shape[:2], layer.dim).index_add(2, source, part) / copies
            windows = windows.transpose(1, 2)
            size = (layer.size, layer.size)
            total = F.fold(windows, size, layer.window, stride=layer.stride)
            overlaps = F.fold(torch.ones_like(windows[:1]), size, layer.window, stride=layer.stride)
            maps.append(total / overlaps)
        return maps

    def sample_positions(self, batch: int, generator: torch.Generator) -> Tensor:
        """Draw the tokens of a training step, without replacement, for every image on its own.

        Returns:
            (batch, sum of `sampled_sizes`) indices into the tokens of an image, layer after layer, on the
            generator's device.
        """
        drawn, first = [], 0
        for total, count in zip(self.layer_sizes, self.sampled_sizes, strict=True):
            order = torch.rand(batch, total, generator=generator, device=generator.device).argsort(dim=1)
            drawn.append(first + order[:, :count])
            first += total
        return torch.cat(drawn, dim=1)

    def _copied_from(self, layer: TokenLayer, device: torch.device) -> Tensor:
        """Which number of a layer's window every number of the replicated token is."""
        return torch.arange(self.width, device=device) % layer.dim


VGG16 = FeatureTokens(
    (
        TokenLayer(channels=64, size=112, window=2, stride=2, sampled=512),  # conv1_2, windows side by side
        TokenLayer(channels=128, size=56, window=2, stride=1, sampled=512),  # conv2_2, overlapping windows
        TokenLayer(channels=256, size=28, sampled=128),  # conv3_3
        TokenLayer(channels=512, size=14, sampled=64),  # conv4_3
        TokenLayer(channels=512, size=7, sampled=16),  # conv5_3
    )
)
"""The paper's 7190 tokens: VGG-16-BN activations of a 112x112 image (Brain-IT, Sec. D.2)."""


@dataclass(frozen=True, eq=False)
class ChannelStats:
    """Mean and standard deviation of every channel of every layer, to bring layers to one scale.

    The paper uses VGG's activations as they are; networks whose layers differ much in scale need this. Fit it on
    training images only. A channel that never changes keeps a standard deviation of 1.

    Attributes:
        means: one (channels,) tensor a layer.
        stds: one (channels,) tensor a layer, all positive.
    """

    means: tuple[Tensor, ...]
    stds: tuple[Tensor, ...]

    @classmethod
    def fit(cls, batches: Iterable[Sequence[Tensor]]) -> "ChannelStats":
        """Statistics over images and positions of batches of maps, each a list of (B, channels, H, W).

        Raises:
            ValueError: if there is no batch.
        """
        count: list[int] = []
        total: list[Tensor] = []
        squares: list[Tensor] = []
        for maps in batches:
            if not total:
                count = [0] * len(maps)
                total = [features.new_zeros(features.shape[1], dtype=torch.float64) for features in maps]
                squares = [torch.zeros_like(zeros) for zeros in total]
            for layer, features in enumerate(maps):
                values = features.detach().double()
                count[layer] += values.numel() // values.shape[1]
                total[layer] += values.sum((0, 2, 3))
                squares[layer] += values.square().sum((0, 2, 3))
        if not total:
            raise ValueError("no feature maps to take channel statistics of")
        means, stds = [], []
        for n, first, second in zip(count, total, squares, strict=True):
            mean = first / n
            std = (second / n - mean.square()).clamp(min=0).sqrt()
            dead = std <= 1e-6 * mean.abs().clamp(min=1)  # what rounding leaves of a constant channel
            means.append(mean.float())
            stds.append(std.masked_fill(dead, 1).float())
        return cls(tuple(means), tuple(stds))

    def apply(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Standardise maps of shape (B, channels, H, W)."""
        return [
            (features - mean[:, None, None]) / std[:, None, None]
            for features, mean, std in zip(maps, self.means, self.stds, strict=True)
        ]

    def invert(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Undo `apply`."""
        return [
            features * std[:, None, None] + mean[:, None, None]
            for features, mean, std in zip(maps, self.means, self.stds, strict=True)
        ]

    def tensors(self) -> dict[str, Tensor]:
        """Everything as named tensors, for a safetensors file."""
        return {f"{name}.{i}": value for name in ("means", "stds") for i, value in enumerate(getattr(self, name))}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "ChannelStats":
        """Rebuild from `tensors()`."""
        layers = range(len(tensors) // 2)
        return cls(tuple(tensors[f"means.{i}"] for i in layers), tuple(tensors[f"stds.{i}"] for i in layers))


def fit_calibration(
    batches: Iterable[tuple[Tensor, Tensor]], layer_sizes: Sequence[int], ridge: float = 1e-3
) -> list[Tensor]:
    """Fit, for each layer, the linear map from predicted to true tokens with the least squared error.

    InfoNCE shapes predictions so that their products with true tokens tell those apart: directions that are predicted
    well are stretched, others shrunk. Inversion compares features by squared error, so it needs the map back.

    Args:
        batches: (predicted, true) tokens of held-out images, (B, tokens, width) each.
        layer_sizes: tokens of each layer.
        ridge: penalty, relative to the mean square of the predictions.

    Returns:
        One (width, width) matrix a layer: true is about predicted @ matrix.

    Raises:
        ValueError: if there is no batch.
    """
    sizes = list(layer_sizes)
    gram: list[Tensor] = []
    cross: list[Tensor] = []
    for predicted, true in batches:
        width = predicted.shape[-1]
        if not gram:
            gram = [torch.zeros(width, width, dtype=torch.float64) for _ in sizes]
            cross = [torch.zeros_like(g) for g in gram]
        for k, (x, y) in enumerate(zip(predicted.split(sizes, 1), true.split(sizes, 1), strict=True)):
            x, y = x.reshape(-1, width).double().cpu(), y.reshape(-1, width).double().cpu()
            gram[k] += x.T @ x
            cross[k] += x.T @ y
    if not gram:
        raise ValueError("no predicted tokens to fit a calibration to")
    matrices = []
    for g, c in zip(gram, cross, strict=True):
        penalty = ridge * g.diagonal().mean().clamp(min=1e-12) * torch.eye(len(g), dtype=torch.float64)
        matrices.append(torch.linalg.solve(g + penalty, c).float())
    return matrices


def calibrate(tokens: Tensor, layer_sizes: Sequence[int], matrices: Sequence[Tensor]) -> Tensor:
    """Apply what :func:`fit_calibration` found to predicted tokens (B, tokens, width)."""
    layers = zip(tokens.split(list(layer_sizes), 1), matrices, strict=True)
    return torch.cat([layer @ matrix.to(layer) for layer, matrix in layers], 1)
