"""Weights drawn from a seed, for tests, dry runs and measurements without the files."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

_DRAWN = 1 << 22  # numbers drawn in all: a large tensor repeats them, since two billion draws would take a minute


def seeded(net: nn.Module, name: str, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Give ``net``, which may be on the ``meta`` device, weights drawn from ``seed``, in place and on the CPU.

    Tensors of two and more dimensions are uniform with deviation 1 / sqrt(fan in), so that activations keep their
    scale; of the others, weights (scales of norms) are 1, gains of residual branches 1e-2, and biases 0.

    Args:
        net: the architecture.
        name: of the network; the same seed gives each its own numbers.
        seed: of the draw.
        dtype: of all floating-point tensors.
    """
    stream = int.from_bytes(hashlib.sha256(f"{name} {seed}".encode()).digest()[:8], "little") >> 1
    drawn = torch.rand(_DRAWN, generator=torch.Generator().manual_seed(stream)) * 2 - 1
    start = 0

    def take(count: int) -> Tensor:
        nonlocal start
        start = (start + 7919) % _DRAWN  # two tensors of one shape begin at different numbers
        rolled = torch.cat([drawn[start:], drawn[:start]])
        return rolled[:count] if count <= _DRAWN else rolled.repeat(-(-count // _DRAWN))[:count]

    state = {}
    for key, old in net.state_dict().items():
        if not old.is_floating_point():
            state[key] = torch.zeros(old.shape, dtype=old.dtype)
        elif old.ndim >= 2:
            fan_in = old[0].numel() if old.shape[0] > 1 else old.shape[-1]
            state[key] = (take(old.numel()).view(old.shape) * (3 / fan_in) ** 0.5).to(dtype)
        else:
            value = 1e-2 if key.endswith("gamma") else float(key.endswith(("weight", "running_var")))
            state[key] = torch.full(old.shape, value, dtype=dtype)
    net.load_state_dict(state, assign=True)
