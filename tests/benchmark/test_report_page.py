"""What sweeps found, kept and read again, and all of it on one page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from benchmark.errors import UserError
from benchmark.report import __main__ as command
from benchmark.report.answers import Answer, read_answers, write_page
from benchmark.report.grids import grid
from leaderboard.orderings import Ordering
from leaderboard.results import write_result
from leaderboard.schema import Row
from leaderboard.site import Axis, Gallery
from leaderboard.statistics import summarise

METRICS = ("PixCorr", "Eff")


def per_image(variants: dict[str, float]) -> pa.Table:
    rng = np.random.default_rng(0)
    rows = []
    for variant, shift in variants.items():
        for subject in (1, 2):
            for image in range(20):
                value = float(rng.uniform(0.3, 0.5) + shift)
                head = ("demo", "Brain-IT", variant, subject, 0, image)
                rows += [(*head, "PixCorr", value), (*head, "Eff", 1 - value)]
    names = ("track", "method", "variant", "subject", "seed", "image_id", "metric", "value")
    return pa.table({name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})


def finished(out: Path, sweep: str, variants: dict[str, float]) -> Answer:
    """A finished sweep with its rows, scores and images."""
    table = per_image(variants)
    rows = []
    for (method, variant), metrics in summarise(table).items():
        row = Row(
            method=method,
            variant=variant,
            track="demo",
            protocol="demo",
            protocol_hash="ab" * 16,
            subjects=(1, 2),
            n_images=20,
            metrics=metrics,
            source="x",
        )
        write_result(out / "leaderboard" / "results", row, table)
        rows.append(row)
    galleries = []
    for k, variant in enumerate(variants):
        files = {}
        for j, name in enumerate(("seen", "lowlevel", "semantic", "combined")):
            files[name] = out / "store" / f"{sweep}-{k}-{name}.png"
            files[name].parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), 20 * j + 60 * k, np.uint8)).save(files[name])
        galleries.append(Gallery(variant, 1, 7, pixcorr={"combined": 0.5}, **files))
    first, *others = variants
    orderings = tuple(
        Ordering(v, first, "PixCorr", -0.1, -0.12, -0.08, 0.001, 0.001, 1, 1, printed=-0.01, verdict="holds")
        for v in others
    )
    answer = Answer(
        sweep=sweep,
        title=f"About <{sweep}>?",
        question="Why & how?",
        table="Table T3",
        rows=tuple(rows),
        notes={"Eff": "a stand-in"},
        sentences=("It is so.",),
        orderings=orderings,
        axis=Axis(sweep, {v: float(k + 1) for k, v in enumerate(variants)}),
        galleries=tuple(galleries),
        pictures={variant: (variant, "combined") for variant in variants},
    )
    answer.save(out)
    return answer


@pytest.fixture
def out(tmp_path: Path) -> Path:
    finished(tmp_path, "clusters", {"clusters=128": 0.1, "clusters=8": 0.0})
    finished(tmp_path, "external", {"external=1": 0.05, "external=0": 0.0, "external=0.5": 0.03})
    return tmp_path


def test_an_answer_is_read_as_it_was_saved_also_from_another_place(out: Path, tmp_path: Path) -> None:
    saved = finished(out, "clusters", {"clusters=128": 0.1, "clusters=8": 0.0})
    read = read_answers(out)[0]
    assert read == saved
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    out.rename(moved)
    again = read_answers(moved)[0]
    assert [one.seen.is_relative_to(moved) for one in again.galleries] == [True, True]


def test_the_page_has_a_chapter_a_sweep_with_table_curves_orderings_and_images(out: Path) -> None:
    page, text = write_page(out, out / "report", read_answers(out))
    html = page.read_text()
    assert html.count('<section class="chapter" id="part') == 2 and html.count("<tbody data-ranked>") == 2
    assert "About &lt;clusters&gt;?" in html and "About <clusters>" not in html
    assert html.count("The orderings of Table T3") == 2 and "worse: holds" in html
    assert html.count("<h1") == 1 and html.count("Seen and reconstructed</h3>") == 2
    idents = re.findall(r'id="([^"]+)"', html)
    assert len(idents) == len(set(idents)), "ids are unique on the page"
    for link in re.findall(r'href="#([^"]+)"', html):
        assert link in idents
    shown = set(re.findall(r"images/([0-9a-f]{20}\.png)", html))
    assert shown == {file.name for file in (page.parent / "images").iterdir()}
    assert not re.findall(r'(?:src|href)="https?:', html), "nothing is asked of any server"
    lines = text.read_text()
    assert lines.count("\n## ") == 2 and "| clusters=8 | worse: holds |" in lines and "It is so." in lines
    assert "No number compares with a published one" in lines


def test_curves_stand_beside_the_markdown_as_pictures_of_their_own(out: Path) -> None:
    _, text = write_page(out, out / "report", read_answers(out))
    for sweep, points in (("clusters", 2), ("external", 3)):
        assert f"against {sweep}, with 95 % intervals](curves/{sweep}.svg)" in text.read_text()
        root = ElementTree.parse(out / "report" / "curves" / f"{sweep}.svg").getroot()
        panels = [one for one in root if one.tag.endswith("}svg")]
        assert len(panels) == len(METRICS)
        for panel in panels:
            assert len([one for one in panel if one.get("class") == "dot"]) == points
            assert len([one for one in panel if one.get("class") == "bar"]) == points
        titles = [one.text for one in root if one.get("class") == "title"]
        assert titles == ["PixCorr ↑", "Eff ↓"]


def test_a_grid_shows_what_each_variant_makes_of_the_same_images(out: Path) -> None:
    page, text = write_page(out, out / "report", read_answers(out))
    for sweep, variants in (("clusters", 2), ("external", 3)):
        assert f"(grids/{sweep}.png)" in text.read_text()
        assert f'<img class="grid" src="grids/{sweep}.png" alt="About &lt;{sweep}&gt;?' in page.read_text()
        with Image.open(out / "report" / "grids" / f"{sweep}.png") as sheet:
            pixels = np.asarray(sheet)
        rows = 1 + variants  # as seen, then a row a variant
        height = (pixels.shape[0] - 16) // rows
        assert height == 76
        middles = [pixels[8 + height * k + height // 2, -8 - height + 30].tolist() for k in range(rows)]
        assert middles == [[0, 0, 0], *([60 + 60 * k] * 3 for k in range(variants))], "combined images, in order"


def test_a_grid_shows_the_images_that_a_variant_stands_for_and_only_images_that_all_have(tmp_path: Path) -> None:
    def one(variant: str, image: int, subject: int = 1) -> Gallery:
        files = {}
        for k, name in enumerate(("seen", "lowlevel", "semantic", "combined")):
            files[name] = tmp_path / f"{variant}-{subject}-{image}-{name}.png"
            Image.fromarray(np.full((8, 8, 3), 10 * image + k, np.uint8)).save(files[name])
        return Gallery(variant, subject, image, **files)

    def column(sheet: np.ndarray, rows: int, from_right: int) -> list[int]:
        return sheet[[8 + 76 * k + 30 for k in range(rows)], -8 - 76 * from_right + 30, 0].tolist()

    galleries = [one("a", 1), one("a", 2), one("a", 3), one("b", 3), one("b", 2), one("b", 2, subject=2)]
    sheet = np.asarray(grid(galleries, {"a": ("a", "lowlevel"), "b": ("b", "combined")}))
    assert sheet.shape[0] == 16 + 3 * 76, "seen, a, b"
    assert (column(sheet, 3, 2), column(sheet, 3, 1)) == ([20, 21, 23], [30, 31, 33]), "images 2 and 3"
    branches = np.asarray(grid([one("a", 1)], {"a": ("a", "combined")}))
    assert column(branches, 4, 1) == [10, 11, 12, 13], "all branches of one"
    named = {"low": ("a", "lowlevel"), "both": ("a", "combined"), "refined": ("a", "semantic-refined")}
    assert column(np.asarray(grid([one("a", 1)], named)), 3, 1) == [10, 11, 13], "variants that are branches of one"
    assert grid([], {}) is None and grid([one("a", 1), one("b", 2)], {"a": ("a", "combined")}) is None


def test_ranks_know_their_uncertainty_from_the_scores_beside_the_rows(out: Path) -> None:
    answer = read_answers(out)[0]
    table = answer.per_image(out)
    assert table is not None and table.num_rows == 2 * 2 * 20 * 2
    for file in (out / "leaderboard" / "results").glob("*.parquet"):
        file.unlink()
    assert answer.per_image(out) is None
    write_page(out, out / "report", [answer])


def test_images_that_are_gone_leave_the_rest_of_the_page(out: Path) -> None:
    (out / "store" / "clusters-0-seen.png").unlink()
    answers = read_answers(out)
    assert [len(answer.galleries) for answer in answers] == [1, 3]
    write_page(out, out / "report", answers)


def test_an_answer_of_the_first_schema_is_read(out: Path) -> None:
    file = out / "sweeps" / "clusters" / "answer.json"
    data = json.loads(file.read_text())
    del data["differences"]
    file.write_text(json.dumps({**data, "schema_version": 1}))
    old = read_answers(out)[0]
    assert old.differences == ()
    assert len(old.orderings) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema_version": 99}, "schema version 99; this release reads up to 2"),
        ({"rows": [{"method": "x"}]}, "not a sweep's answer"),
        ({"galleries": [{"seen": 3}]}, "not a sweep's answer"),
        ({"surprise": 1}, "not a sweep's answer"),
        ({"axis": {"name": "x"}}, "not a sweep's answer"),
    ],
)
def test_a_damaged_answer_is_named(out: Path, change: dict[str, Any], told: str) -> None:
    file = out / "sweeps" / "clusters" / "answer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError) as refused:
        read_answers(out)
    assert told in str(refused.value) and str(file) in str(refused.value)


def test_the_command(out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*words: object) -> int:
        monkeypatch.setattr("sys.argv", ["benchmark.report", *map(str, words)])
        return command.main_guard(command.main)

    assert call("--out", out, "external") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{out / 'report' / 'report.md'}: 1 sweep"
    assert call("--out", out, "extrnal") == 2
    assert "did you mean 'external'" in capsys.readouterr().err
    assert call("--out", out / "nowhere") == 2
    assert "no finished sweep; type: python -m benchmark.sweep" in capsys.readouterr().err
