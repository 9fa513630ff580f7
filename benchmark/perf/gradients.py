"""How entries hand over tensors for comparison: as numbers of size one, so that one tolerance is a relative one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from benchmark.perf.entries import Results

_COLUMNS, _LARGE = 4, 2**22


def comparable(tensors: Mapping[str, Tensor]) -> Results:
    """Return each tensor divided by its root mean square, and the logarithm of that.

    Of a table of many rows every row is projected on a few fixed directions, so that results stay small.
    """
    results = {}
    for name, tensor in tensors.items():
        x = tensor.detach().float().cpu()
        if x.numel() > _LARGE:
            directions = torch.randn(x.shape[-1], _COLUMNS, generator=torch.Generator().manual_seed(0))
            x = x.flatten(0, -2) @ directions
        size = float(x.double().square().mean().sqrt())
        results[name] = (x / size).numpy()
        results[_size_of(name)] = np.array(np.log(size))
    return results


def tolerances(names: Iterable[str], allowed: float) -> dict[str, float]:
    """Return the tolerances of what :func:`comparable` returns: ``allowed`` in units of the root mean square."""
    return {key: allowed for name in names for key in (name, _size_of(name))}


def _size_of(name: str) -> str:
    return f"{name}: log of its size"
