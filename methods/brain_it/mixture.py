"""Gaussian mixtures with full covariances over hundreds of thousands of voxels, by expectation maximisation in torch.

The same model and the same rules as scikit-learn's ``GaussianMixture`` (k-means start, regularised covariances, the
stop by the gain in mean log-likelihood), which stays the reference in the tests. What differs is the order of the work:

- One pass over the voxels does both steps. A block of voxels is weighed, and what the next covariances need of it is
  added up at once, so that no (voxels x components) table is kept.
- The distances to all components of a block are one matrix product, ``||x P_k - m_k P_k||``, P_k the Cholesky factor of
  component k's precision.
- In hundreds of dimensions nearly every voxel belongs to one component, or two: only weights that can be seen in the
  sums enter them, which makes the second step a small part of the first.

Products are in float32; sums over voxels, covariances and their factors in float64. Second moments are taken about the
means of the step before, so that nothing is lost when the new means are taken off.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

_BLOCK = 4096  # voxels at a time
_COLUMNS = 4096  # columns of a product: with a block of voxels, 64 MB
_SEEN = 1e-10  # least weight that enters a sum over thousands of voxels in float32


@dataclass(frozen=True, eq=False)
class FullMixture:
    """A fitted mixture of K Gaussians in D dimensions.

    Attributes:
        weights: (K,) float64, summing to 1.
        means: (K, D) float64.
        precision_factors: (K, D, D) float64, P with P P^T the inverse covariance.
        log_likelihood: of a voxel, the mean at the start of the last step.
        converged: whether the last step gained less than the tolerance.
        steps: of expectation maximisation.
    """

    weights: Tensor
    means: Tensor
    precision_factors: Tensor
    log_likelihood: float = float("nan")
    converged: bool = False
    steps: int = 0

    def log_joint(self, x: Tensor) -> Tensor:
        """Return log(weight_k) + log N(x; component k): (N, D) float32 to (N, K) float32."""
        count, width = self.means.shape
        factors = self.precision_factors.transpose(0, 1).reshape(width, count * width).float()
        offsets = torch.einsum("kd,kde->ke", self.means, self.precision_factors).reshape(-1).neg().float()
        log_det = self.precision_factors.diagonal(dim1=1, dim2=2).log().sum(1)
        constants = (self.weights.log() + log_det - 0.5 * width * math.log(2 * math.pi)).float()
        out = torch.empty(len(x), count, device=x.device)
        step = max(1, _COLUMNS // width) * width
        for start in range(0, count * width, step):
            columns = slice(start, min(start + step, count * width))
            projected = torch.addmm(offsets[columns], x, factors[:, columns])  # N x (components of this part x D)
            distances = torch.linalg.vector_norm(projected.view(len(x), -1, width), dim=2)
            out[:, start // width : columns.stop // width] = distances.square_().mul_(-0.5)
        return out.add_(constants)

    def predict(self, x: Tensor) -> Tensor:
        """Return each voxel's likeliest component: (N, D) to (N,)."""
        return torch.cat([self.log_joint(block).argmax(1) for block in x.split(_BLOCK)])


def fit_full_mixture(
    points: NDArray[np.float32],
    count: int,
    *,
    seed: int,
    max_iter: int = 100,
    tolerance: float = 1e-3,
    regularisation: float = 1e-6,
    device: str | torch.device = "cpu",
) -> FullMixture:
    """Fit ``count`` Gaussians to points (N, D) from a k-means start.

    Args:
        points: float32.
        count: components.
        seed: of k-means.
        max_iter: most steps.
        tolerance: stop when the mean log-likelihood gains less.
        regularisation: added to the variances.
        device: where the steps are computed; k-means runs on the CPU.

    Raises:
        ValueError: a covariance is not positive definite.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        start = KMeans(count, n_init=1, random_state=seed).fit(points).labels_
    x = torch.from_numpy(np.ascontiguousarray(points)).to(device)
    labels = torch.from_numpy(start.astype(np.int64)).to(device)
    centres = torch.zeros(count, x.shape[1], dtype=torch.float64, device=device)
    for block, own in zip(x.split(_BLOCK), labels.split(_BLOCK), strict=True):
        centres.index_add_(0, own, block.double())
    centres /= torch.bincount(labels, minlength=count).clamp(min=1)[:, None]
    sums = _Sums(centres)
    for block, own in zip(x.split(_BLOCK), labels.split(_BLOCK), strict=True):
        sums.add(block, torch.nn.functional.one_hot(own, count).float())
    mixture = sums.mixture(regularisation)
    before = -math.inf
    for step in range(1, max_iter + 1):
        sums, total = _Sums(mixture.means), 0.0
        for block in x.split(_BLOCK):
            joint = mixture.log_joint(block)
            evidence = joint.logsumexp(1, keepdim=True)
            total += float(evidence.double().sum())
            sums.add(block, joint.sub_(evidence).exp_())
        after = total / len(x)
        converged = abs(after - before) < tolerance
        fitted = sums.mixture(regularisation)
        mixture = FullMixture(
            fitted.weights,
            fitted.means,
            fitted.precision_factors,
            log_likelihood=after,
            converged=converged,
            steps=step,
        )
        if converged:
            break
        before = after
    return mixture


class _Sums:
    """Weighted counts, sums and second moments of voxels, about given centres."""

    def __init__(self, centres: Tensor) -> None:
        count, width = centres.shape
        self._centres = centres
        self._count = torch.zeros(count, dtype=torch.float64, device=centres.device)
        self._sum = torch.zeros(count, width, dtype=torch.float64, device=centres.device)
        self._square = torch.zeros(count, width, width, dtype=torch.float64, device=centres.device)

    def add(self, x: Tensor, weight: Tensor) -> None:
        """Add voxels (B, D) with their weights (B, K)."""
        self._count += weight.double().sum(0)
        voxel, component = (weight > _SEEN).nonzero(as_tuple=True)
        order = component.argsort(stable=True)
        voxel, component = voxel[order], component[order]
        own = weight[voxel, component]
        sizes = torch.bincount(component, minlength=len(self._count)).tolist()
        for k, (rows, share) in enumerate(zip(voxel.split(sizes), own.split(sizes), strict=True)):
            if not len(rows):
                continue
            centred = x[rows] - self._centres[k].float()
            self._sum[k] += (share @ centred).double()
            centred *= share.sqrt()[:, None]
            self._square[k] += (centred.T @ centred).double()

    def mixture(self, regularisation: float) -> FullMixture:
        """Return the mixture that these sums make likeliest."""
        count = self._count + 10 * torch.finfo(torch.float32).eps
        shift = self._sum / count[:, None]
        covariance = self._square / count[:, None, None] - shift[:, :, None] * shift[:, None, :]
        covariance.diagonal(dim1=1, dim2=2).add_(regularisation)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if bool(failed.any()):
            raise ValueError(f"the covariance of component {int(failed.nonzero()[0, 0])} is not positive definite")
        width = shift.shape[1]
        identity = torch.eye(width, dtype=torch.float64, device=shift.device).expand(len(shift), width, width)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
        return FullMixture(count / count.sum(), self._centres + shift, inverse.transpose(1, 2).contiguous())
