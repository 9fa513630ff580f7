"""The command line as tests call it, and one small finished sweep that many of them read."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from benchmark.config import QUICK, SMALLEST, Variant, demo
from benchmark.context import StageContext
from benchmark.graph import Stage
from benchmark.progress import Progress
from benchmark.stages import VariantStages, variant_stages
from benchmark.store import Store
from benchmark.sweeps import load_sweep

ROOT = Path(__file__).parents[2]
MAIN = "clusters=128"


@dataclass(frozen=True)
class Answer:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """What it printed as its error: from the line that says so to the end."""
        return self.err[self.err.index("error: ") :].rstrip("\n") if "error: " in self.err else ""


@dataclass(frozen=True)
class TinyRun:
    """``python -m benchmark.sweep clusters --quick`` with :data:`SMALLEST` settings, finished."""

    out: Path
    answer: Answer
    variants: dict[str, Variant]
    stages: dict[str, VariantStages]

    @property
    def arguments(self) -> list[str]:
        """What was typed, but for ``--out``."""
        return tiny_arguments()

    @property
    def store(self) -> Store:
        return Store(self.out / "store")

    def folder(self, role: str, variant: str = MAIN) -> Path:
        """The result of a stage."""
        return self.store.folder(self.stage(role, variant))

    def stage(self, role: str, variant: str = MAIN) -> Stage:
        """A stage by its name."""
        own = self.stages[variant]
        known = {stage.name: stage for stage in (*own.chain, own.references)}
        return known[role]

    def context(self, stage: Stage, out: Path, **changes: Any) -> StageContext:
        """Return what the code of ``stage`` is handed when it writes to ``out``; ``changes`` are made to its config."""
        config = {**stage.config, **changes}
        out.mkdir(parents=True, exist_ok=True)
        return StageContext(
            stage=replace(stage, config=config),
            config=config,
            out=out,
            inputs={role: self.store.folder(upstream) for role, upstream in stage.upstream.items()},
            checkpoints=out / "checkpoints",
            tracker=_NoTracker(),
            progress=Progress(enabled=False),
            device="cpu",
            threads=1,
            checkpoint_seconds=1e9,
        )


class _NoTracker:
    def log(self, metrics: dict[str, float], step: int) -> None: ...
    def summary(self, values: dict[str, Any]) -> None: ...
    def image(self, name: str, path: Path) -> None: ...
    def finish(self, status: str) -> None: ...


def tiny_arguments() -> list[str]:
    settings = [f"--set={key}={value}" for key, value in SMALLEST.items()]
    return ["clusters", "--quick", "--threads=1", "--tracker=jsonl", *settings]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def start_sweep() -> Callable[..., subprocess.Popen[str]]:
    """Start ``python -m benchmark.sweep ...`` in a process of its own."""

    def start(*arguments: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmark.sweep", *map(str, arguments)],
            cwd=ROOT,
            env=_environment(),
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


@pytest.fixture(scope="session")
def sweep_process(start_sweep: Callable[..., subprocess.Popen[str]]) -> Callable[..., Answer]:
    """Run ``python -m benchmark.sweep ...`` in a process of its own."""

    def run(*arguments: str | Path) -> Answer:
        process = start_sweep(*arguments)
        try:
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
        return Answer(process.returncode, out, err)

    return run


@pytest.fixture
def sweep_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run the command line of ``benchmark.sweep`` in this process, which has no libraries left to import."""
    from benchmark.cli import main_guard
    from benchmark.sweep import main

    def run(*arguments: str | Path) -> Answer:
        monkeypatch.setattr(sys, "argv", ["benchmark.sweep", *map(str, arguments)])
        capsys.readouterr()
        try:
            code = main_guard(main)
        except SystemExit as error:
            code = int(error.code or 0)
        return Answer(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, sweep_process: Callable[..., Answer]) -> Iterator[TinyRun]:
    """A finished sweep that every test may read and none may change; the workers of one test run share it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, record = base / "tiny-run", base / "tiny-run.json"
    with (base / "tiny-run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not record.exists():
            answer = sweep_process(*tiny_arguments(), "--out", folder)
            record.write_text(json.dumps([answer.code, answer.out, answer.err]))
    answer = Answer(*json.loads(record.read_text()))
    assert answer.code == 0, answer.err
    base_variant = demo().with_settings(QUICK)
    variants = {
        name: base_variant.with_settings({**own, **SMALLEST})
        for name, own in load_sweep("clusters").settings(True).items()
    }
    stages = {name: variant_stages(variant, name) for name, variant in variants.items()}
    yield TinyRun(folder, answer, variants, stages)
