"""The frozen networks: feature targets, encoder backbone, judges, and the generator.

The networks of the ``demo`` preset install with pip (``demo``); those that judge images in published protocols are read
from files (``scoring``), which ``python -m benchmark.networks fetch`` gets. Nothing heavy is imported until it is
asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmark.networks.backbones import LazyBackbones, scoring_backbones
    from benchmark.networks.demo import EfficientNetLite, ResNet50, SpatialTokens
    from benchmark.networks.features import FeatureNetwork
    from benchmark.networks.registry import (
        autoencoder,
        encoder_backbone,
        feature_network,
        generator,
        refiner,
        semantic_network,
    )
    from benchmark.weights import missing_weights

_HOME = {
    "benchmark.networks.backbones": ("LazyBackbones", "scoring_backbones"),
    "benchmark.networks.demo": ("EfficientNetLite", "ResNet50", "SpatialTokens"),
    "benchmark.networks.features": ("FeatureNetwork",),
    "benchmark.networks.registry": (
        "autoencoder",
        "encoder_backbone",
        "feature_network",
        "generator",
        "refiner",
        "semantic_network",
    ),
    "benchmark.weights": ("missing_weights",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "EfficientNetLite",
    "FeatureNetwork",
    "LazyBackbones",
    "ResNet50",
    "SpatialTokens",
    "autoencoder",
    "encoder_backbone",
    "feature_network",
    "generator",
    "missing_weights",
    "refiner",
    "scoring_backbones",
    "semantic_network",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'benchmark.networks' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
