"""Where networks run."""

from __future__ import annotations

from benchmark.errors import UserError


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
