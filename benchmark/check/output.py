"""What a check leaves behind: a table on the terminal, JSON, JUnit and Markdown."""

from __future__ import annotations

import io
import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmark.errors import RunError
from benchmark.imagesets.wording import one_line, place, reason
from leaderboard.gate import Check, Finding
from leaderboard.schema import write_atomically
from leaderboard.table import PLAIN_WIDTH, escape_markdown
from metrics.cards import CARDS, MISSING, format_value

JSON, JUNIT, MARKDOWN, PAGE = "check.json", "junit.xml", "comment.md", "worse.html"
COMMENT_LIMIT = 65_536
"""Characters of a comment on a GitHub pull request."""

_NAME = 300
_STYLES = {"regressed": "bold red", "improved": "green", "no change shown": "dim"}
_MARKS = {"regressed": "❌ regressed", "improved": "✅ improved", "no change shown": "no change shown"}
Notes = Mapping[str, str]
"""Metric -> what fills its slot under the protocol."""


def signed(key: str, value: float | None) -> str:
    """Print a difference: with its sign, one digit more than a mean has; points for what is printed as a percentage."""
    if value is None or math.isnan(value):
        return MISSING
    return f"{100 * value:+.2f}" if CARDS[key].percent else f"{value:+.4f}"


def amount(key: str, value: float | None) -> str:
    """Print a margin or a detectable drop, as :func:`signed` does without a sign."""
    return MISSING if value is None else signed(key, value).removeprefix("+")


def _interval(f: Finding) -> str:
    return MISSING if math.isnan(f.ci_low) else f"{signed(f.metric, f.ci_low)} to {signed(f.metric, f.ci_high)}"


def _q(f: Finding) -> str:
    """Return the q of the direction in which the metric moved."""
    q = f.q if f.drop > 0 or math.isnan(f.drop) else f.q_better
    return "<.001" if q < 0.001 else f"{q:.3f}".removeprefix("0")


def heading(check: Check) -> str:
    """Return one line: what was compared on what."""
    subjects = f"{len(check.subjects)} subject{'' if len(check.subjects) == 1 else 's'}"
    seeds = f", {len(check.seeds[0])} and {len(check.seeds[1])} seeds" if max(map(len, check.seeds)) > 1 else ""
    protocol = check.protocol or "unknown"
    digest = f" ({check.protocol_hash[:8]})" if check.protocol_hash else ""
    return f"{check.track} track, protocol {protocol}{digest}, {check.n_images} test images, {subjects}{seeds}"


def footnotes(check: Check, slots: Notes) -> list[str]:
    """Say what a reader must know to read the numbers."""
    rules = check.rules
    sure = f"{100 - 200 * rules.alpha:g} %"
    lines = [
        f"difference: candidate less baseline, in points where percentages are shown; {sure} interval: crossed "
        "bootstrap over subjects and images" + (" and seeds" if min(map(len, check.seeds)) > 1 else ""),
        f"regressed: q at most {rules.alpha:g} (one-sided paired permutation, false discoveries controlled) and the "
        "interval beyond the margin; of equal models at most that share fails",
        f"detects: the smallest drop that this test set shows with probability {rules.power:g}",
    ]
    shared: dict[str, list[str]] = {}
    for f in check.findings:
        if f.metric in slots:
            shared.setdefault(slots[f.metric], []).append(f.metric)
    lines += [f"{', '.join(keys)}: {text}" for text, keys in shared.items()]
    return [*lines, *check.notes]


def slot_notes(protocol: str | None) -> dict[str, str]:
    """Return metric -> what fills it, for the slots that networks fill under a protocol."""
    from metrics.protocols import get_protocol

    try:
        known = get_protocol(protocol or "")
    except ValueError:  # scored elsewhere, under what is not known here
        return {}
    return {key: known.describe(key) for key in known.slots}


# --- terminal ---------------------------------------------------------------------------------------------------------


def print_check(check: Check, console: Console | None = None) -> None:
    """Print the table: styled on a terminal, plain text of 120 columns anywhere else."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(file=console.file, width=PLAIN_WIDTH, highlight=False, no_color=True)
    parts: list[Any] = [
        Text(f"candidate: {one_line(check.candidate, _NAME)}\nbaseline:  {one_line(check.baseline, _NAME)}"),
        Text(heading(check), style="dim"),
        Text(),
        _table(check),
        Text(),
        Text(check.sentence, style="bold red" if not check.passed else "bold green"),
        *(Text(line, style="dim") for line in footnotes(check, slot_notes(check.protocol))),
    ]
    for part in parts:
        console.print(part, markup=False)


def _table(check: Check) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("metric", no_wrap=True)
    sure = f"{100 - 200 * check.rules.alpha:g} %"
    for title in ("baseline", "candidate", "difference", sure, "q", "margin", "detects"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    last = "blocking"
    for f in check.findings:
        if f.role != last:
            table.add_row()
            table.add_row(Text("advisory", style="italic"))
            last = f.role
        table.add_row(
            f"{f.metric} {CARDS[f.metric].arrow}",
            *_cells(f),
            Text(f.verdict, style=_STYLES[f.verdict]),
        )
    return table


def _cells(f: Finding) -> tuple[str, ...]:
    return (
        format_value(f.metric, f.baseline),
        format_value(f.metric, f.candidate),
        signed(f.metric, f.difference),
        _interval(f),
        _q(f),
        amount(f.metric, f.margin) if f.margin else "0",
        amount(f.metric, f.detectable),
    )


# --- files ------------------------------------------------------------------------------------------------------------


def write(out: Path, check: Check, page: str, ids: tuple[str, str]) -> list[Path]:
    """Write all files of a check into a folder, each whole or not at all; return them.

    Raises:
        RunError: one cannot be written.
    """
    contents = {
        JSON: json.dumps(as_json(check, ids), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        JUNIT: junit(check),
        MARKDOWN: markdown(check),
        PAGE: page,
    }
    return [write_file(out / name, text) for name, text in contents.items()]


def write_file(path: Path, text: str) -> Path:
    """Write one file, whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise RunError(f"{place(path)}: cannot be written ({reason(error)})") from error
    return path


def as_json(check: Check, ids: tuple[str, str] = ("", "")) -> dict[str, Any]:
    """Return the content of ``check.json``; what is undefined is null."""
    rules = check.rules
    return {
        "schema_version": 1,
        "passed": check.passed,
        "sentence": check.sentence,
        "candidate": {"name": check.candidate, "id": ids[0] or None, "seeds": list(check.seeds[0])},
        "baseline": {"name": check.baseline, "id": ids[1] or None, "seeds": list(check.seeds[1])},
        "track": check.track,
        "protocol": check.protocol,
        "protocol_hash": check.protocol_hash,
        "subjects": list(check.subjects),
        "n_images": check.n_images,
        "rules": {name: getattr(rules, name) for name in ("alpha", "power", "n_resamples", "n_permutations", "seed")},
        "findings": [{k: _plain(v) for k, v in asdict(f).items()} for f in check.findings],
        "worse": [
            {
                "subject": w.subject,
                "image_id": w.image_id,
                "drop": w.drop,
                "values": {key: {"baseline": b, "candidate": c} for key, (b, c) in w.values.items()},
            }
            for w in check.worse
        ],
        "notes": list(check.notes),
    }


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def junit(check: Check) -> str:
    """Return JUnit XML: one test case a metric; a blocking regression is a failure."""
    failures = check.of("regressed", "blocking")
    counts = {"tests": str(len(check.findings)), "failures": str(len(failures)), "errors": "0", "skipped": "0"}
    root = ET.Element("testsuites", {"name": "benchmark.check", **counts})
    suite = ET.SubElement(root, "testsuite", {"name": _xml(f"{check.candidate} against {check.baseline}"), **counts})
    properties = ET.SubElement(suite, "properties")
    for name, value in (("protocol", check.protocol), ("protocol_hash", check.protocol_hash), ("track", check.track)):
        if value:
            ET.SubElement(properties, "property", {"name": name, "value": _xml(value)})
    for f in check.findings:
        case = ET.SubElement(suite, "testcase", {"classname": f"gate.{f.role}", "name": f.metric, "time": "0"})
        line = _xml(_told(f))
        if f in failures:
            failure = ET.SubElement(case, "failure", {"type": "regression", "message": line})
            failure.text = line
        else:
            ET.SubElement(case, "system-out").text = line
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _told(f: Finding) -> str:
    if f.undefined:
        return f"{f.metric} {f.verdict}: no value on {f.undefined} images where the baseline has one"
    return (
        f"{f.metric} {f.verdict}: {format_value(f.metric, f.baseline)} -> {format_value(f.metric, f.candidate)} "
        f"({signed(f.metric, f.difference)}, {_interval(f)}, q {_q(f)}, margin {amount(f.metric, f.margin)}, "
        f"detects {amount(f.metric, f.detectable)})"
    )


def _xml(text: str) -> str:
    """Return text without the control characters that XML cannot hold."""
    return one_line(text, 2000)


def markdown(check: Check) -> str:
    """Return the result as a comment on a pull request: the verdict, a table, the rest folded away."""
    sure = f"{100 - 200 * check.rules.alpha:g} %"
    lines = [
        f"### {'✅' if check.passed else '❌'} {escape_markdown(check.sentence)}",
        "",
        f"candidate {_name(check.candidate)} against baseline {_name(check.baseline)}  ",
        escape_markdown(heading(check)),
        "",
        f"| metric | baseline | candidate | difference | {sure} interval | q | margin | detects | |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|:--|",
    ]
    for f in check.findings:
        name = f"{escape_markdown(f.metric)} {CARDS[f.metric].arrow}" + (" (advisory)" if f.role == "advisory" else "")
        cells = [name, *_cells(f), _MARKS[f.verdict]]
        lines.append("| " + " | ".join(f"**{c}**" if f.verdict == "regressed" and c else c for c in cells) + " |")
    if check.worse:
        shown = ", ".join(f"{escape_markdown(one_line(w.image_id, 40))} (subject {w.subject})" for w in check.worse[:5])
        lines += ["", f"Images that lost most: {shown}. `{PAGE}` shows them."]
    lines += ["", "<details><summary>How to read this</summary>", ""]
    lines += [f"- {escape_markdown(one_line(line, 1000))}" for line in footnotes(check, slot_notes(check.protocol))]
    lines += ["", "</details>"]
    text = "\n".join(lines) + "\n"
    assert len(text) <= COMMENT_LIMIT, "names, rows and notes are all cut"
    return text


def _name(name: str) -> str:
    return escape_markdown(one_line(name, _NAME))


def as_text(check: Check, width: int = PLAIN_WIDTH) -> str:
    """Return the terminal's table as plain text."""
    buffer = io.StringIO()
    print_check(check, Console(file=buffer, width=width, highlight=False))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
