"""Stage ``reconstruct``: files, seeds, and that an image does not depend on its company."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmark.errors import UserError
from benchmark.stages import KINDS, image_name, reconstruct, seen_name
from benchmark.stages.bit import build_bit, voxel_layout
from benchmark.stages.features import LowLevelTargets
from benchmark.stages.prepare import Prepared
from benchmark.stages.reconstruct import image_seed, read_images
from methods.brain_it.dip import invert

pytestmark = pytest.mark.timeout(900)  # the first test that needs the small sweep waits for it


@pytest.mark.parametrize(
    ("seed", "subject", "image", "expected"),
    [
        (0, 1, 0, 26193794804990807),
        (0, 1, 1, 66558642264905505),
        (0, 2, 0, 68980103351170120),
        (1, 1, 0, 23755446931661310),
        (42, 7, 72999, 45461230601345497),
    ],
)
def test_image_seeds_never_change(seed: int, subject: int, image: int, expected: int) -> None:
    assert image_seed(seed, subject, image) == expected


def test_image_seeds_are_all_different_and_fit_a_generator() -> None:
    seeds = {image_seed(seed, s, i) for seed in range(3) for s in range(1, 9) for i in range(200)}
    assert len(seeds) == 3 * 8 * 200 and max(seeds) < 2**56
    torch.Generator().manual_seed(max(seeds))


def test_the_files_are_what_scoring_reads(tiny_run: Any) -> None:
    folder = tiny_run.folder("reconstruct")
    data = Prepared(tiny_run.folder("prepare"))
    ids = data.shared_ids[:4]
    index = np.load(folder / "index.npy")
    assert index.tolist() == [[subject, image] for subject in (1, 2) for image in ids]
    names = {image_name(s, i) for s, i in index.tolist()}
    assert image_name(1, 7) == "subj01_nsd00007.png" and len(names) == 8
    for kind in KINDS:
        assert {path.name for path in (folder / kind).iterdir()} == names
        for path in (folder / kind).iterdir():
            with Image.open(path) as image:
                assert (image.mode, image.size) == ("RGB", (64, 64))
    seen = read_images(folder / "seen", [seen_name(image) for image in ids])
    assert np.array_equal(seen, data.images[ids]), "what was seen, to the bit"
    assert len(list((folder / "seen").iterdir())) == 4


def test_branches_subjects_and_variants_differ(tiny_run: Any) -> None:
    pictures = {
        (variant, kind): read_images(
            tiny_run.folder("reconstruct", variant) / kind,
            sorted(path.name for path in (tiny_run.folder("reconstruct", variant) / kind).iterdir()),
        ).astype(int)
        for variant in ("clusters=8", "clusters=128")
        for kind in KINDS
    }
    for kind in KINDS:
        images = pictures["clusters=128", kind]
        assert all(np.abs(a - b).max() > 2 for k, a in enumerate(images) for b in images[:k]), "no two alike"
        assert not np.array_equal(images, pictures["clusters=8", kind])
    assert np.abs(pictures["clusters=8", "semantic"] - pictures["clusters=8", "combined"]).max() > 2


def rerun(tiny_run: Any, out: Path, **changes: Any) -> dict[str, np.ndarray]:
    stage = tiny_run.stage("reconstruct")
    stage = replace(stage, hints=changes.pop("hints", stage.hints))
    generation = {**stage.config["generation"], **changes.pop("generation", {})}
    ctx = tiny_run.context(stage, out, generation=generation, **changes)
    reconstruct.run(ctx)
    names = [image_name(s, i) for s, i in np.load(out / "index.npy").tolist()]
    return {kind: read_images(out / kind, names).astype(int) for kind in KINDS}


def test_an_image_does_not_depend_on_its_company(tiny_run: Any, tmp_path: Path) -> None:
    """Not on the batches, nor on which other images and subjects are reconstructed."""
    folder = tiny_run.folder("reconstruct")
    index = np.load(folder / "index.npy")
    names = [image_name(s, i) for s, i in index.tolist()]
    before = {kind: read_images(folder / kind, names).astype(int) for kind in KINDS}
    some = rerun(
        tiny_run,
        tmp_path / "out",
        hints={"dip": 2, "generation": 1},
        generation={"subjects": [2], "test_images": 3},
    )
    own = np.flatnonzero(index[:, 0] == 2)[:3]
    for kind in KINDS:
        assert len(some[kind]) == 3
        assert np.abs(some[kind] - before[kind][own]).max() <= 1, kind


def test_the_seed_of_the_run_changes_every_image(tiny_run: Any, tmp_path: Path) -> None:
    one = {"subjects": [1], "test_images": 1}
    first, second = (rerun(tiny_run, tmp_path / str(seed), seed=seed, generation=one) for seed in (0, 1))
    for kind in KINDS:
        assert np.abs(first[kind] - second[kind]).max() > 2, kind


def test_predictions_are_calibrated_before_they_are_inverted(
    tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[torch.Tensor]] = []

    def keep(targets: list[torch.Tensor], *rest: Any, **settings: Any) -> torch.Tensor:
        given.append([layer.clone() for layer in targets])
        return invert(targets, *rest, **settings)

    monkeypatch.setattr(reconstruct, "invert", keep)
    stage = tiny_run.stage("reconstruct")
    one = {"subjects": [2], "test_images": 1, "steps": 2}
    for wanted in (False, True):
        dip = {**stage.config["dip"], "steps": 1, "calibrate": wanted}
        rerun(tiny_run, tmp_path / str(wanted), dip=dip, generation=one)

    data, low = Prepared(tiny_run.folder("prepare")), stage.config["lowlevel"]
    tokens = LowLevelTargets(tiny_run.folder("targets"), low).tokens
    bit = build_bit(low, voxel_layout(data, tiny_run.folder("clusters")), tokens.tokens, tokens.width).eval()
    bit.load_state_dict(load_file(tiny_run.folder("lowlevel") / "bit.safetensors"))
    row = np.searchsorted(data.seen_ids[1], data.shared_ids[:1])
    with torch.no_grad():
        predicted = bit(torch.from_numpy(data.padded_betas(np.array([1]), row)), torch.tensor([1]))
    matrices = load_file(tiny_run.folder("lowlevel") / "calibration.safetensors")
    parts = [part @ matrices[str(k)] for k, part in enumerate(predicted.split(tokens.layer_sizes, 1))]
    for expected, found in ((predicted, given[0]), (torch.cat(parts, 1), given[1])):
        for a, b in zip(tokens.unmerge(expected * stage.config["dip"]["gain"]), found, strict=True):
            assert torch.allclose(a, b, atol=1e-4 * max(1.0, float(a.abs().max())))


def test_a_subject_that_is_not_there_is_a_users_error(tiny_run: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="generation.subjects names subject 5; the data has subjects 1, 2"):
        rerun(tiny_run, tmp_path / "out", generation={"subjects": [1, 5]})
