"""Stages ``lowlevel`` and ``semantic`` without a BIT: an MLP or a ridge regression predicts the same tokens.

Both see the recordings that a BIT sees, of the same training images, and are chosen by the same validation images. An
MLP (the class of MindEye) trains as the branch's BIT does, as many steps on the same batches, external images among
them; only its rate is its own. A ridge (the class of Takagi and Brain-Diffuser) knows one subject and measured
recordings alone, as published: a linear map cannot gain from recordings that a smooth function of the image predicts.
Nothing that a BIT builds on, encoder embeddings or clusters, reaches either.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmark.context import StageContext
from benchmark.errors import UserError
from benchmark.graph import Stage
from benchmark.stages.bit import Batch, fit_lowlevel, fit_semantic, open_pool, save_calibration, token_correlation
from benchmark.stages.features import LowLevelTargets, SemanticTargets
from benchmark.stages.prepare import Prepared
from methods.baselines.mlp import MLP
from methods.baselines.ridge import Ridge, image_weights

RIDGE = "ridge.json"
FOLDS = 5  # of the cross-validation
VALUES = 16384  # of a layer's target values, drawn at random, that choose its penalty
IMAGES = 256  # whose targets are in memory at a time

Predict = Callable[[Tensor, Tensor], Tensor]
"""(recordings B x most voxels, positions of their subjects B) -> tokens B x T x width."""


class Targets:
    """A branch's target tokens: all that a predictor needs to know of them.

    Args:
        branch: configuration of stage ``lowlevel`` or ``semantic``.
        stage: stage ``targets``.
        folder: its result.
        data: the images.
        device: where tokens are computed that are not stored.
    """

    def __init__(self, branch: Stage, stage: Stage, folder: Path, data: Prepared, device: str) -> None:
        self.data, self.device = data, device
        self.lowlevel: LowLevelTargets | None = None
        self.semantic: SemanticTargets | None = None
        if branch.name == "lowlevel":
            self.lowlevel = LowLevelTargets(folder, branch.config, stage.config, data, device)
            self.layers, self.width = self.lowlevel.tokens.layer_sizes, self.lowlevel.tokens.width
        else:
            self.semantic = SemanticTargets(folder, stage.config, data, device)
            self.layers, self.width = (self.semantic.tokens,), self.semantic.width

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return sum(self.layers)

    def __call__(self, rows: np.ndarray) -> Tensor:
        """Return the tokens of target rows: B x tokens x width, on the device."""
        found = self.lowlevel or self.semantic
        assert found is not None
        return found(rows).to(self.device)

    @classmethod
    def of(cls, ctx: StageContext, data: Prepared) -> Targets:
        """Return those of the stage that runs."""
        return cls(ctx.stage, ctx.stage.upstream["targets"], ctx.inputs["targets"], data, ctx.device)


# --- MLP --------------------------------------------------------------------------------------------------------------


def build_mlp(config: Mapping[str, Any], data: Prepared, targets: Targets) -> MLP:
    """Return a fresh MLP with the sizes in ``config``."""
    sizes = {name: config[name] for name in ("hidden", "blocks", "dropout")}
    return MLP(data.n_voxels, **sizes, n_queries=targets.tokens, out_dim=targets.width)


def run_mlp(ctx: StageContext) -> dict[str, Any]:
    """Train an MLP: low-level tokens with InfoNCE or squared error (Table T5), semantic ones with squared error.

    Outputs: ``mlp.safetensors``, and of the low-level branch ``calibration.safetensors`` as a BIT's.
    """
    data = Prepared(ctx.inputs["data"])
    targets = Targets.of(ctx, data)
    torch.manual_seed(ctx.config["seed"])
    model, pool = build_mlp(ctx.config, data, targets), open_pool(ctx, data)
    if targets.lowlevel is not None:
        summary = fit_lowlevel(ctx, data, targets.lowlevel, model, pool, "low-level MLP")
    else:
        assert targets.semantic is not None
        summary = fit_semantic(ctx, data, targets.semantic, model, pool, "semantic MLP")
    save_file(model.state_dict(), ctx.out / "mlp.safetensors")
    return summary


# --- ridge ------------------------------------------------------------------------------------------------------------


class RidgePredictor:
    """A fitted ridge: predictions are weighted sums of the training images' tokens, which are read as they are needed.

    Args:
        data: the training images and their recordings.
        targets: their tokens.
        alphas: for each subject, the penalty of each layer.
        device: where to compute.
    """

    def __init__(self, data: Prepared, targets: Targets, alphas: list[list[float]], device: str) -> None:
        self.data, self.targets, self.alphas, self.device = data, targets, alphas, device
        self.samples = data.samples(data.train_ids)

    @torch.no_grad()
    def __call__(self, betas: Tensor, subject: Tensor) -> Tensor:
        """Return predicted tokens: B x tokens x width, float32, on the device."""
        out = torch.zeros(len(betas), self.targets.tokens, self.targets.width, device=self.device)
        for s in subject.unique().tolist():
            here = (subject == s).nonzero().squeeze(1)
            x, rows = recordings(self.data, s)
            z = betas[here, : self.data.n_voxels[s]].to(self.device)
            by_alpha = {a: image_weights(x.to(self.device), z, a).float() for a in set(self.alphas[s])}
            place = here.to(self.device)
            for part in batches(len(rows)):
                true = self.targets(rows[part]).split(self.targets.layers, 1)
                added = [
                    torch.einsum("mn,ntw->mtw", by_alpha[alpha][:, part], layer)
                    for alpha, layer in zip(self.alphas[s], true, strict=True)
                ]
                out.index_add_(0, place, torch.cat(added, 1))
        return out


def recordings(data: Prepared, subject: int) -> tuple[Tensor, np.ndarray]:
    """Return a subject's (position's) recordings of its training images, n x voxels, and the target rows of these."""
    samples = data.samples(data.train_ids)
    own = samples.subject == subject
    return torch.from_numpy(np.array(data.betas[subject][samples.row[own]])), data.target_rows(samples.image[own])


def batches(n: int) -> Iterator[slice]:
    """Part 0..n-1 into slices of images that are worked on at a time."""
    return (slice(start, min(start + IMAGES, n)) for start in range(0, n, IMAGES))


def run_ridge(ctx: StageContext) -> dict[str, Any]:
    """Choose each subject's penalties by cross-validation on its training images, one for each layer of tokens.

    Outputs: ``ridge.json``, the penalties: what else a ridge is follows from the recordings by one solve; and of the
    low-level branch ``calibration.safetensors`` as a BIT's.

    Raises:
        UserError: a subject with fewer training images than folds.
    """
    data = Prepared(ctx.inputs["data"])
    targets = Targets.of(ctx, data)
    seed = ctx.config["seed"]
    columns = _columns(targets, seed)
    alphas = []
    with ctx.progress.bar(f"{ctx.stage.name} ridge", total=len(data.subjects)) as bar:
        for position in range(len(data.subjects)):
            x, rows = recordings(data, position)
            if len(x) < FOLDS:
                raise UserError(
                    f"subject {data.subjects[position]} has {len(x)} training images; "
                    f"predictor ridge needs {FOLDS} or more, or --set {ctx.stage.name}.predictor=bit"
                )
            drawn: list[list[Tensor]] = [[] for _ in columns]
            for part in batches(len(rows)):
                for k, layer in enumerate(targets(rows[part]).split(targets.layers, 1)):
                    drawn[k].append(layer.flatten(1)[:, columns[k].to(layer.device)])
            x = x.to(ctx.device)
            alphas.append([Ridge(folds=FOLDS, seed=seed).fit(x, torch.cat(y)).alpha for y in drawn])
            bar.advance(1, f"subject {data.subjects[position]}")
    named = {str(subject): own for subject, own in zip(data.subjects, alphas, strict=True)}
    (ctx.out / RIDGE).write_text(json.dumps({"alphas": named}, indent=2) + "\n")
    predictor = RidgePredictor(data, targets, alphas, ctx.device)
    validation = list(_by_subject(data, ctx.config["batch"]))
    if targets.lowlevel is not None:
        save_calibration(ctx, validation, targets.lowlevel, lambda batch: predictor(batch.betas, batch.subject))
    errors, correlations = [], []
    for batch in validation:
        predicted, true = predictor(batch.betas, batch.subject), targets(batch.rows)
        errors.append((predicted - true).square().mean((1, 2)))
        correlations.append(token_correlation(predicted, true))
    return {"loss": float(torch.cat(errors).mean()), "correlation": float(torch.cat(correlations).mean())}


def _columns(targets: Targets, seed: int) -> list[Tensor]:
    """Draw the target values of each layer that choose its penalty."""
    generator = torch.Generator().manual_seed(seed)
    counts = [tokens * targets.width for tokens in targets.layers]
    return [torch.randperm(count, generator=generator)[:VALUES] for count in counts]


def _by_subject(data: Prepared, size: int) -> Iterator[Batch]:
    """Yield the validation recordings subject by subject: each subject's ridge is solved for many at once."""
    samples = data.samples(data.validation_ids)
    rows = data.target_rows(samples.image)
    for position in range(len(data.subjects)):
        own = np.flatnonzero(samples.subject == position)
        for start in range(0, len(own), size):
            pick = own[start : start + size]
            betas = torch.from_numpy(data.padded_betas(samples.subject[pick], samples.row[pick]))
            yield Batch(betas, torch.from_numpy(samples.subject[pick]), rows[pick])


# --- what reconstructs with them --------------------------------------------------------------------------------------


def load_predictor(ctx: StageContext, branch: str, data: Prepared) -> Predict:
    """Return what a stage of this module fitted.

    Args:
        ctx: of a stage that has the branch's stage, ``data`` and ``targets`` upstream.
        branch: ``lowlevel`` or ``semantic``.
        data: the training images and their recordings.
    """
    stage, folder = ctx.stage.upstream[branch], ctx.inputs[branch]
    targets = Targets(stage, ctx.stage.upstream["targets"], ctx.inputs["targets"], data, ctx.device)
    if stage.config["predictor"] == "ridge":
        named = json.loads((folder / RIDGE).read_text())["alphas"]
        return RidgePredictor(data, targets, [named[str(subject)] for subject in data.subjects], ctx.device)
    model = build_mlp(stage.config, data, targets)
    model.load_state_dict(load_file(folder / "mlp.safetensors"))
    model.to(ctx.device).eval()

    @torch.no_grad()
    def predict(betas: Tensor, subject: Tensor) -> Tensor:
        tokens: Tensor = model(betas.to(ctx.device), subject.to(ctx.device)).float()
        return tokens

    return predict
