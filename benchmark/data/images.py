"""Image preparation: reading, cropping and resizing, the same for every image of the benchmark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from skimage.transform import resize

from benchmark.errors import UserError

STORED = 256
"""Side to which larger images are reduced first; smaller sizes are made from that, as in the official code."""


def centre_crop(image: np.ndarray) -> np.ndarray:
    """Cut the central square, as wide as the short side, from an ``h x w x 3`` image."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    if image.shape[0] == size:
        return image
    out = resize(image, (size, size), order=1, preserve_range=True, anti_aliasing=True)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def prepare_images(images: np.ndarray, size: int) -> np.ndarray:
    """Resize square images with skimage: bilinear, after a Gaussian of (factor - 1) / 2 pixels where it reduces.

    Images larger than 256 pixels are reduced to 256 first and stored as uint8, then resized from there (425 -> 256 ->
    224 or 112, as the official code does; its rounding is not published, here it is to the nearest integer, at each
    step).

    Args:
        images: ``n x h x h x 3`` uint8.
        size: side of the result in pixels.

    Returns:
        ``n x size x size x 3`` uint8; the same array where nothing has to change.
    """
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images: {images.dtype} {images.shape}; expected uint8 (n, h, h, 3)")
    if images.shape[1] == size:
        return images
    out = np.empty((len(images), size, size, 3), np.uint8)
    for k, image in enumerate(images):
        stored = _resize(image, STORED) if image.shape[0] > STORED > size else image
        out[k] = _resize(stored, size)
    return out


def read_photograph(path: Path, size: int) -> np.ndarray:
    """Read somebody's photograph: upright, RGB, centre-cropped, reduced with Pillow's anti-aliased Lanczos filter.

    Returns:
        ``size x size x 3`` uint8.

    Raises:
        UserError: the file is not an image that Pillow can read.
    """
    try:
        with Image.open(path) as file:
            file.draft("RGB", (2 * size, 2 * size))  # a large JPEG is decoded at a fraction of its size
            image = ImageOps.exif_transpose(file).convert("RGB")
            return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); remove it from the folder") from error
