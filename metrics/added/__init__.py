"""Metrics beside the eleven: one file a metric, found by itself.

``NAME.py`` in this folder, or in ``metrics/`` of the folder that the environment variable ``BRAIN_IT_EXTENSIONS``
names, has a :class:`Metric` called ``METRIC``. Its key then has a card like any other, and a protocol takes it on where
its name says so: ``demo+KEY``, ``brain-it+KEY``. Such a protocol has a hash of its own; those of all others stay.
``docs/extending.md`` goes through an example. The files are read whenever cards are asked for: what takes long to
import, torch above all, is imported inside the function that needs it.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
import os
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from metrics.cards import Card
    from metrics.protocols import Resize

VARIABLE = "BRAIN_IT_EXTENSIONS"
"""Names a folder of the user's own ``metrics/`` (its ``methods/`` are read elsewhere)."""

if _folder := os.environ.get(VARIABLE):
    __path__.append(os.path.abspath(os.path.join(_folder, "metrics")))

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9().-]*")


class MetricFileError(ValueError):
    """A file of this folder cannot be read, or is not what it should be; the message names it."""


@dataclass(frozen=True)
class Metric:
    """A metric of one image pair.

    Attributes:
        card: what a reader must know; its version is raised whenever the same images would get another value.
        function: (truth, reconstruction) -> the pair's value: of two images, (H, W, 3) float64 in [0, 1] as the
            protocol prepares them, or of two feature vectors (F,). Called from several threads.
        resize: brings both images to another size first; None leaves them as the protocol prepares them.
        features: key of a metric that compares feature vectors, such as "CLIP": the function gets the vectors of
            whatever network, layer and size fill that key under the protocol, instead of images.
    """

    card: Card
    function: Callable[[NDArray[np.floating], NDArray[np.floating]], float]
    resize: Resize | None = None
    features: str | None = None

    def __call__(self, truth: NDArray[np.floating], recon: NDArray[np.floating], image: object) -> float:
        """Return the value of one pair; ``image`` names it in messages.

        Raises:
            ValueError: it is no number in the range that the card promises.
        """
        value = float(self.function(truth, recon))
        low, high = self.card.low, math.inf if self.card.high is None else self.card.high
        if not low - 1e-9 <= value <= high + 1e-9:  # NaN is in no range
            raise ValueError(
                f"metric '{self.card.key}' gave {value:g} for image {image}; its card says {low:g} .. {high:g}"
            )
        return min(max(value, low), high)


@cache
def metrics() -> Mapping[str, Metric]:
    """Return key -> metric of every file, sorted by file name; read once a process.

    Raises:
        MetricFileError: a file cannot be read, or is not what it should be.
    """
    from metrics.cards import KEYS

    if (folder := os.environ.get(VARIABLE)) and not os.path.isdir(folder):
        raise MetricFileError(f"{VARIABLE} is {folder}: no such folder; make it, or unset {VARIABLE}")
    found: dict[str, Metric] = {}
    bare = {_bare(key): "one of the eleven" for key in KEYS}
    names = sorted(module.name for folder in __path__ for module in pkgutil.iter_modules([folder]))
    for name in names:
        if names.count(name) > 1:
            raise MetricFileError(f"{name}.py is in {' and in '.join(__path__)}; rename one")
        where, metric = _read(name)
        key = metric.card.key
        if not _KEY.fullmatch(key) or not _bare(key):
            raise MetricFileError(f"{where}: key '{key}'; expected letters, digits, ( ) . and -")
        if _bare(key) in bare:
            raise MetricFileError(f"{where}: key '{key}' is taken by {bare[_bare(key)]}; choose another")
        bare[_bare(key)] = where
        found[key] = metric
    return MappingProxyType(found)


def metric(key: str) -> Metric:
    """Return the metric of ``key``.

    Raises:
        ValueError: no file has it; the message names the nearest one.
    """
    if key not in metrics():
        near = difflib.get_close_matches(key, metrics(), n=1, cutoff=0.4)
        hint = f" (did you mean '{near[0]}'?)" if near else f"; there are {', '.join(metrics()) or 'none'}"
        raise ValueError(f"no metric '{key}' in {' or '.join(__path__)}{hint}")
    return metrics()[key]


def _read(name: str) -> tuple[str, Metric]:
    """Return where a file is, and its metric."""
    qualified = f"{__name__}.{name}"
    spec = importlib.util.find_spec(qualified)
    where = str(spec.origin) if spec is not None else qualified
    try:
        found = getattr(importlib.import_module(qualified), "METRIC", None)
    except Exception as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        first = (str(error).splitlines() or [""])[0]
        raise MetricFileError(f"{where}{line}: the metric cannot be read: {type(error).__name__}: {first}") from error
    if not isinstance(found, Metric):
        raise MetricFileError(f"{where}: has no METRIC; expected METRIC = Metric(card=..., function=...)")
    return where, found


def _bare(key: str) -> str:
    return re.sub(r"[^a-z0-9]", "", key.lower())
