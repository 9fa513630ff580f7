"""Features of images, kept between evaluations: in memory, or in a folder of safetensors files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

Features = NDArray[np.float32]


@dataclass
class TruthCache:
    """Features of the seen images, kept between calls that score several sets against the same truths.

    Entries are keyed by the images' pixels and preparation, the network's digest, the layer and the size, so one cache
    serves any number of protocols and test sets. What would pass ``max_bytes`` is computed anew each time instead.

    With a ``folder`` feature vectors are kept there, one safetensors file an entry, and not in memory; another process
    may use it later or at the same time. AlexNet's of 1000 images are 1 GB, those of all other networks 21 MB. A file
    that cannot be read counts as missing and is written anew. Feature maps, hundreds of times as large, are only ever
    kept in memory.
    """

    max_bytes: int = 1 << 30
    folder: Path | None = None
    _entries: dict[Hashable, Features] = field(default_factory=dict, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(entry.nbytes for entry in self._entries.values())

    def get(self, key: Hashable) -> Features | None:
        """Return the features stored under ``key``, or None."""
        if key in self._entries or self.folder is None:
            return self._entries.get(key)
        try:
            with safe_open(self._file(key), framework="numpy") as file:
                return file.get_tensor("features") if file.metadata() == {"key": repr(key)} else None
        except (OSError, SafetensorError):
            return None

    def fits(self, nbytes: int) -> bool:
        """Return whether ``nbytes`` more may be kept in memory."""
        return self.nbytes + nbytes <= self.max_bytes

    def put(self, key: Hashable, features: Features) -> None:
        """Keep ``features``: in the folder, else in memory if they fit.

        Raises:
            OSError: the folder cannot be written to.
        """
        if self.folder is None or features.ndim != 2:
            if self.fits(features.nbytes):
                self._entries[key] = features
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self._file(key)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            save_file({"features": np.ascontiguousarray(features)}, partial, metadata={"key": repr(key)})
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def _file(self, key: Hashable) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.safetensors"
