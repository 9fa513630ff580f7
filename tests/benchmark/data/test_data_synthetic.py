"""NSD-Synthetic in its true formats: images as seen, recordings equal to a plain reading, errors that name the file."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
from scipy.io import loadmat, savemat

from benchmark.data import paths
from benchmark.data.images import prepare_images
from benchmark.data.nsd import NSD
from benchmark.data.release import Release
from benchmark.data.synthetic import Synthetic
from benchmark.errors import UserError


def test_recordings_equal_a_plain_reading(complete_tree: Path) -> None:
    synthetic = Synthetic.open(NSD.open(complete_tree))
    assert synthetic.subjects == (1, 2) and synthetic.n_images == 16
    order = loadmat(complete_tree / paths.SYNTHETIC_DESIGN)["masterordering"][0].astype(int)
    for subject in (1, 2):
        halves = []
        for side in paths.HEMISPHERES:
            values = np.asarray(nib.load(complete_tree / paths.synthetic_betas(subject, side)).dataobj)[:, 0, 0, :]
            values = values[np.load(complete_tree / paths.mask(subject, side)) > 0].astype(np.float64)
            halves.append((values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True))
        trials = np.concatenate(halves).T
        loaded = synthetic.load_betas(subject)
        assert loaded.image_ids.tolist() == list(range(16)) and loaded.repeats.sum() == len(order) == 36
        assert loaded.repeats.max() > 2, "one-back trials show an image once more"
        for image, row, repeats in zip(loaded.image_ids, loaded.betas, loaded.repeats, strict=True):
            own = trials[order == image + 1]
            assert len(own) == repeats
            np.testing.assert_allclose(row, own.mean(0), atol=2e-5)


def test_images_are_the_central_square_as_it_was_seen(complete_tree: Path) -> None:
    synthetic = Synthetic.open(NSD.open(complete_tree))
    with h5py.File(complete_tree / paths.SYNTHETIC_STIMULI) as file:
        common = file["imgBrick"][:]
    with h5py.File(complete_tree / paths.synthetic_colour_stimuli(2)) as file:
        own = file["imgBrick"][:]
    assert common.shape == (12, 32, 61, 3) and own.shape == (4, 32, 61, 3)
    stored = synthetic.images(2, [0, 11, 12, 15], 32, as_seen=False)
    np.testing.assert_array_equal(stored, np.stack([common[0], common[11], own[0], own[3]])[:, :, 14:46])
    seen = synthetic.images(2, [12, 0], 32)
    np.testing.assert_array_equal(seen, np.rint(np.sqrt(stored[[2, 0]] / 255) * 255))
    assert seen.mean() > stored[[2, 0]].mean() + 10
    np.testing.assert_array_equal(synthetic.images(2, [0], 16), prepare_images(seen[1:], 16))
    assert not np.array_equal(synthetic.images(1, [12], 32), synthetic.images(2, [12], 32)), "each has its own colours"
    assert np.array_equal(synthetic.images(1, [3], 32), synthetic.images(2, [3], 32))
    with pytest.raises(ValueError, match=r"image 16; expected 0\.\.15"):
        synthetic.images(1, [16], 32)


def test_two_trials_of_one_image_are_more_alike_than_those_of_two(complete_tree: Path) -> None:
    nsd = NSD.open(complete_tree)
    synthetic = Synthetic.open(nsd)
    trials = nsd.scored(1, [paths.synthetic_betas(1, side) for side in paths.HEMISPHERES], "betas")
    alike = np.corrcoef(trials)
    same = synthetic.order[:, None] == synthetic.order
    assert alike[same & ~np.eye(len(same), dtype=bool)].mean() > alike[~same].mean() + 0.05


def test_vertices_without_data_in_the_session_are_zero(broken_complete: Path) -> None:
    relative = paths.synthetic_betas(2, "lh")
    image = nib.load(broken_complete / relative)
    values = np.asarray(image.dataobj).copy()
    values[np.flatnonzero(np.load(broken_complete / paths.mask(2, "lh")))[4]] = np.nan
    nib.save(nib.MGHImage(values, np.eye(4)), broken_complete / relative)
    loaded = Synthetic.open(NSD.open(broken_complete)).load_betas(2)
    assert (loaded.betas[:, 4] == 0).all() and loaded.betas[:, 5].std() > 0


def test_only_subjects_that_took_part(broken_complete: Path) -> None:
    (broken_complete / paths.synthetic_betas(1, "lh")).unlink()
    nsd = NSD.open(broken_complete)
    assert Synthetic.open(nsd).subjects == (2,)
    with pytest.raises(UserError, match=r"subj01.*lh.betas_nsdsynthetic.mgh: missing; expected NSD-Synthetic's betas"):
        Synthetic.open(nsd, [1])
    (broken_complete / paths.synthetic_betas(2, "lh")).unlink()
    with pytest.raises(UserError, match="no recordings of NSD-Synthetic; expected nsddata_betas"):
        Synthetic.open(nsd)


def _cut_betas(root: Path) -> None:
    path = root / paths.synthetic_betas(2, "rh")
    path.write_bytes(path.read_bytes()[:-100])


def _fewer_trials(root: Path) -> None:
    order = loadmat(root / paths.SYNTHETIC_DESIGN)["masterordering"]
    savemat(root / paths.SYNTHETIC_DESIGN, {"masterordering": order[:, :-1]})


def _unknown_image(root: Path) -> None:
    order = loadmat(root / paths.SYNTHETIC_DESIGN)["masterordering"].astype(int)
    order[0, 3] = 17
    savemat(root / paths.SYNTHETIC_DESIGN, {"masterordering": order})


def _no_order(root: Path) -> None:
    savemat(root / paths.SYNTHETIC_DESIGN, {"something": np.ones((1, 4))})


def _other_colours(root: Path) -> None:
    with h5py.File(root / paths.synthetic_colour_stimuli(2), "w") as file:
        file["imgBrick"] = np.zeros((5, 32, 61, 3), np.uint8)


def _other_sides(root: Path) -> None:
    with h5py.File(root / paths.synthetic_colour_stimuli(1), "w") as file:
        file["imgBrick"] = np.zeros((4, 30, 61, 3), np.uint8)


def _no_brick(root: Path) -> None:
    with h5py.File(root / paths.SYNTHETIC_STIMULI, "w") as file:
        file["stimuli"] = np.zeros((5, 32, 61, 3), np.uint8)


@pytest.mark.parametrize(
    ("harm", "file", "says"),
    [
        (_cut_betas, paths.synthetic_betas(2, "rh"), "truncated"),
        (_fewer_trials, paths.synthetic_betas(1, "lh"), "x 36 trials; expected"),
        (_unknown_image, paths.SYNTHETIC_DESIGN, "runs from 1 to 17; expected whole numbers from 1 to 16"),
        (_no_order, paths.SYNTHETIC_DESIGN, "no masterordering"),
        (_other_colours, paths.synthetic_colour_stimuli(2), "5 images; expected 4, as other subjects have"),
        (_other_sides, paths.synthetic_colour_stimuli(1), "4 images of 30 x 61; expected 4 of 32 x 61"),
        (_no_brick, paths.SYNTHETIC_STIMULI, "no imgBrick (holds stimuli)"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_wrong_is_named(broken_complete: Path, harm, file: str, says: str) -> None:  # type: ignore[no-untyped-def]
    harm(broken_complete)
    with pytest.raises(UserError) as error:
        Synthetic.open(NSD.open(broken_complete))
    assert str(broken_complete / file) in str(error.value) and says in str(error.value), error.value
    assert len(str(error.value).splitlines()) <= 2


def test_nsd_synthetic_itself_has_284_images_and_744_trials(broken_complete: Path) -> None:
    shutil.rmtree(broken_complete / "simulation")
    side = len(np.load(broken_complete / paths.mask(1, "lh")))
    masks = {
        s: tuple(int(np.load(broken_complete / paths.mask(s, h)).sum()) for h in paths.HEMISPHERES) for s in (1, 2)
    }
    numbers = dict(images=52, image_side=32, shared=8, images_per_subject=30, trials_designed=60, trials_per_session=20)
    numbers |= dict(vertices=side, sessions={1: 3, 2: 3}, voxels=masks)
    own = dict(synthetic_images=(12, 4), synthetic_sides=(32, 61), synthetic_trials=36)

    def opened(**changes: object) -> Synthetic:
        release = Release(**{**numbers, **own, **changes})  # type: ignore[arg-type]
        return Synthetic.open(NSD.open(broken_complete, release=release))

    assert opened().n_images == 16
    for changes, says in (
        ({"synthetic_images": (220, 64)}, "12 images of 32 x 61; expected 220 of 32 x 61"),
        ({"synthetic_images": (12, 64)}, "4 images of 32 x 61; expected 64 of 32 x 61"),
        ({"synthetic_sides": (714, 1360)}, "expected 12 of 714 x 1360"),
        ({"synthetic_trials": 744}, "36 trials; expected 744"),
    ):
        with pytest.raises(UserError, match=says):
            opened(**changes)
