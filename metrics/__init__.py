"""The eleven metrics: their cards, the protocols that fix every size and tie, and their exact, fast computation.

Nothing heavy is imported until it is asked for: ``metrics.cards`` and ``metrics.protocols`` need no torch. The function
that scores a set of images lives in the module of its name: ``from metrics.evaluate import evaluate``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metrics.cache import TruthCache
    from metrics.calibration import analytic_chance, chance_and_ceiling
    from metrics.cards import CARDS, KEYS, Card, card, format_value
    from metrics.evaluate import Backbone, Scores, aggregates, slot_features, subset
    from metrics.identification import (
        correlation_distance,
        correlation_matrix,
        n_way_top1,
        pairwise_correlation,
        pool_n_way_top1,
        top1,
        two_way,
        wins,
    )
    from metrics.images import Images
    from metrics.perceptual import lpips_heads, perceptual_distance
    from metrics.pixel import pixcorr, ssim
    from metrics.protocols import PROTOCOLS, Protocol, get_protocol, protocol_hash

_HOME = {
    "cache": ("TruthCache",),
    "calibration": ("analytic_chance", "chance_and_ceiling"),
    "cards": ("CARDS", "KEYS", "Card", "card", "format_value"),
    "evaluate": ("Backbone", "Scores", "aggregates", "slot_features", "subset"),
    "identification": (
        "correlation_distance",
        "correlation_matrix",
        "n_way_top1",
        "pairwise_correlation",
        "pool_n_way_top1",
        "top1",
        "two_way",
        "wins",
    ),
    "images": ("Images",),
    "perceptual": ("lpips_heads", "perceptual_distance"),
    "pixel": ("pixcorr", "ssim"),
    "protocols": ("PROTOCOLS", "Protocol", "get_protocol", "protocol_hash"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "CARDS",
    "KEYS",
    "PROTOCOLS",
    "Backbone",
    "Card",
    "Images",
    "Protocol",
    "Scores",
    "TruthCache",
    "aggregates",
    "analytic_chance",
    "card",
    "chance_and_ceiling",
    "correlation_distance",
    "correlation_matrix",
    "format_value",
    "get_protocol",
    "lpips_heads",
    "n_way_top1",
    "pairwise_correlation",
    "perceptual_distance",
    "pixcorr",
    "pool_n_way_top1",
    "protocol_hash",
    "slot_features",
    "ssim",
    "subset",
    "top1",
    "two_way",
    "wins",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'metrics' has no attribute {name!r}")
    return getattr(importlib.import_module(f"metrics.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
