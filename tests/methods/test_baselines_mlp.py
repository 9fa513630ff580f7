"""MLP baseline: the same call as a BIT, a linear map for each subject, one network for all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from methods.baselines.mlp import MLP
from methods.brain_it.tokenizer import VoxelLayout
from methods.brain_it.transformer import BIT

VOXELS = (5, 9, 7)


def network(**changes: object) -> MLP:
    torch.manual_seed(0)
    settings = {"hidden": 16, "blocks": 2, "dropout": 0.0, "n_queries": 6, "out_dim": 4}
    return MLP(VOXELS, **{**settings, **changes}).eval()  # type: ignore[arg-type]


def batch(size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    subject = torch.randint(3, (size,), generator=generator)
    betas = torch.randn(size, max(VOXELS), generator=generator)
    for row, position in enumerate(subject.tolist()):
        betas[row, VOXELS[position] :] = 0
    return betas, subject


def test_it_is_what_its_description_says() -> None:
    """Written out example by example."""
    mlp = network()
    betas, subject = batch()
    expected = []
    for row, position in zip(betas, subject.tolist(), strict=True):
        own = mlp.subjects[position]
        x = row[: VOXELS[position]] @ own.weight.T + own.bias  # type: ignore[operator, union-attr]
        norm = mlp.start[0]
        x = F.gelu(F.layer_norm(x, (16,), norm.weight, norm.bias))  # type: ignore[arg-type]
        for linear, (norm, _, _) in mlp.blocks:  # type: ignore[misc]
            x = x + F.gelu(F.layer_norm(linear(x), (16,), norm.weight, norm.bias))
        expected.append((x @ mlp.head.weight.T + mlp.head.bias).view(6, 4))
    torch.testing.assert_close(mlp(betas, subject), torch.stack(expected))


def test_the_call_is_that_of_a_bit() -> None:
    betas, subject = batch()
    labels = [torch.arange(count) % 3 for count in VOXELS]
    bit = BIT(VoxelLayout.build(labels, 3), dim=8, depth=1, heads=2, n_queries=6, out_dim=4).eval()
    queries = torch.randint(6, (8, 3), generator=torch.Generator().manual_seed(1))
    keep = torch.ones(betas.shape, dtype=torch.bool)
    for model in (bit, network()):
        assert model(betas, subject).shape == (8, 6, 4)
        torch.testing.assert_close(model(betas, subject, keep=keep), model(betas, subject))
        some = model(betas, subject, queries=queries)
        torch.testing.assert_close(some, model(betas, subject).gather(1, queries[..., None].expand(-1, -1, 4)))


def test_neither_padding_nor_company_matters() -> None:
    mlp = network()
    betas, subject = batch()
    alone = torch.cat([mlp(betas[k : k + 1], subject[k : k + 1]) for k in range(8)])
    torch.testing.assert_close(mlp(betas, subject), alone)
    padded = betas.clone()
    for row, position in enumerate(subject.tolist()):
        padded[row, VOXELS[position] :] = 100.0
    assert torch.equal(mlp(padded, subject), mlp(betas, subject))


def test_voxels_left_out_have_no_say_and_the_rest_is_scaled_up() -> None:
    mlp = network()
    betas, subject = torch.randn(1, 9), torch.tensor([1])
    keep = torch.tensor([[True] * 3 + [False] * 6])
    torch.testing.assert_close(mlp(betas, subject, keep=keep), mlp(betas * keep * 3, subject))
    other = torch.where(keep, betas, torch.randn(1, 9))
    assert torch.equal(mlp(betas, subject, keep=keep), mlp(other, subject, keep=keep))
    assert mlp(betas, subject, keep=torch.zeros_like(keep)).isfinite().all()


def test_gradients_reach_the_subjects_in_the_batch_and_no_others() -> None:
    mlp = network()
    mlp(torch.randn(4, 9), torch.tensor([0, 2, 2, 0])).square().mean().backward()
    reached = [own.weight.grad is not None and bool(own.weight.grad.abs().sum() > 0) for own in mlp.subjects]  # type: ignore[union-attr, operator]
    assert reached == [True, False, True]
    shared = [*mlp.start.parameters(), *mlp.blocks.parameters(), *mlp.head.parameters()]
    assert all(value.grad is not None for value in shared)


def test_dropout_acts_in_training_only() -> None:
    mlp = network(dropout=0.5)
    betas, subject = batch()
    assert torch.equal(mlp(betas, subject), mlp(betas, subject))
    mlp.train()
    assert not torch.equal(mlp(betas, subject), mlp(betas, subject))


def test_it_learns_a_linear_brain() -> None:
    mlp = network(hidden=32).train()
    generator = torch.Generator().manual_seed(0)
    brain = [torch.randn(24, count, generator=generator) for count in VOXELS]
    optimiser = torch.optim.AdamW(mlp.parameters(), lr=3e-3)
    for _ in range(300):
        tokens, subject = torch.randn(32, 6, 4, generator=generator), torch.randint(3, (32,), generator=generator)
        betas = torch.zeros(32, 9)
        for k, s in enumerate(subject.tolist()):
            betas[k, : VOXELS[s]] = tokens[k].flatten() @ brain[s]
        loss = F.mse_loss(mlp(betas, subject), tokens)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.85  # at most 9 of 24 directions can be seen


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MLP((), n_queries=1, out_dim=1), "subjects"),
        (lambda: MLP((3, 0), n_queries=1, out_dim=1), r"got \[3, 0\]"),
        (lambda: network()(torch.zeros(2, 8), torch.zeros(2).long()), r"of shape \(2, 9\)"),
        (lambda: network()(torch.zeros(2, 9), torch.zeros(2).long(), torch.ones(2, 5).bool()), r"keep \(2, 5\)"),
        (lambda: network()(torch.zeros(2, 9), torch.zeros(2).long(), queries=torch.zeros(1, 3).long()), r"\(2, n\)"),
    ],
)
def test_what_does_not_fit_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
