"""Entry ``score``: the pixel metrics and the two-way identifications of one test set, without the networks.

The reference is what the published evaluation notebooks do, written plainly: every image at 425 pixels at once as
float32 tensors, one scikit-image call a pair, and ``np.corrcoef`` of all truths and reconstructions, of which a quarter
is used (MedARC-AI/MindEyeV2 @ c184718, src/final_evaluations.ipynb; the sizes are those of Brain-IT's own evaluation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn import functional

from benchmark.perf.entries import Floor, Job, Part, Results
from metrics.evaluate import evaluate
from metrics.identification import correlation_matrix, wins
from metrics.pixel import PIXEL_KEYS
from metrics.protocols import get_protocol

_COMMON, _LARGE = 224, 425  # pixels: what both sides are brought to first, and what the pixel metrics look at
_FEATURES = {"Alex(2)": 192 * 31 * 31, "Alex(5)": 256 * 15 * 15, "Incep": 2048, "CLIP": 768}


@dataclass(frozen=True)
class _Images:
    truths: NDArray[np.uint8]  # (N, 425, 425, 3), as the dataset has them
    recons: NDArray[np.uint8]  # (N, 224, 224, 3), as Brain-IT's reconstructions are


def _count(job: Job) -> int:
    return 6 if job.quick else 1000


# --- inputs -----------------------------------------------------------------------------------------------------------


def _enlarged(field: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """A small (h, w, 3) field as a smooth one of (size, size, 3)."""
    planes = torch.from_numpy(field).permute(2, 0, 1)[None]
    return functional.interpolate(planes, (size, size), mode="bilinear", align_corners=True)[0].permute(1, 2, 0).numpy()


def _images(job: Job) -> _Images:
    """Coloured clouds with texture and clipped, flat areas; a reconstruction keeps the clouds, to some degree."""
    n = _count(job)
    truths = np.empty((n, _LARGE, _LARGE, 3), np.uint8)
    recons = np.empty((n, _COMMON, _COMMON, 3), np.uint8)
    # Texture is cut from one sheet: fresh noise for every image would take longer than the scores.
    rng = np.random.default_rng(1)
    sheet = _enlarged(20 * rng.standard_normal((150, 150, 3), dtype=np.float32), 2 * _LARGE)
    sheet += 6 * rng.standard_normal(sheet.shape, dtype=np.float32)

    def texture(size: int) -> NDArray[np.float32]:
        top, left = rng.integers(0, len(sheet) - size, 2)
        return sheet[top : top + size, left : left + size]

    for k in range(n):
        clouds = rng.standard_normal((2, 7, 7, 3), dtype=np.float32)
        kept = rng.uniform(0.2, 1)
        for images, field in ((truths, clouds[0]), (recons, kept * clouds[0] + 0.3 * clouds[1])):
            size = images.shape[1]
            image = _enlarged(100 * field, size)
            image += texture(size)
            image += 128
            images[k] = np.clip(image, 0, 255, out=image)
    return _Images(truths, recons)


def _features(job: Job, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rectified like a ReLU's; what a reconstruction shares with its truth differs from image to image."""
    n, length = _count(job), min(length, 500) if job.quick else length
    truth, recon = np.empty((2, n, length), np.float32)
    for k in range(n):
        rng = np.random.default_rng((2, k))
        truth[k] = rng.standard_normal(length, dtype=np.float32)
        recon[k] = rng.standard_normal(length, dtype=np.float32)
        # Around what is just told apart among a thousand, whatever the length.
        recon[k] += rng.uniform(0, 6) / np.sqrt(length) * truth[k]
        np.maximum(truth[k], 0, out=truth[k])
        np.maximum(recon[k], 0, out=recon[k])
    return truth, recon


# --- the published way ------------------------------------------------------------------------------------------------


def _resized(images: Tensor, size: int) -> Tensor:
    return functional.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=False)


def plain_pixels(images: _Images, job: Job) -> Results:
    """PixCorr, SSIM and colour SSIM of every pair, each metric resizing all images for itself."""
    truths, recons = (
        _resized(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().float() / 255, _COMMON)
        for x in (images.truths, images.recons)
    )
    flat = [_resized(x, _LARGE).flatten(1).numpy() for x in (truths, recons)]
    pixcorr = [np.corrcoef(t, r)[0, 1] for t, r in zip(*flat, strict=True)]
    del flat
    similarity = partial(
        structural_similarity, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0
    )
    grey = [rgb2gray(_resized(x, _LARGE).permute(0, 2, 3, 1).numpy()) for x in (truths, recons)]
    ssim = [similarity(t, r) for t, r in zip(*grey, strict=True)]
    del grey
    colour = [_resized(x, _LARGE).permute(0, 2, 3, 1).numpy() for x in (truths, recons)]
    ssim_colour = [similarity(t, r, channel_axis=-1) for t, r in zip(*colour, strict=True)]
    return {"PixCorr": np.array(pixcorr), "SSIM": np.array(ssim), "SSIM-color": np.array(ssim_colour)}


def plain_wins(features: tuple[NDArray[np.float32], NDArray[np.float32]], job: Job, key: str) -> Results:
    """How many truths each reconstruction beats with its own."""
    truth, recon = features
    n = len(truth)
    r = np.corrcoef(truth, recon)[:n, n:]
    return {key: (r < np.diag(r)).sum(axis=0)}


# --- ours -------------------------------------------------------------------------------------------------------------


def our_pixels(images: _Images, job: Job) -> Results:
    """The same by ``metrics.evaluate``."""
    n = len(images.truths)
    return dict(
        evaluate(
            images.recons, images.truths, get_protocol("brain-it"), {}, range(n), keys=PIXEL_KEYS, threads=job.threads
        ).per_image
    )


def our_wins(features: tuple[NDArray[np.float32], NDArray[np.float32]], job: Job, key: str) -> Results:
    """The same by ``metrics.identification``."""
    return {key: wins(correlation_matrix(*features))}


# --- the least that either can do -------------------------------------------------------------------------------------


def _pixel_floor(job: Job) -> Floor:
    """Filters of 11 taps over rows and columns of four maps of three channels and grey; the images read once."""
    taps = 2 * 11
    filters = 4 * 4 * taps * 2 * _LARGE**2
    return Floor(operations=_count(job) * filters, nbytes=_count(job) * 3 * (_LARGE**2 + _COMMON**2))


def _wins_floor(job: Job, length: int) -> Floor:
    """One truth-by-reconstruction product; the features read once."""
    n, length = _count(job), min(length, 500) if job.quick else length
    return Floor(operations=2.0 * n * n * length, nbytes=2.0 * n * length * 4)


def _identification(key: str, length: int) -> Part:
    return Part(
        name=f"two-way {key}, {length:,} features",
        prepare=partial(_features, length=length),
        ours=partial(our_wins, key=key),
        reference=partial(plain_wins, key=key),
        floor=partial(_wins_floor, length=length),
    )


PARTS: tuple[Part, ...] = (
    Part("PixCorr, SSIM, SSIM-color", _images, our_pixels, plain_pixels, _pixel_floor),
    *(_identification(key, length) for key, length in _FEATURES.items()),
)
TOLERANCES: Mapping[str, float] = {"PixCorr": 1e-6, "SSIM": 1e-6, "SSIM-color": 1e-6, **dict.fromkeys(_FEATURES, 0.0)}
