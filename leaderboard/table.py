"""A ranking as a table for the terminal (rich) and as Markdown."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from leaderboard.ranking import Entry, Ranking
from leaderboard.schema import Interval, Row
from metrics.cards import CARDS, format_value

PLAIN_WIDTH = 120
"""Columns of the table where no terminal says how many it has."""

INTERVALS = "95 % intervals: bootstrap over subjects and images."
TIES = "=: tied, the intervals of their ranks overlap; the order is that of the mean ranks."

_UNSAID = "a stand-in, not named"
_LEAD_COLUMNS = 13  # rank, mean rank and the gaps beside them
_LONGEST_NAME = 18


def sections(ranking: Ranking) -> Iterator[tuple[str, list[Entry]]]:
    """Yield the parts of every table, title and rows. Only the first part, without a title, is ranked."""
    yield "", list(ranking.entries)
    yield "one branch alone (not ranked)", [Entry(row) for row in ranking.branches]
    yield "reference (not ranked)", [Entry(row) for row in ranking.references]


def judges(rows: Iterable[Row]) -> dict[str, str]:
    """Return metric key -> what fills it, as the rows say; on a track of stand-ins none is left unsaid."""
    told: dict[str, str] = {}
    for row in rows:
        told |= row.judges
        if row.track == "demo":
            told |= {key: _UNSAID for key in row.metrics if CARDS[key].network and key not in told}
    return {key: told[key] for key in CARDS if key in told}


def footnotes(ranking: Ranking, notes: Mapping[str, str]) -> list[str]:
    """Say what a reader must know to read the numbers: intervals, what stands in for which network, notes of rows."""
    lines = [INTERVALS]
    if any(entry.tied for entry in ranking.entries):
        lines.append(TIES)
    # Under CLIP-1000's name stands a number of images that differs between test sets, so it is always said.
    if "CLIP-1000" in ranking.metrics:
        counts = sorted({row.n_images for row in ranking.rows})
        lines.append(f"CLIP-1000: top-1 among {' or '.join(map(str, counts))} test images")
    shared: dict[str, list[str]] = {}
    for key in sorted(notes, key=lambda key: list(CARDS).index(key) if key in CARDS else len(CARDS)):
        if key not in CARDS or key in ranking.metrics:
            shared.setdefault(notes[key], []).append(key)
    lines += [f"{', '.join(keys)}: {text}" for text, keys in shared.items()]
    lines += [f"{ranking.name(row)}: {row.notes}" for row in ranking.rows if row.notes]
    return lines


def heading(ranking: Ranking) -> str:
    """Return one line: track, protocol, how many images and subjects."""
    images = " or ".join(str(count) for count in sorted({row.n_images for row in ranking.rows}))
    subjects = len({subject for row in ranking.rows for subject in row.subjects})
    return (
        f"{ranking.track} track, protocol {ranking.protocol} ({ranking.protocol_hash[:8]}), "
        f"{images} test images, {subjects} subject{'' if subjects == 1 else 's'}"
    )


def print_table(ranking: Ranking, notes: Mapping[str, str] | None = None, console: Console | None = None) -> None:
    """Print the table and its notes: styled on a terminal, plain text of 120 columns anywhere else.

    Args:
        ranking: what to print.
        notes: metric key -> what stands in for its network, e.g. ``{"CLIP": "stand-in EfficientNet-Lite2, pooled"}``;
            comes before what the rows say (:func:`judges`).
        console: where to print; default the standard output.
    """
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(file=console.file, width=PLAIN_WIDTH, highlight=False, no_color=True)
    console.print(_renderable(ranking, judges(ranking.rows) | dict(notes or {}), console.width), markup=False)


def text(ranking: Ranking, notes: Mapping[str, str] | None = None, width: int = PLAIN_WIDTH) -> str:
    """Return the table as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, highlight=False).print(
        _renderable(ranking, judges(ranking.rows) | dict(notes or {}), width), markup=False
    )
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _renderable(ranking: Ranking, notes: Mapping[str, str], width: int) -> RenderableType:
    longest = max(len(ranking.name(row)) for row in ranking.rows)
    name_width = min(longest, _LONGEST_NAME)
    room = width - name_width - _LEAD_COLUMNS
    cells = _cells(ranking, short=False)
    if sum(_column_widths(cells)) > room:
        cells = _cells(ranking, short=True)
    parts: list[RenderableType] = [Text(heading(ranking)), Text()]
    for block in _blocks(_column_widths(cells), room):
        parts += [_table(ranking, cells, block, name_width), Text()]
    parts.append(Text(ranking.sentence, style="bold"))
    parts += [Text(line, style="dim") for line in footnotes(ranking, notes)]
    return Group(*parts)


def _cells(ranking: Ranking, short: bool) -> dict[str, dict[tuple[str, str], tuple[str, str]]]:
    """Print every value: metric -> row -> (mean, interval)."""
    return {
        key: {
            row.key: (format_value(key, row.metrics[key].mean), bounds(key, row.metrics[key], short))
            for row in ranking.rows
            if key in row.metrics
        }
        for key in ranking.metrics
    }


def bounds(key: str, value: Interval, short: bool = False) -> str:
    """Write an interval as ``.312–.354``, or ``±.021`` (half of it) if ``short``; empty where there is none."""
    if value.ci_low is None or value.ci_high is None:
        return ""
    if short:
        return "±" + _bare(key, (value.ci_high - value.ci_low) / 2)
    return f"{_bare(key, value.ci_low)}–{_bare(key, value.ci_high)}"


def _bare(key: str, value: float) -> str:
    """Without what the mean above already says: the percent sign, or the leading zero."""
    number = format_value(key, value)
    if CARDS[key].percent:
        return number.removesuffix("%")
    return number.replace("0.", ".", 1) if number.lstrip("-").startswith("0.") else number


def _heading_lines(metric: str) -> list[str]:
    """Split a metric's name into at most two short lines, then its direction."""
    for mark in ("-", "("):
        before, found, after = metric.partition(mark)
        if found and before:
            lines = [before + "-", after] if mark == "-" else [before, "(" + after]
            break
    else:
        lines = ["", metric]
    return [*lines, CARDS[metric].arrow]


def _column_widths(cells: Mapping[str, Mapping[tuple[str, str], tuple[str, str]]]) -> list[int]:
    """Columns each metric takes, the gap included."""
    return [
        1 + max(len(part) for part in [*_heading_lines(key), *(part for cell in column.values() for part in cell)])
        for key, column in cells.items()
    ]


def _blocks(widths: Sequence[int], room: int) -> list[slice]:
    """Metrics that fit beside each other: one block where the terminal is wide enough, else several."""
    blocks, start, used = [], 0, 0
    for index, width in enumerate(widths):
        if index > start and used + width > room:
            blocks.append(slice(start, index))
            start, used = index, 0
        used += width
    return [*blocks, slice(start, len(widths))]


def _table(
    ranking: Ranking,
    cells: Mapping[str, Mapping[tuple[str, str], tuple[str, str]]],
    block: slice,
    name_width: int,
) -> Table:
    metrics = ranking.metrics[block]
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(Text("\n\n#"), justify="right", no_wrap=True)
    table.add_column(Text("\n\nvariant"), width=name_width, overflow="fold")
    table.add_column(Text("mean\nrank\n↓"), justify="right", no_wrap=True)
    for key in metrics:
        table.add_column(Text("\n".join(_heading_lines(key))), justify="right", no_wrap=True)
    best = {key: ranking.best(key) for key in metrics}
    for title, entries in sections(ranking):
        if not entries:
            continue
        if title:
            table.add_row()
            table.add_row("", Text(title.removesuffix(" (not ranked)"), style="italic"))
        for entry in entries:
            row = entry.row
            styles = ["bold" if row.key in best[key] else "" for key in metrics]
            table.add_row(
                Text(_rank_cell(entry, row)),
                Text(ranking.name(row), style="bold" if entry.rank == 1 else ""),
                Text("" if entry.mean_rank is None else f"{entry.mean_rank:.1f}"),
                *(_cell(cells[key].get(row.key), style) for key, style in zip(metrics, styles, strict=True)),
            )
    return table


def _rank_cell(entry: Entry, row: Row) -> str:
    if entry.rank is None:
        return "–" if row.kind == "method" else ""
    spread = "" if entry.rank_low is None else f"\n{entry.rank_low}–{entry.rank_high}"
    return f"{entry.shown_place}{spread}"


def _cell(cell: tuple[str, str] | None, style: str) -> Text:
    if cell is None:
        return Text("–", style="dim")
    mean, interval = cell
    return Text.assemble((mean, style), ("\n" + interval, "dim") if interval else "")


def markdown(ranking: Ranking, notes: Mapping[str, str] | None = None) -> str:
    """Return the table as GitHub-flavoured Markdown: best of each column in bold, intervals in brackets."""
    lines = [f"**{escape_markdown(heading(ranking))}**", ""]
    titles = ["#", "variant", "mean rank ↓", *(f"{escape_markdown(key)} {CARDS[key].arrow}" for key in ranking.metrics)]
    lines += ["| " + " | ".join(titles) + " |", "|--:|:--|" + "--:|" * (len(titles) - 2)]
    best = {key: ranking.best(key) for key in ranking.metrics}
    for title, entries in sections(ranking):
        if title and entries:
            lines.append(f"| | *{title}* |" + " |" * (len(titles) - 2))
        for entry in entries:
            row = entry.row
            cells = [
                _rank_cell(entry, row).replace("\n", " (") + (")" if entry.rank_low is not None else ""),
                escape_markdown(ranking.name(row)),
                "" if entry.mean_rank is None else f"{entry.mean_rank:.1f}",
            ]
            for key in ranking.metrics:
                value = row.metrics.get(key)
                if value is None:
                    cells.append("–")
                    continue
                mean = format_value(key, value.mean)
                interval = bounds(key, value)
                cells.append((f"**{mean}**" if row.key in best[key] else mean) + (f" [{interval}]" if interval else ""))
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", escape_markdown(ranking.sentence), ""]
    lines += [f"- {escape_markdown(line)}" for line in footnotes(ranking, judges(ranking.rows) | dict(notes or {}))]
    return "\n".join(lines) + "\n"


def escape_markdown(text: str) -> str:
    """Text from outside as text: no Markdown, no HTML, no new table cell."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "\\`*_[]|":
        text = text.replace(mark, "\\" + mark)
    return text
