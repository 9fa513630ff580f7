"""Entry ``generate``: images from predicted tokens by unCLIP, from noise and from low-level images (Sec. D.3).

The reference samples one image at a time, with two calls of the UNet a step for classifier-free guidance. Weights of
the large generator are random; on a CPU it is a small one of the same layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmark import config
from benchmark.networks import unclip
from benchmark.networks.demo import demo_generator
from benchmark.networks.seeded import seeded
from benchmark.perf.entries import Floor, Job, Part, Results
from benchmark.stages.reconstruct import autocast
from methods.brain_it.generate import GenerationSettings, Generator, combined_images, semantic_images
from methods.brain_it.unclip import size_vector

_SMALL_UNET: Mapping[str, Any] = {
    **unclip.UNET,
    "block_out_channels": (32, 64, 128),
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 2, 4],
}
_SMALL_VAE: Mapping[str, Any] = {**unclip.VAE, "block_out_channels": (32, 32, 64, 64), "layers_per_block": 1}


@dataclass(frozen=True)
class _Inputs:
    generator: Generator
    tokens: Tensor  # images x tokens x width
    low_level: Tensor  # images x 3 x side x side
    settings: GenerationSettings
    seeds: list[int]
    batch: int
    precision: str


def _inputs(
    generator: Generator, shape: tuple[int, int], preset: config.GenerationConfig, images: int, side: int, job: Job
) -> _Inputs:
    source = torch.Generator().manual_seed(0)
    coarse = torch.rand(images, 3, 6, 6, generator=source)
    names = ("steps", "start_step", "guidance", "offset_noise", "contrast")
    settings = GenerationSettings(**{name: getattr(preset, name) for name in names})
    return _Inputs(
        generator,
        torch.randn(images, *shape, generator=source).to(job.device),
        F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1),
        replace(settings, steps=3, start_step=1) if job.quick else settings,
        list(range(images)),
        preset.batch,
        preset.precision if job.device == "cuda" else "fp32",
    )


def _placed(generator: Generator, job: Job) -> Generator:
    for network in (generator.vae, generator.unet):
        cast("nn.Module", network).to(job.device).eval().requires_grad_(False)
    vector = generator.vector
    return replace(generator, vector=None if vector is None else vector.to(job.device))


def _demo(job: Job) -> _Inputs:
    """The demo's generator and settings."""
    generator = _placed(demo_generator("demo"), job)
    return _inputs(generator, (16, 320), config.demo().generation, 2 if job.quick else 48, 64, job)


def _paper(job: Job) -> _Inputs:
    """SDXL-unCLIP with the paper's settings; on a CPU a small one, which sees the same latents and tokens."""
    large = job.device == "cuda" and not job.quick
    side = 32 if job.quick else unclip.IMAGE_SIZE
    unet_config = unclip.UNET if large else {**_SMALL_UNET, "sample_size": side // 8}
    unet, vae = unclip.build_unet(unet_config), unclip.build_vae(unclip.VAE if large else _SMALL_VAE)
    seeded(unet, "unet", 0)
    seeded(vae, "vae", 0)
    generator = Generator(vae, unet, image_size=side, vector=size_vector(side, side))  # type: ignore[arg-type]
    images = 2 if job.quick else 32 if large else 8
    tokens = (4 if job.quick else 256, int(unet_config["cross_attention_dim"]))
    return _inputs(_placed(generator, job), tokens, config.paper().generation, images, side, job)


# --- one image at a time ----------------------------------------------------------------------------------------------


def plain_image(inputs: _Inputs, place: int, low_level: Tensor | None) -> Tensor:
    """Sample one image (1, 3, H, W): Euler's method, two calls of the UNet a step."""
    generator, settings = inputs.generator, inputs.settings
    tokens, vector = inputs.tokens[place : place + 1], generator.vector
    device, random = tokens.device, torch.Generator().manual_seed(inputs.seeds[place])
    vae, scale = cast("Any", generator.vae), generator.vae.config.scaling_factor

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=random).to(device)

    def noise_seen(z: Tensor, sigma: float, level: int, context: Tensor) -> Tensor:
        levels = torch.full((1,), level, device=device)
        labels = None if vector is None else vector[None]
        found: Tensor = generator.unet(
            z / (sigma**2 + 1) ** 0.5, levels, context, class_labels=labels, return_dict=False
        )[0]
        return found

    timesteps = generator.schedule.sgm_timesteps(settings.steps)[0 if low_level is None else settings.start_step :]
    sigmas = [*generator.schedule.sigmas[timesteps].tolist(), 0.0]
    if low_level is None:
        z = normal(*generator.latent_shape)
    else:
        with torch.autocast(device.type, enabled=False):
            z = vae.encode(low_level.to(device) * 2 - 1).latent_dist.sample(random) * scale
    noise = normal(*generator.latent_shape)
    z = z + sigmas[0] * (noise + settings.offset_noise * normal(1, 1, 1))
    unconditional = normal(*tokens.shape[1:])
    for level, sigma, following in zip(timesteps.tolist(), sigmas, sigmas[1:], strict=False):
        without = noise_seen(z, sigma, level, unconditional)
        given = noise_seen(z, sigma, level, tokens)
        z = z + (following - sigma) * (without + settings.guidance * (given - without))
    with torch.autocast(device.type, enabled=False):
        image = ((vae.decode(z / scale).sample + 1) / 2).clamp(0, 1)
    return cast("Tensor", (image - 0.5) * settings.contrast + 0.5)


@torch.no_grad()
def reference(inputs: _Inputs, job: Job, name: str) -> Results:
    """All images, one after the other."""
    places = range(len(inputs.tokens))
    with autocast(job.device, inputs.precision):
        semantic = [plain_image(inputs, place, None) for place in places]
        combined = [plain_image(inputs, place, inputs.low_level[place : place + 1]) for place in places]
    return _results(torch.cat(semantic), torch.cat(combined), name)


# --- ours -------------------------------------------------------------------------------------------------------------


def ours(inputs: _Inputs, job: Job, name: str) -> Results:
    """The same by ``methods.brain_it.generate``, in the preset's batches and precision."""
    some = (inputs.settings, inputs.seeds)
    with autocast(job.device, inputs.precision):
        semantic = semantic_images(inputs.generator, inputs.tokens, *some, batch=inputs.batch)
        combined = combined_images(inputs.generator, inputs.tokens, inputs.low_level, *some, batch=inputs.batch)
    return _results(semantic, combined, name)


def _results(semantic: Tensor, combined: Tensor, name: str) -> Results:
    return {f"{name}, semantic": semantic.cpu().numpy(), f"{name}, combined": combined.cpu().numpy()}


# --- the least that either can do -------------------------------------------------------------------------------------


def _floor(job: Job, name: str) -> Floor:
    """Operations of one call of each network, as torch counts them, times the calls; weights read once a call."""
    inputs = _PREPARE[name](job)
    generator, steps = inputs.generator, inputs.settings.steps
    unet, vae = cast("nn.Module", generator.unet), cast("Any", generator.vae)
    device, vector = inputs.tokens.device, generator.vector

    def counted(call: Any) -> float:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        return float(counter.get_total_flops())

    z = torch.zeros(1, *generator.latent_shape, device=device)
    labels = None if vector is None else vector[None]
    level = torch.zeros(1, dtype=torch.long, device=device)
    denoise = counted(lambda: unet(z, level, inputs.tokens[:1], class_labels=labels, return_dict=False))
    encode = counted(lambda: vae.encode(inputs.low_level[:1].to(device)))
    decode = counted(lambda: vae.decode(z))
    calls = 2 * steps - inputs.settings.start_step  # of both ways, each for two contexts
    images = len(inputs.tokens)
    weights = sum(p.numel() * p.element_size() for p in unet.parameters())
    batches = -(-images // inputs.batch)
    return Floor(images * (2 * calls * denoise + encode + 2 * decode), nbytes=float(batches * calls * weights))


_PREPARE = {"demo": _demo, "SDXL-unCLIP's layout": _paper}

PARTS: tuple[Part, ...] = tuple(
    Part(name, prepare, partial(ours, name=name), partial(reference, name=name), partial(_floor, name=name))
    for name, prepare in _PREPARE.items()
)
# What a saved image can show; half precision and another batch round otherwise.
TOLERANCES: Mapping[str, float] = {f"{name}, {kind}": 1 / 255 for name in _PREPARE for kind in ("semantic", "combined")}
