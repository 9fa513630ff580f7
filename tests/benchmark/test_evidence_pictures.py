"""``python -m benchmark.evidence``: what stands in the sheets, and where the numbers come from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from benchmark import networks, stages
from benchmark.cli import main_guard
from benchmark.data.scenes import describe_scene, render_scenes
from benchmark.demo_generator.train import RESERVED_SEED
from benchmark.evidence import pictures as evidence
from benchmark.evidence.__main__ import main
from benchmark.report import rows as report
from benchmark.stages import KINDS, image_name, reconstruct, score, seen_name
from benchmark.stages.reconstruct import image_seed, read_images
from leaderboard import compare
from methods.brain_it.generate import GenerationSettings, semantic_images
from metrics.identification import correlation_matrix

pytestmark = pytest.mark.timeout(900)  # the first test that needs the small sweep waits for it
ROOT = Path(__file__).parents[2]


def call(*arguments: object) -> int:
    return main_guard(lambda: main([str(argument) for argument in arguments]))


# --- names ------------------------------------------------------------------------------------------------------------


def test_report_and_stages_agree_on_names() -> None:
    assert report.image_name is reconstruct.image_name is score.image_name is stages.image_name
    assert report.seen_name is reconstruct.seen_name is score.seen_name is stages.seen_name
    assert report.METHOD is score.METHOD is stages.METHOD
    assert (image_name(3, 21), seen_name(72999), stages.METHOD) == ("subj03_nsd00021.png", "nsd72999.png", "Brain-IT")


# --- sheets -----------------------------------------------------------------------------------------------------------


def plain(*levels: int) -> np.ndarray:
    return np.stack([np.full((64, 64, 3), level, np.uint8) for level in levels])


def test_pictures_lie_in_their_cells_in_order() -> None:
    sheet = evidence.contact_sheet({"seen": plain(10, 20, 30), "combined": plain(40, 50, 60)})
    assert sheet.size == (110 + 3 * 76 + 8, 8 + 2 * 76 + 8)
    pixels = np.asarray(sheet)
    for row, levels in enumerate(((10, 20, 30), (40, 50, 60))):
        for column, level in enumerate(levels):
            top, left = 8 + 76 * row, 110 + 76 * column
            cell = pixels[top : top + 76, left : left + 76]
            assert (cell[:72, :72] == level).all() and (cell[72:] == 255).all() and (cell[:, 72:] == 255).all()
        assert (pixels[8 + 76 * row : 84 + 76 * row, 8:106] < 128).any(), "a label"
    assert (pixels[:, 106:110] == 255).all(), "no label runs into a picture"


def test_rows_are_repeated_below_where_columns_are_few() -> None:
    sheet = evidence.contact_sheet({"seen": plain(10, 20, 30), "true tokens": plain(40, 50, 60)}, cell=32, columns=2)
    assert sheet.size == (110 + 2 * 32 + 8, 8 + 4 * 32 + 8)
    pixels = np.asarray(sheet)[24 : 24 + 4 * 32 : 32, 126 : 126 + 2 * 32 : 32, 0]
    assert pixels.tolist() == [[10, 20], [40, 50], [30, 255], [60, 255]]


# --- two-way identification within a place ----------------------------------------------------------------------------


@pytest.mark.parametrize("ties", ["half", "strict"])
def test_same_place_two_way_is_a_count(ties: Any) -> None:
    rng = np.random.default_rng(0)
    places = [str(place) for place in rng.choice(["beach", "city", "room"], 20)] + ["night"]
    r = np.round(rng.uniform(-1, 1, (21, 21)), 1)  # rounded, so that some tie
    expected = []
    for j, place in enumerate(places):
        points = [
            1.0 if r[i, j] < r[j, j] else 0.5 * (ties == "half") * (r[i, j] == r[j, j])
            for i in range(21)
            if i != j and places[i] == place
        ]
        expected.append(sum(points) / len(points) if points else np.nan)
    assert np.isnan(expected[-1]) and np.isfinite(expected[:-1]).all()
    np.testing.assert_allclose(evidence.same_place_two_way(r, places, ties), expected, atol=1e-12)


# --- a finished sweep -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes for the small sweep."""
    out = tmp_path_factory.mktemp("evidence")
    assert call("pictures", "--runs", tiny_run.out, "--out", out, "--subject", 2, "--count", 3) == 0
    return out


def small(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((72, 72), Image.Resampling.LANCZOS))


def test_the_sheet_shows_the_first_test_images_of_the_subject(tiny_run: Any, made: Path) -> None:
    folder = tiny_run.folder("reconstruct")
    ids = [image for subject, image in np.load(folder / "index.npy").tolist() if subject == 2][:3]
    sheet = np.asarray(Image.open(made / "contact.png"))
    assert sheet.shape == (8 + 5 * 76 + 8, 110 + 3 * 76 + 8, 3)
    rows = {0: read_images(folder / "seen", [seen_name(image) for image in ids])}
    rows |= {k: read_images(folder / kind, [image_name(2, i) for i in ids]) for k, kind in enumerate(KINDS, start=2)}
    for row, images in rows.items():
        for column, image in enumerate(images):
            cell = sheet[8 + 76 * row : 80 + 76 * row, 110 + 76 * column : 182 + 76 * column]
            assert np.array_equal(cell, small(image)), (row, column)
    with Image.open(made / "true-tokens.png") as other:
        assert other.size == (110 + 3 * 132 + 8, 8 + 2 * 132 + 8)


def test_the_second_row_is_the_shipped_generator_fed_true_tokens(tiny_run: Any, made: Path) -> None:
    folder, variant = tiny_run.folder("reconstruct"), tiny_run.variants["clusters=128"]
    image = int(np.load(folder / "index.npy")[-2, 1])
    seen = torch.from_numpy(read_images(folder / "seen", [seen_name(image)])).permute(0, 3, 1, 2) / 255
    g = variant.generation
    settings = GenerationSettings(g.steps, g.start_step, g.guidance, g.offset_noise, g.contrast)
    with torch.no_grad():
        tokens = networks.semantic_network("lite0")(seen)
        expected = semantic_images(networks.generator("demo"), tokens, settings, [image_seed(0, 2, image)])
    pixels = np.rint(expected[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    sheet = np.asarray(Image.open(made / "contact.png"))
    cell = sheet[8 + 76 : 80 + 76, 110 + 76 * 2 : 182 + 76 * 2]
    assert np.abs(cell.astype(int) - small(pixels)).max() <= 3


def test_means_are_those_of_all_images_and_subjects(tiny_run: Any, made: Path) -> None:
    found = json.loads((made / "pictures.json").read_text())
    assert (found["variant"], found["subjects"], found["n_images"]) == ("clusters=128", [1, 2], 4)
    assert (tiny_run.out / found["source"]) == tiny_run.folder("score")
    assert list(found["rows"]) == ["low-level", "semantic", "combined", "true tokens", "mean image", "shuffled"]
    kept = [pq.read_table(tiny_run.folder(role) / "scores.parquet").to_pandas() for role in ("score", "references")]
    for title, variant, table in (
        ("low-level", "lowlevel", kept[0]),
        ("combined", "combined", kept[0]),
        ("shuffled", "shuffled", kept[1]),
    ):
        means = table[table.variant == variant].groupby("metric").value.mean()
        assert found["rows"][title]["PixCorr"]["mean"] == pytest.approx(means["PixCorr"])
        assert found["rows"][title]["two-way"]["mean"] == pytest.approx(means["CLIP"])
    assert found["rows"]["shuffled"]["same place"] is None
    ceiling = found["rows"]["true tokens"]["PixCorr"]
    assert ceiling["ci_low"] <= ceiling["mean"] <= ceiling["ci_high"] and ceiling["mean"] > 0.3


def test_same_place_means_agree_with_the_scene_descriptions(tiny_run: Any, made: Path) -> None:
    folder = tiny_run.folder("reconstruct")
    index = np.load(folder / "index.npy")
    lite2 = networks.feature_network("lite2")

    def features(images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        pixels = torch.nn.functional.interpolate(pixels, (128, 128), mode="bilinear", align_corners=False)
        with torch.no_grad():
            return lite2.features(pixels, ["pooled"])["pooled"].numpy()

    scores = []
    for subject in (1, 2):
        ids = index[index[:, 0] == subject, 1].tolist()
        seen = features(read_images(folder / "seen", [seen_name(image) for image in ids]))
        r = correlation_matrix(seen, features(read_images(folder / "combined", [image_name(subject, i) for i in ids])))
        places = [describe_scene(0, image).place for image in ids]
        for j, place in enumerate(places):
            rivals = [i for i in range(len(ids)) if i != j and places[i] == place]
            scores += [np.mean([r[i, j] < r[j, j] for i in rivals])] if rivals else []
    found = json.loads((made / "pictures.json").read_text())
    if not scores:
        assert found["rows"]["combined"]["same place"] is None
    else:
        assert found["rows"]["combined"]["same place"]["mean"] == pytest.approx(np.mean(scores))
    assert found["images of a place that others show"] == len(scores) / 2


def test_the_combined_image_is_compared_image_by_image(tiny_run: Any, made: Path) -> None:
    import pyarrow as pa

    found = json.loads((made / "pictures.json").read_text())["combined image"]
    asked = [(entry["against"], entry["metric"]) for entry in found]
    assert {("mean image", "PixCorr"), ("shuffled", "PixCorr"), ("low-level", "CLIP"), ("semantic", "PixCorr")} <= set(
        asked
    )
    kept = [pq.read_table(tiny_run.folder(role) / "scores.parquet") for role in ("score", "references")]
    table = pa.concat_tables([part.replace_schema_metadata() for part in kept])
    for against, other, metric in (
        ("mean image", ("reference", "mean image"), "PixCorr"),
        ("low-level", ("Brain-IT", "lowlevel"), "CLIP"),
    ):
        expected = compare(table, ("Brain-IT", "combined"), other, metrics=[metric])[metric]
        entry = found[asked.index((against, metric))]
        assert (entry["difference"], entry["p"]) == pytest.approx((expected.difference, expected.p))


def test_the_terminal_gets_the_same_numbers(
    tiny_run: Any, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("pictures", "--runs", tiny_run.out, "--out", tmp_path, "--subject", 2, "--count", 3) == 0
    for name in ("contact.png", "true-tokens.png", "pictures.json"):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes(), "the same again"
    out = capsys.readouterr().out
    rows = json.loads((made / "pictures.json").read_text())["rows"]
    for title, row in rows.items():
        line = next(line for line in out.splitlines() if line.startswith(title))
        assert f"{row['PixCorr']['mean']:.3f}" in line and f"{100 * row['two-way']['mean']:.1f} %" in line
    assert "stand-in EfficientNet-Lite2, pooled" in out and "combined against mean image: PixCorr" in out


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_missing_run_is_named_with_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("pictures", "--out", "pictures") == 2
    error = capsys.readouterr().err
    assert error == "error: runs: holds no finished sweep (no leaderboard/leaderboard.json)\ntype: make demo\n"
    assert call("pictures", "--runs", "elsewhere", "--out", "pictures") == 2
    assert 'make demo ARGS="--out elsewhere"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clusters", 99], "has no variant clusters=99; it has clusters="),
        (["--subject", 5], "subject 5 was not reconstructed; choose from 1, 2"),
    ],
)
def test_what_the_run_does_not_have(
    tiny_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[Any], message: str
) -> None:
    assert call("pictures", "--runs", tiny_run.out, "--out", tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


def test_results_that_were_deleted(tiny_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny_run.out / "leaderboard", tmp_path / "runs" / "leaderboard")
    assert call("pictures", "--runs", tmp_path / "runs", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "is no finished result" in error and "make demo" in error


@pytest.mark.parametrize("arguments", [["--count", "0"], ["--clusters", "many"], ["--coutn", "3"]])
def test_a_slip_is_one_line(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["pictures", "--out", str(tmp_path), *arguments])
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_an_out_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert call("generator", "--out", tmp_path / "file") == 2
    assert "cannot be made" in capsys.readouterr().err


def test_help_brings_in_nothing_heavy() -> None:
    code = (
        "import sys; from benchmark.evidence.__main__ import build_parser; p = build_parser(); p.format_help();"
        "print(*{'torch', 'numpy', 'pyarrow', 'timm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# --- without a run ----------------------------------------------------------------------------------------------------


def test_the_generator_on_fresh_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("generator", "--images", 3, "--seed", 7, "--out", tmp_path) == 0
    found = json.loads((tmp_path / "generator.json").read_text())
    assert (found["n_images"], found["seed"], list(found["rows"])) == (3, 7, ["true tokens", "autoencoder"])
    rows = {title: row["PixCorr"]["mean"] for title, row in found["rows"].items()}
    assert rows["autoencoder"] > 0.8 and rows["autoencoder"] > rows["true tokens"] > 0.2
    scenes, _ = render_scenes(3, 7)
    sheet = np.asarray(Image.open(tmp_path / "generator.png"))
    assert sheet.shape == (8 + 3 * 132 + 8, 110 + 3 * 132 + 8, 3)
    for column, scene in enumerate(scenes):
        cell = sheet[8:136, 110 + 132 * column : 238 + 132 * column]
        assert np.array_equal(cell, np.asarray(Image.fromarray(scene).resize((128, 128), Image.Resampling.LANCZOS)))
    assert "3 fresh scenes, seed 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", RESERVED_SEED], "the generator was trained on its scenes"),
        (["--seed", -1], "expected 0 or more"),
        (["--images", 1], "expected 2 or more"),
    ],
)
def test_scenes_that_would_prove_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[Any], message: str
) -> None:
    assert call("generator", "--out", tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


def test_learning_gets_what_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("benchmark.evidence.learning.learning", lambda *given, **rest: calls.append((given, rest)))
    assert call("learning", "--out", tmp_path) == 0
    assert call("learning", "--store", "s", "--out", tmp_path, "--quick", "--branches", "lowlevel", "--seeds", 1) == 0
    assert [given for given, _ in calls] == [(Path("runs/store"), tmp_path), (Path("s"), tmp_path)]
    first, second = (rest for _, rest in calls)
    assert (list(first["branches"]), first["quick"]) == (["semantic", "lowlevel"], False)
    assert (list(second["branches"]), second["quick"], second["seeds"]) == (["lowlevel"], True, 1)
