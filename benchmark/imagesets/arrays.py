"""Sets of images in one array: what its header says, and how its rows are read without reading the rest."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmark.errors import UserError, did_you_mean
from benchmark.imagesets.imageset import MAX_IMAGES, MAX_SIDE, Pixels
from benchmark.imagesets.wording import listed, one_line, place, unreadable

IDS = "ids"
"""Name of the array of ids beside the images in one file."""
EXPECTED = "N x H x W x 3 uint8, or N x 3 x H x W float in [0, 1]"
_STORED = ("uint8", "float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Layout:
    """What an array's header says of its images, checked.

    Attributes:
        shape: as stored, ``N x H x W x 3`` or ``N x 3 x H x W``.
        stored: type of the stored values.
        channels_first: whether the colours come before the pixels.
    """

    shape: tuple[int, int, int, int]
    stored: str
    channels_first: bool

    @property
    def images(self) -> tuple[int, int, int, int]:
        """N, H, W, 3."""
        n, side = self.shape[0], self.shape[2]
        return n, side, side, 3

    @property
    def pixels(self) -> np.dtype[Any]:
        """Type in which pixels are handed out."""
        return np.dtype(np.float32 if self.stored in ("float16", "bfloat16") else self.stored)

    @property
    def image_bytes(self) -> int:
        """Bytes of one stored image."""
        return math.prod(self.shape[1:]) * (2 if self.stored == "bfloat16" else np.dtype(self.stored).itemsize)

    def hand_out(self, stored: NDArray[Any]) -> Pixels:
        """Return stored rows as they are handed out: colours last, a type that everything can work with."""
        last = np.moveaxis(stored, 1, -1) if self.channels_first else stored
        if self.stored == "bfloat16":  # the upper half of a float32
            return (np.ascontiguousarray(last).astype(np.uint32) << 16).view(np.float32)
        return np.ascontiguousarray(last, dtype=self.pixels)


def layout(where: str, shape: Sequence[int], stored: str) -> Layout:
    """Check shape and type of an array of images.

    Both orders of the axes are taken, whatever the type; where both fit (images of 3 x 3 pixels), uint8 has the colours
    last and floats have them first.

    Args:
        where: what messages call it.
        shape: of the array.
        stored: name of its type, as numpy or torch have it.
    """
    found = f"{where}: {one_line(stored, 40)} {one_line(tuple(shape), 60)}"
    if stored not in _STORED:
        small = stored.startswith(("int", "uint", "bool"))
        remedy = "images.astype('uint8') if they run from 0 to 255" if small else "images.astype('float32')"
        raise UserError(f"{found}; expected {EXPECTED}\nconvert it: {remedy}")
    if len(shape) != 4:
        hints = {3: "\na single image needs an axis, images[None]; grey images are repeated to RGB"}
        raise UserError(f"{found}; expected four axes: {EXPECTED}{hints.get(len(shape), '')}")
    n, a, b, c = (int(length) for length in shape)
    if a != 3 and c != 3:
        grey, alpha = 1 in (a, c), 4 in (a, c)
        remedy = "\nrepeat grey to RGB" if grey else "\nleave out the alpha channel" if alpha else ""
        raise UserError(f"{found}; expected 3 colours: {EXPECTED}{remedy}")
    if n == 0:
        raise UserError(f"{found}: no image; expected {EXPECTED}")
    if n > MAX_IMAGES:
        raise UserError(f"{found}: {n} images; expected at most {MAX_IMAGES}")
    channels_first = c != 3 or (a == b == 3 and stored != "uint8")
    check_size(where, *((b, c) if channels_first else (a, b)))
    return Layout((n, a, b, c), stored, channels_first)


def check_size(where: str, height: int, width: int) -> None:
    """Raise UserError unless an image is square and of a size that somebody may have meant."""
    if min(height, width) < 1:
        raise UserError(f"{where}: {width} x {height} pixels; expected square images; write them again")
    if max(height, width) > MAX_SIDE:
        raise UserError(f"{where}: {width} x {height} pixels; expected at most {MAX_SIDE} a side; resize them")
    if height != width:
        raise UserError(f"{where}: {width} x {height} pixels; expected square images; crop them")


def choose(where: str, suffix: str, key: str | None, names: Iterable[str]) -> str:
    """Return the array of a file that is meant: the one named ``key``, or the only one beside ``ids``."""
    names = list(names)
    if key is not None:
        if key in names:
            return key
        holds = listed(names) if names else "nothing"
        raise UserError(f"{where}: no array '{one_line(key, 60)}'{did_you_mean(key, names[:1000])}; it holds {holds}")
    others = [name for name in names if name.rpartition("/")[2] != IDS]
    if len(others) == 1:
        return others[0]
    if not others:
        raise UserError(f"{where}: holds no array of images; expected one, {EXPECTED}")
    raise UserError(
        f"{where}: holds {len(others)} arrays ({listed(others)}); say which: NAME{suffix}::{one_line(others[0], 60)}"
    )


def ids_beside(name: str, names: Iterable[str]) -> str | None:
    """Return the name of the array of ids that belongs to array ``name``: ``ids`` in its group, else at the top."""
    group = name.rpartition("/")[0]
    beside = f"{group}/{IDS}" if group else IDS
    known = set(names) - {name}
    return beside if beside in known else IDS if IDS in known else None


class OpenFile:
    """A file that stays open as long as somebody reads it, also when it is deleted or replaced meanwhile."""

    def __init__(self, path: Path | str, descriptor: int | None = None) -> None:
        self.path = str(path)
        try:
            self._descriptor = os.open(path, os.O_RDONLY) if descriptor is None else descriptor
            weakref.finalize(self, os.close, self._descriptor)
            self.size = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise unreadable(path, error) from error

    def read_into(self, target: NDArray[Any], offset: int) -> None:
        """Fill a contiguous array with the bytes from ``offset`` on; any number of threads may read at once."""
        view = target.reshape(-1).view(np.uint8).data
        while len(view):
            try:
                got = os.preadv(self._descriptor, [view], offset)
            except OSError as error:
                raise unreadable(self.path, error) from error
            if not got:
                raise UserError(f"{place(self.path)}: ends early; expected more pixels; copy or write it again")
            view, offset = view[got:], offset + got


@dataclass(frozen=True)
class RowSource:
    """What the sources of this module share: the images are the rows of one array."""

    where: str
    layout: Layout

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, H, W, 3."""
        return self.layout.images

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what ``read`` returns."""
        return self.layout.pixels

    def name(self, row: int) -> str:
        """File and row."""
        return f"{self.where}, row {row}"

    def stem(self, row: int) -> str:
        """Nothing: a row has no file."""
        return ""

    def read(self, rows: NDArray[np.int64]) -> Pixels:
        """Read the rows asked for and nothing else: ``n x H x W x 3``."""
        raise NotImplementedError


@dataclass(frozen=True)
class RawSource(RowSource):
    """Rows that lie uncompressed in a file, one after another."""

    file: OpenFile
    offset: int
    stored: np.dtype[Any]  # with its byte order; two bytes of any kind for bfloat16

    def read(self, rows: NDArray[np.int64]) -> Pixels:
        """Read straight from the file."""
        out = np.empty((len(rows), *self.layout.shape[1:]), self.stored)
        for target, row in zip(out, rows, strict=True):
            self.file.read_into(target, self.offset + int(row) * self.layout.image_bytes)
        return self.layout.hand_out(out)


@dataclass(frozen=True)
class MemorySource(RowSource):
    """Rows of an array that is mapped into memory: numpy's or torch's."""

    array: Any

    def read(self, rows: NDArray[np.int64]) -> Pixels:
        """Copy the rows asked for."""
        part = self.array[rows]
        return self.layout.hand_out(part if isinstance(part, np.ndarray) else _from_torch(part))


def _from_torch(part: Any) -> NDArray[Any]:
    import torch

    return np.asarray((part.view(torch.int16) if part.dtype == torch.bfloat16 else part).numpy())


@dataclass(frozen=True)
class DatasetSource(RowSource):
    """Rows of an HDF5 dataset."""

    dataset: Any

    def read(self, rows: NDArray[np.int64]) -> Pixels:
        """Read the rows asked for, neighbours at once."""
        out = np.empty((len(rows), *self.layout.shape[1:]), self.layout.stored)
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for run in np.split(np.arange(len(rows)), breaks):
            if len(run):
                first, last = int(rows[run[0]]), int(rows[run[-1]])
                try:
                    out[run[0] : run[-1] + 1] = self.dataset[first : last + 1]
                except (OSError, RuntimeError, ValueError, KeyError) as error:
                    raise UserError(
                        f"{self.name(first)}: damaged ({one_line(error)}); expected a whole HDF5 file; copy it again"
                    ) from error
        return self.layout.hand_out(out)
