"""Trackers: Weights & Biases, TensorBoard, or the stage's own JSON lines alone, behind one protocol.

``open_tracker`` is all that the rest of the harness needs. Importing this package imports neither W&B nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark.errors import UserError, did_you_mean
from benchmark.tracking.base import Artifact, MultiTracker, NoTracker, Status, Table, Tracker
from benchmark.tracking.jsonl import JsonLinesTracker

__all__ = ["KINDS", "Artifact", "MultiTracker", "NoTracker", "Status", "Table", "Tracker", "open_tracker"]

KINDS = ("wandb", "jsonl", "tensorboard", "none")


def open_tracker(
    kind: str,
    folder: Path,
    *,
    group: str,
    job_type: str,
    run_id: str,
    name: str,
    config: Mapping[str, Any],
    tags: Sequence[str] = (),
    mode: str | None = None,
) -> Tracker:
    """Open the tracker of one stage.

    Args:
        kind: ``wandb`` or ``tensorboard`` (and JSON lines beside either), ``jsonl`` or ``none``.
        folder: folder of the stage's tracking: ``metrics.jsonl`` and the service's own files are written inside.
        group: the sweep.
        job_type: the stage.
        run_id: unchanging id of the stage, made from its fingerprint, so that a resumed stage continues its run.
        name: what people read.
        config: resolved config of the stage.
        tags: words to find it by.
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
    run: dict[str, Any] = {
        "group": group,
        "job_type": job_type,
        "run_id": run_id,
        "name": name,
        "config": config,
        "tags": tags,
    }
    return MultiTracker([lines, open_service(kind, folder, mode=mode, **run)])


def open_service(kind: str, folder: Path, *, mode: str | None = None, replace: bool = False, **run: Any) -> Tracker:
    """Open a service's own record of a stage, without JSON lines; arguments as of :func:`open_tracker`.

    ``replace`` writes the record of a stage anew, where it was written before.
    """
    # Both take a while to import: only where they are wanted.
    if kind == "tensorboard":
        from benchmark.tracking.tensorboard_tracker import TensorBoardTracker

        return TensorBoardTracker(folder, replace=replace, **run)
    from benchmark.tracking.wandb_tracker import WandbTracker

    return WandbTracker(folder, mode=mode, replace=replace, **run)
