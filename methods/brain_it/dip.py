"""Inversion of feature maps with a deep image prior (Ulyanov et al., 2018; Brain-IT, Sec. D.2).

A randomly initialised hourglass network turns a fixed noise input into an image; its weights are optimised until the
features of that image match the given ones. The structure of the network is the only prior on the image.

Every image has a network of its own. Many of them run side by side as one network of grouped layers: one large step
costs less than many small ones, and no image can see another. On a CPU that holds for narrow networks; wide ones keep
it busy one by one. Then half of the work would be the convolutions of enlarged maps, and those are computed at the
size before the enlargement (`enlarged_convolution`): the same sums in another order, for a quarter of the products.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Features = Callable[[Tensor], Sequence[Tensor]]
"""Images (N, 3, H, W) in [0, 1] to one (N, C, h, w) map a layer; no image may influence another's maps."""

_WIDE = 64  # channels from which a network keeps a CPU busy by itself
_FEW = 16  # channels up to which norms are quicker with channels first: 30 times, for the two of a skip connection


def _single(x: Tensor) -> bool:
    """Whether maps (N, C, H, W) are those of one image on a CPU: they lie channels last, and stay so."""
    return len(x) == 1 and x.device.type == "cpu"


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
        if _single(x):
            return self.single(x, self.weight[0])
        if self.kernel == 1:
            pixels = torch.baddbmm(self.bias[:, :, None], self.weight[:, :, :, 0, 0], x.flatten(2))
            return pixels.unflatten(2, x.shape[2:])
        x = F.pad(x.flatten(0, 1)[None], (self.kernel // 2,) * 4, mode="reflect")
        if x.device.type == "cpu":  # oneDNN is about a third faster in this layout, conversions included
            x = x.contiguous(memory_format=torch.channels_last)
        x = F.conv2d(x, self.weight.flatten(0, 1), self.bias.flatten(), self.stride, groups=images)
        return x.contiguous()[0].unflatten(0, (images, outputs))

    def single(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve one image's maps (1, C, H, W) with weights (outputs, C, kernel, kernel) and the bias."""
        if self.kernel == 1:
            pixels = F.linear(x.squeeze(0).permute(1, 2, 0), weight[:, :, 0, 0], self.bias[0])
            return pixels.permute(2, 0, 1)[None]
        x = F.pad(x, (self.kernel // 2,) * 4, mode="reflect").contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, self.bias[0], self.stride)


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
        if _single(x):
            if x.shape[1] < _FEW:
                x = x.contiguous()
            return F.batch_norm(x, None, None, self.weight[0], self.bias[0], training=True)
        flat = x.flatten(0, 1)[None]
        return F.group_norm(flat, flat.shape[1], self.weight.flatten(), self.bias.flatten()).view_as(x)


@dataclass(frozen=True)
class _Enlargement:
    """Bilinear enlargement of one axis to twice its length, seen at the three taps of a padded convolution.

    A is (2 n, n, 3): place r of the enlarged axis, moved by tap k - 1 and reflected at the ends, is the mean
    sum_i A[r, i, k] x[i]. Each place needs three neighbours only, so A is kept as blocks along its diagonal, which are
    applied to overlapping windows.

    Attributes:
        forward: (blocks, 2 half, 3 window): of A, for the window of every block of 2 half enlarged places.
        backward: (blocks, 3 half, 2 window): of its transpose, rows by tap then place, likewise.
        backward_by_place: the same, rows by place then tap.
        gram: (n, n), U^T U of the enlargement U itself.
        half: n / blocks.
        window: places that a block needs.
    """

    forward: Tensor
    backward: Tensor
    backward_by_place: Tensor
    gram: Tensor
    half: int
    window: int

    @property
    def step(self) -> int:
        """From one window to the next."""
        return self.half - 1

    @property
    def blocks(self) -> int:
        """How many."""
        return len(self.forward)


@cache
def _enlargement(n: int, dtype: torch.dtype) -> _Enlargement:
    with torch.no_grad():
        eye = torch.eye(n, dtype=torch.float64)
        u = F.interpolate(eye[None], scale_factor=2, mode="linear", align_corners=False)[0].T
        padded = F.pad(u.T[None], (1, 1), mode="reflect")[0].T
        a = torch.stack([padded[k : k + 2 * n] for k in range(3)], 2)
        # Windows at equal distances, of which each holds what its block needs, the first and the last too.
        blocks = next(b for b in (8, 4, 2, 1) if n % b == 0 and (b == 1 or n // b >= 4))
        half = n // blocks
        window = half + blocks - 1
        starts = [block * (half - 1) for block in range(blocks)]
        forward = [
            a[2 * block * half : 2 * (block + 1) * half, start : start + window].flatten(1)
            for block, start in enumerate(starts)
        ]
        transposed = torch.stack(
            [
                a[2 * start : 2 * (start + window), block * half : (block + 1) * half].permute(2, 1, 0)
                for block, start in enumerate(starts)
            ]
        )
        return _Enlargement(
            torch.stack(forward).to(dtype),
            transposed.flatten(1, 2).to(dtype),
            transposed.transpose(1, 2).flatten(1, 2).to(dtype),
            (u.T @ u).to(dtype),
            half,
            window,
        )


class _Scratch(threading.local):
    """Memory for what nobody reads after a call: to ask the system for it each time costs as much as to compute it."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, role: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return uninitialised memory, the same one at each call of this role."""
        size = math.prod(shape)
        held = self.held.get((role, dtype))
        if held is None or held.numel() < size:
            held = self.held[role, dtype] = torch.empty(size, dtype=dtype)
        return held[:size].view(shape)

    def free(self) -> None:
        """Give it back."""
        self.held.clear()


_scratch = _Scratch()


class _EnlargedConvolution(torch.autograd.Function):
    """See `enlarged_convolution`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """(H, W, C) and (outputs, C, 3, 3) to (2 H, 2 W, outputs)."""
        (height, width, inputs), outputs = x.shape, len(weight)
        taps = weight.permute(2, 1, 3, 0).reshape(3, inputs, 3 * outputs)  # k, input, (l, output)
        ctx.save_for_backward(x, taps)
        # What each row gives to each tap, before anything is enlarged: i, k, j, (l, output).
        products = _scratch.take("products", (height, 3, width, 3 * outputs), x.dtype)
        for k in range(3):
            torch.bmm(x, taps[k].expand(height, inputs, 3 * outputs), out=products[:, k])
        rows, columns = _enlargement(height, x.dtype), _enlargement(width, x.dtype)
        row = 3 * width * outputs
        windows = products.as_strided((rows.blocks, 3 * rows.window, row), (rows.step * 3 * row, row, 1))
        out = x.new_empty(2 * height, columns.blocks, 2 * columns.half, outputs)
        # Some enlarged rows at a time, and each row's columns by itself: they are still in the cache.
        tall = _scratch.take("tall", (2 * rows.half, row), x.dtype)
        stride = (columns.step * 3 * outputs, outputs, 1)
        own = [one.as_strided((columns.blocks, 3 * columns.window, outputs), stride) for one in tall]
        for block in range(rows.blocks):
            torch.mm(rows.forward[block], windows[block], out=tall)
            for one, target in zip(own, out[2 * rows.half * block :], strict=False):
                torch.bmm(columns.forward, one, out=target)
        return out.view(2 * height, 2 * width, outputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Each of the steps transposed, in reverse order."""
        x, taps = ctx.saved_tensors
        (height, width, inputs), outputs = x.shape, gradient.shape[2]
        gradient = gradient.contiguous()
        rows, columns = _enlargement(height, x.dtype), _enlargement(width, x.dtype)
        row = 3 * width * outputs
        tall = _scratch.take("all tall", (2 * height, columns.blocks, 3 * columns.half, outputs), x.dtype)
        stride = (columns.step * 2 * outputs, outputs, 1)
        for one, target in zip(gradient.flatten(1), tall, strict=True):
            windows = one.as_strided((columns.blocks, 2 * columns.window, outputs), stride)
            torch.bmm(columns.backward_by_place, windows, out=target)  # j, (l, output), as the products lie
        windows = tall.as_strided((rows.blocks, 2 * rows.window, row), (rows.step * 2 * row, row, 1))
        products = _scratch.take("block's products", (3, rows.half * width, 3 * outputs), x.dtype)
        dx, dtaps = torch.empty_like(x), torch.zeros_like(taps)
        for block in range(rows.blocks):
            torch.mm(rows.backward[block], windows[block], out=products.view(3 * rows.half, row))
            own = slice(block * rows.half, (block + 1) * rows.half)
            known, target = x[own].view(-1, inputs), dx[own].view(-1, inputs)
            torch.mm(products[0], taps[0].T, out=target)
            for k in range(1, 3):
                target.addmm_(products[k], taps[k].T)
            for k in range(3):
                dtaps[k].addmm_(known.T, products[k])
        return dx, dtaps.view(3, inputs, 3, outputs).permute(3, 1, 0, 2)


def enlarged_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Enlarge one image's maps bilinearly to twice their size, then convolve them with reflection padding.

    Both are linear and act on places and on channels apart: mixing channels first, at the small size, leaves nine
    products a small pixel instead of nine a large one. Enlargement, shifts and sum are then small matrices along each
    axis.

    Args:
        x: (1, C, H, W), best channels last.
        weight: (outputs, C, 3, 3).

    Returns:
        (1, outputs, 2 H, 2 W), channels last.
    """
    y: Tensor = _EnlargedConvolution.apply(x.squeeze(0).permute(1, 2, 0).contiguous(), weight)
    return y.permute(2, 0, 1)[None]


class _EnlargedSquare(torch.autograd.Function):
    """Sum of squares of each channel of enlarged maps, from (H, W, C) before the enlargement: (C,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The sum of x times G x, G the Gram matrix of the enlargement."""
        height, width, _ = x.shape
        columns = torch.matmul(_enlargement(width, x.dtype).gram, x)
        mixed = torch.mm(_enlargement(height, x.dtype).gram, columns.flatten(1)).view_as(x)
        ctx.save_for_backward(mixed)
        return (x * mixed).sum((0, 1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """G is symmetric."""
        (mixed,) = ctx.saved_tensors
        return cast("Tensor", mixed * (2 * gradient))


def _norm_as_enlarged(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise maps (1, C, H, W) by the mean and the variance that they have once enlarged, which come after it."""
    maps = x.squeeze(0).permute(1, 2, 0)
    maps = maps - maps.mean((0, 1))  # the mean stays as it is: every pixel has the same share in the enlarged map
    variance = _EnlargedSquare.apply(maps) / (4 * maps[..., 0].numel())
    maps = torch.addcmul(bias, maps, weight * (variance + 1e-5).rsqrt())
    return maps.permute(2, 0, 1)[None]


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
        if _single(x):
            return self._single(x)
        low = F.interpolate(self.deeper(self.down(x)), scale_factor=2, mode="bilinear", align_corners=False)
        return self.up(self.norm(torch.cat([self.skip(x), low], dim=1)))

    def _single(self, x: Tensor) -> Tensor:
        """The same for one image; neither the enlarged maps are made nor the joined ones."""
        skip, low = self.skip(x), self.deeper(self.down(x))
        (convolution, *norm_and_slope), after = cast("nn.Sequential", self.up[0]), self.up[1]
        assert isinstance(convolution, GroupedConv2d)
        weight, bias, filters = self.norm.weight[0], self.norm.bias[0], convolution.weight[0]
        thin = skip.shape[1]
        skip = F.batch_norm(skip, None, None, weight[:thin], bias[:thin], training=True)
        low = _norm_as_enlarged(low, weight[thin:], bias[thin:])
        y = convolution.single(skip, filters[:, :thin]) + enlarged_convolution(low, filters[:, thin:])
        for module in norm_and_slope:
            y = module(y)
        return cast("Tensor", after(y))


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
        if _single(x):
            x = x.contiguous(memory_format=torch.channels_last)
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
    progress: Callable[[Tensor], None] | None = None,
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
        batch: images optimised together. Wide networks on a CPU run one by one whatever it is, which is quicker there.
        feature_batch: images that `features` is given at once: always exactly so many, with black ones to fill up,
            because another number means other kernels, which round otherwise. One where networks run one by one.
        progress: called after every step with the losses of the images that took it (they add up to N * steps losses).

    Returns:
        (N, 3, size, size) in [0, 1], on the targets' device.

    Raises:
        ValueError: if sizes, seeds, weights or targets do not fit together, or targets are not finite.
    """
    if min(steps, batch, feature_batch) < 1:
        raise ValueError(f"steps={steps}, batch={batch}, feature_batch={feature_batch}: each must be at least 1")
    weights = _check(targets, seeds, size, scales, layer_weights)
    one_by_one = targets[0].device.type == "cpu" and channels >= _WIDE
    if one_by_one:
        batch = feature_batch = 1
    images = []
    for first in range(0, len(seeds), batch):
        some = list(range(first, min(first + batch, len(seeds))))
        count = len(some)
        if (
            count == 1 and not one_by_one
        ):  # A single group means other kernels too, so a lone image is given its double for company.
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
                progress(losses.detach()[:count])
        assert average is not None
        images.append(average[:count])
    _scratch.free()
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
