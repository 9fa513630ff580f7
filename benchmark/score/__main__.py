"""``python -m benchmark.score``: the eleven numbers of anybody's reconstructions, as the paper in question has them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from benchmark.cli import main_guard
from benchmark.score.options import Job, check_outputs, parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(arguments)
    job = Job.of(args)
    check_outputs(args)
    from benchmark.score.work import score

    work = score(args, job)
    from benchmark.score.output import show, write

    show(args, job, work.results)
    write(args, job, work, arguments)
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main_guard(main))
