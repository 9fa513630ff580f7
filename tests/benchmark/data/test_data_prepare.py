"""The prepared store: its numbers are the loader's and a plain reading's, and nothing that happens on the way shows."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.io import loadmat

from benchmark.data import arrays, paths, recipes
from benchmark.data import prepare as prepare_module
from benchmark.data.algonauts import Algonauts
from benchmark.data.images import prepare_images
from benchmark.data.nsd import NSD
from benchmark.data.prepare import prepare
from benchmark.data.prepared import MANIFEST, Manifest, PreparedData
from benchmark.data.settings import SimulationSettings
from benchmark.data.simulate import simulate
from benchmark.data.splits import make_splits
from benchmark.data.synthetic import Synthetic
from benchmark.errors import RunError, UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several runs of each array, though there is little of everything."""
    monkeypatch.setattr(recipes, "IMAGE_RUN", 16)
    monkeypatch.setattr(recipes, "BETA_RUN", 7)


@pytest.fixture(scope="module")
def store(complete_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The complete tree, prepared; to read, not to change."""
    out = tmp_path_factory.mktemp("store") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "IMAGE_RUN", 16)
        patch.setattr(recipes, "BETA_RUN", 7)
        made = prepare(complete_tree, out, workers=2)
    assert not made.reused and made.notes == ()
    return out


@pytest.fixture
def copied(store: Path, tmp_path: Path) -> Path:
    """A copy of the store, to change."""
    return Path(shutil.copytree(store, tmp_path / "store"))


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_recordings_are_the_loaders_rounded_once(store: Path, complete_tree: Path) -> None:
    nsd, data = NSD.open(complete_tree), PreparedData.open(store)
    assert data.subjects == (1, 2) and data.kind == "miniature" and data.limits == ()
    for subject in data.subjects:
        averaged, trials = nsd.load_betas(subject), nsd.load_betas(subject, average=False)
        assert data.n_voxels(subject) == nsd.n_voxels(subject)
        assert data.averaged(subject).dtype == np.float16
        np.testing.assert_array_equal(data.averaged(subject), averaged.betas.astype(np.float16))
        np.testing.assert_array_equal(data.trial_betas(subject), trials.betas.astype(np.float16))
        ids, repeats = data.seen(subject)
        np.testing.assert_array_equal(ids, averaged.image_ids)
        np.testing.assert_array_equal(repeats, averaged.repeats)
        np.testing.assert_array_equal(data.trials(subject), nsd.trials(subject))
        table = pq.read_table(store / f"subj{subject:02d}" / "trials.parquet").to_pydict()
        assert table["session"] == trials.session.tolist() and table["trial"] == trials.trial.tolist()
        assert table["shared"] == np.isin(trials.image_ids, nsd.shared_ids).tolist()


def test_averages_equal_a_plain_reading_of_the_files(store: Path, complete_tree: Path) -> None:
    """Plain numpy in double precision, from NSD's files, without any code of the loader."""
    data, design = PreparedData.open(store), loadmat(complete_tree / paths.DESIGN)
    order, seen = design["masterordering"][0].astype(int), design["subjectim"].astype(int)
    for subject in (1, 2):
        trials = []
        for session in (1, 2, 3):
            halves = []
            for side in paths.HEMISPHERES:
                values = np.asarray(nib.load(complete_tree / paths.betas(subject, side, session)).dataobj, np.float64)
                values = values[:, 0, 0][np.load(complete_tree / paths.mask(subject, side)) > 0]
                halves.append((values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True))
            trials.append(np.concatenate(halves).T)
        plain = np.concatenate(trials)
        shown = seen[subject - 1, order - 1] - 1
        ids, repeats = data.seen(subject)
        for image, count, row in zip(ids, repeats, data.averaged(subject), strict=True):
            expected = plain[shown == image].mean(0)
            assert count == (shown == image).sum() == 2
            np.testing.assert_allclose(row, expected, rtol=2**-11 * 1.01, atol=1e-5)
        np.testing.assert_allclose(data.trial_betas(subject), plain, rtol=2**-11 * 1.01, atol=1e-5)


def test_images_are_prepared_images(store: Path, complete_tree: Path) -> None:
    nsd, data = NSD.open(complete_tree), PreparedData.open(store)
    assert data.sizes == (32,), "smaller than 256 pixels: kept as they are"
    np.testing.assert_array_equal(data.images(32), nsd.images(np.arange(nsd.n_images)))
    np.testing.assert_array_equal(data.image_rows([7, 0]), [7, 0])
    np.testing.assert_array_equal(data.external(32), nsd.external.images(range(6), 32))
    assert data.external_names.tolist() == list(nsd.external.names)
    table = pq.read_table(store / "images.parquet").to_pydict()
    assert table["nsd_id"] == list(range(52))
    assert [k for k, shared in enumerate(table["shared"]) if shared] == nsd.shared_ids.tolist()
    with pytest.raises(ValueError, match="not in the store"):
        data.image_rows([52])
    with pytest.raises(UserError, match=r"has no images of 256 pixels \(has 32\)"):
        data.images(256)


def test_synthetic_voxels_and_splits_are_the_trees(store: Path, complete_tree: Path) -> None:
    nsd, data = NSD.open(complete_tree), PreparedData.open(store)
    synthetic = Synthetic.open(nsd)
    for subject in data.subjects:
        loaded = synthetic.load_betas(subject)
        betas, repeats = data.synthetic(subject)
        np.testing.assert_array_equal(betas, loaded.betas.astype(np.float16))
        np.testing.assert_array_equal(repeats, loaded.repeats)
        np.testing.assert_array_equal(data.synthetic_images(subject, 32), synthetic.images(subject, range(16), 32))
        np.testing.assert_array_equal(data.ncsnr(subject), nsd.ncsnr(subject))
        for surface in paths.SURFACE_NAMES:
            np.testing.assert_array_equal(data.coordinates(subject, surface), nsd.coordinates(subject, surface))
        for atlas in paths.ATLASES:
            np.testing.assert_array_equal(data.parcels(subject, atlas), nsd.parcels(subject, atlas))
        for side in paths.HEMISPHERES:
            np.testing.assert_array_equal(data.vertices(subject, side), nsd.vertices(subject, side))
        chosen, betas = data.first_trials(subject, "30min")
        assert chosen.shown == 10
        trials = nsd.load_betas(subject, average=False, sessions=[1])
        np.testing.assert_array_equal(betas, trials.betas[chosen.trials].astype(np.float16))
    ours, theirs = make_splits(data, seed=4), make_splits(nsd, seed=4)
    assert {k: v.tolist() for k, v in ours.train.items()} == {k: v.tolist() for k, v in theirs.train.items()}
    assert ours.test.tolist() == theirs.test.tolist() == data.test_ids([1, 2]).tolist() == sorted(ours.test.tolist())


def test_the_papers_sizes_are_made_by_way_of_256(tmp_path: Path) -> None:
    settings = SimulationSettings(subjects=1, seed=1, size=270, shared=1, unique=2, external=2, voxels=40, sessions=1)
    tree = simulate(tmp_path / "tree", settings, workers=1).root
    wide = np.zeros((300, 400, 3), np.uint8)
    wide[:, :150] = (250, 20, 20)
    from PIL import Image

    Image.fromarray(wide).save(tree / paths.EXTERNAL / "999999999999.jpg", quality=95)
    data = prepare(tree, tmp_path / "store", workers=1).data
    assert data.sizes == (256, 224, 112)
    with h5py.File(tree / paths.STIMULI) as file:
        stored = prepare_images(file["imgBrick"][:], 256)
    np.testing.assert_array_equal(data.images(256), stored)
    for size in (224, 112):
        np.testing.assert_array_equal(data.images(size), prepare_images(stored, size))
        np.testing.assert_array_equal(data.external(size), prepare_images(np.array(data.external(256)), size))
    last = data.external(256)[-1].astype(int)
    assert abs(last[:, :70] - (250, 20, 20)).max() < 30, "cropped to the centre: columns 50 to 350 of 400"
    assert last[:, 110:].max() < 30


def test_what_is_not_in_it_is_named(store: Path) -> None:
    data = PreparedData.open(store)
    with pytest.raises(UserError, match="no subject 3; prepared: 1, 2"):
        data.averaged(3)
    with pytest.raises(UserError, match=r"has no surface 'sphre' \(did you mean 'sphere'\?\)"):
        data.coordinates(1, "sphre")
    with pytest.raises(UserError, match=r"has no atlas 'schaefer400' \(did you mean 'schaefer-400'\?\)"):
        data.parcels(1, "schaefer400")
    with pytest.raises(UserError, match="no prepared store"):
        PreparedData.open(store / "subj01")


# --- what happens on the way ------------------------------------------------------------------------------------------

_KILLED = """
import os, signal, sys
from benchmark.data import arrays, prepare, recipes
recipes.IMAGE_RUN, recipes.BETA_RUN = 16, 7
tree, out, when, where, log = sys.argv[1:]
done = 0
write, finish = arrays.ArrayWriter.write, arrays.ArrayWriter.finish

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def writing(self, number, rows):
    global done
    done += 1
    if done == int(when) and where == "unmarked":  # half a run is on the disk
        with self.part.open("r+b") as file:
            file.seek(len(self._head) + self.bounds(number)[0] * self._row_bytes)
            file.write(bytes(rows.astype(self.dtype))[: rows.nbytes // 4])
            file.flush()
        die()
    write(self, number, rows)
    with open(log, "a") as file:
        print(self.path.name, self.path.parent.name, number, file=file)
    if done == int(when) and where == "marked":
        die()

def finishing(self):
    record = finish(self)
    if where == "named":
        die()
    return record

arrays.ArrayWriter.write, arrays.ArrayWriter.finish = writing, finishing
prepare.prepare(tree, out, workers=1)
"""


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_killed_again_and_again_the_store_is_the_same(store: Path, complete_tree: Path, tmp_path: Path) -> None:
    """kill -9 before, in and after a run, and between an array and the manifest: no finished run is done twice."""
    script, out, log = tmp_path / "script.py", tmp_path / "store", tmp_path / "log"
    script.write_text(_KILLED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for when, where in ((6, "marked"), (0, "named"), (5, "unmarked"), (0, "never")):
        command = [sys.executable, str(script), str(complete_tree), str(out), str(when), where, str(log)]
        ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert ended.returncode == (0 if where == "never" else -signal.SIGKILL), ended.stderr
        if where != "never":
            with pytest.raises(
                UserError, match=r"is not finished; go on: python -m benchmark.data prepare|no prepared store"
            ):
                PreparedData.open(out)
    lines = log.read_text().splitlines()
    assert len(lines) == len(set(lines)), "a run that was on the disk is not written again"
    assert _files(out) == _files(store)


def test_a_run_that_rotted_before_the_restart_is_made_again(
    store: Path, complete_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = RuntimeError("stop")
    write, written = arrays.ArrayWriter.write, []

    def failing(self: arrays.ArrayWriter, number: int, rows: np.ndarray) -> None:
        if len(written) == 3:
            raise stop
        write(self, number, rows)
        written.append((self.path.name, number))

    monkeypatch.setattr(arrays.ArrayWriter, "write", failing)
    with pytest.raises(RuntimeError, match="stop"):
        prepare(complete_tree, tmp_path / "store", workers=1)
    part = tmp_path / "store" / "images_32.npy.part"
    data = bytearray(part.read_bytes())
    data[200] ^= 255
    part.write_bytes(data)
    monkeypatch.setattr(arrays.ArrayWriter, "write", write)
    prepare(complete_tree, tmp_path / "store", workers=1)
    assert _files(tmp_path / "store") == _files(store)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(store: Path, complete_tree: Path, tmp_path: Path, workers: int) -> None:
    prepare(complete_tree, tmp_path / "store", workers=workers)
    assert _files(tmp_path / "store") == _files(store)


def test_the_same_command_again_finds_everything_there(copied: Path, complete_tree: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*.npy")}
    again = prepare(complete_tree, copied)
    assert again.reused
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*.npy")} == before
    assert again.data.digest() == PreparedData.open(copied).digest()


def test_parts_and_subjects_are_added_to_a_store(store: Path, complete_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    first = prepare(complete_tree, out, parts=["betas"], subjects=[2])
    assert first.data.subjects == (2,) and sorted(p.name for p in out.glob("*.npy")) == []
    with pytest.raises(UserError, match="has no images"):
        _ = first.data.image_ids
    with pytest.raises(UserError, match="has no atlas 'schaefer-400'"):
        first.data.parcels(2)
    second = prepare(complete_tree, out, parts=["images", "external", "atlases", "ncsnr"])
    assert second.data.parcels(2).max() > 0 and second.data.subjects == (2,)
    third = prepare(complete_tree, out)
    assert third.data.subjects == (1, 2) and not third.reused
    assert third.data.digest() == PreparedData.open(store).digest()


def test_a_store_of_other_data_is_not_touched(
    copied: Path, complete_tree: Path, tiny_tree: Path, tmp_path: Path
) -> None:
    before = _files(copied)
    with pytest.raises(UserError, match=r"was made of another data tree than .* \(shared_ids differs\)"):
        prepare(tiny_tree, copied)
    with pytest.raises(UserError, match="has images of 32 pixels, not 16 8\ntype --sizes 32"):
        prepare(complete_tree, copied, sizes=[8, 16])
    with pytest.raises(UserError, match=r"external_32.npy: was made of other data .*\(limit\)"):
        prepare(complete_tree, copied, external=3)
    changed = Path(shutil.copytree(complete_tree, tmp_path / "tree"))
    path = changed / paths.betas(2, "rh", 2)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        prepare(changed, copied)
    text = str(error.value)
    assert "subj02/trials.npy: was made of other data or with other settings (betas)" in text
    assert f"rm {copied}/subj02/trials.npy" in text and len(text.splitlines()) == 2
    assert _files(copied) == before


def test_what_was_deleted_is_made_again(copied: Path, complete_tree: Path, store: Path) -> None:
    (copied / "subj02" / "trials.npy").unlink()
    (copied / "images.parquet").unlink()
    with pytest.raises(UserError, match=r"subj02/trials.npy: missing\ndelete that file and prepare again"):
        PreparedData.open(copied)
    assert prepare(complete_tree, copied).data.digest() == PreparedData.open(store).digest()
    assert _files(copied) == _files(store)


def test_damage_is_found_by_digest(copied: Path) -> None:
    path = copied / "subj01" / "averaged.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    manifest = Manifest.read(copied)
    assert manifest.damages(digests=False) == []
    assert manifest.damages(digests=True) == ["subj01/averaged.npy: rows 28..29 differ from what was written (SHA-256)"]


@pytest.mark.parametrize("harm", ["cut", "version", "escape", "empty"])
def test_a_manifest_from_elsewhere_is_refused(copied: Path, harm: str) -> None:
    path = copied / MANIFEST
    content = json.loads(path.read_text())
    if harm == "cut":
        path.write_text(path.read_text()[:-20])
    elif harm == "empty":
        path.write_text("{}")
    else:
        if harm == "version":
            content["version"] = 99
        else:
            content["arrays"]["../../etc/passwd"] = content["arrays"].pop("images_32.npy")
        path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="another version" if harm == "version" else "damaged"):
        PreparedData.open(copied)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_made(
    complete_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**7))
    with pytest.raises(RunError) as error:
        prepare(complete_tree, tmp_path / "store")
    text = str(error.value)
    assert "needs 67 MB more, its disk has 10 MB free" in text and "--sizes" in text and len(text.splitlines()) == 2
    assert list((tmp_path / "store").rglob("*.npy*")) == []


def test_a_disk_that_fills_up_keeps_what_is_finished(
    store: Path, complete_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = arrays.ArrayWriter.write, []

    def full(self: arrays.ArrayWriter, number: int, rows: np.ndarray) -> None:
        if len(written) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, number, rows)
        written.append(number)

    monkeypatch.setattr(arrays.ArrayWriter, "write", full)
    with pytest.raises(RunError, match="the disk is full; what is finished stays\nfree some space and type the same"):
        prepare(complete_tree, tmp_path / "store", workers=1)
    monkeypatch.setattr(arrays.ArrayWriter, "write", write)
    prepare(complete_tree, tmp_path / "store", workers=1)
    assert _files(tmp_path / "store") == _files(store)


def test_two_processes_do_not_write_one_store(complete_tree: Path, copied: Path) -> None:
    with (copied / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is preparing this store"):
            prepare(complete_tree, copied)
    assert prepare(complete_tree, copied).reused


def test_where_it_may_not_write(complete_tree: Path, store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    for out, says in (("file", "is a file; expected a folder"), ("mine", "is not empty and is no prepared store")):
        with pytest.raises(UserError, match=says):
            prepare(complete_tree, tmp_path / out)
    with pytest.raises(UserError, match="is a prepared store already; name the data tree"):
        prepare(store, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"parts": ["beta"]}, r"no part 'beta' \(did you mean 'betas'\?\); choose from betas, images"),
        ({"sizes": [4]}, "images of 4 pixels: expected sizes from 8 to 4096"),
        ({"external": -1}, "-1 external images: expected 0 or more"),
        ({"subjects": [3]}, "no betas of subject 3; present: 1, 2"),
        ({"parts": ["betas", "synthetic"]}, "has no synthetic, which --parts names"),
    ],
)
def test_what_cannot_be_asked_for(tiny_tree: Path, tmp_path: Path, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        prepare(tiny_tree, tmp_path / "store", **asked)
    assert not (tmp_path / "store").exists()


def test_what_the_tree_lacks_is_left_out_and_said(tiny_tree: Path, tmp_path: Path) -> None:
    made = prepare(tiny_tree, tmp_path / "store", external=4)
    assert made.notes == (f"left out synthetic: not in {tiny_tree}",)
    assert len(made.data.external(32)) == 4 == len(made.data.external_names)
    with pytest.raises(UserError, match="has no surface 'white'"):
        made.data.coordinates(1, "white")
    assert made.data.coordinates(1).shape == (made.data.n_voxels(1), 3)


def test_no_external_images(broken: Path, tmp_path: Path) -> None:
    shutil.rmtree(broken / paths.EXTERNAL)
    with pytest.raises(UserError, match="expected RGB photographs"):
        prepare(broken, tmp_path / "a")
    without = prepare(broken, tmp_path / "b", parts=["betas", "images"]).data
    assert len(without.external_names) == 0
    none = prepare(broken, tmp_path / "c", external=0).data
    assert none.external(32).shape == (0, 32, 32, 3)


# --- the fallback -----------------------------------------------------------------------------------------------------


def test_the_algonauts_release_makes_a_store_that_says_what_it_lacks(complete_tree: Path, tmp_path: Path) -> None:
    source = Algonauts.open(complete_tree)
    made = prepare(complete_tree, tmp_path / "store", source="algonauts")
    data = made.data
    assert data.kind == "algonauts" and data.limits == source.limits
    assert [note.split(":")[0] for note in made.notes] == ["left out synthetic", "left out ncsnr"]
    for subject in (1, 2):
        loaded = source.load_betas(subject)
        np.testing.assert_array_equal(data.averaged(subject), loaded.betas.astype(np.float16))
        np.testing.assert_array_equal(data.seen(subject)[0], loaded.image_ids)
        assert data.parcels(subject).shape == (data.n_voxels(subject),)
    np.testing.assert_array_equal(data.images(32), source.images(source.image_ids))
    np.testing.assert_array_equal(data.image_rows(source.image_ids[::-3]), np.arange(len(source.image_ids))[::-3])
    assert make_splits(data).test.tolist() == make_splits(source).test.tolist()
    with pytest.raises(UserError, match="has no single trials: the Algonauts 2023 release, which it was made of"):
        data.first_trials(1, "1h")
    with pytest.raises(UserError, match="has no single trials"):
        data.trial_betas(1)
    assert prepare(complete_tree, tmp_path / "store", source="algonauts").reused
    with pytest.raises(UserError, match=r"was made of another data tree .* \(kind differs\)"):
        prepare(complete_tree, tmp_path / "store", source="nsd")


def test_without_nsds_betas_the_release_is_found_by_itself(complete_tree: Path, tmp_path: Path) -> None:
    shutil.copytree(complete_tree / paths.ALGONAUTS, tmp_path / "tree" / paths.ALGONAUTS)
    data = prepare(tmp_path / "tree", tmp_path / "store", parts=["betas", "images"]).data
    assert data.kind == "algonauts" and data.test_ids([1, 2]).tolist() == sorted(data.test_ids([1, 2]).tolist())


def test_the_progress_bar_goes_on_where_the_killed_run_was(
    complete_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[tuple[str, int, int]] = []

    class Recorder(prepare_module.Progress):
        def bar(self, title: str, total: int | None = None, start: int = 0, share: bool = False) -> Any:
            bars.append((title, start, total or 0))
            return super().bar(title, total, start, share)

    write, written = arrays.ArrayWriter.write, []

    def failing(self: arrays.ArrayWriter, number: int, rows: np.ndarray) -> None:
        if len(written) == 2:
            raise RuntimeError("stop")
        write(self, number, rows)
        written.append(number)

    monkeypatch.setattr(arrays.ArrayWriter, "write", failing)
    with pytest.raises(RuntimeError, match="stop"):
        prepare(complete_tree, tmp_path / "store", workers=1, progress=Recorder(enabled=False))
    assert ("images", 0, 52) in bars
    bars.clear()
    monkeypatch.setattr(arrays.ArrayWriter, "write", write)
    prepare(complete_tree, tmp_path / "store", workers=1, progress=Recorder(enabled=False))
    assert ("images", 32, 52) in bars and ("subject 1: sessions", 0, 60) in bars
