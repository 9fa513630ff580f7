"""Stages small enough to watch: what the tests of the harness run, here and in processes of their own."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmark.context import StageContext
from benchmark.errors import UserError
from benchmark.execute import RunOptions, execute
from benchmark.graph import Stage
from benchmark.store import Store, read_json, write_json


def note(ctx: StageContext) -> None:
    """Leave one line for every time that a stage really runs."""
    with Path(ctx.config["log"]).open("a") as log:
        log.write(f"{ctx.stage.name} {os.getpid()}\n")


def add(ctx: StageContext) -> dict[str, Any]:
    """Add up a number and the upstream values."""
    note(ctx)
    time.sleep(ctx.config.get("sleep", 0))
    total = ctx.config["value"] + sum(read_json(folder / "value.json") for folder in ctx.inputs.values())
    (ctx.out / "parts").mkdir()
    write_json(ctx.out / "parts" / "own.json", ctx.config["value"])
    write_json(ctx.out / "value.json", total)
    return {"total": total}


def walk(ctx: StageContext) -> dict[str, Any]:
    """Compute a long chain, with a checkpoint after every step, resumed from where it stopped."""
    note(ctx)
    kept = ctx.checkpoints / "state.json"
    state = read_json(kept) if kept.exists() else {"step": 0, "x": 1}
    first = state["step"]
    while state["step"] < ctx.config["steps"]:
        state = {"step": state["step"] + 1, "x": (state["x"] * 48271 + state["step"]) % 2147483647}
        write_json(kept, state)
        time.sleep(ctx.config.get("sleep", 0))
        if ctx.config.get("stop_at") == state["step"] and not Path(ctx.config["log"] + ".go").exists():
            raise KeyboardInterrupt
    write_json(ctx.out / "value.json", state["x"])
    return {"first": first}


def fail(ctx: StageContext) -> dict[str, Any]:
    """Fail until a file says that all is well."""
    note(ctx)
    (ctx.out / "half.json").write_text("{")
    if not Path(ctx.config["log"] + ".mended").exists():
        raise ValueError("the numbers do not add up")
    (ctx.out / "half.json").unlink()
    write_json(ctx.out / "value.json", 0)
    return {}


def refuse(ctx: StageContext) -> dict[str, Any]:
    """Find the input wrong."""
    (ctx.out / "half.json").write_text("{")
    raise UserError("data/betas.mgh is truncated: expected 100 bytes; copy it again")


def gpu(ctx: StageContext) -> dict[str, Any]:
    """Say which GPUs this process may see."""
    time.sleep(ctx.config["sleep"])
    return {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "threads": os.environ.get("OMP_NUM_THREADS")}


def die(ctx: StageContext) -> dict[str, Any]:
    """End the process as a kill from outside would."""
    os.kill(os.getpid(), 9)
    return {}


def main() -> None:
    """Execute one stage: ``python toy_stages.py ROOT STAGE.json``, which may hold options too."""
    request = json.loads(Path(sys.argv[2]).read_text())
    stage = Stage.from_dict(request["stage"])
    outcome = execute(stage, Store(sys.argv[1]), RunOptions(threads=1, **request["options"]))
    print(outcome.state, flush=True)


if __name__ == "__main__":
    main()
