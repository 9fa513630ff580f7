"""Stage ``targets``: what the frozen networks say of every image that training may see.

Test images are left out: nothing that is fitted, scaled or chosen may know them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from benchmark import networks
from benchmark.context import StageContext
from benchmark.stages.prepare import Prepared
from methods.brain_it.unclip import encode
from methods.brain_it.vgg_tokens import ChannelStats, FeatureTokens, TokenLayer

BATCH = 64


def as_pixels(images: np.ndarray, size: int | None = None) -> Tensor:
    """Return uint8 B x H x W x 3 as float B x 3 x S x S in [0, 1], resized (bilinear, antialiased) where need be."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    if size is None or pixels.shape[-1] == size:
        return pixels
    return F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False, antialias=True)


def as_bytes(images: Tensor) -> np.ndarray:
    """Return B x 3 x H x W in [0, 1] as uint8 B x H x W x 3, rounded."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def run(ctx: StageContext) -> dict[str, Any]:
    """Write the features of all target rows (see ``Prepared``), float16.

    Outputs: ``encoder_K.npy`` (rows x positions x channels) for each tap, ``lowlevel_K.npy`` (rows x C x h x w) for
    each layer, ``semantic.npy`` (rows x tokens x dim, as the generator takes them), ``latents.npy`` (rows x c x h x w),
    and ``lowlevel_stats.safetensors``.
    """
    config = ctx.config
    data = Prepared(ctx.inputs["data"])
    device = ctx.device
    backbone = networks.encoder_backbone(config["encoder"], config["taps"], config["adapter_rank"], config["grid"])
    backbone.to(device)
    lowlevel = networks.feature_network(config["lowlevel"]).to(device)
    semantic = networks.semantic_network(config["semantic"]).to(device)
    generator = networks.generator(config["generator"])
    vae = generator.vae.to(device)  # type: ignore[attr-defined]
    outputs: dict[str, np.memmap] = {}

    def keep(name: str, rows: slice, values: Tensor) -> None:
        if name not in outputs:
            shape = (data.n_targets, *values.shape[1:])
            outputs[name] = np.lib.format.open_memmap(ctx.out / f"{name}.npy", "w+", np.float16, shape)
        outputs[name][rows] = values.cpu().numpy()

    with torch.inference_mode(), ctx.progress.bar("features", total=data.n_targets) as bar:
        for start in range(0, data.n_targets, BATCH):
            rows = slice(start, min(start + BATCH, data.n_targets))
            images = data.target_images(np.arange(rows.start, rows.stop))
            for k, tokens in enumerate(backbone(as_pixels(images, config["encoder_size"]).to(device))):
                keep(f"encoder_{k}", rows, tokens)
            found = lowlevel.features(as_pixels(images, config["lowlevel_size"]).to(device), config["layers"])
            for k, layer in enumerate(config["layers"]):
                keep(f"lowlevel_{k}", rows, found[layer])
            keep("semantic", rows, semantic(as_pixels(images).to(device)))
            keep("latents", rows, encode(vae, as_pixels(images, generator.image_size).to(device)))
            bar.advance(rows.stop - rows.start)
    for array in outputs.values():
        array.flush()
    maps = [outputs[f"lowlevel_{k}"] for k in range(len(config["layers"]))]
    save_file(ChannelStats.fit(_training_maps(data, maps)).tensors(), ctx.out / "lowlevel_stats.safetensors")
    save_file(_mean_maps(data, maps), ctx.out / "lowlevel_mean.safetensors")
    return {"images": data.n_targets, **{name: list(array.shape[1:]) for name, array in outputs.items()}}


def _training_maps(data: Prepared, maps: Sequence[np.ndarray]) -> Iterator[list[Tensor]]:
    rows = data.target_rows(data.train_ids)
    for start in range(0, len(rows), BATCH):
        yield [torch.from_numpy(layer[rows[start : start + BATCH]]).float() for layer in maps]


def _mean_maps(data: Prepared, maps: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Return the mean of each layer's maps over the training images: C x h x w."""
    sums = [torch.zeros(layer.shape[1:], dtype=torch.float64) for layer in maps]
    for batch in _training_maps(data, maps):
        for total, layer in zip(sums, batch, strict=True):
            total += layer.double().sum(0)
    return {str(k): (total / len(data.train_ids)).float() for k, total in enumerate(sums)}


class LowLevelTargets:
    """Low-level target tokens: feature maps, standardised and centred as the config says, merged and replicated."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.maps = [np.load(folder / f"lowlevel_{k}.npy", mmap_mode="r") for k in range(len(config["layers"]))]
        self.stats: ChannelStats | None = None
        if config["standardise"]:
            self.stats = ChannelStats.from_tensors(load_file(folder / "lowlevel_stats.safetensors"))
        self.mean: list[Tensor] | None = None
        if config["centre"]:
            mean = load_file(folder / "lowlevel_mean.safetensors")
            self.mean = [m[0] for m in self._scaled([mean[str(k)][None] for k in range(len(mean))])]
        self.tokens = FeatureTokens(
            tuple(
                TokenLayer(channels=m.shape[1], size=m.shape[2], window=window, stride=stride, sampled=sampled)
                for m, (window, stride), sampled in zip(self.maps, config["windows"], config["sampled"], strict=True)
            ),
            width=config["width"],
        )

    def __call__(self, rows: np.ndarray) -> Tensor:
        """Return the target tokens of target rows: B x tokens x width, float32."""
        maps = [torch.from_numpy(np.ascontiguousarray(layer[rows])).float() for layer in self.maps]
        return self.tokens.merge(self.standardised(maps))

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
