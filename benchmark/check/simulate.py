"""Does the gate keep its promises? Pairs of models of which the truth is known, and how often the gate fails them.

A pair's scores are made as those of reconstructions are: images differ in difficulty, for both models alike; each model
adds noise that partly belongs to the image (all subjects see it) and partly to one subject's recording of it; metrics
of one image go together; identification is bounded and crowds at its upper bound; trainings with other seeds differ in
level and from image to image. Equal models differ in nothing but such noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtr
from scipy.stats import binomtest, false_discovery_control

from leaderboard.gate import BLOCKING, Measured, Rules, measure
from leaderboard.statistics import Floats
from metrics.cards import CARDS

ALPHAS = (0.01, 0.02, 0.05, 0.1, 0.2)
DROPS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""In units of the drop that the gate says it detects."""

_HIGHER = np.array([CARDS[key].direction == "higher" for key in BLOCKING])
_BOUNDED = np.array([CARDS[key].percent for key in BLOCKING])
_CHUNK = 50


@dataclass(frozen=True)
class Design:
    """A test set: how many subjects, images, and seeds on each side."""

    subjects: int
    images: int
    seeds: int = 1

    def __str__(self) -> str:
        seeds = f", {self.seeds} seeds a side" if self.seeds > 1 else ""
        return f"{self.subjects} subject{'' if self.subjects == 1 else 's'}, {self.images} images{seeds}"


DESIGNS = (Design(1, 24), Design(4, 100), Design(2, 50, 3))


@dataclass(frozen=True)
class Share:
    """How often something happened, with a 95 % interval (Clopper and Pearson)."""

    at: float
    hits: int
    of: int

    @property
    def value(self) -> float:
        """The share."""
        return self.hits / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper bound."""
        found = binomtest(self.hits, self.of).proportion_ci(0.95)
        return float(found.low), float(found.high)


def equal_pairs(design: Design, n: int, generator: np.random.Generator) -> tuple[Floats, Floats]:
    """Draw the scores of ``n`` pairs of equal models on :data:`leaderboard.gate.BLOCKING`.

    Returns:
        candidates and baselines, each (seeds, n, metrics, subjects, images).
    """
    m, s, i = len(BLOCKING), design.subjects, design.images

    def normal(*shape: int) -> Floats:
        return np.asarray(generator.standard_normal(shape))

    difficulty = 0.6 * normal(n, 1, 1, i) + 0.3 * normal(n, m, 1, i) + 0.3 * normal(n, 1, s, i)

    def model() -> Floats:
        quality = np.stack(
            [
                difficulty
                + 0.25 * normal(n, 1, 1, i)
                + 0.25 * normal(n, 1, s, i)
                + 0.3 * normal(n, m, s, i)
                + (0.05 * normal(n, 1, 1, 1) + 0.03 * normal(n, m, 1, 1) if design.seeds > 1 else 0.0)
                for _ in range(design.seeds)
            ]
        )
        level = np.where(_HIGHER, 1.0, -1.0)[:, None, None]
        return np.where(_BOUNDED[:, None, None], ndtr(1.3 * quality + 1.2), 0.35 + 0.1 * level * quality)

    return model(), model()


def false_alarms(
    design: Design, rules: Rules, n: int, seed: int = 0, step: Callable[[int], None] = lambda done: None
) -> list[Share]:
    """Return how often a candidate that equals its baseline fails, for each rate that may be promised."""
    hits = np.zeros(len(ALPHAS), int)
    for number, (candidate, baseline) in enumerate(_chunks(design, n, seed)):
        for place, alpha in enumerate(ALPHAS):
            own = replace(rules, alpha=alpha, seed=rules.seed + number)
            found = measure(candidate, baseline, _HIGHER, np.zeros(len(BLOCKING)), own)
            hits[place] += _failed(found, own).sum()
        step(candidate.shape[1])
    return [Share(alpha, int(count), n) for alpha, count in zip(ALPHAS, hits, strict=True)]


def power(
    design: Design, rules: Rules, n: int, seed: int = 0, step: Callable[[int], None] = lambda done: None
) -> list[Share]:
    """Return how often a candidate fails that is worse in one metric, by so many times what is said to be detected.

    The metric is another one from pair to pair; what is said to be detected is what the gate says of that pair.
    """
    none = np.zeros(len(BLOCKING))
    hits = np.zeros(len(DROPS), int)
    for number, (candidate, baseline) in enumerate(_chunks(design, n, seed)):
        rules = replace(rules, seed=number)
        pair = np.arange(candidate.shape[1])
        own = pair % len(BLOCKING)
        found = measure(candidate, baseline, _HIGHER, none, rules)
        unit = found.detectable(none, rules.alpha, rules.power, len(BLOCKING))[pair, own]
        for place, drop in enumerate(DROPS):
            worse = candidate.copy()
            worse[:, pair, own] -= (np.where(_HIGHER, 1.0, -1.0)[own] * drop * unit)[:, None, None]
            hits[place] += _failed(measure(worse, baseline, _HIGHER, none, rules), rules).sum()
        step(len(pair))
    return [Share(drop, int(count), n) for drop, count in zip(DROPS, hits, strict=True)]


def _chunks(design: Design, n: int, seed: int) -> Iterator[tuple[Floats, Floats]]:
    """Yield pairs, some at a time: these share the draws of the gate, which are therefore others each time."""
    generator = np.random.default_rng([seed, design.subjects, design.images, design.seeds])
    for start in range(0, n, _CHUNK):
        yield equal_pairs(design, min(_CHUNK, n - start), generator)


def _failed(found: Measured, rules: Rules) -> np.ndarray:
    q = false_discovery_control(found.p_worse, axis=-1)
    return np.asarray(found.regressed(np.zeros(len(BLOCKING)), rules.alpha, q).any(axis=-1))
