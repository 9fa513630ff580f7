"""``--history``: the lines of a run's folder, checkpoint by checkpoint, with change points.

A line is the sequence of scored runs of one variant's name, on one track under one protocol (hash, so one set of
images), in the order in which their scores were finished: the variant as it was trained again and again, with other
settings, code or seeds, and the checkpoints that the gate scored for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmark.check.sources import scored_stages
from benchmark.errors import UserError, did_you_mean
from benchmark.imagesets.wording import one_line, place
from leaderboard.changes import FEWEST, ChangePoint, change_points
from leaderboard.gate import BLOCKING, Check, Rules, Side, check
from leaderboard.results import RESULTS, read_results
from leaderboard.statistics import Floats
from leaderboard.table import PLAIN_WIDTH
from metrics.cards import CARDS, format_value


@dataclass(frozen=True, eq=False)
class Entry:
    """One checkpoint of a line.

    Attributes:
        name: where its scores are: the stage's folder in its store, or the row's id.
        finished: when they were finished.
        table: per-image scores.
        means: metric -> mean.
        checkpoint: whether the gate scored it.
    """

    name: str
    finished: datetime
    table: pa.Table
    means: dict[str, float]
    checkpoint: bool = False


@dataclass(frozen=True)
class Line:
    """The checkpoints of one variant, the oldest first.

    Attributes:
        metrics: those that every checkpoint has.
        changes: where the level moved and stayed.
        steps: each checkpoint against the one before; one fewer than there are checkpoints. None at all where they
            cannot be compared, and ``note`` says why.
    """

    variant: str
    track: str
    protocol: str
    protocol_hash: str
    entries: tuple[Entry, ...]
    metrics: tuple[str, ...]
    changes: tuple[ChangePoint, ...]
    steps: tuple[Check, ...]
    note: str = ""

    @property
    def series(self) -> Floats:
        """Means, (checkpoints, metrics)."""
        return _series(self.entries, self.metrics)


def read_lines(paths: Sequence[Path], variant: str | None, rules: Rules) -> list[Line]:
    """Return the lines of run folders, or of folders of results.

    Args:
        paths: the folders, all read together.
        variant: only this variant's.
        rules: of the comparison of neighbours; ``alpha`` is also that of the change points.

    Raises:
        UserError: a folder holds no scores, or there is no such variant.
    """
    found: dict[tuple[str, str, str, str], dict[str, Entry]] = {}
    for path in paths:
        entries = list(_entries(path))
        if not entries:
            raise UserError(f"{place(path)}: holds no scored runs; name the --out folder of a run")
        for key, entry in entries:
            found.setdefault(key, {}).setdefault(entry.name, entry)
    names = list(dict.fromkeys(key[0] for key in found))
    if variant is not None and variant not in names:
        hint = did_you_mean(variant, names) or f"; there are {', '.join(names)}"
        raise UserError(f"--variant {one_line(variant)}: no line of that name{hint}")
    return [
        _line(key, sorted(entries.values(), key=lambda entry: (entry.finished, entry.name)), rules)
        for key, entries in sorted(found.items())
        if variant in (None, key[0])
    ]


def _entries(path: Path) -> list[tuple[tuple[str, str, str, str], Entry]]:
    found = []
    for scored in scored_stages(path):
        table, (protocol, digest) = scored.table(), scored.protocol()
        track = str(table["track"][0].as_py())
        entry = Entry(f"{scored.folder}", scored.finished, table, _means(table), scored.checkpoint)
        found += [((variant, track, protocol, digest), entry) for variant in scored.variants]
    if found or (path / "store").is_dir():
        return found
    try:
        results = read_results(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    for result in results:
        own = result.per_image()
        if own is None or result.scores is None or result.row.kind != "method":
            continue
        # Rows do not say when they were finished; their files do.
        finished = datetime.fromtimestamp(result.scores.stat().st_mtime).astimezone()
        row = result.row
        entry = Entry(str(path / RESULTS / result.id), finished, own, _means(own))
        found.append(((row.name, row.track, row.protocol, row.protocol_hash), entry))
    return found


def _means(table: pa.Table) -> dict[str, float]:
    """Mean over seeds, subjects and images; a metric that is undefined for an image is left out."""
    grouped = table.group_by("metric").aggregate([("value", "mean")])
    pairs = zip(grouped["metric"].to_pylist(), grouped["value_mean"].to_pylist(), strict=True)
    return {str(key): float(mean) for key, mean in pairs if mean is not None and np.isfinite(mean) and key in CARDS}


def _series(entries: Sequence[Entry], metrics: Sequence[str]) -> Floats:
    return np.array([[entry.means[key] for key in metrics] for entry in entries], dtype=np.float64)


def _line(key: tuple[str, str, str, str], entries: Sequence[Entry], rules: Rules) -> Line:
    variant, track, protocol, digest = key
    common = [k for k in CARDS if all(k in entry.means for entry in entries)]
    metrics = tuple(k for k in BLOCKING if k in common) or tuple(common)
    own = dataclasses.replace(rules, blocking=None, advisory={}) if set(BLOCKING) & set(metrics) else rules
    changes = change_points(_series(entries, metrics), rules.alpha, seed=rules.seed) if metrics else []
    sides = [Side(entry.name, _shared(entry.table, metrics), protocol, digest) for entry in entries]
    steps, note = [], ""
    try:
        pairs = zip(sides, sides[1:], strict=False) if metrics else ()
        steps = [check(after, before, own, list_images=False) for before, after in pairs]
    except ValueError as error:  # too few images, say: the line can be listed all the same
        note = f"checkpoints are not compared with each other: {error}"
    return Line(variant, track, protocol, digest, tuple(entries), metrics, tuple(changes), tuple(steps), note)


def _shared(table: pa.Table, metrics: Sequence[str]) -> pa.Table:
    return table.filter(pc.is_in(table["metric"].cast(pa.string()), pa.array(list(metrics))))


# --- output -----------------------------------------------------------------------------------------------------------


def print_lines(lines: Sequence[Line], rules: Rules, console: Console | None = None) -> None:
    """Print every line as a table, change points between its rows."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(file=console.file, width=PLAIN_WIDTH, highlight=False, no_color=True)
    for number, line in enumerate(lines):
        if number:
            console.print()
        n = len(line.entries)
        title = f"{one_line(line.variant, 80)}: {n} checkpoint{'' if n == 1 else 's'}"
        console.print(
            Text(f"{title}, {line.track} track, protocol {line.protocol} ({line.protocol_hash[:8]})", style="bold"),
            markup=False,
        )
        console.print(_table(line), markup=False)
        for change in line.changes:
            console.print(Text(_told(line, change), style="bold"), markup=False)
        if not line.changes:
            fewest = f"; a change shows in {FEWEST} checkpoints or more" if n < FEWEST else ""
            console.print(Text(f"no change point{fewest}", style="dim"), markup=False)
        if line.note:
            console.print(Text(one_line(line.note, 500), style="dim"), markup=False)
    console.print(
        Text(
            f"◆ change point: a level that moved and stayed, p at most {rules.alpha:g} over orders of the checkpoints; "
            "last column: each against the one before, on the same images",
            style="dim",
        ),
        markup=False,
    )


def _told(line: Line, change: ChangePoint) -> str:
    moves = sorted(
        (
            (after - before) * (1 if CARDS[key].direction == "higher" else -1),
            f"{key} {format_value(key, before)} -> {format_value(key, after)}",
        )
        for key, before, after in zip(line.metrics, change.before, change.after, strict=True)
    )
    worse = sum(gain < 0 for gain, _ in moves)
    way = "worse" if worse == len(moves) else "better" if worse == 0 else f"worse in {worse} of {len(moves)} metrics"
    at = line.entries[change.index].finished.isoformat(timespec="minutes")
    values = ", ".join(text for _, text in moves)
    return f"◆ from checkpoint {change.index + 1} ({at}) {way} (p = {change.p:.3f}): {values}"


def _table(line: Line) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("finished", no_wrap=True)
    table.add_column("scores", overflow="fold")
    for key in line.metrics:
        table.add_column(f"{key} {CARDS[key].arrow}", justify="right")
    table.add_column("change", overflow="fold")
    changed = {change.index for change in line.changes}
    for index, entry in enumerate(line.entries):
        table.add_row(
            f"{'◆ ' if index in changed else ''}{index + 1}",
            f"{entry.finished:%Y-%m-%d %H:%M}",
            one_line(Path(entry.name).name[:16]) + (" (checked)" if entry.checkpoint else ""),
            *(format_value(key, entry.means[key]) for key in line.metrics),
            _step(line.steps[index - 1]) if index and line.steps else "",
        )
    return table


def _step(step: Check) -> str:
    worse, better = len(step.of("regressed")), len(step.of("improved"))
    return ", ".join(f"{n} {word}" for n, word in ((worse, "worse"), (better, "better")) if n) or "none shown"


def as_json(lines: Sequence[Line]) -> dict[str, Any]:
    """Return the content of ``history.json``."""
    return {
        "schema_version": 1,
        "lines": [
            {
                "variant": line.variant,
                "track": line.track,
                "protocol": line.protocol,
                "protocol_hash": line.protocol_hash,
                "checkpoints": [
                    {
                        "scores": entry.name,
                        "finished": entry.finished.isoformat(timespec="seconds"),
                        "checked": entry.checkpoint,
                        "metrics": {key: entry.means[key] for key in line.metrics},
                        "regressed": [f.metric for f in line.steps[index - 1].of("regressed")]
                        if index and line.steps
                        else [],
                        "improved": [f.metric for f in line.steps[index - 1].of("improved")]
                        if index and line.steps
                        else [],
                    }
                    for index, entry in enumerate(line.entries)
                ],
                "change_points": [
                    {
                        "checkpoint": change.index + 1,
                        "p": change.p,
                        "before": dict(zip(line.metrics, change.before, strict=True)),
                        "after": dict(zip(line.metrics, change.after, strict=True)),
                    }
                    for change in line.changes
                ],
            }
            for line in lines
        ],
    }
