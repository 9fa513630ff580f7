"""Stages ``lowlevel``, ``semantic`` and ``joint``: batches, validation, what is trained, and resuming."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from benchmark import networks
from benchmark.execute import RunOptions, execute
from benchmark.graph import Stage
from benchmark.shards import Shards
from benchmark.stages import bit as bit_stage
from benchmark.stages.bit import Pool, Validation, build_bit, voxel_layout
from benchmark.stages.features import LowLevelTargets
from benchmark.stages.prepare import Prepared
from benchmark.store import CHECKPOINTS, Store, read_json

pytestmark = pytest.mark.timeout(900)  # the first test that needs the small sweep waits for it


@pytest.fixture(scope="module")
def data(tiny_run: Any) -> Prepared:
    return Prepared(tiny_run.folder("prepare"))


@pytest.fixture(scope="module")
def external(tiny_run: Any) -> Path:
    return tiny_run.folder("external")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- batches ----------------------------------------------------------------------------------------------------------


def check(batch: bit_stage.Batch, data: Prepared, predicted: np.ndarray) -> np.ndarray:
    """Every example is a recording of its subject and of the image of its row; return which ones are predicted."""
    starts = np.concatenate([[0], np.cumsum(data.n_voxels)])
    known = len(data.target_ids)
    assert batch.betas.shape == (len(batch.rows), max(data.n_voxels)) and batch.betas.dtype == torch.float32
    for betas, s, row in zip(batch.betas.numpy(), batch.subject.tolist(), batch.rows.tolist(), strict=True):
        assert not betas[data.n_voxels[s] :].any()
        own = betas[: data.n_voxels[s]]
        if row < known:
            image = data.target_ids[row]
            assert image in data.train_ids, "validation images are never drawn"
            assert np.array_equal(own, data.betas[s][np.searchsorted(data.seen_ids[s], image)])
            assert image in data.seen_ids[s]
        else:
            assert np.array_equal(own, predicted[row - known, starts[s] : starts[s + 1]].astype(np.float32))
    return batch.rows >= known


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.125, 1), (0.5, 4), (0.9, 7)])
def test_a_fraction_of_the_batch_is_external(data: Prepared, external: Path, fraction: float, count: int) -> None:
    pool = Pool(data, external, fraction, seed=0)
    drawn = [pool.draw(8, step, seeded(step)) for step in range(20)]
    for batch in drawn:
        assert check(batch, data, pool.stored[:]).sum() == count
    rows = np.concatenate([batch.rows for batch in drawn])
    assert len({int(s) for batch in drawn for s in batch.subject}) == 2, "subjects are mixed"
    assert len(np.unique(rows[rows < len(data.target_ids)])) > (14 if count < 7 else 5)


def test_an_external_image_is_seen_by_every_brain(data: Prepared, external: Path) -> None:
    pool = Pool(data, external, 0.9, seed=0)
    seen = set()
    for step in range(30):
        batch = pool.draw(8, step, seeded(step))
        seen |= {
            (r, s)
            for r, s in zip(batch.rows.tolist(), batch.subject.tolist(), strict=True)
            if r >= len(data.target_ids)
        }
    assert len(seen) == 6 * 2


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 80), seed=st.integers(0, 5))
def test_an_epoch_holds_every_sample_once(tiny_run: Any, size: int, seed: int) -> None:
    data = Prepared(tiny_run.folder("prepare"))
    pool = Pool(data, tiny_run.folder("external"), None, seed)
    total = len(data.train_ids) + len(data.external)
    steps = -(-2 * total // size)
    rows = np.concatenate([pool.draw(size, step, seeded(step)).rows for step in range(steps)])
    everything = np.sort(np.concatenate([data.target_rows(data.train_ids), len(data.target_ids) + np.arange(6)]))
    first, second = rows[:total], rows[total : 2 * total]
    assert np.array_equal(np.sort(first), everything) and np.array_equal(np.sort(second), everything)
    assert not np.array_equal(first, second), "each epoch has an order of its own"


def test_epochs_draw_what_they_are_asked_for_in_any_order(data: Prepared, external: Path) -> None:
    """A resumed run starts in the middle; its batches are those of the undisturbed one."""
    through = Pool(data, external, None, seed=3)
    all_steps = [through.draw(8, step, seeded(step)) for step in range(12)]
    for step in (11, 4, 5):
        batch = Pool(data, external, None, seed=3).draw(8, step, seeded(step))
        check(batch, data, through.stored[:])
        assert torch.equal(batch.betas, all_steps[step].betas) and np.array_equal(batch.rows, all_steps[step].rows)
    other = Pool(data, external, None, seed=4).draw(8, 4, seeded(4))
    assert not np.array_equal(other.rows, all_steps[4].rows)


def test_threads_may_draw_at_the_same_time(data: Prepared, external: Path) -> None:
    """Of one pool, over the ends of epochs: as the threads that read ahead do."""
    shared, alone = (Pool(data, external, None, seed=3) for _ in range(2))
    steps = list(range(60))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda step: shared.draw(8, step, seeded(step)), steps))
    for step, batch in zip(steps, found, strict=True):
        expected = alone.draw(8, step, seeded(step))
        assert torch.equal(batch.betas, expected.betas) and np.array_equal(batch.rows, expected.rows)


@pytest.mark.parametrize("fraction", [None, 0.25])
def test_a_batch_follows_from_its_generator(data: Prepared, external: Path, fraction: float | None) -> None:
    pool = Pool(data, external, fraction, seed=0)
    a, b, c = (pool.draw(8, 1, seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(a.betas, b.betas) and torch.equal(a.subject, b.subject) and np.array_equal(a.rows, b.rows)
    if fraction is not None:
        assert not np.array_equal(a.rows, c.rows)


def test_without_external_images_all_samples_are_measured(data: Prepared, tmp_path: Path) -> None:
    for fraction in (None, 0.5):
        pool = Pool(data, tmp_path, fraction, seed=0)
        assert not check(pool.draw(8, 0, seeded(0)), data, np.zeros((0, sum(data.n_voxels)), np.float16)).any()


def test_validation_is_the_same_each_time_and_complete(data: Prepared) -> None:
    a, b = Validation(data).batches(3), Validation(data).batches(3)
    assert [len(batch.rows) for batch in a] == [3, 1]
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one.betas, other.betas) and np.array_equal(one.rows, other.rows)
        assert torch.equal(one.subject, other.subject)
    rows = np.concatenate([batch.rows for batch in a])
    assert np.array_equal(np.sort(rows), data.target_rows(data.validation_ids)), "each recording once"
    for batch in a:
        for betas, s, row in zip(batch.betas.numpy(), batch.subject.tolist(), batch.rows.tolist(), strict=True):
            image = data.target_ids[row]
            assert np.array_equal(betas[: data.n_voxels[s]], data.betas[s][np.searchsorted(data.seen_ids[s], image)])


# --- what is trained --------------------------------------------------------------------------------------------------


def test_training_beats_the_start_and_the_best_weights_are_kept(tiny_run: Any, tmp_path: Path) -> None:
    stage = tiny_run.stage("semantic", "clusters=8")
    training = {**stage.config["training"], "steps": 40, "validate_every": 10}
    ctx = tiny_run.context(stage, tmp_path / "out", training=training)
    summary = bit_stage.run_semantic(ctx)
    before = read_json(tiny_run.folder("semantic", "clusters=8") / "status.json")["summary"]
    assert summary["loss"] < before["loss"] and summary["best_step"] in (10, 20, 30, 40)

    data = Prepared(tiny_run.folder("prepare"))
    targets = torch.from_numpy(Shards(tiny_run.folder("targets") / "semantic")[:]).float()
    bit = build_bit(stage.config, voxel_layout(data, tiny_run.folder("clusters", "clusters=8")), 16, 320).eval()
    bit.load_state_dict(load_file(ctx.out / "bit.safetensors"))
    with torch.no_grad():
        pairs = [(bit(b.betas, b.subject), targets[b.rows]) for b in Validation(data).batches(8)]
    predicted, true = (torch.cat(side) for side in zip(*pairs, strict=True))
    assert float((predicted - true).square().mean()) == pytest.approx(summary["loss"], rel=1e-4)
    assert summary["parameters"] == sum(p.numel() for p in bit.parameters())


def test_the_calibration_is_the_best_linear_map_on_the_validation_images(tiny_run: Any) -> None:
    folder, stage = tiny_run.folder("lowlevel"), tiny_run.stage("lowlevel")
    data = Prepared(tiny_run.folder("prepare"))
    targets = LowLevelTargets(tiny_run.folder("targets"), dict(stage.config))
    tokens = targets.tokens
    bit = build_bit(stage.config, voxel_layout(data, tiny_run.folder("clusters")), tokens.tokens, tokens.width).eval()
    bit.load_state_dict(load_file(folder / "bit.safetensors"))
    validation = Validation(data).batches(100)[0]
    with torch.no_grad():
        predicted = bit(validation.betas, validation.subject).double()
    true = targets(validation.rows).double()
    matrices = load_file(folder / "calibration.safetensors")
    assert sorted(matrices) == ["0", "1", "2", "3", "4"]
    for k, (x, y) in enumerate(
        zip(predicted.split(tokens.layer_sizes, 1), true.split(tokens.layer_sizes, 1), strict=True)
    ):
        x, y = x.flatten(0, 1), y.flatten(0, 1)
        matrix = matrices[str(k)].double()
        assert float((x @ matrix - y).square().sum()) <= float(min(y.square().sum(), (x - y).square().sum()))
        penalty = 1e-3 * x.square().sum(0).mean()
        gradient = x.T @ (x @ matrix - y) + penalty * matrix
        assert float(gradient.norm()) < 1e-3 * float((x.T @ y).norm())


@pytest.mark.parametrize("role", ["lowlevel", "semantic"])
def test_the_seed_decides_weights_and_batches(tiny_run: Any, tmp_path: Path, role: str) -> None:
    run = getattr(bit_stage, f"run_{role}")
    stage = tiny_run.stage(role)
    run(tiny_run.context(stage, tmp_path / "again"))
    again = (tmp_path / "again" / "bit.safetensors").read_bytes()
    assert again == (tiny_run.folder(role) / "bit.safetensors").read_bytes(), "also in another process"
    run(tiny_run.context(stage, tmp_path / "other", seed=1))
    assert (tmp_path / "other" / "bit.safetensors").read_bytes() != again
    run(tiny_run.context(stage, tmp_path / "batches", training={**stage.config["training"], "seed": 1}))
    assert (tmp_path / "batches" / "bit.safetensors").read_bytes() != again


def test_sampled_voxels_train_too(tiny_run: Any, tmp_path: Path) -> None:
    """The paper's way: some voxels an example, one pool of all samples, a plain start."""
    stage = tiny_run.stage("lowlevel")
    ctx = tiny_run.context(stage, tmp_path / "out", voxels_per_example=40, external_fraction=None)
    assert np.isfinite(bit_stage.run_lowlevel(ctx)["loss"])
    assert (ctx.out / "bit.safetensors").read_bytes() != (tiny_run.folder("lowlevel") / "bit.safetensors").read_bytes()


def test_embeddings_can_start_from_the_encoders(tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[torch.Tensor] = []

    def fit(ctx: Any, bit: Any, *rest: Any) -> dict[str, Any]:
        starts.append(bit.tokenizer.voxel_embeddings.detach().clone())
        return {}

    monkeypatch.setattr(bit_stage, "_fit", fit)
    stage = tiny_run.stage("semantic")
    for name, std in (("random", None), ("encoder", None), ("encoder", None), ("encoder", 0.5), ("random", 0.5)):
        settings = {"embedding_init": name, "embedding_std": std}
        bit_stage.run_semantic(tiny_run.context(stage, tmp_path / "out", **settings))
    random, start, again, large, large_random = starts
    assert torch.equal(start, again) and not torch.equal(start, random)
    assert float(random.std()) == pytest.approx(0.05 / random.shape[1] ** 0.5, rel=0.05), "the official code's"
    assert float(start.std()) == pytest.approx(float(random.std())), "at the scale of the random start"
    for table, wide in ((start, large), (random, large_random)):
        assert float(wide.std()) == pytest.approx(0.5)
        torch.testing.assert_close(wide / wide.std(), table / table.std())
    known = load_file(tiny_run.folder("encoder") / "encoder.safetensors")["voxel_embedding"]
    basis = torch.cat([known, torch.ones(len(known), 1)], 1)
    for table, is_linear in ((start, True), (random, False)):
        rest = table - basis @ torch.linalg.lstsq(basis, table).solution
        assert (float(rest.norm() / table.norm()) < 1e-3) == is_linear


def test_joint_training_changes_brain_and_denoiser(tiny_run: Any) -> None:
    folder = tiny_run.folder("joint")
    bit, before = load_file(folder / "bit.safetensors"), load_file(tiny_run.folder("semantic") / "bit.safetensors")
    assert bit.keys() == before.keys()
    moved = [key for key in bit if bit[key].is_floating_point() and not torch.equal(bit[key], before[key])]
    assert "tokenizer.voxel_embeddings" in moved and len(moved) > len(bit) / 2
    shipped = networks.generator("demo").unet.state_dict()  # type: ignore[attr-defined]
    unet = load_file(folder / "unet.safetensors")
    assert unet.keys() == shipped.keys()
    assert sum(not torch.equal(unet[key], shipped[key]) for key in unet) > len(unet) / 2
    summary = read_json(folder / "status.json")["summary"]
    assert summary["best_step"] in (1, 2) and {"loss", "loss before"} <= summary.keys()
    assert summary["parameters"] == sum(p.numel() for p in networks.generator("demo").unet.parameters()) + sum(  # type: ignore[attr-defined]
        bit[name].numel() for name in bit if bit[name].is_floating_point()
    )


# --- resuming ---------------------------------------------------------------------------------------------------------

KILL_AT = 5

SCRIPT = """
import json, os, signal, sys
from dataclasses import replace
from benchmark.execute import RunOptions, execute
from benchmark.graph import Stage
from benchmark import training
from benchmark.store import Store

take = training._Batches.take
def deadly(self, step):
    if step == {kill_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return take(self, step)
training._Batches.take = deadly
stage = Stage.from_dict(json.load(open(sys.argv[2])))
execute(stage, Store(sys.argv[1]), RunOptions(threads=1, progress=False, checkpoint_seconds=0.0))
"""


def test_kill_9_in_the_middle_changes_no_bit_of_the_result(
    tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage: Stage = tiny_run.stage("lowlevel")
    training = {**stage.config["training"], "steps": 8, "validate_every": 3}
    stage = replace(stage, config={**stage.config, "training": training})
    store = Store(tmp_path / "store")
    for upstream in stage.upstream.values():
        for one in (upstream, *upstream.upstream.values()):
            store.folder(one).parent.mkdir(parents=True, exist_ok=True)
            if not store.folder(one).exists():
                store.folder(one).symlink_to(tiny_run.store.folder(one))
    (tmp_path / "stage.json").write_text(json.dumps(stage.to_dict()))
    killed = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(kill_at=KILL_AT), str(store.root), str(tmp_path / "stage.json")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    state = store.state(stage)
    assert state.kind == "interrupted" and state.resumable
    assert len(list((store.folder(stage) / CHECKPOINTS).rglob("*.safetensors"))) >= 1

    steps: list[int] = []
    draw = Pool.draw
    monkeypatch.setattr(Pool, "draw", lambda self, size, step, g: steps.append(step) or draw(self, size, step, g))
    options = RunOptions(threads=1, progress=False)
    assert execute(stage, store, options).state == "done"
    assert steps == list(range(KILL_AT, 8)), "it goes on from the last checkpoint"

    steps.clear()
    folder = store.folder(stage)
    kept = {name: (folder / name).read_bytes() for name in ("bit.safetensors", "calibration.safetensors")}
    summary = store.status(stage)["summary"]
    assert not (folder / CHECKPOINTS).exists()
    assert execute(stage, store, replace(options, force=True)).state == "done"
    assert steps == list(range(8)), "undisturbed"
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    assert store.status(stage)["summary"] == summary
