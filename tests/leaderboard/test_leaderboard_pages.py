"""What stands on the pages of runs and pairs: the numbers of the rows, in a size that can be sent."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import leaderboard
from leaderboard.published import published
from leaderboard.ranking import rank
from leaderboard.schema import Cost, Row, row_id
from leaderboard.site import Chapter, build_report, telling
from leaderboard.site.chapters import named_axes
from leaderboard.statistics import compare, scores
from metrics.cards import CARDS

Sweep = Callable[..., SimpleNamespace]


def data_of(text: str) -> list[dict[str, Any]]:
    found = re.search(r'id="data">(.*?)</script>', text, re.S)
    assert found is not None
    return json.loads(found[1])


def unpacked(group: dict[str, Any], row: dict[str, Any]) -> np.ndarray:
    """The scores (metrics, subjects, images) that the page's script reads."""
    whole = np.frombuffer(base64.b64decode(row["values"]), f"<u{group['width']}").astype(float)
    whole = whole.reshape(len(group["metrics"]), len(group["subjects"]), len(group["images"]))
    whole[whole == 256 ** group["width"] - 1] = np.nan
    low, step = (np.array([m[name] for m in group["metrics"]])[:, None, None] for name in ("low", "step"))
    return low + whole * step


@pytest.mark.parametrize("width", [2, 1])
def test_the_pair_page_holds_every_score_and_the_comparisons_of_the_command(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    fake = sweep(None, {"clusters=8": 8, "clusters=64": 64}, n_images=6)
    data = scores(fake.per_image, "demo")
    data.values[0, 0, 1, 2] = np.nan  # one image that nobody scored
    chapter = Chapter(rank(fake.rows), "title", per_image=data)
    if width == 1:
        monkeypatch.setattr(pair_page_module(), "BYTES", data.values.size + 1)
    (group,) = data_of(pair_page_module().pair_page([chapter], [{}], "title"))
    assert (group["width"], len(group["rows"]), group["all"]) == (width, 4, 6)
    names = [row["name"] for row in group["rows"]]
    for row in group["rows"]:
        key = next(r.key for r in fake.rows if r.name == row["name"])
        expected = data.values[data.row(key)]
        steps = np.array([metric["step"] for metric in group["metrics"]])[:, None, None]
        assert np.nanmax(np.abs(unpacked(group, row) - expected) / np.maximum(steps, 1e-12)) <= 0.5001
        assert np.array_equal(np.isnan(unpacked(group, row)), np.isnan(expected))
    a, b = names.index("clusters=8"), names.index("clusters=64")
    told = group["pairs"][f"{min(a, b)} {max(a, b)}"]
    if isinstance(told, str):
        assert "not the same subjects and images" in told
    else:
        first, second = (("Brain-IT", names[k]) for k in sorted((a, b)))
        for key, one in compare(data, first, second).items():
            assert told[key] == pytest.approx(
                [one.mean_a, one.mean_b, one.difference, one.ci_low, one.ci_high, one.p, one.q], rel=1e-5
            )


def pair_page_module() -> Any:
    import importlib

    return importlib.import_module("leaderboard.site.pair_page")


def test_what_does_not_fit_is_left_out_by_what_it_tells(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = sweep(None, {"clusters=8": 8, "clusters=64": 64}, n_images=20)
    data = scores(fake.per_image, "demo")
    keys = [("Brain-IT", "clusters=8"), ("Brain-IT", "clusters=64")]
    data.values[data.row(keys[0]), :, :, 13] += [[0.5 if c.direction == "higher" else -0.5] for c in CARDS.values()]
    order = telling(data, keys)
    assert order[0] == 13 and sorted(order) == list(range(20))
    monkeypatch.setattr(pair_page_module(), "BYTES", data.values.size // 2)
    (group,) = data_of(pair_page_module().pair_page([Chapter(rank(fake.rows), "t", per_image=data)], [{}], "t"))
    assert (len(group["images"]), group["all"], group["width"]) == (10, 20, 1) and "113" in group["images"]


def test_thirty_rows_with_all_that_belongs_to_them_stay_below_two_megabytes(
    tmp_path: Path, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = sweep(None, {f"clusters={k}": float(k) for k in range(2, 32)})
    data = scores(fake.per_image, "demo")
    once = compare(data, data.keys[0], data.keys[1])
    monkeypatch.setattr(pair_page_module(), "compare", lambda *_: once)
    config = {f"section{k % 9}.setting_{k}": k / 7 for k in range(260)}
    rows = [
        row.model_copy(
            update={
                "config": config,
                "changed": {f"section{k}.setting_{k}": 1 for k in range(9)},
                "cost": Cost(wall_s=k),
            }
        )
        for k, row in enumerate(fake.rows)
    ]
    build_report(tmp_path, [Chapter(rank(rows), "Large", per_image=data)], title="Large")
    sizes = {path.name: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 1_700_000, sizes  # and room for what shows images
    assert len(list(tmp_path.glob("run-*.html"))) == 33


def test_a_run_says_its_settings_cost_manifest_and_what_it_repeats(tmp_path: Path, row: Callable[..., Row]) -> None:
    own = row(
        "clusters=8",
        {"PixCorr": {"mean": 0.3, "ci_low": 0.2, "ci_high": 0.4}, "CLIP": 0.8},
        config={"clustering.n_clusters": 8, "b": "<x>"},
        changed={"clustering.n_clusters": 128},
        answers="brainit_T3_k8",
        cost={"wall_s": 7200, "peak_memory_bytes": 2 * 10**9},
        manifest={"git": "abc", "weights": {"judge": "ff"}},
    )
    leaderboard.build(tmp_path, [own, row("chance", {"CLIP": 0.5}, kind="reference")])
    text = (tmp_path / f"run-{row_id(own)}.html").read_text()
    assert text.index("clustering.n_clusters") < text.index("1 settings as in the preset") < text.index("&lt;x&gt;")
    for part in ("2.00 h", "2.00 GB", "abc", "judge", "brainit_T3_k8", "whose numbers do not compare", "stand-in"):
        assert part in text
    assert published()["brainit_T3_k8"].cell("PixCorr") not in text, "no printed number on the demo track"


def test_names_of_variants_tell_an_axis(row: Callable[..., Row]) -> None:
    rows = [row(f"clusters={k}", {}) for k in (8, 64, 512)] + [row("external=0.5", {}), row("x=1y", {})]
    (axis,) = named_axes(rows)
    assert (axis.name, axis.log, list(axis.values.values())) == ("clusters", True, [8, 64, 512])
