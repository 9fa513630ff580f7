"""``python -m benchmark.data check``: all that is there, missing or wrong, in one go, and where to get it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
from nibabel.gifti import GiftiDataArray, GiftiImage
from PIL import Image
from scipy.io import loadmat, savemat

from benchmark.cli import main_guard
from benchmark.data import paths
from benchmark.data.__main__ import main
from benchmark.data.inspection import Inspection, inspect_store, inspect_tree, lines
from benchmark.data.look import Item
from benchmark.data.nsd import NSD
from benchmark.data.prepare import prepare
from benchmark.data.release import NSD_RELEASE, PARTS
from benchmark.data.splits import first_trials, shared_test_set
from benchmark.data.synthetic import Synthetic
from benchmark.errors import UserError

TWO_PHOTOGRAPHS = replace(NSD_RELEASE, external=2)


def _items(found: Inspection, part: str) -> list[Item]:
    return [item for item in found.items if item.part == part]


# --- NSD itself, by its headers ---------------------------------------------------------------------------------------


def test_nsd_as_it_was_released_is_complete(true_size: Path) -> None:
    found = inspect_tree(true_size, PARTS, release=TWO_PHOTOGRAPHS)
    assert found.complete and found.kind == "nsd" and found.limits == ()
    assert [item.problems for item in found.items] == [[] for _ in found.items]
    betas = [item for item in _items(found, "betas") if "sessions" in item.name]
    assert [item.files for item in betas] == [80, 80, 64, 60, 80, 64, 80, 60]
    assert sum(item.bytes_expected for item in betas) == pytest.approx(279.2e9, rel=1e-3), "8 subjects, 284 sessions"
    text = "\n".join(lines(found))
    assert "masks: 315,997 vertices of 8 subjects" in text and "next: python -m benchmark.data prepare" in text
    assert "where to get it" not in text
    with_coco = inspect_tree(true_size, release=NSD_RELEASE)
    assert with_coco.store_bytes == pytest.approx(98.7e9, rel=0.01) and with_coco.work_bytes == 4 * 39548 * 30_000
    assert not with_coco.complete, "two photographs are not COCO"
    assert _items(with_coco, "external")[0].problems[0].found == "2 photographs"


def test_nsds_headers_and_counts_satisfy_the_loaders(true_size: Path) -> None:
    nsd = NSD.open(true_size)
    assert nsd.published and nsd.kind == "nsd" and nsd.n_images == 73_000 and nsd.image_size == 425
    voxels = {subject: nsd.n_voxels(subject) for subject in nsd.subjects}
    assert voxels == {1: 39548, 2: 39548, 3: 39548, 4: 39548, 5: 39548, 6: 39198, 7: 39548, 8: 39511}
    assert sum(voxels.values()) == 315_997 and sum(nsd.sessions.values()) * 750 == 213_000
    test = shared_test_set(nsd, [1, 2, 5, 7])
    assert len(test) == 1000 and (np.diff(test) > 0).all() and set(test) == set(nsd.shared_ids)
    for subject, amount, shown in ((1, "1h", 750), (2, "30min", 375), (5, "15min", 188), (7, "15min-450", 450)):
        chosen = first_trials(nsd, subject, amount)
        design = loadmat(true_size / paths.DESIGN)
        images = design["subjectim"][subject - 1, design["masterordering"][0, :shown] - 1] - 1
        expected = [int(image) for image in images if image not in set(nsd.shared_ids.tolist())]
        assert chosen.image_ids.tolist() == expected and chosen.shown == shown
    assert nsd.coordinates(6, "sphere").shape == (39198, 3)
    parcels = nsd.parcels(8, "schaefer-1000")
    left = 18_981
    assert parcels.shape == (39511,) and parcels[:left].max() == 200 and parcels[left:].min() == 201
    assert Synthetic.open(nsd).n_images == 284


def test_everything_that_is_missing_is_listed_at_once(true_size: Path, tmp_path: Path) -> None:
    """Hard links, for the files are large; four things are wrong in four places."""
    root = tmp_path / "nsd"
    shutil.copytree(true_size, root, copy_function=os.link)
    (root / paths.betas(3, "rh", 31)).unlink()
    (root / paths.betas(3, "lh", 32)).unlink()
    cut = root / paths.betas(5, "lh", 7)
    cut.unlink()
    with cut.open("wb") as file:
        file.write((true_size / paths.betas(5, "lh", 7)).open("rb").read(284))
        file.truncate(300_000_000)
    (root / paths.STIMULI).unlink()
    mask = np.load(root / paths.mask(8, "rh"))
    mask[np.flatnonzero(mask)[:3]] = 0
    (root / paths.mask(8, "rh")).unlink()
    np.save(root / paths.mask(8, "rh"), mask)
    found = inspect_tree(root, release=TWO_PHOTOGRAPHS)
    assert not found.complete
    wrong = {(p.path, p.found, p.expected) for item in found.items for p in item.problems}
    assert wrong == {
        (paths.betas(3, "rh", 31), "missing", "betas of session 31 of 32"),
        (paths.betas(3, "lh", 32), "missing", "betas of session 32 of 32"),
        (
            paths.betas(5, "lh", 7),
            "truncated (300000000 bytes)",
            "at least 491526284 bytes for 163842 vertices x 750 trials",
        ),
        (paths.STIMULI, "missing", "the images"),
        (paths.mask(8, "rh"), "20527 vertices in use", "20530"),
    }
    text = "\n".join(lines(found))
    assert "62 of 64 files" in text and "incomplete: 4 of what is needed" in text
    assert "s3://natural-scenes-dataset/nsddata_betas/ppdata nsddata_betas/ppdata" in text
    assert "fill in the form at https://naturalscenesdataset.org" in text
    assert "algonauts.csail.mit.edu" in text and "images.cocodataset.org" not in text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"images": 73_001}, "73000 x 425 x 425 images x height x width; expected 73001 x 425 x 425"),
        ({"trials_designed": 22_500}, "30000 trials; expected 22500"),
        ({"shared": 907}, "1000 shared images; expected 907"),
        ({"trials_per_session": 751}, "163842 x 750 vertices x trials; expected 163842 x 751"),
        ({"synthetic_images": (220, 65)}, "64 x 714 x 1360 images x height x width; expected 65 x 714 x 1360"),
        ({"synthetic_trials": 745}, "744 trials; expected 745"),
    ],
)
def test_other_counts_than_nsds_are_wrong(true_size: Path, changes: dict[str, object], says: str) -> None:
    found = inspect_tree(true_size, PARTS, release=replace(TWO_PHOTOGRAPHS, **changes))  # type: ignore[arg-type]
    problems = [f"{p.found}; expected {p.expected}" for item in found.items for p in item.problems]
    assert says in problems and not found.complete
    assert any(item.state == "wrong" for item in found.items)


def test_an_empty_folder_is_told_all_that_it_takes(tmp_path: Path) -> None:
    found = inspect_tree(tmp_path)
    text = "\n".join(lines(found))
    assert {item.state for item in found.items} == {"missing"}
    for word in (
        "naturalscenesdataset.org",
        "http://images.cocodataset.org/zips/unlabeled2017.zip",
        "algonauts.csail.mit.edu",
        "ThomasYeoLab/CBIG",
        "FreeSurfer",
        "agreement:",
        "about 339 GB to get",
    ):
        assert word in text, word
    assert max(map(len, text.splitlines())) < 350 and len(text.splitlines()) < 60


def test_a_subset_of_subjects_and_parts(true_size: Path, tmp_path: Path) -> None:
    found = inspect_tree(true_size, ["betas"], [2, 6])
    assert found.complete, "neither COCO nor the other subjects are needed"
    assert "masks: 78,746 vertices of 2 subjects" in "\n".join(lines(found))
    assert "subj0[26]/fsaverage" in "\n".join(lines(inspect_tree(tmp_path, ["betas"], [6, 2])))


def test_an_archive_that_is_not_unpacked_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "unlabeled2017.zip").write_bytes(b"PK")
    item = _items(inspect_tree(tmp_path), "external")[0]
    assert item.problems[0].found == "not unpacked (coco/unlabeled2017.zip is there)"


def test_masks_may_be_made_of_nsds_labels(true_size: Path, tmp_path: Path) -> None:
    for hemisphere in paths.HEMISPHERES:
        for label in paths.general_labels(hemisphere):
            path = tmp_path / label
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.MGHImage(np.zeros((163_842, 1, 1), np.float32), np.eye(4)), path)
    masks = inspect_tree(tmp_path, ["betas"]).items[2]
    assert masks.state == "complete" and "to be made of nsdgeneral and RSC" in masks.name


# --- miniatures and the Algonauts release -----------------------------------------------------------------------------


def test_a_miniature_is_held_against_its_own_settings(tiny_tree: Path, complete_tree: Path) -> None:
    found = inspect_tree(tiny_tree)
    assert found.complete and found.kind == "miniature"
    assert [item.state for item in _items(found, "synthetic")] == ["missing", "missing"]
    assert not inspect_tree(tiny_tree, ["synthetic"]).complete
    everything = inspect_tree(complete_tree, PARTS)
    assert everything.complete and not any(item.problems for item in everything.items)
    assert "python -m benchmark.data simulate" in "\n".join(lines(found)), "not Amazon"


def _cut_betas(root: Path) -> None:
    path = root / paths.betas(2, "rh", 3)
    path.write_bytes(path.read_bytes()[:-30])


def _other_brick(root: Path) -> None:
    with h5py.File(root / paths.STIMULI, "w") as file:
        file["imgBrick"] = np.zeros((51, 32, 32, 3), np.uint8)


def _other_design(root: Path) -> None:
    design = {k: v.astype(int) for k, v in loadmat(root / paths.DESIGN).items() if not k.startswith("__")}
    design["sharedix"][0, 0] = design["subjectim"][0, -1]
    savemat(root / paths.DESIGN, design)


def _short_list(root: Path) -> None:
    lines = (root / paths.STIM_INFO).read_text().splitlines()
    (root / paths.STIM_INFO).write_text("\n".join(lines[:-3]))


def _empty_photograph(root: Path) -> None:
    (root / paths.EXTERNAL / "000000000002.jpg").write_bytes(b"")


def _not_a_photograph(root: Path) -> None:
    (root / paths.EXTERNAL / "000000000001.jpg").write_bytes(b"<html>")


def _fewer_photographs(root: Path) -> None:
    (root / paths.EXTERNAL / "000000000001.jpg").unlink()


def _cut_annotation(root: Path) -> None:
    path = root / paths.annotation("lh", paths.ATLASES["schaefer-400"])
    path.write_bytes(path.read_bytes()[:40])


def _cut_surface(root: Path) -> None:
    path = root / paths.surface("rh", "inflated")
    path.write_bytes(path.read_bytes()[:60])


def _smaller_surface(root: Path) -> None:
    path = root / paths.surface("rh", "white")
    nib.freesurfer.write_geometry(path, np.zeros((12, 3)), np.array([[0, 1, 2]]))


def _wrong_synthetic(root: Path) -> None:
    order = loadmat(root / paths.SYNTHETIC_DESIGN)["masterordering"]
    savemat(root / paths.SYNTHETIC_DESIGN, {"masterordering": order[:, :-1]})


def _cut_ncsnr(root: Path) -> None:
    (root / paths.ncsnr(1, "rh")).write_bytes(b"")


@pytest.mark.parametrize(
    ("harm", "part", "file", "says"),
    [
        (_cut_betas, "betas", paths.betas(2, "rh", 3), "truncated"),
        (_other_brick, "images", paths.STIMULI, "51 x 32 x 32 images"),
        (_other_design, "images", paths.DESIGN, "disagree"),
        (_short_list, "images", paths.STIM_INFO, "49 lines"),
        (_empty_photograph, "external", f"{paths.EXTERNAL}/000000000002.jpg", "is empty"),
        (_not_a_photograph, "external", f"{paths.EXTERNAL}/000000000001.jpg", "damaged"),
        (_fewer_photographs, "external", paths.EXTERNAL, "5 photographs"),
        (_cut_annotation, "atlases", paths.annotation("lh", paths.ATLASES["schaefer-400"]), "damaged"),
        (_cut_surface, "surfaces", paths.surface("rh", "inflated"), "damaged"),
        (_smaller_surface, "surfaces", paths.surface("rh", "white"), "12 vertices"),
        (_wrong_synthetic, "synthetic", paths.synthetic_betas(1, "lh"), "x 36 vertices x trials"),
        (_cut_ncsnr, "ncsnr", paths.ncsnr(1, "rh"), "no readable .mgh header"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_each_kind_of_damage_is_named(
    broken_complete: Path, harm: Callable[[Path], None], part: str, file: str, says: str
) -> None:
    harm(broken_complete)
    found = inspect_tree(broken_complete, [part])
    assert not found.complete
    problems = {p.path: p for item in _items(found, part) for p in item.problems}
    assert says in problems[file].found and problems[file].expected
    elsewhere = [item.part for item in found.items if item.part not in (part, "algonauts") and item.problems]
    assert elsewhere == []
    assert inspect_tree(broken_complete, [p for p in PARTS if p != part]).complete


def test_the_fallback_says_its_limits(complete_tree: Path, tmp_path: Path) -> None:
    shutil.copytree(complete_tree / paths.ALGONAUTS, tmp_path / paths.ALGONAUTS)
    shutil.copytree(complete_tree / "simulation", tmp_path / "simulation")
    found = inspect_tree(tmp_path, ["betas", "images"])
    assert found.kind == "algonauts" and found.complete
    text = "\n".join(lines(found))
    assert "limit: no single trials" in text and "at most 37 of 40 sessions" in text and "982" in text
    both = inspect_tree(complete_tree)
    assert both.kind == "miniature" and [i.name for i in _items(both, "algonauts")] == [
        "subject 1: Algonauts averages",
        "subject 2: Algonauts averages",
    ]
    assert inspect_tree(complete_tree, source="algonauts").kind == "algonauts"


def test_the_published_numbers_of_the_fallback(complete_tree: Path, tmp_path: Path) -> None:
    """Not a miniature: the release's own counts are expected."""
    shutil.copytree(complete_tree / paths.ALGONAUTS, tmp_path / paths.ALGONAUTS)
    found = inspect_tree(tmp_path, ["images"], [1])
    wrong = {p.path: (p.found, p.expected) for item in _items(found, "images") for p in item.problems}
    training = len(list((tmp_path / paths.algonauts_images(1, "training")).iterdir()))
    assert wrong[paths.algonauts_images(1, "training")] == (f"{training} images", "9841")
    assert wrong[paths.algonauts_images(1, "test")][1] == "159"


# --- other forms of a surface -----------------------------------------------------------------------------------------


def test_a_gifti_surface_stands_in_for_freesurfers(broken_complete: Path) -> None:
    nsd = NSD.open(broken_complete)
    expected = nsd.coordinates(1, "white")
    for side, ending in zip(paths.HEMISPHERES, (".gii", ".surf.gii"), strict=True):
        path = broken_complete / paths.surface(side, "white")
        points, faces = nib.freesurfer.read_geometry(path)
        arrays = [
            GiftiDataArray(points.astype(np.float32), intent="NIFTI_INTENT_POINTSET"),
            GiftiDataArray(faces.astype(np.int32), intent="NIFTI_INTENT_TRIANGLE"),
        ]
        nib.save(GiftiImage(darrays=arrays), f"{path}{ending}")
        path.unlink()
    np.testing.assert_allclose(NSD.open(broken_complete).coordinates(1, "white"), expected, atol=1e-4)
    assert inspect_tree(broken_complete, ["surfaces"]).complete
    with pytest.raises(UserError, match=r"no surface 'whit' \(did you mean 'white'\?\)"):
        nsd.coordinates(1, "whit")


def test_surfaces_and_atlases_place_the_same_vertices(complete_tree: Path) -> None:
    nsd = NSD.open(complete_tree)
    for surface in paths.SURFACE_NAMES:
        parts = []
        for side in paths.HEMISPHERES:
            points, _ = nib.freesurfer.read_geometry(complete_tree / paths.surface(side, surface))
            parts.append(points[np.load(complete_tree / paths.mask(2, side)) > 0])
        np.testing.assert_allclose(nsd.coordinates(2, surface), np.concatenate(parts), atol=1e-4)
    assert np.allclose(np.linalg.norm(nsd.coordinates(2, "sphere"), axis=1), 100, atol=0.01)
    for short, name in paths.ATLASES.items():
        parts, offset = [], 0
        for side in paths.HEMISPHERES:
            labels, _, names = nib.freesurfer.read_annot(complete_tree / paths.annotation(side, name))
            parts.append(labels[np.load(complete_tree / paths.mask(2, side)) > 0] + offset)
            offset += len(names) - 1
        np.testing.assert_array_equal(nsd.parcels(2, short), np.concatenate(parts))


# --- the command line -------------------------------------------------------------------------------------------------


def _run(*words: object) -> int:
    return main_guard(lambda: main([str(word) for word in words]))


def test_check_ends_with_0_1_or_2(tiny_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("check", tiny_tree) == 0
    assert "complete: everything that is needed is there" in capsys.readouterr().out
    assert _run("check", tmp_path) == 1
    assert "incomplete: 12 of what is needed" in capsys.readouterr().out
    for words, says in (
        ((tmp_path / "nowhere",), "nowhere: no such folder"),
        ((tmp_path, "--parts", "beta"), "no part 'beta' (did you mean 'betas'?)"),
        ((tiny_tree, "--subjects", "1,3"), "no subject 3; expected some of 1, 2"),
        ((tmp_path, "--digests"), "is no prepared store"),
    ):
        assert _run("check", *words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and says in error and len(error.splitlines()) == 1


def test_the_report_as_json(true_size: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("check", true_size, "--json", "--parts", "betas,images") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["complete"] is True and report["kind"] == "nsd" and report["root"] == str(true_size)
    states = {(item["part"], item["state"]) for item in report["items"]}
    assert ("betas", "complete") in states and ("external", "wrong") in states
    first = report["items"][0]
    assert first["bytes_present"] >= first["bytes_expected"] == 73_000 * 425 * 425 * 3
    assert report["supplies"]["nsd"]["agreement"].startswith("NSD Data Access Agreement")
    assert report["store_bytes"] > 9e10
    assert _run("check", tmp_path, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["items"][0]["problems"] == [{"path": paths.STIMULI, "found": "missing", "expected": "the images"}]
    assert report["items"][0]["commands"][0].startswith("aws s3 sync --no-sign-request s3://natural-scenes-dataset/")


def test_prepare_and_check_of_a_store(tiny_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "store"
    assert _run("prepare", tiny_tree, "--out", out, "--subjects", "2", "--external", "4", "--workers", "1") == 0
    streams = capsys.readouterr()
    assert f"{out}: betas, images, external, atlases, surfaces, ncsnr; 1 subjects with" in streams.out
    assert "made in 0:" in streams.out and "left out synthetic: not in" in streams.err
    assert _run("prepare", tiny_tree, "--out", out, "--subjects", "2", "--external", "4") == 0
    assert "already there, unchanged" in capsys.readouterr().out
    assert _run("check", out, "--digests") == 0
    assert "complete: every byte is as it was written" in capsys.readouterr().out
    data = bytearray((out / "images_32.npy").read_bytes())
    data[-1] ^= 1
    (out / "images_32.npy").write_bytes(data)
    assert _run("check", out) == 0, "its size is right"
    assert _run("check", out, "--digests", "--json") == 1
    report = json.loads(capsys.readouterr().out.split("\n", 2)[2])
    assert report["kind"] == "store" and "images_32.npy: rows 0..31 differ" in report["problems"][0]
    (out / "images_32.npy").unlink()
    assert inspect_store(out).problems == ("images_32.npy: missing",)
    assert _run("prepare", tiny_tree, "--out", out, "--subjects", "2", "--external", "4") == 0
    assert inspect_store(out, digests=True).complete
    for words, says in (
        ((tiny_tree, "--out", out, "--workers", "0"), "--workers 0: expected 1 or more"),
        ((tmp_path / "no", "--out", out), "no such data folder"),
        ((tiny_tree, "--out", out, "--source", "algonauts"), "no averaged betas of the Algonauts 2023 release"),
    ):
        capsys.readouterr()
        assert _run("prepare", *words) == 2
        error = capsys.readouterr().err
        assert says in error and len(error.splitlines()) <= 2
    for words in (("check", out, "--subjects", "one"), ("prepare", out)):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_an_unfinished_store_is_told_apart(tiny_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    prepare(tiny_tree, out, parts=["images"])
    manifest = json.loads((out / "store.json").read_text())
    manifest["about"]["complete"] = False
    (out / "store.json").write_text(json.dumps(manifest))
    found = inspect_store(out)
    assert not found.complete and found.problems == ("not finished",)


def test_images_of_odd_sizes_are_no_trouble(broken: Path) -> None:
    Image.fromarray(np.zeros((10, 700, 3), np.uint8)).save(broken / paths.EXTERNAL / "000000000001.jpg")
    assert inspect_tree(broken).complete
