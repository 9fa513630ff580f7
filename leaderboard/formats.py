"""Rows for other programs and for papers: JSON, CSV, LaTeX; and published rows as tables.

Published rows stand apart and without ranks: a printed number knows no protocol hash.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from leaderboard.published import PublishedRow
from leaderboard.ranking import Entry, Ranking
from leaderboard.results import Result
from leaderboard.schema import Interval, Row, row_id
from leaderboard.statistics import Comparison
from leaderboard.table import PLAIN_WIDTH, bounds, judges, sections
from metrics.cards import CARDS, KEYS, format_value

UNKNOWN = "unknown"
_LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}"}
_LATEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "<": r"$<$", ">": r"$>$"}


def as_json(rankings: Sequence[Ranking], printed: Sequence[PublishedRow]) -> str:
    """Return ``{"rankings": [...], "published": [...]}``; every row with its id, rank and what the rank is worth."""
    data = [
        {
            "track": ranking.track,
            "protocol": ranking.protocol,
            "protocol_hash": ranking.protocol_hash,
            "sentence": ranking.sentence,
            "judges": judges(ranking.rows),
            "rows": [
                {"id": row_id(entry.row), **_place(entry), **entry.row.model_dump(mode="json")}
                for entry in _all(ranking)
            ],
        }
        for ranking in rankings
    ]
    rows = [row.model_dump(mode="json") for row in printed]
    return json.dumps({"rankings": data, "published": rows}, indent=2, ensure_ascii=False, allow_nan=False)


def as_csv(rankings: Sequence[Ranking], printed: Sequence[PublishedRow]) -> str:
    """Return one line a row, metrics as fractions with their bounds; empty cells where there is no value."""
    head = ["id", "kind", "track", "protocol", "protocol_hash", "method", "variant", "data", "subjects", "n_images"]
    head += ["place", "tied", "rank", "rank_low", "rank_high", "mean_rank"]
    used = {*KEYS, *(key for ranking in rankings for key in ranking.metrics)}
    head += [column for key in CARDS if key in used for column in (key, f"{key} low", f"{key} high")]
    head += ["source", "judges"]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, head, lineterminator="\n", restval="")
    writer.writeheader()
    for ranking in rankings:
        filled = "; ".join(f"{key}: {told}" for key, told in judges(ranking.rows).items())
        for entry in _all(ranking):
            row = entry.row
            line = {
                "id": row_id(row),
                "kind": row.kind,
                "track": row.track,
                "protocol": row.protocol,
                "protocol_hash": row.protocol_hash,
                "method": row.method,
                "variant": row.variant,
                "data": row.data,
                "subjects": " ".join(map(str, row.subjects)),
                "n_images": row.n_images,
                "source": row.source,
                "judges": filled,
                **{key: "" if value is None else value for key, value in _place(entry).items() if key != "p_best"},
            }
            for key, value in row.metrics.items():
                ends = {f"{key} low": value.ci_low, f"{key} high": value.ci_high}
                line |= {key: repr(value.mean)} | {k: "" if v is None else repr(v) for k, v in ends.items()}
            writer.writerow(line)
    for one in printed:
        writer.writerow(
            {
                "id": one.id,
                "kind": "published",
                "track": "paper",
                "protocol": one.protocol or "",
                "method": one.method,
                "variant": one.variant,
                "data": one.data,
                "subjects": " ".join(map(str, one.subjects or ())),
                "n_images": one.test_images or "",
                "source": one.source,
                **{key: repr(value) for key, value in one.metrics.items()},
            }
        )
    return buffer.getvalue()


def as_latex(rankings: Sequence[Ranking], printed: Sequence[PublishedRow]) -> str:
    """Return tables for a paper (package ``booktabs``): best of each column in bold, 95 % intervals small beside."""
    tables = [_latex_ranking(ranking) for ranking in rankings]
    tables += [_latex_published(protocol, rows) for protocol, rows in by_protocol(printed)]
    return "% \\usepackage{booktabs}\n" + "\n".join(tables)


def _latex_ranking(ranking: Ranking) -> str:
    best = {key: ranking.best(key) for key in ranking.metrics}
    lines = []
    for title, entries in sections(ranking):
        if title and entries:
            lines.append(r"\midrule")
        for entry in entries:
            row = entry.row
            cells = []
            for key in ranking.metrics:
                value = row.metrics.get(key)
                if value is None:
                    cells.append("--")
                    continue
                mean, interval = _escaped(format_value(key, value.mean)), bounds(key, value).replace("–", "--")
                shown = rf"\textbf{{{mean}}}" if row.key in best[key] else mean
                cells.append(shown + (rf" {{\tiny {interval}}}" if interval else ""))
            lines.append(f"{entry.shown_place} & {_escaped(ranking.name(row))} & " + " & ".join(cells) + r" \\")
    caption = f"{ranking.track} track, protocol {ranking.protocol} ({ranking.protocol_hash[:8]}). {ranking.sentence}."
    caption += "".join(f" {key}: {told}." for key, told in judges(ranking.rows).items())
    return _latex_table(["", "variant"], ranking.metrics, lines, caption)


def _latex_published(protocol: str, rows: Sequence[PublishedRow]) -> str:
    metrics = published_metrics(rows)
    lines = []
    for row in rows:
        shown = (_escaped(row.cell(key)) or "--" for key in metrics)
        lines.append(f"{_escaped(row.name)} & {_escaped(row.data)} & " + " & ".join(shown) + r" \\")
    caption = f"As printed, under protocol {protocol}. Sources: {'; '.join(dict.fromkeys(row.source for row in rows))}."
    return _latex_table(["method", "data"], metrics, lines, caption)


def _latex_table(lead: Sequence[str], metrics: Sequence[str], lines: Sequence[str], caption: str) -> str:
    arrows = {"higher": r"$\uparrow$", "lower": r"$\downarrow$"}
    head = [*lead, *(f"{_escaped(key)} {arrows[CARDS[key].direction]}" for key in metrics)]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\begin{{tabular}}{{{'l' * len(lead)}{'r' * len(metrics)}}}",
            r"\toprule",
            " & ".join(head) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{_escaped(caption)}}}",
            r"\end{table}",
        ]
    )


def published_markdown(printed: Sequence[PublishedRow]) -> str:
    """Return published rows as Markdown, a table for each protocol."""
    parts = []
    for protocol, rows in by_protocol(printed):
        metrics = published_metrics(rows)
        parts.append(f"**{published_title(protocol)}**\n")
        parts.append(
            "| method | data | images | " + " | ".join(f"{m} {CARDS[m].arrow}" for m in metrics) + " | source |"
        )
        parts.append("|:--|:--|--:|" + "--:|" * len(metrics) + ":--|")
        for row in rows:
            values = " | ".join(row.cell(key) or "–" for key in metrics)
            name = row.name.replace("|", "\\|")
            parts.append(
                f"| {name} | {row.data} | {row.test_images or '?'} | {values} | {row.source.replace('|', ' ')} |"
            )
        parts.append("")
    return "\n".join(parts)


def print_published(printed: Sequence[PublishedRow], console: Console | None = None) -> None:
    """Print published rows, a table for each protocol, with where each number was read."""
    console = _console(console)
    for protocol, rows in by_protocol(printed):
        metrics = published_metrics(rows)
        sources = list(dict.fromkeys(row.source for row in rows))
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
        table.add_column("id", overflow="fold", max_width=24)
        table.add_column("method", overflow="fold", max_width=30)
        table.add_column("data")
        table.add_column("images", justify="right")
        for key in metrics:
            table.add_column(f"{key} {CARDS[key].arrow}", justify="right")
        table.add_column("source", justify="right")
        for row in rows:
            mark = "*" if row.protocol_inferred else ""
            conflict = "!" if row.conflicts else ""
            cells = (row.cell(key) or "–" for key in metrics)
            place = f"[{sources.index(row.source) + 1}]{mark}{conflict}"
            table.add_row(
                *map(Text, (row.id, row.name, row.data, str(row.test_images or "?"), *cells, place)),
            )
        console.print(Text(published_title(protocol), style="bold"))
        console.print(table)
        for number, source in enumerate(sources, 1):
            console.print(Text(f"[{number}] {source}", style="dim"))
        if any(row.protocol_inferred for row in rows):
            console.print(
                Text("* the protocol is inferred: the evaluation code was not seen for this row", style="dim")
            )
        for row in rows:
            for conflict in row.conflicts:
                console.print(Text(f"! {row.id}: {conflict}", style="dim"))
        console.print()


def beside(pairs: Sequence[tuple[Row, PublishedRow]]) -> dict[str, dict[str, tuple[Interval, float]]]:
    """Return variant -> metric -> (ours, printed), of rows that may stand beside a printed one.

    Raises:
        ValueError: a row of another track or protocol than the printed one's: their numbers do not compare.
    """
    table: dict[str, dict[str, tuple[Interval, float]]] = {}
    for row, printed in pairs:
        if row.track != "paper" or row.protocol != printed.protocol:
            raise ValueError(
                f"{row.name} ({row.track} track, protocol {row.protocol}) does not compare with {printed.id} "
                f"(protocol {printed.protocol or UNKNOWN})"
            )
        table[row.name] = {
            key: (row.metrics[key], printed.metrics[key])
            for key in CARDS
            if key in row.metrics and key in printed.metrics
        }
    return table


def print_beside(pairs: Sequence[tuple[Row, PublishedRow]], console: Console | None = None) -> None:
    """Print our values, the printed ones below, and the differences; only where they compare (see :func:`beside`)."""
    values = beside(pairs)
    if not values:
        return
    console = _console(console)
    metrics = [key for key in CARDS if any(key in own for own in values.values())]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for title in ("variant", "", *(f"{key} {CARDS[key].arrow}" for key in metrics)):
        table.add_column(title, justify="left" if title in ("variant", "") else "right")
    for name, own in values.items():
        ours = [f"{format_value(k, own[k][0].mean)}\n{bounds(k, own[k][0])}" if k in own else "" for k in metrics]
        printed = [format_value(k, own[k][1]) if k in own else "" for k in metrics]
        apart = [
            f"{'+' if (d := own[k][0].mean - own[k][1]) >= 0 else ''}{format_value(k, d)}" if k in own else ""
            for k in metrics
        ]
        table.add_row(name, "ours", *ours)
        table.add_row("", "printed", *printed)
        table.add_row("", "difference", *apart)
    console.print(table)
    row, one = pairs[0]
    unlike = row.n_images != one.test_images or (one.subjects is not None and row.subjects != one.subjects)
    if unlike:
        console.print(
            f"Ours: subjects {', '.join(map(str, row.subjects))}, {row.n_images} images; printed: "
            f"subjects {', '.join(map(str, one.subjects or ()))}, {one.test_images} images.",
            style="dim",
        )


def print_comparison(a: Result, b: Result, found: Mapping[str, Comparison], console: Console | None = None) -> None:
    """Print A minus B for every metric."""
    console = _console(console)
    names = {"a": a.row.name, "b": b.row.name, "": "equal"}
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("metric")
    for title in (f"A: {a.row.name}", f"B: {b.row.name}", "A - B", "95 %", "p", "q"):
        table.add_column(title, justify="right")
    table.add_column("better")
    for key, one in found.items():
        signed = [
            f"{'+' if value >= 0 else ''}{format_value(key, value)}"
            for value in (one.difference, one.ci_low, one.ci_high)
        ]
        told = names[one.better] if one.q < 0.05 else "cannot be told"
        table.add_row(
            f"{key} {CARDS[key].arrow}",
            format_value(key, one.mean_a),
            format_value(key, one.mean_b),
            signed[0],
            f"{signed[1]} to {signed[2]}",
            f"{one.p:.2g}",
            f"{one.q:.2g}",
            told,
        )
    console.print(table)
    console.print(
        "Paired over images: crossed bootstrap interval, permutation p; q: p after Benjamini-Hochberg over metrics.",
        style="dim",
    )


def _console(console: Console | None) -> Console:
    console = console or Console(highlight=False)
    if console.is_terminal:
        return console
    return Console(file=console.file, width=PLAIN_WIDTH + 40, highlight=False, no_color=True)


def _all(ranking: Ranking) -> Iterator[Entry]:
    for _, entries in sections(ranking):
        yield from entries


def _place(entry: Entry) -> dict[str, float | int | None]:
    names = ("place", "tied", "rank", "rank_low", "rank_high", "mean_rank", "p_best")
    return {name: getattr(entry, name) for name in names}


def by_protocol(rows: Sequence[PublishedRow]) -> list[tuple[str, list[PublishedRow]]]:
    """Sort published rows by protocol, in order of appearance, the unknown one last."""

    def protocol(row: PublishedRow) -> str:
        return row.protocol or UNKNOWN

    order = list(dict.fromkeys(protocol(row) for row in rows))
    order.sort(key=lambda name: name == UNKNOWN)
    ordered = sorted(rows, key=lambda row: order.index(protocol(row)))
    return [(name, list(own)) for name, own in groupby(ordered, protocol)]


def published_title(protocol: str) -> str:
    """Return what stands above the published rows of a protocol."""
    if protocol == UNKNOWN:
        return "as printed, under a protocol that is not known (these rows compare with nothing)"
    return f"as printed, under protocol {protocol}"


def published_metrics(rows: Sequence[PublishedRow]) -> list[str]:
    """Return the metrics that any of the rows has, in canonical order."""
    return [key for key in CARDS if any(key in row.metrics for row in rows)]


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(mark, mark) for mark in text)
