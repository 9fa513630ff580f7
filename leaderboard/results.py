"""Result folders: one JSON file a row, beside it the per-image scores that its numbers were made from.

A row's *id* is the name of its file without the ending, such as ``demo-brain-it-clusters-128-1a2b3c4d``: readable, and
different for rows of another track, method, variant, protocol or seed. With the scores beside it a row can be compared
image by image long after the run, and on another machine.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leaderboard.schema import Row, read_leaderboard, read_row, row_id, write_atomically, write_row

if TYPE_CHECKING:
    import pyarrow as pa

RESULTS = "results"
PROTOCOLS = b"protocols"
"""Metadata of a per-image Parquet: JSON, variant -> {"protocol", "protocol_hash"}."""

_LEADERBOARD = "leaderboard.json"


@dataclass(frozen=True)
class Result:
    """A row, and where its per-image scores lie; None where nobody kept them."""

    row: Row
    scores: Path | None = None

    @property
    def id(self) -> str:
        """The row's id."""
        return row_id(self.row)

    def per_image(self) -> pa.Table | None:
        """Return the per-image scores (columns as in :mod:`leaderboard.statistics`) of this row alone.

        Raises:
            ValueError: the file is not Parquet, or holds another row's scores.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.scores is None:
            return None
        try:
            table = pq.read_table(self.scores)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{self.scores}: not a Parquet file of scores ({error})") from error
        return _of(table, self.row, self.scores)


def write_result(folder: Path, row: Row, per_image: pa.Table | None = None) -> Path:
    """Write a row to ``folder``, and of ``per_image`` the scores that are its own; return the row's file.

    Raises:
        ValueError: ``per_image`` has no scores of the row.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if per_image is not None:
        sink = pa.BufferOutputStream()
        pq.write_table(_of(per_image, row, None), sink, compression="zstd")
        write_atomically(folder / f"{row_id(row)}.parquet", sink.getvalue().to_pybytes())
    return write_row(folder, row)


def read_results(path: Path) -> list[Result]:
    """Read the results that ``path`` names, in the order of their ids.

    Args:
        path: a row's JSON file, a ``leaderboard.json``, a folder of results, a leaderboard's folder, or the ``--out``
            folder of a run.

    Raises:
        ValueError: nothing of that kind is there, or a file is not what it should be; the message names it.
    """
    if path.is_file():
        if path.name == _LEADERBOARD:
            return _from_leaderboard(path)
        return [_result(path)]
    for folder in (path / "leaderboard" / RESULTS, path / RESULTS, path):
        if folder.is_dir() and any(folder.glob("*.json")) and not (folder / _LEADERBOARD).is_file():
            return [_result(file) for file in sorted(folder.glob("*.json"))]
    for file in (path / "leaderboard" / _LEADERBOARD, path / _LEADERBOARD):
        if file.is_file():
            return _from_leaderboard(file)
    what = "no results" if path.is_dir() else "no such file or folder"
    raise ValueError(f"{path}: {what}; name the --out folder of a run, or a folder of result rows")


def find(results: Iterable[Result], name: str) -> Result:
    """Return the result whose id, or whose variant, is ``name``.

    Raises:
        ValueError: none has, or several variants do; the message names the nearest, or all of them.
    """
    known = list(results)
    for result in known:
        if result.id == name:
            return result
    named = [result for result in known if result.row.name == name]
    if len(named) == 1:
        return named[0]
    if named:
        raise ValueError(f"several rows are named '{name}': {', '.join(result.id for result in named)}; give the id")
    words = [result.id for result in known] + [result.row.name for result in known]
    near = difflib.get_close_matches(name, words, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(result.row.name for result in known)}"
    raise ValueError(f"no row '{name}'{hint}")


def _result(file: Path) -> Result:
    scores = file.with_suffix(".parquet")
    return Result(read_row(file), scores if scores.is_file() else None)


def _from_leaderboard(file: Path) -> list[Result]:
    found = []
    for row in read_leaderboard(file):
        scores = file.parent / RESULTS / f"{row_id(row)}.parquet"
        found.append(Result(row, scores if scores.is_file() else None))
    return found


def _of(table: Any, row: Row, path: Path | None) -> pa.Table:
    import pyarrow.compute as pc

    where = "" if path is None else f"{path}: "
    missing = {"method", "variant", "value"} - set(table.column_names)
    if missing:
        raise ValueError(f"{where}per-image scores lack the column {', '.join(sorted(missing))}")
    mine = pc.and_(pc.equal(table["method"], row.method), pc.equal(table["variant"], row.variant))
    own = table if pc.all(mine).as_py() else table.filter(mine)  # to filter is to copy
    if own.num_rows == 0:
        raise ValueError(f"{where}no per-image scores of {' '.join(row.key).strip()}")
    return own
