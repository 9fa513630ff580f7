"""Large arrays on the disk, written run by run: killed at any moment, the next start goes on behind the last whole run.

An array under way is ``NAME.npy.part`` beside ``NAME.npy.marks``, a line for each run of rows that is on the disk, with
its SHA-256. It gets its own name when it is whole. Rows are written, not mapped: a full disk is an error and no crash,
and the pages of a file of many gigabytes do not count as memory of this process.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.store import write_text


@dataclass(frozen=True)
class ArrayRecord:
    """What is known of a finished array: how to check it, and what it was made of."""

    shape: tuple[int, ...]
    dtype: str
    run: int  # rows in a run
    identity: Mapping[str, Any]
    sha256: tuple[str, ...]  # of each run's bytes

    def as_json(self) -> dict[str, Any]:
        """Return it for the manifest."""
        return {**self.__dict__, "shape": list(self.shape), "sha256": list(self.sha256)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ArrayRecord:
        """Read it from the manifest.

        Raises:
            ValueError, KeyError, TypeError: it is none.
        """
        shape = tuple(int(n) for n in record["shape"])
        return cls(
            shape, str(record["dtype"]), int(record["run"]), dict(record["identity"]), tuple(map(str, record["sha256"]))
        )

    @property
    def nbytes(self) -> int:
        """Size of the values without the header."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def _header(shape: Sequence[int], dtype: np.dtype[Any]) -> bytes:
    """Return the header that numpy would write."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
    )
    return buffer.getvalue()


class ArrayWriter:
    """Writes ``path`` in runs of rows. What an earlier process left of it is checked by digest and kept.

    Args:
        path: of the finished file, ``.npy``.
        shape: of the array.
        dtype: of its values.
        run: rows in a run.
        identity: what the array is made of, JSON-able; what was begun from something else is begun anew.
    """

    def __init__(self, path: Path, shape: Sequence[int], dtype: Any, run: int, identity: Mapping[str, Any]) -> None:
        self.path, self.shape, self.dtype, self.run = path, tuple(shape), np.dtype(dtype), run
        self.identity = json.loads(json.dumps(identity))
        self.part = path.with_name(path.name + ".part")
        self.marks = path.with_name(path.name + ".marks")
        self._head = _header(self.shape, self.dtype)
        self._row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        self._done: dict[int, str] = {}

    @property
    def n_runs(self) -> int:
        """Number of runs; the last may be shorter."""
        return -(-self.shape[0] // self.run) if self.run else 0

    @property
    def nbytes(self) -> int:
        """Size of the finished file."""
        return len(self._head) + self.shape[0] * self._row_bytes

    def bounds(self, number: int) -> tuple[int, int]:
        """Return the rows of a run: first, and one behind the last."""
        return number * self.run, min((number + 1) * self.run, self.shape[0])

    @property
    def todo(self) -> list[int]:
        """Return the runs that are not on the disk."""
        return [k for k in range(self.n_runs) if k not in self._done]

    @property
    def left_bytes(self) -> int:
        """Bytes that are still to be written."""
        return sum(self._row_bytes * (b - a) for a, b in map(self.bounds, self.todo))

    def glance(self) -> None:
        """Take the marks of an earlier process at their word, to know what is left; writes nothing."""
        self._done = self._marked()

    def open(self, on_check: Callable[[int], None] | None = None) -> None:
        """Make ready to write: check the marked runs against their digests, drop what does not agree.

        ``on_check`` is called with the number of bytes after each run that was checked.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.marks.exists() and not self.part.exists():
            os.replace(self.path, self.part)  # killed between its renaming and its entry in the manifest
        marked = self._marked()
        self._done = {}
        if marked:
            with self.part.open("rb") as file:
                for number, digest in sorted(marked.items()):
                    start, stop = self.bounds(number)
                    if (
                        _digest(file, len(self._head) + start * self._row_bytes, (stop - start) * self._row_bytes)
                        == digest
                    ):
                        self._done[number] = digest
                    if on_check is not None:
                        on_check((stop - start) * self._row_bytes)
        else:
            with self.part.open("wb") as file:
                file.write(self._head)
                file.truncate(self.nbytes)
        lines = [json.dumps(self._about()), *(self._line(k, d) for k, d in sorted(self._done.items()))]
        write_text(self.marks, "\n".join(lines) + "\n")

    def write(self, number: int, rows: np.ndarray) -> None:
        """Write a run and mark it once it is on the disk.

        Raises:
            ValueError: the rows are not those of the run.
            OSError: the disk is full, for example; the run is then not marked.
        """
        start, stop = self.bounds(number)
        if rows.shape != (stop - start, *self.shape[1:]):
            raise ValueError(f"{self.path.name}: rows {start}..{stop - 1} are {rows.shape}")
        data = np.ascontiguousarray(rows, self.dtype).data.cast("B") if rows.size else memoryview(b"")
        with self.part.open("r+b") as file:
            file.seek(len(self._head) + start * self._row_bytes)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        digest = hashlib.sha256(data).hexdigest()
        with self.marks.open("a", encoding="utf-8") as marks:
            marks.write(self._line(number, digest) + "\n")
            marks.flush()
            os.fsync(marks.fileno())
        self._done[number] = digest

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Read rows back, in the order asked for, without mapping the file."""
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        with self.part.open("rb") as file:
            for place, row in enumerate(np.asarray(rows).tolist()):
                file.seek(len(self._head) + row * self._row_bytes)
                out[place] = np.frombuffer(file.read(self._row_bytes), self.dtype).reshape(self.shape[1:])
        return out

    def finish(self) -> ArrayRecord:
        """Give the array its name and return its record; call :meth:`forget` once that is in the manifest."""
        if self.todo:
            raise ValueError(f"{self.path.name}: {len(self.todo)} runs are missing")
        os.replace(self.part, self.path)
        return ArrayRecord(
            self.shape, self.dtype.str, self.run, self.identity, tuple(self._done[k] for k in range(self.n_runs))
        )

    def forget(self) -> None:
        """Remove the marks, and the part where there is one."""
        self.part.unlink(missing_ok=True)
        self.marks.unlink(missing_ok=True)

    def _about(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "dtype": self.dtype.str, "run": self.run, "identity": self.identity}

    @staticmethod
    def _line(number: int, digest: str) -> str:
        return json.dumps({"run": number, "sha256": digest})

    def _marked(self) -> dict[int, str]:
        """Return the runs that are marked, of an array like this one; a line that is cut off ends them."""
        there = self.part if self.part.exists() else self.path
        try:
            lines = self.marks.read_text(encoding="utf-8").splitlines()
            if json.loads(lines[0]) != self._about() or there.stat().st_size != self.nbytes:
                return {}
        except (OSError, ValueError, IndexError):
            return {}
        marked: dict[int, str] = {}
        for line in lines[1:]:
            try:
                entry = json.loads(line)
                number = int(entry["run"])
                if 0 <= number < self.n_runs:
                    marked[number] = str(entry["sha256"])
            except (ValueError, KeyError, TypeError):
                break
        return marked


def damages(path: Path, record: ArrayRecord, digests: bool) -> Iterator[str]:
    """Yield what is wrong with a finished array: its presence, its size and, with ``digests``, its content."""
    head = _header(record.shape, np.dtype(record.dtype))
    try:
        size = path.stat().st_size
    except OSError:
        yield "missing"
        return
    if size != len(head) + record.nbytes:
        yield f"{size} bytes, expected {len(head) + record.nbytes}"
        return
    with path.open("rb") as file:
        if file.read(len(head)) != head:
            yield "its header is not that of the array"
            return
        if not digests:
            return
        row_bytes = record.nbytes // max(record.shape[0], 1)
        for number, digest in enumerate(record.sha256):
            start, stop = number * record.run, min((number + 1) * record.run, record.shape[0])
            if _digest(file, len(head) + start * row_bytes, (stop - start) * row_bytes) != digest:
                yield f"rows {start}..{stop - 1} differ from what was written (SHA-256)"


def _digest(file: Any, start: int, length: int) -> str:
    sha = hashlib.sha256()
    file.seek(start)
    while length > 0:
        block = file.read(min(length, 2**24))
        if not block:
            break
        sha.update(block)
        length -= len(block)
    return sha.hexdigest()
