"""The command of a small sweep, in a process of its own: ``python toy_sweep.py OUT [--variants N] ...``."""

from __future__ import annotations

import argparse
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
    """Submit variants from number ``--first`` on, or the chain where there are none."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--name", default="toys")
    parser.add_argument("--light", action="store_true", help="without a network")
    args = parser.parse_args()
    if args.variants:
        targets = (toys.light if args.light else toys.scores)(args.variants, first=args.first)
    else:
        targets = [toys.chain(network=not args.light)]
    record, count = submit(targets, args.out, name=args.name)
    print(record.id, count)


if __name__ == "__main__":
    main()
