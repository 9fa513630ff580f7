"""A set of images that is read in slices, and the pairing of two of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmark.errors import UserError, did_you_mean
from benchmark.imagesets.wording import SHOWN, counted, listed, one_line, place

Pixels = NDArray[Any]

MAX_SIDE = 4096
"""Pixels a side; beyond it an image is refused before it is decoded."""
MAX_IMAGES = 200_000
"""Images a set; NSD has 73,000."""
ROUNDING = 1e-3
"""How far a float may leave [0, 1] (float16 rounds by half of that there); such values are clipped."""
_CHECK_BATCH = 16
_NEAR = 2000  # names among which a near one is looked for


class Source(Protocol):
    """Where the images of a set lie."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, H, W, 3."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what ``read`` returns: uint8, float32 or float64."""

    def name(self, row: int) -> str:
        """What messages call an image: its file, or its row in an array."""

    def stem(self, row: int) -> str:
        """The stem of its file's name; nothing where images are rows of an array."""

    def read(self, rows: NDArray[np.int64]) -> Pixels:
        """Return the images of ``rows``: ``n x H x W x 3``. Raises UserError where one cannot be decoded."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Square RGB images on disk, behind the part of an array's interface that scoring needs.

    ``images[3]`` is one image, ``images[3:7]`` and ``images[[5, 3]]`` are several: uint8, or float32 or float64 in
    [0, 1], ``... x H x W x 3``. Nothing is read before it is asked for, and nothing is kept; several threads may read
    at once. Reading an image that is damaged, holds NaN or leaves [0, 1] raises ``UserError``, which names it.

    Attributes:
        path: the file or folder as it was typed, with ``::key`` where there is one.
        what: what messages call the images, in the plural: "reconstructions".
        source: where they lie.
        rows: the rows of ``source`` that belong to the set, in its order.
        ids: one id an image: the NSD id where the name tells it, else the name; the row where there are no names.
            An id occurs once, or once a subject.
        subjects: one number an image, from 1, where names tell them.
        has_ids: False where ``ids`` are nothing but row numbers.
        notes: sentences a reader should see, such as files that were left out.
    """

    path: str
    what: str
    source: Source
    rows: NDArray[np.int64]
    ids: tuple[int | str, ...]
    subjects: tuple[int, ...] | None = None
    has_ids: bool = True
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, H, W, 3."""
        return (len(self), *self.source.shape[1:])

    @property
    def ndim(self) -> int:
        """Four."""
        return 4

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8, float32 (also where float16 or bfloat16 is stored) or float64."""
        return self.source.dtype

    def __getitem__(self, key: int | slice | Sequence[int] | NDArray[Any]) -> Pixels:
        if isinstance(key, int | np.integer):
            number = int(key) + len(self) * (key < 0)
            if not 0 <= number < len(self):
                raise IndexError(f"image {key} of {len(self)}")
            return self._read(self.rows[number : number + 1])[0]
        return self._read(self.rows[self._chosen(key)])

    def _chosen(self, key: slice | Sequence[int] | NDArray[Any]) -> slice | NDArray[Any]:
        if isinstance(key, slice):
            return key
        chosen = np.asarray(key)
        if chosen.size == 0:
            chosen = chosen.astype(np.int64)
        if chosen.ndim != 1 or chosen.dtype.kind not in "iub":
            raise IndexError("images are chosen by a number, a slice, a list of numbers or a mask")
        return chosen

    def _read(self, rows: NDArray[np.int64]) -> Pixels:
        images = self.source.read(np.ascontiguousarray(rows))
        if images.dtype.kind == "f":
            for row, image in zip(rows, images, strict=True):
                low, high = float(image.min()), float(image.max())
                if not (low >= 0.0 and high <= 1.0):  # also where one of them is NaN
                    complaint = _wrong_range(image, low, high)
                    if complaint:
                        raise UserError(f"{self.source.name(int(row))}: {complaint}")
                    np.clip(image, 0.0, 1.0, out=image)
        return images

    def name(self, k: int) -> str:
        """Return what messages call image ``k``: ``recons/nsd00034.png``, ``recons.npy, row 7``."""
        return self.source.name(int(self.rows[k]))

    def label(self, k: int) -> str:
        """Return a short name of image ``k``: the stem of its file, else its id."""
        return self.source.stem(int(self.rows[k])) or str(self.ids[k])

    def select(self, indices: slice | Sequence[int] | NDArray[Any]) -> ImageSet:
        """Return the images at ``indices`` (numbers, any order, repeats allowed; or a mask), still on disk."""
        chosen = np.arange(len(self))[self._chosen(indices)]
        return replace(
            self,
            rows=self.rows[chosen],
            ids=tuple(self.ids[k] for k in chosen),
            subjects=None if self.subjects is None else tuple(self.subjects[k] for k in chosen),
        )

    def check(self, progress: Callable[[int, int], object] | None = None) -> str:
        """Read every image once, which finds whatever is wrong with one, and return ``digest``.

        Args:
            progress: called as (done, total) after each batch.

        Raises:
            UserError: an image cannot be decoded, holds NaN, or leaves [0, 1].
        """
        known = self.__dict__.get("digest")
        if known is None:
            sha256 = hashlib.sha256(f"{self.dtype}{self.shape}".encode())
            for start in range(0, len(self), _CHECK_BATCH):
                batch = self[start : start + _CHECK_BATCH]
                sha256.update(np.ascontiguousarray(batch).data)
                if progress is not None:
                    progress(start + len(batch), len(self))
            known = self.__dict__["digest"] = sha256.hexdigest()
        return str(known)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of type, shape and pixels: that of the same array in memory. Computed once, from every image."""
        return self.check()


def _wrong_range(image: Pixels, low: float, high: float) -> str:
    """Say what is wrong with a float image, and how to mend it; nothing where it is rounding."""
    finite = np.isfinite(image)
    if not finite.all():
        bad = image.size - int(finite.sum())
        return f"{counted(bad, 'value')} NaN or infinite; expected floats in [0, 1]; replace the image"
    if low >= -ROUNDING and high <= 1.0 + ROUNDING:
        return ""
    if low >= -ROUNDING and 2.0 < high <= 256.0:
        remedy = "divide by 255"
    elif -1.0 - ROUNDING <= low < -0.5 and high <= 1.0 + ROUNDING:
        remedy = "map [-1, 1] to [0, 1]: (x + 1) / 2"
    else:
        remedy = "clip them where they overshoot: x.clip(0, 1)"
    return f"values from {low:.4g} to {high:.4g}; expected floats in [0, 1]\n{remedy}"


def paired(recons: ImageSet, truths: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Align two sets: row k of the second is the truth of row k of the first.

    By id where both sides have ids; reconstructions of several subjects share the truths (a truth then occurs once a
    subject). By row where neither side has ids. Every image of either side must have its partner, for each subject.

    Returns:
        ``recons`` as they are, and the truths in their order.

    Raises:
        UserError: the sides differ in number, an image has no partner, or one side only has ids.
    """
    if recons.has_ids != truths.has_ids:
        bare, named = (truths, recons) if recons.has_ids else (recons, truths)
        raise UserError(
            f"{place(bare.path)}: its rows have no ids, the {named.what} have ({one_line(named.ids[0], 40)}, ...): "
            "which belongs to which would be a guess\n"
            "list the ids of its rows, one a line, in a file beside it named NAME.ids.txt, or pass --ids FILE"
        )
    if not recons.has_ids:
        if len(recons) != len(truths):
            raise UserError(
                f"{len(recons)} {recons.what} ({place(recons.path)}) but {len(truths)} {truths.what} "
                f"({place(truths.path)}); expected one for each"
            )
        return recons, truths
    by_subject = truths.subjects is not None and (recons.subjects is not None or len(set(truths.subjects)) > 1)
    if by_subject and recons.subjects is None:
        raise UserError(
            f"{place(recons.path)}: does not tell the subjects, but the {truths.what} are those of several\n"
            f"name the files like subj01_nsd00034.png, or hand in the {truths.what} of one subject"
        )
    truth_keys = list(zip((truths.subjects if by_subject else None) or [None] * len(truths), truths.ids, strict=True))
    own_subjects = recons.subjects or [None] * len(recons)
    recon_keys = list(zip(own_subjects if by_subject else [None] * len(recons), recons.ids, strict=True))
    where = {key: k for k, key in enumerate(truth_keys)}
    without = [k for k, key in enumerate(recon_keys) if key not in where]
    if without:
        raise _unpaired(recons, truths, without)
    partners = np.array([where[key] for key in recon_keys], np.int64)
    for subject in dict.fromkeys(own_subjects):
        used = {int(partner) for partner, own in zip(partners, own_subjects, strict=True) if own == subject}
        left_over = [k for k in range(len(truths)) if k not in used and truth_keys[k][0] in (None, subject)]
        if left_over:
            raise _unpaired(truths, recons, left_over, subject)
    left_over = [k for k in range(len(truths)) if truth_keys[k][0] not in (None, *own_subjects)]
    if left_over:
        raise _unpaired(truths, recons, left_over)
    return recons, truths.select(partners)


def _unpaired(these: ImageSet, others: ImageSet, lonely: list[int], subject: int | None = None) -> UserError:
    """Return the error for images without a partner: how many, the first names, and the nearest among the others."""
    labels = [these.label(k) for k in lonely[:SHOWN]]
    near = did_you_mean(labels[0], [others.label(k) for k in range(min(len(others), _NEAR))])
    this, other = these.what.removesuffix("s"), others.what.removesuffix("s")
    by = "" if subject is None else f" of subject {subject}"
    return UserError(
        f"no {other}{by} for {counted(len(lonely), this)}: {listed(labels, len(lonely))}{near} "
        f"({counted(len(these), this)} in {place(these.path)}, {counted(len(others), other)} in {place(others.path)})\n"
        f"each needs its partner under the same id: add or rename the {others.what}, or leave these {these.what} out"
    )
