from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from leaderboard import schema
from leaderboard.schema import Interval, Row, read_leaderboard, read_row, read_rows, write_leaderboard, write_row

GOLDEN = Path(__file__).parent / "golden"
HISTORIC = Path(__file__).parent / "historic"


def test_golden_row_reads_and_writes_unchanged(tmp_path):
    row = read_row(GOLDEN / "row.json")
    assert row.metrics["PixCorr"].ci_high == 0.354
    assert row.manifest.seeds == {"data": 0, "training": 1}
    assert write_row(tmp_path, row).read_bytes() == (GOLDEN / "row.json").read_bytes()


@pytest.mark.parametrize("version", range(1, schema.SCHEMA_VERSION))
def test_rows_of_every_older_version_are_read_and_written_as_of_today(version, tmp_path):
    folder = HISTORIC / f"v{version}"
    old = json.loads((folder / "row.json").read_text())
    assert old["schema_version"] == version
    row = read_row(folder / "row.json")
    assert row.schema_version == schema.SCHEMA_VERSION
    same = {name: value for name, value in old.items() if name != "schema_version"}
    kept = json.loads(write_row(tmp_path, row).read_text())
    assert {name: kept[name] for name in same} == same, "nothing is lost"
    assert read_row(tmp_path / f"{schema.row_id(row)}.json") == row
    assert read_leaderboard(folder / "leaderboard.json")[0] == row
    assert not list(tmp_path.glob("*.tmp"))


def test_every_older_version_has_a_step_and_a_fixture():
    assert sorted(schema.UPGRADES) == list(range(1, schema.SCHEMA_VERSION))
    assert sorted(path.name for path in HISTORIC.iterdir()) == [f"v{v}" for v in range(1, schema.SCHEMA_VERSION)]


def test_a_later_version_is_refused_with_what_to_do(tmp_path):
    later = {**json.loads((GOLDEN / "row.json").read_text()), "schema_version": schema.SCHEMA_VERSION + 1, "new": 1}
    (tmp_path / "row.json").write_text(json.dumps(later))
    with pytest.raises(ValueError, match=r"row.json: .*of schema version 3; this release reads up to 2, so update it"):
        read_row(tmp_path / "row.json")


def test_rows_round_trip_and_a_second_write_replaces(tmp_path, row):
    first, second = row("clusters=8", {"SSIM": 0.3}), row("clusters=16", {"SSIM": 0.4})
    paths = [write_row(tmp_path, item) for item in (first, second, first)]
    assert paths[0] == paths[2] != paths[1]
    assert sorted(read_rows(tmp_path), key=lambda item: item.variant) == [second, first]
    write_leaderboard(tmp_path / "out" / "leaderboard.json", [first, second])
    assert read_leaderboard(tmp_path / "out" / "leaderboard.json") == [first, second]
    assert not list(tmp_path.rglob("*.tmp"))


def test_file_names_are_safe_and_distinct(tmp_path, row):
    names = {write_row(tmp_path, row(variant, {})).name for variant in ("a/b", "a b", "../a b", "ä" * 300, "")}
    assert len(names) == 5
    assert all(len(name) < 120 and "/" not in name for name in names)
    assert {path.name for path in tmp_path.iterdir()} == names


def test_metrics_are_kept_in_canonical_order(row):
    assert list(row("x", {"LPIPS": 0.5, "CLIP": 0.8, "PixCorr": 0.1}).metrics) == ["PixCorr", "CLIP", "LPIPS"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metrics", {"Pixcorr": {"mean": 0.1}}),
        ("metrics", {"SSIM": {"mean": float("nan")}}),
        ("subjects", (0,)),
        ("subjects", ()),
        ("n_images", 0),
        ("protocol_hash", "not hex"),
        ("kind", "other"),
        ("schema_version", 3),
        ("schema_version", 0),
        ("schema_version", "1"),
        ("surprise", 1),
    ],
)
def test_bad_rows_are_refused(row, field, value):
    good = row("x", {"SSIM": 0.3}).model_dump()
    with pytest.raises(ValidationError, match=field if field != "metrics" else "metric"):
        Row.model_validate({**good, field: value})


def test_intervals_have_both_bounds_in_order_or_none():
    Interval(mean=0.5)
    with pytest.raises(ValidationError, match="both"):
        Interval(mean=0.5, ci_low=0.4)
    with pytest.raises(ValidationError, match="above"):
        Interval(mean=0.5, ci_low=0.6, ci_high=0.4)


def test_rows_are_frozen(row):
    with pytest.raises(ValidationError):
        row("x", {}).variant = "y"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ("[]", "expected"),
        ('{"rows": 3}', "expected"),
        ('{"rows": [{"method": ""}]}', r"rows\[0\]\.method"),
        ("\udcff", "not JSON"),
    ],
)
def test_a_broken_leaderboard_names_file_and_field(tmp_path, content, says):
    path = tmp_path / "leaderboard.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=says) as error:
        read_leaderboard(path)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    schema.write_atomically(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(schema.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        schema.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_nothing_heavy_is_imported_before_it_is_used():
    code = (
        "import sys, leaderboard; early = set(sys.modules);"
        "from leaderboard import build, print_table, Row; import json;"
        "print(json.dumps([sorted({'numpy', 'pandas', 'pydantic', 'torch'} & early), 'torch' in sys.modules,"
        "'pandas' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], False, False]
