"""``python -m benchmark.perf``: what it measures, what it refuses, and that the sides of every entry agree."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from benchmark.cli import main_guard
from benchmark.perf import __main__ as command
from benchmark.perf import harness, usage
from benchmark.perf.entries import COMMANDS, ENTRIES, Entry, Floor, Goal, Job
from benchmark.perf.machine import Machine
from benchmark.perf.worker import main as work

QUICK = Job(quick=True, device="cpu", threads=1)
MACHINE = Machine("cpu", 1, matmul=1e9, copy=1e9)

TOY = """
import os, time
import numpy as np
from benchmark.perf.entries import Floor, Part

def prepare(job):
    return 3 if job.quick else {size}

def ours(n, job):
    time.sleep({ours_s})
    return {{"squares": np.arange(n) ** 2 + {wrong}, "threads": np.array(int(os.environ["OMP_NUM_THREADS"]))}}

def reference(n, job):
    time.sleep({reference_s})
    held = np.ones({held_mib} << 17)
    {say}
    return {{"squares": np.array([k * k for k in range(n)]) + 0 * int(held[0]), "threads": np.array({threads})}}

def floor(job):
    return Floor(operations=2e6, nbytes=1e6)

PARTS = (Part("squares", prepare, ours, reference, floor),)
TOLERANCES = {{"squares": 0.5, "threads": 0.0}}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes an entry whose sides sleep, hold memory and answer as asked."""

    def make(**settings: Any) -> Entry:
        chosen = {"size": 5, "wrong": 0, "ours_s": 0.0, "reference_s": 0.0, "held_mib": 1, "threads": 1, "say": "pass"}
        (tmp_path / "toy_entry.py").write_text(TOY.format(**chosen | settings))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        entry = Entry("toy", "a toy", "its reference", "toy_entry", {"cpu": Goal(faster=2.0, smaller=3.0)})
        monkeypatch.setitem(ENTRIES, "toy", entry)
        monkeypatch.setattr(harness, "measure_machine", lambda job: MACHINE)
        return entry

    return make


def call(*arguments: str) -> int:
    return main_guard(lambda: command.main([*arguments]))


# --- the harness ------------------------------------------------------------------------------------------------------


def test_times_memory_values_and_the_share_of_the_limit(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    toy(ours_s=0.1, reference_s=1.0, held_mib=200)
    assert call("toy", "--json", "--runs", "1", "--threads", "1") == 0
    document = json.loads(capsys.readouterr().out)
    (entry,) = document["entries"]
    total, (part,) = entry["total"], entry["parts"]
    assert 0.1 <= total["ours"]["wall_s"] < 0.5 and total["reference"]["wall_s"] >= 1.0
    assert total["faster"] == pytest.approx(total["reference"]["wall_s"] / total["ours"]["wall_s"])
    assert 190 << 20 <= total["reference"]["peak_bytes"] < 260 << 20
    assert total["ours"]["peak_bytes"] < 40 << 20
    assert part["floor_s"] == pytest.approx(2e-3)  # operations take longer than bytes
    assert part["of_limit"] == pytest.approx(2e-3 / part["ours"]["wall_s"])
    assert entry["same"] and entry["reached"] == {"faster": True, "smaller": True} and entry["runs"] == 1
    assert document["machine"] == {"device": "cpu", "threads": 1, "matmul": 1e9, "copy": 1e9}
    assert document["surroundings"]["hardware"]["cores"] >= 1


def test_sides_that_differ_fail_the_run(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    toy(wrong=0.75)
    assert call("toy", "--quick", "--threads", "1") == 1
    out, err = capsys.readouterr()
    assert "squares: largest difference 7.5e-01, allowed 0.5  <- the sides differ" in out
    assert err.strip().splitlines()[-1] == "error: the two sides differ: toy (squares)"
    toy(wrong=0.25)
    assert call("toy", "--quick", "--threads", "1") == 0


def test_both_sides_get_the_threads_that_were_asked_for(toy: Any) -> None:
    toy(threads=3)
    assert call("toy", "--quick", "--threads", "3") == 0
    assert call("toy", "--quick", "--threads", "2") == 1


def test_medians_over_runs_in_turn(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = toy()
    seconds = iter([1.0, 10.0, 30.0, 3.0, 2.0, 20.0])  # ours, reference; reference, ours; ours, reference
    order = []

    def worker(name: str, what: str, side: str, job: Job, folder: Path) -> Any:
        order.append(side)
        np.savez(folder / "results.npz", squares=np.zeros(2))
        spent = {"wall_s": next(seconds), "cpu_s": 1.0, "peak_bytes": 7 + len(order)}
        part = {"part": "squares", **spent, "floor": {"operations": 1e9, "nbytes": 3e9}, "whole": 7200.0}
        return {"parts": [part, part], "tolerances": {"squares": 0}}

    monkeypatch.setattr(harness, "_worker", worker)
    found = harness.measure(entry, QUICK, MACHINE, runs=3, progress=command.Progress(enabled=False))
    assert order == ["ours", "reference", "reference", "ours", "ours", "reference"]
    assert [row.ours.wall_s for row in found.parts] == [2.0, 2.0]
    assert (found.total.ours.wall_s, found.total.reference.wall_s, found.total.faster) == (4.0, 40.0, 10.0)
    assert found.total.ours.peak_bytes == 11  # of 8, 11 and 12
    assert found.total.floor_s == 6.0  # the bytes of both parts
    assert [row.whole_hours for row in found.parts] == [4.0, 4.0] and found.total.whole_hours is None
    assert "squares: the paper's whole training at this rate: 4.0 hours" in command.table(
        dataclasses.replace(found, quick=False)
    )


def test_results_must_match_in_shape_and_in_what_is_undefined(tmp_path: Path) -> None:
    def compared(a: Any, b: Any) -> harness.Check:
        for name, value in (("a", a), ("b", b)):
            np.savez(tmp_path / f"{name}.npz", r=np.array(value))
        (check,) = harness._compare(tmp_path / "a.npz", tmp_path / "b.npz", {"r": 1e-6})
        return check

    assert compared([1.0, np.nan], [1.0 + 5e-7, np.nan]).same
    assert not compared([1.0, np.nan], [1.0 + 5e-6, np.nan]).same
    assert compared([1.0, np.nan], [1.0, 2.0]).difference is None and not compared([1.0, np.nan], [1.0, 2.0]).same
    assert not compared([1.0, 1.0], [1.0]).same
    assert compared([np.nan], [np.nan]).difference == 0.0
    with pytest.raises(command.RunError, match="without a tolerance: r"):
        harness._compare(tmp_path / "a.npz", tmp_path / "b.npz", {})
    with pytest.raises(command.RunError, match="not both sides gave.*: missing"):
        harness._compare(tmp_path / "a.npz", tmp_path / "b.npz", {"r": 0.0, "missing": 0.0})


@pytest.mark.parametrize(
    ("say", "expected"),
    [
        ("raise OSError('the disk is full')", "entry 'toy', reference: its process failed: OSError: the disk is full"),
        ("os.kill(os.getpid(), 9)", "entry 'toy', reference: its process was killed (signal 9); if memory ran out"),
    ],
)
def test_a_side_that_dies_is_told_in_one_line(
    toy: Any, capsys: pytest.CaptureFixture[str], say: str, expected: str
) -> None:
    toy(say=say)
    assert call("toy", "--quick") == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: {expected}")


_PEAK = """
import numpy as np
from benchmark.perf import usage
before = usage.resident()
held = np.ones(25 << 20)  # 200 MiB
there = usage.resident() - before
del held
highest = usage.peak() - before
usage.reset_peak()
print(there >> 20, highest >> 20, (usage.peak() - before) >> 20)
"""


def test_the_peak_counts_what_is_gone_already_and_starts_anew() -> None:
    if not usage.reset_peak():
        pytest.skip("this system keeps one high-water mark for a process's whole life")
    # In a process of its own: one that other tests have filled has memory to spare, and need not grow.
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    there, highest, after = map(int, done.stdout.split())
    assert there > 180 and highest > 180 and after < 100


def test_a_floor_is_the_longer_of_computing_and_moving() -> None:
    assert Floor(operations=10.0, nbytes=10.0).seconds(5.0, 1.0) == 10.0
    assert Floor(operations=10.0, nbytes=10.0).seconds(1.0, 5.0) == 10.0


def test_the_machine_is_measured(tmp_path: Path) -> None:
    assert work(["machine", "ours", str(tmp_path), "--device", "cpu", "--threads", "1", "--quick"]) == 0
    report = Machine(**json.loads((tmp_path / "report.json").read_text()))
    assert (report.device, report.threads) == ("cpu", 1)
    assert 1e8 < report.matmul < 1e15 and 1e7 < report.copy < 1e14


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_table_for_people(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    toy(ours_s=0.05, reference_s=0.3)
    assert call("toy", "--runs", "2", "--threads", "1") == 0
    out = capsys.readouterr().out
    assert "toy: a toy\n  against its reference\n" in out
    assert "this machine's limit: 1 GFLOP/s float32, 1.0 GB/s" in out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert lines["total"].count(" x ") >= 1 and "GiB" in lines["squares"]
    assert "goal: 2 times faster" in out and out.count("reached") + out.count("missed") == 2
    assert call("toy", "--quick", "--threads", "1") == 0
    quick = capsys.readouterr().out
    assert "a quick run: its times and memory mean nothing" in quick and "goal" not in quick


ALONE = """
import sys
import time
from benchmark.perf.entries import Part
from benchmark.perf.typed import typed

def one(inputs, job):
    typed("toy_command", *inputs, codes=(3,))
    return {{}}

PARTS = (
    Part("some --help", lambda job: ["{seconds}"], one, starts_processes=True),
    Part("other --help", lambda job: ["0"], one, starts_processes=True),
)
TOLERANCES = {{}}
"""


@pytest.mark.parametrize(("seconds", "reached"), [(0.0, True), (2.0, False)])
def test_an_entry_without_a_reference_is_held_to_seconds(
    toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: float, reached: bool
) -> None:
    toy()
    (tmp_path / "toy_entry.py").write_text(ALONE.format(seconds=seconds))
    (tmp_path / "toy_command.py").write_text(
        "import sys, time\nheld = bytearray(150 << 20)\ntime.sleep(float(sys.argv[1]))\nsys.exit(3)\n"
    )
    ENTRIES["toy"] = Entry("toy", "a toy", None, "toy_entry", {"cpu": Goal(seconds={"--help": 1.5})})
    assert call("toy", "--runs", "1", "--threads", "1") == 0
    out = capsys.readouterr().out
    header = next(line for line in out.splitlines() if "CPU time" in line)
    assert header.split() == ["ours", "CPU", "time", "memory"] and "against" not in out
    assert f"goal: --help under 1.5 s: {seconds:.0f}." in out and out.count("reached") == int(reached)
    assert call("toy", "--runs", "1", "--threads", "1", "--json") == 0
    (entry,) = json.loads(capsys.readouterr().out)["entries"]
    assert entry["reached"] == {"--help": reached} and entry["reference"] is None and entry["checks"] == []
    assert entry["parts"][0]["floor_s"] is None and entry["total"]["faster"] is None
    assert entry["parts"][0]["ours"]["peak_bytes"] > 150 << 20, "that of the process that did the work"
    assert call("toy", "--list") == 0
    assert "reference:  none" in capsys.readouterr().out
    (tmp_path / "toy_command.py").write_text("raise OSError('the disk is full')")
    assert call("toy", "--runs", "1", "--threads", "1") == 1
    assert capsys.readouterr().err.strip().endswith("ended with 1: OSError: the disk is full")


def test_the_commands_that_are_started_are_all_there_are() -> None:
    root = Path(harness.__file__).parents[2]
    files = [file for package in ("benchmark", "leaderboard", "metrics") for file in (root / package).rglob("*.py")]
    named = {name for file in files for name in re.findall(r'prog="python -m ([\w.]+)"', file.read_text())}
    assert named - {"benchmark.perf.worker"} == set(COMMANDS)


def test_list_names_every_entry_and_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--list") == 0
    out = capsys.readouterr().out
    for entry in ENTRIES.values():
        assert out.count(f"{entry.name}\n  ours:       {entry.ours}\n") == 1
    assert "cpu: 5 times faster, 3 times less memory" in out
    assert (
        "cpu: 10 times less memory; cuda: 1 times faster, 10 times less memory" in out
    )  # infonce: no goal for its time


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["scor"], "no entry 'scor' (did you mean 'score'?)"),
        (["xyz"], f"no entry 'xyz'; there are {', '.join(ENTRIES)}"),
        (["score", "--device", "cuda"], "entry 'score' is measured on cpu only, not on cuda"),
    ],
)
def test_refusals(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 2
    assert capsys.readouterr().err == f"error: {expected}\n"


@pytest.mark.parametrize("arguments", [["--runs", "0"], ["--threads", "two"], ["--device", "tpu"], ["--rnus", "3"]])
def test_slips_are_answered_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_loads_no_library() -> None:
    code = (
        "import sys; from benchmark.perf.__main__ import build_parser; build_parser().format_help();"
        "print(*(name for name in ('numpy', 'torch', 'skimage', 'scipy') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_help_is_quick() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "benchmark.perf", "--help"], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # The processor's time, which other work on the machine does not lengthen.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


# --- entry by entry ---------------------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ENTRIES)
def test_quick_run_of_every_entry(name: str, tmp_path: Path) -> None:
    entry, reports = ENTRIES[name], {}
    for side in entry.sides:
        folder = tmp_path / side
        folder.mkdir()
        assert work([entry.module, side, str(folder), "--device", "cpu", "--threads", "1", "--quick"]) == 0
        reports[side] = json.loads((folder / "report.json").read_text())
    parts = [[part["part"] for part in report["parts"]] for report in reports.values()]
    assert all(own == parts[0] for own in parts)
    for part in reports["ours"]["parts"]:
        assert part["wall_s"] > 0 and part["cpu_s"] > 0 and (part["floor"] is None or part["floor"]["operations"] > 0)
    for goal in entry.goals.values():
        assert all(any(part.endswith(name) for part in parts[0]) for name in goal.seconds)
        assert entry.reference or (goal.faster is None and goal.smaller is None)
    if entry.reference is None:
        assert reports["ours"]["tolerances"] == {}
        return
    tolerances = reports["ours"]["tolerances"]
    assert tolerances
    checks = harness._compare(tmp_path / "ours" / "results.npz", tmp_path / "reference" / "results.npz", tolerances)
    assert [check.name for check in checks if not check.same] == []


def test_score_is_measured_on_images_and_features_that_tell_something() -> None:
    """Neither chance nor perfection, and flat areas, or equal values would prove little."""
    from benchmark.perf import score

    images = score.PARTS[0].prepare(QUICK)
    assert images.truths.shape == (6, 425, 425, 3) and images.recons.shape == (6, 224, 224, 3)
    again = score.PARTS[0].prepare(QUICK)
    np.testing.assert_array_equal(images.truths, again.truths)
    found = score.plain_pixels(images, QUICK)
    assert (np.abs(found["PixCorr"]) < 0.97).all() and found["PixCorr"].max() > 0.3 and np.ptp(found["SSIM"]) > 0.02
    assert all(((truth == 0) | (truth == 255)).mean() > 0.005 for truth in images.truths)
    for part in score.PARTS[1:]:
        features = part.prepare(QUICK)
        (wins,) = part.reference(features, QUICK).values()
        assert 0 < wins.mean() < 5
        # A plain count, by ranks.
        r = np.corrcoef(*features)[:6, 6:]
        np.testing.assert_array_equal(wins, [rankdata(r[:, j])[j] - 1 for j in range(6)])


def test_samples_drawn_together_are_those_of_single_reads() -> None:
    """Own recordings and predicted ones, of subjects with different numbers of voxels; equal bits."""
    from benchmark.perf import load

    stored = load._stored(QUICK)
    subjects, rows = (np.concatenate(part) for part in zip(*stored.order, strict=True))
    known = len(stored.pool.data.target_ids)
    assert {(s, row < known) for s, row in zip(subjects, rows, strict=True)} == {(s, k) for s in (0, 1) for k in (0, 1)}
    found, expected = load.our_recordings(stored, QUICK), load.reference_recordings(stored, QUICK)
    np.testing.assert_array_equal(found["recordings"], expected["recordings"])
    assert len(np.unique(found["recordings"], axis=0)) > 40
    root = stored.root
    assert root.is_dir()
    del stored
    assert not root.exists()


def test_a_step_is_as_many_as_the_papers_training_has() -> None:
    """Sec. 3.2 and App. D: 60 epochs of 2,900 batches of 64 and of 128, in steps of an eighth of these."""
    from benchmark.perf import bit_step

    full = dataclasses.replace(QUICK, quick=False)
    assert [part.whole(full) for part in bit_step.PARTS if part.whole] == [60 * 2900 * 8] * 2


def test_images_sampled_together_are_those_of_single_images() -> None:
    """To rounding, far below what the entry allows half precision; and images that differ from each other."""
    from benchmark.perf import generate

    inputs = generate._paper(QUICK)
    plain = generate.reference(inputs, QUICK, "paper")
    for name, images in generate.ours(inputs, QUICK, "paper").items():
        np.testing.assert_allclose(images, plain[name], atol=1e-4)
        assert np.abs(images[0] - images[1]).mean() > 0.01


def test_entries_without_a_goal_are_told_without_a_verdict(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    entry = dataclasses.replace(toy(), goals={"cpu": Goal(faster=1e-9)})
    ENTRIES["toy"] = entry
    assert call("toy", "--runs", "1", "--threads", "1") == 0
    out = capsys.readouterr().out
    assert "goal: 1e-09 times faster" in out and "smaller:" not in out
    assert call("toy", "--runs", "1", "--threads", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["entries"][0]["reached"] == {"faster": True}
    assert call("generate", "--list") == 0
    assert "goal:       cpu: none; cuda: 5 times faster\n" in capsys.readouterr().out


# --- what training computes, against the plain forms, in both of its precisions ----------------------------------------


def relative_errors(
    model: nn.Module, exact: nn.Module, output: Callable[[nn.Module], Tensor], plain: Callable[[nn.Module], Tensor]
) -> dict[str, float]:
    """Distance of values and gradients from the plain form's in float64, in terms of their size."""
    got, want = output(model), plain(exact)
    direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (got.double() * direction).sum().backward()
    (want * direction).sum().backward()
    of_exact = dict(exact.named_parameters())
    pairs = {"values": (got.detach().double(), want.detach())}
    pairs |= {
        name: (p.grad.double(), of_exact[name].grad) for name, p in model.named_parameters() if p.grad is not None
    }
    assert len(pairs) > 10 and all(b is not None for _, b in pairs.values())
    return {name: float((a - b).norm() / b.norm()) for name, (a, b) in pairs.items() if b.norm() > 1e-9}


@pytest.mark.parametrize(("half", "allowed"), [(False, 1e-4), (True, 0.05)])
def test_the_encoder_is_its_equations_in_float32_and_in_bf16(half: bool, allowed: float) -> None:
    from benchmark.perf import encoder

    inputs = encoder._prepare(QUICK)
    model = inputs.encoder.eval()  # dropout of either precision is another one
    exact = copy.deepcopy(model).double()
    features = [tap.detach().double() for tap in inputs.features]

    def ours(one: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found: Tensor = one(inputs.features, inputs.voxels)
        return found

    errors = relative_errors(model, exact, ours, lambda one: encoder.plain(one, features, inputs.voxels))
    assert {name: error for name, error in errors.items() if error > allowed} == {}


@pytest.mark.parametrize("branch", ["lowlevel", "semantic"])
@pytest.mark.parametrize(("half", "allowed"), [(False, 1e-4), (True, 0.06)])
def test_a_bit_is_its_plain_form_in_float32_and_in_bf16(branch: Any, half: bool, allowed: float) -> None:
    from benchmark.perf import bit_step

    inputs = bit_step._prepare(QUICK, branch)
    bit, exact = inputs.bit, copy.deepcopy(inputs.bit).double()
    plain = bit_step.PlainBIT(exact)

    def ours(one: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found: Tensor = one(inputs.betas, inputs.subject, inputs.keep, inputs.queries)
        return found

    def written_plainly(one: Any) -> Tensor:
        found: Tensor = plain(inputs.betas.double(), inputs.subject, inputs.keep, inputs.queries)
        return found

    class Named(nn.Module):
        """The plain form's parameters by the names of the BIT's."""

        def named_parameters(self, *_: Any, **__: Any) -> Any:
            return [(name.replace(".conv.", "."), p) for name, p in plain.named_parameters()]

    errors = relative_errors(bit, Named(), ours, written_plainly)
    errors.pop("tokenizer.lin_key.bias", None)  # zero but for rounding: the softmax cancels it
    assert {name: error for name, error in errors.items() if error > allowed} == {}
