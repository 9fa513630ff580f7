"""Stages ``encoder``, ``external`` and ``clusters``: the Universal Brain Encoder and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmark.context import StageContext
from benchmark.errors import UserError
from benchmark.shards import collect, write_shards
from benchmark.stages.anatomy import cluster_by_anatomy
from benchmark.stages.features import LiveTaps, StoredTaps, encoder_taps
from benchmark.stages.prepare import Prepared
from benchmark.training import train
from benchmark.training_config import TrainingConfig
from methods.brain_it.clustering import V2C, gaussian_mixture, normalise
from methods.brain_it.encoder import BrainEncoder, voxel_correlation
from methods.brain_it.losses import encoder_loss

PREDICT_BATCH = 64


class EncoderWithAdapters(nn.Module):
    """The brain encoder, and the adapters of the backbone that it trains with it."""

    def __init__(self, config: Mapping[str, Any], data: Prepared, taps: StoredTaps | LiveTaps) -> None:
        super().__init__()
        channels, positions = taps.sizes
        self.encoder = BrainEncoder(
            data.n_voxels,
            channels,
            positions,
            embed_dim=config["embed_dim"],
            inner=config["inner"],
            dropout=config["dropout"],
        )
        self.adapters = taps.adapters if taps.adapters is not None else nn.ModuleList()

    def tensors(self) -> dict[str, Tensor]:
        """Return the encoder's tensors by their names in :class:`BrainEncoder`, and ``adapters.N.down`` and ``.up``."""
        own = self.encoder.state_dict()
        adapters = {f"adapters.{name}": value for name, value in self.adapters.state_dict().items()}
        return {name: value.contiguous().cpu() for name, value in {**own, **adapters}.items()}

    def load(self, path: Path) -> None:
        """Read what :meth:`tensors` gave."""
        found = load_file(path)
        adapters = {name: found.pop(name) for name in list(found) if name.startswith("adapters.")}
        self.encoder.load_state_dict(found)
        self.adapters.load_state_dict({name.removeprefix("adapters."): value for name, value in adapters.items()})


class Predictor:
    """Predicts a subject's response to target rows, with the encoder that a stage trained.

    Args:
        config: of stage ``external``.
        data: the images.
        targets: folder of stage ``targets``.
        encoder: folder of stage ``encoder``.
        device: where to compute.
    """

    def __init__(self, config: Mapping[str, Any], data: Prepared, targets: Path, encoder: Path, device: str) -> None:
        self.taps = encoder_taps(config, data, targets, device)
        self.model = EncoderWithAdapters(config, data, self.taps)
        self.model.load(encoder / "encoder.safetensors")
        self.model.to(device).eval()

    @torch.no_grad()
    def __call__(self, rows: np.ndarray, subjects: Sequence[int]) -> list[Tensor]:
        """Return each subject's (position's) responses to all of the target rows: B x voxels, on the CPU."""
        scene = self.taps(rows)
        return [self.model.encoder.predict(scene, position).float().cpu() for position in subjects]


def run(ctx: StageContext) -> dict[str, Any]:
    """Train the encoder on single-subject images.

    Outputs: those of :func:`fit_encoder`.
    """
    return fit_encoder(ctx, Prepared(ctx.inputs["data"]))


def fit_encoder(ctx: StageContext, data: Prepared) -> dict[str, Any]:
    """Train an encoder on the training images of ``data``; keep the weights with the best validation correlation.

    Outputs: ``encoder.safetensors`` (its voxel table is ``voxel_embedding``) and ``correlation.npy`` (voxels:
    validation Pearson r).
    """
    config = dict(ctx.config)
    torch.manual_seed(config["seed"])
    checkpointing = bool(ctx.stage.hints.get("checkpointing"))
    taps = encoder_taps(config, data, ctx.inputs["targets"], ctx.device, checkpointing)
    model = EncoderWithAdapters(config, data, taps)
    encoder = model.encoder
    training = TrainingConfig.model_validate(config["training"])
    samples = data.samples(data.train_ids)
    targets = data.target_rows(samples.image)
    starts = np.concatenate([[0], np.cumsum(data.n_voxels)])

    def read(step: int, generator: torch.Generator) -> tuple[list[Tensor], Tensor, Tensor]:
        pick = torch.randint(len(samples), (config["batch"],), generator=generator).numpy()
        subject, row = samples.subject[pick], samples.row[pick]
        uniform = torch.rand(config["batch"], config["voxels_per_example"], generator=generator).numpy()
        columns = (uniform * np.array(data.n_voxels)[subject][:, None]).astype(np.int64)  # with replacement
        betas = np.stack([data.betas[s][r][c] for s, r, c in zip(subject, row, columns, strict=True)])
        voxels = torch.from_numpy(columns + starts[subject][:, None])
        return taps.read(targets[pick], generator), voxels, torch.from_numpy(betas).float()

    def batch_loss(
        drawn: tuple[list[Tensor], Tensor, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        images, voxels, betas = drawn
        predicted = encoder(taps.compute(images), voxels.to(ctx.device))
        return encoder_loss(predicted, betas.to(ctx.device)), {}

    def validate() -> dict[str, float]:
        r = validation_correlation(encoder, taps, data)
        return {"correlation": float(r.quantile(0.75)), "median correlation": float(r.median())}

    result = train(
        model,
        batch_loss,
        config=training,
        ctx=ctx,
        label="encoder",
        read=read,
        validate=validate,
        parameter_groups={"voxels": [encoder.voxel_embedding]},
    )
    save_file(model.tensors(), ctx.out / "encoder.safetensors")
    model.eval()
    save_correlation(ctx.out, encoder, taps, data)
    parameters = sum(p.numel() for p in model.parameters())
    return {**result.best, "best_step": result.best_step, "parameters": parameters}


def validation_correlation(encoder: BrainEncoder, taps: StoredTaps | LiveTaps, data: Prepared) -> Tensor:
    """Return each voxel's correlation of predicted and measured responses to the validation images its subject saw."""
    samples = data.samples(data.validation_ids)
    targets = data.target_rows(samples.image)
    found = []
    for position in range(len(data.subjects)):
        own = np.flatnonzero(samples.subject == position)
        predicted = torch.cat(
            [
                encoder.predict(taps(targets[part]), position).cpu()
                for part in np.array_split(own, max(1, len(own) // PREDICT_BATCH))
            ]
        )
        measured = torch.from_numpy(data.betas[position][samples.row[own]]).float()
        found.append(voxel_correlation(predicted, measured))
    return torch.cat(found)


@torch.no_grad()
def save_correlation(out: Path, encoder: BrainEncoder, taps: StoredTaps | LiveTaps, data: Prepared) -> Tensor:
    """Write ``correlation.npy`` (see :func:`validation_correlation`), and return what is in it."""
    r = validation_correlation(encoder, taps, data)
    np.save(out / "correlation.npy", r.numpy())
    return r


def run_external(ctx: StageContext) -> dict[str, Any]:
    """Predict every subject's response to the external images, where the config does not leave that to later.

    Output: ``betas``, shards of external images x voxels of all subjects, float16.
    """
    config = dict(ctx.config)
    data = Prepared(ctx.inputs["data"])
    count, first = len(data.external), len(data.target_ids)
    if config["store"] == "live" or not count:
        return {"images": 0}
    predict = Predictor(config, data, ctx.inputs["targets"], ctx.inputs["encoder"], ctx.device)

    def compute(rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"betas": torch.cat(predict(rows + first, range(len(data.subjects))), dim=1).numpy()}

    return keep_predictions(ctx, count, compute)


def keep_predictions(
    ctx: StageContext, count: int, compute: Callable[[np.ndarray], dict[str, np.ndarray]]
) -> dict[str, Any]:
    """Write what ``compute`` predicts for ``count`` external images, in shards; goes on where it was stopped."""
    shards = ctx.checkpoints / "shards"
    with ctx.progress.bar("external images", total=count) as bar:
        write_shards(shards, count, compute, batch=PREDICT_BATCH, progress=bar.advance)
    collect(shards, ctx.out)
    return {"images": count}


def run_clusters(ctx: StageContext) -> dict[str, Any]:
    """Map every voxel of every subject to one of the shared clusters.

    Output: ``v2c.safetensors`` with its description.
    """
    if "anatomy" in ctx.inputs:
        mapping = cluster_by_anatomy(ctx.inputs["anatomy"], ctx.config)
    else:
        embeddings = load_file(ctx.inputs["encoder"] / "encoder.safetensors")["voxel_embedding"].numpy()
        mapping = fit_clusters(embeddings, ctx.config)
    return save_mapping(mapping, ctx.out)


def save_mapping(mapping: V2C, out: Path) -> dict[str, Any]:
    """Write ``v2c.safetensors``, and return what it is like."""
    mapping.save(out / "v2c.safetensors")
    sizes = mapping.sizes()
    return {
        "clusters": mapping.n_clusters,
        "smallest": sizes.minimum,
        "median": sizes.median,
        "largest": sizes.maximum,
        "converged": mapping.converged,
        "log_likelihood": mapping.log_likelihood,
    }


def fit_clusters(embeddings: np.ndarray, config: Mapping[str, Any]) -> V2C:
    """Cluster voxels by their embeddings (voxels x width), as the stage's ``config`` says.

    Raises:
        UserError: more clusters than voxels.
    """
    if config["n_clusters"] > len(embeddings):
        raise UserError(f"clustering.n_clusters is {config['n_clusters']}, but there are {len(embeddings)} voxels")
    return gaussian_mixture(
        normalise(embeddings),
        config["n_clusters"],
        covariance=config["covariance"],
        seed=config["seed"],
        max_iter=config["max_iter"],
    )


def load_mapping(folder: Path) -> V2C:
    """Read what stage ``clusters`` wrote."""
    return V2C.load(folder / "v2c.safetensors")
