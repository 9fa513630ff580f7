"""What became of a submission, and what to do about it: from the store first, from Slurm's queue second.

A stage that has a result is done and one that wrote down its error has failed, whatever Slurm remembers. The queue
tells the rest: what waits, what runs and where, and how a job ended that could not write anything down any more. All
of it works from any machine that sees the store; without Slurm's commands it tells what the store knows.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TextIO, cast

from benchmark.errors import UserError, did_you_mean
from benchmark.graph import Stage
from benchmark.launch import queue, submissions
from benchmark.launch.queue import JobState
from benchmark.launch.submissions import Submission, SubmittedStage
from benchmark.store import (
    CHECKPOINTS,
    CONFIG,
    DONE,
    MANIFEST,
    STATUS,
    TRACEBACK,
    TRACKING,
    Store,
    now,
    read_json,
    write_json,
)

State = Literal["done", "running", "queued", "blocked", "failed", "cancelled", "interrupted", "lost"]

STATES: tuple[State, ...] = ("running", "queued", "failed", "cancelled", "interrupted", "lost", "blocked", "done")
ENDED_BADLY: tuple[State, ...] = ("failed", "cancelled", "interrupted", "lost")
CANCELLED = "cancelled.json"

_ACCOUNTING_EVERY_S = 5.0
# A file that another machine has made may take this long to be seen over NFS, which remembers what is absent.
_SEEN_AFTER_S = 60.0
_DEAD_WORDS = {
    "TIMEOUT": "reached its time limit",
    "PREEMPTED": "was preempted and not started again",
    "NODE_FAIL": "lost its node",
    "REVOKED": "was revoked by another cluster",
}
_FAILED_WORDS = {
    "OUT_OF_MEMORY": "ran out of memory",
    "BOOT_FAIL": "never started: its node did not boot",
    "DEADLINE": "missed its deadline",
}


@dataclass(frozen=True)
class Row:
    """One stage of a submission as it stands now.

    Attributes:
        stage: as submitted.
        state: one of :data:`STATES`.
        reason: why it waits, is blocked or ended, in words.
        seconds: how long it computed, or has been running.
        node: where it runs or ran.
        restarts: how often Slurm started its job again.
        progress: last line of metrics of a running stage, with ``steps`` where the stage says how many there are.
        error: of a failed stage, one line.
        traceback: file with the whole of it, or empty.
        blocked_by: titles of the stages that ended badly and so keep it from running, near or far.
        live: whether its job waits or runs, as Slurm says.
        retry: command that computes just it, for a stage that ended badly.
    """

    stage: SubmittedStage
    state: State
    reason: str = ""
    seconds: float | None = None
    node: str = ""
    restarts: int = 0
    progress: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    traceback: str = ""
    blocked_by: tuple[str, ...] = ()
    live: bool = False
    retry: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the row as plain data."""
        stage = self.stage
        return {
            "stage": stage.title,
            "name": _name(stage),
            "key": stage.key,
            "fingerprint": stage.fingerprint,
            "state": self.state,
            "reason": self.reason,
            "seconds": self.seconds,
            "job": stage.job,
            "shared": stage.shared,
            "node": self.node,
            "restarts": self.restarts,
            "progress": dict(self.progress),
            "error": self.error,
            "traceback": self.traceback,
            "stdout": stage.stdout,
            "stderr": stage.stderr,
            "blocked_by": list(self.blocked_by),
            "retry": self.retry,
        }


@dataclass(frozen=True)
class Status:
    """A submission as it stands now: one row a stage, in the order of the plan; ``notes`` say what could not be seen.

    ``name`` and ``out`` are how the person who asks calls the sweep and the folder of results (as for ``--out``), for
    the commands to type.
    """

    submission: Submission
    rows: tuple[Row, ...]
    name: str
    out: str
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[State, int]:
        """How many stages are in each state that occurs."""
        found = Counter(row.state for row in self.rows)
        return {state: found[state] for state in STATES if found[state]}

    @property
    def ended(self) -> bool:
        """Whether nothing waits or runs any more."""
        return not any(row.state in ("running", "queued") for row in self.rows)

    @property
    def complete(self) -> bool:
        """Whether every stage is done."""
        return all(row.state == "done" for row in self.rows)

    def command(self, verb: str, *words: str) -> str:
        """Return the command to type for this sweep."""
        out = ["--out", self.out] if self.out else []
        return shlex.join(["python", "-m", "benchmark.sweep", verb, self.name, *words, *out])

    def as_json(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        one = self.submission
        return {
            "id": one.id,
            "sweep": one.sweep,
            "created": one.created,
            "revision": one.revision,
            "command": one.command,
            "out": one.out,
            "counts": dict(self.counts),
            "ended": self.ended,
            "complete": self.complete,
            "notes": list(self.notes),
            "stages": [row.as_json() for row in self.rows],
        }


class Watch:
    """What Slurm says of some jobs, asked no more often than is polite; keep one for as long as you look."""

    def __init__(self) -> None:
        self._ended: dict[str, JobState] = {}
        self._accounting_at = -_ACCOUNTING_EVERY_S
        self._no_result: dict[str, float] = {}

    def look(self, jobs: Iterable[str]) -> tuple[dict[str, JobState] | None, str]:
        """Return the state of each job that Slurm knows; None and the reason where it cannot be asked."""
        asked = set(jobs)
        if not asked:
            return {}, ""
        try:
            found = queue.known_jobs(asked)
            missing = asked - found.keys() - self._ended.keys()
            if missing and time.monotonic() - self._accounting_at >= _ACCOUNTING_EVERY_S:
                self._accounting_at = time.monotonic()
                self._ended |= queue.ended_jobs(missing)
        except UserError as error:
            return None, str(error)
        return {job: self._ended[job] for job in asked & self._ended.keys()} | found, ""

    def late(self, fingerprint: str) -> bool:
        """Return whether a stage whose job ended well has had its time to show its result."""
        first = self._no_result.setdefault(fingerprint, time.monotonic())
        return time.monotonic() - first >= _SEEN_AFTER_S


def report(
    store: Store, submission: Submission, name: str = "", out: str | None = None, watch: Watch | None = None
) -> Status:
    """Say how every stage of a submission stands.

    Args:
        store: where the results are.
        submission: which one.
        name: what commands to type call it; its sweep by default.
        out: what they give to ``--out``; the submission's folder by default, empty for none.
        watch: of whoever looks repeatedly.
    """
    patient = watch is not None
    watch = watch or Watch()
    status = Status(submission, (), name or submission.sweep, submission.out if out is None else out)
    stages = {stage.fingerprint: stage for stage in submission.stages}
    # One listing a stage name, instead of several looks a stage: over NFS each costs a millisecond.
    there = {name: _listing(store.root / name) for name in {_name(stage) for stage in submission.stages}}
    seen = {stage.fingerprint: _look(store, there, stage, submission.created) for stage in submission.stages}
    jobless = {key for key, stage in stages.items() if not stage.job and seen[key].state != "done"}
    if jobless and submission.id:
        for key, (earlier, created) in _earlier(store, submission, jobless).items():
            stages[key] = earlier
            seen[key] = _look(store, there, earlier, created)
    asked = [stage.job for key, stage in stages.items() if stage.job and seen[key].state != "done"]
    jobs, trouble = watch.look(asked) if submission.id else (None, "")
    cancelled = frozenset(_json(_cancelled_path(store)))
    arrays = frozenset(queue.base_id(job) for job in jobs or ())
    slurm = None if jobs is None else _Slurm(jobs, arrays, cancelled, watch if patient else None)
    rows: dict[str, Row] = {}
    titles = Counter(stage.title for stage in submission.stages)
    for stage in stages.values():
        found = seen[stage.fingerprint]
        row = _row(store, stage, found, slurm, [rows[need] for need in stage.needs if need in rows])
        if row.state in ENDED_BADLY:
            word = stage.title if titles[stage.title] == 1 else stage.key
            again = status.command("retry", word) if submission.id else found.command
            row = replace(row, retry=again)
        rows[stage.fingerprint] = row
    notes = [trouble] if trouble else []
    if trouble and asked:
        notes.append("what waits and what runs is not known; below is what the store says")
    return Status(submission, tuple(rows.values()), status.name, status.out, tuple(notes))


def unsubmitted(store: Store, sweep: str) -> Submission:
    """Return the stages that lie in the store as if they had been submitted: for a sweep that ran without Slurm.

    Raises:
        UserError: the store is empty.
    """
    stages = []
    for folder in sorted(store.root.glob("*/*")) if store.root.is_dir() else []:
        if folder.parent.name.startswith(".") or "." in folder.name or not (folder / STATUS).exists():
            continue
        status = _json(folder / STATUS)
        label = str(status.get("label") or "")
        title = f"{folder.parent.name} [{label}]" if label else folder.parent.name
        stages.append(
            (str(status.get("started", "")), SubmittedStage(folder.name, f"{folder.parent.name}/{folder.name}", title))
        )
    if not stages:
        raise UserError(
            f"no results in {store.root}; name their folder with --out DIR, or type: python -m benchmark.sweep {sweep}"
        )
    # In the order in which they were computed, which is one in which they can be.
    ordered = tuple(stage for _, stage in sorted(stages, key=lambda one: one[0]))
    return Submission("", sweep, "", "", "", str(store.root.parent.absolute()), ordered)


def select(status: Status, words: Sequence[str]) -> list[Row]:
    """Return the rows that the words name: titles, keys, stage names, labels, fingerprints or job ids.

    Raises:
        UserError: a word that names none.
    """
    chosen: dict[str, Row] = {}
    for word in words:
        matches = [row for row in status.rows if word in (row.stage.title, row.stage.key, row.stage.job)]
        matches = matches or [row for row in status.rows if word in (_name(row.stage), *_labels(row.stage))]
        matches = matches or [row for row in status.rows if queue.base_id(row.stage.job) == word]
        if not matches and len(word) >= 4:
            matches = [row for row in status.rows if row.stage.key.startswith(word) and "/" in word]
            matches = matches or [row for row in status.rows if row.stage.fingerprint.startswith(word)]
        if not matches:
            known = dict.fromkeys(_name(row.stage) for row in status.rows)
            near = did_you_mean(word, [*known, *dict.fromkeys(row.stage.title for row in status.rows)])
            raise UserError(f"no stage '{word}' in {status.name}{near or '; there are ' + ', '.join(known)}")
        chosen |= {row.stage.fingerprint: row for row in matches}
    return list(chosen.values())


def to_retry(status: Status, words: Sequence[str] = ()) -> list[Row]:
    """Return the stages that a retry computes, in the order of the plan.

    Args:
        status: how things stand.
        words: stages to compute (see :func:`select`) with what they lack and what waits for nothing but them; all
            that ended badly, and what that blocks, by default.

    Raises:
        UserError: a word that names no stage, or one that is done, queued or running.
    """
    rows = {row.stage.fingerprint: row for row in status.rows}
    bad = (*ENDED_BADLY, "blocked")
    if not words:
        return [row for row in status.rows if row.state in bad]
    chosen: set[str] = set()
    for row in select(status, words):
        if row.state in bad:
            chosen.add(row.stage.fingerprint)
    if not chosen:
        row = select(status, words)[0]
        raise UserError(f"{row.stage.title} is {row.state}: there is nothing to retry")
    for row in reversed(status.rows):  # what they lack comes before them in the plan
        if row.stage.fingerprint in chosen:
            chosen |= {need for need in row.stage.needs if need in rows and rows[need].state in bad}
    for row in status.rows:  # what they held up comes after them
        needs = [need for need in row.stage.needs if need in rows and rows[need].state != "done"]
        if row.state == "blocked" and all(
            need in chosen or rows[need].state in ("queued", "running") for need in needs
        ):
            chosen.add(row.stage.fingerprint)
    return [row for row in status.rows if row.stage.fingerprint in chosen]


@dataclass(frozen=True)
class Cancellation:
    """What a cancel stops, what it leaves because another submission waits for it, and what that holds up."""

    jobs: tuple[Row, ...]
    kept: tuple[Row, ...]
    holds_up: tuple[Row, ...]


def to_cancel(store: Store, status: Status, words: Sequence[str] = ()) -> Cancellation:
    """Say what a cancel of these stages (of all, by default) would stop; stops nothing.

    Jobs of another sweep (of another submission, where one is asked for by its id), and own ones for which a live job
    of another waits, go on unless their stages are named.

    Raises:
        UserError: a word that names no stage.
    """
    named = {row.stage.fingerprint for row in select(status, words)}
    active = [row for row in status.rows if row.live]
    chosen = [row for row in active if row.stage.fingerprint in named] if words else active
    if not chosen:
        return Cancellation((), (), ())
    if words:
        kept: list[Row] = []
    else:
        own: list[Submission] = []
        others: list[Submission] = []
        for record in submissions.history(store):
            ours = record.id == status.submission.id or status.name == record.sweep
            (own if ours else others).append(record)
        mine = {one.job for record in own for one in record.stages if not one.shared}
        wanted = _wanted_by(others, {row.stage.fingerprint for row in chosen})
        kept = [row for row in chosen if row.stage.job not in mine or row.stage.fingerprint in wanted]
    held = {row.stage.fingerprint for row in kept}
    jobs = [row for row in chosen if row.stage.fingerprint not in held]
    stopped = {row.stage.fingerprint for row in jobs}
    holds_up = []
    for row in status.rows:
        if row.state == "queued" and row.stage.fingerprint not in stopped and stopped & {*row.stage.needs}:
            holds_up.append(row)
            stopped.add(row.stage.fingerprint)
    return Cancellation(tuple(jobs), tuple(kept), tuple(holds_up))


def cancel(store: Store, status: Status, rows: Sequence[Row]) -> None:
    """Cancel the jobs of these rows, and write down that they were: Slurm forgets some that never started.

    Raises:
        UserError: Slurm cannot be reached.
    """
    ids = [row.stage.job for row in rows]
    queue.cancel(ids)
    path = _cancelled_path(store)
    kept = _json(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, kept | dict.fromkeys(ids, now()))


def follow(
    store: Store,
    submission: Submission,
    name: str = "",
    out: str | None = None,
    stream: TextIO | None = None,
    every: float = 2.0,
) -> int:
    """Show how a submission goes on until nothing waits or runs: a live table on a terminal, else a line a change.

    Ctrl-C ends the looking, not the jobs.

    Returns:
        0 where everything is done, 1 where something is not, 130 after Ctrl-C.

    Raises:
        UserError: Slurm's commands are not here.
    """
    from benchmark.launch.table import Lines, LiveTable

    stream = stream or sys.stdout
    if not queue.available():
        raise UserError("Slurm's commands are not on the PATH here: the jobs go on, but cannot be watched from here")
    live = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    display = LiveTable(stream) if live else Lines(stream)
    watch = Watch()
    status = Status(submission, (), name or submission.sweep, submission.out if out is None else out)
    try:
        while True:
            status = report(store, submission, name, out, watch)
            display.update(status)
            if status.ended and not status.notes:
                break
            time.sleep(every)
    except KeyboardInterrupt:
        display.close()
        print(f"the jobs go on; look again: {status.command('status')}", file=sys.stderr, flush=True)
        return 130
    display.close()
    return 0 if status.complete else 1


# --- one stage --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What the folder of a stage says: ``state`` is done, failed, running, interrupted or absent."""

    state: str = "absent"
    folder: Path = Path()
    status: Mapping[str, Any] = field(default_factory=dict)
    recent: bool = True  # told after the submission

    @property
    def command(self) -> str:
        """What was typed for it."""
        return str(_json(self.folder / MANIFEST).get("command") or "")


@dataclass(frozen=True)
class _Slurm:
    """What Slurm says: ``arrays`` that it knows some of, jobs that were ``cancelled`` from here."""

    jobs: Mapping[str, JobState]
    arrays: frozenset[str]
    cancelled: frozenset[str]
    watch: Watch | None


def _look(store: Store, there: Mapping[str, set[str]], stage: SubmittedStage, created: str) -> _Seen:
    name, _, digits = stage.key.partition("/")
    folder = store.root / name / digits
    if digits not in there[name]:
        return _Seen(folder=folder)
    if (folder / DONE).exists():
        if not stage.force or str(_json(folder / DONE).get("finished", "")) >= created:
            return _Seen("done", folder, _json(folder / STATUS))
        # The result is an older one; the new one is computed beside it.
        folder = folder.with_name(f"{digits}.forced")
        if folder.name not in there[name]:
            return _Seen(folder=folder)
    status = _json(folder / STATUS)
    state = str(status.get("state", "absent"))
    recent = str(status.get("ended") or status.get("started") or "") >= created
    # "done" without DONE: killed in the last moment.
    return _Seen("interrupted" if state == "done" else state, folder, status, recent)


def _row(store: Store, stage: SubmittedStage, found: _Seen, slurm: _Slurm | None, needs: Sequence[Row]) -> Row:
    """Decide on the state of one stage; ``needs`` are the rows of what it reads."""
    wall = found.status.get("wall_s")
    seconds = float(wall) if isinstance(wall, int | float) else None
    row = Row(stage, "lost", seconds=seconds, node=str(found.status.get("host") or ""))
    if found.state == "done":
        return replace(row, state="done")
    job = slurm.jobs.get(stage.job) if slurm is not None else None
    if job is not None:
        row = replace(row, live=job.live, restarts=job.restarts, node=job.node or row.node)
    waiting = job is not None and job.live and not job.running
    if found.state == "failed" and (found.recent or not stage.job) and not waiting:
        trace = found.folder / TRACEBACK
        error = str(found.status.get("error") or "no error recorded").splitlines()[0]
        return replace(row, state="failed", error=error, traceback=str(trace) if trace.exists() else "")
    if job is not None and job.running:
        reason = "is being stopped" if job.state == "COMPLETING" and found.state != "done" else ""
        return replace(row, state="running", reason=reason, seconds=job.elapsed, progress=_progress(found.folder))
    # Those at the beginning of the chain are named: it is them that somebody must mend.
    ended = {one.stage.title: f"{one.stage.title} ({one.state})" for one in needs if one.state in ENDED_BADLY}
    first = dict.fromkeys((*ended, *(title for one in needs for title in one.blocked_by)))
    if first:
        because = _few([ended.get(title, title) for title in first])
        return replace(row, state="blocked", reason=f"needs {because}", blocked_by=tuple(first))
    if waiting and job is not None:
        return replace(row, state="queued", reason=_why_it_waits(job, needs))
    if job is None and found.state == "running":
        return _as_the_store_says(store, row, found)
    if slurm is None:
        if found.state == "interrupted":
            return replace(row, state="interrupted", reason=f"its process was stopped{_goes_on(found)}")
        return (
            replace(row, state="queued", reason="no result yet") if stage.job else _lost(row, "no result, and no job")
        )
    if job is not None:
        return _ended(row, job, found, slurm.watch)
    if stage.job in slurm.cancelled:
        return replace(row, state="cancelled", reason="cancelled while it waited")
    if found.state == "interrupted":
        return replace(row, state="interrupted", reason=f"its process was stopped{_goes_on(found)}")
    if "_" in stage.job and queue.base_id(stage.job) in slurm.arrays:
        # Slurm knows its array but not it: that is what a cancel before its turn leaves.
        return replace(row, state="cancelled", reason="cancelled while it waited")
    if not stage.job:
        return _lost(row, "no result, and this submission did not ask for it")
    return _lost(row, "Slurm no longer knows its job")


def _lost(row: Row, reason: str) -> Row:
    return replace(row, state="lost", reason=reason)


def _as_the_store_says(store: Store, row: Row, found: _Seen) -> Row:
    """A stage whose status says that it runs, and of which Slurm knows nothing."""
    # The store looks at the stage's key alone.
    host, since = str(found.status.get("host") or "?"), found.status.get("started")
    if store.holder(cast(Stage, row.stage)) is not None or host != socket.gethostname():
        who = f"process {found.status.get('pid')} on {host} since {since}"
        return replace(
            row, state="running", reason=who, seconds=_seconds_since(since), progress=_progress(found.folder)
        )
    return replace(row, state="interrupted", reason=f"its process died{_goes_on(found)}")


def _ended(row: Row, job: JobState, found: _Seen, watch: Watch | None) -> Row:
    """A stage without a result whose job has ended, in Slurm's words."""
    row = replace(row, seconds=row.seconds or float(job.elapsed))
    after = f" after {job.elapsed} s" if job.elapsed else ""
    if job.state == "COMPLETED":
        if watch is not None and not watch.late(row.stage.fingerprint):
            return replace(row, state="running", reason="its job has ended, its result is not seen here yet")
        return _lost(row, "its job ended well and left no result; on a slow file system look again in a minute")
    if job.state == "CANCELLED":
        return replace(
            row, state="cancelled", reason=f"cancelled {after.strip() or 'while it waited'}{_goes_on(found)}"
        )
    if job.state in _DEAD_WORDS:
        return replace(row, state="interrupted", reason=f"{_DEAD_WORDS[job.state]}{after}{_goes_on(found)}")
    how = _FAILED_WORDS.get(job.state) or f"ended as {job.state}" + (f" ({job.reason})" if job.reason else "")
    if job.state == "OUT_OF_MEMORY":
        asked = row.stage.resources.get("memory_gb")
        how += f" ({asked:g} GB were asked for)" if isinstance(asked, int | float) else ""
        how += f": name more under stages: {{{_name(row.stage)}: {{memory_gb: ...}}}} in the profile"
    words = "" if job.state == "OUT_OF_MEMORY" else _last_words(row.stage.stderr)
    return replace(row, state="failed", error=f"its job {how}" + (f"; last words: {words}" if words else ""))


def _goes_on(found: _Seen) -> str:
    return "; a retry goes on from its checkpoint" if _listing(found.folder / CHECKPOINTS) else ""


def _why_it_waits(job: JobState, needs: Sequence[Row]) -> str:
    lacks = [one.stage.title for one in needs if one.state != "done"]
    if job.reason == "Dependency":
        return f"waits for {_few(lacks)}" if lacks else "waits for what it needs"
    words = {
        "Priority": "waits for its turn",
        "Resources": "waits for a free node",
        "JobArrayTaskLimit": "waits for its turn (--parallel)",
        "BeginTime": "was put back into the queue",
    }
    if job.reason.startswith("JobHeld"):
        return f"held ({job.reason})"
    return words.get(job.reason, job.reason or "waits for its turn")


def _few(words: Sequence[str]) -> str:
    return ", ".join(words) if len(words) <= 3 else f"{', '.join(words[:2])} and {len(words) - 2} more"


def _progress(folder: Path) -> dict[str, Any]:
    """Return the last line of metrics of a stage, and how many steps there are where its settings say so."""
    try:
        with (folder / TRACKING / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return {}
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            values = json.loads(line)
            if isinstance(values, dict) and "step" in values:
                return values | _steps(folder / CONFIG)
    return {}


@lru_cache(maxsize=4096)
def _steps(config: Path) -> dict[str, int]:
    """``{"steps": n}`` of a stage's settings; it does not change, and YAML takes a while to read."""
    import yaml

    try:
        record = yaml.load(config.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return {"steps": int(record["config"]["training"]["steps"])}
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return {}


_NOISE = re.compile(r"^(srun: |submitit |.*submitit (INFO|WARNING)|\s)")


def _last_words(log: str) -> str:
    """Return the last line of a log that tells something, or nothing."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 16384))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    telling = [line.strip() for line in lines if line.strip() and not _NOISE.match(line)]
    return telling[-1][:300] if telling else ""


def _earlier(store: Store, submission: Submission, fingerprints: set[str]) -> dict[str, tuple[SubmittedStage, str]]:
    """Return these stages as the last submission before recorded them that had jobs for them, and when that was."""
    found: dict[str, tuple[SubmittedStage, str]] = {}
    for record in submissions.history(store):
        if record.id != submission.id and record.created <= submission.created:
            for one in record.stages:
                if one.job and one.fingerprint in fingerprints and one.fingerprint not in found:
                    found[one.fingerprint] = (replace(one, shared=True), record.created)
    return found


def _wanted_by(records: Sequence[Submission], fingerprints: set[str]) -> set[str]:
    """Return which of these stages live jobs of other submissions wait for, themselves or for what they need."""
    others = [
        record for record in records if any(one.shared and one.fingerprint in fingerprints for one in record.stages)
    ]
    jobs = {one.job for record in others for one in record.stages if one.job and not one.shared}
    live = queue.live_jobs(jobs) if jobs else {}
    wanted: set[str] = set()
    for record in others:
        for one in reversed(record.stages):  # what it needs comes before it
            if (one.job in live and not one.shared) or one.fingerprint in wanted:
                wanted |= {one.fingerprint, *one.needs}
    return wanted & fingerprints


def _cancelled_path(store: Store) -> Path:
    return submissions.folder(store).parent / CANCELLED


def _listing(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one where there is none that can be read."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _name(stage: SubmittedStage) -> str:
    return stage.key.partition("/")[0]


def _labels(stage: SubmittedStage) -> list[str]:
    """``lowlevel [clusters=8, clusters=16]`` is known by each of its labels."""
    match = re.search(r"\[(.*)\]$", stage.title)
    return [match.group(1), *match.group(1).split(", ")] if match else []


def _seconds_since(when: Any) -> float | None:
    try:
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(str(when))).total_seconds())
    except (TypeError, ValueError):
        return None
