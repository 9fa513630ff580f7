"""Stage ``reconstruct``: from test recordings to images: DIP, semantic generation, and both branches together."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmark import networks
from benchmark.context import StageContext
from benchmark.data.images import prepare_images
from benchmark.errors import UserError
from benchmark.networks import FeatureNetwork
from benchmark.progress import Bar
from benchmark.stages import image_name, seen_name
from benchmark.stages.baselines import load_predictor
from benchmark.stages.bit import build_bit, voxel_layout
from benchmark.stages.features import LowLevelTargets, as_bytes, as_pixels, read_shapes, semantic_network
from benchmark.stages.prepare import Prepared
from methods.brain_it.dip import invert
from methods.brain_it.generate import GenerationSettings, combined_images, semantic_images
from methods.brain_it.refine import RefinementSettings, refine
from methods.brain_it.vgg_tokens import calibrate


def image_seed(seed: int, subject: int, image_id: int) -> int:
    """Return the seed of one reconstruction: it depends on the run, the subject and the image, not on the batch."""
    digest = hashlib.sha256(f"{seed}/{subject}/{image_id}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def run(ctx: StageContext) -> dict[str, Any]:
    """Reconstruct the test images.

    Outputs: folders ``seen`` (one PNG an image: ``nsdXXXXX.png``), ``lowlevel``, ``semantic`` and ``combined`` (one PNG
    an image and subject; with a refiner ``combined`` is refined and ``unrefined`` holds what it was made from, and
    ``semantic-refined``, where it is asked for, is made from ``semantic``), and ``index.npy``, the (subject, NSD id) of
    each reconstruction. Finished images outlive an interruption.
    """
    config = dict(ctx.config)
    data = Prepared(ctx.inputs["data"])
    subjects = config["generation"]["subjects"]
    ids = data.test_ids(subjects)[: config["generation"]["test_images"]]
    index = np.array([(subject, image) for subject in subjects for image in ids], np.int64)
    np.save(ctx.out / "index.npy", index)
    seen = as_shown(data.images[ids], config["generation"]["saved_size"])
    save_images(ctx.out / "seen", [seen_name(image) for image in ids], seen)
    names = [image_name(int(subject), int(image)) for subject, image in index]
    reconstruct(ctx, data, index, names)
    ctx.tracker.image("first reconstruction", ctx.out / "combined" / names[0])
    return {"images": len(ids), "subjects": len(subjects)}


def reconstruct(ctx: StageContext, data: Prepared, index: np.ndarray, names: Sequence[str]) -> None:
    """Write the reconstructions of recordings, a folder each step, as :func:`run` says.

    Args:
        ctx: of the stage, whose configuration and upstream stages are those of ``reconstruct``.
        data: the recordings.
        index: (n, 2) subject, and image as in ``data.seen_ids``.
        names: n names of the PNG files.
    """
    saved_size = ctx.config["generation"]["saved_size"]
    work = _Work(ctx, data, index, names)
    made = {"lowlevel": work.lowlevel()}
    made["semantic"], made["combined"] = work.generated(made["lowlevel"])
    if ctx.config["refiner"] is not None:
        made["unrefined"], made["combined"] = made["combined"], work.refined(made["combined"], "refined")
        if ctx.config["refinement"].get("also_semantic"):
            made["semantic-refined"] = work.refined(made["semantic"], "semantic-refined")
    for kind, folder in made.items():
        for name in work.names:
            image = np.load(folder / f"{name}.npy")
            save_images(ctx.out / kind, [name], _as_saved(image, saved_size)[None])


class _Work:
    """The images of one stage, made step by step; a step's images lie in ``checkpoints`` (3 x H x W float32 each)."""

    def __init__(self, ctx: StageContext, data: Prepared, index: np.ndarray, names: Sequence[str]) -> None:
        self.ctx, self.data, self.config, self.names = ctx, data, dict(ctx.config), list(names)
        self.seeds = [image_seed(self.config["seed"], int(s), int(i)) for s, i in index]
        self.subject = np.array([data.subjects.index(subject) for subject in index[:, 0]])
        self.row = np.array(
            [np.searchsorted(data.seen_ids[p], image) for p, image in zip(self.subject, index[:, 1], strict=True)]
        )

    def predictor(self, role: str, branch: str, n_queries: int, width: int) -> Callable[[np.ndarray], Tensor]:
        """Return what predicts the tokens of recordings (by place in ``names``), as a stage trained it."""
        if "predictor" in self.config[branch]:
            stand_in = load_predictor(self.ctx, branch, Prepared(self.ctx.inputs["data"]))
            return lambda places: stand_in(*self.recordings(places))
        layout = voxel_layout(self.data, self.ctx.inputs["clusters"])
        bit = build_bit(self.config[branch], layout, n_queries, width)
        bit.load_state_dict(load_file(self.ctx.inputs[role] / "bit.safetensors"))
        bit.to(self.ctx.device).eval()

        @torch.no_grad()
        def predict(places: np.ndarray) -> Tensor:
            betas, subject = self.recordings(places)
            tokens: Tensor = bit(betas.to(self.ctx.device), subject.to(self.ctx.device)).float()
            return tokens

        return predict

    def recordings(self, places: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return recordings, B x most voxels, and the positions of their subjects."""
        betas = self.data.padded_betas(self.subject[places], self.row[places])
        return torch.from_numpy(betas), torch.from_numpy(self.subject[places])

    def knows(self, branch: str) -> bool:
        """Return whether a branch is given the true features of what was seen, instead of a prediction."""
        return bool(self.config[branch].get("predictor") == "oracle")

    def true_lowlevel(self, targets: LowLevelTargets, network: FeatureNetwork) -> Callable[[np.ndarray], Tensor]:
        """Return what gives the low-level tokens of the images that were seen, on the scale of the targets."""
        low = self.config["lowlevel"]

        @torch.no_grad()
        def tokens(places: np.ndarray) -> Tensor:
            maps = network.features(self.pixels(places, low["input_size"]), low["layers"])
            return targets.tokens.merge(targets.standardised([maps[layer].float() for layer in low["layers"]]))

        return tokens

    def true_semantic(self) -> Callable[[np.ndarray], Tensor]:
        """Return what gives the semantic tokens of the images that were seen."""
        network = semantic_network(self.ctx.stage.upstream["targets"].config).to(self.ctx.device)
        side = getattr(network, "input_size", None)

        @torch.no_grad()
        def tokens(places: np.ndarray) -> Tensor:
            found: Tensor = network(self.pixels(places, side)).float()
            return found

        return tokens

    def pixels(self, places: np.ndarray, size: int | None) -> Tensor:
        """Return the images that were seen: B x 3 x S x S in [0, 1], on the device."""
        ids = [self.data.seen_ids[s][r] for s, r in zip(self.subject[places], self.row[places], strict=True)]
        return as_pixels(self.data.images[ids], size).to(self.ctx.device)

    def blocks(self, steps: Sequence[str], batch: int) -> list[np.ndarray]:
        """Return the batches, always cut alike, of which an image is not there yet in one of ``steps``."""
        folders = [self.folder(step) for step in steps]
        cut = [np.arange(k, min(k + batch, len(self.names))) for k in range(0, len(self.names), batch)]
        return [
            block
            for block in cut
            if not all((folder / f"{self.names[k]}.npy").is_file() for folder in folders for k in block)
        ]

    def folder(self, step: str) -> Path:
        """Return the folder of a step's images."""
        folder = self.ctx.checkpoints / "images" / step
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def keep(self, step: str, places: np.ndarray, images: Tensor) -> None:
        """Write finished images, each whole or not at all."""
        folder = self.folder(step)
        for k, image in zip(places, images.float().cpu().numpy(), strict=True):
            temporary = folder / f".{self.names[k]}.tmp"
            with temporary.open("wb") as file:
                np.save(file, image)
            os.replace(temporary, folder / f"{self.names[k]}.npy")

    def load(self, folder: Path, places: np.ndarray) -> Tensor:
        """Return images of a step: B x 3 x H x W."""
        return torch.from_numpy(np.stack([np.load(folder / f"{self.names[k]}.npy") for k in places]))

    def lowlevel(self) -> Path:
        """Invert the predicted low-level tokens; return the folder of the images."""
        ctx, config = self.ctx, self.config
        targets = LowLevelTargets(ctx.inputs["targets"], config["lowlevel"])
        network = networks.feature_network(config["lowlevel_network"]).to(ctx.device)
        knows = self.knows("lowlevel")
        if knows:
            predict = self.true_lowlevel(targets, network)
        else:
            predict = self.predictor("lowlevel", "lowlevel", targets.tokens.tokens, targets.tokens.width)
        blocks = self.blocks(["lowlevel"], ctx.stage.hints["dip"])
        total = sum(map(len, blocks)) * config["dip"]["steps"]
        with ctx.progress.bar("deep image prior", total=total) as bar:
            for block in blocks:
                seeds = [self.seeds[k] for k in block]
                tokens = predict(block) if knows else _scaled(ctx, targets, predict(block))
                self.keep("lowlevel", block, _invert(ctx, network, targets, tokens, seeds, bar))
        return self.folder("lowlevel")

    def generated(self, lowlevel: Path) -> tuple[Path, Path]:
        """Sample images from the semantic tokens, alone and from the low-level images; return the two folders."""
        ctx, config = self.ctx, self.config
        joint = ctx.inputs.get("joint")
        unet = None if joint is None else joint / "unet.safetensors"  # as it was made, or as it was trained with BIT
        generator = networks.generator(config["generator"], unet=unet)
        generator.vae.to(ctx.device).eval()  # type: ignore[attr-defined]
        generator = replace(generator, unet=placed(generator.unet, ctx))  # type: ignore[arg-type]
        settings = GenerationSettings(
            **{k: config["generation"][k] for k in ("steps", "start_step", "guidance", "offset_noise", "contrast")}
        )
        role = "semantic" if joint is None else "joint"
        if self.knows("semantic"):
            predict = self.true_semantic()
        else:
            predict = self.predictor(role, "semantic", *read_shapes(ctx.inputs["targets"])["semantic"])
        blocks = self.blocks(["semantic", "combined"], ctx.stage.hints["generation"])
        with (
            ctx.progress.bar("semantic and combined images", total=2 * sum(map(len, blocks))) as bar,
            autocast(ctx.device, config["generation"]["precision"]),
        ):
            for block in blocks:
                tokens, seeds = predict(block), [self.seeds[k] for k in block]
                self.keep("semantic", block, semantic_images(generator, tokens, settings, seeds, batch=len(block)))
                bar.advance(len(block))
                low = self.load(lowlevel, block)
                self.keep("combined", block, combined_images(generator, tokens, low, settings, seeds, batch=len(block)))
                bar.advance(len(block))
        return self.folder("semantic"), self.folder("combined")

    def refined(self, images_of: Path, step: str) -> Path:
        """Refine the images of a step; return the folder of the results."""
        ctx, config = self.ctx, self.config
        refiner = networks.refiner(config["refiner"])
        refiner.vae.to(ctx.device).eval()  # type: ignore[attr-defined]
        refiner = replace(refiner, unet=placed(refiner.unet, ctx))  # type: ignore[arg-type]
        settings = RefinementSettings(**{k: v for k, v in config["refinement"].items() if k != "also_semantic"})
        blocks = self.blocks([step], ctx.stage.hints["refinement"])
        with (
            ctx.progress.bar("refined images", total=sum(map(len, blocks))) as bar,
            autocast(ctx.device, config["generation"]["precision"]),
        ):
            for block in blocks:
                seeds = [self.seeds[k] for k in block]
                images = self.load(images_of, block)
                made = refine(refiner, images, settings, seeds, batch=len(block), device=ctx.device)
                self.keep(step, block, made)
                bar.advance(len(block))
        return self.folder(step)


def placed(network: nn.Module, ctx: StageContext) -> nn.Module:
    """Put a denoiser where the stage samples: whole, piece by piece from the CPU (``offload``), compiled or not."""
    network.eval()
    if ctx.stage.hints.get("offload") and ctx.device != "cpu":
        from accelerate import cpu_offload

        cpu_offload(network, torch.device(ctx.device))
        return network
    network.to(ctx.device)
    if ctx.stage.hints.get("compile"):
        return cast("nn.Module", torch.compile(network))
    return network


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    """Return the context in which denoisers compute.

    Raises:
        UserError: fp16 without a GPU.
    """
    if precision == "fp32":
        return nullcontext()
    kind = torch.device(device).type
    if precision == "fp16" and kind == "cpu":
        raise UserError("generation.precision is fp16, which needs a GPU; type --set generation.precision=fp32")
    return torch.autocast(kind, dtype={"fp16": torch.float16, "bf16": torch.bfloat16}[precision])


def _as_saved(image: np.ndarray, size: int | None) -> np.ndarray:
    """Return a 3 x H x W float image as uint8 H x W x 3: rounded; or reduced, then truncated, as the official code."""
    if size is None or image.shape[-1] == size:
        return as_bytes(torch.from_numpy(image)[None])[0]
    from skimage.transform import resize

    reduced = resize(np.moveaxis(image, 0, -1), (size, size), order=1, anti_aliasing=True)
    return (reduced.clip(0, 1) * 255).astype(np.uint8)


def _scaled(ctx: StageContext, targets: LowLevelTargets, tokens: Tensor) -> Tensor:
    """Bring predicted low-level tokens to the scale of the true ones, as the config says."""
    dip = ctx.config["dip"]
    if dip["calibrate"]:
        found = load_file(ctx.inputs["lowlevel"] / "calibration.safetensors")
        sizes = targets.tokens.layer_sizes
        tokens = calibrate(tokens, sizes, [found[str(k)] for k in range(len(sizes))])
    return tokens * dip["gain"]


def _invert(
    ctx: StageContext, network: FeatureNetwork, targets: LowLevelTargets, tokens: Tensor, seeds: list[int], bar: Bar
) -> Tensor:
    """Turn low-level tokens into images (Sec. 3.2, App. D.2)."""
    low, dip = ctx.config["lowlevel"], ctx.config["dip"]

    def features(images: Tensor) -> list[Tensor]:
        maps = network.features(images, low["layers"])
        return targets.standardised([maps[layer] for layer in low["layers"]])

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
        batch=len(tokens),
        progress=lambda losses: bar.advance(len(losses), f"loss {float(losses.mean()):.3f}"),
    )


def as_shown(images: np.ndarray, size: int | None) -> np.ndarray:
    """Return seen images (N x S x S x 3 uint8) in the size of the reconstructions; None keeps theirs."""
    return images if size is None else prepare_images(images, size)


def save_images(folder: Path, names: Sequence[str], images: np.ndarray) -> None:
    """Write images (N x H x W x 3 uint8) as PNG."""
    folder.mkdir(exist_ok=True)
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(folder / name, compress_level=6)


def read_images(folder: Path, names: Sequence[str]) -> np.ndarray:
    """Return the named PNGs: N x H x W x 3 uint8."""
    return np.stack([np.asarray(Image.open(folder / name).convert("RGB")) for name in names])
