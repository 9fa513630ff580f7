"""``python -m benchmark.run``: one variant, end to end; with ``--smoke`` every model of a preset at its full size."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys

from benchmark.cli import Parser, main_guard
from benchmark.errors import UserError
from benchmark.running import add_arguments, read_settings, run_sweep, show, sweep_of

EXAMPLES = """\
examples:
  python -m benchmark.run                                     the demo's main variant
  python -m benchmark.run --set clustering.n_clusters=64      with another setting
  python -m benchmark.run --preset paper --data DIR --weights DIR
  python -m benchmark.run --preset paper --data DIR --weights DIR --official DIR    with the authors' own weights
  python -m benchmark.run --preset paper --smoke              does it fit, and how fast is it? needs no data, no weights

The same command again continues where it stopped.
exit codes: 0 fine, 1 a stage failed, 2 the call or its input is wrong"""


def parser() -> Parser:
    """Return the command line's parser."""
    p = Parser(
        prog="python -m benchmark.run",
        description="Train, reconstruct and score one variant.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--smoke",
        action="store_true",
        help="full-size models with random weights on random data: two steps of each stage, one reconstruction",
    )
    add_arguments(p)
    return p


def main() -> int:
    """Run the command line."""
    args = parser().parse_args()
    if args.smoke:
        return _smoke(args)
    # The seed is what this sweep of one variant varies.
    first, *more = args.seed or [0]
    if more:
        raise UserError("--seed takes one number here; several: python -m benchmark.sweep seeds --only 0,1,2")
    args.sweep, args.variant_seed, args.seed = "run", first, None
    return run_sweep(sweep_of(args), args)


def _smoke(args: argparse.Namespace) -> int:
    from benchmark.config import PRESETS
    from benchmark.devices import choose_device
    from benchmark.execute import RunOptions
    from benchmark.graph import Plan
    from benchmark.launch import raise_failures
    from benchmark.smoke import free_memory, smoke, smoke_stages, smoke_variant, table
    from benchmark.store import Store

    if args.quick or args.data is not None:
        raise UserError("--smoke draws its own data at full size; leave out --quick and --data")
    if args.official is not None:
        raise UserError("--smoke draws its own weights; leave out --official")
    if args.launcher != "inline":
        raise UserError(f"--smoke runs in this process; leave out --launcher {args.launcher}")
    device = choose_device(args.device)
    variant = smoke_variant(PRESETS[args.preset](), gpu=device != "cpu").with_settings(read_settings(args.set))
    stages = smoke_stages(variant, free_memory(device))
    store = Store(args.out / "smoke")
    decisions = Plan.of([stages.score]).decide(store)
    if args.dry_run:
        for decision in decisions:
            print(f"  {decision.action:<7} {decision.stage.title:<24} {decision.reason}")
        return 0
    print(
        f"smoke run ({args.preset}) on {device}: {len(decisions)} stages; results go to {args.out / 'smoke'}/",
        flush=True,
    )
    options = RunOptions(
        device=device,
        threads=args.threads or len(os.sched_getaffinity(0)),
        group="smoke",
        progress=not args.no_progress,
    )
    lines, outcomes = smoke(stages, store, options, show)
    print(table(lines))
    raise_failures(outcomes)
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main_guard(main))
