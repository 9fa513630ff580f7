"""The static page: ranked table, sweep curves, seen and reconstructed images side by side.

``index.html`` holds its style and script and asks for nothing but the PNG files in ``images/`` beside it, so it works
from ``file://`` and from any web server. Everything that comes from outside (names, notes, ids) is escaped.

Images are joined into sheets, one a variant and subject, and named by their content: few files, equal images once.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from leaderboard.orderings import LEGEND, Ordering, cells, summary
from leaderboard.ranking import Entry, Ranking
from leaderboard.schema import Interval, Row, write_atomically
from leaderboard.statistics import Scores
from leaderboard.table import bounds, footnotes, sections
from metrics.cards import CARDS, format_value

THUMBNAIL = 192
"""Longest side of an image on the page, in pixels; smaller images stay as they are."""

COLUMNS = {"seen": "seen", "lowlevel": "low-level", "semantic": "semantic", "combined": "combined"}

_ABOUT = (
    "Seen images, reconstructed from fMRI, and how near each variant comes. "
    "All rows are scored on the same test images, under one protocol."
)

_SHEET_NAME = re.compile(r"[0-9a-f]{20}\.png")


@dataclass(frozen=True)
class Axis:
    """What a sweep varied.

    Attributes:
        name: e.g. "clusters".
        values: variant -> position; variants that are not on the axis are left out of the curves.
        log: whether positions are spaced by their logarithm.
    """

    name: str
    values: Mapping[str, float]
    log: bool = True


@dataclass(frozen=True)
class Chapter:
    """One leaderboard of a page: what :func:`build_site` takes, and how a published table's orderings fare.

    Attributes:
        orderings: of the published table that the sweep answers.
        table: what that table is called.
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


@dataclass(frozen=True)
class Gallery:
    """One test image as seen by a subject, and what a variant made of the brain's response to it.

    Attributes:
        variant: as in the result row.
        subject: from 1.
        image_id: as in the per-image scores.
        seen: PNG file; so are ``lowlevel``, ``semantic`` and ``combined``.
        shown: which of these stands for the variant.
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
    shown: str = "combined"
    pixcorr: Mapping[str, float] = field(default_factory=dict)


def build_site(
    out: Path,
    ranking: Ranking,
    per_image: Scores | None = None,
    galleries: Sequence[Gallery] = (),
    axis: Axis | None = None,
    notes: Mapping[str, str] | None = None,
    *,
    title: str = "Leaderboard",
    about: str = "",
) -> Path:
    """Write ``index.html`` and ``images/`` into ``out`` and return the page's path.

    New images are written first, then the page is replaced, then images that it no longer shows are removed.

    Raises:
        ValueError: an image is missing or unreadable; the message names the file.
    """
    chapter = Chapter(ranking, title, about, per_image, tuple(galleries), axis, notes or {})
    return _write(out, title, [_chapter(out, chapter, "")])


def build_report(out: Path, chapters: Sequence[Chapter], *, title: str, about: str = "") -> Path:
    """Write several leaderboards as the chapters of one page, ``index.html`` with ``images/`` in ``out``.

    Raises:
        ValueError: no chapter, or an image is missing or unreadable.
    """
    if not chapters:
        raise ValueError("a report needs at least one chapter")
    links = "".join(f'<li><a href="#part{k}">{escape(one.title)}</a></li>' for k, one in enumerate(chapters))
    head = f"<h1>{escape(title)}</h1>\n<p>{escape(about)}</p>\n<nav><ul>{links}</ul></nav>\n"
    parts = [_chapter(out, one, str(k)) for k, one in enumerate(chapters)]
    sections_ = [f'<section class="chapter" id="part{k}">\n{part}</section>\n' for k, part in enumerate(parts)]
    return _write(out, title, [head, *sections_])


def _chapter(out: Path, chapter: Chapter, number: str) -> str:
    """One leaderboard; ``number`` tells it from the others of a page, headings are a step lower where there are any."""
    ranking, notes = chapter.ranking, chapter.notes
    html = "".join(
        [
            _head(ranking, chapter.title, chapter.about),
            _orderings(chapter.orderings, chapter.table),
            _table(ranking, notes, f"ranking{number}"),
            _notes(ranking, notes),
            _curves(ranking, chapter.axis, notes) if chapter.axis is not None else "",
            _galleries(out / "images", ranking, chapter.per_image, chapter.galleries) if chapter.galleries else "",
        ]
    )
    if number:
        for level in (2, 1):
            html = html.replace(f"<h{level}", f"<h{level + 1}").replace(f"</h{level}>", f"</h{level + 1}>")
    return html


def _write(out: Path, title: str, body: Sequence[str]) -> Path:
    page = (
        "<!doctype html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # or a browser asks the server for /favicon.ico
        f"<title>{escape(title)}</title>\n<style>\n{_resource('page.css')}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(body)}</main>\n<script>\n{_resource('page.js')}</script>\n</body>\n</html>\n"
    )
    path = out / "index.html"
    write_atomically(path, page.encode())
    for image in (out / "images").glob("*.png"):
        if _SHEET_NAME.fullmatch(image.name) and image.name not in page:
            image.unlink()
    return path


def _resource(name: str) -> str:
    return files("leaderboard").joinpath(name).read_text(encoding="utf-8")


def _head(ranking: Ranking, title: str, about: str) -> str:
    rows = ranking.rows
    subjects = sorted({subject for row in rows for subject in row.subjects})
    seeds = sorted({seed for entry in ranking.entries for seed in entry.row.seeds})
    facts = {
        "track": ranking.track,
        "protocol": f"{ranking.protocol} ({ranking.protocol_hash[:8]})",
        "test images": " or ".join(str(count) for count in sorted({row.n_images for row in rows})),
        "subjects": ", ".join(map(str, subjects)),
        "seeds": ", ".join(map(str, seeds)),
        "variants": str(len(ranking.entries)),
    }
    shown = "".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items() if value)
    return (
        f"<h1>{escape(title)}</h1>\n"
        f"<p>{escape(about or _ABOUT)}</p>\n"
        f'<dl class="facts">{shown}</dl>\n'
        f'<p class="verdict">{escape(_capital(ranking.sentence))}.</p>\n'
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _heading(text: str, note: str = "", *, first: str, kind: str = "", sort: str = "") -> str:
    """Write a column heading that sorts; ``first`` is the order of its first click, the better end on top."""
    return (
        f'<th scope="col"{kind} data-first="{first}"{sort}><button type="button">{escape(text)}</button>'
        + (f"<small>{escape(note)}</small>" if note else "")
        + "</th>"
    )


def _orderings(found: Sequence[Ordering], table: str) -> str:
    """The paper's orderings and whether they hold here."""
    if not found:
        return ""
    metrics, rows = cells(found)
    head = "".join(f'<th scope="col">{escape(metric)}</th>' for metric in metrics)
    lines = []
    for variant, own in rows.items():
        verdicts = "".join(f"<td>{escape(cell)}</td>" for cell in own)
        lines.append(f'\n<tr><th class="name" scope="row">{escape(variant)}</th>{verdicts}</tr>')
    return (
        f"<h2>The orderings of {escape(table)}</h2>\n<p>{escape(_capital(summary(found)))}.</p>\n"
        '<div class="scroll" role="region" aria-label="orderings" tabindex="0">\n<table>\n'
        f'<thead><tr><th scope="col" class="name">against {escape(found[0].reference)}</th>{head}</tr></thead>\n'
        f'<tbody>{"".join(lines)}</tbody>\n</table>\n</div>\n<p class="soft">{escape(_capital(LEGEND))}</p>\n'
    )


def _table(ranking: Ranking, notes: Mapping[str, str], ident: str) -> str:
    resampled = any(entry.p_best is not None for entry in ranking.entries)
    headings = [
        _heading("variant", first="ascending", kind=' class="name" data-text'),
        _heading("rank", "95 %" if resampled else "", first="ascending", sort=' aria-sort="ascending"'),
        _heading("mean rank ↓", first="ascending"),
    ]
    if resampled:
        headings.append(_heading("best in", "of resamples", first="descending"))
    counts = sorted({row.n_images for row in ranking.rows})
    for key in ranking.metrics:
        first = "descending" if CARDS[key].direction == "higher" else "ascending"
        told = [f"of {' or '.join(map(str, counts))}"] if key == "CLIP-1000" else []
        told += [notes[key]] if key in notes else []
        headings.append(_heading(f"{key} {CARDS[key].arrow}", "; ".join(told), first=first))
    best = {key: ranking.best(key) for key in ranking.metrics}
    parts = [
        f'<h2 id="{ident}">Ranking</h2>\n<p class="soft">Mean and 95 % interval. ↑ higher is better, ↓ lower is '
        'better; ● best of the column. A click on a heading sorts.</p>\n<div class="scroll" role="region" '
        f'aria-labelledby="{ident}" tabindex="0">\n<table>\n<thead><tr>' + "".join(headings) + "</tr></thead>\n"
    ]
    for title, entries in sections(ranking):
        if title and not entries:
            continue
        parts.append("<tbody>" if title else "<tbody data-ranked>")
        if title:
            heading = f"<span>{escape(_capital(title))}</span>"
            parts.append(f'\n<tr><th colspan="{len(headings)}" scope="rowgroup">{heading}</th></tr>')
        parts += [_table_row(ranking, entry, best, resampled) for entry in entries]
        parts.append("</tbody>\n")
    return "".join([*parts, "</table>\n</div>\n"])


def _table_row(ranking: Ranking, entry: Entry, best: Mapping[str, set[tuple[str, str]]], resampled: bool) -> str:
    row = entry.row
    name = escape(ranking.name(row))
    spread = "" if entry.rank_low is None else f"<small>{entry.rank_low}–{entry.rank_high}</small>"
    cells = [
        f'<th class="name" scope="row" data-value="{name}">{name}</th>',
        _cell(entry.rank, "" if entry.rank is None else f"{entry.rank}{spread}"),
        _cell(entry.mean_rank, "" if entry.mean_rank is None else f"{entry.mean_rank:.1f}"),
    ]
    if resampled:
        cells.append(_cell(entry.p_best, "" if entry.p_best is None else f"{100 * entry.p_best:.0f} %"))
    cells += [_metric_cell(key, row.metrics.get(key), row.key in best[key]) for key in ranking.metrics]
    return "\n<tr>" + "".join(cells) + "</tr>"


def _cell(value: float | None, shown: str) -> str:
    return f'<td data-value="{"" if value is None else repr(value)}">{shown or "–"}</td>'


def _metric_cell(key: str, value: Interval | None, is_best: bool) -> str:
    if value is None:
        return '<td data-value="" title="no value">–</td>'
    mean = format_value(key, value.mean)
    title, small = f"{key} {mean}", ""
    if value.ci_low is not None and value.ci_high is not None:
        low, high = format_value(key, value.ci_low), format_value(key, value.ci_high)
        title += f", 95 % interval {low} to {high}"
        small = f"<small>{bounds(key, value)}</small>"
    mark, shown = (' class="best"', f"<b>{mean}</b>") if is_best else ("", mean)
    return f'<td{mark} data-value="{value.mean!r}" title="{escape(title)}">{shown}{small}</td>'


def _notes(ranking: Ranking, notes: Mapping[str, str]) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in footnotes(ranking, notes))
    return f'<ul class="notes">{lines}</ul>\n'


# --- curves ---

_WIDTH, _HEIGHT = 260.0, 150.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 40.0, 8.0, 8.0, 20.0


def _curves(ranking: Ranking, axis: Axis, notes: Mapping[str, str]) -> str:
    """Each metric against the sweep's axis, as small multiples; reference rows are lines across."""
    rows = [entry.row for entry in ranking.entries if entry.row.variant in axis.values]
    rows.sort(key=lambda row: axis.values[row.variant])
    if len(rows) < 2:
        return ""
    key_line = '<svg viewBox="0 0 34 10" aria-hidden="true"><path class="ref d{}" d="M1 5H33"/></svg>'
    legend = "".join(
        f"<li>{key_line.format(index % 4)}{escape(row.name)}</li>" for index, row in enumerate(ranking.references)
    )
    figures = "".join(
        f"<figure><figcaption>{escape(key)} {CARDS[key].arrow}"
        f"<small>{escape(notes.get(key, f'{CARDS[key].direction} is better'))}</small></figcaption>"
        f"{_curve(key, rows, ranking.references, axis)}</figure>\n"
        for key in ranking.metrics
    )
    return (
        f"<h2>Against {escape(axis.name)}</h2>\n"
        '<p class="soft">Mean with 95 % interval. Each panel has its own scale, wide enough for the references.</p>\n'
        + (f'<ul class="legend">{legend}</ul>\n' if legend else "")
        + f'<div class="curves">\n{figures}</div>\n'
    )


def _curve(key: str, rows: Sequence[Row], references: Sequence[Row], axis: Axis) -> str:
    points = [(axis.values[row.variant], row.metrics[key]) for row in rows if key in row.metrics]
    lines = [(index, row.metrics[key].mean) for index, row in enumerate(references) if key in row.metrics]
    if not points:
        return '<p class="soft">no value</p>'
    levels = [mean for _, mean in lines]
    for _, value in points:
        levels += [level for level in (value.mean, value.ci_low, value.ci_high) if level is not None]
    ticks = _ticks(min(levels), max(levels))
    low, high = min(*levels, ticks[0]), max(*levels, ticks[-1])
    places = [_position(axis, axis.values[row.variant]) for row in rows]
    left, right = min(places), max(places)

    def x(value: float) -> float:
        share = (_position(axis, value) - left) / (right - left) if right > left else 0.5
        return _LEFT + 10 + share * (_WIDTH - _LEFT - _RIGHT - 20)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        label = _tick_label(key, tick, ticks)
        parts.append(f'<text x="{_LEFT - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{label}</text>')
    for row in rows:
        at = axis.values[row.variant]
        parts.append(f'<text x="{x(at):.1f}" y="{_HEIGHT - 4}" text-anchor="middle">{at:g}</text>')
    parts += [f'<path class="ref d{index % 4}" d="M{_LEFT} {y(mean):.1f}H{_WIDTH - _RIGHT}"/>' for index, mean in lines]
    parts += [
        f'<path class="bar" d="M{x(at):.1f} {y(value.ci_low):.1f}V{y(value.ci_high):.1f}"/>'
        for at, value in points
        if value.ci_low is not None and value.ci_high is not None
    ]
    path = "L".join(f"{x(at):.1f} {y(value.mean):.1f}" for at, value in points)
    parts.append(f'<path class="line" d="M{path}"/>')
    for at, value in points:
        shown = f"{axis.name} {at:g}: {format_value(key, value.mean)}"
        if value.ci_low is not None and value.ci_high is not None:
            shown += f" ({format_value(key, value.ci_low)} to {format_value(key, value.ci_high)})"
        place = f'cx="{x(at):.1f}" cy="{y(value.mean):.1f}"'
        parts.append(f'<circle class="dot" {place} r="3.2"><title>{escape(shown)}</title></circle>')
    spoken = "; ".join(f"{at:g}: {format_value(key, value.mean)}" for at, value in points)
    spoken = escape(f"{key} against {axis.name}. {spoken}")
    return f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{spoken}">{"".join(parts)}</svg>'


def _position(axis: Axis, value: float) -> float:
    return math.log(value) if axis.log else value


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that span ``low`` to ``high``."""
    span = max(high - low, 1e-3)
    raw = span / 3
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]


def _tick_label(key: str, tick: float, ticks: Sequence[float]) -> str:
    scale = 100 if CARDS[key].percent else 1
    digits = max(0, -math.floor(math.log10((ticks[1] - ticks[0]) * scale) + 1e-9))
    return f"{tick * scale:.{digits}f}" + ("%" if CARDS[key].percent else "")


# --- images ---


def _galleries(folder: Path, ranking: Ranking, per_image: Scores | None, galleries: Sequence[Gallery]) -> str:
    blocks: dict[tuple[str, int], list[Gallery]] = {}
    for item in galleries:
        blocks.setdefault((item.variant, item.subject), []).append(item)
    order = [entry.row.variant for entry in ranking.entries]
    variants = sorted({variant for variant, _ in blocks}, key=lambda v: order.index(v) if v in order else len(order))
    subjects = sorted({subject for _, subject in blocks})
    most = max(len(items) for items in blocks.values())
    html = []
    for number, variant in enumerate(variants):
        for subject in subjects:
            if items := blocks.get((variant, subject), []):
                shown = number == 0 and subject == subjects[0]
                html.append(_block(folder, ranking, per_image, items, f"{number}/{subject}", shown))
    choose = _select("variant", [(str(index), variant) for index, variant in enumerate(variants)])
    choose += _select("subject", [(str(subject), f"subject {subject}") for subject in subjects])
    return (
        "<h2>Seen and reconstructed</h2>\n"
        f'<p class="soft">The first {most} test images in the order of the test set; none is selected. '
        "r is PixCorr with the seen image. "
        "The combined image starts from the low-level one and is guided by the semantic branch.</p>\n"
        f'<div class="images">\n<div class="choose">{choose}</div>\n'
        '<p class="no-images" role="status" hidden>No images of this variant for this subject.</p>\n'
        + "".join(html)
        + "</div>\n"
    )


def _select(name: str, options: Iterable[tuple[str, str]]) -> str:
    inside = "".join(f'<option value="{escape(value)}">{escape(shown)}</option>' for value, shown in options)
    return f"<label>{name} <select>{inside}</select></label>"


def _block(
    folder: Path, ranking: Ranking, per_image: Scores | None, items: Sequence[Gallery], block: str, shown: bool
) -> str:
    """Rows: images. Columns: seen, low-level, semantic, combined."""
    made = list(COLUMNS)[1:]
    seen = _sheet(folder, [[item.seen] for item in items])
    rest = _sheet(folder, [[getattr(item, column) for column in made] for item in items])
    first = items[0]
    rows = len(items)
    parts = [
        f'<section class="gallery" data-block="{escape(block)}"{"" if shown else " hidden"} '
        f'aria-label="{escape(f"{first.variant}, subject {first.subject}")}" '
        f"style=\"--seen:url('images/{seen}');--made:url('images/{rest}');--rows:{rows}\">\n<b>image</b>",
        *(f"<b>{name}</b>" for name in COLUMNS.values()),
    ]
    for index, item in enumerate(items):
        down = f"{100 * index / (rows - 1):.4f}%" if rows > 1 else "0"
        parts.append(f"\n<span>{escape(str(item.image_id))}</span>")
        for column, name in COLUMNS.items():
            score = None if column == "seen" else _pixcorr(ranking, per_image, item, column)
            caption = "" if score is None else f"<figcaption>r {format_value('PixCorr', score)}</figcaption>"
            parts.append(
                f'<figure><i class="{column}" role="img" aria-label="{escape(f"image {item.image_id}, {name}")}" '
                f'style="--y:{down}"></i>{caption}</figure>'
            )
    return "".join([*parts, "\n</section>\n"])


def _pixcorr(ranking: Ranking, per_image: Scores | None, item: Gallery, column: str) -> float | None:
    if column in item.pixcorr:
        return item.pixcorr[column]
    if column != "combined" or per_image is None or "PixCorr" not in per_image.metrics:
        return None
    keys = [entry.row.key for entry in ranking.entries if entry.row.variant == item.variant]
    image = str(item.image_id)
    if len(keys) != 1 or keys[0] not in per_image.keys:  # a tuple of row keys, not a mapping
        return None
    if item.subject not in per_image.subjects or image not in per_image.image_ids:
        return None
    value = per_image.values[
        per_image.row(keys[0]),
        per_image.metrics.index("PixCorr"),
        per_image.subjects.index(item.subject),
        per_image.image_ids.index(image),
    ]
    return None if np.isnan(value) else float(value)


def _sheet(folder: Path, cells: Sequence[Sequence[Path]]) -> str:
    """Join images (rows of columns) into one PNG named by its content; returns the file name."""
    images = [[_thumbnail(path) for path in row] for row in cells]
    width = max(image.width for row in images for image in row)
    height = max(image.height for row in images for image in row)
    side = max(width, height)
    sheet = Image.new("RGB", (side * len(cells[0]), side * len(cells)))
    for down, row in enumerate(images):
        for across, image in enumerate(row):
            if image.size != (side, side):
                image = image.resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(image, (across * side, down * side))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    name = hashlib.sha256(buffer.getvalue()).hexdigest()[:20] + ".png"
    if not (folder / name).exists():
        write_atomically(folder / name, buffer.getvalue())
    return name


def _thumbnail(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error
    rgb.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return rgb
