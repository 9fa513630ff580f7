"""A trained checkpoint is judged by what follows from it: images are reconstructed and scored as a run's variant did.

The stages of the run are rebuilt from what their folders say they are; only the one that the checkpoint stands for is
another. So everything else is reused, a checkpoint that was scored before is not scored again, and the scores differ
from the run's by the checkpoint and by nothing else.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from benchmark.check.sources import scored_stages
from benchmark.config import PRESETS
from benchmark.context import StageContext
from benchmark.errors import UserError, did_you_mean
from benchmark.execute import RunOptions, execute
from benchmark.graph import Plan, Stage
from benchmark.imagesets.wording import one_line, place, reason
from benchmark.launch import Event, make_launcher, raise_failures
from benchmark.results import Result
from benchmark.store import DONE, Store, sha256_file

FILES = {"joint": ("bit", "unet"), "lowlevel": ("bit", "calibration")}
"""What reconstruction reads of a trained stage, as ``NAME.safetensors``."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Scoring:
    """How checkpoints are scored.

    Attributes:
        run: folder of the run whose data, clusters and other branch they are joined with.
        variant: the variant they belong to; None where the run has one only.
        options: how stages run.
    """

    run: Path
    variant: str | None
    options: RunOptions = field(default_factory=RunOptions)

    def score(self, path: Path, variant: str | None = None) -> tuple[Path, Path]:
        """Return the folders of stages ``score`` and ``reconstruct`` for a checkpoint, computing what is missing.

        Args:
            path: a trained stage's folder or one of its files, or a converted official file.
            variant: the variant, where it is not the one of :attr:`variant`.

        Raises:
            UserError: it is no checkpoint, or does not fit the variant.
            RunError: a stage failed.
        """
        name, score = _scored_variant(self.run, variant or self.variant)
        reconstruct = score.needs("reconstruct")
        store = Store(self.run / "store")
        checkpoint = Checkpoint.open(path)
        base = {role: store.root / reconstruct.record["upstream"][role] for role in checkpoint.roles}
        own = checkpoint.as_stage(store, reconstruct)
        optional = () if reconstruct.config["dip"]["calibrate"] else ("calibration",)
        checkpoint.check(base, self.run, name, optional)
        hints = _hints(str(score.config["track"]))
        stages: dict[str, Stage] = {}
        kept = {role: stage_of(own, stages) for role in checkpoint.roles} if own is not None else {}
        for role in () if own is not None else checkpoint.roles:
            stage = checkpoint.imported(role, name)
            kept[role] = stage
            execute(stage, store, replace(self.options, data=str(path.resolve()), progress=False))
        again = stage_of(reconstruct, stages)
        again = replace(again, upstream={**again.upstream, **kept}, hints=hints, label="")
        last = replace(stage_of(score, stages), upstream={"reconstruct": again}, label="")
        plan = Plan.of([last])
        decisions = plan.decide(store)
        lost = [
            decision.stage.name
            for decision in decisions
            if decision.action == "run" and decision.stage.name not in (again.name, last.name)
        ]
        if lost:
            raise UserError(
                f"{place(self.run)}: stage {lost[0]} of variant {name} has no result any more; type the command that "
                "made the run again"
            )
        raise_failures(make_launcher("inline").run(plan, decisions, store, self.options, _show))
        return store.folder(last), store.folder(again)


def _show(event: Event) -> None:
    if event.kind in ("done", "failed", "note"):
        print(str(event), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Checkpoint:
    """Weights as they lie on the disk, found to be of a kind that reconstruction reads.

    Attributes:
        path: folder or file.
        parts: role -> the prefix of its tensors' names in a converted file; None for a folder.
    """

    path: Path
    parts: Mapping[str, str | None]

    @property
    def roles(self) -> tuple[str, ...]:
        """The stages that it stands for."""
        return tuple(self.parts)

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Look at what ``path`` holds.

        Raises:
            UserError: nothing that images are reconstructed with.
        """
        if path.is_file() and path.stem in {name for names in FILES.values() for name in names}:
            path = path.parent  # bit.safetensors of a stage's folder stands for the folder
        if path.is_dir():
            return cls(path, {_role_of(path): None})
        if path.suffix != ".safetensors":
            raise UserError(
                f"{place(path)}: a checkpoint of another project; type: python -m benchmark.convert --official "
                f"{place(path)} --out {place(path.with_suffix('.safetensors'))}"
            )
        found = _official_parts(path)
        known = {role: prefix for role, prefix in found.items() if role in FILES}
        if not known:
            raise UserError(f"{place(path)}: holds {', '.join(found)}; expected {' or '.join(FILES)}")
        return cls(path, known)

    def as_stage(self, store: Store, reconstruct: Result) -> Result | None:
        """Return the finished stage of the run's own store that this checkpoint is; None where it comes from elsewhere.

        Raises:
            UserError: it was trained on other data, targets or clusters than the variant.
        """
        if not (self.path / DONE).is_file():
            return None
        result = Result.read(self.path)
        own, wanted = result.record["upstream"], reconstruct.record["upstream"]
        for role in ("data", "targets", "clusters"):
            if role in own and own[role] != wanted[role]:
                raise UserError(
                    f"{place(self.path)}: was trained on other {role} than this variant; name the run and the variant "
                    "that it belongs to with --run and --variant"
                )
        key = f"{result.record['name']}/{str(result.record['fingerprint'])[:16]}"
        return result if (store.root / key).resolve() == self.path.resolve() else None

    def shapes(self, role: str) -> dict[str, Shapes]:
        """Return file -> name of each tensor -> its shape."""
        prefix = self.parts[role]
        if prefix is None:
            return {name: _shapes(self.path / f"{name}.safetensors") for name in FILES[role] if self._has(name)}
        tensors = {
            name.removeprefix(prefix): shape for name, shape in _shapes(self.path).items() if name.startswith(prefix)
        }
        if role == "lowlevel":
            return {"bit": tensors}
        return {
            part: {n.removeprefix(f"{part}."): s for n, s in tensors.items() if n.startswith(f"{part}.")}
            for part in FILES[role]
        }

    def _has(self, name: str) -> bool:
        return (self.path / f"{name}.safetensors").is_file()

    def check(self, base: Mapping[str, Path], run: Path, variant: str, optional: Collection[str]) -> None:
        """Compare names and shapes with those that the run's own weights have; ``optional`` files may be missing.

        Raises:
            UserError: a file is missing, or a tensor is missing, unexpected or of another shape.
        """
        for role, folder in base.items():
            own = self.shapes(role)
            for name in FILES[role]:
                theirs = folder / f"{name}.safetensors"
                if not theirs.is_file() or (name in optional and name not in own):
                    continue
                if name not in own:
                    raise UserError(
                        f"{place(self.path)}: has no {name}.safetensors, which variant {variant} of {place(run)} reads"
                    )
                expected = _shapes(theirs)
                missing = sorted(set(expected) - set(own[name]))
                more = sorted(set(own[name]) - set(expected))
                other = sorted(n for n, shape in expected.items() if own[name].get(n, shape) != shape)
                for what, names in (("lacks", missing), ("has besides", more), ("has in another shape", other)):
                    if names:
                        first = names[0]
                        told = f" ({own[name][first]}, not {expected[first]})" if names is other else ""
                        count = f" and {len(names) - 1} more" if len(names) > 1 else ""
                        raise UserError(
                            f"{place(self.path)}: does not fit variant {variant} of {place(run)}: {role} {what} "
                            f"{one_line(first)}{told}{count}; name the run and variant that it belongs to"
                        )

    def imported(self, role: str, variant: str) -> Stage:
        """Return the stage that takes the weights into a store."""
        if self.parts[role] is None:
            names = [name for name in FILES[role] if self._has(name)]
            digests = {name: sha256_file(self.path / f"{name}.safetensors") for name in names}
        else:
            digests = {"file": sha256_file(self.path)}
        return Stage(
            name="checkpoint",
            run="benchmark.check.checkpoint:run_import",
            config={"role": role, "prefix": self.parts[role], "line": variant},
            digests=digests,
        )


def run_import(ctx: StageContext) -> dict[str, int]:
    """Copy a checkpoint's weights into the stage's folder, under the names that reconstruction reads.

    Outputs: ``bit.safetensors``, and ``unet.safetensors`` or ``calibration.safetensors`` where the checkpoint has them.
    """
    assert ctx.data is not None
    path, role, prefix = ctx.data, ctx.config["role"], ctx.config["prefix"]
    if prefix is None:
        for name, digest in ctx.stage.digests.items():
            copy = ctx.out / f"{name}.safetensors"
            shutil.copyfile(Checkpoint.open(path).path / copy.name, copy)
            if sha256_file(copy) != digest:
                raise UserError(f"{place(path)}: changed while it was copied; type the command again")
        return {"files": len(ctx.stage.digests)}
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}
    if role == "lowlevel":
        save_file(tensors, ctx.out / "bit.safetensors")
        return {"files": 1}
    for part in FILES[role]:
        own = {n.removeprefix(f"{part}."): t.clone() for n, t in tensors.items() if n.startswith(f"{part}.")}
        save_file(own, ctx.out / f"{part}.safetensors")
    return {"files": len(FILES[role])}


def stage_of(result: Result, known: dict[str, Stage]) -> Stage:
    """Rebuild a finished stage, and all it depends on, from the records in a store.

    Args:
        result: the stage.
        known: stages by key, filled as they are built.

    Raises:
        UserError: an upstream stage is gone, or a record is not what the fingerprint was made of.
    """
    record = result.record
    key = f"{record['name']}/{str(record['fingerprint'])[:16]}"
    if key not in known:
        upstream = {role: stage_of(result.needs(role), known) for role in record["upstream"]}
        stage = Stage(
            name=record["name"],
            run=record["run"],
            config=record["config"],
            upstream=upstream,
            code_version=record["code_version"],
            digests=record["digests"],
            label=record["label"],
        )
        if stage.fingerprint != record["fingerprint"]:
            raise UserError(f"{place(result.folder)}: its config.yaml was altered; type the run's command again")
        known[key] = stage
    return known[key]


def _scored_variant(run: Path, name: str | None) -> tuple[str, Result]:
    """Return a variant of a run and its newest scores; without a name, the only one."""
    known = {variant: scored for scored in scored_stages(run) if not scored.checkpoint for variant in scored.variants}
    if not known:
        raise UserError(
            f"--run {place(run)}: holds no scored variant that a checkpoint could be joined with; name the --out "
            "folder of a finished run"
        )
    if name is None and len(known) > 1:
        raise UserError(
            f"--run {place(run)}: holds {len(known)} variants; say which one the checkpoint belongs to with "
            f"--variant: {', '.join(known)}"
        )
    chosen = next(iter(known)) if name is None else name
    if chosen not in known:
        hint = did_you_mean(chosen, known) or f"; it has {', '.join(known)}"
        raise UserError(f"--variant {one_line(chosen)}: {place(run)} has no scored variant of that name{hint}")
    return chosen, Result.read(known[chosen].folder)


def _hints(track: str) -> dict[str, object]:
    """Return what stage ``reconstruct`` is told besides its configuration: the preset's way of fitting into memory."""
    if track not in PRESETS:
        raise UserError(f"track '{track}' is of no preset; expected {' or '.join(PRESETS)}")
    preset = PRESETS[track]()
    memory = {name: value for name, value in preset.memory.model_dump().items() if value and name != "checkpointing"}
    batches = {name: getattr(preset, name).batch for name in ("dip", "generation", "refinement")}
    return {**batches, **memory}


def _role_of(folder: Path) -> str:
    """Return the stage that a folder of weights is of."""
    if (folder / DONE).is_file():
        name = str(Result.read(folder).record["name"])
        if name == "checkpoint":
            return str(Result.read(folder).config["role"])
        if name not in FILES:
            more = "; train it jointly first (stage joint)" if name == "semantic" else ""
            raise UserError(
                f"{place(folder)}: is stage {name}, which no image is made with{more}; expected joint or lowlevel"
            )
        return name
    for role, names in FILES.items():
        if all((folder / f"{name}.safetensors").is_file() for name in names):
            return role
    listed = " or ".join(f"{' and '.join(f'{name}.safetensors' for name in names)} ({r})" for r, names in FILES.items())
    raise UserError(f"{place(folder)}: not a checkpoint; expected {listed}")


def _official_parts(path: Path) -> dict[str, str]:
    """Return role -> prefix of the tensors' names of what ``python -m benchmark.convert`` wrote."""
    try:
        with safe_open(path, framework="np") as file:
            parts = json.loads((file.metadata() or {})["official"])["parts"]
        return {str(role): str(about["prefix"]) for role, about in parts.items()}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{place(path)}: neither a converted official file ({reason(error)}) nor of a trained stage's folder; "
            "expected the folder, or what python -m benchmark.convert wrote"
        ) from error


def _shapes(path: Path) -> Shapes:
    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{place(path)}: not a safetensors file ({reason(error)})") from error
