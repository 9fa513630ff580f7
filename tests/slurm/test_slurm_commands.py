"""The real sweep, small, as a person on a cluster types it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmark.store import read_json

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]


def tiny_arguments() -> list[str]:
    """The settings of the small sweep that the other tests run."""
    spec = importlib.util.spec_from_file_location("small_sweep", ROOT / "tests" / "benchmark" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return list(module.tiny_arguments())


def type_it(*words: str | Path, expected: int = 0) -> str:
    """Run ``python -m benchmark.sweep``; return what it printed."""
    command = [sys.executable, "-m", "benchmark.sweep", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout


def results(out: Path) -> dict[str, Any]:
    """Folder -> digests of what a stage computed."""
    return {
        path.parent.relative_to(out).as_posix(): {
            name: file["sha256"] for name, file in read_json(path)["outputs"].items() if name != "manifest.json"
        }
        for path in (out / "store").glob("*/*/DONE")
    }


def test_the_sweep_on_slurm_is_the_sweep_inline(cluster: Any, tmp_path: Path) -> None:
    profile = tmp_path / "slurm.yaml"
    profile.write_text("device: cpu\nmemory_gb: 4\nstages:\n  joint: {tasks: 1}\n")
    words = [*tiny_arguments(), "--launcher=slurm", f"--profile={profile}", f"--out={tmp_path}/slurm"]
    shown = type_it(*words)
    assert "python -m benchmark.sweep status clusters" in shown
    status = json.loads(type_it("status", "clusters", "--out", tmp_path / "slurm", "--json"))
    assert not status["complete"] and set(status["counts"]) <= {"queued", "running", "done"}
    type_it(*words, "--wait")  # the jobs are there: it only watches
    status = json.loads(type_it("status", "clusters", "--out", tmp_path / "slurm", "--json"))
    assert status["complete"] and set(status["counts"]) == {"done"}
    type_it(*tiny_arguments(), "--out", tmp_path / "inline")
    on_slurm, inline = results(tmp_path / "slurm"), results(tmp_path / "inline")
    assert on_slurm.keys() == inline.keys()
    assert [key for key in inline if on_slurm[key] != inline[key]] == []
