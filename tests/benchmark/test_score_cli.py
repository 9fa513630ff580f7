"""``python -m benchmark.score``: what it prints and writes, what it refuses, and that it refuses before it begins."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.numpy import save_file

from benchmark.cli import main_guard
from benchmark.imagesets import read_images
from benchmark.networks import scoring_backbones
from benchmark.progress import Progress
from benchmark.score import Distractors, score_images
from benchmark.score.__main__ import main
from benchmark.score.options import EXAMPLES, Job, parser
from benchmark.score.steps import PIXEL_KEYS, Steps, passes
from leaderboard.statistics import COLUMNS, summarise
from metrics.cards import KEYS
from metrics.evaluate import evaluate
from metrics.protocols import PROTOCOLS

ROOT = Path(__file__).parents[2]
PIXELS = ",".join(PIXEL_KEYS)
N = 24
QUICK = ("--protocol", "demo", "--metrics", PIXELS, "--no-calibration", "--no-progress", "--out", "-")


def picture(k: int, size: int = 64) -> np.ndarray:
    """A smooth scene of its own for every k, uint8."""
    generator = np.random.default_rng(k)
    low = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(low.resize((size, size), Image.Resampling.BICUBIC))


def worse(image: np.ndarray, k: int) -> np.ndarray:
    """A reconstruction: the scene under noise."""
    noise = np.random.default_rng(1000 + k).normal(0, 25, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)


def write_folder(folder: Path, images: list[np.ndarray], name: Callable[[int], str] = "nsd{:05d}.png".format) -> Path:
    folder.mkdir(parents=True)
    for k, image in enumerate(images):
        Image.fromarray(image).save(folder / name(k))
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two folders of 24 pictures."""
    return _sets(tmp_path_factory.mktemp("sets"), N)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two folders of 6 pictures."""
    return _sets(tmp_path_factory.mktemp("few"), 6)


def _sets(base: Path, n: int) -> SimpleNamespace:
    truths = [picture(k) for k in range(n)]
    recons = [worse(image, k) for k, image in enumerate(truths)]
    folders = [write_folder(base / name, images) for name, images in (("recons", recons), ("truth", truths))]
    return SimpleNamespace(recons=folders[0], truth=folders[1], arrays=(recons, truths))


class Colours:
    """A network of 768 made-up features, in 8 x 8 places."""

    def __init__(self, name: str = "colours") -> None:
        self.name, self.digest = name, f"digest of {name}"

    def features(self, images: torch.Tensor, layers: Any) -> dict[str, torch.Tensor]:
        small = torch.nn.functional.adaptive_avg_pool2d(images, 16)
        return {layer: small.reshape(len(images), 12, 8, 8) for layer in layers}


@pytest.fixture
def quick_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judges that cost nothing."""
    made = {name: Colours(name) for name in ("augnet", "lite2")}
    monkeypatch.setattr("benchmark.networks.scoring_backbones", lambda names, **_: {name: made[name] for name in names})


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Run the command in this process."""

    def call(*arguments: object) -> SimpleNamespace:
        capsys.readouterr()
        try:
            code = main_guard(lambda: main([str(a) for a in arguments]))
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


def process(*arguments: object, cwd: Path = ROOT, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "benchmark.score", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        text=True,
        capture_output=True,
        timeout=280,
        **options,
    )


@pytest.fixture(scope="module")
def demo(sets: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The demo's networks on the 24 pictures, from the shell."""
    folder = tmp_path_factory.mktemp("demo")
    answer = process(
        "--recons", sets.recons, "--truth", sets.truth, "--backbones", "demo", "--n-way", "2,5",
        "--out", "scores.json", "--per-image", "scores.parquet", "--method", "mine", "--threads", "1", cwd=folder,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    return SimpleNamespace(
        answer=answer,
        folder=folder,
        json=json.loads((folder / "scores.json").read_text()),
        table=pq.read_table(folder / "scores.parquet"),
    )


# --- what it answers --------------------------------------------------------------------------------------------------


def test_help_answers_without_what_scoring_needs() -> None:
    code = (
        "import sys, time; started = time.process_time(); from benchmark.score.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'pandas', 'pyarrow', 'scipy', 'PIL', 'skimage', 'h5py', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert time.process_time() - started < 0.5"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for word in ("--recons PATH", "--truth PATH", "--protocol NAME", "mindeye2-unblended", "exit codes: 0 fine"):
        assert word in done.stdout


def test_scores_json_is_what_the_contract_says(demo: SimpleNamespace) -> None:
    data = demo.json
    assert list(data)[:3] == ["protocol", "protocol_hash", "n_images"]
    assert {"protocol", "protocol_hash", "n_images", "metrics", "manifest"} <= set(data)
    assert set(data) - {"protocol", "protocol_hash", "n_images", "metrics", "manifest"} == {
        "track", "calibration", "notes", "candidates", "n_way", "judges",
    }  # fmt: skip
    assert (data["protocol"], data["n_images"], data["track"], data["candidates"]) == ("demo", N, "demo", N)
    assert len(data["protocol_hash"]) == 64
    assert tuple(data["metrics"]) == KEYS
    assert data["judges"] == {key: PROTOCOLS["demo"].describe(key) for key in PROTOCOLS["demo"].slots}
    for block in (data["metrics"], *data["calibration"].values(), *data["n_way"].values()):
        for value in block.values():
            assert set(value) == {"mean", "ci_low", "ci_high"}
            assert value["ci_low"] <= value["ci_high"]
    assert list(data["calibration"]) == ["mean image", "shuffled", "truth"] or set(data["calibration"]) == {
        "shuffled", "mean image", "truth",
    }  # fmt: skip
    manifest = data["manifest"]
    assert manifest["command"].startswith("python -m benchmark.score --recons ")
    assert set(manifest["data"]) == {"reconstructions", "truths"} and set(manifest["weights"]) == {"lite2", "augnet"}
    assert manifest["packages"]["torch"] and manifest["seeds"] == {"intervals and shuffling": 0}


def test_scores_are_those_of_the_metrics(demo: SimpleNamespace, sets: SimpleNamespace) -> None:
    recons, truths = (np.stack(images) for images in sets.arrays)
    protocol = PROTOCOLS["demo"]
    found = evaluate(recons, truths, protocol, scoring_backbones("demo", kind="demo"), range(N), batch=7, threads=1)
    for key, mean in found.means.items():
        assert demo.json["metrics"][key]["mean"] == pytest.approx(mean, abs=1e-5)
    assert demo.json["n_way"]["2"]["CLIP"]["mean"] == pytest.approx(found.means["CLIP"], abs=1e-9)
    assert demo.json["n_way"]["5"]["CLIP"]["mean"] == pytest.approx(found.n_way("CLIP", 5).mean(), abs=1e-9)
    assert set(demo.json["n_way"]["5"]) == {"Alex(2)", "Alex(5)", "Incep", "CLIP"}


def test_chance_and_ceiling_enclose_the_scores(demo: SimpleNamespace) -> None:
    rows = demo.json["calibration"]
    for key in ("PixCorr", "SSIM", "SSIM-color", "CLIP-1000"):
        assert rows["shuffled"][key]["mean"] < demo.json["metrics"][key]["mean"] < rows["truth"][key]["mean"] + 1e-9
        assert rows["truth"][key]["mean"] == pytest.approx(1.0)
    for key in ("Eff", "SwAV", "LPIPS"):
        assert rows["truth"][key]["mean"] == pytest.approx(0.0, abs=1e-5)
        assert demo.json["metrics"][key]["mean"] < rows["shuffled"][key]["mean"]


def test_every_image_is_in_the_parquet_file(demo: SimpleNamespace) -> None:
    table = demo.table.to_pandas()
    assert tuple(table.columns) == COLUMNS
    assert set(table["track"]) == {"demo"} and set(table["subject"]) == {1} and set(table["image_id"]) == set(range(N))
    rows = set(zip(table["method"], table["variant"], strict=True))
    assert rows == {("mine", ""), *(("reference", name) for name in ("shuffled", "mean image", "truth"))}
    assert len(table) == 4 * len(KEYS) * N
    own = summarise(demo.table)["mine", ""]
    assert {key: value.model_dump() for key, value in own.items()} == demo.json["metrics"]


def test_the_table_is_for_people(demo: SimpleNamespace) -> None:
    lines = demo.answer.stdout.splitlines()
    assert lines[0] == f"protocol demo ({demo.json['protocol_hash'][:8]}), demo track, {N} images"
    assert lines[2].split()[:3] == ["metric", "value", "95"] and "shuffled" in lines[2] and "truth" in lines[2]
    row = next(line for line in lines if line.startswith("Alex(2) ↑"))
    assert f"{100 * demo.json['metrics']['Alex(2)']['mean']:.1f}%" in row and "stand-in ResNet-50" in row
    assert any(line.startswith("LPIPS ↓") and "not LPIPS" in line for line in lines)
    assert "written: scores.parquet, scores.json" in lines
    assert "\x1b" not in demo.answer.stdout and not any(line != line.rstrip() for line in lines)
    assert sorted(path.name for path in demo.folder.iterdir()) == ["scores.json", "scores.parquet"]


def test_json_goes_to_a_pipe_and_the_table_aside(run: Callable[..., Any], few: SimpleNamespace) -> None:
    answer = run("--recons", few.recons, "--truth", few.truth, "--metrics", "ssim", "--out", "-", "--no-progress")
    data = json.loads(answer.out)
    assert answer.code == 0 and list(data["metrics"]) == ["SSIM"] and "protocol brain-it" in answer.err
    assert set(data["calibration"]) == {"shuffled", "mean image", "truth"}


def test_a_log_tells_the_time_left(monkeypatch: pytest.MonkeyPatch, few: SimpleNamespace, run: Any) -> None:
    monkeypatch.setattr("benchmark.progress.QUIET_S", 0.0)
    monkeypatch.setattr("benchmark.progress.EVERY_S", 0.0)
    answer = run("--recons", few.recons, "--truth", few.truth, "--metrics", PIXELS, "--batch", 2)
    assert "reading images  6/12" in answer.err
    assert re.search(r"^scoring  8 %, about \d+:\d\d left pixels 2/6  \d+:\d\d$", answer.err, re.MULTILINE)
    assert "left pixels 2/6" in answer.err and "scoring  100 % truth: pixels 6/6" in answer.err


@pytest.mark.parametrize("arguments", [(), ("--protocol", "mindeye1", "--metrics", "SSIM,PixCorr")])
def test_metrics_may_be_typed_in_any_case(run: Any, few: SimpleNamespace, arguments: tuple[str, ...]) -> None:
    first = run(
        "--recons", few.recons, "--truth", few.truth, *(arguments or ("--metrics", "pixcorr, ssim")), "--out", "-"
    )
    assert list(json.loads(first.out)["metrics"]) == ["PixCorr", "SSIM"]


# --- images in every format -------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_scores(run: Any, few: SimpleNamespace, tmp_path: Path) -> None:
    recons, truths = (np.stack(images) for images in few.arrays)
    first = torch.from_numpy(recons.astype(np.float32) / 255).permute(0, 3, 1, 2).contiguous()
    np.save(tmp_path / "truth.npy", truths)
    np.save(tmp_path / "recons.npy", recons)
    np.savez(tmp_path / "recons.npz", recons=recons)
    save_file({"recons": recons}, tmp_path / "recons.safetensors")
    torch.save(first, tmp_path / "recons.pt")
    with h5py.File(tmp_path / "recons.h5", "w") as file:
        file["all/recons"] = recons
    answers = {}
    for name in ("recons.npy", "recons.npz", "recons.safetensors", "recons.pt", "recons.h5::all/recons"):
        answer = run("--recons", tmp_path / name, "--truth", tmp_path / "truth.npy", *QUICK)
        assert answer.code == 0, answer.err
        answers[name] = json.loads(answer.out)["metrics"]
    for name, metrics in answers.items():
        for key in PIXEL_KEYS:
            assert metrics[key]["mean"] == pytest.approx(answers["recons.npy"][key]["mean"], abs=1e-6), name
    folder = run("--recons", few.recons, "--truth", few.truth, *QUICK)
    assert json.loads(folder.out)["metrics"] == answers["recons.npy"]


# --- subsets, subjects, protocols -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_networks")
def test_a_subset_comes_out_of_the_same_pass(run: Any, sets: SimpleNamespace, tmp_path: Path) -> None:
    chosen = list(range(3, 15))
    (tmp_path / "first-sessions.txt").write_text("".join(f"nsd{k:05d}\n" for k in chosen))
    common = ("--backbones", "demo", "--metrics", "pixcorr,clip,clip1000", "--no-calibration", "--out", "-")
    both = json.loads(
        run("--recons", sets.recons, "--truth", sets.truth, "--subset", tmp_path / "first-sessions.txt", *common).out
    )
    recons, truths = sets.arrays
    alone = json.loads(
        run(
            "--recons", write_folder(tmp_path / "r", [recons[k] for k in chosen], lambda k: f"nsd{chosen[k]:05d}.png"),
            "--truth", write_folder(tmp_path / "t", [truths[k] for k in chosen], lambda k: f"nsd{chosen[k]:05d}.png"),
            *common,
        ).out
    )  # fmt: skip
    part = both["subsets"]["first-sessions"]
    assert both["n_images"] == N and part["n_images"] == part["candidates"] == len(chosen)
    assert part["protocol_hash"] == alone["protocol_hash"] != both["protocol_hash"]
    for key, value in alone["metrics"].items():
        assert part["metrics"][key] == pytest.approx(value, abs=1e-6)


@pytest.mark.usefixtures("quick_networks")
def test_subjects_are_scored_by_themselves_and_averaged(run: Any, sets: SimpleNamespace, tmp_path: Path) -> None:
    recons, truths = sets.arrays
    second = [worse(worse(image, k + 50), k + 90) for k, image in enumerate(recons)]
    folder = tmp_path / "recons"
    write_folder(folder / "subj01", recons)
    write_folder(folder / "subj05", second)
    common = ("--metrics", "pixcorr,clip", "--backbones", "demo", "--no-calibration", "--out", "-")
    both = json.loads(run("--recons", folder, "--truth", sets.truth, *common).out)
    assert list(both["subjects"]) == ["1", "5"] and both["n_images"] == N
    one = run("--recons", sets.recons, "--truth", sets.truth, "--subject", 1, *common)
    single = json.loads(one.out)
    assert list(single["subjects"]) == ["1"] and "by subject" not in one.err
    for key in ("PixCorr", "CLIP"):
        assert both["subjects"]["1"]["metrics"][key] == single["metrics"][key]
        means = [both["subjects"][s]["metrics"][key]["mean"] for s in ("1", "5")]
        assert both["metrics"][key]["mean"] == pytest.approx(np.mean(means))
    assert both["protocol_hash"] != single["protocol_hash"]
    printed = run("--recons", folder, "--truth", sets.truth, *QUICK).err
    assert "24 images of each of 2 subjects" in printed and "by subject" in printed


def test_one_image_has_pixel_scores_and_is_not_identified(run: Any, few: SimpleNamespace, tmp_path: Path) -> None:
    recons, truths = (write_folder(tmp_path / n, images[:1]) for n, images in zip("rt", few.arrays, strict=True))
    arguments = ("--recons", recons, "--truth", truths, "--protocol", "demo", "--out", "-", "--no-progress")
    data = json.loads(run(*arguments, "--metrics", "ssim").out)
    value = data["metrics"]["SSIM"]
    assert data["n_images"] == 1 and value["ci_low"] == value["mean"] == value["ci_high"] and "calibration" not in data
    answer = run(*arguments, "--metrics", "ssim,clip")
    assert answer.code == 2 and "one image cannot be identified among others" in answer.err


def test_all_protocols_side_by_side(run: Any, few: SimpleNamespace, tmp_path: Path) -> None:
    out, parquet = tmp_path / "all.json", tmp_path / "all.parquet"
    answer = run(
        "--recons", few.recons, "--truth", few.truth, "--protocol", "all", "--metrics", PIXELS, "--blurry",
        few.recons, "--out", out, "--per-image", parquet,
    )  # fmt: skip
    data = json.loads(out.read_text())["protocols"]
    assert list(data) == [name for name in PROTOCOLS if name != "demo"]
    ssim = [block["metrics"]["SSIM"]["mean"] for block in data.values()]
    last = next(line for line in answer.out.splitlines() if line.startswith("largest - smallest")).split()
    assert last[-2] == f"{max(ssim) - min(ssim):.3f}" and max(ssim) - min(ssim) > 0.05
    assert len({block["protocol_hash"] for block in data.values()}) == len(data)
    # A reconstruction that is blended with itself is itself.
    for key in PIXEL_KEYS:
        assert data["mindeye2"]["metrics"][key] == pytest.approx(data["mindeye2-unblended"]["metrics"][key], abs=1e-6)
    single = run(
        "--recons",
        few.recons,
        "--truth",
        few.truth,
        "--protocol",
        "mindbridge",
        "--metrics",
        PIXELS,
        "--out",
        "-",
        "--no-calibration",
    )
    assert json.loads(single.out)["metrics"] == data["mindbridge"]["metrics"]
    assert set(pq.read_table(parquet)["variant"].to_pylist()) == set(data)


def test_all_protocols_leave_the_blend_out_where_there_is_nothing_to_blend(run: Any, few: SimpleNamespace) -> None:
    answer = run("--recons", few.recons, "--truth", few.truth, "--protocol", "all", "--metrics", "ssim", "--out", "-")
    data = json.loads(answer.out)
    assert "mindeye2" not in data["protocols"] and "mindeye2-unblended" in data["protocols"]
    assert data["notes"] == ["mindeye2 left out: it blends in low-level reconstructions (--blurry PATH)"]
    assert data["notes"][0] in answer.err
    ssim = {name: block["metrics"]["SSIM"]["mean"] for name, block in data["protocols"].items()}
    assert ssim["brain-diffuser"] < ssim["brain-diffuser-skimage017"]


# --- constant images --------------------------------------------------------------------------------------------------


def test_a_constant_image_is_refused_or_noted(run: Any, few: SimpleNamespace, tmp_path: Path) -> None:
    recons = [image.copy() for image in few.arrays[0]]
    recons[5][:] = 17
    folder = write_folder(tmp_path / "recons", recons)
    arguments = ("--recons", folder, "--truth", few.truth, "--metrics", PIXELS, "--no-progress")
    answer = run(*arguments, "--out", tmp_path / "scores.json")
    assert (answer.code, answer.out) == (2, "") and not (tmp_path / "scores.json").exists()
    assert answer.err == (
        f"error: {folder}/nsd00005.png: one flat colour; its correlation with anything is undefined\n"
        "make it again, or leave it out on both sides; to score it as it is: --allow-constant\n"
    )
    allowed = run(*arguments, "--allow-constant", "--out", "-")
    data = json.loads(allowed.out)
    assert data["metrics"]["PixCorr"] == {"mean": None, "ci_low": None, "ci_high": None}
    assert data["metrics"]["SSIM"]["mean"] > 0 and "NaN" not in allowed.out
    assert any("PixCorr: undefined" in note for note in data["notes"])
    assert any("1 constant reconstruction: 5" in note for note in data["notes"])
    assert "PixCorr ↑" in allowed.err and "–" in allowed.err
    demo = run(*arguments, "--allow-constant", "--protocol", "demo", "--out", "-")
    assert json.loads(demo.out)["metrics"]["PixCorr"]["mean"] > 0  # there it counts as zero


# --- what it refuses --------------------------------------------------------------------------------------------------

SLIPS = [
    (["--protocol", "mindey1"], "--protocol mindey1: no such protocol (did you mean 'mindeye1'?)"),
    (["--protocol", "zzzz"], "--protocol zzzz: no such protocol; there are brain-it, mindeye2,"),
    (["--protocol", "mindeye2"], "--protocol mindeye2: blends each reconstruction with a low-level one; name their folder or file with --blurry PATH\nwithout them: --protocol mindeye2-unblended"),
    (["--blurry", "x"], "--protocol brain-it: blends nothing; leave out --blurry (mindeye2 blends)"),
    (["--metrics", "SIM"], "--metrics SIM: no metric 'SIM' (did you mean 'SSIM'?)"),
    (["--metrics", ""], "--metrics : no metric ''; there are PixCorr, SSIM,"),
    (["--metrics", "CLIP", "--backbones", "demo", "--protocol", "mindeye1"], "--protocol mindeye1: its judges are the papers' networks, not stand-ins\nleave out --backbones demo, or --protocol, or ask for what needs no network: --metrics PixCorr,SSIM,SSIM-color"),
    (["--metrics", "CLIP", "--backbones", "paper", "--protocol", "demo"], "--protocol demo: its judges are stand-ins; leave out --backbones paper"),
    (["--backbones", "dmo"], "unknown --backbones 'dmo' (did you mean 'demo'?)"),
    (["--n-way", "1"], "--n-way 1: expected whole numbers from 2, such as 2,50,1000"),
    (["--n-way", "5"], "n-way identification needs a metric that identifies: Alex(2), Alex(5), Incep or CLIP"),
    (["--backbones", "demo", "--metrics", "CLIP", "--n-way", "25"], "25-way identification: there are 24 images; expected a number from 2 to 24"),
    (["--distractors", "pool.npy"], "--distractors: for CLIP-1000 under --protocol brain-it only; leave it out"),
    (["--method", "reference"], "method 'reference' is what the calibration's rows are called; choose another name"),
    (["--batch", "0"], "argument --batch: expected a whole number from 1, not '0'; see python -m benchmark.score --help"),
    (["--device", "gpu"], "--device gpu: expected auto, cpu, cuda, or cuda:N for the N-th GPU"),
    (["--subset", "nowhere.txt"], "nowhere.txt: no such file; expected a list of image ids"),
    (["--subset", "SETS/odd.txt"], "subset odd: 1 of its 2 images are not among the 24 reconstructions (first: 77); expected ids as the reconstructions have them"),
    (["--ids", "SETS/odd.txt"], "no image 77 in"),
    (["--random-weights", "0", "--weights", "w"], "--random-weights draws the weights of the papers' networks; leave out --weights"),
    (["--out", "nowhere/scores.json"], "--out nowhere/scores.json: no folder nowhere; make it: mkdir -p nowhere"),
    (["--out", "SETS"], "a folder; name a file in it"),
    (["--per-image", "/proc/scores.parquet"], "--per-image /proc/scores.parquet: folder /proc cannot be written to"),
    (["--out", "a.json", "--per-image", "a.json"], "--out and --per-image both name a.json; choose two files"),
    (["--out", "SETS/odd.txt", "--ids", "SETS/odd.txt"], "would overwrite what is read; choose another file"),
    (["--cache", "/proc/cache"], "--cache /proc/cache: folder /proc cannot be written to"),
    (["--weihgts", "w"], "unknown option '--weihgts' (did you mean '--weights'?)"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), SLIPS, ids=[" ".join(a) for a, _ in SLIPS])
def test_a_slip_is_answered_in_a_line_or_two(
    run: Any, sets: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "odd.txt").write_text("3\n77\n")
    before = files(tmp_path)
    own = [a.replace("SETS", str(tmp_path / "sets")) for a in arguments]
    metrics = [] if "--metrics" in own else ["--metrics", PIXELS]
    answer = run("--recons", sets.recons, "--truth", sets.truth, *metrics, *own)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: ") and message in answer.err
    assert 1 <= len(answer.err.splitlines()) <= 2
    assert files(tmp_path) == before


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_missing_weights_are_all_named_once_the_images_are_seen_to_be_right(
    run: Any, few: SimpleNamespace, tmp_path: Path
) -> None:
    wrong = run("--recons", "nowhere", "--truth", few.truth, "--weights", tmp_path)
    assert wrong.code == 2 and "nowhere" in wrong.err and "weights" not in wrong.err
    arguments = ("--recons", few.recons, "--truth", few.truth, "--weights", tmp_path, "--no-progress")
    answer = run(*arguments)
    first, second = answer.err.splitlines()
    assert answer.code == 2
    for file in ("alexnet.pth", "efficientnet_b1.pth", "swav_resnet50.pth", "inception_v3.pth", "clip_vit_l14.pt"):
        assert file in first
    assert second.startswith(f"python -m benchmark.networks fetch {tmp_path} --only alexnet,")
    fewer = run(*arguments, "--protocol", "brain-diffuser", "--metrics", "eff,ssim").err
    assert "efficientnet_b1_v1.pth" in fewer and "alexnet" not in fewer


def as_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def huge_png(side: int) -> bytes:
    """A PNG whose header promises side x side pixels, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.witness}",)


def _fewer(folder: Path) -> None:
    (folder / "nsd00023.png").unlink()


def _renamed(folder: Path) -> None:
    (folder / "nsd00003.png").rename(folder / "nsd000033.png")


def _cut(folder: Path) -> None:
    path = folder / "nsd00007.png"
    path.write_bytes(path.read_bytes()[:-200])


def _not_a_png(folder: Path) -> None:
    (folder / "nsd00002.png").write_bytes(b"not an image")


def _other_size(folder: Path) -> None:
    (folder / "nsd00004.png").write_bytes(as_png(picture(4, 32)))


def _grey(folder: Path) -> None:
    (folder / "nsd00006.png").write_bytes(as_png(picture(6)[..., 0]))


def _rgba(folder: Path) -> None:
    (folder / "nsd00006.png").write_bytes(as_png(np.concatenate([picture(6), picture(6)[..., :1]], axis=-1)))


def _constant(folder: Path) -> None:
    (folder / "nsd00006.png").write_bytes(as_png(np.full((64, 64, 3), 9, np.uint8)))


def _huge(folder: Path) -> None:
    (folder / "nsd00006.png").write_bytes(huge_png(10_000))


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


BAD_FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "different counts": (_fewer, "nsd00023"),
    "unpaired stems": (_renamed, "nsd00003"),
    "a cut PNG": (_cut, "nsd00007.png"),
    "no PNG at all": (_not_a_png, "nsd00002.png"),
    "mixed sizes": (_other_size, "nsd00004.png"),
    "a grey image": (_grey, "nsd00006.png"),
    "an RGBA image": (_rgba, "nsd00006.png"),
    "one constant image": (_constant, "nsd00006.png"),
    "10,000 x 10,000 pixels": (_huge, "nsd00006.png"),
    "an empty folder": (_empty, "bad"),
}


def assert_refused(answer: SimpleNamespace | subprocess.CompletedProcess[str], names: str, folder: Path) -> None:
    code = answer.code if isinstance(answer, SimpleNamespace) else answer.returncode
    out, err = (answer.out, answer.err) if isinstance(answer, SimpleNamespace) else (answer.stdout, answer.stderr)
    assert code == 2, err
    assert out == "" and 1 <= len(err.splitlines()) <= 2 and err.startswith("error: ") and names in err, err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("side", ["--recons", "--truth"])
@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_is_refused_by_name(run: Any, sets: SimpleNamespace, tmp_path: Path, name: str, side: str) -> None:
    spoil, names = BAD_FOLDERS[name]
    bad = write_folder(tmp_path / "bad", sets.arrays[0])
    spoil(bad)
    out = tmp_path / "out"
    out.mkdir()
    other = ("--truth", sets.truth) if side == "--recons" else ("--recons", sets.recons)
    arguments = (side, bad, *other, "--backbones", "demo", "--no-progress")
    answer = run(*arguments, "--out", out / "s.json", "--per-image", out / "s.parquet")
    assert_refused(answer, names, out)


def _bad_arrays(folder: Path, witness: Path, recons: np.ndarray) -> Iterator[tuple[str, str, str]]:
    """Yield what is wrong, the file, and what the message names."""
    floats = recons.astype(np.float32) / 255
    nan = floats.copy()
    nan[7, 3, 3, 1] = np.nan
    grey = floats.mean(-1)
    flat = recons.copy()
    flat[9] = 0
    for name, array in {
        "range": recons.astype(np.float32), "signed": floats * 2 - 1, "nan": nan, "counts": recons[:-1], "grey": grey,
        "flat": flat, "wide": recons[:, :, :40], "int64": recons.astype(np.int64), "none": recons[:0],
    }.items():  # fmt: skip
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "object.npy", np.array([Bomb(witness)], dtype=object), allow_pickle=True)
    (folder / "pickled.pt").write_bytes(pickle.dumps(Bomb(witness)))
    torch.save({"images": torch.zeros(2), "code": Bomb(witness)}, folder / "code.pt")
    (folder / "garbage.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(200))
    with h5py.File(folder / "two.h5", "w") as file:
        file["a"], file["b"] = recons, recons
    yield "floats of 0..255", "range.npy", "divide by 255"
    yield "floats of -1..1", "signed.npy", "(x + 1) / 2"
    yield "NaN", "nan.npy", "row 7"
    yield "different counts", "counts.npy", "23 reconstructions"
    yield "grey", "grey.npy", "grey.npy"
    yield "constant", "flat.npy", "row 9"
    yield "not square", "wide.npy", "crop"
    yield "integers", "int64.npy", "int64"
    yield "nothing in it", "none.npy", "none.npy"
    yield "a pickled object", "object.npy", "object.npy"
    yield "a pickle", "pickled.pt", "pickled.pt"
    yield "tensors and code", "code.pt", "code.pt"
    yield "a damaged HDF5 file", "garbage.h5", "garbage.h5"
    yield "an array that is not there", "two.h5::c", "'c'"
    yield "one of two arrays", "two.h5", "say which"
    yield "a file that is not there", "nowhere.npy", "nowhere.npy"


def test_a_bad_array_is_refused_by_row_and_runs_nothing(run: Any, sets: SimpleNamespace, tmp_path: Path) -> None:
    folder, out, witness = tmp_path / "arrays", tmp_path / "out", tmp_path / "witness"
    folder.mkdir()
    out.mkdir()
    recons, truths = (np.stack(images) for images in sets.arrays)
    np.save(folder / "truth.npy", truths)
    for what, file, names in _bad_arrays(folder, witness, recons):
        answer = run(
            "--recons", folder / file, "--truth", folder / "truth.npy", "--backbones", "demo", "--no-progress",
            "--out", out / "s.json",
        )  # fmt: skip
        try:
            assert_refused(answer, names, out)
        except AssertionError as error:
            raise AssertionError(f"{what}: {answer.err}") from error
    assert not witness.exists()


def test_a_bad_folder_from_the_shell(sets: SimpleNamespace, tmp_path: Path) -> None:
    spoil, names = BAD_FOLDERS["unpaired stems"]
    bad = write_folder(tmp_path / "bad", sets.arrays[0])
    spoil(bad)
    out = tmp_path / "out"
    out.mkdir()
    assert_refused(
        process("--recons", bad, "--truth", sets.truth, "--metrics", PIXELS, "--out", out / "s.json"), names, out
    )


def test_a_read_only_folder_is_refused_before_any_work(run: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        root = os.geteuid() == 0
        if root:  # whom no permission stops
            os.seteuid(65534)
        try:
            answer = run("--recons", "x", "--truth", "y", "--metrics", "ssim", "--out", folder / "scores.json")
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o700)
        assert_refused(answer, f"folder {folder} cannot be written to (permission denied)", folder)


def test_a_full_disk_fails_the_run_and_leaves_nothing(
    run: Any, few: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("leaderboard.schema.os.replace", full)
    answer = run("--recons", few.recons, "--truth", few.truth, "--metrics", "ssim", "--out", tmp_path / "s.json")
    assert answer.code == 1 and f"error: {tmp_path}/s.json: cannot be written (no space left on device)" in answer.err
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_nothing(sets: SimpleNamespace, tmp_path: Path) -> None:
    arguments = ["--recons", sets.recons, "--truth", sets.truth, "--backbones", "demo", "--out", "s.json"]
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmark.score", *map(str, arguments)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    assert any("scoring" in line for line in child.stderr), "it ended before it could be killed"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL and list(tmp_path.iterdir()) == []


# --- the library function ---------------------------------------------------------------------------------------------


def test_distractors_enter_scores_and_hash(sets: SimpleNamespace) -> None:
    recons, truths = read_images(sets.recons), read_images(sets.truth, what="truths")
    pool = np.random.default_rng(0).random((1200, 768), dtype=np.float32)

    def scored(distractors: Distractors | None) -> Any:
        return score_images(
            recons, truths, "brain-it", {"clip_vit_l14": Colours()}, keys=["CLIP", "CLIP-1000"],
            distractors=distractors, calibrate=False, threads=1,
        ).overall  # fmt: skip

    among, pooled, other = scored(None), scored(Distractors(pool, "one")), scored(Distractors(pool, "another"))
    assert (among.candidates, pooled.candidates) == (N, 1000)
    assert among.metrics["CLIP"] == pooled.metrics["CLIP"]
    assert len({among.protocol_hash, pooled.protocol_hash, other.protocol_hash}) == 3
    notes = score_images(
        recons, truths, "brain-it", {"clip_vit_l14": Colours()}, keys=["CLIP-1000"], calibrate=False, threads=1
    ).notes
    assert any("no distractors were given" in note for note in notes)


def test_a_pool_of_distractors_is_looked_at_first(run: Any, few: SimpleNamespace, tmp_path: Path) -> None:
    common = ("--recons", few.recons, "--truth", few.truth, "--random-weights", 0, "--metrics", "clip1000")
    for name, array, says in (
        ("narrow", np.zeros((1200, 512), np.float32), "expected M x 768 floats"),
        ("few", np.zeros((998, 768), np.float32), "998 distractors; expected at least 999"),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        answer = run(*common, "--distractors", tmp_path / f"{name}.npy")
        assert answer.code == 2 and says in answer.err and len(answer.err.splitlines()) <= 2
    answer = run(*common, "--distractors", few.truth)
    assert answer.code == 2 and "6 distractors; expected at least 999" in answer.err


def test_distractors_may_be_images_or_their_features(
    run: Any, few: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Colours("clip_vit_l14")
    monkeypatch.setattr("benchmark.networks.scoring_backbones", lambda names, **_: {name: network for name in names})
    pool = np.random.default_rng(0).integers(0, 256, (1005, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "pool.npy", pool)
    # Under brain-it images come at 224 px; what the network makes of these is the mean of every 14 x 14 pixels.
    large = torch.nn.functional.interpolate(
        torch.from_numpy(pool).movedim(-1, 1).float() / 255, (224, 224), mode="bilinear", align_corners=False
    )
    np.save(tmp_path / "features.npy", network.features(large, ["embedding"])["embedding"].flatten(1).numpy())
    common = (
        "--recons", few.recons, "--truth", few.truth, "--random-weights", 0, "--metrics", "clip1000",
        "--no-calibration", "--out", "-",
    )  # fmt: skip
    by_images, again, by_features, among = (
        json.loads(run(*common, *more).out)
        for more in (
            ("--distractors", tmp_path / "pool.npy", "--cache", tmp_path / "cache"),
            ("--distractors", tmp_path / "pool.npy", "--cache", tmp_path / "cache"),
            ("--distractors", tmp_path / "features.npy"),
            (),
        )
    )
    assert by_images["candidates"] == by_features["candidates"] == 1000 and among["candidates"] == 6
    assert by_images["metrics"] == again["metrics"] == by_features["metrics"]
    assert by_images["protocol_hash"] == again["protocol_hash"] != among["protocol_hash"]
    assert set(by_images["manifest"]["data"]) == {"reconstructions", "truths", "distractors"}


@pytest.mark.parametrize("calibrate", [True, False])
@pytest.mark.parametrize("keys", [None, ["SSIM"], ["CLIP", "LPIPS"]])
def test_the_bar_ends_where_it_promised(few: SimpleNamespace, keys: list[str] | None, calibrate: bool) -> None:
    recons, truths = read_images(few.recons), read_images(few.truth)
    protocol = PROTOCOLS["demo"]
    costs = [(cost, 6) for cost in passes(protocol, keys, calibrate)]
    total = sum(cost * n for cost, n in costs)
    told = []
    with Progress(enabled=False).bar("", total=total, share=True) as bar:
        steps = Steps(bar, costs)

        def progress(what: str, done: int, of: int) -> None:
            steps(what, done, of)
            told.append(bar.done)

        score_images(
            recons, truths, protocol, {name: Colours(name) for name in protocol.networks}, keys=keys, calibrate=calibrate, batch=4,
            threads=1, progress=progress,
        )  # fmt: skip
    assert told == sorted(told) and told[-1] == total and told[0] < total


@pytest.mark.usefixtures("quick_networks")
def test_the_cache_of_a_folder_serves_the_next_call(run: Any, few: SimpleNamespace, tmp_path: Path) -> None:
    arguments = (
        "--recons", few.recons, "--truth", few.truth, "--backbones", "demo", "--metrics", "clip,eff",
        "--no-calibration", "--cache", tmp_path / "cache", "--out", "-",
    )  # fmt: skip
    first = run(*arguments)
    kept = files(tmp_path / "cache")
    second = run(*arguments)
    assert kept and files(tmp_path / "cache") == kept
    assert json.loads(first.out)["metrics"] == json.loads(second.out)["metrics"]


def test_a_terminal_gets_colours_and_notes_cannot_paint(few: SimpleNamespace) -> None:
    from benchmark.score.tables import print_result

    result = score_images(
        read_images(few.recons), read_images(few.truth), "mindeye1", {}, keys=["SSIM", "SSIM-color"], calibrate=False
    )
    object.__setattr__(result, "notes", ("a \x1b[31mnote [bold]",))
    four = {number: result.overall.metrics for number in (1, 2, 5, 7)}
    object.__setattr__(result.overall, "by_subject", four)
    console = Console(file=io.StringIO(), force_terminal=True, width=80, highlight=False)
    print_result(result, console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert all(f"subject {number}" in shown for number in four) and "…" not in shown
    assert "\x1b[1m" in shown and "\x1b[31m" not in shown and "note: a \\x1b[31mnote [bold]" in shown
    assert "SSIM-color: not in that publication; computed with its preparation" in shown


@pytest.mark.slow
def test_random_weights_are_a_dry_run_of_the_papers_networks(few: SimpleNamespace, tmp_path: Path) -> None:
    recons, truths = (write_folder(tmp_path / n, images[:4]) for n, images in zip("rt", few.arrays, strict=True))
    answer = process(
        "--recons", recons, "--truth", truths, "--random-weights", 7, "--no-calibration", "--out", tmp_path / "s.json",
        "--per-image", tmp_path / "s.parquet",
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("RANDOM WEIGHTS: a dry run.")
    data = json.loads((tmp_path / "s.json").read_text())
    assert tuple(data["metrics"]) == KEYS and data["track"] == "random"
    assert set(data["manifest"]["weights"].values()) == {"random-7"}
    assert set(pq.read_table(tmp_path / "s.parquet")["track"].to_pylist()) == {"random"}


# --- the documentation ------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "protocols.md").read_text()
COMMANDS = re.findall(r"^ *python -m benchmark\.score (--.+?)(?:   +.*)?$", f"{PAGE}\n{EXAMPLES}", re.MULTILINE)


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_commands_of_help_and_page_are_understood(command: str) -> None:
    assert Job.of(parser().parse_args(shlex.split(command))).protocols


def test_the_page_speaks_of_every_protocol() -> None:
    assert len(COMMANDS) >= 10
    assert [name for name in PROTOCOLS if f"**`{name}`**" not in PAGE] == []


@pytest.mark.slow
def test_the_page_measured_what_it_says(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (script,) = re.findall(r"```python\n(.+?)```", PAGE, re.DOTALL)
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    command = next(command for command in COMMANDS if "--blurry blurry --protocol all" in command)
    scores = json.loads(run(*shlex.split(command), "--out", "-", "--no-progress").out)["protocols"]
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (\.\d+) \| \**(\.\d+)\** \| (\.\d+) \|$", PAGE, re.MULTILINE)
    assert [name for name, *_ in rows] == list(scores)
    for name, *printed in rows:
        found = [scores[name]["metrics"][key]["mean"] for key in PIXEL_KEYS]
        assert found == pytest.approx([float(value) for value in printed], abs=0.0015), name
