"""A submission's stages as text: one table, a table that redraws itself on a terminal, or a line a change in a log."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from benchmark.progress import clock_time

if TYPE_CHECKING:
    from benchmark.launch.control import Row, Status

_MANY = 60  # rows; where there are more, a state shows
_FEW = 15  # of them, unless all are asked for
_METRICS = 3


def headline(status: Status) -> str:
    """Return ``clusters-20261123-191500: 48 stages: 3 running, 45 done``."""
    counts = ", ".join(f"{count:,} {state}" for state, count in status.counts.items())
    name = status.submission.id or f"{status.name} (not submitted; what lies in the store)"
    stages = "1 stage" if len(status.rows) == 1 else f"{len(status.rows):,} stages"
    return f"{name}: {stages}: {counts}"


def table(status: Status, every: bool = False) -> list[str]:
    """Return the lines of ``status``: head, rows by state, what failed and what to type; all rows with ``every``."""
    lines = [headline(status), *(f"note: {note}" for note in status.notes)]
    every = every or len(status.rows) <= _MANY
    shown, hidden = _choose(status, None if every else _FEW)
    lines += _columns(shown)
    lines += [f"  {'':<11}  and {count:,} more {state}; --all shows them" for state, count in hidden]
    return [*lines, *_troubles(status, every), *_next(status)]


def _choose(status: Status, limit: int | None) -> tuple[list[Row], list[tuple[str, int]]]:
    shown: list[Row] = []
    hidden: list[tuple[str, int]] = []
    for state in status.counts:
        rows = [row for row in status.rows if row.state == state]
        kept = rows if limit is None or len(rows) <= limit + 1 else rows[:limit]
        shown += kept
        if len(rows) > len(kept):
            hidden.append((state, len(rows) - len(kept)))
    return shown, hidden


def _columns(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    cells = [
        (
            row.state,
            row.stage.title,
            row.stage.job + ("*" if row.stage.shared and row.stage.job else ""),
            row.node,
            "" if row.seconds is None else clock_time(row.seconds),
            _detail(row),
        )
        for row in rows
    ]
    widths = [max(len(cell[column]) for cell in cells) for column in range(5)]
    widths[0] = max(widths[0], 11)
    lines = []
    for cell in cells:
        padded = [
            text.rjust(width) if column == 4 else text.ljust(width)
            for column, (text, width) in enumerate(zip(cell[:5], widths, strict=True))
            if width
        ]
        lines.append(("  " + "  ".join([*padded, cell[5]])).rstrip())
    if any(row.stage.shared and row.stage.job for row in rows):
        lines.append("  * the job of another submission, which was there first")
    return lines


def _detail(row: Row) -> str:
    parts = [row.error or row.reason or _progress(row)]
    if row.restarts:
        parts.append("started again" if row.restarts == 1 else f"started again {row.restarts} times")
    return "; ".join(part for part in parts if part)


def _progress(row: Row) -> str:
    """``step 400/800, train/loss 0.123``."""
    values = dict(row.progress)
    if "step" not in values:
        return ""
    step, steps = values.pop("step"), values.pop("steps", None)
    values.pop("time", None)
    metrics = [f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, int | float)]
    return ", ".join([f"step {step}" + (f"/{steps}" if steps else ""), *metrics[:_METRICS]])


def _troubles(status: Status, every: bool) -> list[str]:
    bad = [row for row in status.rows if row.retry]
    lines: list[str] = []
    for row in bad if every else bad[:_FEW]:
        lines += ["", f"{row.stage.title} failed: {row.error}" if row.error else f"{row.stage.title}: {row.reason}"]
        held = sum(row.stage.title in other.blocked_by for other in status.rows)
        if held:
            lines.append(f"  holds up  {held:,} stage{'s' * (held > 1)}")
        if row.traceback:
            lines.append(f"  trace     {row.traceback}")
        if row.stage.stderr and os.path.exists(row.stage.stderr):
            lines.append(f"  log       {row.stage.stderr}")
        lines.append(f"  retry it  {row.retry}")
    if len(bad) > _FEW and not every:
        lines += ["", f"and {len(bad) - _FEW:,} more; --all shows them"]
    return lines


def _next(status: Status) -> list[str]:
    submitted = bool(status.submission.id)
    if status.complete:
        return (
            ["", f"all done; its tables: {status.submission.command}"] if submitted else ["", "all of these are done"]
        )
    if not submitted:
        return [
            "",
            f"what a sweep still lacks: python -m benchmark.sweep {status.name} --dry-run, with its other options",
        ]
    if not status.ended:
        lines = [f"watch it: {status.command('status', '--wait')}", f"stop it: {status.command('cancel')}"]
    else:
        lines = [f"complete it: {status.command('retry')}"]
    return ["", *lines]


class Lines:
    """Prints what changed since it looked last, a line a stage; for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._before: dict[str, tuple[str, int]] | None = None
        self._notes: tuple[str, ...] = ()

    def update(self, status: Status) -> None:
        """Print what is new."""
        lines: list[str] = []
        if self._before is None:
            lines.append(headline(status))
            self._before = {row.stage.fingerprint: ("queued", 0) for row in status.rows}
            self._before |= {
                row.stage.fingerprint: ("done", row.restarts) for row in status.rows if row.state == "done"
            }
        if status.notes != self._notes:
            self._notes = status.notes
            lines += [f"note: {note}" for note in status.notes]
        done = sum(row.state == "done" for row in status.rows)
        for row in status.rows:
            now = (row.state, row.restarts)
            if now != self._before[row.stage.fingerprint]:
                self._before[row.stage.fingerprint] = now
                lines.append(f"[{done}/{len(status.rows)}] {row.stage.title}: {_change(row)}")
        if lines:
            print("\n".join(lines), file=self._stream, flush=True)

    def close(self) -> None:
        """Do nothing."""


def _change(row: Row) -> str:
    if row.state == "done":
        return f"done in {clock_time(row.seconds)}" if row.seconds is not None else "done"
    if row.state == "running":
        where = f" on {row.node}" if row.node else ""
        return f"running{where} (job {row.stage.job})" + ("; started again" if row.restarts else "")
    detail = row.error or row.reason
    return f"{row.state}: {detail}" if detail else row.state


class LiveTable:
    """Draws the table over itself, cut to the terminal's size; the last state stays."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._height = 0

    def update(self, status: Status) -> None:
        """Draw the table anew."""
        size = shutil.get_terminal_size()
        shown, hidden = _choose(status, None)
        room = max(1, size.lines - 4 - len(status.notes))
        lines = [headline(status), *(f"note: {note}" for note in status.notes), *_columns(shown[:room])]
        left = len(shown) - room + sum(count for _, count in hidden)
        if left > 0:
            lines.append(f"  and {left:,} more")
        lines.append("Ctrl-C ends the looking, not the jobs")
        # To where the last drawing began, and all below it is cleared; a line never wraps.
        up = f"\x1b[{self._height}F" if self._height else ""
        text = "\n".join(line[: max(1, size.columns - 1)] for line in lines)
        self._stream.write(f"{up}\x1b[J{text}\n")
        self._stream.flush()
        self._height = len(lines)

    def close(self) -> None:
        """Leave the last drawing, but for its last line, which is no longer true."""
        if self._height:
            self._stream.write("\x1b[1F\x1b[J")
            self._stream.flush()
            self._height = 0
