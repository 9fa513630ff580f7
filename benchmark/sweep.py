"""``python -m benchmark.sweep NAME``: train, reconstruct, score and rank the variants of a sweep.

This module is the command line and nothing else: as ``__main__`` it must define nothing that is handed to another
process.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

from benchmark.cli import Parser, main_guard
from benchmark.errors import UserError, did_you_mean
from benchmark.running import add_arguments, run_sweep

COMMANDS = ("status", "logs", "cancel", "retry", "sync")
"""What is done with a sweep that was submitted; no sweep may have such a name."""

EXAMPLES = """\
examples:
  python -m benchmark.sweep list                       what there is
  python -m benchmark.sweep list --preset paper        what each takes at the paper's size, in GPU-hours and disk
  python -m benchmark.sweep clusters                   the demo: makes its own data, needs nothing
  python -m benchmark.sweep clusters --quick           three points, fewer images and steps
  python -m benchmark.sweep clusters --only 64,128     two of its points
  python -m benchmark.sweep clusters --dry-run         what would run, and why
  python -m benchmark.sweep clusters --data DIR        on an NSD tree
  python -m benchmark.sweep clusters --set lowlevel.training.steps=800 --out runs-800

on a Slurm cluster (docs/clusters.md):
  python -m benchmark.sweep clusters --launcher slurm  submit it, and return
  python -m benchmark.sweep status clusters            what waits, runs, failed and is done; --wait follows
  python -m benchmark.sweep logs clusters [STAGE]      what the jobs printed
  python -m benchmark.sweep cancel clusters [STAGE]    stop them
  python -m benchmark.sweep retry clusters [STAGE]     submit again what failed, and what that held up
  python -m benchmark.sweep sync clusters              upload its offline W&B runs
  Each has options of its own: python -m benchmark.sweep status --help

The same command again continues where it stopped: finished stages are never computed twice.
exit codes: 0 fine, 1 a stage failed, 2 the call or its input is wrong"""


def parser() -> Parser:
    """Return the command line's parser."""
    p = Parser(
        prog="python -m benchmark.sweep",
        description="Train, reconstruct, score and rank the variants of a sweep.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "sweep",
        metavar="NAME",
        help="a sweep, or the file of your own (my/sweep.yaml), or 'list'; or one of the commands below",
    )
    p.add_argument("--only", metavar="VALUE[,VALUE]", help="run only these of the sweep's values, e.g. 64,128")
    add_arguments(p)
    return p


def main() -> int:
    """Run the command line."""
    first, *rest = sys.argv[1:] or [""]
    if first in COMMANDS:
        from benchmark.launch.commands import run

        return run(first, rest)
    if rest and not rest[0].startswith("-") and (near := did_you_mean(first, COMMANDS)):
        raise UserError(f"unknown command '{first}'{near}")
    args = parser().parse_args()
    if args.sweep == "list":
        return _estimates(args) if args.preset == "paper" else _list()
    from benchmark.sweeps import load_sweep, own_file

    if (path := own_file(args.sweep)) is not None:
        args.sweep = str(path.absolute())  # what is submitted is read again from another folder
    sweep = load_sweep(args.sweep)
    if args.only is not None:
        sweep = sweep.only([value.strip() for value in args.only.split(",")])
    return run_sweep(sweep, args)


def _list() -> int:
    from benchmark.sweeps import load_sweep, sweep_names

    for name in sweep_names():
        sweep = load_sweep(name)
        values = ", ".join(str(value) for value in sweep.axis.values)
        varied = sweep.axis.setting or sweep.axis.name
        print(f"{name:<12} {sweep.title}\n{'':<12} {varied}: {values}\n{'':<12} answers {sweep.answers}")
    return 0


def _estimates(args: argparse.Namespace) -> int:
    """Print what every sweep takes at the paper's size; data and weights need not be there."""
    from benchmark.estimate import sweep_lines
    from benchmark.graph import Plan
    from benchmark.running import resolve_variants
    from benchmark.stages import owners, variant_stages
    from benchmark.sweeps import load_sweep, sweep_names

    sweeps = {}
    for name in sweep_names():
        sweep = load_sweep(name)
        variants = resolve_variants(sweep, args)
        stages = {
            name: variant_stages(variant, name, "missing", absent="missing") for name, variant in variants.items()
        }
        main = stages[sweep.variant(sweep.axis.main)]
        owner = owners(stages)
        ends = [own.end for own in stages.values()] + ([main.references] if main.synthetic is None else [])
        sweeps[sweep.name] = [(stage, variants[owner[stage.fingerprint]]) for stage in Plan.of(ends).stages]
    print("\n".join(sweep_lines(sweeps)))
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main_guard(main))
