"""Miniature trees for the data tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmark.data.settings import SimulationSettings

TINY = SimulationSettings(subjects=2, seed=3, size=32, shared=8, unique=12, external=6, voxels=80, sessions=3)


@pytest.fixture(scope="session")
def tiny_settings() -> SimulationSettings:
    """The settings of ``tiny_tree``."""
    return TINY


@pytest.fixture(scope="session")
def tiny_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature NSD that every test may read and none may change."""
    from benchmark.data.simulate import simulate

    return simulate(tmp_path_factory.mktemp("data") / "tiny", TINY, workers=2).root


@pytest.fixture
def broken(tiny_tree: Path, tmp_path: Path) -> Path:
    """A copy of the tree, to break."""
    return Path(shutil.copytree(tiny_tree, tmp_path / "broken"))
