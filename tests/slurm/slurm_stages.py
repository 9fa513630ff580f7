"""A sweep in small, for a real cluster: one shared training, and for each variant a chain that ends in a score.

As in the real sweep there are stages that only compute (``derive``), trainings with checkpoints, and one that two
processes train together. ``sleep`` is a hint: it makes a stage last, and changes neither its result nor its fingerprint.
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Any

from benchmark.context import StageContext
from benchmark.graph import Resources, Stage
from benchmark.store import read_json, write_json

SMALL = Resources(cpus=1, memory_gb=1, hours=0.5)
BOTH = Resources(gpus=2, cpus=2, memory_gb=2, hours=0.5)
LOG, HUNGRY, BROKEN = "runs.log", "hungry", "broken"
"""Files beside the stages' folders: who ran; two that make ``derive`` fail while they are there."""


def root(ctx: StageContext) -> Path:
    """The store's folder."""
    return ctx.out.parents[1]


def note(ctx: StageContext) -> None:
    """Leave a line for every time that a stage really starts to compute, beside the stages' folders."""
    if ctx.out.parent.name == ctx.stage.name:  # not the second process of two
        with (root(ctx) / LOG).open("a") as log:
            log.write(f"{ctx.stage.key}\n")


def last(ctx: StageContext, parts: int = 1) -> None:
    """Take one of ``parts`` of the time that the stage is to take."""
    time.sleep(ctx.stage.hints.get("sleep", 0) / parts)


def derive(ctx: StageContext) -> dict[str, Any]:
    """Hash the inputs into files, written one after the other."""
    import hashlib

    note(ctx)
    if (root(ctx) / HUNGRY).exists() and ctx.config.get("hungry"):
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + 2**26, held + 2**26))
        bytearray(2**30)
    if (root(ctx) / BROKEN).exists() and ctx.config.get("broken"):
        raise ValueError("the numbers do not add up")
    digest = hashlib.sha256(str(ctx.config["value"]).encode())
    for _, folder in sorted(ctx.inputs.items()):
        for file in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.safetensors")):
            digest.update(file.read_bytes())
    for part in range(4):
        digest.update(bytes([part]))
        (ctx.out / f"part-{part}.bin").write_bytes(digest.digest() * 500)
        last(ctx, 4)
    return {"value": ctx.config["value"]}


def fit(ctx: StageContext) -> dict[str, Any]:
    """Train a small network with all that a checkpoint must hold: dropout, momentum, a running mean, a best step."""
    import torch
    from safetensors.torch import save_file

    from benchmark.training import shared_out, train
    from benchmark.training_config import TrainingConfig

    note(ctx)
    torch.manual_seed(ctx.config["seed"])
    seen = sum(file.stat().st_size for folder in ctx.inputs.values() for file in folder.glob("*.bin"))
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Dropout(ctx.config["dropout"]), torch.nn.Linear(64, 4)
    )
    target = torch.randn(16, 4)

    def batch_loss(step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        last(ctx, ctx.config["steps"])
        x = torch.randn(8, 16, generator=generator)
        return torch.nn.functional.mse_loss(model(x), x @ target), {"seen": float(seen)}

    def validate() -> dict[str, float]:
        x = torch.linspace(-1, 1, 16 * 32).reshape(32, 16)
        return {"error": float(torch.nn.functional.mse_loss(model(x), x @ target))}

    config = TrainingConfig(
        steps=ctx.config["steps"],
        accumulate=ctx.config.get("accumulate", 1),
        validate_every=20,
        select="error",
        ema=0.9,
        seed=ctx.config["seed"],
    )
    result = train(model, batch_loss, config=shared_out(config), ctx=ctx, label="fit", validate=validate)
    save_file(model.state_dict(), ctx.out / "weights.safetensors")
    write_json(ctx.out / "history.json", result.history)
    return {"best step": result.best_step, "error": result.best["error"], "loss": result.history[-1]["train_loss"]}


def walk(ctx: StageContext) -> dict[str, Any]:
    """Compute a long chain, with a checkpoint after every step; what a stage without a network does."""
    note(ctx)
    kept = ctx.checkpoints / "state.json"
    state = read_json(kept) if kept.exists() else {"step": 0, "x": ctx.config["seed"] + 1}
    for file in sorted(file for folder in ctx.inputs.values() for file in folder.glob("*.bin")):
        state["x"] += 0 if state["step"] else sum(file.read_bytes())
    while state["step"] < ctx.config["steps"]:
        state = {"step": state["step"] + 1, "x": (state["x"] * 48271 + state["step"]) % 2147483647}
        write_json(kept, state)
        last(ctx, ctx.config["steps"])
    (ctx.out / "value.bin").write_text(str(state["x"]))
    return {"x": state["x"]}


def gpu(ctx: StageContext) -> dict[str, Any]:
    """Say which GPUs this process may see, and on how many cores it computes."""
    return {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES", ""), "threads": os.environ.get("OMP_NUM_THREADS")}


def nothing(ctx: StageContext) -> dict[str, Any]:
    """Do next to nothing."""
    note(ctx)
    (ctx.out / "value.bin").write_bytes(b"1")
    return {}


def stage(name: str, run: str, value: int = 0, **fields: Any) -> Stage:
    """Return a small stage."""
    config = {"value": value, **fields.pop("config", {})}
    return Stage(name, f"slurm_stages:{run}", config, **{"resources": SMALL, **fields})


def training(name: str, upstream: dict[str, Stage], seed: int, steps: int, sleep: float, **fields: Any) -> Stage:
    """Return a training of that many steps which lasts ``sleep`` seconds at least."""
    config = {"seed": seed, "steps": steps, "dropout": 0.2, **fields.pop("config", {})}
    return stage(name, "fit", config=config, upstream=upstream, hints={"sleep": sleep}, **fields)


def chain(sleep: float = 3, network: bool = True) -> Stage:
    """Return the last of three stages in a row: data, a training (or a walk, which starts sooner), a summary."""
    data = stage("data", "derive", hints={"sleep": sleep / 10})
    if network:
        middle = training("encoder", {"data": data}, seed=0, steps=200, sleep=sleep)
    else:
        config = {"seed": 0, "steps": 100}
        middle = stage("encoder", "walk", config=config, upstream={"data": data}, hints={"sleep": sleep})
    return stage("summary", "derive", upstream={"encoder": middle}, hints={"sleep": sleep / 10})


def scores(variants: int, sleep: float = 3, first: int = 0) -> list[Stage]:
    """Return the last stage of each variant; data and encoder are those of :func:`chain`."""
    encoder = chain(sleep).upstream["encoder"]
    data = encoder.upstream["data"]
    ends = []
    for number in range(first, first + variants):
        own: dict[str, Any] = {"label": f"variant={number}"}
        brief = {"hints": {"sleep": sleep / 10}, **own}
        clusters = stage("clusters", "derive", number, upstream={"data": data, "encoder": encoder}, **brief)
        both = {"data": data, "clusters": clusters}
        lowlevel = stage(
            "lowlevel", "walk", config={"seed": number, "steps": 100}, upstream=both, hints={"sleep": sleep}, **own
        )
        semantic = training("semantic", both, number, 100, sleep, **own)
        parts = {"lowlevel": lowlevel, "semantic": semantic}
        joint = training(
            "joint", parts, number, 60, sleep / 2, resources=BOTH, config={"accumulate": 2, "dropout": 0}, **own
        )
        ends.append(stage("score", "derive", number, upstream={"joint": joint, "data": data}, **brief))
    return ends


def light(variants: int, sleep: float = 1, first: int = 0) -> list[Stage]:
    """Return the last stage of each variant of a sweep without a network."""
    middle = chain(sleep, network=False).upstream["encoder"]
    ends = []
    for number in range(first, first + variants):
        clusters = stage("clusters", "derive", number, upstream={"encoder": middle}, label=f"variant={number}")
        ends.append(stage("score", "derive", number, upstream={"clusters": clusters}, label=f"variant={number}"))
    return ends
