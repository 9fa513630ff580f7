"""Refinement: SDXL's vectors and its eight steps, against a plain loop of the published procedure."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.brain_it.refine import Prompt, RefinementSettings, Refiner, refine
from methods.brain_it.unclip import NoiseSchedule


class Vae(nn.Module):
    """Stands in for an autoencoder: latents are 8 x 8 means of the pixels, one channel more."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=0.5, latent_channels=3, block_out_channels=(1, 1, 1, 1))

    def encode(self, x: Tensor) -> SimpleNamespace:
        mean = F.avg_pool2d(x, 8)
        return SimpleNamespace(
            latent_dist=SimpleNamespace(mode=lambda: mean, sample=lambda generators: mean + 0.0)  # no spread
        )

    def decode(self, z: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=F.interpolate(z, scale_factor=8.0))


class Unet(nn.Module):
    """Stands in for a UNet; its answer depends on everything that it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, Tensor]] = []

    def forward(
        self, z: Tensor, t: Tensor, tokens: Tensor, class_labels: Tensor, *, return_dict: bool
    ) -> tuple[Tensor]:
        self.seen.append((int(t[0]), class_labels))
        shift = tokens.mean((1, 2)) + class_labels.mean(1) + t / 1000
        return (z * 0.3 + shift[:, None, None, None],)


def prompt(seed: int) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    return Prompt(torch.randn(77, 2048, generator=generator), torch.randn(1280, generator=generator))


def timestep_code(value: float) -> Tensor:
    """Write down 256 numbers: cosines, then sines, of ``value`` at geometric frequencies."""
    frequencies = 10000.0 ** (-torch.arange(128) / 128)
    return torch.cat([(value * frequencies).cos(), (value * frequencies).sin()])


def test_the_vector_is_pooled_text_then_original_size_crop_and_target_size() -> None:
    text = prompt(0)
    vector = text.vector(768)
    assert vector.shape == (2816,)
    assert torch.equal(vector[:1280], text.pooled)
    codes = torch.cat([timestep_code(value) for value in (768, 768, 0, 0, 1024, 1024)])
    torch.testing.assert_close(vector[1280:], codes, atol=2e-4, rtol=0)


def test_eight_euler_steps_from_sigma_0_889() -> None:
    """Equal to the loop as the official code takes it: the last 9 of 25 + 1 sigmas, guidance 5, no offset noise."""
    unet, vae = Unet(), Vae()
    refiner = Refiner(vae, unet, prompt(1), prompt(2))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    settings = RefinementSettings(size=64)
    out = refine(refiner, images, settings, seeds=[5, 6], batch=2)
    assert out.shape == (2, 3, 64, 64)
    assert [t for t, _ in unet.seen] == [int(999 * (1 - i / 25)) for i in range(17, 25)]
    assert unet.seen[0][0] == 319

    schedule = NoiseSchedule()
    all_sigmas = [float(schedule.sigmas[int(999 * (1 - i / 25))]) for i in range(25)] + [0.0]
    sigmas = all_sigmas[-9:]
    assert sigmas[0] == pytest.approx(0.889, abs=5e-4)
    enlarged = F.interpolate(images, (64, 64), mode="bilinear", align_corners=False)
    for k, seed in enumerate((5, 6)):
        z = F.avg_pool2d(enlarged[k : k + 1] * 2 - 1, 8) * 0.5
        z = z + sigmas[0] * torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(seed))
        for step in range(8):
            t = int(999 * (1 - (17 + step) / 25))
            noises = []
            for text in (refiner.negative, refiner.prompt):
                labels = text.vector(64)[None]
                noises.append(
                    Unet()(
                        z / (sigmas[step] ** 2 + 1) ** 0.5,
                        torch.tensor([t]),
                        text.tokens[None],
                        labels,
                        return_dict=False,
                    )[0]
                )
            denoised = z - sigmas[step] * (noises[0] + 5 * (noises[1] - noises[0]))
            z = z + (z - denoised) / sigmas[step] * (sigmas[step + 1] - sigmas[step])
        expected = ((F.interpolate(z / 0.5, scale_factor=8.0) + 1) / 2).clamp(0, 1)
        torch.testing.assert_close(out[k : k + 1], expected, atol=1e-4, rtol=1e-4)


def test_an_image_does_not_depend_on_its_batch() -> None:
    refiner = Refiner(Vae(), Unet(), prompt(1), prompt(2))
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    together = refine(refiner, images, RefinementSettings(size=32), seeds=[1, 2, 3], batch=3)
    apart = refine(refiner, images, RefinementSettings(size=32), seeds=[1, 2, 3], batch=1)
    torch.testing.assert_close(together, apart)


def test_one_seed_an_image() -> None:
    with pytest.raises(ValueError, match="1 seeds but 2 images"):
        refine(Refiner(Vae(), Unet(), prompt(1), prompt(2)), torch.rand(2, 3, 16, 16), RefinementSettings(), [1])
