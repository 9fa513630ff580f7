"""The run of a finished sweep: its leaderboard."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.graph import canonical_json
from benchmark.store import TRACKING
from benchmark.tracking import MultiTracker, open_service
from benchmark.tracking.base import Artifact, Table, Tracker, in_place_of
from benchmark.tracking.findings import artifact_name, bounds
from benchmark.tracking.jsonl import FILE_NAME, JsonLinesTracker

if TYPE_CHECKING:
    from benchmark.report.answers import Answer
    from leaderboard import Row

JOB_TYPE = "leaderboard"


def board_folder(out: Path, sweep: str) -> Path:
    """Return where the runs of a sweep's leaderboards are tracked, a folder an id."""
    from benchmark.report.answers import FOLDER

    return out / FOLDER / sweep / TRACKING


def board_id(rows: tuple[Row, ...]) -> str:
    """Return the run id of a leaderboard, made of its rows and the stages that they were scored by."""
    from leaderboard.schema import row_id

    return hashlib.sha256(canonical_json(sorted([row_id(row), row.source] for row in rows)).encode()).hexdigest()[:16]


def track_board(out: Path, answer: Answer, kind: str, mode: str | None = None, replace: bool = False) -> bool:
    """Track the leaderboard of a finished sweep in a service, once; return whether that was done now.

    Args:
        out: folder of the run.
        answer: what the sweep found.
        kind: ``wandb`` or ``tensorboard``.
        mode: W&B's mode.
        replace: track it again where it was tracked before.
    """
    run_id = board_id(answer.rows)
    folder = board_folder(out, answer.sweep) / run_id
    known = (folder / kind).is_dir()
    if known and not replace:
        return False
    (folder / FILE_NAME).unlink(missing_ok=True)
    first = answer.rows[0]
    about = {name: getattr(first, name) for name in ("track", "protocol", "protocol_hash")}
    about |= {"subjects": list(first.subjects), "n_images": first.n_images, "seeds": list(first.seeds)}
    stages = {row.name: row.source for row in answer.rows}
    with in_place_of(folder / kind):
        service = open_service(
            kind,
            folder,
            mode=mode,
            replace=replace,
            group=answer.sweep,
            job_type=JOB_TYPE,
            run_id=run_id,
            name=f"{JOB_TYPE} {answer.sweep}",
            config={"sweep": answer.sweep, "title": answer.title, "answers": answer.table, "rows": stages, **about},
            tags=(JOB_TYPE, answer.sweep, first.track, first.protocol),
        )
        tracker = MultiTracker([JsonLinesTracker(folder), service])
        try:
            _tell(tracker, out, folder, answer, run_id)
        finally:
            tracker.finish("done")
    return True


def _tell(tracker: Tracker, out: Path, folder: Path, answer: Answer, run_id: str) -> None:
    from leaderboard.results import RESULTS
    from leaderboard.schema import row_id, write_leaderboard

    summary: dict[str, Any] = {"rows": len(answer.rows), "sentences": list(answer.sentences)}
    lines = []
    for row in answer.rows:
        scores: dict[str, Any] = {}
        for metric, interval in row.metrics.items():
            scores |= bounds(metric, interval)
        summary |= {f"{row.name}/{name}": value for name, value in scores.items() if value is not None}
        cost = {name: getattr(row.cost, name) for name in ("wall_s", "gpu_hours", "parameters")}
        about = {"key": row_id(row), "method": row.method, "variant": row.variant, "kind": row.kind}
        lines.append({**about, **scores, **cost})
    tracker.summary(summary)
    columns = tuple(dict.fromkeys(name for line in lines for name in line))
    tracker.table(Table(JOB_TYPE, columns, tuple(tuple(line.get(name) for name in columns) for line in lines)))
    write_leaderboard(folder / "leaderboard.json", answer.rows)
    files = {"leaderboard.json": folder / "leaderboard.json"}
    for row in answer.rows:
        for end in (".json", ".parquet"):
            file = out / "leaderboard" / RESULTS / f"{row_id(row)}{end}"
            files |= {f"{RESULTS}/{file.name}": file} if file.is_file() else {}
    keys = [f"{place.parent.name}/{place.name}" for row in answer.rows if len((place := Path(row.source)).parts) > 1]
    uses = tuple(dict.fromkeys(artifact_name(key) for key in keys))
    metadata = {"sweep": answer.sweep, "rows": {row_id(row): row.source for row in answer.rows}}
    tracker.artifact(Artifact(f"{JOB_TYPE}-{run_id}", JOB_TYPE, files, metadata=metadata, uses=uses))
