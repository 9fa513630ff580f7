"""Stages ``prepare`` and ``targets``: what training sees, and that it never sees a test image."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmark import networks
from benchmark.data.nsd import NSD
from benchmark.errors import UserError
from benchmark.progress import Progress
from benchmark.shards import Shards
from benchmark.stages import prepare
from benchmark.stages.features import LowLevelTargets, as_pixels
from benchmark.stages.prepare import Prepared
from benchmark.store import read_json
from methods.brain_it.unclip import encode

pytestmark = pytest.mark.timeout(900)  # the first test that needs the small sweep waits for it


@pytest.fixture(scope="module")
def data(tiny_run: Any) -> Prepared:
    return Prepared(tiny_run.folder("prepare"))


@pytest.fixture(scope="module")
def nsd(tiny_run: Any) -> NSD:
    return NSD.open(tiny_run.folder("simulate") / "nsd")


# --- prepare ----------------------------------------------------------------------------------------------------------


def test_the_split_is_disjoint_and_complete(data: Prepared, nsd: NSD) -> None:
    train, validation, shared = map(
        set, (data.train_ids.tolist(), data.validation_ids.tolist(), data.shared_ids.tolist())
    )
    assert not train & validation and not train & shared and not validation & shared
    assert train | validation | shared == set(range(nsd.n_images)) == set(range(8 + 2 * 16))
    assert shared == set(nsd.shared_ids.tolist())
    for seen in data.seen_ids:
        own = set(seen.tolist()) - shared
        assert len(own & validation) == 2, "a tenth of 16, rounded"
        assert not own & (set(np.concatenate(data.seen_ids).tolist()) - set(seen.tolist()))


def test_betas_are_the_loaders_and_images_the_files(data: Prepared, nsd: NSD) -> None:
    assert np.array_equal(data.images, nsd.images(np.arange(nsd.n_images))), "64 px are kept as they are"
    assert np.array_equal(data.external, nsd.external.images(range(6), 64))
    for subject, betas, ids in zip(data.subjects, data.betas, data.seen_ids, strict=True):
        loaded = nsd.load_betas(subject)
        assert np.array_equal(betas, loaded.betas) and betas.dtype == np.float32
        assert np.array_equal(ids, loaded.image_ids) and (np.diff(ids) > 0).all()
    assert data.n_voxels == tuple(nsd.n_voxels(subject) for subject in data.subjects)
    assert data.n_voxels[0] != data.n_voxels[1], "subjects of one size would hide mistakes"


def test_samples_are_every_subjects_recording_of_the_images(data: Prepared) -> None:
    ids = np.concatenate([data.train_ids[:3], data.shared_ids[:2]])
    samples = data.samples(ids)
    assert len(samples) == 3 + 2 * 2, "one recording of an own image, one a subject of a shared one"
    for subject, row, image in zip(samples.subject, samples.row, samples.image, strict=True):
        assert data.seen_ids[subject][row] == image
    pairs = set(zip(samples.subject.tolist(), samples.image.tolist(), strict=True))
    assert len(pairs) == len(samples) and {image for _, image in pairs} == set(ids.tolist())
    assert len(data.samples(np.array([], np.int64))) == 0


def test_padded_betas_are_zero_beyond_a_subjects_voxels(data: Prepared) -> None:
    subject, row = np.array([1, 0, 1]), np.array([3, 5, 0])
    padded = data.padded_betas(subject, row)
    assert padded.shape == (3, max(data.n_voxels)) and padded.dtype == np.float32
    for k, (s, r) in enumerate(zip(subject, row, strict=True)):
        assert np.array_equal(padded[k, : data.n_voxels[s]], data.betas[s][r])
        assert not padded[k, data.n_voxels[s] :].any()


def test_target_rows_number_training_validation_and_external_images(data: Prepared) -> None:
    known = np.sort(np.concatenate([data.train_ids, data.validation_ids]))
    assert data.n_targets == len(known) + 6
    mixed = known[[5, 0, 7, 7]]
    assert np.array_equal(data.target_rows(mixed), [5, 0, 7, 7])
    assert np.array_equal(data.target_images(np.array([5, 0])), data.images[mixed[:2]])
    external = data.target_images(np.array([len(known) + 4, 2]))
    assert np.array_equal(external[0], data.external[4]) and np.array_equal(external[1], data.images[known[2]])
    for bad in (data.shared_ids[:1], np.array([known[0], 10_000])):
        with pytest.raises(ValueError, match="neither the training nor the validation set"):
            data.target_rows(bad)


def test_restricted_data_lose_training_images_and_nothing_else(data: Prepared) -> None:
    few = data.restricted(data.train_ids[[7, 2, 20]])
    assert np.array_equal(few.train_ids, data.train_ids[[2, 7, 20]]) and len(data.train_ids) == 28
    assert np.array_equal(few.target_rows(few.train_ids), data.target_rows(few.train_ids)), (
        "targets on disk are numbered so"
    )
    assert few.n_targets == data.n_targets and np.array_equal(few.validation_ids, data.validation_ids)
    assert sorted(few.samples(few.train_ids).image) == few.train_ids.tolist()
    with pytest.raises(ValueError, match="not in the training set"):
        data.restricted(data.validation_ids[:1])


def test_test_images_are_the_shared_ones_that_all_saw(data: Prepared) -> None:
    assert np.array_equal(data.test_ids([1, 2]), data.shared_ids)
    assert np.array_equal(data.test_ids((2,)), data.shared_ids)
    with pytest.raises(UserError, match="generation.subjects names subject 3; the data has subjects 1, 2"):
        data.test_ids([1, 3])


def test_no_shared_image_is_a_users_error(data: Prepared, tmp_path: Path) -> None:
    for file in data.folder.glob("*.npy"):
        (tmp_path / file.name).symlink_to(file)
    meta = json.loads((data.folder / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "shared_ids": []}))
    with pytest.raises(UserError, match="no shared image was seen by all of subjects 1, 2"):
        Prepared(tmp_path).test_ids([1, 2])


@pytest.mark.parametrize(("wanted", "count"), [(None, 6), (4, 4), (100, 6), (0, 0)])
def test_external_images_are_limited(tiny_run: Any, tmp_path: Path, wanted: int | None, count: int) -> None:
    ctx = tiny_run.context(tiny_run.stage("prepare"), tmp_path / "out", external_images=wanted, image_size=16)
    summary = prepare.run(ctx)
    data = Prepared(ctx.out)
    assert summary["external images"] == count == len(data.external)
    assert data.images.shape == (40, 16, 16, 3) and data.image_size == 16
    assert data.n_targets == len(data.target_ids) + count
    assert data.target_images(np.arange(data.n_targets)).shape == (data.n_targets, 16, 16, 3)


def test_the_summary_counts_what_was_written(tiny_run: Any, data: Prepared) -> None:
    summary = read_json(tiny_run.folder("prepare") / "status.json")["summary"]
    assert summary == {
        "subjects": 2,
        "voxels": sum(data.n_voxels),
        "train images": 28,
        "validation images": 4,
        "test images": 8,
        "external images": 6,
    }


def test_without_data_it_says_what_to_type(tiny_run: Any, tmp_path: Path) -> None:
    ctx = tiny_run.context(tiny_run.stage("prepare"), tmp_path / "out")
    ctx.inputs.clear()
    with pytest.raises(UserError, match="--data DIR"):
        prepare.run(ctx)


# --- targets ----------------------------------------------------------------------------------------------------------


def test_no_test_image_is_among_the_targets(tiny_run: Any, data: Prepared) -> None:
    """Nothing that is fitted, scaled or chosen may know a test image: there is no row that it could be read from."""
    test = data.images[data.test_ids([1, 2])].reshape(8, -1)
    targets = data.target_images(np.arange(data.n_targets)).reshape(data.n_targets, -1)
    assert not any((targets == image).all(1).any() for image in test)
    folder = tiny_run.folder("targets")
    arrays = {path.parent.name: Shards(path.parent) for path in folder.glob("*/shards.json")}
    assert set(arrays) == {
        "semantic",
        "latents",
        *(f"{kind}_{k}" for kind in ("encoder", "lowlevel") for k in range(5)),
    }
    assert {len(array) for array in arrays.values()} == {data.n_targets}
    external = Shards(tiny_run.folder("external") / "betas")
    assert external.shape == (len(data.external), sum(data.n_voxels))


@torch.no_grad()
def test_each_target_row_is_of_its_image(tiny_run: Any, data: Prepared) -> None:
    folder = tiny_run.folder("targets")
    rows = np.array([3, data.n_targets - 1, 0])
    pixels = as_pixels(data.target_images(rows))
    lite0 = networks.feature_network("lite0")
    generator = networks.generator("demo")
    expected = {f"lowlevel_{k}": lite0.features(pixels, [f"block{k}"])[f"block{k}"] for k in range(5)}
    expected["semantic"] = networks.semantic_network("lite0")(pixels)
    expected["latents"] = encode(generator.vae, pixels)
    config = tiny_run.stage("targets").config
    backbone = networks.encoder_backbone("lite0", config["taps"], 0, config["grid"])
    expected |= {f"encoder_{k}": tokens for k, tokens in enumerate(backbone(pixels))}
    for name, values in expected.items():
        stored = Shards(folder / name)[rows]
        assert stored.dtype == np.float16
        scale = max(1.0, float(values.abs().max()))
        assert np.abs(stored.astype(np.float32) - values.numpy()).max() < 2e-3 * scale, name


def test_statistics_are_of_training_images_alone(tiny_run: Any, data: Prepared) -> None:
    folder = tiny_run.folder("targets")
    stats = load_file(folder / "lowlevel_stats.safetensors")
    rows = data.target_rows(data.train_ids)
    for k in range(5):
        maps = Shards(folder / f"lowlevel_{k}")[rows].astype(np.float64)
        assert np.allclose(stats[f"means.{k}"], maps.mean((0, 2, 3)), atol=1e-4)
        deviation = maps.std((0, 2, 3))
        alive = deviation > 1e-3
        assert np.allclose(stats[f"stds.{k}"][alive], deviation[alive], rtol=1e-3)


def test_low_level_targets_are_standardised_centred_and_merged(tiny_run: Any, data: Prepared) -> None:
    config, folder = dict(tiny_run.stage("lowlevel").config), tiny_run.folder("targets")
    rows = data.target_rows(data.train_ids)

    def maps(**changes: bool) -> list[torch.Tensor]:
        targets = LowLevelTargets(folder, {**config, **changes})
        values = targets(rows)
        assert targets.tokens.layer_sizes == (16 * 16, 15 * 15, 8 * 8, 4 * 4, 4 * 4) and targets.tokens.width == 112
        assert values.shape == (len(rows), 16 * 16 + 15 * 15 + 8 * 8 + 4 * 4 + 4 * 4, 112)
        assert values.dtype == torch.float32
        return targets.tokens.unmerge(values)

    raw = maps(standardise=False, centre=False)
    for k, features in enumerate(raw):
        assert np.allclose(features, Shards(folder / f"lowlevel_{k}")[rows].astype(np.float32), atol=1e-5)
    scaled = maps(standardise=True, centre=False)
    for features in scaled:
        assert float(features.mean()) == pytest.approx(0, abs=1e-3)
        deviation = features.std((0, 2, 3))
        assert float((deviation[deviation > 0] - 1).abs().max()) < 0.01, "each channel has deviation 1, or is dead"
    for features, before in (
        (maps(standardise=True, centre=True), scaled),
        (maps(standardise=False, centre=True), raw),
    ):
        for layer, whole in zip(features, before, strict=True):
            scale = max(1.0, float(whole.abs().max()))
            assert float(layer.mean(0).abs().max()) < 1e-4 * scale, "each place has mean 0 over the training images"
            assert torch.allclose(layer, whole - whole.mean(0), atol=1e-4 * scale)


def test_pixels_are_scaled_and_resized() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    pixels = as_pixels(images)
    assert pixels.shape == (2, 3, 32, 32) and torch.equal(
        (pixels * 255).round().byte().permute(0, 2, 3, 1), torch.from_numpy(images)
    )
    assert as_pixels(images, 32) is not None and as_pixels(images, 16).shape == (2, 3, 16, 16)
    flat = as_pixels(np.full((1, 32, 32, 3), 51, np.uint8), 48)
    assert torch.allclose(flat, torch.full_like(flat, 0.2))


def test_a_prepared_store_gives_the_same(tiny_run: Any, data: Prepared, tmp_path: Path) -> None:
    """Up to float16; files are not copied where they can be linked."""
    from benchmark.data.prepare import prepare as make_store

    store = make_store(tiny_run.folder("simulate") / "nsd", tmp_path / "store", progress=Progress(enabled=False)).data
    stage = tiny_run.stage("prepare")
    ctx = replace(tiny_run.context(stage, tmp_path / "out"), inputs={}, data=store.root)
    prepare.run(ctx)
    found = Prepared(ctx.out)
    assert np.array_equal(found.images, data.images) and np.array_equal(found.external, data.external)
    assert (found.subjects, found.n_voxels) == (data.subjects, data.n_voxels)
    for name in ("train_ids", "validation_ids", "shared_ids"):
        assert np.array_equal(getattr(found, name), getattr(data, name)), name
    for a, b, ids, known in zip(found.betas, data.betas, found.seen_ids, data.seen_ids, strict=True):
        assert np.array_equal(ids, known) and a.dtype == np.float16
        assert np.allclose(a, b, atol=2e-3, rtol=1e-3)
    assert (tmp_path / "store" / "images_64.npy").stat().st_ino == (ctx.out / "images.npy").stat().st_ino


# --- what follows from the encoder ------------------------------------------------------------------------------------


def test_clusters_are_shared_by_all_subjects(tiny_run: Any, data: Prepared) -> None:
    from benchmark.stages.encoder import load_mapping

    for count in (8, 32, 128):
        mapping = load_mapping(tiny_run.folder("clusters", f"clusters={count}"))
        assert mapping.n_clusters == count and len(mapping.labels) == sum(data.n_voxels)
        parts = mapping.per_subject(data.n_voxels)
        assert [len(part) for part in parts] == list(data.n_voxels)
        if count == 8:
            assert len(np.intersect1d(parts[0], parts[1])) > 0, "a cluster has voxels of both brains"


def test_external_predictions_are_the_encoders(tiny_run: Any, data: Prepared) -> None:
    from benchmark.stages.encoder import EncoderWithAdapters
    from benchmark.stages.features import StoredTaps

    config = dict(tiny_run.stage("external").config)
    features = StoredTaps(tiny_run.folder("targets"), 5, "cpu")
    model = EncoderWithAdapters(config, data, features).encoder.eval()
    model.load_state_dict(load_file(tiny_run.folder("encoder") / "encoder.safetensors"))
    rows = np.array([len(data.target_ids) + 4])
    expected = torch.cat([model.predict(features(rows), s) for s in range(2)], dim=1).numpy()
    stored = Shards(tiny_run.folder("external") / "betas")[4:5]
    assert np.allclose(stored, expected, atol=2e-3)
    correlation = np.load(tiny_run.folder("encoder") / "correlation.npy")
    assert correlation.shape == (sum(data.n_voxels),) and (np.abs(correlation) <= 1).all()
    summary = read_json(tiny_run.folder("encoder") / "status.json")["summary"]
    assert summary["correlation"] == pytest.approx(float(np.quantile(correlation, 0.75)), abs=1e-6), "the best weights"
