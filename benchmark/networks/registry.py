"""Every frozen network by role and name, and the one way to load it.

A role is what a variant's settings call it: ``lowlevel`` (feature targets and judges), ``encoder``, ``semantic``,
``generator``, ``refiner``. To add a network, write its loader in a module of this package and name it here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.errors import UserError
from benchmark.weights import random_weights

if TYPE_CHECKING:
    import torch
    from torch import nn

    from benchmark.networks.demo import SpatialTokens
    from benchmark.networks.features import FeatureNetwork
    from benchmark.networks.paper import ClipInput, ClipTokens
    from methods.brain_it.encoder import TappedBackbone
    from methods.brain_it.generate import Generator
    from methods.brain_it.refine import Refiner

    SemanticNetwork = SpatialTokens | ClipTokens

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
        "vgg16-bn": "paper:vgg16_bn",
    },
    "encoder": {"lite0": "demo:lite_backbone", "dinov2-vitl14-reg4": "paper:dino_backbone"},
    "semantic": {"lite0": "demo:lite_tokens", "openclip-bigg14": "paper:bigg_tokens"},
    "generator": {"demo": "demo:demo_generator", "sdxl-unclip": "unclip:sdxl_unclip"},
    "autoencoder": {"demo": "demo:demo_autoencoder", "sdxl-unclip": "unclip:sdxl_autoencoder"},
    "refiner": {"zavychromaxl-v3": "sdxl:sdxl_refiner"},
}


def _load(role: str, name: str, *arguments: Any, **options: Any) -> Any:
    """Load a network; options that are None are left to its loader."""
    name, seed = random_weights(name)
    known = _LOADERS[role]
    if name not in known:
        role = "generator" if role == "autoencoder" else role
        raise UserError(f"networks.{role} is '{name}', which this release cannot load; it has {', '.join(known)}")
    module, _, function = known[name].partition(":")
    loader: Callable[..., Any] = getattr(importlib.import_module(f"benchmark.networks.{module}"), function)
    if seed is not None:
        options["random_seed"] = seed
    return loader(name, *arguments, **{option: value for option, value in options.items() if value is not None})


def feature_network(name: str, weights: Path | None = None, random_seed: int | None = None) -> FeatureNetwork:
    """Return the network of that name: the low-level targets and the judges are features of one.

    Here and in the functions below:

    Args:
        name: as in the settings or the protocol; ``NAME@random-SEED`` is the true architecture with weights drawn from
            that seed, for smoke runs.
        weights: folder of the weights files that pip does not install; ``benchmark.weights.weights_folder`` by default.
        random_seed: the same as in the name.

    Raises:
        UserError: no such network here, or its weights are missing or do not fit.
    """
    network: FeatureNetwork = _load("lowlevel", name, weights=weights, random_seed=random_seed)
    return network


def encoder_backbone(
    name: str, taps: Sequence[int], adapter_rank: int, grid: int, weights: Path | None = None
) -> TappedBackbone:
    """Return the frozen image backbone of the brain encoder, read at ``taps`` on a ``grid x grid`` grid.

    Raises:
        UserError: no such network here, or its weights are missing.
    """
    backbone: TappedBackbone = _load("encoder", name, taps, adapter_rank, grid, weights=weights)
    return backbone


def semantic_network(
    name: str,
    weights: Path | None = None,
    clip_input: ClipInput | None = None,
    dtype: torch.dtype | None = None,
) -> SemanticNetwork:
    """Return images (B x 3 x S x S in [0, 1], S its ``size``) -> semantic tokens, as the generator takes them.

    Args:
        name: as in the settings.
        weights: folder of the weights files.
        clip_input: what a CLIP tower sees of an image; ``mindeye2`` by default.
        dtype: in which its weights are kept; float32 by default.

    Raises:
        UserError: no such network here, or its weights are missing.
    """
    network: SemanticNetwork = _load("semantic", name, weights=weights, clip_input=clip_input, dtype=dtype)
    return network


def generator(
    name: str, weights: Path | None = None, dtype: torch.dtype | None = None, unet: Path | None = None
) -> Generator:
    """Return the diffusion model that turns semantic tokens into images.

    Args:
        name: as in the settings.
        weights: folder of the weights files.
        dtype: in which the UNet's weights are kept; float32 by default.
        unet: ``safetensors`` file of a UNet that was trained further, read instead of the published one.

    Raises:
        UserError: no such generator here, or its weights are missing.
    """
    made: Generator = _load("generator", name, weights=weights, dtype=dtype, unet=unet)
    return made


def autoencoder(name: str, weights: Path | None = None) -> tuple[nn.Module, int]:
    """Return a generator's autoencoder, between images and latents, and the side of the generator's images in pixels.

    Raises:
        UserError: no such generator here, or its weights are missing.
    """
    made: tuple[nn.Module, int] = _load("autoencoder", name, weights=weights)
    return made


def refiner(name: str, weights: Path | None = None, dtype: torch.dtype | None = None) -> Refiner:
    """Return the diffusion model that refines reconstructions; ``dtype`` is that of its UNet's weights.

    Raises:
        UserError: no such refiner here, or its weights are missing.
    """
    made: Refiner = _load("refiner", name, weights=weights, dtype=dtype)
    return made
