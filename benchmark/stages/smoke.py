"""Stages that stand in where a smoke run has no data, or a machine not enough memory."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmark import networks
from benchmark.context import StageContext
from benchmark.stages.bit import build_bit, voxel_layout
from benchmark.stages.features import read_shapes
from benchmark.stages.prepare import Prepared
from methods.brain_it.unclip import diffusion_loss


def run_data(ctx: StageContext) -> dict[str, Any]:
    """Write random images and recordings in the true shapes, as stage ``prepare`` writes NSD's.

    Each subject sees ``unique`` images of its own, a quarter of them for validation, and the ``shared`` ones.
    """
    config = ctx.config
    rng = np.random.default_rng(config["seed"])
    size, voxels = config["image_size"], config["voxels"]
    shared, unique, subjects = config["shared"], config["unique"], len(voxels)

    def images(name: str, count: int) -> None:
        coarse = rng.integers(0, 256, (count, 16, 16, 3), np.uint8)
        np.save(ctx.out / f"{name}.npy", coarse.repeat(size // 16, 1).repeat(size // 16, 2))

    images("images", shared + subjects * unique)
    images("external", config["external"])
    train: list[int] = []
    validation: list[int] = []
    for k, count in enumerate(voxels):
        own = shared + k * unique + np.arange(unique)
        ids = np.concatenate([np.arange(shared), own])
        np.save(ctx.out / f"ids_subj{k + 1}.npy", ids)
        np.save(ctx.out / f"betas_subj{k + 1}.npy", rng.standard_normal((len(ids), count), np.float32))
        validation += own[: max(1, unique // 4)].tolist()
        train += own[max(1, unique // 4) :].tolist()
    meta = {
        "image_size": size,
        "subjects": list(range(1, subjects + 1)),
        "n_voxels": list(voxels),
        "train_ids": train,
        "validation_ids": validation,
        "shared_ids": list(range(shared)),
    }
    (ctx.out / "meta.json").write_text(json.dumps(meta) + "\n")
    return {"subjects": subjects, "voxels": sum(voxels), "images": shared + subjects * unique}


def run_joint(ctx: StageContext) -> dict[str, Any]:
    """Check joint training where its weights, gradients and optimiser state do not fit into memory.

    BIT and denoiser are built on the ``meta`` device and the loss is taken through both, forward and backward: every
    shape has to fit and every parameter gets a gradient of its shape, but nothing is computed. The outputs are those of
    ``benchmark.stages.bit:run_joint`` before its first step.
    """
    config = dict(ctx.config)
    data = Prepared(ctx.inputs["data"])
    tokens, width = read_shapes(ctx.inputs["targets"])["semantic"]
    generator = networks.generator(config["generator"])
    assert isinstance(generator.unet, nn.Module)
    save_file({k: v.contiguous() for k, v in generator.unet.state_dict().items()}, ctx.out / "unet.safetensors")
    trained = load_file(ctx.inputs["semantic"] / "bit.safetensors")
    save_file(trained, ctx.out / "bit.safetensors")
    unet = generator.unet.requires_grad_(True).to("meta")
    bit = build_bit(config["bit"], voxel_layout(data, ctx.inputs["clusters"]), tokens, width)
    expected = {name: value.shape for name, value in bit.state_dict().items()}
    if {name: value.shape for name, value in trained.items()} != expected:
        raise ValueError("the semantic stage's BIT has other tensors than this stage's")
    bit.train().requires_grad_(True)
    condition = torch.empty(config["batch"], tokens, width, device="meta", requires_grad=True)
    loss = diffusion_loss(
        unet,
        torch.empty(config["batch"], *generator.latent_shape, device="meta"),
        condition,
        torch.Generator(),
        schedule=generator.schedule,
        offset=config["offset_noise"],
        vector=generator.vector,
    )
    loss.backward()
    without = [name for name, p in unet.named_parameters() if p.grad is None or p.grad.shape != p.shape]
    if without or condition.grad is None or condition.grad.shape != condition.shape:
        raise ValueError(f"no gradient for {', '.join(without[:3]) or 'the tokens'}")
    parameters = sum(p.numel() for module in (bit, unet) for p in module.parameters())
    return {"parameters": parameters, "checked": "on the meta device: shapes and gradients, no numbers"}
