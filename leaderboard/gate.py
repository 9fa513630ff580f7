"""The gate: is a candidate worse than a baseline on the very same images? Statistics and decision, no files.

A metric *regresses* where two things hold of its drop, the mean over images, subjects and seeds by which the candidate
is worse (the direction comes from the metric's card):

- the paired permutation test says that it is larger than the margin: one-sided, sign flips image by image of the
  differences moved by the margin, p after Benjamini-Hochberg over the metrics that block (``q``) at most ``alpha``;
- the crossed bootstrap over subjects and images says so too: the interval of the difference, of confidence
  1 - 2 ``alpha``, leaves the margin out.

The first is exact for the images and takes the subjects as given; the second asks that the subjects agree. Where both
sides have several seeds they are a sample as well, in both (see *Seeds* in :mod:`leaderboard.statistics`).

The promise: of candidates that are worse in no blocking metric by more than its margin, a share of at most ``alpha``
fails. Where all metrics are within their margins a false alarm on any of them is a false failure, and there
Benjamini-Hochberg holds that share for independent and for positively dependent metrics (Benjamini and Yekutieli, 2001,
Ann. Stat. 29:1165), as metrics of one image are. Metrics that only advise are adjusted among themselves, improvements
over all metrics: neither moves what blocks.

*Detectable* is the smallest true drop that would fail with probability ``power``, were it the only one: margin, plus
what an observed drop must exceed (the larger of the bootstrap interval's reach and the t quantile at ``alpha`` over the
number of metrics), plus the quantile of ``power`` times the standard error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.special import stdtrit
from scipy.stats import false_discovery_control

from leaderboard.statistics import (
    COLUMNS,
    Floats,
    Scores,
    bootstrap_interval,
    bootstrap_seeds,
    joined,
    lower_p,
    scores,
    seeds_p,
    spread,
    spread_with_seeds,
)
from metrics.cards import CARDS

BLOCKING = ("PixCorr", "SSIM", "Alex(2)", "Alex(5)", "Incep", "CLIP", "Eff", "SwAV")
"""What blocks unless something else is asked for: the metrics of the paper's Table 1."""

Verdict = Literal["regressed", "improved", "no change shown"]
Role = Literal["blocking", "advisory"]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Margin:
    """A drop that is tolerated: in the metric's own unit, or ``relative``: a share of the baseline's mean."""

    value: float = 0.0
    relative: bool = False

    def of(self, baseline: float) -> float:
        """Return the margin in the metric's own unit."""
        return self.value * abs(baseline) if self.relative else self.value

    def __str__(self) -> str:
        return f"{100 * self.value:g}%" if self.relative else f"{self.value:g}"


@dataclass(frozen=True)
class Rules:
    """What fails, and how sure the gate must be.

    Attributes:
        blocking: metric -> margin; None for :data:`BLOCKING`, as far as both sides have them, with no margin.
        advisory: metric -> margin of metrics that are told and never fail; None for all others with no margin.
        alpha: share of equal candidates that may fail.
        power: probability for which the detectable drop is stated.
        n_resamples, n_permutations, seed: of bootstrap and permutations.
    """

    blocking: Mapping[str, Margin] | None = None
    advisory: Mapping[str, Margin] | None = None
    alpha: float = 0.05
    power: float = 0.8
    n_resamples: int = 2000
    n_permutations: int = 9999
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.001 <= self.alpha <= 0.5:
            raise ValueError(f"alpha is {self.alpha:g}; expected a share from 0.001 to 0.5")
        if not 0.5 <= self.power < 1:
            raise ValueError(f"power is {self.power:g}; expected a probability from 0.5 to below 1")
        both = sorted(set(self.blocking or ()) & set(self.advisory or ()))
        if both:
            raise ValueError(f"{both[0]} is both blocking and advisory; name it once")


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two models that are compared.

    Attributes:
        name: how people know it.
        table: per-image scores (columns as in :mod:`leaderboard.statistics`) of this model alone; any seeds.
        protocol: name of the scoring protocol; None where nothing says.
        protocol_hash: likewise.
    """

    name: str
    table: pa.Table
    protocol: str | None = None
    protocol_hash: str | None = None

    @cached_property
    def by_seed(self) -> tuple[Scores, Scores]:
        """The scores, a row for each seed; and the same with numbers for undefined values, to see which are there."""
        return _by_seed(self.table)


@dataclass(frozen=True)
class Finding:
    """Candidate beside baseline on one metric; all in the metric's own unit.

    Attributes:
        role: whether a regression of this metric fails.
        baseline, candidate: means.
        difference: candidate less baseline, with ``ci_low`` and ``ci_high``.
        margin: the drop that is tolerated, 0 or more.
        p, q: that the drop is no larger than the margin; q after adjustment.
        p_better, q_better: likewise that there is no gain.
        detectable: the smallest drop found with the stated power; None where no number of images like these tells.
        undefined: images on which the candidate has no value where the baseline has one.
    """

    metric: str
    role: Role
    baseline: float
    candidate: float
    difference: float
    ci_low: float
    ci_high: float
    margin: float
    p: float
    q: float
    p_better: float
    q_better: float
    detectable: float | None
    verdict: Verdict
    undefined: int = 0

    @property
    def drop(self) -> float:
        """How much worse the candidate is; negative where it is better."""
        return -self.difference if CARDS[self.metric].direction == "higher" else self.difference


@dataclass(frozen=True)
class Worse:
    """An image of a subject that the candidate reconstructs worse.

    Attributes:
        drop: mean over the blocking metrics of the drop, each in standard deviations of its differences.
        values: metric -> (baseline, candidate).
    """

    subject: int
    image_id: str
    drop: float
    values: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Check:
    """What the gate found.

    Attributes:
        findings: the blocking metrics, then those that advise, each in canonical order.
        worse: all images with a drop, the largest first.
        seeds: of candidate and baseline.
        notes: what a reader should know besides.
    """

    candidate: str
    baseline: str
    track: str
    protocol: str | None
    protocol_hash: str | None
    subjects: tuple[int, ...]
    n_images: int
    seeds: tuple[tuple[int, ...], tuple[int, ...]]
    rules: Rules
    findings: tuple[Finding, ...]
    worse: tuple[Worse, ...]
    notes: tuple[str, ...] = field(default=())

    def of(self, verdict: Verdict, role: Role | None = None) -> tuple[Finding, ...]:
        """Return the findings of a verdict, and of a role where one is given."""
        return tuple(f for f in self.findings if f.verdict == verdict and role in (None, f.role))

    @property
    def passed(self) -> bool:
        """Whether no blocking metric regressed."""
        return not self.of("regressed", "blocking")

    @property
    def sentence(self) -> str:
        """The result in one line."""
        blocking = [f.metric for f in self.of("regressed", "blocking")]
        parts = [f"FAILED: {', '.join(blocking)} regressed" if blocking else "passed: no regression"]
        if advisory := [f.metric for f in self.of("regressed", "advisory")]:
            parts.append(f"{', '.join(advisory)} regressed (advisory)")
        if better := [f.metric for f in self.of("improved")]:
            parts.append(f"{', '.join(better)} improved")
        return "; ".join(parts)


# --- what is asked for ------------------------------------------------------------------------------------------------


def read_margins(text: str, option: str = "--fail") -> dict[str, Margin]:
    """Read ``PixCorr:0.005,CLIP:1%,SSIM``: metric -> margin. ``all`` names every metric; ``none`` no metric.

    A margin is in the metric's own unit (a percentage is stored as a fraction: 0.01 is one point), or with ``%`` a
    share of the baseline's mean. ``Alex(2)``, which a shell wants quoted, may be typed ``alex2``.

    Raises:
        ValueError: an unknown metric, or a margin that is no number from 0.
    """
    if text.strip() == "none":
        return {}
    known = {_bare(key): key for key in CARDS}
    found: dict[str, Margin] = {}
    for part in text.split(","):
        word, separator, amount = (piece.strip() for piece in part.partition(":"))
        margin = _margin(amount, part.strip(), option) if separator else Margin()
        if word == "all":
            found = {**dict.fromkeys(CARDS, margin), **found}
            continue
        if _bare(word) not in known:
            near = difflib.get_close_matches(_bare(word), known, n=1, cutoff=0.5)
            hint = f" (did you mean '{known[near[0]]}'?)" if near else f"; there are {', '.join(CARDS)}"
            raise ValueError(f"{option} {text}: no metric '{word}'{hint}")
        found[known[_bare(word)]] = margin
    return found


def _bare(key: str) -> str:
    return re.sub(r"[^a-z0-9]", "", key.lower())


def _margin(amount: str, part: str, option: str) -> Margin:
    relative = amount.endswith("%")
    try:
        value = float(amount.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < np.inf:
        raise ValueError(f"{option} {part}: '{amount}' is no margin; expected a number from 0, as 0.005, or 1%")
    return Margin(value / 100, True) if relative else Margin(value)


# --- the arithmetic ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Measured:
    """Arrays (..., metrics); gains are positive where the candidate is better."""

    gain: Floats
    low: Floats
    high: Floats
    p_worse: Floats
    p_better: Floats
    error: Floats
    freedom: Floats
    n_images: int

    def regressed(self, margin: Floats, alpha: float, q: Floats) -> np.ndarray:
        """Return where the drop exceeds the margin."""
        return np.asarray((q <= alpha) & (self.high < -margin))

    def improved(self, alpha: float, q: Floats) -> np.ndarray:
        """Return where there is a gain."""
        return np.asarray((q <= alpha) & (self.low > 0))

    def detectable(self, margin: Floats, alpha: float, power: float, tests: int) -> Floats:
        """Return the smallest drop that is found with probability ``power`` among ``tests`` metrics; NaN for none."""
        reach = np.maximum(stdtrit(self.freedom, 1 - alpha / tests) * self.error, self.high - self.gain)
        found = margin + reach + stdtrit(self.freedom, power) * self.error
        # Sign flips of so few images have no p that small, however large the drop.
        enough = (0.5**self.n_images <= alpha / tests) & (self.error > 0)
        return np.where(enough, found, np.nan)


def measure(candidate: Floats, baseline: Floats, higher: np.ndarray, margin: Floats, rules: Rules) -> Measured:
    """Compare two models, metric by metric.

    Args:
        candidate: (seeds, ..., metrics, subjects, images); NaN where an image is not one of the subject's.
        baseline: likewise, with NaN in the same places; the number of seeds may differ.
        higher: (metrics,), whether more is better.
        margin: (..., metrics), the drop that is tolerated.
        rules: how.
    """
    sign = np.where(higher, 1.0, -1.0)[:, None, None]
    a, b = candidate * sign, baseline * sign
    gain = a.mean(axis=0) - b.mean(axis=0)
    several = len(a) > 1 and len(b) > 1
    mean = np.nanmean(gain, axis=(-2, -1))
    if several:
        means = bootstrap_seeds(a, b, rules.n_resamples, rules.seed)
        low, high = np.nanpercentile(means, [100 * rules.alpha, 100 - 100 * rules.alpha], axis=0)
        variance, freedom = spread_with_seeds(a, b)
    else:
        low, high = bootstrap_interval(gain, rules.n_resamples, rules.seed, 1 - 2 * rules.alpha)
        variance, freedom = spread(gain)
    both = np.stack([gain + margin[..., None, None], -gain])  # signs are flipped once for both
    p_worse, p_better = lower_p(both, rules.n_permutations, rules.seed)
    if several:
        p_worse = np.maximum(p_worse, seeds_p(mean + margin, variance, freedom))
        p_better = np.maximum(p_better, seeds_p(-mean, variance, freedom))
    return Measured(mean, low, high, p_worse, p_better, np.sqrt(variance), freedom, gain.shape[-1])


# --- the check --------------------------------------------------------------------------------------------------------


def check(
    candidate: Side,
    baseline: Side,
    rules: Rules | None = None,
    *,
    same_protocol: bool = False,
    notes: Sequence[str] = (),
    list_images: bool = True,
) -> Check:
    """Compare a candidate with a baseline, image by image.

    Args:
        candidate: the model in question.
        baseline: what it must not fall behind.
        rules: what fails; default :class:`Rules`.
        same_protocol: somebody vouches for it where a side does not say how it was scored.
        notes: to be carried along.
        list_images: whether ``worse`` is wanted.

    Raises:
        ValueError: the two cannot be compared (tracks, protocols, subjects or images differ or are not known, a
            blocking metric is missing), or never could fail (too few images). The message says which, and what to do.
    """
    rules = rules or Rules()
    _same_protocol(candidate, baseline, same_protocol)
    pair = _Pair.of(candidate, baseline)
    if candidate.protocol_hash and baseline.protocol_hash and candidate.protocol_hash != baseline.protocol_hash:
        raise ValueError(
            f"different protocols: {candidate.protocol or 'protocol'} {candidate.protocol_hash[:8]} and "
            f"{baseline.protocol_hash[:8]}, on the same images: versions of metrics, weights of the judges, or how "
            "repeats are averaged differ; score both with one version"
        )
    roles, more = _roles(pair, rules)
    keys = list(roles)
    own = [pair.metrics.index(key) for key in keys]
    a, b = pair.candidate[:, own], pair.baseline[:, own]
    broken = np.array([pair.undefined[0].get(key, 0) for key in keys])
    n_images = len(pair.image_ids)
    if 0.5**n_images > rules.alpha:
        raise ValueError(
            f"{n_images} test image{'' if n_images == 1 else 's'}: no drop, however large, could fail at "
            f"{100 * rules.alpha:g} %; score more images"
        )
    margins = {**dict.fromkeys(keys, Margin()), **(rules.blocking or {}), **(rules.advisory or {})}
    means_b = np.nanmean(pair.whole_baseline[:, own], axis=(0, 2, 3))
    margin = np.array([margins[key].of(mean) for key, mean in zip(keys, means_b, strict=True)])
    higher = np.array([CARDS[key].direction == "higher" for key in keys])
    nowhere: Flags = np.asarray(np.isnan(a).all(axis=(0, 2, 3)))
    blank = nowhere[:, None, None]
    found = measure(np.where(blank, 0.0, a), np.where(blank, 0.0, b), higher, margin, rules)
    # No value where the baseline has one, as of an image of one flat colour, is a drop that no test need confirm.
    p_worse = np.where(broken > 0, 0.0, found.p_worse)
    p_better = np.where(broken > 0, 1.0, found.p_better)
    blocking: Flags = np.asarray([role == "blocking" for role in roles.values()])
    q_worse = np.empty(len(keys))
    advisory: Flags = ~blocking
    for members in (blocking, advisory):
        if members.any():
            q_worse[members] = false_discovery_control(p_worse[members])
    q_better = false_discovery_control(p_better)
    tests = np.where(blocking, blocking.sum(), advisory.sum())
    detectable = [float(found.detectable(margin, rules.alpha, rules.power, int(n))[k]) for k, n in enumerate(tests)]
    regressed = found.regressed(margin, rules.alpha, q_worse) | (broken > 0)
    improved = found.improved(rules.alpha, q_better) & (broken == 0)
    means_a = [float(np.nanmean(a[:, k])) if not nowhere[k] else float("nan") for k in range(len(keys))]
    findings = []
    for k, key in enumerate(keys):
        sign = 1.0 if higher[k] else -1.0
        low, high = sorted((sign * float(found.low[k]), sign * float(found.high[k])))
        findings.append(
            Finding(
                metric=key,
                role=roles[key],
                baseline=float(means_b[k]),
                candidate=means_a[k],
                difference=sign * float(found.gain[k]),
                ci_low=low,
                ci_high=high,
                margin=float(margin[k]),
                p=float(p_worse[k]),
                q=float(q_worse[k]),
                p_better=float(p_better[k]),
                q_better=float(q_better[k]),
                detectable=None if np.isnan(detectable[k]) else detectable[k],
                verdict="regressed" if regressed[k] else "improved" if improved[k] else "no change shown",
                undefined=int(broken[k]),
            )
        )
    return Check(
        candidate=candidate.name,
        baseline=baseline.name,
        track=pair.track,
        protocol=candidate.protocol or baseline.protocol,
        protocol_hash=candidate.protocol_hash or baseline.protocol_hash,
        subjects=pair.subjects,
        n_images=n_images,
        seeds=pair.seeds,
        rules=rules,
        findings=tuple(findings),
        worse=_worse(pair, keys, a, b, higher, blocking) if list_images else (),
        notes=(*notes, *more, *_remarks(candidate, baseline, pair, findings, rules)),
    )


def _same_protocol(candidate: Side, baseline: Side, vouched: bool) -> None:
    if candidate.protocol and baseline.protocol and candidate.protocol != baseline.protocol:
        raise ValueError(
            f"different protocols: {candidate.name} was scored under {candidate.protocol}, {baseline.name} under "
            f"{baseline.protocol}; score both under one"
        )
    unknown = [side.name for side in (candidate, baseline) if side.protocol_hash is None]
    if unknown and not vouched:
        raise ValueError(
            f"{unknown[0]}: nothing says under which protocol it was scored; score it again with python -m "
            "benchmark.score --per-image, or vouch for it with --same-protocol"
        )


@dataclass(frozen=True, eq=False)
class _Pair:
    """Both sides' scores as arrays (seeds, metrics, subjects, images), NaN in the same places.

    ``metrics`` are those of both. ``only`` are those of one side: candidate's, baseline's. ``undefined``: of each side,
    metric -> images without a value.
    """

    track: str
    metrics: tuple[str, ...]
    subjects: tuple[int, ...]
    image_ids: tuple[str, ...]
    seeds: tuple[tuple[int, ...], tuple[int, ...]]
    candidate: Floats
    baseline: Floats
    whole_baseline: Floats  # with the images on which the candidate has no value
    only: tuple[tuple[str, ...], tuple[str, ...]]
    undefined: tuple[Mapping[str, int], Mapping[str, int]]

    @classmethod
    def of(cls, candidate: Side, baseline: Side) -> _Pair:
        """Arrange the scores.

        Raises:
            ValueError: the two are not of the same track, subjects and images.
        """
        sides = (candidate, baseline)
        tables = [_columns(side) for side in sides]
        tracks = [_distinct(side, table, "track") for side, table in zip(sides, tables, strict=True)]
        if tracks[0] != tracks[1]:
            raise ValueError(
                f"different tracks: {candidate.name} is of '{tracks[0]}', {baseline.name} of '{tracks[1]}'; they are "
                "never compared"
            )
        seeds = [tuple(sorted(pc.unique(table["seed"]).to_pylist())) for table in tables]
        data, present = (joined(parts) for parts in zip(*(side.by_seed for side in sides), strict=True))
        first, arrays = 0, []
        for side, own_seeds in zip(sides, seeds, strict=True):
            rows = [first + side.by_seed[0].row(("", str(seed))) for seed in own_seeds]
            arrays.append((data.values[rows], np.isfinite(present.values[rows])))
            first += len(rows)
        own = [[key for k, key in enumerate(data.metrics) if there[:, k].any()] for _, there in arrays]
        common = [key for key in own[0] if key in own[1]]
        if not common:
            raise ValueError(
                f"no metric in common: {candidate.name} has {', '.join(own[0])}, {baseline.name} {', '.join(own[1])}"
            )
        kept = [data.metrics.index(key) for key in common]
        cells = [np.asarray(there[:, kept].any(axis=(0, 1))) for _, there in arrays]
        _same_images(candidate.name, baseline.name, cells[0], cells[1], data)
        for side, own_seeds, (_, there) in zip(sides, seeds, arrays, strict=True):
            lacking = there[:, kept] != cells[0]
            if lacking.any():
                seed, metric, subject, image = np.argwhere(lacking)[0]
                raise ValueError(
                    f"{side.name}: {common[metric]} of seed {own_seeds[seed]} lacks {int(lacking[seed, metric].sum())} "
                    f"images (first: {data.image_ids[image]} of subject {data.subjects[subject]}); score it again"
                )
        values = [array[:, kept] for array, _ in arrays]
        undefined = tuple(
            {
                key: int(count)
                for k, key in enumerate(common)
                if (count := (np.isnan(array[:, k]).any(axis=0) & cells[0]).sum())
            }
            for array in values
        )
        return cls(
            track=tracks[0],
            metrics=tuple(common),
            subjects=data.subjects,
            image_ids=data.image_ids,
            seeds=(seeds[0], seeds[1]),
            candidate=np.where(np.isnan(values[1]).any(axis=0), np.nan, values[0]),
            baseline=np.where(np.isnan(values[0]).any(axis=0), np.nan, values[1]),
            whole_baseline=values[1],
            only=(
                tuple(key for key in own[0] if key not in common),
                tuple(key for key in own[1] if key not in common),
            ),
            undefined=(undefined[0], undefined[1]),
        )


def _columns(side: Side) -> pa.Table:
    missing = [name for name in COLUMNS if name not in side.table.column_names]
    if missing:
        raise ValueError(f"{side.name}: per-image scores lack the column {', '.join(missing)}")
    if side.table.num_rows == 0:
        raise ValueError(f"{side.name}: no per-image scores")
    return side.table


def _distinct(side: Side, table: pa.Table, column: str) -> str:
    values = pc.unique(table[column]).to_pylist()
    if len(values) != 1:
        raise ValueError(f"{side.name}: per-image scores of several {column}s ({', '.join(map(str, values))})")
    return str(values[0])


def _by_seed(table: pa.Table) -> tuple[Scores, Scores]:
    """See :attr:`Side.by_seed`; a row's key is ("", seed)."""
    n = table.num_rows
    value = table["value"].to_numpy().astype(np.float64)
    columns = {
        "track": pa.array([""] * n),
        "method": pa.array([""] * n),
        "variant": pc.cast(table["seed"], pa.string()),
        "subject": table["subject"].cast(pa.int64()),
        "seed": pa.array(np.zeros(n, np.int64)),
        "image_id": table["image_id"].cast(pa.string()),
        "metric": table["metric"].cast(pa.string()),
    }
    finite = np.isfinite(value)
    data = scores({**columns, "value": np.where(finite, value, np.nan)})
    return data, data if finite.all() else scores({**columns, "value": np.where(finite, value, 0.0)})


def _same_images(candidate: str, baseline: str, a: Flags, b: Flags, data: Scores) -> None:
    names = (candidate, baseline)
    subjects = [
        [s for s, seen in zip(data.subjects, np.asarray(cells.any(axis=1)), strict=True) if seen] for cells in (a, b)
    ]
    if subjects[0] != subjects[1]:
        told = " and ".join(f"{', '.join(map(str, own))} ({name})" for own, name in zip(subjects, names, strict=True))
        raise ValueError(f"different subjects: {told}; score both on the same")
    alone: list[Flags] = [a & ~b, b & ~a]
    if not any(cells.any() for cells in alone):
        return
    parts = []
    for name, cells in zip(names, alone, strict=True):
        if cells.any():
            subject, image = np.argwhere(cells)[0]
            first = f"first: {data.image_ids[image]} of subject {data.subjects[subject]}"
            parts.append(f"{int(cells.sum())} only in {name} ({first})")
    raise ValueError(f"different image sets: {', '.join(parts)}; score both on one test set")


def _roles(pair: _Pair, rules: Rules) -> tuple[dict[str, Role], list[str]]:
    """Return metric -> role of all that are compared, the blocking ones first, and notes on those that are not."""
    asked = rules.blocking is not None
    wanted = [key for key in CARDS if key in rules.blocking] if rules.blocking is not None else list(BLOCKING)
    everything = asked and set(wanted) == set(CARDS)  # "all" means all that there are
    for own, name in zip(pair.only, ("candidate", "baseline"), strict=True):
        alone = [key for key in wanted if key in own]
        if alone:
            raise ValueError(
                f"{', '.join(alone)} would block, but only the {name} has scores of it; score both with the same "
                "metrics, or name what blocks with --fail"
            )
    absent = [key for key in wanted if key not in pair.metrics]
    if asked and absent and not everything:
        raise ValueError(f"{absent[0]} would block, but neither side has scores of it; leave it out of --fail")
    blocking = [key for key in wanted if key in pair.metrics]
    if not blocking and (rules.blocking is None or rules.blocking):
        raise ValueError(
            f"no metric blocks: there are {', '.join(pair.metrics)}; name what blocks with --fail, e.g. "
            f"--fail {pair.metrics[0]}"
        )
    for key in blocking:
        if pair.undefined[1].get(key):
            raise ValueError(
                f"{key} blocks, but the baseline has no value on {pair.undefined[1][key]} images (of one flat "
                "colour?); leave it out of --fail, or choose another baseline"
            )
    rest = [key for key in pair.metrics if key not in blocking and not pair.undefined[1].get(key)]
    if rules.advisory is not None:
        rest = [key for key in rest if key in rules.advisory]
    notes = []
    alone = [key for own in pair.only for key in own]
    if alone:
        notes.append(f"{', '.join(alone)}: only one side has scores of it, not compared")
    roles: dict[str, Role] = {}
    for key in (*blocking, *rest):
        roles[key] = "blocking" if key in blocking else "advisory"
    return roles, notes


def _remarks(candidate: Side, baseline: Side, pair: _Pair, findings: Sequence[Finding], rules: Rules) -> list[str]:
    notes = []
    hashes = (candidate.protocol_hash, baseline.protocol_hash)
    if None in hashes:
        notes.append("that both sides were scored under one protocol is the caller's word (--same-protocol)")
    counts = [len(own) for own in pair.seeds]
    if min(counts) > 1:
        notes.append(f"{counts[0]} and {counts[1]} seeds: what varies between trainings is in intervals and p")
    elif max(counts) > 1:
        notes.append("only one side has several seeds: intervals and p do not hold what varies between trainings")
    blunt = [f.metric for f in findings if f.detectable is None and f.role == "blocking" and f.ci_low != f.ci_high]
    if blunt:
        notes.append(f"so few images that a drop in one metric alone is never found: {', '.join(blunt)}")
    for f in findings:
        if f.undefined:
            notes.append(f"{f.metric}: the candidate has no value on {f.undefined} images (of one flat colour?)")
    same = [f.metric for f in findings if f.ci_low == f.ci_high == 0]
    if len(same) == len(findings):
        notes.append("the scores are identical")
    return notes


def _worse(
    pair: _Pair, keys: Sequence[str], a: Floats, b: Floats, higher: np.ndarray, blocking: np.ndarray
) -> tuple[Worse, ...]:
    """Return the images with a drop over the blocking metrics (over all where none blocks), the largest first."""
    chosen = blocking if blocking.any() else np.ones_like(blocking)
    first, second = a.mean(axis=0), b.mean(axis=0)  # (metrics, subjects, images)
    drop = np.where(higher, -1.0, 1.0)[:, None, None] * (first - second)
    seen = np.maximum(np.isfinite(drop).sum(axis=(1, 2), keepdims=True), 1)
    mean = np.nansum(drop, axis=(1, 2), keepdims=True) / seen
    scale = np.sqrt(np.nansum((drop - mean) ** 2, axis=(1, 2), keepdims=True) / seen)
    standard = np.where(scale > 0, drop / np.where(scale > 0, scale, 1.0), np.where(np.isnan(drop), np.nan, 0.0))[
        chosen
    ]
    counted = np.isfinite(standard).sum(axis=0)
    total = np.where(counted > 0, np.nansum(standard, axis=0) / np.maximum(counted, 1), -np.inf)
    subjects, images = np.nonzero(total > 0)
    order = np.lexsort((images, np.array(pair.subjects)[subjects], -total[subjects, images]))
    subjects, images = subjects[order], images[order]
    drops = total[subjects, images].tolist()
    values = np.stack([second, first], axis=-1)[:, subjects, images].swapaxes(0, 1)  # (found, metrics, 2)
    known = np.isfinite(values[..., 1])
    return tuple(
        Worse(
            subject=pair.subjects[s],
            image_id=pair.image_ids[i],
            drop=drop,
            values={key: (old, new) for key, (old, new), there in zip(keys, own, finite, strict=True) if there},
        )
        for s, i, drop, own, finite in zip(
            subjects.tolist(), images.tolist(), drops, values.tolist(), known.tolist(), strict=True
        )
    )
