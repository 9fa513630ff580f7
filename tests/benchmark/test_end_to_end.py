"""Whole sweeps through the command line: finished, repeated, interrupted, in parallel, on a tree of one's own."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open

from benchmark.store import Store, read_json

pytestmark = pytest.mark.timeout(900)  # the first test that needs the small sweep waits for it
Run = Callable[..., Any]


def table(out: str) -> str:
    """The printed table and its notes: all from the heading to the line with the places and the time."""
    return re.split(r"^page: ", out[out.index("demo track") :], flags=re.MULTILINE)[0]


def results(folder: Path) -> dict[str, str]:
    """SHA-256 of every output of every stage but the scores and what tells about the run."""
    found = {}
    for done in (folder / "store").glob("*/*/DONE"):
        for name, entry in read_json(done)["outputs"].items():
            if name not in ("config.yaml", "manifest.json", "scores.parquet"):
                found[f"{done.parent.relative_to(folder)}/{name}"] = entry["sha256"]
    return found


def same_scores(ours: Path, theirs: Path) -> None:
    """Every score is equal to the bit."""
    tables = [
        {str(p.relative_to(f)): pd.read_parquet(p) for p in f.glob("store/*/*/scores.parquet")} for f in (ours, theirs)
    ]
    assert tables[0].keys() == tables[1].keys() and len(tables[0]) == 3 + 1
    for name, table in tables[1].items():
        assert tables[0][name].equals(table), name


def same_rows(ours: Path, theirs: Path) -> None:
    """The leaderboards differ in time, memory and manifest alone."""
    rows = [json.loads((f / "leaderboard" / "leaderboard.json").read_text())["rows"] for f in (ours, theirs)]
    for one, other in zip(*rows, strict=True):
        for row in (one, other):
            del row["cost"], row["manifest"]
        assert one == other


@pytest.fixture
def copy(tiny_run: Any, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the finished sweep without some of its stages, given as (stage, variant)."""

    def make(*without: tuple[str, str]) -> Path:
        out = Path(shutil.copytree(tiny_run.out, tmp_path / "runs", ignore=shutil.ignore_patterns("leaderboard")))
        for role, variant in without:
            shutil.rmtree(out / "store" / tiny_run.stage(role, variant).key)
        return out

    return make


# --- a finished sweep -------------------------------------------------------------------------------------------------


def test_a_sweep_ends_with_a_table_a_page_and_rows(tiny_run: Any) -> None:
    answer = tiny_run.answer
    first, *rest = answer.out.splitlines()
    assert (
        first
        == f"sweep clusters (demo, quick): 3 variants, 24 stages: 24 to run, 0 cached; results go to {tiny_run.out}/"
    )
    assert rest[-1].startswith(f"page: {tiny_run.out}/leaderboard/index.html   rows: ")
    for words in (
        "clusters=8",
        "clusters=32",
        "mean image",
        "shuffled",
        "chance",
        "best: ",
        "one branch alone",
        "p = ",
    ):
        assert words in answer.out
    assert (tiny_run.out / "leaderboard" / "index.html").is_file()
    assert "[1/24] simulate: done in" in answer.err and "[24/24] references [clusters=128]: done in" in answer.err
    assert "Warning" not in answer.err and "Traceback" not in answer.err


def test_nothing_is_pickled_and_nothing_is_left_over(tiny_run: Any) -> None:
    kinds = {path.suffix for path in tiny_run.out.rglob("*") if path.is_file()}
    allowed = {".json", ".jsonl", ".yaml", ".npy", ".safetensors", ".parquet", ".png", ".html", ".lock", ""}
    nsd = {".hdf5", ".mat", ".csv", ".mgh", ".jpg", ".annot", ".pial", ".txt"}
    assert kinds - nsd <= allowed | {".webp", ".css", ".js", ".svg"}, kinds
    assert not list(tiny_run.out.glob("store/*/*/checkpoints"))
    for path in tiny_run.out.glob("store/*/*/*.npy"):
        np.load(path, mmap_mode="r", allow_pickle=False)
    for path in tiny_run.out.glob("store/*/*/*.safetensors"):
        with safe_open(path, "np") as file:
            assert file.keys()


def test_every_training_is_logged(tiny_run: Any) -> None:
    for role in ("encoder", "lowlevel", "semantic", "joint"):
        logs = list((tiny_run.folder(role) / "tracking").glob("*.jsonl"))
        assert logs, role
        text = "".join(path.read_text() for path in logs)
        assert "validation/" in text, role


def test_the_same_command_again_computes_nothing(tiny_run: Any, sweep_process: Run) -> None:
    store = tiny_run.out / "store"
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    rows = (tiny_run.out / "leaderboard" / "leaderboard.json").read_bytes()
    answer = sweep_process(*tiny_run.arguments, "--out", tiny_run.out)
    assert answer.code == 0 and answer.err == ""
    assert "24 stages: 0 to run, 24 cached" in answer.out.splitlines()[0]
    assert table(answer.out) == table(tiny_run.answer.out)
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()} == before
    assert (tiny_run.out / "leaderboard" / "leaderboard.json").read_bytes() == rows
    again = sweep_process(*tiny_run.arguments, "--out", tiny_run.out, "--mode", "read-only")
    assert again.code == 0 and table(again.out) == table(tiny_run.answer.out)


# --- disturbed --------------------------------------------------------------------------------------------------------


def test_ctrl_c_leaves_a_state_from_which_the_same_command_goes_on(
    tiny_run: Any, copy: Callable[..., Path], start_sweep: Run, sweep_process: Run
) -> None:
    gone = [(role, "clusters=128") for role in ("semantic", "joint", "reconstruct", "score", "references")]
    out = copy(*gone)
    missing = {key for key in results(tiny_run.out) if key not in results(out)}
    assert missing
    process = start_sweep(*tiny_run.arguments, "--out", out)
    status = Store(out / "store").folder(tiny_run.stage("joint")) / "status.json"
    deadline = time.monotonic() + 300
    while not status.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted: type the same command to go on" and "Traceback" not in err
    assert not (status.parent / "DONE").exists() and read_json(status)["state"] == "interrupted"
    assert not (out / "leaderboard").exists()

    plan = sweep_process(*tiny_run.arguments, "--out", out, "--dry-run")
    assert re.search(r"run +joint \[clusters=128\] +interrupted: ", plan.out), plan.out
    answer = sweep_process(*tiny_run.arguments, "--out", out)
    assert answer.code == 0, answer.err
    assert "24 stages: 4 to run, 20 cached" in answer.out.splitlines()[0]
    assert results(out) == results(tiny_run.out), "as if it had never been disturbed"
    same_scores(out, tiny_run.out)
    same_rows(out, tiny_run.out)
    assert table(answer.out) == table(tiny_run.answer.out)


def test_processes_in_parallel_give_the_same_results(
    tiny_run: Any, copy: Callable[..., Path], sweep_process: Run
) -> None:
    out = copy(("lowlevel", "clusters=8"), ("score", "clusters=32"))
    answer = sweep_process(*tiny_run.arguments, "--out", out, "--launcher", "local", "--parallel", "2")
    assert answer.code == 0, answer.err
    assert "24 stages: 2 to run, 22 cached" in answer.out.splitlines()[0]
    assert results(out) == results(tiny_run.out)
    same_scores(out, tiny_run.out)
    assert table(answer.out) == table(tiny_run.answer.out)


# --- a tree of one's own ----------------------------------------------------------------------------------------------


def test_a_tree_made_beforehand_is_read(
    tiny_run: Any, sweep_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmark import sweeps
    from benchmark.cli import main_guard
    from benchmark.data.__main__ import main as data_main

    tree = tmp_path / "tree"
    sizes = ["--subjects", "3", "--seed", "5", "--shared", "5", "--unique", "12", "--voxels", "70", "--external", "4"]
    monkeypatch.setattr("sys.argv", ["benchmark.data", "simulate", str(tree), *sizes])
    assert main_guard(data_main) == 0
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "one.yaml").write_text(
        "title: One\nquestion: Does it run?\nanswers: nothing\n"
        "axis: {name: clusters, setting: clustering.n_clusters, values: [6], quick: [6], main: 6}\n"
    )
    monkeypatch.setattr(sweeps, "FOLDER", tmp_path / "sweeps")
    arguments = ["one", *tiny_run.arguments[1:], "--set=generation.subjects=[3]", "--set=generation.test_images=null"]
    answer = sweep_here(*arguments, "--data", tree, "--out", tmp_path / "runs")
    assert answer.code == 0, answer.err
    assert "1 variants, 11 stages: 11 to run" in answer.out
    rows = json.loads((tmp_path / "runs" / "leaderboard" / "leaderboard.json").read_text())["rows"]
    row = next(row for row in rows if row["kind"] == "method")
    assert (row["variant"], row["subjects"], row["n_images"]) == ("clusters=6", [3], 5)
    assert "simulation" not in row["manifest"]["seeds"] and len(row["manifest"]["data"]["nsd"]) == 64
    assert not (tmp_path / "runs" / "store" / "simulate").exists()

    again = sweep_here(*arguments, "--data", tree, "--out", tmp_path / "runs", "--dry-run")
    assert "0 to run, 11 cached" in again.out
    moved = tree.rename(tmp_path / "elsewhere")
    again = sweep_here(*arguments, "--data", moved, "--out", tmp_path / "runs", "--dry-run")
    assert "0 to run, 11 cached" in again.out, "what counts is what is in it, not where it lies"
