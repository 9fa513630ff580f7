"""Ridge regression from the voxels of one subject to image features, its penalty chosen by cross-validation.

The predictor of Takagi & Nishimoto (CVPR 2023) and of Brain-Diffuser (Ozcelik & VanRullen 2023), who fix the penalty.

There are fewer images than voxels, and far more features than either, so everything is done between images. With
centred inputs X (n x voxels), K = X X' = U diag(w) U' and centred targets Y, the prediction for inputs Z is

    Z X' U diag(1 / (w + alpha)) U' Y:

one eigendecomposition serves all penalties. The squared error of held-out images needs the targets only through their
products between images, G = Y Y' (n x n): predictions less truth are B Y for an n_out x n matrix B, and
||B Y||^2 = trace(B G B'). So cross-validation costs the same for ten features and for a million.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor

ALPHAS = tuple(10 ** (k / 2) for k in range(-2, 15))
"""Half-decades from 0.1 to 10^7: from no penalty worth the name to almost none of the signal, for z-scored voxels."""


class Ridge:
    """Cross-validated ridge regression with an intercept, for any number of targets.

    Arithmetic is in float64, on the device of the inputs; what is kept is in the dtype of the targets.

    Args:
        alphas: penalties to choose from, in the scale of scikit-learn's ``Ridge``: ``||Y - X W||^2 + alpha ||W||^2``.
        folds: parts of the images in cross-validation.
        seed: of the folds.
        chunk: targets that are worked on at a time, which bounds memory and changes no result.

    Attributes:
        alpha: the chosen penalty, with the least mean over folds of the mean squared error.
        errors: that error for each of ``alphas``; empty where there is one penalty only.

    Raises:
        ValueError: a penalty that is not positive, fewer than two folds, or a chunk below one.
    """

    alpha: float
    errors: tuple[float, ...]

    def __init__(self, alphas: Sequence[float] = ALPHAS, *, folds: int = 5, seed: int = 0, chunk: int = 16384) -> None:
        if not alphas or min(alphas) <= 0:
            raise ValueError(f"ridge needs positive penalties, got {list(alphas)}")
        if folds < 2 or chunk < 1:
            raise ValueError(f"ridge needs two folds or more and a positive chunk, got folds={folds}, chunk={chunk}")
        self.alphas = tuple(float(alpha) for alpha in alphas)
        self.folds, self.seed, self.chunk = folds, seed, chunk
        self._dual: Tensor | None = None

    def fit(self, x: Tensor, y: Tensor) -> Self:
        """Choose the penalty on these rows and fit all of them with it.

        Args:
            x: (n, voxels) inputs.
            y: (n, ...) targets of any trailing shape.

        Raises:
            ValueError: the shapes do not fit each other or the folds, or a number is not finite.
        """
        if x.ndim != 2 or y.ndim < 2 or len(x) != len(y) or not len(x):
            raise ValueError(f"ridge needs inputs (n, voxels) and targets (n, ...), got {_shape(x)} and {_shape(y)}")
        if not y.is_floating_point():
            raise ValueError(f"ridge needs floating-point targets, got {y.dtype}")
        choose = len(self.alphas) > 1
        if choose and len(x) < self.folds:
            raise ValueError(f"ridge cannot part {len(x)} images into {self.folds} folds")
        self._shape = y.shape[1:]
        targets = y.flatten(1)
        inputs = x.double()
        self._x_mean = inputs.mean(0)
        self._x = inputs - self._x_mean
        kernel = self._x @ self._x.T
        self._y_mean = torch.cat([part.mean(0) for part in self._chunks(targets)]).to(y.dtype)
        if not (kernel.isfinite().all() and self._y_mean.isfinite().all()):
            raise ValueError("ridge needs finite inputs and targets")
        self.errors = self._cross_validate(kernel, targets) if choose else ()
        self.alpha = self.alphas[self.errors.index(min(self.errors))] if choose else self.alphas[0]

        values, vectors = torch.linalg.eigh(kernel)
        inverse = vectors / (values.clamp(min=0) + self.alpha) @ vectors.T
        self._dual = torch.empty_like(targets)
        start = 0
        for part in self._chunks(targets):
            self._dual[:, start : start + part.shape[1]] = inverse @ (part - part.mean(0))
            start += part.shape[1]
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Map (n, voxels) inputs to (n, ...) predictions of the shape of the targets.

        Raises:
            ValueError: before ``fit``, or another number of voxels.
        """
        if self._dual is None:
            raise ValueError("ridge predicts nothing before fit")
        if x.ndim != 2 or x.shape[1] != self._x.shape[1]:
            raise ValueError(f"ridge was fitted to {self._x.shape[1]} voxels, got inputs {_shape(x)}")
        products = (x.double() - self._x_mean) @ self._x.T
        parts = [products @ part for part in self._chunks(self._dual)]
        return (torch.cat([part.to(self._dual.dtype) for part in parts], 1) + self._y_mean).unflatten(1, self._shape)

    def _cross_validate(self, kernel: Tensor, targets: Tensor) -> tuple[float, ...]:
        """Return for each penalty the mean over folds of the mean squared error of the images left out."""
        gram = torch.zeros_like(kernel)
        for part in self._chunks(targets):
            centred = part - part.mean(0)
            gram += centred @ centred.T
        alphas = torch.tensor(self.alphas, dtype=kernel.dtype, device=kernel.device)
        errors = torch.zeros_like(alphas)
        everything = torch.arange(len(kernel), device=kernel.device)
        for out in fold_indices(len(kernel), self.folds, self.seed):
            out = out.to(kernel.device)
            kept = everything[torch.isin(everything, out, invert=True)]
            # Products with the kept images' inputs, centred on the mean of those.
            rows = kernel[:, kept] - kernel[:, kept].mean(1, keepdim=True)
            rows = rows - rows[kept].mean(0)
            values, vectors = torch.linalg.eigh(rows[kept])
            left = rows[out] @ vectors
            for k, alpha in enumerate(alphas):
                weights = left / (values.clamp(min=0) + alpha) @ vectors.T
                # Prediction less truth, as weights of the images' targets; the intercept makes each row sum to zero.
                residual = torch.zeros(len(out), len(kernel), dtype=kernel.dtype, device=kernel.device)
                residual[:, kept] = weights + (1 - weights.sum(1, keepdim=True)) / len(kept)
                residual[torch.arange(len(out)), out] = -1.0
                errors[k] += ((residual @ gram) * residual).sum() / (len(out) * targets.shape[1])
        return tuple((errors / self.folds).tolist())

    def _chunks(self, targets: Tensor) -> Iterator[Tensor]:
        return (part.double() for part in targets.split(self.chunk, dim=1))


def image_weights(x: Tensor, z: Tensor, alpha: float) -> Tensor:
    """Return how much the target of each image of ``x`` counts in the prediction for each row of ``z``.

    ``image_weights(x, z, alpha) @ y`` is what ``Ridge([alpha]).fit(x, y).predict(z)`` gives, for targets too many to
    hold: they can be read image after image. The weights of a prediction sum to one.

    Args:
        x: (n, voxels) inputs of the fit.
        z: (m, voxels) inputs to predict for.
        alpha: the penalty.

    Returns:
        (m, n), float64.
    """
    mean = x.double().mean(0)
    centred = x.double() - mean
    kernel = centred @ centred.T
    kernel.diagonal().add_(alpha)
    weights = torch.linalg.solve(kernel, centred @ (z.double() - mean).T).T
    return weights + (1 - weights.sum(1, keepdim=True)) / len(x)


def fold_indices(n: int, folds: int, seed: int = 0) -> list[Tensor]:
    """Part 0..n-1 at random into ``folds`` sets whose sizes differ by one at most."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return [order[k::folds] for k in range(folds)]


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
