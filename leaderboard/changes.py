"""Change points: where in a sequence of scored checkpoints the level of the scores moved and stayed.

Binary segmentation (Vostrikova, 1981, Sov. Math. Dokl. 24:55): the place that splits the sequence best is the one at
which the means before and after differ most, over all metrics together, each in its own standard deviation and weighed
by how many checkpoints lie on either side. A split counts where few orders of the same checkpoints have as good a one
(a permutation test, as in Matteson and James, 2014, J. Am. Stat. Assoc. 109:334); its two parts are then split in the
same way. If nothing ever changed, a sequence shows any change point with probability at most ``alpha``.

What varies between trainings is thus learned from the sequence itself. That needs a sequence: of seven checkpoints the
clearest change has p = .057, of eight .029.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from leaderboard.statistics import Floats

FEWEST = 8
"""Checkpoints that can show a change at 5 %."""


@dataclass(frozen=True)
class ChangePoint:
    """The first checkpoint of a new level.

    Attributes:
        index: its place in the sequence, from 0.
        p: of the permutation test.
        before, after: mean of each metric from the change point before to this one, and from here to the next.
    """

    index: int
    p: float
    before: tuple[float, ...]
    after: tuple[float, ...]


def change_points(series: Floats, alpha: float = 0.05, n_permutations: int = 1999, seed: int = 0) -> list[ChangePoint]:
    """Return the change points of ``series`` (checkpoints, metrics), in order.

    Raises:
        ValueError: a value is not finite.
    """
    if not np.isfinite(series).all():
        raise ValueError("a score is undefined; change points need a value of every metric at every checkpoint")
    generator = np.random.default_rng(seed)
    found: dict[int, float] = {}
    parts = [(0, len(series))]
    while parts:
        start, stop = parts.pop()
        split, p = _best_split(series[start:stop], n_permutations, generator)
        if p <= alpha:
            found[start + split] = p
            parts += [(start, start + split), (start + split, stop)]
    bounds = [0, *sorted(found), len(series)]
    levels = [series[a:b].mean(axis=0) for a, b in itertools.pairwise(bounds)]
    return [
        ChangePoint(index, found[index], tuple(levels[k].tolist()), tuple(levels[k + 1].tolist()))
        for k, index in enumerate(bounds[1:-1])
    ]


def _best_split(series: Floats, n_permutations: int, generator: np.random.Generator) -> tuple[int, float]:
    """Return the size of the first part in the best split of (n, metrics), and the p of a split as good."""
    n = len(series)
    scale = series.std(axis=0)
    moving = scale > 1e-12 * np.maximum(1.0, np.abs(series).max(axis=0, initial=0.0))
    if n < 2 or not moving.any():
        return 0, 1.0
    standard = (series[:, moving] - series[:, moving].mean(axis=0)) / scale[moving]
    exact = math.factorial(n) <= n_permutations
    if exact:
        orders = np.array(list(itertools.permutations(range(n))))
    else:
        orders = np.argsort(generator.random((n_permutations, n)), axis=1)
    observed = _gains(standard[None])[0]
    best = _gains(standard[orders]).max(axis=1)
    hits = int((best >= observed.max() * (1 - 1e-9)).sum())
    p = hits / len(orders) if exact else (1 + hits) / (1 + n_permutations)
    return int(observed.argmax()) + 1, p


def _gains(sequences: Floats) -> Floats:
    """Return for (sequences, n, metrics) what each split explains: (sequences, n - 1)."""
    n = sequences.shape[1]
    first = np.arange(1, n)
    sums = sequences.cumsum(axis=1)[:, :-1]
    # Values are centred: the mean after is minus the mean before, weighed by the sizes.
    return np.asarray((sums**2).sum(axis=2) * n / (first * (n - first)), dtype=np.float64)
