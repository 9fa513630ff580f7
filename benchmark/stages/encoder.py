"""Stages ``encoder``, ``external`` and ``clusters``: the Universal Brain Encoder and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmark.context import StageContext
from benchmark.errors import UserError
from benchmark.stages.prepare import Prepared
from benchmark.training import train
from benchmark.training_config import TrainingConfig
from methods.brain_it.clustering import V2C, gaussian_mixture, normalise
from methods.brain_it.encoder import BrainEncoder, voxel_correlation
from methods.brain_it.losses import encoder_loss

PREDICT_BATCH = 64


class _Features:
    """Tapped image features of the target rows."""

    def __init__(self, folder: Path, taps: int) -> None:
        self.taps = [np.load(folder / f"encoder_{k}.npy", mmap_mode="r") for k in range(taps)]

    def __call__(self, rows: np.ndarray) -> list[Tensor]:
        """Return one B x positions x channels tensor for each tap."""
        return [torch.from_numpy(np.ascontiguousarray(tap[rows])).float() for tap in self.taps]


def _build(config: dict[str, Any], data: Prepared, features: _Features) -> BrainEncoder:
    return BrainEncoder(
        data.n_voxels,
        [tap.shape[2] for tap in features.taps],
        features.taps[0].shape[1],
        embed_dim=config["embed_dim"],
        inner=config["inner"],
        dropout=config["dropout"],
    )


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
    features = _Features(ctx.inputs["targets"], len(config["taps"]))
    model = _build(config, data, features)
    training = TrainingConfig.model_validate(config["training"])
    samples = data.samples(data.train_ids)
    targets = data.target_rows(samples.image)
    validation = data.samples(data.validation_ids)
    validation_targets = data.target_rows(validation.image)
    starts = np.concatenate([[0], np.cumsum(data.n_voxels)])

    def batch_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        pick = torch.randint(len(samples), (config["batch"],), generator=generator).numpy()
        subject, row = samples.subject[pick], samples.row[pick]
        uniform = torch.rand(config["batch"], config["voxels_per_example"], generator=generator).numpy()
        columns = (uniform * np.array(data.n_voxels)[subject][:, None]).astype(np.int64)  # with replacement
        betas = np.stack([data.betas[s][r][c] for s, r, c in zip(subject, row, columns, strict=True)])
        voxels = torch.from_numpy(columns + starts[subject][:, None])
        predicted = model([f.to(ctx.device) for f in features(targets[pick])], voxels.to(ctx.device))
        return encoder_loss(predicted, torch.from_numpy(betas).to(ctx.device)), {}

    def correlations() -> list[Tensor]:
        found = []
        for position in range(len(data.subjects)):
            own = np.flatnonzero(validation.subject == position)
            predicted = torch.cat(
                [
                    model.predict([f.to(ctx.device) for f in features(validation_targets[part])], position).cpu()
                    for part in np.array_split(own, max(1, len(own) // PREDICT_BATCH))
                ]
            )
            measured = torch.from_numpy(data.betas[position][validation.row[own]])
            found.append(voxel_correlation(predicted, measured))
        return found

    def validate() -> dict[str, float]:
        r = torch.cat(correlations())
        return {"correlation": float(r.quantile(0.75)), "median correlation": float(r.median())}

    result = train(
        model,
        batch_loss,
        config=training,
        ctx=ctx,
        label="encoder",
        validate=validate,
        parameter_groups={"voxels": [model.voxel_embedding]},
    )
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, ctx.out / "encoder.safetensors")
    model.eval()
    np.save(ctx.out / "correlation.npy", torch.cat(correlations()).numpy())
    parameters = sum(p.numel() for p in model.parameters())
    return {**result.best, "best_step": result.best_step, "parameters": parameters}


def run_external(ctx: StageContext) -> dict[str, Any]:
    """Predict every subject's response to the external images.

    Output: ``betas.npy``, external images x voxels of all subjects, float16.
    """
    config = dict(ctx.config)
    data = Prepared(ctx.inputs["data"])
    features = _Features(ctx.inputs["targets"], len(config["taps"]))
    model = _build(config, data, features)
    model.load_state_dict(load_file(ctx.inputs["encoder"] / "encoder.safetensors"))
    model.to(ctx.device).eval()
    count, first = len(data.external), len(data.target_ids)
    betas = np.lib.format.open_memmap(ctx.out / "betas.npy", "w+", np.float16, (count, sum(data.n_voxels)))
    with ctx.progress.bar("external images", total=count) as bar:
        for start in range(0, count, PREDICT_BATCH):
            rows = np.arange(start, min(start + PREDICT_BATCH, count))
            scene = [f.to(ctx.device) for f in features(rows + first)]
            parts = [model.predict(scene, position).cpu() for position in range(len(data.subjects))]
            betas[rows] = torch.cat(parts, dim=1).numpy()
            bar.advance(len(rows))
    betas.flush()
    return {"images": count}


def run_clusters(ctx: StageContext) -> dict[str, Any]:
    """Map every voxel of every subject to one of the shared clusters.

    Output: ``v2c.safetensors`` with its description.
    """
    embeddings = load_file(ctx.inputs["encoder"] / "encoder.safetensors")["voxel_embedding"].numpy()
    mapping = fit_clusters(embeddings, ctx.config)
    mapping.save(ctx.out / "v2c.safetensors")
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
