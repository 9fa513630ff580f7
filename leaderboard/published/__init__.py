"""What papers printed: 121 rows of results as data (``rows.json``), each with its source.

A row says where its numbers were read, on how many images and which trials they were taken, which scoring protocol the
authors used as far as that is known, and who agrees or disagrees with them. A cell that nobody could read is missing;
none is guessed. Rows whose protocols differ compare with nothing but themselves: ``docs/protocols.md``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator

from metrics.cards import CARDS

ROWS = Path(__file__).with_name("rows.json")

Evidence = Literal["primary_text", "primary_image", "repository_output", "quoted_by_another_paper", "not_read"]
"""Where the numbers were read: the paper's own text, a picture of its table, what the authors' code left in their
repository, another paper that quotes them; or nowhere."""


class PublishedRow(BaseModel):
    """One row of a published table.

    ``data`` is how much fMRI of the test subject the model was trained on; ``subjects``, ``test_images`` and
    ``protocol`` are None where no source states them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    method: Annotated[str, Field(min_length=1)]
    variant: str
    data: Annotated[str, Field(min_length=1)]
    subjects: tuple[Annotated[int, Field(ge=1, le=8)], ...] | None
    test_images: Annotated[int, Field(ge=1)] | None
    test_trials: Annotated[str, Field(min_length=1)]
    protocol: str | None = Field(description="name of the scoring protocol; None: unknown, or none of this project's")
    protocol_inferred: bool = Field(description="the authors' evaluation code was not seen for this row")
    metrics: dict[str, FiniteFloat] = Field(description="key -> value; identification as a share, not in per cent")
    other_metrics: dict[str, FiniteFloat] = Field(description="metrics that this project does not compute")
    evidence: Evidence
    source: Annotated[str, Field(min_length=1)]
    agreements: tuple[str, ...] = Field(description="other sources that give the same numbers")
    conflicts: tuple[str, ...] = Field(description="other sources that give other numbers")
    notes: str

    @field_validator("metrics")
    @classmethod
    def _values_in_range(cls, metrics: dict[str, float]) -> dict[str, float]:
        for key, value in metrics.items():
            if key not in CARDS:
                raise ValueError(f"unknown metric {key}; known: {', '.join(CARDS)}")
            card = CARDS[key]
            high = math.inf if card.high is None else card.high
            if not card.low <= value <= high:
                raise ValueError(f"{key} is {value}, outside {card.low:g} to {high:g}")
        return metrics

    @property
    def name(self) -> str:
        """Method and variant, for people."""
        return f"{self.method}, {self.variant}" if self.variant else self.method

    def cell(self, key: str) -> str:
        """Return a value as papers print it, such as ``98.4%`` or ``0.386``; empty where it was not read."""
        value = self.metrics.get(key)
        return "" if value is None else CARDS[key].format(value)


def read_published(path: Path = ROWS) -> tuple[PublishedRow, ...]:
    """Read published rows, in the file's order.

    Raises:
        ValueError: not JSON, not rows, or two of one id; the message names the row and the field.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: expected {{"rows": [...]}} ({error})') from error
    rows: dict[str, PublishedRow] = {}
    for k, entry in enumerate(entries):
        try:
            row = PublishedRow.model_validate(entry)
        except ValidationError as error:
            first = error.errors()[0]
            which = entry.get("id", f"number {k}") if isinstance(entry, dict) else f"number {k}"
            field = ".".join(map(str, first["loc"]))
            raise ValueError(f"{path}: row {which}: {field}: {first['msg']}") from error
        if row.id in rows:
            raise ValueError(f"{path}: two rows have the id {row.id}")
        rows[row.id] = row
    return tuple(rows.values())


@cache
def published() -> Mapping[str, PublishedRow]:
    """Return the published rows by id."""
    return MappingProxyType({row.id: row for row in read_published()})
