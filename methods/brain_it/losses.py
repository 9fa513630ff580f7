"""Training losses of Brain-IT: InfoNCE for the low-level branch, and the loss of the image-to-fMRI encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits that are held at a time: 2**22 floats (16 MB) stay in a cache, 2**27 (0.5 GB) keep a GPU busy.
_LOGITS_CPU = 2**22
_LOGITS_GPU = 2**27


def info_nce(pred: Tensor, target: Tensor, scale: float = 1.0, chunk: int | None = None) -> Tensor:
    """Symmetric InfoNCE between predicted and true tokens (Brain-IT, Sec. 4; details from the official code).

    ``logits = scale * pred @ target.T``; the loss is the mean of the row and the column cross-entropies with the
    diagonal as positives. No L2 normalisation and no learned temperature: the predictions are used directly as
    regression targets later. Logits are float32 or wider, under autocast too, since unnormalised products overflow
    half precision.

    Args:
        pred: (M, D) predictions.
        target: (M, D) their targets, in the same order.
        scale: inverse temperature.
        chunk: rows of the M x M logit matrix to hold at a time, forward and backward; where None, the whole matrix if
            it is small and else as many as fit a cache (on a GPU, half a gigabyte). Value and gradients are the same
            (and may only be differentiated once).

    Returns:
        scalar loss.

    Raises:
        ValueError: the shapes differ or are not (M, D), or ``chunk`` is not positive.
    """
    if pred.ndim != 2 or pred.shape != target.shape or len(pred) == 0:
        raise ValueError(f"info_nce needs two equal (M, D) shapes, got {tuple(pred.shape)} and {tuple(target.shape)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"info_nce needs a chunk of at least one row, got {chunk}")
    dtype = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    pred, target = pred.to(dtype), target.to(dtype)
    held = _LOGITS_GPU if pred.is_cuda else _LOGITS_CPU
    if chunk is None and len(pred) ** 2 > held:
        chunk = max(1, held // len(pred))
    with torch.autocast(pred.device.type, enabled=False):
        if chunk is not None:
            return _ChunkedInfoNCE.apply(pred, target, scale, chunk)
        logits = scale * pred @ target.T
        diagonal = torch.arange(len(pred), device=pred.device)
        return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2


class _ChunkedInfoNCE(torch.autograd.Function):
    """InfoNCE that holds some rows of the logit matrix at a time and recomputes them for the gradient.

    With L the logits and M their number of rows, dloss/dL = (softmax over rows + softmax over columns - 2 I) / 2M.
    """

    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, scale: float, chunk: int) -> Tensor:
        row_lse = pred.new_empty(len(pred))
        col_lse = pred.new_full((len(pred),), -torch.inf)
        for rows, logits in _logit_rows(pred, target, scale, chunk):
            row_lse[rows] = logits.logsumexp(1)
            col_lse = torch.logaddexp(col_lse, logits.logsumexp(0))
        ctx.save_for_backward(pred, target, row_lse, col_lse)
        ctx.scale, ctx.chunk = scale, chunk
        positives = scale * torch.linalg.vecdot(pred, target)
        return ((row_lse - positives).mean() + (col_lse - positives).mean()) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pred, target, row_lse, col_lse = ctx.saved_tensors
        factor = grad * ctx.scale / (2 * len(pred))
        # The positives' share of the gradient, then what each block of logits adds.
        grad_pred, grad_target = -2 * target, -2 * pred
        for rows, logits in _logit_rows(pred, target, ctx.scale, ctx.chunk):
            over_rows = (logits - row_lse[rows, None]).exp_()
            softmaxes = logits.sub_(col_lse).exp_().add_(over_rows)
            grad_pred[rows].addmm_(softmaxes, target)
            grad_target.addmm_(softmaxes.T, pred[rows])
        return grad_pred.mul_(factor), grad_target.mul_(factor), None, None


def _logit_rows(pred: Tensor, target: Tensor, scale: float, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of the logit matrix, with their place in it."""
    for start in range(0, len(pred), chunk):
        rows = slice(start, start + chunk)
        yield rows, (scale * pred[rows]) @ target.T


def multi_layer_info_nce(
    pred: Tensor, target: Tensor, layer_sizes: Sequence[int], scale: float = 1.0, chunk: int | None = None
) -> Tensor:
    """Mean over feature layers of :func:`info_nce`, the negatives being the layer's tokens of the whole batch.

    Args:
        pred: (B, n, D) predicted tokens, those of layer 1 first, then layer 2, ...
        target: (B, n, D) true tokens in the same order.
        layer_sizes: tokens per example of each layer, summing to n (Brain-IT samples 512, 512, 128, 64, 16).
        scale: inverse temperature.
        chunk: as of :func:`info_nce`.

    Raises:
        ValueError: the shapes differ, are not (B, n, D), or ``layer_sizes`` does not sum to n.
    """
    if pred.ndim != 3 or pred.shape != target.shape or pred.shape[1] != sum(layer_sizes):
        raise ValueError(
            f"multi_layer_info_nce needs two equal (B, {sum(layer_sizes)}, D) shapes for layers of "
            f"{list(layer_sizes)} tokens, got {tuple(pred.shape)} and {tuple(target.shape)}"
        )
    layers = zip(pred.split(list(layer_sizes), 1), target.split(list(layer_sizes), 1), strict=True)
    return torch.stack([info_nce(p.flatten(0, 1), t.flatten(0, 1), scale, chunk) for p, t in layers]).mean()


def encoder_loss(pred: Tensor, target: Tensor, cosine_weight: float = 0.1) -> Tensor:
    """MSE minus ``cosine_weight`` times the mean over examples of the cosine across voxels (official encoder code).

    Args:
        pred: (B, V) predicted activations of the sampled voxels.
        target: (B, V) measured activations.
        cosine_weight: weight of the cosine term.

    Raises:
        ValueError: the shapes differ or are not (B, V).
    """
    if pred.ndim != 2 or pred.shape != target.shape:
        raise ValueError(f"encoder_loss needs two equal (B, V) shapes, got {tuple(pred.shape)}, {tuple(target.shape)}")
    return F.mse_loss(pred, target) - cosine_weight * F.cosine_similarity(pred, target, dim=1).mean()
