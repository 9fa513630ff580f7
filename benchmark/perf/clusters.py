"""Entry ``clusters``: the mixture of Gaussians with full covariances that maps voxels to clusters (Sec. 3.1).

The reference is scikit-learn's ``GaussianMixture`` on the same float32 points. A whole fit of 315,997 voxels takes it
hours: at full size the start from given labels and one step are measured, and beside it a whole fit, k-means and the
clusters of all voxels included, of a smaller problem.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from benchmark.perf.entries import Floor, Job, Part, Results
from methods.brain_it.clustering import gaussian_mixture, normalise
from methods.brain_it.mixture import fit_full_mixture


@dataclass(frozen=True)
class _Sizes:
    voxels: int
    width: int
    clusters: int


_FULL, _WHOLE, _QUICK = _Sizes(315_997, 256, 128), _Sizes(20_000, 128, 16), _Sizes(1500, 80, 4)


@dataclass(frozen=True)
class _Points:
    x: NDArray[np.float32]  # voxels x width, of length 1
    labels: NDArray[np.int64]
    clusters: int


def _points(job: Job, full: _Sizes) -> _Points:
    """Twice as many overlapping groups as clusters, each stretched along directions of its own."""
    sizes = _QUICK if job.quick else full
    rng = np.random.default_rng(0)
    groups, rank = 2 * sizes.clusters, max(4, sizes.width // 8)
    # As in embeddings, a few directions hold most of the differences.
    scale = (1 + np.arange(sizes.width)) ** -0.5
    centres = rng.standard_normal((groups, sizes.width), np.float32) * scale
    x = np.empty((sizes.voxels, sizes.width), np.float32)
    group = rng.integers(0, groups, sizes.voxels)
    for k in range(groups):
        own = np.flatnonzero(group == k)
        stretch = rng.standard_normal((rank, sizes.width), np.float32) * (0.5 * scale / rank**0.5)
        x[own] = centres[k] + rng.standard_normal((len(own), rank), np.float32) @ stretch
        x[own] += 0.1 * scale * rng.standard_normal((len(own), sizes.width), np.float32)
    return _Points(normalise(x), group % sizes.clusters, sizes.clusters)


# --- scikit-learn -----------------------------------------------------------------------------------------------------


def sklearn_steps(mixture: GaussianMixture, x: NDArray[np.float32], labels: NDArray[np.int64], steps: int) -> float:
    """Fit scikit-learn's mixture in so many steps from labels; return the log-likelihood at the last one's start."""
    given = np.zeros((len(x), mixture.n_components), x.dtype)
    given[np.arange(len(x)), labels] = 1
    mixture._initialize(x, given)
    for _ in range(steps):
        log_likelihood, log_weights = mixture._e_step(x)
        mixture._m_step(x, log_weights)
    return float(log_likelihood)


def reference_step(points: _Points, job: Job) -> Results:
    """One step by scikit-learn."""
    mixture = GaussianMixture(points.clusters)
    log_likelihood = sklearn_steps(mixture, points.x, points.labels, 1)
    return _step_results(log_likelihood, mixture.weights_, mixture.means_)


def reference_fit(points: _Points, job: Job) -> Results:
    """The whole fit by scikit-learn."""
    mixture = GaussianMixture(points.clusters, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = mixture.fit_predict(points.x)
    return _fit_results(mixture.lower_bound_, labels, points.clusters)


# --- ours -------------------------------------------------------------------------------------------------------------


def our_step(points: _Points, job: Job) -> Results:
    """The same step by ``methods.brain_it.mixture``."""
    mixture = fit_full_mixture(points.x, points.clusters, seed=0, max_iter=1, start=points.labels, device=job.device)
    return _step_results(mixture.log_likelihood, mixture.weights.cpu().numpy(), mixture.means.cpu().numpy())


def our_fit(points: _Points, job: Job) -> Results:
    """The same fit as stage ``clusters`` makes it."""
    found = gaussian_mixture(points.x, points.clusters)
    assert found.log_likelihood is not None
    return _fit_results(found.log_likelihood, found.labels, points.clusters)


def _step_results(log_likelihood: float, weights: NDArray[np.float64], means: NDArray[np.float64]) -> Results:
    return {"log-likelihood": np.array(log_likelihood), "weights": weights, "means": means}


def _fit_results(log_likelihood: float, labels: NDArray[np.int32], clusters: int) -> Results:
    return {
        "log-likelihood of the whole fit": np.array(log_likelihood),
        # A voxel halfway between two clusters may fall to either side by rounding.
        "share of voxels in each cluster": np.bincount(labels, minlength=clusters) / len(labels),
    }


# --- the least that either can do -------------------------------------------------------------------------------------


def _floor(job: Job, full: _Sizes, steps: int) -> Floor:
    """The distance of each voxel to its own component, its share in that one's covariance; each voxel read twice.

    That is what remains if no voxel has a say in a second component, and nobody had to find out. Factors are
    triangular and covariances symmetric.
    """
    sizes = _QUICK if job.quick else full
    moments = 2.0 * sizes.voxels * sizes.width**2
    return Floor(operations=steps * moments, nbytes=steps * 2.0 * sizes.voxels * sizes.width * 4)


PARTS: tuple[Part, ...] = (
    Part(
        "start and one step, 315,997 x 256, 128 clusters",
        partial(_points, full=_FULL),
        our_step,
        reference_step,
        partial(_floor, full=_FULL, steps=1),
    ),
    Part(
        "whole fit, 20,000 x 128, 16 clusters",
        partial(_points, full=_WHOLE),
        our_fit,
        reference_fit,
        partial(_floor, full=_WHOLE, steps=10),
    ),
)
TOLERANCES: Mapping[str, float] = {
    "log-likelihood": 1e-2,  # of several hundred
    "weights": 1e-5,
    "means": 1e-4,
    "log-likelihood of the whole fit": 1e-2,
    "share of voxels in each cluster": 1e-3,
}
