"""Intervals and paired comparisons from per-image scores.

Per-image scores are a table (pyarrow or pandas) with the columns ``track, method, variant, subject, seed, image_id,
metric, value``. Seeds of one row are repeats of the same measurement and are averaged first, except where two sides
with several seeds each are compared (below).

**Crossed bootstrap.** Every subject sees the same test images, so scores share variance along both. A resample draws
subjects and images, each with replacement and independently (the pigeonhole bootstrap of Owen, 2007, Ann. Appl. Stat.
1:386), and an interval is the 2.5 and 97.5 percentile of the resampled means. All rows and metrics share the draws,
which keeps comparisons paired. What to know when reading an interval:

- With one subject only images are drawn, and the interval speaks for that subject. It is then BCa (bias-corrected and
  accelerated; Efron, 1987, J. Am. Stat. Assoc. 82:171): scores near a bound, such as two-way identification, are
  skewed, and percentiles then miss more often on one side than on the other. BCa needs independent draws of one kind,
  for its acceleration is a jackknife over them, so intervals over several subjects stay percentile intervals.
- With few subjects (NSD has 8, its usual evaluation 4) it is too short for a claim about people in general: the
  percentile method shrinks the between-subject variance by (S - 1) / S. With many images and no difference between
  subjects it is somewhat too long instead, since noise is counted along both axes.
- The distractors of a two-way or retrieval score stay as they are; only the scored images are drawn.

**Paired permutation.** Under "A and B are equally good" the names A and B may be swapped on each image. The test
averages the difference over subjects, flips its sign image by image, and counts how often the mean is at least as far
from zero. It is exact for up to 13 images. It takes the subjects as given.

**Seeds.** Where both sides of a comparison have several trainings each, the question is no longer whether one set of
weights beats another but whether one way of making them does, and seeds are a sample too. Resamples then also draw each
side's seeds, n - 1 of its n, which makes their share of the variance unbiased (McCarthy and Snowden, 1985, Vital and
Health Statistics 2(95)). Sign flips know nothing of seeds, and a handful cannot be permuted to a small p, so
:func:`seeds_p` takes a t over images and seeds with the degrees of freedom of Satterthwaite (1946, Biometrics 2:110).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtr
from scipy.stats import false_discovery_control

from leaderboard.schema import Interval
from metrics.cards import CARDS, unknown_metrics

COLUMNS = ("track", "method", "variant", "subject", "seed", "image_id", "metric", "value")

Floats = NDArray[np.float64]
Key = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Scores:
    """Per-image scores as an array.

    Attributes:
        values: (rows, metrics, subjects, images), seeds averaged; NaN where a row has no score for a subject and image.
        undefined: (rows, metrics), true where a stored score was NaN (PixCorr of a flat image, for one).
        keys: (method, variant) of each row.
        metrics: metric keys in canonical order.
        subjects: subject numbers, from 1.
        image_ids: as text, in numeric order where they are numbers.
    """

    values: Floats
    undefined: NDArray[np.bool_]
    keys: tuple[Key, ...]
    metrics: tuple[str, ...]
    subjects: tuple[int, ...]
    image_ids: tuple[str, ...]

    def row(self, key: Key) -> int:
        """Index of a row; ``ValueError`` where there is none."""
        if key not in self.keys:
            raise ValueError(f"no per-image scores of {' '.join(key).strip()}; there are: {_names(self.keys)}")
        return self.keys.index(key)


@dataclass(frozen=True)
class Comparison:
    """A minus B on one metric.

    Attributes:
        difference: mean of A minus mean of B, with ``ci_low`` and ``ci_high`` as of :func:`bootstrap_interval`.
        p: paired permutation, two-sided.
        q: p after Benjamini-Hochberg over the metrics compared together.
        better: "a" or "b" by the metric's direction; "" where the means are equal.
    """

    metric: str
    mean_a: float
    mean_b: float
    difference: float
    ci_low: float
    ci_high: float
    p: float
    q: float
    better: str


def scores(table: Any, track: str | None = None) -> Scores:
    """Arrange a per-image table (pyarrow.Table, pandas.DataFrame, or a mapping of columns) as an array.

    Raises:
        ValueError: a column is missing, the table is empty or holds several tracks, a metric is unknown.
    """
    if not isinstance(table, pa.Table):
        mapping = isinstance(table, Mapping)
        table = pa.table(dict(table)) if mapping else pa.Table.from_pandas(table, preserve_index=False)
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise ValueError(f"per-image scores lack the column {', '.join(missing)}; expected {', '.join(COLUMNS)}")
    if track is not None and not pc.all(wanted := pc.equal(table["track"], track)).as_py():
        table = table.filter(wanted)
    if table.num_rows == 0:
        raise ValueError("no per-image scores" + (f" on track '{track}'" if track is not None else ""))
    tracks = sorted(pc.unique(table["track"]).to_pylist())
    if len(tracks) > 1:
        raise ValueError(f"per-image scores of several tracks ({', '.join(tracks)}); they are never compared")

    method, methods = _codes(table["method"])
    variant, variants = _codes(table["variant"])
    metric, metrics = _codes(table["metric"])
    subject, subjects = _codes(table["subject"])
    image, images = _codes(table["image_id"])
    if unknown := unknown_metrics(metrics):
        raise ValueError(unknown)

    combined, row = np.unique(method * len(variants) + variant, return_inverse=True)
    keys = tuple((str(methods[code // len(variants)]), str(variants[code % len(variants)])) for code in combined)
    order = {
        "metric": sorted(range(len(metrics)), key=lambda code: list(CARDS).index(metrics[code])),
        "subject": sorted(range(len(subjects)), key=lambda code: int(subjects[code])),
        "image": sorted(range(len(images)), key=lambda code: _natural(images[code])),
    }
    shape = (len(keys), len(metrics), len(subjects), len(images))
    place = {name: np.argsort(codes) for name, codes in order.items()}
    flat = np.ravel_multi_index((row, place["metric"][metric], place["subject"][subject], place["image"][image]), shape)
    value = table["value"].to_numpy().astype(np.float64)
    size = int(np.prod(shape))
    count = np.bincount(flat, minlength=size)
    total = np.bincount(flat, weights=np.nan_to_num(value), minlength=size)
    with np.errstate(invalid="ignore"):
        values = (total / count).reshape(shape)
    values.reshape(-1)[flat[~np.isfinite(value)]] = np.nan
    undefined = np.any(np.isnan(values) & (count.reshape(shape) > 0), axis=(2, 3))
    return Scores(
        values=values,
        undefined=undefined,
        keys=keys,
        metrics=tuple(str(metrics[code]) for code in order["metric"]),
        subjects=tuple(int(subjects[code]) for code in order["subject"]),
        image_ids=tuple(str(images[code]) for code in order["image"]),
    )


def joined(parts: Sequence[Scores]) -> Scores:
    """Return the rows of all ``parts``, which must be of different keys and at least one; NaN where one has no score.

    The same as :func:`scores` of one table of all, which takes many times as long.
    """
    metrics = tuple(key for key in CARDS if any(key in part.metrics for part in parts))
    subjects = tuple(sorted({subject for part in parts for subject in part.subjects}))
    images = tuple(sorted({image for part in parts for image in part.image_ids}, key=_natural))
    place = [{name: k for k, name in enumerate(names)} for names in (metrics, subjects, images)]
    keys = [key for part in parts for key in part.keys]
    values = np.full((len(keys), len(metrics), len(subjects), len(images)), np.nan)
    undefined = np.zeros((len(keys), len(metrics)), bool)
    first = 0
    for part in parts:
        rows = range(first, first + len(part.keys))
        own = [
            [known[name] for name in names]
            for known, names in zip(place, (part.metrics, part.subjects, part.image_ids), strict=True)
        ]
        values[np.ix_(rows, *own)] = part.values
        undefined[np.ix_(rows, own[0])] = part.undefined
        first += len(part.keys)
    return Scores(values, undefined, tuple(keys), metrics, subjects, images)


def bootstrap_means(values: Floats, n_resamples: int = 2000, seed: int = 0) -> Floats:
    """Means of crossed resamples of ``values`` (..., subjects, images): (n_resamples, ...).

    The draws depend on the seed and on the numbers of subjects and images only, so separate calls stay paired. Absent
    cells (NaN) weigh nothing. The mean is over all cells that a resample holds.
    """
    *leading, n_subjects, n_images = values.shape
    subjects, images = _draws(n_subjects, n_images, n_resamples, seed)

    def weighted_sum(cells: Floats) -> Floats:
        by_subject = (images @ cells.reshape(-1, n_images).T).reshape(n_resamples, -1, n_subjects)
        return np.asarray(np.matmul(by_subject, subjects[:, :, None])[..., 0], dtype=np.float64)

    present = np.isfinite(values)
    if present.all():
        means = weighted_sum(values) / (n_subjects * n_images)
    else:
        with np.errstate(invalid="ignore"):
            means = weighted_sum(np.where(present, values, 0.0)) / weighted_sum(present.astype(np.float64))
    return np.asarray(means.reshape(n_resamples, *leading), dtype=np.float64)


@lru_cache(maxsize=4)
def _draws(n_subjects: int, n_images: int, n_resamples: int, seed: int) -> tuple[Floats, Floats]:
    """How often each resample draws each subject, and each image: (n_resamples, ...) both, not to be written to."""
    generator = np.random.default_rng(seed)
    images = generator.multinomial(n_images, np.full(n_images, 1 / n_images), n_resamples).astype(np.float64)
    subjects = generator.multinomial(n_subjects, np.full(n_subjects, 1 / n_subjects), n_resamples).astype(np.float64)
    return subjects, images


def bootstrap_interval(
    values: Floats, n_resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> tuple[Floats, Floats]:
    """Lower and upper bounds of the mean of ``values`` (..., subjects, images): two arrays (...).

    BCa where a single subject has cells (only images vary), else percentiles of the crossed bootstrap.
    """
    *leading, n_subjects, n_images = values.shape
    rows = values.reshape(-1, n_subjects, n_images)
    means = bootstrap_means(rows, n_resamples, seed)
    tail = 50 * (1 - confidence)
    bounds = np.nanpercentile(means, [tail, 100 - tail], axis=0)
    seen = np.asarray(np.isfinite(rows).any(axis=2))
    alone = np.flatnonzero(seen.sum(axis=1) == 1)
    bounds[:, alone] = _bca(rows[alone, seen[alone].argmax(axis=1)], means[:, alone], confidence)
    low, high = bounds.reshape(2, *leading)
    return low, high


def bootstrap_seeds(a: Floats, b: Floats, n_resamples: int = 2000, seed: int = 0) -> Floats:
    """Means of A minus B under crossed resamples of subjects, images and each side's seeds.

    Args:
        a: (seeds, ..., subjects, images); NaN where there is no score.
        b: likewise, of as many seeds as there are.
        n_resamples: how many draws.
        seed: of the draws.

    Returns:
        (n_resamples, ...). A side with a single seed keeps it.
    """
    generator = np.random.default_rng([seed, 1])

    def side(values: Floats) -> Floats:
        n = len(values)
        drawn = generator.multinomial(n - 1, np.full(n, 1 / n), n_resamples) / (n - 1) if n > 1 else None
        means = bootstrap_means(values, n_resamples, seed)  # (resamples, seeds, ...)
        return means[:, 0] if drawn is None else np.einsum("rs,rs...->r...", drawn, means)

    return np.asarray(side(a) - side(b), dtype=np.float64)


def spread(values: Floats) -> tuple[Floats, Floats]:
    """Variance over images of the mean of ``values`` (..., subjects, images), the subjects as given, and its freedom.

    Returns:
        two arrays (...): the squared standard error, and the number of images that have a score, less one.
    """
    present = np.isfinite(values)
    cells = present.sum(axis=(-2, -1))
    mean = np.nansum(values, axis=(-2, -1)) / cells
    per_image = np.nansum(np.where(present, values - mean[..., None, None], 0.0), axis=-2)
    n_images = present.any(axis=-2).sum(axis=-1)
    freedom = np.maximum(n_images - 1, 1)
    variance = n_images / freedom * (per_image**2).sum(axis=-1) / cells**2
    return np.asarray(variance, dtype=np.float64), np.asarray(freedom, dtype=np.float64)


def spread_with_seeds(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """Variance of the mean of A minus B over images and each side's seeds, and its degrees of freedom (Satterthwaite).

    What varies with both seed and image is counted along both, so the variance is rather too large than too small.

    Args:
        a: (seeds, ..., subjects, images).
        b: likewise.

    Returns:
        two arrays (...). A side with a single seed adds nothing.
    """
    variance, freedom = spread(a.mean(axis=0) - b.mean(axis=0))
    parts = [(variance, freedom)]
    for side in (a, b):
        if len(side) > 1:
            means = np.nanmean(side, axis=(-2, -1))
            parts.append((means.var(axis=0, ddof=1) / len(side), np.full(variance.shape, len(side) - 1.0)))
    total = np.sum([part for part, _ in parts], axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        pooled = total**2 / np.sum([part**2 / free for part, free in parts], axis=0)
    return np.asarray(total, dtype=np.float64), np.where(total > 0, pooled, freedom)


def seeds_p(mean: Floats, variance: Floats, freedom: Floats) -> Floats:
    """One-sided p that a mean as low as ``mean`` is chance where the truth is zero; arguments of one shape."""
    with np.errstate(invalid="ignore", divide="ignore"):
        t = np.where(variance > 0, mean / np.sqrt(variance), np.sign(mean) * np.inf)
    return np.where(np.isnan(t), 0.5, stdtr(freedom, np.nan_to_num(t, nan=0.0, posinf=np.inf, neginf=-np.inf)))


def seeds_test(
    a: Floats, b: Floats, *, paired: bool, n_resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> tuple[Floats, Floats, Floats]:
    """Interval and two-sided p of the mean of A minus B where trainings are a sample, too.

    Args:
        a: (seeds, ..., subjects, images); NaN where there is no score.
        b: likewise.
        paired: whether the k-th training of A and of B share what their seed decides (first weights, batches, the
            shared stages): then they differ together, and their difference is what is sampled.
        n_resamples, seed: of the bootstrap.
        confidence: of the interval.

    Returns:
        lower and upper bound, and p, three arrays (...).
    """
    if paired:
        a = a - b
        b = np.where(np.isfinite(a[:1]), 0.0, np.nan)
    tail = 50 * (1 - confidence)
    low, high = np.nanpercentile(bootstrap_seeds(a, b, n_resamples, seed), [tail, 100 - tail], axis=0)
    mean = np.asarray(np.nanmean(a.mean(axis=0) - b.mean(axis=0), axis=(-2, -1)))
    p = 2 * seeds_p(-np.abs(mean), *spread_with_seeds(a, b))
    return low, high, np.minimum(p, 1.0)


def _bca(cells: Floats, means: Floats, confidence: float) -> Floats:
    """BCa bounds (2, rows) of the mean of ``cells`` (rows, images) from its resampled ``means`` (resamples, rows)."""
    present = np.isfinite(cells)
    observed = np.nanmean(cells, axis=1)
    # Leaving image i out moves the mean by (mean - x_i) / (n - 1): the jackknife needs no loop.
    deviations = np.where(present, cells - observed[:, None], 0.0)
    square = (deviations**2).sum(axis=1)
    rounding = 1e-12 * np.abs(np.where(present, cells, 0.0)).max(axis=1, initial=0.0)
    varies = square > rounding**2
    acceleration = (deviations**3).sum(axis=1) / (6 * np.where(varies, square, 1.0) ** 1.5)

    drawn = np.isfinite(means)
    n_drawn = drawn.sum(axis=0)
    distance = np.where(drawn, means - observed, np.inf)
    lower = (distance < -rounding).sum(axis=0)
    equal = (np.abs(distance) <= rounding).sum(axis=0)
    share = np.where(varies, (lower + 0.5 * equal) / n_drawn, 0.5)
    bias = ndtri(np.clip(share, 0.5 / n_drawn, 1 - 0.5 / n_drawn))
    z = ndtri((1 - confidence) / 2)
    shifted = bias + np.array([[z], [-z]])
    level = ndtr(bias + shifted / (1 - acceleration * shifted))

    ranked = np.sort(means, axis=0)  # resamples that hold no cell (NaN) come last
    place = level * (n_drawn - 1)
    below = np.floor(place).astype(np.int64)
    above = np.minimum(below + 1, n_drawn - 1)
    row = np.arange(len(cells))
    left, right = ranked[below, row], ranked[above, row]
    return np.asarray(left + (place - below) * (right - left), dtype=np.float64)


def summarise(
    table: Any, n_resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> dict[Key, dict[str, Interval]]:
    """Mean and interval of every metric of every (method, variant) in a per-image table.

    A metric with an undefined (NaN) score is left out: a mean over the rest would flatter the row.
    """
    data = table if isinstance(table, Scores) else scores(table)
    present = np.isfinite(data.values).any(axis=(2, 3)) & ~data.undefined
    summary: dict[Key, dict[str, Interval]] = {key: {} for key in data.keys}
    chosen = data.values[present]
    low, high = bootstrap_interval(chosen, n_resamples, seed, confidence)
    means = np.nanmean(chosen, axis=(1, 2))
    for index, (row, metric) in enumerate(zip(*np.nonzero(present), strict=True)):
        summary[data.keys[row]][data.metrics[metric]] = Interval(
            mean=float(means[index]), ci_low=float(low[index]), ci_high=float(high[index])
        )
    return summary


def permutation_p(differences: Floats, n_permutations: int = 9999, seed: int = 0) -> Floats:
    """Two-sided sign-flip p of mean zero for ``differences`` (..., images): (...).

    Exact (every pattern of signs) where there are at most ``n_permutations`` patterns; else (1 + hits) / (1 + draws).
    """
    *leading, n_images = differences.shape
    flat = differences.reshape(-1, n_images)
    signs, exact = _signs(n_images, n_permutations, seed)
    sums = np.abs(signs @ flat.T)
    observed = np.abs(flat.sum(axis=1))
    tolerance = 1e-12 * np.abs(flat).sum(axis=1)  # rounding must not break ties with the observed sum
    hits = (sums >= observed - tolerance).sum(axis=0)
    p = hits / len(signs) if exact else (1 + hits) / (1 + n_permutations)
    return np.asarray(p, dtype=np.float64).reshape(leading)


@lru_cache(maxsize=2)
def _signs(n_images: int, n_permutations: int, seed: int) -> tuple[Floats, bool]:
    """Signs of the images in each pattern, (patterns, n_images), not to be written to; and whether these are all."""
    exact = 2**n_images <= n_permutations
    if exact:
        patterns = np.arange(2**n_images)[:, None] >> np.arange(n_images) & 1
    else:
        patterns = np.random.default_rng(seed).integers(0, 2, (n_permutations, n_images), dtype=np.int8)
    return np.asarray(1.0 - 2.0 * patterns, dtype=np.float64), bool(exact)


def lower_p(differences: Floats, n_permutations: int = 9999, seed: int = 0) -> Floats:
    """One-sided sign-flip p that a mean as low as that of ``differences`` (..., subjects, images) is chance: (...).

    An image keeps its weight, the number of subjects that saw it. Sign flips are symmetric, so this is half the
    two-sided p on the low side, and one minus half of it on the other.
    """
    per_image = np.nansum(differences, axis=-2)
    p = permutation_p(per_image, n_permutations, seed)
    return np.asarray(np.where(per_image.sum(axis=-1) < 0, p / 2, 1 - p / 2), dtype=np.float64)


def compare(
    table: Any,
    a: Key,
    b: Key,
    *,
    metrics: Sequence[str] | None = None,
    n_resamples: int = 2000,
    n_permutations: int = 9999,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Comparison]:
    """Compare two rows of a per-image table, image by image, on every metric that both have (or on ``metrics``).

    Args:
        table: per-image scores of both, or a :class:`Scores`.
        a: (method, variant) of the first row.
        b: (method, variant) of the second row; a positive ``difference`` says that A's number is larger.
        metrics: metric keys; default all that either row has.
        n_resamples: crossed bootstrap draws.
        n_permutations: sign-flip draws.
        seed: of both.
        confidence: of the interval of the difference.

    Raises:
        ValueError: a row is absent, the two were scored on different subjects or images, or a score is undefined.
    """
    data = table if isinstance(table, Scores) else scores(table)
    first, second = data.values[data.row(a)], data.values[data.row(b)]
    undefined = data.undefined[data.row(a)] | data.undefined[data.row(b)]
    wanted = [
        index
        for index, key in enumerate(data.metrics)
        if (key in metrics if metrics is not None else np.isfinite([first[index], second[index]]).any())
    ]
    if metrics is not None and len(wanted) < len(set(metrics)):
        raise ValueError(f"no per-image scores of {', '.join(k for k in metrics if k not in data.metrics)}")
    for index in wanted:
        if undefined[index]:
            raise ValueError(f"{data.metrics[index]} is undefined (NaN) for an image of {_names((a, b))}")
        alone_a, alone_b = _alone(first[index], second[index]), _alone(second[index], first[index])
        if alone_a or alone_b:
            raise ValueError(
                f"{data.metrics[index]}: not the same subjects and images: {alone_a} only in {_names((a,))}, "
                f"{alone_b} only in {_names((b,))}; score both on one test set"
            )
    if not wanted:
        return {}
    difference = first[wanted] - second[wanted]
    low, high = bootstrap_interval(difference, n_resamples, seed, confidence)
    p = np.array([_permutation_over_images(cells, n_permutations, seed) for cells in difference])
    q = false_discovery_control(p)
    result = {}
    for place, index in enumerate(wanted):
        key = data.metrics[index]
        mean = float(np.nanmean(difference[place]))
        gain = mean if CARDS[key].direction == "higher" else -mean
        result[key] = Comparison(
            metric=key,
            mean_a=float(np.nanmean(first[index])),
            mean_b=float(np.nanmean(second[index])),
            difference=mean,
            ci_low=float(low[place]),
            ci_high=float(high[place]),
            p=float(p[place]),
            q=float(q[place]),
            better="a" if gain > 0 else "b" if gain < 0 else "",
        )
    return result


def _permutation_over_images(difference: Floats, n_permutations: int, seed: int) -> float:
    """Sign-flip p of a (subjects, images) difference; an image keeps its weight, the number of subjects that saw it."""
    per_image = np.nansum(difference, axis=0)[np.isfinite(difference).any(axis=0)]
    return float(permutation_p(per_image, n_permutations, seed))


def _alone(first: Floats, second: Floats) -> int:
    return int((np.isfinite(first) & ~np.isfinite(second)).sum())


def _codes(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[Any]]:
    """Encode a column as codes into its distinct values."""
    if column.null_count:
        raise ValueError("per-image scores have an empty cell in track, method, variant, subject, image_id or metric")
    encoded = column.unify_dictionaries().combine_chunks()
    if not pa.types.is_dictionary(column.type):
        encoded = encoded.dictionary_encode()
    codes, known = encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()
    used = np.flatnonzero(np.bincount(codes, minlength=len(known)))  # a filter removes rows, and no known values
    if len(used) < len(known):
        codes, known = np.searchsorted(used, codes), [known[code] for code in used]
    return codes, known


def _natural(image_id: Any) -> tuple[int, int, str]:
    text = str(image_id)
    return (0, int(text), text) if text.isdigit() else (1, 0, text)


def _names(keys: Sequence[Key]) -> str:
    return ", ".join(" ".join(key).strip() for key in keys)
