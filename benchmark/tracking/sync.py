"""Upload the offline W&B runs of stages from a machine that has internet, with W&B's own ``wandb sync``.

A run that was stopped and resumed lies in several folders of one id; they are uploaded in their order, and W&B puts
them together. What is uploaded is marked by W&B itself (``run-ID.wandb.synced`` beside the run's file), so that the
same command again uploads what is left.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark.errors import RunError, UserError
from benchmark.tracking.wandb_tracker import UNSENT, logged_in, server, unreachable

_TOGETHER = 20  # stages a call of W&B, which takes a second to start
_HEADER = 7  # bytes of a run's file to which nothing was written yet, or ever
_STILL_S = 60.0  # what has not been written to for so long is not being written to
_SILENT_S = 600.0  # W&B tries again and again, for hours, where its server does not answer
# What the user set for runs of their own would be said of every run that is uploaded.
_OF_ONE_RUN = ("MODE", "SILENT", "RUN_ID", "RESUME", "RUN_GROUP", "JOB_TYPE", "NAME", "NOTES", "TAGS", "SERVICE")


@dataclass(frozen=True)
class StageRuns:
    """The offline runs of one stage, oldest first: ``waiting`` to be uploaded, or ``synced`` before."""

    title: str
    waiting: tuple[Path, ...] = ()
    synced: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Uploaded:
    """What became of a stage's waiting runs: how many were ``done``, and what went wrong with the first of the rest."""

    runs: StageRuns
    done: int
    error: str = ""


def offline_runs(title: str, folder: Path) -> StageRuns:
    """Return the runs under ``folder``, a stage's tracking folder, that were offline, or became so before their end."""
    found = [*folder.glob("wandb/offline-run-*/run-*.wandb")]
    found += [mark.with_name(mark.name.removesuffix(UNSENT)) for mark in folder.glob(f"wandb/run-*/*{UNSENT}")]
    files = sorted((path for path in found if path.stat().st_size > _HEADER), key=lambda path: _begun(path.parent.name))
    waiting = tuple(path for path in files if is_waiting(path))
    return StageRuns(title, waiting, tuple(path for path in files if path not in waiting))


def is_waiting(path: Path) -> bool:
    """Return whether the run in this file was not uploaded yet."""
    return not _mark(path).exists()


def upload(stages: Sequence[StageRuns], on_end: Callable[[Uploaded], None] = lambda one: None) -> list[Uploaded]:
    """Upload what waits, a few stages at a time; what fails does not keep the rest.

    Args:
        stages: whose runs.
        on_end: is told of each stage when it is through.

    Raises:
        UserError: no key of W&B is found.
        RunError: W&B's server cannot be reached.
    """
    left = [stage for stage in stages if stage.waiting]
    if not left:
        return []
    require_key()
    if why := unreachable():  # W&B's own tries would go on for hours
        raise RunError(f"{why}; type this where there is internet")
    ended: list[Uploaded] = []
    with tempfile.TemporaryDirectory(prefix="wandb-sync-") as scratch:
        for start in range(0, len(left), _TOGETHER):
            some = left[start : start + _TOGETHER]
            errors = _sync([path for stage in some for path in stage.waiting], Path(scratch))
            for stage in some:
                lacking = [path for path in stage.waiting if is_waiting(path)]
                if lacking and len(some) > 1:  # alone, to learn what is wrong with it and not with another
                    errors = _sync(lacking, Path(scratch))
                lacking = [path for path in lacking if is_waiting(path) and not _cut_off(path, errors)]
                told = (errors[-1] if errors else "W&B did not say why") if lacking else ""
                ended.append(Uploaded(stage, len(stage.waiting) - len(lacking), told))
                on_end(ended[-1])
    return ended


def require_key() -> None:
    """Do nothing where there is a key for W&B's server.

    Raises:
        UserError: there is none.
    """
    if not logged_in():
        raise UserError(f"no key for W&B ({server()}): type wandb login, or set WANDB_API_KEY")


def _sync(paths: Sequence[Path], scratch: Path) -> list[str]:
    """Run ``wandb sync`` on run files; return the errors that it prints."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not (name.startswith("WANDB_") and name.removeprefix("WANDB_") in _OF_ONE_RUN)
    }
    environment["WANDB_DIR"] = str(scratch)  # for its log, which nobody wants in the folder that one happens to be in
    environment.setdefault("WANDB_ERROR_REPORTING", "false")
    command = [sys.executable, "-m", "wandb", "sync", "--include-online"]  # those that did not get through to their end
    for option, variable in (("--entity", "WANDB_ENTITY"), ("--project", "WANDB_PROJECT")):
        if value := os.environ.get(variable):
            command += [option, value]
    command += [str(path.parent.resolve()) for path in paths]
    errors = []
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    )
    with process:
        assert process.stdout is not None
        patience = _patience(process)
        try:
            for line in process.stdout:
                patience.cancel()
                patience = _patience(process)
                words = line.strip().removeprefix("wandb: ")
                if words.startswith(("ERROR ", "Error: ")) and "detailed error logs" not in words:
                    errors.append(words.partition(" ")[2][:500])
            code = process.wait()
        finally:
            patience.cancel()
            if process.poll() is None:  # Ctrl-C
                process.terminate()
    if code < 0:
        errors.append(f"no word from W&B for {_SILENT_S / 60:g} minutes")
    elif code and not errors:
        errors.append(f"wandb sync ended with exit code {code}")
    return errors


def _cut_off(path: Path, errors: Sequence[str]) -> bool:
    """Mark a run whose process was killed in the middle of a record: all that can be read of it is uploaded."""
    ours = [error for error in errors if path.parent.name in error]
    if not ours or "incomplete record" not in ours[-1] or time.time() - path.stat().st_mtime < _STILL_S:
        return False
    _mark(path).touch()
    return True


def _patience(process: subprocess.Popen[str]) -> threading.Timer:
    timer = threading.Timer(_SILENT_S, process.terminate)
    timer.daemon = True
    timer.start()
    return timer


def _begun(name: str) -> str:
    """Return when a run's folder was made, in an order: ``offline-run-20260131_235959-ID``, ``run-...``."""
    return name.removeprefix("offline-").removeprefix("run-")


def _mark(path: Path) -> Path:
    return path.with_name(f"{path.name}.synced")
