"""The loader: what it gives equals a plain reading of the files; what is wrong is named."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from benchmark.data import formats, paths
from benchmark.data import tree as tree_module
from benchmark.data.nsd import NSD
from benchmark.data.release import NSD_RELEASE, Release
from benchmark.errors import UserError


def _read(root: Path, relative: str) -> np.ndarray:
    return np.asarray(nib.load(root / relative).dataobj)


def _write(root: Path, relative: str, values: np.ndarray) -> None:
    nib.save(nib.MGHImage(values.astype(np.float32), np.eye(4)), root / relative)


def _plain(root: Path, subject: int) -> dict[int, list[np.ndarray]]:
    """Z-scored trials of each image, read the long way."""
    design = loadmat(root / paths.DESIGN)
    trials: dict[int, list[np.ndarray]] = {}
    for session in (1, 2, 3):
        halves = []
        for side in ("lh", "rh"):
            values = _read(root, paths.betas(subject, side, session))[:, 0, 0, :]
            values = values[np.load(root / paths.mask(subject, side)) > 0]
            halves.append((values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True))
        for t, column in enumerate(np.concatenate(halves).T):
            number = int(design["masterordering"][0, (session - 1) * 20 + t])
            trials.setdefault(int(design["subjectim"][subject - 1, number - 1]) - 1, []).append(column)
    return trials


def test_averaged_betas_equal_a_plain_reading(tiny_tree: Path) -> None:
    nsd = NSD.open(tiny_tree)
    for subject in nsd.subjects:
        loaded, plain = nsd.load_betas(subject), _plain(tiny_tree, subject)
        assert loaded.image_ids.tolist() == sorted(plain)
        assert loaded.betas.dtype == np.float32
        assert loaded.betas.shape == (20, nsd.n_voxels(subject))
        assert (loaded.repeats == 3).all()
        for image, row in zip(loaded.image_ids, loaded.betas, strict=True):
            np.testing.assert_allclose(row, np.mean(plain[int(image)], axis=0), atol=2e-5)


def test_single_trials_are_in_the_order_of_the_experiment(tiny_tree: Path) -> None:
    nsd = NSD.open(tiny_tree)
    trials = nsd.load_betas(2, average=False)
    np.testing.assert_array_equal(trials.image_ids, nsd.trials(2).ravel())
    np.testing.assert_array_equal(trials.session, np.repeat([1, 2, 3], 20))
    np.testing.assert_array_equal(trials.trial, np.tile(np.arange(20), 3))
    for session in (1, 2, 3):  # each session has its own statistics
        own = trials.betas[trials.session == session]
        np.testing.assert_allclose(own.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(own.std(0), 1, atol=1e-4)
    one = nsd.load_betas(2, average=False, sessions=[2])
    np.testing.assert_array_equal(one.betas, trials.betas[trials.session == 2])
    mean = nsd.load_betas(2)
    np.testing.assert_allclose(
        mean.betas[4], trials.betas[trials.image_ids == mean.image_ids[4]].mean(0), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(UserError, match=r"sessions \[4\] of subject 2: expected some of 1..3"):
        nsd.load_betas(2, sessions=[4])


def test_images_come_in_the_order_asked_for(tiny_tree: Path) -> None:
    nsd = NSD.open(tiny_tree)
    with h5py.File(tiny_tree / paths.STIMULI) as file:
        brick = file["imgBrick"][:]
    np.testing.assert_array_equal(nsd.images([5, 0, 5, 31]), brick[[5, 0, 5, 31]])
    assert nsd.images([]).shape == (0, 32, 32, 3)
    with pytest.raises(ValueError, match="expected 0..31"):
        nsd.images([32])


def test_what_it_knows_of_the_voxels(tiny_tree: Path) -> None:
    nsd = NSD.open(tiny_tree)
    left = len(nsd.vertices(1, "lh"))
    where = nsd.coordinates(1)
    assert where.shape == (nsd.n_voxels(1), 3)
    assert (where[:left, 0] < 0).all() and (where[left:, 0] > 0).all()
    parcels = nsd.parcels(1, "schaefer-400")
    assert parcels.min() >= 1 and parcels[:left].max() < parcels[left:].min()
    assert nsd.ncsnr(1).shape == parcels.shape
    with pytest.raises(UserError, match="did you mean 'schaefer-400'"):
        nsd.parcels(1, "schaefer-40")


def test_external_images_are_sorted_rgb_squares(broken: Path) -> None:
    folder = broken / paths.EXTERNAL
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "000000000000.jpg")  # grayscale: left out
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = 200
    Image.fromarray(wide).save(folder / "999999999999.jpg", quality=95)
    external = NSD.open(broken).external
    assert len(external) == 7 and list(external.names) == sorted(external.names)
    image = external.images([6, 0], 32)
    assert image.shape == (2, 32, 32, 3) and abs(int(image[0].mean()) - 200) <= 2
    shutil.rmtree(folder)
    nsd = NSD.open(broken)  # opening does not need them
    with pytest.raises(UserError, match="expected RGB photographs"):
        len(nsd.external)


def _break_stimuli_missing(root: Path) -> None:
    (root / paths.STIMULI).unlink()


def _break_stimuli_key(root: Path) -> None:
    with h5py.File(root / paths.STIMULI, "w") as file:
        file["images"] = np.zeros((32, 32, 32, 3), np.uint8)


def _break_stimuli_shape(root: Path) -> None:
    with h5py.File(root / paths.STIMULI, "w") as file:
        file["imgBrick"] = np.zeros((32, 3, 32, 32), np.uint8)


def _break_stimuli_dtype(root: Path) -> None:
    with h5py.File(root / paths.STIMULI, "w") as file:
        file["imgBrick"] = np.zeros((32, 32, 32, 3), np.float32)


def _break_stimuli_cut(root: Path) -> None:
    data = (root / paths.STIMULI).read_bytes()
    (root / paths.STIMULI).write_bytes(data[: len(data) // 2])


def _break_stimuli_fewer(root: Path) -> None:
    with h5py.File(root / paths.STIMULI, "w") as file:
        file["imgBrick"] = np.zeros((31, 32, 32, 3), np.uint8)


def _design(root: Path) -> dict[str, np.ndarray]:
    return {k: v.astype(int) for k, v in loadmat(root / paths.DESIGN).items() if not k.startswith("__")}


def _break_design_key(root: Path) -> None:
    design = _design(root)
    del design["subjectim"]
    savemat(root / paths.DESIGN, design)


def _break_design_shared(root: Path) -> None:
    design = _design(root)
    design["sharedix"][0, 0] = design["subjectim"][0, -1]
    savemat(root / paths.DESIGN, design)


def _break_design_length(root: Path) -> None:
    design = _design(root)
    savemat(root / paths.DESIGN, design | {"masterordering": design["masterordering"][:, :-1]})


def _break_design_damaged(root: Path) -> None:
    (root / paths.DESIGN).write_bytes(b"nonsense" * 40)


def _break_list(root: Path) -> None:
    lines = (root / paths.STIM_INFO).read_text().splitlines()
    (root / paths.STIM_INFO).write_text("\n".join(lines[:-3]))


def _break_list_columns(root: Path) -> None:
    (root / paths.STIM_INFO).write_text("a,b\n1,2\n")


def _break_all_betas(root: Path) -> None:
    shutil.rmtree(root / "nsddata_betas")


def _break_last_session(root: Path) -> None:
    for side in paths.HEMISPHERES:
        (root / paths.betas(2, side, 3)).unlink()


def _break_one_hemisphere(root: Path) -> None:
    (root / paths.betas(1, "rh", 2)).unlink()


def _break_cut_betas(root: Path) -> None:
    path = root / paths.betas(2, "rh", 3)
    path.write_bytes(path.read_bytes()[:-30])  # the footer takes 20


def _break_empty_betas(root: Path) -> None:
    (root / paths.betas(1, "lh", 1)).write_bytes(b"")


def _break_trials(root: Path) -> None:
    _write(root, paths.betas(1, "lh", 2), _read(root, paths.betas(1, "lh", 2))[..., :-2])


def _break_vertices(root: Path) -> None:
    _write(root, paths.betas(1, "rh", 3), _read(root, paths.betas(1, "rh", 3))[:-1])


def _break_type(root: Path) -> None:
    nib.save(nib.MGHImage(np.zeros((60, 1, 1, 20), np.int16), np.eye(4)), root / paths.betas(1, "lh", 2))


def _break_mask_missing(root: Path) -> None:
    (root / paths.mask(2, "lh")).unlink()


def _break_mask_length(root: Path) -> None:
    np.save(root / paths.mask(2, "lh"), np.ones(7))


BROKEN = [
    (_break_stimuli_missing, paths.STIMULI, "missing"),
    (_break_stimuli_key, paths.STIMULI, r"no imgBrick \(holds images\)"),
    (_break_stimuli_shape, paths.STIMULI, r"expected uint8 \(n, side, side, 3\)"),
    (_break_stimuli_dtype, paths.STIMULI, "imgBrick is float32"),
    (_break_stimuli_cut, paths.STIMULI, "damaged"),
    (_break_stimuli_fewer, paths.DESIGN, "expected whole numbers from 1 to 31"),
    (_break_design_key, paths.DESIGN, "no subjectim"),
    (_break_design_shared, paths.DESIGN, "disagree"),
    (_break_design_length, paths.betas(1, "lh", 1), "expected a divisor of the design's 59 trials"),
    (_break_design_damaged, paths.DESIGN, "damaged"),
    (_break_list, paths.STIM_INFO, "29 lines; expected 32"),
    (_break_list_columns, paths.STIM_INFO, "no column nsdId, shared1000"),
    (_break_all_betas, paths.betas_folder(1), "betas of at least one subject"),
    (_break_last_session, paths.betas(2, "lh", 3), "expected betas of session 3 of 3"),
    (_break_one_hemisphere, paths.betas(1, "rh", 2), "missing"),
    (_break_cut_betas, paths.betas(2, "rh", 3), r"truncated \(\d+ bytes\); expected at least \d+ bytes"),
    (_break_empty_betas, paths.betas(1, "lh", 1), "no readable .mgh header"),
    (_break_trials, paths.betas(1, "lh", 2), r"60 vertices x 18 trials|\d+ vertices x 18 trials; expected \d+ x 20"),
    (_break_vertices, paths.betas(1, "rh", 3), r"expected \d+ x 20"),
    (_break_type, paths.betas(1, "lh", 2), "int16"),
    (_break_mask_missing, paths.mask(2, "lh"), "missing"),
    (_break_mask_length, paths.mask(2, "lh"), "zeros and ones"),
]


@pytest.mark.parametrize(("harm", "file", "says"), BROKEN, ids=[b[0].__name__[7:] for b in BROKEN])
def test_a_broken_tree_is_named_in_two_lines_with_a_remedy(broken: Path, harm, file: str, says: str) -> None:  # type: ignore[no-untyped-def]
    harm(broken)
    before = sorted(broken.rglob("*"))
    with pytest.raises(UserError) as error:
        NSD.open(broken)
    text = str(error.value)
    assert file in text and re.search(says, text), text
    assert "expected" in text and "python -m benchmark.data simulate" in text
    assert len(text.splitlines()) <= 2
    assert sorted(broken.rglob("*")) == before


def test_a_missing_tree(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such data folder; make a miniature one: python -m benchmark.data simulate"):
        NSD.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nsd_stimuli.hdf5: missing"):
        NSD.open(tmp_path)


def test_a_nan_inside_the_mask_is_named_and_one_outside_is_not_minded(broken: Path) -> None:
    relative = paths.betas(2, "rh", 2)
    values = _read(broken, relative).copy()
    mask = np.load(broken / paths.mask(2, "rh"))
    values[np.flatnonzero(mask == 0)[0]] = np.nan
    _write(broken, relative, values)
    NSD.open(broken).load_betas(2)
    vertex = np.flatnonzero(mask)[4]
    values[vertex, 0, 0, 7] = np.nan
    _write(broken, relative, values)
    with pytest.raises(UserError, match=rf"rh.betas_session02.mgh: beta of vertex {vertex}, trial 7 is nan"):
        NSD.open(broken).load_betas(2)


def test_a_vertex_that_does_not_vary_becomes_zero(broken: Path) -> None:
    relative = paths.betas(1, "lh", 1)
    values = _read(broken, relative).copy()
    values[np.flatnonzero(np.load(broken / paths.mask(1, "lh")))[0]] = 3.25
    _write(broken, relative, values)
    trials = NSD.open(broken).load_betas(1, average=False)
    assert (trials.betas[trials.session == 1, 0] == 0).all() and np.isfinite(trials.betas).all()


def _as_released(root: Path, **changes: object) -> Release:
    """Make the miniature pass for NSD itself: numbers to hold it against, and no ``simulation`` folder."""
    shutil.rmtree(root / "simulation")
    masks = {s: tuple(int(np.load(root / paths.mask(s, side)).sum()) for side in paths.HEMISPHERES) for s in (1, 2)}
    numbers = {
        "images": 32,
        "image_side": 32,
        "shared": 8,
        "images_per_subject": 20,
        "trials_designed": 60,
        "trials_per_session": 20,
        "vertices": len(np.load(root / paths.mask(1, "lh"))),
        "sessions": {1: 3, 2: 2},
        "voxels": masks,
    }
    return Release(**{**numbers, **changes})  # type: ignore[arg-type]


def test_nsd_itself_with_sessions_that_differ(broken: Path) -> None:
    """NSD's release: fewer sessions for some subjects than the design lists, and no ``simulation`` folder."""
    release = _as_released(broken)
    for side in paths.HEMISPHERES:
        (broken / paths.betas(2, side, 3)).unlink()
    nsd = NSD.open(broken, release=release)
    assert nsd.published and nsd.kind == "nsd"
    assert nsd.sessions == {1: 3, 2: 2} and nsd.trials(2).shape == (2, 20)
    loaded = nsd.load_betas(2)
    assert loaded.repeats.sum() == 40 and loaded.repeats.max() <= 3
    np.testing.assert_array_equal(nsd.seen(2)[1], loaded.repeats)
    assert NSD.open(broken, subjects=[1], release=release).subjects == (1,)
    with pytest.raises(UserError, match="no betas of subject 3; present: 1, 2"):
        NSD.open(broken, subjects=[1, 3], release=release)
    assert NSD.open(broken, sessions={1: 1, 2: 1}, release=release).sessions == {1: 1, 2: 1}
    (broken / paths.betas(2, "rh", 2)).unlink()
    with pytest.raises(UserError, match=r"download it again: s3://natural-scenes-dataset/nsddata_betas"):
        NSD.open(broken, release=release)


@pytest.mark.parametrize(
    ("changes", "file", "says"),
    [
        ({"images": 73_000}, paths.STIMULI, "32 images; expected NSD's 73000"),
        ({"image_side": 425}, paths.STIMULI, "32 pixels a side; expected NSD's 425"),
        ({"shared": 1000}, paths.DESIGN, "8 shared images; expected NSD's 1000"),
        ({"images_per_subject": 10_000}, paths.DESIGN, "20 images a subject; expected NSD's 10000"),
        ({"trials_designed": 30_000}, paths.DESIGN, "60 trials; expected NSD's 30000"),
        ({"trials_per_session": 750}, paths.betas(1, "lh", 1), "20 trials; expected NSD's 750"),
        (
            {"voxels": {1: (19_004, 20_544)}},
            paths.mask(1, "lh"),
            "in use; expected 19004, as the Algonauts 2023 release",
        ),
    ],
)
def test_nsd_itself_has_its_published_numbers(broken: Path, changes: dict[str, object], file: str, says: str) -> None:
    release = _as_released(broken, **changes)
    with pytest.raises(UserError) as error:
        NSD.open(broken, release=release)
    assert str(broken / file) in str(error.value) and says in str(error.value), error.value
    assert len(str(error.value).splitlines()) == 2


def test_the_published_numbers_are_those_of_the_papers() -> None:
    voxels = {subject: NSD_RELEASE.n_voxels(subject) for subject in NSD_RELEASE.subjects}
    assert voxels == {1: 39548, 2: 39548, 3: 39548, 4: 39548, 5: 39548, 6: 39198, 7: 39548, 8: 39511}
    assert sum(voxels.values()) == 315_997
    assert sum(NSD_RELEASE.sessions.values()) * NSD_RELEASE.trials_per_session == 213_000
    assert NSD_RELEASE.complete_subjects == (1, 2, 5, 7) and sum(NSD_RELEASE.synthetic_images) == 284
    for subject in NSD_RELEASE.complete_subjects:  # who saw everything: split into training and test images
        assert NSD_RELEASE.algonauts_training[subject] + NSD_RELEASE.algonauts_test[subject] == 10_000


def test_without_the_algonauts_mask_it_is_made_as_that_was_made(broken: Path) -> None:
    """nsdgeneral and RSC together, less the vertices that lack data in any session."""
    masks = {(s, side): np.load(broken / paths.mask(s, side)) for s in (1, 2) for side in paths.HEMISPHERES}
    for side in paths.HEMISPHERES:
        either = (masks[1, side] > 0) | (masks[2, side] > 0)
        general = either.copy()
        general[np.flatnonzero(either)[::3]] = False
        for label, inside in zip(paths.general_labels(side), (general, either & ~general), strict=True):
            _write(broken, label, inside.astype(np.float32)[:, None, None])
            assert (broken / label).suffix == ".mgz"
        for subject in (1, 2):
            (broken / paths.mask(subject, side)).unlink()
        relative = paths.betas(2, side, 3)
        values = _read(broken, relative).copy()
        lacking = np.flatnonzero(either)[[1, 5]]
        values[lacking] = np.nan
        _write(broken, relative, values)
        nsd_sees = either.copy()
        nsd_sees[lacking] = False
        masks["expected", side] = nsd_sees
        masks["either", side] = either
    nsd = NSD.open(broken)
    for side in paths.HEMISPHERES:
        np.testing.assert_array_equal(nsd.vertices(1, side), np.flatnonzero(masks["either", side]))
        np.testing.assert_array_equal(nsd.vertices(2, side), np.flatnonzero(masks["expected", side]))
    assert np.isfinite(nsd.load_betas(2).betas).all()


def test_a_vertex_outside_the_scanned_volume_of_one_session_is_zero_there(broken: Path) -> None:
    relative = paths.betas(1, "rh", 2)
    values = _read(broken, relative).copy()
    values[np.flatnonzero(np.load(broken / paths.mask(1, "rh")))[2]] = np.nan
    _write(broken, relative, values)
    nsd = NSD.open(broken)
    column = len(nsd.vertices(1, "lh")) + 2
    trials = nsd.load_betas(1, average=False)
    assert (trials.betas[trials.session == 2, column] == 0).all()
    assert trials.betas[trials.session == 1, column].std() == pytest.approx(1, abs=1e-4)


def test_frames_of_a_session_are_read_in_any_number_of_blocks(tiny_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_tree / paths.betas(1, "lh", 1)
    whole = _read(tiny_tree, paths.betas(1, "lh", 1))[:, 0, 0].T
    columns = np.array([0, 7, 30])
    for block in (1, 7, 64):
        monkeypatch.setattr(formats, "_BLOCK", block)
        np.testing.assert_array_equal(formats.read_mgh(path, columns), whole[:, columns])
        np.testing.assert_array_equal(formats.read_mgh(path, columns, slice(3, 13)), whole[3:13, columns])


def test_the_digest_follows_the_content(broken: Path, tiny_tree: Path) -> None:
    assert NSD.open(broken).digest() == NSD.open(tiny_tree).digest()
    assert NSD.open(broken, subjects=[1]).digest() != NSD.open(tiny_tree).digest()
    path = broken / paths.betas(1, "lh", 2)
    data = bytearray(path.read_bytes())
    data[400] ^= 1
    path.write_bytes(data)
    assert NSD.open(broken).digest() != NSD.open(tiny_tree).digest()


def test_the_digest_of_a_large_file_reads_parts_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "_WHOLE", 1000)
    path = tmp_path / "large"
    path.write_bytes(bytes(2**20))
    first = tree_module.file_digest(path)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert tree_module.file_digest(path) != first
