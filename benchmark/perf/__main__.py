"""``python -m benchmark.perf``: this project's code beside what a user would run instead, in time and memory."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

from benchmark.cli import Parser, main_guard, positive
from benchmark.errors import RunError, UserError, did_you_mean
from benchmark.perf.entries import ENTRIES, Entry, Goal, Job
from benchmark.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmark.perf.harness import Measured, Row, Spent


def build_parser() -> Parser:
    """Return the command line's parser; it imports nothing heavy."""
    parser = Parser(
        prog="python -m benchmark.perf",
        description="Measure this project's code beside what a user would run instead: both in processes of their own, "
        "in turn, several times, with the same inputs and the same results; or by itself, where a time is the goal. "
        "Exit code 1 where results differ.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="entries to measure (default: all; see --list)")
    parser.add_argument("--list", action="store_true", help="print the entries and their goals, measure nothing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: %(default)s)")
    parser.add_argument("--runs", type=positive, default=3, metavar="N", help="of each side (default: %(default)s)")
    parser.add_argument(
        "--threads", type=positive, default=_cores(), metavar="N", help="of both sides (default: this machine's cores)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small inputs, one run: checks the results, its times mean nothing"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    return parser


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = build_parser().parse_args(argv)
    chosen = [_entry(name) for name in dict.fromkeys(args.names)] or list(ENTRIES.values())
    if args.list:
        print("\n\n".join(_described(entry) for entry in chosen))
        return 0
    for entry in chosen:
        if args.device not in entry.goals:
            raise UserError(f"entry '{entry.name}' is measured on {', '.join(entry.goals)} only, not on {args.device}")

    from benchmark.manifest import surroundings
    from benchmark.perf.harness import measure, measure_machine

    job = Job(args.quick, args.device, args.threads)
    machine = measure_machine(job)
    found = []
    for entry in chosen:
        one = measure(entry, job, machine, runs=1 if args.quick else args.runs, progress=Progress())
        found.append(one)
        if not args.json:
            print(("\n" if len(found) > 1 else "") + table(one))
    if args.json:
        document = {
            "machine": vars(machine),
            "surroundings": surroundings(),
            "entries": [one.record() for one in found],
        }
        print(json.dumps(document, indent=2))
    wrong = [f"{one.entry.name} ({check.name})" for one in found for check in one.checks if not check.same]
    if wrong:
        raise RunError(f"the two sides differ: {', '.join(wrong)}")
    return 0


def _entry(name: str) -> Entry:
    if name not in ENTRIES:
        hint = did_you_mean(name, ENTRIES) or f"; there are {', '.join(ENTRIES)}"
        raise UserError(f"no entry '{name}'{hint}")
    return ENTRIES[name]


def _described(entry: Entry) -> str:
    goals = "; ".join(f"{device}: {_wanted(goal)}" for device, goal in entry.goals.items())
    reference = entry.reference or "none"
    return f"{entry.name}\n  ours:       {entry.ours}\n  reference:  {reference}\n  goal:       {goals}"


def _wanted(goal: Goal) -> str:
    wanted = ((goal.faster, "times faster"), (goal.smaller, "times less memory"))
    ratios = [f"{value:.3g} {what}" for value, what in wanted if value is not None]
    limits = [f"{parts} under {limit:g} s" for parts, limit in goal.seconds.items()]
    return ", ".join([*ratios, *limits]) or "none"


def table(found: Measured) -> str:
    """Return what was measured as lines for people."""
    machine = found.machine
    header = ("", "ours", "reference", "faster", "CPU time", "memory", "smaller", "of limit")
    lines = [header, *map(_cells, (*found.parts, found.total))]
    used = [column for column in range(len(header)) if column == 0 or any(line[column] for line in lines[1:])]
    lines = [tuple(line[column] for column in used) for line in lines]
    widths = [max(len(line[k]) for line in lines) for k in range(len(used))]
    against = [] if found.entry.reference is None else [f"  against {found.entry.reference}"]
    text = [
        f"{found.entry.name}: {found.entry.ours}",
        *against,
        f"  {machine.device}, {machine.threads} threads; median of {found.runs}; this machine's limit: "
        f"{machine.matmul / 1e9:.0f} GFLOP/s float32, {machine.copy / 1e9:.1f} GB/s",
        "",
        *("  " + "  ".join(_aligned(line, widths)).rstrip() for line in lines),
        "",
    ]
    for check in found.checks:
        what = "no match in shape, or in what is undefined" if check.difference is None else f"{check.difference:.1e}"
        told = "" if check.same else "  <- the sides differ"
        text.append(f"  {check.name}: largest difference {what}, allowed {check.tolerance:g}{told}")
    if found.quick:
        return "\n".join([*text, "  a quick run: its times and memory mean nothing"])
    for row in found.parts:
        if row.whole_hours is not None:
            text.append(f"  {row.part}: the paper's whole training at this rate: {row.whole_hours:,.1f} hours")
    for verdict in found.verdicts:
        reached = "reached" if verdict.reached else "missed"
        if verdict.what in found.goal.seconds:
            text.append(f"  goal: {verdict.what} under {verdict.wanted:g} s: {verdict.found:.2f} s, {reached}")
        else:
            text.append(f"  goal: {verdict.wanted:.3g} times {verdict.what}: {verdict.found:.1f}, {reached}")
    return "\n".join(text)


def _cells(row: Row) -> tuple[str, ...]:
    """A row's cells; what was not measured is empty."""

    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.1f} x"

    def both(form: Callable[[Spent], str], unit: str) -> str:
        sides = (row.ours, row.reference)
        return " / ".join(form(side) for side in sides if side is not None) + f" {unit}"

    return (
        row.part,
        f"{row.ours.wall_s:.2f} s",
        "" if row.reference is None else f"{row.reference.wall_s:.2f} s",
        ratio(row.faster),
        both(lambda side: f"{side.cpu_s:.1f}", "s"),
        both(lambda side: f"{side.peak_bytes / 2**30:.2f}", "GiB"),
        ratio(row.smaller),
        "" if row.of_limit is None else f"{100 * row.of_limit:.0f} %",
    )


def _aligned(line: tuple[str, ...], widths: list[int]) -> list[str]:
    return [
        cell.ljust(width) if k == 0 else cell.rjust(width)
        for k, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]


if __name__ == "__main__":
    sys.exit(main_guard(main))
