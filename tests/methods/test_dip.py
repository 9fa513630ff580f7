"""The deep image prior: against one network of ordinary torch layers, and image by image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmark.perf import dip
from benchmark.perf.dip import plain_hourglass
from benchmark.perf.entries import Job
from methods.brain_it.dip import GroupedConv2d, GroupedNorm, Hourglass, enlarged_convolution, invert

SMALL: dict[str, Any] = {"size": 32, "feature_size": 32, "channels": 4, "depth": 5, "scales": 2, "lr": 1e-2, "ema": 0.9}


def features(images: torch.Tensor) -> list[torch.Tensor]:
    """A small frozen network, the same at every call."""
    generator = torch.Generator().manual_seed(9)
    first = torch.randn(4, 3, 3, 3, generator=generator).to(images) / 5
    second = torch.randn(6, 4, 3, 3, generator=generator).to(images) / 6
    early = F.relu(F.conv2d(images, first, padding=1))
    return [early, F.relu(F.conv2d(early, second, stride=2))]


def pictures(count: int, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return F.interpolate(torch.rand(count, 3, 4, 4, generator=generator), (size, size), mode="bicubic").clamp(0, 1)


def some(targets: Sequence[torch.Tensor], which: slice) -> list[torch.Tensor]:
    return [target[which] for target in targets]


def test_the_paper_network_has_the_parameters_of_ulyanovs() -> None:
    count = sum(parameter.numel() for parameter in Hourglass(1).parameters())
    assert count == sum(parameter.numel() for parameter in plain_hourglass().parameters()) == 1_278_945


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_grouped_convolution_is_one_convolution_an_image(kernel: int, stride: int) -> None:
    grouped = GroupedConv2d(3, 5, 4, kernel, stride)
    grouped.initialise([torch.Generator().manual_seed(seed) for seed in range(3)])
    x = torch.randn(3, 5, 8, 8)
    single = nn.Conv2d(5, 4, kernel, stride, padding=kernel // 2, padding_mode="reflect")
    for image, output in enumerate(grouped(x)):
        single.load_state_dict({"weight": grouped.weight[image], "bias": grouped.bias[image]})
        torch.testing.assert_close(output, single(x[image][None])[0])


def test_grouped_norm_is_batch_norm_of_single_images_and_instance_norm() -> None:
    grouped = GroupedNorm(3, 4).double()
    nn.init.normal_(grouped.weight)
    nn.init.normal_(grouped.bias)
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    single = nn.BatchNorm2d(4).double()
    for image, output in enumerate(grouped(x)):
        single.load_state_dict({"weight": grouped.weight[image], "bias": grouped.bias[image]}, strict=False)
        torch.testing.assert_close(output, single(x[image][None])[0])
    affine = (F.instance_norm(x) * grouped.weight[:, :, None, None]) + grouped.bias[:, :, None, None]
    torch.testing.assert_close(grouped(x), affine)


def test_initial_weights_are_torchs_default() -> None:
    convolution = GroupedConv2d(2, 8, 50, 3)
    convolution.initialise([torch.Generator().manual_seed(seed) for seed in (0, 1)])
    bound = (8 * 9) ** -0.5
    assert 0.99 * bound < convolution.weight.abs().max() <= bound
    assert convolution.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not torch.equal(convolution.weight[0], convolution.weight[1])


@pytest.mark.parametrize("images", [1, 2])  # one image alone takes another way
def test_the_whole_network_equals_the_plain_one_gradients_too(images: int) -> None:
    grouped = Hourglass(images, depth=5, channels=4, skip=2, scales=3)
    grouped.initialise([torch.Generator().manual_seed(seed) for seed in range(images)])
    grouped = grouped.double()
    x = torch.rand(images, 5, 32, 32, dtype=torch.float64)
    output = grouped(x)
    output.square().sum().backward()
    for image in range(images):
        plain = plain_hourglass(depth=5, channels=4).double()
        pairs = list(zip(plain.parameters(), grouped.parameters(), strict=True))
        with torch.no_grad():
            for mine, theirs in pairs:
                mine.copy_(theirs[image])
        alone = plain(x[image][None])
        alone.square().sum().backward()
        torch.testing.assert_close(output[image], alone[0])
        for mine, theirs in pairs:
            assert mine.grad is not None and theirs.grad is not None
            torch.testing.assert_close(theirs.grad[image], mine.grad, atol=1e-10, rtol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(1, 2), (3, 4), (8, 5), (16, 32), (28, 14), (56, 20)])
def test_the_convolution_of_enlarged_maps_is_that_of_the_enlarged_maps(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, height, width, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 5, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    enlarged = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    expected = F.conv2d(F.pad(enlarged, (1, 1, 1, 1), mode="reflect"), weight)
    found = enlarged_convolution(x, weight)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    gradient = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(found, (x, weight), gradient),
        torch.autograd.grad(expected, (x, weight), gradient),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-9)


def test_a_wide_network_has_the_loss_curve_of_the_plain_one() -> None:
    """Step by step, at the width from which images run one by one; in float64, since steps amplify rounding."""
    job = Job(quick=True, device="cpu", threads=1)
    inputs = dip._inputs(job)
    inputs.network.double()
    inputs.targets[:] = [target.double() for target in inputs.targets]
    ours, plain = dip.ours(inputs, job), dip.reference(inputs, job)
    (curves,) = (value for name, value in plain.items() if "loss" in name)
    assert curves.shape == (2, 3) and (curves[:, 0] == 1).all() and (np.abs(curves[:, 1:] - 1) > 1e-3).all()
    for name, value in ours.items():
        np.testing.assert_allclose(value, plain[name], atol=1e-9)
    alone = dip._Inputs(inputs.network, [target[1:] for target in inputs.targets], inputs.seeds[1:], inputs.sizes)
    image = invert(
        alone.targets,
        alone.features,
        seeds=alone.seeds,
        size=32,
        feature_size=32,
        steps=3,
        channels=64,
        depth=5,
        scales=2,
    )
    np.testing.assert_array_equal(image, ours["images"][1:])


def test_an_image_does_not_depend_on_its_batch() -> None:
    targets = [target.double() for target in features(pictures(3))]
    seeds = [11, 12, 13]
    together = invert(targets, features, seeds=seeds, steps=15, **SMALL)
    for image in range(3):
        own = slice(image, image + 1)
        alone = invert(some(targets, own), features, seeds=seeds[own], steps=15, **SMALL)
        torch.testing.assert_close(alone, together[own], atol=1e-6, rtol=0)
    chunked = invert(targets, features, seeds=seeds, steps=15, batch=2, **SMALL)
    torch.testing.assert_close(chunked, together, atol=1e-6, rtol=0)
    backwards = invert([t.flip(0) for t in targets], features, seeds=seeds[::-1], steps=15, **SMALL)
    torch.testing.assert_close(backwards.flip(0), together, atol=1e-6, rtol=0)


def test_not_even_its_rounding_depends_on_the_batch() -> None:
    targets = features(pictures(3))
    options = {**SMALL, "channels": 12, "steps": 10}
    together = invert(targets, features, seeds=[4, 5, 6], **options)
    assert torch.equal(invert(targets, features, seeds=[4, 5, 6], batch=1, **options), together)
    assert torch.equal(invert(some(targets, slice(1, 3)), features, seeds=[5, 6], **options), together[1:])
    in_pairs = invert(targets, features, seeds=[4, 5, 6], feature_batch=2, **options)
    torch.testing.assert_close(in_pairs, together, atol=1e-2, rtol=0)


def test_same_seeds_same_images() -> None:
    targets = features(pictures(2))
    one = invert(targets, features, seeds=[0, 1], steps=5, **SMALL)
    assert torch.equal(one, invert(targets, features, seeds=[0, 1], steps=5, **SMALL))
    other = invert(targets, features, seeds=[0, 2], steps=5, **SMALL)
    assert not torch.allclose(one[1], other[1], atol=1e-3)


def test_the_image_comes_to_resemble_the_target() -> None:
    wanted = pictures(2)
    losses: list[float] = []
    progress: list[int] = []

    def note(found: torch.Tensor) -> None:
        progress.append(len(found))
        losses.append(float(found.mean()))

    found = invert(features(wanted), features, seeds=[0, 1], steps=150, progress=note, **{**SMALL, "channels": 12})
    assert found.shape == wanted.shape
    assert found.min() >= 0 and found.max() <= 1
    assert sum(progress) == 2 * 150
    assert losses[-1] < 0.1 * losses[0]
    for image, target in zip(found, wanted, strict=True):
        assert torch.corrcoef(torch.stack([image.flatten(), target.flatten()]))[0, 1] > 0.7


def test_the_result_is_the_average_of_the_outputs() -> None:
    targets = features(pictures(2))
    outputs: list[torch.Tensor] = []

    def watched(images: torch.Tensor) -> list[torch.Tensor]:
        outputs.append(images[:2].detach().clone())
        return features(images)

    found = invert(targets, watched, seeds=[0, 1], steps=3, **SMALL)
    expected = 0.9 * (0.9 * outputs[0] + 0.1 * outputs[1]) + 0.1 * outputs[2]
    torch.testing.assert_close(found, expected)


def test_features_see_resized_images_sixteen_at_a_time() -> None:
    sizes = set()

    def watched(images: torch.Tensor) -> list[torch.Tensor]:
        sizes.add(tuple(images.shape))
        return features(images)

    options = {**SMALL, "feature_size": 16}
    found = invert(features(pictures(2, 16)), watched, seeds=[0, 1], steps=2, **options)
    assert sizes == {(16, 3, 16, 16)} and found.shape == (2, 3, 32, 32)


def test_a_layer_of_weight_zero_plays_no_part() -> None:
    early, late = features(pictures(1))
    one = invert([early, late], features, seeds=[0], steps=3, layer_weights=[2, 0], **SMALL)
    other = invert([early, late + 5], features, seeds=[0], steps=3, layer_weights=[1, 0], **SMALL)
    torch.testing.assert_close(one, other)


def test_the_feature_network_is_left_alone() -> None:
    network = nn.Conv2d(3, 4, 3)
    wanted = [network(pictures(1)).detach()]
    invert(wanted, lambda images: [network(images)], seeds=[0], steps=2, **SMALL)
    assert network.weight.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 30}, "multiple of 4"),
        ({"size": 4}, "at least 8"),
        ({"seeds": [0]}, "2 images but there are 1 seeds"),
        ({"layer_weights": [1.0]}, "expected 2 weights"),
        ({"layer_weights": [0.0, 0.0]}, "not all zero"),
        ({"steps": 0}, "steps=0"),
        ({"batch": 0}, "batch=0"),
        ({"feature_size": 16}, "feature network gives maps"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    options = {"seeds": [0, 1], "steps": 1, **SMALL, **change}
    with pytest.raises(ValueError, match=message):
        invert(features(pictures(2)), features, **options)


def test_targets_that_are_not_finite_are_refused() -> None:
    early, late = features(pictures(1))
    with pytest.raises(ValueError, match="target layer 2 holds values that are not finite"):
        invert([early, late * float("nan")], features, seeds=[0], **SMALL)
