"""The record of what was submitted to a cluster: one JSON file a submission, in the store, read by whoever asks later.

A job belongs to nobody once the submitting shell is gone. The record says which job computes which stage, where its
output goes, what it waits for and what was typed, so that status, logs, cancel and retry need nothing else. What a
stage became is not in here: the stage folders are the truth, the queue knows the rest.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmark.errors import UserError, did_you_mean
from benchmark.store import Store, read_json, write_text

_STAMP = re.compile(r"-(\d{8}-\d{6})(?:-(\d+))?")  # what follows a sweep's name in an id


@dataclass(frozen=True)
class SubmittedStage:
    """One stage of a submission.

    Attributes:
        fingerprint: the stage's.
        key: its folder in the store, ``lowlevel/0123abcd...``.
        title: for people, ``lowlevel [clusters=8]``.
        job: ``1234_5`` (element of an array) or ``1234``; empty where the stage had its result, or was not asked for.
        needs: fingerprints of the stages that it reads.
        stdout, stderr: absolute paths of the job's output (of its first task); empty where there is no job.
        resources: what it asks for: gpus, cpus, memory_gb, hours, tasks, nodes, and more that the profile says.
        force: it computes again although a result exists.
        shared: the job is another submission's, which was there first.
    """

    fingerprint: str
    key: str
    title: str
    job: str = ""
    needs: tuple[str, ...] = ()
    stdout: str = ""
    stderr: str = ""
    resources: Mapping[str, Any] = field(default_factory=dict)
    force: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Submission:
    """What one command submitted, or found submitted.

    Attributes:
        id: ``clusters-20261123-191500``; with ``-2`` where that is taken.
        sweep: the sweep's name.
        command: what was typed.
        created: UTC, ISO 8601.
        revision: of the code, see :func:`benchmark.launch.job.code_revision`.
        out: absolute folder of ``--out``.
        stages: in the order of the plan.
        arguments: the command's options, as JSON (see :func:`benchmark.running.restore_arguments`).
    """

    id: str
    sweep: str
    command: str
    created: str
    revision: str
    out: str
    stages: tuple[SubmittedStage, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)


def folder(store: Store) -> Path:
    """Return where the records lie."""
    return store.root / ".jobs" / "submissions"


def logs(store: Store, identifier: str) -> Path:
    """Return where the jobs of a submission write their output, an absolute path."""
    return store.root.absolute() / ".jobs" / identifier


@contextmanager
def submit_lock(store: Store, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the store's submissions: from looking what is in the queue to having recorded what was added.

    ``on_wait`` is told once who holds them.

    Raises:
        UserError: the store cannot be written to, or its file system has no locks.
    """
    with store.hold(store.root / ".jobs" / "submit.lock", on_wait):
        yield


def new_id(store: Store, sweep: str) -> str:
    """Return an id for a submission made now; call it with the submit lock held."""
    name = f"{sweep}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    taken, number = name, 2
    while _file(store, taken).exists() or logs(store, taken).exists():
        taken, number = f"{name}-{number}", number + 1
    return taken


def write(store: Store, submission: Submission) -> Path:
    """Record a submission; return the record's path."""
    path = _file(store, submission.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(submission), ensure_ascii=False, allow_nan=False) + "\n")
    return path


def find(store: Store, name: str) -> Submission:
    """Return the submission of that id, or the newest one of the sweep of that name.

    Raises:
        UserError: there is none, or its record cannot be read.
    """
    paths = _paths(store)
    for path in paths:
        if path.stem == name:
            found = _read(path)
            if found is None:
                raise UserError(f"the record of submission {name} is damaged: {path}; type the sweep's command again")
            return found
    # By their names, the newest first, so that one record is read: that of a large sweep takes a while.
    dated = [
        (match[1], int(match[2] or 1), path) for path in paths if (match := _STAMP.fullmatch(path.stem, len(name)))
    ]
    for *_, path in sorted(dated, reverse=True):
        found = _read(path) if path.stem.startswith(name) else None
        if found is not None and found.sweep == name:
            return found
    records = history(store)
    for record in records:
        if record.sweep == name:
            return record
    if not records:
        raise UserError(
            f"no submission in {store.root}: nothing was submitted from it; "
            f"name its folder with --out DIR, or type: python -m benchmark.sweep {name} --launcher slurm"
        )
    known = list(dict.fromkeys(record.sweep for record in records))
    near = did_you_mean(name, known + [record.id for record in records])
    raise UserError(f"no submission '{name}' in {store.root}{near or '; there are those of ' + ', '.join(known)}")


def history(store: Store) -> list[Submission]:
    """Return all submissions, the newest first; records that cannot be read are left out."""
    records = [record for record in map(_read, _paths(store)) if record is not None]
    return sorted(records, key=lambda record: (record.created, record.id), reverse=True)


def live(store: Store) -> dict[str, str]:
    """Return fingerprint -> job, as last recorded for each stage; which of them still live the queue knows."""
    jobs: dict[str, str] = {}
    for record in history(store):
        for stage in record.stages:
            if stage.job:
                jobs.setdefault(stage.fingerprint, stage.job)
    return jobs


def _file(store: Store, identifier: str) -> Path:
    return folder(store) / f"{identifier}.json"


def _paths(store: Store) -> list[Path]:
    place = folder(store)
    return [place / name for name in os.listdir(place) if name.endswith(".json")] if place.is_dir() else []


def _read(path: Path) -> Submission | None:
    try:
        fields = read_json(path)
        stages = tuple(SubmittedStage(**{**one, "needs": tuple(one["needs"])}) for one in fields["stages"])
        return Submission(**{**fields, "stages": stages})
    except (OSError, ValueError, KeyError, TypeError):
        return None
