"""What clusters do to jobs, one thing at a time: afterwards the same command ends with the same bits."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import slurm_stages as toys

from benchmark.errors import UserError
from benchmark.launch import control

pytestmark = pytest.mark.slurm

HERE = Path(__file__).parent
Make = Callable[..., Any]


@pytest.fixture
def training(sweep: Make) -> Any:
    """A chain of stages whose training is under way, some checkpoints after its start."""
    return under_way(sweep([toys.chain(sleep=4)], partition="low"))


@pytest.fixture
def walking(sweep: Make) -> Any:
    """The same with a stage in its place that needs no network and keeps checkpoints of its own."""
    return under_way(sweep([toys.chain(sleep=6, network=False)], partition="low"))


def under_way(one: Any) -> Any:
    one.submit()
    one.until_under_way(one.stage("encoder"))
    return one


def resumed(one: Any, undisturbed: Mapping[str, Any]) -> None:
    """See that all is there, with the bits of an undisturbed run, and that the training went on where it was."""
    one.finish()
    assert one.digests().items() <= undisturbed.items()
    assert one.store.status(one.stage("encoder"))["attempt"] == 2, "it went on from a checkpoint"
    assert sorted(one.runs()) == sorted([*(stage.key for stage in one.plan.stages), one.stage("encoder").key])


# -- what Slurm mends by itself: the job goes back into the queue


def test_the_signal_before_a_time_limit(training: Any, undisturbed: Mapping[str, Any]) -> None:
    training.cluster.run("scancel", "--signal=USR2", training.job(training.stage("encoder")))
    resumed(training, undisturbed)


def test_preemption(walking: Any, undisturbed: Mapping[str, Any]) -> None:
    walking.cluster.run("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    resumed(walking, undisturbed)


def test_requeued_by_hand(walking: Any, undisturbed: Mapping[str, Any]) -> None:
    walking.cluster.run("scontrol", "requeue", walking.job(walking.stage("encoder")))
    resumed(walking, undisturbed)


def test_death_of_a_node(training: Any, undisturbed: Mapping[str, Any]) -> None:
    job = training.job(training.stage("encoder"))
    node = training.cluster.run("squeue", "-h", "-j", job, "-o", "%N").strip()
    training.cluster.kill_node(node)
    training.until(lambda: training.store.state(training.stage("encoder")).kind == "interrupted", 20)
    training.cluster.start_node(node)
    resumed(training, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_time_limit(sweep: Make, undisturbed: Mapping[str, Any]) -> None:
    """Slurm counts in minutes, and looks every half a minute."""
    one = sweep([toys.chain(sleep=80)], partition="short", hours=1 / 60)
    one.submit()
    resumed_after = time.monotonic()
    one.finish(400)
    assert one.digests().items() <= undisturbed.items()
    encoder = one.stage("encoder")
    assert one.store.status(encoder)["attempt"] >= 2
    restarts = one.cluster.run("sacct", "-D", "-X", "-n", "-P", "-j", one.job(encoder), "-o", "State").split()
    assert len(restarts) >= 2 and restarts[-1] == "COMPLETED", (restarts, time.monotonic() - resumed_after)


# -- what takes the same command again


def ended_badly(one: Any) -> None:
    """See that the training is not done, that what needs it is not waiting for ever, and that it can go on."""
    one.cluster.wait_idle()
    encoder = one.store.state(one.stage("encoder"))
    assert encoder.kind in ("interrupted", "failed") and encoder.resumable, one.describe()
    assert one.store.state(one.stage("summary")).kind == "absent"
    rows = {row.stage.key.partition("/")[0]: row.state for row in control.report(one.store, one.submissions[-1]).rows}
    assert rows["data"] == "done" and rows["summary"] in ("blocked", "cancelled"), rows
    assert rows["encoder"] in ("failed", "cancelled", "interrupted", "lost"), rows
    assert one.digests().keys() == {one.stage("data").key}


def test_scancel(walking: Any, undisturbed: Mapping[str, Any]) -> None:
    walking.cluster.run("scancel", walking.job(walking.stage("encoder")))
    ended_badly(walking)
    assert walking.submit() == 2
    resumed(walking, undisturbed)


def test_kill_9_of_a_worker(training: Any, undisturbed: Mapping[str, Any]) -> None:
    (worker,) = training.cluster.workers(training.job(training.stage("encoder")))
    os.kill(worker, signal.SIGKILL)
    ended_badly(training)
    assert training.submit() == 2
    resumed(training, undisturbed)


def test_out_of_memory(sweep: Make, undisturbed: Mapping[str, Any]) -> None:
    end = toys.stage("end", "derive", upstream={"summary": toys.stage("summary", "derive", config={"hungry": True})})
    one = sweep([end])
    one.store.root.mkdir(parents=True)
    (one.store.root / toys.HUNGRY).touch()
    one.submit()
    one.cluster.wait_idle()
    assert one.states() == {"summary": "failed", "end": "absent"}, one.describe()
    assert "MemoryError" in one.store.state(one.stage("summary")).detail
    (one.store.root / toys.HUNGRY).unlink()
    assert one.submit() == 2
    one.finish()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave not a byte free."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as handle:
        for size in (2**16, 2**10, 1):
            try:
                while True:
                    handle.write(b"\0" * size)
            except OSError:
                continue
    return ballast


def test_a_full_disk(small_disk: Path, sweep: Make, undisturbed: Mapping[str, Any]) -> None:
    one = under_way(sweep([toys.chain(sleep=6, network=False)], small_disk))
    ballast = fill(small_disk)
    one.cluster.wait_idle()
    states = one.states()
    assert states["data"] == "done" and states["encoder"] in ("failed", "interrupted"), one.describe()
    assert states["summary"] == "absent", one.describe()
    with pytest.raises(UserError, match="(?i)no space left"):
        one.submit()
    assert one.cluster.jobs() == {}, "nothing is submitted that is not recorded"
    ballast.unlink()
    assert one.submit() == 2
    one.finish()
    assert one.digests().items() <= undisturbed.items()


# -- locks


def test_locks_that_dead_processes_left(sweep: Make, undisturbed: Mapping[str, Any]) -> None:
    one = sweep([toys.chain(sleep=0.1, network=False)])
    signatures = [
        json.dumps({"host": os.uname().nodename, "pid": 4194303, "since": "2026-01-01T00:00:00+00:00"}),
        json.dumps({"host": "node-of-another-cluster", "pid": 1, "since": "2026-01-01T00:00:00+00:00"}),
        '{"host": "node-of-ano',
    ]
    folder = one.store.root / ".locks"
    folder.mkdir(parents=True)
    for stage, signature in zip(one.plan.stages, signatures, strict=True):
        (folder / f"{stage.key.replace('/', '-')}.lock").write_text(signature)
    (one.store.root / ".jobs").mkdir()
    (one.store.root / ".jobs" / "submit.lock").write_text(signatures[1])
    assert one.submit() == 3
    one.finish()
    assert one.digests().items() <= undisturbed.items()


def test_a_lock_that_is_held_until_its_holder_dies(sweep: Make, undisturbed: Mapping[str, Any]) -> None:
    """As over NFS, where the server frees the locks of a client that it gives up: held, then all at once free."""
    one = sweep([toys.chain(sleep=0.1, network=False)])
    data = one.plan.stages[0]
    path = one.store.root / ".locks" / f"{data.key.replace('/', '-')}.lock"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"host": "node-of-another-cluster", "pid": 1, "since": "2026-01-01T00:00:00+00:00"}))
    code = "import fcntl, sys, time; h = open(sys.argv[1]); fcntl.flock(h, fcntl.LOCK_EX); print(1, flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        one.submit()
        one.until(lambda: one.cluster.jobs().get(one.job(data)) == "RUNNING")
        one.until(lambda: one.cluster.workers(one.job(data)))
        time.sleep(2)
        assert not one.store.folder(data).exists() and one.runs() == []
        assert control.report(one.store, one.submissions[-1]).rows[0].state in ("running", "queued")
    finally:
        holder.kill()
        holder.wait()
    with path.open() as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)
    one.finish()
    assert one.digests().items() <= undisturbed.items()


# -- other code


def test_code_that_changes_between_submission_and_start(
    sweep: Make, undisturbed: Mapping[str, Any], tmp_path: Path
) -> None:
    root, copy = HERE.parents[1], tmp_path / "copy"

    def only_code(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if not name.endswith(".py") and not Path(folder, name).is_dir()]

    for package in ("benchmark", "leaderboard", "methods", "metrics"):
        shutil.copytree(root / package, copy / package, ignore=only_code)
    one = sweep([toys.chain(sleep=0.1, network=False)])
    command = [sys.executable, str(HERE / "toy_sweep.py"), str(tmp_path), "--light"]

    def type_it() -> None:
        env = {**os.environ, "PYTHONPATH": str(copy)}
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    blocker = one.cluster.run("sbatch", "--parsable", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 600")
    type_it()
    with (copy / "benchmark" / "errors.py").open("a") as source:
        source.write("\n# another way to say it\n")
    one.cluster.run("scancel", "--full", "--signal=KILL", blocker.strip())
    one.cluster.wait_idle()
    assert one.states() == {"data": "failed", "encoder": "absent", "summary": "absent"}, one.describe()
    message = one.store.state(one.stage("data")).detail
    words = message.split()
    revisions = {word.strip(":,;") for word in words if "+" in word}
    assert len(revisions) == 2 and "was submitted with code" in message, message
    assert one.runs() == [], "nothing of it ran"

    type_it()
    one.finish()
    assert one.digests().items() <= undisturbed.items()
