"""What stands in a BIT's place: MLP, ridge, the true features; fewer external images; and the sweeps made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import Ridge as SklearnRidge
from torch.nn import functional as F

from benchmark.config import Variant, demo
from benchmark.errors import UserError
from benchmark.graph import Stage
from benchmark.stages import KINDS, baselines, image_name, reconstruct, variant_stages
from benchmark.stages import score as score_stage
from benchmark.stages.baselines import FittedPredictor, Targets, build_network, load_predictor
from benchmark.stages.bit import Pool, Validation, draw, lowlevel_loss, open_pool
from benchmark.stages.features import LowLevelTargets, SemanticTargets
from benchmark.stages.prepare import Prepared
from benchmark.stages.reconstruct import read_images
from benchmark.store import Store
from benchmark.sweeps import load_sweep
from leaderboard.schema import read_leaderboard
from methods.baselines.ridge import Ridge
from methods.brain_it.vgg_tokens import calibrate
from methods.predictors import ridge

pytestmark = pytest.mark.timeout(900)  # the first test that needs the small sweep waits for it


@dataclass(frozen=True)
class Made:
    """The sweep ``baselines`` at the sizes of the small sweep, finished."""

    out: Path
    answer: Any
    base: Variant

    @property
    def store(self) -> Store:
        return Store(self.out / "store")

    def stage(self, name: str, value: str) -> Stage:
        """A stage of a variant, by its name."""
        variant = self.base.with_settings(load_sweep("baselines").settings()[f"predictor={value}"])
        own = variant_stages(variant, value)
        return {stage.name: stage for stage in (*own.chain, own.references)}[name]

    def folder(self, name: str, value: str) -> Path:
        """The result of a stage."""
        return self.store.folder(self.stage(name, value))


def arguments(tiny_run: Any, sweep: str, out: Path) -> list[str | Path]:
    """The small sweep's options, for another sweep."""
    return [sweep, *tiny_run.arguments[1:], "--no-progress", "--out", out]


@pytest.fixture(scope="module")
def made(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory, sweep_process: Callable[..., Any]) -> Made:
    """What the small sweep of clusters has finished, and the rest of the sweep ``baselines``."""
    out = tmp_path_factory.mktemp("baselines") / "runs"
    shutil.copytree(tiny_run.out, out, ignore=shutil.ignore_patterns("leaderboard"))
    answer = sweep_process(*arguments(tiny_run, "baselines", out))
    assert answer.code == 0, answer.err
    return Made(out, answer, tiny_run.variants["clusters=128"])


@pytest.fixture(scope="module")
def data(tiny_run: Any) -> Prepared:
    return Prepared(tiny_run.folder("prepare"))


@pytest.fixture
def context(made: Made, tiny_run: Any, tmp_path: Path) -> Callable[..., Any]:
    """What a stage of the sweep ``baselines`` is handed."""
    finished = replace(tiny_run, out=made.out)

    def make(name: str, value: str, **changes: Any) -> Any:
        return finished.context(made.stage(name, value), tmp_path / f"{name}-{value}", **changes)

    return make


def recordings(data: Prepared, subject: int) -> tuple[torch.Tensor, np.ndarray]:
    """A subject's (position's) recordings of its training images, n x voxels, and the target rows of these."""
    samples = data.samples(data.train_ids)
    own = samples.subject == subject
    return torch.from_numpy(np.array(data.betas[subject][samples.row[own]])), data.target_rows(samples.image[own])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the sweep --------------------------------------------------------------------------------------------------------


def test_what_the_variants_share_with_other_sweeps_is_not_computed_again(made: Made) -> None:
    """The sweep of clusters has left all of brain-it behind, and of bit everything but its images."""
    first = made.answer.out.splitlines()[0]
    assert "sweep baselines (demo, quick): 5 variants, 24 stages: 12 to run, 12 cached" in first


def test_rows_are_named_for_what_predicts_and_the_oracle_is_not_ranked(made: Made) -> None:
    rows = {row.variant: row for row in read_leaderboard(made.out / "leaderboard" / "leaderboard.json")}
    assert {name: (row.method, row.kind) for name, row in rows.items() if name.startswith("predictor=")} == {
        "predictor=ridge": ("ridge", "method"),
        "predictor=mlp": ("MLP", "method"),
        "predictor=bit": ("Brain-IT", "method"),
        "predictor=brain-it": ("Brain-IT", "method"),
        "predictor=oracle": ("reference", "reference"),
        "predictor=brain-it, low-level image alone": ("Brain-IT", "branch"),
        "predictor=brain-it, semantic image alone": ("Brain-IT", "branch"),
    }
    assert {"mean image", "shuffled", "chance"} < set(rows)
    cost = {name: rows[f"predictor={name}"].cost.parameters for name in ("ridge", "mlp", "bit", "brain-it", "oracle")}
    assert cost["ridge"] == cost["oracle"] == 0 < cost["bit"] < cost["brain-it"], "the last trains the denoiser, too"
    for name in ("mlp", "bit"):
        assert rows[f"predictor={name}"].metrics.keys() == rows["predictor=oracle"].metrics.keys()


def test_the_oracle_is_the_ceiling(made: Made) -> None:
    table = {
        value: pd.read_parquet(made.folder("score", value) / "scores.parquet").query("metric == 'PixCorr'")
        for value in ("ridge", "mlp", "bit", "oracle")
    }
    mean = {value: own.groupby("variant")["value"].mean() for value, own in table.items()}
    assert all(mean["oracle"]["semantic"] > mean[value]["semantic"] + 0.2 for value in ("ridge", "mlp", "bit"))
    assert mean["oracle"]["combined"] > 0.4


def test_without_joint_training_the_generator_is_as_it_was_made(made: Made) -> None:
    names = [image_name(s, i) for s, i in np.load(made.folder("reconstruct", "bit") / "index.npy").tolist()]
    with_joint, without = (made.folder("reconstruct", value) for value in ("brain-it", "bit"))
    for kind in KINDS:
        same = np.array_equal(read_images(with_joint / kind, names), read_images(without / kind, names))
        assert same == (kind == "lowlevel")
    assert made.stage("lowlevel", "bit").fingerprint == made.stage("lowlevel", "brain-it").fingerprint


# --- MLP --------------------------------------------------------------------------------------------------------------


def test_an_mlp_sees_the_batches_of_the_bit(made: Made, data: Prepared, context: Callable[..., Any]) -> None:
    mlp, bit = (open_pool(context("lowlevel", value), data) for value in ("mlp", "bit"))
    for step in range(3):
        ours, theirs = (pool.draw(8, step, seeded(step)) for pool in (mlp, bit))
        assert torch.equal(ours.betas, theirs.betas) and np.array_equal(ours.rows, theirs.rows)


def test_the_squared_error_weighs_layers_alike(data: Prepared, context: Callable[..., Any]) -> None:
    ctx = context("lowlevel", "mlp")
    targets = Targets.of(ctx, data)
    assert targets.lowlevel is not None
    model = build_network(ctx.config, data, targets).eval()
    batch = Validation(data).batches(3)[0]
    tokens = targets.lowlevel.tokens
    positions = tokens.sample_positions(len(batch.rows), seeded(5))
    with torch.no_grad():
        drawn = draw(ctx.config, data, batch, seeded(5), targets.lowlevel.read, tokens, training=False)
        loss, predicted, true = lowlevel_loss(model, drawn, targets.lowlevel, None, "cpu")
        everything = model(batch.betas, batch.subject)
    index = positions[..., None].expand(-1, -1, tokens.width)
    torch.testing.assert_close(predicted, everything.gather(1, index))
    torch.testing.assert_close(true, targets(batch.rows).gather(1, index))
    starts = np.cumsum([0, *tokens.sampled_sizes])
    layers = [F.mse_loss(predicted[:, a:b], true[:, a:b]) for a, b in zip(starts, starts[1:], strict=False)]
    torch.testing.assert_close(loss, torch.stack(layers).mean())


@pytest.mark.parametrize("predictor", ["mlp-infonce", "mlp-mse"])
def test_a_trained_mlp_is_kept_and_read_again(
    predictor: str, made: Made, data: Prepared, context: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {"predictor": predictor} | ({"scale": None} if predictor == "mlp-mse" else {})
    ctx = context("lowlevel", "mlp", **changed)
    summary = baselines.run_network(ctx)
    assert np.isfinite([summary["loss"], summary["correlation"]]).all()
    targets = Targets.of(ctx, data)
    model = build_network(ctx.config, data, targets)
    model.load_state_dict(load_file(ctx.out / "mlp.safetensors"))
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    before = load_file(made.folder("lowlevel", "mlp") / "mlp.safetensors")
    same = all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert same == (predictor == "mlp-infonce"), "the same training twice gives the same bits; another loss others"
    # The calibration is the least-squares map to the true tokens of the validation images.
    found = load_file(ctx.out / "calibration.safetensors")
    sizes = targets.layers
    with torch.no_grad():
        pairs = [(model.eval()(b.betas, b.subject), targets(b.rows)) for b in Validation(data).batches(4)]
    predicted, true = (torch.cat(side) for side in zip(*pairs, strict=True))
    mapped = calibrate(predicted, sizes, [found[str(k)] for k in range(len(sizes))])
    for ours, raw, real in zip(mapped.split(sizes, 1), predicted.split(sizes, 1), true.split(sizes, 1), strict=True):
        assert F.mse_loss(ours, real) <= F.mse_loss(raw, real)


# --- ridge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", ["lowlevel", "semantic"])
def test_a_ridge_predicts_what_sklearns_does(
    branch: str, made: Made, data: Prepared, context: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "IMAGES", 5)  # so that targets are read in parts
    ctx = context("reconstruct", "ridge")
    predict = load_predictor(ctx, branch, data)
    assert isinstance(predict, FittedPredictor)
    targets = predict.targets
    named = json.loads((made.folder(branch, "ridge") / "ridge.json").read_text())["alphas"]
    alphas = [named[str(subject)] for subject in data.subjects]
    assert [len(own) for own in alphas] == [len(targets.layers)] * 2
    (batch,) = Validation(data).batches(100)
    assert set(batch.subject.tolist()) == {0, 1}
    found = predict(batch.betas, batch.subject)
    for s in (0, 1):
        x, rows = recordings(data, s)
        assert set(data.target_ids[rows]) <= set(data.train_ids)
        here = batch.subject == s
        for alpha, y, ours in zip(
            alphas[s], targets(rows).split(targets.layers, 1), found[here].split(targets.layers, 1), strict=True
        ):
            model = SklearnRidge(alpha=alpha, solver="svd").fit(x.double().numpy(), y.flatten(1).double().numpy())
            expected = model.predict(batch.betas[here, : data.n_voxels[s]].double().numpy())
            np.testing.assert_allclose(ours.flatten(1).numpy(), expected, atol=1e-4)


def test_a_ridges_penalties_are_chosen_layer_by_layer_on_training_images(
    made: Made, data: Prepared, context: Callable[..., Any]
) -> None:
    ctx = context("lowlevel", "ridge")
    targets = Targets.of(ctx, data)
    columns = ridge.drawn_columns(targets.layers, targets.width, ctx.config["seed"])
    named = json.loads((made.folder("lowlevel", "ridge") / "ridge.json").read_text())["alphas"]
    for s, subject in enumerate(data.subjects):
        x, rows = recordings(data, s)
        images = data.target_ids[rows]
        assert np.array_equal(images, np.intersect1d(data.seen_ids[s], data.train_ids))
        layers = targets(rows).split(targets.layers, 1)
        expected = [Ridge().fit(x, y.flatten(1)[:, k]).alpha for y, k in zip(layers, columns, strict=True)]
        assert named[str(subject)] == expected


def test_few_values_choose_a_penalty(data: Prepared, context: Callable[..., Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(ridge, "VALUES", 50)
    targets = Targets.of(context("lowlevel", "ridge"), data)
    columns, others = (ridge.drawn_columns(targets.layers, targets.width, seed) for seed in (0, 1))
    assert [len(set(own.tolist())) for own in columns] == [50] * len(targets.layers)
    assert all(int(own.max()) < n * targets.width for own, n in zip(columns, targets.layers, strict=True))
    assert not torch.equal(columns[0], others[0]) and not torch.equal(columns[0], columns[1])


def test_a_subject_with_few_images_has_no_ridge(
    data: Prepared, context: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = data.restricted(recordings(data, 0)[1][:0])
    monkeypatch.setattr(baselines, "Prepared", lambda _: few)
    with pytest.raises(UserError, match="subject 1 has 0 training images; predictor ridge needs 5 or more"):
        baselines.run_predictor(context("semantic", "ridge"))


# --- the true features ------------------------------------------------------------------------------------------------


def test_an_oracles_tokens_are_the_targets(tiny_run: Any, data: Prepared, context: Callable[..., Any]) -> None:
    """On training images, whose targets a stage has kept (in half precision)."""
    ctx = context("reconstruct", "oracle")
    picks = [(s, int(i)) for p, s in enumerate(data.subjects) for i in np.intersect1d(data.seen_ids[p], data.train_ids)]
    index = np.array(picks[:3] + picks[-3:])
    work = reconstruct._Work(ctx, data, index, [image_name(s, i) for s, i in index.tolist()])
    rows, places = data.target_rows(index[:, 1]), np.arange(len(index))
    low = LowLevelTargets(ctx.inputs["targets"], ctx.config["lowlevel"])
    network = reconstruct.networks.feature_network(ctx.config["lowlevel_network"])
    torch.testing.assert_close(work.true_lowlevel(low, network)(places), low(rows), atol=2e-2, rtol=1e-2)
    stage = ctx.stage.upstream["targets"].config
    semantic = SemanticTargets(ctx.inputs["targets"], stage, data, "cpu")
    torch.testing.assert_close(work.true_semantic()(places), semantic(rows), atol=1e-2, rtol=1e-2)


def test_an_oracle_is_not_scaled_as_predictions_are(
    made: Made, context: Callable[..., Any], data: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration and gain bring predictions to the scale of the truth; true tokens reach the inversion as they are."""
    inverted: dict[str, torch.Tensor] = {}
    for value in ("oracle", "ridge"):
        ctx = context("reconstruct", value)
        index = np.load(made.folder("reconstruct", value) / "index.npy")
        work = reconstruct._Work(ctx, data, index, [image_name(s, i) for s, i in index.tolist()])

        def invert(c: Any, n: Any, t: Any, tokens: torch.Tensor, *_: Any, value: str = value) -> torch.Tensor:
            inverted[value] = tokens
            return torch.zeros(len(tokens), 3, 4, 4)

        monkeypatch.setattr(reconstruct, "_invert", invert)
        work.lowlevel()
        targets = LowLevelTargets(ctx.inputs["targets"], ctx.config["lowlevel"])
        places = np.arange(len(index))
        if value == "oracle":
            network = reconstruct.networks.feature_network(ctx.config["lowlevel_network"])
            torch.testing.assert_close(inverted[value], work.true_lowlevel(targets, network)(places))
        else:
            raw = work.predictor("lowlevel", "lowlevel", targets.tokens.tokens, targets.tokens.width)(places)
            found = load_file(ctx.inputs["lowlevel"] / "calibration.safetensors")
            matrices = [found[str(k)] for k in range(len(targets.tokens.layer_sizes))]
            expected = calibrate(raw, targets.tokens.layer_sizes, matrices) * ctx.config["dip"]["gain"]
            torch.testing.assert_close(inverted[value], expected)


def test_an_oracle_knows_no_synthetic_images() -> None:
    settings = {"generation.test_set": "nsd-synthetic", "semantic.predictor": "oracle"}
    with pytest.raises(UserError, match="predictor oracle knows NSD"):
        variant_stages(demo().with_settings(settings), "x")


# --- external images --------------------------------------------------------------------------------------------------


def drawn(pool: Pool, known: int, steps: int = 60) -> set[int]:
    rows = np.concatenate([pool.draw(8, step, seeded(step)).rows for step in range(steps)])
    return {int(row) - known for row in rows if row >= known}


@pytest.mark.parametrize("fraction", [None, 0.5])
def test_a_part_of_the_external_images_is_drawn(tiny_run: Any, data: Prepared, fraction: float | None) -> None:
    def pool(used: float, seed: int = 0) -> Pool:
        return Pool(data, tiny_run.folder("external"), fraction, seed, used=used)

    known = len(data.target_ids)
    found = {used: drawn(pool(used), known) for used in (0.0, 1 / 3, 0.5, 1.0)}
    assert {used: len(images) for used, images in found.items()} == {0.0: 0, 1 / 3: 2, 0.5: 3, 1.0: 6}
    assert found[1 / 3] < found[0.5] < found[1.0], "a larger part contains the smaller ones"
    assert len({frozenset(drawn(pool(0.5, seed), known)) for seed in range(8)}) > 1
    part = pool(0.5)
    for step in range(5):
        batch = part.draw(8, step, seeded(step))
        for betas, s, row in zip(batch.betas.numpy(), batch.subject.tolist(), batch.rows.tolist(), strict=True):
            if row >= known:
                assert part.stored is not None
                own = part.stored[np.array([row - known])][0, part.starts[s] : part.starts[s + 1]]
                assert np.array_equal(betas[: data.n_voxels[s]], own), "with the response that was predicted to it"


# --- sweeps that only look at what is there ---------------------------------------------------------------------------


def test_the_branches_are_rows_of_one_trained_model(
    tiny_run: Any, sweep_here: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    shutil.copytree(tiny_run.out, out, ignore=shutil.ignore_patterns("leaderboard"))
    answer = sweep_here(*arguments(tiny_run, "branches", out))
    assert answer.code == 0, answer.err
    assert "sweep branches (demo, quick): 3 variants, 12 stages: 0 to run, 12 cached" in answer.out
    assert (
        "branches=unrefined is left out: it needs a refiner (networks.refiner), and preset demo has none" in answer.out
    )
    rows = {row.variant: row for row in read_leaderboard(out / "leaderboard" / "leaderboard.json")}
    before = {row.variant: row for row in read_leaderboard(tiny_run.out / "leaderboard" / "leaderboard.json")}
    for name, known in (
        ("branches=lowlevel", "clusters=128, low-level image alone"),
        ("branches=semantic", "clusters=128, semantic image alone"),
        ("branches=combined", "clusters=128"),
    ):
        assert rows[name].kind == "method"
        means = {key: value.mean for key, value in rows[name].metrics.items()}
        assert means == pytest.approx({key: value.mean for key, value in before[known].metrics.items()})
    assert not any(row.kind == "branch" for row in rows.values()), "none stands twice in the table"
    assert "low-level image (branches=lowlevel): PixCorr" in answer.out

    alone = sweep_here(*arguments(tiny_run, "branches", out), "--only", "unrefined", "--dry-run")
    assert (alone.code, alone.err) == (
        2,
        "error: branches=unrefined needs a refiner (networks.refiner); preset demo has none\n",
    )


def test_other_images_are_scored_where_they_are_asked_for(tiny_run: Any, tmp_path: Path) -> None:
    """As the images before refinement, of which a preset without a refiner has none: here the low-level ones again."""
    stage = tiny_run.stage("score")
    folder = tmp_path / "reconstruct"
    shutil.copytree(tiny_run.folder("reconstruct"), folder)
    shutil.copytree(folder / "lowlevel", folder / "unrefined")
    ctx = tiny_run.context(stage, tmp_path / "out", images="unrefined")
    score_stage.run(replace(ctx, inputs={"reconstruct": folder}))
    table = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    known = pd.read_parquet(tiny_run.folder("score") / "scores.parquet")
    assert table[table["variant"] != "unrefined"].reset_index(drop=True).equals(known)
    ours, theirs = (table[table["variant"] == kind]["value"].to_numpy() for kind in ("unrefined", "lowlevel"))
    assert np.array_equal(ours, theirs)


def test_semantic_images_are_refined_where_they_are_asked_for(
    made: Made, context: Callable[..., Any], data: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a refiner that turns images over: each folder holds what its description says."""
    ctx = context(
        "reconstruct", "brain-it", refiner="any", refinement={"steps": 3, "start_step": 1, "also_semantic": True}
    )
    index = np.load(made.folder("reconstruct", "brain-it") / "index.npy")[:2]
    names = [image_name(s, i) for s, i in index.tolist()]

    def lowlevel(self: Any) -> Path:
        for step, level in (("lowlevel", 0.2), ("semantic", 0.4), ("combined", 0.6)):
            self.keep(step, np.arange(2), torch.full((2, 3, 64, 64), level))
        return self.folder("lowlevel")

    monkeypatch.setattr(reconstruct._Work, "lowlevel", lowlevel)
    monkeypatch.setattr(
        reconstruct._Work, "generated", lambda self, _: (self.folder("semantic"), self.folder("combined"))
    )
    fake = reconstruct.networks.generator("demo")
    monkeypatch.setattr(reconstruct.networks, "refiner", lambda name: fake)
    seen: list[Any] = []

    def refine(_: Any, images: torch.Tensor, settings: Any, *a: Any, **k: Any) -> torch.Tensor:
        seen.append(settings)
        return 1 - images / 2

    monkeypatch.setattr(reconstruct, "refine", refine)
    reconstruct.reconstruct(ctx, data, index, names)
    folders = [folder for folder in ctx.out.iterdir() if folder != ctx.checkpoints]
    level = {folder.name: read_images(folder, names).mean() / 255 for folder in folders}
    assert level == pytest.approx(
        {"lowlevel": 0.2, "semantic": 0.4, "unrefined": 0.6, "combined": 0.7, "semantic-refined": 0.8}, abs=0.005
    )
    assert {settings.steps for settings in seen} == {3}
