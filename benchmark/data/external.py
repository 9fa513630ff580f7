"""Images without fMRI: COCO's unlabeled2017, or the miniature's external scenes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from benchmark.data.images import centre_crop, prepare_images
from benchmark.errors import UserError


class External:
    """The RGB photographs of a folder in the order of their names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Names of all photographs, ascending, whatever their colours."""
        return tuple(path.name for path in sorted(self.folder.glob("*.jpg"))) if self.folder.is_dir() else ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """File names, ascending; grayscale files are left out, as in the official code."""
        return self.coloured(self.files)

    def coloured(self, files: Sequence[str]) -> tuple[str, ...]:
        """Return those of ``files`` that are RGB, by their headers.

        Raises:
            UserError: a file is no image, or none of them is RGB.
        """
        names = tuple(name for name in files if self.is_rgb(name))
        if not names:
            raise UserError(
                f"{self.folder}: expected RGB photographs (*.jpg), found none; "
                "unpack COCO's unlabeled2017 there, or turn external images off"
            )
        return names

    def is_rgb(self, name: str) -> bool:
        """Return whether a file is a colour image, by its header."""
        try:
            with Image.open(self.folder / name) as image:
                return image.mode == "RGB"
        except OSError as error:
            raise self._unreadable(name, error) from error

    def __len__(self) -> int:
        return len(self.names)

    def square(self, name: str) -> np.ndarray:
        """Read one image by its name, cropped to the central square: ``side x side x 3`` uint8."""
        try:
            with Image.open(self.folder / name) as image:
                return centre_crop(np.asarray(image))
        except OSError as error:
            raise self._unreadable(name, error) from error

    def images(self, indices: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
        """Read images by their place among ``names``: centre-cropped, resized; ``n x size x size x 3`` uint8."""
        out = np.empty((len(indices), size, size, 3), np.uint8)
        for row, index in enumerate(indices):
            out[row] = prepare_images(self.square(self.names[int(index)])[None], size)[0]
        return out

    def _unreadable(self, name: str, error: OSError) -> UserError:
        return UserError(f"{self.folder / name}: cannot be read as an image ({error}); delete it or download it again")
