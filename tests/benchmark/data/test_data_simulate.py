"""The miniature NSD: its files, its truth, and that it appears whole or not at all."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file
from scipy.io import loadmat

from benchmark.data import miniature, paths
from benchmark.data.miniature import make_design
from benchmark.data.nsd import NSD
from benchmark.data.settings import SimulationSettings
from benchmark.data.simulate import simulate
from benchmark.errors import RunError, UserError


@pytest.fixture(scope="module")
def truth(tiny_tree: Path) -> dict[str, np.ndarray]:
    return load_file(tiny_tree / "simulation" / "truth.safetensors")


def test_the_betas_hold_the_true_signal_as_well_as_the_noise_allows(
    tiny_tree: Path, truth: dict[str, np.ndarray]
) -> None:
    nsd = NSD.open(tiny_tree)
    for subject in nsd.subjects:
        loaded = nsd.load_betas(subject)
        true = truth[f"subj{subject:02d}.signal"]
        np.testing.assert_array_equal(truth[f"subj{subject:02d}.signal_ids"], loaded.image_ids)
        centred = loaded.betas - loaded.betas.mean(0)
        r = (centred * true).mean(0) / centred.std(0) / true.std(0)
        ncsnr = truth[f"subj{subject:02d}.ncsnr"]
        expected = 1 / np.sqrt(1 + 1 / (3 * ncsnr**2))  # three repeats are averaged
        assert abs(r.mean() - expected.mean()) < 0.06
        assert np.corrcoef(r, expected)[0, 1] > 0.4


def test_the_written_ncsnr_is_an_estimate_of_the_true_one(tiny_tree: Path, truth: dict[str, np.ndarray]) -> None:
    nsd = NSD.open(tiny_tree)
    for subject in nsd.subjects:
        true, estimated = truth[f"subj{subject:02d}.ncsnr"], nsd.ncsnr(subject)
        assert np.corrcoef(true, estimated)[0, 1] > 0.6
        assert abs(np.median(true) - np.median(estimated)) < 0.1


@settings(max_examples=20, deadline=None)
@given(
    subjects=st.integers(1, 4),
    shared=st.integers(1, 6),
    unique=st.integers(2, 8),
    repeats=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_every_image_is_shown_as_often_as_asked_and_never_twice_in_a_row(
    subjects: int, shared: int, unique: int, repeats: int, seed: int
) -> None:
    asked = SimulationSettings(subjects=subjects, shared=shared, unique=unique, repeats=repeats, seed=seed)
    design = make_design(asked)
    assert (np.bincount(design.order, minlength=asked.images_per_subject) == repeats).all()
    assert (np.diff(design.order) != 0).all()
    assert (np.sort(design.seen[:, :shared], axis=1) == design.shared).all()
    assert set(design.seen.ravel().tolist()) == set(range(asked.n_images))
    assert len(np.unique(design.seen[:, shared:])) == subjects * unique  # nobody else sees these
    assert asked.n_trials % asked.n_sessions == 0


def test_the_files_are_those_of_nsd(tiny_tree: Path, tiny_settings: SimulationSettings) -> None:
    design = loadmat(tiny_tree / paths.DESIGN)
    assert design["masterordering"].shape == (1, 60)
    assert design["subjectim"].shape == (2, 20)
    assert design["sharedix"].shape == (1, 8)
    assert design["masterordering"].min() == design["subjectim"].min() == 1  # MATLAB counts from 1
    with (tiny_tree / paths.STIM_INFO).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows[0]) == 9 + 8 + 24
    order, seen = design["masterordering"][0].astype(int), design["subjectim"].astype(int)
    for row in rows:
        for subject in (1, 2):
            when = [int(row[f"subject{subject}_rep{r}"]) for r in range(3)]
            assert (row[f"subject{subject}"] == "1") == all(when)
            for trial in filter(None, when):
                assert seen[subject - 1, order[trial - 1] - 1] - 1 == int(row["nsdId"])
    assert len(list((tiny_tree / paths.EXTERNAL).iterdir())) == tiny_settings.external


def test_subjects_differ_and_some_vertices_lie_outside(tiny_tree: Path, tiny_settings: SimulationSettings) -> None:
    nsd = NSD.open(tiny_tree)
    masks = [np.load(tiny_tree / paths.mask(s, "lh")) for s in nsd.subjects]
    assert masks[0].shape == masks[1].shape
    assert 0.3 < masks[0].mean() < 0.95
    assert (masks[0] != masks[1]).any()
    for subject in nsd.subjects:
        assert 0.88 * tiny_settings.voxels <= nsd.n_voxels(subject) <= 1.12 * tiny_settings.voxels


def test_the_same_seed_gives_the_same_files_whatever_the_workers(
    tiny_tree: Path, tiny_settings: SimulationSettings, tmp_path: Path
) -> None:
    again = simulate(tmp_path / "again", tiny_settings, workers=1).root
    assert NSD.open(again).digest() == NSD.open(tiny_tree).digest()
    other = simulate(tmp_path / "other", replace(tiny_settings, seed=4)).root
    assert NSD.open(other).digest() != NSD.open(tiny_tree).digest()


def test_a_tree_is_reused_when_it_is_the_same_and_refused_when_it_is_not(
    broken: Path, tiny_settings: SimulationSettings
) -> None:
    assert simulate(broken, tiny_settings).reused
    with pytest.raises(UserError, match=r"voxels 80, not 90.*rm -r"):
        simulate(broken, replace(tiny_settings, voxels=90))
    mask = broken / paths.mask(2, "rh")
    values = np.load(mask)
    values[np.flatnonzero(values)[0]] = 0
    np.save(mask, values)
    with pytest.raises(UserError, match="subj02.*was changed"):
        simulate(broken, tiny_settings)
    (broken / paths.SETTINGS).unlink()
    with pytest.raises(UserError, match="is not a miniature NSD"):
        simulate(broken, tiny_settings)


def test_a_complete_tree_has_more_beside_the_same_nsd(
    complete_tree: Path, tiny_settings: SimulationSettings, tmp_path: Path
) -> None:
    used = json.loads((complete_tree / paths.SETTINGS).read_text())["used"]
    plain = simulate(tmp_path / "plain", SimulationSettings(**used), workers=1).root
    ours = {p.relative_to(plain): p.read_bytes() for p in plain.rglob("*") if p.is_file()}
    for name, content in ours.items():
        if str(name) != paths.SETTINGS:
            assert (complete_tree / name).read_bytes() == content, name
    more = {str(p.relative_to(complete_tree)) for p in complete_tree.rglob("*") if p.is_file()} - set(map(str, ours))
    for expected in (
        paths.synthetic_betas(2, "rh"),
        paths.SYNTHETIC_DESIGN,
        paths.algonauts_betas(1, "lh"),
        paths.surface("rh", "sphere"),
    ):
        assert expected in more
    assert simulate(complete_tree, SimulationSettings(**used), complete=True).reused
    with pytest.raises(UserError, match=r"holds more than what was asked for \(--complete\)"):
        simulate(complete_tree, SimulationSettings(**used))
    with pytest.raises(UserError, match=r"holds not all of what was asked for \(--complete\)"):
        simulate(plain, SimulationSettings(**used), complete=True)


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, tiny_settings: SimulationSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(miniature, "write_mgh", full)
    with pytest.raises(RunError, match="disk is full"):
        simulate(tmp_path / "tree", tiny_settings)
    assert list(tmp_path.iterdir()) == []


def _start(folder: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "benchmark.data",
        "simulate",
        str(folder),
        "--external",
        "20000",
        "--subjects",
        "1",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for _ in range(2000):  # a busy machine may take a minute to start it
        if list(folder.parent.glob("tree.partial-*/nsddata_stimuli")):
            return process
        if process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    raise AssertionError("the simulation did not start")


def test_ctrl_c_leaves_nothing_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = _start(tmp_path / "tree")
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "type the same command" in text and "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_tree_and_the_next_one_clears_up(
    tmp_path: Path, tiny_settings: SimulationSettings
) -> None:
    process = _start(tmp_path / "tree")
    process.kill()
    process.communicate()
    assert not (tmp_path / "tree").exists()
    simulate(tmp_path / "tree", tiny_settings)
    assert [p.name for p in tmp_path.iterdir()] == ["tree"]


def _photographs(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for k in range(count):
        mode, suffix = (("L", "png"), ("RGB", "jpg"), ("RGBA", "webp"))[k % 3]
        pixels = rng.integers(0, 255, (40 + k % 7, 50, 4), np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{k:03d}.{suffix}")
    (folder / "notes.txt").write_text("not a photograph")
    return folder


def test_photographs_take_the_place_of_scenes_and_counts_shrink_to_what_is_there(
    tmp_path: Path, tiny_settings: SimulationSettings
) -> None:
    folder = _photographs(tmp_path / "photos", 26)
    made = simulate(tmp_path / "tree", tiny_settings, images=folder)
    assert "26 photographs instead of 38" in made.note
    assert made.settings.unique == 7 and made.settings.external == 4
    nsd = NSD.open(made.root)
    assert nsd.n_images == 8 + 2 * 7 and len(nsd.external) == 4
    assert not (made.root / "simulation" / "scenes.parquet").exists()
    components = json.loads((made.root / "simulation" / "truth.json").read_text())["components"]
    drive = load_file(made.root / "simulation" / "truth.safetensors")["subj01.drive"]
    assert (drive[:, [components.index("objects"), components.index("place")]] < 1e-6).all()
    assert simulate(tmp_path / "tree", tiny_settings, images=folder).reused
    with pytest.raises(UserError, match="other images"):
        simulate(tmp_path / "tree", tiny_settings)


def test_too_few_or_unreadable_photographs(tmp_path: Path, tiny_settings: SimulationSettings) -> None:
    folder = _photographs(tmp_path / "photos", 10)
    with pytest.raises(UserError, match="10 photographs; expected at least 11"):
        simulate(tmp_path / "tree", tiny_settings, images=folder)
    _photographs(tmp_path / "photos" / "more", 6)
    (folder / "000.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="000.png: cannot be read as an image"):
        simulate(tmp_path / "tree", replace(tiny_settings, unique=2, external=1, shared=11), images=folder)
    with pytest.raises(UserError, match="no such folder"):
        simulate(tmp_path / "tree", tiny_settings, images=tmp_path / "nowhere")
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(("name", "value"), [("subjects", 9), ("voxels", 3), ("size", 8), ("external", -1)])
def test_settings_out_of_range(name: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"--{name} {value}: expected a number from"):
        replace(SimulationSettings(), **{name: value})
