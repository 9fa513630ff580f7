"""Transfer to a new subject: what is taken over, what stays frozen, and how samples are mixed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methods.brain_it.clustering import nearest_voxel_labels
from methods.brain_it.encoder import BrainEncoder
from methods.brain_it.tokenizer import VoxelLayout, sample_voxels
from methods.brain_it.transfer import BIT_TABLE, ENCODER_TABLE, adopt, epoch_length, frozen_digest, mixed
from methods.brain_it.transformer import BIT

CLUSTERS, DIM = 6, 8


def layout(*voxels: int, seed: int = 0) -> VoxelLayout:
    rng = np.random.default_rng(seed)
    return VoxelLayout.build([rng.integers(0, CLUSTERS, n) for n in voxels], CLUSTERS)


def bit(where: VoxelLayout, seed: int) -> BIT:
    torch.manual_seed(seed)
    return BIT(where, dim=DIM, depth=2, heads=2, n_queries=5, out_dim=3)


def encoder(voxels: tuple[int, ...], seed: int) -> BrainEncoder:
    torch.manual_seed(seed)
    return BrainEncoder(voxels, (4, 7), 9, embed_dim=6, inner=5)


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# --- what is taken over -----------------------------------------------------------------------------------------------


def test_a_voxel_that_starts_from_its_own_copy_is_the_known_voxel() -> None:
    """The new subject is one of the old ones again: nearest voxels are its own, and the tokens are the same."""
    where = layout(40, 30)
    old = bit(where, 0).eval()
    embeddings = np.random.default_rng(1).standard_normal((70, 6)).astype(np.float32)
    labels, nearest = nearest_voxel_labels(3 * embeddings[40:], embeddings, where.labels.numpy())
    assert np.array_equal(nearest, np.arange(40, 70))
    new = bit(VoxelLayout.build([labels], CLUSTERS), 7).eval()
    adopt(new, old.state_dict(), BIT_TABLE, old.tokenizer.voxel_embeddings.detach()[nearest])
    betas = torch.randn(4, 30)
    padded = torch.nn.functional.pad(betas, (0, 10))
    with torch.no_grad():
        known = old(padded, torch.ones(4, dtype=torch.long))
        assert torch.equal(new(betas, torch.zeros(4, dtype=torch.long)), known)


def test_one_parameter_is_left_to_train_and_the_rest_is_the_trained_models() -> None:
    old, new = bit(layout(20, 25), 0), bit(layout(17, seed=3), 1)
    start = torch.randn(17, DIM)
    table = adopt(new, old.state_dict(), BIT_TABLE, start)
    assert [name for name, p in new.named_parameters() if p.requires_grad] == [BIT_TABLE]
    assert table is new.tokenizer.voxel_embeddings and torch.equal(table.detach(), start)
    old_tensors, new_tensors = old.state_dict(), new.state_dict()
    assert old_tensors.keys() == new_tensors.keys()
    assert all(torch.equal(old_tensors[name], new_tensors[name]) for name in old_tensors if name != BIT_TABLE)
    start.zero_()
    assert table.detach().abs().sum() > 0, "a copy, not a view"


def test_without_a_start_the_table_stays_as_it_was_drawn() -> None:
    old, new = encoder((20, 25), 0), encoder((11,), 5)
    drawn = new.voxel_embedding.detach().clone()
    assert torch.equal(adopt(new, old.state_dict(), ENCODER_TABLE).detach(), drawn)
    assert torch.equal(new.readout, old.readout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": "voxels"}, "no parameter 'voxels'"),
        ({"start": torch.zeros(3, DIM)}, r"a start of \(3, 8\) for a voxel table of \(17, 8\)"),
        ({"trained": {"proj.weight": torch.zeros(3, DIM)}}, "do not fit: .*Missing key"),
        ({"trained": {**bit(layout(5), 0).state_dict(), "query_tokens": torch.zeros(2, DIM)}}, "size mismatch"),
        ({"trained": {**bit(layout(5), 0).state_dict(), "other": torch.zeros(2)}}, "Unexpected key"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {"trained": bit(layout(5), 0).state_dict(), "table": BIT_TABLE, "start": None, **change}
    with pytest.raises(ValueError, match=f"(?s)adopt: .*{message}"):
        adopt(bit(layout(17), 1), **arguments)  # type: ignore[arg-type]


# --- what stays frozen ------------------------------------------------------------------------------------------------


def test_training_changes_the_table_and_not_one_bit_of_anything_else() -> None:
    """Two models in a row, as in stage 2: the loss flows through the second one into the first one's table."""
    old, new = bit(layout(20, 25), 0), bit(layout(17, seed=3), 1)
    table = adopt(new, old.state_dict(), BIT_TABLE, torch.randn(17, DIM))
    after = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(5), nn.Linear(4, 2)).eval().requires_grad_(False)
    both = nn.ModuleDict({"bit": new, "after": after})
    before, digest = copies(both), frozen_digest(both)
    optimiser = torch.optim.AdamW([p for p in both.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        keep = sample_voxels(17, 12, 6, generator)
        loss = after(new(torch.randn(6, 17), torch.zeros(6, dtype=torch.long), keep)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    now = copies(both)
    assert [name for name in now if not torch.equal(now[name], before[name])] == [f"bit.{BIT_TABLE}"]
    assert (table.detach() != before[f"bit.{BIT_TABLE}"]).all(dim=1).all(), "every voxel learns"
    assert frozen_digest(both) == digest


def test_the_encoders_table_alone_learns_and_its_loss_falls() -> None:
    old, new = encoder((20, 25), 0), encoder((11,), 5)
    table = adopt(new, old.state_dict(), ENCODER_TABLE)
    before, digest = copies(new), frozen_digest(new)
    features = [torch.randn(8, 9, 4), torch.randn(8, 9, 7)]
    truth = old.predict(features, 0)[:, :11]
    optimiser = torch.optim.Adam([table], lr=3e-2, amsgrad=True)
    losses = []
    new.eval()
    for _ in range(60):
        loss = (new(features, torch.arange(11)) - truth).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    now = copies(new)
    assert [name for name in now if not torch.equal(now[name], before[name])] == [ENCODER_TABLE]
    assert frozen_digest(new) == digest and losses[-1] < losses[0] / 2


def test_the_digest_sees_every_frozen_bit_and_no_trained_one() -> None:
    model = nn.ModuleDict({"bit": bit(layout(9), 0), "norm": nn.BatchNorm1d(3), "narrow": nn.Linear(2, 2).half()})
    adopt(model["bit"], bit(layout(4), 0).state_dict(), BIT_TABLE)
    model["norm"].requires_grad_(False)
    model["narrow"].requires_grad_(False)
    first = frozen_digest(model)
    table = model["bit"].tokenizer.voxel_embeddings  # type: ignore[union-attr]
    with torch.no_grad():
        table.add_(1.0)  # type: ignore[operator]
        assert frozen_digest(model) == first
        for name, value in model.state_dict(keep_vars=True).items():
            if value is table:
                continue
            kept = value.detach().clone()
            flat = value.view(-1)
            flat[-1] = (
                flat[-1] * (1 + 2 * torch.finfo(value.dtype).eps) if value.is_floating_point() and flat[-1] else 1
            )
            assert frozen_digest(model) != first, name
            value.copy_(kept)
            assert frozen_digest(model) == first, name


# --- how samples are mixed --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    n_real=st.integers(1, 30),
    n_predicted=st.integers(0, 50),
    every=st.integers(1, 6),
    batch=st.integers(1, 17),
    seed=st.integers(0, 3),
)
def test_each_recording_once_an_epoch_and_one_in_so_many(
    n_real: int, n_predicted: int, every: int, batch: int, seed: int
) -> None:
    length = epoch_length(n_real, n_predicted, every)
    assert length == (every * n_real if n_predicted else n_real)
    steps = -(-2 * length // batch)
    parts = [
        mixed(np.arange(k * batch, (k + 1) * batch), n_real, n_predicted, every=every, seed=seed) for k in range(steps)
    ]
    samples = np.concatenate(parts)
    assert samples.min() >= 0 and samples.max() < n_real + n_predicted
    for epoch in (samples[:length], samples[length : 2 * length]):
        assert np.array_equal(np.sort(epoch[epoch < n_real]), np.arange(n_real))
    whole = mixed(np.arange(2 * length), n_real, n_predicted, every=every, seed=seed)
    assert np.array_equal(samples[: 2 * length], whole), "whatever is asked at a time"


def test_a_quarter_is_real_and_the_rest_is_drawn_evenly() -> None:
    n_real, n_predicted, epochs = 100, 40, 50
    samples = mixed(np.arange(epochs * 400), n_real, n_predicted).reshape(epochs, 400)
    assert ((samples < n_real).sum(1) == 100).all()
    counts = np.bincount(samples[samples >= n_real] - n_real, minlength=n_predicted)
    expected = epochs * 300 / n_predicted
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 15 < chi_square < 75, "39 degrees of freedom: this far from the mean one time in ten thousand"
    assert not np.array_equal(samples[0], samples[1])
    first = samples[:, :200] < n_real
    assert 0.2 < first.mean() < 0.3, "shuffled: recordings are spread over the epoch"


def test_a_position_keeps_its_sample_in_any_order_and_with_any_company() -> None:
    positions = np.random.default_rng(0).permutation(300)
    whole = mixed(np.arange(300), 20, 9, seed=4)
    assert np.array_equal(mixed(positions, 20, 9, seed=4), whole[positions])
    assert np.array_equal(mixed(np.array([299]), 20, 9, seed=4), whole[299:])
    assert not np.array_equal(mixed(np.arange(300), 20, 9, seed=5), whole)


@pytest.mark.parametrize("arguments", [(0, 3), (3, -1)])
def test_nothing_to_mix_is_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="mixed: "):
        mixed(np.arange(3), *arguments)
    with pytest.raises(ValueError, match="one in 0"):
        mixed(np.arange(3), 3, 3, every=0)
