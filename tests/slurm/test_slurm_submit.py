"""Sweeps that are submitted to a real Slurm and run through, or in part."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import slurm_stages as toys

from benchmark.graph import Resources
from benchmark.launch import control, submissions
from benchmark.launch.slurm import summary_lines

pytestmark = pytest.mark.slurm

Make = Callable[..., Any]


def test_submission_returns_at_once_and_every_stage_runs_once(calm: Any) -> None:
    assert calm.submitted_in < 10
    record, count = calm.submissions[0], len(calm.plan.stages)
    jobs = {stage.title: stage.job for stage in record.stages}
    # Variants share an array; what all of them need is a job of its own.
    assert jobs["score [variant=1]"] == jobs["score [variant=0]"].partition("_")[0] + "_1"
    assert calm.waited_for[jobs["lowlevel [variant=1]"]].startswith("aftercorr:")
    assert calm.waited_for[jobs["clusters [variant=0]"]].startswith("afterok:")
    assert calm.again == 0 and calm.submissions[1].id == record.id, "the jobs were there already"
    words = "\n".join(summary_lines(record, count))
    assert f"submitted {count} stages in " in words and str(calm.store.root / ".jobs") in words
    assert calm.done(), calm.describe()
    assert sorted(calm.runs()) == sorted(stage.key for stage in calm.plan.stages)
    status = control.report(calm.store, submissions.find(calm.store, "toys"))
    assert status.complete and {row.state for row in status.rows} == {"done"}
    assert calm.submit() == 0, "everything is done"


def test_stages_ask_for_what_they_need(sweep: Make, tmp_path: Path) -> None:
    plain = toys.stage("plain", "gpu")
    single = toys.stage("single", "gpu", resources=replace(toys.SMALL, gpus=1, cpus=3))
    together = toys.stage("together", "gpu", resources=Resources(gpus=4, cpus=8, memory_gb=4, hours=2))
    one = sweep([plain, single], device="auto")
    one.submit()
    one.finish()
    seen = {stage.name: one.store.status(stage)["summary"] for stage in one.plan.stages}
    assert seen["plain"]["gpu"] == "" and seen["single"]["gpu"] in {"0", "1", "2", "3"}

    # Partition down starts nothing: what was asked for can be read at leisure.
    held = sweep([together], tmp_path / "held", device="auto", partition="down")
    held.submit()
    words = held.cluster.run("scontrol", "show", "job", held.job(together))
    assert "NumNodes=1" in words and "NumTasks=4" in words and "CPUs/Task=2" in words
    assert "TresPerNode=gres:gpu:4" in words and "TimeLimit=02:00:00" in words and "mem=4G" in words
    over_two = sweep([together], tmp_path / "two", device="auto", partition="down", gpus_per_node=2)
    over_two.submit()
    words = over_two.cluster.run("scontrol", "show", "job", over_two.job(together))
    assert "NumNodes=2" in words and "NumTasks=4" in words and "TresPerNode=gres:gpu:2" in words


def test_a_failure_blocks_only_what_needs_it(sweep: Make) -> None:
    data = toys.stage("data", "derive")
    ends = []
    for number in range(3):
        own: dict[str, Any] = {"label": f"variant={number}"}
        config = {"broken": True} if number == 1 else {}
        middle = toys.stage("middle", "derive", number, upstream={"data": data}, config=config, **own)
        ends.append(toys.stage("end", "derive", number, upstream={"middle": middle}, **own))
    one = sweep(ends)
    one.store.root.mkdir(parents=True)
    (one.store.root / toys.BROKEN).touch()
    one.submit()
    one.cluster.wait_idle()
    states = one.states()
    assert states["middle [variant=1]"] == "failed" and states["end [variant=1]"] == "absent", one.describe()
    assert {title: state for title, state in states.items() if "=1" not in title} == {
        title: "done" for title in states if "=1" not in title
    }, one.describe()
    rows = {row.stage.title: row for row in control.report(one.store, one.submissions[-1]).rows}
    assert rows["middle [variant=1]"].state == "failed"
    assert "the numbers do not add up" in rows["middle [variant=1]"].error
    assert rows["end [variant=1]"].state == "blocked"
    assert rows["end [variant=1]"].blocked_by == ("middle [variant=1]",)

    (one.store.root / toys.BROKEN).unlink()
    assert one.submit("retry") == 2
    one.finish()
    assert Counter(one.runs()) == Counter(stage.key for stage in one.plan.stages) + Counter(
        [one.stage("middle", "=1").key]
    )


def test_two_sweeps_at_once_compute_what_they_share_once(sweep: Make, tmp_path: Path) -> None:
    here = Path(__file__).parent
    script, env = str(here / "toy_sweep.py"), {**os.environ, "PYTHONPATH": str(here.parents[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(tmp_path), "--light", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for words in (["--variants=2", "--name=one"], ["--variants=2", "--first=1", "--name=two"])
    ]
    answers = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    both = sweep(toys.light(3))
    assert sum(int(out.split()[1]) for out, _ in answers) == len(both.plan.stages)
    both.finish()
    assert sorted(both.runs()) == sorted(stage.key for stage in both.plan.stages)
    for name in ("one", "two"):
        assert control.report(both.store, submissions.find(both.store, name)).complete
