"""Arrays that are written run by run: whatever happens in between, what is finished is whole and nothing is done twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.data.arrays import ArrayRecord, ArrayWriter, damages

VALUES = np.arange(7 * 3, dtype=np.float16).reshape(7, 3) / 3


def _writer(folder: Path, **changes: object) -> ArrayWriter:
    options = {"shape": VALUES.shape, "dtype": np.float16, "run": 2, "identity": {"made of": "this"}, **changes}
    return ArrayWriter(folder / "array.npy", **options)  # type: ignore[arg-type]


def _fill(writer: ArrayWriter, runs: list[int] | None = None) -> list[int]:
    """Write what is left (or some of it); return which runs that were."""
    wanted = [k for k in writer.todo if runs is None or k in runs]
    for number in wanted:
        start, stop = writer.bounds(number)
        writer.write(number, VALUES[start:stop])
    return wanted


def _finish(writer: ArrayWriter) -> ArrayRecord:
    record = writer.finish()
    writer.forget()
    return record


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 9), columns=st.integers(1, 4), run=st.integers(1, 5), order=st.randoms())
def test_a_finished_array_is_what_numpy_would_have_saved(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, run: int, order: object
) -> None:
    folder = tmp_path_factory.mktemp("array")
    values = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)
    writer = ArrayWriter(folder / "a.npy", values.shape, np.float32, run, {})
    writer.open()
    runs = list(range(writer.n_runs))
    order.shuffle(runs)  # type: ignore[attr-defined]
    for number in runs:
        writer.write(number, values[slice(*writer.bounds(number))])
    record = _finish(writer)
    np.testing.assert_array_equal(np.load(folder / "a.npy"), values)
    np.save(folder / "b.npy", values)
    assert (folder / "a.npy").read_bytes() == (folder / "b.npy").read_bytes()
    assert [path.name for path in sorted(folder.iterdir())] == ["a.npy", "b.npy"]
    assert list(damages(folder / "a.npy", record, digests=True)) == []
    again = ArrayRecord.from_json(json.loads(json.dumps(record.as_json())))
    assert again == record and record.nbytes == values.nbytes


def test_what_is_marked_is_not_done_again(tmp_path: Path) -> None:
    first = _writer(tmp_path)
    first.open()
    assert _fill(first, [0, 3]) == [0, 3]
    second = _writer(tmp_path)  # the first process was killed
    second.glance()
    assert second.todo == [1, 2] and second.left_bytes == 4 * 3 * 2
    checked: list[int] = []
    second.open(checked.append)
    assert sum(checked) == 2 * 6 + 6, "the marked runs are read, and no others"
    assert _fill(second) == [1, 2]
    assert not (tmp_path / "array.npy").exists()
    _finish(second)
    np.testing.assert_array_equal(np.load(tmp_path / "array.npy"), VALUES)


def test_a_run_that_was_damaged_meanwhile_is_done_again(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    writer.open()
    _fill(writer, [0, 1, 2])
    data = bytearray(writer.part.read_bytes())
    data[-8] ^= 1  # in run 2 (rows 4 and 5); row 6 takes six bytes
    writer.part.write_bytes(data)
    again = _writer(tmp_path)
    again.open()
    assert again.todo == [2, 3]
    _fill(again)
    _finish(again)
    np.testing.assert_array_equal(np.load(tmp_path / "array.npy"), VALUES)


@pytest.mark.parametrize("cut", [3, 20, 60])
def test_a_mark_that_is_cut_off_does_not_count(tmp_path: Path, cut: int) -> None:
    writer = _writer(tmp_path)
    writer.open()
    _fill(writer, [0, 1])
    writer.marks.write_text(writer.marks.read_text()[:-cut])
    again = _writer(tmp_path)
    again.open()
    assert again.todo == [1, 2, 3]
    _fill(again)
    _finish(again)
    np.testing.assert_array_equal(np.load(tmp_path / "array.npy"), VALUES)


@pytest.mark.parametrize(
    "changes",
    [{"identity": {"made of": "that"}}, {"run": 3}, {"shape": (8, 3)}, {"dtype": np.float32}],
    ids=lambda change: next(iter(change)),
)
def test_what_was_begun_differently_is_begun_anew(tmp_path: Path, changes: dict[str, object]) -> None:
    writer = _writer(tmp_path)
    writer.open()
    _fill(writer, [0, 1])
    other = _writer(tmp_path, **changes)
    other.glance()
    assert other.todo == list(range(other.n_runs))
    other.open()
    assert other.todo == list(range(other.n_runs))


def test_marks_that_promise_more_than_the_file_holds(tmp_path: Path) -> None:
    """The file was begun anew, and the process killed before its marks were."""
    writer = _writer(tmp_path)
    writer.open()
    _fill(writer)
    marks = writer.marks.read_text()
    fresh = _writer(tmp_path, identity={"made of": "that"})
    fresh.open()
    fresh.marks.write_text(marks)
    again = _writer(tmp_path)
    again.open()
    assert again.todo == [0, 1, 2, 3], "no digest agrees with zeros"


def test_killed_between_its_name_and_the_manifest(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    writer.open()
    _fill(writer)
    record = writer.finish()
    again = _writer(tmp_path)
    again.glance()
    assert again.todo == []
    again.open()
    assert again.todo == [] and _finish(again) == record
    np.testing.assert_array_equal(np.load(tmp_path / "array.npy"), VALUES)


def test_rows_are_read_back_in_any_order(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    writer.open()
    _fill(writer)
    np.testing.assert_array_equal(writer.read(np.array([6, 0, 6, 3])), VALUES[[6, 0, 6, 3]])


def test_misuse_is_an_error(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    writer.open()
    with pytest.raises(ValueError, match=r"array.npy: rows 0..1 are \(1, 3\)"):
        writer.write(0, VALUES[:1])
    with pytest.raises(ValueError, match="array.npy: 4 runs are missing"):
        writer.finish()


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    writer.open()
    _fill(writer)
    record, path = _finish(writer), tmp_path / "array.npy"
    whole = path.read_bytes()

    def found(digests: bool) -> list[str]:
        return list(damages(path, record, digests))

    data = bytearray(whole)
    data[-8] ^= 1
    path.write_bytes(data)
    assert found(False) == [] and found(True) == ["rows 4..5 differ from what was written (SHA-256)"]
    np.save(path, VALUES.astype(np.float32)[:, :1])
    assert "bytes, expected" in found(False)[0]
    np.save(path, VALUES.reshape(3, 7))
    assert found(False) == ["its header is not that of the array"]
    path.unlink()
    assert found(False) == ["missing"]
