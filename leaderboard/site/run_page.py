"""The page of a run: its scores and their spread over images, what it cost, its settings, what it was made from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape

import numpy as np

from leaderboard.schema import Row, row_id
from leaderboard.site import charts
from leaderboard.site.board import COSTS, SHOWN, Places, cost_text, gallery
from leaderboard.site.chapters import Chapter, Gallery, printed
from leaderboard.site.html import (
    MISSING,
    capital,
    document,
    facts,
    metric_cell,
    scroll,
    subjects_text,
    table_of,
)
from leaderboard.statistics import Floats
from leaderboard.table import footnotes
from metrics.cards import CARDS, format_value

_LINKS = 12  # to pairs: the best rows come first, and the page of pairs offers all


def run_page(chapter: Chapter, row: Row, places: Places, paired: set[str]) -> str:
    """Return the page of one row.

    Args:
        chapter: the leaderboard that the row stands in.
        row: the run.
        places: where the chapter's images lie.
        paired: ids of the rows that have a place on the page of pairs.
    """
    ranking = chapter.ranking
    name = ranking.name(row)
    known = {
        "method": row.method,
        "variant": row.variant,
        "track": row.track,
        "protocol": f"{row.protocol} ({row.protocol_hash[:8]})",
        "data": row.data,
        "subjects": subjects_text(row.subjects),
        "seeds": ", ".join(map(str, row.seeds)),
        "test images": str(row.n_images),
    }
    body = [
        f'<p class="back"><a href="index.html">Leaderboard</a></p>\n<h1>{escape(name)}</h1>\n',
        facts(known),
        f'<p class="verdict">{escape(_place(chapter, row))}</p>\n',
        _scores(chapter, row),
        _pairs(chapter, row, paired),
        _spread(chapter, row),
        _pictures(chapter, row, places),
        _cost(row),
        _config(row),
        _manifest(row),
    ]
    return document(f"{name} – {chapter.title}", body, kind="run")


def _place(chapter: Chapter, row: Row) -> str:
    """Say where the row stands."""
    ranking = chapter.ranking
    entry = next((one for one in ranking.entries if one.row.key == row.key), None)
    ranked = sum(one.rank is not None for one in ranking.entries)
    if entry is None:
        return {"branch": "One branch alone: not ranked.", "reference": "A reference: not ranked."}[row.kind]
    if entry.rank is None:
        return "Not ranked: it lacks a metric that other rows have."
    said = f"Rank {entry.rank} of {ranked}"
    if entry.rank_low is not None and entry.p_best is not None:
        said += f" ({entry.rank_low} to {entry.rank_high} in 95 % of resamples, best in {100 * entry.p_best:.0f} %)"
    return f"{said}."


def _scores(chapter: Chapter, row: Row) -> str:
    ranking, notes = chapter.ranking, chapter.told
    one = printed(row)
    shared = one is not None and row.track == "paper" and one.protocol == row.protocol
    head = '<th scope="col" class="name">metric</th><th scope="col">mean and 95 %</th><th scope="col">rank</th>'
    if shared:
        head += '<th scope="col">printed</th>'
    entry = next((found for found in ranking.entries if found.row.key == row.key), None)
    lines = []
    for key in ranking.metrics:
        card = CARDS[key]
        told = notes.get(key, card.name)  # what a card says of networks is of one protocol only
        rank = None if entry is None or entry.ranks is None else entry.ranks.get(key)
        lines.append(
            f'\n<tr><th scope="row" class="name">{escape(key)} {card.arrow}<small>{escape(told)}</small></th>'
            + metric_cell(key, row.metrics.get(key), row.key in ranking.best(key))
            + f"<td>{MISSING if rank is None else f'{rank:g}'}</td>"
            + (f"<td>{(one.cell(key) if one else '') or MISSING}</td>" if shared else "")
            + "</tr>"
        )
    caption = "Scores; ranks are among the rows of the same track and protocol."
    table = (
        f'<table class="narrow">\n<caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>{''.join(lines)}</tbody>\n</table>\n"
    )
    told_too = [line for line in footnotes(ranking, {}) if not _of_another(ranking.rows, row, ranking.name, line)]
    answer = [] if one is None else [_answers(row, shared, one.name)]
    listed = "".join(f"<li>{escape(line)}</li>" for line in [*told_too, *answer])
    return f'<h2>Scores</h2>\n{scroll("scores", table)}<ul class="notes">{listed}</ul>\n'


def _answers(row: Row, shared: bool, name: str) -> str:
    said = f"repeats the published row {row.answers} ({name})"
    return said if shared else f"{said}, whose numbers do not compare with these"


def _of_another(rows: tuple[Row, ...], row: Row, name: object, line: str) -> bool:
    """Whether a footnote is about another row."""
    return any(other is not row and other.notes and line.endswith(f": {other.notes}") for other in rows)


def _pairs(chapter: Chapter, row: Row, paired: set[str]) -> str:
    own = row_id(row)
    if own not in paired:
        return ""
    others = [other for other in chapter.ranking.rows if row_id(other) in paired and other.key != row.key]
    links = "".join(
        f'<li><a href="pair.html#a={own}&amp;b={row_id(other)}">{escape(chapter.ranking.name(other))}</a></li>'
        for other in others[:_LINKS]
    )
    if len(others) > _LINKS:
        links += f"<li>or any of {len(others)} rows, chosen there</li>"
    return (
        f'<h2>Compare image by image</h2>\n<nav aria-label="pairs"><ul class="links">{links}</ul></nav>\n'
        if links
        else ""
    )


def _spread(chapter: Chapter, row: Row) -> str:
    """How the scores of single images are spread, as charts and as a table."""
    scores = chapter.per_image
    if scores is None or row.key not in scores.keys:
        return "<h2>Scores of single images</h2>\n<p>No scores of single images were kept for this row.</p>\n"
    values = scores.values[scores.row(row.key)]
    chance = next((r for r in chapter.ranking.references if r.variant == "chance"), None)
    notes = chapter.told
    figures, lines = [], []
    for index, key in enumerate(scores.metrics):
        cells: Floats = values[index][np.isfinite(values[index])]
        if not cells.size:
            continue
        everyone = scores.values[:, index][np.isfinite(scores.values[:, index])]
        span = float(everyone.min()), float(everyone.max())
        levels = {"chance": chance.metrics[key].mean} if chance is not None and key in chance.metrics else {}
        figures.append(
            f"<figure><figcaption>{escape(key)} {CARDS[key].arrow}"
            f"<small>{escape(notes.get(key, f'{CARDS[key].direction} is better'))}</small></figcaption>"
            f"{charts.histogram(key, cells, span, row.metrics.get(key), levels)}</figure>\n"
        )
        quartiles = (format_value(key, value) for value in np.percentile(cells, [0, 25, 50, 75, 100]).tolist())
        with np.errstate(invalid="ignore"):
            by_subject = [
                format_value(key, float(np.nanmean(own))) if np.isfinite(own).any() else "" for own in values[index]
            ]
        lines.append([f"{key} {CARDS[key].arrow}", str(cells.size), *quartiles, *by_subject])
    columns = ["metric", "images", "lowest", "lower quartile", "median", "upper quartile", "highest"]
    columns += [f"mean, subject {subject}" for subject in scores.subjects]
    return (
        "<h2>Scores of single images</h2>\n"
        '<p class="soft">How many images (each subject counted) have which score. The upright line is the mean, the '
        "band its 95 % interval, the dotted line chance. Axes are those of the other rows' pages.</p>\n"
        f'<div class="curves">\n{"".join(figures)}</div>\n'
        + table_of("Spread of the scores of single images", columns, lines)
    )


def _pictures(chapter: Chapter, row: Row, places: Places) -> str:
    variant, _ = chapter.image_of(row)
    blocks: dict[int, list[Gallery]] = {}
    for item in chapter.galleries:
        if item.variant == variant:
            blocks.setdefault(item.subject, []).append(item)
    if not blocks:
        return ""
    shown = "".join(
        f"<details{' open' if number == 0 else ''}><summary>subject {subject}</summary>\n"
        f"{gallery(chapter, items[: max(1, SHOWN // len(blocks))], places)}</details>\n"
        for number, (subject, items) in enumerate(sorted(blocks.items()))
    )
    return (
        "<h2>Seen and reconstructed</h2>\n"
        '<p class="soft">The first test images in the order of the test set; none is selected. r is PixCorr with the '
        f"seen image.</p>\n{shown}"
    )


def _cost(row: Row) -> str:
    spent = [(COSTS[name], cost_text(name, getattr(row.cost, name))) for name in COSTS]
    if not any(text for _, text in spent):
        return "<h2>Cost</h2>\n<p>Not measured.</p>\n"
    return "<h2>Cost</h2>\n" + table_of("What it cost to make, shared stages included", ["cost", "value"], spent)


def _config(row: Row) -> str:
    """The settings, those that differ from the preset's first."""
    if not row.config:
        return "<h2>Settings</h2>\n<p>None are known: the row came without them.</p>\n"
    changed = [
        (name, _value(row.config[name]), _value(row.changed[name])) for name in row.config if name in row.changed
    ]
    rest = [f"{name}: {_value(value)}" for name, value in row.config.items() if name not in row.changed]
    first = (
        table_of(f"Settings that differ from the {row.track} preset's", ["setting", "here", "preset"], changed)
        if changed
        else f"<p>All settings are the {escape(row.track)} preset's.</p>\n"
    )
    return (
        f"<h2>Settings</h2>\n{first}"
        f"<details><summary>{len(rest)} settings as in the preset</summary>\n"
        f'<pre tabindex="0">{escape(chr(10).join(rest))}</pre></details>\n'
    )


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _manifest(row: Row) -> str:
    made = row.manifest
    parts = list(_parts({"git": {"commit": made.git} if made.git else {}}))
    parts += _parts(
        {
            "seeds": {key: str(value) for key, value in made.seeds.items()},
            "hardware": made.hardware,
            "data": made.data,
            "weights": made.weights,
            "packages": made.packages,
        }
    )
    source = f"<p>Source: <code>{escape(row.source)}</code></p>\n"
    return f"<h2>Manifest</h2>\n{source}" + ("".join(parts) or "<p>Nothing more is known.</p>\n")


def _parts(parts: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    for name, values in parts.items():
        if values:
            yield table_of(capital(name), ["name", "value"], list(values.items()))
