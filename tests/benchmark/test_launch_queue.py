"""What Slurm's commands print, as a real Slurm 22.05 printed it, and what is read out of that."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmark.errors import UserError
from benchmark.launch import queue
from benchmark.launch.queue import JobState, PartitionInfo

SQUEUE = """\
13_0                |CANCELLED           |None                     |n1     |0:01      |10:00     |0
14_0                |CANCELLED           |DependencyNeverSatisfied |       |0:00      |10:00     |0
16                  |CANCELLED           |DependencyNeverSatisfied |       |0:00      |10:00     |0
15                  |FAILED              |NonZeroExitCode          |n1     |0:00      |10:00     |0
14_3                |PENDING             |Dependency               |       |0:00      |UNLIMITED |0
13_2                |COMPLETING          |None                     |n2     |1:00:04   |1-02:00:00|0
13_1                |RUNNING             |None                     |n[1-2] |2-01:00:05|10:00     |1
"""
SACCT = """\
15|FAILED|3:0|n1|7|10
16|CANCELLED|0:0|None assigned|0|10
13_0|CANCELLED by 1000|0:0|n1|1|10
13_1|RUNNING|0:0|n1|5|10
17|OUT_OF_MEMORY|0:125|n1|61|UNLIMITED
18|NODE_FAIL|1:0|n1|61|Partition_Limit
19_[3-5,8%2]|CANCELLED by 1000|0:0|None assigned|0|10
20|CANCELLED+|0:0|n1|3|10
"""

Fake = Callable[..., None]


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    return tmp_path / "calls"


@pytest.fixture
def fake(tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put a program on the PATH, before Slurm's own where there is one, that prints what it is told to."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name: str, out: str = "", err: str = "", code: int = 0, sleep: float = 0) -> None:
        (folder / f"{name}.out").write_text(out)
        (folder / f"{name}.err").write_text(err)
        program = folder / name
        program.write_text(
            f'#!/bin/sh\necho "{name} $*" >> {calls}\nenv > {calls}.env\n'
            f"cat {folder}/{name}.out\ncat {folder}/{name}.err >&2\n"
            + (f"exec sleep {sleep}\n" if sleep else "")
            + f"exit {code}\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    return make


def test_the_queue_tells_what_waits_runs_and_has_just_ended(fake: Fake, calls: Path) -> None:
    fake("squeue", SQUEUE)
    known = queue.known_jobs(["13", "14_0", "14_3", "15", "16", "99"])
    assert known == {
        "13_0": JobState("CANCELLED", "", "n1", 1, 600),
        "13_1": JobState("RUNNING", "", "n[1-2]", 2 * 86400 + 3605, 600, 1),
        "13_2": JobState("COMPLETING", "", "n2", 3604, 93600),
        "14_0": JobState("CANCELLED", "DependencyNeverSatisfied", "", 0, 600),
        "14_3": JobState("PENDING", "Dependency", "", 0, None),
        "15": JobState("FAILED", "NonZeroExitCode", "n1", 0, 600),
        "16": JobState("CANCELLED", "DependencyNeverSatisfied", "", 0, 600),
    }
    (call,) = calls.read_text().splitlines()
    assert "--array" in call and call.endswith("--jobs=13,14,15,16,99")
    live = queue.live_jobs(["13", "14", "15"])
    assert set(live) == {"13_1", "13_2", "14_3"}
    assert [live[job].running for job in sorted(live)] == [True, True, False]


def test_an_element_that_was_not_asked_for_is_left_out(fake: Fake) -> None:
    fake("squeue", SQUEUE)
    assert set(queue.known_jobs(["13_1"])) == {"13_1"}


def test_nothing_is_asked_where_there_is_nothing_to_ask(fake: Fake, calls: Path) -> None:
    fake("squeue", SQUEUE)
    fake("sacct", SACCT)
    fake("scancel")
    assert queue.known_jobs([]) == {} == queue.ended_jobs([])
    queue.cancel([])
    assert not calls.exists()


def test_jobs_that_the_controller_has_forgotten_are_no_error(fake: Fake) -> None:
    fake("squeue", err="slurm_load_jobs error: Invalid job id specified\n", code=1)
    assert queue.known_jobs(["99"]) == {}
    fake("scancel", err="scancel: error: Kill job error on job id 99: Invalid job id specified\n", code=1)
    queue.cancel(["99"])


def test_the_accounting_tells_how_jobs_ended(fake: Fake, calls: Path) -> None:
    fake("sacct", SACCT)
    ended = queue.ended_jobs(["13_0", "13_1", "15", "16", "17", "18", "19_4", "20"])
    assert ended == {
        "13_0": JobState("CANCELLED", "by 1000", "n1", 1, 600),
        "15": JobState("FAILED", "exit code 3", "n1", 7, 600),
        "16": JobState("CANCELLED", "", "", 0, 600),
        "17": JobState("OUT_OF_MEMORY", "signal 125", "n1", 61, None),
        "18": JobState("NODE_FAIL", "exit code 1", "n1", 61, None),
        "19_4": JobState("CANCELLED", "by 1000", "", 0, 600),
        "20": JobState("CANCELLED", "", "n1", 3, 600),
    }
    assert set(queue.ended_jobs(["19"])) == {"19_3", "19_4", "19_5", "19_8"}
    assert len(calls.read_text().splitlines()) == 2


def test_a_cluster_without_accounting_tells_nothing(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("sacct", err="Slurm accounting storage is disabled\n", code=1)
    assert queue.ended_jobs(["1"]) == {}
    monkeypatch.setenv("PATH", "/nowhere")
    assert queue.ended_jobs(["1"]) == {}


def test_thousands_of_jobs_are_asked_for_in_few_calls(fake: Fake, calls: Path) -> None:
    fake("squeue")
    fake("scancel")
    queue.known_jobs(f"{array}_{index}" for array in range(50) for index in range(100))
    assert len(calls.read_text().splitlines()) == 1
    queue.cancel(map(str, range(2500)))
    assert len(calls.read_text().splitlines()) == 4


def test_partitions_and_the_size_of_arrays(fake: Fake) -> None:
    fake("sinfo", "main*|up|1-00:00:00\nshort|up|1:00\nold|down|infinite\nmain*|up|1-00:00:00\n")
    assert queue.partitions() == {
        "main": PartitionInfo("up", 1440, True),
        "short": PartitionInfo("up", 1, False),
        "old": PartitionInfo("down", None, False),
    }
    fake("scontrol", "Configuration data as of 2026-11-23\nMaxArraySize            = 10001\nMaxJobCount = 20000\n")
    assert queue.max_array_size() == 10001


def test_what_the_user_set_for_their_own_eyes_does_not_reach_the_commands(
    fake: Fake, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUEUE_FORMAT2", "JobID")
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    fake("squeue", SQUEUE)
    queue.known_jobs(["13"])
    seen = Path(f"{calls}.env").read_text()
    assert "SQUEUE_" not in seen and "SLURM_CONF=/etc/slurm/slurm.conf" in seen


def test_failures_are_one_line(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(
        "squeue",
        err="squeue: error: trying again\nslurm_load_jobs error: Unable to contact slurm controller (connect failure)\n",
        code=1,
    )
    with pytest.raises(UserError) as caught:
        queue.live_jobs(["1"])
    assert str(caught.value) == (
        "squeue failed: slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    )
    fake("sinfo", code=7)
    with pytest.raises(UserError, match=r"^sinfo failed: exit code 7$"):
        queue.partitions()
    fake("sinfo", "main up\n")
    with pytest.raises(UserError, match=r"^sinfo printed 'main up', expected 3 columns"):
        queue.partitions()
    monkeypatch.setattr(queue, "TIMEOUT_S", 0.3)
    fake("scontrol", sleep=20)
    with pytest.raises(UserError, match=r"^scontrol did not answer within 0.3 s; Slurm may be down"):
        queue.max_array_size()
    monkeypatch.setenv("PATH", "/nowhere")
    assert not queue.available()
    with pytest.raises(UserError, match=r"^scancel is not on the PATH; is this a node of a Slurm cluster\?$"):
        queue.cancel(["1"])


def test_available(fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake("sbatch")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert queue.available()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:07", 7),
        ("10:00", 600),
        ("1:00:00", 3600),
        ("2-00:00:01", 172801),
        ("1-12", 129600),
        ("30", 1800),
        ("UNLIMITED", None),
        ("NOT_SET", None),
        ("INVALID", None),
        ("", None),
        ("infinite", None),
    ],
)
def test_times(text: str, seconds: int | None) -> None:
    assert queue._seconds(text) == seconds
