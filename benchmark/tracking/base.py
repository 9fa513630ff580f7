"""The protocol that every tracker follows, and the two trackers that need no library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

Status = Literal["done", "failed", "interrupted"]
"""How a stage ended; only ``done`` counts as success."""


class Tracker(Protocol):
    """Where one stage reports what it measures while it runs. No method raises because a service is unreachable."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record ``metrics`` (name -> number) as they were after optimiser step ``step``."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record JSON-able values that describe the whole stage, such as its final scores."""

    def image(self, name: str, path: Path) -> None:
        """Record the image file at ``path`` under ``name``."""

    def finish(self, status: Status = "done") -> None:
        """Close the record; nothing may be logged afterwards."""


class NoTracker:
    """Records nothing."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Ignore the metrics."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Ignore the values."""

    def image(self, name: str, path: Path) -> None:
        """Ignore the image."""

    def finish(self, status: Status = "done") -> None:
        """Do nothing."""


class MultiTracker:
    """Passes everything on to several trackers, in their order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log to every tracker."""
        for tracker in self.trackers:
            tracker.log(metrics, step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Give the values to every tracker."""
        for tracker in self.trackers:
            tracker.summary(values)

    def image(self, name: str, path: Path) -> None:
        """Give the image to every tracker."""
        for tracker in self.trackers:
            tracker.image(name, path)

    def finish(self, status: Status = "done") -> None:
        """Close every tracker."""
        for tracker in self.trackers:
            tracker.finish(status)
