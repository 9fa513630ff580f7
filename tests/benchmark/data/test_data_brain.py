"""The simulated brain: its layout, what its voxels answer to, and its noise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import cKDTree

from benchmark.data import brain
from benchmark.data.brain import AREAS, COMPONENTS, FeatureExtractor, Responder, estimate_ncsnr, grow_brain, make_mesh
from benchmark.data.scenes import render_scenes

COUNTS = (300, 320)


@pytest.fixture(scope="module")
def mesh() -> brain.Mesh:
    return make_mesh(480)


@pytest.fixture(scope="module")
def voxels(mesh: brain.Mesh) -> brain.Voxels:
    return grow_brain(mesh, COUNTS, 0, 1, True)


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return FeatureExtractor(render_scenes(48, 1)[0], 0)


def test_the_surface_is_closed_and_faces_outward(mesh: brain.Mesh) -> None:
    edges = np.sort(np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]]), axis=1)
    counts = np.unique(edges, axis=0, return_counts=True)[1]
    assert (counts == 2).all()
    assert len(mesh.sphere) - len(counts) + len(mesh.faces) == 2  # Euler
    a, b, c = (mesh.sphere[mesh.faces[:, k]] for k in range(3))
    assert (np.einsum("ij,ij->i", np.cross(b - a, c - a), a) > 0).all()


def test_receptive_fields_are_contralateral(voxels: brain.Voxels) -> None:
    assert (voxels.rf_x[voxels.hemisphere == 0] > 0.5).all()
    assert (voxels.rf_x[voxels.hemisphere == 1] < 0.5).all()
    assert 0.4 < np.median(voxels.rf_y) < 0.6


def test_receptive_fields_grow_up_the_hierarchy_and_with_eccentricity(voxels: brain.Voxels) -> None:
    sizes = [voxels.rf_sigma[voxels.area == k].mean() for k in range(len(AREAS))]
    assert (np.diff(sizes) > 0).all()
    for k in range(len(AREAS)):
        own = voxels.area == k
        assert np.corrcoef(voxels.eccentricity[own], voxels.rf_sigma[own])[0, 1] > 0.2


def test_neighbours_on_the_surface_see_the_same_place_and_share_tuning(mesh: brain.Mesh, voxels: brain.Voxels) -> None:
    early = np.flatnonzero((voxels.area <= 2) & (voxels.hemisphere == 0))
    nearest = cKDTree(mesh.sphere[voxels.vertex[early]]).query(mesh.sphere[voxels.vertex[early]], 2)[1][:, 1]
    centres = np.stack([voxels.rf_x, voxels.rf_y], 1)[early]
    apart = np.linalg.norm(centres - centres[nearest], axis=1)
    by_chance = np.linalg.norm(centres - np.random.default_rng(0).permutation(centres), axis=1)
    assert np.median(apart) < 0.4 * np.median(by_chance)
    late = np.flatnonzero(voxels.area >= 4)
    tuning = voxels.category[late] - voxels.category[late].mean(0)
    nearest = cKDTree(mesh.sphere[voxels.vertex[late]] + voxels.hemisphere[late, None] * 10)
    pairs = nearest.query(mesh.sphere[voxels.vertex[late]] + voxels.hemisphere[late, None] * 10, 2)[1][:, 1]
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(tuning, tuning[pairs], strict=True)]
    assert np.mean(r) > 0.3


def test_subjects_have_brains_of_their_own(mesh: brain.Mesh, voxels: brain.Voxels) -> None:
    other = grow_brain(mesh, COUNTS, 0, 2, True)
    assert (other.area != voxels.area).any()
    same = grow_brain(mesh, COUNTS, 0, 1, True)
    for name, array in voxels.tensors().items():
        np.testing.assert_array_equal(array, same.tensors()[name], err_msg=name)


def test_the_place_that_an_early_voxel_sees_can_be_found_from_its_answers(
    voxels: brain.Voxels, extractor: FeatureExtractor
) -> None:
    rng = np.random.default_rng(0)
    places = np.stack(np.meshgrid(np.arange(4, 64, 8), np.arange(4, 64, 8)), -1).reshape(-1, 2)
    images = np.full((len(places), 64, 64, 3), 128, np.uint8)
    for image, (x, y) in zip(images, places, strict=True):
        image[y - 4 : y + 4, x - 4 : x + 4] = rng.integers(0, 255, (8, 8, 1))
    answers = Responder(voxels).components(extractor(images, None))[COMPONENTS.index("contrast")]
    weights = answers**3
    found = weights.T @ (places / 64) / weights.sum(0)[:, None]
    early = (voxels.area <= 1) & (voxels.eccentricity < 3.5)
    for axis, true in ((0, voxels.rf_x), (1, voxels.rf_y)):
        assert np.corrcoef(found[early, axis], true[early])[0, 1] > 0.9
    right = answers[places[:, 0] > 32].mean(0) > answers[places[:, 0] < 32].mean(0)
    assert (right[early] == (voxels.hemisphere[early] == 0)).mean() > 0.9


def test_voxels_answer_to_their_preferred_orientation(voxels: brain.Voxels, extractor: FeatureExtractor) -> None:
    x, y = np.meshgrid(np.arange(64) / 64, np.arange(64) / 64)
    angles = np.arange(4) * np.pi / 4
    waves = [np.cos(2 * np.pi * 8 * (x * np.cos(a) + y * np.sin(a))) for a in angles]
    images = np.repeat(np.rint(127.5 + 100 * np.stack(waves))[..., None], 3, axis=3).astype(np.uint8)
    answers = Responder(voxels).components(extractor(images, None))[COMPONENTS.index("contrast")]
    away = np.abs(np.angle(np.exp(2j * (voxels.orientation - angles[answers.argmax(0)])))) / 2
    assert np.degrees(np.median(away)) < 23


def test_late_voxels_answer_to_what_is_shown_and_where(voxels: brain.Voxels, extractor: FeatureExtractor) -> None:
    images, scenes = render_scenes(40, 5)
    components = Responder(voxels).components(extractor(images, scenes))
    place = components[COMPONENTS.index("place")]
    same = np.array([[a.place == b.place for b in scenes] for a in scenes])
    gap = np.linalg.norm(place[:, None] - place[None], axis=2)
    assert gap[same].max() < 1e-4 < gap[~same].min()
    signal = Responder(voxels).signal(components)
    np.testing.assert_allclose(signal.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(signal.std(0), 1, atol=1e-4)


def test_features_do_not_depend_on_the_other_images_of_a_batch(extractor: FeatureExtractor) -> None:
    images, _ = render_scenes(6, 9)
    whole, part = extractor(images, None), extractor(images[2:3], None)
    for name in ("contrast", "colour", "mid", "high", "classes"):
        np.testing.assert_allclose(getattr(part, name)[0], getattr(whole, name)[2], rtol=1e-3, atol=1e-4)


def test_ncsnr_is_distributed_as_described(mesh: brain.Mesh) -> None:
    ncsnr = np.concatenate([grow_brain(mesh, COUNTS, 1, s, False).ncsnr for s in (1, 2, 3)])
    low, high = brain.NCSNR_RANGE
    assert abs(np.median(ncsnr) - brain.NCSNR_MEDIAN) < 0.03
    assert low <= ncsnr.min() and ncsnr.max() <= high + 1e-6
    assert 0.3 < np.log(ncsnr).std() < 0.6


def test_noise_has_the_described_size_and_shared_part(voxels: brain.Voxels) -> None:
    betas = brain.session_betas(voxels, np.zeros((2000, len(voxels)), np.float32), 0, 1, 1)
    noise = (betas - betas.mean(0)) / voxels.scale * voxels.ncsnr
    assert 0.75 < noise.std(0).mean() < 1.35  # a session's gain is drawn too
    noise /= noise.std(0)
    spectrum = np.linalg.svd(noise, compute_uv=False) ** 2
    top = spectrum[: brain.SHARED_COMPONENTS].sum() / spectrum.sum()
    assert 0.28 < top < 0.42
    assert spectrum[brain.SHARED_COMPONENTS - 1] > 1.5 * spectrum[brain.SHARED_COMPONENTS]


def test_ncsnr_estimate_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    images = rng.permutation(np.repeat(np.arange(300), 3))
    true = np.array([0.2, 0.5, 1.0])
    signal = rng.standard_normal((300, 3))
    betas = true * signal[images] + rng.standard_normal((900, 3))
    betas = (betas - betas.mean(0)) / betas.std(0)
    variance = np.mean([betas[images == k].var(0, ddof=1) for k in range(300)], axis=0)
    expected = np.sqrt(np.maximum(1 - variance, 0) / variance)
    np.testing.assert_allclose(estimate_ncsnr(betas, images), expected, rtol=1e-5)
    np.testing.assert_allclose(expected, true, atol=0.12)
    assert (estimate_ncsnr(betas, np.arange(900)) == 0).all()  # no image was repeated
