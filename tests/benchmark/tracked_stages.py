"""A variant that takes no time: stages that write what trackers are told of, in the forms of the real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from safetensors.numpy import save_file

from benchmark.context import StageContext
from benchmark.graph import Stage
from benchmark.stages import KINDS, METHOD, image_name, seen_name
from metrics.cards import CARDS

SUBJECTS, IMAGES = (1, 2), tuple(range(3, 45, 3))


def train(ctx: StageContext) -> dict[str, Any]:
    """Log curves, one of them repeated as after a kill, and write weights."""
    for step in (0, 10, 20, 10, 20, 30):
        ctx.tracker.log({"train/loss": 1 / (1 + step), "train/lr": 0.1, "epoch": step / 10}, step)
        ctx.tracker.log({"validation/correlation": step / 100}, step)
    save_file({"w": np.full((4, 4), ctx.config["seed"], np.float32)}, ctx.out / "bit.safetensors")
    if ctx.config.get("fails"):
        raise ValueError("the loss is nan at step 31")
    return {"correlation": 0.3, "parameters": 16}


def reconstruct(ctx: StageContext) -> dict[str, Any]:
    """Write images."""
    rng = np.random.default_rng(ctx.config["seed"])
    index = [(subject, image) for subject in SUBJECTS for image in IMAGES]
    np.save(ctx.out / "index.npy", np.array(index))
    for kind in ("seen", *KINDS):
        (ctx.out / kind).mkdir()
        for subject, image in index:
            name = seen_name(image) if kind == "seen" else image_name(subject, image)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(ctx.out / kind / name)
    ctx.tracker.image("first reconstruction", ctx.out / "combined" / image_name(*index[0]))
    return {"images": len(IMAGES)}


def score(ctx: StageContext) -> dict[str, Any]:
    """Write scores of all images and metrics."""
    rng = np.random.default_rng(ctx.config["seed"])
    rows = [
        ("demo", METHOD, kind, subject, 0, image, metric, float(rng.random()))
        for subject in SUBJECTS
        for kind in KINDS
        for image in IMAGES
        for metric in CARDS
    ]
    columns = ["track", "method", "variant", "subject", "seed", "image_id", "metric", "value"]
    pd.DataFrame(rows, columns=columns).to_parquet(ctx.out / "scores.parquet", index=False)
    (ctx.out / "protocol.json").write_text(json.dumps({"protocol": "demo"}))
    return {"images": len(IMAGES)}


def stages(seed: int = 0, label: str = "clusters=8", **trained: Any) -> dict[str, Stage]:
    """Return the stages of a variant, by name, in their order."""

    def stage(name: str, upstream: Mapping[str, Stage], **config: Any) -> Stage:
        return Stage(name, f"tracked_stages:{name}", {"seed": seed, **config}, upstream, label=label)

    lowlevel = Stage("lowlevel", "tracked_stages:train", {"seed": seed, **trained}, label=label)
    made = stage("reconstruct", {"lowlevel": lowlevel})
    scored = stage("score", {"reconstruct": made}, track="demo", protocol="demo")
    return {"lowlevel": lowlevel, "reconstruct": made, "score": scored}
