"""Perceptual distance of feature maps: LPIPS where its linear heads weigh AlexNet's channels, else unweighted."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from metrics.protocols import Heads

_EPS = 1e-10  # as in lpips 0.1.4


def perceptual_distance(
    truth: Sequence[Tensor], recon: Sequence[Tensor], heads: Sequence[Tensor] | None = None
) -> Tensor:
    """Return the distance of each pair of images from their feature maps (Zhang et al. 2018, Eq. 1).

    At every place the channels are scaled to unit length; squared differences are weighted by channel, averaged over
    places, and summed over layers. Fed AlexNet's five ReLUs of images in [-1, 1] (that is, ImageNet's mean and
    deviation taken out) and the heads of ``lpips`` this *is* LPIPS; on any other network, with ``heads`` None (every
    channel weighs 1), it is not, and must not be called so.

    Args:
        truth, recon: one (B, C, H, W) tensor a layer.
        heads: one (C,) tensor of weights a layer, or None.

    Returns:
        (B,) float64, not negative.

    Raises:
        ValueError: heads and layers differ in number or channels.
    """
    if heads is not None and [len(h) for h in heads] != [t.shape[1] for t in truth]:
        raise ValueError(
            f"the heads weigh {[len(h) for h in heads]} channels, the layers have {[t.shape[1] for t in truth]}"
        )
    total = torch.zeros(len(truth[0]), dtype=torch.float64)
    for k, (t, r) in enumerate(zip(truth, recon, strict=True)):
        difference = (_unit(t) - _unit(r)).square_()
        if heads is None:
            weighted = difference.sum(dim=1)
        else:
            weighted = torch.einsum("bchw,c->bhw", difference, heads[k].to(difference))
        total += weighted.mean(dim=(1, 2)).double().cpu()
    return total


def _unit(x: Tensor) -> Tensor:
    x = x.float().contiguous()  # or sums over channels would round by where the maps lie in memory
    return x / (x.square().sum(dim=1, keepdim=True).sqrt() + _EPS)


@cache
def lpips_heads(heads: Heads) -> tuple[Tensor, ...]:
    """Return the channel weights of each layer from the installed ``lpips`` package, checked against their digest.

    Raises:
        ValueError: the package is not installed, or its file is not the one that the protocol names.
    """
    spec = importlib.util.find_spec("lpips")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{heads.name} needs the package 'lpips'; type: pip install lpips==0.1.4")
    path = Path(spec.submodule_search_locations[0]) / heads.file
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != heads.sha256:
        raise ValueError(f"{path} is missing or not {heads.name}; type: pip install --force-reinstall lpips==0.1.4")
    state = torch.load(path, map_location="cpu", weights_only=True)
    return tuple(weight.flatten() for _, weight in sorted(state.items()))
