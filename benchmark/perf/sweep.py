"""Entry ``sweep``: the points of the cluster sweep together, against runs of one point each.

A sweep computes what its points share (data, targets, encoder, predicted responses) once. The single runs are typed as
somebody types them who has no sweep: each into a folder of its own, where nothing is known. Both have to come to the
same scores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmark.config import SMALLEST
from benchmark.perf.entries import Job, Part, Results
from benchmark.perf.typed import typed
from benchmark.sweeps import load_sweep
from leaderboard.results import read_results
from leaderboard.schema import Row


def points(job: Job) -> list[int]:
    """Return the numbers of clusters that are run."""
    axis = load_sweep("clusters").axis
    return list(axis.quick[:2] if job.quick else axis.values)


def options(job: Job, out: Path) -> list[str]:
    """Return what either side is told: a quick run, as small as one can be where only the results are looked at."""
    chosen = ["--quick", f"--out={out}", f"--threads={job.threads}", f"--device={job.device}"]
    chosen += ["--tracker=none", "--no-progress"]
    return chosen + ([f"--set={key}={value}" for key, value in SMALLEST.items()] if job.quick else [])


def arguments(job: Job, out: Path) -> list[str]:
    """Return what is typed for the sweep."""
    return ["benchmark.sweep", "clusters", f"--only={','.join(map(str, points(job)))}", *options(job, out)]


def _scores(rows: Sequence[Row]) -> np.ndarray:
    """Means of every metric, in the order of the rows: rows x metrics."""
    return np.array([[interval.mean for interval in row.metrics.values()] for row in rows])


def _rows(out: Path) -> dict[str, Row]:
    return {found.row.variant: found.row for found in read_results(out) if found.row.kind == "method"}


def ours(_: None, job: Job) -> Results:
    """All points in one sweep."""
    with tempfile.TemporaryDirectory() as folder:
        typed(*arguments(job, Path(folder)))
        rows = _rows(Path(folder))
    return {"scores": _scores([rows[f"clusters={point}"] for point in points(job)])}


def reference(_: None, job: Job) -> Results:
    """Each point by itself, in turn."""
    rows = []
    for point in points(job):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            typed("benchmark.run", *options(job, out), f"--set=clustering.n_clusters={point}")
            rows.append(_rows(out)["seed=0"])
    return {"scores": _scores(rows)}


PARTS: tuple[Part, ...] = (Part("seven points", lambda job: None, ours, reference, starts_processes=True),)
TOLERANCES: Mapping[str, float] = {"scores": 1e-6}
