"""Diffusion conditioned on image tokens: schedule, loss and sampler of SDXL-unCLIP (Brain-IT, Sec. D.3; MindEye2).

Everything here works on a UNet and an autoencoder with the calling conventions of diffusers' `UNet2DConditionModel` and
`AutoencoderKL`, handed in by the caller. Latents follow the "variance exploding" convention: z + sigma * noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class UNet(Protocol):
    """What is called of a diffusers `UNet2DConditionModel`: predicts the noise in `sample`."""

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        *,
        return_dict: bool,
    ) -> Any:
        """With `return_dict=False`, a tuple whose first element has the shape of `sample`."""


class Autoencoder(Protocol):
    """What is used of a diffusers `AutoencoderKL`."""

    @property
    def config(self) -> Any:
        """With `scaling_factor`, `latent_channels` and `block_out_channels`."""

    def encode(self, x: Tensor) -> Any:
        """Images in [-1, 1] to an object whose `latent_dist` is the posterior."""

    def decode(self, z: Tensor) -> Any:
        """Latents to an object whose `sample` is an image in [-1, 1]."""


@dataclass(frozen=True)
class NoiseSchedule:
    """Stable Diffusion's "scaled linear" noise levels: square roots of beta are equally spaced.

    Attributes:
        levels: number of noise levels that the UNet was trained on.
        beta_start: variance of the noise added at the first level.
        beta_end: variance of the noise added at the last level.
    """

    levels: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """Share of the signal's variance left at every level: (levels,) float64, falling."""
        betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.levels, dtype=torch.float64).square()
        return (1 - betas).cumprod(0)

    @cached_property
    def sigmas(self) -> Tensor:
        """Noise per unit of signal at every level: (levels,) float32, rising."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().float()

    def sgm_timesteps(self, steps: int) -> Tensor:
        """The level at every step of a sampler, as the sgm code base spaces them: int((levels - 1) * (1 - i / steps)).

        Returns:
            (steps,) long, falling from levels - 1. No built-in spacing of diffusers gives the same grid.

        Raises:
            ValueError: if `steps` is not between 1 and `levels` - 1.
        """
        if not 1 <= steps < self.levels:
            raise ValueError(f"steps={steps}: expected between 1 and {self.levels - 1} sampling steps")
        return torch.tensor([(self.levels - 1) * (steps - i) // steps for i in range(steps)])


def image_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator an image: what is drawn for an image depends neither on its batch nor on the device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def image_noise(shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device) -> Tensor:
    """Standard normal noise (N, *shape), for every image from its own generator."""
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators]).to(device)


def offset_noise(noise: Tensor, offsets: Tensor, level: float) -> Tensor:
    """Shift noise (N, C, H, W) by level * offsets, with offsets (N, C, 1, 1) or (N, 1, 1, 1) standard normal.

    Plain noise hardly changes the mean of a picture; with an offset the model learns to set its overall brightness.
    """
    return noise + level * offsets


def predict_noise(
    unet: UNet, z: Tensor, timesteps: Tensor, tokens: Tensor, *, schedule: NoiseSchedule, vector: Tensor | None = None
) -> Tensor:
    """The noise that the UNet sees in noisy latents (EDM form: c_skip 1, c_out -sigma, c_in 1 / sqrt(sigma² + 1)).

    The denoised latents are z - sigma * result.

    Args:
        unet: predicts noise.
        z: (B, C, H, W) latents plus sigma times noise.
        timesteps: (B,) noise levels.
        tokens: (B, T, D) conditioning tokens.
        schedule: what sigma a level has.
        vector: (V,) or (B, V) conditioning vector, see `size_vector`; None for a UNet without one.
    """
    sigma = schedule.sigmas.to(z.device)[timesteps.to(z.device)].view(-1, 1, 1, 1)
    labels = None if vector is None else vector.to(z).expand(len(z), -1)
    scaled = z / (sigma.square() + 1).sqrt()
    return unet(scaled, timesteps.to(z.device), tokens, class_labels=labels, return_dict=False)[0]


def diffusion_loss(
    unet: UNet,
    z: Tensor,
    tokens: Tensor,
    generator: torch.Generator,
    *,
    schedule: NoiseSchedule,
    offset: float = 0.04,
    vector: Tensor | None = None,
) -> Tensor:
    """The loss of the joint training of BIT and UNet (Brain-IT, Sec. 3.2; details from the official code).

    Noise levels are uniform, the noise has an offset per image and channel, and the squared error of the denoised
    latents is weighted by sigma ** -2: that is the mean squared error of the predicted noise.

    Args:
        unet: predicts noise; gradients reach its weights, and through `tokens` the model that made them.
        z: (B, C, H, W) clean latents.
        tokens: (B, T, D) conditioning tokens.
        generator: source of levels and noise; they are drawn on its device.
        schedule: noise levels.
        offset: standard deviation of the offset, see `offset_noise`.
        vector: (V,) or (B, V) conditioning vector.

    Returns:
        A scalar, float32.
    """
    device = generator.device
    timesteps = torch.randint(schedule.levels, (len(z),), generator=generator, device=device).to(z.device)
    noise = torch.randn(z.shape, generator=generator, device=device)
    offsets = torch.randn(*z.shape[:2], 1, 1, generator=generator, device=device)
    noise = offset_noise(noise, offsets, offset).to(z.device)
    sigma = schedule.sigmas.to(z.device)[timesteps].view(-1, 1, 1, 1)
    predicted = predict_noise(unet, z + sigma * noise, timesteps, tokens, schedule=schedule, vector=vector)
    return F.mse_loss(predicted.float(), noise)


@torch.no_grad()
def euler_sample(
    unet: UNet,
    z: Tensor,
    timesteps: Tensor,
    tokens: Tensor,
    *,
    schedule: NoiseSchedule,
    guidance: float = 5.0,
    unconditional: Tensor | None = None,
    vector: Tensor | None = None,
    unconditional_vector: Tensor | None = None,
) -> Tensor:
    """Denoise latents with Euler's method and classifier-free guidance (Brain-IT, Sec. D.3).

    Args:
        unet: predicts noise.
        z: (B, C, H, W) latents plus noise of the first level: clean + sigma * noise.
        timesteps: (S,) falling noise levels, e.g. `schedule.sgm_timesteps(38)[14:]`; after the last comes sigma 0.
        tokens: (B, T, D) conditioning tokens.
        schedule: what sigma a level has.
        guidance: scale of the guidance; 1 is plain conditional sampling and runs the UNet once a step.
        unconditional: (B, T, D) tokens of the unconditional branch: the official code takes Gaussian noise.
        vector: (V,) or (B, V) conditioning vector.
        unconditional_vector: (V,) or (B, V) for the unconditional branch; `vector` by default.

    Returns:
        (B, C, H, W) clean latents.

    Raises:
        ValueError: if `guidance` is not 1 and there are no unconditional tokens of the tokens' shape.
    """
    guided = guidance != 1
    if guided and (unconditional is None or unconditional.shape != tokens.shape):
        raise ValueError(f"guidance={guidance} needs unconditional tokens of shape {tuple(tokens.shape)}")
    context = torch.cat([unconditional, tokens]) if guided and unconditional is not None else tokens
    branches = 2 if guided else 1
    if vector is not None:
        sides = [vector if unconditional_vector is None else unconditional_vector, vector][-branches:]
        vector = torch.cat([side.expand(len(z), -1) for side in sides])
    sigmas = [*schedule.sigmas[timesteps].tolist(), 0.0]
    for timestep, sigma, following in zip(timesteps.tolist(), sigmas, sigmas[1:], strict=False):
        level = torch.full((branches * len(z),), timestep, device=z.device)
        noise = predict_noise(unet, z.repeat(branches, 1, 1, 1), level, context, schedule=schedule, vector=vector)
        if guided:
            without, given = noise.chunk(2)
            noise = without + guidance * (given - without)
        z = z + (following - sigma) * noise
    return z


def size_vector(height: int, width: int, top: int = 0, left: int = 0, code: int = 256) -> Tensor:
    """SDXL's code of an image's original size and crop, in pixels: four sinusoidal codes one after the other.

    Brain-IT gives the UNet (256, 256, 0, 0) in training and inference (official code).

    Returns:
        (4 * code,) float32: 1024 numbers for SDXL-unCLIP. Each code is cosines, then sines.
    """
    frequencies = torch.exp(-math.log(10000) * torch.arange(code // 2, dtype=torch.float32) / (code // 2))
    angles = torch.tensor([height, width, top, left], dtype=torch.float32)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).flatten()


def encode(
    vae: Autoencoder, images: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] to scaled latents (N, C, h, w), always in the autoencoder's own precision.

    Args:
        vae: the autoencoder.
        images: what to encode.
        generator: draws from the posterior, as the official code does; one for the batch or one an image. None takes
            the posterior's mode.
    """
    with torch.autocast(images.device.type, enabled=False):  # SDXL's autoencoder overflows in half precision
        posterior = vae.encode(images * 2 - 1).latent_dist
        if generator is None:
            latents = posterior.mode()
        else:
            latents = posterior.sample(generator if isinstance(generator, torch.Generator) else list(generator))
    return latents * vae.config.scaling_factor


def decode(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Scaled latents (N, C, h, w) to images (N, 3, H, W) in [0, 1], always in the autoencoder's own precision."""
    with torch.autocast(latents.device.type, enabled=False):
        images = vae.decode(latents / vae.config.scaling_factor).sample
    return ((images + 1) / 2).clamp(0, 1)


def shrink_contrast(images: Tensor, factor: float) -> Tensor:
    """Pull values in [0, 1] towards mid-grey: (s - 0.5) * factor + 0.5 (official code)."""
    return (images - 0.5) * factor + 0.5
