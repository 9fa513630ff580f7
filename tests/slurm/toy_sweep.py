"""The command of a small sweep, in a process of its own: ``python toy_sweep.py OUT [--variants N] ...``."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import slurm_stages as toys

from benchmark.execute import RunOptions
from benchmark.graph import Plan, Stage
from benchmark.launch.profile import Profile
from benchmark.launch.slurm import Request, SlurmLauncher
from benchmark.launch.submissions import Submission
from benchmark.store import Store

# The joint training on CPUs: two tasks, one on each node.
PROFILE: dict[str, Any] = {
    "device": "cpu",
    "signal_seconds": 10,
    "stages": {"joint": {"tasks": 2, "nodes": 2}},
}
OPTIONS = RunOptions(progress=False, tracker="jsonl", checkpoint_seconds=0.3)


def submit(
    targets: Iterable[Stage],
    out: Path,
    mode: str = "cached",
    parallel: int | None = None,
    name: str = "toys",
    **profile: Any,
) -> tuple[Submission, int]:
    """Submit what the targets lack; return the record and how many stages were submitted."""
    launcher = SlurmLauncher(Profile.model_validate({**PROFILE, **profile}), parallel, threads=1)
    request = Request(name, shlex.join(["python", *sys.argv]), out, {})
    return launcher.submit(Plan.of(targets), mode, Store(out / "store"), OPTIONS, request)


def main() -> None:
    """Submit ``--variants`` variants, from number ``--first`` on, or the chain where that is 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--name", default="toys")
    parser.add_argument("--profile", type=json.loads, default={})
    args = parser.parse_args()
    targets = toys.scores(args.variants, first=args.first) if args.variants else [toys.chain()]
    record, count = submit(targets, args.out, name=args.name, **args.profile)
    print(record.id, count)


if __name__ == "__main__":
    main()
