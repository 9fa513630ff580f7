"""Train the demo's generator: ``python -m benchmark.demo_generator.train OUT``.

Two steps, as in the first stage and the UNet of SDXL-unCLIP: an autoencoder of the scenes, then a denoiser of its
latents that is conditioned on the semantic tokens of the same picture. The pictures are drawn with a reserved seed, so
none of them is ever seen by a simulated subject. The shipped files come from the command line, seed and log that lie
beside them.

Fresh Gaussian tokens stand in for the condition in a tenth of the examples: they are the unconditional branch of the
paper's sampler (official code). In half of the examples the tokens are blurred as a predictor of correlation r blurs
them, r^2 * tokens + r * sqrt(1 - r^2) * noise with the tokens' own covariance, so that the denoiser is at home with
tokens that come from a brain.
"""

from __future__ import annotations

import argparse
import logging
import platform
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmark.data.scenes import render_scenes
from benchmark.demo_generator.model import DemoGenerator, TokenUNet, build_vae
from benchmark.networks import EfficientNetLite, SpatialTokens

RESERVED_SEED = 2**40 + 7  # simulations take seeds below 2**32
HELD_OUT = 256  # pictures kept for the losses that the log shows
log = logging.getLogger("demo_generator")


def to_model_range(images: Tensor) -> Tensor:
    """Map uint8 B x H x W x 3 to float B x 3 x H x W in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def one_cycle(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then half a cosine down to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    phase = torch.tensor((step - warmup) / max(1, steps - warmup) * torch.pi)
    return peak * (0.01 + 0.99 * float(0.5 * (1 + torch.cos(phase))))


def train_vae(images: Tensor, steps: int, batch: int, generator: torch.Generator) -> torch.nn.Module:
    """Fit the autoencoder: L1 + 2 x L2 + a light KL term."""
    vae = build_vae()
    optimiser = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=1e-4)
    start = time.monotonic()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = one_cycle(step, steps, 1.5e-3)
        pick = torch.randint(HELD_OUT, len(images), (batch,), generator=generator)
        x = to_model_range(images[pick])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample(generator)).sample
        y = y.float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = (y - x).abs().mean() + 2 * (y - x).square().mean() + 1e-4 * kl
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step == steps - 1:
            with torch.no_grad():
                x = to_model_range(images[:64])
                y = vae.decode(vae.encode(x).latent_dist.mode()).sample
            rmse = float((y - x).square().mean().sqrt() / 2)
            log.info(
                "vae step %d/%d loss %.4f held-out rmse %.4f (%.0f s)",
                step,
                steps,
                float(loss.detach()),
                rmse,
                time.monotonic() - start,
            )
    return vae.eval().requires_grad_(False)


def train_unet(
    latents: Tensor, tokens: Tensor, steps: int, stop: int, batch: int, generator: torch.Generator, checkpoint: Path
) -> TokenUNet:
    """Fit the noise predictor on normalised latents and tokens; return its exponential average."""
    from diffusers import EulerDiscreteScheduler
    from diffusers.training_utils import EMAModel

    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    alphas = scheduler.alphas_cumprod
    unet = TokenUNet()
    average = EMAModel(unet.parameters(), decay=0.999)
    optimiser = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=1e-2)
    start = time.monotonic()
    n = len(latents)
    running = 0.0

    def corrupt(t: Tensor, rng: torch.Generator) -> Tensor:
        """Blur half of the tokens as a brain decoder does; replace a tenth by Gaussian noise."""
        b = len(t)
        others = torch.randint(HELD_OUT, n, (b, 8), generator=rng)
        signs = torch.randn(b, 8, 1, 1, generator=rng) / 8**0.5
        noise = (tokens[others].float() * signs).sum(
            1
        )  # Gaussian mixtures of other pictures: the tokens' own covariance
        r = torch.rand(b, 1, 1, generator=rng) * 0.6 + 0.4
        blurred = r**2 * t + r * (1 - r**2).sqrt() * noise
        choice = torch.rand(b, 1, 1, generator=rng)
        out = torch.where(choice < 0.5, blurred, t)
        return torch.where(choice > 0.9, torch.randn(t.shape, generator=rng), out)

    def noised(z: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        level = torch.randint(0, 1000, (len(z),), generator=rng)
        noise = torch.randn(z.shape, generator=rng)
        a = alphas[level][:, None, None, None]
        return a.sqrt() * z + (1 - a).sqrt() * noise, level, noise

    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = one_cycle(step, steps, 8e-4)
        pick = torch.randint(HELD_OUT, n, (batch,), generator=generator)
        z, level, noise = noised(latents[pick], generator)
        condition = corrupt(tokens[pick].float(), generator)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(z, level, condition).sample
        loss = (predicted.float() - noise).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        average.step(unet.parameters())
        current = float(loss.detach())
        running = current if step == 0 else 0.98 * running + 0.02 * current
        if step % 250 == 0 or step == steps - 1:
            average.store(unet.parameters())
            average.copy_to(unet.parameters())
            rng = torch.Generator().manual_seed(0)
            with torch.no_grad():
                z, level, noise = noised(latents[:HELD_OUT], rng)
                held = float((unet(z, level, tokens[:HELD_OUT].float()).sample - noise).square().mean())
                blind = float(
                    (unet(z, level, torch.randn(HELD_OUT, *tokens.shape[1:], generator=rng)).sample - noise)
                    .square()
                    .mean()
                )
            torch.save(unet.state_dict(), checkpoint)
            average.restore(unet.parameters())
            message = "unet step %d/%d loss %.4f held-out %.4f, with noise tokens %.4f (%.0f s)"
            log.info(message, step, steps, running, held, blind, time.monotonic() - start)
        if step == stop:
            log.info("stopped after step %d of the schedule; the averaged weights of that step are shipped", step)
            break
    average.copy_to(unet.parameters())
    return unet.eval().requires_grad_(False)


def main() -> None:
    """Draw the pictures, train both parts, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the weights, the constants and the log")
    parser.add_argument("--images", type=int, default=16000)
    parser.add_argument("--vae-steps", type=int, default=1400)
    parser.add_argument("--unet-steps", type=int, default=3600)
    parser.add_argument(
        "--stop-after", type=int, default=-1, help="end the denoiser's training after this step of its schedule"
    )
    parser.add_argument("--reuse-vae", action="store_true", help="take OUT's autoencoder and train the denoiser only")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [
        logging.StreamHandler(),
        logging.FileHandler(args.out / "train.log", mode="a" if args.reuse_vae else "w"),
    ]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)
    generator = torch.Generator().manual_seed(args.seed)
    log.info(
        "%s",
        {k: str(v) for k, v in vars(args).items() if k != "out"}
        | {"torch": torch.__version__, "machine": platform.machine()},
    )

    pictures, _ = render_scenes(args.images, RESERVED_SEED)
    images = torch.from_numpy(pictures)
    network = SpatialTokens(EfficientNetLite("lite0"))
    with torch.no_grad():
        parts = [network(images[i : i + 128].permute(0, 3, 1, 2) / 255).half() for i in range(0, len(images), 128)]
    tokens = torch.cat(parts)
    mean = tokens[HELD_OUT:].float().mean((0, 1))
    std = tokens[HELD_OUT:].float().std((0, 1))
    tokens = ((tokens.float() - mean) / std).half()
    log.info("drew %d scenes and their tokens", len(images))

    if args.reuse_vae:
        vae = DemoGenerator.load_vae(args.out)
    else:
        vae = train_vae(images, args.vae_steps, args.batch, generator)
    with torch.no_grad():
        encoded = [
            vae.encode(to_model_range(images[i : i + 128])).latent_dist.mode() for i in range(0, len(images), 128)
        ]
    latents = torch.cat(encoded)
    scaling = 1 / float(latents[HELD_OUT:].std())
    log.info("latents: scaling factor %.4f", scaling)
    checkpoint = args.out / "unet.checkpoint.tmp"
    DemoGenerator(vae, TokenUNet(), scaling, mean, std).save(args.out, {})
    unet = train_unet(latents * scaling, tokens, args.unet_steps, args.stop_after, args.batch, generator, checkpoint)
    record = {
        "seed": args.seed,
        "images": args.images,
        "vae_steps": args.vae_steps,
        "unet_steps": args.unet_steps,
        "stop_after": args.stop_after,
        "batch": args.batch,
    }
    DemoGenerator(vae, unet, scaling, mean, std).save(args.out, record)
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
