"""Images from tokens with a tiny, randomly initialised diffusion model."""

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch.nn import functional as F

from methods.brain_it.generate import GenerationSettings, Generator, combined_images, semantic_images
from methods.brain_it.unclip import decode, encode, euler_sample, size_vector

QUICK = GenerationSettings(steps=4, start_step=2, guidance=2.0, contrast=1.0)


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
    )
    unet: Any = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=12,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=1024,
    )
    return Generator(vae.eval(), unet.eval(), image_size=16, vector=size_vector(16, 16))


def inputs(images: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and low-level images."""
    source = torch.Generator().manual_seed(1)
    low_level = F.interpolate(torch.rand(images, 3, 4, 4, generator=source), (16, 16), mode="bilinear")
    return torch.randn(images, 5, 12, generator=source), low_level


def test_the_defaults_are_the_papers() -> None:
    settings = GenerationSettings()
    assert (settings.steps, settings.start_step, settings.guidance) == (38, 14, 5.0)
    assert (settings.offset_noise, settings.contrast) == (0.04, 0.8)


def test_latents_are_as_large_as_the_autoencoder_makes_them(generator: Generator) -> None:
    assert generator.latent_shape == tuple(encode(generator.vae, torch.rand(1, 3, 16, 16)).shape[1:]) == (4, 8, 8)


def test_both_ways_give_images(generator: Generator) -> None:
    tokens, low_level = inputs()
    finished: list[int] = []
    for images in (
        semantic_images(generator, tokens, QUICK, [0, 1, 2], batch=2, progress=finished.append),
        combined_images(generator, tokens, low_level, QUICK, [0, 1, 2]),
    ):
        assert images.shape == (3, 3, 16, 16) and images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 1
        assert not images.requires_grad
    assert finished == [2, 1]


def test_an_image_does_not_depend_on_its_batch(generator: Generator) -> None:
    tokens, low_level = inputs()
    seeds = [5, 6, 7]
    semantic = semantic_images(generator, tokens, QUICK, seeds)
    combined = combined_images(generator, tokens, low_level, QUICK, seeds)
    close: dict[str, Any] = {"atol": 1e-4, "rtol": 0.0}
    torch.testing.assert_close(semantic_images(generator, tokens, QUICK, seeds, batch=1), semantic, **close)
    torch.testing.assert_close(semantic_images(generator, tokens[2:], QUICK, [7]), semantic[2:], **close)
    torch.testing.assert_close(combined_images(generator, tokens, low_level, QUICK, seeds, batch=2), combined, **close)
    backwards = combined_images(generator, tokens.flip(0), low_level.flip(0), QUICK, seeds[::-1])
    torch.testing.assert_close(backwards.flip(0), combined, **close)


def test_seeds_decide(generator: Generator) -> None:
    tokens, low_level = inputs(1)
    first = combined_images(generator, tokens, low_level, QUICK, [0])
    assert torch.equal(first, combined_images(generator, tokens, low_level, QUICK, [0]))
    assert not torch.allclose(first, combined_images(generator, tokens, low_level, QUICK, [1]), atol=1e-3)


def test_semantic_sampling_starts_at_pure_noise(generator: Generator) -> None:
    tokens, _ = inputs(1)
    images = semantic_images(generator, tokens, QUICK, [3])
    random = torch.Generator().manual_seed(3)
    clean = torch.randn(1, 4, 8, 8, generator=random)
    noise = torch.randn(1, 4, 8, 8, generator=random) + 0.04 * torch.randn(1, 1, 1, 1, generator=random)
    unconditional = torch.randn(1, 5, 12, generator=random)
    latents = euler_sample(
        generator.unet,
        clean + 14.6146 * noise,  # the noisiest level of Stable Diffusion
        torch.tensor([999, 749, 499, 249]),
        tokens,
        schedule=generator.schedule,
        guidance=2.0,
        unconditional=unconditional,
        vector=generator.vector,
    )
    with torch.no_grad():
        torch.testing.assert_close(images, decode(generator.vae, latents), atol=1e-4, rtol=0)


@torch.no_grad()
def test_starting_at_the_last_step_returns_the_low_level_image(generator: Generator) -> None:
    tokens, low_level = inputs()
    settings = GenerationSettings(steps=999, start_step=998, guidance=1.0, contrast=1.0)
    images = combined_images(generator, tokens, low_level, settings, [0, 1, 2])
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1, 2)]
    reconstruction = decode(generator.vae, encode(generator.vae, low_level, generators))
    assert (images - reconstruction).abs().mean() < 0.02
    early = combined_images(generator, tokens, low_level, QUICK, [0, 1, 2])
    assert (early - reconstruction).abs().mean() > 0.05


def test_low_level_images_of_another_size_are_resized(generator: Generator) -> None:
    tokens, low_level = inputs(1)
    large = low_level.repeat_interleave(2, 2).repeat_interleave(2, 3)
    small = F.interpolate(large, (16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(
        combined_images(generator, tokens, large, QUICK, [0]), combined_images(generator, tokens, small, QUICK, [0])
    )


def test_contrast_is_shrunk_last(generator: Generator) -> None:
    tokens, _ = inputs(1)
    flat = GenerationSettings(steps=4, start_step=2, guidance=2.0, contrast=0.8)
    images = semantic_images(generator, tokens, QUICK, [0])
    torch.testing.assert_close(semantic_images(generator, tokens, flat, [0]), (images - 0.5) * 0.8 + 0.5)


def test_bad_input_is_refused(generator: Generator) -> None:
    tokens, low_level = inputs()
    with pytest.raises(ValueError, match="2 seeds but tokens of 3 images"):
        semantic_images(generator, tokens, QUICK, [0, 1])
    with pytest.raises(ValueError, match="2 low-level images but tokens of 3"):
        combined_images(generator, tokens, low_level[:2], QUICK, [0, 1, 2])
    with pytest.raises(ValueError, match="start_step=4"):
        GenerationSettings(steps=4, start_step=4)
