"""Does an ordering that a paper printed hold here? Our paired differences beside the paper's, metric by metric.

A published table says which of two variants is better on a metric. Whether the same is true of our scores is asked of
the very images: the paired difference, its interval and its permutation test (:mod:`leaderboard.statistics`). Where
there are several seeds, trainings are a sample as well as images: a difference then has to pass the test over images
and that over images and seeds, and no seed may have the other sign. Only the direction is compared, never the size:
this is what may be said across tracks, where the numbers themselves compare with nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from leaderboard.published import PublishedRow
from leaderboard.statistics import Comparison, Floats, Key, compare, scores, seeds_test
from metrics.cards import CARDS

if TYPE_CHECKING:
    from rich.console import Console

ALPHA = 0.05
_ROUNDING = 1e-9  # published figures are decimals: a difference below this is none

Verdict = Literal["holds", "reversed", "cannot be told", "printed equal"]


@dataclass(frozen=True)
class Difference:
    """One variant minus the reference variant on one metric.

    Attributes:
        variant, reference: names of our rows.
        metric: its key.
        difference, ci_low, ci_high, p, q: as of :class:`leaderboard.statistics.Comparison`; with several seeds the
            interval is over them too, and p the larger of the permutation's and
            :func:`leaderboard.statistics.seeds_test`'s; q over all metrics and variants that were asked together.
        seeds: how many seeds there are.
        seeds_agreeing: of how many the mean difference has the sign of the whole.
    """

    variant: str
    reference: str
    metric: str
    difference: float
    ci_low: float
    ci_high: float
    p: float
    q: float
    seeds: int
    seeds_agreeing: int

    @property
    def told(self) -> bool:
        """Whether it is told from zero: its interval leaves zero out, q is below .05, and every seed agrees."""
        apart = self.ci_low > 0 or self.ci_high < 0
        return bool(self.q < ALPHA and apart and self.seeds_agreeing == self.seeds)

    @property
    def better(self) -> bool:
        """Whether the variant is above the reference, by the metric's direction."""
        return self.difference > 0 if CARDS[self.metric].direction == "higher" else self.difference < 0


@dataclass(frozen=True)
class Ordering(Difference):
    """A difference, and what the paper prints for the same two variants.

    Attributes:
        printed: the published difference, variant minus reference.
        verdict: "holds" or "reversed" where ours is told from zero; "printed equal" where the paper's figures are the
            same.
    """

    printed: float
    verdict: Verdict

    @property
    def printed_better(self) -> bool:
        """Whether the paper has the variant above the reference."""
        return self.printed > 0 if CARDS[self.metric].direction == "higher" else self.printed < 0


def differences(
    per_image: pa.Table,
    asked: Mapping[Key, Sequence[str] | None],
    reference: Key,
    *,
    n_resamples: int = 2000,
    n_permutations: int = 9999,
    seed: int = 0,
) -> list[Difference]:
    """Return how each row stands to the reference, paired over images and, where both have several, seeds.

    Args:
        per_image: scores of all rows named, as of :func:`leaderboard.statistics.scores`; one track, any seeds.
        asked: row -> metrics, those that both have; None asks all.
        reference: the row that the others are held against.
        n_resamples, n_permutations, seed: of the interval and the test.

    Raises:
        ValueError: a row is absent, or scored on other images than the reference.
    """
    by_seed = {
        s: per_image.filter(pc.equal(per_image["seed"], s)) for s in sorted(pc.unique(per_image["seed"]).to_pylist())
    }
    found: list[tuple[Key, Comparison, list[float]]] = []
    for key, wanted in asked.items():
        metrics = [m for m in wanted or CARDS if _have(per_image, (key, reference), m)]
        if not metrics:
            continue
        options: dict[str, Any] = {"metrics": metrics, "n_permutations": n_permutations}
        whole = compare(per_image, key, reference, n_resamples=n_resamples, seed=seed, **options)
        by_training: dict[str, list[float]] = {m: [] for m in metrics}
        if (trainings := _trainings(by_seed, key, reference, metrics)) is not None:
            a, b, paired = trainings
            low, high, p = seeds_test(a, b, paired=paired, n_resamples=n_resamples, seed=seed)
            for k, m in enumerate(metrics):
                larger_p = max(whole[m].p, float(p[k]))
                whole[m] = replace(whole[m], ci_low=float(low[k]), ci_high=float(high[k]), p=larger_p)
                if paired:
                    by_training[m] = np.nanmean(a[:, k] - b[:, k], axis=(-2, -1)).tolist()
        found += [(key, whole[m], by_training[m]) for m in metrics]
    q = _adjusted([ours.p for _, ours, _ in found])
    return [
        Difference(
            variant=key[1],
            reference=reference[1],
            metric=ours.metric,
            difference=ours.difference,
            ci_low=ours.ci_low,
            ci_high=ours.ci_high,
            p=ours.p,
            q=float(adjusted),
            seeds=max(1, len(each)),
            seeds_agreeing=sum(bool(np.sign(v) == np.sign(ours.difference)) for v in each) if each else 1,
        )
        for (key, ours, each), adjusted in zip(found, q, strict=True)
    ]


def orderings(
    per_image: pa.Table,
    rows: Mapping[Key, PublishedRow],
    reference: tuple[Key, PublishedRow],
    *,
    n_resamples: int = 2000,
    n_permutations: int = 9999,
    seed: int = 0,
) -> list[Ordering]:
    """Return how each row stands to the reference here, beside how the paper has it.

    Args:
        per_image: as of :func:`differences`.
        rows: our row -> the published row that it answers to.
        reference: our reference row and its published one.
        n_resamples, n_permutations, seed: of the interval and the test.

    Returns:
        One entry for each row and each metric that both published rows print and both of ours have.

    Raises:
        ValueError: a row is absent, or scored on other images than the reference.
    """
    own, own_printed = reference
    asked = {key: [m for m in CARDS if m in row.metrics and m in own_printed.metrics] for key, row in rows.items()}
    found = differences(
        per_image,
        {key: metrics for key, metrics in asked.items() if metrics},
        own,
        n_resamples=n_resamples,
        n_permutations=n_permutations,
        seed=seed,
    )
    by_variant = {key[1]: row for key, row in rows.items()}
    result = []
    for ours in found:
        printed = by_variant[ours.variant].metrics[ours.metric] - own_printed.metrics[ours.metric]
        verdict: Verdict
        if abs(printed) < _ROUNDING:
            verdict = "printed equal"
        elif not ours.told:
            verdict = "cannot be told"
        else:
            verdict = "holds" if (ours.difference > 0) == (printed > 0) else "reversed"
        result.append(Ordering(**asdict(ours), printed=printed, verdict=verdict))
    return result


_SHORT = {"holds": "holds", "reversed": "reversed", "cannot be told": "?", "printed equal": "="}
LEGEND = (
    "better, worse: as the paper prints it, against the reference. holds, reversed: told from zero by our paired "
    "images and, where there are several, seeds (q < .05, and every seed agrees); ?: cannot be told at this size; "
    "=: the paper prints no difference."
)


def summary(found: Sequence[Ordering]) -> str:
    """Say in one line how many of the paper's orderings hold, are reversed, or cannot be told."""
    counts = {verdict: sum(one.verdict == verdict for one in found) for verdict in _SHORT}
    asked = len(found) - counts["printed equal"]
    return (
        f"of {asked} orderings that the paper prints, {counts['holds']} hold, {counts['reversed']} are reversed, "
        f"{counts['cannot be told']} cannot be told at this size"
    )


def cells(found: Sequence[Ordering]) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Return metrics and, for each variant, what to print under each; for tables of any kind."""
    metrics = tuple(m for m in CARDS if any(one.metric == m for one in found))
    rows = {}
    for variant in dict.fromkeys(one.variant for one in found):
        own = {one.metric: one for one in found if one.variant == variant}
        rows[variant] = tuple(_cell(own.get(m)) for m in metrics)
    return metrics, rows


def orderings_markdown(found: Sequence[Ordering]) -> str:
    """Return the verdicts as a Markdown table, a row a variant, a column a metric; empty where there are none."""
    if not found:
        return ""
    metrics, rows = cells(found)
    lines = [f"| against {found[0].reference} | " + " | ".join(metrics) + " |", "|---|" + "---|" * len(metrics)]
    lines += [f"| {variant} | " + " | ".join(own) + " |" for variant, own in rows.items()]
    return "\n".join(lines)


DIFFERENCES = (
    "variant minus reference (points, of percentages) with its 95 % interval, paired over images and, where there are "
    "several, seeds. better, worse: told from zero (q < .05, and every seed agrees)."
)


def differences_markdown(found: Sequence[Difference]) -> str:
    """Return the differences as a Markdown table, a row a variant, a column a metric; empty where there are none."""
    if not found:
        return ""
    metrics = [m for m in CARDS if any(one.metric == m for one in found)]
    lines = [f"| minus {found[0].reference} | " + " | ".join(f"{m} {CARDS[m].arrow}" for m in metrics) + " |"]
    lines.append("|---|" + "---|" * len(metrics))
    for variant in dict.fromkeys(one.variant for one in found):
        own = {one.metric: _difference(one) for one in found if one.variant == variant}
        lines.append(f"| {variant} | " + " | ".join(own.get(m, "") for m in metrics) + " |")
    return "\n".join(lines)


def differences_lines(found: Sequence[Difference]) -> list[str]:
    """Say for each variant on which metrics it is better or worse than the reference; a line each."""
    lines = []
    for variant in dict.fromkeys(one.variant for one in found):
        own = [one for one in found if one.variant == variant]
        parts = [
            f"{word} on {', '.join(one.metric for one in own if one.told and one.better is better)}"
            for word, better in (("better", True), ("worse", False))
            if any(one.told and one.better is better for one in own)
        ]
        if untold := sum(not one.told for one in own):
            parts.append(f"{untold} of {len(own)} metrics cannot be told" if parts else "cannot be told on any metric")
        lines.append(f"{variant} against {own[0].reference}: {'; '.join(parts)}")
    return lines


def _difference(one: Difference) -> str:
    percent = CARDS[one.metric].percent
    scale, digits = (100, 1) if percent else (1, 3)
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in (one.difference, one.ci_low, one.ci_high))
    told = (", better" if one.better else ", worse") if one.told else ""
    return f"{mean} ({low} to {high}){told}"


def print_orderings(found: Sequence[Ordering], table: str, console: Console | None = None) -> None:
    """Print the verdicts as a table; ``table`` names the published one."""
    from rich.console import Console
    from rich.table import Table

    if not found:
        return
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(file=console.file, width=120, highlight=False, no_color=True)
    metrics, rows = cells(found)
    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    shown.add_column(f"against {found[0].reference}")
    for metric in metrics:
        shown.add_column(metric)
    for variant, own in rows.items():
        shown.add_row(variant, *(cell.replace(": ", "\n") for cell in own))
    console.print(f"The orderings of {table}, asked of our images: {summary(found)}.", markup=False)
    console.print(shown)
    console.print(LEGEND, style="dim", markup=False)


def _cell(ordering: Ordering | None) -> str:
    if ordering is None:
        return ""
    if ordering.verdict == "printed equal":
        return "="
    return f"{'better' if ordering.printed_better else 'worse'}: {_SHORT[ordering.verdict]}"


def _have(table: pa.Table, keys: tuple[Key, ...], metric: str) -> bool:
    def present(key: Key) -> bool:
        same = pc.and_(pc.equal(table["method"], key[0]), pc.equal(table["variant"], key[1]))
        return bool(pc.any(pc.and_(same, pc.equal(table["metric"], metric))).as_py())

    return all(present(key) for key in keys)


def _trainings(
    by_seed: Mapping[int, pa.Table], a: Key, b: Key, metrics: Sequence[str]
) -> tuple[Floats, Floats, bool] | None:
    """Return the scores of each training of two rows, (seeds, metrics, subjects, images) each, and whether seeds pair.

    None where not both have several.
    """
    sides = []
    for key in (a, b):
        own = {s: table for s, table in by_seed.items() if all(_have(table, (key,), m) for m in metrics)}
        if len(own) < 2:
            return None
        data = [scores(_of(table, key)) for table in own.values()]
        if any((one.subjects, one.image_ids) != (data[0].subjects, data[0].image_ids) for one in data):
            raise ValueError(f"{' '.join(key).strip()}: seeds were scored on different subjects or images")
        places = [data[0].metrics.index(m) for m in metrics]
        sides.append((tuple(own), np.stack([one.values[0, places] for one in data])))
    (seeds_a, values_a), (seeds_b, values_b) = sides
    return values_a, values_b, seeds_a == seeds_b


def _of(table: pa.Table, key: Key) -> pa.Table:
    return table.filter(pc.and_(pc.equal(table["method"], key[0]), pc.equal(table["variant"], key[1])))


def _adjusted(p: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(p) if len(p) else [], dtype=np.float64)
