"""Noise schedule, loss and sampler, against diffusers' own."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.embeddings import Timesteps
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

from methods.brain_it.unclip import (
    NoiseSchedule,
    decode,
    diffusion_loss,
    encode,
    euler_sample,
    image_generators,
    image_noise,
    predict_noise,
    shrink_contrast,
    size_vector,
)

SCHEDULE = NoiseSchedule()


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
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
    ).eval()


@pytest.fixture(scope="module")
def vae() -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
    ).eval()


def tensors(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and tokens."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 4, 8, 8, generator=generator), torch.randn(batch, 5, 12, generator=generator)


def diffusers_scheduler(timesteps: torch.Tensor) -> EulerDiscreteScheduler:
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.set_timesteps(timesteps=timesteps.tolist())
    return scheduler


def test_the_paper_starts_at_level_630_with_24_steps_to_go() -> None:
    timesteps = SCHEDULE.sgm_timesteps(38)
    assert timesteps[0] == 999 and timesteps[14] == 630
    assert len(timesteps[14:]) == 24
    assert SCHEDULE.sigmas[630].item() == pytest.approx(2.548, abs=5e-4)
    assert SCHEDULE.alphas_cumprod[630].sqrt().item() == pytest.approx(0.365, abs=5e-4)


def test_the_official_yaml_would_start_at_level_719() -> None:
    timesteps = SCHEDULE.sgm_timesteps(50)[14:]
    assert timesteps[0] == 719 and len(timesteps) == 36
    assert SCHEDULE.sigmas[719].item() == pytest.approx(3.601, abs=5e-4)


@pytest.mark.parametrize("steps", [1, 2, 4, 20, 25, 38, 50, 333, 999])
def test_timesteps_are_those_of_sgm(steps: int) -> None:
    sgm = np.linspace(999, 0, steps, endpoint=False).astype(int)  # "legacy DDPM" discretisation
    assert SCHEDULE.sgm_timesteps(steps).tolist() == sgm.tolist()


@pytest.mark.parametrize("steps", [0, 1000])
def test_impossible_step_counts_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 999"):
        SCHEDULE.sgm_timesteps(steps)


def test_sigmas_are_those_of_diffusers() -> None:
    timesteps = SCHEDULE.sgm_timesteps(38)
    scheduler = diffusers_scheduler(timesteps)
    torch.testing.assert_close(SCHEDULE.sigmas[timesteps], scheduler.sigmas[:-1], atol=1e-5, rtol=0)


def test_sampling_equals_diffusers_scheduler(unet: Any) -> None:
    z, tokens = tensors()
    timesteps = SCHEDULE.sgm_timesteps(12)[4:]
    vector, nothing = size_vector(256, 256), torch.randn(tokens.shape, generator=torch.Generator().manual_seed(4))
    start = z * SCHEDULE.sigmas[timesteps[0]]
    mine = euler_sample(
        unet, start, timesteps, tokens, schedule=SCHEDULE, guidance=5.0, unconditional=nothing, vector=vector
    )

    scheduler = diffusers_scheduler(timesteps)
    latents = start
    labels = vector.expand(2, -1)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep)
            without = unet(scaled, timestep, nothing, class_labels=labels).sample
            given = unet(scaled, timestep, tokens, class_labels=labels).sample
            (latents, *_) = scheduler.step(without + 5.0 * (given - without), timestep, latents, return_dict=False)
    torch.testing.assert_close(mine, latents, atol=1e-4, rtol=1e-4)


def test_guidance_of_one_is_conditional_sampling(unet: Any) -> None:
    z, tokens = tensors()
    timesteps = SCHEDULE.sgm_timesteps(5)
    vector = size_vector(64, 64)
    mine = euler_sample(unet, z, timesteps, tokens, schedule=SCHEDULE, guidance=1.0, vector=vector)
    near = euler_sample(
        unet, z, timesteps, tokens, schedule=SCHEDULE, guidance=1 + 1e-9, unconditional=tokens * 3, vector=vector
    )
    torch.testing.assert_close(mine, near, atol=1e-5, rtol=1e-5)


def test_guidance_needs_unconditional_tokens(unet: Any) -> None:
    z, tokens = tensors()
    for unconditional in (None, tokens[:1]):
        with pytest.raises(ValueError, match="needs unconditional tokens"):
            euler_sample(unet, z, SCHEDULE.sgm_timesteps(2), tokens, schedule=SCHEDULE, unconditional=unconditional)


def test_a_perfect_noise_prediction_ends_at_the_clean_latents() -> None:
    z, tokens = tensors()
    noise = torch.randn_like(z)
    timesteps = SCHEDULE.sgm_timesteps(7)
    start = z + SCHEDULE.sigmas[timesteps[0]] * noise

    def oracle(sample: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        return (noise,)

    end = euler_sample(oracle, start, timesteps, tokens, schedule=SCHEDULE, guidance=1.0)
    torch.testing.assert_close(end, z, atol=1e-5, rtol=0)


def test_the_loss_is_the_squared_error_of_offset_noise(unet: Any) -> None:
    z, tokens = tensors(3)
    vector = size_vector(256, 256)
    loss = diffusion_loss(unet, z, tokens, torch.Generator().manual_seed(5), schedule=SCHEDULE, vector=vector)

    generator = torch.Generator().manual_seed(5)
    timesteps = torch.randint(1000, (3,), generator=generator)
    noise = torch.randn(z.shape, generator=generator) + 0.04 * torch.randn(3, 4, 1, 1, generator=generator)
    sigma = SCHEDULE.sigmas[timesteps].view(-1, 1, 1, 1)
    noisy = z + sigma * noise
    predicted = unet(noisy / (sigma**2 + 1).sqrt(), timesteps, tokens, class_labels=vector.expand(3, -1)).sample
    torch.testing.assert_close(loss, (predicted - noise).square().mean())
    denoised = noisy - sigma * predicted
    torch.testing.assert_close(loss, ((denoised - z).square() / sigma**2).mean(), rtol=1e-3, atol=1e-4)


def test_the_loss_of_a_model_that_knows_is_zero_and_offsets_are_per_channel() -> None:
    z, tokens = torch.zeros(64, 4, 8, 8), torch.zeros(64, 1, 1)
    seen: list[torch.Tensor] = []

    def oracle(sample: torch.Tensor, timestep: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        sigma = SCHEDULE.sigmas[timestep].view(-1, 1, 1, 1)
        seen.append(sample * (sigma**2 + 1).sqrt() / sigma)
        return (seen[-1],)

    loss = diffusion_loss(oracle, z, tokens, torch.Generator().manual_seed(0), schedule=SCHEDULE, offset=3.0)
    assert loss < 1e-9
    means = seen[0].mean((2, 3))
    assert means.std(dim=1).mean() > 1  # channels of one image are shifted differently
    assert means.std().item() == pytest.approx(3.0, rel=0.15)


def test_gradients_of_the_loss_reach_the_tokens(unet: Any) -> None:
    z, tokens = tensors()
    tokens.requires_grad_()
    vector = size_vector(256, 256)
    diffusion_loss(unet, z, tokens, torch.Generator().manual_seed(0), schedule=SCHEDULE, vector=vector).backward()
    assert tokens.grad is not None and tokens.grad.abs().sum() > 0


def test_a_vector_may_differ_between_images(unet: Any) -> None:
    z, tokens = tensors()
    vectors = torch.stack([size_vector(256, 256), size_vector(64, 32, 5, 6)])
    level = torch.tensor([10, 500])
    both = predict_noise(unet, z, level, tokens, schedule=SCHEDULE, vector=vectors)
    second = predict_noise(unet, z[1:], level[1:], tokens[1:], schedule=SCHEDULE, vector=vectors[1])
    torch.testing.assert_close(both[1:], second, atol=1e-5, rtol=1e-5)


def test_the_size_vector_is_diffusers_embedding() -> None:
    embed = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    expected = embed(torch.tensor([256.0, 192.0, 16.0, 0.0])).flatten()
    vector = size_vector(256, 192, top=16, left=0)
    assert vector.shape == (1024,)
    torch.testing.assert_close(vector, expected, atol=2e-5, rtol=0)


def test_noise_belongs_to_the_image() -> None:
    together = image_noise((2, 3), image_generators([7, 8]), torch.device("cpu"))
    alone = image_noise((2, 3), image_generators([8]), torch.device("cpu"))
    assert torch.equal(together[1:], alone)
    assert not torch.equal(together[0], together[1])


@torch.no_grad()
def test_encoding_samples_the_posterior_or_takes_its_mode(vae: Any) -> None:
    images = torch.rand(2, 3, 8, 8)
    posterior = vae.encode(images * 2 - 1).latent_dist
    torch.testing.assert_close(encode(vae, images), posterior.mean * 0.5)
    noise = image_noise((4, 4, 4), image_generators([1, 2]), images.device)
    own = encode(vae, images, image_generators([1, 2]))
    torch.testing.assert_close(own, (posterior.mean + posterior.std * noise) * 0.5)
    torch.testing.assert_close(own[1:], encode(vae, images[1:], image_generators([2])))
    shared = encode(vae, images, torch.Generator().manual_seed(1))
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(shared, (posterior.mean + posterior.std * noise) * 0.5)


@torch.no_grad()
def test_decoding_undoes_the_scaling_and_gives_images(vae: Any) -> None:
    latents = torch.randn(2, 4, 4, 4) * 3
    images = decode(vae, latents)
    torch.testing.assert_close(images, ((vae.decode(latents / 0.5).sample + 1) / 2).clamp(0, 1))


def test_the_autoencoder_keeps_its_precision_under_autocast() -> None:
    dtypes: list[torch.dtype] = []
    layer = torch.nn.Linear(8, 8)

    def encoder(x: torch.Tensor) -> Any:
        dtypes.append(layer(x).dtype)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: x))

    stub: Any = SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0), encode=encoder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encode(stub, torch.rand(1, 3, 8, 8))
    assert dtypes == [torch.float32]


def test_contrast_shrinks_around_mid_grey() -> None:
    assert shrink_contrast(torch.tensor([0.0, 0.5, 1.0]), 0.8).tolist() == pytest.approx([0.1, 0.5, 0.9])
