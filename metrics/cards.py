"""One card a metric: what it is, which way is better, how it is printed. Plain data; imports nothing heavy.

``name`` holds under every protocol; ``network``, ``layer`` and ``input_size`` are those of the published metric (the
``brain-it`` protocol). What fills the key under another protocol is that protocol's to say:
:meth:`metrics.protocols.Protocol.describe`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from metrics import added

MISSING = "–"


@dataclass(frozen=True)
class Card:
    """What a reader must know about one metric.

    ``version`` is raised whenever the same images would get another value; it enters every protocol hash.
    ``low`` and ``high`` bound a value (``high`` is None where nothing bounds it). Values are always stored as
    fractions; ``percent`` only says how they are printed.
    """

    key: str
    name: str
    version: str
    direction: Literal["higher", "lower"]
    low: float
    high: float | None
    percent: bool
    input_size: str
    network: str | None
    layer: str | None
    reference: str

    @property
    def best(self) -> float:
        """The value of a reconstruction that equals the seen image."""
        if self.direction == "lower":
            return self.low
        assert self.high is not None
        return self.high

    @property
    def arrow(self) -> str:
        """``↑`` where higher is better, ``↓`` where lower is."""
        return "↑" if self.direction == "higher" else "↓"

    def better(self, a: float, b: float) -> bool:
        """Return whether value ``a`` is strictly better than ``b``."""
        return a > b if self.direction == "higher" else a < b

    def format(self, value: float | None) -> str:
        """Print a value as the field does: ``0.386``, ``98.4%``; a missing or undefined one as a dash."""
        if value is None or math.isnan(value):
            return MISSING
        return f"{100 * value:.1f}%" if self.percent else f"{value:.3f}"


def _two_way(key: str, size: str, network: str, layer: str) -> Card:
    return Card(
        key=key,
        name="two-way identification",
        version="1",
        direction="higher",
        low=0.0,
        high=1.0,
        percent=True,
        input_size=size,
        network=network,
        layer=layer,
        reference="Ozcelik and VanRullen 2023, Sci. Rep. 13:15666 (procedure)",
    )


_ALL = (
    Card(
        key="PixCorr",
        name="pixel correlation (Pearson, RGB jointly)",
        version="1",
        direction="higher",
        low=-1.0,
        high=1.0,
        percent=False,
        input_size="425",
        network=None,
        layer=None,
        reference="Ozcelik and VanRullen 2023, Sci. Rep. 13:15666",
    ),
    Card(
        key="SSIM",
        name="structural similarity of the grey images",
        version="1",
        direction="higher",
        low=-1.0,
        high=1.0,
        percent=False,
        input_size="425",
        network=None,
        layer=None,
        reference="Wang et al. 2004, IEEE TIP 13(4)",
    ),
    _two_way("Alex(2)", "256", "AlexNet", "ReLU after the second convolution (features.4)"),
    _two_way("Alex(5)", "256", "AlexNet", "ReLU after the fifth convolution (features.11)"),
    _two_way("Incep", "342", "Inception-v3", "average pool"),
    _two_way("CLIP", "224", "CLIP ViT-L/14", "image embedding"),
    Card(
        key="Eff",
        name="correlation distance of features",
        version="1",
        direction="lower",
        low=0.0,
        high=2.0,
        percent=False,
        input_size="255",
        network="EfficientNet-B1",
        layer="average pool",
        reference="Tan and Le 2019, ICML",
    ),
    Card(
        key="SwAV",
        name="correlation distance of self-supervised features",
        version="1",
        direction="lower",
        low=0.0,
        high=2.0,
        percent=False,
        input_size="224",
        network="SwAV ResNet-50",
        layer="average pool",
        reference="Caron et al. 2020, NeurIPS",
    ),
    Card(
        key="CLIP-1000",
        name="retrieval of the seen image, top-1",
        version="1",
        direction="higher",
        low=0.0,
        high=1.0,
        percent=True,
        input_size="224",
        network="CLIP ViT-L/14",
        layer="image embedding",
        reference="Brain-IT, App. B, Table T6",
    ),
    Card(
        key="LPIPS",
        name="perceptual distance of feature maps",
        version="1",
        direction="lower",
        low=0.0,
        high=None,
        percent=False,
        input_size="425",
        network="AlexNet",
        layer="the five ReLUs",
        reference="Zhang et al. 2018, CVPR; Brain-IT, App. B, Table T6",
    ),
    Card(
        key="SSIM-color",
        name="structural similarity, mean of the three colour channels",
        version="1",
        direction="higher",
        low=-1.0,
        high=1.0,
        percent=False,
        input_size="425",
        network=None,
        layer=None,
        reference="Wang et al. 2004, IEEE TIP 13(4); Brain-IT, App. B, Table T6",
    ),
)

KEYS: tuple[str, ...] = tuple(card.key for card in _ALL)
"""The eleven that every protocol has, in the order in which tables show them."""

PIXEL_KEYS: tuple[str, ...] = tuple(card.key for card in _ALL if card.network is None)
"""Those of them that need no network."""


class _Cards(Mapping[str, Card]):
    """The eleven, then those of :mod:`metrics.added`, whose files are read when a card is first asked for."""

    @cached_property
    def _by_key(self) -> dict[str, Card]:
        return {card.key: card for card in (*_ALL, *(metric.card for metric in added.metrics().values()))}

    def __getitem__(self, key: str) -> Card:
        return self._by_key[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_key)

    def __len__(self) -> int:
        return len(self._by_key)


CARDS: Mapping[str, Card] = _Cards()
"""Every metric by key, in the order in which tables show them: the eleven, and what was added to them."""


def unknown_metrics(keys: Iterable[str]) -> str:
    """Return what to say of metrics that have no card here, or an empty string where all have one."""
    unknown = sorted(set(keys) - set(CARDS))
    if not unknown:
        return ""
    return (
        f"unknown metric {', '.join(unknown)}; known: {', '.join(CARDS)} "
        "(one that was added elsewhere needs its file in metrics/added here, too)"
    )


def card(key: str) -> Card:
    """Return the card of ``key``.

    Raises:
        ValueError: there is no such metric; the message names the nearest one.
    """
    if key not in CARDS:
        near = difflib.get_close_matches(key, CARDS, n=1, cutoff=0.4)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise ValueError(f"no metric '{key}'{hint}; the keys are {', '.join(CARDS)}")
    return CARDS[key]


def format_value(key: str, value: float | None) -> str:
    """Print one value of metric ``key``: ``0.386``, ``98.4%``, or a dash where it is missing."""
    return card(key).format(value)
