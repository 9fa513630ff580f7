"""Trackers: Weights & Biases, JSON lines, or nothing, behind one protocol.

``open_tracker`` is all that the rest of the harness needs. Importing this package does not import W&B.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmark.errors import UserError, did_you_mean
from benchmark.tracking.base import MultiTracker, NoTracker, Status, Tracker
from benchmark.tracking.jsonl import JsonLinesTracker

__all__ = ["KINDS", "MultiTracker", "NoTracker", "Status", "Tracker", "open_tracker"]

KINDS = ("wandb", "jsonl", "none")


def open_tracker(
    kind: str,
    folder: Path,
    *,
    group: str,
    job_type: str,
    run_id: str,
    name: str,
    config: Mapping[str, Any],
    mode: str | None = None,
) -> Tracker:
    """Open the tracker of one stage.

    Args:
        kind: ``wandb`` (W&B, and JSON lines beside it), ``jsonl`` or ``none``.
        folder: folder of the stage: ``metrics.jsonl`` and W&B's own files are written inside.
        group: the sweep.
        job_type: the stage.
        run_id: unchanging id of the stage, made from its fingerprint, so that a resumed stage continues its run.
        name: what people read.
        config: resolved config of the stage.
        mode: W&B's mode (``online``, ``offline``, ``disabled``); by default ``WANDB_MODE``, else what ``wandb online``
            or ``wandb offline`` chose, else online where a W&B key is found and offline elsewhere.

    Raises:
        UserError: for an unknown kind. Trouble with W&B is a warning, never an error.
    """
    if kind not in KINDS:
        raise UserError(f"unknown tracker '{kind}'{did_you_mean(kind, KINDS)}: choose one of {', '.join(KINDS)}")
    if kind == "none":
        return NoTracker()
    lines = JsonLinesTracker(folder)
    if kind == "jsonl":
        return lines
    # W&B takes half a second to import: only where it is wanted.
    from benchmark.tracking.wandb_tracker import WandbTracker

    wandb = WandbTracker(folder, group=group, job_type=job_type, run_id=run_id, name=name, config=config, mode=mode)
    return MultiTracker([lines, wandb])
