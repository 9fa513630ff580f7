"""What a site shows: leaderboards with their scores, images, and what a sweep varied."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from leaderboard.orderings import Ordering
from leaderboard.published import PublishedRow, published
from leaderboard.ranking import Ranking
from leaderboard.schema import Row
from leaderboard.statistics import Scores
from leaderboard.table import judges

_POINT = re.compile(r"(?P<name>[^=]+)=(?P<value>\d+(?:\.\d+)?)")
_FEWEST_POINTS = 3  # of an axis that only the variants' names tell of


@dataclass(frozen=True)
class Axis:
    """What a sweep varied.

    Attributes:
        name: e.g. "clusters".
        values: variant -> position; variants that are not on the axis are left out of the curves.
        log: whether positions are spaced by their logarithm.
        labels: variant -> what stands under its position, where that is no number; points are then not joined.
    """

    name: str
    values: Mapping[str, float]
    log: bool = True
    labels: Mapping[str, str] = field(default_factory=dict)

    def label(self, variant: str) -> str:
        """Return what stands under a variant's position."""
        return self.labels.get(variant) or f"{self.values[variant]:g}"


@dataclass(frozen=True)
class Gallery:
    """One test image as seen by a subject, and what a variant made of the brain's response to it.

    Attributes:
        variant: as in the result row.
        subject: from 1.
        image_id: as in the per-image scores.
        seen: PNG file; so are ``lowlevel``, ``semantic`` and ``combined``.
        pixcorr: PixCorr of "lowlevel", "semantic" or "combined". Where "combined" is not given, it is looked up in the
            per-image scores.
    """

    variant: str
    subject: int
    image_id: int | str
    seen: Path
    lowlevel: Path
    semantic: Path
    combined: Path
    pixcorr: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Chapter:
    """One leaderboard of a site: rows of one track and protocol hash.

    Attributes:
        galleries: the first of each variant and subject are shown as they come, so do not select them; the others
            are shown where somebody looks for an image, as on the page of a pair.
        pictures: variant of a row -> the gallery's variant and column ("lowlevel", "semantic", "combined") that its
            scores are of; a variant that is not in it has the combined images of its own name.
        notes: metric key -> what fills it; default what the rows say.
        orderings: of the published table that the sweep answers.
        table: what that table is called.
        grid: picture of what each variant makes of the first test images, a path within the site's folder.
    """

    ranking: Ranking
    title: str
    about: str = ""
    per_image: Scores | None = None
    galleries: tuple[Gallery, ...] = ()
    axis: Axis | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    orderings: tuple[Ordering, ...] = ()
    table: str = ""
    pictures: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    grid: str = ""

    @cached_property
    def told(self) -> Mapping[str, str]:
        """What fills each metric's key."""
        return {**judges(self.ranking.rows), **self.notes}

    @property
    def axes(self) -> list[Axis]:
        """The sweep's axis, or those that the names of variants (``clusters=128``) tell of."""
        if self.axis is not None:
            return [self.axis]
        return named_axes(entry.row for entry in self.ranking.entries)

    def image_of(self, row: Row) -> tuple[str, str]:
        """Return which gallery and column show what a row's scores are of."""
        return self.pictures.get(row.variant, (row.variant, "combined"))


def named_axes(rows: Iterable[Row]) -> list[Axis]:
    """Return an axis for each name that three variants or more give a number to, as in ``clusters=128``."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if point := _POINT.fullmatch(row.variant):
            found.setdefault(point["name"], {})[row.variant] = float(point["value"])
    axes = []
    for name, values in found.items():
        if len(set(values.values())) >= _FEWEST_POINTS:
            low, high = min(values.values()), max(values.values())
            axes.append(Axis(name, values, log=low > 0 and high / low >= 8))
    return axes


def printed(row: Row) -> PublishedRow | None:
    """Return the published row that a row repeats, if any."""
    return published().get(row.answers)
