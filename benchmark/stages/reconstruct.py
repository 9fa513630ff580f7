"""Stage ``reconstruct``: from test recordings to images: DIP, semantic generation, and both branches together."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from benchmark import networks
from benchmark.context import StageContext
from benchmark.stages import image_name, seen_name
from benchmark.stages.bit import build_bit, voxel_layout
from benchmark.stages.prepare import Prepared
from benchmark.stages.targets import LowLevelTargets, as_bytes, as_pixels
from methods.brain_it.dip import invert
from methods.brain_it.generate import GenerationSettings, combined_images, semantic_images
from methods.brain_it.vgg_tokens import calibrate

KINDS = ("lowlevel", "semantic", "combined")
PREDICT_BATCH = 64


def image_seed(seed: int, subject: int, image_id: int) -> int:
    """Return the seed of one reconstruction: it depends on the run, the subject and the image, not on the batch."""
    digest = hashlib.sha256(f"{seed}/{subject}/{image_id}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def run(ctx: StageContext) -> dict[str, Any]:
    """Reconstruct the test images.

    Outputs: folders ``seen`` (one PNG an image: ``nsdXXXXX.png``), ``lowlevel``, ``semantic`` and ``combined`` (one PNG
    an image and subject), and ``index.npy``, the (subject, NSD id) of each reconstruction.
    """
    config = dict(ctx.config)
    data = Prepared(ctx.inputs["data"])
    subjects = config["generation"]["subjects"]
    ids = data.test_ids(subjects)[: config["generation"]["test_images"]]
    index = np.array([(subject, image) for subject in subjects for image in ids], np.int64)
    np.save(ctx.out / "index.npy", index)
    _save(ctx.out / "seen", [seen_name(image) for image in ids], as_pixels(data.images[ids]))

    position = np.array([data.subjects.index(subject) for subject in index[:, 0]])
    row = np.array([np.searchsorted(data.seen_ids[p], image) for p, image in zip(position, index[:, 1], strict=True)])
    betas, subject = torch.from_numpy(data.padded_betas(position, row)), torch.from_numpy(position)
    seeds = [image_seed(config["seed"], int(s), int(i)) for s, i in index]
    layout = voxel_layout(data, ctx.inputs["clusters"])

    def predict(role: str, branch: str, n_queries: int, width: int) -> Tensor:
        bit = build_bit(config[branch], layout, n_queries, width)
        bit.load_state_dict(load_file(ctx.inputs[role] / "bit.safetensors"))
        bit.to(ctx.device).eval()
        parts = [
            bit(betas[k : k + PREDICT_BATCH].to(ctx.device), subject[k : k + PREDICT_BATCH].to(ctx.device)).float()
            for k in range(0, len(betas), PREDICT_BATCH)
        ]
        return torch.cat(parts)

    generator = networks.generator(config["generator"])
    generator.unet.load_state_dict(load_file(ctx.inputs["joint"] / "unet.safetensors"))  # type: ignore[attr-defined]
    generator.unet.to(ctx.device).eval()  # type: ignore[attr-defined]
    generator.vae.to(ctx.device).eval()  # type: ignore[attr-defined]
    settings = GenerationSettings(
        **{k: config["generation"][k] for k in ("steps", "start_step", "guidance", "offset_noise", "contrast")}
    )
    batch = ctx.stage.hints["generation"]
    with torch.no_grad():
        targets = LowLevelTargets(ctx.inputs["targets"], config["lowlevel"])
        maps = predict("lowlevel", "lowlevel", targets.tokens.tokens, targets.tokens.width)
        semantic = np.load(ctx.inputs["targets"] / "semantic.npy", mmap_mode="r")
        tokens = predict("joint", "semantic", semantic.shape[1], semantic.shape[2])
    images = {"lowlevel": _invert(ctx, config, targets, maps.clone(), seeds)}
    with ctx.progress.bar("semantic images", total=len(index)) as bar:
        images["semantic"] = semantic_images(generator, tokens, settings, seeds, batch=batch, progress=bar.advance)
    with ctx.progress.bar("combined images", total=len(index)) as bar:
        images["combined"] = combined_images(
            generator, tokens, images["lowlevel"], settings, seeds, batch=batch, progress=bar.advance
        )
    names = [image_name(int(s), int(i)) for s, i in index]
    for kind in KINDS:
        _save(ctx.out / kind, names, images[kind])
    ctx.tracker.image("first reconstruction", ctx.out / "combined" / names[0])
    return {"images": len(ids), "subjects": len(subjects)}


def _invert(
    ctx: StageContext, config: dict[str, Any], targets: LowLevelTargets, tokens: Tensor, seeds: list[int]
) -> Tensor:
    """Turn predicted low-level tokens into images (Sec. 3.2, App. D.2)."""
    low, dip = config["lowlevel"], config["dip"]
    network = networks.feature_network(config["lowlevel_network"]).to(ctx.device)
    if dip["calibrate"]:
        found = load_file(ctx.inputs["lowlevel"] / "calibration.safetensors")
        sizes = targets.tokens.layer_sizes
        tokens = calibrate(tokens, sizes, [found[str(k)] for k in range(len(sizes))])
    tokens = tokens * dip["gain"]

    def features(images: Tensor) -> list[Tensor]:
        maps = network.features(images, low["layers"])
        return targets.standardised([maps[layer] for layer in low["layers"]])

    total = len(tokens) * dip["steps"]
    with ctx.progress.bar("deep image prior", total=total) as bar:
        return invert(
            targets.tokens.unmerge(tokens),
            features,
            seeds=seeds,
            size=dip["size"],
            feature_size=low["input_size"],
            steps=dip["steps"],
            lr=dip["lr"],
            input_noise=dip["input_noise"],
            ema=dip["ema"],
            channels=dip["channels"],
            skip=dip["skip"],
            depth=dip["depth"],
            batch=ctx.stage.hints["dip"],
            progress=lambda done, loss: bar.advance(done, f"loss {loss:.3f}"),
        )


def _save(folder: Path, names: list[str], images: Tensor) -> None:
    """Write images (N x 3 x H x W in [0, 1]) as PNG."""
    folder.mkdir(exist_ok=True)
    for name, image in zip(names, as_bytes(images), strict=True):
        Image.fromarray(image).save(folder / name, compress_level=6)


def read_images(folder: Path, names: list[str]) -> np.ndarray:
    """Return the named PNGs: N x H x W x 3 uint8."""
    return np.stack([np.asarray(Image.open(folder / name).convert("RGB")) for name in names])
