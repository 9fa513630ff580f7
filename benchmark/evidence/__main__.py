"""``python -m benchmark.evidence``: the figures and numbers of docs/demo.md, each by one command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmark.cli import Parser, main_guard, positive
from benchmark.errors import UserError
from benchmark.evidence.learning import add_arguments, run


def build_parser() -> Parser:
    """Return the command line's parser; it imports nothing heavy."""
    parser = Parser(prog="python -m benchmark.evidence", description="Make the figures and numbers of docs/demo.md.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    pictures = commands.add_parser(
        "pictures",
        help="contact sheet of a finished sweep, and what its pictures are worth",
        description="Write contact.png (the first test images, unselected: seen, generator fed the true tokens, "
        "low-level, semantic, combined), true-tokens.png and pictures.json (all test images and subjects).",
    )
    pictures.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="a finished sweep (default: %(default)s)"
    )
    _add_out(pictures)
    pictures.add_argument(
        "--clusters", type=positive, default=128, metavar="N", help="the variant shown (default: %(default)s)"
    )
    pictures.add_argument(
        "--subject", type=positive, default=1, metavar="S", help="whose pictures are shown (default: %(default)s)"
    )
    pictures.add_argument(
        "--count", type=positive, default=12, metavar="N", help="show the first N test images (default: %(default)s)"
    )

    generator = commands.add_parser(
        "generator",
        help="the shipped generator on fresh scenes, fed their true tokens; needs no run",
        description="Draw fresh scenes, feed their true tokens to the shipped generator; write generator.png (the "
        "first twelve) and generator.json.",
    )
    generator.add_argument(
        "--images", type=positive, default=144, metavar="N", help="scenes to draw, 2 or more (default: %(default)s)"
    )
    generator.add_argument("--seed", type=int, default=12345, help="of the scenes (default: %(default)s)")
    _add_out(generator)

    add_arguments(
        commands.add_parser(
            "learning",
            help="learning curves of BIT beside a ridge and an MLP",
            description="Train BIT, an MLP and a ridge on what a finished sweep prepared, and compare how they learn.",
        )
    )
    return parser


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the files go")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = build_parser().parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.out}: cannot be made ({error.strerror}); choose another folder with --out") from error
    # What follows brings in torch.
    if args.command == "pictures":
        from benchmark.evidence.pictures import pictures

        pictures(args.runs, args.out, clusters=args.clusters, subject=args.subject, count=args.count)
    elif args.command == "generator":
        from benchmark.evidence.pictures import generator

        generator(args.out, n_images=args.images, seed=args.seed)
    else:
        return run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
