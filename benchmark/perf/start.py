"""Entry ``start``: how long a command takes to answer, and a sweep of which every stage is done already."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from benchmark.errors import RunError
from benchmark.perf import sweep
from benchmark.perf.entries import COMMANDS, Job, Part, Results
from benchmark.perf.typed import typed


def _help(_: None, job: Job, command: str) -> Results:
    if not typed(command, "--help").startswith(f"usage: python -m {command} "):
        raise RunError(f"python -m {command} --help does not say how the command is used")
    return {}


def _done(job: Job) -> tempfile.TemporaryDirectory[str]:
    """Run the sweep; return the folder that it wrote, which is removed with what is returned."""
    folder = tempfile.TemporaryDirectory()
    typed(*sweep.arguments(job, Path(folder.name)))
    return folder


def _again(folder: tempfile.TemporaryDirectory[str], job: Job) -> Results:
    out = Path(folder.name)
    before = {path: path.stat().st_mtime_ns for path in (out / "store").rglob("*.safetensors")}
    text = typed(*sweep.arguments(job, out))
    if any(path.stat().st_mtime_ns != time for path, time in before.items()) or "clusters=" not in text:
        raise RunError("the sweep that was done already was not read, but run")
    return {}


PARTS: tuple[Part, ...] = (
    *(
        Part(f"{command} --help", lambda job: None, partial(_help, command=command), starts_processes=True)
        for command in COMMANDS
    ),
    Part("cached sweep", _done, _again, starts_processes=True),
)
TOLERANCES: Mapping[str, float] = {}
