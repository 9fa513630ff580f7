"""Whole plans, in this process and in several."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmark.errors import RunError, UserError
from benchmark.execute import Outcome, RunOptions
from benchmark.graph import Plan, Stage
from benchmark.launch import Event, Launcher, make_launcher, raise_failures
from benchmark.store import Store, read_json

HERE = Path(__file__).parent
OPTIONS = RunOptions(progress=False, threads=1)


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(params=["inline", "local"])
def launcher(request: pytest.FixtureRequest) -> Launcher:
    return make_launcher(request.param, parallel=2)


def toy(tmp_path: Path, name: str, run: str = "add", **fields: Any) -> Stage:
    config = {"log": str(tmp_path / "log"), "value": 1, **fields.pop("config", {})}
    return Stage(name, f"toy_stages:{run}", config, **fields)


def launch(
    launcher: Launcher, targets: list[Stage], store: Store, mode: str = "cached"
) -> tuple[dict[str, Outcome], list[Event]]:
    plan = Plan.of(targets)
    events: list[Event] = []
    outcomes = launcher.run(plan, plan.decide(store, mode), store, OPTIONS, events.append)
    assert [outcome.stage for outcome in outcomes] == list(plan.stages)
    return {outcome.stage.name: outcome for outcome in outcomes}, events


def two_branches(tmp_path: Path) -> tuple[Stage, Stage]:
    """A stage that both read; one branch fails in its middle."""
    data = toy(tmp_path, "data")
    bad = toy(tmp_path, "bad", "fail", upstream={"data": data}, label="b")
    good = toy(tmp_path, "good", upstream={"data": data}, label="g")
    return (
        toy(tmp_path, "bad-end", upstream={"bad": bad, "data": data}, label="b"),
        toy(tmp_path, "good-end", upstream={"good": good}, label="g"),
    )


def test_a_failure_blocks_only_what_needs_it(launcher: Launcher, store: Store, tmp_path: Path) -> None:
    targets = list(two_branches(tmp_path))
    outcomes, events = launch(launcher, targets, store)
    states = {name: outcome.state for name, outcome in outcomes.items()}
    assert states == {"data": "done", "bad": "failed", "bad-end": "blocked", "good": "done", "good-end": "done"}
    assert outcomes["bad-end"].error == "needs bad [b], which failed"
    assert outcomes["good-end"].summary == {"total": 3} == store.status(targets[1])["summary"]
    with pytest.raises(RunError) as caught:
        raise_failures(list(outcomes.values()))
    lines = str(caught.value).splitlines()
    assert lines[0] == "1 stage failed, 1 not tried because of it:" and len(lines) == 2
    assert lines[1].startswith("  stage bad [b] failed: ValueError: the numbers do not add up; full trace: ")

    kinds = [(event.kind, event.stage.name) for event in events if event.stage]
    assert kinds.index(("done", "data")) < kinds.index(("started", "bad"))
    assert [event.position for event in events if event.kind == "started" and event.stage][0] == "[1/5]"
    assert any(str(event) == "[1/5] data: done in" + str(event).partition("done in")[2] for event in events)

    (tmp_path / "log.mended").touch()
    outcomes, _ = launch(launcher, targets, store, "retry")
    states = {name: outcome.state for name, outcome in outcomes.items()}
    assert states == {"data": "cached", "bad": "done", "bad-end": "done", "good": "cached", "good-end": "cached"}
    assert outcomes["data"].summary == {"total": 1}
    raise_failures(list(outcomes.values()))  # nothing to say


def test_read_only_runs_nothing(launcher: Launcher, store: Store, tmp_path: Path) -> None:
    outcomes, events = launch(launcher, list(two_branches(tmp_path)), store, "read-only")
    assert {outcome.state for outcome in outcomes.values()} == {"blocked"} and not store.root.exists()
    assert {event.kind for event in events} == {"blocked"}


def test_force_runs_everything_again(store: Store, tmp_path: Path) -> None:
    target = two_branches(tmp_path)[1]
    inline = make_launcher("inline")
    launch(inline, [target], store)
    outcomes, _ = launch(inline, [target], store, "force")
    assert {outcome.state for outcome in outcomes.values()} == {"done"}
    assert len((tmp_path / "log").read_text().splitlines()) == 6


def test_a_wrong_input_ends_the_run(launcher: Launcher, store: Store, tmp_path: Path) -> None:
    wrong = toy(tmp_path, "data", "refuse")
    after = toy(tmp_path, "after", upstream={"data": wrong})
    with pytest.raises(UserError, match="^data/betas.mgh is truncated"):
        launch(launcher, [after], store)
    assert not store.folder(after).exists()


def test_local_runs_side_by_side_and_leaves_logs_but_no_pickles(store: Store, tmp_path: Path) -> None:
    left = toy(tmp_path, "left", config={"sleep": 1.5})
    right = toy(tmp_path, "right", config={"sleep": 1.5})
    both = toy(tmp_path, "both", upstream={"left": left, "right": right})
    outcomes, events = launch(make_launcher("local", 2), [both], store)
    assert outcomes["both"].summary == {"total": 3}
    spans = [store.status(stage) for stage in (left, right)]
    assert spans[0]["pid"] != spans[1]["pid"] and os.getpid() not in (spans[0]["pid"], spans[1]["pid"])
    kinds = [(event.kind, event.stage.name) for event in events if event.stage]
    assert kinds.index(("started", "right")) < kinds.index(("done", "left"))
    logs = Path(str(events[0]).partition("logs of the stages: ")[2])
    assert events[0].kind == "note" and len(list(logs.glob("*_log.err"))) == 3
    assert list(store.root.rglob("*.pkl")) == []
    assert read_json(store.folder(both) / "manifest.json")["command"] != ""


def test_local_tells_of_a_process_that_died(store: Store, tmp_path: Path) -> None:
    outcomes, _ = launch(make_launcher("local", 2), [toy(tmp_path, "dies", "die"), toy(tmp_path, "lives")], store)
    assert outcomes["lives"].state == "done" and outcomes["dies"].state == "failed"
    assert outcomes["dies"].error.startswith(
        "stage dies failed: its process died (killed, or out of memory); its log: "
    )
    assert store.state(outcomes["dies"].stage).kind == "interrupted"


SWEEP = """
import sys
from pathlib import Path
from benchmark.execute import RunOptions
from benchmark.graph import Plan, Stage
from benchmark.launch import make_launcher
from benchmark.store import Store

if __name__ == "__main__":
    stages = [
        Stage(f"walk{i}", "toy_stages:walk", {"log": sys.argv[2], "steps": 25, "sleep": 0.06}, label=f"i={i}")
        for i in range(2)
    ]
    plan, store = Plan.of(stages), Store(sys.argv[1])
    outcomes = make_launcher(sys.argv[3], 2).run(plan, plan.decide(store), store, RunOptions(threads=1), print)
    print([outcome.state for outcome in outcomes])
"""


@pytest.mark.parametrize(
    "kind, signum, group",
    [
        ("inline", signal.SIGINT, False),
        ("local", signal.SIGTERM, False),  # to the launcher alone, which must tell its processes
        ("local", signal.SIGINT, True),  # to all of them, as the terminal does
    ],
)
def test_an_interrupted_command_goes_on(
    store: Store, tmp_path: Path, kind: str, signum: signal.Signals, group: bool
) -> None:
    script = tmp_path / "sweep.py"
    script.write_text(SWEEP)
    command = [sys.executable, str(script), str(store.root), str(tmp_path / "log"), kind]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
        )

    process = start()
    end = time.monotonic() + 30
    wanted = 1 if kind == "inline" else 2
    while len(list(store.root.glob("*/*/checkpoints/state.json"))) < wanted:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    if group:
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
    process.communicate(timeout=30)
    assert process.returncode != 0
    states = [read_json(path)["state"] for path in store.root.glob("*/*/status.json")]
    assert states == ["interrupted"] * wanted
    again = start()
    out, err = again.communicate(timeout=60)
    assert out.splitlines()[-1] == "['done', 'done']", err
    assert "interrupted: resumes from its checkpoint" in out


def test_local_shares_out_gpus_and_threads(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5e1f")
    plan = Plan.of(Stage(name, "toy_stages:gpu", {"sleep": 1.0}) for name in ("a", "b"))
    launcher, options = make_launcher("local", 2), replace(OPTIONS, device="cuda", threads=3)
    on_gpu = launcher.run(plan, plan.decide(store), store, options, lambda event: None)
    assert sorted(outcome.summary["gpu"] for outcome in on_gpu) == ["2", "GPU-5e1f"]
    assert {outcome.summary["threads"] for outcome in on_gpu} == {"3"}
    on_cpu = launcher.run(plan, plan.decide(store, "force"), store, OPTIONS, lambda event: None)
    assert [outcome.summary["gpu"] for outcome in on_cpu] == ["", ""]


def test_unknown_launchers_and_counts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown launcher 'locl' .did you mean 'local'"):
        make_launcher("locl")
    with pytest.raises(UserError, match="parallel is 0"):
        make_launcher("local", parallel=0)
