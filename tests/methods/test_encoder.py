"""The brain encoder against the equations written out voxel by voxel, and the guarantees around it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methods.brain_it.encoder import Adapter, BrainEncoder, TappedBackbone, shift_augment, voxel_correlation

COUNTS = (5, 3, 4)
CHANNELS = (6, 9)
POSITIONS = 7


def make_encoder(**options: float) -> BrainEncoder:
    torch.manual_seed(0)
    encoder = BrainEncoder(COUNTS, CHANNELS, POSITIONS, embed_dim=10, inner=4, **options).double().eval()
    with torch.no_grad():  # larger than at the start, so that attention is far from uniform and biases matter
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return encoder


def make_features(batch: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, POSITIONS, c, generator=generator, dtype=torch.float64) for c in CHANNELS]


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + 1e-5) * norm.weight + norm.bias


def naive(encoder: BrainEncoder, features: Sequence[Tensor], voxels: Tensor) -> Tensor:
    """The paper's equations for one image, one voxel, one tap and one position at a time."""
    rows = []
    for image, listed in enumerate(voxels):
        activities = []
        for voxel in listed:
            e = encoder.voxel_embedding[voxel]
            read = []
            for tap, reader in enumerate(encoder.readers):
                q = reader.query.weight @ e + reader.query.bias
                values, scores = [], []
                for p in range(POSITIONS):
                    token = layer_norm(features[tap][image, p], reader.norm)
                    f = reader.reduce.weight @ token + reader.reduce.bias
                    k = reader.key.weight @ f + reader.key.bias + encoder.position[p]
                    values.append(f)
                    scores.append(q @ k)
                exponents = [torch.exp(s - max(scores).detach()) for s in scores]
                pooled = sum(x * f for x, f in zip(exponents, values, strict=True)) / sum(exponents)
                x = layer_norm(pooled, reader.pooled_norm)
                h = reader.mlp[0].weight @ x + reader.mlp[0].bias
                h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
                read.append(x + reader.mlp[2].weight @ h + reader.mlp[2].bias)
            weights = e @ encoder.readout
            activities.append((weights * torch.cat(read)).sum())
        rows.append(torch.stack(activities))
    return torch.stack(rows)


def gradients(encoder: BrainEncoder, features: Sequence[Tensor], output: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return list(torch.autograd.grad((output * weights).sum(), [*encoder.parameters(), *features]))


@pytest.mark.parametrize("shared", [False, True])
def test_equals_the_equations_with_gradients(shared: bool) -> None:
    encoder = make_encoder()
    features = [f.requires_grad_() for f in make_features()]
    own = torch.tensor([[0, 4, 4, 11], [5, 6, 7, 5], [8, 9, 10, 0]])  # repeats, all subjects
    voxels, listed = (own[0], own[:1].expand(3, -1)) if shared else (own, own)
    fast, slow = encoder(features, voxels), naive(encoder, features, listed)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)
    for a, b in zip(gradients(encoder, features, fast), gradients(encoder, features, slow), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_the_three_forms_of_a_shared_voxel_list_agree() -> None:
    encoder, features = make_encoder(), make_features()
    one = torch.tensor([3, 0, 9])
    expected = encoder(features, one.expand(3, -1))
    torch.testing.assert_close(encoder(features, one), expected)
    torch.testing.assert_close(encoder(features, one[None]), expected)


@pytest.mark.parametrize("chunk", [None, 1, 2, 100])
def test_predict_equals_forward_for_every_subject(chunk: int | None) -> None:
    encoder, features = make_encoder(), make_features()
    start = 0
    for subject, count in enumerate(COUNTS):
        expected = encoder(features, torch.arange(start, start + count))
        torch.testing.assert_close(encoder.predict(features, subject, chunk), expected)
        assert encoder.subject_slice(subject) == slice(start, start + count)
        start += count


def test_predict_uses_no_dropout_and_leaves_the_mode_alone() -> None:
    encoder, features = make_encoder(dropout=0.5), make_features()
    expected = encoder.predict(features, 0)
    encoder.train()
    prediction = encoder.predict(features, 0)
    assert encoder.training and encoder.readers[0].dropout.training and not prediction.requires_grad
    torch.testing.assert_close(prediction, expected)
    assert not torch.allclose(encoder(features, torch.arange(5)), expected)


def test_starts_as_published() -> None:
    torch.manual_seed(0)
    encoder = BrainEncoder([3000, 1000], [8, 8], 257, embed_dim=256, inner=16)
    assert encoder.voxel_embedding.std().item() == pytest.approx(0.1 / (2 * 16), rel=0.01)
    assert encoder.position.std().item() == pytest.approx(1 / (2 * math.sqrt(32)), rel=0.02)
    assert encoder.readout.std().item() == pytest.approx(1 / (2 * math.sqrt(32)), rel=0.02)
    assert encoder.readout.shape == (256, 32)


def test_paper_size_has_the_known_number_of_shared_weights() -> None:
    encoder = BrainEncoder([1], [1024] * 5, 257)
    shared = sum(p.numel() for p in encoder.parameters()) - encoder.voxel_embedding.numel()
    adapters = 24 * sum(p.numel() for p in Adapter(1024).parameters())
    assert round((shared + adapters) * 4 / 1e6, 1) == 9.6  # megabytes of float32, as an independent port reports


@pytest.mark.parametrize(
    ("counts", "channels", "positions"), [([], [4], 3), ([0, 2], [4], 3), ([2], [], 3), ([2], [4], 0)]
)
def test_impossible_sizes_are_named(counts: list[int], channels: list[int], positions: int) -> None:
    with pytest.raises(ValueError, match="BrainEncoder: .*expected"):
        BrainEncoder(counts, channels, positions, embed_dim=4, inner=2)


def test_wrong_input_is_named() -> None:
    encoder, features = make_encoder(), make_features()
    with pytest.raises(ValueError, match=r"features \[\(3, 7, 6\)\]; expected \(B, 7, C\) with C = \[6, 9\]"):
        encoder(features[:1], torch.arange(2))
    with pytest.raises(ValueError, match="expected"):
        encoder([], torch.arange(2))
    with pytest.raises(ValueError, match=r"voxels \(2, 4\); expected \(3, V\)"):
        encoder(features, torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"no subject 3; expected 0\.\.2"):
        encoder.predict(features, 3)
    with pytest.raises(ValueError, match="no subject -1"):
        encoder.subject_slice(-1)


def test_works_under_mixed_precision() -> None:
    torch.manual_seed(0)
    encoder = BrainEncoder([6], CHANNELS, POSITIONS, embed_dim=8, inner=4, dropout=0.0)
    features = [f.float() for f in make_features()]
    with torch.autocast("cpu", torch.bfloat16):
        low = encoder(features, torch.arange(6))
    low.float().sum().backward()
    full = encoder(features, torch.arange(6))
    assert torch.nn.functional.cosine_similarity(low.float().flatten(), full.flatten(), dim=0) > 0.99


def test_fits_a_small_synthetic_brain() -> None:
    """Voxels that read one channel at one place: the encoder has to find both, on images it has not seen."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(700, 9, 6, generator=generator)
    place, channel = torch.randint(0, 9, (12,), generator=generator), torch.randint(0, 6, (12,), generator=generator)
    brain = images[:, place, channel]
    encoder = BrainEncoder([12], [6], 9, embed_dim=16, inner=8, dropout=0.0)
    optimiser = torch.optim.Adam(encoder.parameters(), lr=1e-2)
    for step in range(240):
        rows = torch.arange(step * 50 % 600, step * 50 % 600 + 50)
        loss = torch.nn.functional.mse_loss(encoder([images[rows]], torch.arange(12)), brain[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    r = voxel_correlation(encoder.predict([images[600:]], 0), brain[600:])
    assert r.median() > 0.8


class TokenStem(nn.Module):
    """Images (B, 3, H, W) to a CLS token, two registers and one token a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 3, 5))
        self.embed = nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images.flatten(2).transpose(1, 2))
        return torch.cat([self.start.expand(len(images), -1, -1), tokens], dim=1)


def token_blocks() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(4)]


def map_blocks() -> list[nn.Module]:
    return [
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5)),
        nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU()),
        nn.Conv2d(6, 8, 3, stride=4, padding=1),
    ]


def test_new_adapters_leave_the_backbone_unchanged() -> None:
    torch.manual_seed(0)
    stem, blocks, images = TokenStem(), token_blocks(), torch.randn(2, 3, 4, 4)
    backbone = TappedBackbone(stem, blocks, [5] * 4, [1, 3], cls_token=True, n_registers=2)
    first = blocks[0](stem(images))
    third = blocks[2](blocks[1](first))
    for tapped, x in zip(backbone(images), (first, third), strict=True):
        assert torch.equal(tapped, torch.cat([x[:, :1], x[:, 3:]], dim=1))


def test_only_adapters_train_and_each_up_to_the_last_tap_does() -> None:
    torch.manual_seed(0)
    backbone = TappedBackbone(TokenStem(), token_blocks(), [5] * 4, [1, 3], rank=2, alpha=0.5)
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {f"adapters.{i}.{m}" for i in range(3) for m in ("down", "up")}
    sum(f.square().sum() for f in backbone(torch.randn(2, 3, 4, 4))).backward()
    for name, parameter in backbone.named_parameters():
        if name in trained:
            assert parameter.grad is not None and (name.endswith("up") or parameter.grad.abs().sum() > 0)
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("maps", [False, True])
def test_an_adapter_is_a_scaled_low_rank_correction(maps: bool) -> None:
    torch.manual_seed(0)
    adapter = Adapter(6, rank=2, alpha=0.5)
    assert torch.count_nonzero(adapter.down) == 0
    assert adapter.up.abs().max() <= 1 / math.sqrt(2)  # kaiming-uniform with a = sqrt(5): bound 1 / sqrt(rank)
    nn.init.normal_(adapter.down)
    tokens = torch.randn(3, 20, 6)
    expected = tokens + 0.25 * (tokens @ adapter.down.T) @ adapter.up.T
    if maps:
        result = adapter(tokens.transpose(1, 2).reshape(3, 6, 4, 5)).flatten(2).transpose(1, 2)
    else:
        result = adapter(tokens)
    torch.testing.assert_close(result, expected)


def test_maps_of_all_sizes_share_one_grid_in_row_order() -> None:
    torch.manual_seed(0)
    blocks, images = map_blocks(), torch.randn(2, 3, 16, 16)
    backbone = TappedBackbone(lambda x: x, blocks, [4, 6, 8], [1, 2, 3], rank=0, grid=4)
    features = backbone(images)
    assert backbone.tap_channels == (4, 6, 8) and [tuple(f.shape) for f in features] == [(2, 16, c) for c in (4, 6, 8)]
    x = blocks[0](images)
    for row, column in ((0, 3), (2, 1)):
        window = x[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].mean(dim=(2, 3))
        torch.testing.assert_close(features[0][:, 4 * row + column], window)


def test_a_static_backbone_repeats_itself_in_any_mode() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    backbone = TappedBackbone(lambda x: x, map_blocks(), [4, 6, 8], [2, 3], rank=0)
    assert backbone.is_static and not list(backbone.adapters.parameters())
    before = backbone(images)
    after = backbone.train()(images)  # neither dropout nor batch statistics come alive
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(before, after, strict=True))
    assert not TappedBackbone(lambda x: x, map_blocks(), [4, 6, 8], [3]).is_static


def test_a_backbone_feeds_the_encoder_and_both_train() -> None:
    torch.manual_seed(0)
    backbone = TappedBackbone(lambda x: x, map_blocks(), [4, 6, 8], [1, 3], grid=2)
    encoder = BrainEncoder([5], backbone.tap_channels, 4, embed_dim=6, inner=4)
    encoder(backbone(torch.randn(2, 3, 16, 16)), torch.arange(5)).sum().backward()
    assert all(a.down.grad is not None and a.down.grad.abs().sum() > 0 for a in backbone.adapters)
    assert encoder.voxel_embedding.grad is not None


@pytest.mark.parametrize("taps", [[], [0], [5], [2, 1], [1, 1]])
def test_impossible_taps_are_named(taps: list[int]) -> None:
    with pytest.raises(ValueError, match=r"taps .*expected ascending block numbers in 1\.\.4"):
        TappedBackbone(TokenStem(), token_blocks(), [5] * 4, taps)


def test_other_impossible_backbones_are_named() -> None:
    with pytest.raises(ValueError, match="4 blocks but 3 channel counts"):
        TappedBackbone(TokenStem(), token_blocks(), [5] * 3, [1])
    with pytest.raises(ValueError, match="rank -1"):
        TappedBackbone(TokenStem(), token_blocks(), [5] * 4, [1], rank=-1)


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 9), width=st.integers(1, 9), max_shift=st.integers(0, 12), seed=st.integers(0, 2**31),
    integers=st.booleans(),
)  # fmt: skip
def test_every_shifted_image_is_a_crop_of_the_edge_padded_one(
    height: int, width: int, max_shift: int, seed: int, integers: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (3, 2, height, width), generator=generator, dtype=torch.uint8)
    images = images if integers else images.float()
    shifted = shift_augment(images, max_shift, torch.Generator().manual_seed(seed))
    again = shift_augment(images, max_shift, torch.Generator().manual_seed(seed))
    assert shifted.dtype == images.dtype and shifted.shape == images.shape and torch.equal(shifted, again)
    margins = ((0, 0), (max_shift, max_shift), (max_shift, max_shift))
    for image, result in zip(images.numpy(), shifted.numpy(), strict=True):
        padded = np.pad(image, margins, mode="edge")
        offsets = range(2 * max_shift + 1)
        assert any(np.array_equal(padded[:, y : y + height, x : x + width], result) for y in offsets for x in offsets)


def test_shifts_are_the_images_own_and_reach_the_limit() -> None:
    row = torch.arange(16.0)
    images = (16 * row[:, None] + row).expand(500, 1, 16, 16)
    shifted = shift_augment(images, 3, torch.Generator().manual_seed(0))
    dy = 8 - shifted[:, 0, 8, 8].div(16, rounding_mode="floor")
    dx = 8 - shifted[:, 0, 8, 8] % 16
    assert sorted(dy.unique().tolist()) == sorted(dx.unique().tolist()) == [-3, -2, -1, 0, 1, 2, 3]
    assert len({(y, x) for y, x in zip(dy.tolist(), dx.tolist(), strict=True)}) == 49
    with pytest.raises(ValueError, match="max_shift -1"):
        shift_augment(images, -1)


def test_correlation_equals_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 20, 6, generator=generator)
    expected = [np.corrcoef(prediction[:, v], target[:, v])[0, 1] for v in range(6)]
    np.testing.assert_allclose(voxel_correlation(prediction + 1000, target * -3), -np.array(expected), atol=2e-4)
    np.testing.assert_allclose(voxel_correlation(prediction, target), expected, atol=1e-7)


def test_correlation_is_never_nan() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 10, 5, generator=generator)
    target[3, 0] = torch.nan  # one image missing
    prediction[:, 1] = 0.1  # collapsed
    target[:, 2] = 7e5 / 3  # dead voxel
    target[:, 3] = torch.inf  # nothing left
    kept = [i for i in range(10) if i != 3]
    r = voxel_correlation(prediction, target)
    assert r[0].item() == pytest.approx(np.corrcoef(prediction[kept, 0], target[kept, 0])[0, 1])
    assert r[1:4].tolist() == [0, 0, 0] and abs(r[4]) > 0
    assert voxel_correlation(prediction[:1], target[:1]).tolist() == [0] * 5
    with pytest.raises(ValueError, match="voxel_correlation"):
        voxel_correlation(prediction, target[:, :3])
