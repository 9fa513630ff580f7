"""``python -m benchmark.check``: is a candidate worse than a baseline, and where did a line of checkpoints change?"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark.cli import Parser, from_zero, main_guard, positive
from benchmark.errors import UserError

if TYPE_CHECKING:
    from benchmark.check.checkpoint import Scoring
    from leaderboard.gate import Rules

EXAMPLES = """\
examples:
  python -m benchmark.check --candidate new --baseline runs --variant clusters=128       two run folders
  python -m benchmark.check --candidate new.parquet --baseline old.parquet --out check   of benchmark.score --per-image
  python -m benchmark.check --candidate runs::clusters=64 --baseline runs::clusters=128
  python -m benchmark.check --candidate demo-brain-it-clusters-64-1a2b3c4d --baseline clusters=128 --leaderboard runs
  python -m benchmark.check --candidate my/joint --baseline runs::clusters=128 --run runs --variant clusters=128
  python -m benchmark.check --candidate a b c --baseline d e f                           three seeds a side
  python -m benchmark.check --candidate X --baseline Y --fail 'PixCorr:0.005,CLIP:1%'    what may drop, and how far
  python -m benchmark.check --history runs                                               every checkpoint of each line

X and Y: a run's --out folder or a leaderboard (PATH::VARIANT chooses), the id or the variant of a row, a Parquet of
per-image scores, or a checkpoint: a trained stage's folder or file, reconstructed and scored first.
exit codes: 0 no regression, 1 a blocking metric regressed (or a stage failed), 2 the call or its input is wrong"""


def parser() -> Parser:
    """Return the command line's parser."""
    p = Parser(
        prog="python -m benchmark.check",
        description="Compare a candidate with a baseline on the same images; fail where it is worse.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = p.add_argument_group("what")
    what.add_argument("--candidate", nargs="+", metavar="X", help="the model in question; several: its seeds")
    what.add_argument("--baseline", nargs="+", metavar="Y", help="what it must not fall behind; several: its seeds")
    what.add_argument("--variant", metavar="NAME", help="variant of a run or leaderboard, where X or Y does not say")
    what.add_argument(
        "--leaderboard", type=Path, metavar="DIR", help="where ids are looked up (default: the folder of --run)"
    )
    what.add_argument(
        "--same-protocol", action="store_true", help="vouch for a Parquet that does not say how it was scored"
    )
    what.add_argument("--history", nargs="*", type=Path, metavar="DIR", help="list the lines of run folders instead")
    what.add_argument("--calibrate", action="store_true", help="simulate the gate's promises, and draw the curves")
    rules = p.add_argument_group("rules")
    rules.add_argument(
        "--fail",
        metavar="KEY[:MARGIN],...",
        help="metrics that block, and drops they may have: 0.005 in the metric's unit (0.01 is one point of a "
        "percentage), or 1%% of the baseline; all, none (default: the eight of the paper's Table 1)",
    )
    rules.add_argument(
        "--warn", metavar="KEY[:MARGIN],...", help="metrics that are told and never fail (default: all others)"
    )
    rules.add_argument(
        "--alpha", type=float, default=0.05, metavar="SHARE", help="of equal models that may fail (default: 0.05)"
    )
    rules.add_argument(
        "--power", type=float, default=0.8, metavar="P", help="for which detectable drops are stated (default: 0.8)"
    )
    rules.add_argument("--seed", type=from_zero, default=0, help="of resampling (default: 0)")
    score = p.add_argument_group("checkpoints")
    score.add_argument(
        "--run",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="the run whose data and other stages a checkpoint is joined with (default: runs)",
    )
    score.add_argument("--weights", type=Path, metavar="DIR", help="folder of the papers' networks")
    score.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where networks run")
    score.add_argument("--threads", type=positive, metavar="N", help="threads (default: all cores)")
    output = p.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write check.json, junit.xml, comment.md and worse.html there; history.json; the curves",
    )
    output.add_argument(
        "--worst", type=positive, default=24, metavar="N", help="images on the page of those that got worse"
    )
    output.add_argument("--pairs", type=positive, default=1000, metavar="N", help="simulated by --calibrate")
    output.add_argument("--no-progress", action="store_true", help="no progress bars or lines")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parser().parse_args(argv)
    modes = [args.history is not None, args.calibrate, bool(args.candidate or args.baseline)]
    if sum(modes) != 1:
        raise UserError("say one of --candidate X --baseline Y, --history, --calibrate; see --help")
    _check_out(args.out)
    if args.calibrate:
        return _calibrate(args)
    rules = _rules(args)
    return _history(args, rules) if args.history is not None else _check(args, rules)


def _check_out(out: Path | None) -> None:
    """Make the folder now, so that nothing is computed for results that cannot be written."""
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); choose another folder") from error


def _rules(args: argparse.Namespace) -> Rules:
    from leaderboard.gate import Rules, read_margins

    try:
        return Rules(
            blocking=None if args.fail is None else read_margins(args.fail, "--fail"),
            advisory=None if args.warn is None else read_margins(args.warn, "--warn"),
            alpha=args.alpha,
            power=args.power,
            seed=args.seed,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _check(args: argparse.Namespace, rules: Rules) -> int:
    for option, value in (("--candidate", args.candidate), ("--baseline", args.baseline)):
        if not value:
            raise UserError(f"{option} is missing: name a run folder, an id, a Parquet or a checkpoint")
    from benchmark.check.output import print_check, write
    from benchmark.check.page import worse_page
    from benchmark.check.sources import read_source
    from leaderboard.gate import check

    board = args.leaderboard or args.run

    def scoring() -> Scoring:
        return _scoring(args)

    baseline = read_source(args.baseline, "--baseline", args.variant, board, scoring)
    candidate = read_source(args.candidate, "--candidate", args.variant, board, scoring)
    try:
        found = check(candidate.side, baseline.side, rules, same_protocol=args.same_protocol)
    except ValueError as error:
        raise UserError(str(error)) from error
    print_check(found)
    if args.out is not None:
        page = worse_page(found, baseline.images, candidate.images, args.worst)
        written = write(args.out, found, page, (candidate.id, baseline.id))
        print(f"written: {', '.join(map(str, written))}")
    return 0 if found.passed else 1


def _scoring(args: argparse.Namespace) -> Scoring:
    """Return how a checkpoint is scored; brings in what stages need."""
    import os

    from benchmark.check.checkpoint import Scoring
    from benchmark.devices import choose_device
    from benchmark.execute import RunOptions
    from benchmark.running import use_weights

    use_weights(args.weights)
    options = RunOptions(
        device=choose_device(args.device),
        threads=args.threads or len(os.sched_getaffinity(0)),
        group="check",
        progress=not args.no_progress,
    )
    return Scoring(args.run, args.variant, options)


def _history(args: argparse.Namespace, rules: Rules) -> int:
    import json

    from benchmark.check.history import as_json, print_lines, read_lines
    from benchmark.check.output import write_file

    lines = read_lines(args.history or [args.run], args.variant, rules)
    print_lines(lines, rules)
    if args.out is not None:
        text = json.dumps(as_json(lines), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        print(f"written: {write_file(args.out / 'history.json', text)}")
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    if args.out is None:
        raise UserError("--calibrate needs --out DIR, where the curves go")
    from benchmark.check.curves import calibrate, table
    from benchmark.progress import Progress

    print(table(calibrate(args.out, args.pairs, args.seed, Progress(enabled=not args.no_progress))))
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main_guard(main))
