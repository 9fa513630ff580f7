"""W&B runs of jobs: one run for a stage however often it starts, and offline runs that are uploaded later."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmark.errors import RunError, UserError
from benchmark.tracking import Artifact, Table, open_tracker
from benchmark.tracking.sync import StageRuns, Uploaded, offline_runs, upload

_SPEC = importlib.util.spec_from_file_location("wandb_server", Path(__file__).with_name("wandb_server.py"))
assert _SPEC is not None and _SPEC.loader is not None
wandb_server = importlib.util.module_from_spec(_SPEC)
sys.modules["wandb_server"] = wandb_server
_SPEC.loader.exec_module(wandb_server)

RUN: dict[str, Any] = {
    "group": "clusters",
    "job_type": "lowlevel",
    "name": "lowlevel clusters=8",
    "config": {"lr": 0.1},
}


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The home of a user who never heard of W&B."""
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def server(nobody: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A W&B server, and a user with a key for it."""
    import wandb

    wandb.teardown()  # W&B's own process, which serves all runs of this one, remembers the server
    with wandb_server.fake_wandb() as found:
        monkeypatch.setenv("WANDB_BASE_URL", found.address)
        monkeypatch.setenv("WANDB_API_KEY", wandb_server.KEY)
        yield found
        wandb.teardown()


def attempt(folder: Path, run_id: str, steps: range, status: Any = "done", mode: str = "offline", **more: Any) -> None:
    """One attempt at a stage: some steps, an image after the last."""
    tracker = open_tracker("wandb", folder, run_id=run_id, mode=mode, **{**RUN, **more})
    for step in steps:
        tracker.log({"train/loss": 1 / (1 + step)}, step)
    picture = folder.parent / "picture.png"
    Image.new("RGB", (8, 8), (steps.stop, 0, 0)).save(picture)
    tracker.image("first", picture)
    picture.unlink()
    tracker.summary({"last": steps.stop})
    tracker.finish(status)
    wait_for_files(folder)


def wait_for_files(folder: Path) -> None:
    """W&B's own process writes the file some milliseconds later; a job waits for it when it ends."""
    end = time.monotonic() + 10
    while any(path.stat().st_size <= 7 for path in folder.glob("wandb/*/run-*.wandb")) and time.monotonic() < end:
        time.sleep(0.02)


def steps_of(run: Any) -> list[tuple[int, float | None]]:
    return [(line["global_step"], line.get("train/loss")) for _, line in sorted(run.history.items())]


def test_a_copied_run_is_complete_and_goes_on_where_it_was_stopped(server: Any, tmp_path: Path) -> None:
    here = tmp_path / "node" / "tracking"
    attempt(here, "aaaa", range(0, 3), "interrupted")
    attempt(here, "aaaa", range(3, 5))
    there = Path(shutil.copytree(tmp_path / "node", tmp_path / "login")) / "tracking"
    shutil.rmtree(tmp_path / "node")

    stage = offline_runs("lowlevel", there)
    assert len(stage.waiting) == 2 and not stage.synced
    (told,) = upload([stage])
    assert (told.done, told.error) == (2, "")
    (run,) = server.runs.values()
    assert run.fields["groupName"] == "clusters" and run.fields["jobType"] == "lowlevel"
    assert run.fields["name"] == "aaaa" and run.fields["displayName"] == "lowlevel clusters=8"
    expected = [(0, 1), (1, 1 / 2), (2, 1 / 3), (2, None), (3, 1 / 4), (4, 1 / 5), (4, None)]
    assert steps_of(run) == [(step, loss and pytest.approx(loss)) for step, loss in expected]
    assert run.summary["last"] == 5
    images = [name for name in run.files if name.startswith("media/images/first_")]
    assert len(images) == 2 and all(run.files[name].startswith(b"\x89PNG") for name in images)
    assert run.exits[-1] == 0


def test_what_is_uploaded_is_not_uploaded_again_and_a_later_part_goes_on(server: Any, tmp_path: Path) -> None:
    attempt(tmp_path / "a", "aaaa", range(0, 2), "interrupted")
    upload([offline_runs("a", tmp_path / "a")])
    opened = server.runs["aaaa"].opened
    stage = offline_runs("a", tmp_path / "a")
    assert len(stage.synced) == 1 and upload([stage]) == [] and server.runs["aaaa"].opened == opened

    attempt(tmp_path / "a", "aaaa", range(2, 4))  # the job was put back into the queue after that upload
    stage = offline_runs("a", tmp_path / "a")
    assert (len(stage.synced), len(stage.waiting)) == (1, 1)
    upload([stage])
    assert [step for step, _ in steps_of(server.runs["aaaa"])] == [0, 1, 1, 2, 3, 3]
    assert len(server.runs) == 1


def test_a_run_that_is_refused_does_not_keep_the_others(server: Any, tmp_path: Path) -> None:
    for name in ("aaaa", "bbbb", "cccc"):
        attempt(tmp_path / name, name, range(0, 1))
    server.refused.add("bbbb")
    stages = [offline_runs(name, tmp_path / name) for name in ("aaaa", "bbbb", "cccc")]
    seen: list[Uploaded] = []
    told = upload(stages, seen.append)
    assert seen == told and [(one.runs.title, one.done) for one in told] == [("aaaa", 1), ("bbbb", 0), ("cccc", 1)]
    assert told[1].error == "permission denied for bbbb"
    server.refused.clear()
    again = upload([offline_runs(name, tmp_path / name) for name in ("aaaa", "bbbb", "cccc")])
    assert [(one.runs.title, one.done) for one in again] == [("bbbb", 1)] and "bbbb" in server.runs


@pytest.mark.slow
def test_a_run_that_was_killed_is_uploaded_as_far_as_it_came(server: Any, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom benchmark.tracking import open_tracker\n"
        "t = open_tracker('wandb', Path(sys.argv[1]), group='g', job_type='j', run_id='kkkk', name='n', config={}, "
        "mode='offline')\n"
        "for step in range(50): t.log({'loss': 1.0}, step)\n"
        "time.sleep(2)\nos.killpg(0, signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "k")], start_new_session=True, check=False)
    assert done.returncode == -9
    stage = offline_runs("k", tmp_path / "k")
    (told,) = upload([stage])
    assert (told.done, told.error) == (1, "")
    assert [step for step, _ in steps_of(server.runs["kkkk"])] == list(range(50))

    (path,) = stage.waiting  # the same, killed while it wrote
    path.with_name(f"{path.name}.synced").unlink()
    os.truncate(path, path.stat().st_size - 20)
    (told,) = upload([stage])
    assert told.done == 0 and "incomplete record" in told.error, "it may still be written to"
    os.utime(path, (1, 1))
    (told,) = upload([stage])
    assert (told.done, told.error) == (1, "") and upload([offline_runs("k", tmp_path / "k")]) == []
    os.truncate(path, 7)
    assert offline_runs("k", tmp_path / "k") == StageRuns("k"), "killed before it wrote anything"


def test_without_a_key_nothing_is_tried(nobody: None, tmp_path: Path) -> None:
    waiting = StageRuns("a", (tmp_path / "offline-run-1-a" / "run-a.wandb",))
    with pytest.raises(UserError) as caught:
        upload([waiting])
    assert str(caught.value) == "no key for W&B (https://api.wandb.ai): type wandb login, or set WANDB_API_KEY"
    assert upload([StageRuns("a")]) == []


def test_without_internet_nothing_is_tried(nobody: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("WANDB_API_KEY", wandb_server.KEY)
    with pytest.raises(
        RunError, match=rf"^{address} cannot be reached \(.*refused\); type this where there is internet$"
    ):
        upload([StageRuns("a", (tmp_path / "offline-run-1-a" / "run-a.wandb",))])


def test_an_online_run_of_a_requeued_job_is_one_run(server: Any, tmp_path: Path) -> None:
    attempt(tmp_path / "a", "aaaa", range(0, 3), "interrupted", mode="online")
    attempt(tmp_path / "a", "aaaa", range(3, 5), mode="online")
    (run,) = server.runs.values()
    assert [step for step, _ in steps_of(run)] == [0, 1, 2, 2, 3, 4, 4]
    assert run.exits == [1, 0] and run.fields["groupName"] == "clusters"


def test_a_job_that_cannot_reach_the_server_keeps_its_run_offline(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from benchmark.tracking import wandb_tracker

    monkeypatch.setattr(wandb_tracker, "_REACH_S", 0.5)
    reachable = os.environ["WANDB_BASE_URL"]
    with socket.socket() as silent:  # takes calls and never answers, as a firewall does
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        attempt(tmp_path / "a", "aaaa", range(0, 2), mode="online")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert " cannot be reached (timed out); this run is kept offline: python -m benchmark.sweep sync" in warning
    monkeypatch.setenv("WANDB_BASE_URL", reachable)
    (told,) = upload([offline_runs("a", tmp_path / "a")])
    assert told.done == 1
    assert [step for step, _ in steps_of(server.runs["aaaa"])] == [0, 1, 1]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a user would see of ours; W&B's own log is a file."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
            and record.name.startswith("benchmark.")]  # fmt: skip


def variant(folder: Path, mode: str) -> None:
    """Two stages: one makes weights, the other a table and scores of them."""
    weights, picture = folder / "bit.safetensors", folder / "picture.png"
    weights.write_bytes(b"weights")
    Image.new("RGB", (8, 8), "red").save(picture)
    tracker = open_tracker("wandb", folder / "low", run_id="llll", mode=mode, **RUN)
    tracker.artifact(Artifact("lowlevel-llll", "checkpoint", {"bit.safetensors": weights}, {"a/seen.png": picture}))
    tracker.finish("done")
    tracker = open_tracker("wandb", folder / "score", run_id="ssss", mode=mode, **RUN)
    tracker.table(Table("reconstructions", ("key", "seen"), (("subj01_nsd00003", picture),)))
    uses = ("lowlevel-llll", "encoder-that-was-not-tracked")
    tracker.artifact(Artifact("score-ssss", "scores", {"scores.parquet": weights}, metadata={"n": 1}, uses=uses))
    tracker.finish("done")
    wait_for_files(folder / "low")
    wait_for_files(folder / "score")


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_artifacts_with_lineage_reach_the_server(
    server: Any, tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    variant(tmp_path, mode)
    if mode == "offline":
        told = upload([offline_runs(name, tmp_path / name) for name in ("low", "score")])
        assert [(one.done, one.error) for one in told] == [(1, ""), (1, "")]
    known = {one.name: one for one in server.artifacts.values()}
    assert all(one.committed for one in known.values())
    weights, scores = known["lowlevel-llll"], known["score-ssss"]
    assert (weights.type, weights.run, weights.files["bit.safetensors"]) == ("checkpoint", "llll", b"weights")
    assert weights.manifest()["a/seen.png"]["ref"] == (tmp_path / "picture.png").as_uri()
    assert "a/seen.png" not in weights.files, "by reference: nothing is uploaded"
    assert scores.type == "scores"
    assert scores.metadata == {"n": 1, "uses": ["lowlevel-llll", "encoder-that-was-not-tracked"]}
    assert server.runs["ssss"].uses == (["lowlevel-llll"] if mode == "online" else [])
    table = known["run-ssss-reconstructions"]
    assert any(name.endswith("picture.png") for name in table.files)
    assert not warnings_of(caplog)


def test_a_server_that_refuses_a_run_costs_a_line_and_the_run_is_offline(
    server: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.refused.add("aaaa")
    attempt(tmp_path / "a", "aaaa", range(0, 2), mode="online")
    (warning,) = warnings_of(caplog)
    assert "permission denied for aaaa" in warning and "this run is kept offline" in warning
    server.refused.clear()
    (told,) = upload([offline_runs("a", tmp_path / "a")])
    assert told.done == 1 and [step for step, _ in steps_of(server.runs["aaaa"])] == [0, 1, 1]


@pytest.mark.slow
def test_a_server_that_goes_away_costs_a_line_and_the_rest_is_uploaded_later(
    nobody: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    from benchmark.tracking import wandb_tracker

    monkeypatch.setattr(wandb_tracker, "_FINISH_S", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", wandb_server.KEY)
    weights = tmp_path / "bit.safetensors"
    weights.write_bytes(b"weights")
    wandb.teardown()
    with wandb_server.fake_wandb() as found:
        monkeypatch.setenv("WANDB_BASE_URL", found.address)
        tracker = open_tracker("wandb", tmp_path / "a", run_id="aaaa", mode="online", **RUN)
        tracker.log({"train/loss": 1.0}, 0)
    tracker.log({"train/loss": 0.5}, 1)
    tracker.artifact(Artifact("lowlevel-aaaa", "checkpoint", {"bit.safetensors": weights}, uses=("encoder-eeee",)))
    tracker.finish("done")
    wandb.teardown()
    (warning,) = warnings_of(caplog)
    assert "cannot be reached" in warning and "python -m benchmark.tracking rebuild" in warning
    with wandb_server.fake_wandb() as found:
        monkeypatch.setenv("WANDB_BASE_URL", found.address)
        (told,) = upload([offline_runs("a", tmp_path / "a")])
        assert told.done == 1 and steps_of(found.runs["aaaa"]) == [(0, 1.0), (1, 0.5)]
        assert offline_runs("a", tmp_path / "a").waiting == ()
