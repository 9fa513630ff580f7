"""One stage, from lock to DONE, through every way in which it can end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import benchmark.tracking
from benchmark.errors import RunError, UserError
from benchmark.execute import Outcome, RunOptions, execute
from benchmark.graph import Plan, Stage
from benchmark.store import Store, read_json, sha256_file

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def toy(tmp_path: Path, name: str = "one", run: str = "add", **fields: Any) -> Stage:
    config = {"log": str(tmp_path / "log"), "value": 1, **fields.pop("config", {})}
    return Stage(name, f"toy_stages:{run}", config, **fields)


def run(stage: Stage, store: Store, **options: Any) -> Outcome:
    return execute(stage, store, RunOptions(**{"progress": False, "threads": 1, **options}))


def runs(tmp_path: Path) -> int:
    log = tmp_path / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def start(tmp_path: Path, store: Store, stage: Stage, **options: Any) -> subprocess.Popen[str]:
    request = tmp_path / f"request-{time.monotonic_ns()}.json"
    request.write_text(json.dumps({"stage": stage.to_dict(), "options": options}))
    command = [sys.executable, str(HERE / "toy_stages.py"), str(store.root), str(request)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *filter(None, sys.path)])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def wait_for(path: Path, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_a_stage_leaves_a_complete_folder(store: Store, tmp_path: Path) -> None:
    one = toy(tmp_path, config={"opt": {"noise_seed": 7}, "seed": 3}, digests={"images": "ab"})
    two = toy(tmp_path, "two", upstream={"first": one}, label="value=1")
    with pytest.raises(RunError, match="two .value=1. needs one, which has no result"):
        run(two, store)
    assert run(one, store).state == "done"
    outcome = run(two, store)
    assert outcome.state == "done" and outcome.summary == {"total": 2} and outcome.seconds > 0
    folder = store.folder(two)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["DONE", "config.yaml", "manifest.json", "parts", "status.json", "value.json"]
    assert read_json(folder / "value.json") == 2
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config == {**two.record(), "upstream": {"first": one.key}}
    status = store.status(two)
    assert status["state"] == "done" and status["summary"] == {"total": 2} and status["attempt"] == 1
    assert status["peak_memory_bytes"] > 2**20 and status["wall_s"] > 0 and status["cpu_s"] >= 0
    manifest = read_json(store.folder(one) / "manifest.json")
    assert manifest["seeds"] == {"opt.noise_seed": 7, "seed": 3} and manifest["digests"] == {"images": "ab"}
    assert manifest["packages"]["numpy"] and manifest["hardware"]["cores"] >= 1 and "git" in manifest
    assert store.verify(two) == []


def test_a_finished_stage_is_not_run_again_unless_forced(store: Store, tmp_path: Path) -> None:
    stage = toy(tmp_path)
    run(stage, store)
    assert run(stage, store) == Outcome(stage, "cached", summary={"total": 1}) and runs(tmp_path) == 1
    assert run(stage, store, force=True).state == "done" and runs(tmp_path) == 2
    assert store.status(stage)["forced"] is True


def test_damage_is_mended_by_running_again(store: Store, tmp_path: Path) -> None:
    stage = toy(tmp_path)
    run(stage, store)
    good = sha256_file(store.folder(stage) / "value.json")
    (store.folder(stage) / "value.json").write_text("")
    assert [d.reason for d in Plan.of([stage]).decide(store)] == ["damaged: value.json (0 bytes, expected 2)"]
    assert run(stage, store).state == "done" and sha256_file(store.folder(stage) / "value.json") == good


def test_a_failure_is_told_and_recorded(store: Store, tmp_path: Path) -> None:
    stage = toy(tmp_path, "low", "fail", label="clusters=8")
    trace = store.folder(stage) / "traceback.txt"
    with pytest.raises(RunError) as caught:
        run(stage, store)
    assert str(caught.value) == (
        f"stage low [clusters=8] failed: ValueError: the numbers do not add up; full trace: {trace}"
    )
    assert "in fail\n" in trace.read_text()
    assert store.status(stage)["state"] == "failed" and not store.is_done(stage)
    (tmp_path / "log.mended").touch()
    assert run(stage, store).state == "done" and not trace.exists()


def test_a_wrong_input_passes_through_and_leaves_nothing_half_written(store: Store, tmp_path: Path) -> None:
    stage = toy(tmp_path, "data", "refuse")
    with pytest.raises(UserError, match="^data/betas.mgh is truncated"):
        run(stage, store)
    assert not (store.folder(stage) / "half.json").exists()
    assert store.state(stage).kind == "failed" and "truncated" in store.state(stage).detail


@pytest.mark.parametrize("target", ["no_such_module:f", "toy_stages:no_such_function"])
def test_a_stage_that_cannot_be_imported_fails_like_any_other(store: Store, target: str) -> None:
    with pytest.raises(RunError, match="stage s failed: .*no_such"):
        run(Stage("s", target, {}), store)


def test_summary_must_be_json(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    np = pytest.importorskip("numpy")
    import toy_stages  # type: ignore[import-not-found]

    summary = {"a": np.float32(0.5), "b": np.int64(3), "c": float("nan"), "d": (1, None), "e": np.float64("inf")}
    monkeypatch.setattr(toy_stages, "add", lambda ctx: summary)
    expected = {"a": 0.5, "b": 3, "c": None, "d": [1, None], "e": None}
    stage = Stage("s", "toy_stages:add", {})
    assert run(stage, store).summary == expected == store.status(stage)["summary"]
    monkeypatch.setattr(toy_stages, "add", lambda ctx: None)
    with pytest.raises(RunError, match="returned NoneType, expected a dict"):
        run(Stage("t", "toy_stages:add", {}), store)


def test_an_interrupt_is_recorded_and_the_same_call_goes_on(store: Store, tmp_path: Path) -> None:
    stage = toy(tmp_path, "walk", "walk", config={"steps": 6, "stop_at": 4})
    with pytest.raises(KeyboardInterrupt):
        run(stage, store)
    assert store.status(stage)["state"] == "interrupted"
    assert [d.reason for d in Plan.of([stage]).decide(store)] == ["interrupted: resumes from its checkpoint"]
    assert [d.action for d in Plan.of([stage]).decide(store, "retry")] == ["run"]
    (tmp_path / "log.go").touch()
    assert run(stage, store).summary == {"first": 4}
    assert store.status(stage)["attempt"] == 2 and not (store.folder(stage) / "checkpoints").exists()


def test_an_interrupted_forced_run_loses_nothing(store: Store, tmp_path: Path) -> None:
    stage = toy(tmp_path, "walk", "walk", config={"steps": 6, "stop_at": 4})
    go = tmp_path / "log.go"
    go.touch()
    run(stage, store)
    value = read_json(store.folder(stage) / "value.json")
    go.unlink()
    with pytest.raises(KeyboardInterrupt):
        run(stage, store, force=True)
    assert store.is_done(stage) and run(stage, store).state == "cached"
    assert [d.reason for d in Plan.of([stage]).decide(store, "force")] == ["forced; resumes from its checkpoint"]
    go.touch()
    assert run(stage, store, force=True).summary == {"first": 4}
    assert read_json(store.folder(stage) / "value.json") == value


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_stage_goes_on_and_ends_the_same(store: Store, tmp_path: Path, signum: signal.Signals) -> None:
    stage = toy(tmp_path, "walk", "walk", config={"steps": 25, "sleep": 0.04})
    process = start(tmp_path, store, stage)
    wait_for(store.folder(stage) / "checkpoints" / "state.json")
    time.sleep(0.2)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: -2}[signum], errors
    assert store.status(stage)["state"] == ("running" if signum == signal.SIGKILL else "interrupted")
    assert [d.reason for d in Plan.of([stage]).decide(store)] == ["interrupted: resumes from its checkpoint"]

    again = start(tmp_path, store, stage)
    assert again.communicate(timeout=20)[0] == "done\n"
    assert 0 < store.status(stage)["summary"]["first"] < 25
    undisturbed = Store(tmp_path / "other")
    run(stage, undisturbed)
    for name in ("value.json", "config.yaml"):
        assert (store.folder(stage) / name).read_bytes() == (undisturbed.folder(stage) / name).read_bytes()


def test_two_processes_compute_a_stage_once(store: Store, tmp_path: Path) -> None:
    stage = toy(tmp_path, config={"sleep": 1.0})
    both = [start(tmp_path, store, stage) for _ in range(2)]
    answers = [process.communicate(timeout=30) for process in both]
    assert sorted(out for out, _ in answers) == ["cached\n", "done\n"] and runs(tmp_path) == 1
    waited = next(err for out, err in answers if out == "cached\n")
    other = next(process.pid for process, (out, _) in zip(both, answers, strict=True) if out == "done\n")
    assert f"one: waits for process {other} on" in waited


class BrokenTracker:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*_: object) -> None:
            self.calls.append(name)
            raise OSError("the tracker is down")

        return call


def test_a_broken_tracker_never_kills_a_stage(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = BrokenTracker()
    monkeypatch.setattr(benchmark.tracking, "open_tracker", lambda *_, **__: tracker)
    assert run(toy(tmp_path), store, tracker="wandb", progress=True).state == "done"
    assert tracker.calls == ["summary"]  # told once, then left alone
    assert capsys.readouterr().err.count("tracker is down") == 1

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such tracker")

    monkeypatch.setattr(benchmark.tracking, "open_tracker", refuse)
    assert run(toy(tmp_path, "two"), store, tracker="wandb").state == "done"


def test_what_the_tracker_is_told(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, ...]] = []

    class Recorder:
        def summary(self, values: dict[str, Any]) -> None:
            told.append(("summary", values))

        def artifact(self, artifact: Any) -> None:
            told.append(("artifact", artifact.name, artifact.type))

        def finish(self, status: str) -> None:
            told.append(("finish", status))

    def open_tracker(kind: str, folder: Path, **fields: Any) -> Recorder:
        told.append((kind, folder.name, fields))
        return Recorder()

    monkeypatch.setattr(benchmark.tracking, "open_tracker", open_tracker)
    stage = toy(tmp_path, label="value=1")
    run(stage, store, tracker="jsonl", group="clusters")
    fields: dict[str, Any] = {
        "group": "clusters",
        "job_type": "one",
        "run_id": stage.fingerprint[:16],
        "name": "one value=1",
    }
    fields |= {"tags": ("one", "value=1"), "mode": None}
    config = told[0][2].pop("config")
    assert told[0] == ("jsonl", "tracking", fields)
    assert config.items() >= stage.config.items() and config["stage"]["fingerprint"] == stage.fingerprint
    assert set(config["made_with"]) == {"git", "python", "hardware", "command"}
    costs = told.pop(2)[1]
    assert costs["state"] == "done" and costs["wall_s"] > 0 and costs["peak_memory_bytes"] > 0
    artifact = ("artifact", f"one-{stage.fingerprint[:16]}", "records")
    assert told[1:] == [("summary", {"total": 1}), artifact, ("finish", "done")]
    assert store.status(stage)["sweep"] == "clusters"
    with pytest.raises(RunError):
        run(toy(tmp_path, "bad", "fail"), store, tracker="jsonl")
    assert told[-1] == ("finish", "failed") and "numbers do not add up" in told[-2][1]["error"]
    told.clear()
    run(stage, store, tracker="jsonl", group="clusters", force=True)  # told of its results where these stay
    assert [one[0] for one in told] == ["jsonl", "summary", "finish", "jsonl", "summary", "artifact", "finish"]


def test_every_stage_starts_from_its_seed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    import random

    import numpy as np
    import toy_stages

    def draw(ctx: Any) -> dict[str, Any]:
        return {"draws": [random.random(), np.random.rand(), torch.rand(1).item()], "threads": torch.get_num_threads()}

    monkeypatch.setattr(toy_stages, "add", draw)
    seeds = [1, 1, 2]
    drawn = [run(Stage(f"s{i}", "toy_stages:add", {"seed": seed}), store).summary for i, seed in enumerate(seeds)]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0]["threads"] == 1
