"""What a stage's folder says of it, as trackers are told: how its run is called, its scores, tables and artifacts.

All of it is read from the store, so that a run that is made again, long after the stage (:mod:`.rebuild`), is the run
that was made while it ran.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.results import Result, label_names
from benchmark.store import CONFIG, DONE, MANIFEST, STATUS, read_json
from benchmark.tracking.base import Artifact, Table, Tracker

if TYPE_CHECKING:
    from leaderboard import Interval

TABLE_IMAGES = 12  # of each subject, the first in the order of the test set: the same in every run
UPLOAD_BYTES = 1_000_000_000  # a larger file of weights is an artifact's reference, not its copy

_SCORES = "scores.parquet"
_COSTS = ("wall_s", "cpu_s", "peak_memory_bytes", "attempt")


def describe(record: Mapping[str, Any], manifest: Mapping[str, Any], sweep: str) -> dict[str, Any]:
    """Return what :func:`benchmark.tracking.open_tracker` is to be told of a stage, but for the folder.

    Args:
        record: the stage's ``config.yaml``.
        manifest: its ``manifest.json``.
        sweep: for which it runs.
    """
    config, label = record["config"], record["label"]
    stage = {name: value for name, value in record.items() if name != "config"}
    made_with = {name: manifest.get(name) for name in ("git", "python", "hardware", "command")}
    words = [record["name"], *label_names(label), config.get("track"), config.get("protocol")]
    return {
        "group": sweep,
        "job_type": record["name"],
        "run_id": record["fingerprint"][:16],
        "name": " ".join(part for part in (record["name"], label) if part),
        "config": {**config, "stage": stage, "made_with": made_with},
        "tags": tuple(dict.fromkeys(word for word in words if isinstance(word, str) and word)),
    }


def report(tracker: Tracker, folder: Path) -> None:
    """Tell a tracker what the stage in ``folder`` came to: costs, and of a finished one scores, tables and artifacts.

    Raises:
        OSError, ValueError, UserError: something in the folder cannot be read.
    """
    status = read_json(folder / STATUS)
    tracker.summary({name: status[name] for name in ("state", "error", *_COSTS) if name in status})
    if not (folder / DONE).is_file():
        return
    result = Result.read(folder)
    if (folder / _SCORES).is_file():
        scored = _Scored(result)
        tracker.summary(scored.summary())
        if table := scored.table():
            tracker.table(table)
    tracker.artifact(artifact_of(result))


def bounds(name: str, interval: Interval) -> dict[str, float | None]:
    """Return a score with the bounds of its interval, as summaries and tables have them."""
    return {name: interval.mean, f"{name}_ci_low": interval.ci_low, f"{name}_ci_high": interval.ci_high}


def artifact_name(key: str) -> str:
    """Return the name of the artifact of the stage with this key (``name/digits``)."""
    return key.replace("/", "-")


def artifact_of(result: Result) -> Artifact:
    """Return what a finished stage made, with what it was made from.

    Weights, scores and records are kept with the artifact; images and weights beyond :data:`UPLOAD_BYTES` stay in the
    store and are referred to. Data (recordings, features) are neither: the records hold their digests.
    """
    folder, record = result.folder, result.record
    weights = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    files = {"config.yaml": folder / CONFIG, "manifest.json": folder / MANIFEST, "outputs.json": folder / DONE}
    references: dict[str, Path] = {}
    if (folder / _SCORES).is_file():
        kind = "scores"
        files |= {name: folder / name for name in (_SCORES, "protocol.json")}
    elif (folder / "combined").is_dir():
        kind = "reconstructions"
        references = {path.relative_to(folder).as_posix(): path for path in sorted(folder.glob("*/*.png"))}
        files |= {path.name: path for path in folder.glob("index.npy")}
    elif weights:
        kind = "clusters" if record["name"].endswith("clusters") else "checkpoint"
        large = {name for name, path in weights.items() if path.stat().st_size > UPLOAD_BYTES}
        files |= {name: path for name, path in weights.items() if name not in large}
        references = {name: weights[name] for name in sorted(large)}
    else:
        kind = "records"
    metadata = {name: record[name] for name in ("name", "label", "fingerprint", "upstream", "digests", "config")}
    uses = tuple(dict.fromkeys(artifact_name(key) for key in record["upstream"].values()))
    name = artifact_name(f"{record['name']}/{record['fingerprint'][:16]}")
    return Artifact(name, kind, files, references, metadata, uses)


class _Scored:
    """The per-image scores of a stage ``score`` or ``references``."""

    def __init__(self, result: Result) -> None:
        import pyarrow.parquet as pq

        self.result = result
        self.scores = pq.read_table(result.folder / _SCORES)
        self.shown = result.config.get("images", "combined")

    def summary(self) -> dict[str, float | None]:
        """Return mean and interval of every metric; of other images than the variant's own under their name."""
        from leaderboard import summarise

        found: dict[str, float | None] = {}
        for (_, images), metrics in summarise(self.scores).items():
            for metric, interval in metrics.items():
                found |= bounds(metric if images == self.shown else f"{images}/{metric}", interval)
        return found

    def table(self) -> Table | None:
        """Return the first test images of each subject, as seen and reconstructed, with their scores.

        ``key`` names a row, in every run; ``image_id`` is the same for all subjects.
        """
        from benchmark.stages import KINDS, image_name, seen_name

        made = self.result.upstream("reconstruct")
        if made is None or self.result.record["name"] != "score":
            return None
        rows = [row for row in self.scores.to_pylist() if row["variant"] == self.shown]
        values = {(row["subject"], row["image_id"], row["metric"]): row["value"] for row in rows}
        metrics = tuple(dict.fromkeys(row["metric"] for row in rows))
        images = sorted({row["image_id"] for row in rows})[:TABLE_IMAGES]
        kinds = (*KINDS, *([] if self.shown in KINDS else [self.shown]))
        lines: list[tuple[Any, ...]] = []
        for subject, image in sorted({(row["subject"], row["image_id"]) for row in rows}):
            if image in images:
                file = image_name(subject, image)
                places = [made.folder / "seen" / seen_name(image), *(made.folder / kind / file for kind in kinds)]
                lines.append((
                    file.removesuffix(".png"), image, subject,
                    *(place if place.is_file() else None for place in places),
                    *(values.get((subject, image, metric)) for metric in metrics),
                ))  # fmt: skip
        return Table("reconstructions", ("key", "image_id", "subject", "seen", *kinds, *metrics), tuple(lines))
