"""The protocol that every tracker follows, what it is handed, and the trackers that need no library."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

logger = logging.getLogger(__name__)

Status = Literal["done", "failed", "interrupted"]
"""How a stage ended; only ``done`` counts as success."""


@dataclass(frozen=True)
class Table:
    """Rows of numbers, words and images; a ``Path`` in a cell is an image file, None an empty cell.

    Tables of one name have the same columns in every run, and the same values in those that name the row, so that runs
    can be joined on them.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Artifact:
    """Files that a run made, and what they were made from.

    Attributes:
        name: unchanging, ``<stage>-<fingerprint>``: what another run names in ``uses``.
        type: ``checkpoint``, ``reconstructions``, ``scores``, ``leaderboard``, ...
        files: name in the artifact -> file that is kept with it.
        references: likewise, of files that stay where they are; only their place, size and digest are kept.
        metadata: JSON-able.
        uses: names of the artifacts that the run read.
    """

    name: str
    type: str
    files: Mapping[str, Path]
    references: Mapping[str, Path] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    uses: tuple[str, ...] = ()


class Tracker(Protocol):
    """Where one stage reports what it measures while it runs. No method raises because a service is unreachable."""

    def log(self, metrics: Mapping[str, float], step: int, when: float | None = None) -> None:
        """Record ``metrics`` (name -> number) as they were after optimiser step ``step``.

        ``when`` is in seconds since 1970, for what is told later; now by default.
        """

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record JSON-able values that describe the whole stage, such as its final scores."""

    def image(self, name: str, path: Path) -> None:
        """Record the image file at ``path`` under ``name``."""

    def table(self, table: Table) -> None:
        """Record a table."""

    def artifact(self, artifact: Artifact) -> None:
        """Record what the run made; its files must not change afterwards."""

    def finish(self, status: Status = "done") -> None:
        """Close the record; nothing may be logged afterwards."""


class NoTracker:
    """Records nothing."""

    def log(self, metrics: Mapping[str, float], step: int, when: float | None = None) -> None:
        """Ignore the metrics."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Ignore the values."""

    def image(self, name: str, path: Path) -> None:
        """Ignore the image."""

    def table(self, table: Table) -> None:
        """Ignore the table."""

    def artifact(self, artifact: Artifact) -> None:
        """Ignore the artifact."""

    def finish(self, status: Status = "done") -> None:
        """Do nothing."""


class MultiTracker:
    """Passes everything on to several trackers, in their order.

    One that raises, such as on a full disk, costs one warning and is left alone from then on; the others go on.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def log(self, metrics: Mapping[str, float], step: int, when: float | None = None) -> None:
        """Log to every tracker."""
        self._each("log", metrics, step, *(() if when is None else (when,)))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Give the values to every tracker."""
        self._each("summary", values)

    def image(self, name: str, path: Path) -> None:
        """Give the image to every tracker."""
        self._each("image", name, path)

    def table(self, table: Table) -> None:
        """Give the table to every tracker."""
        self._each("table", table)

    def artifact(self, artifact: Artifact) -> None:
        """Give the artifact to every tracker."""
        self._each("artifact", artifact)

    def finish(self, status: Status = "done") -> None:
        """Close every tracker."""
        self._each("finish", status)

    def _each(self, method: str, *arguments: Any) -> None:
        for tracker in self.trackers:
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:
                self.trackers = tuple(other for other in self.trackers if other is not tracker)
                name = type(tracker).__name__.removesuffix("Tracker")
                logger.warning("tracking: %s stopped at '%s' (%s); the stage goes on", name, method, error)


@contextlib.contextmanager
def in_place_of(folder: Path) -> Iterator[None]:
    """Let ``folder`` be written anew; what was there stays where that fails."""
    before = folder.with_name(f"{folder.name}.before")
    if folder.is_dir() and not before.is_dir():
        folder.rename(before)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    except BaseException:
        if before.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            before.rename(folder)
        raise
    shutil.rmtree(before, ignore_errors=True)
