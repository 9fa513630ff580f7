"""Miniature trees for the data tests."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmark.data.settings import SimulationSettings

sys.path.insert(0, str(Path(__file__).parent))
from true_size import write_true_size

TINY = SimulationSettings(subjects=2, seed=3, size=32, shared=8, unique=12, external=6, voxels=80, sessions=3)
COMPLETE = replace(TINY, unique=22, repeats=2)


@pytest.fixture(scope="session")
def tiny_settings() -> SimulationSettings:
    """The settings of ``tiny_tree``."""
    return TINY


@pytest.fixture(scope="session")
def tiny_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature NSD that every test may read and none may change."""
    from benchmark.data.simulate import simulate

    return simulate(tmp_path_factory.mktemp("data") / "tiny", TINY, workers=2).root


@pytest.fixture(scope="session")
def complete_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another with NSD-Synthetic, an Algonauts release and more surfaces beside it; to read, not to change.

    Three sessions of 20 trials; each subject sees 30 images twice, some of them in the last session only.
    """
    from benchmark.data.simulate import simulate

    return simulate(tmp_path_factory.mktemp("data") / "complete", COMPLETE, workers=2, complete=True).root


@pytest.fixture
def broken(tiny_tree: Path, tmp_path: Path) -> Path:
    """A copy of the tree, to break."""
    return Path(shutil.copytree(tiny_tree, tmp_path / "broken"))


@pytest.fixture
def broken_complete(complete_tree: Path, tmp_path: Path) -> Path:
    """A copy of the complete tree, to break."""
    return Path(shutil.copytree(complete_tree, tmp_path / "broken"))


@pytest.fixture(scope="session")
def true_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NSD as it was released, as far as headers and sizes go: 279 GB of betas in files without content; to read only.

    The design is random, but who sees what, and how often, is NSD's.
    """
    root = tmp_path_factory.mktemp("true-size")
    probe = root / "probe"
    with probe.open("wb") as file:
        file.truncate(2**24)
    if probe.stat().st_blocks * 512 > 2**20:
        pytest.skip("this disk has no files with holes: 307 GB would be written")
    probe.unlink()
    write_true_size(root)
    return root
