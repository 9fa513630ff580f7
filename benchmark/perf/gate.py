"""Entry ``gate``: the gate and the leaderboard over 200 rows of 4 subjects, 1000 images and 11 metrics each, as typed.

``check`` compares two of the rows image by image; ``leaderboard`` ranks all of them with the uncertainty of each rank;
``history`` compares 200 checkpoints of one variant, each with the one before, and looks for changes. The times are
those of whole processes: starting, reading, computing and printing.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmark.errors import RunError
from benchmark.perf.entries import Job, Part, Results
from benchmark.perf.typed import typed
from leaderboard.results import RESULTS, write_result
from leaderboard.schema import Interval, Row
from metrics.cards import CARDS

_METHOD, _TRACK = "model", "demo"
_METRICS = ("PixCorr", "SSIM", "Alex(2)", "Alex(5)", "Incep", "CLIP", "Eff", "SwAV", "CLIP-1000", "LPIPS", "SSIM-color")
_DROP = 0.1  # of the second half of the rows, against the first half


@dataclass(frozen=True)
class _Sizes:
    rows: int
    subjects: int
    images: int


def _sizes(job: Job) -> _Sizes:
    return _Sizes(8, 2, 50) if job.quick else _Sizes(200, 4, 1000)


@dataclass(frozen=True)
class Boards:
    """Two leaderboards with the same scores: of as many variants, and of as many checkpoints of one variant."""

    folder: tempfile.TemporaryDirectory[str]  # removed with this
    ids: tuple[str, ...]
    """Of the rows that are variants."""

    @property
    def variants(self) -> Path:
        """Folder of the leaderboard whose rows are variants."""
        return Path(self.folder.name) / "variants"

    @property
    def checkpoints(self) -> Path:
        """Folder of the leaderboard whose rows are checkpoints of one variant."""
        return Path(self.folder.name) / "checkpoints"


def prepare(job: Job) -> Boards:
    """Write the rows and their scores at random: the second half is worse than the first in every metric."""
    sizes = _sizes(job)
    folder = tempfile.TemporaryDirectory()
    boards, rng = Boards(folder, ()), np.random.default_rng(0)
    difficulty = rng.standard_normal((len(_METRICS), 1, sizes.images))
    ids = []
    for number in range(sizes.rows):
        noise = rng.standard_normal((len(_METRICS), sizes.subjects, sizes.images))
        values = 0.5 + 0.1 * (difficulty + noise)
        worse = np.array([-1.0 if CARDS[key].direction == "higher" else 1.0 for key in _METRICS])[:, None, None]
        values += _DROP * worse * (number >= sizes.rows // 2)
        path = write_result(boards.variants / RESULTS, *_row(f"n={number:03d}", 0, values))
        ids.append(path.stem)
        path = write_result(boards.checkpoints / RESULTS, *_row("n=0", number, values))
        # The order of checkpoints is that of their files.
        os.utime(path.with_suffix(".parquet"), (number, number))
    return Boards(folder, tuple(ids))


def _row(variant: str, seed: int, values: np.ndarray) -> tuple[Row, pa.Table]:
    metrics, subjects, images = values.shape
    key, subject, image = (axis.ravel() for axis in np.indices(values.shape))
    count = values.size
    table = pa.table(
        {
            "track": pa.array([_TRACK]).take(np.zeros(count, int)),
            "method": pa.array([_METHOD]).take(np.zeros(count, int)),
            "variant": pa.array([variant]).take(np.zeros(count, int)),
            "subject": subject + 1,
            "seed": np.full(count, seed),
            "image_id": pa.array([str(n) for n in range(images)]).take(image),
            "metric": pa.array(_METRICS).take(key),
            "value": values.ravel(),
        }
    )
    row = Row(
        method=_METHOD,
        variant=variant,
        track=_TRACK,
        protocol="brain-it",
        protocol_hash="0" * 16,
        subjects=tuple(range(1, subjects + 1)),
        seeds=(seed,),
        n_images=images,
        metrics={name: Interval(mean=float(values[k].mean())) for k, name in enumerate(_METRICS)},
        source="benchmark.perf",
    )
    return row, table


def check(boards: Boards, job: Job) -> Results:
    """A row of the worse half against the best known: it has to fail."""
    out = Path(boards.folder.name) / "check"
    sides = ["--candidate", boards.ids[-1], "--baseline", boards.ids[0]]
    typed("benchmark.check", *sides, "--leaderboard", boards.variants, "--out", out, codes=(1,))
    found = json.loads((out / "check.json").read_text())
    verdicts = [finding["verdict"] for finding in found["findings"]]
    if verdicts != ["regressed"] * len(_METRICS):
        raise RunError(f"the candidate is worse in all {len(_METRICS)} metrics; the gate found {verdicts}")
    return {}


def leaderboard(boards: Boards, job: Job) -> Results:
    """All rows, ranked with intervals: the better half stands above the worse."""
    text = typed("leaderboard", "show", boards.variants, "--format", "csv")
    names = [cell for line in text.splitlines() for cell in line.split(",") if cell.startswith("n=")]
    rows = len(boards.ids)
    if {int(name[2:]) for name in names[: rows // 2]} != set(range(rows // 2)):
        raise RunError("the rows of the better half do not stand first")
    return {}


def history(boards: Boards, job: Job) -> Results:
    """The line of checkpoints, each against the one before: it fell once, in the middle."""
    out = Path(boards.folder.name) / "history"
    typed("benchmark.check", "--history", boards.checkpoints, "--out", out)
    (line,) = json.loads((out / "history.json").read_text())["lines"]
    changed = [change["checkpoint"] for change in line["change_points"]]
    first_worse = len(boards.ids) // 2 + 1
    if changed != [first_worse] or not line["checkpoints"][first_worse - 1]["regressed"]:
        raise RunError(f"the level falls once, at checkpoint {first_worse}; found {changed}")
    return {}


PARTS: tuple[Part, ...] = (
    Part("check", prepare, check, starts_processes=True),
    Part("leaderboard", prepare, leaderboard, starts_processes=True),
    Part("history", prepare, history, starts_processes=True),
)
TOLERANCES: Mapping[str, float] = {}
