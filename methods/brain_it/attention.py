"""What Brain Tokens contribute to: BIT's cross-attention, looked at from the brain's side (Brain-IT, App. C.4).

Each query token belongs to a place of a feature map, each Brain Token to a cluster of voxels. The softmax weights of
the cross-attention say how much a place reads from a token; their mean over blocks and heads, seen for one token over
all places, is the token's *map*::

    maps = cross_attention(bit, betas, subject)             # recordings x places x tokens
    spatial = maps.mean(0).T.reshape(tokens, side, side)    # Fig. S12: which places a token serves, whatever is shown
    found = semantic_selectivity(maps, features)            # Fig. S13: which contents, wherever they are

Maps of one place add up to 1 over the tokens, not over the places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from methods.brain_it.transformer import BIT, CrossAttention, CrossBlock, _heads

Floats = NDArray[np.floating]


def attention_weights(attention: CrossAttention, z: Tensor, q: Tensor) -> Tensor:
    """Return the weights with which a cross-attention layer reads.

    Args:
        attention: the layer.
        z: (B, C, dim) brain tokens as the layer gets them.
        q: (B, T, dim) queries.

    Returns:
        (B, heads, T, C), rows of sum 1.
    """
    k = _heads(attention.kv(z).chunk(2, dim=-1)[0], attention.heads)
    q = _heads(q, attention.heads)
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)


@torch.no_grad()
def cross_attention(bit: BIT, betas: Tensor, subject: Tensor, queries: Tensor | None = None) -> Tensor:
    """Return how much each query reads from each Brain Token: the mean over cross-attention blocks and their heads.

    Args:
        bit: in evaluation mode.
        betas: (B, V_max) z-scored activations, padded on the right.
        subject: (B,) int64, each recording's subject as a 0-based position in the layout.
        queries: (n,) int64, the queries to look at, for all recordings the same; all where None.

    Returns:
        (B, T, C) float32, rows of sum 1; (B, n, C) with ``queries``.
    """
    tokens = bit.query_tokens if queries is None else bit.query_tokens[queries]
    q = tokens.expand(len(subject), -1, -1)
    z = bit.tokenizer(betas, subject)
    total = torch.zeros(len(subject), q.shape[1], z.shape[1], device=q.device)
    for number, cross in enumerate(bit.block_crosses):
        assert isinstance(cross, CrossBlock)
        if number:
            z = bit.blocks[number - 1](z)
        total += attention_weights(cross.attn, cross.norm1(z), q).mean(1).float()
        q = q + cross(z, q)
    return total / len(bit.block_crosses)


def centres(maps: Floats) -> Floats:
    """Return where maps are strongest: their centre of mass above each map's median.

    Args:
        maps: (C, side, side), not negative.

    Returns:
        (C, 2) x and y, fractions of the image from the left and from the top; the middle where a map is flat.
    """
    side = maps.shape[-1]
    above = np.maximum(maps - np.median(maps, axis=(1, 2), keepdims=True), 0)
    mass = above.sum((1, 2))
    at = (np.arange(side) + 0.5) / side
    with np.errstate(invalid="ignore"):
        x, y = (above.sum(1) @ at) / mass, (above.sum(2) @ at) / mass
    return np.where(mass[:, None] > 0, np.stack([x, y], axis=1), 0.5)


@dataclass(frozen=True)
class Agreement:
    """How well things of the same tokens agree, and what agreement chance brings.

    Attributes:
        value: the agreement.
        chance: its mean over random pairings of tokens.
        chance_high: the 95th percentile of these.
        p: share of random pairings that agree as well or better (one-sided, never 0).
        each: (tokens,) the agreement of each token by itself; None where there is no such thing.
    """

    value: float
    chance: float
    chance_high: float
    p: float
    each: Floats | None = None


def contralaterality(maps: Floats, right: Floats, permutations: int = 2000, seed: int = 0) -> Agreement:
    """Say whether tokens of the right hemisphere serve the left of the image, and the other way round.

    Args:
        maps: (C, side, side) spatial maps.
        right: (C,) share of each token's voxels on the right hemisphere; NaN leaves a token out.
        permutations: random pairings of tokens with hemispheres.
        seed: of these.

    Returns:
        The Pearson correlation, over tokens, of the share on the right with how far to the left the map's centre lies.
    """
    known = np.isfinite(right)
    left = 1 - centres(maps)[known, 0]
    return _permuted(_standard(right[known][None]), _standard(left[None]), permutations, seed)


def field_agreement(maps: Floats, fields: Floats, permutations: int = 2000, seed: int = 0) -> Agreement:
    """Say whether a token's map lies over its voxels' receptive fields.

    Args:
        maps: (C, side, side) spatial maps.
        fields: (C, side, side) mean receptive field of each token's voxels; NaN leaves a token out.
        permutations: random pairings of maps with other tokens' fields.
        seed: of these.

    Returns:
        The mean over tokens of the Pearson correlation of map and field, over places. Chance is not 0: all fields and
        all maps may lean to the middle.
    """
    known = np.isfinite(fields).all((1, 2))
    a, b = (_standard(x[known].reshape(known.sum(), -1).astype(np.float64)) for x in (maps, fields))
    found = _permuted(a, b, permutations, seed)
    each = np.full(len(maps), np.nan)
    each[known] = (a * b).sum(1)
    return Agreement(found.value, found.chance, found.chance_high, found.p, each)


def _standard(x: Floats) -> Floats:
    """Return rows of mean 0 and length 1; a constant row becomes zero."""
    x = x - x.mean(1, keepdims=True)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def _permuted(a: Floats, b: Floats, permutations: int, seed: int) -> Agreement:
    """Compare the mean inner product of rows with those after shuffling ``a``: its rows, or of one row the columns."""
    rng = np.random.default_rng(seed)
    value = float((a * b).sum(1).mean())
    if len(a) == 1:
        drawn = np.array([float(a[0][rng.permutation(a.shape[1])] @ b[0]) for _ in range(permutations)])
    else:
        products = a @ b.T
        rows = np.arange(len(a))
        drawn = np.array([float(products[rng.permutation(len(a)), rows].mean()) for _ in range(permutations)])
    p = (1 + int((drawn >= value - 1e-12).sum())) / (1 + permutations)
    return Agreement(value, float(drawn.mean()), float(np.quantile(drawn, 0.95)), p)


@dataclass(frozen=True)
class Selectivity:
    """Which contents of images the tokens attend to.

    Attributes:
        top: (C, k) images in which each token's attention stands out most, the most first.
        z: (C,) how much more alike the attended contents of these images are than the same maps laid over other
            images, in standard deviations of the latter.
    """

    top: NDArray[np.int64]
    z: Floats


def semantic_selectivity(
    maps: Floats, features: Floats, k: int = 8, permutations: int = 100, seed: int = 0
) -> Selectivity:
    """Find what each token attends to beyond the places that it always serves (Fig. S13).

    A token's attention to an image *stands out* where it exceeds the token's mean map. Its top images are those where
    it does most; features under what stands out, averaged, are the contents attended to. Alike contents in the top
    images mean a token that is after something; maps laid over other images' features say how alike contents are by
    place alone.

    Args:
        maps: (n, T, C) attention on n images.
        features: (n, T, D) what the images hold at the same places.
        k: top images; as many as there are where fewer.
        permutations: other images that each map is laid over.
        seed: of these.

    Returns:
        See :class:`Selectivity`.

    Raises:
        ValueError: fewer than three images, or shapes that do not fit.
    """
    if maps.shape[:2] != features.shape[:2] or len(maps) < 3:
        raise ValueError(f"maps {maps.shape}, features {features.shape}; expected alike places of 3 images or more")
    n, _, tokens = maps.shape
    k = min(k, n)
    rng = np.random.default_rng(seed)
    outstanding = np.maximum(maps - maps.mean(0), 0)
    content = features - features.mean(0)
    strength = outstanding.max(1)
    top = np.argsort(-strength, axis=0, kind="stable")[:k].T
    z = np.empty(tokens)
    for token in range(tokens):
        own = outstanding[top[token], :, token]
        own = own / np.maximum(own.sum(1, keepdims=True), np.finfo(np.float32).tiny)
        alike = _likeness(np.einsum("kp,kpd->kd", own, content[top[token]]))
        drawn = [
            _likeness(np.einsum("kp,kpd->kd", own, content[rng.choice(n, k, replace=False)]))
            for _ in range(permutations)
        ]
        z[token] = (alike - np.mean(drawn)) / max(float(np.std(drawn)), 1e-9)
    return Selectivity(top.astype(np.int64), z)


def _likeness(x: Floats) -> float:
    """Return the mean cosine of all pairs of rows."""
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return float((np.linalg.norm(x.sum(0)) ** 2 - len(x)) / (len(x) * (len(x) - 1)))
