"""Every frozen network by role and name, and the one way to load it.

A role is what a variant's settings call it: ``lowlevel`` (feature targets and judges), ``encoder``, ``semantic``,
``generator``. To add a network, write its loader in a module of this package and name it here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.errors import UserError

if TYPE_CHECKING:
    from benchmark.networks.demo import SpatialTokens
    from benchmark.networks.features import FeatureNetwork
    from methods.brain_it.encoder import TappedBackbone
    from methods.brain_it.generate import Generator

# role -> name -> module of this package and loader in it; imported when the network is asked for
_LOADERS: Mapping[str, Mapping[str, str]] = {
    "lowlevel": {
        "lite0": "demo:pip_network",
        "lite2": "demo:pip_network",
        "augnet": "demo:pip_network",
        "alexnet": "scoring:scoring_network",
        "efficientnet_b1": "scoring:scoring_network",
        "efficientnet_b1_v1": "scoring:scoring_network",
        "swav_resnet50": "scoring:scoring_network",
        "inception_v3": "scoring:scoring_network",
        "clip_vit_l14": "scoring:scoring_network",
    },
    "encoder": {"lite0": "demo:lite_backbone"},
    "semantic": {"lite0": "demo:lite_tokens"},
    "generator": {"demo": "demo:demo_generator"},
}


def _loader(role: str, name: str) -> Callable[..., Any]:
    known = _LOADERS[role]
    if name not in known:
        raise UserError(f"networks.{role} is '{name}', which this release cannot load; it has {', '.join(known)}")
    module, _, function = known[name].partition(":")
    loader: Callable[..., Any] = getattr(importlib.import_module(f"benchmark.networks.{module}"), function)
    return loader


def feature_network(name: str, weights: Path | None = None, random_seed: int | None = None) -> FeatureNetwork:
    """Return the network of that name: the low-level targets and the judges are features of one.

    Args:
        name: as in the settings or the protocol.
        weights: folder of the weights files that pip does not install; ``benchmark.weights.weights_folder`` by default.
        random_seed: the true architecture with weights drawn from this seed instead, for tests and dry runs.

    Raises:
        UserError: no such network here, or its weights are missing or do not fit.
    """
    network: FeatureNetwork = _loader("lowlevel", name)(name, weights, random_seed)
    return network


def encoder_backbone(name: str, taps: Sequence[int], adapter_rank: int, grid: int) -> TappedBackbone:
    """Return the frozen image backbone of the brain encoder, read at ``taps`` on a ``grid x grid`` grid.

    Raises:
        UserError: no such network here, or its weights are missing.
    """
    backbone: TappedBackbone = _loader("encoder", name)(name, taps, adapter_rank, grid)
    return backbone


def semantic_network(name: str) -> SpatialTokens:
    """Return images (B x 3 x H x W in [0, 1]) -> semantic tokens, on the scale that the generator takes.

    Raises:
        UserError: no such network here, or its weights are missing.
    """
    network: SpatialTokens = _loader("semantic", name)(name)
    return network


def generator(name: str) -> Generator:
    """Return the diffusion model that turns semantic tokens into images.

    Raises:
        UserError: no such generator here, or its weights are missing.
    """
    made: Generator = _loader("generator", name)(name)
    return made
