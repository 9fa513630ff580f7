"""Result folders: a row and its per-image scores together, found again by id, by variant and from any folder above."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from leaderboard.results import find, read_results, write_result
from leaderboard.schema import Interval, Row, row_id, write_leaderboard


def make(variant: str, **fields: object) -> Row:
    known: dict[str, object] = {
        "method": "Brain-IT",
        "variant": variant,
        "track": "demo",
        "protocol": "demo",
        "protocol_hash": "ab" * 16,
        "subjects": (1,),
        "n_images": 3,
        "metrics": {"PixCorr": Interval(mean=0.5)},
        "source": "a run",
    }
    return Row.model_validate(known | fields)


def per_image(*variants: str) -> pa.Table:
    rows = [
        ("demo", "Brain-IT", variant, 1, 0, image, "PixCorr", 0.1 * image) for variant in variants for image in range(3)
    ]
    names = ("track", "method", "variant", "subject", "seed", "image_id", "metric", "value")
    return pa.table({name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})


def test_a_row_keeps_its_own_scores_and_no_others(tmp_path: Path) -> None:
    table = per_image("a", "b")
    for variant in ("a", "b"):
        write_result(tmp_path, make(variant), table)
    a, b = read_results(tmp_path)
    assert [a.row.variant, b.row.variant] == ["a", "b"]
    own = a.per_image()
    assert own is not None and set(own["variant"].to_pylist()) == {"a"} and own.num_rows == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{row_id(r.row)}.{ending}" for r in (a, b) for ending in ("json", "parquet")
    )


def test_results_are_found_from_the_run_the_leaderboard_the_folder_and_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "leaderboard" / "results"
    file = write_result(folder, make("a"), per_image("a"))
    write_leaderboard(tmp_path / "leaderboard" / "leaderboard.json", [make("a")])
    for path in (tmp_path, tmp_path / "leaderboard", folder, file, tmp_path / "leaderboard" / "leaderboard.json"):
        (found,) = read_results(path)
        assert found.row == make("a") and found.scores == file.with_suffix(".parquet"), path


def test_a_row_without_scores_has_none(tmp_path: Path) -> None:
    write_result(tmp_path, make("a"))
    (found,) = read_results(tmp_path)
    assert found.scores is None and found.per_image() is None


def test_scores_of_another_row_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no per-image scores of Brain-IT a"):
        write_result(tmp_path, make("a"), per_image("b"))
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_a_row_is_found_by_id_and_by_variant(tmp_path: Path) -> None:
    for variant in ("clusters=8", "clusters=16"):
        write_result(tmp_path, make(variant))
    write_result(tmp_path, make("clusters=8", seeds=(1,)))
    results = read_results(tmp_path)
    assert find(results, row_id(make("clusters=8", seeds=(1,)))).row.seeds == (1,)
    assert find(results, "clusters=16").row.variant == "clusters=16"
    with pytest.raises(ValueError, match="several rows are named 'clusters=8'"):
        find(results, "clusters=8")
    with pytest.raises(ValueError, match="did you mean 'clusters=16'"):
        find(results, "cluster=16")


def test_a_place_without_results_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results; name the --out folder"):
        read_results(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder"):
        read_results(tmp_path / "nowhere")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json: not a result row"):
        read_results(tmp_path)


def test_a_damaged_parquet_is_named(tmp_path: Path) -> None:
    file = write_result(tmp_path, make("a"), per_image("a"))
    file.with_suffix(".parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match=r"\.parquet: not a Parquet file"):
        read_results(tmp_path)[0].per_image()
