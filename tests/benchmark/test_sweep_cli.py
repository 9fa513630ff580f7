"""The command line of a sweep: what it answers, and what it leaves alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from benchmark.data import paths
from benchmark.sweeps import sweep_names

pytestmark = pytest.mark.timeout(900)  # the first test that needs the small sweep waits for it
Run = Callable[..., Any]


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything under a folder: size and time of the last change."""
    stats = {str(p.relative_to(folder)): p.lstat() for p in folder.rglob("*") if p.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


# --- help and slips ---------------------------------------------------------------------------------------------------


def test_help_and_list_answer_without_deep_learning(sweep_process: Run) -> None:
    for argument, words in (
        ("--help", ["usage: python -m benchmark.sweep", "--dry-run", "--data DIR", "examples:", "exit codes: 0 fine"]),
        ("list", ["clusters ", "clustering.n_clusters: 8, 16, 32, 64, 128, 256, 512", "answers Table T3"]),
    ):
        answer = sweep_process(argument)
        assert (answer.code, answer.err) == (0, "")
        assert all(word in answer.out for word in words), answer.out
    code = (
        "import sys; sys.argv[1:] = ['list']; from benchmark.sweep import main; main(); "
        "assert not {'torch', 'pandas', 'sklearn', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[2])


def test_a_reader_that_stops_early_is_no_failure() -> None:
    shell = f"{sys.executable} -m benchmark.sweep --help | head -1"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == 1


SLIPS = [
    (["clutsers"], "unknown sweep 'clutsers' (did you mean 'clusters'?)"),
    (["lst"], "unknown sweep 'lst' (did you mean 'list'?)"),
    (["zzz"], f"unknown sweep 'zzz'; choose from {', '.join(sweep_names())}"),
    (["clusters", "--ot", "x"], "unknown option '--ot' (did you mean '--out'?)"),
    (["clusters", "--dryrun"], "unknown option '--dryrun' (did you mean '--dry-run'?)"),
    (["clusters", "--preset", "dmo"], "unknown --preset 'dmo' (did you mean 'demo'?)"),
    (["clusters", "--mode", "readonly"], "unknown --mode 'readonly' (did you mean 'read-only'?)"),
    (["clusters", "--launcher", "slrum"], "unknown --launcher 'slrum' (did you mean 'slurm'?)"),
    ([], "the following arguments are required: NAME; see python -m benchmark.sweep --help"),
    (["clusters", "extra"], "unexpected argument 'extra'; see python -m benchmark.sweep --help"),
    (["clusters", "--seed", "one"], "argument --seed: expected whole numbers from 0, each once, e.g. 0,1,2, not 'one'; see python -m benchmark.sweep --help"),
    (["clusters", "--seed", "-1"], "argument --seed: expected whole numbers from 0, each once, e.g. 0,1,2, not '-1'; see python -m benchmark.sweep --help"),
    (["clusters", "--seed", "0,1,0"], "argument --seed: expected whole numbers from 0, each once, e.g. 0,1,2, not '0,1,0'; see python -m benchmark.sweep --help"),
    (["seeds", "--seed", "0,1"], "--set seed: sweep seeds varies seed itself; leave it out"),
    (["clusters", "--threads", "0"], "--threads 0: expected 1 or more"),
    (["clusters", "--only", "128,100"], "--only 100: sweep clusters has 8, 16, 32, 64, 128, 256, 512"),
    (["clusters", "--parallel", "0", "--launcher", "local"], "parallel is 0, expected 1 or more"),
    (["clusters", "--set", "lowlevel.dim"], "--set lowlevel.dim: expected KEY=VALUE, e.g. --set lowlevel.dim=64"),
    (["clusters", "--set", "lowlevel.dmi=3"], "unknown setting 'lowlevel.dmi' (did you mean 'dim'?)"),
    (["clusters", "--set", "lowlevel.dim=wide"], "setting lowlevel.dim: Input should be a valid integer, unable to parse string as an integer (given 'wide')"),
    (["clusters", "--set", "lowlevel.dim=[1"], "--set lowlevel.dim=[1: the value is not YAML"),
    (["clusters", "--set", "clustering.n_clusters=5"], "--set clustering.n_clusters: sweep clusters varies clustering.n_clusters itself; leave it out"),
    (["clusters", "--set", "clustering={}"], "--set clustering: sweep clusters varies clustering.n_clusters itself; leave it out"),
    (["clusters", "--set", "networks.lowlevel=vgg"], "networks.lowlevel is 'vgg', which this release cannot load; it has lite0, lite2, augnet, alexnet, efficientnet_b1, efficientnet_b1_v1, swav_resnet50, inception_v3, clip_vit_l14, dinov2-vitl14-reg4, vgg16-bn, openclip-bigg14, sdxl-unclip, zavychromaxl-v3, demo"),
    (["clusters", "--preset", "paper", "--quick"], "--quick is for the demo preset; leave out one of --quick and --preset paper"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), SLIPS, ids=[" ".join(a) or "nothing" for a, _ in SLIPS])
def test_a_slip_is_answered_in_one_line(sweep_here: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    out = [] if "--ot" in arguments else ["--out", tmp_path / "runs"]
    answer = sweep_here(*arguments, *out)
    assert (answer.code, answer.err) == (2, f"error: {message}\n")
    assert not any(tmp_path.iterdir())


def test_a_slip_from_the_shell(sweep_process: Run, tmp_path: Path) -> None:
    answer = sweep_process("clutsers", "--out", tmp_path / "runs")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == "error: unknown sweep 'clutsers' (did you mean 'clusters'?)\n"


def test_subjects_that_are_not_there_are_missed_before_anything_runs(sweep_here: Run, tmp_path: Path) -> None:
    answer = sweep_here("clusters", "--set", "data.simulation.subjects=1", "--out", tmp_path / "runs")
    assert answer.code == 2 and answer.out == "" and not any(tmp_path.iterdir())
    assert answer.error.splitlines() == [
        "error: generation.subjects names subject 2; the simulation has subjects 1",
        "type --set generation.subjects=[1] or --set data.simulation.subjects=2",
    ]


def test_a_gpu_that_is_not_there_is_missed_before_anything_runs(
    sweep_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    answer = sweep_here("clusters", "--device", "cuda", "--out", tmp_path / "runs")
    assert answer.code == 2 and not any(tmp_path.iterdir())
    assert answer.error == "error: --device cuda: PyTorch finds no GPU here; leave the option out to run on the CPU"


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_every_stage_and_writes_nothing(sweep_here: Run, tmp_path: Path) -> None:
    answer = sweep_here("clusters", "--dry-run", "--out", tmp_path / "runs")
    first, *lines = answer.out.splitlines()
    assert (answer.code, answer.err) == (0, "") and not any(tmp_path.iterdir())
    assert first == f"sweep clusters (demo): 7 variants, 48 stages: 48 to run, 0 cached; results go to {tmp_path}/runs/"
    assert len(lines) == 48 and all(line.split()[0] == "run" and line.endswith("no result yet") for line in lines)
    assert sum("[clusters=512]" in line for line in lines) == 6
    assert [line.split()[1] for line in lines[:4]] == ["simulate", "prepare", "targets", "encoder"]


def test_several_seeds_share_what_no_seed_touches(sweep_here: Run, tmp_path: Path) -> None:
    answer = sweep_here("clusters", "--seed", "0,1", "--only", "64,128", "--dry-run", "--out", tmp_path / "runs")
    first, *lines = answer.out.splitlines()
    # Simulate, prepare, targets once; encoder and external a seed; six stages a training; references of the main one.
    assert first.startswith(f"sweep clusters (demo): 2 variants x 2 seeds, {3 + 2 * 2 + 2 * 2 * 6 + 2} stages")
    for stage, count in {"prepare": 1, "targets": 1, "encoder": 2, "lowlevel": 4, "score": 4, "references": 2}.items():
        assert sum(line.split()[1] == stage for line in lines) == count
    assert sum("[clusters=64 (seed 1)]" in line for line in lines) == 6


def test_a_dry_run_says_what_is_cached_and_what_changed(sweep_here: Run, tiny_run: Any) -> None:
    before = files(tiny_run.out / "store")
    same = sweep_here(*tiny_run.arguments, "--out", tiny_run.out, "--dry-run")
    assert same.code == 0 and "24 stages: 0 to run, 24 cached" in same.out
    elsewhere = ["--threads=2", "--tracker=none", "--launcher=local", "--parallel=2", "--device=cpu", "--no-progress"]
    other = sweep_here(*tiny_run.arguments, *elsewhere, "--out", tiny_run.out, "--dry-run")
    assert other.out == same.out, "how it runs changes no result"

    changed = sweep_here(*tiny_run.arguments, "--set", "generation.guidance=3.25", "--out", tiny_run.out, "--dry-run")
    lines = [line.split(maxsplit=2) for line in changed.out.splitlines()[1:]]
    runs = [line for line in lines if line[0] == "run"]
    assert {line[1] for line in runs} == {"reconstruct", "score", "references"} and len(runs) == 3 + 3 + 1
    reasons = {line[1]: line[2] for line in runs}
    assert "config changed: generation.guidance" in reasons["reconstruct"]
    assert "upstream re-runs: reconstruct" in reasons["score"]
    assert files(tiny_run.out / "store") == before


def test_forced_stages_are_said_to_run(sweep_here: Run, tiny_run: Any) -> None:
    answer = sweep_here(*tiny_run.arguments, "--out", tiny_run.out, "--dry-run", "--mode", "force")
    assert "24 to run, 0 cached" in answer.out and answer.out.count("forced") == 24


def test_read_only_computes_nothing(sweep_here: Run, tiny_run: Any, tmp_path: Path) -> None:
    answer = sweep_here("clusters", "--mode", "read-only", "--out", tmp_path / "runs")
    assert answer.code == 2 and not any(tmp_path.iterdir())
    assert answer.error == (
        f"error: 48 of 48 results are missing in {tmp_path}/runs (first: simulate); "
        "leave out --mode read-only to compute them"
    )


def test_retry_of_nothing_says_so(sweep_here: Run, tmp_path: Path) -> None:
    answer = sweep_here("clusters", "--mode", "retry", "--out", tmp_path / "runs")
    assert answer.code == 0 and not any(tmp_path.iterdir())
    assert "nothing to run: simulate: no result yet; never tried" in answer.out


def test_settings_of_the_user_win_over_those_of_the_sweep(
    sweep_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmark import sweeps

    (tmp_path / "wide.yaml").write_text(
        "title: T\nquestion: Q\nanswers: A\nbase: {generation.guidance: 7.0}\n"
        "axis: {name: n, setting: clustering.n_clusters, values: [8], quick: [8], main: 8}\n"
    )
    monkeypatch.setattr(sweeps, "FOLDER", tmp_path)
    from argparse import Namespace

    from benchmark.running import resolve_variants

    def guidance(*pairs: str) -> float:
        args = Namespace(quick=True, preset="demo", seed=[4], set=list(pairs))
        (variant,) = resolve_variants(sweeps.load_sweep("wide"), args).values()
        assert variant.seed == 4 and variant.clustering.n_clusters == 8 and variant.generation.test_images == 12
        return variant.generation.guidance

    assert guidance() == 7.0
    assert guidance("generation.guidance=3.5") == 3.5


# --- damaged data -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tiny_run: Any, tmp_path: Path) -> Path:
    """A copy of the simulated tree, to break."""
    return Path(shutil.copytree(tiny_run.folder("simulate") / "nsd", tmp_path / "nsd"))


BETAS = paths.betas(2, "rh", 3)


def _nan(tree: Path) -> None:
    mask = np.load(tree / paths.mask(2, "rh"))
    with (tree / BETAS).open("r+b") as file:
        file.seek(284 + 4 * int(np.flatnonzero(mask)[5]))
        file.write(np.array([np.nan], ">f4").tobytes())


def _truncate(tree: Path) -> None:
    data = (tree / BETAS).read_bytes()
    (tree / BETAS).write_bytes(data[: len(data) // 2])


def _no_brick(tree: Path) -> None:
    with h5py.File(tree / paths.STIMULI, "w") as file:
        file["images"] = np.zeros(3)


def _wrong_shape(tree: Path) -> None:
    with h5py.File(tree / paths.STIMULI, "w") as file:
        file["imgBrick"] = np.zeros((40, 64, 64), np.uint8)


def _half_written(tree: Path) -> None:
    (tree / BETAS).unlink()


DAMAGES = {
    "NaN beta": (_nan, BETAS, "is nan (1 such values); expected finite values inside the mask"),
    "truncated mgh": (_truncate, BETAS, "truncated ("),
    "no imgBrick": (
        _no_brick,
        paths.STIMULI,
        "no imgBrick (holds images); expected imgBrick, n x side x side x 3 uint8",
    ),
    "wrong shape": (_wrong_shape, paths.STIMULI, "imgBrick is uint8 (40, 64, 64); expected uint8 (n, side, side, 3)"),
    "session missing": (_half_written, BETAS, "missing; expected betas of session 3 of"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_data_is_named_and_nothing_half_written_stays(
    sweep_here: Run, tiny_run: Any, tree: Path, tmp_path: Path, damage: str
) -> None:
    harm, file, words = DAMAGES[damage]
    harm(tree)
    answer = sweep_here(*tiny_run.arguments, "--data", tree, "--out", tmp_path / "runs")
    lines = answer.error.splitlines()
    assert answer.code == 2 and "Traceback" not in answer.err
    assert lines[0].startswith(f"error: {tree / file}: ") and words in lines[0]
    assert len(lines) == 2 and lines[1] == f"make the tree anew: rm -r {tree}; python -m benchmark.data simulate {tree}"
    left = {path.suffix or path.name for path in tmp_path.glob("runs/store/prepare/**/*") if path.is_file()}
    assert left <= {".json", ".yaml", ".jsonl"}, "what tells about the attempt, and no data"
    assert not list(tmp_path.glob("runs/**/DONE")) and not (tmp_path / "runs" / "leaderboard").exists()


def test_a_missing_folder_is_named(sweep_here: Run, tmp_path: Path) -> None:
    answer = sweep_here("clusters", "--data", tmp_path / "nothing", "--out", tmp_path / "runs")
    assert answer.code == 2 and not any(tmp_path.iterdir())
    assert answer.error == (
        f"error: {tmp_path}/nothing: no such data folder; "
        f"make a miniature one: python -m benchmark.data simulate {tmp_path}/nothing"
    )


def test_subjects_that_the_data_lack_are_missed_before_anything_runs(
    sweep_here: Run, tiny_run: Any, tree: Path, tmp_path: Path
) -> None:
    answer = sweep_here(
        *tiny_run.arguments, "--set", "generation.subjects=[1, 4]", "--data", tree, "--out", tmp_path / "runs"
    )
    assert answer.code == 2 and not (tmp_path / "runs").exists()
    assert answer.error.splitlines() == [
        f"error: generation.subjects names subject 4; {tree} has subjects 1, 2",
        "type --set generation.subjects=[1,2]",
    ]


def test_an_output_folder_that_cannot_be_written_is_named(sweep_here: Run, tiny_run: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    answer = sweep_here(*tiny_run.arguments, "--out", tmp_path / "file")
    assert answer.code == 2 and len(answer.error.splitlines()) == 1
    assert answer.error.startswith(f"error: cannot write to {tmp_path}/file/store: Not a directory")
