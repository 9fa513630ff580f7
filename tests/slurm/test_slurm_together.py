"""One training as two tasks on two nodes: what one process computes with the same global batch."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slurm_stages as toys
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slurm

Make = Callable[..., Any]


def joint(sleep: float = 0.1, label: str = "") -> Any:
    """The joint training by itself."""
    return toys.training(
        "joint", {}, 5, 60, sleep, resources=toys.BOTH, config={"accumulate": 2, "dropout": 0}, label=label
    )


def test_two_nodes_train_as_one_process(sweep: Make, tmp_path: Path) -> None:
    two = sweep([joint()], tmp_path / "two")
    one = sweep([joint()], tmp_path / "one", stages={"joint": {"tasks": 1}})
    two.submit()
    one.submit()
    job = two.job(two.plan.stages[0])
    two.until(lambda: "n[1-2]" in two.cluster.run("squeue", "-h", "-j", job, "-o", "%N %D"))
    two.finish()
    assert one.done(), one.describe()
    summaries = [each.store.status(each.plan.stages[0])["summary"] for each in (one, two)]
    assert summaries[1]["loss"] == pytest.approx(summaries[0]["loss"], rel=1e-5)
    assert summaries[1]["error"] == pytest.approx(summaries[0]["error"], rel=1e-5)
    weights = [load_file(each.store.folder(each.plan.stages[0]) / "weights.safetensors") for each in (one, two)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_task_that_dies_takes_the_other_with_it(rank: int, sweep: Make) -> None:
    one = sweep([joint(sleep=5)])
    one.submit()
    stage = one.plan.stages[0]
    one.until_under_way(stage)
    workers = one.cluster.workers(one.job(stage))
    ranks = {
        int(
            dict(entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in entry)[
                "SLURM_PROCID"
            ]
        ): pid
        for pid in workers
    }
    os.kill(ranks[rank], signal.SIGKILL)
    one.cluster.wait_idle(60)
    state = one.store.state(stage)  # failed, where the first process saw the other go
    assert state.kind in ("interrupted", "failed") and state.resumable, one.describe()
    assert one.submit() == 1
    one.finish()
    assert one.store.status(stage)["attempt"] == 2


@pytest.mark.slow
def test_the_signal_reaches_both(sweep: Make) -> None:
    one = sweep([joint(sleep=5)])
    one.submit()
    stage = one.plan.stages[0]
    one.until_under_way(stage)
    one.cluster.run("scancel", "--signal=USR2", one.job(stage))
    one.until(lambda: one.store.status(stage)["state"] == "interrupted")
    one.finish()
    assert one.store.status(stage)["attempt"] == 2
