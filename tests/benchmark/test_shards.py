"""Sharded arrays: read as one array, written through interruptions, damage found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.shards import Shards, collect, write_shards


def value(rows: np.ndarray) -> np.ndarray:
    return (rows[:, None, None] * 10 + np.arange(6).reshape(2, 3)).astype(np.float32)


def compute(rows: np.ndarray) -> dict[str, np.ndarray]:
    return {"a": value(rows), "b": rows.astype(np.float32)[:, None]}


def write(folder: Path, total: int, rows: int = 4, **more: object) -> None:
    write_shards(folder, total, compute, batch=3, rows=rows, **more)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(total=st.integers(1, 23), rows=st.integers(1, 9), data=st.data())
def test_shards_read_as_the_whole_array(
    tmp_path_factory: pytest.TempPathFactory, total: int, rows: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    write(folder, total, rows)
    array, whole = Shards(folder / "a"), value(np.arange(total)).astype(np.float16)
    assert array.shape == whole.shape and array.dtype == np.float16 and len(array) == total
    pick = np.array(data.draw(st.lists(st.integers(0, total - 1), max_size=9)), np.int64)
    assert np.array_equal(array[pick], whole[pick])
    assert all(np.array_equal(array.row(k), whole[k]) for k in pick.tolist())
    low, high = sorted(data.draw(st.tuples(st.integers(0, total), st.integers(0, total))))
    assert np.array_equal(array[low:high], whole[low:high])
    assert array.damaged() == []


def test_a_finished_shard_is_not_computed_again(tmp_path: Path) -> None:
    seen: list[int] = []

    def stops(rows: np.ndarray) -> dict[str, np.ndarray]:
        if 9 in rows:
            raise RuntimeError("out of luck")
        seen.extend(rows.tolist())
        return compute(rows)

    with pytest.raises(RuntimeError):
        write_shards(tmp_path, 14, stops, batch=2, rows=4)
    assert seen == list(range(8))
    with pytest.raises(FileNotFoundError):
        Shards(tmp_path / "a")
    again: list[int] = []
    done: list[int] = []
    write_shards(
        tmp_path, 14, lambda rows: again.extend(rows.tolist()) or compute(rows), batch=2, rows=4, progress=done.append
    )
    assert again == list(range(8, 14)) and done[0] == 8 and sum(done) == 14
    assert np.array_equal(Shards(tmp_path / "a")[:], value(np.arange(14)).astype(np.float16))


def test_a_damaged_shard_is_computed_again(tmp_path: Path) -> None:
    write(tmp_path, 12)
    broken = tmp_path / "b" / "00001.npy"
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    assert Shards(tmp_path / "b").damaged() == [broken] and Shards(tmp_path / "a").damaged() == []
    write(tmp_path, 12)
    assert Shards(tmp_path / "b").damaged() == []
    assert np.array_equal(Shards(tmp_path / "b")[:, ], np.arange(12, dtype=np.float16)[:, None])  # fmt: skip


def test_another_number_of_rows_starts_anew(tmp_path: Path) -> None:
    write(tmp_path, 12)
    write(tmp_path, 9)
    assert len(Shards(tmp_path / "a")) == 9 and json.loads((tmp_path / "a" / "shards.json").read_text())["total"] == 9


def test_a_folder_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 12)
    index = tmp_path / "a" / "shards.json"
    about = json.loads(index.read_text())
    about["sha256"].pop()
    index.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="2 of 3 shards"):
        Shards(tmp_path / "a")


def test_results_are_moved_whole(tmp_path: Path) -> None:
    write(tmp_path / "work", 5)
    (tmp_path / "out").mkdir()
    assert collect(tmp_path / "work", tmp_path / "out") == {"a": [2, 3], "b": [1]}
    assert len(Shards(tmp_path / "out" / "a")) == 5
    assert collect(tmp_path / "work", tmp_path / "out") == {"a": [2, 3], "b": [1]}, "once more after an interruption"


@pytest.mark.parametrize("delay", [0.05, 0.4, 0.9])
def test_killed_at_any_point_it_ends_with_the_same_files(tmp_path: Path, delay: float) -> None:
    script = (
        "import sys, time, pathlib, numpy as np\n"
        "from benchmark.shards import write_shards\n"
        "def compute(rows):\n"
        "    time.sleep(0.02)\n"
        "    return {'a': np.repeat(rows[:, None] % 97, 50, 1).astype(np.float32)}\n"
        "print('begins', flush=True)\n"
        "write_shards(pathlib.Path(sys.argv[1]), 300, compute, batch=8, rows=24)\n"
    )

    def start(folder: Path) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        return process

    killed = start(tmp_path / "killed")
    time.sleep(delay)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert start(tmp_path / "killed").wait() == 0
    assert start(tmp_path / "whole").wait() == 0
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.*"))
    assert len(files) == 15
    for file in files:
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
