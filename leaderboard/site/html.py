"""The frame of every page, and the small parts that pages share.

Texts are escaped here; arguments that are HTML already say so, and were escaped where they were made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

from leaderboard.published import PublishedRow
from leaderboard.schema import Interval
from leaderboard.table import bounds
from metrics.cards import CARDS, format_value

ASSETS = ("page.css", "page.js", "pair.js")
"""Files of this package that lie beside ``index.html``."""

# A page may use its own folder and nothing else, and runs no script that stands in its text. From file:// a page has no
# origin that 'self' could mean.
_POLICY = (
    "default-src 'none'; script-src 'self' file:; style-src 'self' file: 'unsafe-inline'; img-src 'self' file: data:; "
    "base-uri 'none'; form-action 'none'"
)
MISSING = '<span class="missing" title="no value">–</span>'


def document(title: str, body: Iterable[str], *, scripts: Sequence[str] = ("page.js",), kind: str = "") -> str:
    """Return a page of the site."""
    loaded = "".join(f'<script src="{name}" defer></script>\n' for name in scripts)
    return (
        "<!doctype html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # or a browser asks the server for /favicon.ico
        f"<title>{escape(title)}</title>\n"
        f'<link rel="stylesheet" href="page.css">\n{loaded}</head>\n'
        f'<body{f" class={kind}" if kind else ""}>\n<a class="skip" href="#main">To the content</a>\n'
        f'<main id="main">\n{"".join(body)}</main>\n</body>\n</html>\n'
    )


def resource(name: str) -> str:
    """Return the text of a file of this package."""
    return files("leaderboard").joinpath(name).read_text(encoding="utf-8")


def capital(text: str) -> str:
    """Return ``text`` with a capital first letter."""
    return text[:1].upper() + text[1:]


def facts(values: Mapping[str, str]) -> str:
    """Return names and values in a line; those without a value are left out."""
    shown = "".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in values.items() if value)
    return f'<dl class="facts">{shown}</dl>\n'


def heading(text: str, note: str = "", *, first: str, kind: str = "", sort: str = "") -> str:
    """Return a column heading that sorts; ``first`` is the order of its first click, the better end on top."""
    return (
        f'<th scope="col"{kind} data-first="{first}"{sort}><button type="button">{escape(text)}</button>'
        + (f"<small>{escape(note)}</small>" if note else "")
        + "</th>"
    )


def metric_heading(key: str, note: str = "") -> str:
    """Return a metric's column heading."""
    first = "descending" if CARDS[key].direction == "higher" else "ascending"
    return heading(f"{key} {CARDS[key].arrow}", note, first=first)


def cell(value: float | None, shown: str) -> str:
    """Return a table cell that sorts by ``value``."""
    return f'<td data-value="{"" if value is None else repr(value)}">{shown or MISSING}</td>'


def metric_cell(key: str, value: Interval | None, is_best: bool = False) -> str:
    """Return a metric's cell: mean, interval below; a dash where there is none."""
    if value is None:
        return f'<td data-value="">{MISSING}</td>'
    mean = format_value(key, value.mean)
    title, small, ends = f"{key} {mean}", "", ""
    if value.ci_low is not None and value.ci_high is not None:
        low, high = format_value(key, value.ci_low), format_value(key, value.ci_high)
        title += f", 95 % interval {low} to {high}"
        small = f"<small>{bounds(key, value)}</small>"
        ends = f' data-low="{value.ci_low:.6g}" data-high="{value.ci_high:.6g}"'
    mark = ' class="best"' if is_best else ""
    shown = f'<b>{mean}<span class="unseen"> best</span></b>' if is_best else mean
    return f'<td{mark} data-value="{value.mean!r}"{ends} title="{escape(title)}">{shown}{small}</td>'


def scroll(label: str, inside: str) -> str:
    """Return a table in a box of its own that scrolls sideways, by keyboard too."""
    return f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">\n{inside}</div>\n'


def table_of(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a plain table of texts, the first of each row its heading."""
    head = "".join(f'<th scope="col"{"" if k else _NAME}>{escape(text)}</th>' for k, text in enumerate(columns))
    body = "".join(
        f'\n<tr><th scope="row" class="name">{escape(first)}</th>'
        + "".join(f"<td>{escape(text) or MISSING}</td>" for text in rest)
        + "</tr>"
        for first, *rest in rows
    )
    table = (
        f'<table class="text">\n<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody>\n</table>\n"
    )
    return scroll(caption, table)


_NAME = ' class="name"'

AMOUNTS = {"full": "full (in NSD 40 h)", "40h": "full (in NSD 40 h)", "10h": "10 h", "1h": "1 h"}
AMOUNTS |= {"30min": "30 min", "450": "450 samples", "15min": "15 min", "": "not said"}
"""How much fMRI of the test subject, as filters name it, most first; other amounts stand as they are."""


def amount(data: str) -> str:
    """Return what a filter calls an amount of data."""
    return AMOUNTS.get(data, data)


def subjects_text(subjects: Sequence[int] | None) -> str:
    """Return subjects as filters and tables name them."""
    return "not said" if subjects is None else ", ".join(map(str, subjects))


def source_of(row: PublishedRow) -> str:
    """Return what to know about where a published row comes from: its source, and who says otherwise."""
    parts = [row.source]
    if row.protocol_inferred:
        parts.append("protocol inferred: the evaluation code was not seen for this row")
    return "; ".join([*parts, *row.conflicts])
