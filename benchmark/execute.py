"""Run one stage: lock, compute, record, seal."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast

import psutil

from benchmark import manifest
from benchmark.context import StageContext
from benchmark.errors import RunError, UserError
from benchmark.graph import Stage
from benchmark.progress import Progress
from benchmark.store import (
    CHECKPOINTS,
    CONFIG,
    DONE,
    MANIFEST,
    STATUS,
    TRACEBACK,
    TRACKING,
    Attempt,
    Store,
    now,
    read_json,
    write_json,
    write_text,
    write_yaml,
)
from benchmark.tracking.base import Artifact, Table

_MEMORY_SAMPLE_S = 0.25
_CHILDREN_SAMPLE_S = 2.0  # to find them means to read all of /proc


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class RunOptions:
    """How to run, as opposed to what: nothing here enters a fingerprint or changes a result."""

    device: str = "cpu"
    threads: int = field(default_factory=_cores)
    tracker: Literal["wandb", "tensorboard", "jsonl", "none"] = "none"
    tracker_mode: str | None = None  # W&B's own: "online", "offline"; None leaves it to W&B
    group: str = ""  # the sweep, for the tracker
    progress: bool = True
    checkpoint_seconds: float = 60.0
    force: bool = False
    position: str = ""  # "[7/48]", shown before the stage's name
    command: str = ""  # the command that a person typed; this process's own where empty
    processes: int = 1  # that train together, for stages that ask for several GPUs
    data: str = ""  # folder of the NSD tree that --data names


@dataclass(frozen=True)
class Outcome:
    """How one stage of a plan ended.

    ``state`` is ``done`` (computed now), ``cached`` (was there), ``failed``, or ``blocked`` (not tried: ``error``
    says why).
    """

    stage: Stage
    state: Literal["done", "cached", "failed", "blocked"]
    seconds: float = 0.0
    summary: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


def execute(
    stage: Stage,
    store: Store,
    options: RunOptions | None = None,
    ready: Callable[[Path], None] = lambda folder: None,
) -> Outcome:
    """Compute one stage whose upstream stages are done, or find that another process has.

    ``ready`` is told the stage's folder just before its function runs.

    The status keeps wall-clock and CPU seconds (of all attempts that add up to the result) and the peak resident
    memory of this process and its children, sampled four times a second while the stage runs: what the process holds
    from before counts, and a peak shorter than the interval may be missed.

    Raises:
        UserError: the stage found its input wrong, or the store cannot be written; nothing half-written stays.
        RunError: the stage failed, or an upstream stage has no result. The full trace is in the stage's folder.
        KeyboardInterrupt, SystemExit: interrupted (SIGTERM arrives as ``SystemExit(143)``); checkpoints are kept.
    """
    options = options or RunOptions()
    prefix = " ".join(part for part in (options.position, stage.name, stage.label) if part)
    progress = Progress(prefix, enabled=options.progress)

    def waits(holder: str) -> None:
        progress.message(f"waits for {holder}, which computes it")

    with exit_on_sigterm(), store.lock(stage, on_wait=waits):
        store.recover(stage)
        if not options.force and store.is_done(stage):
            return Outcome(stage, "cached", summary=store.status(stage).get("summary", {}))
        missing = [up.title for up in stage.upstream.values() if not store.is_done(up)]
        if missing:
            raise RunError(f"stage {stage.title} needs {', '.join(missing)}, which has no result in {store.root}")
        try:
            attempt = store.begin(stage, options.force)
            status = _Status(stage, options, attempt)
        except OSError as error:
            raise RunError(f"stage {stage.title} cannot start: {error}") from error
        return _attempt(stage, store, options, progress, attempt.folder, status, ready)


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into ``SystemExit(143)`` within the block, so that what must be put in order is."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set a handler
        return
    owner = os.getpid()

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            os._exit(128 + signum)  # a forked worker has nothing to put in order, and must not touch the folder
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def execute_beside(stage: Stage, store: Store, options: RunOptions, folder: Path, scratch: Path) -> None:
    """Run a stage's function beside the process that computes it; what it writes goes to ``scratch``.

    Args:
        stage: whose function.
        store: where its inputs are.
        options: as of the other process, but for the device.
        folder: of the stage, whose checkpoints are read.
        scratch: takes the outputs.
    """
    run = _load(stage.run)
    _prepare_torch(stage, options)
    progress = Progress(enabled=False)
    run(_context(stage, store, options, scratch, folder / CHECKPOINTS, _SafeTracker(None, progress), progress))


def _context(
    stage: Stage, store: Store, options: RunOptions, out: Path, checkpoints: Path, tracker: Any, progress: Progress
) -> StageContext:
    return StageContext(
        stage=stage,
        config=stage.config,
        out=out,
        inputs={role: store.folder(upstream) for role, upstream in stage.upstream.items()},
        checkpoints=checkpoints,
        tracker=tracker,
        progress=progress,
        device=options.device,
        threads=options.threads,
        checkpoint_seconds=options.checkpoint_seconds,
        data=Path(options.data) if options.data else None,
    )


def _attempt(
    stage: Stage,
    store: Store,
    options: RunOptions,
    progress: Progress,
    folder: Path,
    status: _Status,
    ready: Callable[[Path], None],
) -> Outcome:
    tracker = _SafeTracker(None, progress)
    try:
        write_yaml(folder / CONFIG, stage.record())
        with _PeakMemory(status):
            run = _load(stage.run)
            _prepare_torch(stage, options)
            write_json(folder / MANIFEST, manifest.make_manifest(stage, options.command))
            tracker = _open_tracker(stage, options, folder, progress)
            context = _context(stage, store, options, folder, folder / CHECKPOINTS, tracker, progress)
            ready(folder)
            result = run(context)
        if not isinstance(result, dict):
            raise TypeError(f"{stage.run} returned {type(result).__name__}, expected a dict of what the stage found")
        summary = cast(dict[str, Any], _plain(result))
        status.finish("done", summary=summary)
        store.seal(stage, folder)
    except UserError as error:
        with contextlib.suppress(OSError):  # a full disk, say: the error that is on its way tells more
            store.discard_outputs(folder)
            status.finish("failed", error=str(error))
        tracker.report(folder)
        tracker.finish("failed")
        raise
    except Exception as error:
        short = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
        with contextlib.suppress(OSError):
            write_text(folder / TRACEBACK, traceback.format_exc())
            status.finish("failed", error=short, traceback=TRACEBACK)
        tracker.report(folder)
        tracker.finish("failed")
        raise RunError(f"stage {stage.title} failed: {short}; full trace: {folder / TRACEBACK}") from error
    except BaseException:  # Ctrl-C, SIGTERM, a scheduler's requeue
        if not (folder / DONE).exists():
            with _undisturbed():
                status.finish("interrupted")
        tracker.finish("interrupted")
        raise
    tracker.summary(summary)
    final = store.folder(stage)
    if folder != final:
        tracker.finish("done")  # what a tracker writes must not be moved under its hands
    store.publish(stage, folder)
    if folder != final:
        tracker = _open_tracker(stage, options, final, progress)
    tracker.report(final)
    tracker.finish("done")
    return Outcome(stage, "done", status.seconds, summary)


class _Status:
    """``status.json`` of one attempt; time and peak memory of the attempts that it resumes are counted in."""

    def __init__(self, stage: Stage, options: RunOptions, attempt: Attempt) -> None:
        self._path = attempt.folder / STATUS
        self._wall, self._cpu = time.monotonic(), _cpu_seconds()
        self.peak_memory = 0
        before = attempt.previous or {}
        self._before = {
            "wall_s": before.get("wall_s") or _killed_after(attempt),
            "cpu_s": before.get("cpu_s", 0.0),
            "peak_memory_bytes": before.get("peak_memory_bytes", 0),
        }
        self._fields: dict[str, Any] = {
            "state": "running",
            "stage": stage.name,
            "label": stage.label,
            "started": now(),
            "sweep": options.group,
            "attempt": before.get("attempt", 0) + 1,
            "forced": options.force,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": options.device,
            "threads": options.threads,
        }
        write_json(self._path, self._fields)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of this attempt."""
        return time.monotonic() - self._wall

    def finish(self, state: str, **fields: Any) -> None:
        """Write how it ended."""
        self._fields |= {
            "state": state,
            "ended": now(),
            "wall_s": round(self._before["wall_s"] + self.seconds, 3),
            "cpu_s": round(self._before["cpu_s"] + _cpu_seconds() - self._cpu, 3),
            "peak_memory_bytes": max(self._before["peak_memory_bytes"], self.peak_memory),
            **fields,
        }
        write_json(self._path, self._fields)


def _killed_after(attempt: Attempt) -> float:
    """How long a killed attempt's work counts: from its start to its last checkpoint."""
    if not attempt.previous or "started" not in attempt.previous:
        return 0.0
    written = [path.stat().st_mtime for path in (attempt.folder / CHECKPOINTS).rglob("*") if path.is_file()]
    started = datetime.fromisoformat(attempt.previous["started"]).timestamp()
    return max(0.0, max(written, default=started) - started)


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class _PeakMemory:
    """Samples the resident memory of this process and its children within a ``with`` block."""

    def __init__(self, status: _Status) -> None:
        self._status = status
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        children: list[psutil.Process] = []
        looked = time.monotonic()
        stopped = False
        while not stopped:
            stopped = self._stop.wait(_MEMORY_SAMPLE_S)
            if time.monotonic() - looked >= _CHILDREN_SAMPLE_S:
                with contextlib.suppress(psutil.Error):
                    children = process.children(recursive=True)
                looked = time.monotonic()
            resident = 0
            for member in (process, *children):
                with contextlib.suppress(psutil.Error):  # a child may end at any moment
                    resident += member.memory_info().rss
            self._status.peak_memory = max(self._status.peak_memory, resident)


class _SafeTracker:
    """A tracker whose errors never reach the stage: the first is told, then it is left alone."""

    def __init__(self, inner: Any, progress: Progress) -> None:
        self._inner = inner
        self._progress = progress

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._call("log", metrics, step)

    def summary(self, values: dict[str, Any]) -> None:
        self._call("summary", values)

    def image(self, name: str, path: Path) -> None:
        self._call("image", name, path)

    def table(self, table: Table) -> None:
        self._call("table", table)

    def artifact(self, artifact: Artifact) -> None:
        self._call("artifact", artifact)

    def finish(self, status: str) -> None:
        self._call("finish", status)

    def report(self, folder: Path) -> None:
        """Tell what the stage in ``folder`` came to."""
        if self._inner is None:
            return
        try:
            from benchmark.tracking.findings import report

            report(self._inner, folder)
        except Exception as error:
            self._progress.message(f"tracking lacks what the stage found ({type(error).__name__}: {error})")

    def _call(self, method: str, *arguments: Any) -> None:
        if self._inner is None:
            return
        try:
            getattr(self._inner, method)(*arguments)
        except Exception as error:
            self._inner = None
            self._progress.message(f"tracking stopped ({type(error).__name__}: {error}); the stage goes on without it")


def _open_tracker(stage: Stage, options: RunOptions, folder: Path, progress: Progress) -> _SafeTracker:
    if options.tracker == "none":
        return _SafeTracker(None, progress)
    try:
        from benchmark.tracking import open_tracker
        from benchmark.tracking.findings import describe

        (folder / TRACKING).mkdir(exist_ok=True)
        about = describe(stage.record(), read_json(folder / MANIFEST), options.group)
        inner = open_tracker(options.tracker, folder / TRACKING, mode=options.tracker_mode, **about)
    except Exception as error:
        progress.message(f"no tracking ({type(error).__name__}: {error}); the stage runs without it")
        return _SafeTracker(None, progress)
    return _SafeTracker(inner, progress)


def _load(run: str) -> Callable[[StageContext], Any]:
    module, _, function = run.partition(":")
    return cast(Callable[[StageContext], Any], getattr(importlib.import_module(module), function))


def _prepare_torch(stage: Stage, options: RunOptions) -> None:
    """Give every stage the same start, whatever ran before it in this process."""
    seed = stage.config.get("seed", 0)
    seed = seed if isinstance(seed, int) else 0
    random.seed(seed)
    # A stage that needs them has imported them by now; the others are spared the seconds that the import takes.
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)
        torch.set_num_threads(options.threads)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore a second Ctrl-C or SIGTERM for the moment that the status takes to write."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {name: signal.signal(name, signal.SIG_IGN) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _plain(value: Any) -> Any:
    """The value in JSON's types: NumPy and torch scalars as numbers, NaN and infinity (which JSON lacks) as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return _plain(value.item())
    raise TypeError(f"the summary holds {type(value).__name__}, which JSON does not know")
