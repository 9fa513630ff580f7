"""What this machine can do at best: its rate of matrix products and its copy bandwidth, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmark.perf.entries import Device


@dataclass(frozen=True)
class Machine:
    """Rates of ``device`` on ``threads`` threads.

    Attributes:
        matmul: float32 operations a second (a multiply-add is two) in a large matrix product.
        copy: bytes a second read plus written in a large copy.
    """

    device: Device
    threads: int
    matmul: float
    copy: float


def measure(device: Device, threads: int, *, quick: bool = False) -> Machine:
    """Measure this machine; takes about two seconds, ``quick`` a fraction of one (and is then a rough guess)."""
    import torch

    torch.set_num_threads(threads)
    side, count = (512, 1 << 22) if quick else (2048, 1 << 26)
    a, b = torch.rand(2, side, side, device=device)
    product = torch.empty_like(a)
    source = torch.zeros(count, device=device)
    target = torch.ones_like(source)

    def fastest(work: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(2 if quick else 10):
            started = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        return best

    return Machine(
        device,
        threads,
        matmul=2.0 * side**3 / fastest(lambda: torch.matmul(a, b, out=product)),
        copy=2.0 * source.nbytes / fastest(lambda: target.copy_(source)),
    )
