"""One stage in two processes: the losses and weights of one process with the same global batch."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmark.errors import UserError
from benchmark.execute import RunOptions
from benchmark.graph import Plan, Resources, Stage
from benchmark.launch import useful_gpus
from benchmark.launch.local import LocalLauncher
from benchmark.stages.bit import run_joint
from benchmark.store import Store, read_json
from benchmark.training import shared_out
from benchmark.training_config import TrainingConfig

pytestmark = pytest.mark.timeout(900)  # the first test that needs the small sweep waits for it


def joint(tiny_run: Any, seed: int, **training: Any) -> Stage:
    stage = tiny_run.stage("joint")
    config = {**stage.config, "seed": seed, "training": {**stage.config["training"], "accumulate": 2, **training}}
    return replace(stage, config=config)


def trained(store: Store, stage: Stage, processes: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    plan = Plan.of([stage])
    options = RunOptions(device="cpu", threads=1, processes=processes, progress=False)
    outcomes = LocalLauncher(1).run(plan, plan.decide(store), store, options, lambda event: None)
    assert [o.state for o in outcomes if o.state not in ("cached", "done")] == [], [o.error for o in outcomes]
    folder = store.folder(stage)
    summary = read_json(folder / "status.json")["summary"]
    weights = {**load_file(folder / "bit.safetensors"), **load_file(folder / "unet.safetensors")}
    shutil.rmtree(folder)
    return summary, weights


def test_two_processes_train_as_one(tiny_run: Any, tmp_path: Path) -> None:
    store = Store(Path(shutil.copytree(tiny_run.out / "store", tmp_path / "store")))
    stage = joint(tiny_run, seed=0, steps=3)
    assert stage.resources.gpus == 4
    one, two = (trained(store, stage, processes) for processes in (1, 2))
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
    assert two[0]["loss before"] == pytest.approx(one[0]["loss before"], rel=1e-6)
    assert two[1].keys() == one[1].keys()
    for name, weight in one[1].items():
        torch.testing.assert_close(two[1][name], weight, atol=2e-5, rtol=1e-4)
    assert not list((tmp_path / "store" / ".jobs").rglob("*.pkl")), "submitit's pickles are removed, of all processes"


def test_a_cached_stage_keeps_nobody_waiting(tiny_run: Any, tmp_path: Path) -> None:
    store = Store(Path(shutil.copytree(tiny_run.out / "store", tmp_path / "store")))
    from benchmark.graph import Decision

    stage = tiny_run.stage("joint")
    options = RunOptions(device="cpu", threads=1, processes=2, progress=False)
    (outcome,) = LocalLauncher(1).run(
        Plan.of([stage]), [Decision(stage, "run", "as another process finishes it")], store, options, lambda event: None
    )
    assert outcome.state == "cached"


def test_accumulation_is_shared_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainingConfig(steps=1, accumulate=4)
    assert shared_out(config) == config
    monkeypatch.setattr("benchmark.training.processes", lambda: 4)
    assert shared_out(config).accumulate == 1
    monkeypatch.setattr("benchmark.training.processes", lambda: 3)
    with pytest.raises(UserError, match="3 processes cannot share 4"):
        shared_out(config)


def test_processes_that_cannot_share_a_step_are_refused_at_once(
    tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any network is read, and what others trained stays for a number of processes that can."""
    ctx = tiny_run.context(joint(tiny_run, seed=0, steps=3), tmp_path)
    kept = ctx.checkpoints / "joint-training" / "checkpoint-000000" / "state.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    monkeypatch.setattr("benchmark.training.processes", lambda: 3)
    monkeypatch.setattr("benchmark.networks.generator", lambda *_: pytest.fail("a network was read"))
    with pytest.raises(UserError, match="3 processes cannot share 2 micro-batches a step evenly"):
        run_joint(ctx)
    assert kept.read_text() == "{}"


@pytest.mark.parametrize(("accumulate", "most", "used"), [(4, 4, 4), (4, 3, 2), (1, 4, 1), (6, 4, 3), (None, 4, 4)])
def test_a_stage_gets_no_more_gpus_than_share_its_step(accumulate: int | None, most: int, used: int) -> None:
    config = {} if accumulate is None else {"training": {"accumulate": accumulate}}
    stage = Stage("joint", "benchmark.stages.bit:run_joint", config, resources=Resources(gpus=4))
    assert useful_gpus(stage, most) == used
