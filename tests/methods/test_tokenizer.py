"""The fast Brain Tokenizer against PyG's TransformerConv, and the invariances of the tokens."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from methods.brain_it.tokenizer import BrainTokenizer, ReferenceTokenizer, VoxelLayout, sample_voxels

DIM, N_CLUSTERS = 16, 7


def unequal_layout() -> VoxelLayout:
    """Subjects of unequal sizes; cluster 6 empty everywhere, others for some subjects, one of a single voxel."""
    rng = np.random.default_rng(0)
    return VoxelLayout.build(
        [
            rng.choice(6, size=40, p=[0.6, 0.2, 0.1, 0.05, 0.03, 0.02]),
            np.array([2, 2, 0, 5, 2]),
            rng.integers(0, 3, size=23),
            np.array([4]),
        ],
        N_CLUSTERS,
    )


def make_tokenizer(layout: VoxelLayout, dtype: torch.dtype = torch.float64, seed: int = 0) -> BrainTokenizer:
    """A tokenizer with tables large enough that the softmax is far from uniform."""
    torch.manual_seed(seed)
    tokenizer = BrainTokenizer(layout, DIM).to(dtype)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return tokenizer


def make_batch(layout: VoxelLayout, subjects: list[int], seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    betas = torch.randn(len(subjects), layout.max_voxels, generator=generator, dtype=torch.float64)
    for row, subject in zip(betas, subjects, strict=True):
        row[layout.n_voxels[subject] :] = 0
    return betas, torch.tensor(subjects)


def all_finite(module: torch.nn.Module) -> bool:
    """Whether every parameter has a gradient without NaN or infinity."""
    return all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in module.parameters())


def gradients(module: torch.nn.Module, betas: Tensor, subject: Tensor, keep: Tensor | None) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of the tokens, by official parameter name, and of the betas."""
    betas = betas.clone().requires_grad_()
    tokens = module(betas, subject, keep)
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (tokens * weights.to(tokens.dtype)).sum().backward()
    grads = {name.removeprefix("conv."): parameter.grad for name, parameter in module.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    return {"tokens": tokens.detach(), "betas": betas.grad, **grads}


@pytest.mark.parametrize("subjects", [[0, 1, 2, 3, 0, 2], [2, 2], [3], [1, 0, 1]])
@pytest.mark.parametrize("sampled", ["all", "some", "few", "none"])
def test_equals_pyg_with_gradients(subjects: list[int], sampled: str) -> None:
    layout = unequal_layout()
    fast = make_tokenizer(layout)
    betas, subject = make_batch(layout, subjects)
    draws = {"all": None, "some": 12, "few": 1, "none": 0}[sampled]
    keep = None
    if draws is not None:
        sizes = torch.tensor(layout.n_voxels)[subject]
        keep = sample_voxels(sizes, draws, len(subject), torch.Generator().manual_seed(5), layout.max_voxels)
    got = gradients(fast, betas, subject, keep)
    want = gradients(ReferenceTokenizer.from_fast(fast), betas, subject, keep)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_equals_pyg_in_float32_at_initialisation() -> None:
    layout = VoxelLayout.build([np.random.default_rng(s).integers(0, 32, 200 + 50 * s) for s in range(3)], 32)
    torch.manual_seed(0)
    fast = BrainTokenizer(layout, 48)
    betas, subject = make_batch(layout, [0, 2, 1, 2, 0])
    keep = sample_voxels(torch.tensor(layout.n_voxels)[subject], 120, 5, torch.Generator().manual_seed(0), 300)
    got = gradients(fast, betas.float(), subject, keep)
    want = gradients(ReferenceTokenizer.from_fast(fast), betas.float(), subject, keep)
    for name, value in want.items():
        size = float(value.abs().max())
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=2e-5 * max(size, 0.1), msg=name)


def test_padding_and_unsampled_voxels_do_not_matter() -> None:
    layout = unequal_layout()
    fast = make_tokenizer(layout)
    betas, subject = make_batch(layout, [1, 2, 3])
    keep = torch.zeros(betas.shape, dtype=torch.bool)
    keep[0, [0, 3]] = keep[1, ::2] = keep[2, 0] = True
    tokens = fast(betas, subject, keep)
    noisy = torch.where(keep, betas, torch.tensor(1e6, dtype=betas.dtype))
    torch.testing.assert_close(fast(noisy, subject, keep), tokens, rtol=0, atol=0)
    beyond = torch.arange(layout.max_voxels) >= torch.tensor(layout.n_voxels)[subject, None]
    torch.testing.assert_close(fast(betas, subject, keep | beyond), tokens, rtol=0, atol=0)
    torch.testing.assert_close(fast(betas.masked_fill(beyond, 7.0), subject), fast(betas, subject), rtol=0, atol=0)


def test_empty_cluster_is_the_skip_term_and_has_finite_gradients() -> None:
    layout = unequal_layout()
    fast = make_tokenizer(layout)
    betas, subject = make_batch(layout, [1])
    tokens = fast(betas, subject)
    skip = fast.norm(torch.relu(fast.lin_skip(fast.cluster_embeddings)))
    empty = [1, 3, 4, 6]
    torch.testing.assert_close(tokens[0, empty], skip[empty])
    assert not torch.isclose(tokens[0, [0, 2, 5]], skip[[0, 2, 5]]).all(-1).any()
    fast(betas, subject, torch.zeros_like(betas, dtype=torch.bool)).square().sum().backward()
    assert all_finite(fast)


def test_extreme_scores_stay_finite() -> None:
    layout = unequal_layout()
    fast = make_tokenizer(layout, torch.float32)
    betas, subject = make_batch(layout, [0, 2])
    tokens = fast(1e4 * betas.float(), subject)
    tokens.sum().backward()
    assert torch.isfinite(tokens).all()
    assert all_finite(fast)


def test_nothing_of_size_batch_x_voxels_x_dim_is_built(largest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor is the table's gradient: blocks of clusters are padded, and far smaller."""
    layout = VoxelLayout.build([np.arange(120) % N_CLUSTERS] * 2, N_CLUSTERS)
    fast = make_tokenizer(layout)
    betas, subject = make_batch(layout, [0, 1] * 8)
    monkeypatch.setattr("methods.brain_it.tokenizer._BLOCK_ELEMENTS_CPU", fast.voxel_embeddings.numel() // 4)
    with largest:
        fast(betas, subject).sum().backward()
    assert largest.elements == fast.voxel_embeddings.numel() < betas.numel() * DIM / 4


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), subject=st.integers(0, 3))
def test_order_of_voxels_within_a_subject_does_not_matter(seed: int, subject: int) -> None:
    layout = unequal_layout()
    fast = make_tokenizer(layout)
    rows = layout.rows(subject)
    shuffle = torch.from_numpy(np.random.default_rng(seed).permutation(layout.n_voxels[subject]))
    labels = [layout.labels[layout.rows(s)] for s in range(layout.n_subjects)]
    labels[subject] = labels[subject][shuffle]
    other = BrainTokenizer(VoxelLayout.build(labels, N_CLUSTERS), DIM).double()
    weights = copy.deepcopy(fast.state_dict())
    weights["voxel_embeddings"][rows] = weights["voxel_embeddings"][rows][shuffle]
    other.load_state_dict(weights)
    betas, subjects = make_batch(layout, [0, subject, 2])
    shuffled = betas.clone()
    for row in (subjects == subject).nonzero().flatten():
        shuffled[row, : len(shuffle)] = betas[row, shuffle]
    torch.testing.assert_close(other(shuffled, subjects), fast(betas, subjects), rtol=1e-10, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_renaming_clusters_permutes_the_tokens(seed: int) -> None:
    layout = unequal_layout()
    fast = make_tokenizer(layout)
    names = torch.from_numpy(np.random.default_rng(seed).permutation(N_CLUSTERS))  # old name -> new name
    labels = [names[layout.labels[layout.rows(s)]] for s in range(layout.n_subjects)]
    other = BrainTokenizer(VoxelLayout.build(labels, N_CLUSTERS), DIM).double()
    weights = copy.deepcopy(fast.state_dict())
    weights["cluster_embeddings"] = weights["cluster_embeddings"][names.argsort()]
    other.load_state_dict(weights)
    betas, subjects = make_batch(layout, [0, 1, 2, 3])
    torch.testing.assert_close(other(betas, subjects)[:, names], fast(betas, subjects), rtol=1e-10, atol=1e-12)


def test_examples_of_a_batch_are_independent() -> None:
    layout = unequal_layout()
    fast = make_tokenizer(layout)
    betas, subject = make_batch(layout, [0, 3, 1, 0, 2])
    keep = sample_voxels(torch.tensor(layout.n_voxels)[subject], 9, 5, torch.Generator().manual_seed(0), 40)
    together = fast(betas, subject, keep)
    alone = torch.cat([fast(betas[i : i + 1], subject[i : i + 1], keep[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


def test_the_voxel_table_may_be_the_only_trained_parameter() -> None:
    layout = unequal_layout()
    fast = make_tokenizer(layout)
    betas, subject = make_batch(layout, [0, 1])
    expected = gradients(make_tokenizer(layout), betas, subject, None)["voxel_embeddings"]
    fast.requires_grad_(False).voxel_embeddings.requires_grad_(True)
    tokens = fast(betas, subject)
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (tokens * weights).sum().backward()
    assert fast.voxel_embeddings.grad is not None
    torch.testing.assert_close(fast.voxel_embeddings.grad, expected, rtol=0, atol=0)
    assert not fast.voxel_embeddings.grad[layout.rows(2)].any()
    fast.requires_grad_(False).cluster_embeddings.requires_grad_(True)
    fast(betas, subject).sum().backward()
    assert fast.cluster_embeddings.grad is not None


def test_attention_stays_float32_under_autocast() -> None:
    layout = unequal_layout()
    fast = make_tokenizer(layout, torch.float32)
    betas, subject = make_batch(layout, [0, 2, 1])
    expected = fast(betas.float(), subject)
    pooled, _ = fast._pool(betas.float(), subject, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast._pool(betas.float(), subject, None)[0], pooled)
        tokens = fast(betas.float(), subject)
    torch.testing.assert_close(tokens.float(), expected, rtol=0.05, atol=0.05)
    tokens.float().sum().backward()
    assert all_finite(fast)


def test_close_to_pyg_in_bf16() -> None:
    """Under bf16 autocast, within 5 % of the size of PyG's values and gradients in float64."""
    layout = unequal_layout()
    fast = make_tokenizer(layout, torch.float32)
    betas, subject = make_batch(layout, [0, 2, 1, 2, 0])
    exact = ReferenceTokenizer.from_fast(copy.deepcopy(fast).double())
    want = gradients(exact, betas.float().double(), subject, None)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(fast, betas.float(), subject, None)
    for name, value in want.items():
        if name != "lin_key.bias":  # zero but for rounding
            assert float((got[name].double() - value).norm() / value.norm()) < 0.05, name


@pytest.mark.parametrize("rows", [1, 5, 20, 1000])
def test_the_size_of_blocks_does_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = unequal_layout()
    betas, subject = make_batch(layout, [0, 3, 1, 0, 2, 0])
    keep = sample_voxels(torch.tensor(layout.n_voxels)[subject], 9, 6, torch.Generator().manual_seed(0), 40)
    want = gradients(make_tokenizer(layout), betas, subject, keep)
    monkeypatch.setattr("methods.brain_it.tokenizer._BLOCK_ELEMENTS_CPU", rows * DIM)
    got = gradients(make_tokenizer(layout), betas, subject, keep)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_initialisation_follows_the_official_code() -> None:
    torch.manual_seed(0)
    fast = BrainTokenizer(VoxelLayout.build([np.arange(4000) % 500], 500), 64)
    for table in (fast.voxel_embeddings.detach(), fast.cluster_embeddings.detach()):
        assert float(table.std()) == pytest.approx(0.1 / 16, rel=0.02)
        assert float(table.mean()) == pytest.approx(0, abs=1e-4)
    conv = ReferenceTokenizer(fast.layout, 64).conv
    for name in ("lin_key", "lin_query", "lin_value", "lin_skip"):
        mine, pyg = getattr(fast, name), getattr(conv, name)
        for a, b in zip(mine.state_dict().values(), pyg.state_dict().values(), strict=True):
            assert a.shape == b.shape
            assert float(a.abs().max()) == pytest.approx(1 / 8, rel=0.1)
            assert float(b.abs().max()) == pytest.approx(1 / 8, rel=0.1)


def test_state_dict_holds_parameters_only() -> None:
    fast = BrainTokenizer(unequal_layout(), DIM)
    assert set(fast.state_dict()) == {name for name, _ in fast.named_parameters()}


def test_layout_lists_members_in_order() -> None:
    layout = unequal_layout()
    assert layout.n_voxels == (40, 5, 23, 1) and layout.starts == (0, 40, 45, 68)
    assert (layout.n_subjects, layout.max_voxels, layout.total_voxels) == (4, 40, 69)
    for subject in range(4):
        labels = layout.labels[layout.rows(subject)]
        for cluster in range(N_CLUSTERS):
            low, high = layout.bounds[subject, cluster : cluster + 2].tolist()
            expected = (labels == cluster).nonzero().flatten()
            assert torch.equal(layout.order[subject, low:high], expected)


@pytest.mark.parametrize(
    "labels",
    [
        [],
        [np.array([], dtype=np.int64)],
        [np.array([0.0, 1.0])],
        [np.array([0, 3])],
        [np.array([-1])],
        [np.eye(2, dtype=np.int64)],
    ],
)
def test_layout_refuses_bad_labels(labels: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="labels"):
        VoxelLayout.build(labels, 3)


def test_tokenizer_refuses_bad_shapes() -> None:
    fast = BrainTokenizer(unequal_layout(), DIM)
    with pytest.raises(ValueError, match=r"\(2, 40\).*\(2, 39\)"):
        fast(torch.zeros(2, 39), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="keep"):
        fast(torch.zeros(2, 40), torch.tensor([0, 1]), torch.ones(1, 40, dtype=torch.bool))


def test_sample_voxels_draws_with_replacement() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = sample_voxels(2000, 1000, 64, generator)
    assert mask.shape == (64, 2000) and mask.dtype == torch.bool
    expected = 2000 * (1 - (1 - 1 / 2000) ** 1000)
    assert float(mask.sum(1).float().mean()) == pytest.approx(expected, rel=0.01)
    assert float(mask[:, :1000].sum() / mask.sum()) == pytest.approx(0.5, abs=0.02)
    sizes = torch.tensor([3, 10, 1])
    mixed = sample_voxels(sizes, 200, 3, generator, width=12)
    assert mixed.shape == (3, 12) and mixed.sum(1).tolist() == [3, 10, 1]
    assert torch.equal(
        sample_voxels(50, 9, 4, torch.Generator().manual_seed(7)),
        sample_voxels(50, 9, 4, torch.Generator().manual_seed(7)),
    )
