"""Finished stages as they lie in a store: found from the files alone, without the command that made them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmark.errors import UserError, did_you_mean
from benchmark.store import CONFIG, DONE


@dataclass(frozen=True)
class Result:
    """A finished stage: its folder, and the record of what was asked for."""

    folder: Path
    record: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Result:
        """Read a stage's folder.

        Raises:
            UserError: it holds no finished result.
        """
        if not (folder / DONE).is_file():
            raise UserError(
                f"{folder}: is no finished result; type the command that made the run again, e.g. make demo"
            )
        return cls(folder, yaml.safe_load((folder / CONFIG).read_text()))

    @property
    def config(self) -> Mapping[str, Any]:
        """The stage's resolved settings."""
        config: Mapping[str, Any] = self.record["config"]
        return config

    def upstream(self, role: str) -> Result | None:
        """Return the stage that this one read as ``role``; None where it read none."""
        key = self.record["upstream"].get(role)
        return None if key is None else Result.read(self.folder.parents[1] / key)

    def needs(self, role: str) -> Result:
        """Return the stage that this one read as ``role``.

        Raises:
            UserError: it read none.
        """
        found = self.upstream(role)
        if found is None:
            raise UserError(f"{self.folder}: read no stage '{role}'")
        return found


def finished_variants(out: Path) -> dict[str, Result]:
    """Return variant -> what reconstructed its images, of all variants that are finished in a run's folder.

    A variant is known by the name under which it ran, such as ``clusters=128``: the newest of that name, where the
    settings changed meanwhile.
    """
    found: dict[str, Result] = {}
    stores = [out / "store" / name for name in ("reconstruct", "reconstruct-synthetic", "score")]
    dones = [done for store in stores for done in store.glob(f"*/{DONE}") if "." not in done.parent.name]
    for done in sorted(dones, key=lambda path: path.stat().st_mtime):
        result = Result.read(done.parent)
        made = result if done.parents[1].name != "score" else result.needs("reconstruct")
        found |= {name: made for name in label_names(str(result.record["label"]))}
    return found


def label_names(label: str) -> list[str]:
    """Return the variants that a stage's label names, as a plan joins the labels of a shared stage."""
    return [name for name in re.sub(r" \+\d+ more$", "", label).split(", ") if name]


def find_variant(out: Path, name: str | None) -> tuple[str, Result]:
    """Return a finished variant and what reconstructed its images; without a name, the only one.

    Raises:
        UserError: there is none of that name, none at all, or several to choose from.
    """
    known = finished_variants(out)
    if not known:
        raise UserError(f"{out}: holds no finished variant; type: python -m benchmark.run --out {out}")
    if name is None:
        if len(known) > 1:
            raise UserError(
                f"{out}: holds {len(known)} variants; choose one with --variant: {', '.join(sorted(known))}"
            )
        return next(iter(known.items()))
    if name not in known:
        hint = did_you_mean(name, known) or f"; it has {', '.join(sorted(known))}"
        raise UserError(f"{out}: has no finished variant '{name}'{hint}")
    return name, known[name]
