"""Pixel metrics of image pairs of one size: correlation and structural similarity, in float64.

Both are the published arithmetic (``np.corrcoef``, scikit-image's ``structural_similarity``) in another order of
operations. SSIM spends its time in a Gaussian filter of every plane; here the filter is a product with a banded matrix,
cut into blocks small enough that most of what is multiplied is not zero, over strips of rows that stay in the
processor's cache. That is some ten times faster than filtering line by line, and numpy lets go of the interpreter
meanwhile, so pairs scale over threads.
"""

from __future__ import annotations

import threading
from collections.abc import Collection

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import ArrayLike, NDArray

from metrics.cards import PIXEL_KEYS
from metrics.identification import Floats
from metrics.protocols import Ssim

_K1, _K2 = 0.01, 0.03  # Wang et al. 2004
# Outputs of one banded product, along columns and along rows: the fewer, the less of the matrix is zero, and the less
# the product is worth its call. Products this small also stay on the thread that asks for them.
_BLOCK_DOWN, _BLOCK_ACROSS = 8, 16
_STRIP = 32  # rows of output at a time: a plane's four maps of 425 columns are then half a megabyte
_CHUNK = 16384  # pixels at a time of a correlation
_NO_VARIANCE = 1e-12  # deviation over magnitude below which an image is constant up to float64 rounding


def pixel_scores(
    truth: ArrayLike, recon: ArrayLike, keys: Collection[str] = PIXEL_KEYS, spec: Ssim | None = None
) -> dict[str, float]:
    """Return the pixel metrics of one pair.

    Planes in memory one after the other (a channels-last view of a (3, H, W) array) are read without a copy.

    Args:
        truth, recon: (H, W, 3) in [0, 1], of one size.
        keys: which of ``PIXEL_KEYS``.
        spec: of SSIM; the standard one by default. Its ``resize`` is not applied here.

    Returns:
        key -> value, as :func:`pixcorr` and :func:`ssim` give it.

    Raises:
        ValueError: no such metric, images that do not pair up, or smaller than SSIM's window.
    """
    unknown = [key for key in keys if key not in PIXEL_KEYS]
    if unknown:
        raise ValueError(f"'{unknown[0]}' is no pixel metric; there are {', '.join(PIXEL_KEYS)}")
    x, y = np.asarray(truth), np.asarray(recon)
    _check_pair(x, y, ndim=3)
    x, y = (np.ascontiguousarray(np.moveaxis(image, -1, 0), dtype=np.float64) for image in (x, y))
    spec = spec or Ssim(resize=None)
    values: dict[str, float] = {}
    if "PixCorr" in keys:
        values["PixCorr"] = _correlation(x.reshape(-1), y.reshape(-1))
    if "SSIM" in keys:
        values["SSIM"] = _similarity(
            _grey(x, spec)[None], _grey(y, spec)[None], spec, columns=spec.flavour == "columns"
        )
    if "SSIM-color" in keys:
        values["SSIM-color"] = _similarity(x, y, spec, columns=False)
    return values


def pixcorr(truth: ArrayLike, recon: ArrayLike) -> Floats:
    """Return the Pearson correlation of all RGB values of each pair, channels taken together.

    Args:
        truth, recon: (N, H, W, 3), any scale.

    Returns:
        (N,) in [-1, 1]; NaN where one of the two is constant over all pixels and channels, as ``np.corrcoef`` gives.
    """
    return _each(truth, recon, "PixCorr", None)


def ssim(truth: ArrayLike, recon: ArrayLike, *, colour: bool = False, spec: Ssim | None = None) -> Floats:
    """Return the structural similarity of each pair: of the grey images, or the mean over the three channels.

    Equals scikit-image's ``structural_similarity(..., gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=1.0)`` of the grey images, with ``channel_axis=-1`` of the RGB images where ``colour``. Flavour "columns"
    of ``spec`` puts ``channel_axis=-1`` on the grey image: the mean over its columns of their one-dimensional
    similarity. Colour images are the same under both flavours.

    Args:
        truth, recon: (N, H, W, 3) in [0, 1].
        colour: take each channel by itself instead of the grey image.
        spec: window, range, flavour and grey weights; the standard ones by default. Its ``resize`` is not applied here.

    Returns:
        (N,) in [-1, 1].

    Raises:
        ValueError: the images are smaller than the window (11 pixels).
    """
    return _each(truth, recon, "SSIM-color" if colour else "SSIM", spec)


def _each(truth: ArrayLike, recon: ArrayLike, key: str, spec: Ssim | None) -> Floats:
    x, y = np.asarray(truth), np.asarray(recon)
    _check_pair(x, y, ndim=4)
    return np.array([pixel_scores(a, b, (key,), spec)[key] for a, b in zip(x, y, strict=True)], dtype=np.float64)


def _check_pair(x: NDArray[np.generic], y: NDArray[np.generic], ndim: int) -> None:
    if x.shape != y.shape or x.ndim != ndim or x.shape[-1] != 3:
        wanted = "(N, H, W, 3)" if ndim == 4 else "(H, W, 3)"
        raise ValueError(f"truths {x.shape} and reconstructions {y.shape} must both be {wanted}, of one shape")


def _correlation(x: Floats, y: Floats) -> float:
    """Pearson of two vectors, centred before they are multiplied, a cacheful at a time; NaN where one is constant."""
    mean_x, mean_y = float(x.mean()), float(y.mean())
    xx = yy = xy = 0.0
    for start in range(0, x.size, _CHUNK):
        a, b = x[start : start + _CHUNK] - mean_x, y[start : start + _CHUNK] - mean_y
        # Not BLAS: its sum depends on the number of threads.
        xx += float(np.einsum("i,i->", a, a))
        yy += float(np.einsum("i,i->", b, b))
        xy += float(np.einsum("i,i->", a, b))
    for square, mean in ((xx, mean_x), (yy, mean_y)):
        norm = np.sqrt(square)
        if norm <= _NO_VARIANCE * np.hypot(norm, mean * np.sqrt(x.size)):
            return float("nan")
    return float(np.clip(xy / (np.sqrt(xx) * np.sqrt(yy)), -1.0, 1.0))


def _grey(planes: Floats, spec: Ssim) -> Floats:
    """(3, H, W) to (H, W)."""
    grey: Floats = np.einsum("c,chw->hw", spec.grey, planes)
    return grey


def _similarity(x: Floats, y: Floats, spec: Ssim, *, columns: bool) -> float:
    """Mean SSIM of P pairs of planes, (P, H, W), over the pixels whose whole window lies in the image."""
    radius = int(spec.truncate * spec.sigma + 0.5)
    _, height, width = x.shape
    if min(height, height if columns else width) < 2 * radius + 1:
        raise ValueError(
            f"SSIM needs images of at least {2 * radius + 1} x {2 * radius + 1} pixels, not {width} x {height}"
        )
    gaussian = _strip_filter(height, width, spec.sigma, radius, not columns)
    # With u = x + y and v = x - y, 4 E[xy] = E[uu] - E[vv] and 2 E[xx + yy] = E[uu] + E[vv]: four filtered maps are
    # enough, equal images give exactly 1, and the factors leave the constants doubled.
    c1, c2 = 2.0 * (_K1 * spec.data_range) ** 2, 2.0 * (_K2 * spec.data_range) ** 2
    numerator, denominator = np.empty((2, gaussian.filtered.shape[1]))
    total = 0.0
    for plane_x, plane_y in zip(x, y, strict=True):
        for rows in gaussian.strips():
            maps = gaussian.maps(rows)
            strip_x, strip_y = plane_x[rows].reshape(-1), plane_y[rows].reshape(-1)
            np.add(strip_x, strip_y, out=maps[0])
            np.subtract(strip_x, strip_y, out=maps[1])
            np.multiply(maps[:2], maps[:2], out=maps[2:])
            gaussian.apply()
            means, variances = gaussian.filtered[:2], gaussian.filtered[2:]
            means *= means
            variances -= means
            (mean_u, mean_v), (variance_u, variance_v) = means, variances
            mean_u += c1
            variance_u += c2
            np.subtract(mean_u, mean_v, out=numerator)
            np.subtract(variance_u, variance_v, out=denominator)
            numerator *= denominator
            np.add(mean_u, mean_v, out=denominator)
            variance_u += variance_v
            denominator *= variance_u
            numerator /= denominator
            total += gaussian.total(numerator, rows)
    inner_width = width if columns else width - 2 * radius
    return total / (len(x) * (height - 2 * radius) * inner_width)


_kept = threading.local()


def _strip_filter(height: int, width: int, sigma: float, radius: int, both_axes: bool) -> _StripFilter:
    """Return this thread's filter for these sizes, kept: to map fresh buffers for every pair would take longer."""
    key = (height, width, sigma, radius, both_axes)
    if getattr(_kept, "key", None) != key:
        window = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
        _kept.filter = _StripFilter(height, width, window / window.sum(), both_axes=both_axes)
        _kept.key = key
    found: _StripFilter = _kept.filter
    return found


class _StripFilter:
    """Filters four maps of a plane with a symmetric window, a strip of rows at a time, in buffers that are used again.

    The maps lie row by row without gaps, so that arithmetic runs over one long line. A product takes a block of outputs
    from ``2 radius`` more inputs; blocks overlap by strides, without copies. The last block of a row reaches into the
    next row, and the last strip into rows of an earlier one: what comes of that is finite, and never counted.

    Args:
        height, width: of the plane.
        window: (2 radius + 1,) weights.
        both_axes: filter along the rows as well as along the columns.
    """

    def __init__(self, height: int, width: int, window: Floats, *, both_axes: bool) -> None:
        self._radius = radius = len(window) // 2
        self._height, self._width = height - 2 * radius, width
        strips = -(-self._height // _STRIP)
        self._rows = rows = _rounded_up(-(-self._height // strips), _BLOCK_DOWN)
        self._columns = width - 2 * radius if both_axes else width
        self._both_axes = both_axes
        above, beside = rows + 2 * radius, _rounded_up(self._columns, _BLOCK_ACROSS) if both_axes else width
        # A block more at the end, for the last row's last one.
        maps, down = np.zeros(4 * above * width), np.zeros(4 * rows * width + _BLOCK_ACROSS)
        across = np.zeros(4 * rows * beside) if both_axes else down
        self._maps = maps.reshape(4, above * width)
        self.filtered: Floats = across[: 4 * rows * beside].reshape(4, rows * beside)
        """(4, rows x stride) after :meth:`apply`; :meth:`total` knows what of it counts."""
        self._beside = beside

        item = maps.itemsize
        by_row, step, blocks = width * item, _BLOCK_DOWN * width * item, rows // _BLOCK_DOWN
        self._band_down = _band(window, _BLOCK_DOWN)
        self._down = (
            as_strided(maps, (4, blocks, _BLOCK_DOWN + 2 * radius, width), (above * by_row, step, by_row, item)),
            as_strided(down, (4, blocks, _BLOCK_DOWN, width), (rows * by_row, step, by_row, item)),
        )
        if both_axes:
            step, blocks = _BLOCK_ACROSS * item, beside // _BLOCK_ACROSS
            self._band_across = np.ascontiguousarray(_band(window, _BLOCK_ACROSS).T)
            self._across = (
                as_strided(down, (blocks, 4 * rows, _BLOCK_ACROSS + 2 * radius), (step, by_row, item)),
                as_strided(across, (blocks, 4 * rows, _BLOCK_ACROSS), (step, beside * item, item)),
            )

    def strips(self) -> list[slice]:
        """Return the rows of the plane that each strip reads."""
        starts = range(0, self._height, self._rows)
        return [slice(k, min(k + self._rows, self._height) + 2 * self._radius) for k in starts]

    def maps(self, rows: slice) -> Floats:
        """Return where to put a strip's four maps, (4, rows x width)."""
        return self._maps[:, : (rows.stop - rows.start) * self._width]

    def apply(self) -> None:
        """Filter the maps into ``filtered``."""
        source, target = self._down
        np.matmul(self._band_down, source, out=target)
        if self._both_axes:
            source, target = self._across
            np.matmul(source, self._band_across, out=target)

    def total(self, values: Floats, rows: slice) -> float:
        """Return the sum of a strip's values over the pixels whose window lies in the plane."""
        table = values.reshape(self._rows, self._beside)[: rows.stop - rows.start - 2 * self._radius]
        table[:, self._columns :] = 0.0  # one long sum takes less time than many short ones
        return float(table.reshape(-1).sum())


def _band(window: Floats, outputs: int) -> Floats:
    """The filter as a matrix, (outputs, outputs + 2 radius)."""
    band = np.zeros((outputs, outputs + len(window) - 1))
    for k in range(outputs):
        band[k, k : k + len(window)] = window
    return band


def _rounded_up(count: int, block: int) -> int:
    return -(-count // block) * block
