"""What a plan will take, and what keeps it from starting: everything named at once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmark.cli import main_guard
from benchmark.config import Variant, paper
from benchmark.estimate import estimate, sweep_lines
from benchmark.graph import Stage
from benchmark.running import missing_disk
from benchmark.stages import variant_stages
from benchmark.sweep import main
from benchmark.sweeps import sweep_names


def costs(**settings: Any) -> dict[str, Any]:
    variant = paper().with_settings({name.replace("__", "."): value for name, value in settings.items()})
    stages = variant_stages(variant, "main", "digest", absent="missing")
    return {stage.name: estimate(stage, variant) for stage in (*stages.chain, stages.references)}


def test_the_papers_own_hours_and_sizes() -> None:
    """App. D: 12, 8 and 4 x 10 GPU-hours; 62 + 105 GB of tokens and 78 GB of predicted fMRI (float16)."""
    found = costs()
    assert {name: found[name].gpu_hours for name in ("lowlevel", "semantic", "joint")} == {
        "lowlevel": 12,
        "semantic": 8,
        "joint": 40,
    }
    tokens = 256 * 1664 * 2
    assert found["targets"].disk == pytest.approx((72_000 + 123_403) * tokens, rel=0.02)
    assert found["external"].disk == 123_403 * 315_997 * 2
    assert set(found) >= {"prepare", "targets", "encoder", "clusters", "external", "reconstruct", "score", "references"}


def test_estimates_follow_the_settings() -> None:
    usual = costs()
    half = costs(semantic__training__epochs=30)
    assert half["semantic"].gpu_hours == pytest.approx(4) and half["lowlevel"] == usual["lowlevel"]
    live = costs(targets__external="live", targets__semantic="live")
    assert live["external"].disk == 0 and live["targets"].disk < 0.02 * usual["targets"].disk
    assert live["semantic"].gpu_hours > usual["semantic"].gpu_hours, "the encoder runs in every step"
    fewer = costs(generation__test_images=100)
    assert fewer["reconstruct"].gpu_hours == pytest.approx(usual["reconstruct"].gpu_hours / 10)
    assert costs(networks__refiner=None)["reconstruct"].gpu_hours < usual["reconstruct"].gpu_hours


def test_what_stands_in_a_bits_place_takes_less() -> None:
    usual = costs()
    mlp = costs(lowlevel__predictor="mlp-infonce", semantic__predictor="mlp")
    ridge = costs(lowlevel__predictor="ridge", semantic__predictor="ridge")
    for name in ("lowlevel", "semantic"):
        assert 0 < ridge[name].gpu_hours < mlp[name].gpu_hours < usual[name].gpu_hours
        assert ridge[name].memory < mlp[name].memory < 79e9, "all of it fits one GPU"
    # Weights of MindEye's width: 4096 hidden units, all subjects' voxels, 256 tokens of 1664.
    assert mlp["semantic"].disk == pytest.approx(4 * 4096 * (315_997 + 256 * 1664), rel=0.05)
    assert "joint" not in mlp and "joint" not in ridge and "encoder" not in ridge and "clusters" not in mlp
    assert set(costs(lowlevel__predictor="oracle", semantic__predictor="oracle")) == {
        "prepare",
        "targets",
        "reconstruct",
        "score",
        "references",
    }


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    assert missing_disk(tmp_path / "not" / "yet", 1.0) == []
    (problem,) = missing_disk(tmp_path, 1e18)
    assert "the run needs about 1,000,000,000 GB" in problem and "--out" in problem


def test_a_dry_run_prints_the_plan_and_names_all_that_is_missing(
    sweep_here: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRAIN_IT_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("benchmark.running.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1e9})())
    arguments = ("clusters", "--preset", "paper", "--data", tmp_path / "nsd", "--out", tmp_path / "runs")
    answer = sweep_here(*arguments, "--dry-run")
    assert answer.code == 2
    assert "GPU-hours" in answer.out and "47 stages" in answer.out and "in all" in answer.out
    for word in ("3 things are missing", "data: ", "weights: ", "disk: ", "unclip6_epoch0_step110000.ckpt", "alexnet"):
        assert word in answer.err, word
    assert not (tmp_path / "runs").exists()
    refused = sweep_here(*arguments)
    assert refused.code == 2 and "data: " in refused.err and "weights: " in refused.err
    assert not (tmp_path / "runs").exists()


def test_sweeps_are_estimated_alone_and_one_after_the_other() -> None:
    """What two sweeps share is counted once; the sum is that of all different stages."""

    def stages(clusters: int) -> list[tuple[Stage, Variant]]:
        variant = paper().with_settings({"clustering.n_clusters": clusters})
        own = variant_stages(variant, f"clusters={clusters}", "0" * 64, absent="missing")
        return [(stage, variant) for stage in own.chain]

    few, many = stages(8), stages(512)
    both = few + [one for one in many if one[0].fingerprint not in {stage.fingerprint for stage, _ in few}]
    lines = [line.split() for line in sweep_lines({"few": few, "both": both})]
    head, first, second, total, *_ = lines
    assert head[0] == "sweep" and first[0] == "few" and second[0] == "both" and total[:2] == ["in", "all"]
    everything = {stage.fingerprint: (stage, variant) for stage, variant in few + many}.values()
    hours = [sum(estimate(stage, variant).gpu_hours for stage, variant in part) for part in (few, everything)]
    assert float(first[2]) == pytest.approx(hours[0], abs=0.06)
    assert float(total[3]) == pytest.approx(hours[1], abs=0.06)
    shared = {stage.fingerprint for stage, _ in few} & {stage.fingerprint for stage, _ in many}
    assert 3 < len(shared) < len(few), "data, targets, encoder and predicted responses"
    assert int(total[2]) == len(few) + len(many) - len(shared)


def test_the_list_says_what_each_sweep_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.sweep", "list", "--preset", "paper"])
    assert main_guard(main) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : len(sweep_names()) + 1]] == sweep_names()
    table1 = next(line.split() for line in lines if line.startswith("table1"))
    assert 60 < float(table1[2]) < 90, "one variant: about what the paper's App. D adds up to"
