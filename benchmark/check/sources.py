"""What is compared: a run folder, a leaderboard id, a per-image Parquet or a checkpoint, read into per-image scores."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmark.errors import UserError, did_you_mean
from benchmark.imagesets.wording import one_line, place, reason
from benchmark.results import Result
from benchmark.stages import METHOD
from benchmark.store import DONE, read_json
from leaderboard.gate import Side
from leaderboard.results import PROTOCOLS, RESULTS, find, read_results
from leaderboard.results import Result as Kept
from leaderboard.schema import read_row

if TYPE_CHECKING:
    from benchmark.check.checkpoint import Scoring

SEPARATOR = "::"

_SCORES, _PROTOCOL = "scores.parquet", "protocol.json"
_COMBINED = "combined"
_WEIGHTS = (".safetensors", ".ckpt", ".pth", ".pt")


@dataclass(frozen=True)
class Source:
    """One side of a comparison.

    Attributes:
        side: its scores, and how they were made.
        images: folder of stage ``reconstruct`` that holds its images; None where they are not at hand.
        id: row of the leaderboard that it is, if it is one.
    """

    side: Side
    images: Path | None = None
    id: str = ""


@dataclass(frozen=True)
class Scored:
    """A finished stage ``score`` of a store.

    Attributes:
        folder: of the stage.
        variants: names under which it ran; for a checkpoint that the gate scored, of the variant that it belongs to.
        finished: when.
        checkpoint: whether the gate scored it.
    """

    folder: Path
    variants: tuple[str, ...]
    finished: datetime
    checkpoint: bool = False

    def table(self) -> pa.Table:
        """Return the per-image scores of the combined images."""
        return _own(_parquet(self.folder / _SCORES), _COMBINED, self.folder / _SCORES)

    def protocol(self) -> tuple[str, str]:
        """Return name and hash of the protocol."""
        return _protocol_beside(self.folder / _PROTOCOL)


def read_source(
    texts: Sequence[str], option: str, variant: str | None, leaderboard: Path, scoring: Callable[[], Scoring]
) -> Source:
    """Read one side.

    Args:
        texts: what the option was given: each a path (``PATH::VARIANT`` chooses), an id or a variant's name; several
            are trainings of one model with other seeds.
        option: its name, for messages.
        variant: the variant where ``texts`` do not say.
        leaderboard: where ids are looked up.
        scoring: how a checkpoint is scored, asked only where there is one.

    Raises:
        UserError: there is no such thing, or it holds no per-image scores.
    """
    try:
        found = [_read(text, option, variant, leaderboard, scoring) for text in texts]
    except ValueError as error:  # of leaderboard: a file is not what it should be
        raise UserError(f"{option}: {error}") from error
    return found[0] if len(found) == 1 else _seeds(found, option)


def _read(text: str, option: str, variant: str | None, leaderboard: Path, scoring: Callable[[], Scoring]) -> Source:
    where, separator, own = text.partition(SEPARATOR)
    name = own if separator else variant
    path = Path(where)
    try:
        exists = path.exists()
    except OSError as error:
        raise UserError(f"{option} {one_line(text)}: cannot be looked at ({reason(error)})") from error
    if not exists:
        return _by_id(text, option, leaderboard)
    if _is_checkpoint(path):
        how = scoring()
        folder, images = how.score(path, name)
        scored = Scored(folder, (), datetime.now(UTC))
        return Source(Side(place(where), scored.table(), *scored.protocol()), images)
    if path.is_dir() and (path / _SCORES).is_file():
        path = path / _SCORES
    if path.is_file() and path.suffix != ".json":
        return _from_parquet(path, own if separator else None, option)
    if path.is_dir() and not _has_results(path):
        return _from_store(path, name, option)
    return _from_results(path, name, option)


def _is_checkpoint(path: Path) -> bool:
    if path.is_dir():
        return (path / "bit.safetensors").is_file()
    return path.suffix in _WEIGHTS


def _has_results(path: Path) -> bool:
    boards = (path, path / "leaderboard")
    return any((b / "leaderboard.json").is_file() or any((b / RESULTS).glob("*.json")) for b in boards) or (
        any(path.glob("*.json")) and not (path / "store").is_dir()
    )


# --- leaderboards -----------------------------------------------------------------------------------------------------


def _by_id(text: str, option: str, leaderboard: Path) -> Source:
    looks_like_path = "/" in text or text.startswith(".") or Path(text).suffix in (".parquet", ".json", *_WEIGHTS)
    if looks_like_path and "=" not in text:
        raise UserError(f"{option} {one_line(text)}: no such file or folder")
    try:
        results = read_results(leaderboard)
    except ValueError as error:
        raise UserError(
            f"{option} {one_line(text)}: no such file or folder, and no leaderboard to look it up in ({error}); name "
            "one with --leaderboard DIR"
        ) from error
    try:
        return _kept(find(results, text), leaderboard, option)
    except ValueError as error:
        raise UserError(f"{option} {one_line(text)}: no such file or folder, and in {leaderboard}: {error}") from error


def _from_results(path: Path, name: str | None, option: str) -> Source:
    results = read_results(path)
    if name is None:
        ranked = [result for result in results if result.row.kind == "method"]
        chosen = results if len(results) == 1 else ranked
        if len(chosen) != 1:
            names = ", ".join(result.row.name for result in ranked)
            raise UserError(
                f"{option} {place(path)}: holds {len(ranked)} variants; say which with --variant NAME or "
                f"{place(path)}{SEPARATOR}NAME: {names}"
            )
        return _kept(chosen[0], path, option)
    return _kept(find(results, name), path, option)


def _kept(result: Kept, path: Path, option: str) -> Source:
    """Return a row of a leaderboard with the scores beside it, or those of the stage that it was made from."""
    row = result.row
    stage = _stage_of(result, path)
    table = result.per_image()
    if table is None and stage is not None and row.kind == "method" and len(row.seeds) < 2:
        table = _own(_parquet(stage / _SCORES), _COMBINED, stage / _SCORES)
    if table is None:
        raise UserError(
            f"{option}: row {result.id} has no per-image scores beside it; type the command that made the run again, "
            "which writes them"
        )
    images = None
    if stage is not None and row.kind == "method":
        images = _images_of(stage)
    return Source(Side(result.id, table, row.protocol, row.protocol_hash), images, result.id)


def _stage_of(result: Kept, path: Path) -> Path | None:
    """Return the stage that a row was made from, where the run's folder is still there."""
    source = Path(result.row.source)
    if source.is_absolute() or ".." in source.parts:
        return None
    for root in (path, *path.absolute().parents[:3]):
        if (root / source / DONE).is_file() and (root / source / _SCORES).is_file():
            return root / source
    return None


def _images_of(stage: Path) -> Path | None:
    try:
        reconstruct = Result.read(stage).upstream("reconstruct")
    except (UserError, OSError, KeyError):
        return None  # pictures are an extra: the scores are there
    return None if reconstruct is None else reconstruct.folder


# --- stores -----------------------------------------------------------------------------------------------------------


def scored_stages(out: Path) -> list[Scored]:
    """Return the finished stages ``score`` in a run's folder, the oldest first."""
    found = []
    for done in (out / "store" / "score").glob(f"*/{DONE}"):
        if "." in done.parent.name:  # a forced attempt beside the result
            continue
        result = Result.read(done.parent)
        names = re.sub(r" \+\d+ more$", "", str(result.record["label"]))  # as a plan joins the labels of a shared stage
        variants = tuple(name for name in names.split(", ") if name)
        line = "" if variants else _line_of(result)
        finished = datetime.fromisoformat(read_json(done)["finished"])
        found.append(Scored(done.parent, (line,) if line else variants, finished, bool(line)))
    return sorted(found, key=lambda scored: (scored.finished, scored.folder.name))


def _line_of(score: Result) -> str:
    """Return the variant whose checkpoint the gate scored."""
    reconstruct = score.upstream("reconstruct")
    for role in () if reconstruct is None else sorted(reconstruct.record["upstream"]):
        if str(reconstruct.record["upstream"][role]).startswith("checkpoint/"):  # type: ignore[union-attr]
            return str(reconstruct.needs(role).config["line"])  # type: ignore[union-attr]
    return ""


def _from_store(path: Path, name: str | None, option: str) -> Source:
    known = {variant: scored for scored in scored_stages(path) if not scored.checkpoint for variant in scored.variants}
    if not known:
        raise UserError(
            f"{option} {place(path)}: holds no results; expected the --out folder of a run, a leaderboard, a trained "
            "stage's folder, or a per-image Parquet"
        )
    if name is None and len(known) > 1:
        raise UserError(
            f"{option} {place(path)}: holds {len(known)} variants; say which with --variant NAME or "
            f"{place(path)}{SEPARATOR}NAME: {', '.join(known)}"
        )
    chosen = name if name is not None else next(iter(known))
    if chosen not in known:
        hint = did_you_mean(chosen, known) or f"; it has {', '.join(known)}"
        raise UserError(f"{option} {place(path)}: no scored variant '{one_line(chosen)}'{hint}")
    scored = known[chosen]
    side = Side(f"{place(path)}{SEPARATOR}{chosen}", scored.table(), *scored.protocol())
    return Source(side, _images_of(scored.folder))


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _from_parquet(path: Path, name: str | None, option: str) -> Source:
    table = _parquet(path)
    missing = {"method", "variant", "metric", "value"} - set(table.column_names)
    if missing:
        raise UserError(f"{option} {place(path)}: per-image scores lack the column {', '.join(sorted(missing))}")
    pairs = set(zip(table["method"].to_pylist(), table["variant"].to_pylist(), strict=True))
    keys = {(str(m), str(v)) for m, v in pairs}
    own = {key: key[1] or key[0] for key in keys if key[0] != "reference" or len(keys) == 1}
    names = sorted(own.values())
    if name is None:
        wanted = [key for key in own if key == (METHOD, _COMBINED)] or (list(own) if len(own) == 1 else [])
    else:
        wanted = [key for key in keys if name in (key[1], " ".join(key).strip(), key[0] if not key[1] else None)]
    if len(wanted) != 1:
        hint = "" if name is None else did_you_mean(name, names)
        what = f"holds {len(names)} rows" if name is None else f"no row '{one_line(name)}'{hint}"
        raise UserError(
            f"{option} {place(path)}: {what}; say which with {place(path)}{SEPARATOR}NAME: {', '.join(names)}"
        )
    method, variant = wanted[0]
    chosen = table.filter(pc.and_(pc.equal(table["method"], method), pc.equal(table["variant"], variant)))
    protocol, digest = _protocol_of(path, table, variant)
    shown = place(path) + (f"{SEPARATOR}{name}" if name is not None else "")
    images = _images_of(path.parent) if (path.parent / DONE).is_file() and variant == _COMBINED else None
    return Source(Side(shown, chosen, protocol, digest), images)


def _protocol_of(path: Path, table: pa.Table, variant: str) -> tuple[str | None, str | None]:
    """Return the protocol that a Parquet of scores names: in its metadata, in a row or in a stage's file beside it."""
    noted = (table.schema.metadata or {}).get(PROTOCOLS)
    if noted is not None:
        try:
            own = json.loads(noted)[variant]
            return str(own["protocol"]), str(own["protocol_hash"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{place(path)}: its metadata do not say under which protocol it was scored") from error
    if (path.parent / _PROTOCOL).is_file():
        return _protocol_beside(path.parent / _PROTOCOL)
    if path.with_suffix(".json").is_file():
        try:
            row = read_row(path.with_suffix(".json"))
        except ValueError:
            return None, None  # some other JSON
        if (row.variant or row.method) == (variant or row.method):
            return row.protocol, row.protocol_hash
    return None, None


def _protocol_beside(path: Path) -> tuple[str, str]:
    try:
        about: Any = read_json(path)
        return str(about["protocol"]), str(about["protocol_hash"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place(path)}: does not say under which protocol it was scored ({reason(error)})") from error


def _parquet(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{place(path)}: not a Parquet file of per-image scores ({reason(error)})") from error


def _own(table: pa.Table, variant: str, path: Path) -> pa.Table:
    own = table.filter(pc.equal(table["variant"], variant))
    if own.num_rows == 0:
        raise UserError(f"{place(path)}: no scores of '{variant}'")
    return own


# --- seeds ------------------------------------------------------------------------------------------------------------


def _seeds(found: Iterable[Source], option: str) -> Source:
    """Join trainings of one model: each keeps its seed, or is numbered where two have the same."""
    kept = list(found)
    for source in kept[1:]:
        for what in ("protocol", "protocol_hash"):
            if getattr(source.side, what) != getattr(kept[0].side, what):
                raise UserError(
                    f"{option}: {kept[0].side.name} and {source.side.name} were scored under different protocols or on "
                    "different images; several of one option are trainings of one model"
                )
    seeds = [set(pc.unique(source.side.table["seed"]).to_pylist()) for source in kept]
    clash = sum(map(len, seeds)) > len(set().union(*seeds))
    tables = []
    for place_, source in enumerate(kept):
        table = source.side.table.select(
            ["track", "method", "variant", "subject", "seed", "image_id", "metric", "value"]
        ).replace_schema_metadata()
        if clash:
            if len(seeds[place_]) > 1:
                raise UserError(f"{option}: {source.side.name} has several seeds itself, and some of them twice")
            column = table.schema.get_field_index("seed")
            table = table.set_column(column, "seed", pa.array(np.full(table.num_rows, place_)))
        tables.append(_plain(table))
    joined = pa.concat_tables(tables)
    names = " + ".join(source.side.name for source in kept)
    return replace(kept[0], side=replace(kept[0].side, name=names, table=joined))


def _plain(table: pa.Table) -> pa.Table:
    """Return scores with the same types, whoever wrote them."""
    types = dict.fromkeys(("track", "method", "variant", "image_id", "metric"), pa.string())
    types |= {"subject": pa.int64(), "seed": pa.int64(), "value": pa.float64()}
    return pa.table({name: table[name].cast(types[name]) for name in table.column_names})
