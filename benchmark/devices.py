"""Where networks run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmark.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def choose_device(wanted: str) -> str:
    """Return the device that ``--device`` means: ``auto`` is a GPU where there is one, else the CPU.

    Raises:
        UserError: PyTorch has no such device here.
    """
    if wanted == "cpu":
        return wanted
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = wanted.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()) or wanted.endswith(":"):
        raise UserError(f"--device {wanted}: expected auto, cpu, cuda, or cuda:N for the N-th GPU")
    if not torch.cuda.is_available():
        raise UserError(f"--device {wanted}: PyTorch finds no GPU here; leave the option out to run on the CPU")
    if number and int(number) >= (count := torch.cuda.device_count()):
        raise UserError(f"--device {wanted}: there are {count} GPUs here, cuda:0 to cuda:{count - 1}")
    return wanted


def staged(tensor: Tensor, device: str) -> Tensor:
    """Return a tensor of the host from where ``device`` can fetch it while the program goes on (pinned, for a GPU)."""
    return tensor.pin_memory() if device.startswith("cuda") else tensor


def as_float32(tensor: Tensor, device: str) -> Tensor:
    """Return a tensor of the host on ``device``, as float32: the same one where it is that already."""
    import numpy as np
    import torch

    moved = tensor.to(device, non_blocking=True)  # before it grows
    if moved.dtype == torch.float32 or moved.is_cuda:
        return moved.float()
    # numpy asks the system for large pages and torch does not: 10 MB would be 2,500 page faults, which take longer.
    return torch.from_numpy(np.empty(tuple(moved.shape), np.float32)).copy_(moved)
