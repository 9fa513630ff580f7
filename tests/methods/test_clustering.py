"""Voxel-to-cluster mappings against scikit-learn called directly, brute force, and the official table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

from methods.brain_it.clustering import (
    V2C,
    ClusterSizes,
    by_atlas,
    by_coordinates,
    gaussian_mixture,
    nearest_voxel_labels,
    normalise,
)


def blobs(n: int = 400, dimensions: int = 6, groups: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    group = rng.integers(0, groups, n)
    return rng.normal(size=(groups, dimensions))[group] * 3 + rng.normal(size=(n, dimensions)), group


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_mixture_equals_scikit_learn(covariance: Literal["full", "diag"]) -> None:
    embeddings = normalise(blobs()[0])
    v2c = gaussian_mixture(embeddings, 8, covariance=covariance, seed=3)
    expected = GaussianMixture(8, covariance_type=covariance, random_state=3)
    np.testing.assert_array_equal(v2c.labels, expected.fit_predict(embeddings.astype(np.float32)))
    assert v2c.means is not None and v2c.log_likelihood is not None
    np.testing.assert_allclose(v2c.means, expected.means_, atol=1e-6 if covariance == "full" else 0)
    assert v2c.log_likelihood == pytest.approx(expected.lower_bound_, rel=1e-5) and v2c.converged == expected.converged_
    assert v2c.method == f"gmm-{covariance}" and v2c.n_clusters == 8
    assert v2c.labels.dtype == np.int32 and v2c.means is not None and v2c.means.dtype == np.float32


def test_mixture_repeats_itself_and_finds_groups_from_a_subsample() -> None:
    embeddings, group = blobs()
    embeddings = normalise(embeddings)
    a, b = (gaussian_mixture(embeddings, 5, seed=1, subsample=200) for _ in range(2))
    np.testing.assert_array_equal(a.labels, b.labels)
    assert len(a.labels) == 400 and adjusted_rand_score(a.labels, group) > 0.9
    whole = gaussian_mixture(embeddings, 5, seed=1)
    np.testing.assert_array_equal(gaussian_mixture(embeddings, 5, seed=1, subsample=10_000).labels, whole.labels)


@pytest.mark.filterwarnings("error")
def test_a_fit_cut_short_says_so() -> None:
    assert not gaussian_mixture(blobs()[0], 8, max_iter=1).converged


def test_normalise() -> None:
    x = normalise(np.array([[3.0, 4.0], [0.0, 0.0], [-1e-12, 0.0]]))
    np.testing.assert_allclose(x, [[0.6, 0.8], [0, 0], [-1, 0]], rtol=1e-6)
    assert x.dtype == np.float32


def test_bad_points_are_named() -> None:
    embeddings = blobs()[0]
    with pytest.raises(ValueError, match="gaussian_mixture: 401 clusters for 400 voxels"):
        gaussian_mixture(embeddings, 401)
    with pytest.raises(ValueError, match="subsample: 20 clusters for 10 voxels"):
        gaussian_mixture(embeddings, 20, subsample=10)
    with pytest.raises(ValueError, match="0 clusters"):
        gaussian_mixture(embeddings, 0)
    with pytest.raises(ValueError, match="expected \\(voxels, dimensions\\)"):
        gaussian_mixture(embeddings[0], 1)
    broken = embeddings.copy()
    broken[7, 2] = np.nan
    broken[9, 0] = np.inf
    for call in (
        lambda: gaussian_mixture(broken, 4),
        lambda: by_coordinates(broken[:, :3], 4),
        lambda: nearest_voxel_labels(broken, embeddings, np.zeros(400, int)),
    ):
        with pytest.raises(ValueError, match="2 of 400 voxels have NaN or infinite values, the first is voxel 7"):
            call()
    with pytest.raises(ValueError, match='cannot fit 4 clusters .* covariance "diag"'):
        gaussian_mixture(np.zeros((10, 3)), 4, regularisation=0)


def test_coordinates() -> None:
    coordinates, group = blobs(dimensions=3)
    kmeans = by_coordinates(coordinates, 5, seed=2)
    np.testing.assert_array_equal(kmeans.labels, KMeans(5, random_state=2).fit_predict(coordinates.astype(np.float32)))
    assert kmeans.method == "kmeans" and kmeans.means is not None and kmeans.means.shape == (5, 3)
    mixture = by_coordinates(coordinates, 5, method="gmm", seed=2)
    assert mixture.method == "gmm-full" and adjusted_rand_score(mixture.labels, group) > 0.5
    with pytest.raises(ValueError, match=r"expected \(N, 3\)"):
        by_coordinates(coordinates[:, :2], 5)
    with pytest.raises(ValueError, match='method "ward"'):
        by_coordinates(coordinates, 5, method="ward")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error")
def test_subjects_with_the_same_coordinates_get_the_same_clusters() -> None:
    vertices = blobs(60, dimensions=3)[0]
    first, second = by_coordinates(np.concatenate([vertices, vertices]), 4).per_subject([60, 60])
    np.testing.assert_array_equal(first, second)
    few = by_coordinates(np.repeat(vertices[:3], 5, axis=0), 6)
    assert few.sizes().empty == 3


def test_atlas() -> None:
    v2c = by_atlas(np.array([30, -1, 7, 30, 0]))
    assert v2c.labels.tolist() == [3, 0, 2, 3, 1] and v2c.n_clusters == 4 and v2c.means is None
    for bad in (np.array([1.0, np.nan]), np.zeros((2, 2), int), np.array([], int)):
        with pytest.raises(ValueError, match="by_atlas"):
            by_atlas(bad)


@pytest.mark.parametrize("with_means", [True, False])
def test_save_and_load(tmp_path: Path, with_means: bool) -> None:
    v2c = gaussian_mixture(blobs()[0], 6) if with_means else by_atlas(np.array([2, 2, 5]))
    path = tmp_path / "v2c.safetensors"
    v2c.save(path)
    loaded = V2C.load(path)
    np.testing.assert_array_equal(loaded.labels, v2c.labels)
    assert (loaded.means is None) == (v2c.means is None)
    if v2c.means is not None:
        np.testing.assert_array_equal(loaded.means, v2c.means)
    for field in ("n_clusters", "method", "log_likelihood", "converged"):
        assert getattr(loaded, field) == getattr(v2c, field)
    with safe_open(path, framework="numpy") as file:
        assert json.loads(file.metadata()["v2c"])["n_clusters"] == v2c.n_clusters
    content = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == content


def test_loading_something_else_is_named(tmp_path: Path) -> None:
    text, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    text.write_text("not tensors at all")
    save_file({"labels": np.zeros(3, np.int32)}, other)
    for path in (text, other):
        with pytest.raises(ValueError, match=f"{path.name}: not a voxel-to-cluster file"):
            V2C.load(path)
    with pytest.raises(FileNotFoundError):
        V2C.load(tmp_path / "missing.safetensors")


def test_table_is_the_official_form() -> None:
    v2c = V2C(np.array([2, 0, 2, 2, 0]), 4)
    assert v2c.table().tolist() == [[1, 4, -1], [-1, -1, -1], [0, 2, 3], [-1, -1, -1]]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9).flatmap(lambda k: st.tuples(st.just(k), st.lists(st.integers(0, k - 1), min_size=1))))
def test_table_round_trip(mapping: tuple[int, list[int]]) -> None:
    n_clusters, labels = mapping
    table = V2C(np.array(labels), n_clusters).table()
    loaded = V2C.from_table(table.astype(np.int32))
    assert loaded.labels.tolist() == labels and loaded.n_clusters == n_clusters
    shuffled = np.random.default_rng(0).permuted(table, axis=1)  # order and place of padding carry no meaning
    assert V2C.from_table(shuffled).labels.tolist() == labels


@pytest.mark.parametrize("table", [[[0, 1], [1, -1]], [[0, 2], [-1, -1]], [[0, -2], [1, -1]], [0, 1], [[0.0, 1.0]]])
def test_impossible_tables_are_named(table: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="V2C: table"):
        V2C.from_table(np.array(table))


def test_impossible_labels_are_named() -> None:
    with pytest.raises(ValueError, match=r"V2C: labels 0\.\.3; expected 0\.\.2"):
        V2C(np.array([0, 3]), 3)
    for bad in (np.array([0.0]), np.zeros((2, 2), int), np.array([], int)):
        with pytest.raises(ValueError, match="expected integers of shape"):
            V2C(bad, 3)


def test_subjects_and_sizes() -> None:
    v2c = V2C(np.array([0, 0, 1, 3, 0, 1]), 5)
    assert [part.tolist() for part in v2c.per_subject([4, 2])] == [[0, 0, 1, 3], [0, 1]]
    assert v2c.sizes([4, 2]) == ClusterSizes(minimum=0, median=1.0, maximum=3, empty=2, empty_per_subject=(2, 3))
    assert v2c.sizes().empty_per_subject == ()
    with pytest.raises(ValueError, match="add up to 5; expected 6"):
        v2c.per_subject([3, 2])


def test_nearest_voxels_equal_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    # Lengths differ widely: nearest before scaling to length 1 is another voxel.
    new = rng.normal(size=(37, 5)) * rng.uniform(0.1, 10, (37, 1))
    reference = rng.normal(size=(53, 5)) * rng.uniform(0.1, 10, (53, 1))
    labels = rng.integers(0, 9, 53)
    unit_new = new / np.linalg.norm(new, axis=1, keepdims=True)
    unit_reference = reference / np.linalg.norm(reference, axis=1, keepdims=True)
    expected = [int(np.argmin([np.linalg.norm(a - b) for b in unit_reference])) for a in unit_new]
    for elements in (2**26, 53 * 4, 1):  # one block, several, one voxel at a time
        monkeypatch.setattr("methods.brain_it.clustering._BLOCK_ELEMENTS", elements)
        found, nearest = nearest_voxel_labels(new, reference, labels)
        assert nearest.tolist() == expected and found.tolist() == labels[expected].tolist()
    assert found.dtype == np.int32 and nearest.dtype == np.int64
    with pytest.raises(ValueError, match="nearest_voxel_labels: new"):
        nearest_voxel_labels(new[:, :4], reference, labels)
    with pytest.raises(ValueError, match="nearest_voxel_labels: new"):
        nearest_voxel_labels(new, reference, labels[:-1])


def test_labels_in_blocks_equal_labels_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = normalise(blobs()[0])
    expected = gaussian_mixture(embeddings, 8)
    monkeypatch.setattr("methods.brain_it.clustering._BLOCK_ELEMENTS", 8 * 6 * 7)
    np.testing.assert_array_equal(gaussian_mixture(embeddings, 8).labels, expected.labels)
