"""The user's photographs in place of generated scenes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmark.data.images import read_photograph
from benchmark.data.settings import SimulationSettings
from benchmark.errors import UserError

PHOTOGRAPHS = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Photographs:
    """The user's photographs, dealt out: the first ones are NSD's images, the others the external ones."""

    folder: Path
    names: tuple[str, ...]
    settings: SimulationSettings
    note: str
    digest: str

    @classmethod
    def choose(cls, folder: Path, asked: SimulationSettings) -> Photographs:
        """Deal the photographs of ``folder`` and its subfolders in a seeded order.

        Where they are too few, unique and external images are scaled down to what there is, and ``note`` says so.
        """
        if not folder.is_dir():
            raise UserError(
                f"--images {folder}: no such folder; expected one with photographs ({', '.join(PHOTOGRAPHS)})"
            )
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PHOTOGRAPHS and p.is_file())
        least = asked.shared + asked.subjects + 1
        if len(files) < least:
            raise UserError(
                f"--images {folder}: {len(files)} photographs; expected at least {least} for "
                f"{asked.subjects} subjects with {asked.shared} shared images\n"
                f"add photographs, or use fewer: --subjects {max(1, asked.subjects // 4)} --shared 2"
            )
        wanted = asked.subjects * asked.unique + asked.external
        here = len(files) - asked.shared
        settings, note = asked, ""
        if here < wanted:
            unique = max(1, asked.unique * here // wanted)
            external = min(asked.external, here - asked.subjects * unique)
            settings = replace(asked, unique=unique, external=external)
            note = (
                f"{len(files)} photographs instead of {asked.shared + wanted}: each subject sees {unique} of its own "
                f"(not {asked.unique}), {external} are external (not {asked.external})"
            )
        order = np.random.default_rng([asked.seed, 20]).permutation(len(files))
        chosen = [files[k] for k in order[: settings.n_images + settings.external]]
        listing = "\n".join(f"{p.relative_to(folder)} {p.stat().st_size}" for p in chosen)
        names = tuple(str(p.relative_to(folder)) for p in chosen)
        return cls(folder, names, settings, note, hashlib.sha256(listing.encode()).hexdigest())

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read photographs ``start .. stop-1`` in the dealt order."""
        return np.stack([read_photograph(self.folder / name, self.settings.size) for name in self.names[start:stop]])
