"""How BIT, an MLP and a ridge learn to predict image features: the measurements behind ``learning``.

A score is the Pearson correlation of an image's predicted with its true tokens, flattened; mean over a subject's
validation images, then over subjects. Test images are not read.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark.context import StageContext
from benchmark.graph import Stage
from benchmark.progress import Progress
from benchmark.shards import Shards
from benchmark.stages.bit import (
    VALIDATION_SEED,
    Batch,
    Pool,
    Validation,
    draw,
    fresh_bit,
    kept_voxels,
    lowlevel_loss,
    mean_loss,
    token_correlation,
    voxel_layout,
)
from benchmark.stages.encoder import fit_clusters, fit_encoder
from benchmark.stages.features import LowLevelTargets
from benchmark.stages.prepare import Prepared
from benchmark.store import Store
from benchmark.tracking import NoTracker
from benchmark.training import TrainResult, Validate, train
from benchmark.training_config import TrainingConfig
from methods.baselines.mlp import MLP
from methods.baselines.ridge import Ridge
from methods.brain_it.tokenizer import VoxelLayout
from methods.brain_it.transformer import BIT
from methods.brain_it.vgg_tokens import calibrate, fit_calibration

INFO_NCE, SQUARED_ERROR = "InfoNCE", "squared error"
ENCODER_COUNTED = "MLP, equal time with the encoder counted"


@dataclass(frozen=True)
class Design:
    """What is measured, apart from the variant's own settings."""

    sizes: tuple[int, ...] = (40, 80, 160)
    """Training images per subject; all of them come on top."""
    seeds: int = 3
    checkpoints: int = 10
    """Validations of a training; the weights with the least loss are kept, as in the sweep."""
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    """Learning rates of the MLP; the best on all images with the first seed serves every size and seed."""
    hidden: int = 256
    blocks: int = 2
    dropout: float = 0.1
    probe_steps: int = 15
    """Steps that tell how long a step takes."""
    max_steps: int | None = None
    """Of one training: the recipes of BIT and of the encoder are cut to so many steps."""
    max_seconds: float | None = None
    """Of one training: BIT's recipe is cut to so many CPU seconds, and the MLP with it."""


@dataclass(frozen=True)
class Run:
    """One method, trained once. Seconds are CPU seconds, all threads added, validation left out."""

    method: str
    loss: str
    seed: int
    images: int
    """Training images per subject (the mean, where subjects differ)."""
    correlation: float
    per_subject: list[float]
    seconds: float
    encoder_seconds: float | None = None
    """Of the encoder that this BIT got its clusters and first embeddings from; None: not known, or not a BIT."""
    steps: int | None = None
    best_step: int | None = None
    learning_rate: float | None = None
    parameters: int | None = None
    alphas: list[float] | None = None
    """Penalty of each subject's ridge."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Step, seconds, loss and correlation at each validation, of the weights as they were then."""


class Branch:
    """One branch of a variant: its data, its targets, its losses and its score."""

    def __init__(self, stage: Stage, store: Store) -> None:
        self.name = stage.name
        self.config: dict[str, Any] = dict(stage.config)
        self.folders = {role: store.folder(upstream) for role, upstream in stage.upstream.items()}
        self.data = Prepared(self.folders["data"])
        self.lowlevel: LowLevelTargets | None = None
        if self.name == "lowlevel":
            self.lowlevel = LowLevelTargets(self.folders["targets"], self.config)
            self.n_tokens, self.width = self.lowlevel.tokens.tokens, self.lowlevel.tokens.width
        else:
            self.semantic = Shards(self.folders["targets"] / "semantic")
            self.n_tokens, self.width = self.semantic.shape[1:]
        self.validation = Validation(self.data).batches(self.config["batch"])
        self.rows = np.concatenate([batch.rows for batch in self.validation])
        self.subject = torch.cat([batch.subject for batch in self.validation])
        self.true = self.targets(self.rows)

    @property
    def loss_name(self) -> str:
        """The loss that the method trains this branch with."""
        return INFO_NCE if self.lowlevel else SQUARED_ERROR

    def targets(self, rows: np.ndarray) -> Tensor:
        """Return the true tokens of target rows: B x tokens x width."""
        return self.lowlevel(rows) if self.lowlevel else torch.from_numpy(self.semantic[rows]).float()

    def loss(self, name: str, model: nn.Module, batch: Batch, generator: torch.Generator, sample: bool) -> Tensor:
        """Return the loss of a batch; ``sample`` takes some voxels only where the recipe does, as in training."""
        if name == SQUARED_ERROR:
            keep = kept_voxels(self.config, self.data, batch, generator) if sample else None
            return F.mse_loss(model(batch.betas.float(), batch.subject, keep=keep), self.targets(batch.rows))
        low = self.lowlevel
        assert low is not None
        drawn = draw(self.config, self.data, batch, generator, low.read, low.tokens, training=sample)
        return lowlevel_loss(model, drawn, low, self.config["scale"], "cpu")[0]

    def validation_loss(self, name: str, model: nn.Module) -> float:
        """Return the mean loss over the validation images, with the same sampled positions each time."""
        generator = torch.Generator().manual_seed(VALIDATION_SEED)
        return mean_loss(lambda batch: self.loss(name, model, batch, generator, sample=False), self.validation)

    def predict(self, model: nn.Module) -> Tensor:
        """Return the network's tokens of all validation recordings."""
        with torch.no_grad():
            return torch.cat([model(batch.betas, batch.subject) for batch in self.validation])

    def score(self, loss_name: str, predicted: Tensor) -> list[float]:
        """Return each subject's mean correlation; what InfoNCE trained is brought to the targets' scale first."""
        if loss_name == INFO_NCE:
            predicted = self._calibrated(predicted)
        correlation = token_correlation(predicted, self.true)
        return [float(correlation[self.subject == s].mean()) for s in range(len(self.data.subjects))]

    def _calibrated(self, predicted: Tensor) -> Tensor:
        """Map each layer linearly to the true tokens: one half of the images with the map fitted to the other half."""
        assert self.lowlevel is not None
        sizes = self.lowlevel.tokens.layer_sizes
        odd = torch.from_numpy(np.unique(self.rows, return_inverse=True)[1] % 2 == 1)
        out = torch.empty_like(predicted)
        for half in (odd, ~odd):
            matrices = fit_calibration([(predicted[~half], self.true[~half])], sizes)
            out[half] = calibrate(predicted[half], sizes, matrices)
        return out

    def pool(self, images: int | None, seed: int) -> Pool:
        """Return what the networks train on: the recipe's samples, or ``images`` of each subject.

        Smaller sets go without external images: an encoder that saw every image predicted their recordings.
        """
        fraction = self.config["external_fraction"] if images is None else 0.0
        return Pool(draw_images(self.data, images, seed), self.folders["external"], fraction, seed)


def draw_images(data: Prepared, images: int | None, seed: int) -> Prepared:
    """Return the data with ``images`` training images of each subject, drawn at random; None keeps all.

    A larger draw contains the smaller ones.
    """
    if images is None:
        return data
    samples = data.samples(data.train_ids)
    picks = []
    for subject in range(len(data.subjects)):
        own = samples.image[samples.subject == subject]
        picks.append(np.random.default_rng([seed, subject]).permutation(own)[:images])
    return data.restricted(np.concatenate(picks))


# --- what a BIT builds on ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Basis:
    """An encoder, and the clusters that its embeddings fall into."""

    encoder: Path  # folder of encoder.safetensors
    layout: VoxelLayout
    encoder_seconds: float | None  # CPU seconds of fitting the encoder


class Bases:
    """For all images the encoder and clusters of the store; for fewer, such as are fitted to those alone.

    Args:
        stage: a branch's stage; its upstream stages say how encoder and clusters are made.
        store: where the results of those lie; nothing is written there.
        folder: where refitted ones go.
        design: may cut the encoder's training short.
        progress: shows the training.
    """

    def __init__(self, stage: Stage, store: Store, folder: Path, design: Design, progress: Progress) -> None:
        self.encoder, self.clusters = stage.upstream["encoder"], stage.upstream["clusters"]
        self.store, self.folder, self.design, self.progress = store, folder, design, progress
        self.data = Prepared(store.folder(stage.upstream["data"]))
        self._made: dict[tuple[int | None, int], Basis] = {}

    def get(self, images: int | None, seed: int) -> Basis:
        """Return the basis for a training set; made where this is the first to ask for it."""
        key = (images, 0 if images is None else seed)
        if key not in self._made:
            self._made[key] = self._stored() if images is None else self._refitted(images, seed)
        return self._made[key]

    def _stored(self) -> Basis:
        layout = voxel_layout(self.data, self.store.folder(self.clusters))
        return Basis(self.store.folder(self.encoder), layout, self.store.status(self.encoder).get("cpu_s"))

    def _refitted(self, images: int, seed: int) -> Basis:
        config = dict(self.encoder.config)
        if self.design.max_steps is not None:
            recipe = TrainingConfig.model_validate(config["training"])
            steps = min(recipe.total_steps, self.design.max_steps)
            config["training"] = {**config["training"], "steps": steps, "epochs": None, "steps_per_epoch": None}
        out = self.folder / f"{images}-{seed}"
        out.mkdir()
        ctx = StageContext(
            stage=self.encoder,
            config=config,
            out=out,
            inputs={role: self.store.folder(upstream) for role, upstream in self.encoder.upstream.items()},
            checkpoints=out / "checkpoints",
            tracker=NoTracker(),
            progress=self.progress,
            device="cpu",
            threads=torch.get_num_threads(),
            checkpoint_seconds=float("inf"),
        )
        start = time.process_time()
        fit_encoder(ctx, draw_images(self.data, images, seed))
        seconds = time.process_time() - start
        embeddings = load_file(out / "encoder.safetensors")["voxel_embedding"].numpy()
        fit_clusters(embeddings, self.clusters.config).save(out / "v2c.safetensors")
        return Basis(out, voxel_layout(self.data, out), seconds)


# --- the three methods ------------------------------------------------------------------------------------------------


def train_bit(branch: Branch, design: Design, basis: Basis, images: int | None, seed: int, progress: Progress) -> Run:
    """Train a BIT by the variant's recipe."""
    config = {**branch.config, "seed": seed}
    recipe = TrainingConfig.model_validate(config["training"])

    def fresh() -> nn.Module:
        return fresh_bit(config, basis.layout, basis.encoder, branch.n_tokens, branch.width)

    pool = branch.pool(images, seed)
    steps = min(recipe.total_steps, design.max_steps or recipe.total_steps)
    if design.max_seconds is not None:
        per_step = _step_seconds(branch, fresh(), branch.loss_name, recipe, pool, design.probe_steps)
        steps = max(1, min(steps, int(design.max_seconds / per_step)))
    training = _training(recipe, steps, design.checkpoints, seed)
    label = f"{branch.name}, BIT, {_many(images)}, seed {seed}"
    run = _fit(branch, fresh(), "BIT", branch.loss_name, seed, training, pool, label, progress)
    return replace(run, encoder_seconds=basis.encoder_seconds)


def train_mlp(
    branch: Branch,
    design: Design,
    loss_name: str,
    rate: float,
    seconds: float,
    images: int | None,
    seed: int,
    progress: Progress,
) -> Run:
    """Train an MLP for ``seconds``: as many steps as fit in, so that its one-cycle schedule ends with them."""
    recipe = TrainingConfig.model_validate({**branch.config["training"], "optimiser": {"lr": rate}})

    def fresh() -> nn.Module:
        torch.manual_seed(seed)
        sizes = {"hidden": design.hidden, "blocks": design.blocks, "dropout": design.dropout}
        return MLP(branch.data.n_voxels, **sizes, n_queries=branch.n_tokens, out_dim=branch.width)  # type: ignore[arg-type]

    pool = branch.pool(images, seed)
    per_step = _step_seconds(branch, fresh(), loss_name, recipe, pool, design.probe_steps)
    training = _training(recipe, max(1, round(seconds / per_step)), design.checkpoints, seed)
    method = mlp_name(branch, loss_name)
    label = f"{branch.name}, {method}, {_many(images)}, seed {seed}, rate {rate:g}"
    return _fit(branch, fresh(), method, loss_name, seed, training, pool, label, progress)


def mlp_name(branch: Branch, loss_name: str) -> str:
    """Return how the MLP is called: with its loss where that is not the branch's own."""
    return "MLP" if loss_name == branch.loss_name else f"MLP, {loss_name}"


def fit_ridge(branch: Branch, images: int | None, seed: int) -> Run:
    """Fit a ridge to each subject; it sees no external images."""
    data = draw_images(branch.data, images, seed)
    samples = data.samples(data.train_ids)
    alphas, seconds = [], 0.0
    predicted = torch.empty_like(branch.true)
    validation = torch.cat([batch.betas for batch in branch.validation])
    for s, voxels in enumerate(data.n_voxels):
        own = samples.subject == s
        start = time.process_time()
        x = torch.from_numpy(data.betas[s][samples.row[own]])
        ridge = Ridge().fit(x, branch.targets(data.target_rows(samples.image[own])))
        seconds += time.process_time() - start
        here = branch.subject == s
        predicted[here] = ridge.predict(validation[here, :voxels])
        alphas.append(ridge.alpha)
    return replace(_untrained(branch, "ridge", predicted, data, seed), seconds=seconds, alphas=alphas)


def predict_mean(branch: Branch, images: int | None, seed: int) -> Run:
    """Predict the mean of each subject's training tokens."""
    data = draw_images(branch.data, images, seed)
    samples = data.samples(data.train_ids)
    predicted = torch.empty_like(branch.true)
    for s in range(len(data.subjects)):
        rows = data.target_rows(samples.image[samples.subject == s])
        predicted[branch.subject == s] = branch.targets(rows).mean(0)
    return _untrained(branch, "mean", predicted, data, seed)


def _untrained(branch: Branch, method: str, predicted: Tensor, data: Prepared, seed: int) -> Run:
    """Return the run of a method that no gradient trained."""
    scores = branch.score(SQUARED_ERROR, predicted)
    return Run(
        method=method,
        loss=SQUARED_ERROR,
        seed=seed,
        images=images_per_subject(data),
        correlation=float(np.mean(scores)),
        per_subject=scores,
        seconds=0.0,
    )


def images_per_subject(data: Prepared) -> int:
    """Return how many training images a subject saw (the mean, where subjects differ)."""
    return round(len(data.samples(data.train_ids)) / len(data.subjects))


def _many(images: int | None) -> str:
    return "all images" if images is None else f"{images} images"


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Context:
    """What the training loop asks of a stage."""

    checkpoints: Path
    progress: Progress
    tracker: NoTracker = NoTracker()
    device: str = "cpu"
    checkpoint_seconds: float = float("inf")


def _training(recipe: TrainingConfig, steps: int, checkpoints: int, seed: int) -> TrainingConfig:
    """Return the recipe for another number of steps, with ``checkpoints`` validations."""
    changes: Mapping[str, Any] = {
        "steps": steps,
        "epochs": None,
        "steps_per_epoch": None,
        "validate_every": math.ceil(steps / checkpoints),
        "seed": recipe.seed + seed,
    }
    return TrainingConfig.model_validate({**recipe.model_dump(), **changes})


def _fit(
    branch: Branch,
    model: nn.Module,
    method: str,
    loss_name: str,
    seed: int,
    training: TrainingConfig,
    pool: Pool,
    label: str,
    progress: Progress,
) -> Run:
    """Train a network and score the weights that the recipe keeps."""
    starts: list[float] = []
    paused = 0.0  # CPU seconds of validation
    curve: list[dict[str, float]] = []

    def validate() -> dict[str, float]:
        nonlocal paused
        now = time.process_time()
        found = {
            "loss": branch.validation_loss(loss_name, model),
            "correlation": float(np.mean(branch.score(loss_name, branch.predict(model)))),
        }
        curve.append({"step": len(starts), "seconds": now - starts[0] - paused, **found})
        paused += time.process_time() - now
        return found

    result = _train(branch, model, loss_name, training, pool, label, progress, starts, validate)
    scores = branch.score(loss_name, branch.predict(model))
    return Run(
        method=method,
        loss=loss_name,
        seed=seed,
        images=images_per_subject(pool.data),
        correlation=float(np.mean(scores)),
        per_subject=scores,
        seconds=curve[-1]["seconds"],
        steps=result.steps,
        best_step=result.best_step,
        learning_rate=training.optimiser.lr,
        parameters=sum(p.numel() for p in model.parameters()),
        curve=curve,
    )


def _step_seconds(
    branch: Branch, model: nn.Module, loss_name: str, recipe: TrainingConfig, pool: Pool, steps: int
) -> float:
    """Return the median CPU seconds of a training step."""
    starts: list[float] = []
    training = recipe.model_copy(update={"steps": steps + 1, "epochs": None, "steps_per_epoch": None, "select": None})
    _train(branch, model, loss_name, training, pool, "time of a step", Progress(enabled=False), starts)
    return float(np.median(np.diff(starts)))


def _train(
    branch: Branch,
    model: nn.Module,
    loss_name: str,
    training: TrainingConfig,
    pool: Pool,
    label: str,
    progress: Progress,
    starts: list[float],
    validate: Validate | None = None,
) -> TrainResult:
    """Train on the pool's batches; ``starts`` is given the CPU time at which each step began."""

    def batch_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        starts.append(time.process_time())
        batch = pool.draw(branch.config["batch"], step, generator)
        return branch.loss(loss_name, model, batch, generator, sample=True), {}

    with tempfile.TemporaryDirectory() as folder:
        return train(
            model,
            batch_loss,
            config=training,
            ctx=_Context(Path(folder), progress),
            label=label,
            validate=validate,
            parameter_groups={"voxels": [model.tokenizer.voxel_embeddings]} if isinstance(model, BIT) else {},
        )


# --- all of it --------------------------------------------------------------------------------------------------------


@dataclass
class Findings:
    """The finished runs of a branch. ``trials`` are the runs that the MLPs' learning rates are chosen by."""

    runs: list[Run] = field(default_factory=list)
    trials: list[Run] = field(default_factory=list)


def measure(
    branches: Mapping[str, Branch],
    bases: Bases,
    design: Design,
    progress: Progress,
    findings: Mapping[str, Findings],
    save: Callable[[], None],
) -> None:
    """Measure all methods at all sizes with all seeds, but for the runs that ``findings`` has already.

    A branch's new runs are added to its findings; ``save`` is called after each.
    """
    counts = np.bincount(bases.data.samples(bases.data.train_ids).subject)
    smaller = [size for size in sorted(set(design.sizes), reverse=True) if size < counts.min()]
    # A size's branches come one after the other: an interrupted measurement has at most one encoder to fit again.
    for seed in range(design.seeds):
        for images in (None, *smaller):
            for name, branch in branches.items():
                _measure_at(images, seed, branch, bases, design, progress, findings[name], save)


def _measure_at(
    images: int | None,
    seed: int,
    branch: Branch,
    bases: Bases,
    design: Design,
    progress: Progress,
    found: Findings,
    save: Callable[[], None],
) -> None:
    count = images_per_subject(draw_images(branch.data, images, seed))

    def once(runs: list[Run], method: str, make: Callable[[], Run], rate: float | None = None) -> Run:
        """Return the run that is there already, or make it."""
        wanted = (method, seed, count)
        for run in runs:
            if (run.method, run.seed, run.images) == wanted and rate in (None, run.learning_rate):
                return run
        runs.append(make())
        save()
        return runs[-1]

    def mlp(loss_name: str, rate: float, seconds: float) -> Callable[[], Run]:
        return lambda: train_mlp(branch, design, loss_name, rate, seconds, images, seed, progress)

    first = images is None and seed == 0
    if first or images is not None:  # on all images nothing about these two is random
        once(found.runs, "ridge", lambda: fit_ridge(branch, images, seed))
        once(found.runs, "mean", lambda: predict_mean(branch, images, seed))
    bit = once(found.runs, "BIT", lambda: train_bit(branch, design, bases.get(images, seed), images, seed, progress))
    for loss_name in dict.fromkeys((branch.loss_name, SQUARED_ERROR)):
        method = mlp_name(branch, loss_name)
        if first:
            trials = [once(found.trials, method, mlp(loss_name, rate, bit.seconds), rate) for rate in design.rates]
            once(found.runs, method, lambda trials=trials: max(trials, key=lambda run: run.correlation))  # type: ignore[misc]
        else:
            once(found.runs, method, mlp(loss_name, _chosen_rate(found.runs, method), bit.seconds))
    # Where recipes are cut, the encoder in the store was not: its seconds would dwarf all others.
    if first and bit.encoder_seconds is not None and design.max_steps is None:
        rate = _chosen_rate(found.runs, mlp_name(branch, branch.loss_name))
        longer = mlp(branch.loss_name, rate, bit.seconds + bit.encoder_seconds)
        once(found.runs, ENCODER_COUNTED, lambda: replace(longer(), method=ENCODER_COUNTED))


def _chosen_rate(runs: Sequence[Run], method: str) -> float:
    """Return the learning rate of the first run of a method: the one on all images with the first seed."""
    rate = next(run.learning_rate for run in runs if run.method == method)
    assert rate is not None
    return rate
