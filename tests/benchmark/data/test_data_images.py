"""Image preparation and the splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.transform import resize

from benchmark.data.images import centre_crop, prepare_images, read_photograph
from benchmark.data.nsd import NSD
from benchmark.data.splits import make_splits
from benchmark.errors import UserError


def test_large_images_go_by_way_of_256() -> None:
    image = np.random.default_rng(0).integers(0, 255, (425, 425, 3), np.uint8)

    def step(x: np.ndarray, size: int) -> np.ndarray:
        return np.rint(resize(x, (size, size), preserve_range=True, anti_aliasing=True)).astype(np.uint8)

    np.testing.assert_array_equal(prepare_images(image[None], 112)[0], step(step(image, 256), 112))
    np.testing.assert_array_equal(prepare_images(image[None], 256)[0], step(image, 256))
    small = image[None, :64, :64]
    assert prepare_images(small, 64) is small
    np.testing.assert_array_equal(prepare_images(small, 128)[0], step(small[0], 128))
    flat = np.full((2, 300, 300, 3), 77, np.uint8)
    assert (prepare_images(flat, 48) == 77).all()


@pytest.mark.parametrize("shape", [(3, 8, 9, 3), (3, 8, 8), (3, 8, 8, 4)])
def test_wrong_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        prepare_images(np.zeros(shape, np.uint8), 8)
    with pytest.raises(ValueError, match="float64"):
        prepare_images(np.zeros((1, 8, 8, 3)), 8)


def test_the_centre_is_kept() -> None:
    image = np.zeros((6, 10, 3), np.uint8)
    image[:, 2:8] = 9
    assert (centre_crop(image) == 9).all() and centre_crop(image).shape == (6, 6, 3)
    assert centre_crop(image.transpose(1, 0, 2)).shape == (6, 6, 3)


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((60, 40, 3), np.uint8)
    pixels[:30] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95, exif=exif)
    upright = read_photograph(tmp_path / "a.jpg", 16)
    assert upright.shape == (16, 16, 3) and upright[:6].mean() < 20 and upright[-6:].mean() > 235


def test_splits_are_disjoint_seeded_and_do_not_depend_on_the_other_subjects(tiny_tree: Path) -> None:
    nsd = NSD.open(tiny_tree)
    splits = make_splits(nsd, seed=1)
    assert splits.test.tolist() == nsd.shared_ids.tolist() == sorted(nsd.shared_ids.tolist())
    everything = np.concatenate([splits.test, *splits.train.values(), *splits.validation.values()])
    assert sorted(everything.tolist()) == list(range(nsd.n_images))
    assert all(len(v) == 1 for v in splits.validation.values())
    alone = make_splits(nsd, [2], seed=1)
    assert alone.validation[2].tolist() == splits.validation[2].tolist()
    assert {tuple(make_splits(nsd, [2], seed=k).validation[2]) for k in range(20)} != {tuple(alone.validation[2])}


def test_shared_images_that_a_subject_has_not_seen_do_not_test(tiny_tree: Path) -> None:
    nsd = NSD.open(tiny_tree, sessions={1: 3, 2: 1})
    seen = nsd.seen(2)[0]
    splits = make_splits(nsd)
    assert splits.test.tolist() == np.intersect1d(nsd.shared_ids, seen).tolist()
    assert len(splits.test) < len(nsd.shared_ids)
    with pytest.raises(UserError, match="no subject 7"):
        make_splits(nsd, [7])
