"""What is in a data tree, what is missing or wrong, and where it is to be had: ``python -m benchmark.data check``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmark.data import paths
from benchmark.data.look import Item, Look
from benchmark.data.prepared import Manifest
from benchmark.data.release import NEEDED, NSD_RELEASE, PARTS, SIZES, Release
from benchmark.data.settings import SimulationSettings
from benchmark.data.sources import Kind, has_algonauts_betas, has_nsd_betas
from benchmark.data.supplies import SUPPLIES
from benchmark.data.wording import gigabytes
from benchmark.errors import UserError, did_you_mean

_SHOWN = 3  # problems of an item that are printed


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    root: Path
    kind: Literal["nsd", "miniature", "algonauts"]
    items: tuple[Item, ...]
    limits: tuple[str, ...]
    store_bytes: int
    """About so much a prepared store takes."""
    work_bytes: int
    """And so much more while it is made."""

    @property
    def complete(self) -> bool:
        """Whether everything that is needed is there."""
        return all(item.state == "complete" for item in self.items if item.needed)

    def as_json(self) -> dict[str, Any]:
        """Return the report for ``--json``."""
        used = sorted({item.supply for item in self.items})
        return {
            "root": str(self.root),
            "kind": self.kind,
            "complete": self.complete,
            "items": [item.as_json() for item in self.items],
            "limits": list(self.limits),
            "supplies": {name: asdict(SUPPLIES[name]) for name in used},
            "store_bytes": self.store_bytes,
            "work_bytes": self.work_bytes,
        }


def inspect_tree(
    root: Path | str,
    parts: Sequence[str] | None = None,
    subjects: Sequence[int] | None = None,
    source: Kind = "auto",
    release: Release = NSD_RELEASE,
) -> Inspection:
    """Look a data tree over.

    Args:
        root: its folder, which may be empty.
        parts: of ``PARTS``: those that are needed; default: betas, images and external.
        subjects: from 1; default: all eight, or as many as a miniature has.
        source: whether NSD's own betas are needed or those of the Algonauts release; default: NSD's, unless only the
            others are there.
        release: the published numbers that NSD itself must have.

    Raises:
        UserError: there is no such folder, or no such part or subject.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; name the data tree, or one that it shall be put into")
    for name in parts or ():
        if name not in PARTS:
            raise UserError(f"no part '{name}'{did_you_mean(name, PARTS)}; choose from {', '.join(PARTS)}")
    miniature = _settings(root)
    expected = _release_of(miniature) if miniature else release
    unknown = sorted(set(subjects or ()) - set(expected.subjects))
    if unknown:
        raise UserError(f"no subject {unknown[0]}; expected some of {', '.join(map(str, expected.subjects))}")
    if source == "auto":
        source = "algonauts" if has_algonauts_betas(root) and not has_nsd_betas(root) else "nsd"
    chosen = tuple(sorted(set(subjects or expected.subjects)))
    look = Look(root, expected, chosen, bool(miniature))
    needed = set(parts or NEEDED)
    own = [*look.nsd_images(), *look.nsd_betas()] if source == "nsd" else look.algonauts()
    items = [*own, look.external(), *look.synthetic(), *look.atlases(), *look.surfaces(), look.ncsnr()]
    for item in items:
        item.needed = item.part in needed
    if source == "nsd" and has_algonauts_betas(root):
        items += [replace(item, part="algonauts") for item in look.algonauts() if item.name.endswith("averages")]
    kind: Literal["nsd", "miniature", "algonauts"] = "miniature" if miniature else "nsd"
    limits: tuple[str, ...] = ()
    if source == "algonauts":
        kind = "algonauts"
        limits = ALGONAUTS_LIMITS
    voxels = {s: sum(look.used.get((s, h), 0) for h in paths.HEMISPHERES) for s in chosen}
    voxels |= {s: expected.n_voxels(s) for s in chosen if s in expected.voxels}
    return Inspection(root, kind, tuple(items), limits, *_store_bytes(expected, voxels, source))


ALGONAUTS_LIMITS = (
    "no single trials: a new subject's 1 h, 30 min or 15 min of data cannot be taken from the Algonauts release",
    "averages over at most 37 of 40 sessions; fewer than 1000 test images (982 of subjects 1, 2, 5, 7)",
    "no NSD-Synthetic and no noise ceiling",
)


def _settings(root: Path) -> Mapping[str, int] | None:
    """Return the settings of a miniature, as it was made."""
    try:
        used = json.loads((root / paths.SETTINGS).read_text())["used"]
        return {str(name): int(value) for name, value in used.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _release_of(used: Mapping[str, int]) -> Release:
    """Return the numbers that a miniature with these settings must have; 0 vertices: any number, the same for all."""
    settings = SimulationSettings(**used)
    subjects = range(1, settings.subjects + 1)
    return Release(
        images=settings.n_images,
        image_side=settings.size,
        shared=settings.shared,
        images_per_subject=settings.images_per_subject,
        trials_designed=settings.n_trials,
        trials_per_session=settings.n_trials // settings.n_sessions,
        vertices=0,
        sessions=dict.fromkeys(subjects, settings.n_sessions),
        voxels={},
        synthetic_trials=0,
        synthetic_images=(0, 0),
        external=settings.external,
        algonauts_training={},
        algonauts_test={},
    )


def _store_bytes(release: Release, voxels: Mapping[int, int], source: Kind) -> tuple[int, int]:
    """Return about what a prepared store of the paper's sizes takes, and what more while it is made.

    ``voxels`` are each subject's.
    """
    sizes = SIZES if release.image_side >= max(SIZES) else (release.image_side,)
    total = (release.images + release.external) * sum(3 * size**2 for size in sizes)
    work = 0
    for subject, count in voxels.items():
        trials = release.sessions[subject] * release.trials_per_session
        averages = min(release.images_per_subject, trials)
        total += 2 * count * (averages + (trials if source == "nsd" else 0))
        work = max(work, 4 * count * trials if source == "nsd" else 0)
    return total, work


# --- for people -------------------------------------------------------------------------------------------------------


def lines(inspection: Inspection) -> Iterable[str]:
    """Yield the report for a terminal."""
    kinds = {
        "nsd": "the Natural Scenes Dataset",
        "miniature": "a miniature NSD",
        "algonauts": "the Algonauts 2023 release",
    }
    yield f"{inspection.root}: {kinds[inspection.kind]}"
    for needed, title in ((True, "needed"), (False, "for single experiments")):
        own = [item for item in inspection.items if item.needed is needed]
        if own:
            yield ""
            yield title
        for item in own:
            yield from _item_lines(item)
    for limit in inspection.limits:
        yield f"limit: {limit}"
    yield from _remedies(inspection)
    yield ""
    if inspection.complete:
        need = gigabytes(inspection.store_bytes)
        more = f" and {gigabytes(inspection.work_bytes)} more meanwhile" if inspection.work_bytes else ""
        yield "complete: everything that is needed is there"
        yield f"next: python -m benchmark.data prepare {inspection.root} --out STORE   (takes {need}{more})"
    else:
        open_ones = [item for item in inspection.items if item.needed and item.state != "complete"]
        missing = sum(max(0, item.bytes_expected - item.bytes_present) for item in open_ones)
        amount = f", about {gigabytes(missing)} to get" if missing else ""
        yield f"incomplete: {len(open_ones)} of what is needed{amount}"


def _item_lines(item: Item) -> Iterable[str]:
    state: str = item.state
    if state == "incomplete":
        state = f"{item.present:,} of {item.files:,} files"
    size = gigabytes(item.bytes_present if item.state == "complete" else item.bytes_expected)
    size = "" if size == "0 bytes" else size
    yield f"  {item.part:<10} {item.name:<52} {state:<18} {size:>8}".rstrip()
    if item.state == "missing":
        return
    for problem in item.problems[:_SHOWN]:
        yield f"    {problem.path}: {problem.found}; expected {problem.expected}"
    if len(item.problems) > _SHOWN:
        yield f"    and {len(item.problems) - _SHOWN} more (--json lists all)"


def _remedies(inspection: Inspection) -> Iterable[str]:
    """Say where what is missing is to be had: needed parts first, each supplier once."""
    open_ones = [item for item in inspection.items if item.state != "complete" and item.part != "algonauts"]
    if not open_ones:
        return
    yield ""
    yield f"where to get it (commands are for {inspection.root})"
    if inspection.kind == "miniature":
        yield f"  make the miniature anew: rm -r {inspection.root}; python -m benchmark.data simulate {inspection.root}"
        yield "  (with --complete it has what single experiments need)"
        return
    open_ones.sort(key=lambda item: not item.needed)
    for supply in dict.fromkeys(item.supply for item in open_ones):
        about = SUPPLIES[supply]
        yield f"  {about.name}: {about.where}"
        yield f"    agreement: {about.agreement}"
        own = [command for item in open_ones if item.supply == supply for command in item.commands]
        yield from (f"    {command}" for command in dict.fromkeys(own))


# --- stores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoreInspection:
    """What a look at a prepared store found."""

    root: Path
    complete: bool
    problems: tuple[str, ...]
    parts: tuple[str, ...]
    subjects: tuple[int, ...]
    nbytes: int
    digests: bool

    def as_json(self) -> dict[str, Any]:
        """Return the report for ``--json``."""
        return {**asdict(self), "root": str(self.root), "kind": "store"}


def inspect_store(root: Path | str, digests: bool = False) -> StoreInspection:
    """Look a prepared store over: presence and sizes, or, with ``digests``, every byte."""
    manifest = Manifest.read(Path(root))
    problems = tuple(manifest.damages(digests))
    finished = bool(manifest.about.get("complete"))
    return StoreInspection(
        Path(root),
        finished and not problems,
        problems if finished else ("not finished", *problems),
        tuple(manifest.about.get("parts", ())),
        tuple(manifest.about.get("subjects", ())),
        manifest.nbytes,
        digests,
    )


def store_lines(found: StoreInspection) -> Iterable[str]:
    """Yield the report of a store for a terminal."""
    subjects = ", ".join(map(str, found.subjects))
    yield f"{found.root}: a prepared store of {gigabytes(found.nbytes)} ({', '.join(found.parts)}; subjects {subjects})"
    for problem in found.problems:
        yield f"  {problem}"
    if found.complete:
        yield "complete: " + (
            "every byte is as it was written" if found.digests else "sizes are right (--digests: all)"
        )
    else:
        yield f"delete what is damaged and type: python -m benchmark.data prepare DIR --out {found.root}"
