"""The authors' released files, read safely, fitted to our modules by name, and written as safetensors.

The files: ``encoder_ch128.pth``, ``decoder_vgg_*.pth``, ``decoder_clipg_*.pth`` (pickled modules),
``combined_model.ckpt`` (a Lightning checkpoint) and ``v2c_128_mapping_gmm_v2.npy`` (each cluster's voxels, padded with
-1).
``methods.brain_it.official`` knows what fits; ``benchmark.torch_file`` reads without running anything.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmark.errors import UserError
from benchmark.networks.unclip import UNET, UNET_PREFIX, build_unet, unet_names
from benchmark.official import METADATA, read_parts
from benchmark.progress import Progress
from benchmark.restricted_pickle import as_array, as_mapping, as_scalar, is_array, printable, read, refusing
from benchmark.torch_file import Contents, StoredTensor, TorchFile
from methods.brain_it.clustering import V2C
from methods.brain_it.official import MAPPING_VERSION, SIGMAS_IN_JOINT, Fit, MisfitError, fit, some
from methods.brain_it.unclip import NoiseSchedule

NSD_VOXELS = (39548, 39548, 39548, 39548, 39548, 39198, 39548, 39511)
"""Voxels of NSD's eight subjects, in the official order."""

_TABLE_NAMES = ("v2c_mapping", "mapping", "v2c", "table")
_NPY_MAGIC = b"\x93NUMPY"
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_LIST = "see every name: python -m benchmark.convert --list --official"


@dataclass(frozen=True)
class Part:
    """One official file, looked through and found to fit.

    Attributes:
        path: the official file.
        role: its part in the pipeline: "encoder", "clusters", "lowlevel", "semantic", "joint", or "bit".
        about: what stands in the converted file's metadata: kind, file, sha256, sizes, settings ...
        tensors: our names: tensors in the official file (or in memory).
        mapping: the voxel-to-cluster mapping, for role "clusters".
    """

    path: Path
    role: str
    about: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor | Tensor]
    mapping: V2C | None = None

    def report(self) -> str:
        """Return what the file holds, for people."""
        about = self.about
        lines = [f"{self.path}: {about['kind']} ({self.role}), {about['format']}, sha256 {about['sha256'][:12]}..."]
        sizes = {f"{name.replace('_', ' ')} {size:,}" for name, size in about["sizes"].items() if name != "voxels"}
        lines.append(f"  subjects {subjects(about['sizes']['voxels'])}; voxels {about['sizes']['voxels']:,}")
        lines.append("  " + ", ".join(sorted(sizes)))
        if about["settings"]:
            told = (f"{name.replace('_', ' ')} {_plain(value)}" for name, value in about["settings"].items())
            lines.append("  settings: " + ", ".join(told))
        for why, count in about["left_out"].items():
            lines.append(f"  left out: {count} tensors, {why}")
        if about["parameters"]:
            lines.append(f"  {about['parameters']:,} parameters in {about['tensors']} tensors ({about['dtypes']})")
        return "\n".join(lines)


def subjects(voxels: int) -> str:
    """Return whose voxels these may be, going by their number alone: the files do not say."""
    everybody = sum(NSD_VOXELS)
    if voxels == everybody:
        return "8 (all of NSD)"
    for count in sorted(set(NSD_VOXELS)):
        who = [str(number + 1) for number, own in enumerate(NSD_VOXELS) if own == count]
        one = f"subject {who[0]}" if len(who) == 1 else f"subject {', '.join(who[:-1])} or {who[-1]}"
        if voxels == count:
            return f"1 (by its voxels, NSD's {one})"
        if voxels == everybody - count:
            return f"7 (by their voxels, all of NSD but {one})"
    return "not told by the file (not NSD's voxel counts)"


def inspect(path: Path, unet: Mapping[str, Any] = UNET) -> Part:
    """Look through an official file; ``unet`` are the sizes of the joint model's denoiser.

    Raises:
        UserError: missing, damaged, refused, or it does not fit; the message names what.
    """
    if _is_npy(path):
        mapping = _read_mapping(path)
        sizes = mapping.sizes()
        counts = {"voxels": len(mapping.labels), "clusters": mapping.n_clusters, "largest": sizes.maximum}
        about = _about(path, "voxel-to-cluster table", "npy", counts | {"smallest": sizes.minimum}, {}, {}, [])
        return Part(path, "clusters", about, {"labels": torch.from_numpy(mapping.labels)}, mapping)
    file, contents = _open(path)
    found = _fit(path, contents, unet)
    if SIGMAS_IN_JOINT in contents.tensors and found.role == "joint":
        with refusing(path):
            _check_sigmas(path, contents.tensors[SIGMAS_IN_JOINT].load())
    tensors = {ours: contents.tensors[theirs] for ours, theirs in found.names.items()}
    odd = [f"{found.names[name]} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in _FLOATS]
    if odd:
        raise UserError(f"{path}: weights that are no floating-point numbers: {printable(', '.join(odd), 300)}")
    whole = printable(contents.classes.get("", "")) if contents.classes else ""
    form = f"torch {file.format}, " + (f"a pickled {whole}" if whole else "state dicts")
    left_out = {why: len(names) for why, names in found.left_out.items()}
    about = _about(path, found.kind, form, found.sizes, found.settings, left_out, list(tensors.values()))
    return Part(path, found.role, about, tensors)


def listing(path: Path) -> Iterator[str]:
    """Yield a line for each tensor in a file (name, type, shape), and what the file is or why it does not fit.

    Raises:
        UserError: missing, damaged or refused.
    """
    if _is_npy(path):
        yield inspect(path).report()
        return
    _, contents = _open(path)
    width = max((len(printable(name, 100)) for name in contents.tensors), default=0)
    for name, tensor in contents.tensors.items():
        yield f"{printable(name, 100):{width}}  {tensor.dtype:8}  {' x '.join(map(str, tensor.shape)) or 'scalar'}"
    yield f"{path}: {len(contents.tensors)} tensors"
    try:
        found = _fit(path, contents, UNET)
        yield f"fits the released {found.kind}, role {found.role}"
    except UserError as error:
        yield str(error)


def convert(
    paths: Sequence[Path], out: Path, progress: Progress | None = None, unet: Mapping[str, Any] = UNET
) -> list[Part]:
    """Convert official files to one safetensors file.

    Of one file the tensors have the names of our module (``BIT``, ``BrainEncoder`` ..., see
    ``methods.brain_it.official``); of several, these names behind the part's role and a dot (``semantic.proj.weight``).
    ``out`` appears when it is complete, and is replaced if it exists.

    Raises:
        UserError: a file cannot be read or does not fit, two files have the same role or do not belong together,
            weights are not finite, or ``out`` cannot be written.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: expected a name that ends in .safetensors")
    if any(path.resolve() == out.resolve() for path in paths):
        raise UserError(f"--out {out} is one of the official files; choose another name")
    parts = [inspect(path, unet) for path in paths]
    _check_together(parts)
    tensors: dict[str, Tensor] = {}
    described = {}
    progress = progress or Progress()
    with progress.bar("reading weights", total=sum(len(part.tensors) for part in parts)) as bar:
        taken = set()
        for part in parts:
            prefix = f"{part.role}." if len(parts) > 1 else ""
            described[part.role] = {**part.about, "prefix": prefix}
            for name, stored in part.tensors.items():
                tensor = stored if isinstance(stored, Tensor) else _load(part, name, stored)
                address = tensor.untyped_storage().data_ptr()
                tensors[prefix + name] = tensor.clone() if address in taken else tensor  # tied weights, and views
                taken.add(address)
                bar.advance()
    metadata = {METADATA: json.dumps({"mapping_version": MAPPING_VERSION, "parts": described}, sort_keys=True)}
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if len(parts) == 1 and parts[0].mapping is not None:
            parts[0].mapping.save(temporary, metadata)  # so that V2C.load reads it
        else:
            save_file(tensors, temporary, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {out}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        with suppress(OSError):
            temporary.unlink()
    return parts


def load(path: Path, role: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a converted file, or one part of it.

    Args:
        path: what `convert` wrote.
        role: which part; may be left out where there is only one.

    Returns:
        tensors by the names of our module, and what is known of them: kind, file, sha256, sizes, settings.

    Raises:
        UserError: not a converted file, or without that part.
    """
    parts = read_parts(path)
    if role is None and len(parts) == 1:
        (role,) = parts
    if role not in parts:
        wish = f"not {role}" if role else "say which part"
        raise UserError(f"{path}: holds {', '.join(parts)}; {wish}")
    prefix = parts[role]["prefix"]
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}, parts[role]
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _is_npy(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_NPY_MAGIC)) == _NPY_MAGIC
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _open(path: Path) -> tuple[TorchFile, Contents]:
    """Open a torch file and flatten its modules: those of a Lightning checkpoint are in its "state_dict"."""
    file = TorchFile(path)
    whole = as_mapping(file.content)
    root = whole["state_dict"] if whole is not None and "state_dict" in whole else file.content
    return file, file.contents(root)


def _fit(path: Path, contents: Contents, unet: Mapping[str, Any]) -> Fit:
    shapes = {name: tensor.shape for name, tensor in contents.tensors.items()}
    if not shapes:
        raise UserError(f"{path}: holds no tensors; expected one of the authors' released files")
    try:
        return fit(shapes, contents.settings, contents.classes, lambda found: fit_unet(found, unet))
    except MisfitError as error:
        raise UserError(f"{path} {printable(error, 1500)}\n{_LIST} {path}") from None


def fit_unet(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> dict[str, str]:
    """Return diffusers' name: sgm's name of every tensor of a UNet.

    Args:
        shapes: shapes by sgm's name, without the prefix "model.diffusion_model.".
        config: arguments of diffusers' ``UNet2DConditionModel``.

    Raises:
        MisfitError: a tensor is missing, unexpected, or of another shape than in that model.
    """
    expected = {name: tuple(value.shape) for name, value in build_unet(config).state_dict().items()}
    stand_ins = {UNET_PREFIX + name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    theirs = {id(stand_in): name.removeprefix(UNET_PREFIX) for name, stand_in in stand_ins.items()}
    try:
        renamed = {ours: theirs[id(stand_in)] for ours, stand_in in unet_names(stand_ins, config).items()}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # diffusers checks nothing
        raise MisfitError("denoiser", [f"not a UNet of SDXL's family ({type(error).__name__}: {error})"]) from None
    found = {ours: shapes[name] for ours, name in renamed.items()}
    problems = [
        f"{what}: {some(names)}"
        for what, names in (
            ("missing (diffusers' names)", [name for name in expected if name not in found]),
            ("unexpected", [renamed[name] for name in found if name not in expected]),
            (
                "wrong shape",
                [
                    f"{renamed[name]} is {found[name]}, not {shape}"
                    for name, shape in expected.items()
                    if found.get(name, shape) != shape
                ],
            ),
        )
        if names
    ]
    if problems:
        raise MisfitError("denoiser", problems)
    return renamed


def _about(
    path: Path,
    kind: str,
    form: str,
    sizes: Mapping[str, int],
    settings: Mapping[str, Any],
    left_out: Mapping[str, int],
    tensors: Sequence[StoredTensor],
) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "kind": kind,
        "file": path.name,
        "sha256": digest,
        "format": form,
        "sizes": dict(sizes),
        "settings": dict(settings),
        "left_out": dict(left_out),
        "tensors": len(tensors),
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "dtypes": ", ".join(sorted({tensor.dtype for tensor in tensors})),
    }


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(part)}" for key, part in value.items()) + "}"
    if isinstance(value, tuple | list):
        return " ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else printable(value)


def _load(part: Part, name: str, stored: StoredTensor) -> Tensor:
    with refusing(part.path):
        tensor = stored.load()
    if not torch.isfinite(tensor).all():
        raise UserError(f"{part.path}: weights that are not finite, for {name}; download it again")
    return tensor


def _check_together(parts: Sequence[Part]) -> None:
    """Refuse two files of one role, and files of different voxels or clusters."""
    if twice := [role for role, count in Counter(part.role for part in parts).items() if count > 1]:
        names = ", ".join(part.path.name for part in parts if part.role == twice[0])
        raise UserError(f"two files of the role '{twice[0]}': {names}; convert them one by one")
    for size in ("voxels", "clusters"):
        told = {part.path.name: part.about["sizes"][size] for part in parts if size in part.about["sizes"]}
        if len(set(told.values())) > 1:
            numbers = ", ".join(f"{name} {number:,}" for name, number in told.items())
            raise UserError(f"files that do not belong together: they differ in {size} ({numbers})")


def _check_sigmas(path: Path, sigmas: Tensor) -> None:
    ours = NoiseSchedule().sigmas
    theirs = sigmas.float().sort().values
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-3):
        raise UserError(f"{path}: {SIGMAS_IN_JOINT} are other noise levels than SDXL's 1000")


def _read_mapping(path: Path) -> V2C:
    """Read a table of each cluster's voxels: padded integers, or (pickled) lists of them, or a dict that holds it."""
    with refusing(path):
        table = _read_npy(path)
        problem = _table_problem(table)
    if problem:
        raise UserError(f"{path}: not a voxel-to-cluster table: {problem}")
    return V2C.from_table(table)


def _read_npy(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"npy format {version}")
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        try:
            _, _, dtype = header(file)
        except tokenize.TokenError as error:  # numpy lets it through
            raise ValueError(f"an npy header that cannot be parsed: {error}") from None
        if not dtype.hasobject:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        return _table_of(read(file.read()), 0)


def _table_of(value: object, depth: int) -> np.ndarray:
    """Return the padded table within a pickled object."""
    if depth > 3:
        raise ValueError("a table within containers within containers")
    if is_array(value):
        value = as_array(value)
    if isinstance(value, np.ndarray):
        if value.dtype != object:
            return value
        return _table_of(value.item() if value.ndim == 0 else list(value), depth + 1)
    if (mapping := as_mapping(value)) is not None:
        name = next((name for name in _TABLE_NAMES if name in mapping), None)
        if name is None:
            known = ", ".join(_TABLE_NAMES)
            raise ValueError(f"keys {printable(', '.join(map(str, mapping)))}; expected one of {known}")
        return _table_of(mapping[name], depth + 1)
    if isinstance(value, list | tuple):
        return _padded([_voxels(row) for row in value])
    raise ValueError(f"{type(value).__name__} where a table was expected")


def _voxels(row: object) -> np.ndarray:
    numbers = as_array(row) if is_array(row) else row
    if isinstance(numbers, list | tuple):
        numbers = np.array([as_scalar(number) for number in numbers] or np.empty(0, np.int64))
    if not isinstance(numbers, np.ndarray) or numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise ValueError("a cluster that is no list of voxel numbers")
    return numbers


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    if len({len(row) for row in rows}) == 1:
        return np.stack(rows)
    table = np.full((len(rows), max((len(row) for row in rows), default=0)), -1, dtype=np.int64)
    for row, voxels in zip(table, rows, strict=True):
        row[: len(voxels)] = voxels
    return table


def _table_problem(table: np.ndarray) -> str:
    """Return why a table does not name every voxel exactly once; "" if it does."""
    if table.ndim != 2 or table.dtype.kind not in "iu" or table.size == 0:
        return f"{table.dtype} of shape {table.shape}; expected integers (clusters, largest cluster), padded with -1"
    voxels = table[table != -1].astype(np.int64)
    if voxels.size == 0:
        return "it holds no voxel"
    if voxels.min() < 0 or voxels.max() >= table.size:
        outside = voxels[(voxels < 0) | (voxels >= table.size)]
        return f"it names voxel {outside[0]}; expected 0..{voxels.size - 1}"
    times = np.bincount(voxels)
    if (times > 1).any():
        first = int(np.argmax(times > 1))
        return f"voxel {first} is in it {times[first]} times ({(times > 1).sum()} voxels are in it more than once)"
    if (times == 0).any():
        return f"voxel {np.argmax(times == 0)} is in no cluster ({(times == 0).sum()} voxels are in none)"
    return ""
