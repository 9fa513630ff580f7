"""Stages ``lowlevel``, ``semantic`` and ``joint``: training of the two Brain Interaction Transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark import networks
from benchmark.context import StageContext
from benchmark.devices import as_float32
from benchmark.shards import Shards
from benchmark.stages.encoder import Predictor, load_mapping
from benchmark.stages.features import LowLevelTargets, SemanticTargets, read_shapes
from benchmark.stages.prepare import Prepared
from benchmark.training import BatchLoss, Read, Validate, is_first_process, shared_out, train
from benchmark.training_config import TrainingConfig
from methods.brain_it.losses import multi_layer_info_nce
from methods.brain_it.tokenizer import VoxelLayout, sample_voxels
from methods.brain_it.transformer import BIT
from methods.brain_it.unclip import diffusion_loss
from methods.brain_it.vgg_tokens import FeatureTokens, fit_calibration

VALIDATION_SEED = 20


@dataclass(frozen=True)
class Batch:
    """Recordings (measured or predicted) and the target rows of what they show."""

    betas: Tensor  # B x most voxels, zero-padded; float16 where all that is drawn from is, which a network is not
    subject: Tensor  # B, position of the subject
    rows: np.ndarray  # B, target rows


class Pool:
    """What a BIT trains on: every subject's own recordings, and the external images with predicted recordings.

    Args:
        data: the prepared data.
        external: folder of stage ``external``.
        predict: predicts the responses to external images where that stage left it to later.
        fraction: external share of a batch; None shuffles all samples together, each once an epoch (official code).
        seed: of the epochs' order, and of which external images are used.
        used: fraction of the external images to draw from; a larger one contains the smaller ones.
    """

    def __init__(
        self,
        data: Prepared,
        external: Path,
        fraction: float | None,
        seed: int,
        predict: Predictor | None = None,
        used: float = 1.0,
    ) -> None:
        self.data, self.fraction, self.seed = data, fraction, seed
        self.samples = data.samples(data.train_ids)
        self.rows = data.target_rows(self.samples.image)
        self.predict = predict
        self.stored = Shards(external / "betas") if (external / "betas").is_dir() else None
        count = len(self.stored) if self.stored is not None else len(data.external) if predict else 0
        self.dtype = data.betas_dtype
        if self.stored is not None or predict is not None:
            self.dtype = np.result_type(self.dtype, np.float32 if self.stored is None else self.stored.dtype)
        self.images = np.arange(count) if used == 1 else np.random.default_rng(seed).permutation(count)
        self.external = round(used * count)
        self.starts = np.concatenate([[0], np.cumsum(data.n_voxels)])
        self._epoch: tuple[int, np.ndarray] | None = None

    @property
    def may_read_ahead(self) -> bool:
        """Whether batches may be drawn while a network trains: not where the encoder has to predict responses."""
        return self.predict is None

    def draw(self, size: int, step: int, generator: torch.Generator) -> Batch:
        """Return the batch of micro-step ``step``; subjects are mixed, an external image gets a random one."""
        real = len(self.samples)
        if self.fraction is None:
            pick = self._in_epochs(size, step)
        else:
            external = round(self.fraction * size) if self.external else 0
            own = torch.randint(real, (size - external,), generator=generator)
            other = torch.randint(max(1, self.external), (external,), generator=generator) + real
            pick = torch.cat([own, other]).numpy()
        guests = torch.randint(len(self.data.subjects), (size,), generator=generator).numpy()
        measured = pick < real
        clipped = np.minimum(pick, real - 1)
        subject = np.where(measured, self.samples.subject[clipped], guests)
        image = np.zeros(size, np.int64)
        image[~measured] = self.images[pick[~measured] - real]
        rows = np.where(measured, self.rows[clipped], image + len(self.data.target_ids))
        # As stored, and in numpy: one thread and no conversion, which does not disturb the step that computes.
        betas = np.zeros((size, max(self.data.n_voxels)), self.dtype)
        recorded = np.flatnonzero(measured)
        self.data.put_betas(betas, recorded, subject[recorded], self.samples.row[pick[recorded]])
        for place, predicted in self._predicted(np.flatnonzero(~measured), image, subject):
            betas[place, : len(predicted)] = predicted
        return Batch(torch.from_numpy(betas), torch.from_numpy(subject), rows)

    def _predicted(
        self, places: np.ndarray, image: np.ndarray, subject: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the responses that the encoder predicts for the external images at ``places`` of a batch."""
        if self.stored is not None:
            for k in places.tolist():  # of a row, which holds all subjects, only the one's part is read
                s = subject[k]
                yield k, self.stored.row(int(image[k]))[int(self.starts[s]) : int(self.starts[s + 1])]
        elif len(places):
            assert self.predict is not None
            for s in np.unique(subject[places]).tolist():
                own = places[subject[places] == s]
                (found,) = self.predict(image[own] + len(self.data.target_ids), [s])
                yield from zip(own.tolist(), found.numpy(), strict=True)

    def _in_epochs(self, size: int, step: int) -> np.ndarray:
        total = len(self.samples) + self.external
        positions = np.arange(step * size, (step + 1) * size)
        out = np.empty(size, np.int64)
        for epoch in np.unique(positions // total):
            here = positions // total == epoch
            out[here] = self._order(int(epoch), total)[positions[here] % total]
        return out

    def _order(self, epoch: int, total: int) -> np.ndarray:
        """Return the order of an epoch's samples. Threads may ask for different ones at a time."""
        known = self._epoch
        if known is None or known[0] != epoch:
            known = self._epoch = (epoch, np.random.default_rng([self.seed, epoch]).permutation(total))
        return known[1]


class Validation:
    """Measured recordings of the validation images, in batches."""

    def __init__(self, data: Prepared) -> None:
        self.data = data
        self.samples = data.samples(data.validation_ids)
        self.rows = data.target_rows(self.samples.image)

    def batches(self, size: int) -> list[Batch]:
        """Return them in a fixed mixed order, so that a batch holds several subjects as in training."""
        order = np.random.default_rng(VALIDATION_SEED).permutation(len(self.samples))
        return [self._batch(order[k : k + size]) for k in range(0, len(order), size)]

    def _batch(self, pick: np.ndarray) -> Batch:
        subject = self.samples.subject[pick]
        betas = self.data.padded_betas(subject, self.samples.row[pick])
        return Batch(torch.from_numpy(betas), torch.from_numpy(subject), self.rows[pick])


def voxel_layout(data: Prepared, clusters: Path) -> VoxelLayout:
    """Return the subjects' voxels with the clusters that stage ``clusters`` gave them."""
    mapping = load_mapping(clusters)
    return VoxelLayout.build(mapping.per_subject(data.n_voxels), mapping.n_clusters)


def build_bit(config: Mapping[str, Any], layout: VoxelLayout, n_queries: int, out_dim: int) -> BIT:
    """Return a fresh BIT with the sizes in ``config``."""
    sizes = {name: config[name] for name in ("dim", "depth", "heads")}
    return BIT(layout, n_queries=n_queries, out_dim=out_dim, **sizes)


def kept_voxels(config: Mapping[str, Any], data: Prepared, batch: Batch, generator: torch.Generator) -> Tensor | None:
    """Return which voxels of each recording take part in a training step: B x most voxels, bool; None for all."""
    if config.get("voxels_per_example") is None:
        return None
    counts = torch.tensor(data.n_voxels)[batch.subject]
    return sample_voxels(counts, config["voxels_per_example"], len(counts), generator, width=batch.betas.shape[1])


@dataclass(frozen=True)
class Drawn:
    """A batch, and what chance and the disk have to say of it before a network sees it."""

    batch: Batch
    keep: Tensor | None
    """As of :func:`kept_voxels`."""
    positions: Tensor | None
    """B x sampled tokens, of the low-level targets; None for all."""
    true: Any
    """What was read of the targets."""


def draw(
    config: Mapping[str, Any],
    data: Prepared,
    batch: Batch,
    generator: torch.Generator,
    read: Callable[[np.ndarray], Any],
    tokens: FeatureTokens | None = None,
    *,
    training: bool = True,
) -> Drawn:
    """Draw kept voxels (in training) and positions among ``tokens`` (where given), and read the targets of a batch."""
    keep = kept_voxels(config, data, batch, generator) if training else None
    positions = None if tokens is None else tokens.sample_positions(len(batch.rows), generator)
    return Drawn(batch, keep, positions, read(batch.rows))


def _start_embeddings(bit: BIT, config: Mapping[str, Any], encoder: Path) -> None:
    """Start the voxel embeddings as the config says: at random or at a projection of the encoder's, at any scale."""
    table = bit.tokenizer.voxel_embeddings
    std = config["embedding_std"] or float(table.detach().std())
    with torch.no_grad():
        if config["embedding_init"] == "encoder":
            known = load_file(encoder / "encoder.safetensors")["voxel_embedding"]
            generator = torch.Generator().manual_seed(config["seed"])
            projection = torch.randn(known.shape[1], table.shape[1], generator=generator) / math.sqrt(known.shape[1])
            table.copy_((known - known.mean(0)) / known.std(0) @ projection)
        table.mul_(std / table.std())


def fresh_bit(config: Mapping[str, Any], layout: VoxelLayout, encoder: Path, n_queries: int, out_dim: int) -> BIT:
    """Return an untrained BIT with the sizes, the seed and the start of the voxel embeddings in ``config``."""
    torch.manual_seed(config["seed"])
    bit = build_bit(config, layout, n_queries, out_dim)
    _start_embeddings(bit, config, encoder)
    return bit


def _start(ctx: StageContext, data: Prepared, n_queries: int, out_dim: int) -> tuple[BIT, Pool]:
    """Return a fresh BIT and what it trains on."""
    config = ctx.config
    bit = fresh_bit(config, voxel_layout(data, ctx.inputs["clusters"]), ctx.inputs["encoder"], n_queries, out_dim)
    return bit, open_pool(ctx, data)


def open_pool(ctx: StageContext, data: Prepared) -> Pool:
    """Return what a network of this stage trains on."""
    config, predict = ctx.config, None
    external, used = ctx.stage.upstream["external"], config.get("external_used", 1.0)
    if external.config["store"] == "live" and config["external_fraction"] != 0 and used:
        predict = Predictor(external.config, data, ctx.inputs["targets"], ctx.inputs["encoder"], ctx.device)
    return Pool(data, ctx.inputs["external"], config["external_fraction"], config["seed"], predict, used)


def token_correlation(predicted: Tensor, true: Tensor) -> Tensor:
    """Return the Pearson correlation of each image's flattened tokens, B."""
    p, t = predicted.flatten(1), true.flatten(1)
    p, t = p - p.mean(1, keepdim=True), t - t.mean(1, keepdim=True)
    return (p * t).sum(1) / (p.norm(dim=1) * t.norm(dim=1)).clamp(min=1e-12)


def mean_loss(loss_of: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> float:
    """Return the mean over the examples of all ``batches`` of a loss that is a mean over each batch."""
    return sum(float(loss_of(batch)) * len(batch.rows) for batch in batches) / sum(len(b.rows) for b in batches)


def predicted_tokens(
    model: nn.Module, batch: Batch, keep: Tensor | None, device: str, queries: Tensor | None = None
) -> Tensor:
    """Return what a network, called as a BIT is, predicts from a batch's kept voxels (all where None)."""
    mask = None if keep is None else keep.to(device)
    betas = as_float32(batch.betas, device)
    tokens: Tensor = model(betas, batch.subject.to(device), keep=mask, queries=queries)
    return tokens


def lowlevel_loss(
    model: nn.Module, drawn: Drawn, targets: LowLevelTargets, scale: float | None, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss at the positions drawn for each example (Sec. 3.2), and the predicted and true tokens there.

    It is InfoNCE with logits of this ``scale``, or without one the squared error; the mean over the layers of either.
    """
    tokens, positions = targets.tokens, drawn.positions
    assert positions is not None
    index = positions[..., None].expand(-1, -1, tokens.width)
    found = targets.compute(drawn.true)
    true = found.gather(1, index.to(found.device)).to(device)
    predicted = predicted_tokens(model, drawn.batch, drawn.keep, device, queries=positions.to(device)).float()
    if scale is not None:
        return multi_layer_info_nce(predicted, true, tokens.sampled_sizes, scale), predicted, true
    layers = zip(predicted.split(tokens.sampled_sizes, 1), true.split(tokens.sampled_sizes, 1), strict=True)
    return torch.stack([F.mse_loss(ours, theirs) for ours, theirs in layers]).mean(), predicted, true


def run_lowlevel(ctx: StageContext) -> dict[str, Any]:
    """Train the low-level BIT with InfoNCE on sampled positions (Sec. 3.2).

    Outputs: ``bit.safetensors``, and ``calibration.safetensors``: for each layer, the linear map from predicted to true
    tokens that fits the validation images best.
    """
    data = Prepared(ctx.inputs["data"])
    targets = LowLevelTargets(ctx.inputs["targets"], ctx.config, ctx.stage.upstream["targets"].config, data, ctx.device)
    bit, pool = _start(ctx, data, targets.tokens.tokens, targets.tokens.width)
    summary = fit_lowlevel(ctx, data, targets, bit, pool, "low-level BIT")
    save_file(bit.state_dict(), ctx.out / "bit.safetensors")
    return summary


def fit_lowlevel(
    ctx: StageContext, data: Prepared, targets: LowLevelTargets, model: nn.Module, pool: Pool, label: str
) -> dict[str, Any]:
    """Train a network, called as a BIT is, to predict the low-level tokens; return its summary.

    Output: ``calibration.safetensors``.
    """
    config = dict(ctx.config)

    def drawn(batch: Batch, generator: torch.Generator, training: bool) -> Drawn:
        return draw(config, data, batch, generator, targets.read, targets.tokens, training=training)

    def loss_of(drawn: Drawn) -> tuple[Tensor, Tensor, Tensor]:
        return lowlevel_loss(model, drawn, targets, config.get("scale"), ctx.device)

    def read(step: int, generator: torch.Generator) -> Drawn:
        return drawn(pool.draw(config["batch"], step, generator), generator, training=True)

    def batch_loss(drawn: Drawn, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return loss_of(drawn)[0], {}

    validation = Validation(data).batches(config["batch"])

    def validate() -> dict[str, float]:
        generator = torch.Generator().manual_seed(VALIDATION_SEED)  # the same positions each time
        correlations = []

        def measured(batch: Batch) -> Tensor:
            loss, predicted, true = loss_of(drawn(batch, generator, training=False))
            correlations.append(token_correlation(predicted, true))
            return loss

        return {"loss": mean_loss(measured, validation), "correlation": float(torch.cat(correlations).mean())}

    summary = _fit(ctx, model, pool, read, batch_loss, validate, label)
    model.eval()
    save_calibration(ctx, validation, targets, lambda batch: predicted_tokens(model, batch, None, ctx.device).float())
    return summary


@torch.no_grad()
def save_calibration(
    ctx: StageContext, validation: Sequence[Batch], targets: LowLevelTargets, predict: Callable[[Batch], Tensor]
) -> None:
    """Fit each layer's linear map from predicted to true tokens on the validation images, and keep the maps.

    Output: ``calibration.safetensors``.
    """
    pairs = ((predict(batch), targets(batch.rows)) for batch in validation)
    matrices = fit_calibration(pairs, targets.tokens.layer_sizes)
    save_file({str(k): matrix.contiguous() for k, matrix in enumerate(matrices)}, ctx.out / "calibration.safetensors")


def run_semantic(ctx: StageContext) -> dict[str, Any]:
    """Train the semantic BIT, stage 1: mean squared error to the spatial tokens (Sec. 3.2).

    Output: ``bit.safetensors``.
    """
    data = Prepared(ctx.inputs["data"])
    targets = SemanticTargets(ctx.inputs["targets"], ctx.stage.upstream["targets"].config, data, ctx.device)
    bit, pool = _start(ctx, data, targets.tokens, targets.width)
    summary = fit_semantic(ctx, data, targets, bit, pool, "semantic BIT")
    save_file(bit.state_dict(), ctx.out / "bit.safetensors")
    return summary


def fit_semantic(
    ctx: StageContext, data: Prepared, targets: SemanticTargets, model: nn.Module, pool: Pool, label: str
) -> dict[str, Any]:
    """Train a network, called as a BIT is, to predict the semantic tokens; return its summary."""
    config = dict(ctx.config)

    def pair(drawn: Drawn) -> tuple[Tensor, Tensor]:
        predicted = predicted_tokens(model, drawn.batch, drawn.keep, ctx.device).float()
        return predicted, targets.compute(drawn.true)

    def read(step: int, generator: torch.Generator) -> Drawn:
        return draw(config, data, pool.draw(config["batch"], step, generator), generator, targets.read)

    def batch_loss(drawn: Drawn, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return F.mse_loss(*pair(drawn)), {}

    validation = Validation(data).batches(config["batch"])

    def validate() -> dict[str, float]:
        pairs = [pair(Drawn(batch, None, None, targets.read(batch.rows))) for batch in validation]
        predicted, true = (torch.cat(side) for side in zip(*pairs, strict=True))
        return {
            "loss": float(F.mse_loss(predicted, true)),
            "correlation": float(token_correlation(predicted, true).mean()),
        }

    return _fit(ctx, model, pool, read, batch_loss, validate, label)


def _fit(
    ctx: StageContext, model: nn.Module, pool: Pool, read: Read, batch_loss: BatchLoss, validate: Validate, label: str
) -> dict[str, Any]:
    result = train(
        model,
        batch_loss,
        config=TrainingConfig.model_validate(ctx.config["training"]),
        ctx=ctx,
        label=label,
        read=read,
        read_ahead=pool.may_read_ahead,
        validate=validate,
        parameter_groups={"voxels": [model.tokenizer.voxel_embeddings]} if isinstance(model, BIT) else {},
    )
    return {**result.best, "best_step": result.best_step, "parameters": sum(p.numel() for p in model.parameters())}


class BrainToImage(nn.Module):
    """The semantic BIT and the denoiser that it conditions: what stage 2 trains together."""

    def __init__(self, bit: BIT, unet: nn.Module) -> None:
        super().__init__()
        self.bit, self.unet = bit, unet


def joint_loss(
    model: BrainToImage,
    generator_network: networks.Generator,
    drawn: Drawn,
    generator: torch.Generator,
    offset: float,
    device: str,
) -> Tensor:
    """Return the diffusion loss of a batch, of which latents were read, conditioned on the tokens of the BIT."""
    condition = predicted_tokens(model.bit, drawn.batch, drawn.keep, device)
    return diffusion_loss(
        model.unet,
        drawn.true.float().to(device),
        condition,
        generator,
        schedule=generator_network.schedule,
        offset=offset,
        vector=generator_network.vector,
    )


def run_joint(ctx: StageContext) -> dict[str, Any]:
    """Train semantic BIT and denoiser together on the diffusion loss (Sec. 3.2, stage 2).

    Outputs: ``bit.safetensors``, ``unet.safetensors``.
    """
    config = dict(ctx.config)
    training = shared_out(TrainingConfig.model_validate(config["training"]))
    data = Prepared(ctx.inputs["data"])
    tokens, width = read_shapes(ctx.inputs["targets"])["semantic"]
    latents = Shards(ctx.inputs["targets"] / "latents")
    generator_network = networks.generator(config["generator"])
    bit = build_bit(config["bit"], voxel_layout(data, ctx.inputs["clusters"]), tokens, width)
    bit.load_state_dict(load_file(ctx.inputs["semantic"] / "bit.safetensors"))
    unet = generator_network.unet
    assert isinstance(unet, nn.Module)
    if ctx.stage.hints.get("checkpointing"):
        unet.enable_gradient_checkpointing()  # type: ignore[operator]
    model = BrainToImage(bit, unet.requires_grad_(True))
    pool = open_pool(ctx, data)

    def of_disk(rows: np.ndarray) -> Tensor:
        return torch.from_numpy(latents[rows])

    def loss_of(drawn: Drawn, generator: torch.Generator) -> Tensor:
        return joint_loss(model, generator_network, drawn, generator, config["offset_noise"], ctx.device)

    def read(step: int, generator: torch.Generator) -> Drawn:
        return draw(config["bit"], data, pool.draw(config["batch"], step, generator), generator, of_disk)

    def batch_loss(drawn: Drawn, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return loss_of(drawn, generator), {}

    validation = Validation(data).batches(64)

    def validate() -> dict[str, float]:
        generator = torch.Generator().manual_seed(VALIDATION_SEED)  # the same levels and noise each time
        losses = mean_loss(lambda b: loss_of(Drawn(b, None, None, of_disk(b.rows)), generator), validation)
        return {"loss": losses}

    with torch.no_grad():
        model.to(ctx.device).eval()
        before = validate()["loss"]
    result = train(
        model,
        batch_loss,
        config=training,
        ctx=ctx,
        label="joint training",
        read=read,
        read_ahead=pool.may_read_ahead,
        validate=validate,
        parameter_groups={"voxels": [bit.tokenizer.voxel_embeddings]},
    )
    if not is_first_process():
        return {}
    save_file(model.bit.state_dict(), ctx.out / "bit.safetensors")
    save_file({k: v.contiguous() for k, v in model.unet.state_dict().items()}, ctx.out / "unet.safetensors")
    parameters = sum(p.numel() for p in model.parameters())
    return {**result.best, "loss before": before, "best_step": result.best_step, "parameters": parameters}
