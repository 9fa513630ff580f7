"""Stages ``lowlevel`` and ``semantic`` without a BIT: a method of ``methods/predictors`` predicts the same tokens.

All see the recordings that a BIT sees, of the same training images, and are chosen by the same validation images. A
network (an MLP, of the class of MindEye) trains as the branch's BIT does, as many steps on the same batches, external
images among them; only its rate is its own. Any other method (a ridge, the class of Takagi and Brain-Diffuser) fits
itself to measured recordings alone. Nothing that a BIT builds on, encoder embeddings or clusters, reaches either.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmark.context import StageContext
from benchmark.errors import UserError
from benchmark.graph import Stage
from benchmark.predictors import method_name, method_of
from benchmark.progress import Bar
from benchmark.stages.bit import Batch, fit_lowlevel, fit_semantic, open_pool, save_calibration, token_correlation
from benchmark.stages.features import LowLevelTargets, SemanticTargets
from benchmark.stages.prepare import Prepared
from methods.predictors import Network, Predictor, UnfitError

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


# --- networks ---------------------------------------------------------------------------------------------------------


def build_network(config: Mapping[str, Any], data: Prepared, targets: Targets) -> nn.Module:
    """Return the fresh network that a configuration names."""
    method = method_of(config)
    assert isinstance(method, Network)
    return method.build(data.n_voxels, targets.tokens, targets.width)


def run_network(ctx: StageContext) -> dict[str, Any]:
    """Train a network: low-level tokens with InfoNCE or squared error (Table T5), semantic ones with squared error.

    Outputs: ``NAME.safetensors``, and of the low-level branch ``calibration.safetensors`` as a BIT's.
    """
    data = Prepared(ctx.inputs["data"])
    targets = Targets.of(ctx, data)
    torch.manual_seed(ctx.config["seed"])
    model, pool = build_network(ctx.config, data, targets), open_pool(ctx, data)
    name = method_name(ctx.config["predictor"])
    label = f"{ctx.stage.name} {name}"
    if targets.lowlevel is not None:
        summary = fit_lowlevel(ctx, data, targets.lowlevel, model, pool, label)
    else:
        assert targets.semantic is not None
        summary = fit_semantic(ctx, data, targets.semantic, model, pool, label)
    save_file(model.state_dict(), ctx.out / f"{name}.safetensors")
    return summary


# --- what fits itself -------------------------------------------------------------------------------------------------


class SubjectImages:
    """The training images of one subject, as :class:`methods.predictors.Subject` describes them.

    Args:
        data: the training images and their recordings.
        position: the subject's, in ``data.subjects``.
        targets: the tokens.
        device: where recordings and tokens go.
    """

    def __init__(self, data: Prepared, position: int, targets: Targets, device: str) -> None:
        self._data, self._position, self._targets, self._device = data, position, targets, device
        self.number, self.layers, self.width = data.subjects[position], targets.layers, targets.width
        samples = data.samples(data.train_ids)
        own = samples.subject == position
        self.recordings, self.rows = samples.row[own], data.target_rows(samples.image[own])

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def betas(self) -> Tensor:
        """Its recordings: n x voxels."""
        return torch.from_numpy(np.array(self._data.betas[self._position][self.recordings])).to(self._device)

    def tokens(self, images: slice | Sequence[int] | Tensor) -> Tensor:
        """Return the true tokens of some of them."""
        chosen = images.cpu().numpy() if isinstance(images, Tensor) else images
        return self._targets(self.rows[chosen]).to(self._device)

    def parts(self) -> Iterator[slice]:
        """Cut the images into parts that are worked on at a time."""
        return (slice(start, min(start + IMAGES, len(self))) for start in range(0, len(self), IMAGES))


class FittedPredictor:
    """A fitted method: asked subject by subject.

    Args:
        method: what predicts.
        fitted: what it keeps of its fit.
        data: the training images and their recordings.
        targets: their tokens.
        device: where to compute.
    """

    def __init__(
        self, method: Predictor, fitted: Mapping[str, Any], data: Prepared, targets: Targets, device: str
    ) -> None:
        self.method, self.targets, self.device = method, targets, device
        self.fitted = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in fitted.items()}
        self.subjects = [SubjectImages(data, position, targets, device) for position in range(len(data.subjects))]
        self.n_voxels = data.n_voxels

    @torch.no_grad()
    def __call__(self, betas: Tensor, subject: Tensor) -> Tensor:
        """Return predicted tokens: B x tokens x width, float32, on the device."""
        out = torch.zeros(len(betas), self.targets.tokens, self.targets.width, device=self.device)
        for s in subject.unique().tolist():
            here = (subject == s).nonzero().squeeze(1)
            own = betas[here, : self.n_voxels[s]].to(self.device)
            found = self.method.predict(self.fitted, self.subjects[s], own)
            expected = (len(here), *out.shape[1:])
            if tuple(found.shape) != expected:
                who = type(self.method).__name__
                raise ValueError(f"{who}.predict returned tokens of shape {tuple(found.shape)}, expected {expected}")
            out[here.to(self.device)] = found.to(out)
        return out


def run_predictor(ctx: StageContext) -> dict[str, Any]:
    """Fit a method to the training images.

    Outputs: ``NAME.json`` and ``NAME.safetensors``, what it keeps of the fit (numbers, and tensors, where it keeps
    any); and of the low-level branch ``calibration.safetensors`` as a BIT's.

    Raises:
        UserError: the data do not suffice for the method.
    """
    data = Prepared(ctx.inputs["data"])
    targets = Targets.of(ctx, data)
    name, method = method_name(ctx.config["predictor"]), method_of(ctx.config)
    assert isinstance(method, Predictor)
    subjects = [SubjectImages(data, position, targets, ctx.device) for position in range(len(data.subjects))]
    with ctx.progress.bar(f"{ctx.stage.name} {name}", total=len(subjects)) as bar:
        try:
            fitted = method.fit(_Counted(subjects, bar), ctx.config["seed"])
        except UnfitError as error:
            raise UserError(f"{error}, or --set {ctx.stage.name}.predictor=bit") from error
    _save_fitted(ctx.out, name, fitted)
    predictor = FittedPredictor(method, _load_fitted(ctx.out, name), data, targets, ctx.device)
    validation = list(_by_subject(data, ctx.config["batch"]))
    if targets.lowlevel is not None:
        save_calibration(ctx, validation, targets.lowlevel, lambda batch: predictor(batch.betas, batch.subject))
    errors, correlations = [], []
    for batch in validation:
        predicted, true = predictor(batch.betas, batch.subject), targets(batch.rows)
        errors.append((predicted - true).square().mean((1, 2)))
        correlations.append(token_correlation(predicted, true))
    return {"loss": float(torch.cat(errors).mean()), "correlation": float(torch.cat(correlations).mean())}


class _Counted:
    """Subjects that move a bar when they are gone through for the first time."""

    def __init__(self, subjects: Sequence[SubjectImages], bar: Bar) -> None:
        self._subjects, self._bar, self._seen = subjects, bar, 0

    def __len__(self) -> int:
        return len(self._subjects)

    def __iter__(self) -> Iterator[SubjectImages]:
        for done, subject in enumerate(self._subjects):
            yield subject
            if done == self._seen:
                self._seen += 1
                self._bar.advance(1, f"subject {subject.number}")


def _save_fitted(folder: Path, name: str, fitted: Mapping[str, Any]) -> None:
    """Keep what a method returned from its fit: tensors in one file, everything else in another."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in fitted.items() if isinstance(value, Tensor)}
    numbers = {key: value for key, value in fitted.items() if key not in tensors}
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")
    if numbers or not tensors:
        (folder / f"{name}.json").write_text(json.dumps(numbers, indent=2) + "\n")


def _load_fitted(folder: Path, name: str) -> dict[str, Any]:
    tensors, numbers = folder / f"{name}.safetensors", folder / f"{name}.json"
    fitted: dict[str, Any] = load_file(tensors) if tensors.exists() else {}
    return fitted | (json.loads(numbers.read_text()) if numbers.exists() else {})


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
    name, method = method_name(stage.config["predictor"]), method_of(stage.config)
    if isinstance(method, Predictor):
        return FittedPredictor(method, _load_fitted(folder, name), data, targets, ctx.device)
    model = build_network(stage.config, data, targets)
    model.load_state_dict(load_file(folder / f"{name}.safetensors"))
    model.to(ctx.device).eval()

    @torch.no_grad()
    def predict(betas: Tensor, subject: Tensor) -> Tensor:
        tokens: Tensor = model(betas.to(ctx.device), subject.to(ctx.device)).float()
        return tokens

    return predict
