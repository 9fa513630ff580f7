"""Stage folders: what counts as a result, and what does not."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark import store as store_module
from benchmark.errors import UserError
from benchmark.graph import Stage
from benchmark.store import CHECKPOINTS, DONE, STATUS, Store, read_json, write_json, write_text, write_yaml

STAGE = Stage("toy", "m:f", {"a": 1})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def finish(store: Store, stage: Stage = STAGE, force: bool = False, text: str = "abc") -> Path:
    """Do what a run does, without running anything."""
    folder = store.begin(stage, force).folder
    write_yaml(folder / "config.yaml", stage.record())
    (folder / "images").mkdir()
    (folder / "images" / "0.png").write_text(text)
    (folder / "weights.npy").write_text("1234")
    write_json(folder / STATUS, {"state": "done"})
    store.seal(stage, folder)
    store.publish(stage, folder)
    return store.folder(stage)


def test_folder_name(store: Store) -> None:
    assert store.folder(STAGE) == store.root / "toy" / STAGE.fingerprint[:16]
    assert store.state(STAGE).kind == "absent" and not store.root.exists()


def test_done_lists_every_output_with_size_and_digest(store: Store) -> None:
    folder = finish(store)
    done = read_json(folder / DONE)
    assert sorted(done["outputs"]) == ["config.yaml", "images/0.png", "weights.npy"]
    assert done["outputs"]["images/0.png"] == {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    assert done["fingerprint"] == STAGE.fingerprint
    assert store.is_done(STAGE) and store.verify(STAGE) == [] and not (folder / CHECKPOINTS).exists()
    assert [record["config"] for record in store.finished("toy")] == [{"a": 1}]


def test_damage_is_found_and_named(store: Store) -> None:
    folder = finish(store)
    (folder / "images" / "0.png").write_text("xyz")  # same size: only the digest tells
    assert store.is_done(STAGE) and store.verify(STAGE) == ["images/0.png (SHA-256 differs)"]
    (folder / "weights.npy").write_text("12")
    assert not store.is_done(STAGE)
    assert store.state(STAGE).detail == "weights.npy (2 bytes, expected 4)"
    (folder / "weights.npy").unlink()
    assert (store.state(STAGE).kind, store.state(STAGE).detail) == ("damaged", "weights.npy (missing)")
    (folder / "weights.npy").symlink_to(folder / "config.yaml")
    assert store.state(STAGE).detail == "weights.npy (not a plain file)"
    (folder / DONE).write_text('{"outputs": {')
    assert store.state(STAGE).detail == "DONE (not readable)"
    (folder / DONE).unlink()
    assert store.verify(STAGE) == ["DONE (missing)"]


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "images/../../secret", "link/secret"])
def test_paths_in_done_stay_inside_the_folder(store: Store, name: str) -> None:
    folder = finish(store)
    (folder.parent / "secret").write_text("abc")
    (folder / "link").symlink_to(folder.parent)
    done = read_json(folder / DONE)
    done["outputs"][name] = {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    write_json(folder / DONE, done)
    assert store.state(STAGE).detail == f"{name} (outside the stage's folder)"


def test_done_of_another_stage_is_no_result(store: Store) -> None:
    folder = finish(store)
    other = Stage("toy", "m:f", {"a": 2})
    folder.rename(store.folder(other))
    assert store.state(other).detail == f"DONE (belongs to stage {STAGE.fingerprint[:16]})"


def test_links_are_no_outputs(store: Store) -> None:
    folder = store.begin(STAGE).folder
    (folder / "images").symlink_to(folder.parent)
    with pytest.raises(ValueError, match="images is not a plain file"):
        store.seal(STAGE, folder)
    assert not (folder / DONE).exists()


def test_a_crashed_attempt_is_cleared_but_for_its_checkpoints(store: Store) -> None:
    folder = store.begin(STAGE).folder
    write_json(folder / STATUS, {"state": "running", "attempt": 1})
    (folder / "half.npy").write_text("")
    (folder / "images").mkdir()
    (folder / "tracking").mkdir()
    assert store.state(STAGE).kind == "interrupted" and not store.state(STAGE).resumable
    (folder / CHECKPOINTS / "step").write_text("5")
    assert store.state(STAGE).resumable
    attempt = store.begin(STAGE)
    assert attempt.previous == {"state": "running", "attempt": 1}
    assert sorted(path.name for path in folder.iterdir()) == [CHECKPOINTS, STATUS, "tracking"]
    assert (folder / CHECKPOINTS / "step").read_text() == "5"


def test_a_forced_run_keeps_the_old_result_until_the_new_one_is_whole(store: Store) -> None:
    final = finish(store)
    work = store.begin(STAGE, force=True).folder
    assert work != final and store.is_done(STAGE)
    write_json(work / STATUS, {"state": "running", "forced": True})
    (work / CHECKPOINTS / "step").write_text("5")
    # Killed here: the old result is still good, and the same command goes on.
    assert store.state(STAGE).kind == "done" and store.resumes(STAGE, force=True)
    assert store.begin(STAGE, force=True).previous is not None
    finish(store, force=True, text="new!")
    assert (final / "images" / "0.png").read_text() == "new!" and store.is_done(STAGE)
    assert [path.name for path in final.parent.iterdir()] == [final.name]


def test_force_does_not_resume_what_was_not_forced(store: Store) -> None:
    folder = store.begin(STAGE).folder
    write_json(folder / STATUS, {"state": "interrupted", "forced": False})
    (folder / CHECKPOINTS / "step").write_text("5")
    assert store.resumes(STAGE) and not store.resumes(STAGE, force=True)
    assert store.begin(STAGE, force=True).previous is None
    assert list((folder / CHECKPOINTS).iterdir()) == []


def test_a_swap_that_was_killed_half_way_is_finished(store: Store) -> None:
    final = finish(store)
    work = store.begin(STAGE, force=True).folder
    (work / "weights.npy").write_text("fresh")
    store.seal(STAGE, work)
    final.rename(final.with_name(final.name + ".replaced"))  # the process dies between the two renames
    assert not store.is_done(STAGE)
    store.recover(STAGE)
    assert store.is_done(STAGE) and (final / "weights.npy").read_text() == "fresh"
    assert [path.name for path in final.parent.iterdir()] == [final.name]


def test_atomic_writes_keep_the_old_content_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "other")
    assert read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]


def test_lock_names_its_holder_and_dies_with_it(store: Store) -> None:
    code = (
        "import sys, time; from benchmark.graph import Stage; from benchmark.store import Store\n"
        "with Store(sys.argv[1]).lock(Stage('toy', 'm:f', {'a': 1})):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(store.root)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        holder = store.holder(STAGE)
        assert holder is not None and holder["pid"] == process.pid
        assert store.state(STAGE).kind == "running" and f"process {process.pid} on" in store.state(STAGE).detail
        waited = []

        def on_wait(who: str) -> None:
            waited.append(who)
            process.kill()

        with store.lock(STAGE, on_wait):
            assert len(waited) == 1 and f"process {process.pid} on" in waited[0]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
    assert store.holder(STAGE) is None


def test_lock_is_freed_after_an_error(store: Store) -> None:
    with pytest.raises(KeyError), store.lock(STAGE):
        assert store.holder(STAGE)
        raise KeyError
    with store.lock(STAGE):
        pass


def test_a_store_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*file.*--out DIR"), Store(tmp_path / "file").lock(STAGE):
        pass


def test_unreadable_status_is_no_status(store: Store) -> None:
    folder = store.begin(STAGE).folder
    (folder / STATUS).write_text("{half")
    assert store.status(STAGE) == {} and store.state(STAGE).kind == "absent"
    (folder / STATUS).write_text(json.dumps([1]))
    assert store.status(STAGE) == {}
