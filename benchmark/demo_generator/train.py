"""Train the demo's generator: ``python -m benchmark.demo_generator.train OUT``.

Three parts, in this order; ``--parts`` names those to train, the others are read from OUT:

- ``autoencoder``: of the scenes, as the first stage of Stable Diffusion;
- ``sketch``: what the tokens alone say of the latent (:class:`~benchmark.demo_generator.model.TokenSketch`);
- ``denoiser``: the UNet together with the sketch, as the UNet of SDXL-unCLIP is conditioned on a picture's tokens.

The pictures are drawn with a reserved seed: none of them is ever seen by a simulated subject. The shipped files come
from the settings that head the parts of the log beside them.

Fresh Gaussian tokens stand in for the condition in a tenth of the examples: they are the unconditional branch of the
paper's sampler (official code). In 45 % of the examples the tokens are what a good decoder would make of a noisy
recording: noise is added to their principal components and the Wiener filter takes off what it can, so that fine
contrasts are lost before coarse ones.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from benchmark.data.scenes import render_scenes
from benchmark.demo_generator.model import DemoGenerator, TokenUNet, build_vae
from benchmark.networks import EfficientNetLite, SpatialTokens

RESERVED_SEED = 2**40 + 7  # simulations take seeds below 2**32
HELD_OUT = 256  # pictures kept for the losses that the log shows
PARTS = ("autoencoder", "sketch", "denoiser")
COMPONENTS = 384  # principal components of the tokens that a noisy recording may keep: 91 % of their variance
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


@dataclass
class Fit:
    """The loop of all parts: AdamW on one cycle, bfloat16 forward, clipped gradients, a clock."""

    name: str
    parameters: list[nn.Parameter]
    steps: int
    peak: float
    every: int  # steps between two lines of the log
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.AdamW(self.parameters, lr=self.peak, weight_decay=self.weight_decay)
        self.start = time.monotonic()
        self.mean: float | None = None

    def __iter__(self) -> Iterator[int]:
        for step in range(self.steps):
            for group in self.optimiser.param_groups:
                group["lr"] = one_cycle(step, self.steps, self.peak)
            yield step

    def step(self, loss: Tensor) -> None:
        """Go down the gradient of ``loss``."""
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        current = float(loss.detach())
        self.mean = current if self.mean is None else 0.98 * self.mean + 0.02 * current

    def due(self, step: int) -> bool:
        """Whether this step is one to report."""
        return step % self.every == 0 or step == self.steps - 1

    def report(self, step: int, held_out: str) -> None:
        """Write a line of the log."""
        seconds = time.monotonic() - self.start
        log.info(
            "%s step %d/%d loss %.4f held-out %s (%.0f s)", self.name, step, self.steps, self.mean, held_out, seconds
        )


def _pick(n: int, batch: int, generator: torch.Generator) -> Tensor:
    return torch.randint(HELD_OUT, n, (batch,), generator=generator)


def _rmse(vae: AutoencoderKL, images: Tensor) -> str:
    with torch.no_grad():
        x = to_model_range(images[:64])
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
    return f"rmse {float((y - x).square().mean().sqrt() / 2):.4f}"


def train_autoencoder(
    vae: AutoencoderKL, images: Tensor, steps: int, batch: int, generator: torch.Generator
) -> AutoencoderKL:
    """Fit encoder and decoder: L1 + 2 x L2 + a light KL term."""
    fit = Fit("autoencoder", list(vae.parameters()), steps, 1.5e-3, 100, weight_decay=1e-4)
    for step in fit:
        x = to_model_range(images[_pick(len(images), batch, generator)])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample(generator)).sample
        y = y.float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        fit.step((y - x).abs().mean() + 2 * (y - x).square().mean() + 1e-4 * kl)
        if fit.due(step):
            fit.report(step, _rmse(vae, images))
    return vae.eval().requires_grad_(False)


class Corruption:
    """What happens to the tokens of a training example: nothing, a noisy recording, or all is lost."""

    def __init__(self, tokens: Tensor) -> None:
        flat = tokens.float().flatten(1)
        self.mean = flat.mean(0)
        _, spread, self.directions = torch.pca_lowrank(flat - self.mean, COMPONENTS, niter=3)
        self.variance = spread.square() / len(flat)

    def recorded(self, tokens: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
        """Return the best linear guess of tokens (B x 16 x 320) seen under noise of this variance (B x 1)."""
        known = (tokens.flatten(1) - self.mean) @ self.directions
        seen = known + noise.sqrt() * torch.randn(known.shape, generator=generator)
        guess = self.variance / (self.variance + noise) * seen
        return (guess @ self.directions.T + self.mean).view_as(tokens)

    def __call__(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """Corrupt a batch; recordings keep a correlation of about .95 to .45 with the truth."""
        size = len(tokens)
        noise = 10 ** (torch.rand(size, 1, generator=generator) * 2.6)  # the tokens' total variance is about 5000
        recorded = self.recorded(tokens, noise, generator)
        fate = torch.rand(size, 1, 1, generator=generator)
        lost = torch.randn(tokens.shape, generator=generator)
        return torch.where(fate < 0.45, tokens, torch.where(fate < 0.9, recorded, lost))


def train_sketch(
    unet: TokenUNet, latents: Tensor, tokens: Tensor, steps: int, corrupt: Corruption, generator: torch.Generator
) -> None:
    """Fit the sketched latent to the latent: cheap, and the denoiser then starts from tokens that it can read."""
    fit = Fit("sketch", list(unet.sketch.parameters()), steps, 1.5e-3, 250)
    unet.train()
    for step in fit:
        pick = _pick(len(latents), 128, generator)
        condition = corrupt(tokens[pick].float(), generator)
        with torch.autocast("cpu", torch.bfloat16):
            _, _, sketched = unet.sketch(condition)
        fit.step((sketched.float() - latents[pick]).square().mean())
        if fit.due(step):
            unet.eval()
            with torch.no_grad():
                error = (unet.sketch(tokens[:HELD_OUT].float())[2] - latents[:HELD_OUT]).square().mean()
            unet.train()
            fit.report(step, f"error {float(error):.4f} (of variance 1)")


def train_denoiser(
    unet: TokenUNet,
    latents: Tensor,
    tokens: Tensor,
    steps: int,
    batch: int,
    corrupt: Corruption,
    generator: torch.Generator,
    checkpoint: Path,
) -> TokenUNet:
    """Fit v on normalised latents and tokens; return the exponential average of the weights.

    The loss weighs the squared error of the latent by min(SNR, 5) + 1/2: "min-SNR" (Hang et al. 2023) with a floor,
    because the highest levels decide what is in the picture.
    """
    average = EMAModel(unet.parameters(), decay=0.999)
    fit = Fit("denoiser", list(unet.parameters()), steps, 1e-3, 250)

    def noised(z: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        level = torch.randint(0, len(unet.alphas), (len(z),), generator=rng)
        noise = torch.randn(z.shape, generator=rng)
        a = unet.alphas[level].view(-1, 1, 1, 1)
        return a.sqrt() * z + (1 - a).sqrt() * noise, level, noise, a.sqrt() * noise - (1 - a).sqrt() * z

    unet.train()
    for step in fit:
        pick = _pick(len(latents), batch, generator)
        x, level, _, v = noised(latents[pick], generator)
        condition = corrupt(tokens[pick].float(), generator)
        with torch.autocast("cpu", torch.bfloat16):
            predicted, sketched = unet.velocity(x, level, condition)
        a = unet.alphas[level]
        snr = a / (1 - a)
        weight = (snr.clamp(max=5) + 0.5) / (snr + 1)  # v's squared error is the latent's times SNR + 1
        loss = ((predicted.float() - v).square().mean((1, 2, 3)) * weight).mean()
        fit.step(loss + 0.3 * (sketched.float() - latents[pick]).square().mean())
        average.step(unet.parameters())
        if fit.due(step):
            average.store(unet.parameters())
            average.copy_to(unet.parameters())
            unet.eval()
            rng = torch.Generator().manual_seed(0)
            with torch.no_grad():
                x, level, noise, _ = noised(latents[:HELD_OUT], rng)
                error = (unet(x, level, tokens[:HELD_OUT].float()).sample - noise).square().mean((1, 2, 3))
            quarters = [float(error[level // 250 == q].mean()) for q in range(4)]
            torch.save(unet.state_dict(), checkpoint)
            average.restore(unet.parameters())
            unet.train()
            by_level = ", ".join(f"{q:.4f}" for q in quarters)
            fit.report(step, f"noise error {float(error.mean()):.4f}; by quarter of the levels {by_level}")
    average.copy_to(unet.parameters())
    return unet.eval().requires_grad_(False)


def main() -> None:
    """Draw the pictures, train the named parts, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the weights, the constants and the log")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--images", type=int, default=32000)
    parser.add_argument("--autoencoder-steps", type=int, default=1400)
    parser.add_argument("--sketch-steps", type=int, default=1500)
    parser.add_argument("--denoiser-steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(args.out / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)
    generator = torch.Generator().manual_seed(args.seed)
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    log.info("%s", json.dumps(settings | {"torch": torch.__version__, "machine": platform.machine()}))

    pictures, _ = render_scenes(args.images, RESERVED_SEED)
    images = torch.from_numpy(pictures)
    network = EfficientNetLite("lite0")
    vae = build_vae()
    if "autoencoder" in args.parts:
        vae = train_autoencoder(vae, images, args.autoencoder_steps, args.batch, generator)
    else:
        vae = DemoGenerator.load_vae(args.out)
    DemoGenerator.save_vae(vae, args.out)
    if not {"sketch", "denoiser"} & set(args.parts):
        return

    spatial = SpatialTokens(network)
    with torch.no_grad():
        parts = [spatial(images[i : i + 128].permute(0, 3, 1, 2) / 255).half() for i in range(0, len(images), 128)]
        encoded = [
            vae.encode(to_model_range(images[i : i + 128])).latent_dist.mode() for i in range(0, len(images), 128)
        ]
    tokens, latents = torch.cat(parts), torch.cat(encoded)
    mean = tokens[HELD_OUT:].float().mean((0, 1))
    std = tokens[HELD_OUT:].float().std((0, 1))
    for part in tokens.split(1024):  # in place: all of them in float32 are large
        part.copy_((part.float() - mean) / std)
    scaling = 1 / float(latents[HELD_OUT:].std())
    latents *= scaling
    log.info("drew %d scenes, their tokens and latents; scaling factor %.4f", len(images), scaling)

    corrupt = Corruption(tokens[HELD_OUT : HELD_OUT + 6000])
    unet = TokenUNet()
    if "sketch" in args.parts:
        train_sketch(unet, latents, tokens, args.sketch_steps, corrupt, generator)
    else:
        unet = DemoGenerator.load(args.out).unet.requires_grad_(True)
    if "denoiser" in args.parts:
        checkpoint = args.out / "unet.checkpoint.tmp"
        unet = train_denoiser(unet, latents, tokens, args.denoiser_steps, args.batch, corrupt, generator, checkpoint)
        checkpoint.unlink(missing_ok=True)
    DemoGenerator(vae, unet, scaling, mean, std).save(args.out)


if __name__ == "__main__":
    main()
