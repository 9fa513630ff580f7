"""What ``python -m benchmark.sweep`` and ``python -m benchmark.run`` share: their options, and running a sweep."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.cli import Parser, distinct
from benchmark.predictors import names
from benchmark.tracking import KINDS

if TYPE_CHECKING:
    from benchmark.config import Variant
    from benchmark.execute import RunOptions
    from benchmark.graph import Decision, Plan
    from benchmark.launch.slurm import SlurmLauncher
    from benchmark.official import Part
    from benchmark.report.rows import Report, Training
    from benchmark.stages import VariantStages
    from benchmark.store import Store
    from benchmark.sweeps import Sweep


INTERRUPTED = 130  # Ctrl-C


def add_arguments(p: Parser) -> None:
    """Add the options that say what runs, on what, and where."""
    p.add_argument("--preset", choices=("demo", "paper"), default="demo", help="sizes and networks (default: demo)")
    p.add_argument("--quick", action="store_true", help="demo only: three points, fewer images and steps")
    p.add_argument(
        "--out", type=Path, default=Path("runs"), metavar="DIR", help="where everything goes (default: runs)"
    )
    p.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="read this NSD tree, or store of benchmark.data prepare, instead of simulating",
    )
    p.add_argument(
        "--weights", type=Path, metavar="DIR", help="folder of the papers' networks (python -m benchmark.networks list)"
    )
    p.add_argument(
        "--official",
        type=Path,
        metavar="DIR",
        help="take the authors' weights in DIR (python -m benchmark.convert) instead of training",
    )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, e.g. lowlevel.dim=64, or semantic.predictor=NAME with what predicts instead of a BIT: "
        f"{', '.join(names())}, oracle",
    )
    p.add_argument(
        "--seed",
        type=distinct,
        metavar="N[,N]",
        help="seed of the variants (default: 0); with several, each variant is trained with each, one row over all",
    )
    p.add_argument(
        "--mode",
        default="cached",
        choices=("cached", "retry", "force", "read-only"),
        help="what to do with results that exist",
    )
    p.add_argument("--dry-run", action="store_true", help="print what would run, and why; run nothing")
    p.add_argument(
        "--launcher",
        choices=("inline", "local", "slurm"),
        default="inline",
        help="in this process, in processes of their own, or as jobs of a Slurm cluster (submits and returns)",
    )
    p.add_argument(
        "--parallel",
        type=int,
        metavar="N",
        help="stages at a time (local: 1), or of each job array (slurm: as many as the cluster gives)",
    )
    p.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="slurm: what this cluster wants to hear (default: ~/.config/brain-it-bench/slurm.yaml)",
    )
    p.add_argument("--wait", action="store_true", help="slurm: follow the jobs to their end, then report")
    p.add_argument(
        "--threads", type=int, metavar="N", help="threads a stage (default: all cores; slurm: those that it asks for)"
    )
    p.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where networks run (default: a GPU where there is one)",
    )
    p.add_argument(
        "--tracker",
        choices=KINDS,
        default="wandb",
        help="W&B (offline unless logged in), TensorBoard, JSON lines only, or nothing (docs/tracking.md)",
    )
    p.add_argument("--no-progress", action="store_true", help="no progress bars or lines")


def use_weights(folder: Path | None) -> None:
    """Let this process and those that it starts read weights files from ``folder``.

    Raises:
        UserError: there is no such folder.
    """
    from benchmark.errors import UserError
    from benchmark.weights import FOLDER_VARIABLE

    if folder is None:
        return
    if not folder.is_dir():
        raise UserError(f"--weights {folder}: no such folder; type: python -m benchmark.networks fetch {folder}")
    os.environ[FOLDER_VARIABLE] = str(folder.resolve())


def run_sweep(
    sweep: Sweep, args: argparse.Namespace, only: Collection[str] | None = None, command: str | None = None
) -> int:
    """Run what a sweep's variants still lack, and report; return the exit code.

    Args:
        sweep: what to run.
        args: the options (see :func:`add_arguments`).
        only: with ``--launcher slurm``, fingerprints of the stages to submit, with what they still need.
        command: what a person typed; this process's own command by default.
    """
    from benchmark.devices import choose_device
    from benchmark.errors import UserError
    from benchmark.estimate import needed_disk, plan_lines
    from benchmark.execute import RunOptions
    from benchmark.graph import Plan
    from benchmark.launch import make_launcher, raise_failures
    from benchmark.official import told
    from benchmark.stages import owners, variant_stages
    from benchmark.store import Store

    slurm, parallel = args.launcher == "slurm", 1 if args.parallel is None else args.parallel
    started = time.monotonic()
    use_weights(args.weights)
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads {args.threads}: expected 1 or more")
    if args.parallel not in (None, 1) and args.launcher == "inline":
        raise UserError(f"--parallel {args.parallel} needs --launcher local or slurm")
    if not slurm and (args.wait or args.profile is not None):
        raise UserError(f"{'--wait' if args.wait else f'--profile {args.profile}'} needs --launcher slurm")
    chosen = resolve_variants(sweep, args)
    # Every training of every variant, by the name that people know it by; ``labels``: variant -> its trainings' names.
    labels, variants = every_training(chosen, args.seed)
    launcher = make_launcher("inline" if slurm else args.launcher, parallel)
    options_threads = args.threads or max(1, len(os.sched_getaffinity(0)) // parallel)
    problems = missing_networks(variants)
    try:
        digest = _check_data(args, variants)
    except UserError as error:
        problems.insert(0, f"data: {error}")
        digest = "missing"
    absent = "missing" if problems else None
    stages = {name: variant_stages(variant, name, digest, absent=absent) for name, variant in variants.items()}
    parts: dict[str, Part] = {}
    if args.official is not None:
        parts, stages = _take_official(args, variants, stages, problems)
    main_name = sweep.variant(sweep.axis.main)
    if main_name not in labels:
        raise UserError(f"sweep {sweep.name}: its reference variant {main_name} is not among the values that run")
    main = [stages[label] for label in labels[main_name]]
    store = Store(args.out / "store")
    scored = main[0].synthetic is None
    references = [own.references for own in main] if scored else []
    plan = Plan.of([*(own.end for own in stages.values()), *references])
    decisions = plan.decide(store, args.mode)
    cluster = None
    if slurm:
        try:
            cluster = _slurm_launcher(args)
            problems += cluster.problems([d.stage for d in decisions if d.action == "run"])
        except UserError as error:
            problems.append(f"slurm: {error}")
    if problems and not args.dry_run:
        raise refusal(problems)
    _say_what_runs(sweep, args, decisions, len(labels))
    if parts:
        print(told(parts, main[0]), flush=True)
    if args.preset == "paper":
        owner = owners(stages)
        problems += missing_disk(args.out, needed_disk(decisions, variants, owner))
        if args.dry_run:
            print("\n".join(plan_lines(decisions, variants, owner)))
    elif args.dry_run:
        _print_plan(decisions)
    if args.dry_run and cluster is not None:
        print("\n".join(cluster.plan_lines([d for d in decisions if d.action == "run"])))
    if problems:
        raise refusal(problems)
    if args.dry_run:
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
    code, outcomes = 0, []
    if to_run:
        options = RunOptions(
            device="cpu" if slurm else choose_device(args.device),  # of a cluster's jobs: what each of them gets
            threads=options_threads,
            tracker=args.tracker,
            group=sweep.name,
            progress=not args.no_progress,
            data=str(args.data.resolve()) if args.data else "",
        )
        if args.tracker == "wandb":
            _say_where_runs_are(sweep)
        if cluster is not None:
            code = _submit(cluster, plan, store, options, sweep, args, only, command or typed_command())
            if not args.wait or code == INTERRUPTED:
                return code
            finished = {stage.fingerprint for stage in plan.stages if store.is_done(stage)}
        else:
            outcomes = launcher.run(plan, decisions, store, options, show)
            finished = {o.stage.fingerprint for o in outcomes if o.state in ("done", "cached")}
    else:
        finished = {decision.stage.fingerprint for decision in decisions if decision.action == "cached"}
    complete = {name: own for name, own in stages.items() if own.end.fingerprint in finished}
    if not scored:
        for name, own in complete.items():
            print(f"{name}: NSD-Synthetic as seen and reconstructed: {store.folder(own.end)}/grid_subj*.png")
    elif finished.issuperset(stage.fingerprint for stage in [*(own.score for own in main), *references]):
        from benchmark.report.rows import Training

        trainings = {
            name: [Training(variants[label], stages[label]) for label in own]
            for name, own in labels.items()
            if all(label in complete for label in own)
        }
        _report(args, store, sweep, trainings, main_name, time.monotonic() - started)
    raise_failures(outcomes)
    return code


def _take_official(
    args: argparse.Namespace,
    variants: Mapping[str, Variant],
    stages: Mapping[str, VariantStages],
    problems: list[str],
) -> tuple[dict[str, Part], dict[str, VariantStages]]:
    """Put the authors' weights in the place of trainings; add what is wrong with them to ``problems``."""
    from benchmark import official

    parts, wrong = official.find(args.official, next(iter(variants.values())).lowlevel.width)
    taken = {name: official.take(own, parts) for name, own in stages.items()}
    wrong += official.misfits(args.official, parts, variants, taken, official.voxels_of(args.data))
    problems += wrong
    return parts, taken


def _slurm_launcher(args: argparse.Namespace) -> SlurmLauncher:
    from benchmark.launch.profile import profile_path, read_profile
    from benchmark.launch.slurm import SlurmLauncher

    path = profile_path(args.profile)
    return SlurmLauncher(read_profile(path), args.parallel, args.device, args.threads, source=path)


def _submit(
    launcher: SlurmLauncher,
    plan: Plan,
    store: Store,
    options: RunOptions,
    sweep: Sweep,
    args: argparse.Namespace,
    only: Collection[str] | None,
    command: str,
) -> int:
    """Submit a sweep's stages and say what was done and what to type next; with ``--wait`` follow them, too."""
    from benchmark.launch.slurm import Request, summary_lines

    request = Request(sweep.name, command, args.out, save_arguments(args), only)
    record, count = launcher.submit(plan, args.mode, store, options, request, lambda line: print(line, file=sys.stderr))
    print("\n".join(summary_lines(record, count)), flush=True)
    if args.wait:
        from benchmark.launch.control import follow

        return follow(store, record, sweep.name, str(args.out))
    where = "" if args.out == Path("runs") else f" --out {shlex.quote(str(args.out))}"
    print(
        f"next: python -m benchmark.sweep status {sweep.name}{where}\n"
        f"      (or logs, cancel, retry; once all is done, the same command again prints the results)",
        flush=True,
    )
    return 0


def one_variant(seed: int) -> Sweep:
    """Return what ``benchmark.run`` runs: a sweep of one variant."""
    from benchmark.sweeps import Sweep, SweepAxis

    axis = SweepAxis(name="seed", setting="seed", values=(seed,), quick=(seed,), main=seed)
    return Sweep(name="run", title="One variant", question="How good is this variant?", answers="none", axis=axis)


def sweep_of(args: argparse.Namespace) -> Sweep:
    """Return the sweep that the options name, with the values that they choose.

    Raises:
        UserError: no such sweep, or it has no such value.
    """
    from benchmark.sweeps import load_sweep

    if args.sweep == "run":
        return one_variant(args.variant_seed)
    sweep = load_sweep(args.sweep)
    return sweep if args.only is None else sweep.only([value.strip() for value in args.only.split(",")])


def typed_command() -> str:
    """Return this process's command as a person would type it."""
    program, *arguments = sys.argv
    path = Path(program)
    if path.suffix == ".py" and path.parent.name == "benchmark":
        return shlex.join(["python", "-m", f"benchmark.{path.stem}", *arguments])
    return shlex.join(sys.argv)


def save_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options as JSON-able data that means the same in another folder."""
    kept = {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return {name: value for name, value in kept.items() if isinstance(value, str | int | float | list | None)}


def restore_arguments(saved: Mapping[str, Any]) -> argparse.Namespace:
    """Return the options that :func:`save_arguments` kept, and those that it did not know at their defaults."""
    p = Parser()
    add_arguments(p)
    defaults = vars(p.parse_args([]))
    args = argparse.Namespace(**{**defaults, **saved})
    for name in ("out", "data", "weights", "official", "profile"):
        value = getattr(args, name)
        setattr(args, name, None if value is None else Path(value))
    if isinstance(args.seed, int):  # of a submission that knew one seed only
        args.seed = [args.seed]
    return args


def missing_networks(variants: Mapping[str, Variant]) -> list[str]:
    """Return what is wrong with the networks' weights: nothing, or one problem that names all that are missing."""
    from benchmark.weights import DOWNLOADS, missing_weights, random_weights, weights_folder
    from metrics.protocols import get_protocol

    names: list[str] = []
    for variant in variants.values():
        own = list(variant.networks.roles().values())
        if variant.score.random_weights is None:
            with contextlib.suppress(ValueError):  # a protocol that is none is told where stages are made
                own += get_protocol(variant.score.protocol).networks
        names += [name for name, seed in map(random_weights, own) if seed is None]
    missing = missing_weights(names)
    if not missing:
        return []
    files = ", ".join(DOWNLOADS[name].file for name in missing)
    folder = weights_folder()
    return [
        f"weights: {folder} lacks {files}\n"
        f"  name their folder with --weights DIR, or type: python -m benchmark.networks fetch {folder} --only "
        f"{','.join(missing)}"
    ]


def missing_disk(out: Path, needed: float) -> list[str]:
    """Return what is wrong with the room for ``needed`` bytes of results in ``out``."""
    place = next(folder for folder in (out, *out.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free >= needed:
        return []
    return [
        f"disk: {out} has {free / 1e9:,.0f} GB free, the run needs about {needed / 1e9:,.0f} GB; choose another --out"
    ]


def refusal(problems: Sequence[str]) -> Exception:
    """Return the error that names everything that keeps a run from starting."""
    from benchmark.errors import UserError

    if len(problems) == 1:
        return UserError(problems[0].partition(": ")[2] if problems[0].startswith("data: ") else problems[0])
    return UserError("\n".join([f"{len(problems)} things are missing:", *(f"  {problem}" for problem in problems)]))


def resolve_variants(sweep: Sweep, args: argparse.Namespace) -> dict[str, Variant]:
    """Return variant name -> resolved settings, of those that the preset has the networks for.

    Raises:
        UserError: a setting that the sweep varies itself, or that is none; or no variant can run.
    """
    from benchmark.errors import UserError

    every = _every_variant(sweep, args)
    can_run = {name: variant for name, variant in every.items() if variant.lacks is None}
    if not can_run:
        name, variant = next(iter(every.items()))
        raise UserError(f"{name} needs {variant.lacks}; preset {args.preset} has none")
    return can_run


def every_training(
    variants: Mapping[str, Variant], seeds: Sequence[int] | None
) -> tuple[dict[str, list[str]], dict[str, Variant]]:
    """Return variant name -> names of its trainings, one a seed, and the settings of each training by its name."""
    if not seeds or len(seeds) == 1:
        return {name: [name] for name in variants}, dict(variants)
    labels = {name: [f"{name} (seed {seed})" for seed in seeds] for name in variants}
    settings = {
        label: variants[name].with_settings({"seed": seed})
        for name, own in labels.items()
        for label, seed in zip(own, seeds, strict=True)
    }
    return labels, settings


def left_out(sweep: Sweep, args: argparse.Namespace) -> list[str]:
    """Return a line for each of a sweep's variants that does not run, with the reason."""
    return [
        f"{name} is left out: it needs {variant.lacks}, and preset {args.preset} has none"
        for name, variant in _every_variant(sweep, args).items()
        if variant.lacks is not None
    ]


def _every_variant(sweep: Sweep, args: argparse.Namespace) -> dict[str, Variant]:
    from benchmark.config import PRESETS, QUICK
    from benchmark.errors import UserError

    if args.quick and args.preset != "demo":
        raise UserError("--quick is for the demo preset; leave out one of --quick and --preset paper")
    chosen: dict[str, Any] = {} if args.seed is None else {"seed": args.seed[0]}
    chosen |= read_settings(args.set)
    for key in chosen:
        for varied in sweep.axis.varied:
            if varied == key or varied.startswith(f"{key}."):
                raise UserError(f"--set {key}: sweep {sweep.name} varies {varied} itself; leave it out")
    base = PRESETS[args.preset]()
    if args.quick:
        base = base.with_settings(QUICK)
    return {name: base.with_settings({**own, **chosen}) for name, own in sweep.settings(args.quick).items()}


def read_settings(pairs: list[str]) -> dict[str, Any]:
    """Return the settings that ``--set KEY=VALUE`` names; values are YAML.

    Raises:
        UserError: no KEY=VALUE, or no YAML.
    """
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


def _check_data(args: argparse.Namespace, variants: Mapping[str, Variant]) -> str | None:
    """Return the digest of the tree that ``--data`` names, after its check; None where one is simulated.

    Whose recordings are reconstructed, and whether the data have what single variants ask for, is checked here, and not
    hours later by the stage that needs it.
    """
    from benchmark.errors import UserError

    variant = next(iter(variants.values()))
    if args.data is not None:
        from benchmark.stages.prepare import open_data

        data = open_data(args.data)
        present, where, remedy = data.subjects, str(args.data), ""
    elif variant.data.simulation is not None:
        present, where = tuple(range(1, variant.data.simulation.subjects + 1)), "the simulation"
        remedy = f" or --set data.simulation.subjects={max(variant.generation.subjects)}"
    else:
        raise UserError(f"preset {args.preset} needs the Natural Scenes Dataset: name its folder with --data DIR")
    absent = [subject for subject in variant.generation.subjects if subject not in present]
    if absent:
        if variant.transfer.subject is not None:
            raise UserError(
                f"transfer.subject is {absent[0]}; {where} has subjects {', '.join(map(str, present))}\n"
                f"type --set transfer.subject={present[0]}"
            )
        few = ",".join(map(str, present[:4]))
        raise UserError(
            f"generation.subjects names subject {absent[0]}; {where} has subjects {', '.join(map(str, present))}\n"
            f"type --set generation.subjects=[{few}]{remedy}"
        )
    if args.data is not None:
        _check_companions(data, variants.values())
    return data.digest() if args.data is not None else None


def _check_companions(data: Any, variants: Collection[Variant]) -> None:
    """Refuse data without the anatomy or the NSD-Synthetic that a variant asks for."""
    from benchmark.stages.anatomy import anatomy
    from benchmark.stages.prepare import check_transfer

    for method in {variant.clustering.method: None for variant in variants if variant.needs_anatomy}:
        anatomy(data, data.subjects, method)
    for new in {variant.transfer.subject for variant in variants}:
        if new is not None:
            check_transfer(data, new)
    for variant in variants:
        if variant.generation.test_set == "nsd-synthetic":
            from benchmark.stages import synthetic  # brings in torch

            synthetic.check(data, variant.generation.subjects, variant.data.image_size)


def _say_what_runs(sweep: Sweep, args: argparse.Namespace, decisions: list[Decision], variants: int) -> None:
    runs = sum(decision.action == "run" for decision in decisions)
    cached = sum(decision.action == "cached" for decision in decisions)
    size = "demo, quick" if args.quick else args.preset
    times = f" x {len(args.seed)} seeds" if args.seed is not None and len(args.seed) > 1 else ""
    print(
        f"sweep {sweep.name} ({size}): {variants} variants{times}, {len(decisions)} stages: {runs} to run, "
        f"{cached} cached; results go to {args.out}/",
        flush=True,
    )
    for line in left_out(sweep, args):
        print(f"  {line}", flush=True)


def _say_where_runs_are(sweep: Sweep) -> None:
    from benchmark.tracking.wandb_tracker import notice

    if line := notice(sweep.name):
        print(line, file=sys.stderr, flush=True)


def _print_plan(decisions: list[Decision]) -> None:
    width = max(len(decision.stage.title) for decision in decisions)
    for decision in decisions:
        print(f"  {decision.action:<7} {decision.stage.title:<{width}}  {decision.reason}")


def show(event: object) -> None:
    """Print how stages end; cached ones are counted in the first line, blocked ones in the last."""
    from benchmark.launch import Event

    assert isinstance(event, Event)
    if event.kind in ("done", "failed", "note"):
        print(str(event), file=sys.stderr, flush=True)


def _track(args: argparse.Namespace, report: Report) -> None:
    """Track the leaderboard; trouble with that is told, and nothing else comes of it."""
    from benchmark.tracking.board import track_board

    try:
        track_board(args.out, report.answer, args.tracker)
    except Exception as error:
        print(f"the leaderboard is not tracked ({type(error).__name__}: {error})", file=sys.stderr, flush=True)


def _report(
    args: argparse.Namespace,
    store: Any,
    sweep: Sweep,
    trainings: Mapping[str, Sequence[Training]],
    main_name: str,
    seconds: float,
) -> None:
    from benchmark.progress import clock_time
    from benchmark.report.rows import write_report
    from leaderboard import print_orderings, print_table
    from leaderboard.orderings import differences_lines

    report = write_report(args.out, store, sweep, trainings, main_name)
    answer = report.answer
    print()
    print_table(report.ranking, answer.notes)
    for sentence in answer.sentences:
        print(sentence)
    if answer.orderings:
        print()
        print_orderings(answer.orderings, sweep.answers)
    elif answer.differences:
        print("\npaired over images" + (" and seeds:" if answer.differences[0].seeds > 1 else ":"))
        print("\n".join(f"  {line}" for line in differences_lines(answer.differences)))
    if report.ranking.track == "paper":  # on another track no printed number compares with ours
        from leaderboard.formats import print_beside, print_published
        from leaderboard.published import published

        rows = {row.variant: row for row in report.ranking.rows if row.kind == "method"}
        print()
        print_beside([(rows[name], published()[row]) for name, row in sweep.answered().items() if name in rows])
        print_published([published()[row] for row in sweep.beside])
    if args.tracker in ("wandb", "tensorboard"):
        _track(args, report)
    print(f"\npage: {report.page}   rows: {report.page.parent / 'leaderboard.json'}   time: {clock_time(seconds)}")
