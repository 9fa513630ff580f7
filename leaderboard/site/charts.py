"""Charts as SVG: curves along a sweep's axis, and how the scores of single images are spread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from leaderboard.ranking import Ranking
from leaderboard.schema import Interval, Row
from leaderboard.site.chapters import Axis
from leaderboard.statistics import Floats
from metrics.cards import CARDS, format_value

_WIDTH, _HEIGHT = 260.0, 150.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 40.0, 8.0, 8.0, 20.0


@dataclass(frozen=True)
class Point:
    """A place on the axis, what stands under it, and a value with or without an interval."""

    at: float
    label: str
    value: Interval


def own_points(key: str, rows: Sequence[Row], axis: Axis) -> list[Point]:
    """Return the values of our rows on a metric."""
    return [
        Point(axis.values[row.variant], axis.label(row.variant), row.metrics[key]) for row in rows if key in row.metrics
    ]


def curve(
    key: str,
    rows: Sequence[Row],
    axis: Axis,
    *,
    own: Sequence[Point] = (),
    printed: Sequence[Point] = (),
    lines: Sequence[tuple[int, float]] = (),
) -> str:
    """Return one metric along an axis.

    Args:
        key: of the metric.
        rows: all rows of the axis, whether or not they have a point.
        axis: what varies.
        own: our points, joined, with intervals.
        printed: published points, joined by a broken line.
        lines: levels across, each with the number of its pattern.
    """
    points = [*own, *printed]
    if not points:
        return '<p class="soft">no value</p>'
    levels = [mean for _, mean in lines]
    for point in points:
        value = point.value
        levels += [level for level in (value.mean, value.ci_low, value.ci_high) if level is not None]
    marks = ticks(min(levels), max(levels))
    low, high = min(*levels, marks[0]), max(*levels, marks[-1])
    places = {axis.label(row.variant): _position(axis, axis.values[row.variant]) for row in rows}
    left, right = min(places.values()), max(places.values())

    def x(value: float) -> float:
        share = (_position(axis, value) - left) / (right - left) if right > left else 0.5
        return _LEFT + 10 + share * (_WIDTH - _LEFT - _RIGHT - 20)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for mark in marks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y(mark):.1f}H{_WIDTH - _RIGHT}"/>')
        label = tick_label(key, mark, marks)
        parts.append(f'<text x="{_LEFT - 5}" y="{y(mark) + 4:.1f}" text-anchor="end">{label}</text>')
    small = ' class="long"' if max(map(len, places)) * len(places) > 34 else ""
    free = -math.inf  # where the last label ends: one that would lie over it is left out
    for row in sorted(rows, key=lambda row: axis.values[row.variant]):
        place, label = x(axis.values[row.variant]), axis.label(row.variant)
        half = 3.2 * len(label)
        if axis.labels or place - half >= free:
            parts.append(f'<text{small} x="{place:.1f}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(label)}</text>')
            free = place + half
    parts += [f'<path class="ref d{index % 4}" d="M{_LEFT} {y(mean):.1f}H{_WIDTH - _RIGHT}"/>' for index, mean in lines]
    for point in own:
        value = point.value
        if value.ci_low is not None and value.ci_high is not None:
            parts.append(f'<path class="bar" d="M{x(point.at):.1f} {y(value.ci_low):.1f}V{y(value.ci_high):.1f}"/>')
    for name, series in (("line", own), ("line printed", printed)):
        if len(series) > 1 and not axis.labels:
            path = "L".join(f"{x(point.at):.1f} {y(point.value.mean):.1f}" for point in series)
            parts.append(f'<path class="{name}" d="M{path}"/>')
    for point in own:
        parts.append(
            f'<circle class="dot" cx="{x(point.at):.1f}" cy="{y(point.value.mean):.1f}" r="3.2">'
            f"<title>{escape(_spoken(key, axis, point))}</title></circle>"
        )
    for point in printed:
        across, down = x(point.at), y(point.value.mean)
        parts.append(
            f'<rect class="printed" x="{across - 3:.1f}" y="{down - 3:.1f}" width="6" height="6">'
            f"<title>printed, {escape(_spoken(key, axis, point))}</title></rect>"
        )
    spoken = f"{key} against {axis.name}. " + "; ".join(
        prefix + "; ".join(f"{point.label}: {format_value(key, point.value.mean)}" for point in series)
        for prefix, series in (("", own), ("printed: ", printed))
        if series
    )
    return f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(spoken)}">{"".join(parts)}</svg>'


# What page.css says of a curve, for a picture that stands by itself; both light, on white.
_SHEET_STYLE = (
    "text{font:11px Helvetica,Arial,sans-serif;fill:#5c626b}.title{font-size:13px;font-weight:bold;fill:#1b1d21}"
    ".long{font-size:8px}.grid{stroke:#dfe1e4}.bar,.line{stroke:#0b5cab;fill:none;stroke-width:1.5}.dot{fill:#0b5cab}"
    ".ref{stroke:#6b7280;stroke-width:1.4;fill:none}.d0{stroke-dasharray:1 4;stroke-linecap:round}"
    ".d1{stroke-dasharray:5 4}.d2{stroke-dasharray:9 3 2 3}.d3{stroke-dasharray:14 4}"
)
_COLUMNS, _TITLE, _GAP = 4, 22.0, 14.0


def sheet(ranking: Ranking, axis: Axis) -> str:
    """Return every metric along an axis as one SVG document; empty where fewer than two rows are on the axis."""
    rows = [entry.row for entry in ranking.entries if entry.row.variant in axis.values]
    rows.sort(key=lambda row: axis.values[row.variant])
    if len(rows) < 2:
        return ""
    wide, high = _WIDTH + _GAP, _HEIGHT + _TITLE + _GAP
    parts = []
    for place, key in enumerate(ranking.metrics):
        left, top = _GAP + place % _COLUMNS * wide, _GAP + place // _COLUMNS * high
        lines = [(k, row.metrics[key].mean) for k, row in enumerate(ranking.references) if key in row.metrics]
        panel = curve(key, rows, axis, own=own_points(key, rows, axis), lines=lines)
        size = f'<svg x="{left:g}" y="{top + _TITLE:g}" width="{_WIDTH:g}" height="{_HEIGHT:g}" '
        parts.append(f'<text class="title" x="{left:g}" y="{top + 13:g}">{escape(key)} {CARDS[key].arrow}</text>')
        parts.append(panel.replace("<svg ", size, 1))
    bottom = _GAP + -(-len(ranking.metrics) // _COLUMNS) * high
    across = _GAP
    for k, row in enumerate(ranking.references):
        parts.append(f'<path class="ref d{k % 4}" d="M{across:g} {bottom + 6:g}h34"/>')
        parts.append(f'<text x="{across + 40:g}" y="{bottom + 10:g}">{escape(row.name)}</text>')
        across += 64 + 6.5 * len(row.name)
    width, height = _GAP + _COLUMNS * wide, bottom + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}">\n<title>{escape(f"All metrics against {axis.name}")}</title>\n'
        f'<style>{_SHEET_STYLE}</style>\n<rect width="100%" height="100%" fill="#fff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _spoken(key: str, axis: Axis, point: Point) -> str:
    value = point.value
    shown = f"{axis.name} {point.label}: {format_value(key, value.mean)}"
    if value.ci_low is not None and value.ci_high is not None:
        shown += f" ({format_value(key, value.ci_low)} to {format_value(key, value.ci_high)})"
    return shown


def _position(axis: Axis, value: float) -> float:
    return math.log(value) if axis.log else value


def ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers that span ``low`` to ``high``."""
    span = max(high - low, 1e-3)
    raw = span / 3
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]


def tick_label(key: str, tick: float, marks: Sequence[float]) -> str:
    """Return what stands beside a tick: as many digits as tell it from the others."""
    scale = 100 if CARDS[key].percent else 1
    digits = max(0, -math.floor(math.log10((marks[1] - marks[0]) * scale) + 1e-9))
    return f"{tick * scale:.{digits}f}" + ("%" if CARDS[key].percent else "")


# --- spread over images ---

_BINS = 16
_LOW = 128.0  # height of a histogram's floor


def histogram(
    key: str, values: Floats, span: tuple[float, float], mean: Interval | None, levels: Mapping[str, float]
) -> str:
    """Return how the scores of single images are spread.

    Args:
        key: of the metric.
        values: finite scores, one an image and subject.
        span: lowest and highest value of the axis: the same for all rows, so that their pages compare.
        mean: drawn as a line, with its interval as a band.
        levels: name -> a level to compare with, e.g. chance.
    """
    marks = ticks(*span)
    low, high = marks[0], marks[-1]
    counts, edges = np.histogram(values, bins=_BINS, range=(low, high))
    most = max(int(counts.max()), 1)

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(count: float) -> float:
        return _LOW - count / most * (_LOW - _TOP)

    parts = [f'<path class="grid" d="M{_LEFT} {_LOW}H{_WIDTH - _RIGHT}"/>']
    parts += [
        f'<text x="{_LEFT - 5}" y="{y(count) + 4:.1f}" text-anchor="end">{count}</text>' for count in sorted({0, most})
    ]
    parts += [
        f'<text x="{x(mark):.1f}" y="{_HEIGHT - 4}" text-anchor="middle">{tick_label(key, mark, marks)}</text>'
        for mark in marks
    ]
    wide = (_WIDTH - _LEFT - _RIGHT) / _BINS
    bars = "".join(
        f"M{x(edge) + 0.5:.1f} {_LOW:g}V{y(count):.1f}h{wide - 1:.1f}V{_LOW:g}z"
        for edge, count in zip(edges.tolist(), counts.tolist(), strict=False)
        if count
    )
    parts.append(f'<path class="count" d="{bars}"/>')
    if mean is not None:
        if mean.ci_low is not None and mean.ci_high is not None:
            left, right = x(max(mean.ci_low, low)), x(min(mean.ci_high, high))
            parts.append(
                f'<rect class="band" x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{_LOW - _TOP}"/>'
            )
        parts.append(f'<path class="mean" d="M{x(mean.mean):.1f} {_TOP - 4}V{_LOW}"/>')
    parts += [
        f'<path class="ref d{index % 4}" d="M{x(level):.1f} {_TOP}V{_LOW}"/>'
        for index, level in enumerate(levels.values())
        if low <= level <= high
    ]
    lowest, first, median, third, highest = np.percentile(values, [0, 25, 50, 75, 100]).tolist()
    spoken = (
        f"{key} of {len(values)} images: from {format_value(key, lowest)} to {format_value(key, highest)}, half of "
        f"them between {format_value(key, first)} and {format_value(key, third)}, median {format_value(key, median)}"
    )
    return f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(spoken)}">{"".join(parts)}</svg>'
