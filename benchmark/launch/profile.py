"""The profile of a cluster: a YAML file with what its Slurm wants to hear, and what stages may ask of it.

Read from ``--profile FILE``, else from ``~/.config/brain-it-bench/slurm.yaml`` (``$XDG_CONFIG_HOME`` is respected),
else everything is the cluster's default. ``docs/slurm-profiles/`` has examples.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from benchmark.errors import UserError, did_you_mean
from benchmark.graph import Stage
from benchmark.launch import micro_batches, useful_gpus

FOLDER, FILE = "brain-it-bench", "slurm.yaml"
STAGES = (
    "simulate",
    "prepare",
    "targets",
    "encoder",
    "external",
    "clusters",
    "lowlevel",
    "semantic",
    "joint",
    "reconstruct",
    "score",
    "references",
    "anatomy",
    "synthetic",
    "reconstruct-synthetic",
)
"""Names of stages that a profile may mention, whether a sweep has them or not."""

# What sbatch is told under another name here, or by the launcher itself.
_TAKEN = {
    "time": "hours",
    "mem": "memory_gb",
    "mem-per-cpu": "memory_gb",
    "mem-per-gpu": "memory_gb",
    "cpus-per-task": "cpus",
    "cpus-per-gpu": "cpus",
    "ntasks": "tasks",
    "ntasks-per-node": "tasks",
    "gpus": "gpus",
    "gpus-per-task": "gpus",
    "gpus-per-node": "gpus",
    "gres": "gpus and gpu_flag: gres",
    "signal": "signal_seconds",
    "export": "environment",
    **dict.fromkeys(("partition", "account", "qos", "constraint", "reservation", "exclude", "nodelist", "nodes")),
    **dict.fromkeys(("array", "dependency", "kill-on-invalid-dep", "requeue", "no-requeue", "output", "error"), ""),
    **dict.fromkeys(("open-mode", "job-name", "wrap", "chdir", "parsable", "wait", "test-only"), ""),
}
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Request(BaseModel):
    """What may be said for all stages, for those without a GPU (``cpu:``) and for one stage (``stages: {NAME: }``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    partition: str | None = Field(None, description="Partition, or several as in 'a,b'; the cluster's default if none.")
    account: str | None = Field(None, description="Account that is charged.")
    qos: str | None = Field(None, description="Quality of service.")
    constraint: str | None = Field(None, description="Features that the nodes must have, e.g. a100.")
    reservation: str | None = Field(None, description="Reservation to run in.")
    exclude: str | None = Field(None, description="Nodes to leave out, e.g. node[03-04].")
    nodelist: str | None = Field(None, description="Nodes that must be used.")
    hours: float | None = Field(None, gt=0, description="Time limit; a job that reaches it goes on in a new one.")
    memory_gb: float | None = Field(None, gt=0, description="Memory of a stage, over all its nodes.")
    cpus: int | None = Field(None, gt=0, description="CPU cores of a stage, over all its tasks.")
    gpu_type: str | None = Field(None, description="Type in Slurm's words, e.g. a100.")
    gpu_flag: Literal["gpus-per-node", "gres"] | None = Field(
        None, description="How GPUs are asked for: --gpus-per-node=a100:4 (default) or --gres=gpu:a100:4."
    )
    gpus_per_node: int | None = Field(None, gt=0, description="GPUs of a node, where a stage wants more than that.")
    signal_seconds: int | None = Field(
        None, ge=10, le=3600, description="How long before the time limit a job stops and saves (default 120)."
    )
    setup: tuple[str, ...] | None = Field(None, description="Lines of shell before Python starts, e.g. module load.")
    environment: Mapping[str, str | int | float | bool] = Field({}, description="Variables of the jobs.")
    sbatch: Mapping[str, str | int | float | bool] = Field({}, description="Any other option of sbatch, e.g. comment.")

    @field_validator("partition", "account", "qos", "constraint", "reservation", "exclude", "nodelist", "gpu_type")
    @classmethod
    def _one_line(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip() or "\n" in value):
            raise ValueError("expected one line of text")
        return value

    @field_validator("setup")
    @classmethod
    def _lines(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        # sbatch takes options as long as it has seen comments only.
        if any(line.lstrip().startswith("#SBATCH") for line in value or ()):
            raise ValueError("options belong to 'sbatch', as in sbatch: {comment: text}")
        return value

    @field_validator("environment")
    @classmethod
    def _names(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        for name in value:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a variable")
        return value

    @field_validator("sbatch")
    @classmethod
    def _free(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        clean = {}
        for name, one in value.items():
            option = name.lstrip("-").replace("_", "-")
            if option in _TAKEN:
                own = _TAKEN[option] if _TAKEN[option] is not None else option
                raise ValueError(f"'{name}' is set by {own or 'the launcher'}" + ("" if own else ", leave it out"))
            if not re.fullmatch(r"[a-z][a-z0-9-]*", option):
                raise ValueError(f"{name!r} is no option of sbatch")
            if "\n" in str(one):
                raise ValueError(f"'{name}': expected one line of text")
            clean[option] = one
        return clean


class StageRequest(Request):
    """What may be said for one stage."""

    gpus: int | None = Field(None, ge=0, description="GPUs of the stage, over all its nodes.")
    tasks: int | None = Field(None, gt=0, description="Processes that train together; on GPUs one for each.")
    nodes: int | None = Field(None, gt=0, description="Nodes to spread the tasks over.")


class Profile(Request):
    """A profile file."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="cpu: no stage asks for a GPU.")
    python: str | None = Field(
        None, description="Command that starts Python, e.g. 'apptainer exec --nv image.sif python'; this one if none."
    )
    cpu: Request = Field(Request(), description="For stages without a GPU, instead of what is said above.")
    stages: Mapping[str, StageRequest] = Field({}, description="By stage, instead of all that is said above.")


@dataclass(frozen=True)
class Ask:
    """All that one stage asks of the cluster; stages of one array ask for the same.

    ``cpus`` are those of a task, ``gpus`` and ``memory_mb`` those of a node.
    """

    device: str
    minutes: int
    memory_mb: int
    cpus: int
    gpus: int = 0
    tasks: int = 1
    nodes: int = 1
    gpu_type: str | None = None
    gpu_flag: str = "gpus-per-node"
    signal_seconds: int = 120
    options: tuple[tuple[str, str | int | float | bool], ...] = ()  # partition, account, ..., and sbatch's others
    setup: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def partition(self) -> str | None:
        """The partition, or several with commas between; None for the cluster's default."""
        named = dict(self.options).get("partition")
        return None if named is None else str(named)

    def words(self) -> str:
        """Return it for people: ``4 GPUs, 32 CPUs, 256 GB, 24 h on gpu``."""
        gpus, cpus = self.gpus * self.nodes, self.cpus * self.tasks
        parts = [f"{gpus} GPU{'s' * (gpus > 1)}"] if gpus else []
        parts += [f"{cpus} CPU{'s' * (cpus > 1)}", f"{self.memory_mb * self.nodes / 1024:.3g} GB"]
        parts.append(f"{self.minutes / 60:.3g} h" if self.minutes >= 60 else f"{self.minutes} min")
        if self.tasks > 1:
            parts.append(f"{self.tasks} tasks")
        if self.nodes > 1:
            parts.append(f"{self.nodes} nodes")
        return ", ".join(parts) + (f" on {self.partition}" if self.partition else "")


def profile_path(named: Path | None = None) -> Path | None:
    """Return the profile file that is meant: the named one, else the user's own where there is one."""
    if named is not None:
        return named
    home = os.environ.get("XDG_CONFIG_HOME")
    own = (Path(home) if home else Path.home() / ".config") / FOLDER / FILE
    return own if own.is_file() else None


def read_profile(path: Path | None) -> Profile:
    """Read a profile; without a path the one that asks for nothing.

    Raises:
        UserError: no such file, no YAML, or something in it that a profile does not have.
    """
    if path is None:
        return Profile()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(f"--profile {path}: {what}; docs/slurm-profiles has examples") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected lines such as 'partition: gpu', found {type(data).__name__}")
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{path}: {_first(error)}") from None


def ask(profile: Profile, stage: Stage, device: str = "auto") -> Ask:
    """Return what ``stage`` asks of the cluster.

    Args:
        profile: of the cluster.
        stage: whose resources count where the profile says nothing.
        device: ``cpu`` for no GPUs, ``cuda``; ``auto`` for what the profile says, or else what the stage asks for.

    Raises:
        UserError: tasks, GPUs and nodes do not fit together.
    """
    own = profile.stages.get(stage.name, StageRequest())
    device = profile.device if device == "auto" else device
    wanted, together = stage.resources, stage.resources.gpus > 1
    share = micro_batches(stage)
    gpus = 0 if device == "cpu" else own.gpus if own.gpus is not None else useful_gpus(stage, wanted.gpus)
    part = gpus / wanted.gpus if gpus else 1  # cores and memory are meant for all of the stage's GPUs
    layers: list[Request] = [own, *([] if gpus else [profile.cpu]), profile]

    def said(name: str, default: Any = None) -> Any:
        return next((value for layer in layers if (value := getattr(layer, name)) is not None), default)

    def wrong(what: str) -> UserError:
        return UserError(f"profile: stages: {stage.name}: {what}")

    tasks = own.tasks or (gpus if together else 0) or 1
    if tasks > 1 and not together:
        raise wrong(f"tasks is {tasks}, but this stage runs as one; leave it out")
    if gpus > 1 and not together:
        raise wrong(f"gpus is {gpus}, but this stage uses one; leave it out")
    if gpus and tasks != gpus:
        raise wrong(f"tasks is {tasks} and gpus {gpus}, expected one task for each GPU; leave out tasks")
    if share and share % tasks:
        raise wrong(
            f"{tasks} processes cannot share the {share} micro-batches of a step evenly; "
            f"type --set {stage.name}.training.accumulate={tasks}, or use fewer"
        )
    nodes = own.nodes or math.ceil(gpus / said("gpus_per_node", max(gpus, 1))) or 1
    if tasks % nodes:
        raise wrong(f"{tasks} tasks cannot be spread evenly over {nodes} nodes")
    layered = [*reversed(layers)]
    options = {
        name: value
        for name in ("partition", "account", "qos", "constraint", "reservation", "exclude", "nodelist")
        if (value := said(name)) is not None
    }
    for layer in layered:
        options |= layer.sbatch
    environment = {name: value for layer in layered for name, value in layer.environment.items()}
    return Ask(
        device="cuda" if gpus else "cpu",
        minutes=math.ceil(60 * said("hours", wanted.hours)),
        memory_mb=math.ceil(1024 * said("memory_gb", part * wanted.memory_gb) / nodes),
        cpus=math.ceil(said("cpus", math.ceil(part * wanted.cpus)) / tasks),
        gpus=gpus // nodes,
        tasks=tasks,
        nodes=nodes,
        gpu_type=said("gpu_type") if gpus else None,
        gpu_flag=said("gpu_flag", "gpus-per-node"),
        signal_seconds=said("signal_seconds", 120),
        options=tuple(sorted(options.items())),
        setup=said("setup", ()),
        environment=tuple((name, _text(value)) for name, value in sorted(environment.items())),
    )


def _text(value: str | int | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, in words."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        *parents, name = where
        model: type[BaseModel] = {"cpu": Request, "stages": StageRequest}.get(parents[0] if parents else "", Profile)
        known = model.model_fields
        alias = {"time": "hours", "mem": "memory_gb", "memory": "memory_gb", "env": "environment"}.get(name)
        hint = f" (did you mean '{alias}'?)" if alias else did_you_mean(name, known)
        return f"{': '.join([*parents, ''])}unknown key '{name}'{hint or '; there are ' + ', '.join(known)}"
    given = "" if isinstance(first["input"], dict | list) else f" (given {first['input']!r})"
    return f"{': '.join(where)}: {first['msg'].removeprefix('Value error, ')}{given}"
