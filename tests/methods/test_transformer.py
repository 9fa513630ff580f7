"""BIT against the equations written out plainly, and its sizes against the published ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from methods.brain_it.tokenizer import VoxelLayout
from methods.brain_it.transformer import BIT

LAYOUT = VoxelLayout.build([np.arange(30) % 6, np.arange(21) % 5], 6)


def make_bit(**sizes: int) -> BIT:
    torch.manual_seed(0)
    bit = BIT(LAYOUT, **{"dim": 24, "depth": 2, "heads": 3, "n_queries": 10, "out_dim": 8, **sizes}).double()
    with torch.no_grad():
        for parameter in bit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return bit


def make_batch(n: int = 4) -> tuple[Tensor, Tensor]:
    betas = torch.randn(n, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return betas, torch.arange(n) % 2


def plain_layer_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normal = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    return normal * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def plain_mlp(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    hidden = x @ weights[f"{name}.fc1.weight"].T + weights[f"{name}.fc1.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ weights[f"{name}.fc2.weight"].T + weights[f"{name}.fc2.bias"]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, weights: dict[str, Tensor], name: str) -> Tensor:
    width = q.shape[-1] // heads
    read = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = torch.einsum("bqd,bkd->bqk", q[..., part], k[..., part]) / math.sqrt(width)
        odds = scores.exp()
        read.append((odds / odds.sum(-1, keepdim=True)) @ v[..., part])
    return torch.cat(read, -1) @ weights[f"{name}.proj.weight"].T + weights[f"{name}.proj.bias"]


def plain_cross_transformer(z: Tensor, weights: dict[str, Tensor], depth: int, heads: int) -> Tensor:
    """The official cross-transformer from brain tokens to features, by official parameter names."""
    dim = z.shape[-1]

    def cross(i: int, q: Tensor) -> Tensor:
        name = f"block_crosses.{i}"
        kv = plain_layer_norm(z, weights, f"{name}.norm1") @ weights[f"{name}.attn.kv.weight"].T
        y = plain_attention(q, kv[..., :dim], kv[..., dim:], heads, weights, f"{name}.attn")
        return y + plain_mlp(plain_layer_norm(y, weights, f"{name}.norm2"), weights, f"{name}.mlp")

    q = weights["query_tokens"].repeat(len(z), 1, 1)
    q = q + cross(0, q)
    for i in range(depth):
        name = f"blocks.{i}"
        qkv = plain_layer_norm(z, weights, f"{name}.norm1") @ weights[f"{name}.attn.qkv.weight"].T
        parts = qkv[..., :dim], qkv[..., dim : 2 * dim], qkv[..., 2 * dim :]
        z = z + plain_attention(*parts, heads, weights, f"{name}.attn")
        z = z + plain_mlp(plain_layer_norm(z, weights, f"{name}.norm2"), weights, f"{name}.mlp")
        q = q + cross(i + 1, q)
    return q @ weights["proj.weight"].T + weights["proj.bias"]


def test_equals_the_equations_with_gradients() -> None:
    bit = make_bit()
    betas, subject = make_batch()
    weights: dict[str, Tensor] = dict(bit.named_parameters())
    probe = torch.randn(4, 10, 8, dtype=torch.float64)
    got = bit(betas, subject)
    want = plain_cross_transformer(bit.tokenizer(betas, subject), weights, depth=2, heads=3)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    names, parameters = zip(*weights.items(), strict=True)
    got_grads = torch.autograd.grad((got * probe).sum(), parameters)
    want_grads = torch.autograd.grad((want * probe).sum(), parameters)
    for name, a, b in zip(names, got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=name)


def test_queries_equal_the_full_output_gathered() -> None:
    bit = make_bit()
    betas, subject = make_batch()
    queries = torch.tensor([[3, 1, 9], [0, 0, 5], [7, 8, 9], [2, 4, 6]])
    probe = torch.randn(4, 3, 8, dtype=torch.float64)
    some = bit(betas, subject, queries=queries)
    full = bit(betas, subject).gather(1, queries[..., None].expand(-1, -1, 8))
    torch.testing.assert_close(some, full, rtol=1e-10, atol=1e-12)
    parameters = list(bit.parameters())
    some_grads, full_grads = (torch.autograd.grad((value * probe).sum(), parameters) for value in (some, full))
    for a, b in zip(some_grads, full_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_examples_of_a_batch_are_independent() -> None:
    bit = make_bit()
    betas, subject = make_batch(5)
    keep = torch.rand(betas.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    together = bit(betas, subject, keep)
    alone = torch.cat([bit(betas[i : i + 1], subject[i : i + 1], keep[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


def test_attention_is_fused() -> None:
    layout = VoxelLayout.build([np.arange(600) % 512], 512)
    bit = BIT(layout, dim=32, depth=1, heads=4, n_queries=16, out_dim=8)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where the fused kernel cannot run
        bit(torch.randn(2, 600), torch.zeros(2, dtype=torch.long)).sum().backward()


def test_works_under_autocast() -> None:
    bit = make_bit().float()
    betas, subject = make_batch()
    expected = bit(betas.float(), subject)
    with torch.autocast("cpu", torch.bfloat16):
        features = bit(betas.float(), subject)
    assert features.dtype == torch.bfloat16
    assert float((features.float() - expected).detach().norm() / expected.detach().norm()) < 0.05
    features.float().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in bit.parameters())


def test_every_parameter_learns() -> None:
    bit = make_bit()
    bit(*make_batch()).square().sum().backward()
    idle = {
        name for name, parameter in bit.named_parameters() if parameter.grad is not None and not parameter.grad.any()
    }
    assert idle == {"tokenizer.lin_key.bias"}  # a softmax ignores it


@pytest.mark.parametrize(("n_queries", "out_dim", "millions"), [(256, 1664, 35.2), (7190, 512, 38.1)])
def test_parameter_counts_of_the_paper(n_queries: int, out_dim: int, millions: float) -> None:
    sizes = [39548, 39548, 39548, 39548, 39548, 39198, 39548, 39511]
    layout = VoxelLayout.build([np.arange(n) % 128 for n in sizes], 128)
    with torch.device("meta"):
        bit = BIT(layout, n_queries=n_queries, out_dim=out_dim)
    counts = {name: parameter.numel() for name, parameter in bit.named_parameters()}
    table = counts.pop("tokenizer.voxel_embeddings")
    assert table == 315_997 * 512 and round(table / 1e6, 1) == 161.8
    assert round(sum(counts.values()) / 1e6, 1) == millions
    head = counts["query_tokens"] + counts["proj.weight"] + counts["proj.bias"]
    assert round((sum(counts.values()) - head) / 1e6, 1) == 34.2


def test_parameter_names_map_to_the_official_ones() -> None:
    def official(name: str) -> str:
        for mine, theirs in (
            ("tokenizer.voxel_embeddings", "voxel_embed"),
            ("tokenizer.cluster_embeddings", "centers"),
            ("tokenizer.lin_", "conv_centers.lin_"),
            ("tokenizer.norm.", "norm_centers."),
            ("query_tokens", "pred_tokens"),
        ):
            if name.startswith(mine):
                return theirs + name.removeprefix(mine)
        return name

    ends = [
        f"{layer}.{kind}"
        for layer in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ]
    expected = {
        "voxel_embed",
        "centers",
        "pred_tokens",
        "proj.weight",
        "proj.bias",
        "norm_centers.weight",
        "norm_centers.bias",
    }
    expected |= {f"conv_centers.lin_{p}.{k}" for p in ("key", "query", "value", "skip") for k in ("weight", "bias")}
    expected |= {f"blocks.{i}.{end}" for i in range(2) for end in [*ends, "attn.qkv.weight"]}
    expected |= {f"block_crosses.{i}.{end}" for i in range(3) for end in [*ends, "attn.kv.weight"]}
    assert {official(name) for name in make_bit().state_dict()} == expected


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="dim=24 with heads=5"):
        make_bit(heads=5)
    betas, subject = make_batch()
    with pytest.raises(ValueError, match=r"queries must have shape \(4, n\)"):
        make_bit()(betas, subject, queries=torch.zeros(3, 2, dtype=torch.long))
