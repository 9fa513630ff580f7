"""What a stage's code is handed when it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmark.graph import Stage
    from benchmark.progress import Progress
    from benchmark.tracking import Tracker


@dataclass(frozen=True)
class StageContext:
    """The one argument of a stage's function, which returns a JSON-able dict: the summary kept in ``status.json``.

    Outputs go to ``out`` and nowhere else, as plain files; keep no absolute path in them, for a forced run is moved
    into its place when it is complete. State to resume from goes to ``checkpoints``, which is removed after success.
    """

    stage: Stage
    config: Mapping[str, Any]
    out: Path
    inputs: Mapping[str, Path]  # role -> folder of the upstream stage's result
    checkpoints: Path
    tracker: Tracker
    progress: Progress
    device: str
    threads: int
    checkpoint_seconds: float  # how much work may be lost at most
    data: Path | None = None  # the NSD tree that the user named; its digest, not its place, is in the fingerprint
