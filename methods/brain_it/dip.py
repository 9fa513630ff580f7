"""Inversion of feature maps with a deep image prior (Ulyanov et al., 2018; Brain-IT, Sec. D.2).

A randomly initialised hourglass network turns a fixed noise input into an image; its weights are optimised until the
features of that image match the given ones. The structure of the network is the only prior on the image.

Every image has a network of its own. Many of them run side by side as one network of grouped layers: one large step
costs less than many small ones, and no image can see another.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Features = Callable[[Tensor], Sequence[Tensor]]
"""Images (N, 3, H, W) in [0, 1] to one (N, C, h, w) map a layer; no image may influence another's maps."""


class GroupedConv2d(nn.Module):
    """A square convolution with reflection padding and bias, with weights of its own for every image.

    Equal to `nn.Conv2d(..., padding=kernel // 2, padding_mode="reflect")` on each image. Maps (N, inputs, H, W) to
    (N, outputs, H / stride, W / stride).
    """

    def __init__(self, images: int, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.kernel = kernel
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(images, outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(images, outputs))

    def initialise(self, generators: Sequence[torch.Generator]) -> None:
        """PyTorch's default for convolutions, U(-1, 1) / sqrt(fan in), drawn for every image from its own generator."""
        bound = self.weight[0, 0].numel() ** -0.5
        with torch.no_grad():
            for weight, bias, generator in zip(self.weight, self.bias, generators, strict=True):
                weight.uniform_(-bound, bound, generator=generator)
                bias.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve each image of N x C x H x W with weights of its own."""
        images, outputs = self.bias.shape
        if self.kernel == 1:
            pixels = torch.baddbmm(self.bias[:, :, None], self.weight[:, :, :, 0, 0], x.flatten(2))
            return pixels.unflatten(2, x.shape[2:])
        x = F.pad(x.flatten(0, 1)[None], (self.kernel // 2,) * 4, mode="reflect")
        if x.device.type == "cpu":  # oneDNN is about a third faster in this layout, conversions included
            x = x.contiguous(memory_format=torch.channels_last)
        x = F.conv2d(x, self.weight.flatten(0, 1), self.bias.flatten(), self.stride, groups=images)
        return x.contiguous()[0].unflatten(0, (images, outputs))


class GroupedNorm(nn.Module):
    """Batch normalisation in training mode for batches of one image, with an affine map of its own for every image.

    With one image in the batch it normalises each channel over its own pixels, which is instance normalisation.
    Written as group normalisation with one channel a group, the quickest form on a CPU.
    """

    def __init__(self, images: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(images, channels))
        self.bias = nn.Parameter(torch.zeros(images, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each channel of each image of N x C x H x W."""
        flat = x.flatten(0, 1)[None]
        return F.group_norm(flat, flat.shape[1], self.weight.flatten(), self.bias.flatten()).view_as(x)


def _convolution(images: int, inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        GroupedConv2d(images, inputs, outputs, kernel, stride),
        GroupedNorm(images, outputs),
        nn.LeakyReLU(0.2, inplace=True),
    )


class Scale(nn.Module):
    """One level of the hourglass: down, through the deeper levels, up, and beside it a thin skip connection."""

    def __init__(self, images: int, inputs: int, channels: int, skip: int, deeper: nn.Module) -> None:
        super().__init__()
        self.skip = _convolution(images, inputs, skip, 1)
        self.down = nn.Sequential(
            _convolution(images, inputs, channels, 3, stride=2), _convolution(images, channels, channels, 3)
        )
        self.deeper = deeper
        self.norm = GroupedNorm(images, skip + channels)
        self.up = nn.Sequential(
            _convolution(images, skip + channels, channels, 3), _convolution(images, channels, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Join what this scale passes on and what comes up from the scales below."""
        low = F.interpolate(self.deeper(self.down(x)), scale_factor=2, mode="bilinear", align_corners=False)
        return self.up(self.norm(torch.cat([self.skip(x), low], dim=1)))


class Hourglass(nn.Module):
    """Ulyanov's `skip` network, one for every image: (N, depth, H, W) to images (N, 3, H, W) in [0, 1].

    Height and width must be multiples of 2 ** scales, and at least 2 ** (scales + 1).
    """

    def __init__(self, images: int, depth: int = 32, channels: int = 128, skip: int = 2, scales: int = 3) -> None:
        super().__init__()
        body: nn.Module = nn.Identity()
        for level in reversed(range(scales)):
            body = Scale(images, depth if level == 0 else channels, channels, skip, body)
        self.body = body
        self.to_rgb = GroupedConv2d(images, channels, 3, 1)

    def initialise(self, generators: Sequence[torch.Generator]) -> None:
        """Draw every image's weights from its own generator, which must live where the network does."""
        for module in self.modules():
            if isinstance(module, GroupedConv2d):
                module.initialise(generators)

    def forward(self, x: Tensor) -> Tensor:
        """Return images in [0, 1] (N x 3 x H x W) from fixed noise (N x C x H x W)."""
        return torch.sigmoid(self.to_rgb(self.body(x)))


def invert(
    targets: Sequence[Tensor],
    features: Features,
    *,
    seeds: Sequence[int],
    size: int = 224,
    feature_size: int = 112,
    steps: int = 2000,
    lr: float = 1e-3,
    input_noise: float = 1 / 30,
    input_scale: float = 0.1,
    ema: float = 0.99,
    channels: int = 128,
    skip: int = 2,
    depth: int = 32,
    scales: int = 3,
    layer_weights: Sequence[float] | None = None,
    batch: int = 16,
    feature_batch: int = 16,
    progress: Callable[[int, float], None] | None = None,
) -> Tensor:
    """Find images whose features are the given ones (Brain-IT, Sec. D.2; size and input noise from the official code).

    The loss of an image is the mean over layers of the mean squared error of its features. What is returned is the
    exponential average of the outputs over the steps, started at the first of them: short runs need a smaller `ema`.

    Args:
        targets: one (N, C, h, w) tensor a layer, on the device and in the precision to work in.
        features: the frozen network that made the targets; see `Features`.
        seeds: one integer an image, from which its weights, its input and its noise are drawn. An image depends on
            its seed and target only, not on its place or company: bit by bit on a CPU; on a GPU up to rounding, which
            many steps amplify.
        size: height and width of the images to find, in pixels.
        feature_size: height and width at which `features` sees them: where it differs from `size`, images are resized
            by bicubic interpolation with antialiasing.
        steps: optimisation steps.
        lr: learning rate of Adam.
        input_noise: standard deviation of the noise added to the input at every step.
        input_scale: the input is uniform between 0 and this.
        ema: weight of the past in the average of the outputs.
        channels: channels of the network at every scale.
        skip: channels of its skip connections.
        depth: channels of its input.
        scales: how often it halves the image.
        layer_weights: weight of every layer in the loss; None means equal. Only their ratios matter.
        batch: images optimised together.
        feature_batch: images that `features` is given at once: always exactly so many, with black ones to fill up,
            because another number means other kernels, which round otherwise.
        progress: called after every step with the image-steps it took (they add up to N * steps) and the mean loss.

    Returns:
        (N, 3, size, size) in [0, 1], on the targets' device.

    Raises:
        ValueError: if sizes, seeds, weights or targets do not fit together, or targets are not finite.
    """
    if min(steps, batch, feature_batch) < 1:
        raise ValueError(f"steps={steps}, batch={batch}, feature_batch={feature_batch}: each must be at least 1")
    weights = _check(targets, seeds, size, scales, layer_weights)
    images = []
    for first in range(0, len(seeds), batch):
        some = list(range(first, min(first + batch, len(seeds))))
        count = len(some)
        if count == 1:  # A single group means other kernels too, so a lone image is given its double for company.
            some = some * 2
        device, dtype = targets[0].device, targets[0].dtype
        generators = [torch.Generator().manual_seed(seeds[image]) for image in some]
        network = Hourglass(len(generators), depth, channels, skip, scales)
        network.initialise(generators)
        network = network.to(device, dtype)
        still = torch.stack([torch.rand(depth, size, size, generator=generator) for generator in generators])
        still = (still * input_scale).to(device, dtype)
        # Noise is drawn where it is used: at full size it would take longer to move to a GPU than a step takes.
        restless = [
            torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
            for generator in generators
        ]
        wanted = [target[some] for target in targets]
        # Not fused: fused Adam rounds otherwise at the end of a tensor, so differently in another batch.
        optimiser = torch.optim.Adam(network.parameters(), lr=lr, fused=False)
        noise = torch.empty_like(still)
        average: Tensor | None = None
        for _ in range(steps):
            for part, generator in zip(noise, restless, strict=True):
                part.normal_(std=input_noise, generator=generator)
            output = network(still + noise)
            found = _in_blocks(features, _resize(output, feature_size), feature_batch)
            losses = _losses(found, wanted, weights)
            optimiser.zero_grad()
            # Summed over images: each network gets the gradient of its own loss, whatever the batch.
            losses.sum().backward(inputs=list(network.parameters()))
            optimiser.step()
            output = output.detach()
            average = output if average is None else average.lerp_(output, 1 - ema)
            if progress is not None:
                progress(count, float(losses.detach().mean()))
        assert average is not None
        images.append(average[:count])
    return torch.cat(images)


def _check(
    targets: Sequence[Tensor], seeds: Sequence[int], size: int, scales: int, layer_weights: Sequence[float] | None
) -> list[float]:
    """Refuse what cannot be inverted; return the layers' weights, adding up to 1."""
    if not targets or not seeds:
        raise ValueError("nothing to invert: expected at least one layer of target features and one seed an image")
    if size % 2**scales or size < 2 ** (scales + 1):
        raise ValueError(
            f"size={size} must be a multiple of {2**scales} (2 ** scales) and at least {2 ** (scales + 1)}"
        )
    for number, target in enumerate(targets, start=1):
        if len(target) != len(seeds):
            raise ValueError(f"target layer {number} has {len(target)} images but there are {len(seeds)} seeds")
        if not torch.isfinite(target).all():
            raise ValueError(f"target layer {number} holds values that are not finite")
    weights = [1.0] * len(targets) if layer_weights is None else list(layer_weights)
    if len(weights) != len(targets) or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"layer_weights={weights}: expected {len(targets)} weights, not negative and not all zero")
    return [weight / sum(weights) for weight in weights]


def _resize(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)


def _in_blocks(features: Features, images: Tensor, block: int) -> list[Tensor]:
    """Features of images, taken `block` images at a time, never fewer."""
    parts = []
    for some in torch.split(images, block):
        filled = F.pad(some, (0, 0, 0, 0, 0, 0, 0, block - len(some)))
        parts.append([maps[: len(some)] for maps in features(filled)])
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def _losses(maps: Sequence[Tensor], targets: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted mean over layers of the mean squared error, for every image: (N,)."""
    found, expected = [tuple(m.shape) for m in maps], [tuple(t.shape) for t in targets]
    if found != expected:
        raise ValueError(f"the feature network gives maps of shapes {found}, the targets have shapes {expected}")
    errors = [(m - t).square().flatten(1).mean(1) for m, t in zip(maps, targets, strict=True)]
    return torch.stack([weight * error for weight, error in zip(weights, errors, strict=True)]).sum(0)
