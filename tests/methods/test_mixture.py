"""Expectation maximisation in one pass, against scikit-learn step by step and against the densities themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture

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
    precisions = ours.precision_factors @ ours.precision_factors.transpose(1, 2)
    np.testing.assert_allclose(precisions, theirs.precisions_, rtol=2e-3, atol=2e-3 * np.abs(theirs.precisions_).max())
    agreement = (ours.predict(torch.from_numpy(x)).numpy() == theirs.predict(x)).mean()
    assert agreement > 0.999


def test_the_joint_density_is_that_of_the_normal_distributions() -> None:
    x = embeddings(500, 5, 3)
    mixture = fit_full_mixture(x, 3, seed=0)
    covariances = torch.linalg.inv(mixture.precision_factors @ mixture.precision_factors.transpose(1, 2))
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


def test_a_flat_component_is_refused() -> None:
    flat = np.repeat(np.eye(4, dtype=np.float32)[:2], 10, axis=0)
    with pytest.raises(ValueError, match="component 0 is not positive definite"):
        fit_full_mixture(flat, 2, seed=0, regularisation=0)
