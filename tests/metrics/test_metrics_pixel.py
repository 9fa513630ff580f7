"""Pixel metrics against scikit-image and numpy in float64."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity

from metrics.evaluate import evaluate
from metrics.images import resized
from metrics.pixel import PIXEL_KEYS, pixcorr, pixel_scores, ssim
from metrics.protocols import Resize, Ssim, get_protocol

STANDARD = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
COLUMNS = Ssim(resize=None, flavour="columns")


def pairs(n: int = 4, size: tuple[int, int] = (48, 48), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.random((n, *size, 3)).cumsum(axis=1)
    truth /= truth.max()
    return truth, np.clip(truth + rng.normal(0, 0.1, truth.shape), 0, 1)


# Sizes around the strips of 32 rows and the blocks of 16 columns that the filter is cut into.
@pytest.mark.parametrize("size", [(11, 11), (26, 27), (42, 43), (43, 42), (64, 64), (40, 57), (107, 75), (11, 140)])
def test_ssim_equals_scikit_image(size: tuple[int, int]) -> None:
    truth, recon = pairs(size=size)
    grey = [structural_similarity(rgb2gray(t), rgb2gray(r), **STANDARD) for t, r in zip(truth, recon, strict=True)]
    colour = [structural_similarity(t, r, channel_axis=-1, **STANDARD) for t, r in zip(truth, recon, strict=True)]
    np.testing.assert_allclose(ssim(truth, recon), grey, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ssim(truth, recon, colour=True), colour, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(11, 11), (11, 3), (42, 43), (43, 42), (107, 75)])
def test_flavour_columns_makes_every_column_of_the_grey_image_a_channel(size: tuple[int, int]) -> None:
    truth, recon = pairs(size=size)
    grey = [(rgb2gray(t), rgb2gray(r)) for t, r in zip(truth, recon, strict=True)]
    expected = [structural_similarity(t, r, channel_axis=-1, **STANDARD) for t, r in grey]
    found = ssim(truth, recon, spec=COLUMNS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    one_by_one = [[structural_similarity(t[:, k], r[:, k], **STANDARD) for k in range(t.shape[1])] for t, r in grey]
    np.testing.assert_allclose(found, np.mean(one_by_one, axis=1), rtol=0, atol=1e-12)
    if min(size) >= 11:
        assert np.abs(found - ssim(truth, recon)).min() > 1e-3
        # scikit-image up to 0.19.3 took the three channels of a colour image for what they are.
        np.testing.assert_array_equal(
            ssim(truth, recon, colour=True, spec=COLUMNS), ssim(truth, recon, colour=True, spec=Ssim(resize=None))
        )


@st.composite
def images(draw: st.DrawFn, size: tuple[int, int]) -> np.ndarray:
    """What strains a variance formed as a difference of two large sums: flat, nearly flat, steep, saturated images."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    level = draw(st.floats(0, 1))
    rows, columns = np.mgrid[: size[0], : size[1]][..., None] / max(size)
    kind = draw(
        st.sampled_from(["flat", "coloured", "near", "ramp", "noise", "stripes", "saturated", "halves", "uint8"])
    )
    image = {
        "flat": lambda: np.full((*size, 3), level),
        "coloured": lambda: np.broadcast_to(rng.random(3), (*size, 3)),
        "near": lambda: level + rng.normal(0, 10.0 ** draw(st.integers(-12, -2)), (*size, 3)),
        "ramp": lambda: level + rows * rng.normal(0, 0.5, 3) + columns * rng.normal(0, 0.5, 3),
        "noise": lambda: rng.random((*size, 3)),
        "stripes": lambda: (
            level + 1e-4 * np.broadcast_to((np.arange(size[1]) % draw(st.integers(2, 9)))[:, None], (*size, 3))
        ),
        "saturated": lambda: rng.normal(0.5, 3, (*size, 3)),
        "halves": lambda: np.where(rows < 0.3, level, rng.integers(0, 2) + 0.001 * rng.normal(size=(*size, 3))),
        "uint8": lambda: rng.integers(0, 256, (*size, 3)) / 255,
    }[kind]()
    return np.clip(image, 0, 1)


@st.composite
def strained_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    size = draw(st.tuples(st.integers(11, 60), st.integers(11, 60)))
    truth = draw(images(size))
    recon = draw(st.one_of(st.just(truth), images(size), st.just(1 - truth), st.just(truth * 0.999 + 0.0005)))
    return truth, recon


@settings(max_examples=150, deadline=None, derandomize=True)
@given(strained_pairs())
def test_ssim_equals_scikit_image_on_images_that_strain_it(pair: tuple[np.ndarray, np.ndarray]) -> None:
    truth, recon = pair
    found = pixel_scores(truth, recon, ("SSIM", "SSIM-color"))
    columns = pixel_scores(truth, recon, ("SSIM",), COLUMNS)["SSIM"]
    grey = rgb2gray(truth), rgb2gray(recon)
    assert found["SSIM"] == pytest.approx(structural_similarity(*grey, **STANDARD), rel=0, abs=1e-10)
    assert columns == pytest.approx(structural_similarity(*grey, channel_axis=-1, **STANDARD), rel=0, abs=1e-10)
    colour = structural_similarity(truth, recon, channel_axis=-1, **STANDARD)
    assert found["SSIM-color"] == pytest.approx(colour, rel=0, abs=1e-10)
    assert max(*found.values(), columns) <= 1 + 1e-12
    if np.array_equal(truth, recon):
        assert [*found.values(), columns] == pytest.approx([1.0] * 3, rel=0, abs=1e-12)


def test_ssim_of_flat_and_equal_images() -> None:
    truth, _ = pairs()
    flat = np.full_like(truth, 0.5)
    np.testing.assert_allclose(ssim(truth, truth), 1.0, atol=1e-12)
    np.testing.assert_allclose(ssim(flat, flat, colour=True), 1.0, atol=1e-12)
    grey = [structural_similarity(rgb2gray(t), rgb2gray(r), **STANDARD) for t, r in zip(truth, flat, strict=True)]
    np.testing.assert_allclose(ssim(truth, flat), grey, atol=1e-12)


def test_ssim_follows_its_window_and_range() -> None:
    truth, recon = pairs(n=1, size=(40, 50))
    spec = Ssim(resize=None, sigma=2.5, truncate=3.0, data_range=255.0)
    # scikit-image fixes truncate at 3.5, so this is held against the definition, one pixel at a time.
    radius, c1, c2 = 8, (0.01 * 255) ** 2, (0.03 * 255) ** 2
    line = np.exp(-0.5 * (np.arange(-radius, radius + 1) / 2.5) ** 2)
    window = np.outer(line, line) / line.sum() ** 2
    x, y = (rgb2gray(image) * 255 for image in (truth[0], recon[0]))
    values = []
    for row in range(radius, 40 - radius):
        for column in range(radius, 50 - radius):
            a, b = (p[row - radius : row + radius + 1, column - radius : column + radius + 1] for p in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            cov = (window * (a - mean_a) * (b - mean_b)).sum()
            variances = (window * (a - mean_a) ** 2).sum() + (window * (b - mean_b) ** 2).sum()
            values.append(
                (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
            )
    np.testing.assert_allclose(ssim(truth * 255, recon * 255, spec=spec), np.mean(values), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("size", "spec"), [((10, 64), None), ((64, 10), None), ((10, 64), COLUMNS)])
def test_ssim_refuses_images_smaller_than_its_window(size: tuple[int, int], spec: Ssim | None) -> None:
    with pytest.raises(ValueError, match=f"at least 11 x 11 pixels, not {size[1]} x {size[0]}"):
        ssim(np.zeros((1, *size, 3)), np.zeros((1, *size, 3)), spec=spec)


def test_one_pair_has_the_same_scores_alone_in_any_layout_and_in_any_thread() -> None:
    truth, recon = pairs(size=(45, 61))
    expected = {
        "PixCorr": pixcorr(truth, recon),
        "SSIM": ssim(truth, recon),
        "SSIM-color": ssim(truth, recon, colour=True),
    }
    planes = [np.ascontiguousarray(np.moveaxis(images, -1, 1)) for images in (truth, recon)]
    by_plane = [np.moveaxis(images, 1, -1) for images in planes]
    before = [images.copy() for images in by_plane]
    with ThreadPoolExecutor(3) as pool:
        threaded = list(pool.map(lambda k: pixel_scores(by_plane[0][k], by_plane[1][k]), [*range(4)] * 5))
    for k in range(4):
        alone = pixel_scores(truth[k], recon[k])
        assert alone == threaded[k] == threaded[k + 16] == {key: values[k] for key, values in expected.items()}
        assert list(alone) == list(PIXEL_KEYS)
    for images, copy in zip(by_plane, before, strict=True):
        np.testing.assert_array_equal(images, copy)
    assert list(pixel_scores(truth[0], recon[0], ("SSIM",))) == ["SSIM"]


def test_float32_images_keep_their_values() -> None:
    truth, recon = (images.astype(np.float32) for images in pairs())
    for metric in (pixcorr, ssim):
        np.testing.assert_array_equal(metric(truth, recon), metric(truth.astype(np.float64), recon.astype(np.float64)))


def test_pixel_scores_refuses_other_metrics_and_unequal_images() -> None:
    with pytest.raises(ValueError, match="'LPIPS' is no pixel metric; there are PixCorr, SSIM, SSIM-color"):
        pixel_scores(np.zeros((16, 16, 3)), np.zeros((16, 16, 3)), ("SSIM", "LPIPS"))
    with pytest.raises(ValueError, match=r"\(16, 16, 3\) and reconstructions \(16, 17, 3\) must both be \(H, W, 3\)"):
        pixel_scores(np.zeros((16, 16, 3)), np.zeros((16, 17, 3)))


def test_pixcorr_equals_corrcoef_over_all_channels() -> None:
    truth, recon = pairs(size=(90, 130))  # more than one chunk
    expected = [np.corrcoef(t.ravel(), r.ravel())[0, 1] for t, r in zip(truth, recon, strict=True)]
    np.testing.assert_allclose(pixcorr(truth, recon), expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(pixcorr(truth, 0.3 * truth + 0.1), 1.0, atol=1e-12)
    np.testing.assert_allclose(pixcorr(truth, 1 - truth), -1.0, atol=1e-12)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(strained_pairs())
def test_pixcorr_equals_corrcoef_on_images_that_strain_it(pair: tuple[np.ndarray, np.ndarray]) -> None:
    (truth, recon), found = pair, pixel_scores(*pair, ("PixCorr",))["PixCorr"]
    if np.isnan(found):
        assert min(np.ptp(truth), np.ptp(recon)) < 1e-10
    else:
        # np.corrcoef rounds its mean, which shows where an image hardly varies around a large one.
        spread = min(truth.std(), recon.std())
        assert found == pytest.approx(
            np.corrcoef(truth.ravel(), recon.ravel())[0, 1], rel=0, abs=1e-12 + 1e-14 / spread
        )


def test_pixcorr_of_a_constant_image_is_nan_but_of_a_coloured_plane_is_not() -> None:
    truth, recon = pairs()
    recon[1] = 0.1 + 0.2  # not exactly representable: rounding must not make it correlate
    recon[2] = (0.9, 0.2, 0.1)
    found = pixcorr(truth, recon)
    assert np.isnan(found[1]) and np.isfinite(found[[0, 2, 3]]).all()


def test_pairs_must_have_one_shape() -> None:
    with pytest.raises(ValueError, match=r"truths \(2, 8, 8, 3\) and reconstructions \(2, 8, 9, 3\)"):
        pixcorr(np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 9, 3)))


@pytest.mark.parametrize("size", [1, 2, 7, 41, 158, 224, 256, 424, 426, 512])
def test_images_in_float64_are_resized_without_antialiasing_where_none_is_asked_for(size: int) -> None:
    images = torch.rand(1, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    plain = torch.nn.functional.interpolate(images, (425, 425), mode="bilinear", align_corners=False, antialias=False)
    found = resized(images, Resize(425, "bilinear", antialias=False))
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)


def test_scoring_pixels_leaves_torch_the_threads_that_it_had() -> None:
    truth, recon = pairs(n=3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        evaluate(recon, truth, get_protocol("demo"), {}, range(3), keys=PIXEL_KEYS, threads=2)
        with ThreadPoolExecutor(1) as pool:
            assert torch.get_num_threads() == pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
