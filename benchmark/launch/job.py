"""What a job of a cluster runs: one stage, with the code that was there when it was submitted, and an end that is told.

How a stage ended is told by its folder and by the exit code; what submitit pickles of it is of no use to anybody.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from benchmark.errors import RunError, UserError
from benchmark.execute import Outcome, RunOptions, execute
from benchmark.graph import Stage
from benchmark.manifest import git_state
from benchmark.store import CHECKPOINTS, Store
from metrics.added import VARIABLE as EXTENSIONS_VARIABLE

PACKAGES = ("benchmark", "leaderboard", "methods", "metrics")
_LINGER_S = 600.0
_LOOK_S = 2.0
_STARTED, _STARTED_AT = time.monotonic(), time.time()  # a job imports this first thing


@lru_cache(maxsize=1)
def code_revision() -> str:
    """Return what code this is: ``70a7dbb+5e1f09a2c4d3``, the commit (``?`` without one) and a digest of the sources.

    The digest is over path and content of every Python file of this project's packages, and of the user's own methods
    and metrics. A commit that changes none of
    them leaves it as it is, and an edit that was not committed shows. Taken once a process.
    """
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    folders = [(root, root / package) for package in PACKAGES]
    if own := os.environ.get(EXTENSIONS_VARIABLE):
        folders.append((Path(own), Path(own)))
    for root, folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    state = git_state()
    commit = state["revision"][:7] if state else "?"
    return f"{commit}+{digest.hexdigest()[:12]}"


def perform(stage: Stage, store: Store, options: RunOptions) -> Outcome | None:
    """Run one stage in this process, or this process's part where several train together.

    Returns:
        How it ended; None in all but the first of several processes.

    Raises:
        UserError, RunError, KeyboardInterrupt, SystemExit: as :func:`benchmark.execute.execute`.
    """
    if options.processes == 1:
        return execute(stage, store, options)
    from benchmark.launch.together import execute_together

    return execute_together(stage, store, options)


@dataclass(frozen=True)
class StageJob:
    """A stage as a job: plain data, so that it can be sent to another machine and started there again and again.

    Attributes:
        stage: see :meth:`benchmark.graph.Stage.to_dict`.
        root: folder of the store.
        options: fields of :class:`benchmark.execute.RunOptions`.
        revision: :func:`code_revision` at submission.
        limit: seconds until the job is told that its time is up; 0 for no limit.
    """

    stage: Mapping[str, Any]
    root: str
    options: Mapping[str, Any]
    revision: str
    limit: float = 0

    def __call__(self) -> None:
        """Run the stage.

        Raises:
            SystemExit: it failed (1), its input was wrong (2), or it was told to stop; no traceback: the stage's folder
                has it.
        """
        _clear_leftovers()
        stage, store = Stage.from_dict(self.stage), Store(self.root)
        options = RunOptions(**self.options)
        try:
            if code_revision().partition("+")[2] != self.revision.partition("+")[2]:
                self._refuse(stage, store, options)
            perform(stage, store, options)
        except (RunError, UserError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2 if isinstance(error, UserError) else 1) from None
        except SystemExit as end:
            if end.code == 128 + signal.SIGTERM:
                _linger()
            raise

    def checkpoint(self) -> Any:
        """Return what runs when the job starts again after a preemption or its time limit: the same.

        submitit calls this on its signal, asks Slurm to start the job again, and ends this process as Ctrl-C would: the
        stage keeps its checkpoints, a training has just written one.

        Raises:
            UserError: the time is up, and this run has written no checkpoint: the next one would come no further.
        """
        from submitit.helpers import DelayedSubmission

        _clear_leftovers()
        # Slurm may tell a minute early.
        if self.limit and time.monotonic() - _STARTED >= max(self.limit - 90, self.limit / 2):
            stage = Stage.from_dict(self.stage)
            if not _saved_since(Store(self.root).folder(stage), _STARTED_AT):
                raise UserError(
                    f"stage {stage.title} reached its time limit without a checkpoint and would do so again; "
                    f"say more hours in the profile, and type again: {self.options.get('command')}"
                )
        return DelayedSubmission(self)

    def _refuse(self, stage: Stage, store: Store, options: RunOptions) -> None:
        """Fail a stage whose code is not what was submitted; nothing of it runs.

        Raises:
            UserError: in the job's first process.
        """
        if int(os.environ.get("SLURM_PROCID", "0")):
            raise SystemExit(0)  # the first process tells; an end with an error would kill it before it has
        now = code_revision()
        again = f"; type again: {options.command}" if options.command else "; submit it again"
        message = (
            f"stage {stage.title} was submitted with code {self.revision}, and starts with {now}: "
            f"one sweep, one code{again}"
        )

        def refuse(folder: Path) -> NoReturn:
            raise UserError(message)

        # One process, whatever was planned, no tracking, and none of the stage's own code, which was not meant: this
        # only writes down that it failed.
        unlike = replace(stage, run=f"{__name__}:code_revision")
        outcome = execute(unlike, store, replace(options, processes=1, tracker="none"), ready=refuse)
        if outcome.state == "cached":
            raise SystemExit(0)


def _saved_since(folder: Path, moment: float) -> bool:
    """Whether a checkpoint of the stage was written since then (a minute more for clocks that differ)."""
    places = (folder / CHECKPOINTS, folder.with_name(folder.name + ".forced") / CHECKPOINTS)
    written = (path.stat().st_mtime for place in places for path in place.rglob("*") if path.is_file())
    return any(when > moment - 60 for when in written)


def _clear_leftovers() -> None:
    """Remove what a killed process left of submitit's pickles: submitit refuses to write where it finds them."""
    from submitit import JobEnvironment

    with contextlib.suppress(RuntimeError, OSError, KeyError):  # not in a job
        paths = JobEnvironment().paths
        for path in (paths.result_pickle, paths.submitted_pickle):
            path.with_suffix(f"{path.suffix}.save_tmp").unlink(missing_ok=True)


def _linger() -> None:
    """After SIGTERM: wait for what comes next, unless the job was cancelled.

    A preempted job gets SIGTERM some time before Slurm puts it back into the queue. One that ends by itself in that
    time counts as ended and is not put back.
    """
    from benchmark.launch.queue import live_jobs

    job = _own_id()
    end = time.monotonic() + _LINGER_S
    while job and time.monotonic() < end:
        try:
            state = live_jobs([job]).get(job)
        except UserError:
            return
        if state is None or state.state != "RUNNING":
            return
        time.sleep(_LOOK_S)


def _own_id() -> str:
    array, element = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{element}" if array else os.environ.get("SLURM_JOB_ID", "")
