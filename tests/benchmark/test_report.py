"""From finished stages to rows, table and page."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmark.report.answers import read_answers
from benchmark.report.rows import Report, Training, write_report
from benchmark.stages import variant_stages
from benchmark.store import Store
from benchmark.sweeps import load_sweep, sweep_names
from benchmark.weights import generator_digest, weights_digest
from leaderboard import Row, read_rows, summarise
from leaderboard.published import published
from leaderboard.results import read_results
from leaderboard.schema import read_leaderboard
from metrics.cards import CARDS
from metrics.protocols import PROTOCOLS

pytestmark = pytest.mark.timeout(900)  # the first test that needs the small sweep waits for it
NAMES = ["clusters=8", "clusters=32", "clusters=128"]


@pytest.fixture(scope="module")
def rows(tiny_run: Any) -> dict[str, Row]:
    return {row.variant: row for row in read_leaderboard(tiny_run.out / "leaderboard" / "leaderboard.json")}


def write(tiny_run: Any, out: Path, names: list[str]) -> Report:
    trainings = {name: [Training(tiny_run.variants[name], tiny_run.stages[name])] for name in names}
    return write_report(out, tiny_run.store, load_sweep("clusters"), trainings, "clusters=128")


def test_each_variant_is_ranked_and_what_it_must_beat_stands_beside(rows: dict[str, Row]) -> None:
    kinds = {
        kind: sorted(name for name, row in rows.items() if row.kind == kind)
        for kind in ("method", "branch", "reference")
    }
    assert kinds == {
        "method": sorted(NAMES),
        "branch": ["clusters=128, low-level image alone", "clusters=128, semantic image alone"],
        "reference": ["chance", "mean image", "shuffled"],
    }
    assert {row.method for row in rows.values() if row.kind != "reference"} == {"Brain-IT"}


def test_all_rows_can_be_compared(tiny_run: Any, rows: dict[str, Row]) -> None:
    about = json.loads((tiny_run.folder("score") / "protocol.json").read_text())
    for row in rows.values():
        assert (row.track, row.protocol, row.protocol_hash) == ("demo", "demo", about["protocol_hash"])
        assert (row.subjects, row.seeds, row.n_images) == ((1, 2), (0,), 4)


def test_means_are_those_of_the_images(tiny_run: Any, rows: dict[str, Row]) -> None:
    where = {name: ("score", name, "combined") for name in NAMES}
    where |= {f"clusters=128, {words} image alone": ("score", "clusters=128", kind) for words, kind in (("low-level", "lowlevel"), ("semantic", "semantic"))}  # fmt: skip
    where |= {name: ("references", "clusters=128", name) for name in ("mean image", "shuffled")}
    for name, (role, variant, kind) in where.items():
        scores = pq.read_table(tiny_run.folder(role, variant) / "scores.parquet").to_pandas()
        means = scores[scores.variant == kind].groupby("metric").value.mean()
        assert list(rows[name].metrics) == list(CARDS), "all eleven, in their order"
        for key, interval in rows[name].metrics.items():
            assert interval.mean == pytest.approx(means[key])
            assert interval.ci_low is not None and interval.ci_high is not None
            assert interval.ci_low <= interval.mean <= interval.ci_high


def test_chance_is_arithmetic(rows: dict[str, Row]) -> None:
    chance = {key: interval.mean for key, interval in rows["chance"].metrics.items()}
    assert chance == {"Alex(2)": 0.5, "Alex(5)": 0.5, "Incep": 0.5, "CLIP": 0.5, "CLIP-1000": 1 / 4}
    assert all(interval.ci_low is None for interval in rows["chance"].metrics.values())


@pytest.mark.parametrize("name", NAMES)
def test_cost_is_the_sum_over_all_that_the_row_needed(tiny_run: Any, rows: dict[str, Row], name: str) -> None:
    roles = ["simulate", "prepare", "targets", "encoder", "external", "clusters", "lowlevel", "semantic", "joint"]
    statuses = {role: tiny_run.store.status(tiny_run.stage(role, name)) for role in [*roles, "reconstruct", "score"]}
    cost = rows[name].cost
    assert cost.wall_s == pytest.approx(sum(status["wall_s"] for status in statuses.values()))
    assert cost.peak_memory_bytes == max(status["peak_memory_bytes"] for status in statuses.values()) > 10**8
    assert cost.parameters == sum(statuses[role]["summary"]["parameters"] for role in ("encoder", "lowlevel", "joint"))
    assert cost.gpu_hours == 0


def test_gpu_hours_count_only_stages_that_ran_on_one(
    tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = type(tiny_run.store)
    status = store.status
    faked = {"lowlevel": 1800.0, "joint": 3600.0}

    def on_gpu(self: Any, stage: Any) -> dict[str, Any]:
        real = status(self, stage)
        return {**real, "device": "cuda", "wall_s": faked[stage.name]} if stage.name in faked else real

    monkeypatch.setattr(store, "status", on_gpu)
    write(tiny_run, tmp_path, ["clusters=128"])
    row = next(r for r in read_rows(tmp_path / "leaderboard" / "results") if r.variant == "clusters=128")
    assert row.cost.gpu_hours == pytest.approx(0.5 * 1 + 1 * 4), "joint training asks for four"


@pytest.mark.parametrize("name", NAMES)
def test_the_manifest_says_what_the_row_was_made_from(tiny_run: Any, rows: dict[str, Row], name: str) -> None:
    manifest, stages = rows[name].manifest, tiny_run.stages[name]
    assert manifest.seeds == {"variant": 0, "validation split": 0, "simulation": 0}
    assert manifest.data == {"prepared": stages.prepare.fingerprint}
    judges = {name: weights_digest(name) for name in PROTOCOLS["demo"].networks}
    lite0 = weights_digest("lite0")
    targets = {"encoder": lite0, "lowlevel": lite0, "semantic": lite0, "generator": generator_digest()}
    assert manifest.weights == {**targets, **judges}
    assert {"torch", "numpy", "diffusers"} <= manifest.packages.keys() and manifest.hardware
    assert rows[name].source == f"store/{stages.score.key}" and (tiny_run.out / rows[name].source).is_dir()


def test_results_are_kept_a_file_a_row_with_the_scores_it_was_made_from(tiny_run: Any, rows: dict[str, Row]) -> None:
    kept = read_results(tiny_run.out)
    assert sorted(result.row.variant for result in kept) == sorted(rows)
    for result in kept:
        assert result.row == rows[result.row.variant]
        scores = result.per_image()
        if result.row.variant == "chance":
            assert scores is None
            continue
        assert scores is not None
        means = summarise(scores)[result.row.key]
        assert means == result.row.metrics


def test_the_page_shows_seen_and_reconstructed_images(tiny_run: Any) -> None:
    folder = tiny_run.out / "leaderboard"
    page = (folder / "index.html").read_text()
    named = set(re.findall(r"images/[\w./=-]+\.\w+", page))
    assert named, "the page shows images"
    assert [name for name in named if not (folder / name).is_file()] == []
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page, "nothing from elsewhere"
    for text in (
        "How many clusters?",
        "clusters=128",
        "mean image",
        "shuffled",
        "chance",
        "stand-in EfficientNet-Lite2",
    ):
        assert text in page


def test_the_same_results_give_the_same_files(tiny_run: Any, tmp_path: Path) -> None:
    def content(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    write(tiny_run, tmp_path / "a", NAMES)
    write(tiny_run, tmp_path / "b", NAMES)
    first = content(tmp_path / "a")
    assert first == content(tmp_path / "b") and "leaderboard/leaderboard.json" in first
    write(tiny_run, tmp_path / "a", NAMES)
    assert content(tmp_path / "a") == first, "written over itself"
    here = json.loads((tiny_run.out / "leaderboard" / "leaderboard.json").read_text())["rows"]
    there = json.loads(first["leaderboard/leaderboard.json"])["rows"]
    assert [{**row, "source": ""} for row in there] == [{**row, "source": ""} for row in here], "but for where they lie"


def test_a_part_of_a_sweep_can_be_reported(tiny_run: Any, tmp_path: Path) -> None:
    report = write(tiny_run, tmp_path, ["clusters=8", "clusters=128"])
    assert sorted(entry.row.variant for entry in report.ranking.entries) == ["clusters=128", "clusters=8"]
    assert report.page == tmp_path / "leaderboard" / "index.html" and report.page.is_file()


def test_the_low_level_image_is_compared_with_the_mean_image(tiny_run: Any, tmp_path: Path) -> None:
    (sentence,) = write(tiny_run, tmp_path, ["clusters=128"]).answer.sentences
    pixcorr = {}
    for role, kind in (("score", "lowlevel"), ("references", "mean image")):
        scores = pq.read_table(tiny_run.folder(role) / "scores.parquet").to_pandas()
        pixcorr[kind] = scores[(scores.variant == kind) & (scores.metric == "PixCorr")].value.mean()
    difference = pixcorr["lowlevel"] - pixcorr["mean image"]
    expected = f"low-level image (clusters=128): PixCorr {abs(difference):.3f} {'above' if difference > 0 else 'below'} the mean"
    assert sentence.startswith(expected)
    found = re.search(r"95 % CI ([+-][\d.]+) to ([+-][\d.]+), p = ([\d.e-]+)\)", sentence)
    assert found and float(found[1]) - 1e-3 <= difference <= float(found[2]) + 1e-3 and 0 < float(found[3]) <= 1


@pytest.fixture(scope="module")
def two_seeds(tiny_run: Any, sweep_process: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two points of the small sweep with a second seed, on top of what it has of the first."""
    out = tmp_path_factory.mktemp("seeds")
    shutil.copytree(tiny_run.out / "store", out / "store")
    answer = sweep_process(*tiny_run.arguments, "--only=8,128", "--seed=0,3", "--tracker=none", "--out", out)
    assert answer.code == 0, answer.err
    assert "2 variants x 2 seeds" in answer.out
    return out


def test_a_row_is_over_all_its_seeds(two_seeds: Path, rows: dict[str, Row]) -> None:
    both = {result.row.variant: result for result in read_results(two_seeds)}
    assert {name for name, result in both.items() if result.row.kind == "method"} == {"clusters=8", "clusters=128"}
    for name, result in both.items():
        assert result.row.seeds == (0, 3) and result.id.rpartition("-")[0] == f"demo-{slug(result.row)}"
        if name == "chance":
            continue
        table = result.per_image()
        assert table is not None
        by_seed = table.to_pandas().groupby(["metric", "seed"]).value.mean()
        for key, interval in result.row.metrics.items():
            assert interval.mean == pytest.approx((by_seed[key, 0] + by_seed[key, 3]) / 2)
            assert by_seed[key, 0] == pytest.approx(rows[name].metrics[key].mean), "the first seed's are as they were"
    images = {name: result.per_image().to_pandas().query("metric == 'PixCorr'") for name, result in both.items() if name != "chance"}  # fmt: skip
    trained = images["clusters=8"].pivot_table(index=["subject", "image_id"], columns="seed", values="value")
    assert (trained[0] - trained[3]).abs().max() > 1e-3, "another training"
    mean = images["mean image"].pivot_table(index=["subject", "image_id"], columns="seed", values="value")
    assert mean[0].tolist() == mean[3].tolist(), "which no seed changes"


def slug(row: Row) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{row.method} {row.variant}".lower()).strip("-")


def test_orderings_are_asked_over_all_seeds(two_seeds: Path) -> None:
    (answer,) = read_answers(two_seeds)
    assert answer.orderings and {one.seeds for one in answer.orderings} == {2}


def test_the_cost_of_several_seeds_is_that_of_one_training(
    two_seeds: Path, tiny_run: Any, rows: dict[str, Row]
) -> None:
    (row,) = [result.row for result in read_results(two_seeds) if result.row.variant == "clusters=8"]
    store = Store(two_seeds / "store")
    second = variant_stages(tiny_run.variants["clusters=8"].with_settings({"seed": 3}), "clusters=8")
    wall = sum(store.status(stage)["wall_s"] for stage in second.chain)
    assert row.cost.wall_s == pytest.approx((wall + (rows["clusters=8"].cost.wall_s or 0)) / 2)
    assert row.cost.parameters == rows["clusters=8"].cost.parameters


def test_notes_name_what_stands_in_for_each_network(tiny_run: Any, tmp_path: Path) -> None:
    notes = write(tiny_run, tmp_path, ["clusters=128"]).answer.notes
    demo = PROTOCOLS["demo"]
    assert notes == {key: demo.describe(key) for key in demo.slots}
    assert all("stand-in" in note for note in notes.values()) and np.all([key in CARDS for key in notes])


def test_the_papers_orderings_are_asked_against_the_main_variant(tiny_run: Any, tmp_path: Path) -> None:
    report = write(tiny_run, tmp_path, NAMES)
    found = report.answer.orderings
    assert {one.reference for one in found} == {"clusters=128"}
    assert {one.variant for one in found} == set(NAMES) - {"clusters=128"}
    printed = published()["brainit_T3_k8"].metrics["PixCorr"] - published()["brainit_40h"].metrics["PixCorr"]
    assert next(o.printed for o in found if (o.variant, o.metric) == ("clusters=8", "PixCorr")) == printed
    for one in found:
        means = {row.variant: row.metrics[one.metric].mean for row in report.ranking.rows if one.metric in row.metrics}
        assert one.difference == pytest.approx(means[one.variant] - means["clusters=128"])


@pytest.mark.parametrize("name", sweep_names())
def test_the_published_rows_that_a_sweep_answers_to_exist(name: str) -> None:
    sweep = load_sweep(name)
    assert {*sweep.answered().values(), *sweep.beside} <= set(published())
    assert not sweep.published or sweep.axis.main in sweep.published
