"""The sweeps: one YAML file each in ``sweeps/`` or anywhere else, read into a typed record. Light to import."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from benchmark.errors import UserError, did_you_mean

FOLDER = Path(__file__).resolve().parent.parent / "sweeps"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


class SweepAxis(BaseModel):
    """What a sweep varies: one setting that takes ``values``, or ``variants``, each a name for a set of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Short name, e.g. clusters; a variant is called NAME=VALUE.")
    setting: str | None = Field(None, description="Dotted path of the setting, e.g. clustering.n_clusters.")
    variants: Mapping[str, Mapping[str, Any]] | None = Field(
        None, description="Instead of setting and values: name -> its dotted settings, none for the preset's own."
    )
    values: tuple[Any, ...] = Field(min_length=1, description="What it takes, in order; names, of named variants.")
    quick: tuple[Any, ...] = Field(min_length=1, description="What it takes with --quick; all named variants.")
    main: Any = Field(description="The value of the reference variant.")
    log: bool = Field(False, description="Whether plots space the values by their logarithm.")
    positions: Mapping[Any, float] = Field({}, description="Value -> its place in plots, where it is no number itself.")
    unit: str | None = Field(None, description="What the positions are, for people, e.g. minutes of data.")

    @model_validator(mode="before")
    @classmethod
    def _names_are_the_values(cls, data: Any) -> Any:
        variants = data.get("variants") if isinstance(data, Mapping) else None
        if not isinstance(variants, Mapping):
            return data
        if set(data) & {"setting", "values", "log"}:
            raise ValueError("variants take the place of setting, values and log")
        variants = {str(name): own or {} for name, own in variants.items()}
        names = tuple(variants)
        return {"quick": names, **data, "variants": variants, "values": names}

    @model_validator(mode="after")
    def _varies_something(self) -> Self:
        if self.setting is None and self.variants is None:
            raise ValueError("give setting and values, or variants")
        return self

    @property
    def varied(self) -> tuple[str, ...]:
        """Dotted paths of the settings that differ between variants."""
        if self.variants is None:
            assert self.setting is not None
            return (self.setting,)
        return tuple(dict.fromkeys(path for own in self.variants.values() for path in own))

    def position(self, value: Any) -> float | None:
        """Return where a value stands in plots; None where it is no number and has no position of its own."""
        if value in self.positions:
            return self.positions[value]
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    def settings(self, value: Any) -> dict[str, Any]:
        """Return the dotted settings that make a variant."""
        if self.variants is None:
            return dict.fromkeys(self.varied, value)
        return dict(self.variants[value])


class Sweep(BaseModel):
    """A set of variants that differ in one thing, which may take several settings to say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    question: str
    answers: str = Field(description="The published table that it reproduces.")
    axis: SweepAxis
    base: Mapping[str, Any] = Field({}, description="Dotted settings common to all variants.")
    published: Mapping[Any, str] = Field({}, description="Value -> id of the published row that it answers to.")
    beside: tuple[str, ...] = Field((), description="Ids of further published rows, shown beside ours on their track.")

    def settings(self, quick: bool = False) -> dict[str, dict[str, Any]]:
        """Return variant name -> its dotted settings."""
        values = self.axis.quick if quick else self.axis.values
        return {self.variant(value): {**self.base, **self.axis.settings(value)} for value in values}

    def answered(self) -> dict[str, str]:
        """Return variant name -> id of the published row that it answers to."""
        return {self.variant(value): row for value, row in self.published.items()}

    def only(self, wanted: Sequence[str]) -> Sweep:
        """Return the sweep of these of its values alone; the reference variant is the sweep's own, or else the first.

        Raises:
            UserError: a value that the sweep does not have.
        """
        known = {str(value): value for value in self.axis.values}
        for name in wanted:
            if name not in known:
                raise UserError(f"--only {name}: sweep {self.name} has {', '.join(known)}")
        values = tuple(value for name, value in known.items() if name in wanted)
        main = self.axis.main if self.axis.main in values else values[0]
        axis = self.axis.model_copy(update={"values": values, "quick": values, "main": main})
        return self.model_copy(update={"axis": axis})

    def variant(self, value: Any) -> str:
        """Return the name of the variant with this value on the axis."""
        return f"{self.axis.name}={value}"


def _is_ours(path: Path) -> bool:
    return path.resolve().parent == FOLDER


def sweep_names() -> list[str]:
    """Return the names of all sweeps, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def own_file(name: str) -> Path | None:
    """Return the file that is meant where a sweep is named by its path, ``my/own.yaml``; None where by its name."""
    return Path(name).expanduser() if name.endswith((".yaml", ".yml")) else None


def load_sweep(name: str) -> Sweep:
    """Read a sweep by its name, or by the path of its file, whose stem is then its name.

    Raises:
        UserError: no such sweep, or its file is not what it should be.
    """
    names = sweep_names()
    path = own_file(name)
    if path is None and name not in names:
        hint = did_you_mean(name, [*names, "list"]) or f"; choose from {', '.join(names)}"
        raise UserError(f"unknown sweep '{name}'{hint}")
    if path is not None:
        name = path.stem
        if not path.is_file():
            raise UserError(f"{path}: no such file; a sweep of sweeps/ goes by its name: {', '.join(names)}")
        if not _NAME.fullmatch(name) or name in ("list", "run") or (name in names and not _is_ours(path)):
            raise UserError(
                f"{path}: a sweep is called as its file, so not '{name}': expected small letters, digits, - and _, "
                f"and none of list, run, {', '.join(names)}"
            )
    path = path or FOLDER / f"{name}.yaml"
    try:
        sweep = Sweep.model_validate({"name": name, **yaml.safe_load(path.read_text())})
    except (yaml.YAMLError, TypeError) as error:
        raise UserError(f"{path}: not a sweep: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {message}") from error
    parts = {
        "axis.quick": sweep.axis.quick,
        "axis.main": (sweep.axis.main,),
        "axis.positions": tuple(sweep.axis.positions),
        "published": tuple(sweep.published),
    }
    for part, values in parts.items():
        for value in values:
            if value not in sweep.axis.values:
                raise UserError(f"{path}: {part} has {value!r}, which is not among axis.values")
    return sweep
