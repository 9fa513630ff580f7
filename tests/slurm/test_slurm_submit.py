"""Sweeps that are submitted to a real Slurm, and nothing goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

pytestmark = pytest.mark.slurm


def test_a_sweep_runs_through(undisturbed: Mapping[str, Any]) -> None:
    assert len(undisturbed) == 13
