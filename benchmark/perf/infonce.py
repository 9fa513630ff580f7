"""Entry ``infonce``: InfoNCE of a layer's tokens and its gradients.

The reference holds the whole matrix of logits. At the paper's 32,768 tokens (512 of each of 64 examples) the matrix,
the two log-softmaxes of it and their gradients would take more than 20 GiB; both sides are measured at half as many
tokens, a quarter of that.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from benchmark.perf.entries import Floor, Job, Part, Results
from benchmark.perf.gradients import comparable, tolerances
from methods.brain_it.losses import info_nce

_TOKENS, _WIDTH = 16_384, 512
_SMALL = 2_200  # more logits than are held at a time
_RESULTS = ("loss", "gradient of the predictions", "gradient of the targets")


def _size(job: Job) -> tuple[int, int]:
    return (_SMALL, 32) if job.quick else (_TOKENS, _WIDTH)


def _prepare(job: Job) -> tuple[Tensor, Tensor]:
    """Predictions that tell their target from most others, not from all."""
    n, width = _size(job)
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(n, width, generator=generator)
    pred = (6 / width) * target + (3 / width**0.5) * torch.randn(n, width, generator=generator)
    return pred.to(job.device).requires_grad_(), target.to(job.device).requires_grad_()


def _results(loss: Tensor, pred: Tensor, target: Tensor) -> Results:
    loss.backward()
    assert pred.grad is not None and target.grad is not None
    return comparable(dict(zip(_RESULTS, (loss, pred.grad, target.grad), strict=True)))


def ours(inputs: tuple[Tensor, Tensor], job: Job) -> Results:
    """Loss and gradients as training takes them."""
    return _results(info_nce(*inputs), *inputs)


def full_info_nce(pred: Tensor, target: Tensor) -> Tensor:
    """InfoNCE as it is written down: cross-entropies of all rows and all columns of the logits."""
    logits = pred @ target.T
    positives = torch.arange(len(pred), device=pred.device)
    return (functional.cross_entropy(logits, positives) + functional.cross_entropy(logits.T, positives)) / 2


def reference(inputs: tuple[Tensor, Tensor], job: Job) -> Results:
    """The same with the whole matrix."""
    return _results(full_info_nce(*inputs), *inputs)


def operations(n: int, width: int) -> float:
    """Return the operations that no form avoids: the logits, and their gradients' products with either side."""
    return 3 * 2.0 * n * n * width


def _floor(job: Job) -> Floor:
    n, width = _size(job)
    return Floor(operations(n, width), 4 * 4.0 * n * width)


PARTS: tuple[Part, ...] = (Part("loss and gradients", _prepare, ours, reference, _floor),)
TOLERANCES: Mapping[str, float] = tolerances(_RESULTS, 1e-3)
