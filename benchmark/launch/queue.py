"""What Slurm's own commands say and do: the one place of this package that calls them.

Everything is read with one call for many jobs, since a controller serves a whole cluster: ``squeue`` for what lives or
ended a few minutes ago, ``sacct`` for what ended before. Ids are Slurm's own words: ``1234``, and ``1234_5`` for the
element 5 of an array.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmark.errors import UserError

TIMEOUT_S = 30.0
# What Slurm calls a job that has not ended. STOPPED and SUSPENDED ones wait for their turn, REQUEUED ones run again.
WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
RUNNING = frozenset(
    {"RUNNING", "CONFIGURING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"}
)

_SQUEUE_FIELDS = ("JobArrayID:80", "State:20", "Reason:80", "NodeList:400", "TimeUsed:20", "TimeLimit:20")
_SACCT_FIELDS = ("JobID", "State", "ExitCode", "NodeList", "ElapsedRaw", "TimelimitRaw")
_IDS_A_CALL = 1000  # a command line takes 128 KiB or more


@dataclass(frozen=True)
class JobState:
    """One job, or one element of an array, as Slurm sees it.

    ``state`` is Slurm's word (RUNNING, PENDING, FAILED, OUT_OF_MEMORY, ...), ``reason`` why it waits or how it ended,
    ``elapsed`` and ``limit`` are seconds (None: no limit, or not told), ``restarts`` how often it was requeued.
    """

    state: str
    reason: str = ""
    node: str = ""
    elapsed: int = 0
    limit: int | None = None
    restarts: int = 0

    @property
    def live(self) -> bool:
        """Whether it waits or runs."""
        return self.state in WAITING or self.running

    @property
    def running(self) -> bool:
        """Whether it holds a node."""
        return self.state in RUNNING


@dataclass(frozen=True)
class PartitionInfo:
    """A partition: ``state`` is ``up``, ``down``, ``drain`` or ``inact``; ``max_minutes`` None where unlimited."""

    state: str
    max_minutes: int | None = None
    default: bool = False


def available() -> bool:
    """Return whether Slurm's ``sbatch`` is on the PATH."""
    return shutil.which("sbatch") is not None


def known_jobs(ids: Iterable[str]) -> dict[str, JobState]:
    """Return what the controller still knows of these jobs: those that live, and those that ended minutes ago.

    Args:
        ids: jobs, whole arrays (``1234`` stands for all its elements) or elements.

    Returns:
        Id -> state, array elements one by one, also those that wait.

    Raises:
        UserError: ``squeue`` is not there, fails, or does not answer within half a minute.
    """
    asked = set(ids)
    found: dict[str, JobState] = {}
    # An own column for every width: Slurm pads, and cuts what is longer.
    columns = ",".join(f"{field}|" for field in (*_SQUEUE_FIELDS, "RestartCnt:10"))
    for some in _chunks({base_id(job) for job in asked}):
        command = ["squeue", "--noheader", "--array", "--states=all", f"--Format={columns}", f"--jobs={','.join(some)}"]
        try:
            lines = _call(command)
        except UserError as error:
            if "Invalid job id" in str(error):  # what squeue says where it knows none of them
                continue
            raise
        for line in lines:
            job, state, reason, node, used, limit, restarts = _parts("squeue", line, 7)
            found[job] = JobState(
                state, _reason(reason), node, _seconds(used) or 0, _seconds(limit), int(restarts or 0)
            )
    return {job: state for job, state in found.items() if _asked_for(job, asked)}


def live_jobs(ids: Iterable[str]) -> dict[str, JobState]:
    """Return those of the jobs that wait or run, array elements one by one; see :func:`known_jobs`."""
    return {job: state for job, state in known_jobs(ids).items() if state.live}


def ended_jobs(ids: Iterable[str]) -> dict[str, JobState]:
    """Return how these jobs ended, as the accounting has it; nothing on a cluster that keeps none.

    Raises:
        UserError: ``sacct`` fails, or does not answer within half a minute.
    """
    asked = set(ids)
    if not asked or shutil.which("sacct") is None:
        return {}
    found: dict[str, JobState] = {}
    for some in _chunks({base_id(job) for job in asked}):
        command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--format={','.join(_SACCT_FIELDS)}"]
        try:
            lines = _call([*command, f"--jobs={','.join(some)}"])
        except UserError as error:
            if "accounting storage is disabled" in str(error).lower():
                return {}
            raise
        for line in lines:
            job, state, code, node, elapsed, limit = _parts("sacct", line, 6)
            word, _, rest = state.partition(" ")  # "CANCELLED by 1000"
            word = word.rstrip("+")
            minutes = int(limit) if limit.isdigit() else None
            told = JobState(
                word,
                rest or _exit_words(code),
                "" if node == "None assigned" else node,
                int(elapsed) if elapsed.isdigit() else 0,
                None if minutes is None else 60 * minutes,
            )
            if not told.live:
                found |= dict.fromkeys(_elements(job), told)
    return {job: state for job, state in found.items() if _asked_for(job, asked)}


def cancel(ids: Iterable[str]) -> None:
    """Cancel jobs, whole arrays or elements; what has ended is left as it is.

    Raises:
        UserError: ``scancel`` fails, or does not answer within half a minute.
    """
    for some in _chunks(ids):
        try:
            _call(["scancel", *some])
        except UserError as error:
            if "Invalid job id" not in str(error):
                raise


def partitions() -> dict[str, PartitionInfo]:
    """Return the cluster's partitions by name.

    Raises:
        UserError: ``sinfo`` is not there, fails, or does not answer within half a minute.
    """
    found: dict[str, PartitionInfo] = {}
    for line in _call(["sinfo", "--noheader", "--format=%P|%a|%l"]):
        name, state, limit = _parts("sinfo", line, 3)
        seconds = _seconds(limit)
        info = PartitionInfo(state, None if seconds is None else seconds // 60, name.endswith("*"))
        found.setdefault(name.removesuffix("*"), info)
    return found


def max_array_size() -> int:
    """Return Slurm's MaxArraySize: an array's indices stay below it.

    Raises:
        UserError: ``scontrol`` is not there, fails, or does not answer within half a minute.
    """
    for line in _call(["scontrol", "show", "config"]):
        if match := re.match(r"MaxArraySize\s*=\s*(\d+)", line):
            return int(match.group(1))
    return 1001  # Slurm's own default


def base_id(job: str) -> str:
    """Return ``1234`` of ``1234_5``."""
    return job.partition("_")[0]


def _call(command: Sequence[str]) -> list[str]:
    """Run one of Slurm's commands; return its lines."""
    name = command[0]
    # Words of the user's that change what the commands print.
    unset = ("SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "SLURM_TIME_FORMAT", "SLURM_BITSTR_LEN")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(unset)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, env=environment, check=False
        )
    except FileNotFoundError:
        raise UserError(f"{name} is not on the PATH; is this a node of a Slurm cluster?") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{name} did not answer within {TIMEOUT_S:g} s; Slurm may be down: try again later") from None
    except OSError as error:
        raise UserError(f"{name} cannot be run: {error.strerror or error}") from error
    # scancel is the one that can print an error and return 0.
    if done.returncode:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise UserError(f"{name} failed: {said[-1] if said else f'exit code {done.returncode}'}")
    return [line for line in done.stdout.splitlines() if line.strip()]


def _parts(name: str, line: str, count: int) -> list[str]:
    parts = [part.strip() for part in line.split("|")]
    if len(parts) < count:
        raise UserError(
            f"{name} printed '{line.strip()[:80]}', expected {count} columns; Slurm 20.02 or newer is needed"
        )
    return parts[:count]


def _asked_for(job: str, asked: set[str]) -> bool:
    return job in asked or base_id(job) in asked


def _chunks(ids: Iterable[str]) -> Iterator[list[str]]:
    kept = sorted(set(ids))
    for start in range(0, len(kept), _IDS_A_CALL):
        yield kept[start : start + _IDS_A_CALL]


def _elements(job: str) -> list[str]:
    """``1_[2-4,7%2]``, which stands for elements that never started, one by one."""
    match = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", job)
    if match is None:
        return [job]
    elements: list[str] = []
    for part in match.group(2).split(","):
        first, _, last = part.partition("-")
        elements += [f"{match.group(1)}_{index}" for index in range(int(first), int(last or first) + 1)]
    return elements


def _reason(word: str) -> str:
    return "" if word in ("None", "(null)") else word


def _exit_words(code: str) -> str:
    """``3:0`` (exit code and signal) in words."""
    number, _, signal = code.partition(":")
    if signal not in ("", "0"):
        return f"signal {signal}"
    return f"exit code {number}" if number not in ("", "0") else ""


def _seconds(text: str) -> int | None:
    """``1-02:03:04``, ``02:03:04``, ``3:04`` or ``UNLIMITED`` in seconds; None for no number."""
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in (*parts, *([days] if dash else []))) or len(parts) > 3:
        return None
    if dash:  # D-HH, D-HH:MM, D-HH:MM:SS
        parts += ["0"] * (3 - len(parts))
    elif len(parts) == 1:  # minutes
        parts = ["0", parts[0], "0"]
    total = 0
    for part in parts:
        total = 60 * total + int(part)
    return total + 86400 * int(days or 0)
