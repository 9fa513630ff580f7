"""Sets of images: every format gives the same pixels, pairing goes by id, and what is wrong is named with its remedy."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file
from scipy.io import savemat

from benchmark.errors import UserError
from benchmark.imagesets import ImageSet, containers, paired, read_ids, read_images, read_subset
from metrics.evaluate import evaluate
from metrics.protocols import get_protocol

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(4)
BYTES = RNG.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
BYTES[:, 0, 0], BYTES[:, 0, 1] = 0, 255
FLOATS = (BYTES / 255).astype(np.float32)
FIRST = np.ascontiguousarray(FLOATS.transpose(0, 3, 1, 2))  # colours first


def _png(path: Path, image: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)
    return path


def _folder(path: Path, stems: list[str], images: np.ndarray = BYTES, suffix: str = ".png") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for k, stem in enumerate(stems):
        _png(path / f"{stem}{suffix}", images[k % len(images)])
    return path


def _h5(path: Path, values: np.ndarray, name: str = "images", **options: object) -> Path:
    with h5py.File(path, "a") as file:
        file.create_dataset(name, data=values, **options)
    return path


@contextmanager
def _refused(*patterns: str) -> Iterator[None]:
    """Expect a UserError of one or two printable lines in which all patterns occur."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    lines = message.split("\n")
    assert len(lines) <= 2 and all(line.isprintable() and line for line in lines), message
    for pattern in patterns:
        assert re.search(pattern, message), message


# --- the same pixels from every format --------------------------------------------------------------------------------

WRITERS: dict[str, tuple[Callable[[Path], str], np.ndarray]] = {
    "npy bytes": (lambda d: (np.save(d / "a.npy", BYTES), "a.npy")[1], BYTES),
    "npy colours first": (lambda d: (np.save(d / "a.npy", FIRST), "a.npy")[1], FLOATS),
    "npy by columns": (lambda d: (np.save(d / "a.npy", np.asfortranarray(FLOATS)), "a.npy")[1], FLOATS),
    "npy big-endian": (lambda d: (np.save(d / "a.npy", FIRST.astype(">f4")), "a.npy")[1], FLOATS),
    "npy float64": (lambda d: (np.save(d / "a.npy", FLOATS.astype(np.float64)), "a.npy")[1], FLOATS.astype(np.float64)),
    "npy float16": (
        lambda d: (np.save(d / "a.npy", FIRST.astype(np.float16)), "a.npy")[1],
        FLOATS.astype(np.float16).astype(np.float32),
    ),
    "npz": (lambda d: (np.savez(d / "a.npz", recon=BYTES), "a.npz")[1], BYTES),
    "npz by name": (lambda d: (np.savez(d / "a.npz", recon=FIRST, seen=BYTES), "a.npz::recon")[1], FLOATS),
    "npz compressed": (lambda d: (np.savez_compressed(d / "a.npz", FIRST), "a.npz")[1], FLOATS),
    "safetensors": (
        lambda d: (save_file({"x": FIRST, "y": BYTES}, d / "a.safetensors"), "a.safetensors::x")[1],
        FLOATS,
    ),
    "safetensors bfloat16": (
        lambda d: (save_torch_file({"x": torch.from_numpy(FIRST).bfloat16()}, d / "a.safetensors"), "a.safetensors")[1],
        torch.from_numpy(FLOATS).bfloat16().float().numpy(),
    ),
    "pt": (lambda d: (torch.save(torch.from_numpy(FIRST), d / "a.pt"), "a.pt")[1], FLOATS),
    "pt bytes": (lambda d: (torch.save(torch.from_numpy(BYTES).permute(0, 3, 1, 2), d / "a.pt"), "a.pt")[1], BYTES),
    "pt half by name": (
        lambda d: (torch.save({"x": torch.from_numpy(FIRST).half(), "y": torch.zeros(3)}, d / "a.pt"), "a.pt::x")[1],
        FLOATS.astype(np.float16).astype(np.float32),
    ),
    "pt bfloat16": (
        lambda d: (torch.save(torch.from_numpy(FIRST).bfloat16(), d / "a.pt"), "a.pt")[1],
        torch.from_numpy(FLOATS).bfloat16().float().numpy(),
    ),
    "h5": (lambda d: (_h5(d / "a.h5", BYTES), "a.h5")[1], BYTES),
    "hdf5 by name, compressed, in groups": (
        lambda d: (
            _h5(d / "a.hdf5", FIRST, "recons/subj01", chunks=(2, 3, 8, 4), compression="gzip", shuffle=True),
            _h5(d / "a.hdf5", BYTES, "seen"),
            "a.hdf5::recons/subj01",
        )[2],
        FLOATS,
    ),
    "folder of PNG": (lambda d: (_folder(d / "f", list("01234")), "f")[1], BYTES),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_pixels(name: str, tmp_path: Path) -> None:
    write, expected = WRITERS[name]
    images = read_images(tmp_path / write(tmp_path))
    assert (images.shape, images.dtype, len(images)) == (expected.shape, expected.dtype, 5)
    np.testing.assert_array_equal(images[:], expected)
    np.testing.assert_array_equal(images[3], expected[3])
    np.testing.assert_array_equal(images[-1], expected[-1])
    np.testing.assert_array_equal(images[1:4], expected[1:4])
    np.testing.assert_array_equal(images[::-2], expected[::-2])
    np.testing.assert_array_equal(images[[4, 0, 0]], expected[[4, 0, 0]])
    np.testing.assert_array_equal(images[np.array([True, False, True, False, False])], expected[[0, 2]])
    assert images[2:2].shape == images[[]].shape == (0, 8, 8, 3)
    assert all((own == other).all() for own, other in zip(images, expected, strict=True))
    assert images[1:3].flags.c_contiguous
    with pytest.raises(IndexError):
        images[5]
    chosen = images.select([3, 1, 3])
    np.testing.assert_array_equal(chosen.select([1, 2])[:], expected[[1, 3]])
    np.testing.assert_array_equal(images.select([4, 2])[1], expected[2])
    with ThreadPoolExecutor(4) as pool:
        for k, image in enumerate(pool.map(images.__getitem__, list(range(5)) * 8)):
            np.testing.assert_array_equal(image, expected[k % 5])


@pytest.mark.parametrize(("suffix", "options"), [(".webp", {"lossless": True}), (".WEBP", {"lossless": True})])
def test_lossless_webp_gives_the_pixels(suffix: str, options: dict[str, object], tmp_path: Path) -> None:
    for k, image in enumerate(BYTES):
        _png(tmp_path / f"{k}{suffix}", image, **options)
    np.testing.assert_array_equal(read_images(tmp_path)[:], BYTES)


def test_jpeg_gives_what_pillow_decodes(tmp_path: Path) -> None:
    _png(tmp_path / "1.jpg", BYTES[0])
    _png(tmp_path / "2.JPEG", BYTES[1])
    images = read_images(tmp_path)
    np.testing.assert_array_equal(images[0], np.asarray(Image.open(tmp_path / "1.jpg")))
    np.testing.assert_array_equal(images[1], np.asarray(Image.open(tmp_path / "2.JPEG")))


def test_images_of_three_pixels_are_read_as_the_documentation_says(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", FLOATS[:, :3, :3].transpose(0, 3, 1, 2))
    np.save(tmp_path / "b.npy", BYTES[:, :3, :3])
    np.testing.assert_array_equal(read_images(tmp_path / "a.npy")[:], FLOATS[:, :3, :3])
    np.testing.assert_array_equal(read_images(tmp_path / "b.npy")[:], BYTES[:, :3, :3])


def test_the_digest_is_that_of_the_pixels_and_their_order(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", BYTES)
    folder = read_images(_folder(tmp_path / "f", list("01234")))
    array = read_images(tmp_path / "a.npy")
    assert folder.digest == array.digest == array.check()
    assert array.select([1, 0, 2, 3, 4]).digest != array.digest
    assert array.select([1, 0, 2, 3, 4]).select([1, 0, 2, 3, 4]).digest == array.digest
    done: list[tuple[int, int]] = []
    read_images(tmp_path / "a.npy").check(lambda *at: done.append(at))
    assert done[-1] == (5, 5)


def test_rounding_past_the_ends_is_clipped(tmp_path: Path) -> None:
    values = FLOATS.copy()
    values[1, 0, 0] = [1.0005, -0.0005, 0.5]
    np.save(tmp_path / "a.npy", values)
    np.testing.assert_array_equal(read_images(tmp_path / "a.npy")[:], values.clip(0, 1))


def test_sets_on_disk_score_as_arrays_in_memory_do(tmp_path: Path) -> None:
    other = RNG.permutation(BYTES.reshape(-1, 3)).reshape(BYTES.shape)
    np.save(tmp_path / "a.npy", other.transpose(0, 3, 1, 2) / np.float32(255))
    (tmp_path / "a.ids.txt").write_text("4\n3\n2\n1\n0\n")
    truths = read_images(_folder(tmp_path / "f", list("01234")))
    recons, seen = paired(read_images(tmp_path / "a.npy"), truths)
    keys = ("PixCorr", "SSIM")
    scores = evaluate(recons, seen, get_protocol("brain-it"), {}, recons.ids, keys=keys)
    plain = evaluate(other[::-1].copy(), BYTES, get_protocol("brain-it"), {}, [0, 1, 2, 3, 4], keys=keys)
    assert scores.image_ids == (4, 3, 2, 1, 0)
    for key in keys:
        np.testing.assert_allclose(scores.per_image[key], plain.per_image[key][::-1], atol=1e-6)


# --- memory -----------------------------------------------------------------------------------------------------------


def _sparse_npy(path: Path, n: int, side: int) -> None:
    header = np.lib.format.header_data_from_array_1_0(np.empty((0, side, side, 3), np.uint8))
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (n, side, side, 3)})
        file.truncate(file.tell() + n * side * side * 3)


@pytest.mark.parametrize("kind", ["npy", "h5", "folder"])
def test_a_large_set_is_never_in_memory_at_once(kind: str, tmp_path: Path) -> None:
    n, side = (150, 768) if kind == "npy" else (120, 256)
    if kind == "npy":
        _sparse_npy(path := tmp_path / "a.npy", n, side)
    elif kind == "h5":
        path = _h5(
            tmp_path / "a.h5", np.ones((n, side, side, 3), np.uint8), chunks=(4, side, 64, 3), compression="gzip"
        )
    else:
        path = tmp_path / "f"
        _png(path / "0.png", np.full((side, side, 3), 7, np.uint8))
        for k in range(1, n):
            os.link(path / "0.png", path / f"{k}.png")
    total = n * side * side * 3
    tracemalloc.start()
    try:
        images = read_images(path)
        assert sum(int(images[k : k + 8].shape[0]) for k in range(0, n, 8)) == n
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < total / 5, f"{peak} of {total} bytes"


def test_a_mapped_file_does_not_count_as_memory_either(tmp_path: Path) -> None:
    _sparse_npy(tmp_path / "a.npy", 150, 768)
    code = (
        "import resource, sys; from benchmark.imagesets import read_images\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "images = read_images(sys.argv[1]); before = peak()\n"
        "for k in range(0, len(images), 8): images[k : k + 8]\n"
        "print(peak() - before)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.npy"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(run.stdout) * 1024 < 90e6 < 150 * 768 * 768 * 3


# --- which image is which ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stem", "subject", "own"),
    [
        ("nsd00034", None, 34),
        ("NSD-72999", None, 72_999),
        ("nsd_34", None, 34),
        ("train-0001_nsd-00012", None, 12),
        ("test-0001_nsd-00000", None, 0),
        ("nsd00034_recon", None, 34),
        ("0034", None, 34),
        ("34", None, 34),
        ("subj01_nsd00034", 1, 34),
        ("sub-02_0007", 2, 7),
        ("subject3_cat", 3, "cat"),
        ("nsd00034_subj05", 5, 34),
        ("cat", None, "cat"),
        ("cat 2", None, "cat 2"),
        ("insdide7", None, "insdide7"),
        ("subj01", None, "subj01"),
        ("-5", None, "-5"),
        ("٣", None, "٣"),
        ("9" * 30, None, "9" * 30),
    ],
)
def test_names_tell_id_and_subject(stem: str, subject: int | None, own: int | str, tmp_path: Path) -> None:
    images = read_images(_folder(tmp_path / "f", [stem]))
    assert images.ids == (own,)
    assert images.subjects == (None if subject is None else (subject,))
    assert images.has_ids
    assert images.name(0) == str(tmp_path / "f" / f"{stem}.png")


def test_a_folder_is_ordered_by_subject_and_id_not_by_name(tmp_path: Path) -> None:
    images = read_images(_folder(tmp_path / "f", ["subj02_nsd7", "subj01_nsd100", "subj01_nsd20", "subj02_nsd100"]))
    assert images.subjects == (1, 1, 2, 2)
    assert images.ids == (20, 100, 7, 100)
    np.testing.assert_array_equal(images[:], BYTES[[2, 1, 0, 3]])


def test_subjects_may_have_folders_of_their_own(tmp_path: Path) -> None:
    _folder(tmp_path / "f" / "subj02", ["nsd3", "nsd1"])
    _folder(tmp_path / "f" / "subj01", ["subj01_nsd1"], BYTES[2:])
    images = read_images(tmp_path / "f")
    assert (images.subjects, images.ids) == ((1, 2, 2), (1, 1, 3))
    np.testing.assert_array_equal(images[:], BYTES[[2, 1, 0]])


def test_hidden_files_are_ignored_and_others_are_noted(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "f", ["1", "2"])
    for name in (".DS_Store", "._1.png", "Thumbs.db"):
        (folder / name).write_text("x")
    assert read_images(folder).notes == ()
    (folder / "log.txt").write_text("x")
    (folder / "old").mkdir()
    (note,) = read_images(folder).notes
    assert "log.txt, old" in note and "left out" in note


IDS = [41, 7, 99, 3, 12]


@pytest.mark.parametrize(
    "where", ["txt", "json", "npy", "npz", "npz text", "safetensors", "pt", "pt list", "h5", "h5 top"]
)
def test_arrays_find_the_ids_that_belong_to_them(where: str, tmp_path: Path) -> None:
    path: str | Path = tmp_path / f"a.{where.split()[0]}"
    if where in ("txt", "json", "npy"):
        np.save(path := tmp_path / "a.npy", BYTES)
        {
            "txt": lambda p: p.write_text("# first\n" + "\n".join(f"nsd{i:05d}" for i in IDS) + "\n"),
            "json": lambda p: p.write_text(json.dumps([41, "nsd00007", 99, "3", 12])),
            "npy": lambda p: np.save(p, np.array(IDS, np.int32)),
        }[where](tmp_path / f"a.ids.{where}")
    elif where == "npz":
        np.savez(path, x=BYTES, ids=np.array(IDS))
    elif where == "npz text":
        np.savez_compressed(path, x=BYTES, ids=np.array([f"nsd{i}" for i in IDS]))
    elif where == "safetensors":
        save_file({"x": BYTES, "ids": np.array(IDS)}, path)
    elif where == "pt":
        torch.save({"x": torch.from_numpy(BYTES), "ids": torch.tensor(IDS)}, path)
    elif where == "pt list":
        torch.save({"x": torch.from_numpy(BYTES), "ids": ["nsd41", 7, 99, 3, "12"]}, path)
    elif where == "h5":
        _h5(_h5(path, BYTES, "g/x"), np.array(IDS, np.int16), "g/ids")
        path = f"{path}::g/x"
    else:
        _h5(_h5(path, BYTES, "g/x"), np.array([f"nsd{i}" for i in IDS], "S"), "ids")
    images = read_images(path)
    assert images.ids == tuple(IDS)
    assert images.has_ids and images.subjects is None
    assert images.name(2) == f"{str(path) if where != 'h5 top' else f'{path}::g/x'}, row 2" or where.startswith(
        ("npz", "safetensors", "pt")
    )


def test_lists_of_ids_may_tell_subjects(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", BYTES[:4])
    (tmp_path / "a.ids.txt").write_text("subj01_nsd3\nsubj01_nsd7\nsubj02_nsd3\nsubj02_nsd7\n")
    images = read_images(tmp_path / "a.npy")
    assert (images.subjects, images.ids) == ((1, 1, 2, 2), (3, 7, 3, 7))
    np.save(tmp_path / "pairs.npy", np.array([[1, 3], [1, 7], [2, 3], [2, 7]]))
    (tmp_path / "a.ids.txt").unlink()
    again = read_images(tmp_path / "a.npy", ids=tmp_path / "pairs.npy")
    assert (again.subjects, again.ids) == (images.subjects, images.ids)


def test_rows_without_ids_are_numbered(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", BYTES)
    images = read_images(tmp_path / "a.npy")
    assert images.ids == (0, 1, 2, 3, 4)
    assert not images.has_ids
    assert images.select([2, 0]).ids == (2, 0)


def test_ids_that_are_handed_in_name_the_rows_of_an_array(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", BYTES)
    (tmp_path / "ids.csv").write_text("nsdId,coco\n" + "".join(f"{i},x\n" for i in IDS))
    assert read_images(tmp_path / "a.npy", ids=tmp_path / "ids.csv").ids == tuple(IDS)
    (tmp_path / "a.ids.txt").write_text("\n".join(map(str, IDS)))
    assert read_images(tmp_path / "a.npy", ids=tmp_path / "ids.csv").ids == tuple(IDS)
    (tmp_path / "a.ids.txt").write_text("\n".join(map(str, reversed(IDS))))
    with _refused("ids.csv: other ids than those that came with .*a.npy", "leave one out"):
        read_images(tmp_path / "a.npy", ids=tmp_path / "ids.csv")
    (tmp_path / "few.txt").write_text("3\n4\n")
    (tmp_path / "a.ids.txt").unlink()
    with _refused("few.txt: 2 ids for the 5 images in .*a.npy; expected one for each"):
        read_images(tmp_path / "a.npy", ids=tmp_path / "few.txt")


def test_ids_that_are_handed_in_choose_among_images_that_have_their_own(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "f", [f"subj0{s}_nsd{i}" for s in (1, 2) for i in (3, 7)])
    (tmp_path / "ids.txt").write_text("nsd7\nnsd3\n")
    images = read_images(folder, ids=tmp_path / "ids.txt")
    assert (images.subjects, images.ids) == ((1, 1, 2, 2), (7, 3, 7, 3))
    np.testing.assert_array_equal(images[:], BYTES[[1, 0, 3, 2]])
    (tmp_path / "ids.txt").write_text("7\n8\n")
    with _refused("ids.txt: no image 8, 8 in .*f", "expected ids of images that are there"):
        read_images(folder, ids=tmp_path / "ids.txt")
    _h5(tmp_path / "nsd_stimuli.hdf5", BYTES, "imgBrick")
    (tmp_path / "ids.txt").write_text("4\n2\n")
    images = read_images(tmp_path / "nsd_stimuli.hdf5", ids=tmp_path / "ids.txt")
    assert images.ids == (4, 2) and images.has_ids
    np.testing.assert_array_equal(images[:], BYTES[[4, 2]])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "\ufeff3\r\n\r\n# no\r\nnsd00034\r\nsubj01.png\r\n", (3, 34, "subj01")),
        ("a.json", '[3, "nsd00034", "a/b"]', (3, 34, "a/b")),
        ("a.csv", "image_id,x\nnsd1,2\nnsd2,2\n", (1, 2)),
        ("a.csv", "1,2\n3,2\n", (1, 3)),
        ("a.tsv", "cat\t1\ndog.png\t2\n", ("cat", "dog")),
    ],
)
def test_lists_of_ids(name: str, content: str, expected: tuple[object, ...], tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read_ids(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"3\n4\n3\n", "entry 1 and entry 3 are both image 3"),
        ("a.txt", b"\n# none\n", "holds no ids"),
        ("a.txt", b"\xff\xfe3", "damaged .*UTF-8"),
        ("a.txt", b"1\n" + b"x" * 300, "id 2 is 'xxx"),
        ("a.txt", b"a\x01b", r"id 1 is 'a\\x01b'"),
        ("a.json", b'{"ids": [1]}', "holds no JSON list"),
        ("a.json", b"[1, 2", "damaged"),
        ("a.json", b"[1, 2.5]", "id 2 is 2.5; expected whole numbers from 0, or names"),
        ("a.json", b"[true]", "id 1 is True"),
        ("a.json", b"[-1]", "id 1 is -1"),
        ("a.json", b"[" * 100_000, "damaged"),
        ("a.json", b"[" + b"9" * 5000 + b"]", "damaged|id 1 is"),
        ("a.yaml", b"1", "unknown kind of list '.yaml'; expected one of .txt, .json"),
        ("a.npy", b"x", "damaged"),
        ("missing.txt", None, "no such file"),
    ],
)
def test_wrong_lists_of_ids_are_refused(name: str, content: bytes | None, complaint: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with _refused(complaint, re.escape(name)):
        read_ids(tmp_path / name)


@pytest.mark.parametrize("values", [np.zeros((2, 3), int), np.zeros(3), np.array([{"a": 1}], object), np.array(5)])
def test_wrong_arrays_of_ids_are_refused(values: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", values, allow_pickle=True)
    with _refused("a.npy"):
        read_ids(tmp_path / "a.npy")


# --- pairing ----------------------------------------------------------------------------------------------------------


def _arrays(tmp_path: Path, name: str, ids: list[object] | None, n: int | None = None) -> ImageSet:
    count = len(ids) if ids is not None else n or 0
    np.save(tmp_path / f"{name}.npy", np.arange(count * 12, dtype=np.uint8).reshape(count, 2, 2, 3))
    if ids is not None:
        (tmp_path / f"{name}.ids.txt").write_text("\n".join(map(str, ids)))
    return read_images(tmp_path / f"{name}.npy", what=f"{name}s")


def test_images_are_paired_by_id(tmp_path: Path) -> None:
    truths = read_images(_folder(tmp_path / "t", ["nsd00001", "nsd00002", "nsd00003"]), what="truths")
    recons, seen = paired(_arrays(tmp_path, "recon", [3, 1, 2]), truths)
    assert recons.ids == seen.ids == (3, 1, 2)
    np.testing.assert_array_equal(seen[:], BYTES[[2, 0, 1]])


def test_several_subjects_share_the_truths(tmp_path: Path) -> None:
    recons = read_images(_folder(tmp_path / "r", [f"subj0{s}_nsd{i}" for s in (1, 2, 5) for i in (30, 4)]))
    truths = read_images(_folder(tmp_path / "t", ["nsd30", "nsd4"]), what="truths")
    recons, seen = paired(recons, truths)
    assert recons.ids == seen.ids == (4, 30) * 3
    assert recons.subjects == (1, 1, 2, 2, 5, 5)
    np.testing.assert_array_equal(seen[:], BYTES[[1, 0] * 3])


def test_each_subject_may_have_truths_of_its_own(tmp_path: Path) -> None:
    stems = ["subj01_nsd1", "subj01_nsd2", "subj02_nsd2", "subj02_nsd3"]
    recons = read_images(_folder(tmp_path / "r", stems))
    truths = read_images(_folder(tmp_path / "t", list(reversed(stems))), what="truths")
    _, seen = paired(recons, truths)
    np.testing.assert_array_equal(seen[:], BYTES[[3, 2, 1, 0]])
    one = read_images(_folder(tmp_path / "one", ["nsd1", "nsd2"]))
    with _refused("one: does not tell the subjects", "subj01_nsd00034.png"):
        paired(one, truths)
    assert paired(one, truths.select([0, 1]))[1].ids == (1, 2)
    with _refused("no reconstruction for 2 truths: subj02_nsd2, subj02_nsd3"):
        paired(recons.select([0, 1]), truths)


def test_rows_are_paired_where_neither_side_has_ids(tmp_path: Path) -> None:
    recons, truths = _arrays(tmp_path, "recon", None, 3), _arrays(tmp_path, "truth", None, 3)
    assert paired(recons, truths) == (recons, truths)
    with _refused("2 recons .*recon.npy.* but 3 truths .*truth.npy.*; expected one for each"):
        paired(_arrays(tmp_path, "recon", None, 2), truths)


def test_rows_are_not_guessed_where_one_side_has_ids(tmp_path: Path) -> None:
    with _refused("truth.npy: its rows have no ids, the recons have", "NAME.ids.txt, or pass --ids FILE"):
        paired(_arrays(tmp_path, "recon", [1, 2]), _arrays(tmp_path, "truth", None, 2))
    with _refused("bare.npy: its rows have no ids, the truths have"):
        paired(_arrays(tmp_path, "bare", None, 2), _arrays(tmp_path, "truth", [1, 2]))


def test_images_without_a_partner_are_named(tmp_path: Path) -> None:
    truths = read_images(_folder(tmp_path / "t", [f"nsd{i:05d}" for i in range(5)]), what="truths")
    recons = read_images(_folder(tmp_path / "r", [f"nsd{i:05d}" for i in (0, 1, 2, 3, 41, 51, 61, 71, 81)]))
    with _refused(
        r"no truth for 5 reconstructions: nsd00041, nsd00051, nsd00061 and 2 more \(did you mean 'nsd0000\d'\?\)",
        r"\(9 reconstructions in .*r, 5 truths in .*t\)",
    ):
        paired(recons, truths)
    with _refused("no reconstruction for 1 truth: nsd00004", "add or rename the reconstructions"):
        paired(recons.select([0, 1, 2, 3]), truths)
    names = read_images(_folder(tmp_path / "n", ["cat_recon", "dog_recon"]))
    with _refused(r"cat_recon, dog_recon \(did you mean 'cat'\?\)"):
        paired(names, read_images(_folder(tmp_path / "m", ["cat", "dog"]), what="truths"))


def test_each_subject_needs_every_truth(tmp_path: Path) -> None:
    truths = read_images(_folder(tmp_path / "t", ["nsd1", "nsd2"]), what="truths")
    recons = read_images(_folder(tmp_path / "r", ["subj01_nsd1", "subj01_nsd2", "subj02_nsd2"]))
    with _refused("no reconstruction of subject 2 for 1 truth: nsd1"):
        paired(recons, truths)


# --- what is wrong is named -------------------------------------------------------------------------------------------


def _saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


@pytest.mark.parametrize(
    ("array", "complaints"),
    [
        (FLOATS * 255, ("a.npy, row 0: values from 0 to 25", "divide by 255")),
        (FLOATS * 2 - 1, ("a.npy, row 0: values from -1", r"\(x \+ 1\) / 2")),
        (FLOATS * 1.2, ("a.npy, row 0: values from 0 to 1.2", "clip")),
        (FLOATS * 1000, ("row 0: values", "expected floats in")),
        (BYTES.astype(np.int64), ("int64", r"images.astype\('uint8'\)")),
        (BYTES > 5, ("bool", "uint8")),
        (FLOATS.astype(np.complex64), ("complex64", "float32")),
        (BYTES[0], (r"uint8 \(8, 8, 3\)", r"images\[None\]")),
        (BYTES[..., 0], (r"uint8 \(5, 8, 8\)", "grey")),
        (BYTES[..., :1], ("expected 3 colours", "repeat grey to RGB")),
        (np.concatenate([BYTES, BYTES[..., :1]], -1), ("expected 3 colours", "alpha")),
        (BYTES[None], ("expected four axes",)),
        (BYTES[:0], ("no image",)),
        (BYTES[:, :, :6], ("6 x 8 pixels; expected square images; crop them",)),
        (np.zeros((1, 4097, 4097, 3), np.uint8), ("4097 x 4097 pixels; expected at most 4096 a side; resize them",)),
        (np.zeros((1, 0, 0, 3), np.uint8), ("0 x 0 pixels",)),
        (np.zeros((200_001, 1, 1, 3), np.uint8), ("200001 images; expected at most 200000",)),
        (np.array([{"a": 1}], object), ("Python objects", "could run code", "refused")),
        (np.zeros(4, [("a", "f4")]), ("a.npy",)),
    ],
)
def test_wrong_arrays_are_refused(array: np.ndarray, complaints: tuple[str, ...], tmp_path: Path) -> None:
    with _refused("a.npy", *complaints):
        read_images(_saved(tmp_path / "a.npy", array))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_named_by_their_row(value: float, tmp_path: Path) -> None:
    values = FLOATS.copy()
    values[3, 2, 1] = value
    images = read_images(_saved(tmp_path / "a.npy", values))
    images[:3]
    for read in (lambda: images[2:], lambda: images[3], images.check, lambda: images.select([3]).digest):
        with _refused("a.npy, row 3: 3 values NaN or infinite"):
            read()


@pytest.mark.parametrize(
    ("mode", "complaint"),
    [
        ("L", "grey; expected RGB"),
        ("LA", "grey with transparency"),
        ("RGBA", "an alpha channel"),
        ("P", "a palette"),
        ("1", "black and white"),
        ("I;16", "mode I;16; expected RGB with 8 bits"),
    ],
)
def test_images_that_are_not_rgb_are_refused(mode: str, complaint: str, tmp_path: Path) -> None:
    _folder(tmp_path / "f", ["1", "2"])
    Image.new(mode, (8, 8)).save(tmp_path / "f" / "3.png")
    with _refused("3.png: " + complaint):
        read_images(tmp_path / "f")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _raw_png(width: int, height: int, depth: int, data: bytes, *more: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"".join([b"\x89PNG\r\n\x1a\n", _chunk(b"IHDR", header), *more, _chunk(b"IDAT", data), _chunk(b"IEND", b"")])


def test_sixteen_bits_a_colour_are_not_halved_in_silence(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + bytes(2 * 3 * 2) for _ in range(2))
    (tmp_path / "1.png").write_bytes(_raw_png(2, 2, 16, zlib.compress(rows)))
    with Image.open(tmp_path / "1.png") as image:
        assert image.mode == "RGB"  # as Pillow shows it
    with _refused("1.png: 16 bits a colour"):
        read_images(tmp_path)


def test_a_transparent_colour_is_refused(tmp_path: Path) -> None:
    _png(tmp_path / "1.png", BYTES[0], transparency=(1, 2, 3))
    with _refused("1.png: a transparent colour"):
        read_images(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_images_that_exif_turns_are_refused(suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    _png(tmp_path / f"1.{suffix}", BYTES[0], exif=exif.tobytes())
    assert len(read_images(tmp_path)) == 1
    exif[0x0112] = 6
    _png(tmp_path / f"1.{suffix}", BYTES[0], exif=exif.tobytes())
    with _refused(f"1.{suffix}: turned by its EXIF orientation", "exif_transpose"):
        read_images(tmp_path)


def test_exif_after_the_pixels_of_a_png_counts_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    whole = _png(tmp_path / "1.png", BYTES[0]).read_bytes()
    late = _chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    (tmp_path / "1.png").write_bytes(whole[:-12] + late + whole[-12:])
    with _refused("turned by its EXIF orientation"):
        read_images(tmp_path)


def test_several_frames_are_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(image) for image in BYTES[:3]]
    frames[0].save(tmp_path / "1.webp", save_all=True, append_images=frames[1:])
    with _refused("1.webp: several frames"):
        read_images(tmp_path)


def test_mixed_sizes_name_both_files(tmp_path: Path) -> None:
    _folder(tmp_path, ["1", "2"])
    _png(tmp_path / "3.png", BYTES[0, :4, :4])
    with _refused("1.png has 8 pixels a side, 3.png has 4; expected one size"):
        read_images(tmp_path)


def test_images_that_are_not_square_are_refused(tmp_path: Path) -> None:
    _png(tmp_path / "1.png", BYTES[0, :, :6])
    with _refused("1.png: 6 x 8 pixels; expected square images; crop them"):
        read_images(tmp_path)


@pytest.mark.parametrize("side", [10_000, 60_000, 2**31 - 1])
def test_giants_are_refused_before_they_are_decoded(side: int, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(_raw_png(side, side, 8, zlib.compress(bytes(1000))))
    tracemalloc.start()
    with _refused("1.png: "):
        read_images(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_damaged_images_are_named(tmp_path: Path) -> None:
    _folder(tmp_path, ["1", "2", "3"], RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    images = read_images(tmp_path)  # the header is whole
    with _refused("2.png: damaged", "copy or write it again"):
        images.check()
    with _refused("2.png: damaged"):
        images[1]
    (tmp_path / "3.png").write_bytes(b"not an image")
    with _refused("3.png: damaged .*expected a PNG, JPEG or WebP image"):
        read_images(tmp_path)
    (tmp_path / "3.png").write_bytes(b"")
    with _refused("3.png: damaged"):
        read_images(tmp_path)


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    _folder(tmp_path / "f", ["1", "2"])
    images = read_images(tmp_path / "f")
    _png(tmp_path / "f" / "2.png", BYTES[0, :4, :4])
    with _refused("2.png: changed while it was read"):
        images[1]
    (tmp_path / "f" / "2.png").unlink()
    with _refused("2.png: cannot be read .no such file"):
        images[1]
    array = read_images(_saved(tmp_path / "a.npy", BYTES))
    os.truncate(tmp_path / "a.npy", 500)
    with _refused("a.npy: ends early"):
        array[:]


def test_empty_folders_and_folders_of_other_things_are_refused(tmp_path: Path) -> None:
    with _refused("no PNG, JPEG or WebP image; expected one file an image"):
        read_images(tmp_path)
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    (tmp_path / "deeper").mkdir()
    with _refused("no PNG, JPEG or WebP image; it holds a.gif, deeper"):
        read_images(tmp_path)


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["cat.png", "cat.webp"], "cat.png and cat.webp are both image cat"),
        (["34.png", "nsd00034.png"], "34.png and nsd00034.png are both image 34"),
        (["subj01_nsd1.png", "nsd2.png"], "subj01_nsd1.png tells its subject, nsd2.png does not"),
        (["subj01/1.png", "2.png"], r"images both in the folder itself \(2.png\) and in those of subjects \(subj01\)"),
        (["subj01/subj02_1.png"], "subject 2 in the folder of subject 1; move it"),
        (["subj01/1.png", "subj1/1.png"], "subj01/1.png and subj1/1.png are both image 1 of subject 1"),
        (["a\nb.png"], r"a\\nb.png: a line break or the like in its name; rename it"),
    ],
)
def test_ambiguous_folders_are_refused(names: list[str], complaint: str, tmp_path: Path) -> None:
    for name in names:
        _png(tmp_path / "f" / name, BYTES[0])
    with _refused(complaint):
        read_images(tmp_path / "f")


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    _png(tmp_path / "1.png", BYTES[0])
    os.rename(tmp_path / "1.png", os.fsencode(tmp_path) + b"/\xff.png")
    with _refused("its name is no UTF-8; rename it"):
        read_images(tmp_path)


def test_links_loops_and_pipes_do_not_hang(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "f", ["1"])
    (folder / "subj01").symlink_to(folder)
    with _refused("images both in the folder itself"):
        read_images(folder)
    (folder / "subj01").rename(folder / "loop")
    assert len(read_images(folder)) == 1
    os.mkfifo(folder / "2.png")
    with _refused("2.png: no regular file"):
        read_images(folder)
    (folder / "2.png").unlink()
    (folder / "2.png").symlink_to(tmp_path / "nowhere")
    with _refused("2.png: no regular file"):
        read_images(folder)
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with _refused("cannot be read .too many levels of symbolic links"):
        read_images(tmp_path / "a")
    os.mkfifo(tmp_path / "a.npy")
    with _refused("a.npy: neither a file nor a folder"):
        read_images(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("reconz", r"reconz: no such file or folder \(did you mean 'recons'\?\); expected a folder of images"),
        ("nothing/like/it.npy", "it.npy: no such file or folder"),
        (
            "a.pkl",
            "a.pkl: unknown kind of file '.pkl'.*; expected a folder of images, or one of .npy, .npz, .safetensors",
        ),
        ("recons/1.png", "one image; expected a folder of images; hand in .*recons"),
        ("recons::x", "recons: a folder; leave out '::x'"),
        ("a.npz::y", r"a.npz: no array 'y'.*; it holds x, xx"),
        ("a.npz", "a.npz: holds 2 arrays .x, xx.; say which: NAME.npz::x"),
        ("a.npz::", "nothing after '::'"),
        ("a.h5::g/immages", r"a.h5: no array 'g/immages' \(did you mean 'g/images'\?\); it holds g/images, g/seen"),
        ("a.h5", "a.h5: holds 2 arrays .g/images, g/seen.; say which: NAME.h5::g/images"),
        ("empty.h5", "empty.h5: holds no array of images"),
        ("b.npy::x", "b.npy: holds one array without a name; leave out '::x'"),
        ("a\0b", "cannot be read"),
        ("b.npy/c", "cannot be read .not a directory"),
        ("x" * 300, "cannot be read .file name too long"),
    ],
)
def test_wrong_paths_are_refused(path: str, complaint: str, tmp_path: Path) -> None:
    _folder(tmp_path / "recons", ["1"])
    np.savez(tmp_path / "a.npz", x=BYTES, xx=BYTES)
    _h5(_h5(tmp_path / "a.h5", BYTES, "g/images"), BYTES, "g/seen")
    h5py.File(tmp_path / "empty.h5", "w").close()
    np.save(tmp_path / "b.npy", BYTES)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(BYTES))
    with _refused(complaint):
        read_images(f"{tmp_path}/{path}")


def test_an_empty_path_is_not_the_current_folder() -> None:
    with _refused("an empty path"):
        read_images("")


def test_a_file_whose_name_holds_colons_is_read(tmp_path: Path) -> None:
    assert len(read_images(_saved(tmp_path / "a::b.npy", BYTES))) == 5


def test_what_may_not_be_read_is_refused() -> None:
    base = Path(tempfile.mkdtemp())  # below folders that everybody may pass, unlike tmp_path
    try:
        base.chmod(0o755)
        _folder(base / "f", ["1"])
        _folder(base / "g", ["1"])
        np.save(base / "a.npy", BYTES)
        _h5(base / "a.h5", BYTES)
        for name in ("a.npy", "a.h5", "f", "g/1.png"):
            (base / name).chmod(0)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            for name, named in (("a.npy", "a.npy"), ("a.h5", "a.h5"), ("f", "f"), ("g", "1.png")):
                with _refused(f"{named}: cannot be read .permission denied.; ask for read permission"):
                    read_images(base / name)
        finally:
            if root:
                os.seteuid(0)
    finally:
        (base / "f").chmod(0o700)
        shutil.rmtree(base)


@pytest.mark.parametrize("suffix", ["npy", "npz", "safetensors", "pt", "h5"])
def test_truncated_files_are_refused(
    suffix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / f"a.{suffix}"
    {
        "npy": lambda: np.save(path, BYTES),
        "npz": lambda: np.savez(path, x=BYTES),
        "safetensors": lambda: save_file({"x": BYTES}, path),
        "pt": lambda: torch.save(torch.from_numpy(FIRST), path),
        "h5": lambda: _h5(path, BYTES),
    }[suffix]()
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.unlink()
        path.write_bytes(whole[:length])
        with _refused(f"a.{suffix}: damaged"):
            read_images(path)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


class _Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize(
    "kind", ["pt", "pt dictionary", "old pt", "bare pickle.pt", "npy", "npz", "pickle.npy", "ids.npy"]
)
def test_no_pickle_is_executed(kind: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    planted = _Planted(marker)
    path = tmp_path / f"a.{'npz' if kind == 'npz' else 'npy' if 'npy' in kind else 'pt'}"
    if kind == "pt":
        torch.save(planted, path)
    elif kind == "pt dictionary":
        torch.save({"x": torch.from_numpy(FIRST), "more": planted}, path)
    elif kind == "old pt":
        torch.save(planted, path, _use_new_zipfile_serialization=False)
    elif kind in ("npy", "npz"):
        (np.save if kind == "npy" else np.savez)(path, np.array([planted], object), allow_pickle=True)
    elif kind == "ids.npy":
        np.save(path, BYTES)
        np.save(tmp_path / "a.ids.npy", np.array([planted] * 5, object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(planted))
    with _refused("a(.ids)?.(pt|np)"):
        read_images(path)
    assert not marker.exists()
    os.system(f"touch {marker}")
    assert marker.exists()  # the plant would have worked


def test_other_content_of_torch_files_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for content, complaint in (
        ([torch.from_numpy(FIRST)], "holds a list; expected a tensor"),
        ({"a": 1}, "holds no array of images"),
        (torch.from_numpy(FIRST).to_sparse(), "no plain tensor"),
        (torch.from_numpy(FIRST).to("meta"), "no plain tensor"),
        ({"x": torch.from_numpy(FIRST), "ids": 5}, "ids are a int"),
        ({"x": torch.from_numpy(FIRST), "ids": [1, 2]}, "2 ids for the 5 images"),
        ({"x": torch.from_numpy(FIRST), "ids": [1, 2, 3, 3, 4]}, "entry 3 and entry 4 are both image 3"),
    ):
        torch.save(content, path)
        with _refused("a.pt", complaint):
            read_images(path)
    torch.save(torch.from_numpy(FIRST), path)
    with _refused("a.pt: holds one Tensor without names; leave out '::x'"):
        read_images(f"{path}::x")


def test_hdf5_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    _h5(tmp_path / "other.h5", BYTES)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["link"] = h5py.ExternalLink("other.h5", "images")
        file["soft"] = h5py.SoftLink("/link")
        layout = h5py.VirtualLayout(BYTES.shape, BYTES.dtype)
        layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "images", BYTES.shape)
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("outside", BYTES.shape, BYTES.dtype, external=[(tmp_path / "secret", 0, BYTES.size)])
        file.create_dataset("nothing", data=h5py.Empty("u1"))
        file.create_dataset("half", BYTES.shape, np.uint8, chunks=(1, 8, 8, 3))[:3] = BYTES[:3]
        file.create_dataset("unwritten", BYTES.shape, np.uint8)
    for name, complaint in (
        ("link", "no array 'link'"),
        ("soft", "no array 'soft'"),
        ("virtual", "its values lie in other files: refused"),
        ("outside", "its values lie in other files: refused"),
        ("nothing", "expected four axes"),
        ("half", "2 of 5 chunks were never written"),
        ("unwritten", "never written"),
    ):
        with _refused("a.h5", complaint):
            read_images(f"{tmp_path}/a.h5::{name}")


def test_hdf5_ids_in_a_heap_are_refused(tmp_path: Path) -> None:
    _h5(_h5(tmp_path / "a.h5", BYTES), np.array(list("abcde"), object), "ids", dtype=h5py.string_dtype())
    with _refused("a.h5::ids: ids are text of any length", "dtype='S'"):
        read_images(tmp_path / "a.h5")


def test_ids_that_disagree_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=BYTES, ids=np.array(IDS))
    (tmp_path / "a.ids.txt").write_text("\n".join(map(str, IDS)))
    assert read_images(tmp_path / "a.npz").ids == tuple(IDS)
    (tmp_path / "a.ids.txt").write_text("1\n2\n3\n4\n5")
    with _refused("ids in .*a.npz and .*a.ids.txt disagree"):
        read_images(tmp_path / "a.npz")


def test_archives_that_lie_about_their_size_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((400, 64, 64, 3), np.uint8))
    assert len(read_images(tmp_path / "a.npz")) == 400
    monkeypatch.setattr(containers, "_UNLIKELY_BYTES", 2**20)
    with _refused(r"a.npz::x: \d+ bytes unpack to 0.0 GiB: refused; save the array with np.savez"):
        read_images(tmp_path / "a.npz")
    monkeypatch.setattr(containers.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 100))
    np.savez_compressed(tmp_path / "a.npz", x=BYTES)
    with _refused("a.npz::x: unpacks to .*, more than is free in", "TMPDIR"):
        read_images(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive, archive.open("x.npy", "w") as member:
        header = np.lib.format.header_data_from_array_1_0(BYTES)
        np.lib.format.write_array_header_1_0(member, {**header, "shape": (100_000, 1000, 1000, 3)})
        member.write(BYTES.tobytes())
    with _refused("b.npz::x: damaged .*300000000"):
        read_images(tmp_path / "b.npz")


def test_a_file_with_a_second_array_behind_the_first_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.save(file, BYTES)
        np.save(file, BYTES)
    with _refused("a.npy: damaged .*bytes instead of"):
        read_images(tmp_path / "a.npy")


def test_one_constant_image_is_no_error(tmp_path: Path) -> None:
    constant = BYTES.copy()
    constant[2] = 9
    assert read_images(_saved(tmp_path / "a.npy", constant)).check()


# --- subsets ----------------------------------------------------------------------------------------------------------


def _design(path: Path, trials: int = 30_000, late: int = 18, same: bool = True) -> list[int]:
    """Write a design in which ``late`` of the 1000 shared images are first shown after 37 sessions; return the others."""
    rng = np.random.default_rng(8)
    shared = rng.permutation(73_000)[:1000] + 1
    others = np.setdiff1d(np.arange(1, 73_001), shared)
    columns = np.stack([np.concatenate([shared, rng.choice(others, 9000, replace=False)]) for _ in range(8)])
    if not same:
        columns[3, :1000] = rng.permutation(shared)
    hidden = rng.permutation(1000)[:late]
    early = np.setdiff1d(np.arange(10_000), hidden)
    order = np.concatenate([early, rng.choice(early, 27_750 - len(early)), rng.choice(hidden, 2250)])[:trials]
    rng.shuffle(order[:27_750])
    savemat(path, {"masterordering": order[None] + 1.0, "subjectim": columns, "sharedix": np.sort(shared)[None]})
    return sorted(int(i) - 1 for i in np.delete(shared, hidden))


def test_the_982_images_come_from_the_design(tmp_path: Path) -> None:
    expected = _design(tmp_path / "nsd_expdesign.mat")
    name, ids = read_subset(tmp_path / "nsd_expdesign.mat")
    assert name == "shared-982" and len(ids) == 982
    assert list(ids) == expected


def test_designs_that_do_not_tell_the_982_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "nsd_expdesign.mat"
    _design(path, trials=20_000)
    with _refused("nsd_expdesign.mat: 20000 trials; expected at least the 27750 of 37 sessions"):
        read_subset(path)
    _design(path, same=False)
    with _refused("nsd_expdesign.mat: subjects differ"):
        read_subset(path)
    path.write_bytes(path.read_bytes()[:5000])
    with _refused("nsd_expdesign.mat: damaged"):
        read_subset(path)
    with _refused("nothing.mat: no such file; expected NSD's nsd_expdesign.mat, or a list of image ids"):
        read_subset(tmp_path / "nothing.mat")


def test_a_list_is_a_subset_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "indoor.txt").write_text("nsd00003\n9\n")
    assert read_subset(tmp_path / "indoor.txt") == ("indoor", (3, 9))
    (tmp_path / "indoor.ids.json").write_text("[3, 9]")
    assert read_subset(tmp_path / "indoor.ids.json") == ("indoor", (3, 9))
