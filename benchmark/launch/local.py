"""Run a plan in processes of this machine, several at a time, through submitit's local executor."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import submitit
from submitit.core.utils import environment_variables
from submitit.local.local import LocalJob

from benchmark.errors import RunError, UserError
from benchmark.execute import Outcome, RunOptions, exit_on_sigterm
from benchmark.graph import Decision, Plan, Stage
from benchmark.launch import Event, OnEvent, positions, settle, useful_gpus
from benchmark.launch.job import perform
from benchmark.store import Store

_POLL_S = 0.1
_GRACE_S = 2.0  # for processes that got the same Ctrl-C from the terminal to end by themselves
_END_S = 10.0
# submitit stops a local job after two minutes unless told otherwise. A stage's hours are what it asks of a cluster's
# queue; on one's own machine it may take what it takes.
_NO_LIMIT_MIN = 60 * 24 * 365


def run_stage(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Run one stage in a process of its own; what a job is given and gives back is plain data.

    Args:
        spec: ``stage`` (see :meth:`Stage.to_dict`), ``root`` (the store's folder), ``options`` (fields of
            :class:`RunOptions`), ``gpu`` (those to use, as in CUDA_VISIBLE_DEVICES; empty for none).

    Returns:
        The fields of an :class:`Outcome` except the stage, and ``user_error``, which tells whose fault a failure is.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = spec["gpu"]  # read when torch first asks for a GPU
    stage = Stage.from_dict(spec["stage"])
    try:
        outcome = perform(stage, Store(spec["root"]), RunOptions(**spec["options"]))
    except (RunError, UserError) as error:
        return {"state": "failed", "error": str(error), "user_error": isinstance(error, UserError)}
    if outcome is None:  # not the first of several processes
        return {}
    return {"state": outcome.state, "seconds": outcome.seconds, "summary": dict(outcome.summary), "user_error": False}


@dataclass(frozen=True)
class _Running:
    decision: Decision
    job: LocalJob[dict[str, Any]]
    slot: int


class LocalLauncher:
    """Runs up to ``parallel`` stages at a time.

    Args:
        parallel: how many processes at most.
        logs: folder for the processes' output; a dated one under the store's ``.jobs`` by default.
        gpus: ids of the GPUs to share out among the processes where the device is ``cuda``; by default those in
            CUDA_VISIBLE_DEVICES, or all.
    """

    def __init__(self, parallel: int, logs: Path | None = None, gpus: Sequence[str] | None = None) -> None:
        self._parallel = parallel
        self._logs = logs
        self._gpus = tuple(gpus) if gpus is not None else _visible_gpus()

    def run(
        self, plan: Plan, decisions: Sequence[Decision], store: Store, options: RunOptions, on_event: OnEvent
    ) -> list[Outcome]:
        """See :meth:`benchmark.launch.Launcher.run`."""
        place = positions(decisions)
        options = replace(options, command=options.command or shlex.join(sys.argv))
        logs = self._logs or store.root / ".jobs" / datetime.now().strftime("%Y%m%d-%H%M%S")
        outcomes: dict[str, Outcome] = {}
        waiting = list(decisions)
        unsettled = {decision.stage.fingerprint for decision in decisions}
        running: list[_Running] = []

        def ended(outcome: Outcome) -> None:
            fingerprint = outcome.stage.fingerprint
            outcomes[fingerprint] = outcome
            unsettled.discard(fingerprint)
            on_event(Event(outcome.state, outcome.stage, place.get(fingerprint, ""), outcome.seconds, outcome.error))

        if place:
            on_event(Event("note", None, message=f"logs of the stages: {logs}"))
        try:
            with exit_on_sigterm():
                while waiting or running:
                    for decision in list(waiting):
                        outcome = settle(decision, store, outcomes)
                        if outcome is not None:
                            ended(outcome)
                            waiting.remove(decision)
                        elif len(running) < self._parallel and not unsettled.intersection(_needs(decision.stage)):
                            position = place[decision.stage.fingerprint]
                            slot = min(set(range(self._parallel)) - {one.slot for one in running})
                            own = replace(options, force=decision.force, position=position)
                            job = self._submit(decision.stage, store, own, logs, slot)
                            note = f"{decision.reason}; log: {job.paths.stderr.name}"
                            on_event(Event("started", decision.stage, position, message=note))
                            running.append(_Running(decision, job, slot))
                            waiting.remove(decision)
                    for one in [one for one in running if one.job.done()]:
                        running.remove(one)
                        ended(_collect(one))
                    if running:
                        time.sleep(_POLL_S)
        except BaseException:
            _stop([one.job for one in running])
            raise
        return [outcomes[decision.stage.fingerprint] for decision in decisions]

    def _submit(
        self, stage: Stage, store: Store, options: RunOptions, logs: Path, slot: int
    ) -> LocalJob[dict[str, Any]]:
        executor = submitit.LocalExecutor(folder=logs, max_num_timeout=0)
        gpus = [self._gpus[slot % len(self._gpus)]] if options.device.startswith("cuda") and self._gpus else []
        # A stage that asks for several gets them; on a CPU as many processes as the options say.
        processes = min(options.processes, stage.resources.gpus) if stage.resources.gpus > 1 else 1
        if gpus and stage.resources.gpus > 1:
            gpus = list(self._gpus[: useful_gpus(stage, min(len(self._gpus), stage.resources.gpus))])
            processes = len(gpus)
        options = replace(options, processes=max(1, processes))
        executor.update_parameters(timeout_min=_NO_LIMIT_MIN, tasks_per_node=options.processes)
        spec = {
            "stage": stage.to_dict(),
            "root": str(store.root.absolute()),
            "options": asdict(options),
            "gpu": ",".join(gpus),
        }
        threads = str(options.threads)
        # Set before the process starts: numerical libraries read them when they are imported.
        with environment_variables(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, PYTHONPATH=_import_path()):
            return cast(LocalJob[dict[str, Any]], executor.submit(run_stage, spec))


def _visible_gpus() -> tuple[str, ...]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return tuple(gpu.strip() for gpu in chosen.split(",") if gpu.strip())
    # Counted without torch, whose import would cost the launcher seconds.
    return tuple(str(index) for index, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*")))


def _import_path() -> str:
    """What a job needs on its path to find this package and the stages as this process does."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def _needs(stage: Stage) -> list[str]:
    return [upstream.fingerprint for upstream in stage.upstream.values()]


def _collect(one: _Running) -> Outcome:
    """Read what a finished job gave back.

    Raises:
        UserError: the stage found its input wrong.
    """
    stage, paths = one.decision.stage, one.job.paths
    if not paths.result_pickle.exists():  # of the first process
        log = f"; its log: {paths.stderr}" if paths.stderr.exists() else ""
        died = f"stage {stage.title} failed: its process died (killed, or out of memory){log}"
        return Outcome(stage, "failed", error=died)
    if one.job.exception() is not None:
        broken = f"stage {stage.title} failed: its process could not run it; its log: {paths.stderr}"
        return Outcome(stage, "failed", error=broken)
    result = one.job.results()[0]
    # The logs are for people; submitit's own pickles have served.
    for pickled in (paths.submitted_pickle, *paths.folder.glob(f"{one.job.job_id}_*_result.pkl")):
        pickled.unlink(missing_ok=True)
    if result.pop("user_error"):
        raise UserError(result["error"])
    return Outcome(stage, **result)


def _stop(jobs: Sequence[LocalJob[dict[str, Any]]]) -> None:
    """Interrupt what still runs and wait until it has written where it stopped."""
    _wait(jobs, _GRACE_S if isinstance(sys.exc_info()[1], KeyboardInterrupt) else 0.0)
    left = [job for job in jobs if not job.done()]
    for job in left:
        job.cancel()
    _wait(left, _END_S)


def _wait(jobs: Sequence[LocalJob[dict[str, Any]]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(not job.done() for job in jobs) and time.monotonic() < end:
        time.sleep(_POLL_S)
