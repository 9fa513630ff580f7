"""Write a leaderboard: ``leaderboard.json`` and its site in one folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leaderboard.ranking import Ranking, rank
from leaderboard.schema import Row, write_leaderboard
from leaderboard.site import Axis, Chapter, Gallery, build_report
from leaderboard.statistics import scores


def build(
    out: Path,
    rows: Sequence[Row],
    per_image: Any = None,
    galleries: Sequence[Gallery] = (),
    axis: Axis | None = None,
    notes: Mapping[str, str] | None = None,
    pictures: Mapping[str, tuple[str, str]] | None = None,
    *,
    title: str = "Leaderboard",
    about: str = "",
    n_resamples: int = 2000,
    seed: int = 0,
) -> Ranking:
    """Rank the rows, write ``out/leaderboard.json`` and the site (:mod:`leaderboard.site`), return the ranking.

    Every file is replaced atomically, and the page before its old images go, so a reader never sees a broken page.

    Args:
        out: folder, made where it is missing; files in it that are not the leaderboard's stay.
        rows: rows of one track and one protocol hash, in the order in which equal rows shall stand.
        per_image: their per-image scores: a pyarrow.Table, a pandas.DataFrame, or a mapping of columns.
        galleries: seen and reconstructed images; the first of each variant
            and subject are shown as they come, so do not select these.
        axis: what the sweep varied; draws each metric against it.
        notes: metric key -> what stands in for its network on this track; default what the rows say.
        pictures: whose images a row's scores are of, as in :class:`leaderboard.site.Chapter`.
        title: heading of the page.
        about: what a stranger must know first, e.g. that the brains are simulated; shown under the heading.
        n_resamples: bootstrap resamples of the ranks.
        seed: of the bootstrap and the permutations.

    Raises:
        ValueError: rows that are never compared, malformed per-image scores, a gallery image that cannot be read.
    """
    data = scores(per_image, rows[0].track) if per_image is not None and rows else None
    ranking = rank(rows, data, n_resamples=n_resamples, seed=seed)
    chapter = Chapter(ranking, title, about, data, tuple(galleries), axis, notes=notes or {}, pictures=pictures or {})
    build_report(out, [chapter], title=title, about=about)
    write_leaderboard(out / "leaderboard.json", ranking.rows)
    return ranking
