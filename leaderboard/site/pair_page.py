"""The page of a pair: seen image, A, B and their differences, image by image, for any two rows of a leaderboard.

One file serves all pairs; its address says which (``pair.html#a=ID&b=ID``). A page from file:// may fetch nothing, so
the per-image scores stand in it, as whole numbers between the lowest and the highest score of a metric. Differences
with intervals and tests are those of :func:`leaderboard.statistics.compare`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from itertools import combinations
from typing import Any

import numpy as np

from leaderboard.schema import Row, row_id
from leaderboard.site.board import Places
from leaderboard.site.chapters import Chapter
from leaderboard.site.html import document
from leaderboard.site.pictures import MADE
from leaderboard.statistics import Key, Scores, compare
from metrics.cards import CARDS

BYTES = 700_000
"""Room for scores on the page: two bytes each where they fit, else one, else those of the most telling images."""

PAIRS, WORK = 120, 40_000
"""Pairs whose means are tested, and images compared over all of them: the best rows' come first."""


def paired(chapter: Chapter) -> list[Row]:
    """Return the rows that have per-image scores, as tables have them."""
    scores = chapter.per_image
    return [] if scores is None else [row for row in chapter.ranking.rows if row.key in scores.keys]


def pair_page(chapters: Sequence[Chapter], places: Sequence[Places], title: str) -> str:
    """Return the page."""
    size = sum(one.per_image.values[: len(paired(one))].size for one in chapters if one.per_image is not None)
    width = 2 if 2 * size <= BYTES else 1
    share = min(1.0, BYTES / max(1, width * size))
    data = [
        _group(chapter, own, width, share) for chapter, own in zip(chapters, places, strict=True) if paired(chapter)
    ]
    # "</" ends a script wherever it stands, and "<!--" changes how its end is found.
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    return document(
        f"Pairs – {title}",
        [
            '<p class="back"><a href="index.html">Leaderboard</a></p>\n',
            '<h1 tabindex="-1">Two rows, image by image</h1>\n',
            f'<div id="pair"><noscript><p>This page needs its script; {escape(_COMMAND)}</p></noscript></div>\n',
            f'<script type="application/json" id="data">{text}</script>\n',
        ],
        scripts=("pair.js",),
        kind="pairs",
    )


_COMMAND = "the numbers are also printed by: python -m leaderboard compare A B --in FOLDER"


def _group(chapter: Chapter, places: Places, width: int, share: float) -> dict[str, Any]:
    scores = chapter.per_image
    assert scores is not None
    rows = paired(chapter)
    notes = chapter.told
    values = scores.values[[scores.row(row.key) for row in rows]]
    kept = _kept(scores, rows, share)
    top = 256**width - 2  # the largest number says that there is no score
    metrics, packed = [], []
    for index, key in enumerate(scores.metrics):
        own = values[:, index][:, :, kept]
        there = np.isfinite(own)
        low, high = (float(own[there].min()), float(own[there].max())) if there.any() else (0.0, 0.0)
        whole = np.full(own.shape, top + 1, dtype=np.int64)
        whole[there] = np.rint((own[there] - low) / ((high - low) or 1.0) * top)
        packed.append(whole)
        metrics.append(
            {
                "key": key,
                "arrow": CARDS[key].arrow,
                "higher": CARDS[key].direction == "higher",
                "percent": CARDS[key].percent,
                "low": low,
                "step": (high - low) / top,
                "note": notes.get(key, ""),
            }
        )
    cells = np.stack(packed, axis=1).astype(f"<u{width}")  # rows, metrics, subjects, images
    used = [scores.image_ids[index] for index in kept]
    return {
        "title": chapter.title,
        "track": chapter.ranking.track,
        "protocol": f"{chapter.ranking.protocol} ({chapter.ranking.protocol_hash[:8]})",
        "all": len(scores.image_ids),
        "images": used,
        "subjects": list(scores.subjects),
        "metrics": metrics,
        "width": width,
        "rows": [
            {
                "id": row_id(row),
                "name": chapter.ranking.name(row),
                "values": base64.b64encode(np.ascontiguousarray(own).tobytes()).decode(),
                "pictures": _pictures(chapter, row, scores, places, used),
            }
            for row, own in zip(rows, cells, strict=True)
        ],
        "pairs": _pairs(scores, rows),
    }


def _kept(scores: Scores, rows: Sequence[Row], share: float) -> list[int]:
    """Return which images stand on the page: all, or those that tell most."""
    n_images = len(scores.image_ids)
    if share >= 1:
        return list(range(n_images))
    return sorted(telling(scores, [row.key for row in rows])[: max(1, int(share * n_images))])


def telling(scores: Scores, keys: Sequence[Key]) -> list[int]:
    """Order images: of every pair of rows the most changed one, then of every pair the next, and so on.

    How much an image changes between two rows is its largest gain over subjects: the mean over metrics, each in
    standard deviations of all its scores.
    """
    values = scores.values[[scores.row(key) for key in keys]]
    there = np.isfinite(values)
    count = np.maximum(there.sum(axis=(0, 2, 3), keepdims=True), 1)
    mean = np.where(there, values, 0.0).sum(axis=(0, 2, 3), keepdims=True) / count
    spread = np.sqrt((np.where(there, values - mean, 0.0) ** 2).sum(axis=(0, 2, 3), keepdims=True) / count)
    signs = np.array([1.0 if CARDS[key].direction == "higher" else -1.0 for key in scores.metrics])
    standard = np.where(there, (values - mean) / np.where(spread > 0, spread, 1.0), 0.0) * signs[:, None, None]
    level = standard.mean(axis=1)  # rows, subjects, images
    turns = [np.argsort(-np.abs(level[i] - level[j]).max(axis=0), kind="stable") for i, j in _all_pairs(len(keys))]
    if not turns:
        return list(range(len(scores.image_ids)))
    return list(dict.fromkeys(np.stack(turns, axis=1).ravel().tolist()))


def _all_pairs(n_rows: int) -> list[tuple[int, int]]:
    """Return all pairs, those with the first row first."""
    return sorted(combinations(range(n_rows), 2), key=lambda pair: (pair[0] > 0, pair[1], pair[0]))


def _pictures(
    chapter: Chapter, row: Row, scores: Scores, places: Places, images: Sequence[str]
) -> dict[str, Any] | None:
    """Return the sheets of a row's images and, for each subject, where an image lies."""
    variant, column = chapter.image_of(row)
    if column not in MADE:  # e.g. images before refinement, which no gallery has
        return None
    sheets: list[str] = []
    found: dict[str, dict[str, list[int]]] = {}
    for subject in scores.subjects:
        for image in images:
            place = places.get((variant, subject, image))
            if place is None:
                continue
            for name in (place.seen, place.made):
                if name not in sheets:
                    sheets.append(name)
            where = [sheets.index(place.seen), sheets.index(place.made), place.row, place.rows]
            found.setdefault(str(subject), {})[image] = where
    return {"column": MADE.index(column), "sheets": sheets, "places": found} if found else None


def _pairs(scores: Scores, rows: Sequence[Row]) -> dict[str, Any]:
    """Return "i j" -> A minus B on every metric, or the reason why there is none."""
    n_images = len(scores.image_ids)
    found: dict[str, Any] = {}
    for i, j in _all_pairs(len(rows))[: max(len(rows), min(PAIRS, WORK // n_images))]:
        try:
            compared = compare(scores, rows[i].key, rows[j].key)
        except ValueError as error:
            found[f"{i} {j}"] = str(error)
            continue
        found[f"{i} {j}"] = {
            key: [float(f"{v:.6g}") for v in (c.mean_a, c.mean_b, c.difference, c.ci_low, c.ci_high, c.p, c.q)]
            for key, c in compared.items()
        }
    return found
