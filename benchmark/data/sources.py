"""From a folder to the reader that fits it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from benchmark.data import paths
from benchmark.data.algonauts import Algonauts
from benchmark.data.nsd import NSD
from benchmark.data.release import NSD_RELEASE, Release
from benchmark.errors import UserError

Kind = Literal["auto", "nsd", "algonauts"]


def has_nsd_betas(root: Path) -> bool:
    """Return whether a tree has NSD's own betas of some subject, whole or not."""
    return any((root / paths.betas_folder(subject)).is_dir() for subject in range(1, 9))


def has_algonauts_betas(root: Path) -> bool:
    """Return whether a tree has averaged betas of the Algonauts 2023 release of some subject."""
    return any((root / paths.algonauts_betas(subject, "lh")).is_file() for subject in range(1, 9))


def open_tree(
    root: Path | str, kind: Kind = "auto", subjects: Sequence[int] | None = None, release: Release = NSD_RELEASE
) -> NSD | Algonauts:
    """Open a data tree: NSD's own betas where there are any, else the Algonauts 2023 release.

    Raises:
        UserError: the tree has neither, or something in it is wrong; names the file.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such data folder; make a miniature one: python -m benchmark.data simulate {root}")
    if kind == "auto":
        kind = "algonauts" if has_algonauts_betas(root) and not has_nsd_betas(root) else "nsd"
    if kind == "algonauts":
        return Algonauts.open(root, subjects, release)
    return NSD.open(root, subjects, release=release)
