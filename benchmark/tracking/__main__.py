"""``python -m benchmark.tracking rebuild``: the runs of a store, made again in W&B or TensorBoard."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmark.cli import Parser, main_guard

EXAMPLES = """\
examples:
  python -m benchmark.tracking rebuild                        every run of runs/store in W&B (offline without a key)
  python -m benchmark.tracking rebuild --dry-run              what would be made, and what the store does not have
  python -m benchmark.tracking rebuild --mode offline         offline, whoever is logged in; sweep sync uploads it
  python -m benchmark.tracking rebuild --tracker tensorboard  then: tensorboard --logdir runs/store

A run has the id, settings, curves, summary, tables, artifacts and state that it had, and takes the place of what was
there of it; the same command again changes nothing.
exit codes: 0 fine, 1 a run could not be made, 2 the call or its input is wrong"""


def parser() -> Parser:
    """Return the command line's parser."""
    p = Parser(
        prog="python -m benchmark.tracking",
        description="Make the runs of finished, failed and interrupted stages again, from the store alone.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("command", choices=("rebuild",), metavar="rebuild", help="make the runs again")
    p.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="folder of the run (default: runs)")
    p.add_argument("--tracker", choices=("wandb", "tensorboard"), default="wandb", help="where (default: wandb)")
    p.add_argument("--mode", choices=("online", "offline"), help="W&B's mode (default: online where there is a key)")
    p.add_argument("--dry-run", action="store_true", help="say what would be made; make nothing")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parser().parse_args(argv)
    from benchmark.errors import RunError, UserError

    if args.mode is not None and args.tracker != "wandb":
        raise UserError(f"--mode {args.mode} is W&B's; leave it out with --tracker {args.tracker}")
    from benchmark.tracking.rebuild import NEVER_KEPT, read_store, rebuild_all

    found = read_store(args.out)
    total = len(found.stages) + len(found.answers)
    verb = "would make" if args.dry_run else "making"
    print(f"{verb} {total:,} runs in {args.tracker}: {len(found.stages):,} stages, {len(found.answers):,} leaderboards")
    for line in found.unreadable:
        print(f"  cannot be read: {line}")
    lacking: dict[str, list[str]] = {}
    for stage in found.stages:
        for what in stage.lacks:
            lacking.setdefault(what, []).append(stage.title)
    for what, titles in lacking.items():
        few = ", ".join(titles[:3]) + (f" and {len(titles) - 3:,} more" if len(titles) > 3 else "")
        print(f"  cannot be made again: {what}: {few}")
    if args.tracker == "wandb":
        print(f"  cannot be made again: {NEVER_KEPT}")
    if args.dry_run:
        for stage in found.stages:
            print(f"  {stage.ended:<11} {stage.title}  {stage.folder}")
        for answer in found.answers:
            print(f"  {'done':<11} leaderboard [{answer.sweep}]")
        return 1 if found.unreadable else 0

    def told(title: str, error: str) -> None:
        if error:
            print(f"  {title}: {error}", flush=True)

    failed = rebuild_all(found, args.out, args.tracker, args.mode, told) + len(found.unreadable)
    if failed:
        raise RunError(f"{failed:,} of {total + len(found.unreadable):,} runs could not be made; the others are")
    print(f"made {total:,} runs; {_next(args)}")
    return 0


def _next(args: argparse.Namespace) -> str:
    if args.tracker == "tensorboard":
        return f"look at them: tensorboard --logdir {args.out / 'store'}"
    from benchmark.tracking.wandb_tracker import logged_in, preferred_mode

    if (args.mode or preferred_mode()) == "online" and logged_in():
        return "they are online"
    where = "" if args.out == Path("runs") else f" --out {args.out}"
    return f"they are offline; to upload them: python -m benchmark.sweep sync NAME{where}, for each sweep's NAME"


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main_guard(main))
