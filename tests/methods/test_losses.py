"""Losses against their textbook forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from methods.brain_it.losses import encoder_loss, info_nce, multi_layer_info_nce


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randn(*shape, generator=generator, dtype=dtype)
    target = 0.5 * pred + torch.randn(*shape, generator=generator, dtype=dtype)
    return pred.requires_grad_(), target.requires_grad_()


def full_info_nce(pred: Tensor, target: Tensor, scale: float) -> Tensor:
    logits = scale * torch.einsum("id,jd->ij", pred, target)
    positives = torch.arange(len(pred))
    return 0.5 * F.cross_entropy(logits, positives) + 0.5 * F.cross_entropy(logits.T, positives)


@pytest.mark.parametrize("chunk", [None, 1, 7, 10, 23, 100])
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_info_nce_equals_cross_entropy_of_the_full_matrix(chunk: int | None, scale: float) -> None:
    pred, target = tokens(23, 6)
    loss = info_nce(pred, target, scale, chunk)
    want = full_info_nce(pred, target, scale)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
    got_grads, want_grads = (torch.autograd.grad(3 * value, (pred, target)) for value in (loss, want))
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_chunks_never_hold_the_full_matrix(largest: Any) -> None:
    pred, target = tokens(60, 5)
    with largest:
        info_nce(pred, target, chunk=10).backward()
    assert largest.elements <= 10 * 60


def test_large_matrices_are_taken_in_chunks_by_themselves(largest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("methods.brain_it.losses._LOGITS_CPU", 300)
    for rows in (17, 18, 60, 400):  # 17 x 17 fits
        pred, target = tokens(rows, 5)
        with largest:
            loss = info_nce(pred, target)
            got = torch.autograd.grad(loss, (pred, target))
        assert largest.elements <= max(300, 5 * rows)
        want = torch.autograd.grad(full_info_nce(pred, target, 1.0), (pred, target))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_rounding_only(dtype: torch.dtype) -> None:
    """Logits are float32 for tokens of either kind; a bf16 gradient is rounded at the end."""
    pred, target = (x.detach().to(dtype).requires_grad_() for x in tokens(90, 16))
    loss, want = info_nce(pred, target, chunk=13), info_nce(pred, target)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
    grads = zip(*(torch.autograd.grad(value, (pred, target)) for value in (loss, want)), strict=True)
    for a, b in grads:
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_chunked_gradient_is_numerically_right() -> None:
    pred, target = tokens(9, 3)
    assert torch.autograd.gradcheck(lambda p, t: info_nce(p, t, 0.7, chunk=4), (pred, target))


def test_info_nce_stays_finite_for_large_products() -> None:
    pred, target = tokens(12, 5, dtype=torch.float32)
    for chunk in (None, 5):
        loss = info_nce(300 * pred, 300 * target, chunk=chunk)
        assert torch.isfinite(loss)
        assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(loss, (pred, target)))


def test_info_nce_is_float32_under_autocast() -> None:
    pred, target = tokens(16, 8, dtype=torch.float32)
    want = info_nce(pred, target)
    half = pred.detach().bfloat16(), target.detach().bfloat16()
    for chunk in (None, 5):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(info_nce(pred, target, chunk=None), want)
            assert info_nce(*half, chunk=chunk).dtype == torch.float32


def test_info_nce_of_one_token_is_zero_and_of_perfect_tokens_small() -> None:
    assert float(info_nce(*tokens(1, 4)).detach()) == pytest.approx(0, abs=1e-12)
    code = 10 * torch.eye(6)
    assert float(info_nce(code, code)) < 1e-6
    assert float(info_nce(code, code.flip(0))) > 50


@pytest.mark.parametrize("chunk", [None, 4])
def test_multi_layer_info_nce_is_the_mean_over_layers(chunk: int | None) -> None:
    pred, target = tokens(3, 9, 4)
    sizes = [5, 3, 1]
    want, start = [], 0
    for size in sizes:
        p, t = (x[:, start : start + size].reshape(3 * size, 4) for x in (pred, target))
        want.append(full_info_nce(p, t, scale=1.0))
        start += size
    torch.testing.assert_close(multi_layer_info_nce(pred, target, sizes, chunk=chunk), sum(want) / 3)


def test_encoder_loss_by_hand() -> None:
    rng = np.random.default_rng(0)
    pred, target = rng.normal(size=(4, 11)), rng.normal(size=(4, 11))
    cosine = [p @ t / np.linalg.norm(p) / np.linalg.norm(t) for p, t in zip(pred, target, strict=True)]
    want = np.mean((pred - target) ** 2) - 0.1 * np.mean(cosine)
    assert float(encoder_loss(torch.from_numpy(pred), torch.from_numpy(target))) == pytest.approx(want, rel=1e-12)
    assert float(encoder_loss(torch.ones(2, 5), torch.ones(2, 5))) == pytest.approx(-0.1)


def test_bad_shapes_are_refused() -> None:
    a, b = torch.zeros(3, 4), torch.zeros(3, 5)
    for call in (
        lambda: info_nce(a, b),
        lambda: info_nce(a[:0], a[:0]),
        lambda: info_nce(a, a, chunk=0),
        lambda: multi_layer_info_nce(a[None], a[None], [1, 1]),
        lambda: encoder_loss(a, b),
        lambda: encoder_loss(a[0], a[0]),
    ):
        with pytest.raises(ValueError, match="needs"):
            call()
