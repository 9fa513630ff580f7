"""Writes a miniature NSD: NSD's own files, with generated scenes (or photographs) and a simulated brain in them.

All or nothing: the tree is built beside its destination and renamed when it is whole, so an interrupted run or a full
disk leaves nothing that could be taken for data. The truth behind the data lies in ``simulation/``.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmark.data import paths
from benchmark.data.nsd import NSD
from benchmark.data.photographs import Photographs
from benchmark.data.settings import SIMULATION_VERSION, SimulationSettings
from benchmark.errors import RunError, UserError
from benchmark.progress import Progress


@dataclass(frozen=True)
class Simulated:
    """What ``simulate`` made, or found made."""

    root: Path
    settings: SimulationSettings
    """As used: with ``images``, scaled to the number of photographs."""
    reused: bool
    note: str
    """One line for the user; empty where there is nothing to say."""


def simulate(
    directory: Path | str,
    settings: SimulationSettings | None = None,
    images: Path | str | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
    complete: bool = False,
) -> Simulated:
    """Write a miniature NSD into ``directory``, or reuse the one that is there when its settings are the same.

    The same settings give the same files on one machine, whatever the number of workers.

    Args:
        directory: must not exist, be empty, or hold a tree made by this function.
        settings: how much of everything; default: the demo's.
        images: folder of photographs to use instead of generated scenes.
        progress: shows bars; default: nothing.
        workers: threads; default: one for each processor, at most four.
        complete: also write what the paper's data have beside NSD (``companions``); NSD's own files are the same.

    Raises:
        UserError: the directory holds something else, or the photographs are too few or unreadable.
        RunError: the disk is full.
    """
    root = Path(directory)
    asked = settings or SimulationSettings()
    photographs = Photographs.choose(Path(images), asked) if images is not None else None
    used = photographs.settings if photographs else asked
    note = photographs.note if photographs else ""
    progress = progress or Progress(enabled=False)
    if note:
        progress.message(note)
    record = {
        "version": SIMULATION_VERSION,
        "asked": asdict(asked),
        "used": asdict(used),
        "photographs": photographs.digest if photographs else None,
    }
    if complete:
        record["complete"] = True
    if _present(root):
        _check_reusable(root, asked, record)
        return Simulated(root, used, True, note)
    partial = root.with_name(f"{root.name}.partial-{socket.gethostname()}-{os.getpid()}")
    try:
        from benchmark.data.miniature import Miniature  # brings in torch, which a reused tree does not need

        root.parent.mkdir(parents=True, exist_ok=True)
        _sweep_leftovers(root)
        partial.mkdir()
        Miniature(partial, used, photographs, progress, workers or _processors(), complete).write()
        record["files"] = _digests(partial, complete)
        (partial / paths.SETTINGS).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        partial.rename(root)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY) and _present(root):  # somebody else made it meanwhile
            _check_reusable(root, asked, record)
            return Simulated(root, used, True, note)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"{root}: the disk is full; nothing was left behind. Free some space and type the same command"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{root}: cannot be written ({error.strerror}); choose another folder") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Simulated(root, used, False, note)


def _processors() -> int:
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _present(root: Path) -> bool:
    if root.exists() and not root.is_dir():
        raise UserError(f"{root}: is a file; expected a folder, or a name that is free")
    return root.is_dir() and any(root.iterdir())


def _check_reusable(root: Path, asked: SimulationSettings, record: dict[str, object]) -> None:
    """Raise unless the tree at ``root`` is whole and what the same settings would give."""
    again = f"choose another folder, or delete it: rm -r {root}"
    try:
        there = json.loads((root / paths.SETTINGS).read_text())
        different = asked.differences(there["asked"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{root}: is not empty and is not a miniature NSD (no readable {paths.SETTINGS}); {again}"
        ) from None
    if different:
        raise UserError(f"{root}: holds a miniature NSD with other settings ({different}); {again}")
    if there.get("photographs") != record["photographs"]:
        raise UserError(f"{root}: holds a miniature NSD with other images; {again}")
    if there.get("complete", False) != record.get("complete", False):
        what = "more than" if there.get("complete") else "not all of"
        raise UserError(f"{root}: holds {what} what was asked for (--complete); {again}")
    if there.get("version") != record["version"]:
        raise UserError(f"{root}: was made by another version of this program; delete it: rm -r {root}")
    now = _digests(root, bool(record.get("complete")))
    changed = sorted(name for name in now.keys() | there["files"].keys() if now.get(name) != there["files"].get(name))
    if changed:
        raise UserError(
            f"{root / changed[0]}: was changed since it was made; make it anew: rm -r {root}, then the same command"
        )


def _digests(root: Path, complete: bool) -> dict[str, str]:
    """Return the digest of each file that a loader can read."""
    digests = NSD.open(root).file_digests
    if complete:
        from benchmark.data.algonauts import Algonauts

        digests = {**digests, **Algonauts.open(root).file_digests}
    return digests


def _sweep_leftovers(root: Path) -> None:
    """Remove what killed runs on this machine left beside ``root``."""
    prefix = f"{root.name}.partial-{socket.gethostname()}-"
    for folder in root.parent.iterdir():
        if folder.name.startswith(prefix) and folder.name.removeprefix(prefix).isdigit():
            try:
                os.kill(int(folder.name.removeprefix(prefix)), 0)
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)
            except OSError:
                pass  # somebody else's process, alive
