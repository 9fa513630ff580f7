"""What Brain Tokens contribute to: the weights are the model's own, and the measures find what was planted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from methods.brain_it.attention import (
    attention_weights,
    centres,
    contralaterality,
    cross_attention,
    field_agreement,
    semantic_selectivity,
)
from methods.brain_it.tokenizer import VoxelLayout
from methods.brain_it.transformer import BIT, CrossAttention


def make_bit(depth: int = 2, heads: int = 3) -> BIT:
    """A model of two subjects with 11 and 9 voxels in 4 clusters, whose attention is far from even."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    layout = VoxelLayout.build([rng.integers(0, 4, 11), rng.integers(0, 4, 9)], 4)
    bit = BIT(layout, dim=12, depth=depth, heads=heads, n_queries=9, out_dim=5)
    with torch.no_grad():
        for parameter in bit.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return bit.eval()


def recordings() -> tuple[Tensor, Tensor]:
    betas = torch.randn(5, 11, generator=torch.Generator().manual_seed(1))
    subject = torch.tensor([0, 1, 1, 0, 1])
    betas[subject == 1, 9:] = 0
    return betas, subject


# --- the weights ------------------------------------------------------------------------------------------------------


def test_weights_are_those_with_which_the_layer_reads() -> None:
    torch.manual_seed(0)
    layer = CrossAttention(12, 3)
    z, q = torch.randn(2, 4, 12), torch.randn(2, 7, 12)
    weights = attention_weights(layer, z, q)
    assert weights.shape == (2, 3, 7, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7))
    values = layer.kv(z)[..., 12:].unflatten(-1, (3, 4)).transpose(1, 2)
    torch.testing.assert_close(layer.proj((weights @ values).transpose(1, 2).flatten(2)), layer(z, q))


@pytest.mark.parametrize(("depth", "heads"), [(0, 1), (1, 2), (2, 3)])
def test_a_map_is_the_mean_of_what_the_blocks_do_in_a_forward_pass(depth: int, heads: int) -> None:
    """The model itself runs; what its layers are given is written down, and the softmax taken anew, head by head."""
    bit, (betas, subject) = make_bit(depth, heads), recordings()
    given_to: list[tuple[CrossAttention, Tensor, Tensor]] = []

    def note(layer: Any, arguments: tuple[Tensor, Tensor], output: Tensor) -> None:
        given_to.append((layer, *arguments))

    handles = [cross.attn.register_forward_hook(note) for cross in bit.block_crosses]  # type: ignore[union-attr]
    with torch.no_grad():
        bit(betas, subject)
    for handle in handles:
        handle.remove()
    assert len(given_to) == depth + 1
    width = 12 // heads
    expected = torch.zeros(5, 9, 4)
    for layer, z, q in given_to:
        keys = z @ layer.kv.weight[:12].T
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = torch.einsum("btd,bcd->btc", q[..., part], keys[..., part]) / width**0.5
            expected += scores.softmax(-1) / heads / (depth + 1)
    found = cross_attention(bit, betas, subject)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(-1), torch.ones(5, 9))
    assert float(found.std(1).max()) > 0.02, "an even map would hide mistakes"


def test_some_queries_have_the_maps_of_all_and_recordings_do_not_meet() -> None:
    bit, (betas, subject) = make_bit(), recordings()
    every = cross_attention(bit, betas, subject)
    torch.testing.assert_close(
        cross_attention(bit, betas, subject, torch.tensor([7, 2])), every[:, [7, 2]], rtol=1e-5, atol=1e-6
    )
    for k in range(5):
        torch.testing.assert_close(cross_attention(bit, betas[k : k + 1], subject[k : k + 1])[0], every[k])


# --- centres ----------------------------------------------------------------------------------------------------------


@given(x=st.integers(0, 6), y=st.integers(0, 6), floor=st.floats(0, 10), height=st.floats(0.1, 10))
def test_the_centre_of_a_peak_is_the_peak(x: int, y: int, floor: float, height: float) -> None:
    one = np.full((1, 7, 7), floor)
    one[0, y, x] += height
    np.testing.assert_allclose(centres(one), [[(x + 0.5) / 7, (y + 0.5) / 7]], atol=1e-9)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_mirrored_maps_have_mirrored_centres(seed: int) -> None:
    maps = np.random.default_rng(seed).random((4, 6, 6))
    x, y = centres(maps).T
    np.testing.assert_allclose(centres(maps[:, :, ::-1]), np.stack([1 - x, y], 1), atol=1e-12)
    np.testing.assert_allclose(centres(maps.transpose(0, 2, 1)), np.stack([y, x], 1), atol=1e-12)


def test_a_flat_map_has_its_centre_in_the_middle() -> None:
    np.testing.assert_array_equal(centres(np.full((2, 4, 4), 0.25)), np.full((2, 2), 0.5))


# --- agreement, and chance --------------------------------------------------------------------------------------------


def bumps(centre: NDArray[np.floating], side: int = 8) -> NDArray[np.floating]:
    at = (np.arange(side) + 0.5) / side
    away = (at[None, None, :] - centre[:, 0, None, None]) ** 2 + (at[None, :, None] - centre[:, 1, None, None]) ** 2
    return np.exp(-away / 0.05)


def test_crossed_wiring_is_found_and_straight_wiring_is_not() -> None:
    rng = np.random.default_rng(0)
    right = (np.arange(30) % 2).astype(float)
    place = rng.uniform(0.1, 0.4, (30, 2))
    crossed = place * [1, 2]
    crossed[right == 0, 0] = 1 - crossed[right == 0, 0]
    found = contralaterality(bumps(crossed), right)
    assert found.value > 0.9 and found.p < 0.001 and found.value > found.chance_high
    straight = contralaterality(bumps(crossed)[:, :, ::-1], right)
    assert straight.value == pytest.approx(-found.value) and straight.p > 0.99
    with_empty = contralaterality(bumps(np.vstack([crossed, [[0.9, 0.5]]])), np.append(right, np.nan))
    assert with_empty.value == pytest.approx(found.value), "a cluster without voxels says nothing"


def test_contralaterality_is_the_correlation() -> None:
    rng = np.random.default_rng(1)
    maps, right = rng.random((20, 5, 5)), rng.random(20)
    assert contralaterality(maps, right).value == pytest.approx(np.corrcoef(1 - centres(maps)[:, 0], right)[0, 1])


def test_maps_over_their_fields_are_found_against_a_chance_that_is_not_zero() -> None:
    """All fields lean to the middle, so any map agrees with any field somewhat: chance says how much."""
    rng = np.random.default_rng(0)
    place = 0.5 + 0.12 * rng.standard_normal((40, 2))
    fields = bumps(place)
    maps = 0.002 * bumps(place + 0.03 * rng.standard_normal((40, 2))) + 0.01
    found = field_agreement(maps, fields)
    assert found.value > found.chance_high > found.chance > 0.2 and found.p < 0.001
    each = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(maps, fields, strict=True)]
    assert found.each is not None
    np.testing.assert_allclose(found.each, each)
    assert found.value == pytest.approx(np.mean(each))
    other = field_agreement(maps[rng.permutation(40)], fields)
    assert other.chance == pytest.approx(found.chance, abs=0.02) and other.p > 0.01
    fields[3] = np.nan
    known = field_agreement(maps, fields)
    assert (
        known.each is not None and np.isnan(known.each[3]) and known.value == pytest.approx(np.delete(each, 3).mean())
    )


def test_p_values_of_unrelated_things_are_even() -> None:
    rng = np.random.default_rng(5)
    p = [field_agreement(rng.random((12, 3, 3)), rng.random((12, 3, 3)), permutations=99, seed=k).p for k in range(200)]
    p += [contralaterality(rng.random((12, 4, 4)), rng.random(12), permutations=99, seed=k).p for k in range(200)]
    counts, _ = np.histogram(p, bins=4, range=(0, 1))
    assert counts.min() > 70 and min(p) >= 0.01


# --- contents ---------------------------------------------------------------------------------------------------------


def planted(n: int = 60, places: int = 16, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32], set[int]]:
    """Images of noise, some with a thing somewhere; token 0 attends to the thing, token 1 to a place, 2 to noise."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n, places, 10)).astype(np.float32)
    maps = 0.3 + 0.02 * rng.random((n, places, 3)).astype(np.float32)
    maps[:, 5, 1] += 0.4
    thing = 3 * rng.standard_normal(10)
    holders = rng.choice(n, 12, replace=False)
    for image in holders:
        place = rng.integers(places)
        features[image, place] += thing
        maps[image, place, 0] += 0.2
    return maps, features, set(holders.tolist())


def test_a_token_that_is_after_something_is_told_from_one_that_is_not() -> None:
    maps, features, holders = planted()
    found = semantic_selectivity(maps, features, k=8)
    assert found.top.shape == (3, 8) and set(found.top[0].tolist()) <= holders
    assert found.z[0] > 5 and abs(found.z[1]) < 3 and abs(found.z[2]) < 3
    assert all(len(set(row)) == 8 for row in found.top.tolist())
    again = semantic_selectivity(maps, features, k=8)
    assert np.array_equal(again.z, found.z) and np.array_equal(again.top, found.top)


def test_few_images_and_wrong_shapes() -> None:
    maps, features, _ = planted(n=13)
    assert semantic_selectivity(maps[:4], features[:4], k=8).top.shape == (3, 4)
    for wrong in (features[:12], features[:, :15]):
        with pytest.raises(ValueError, match="expected alike places"):
            semantic_selectivity(maps, wrong)
    with pytest.raises(ValueError, match="of 3 images or more"):
        semantic_selectivity(maps[:2], features[:2])
