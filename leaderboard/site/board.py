"""The first page: every leaderboard with filters, curves, cost and images, and what papers printed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np

from leaderboard.formats import UNKNOWN, by_protocol, published_metrics, published_title
from leaderboard.orderings import LEGEND, cells, summary
from leaderboard.published import PublishedRow, read_published
from leaderboard.ranking import Entry, Ranking
from leaderboard.schema import Interval, Row, row_id
from leaderboard.site import charts
from leaderboard.site.chapters import Axis, Chapter, Gallery, printed
from leaderboard.site.html import (
    AMOUNTS,
    MISSING,
    amount,
    capital,
    cell,
    document,
    facts,
    heading,
    metric_cell,
    metric_heading,
    scroll,
    source_of,
    subjects_text,
)
from leaderboard.site.pictures import COLUMNS, Place, sheets_style, window
from leaderboard.table import footnotes, sections
from metrics.cards import CARDS, format_value

SHOWN = 12
"""Images of a variant and subject that are shown as they come."""

_VARIANTS = 8
"""Variants whose images the first page shows."""

_ABOUT = (
    "Seen images, reconstructed from fMRI, and how near each variant comes. "
    "All rows of a table are scored on the same test images, under one protocol."
)
_ALWAYS = "*"  # of a filter: whatever is chosen, such a row is no less wanted

Places = Mapping[tuple[str, int, str], Place]


def board(
    chapters: Sequence[Chapter], places: Sequence[Places], paired: Sequence[set[str]], title: str, about: str
) -> str:
    """Return the page.

    Args:
        chapters: what to show, in order.
        places: where each chapter's images lie.
        paired: ids of each chapter's rows that have a place on the page of pairs.
        title: heading of the page, where there are several chapters.
        about: text below it.
    """
    published = read_published()
    body = []
    many = len(chapters) > 1
    if many:
        links = "".join(f'<li><a href="#part{k}">{escape(one.title)}</a></li>' for k, one in enumerate(chapters))
        links += '<li><a href="#published">What papers printed</a></li>'
        body.append(f"<h1>{escape(title)}</h1>\n<p>{escape(about)}</p>\n<nav><ul>{links}</ul></nav>\n")
        body.append(_filters(chapters, published))
    for number, chapter in enumerate(chapters):
        ranking = chapter.ranking
        level = 2 if many else 1
        body.append(
            f'<section class="chapter{"" if many else " only"}" id="part{number}" data-track="{escape(ranking.track)}" '
            f'data-protocol="{escape(ranking.protocol)}">\n'
        )
        body.append(_head(chapter, level))
        if not many:
            body.append(_filters(chapters, published))
        body.append(_table(chapter, number, level + 1, paired[number]))
        body.append(_orderings(chapter, level + 1))
        body.append(_cost(chapter, number, level + 1))
        body += [_curves(chapter, axis, level + 1) for axis in chapter.axes]
        if chapter.grid:
            body.append(_grid(chapter, number, level + 1))
        if chapter.galleries:
            body.append(_galleries(chapter, places[number], level + 1))
        body.append("</section>\n")
    tracks = sorted({chapter.ranking.track for chapter in chapters})
    body.append(_published(published, tracks))
    body.append(
        '<div class="picked" role="region" aria-label="chosen rows" hidden><p role="status"></p>'
        '<a class="button" href="pair.html">Compare image by image</a> <button type="button">Clear</button></div>\n'
    )
    return document(title, body)


def _grid(chapter: Chapter, number: int, level: int) -> str:
    """The picture of all variants side by side."""
    alt = f"{chapter.title} The first test images of one subject as seen, and below what each variant makes of them."
    picture = f'<img class="grid" src="{escape(chapter.grid)}" alt="{escape(alt)}" loading="lazy">\n'
    return f"<h{level}>Side by side</h{level}>\n" + scroll(f"side by side {number + 1}", picture)


def _head(chapter: Chapter, level: int) -> str:
    ranking = chapter.ranking
    rows = ranking.rows
    subjects = sorted({subject for row in rows for subject in row.subjects})
    seeds = sorted({seed for entry in ranking.entries for seed in entry.row.seeds})
    known = {
        "track": ranking.track,
        "protocol": f"{ranking.protocol} ({ranking.protocol_hash[:8]})",
        "test images": " or ".join(str(count) for count in sorted({row.n_images for row in rows})),
        "subjects": ", ".join(map(str, subjects)),
        "seeds": ", ".join(map(str, seeds)),
        "variants": str(len(ranking.entries)),
    }
    return (
        f"<h{level}>{escape(chapter.title)}</h{level}>\n"
        f"<p>{escape(chapter.about or _ABOUT)}</p>\n{facts(known)}"
        f'<p class="verdict">{escape(capital(ranking.sentence))}.</p>\n'
    )


# --- filters ---


def _filters(chapters: Sequence[Chapter], published: Sequence[PublishedRow]) -> str:
    rankings = [chapter.ranking for chapter in chapters]
    own = [entry.row for ranking in rankings for entry in ranking.entries]
    tracks = {ranking.track for ranking in rankings} | {"paper"}
    protocols = {ranking.protocol for ranking in rankings} | {row.protocol or UNKNOWN for row in published}
    every: list[Row | PublishedRow] = [*own, *published]
    amounts = {amount(row.data) for row in every}
    order = list(dict.fromkeys(AMOUNTS.values()))
    first = [name for name in order if name in amounts and name != AMOUNTS[""]]
    amounts_sorted = [*first, *sorted(amounts - set(order)), *(amounts & {AMOUNTS[""]})]
    subjects = {subjects_text(row.subjects) for row in every}
    chosen = "".join(
        [
            _select("track", [("", "all"), *((name, name) for name in sorted(tracks))]),
            _select("protocol", [("", "all"), *((name, name) for name in sorted(protocols))]),
            _select("data amount", [("", "all"), *((name, name) for name in amounts_sorted)], "amount"),
            _select("subjects", [("", "all"), *((name, name) for name in sorted(subjects))]),
            _select("rows", [("", "own and published"), ("own", "own"), ("published", "published")], "rows"),
        ]
    )
    return (
        f'<form class="filters choose" aria-label="filter rows" autocomplete="off">{chosen}'
        '<button type="reset">Show all</button><p class="soft" role="status"></p></form>\n'
        '<p class="none" hidden>No row has all of this.</p>\n'
    )


def _select(name: str, options: Iterable[tuple[str, str]], key: str = "") -> str:
    inside = "".join(f'<option value="{escape(value)}">{escape(shown)}</option>' for value, shown in options)
    return f'<label>{name} <select name="{key or name}">{inside}</select></label>'


def _wanted(kind: str, data: str, subjects: Sequence[int] | None, **more: str) -> str:
    """Return what filters look at, as attributes of a row."""
    values = {"rows": kind, "amount": data if data == _ALWAYS else amount(data), "subjects": subjects_text(subjects)}
    return "".join(f' data-{key}="{escape(value)}"' for key, value in {**values, **more}.items())


# --- the ranked table ---


def _table(chapter: Chapter, number: int, level: int, paired: set[str]) -> str:
    ranking, notes = chapter.ranking, chapter.told
    resampled = any(entry.p_best is not None for entry in ranking.entries)
    headings = [
        heading("variant", first="ascending", kind=' class="name" data-text'),
        heading("rank", "95 %" if resampled else "", first="ascending", sort=' aria-sort="ascending"'),
        heading("mean rank ↓", first="ascending"),
    ]
    if resampled:
        headings.append(heading("best in", "of resamples", first="descending"))
    counts = sorted({row.n_images for row in ranking.rows})
    for key in ranking.metrics:
        told = [f"of {' or '.join(map(str, counts))}"] if key == "CLIP-1000" else []
        headings.append(metric_heading(key, "; ".join([*told, notes[key]] if key in notes else told)))
    best = {key: ranking.best(key) for key in ranking.metrics}
    caption = (
        f"{capital(ranking.track)} track, protocol {ranking.protocol} ({ranking.protocol_hash[:8]}): mean and 95 % "
        "interval. ↑ higher is better, ↓ lower is better; ● best of the column. A heading sorts; ranks are among all "
        "rows of this table, whatever is filtered."
    )
    parts = [
        f"<table data-sortable>\n<caption>{escape(caption)}</caption>\n<thead><tr>{''.join(headings)}</tr></thead>\n"
    ]
    for title, entries in sections(ranking):
        if title and not entries:
            continue
        parts.append("<tbody>" if title else "<tbody data-ranked>")
        if title:
            parts.append(_group(title, len(headings)))
        parts += [_table_row(ranking, entry, best, resampled, paired) for entry in entries]
        parts.append("</tbody>\n")
    parts.append(_published_beside(chapter, len(headings), resampled))
    lines = "".join(f"<li>{escape(line)}</li>" for line in footnotes(ranking, notes))
    return (
        f"<h{level}>Ranking</h{level}>\n"
        + scroll(f"ranking {number + 1}", "".join([*parts, "</table>\n"]))
        + f'<ul class="notes">{lines}</ul>\n'
    )


def _group(title: str, columns: int) -> str:
    return (
        f'\n<tr class="group"><th colspan="{columns}" scope="rowgroup"><span>{escape(capital(title))}</span></th></tr>'
    )


def _table_row(
    ranking: Ranking, entry: Entry, best: Mapping[str, set[tuple[str, str]]], resampled: bool, paired: set[str]
) -> str:
    row = entry.row
    ident, name = row_id(row), escape(ranking.name(row))
    spread = "" if entry.rank_low is None else f"<small>{entry.rank_low}–{entry.rank_high}</small>"
    box = (
        f'<input type="checkbox" value="{ident}" data-name="{name}" aria-label="choose {name} to compare">'
        if ident in paired
        else ""
    )
    parts = [
        f'<th class="name" scope="row" data-value="{name}">{box}<a href="run-{ident}.html">{name}</a></th>',
        cell(entry.rank, f"{entry.shown_place}{spread}"),
        cell(entry.mean_rank, "" if entry.mean_rank is None else f"{entry.mean_rank:.1f}"),
    ]
    if resampled:
        parts.append(cell(entry.p_best, "" if entry.p_best is None else f"{100 * entry.p_best:.0f} %"))
    parts += [metric_cell(key, row.metrics.get(key), row.key in best[key]) for key in ranking.metrics]
    data = _ALWAYS if row.kind == "reference" else row.data
    return f"\n<tr{_wanted('own', data, row.subjects, id=ident)}>" + "".join(parts) + "</tr>"


def _published_beside(chapter: Chapter, columns: int, resampled: bool) -> str:
    """Published rows of the same protocol, on the track where printed numbers may be compared; without ranks."""
    ranking = chapter.ranking
    if ranking.track != "paper":
        return ""
    rows = [row for row in read_published() if row.protocol == ranking.protocol and row.metrics]
    if not rows:
        return ""
    title = f"as printed, under protocol {ranking.protocol} (not ranked: whether on the same images is not known)"
    parts = ["<tbody>", _group(title, columns)]
    for row in rows:
        where = ", ".join(filter(None, [amount(row.data), f"subjects {subjects_text(row.subjects)}"]))
        images = f"{row.test_images} images" if row.test_images else "number of images not said"
        parts.append(
            f"\n<tr{_wanted('published', row.data, row.subjects)}>"
            f'<th class="name" scope="row" data-value="{escape(row.name)}">{_published_link(row)}'
            f"<small>{escape(where)}; {images}</small></th>"
            + cell(None, "") * (3 if resampled else 2)
            + "".join(_published_cell(row, key) for key in ranking.metrics)
            + "</tr>"
        )
    return "".join([*parts, "</tbody>\n"])


def _published_cell(row: PublishedRow, key: str) -> str:
    value = row.metrics.get(key)
    return metric_cell(key, None if value is None else Interval(mean=value))


def _published_link(row: PublishedRow) -> str:
    return f'<a href="#{escape(row.id)}">{escape(row.name)}</a>'


def _orderings(chapter: Chapter, level: int) -> str:
    """The paper's orderings and whether they hold here."""
    found = chapter.orderings
    if not found:
        return ""
    metrics, rows = cells(found)
    notes = chapter.told
    head = "".join(
        f'<th scope="col">{escape(metric)}{f"<small>{escape(notes[metric])}</small>" if metric in notes else ""}</th>'
        for metric in metrics
    )
    lines = []
    for variant, own in rows.items():
        verdicts = "".join(f"<td>{escape(text) or MISSING}</td>" for text in own)
        lines.append(f'\n<tr><th class="name" scope="row">{escape(variant)}</th>{verdicts}</tr>')
    table = (
        f'<table>\n<caption class="unseen">orderings of {escape(chapter.table)}</caption>\n'
        f'<thead><tr><th scope="col" class="name">against {escape(found[0].reference)}</th>{head}</tr></thead>\n'
        f"<tbody>{''.join(lines)}</tbody>\n</table>\n"
    )
    return (
        f"<h{level}>The orderings of {escape(chapter.table)}</h{level}>\n<p>{escape(capital(summary(found)))}.</p>\n"
        + scroll("orderings", table)
        + f'<p class="soft">{escape(capital(LEGEND))}</p>\n'
    )


# --- quality against cost ---

COSTS = {
    "wall_s": "wall-clock time",
    "gpu_hours": "GPU hours",
    "peak_memory_bytes": "peak memory",
    "parameters": "trained parameters",
}


def cost_text(name: str, value: float | None) -> str:
    """Print a cost with its unit; empty where it was not measured."""
    if value is None:
        return ""
    if name == "wall_s":
        return (
            f"{value / 3600:.2f} h" if value >= 5400 else f"{value / 60:.1f} min" if value >= 90 else f"{value:.0f} s"
        )
    if name == "gpu_hours":
        return f"{value:.2f}" if value < 100 else f"{value:.0f}"
    if name == "peak_memory_bytes":
        return f"{value / 1e9:.2f} GB"
    return f"{value / 1e6:.2f} M" if value >= 1e4 else f"{value:.0f}"


def _cost(chapter: Chapter, number: int, level: int) -> str:
    """Each row's cost as a table, which the script draws against a metric."""
    ranking = chapter.ranking
    entries = [entry for entry in ranking.entries if any(getattr(entry.row.cost, name) is not None for name in COSTS)]
    if not entries:
        return ""
    known = [name for name in COSTS if any(getattr(entry.row.cost, name) is not None for entry in entries)]
    drawn = [name for name in known if len({getattr(entry.row.cost, name) for entry in entries}) > 1]
    columns = [
        heading("variant", first="ascending", kind=' class="name" data-text'),
        heading("number", "in the chart", first="ascending", sort=' aria-sort="ascending"'),
        *(heading(COSTS[name], first="ascending") for name in known),
    ]
    lines = []
    for place, entry in enumerate(entries, 1):
        row = entry.row
        name = escape(ranking.name(row))
        spent = {name: getattr(row.cost, name) for name in known}
        lines.append(
            f"\n<tr{_wanted('own', row.data, row.subjects, id=row_id(row))}>"
            f'<th class="name" scope="row" data-value="{name}"><a href="run-{row_id(row)}.html">{name}</a></th>'
            + cell(place, str(place))
            + "".join(cell(value, cost_text(key, value)) for key, value in spent.items())
            + "</tr>"
        )
    caption = "Cost of each row, shared stages included; a dash: not measured."
    table = scroll(
        f"cost {number + 1}",
        f'<table data-sortable class="costs narrow">\n<caption>{caption}</caption>\n'
        f"<thead><tr>{''.join(columns)}</tr></thead>\n<tbody data-ranked>{''.join(lines)}</tbody>\n</table>\n",
    )
    chart = ""
    if drawn and len(entries) > 1:
        notes = chapter.told
        metrics = [
            (str(k), f"{key} {CARDS[key].arrow}" + (f" ({notes[key]})" if key in notes else ""))
            for k, key in enumerate(ranking.metrics)
        ]
        chosen = _select("quality", metrics, "metric")
        chosen += _select("cost", [(str(known.index(name)), COSTS[name]) for name in drawn], "cost")
        units = " ".join(name for name in known)
        percent = " ".join(str(int(CARDS[key].percent)) for key in ranking.metrics)
        better = " ".join(CARDS[key].direction for key in ranking.metrics)
        chart = (
            f'<div class="scatter" data-units="{units}" data-percent="{percent}" data-better="{better}">\n'
            f'<div class="choose">{chosen}</div>\n<div class="plot"></div>\n'
            '<p class="soft">Numbers as in the table. The line joins the rows that no other beats in quality at no '
            "more cost. Bars: 95 % intervals.</p>\n</div>\n"
        )
    return f"<h{level}>Quality against cost</h{level}>\n{chart}{table}"


# --- curves ---


def _curves(chapter: Chapter, axis: Axis, level: int) -> str:
    """Each metric against an axis, ours beside the paper's; reference rows are lines across."""
    ranking, notes = chapter.ranking, chapter.told
    rows = [entry.row for entry in ranking.entries if entry.row.variant in axis.values]
    rows.sort(key=lambda row: axis.values[row.variant])
    if len(rows) < 2:
        return ""
    answered = {row.variant: one for row in rows if (one := printed(row)) is not None and one.metrics}
    beside = len(answered) > 1
    shared = ranking.track == "paper"  # elsewhere a printed number stands on no axis of ours
    line = '<svg viewBox="0 0 34 10" aria-hidden="true">{}</svg>'
    legend = [
        line.format(f'<path class="ref d{index % 4}" d="M1 5H33"/>') + escape(row.name)
        for index, row in enumerate(ranking.references)
    ]
    if beside:
        legend = [
            line.format('<path class="line" d="M1 5H33"/><circle class="dot" cx="17" cy="5" r="3.2"/>') + "ours",
            line.format(
                '<path class="line printed" d="M1 5H33"/><rect class="printed" x="14" y="2" width="6" height="6"/>'
            )
            + "as the paper prints it",
            *legend,
        ]
    figures = []
    for key in ranking.metrics:
        own = charts.own_points(key, rows, axis)
        lines = [(k, row.metrics[key].mean) for k, row in enumerate(ranking.references) if key in row.metrics]
        theirs = [
            charts.Point(
                axis.values[row.variant],
                axis.label(row.variant),
                Interval(mean=answered[row.variant].metrics[key]),
            )
            for row in rows
            if row.variant in answered and key in answered[row.variant].metrics
        ]
        theirs = theirs if len(theirs) > 1 else []
        chart = charts.curve(key, rows, axis, own=own, printed=theirs if shared else (), lines=lines)
        if theirs and not shared:
            below = charts.curve(key, rows, axis, printed=theirs)
            chart += f'<p class="apart">the paper\'s {escape(key)}, on an axis of its own</p>{below}'
        told = escape(notes.get(key, f"{CARDS[key].direction} is better"))
        figures.append(
            f"<figure><figcaption>{escape(key)} {CARDS[key].arrow}<small>{told}</small></figcaption>{chart}</figure>\n"
        )
    about = "Mean with 95 % interval. Each panel has its own scale, wide enough for the references."
    if beside and shared:
        about += " Squares are the paper's numbers, read from its tables."
    elif beside:
        about += (
            f" The paper's curves stand below ours on axes of their own: no number of the {ranking.track} track "
            "compares with a published one, only the order of the points and the shape of the curve do."
        )
    return (
        f'<h{level}>Against {escape(axis.name)}</h{level}>\n<p class="soft">{escape(about)}</p>\n'
        + (f'<ul class="legend">{"".join(f"<li>{one}</li>" for one in legend)}</ul>\n' if legend else "")
        + f'<div class="curves">\n{"".join(figures)}</div>\n'
    )


# --- images ---


def _galleries(chapter: Chapter, places: Places, level: int) -> str:
    ranking = chapter.ranking
    blocks: dict[tuple[str, int], list[Gallery]] = {}
    for item in chapter.galleries:
        blocks.setdefault((item.variant, item.subject), []).append(item)
    order = [entry.row.variant for entry in ranking.entries]
    variants = sorted({variant for variant, _ in blocks}, key=lambda v: order.index(v) if v in order else len(order))
    more = (
        f" Of {len(variants)} variants the first {_VARIANTS} are here; the others' images are on their own pages."
        if len(variants) > _VARIANTS
        else ""
    )
    variants = variants[:_VARIANTS]
    subjects = sorted({subject for _, subject in blocks})
    most = min(SHOWN, max(len(items) for items in blocks.values()))
    html = []
    for number, variant in enumerate(variants):
        for subject in subjects:
            if items := blocks.get((variant, subject), []):
                shown = number == 0 and subject == subjects[0]
                name = f'data-block="{number}/{subject}"{"" if shown else " hidden"}'
                html.append(gallery(chapter, items[:SHOWN], places, name))
    choose = _select("variant", [(str(index), variant) for index, variant in enumerate(variants)])
    choose += _select("subject", [(str(subject), f"subject {subject}") for subject in subjects])
    return (
        f"<h{level}>Seen and reconstructed</h{level}>\n"
        f'<p class="soft">The first {most} test images in the order of the test set; none is selected. '
        "r is PixCorr with the seen image. "
        "The combined image starts from the low-level one and is guided by the semantic branch."
        f"{more}</p>\n"
        f'<div class="images">\n<div class="choose">{choose}</div>\n'
        '<p class="no-images" role="status" hidden>No images of this variant for this subject.</p>\n'
        + "".join(html)
        + "</div>\n"
    )


def gallery(chapter: Chapter, items: Sequence[Gallery], places: Places, attributes: str = "") -> str:
    """Return a block of images. Rows: images. Columns: seen, low-level, semantic, combined."""
    first = items[0]
    style = sheets_style(places[first.variant, first.subject, str(first.image_id)])
    parts = [
        f'<section class="gallery" {attributes} '
        f'aria-label="{escape(f"{first.variant}, subject {first.subject}")}" style="{style}">\n<b>image</b>',
        *(f"<b>{name}</b>" for name in COLUMNS.values()),
    ]
    for item in items:
        place = places[item.variant, item.subject, str(item.image_id)]
        parts.append(f"\n<span>{escape(str(item.image_id))}</span>")
        for column in COLUMNS:
            score = None if column == "seen" else _pixcorr(chapter, item, column)
            caption = "" if score is None else f"<figcaption>r {format_value('PixCorr', score)}</figcaption>"
            parts.append(f"<figure>{window(place, column, item.image_id)}{caption}</figure>")
    return "".join([*parts, "\n</section>\n"])


def _pixcorr(chapter: Chapter, item: Gallery, column: str) -> float | None:
    if column in item.pixcorr:
        return item.pixcorr[column]
    scores = chapter.per_image
    if column != "combined" or scores is None or "PixCorr" not in scores.metrics:
        return None
    keys = [entry.row.key for entry in chapter.ranking.entries if entry.row.variant == item.variant]
    image = str(item.image_id)
    if len(keys) != 1 or keys[0] not in scores.keys:  # a tuple of row keys, not a mapping
        return None
    if item.subject not in scores.subjects or image not in scores.image_ids:
        return None
    value = scores.values[
        scores.row(keys[0]),
        scores.metrics.index("PixCorr"),
        scores.subjects.index(item.subject),
        scores.image_ids.index(image),
    ]
    return None if np.isnan(value) else float(value)


# --- what papers printed ---


def _published(rows: Sequence[PublishedRow], tracks: Sequence[str]) -> str:
    """Published rows, a table for each protocol, with where each number was read."""
    others = [track for track in tracks if track != "paper"]
    warning = (
        f"<p class='verdict'>No number here compares with one of the {escape(' or '.join(others))} track: those rows "
        "are of simulated brains, and stand-in networks fill their metrics.</p>\n"
        if others
        else ""
    )
    parts = [
        '<section class="chapter" id="published" data-track="paper">\n<h2>What papers printed</h2>\n'
        f"<p>{len(rows)} rows as their sources print them, in a table for each scoring protocol: numbers under "
        "different protocols do not compare, and a printed number knows no protocol hash, so none has a rank here. A "
        f"dash is a value that was not printed, or that nobody could read.</p>\n{warning}"
    ]
    for number, (protocol, own) in enumerate(by_protocol(rows)):
        metrics = published_metrics(own)
        sources = list(dict.fromkeys(source_of(row) for row in own))
        columns = [
            heading("method", first="ascending", kind=' class="name" data-text'),
            heading("data", first="ascending", kind=" data-text"),
            heading("subjects", first="ascending", kind=" data-text"),
            heading("images", first="descending"),
            *(metric_heading(key) for key in metrics),
            heading("source", first="ascending"),
        ]
        lines = [_published_row(row, metrics, number, sources.index(source_of(row)) + 1) for row in own]
        title = capital(published_title(protocol))
        listed = "".join(f'<li id="source{number}-{k}">{escape(source)}</li>' for k, source in enumerate(sources, 1))
        table = (
            f"<table data-sortable>\n<caption>{escape(title)}</caption>\n<thead><tr>{''.join(columns)}</tr></thead>\n"
            f"<tbody>{''.join(lines)}</tbody>\n</table>\n"
        )
        parts.append(
            f'<section class="protocol" data-protocol="{escape(protocol)}">\n'
            f"<h3>{escape('Protocol unknown' if protocol == UNKNOWN else f'Protocol {protocol}')}</h3>\n"
            + scroll(title, table)
            + f'<details class="sources"><summary>{len(sources)} sources</summary><ol>{listed}</ol></details>\n'
            + "</section>\n"
        )
    return "".join([*parts, "</section>\n"])


def _published_row(row: PublishedRow, metrics: Sequence[str], table: int, source: int) -> str:
    name, data = escape(row.name), escape(row.data)
    extra = ", ".join(f"{key} {value:g}" for key, value in row.other_metrics.items())
    if row.evidence == "not_read":
        extra = "printed, but no readable copy was found"
    subjects = escape(subjects_text(row.subjects))
    more = f"<small>{escape(extra)}</small>" if extra else ""
    return (
        f'\n<tr id="{escape(row.id)}"{_wanted("published", row.data, row.subjects)}>'
        f'<th class="name" scope="row" data-value="{name}">{name}{more}</th>'
        f'<td data-value="{data}">{data}</td><td data-value="{subjects}">{subjects}</td>'
        + cell(row.test_images, str(row.test_images or ""))
        + "".join(_published_cell(row, key) for key in metrics)
        + cell(source, f'<a href="#source{table}-{source}">[{source}]</a>')
        + "</tr>"
    )
