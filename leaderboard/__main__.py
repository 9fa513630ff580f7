"""``python -m leaderboard show|build|compare|add``: rows as tables, as a page, side by side, and new ones."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

EXAMPLES = """\
examples:
  python -m leaderboard show                            the rows of runs/, or what papers printed where there is none
  python -m leaderboard show --published --data 1h      published rows, by scoring protocol
  python -m leaderboard show runs other/runs --format latex
  python -m leaderboard build runs other/runs --out board
  python -m leaderboard compare clusters=128 clusters=8 --in runs
  python -m leaderboard add scores.json --per-image scores.parquet --to board --method "My method"

Rows are ranked within one track and one protocol hash, never across.
exit codes: 0 fine, 2 the call or its input is wrong"""

COMMANDS = ("show", "build", "compare", "add")
FORMATS = ("terminal", "markdown", "csv", "latex", "json")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, and end with code 2."""
        unknown = re.search(r"invalid choice: '(.*?)'", message)
        near = difflib.get_close_matches(unknown[1], COMMANDS + FORMATS, n=1) if unknown else []
        hint = f"; did you mean '{near[0]}'?" if near else f"; see {self.prog} --help"
        self.exit(2, f"error: {' '.join(message.split())}{hint}\n")


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = _Parser(
        prog="python -m leaderboard",
        description="Result rows: show, gather into a page, compare, and add.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")

    def command(name: str, about: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=about, description=about, allow_abbrev=False)

    where = "--out folder of a run, folder of result rows, or leaderboard.json (default: runs)"
    show = command("show", "print rows, ranked where they may be")
    show.add_argument("paths", metavar="PATH", nargs="*", type=Path, help=where)
    show.add_argument("--published", action="store_true", help="what papers printed, instead, or beside the rows named")
    show.add_argument("--protocol", metavar="NAME", help="only rows under this scoring protocol")
    show.add_argument("--track", metavar="NAME", help="only rows of this track")
    show.add_argument("--data", metavar="AMOUNT", help="only published rows of this amount of fMRI, e.g. 1h")
    show.add_argument("--format", choices=FORMATS, default="terminal", help="how to write them (default: terminal)")

    build = command("build", "gather the rows of several runs into one leaderboard with its site")
    build.add_argument("paths", metavar="PATH", nargs="+", type=Path, help=where)
    build.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the leaderboard goes")
    build.add_argument("--title", default="Leaderboard", help="heading of the page")

    compare = command("compare", "compare two rows image by image, on every metric that both have")
    compare.add_argument("a", metavar="A", help="id or variant of a row, or its JSON file")
    compare.add_argument("b", metavar="B", help="likewise; a positive difference says that A's number is larger")
    compare.add_argument("--in", dest="paths", metavar="PATH", action="append", type=Path, help=where)
    compare.add_argument("--format", choices=("terminal", "json"), default="terminal", help="how to write it")

    add = command("add", "check a result from elsewhere, keep it, and say what it is comparable with")
    add.add_argument("source", metavar="SOURCE", type=Path, help="scores.json of benchmark.score, or a run's folder")
    add.add_argument("--to", metavar="DIR", type=Path, required=True, help="leaderboard's folder; made where missing")
    add.add_argument(
        "--per-image", metavar="FILE", type=Path, help="Parquet of benchmark.score: rows are then compared"
    )
    add.add_argument("--method", metavar="NAME", help="the method's name (scores.json only)")
    add.add_argument("--variant", metavar="NAME", default="", help="the variant's name, where a method has several")
    add.add_argument("--data", metavar="AMOUNT", default="", help="fMRI of the test subject it trained on, e.g. 1h")
    add.add_argument("--source", dest="origin", metavar="TEXT", help="where it comes from (default: the file's path)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = parser().parse_args(argv)
    from leaderboard import commands

    run = {"show": commands.show, "build": commands.build, "compare": commands.compare_rows, "add": commands.add}
    try:
        run[args.command](args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough, as head does
        sys.stdout = open(os.devnull, "w")  # or Python complains when it flushes at the end
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
