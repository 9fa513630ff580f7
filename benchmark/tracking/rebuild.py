"""Make the runs of a store again in W&B or TensorBoard, from the store alone.

A stage's run is made of its settings, manifest, status, ``metrics.jsonl`` and results, and takes the place of what the
service had of it: to do it twice changes nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from benchmark.errors import UserError
from benchmark.store import CONFIG, DONE, MANIFEST, STATUS, TRACKING, read_json
from benchmark.tracking import Tracker, open_service
from benchmark.tracking.base import Status, in_place_of
from benchmark.tracking.findings import describe, report
from benchmark.tracking.jsonl import FILE_NAME

if TYPE_CHECKING:
    from benchmark.report.answers import Answer

NEVER_KEPT = "when a run started and how long it took (its summary says how long), and system metrics over time"
"""Of W&B's runs."""


@dataclass(frozen=True)
class StageRecord:
    """A stage that was started once, as it lies in the store; ``lacks`` says what of its run cannot be made again."""

    folder: Path
    record: Mapping[str, Any]
    manifest: Mapping[str, Any]
    status: Mapping[str, Any]
    sweep: str
    lacks: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Name and label, for people."""
        label = self.record["label"]
        return f"{self.record['name']} [{label}]" if label else str(self.record["name"])

    @property
    def ended(self) -> Status:
        """How it ended; what was killed counts as interrupted."""
        if (self.folder / DONE).is_file():
            return "done"
        return "failed" if self.status.get("state") == "failed" else "interrupted"


@dataclass
class Store:
    """What :func:`read_store` found: stages, in the order in which they were started, and what cannot be read."""

    stages: list[StageRecord] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)


def read_store(out: Path) -> Store:
    """Read what a run's folder holds.

    Raises:
        UserError: there is no store.
    """
    root = out / "store"
    if not root.is_dir():
        raise UserError(f"{out}: holds no store; name the --out folder of a run, e.g. --out runs")
    found = Store(answers=_answers(out))
    sweeps = _sweeps(root, found.answers)
    for config in sorted(root.glob(f"*/*/{CONFIG}")):
        folder = config.parent
        if "." in folder.name:
            continue  # what a forced stage computes beside its result, or has replaced
        try:
            found.stages.append(_read(folder, sweeps))
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            found.unreadable.append(f"{folder}: {_first_line(error)}")
    found.stages.sort(key=lambda one: str(one.status.get("started", "")))
    return found


def rebuild(stage: StageRecord, kind: str, mode: str | None = None) -> None:
    """Make the run of one stage again.

    Args:
        stage: of the store.
        kind: ``wandb`` or ``tensorboard``.
        mode: W&B's mode.

    Raises:
        OSError, ValueError, UserError: something in the stage's folder cannot be read.
    """
    with in_place_of(stage.folder / TRACKING / kind):
        about = describe(stage.record, stage.manifest, stage.sweep)
        tracker = open_service(kind, stage.folder / TRACKING, mode=mode, replace=True, **about)
        try:
            _tell(tracker, stage)
        finally:
            tracker.finish(stage.ended)


def rebuild_all(
    found: Store, out: Path, kind: str, mode: str | None, told: Callable[[str, str], None] = lambda title, error: None
) -> int:
    """Make all runs again; return how many failed.

    Args:
        found: what to make.
        out: folder of the run.
        kind, mode: as of :func:`rebuild`.
        told: is told of each run by its title, and what went wrong with it or nothing.
    """
    from benchmark.tracking.board import track_board

    failed = 0
    actions: list[tuple[str, Callable[[], object]]] = [
        (stage.title, partial(rebuild, stage, kind, mode)) for stage in found.stages
    ]
    actions += [
        (f"leaderboard [{answer.sweep}]", partial(track_board, out, answer, kind, mode, replace=True))
        for answer in found.answers
    ]
    for title, action in actions:
        error = ""
        try:
            action()
        except (OSError, ValueError, KeyError, UserError) as trouble:
            error, failed = _first_line(trouble), failed + 1
        told(title, error)
    return failed


def curves(folder: Path) -> Iterator[tuple[int, float, dict[str, float]]]:
    """Yield step, time and metrics of a stage, in the order of the steps; of a step that was repeated, the last."""
    steps: dict[int, tuple[float, dict[str, float]]] = {}
    for line in _lines(folder):
        if isinstance(step := line.get("step"), int):
            metrics = {
                name: math.nan if value is None else float(value)
                for name, value in line.items()
                if name not in ("step", "time") and (value is None or isinstance(value, int | float))
            }
            steps[step] = (float(line.get("time", 0.0)), {**steps.get(step, (0.0, {}))[1], **metrics})
    for step in sorted(steps):
        yield step, *steps[step]


def _tell(tracker: Tracker, stage: StageRecord) -> None:
    for step, when, metrics in curves(stage.folder / TRACKING):
        tracker.log(metrics, step, when)
    for line in _lines(stage.folder / TRACKING):
        if isinstance(name := line.get("image"), str):
            path = (stage.folder / TRACKING / str(line.get("path"))).resolve()
            if path.is_file() and path.is_relative_to(stage.folder.resolve()):
                tracker.image(name, path)
    if stage.ended == "done":
        tracker.summary(stage.status.get("summary", {}))
    report(tracker, stage.folder)


def _read(folder: Path, sweeps: Mapping[str, str]) -> StageRecord:
    record = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    status = read_json(folder / STATUS)
    for what, value in ((CONFIG, record), (STATUS, status)):
        if not isinstance(value, dict):
            raise ValueError(f"{what} holds no settings")
    describe(record, {}, "")  # raises where something is missing
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    sweep = status.get("sweep") or sweeps.get(f"{folder.parent.name}/{folder.name}", "")
    lacks = []
    if not (folder / TRACKING / FILE_NAME).is_file():
        lacks.append("curves (it ran with --tracker none)")
    if not sweep:
        lacks.append("its sweep")
    return StageRecord(folder, record, manifest, status, sweep, tuple(lacks))


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    if not (folder / FILE_NAME).is_file():
        return
    with (folder / FILE_NAME).open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue  # half a line, of a process that was killed
            if isinstance(line, dict):
                yield line


def _answers(out: Path) -> list[Answer]:
    from benchmark.report.answers import FILE, FOLDER, Answer

    return [Answer.load(file, out) for file in sorted((out / FOLDER).glob(f"*/{FILE}"))]


def _sweeps(root: Path, answers: list[Answer]) -> dict[str, str]:
    """Return stage -> sweep, from what the sweeps' rows were made of: of stages from before these wrote it down."""
    found: dict[str, str] = {}

    def visit(key: str, sweep: str) -> None:
        if key in found or len(Path(key).parts) != 2 or ".." in Path(key).parts:
            return
        try:
            record = yaml.safe_load((root / key / CONFIG).read_text(encoding="utf-8"))
            upstream = [str(up) for up in record["upstream"].values()]
        except (OSError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            return
        found[key] = sweep
        for up in upstream:
            visit(up, sweep)

    for answer in answers:
        for row in answer.rows:
            visit("/".join(Path(row.source).parts[-2:]), answer.sweep)
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
