"""From predicted tokens to images: the semantic branch alone, and both branches together (Brain-IT, Sec. 3.2 and D.3).

An image depends on its tokens, its low-level image and its seed, not on what else is in the batch (up to the rounding
of floating-point sums).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from methods.brain_it.unclip import (
    Autoencoder,
    NoiseSchedule,
    UNet,
    decode,
    encode,
    euler_sample,
    image_generators,
    image_noise,
    offset_noise,
    shrink_contrast,
)

Progress = Callable[[int], None]
"""Called after every batch with the number of images it finished."""


@dataclass(frozen=True)
class GenerationSettings:
    """How to sample images; the defaults are the paper's, or the official code's where the paper is silent.

    Attributes:
        steps: sampling steps from pure noise to an image (Sec. D.3).
        start_step: step at which the low-level image enters; later keeps more of it (Sec. D.3).
        guidance: scale of classifier-free guidance.
        offset_noise: standard deviation of the offset of an image's starting noise.
        contrast: factor by which the contrast of the result is shrunk; 1 leaves it.
    """

    steps: int = 38
    start_step: int = 14
    guidance: float = 5.0
    offset_noise: float = 0.04
    contrast: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.start_step < self.steps:
            raise ValueError(f"start_step={self.start_step}: expected between 0 and steps - 1 = {self.steps - 1}")


@dataclass(frozen=True, eq=False)
class Generator:
    """A latent diffusion model that is conditioned on image tokens.

    Attributes:
        vae: between images and latents.
        unet: predicts the noise in latents, given tokens.
        image_size: height and width of the images, in pixels.
        schedule: the noise levels that `unet` was trained on.
        vector: (V,) conditioning vector for every image, e.g. `size_vector(256, 256)`; None for a UNet without one.
    """

    vae: Autoencoder
    unet: UNet
    image_size: int = 256
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    vector: Tensor | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image's latents: the autoencoder halves the image between its blocks."""
        size = self.image_size // 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.latent_channels, size, size


def semantic_images(
    generator: Generator,
    tokens: Tensor,
    settings: GenerationSettings,
    seeds: Sequence[int],
    *,
    batch: int = 16,
    progress: Progress | None = None,
) -> Tensor:
    """Images from semantic tokens alone, starting at pure noise.

    Args:
        generator: the diffusion model; it must be in evaluation mode.
        tokens: (N, T, D) predicted tokens, on the device to work on.
        settings: how to sample; `start_step` plays no part.
        seeds: one integer an image.
        batch: images sampled together.
        progress: called after every batch.

    Returns:
        (N, 3, image_size, image_size) in [0, 1].

    Raises:
        ValueError: if there is not one seed an image.
    """
    return _generate(generator, tokens, None, settings, seeds, batch, progress)


def combined_images(
    generator: Generator,
    tokens: Tensor,
    low_level_images: Tensor,
    settings: GenerationSettings,
    seeds: Sequence[int],
    *,
    batch: int = 16,
    progress: Progress | None = None,
) -> Tensor:
    """Images from both branches: the low-level image, partly noised, refined under semantic guidance.

    Args:
        generator: the diffusion model; it must be in evaluation mode.
        tokens: (N, T, D) predicted tokens, on the device to work on.
        low_level_images: (N, 3, h, w) in [0, 1]; resized bilinearly to the generator's size.
        settings: how to sample; the noise added is that of `start_step`.
        seeds: one integer an image.
        batch: images sampled together.
        progress: called after every batch.

    Returns:
        (N, 3, image_size, image_size) in [0, 1].

    Raises:
        ValueError: if there are not one low-level image and one seed for every image.
    """
    if len(low_level_images) != len(tokens):
        raise ValueError(f"{len(low_level_images)} low-level images but tokens of {len(tokens)} images")
    return _generate(generator, tokens, low_level_images, settings, seeds, batch, progress)


@torch.no_grad()
def _generate(
    generator: Generator,
    tokens: Tensor,
    low_level_images: Tensor | None,
    settings: GenerationSettings,
    seeds: Sequence[int],
    batch: int,
    progress: Progress | None,
) -> Tensor:
    if len(seeds) != len(tokens) or not len(seeds):
        raise ValueError(
            f"{len(seeds)} seeds but tokens of {len(tokens)} images: expected one seed an image, and an image"
        )
    first_step = 0 if low_level_images is None else settings.start_step
    timesteps = generator.schedule.sgm_timesteps(settings.steps)[first_step:]
    start_sigma = float(generator.schedule.sigmas[timesteps[0]])
    images = []
    for first in range(0, len(tokens), batch):
        some = slice(first, first + batch)
        context, device = tokens[some], tokens.device
        random = image_generators(seeds[some])
        if low_level_images is None:
            # sgm starts from a random latent plus noise, so that its variance is that of a noised image.
            clean = image_noise(generator.latent_shape, random, device)
        else:
            size = (generator.image_size, generator.image_size)
            low_level = F.interpolate(low_level_images[some].to(device), size, mode="bilinear", align_corners=False)
            clean = encode(generator.vae, low_level, random)
        noise = image_noise(generator.latent_shape, random, device)
        noise = offset_noise(noise, image_noise((1, 1, 1), random, device), settings.offset_noise)
        latents = euler_sample(
            generator.unet,
            clean + start_sigma * noise,
            timesteps,
            context,
            schedule=generator.schedule,
            guidance=settings.guidance,
            unconditional=image_noise(context.shape[1:], random, device).to(context.dtype),
            vector=generator.vector,
        )
        images.append(shrink_contrast(decode(generator.vae, latents), settings.contrast))
        if progress is not None:
            progress(len(context))
    return torch.cat(images)
