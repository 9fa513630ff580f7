"""Stages of the transfer to a new subject, in the order in which the data flows (Sec. 4.3, App. D.4).

The base models are the ordinary stages over data without the new subject. Here its voxels come in: ``transfer-data``
and ``transfer-targets`` read what it saw, ``transfer-encoder`` adapts the encoder to it, ``transfer-external`` predicts
its responses to the external images, ``transfer-clusters`` finds the known voxel that is most like each of its own, and
``transfer-lowlevel``, ``transfer-semantic`` and ``transfer-joint`` train its voxel tables in the frozen models. A table
is all that these keep; ``transfer-reconstruct`` puts it into the base models and goes on as ever.

The trained weights are those after the last step (official code): nothing of the new subject is set aside to choose by,
and the calibration of the low-level tokens, where it is asked for, is the base model's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark import networks
from benchmark.config import TableConfig
from benchmark.context import StageContext
from benchmark.data.nsd import NSD
from benchmark.data.prepared import PreparedData
from benchmark.data.splits import select_trials
from benchmark.errors import RunError
from benchmark.shards import Shards
from benchmark.stages import reconstruct
from benchmark.stages.bit import (
    BrainToImage,
    Drawn,
    Pool,
    build_bit,
    draw,
    joint_loss,
    lowlevel_loss,
    predicted_tokens,
    voxel_layout,
)
from benchmark.stages.encoder import PREDICT_BATCH, EncoderWithAdapters, Predictor, keep_predictions, load_mapping
from benchmark.stages.features import LowLevelTargets, SemanticTargets, encoder_taps
from benchmark.stages.prepare import Prepared, check_transfer, source_of, take, write_averages, write_meta
from benchmark.training import BatchLoss, Read, is_first_process, shared_out, train
from methods.brain_it.clustering import V2C, nearest_voxel_labels
from methods.brain_it.encoder import voxel_correlation
from methods.brain_it.losses import encoder_loss
from methods.brain_it.transfer import BIT_TABLE, ENCODER_TABLE, adopt, epoch_length, frozen_digest, mixed
from methods.brain_it.transformer import BIT

TABLE = "table.safetensors"
NEAREST = "nearest.npy"
FULL = "full"


# --- the new subject's data -------------------------------------------------------------------------------------------


def run_data(ctx: StageContext) -> dict[str, Any]:
    """Read what was recorded of the new subject, all of it: how much is used is a setting of the stages below.

    Outputs: those of stage ``prepare`` for this subject alone, without external images; and ``trials_subjX.npy``
    (trials of session 1 x voxels, z-scored over the session, in order) with ``trial_ids_subjX.npy`` (NSD ids).
    """
    source, subject = source_of(ctx), ctx.config["subject"]
    shown, trials = first_session(source, subject)
    base = Prepared(ctx.inputs["base"])
    take(base.folder / "images.npy", ctx.out / "images.npy", base.images)
    np.save(ctx.out / "external.npy", np.empty((0, *base.images.shape[1:]), np.uint8))
    write_averages(ctx, source, [subject])
    np.save(ctx.out / f"trials_subj{subject}.npy", trials)
    np.save(ctx.out / f"trial_ids_subj{subject}.npy", shown)
    return {**write_meta(ctx, source, [subject]), "trials of session 1": len(shown)}


def first_session(source: NSD | PreparedData, subject: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the NSD ids that a subject saw in its first session (n), and its single trials (n x V), in order.

    Raises:
        UserError: the data have no such subject, nobody else, or no single trials.
    """
    check_transfer(source, subject)
    shown = source.trials(subject)[0]
    if isinstance(source, NSD):
        return shown, source.session_betas(subject, 1)
    return shown, np.array(source.trial_betas(subject)[: len(shown)])


def session_amount(amount: str) -> str:
    """Return what ``data.release`` calls an amount of the first session."""
    return {"450": "15min-450"}.get(amount, amount)


class NewSubject(Prepared):
    """What is used of a new subject, in the place of all subjects' averaged recordings.

    Target rows number the images that it saw alone, then the external ones of the base models' data.

    Args:
        folder: of stage ``transfer-data``.
        base: the base models' data.
        amount: ``full`` (averaged over repeats, every image of its own), or how much of session 1 (single trials).

    Attributes:
        shown: trials of session 1 that were taken, those of shared images among them; None of ``full``.
    """

    def __init__(self, folder: Path, base: Prepared, amount: str) -> None:
        super().__init__(folder)
        self.base, self.external, self.shown = base, base.external, None
        (subject,) = self.subjects
        if amount == FULL:
            self.train_ids = self.target_ids
            return
        session = np.load(folder / f"trial_ids_subj{subject}.npy")
        chosen = select_trials(session, self.shared_ids, subject, session_amount(amount))
        trials = np.load(folder / f"trials_subj{subject}.npy", mmap_mode="r")
        self.betas, self.seen_ids = [trials[chosen.trials]], [chosen.image_ids]
        self.train_ids, self.shown = np.unique(chosen.image_ids), chosen.shown

    @classmethod
    def of(cls, ctx: StageContext) -> NewSubject:
        """Open what a stage reads."""
        return cls(ctx.inputs["data"], Prepared(ctx.inputs["base"]), ctx.config["amount"])

    def in_base(self, rows: np.ndarray) -> np.ndarray:
        """Return the base models' target rows of external images, which are target rows here."""
        return rows - len(self.target_ids) + len(self.base.target_ids)

    def used(self) -> dict[str, int]:
        """Return how much there is, for people."""
        taken = {} if self.shown is None else {"trials shown": self.shown}
        return {**taken, "recordings": len(self.samples(self.train_ids)), "images": len(self.train_ids)}


# --- its targets: of its own images, and of the external ones ---------------------------------------------------------


@dataclass(frozen=True)
class _Halves:
    """What was read of some target rows: of the new subject's images, and of those of the base models."""

    mine: np.ndarray
    """B, bool: which are the new subject's."""
    own: Any
    base: Any

    @classmethod
    def read(
        cls, data: NewSubject, rows: np.ndarray, own: Callable[[np.ndarray], Any], base: Callable[[np.ndarray], Any]
    ) -> _Halves:
        """Read each half, where there is any, by its function of rows."""
        mine = rows < len(data.target_ids)
        halves = [(own, rows[mine]), (base, data.in_base(rows[~mine]))]
        return cls(mine, *(read(asked) if len(asked) else None for read, asked in halves))

    def joined(self, own: Callable[[Any], Tensor], base: Callable[[Any], Tensor]) -> Tensor:
        """Return what these functions make of the halves, in the order of the rows."""
        parts = [(self.mine, own, self.own), (~self.mine, base, self.base)]
        found = [(torch.from_numpy(np.flatnonzero(here)), make(half)) for here, make, half in parts if here.any()]
        out = found[0][1].new_empty(len(self.mine), *found[0][1].shape[1:])
        for places, values in found:
            out[places.to(out.device)] = values
        return out


class _LowLevel(LowLevelTargets):
    """Low-level tokens on the scale of the base models' training images."""

    def __init__(self, ctx: StageContext, data: NewSubject) -> None:
        stages = ctx.stage.upstream
        base = stages["base_targets"].config
        super().__init__(ctx.inputs["base_targets"], ctx.config, base, data.base, ctx.device)
        self.new, self.own = (
            data,
            LowLevelTargets(ctx.inputs["targets"], ctx.config, stages["targets"].config, data, ctx.device),
        )
        self.own.stats, self.own.mean = self.stats, self.mean

    def read(self, rows: np.ndarray) -> Any:
        return _Halves.read(self.new, rows, self.own.read, super().read)

    def compute(self, found: Any) -> Tensor:
        return cast("_Halves", found).joined(self.own.compute, super().compute)


class _Semantic(SemanticTargets):
    """Semantic tokens."""

    def __init__(self, ctx: StageContext, data: NewSubject) -> None:
        stages = ctx.stage.upstream
        super().__init__(ctx.inputs["base_targets"], stages["base_targets"].config, data.base, ctx.device)
        self.new = data
        self.own = SemanticTargets(ctx.inputs["targets"], stages["targets"].config, data, ctx.device)

    def read(self, rows: np.ndarray) -> Any:
        return _Halves.read(self.new, rows, self.own.read, super().read)

    def compute(self, found: Any) -> Tensor:
        return cast("_Halves", found).joined(self.own.compute, super().compute)


# --- the encoder, and what follows from it ----------------------------------------------------------------------------


def encoder_tensors(folder: Path) -> dict[str, Tensor]:
    """Return what stage ``encoder`` trained, by the names in :class:`EncoderWithAdapters`."""
    found = load_file(folder / "encoder.safetensors")
    return {name if name.startswith("adapters.") else f"encoder.{name}": value for name, value in found.items()}


def run_encoder(ctx: StageContext) -> dict[str, Any]:
    """Adapt the encoder: voxel embeddings of the new subject, from a random start; all else is frozen.

    Outputs: ``table.safetensors`` (``table``: voxels x width) and ``correlation.npy`` (voxels: Pearson r with the
    recordings that it was trained on, which says that it learnt, not how well it predicts).
    """
    config = dict(ctx.config)
    data = NewSubject.of(ctx)
    torch.manual_seed(config["seed"])
    taps = encoder_taps(config, data, ctx.inputs["targets"], ctx.device)
    model = EncoderWithAdapters(config, data, taps)
    table = adopt(model, encoder_tensors(ctx.inputs["encoder"]), f"encoder.{ENCODER_TABLE}")
    samples = data.samples(data.train_ids)
    targets = data.target_rows(samples.image)
    training = TableConfig.model_validate(config["table"])
    (voxels,), betas = data.n_voxels, data.betas[0]

    def read(step: int, generator: torch.Generator) -> tuple[list[Tensor], Tensor, Tensor]:
        positions = np.arange(step * training.batch, (step + 1) * training.batch)
        pick = mixed(positions, len(samples), 0, seed=config["seed"])
        columns = torch.randint(voxels, (training.batch, config["voxels_per_example"]), generator=generator)
        measured = np.take_along_axis(betas[samples.row[pick]], columns.numpy(), 1)
        return taps.read(targets[pick], generator), columns, torch.from_numpy(measured).float()

    def batch_loss(
        drawn: tuple[list[Tensor], Tensor, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        images, columns, betas = drawn
        with torch.no_grad():
            scene = taps.compute(images)
        predicted = model.encoder(scene, columns.to(ctx.device))
        return encoder_loss(predicted, betas.to(ctx.device)), {}

    summary = fit_table(ctx, model, table, read, batch_loss, training, len(samples), "new subject's encoder")
    model.eval()
    with torch.no_grad():
        rows = np.array_split(np.arange(len(samples)), max(1, len(samples) // PREDICT_BATCH))
        predicted = torch.cat([model.encoder.predict(taps(targets[part]), 0).cpu() for part in rows])
    r = voxel_correlation(predicted, torch.from_numpy(np.asarray(betas[samples.row])).float())
    np.save(ctx.out / "correlation.npy", r.numpy())
    return {**data.used(), **summary, "correlation (training)": float(r.quantile(0.75))}


class NewPredictor(Predictor):
    """Predicts the new subject's response to external images, with the adapted encoder.

    Args:
        ctx: of a stage that reads ``base_targets``, ``encoder`` and ``adapted``.
        config: of stage ``transfer-external``.
        data: the new subject.
    """

    def __init__(self, ctx: StageContext, config: Mapping[str, Any], data: NewSubject) -> None:
        self.data = data
        self.taps = encoder_taps(config, data.base, ctx.inputs["base_targets"], ctx.device)
        self.model = EncoderWithAdapters(config, data, self.taps)
        table = load_file(ctx.inputs["adapted"] / TABLE)["table"]
        adopt(self.model, encoder_tensors(ctx.inputs["encoder"]), f"encoder.{ENCODER_TABLE}", table)
        self.model.to(ctx.device).eval()

    def __call__(self, rows: np.ndarray, subjects: Any) -> list[Tensor]:
        """Return the response to external images, given as target rows of the new subject's data: [B x voxels]."""
        return super().__call__(self.data.in_base(rows), subjects)


def run_external(ctx: StageContext) -> dict[str, Any]:
    """Predict the new subject's response to the external images, where the config does not leave that to later.

    Output: ``betas``, shards of external images x voxels, float16.
    """
    data = NewSubject.of(ctx)
    count, first = len(data.external), len(data.target_ids)
    if ctx.config["store"] == "live" or not count:
        return {"images": 0}
    predict = NewPredictor(ctx, ctx.config, data)

    def compute(rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"betas": predict(rows + first, [0])[0].numpy()}

    return keep_predictions(ctx, count, compute)


def run_clusters(ctx: StageContext) -> dict[str, Any]:
    """Give each new voxel the cluster of the known voxel whose encoder embedding is nearest.

    Outputs: ``v2c.safetensors``, the new subject's voxels and their clusters, and ``nearest.npy`` (voxels: the nearest
    known voxel, as a row of the base models' voxel tables).
    """
    base = load_mapping(ctx.inputs["clusters"])
    known = load_file(ctx.inputs["encoder"] / "encoder.safetensors")[ENCODER_TABLE].numpy()
    new = load_file(ctx.inputs["adapted"] / TABLE)["table"].numpy()
    labels, nearest = nearest_voxel_labels(new, known, base.labels)
    mapping = V2C(labels, base.n_clusters, base.means, method="nearest-voxel")
    mapping.save(ctx.out / "v2c.safetensors")
    np.save(ctx.out / NEAREST, nearest)
    sizes = mapping.sizes()
    return {
        "clusters": mapping.n_clusters,
        "smallest": sizes.minimum,
        "median": sizes.median,
        "largest": sizes.maximum,
        "without a voxel": sizes.empty,
        "known voxels that are nearest": len(np.unique(nearest)),
    }


# --- the voxel tables of the BITs -------------------------------------------------------------------------------------


class MixedPool(Pool):
    """Recordings and predicted ones by the rule of the official code: every fourth sample is a recording."""

    def __init__(self, ctx: StageContext, data: NewSubject) -> None:
        external, used, predict = ctx.stage.upstream["external"], ctx.config.get("external_used", 1.0), None
        if external.config["store"] == "live" and used:
            predict = NewPredictor(ctx, external.config, data)
        super().__init__(data, ctx.inputs["external"], None, ctx.config["seed"], predict, used)
        self.every: int = ctx.config["real_every"]

    @property
    def epoch(self) -> int:
        """Samples of an epoch."""
        return epoch_length(len(self.samples), self.external, self.every)

    def _in_epochs(self, size: int, step: int) -> np.ndarray:
        positions = np.arange(step * size, (step + 1) * size)
        return mixed(positions, len(self.samples), self.external, every=self.every, seed=self.seed)


def fit_table(
    ctx: StageContext,
    model: nn.Module,
    table: nn.Parameter,
    read: Read,
    batch_loss: BatchLoss,
    settings: TableConfig,
    samples: int,
    label: str,
    *,
    read_ahead: bool = True,
) -> dict[str, Any]:
    """Train a voxel table, the one part of ``model`` that is not frozen, and keep it; return the summary.

    Output: ``table.safetensors``.

    Args:
        ctx: of the stage.
        model: the frozen model with the table in it.
        table: which learns.
        read, batch_loss, read_ahead: as of ``training.train``.
        settings: of the training.
        samples: of an epoch.
        label: for people.

    Raises:
        RunError: a frozen tensor is not what it was.
    """
    before = frozen_digest(model)
    # There is nothing to validate on, but the mean loss of each epoch is wanted.
    result = train(
        model,
        batch_loss,
        config=shared_out(settings.training(samples, ctx.config["seed"])),
        ctx=ctx,
        label=label,
        read=read,
        read_ahead=read_ahead,
        validate=dict,
    )
    if frozen_digest(model) != before:
        raise RunError(f"{label}: a frozen weight changed; this is a fault of the program, and the table is not kept")
    if is_first_process():
        save_file({"table": table.detach().cpu().contiguous()}, ctx.out / TABLE)
    losses = [epoch["train_loss"] for epoch in result.history]
    return {
        "first epoch's loss": losses[0],
        "loss": losses[-1],
        "steps": result.steps,
        "parameters": table.numel(),
        "frozen": before,
    }


def adopted_bit(
    ctx: StageContext, data: NewSubject, sizes: Mapping[str, Any], base: Path, start: Tensor | None = None
) -> tuple[BIT, nn.Parameter]:
    """Return a trained BIT, frozen, with a table of the new subject's voxels, and this table.

    Args:
        ctx: of a stage that reads ``clusters``.
        data: the new subject.
        sizes: of the BIT.
        base: folder that holds the trained one.
        start: of the table; by default each voxel starts from the nearest known voxel's embedding in the trained one.
    """
    trained = load_file(base / "bit.safetensors")
    queries, width = len(trained["query_tokens"]), len(trained["proj.bias"])
    bit = build_bit(sizes, voxel_layout(data, ctx.inputs["clusters"]), queries, width)
    if start is None:
        start = trained[BIT_TABLE][torch.from_numpy(np.load(ctx.inputs["clusters"] / NEAREST))]
    return bit, adopt(bit, trained, BIT_TABLE, start)


def run_lowlevel(ctx: StageContext) -> dict[str, Any]:
    """Train the new subject's voxel table in the low-level BIT, by the loss that trained the BIT.

    Output: ``table.safetensors``.
    """
    config, data = dict(ctx.config), NewSubject.of(ctx)
    settings = TableConfig.model_validate(config["table"])
    targets, pool = _LowLevel(ctx, data), MixedPool(ctx, data)
    bit, table = adopted_bit(ctx, data, config, ctx.inputs["lowlevel"])

    def read(step: int, generator: torch.Generator) -> Drawn:
        batch = pool.draw(settings.batch, step, generator)
        return draw(config, data, batch, generator, targets.read, targets.tokens)

    def batch_loss(drawn: Drawn, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return lowlevel_loss(bit, drawn, targets, config["scale"], ctx.device)[0], {}

    label = "new subject's low-level BIT"
    summary = fit_table(ctx, bit, table, read, batch_loss, settings, pool.epoch, label, read_ahead=pool.may_read_ahead)
    return {**data.used(), **summary}


def run_semantic(ctx: StageContext) -> dict[str, Any]:
    """Train the new subject's voxel table in the semantic BIT, stage 1: mean squared error to the spatial tokens.

    Output: ``table.safetensors``.
    """
    config, data = dict(ctx.config), NewSubject.of(ctx)
    settings = TableConfig.model_validate(config["table"])
    targets, pool = _Semantic(ctx, data), MixedPool(ctx, data)
    bit, table = adopted_bit(ctx, data, config, ctx.inputs["semantic"])

    def read(step: int, generator: torch.Generator) -> Drawn:
        return draw(config, data, pool.draw(settings.batch, step, generator), generator, targets.read)

    def batch_loss(drawn: Drawn, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        predicted = predicted_tokens(bit, drawn.batch, drawn.keep, ctx.device).float()
        return F.mse_loss(predicted, targets.compute(drawn.true)), {}

    label = "new subject's semantic BIT"
    summary = fit_table(ctx, bit, table, read, batch_loss, settings, pool.epoch, label, read_ahead=pool.may_read_ahead)
    return {**data.used(), **summary}


def run_joint(ctx: StageContext) -> dict[str, Any]:
    """Train the semantic table further, stage 2: on the diffusion loss, in the jointly trained BIT and denoiser.

    Output: ``table.safetensors``.
    """
    config, data = dict(ctx.config), NewSubject.of(ctx)
    settings = TableConfig.model_validate(config["table"])
    generator_network = networks.generator(config["generator"], unet=ctx.inputs["joint"] / "unet.safetensors")
    unet = generator_network.unet
    assert isinstance(unet, nn.Module)
    if ctx.stage.hints.get("checkpointing"):
        unet.enable_gradient_checkpointing()  # type: ignore[operator]
    start = load_file(ctx.inputs["semantic"] / TABLE)["table"]
    bit, table = adopted_bit(ctx, data, config["bit"], ctx.inputs["joint"], start)
    model = BrainToImage(bit, unet.requires_grad_(False))
    pool = MixedPool(ctx, data)
    own, base = (Shards(ctx.inputs[role] / "latents") for role in ("targets", "base_targets"))

    def of_disk(rows: np.ndarray) -> Tensor:
        return _Halves.read(data, rows, own.__getitem__, base.__getitem__).joined(torch.from_numpy, torch.from_numpy)

    def read(step: int, generator: torch.Generator) -> Drawn:
        return draw(config["bit"], data, pool.draw(settings.batch, step, generator), generator, of_disk)

    def batch_loss(drawn: Drawn, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return joint_loss(model, generator_network, drawn, generator, config["offset_noise"], ctx.device), {}

    label = "new subject's joint training"
    summary = fit_table(
        ctx, model, table, read, batch_loss, settings, pool.epoch, label, read_ahead=pool.may_read_ahead
    )
    return {**data.used(), **summary}


# --- reconstruction ---------------------------------------------------------------------------------------------------


def whole_bit(base: Path, transferred: Path) -> dict[str, Tensor]:
    """Return the tensors of a BIT for the new subject.

    Args:
        base: folder that holds the trained BIT.
        transferred: folder that holds the new subject's table.
    """
    return {**load_file(base / "bit.safetensors"), BIT_TABLE: load_file(transferred / TABLE)["table"]}


def run_reconstruct(ctx: StageContext) -> dict[str, Any]:
    """Reconstruct what the new subject saw: its tables in the base models, then as stage ``reconstruct`` does.

    Outputs: those of stage ``reconstruct``.
    """
    inputs = dict(ctx.inputs)
    for role in ("lowlevel", "joint"):
        whole = ctx.checkpoints / "models" / role
        whole.mkdir(parents=True, exist_ok=True)
        base = ctx.inputs[f"base_{role}"]
        for name in ("unet.safetensors", "calibration.safetensors"):
            if (base / name).is_file() and not (whole / name).is_symlink():
                os.symlink((base / name).resolve(), whole / name)
        save_file(whole_bit(base, ctx.inputs[role]), whole / "bit.safetensors")
        inputs[role] = whole
    return reconstruct.run(replace(ctx, inputs=inputs))
