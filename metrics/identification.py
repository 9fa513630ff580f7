"""Identification from one truth-by-reconstruction matrix: two-way, any n-way, retrieval; and the distance of a pair.

The published code forms ``np.corrcoef(truth, recon)``, a (2N, 2N) float64 matrix, and keeps a quarter of it. Here only
that quarter is computed, with float32 products. Comparisons that float32 could get wrong (a correlation within 1e-5 of
the own one) are redone in float64 by one routine that gives equal rows bitwise equal values, so ranks and ties are
those of float64 and do not depend on N or the order of the images.

Unless told otherwise each reconstruction is tried against all truths ("recon-to-truth"), as the published code has it;
"truth-to-recon" tries each truth against all reconstructions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from math import comb
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metrics.protocols import Direction, Ties

Floats = NDArray[np.float64]

_COLUMNS = 8192  # features a block: two (1000, 8192) float32 blocks are 64 MB
# How near a value must come to the own one to be redone: far above the error of float32 products (2e-7 measured on
# 184,512 features). Where very many do (features that hardly differ between images), float64 products leave only true
# ties.
_BANDS: tuple[tuple[type[np.floating], float], ...] = ((np.float32, 1e-5), (np.float64, 1e-12))
_WORTH_THREADS = 1 << 22  # features in all, below which starting threads costs more than they save
_MOST_NEAR = 4  # values to redo one by one, per column
_NO_VARIANCE = 1e-12  # centred norm over raw norm below which a row is constant up to float64 rounding


def pairwise_correlation(truth: ArrayLike, recon: ArrayLike) -> Floats:
    """Return the Pearson correlation of each pair of rows in float64; NaN where a row is constant.

    Args:
        truth, recon: (N, F).

    Returns:
        (N,) in [-1, 1].
    """
    return _paired(*_two_sets(truth, recon))[0]


def correlation_distance(truth: ArrayLike, recon: ArrayLike) -> Floats:
    """Return 1 - Pearson of each pair of rows, (N,) in [0, 2]; NaN where a row is constant.

    Equals ``scipy.spatial.distance.correlation``.
    """
    return 1.0 - pairwise_correlation(truth, recon)


def correlation_matrix(truth: ArrayLike, recon: ArrayLike, direction: Direction = "recon-to-truth") -> Floats:
    """Return r[i, j] = Pearson(truth i, reconstruction j): the cross block of ``np.corrcoef(truth, recon)``.

    The diagonal and every value within 1e-5 of its column's diagonal (of its row's, for "truth-to-recon") are
    float64-exact, the others accurate to about 1e-6. Rows and columns of constant features are NaN.

    Args:
        truth, recon: (N, F), row k of both belonging to image k.
        direction: along which comparisons must be exact.

    Returns:
        (N, N) float64.

    Raises:
        ValueError: the two differ in shape, or hold a value that is not finite.
    """
    truth, recon = _two_sets(truth, recon)
    own, *moments = _paired(truth, recon)
    truths, recons = (truth, moments[0]), (recon, moments[1])
    if direction == "recon-to-truth":
        r = _cross_correlation(truths, recons, own, paired=True)
    else:
        r = _cross_correlation(recons, truths, own, paired=True).T
    np.fill_diagonal(r, own)
    return r


@dataclass(frozen=True)
class Comparisons:
    """How each reconstruction's own truth fared against the others (or each truth's own reconstruction).

    ``lower``, ``equal``, ``undefined``: (N,) counts of others that correlate less, exactly as much, or in no defined
    way (a constant feature vector on either side); they add up to ``others``, or less.
    """

    lower: NDArray[np.int64]
    equal: NDArray[np.int64]
    undefined: NDArray[np.int64]
    others: int

    def won_and_tied(self, ties: Ties) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the comparisons that count as won and as drawn; undefined ones count as ties do."""
        if ties == "strict":
            return self.lower, np.zeros_like(self.lower)
        return self.lower, self.equal + self.undefined


def compare(r: Floats, direction: Direction = "recon-to-truth") -> Comparisons:
    """Count, for every reconstruction j, the truths i != j with r[i, j] below, equal to, or undefined beside r[j, j].

    Direction "truth-to-recon" counts for every truth i the reconstructions j != i beside r[i, i].

    Raises:
        ValueError: ``r`` is not a square matrix of at least two images.
    """
    r = np.asarray(r, dtype=np.float64)
    if r.ndim != 2 or r.shape[0] != r.shape[1] or len(r) < 2:
        raise ValueError(f"identification needs a square matrix of at least 2 images, not one of shape {r.shape}")
    r = r if direction == "recon-to-truth" else r.T
    own = np.diagonal(r)
    # The own comparison is never lower than itself, but it is equal to itself (or undefined): take it out again.
    undefined = np.isnan(r) | np.isnan(own)
    return Comparisons(
        lower=(r < own).sum(axis=0),
        equal=(r == own).sum(axis=0) - ~np.isnan(own),
        undefined=undefined.sum(axis=0) - np.isnan(own),
        others=len(r) - 1,
    )


def wins(r: Floats, ties: Ties = "strict", direction: Direction = "recon-to-truth") -> Floats:
    """Return how many truths i each reconstruction j beats: #{i : r[i, j] < r[j, j]}, plus half the ties if asked."""
    won, tied = compare(r, direction).won_and_tied(ties)
    return won + 0.5 * tied


def two_way(r: Floats, ties: Ties = "strict", direction: Direction = "recon-to-truth") -> Floats:
    """Return each reconstruction's two-way identification score, wins / (N - 1), (N,) in [0, 1]."""
    return wins(r, ties, direction) / (len(r) - 1)


def n_way_top1(r: Floats, n: int, ties: Ties = "strict", direction: Direction = "recon-to-truth") -> Floats:
    """Return each reconstruction's chance of finding its truth among n - 1 other truths drawn without replacement.

    Exact, without drawing: with w wins among N - 1 it is C(w, n-1) / C(N-1, n-1); where ties count half, the truth
    shares first place evenly with those that tie. n = 2 gives :func:`two_way`, n = N gives :func:`top1`.

    Args:
        r: (N, N) from :func:`correlation_matrix`.
        n: 2 .. N.
        ties: "strict" or "half".
        direction: "truth-to-recon" lets each truth find its reconstruction.

    Returns:
        (N,) in [0, 1].
    """
    return _n_way(compare(r, direction), n, ties)


def top1(r: Floats, ties: Ties = "strict", direction: Direction = "recon-to-truth") -> Floats:
    """Return 1 for each reconstruction whose own truth correlates best among all N, else 0; (N,)."""
    return n_way_top1(r, len(r), ties, direction)


def pool_n_way_top1(truth: ArrayLike, recon: ArrayLike, pool: ArrayLike, n: int, ties: Ties = "strict") -> Floats:
    """Return each reconstruction's chance of finding its truth among n - 1 images drawn from a separate pool.

    This is the expectation, over all draws, of what Brain-IT's evaluation estimates by one random draw.

    Args:
        truth, recon: (N, F).
        pool: (M, F) with M >= n - 1; none of it a test image.
        n: candidates, the truth included.
        ties: "strict" or "half".

    Returns:
        (N,) in [0, 1].
    """
    truth, recon = _two_sets(truth, recon)
    pool = _rows(pool, "pool")
    if pool.shape[1] != recon.shape[1]:
        raise ValueError(
            f"the retrieval pool has {pool.shape[1]} features an image, the reconstructions {recon.shape[1]}"
        )
    own, _, moments = _paired(truth, recon)
    r = _cross_correlation((pool, _moments(pool)), (recon, moments), own)
    comparisons = Comparisons(
        lower=(r < own).sum(axis=0),
        equal=(r == own).sum(axis=0),
        undefined=(np.isnan(r) | np.isnan(own)).sum(axis=0),
        others=len(pool),
    )
    return _n_way(comparisons, n, ties)


def _n_way(comparisons: Comparisons, n: int, ties: Ties) -> Floats:
    if not 2 <= n <= comparisons.others + 1:
        raise ValueError(
            f"{n}-way identification needs n between 2 and {comparisons.others + 1}, the candidates there are"
        )
    draws = comb(comparisons.others, n - 1)

    # Sum over the number k of tied rivals drawn, each leaving a 1/(k+1) share of first place:
    # sum_k C(w, n-1-k) C(e, k) / (k+1) = [C(w+e+1, n) - C(w, n)] / (e+1); with e = 0 this is C(w, n-1).
    @cache
    def chance(won: int, tied: int) -> float:
        return (comb(won + tied + 1, n) - comb(won, n)) / ((tied + 1) * draws)

    won, tied = comparisons.won_and_tied(ties)
    return np.array([chance(int(w), int(e)) for w, e in zip(won, tied, strict=True)], dtype=np.float64)


def _centred(row: NDArray[np.floating]) -> tuple[Floats, float, float]:
    """Return the row less its mean in float64, that mean, and the norm of what is left: NaN for a constant row."""
    x = row.astype(np.float64)
    mean = float(x.mean())
    x -= mean
    norm = float(np.sqrt(_dot(x, x)))
    constant = norm <= _NO_VARIANCE * np.hypot(norm, mean * np.sqrt(x.size))
    return x, mean, float("nan") if constant else norm


def _dot(x: Floats, y: Floats) -> float:
    # Not BLAS: its sum depends on the number of threads, and waking them for one row costs more than the row.
    return float(np.einsum("f,f->", x, y))


def _correlation(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Pearson of two vectors in float64: always the same operations in the same order, so equal inputs tie bitwise."""
    return _pair(a, b)[0]


def _pair(a: NDArray[np.floating], b: NDArray[np.floating]) -> tuple[float, float, float, float, float]:
    """Return Pearson of two vectors, then mean and centred norm of each."""
    x, mean_x, norm_x = _centred(a)
    y, mean_y, norm_y = _centred(b)
    r = float(np.clip(_dot(x, y) / (norm_x * norm_y), -1.0, 1.0))
    return r, mean_x, norm_x, mean_y, norm_y


@dataclass(frozen=True)
class _Moments:
    """Mean and centred norm of each row, in float64; the norm of a constant row is NaN."""

    mean: Floats
    norm: Floats


_Set = tuple[NDArray[np.floating], _Moments]


def _moments(x: NDArray[np.floating]) -> _Moments:
    mean, norm = np.array(_by_row(lambda row: _centred(row)[1:], x)).T
    return _Moments(mean, norm)


def _paired(truth: NDArray[np.floating], recon: NDArray[np.floating]) -> tuple[Floats, _Moments, _Moments]:
    """Return Pearson of each pair of rows, and the moments of both sides: features are read once for all three."""
    own, mean_x, norm_x, mean_y, norm_y = np.array(_by_row(_pair, truth, recon), dtype=np.float64).T
    return own, _Moments(mean_x, norm_x), _Moments(mean_y, norm_y)


def _cross_correlation(rows: _Set, columns: _Set, own: Floats, paired: bool = False) -> Floats:
    """Pearson of each row of ``rows`` (M, F) with each of ``columns`` (N, F), exact where it comes near ``own`` (N,).

    Where the two are ``paired`` the diagonal is left for the caller to fill with ``own``.
    """
    for dtype, band in _BANDS:
        r = _products(rows, columns, dtype)
        near = np.abs(r - own) < band
        if paired:
            np.fill_diagonal(near, False)
        if near.sum() <= _MOST_NEAR * len(own):
            break
    for i, j in np.argwhere(near):
        r[i, j] = _correlation(rows[0][i], columns[0][j])
    return r


def _products(rows: _Set, columns: _Set, dtype: type[np.floating]) -> Floats:
    """Pearson of each row with each column by products of ``dtype``, a block of features at a time."""
    features = rows[0].shape[1]
    buffers = [np.empty((len(x), min(_COLUMNS, features)), dtype) for x, _ in (rows, columns)]
    r = np.zeros((len(rows[0]), len(columns[0])))
    for start in range(0, features, _COLUMNS):
        block = slice(start, min(start + _COLUMNS, features))
        a, b = (
            _standardised(x, moments, block, buffer)
            for (x, moments), buffer in zip((rows, columns), buffers, strict=True)
        )
        r += a @ b.T
    return np.clip(r, -1.0, 1.0)


def _standardised(
    x: NDArray[np.floating], moments: _Moments, block: slice, buffer: NDArray[np.floating]
) -> NDArray[np.floating]:
    """Put a block of features, centred and over their rows' norms, into ``buffer``; return what of it was filled."""
    # Dividing by the norm first keeps the products in range whatever the features' scale. That float32 rounds the
    # mean does not matter: it shifts a row by a constant, which the other row, being centred, does not see.
    wide = np.result_type(x.dtype, buffer.dtype)
    mean, scale = moments.mean.astype(wide)[:, None], (1.0 / moments.norm).astype(wide)[:, None]
    filled = buffer[:, : block.stop - block.start]

    def fill(rows: slice) -> None:
        if wide == buffer.dtype:
            np.subtract(x[rows, block], mean[rows], out=filled[rows])
            filled[rows] *= scale[rows]
        else:
            filled[rows] = (x[rows, block] - mean[rows]) * scale[rows]

    step = -(-len(x) // len(os.sched_getaffinity(0)))
    _spread(fill, [slice(k, k + step) for k in range(0, len(x), step)], filled.size)
    return filled


def _by_row(function: Callable[..., Any], *sets: NDArray[np.floating]) -> list[Any]:
    """Apply ``function`` to the rows of the sets in step."""
    return _spread(lambda rows: function(*rows), list(zip(*sets, strict=True)), sets[0].size)


def _spread(function: Callable[[Any], Any], pieces: Sequence[Any], size: int) -> list[Any]:
    """Apply ``function`` to the pieces, on all cores where they are worth it: numpy lets go of the interpreter."""
    if size < _WORTH_THREADS:
        return [function(piece) for piece in pieces]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(function, pieces))


def _rows(x: ArrayLike, name: str) -> NDArray[np.floating]:
    array = np.asarray(x)
    if not np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float64)
    if array.ndim != 2:
        raise ValueError(f"{name} features must be (images, features), not of shape {array.shape}")
    # Row by row: a mask of all would take a quarter of the features' own size.
    for k, finite in enumerate(_by_row(lambda row: np.isfinite(row).all(), array)):
        if not finite:
            raise ValueError(f"{name} features of row {k} hold a NaN or an infinity; check its image and network")
    return array


def _two_sets(truth: ArrayLike, recon: ArrayLike) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    truth, recon = _rows(truth, "truth"), _rows(recon, "reconstruction")
    if truth.shape != recon.shape:
        raise ValueError(f"truth features are {truth.shape}, reconstruction features {recon.shape}: they must pair up")
    return truth, recon
