"""Runs both sides of an entry in turn, each time in a process of its own, and compares times, memory and values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmark.errors import RunError
from benchmark.perf.entries import Entry, Floor, Goal, Job, Side
from benchmark.perf.machine import Machine
from benchmark.perf.worker import MACHINE, REPORT, RESULTS
from benchmark.progress import Progress

# Numerical libraries read these once, when they are imported.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Spent:
    """What one side needed for one part, or for the whole entry: medians over the runs.

    Attributes:
        wall_s: seconds on the clock.
        cpu_s: seconds of all threads together.
        peak_bytes: high-water mark of resident memory (on a GPU: of its allocated memory) above the process's memory
            before the first input was made; the inputs count.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: float


@dataclass(frozen=True)
class Row:
    """One line of an entry's table.

    Attributes:
        part: name of the part, or "total".
        reference: None where there is none.
        floor_s: seconds that the machine needs at least, by its measured rates; None where that was not counted.
        whole: how many times the paper's training does this; None where it is not a piece of one.
    """

    part: str
    ours: Spent
    reference: Spent | None
    floor_s: float | None
    whole: float | None = None

    @property
    def whole_hours(self) -> float | None:
        """Hours of the paper's whole training at our rate."""
        return None if self.whole is None else self.whole * self.ours.wall_s / 3600

    @property
    def faster(self) -> float | None:
        """How many times as long the reference takes."""
        return None if self.reference is None else self.reference.wall_s / self.ours.wall_s

    @property
    def smaller(self) -> float | None:
        """How many times as much memory the reference takes."""
        return None if self.reference is None else self.reference.peak_bytes / max(self.ours.peak_bytes, 1.0)

    @property
    def of_limit(self) -> float | None:
        """Share of the machine's speed that ours reaches, at most 1 where the floor is right."""
        return None if self.floor_s is None else self.floor_s / self.ours.wall_s


@dataclass(frozen=True)
class Verdict:
    """A goal, and what came out of it: ``wanted`` and ``found`` are ratios, or seconds of the slowest of its parts."""

    what: str
    wanted: float
    found: float
    reached: bool


@dataclass(frozen=True)
class Check:
    """One result of both sides: the largest difference found, and what is allowed. No number: they differ in kind."""

    name: str
    difference: float | None
    tolerance: float

    @property
    def same(self) -> bool:
        """Whether both sides gave the same."""
        return self.difference is not None and self.difference <= self.tolerance


@dataclass(frozen=True)
class Measured:
    """What came out of one entry.

    Attributes:
        total: times are sums over the parts, memory is the largest part's.
        runs: how often each side ran.
    """

    entry: Entry
    machine: Machine
    quick: bool
    runs: int
    parts: tuple[Row, ...]
    total: Row
    checks: tuple[Check, ...]

    @property
    def goal(self) -> Goal:
        """What was to be reached on this device."""
        return self.entry.goals[self.machine.device]

    @property
    def same(self) -> bool:
        """Whether both sides gave the same values."""
        return all(check.same for check in self.checks)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The goals and whether they were reached."""
        goal, total = self.goal, self.total
        found = [
            Verdict(what, wanted, value, value >= wanted)
            for what, wanted, value in (("faster", goal.faster, total.faster), ("smaller", goal.smaller, total.smaller))
            if wanted is not None and value is not None
        ]
        for parts, limit in goal.seconds.items():
            slowest = max(row.ours.wall_s for row in self.parts if row.part.endswith(parts))
            found.append(Verdict(parts, limit, slowest, slowest <= limit))
        return tuple(found)

    def record(self) -> dict[str, Any]:
        """Return everything as JSON-able data."""

        def row(row: Row) -> dict[str, Any]:
            return {
                "part": row.part,
                "ours": vars(row.ours),
                "reference": None if row.reference is None else vars(row.reference),
                "faster": row.faster,
                "smaller": row.smaller,
                "floor_s": row.floor_s,
                "of_limit": row.of_limit,
                "whole_hours": row.whole_hours,
            }

        return {
            "entry": self.entry.name,
            "ours": self.entry.ours,
            "reference": self.entry.reference,
            "quick": self.quick,
            "runs": self.runs,
            "parts": [row(part) for part in self.parts],
            "total": row(self.total),
            "same": self.same,
            "checks": [{**vars(check), "same": check.same} for check in self.checks],
            "goal": vars(self.goal),
            "reached": {verdict.what: verdict.reached for verdict in self.verdicts},
        }


def measure_machine(job: Job) -> Machine:
    """Measure what this machine can do, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return Machine(**_worker(MACHINE, MACHINE, "ours", job, Path(folder)))


def measure(entry: Entry, job: Job, machine: Machine, *, runs: int, progress: Progress) -> Measured:
    """Run the sides of ``entry`` ``runs`` times, in turn, and compare them.

    Raises:
        RunError: a side failed or was killed; the message has its last words.
    """
    sides = entry.sides
    reports: dict[Side, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as scratch, progress.bar(entry.name, total=len(sides) * runs) as bar:
        folders = {side: Path(scratch, side) for side in sides}
        for folder in folders.values():
            folder.mkdir()
        for run in range(runs):
            # Which side goes first changes, so that a machine that warms up or slows down favours neither.
            for side in sides if run % 2 == 0 else reversed(sides):
                report = _worker(entry.name, entry.module, side, job, folders[side])
                reports[side].append(report)
                bar.advance(text=f"{side} {sum(part['wall_s'] for part in report['parts']):.1f} s")
        checks: tuple[Check, ...] = ()
        if "reference" in folders:
            checks = _compare(folders["ours"] / RESULTS, folders["reference"] / RESULTS, report["tolerances"])

    def spent(parts: slice) -> dict[Side, Spent]:
        return {side: _spent([one["parts"][parts] for one in reports[side]]) for side in sides}

    rows = []
    for k, part in enumerate(report["parts"]):
        took = spent(slice(k, k + 1))
        floor = None if part["floor"] is None else Floor(**part["floor"]).seconds(machine.matmul, machine.copy)
        rows.append(Row(part["part"], took["ours"], took.get("reference"), floor, part["whole"]))
    floors = [row.floor_s for row in rows]
    took = spent(slice(None))
    least = None if None in floors else sum(floor for floor in floors if floor is not None)
    total = Row("total", took["ours"], took.get("reference"), least)
    return Measured(entry, machine, job.quick, runs, tuple(rows), total, checks)


def _spent(reports: Sequence[Sequence[Mapping[str, Any]]]) -> Spent:
    """Medians over the runs of some parts taken together."""
    return Spent(
        wall_s=median(sum(part["wall_s"] for part in report) for report in reports),
        cpu_s=median(sum(part["cpu_s"] for part in report) for report in reports),
        peak_bytes=median(max(part["peak_bytes"] for part in report) for report in reports),
    )


def _worker(name: str, what: str, side: Side, job: Job, folder: Path) -> Any:
    command = [sys.executable, "-m", "benchmark.perf.worker", what, side, str(folder)]
    command += ["--device", job.device, "--threads", str(job.threads), *(["--quick"] if job.quick else [])]
    environment = os.environ | dict.fromkeys(_THREADS, str(job.threads))
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        what = f"entry '{name}', {side}"
        if done.returncode < 0:
            raise RunError(
                f"{what}: its process was killed (signal {-done.returncode}); if memory ran out, use a larger machine"
            )
        words = done.stderr.strip().splitlines() or ["it said nothing"]
        raise RunError(f"{what}: its process failed: {words[-1]}")
    return json.loads((folder / REPORT).read_text())


def _compare(ours: Path, reference: Path, tolerances: Mapping[str, float]) -> tuple[Check, ...]:
    import numpy as np

    checks = []
    with np.load(ours, allow_pickle=False) as a, np.load(reference, allow_pickle=False) as b:
        if names := set(a.files) ^ set(tolerances) | set(b.files) ^ set(tolerances):
            raise RunError(f"results that not both sides gave, or without a tolerance: {', '.join(sorted(names))}")
        for name, tolerance in tolerances.items():
            x, y = a[name], b[name]
            if x.shape != y.shape or not np.array_equal(np.isnan(x), np.isnan(y)):
                checks.append(Check(name, None, tolerance))
                continue
            difference = np.abs(x.astype(np.float64) - y.astype(np.float64))
            checks.append(Check(name, float(np.nanmax(difference, initial=0.0)), tolerance))
    return tuple(checks)
