"""``python -m leaderboard``: what a person types, and what stands on the terminal and in the files."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leaderboard.__main__ import main
from leaderboard.formats import beside, print_beside
from leaderboard.published import published
from leaderboard.results import read_results, write_result
from leaderboard.schema import Row
from leaderboard.statistics import summarise

Save = Callable[..., list[Row]]


@pytest.fixture
def save(row: Callable[..., Row], table_of: Callable[..., pa.Table]) -> Save:
    """Write rows and their scores as a run does."""

    def write(folder: Path, values: dict[tuple[str, str], dict[str, np.ndarray]], **fields: Any) -> list[Row]:
        table = table_of(values, track=fields.get("track", "demo"))
        rows = []
        for (method, variant), metrics in summarise(table).items():
            kind = "reference" if method == "reference" else "method"
            own = row(variant, {k: v.model_dump() for k, v in metrics.items()}, method=method, kind=kind, **fields)
            write_result(folder / "leaderboard" / "results", own, table)
            rows.append(own)
        return rows

    return write


@pytest.fixture
def run(tmp_path: Path, save: Save) -> Path:
    """A run's folder with three variants, the first clearly best, and a reference row."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.5, (2, 40))
    shifts = {"a": 0.2, "b": 0.0, "c": 0.001}
    values: dict[tuple[str, str], dict[str, np.ndarray]] = {
        ("Brain-IT", name): {"PixCorr": base + shift, "Eff": 0.9 - base - shift} for name, shift in shifts.items()
    }
    values["reference", "shuffled"] = {"PixCorr": base - 0.2, "Eff": 1.0 - base / 10}
    save(tmp_path / "runs", values)
    return tmp_path / "runs"


def call(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[str, str]:
    assert main([str(word) for word in words]) == code
    return capsys.readouterr()


def test_rows_are_ranked_and_the_best_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = call(capsys, "show", run)
    assert "best: a (mean rank 1.0" in out and "shuffled" in out
    assert out.index("\n1") < out.index(" b ")


def test_every_format_has_every_row(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(call(capsys, "show", run, "--format", "json")[0])
    (ranking,) = data["rankings"]
    assert [(row["variant"], row["rank"]) for row in ranking["rows"]] == [
        ("a", 1),
        ("c", 2),
        ("b", 3),
        ("shuffled", None),
    ]
    lines = list(csv.DictReader(io.StringIO(call(capsys, "show", run, "--format", "csv")[0])))
    assert [line["id"] for line in lines] == [row["id"] for row in ranking["rows"]]
    assert float(lines[0]["PixCorr"]) == ranking["rows"][0]["metrics"]["PixCorr"]["mean"]
    assert lines[0]["SSIM"] == "" and lines[3]["kind"] == "reference"
    latex, markdown = (call(capsys, "show", run, "--format", kind)[0] for kind in ("latex", "markdown"))
    assert r"\toprule" in latex and r"PixCorr $\uparrow$" in latex and latex.count(r"\\") == 5
    assert latex.count(r"\textbf{") == 2, "the best of each of two columns"
    intervals = [f"{low}--{high}" for low, high in re.findall(r"\[([^]–]+)–([^]]+)\]", markdown)]
    assert re.findall(r"\\tiny ([^}]+)\}", latex) == intervals
    assert "| 1 (1–1) | a |" in markdown


def test_published_rows_stand_by_protocol_with_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = call(capsys, "show", "--published", "--protocol", "brain-it", "--data", "1h")
    assert "as printed, under protocol brain-it" in out and "33.1" not in out and "0.331" in out
    assert "[1] Brain-IT (arXiv 2510.25976" in out
    data = json.loads(call(capsys, "show", "--published", "--format", "json")[0])
    assert len(data["published"]) + 14 == 121, "but for the 14 rows of metrics that no protocol here has"
    unread = next(row for row in data["published"] if row["id"] == "brainit_T7_s1_15min")
    assert unread["metrics"] == {}
    conflicting = call(capsys, "show", "--published")[0]
    assert "! dream_a: NeuroVLA" in conflicting and "unknown" not in conflicting.split("\n")[0]
    for kind in ("markdown", "latex", "csv"):
        assert "2510.25976" in call(capsys, "show", "--published", "--format", kind)[0]


def test_latex_escapes_what_it_must(tmp_path: Path, save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, {("Brain-IT", "50%_of & {all}"): {"PixCorr": np.full((1, 5), 0.5) + np.arange(5) / 100}})
    assert r"50\%\_of \& \{all\}" in call(capsys, "show", tmp_path, "--format", "latex")[0]


def test_other_protocols_are_never_ranked_together(
    run: Path, tmp_path: Path, save: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {("Brain-IT", "z"): {"PixCorr": np.full((2, 40), 0.9) + np.arange(40) / 1000}}
    save(tmp_path / "other", other, protocol_hash="f" * 16)
    data = json.loads(call(capsys, "show", run, tmp_path / "other", "--format", "json")[0])
    assert [len(ranking["rows"]) for ranking in data["rankings"]] == [4, 1]
    call(capsys, "build", run, tmp_path / "other", "--out", tmp_path / "board")
    index = (tmp_path / "board" / "index.html").read_text()
    tables = index.split("<tbody data-ranked>")[1:]
    ranked = [set(re.findall(r'data-value="([a-z])"', table.split("</tbody>")[0])) for table in tables]
    assert ranked == [{"a", "b", "c"}, {"z"}], "a table of its own for each"
    assert index.count('data-protocol="demo"') == 2
    out, err = call(capsys, "compare", "a", "z", "--in", run, "--in", tmp_path / "other", code=2)
    assert "scored differently" in err and not out


def test_build_makes_one_page_that_can_be_built_from_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = call(capsys, "build", run, "--out", tmp_path / "board", "--title", "Ours <all>")
    assert out.startswith(f"{tmp_path / 'board' / 'index.html'}: 4 rows of the demo track")
    assert "<h1>Ours &lt;all&gt;</h1>" in (tmp_path / "board" / "index.html").read_text()
    again = json.loads(call(capsys, "show", tmp_path / "board", "--format", "json")[0])
    assert again == json.loads(call(capsys, "show", run, "--format", "json")[0])


def test_two_rows_are_compared_image_by_image(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = call(capsys, "compare", "a", "b", "--in", run)
    line = next(line for line in out.splitlines() if line.startswith("PixCorr"))
    assert "+0.200" in line and line.rstrip().endswith("a")
    data = json.loads(call(capsys, "compare", "c", "b", "--in", run, "--format", "json")[0])
    assert data["metrics"]["PixCorr"]["difference"] == pytest.approx(0.001)
    _, err = call(capsys, "compare", "a", "bb", "--in", run, code=2)
    assert "no row 'bb'" in err and err.count("\n") == 1


@pytest.fixture
def elsewhere(tmp_path: Path, table_of: Callable[..., pa.Table]) -> Callable[..., tuple[Path, Path]]:
    """What benchmark.score wrote somewhere else: scores.json and its Parquet file."""
    return lambda **change: scores_json(tmp_path, table_of, **change)


def scores_json(tmp_path: Path, table_of: Callable[..., pa.Table], **change: Any) -> tuple[Path, Path]:
    rng = np.random.default_rng(1)
    values = rng.uniform(0.2, 0.5, (1, 30))
    table = table_of({("recons", ""): {"PixCorr": values}}, track="paper")
    (intervals,) = summarise(table).values()
    data = {
        "protocol": "brain-it",
        "protocol_hash": "c" * 64,
        "n_images": 30,
        "track": "paper",
        "metrics": {key: value.model_dump() for key, value in intervals.items()},
        "manifest": {"git": {"revision": "abc", "dirty": True}, "hardware": {"cores": 2}},
        "notes": ["few images"],
    } | change
    file, parquet = tmp_path / "scores.json", tmp_path / "scores.parquet"
    file.write_text(json.dumps(data))
    pq.write_table(table, parquet)
    return file, parquet


def test_scores_from_elsewhere_are_kept_and_told_what_they_compare_with(
    tmp_path: Path, elsewhere: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    file, parquet = elsewhere()
    board = tmp_path / "board"
    out, _ = call(capsys, "add", file, "--per-image", parquet, "--to", board, "--method", "Mine", "--variant", "v1")
    assert "comparable image by image with 0 of the 0 rows" in out
    assert "with no published row as it is" in out and "1000 images" in out and "30 images" in out
    (kept,) = read_results(board)
    assert (kept.row.method, kept.row.variant, kept.row.manifest.git) == ("Mine", "v1", "abc+dirty")
    scores = kept.per_image()
    assert scores is not None and set(scores["method"].to_pylist()) == {"Mine"}
    out, _ = call(capsys, "add", file, "--per-image", parquet, "--to", board, "--method", "Other")
    assert "comparable image by image with 1 of the 1 rows" in out
    data = json.loads(call(capsys, "compare", "Other", "v1", "--in", board, "--format", "json")[0])
    assert data["metrics"]["PixCorr"]["difference"] == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"metrics": {"PixCorr": {"mean": 0.9}}}, "they are of different runs"),
        ({"metrics": {"PixCor": {"mean": 0.9}}}, "unknown metric PixCor"),
        ({"metrics": {"PixCorr": {"mean": "x"}}}, "not the scores of python -m benchmark.score"),
        ({"protocol_hash": "?"}, "not the scores of python -m benchmark.score"),
        ({"manifest": 3}, "not the scores of python -m benchmark.score"),
    ],
)
def test_scores_that_are_none_are_refused_in_one_line(
    tmp_path: Path,
    elsewhere: Callable[..., tuple[Path, Path]],
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    told: str,
) -> None:
    file, parquet = elsewhere(**change)
    words = ("add", file, "--per-image", parquet, "--to", tmp_path / "board", "--method", "Mine")
    out, err = call(capsys, *words, code=2)
    assert told in err and err.startswith("error: ") and err.count("\n") <= 2 and not out
    assert not (tmp_path / "board").exists(), "nothing half-added"


def test_calls_that_cannot_be_are_one_line(
    run: Path, tmp_path: Path, elsewhere: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = elsewhere()
    for words, told in (
        (("show", tmp_path / "nowhere"), "no such file or folder"),
        (("show", run, "--track", "paper"), "no rows with --track paper"),
        (("add", file, "--to", tmp_path / "b"), "name the method with --method NAME"),
        (("add", run, "--to", tmp_path / "b", "--method", "x"), "are for a scores.json"),
        (("add", tmp_path / "scores.parquet", "--to", tmp_path / "b"), "not JSON"),
    ):
        _, err = call(capsys, *words, code=2)
        assert told in err and err.count("\n") == 1
    for line, told in (("shwo", "did you mean 'show'"), ("show --format tex", "latex")):
        with pytest.raises(SystemExit) as ended:
            main(line.split())
        assert ended.value.code == 2 and told in capsys.readouterr().err


def test_a_run_is_added_row_by_row(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = call(capsys, "add", run, "--to", tmp_path / "board")
    assert [result.row.variant for result in read_results(tmp_path / "board")] == ["a", "b", "c"]
    assert "with no published row: it is of the demo track" in out


def test_help_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import sys, leaderboard.__main__ as m; m.parser(); print([x for x in ('numpy', 'pyarrow', 'rich') if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_our_rows_stand_beside_printed_ones_of_their_protocol_only(
    row: Callable[..., Row], capsys: pytest.CaptureFixture[str]
) -> None:
    printed = published()["brainit_40h"]
    fields: dict[str, Any] = {"track": "paper", "protocol": "brain-it", "n_images": 1000, "subjects": (1, 2, 5, 7)}
    ours = row("clusters=128", {"PixCorr": {"mean": 0.384, "ci_low": 0.38, "ci_high": 0.39}, "CLIP": 0.97}, **fields)
    assert beside([(ours, printed)])["clusters=128"]["CLIP"] == (ours.metrics["CLIP"], 0.964)
    print_beside([(ours, printed)])
    text = capsys.readouterr().out
    assert "-0.002" in text and "+0.6%" in text and "Ours:" not in text
    print_beside([(ours.model_copy(update={"n_images": 24}), printed)])
    assert "24 images; printed: subjects 1, 2, 5, 7, 1000 images" in capsys.readouterr().out
    for other in ({"track": "demo"}, {"protocol": "mindeye2"}):
        with pytest.raises(ValueError, match="does not compare with brainit_40h"):
            beside([(ours.model_copy(update=other), printed)])
