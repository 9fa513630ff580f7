"""Gaussian mixtures with full covariances over hundreds of thousands of voxels, by expectation maximisation in torch.

The same model and the same rules as scikit-learn's ``GaussianMixture`` (k-means start, regularised covariances, the
stop by the gain in mean log-likelihood), which stays the reference in the tests. What differs is the order of the work:

- One pass over the voxels does both steps. A block of voxels is weighed, and what the next covariances need of it is
  added up at once, so that no (voxels x components) table is kept.
- The distances to components are matrix products, ``||x P_k - m_k P_k||``, P_k the Cholesky factor of component k's
  precision. It is triangular: the first columns need the first coordinates only, and what they give is the distance in
  those coordinates, which the others can but lengthen. Coordinates are principal axes, so the first tell most.
- In hundreds of dimensions nearly every voxel belongs to one component, or two. A component that is out of the question
  after the first coordinates is not looked at in the others, and only weights that can be seen in the sums enter them.

Products are in float32; sums over voxels, covariances and their factors in float64. Second moments are taken about the
means of the step before, so that nothing is lost when the new means are taken off.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

_BLOCK = 4096  # voxels at a time
_COLUMNS = 1024  # columns of a product over all components: with a block of voxels, 16 MB
_FIRST = 64  # coordinates in which all components are compared
_SEEN = 1e-10  # least weight that enters a sum over thousands of voxels in float32


@dataclass(frozen=True, eq=False)
class Axes:
    """Coordinates in which a mixture is fitted: (x - centre) @ directions, by falling variance.

    Attributes:
        centre: (D,) float64.
        directions: (D, D) float64, orthogonal.
    """

    centre: Tensor
    directions: Tensor

    @classmethod
    def principal(cls, x: Tensor) -> Axes:
        """Return the principal axes of points (N, D)."""
        centre = torch.stack([block.double().sum(0) for block in x.split(_BLOCK)]).sum(0) / len(x)
        scatter = torch.zeros(len(centre), len(centre), dtype=torch.float64, device=x.device)
        for block in x.split(_BLOCK):
            moved = block - centre.float()
            scatter += (moved.T @ moved).double()
        return cls(centre, torch.linalg.eigh(scatter).eigenvectors.flip(1))

    def apply(self, x: Tensor) -> Tensor:
        """Return points (N, D) in these coordinates, float32."""
        return (x - self.centre.float()) @ self.directions.float()


@dataclass(frozen=True, eq=False)
class FullMixture:
    """A fitted mixture of K Gaussians in D dimensions.

    Attributes:
        axes: the coordinates of what follows.
        weights: (K,) float64, summing to 1.
        centres: (K, D) float64.
        factors: (K, D, D) float64, upper triangular, P with P P^T the inverse covariance.
        log_likelihood: of a voxel, the mean at the start of the last step.
        converged: whether the last step gained less than the tolerance.
        steps: of expectation maximisation.
    """

    axes: Axes
    weights: Tensor
    centres: Tensor
    factors: Tensor
    log_likelihood: float = float("nan")
    converged: bool = False
    steps: int = 0

    @property
    def means(self) -> Tensor:
        """Means in the space of the points: (K, D) float64."""
        return self.axes.centre + self.centres @ self.axes.directions.T

    @property
    def precisions(self) -> Tensor:
        """Inverse covariances in the space of the points: (K, D, D) float64."""
        factors = self.axes.directions @ self.factors
        return factors @ factors.transpose(1, 2)

    def log_joint(self, x: Tensor, within: float = math.inf) -> Tensor:
        """Return log(weight_k) + log N(x; component k): (N, D) float32 to (N, K) float32.

        Minus infinity for components that are more than ``within`` below a voxel's likeliest; some of those may have
        their value.
        """
        return self.log_joint_along(self.axes.apply(x), within)

    def log_joint_along(self, x: Tensor, within: float = math.inf) -> Tensor:
        """The same for points in the coordinates of the mixture."""
        factors, offsets, constants, leading = self._in_single
        (count, width), first = offsets.shape, min(_FIRST, offsets.shape[1])
        joint = torch.empty(len(x), count, device=x.device)
        start, near = offsets[:, :first].flatten(), x[:, :first].contiguous()
        step = max(1, _COLUMNS // first) * first
        for left in range(0, count * first, step):
            columns = slice(left, min(left + step, count * first))
            projected = torch.addmm(start[columns], near, leading[:, columns])  # N x (components of this part x first)
            distances = torch.linalg.vector_norm(projected.view(len(x), -1, first), dim=2)
            joint[:, left // first : columns.stop // first] = distances.square_().mul_(-0.5)
        joint.add_(constants)
        if first == width:
            return joint

        def farther(voxels: Sequence[Tensor], left: int, right: int) -> None:
            """Take some coordinates' share of the distance off each component's voxels."""
            for k, rows in enumerate(voxels):
                if len(rows):
                    projected = torch.addmm(
                        offsets[k, left:right], x[:, :right].index_select(0, rows), factors[k, :right, left:right]
                    )
                    joint[rows, k] -= 0.5 * projected.square_().sum(1)

        # So far these are upper bounds. The component with the highest, seen whole, bounds a voxel's likeliest below.
        likely = joint.argmax(1, keepdim=True)
        chosen = torch.zeros_like(joint, dtype=torch.bool).scatter_(1, likely, True)
        farther(_by_component(chosen), first, width)
        least = joint.gather(1, likely) - within
        left = first
        while left < width:
            right = min(2 * left, width)
            joint.masked_fill_(joint < least, -math.inf)
            farther(_by_component((joint > -math.inf) & ~chosen), left, right)
            left = right
        return joint

    @cached_property
    def _in_single(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Factors, -centre @ factor, and what a distance of 0 is worth, in float32; the factors' first coordinates."""
        width = self.centres.shape[1]
        first = min(_FIRST, width)
        offsets = torch.einsum("kd,kde->ke", self.centres, self.factors).neg().float()
        log_det = self.factors.diagonal(dim1=1, dim2=2).log().sum(1)
        constants = (self.weights.log() + log_det - 0.5 * width * math.log(2 * math.pi)).float()
        factors = self.factors.float()
        return factors, offsets, constants, factors[:, :first, :first].transpose(0, 1).flatten(1).contiguous()

    def predict(self, x: Tensor) -> Tensor:
        """Return each voxel's likeliest component: (N, D) to (N,)."""
        return torch.cat([self.log_joint(block, within=0.0).argmax(1) for block in x.split(_BLOCK)])


def _by_component(mask: Tensor) -> tuple[Tensor, ...]:
    """Return, for each component, the voxels for which a mask (N, K) holds, ascending."""
    _, voxel = mask.T.nonzero(as_tuple=True)
    return voxel.split(mask.sum(0).tolist())


def fit_full_mixture(
    points: NDArray[np.float32],
    count: int,
    *,
    seed: int,
    max_iter: int = 100,
    tolerance: float = 1e-3,
    regularisation: float = 1e-6,
    start: NDArray[Any] | None = None,
    device: str | torch.device = "cpu",
) -> FullMixture:
    """Fit ``count`` Gaussians to points (N, D).

    Args:
        points: float32.
        count: components.
        seed: of k-means.
        max_iter: most steps.
        tolerance: stop when the mean log-likelihood gains less.
        regularisation: added to the variances.
        start: (N,) component of each point to start from; None: by k-means.
        device: where the steps are computed; k-means runs on the CPU.

    Raises:
        ValueError: a covariance is not positive definite.
    """
    if start is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            start = KMeans(count, n_init=1, random_state=seed).fit(points).labels_
    original = torch.from_numpy(np.ascontiguousarray(points)).to(device)
    axes = Axes.principal(original)
    x = torch.cat([axes.apply(block) for block in original.split(_BLOCK)])
    labels = torch.from_numpy(start.astype(np.int64)).to(device)
    centres = torch.zeros(count, x.shape[1], dtype=torch.float64, device=device)
    for block, own in zip(x.split(_BLOCK), labels.split(_BLOCK), strict=True):
        centres.index_add_(0, own, block.double())
    centres /= torch.bincount(labels, minlength=count).clamp(min=1)[:, None]
    sums = _Sums(axes, centres)
    for block, own in zip(x.split(_BLOCK), labels.split(_BLOCK), strict=True):
        sums.add(block, torch.nn.functional.one_hot(own, count).float())
    mixture = sums.mixture(regularisation)
    before = -math.inf
    for step in range(1, max_iter + 1):
        sums, total = _Sums(axes, mixture.centres), 0.0
        for block in x.split(_BLOCK):
            joint = mixture.log_joint_along(block, within=-math.log(_SEEN))
            evidence = joint.logsumexp(1, keepdim=True)
            total += float(evidence.double().sum())
            sums.add(block, joint.sub_(evidence).exp_())
        after = total / len(x)
        converged = abs(after - before) < tolerance
        mixture = replace(sums.mixture(regularisation), log_likelihood=after, converged=converged, steps=step)
        if converged:
            break
        before = after
    return mixture


class _Sums:
    """Weighted counts, sums and second moments of voxels, about given centres."""

    def __init__(self, axes: Axes, centres: Tensor) -> None:
        count, width = centres.shape
        self._axes, self._centres = axes, centres
        self._count = torch.zeros(count, dtype=torch.float64, device=centres.device)
        self._sum = torch.zeros(count, width, dtype=torch.float64, device=centres.device)
        self._square = torch.zeros(count, width, width, dtype=torch.float64, device=centres.device)

    def add(self, x: Tensor, weight: Tensor) -> None:
        """Add voxels (B, D) with their weights (B, K)."""
        self._count += weight.double().sum(0)
        for k, rows in enumerate(_by_component(weight > _SEEN)):
            if not len(rows):
                continue
            share = weight[rows, k]
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
        factors = inverse.transpose(1, 2).contiguous()
        return FullMixture(self._axes, count / count.sum(), self._centres + shift, factors)
