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
    from benchmark.perf.harness import Measured, Row


def build_parser() -> Parser:
    """Return the command line's parser; it imports nothing heavy."""
    parser = Parser(
        prog="python -m benchmark.perf",
        description="Measure this project's code beside what a user would run instead: both in processes of their own, "
        "in turn, several times, with the same inputs and the same results. Exit code 1 where results differ.",
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
    def wanted(goal: Goal) -> str:
        both = ((goal.faster, "times faster"), (goal.smaller, "times less memory"))
        return ", ".join(f"{value:g} {what}" for value, what in both if value)

    goals = "; ".join(f"{device}: {wanted(goal)}" for device, goal in entry.goals.items())
    return f"{entry.name}\n  ours:       {entry.ours}\n  reference:  {entry.reference}\n  goal:       {goals}"


def table(found: Measured) -> str:
    """Return what was measured as lines for people."""
    machine, goal, total = found.machine, found.goal, found.total
    header = ("", "ours", "reference", "faster", "CPU time", "memory", "smaller", "of limit")
    lines = [_cells(row) for row in (*found.parts, total)]
    widths = [max(len(line[k]) for line in (header, *lines)) for k in range(len(header))]
    text = [
        f"{found.entry.name}: {found.entry.ours}\n  against {found.entry.reference}",
        f"  {machine.device}, {machine.threads} threads; median of {found.runs}; this machine's limit: "
        f"{machine.matmul / 1e9:.0f} GFLOP/s float32, {machine.copy / 1e9:.1f} GB/s",
        "",
        *("  " + "  ".join(_aligned(line, widths)).rstrip() for line in (header, *lines)),
        "",
    ]
    for check in found.checks:
        what = "no match in shape, or in what is undefined" if check.difference is None else f"{check.difference:.1e}"
        verdict = "" if check.same else "  <- the sides differ"
        text.append(f"  {check.name}: largest difference {what}, allowed {check.tolerance:g}{verdict}")
    if found.quick:
        return "\n".join([*text, "  a quick run: its times and memory mean nothing"])
    for name, value, wanted in (("faster", total.faster, goal.faster), ("smaller", total.smaller, goal.smaller)):
        if wanted:
            verdict = "reached" if value >= wanted else "missed"
            text.append(f"  goal: {wanted:g} times {name}: {value:.1f}, {verdict}")
    return "\n".join(text)


def _cells(row: Row) -> tuple[str, ...]:
    def gigabytes(nbytes: float) -> str:
        return f"{nbytes / 2**30:.2f}"

    return (
        row.part,
        f"{row.ours.wall_s:.2f} s",
        f"{row.reference.wall_s:.2f} s",
        f"{row.faster:.1f} x",
        f"{row.ours.cpu_s:.1f} / {row.reference.cpu_s:.1f} s",
        f"{gigabytes(row.ours.peak_bytes)} / {gigabytes(row.reference.peak_bytes)} GiB",
        f"{row.smaller:.1f} x",
        f"{100 * row.of_limit:.0f} %",
    )


def _aligned(line: tuple[str, ...], widths: list[int]) -> list[str]:
    return [
        cell.ljust(width) if k == 0 else cell.rjust(width)
        for k, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]


if __name__ == "__main__":
    sys.exit(main_guard(main))
