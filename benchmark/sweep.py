"""``python -m benchmark.sweep NAME``: train, reconstruct, score and rank the variants of a sweep.

This module is the command line and nothing else: as ``__main__`` it must define nothing that is handed to another
process.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.cli import Parser, main_guard

if TYPE_CHECKING:
    from benchmark.config import Variant
    from benchmark.graph import Decision
    from benchmark.stages import VariantStages
    from benchmark.sweeps import Sweep

EXAMPLES = """\
examples:
  python -m benchmark.sweep list                       what there is
  python -m benchmark.sweep clusters                   the demo: makes its own data, needs nothing
  python -m benchmark.sweep clusters --quick           three points, fewer images and steps
  python -m benchmark.sweep clusters --only 64,128     two of its points
  python -m benchmark.sweep clusters --dry-run         what would run, and why
  python -m benchmark.sweep clusters --data DIR        on an NSD tree
  python -m benchmark.sweep clusters --set lowlevel.training.steps=800 --out runs-800

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
    p.add_argument("sweep", metavar="NAME", help="a sweep, or 'list'")
    p.add_argument("--preset", choices=("demo", "paper"), default="demo", help="sizes and networks (default: demo)")
    p.add_argument("--quick", action="store_true", help="demo only: three points, fewer images and steps")
    p.add_argument(
        "--out", type=Path, default=Path("runs"), metavar="DIR", help="where everything goes (default: runs)"
    )
    p.add_argument("--data", type=Path, metavar="DIR", help="read this NSD tree instead of simulating one")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting, e.g. lowlevel.dim=64"
    )
    p.add_argument("--only", metavar="VALUE[,VALUE]", help="run only these of the sweep's values, e.g. 64,128")
    p.add_argument("--seed", type=int, help="seed of the variants (default: 0)")
    p.add_argument(
        "--mode",
        default="cached",
        choices=("cached", "retry", "force", "read-only"),
        help="what to do with results that exist",
    )
    p.add_argument("--dry-run", action="store_true", help="print what would run, and why; run nothing")
    p.add_argument(
        "--launcher",
        choices=("inline", "local"),
        default="inline",
        help="in this process, or in processes of their own",
    )
    p.add_argument("--parallel", type=int, default=1, metavar="N", help="stages at a time with --launcher local")
    p.add_argument("--threads", type=int, metavar="N", help="threads a stage (default: all cores)")
    p.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where networks run (default: a GPU where there is one)",
    )
    p.add_argument(
        "--tracker",
        choices=("wandb", "jsonl", "none"),
        default="wandb",
        help="W&B (offline unless logged in), JSON lines only, or nothing",
    )
    p.add_argument("--no-progress", action="store_true", help="no progress bars or lines")
    return p


def main() -> int:
    """Run the command line."""
    args = parser().parse_args()
    if args.sweep == "list":
        return _list()
    return _run(args)


def _list() -> int:
    from benchmark.sweeps import load_sweep, sweep_names

    for name in sweep_names():
        sweep = load_sweep(name)
        values = ", ".join(str(value) for value in sweep.axis.values)
        print(f"{name:<12} {sweep.title}\n{'':<12} {sweep.axis.setting}: {values}\n{'':<12} answers {sweep.answers}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from benchmark.devices import choose_device
    from benchmark.errors import UserError
    from benchmark.execute import RunOptions
    from benchmark.graph import Plan
    from benchmark.launch import make_launcher, raise_failures
    from benchmark.stages import variant_stages
    from benchmark.store import Store
    from benchmark.sweeps import load_sweep

    started = time.monotonic()
    sweep = load_sweep(args.sweep)
    if args.only is not None:
        sweep = sweep.only([value.strip() for value in args.only.split(",")])
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads {args.threads}: expected 1 or more")
    if args.parallel != 1 and args.launcher != "local":
        raise UserError(f"--parallel {args.parallel} needs --launcher local")
    variants = _variants(sweep, args)
    launcher = make_launcher(args.launcher, args.parallel)
    options_threads = args.threads or max(
        1, len(os.sched_getaffinity(0)) // (args.parallel if args.launcher == "local" else 1)
    )
    digest = _check_data(args, next(iter(variants.values())))
    stages = {name: variant_stages(variant, name, digest) for name, variant in variants.items()}
    main_name = sweep.variant(sweep.axis.main)
    if main_name not in stages:
        raise UserError(f"sweep {sweep.name}: its reference variant {main_name} is not among the values that run")
    store = Store(args.out / "store")
    targets = [stage for own in stages.values() for stage in (own.score,)]
    plan = Plan.of([*targets, stages[main_name].references])
    decisions = plan.decide(store, args.mode)
    _say_what_runs(sweep, args, decisions, len(variants))
    if args.dry_run:
        _print_plan(decisions)
        return 0
    blocked = [decision for decision in decisions if decision.action == "blocked"]
    if args.mode == "read-only" and blocked:
        raise UserError(
            f"{len(blocked)} of {len(decisions)} results are missing in {args.out} (first: {blocked[0].stage.title}); "
            f"leave out --mode read-only to compute them"
        )
    to_run = sum(decision.action == "run" for decision in decisions)
    if blocked and not to_run:
        print(f"nothing to run: {blocked[0].stage.title}: {blocked[0].reason}; leave out --mode {args.mode}")
    if to_run:
        options = RunOptions(
            device=choose_device(args.device),
            threads=options_threads,
            tracker=args.tracker,
            group=sweep.name,
            progress=not args.no_progress,
            data=str(args.data.resolve()) if args.data else "",
        )
        outcomes = launcher.run(plan, decisions, store, options, _show)
        finished = {o.stage.fingerprint for o in outcomes if o.state in ("done", "cached")}
    else:
        outcomes = []
        finished = {decision.stage.fingerprint for decision in decisions if decision.action == "cached"}
    complete = {name: own for name, own in stages.items() if own.score.fingerprint in finished}
    if main_name in complete and stages[main_name].references.fingerprint in finished:
        _report(args, store, sweep, variants, complete, main_name, time.monotonic() - started)
    raise_failures(outcomes)
    return 0


def _variants(sweep: Sweep, args: argparse.Namespace) -> dict[str, Variant]:
    """Return variant name -> resolved settings."""
    from benchmark.config import PRESETS, QUICK
    from benchmark.errors import UserError

    if args.quick and args.preset != "demo":
        raise UserError("--quick is for the demo preset; leave out one of --quick and --preset paper")
    chosen: dict[str, Any] = {} if args.seed is None else {"seed": args.seed}
    chosen |= _settings(args.set)
    for key in chosen:
        if sweep.axis.setting == key or sweep.axis.setting.startswith(f"{key}."):
            raise UserError(f"--set {key}: sweep {sweep.name} varies {sweep.axis.setting} itself; leave it out")
    base = PRESETS[args.preset]()
    if args.quick:
        base = base.with_settings(QUICK)
    return {name: base.with_settings({**own, **chosen}) for name, own in sweep.settings(args.quick).items()}


def _settings(pairs: list[str]) -> dict[str, Any]:
    import yaml

    from benchmark.errors import UserError

    settings: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator:
            raise UserError(f"--set {pair}: expected KEY=VALUE, e.g. --set lowlevel.dim=64")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {pair}: the value is not YAML") from None
    return settings


def _check_data(args: argparse.Namespace, variant: Variant) -> str | None:
    """Return the digest of the tree that ``--data`` names, after its check; None where one is simulated.

    Whose recordings are reconstructed is checked here, and not hours later by the stage that reconstructs them.
    """
    from benchmark.errors import UserError

    if args.data is not None:
        from benchmark.data.nsd import NSD

        nsd = NSD.open(args.data)
        present, where, remedy = nsd.subjects, str(args.data), ""
    elif variant.data.simulation is not None:
        present, where = tuple(range(1, variant.data.simulation.subjects + 1)), "the simulation"
        remedy = f" or --set data.simulation.subjects={max(variant.generation.subjects)}"
    else:
        raise UserError(f"preset {args.preset} needs the Natural Scenes Dataset: name its folder with --data DIR")
    absent = [subject for subject in variant.generation.subjects if subject not in present]
    if absent:
        few = ",".join(map(str, present[:4]))
        raise UserError(
            f"generation.subjects names subject {absent[0]}; {where} has subjects {', '.join(map(str, present))}\n"
            f"type --set generation.subjects=[{few}]{remedy}"
        )
    return nsd.digest() if args.data is not None else None


def _say_what_runs(sweep: Sweep, args: argparse.Namespace, decisions: list[Decision], variants: int) -> None:
    runs = sum(decision.action == "run" for decision in decisions)
    cached = sum(decision.action == "cached" for decision in decisions)
    size = "demo, quick" if args.quick else args.preset
    print(
        f"sweep {sweep.name} ({size}): {variants} variants, {len(decisions)} stages: {runs} to run, {cached} cached; "
        f"results go to {args.out}/",
        flush=True,
    )


def _print_plan(decisions: list[Decision]) -> None:
    width = max(len(decision.stage.title) for decision in decisions)
    for decision in decisions:
        print(f"  {decision.action:<7} {decision.stage.title:<{width}}  {decision.reason}")


def _show(event: object) -> None:
    """Print how stages end; cached ones are counted in the first line, blocked ones in the last."""
    from benchmark.launch import Event

    assert isinstance(event, Event)
    if event.kind in ("done", "failed", "note"):
        print(str(event), file=sys.stderr, flush=True)


def _report(
    args: argparse.Namespace,
    store: Any,
    sweep: Sweep,
    variants: Mapping[str, Variant],
    stages: Mapping[str, VariantStages],
    main_name: str,
    seconds: float,
) -> None:
    from benchmark.progress import clock_time
    from benchmark.report import write_report
    from leaderboard import print_table

    report = write_report(args.out, store, sweep, variants, stages, main_name)
    print()
    print_table(report.ranking, report.notes)
    for sentence in report.sentences:
        print(sentence)
    print(f"\npage: {report.page}   rows: {report.page.parent / 'leaderboard.json'}   time: {clock_time(seconds)}")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main_guard(main))
