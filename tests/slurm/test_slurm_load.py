"""Many small stages at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import slurm_stages as toys

from benchmark.graph import Resources
from benchmark.launch import control

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.mark.slow
def test_three_hundred_stages(sweep: Callable[..., Any], record_property: Callable[[str, object], None]) -> None:
    tiny = Resources(cpus=1, memory_gb=0.1, hours=0.2)
    first = [toys.stage("first", "nothing", number, resources=tiny) for number in range(150)]
    second = [toys.stage("second", "nothing", n, resources=tiny, upstream={"first": s}) for n, s in enumerate(first)]
    one = sweep(second)
    started = time.monotonic()
    assert one.submit(parallel=8) == 300
    submitted = time.monotonic() - started
    assert submitted < 10
    assert len({stage.job.partition("_")[0] for stage in one.submissions[-1].stages}) == 2
    most = 0
    while jobs := one.cluster.jobs():
        most = max(most, sum(state == "RUNNING" and job.startswith("1") for job, state in jobs.items()))
        assert time.monotonic() - started < 800, one.states()
        time.sleep(1)
    finished = time.monotonic() - started
    assert one.done() and len(one.runs()) == 300 == len(set(one.runs()))
    asked = time.monotonic()
    assert control.report(one.store, one.submissions[-1]).complete
    print(
        f"300 stages: submitted in {submitted:.1f} s, done in {finished:.0f} s, status {time.monotonic() - asked:.2f} s"
    )
