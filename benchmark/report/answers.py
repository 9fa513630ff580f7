"""What each finished sweep of a run found, kept beside the results, and all of them together on one page.

``OUT/sweeps/NAME/answer.json`` holds a sweep's rows, its orderings beside the published table's, and where its images
are; per-image scores lie with the rows (``OUT/leaderboard/results``). The newest run of a sweep replaces the one
before.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from pydantic import ValidationError

from benchmark.errors import UserError
from benchmark.report.grids import grid
from benchmark.store import write_json, write_text
from leaderboard.orderings import (
    DIFFERENCES,
    LEGEND,
    Difference,
    Ordering,
    differences_markdown,
    orderings_markdown,
    summary,
)
from leaderboard.ranking import Ranking, rank
from leaderboard.results import RESULTS, Result
from leaderboard.schema import Row, row_id, write_atomically
from leaderboard.site import Axis, Chapter, Gallery, build_report
from leaderboard.site.charts import sheet
from leaderboard.statistics import scores
from leaderboard.table import markdown

SCHEMA_VERSION = 2  # 1 had no differences
FOLDER, FILE = "sweeps", "answer.json"
GRIDS, CURVES = "grids", "curves"
_IMAGES = ("seen", "lowlevel", "semantic", "combined")


@dataclass(frozen=True)
class Answer:
    """What a finished sweep found.

    Attributes:
        sweep, title, question: of the sweep.
        table: the published table that it answers.
        rows: all rows, the ranked ones first.
        notes: metric -> what stands in for its network.
        sentences: findings in words.
        orderings: of the published table.
        differences: of every variant from the main one.
        axis: what was varied, where it is a number.
        galleries: seen and reconstructed images.
        pictures: whose images a row's scores are of, as in :class:`leaderboard.site.Chapter`.
    """

    sweep: str
    title: str
    question: str
    table: str
    rows: tuple[Row, ...]
    notes: dict[str, str] = field(default_factory=dict)
    sentences: tuple[str, ...] = ()
    orderings: tuple[Ordering, ...] = ()
    differences: tuple[Difference, ...] = ()
    axis: Axis | None = None
    galleries: tuple[Gallery, ...] = ()
    pictures: dict[str, tuple[str, str]] = field(default_factory=dict)

    def save(self, out: Path) -> Path:
        """Write the answer under a run's folder ``out``; image paths are kept relative to it where they can be."""
        folder = out / FOLDER / self.sweep
        folder.mkdir(parents=True, exist_ok=True)
        data = {
            "schema_version": SCHEMA_VERSION,
            **{name: getattr(self, name) for name in ("sweep", "title", "question", "table", "notes")},
            "sentences": list(self.sentences),
            "rows": [row.model_dump(mode="json") for row in self.rows],
            "orderings": [asdict(one) for one in self.orderings],
            "differences": [asdict(one) for one in self.differences],
            "axis": None if self.axis is None else {**asdict(self.axis), "values": dict(self.axis.values)},
            "galleries": [_relative(one, out) for one in self.galleries],
            "pictures": self.pictures,
        }
        write_json(folder / FILE, data)
        return folder / FILE

    @classmethod
    def load(cls, path: Path, out: Path) -> Self:
        """Read an answer of the run in ``out``; galleries whose images are gone are left out.

        Raises:
            UserError: not an answer, or of a later version.
        """
        try:
            data = json.loads(path.read_bytes())
            version = data.pop("schema_version")
            if version > SCHEMA_VERSION:
                raise UserError(f"{path}: of schema version {version}; this release reads up to {SCHEMA_VERSION}")
            galleries = [_gallery(one, out) for one in data.pop("galleries")]
            return cls(
                rows=tuple(Row.model_validate(row) for row in data.pop("rows")),
                orderings=tuple(Ordering(**one) for one in data.pop("orderings")),
                differences=tuple(Difference(**one) for one in data.pop("differences", ())),
                sentences=tuple(data.pop("sentences")),
                pictures={name: (own, column) for name, (own, column) in data.pop("pictures", {}).items()},
                axis=Axis(**axis) if (axis := data.pop("axis")) else None,
                galleries=tuple(one for one in galleries if all(getattr(one, name).is_file() for name in _IMAGES)),
                **data,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
            short = str(error).strip().splitlines()[0][:200]
            raise UserError(
                f"{path}: not a sweep's answer ({short}); run the sweep again, its results are kept"
            ) from error

    def shown(self) -> dict[str, tuple[str, str]]:
        """Return variant -> gallery and column of its images, of all that were trained or stand for an upper bound."""
        branches = {row.variant for row in self.rows if row.kind == "branch"}
        return {variant: place for variant, place in self.pictures.items() if variant not in branches}

    def per_image(self, out: Path) -> pa.Table | None:
        """Return the per-image scores of all rows that have some; None where none has."""
        folder = out / "leaderboard" / RESULTS
        tables = []
        for row in self.rows:
            file = folder / f"{row_id(row)}.parquet"
            table = Result(row, file).per_image() if file.is_file() else None
            if table is not None:
                tables.append(table.replace_schema_metadata())
        return pa.concat_tables(tables) if tables else None


def read_answers(out: Path) -> list[Answer]:
    """Return the answers of all sweeps that finished in ``out``, by name.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    files = sorted((out / FOLDER).glob(f"*/{FILE}"))
    if not files:
        raise UserError(f"{out}: no finished sweep; type: python -m benchmark.sweep clusters --quick --out {out}")
    return [Answer.load(file, out) for file in files]


def write_page(out: Path, to: Path, answers: Sequence[Answer]) -> tuple[Path, Path]:
    """Write the site and ``report.md`` (with ``grids/`` and ``curves/``) into ``to``; return their paths."""
    chapters, parts = [], []
    for answer in answers:
        table = answer.per_image(out)
        data = None if table is None else scores(table, answer.rows[0].track)
        ranking = rank(answer.rows, data)
        grid_file = _write_grid(answer, to)
        chapters.append(
            Chapter(
                ranking,
                answer.title,
                answer.question,
                data,
                answer.galleries,
                answer.axis,
                answer.notes,
                answer.orderings,
                answer.table,
                answer.pictures,
                grid_file,
            )
        )
        parts.append(_markdown(answer, ranking, grid_file, _write_curves(answer, ranking, to)))
    title = "What the sweeps found"
    about = _about(answers)
    to.mkdir(parents=True, exist_ok=True)
    try:
        page = build_report(to, chapters, title=title, about=about)
    except ValueError as error:
        raise UserError(str(error)) from error
    text = to / "report.md"
    write_text(text, f"# {title}\n\n{about}\n\n" + "\n".join(parts))
    return page, text


def _about(answers: Sequence[Answer]) -> str:
    tracks = sorted({row.track for answer in answers for row in answer.rows})
    if tracks == ["paper"]:
        return "Each sweep with its rows, and the orderings of the published table that it answers."
    return (
        f"Rows of the {' and '.join(tracks)} track: simulated brains and stand-in networks. No number compares with a "
        "published one; of a published table only the orderings are asked."
    )


def _write_grid(answer: Answer, to: Path) -> str:
    """Write what the variants make of the first test images; return the file's path within ``to``, or nothing."""
    try:
        picture = grid(answer.galleries, answer.shown())
    except ValueError as error:
        raise UserError(str(error)) from error
    if picture is None:
        return ""
    file = to / GRIDS / f"{answer.sweep}.png"
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    write_atomically(file, buffer.getvalue())
    return f"{GRIDS}/{file.name}"


def _write_curves(answer: Answer, ranking: Ranking, to: Path) -> str:
    """Write the metrics along the sweep's axis; return the file's path within ``to``, or nothing."""
    picture = sheet(ranking, answer.axis) if answer.axis is not None else ""
    if not picture:
        return ""
    write_atomically(to / CURVES / f"{answer.sweep}.svg", picture.encode())
    return f"{CURVES}/{answer.sweep}.svg"


def _markdown(answer: Answer, ranking: Ranking, grid_file: str, curves_file: str) -> str:
    lines = [f"## {answer.title}", "", answer.question.strip(), ""]
    if answer.orderings:
        lines += [
            f"Orderings of {answer.table}: {summary(answer.orderings)}.",
            "",
            orderings_markdown(answer.orderings),
        ]
        lines += ["", LEGEND[:1].upper() + LEGEND[1:], ""]
    lines += [markdown(ranking, answer.notes)]
    if answer.differences:
        lines += [differences_markdown(answer.differences), "", DIFFERENCES[:1].upper() + DIFFERENCES[1:], ""]
    lines += [*(f"{sentence}\n" for sentence in answer.sentences)]
    if curves_file and answer.axis is not None:
        lines += [f"![{answer.title}: each metric against {answer.axis.name}, with 95 % intervals]({curves_file})", ""]
    if grid_file:
        lines += [f"![{answer.title}: the first test images as seen, and as reconstructed]({grid_file})", ""]
    return "\n".join(lines)


def _relative(one: Gallery, out: Path) -> dict[str, Any]:
    def path(name: str) -> str:
        file: Path = getattr(one, name).resolve()
        root = out.resolve()
        return file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)

    images = {name: path(name) for name in _IMAGES}
    return {
        "variant": one.variant,
        "subject": one.subject,
        "image_id": one.image_id,
        "pixcorr": dict(one.pixcorr),
    } | images


def _gallery(data: dict[str, Any], out: Path) -> Gallery:
    return Gallery(**{**data, **{name: out / data[name] for name in _IMAGES}})
