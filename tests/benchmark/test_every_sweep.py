"""Every sweep of the paper, typed as a user types it, at the smallest size; and the report over all of them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmark.report import __main__ as report
from benchmark.report.answers import read_answers
from benchmark.sweeps import load_sweep, sweep_names

pytestmark = pytest.mark.timeout(900)  # the first test that needs the small sweep waits for it
Run = Callable[..., Any]

TRANSFER = [f"--set=transfer.{part}.epochs=1" for part in ("encoder", "lowlevel", "semantic", "joint")]
TRANSFER += ["--set=clustering.n_clusters=16"]  # one subject is left for the base models, with 80 voxels


@pytest.fixture(scope="module")
def out(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results that begins with those of the small cluster sweep."""
    folder = tmp_path_factory.mktemp("every") / "runs"
    shutil.copytree(tiny_run.out / "store", folder / "store")
    return folder


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """Sweep -> what it printed, of those that ran."""
    return {}


@pytest.mark.parametrize("name", sweep_names())
def test_a_sweep_runs_and_ends_with_its_table(
    name: str, tiny_run: Any, out: Path, sweep_here: Run, answers: dict[str, str]
) -> None:
    settings = [argument for argument in tiny_run.arguments if argument != "clusters"]
    settings += TRANSFER if name == "transfer" else []
    answer = sweep_here(name, *settings, "--tracker=none", "--no-progress", "--out", out)
    assert answer.code == 0, answer.err
    answers[name] = answer.out
    sweep = load_sweep(name)
    ran = {v for v in map(sweep.variant, sweep.axis.quick) if f"{v} is left out" not in answer.out}
    rows = json.loads((out / "leaderboard" / "leaderboard.json").read_text())["rows"]
    assert {row["variant"] for row in rows if row["manifest"]["packages"]} == ran
    for variant in ran:
        assert variant in answer.out
    asked = sweep.published and len(ran & set(sweep.answered())) > 1
    assert ("asked of our images: of " in answer.out) == bool(asked)
    if not asked and len(ran) > 1:
        assert "paired over images:" in answer.out and f"against {sweep.variant(sweep.axis.main)}: " in answer.out


def test_the_report_has_them_all(
    out: Path, answers: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if set(answers) != set(sweep_names()):
        pytest.skip("only some of the sweeps ran")
    monkeypatch.setattr(sys, "argv", ["benchmark.report", "--out", str(out)])
    assert report.main() == 0
    text = (out / "report" / "report.md").read_text()
    html = (out / "report" / "index.html").read_text()
    assert [answer.sweep for answer in read_answers(out)] == sweep_names()
    for name in sweep_names():
        assert f"\n## {load_sweep(name).title}\n" in text and load_sweep(name).title in html
        assert f"(grids/{name}.png)" in text and (out / "report" / "grids" / f"{name}.png").is_file()
    assert "Against clusters" in html and "Against minutes of data" in html, "curves"
    assert "brainit" not in text and ".386" not in text, "no published number stands on the demo track"
