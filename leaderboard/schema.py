"""The result row: what one variant scored, at what cost, made from what. One JSON file a row.

A row with ``kind="method"`` is ranked. ``"reference"`` rows (chance, shuffled, mean image) and ``"branch"`` rows (one
branch of a variant alone) stand in the same tables, in sections of their own, without a rank.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from metrics.cards import CARDS, unknown_metrics

SCHEMA_VERSION: Literal[2] = 2
"""Of a row. Raised with every change of its fields, together with a step in :data:`UPGRADES` and a fixture."""

UPGRADES: Mapping[int, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    1: dict,  # 2 added data, answers, judges, config and changed, which say nothing where they are absent
}
"""Version -> what makes a row of the next version from one of this."""

_NonNegative = Annotated[FiniteFloat, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Interval(_Record):
    """A mean and the bounds of its 95 % confidence interval, in the metric's own unit.

    A value that is known without sampling (chance) or that was published without an interval has no bounds.
    """

    mean: FiniteFloat
    ci_low: FiniteFloat | None = None
    ci_high: FiniteFloat | None = None

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if (self.ci_low is None) != (self.ci_high is None):
            raise ValueError("give both ci_low and ci_high, or neither")
        if self.ci_low is not None and self.ci_high is not None and self.ci_low > self.ci_high:
            raise ValueError(f"ci_low {self.ci_low} is above ci_high {self.ci_high}")
        return self


class Cost(_Record):
    """What a row's training cost, shared stages included, a mean over its seeds; ``None``: it was not measured."""

    gpu_hours: _NonNegative | None = None
    wall_s: _NonNegative | None = None
    peak_memory_bytes: Annotated[int, Field(ge=0)] | None = None
    parameters: Annotated[int, Field(ge=0)] | None = None


class Manifest(_Record):
    """What a row was made from."""

    git: str | None = Field(default=None, description="commit of the code, with '+dirty' where files had changed")
    packages: dict[str, str] = Field(default_factory=dict, description="package name -> version")
    hardware: dict[str, str] = Field(default_factory=dict, description="what -> name, e.g. cpu, gpu, memory")
    seeds: dict[str, int] = Field(default_factory=dict, description="role -> seed of the first training, e.g. variant")
    data: dict[str, str] = Field(default_factory=dict, description="name of a data file or tree -> SHA-256")
    weights: dict[str, str] = Field(default_factory=dict, description="name of a frozen network -> SHA-256")


class Row(_Record):
    """One variant of one method on one track, scored under one protocol.

    Rows of every older schema version are read, as rows of this one (:data:`UPGRADES`).
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    method: Annotated[str, Field(min_length=1)]
    variant: str = Field(description="e.g. 'clusters=128'; empty for a method that has only one")
    track: Annotated[str, Field(min_length=1, description="'demo' or 'paper': never ranked in one table")]
    protocol: Annotated[str, Field(min_length=1, description="name of the scoring protocol")]
    protocol_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]
    subjects: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, description="as in NSD, from 1")]
    seeds: Annotated[tuple[int, ...], Field(description="of the trainings that the row is over")] = ()
    n_images: Annotated[int, Field(ge=1, description="test images a subject")]
    metrics: dict[str, Interval]
    cost: Cost = Cost()
    manifest: Manifest = Manifest()
    source: Annotated[str, Field(min_length=1, description="where the row comes from: a run folder, a paper")]
    kind: Literal["method", "reference", "branch"] = "method"
    notes: str = ""
    data: str = Field("", description="fMRI of the test subject that was trained on, e.g. '1h', 'full'; as published")
    answers: str = Field("", description="id of the published row that this one repeats")
    judges: dict[str, str] = Field(default_factory=dict, description="metric key -> the network that fills it")
    config: dict[str, JsonValue] = Field(default_factory=dict, description="dotted name of a setting -> its value")
    changed: dict[str, JsonValue] = Field(
        default_factory=dict, description="dotted name of a setting that is not its preset's -> the preset's value"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_an_older_version(cls, data: Any) -> Any:
        version = data.get("schema_version", SCHEMA_VERSION) if isinstance(data, Mapping) else SCHEMA_VERSION
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ValueError(f"schema_version is {version!r}; expected a number from 1 to {SCHEMA_VERSION}")
        if version > SCHEMA_VERSION:
            raise ValueError(f"of schema version {version}; this release reads up to {SCHEMA_VERSION}, so update it")
        for step in range(version, SCHEMA_VERSION):
            data = {**UPGRADES[step](data), "schema_version": step + 1}
        return data

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, metrics: dict[str, Interval]) -> dict[str, Interval]:
        if unknown := unknown_metrics(metrics):
            raise ValueError(unknown)
        return {key: metrics[key] for key in CARDS if key in metrics}

    @property
    def name(self) -> str:
        """The row's short name: its variant, or its method where that has only one variant."""
        return self.variant or self.method

    @property
    def key(self) -> tuple[str, str]:
        """Method and variant, the row's identity within a track."""
        return self.method, self.variant


def row_id(row: Row) -> str:
    """Return the row's id: readable, safe on every file system, and different for different rows."""
    identity = json.dumps([row.track, row.method, row.variant, row.protocol_hash, row.seeds])
    slug = re.sub(r"[^a-z0-9]+", "-", f"{row.track} {row.method} {row.variant}".lower()).strip("-")[:80]
    return f"{slug}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide results from the group that a cluster shares them with
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _as_json(data: object) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_row(folder: Path, row: Row) -> Path:
    """Write a row to its file in ``folder`` (``results/*.json``), replacing an older one of the same identity."""
    path = folder / f"{row_id(row)}.json"
    write_atomically(path, _as_json(row.model_dump(mode="json")))
    return path


def read_row(path: Path) -> Row:
    """Read one row.

    Raises:
        ValueError: the file is not JSON, or not a result row; the message names the file and the field.
    """
    return _parse(path, _load(path))


def read_rows(folder: Path) -> list[Row]:
    """Read every ``*.json`` in ``folder``, in the order of the file names."""
    return [read_row(path) for path in sorted(folder.glob("*.json"))]


def write_leaderboard(path: Path, rows: Iterable[Row]) -> None:
    """Write ``{"rows": [...]}``, in the order given."""
    write_atomically(path, _as_json({"rows": [row.model_dump(mode="json") for row in rows]}))


def read_leaderboard(path: Path) -> list[Row]:
    """Read a ``leaderboard.json``.

    Raises:
        ValueError: the file is not JSON, has no list ``rows``, or holds something that is not a result row.
    """
    data = _load(path)
    if not isinstance(data, dict) or not isinstance(data.get("rows"), list):
        raise ValueError(f'{path}: expected {{"rows": [...]}}; build the leaderboard again')
    return [_parse(path, entry, f"rows[{index}].") for index, entry in enumerate(data["rows"])]


def _load(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); delete it and build the leaderboard again") from error


def _parse(path: Path, data: object, where: str = "") -> Row:
    try:
        return Row.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = where + ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: not a result row: {field or 'top level'}: {first['msg']}") from error
