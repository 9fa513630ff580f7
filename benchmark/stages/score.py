"""Stages ``score`` and ``references``: all metrics, image by image."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmark import networks
from benchmark.context import StageContext
from benchmark.stages import KINDS, METHOD, image_name, seen_name
from benchmark.stages.prepare import Prepared
from benchmark.stages.reconstruct import read_images
from metrics.evaluate import TruthCache, evaluate
from metrics.protocols import Protocol, get_protocol, protocol_hash

REPEATS = "mean of all presentations"
_CACHE = TruthCache()  # one process scores many variants against the same seen images


@dataclass(frozen=True)
class _Judge:
    """Scores sets of images of several subjects under one protocol."""

    ctx: StageContext
    protocol: Protocol
    backbones: Mapping[str, Any]
    seen: dict[int, np.ndarray]

    @classmethod
    def of(cls, ctx: StageContext, folder: Path, ids: np.ndarray) -> _Judge:
        protocol = get_protocol(ctx.config["protocol"])
        seed = ctx.config["random_weights"]
        backbones = {
            name: networks.feature_network(name, random_seed=seed).to(ctx.device) for name in protocol.networks
        }
        images = read_images(folder / "seen", [seen_name(image) for image in ids])
        return cls(ctx, protocol, backbones, dict(zip(ids.tolist(), images, strict=True)))

    def score(self, images: np.ndarray, subject: int, ids: np.ndarray, method: str, variant: str) -> pd.DataFrame:
        """Return one row an image and metric."""
        truths = np.stack([self.seen[int(image)] for image in ids])
        scores = evaluate(
            images,
            truths,
            self.protocol,
            self.backbones,
            ids.tolist(),
            cache=_CACHE,
            device=self.ctx.device,
            threads=self.ctx.threads,
        )
        parts = [
            pd.DataFrame(
                {
                    "track": self.ctx.config["track"],
                    "method": method,
                    "variant": variant,
                    "subject": subject,
                    "seed": self.ctx.config["seed"],
                    "image_id": ids,
                    "metric": key,
                    "value": values.astype(np.float64),
                }
            )
            for key, values in scores.per_image.items()
        ]
        return pd.concat(parts, ignore_index=True)

    def write(self, index: np.ndarray, frames: list[pd.DataFrame]) -> dict[str, Any]:
        """Write ``scores.parquet`` and ``protocol.json``; return a summary."""
        subjects = sorted(set(index[:, 0].tolist()))
        ids = np.unique(index[:, 1])
        digest = protocol_hash(
            self.protocol,
            dict(self.ctx.stage.digests),
            ids.tolist(),
            subjects=subjects,
            repeats=REPEATS,
        )
        table = pd.concat(frames, ignore_index=True)
        table.to_parquet(self.ctx.out / "scores.parquet", index=False)
        about = {"protocol": self.protocol.name, "protocol_hash": digest, "subjects": subjects, "n_images": len(ids)}
        (self.ctx.out / "protocol.json").write_text(json.dumps(about, indent=2) + "\n")
        means = table.groupby(["method", "variant", "metric"], sort=False)["value"].mean()
        return {
            "images": len(ids),
            **{
                f"{m} {v} {k}".replace("  ", " "): float(x)
                for (m, v, k), x in zip(means.index.to_list(), means.to_list(), strict=True)
            },
        }


def run(ctx: StageContext) -> dict[str, Any]:
    """Score a variant's combined images, each branch alone, and what else the config asks for.

    Outputs: ``scores.parquet`` (track, method, variant, subject, seed, image_id, metric, value; variant is
    ``combined``, ``lowlevel``, ``semantic``, or the config's ``images``) and ``protocol.json``.
    """
    folder = ctx.inputs["reconstruct"]
    index = np.load(folder / "index.npy")
    judge = _Judge.of(ctx, folder, np.unique(index[:, 1]))
    frames = []
    kinds = (*KINDS, ctx.config["images"]) if "images" in ctx.config else KINDS
    subjects = sorted(set(index[:, 0].tolist()))
    with ctx.progress.bar("scores", total=len(subjects) * len(kinds)) as bar:
        for subject in subjects:
            ids = index[index[:, 0] == subject, 1]
            names = [image_name(subject, int(image)) for image in ids]
            for kind in kinds:
                frames.append(judge.score(read_images(folder / kind, names), subject, ids, METHOD, kind))
                bar.advance(1, f"subject {subject} {kind}")
    summary = judge.write(index, frames)
    ctx.tracker.summary(summary)
    return summary


def run_references(ctx: StageContext) -> dict[str, Any]:
    """Score what a row must beat: the mean training image, and this variant's images dealt out to wrong recordings.

    Outputs as of :func:`run`, with variants ``mean image`` and ``shuffled``.
    """
    folder = ctx.inputs["reconstruct"]
    index = np.load(folder / "index.npy")
    data = Prepared(ctx.inputs["data"])
    judge = _Judge.of(ctx, folder, np.unique(index[:, 1]))
    frames = []
    for subject in sorted(set(index[:, 0].tolist())):
        ids = index[index[:, 0] == subject, 1]
        own = np.intersect1d(data.train_ids, data.seen_ids[data.subjects.index(subject)])
        mean = np.rint(data.images[own].mean(0)).astype(np.uint8)
        frames.append(judge.score(np.repeat(mean[None], len(ids), 0), subject, ids, "reference", "mean image"))
        names = [image_name(subject, int(image)) for image in ids]
        images = read_images(folder / ctx.config.get("images", "combined"), names)
        wrong = dealt_out(len(ids), ctx.config["seed"], subject)
        frames.append(judge.score(images[wrong], subject, ids, "reference", "shuffled"))
    return judge.write(index, frames)


def dealt_out(n: int, seed: int, subject: int) -> np.ndarray:
    """Return for each of n recordings another one's place, each place once: a random cycle has no fixed point."""
    order = np.random.default_rng([seed, subject]).permutation(n)
    wrong = np.empty(n, np.int64)
    wrong[order] = np.roll(order, 1)
    return wrong
