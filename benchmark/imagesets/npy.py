"""Headers of ``.npy`` files, read before anything else of them is: no pickle is opened, no size is believed."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from benchmark.errors import UserError
from benchmark.imagesets.wording import damaged

_LARGEST_SMALL = 64 * 2**20  # bytes


@dataclass(frozen=True)
class NpyHeader:
    """What the header of a ``.npy`` file says."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int  # bytes before the data

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(stream: IO[bytes], where: str) -> NpyHeader:
    """Read a header from the start of ``stream``, and leave the stream at the data.

    Raises:
        UserError: there is none, or the array holds Python objects.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on headers that Python 2 wrote
            version = np.lib.format.read_magic(stream)
            if version == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            elif version == (2, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
            else:
                raise ValueError(f"version {version[0]}.{version[1]}, which plain arrays do not need")
            offset = stream.tell()
    except Exception as error:  # numpy hands the header to Python's parser, which raises many kinds
        raise damaged(where, error, "a .npy array as np.save writes it") from error
    if dtype.hasobject:
        raise UserError(
            f"{where}: an array of Python objects (a pickle, which could run code): refused\n"
            "save the pixels as one uint8 or float32 array: np.save(path, np.stack(list_of_images))"
        )
    if any(not isinstance(length, int) or length < 0 for length in shape):
        raise damaged(where, ValueError(f"shape {shape}"), "a .npy array as np.save writes it")
    return NpyHeader(tuple(int(length) for length in shape), dtype, bool(fortran), offset)


def read_small_array(stream: IO[bytes], where: str) -> np.ndarray:
    """Read an array of a few megabytes at most, such as a list of ids."""
    header = read_header(stream, where)
    if header.nbytes > _LARGEST_SMALL:
        raise UserError(f"{where}: {header.dtype} {header.shape}; expected a list of image ids; check the name")
    data = stream.read(header.nbytes)
    if len(data) != header.nbytes or header.dtype.itemsize == 0:
        error = ValueError(f"{len(data)} of {header.nbytes} bytes")
        raise damaged(where, error, "a whole .npy array")
    return np.frombuffer(data, header.dtype).reshape(header.shape, order="F" if header.fortran else "C")
