"""Stage ``targets``: what the frozen networks say of every image that training may see.

Test images are left out: nothing that is fitted, scaled or chosen may know them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmark import networks
from benchmark.context import StageContext
from benchmark.shards import Rows, Shards, collect, write_shards
from benchmark.stages.features import SHAPES, as_pixels, row_shapes, semantic_network
from benchmark.stages.prepare import Prepared
from methods.brain_it.unclip import encode
from methods.brain_it.vgg_tokens import ChannelStats

BATCH = 64


def run(ctx: StageContext) -> dict[str, Any]:
    """Write the features of all target rows (see ``Prepared``), float16, those that the config does not leave to later.

    Outputs, each a folder of shards: ``encoder_K`` (rows x positions x channels) for each tap, ``lowlevel_K`` (rows x C
    x h x w) for each layer, ``semantic`` (rows x tokens x dim, as the generator takes them), ``latents`` (rows x c x h
    x w; none where nothing is trained on them); ``shapes.json``; and where maps are kept their statistics,
    ``lowlevel_stats.safetensors`` and ``lowlevel_mean.safetensors``. An interrupted stage goes on after the last whole
    shard.
    """
    config, store = ctx.config, ctx.config["store"]
    data = Prepared(ctx.inputs["data"])
    device = ctx.device
    layers = config["layers"]
    vae = None
    if store.get("latents") != "live":
        vae, image_size = networks.autoencoder(config["generator"])
        vae.to(device)
    semantic = semantic_network(config).to(device)
    lowlevel = networks.feature_network(config["lowlevel"]).to(device)
    backbone = None
    if store["encoder"] == "stored":
        backbone = networks.encoder_backbone(config["encoder"], config["taps"], config["adapter_rank"], config["grid"])
        backbone.to(device)

    def tokens(images: np.ndarray) -> Tensor:
        pixels: Tensor = semantic(as_pixels(images, getattr(semantic, "input_size", None)).to(device))
        return pixels

    def maps(images: np.ndarray) -> dict[str, Tensor]:
        found = lowlevel.features(as_pixels(images, config["lowlevel_size"]).to(device), layers)
        return {f"lowlevel_{k}": found[layer] for k, layer in enumerate(layers)}

    def compute(rows: np.ndarray) -> dict[str, np.ndarray]:
        images = data.target_images(rows)
        found: dict[str, Tensor] = {}
        if vae is not None:
            found["latents"] = encode(vae, as_pixels(images, image_size).to(device))  # type: ignore[arg-type]
        if backbone is not None:
            taps = backbone(as_pixels(images, config["encoder_size"]).to(device))
            found |= {f"encoder_{k}": tap for k, tap in enumerate(taps)}
        if store["lowlevel"] == "stored":
            found |= maps(images)
        if store["semantic"] == "stored":
            found["semantic"] = tokens(images)
        return {name: values.float().cpu().numpy() for name, values in found.items()}

    shards = ctx.checkpoints / "shards"
    stored: dict[str, list[int]] = {}
    with torch.inference_mode():
        if vae is not None or "stored" in store.values():
            with ctx.progress.bar("features", total=data.n_targets) as bar:
                write_shards(shards, data.n_targets, compute, batch=ctx.stage.hints["batch"], progress=bar.advance)
            stored = collect(shards, ctx.out)
        one = data.target_images(np.zeros(1, np.int64))
        shapes = {name: list(values.shape[1:]) for name, values in {"semantic": tokens(one), **maps(one)}.items()}
    (ctx.out / SHAPES).write_text(json.dumps(row_shapes(shapes, len(layers))) + "\n")
    if store["lowlevel"] == "stored":
        kept = [Shards(ctx.out / f"lowlevel_{k}") for k in range(len(layers))]
        save_file(ChannelStats.fit(_training_maps(data, kept)).tensors(), ctx.out / "lowlevel_stats.safetensors")
        save_file(_mean_maps(data, kept), ctx.out / "lowlevel_mean.safetensors")
    return {"images": data.n_targets, **stored}


def _training_maps(data: Prepared, maps: Sequence[Rows]) -> Iterator[list[Tensor]]:
    rows = data.target_rows(data.train_ids)
    for start in range(0, len(rows), BATCH):
        yield [torch.from_numpy(layer[rows[start : start + BATCH]]).float() for layer in maps]


def _mean_maps(data: Prepared, maps: Sequence[Rows]) -> dict[str, Tensor]:
    """Return the mean of each layer's maps over the training images: C x h x w."""
    sums = [torch.zeros(layer.shape[1:], dtype=torch.float64) for layer in maps]
    for batch in _training_maps(data, maps):
        for total, layer in zip(sums, batch, strict=True):
            total += layer.double().sum(0)
    return {str(k): (total / len(data.train_ids)).float() for k, total in enumerate(sums)}
