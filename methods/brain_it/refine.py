"""Refinement of reconstructions by an image-to-image pass of SDXL (Brain-IT, App. D.3; numbers from the official code).

MindEye2's "enhanced" step without its caption: a reconstruction is enlarged, partly noised, and denoised for the empty
prompt, away from a list of things that pictures should not show.
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
    size_vector,
)


@dataclass(frozen=True)
class RefinementSettings:
    """How to refine; the defaults are the official code's.

    Attributes:
        size: height and width at which SDXL works, in pixels.
        steps: sampling steps from pure noise to an image.
        start_step: step at which the reconstruction enters: 17 of 25 leaves eight steps from sigma 0.889.
        guidance: scale of classifier-free guidance against the negative prompt.
    """

    size: int = 768
    steps: int = 25
    start_step: int = 17
    guidance: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.start_step < self.steps:
            raise ValueError(f"start_step={self.start_step}: expected between 0 and steps - 1 = {self.steps - 1}")


@dataclass(frozen=True, eq=False)
class Prompt:
    """A text as SDXL sees it.

    Attributes:
        tokens: (77, 2048) hidden states of its two text towers, side by side.
        pooled: (1280,) embedding of the whole text.
    """

    tokens: Tensor
    pooled: Tensor

    def vector(self, size: int) -> Tensor:
        """(2816,): the pooled text, then the codes of original size, crop (0, 0) and target size 1024."""
        return torch.cat([self.pooled, size_vector(size, size).to(self.pooled), _target(1024).to(self.pooled)])


def _target(size: int) -> Tensor:
    return size_vector(size, size)[: 2 * 256]


@dataclass(frozen=True, eq=False)
class Refiner:
    """SDXL with the two prompts that every image is refined under.

    Attributes:
        vae: SDXL's autoencoder.
        unet: SDXL's UNet, with its vector of 2816 numbers as class labels.
        prompt: what to denoise towards: the empty text.
        negative: what to denoise away from.
        schedule: the noise levels that `unet` was trained on.
    """

    vae: Autoencoder
    unet: UNet
    prompt: Prompt
    negative: Prompt
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)


@torch.no_grad()
def refine(
    refiner: Refiner,
    images: Tensor,
    settings: RefinementSettings,
    seeds: Sequence[int],
    *,
    batch: int = 1,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Refine reconstructions.

    Args:
        refiner: SDXL and the prompts, on `device` and in evaluation mode.
        images: (N, 3, H, W) in [0, 1].
        settings: how.
        seeds: one integer an image.
        batch: images refined together.
        device: where to work.
        progress: called after every batch with the number of images it finished.

    Returns:
        (N, 3, size, size) in [0, 1], on the CPU.

    Raises:
        ValueError: if there is not one seed an image.
    """
    if len(seeds) != len(images):
        raise ValueError(f"{len(seeds)} seeds but {len(images)} images: expected one seed an image")
    timesteps = refiner.schedule.sgm_timesteps(settings.steps)[settings.start_step :]
    sigma = float(refiner.schedule.sigmas[timesteps[0]])
    size = (settings.size, settings.size)
    refined = []
    for first in range(0, len(images), batch):
        some = slice(first, first + batch)
        # torchvision 0.16's Resize of a tensor: no antialiasing, and enlarging needs none.
        enlarged = F.interpolate(images[some].to(device), size, mode="bilinear", align_corners=False)
        random = image_generators(seeds[some])
        z = encode(refiner.vae, enlarged, random)
        noise = image_noise(z.shape[1:], random, z.device)
        count = len(enlarged)
        latents = euler_sample(
            refiner.unet,
            z + sigma * noise,
            timesteps,
            refiner.prompt.tokens.to(z).expand(count, -1, -1),
            schedule=refiner.schedule,
            guidance=settings.guidance,
            unconditional=refiner.negative.tokens.to(z).expand(count, -1, -1),
            vector=refiner.prompt.vector(settings.size).to(z),
            unconditional_vector=refiner.negative.vector(settings.size).to(z),
        )
        refined.append(decode(refiner.vae, latents).cpu())
        if progress is not None:
            progress(count)
    return torch.cat(refined)
