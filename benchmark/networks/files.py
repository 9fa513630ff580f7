"""Read weights from files that others made, as data: no pickle and no TorchScript of theirs is run.

Three kinds of file hold a network's tensors by name: ``safetensors``; what ``torch.save`` writes, which torch reads
with its restricted unpickler (``weights_only``); and TorchScript archives, as OpenAI serves CLIP. torch can read the
last only by loading the program in it, so here its zip file is opened and the tensors are taken out by hand.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmark.errors import UserError

_MOST_TENSORS = 100_000
_WRAPPER = "module."
_COUNTER = "num_batches_tracked"  # of batch norms; means nothing in evaluation mode, and old files lack it


def load_weights(
    net: nn.Module,
    path: Path,
    what: str,
    unused: Sequence[str] = (),
    *,
    only: Sequence[str] = ("",),
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Put the tensors of a file into ``net``, in ``dtype``, each where its name says.

    Every tensor of ``net`` must be in the file, in the same shape; and every tensor of the file, but for those that
    ``unused`` and ``only`` leave out, must have its place in ``net``. The ``module.`` that a parallel wrapper puts
    before names is taken off first.

    Args:
        net: the architecture; made on the ``meta`` device it takes no memory until now.
        path: the file.
        what: the network, for messages.
        unused: beginnings of names that are not read, such as a classifier's.
        only: beginnings of names, one of which those that are read must have.
        convert: names and tensors of the file -> names and tensors of ``net``; what it does not know it returns as it
            is. A ``UserError`` of its own says what is missing, and no more.
        dtype: of all floating-point tensors in ``net``.

    Raises:
        UserError: the file cannot be read, or is not of this network; the message names the first tensor that is not
            as it must be.
    """
    own = net.state_dict()
    required = [name for name in own if not name.endswith(_COUNTER)]

    def wanted(name: str) -> bool:
        name = name.removeprefix(_WRAPPER)
        return name in own or (name.startswith(tuple(only)) and not name.startswith(tuple(unused)))

    def refuse(problem: object) -> UserError:
        return UserError(f"{path}: not the weights of {what}: {problem}")

    found = {name.removeprefix(_WRAPPER): tensor for name, tensor in read_tensors(path, wanted).items()}
    try:
        found = convert(found)
    except UserError as error:
        raise refuse(error) from error
    for name in required:
        if name not in found:
            missing = sum(other not in found for other in required)
            raise refuse(f"'{name}' is missing ({missing} of its {len(required)} tensors are)")
        if found[name].shape != own[name].shape:
            raise refuse(f"'{name}' is {_shape(found[name])}, expected {_shape(own[name])}")
        if not found[name].is_floating_point():
            raise refuse(f"'{name}' is {found[name].dtype}, expected floating point")
    for name in found:
        if name not in own:
            raise refuse(f"'{name}' is unexpected")
    state = {name: torch.zeros((), dtype=torch.long) for name in own if name.endswith(_COUNTER)}
    for name in required:
        state[name] = found.pop(name).to(dtype, copy=True)  # popped, so that a large network is in memory once
        if not state[name].isfinite().all():
            raise refuse(f"'{name}' holds a NaN or an infinity")
    net.load_state_dict(state, assign=True)


def _shape(tensor: Tensor) -> str:
    return " x ".join(str(size) for size in tensor.shape) or "a single number"


def read_tensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Return the tensors of a weights file by name, those only whose name is ``wanted``; nothing in it is run.

    They may share memory with the file: copy what is to be changed or kept.

    Raises:
        UserError: there is no such file, it is damaged, or it holds anything but tensors.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        if start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < path.stat().st_size:
            from safetensors import safe_open

            with safe_open(path, framework="pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys() if wanted(name)}
        if not zipfile.is_zipfile(path):
            return _state_dict(torch.load(path, map_location="cpu", weights_only=True), wanted)
        with zipfile.ZipFile(path) as archive:
            if _member(archive, "constants.pkl"):
                return _TorchScript(archive, path.stat().st_size).tensors(wanted)
        return _state_dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True), wanted)
    except Exception as error:  # what a damaged file makes of its readers has no limits
        refused = re.search(r"GLOBAL (\S+)|(\S+) is not allowed", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise UserError(
                f"{path}: holds more than tensors ({refused[1] or refused[2]}), and nothing in it is run;\n"
                "save the network's state_dict() alone, best as safetensors"
            ) from error
        short = str(error).strip().partition("\n")[0][:120] or type(error).__name__
        raise UserError(f"{path}: damaged, or not a network's weights ({short})") from error


def _state_dict(content: object, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Return the state dict that ``torch.load`` found, also where a training checkpoint wraps it."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"it holds a {type(content).__name__}, not a state dict")
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ValueError(f"its '{name}' is no tensor; save the network's state_dict() alone")
    return {name: value for name, value in content.items() if wanted(name)}


# --- TorchScript ------------------------------------------------------------------------------------------------------

_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class _Placed:
    """Where in the archive a tensor lies."""

    record: str
    dtype: torch.dtype
    count: int  # of elements of its storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _TorchScript:
    """The tensors of a TorchScript archive.

    ``data.pkl`` in it is a pickle of the module: objects of classes that the archive's program defines, whose states
    map attributes to values. Here such objects come out as plain dicts, tensors as :class:`_Placed`, and anything else
    that the pickle would call is refused.
    """

    def __init__(self, archive: zipfile.ZipFile, nbytes: int) -> None:
        self.archive = archive
        members = archive.infolist()
        # Records are stored, not packed; so no archive can unfold to more than its own size.
        if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > nbytes:
            raise ValueError("a TorchScript archive with packed or overlapping records")
        order = _member(archive, "byteorder")
        if order and archive.read(order).strip() != b"little":
            raise ValueError("a TorchScript archive written on a big-endian machine")
        pickled = _member(archive, "data.pkl")
        if pickled is None:
            raise ValueError("a TorchScript archive without data.pkl")
        self.root = pickled.removesuffix("data.pkl")
        self.pickled = pickled

    def tensors(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Return the wanted tensors by their dotted names."""
        with self.archive.open(self.pickled) as file:
            module = _ModuleUnpickler(file).load()
        placed: dict[str, _Placed] = {}
        _walk(module, "", placed)
        if not placed:
            raise ValueError("a TorchScript archive without tensors")
        return {name: self.read(place) for name, place in placed.items() if wanted(name)}

    def read(self, place: _Placed) -> Tensor:
        """Return one tensor; ``as_strided`` refuses to look beyond the bytes of its record."""
        content = bytearray(self.archive.read(f"{self.root}data/{place.record}"))
        if len(content) != place.count * place.dtype.itemsize:
            raise ValueError(f"record {place.record} has {len(content)} bytes, not those of {place.count} numbers")
        if not content:
            return torch.zeros(place.size, dtype=place.dtype)
        return torch.frombuffer(content, dtype=place.dtype).as_strided(place.size, place.stride, place.offset)


class _Module(dict[str, Any]):
    """State of a module in the archive: attribute -> value."""

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("a module whose state is not a dict")
        self.update(state)


class _ModuleUnpickler(pickle.Unpickler):
    """Reads what TorchScript pickles, and calls nothing that the pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return type("Module", (_Module,), {})  # its own each time: the pickle may set attributes of what it gets
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: _placed(*arguments)
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) in _ATTRIBUTES or module == "torch.jit._pickle":
            return lambda *arguments: None  # of lists, devices and hooks: no weights
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype, int]:
        kind, dtype, record, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not re.fullmatch(r"\w+", str(record)):
            raise pickle.UnpicklingError("a record that is no tensor's")
        return str(record), dtype, int(count)


_ATTRIBUTES = {("collections", "OrderedDict"), ("torch", "device")}


def _placed(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Placed:
    record, dtype, count = storage
    return _Placed(record, dtype, count, int(offset), tuple(map(int, size)), tuple(map(int, stride)))


def _walk(module: _Module, prefix: str, into: dict[str, _Placed]) -> None:
    """Collect the tensors of a module and of those in it, as ``state_dict`` names them."""
    for name, value in module.items():
        if isinstance(value, _Placed):
            into[prefix + name] = value
        elif isinstance(value, _Module):
            _walk(value, f"{prefix}{name}.", into)
        if len(into) > _MOST_TENSORS:
            raise ValueError("a TorchScript archive whose modules repeat without end")


def _member(archive: zipfile.ZipFile, name: str) -> str | None:
    """Return the path of a file of the archive's one top folder."""
    return next((member for member in archive.namelist() if re.fullmatch(rf"[^/]+/{re.escape(name)}", member)), None)
