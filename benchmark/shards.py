"""Large arrays on disk, a file for every thousand rows: written in steps that outlive a killed job, read by row.

A folder holds ``00000.npy``, ``00001.npy`` ... and ``shards.json`` with the shape, the type and each file's SHA-256. A
shard is listed there once it is complete, so whoever goes on after an interruption believes the list, checks the
digests, and computes the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

INDEX = "shards.json"
ROWS = 1024  # of CLIP bigG tokens: 0.9 GB a file


class Rows(Protocol):
    """An array whose rows are read by number."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, then the shape of one."""
        ...

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Return rows: a slice or an array of numbers."""
        ...


class Shards:
    """An array that :func:`write_shards` wrote, mapped into memory.

    Raises:
        ValueError: the folder is not complete.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        self.folder = folder
        self.rows: int = index["rows"]
        self.shape: tuple[int, ...] = (index["total"], *index["shape"])
        self.dtype = np.dtype(index["dtype"])
        self.digests: list[str] = index["sha256"]
        if len(self.digests) != _count(self.shape[0], self.rows):
            raise ValueError(f"{folder}: {len(self.digests)} of {_count(self.shape[0], self.rows)} shards are there")
        self._open: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray | list[int]) -> np.ndarray:
        """Return rows in the order asked for, copied into memory."""
        wanted = np.arange(len(self))[rows]
        out = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        shard = wanted // self.rows
        for number in np.unique(shard):
            here = shard == number
            out[here] = self._shard(int(number))[wanted[here] - number * self.rows]
        return out

    def row(self, number: int) -> np.ndarray:
        """Return one row, mapped and not read, so that a part of it can be taken; it must not be written to."""
        shard, place = divmod(number, self.rows)
        row: np.ndarray = self._shard(shard)[place]
        return row

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._open:
            # As an array of the ordinary class, of which a row is taken faster.
            self._open[number] = np.load(_file(self.folder, number), mmap_mode="r").view(np.ndarray)
        return self._open[number]

    def damaged(self) -> list[Path]:
        """Return the files whose content is no longer what was written; reads everything."""
        files = [(_file(self.folder, number), digest) for number, digest in enumerate(self.digests)]
        return [file for file, digest in files if not file.is_file() or _sha256(file) != digest]


def write_shards(
    folder: Path,
    total: int,
    compute: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    *,
    batch: int,
    rows: int = ROWS,
    dtype: Any = np.float16,
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Compute arrays row by row and write them in shards, from where an earlier call in the same folder was stopped.

    Args:
        folder: each array gets a folder of its name in it.
        total: rows of every array.
        compute: row numbers -> name -> their rows, B x ...; always the same names.
        batch: rows computed at a time.
        rows: of a shard.
        dtype: in which values are kept.
        progress: called with the number of rows that are newly done (or found done).
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_file = folder / INDEX
    state: dict[str, Any] = json.loads(state_file.read_text()) if state_file.is_file() else {}
    if state.get("total") != total or state.get("rows") != rows:
        state = {"total": total, "rows": rows, "arrays": {}}
    arrays: dict[str, dict[str, Any]] = state["arrays"]
    done = _intact(folder, arrays)
    progress(min(done * rows, total))
    for number in range(done, _count(total, rows)):
        shard = np.arange(number * rows, min((number + 1) * rows, total))
        outputs: dict[str, np.memmap] = {}
        for start in range(0, len(shard), batch):
            part = shard[start : start + batch]
            for name, values in compute(part).items():
                if name not in outputs:
                    arrays.setdefault(
                        name, {"shape": list(values.shape[1:]), "dtype": np.dtype(dtype).str, "sha256": []}
                    )
                    (folder / name).mkdir(exist_ok=True)
                    shape = (len(shard), *values.shape[1:])
                    outputs[name] = np.lib.format.open_memmap(_file(folder / name, number), "w+", dtype, shape)
                outputs[name][start : start + len(part)] = values
            progress(len(part))
        for name, array in outputs.items():
            array.flush()
            arrays[name]["sha256"].append(_sha256(_file(folder / name, number)))
        _write(state_file, state)
    for name, about in arrays.items():
        _write(folder / name / INDEX, {"total": total, "rows": rows, **about})


def collect(folder: Path, out: Path) -> dict[str, list[int]]:
    """Move finished arrays from the folder of checkpoints to a stage's results; return the shape of a row of each."""
    arrays = json.loads((folder / INDEX).read_text())["arrays"]
    for name in arrays:
        if (folder / name).is_dir():
            os.replace(folder / name, out / name)
    return {name: about["shape"] for name, about in arrays.items()}


def _intact(folder: Path, arrays: Mapping[str, dict[str, Any]]) -> int:
    """Return how many shards all arrays have whole, and forget what comes after them."""
    whole = min((len(about["sha256"]) for about in arrays.values()), default=0)
    for name, about in arrays.items():
        for number, digest in enumerate(about["sha256"][:whole]):
            file = _file(folder / name, number)
            if not file.is_file() or _sha256(file) != digest:
                whole = number
                break
    for about in arrays.values():
        del about["sha256"][whole:]
    return whole


def _count(total: int, rows: int) -> int:
    return -(-total // rows)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.npy"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value) + "\n")
    os.replace(temporary, path)
