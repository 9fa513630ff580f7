"""The Algonauts 2023 release as a fallback: what it gives equals its files, and it says what it cannot do."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmark.data import paths
from benchmark.data.algonauts import Algonauts
from benchmark.data.nsd import NSD
from benchmark.data.release import Release
from benchmark.data.splits import first_trials, make_splits
from benchmark.errors import UserError


@pytest.fixture
def alone(complete_tree: Path, tmp_path: Path) -> Path:
    """A copy of the release without anything of NSD beside it."""
    shutil.copytree(complete_tree / paths.ALGONAUTS, tmp_path / "alone" / paths.ALGONAUTS)
    return tmp_path / "alone"


def _names(root: Path, subject: int, split: str) -> list[int]:
    folder = root / paths.algonauts_images(subject, split)
    return [int(path.stem.split("-")[-1]) for path in sorted(folder.iterdir())]


def test_what_it_gives_is_what_its_files_hold(alone: Path) -> None:
    data = Algonauts.open(alone)
    assert data.subjects == (1, 2) and data.kind == "algonauts" and data.image_size == 32
    for subject in data.subjects:
        halves = [np.load(alone / paths.algonauts_betas(subject, side)) for side in paths.HEMISPHERES]
        loaded = data.load_betas(subject)
        np.testing.assert_array_equal(loaded.betas, np.concatenate(halves, axis=1))
        assert loaded.image_ids.tolist() == _names(alone, subject, "training")
        assert loaded.betas.shape == (len(loaded.image_ids), data.n_voxels(subject))
        assert (loaded.repeats == 0).all(), "how many repeats are behind an average is not known"
        np.testing.assert_array_equal(data.beta_rows(subject, 2, 5), loaded.betas[2:5])
    everybodys = sorted({k for s in (1, 2) for split in ("training", "test") for k in _names(alone, s, split)})
    assert data.image_ids.tolist() == everybodys
    ids = [everybodys[-1], everybodys[0]]
    for image, number in zip(data.images(ids), ids, strict=True):
        path = next(alone.rglob(f"*_nsd-{number:05d}.png"))
        np.testing.assert_array_equal(image, np.asarray(Image.open(path)))
    with pytest.raises(ValueError, match="the release has no such image"):
        data.images([10_000])


def test_it_holds_the_averages_of_all_but_the_last_sessions(complete_tree: Path) -> None:
    """Three sessions, of which one is withheld: the averages are those of the first two."""
    nsd, data = NSD.open(complete_tree), Algonauts.open(complete_tree)
    for subject in data.subjects:
        trials = nsd.load_betas(subject, average=False, sessions=[1, 2])
        for image, row in zip(*((d := data.load_betas(subject)).image_ids, d.betas), strict=True):
            np.testing.assert_allclose(row, trials.betas[trials.image_ids == image].mean(0), atol=1e-6)
        assert set(_names(complete_tree, subject, "test")).isdisjoint(data.seen(subject)[0])
    np.testing.assert_array_equal(data.images(data.image_ids), nsd.images(data.image_ids))


def test_shared_images_leave_training_and_test_but_are_fewer(alone: Path, complete_tree: Path) -> None:
    nsd, data = NSD.open(complete_tree), Algonauts.open(alone)
    np.testing.assert_array_equal(data.shared_ids, nsd.shared_ids)  # by their names, for the design is not there
    splits = make_splits(data)
    expected = [k for k in nsd.shared_ids.tolist() if all(k in _names(alone, s, "training") for s in (1, 2))]
    assert splits.test.tolist() == expected
    for ids in (*splits.train.values(), *splits.validation.values()):
        assert not np.isin(ids, nsd.shared_ids).any()


def test_with_one_subject_the_design_tells_which_images_are_shared(alone: Path, complete_tree: Path) -> None:
    shutil.rmtree(alone / paths.ALGONAUTS / "subj01")
    with pytest.raises(UserError, match="with subject 2 alone it cannot be told which images are shared"):
        Algonauts.open(alone)
    (alone / paths.DESIGN).parent.mkdir(parents=True)
    shutil.copy(complete_tree / paths.DESIGN, alone / paths.DESIGN)
    np.testing.assert_array_equal(Algonauts.open(alone).shared_ids, NSD.open(complete_tree).shared_ids)


def test_one_of_two_subjects_still_knows_the_shared_images(alone: Path) -> None:
    data = Algonauts.open(alone, [2])
    assert data.subjects == (2,) and len(data.shared_ids) == 8
    with pytest.raises(UserError, match="no subject 1; open: 2"):
        data.load_betas(1)
    with pytest.raises(UserError, match="no betas of subject 3; present: 1, 2"):
        Algonauts.open(alone, [3])


def test_it_says_what_it_cannot_do(alone: Path) -> None:
    data = Algonauts.open(alone)
    text = "\n".join(data.limits)
    assert "no single trials" in text and "at most 37 sessions" in text and "instead of NSD's 1000" in text
    n_test = len(make_splits(data).test)
    assert f"{n_test} test images that subjects 1, 2 have in common" in text
    assert f"{len(data.image_ids)} images in all" in text
    with pytest.raises(UserError) as error:
        first_trials(data, 1, "1h")  # type: ignore[arg-type]
    assert "has no single trials of subject 1" in str(error.value) and len(str(error.value).splitlines()) == 2


def _no_images(root: Path) -> None:
    shutil.rmtree(root / paths.algonauts_images(1, "training"))


def _gap(root: Path) -> None:
    sorted((root / paths.algonauts_images(1, "training")).iterdir())[2].unlink()


def _stranger(root: Path) -> None:
    (root / paths.algonauts_images(2, "test") / "cat.png").write_bytes(b"")


def _image_missing(root: Path) -> None:
    sorted((root / paths.algonauts_images(2, "training")).iterdir())[-1].unlink()


def _descending(root: Path) -> None:
    files = sorted((root / paths.algonauts_images(2, "training")).iterdir())
    names = [file.name for file in files]
    files[0].rename(files[0].with_name(names[0].split("_")[0] + "_" + names[1].split("_")[1] + ".x"))
    files[1].rename(files[1].with_name(names[1].split("_")[0] + "_" + names[0].split("_")[1]))
    aside = next(files[0].parent.glob("*.x"))
    aside.rename(aside.with_suffix(""))


def _mask_of_another(root: Path) -> None:
    shutil.copy(root / paths.mask(1, "lh"), root / paths.mask(2, "lh"))


def _mask_gone(root: Path) -> None:
    (root / paths.mask(2, "rh")).unlink()


def _float64(root: Path) -> None:
    path = root / paths.algonauts_betas(1, "rh")
    np.save(path, np.load(path).astype(np.float64))


def _truncated(root: Path) -> None:
    path = root / paths.algonauts_betas(2, "lh")
    path.write_bytes(path.read_bytes()[:-8])


def _pickled(root: Path) -> None:
    np.save(root / paths.algonauts_betas(2, "lh"), np.array([{"a": 1}]), allow_pickle=True)


@pytest.mark.parametrize(
    ("harm", "file", "says"),
    [
        (_no_images, paths.algonauts_images(1, "training"), "no images"),
        (_gap, paths.algonauts_images(1, "training"), "image number 3 by its place"),
        (_stranger, paths.algonauts_images(2, "test") + "/cat.png", "expected test-"),
        (_image_missing, paths.algonauts_betas(2, "lh"), "images,"),
        (_descending, paths.algonauts_images(2, "training"), "do not ascend"),
        (_mask_of_another, paths.algonauts_betas(2, "lh"), "vertices)"),
        (_mask_gone, paths.mask(2, "rh"), "missing; expected the mask"),
        (_float64, paths.algonauts_betas(1, "rh"), "float64"),
        (_truncated, paths.algonauts_betas(2, "lh"), "truncated"),
        (_pickled, paths.algonauts_betas(2, "lh"), "holds Python objects, which are not read"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_wrong_is_named(alone: Path, harm, file: str, says: str) -> None:  # type: ignore[no-untyped-def]
    harm(alone)
    with pytest.raises(UserError) as error:
        Algonauts.open(alone)
    text = str(error.value)
    assert str(alone / file) in text and says in text and "expected" in text, text
    assert len(text.splitlines()) <= 2


def test_values_that_are_not_finite_are_named_when_they_are_read(alone: Path) -> None:
    path = alone / paths.algonauts_betas(1, "lh")
    values = np.load(path)
    values[3, 2] = np.nan
    np.save(path, values)
    data = Algonauts.open(alone)
    assert np.isfinite(data.beta_rows(1, 0, 3)).all()
    with pytest.raises(UserError, match="lh_training_fmri.npy: row 3 has values that are not finite"):
        data.beta_rows(1, 2, 6)


def test_no_release_at_all(tiny_tree: Path) -> None:
    with pytest.raises(UserError, match="no averaged betas of the Algonauts 2023 release"):
        Algonauts.open(tiny_tree)


def test_the_release_itself_has_its_published_numbers(alone: Path) -> None:
    vertices = len(np.load(alone / paths.mask(1, "lh")))
    masks = {s: tuple(int(np.load(alone / paths.mask(s, h)).sum()) for h in paths.HEMISPHERES) for s in (1, 2)}
    training = {s: len(_names(alone, s, "training")) for s in (1, 2)}
    test = {s: len(_names(alone, s, "test")) for s in (1, 2)}
    numbers = dict(
        vertices=vertices,
        voxels=masks,
        sessions={1: 3, 2: 3},
        algonauts_training=training,
        algonauts_test=test,
        algonauts_withheld=1,
        shared=8,
    )

    def opened(**changes: object) -> Algonauts:
        return Algonauts.open(alone, release=Release(**{**numbers, **changes}))  # type: ignore[arg-type]

    assert any("at most 2 sessions" in limit for limit in opened().limits)
    for changes, says in (
        ({"voxels": {1: masks[1], 2: (19_004, 20_544)}}, "in use; expected 19004 for subject 2"),
        ({"algonauts_training": {1: training[1], 2: 9841}}, f"{training[2]} images; expected 9841"),
        ({"algonauts_test": {1: 159, 2: test[2]}}, f"{test[1]} images; expected 159"),
        ({"shared": 1000}, "8 images that more than one subject saw; expected 1000"),
    ):
        with pytest.raises(UserError, match=says):
            opened(**changes)


def test_the_digest_follows_the_images(alone: Path) -> None:
    before = Algonauts.open(alone).digest()
    assert Algonauts.open(alone).digest() == before
    image = next((alone / paths.algonauts_images(2, "training")).iterdir())
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(image)
    assert Algonauts.open(alone).digest() != before
