"""Read weights from files that others made, as data: no pickle and no TorchScript of theirs is run.

Three kinds of file hold a network's tensors by name: ``safetensors``; what ``torch.save`` writes of a state dict, which
torch reads with its restricted unpickler (``weights_only``); and files that hold more, such as OpenAI's TorchScript
archive of CLIP: torch could read those only by running what is in them, so ``benchmark.torch_file`` does.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmark.errors import UserError
from benchmark.restricted_pickle import as_mapping
from benchmark.torch_file import TorchFile

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
        packed = zipfile.is_zipfile(path)
        if packed and (path.suffix == ".ckpt" or _is_script(path)):
            return _recorded(path, wanted)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return _state_dict(torch.load(path, map_location="cpu", weights_only=True, mmap=packed), wanted)
    except UserError:
        raise
    except Exception as error:  # what a damaged file makes of its readers has no limits
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise UserError(
                f"{path}: holds more than tensors ({refused[1]}), and nothing in it is run;\n"
                "save the network's state_dict() alone, best as safetensors"
            ) from error
        said = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))  # torch wraps it in advice to read it anyway
        short = (said[1] if said else str(error).strip().partition("\n")[0])[:120] or type(error).__name__
        raise UserError(f"{path}: damaged, or not a network's weights ({short})") from error


def _is_script(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(re.fullmatch(r"[^/]+/constants\.pkl", member) for member in archive.namelist())


def _recorded(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Return the tensors of a file that holds more than a state dict.

    Such are TorchScript archives, which torch reads only by loading the program in them, and training checkpoints, with
    settings and callbacks beside their ``state_dict``.
    """
    file = TorchFile(path, script=True)
    whole = as_mapping(file.content) or {}
    found = file.contents(whole.get("state_dict", file.content)).tensors
    return {name: tensor.load() for name, tensor in found.items() if wanted(name)}


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
