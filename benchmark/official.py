"""The authors' converted weights in the place of trainings: which are there, whether they fit, what they spare.

A stage that a file stands for becomes ``official-NAME`` (``benchmark.stages.official``), which writes what stage
``NAME`` writes; what only the training needed is then no part of the plan. The files' SHA-256 are in the new stages'
digests; where they lie is a hint. Imports no torch.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from benchmark.config import Variant
from benchmark.errors import UserError
from benchmark.graph import Plan, Resources, Stage
from benchmark.restricted_pickle import printable
from benchmark.stages import VariantStages
from benchmark.weights import file_digest
from methods.brain_it.official import MAPPING_VERSION

METADATA = "official"
"""Key of a converted file's metadata: JSON with the mapping's version and, by role, what each part is made of."""

PREFIX = "official-"  # of the stages' names
STAGES = ("encoder", "clusters", "lowlevel", "semantic", "joint")
_BITS = ("lowlevel", "semantic", "joint")
_MLP_RATIO = 4
_ORIGINALS = (".pth", ".ckpt", ".npy")
_RESOURCES = {
    "encoder": Resources(gpus=1, cpus=8, memory_gb=64, hours=2),  # predicts the validation images
    "lowlevel": Resources(gpus=1, cpus=8, memory_gb=64, hours=2),  # likewise, to calibrate
    "semantic": Resources(memory_gb=16),
    "joint": Resources(memory_gb=64, hours=2),
}
_SIZES = ("dim", "depth", "heads")
_TARGETS = ("width", "input_size", "layers", "windows", "sampled", "standardise", "centre")
_ENCODER = ("network", "embed_dim", "inner", "dropout", "max_shift", "taps", "adapter_rank", "grid", "input_size")


class About(BaseModel):
    """What a converted file tells of one of its parts."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: str
    file: str
    sha256: str
    prefix: str
    sizes: dict[str, int]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One part of a converted file, for one stage.

    Attributes:
        path: the converted file.
        name: of the part in the file.
        about: what the file tells of it.
    """

    path: Path
    name: str
    about: About

    @property
    def file(self) -> str:
        """The file's name, fit for a terminal."""
        return printable(self.path.name)


def read_parts(path: Path) -> dict[str, dict[str, Any]]:
    """Return role -> what is known of the parts of a converted file.

    Raises:
        UserError: not a file that ``python -m benchmark.convert`` of this release wrote.
    """
    try:
        with safe_open(path, framework="np") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
        if METADATA not in metadata:
            raise ValueError("its metadata do not say so")
        about = json.loads(metadata[METADATA])
        version, parts = about["mapping_version"], dict(about["parts"])
        for role, part in parts.items():
            prefix = About.model_validate(part).prefix
            if not any(name.startswith(prefix) for name in names):
                raise ValueError(f"no tensor of {role}")
    except ValidationError as error:
        first = error.errors()[0]
        wrong = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise _not_converted(path, wrong) from None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise _not_converted(path, str(error)) from None
    if version != MAPPING_VERSION:
        raise UserError(
            f"{path}: converted by another version ({printable(version, 20)}, not {MAPPING_VERSION}); "
            "convert it again: python -m benchmark.convert"
        )
    return {role: {**part, "mapping_version": version} for role, part in parts.items()}


def _not_converted(path: Path, why: str) -> UserError:
    return UserError(
        f"{path}: not a converted official file ({printable(why, 120)}); type: python -m benchmark.convert"
    )


def find(folder: Path, width: int) -> tuple[dict[str, Part], list[str]]:
    """Return the parts of the converted files in ``folder`` by the stage that they stand for, and what is wrong there.

    A BIT of other sizes than the paper's ("bit") is the low-level one if its outputs are ``width`` wide, as the
    low-level tokens are, and else the semantic one.
    """
    if not folder.is_dir():
        return {}, [f"official: --official {folder}: no such folder"]
    files = sorted(folder.glob("*.safetensors"))
    problems, found = [], dict[str, list[Part]]()
    for path in files:
        try:
            for name, known in read_parts(path).items():
                about = About.model_validate(known)
                stage = ("lowlevel" if about.sizes.get("out_dim") == width else "semantic") if name == "bit" else name
                if stage not in STAGES:
                    raise UserError(f"{path}: holds {printable(name, 30)}; expected {', '.join(STAGES)}")
                found.setdefault(stage, []).append(Part(path, name, about))
        except UserError as error:
            problems.append(f"official: {error}")
    if not files:
        originals = [path.name for path in sorted(folder.iterdir()) if path.suffix in _ORIGINALS]
        first = shlex.quote(str(folder / (originals[0] if originals else "FILE")))
        problems.append(
            f"official: --official {folder} holds no converted files; type: python -m benchmark.convert --official "
            f"{first} --out {shlex.quote(str(folder))}/NAME.safetensors"
        )
    for stage, parts in found.items():
        if len(parts) > 1:
            names = ", ".join(part.file for part in parts)
            problems.append(f"official: {folder}: {names} are all of the role '{stage}'; leave one there")
    return {stage: parts[0] for stage, parts in found.items()}, problems


def take(stages: VariantStages, parts: Mapping[str, Part]) -> VariantStages:
    """Return ``stages`` with those for which there are weights in the place of those that would train them."""
    if stages.reconstruct.name.startswith("transfer-"):
        return stages  # see :func:`misfits`
    made: dict[str, Stage] = {}

    def rebuilt(stage: Stage) -> Stage:
        if stage.fingerprint not in made:
            if _replaced(stage, parts):
                read = {"data": stages.prepare, **{r: s for r, s in stage.upstream.items() if r in _READ[stage.name]}}
                own = {role: rebuilt(upstream) for role, upstream in read.items()}
                made[stage.fingerprint] = _official(stage, own, parts[stage.name])
            else:
                upstream = {role: rebuilt(upstream) for role, upstream in stage.upstream.items()}
                made[stage.fingerprint] = replace(stage, upstream=upstream)
        return made[stage.fingerprint]

    replaced = _each(stages, rebuilt)
    names = {stage.name for stage in Plan.of([replaced.end, replaced.references]).stages}
    if not any(name.startswith(PREFIX) for name in names):
        return stages

    def spared(stage: Stage) -> Stage:
        return _without_what_nobody_reads(stage, names) if stage.name == "targets" else stage

    return _each(replaced, _everywhere(spared))


_READ = {
    "encoder": ("targets",),
    "clusters": (),
    "lowlevel": ("targets", "clusters"),
    "semantic": ("targets", "clusters"),
    "joint": ("targets", "clusters"),
}


def _replaced(stage: Stage, parts: Mapping[str, Part]) -> bool:
    # Of the branches it is BITs that were released, not what may stand in their place.
    return stage.name in parts and (stage.name not in _BITS or stage.run.startswith("benchmark.stages.bit:"))


def _official(stage: Stage, upstream: Mapping[str, Stage], part: Part) -> Stage:
    """Return the stage that takes a part of a file instead of training it."""
    config, name = stage.config, stage.name
    kept: dict[str, Any] = {}
    if name == "encoder":
        kept = {key: config[key] for key in _ENCODER}
    elif name == "lowlevel":
        kept = {key: config[key] for key in (*_SIZES, *_TARGETS, "batch")}
    elif name == "semantic":
        kept = {key: config[key] for key in _SIZES}
    elif name == "joint":
        kept = {"bit": {key: config["bit"][key] for key in _SIZES}, "generator": config["generator"]}
    return Stage(
        name=PREFIX + name,
        run=f"benchmark.stages.official:run_{name}",
        config={**kept, "part": part.name},
        upstream=upstream,
        digests={**stage.digests, f"official {name}": file_digest(part.path)},
        label=stage.label,
        resources=_RESOURCES.get(name, Resources()),
        hints={"file": str(part.path.resolve())},
    )


def _without_what_nobody_reads(targets: Stage, names: set[str]) -> Stage:
    """Return stage ``targets`` that keeps what the stages of these names read, and computes nothing for the others."""
    store = dict(targets.config["store"])
    if not names & {"encoder", "external", f"{PREFIX}encoder"}:
        store["encoder"] = "live"
    if "semantic" not in names:
        store["semantic"] = "live"
    if "joint" not in names:
        store["latents"] = "live"
    return replace(targets, config={**targets.config, "store": store})


def _each(stages: VariantStages, change: Callable[[Stage], Stage]) -> VariantStages:
    own = {field.name: getattr(stages, field.name) for field in fields(stages)}
    return VariantStages(**{role: stage and change(stage) for role, stage in own.items()})


def _everywhere(change: Callable[[Stage], Stage]) -> Callable[[Stage], Stage]:
    """Return what makes ``change`` to a stage and to all that it depends on."""
    made: dict[str, Stage] = {}

    def rebuilt(stage: Stage) -> Stage:
        if stage.fingerprint not in made:
            upstream = {role: rebuilt(upstream) for role, upstream in stage.upstream.items()}
            made[stage.fingerprint] = change(replace(stage, upstream=upstream))
        return made[stage.fingerprint]

    return rebuilt


def taken(stages: VariantStages) -> list[str]:
    """Return the names of the stages that take the authors' weights."""
    names = {stage.name for stage in stages.chain}
    return [name for name in STAGES if PREFIX + name in names]


def trained(stages: VariantStages) -> list[str]:
    """Return the names of the stages that train or fit something."""
    names = {stage.name for stage in stages.chain}
    return [name for name in STAGES if name in names]


def credit(stages: VariantStages) -> tuple[str, str]:
    """Return what is put behind the method's name where weights are the authors', and a sentence; else empty texts."""
    theirs, ours = taken(stages), trained(stages)
    if not theirs:
        return "", ""
    names = ", ".join(theirs)
    made = f"; trained here: {', '.join(ours)}" if ours else ""
    return f" (authors' {names if ours else 'weights'})", f"the authors' released weights: {names}{made}"


def told(parts: Mapping[str, Part], stages: VariantStages) -> str:
    """Return one line: what is taken from which file, and which files nothing is taken from."""
    used = taken(stages)
    lines = [f"{name} ({parts[name].file})" for name in used]
    rest = [f"{name} ({part.file})" for name, part in parts.items() if name not in used]
    return f"the authors' weights: {', '.join(lines) or 'none'}" + (f"; not needed: {', '.join(rest)}" if rest else "")


def misfits(
    folder: Path,
    parts: Mapping[str, Part],
    variants: Mapping[str, Variant],
    stages: Mapping[str, VariantStages],
    voxels: int | None,
) -> list[str]:
    """Return what keeps the weights from being used: nothing, or problems of one or two lines.

    Args:
        folder: that ``--official`` names.
        parts: see :func:`find`.
        variants: by name.
        stages: of :func:`take`, by name.
        voxels: of all subjects of the data; None where that is not known yet.
    """
    problems = []
    used = {name: {role: parts[role] for role in taken(own)} for name, own in stages.items()}
    everything = {role: part for own in used.values() for role, part in own.items()}
    if transfers := [name for name, variant in variants.items() if variant.transfer.subject is not None]:
        problems.append(
            f"official: {transfers[0]}: the authors' weights have seen every subject, so none is new to them; type "
            "--set transfer.subject=null, or leave out --official"
        )
    if parts and not everything and not transfers:
        problems.append(f"official: nothing is trained that --official {folder} has ({', '.join(parts)}); leave it out")
    bits = [role for role in everything if role in _BITS]
    if bits and "clusters" not in parts:
        own = shlex.quote(str(folder / "clusters.safetensors"))
        problems.append(
            f"official: {', '.join(bits)} need the voxels' clusters that they were trained with; type: "
            f"python -m benchmark.convert --official v2c_128_mapping_gmm_v2.npy --out {own}"
        )
    problems += _apart(everything, voxels)
    problems += _unlike(used, variants)
    return problems


def _apart(parts: Mapping[str, Part], voxels: int | None) -> list[str]:
    """Say where files are of different voxels or clusters, or of other voxels than the data."""
    problems = []
    for size in ("voxels", "clusters"):
        numbers = {part.file: part.about.sizes[size] for part in parts.values() if size in part.about.sizes}
        if len(set(numbers.values())) > 1:
            listed = ", ".join(f"{name} {number:,}" for name, number in numbers.items())
            problems.append(f"official: files that do not belong together: they differ in {size} ({listed})")
        elif size == "voxels" and numbers and voxels not in (None, *numbers.values()):
            problems.append(
                f"official: the weights are of {next(iter(numbers.values())):,} voxels ({', '.join(numbers)}), "
                f"the data have {voxels:,}; name data of the same subjects and vertices with --data"
            )
    return problems


def _unlike(used: Mapping[str, Mapping[str, Part]], variants: Mapping[str, Variant]) -> list[str]:
    """Say which settings are others than the weights were trained with, and what to type."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, parts in used.items():
        unlike: dict[tuple[str, Any], tuple[Any, list[str]]] = {}
        fixed = []
        for role, part in parts.items():
            for setting, theirs in _settings(role, part).items():
                ours = _setting(variants[name], setting)
                if ours != theirs:
                    unlike.setdefault((setting, theirs), (ours, []))[1].append(part.file)
            fixed += _unsettable(role, part)
        if unlike:
            what = "; ".join(
                f"{setting} is {_typed(ours)}, but {_typed(theirs)} in {', '.join(files)}"
                for (setting, theirs), (ours, files) in unlike.items()
            )
            mend = " ".join(f"--set {setting}={_typed(theirs)}" for setting, theirs in unlike)
            found.setdefault((what, mend), []).append(name)
        for problem in fixed:
            found.setdefault((problem,), []).append(name)
    problems = []
    for (what, *mends), names in found.items():
        if not mends:
            problems.append(f"official: {what}")
        elif len(names) == len(variants):
            problems.append(f"official: {what}\n  type {mends[0]}")
        else:
            problems.append(f"official: {', '.join(names)}: {what}\n  leave out --official, or these with --only")
    return problems


def _settings(role: str, part: Part) -> dict[str, Any]:
    """Return the settings that a part was trained with, where it tells."""
    sizes, settings = part.about.sizes, part.about.settings
    if role == "encoder":
        wanted = {"encoder.embed_dim": "embed_dim", "encoder.inner": "inner", "encoder.adapter_rank": "rank"}
        own: dict[str, Any] = {key: sizes[size] for key, size in wanted.items() if size in sizes}
        if "taps" in settings:
            own["encoder.taps"] = tuple(settings["taps"])
        if "positions" in sizes:  # of a grid, and of CLS where the backbone has it
            own["encoder.grid"] = math.isqrt(sizes["positions"])
        return own
    clusters = {"clustering.n_clusters": sizes["clusters"]} if "clusters" in sizes else {}
    if role == "clusters":
        return {"clustering.method": "functional", **clusters}
    branch = "lowlevel" if role == "lowlevel" else "semantic"
    known = {**sizes, **settings}
    own = {f"{branch}.{size}": known[size] for size in _SIZES if size in known}
    if role == "lowlevel" and "out_dim" in sizes:
        own["lowlevel.width"] = sizes["out_dim"]
    return {**own, **clusters}


def _unsettable(role: str, part: Part) -> list[str]:
    """Say what no setting can change."""
    sizes = part.about.sizes
    if role in _BITS and "hidden" in sizes and sizes["hidden"] != _MLP_RATIO * sizes.get("dim", 0):
        return [f"{part.file}: MLPs of {sizes['hidden']}, but this project's BIT has {_MLP_RATIO} x its width"]
    return []


def _setting(variant: Variant, path: str) -> Any:
    value: Any = variant
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _typed(value: Any) -> str:
    return (
        "[" + ",".join(map(str, value)) + "]"
        if isinstance(value, Sequence) and not isinstance(value, str)
        else str(value)
    )


def voxels_of(data: Path | None) -> int | None:
    """Return the voxels of all subjects of what ``--data`` names; None where it is not there or something is wrong."""
    from benchmark.stages.prepare import open_data

    if data is None:
        return None  # how many a simulation has is known once it is made
    try:
        source = open_data(data)
        return sum(source.n_voxels(subject) for subject in source.subjects)
    except UserError:
        return None  # which is told where the data are checked
