"""Files of ``torch.save`` from strangers, read without running them: tensors on demand, everything else as records.

Both formats are read: the zip archive (torch 1.6 and later) and the older sequence of pickles. Tensors stay in the
file, which is mapped into memory, until they are asked for: a checkpoint of 20 GB can be looked through on a laptop.
"""

from __future__ import annotations

import math
import mmap
import struct
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.errors import UserError
from benchmark.restricted_pickle import Name, Record, RefusedError, as_mapping, as_scalar, printable, read, refusing

if TYPE_CHECKING:
    import torch

_STORAGES = {
    "BFloat16Storage": "bfloat16",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ShortStorage": "int16",
    "UntypedStorage": "uint8",
}
_BYTES = {
    **dict.fromkeys(("bool", "int8", "uint8"), 1),
    **dict.fromkeys(("bfloat16", "float16", "int16"), 2),
    **dict.fromkeys(("float32", "int32"), 4),
    **dict.fromkeys(("float64", "int64"), 8),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_TAR_MAGIC = slice(257, 262)
_MOST_DIMENSIONS = 16
_LONGEST_SETTING = 64
_DEEPEST = 64  # modules within modules
_MOST_PARTS = 200_000  # modules, tensors and attributes, each counted as often as it is met


@dataclass(eq=False)
class _Storage:
    """Numbers in the file that tensors look at."""

    dtype: str
    size: int  # numbers
    start: int = -1  # byte in the file; -1: not found yet


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file.

    Attributes:
        dtype: as torch names it, e.g. "float32".
        shape: sizes of its dimensions.
    """

    dtype: str
    shape: tuple[int, ...]
    _strides: tuple[int, ...]
    _offset: int
    _storage: _Storage
    _data: mmap.mmap

    def load(self) -> torch.Tensor:
        """Return the tensor, contiguous. Where it lies so in the file it is a view of it: not to be written to."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        if math.prod(self.shape) == 0:
            return torch.empty(self.shape, dtype=dtype)
        count = self._storage.size * _BYTES[self._storage.dtype] // _BYTES[self.dtype]
        start, end = self._storage.start, self._storage.start + count * _BYTES[self.dtype]
        aligned = start % _BYTES[self.dtype] == 0
        buffer = memoryview(self._data)[start:end] if aligned else bytearray(self._data[start:end])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            numbers = torch.frombuffer(buffer, dtype=dtype)
        return numbers.as_strided(self.shape, self._strides, self._offset).contiguous()


@dataclass(frozen=True)
class Contents:
    """What was found in a file of modules or state dicts, flattened.

    Attributes:
        tensors: parameters and persistent buffers by their dotted names, as ``state_dict`` names them.
        settings: numbers, words and short tuples of them that modules and their parts keep as attributes, by dotted
            names.
        classes: class of each module (without its package), by dotted names; "" is the whole.
    """

    tensors: dict[str, StoredTensor]
    settings: dict[str, Any]
    classes: dict[str, str]


class TorchFile:
    """A file that ``torch.save`` wrote.

    Args:
        path: the file.
        script: read the modules of a TorchScript archive too; the program in it is left alone.

    Attributes:
        content: what was saved, as containers and records (``benchmark.restricted_pickle``).
        format: "zip" or "legacy".

    Raises:
        UserError: the file is missing, damaged, something else, or asks for more than tensors and containers.
    """

    def __init__(self, path: Path, script: bool = False) -> None:
        self.path = path
        self._script = script
        self.format = "zip"
        self._storages: dict[str, _Storage] = {}
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            reason = error.strerror if isinstance(error, OSError) else "it is empty"
            raise UserError(f"{path}: cannot be read ({reason})") from None
        with refusing(path):
            if self._data[:4] == b"PK\x03\x04":
                self.content = self._read_zip()
            elif self._data[_TAR_MAGIC] == b"ustar":
                raise RefusedError(
                    "torch before 0.2 wrote tar archives like this one; save it again with torch 1.6 or later"
                )
            elif self._data[:1] == b"\x80":
                self.format = "legacy"
                self.content = self._read_legacy()
            else:
                raise ValueError("neither a zip archive nor a pickle")

    def _read_zip(self) -> Any:
        with zipfile.ZipFile(self.path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("a zip archive, but not one of torch.save")
        root = pickles[0].removesuffix("data.pkl")
        if not self._script and any(name.startswith(f"{root}code/") for name in entries):
            raise RefusedError("a TorchScript program; weights and modules of torch.save are expected")
        if entry := entries.get(f"{root}byteorder"):
            start, size = self._stored(entry)
            if self._data[start : start + size] != b"little":
                raise RefusedError("it was written on a big-endian machine; save it again on a little-endian one")

        def persistent(identity: Any) -> _Storage:
            key, storage = self._storage(identity)
            if storage.start < 0:
                storage.start, size = self._stored(entries[f"{root}data/{key}"])
                if size != storage.size * _BYTES[storage.dtype]:
                    raise ValueError(f"{storage.size} numbers of {storage.dtype} in {size} bytes")
            return storage

        start, size = self._stored(entries[pickles[0]])
        return read(self._data[start : start + size], persistent)

    def _stored(self, entry: zipfile.ZipInfo) -> tuple[int, int]:
        """Return where an entry's bytes are in the file, and how many; torch never compresses them."""
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            raise RefusedError(f"{printable(entry.filename)} is compressed or encrypted; torch.save does neither")
        head = self._data[entry.header_offset : entry.header_offset + 30]
        name, extra = struct.unpack("<26x2H", head)
        start = entry.header_offset + 30 + name + extra
        if head[:4] != b"PK\x03\x04" or start + entry.file_size > len(self._data):
            raise ValueError("a zip archive that is cut off")
        return start, entry.file_size

    def _read_legacy(self) -> Any:
        if read(self._data) != _LEGACY_MAGIC:
            raise ValueError("a pickle, but not one of torch.save")
        if read(self._data) != _LEGACY_PROTOCOL:
            raise ValueError("a torch file of an unknown version")
        system = as_mapping(read(self._data))
        if system is None or system.get("little_endian") is not True:
            raise RefusedError("it was written on a big-endian machine; save it again on a little-endian one")

        def persistent(identity: Any) -> Any:
            if isinstance(identity, tuple) and identity[:1] == ("module",):
                return identity[1]  # a class beside its source code, which nobody reads
            if isinstance(identity, tuple) and identity[5:] not in ((), (None,)):
                raise RefusedError(
                    "it shares parts of storages, as torch before 0.4 did; save it again with a later torch"
                )
            return self._storage(identity)[1]

        content = read(self._data, persistent)
        for key in read(self._data):
            storage = self._storages[key]
            (size,) = struct.unpack("<q", self._data.read(8))
            storage.start = self._data.tell()
            if size != storage.size:
                raise ValueError(f"a storage of {size} numbers, {storage.size} were announced")
            self._data.seek(size * _BYTES[storage.dtype], 1)  # raises where the file ends before
        return content

    def _storage(self, identity: Any) -> tuple[str, _Storage]:
        kind, cls, key, _, size = identity[:5]
        if kind != "storage" or not isinstance(key, str) or type(size) is not int or size < 0:
            raise ValueError("an impossible storage")
        dtype = _STORAGES.get(cls.name) if isinstance(cls, Name) else None
        if dtype is None:
            raise ValueError("a storage of an unknown type")
        storage = self._storages.setdefault(key, _Storage(dtype, size))
        if (storage.dtype, storage.size) != (dtype, size):
            raise ValueError("a storage of two types or sizes")
        return key, storage

    def tensor(self, value: object) -> StoredTensor | None:
        """Return the tensor or parameter that a record in ``content`` describes; None for anything else.

        Raises:
            ValueError: or another error that ``refusing`` knows: it would read beyond its storage.
        """
        if not isinstance(value, Record) or not value.called:
            return None
        match value.name.rpartition(".")[2], value.args:
            case "_rebuild_parameter" | "_rebuild_parameter_with_state", (data, *_):
                return self.tensor(data)
            case "_rebuild_from_type_v2", (Name() as function, _, tuple() as args, *_):
                return self.tensor(Record(str(function), args, called=True))
            case "_rebuild_tensor" | "_rebuild_tensor_v2", (storage, offset, shape, strides, *_):
                return self._tensor(storage, offset, shape, strides)
            case "_rebuild_tensor_v3", (storage, offset, shape, strides, _, _, Name() as dtype, *_):
                return self._tensor(storage, offset, shape, strides, dtype.name)
        return None

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, dtype: str | None = None) -> StoredTensor:
        if not isinstance(storage, _Storage) or storage.start < 0:
            raise ValueError("a tensor without a storage")
        dtype = dtype or storage.dtype
        if dtype not in _BYTES:
            raise ValueError(f"a tensor of {printable(dtype)}")
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or len(shape) > _MOST_DIMENSIONS:
            raise ValueError("a tensor of impossible shape")
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a tensor of impossible shape")
        held = storage.size * _BYTES[storage.dtype] // _BYTES[dtype]
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if math.prod(shape) > 0 and (last >= held or math.prod(shape) > held):
            raise ValueError(f"a tensor of shape {tuple(shape)} in a storage of {held} numbers")
        return StoredTensor(dtype, tuple(shape), tuple(strides), offset, storage, self._data)

    def contents(self, root: object) -> Contents:
        """Flatten a module, a state dict, or dicts of them, from anywhere in ``content``.

        Raises:
            UserError: a damaged tensor, or modules nested without end.
        """
        found = Contents({}, {}, {})
        self._met = 0
        with refusing(self.path):
            self._visit(root, "", 0, found)
        return found

    def _visit(self, value: object, name: str, depth: int, found: Contents) -> None:
        if depth > _DEEPEST:
            raise ValueError("modules within modules without end")
        self._meet(1)
        if (tensor := self.tensor(value)) is not None:
            found.tensors[name] = tensor
        elif is_module(value):
            assert isinstance(value, Record)
            found.classes[name] = value.name.rpartition(".")[2]
            for child, part in _children(value):
                self._visit(part, _join(name, child), depth + 1, found)
            for key, setting in self._settings(value):
                found.settings[_join(name, key)] = setting
        elif (mapping := as_mapping(value)) is not None:
            for key, part in mapping.items():
                if isinstance(key, str):
                    self._visit(part, _join(name, key), depth + 1, found)

    def _settings(self, module: Record) -> Iterator[tuple[str, Any]]:
        """Yield the plain attributes of a module, and of the plain objects it keeps (``param.heads``)."""
        for name, value in module.attributes.items():
            parts = {name: value}
            if isinstance(value, Record) and not value.called and not is_module(value):
                self._meet(len(value.attributes))
                parts = {f"{name}.{key}": part for key, part in value.attributes.items()}
            for key, part in parts.items():
                if not isinstance(key, str) or key.startswith("_"):
                    continue
                try:
                    several = isinstance(part, list | tuple) and len(part) <= _LONGEST_SETTING
                    yield key, tuple(map(as_scalar, part)) if several else as_scalar(part)
                except ValueError:
                    continue  # a tensor, a class, a hook: no setting

    def _meet(self, parts: int) -> None:
        self._met += parts
        if self._met > _MOST_PARTS:
            raise ValueError("more parts than any model has")


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def is_module(value: object) -> bool:
    """Whether ``value`` is the record of a ``torch.nn.Module``, or of a module that TorchScript compiled."""
    if not isinstance(value, Record):
        return False
    return _is_script(value) or ("_parameters" in value.attributes and "_modules" in value.attributes)


def _is_script(value: object) -> bool:
    return isinstance(value, Record) and not value.called and value.name.startswith("__torch__.")


def _children(module: Record) -> Iterator[tuple[str, Any]]:
    """Yield what ``state_dict`` of a module would hold: parameters, persistent buffers, and the modules within."""
    attributes = module.attributes
    if _is_script(module):  # tensors and modules lie among its attributes
        for name, part in attributes.items():
            if isinstance(part, Record) and (part.called or _is_script(part)):
                yield name, part
        return
    passing = attributes.get("_non_persistent_buffers_set")
    passing = passing.args[0] if isinstance(passing, Record) and passing.args else passing
    hidden = {name for name in passing if isinstance(name, str)} if isinstance(passing, list | set) else set()
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, part in (as_mapping(attributes.get(kind)) or {}).items():
            if not isinstance(name, str):
                raise ValueError("a parameter whose name is no word")
            if part is not None and not (kind == "_buffers" and name in hidden):
                yield name, part
