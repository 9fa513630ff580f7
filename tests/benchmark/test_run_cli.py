"""``python -m benchmark.run``: one variant, and the smoke run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmark import run, smoke
from benchmark.cli import main_guard
from benchmark.config import demo, paper
from benchmark.context import StageContext
from benchmark.progress import Progress
from benchmark.stages import smoke as smoke_stage
from benchmark.stages.prepare import Prepared


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["benchmark.run", *map(str, arguments)])
        code = main_guard(run.main)
        return (code, *capsys.readouterr())

    return call


def test_one_variant_is_a_sweep_of_one(run_here: Callable[..., Any], tmp_path: Path) -> None:
    code, out, _ = run_here("--quick", "--dry-run", "--seed", "3", "--out", tmp_path)
    assert code == 0 and "1 variants, 12 stages: 12 to run" in out and "lowlevel [seed=3]" in out


def test_a_smoke_run_keeps_every_size_of_a_model() -> None:
    for preset in (paper(), demo()):
        for gpu in (False, True):
            before, after = preset.model_dump(), smoke.smoke_variant(preset, gpu).model_dump()
            for part in ("encoder", "lowlevel", "semantic", "joint"):
                changed = {name for name in before[part] if before[part][name] != after[part][name]}
                assert changed <= {"training", "batch"}, part
                assert gpu is False or "batch" not in changed
                assert after[part]["training"]["steps"] == 2
            assert after["data"] == before["data"] and after["dip"]["size"] == before["dip"]["size"]
            assert after["refinement"]["size"] == before["refinement"]["size"]
    names = smoke.smoke_variant(paper(), gpu=True).networks.roles()
    assert all(name.endswith("@random-0") for name in names.values()) and len(names) == 5


def test_the_smoke_plan_says_where_shapes_alone_are_checked(run_here: Callable[..., Any], tmp_path: Path) -> None:
    variant = smoke.smoke_variant(paper(), gpu=False)
    small, large = (smoke.smoke_stages(variant, memory) for memory in (2e10, 8e10))
    assert (small.joint.name, large.joint.name) == ("joint-shapes", "joint")
    assert small.reconstruct.upstream["joint"] is small.joint
    assert "joint" not in {stage.name for stage in small.chain}
    code, out, _ = run_here("--preset", "paper", "--smoke", "--dry-run", "--device", "cpu", "--out", tmp_path)
    assert code == 0 and "reconstruct [smoke]" in out and not list(tmp_path.iterdir())


def test_smoke_draws_its_own_data(run_here: Callable[..., Any], tmp_path: Path) -> None:
    code, _, err = run_here("--smoke", "--data", tmp_path)
    assert code == 2 and "leave out --quick and --data" in err


def context(out: Path, **config: Any) -> StageContext:
    out.mkdir(parents=True, exist_ok=True)
    return StageContext(
        stage=None,  # type: ignore[arg-type]
        config=config,
        out=out,
        inputs={},
        checkpoints=out / "checkpoints",
        tracker=None,  # type: ignore[arg-type]
        progress=Progress(enabled=False),
        device="cpu",
        threads=1,
        checkpoint_seconds=1e9,
    )


def test_random_data_have_the_form_of_prepared_data(tmp_path: Path) -> None:
    ctx = context(tmp_path, seed=0, image_size=32, voxels=[30, 25], shared=2, unique=8, external=3)
    smoke_stage.run_data(ctx)
    data = Prepared(tmp_path)
    assert data.n_voxels == (30, 25) and data.images.shape == (18, 32, 32, 3) and len(data.external) == 3
    assert len(data.train_ids) == 12 and len(data.validation_ids) == 4
    samples = data.samples(data.train_ids)
    assert len(samples) == 12 and np.array_equal(data.test_ids([1, 2]), [0, 1])
    assert all(
        np.isfinite(betas).all() and betas.shape == (10, n) for betas, n in zip(data.betas, (30, 25), strict=True)
    )


@pytest.mark.timeout(900)
def test_the_check_of_joint_training_takes_a_gradient_through_everything(tiny_run: Any, tmp_path: Path) -> None:
    stage = tiny_run.stage("joint")
    ctx = tiny_run.context(stage, tmp_path / "out")
    summary = smoke_stage.run_joint(ctx)
    assert "meta device" in summary["checked"] and summary["parameters"] > 3e6
    semantic = load_file(tiny_run.folder("semantic") / "bit.safetensors")
    kept = load_file(ctx.out / "bit.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in semantic.items())
    trained = load_file(tiny_run.folder("joint") / "unet.safetensors")
    assert {n: v.shape for n, v in load_file(ctx.out / "unet.safetensors").items()} == {
        n: v.shape for n, v in trained.items()
    }


def test_the_table_says_what_was_measured_and_what_was_not() -> None:
    lines = [smoke.Line("encoder", 1234567, 61.4, 2_500_000_000, ""), smoke.Line("joint", None, 0.2, 0, "shapes only")]
    text = smoke.table(lines)
    assert "| encoder | 1,234,567 | 61 | 2.5 GB |  |" in text and "shapes only" in text
