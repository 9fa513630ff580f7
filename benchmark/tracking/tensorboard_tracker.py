"""TensorBoard: event files that need no account, no service and no network to be read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark.graph import flat
from benchmark.tracking.base import Artifact, Status, Table

FOLDER = "tensorboard"
_CELL = 96  # pixels of an image in a table's grid


class TensorBoardTracker:
    """Writes ``folder/tensorboard``: ``tensorboard --logdir runs/store`` shows every stage of a store.

    Metrics are scalars over the optimiser step (``epoch`` is one of them). Settings are text and hyper-parameters, the
    numbers of the summary are the metrics beside these, a table is text with its images as a grid, and an artifact is
    text. A resumed stage hides what it repeats.

    Args:
        folder: of the stage's tracking.
        group, job_type, run_id, name, config, tags: of the run.
        replace: drop what an earlier record of the stage holds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        group: str,
        job_type: str,
        run_id: str,
        name: str,
        config: Mapping[str, Any],
        tags: Sequence[str] = (),
        replace: bool = False,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # brings in torch

        place = folder / FOLDER
        if replace:
            shutil.rmtree(place, ignore_errors=True)
        self._resumes = place.is_dir()
        self._writer: Any = SummaryWriter(log_dir=str(place))
        self._step = 0
        self._config = flat(config)
        self._summary: dict[str, Any] = {}
        self._numbers: dict[str, float] = {}
        about = {"name": name, "group": group, "job_type": job_type, "id": run_id, "tags": list(tags)}
        self._text("run", _code(about))
        self._text("config", _code(config))

    def log(self, metrics: Mapping[str, float], step: int, when: float | None = None) -> None:
        """Add a scalar a metric."""
        if self._resumes:
            self._hide_from(step, when)
            self._resumes = False
        self._step = step
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step, walltime=when)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Add numbers as scalars under ``summary/``; all values are text in the end."""
        self._summary |= values
        for name, value in flat(values).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._numbers[name] = float(value)
                self._writer.add_scalar(f"summary/{name}", float(value), self._step)

    def image(self, name: str, path: Path) -> None:
        """Add the image."""
        self._writer.add_image(name, _pixels(path), self._step, dataformats="HWC")

    def table(self, table: Table) -> None:
        """Add the table as text, and a grid of its images: a row a row, a column a column of images."""
        lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
        lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in table.rows]
        self._text(table.name, "\n".join(lines))
        pictures = [[cell for cell in row if isinstance(cell, Path)] for row in table.rows]
        if any(pictures):
            self._writer.add_image(table.name, _grid(pictures), self._step, dataformats="HWC")

    def artifact(self, artifact: Artifact) -> None:
        """Add where the artifact's files are, and what they were made from."""
        about = {
            "type": artifact.type,
            "uses": list(artifact.uses),
            "files": {name: str(path.resolve()) for name, path in artifact.files.items()},
            "references": len(artifact.references),
            **artifact.metadata,
        }
        self._text(f"artifact/{artifact.name}", _code(about))

    def finish(self, status: Status = "done") -> None:
        """Add the status and the hyper-parameters with what they came to, and close the file."""
        if self._writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        self._text("summary", _code(self._summary))
        self._text("status", status)
        parameters = {
            name: value if isinstance(value, int | float | bool | str) else json.dumps(value)
            for name, value in self._config.items()
        }
        for part in hparams(parameters, {f"summary/{name}": value for name, value in self._numbers.items()}):
            self._writer.file_writer.add_summary(part)
        self._writer.close()
        self._writer = None

    def _text(self, name: str, text: str) -> None:
        self._writer.add_text(name, text, self._step)

    def _hide_from(self, step: int, when: float | None) -> None:
        """Have readers forget what earlier attempts logged from ``step`` on, as ``purge_step`` of the writer does."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        event = Event(session_log=SessionLog(status=SessionLog.START))
        self._writer.file_writer.add_event(event, step, when)


def _code(value: Mapping[str, Any]) -> str:
    """Markdown of JSON, which TensorBoard shows as it is."""
    text = json.dumps(dict(value), indent=2, ensure_ascii=False, default=str)
    return "".join(f"    {line}\n" for line in text.splitlines())


def _cell(value: Any) -> str:
    if isinstance(value, Path):
        return value.name
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _pixels(path: Path, size: int | None = None) -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        found = image.convert("RGB")
    return np.asarray(found if size is None else found.resize((size, size)))


def _grid(pictures: Sequence[Sequence[Path]]) -> Any:
    import numpy as np

    width = max(map(len, pictures))
    blank = np.zeros((_CELL, _CELL, 3), np.uint8)
    rows = [[*(_pixels(path, _CELL) for path in row), *([blank] * (width - len(row)))] for row in pictures]
    return np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0)
