"""Sweeps that are disturbed at random, again and again: the same command ends them, with the same bits."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import slurm_stages as toys
from cluster import NODES, Cluster, ClusterError

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

Make = Callable[..., Any]
# How often each happens, in hundredths.
FAULTS = {"kill -9": 40, "signal": 15, "requeue": 15, "cancel": 12, "node": 10, "preemption": 8}


def disturb(cluster: Cluster, rng: random.Random) -> str:
    """Do one bad thing to what runs; return what, or nothing where nothing runs."""
    running = sorted(job for job, state in cluster.jobs().items() if state == "RUNNING")
    workers = cluster.workers()
    if not running or not workers:
        return ""
    (kind,) = rng.choices(list(FAULTS), list(FAULTS.values()))
    job = rng.choice(running)
    try:
        match kind:
            case "kill -9":
                os.kill(rng.choice(workers), signal.SIGKILL)
            case "signal":
                cluster.run("scancel", "--signal=USR2", job)
            case "requeue":
                cluster.run("scontrol", "requeue", job)
            case "cancel":
                cluster.run("scancel", job)
            case "node":
                node = rng.choice(NODES)
                cluster.kill_node(node)
                cluster.start_node(node)
            case "preemption":
                cluster.run("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 0.5")
    except (ProcessLookupError, ClusterError):  # it ended a moment before
        return ""
    return kind


def torment(one: Any, rng: random.Random, kills: int) -> list[str]:
    """Type the command until the sweep is done, and disturb it up to ``kills`` times on the way."""
    done: list[str] = []
    end = time.monotonic() + 1500
    for _ in range(kills + 2):
        one.submit()
        while one.cluster.jobs():
            assert time.monotonic() < end, one.describe()
            time.sleep(rng.uniform(0.2, 2.5))
            if len(done) < kills and (kind := disturb(one.cluster, rng)):
                done.append(kind)
                one.digests()  # whatever is marked done is whole
        if one.done():
            return done
    raise AssertionError(f"not done after {kills + 2} times: {one.describe()}")


def test_a_few_kills(sweep: Make, undisturbed: Mapping[str, Any]) -> None:
    one = sweep([toys.chain(sleep=5), *toys.scores(1, sleep=5)], partition="low")
    done = torment(one, random.Random(1), kills=4)
    assert len(done) == 4
    assert one.digests().items() <= undisturbed.items()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_ten_kills(seed: int, sweep: Make, undisturbed: Mapping[str, Any], tmp_path: Path) -> None:
    rng = random.Random(100 + seed)
    done: list[str] = []
    for number in range(10):  # a sweep may be through before it was hit ten times: then another one is
        one = sweep(toys.scores(2, sleep=8), tmp_path / str(number), partition="low")
        done += torment(one, rng, 10 - len(done))
        assert one.digests().items() <= undisturbed.items()
        if len(done) == 10:
            break
    assert len(done) == 10
