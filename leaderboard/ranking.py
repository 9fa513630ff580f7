"""Which row is best, and how sure that is.

Rows are ranked within one track and one protocol hash. On each metric the best mean has rank 1 (the direction comes
from the metric's card, ties share the average rank); a row's overall rank orders the mean of these. A row without all
metrics has no overall rank and does not shift those of the others.

The uncertainty of a rank comes from ranking every crossed bootstrap resample anew (see :mod:`leaderboard.statistics`):
it says how far the order depends on the images and subjects scored, not how it would change with another training run.
Rows whose intervals overlap are tied: a row's *place*, which tables show, counts only the rows whose whole interval
lies before its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import rankdata

from leaderboard.schema import Row
from leaderboard.statistics import Floats, Scores, bootstrap_means, compare, scores
from metrics.cards import CARDS

ALPHA = 0.05


@dataclass(frozen=True)
class Entry:
    """A row of kind "method" and its place.

    Attributes:
        rank: overall, from 1, equal mean ranks share the smaller number; ``None`` where a metric is missing.
        mean_rank: mean over metrics of the rank on each.
        ranks: metric -> rank among the rows that have an overall rank.
        p_best: share of resamples in which the row is first (a shared first place counts in parts).
        rank_low: 2.5 percentile of the overall rank over resamples.
        rank_high: 97.5 percentile.
        place: one more than the rows whose interval of ranks ends before this row's begins; the rank itself where there
            are no intervals.
        tied: whether another row's interval of ranks overlaps this one's.
    """

    row: Row
    rank: int | None = None
    mean_rank: float | None = None
    ranks: dict[str, float] | None = None
    p_best: float | None = None
    rank_low: int | None = None
    rank_high: int | None = None
    place: int | None = None
    tied: bool = False

    @property
    def shown_place(self) -> str:
        """The place as tables show it, ``2=`` where rows are tied; empty where there is none."""
        return "" if self.place is None else f"{self.place}{'=' if self.tied else ''}"


@dataclass(frozen=True)
class Ranking:
    """Rows of one track and protocol in order, best first; branches and references in the order given.

    Attributes:
        metrics: keys that any row has, in canonical order.
        sentence: which row is best and how sure that is.
    """

    track: str
    protocol: str
    protocol_hash: str
    metrics: tuple[str, ...]
    entries: tuple[Entry, ...]
    branches: tuple[Row, ...]
    references: tuple[Row, ...]
    sentence: str

    @property
    def rows(self) -> tuple[Row, ...]:
        """Return all rows, in the order in which tables show them."""
        return (*(entry.row for entry in self.entries), *self.branches, *self.references)

    def name(self, row: Row) -> str:
        """Name a row, with its method in front where several methods stand in the table."""
        if row.variant and row.kind == "method" and len({entry.row.method for entry in self.entries}) > 1:
            return f"{row.method}, {row.variant}"
        return row.name

    def best(self, metric: str) -> set[tuple[str, str]]:
        """Return the keys of the ranked rows whose mean, unrounded, is the best of a metric."""
        have = [entry.row for entry in self.entries if metric in entry.row.metrics]
        if not have:
            return set()
        choose = max if CARDS[metric].direction == "higher" else min
        best = choose(row.metrics[metric].mean for row in have)
        return {row.key for row in have if row.metrics[metric].mean == best}


def group(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Sort rows by (track, protocol hash): the groups that can be ranked, each by itself."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.track, row.protocol_hash), []).append(row)
    return groups


def rank(rows: Sequence[Row], per_image: Any = None, *, n_resamples: int = 2000, seed: int = 0) -> Ranking:
    """Rank rows of one track and one protocol.

    Args:
        rows: result rows; those of kind "reference" and "branch" are carried along without a rank.
        per_image: per-image scores of the rows (table as in :mod:`leaderboard.statistics`); without it, or where a
            ranked row has none, ranks have no uncertainty.
        n_resamples: bootstrap resamples.
        seed: of the bootstrap and the permutations.

    Raises:
        ValueError: no rows, several tracks or protocol hashes, or the same (method, variant) twice.
    """
    if not rows:
        raise ValueError("no rows to rank")
    groups = group(rows)
    if len(groups) > 1:
        shown = "; ".join(
            f"{track}, protocol {digest[:8]}: {len(members)}" for (track, digest), members in groups.items()
        )
        raise ValueError(f"rows of different tracks or protocols are never ranked together ({shown}); pass one group")
    keys = [row.key for row in rows]
    twice = sorted({" ".join(key).strip() for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"more than one row of {', '.join(twice)}; give each its own variant name")

    metrics = tuple(key for key in CARDS if any(key in row.metrics for row in rows))
    methods = [row for row in rows if row.kind == "method"]
    needed = [key for key in metrics if any(key in row.metrics for row in methods)]
    complete = [row for row in methods if needed and all(key in row.metrics for key in needed)]
    ranked: list[Entry] = []
    sentence = "no row has every metric, so none has an overall rank"
    if complete:
        by_metric = _ranks(np.array([[row.metrics[key].mean for key in needed] for row in complete]), needed)
        overall = rankdata(by_metric.sum(axis=1), method="min").astype(int)
        resampled = _resampled_ranks(complete, needed, per_image, n_resamples, seed)
        for index in np.argsort(overall, kind="stable"):
            entry = Entry(
                row=complete[index],
                rank=int(overall[index]),
                mean_rank=float(by_metric[index].mean()),
                ranks=dict(zip(needed, by_metric[index].tolist(), strict=True)),
            )
            ranked.append(entry if resampled is None else _with_uncertainty(entry, resampled, int(index)))
    ranked = _with_ties(ranked)
    placed = {entry.row.key for entry in ranked}
    ordered = [*ranked, *(Entry(row) for row in methods if row.key not in placed)]
    ranking = Ranking(
        track=rows[0].track,
        protocol=rows[0].protocol,
        protocol_hash=rows[0].protocol_hash,
        metrics=metrics,
        entries=tuple(ordered),
        branches=tuple(row for row in rows if row.kind == "branch"),
        references=tuple(row for row in rows if row.kind == "reference"),
        sentence=sentence,
    )
    if not ranked:
        return ranking
    return replace(ranking, sentence=_sentence(ranking, ranked, needed, per_image, seed))


def _ranks(means: Floats, metrics: Sequence[str]) -> Floats:
    """Rank (..., rows, metrics), 1 is best, means of that shape; rounded so that equal means tie."""
    signs = np.array([-1.0 if CARDS[key].direction == "higher" else 1.0 for key in metrics])
    return np.asarray(rankdata(np.round(means * signs, 12), axis=-2), dtype=np.float64)


def _scores_of(rows: Sequence[Row], metrics: Sequence[str], per_image: Any) -> Scores | None:
    """Return the per-image scores, where every row has every metric in them."""
    if per_image is None:
        return None
    data = per_image if isinstance(per_image, Scores) else scores(per_image, rows[0].track)
    if not set(metrics) <= set(data.metrics) or not {row.key for row in rows} <= set(data.keys):
        return None
    values = _values(data, rows, metrics)
    return data if np.isfinite(values).any(axis=(2, 3)).all() else None


def _values(data: Scores, rows: Sequence[Row], metrics: Sequence[str]) -> Floats:
    return data.values[np.ix_([data.row(row.key) for row in rows], [data.metrics.index(key) for key in metrics])]


def _resampled_ranks(
    rows: Sequence[Row], metrics: Sequence[str], per_image: Any, n_resamples: int, seed: int
) -> Floats | None:
    """Rank every resample: overall ranks (resamples, rows), ties sharing the smaller number."""
    data = _scores_of(rows, metrics, per_image)
    if data is None:
        return None
    means = bootstrap_means(_values(data, rows, metrics), n_resamples, seed)
    return np.asarray(rankdata(_ranks(means, metrics).sum(axis=2), method="min", axis=1), dtype=np.float64)


def _with_uncertainty(entry: Entry, resampled: Floats, index: int) -> Entry:
    first = resampled == 1
    low, high = np.percentile(resampled[:, index], [2.5, 97.5], method="nearest")
    p_best = float((first[:, index] / first.sum(axis=1)).mean())
    return replace(entry, p_best=p_best, rank_low=int(low), rank_high=int(high))


def _with_ties(ranked: Sequence[Entry]) -> list[Entry]:
    def ends(entry: Entry) -> tuple[int, int]:
        rank = entry.rank or 0
        low, high = entry.rank_low, entry.rank_high
        return (rank, rank) if low is None or high is None else (low, high)

    placed = []
    for entry in ranked:
        low, high = ends(entry)
        others = [ends(other) for other in ranked if other is not entry]
        before = sum(end < low for _, end in others)
        meets = any(start <= high and end >= low for start, end in others)
        placed.append(replace(entry, place=1 + before, tied=meets))
    return placed


def _sentence(ranking: Ranking, ranked: Sequence[Entry], metrics: Sequence[str], per_image: Any, seed: int) -> str:
    best = ranked[0]
    name = ranking.name(best.row)
    if len(ranked) == 1:
        return f"only one ranked row: {name}"
    tied = [entry for entry in ranked if entry.rank == 1]
    if len(tied) > 1:
        names = ", ".join(ranking.name(entry.row) for entry in tied)
        return f"best: a tie of {names} (mean rank {best.mean_rank:.1f}{_share(tied)})"
    second = ranking.name(ranked[1].row)
    facts = [f"mean rank {best.mean_rank:.1f}{_share([best])}"]
    data = _scores_of([best.row, ranked[1].row], metrics, per_image)
    if data is None:
        facts.append("no per-image scores, so how sure this is cannot be said")
    else:
        pairs = compare(data, best.row.key, ranked[1].row.key, metrics=metrics, seed=seed, n_resamples=100).values()
        level = sum(pair.q >= ALPHA for pair in pairs)
        behind = sum(pair.q < ALPHA and pair.better == "b" for pair in pairs)
        facts.append(
            f"not separable from {second} on {level} of {len(metrics)} metrics"
            if level
            else f"separable from {second} on all {len(metrics)} metrics"
        )
        if behind:
            facts.append(f"behind it on {behind}")
    return f"best: {name} ({'; '.join(facts)})"


def _share(entries: Sequence[Entry]) -> str:
    shares = [entry.p_best for entry in entries if entry.p_best is not None]
    if not shares:
        return ""
    each = " and ".join(f"{100 * share:.0f} %" for share in shares)
    return f"; best in {each} of resamples"
