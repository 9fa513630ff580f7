"""Entry ``dip``: inversion of VGG's feature maps by a deep image prior, at the paper's sizes, with random VGG weights.

The reference is Ulyanov's network in ordinary torch layers, one image at a time (DmitryUlyanov/deep-image-prior,
``skip``; settings of Brain-IT, Sec. D.2). A step takes the same time from the first to the last: a few are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark.networks.paper import Vgg16Bn, vgg16_bn
from benchmark.perf.entries import Floor, Job, Part, Results
from methods.brain_it.dip import Hourglass, invert

_LAYERS = ("5", "12", "22", "32", "42")  # conv1_2 .. conv5_3, after their ReLUs
_SKIP, _NOISE, _SCALE, _LR, _EMA = 2, 1 / 30, 0.1, 1e-3, 0.99


@dataclass(frozen=True)
class _Sizes:
    size: int
    feature_size: int
    channels: int
    depth: int
    scales: int
    images: int
    steps: int


def _sizes(job: Job) -> _Sizes:
    if job.quick:
        return _Sizes(32, 32, 64, 5, 2, images=2, steps=3)
    images, steps = (2, 5) if job.device == "cpu" else (16, 100)
    return _Sizes(224, 112, 128, 32, 3, images, steps)


@dataclass(frozen=True)
class _Inputs:
    network: Vgg16Bn
    targets: list[Tensor]
    seeds: list[int]
    sizes: _Sizes

    def features(self, images: Tensor) -> list[Tensor]:
        maps = self.network.features(images, _LAYERS)
        return [maps[layer] for layer in _LAYERS]


def _inputs(job: Job) -> _Inputs:
    """Features of smooth random pictures."""
    sizes = _sizes(job)
    network = vgg16_bn("vgg16-bn", random_seed=0).to(job.device)
    coarse = torch.rand(sizes.images, 3, 7, 7, generator=torch.Generator().manual_seed(1))
    pictures = F.interpolate(coarse, (sizes.feature_size,) * 2, mode="bicubic").clamp(0, 1).to(job.device)
    inputs = _Inputs(network, [], list(range(sizes.images)), sizes)
    with torch.no_grad():
        inputs.targets.extend(inputs.features(pictures))
    return inputs


# --- ordinary layers, one image at a time -----------------------------------------------------------------------------


def plain_convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution, its norm and its slope."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, padding_mode="reflect")
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2))


class PlainScale(nn.Module):
    """One level of the hourglass."""

    def __init__(self, inputs: int, channels: int, skip: int, deeper: nn.Module) -> None:
        super().__init__()
        self.skip = plain_convolution(inputs, skip, 1)
        self.down = nn.Sequential(
            plain_convolution(inputs, channels, 3, 2),
            plain_convolution(channels, channels, 3),
            deeper,
            nn.Upsample(scale_factor=2, mode="bilinear"),
        )
        self.up = nn.Sequential(
            nn.BatchNorm2d(skip + channels),
            plain_convolution(skip + channels, channels, 3),
            plain_convolution(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Join the skip connection and what comes up from below."""
        return cast("Tensor", self.up(torch.cat([self.skip(x), self.down(x)], 1)))


def plain_hourglass(depth: int = 32, channels: int = 128, skip: int = 2, scales: int = 3) -> nn.Sequential:
    """Ulyanov's network for one image."""
    body: nn.Module = nn.Identity()
    for level in reversed(range(scales)):
        body = PlainScale(depth if level == 0 else channels, channels, skip, body)
    return nn.Sequential(body, nn.Conv2d(channels, 3, 1), nn.Sigmoid())


def plain_invert(
    targets: Sequence[Tensor], features: Callable[[Tensor], Sequence[Tensor]], seed: int, sizes: _Sizes
) -> tuple[Tensor, list[float]]:
    """Invert one image's features (a batch of one); return the image (1, 3, H, W) and the loss of every step."""
    device = targets[0].device
    generator = torch.Generator().manual_seed(seed)
    initial = Hourglass(1, sizes.depth, sizes.channels, _SKIP, sizes.scales)  # for its first weights only
    initial.initialise([generator])
    network = plain_hourglass(sizes.depth, sizes.channels, _SKIP, sizes.scales)
    with torch.no_grad():
        for mine, theirs in zip(network.parameters(), initial.parameters(), strict=True):
            mine.copy_(theirs[0])
    network.to(targets[0])
    still = (torch.rand(sizes.depth, sizes.size, sizes.size, generator=generator) * _SCALE).to(targets[0])[None]
    restless = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
    optimiser = torch.optim.Adam(network.parameters(), lr=_LR)
    average, losses = None, []
    for _ in range(sizes.steps):
        noise = torch.empty_like(still).normal_(std=_NOISE, generator=restless)
        output = network(still + noise)
        seen = output
        if sizes.feature_size != sizes.size:
            seen = F.interpolate(output, (sizes.feature_size,) * 2, mode="bicubic", antialias=True)
        loss = torch.stack([F.mse_loss(a, b) for a, b in zip(features(seen), targets, strict=True)]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        output = output.detach()
        average = output if average is None else _EMA * average + (1 - _EMA) * output
        losses.append(float(loss.detach()))
    assert average is not None
    return average, losses


def reference(inputs: _Inputs, job: Job) -> Results:
    """One image after the other."""
    images, curves = [], []
    for place, seed in enumerate(inputs.seeds):
        own = [target[place : place + 1] for target in inputs.targets]
        image, losses = plain_invert(own, inputs.features, seed, inputs.sizes)
        images.append(image)
        curves.append(losses)
    return _results(torch.cat(images), np.array(curves))


# --- ours -------------------------------------------------------------------------------------------------------------


def ours(inputs: _Inputs, job: Job) -> Results:
    """The same by ``methods.brain_it.dip``, as stage ``reconstruct`` calls it."""
    sizes = inputs.sizes
    losses: list[float] = []  # on a CPU image after image; side by side on a GPU, there step after step
    images = invert(
        inputs.targets,
        inputs.features,
        seeds=inputs.seeds,
        size=sizes.size,
        feature_size=sizes.feature_size,
        steps=sizes.steps,
        lr=_LR,
        input_noise=_NOISE,
        input_scale=_SCALE,
        ema=_EMA,
        channels=sizes.channels,
        skip=_SKIP,
        depth=sizes.depth,
        scales=sizes.scales,
        batch=sizes.images,
        progress=lambda found: losses.extend(found.tolist()),
    )
    curves = np.array(losses)
    together = job.device != "cpu"
    return _results(images, curves.reshape(-1, sizes.images).T if together else curves.reshape(sizes.images, -1))


def _results(images: Tensor, losses: np.ndarray) -> Results:
    return {"images": images.cpu().numpy(), "losses, in terms of the first": losses / losses[:, :1]}


# --- the least that either can do -------------------------------------------------------------------------------------


def floor(job: Job) -> Floor:
    """Operations of one step: convolutions forwards, and backwards to maps and weights; of VGG to the maps alone.

    The convolution of enlarged maps counts at the size before. Bytes: each convolution's output written, and read
    forwards and backwards; weights, gradients and moments of Adam read, and all but the gradients written.
    """
    sizes = _sizes(job)
    network, maps, weights = 0.0, 0.0, 0.0
    side, inputs, c = sizes.size, sizes.depth, sizes.channels
    for level in range(sizes.scales):
        half = side // 2
        first = inputs * (_SKIP * side**2 + 9 * c * half**2)
        rest = 9 * c * c * half**2 + c * (9 * c * half**2 + 9 * _SKIP * side**2) + c * c * side**2
        # What the first convolutions read is the noise, which needs no gradient.
        network += 2 * (first * (3 if level else 2) + rest * 3)
        maps += side**2 * (_SKIP + 2 * c) + half**2 * 2 * c
        weights += inputs * (_SKIP + 9 * c) + 9 * c * c + 9 * c * (c + _SKIP) + c * c
        side, inputs = half, c
    network += 3 * 2 * 3 * c * sizes.size**2
    vgg, side, channels = 0.0, sizes.feature_size, 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            vgg += 2 * 2 * 9 * channels * width * side**2
            maps += width * side**2
            channels = width
        side //= 2
    times = sizes.images * sizes.steps
    return Floor(operations=times * (network + vgg), nbytes=times * 4 * (3 * maps + 7 * weights))


PARTS: tuple[Part, ...] = (Part("features to images", _inputs, ours, reference, floor),)
# Adam takes whole steps by the sign of gradients that are mostly rounding: after five steps the plain network in
# float32 is 1.6e-3 away from itself in float64, and 7e-4 from itself on one thread.
TOLERANCES: Mapping[str, float] = {"images": 1e-2, "losses, in terms of the first": 5e-3}
