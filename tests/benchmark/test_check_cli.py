"""``python -m benchmark.check``: the four kinds of input, what it writes, what it refuses, and its exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from benchmark.check.__main__ import main
from benchmark.check.output import COMMENT_LIMIT, markdown
from benchmark.cli import main_guard
from benchmark.store import Store
from leaderboard.gate import BLOCKING, Rules, Side, check
from leaderboard.results import PROTOCOLS, write_result
from leaderboard.schema import Row, row_id
from metrics.cards import CARDS

HASH = "0123456789abcdef"
MAIN = "clusters=128"


class Answer:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Run = Callable[..., Answer]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str | Path) -> Answer:
        capsys.readouterr()
        try:
            code = main_guard(lambda: main([str(a) for a in arguments]))
        except SystemExit as error:
            code = int(error.code or 0)
        return Answer(code, *capsys.readouterr())

    return call


def scores(
    variant: str, drop: float = 0.0, noise: float = 0.0, seed: int = 0, n: int = 30, method: str = "m"
) -> pa.Table:
    generator = np.random.default_rng(5)
    base = {key: 0.5 + 0.1 * generator.normal(size=(2, n)) for key in BLOCKING}
    more = np.random.default_rng(seed + 100)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("track", "method", "variant", "subject", "seed", "image_id", "metric", "value")
    }
    for key, cells in base.items():
        sign = -1 if CARDS[key].direction == "higher" else 1
        for (s, i), value in np.ndenumerate(cells + sign * drop + noise * more.normal(size=cells.shape)):
            entry = ("demo", method, variant, s + 1, seed, i, key, float(value))
            for part, item in zip(columns.values(), entry, strict=True):
                part.append(item)
    return pa.table(columns)


def row(variant: str, **other: Any) -> Row:
    values: dict[str, Any] = {
        "method": "m",
        "variant": variant,
        "track": "demo",
        "protocol": "demo",
        "protocol_hash": HASH,
        "subjects": (1, 2),
        "n_images": 30,
        "metrics": {"SSIM": {"mean": 0.5}},
        "source": "store/score/none",
    }
    return Row(**{**values, **other})


@pytest.fixture
def board(tmp_path: Path) -> Path:
    folder = tmp_path / "board"
    write_result(folder / "results", row("old"), scores("old"))
    write_result(folder / "results", row("same"), scores("same", noise=0.02))
    write_result(folder / "results", row("bad"), scores("bad", drop=0.05, noise=0.02))
    write_result(folder / "results", row("unkept"))
    return folder


def parquet(path: Path, table: pa.Table, digest: str | None = HASH) -> Path:
    if digest is not None:
        variant = table["variant"][0].as_py()
        own = {variant: {"protocol": "demo", "protocol_hash": digest}}
        table = table.replace_schema_metadata({PROTOCOLS: json.dumps(own)})
    pq.write_table(table, path)
    return path


# --- exit codes and inputs --------------------------------------------------------------------------------------------


def test_equal_models_pass_and_a_worse_one_fails(run: Run, board: Path) -> None:
    answer = run("--candidate", f"{board}::same", "--baseline", f"{board}::old")
    assert answer.code == 0 and "passed: no regression" in answer.out and not answer.err
    answer = run("--candidate", f"{board}::bad", "--baseline", f"{board}::old")
    assert answer.code == 1 and "FAILED: PixCorr" in answer.out
    assert run("--candidate", f"{board}::bad", "--baseline", f"{board}::old", "--fail", "all:0.2").code == 0
    assert run("--candidate", f"{board}::bad", "--baseline", f"{board}::old", "--fail", "none").code == 0


def test_ids_variants_and_parquet_name_the_same_scores(run: Run, board: Path, tmp_path: Path) -> None:
    new = parquet(tmp_path / "new.parquet", scores("bad", drop=0.05, noise=0.02))
    outs: list[Any] = []
    for candidate in (
        row_id(row("bad")),
        "bad",
        f"{board}::bad",
        new,
        board / "results" / f"{row_id(row('bad'))}.parquet",
    ):
        out = tmp_path / f"out{len(outs)}"
        answer = run("--candidate", candidate, "--baseline", "old", "--leaderboard", board, "--out", out)
        assert answer.code == 1, answer.err
        outs.append(json.loads((out / "check.json").read_text())["findings"])
    assert all(found == outs[0] for found in outs)


def test_several_seeds_a_side(run: Run, tmp_path: Path) -> None:
    sides = {}
    for name, drop in (("old", 0.0), ("new", 0.1)):
        sides[name] = [
            parquet(tmp_path / f"{name}{k}.parquet", scores(name, drop=drop, noise=0.02, seed=k)) for k in range(3)
        ]
    out = tmp_path / "out"
    answer = run("--candidate", *sides["new"], "--baseline", *sides["old"], "--out", out)
    assert answer.code == 1 and "3 and 3 seeds" in answer.out
    assert json.loads((out / "check.json").read_text())["candidate"]["seeds"] == [0, 1, 2]
    again = [parquet(tmp_path / f"c{k}.parquet", scores("c", noise=0.02, seed=0)) for k in range(2)]
    assert run("--candidate", *again, "--baseline", *sides["old"]).code == 0, "equal numbers are numbered anew"
    other = parquet(tmp_path / "other.parquet", scores("old"), "f" * 16)
    answer = run("--candidate", sides["old"][0], other, "--baseline", sides["old"][1])
    assert answer.code == 2 and "different protocols or on different images" in answer.err


def test_a_parquet_that_does_not_say_how_it_was_scored_needs_a_word(run: Run, tmp_path: Path) -> None:
    a, b = (parquet(tmp_path / f"{k}.parquet", scores("x"), None) for k in "ab")
    answer = run("--candidate", a, "--baseline", b)
    assert answer.code == 2 and "--same-protocol" in answer.err and "Traceback" not in answer.err
    answer = run("--candidate", a, "--baseline", b, "--same-protocol")
    assert answer.code == 0 and "caller's word" in answer.out


def test_a_parquet_of_benchmark_score_says_how_it_was_scored(run: Run, tmp_path: Path) -> None:
    from benchmark.score.__main__ import main as score

    generator = np.random.default_rng(0)
    truth = generator.random((8, 32, 32, 3))
    np.save(tmp_path / "truth.npy", (255 * truth).astype(np.uint8))
    for name, noise in (("good", 0.2), ("bad", 0.8)):
        mixed = (1 - noise) * truth + noise * generator.random(truth.shape)
        np.save(tmp_path / f"{name}.npy", (255 * mixed).astype(np.uint8))
        images = ["--recons", str(tmp_path / f"{name}.npy"), "--truth", str(tmp_path / "truth.npy")]
        options = ["--metrics", "PixCorr,SSIM", "--per-image", str(tmp_path / f"{name}.parquet"), "--no-progress"]
        assert score([*images, *options]) == 0
    answer = run("--candidate", tmp_path / "bad.parquet", "--baseline", tmp_path / "good.parquet")
    assert answer.code == 1 and "FAILED: PixCorr, SSIM" in answer.out and "protocol brain-it" in answer.out
    assert run("--candidate", tmp_path / "good.parquet", "--baseline", tmp_path / "bad.parquet").code == 0


def test_different_protocols_and_image_sets_are_refused_with_the_reason(run: Run, tmp_path: Path) -> None:
    a = parquet(tmp_path / "a.parquet", scores("x"))
    answer = run("--candidate", a, "--baseline", parquet(tmp_path / "b.parquet", scores("x"), "f" * 16))
    assert answer.code == 2 and "different protocols: demo 01234567 and ffffffff" in answer.err
    answer = run("--candidate", a, "--baseline", parquet(tmp_path / "c.parquet", scores("x", n=31)))
    assert answer.code == 2 and "different image sets: 2 only in" in answer.err


def test_wrong_calls_are_answered_in_a_line(run: Run, board: Path, tmp_path: Path) -> None:
    a = parquet(tmp_path / "a.parquet", scores("x"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "empty").mkdir()
    both = pa.concat_tables([scores("x"), scores("y")])
    pq.write_table(both, tmp_path / "two.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "columns.parquet")
    (tmp_path / "model.ckpt").write_bytes(b"")
    store = ("--run", tmp_path / "empty")
    for arguments, message in (
        ((), "say one of --candidate"),
        (("--candidate", a), "--baseline is missing"),
        (("--candidate", a, "--baseline", a, "--history"), "say one of"),
        (("--candidate", a, "--baseline", a, "--fail", "PixCor"), "did you mean 'PixCorr'?"),
        (("--candidate", a, "--baseline", a, "--alpha", "2"), "alpha is 2"),
        (("--candidate", a, "--baseline", tmp_path / "no.parquet"), "no such file or folder"),
        (("--candidate", a, "--baseline", "olt", "--leaderboard", board), "did you mean 'old'?"),
        (("--candidate", a, "--baseline", "old", "--leaderboard", tmp_path / "no"), "--leaderboard DIR"),
        (("--candidate", a, "--baseline", board), "holds 4 variants; say which"),
        (("--candidate", a, "--baseline", f"{board}::unkept"), "has no per-image scores beside it"),
        (("--candidate", a, "--baseline", tmp_path / "broken.parquet"), "not a Parquet file"),
        (("--candidate", a, "--baseline", tmp_path / "columns.parquet"), "lack the column"),
        (("--candidate", a, "--baseline", tmp_path / "two.parquet"), "holds 2 rows; say which"),
        (("--candidate", a, "--baseline", f"{tmp_path / 'two.parquet'}::z"), "no row 'z'"),
        (("--candidate", a, "--baseline", tmp_path / "empty"), "holds no results"),
        (("--candidate", a, "--baseline", tmp_path / "model.ckpt", *store), "holds no scored variant"),
        (("--history", tmp_path / "empty"), "no results"),
        (("--calibrate",), "--calibrate needs --out"),
        (("--candidates", a), "unknown option '--candidates' (did you mean '--candidate'?)"),
    ):
        answer = run(*arguments)
        assert answer.code == 2 and message in answer.err, (arguments, answer.err)
        assert answer.err.startswith("error: ") and answer.err.count("\n") <= 2 and not answer.out


def test_help_brings_in_nothing_heavy() -> None:
    code = (
        "import sys; from benchmark.check.__main__ import parser; parser().format_help(); "
        "heavy = {'torch', 'pandas', 'pyarrow', 'numpy', 'scipy', 'PIL'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- what it writes ---------------------------------------------------------------------------------------------------


def test_the_files_agree_with_each_other(run: Run, board: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    answer = run("--candidate", f"{board}::bad", "--baseline", f"{board}::old", "--out", out, "--worst", 3)
    assert answer.code == 1 and {p.name for p in out.iterdir()} == {
        "check.json",
        "junit.xml",
        "comment.md",
        "worse.html",
    }
    data = json.loads((out / "check.json").read_text())
    assert not data["passed"] and data["candidate"]["id"] == row_id(row("bad"))
    failed = {f["metric"] for f in data["findings"] if f["verdict"] == "regressed"}
    suites = ET.parse(out / "junit.xml").getroot()
    cases = {case.get("name"): case.find("failure") is not None for case in suites.iter("testcase")}
    assert {name for name, failure in cases.items() if failure} == failed and suites.get("failures") == str(len(failed))
    comment = (out / "comment.md").read_text()
    assert len(comment) <= COMMENT_LIMIT and comment.startswith("### ❌ FAILED")
    assert comment.count("❌ regressed") == len(failed)
    page = (out / "worse.html").read_text()
    assert page.count('<section class="worse">') == 3 and "https://" not in page
    worst = data["worse"][0]
    assert f"image {worst['image_id']}, subject {worst['subject']}" in page


def test_names_from_outside_are_text_in_every_output(run: Run, tmp_path: Path) -> None:
    name = "<script>|`*\x1b[2J" + "x" * 500
    a, b = (parquet(tmp_path / f"{k}.parquet", scores(name, drop=k)) for k in (0.1, 0.0))
    out = tmp_path / "out"
    answer = run("--candidate", f"{a}::{name}", "--baseline", b, "--out", out)
    assert answer.code == 1 and "\x1b" not in answer.out
    ET.parse(out / "junit.xml")
    assert "<script>" not in (out / "worse.html").read_text() and "<script>" not in (out / "comment.md").read_text()


def test_the_comment_always_fits() -> None:
    def side(drop: float) -> Side:
        return Side("|" * 100_000, scores("x", drop=drop), "demo", HASH)

    found = check(side(0.1), side(0.0), Rules(n_resamples=50, n_permutations=99), notes=["*" * 50_000] * 5)
    assert len(markdown(found)) <= COMMENT_LIMIT


def test_the_same_call_writes_the_same_files(run: Run, board: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run("--candidate", f"{board}::bad", "--baseline", f"{board}::old", "--out", tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


# --- history ----------------------------------------------------------------------------------------------------------


def scored(out: Path, number: int, drop: float, label: str = MAIN) -> None:
    """A finished stage ``score`` as a store has it."""
    folder = out / "store" / "score" / f"{number:016x}"
    folder.mkdir(parents=True)
    pq.write_table(scores("combined", drop=drop, noise=0.01, seed=number, method="Brain-IT"), folder / "scores.parquet")
    (folder / "protocol.json").write_text(json.dumps({"protocol": "demo", "protocol_hash": HASH}))
    record = {"name": "score", "label": label, "fingerprint": f"{number:064x}", "config": {}, "upstream": {}}
    (folder / "config.yaml").write_text(yaml.safe_dump(record))
    finished = f"2026-01-{number + 1:02d}T12:00:00+00:00"
    (folder / "DONE").write_text(json.dumps({"fingerprint": "", "finished": finished, "outputs": {}}))


def test_a_line_is_listed_in_the_order_of_time_with_its_change_points(run: Run, tmp_path: Path) -> None:
    for number in (7, 3, 0, 5, 9, 1, 4, 8, 2, 6):
        scored(tmp_path, number, 0.1 if number >= 6 else 0.0)
    scored(tmp_path, 20, 0.0, "clusters=8")
    answer = run("--history", tmp_path, "--out", tmp_path / "out")
    assert answer.code == 0 and "from checkpoint 7 (2026-01-07T12:00+00:00) worse" in answer.out
    lines = {line["variant"]: line for line in json.loads((tmp_path / "out" / "history.json").read_text())["lines"]}
    line = lines[MAIN]
    times = [entry["finished"] for entry in line["checkpoints"]]
    assert times == sorted(times) and len(times) == 10
    assert [change["checkpoint"] for change in line["change_points"]] == [7]
    assert set(line["checkpoints"][6]["regressed"]) == set(BLOCKING)
    assert len(lines["clusters=8"]["checkpoints"]) == 1
    only = run("--history", "--run", tmp_path, "--variant", "clusters=8")
    assert only.code == 0 and MAIN not in only.out
    assert run("--history", tmp_path, "--variant", "cluster=8").code == 2


def test_checkpoints_of_too_few_images_are_listed_all_the_same(run: Run, tmp_path: Path) -> None:
    for number in range(2):
        scored(tmp_path, number, 0.0)
        file = tmp_path / "store" / "score" / f"{number:016x}" / "scores.parquet"
        pq.write_table(scores("combined", seed=number, n=4, method="Brain-IT"), file)
    answer = run("--history", tmp_path)
    assert answer.code == 0 and "2 checkpoints" in answer.out and "not compared with each other" in answer.out


def test_a_folder_of_results_has_lines_too(run: Run, board: Path) -> None:
    answer = run("--history", board)
    assert answer.code == 0 and "bad: 1 checkpoint" in answer.out and "unkept" not in answer.out


# --- real runs --------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
def test_a_run_folder_names_its_variants_and_shows_its_images(run: Run, tiny_run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rules = ("--alpha", "0.1")  # the small run has four images
    answer = run(
        "--candidate", f"{tiny_run.out}::clusters=8", "--baseline", f"{tiny_run.out}::{MAIN}", *rules, "--out", out
    )
    assert answer.code in (0, 1), answer.err
    page = (out / "worse.html").read_text()
    if json.loads((out / "check.json").read_text())["worse"]:
        assert page.count("data:image/png;base64,") >= 3, "seen, baseline's and candidate's"
    answer = run("--candidate", tiny_run.out, "--baseline", tiny_run.out, "--variant", MAIN, *rules)
    assert answer.code == 0 and "identical" in answer.out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_checkpoint_is_reconstructed_and_scored_first(run: Run, tiny_run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run.out, folder)
    options = ("--run", folder, "--variant", MAIN, "--alpha", "0.1", "--threads", 1, "--no-progress", "--device", "cpu")
    baseline = ("--baseline", f"{folder}::{MAIN}")
    joint = Store(folder / "store").folder(tiny_run.stage("joint"))

    def scores_kept() -> int:
        return len(list((folder / "store" / "score").iterdir()))

    before = scores_kept()
    answer = run("--candidate", joint, *baseline, *options)
    assert answer.code == 0 and "identical" in answer.out and scores_kept() == before, "all of it was there"

    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("bit", "unet"):
        shutil.copyfile(joint / f"{name}.safetensors", copy / f"{name}.safetensors")
    answer = run("--candidate", copy, *baseline, *options)
    assert answer.code == 0 and "identical" in answer.out and scores_kept() == before + 1, answer.err

    weights = load_file(copy / "unet.safetensors")
    generator = np.random.default_rng(0)
    save_file(
        {k: (v + 0.5 * generator.normal(size=v.shape)).astype(v.dtype) for k, v in weights.items()},
        copy / "unet.safetensors",
    )
    answer = run("--candidate", copy / "unet.safetensors", *baseline, *options)
    assert answer.code in (0, 1) and "identical" not in answer.out and scores_kept() == before + 2, answer.err
    assert run("--candidate", copy, *baseline, *options).code == answer.code and scores_kept() == before + 2
    history = run("--history", folder, "--variant", MAIN)
    assert history.out.count("(checked)") == 2

    official = {
        f"{name}.{k}": v for name in ("bit", "unet") for k, v in load_file(joint / f"{name}.safetensors").items()
    }
    about = {"mapping_version": 1, "parts": {"joint": {"prefix": ""}}}
    save_file(official, tmp_path / "converted.safetensors", {"official": json.dumps(about)})
    converted = run("--candidate", tmp_path / "converted.safetensors", *baseline, *options)
    assert converted.code == 0 and "identical" in converted.out and scores_kept() == before + 3, converted.err

    save_file({"proj.weight": np.zeros((2, 2), np.float32)}, copy / "bit.safetensors")
    answer = run("--candidate", copy, *baseline, *options)
    assert answer.code == 2 and f"does not fit variant {MAIN}" in answer.err
    answer = run(
        "--candidate", Store(folder / "store").folder(tiny_run.stage("joint", "clusters=8")), *baseline, *options
    )
    assert answer.code == 2 and "trained on other clusters" in answer.err
    semantic = Store(folder / "store").folder(tiny_run.stage("semantic"))
    answer = run("--candidate", semantic, *baseline, *options)
    assert answer.code == 2 and "is stage semantic" in answer.err
    answer = run("--candidate", copy / "nothing.safetensors", *baseline, *options)
    assert answer.code == 2 and "no such file" in answer.err
