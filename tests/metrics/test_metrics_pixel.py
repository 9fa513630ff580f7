"""Pixel metrics against scikit-image and numpy in float64."""

import numpy as np
import pytest
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity

from metrics.pixel import pixcorr, ssim

STANDARD = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}


def pairs(n: int = 4, size: tuple[int, int] = (48, 48), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.random((n, *size, 3)).cumsum(axis=1)
    truth /= truth.max()
    return truth, np.clip(truth + rng.normal(0, 0.1, truth.shape), 0, 1)


@pytest.mark.parametrize("size", [(11, 11), (64, 64), (40, 57)])
def test_ssim_equals_scikit_image(size: tuple[int, int]) -> None:
    truth, recon = pairs(size=size)
    grey = [structural_similarity(rgb2gray(t), rgb2gray(r), **STANDARD) for t, r in zip(truth, recon, strict=True)]
    colour = [structural_similarity(t, r, channel_axis=-1, **STANDARD) for t, r in zip(truth, recon, strict=True)]
    np.testing.assert_allclose(ssim(truth, recon), grey, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ssim(truth, recon, colour=True), colour, rtol=0, atol=1e-12)


def test_ssim_of_flat_and_equal_images() -> None:
    truth, _ = pairs()
    flat = np.full_like(truth, 0.5)
    np.testing.assert_allclose(ssim(truth, truth), 1.0, atol=1e-12)
    np.testing.assert_allclose(ssim(flat, flat, colour=True), 1.0, atol=1e-12)
    grey = [structural_similarity(rgb2gray(t), rgb2gray(r), **STANDARD) for t, r in zip(truth, flat, strict=True)]
    np.testing.assert_allclose(ssim(truth, flat), grey, atol=1e-12)


def test_ssim_refuses_images_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match="at least 11 x 11 pixels, not 64 x 10"):
        ssim(np.zeros((1, 10, 64, 3)), np.zeros((1, 10, 64, 3)))


def test_pixcorr_equals_corrcoef_over_all_channels() -> None:
    truth, recon = pairs()
    expected = [np.corrcoef(t.ravel(), r.ravel())[0, 1] for t, r in zip(truth, recon, strict=True)]
    np.testing.assert_allclose(pixcorr(truth, recon), expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(pixcorr(truth, 0.3 * truth + 0.1), 1.0, atol=1e-12)
    np.testing.assert_allclose(pixcorr(truth, 1 - truth), -1.0, atol=1e-12)


def test_pixcorr_of_a_constant_image_is_nan_but_of_a_coloured_plane_is_not() -> None:
    truth, recon = pairs()
    recon[1] = 0.1 + 0.2  # not exactly representable: rounding must not make it correlate
    recon[2] = (0.9, 0.2, 0.1)
    found = pixcorr(truth, recon)
    assert np.isnan(found[1]) and np.isfinite(found[[0, 2, 3]]).all()


def test_pairs_must_have_one_shape() -> None:
    with pytest.raises(ValueError, match=r"truths \(2, 8, 8, 3\) and reconstructions \(2, 8, 9, 3\)"):
        pixcorr(np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 9, 3)))
