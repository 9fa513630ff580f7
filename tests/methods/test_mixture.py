"""Expectation maximisation in one pass, against scikit-learn step by step and against the densities themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

from benchmark.perf.clusters import sklearn_steps
from methods.brain_it.clustering import normalise
from methods.brain_it.mixture import fit_full_mixture


def embeddings(n: int, width: int, groups: int, seed: int = 0) -> np.ndarray:
    """Points on the sphere, in groups that overlap and are stretched each its own way."""
    rng = np.random.default_rng(seed)
    centres, stretch = rng.standard_normal((groups, width)), 0.3 * rng.standard_normal((groups, width, width))
    group = rng.integers(0, groups, n)
    noise = rng.standard_normal((n, width))
    return normalise(centres[group] + np.einsum("ni,nij->nj", noise, stretch[group]) + 0.2 * noise)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("steps", [1, 2, 5, 100])
def test_every_step_is_scikit_learns(steps: int) -> None:
    x = embeddings(6000, 12, 9)  # more than a block of voxels
    ours = fit_full_mixture(x, 5, seed=1, max_iter=steps)
    theirs = GaussianMixture(5, random_state=1, max_iter=steps).fit(x)
    assert ours.steps == theirs.n_iter_ and ours.converged == theirs.converged_
    assert ours.log_likelihood == pytest.approx(theirs.lower_bound_, abs=1e-4)
    np.testing.assert_allclose(ours.weights, theirs.weights_, atol=1e-5)
    np.testing.assert_allclose(ours.means, theirs.means_, atol=1e-5)
    np.testing.assert_allclose(
        ours.precisions, theirs.precisions_, rtol=2e-3, atol=2e-3 * np.abs(theirs.precisions_).max()
    )
    agreement = (ours.predict(torch.from_numpy(x)).numpy() == theirs.predict(x)).mean()
    assert agreement > 0.999


def test_the_joint_density_is_that_of_the_normal_distributions() -> None:
    x = embeddings(500, 5, 3)
    mixture = fit_full_mixture(x, 3, seed=0)
    covariances = torch.linalg.inv(mixture.precisions)
    expected = [
        np.log(float(mixture.weights[k])) + multivariate_normal(mixture.means[k], covariances[k]).logpdf(x)
        for k in range(3)
    ]
    np.testing.assert_allclose(mixture.log_joint(torch.from_numpy(x)), np.stack(expected, 1), rtol=1e-4, atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 6))
def test_no_step_lowers_the_likelihood(seed: int, count: int) -> None:
    x = embeddings(400, 4, 4, seed)
    values = [fit_full_mixture(x, count, seed=0, max_iter=k, tolerance=0).log_likelihood for k in (1, 2, 4, 8)]
    assert all(b >= a - 1e-4 for a, b in zip(values, values[1:], strict=False))


def test_more_columns_than_one_product_takes() -> None:
    x = embeddings(900, 16, 6)
    whole = fit_full_mixture(x, 6, seed=0, max_iter=3)
    import methods.brain_it.mixture as module

    narrow, module._COLUMNS = module._COLUMNS, 40  # two components a product, the last one alone
    try:
        parts = fit_full_mixture(x, 6, seed=0, max_iter=3)
    finally:
        module._COLUMNS = narrow
    np.testing.assert_allclose(parts.means, whole.means, atol=1e-6)


def test_what_is_out_of_the_question_is_left_out_and_nothing_else() -> None:
    """In more coordinates than all components are compared in."""
    x = embeddings(3000, 150, 6)
    mixture = fit_full_mixture(x, 6, seed=0, max_iter=2)
    points = torch.from_numpy(x)
    whole = mixture.log_joint(points)
    best = whole.max(1, keepdim=True).values
    for within in (0.0, 23.0, 200.0):
        joint = mixture.log_joint(points, within)
        left = joint > -torch.inf
        assert left[whole > best - within + 1e-2].all()
        torch.testing.assert_close(joint[left & (whole > best - within)], whole[left & (whole > best - within)])
        assert (joint.argmax(1) == whole.argmax(1)).float().mean() > 0.999
    assert not left.all() and torch.isfinite(whole).all()
    torch.testing.assert_close(mixture.log_joint(points, 23.0).logsumexp(1), whole.logsumexp(1))


def test_many_coordinates_change_no_step() -> None:
    x = embeddings(4000, 150, 6)
    labels = KMeans(4, n_init=1, random_state=0).fit(x).labels_
    ours = fit_full_mixture(x, 4, seed=0, max_iter=3, start=labels)
    theirs = GaussianMixture(4, random_state=0)
    log_likelihood = sklearn_steps(theirs, x, labels, 3)
    assert ours.log_likelihood == pytest.approx(log_likelihood, abs=2e-3)
    np.testing.assert_allclose(ours.means, theirs.means_, atol=1e-5)
    np.testing.assert_allclose(ours.weights, theirs.weights_, atol=1e-5)
    assert (ours.predict(torch.from_numpy(x)).numpy() == theirs.predict(x)).mean() > 0.999


def test_a_flat_component_is_refused() -> None:
    flat = np.repeat(np.eye(4, dtype=np.float32)[:2], 10, axis=0)
    with pytest.raises(ValueError, match="component 0 is not positive definite"):
        fit_full_mixture(flat, 2, seed=0, regularisation=0)
