from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmark.errors import UserError
from benchmark.tracking import Artifact, MultiTracker, NoTracker, Table, open_tracker
from benchmark.tracking.jsonl import JsonLinesTracker

RUN: dict[str, Any] = {
    "group": "clusters",
    "job_type": "lowlevel",
    "run_id": "0123456789abcdef",
    "name": "lowlevel clusters=128",
    "config": {"lr": 5e-4, "clusters": 128},
}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the home of a user who never heard of W&B."""
    home = tmp_path / "home"
    home.mkdir()
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return home


def test_json_lines(tmp_path: Path) -> None:
    tracker = open_tracker("jsonl", tmp_path / "stage", **RUN)
    tracker.log({"train/loss": 0.5, "train/lr": 1e-3}, 10)
    tracker.log({"train/loss": math.nan}, 20)
    tracker.summary({"PixCorr": 0.25, "by_subject": {"1": math.inf}})
    tracker.image("first", tmp_path / "stage" / "images" / "first.png")
    tracker.finish("done")
    found = lines(tmp_path / "stage")
    assert all(line.pop("time") > 1.7e9 for line in found)
    assert found == [
        {"step": 10, "train/loss": 0.5, "train/lr": 1e-3},
        {"step": 20, "train/loss": None},
        {"summary": {"PixCorr": 0.25, "by_subject": {"1": None}}},
        {"image": "first", "path": "images/first.png"},
        {"status": "done"},
    ]


def test_json_lines_continue_after_a_crash_that_left_half_a_line(tmp_path: Path) -> None:
    open_tracker("jsonl", tmp_path, **RUN).log({"loss": 1.0}, 1)  # never finished
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    tracker = open_tracker("jsonl", tmp_path, **RUN)
    tracker.log({"loss": 0.5}, 2)
    tracker.finish("interrupted")
    assert [line.get("step", line.get("status")) for line in lines(tmp_path)] == [1, 2, "interrupted"]
    with pytest.raises(ValueError, match="after finish"):
        tracker.log({"loss": 0.1}, 3)
    tracker.finish("done")  # a second time does nothing
    assert len(lines(tmp_path)) == 3


def test_one_tracker_that_breaks_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Counts(NoTracker):
        calls = 0

        def log(self, *_: object) -> None:
            self.calls += 1

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    counts = Counts()
    tracker = MultiTracker([JsonLinesTracker(tmp_path), counts])
    monkeypatch.setattr(os, "write", full)
    for step in range(3):
        tracker.log({"loss": 1.0}, step)
    assert counts.calls == 3
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == "tracking: JsonLines stopped at 'log' ([Errno 28] No space left on device); the stage goes on"


def test_an_image_of_the_stage_is_found_wherever_the_stage_is(tmp_path: Path) -> None:
    tracker = JsonLinesTracker(tmp_path / "stage" / "tracking")
    tracker.image("first", tmp_path / "stage" / "combined" / "a.png")
    tracker.image("other", tmp_path / "elsewhere.png")
    places = [line["path"] for line in lines(tmp_path / "stage" / "tracking")]
    assert places == ["../combined/a.png", str(tmp_path / "elsewhere.png")]


def test_none_writes_nothing(tmp_path: Path) -> None:
    tracker = open_tracker("none", tmp_path, **RUN)
    tracker.log({"loss": 1.0}, 1)
    tracker.summary({"a": 1})
    tracker.image("a", tmp_path / "missing.png")
    tracker.table(Table("a", ("b",), ((1,),)))
    tracker.artifact(Artifact("a", "records", {}))
    tracker.finish("done")
    assert not list(tmp_path.iterdir())


def test_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"unknown tracker 'wanbd' \(did you mean 'wandb'\?\): choose one of wandb, jsonl"
    ):
        open_tracker("wanbd", tmp_path, **RUN)


def test_importing_the_package_does_not_import_wandb() -> None:
    code = "import sys, benchmark.tracking; assert not {'wandb', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wandb_offline_runs_are_complete_and_stay_in_their_folder(tmp_path: Path, nobody: Path) -> None:
    before = dict(os.environ)
    for number in range(2):  # stage after stage in one process
        folder = tmp_path / f"stage{number}"
        tracker = open_tracker("wandb", folder, **{**RUN, "run_id": f"run{number}"})
        tracker.log({"train/loss": 0.5, "train/lr": 1e-3}, 10)
        tracker.log({"train/loss": 0.25}, 20)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "first.png")
        tracker.image("first", tmp_path / "first.png")
        tracker.summary({"PixCorr": 0.75})
        tracker.finish("failed" if number else "done")
        after = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
        assert after == {name: value for name, value in before.items() if name != "WANDB_SERVICE"}

        assert len(lines(folder)) == 5
        (run,) = (folder / "wandb").glob(f"offline-run-*-run{number}")
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        records = [json.loads(line) for line in shown.splitlines()]
        (opened,) = [record["run"] for record in records if record["type"] == "run"]
        assert opened["run_group"] == "clusters" and opened["job_type"] == "lowlevel"
        assert opened["run_id"] == f"run{number}" and opened["display_name"] == "lowlevel clusters=128"
        assert opened["config"]["update"].items() >= RUN["config"].items()
        history = [record["history"]["item"] for record in records if record["type"] == "history"]
        assert [(item["global_step"], item.get("train/loss")) for item in history] == [
            (10, 0.5),
            (20, 0.25),
            (20, None),
        ]
        assert history[2]["first._type"] == "image-file"
        summary = {}
        for record in records:
            summary.update(record.get("summary", {}).get("update", {}))
        assert summary["PixCorr"] == 0.75
        metrics = [record["metric"] for record in records if record["type"] == "metric"]
        assert any(metric.get("glob_name") == "*" and metric["step_metric"] == "global_step" for metric in metrics)
        (end,) = [record["exit"] for record in records if record["type"] == "exit"]
        assert end.get("exit_code", 0) == number
        assert len(list(run.glob("files/media/images/*.png"))) == 1
    assert not [path for path in nobody.rglob("*") if path.is_file()]


def test_wandb_that_does_not_start_costs_one_warning(
    tmp_path: Path, nobody: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    def refuse(**_: object) -> None:
        raise wandb.errors.CommError("no route\nto host")

    monkeypatch.setattr(wandb, "init", refuse)
    before = dict(os.environ)
    tracker = open_tracker("wandb", tmp_path, **RUN)
    assert dict(os.environ) == before
    tracker.log({"loss": 1.0}, 1)
    tracker.finish("done")
    assert len(lines(tmp_path)) == 2
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    trouble = "W&B could not start, this stage is logged to metrics.jsonl only: no route to host"
    assert warning.getMessage() == trouble


def test_wandb_that_breaks_later_costs_one_warning(
    tmp_path: Path, nobody: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_tracker("wandb", tmp_path, **RUN, mode="disabled")
    assert isinstance(tracker, MultiTracker)
    tracker.image("gone", tmp_path / "missing.png")
    tracker.image("gone", tmp_path / "missing.png")
    tracker.log({"loss": 1.0}, 1)
    tracker.finish("done")
    assert len(lines(tmp_path)) == 4
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.getMessage().startswith("W&B failed at 'image', later failures are not shown: [Errno 2]")


@pytest.mark.parametrize(
    ("environment", "files", "mode"),
    [
        ({}, {}, "offline"),
        ({"WANDB_API_KEY": "k"}, {}, "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, {}, "offline"),
        ({"WANDB_MODE": "disabled"}, {}, "disabled"),
        ({}, {".netrc": "machine api.wandb.ai login user password k\n"}, "online"),
        ({}, {".netrc": "machine example.org login user password k\n"}, "offline"),
        ({}, {".netrc": "machine api.wandb.ai login"}, "offline"),
        (
            {"WANDB_BASE_URL": "https://wandb.example.org"},
            {".netrc": "machine wandb.example.org login user password k\n"},
            "online",
        ),
        (
            {},
            {
                ".netrc": "machine wandb.example.org login user password k\n",
                ".config/wandb/settings": "[default]\nbase_url = https://wandb.example.org\n",
            },
            "online",
        ),
        ({"WANDB_API_KEY": "k"}, {".config/wandb/settings": "[default]\nmode = offline\n"}, "offline"),
        ({}, {".config/wandb/settings": "not a settings file"}, "offline"),
    ],
)
def test_preferred_mode(
    nobody: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], files: dict[str, str], mode: str
) -> None:
    from benchmark.tracking.wandb_tracker import preferred_mode

    for name, content in files.items():
        (nobody / name).parent.mkdir(parents=True, exist_ok=True)
        (nobody / name).write_text(content)
        (nobody / name).chmod(0o600)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert preferred_mode() == mode


@pytest.mark.parametrize("what", ["log", "log_artifact", "finish", "define_metric"])
def test_wandb_that_breaks_anywhere_costs_one_warning(
    tmp_path: Path, nobody: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    import wandb

    real_finish = wandb.Run.finish

    def broken(run: Any, *arguments: Any, **more: Any) -> None:
        if what == "finish":
            real_finish(run, *arguments, **more)  # or the process would wait for it at its end
        raise RuntimeError(f"{what} is\nbroken")

    monkeypatch.setattr(wandb.Run, what, broken)
    tracker = open_tracker("wandb", tmp_path, **RUN, mode="offline")
    (tmp_path / "bit.safetensors").write_bytes(b"weights")
    for step in range(3):
        tracker.log({"train/loss": 1.0}, step)
    tracker.table(Table("images", ("key", "value"), (("a", 1.0), ("b", None))))
    tracker.artifact(Artifact("lowlevel-0", "checkpoint", {"bit.safetensors": tmp_path / "bit.safetensors"}))
    tracker.summary({"PixCorr": 0.5})
    tracker.finish("done")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.startswith("W&B ") and warning.endswith(f": {what} is broken")
    assert [line.get("step") for line in lines(tmp_path)[:3]] == [0, 1, 2] and lines(tmp_path)[-1]["status"] == "done"


def test_online_without_a_key_is_offline_and_asks_nobody(
    tmp_path: Path, nobody: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    tracker = open_tracker("wandb", tmp_path, **RUN)
    tracker.log({"loss": 1.0}, 1)
    tracker.finish("done")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


def test_a_user_without_a_key_is_told_so_in_one_line(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmark.tracking.wandb_tracker import notice

    line = notice("clusters")
    assert line.startswith("W&B: no key found, so runs are kept offline") and "\n" not in line
    assert "wandb login" in line and line.endswith("python -m benchmark.sweep sync clusters")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert notice("clusters") == "", "they chose so"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert notice("clusters") == ""
