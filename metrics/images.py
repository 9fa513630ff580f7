"""Images as the metrics read them: a few at a time, checked on the way, resized exactly as a protocol says."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from typing import Protocol as TypingProtocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from metrics.protocols import Resize

_CHUNK = 16  # images read at once where nothing else decides it
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Images(TypingProtocol):
    """N square RGB images (N, H, W, 3), uint8 or float in [0, 1]: a numpy array, or whatever reads them when sliced.

    Two further attributes are used where they exist: ``name(k)`` names the k-th image in messages, and ``digest`` (str)
    stands for all pixels, so that they need not be read once more to know them again.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, 3)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8 or a float type."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Reordered:
    """The images of ``base`` in the order of these row numbers; one image may stand for several, or for all."""

    base: Images
    order: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, 3)."""
        return (len(self.order), *self.base.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of ``base``."""
        return self.base.dtype

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        return np.concatenate([self.base[int(k) : int(k) + 1] for k in self.order[rows]])


@dataclass
class Checked:
    """Images that are checked when they are read, and only then: what is wrong is told by the image's id and row.

    Attributes:
        images: where they come from.
        ids: their ids.
        what: "reconstruction", "truth", ...; for messages.
        constant: row numbers of the images read so far whose values are all the same.
    """

    images: Images
    ids: Sequence[int | str]
    what: str
    constant: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        what, shape = self.what, getattr(self.images, "shape", None)
        if shape is None or not hasattr(self.images, "dtype"):
            kind = type(self.images).__name__
            raise ValueError(f"{what}s must be a numpy array (N, H, W, 3), or be read like one, not {kind}")
        if len(shape) != 4 or shape[-1] != 3:
            hint = "; move the channels last" if len(shape) == 4 and shape[1] == 3 else ""
            raise ValueError(f"{what}s must be (N, H, W, 3), not {tuple(shape)}{hint}")
        if shape[0] != len(self.ids):
            raise ValueError(f"there are {shape[0]} {what}s for {len(self.ids)} image ids: every image needs one")
        if shape[1] != shape[2] or shape[1] == 0:
            raise ValueError(f"{what}s are {shape[2]} x {shape[1]} pixels: crop them square before scoring")
        if self.images.dtype != np.uint8 and not np.issubdtype(self.images.dtype, np.floating):
            raise ValueError(f"{what}s must be uint8, or float in [0, 1], not {self.images.dtype}")
        self._seen = np.zeros(len(self.ids), dtype=bool)

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.images.shape[1]

    def read(self, rows: slice) -> NDArray[Any]:
        """Return the images of these rows.

        Raises:
            ValueError: one of them has values outside of [0, 1], a NaN, or another shape or type than announced.
        """
        batch = np.asarray(self.images[rows])
        expected = (len(range(*rows.indices(len(self.ids)))), *self.images.shape[1:])
        if batch.shape != expected or batch.dtype != self.images.dtype:
            raise ValueError(
                f"{self.what}s {rows.start} to {rows.stop - 1} were read as {batch.dtype} {batch.shape},"
                f" not as {self.images.dtype} {expected}"
            )
        for k, image in enumerate(batch, start=rows.start):
            if not self._seen[k]:
                self._check(k, image)
                self._seen[k] = True
        return batch

    def _check(self, row: int, image: NDArray[Any]) -> None:
        low, high = image.min(), image.max()
        if low == high:
            self.constant.add(row)
        if image.dtype == np.uint8:
            return
        name = getattr(self.images, "name", None)
        which = f"{self.what} of image {self.ids[row]} ({name(row) if callable(name) else f'row {row}'})"
        if not np.isfinite(low + high):
            raise ValueError(f"{which} holds a NaN or an infinity")
        if low < 0.0 or high > 1.0:
            remedy = "divide by 255" if high > 2.0 else "map [-1, 1] to [0, 1]" if low < -0.5 else "clip them"
            raise ValueError(f"{which} has values in [{low:.4g}, {high:.4g}]; floats must be in [0, 1]: {remedy}")

    @cached_property
    def digest(self) -> str:
        """Stands for all pixels and their type; of reordered images, for those of the original in its own order."""
        images = self.images.base if isinstance(self.images, Reordered) else self.images
        known = getattr(images, "digest", None)
        if isinstance(known, str):
            return known
        sha = hashlib.sha256(f"{images.dtype}{tuple(images.shape)}".encode())
        for start in range(0, len(images), _CHUNK):
            sha.update(np.ascontiguousarray(images[start : start + _CHUNK]).data)
        return sha.hexdigest()


def as_tensor(images: NDArray[Any], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Return (B, H, W, 3), uint8 or in [0, 1], as (B, 3, H, W) in [0, 1]."""
    # Memory-mapped files are read-only arrays, at which torch warns though nothing is written.
    tensor = torch.from_numpy(np.require(images, requirements=["C", "W"])).to(device).movedim(-1, 1)
    return tensor.to(dtype).div_(255) if images.dtype == np.uint8 else tensor.to(dtype)


def acting(steps: Sequence[Resize | None], size: int) -> tuple[Resize, ...]:
    """Return those of ``steps`` that change an image of ``size`` x ``size`` pixels."""
    found = []
    for step in steps:
        if step is not None and step.size != size:
            found.append(step)
            size = step.size
    return tuple(found)


def resized(images: Tensor, resize: Resize | None) -> Tensor:
    """Resample (B, 3, H, W) to the square size that ``resize`` names; return them as they are where they have it.

    PIL gets 8-bit images, as it does from PNG files: values are rounded before and after.
    """
    if resize is None or images.shape[-2:] == (resize.size, resize.size):
        return images
    size = (resize.size, resize.size)
    if resize.engine == "tensor":
        # Enlarging bilinearly is the same with and without; in float64 to 1e-14 (float32 rounds positions differently),
        # and with it takes two fifths of the time.
        enlarges = (
            resize.filter == "bilinear" and images.dtype == torch.float64 and max(images.shape[-2:]) <= resize.size
        )
        antialias = resize.antialias or enlarges
        return functional.interpolate(images, size, mode=resize.filter, align_corners=False, antialias=antialias)
    bytes_ = (images * 255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    small = [np.asarray(Image.fromarray(image).resize(size, _FILTERS[resize.filter])) for image in bytes_]
    return as_tensor(np.stack(small), images.dtype, str(images.device))
