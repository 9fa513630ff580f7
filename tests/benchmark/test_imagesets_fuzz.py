"""Damaged files by the hundred: each gives images or one short refusal, never another exception, code or a hang."""

from __future__ import annotations

import io
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from safetensors.numpy import save

from benchmark.errors import UserError
from benchmark.imagesets import read_ids, read_images, read_subset

EXAMPLES = 60  # a kind of file
BYTES = np.random.default_rng(2).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
FIRST = np.ascontiguousarray((BYTES / 255).astype(np.float32).transpose(0, 3, 1, 2))
MARKER = Path(tempfile.gettempdir()) / f"planted-{os.getpid()}"


class _Planted:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {MARKER}",))


def _written(write: Callable[[io.BytesIO], object]) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def _picture(kind: str, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 1
    return _written(lambda s: Image.fromarray(BYTES[0]).save(s, kind, exif=exif.tobytes(), **options))


def _hdf5(values: np.ndarray, ids: np.ndarray, version: str, **options: object) -> bytes:
    def write(stream: io.BytesIO) -> None:
        with h5py.File(stream, "w", libver=version) as file:
            file.create_dataset("g/images", data=values, **options)
            file.create_dataset("g/ids", data=ids)

    return _written(write)


FILES: dict[str, tuple[str, bytes]] = {
    "png": ("png", _picture("PNG")),
    "jpeg": ("jpg", _picture("JPEG")),
    "webp": ("webp", _picture("WEBP")),
    "webp lossless": ("webp", _picture("WEBP", lossless=True)),
    "npy": ("npy", _written(lambda s: np.save(s, BYTES))),
    "npy with code": ("npy", _written(lambda s: np.save(s, np.array([_Planted()], object), allow_pickle=True))),
    "npz": ("npz", _written(lambda s: np.savez(s, x=FIRST, ids=np.arange(3)))),
    "npz compressed": ("npz", _written(lambda s: np.savez_compressed(s, x=BYTES, ids=np.array(["a", "b", "c"])))),
    "safetensors": ("safetensors", save({"x": FIRST, "ids": np.arange(3)})),
    "pt": ("pt", _written(lambda s: torch.save(torch.from_numpy(FIRST), s))),
    "pt dictionary": (
        "pt",
        _written(lambda s: torch.save({"x": torch.from_numpy(FIRST).half(), "ids": [1, "b", 3]}, s)),
    ),
    "pt with code": ("pt", _written(lambda s: torch.save({"x": torch.from_numpy(FIRST), "y": _Planted()}, s))),
    "pickle": ("pt", pickle.dumps(_Planted())),
    "h5": ("h5", _hdf5(BYTES, np.arange(3), "latest")),
    "h5 chunks": ("h5", _hdf5(FIRST, np.arange(3), "latest", chunks=(2, 3, 8, 8), compression="gzip")),
    "h5 of old": (
        "hdf5",
        _hdf5(FIRST, np.array(list("abc"), "S"), "earliest", chunks=(2, 3, 8, 4), compression="gzip", shuffle=True),
    ),
}

_NUMBERS = (0, 1, 2, 3, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
_step = st.tuples(
    st.sampled_from(["cut", "flip", "set", "number", "number", "drop", "insert", "copy", "zeros"]),
    st.integers(0, 2**20),
    st.integers(0, 2**20),
)
damages = st.lists(_step, min_size=1, max_size=5)


def _damaged(whole: bytes, steps: Sequence[tuple[str, int, int]]) -> bytes:
    """Apply damages of the kinds that disks, networks and ill will do."""
    data = bytearray(whole)
    for kind, first, second in steps:
        at = first % (len(data) + 1)
        if kind == "cut":
            del data[at:]
        elif kind == "flip" and at < len(data):
            data[at] ^= 1 << second % 8
        elif kind == "set" and at < len(data):
            data[at] = second % 256
        elif kind == "number":
            width = (1, 2, 4, 8)[second % 4]
            value = _NUMBERS[second // 8 % len(_NUMBERS)] % 256**width
            data[at : at + width] = value.to_bytes(width, "little" if second & 4 else "big")
        elif kind == "drop":
            del data[at : at + 1 + second % 64]
        elif kind == "insert":
            data[at:at] = bytes((second * k) % 256 for k in range(1 + second % 32))
        elif kind == "copy":
            other = second % (len(data) + 1)
            data[at : at + 16] = data[other : other + 16]
        elif kind == "zeros":
            data[at : at + 1 + second % 256] = bytes(len(data[at : at + 1 + second % 256]))
    return bytes(data)


@contextmanager
def _fresh() -> Iterator[Path]:
    """A folder for one example; HDF5 would take a file that is written anew under an open one's name for the open one."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        yield Path(folder)


def _read(path: Path) -> bool:
    """Return whether a set of images could be read; fail on anything but images or a proper refusal."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            images = read_images(path)
            pixels = images[:]
            readable = True
        except UserError as error:
            _check_message(error)
            readable = False
    assert not caught, [str(w.message) for w in caught]
    assert not MARKER.exists(), "a pickle was executed"
    if readable:
        n, height, width, colours = images.shape
        assert n == len(images) == len(images.ids) >= 1 and height == width and colours == 3
        assert pixels.shape == images.shape and pixels.dtype == images.dtype
        assert len(set(zip(images.subjects or [0] * n, images.ids, strict=True))) == n
        if pixels.dtype != np.uint8:
            assert pixels.dtype.kind == "f" and 0 <= pixels.min() and pixels.max() <= 1
    return readable


def _check_message(error: UserError) -> None:
    lines = str(error).split("\n")
    assert 1 <= len(lines) <= 2 and all(line and line.isprintable() for line in lines), repr(str(error))
    assert len(str(error)) < 900


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_are_read_or_refused(kind: str) -> None:
    suffix, whole = FILES[kind]

    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None)
    @given(damages)
    def check(steps: Sequence[tuple[str, int, int]]) -> None:
        with _fresh() as folder:
            (folder / f"1.{suffix}").write_bytes(_damaged(whole, steps))
            _read(folder if suffix in ("png", "jpg", "webp") else folder / f"1.{suffix}")

    check()


@pytest.mark.parametrize("kind", FILES)
def test_whole_files_are_read(kind: str) -> None:
    """The files that are damaged above are good ones, but for those with code."""
    suffix, whole = FILES[kind]
    with _fresh() as folder:
        (folder / f"1.{suffix}").write_bytes(whole)
        readable = _read(folder if suffix in ("png", "jpg", "webp") else folder / f"1.{suffix}")
    assert readable == (kind not in ("npy with code", "pt with code", "pickle"))


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(st.sampled_from([".npy", ".npz", ".safetensors", ".pt", ".h5", ".hdf5", ".png", ".jpg", ".webp"]), st.binary())
def test_any_bytes_are_refused(suffix: str, data: bytes) -> None:
    with _fresh() as folder:
        (folder / f"1{suffix}").write_bytes(data)
        assert not _read(folder if suffix in (".png", ".jpg", ".webp") else folder / f"1{suffix}")


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    st.sampled_from([".png", ".webp"]), st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4, unique=True)
)
def test_any_file_names_are_read_or_refused(suffix: str, stems: list[str]) -> None:
    with _fresh() as folder:
        for stem in stems:
            try:
                (folder / (stem + suffix)).write_bytes(FILES["png"][1])
            except (OSError, ValueError):  # no name of a file
                continue
        _read(folder)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    st.sampled_from([".txt", ".json", ".csv", ".tsv", ".npy", ".mat", ""]),
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=100).map(str.encode),
        damages.map(lambda steps: _damaged(_written(lambda s: np.save(s, np.arange(5))), steps)),
        damages.map(lambda steps: _damaged(b'[1, "nsd00002", "subj01_nsd3", 4, "five"]', steps)),
    ),
)
def test_any_lists_of_ids_are_read_or_refused(suffix: str, data: bytes) -> None:
    with _fresh() as folder:
        (folder / f"ids{suffix}").write_bytes(data)
        for read in (read_ids, lambda path: read_subset(path)[1]):
            try:
                ids = read(folder / f"ids{suffix}")
            except UserError as error:
                _check_message(error)
            else:
                assert ids and all(isinstance(i, int | str) for i in ids)


# --- any valid array, in every format ---------------------------------------------------------------------------------

sizes = st.tuples(st.integers(1, 4), st.integers(1, 9)).map(lambda s: (s[0], s[1], s[1], 3))
pixels = sizes.flatmap(
    lambda shape: st.one_of(
        arrays.arrays(np.uint8, shape),
        arrays.arrays(np.float32, shape, elements=st.floats(0, 1, width=32)),
        arrays.arrays(np.float64, shape, elements=st.floats(0, 1)),
    )
)


def _write_h5(path: Path, stored: np.ndarray, chunked: bool) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=stored, **({"chunks": True, "compression": "gzip"} if chunked else {}))


WRITERS: dict[str, Callable[[Path, np.ndarray], object]] = {
    "a.npy": np.save,
    "a.npz": lambda path, stored: np.savez(path, images=stored),
    "c.npz": lambda path, stored: np.savez_compressed(path, images=stored),
    "a.safetensors": lambda path, stored: path.write_bytes(save({"images": np.ascontiguousarray(stored)})),
    "a.pt": lambda path, stored: torch.save(torch.from_numpy(stored.copy()), path),
    "a.h5": lambda path, stored: _write_h5(path, stored, chunked=False),
    "c.hdf5": lambda path, stored: _write_h5(path, stored, chunked=True),
}


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(pixels, st.booleans())
def test_valid_arrays_come_back_as_they_were(images: np.ndarray, move: bool) -> None:
    """Colours last, or first where that cannot be mistaken (images of 3 x 3 pixels have one order for each type)."""
    ambiguous = images.shape[1] == 3
    first = images.dtype != np.uint8 if ambiguous else move
    stored = images.transpose(0, 3, 1, 2) if first else images
    with _fresh() as folder:
        for name, write in WRITERS.items():
            write(folder / name, stored)
            found = read_images(folder / name)
            assert (found.shape, found.dtype) == (images.shape, images.dtype), name
            np.testing.assert_array_equal(found[:], images, err_msg=name)
            np.testing.assert_array_equal(found[len(images) - 1], images[-1], err_msg=name)
        if images.dtype == np.uint8:
            for suffix in ("png", "webp"):
                (folder / suffix).mkdir()
                for k, image in enumerate(images):
                    Image.fromarray(image).save(folder / suffix / f"{k}.{suffix}", lossless=True)
                np.testing.assert_array_equal(read_images(folder / suffix)[:], images, err_msg=suffix)
