"""Feature maps to tokens and back, against loops written out by hand."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from methods.brain_it.vgg_tokens import VGG16, ChannelStats, FeatureTokens, TokenLayer, calibrate, fit_calibration


def merged_by_hand(layer: TokenLayer, features: torch.Tensor, width: int) -> torch.Tensor:
    """Tokens of one map (channels, size, size), number by number."""
    tokens = []
    for top in range(0, layer.size - layer.window + 1, layer.stride):
        for left in range(0, layer.size - layer.window + 1, layer.stride):
            token = [
                features[channel, top + dy, left + dx].item()
                for channel in range(layer.channels)
                for dy in range(layer.window)
                for dx in range(layer.window)
            ]
            tokens.append([token[i % len(token)] for i in range(width)])
    return torch.tensor(tokens, dtype=features.dtype)


@st.composite
def token_layers(draw: st.DrawFn) -> TokenLayer:
    window = draw(st.integers(1, 3))
    stride = draw(st.integers(1, window))
    size = window + stride * draw(st.integers(0, 3))
    return TokenLayer(draw(st.integers(1, 4)), size, window, stride)


def test_the_paper_has_7190_tokens_of_512() -> None:
    assert VGG16.layer_sizes == (3136, 3025, 784, 196, 49)
    assert VGG16.tokens == 7190
    assert VGG16.sampled_sizes == (512, 512, 128, 64, 16)
    assert [layer.dim for layer in VGG16.layers] == [256, 512, 256, 512, 512]
    assert VGG16.width == 512


def test_vgg_maps_survive_the_round_trip() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, layer.channels, layer.size, layer.size, generator=generator) for layer in VGG16.layers]
    tokens = VGG16.merge(maps)
    assert tokens.shape == (1, 7190, 512)
    assert torch.equal(tokens[:, :3136, :256], tokens[:, :3136, 256:])  # the paper's two copies
    for before, after in zip(maps, VGG16.unmerge(tokens), strict=True):
        torch.testing.assert_close(after, before)


@settings(deadline=None, max_examples=40)
@given(st.lists(token_layers(), min_size=1, max_size=3), st.integers(0, 20), st.integers(1, 2))
def test_merging_equals_the_definition_and_is_undone(layers: list[TokenLayer], spare: int, batch: int) -> None:
    layout = FeatureTokens(tuple(layers), width=max(layer.dim for layer in layers) + spare)
    generator = torch.Generator().manual_seed(spare)
    maps = [
        torch.randn(batch, layer.channels, layer.size, layer.size, generator=generator, dtype=torch.float64)
        for layer in layers
    ]
    tokens = layout.merge(maps)
    for image in range(batch):
        by_hand = [
            merged_by_hand(layer, features[image], layout.width) for layer, features in zip(layers, maps, strict=True)
        ]
        assert torch.equal(tokens[image], torch.cat(by_hand))
    for before, after in zip(maps, layout.unmerge(tokens), strict=True):
        torch.testing.assert_close(after, before)


def test_disagreeing_copies_and_overlaps_are_averaged() -> None:
    layout = FeatureTokens((TokenLayer(channels=1, size=3, window=2, stride=1),), width=8)
    tokens = torch.zeros(1, 4, 8)
    tokens[0, 0, 3] = 8.0  # the middle of the map: one of four windows, one of two copies
    tokens[0, 0, 4] = 8.0  # a corner: its only window, one of two copies
    (features,) = layout.unmerge(tokens)
    assert features[0, 0].tolist() == [[4.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_gradients_reach_the_tokens() -> None:
    layout = FeatureTokens((TokenLayer(2, 4, 2, 1),), width=12)
    tokens = torch.randn(1, 9, 12, requires_grad=True)
    (features,) = layout.unmerge(tokens)
    features.sum().backward()
    assert tokens.grad is not None and (tokens.grad > 0).all()


def test_positions_are_drawn_without_replacement_layer_by_layer() -> None:
    positions = VGG16.sample_positions(3, torch.Generator().manual_seed(0))
    assert positions.shape == (3, 1232) and positions.dtype == torch.long
    first = 0
    for part, size in zip(positions.split(VGG16.sampled_sizes, dim=1), VGG16.layer_sizes, strict=True):
        assert part.min() >= first and part.max() < first + size
        assert all(row.unique().numel() == row.numel() for row in part)
        first += size
    assert not torch.equal(positions[0], positions[1])  # every image has its own
    assert torch.equal(positions, VGG16.sample_positions(3, torch.Generator().manual_seed(0)))


def test_every_position_is_equally_likely() -> None:
    layout = FeatureTokens((TokenLayer(1, 4, sampled=4), TokenLayer(1, 2)), width=1)
    positions = layout.sample_positions(4000, torch.Generator().manual_seed(0))
    counts = torch.bincount(positions.flatten(), minlength=20)
    assert (counts[:16] - 1000).abs().max() < 130  # more than four standard deviations of Binomial(4000, 1/4)
    assert (counts[16:] == 4000).all()  # no `sampled`: all of them


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TokenLayer(4, 5, window=2, stride=2), "do not cover"),
        (lambda: TokenLayer(4, 6, window=1, stride=2), "do not cover"),
        (lambda: TokenLayer(4, 2, window=3), "do not cover"),
        (lambda: TokenLayer(0, 2), "at least 1"),
        (lambda: TokenLayer(4, 2, sampled=5), "4 tokens"),
        (lambda: FeatureTokens((TokenLayer(4, 2, window=2),), width=8), "16 numbers, more than width=8"),
    ],
)
def test_impossible_layouts_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_wrong_shapes_are_refused() -> None:
    layout = FeatureTokens((TokenLayer(2, 4),), width=4)
    with pytest.raises(ValueError, match="one a layer"):
        layout.merge([])
    with pytest.raises(ValueError, match=r"feature map 1: expected shape \(B, 2, 4, 4\)"):
        layout.merge([torch.zeros(1, 2, 4, 5)])
    with pytest.raises(ValueError, match=r"\(B, 16, 4\)"):
        layout.unmerge(torch.zeros(1, 15, 4))


def test_channel_statistics_standardise_and_are_undone() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(6, 3, 5, 5, generator=generator) * 4 + 7, torch.randn(6, 2, 2, 2, generator=generator)]
    maps[0][:, 1] = 3.3  # a dead channel
    stats = ChannelStats.fit([[features[:4] for features in maps], [features[4:] for features in maps]])
    for features, mean, std in zip(maps, stats.means, stats.stds, strict=True):
        torch.testing.assert_close(mean, features.mean((0, 2, 3)))
        alive = features.std((0, 2, 3)) > 1e-4
        torch.testing.assert_close(std[alive], features.std((0, 2, 3), correction=0)[alive])
    assert stats.stds[0][1] == 1
    standard = stats.apply(maps)
    assert standard[0][:, 1].abs().max() < 1e-6
    for before, after in zip(maps, stats.invert(standard), strict=True):
        torch.testing.assert_close(after, before)
    again = ChannelStats.from_tensors(stats.tensors())
    assert all(torch.equal(a, b) for a, b in zip(again.apply(maps), standard, strict=True))
    with pytest.raises(ValueError, match="no feature maps"):
        ChannelStats.fit([])


def test_calibration_is_ridge_regression_layer_by_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(40, 7, 6, generator=generator)
    true = predicted @ torch.randn(6, 6, generator=generator) + torch.randn(40, 7, 6, generator=generator)
    matrices = fit_calibration([(predicted[:15], true[:15]), (predicted[15:], true[15:])], (4, 3), ridge=0.5)
    for part, matrix in zip((slice(0, 4), slice(4, 7)), matrices, strict=True):
        x, y = (t[:, part].reshape(-1, 6).double().numpy() for t in (predicted, true))
        penalty = 0.5 * float((x**2).sum(0).mean())
        expected = Ridge(alpha=penalty, fit_intercept=False).fit(x, y).coef_.T
        assert matrix.numpy() == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(calibrate(predicted, (4, 3), matrices)[:, 4:], predicted[:, 4:] @ matrices[1])
    with pytest.raises(ValueError, match="no predicted tokens"):
        fit_calibration([], (4, 3))
