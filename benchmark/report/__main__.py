"""``python -m benchmark.report``: all sweeps of a run on one page, and as Markdown."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from benchmark.cli import Parser, main_guard

EXAMPLES = """\
examples:
  python -m benchmark.report                      every sweep that finished in runs/
  python -m benchmark.report clusters branches    two of them
  python -m benchmark.report --out runs-800 --to page

exit codes: 0 fine, 2 the call or its input is wrong"""


def parser() -> Parser:
    """Return the command line's parser."""
    p = Parser(
        prog="python -m benchmark.report",
        description="Write the finished sweeps of a run as one HTML page and as Markdown.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("sweeps", metavar="NAME", nargs="*", help="sweeps to write (default: all that finished)")
    p.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="folder of the run (default: runs)")
    p.add_argument("--to", type=Path, metavar="DIR", help="where the page goes (default: report in the run's folder)")
    return p


def main() -> int:
    """Run the command line."""
    args = parser().parse_args()
    from benchmark.errors import UserError, did_you_mean
    from benchmark.report.answers import read_answers, write_page

    answers = {answer.sweep: answer for answer in read_answers(args.out)}
    for name in args.sweeps:
        if name not in answers:
            hint = did_you_mean(name, list(answers)) or f"; finished are {', '.join(answers)}"
            raise UserError(f"no finished sweep '{name}' in {args.out}{hint}")
    chosen = [answers[name] for name in args.sweeps or answers]
    page, text = write_page(args.out, args.to or args.out / "report", chosen)
    print(f"{page}\n{text}: {len(chosen)} sweep{'' if len(chosen) == 1 else 's'}")
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main_guard(main))
