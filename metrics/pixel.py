"""Pixel metrics of image pairs of one size: correlation and structural similarity, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import correlate1d

from metrics.identification import Floats, pairwise_correlation
from metrics.protocols import Ssim

_K1, _K2 = 0.01, 0.03  # Wang et al. 2004


def pixcorr(truth: ArrayLike, recon: ArrayLike) -> Floats:
    """Return the Pearson correlation of all RGB values of each pair, channels taken together.

    Args:
        truth, recon: (N, H, W, 3), any scale.

    Returns:
        (N,) in [-1, 1]; NaN where one of the two is constant over all pixels and channels, as ``np.corrcoef`` gives.
    """
    x, y = _pairs(truth, recon)
    return pairwise_correlation(x.reshape(len(x), -1), y.reshape(len(y), -1))


def ssim(truth: ArrayLike, recon: ArrayLike, *, colour: bool = False, spec: Ssim | None = None) -> Floats:
    """Return the structural similarity of each pair: of the grey images, or the mean over the three channels.

    Equals scikit-image's ``structural_similarity(..., gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=1.0)`` of the grey images, with ``channel_axis=-1`` of the RGB images where ``colour``.

    Args:
        truth, recon: (N, H, W, 3) in [0, 1].
        colour: take each channel by itself instead of the grey image.
        spec: window, range and grey weights; the standard ones by default. Its ``resize`` is not applied here.

    Returns:
        (N,) in [-1, 1].

    Raises:
        ValueError: the images are smaller than the window (11 pixels).
    """
    spec = spec or Ssim(resize=None)
    x, y = _pairs(truth, recon)
    radius = int(spec.truncate * spec.sigma + 0.5)
    if min(x.shape[1:3]) < 2 * radius + 1:
        raise ValueError(
            f"SSIM needs images of at least {2 * radius + 1} x {2 * radius + 1} pixels, not {x.shape[2]} x {x.shape[1]}"
        )
    grey = np.array(spec.grey)
    score = np.empty(len(x))
    for k in range(len(x)):  # one image at a time stays in the processor's cache
        a, b = (x[k], y[k]) if colour else (x[k] @ grey, y[k] @ grey)
        planes = (np.moveaxis(a, -1, 0), np.moveaxis(b, -1, 0)) if colour else (a[None], b[None])
        score[k] = np.mean(
            [_ssim_plane(p, q, spec.sigma, radius, spec.data_range) for p, q in zip(*planes, strict=True)]
        )
    return score


def _ssim_plane(x: Floats, y: Floats, sigma: float, radius: int, data_range: float) -> float:
    """SSIM of two (H, W) planes. The two variances enter only as their sum, so four filtered maps do."""
    offsets = np.arange(-radius, radius + 1)
    window = np.exp(-0.5 * (offsets / sigma) ** 2)
    window /= window.sum()
    maps = np.stack([x, y, x * x + y * y, x * y])
    # The score is a mean over the interior, so what lies beyond the border never matters.
    maps = correlate1d(maps, window, axis=1)[:, radius:-radius]
    mean_x, mean_y, squares, product = correlate1d(maps, window, axis=2)[:, :, radius:-radius]

    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    means, mean_squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    covariance, variances = product - means, squares - mean_squares
    similarity = (2 * means + c1) * (2 * covariance + c2) / ((mean_squares + c1) * (variances + c2))
    return float(similarity.mean())


def _pairs(truth: ArrayLike, recon: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(truth, dtype=np.float64), np.asarray(recon, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 4 or x.shape[-1] != 3:
        raise ValueError(f"truths {x.shape} and reconstructions {y.shape} must both be (N, H, W, 3), of one shape")
    return x, y
