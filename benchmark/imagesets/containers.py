"""Files of arrays: ``.npy``, ``.npz``, ``.safetensors``, ``.pt`` and HDF5, opened as sources of images.

Everything is judged by headers before pixels are read. What a header declares is held against the file's size, no
pickle is executed, and no link out of the file is followed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.errors import UserError
from benchmark.imagesets.arrays import (
    EXPECTED,
    DatasetSource,
    Layout,
    MemorySource,
    OpenFile,
    RawSource,
    RowSource,
    choose,
    ids_beside,
    layout,
)
from benchmark.imagesets.labels import Labels, labels_of, labels_of_array
from benchmark.imagesets.npy import NpyHeader, read_header, read_small_array
from benchmark.imagesets.wording import damaged, one_line, place

Opened = tuple[RowSource, Labels | None]
"""The images, and the ids that the same file holds."""

_UNLIKELY_BYTES, _UNLIKELY_RATIO = 2**30, 200  # photographs do not compress like this
_LARGEST_PICKLE = 64 * 2**20  # of the description in a .pt file; the tensors lie outside it
_LARGEST_CHUNK = 2**30
_LONGEST_TEXT = 4096
_CHUNK_CACHE = 256 * 2**20
_SAFETENSORS = {"U8": "uint8", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_SAFETENSORS_IDS = {"I64": "<i8", "I32": "<i4", "U64": "<u8", "U32": "<u4", "I16": "<i2", "U16": "<u2", "U8": "u1"}


def _stored_dtype(found: Layout, own: np.dtype[Any] | None = None) -> np.dtype[Any]:
    return np.dtype("<u2") if found.stored == "bfloat16" else own or np.dtype(found.stored).newbyteorder("<")


def _where(path: Path, key: str | None) -> str:
    return place(path) if key is None else f"{place(path)}::{one_line(key, 60)}"


# --- numpy ------------------------------------------------------------------------------------------------------------


def open_npy(path: Path, key: str | None) -> Opened:
    """Open an array that ``np.save`` wrote."""
    where = place(path)
    if key is not None:
        raise UserError(f"{where}: holds one array without a name; leave out '::{one_line(key, 60)}'")
    with path.open("rb") as stream:
        header = read_header(stream, where)
    found = layout(where, header.shape, header.dtype.name)
    file = OpenFile(path)
    if file.size != header.offset + header.nbytes:
        size = ValueError(f"{file.size} bytes instead of {header.offset + header.nbytes}")
        raise damaged(path, size, f"one whole array, {header.dtype} {header.shape}")
    if header.fortran:
        mapped = np.memmap(path, header.dtype, "r", header.offset, header.shape, "F")
        return MemorySource(where, found, mapped), None
    return RawSource(where, found, file, header.offset, header.dtype), None


def open_npz(path: Path, key: str | None) -> Opened:
    """Open an archive of ``np.savez``, or of ``np.savez_compressed``, whose array is unpacked to a temporary file."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            name = choose(place(path), ".npz", key, members)
            where = _where(path, name)
            header = _member_header(archive, members[name], where)
            found = layout(where, header.shape, header.dtype.name)
            source: RowSource
            if header.fortran:
                raise UserError(f"{where}: stored column by column; save it with np.ascontiguousarray(images)")
            if members[name].compress_type == zipfile.ZIP_STORED:
                start = _member_start(path, members[name])
                source = RawSource(where, found, OpenFile(path), start + header.offset, header.dtype)
            else:
                unpacked = _unpacked(archive, members[name], header, where)
                source = RawSource(where, found, unpacked, 0, header.dtype)
            beside = ids_beside(name, members)
            if beside is None:
                return source, None
            _member_header(archive, members[beside], _where(path, beside))
            with archive.open(members[beside]) as stream:
                ids = read_small_array(stream, _where(path, beside))
            return source, labels_of_array(ids, _where(path, beside))
    except UserError:
        raise
    except Exception as error:  # zipfile and the decompressors raise many kinds
        raise damaged(path, error, "an archive as np.savez writes it") from error


def _member_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> NpyHeader:
    with archive.open(info) as stream:
        header = read_header(stream, where)
    if info.file_size != header.offset + header.nbytes:
        size = ValueError(f"{info.file_size} bytes instead of {header.offset + header.nbytes}")
        raise damaged(where, size, f"one whole array, {header.dtype} {header.shape}")
    return header


def _member_start(path: Path, info: zipfile.ZipInfo) -> int:
    """Return where the bytes of a member that is not compressed begin, and check that the file holds all of them."""
    with path.open("rb") as stream:
        stream.seek(info.header_offset)
        name, extra = struct.unpack("<26xHH", stream.read(30))
    start = info.header_offset + 30 + int(name) + int(extra)
    if info.compress_size != info.file_size or start + info.file_size > path.stat().st_size:
        raise ValueError("a member is longer than the file")
    return start


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo, header: NpyHeader, where: str) -> OpenFile:
    """Unpack the pixels of a compressed member to a file that vanishes with its last reader."""
    size = f"{header.nbytes / 2**30:.1f} GiB"
    if header.nbytes > _UNLIKELY_BYTES and header.nbytes > _UNLIKELY_RATIO * info.compress_size:
        raise UserError(f"{where}: {info.compress_size} bytes unpack to {size}: refused; save the array with np.savez")
    if header.nbytes > shutil.disk_usage(tempfile.gettempdir()).free:
        raise UserError(
            f"{where}: unpacks to {size}, more than is free in {place(tempfile.gettempdir())}\n"
            "save the array with np.savez (not compressed), or set TMPDIR to a larger disk"
        )
    with tempfile.TemporaryFile() as target, archive.open(info) as stream:
        stream.read(header.offset)
        shutil.copyfileobj(stream, target, 2**20)  # zipfile stops at the declared size and compares the checksum
        target.flush()
        if target.tell() != header.nbytes:
            raise ValueError(f"{target.tell()} of {header.nbytes} bytes")
        return OpenFile(where, os.dup(target.fileno()))


# --- safetensors ------------------------------------------------------------------------------------------------------


def open_safetensors(path: Path, key: str | None) -> Opened:
    """Open a tensor of a safetensors file."""
    from safetensors import safe_open

    try:
        with safe_open(path, "numpy"):  # checks the whole header: sizes, offsets, that nothing overlaps
            pass
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            entries = json.loads(stream.read(length))
    except Exception as error:
        raise damaged(path, error, "a safetensors file") from error
    entries.pop("__metadata__", None)
    name = choose(place(path), ".safetensors", key, entries)
    where = _where(path, name)
    tensor = entries[name]
    found = layout(where, tensor["shape"], _SAFETENSORS.get(tensor["dtype"], tensor["dtype"]))
    file = OpenFile(path)
    source = RawSource(where, found, file, 8 + length + tensor["data_offsets"][0], _stored_dtype(found))
    beside = ids_beside(name, entries)
    if beside is None:
        return source, None
    tensor, where = entries[beside], _where(path, beside)
    if tensor["dtype"] not in _SAFETENSORS_IDS or math.prod(tensor["shape"]) > 10 * found.shape[0]:
        raise UserError(f"{where}: ids are {tensor['dtype']} {tensor['shape']}; expected one whole number an image")
    ids = np.empty(tensor["shape"], _SAFETENSORS_IDS[tensor["dtype"]])
    if ids.size:
        file.read_into(ids, 8 + length + tensor["data_offsets"][0])
    return source, labels_of_array(ids, where)


# --- torch ------------------------------------------------------------------------------------------------------------


def open_pt(path: Path, key: str | None) -> Opened:
    """Open a tensor that ``torch.save`` wrote, alone or in a dictionary; nothing else in the file is executed."""
    import torch

    where = place(path)
    _check_pt_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        if "GLOBAL" in str(error) or "nsupported" in str(error):
            raise UserError(
                f"{where}: holds more than tensors (a pickle, which could run code): refused\n"
                "save the tensor alone: torch.save(images, path)"
            ) from error
        raise damaged(path, error, "tensors as torch.save writes them") from error
    ids: object = None
    if isinstance(content, Mapping):
        named = {str(k): value for k, value in content.items()}
        own = choose(where, ".pt", key, [k for k, value in named.items() if isinstance(value, torch.Tensor)])
        beside = ids_beside(own, named)
        where, content, ids = _where(path, own), named[own], named[beside] if beside else None
    elif key is not None:
        raise UserError(f"{where}: holds one {type(content).__name__} without names; leave out '::{one_line(key, 60)}'")
    if not isinstance(content, torch.Tensor):
        raise UserError(
            f"{where}: holds a {type(content).__name__}; expected a tensor, {EXPECTED}\n"
            "save one tensor: torch.save(torch.stack(list_of_images), path)"
        )
    if content.layout != torch.strided or content.device.type != "cpu" or content.is_quantized:
        raise UserError(f"{where}: no plain tensor ({content.layout}, {content.device}); save images.cpu().to_dense()")
    found = layout(where, content.shape, str(content.dtype).removeprefix("torch."))
    source = MemorySource(where, found, content.detach())
    if ids is None:
        return source, None
    if isinstance(ids, torch.Tensor):
        if ids.layout != torch.strided or ids.device.type != "cpu" or ids.numel() > 10 * found.shape[0]:
            raise UserError(f"{where}: ids are no plain tensor of one whole number an image; save a list of ids")
        return source, labels_of_array(ids.detach().numpy(), f"ids in {place(path)}")
    if not isinstance(ids, list | tuple):
        raise UserError(f"{where}: ids are a {type(ids).__name__}; expected a tensor or a list")
    return source, labels_of(ids, f"ids in {place(path)}")


def _check_pt_archive(path: Path) -> None:
    """Check that the file is what ``torch.save`` writes today: an archive in which nothing is compressed."""
    expected = "a file as torch.save writes it (PyTorch 1.6 and later)"
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except Exception as error:
        raise damaged(path, error, expected) from error
    pickles = [info for info in infos if info.filename.endswith("data.pkl")]
    plain = all(i.compress_type == zipfile.ZIP_STORED and i.compress_size == i.file_size for i in infos)
    if len(pickles) != 1 or not plain or sum(i.file_size for i in infos) > path.stat().st_size:
        raise damaged(path, ValueError("no plain archive of tensors"), expected)
    if pickles[0].file_size > _LARGEST_PICKLE:
        raise damaged(path, ValueError(f"a description of {pickles[0].file_size} bytes"), expected)


# --- HDF5 -------------------------------------------------------------------------------------------------------------


def open_hdf5(path: Path, key: str | None) -> Opened:
    """Open a dataset of an HDF5 file."""
    import h5py

    try:
        if not h5py.is_hdf5(path):
            raise ValueError("no HDF5 signature")
        with h5py.File(path, "r") as file:
            names = _datasets(file)
            name = choose(place(path), path.suffix, key.strip("/") if key else None, names)
            where = _where(path, name)
            dataset = file[name]
            found = layout(where, dataset.shape or (), dataset.dtype.name)
            _check_storage(dataset, where, path.stat().st_size)
            chunks, offset, stored = dataset.chunks, dataset.id.get_offset(), dataset.dtype
            ids = ids_beside(name, names)
            labels = None if ids is None else _dataset_labels(file[ids], _where(path, ids), path, found.shape[0])
        if chunks is None:
            return RawSource(where, found, OpenFile(path), offset, stored), labels
        # Images that share their chunks are unpacked together: room for them until the whole run has been read.
        room = min(chunks[0] * found.image_bytes + 2**20, _CHUNK_CACHE)
        dataset = h5py.File(path, "r", rdcc_nbytes=room, rdcc_nslots=100_003)[name]
    except UserError:
        raise
    except Exception as error:  # h5py raises many kinds for a damaged file
        raise damaged(path, error, "an HDF5 file") from error
    return DatasetSource(where, found, dataset), labels


def _datasets(file: Any) -> list[str]:
    """Return the names of the datasets that lie in the file itself: links to elsewhere are not followed."""
    import h5py

    names: list[str] = []

    def look(name: str, item: object) -> bool | None:
        if isinstance(item, h5py.Dataset):
            names.append(name)
        return True if len(names) > 10_000 else None

    file.visititems(look)  # hard links only, each object once
    return names


def _check_storage(dataset: Any, where: str, file_size: int) -> None:
    """Check that the values of a dataset lie in its file, and where: HDF5 itself crashes on some wrong sizes."""
    if dataset.is_virtual or dataset.external:
        raise UserError(f"{where}: its values lie in other files: refused; copy them into one dataset")
    offset, size = dataset.id.get_offset(), dataset.size * dataset.dtype.itemsize
    if dataset.chunks is None:
        if offset is None or offset + size > file_size:
            raise ValueError(f"{size} bytes of values were never written to it")
        return
    chunk = math.prod(dataset.chunks) * dataset.dtype.itemsize
    if chunk > _LARGEST_CHUNK:
        raise UserError(f"{where}: chunks of {dataset.chunks}; expected at most 1 GiB each; write it with smaller ones")
    filtered = dataset.id.get_create_plist().get_nfilters() > 0
    seen: set[tuple[int, ...]] = set()

    def look(info: Any) -> None:
        whole = 0 < info.size <= file_size - info.byte_offset and (filtered or info.size == chunk)
        if not whole or info.filter_mask or info.chunk_offset in seen:
            raise ValueError(f"chunk {info.chunk_offset} of {info.size} bytes at {info.byte_offset}")
        seen.add(info.chunk_offset)

    dataset.id.chunk_iter(look)
    expected = math.prod(-(-length // step) for length, step in zip(dataset.shape, dataset.chunks, strict=True))
    if len(seen) < expected:
        raise UserError(
            f"{where}: {expected - len(seen)} of {expected} chunks were never written; expected a whole array; "
            "write it again"
        )


def _dataset_labels(dataset: Any, where: str, path: Path, n_images: int) -> Labels:
    if not dataset.shape or math.prod(dataset.shape) > 10 * n_images:
        raise UserError(f"{where}: {dataset.dtype} {dataset.shape}; expected one id an image")
    if dataset.dtype.kind not in "iuS":  # text of any length lies in a heap, on which HDF5 hangs where it is damaged
        raise UserError(
            f"{where}: ids are text of any length, or no ids; expected whole numbers or text of one length\n"
            "write them with np.array(ids, dtype='S')"
        )
    if not 0 < dataset.dtype.itemsize <= _LONGEST_TEXT:
        raise UserError(f"{where}: {dataset.dtype} {dataset.shape}; expected one id an image")
    _check_storage(dataset, where, path.stat().st_size)
    return labels_of_array(dataset[()], where)


OPENERS: Mapping[str, Callable[[Path, str | None], Opened]] = {
    ".npy": open_npy,
    ".npz": open_npz,
    ".safetensors": open_safetensors,
    ".pt": open_pt,
    ".h5": open_hdf5,
    ".hdf5": open_hdf5,
}
"""Suffix of a file -> what opens it."""
