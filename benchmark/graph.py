"""Stages, the plan that orders them, and the reason why each one runs or does not.

A stage is plain data: a name, the function that computes it, its resolved configuration, the stages it reads, and the
digests of the files it reads. The SHA-256 of all that is its fingerprint. Two variants that ask for the same stage
ask for the same fingerprint, so it is computed once; a changed setting changes the fingerprints of that stage and of
all that follow from it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from benchmark.store import StageState, Store

# A finished stage that differs in more settings than this is another experiment, not an earlier form of this one.
_FEW_KEYS = 6
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_RUN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Mode(StrEnum):
    """What to do with results that exist, or do not."""

    CACHED = "cached"  # compute what is missing
    RETRY = "retry"  # compute only what was tried before and has no good result, and what depends on it
    FORCE = "force"  # compute everything again
    READ_ONLY = "read-only"  # compute nothing


@dataclass(frozen=True)
class Resources:
    """What a stage asks of a machine: GPUs, CPU cores, memory in GB, and time in hours."""

    gpus: int = 0
    cpus: int = 2
    memory_gb: float = 8
    hours: float = 1


@dataclass(frozen=True)
class Stage:
    """One step of a variant, as plain data.

    ``name`` is the kind of stage and its folder in the store; ``run`` names the function that computes it
    (``module:function``), imported where the stage runs. ``label`` (shown to people, such as ``clusters=128``) and
    ``resources`` do not enter the fingerprint, nor
    do ``hints``: settings that change no result, such as how many images are worked on side by side.

    Raises:
        ValueError: a name or ``run`` of the wrong form, or a configuration that is not JSON (tuples become lists; NaN
            is refused).
    """

    name: str
    run: str
    config: Mapping[str, Any]
    upstream: Mapping[str, Stage] = field(default_factory=dict)
    code_version: int = 1
    digests: Mapping[str, str] = field(default_factory=dict)
    label: str = ""
    resources: Resources = Resources()
    hints: Mapping[str, Any] = field(default_factory=dict)
    _canonical: tuple[str, str] = field(init=False, repr=False, compare=False)  # of config and digests

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"stage name {self.name!r}: expected lower-case letters, digits, '_' and '-'")
        if not _RUN.fullmatch(self.run):
            raise ValueError(f"stage {self.name}: run is {self.run!r}, expected 'package.module:function'")
        # A private copy in JSON's own types: whoever changes the dict they passed cannot change the fingerprint.
        config, config_text = _as_json(self.config, f"stage {self.name}: config")
        digests, digests_text = _as_json(self.digests, f"stage {self.name}: digests")
        object.__setattr__(self, "config", config)
        object.__setattr__(self, "digests", digests)
        object.__setattr__(self, "hints", _as_json(self.hints, f"stage {self.name}: hints")[0])
        object.__setattr__(self, "_canonical", (config_text, digests_text))
        object.__setattr__(self, "upstream", dict(self.upstream))

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) of the canonical JSON of everything that determines the result."""
        config, digests = self._canonical
        upstream = canonical_json({role: stage.fingerprint for role, stage in self.upstream.items()})
        # The object of these five as canonical_json writes it, from parts that are written already.
        text = (
            f'{{"code_version":{canonical_json(self.code_version)},"config":{config},"digests":{digests},'
            f'"name":{canonical_json(self.name)},"upstream":{upstream}}}'
        )
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def key(self) -> str:
        """``name/first 16 digits of the fingerprint``: the stage's folder, relative to the store."""
        return f"{self.name}/{self.fingerprint[:16]}"

    @property
    def title(self) -> str:
        """The name with the label, for people: ``lowlevel [clusters=8]``."""
        return f"{self.name} [{self.label}]" if self.label else self.name

    def record(self) -> dict[str, Any]:
        """Return what ``config.yaml`` keeps of this stage; upstream stages by their key."""
        return {
            "name": self.name,
            "label": self.label,
            "fingerprint": self.fingerprint,
            "run": self.run,
            "code_version": self.code_version,
            "config": dict(self.config),
            "upstream": {role: stage.key for role, stage in self.upstream.items()},
            "digests": dict(self.digests),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return this stage and all it depends on as JSON-able data, every stage once."""
        stages: dict[str, Any] = {}
        for stage in _in_order([self]):
            stages[stage.fingerprint] = {
                "name": stage.name,
                "run": stage.run,
                "config": dict(stage.config),
                "upstream": {role: up.fingerprint for role, up in stage.upstream.items()},
                "code_version": stage.code_version,
                "digests": dict(stage.digests),
                "label": stage.label,
                "resources": asdict(stage.resources),
                "hints": dict(stage.hints),
            }
        return {"target": self.fingerprint, "stages": stages}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Stage:
        """Rebuild what :meth:`to_dict` returned.

        Raises:
            ValueError: a fingerprint does not follow from its content: the data was altered, or made by another
                version.
        """
        built: dict[str, Stage] = {}
        for fingerprint, fields in data["stages"].items():
            upstream = {role: built[up] for role, up in fields["upstream"].items()}
            stage = cls(**{**fields, "upstream": upstream, "resources": Resources(**fields["resources"])})
            if stage.fingerprint != fingerprint:
                raise ValueError(f"stage {stage.name}: fingerprint is {stage.fingerprint}, expected {fingerprint}")
            built[fingerprint] = stage
        return built[data["target"]]


@dataclass(frozen=True)
class Decision:
    """What happens to one stage of a plan, and why, in words."""

    stage: Stage
    action: Literal["run", "cached", "blocked"]
    reason: str
    force: bool = False  # computes again although a result exists


@dataclass(frozen=True)
class Plan:
    """Stages in an order in which they can run: each fingerprint once, after everything that it reads."""

    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, targets: Iterable[Stage]) -> Plan:
        """Order the targets and all they depend on, depth first, so that the first target is finished first.

        Where several stages have one fingerprint, the first stands for all and its label names them all.
        """
        ordered = _in_order(targets)
        labels: dict[str, list[str]] = {}
        for stage in ordered:
            known = labels.setdefault(stage.fingerprint, [])
            if stage.label and stage.label not in known:
                known.append(stage.label)
        first: dict[str, Stage] = {}
        for stage in ordered:
            first.setdefault(stage.fingerprint, stage)
        merged = ((stage, _merge(labels[key])) for key, stage in first.items())
        return cls(tuple(stage if stage.label == label else replace(stage, label=label) for stage, label in merged))

    def decide(self, store: Store, mode: Mode | str = Mode.CACHED) -> list[Decision]:
        """Say for each stage, in order, what ``mode`` does with it and why; reads a few small files, writes none."""
        mode = Mode(mode)
        finished: dict[str, list[dict[str, Any]]] = {}
        decisions: dict[str, Decision] = {}
        for stage in self.stages:
            if stage.name not in finished:
                finished[stage.name] = store.finished(stage.name)
            decisions[stage.fingerprint] = _decide(stage, mode, store, decisions, finished[stage.name])
        return list(decisions.values())


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys, no spaces, ASCII only: equal values give equal text.

    Raises:
        ValueError: NaN or infinity.
        TypeError: something that JSON does not know.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _as_json(value: Mapping[str, Any], what: str) -> tuple[dict[str, Any], str]:
    """A copy in JSON's own types, and its canonical text."""
    if isinstance(value, Mapping) and not value:
        return {}, "{}"
    _refuse_other_keys(value, what)
    try:
        text = canonical_json(dict(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from None
    copy: dict[str, Any] = json.loads(text)
    return copy, text


_SCALARS = frozenset({str, int, float, bool, type(None)})


def _refuse_other_keys(value: Any, what: str) -> None:
    # json.dumps turns the key 1 into "1" without a word, and two unlike configs would have one fingerprint.
    if isinstance(value, dict) or isinstance(value, Mapping):  # the first is asked much faster
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{what} is not JSON: key {key!r} is not a string")
            if type(item) not in _SCALARS:
                _refuse_other_keys(item, what)
    elif isinstance(value, list | tuple):
        for item in value:
            if type(item) not in _SCALARS:
                _refuse_other_keys(item, what)


def _in_order(targets: Iterable[Stage]) -> list[Stage]:
    """All stages below ``targets``, dependencies first; every object once (several may share a fingerprint)."""
    seen: set[int] = set()
    ordered: list[Stage] = []

    def visit(stage: Stage) -> None:
        if id(stage) in seen:
            return
        seen.add(id(stage))
        for upstream in stage.upstream.values():
            visit(upstream)
        ordered.append(stage)

    kept = list(targets)  # keeps the objects alive while their ids are in use
    for target in kept:
        visit(target)
    return ordered


def _merge(labels: list[str]) -> str:
    return ", ".join(labels) if len(labels) <= 2 else f"{labels[0]} +{len(labels) - 1} more"


def _decide(
    stage: Stage, mode: Mode, store: Store, decisions: Mapping[str, Decision], finished: list[dict[str, Any]]
) -> Decision:
    state = store.state(stage)
    upstream = [decisions[up.fingerprint] for up in stage.upstream.values()]
    if mode is Mode.FORCE:
        resumes = "; resumes from its checkpoint" if store.resumes(stage, force=True) else ""
        return Decision(stage, "run", f"forced{resumes}", force=True)
    if state.kind == "done":
        return Decision(stage, "cached", "cached")
    reason = _reason(stage, state, decisions, finished)
    if mode is Mode.READ_ONLY:
        return Decision(stage, "blocked", f"{reason}; nothing runs in read-only mode")
    blocked = [d.stage.name for d in upstream if d.action == "blocked"]
    if blocked:
        return Decision(stage, "blocked", f"needs {_listed(blocked)}, which does not run")
    if mode is Mode.RETRY and state.kind == "absent" and all(d.action == "cached" for d in upstream):
        return Decision(stage, "blocked", f"{reason}; never tried, and mode retry runs only what was tried")
    return Decision(stage, "run", reason)


def _reason(stage: Stage, state: StageState, decisions: Mapping[str, Decision], finished: list[dict[str, Any]]) -> str:
    """Why the stage has no result to use: its own past first, else how it differs from the nearest finished one."""
    if state.kind == "failed":
        return f"failed before: {state.detail}" + ("; resumes from its checkpoint" if state.resumable else "")
    if state.kind == "interrupted":
        return "interrupted: " + ("resumes from its checkpoint" if state.resumable else "starts again")
    if state.kind == "running":
        return f"running now in {state.detail}"
    if state.kind == "damaged":
        return f"damaged: {state.detail}"
    candidates = [_changes(stage, past, decisions) for past in finished if past.get("label") == stage.label]
    near = [parts for count, parts in sorted(candidates, key=lambda c: c[0]) if 0 < count <= _FEW_KEYS]
    return "; ".join(near[0]) if near else "no result yet"


def _changes(stage: Stage, past: Mapping[str, Any], decisions: Mapping[str, Decision]) -> tuple[int, list[str]]:
    """How many things differ between a finished stage and this one, and which, in words."""
    keys = _unlike(flat(past.get("config") or {}), flat(stage.config))
    data = _unlike(past.get("digests") or {}, stage.digests)
    roles = _unlike(past.get("upstream") or {}, {role: up.key for role, up in stage.upstream.items()})
    parts = []
    version = past.get("code_version")
    if version != stage.code_version:
        parts.append(f"code version {version} -> {stage.code_version}")
    if keys:
        parts.append(f"config changed: {_listed(keys)}")
    if data:
        parts.append(f"data changed: {_listed(data)}")
    now = {role: decisions[stage.upstream[role].fingerprint] for role in roles if role in stage.upstream}
    reruns = [decision.stage.name for decision in now.values() if decision.action == "run"]
    others = [decision.stage.name for decision in now.values() if decision.action != "run"]
    others += [role for role in roles if role not in now]
    if reruns:
        parts.append(f"upstream re-runs: {_listed(reruns)}")
    if others:
        parts.append(f"upstream changed: {_listed(others)}")
    return len(keys) + len(data) + len(roles) + (version != stage.code_version), parts


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"a": {"b": 1}}`` as ``{"a.b": 1}``; lists stay whole."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def _unlike(past: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    missing = object()
    return sorted(key for key in past.keys() | now.keys() if past.get(key, missing) != now.get(key, missing))


def _listed(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words))
