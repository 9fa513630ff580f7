"""Metrics as JSON lines: one object a line, appended, readable with any tool and after any crash."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmark.tracking.base import Artifact, Status, Table

FILE_NAME = "metrics.jsonl"


class JsonLinesTracker:
    """Appends to ``folder/metrics.jsonl``.

    Lines are ``{"time", "step", <metric>: number, ...}`` for metrics, and ``{"time", "summary": {...}}``,
    ``{"time", "image": name, "path": file}`` and ``{"time", "status": ...}`` for the rest; ``time`` is in seconds
    since 1970. Tables and artifacts are made of the stage's own files, and only named (``{"time", "table": name}``).

    Every line is handed to the system in one write, so a killed process leaves at most one half line, which the next
    tracker on the same file cuts off. A resumed stage appends: where a step occurs twice, the later line holds.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE_NAME
        _cut_half_line(self.path)
        self._file: int | None = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def log(self, metrics: Mapping[str, float], step: int, when: float | None = None) -> None:
        """Append the metrics of ``step``; a value that is not finite is written as null."""
        self._write({"step": step, **{name: float(value) for name, value in metrics.items()}}, when)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Append the summary."""
        self._write({"summary": dict(values)})

    def image(self, name: str, path: Path) -> None:
        """Append the place of the image, relative to the folder of the metrics where it lies inside or beside it."""
        folder = self.path.parent.resolve()
        place = path.resolve()
        near = place.is_relative_to(folder.parent)
        self._write({"image": name, "path": os.path.relpath(place, folder) if near else str(place)})

    def table(self, table: Table) -> None:
        """Append the table's name."""
        self._write({"table": table.name})

    def artifact(self, artifact: Artifact) -> None:
        """Append the artifact's name and type."""
        self._write({"artifact": artifact.name, "type": artifact.type})

    def finish(self, status: Status = "done") -> None:
        """Append the status and close the file."""
        if self._file is not None:
            self._write({"status": status})
            os.close(self._file)
            self._file = None

    def _write(self, record: dict[str, Any], when: float | None = None) -> None:
        if self._file is None:
            raise ValueError(f"{self.path}: nothing can be logged after finish()")
        line = json.dumps(_finite({"time": round(when or time.time(), 3), **record}), allow_nan=False)
        os.write(self._file, (line + "\n").encode())


def _finite(value: Any) -> Any:
    """Return ``value`` with NaN and infinities replaced by None: JSON has no word for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _cut_half_line(path: Path) -> None:
    """Cut off what follows the last newline of ``path``: the rest of a line that a killed process left unfinished."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
