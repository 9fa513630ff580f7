"""What the frozen networks say of an image: read from what stage ``targets`` kept, or computed when it is asked for.

Which of the two is a setting (``targets``): at the paper's size the CLIP tokens of all images take 167 GB, VGG's maps
600 GB and DINOv2's taps 500 GB, and only the first is worth keeping. Both ways give the same numbers up to float16.

Each has two halves: ``read``, which takes what is stored, or the images, from the disk and may run ahead in a thread,
and ``compute``, which uses the device. To call one is to do both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark import networks
from benchmark.devices import as_float32, staged
from benchmark.shards import Shards
from benchmark.stages.prepare import Prepared
from methods.brain_it.encoder import shift_augment
from methods.brain_it.vgg_tokens import ChannelStats, FeatureTokens, TokenLayer

SHAPES = "shapes.json"


def as_pixels(images: np.ndarray | Tensor, size: int | None = None) -> Tensor:
    """Return uint8 B x H x W x 3 as float B x 3 x S x S in [0, 1], resized (bilinear, antialiased) where need be."""
    held = images if isinstance(images, Tensor) else torch.from_numpy(np.ascontiguousarray(images))
    pixels = held.permute(0, 3, 1, 2).float() / 255
    if size is None or pixels.shape[-1] == size:
        return pixels
    return F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False, antialias=True)


def as_bytes(images: Tensor) -> np.ndarray:
    """Return B x 3 x H x W in [0, 1] as uint8 B x H x W x 3, rounded."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


# --- what the encoder reads -------------------------------------------------------------------------------------------


def is_static(encoder: Mapping[str, Any]) -> bool:
    """Return whether an image's taps never change, so that they can be computed once: no adapters, no shifts."""
    return not encoder["adapter_rank"] and not encoder["max_shift"]


class StoredTaps:
    """Tapped image features of the target rows, as stage ``targets`` kept them."""

    adapters: nn.Module | None = None

    def __init__(self, folder: Path, taps: int, device: str) -> None:
        self.taps = [Shards(folder / f"encoder_{k}") for k in range(taps)]
        self.device = device

    @property
    def sizes(self) -> tuple[list[int], int]:
        """Channels of each tap, and their positions."""
        return [tap.shape[2] for tap in self.taps], self.taps[0].shape[1]

    def __call__(self, rows: np.ndarray) -> list[Tensor]:
        """Return one B x positions x channels tensor for each tap."""
        return self.compute(self.read(rows))

    def read(self, rows: np.ndarray, generator: torch.Generator | None = None) -> list[Tensor]:
        """Return the taps as they are stored."""
        return [staged(torch.from_numpy(tap[rows]), self.device) for tap in self.taps]

    def compute(self, found: list[Tensor]) -> list[Tensor]:
        """Return the taps on the device, float32."""
        return [as_float32(tap, self.device) for tap in found]


class LiveTaps:
    """Tapped image features from the backbone with its trained adapters, of images that are shifted in training.

    Args:
        config: of the encoder: ``network``, ``taps``, ``adapter_rank``, ``grid``, ``input_size``, ``max_shift``.
        data: the images.
        device: where the backbone runs.
        checkpointing: trade time for memory in the backward pass through the backbone.
    """

    def __init__(self, config: Mapping[str, Any], data: Prepared, device: str, checkpointing: bool = False) -> None:
        self.data, self.device = data, device
        self.size, self.max_shift = config["input_size"], config["max_shift"]
        self.backbone = networks.encoder_backbone(
            config["network"], config["taps"], config["adapter_rank"], config["grid"]
        ).to(device)
        self.backbone.checkpointing = checkpointing
        self.adapters: nn.Module | None = self.backbone.adapters if config["adapter_rank"] else None

    @property
    def sizes(self) -> tuple[list[int], int]:
        """Channels of each tap, and their positions."""
        with torch.no_grad():
            taps = self(np.zeros(1, np.int64))
        return [tap.shape[2] for tap in taps], taps[0].shape[1]

    def __call__(self, rows: np.ndarray) -> list[Tensor]:
        """Return one B x positions x channels tensor for each tap."""
        return self.compute(self.read(rows))

    def read(self, rows: np.ndarray, generator: torch.Generator | None = None) -> list[Tensor]:
        """Return the images; with a generator, shifted as in training."""
        pixels = as_pixels(self.data.target_images(rows), self.size)
        if generator is not None and self.max_shift:
            pixels = shift_augment(pixels, self.max_shift, generator)
        return [staged(pixels, self.device)]

    def compute(self, found: list[Tensor]) -> list[Tensor]:
        """Return what the backbone says of images."""
        (pixels,) = found
        return self.backbone(pixels.to(self.device, non_blocking=True))


def encoder_taps(
    config: Mapping[str, Any], data: Prepared, targets: Path, device: str, checkpointing: bool = False
) -> StoredTaps | LiveTaps:
    """Return what the encoder reads of an image: kept where it never changes, else computed."""
    if is_static(config):
        return StoredTaps(targets, len(config["taps"]), device)
    return LiveTaps(config, data, device, checkpointing)


# --- what the BITs predict --------------------------------------------------------------------------------------------


class SemanticTargets:
    """Semantic target tokens: stored, or from the network when they are asked for.

    Args:
        folder: of stage ``targets``.
        config: its configuration.
        data: the images, for tokens that are computed.
        device: where they are computed.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], data: Prepared, device: str) -> None:
        self.data, self.device = data, device
        self.stored: Shards | None = None
        self.network: nn.Module | None = None
        self.config = config
        self.tokens, self.width = read_shapes(folder)["semantic"]
        if config["store"]["semantic"] == "stored":
            self.stored = Shards(folder / "semantic")

    def __call__(self, rows: np.ndarray) -> Tensor:
        """Return the tokens of target rows: B x tokens x width, float32, on the device."""
        return self.compute(self.read(rows))

    def read(self, rows: np.ndarray) -> Tensor:
        """Return the tokens as they are stored, or else the images."""
        array = self.data.target_images(rows) if self.stored is None else self.stored[rows]
        return staged(torch.from_numpy(array), self.device)

    @torch.no_grad()
    def compute(self, found: Tensor) -> Tensor:
        """Return the tokens of what was read."""
        if self.stored is not None:
            return as_float32(found, self.device)
        if self.network is None:
            self.network = semantic_network(self.config).to(self.device)
        pixels = as_pixels(found.to(self.device, non_blocking=True), getattr(self.network, "input_size", None))
        tokens: Tensor = self.network(pixels).float()
        return tokens


def semantic_network(config: Mapping[str, Any]) -> nn.Module:
    """Return the network of the semantic tokens, as stage ``targets`` is configured."""
    dtype = None if config["precision"] == "fp32" else getattr(torch, {"bf16": "bfloat16"}[config["precision"]])
    clip_input = config["clip_input"] if "clip" in config["semantic"] else None
    network: nn.Module = networks.semantic_network(config["semantic"], clip_input=clip_input, dtype=dtype)
    return network


class LowLevelTargets:
    """Low-level target tokens: feature maps, standardised and centred as the config says, merged and replicated.

    Args:
        folder: of stage ``targets``.
        config: of the low-level branch.
        stage: configuration of stage ``targets``; needed where maps are computed, not stored.
        data: the images, likewise.
        device: where maps are computed, likewise.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        stage: Mapping[str, Any] | None = None,
        data: Prepared | None = None,
        device: str = "cpu",
    ) -> None:
        self.config, self.stage, self.data, self.device = config, stage, data, device
        shapes: list[list[int]] = read_shapes(folder)["lowlevel"]
        self.maps: list[Shards] = []
        self.network: Any = None
        if (folder / "lowlevel_0").is_dir():
            self.maps = [Shards(folder / f"lowlevel_{k}") for k in range(len(shapes))]
        self.stats: ChannelStats | None = None
        if config["standardise"]:
            self.stats = ChannelStats.from_tensors(load_file(folder / "lowlevel_stats.safetensors"))
        self.mean: list[Tensor] | None = None
        if config["centre"]:
            mean = load_file(folder / "lowlevel_mean.safetensors")
            self.mean = [m[0] for m in self._scaled([mean[str(k)][None] for k in range(len(mean))])]
        self.tokens = FeatureTokens(
            tuple(
                TokenLayer(channels=channels, size=size, window=window, stride=stride, sampled=sampled)
                for (channels, size, _), (window, stride), sampled in zip(
                    shapes, config["windows"], config["sampled"], strict=True
                )
            ),
            width=config["width"],
        )

    def __call__(self, rows: np.ndarray) -> Tensor:
        """Return the target tokens of target rows: B x tokens x width, float32."""
        return self.compute(self.read(rows))

    def read(self, rows: np.ndarray) -> list[Tensor]:
        """Return the maps as they are stored, or else the images."""
        if self.maps:
            return [torch.from_numpy(layer[rows]) for layer in self.maps]
        if self.data is None or self.stage is None:
            raise ValueError("maps that are not stored are computed from the images, as the stage's config says")
        return [staged(torch.from_numpy(self.data.target_images(rows)), self.device)]

    @torch.no_grad()
    def compute(self, found: list[Tensor]) -> Tensor:
        """Return the tokens of what was read."""
        maps = [as_float32(layer, "cpu") for layer in found] if self.maps else self._computed(found[0])
        return self.tokens.merge(self.standardised(maps))

    def _computed(self, images: Tensor) -> list[Tensor]:
        assert self.stage is not None
        if self.network is None:
            self.network = networks.feature_network(self.stage["lowlevel"]).to(self.device)
        pixels = as_pixels(images.to(self.device, non_blocking=True), self.stage["lowlevel_size"])
        found = self.network.features(pixels, self.stage["layers"])
        return [found[layer].float() for layer in self.stage["layers"]]

    def standardised(self, maps: list[Tensor]) -> list[Tensor]:
        """Return maps on the scale of the targets, on the device where they are."""
        scaled = self._scaled(maps)
        if self.mean is None:
            return scaled
        return [layer - mean.to(layer) for layer, mean in zip(scaled, self.mean, strict=True)]

    def _scaled(self, maps: list[Tensor]) -> list[Tensor]:
        if self.stats is None:
            return maps
        device = maps[0].device
        means, stds = (tuple(t.to(device) for t in part) for part in (self.stats.means, self.stats.stds))
        return ChannelStats(means, stds).apply(maps)


def read_shapes(folder: Path) -> dict[str, Any]:
    """Return the sizes of the targets that stage ``targets`` noted, see :func:`row_shapes`."""
    shapes: dict[str, Any] = json.loads((folder / SHAPES).read_text())
    return shapes


def row_shapes(outputs: Mapping[str, Sequence[int]], layers: int) -> dict[str, Any]:
    """Return what ``shapes.json`` says: tokens and width of the semantic targets, channels and sides of the maps."""
    return {
        "semantic": list(outputs["semantic"]),
        "lowlevel": [list(outputs[f"lowlevel_{k}"]) for k in range(layers)],
    }
