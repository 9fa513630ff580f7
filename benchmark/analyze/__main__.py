"""``python -m benchmark.analyze``: figures about a finished run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmark.cli import Parser, main_guard, positive
from benchmark.errors import UserError

EXAMPLES = """\
examples:
  python -m benchmark.analyze attention runs --variant clusters=128
  python -m benchmark.analyze attention runs --variant clusters=128 --data DIR --weights DIR      a run on NSD

writes into RUN/analysis/attention-VARIANT:
  index.html           the tokens of both branches: point at one to see its voxels, its map, its images
  spatial.png          which places of the image each token serves, tokens laid out by place (as Fig. S12a)
  cortex.png           the clusters' voxels on the cortex, coloured by the places that their tokens serve (as Fig. S12b)
  semantic.png         the most selective tokens and what they attend to (as Fig. S13)
  attention.json       the numbers; maps.safetensors the maps"""


def build_parser() -> Parser:
    """Return the command line's parser; it imports nothing heavy."""
    parser = Parser(prog="python -m benchmark.analyze", description="Look at what a finished run has learned.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    attention = commands.add_parser(
        "attention",
        help="what each Brain Token contributes to: places and contents",
        description="Show what each Brain Token contributes to (Brain-IT, App. C.4): BIT's cross-attention, averaged "
        "over blocks, heads and images.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    attention.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run (its --out)")
    attention.add_argument("--variant", metavar="NAME", help="such as clusters=128 (default: the only one)")
    attention.add_argument("--out", type=Path, metavar="DIR", help="where to (default: RUN/analysis/attention-NAME)")
    attention.add_argument(
        "--images",
        choices=("test", "validation"),
        default="test",
        help="recordings of which images (default: test; the demo has few of these, and more for validation)",
    )
    attention.add_argument("--count", type=positive, metavar="N", help="the first so many images (default: all)")
    attention.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="the data of the run, where they were not simulated: which side a voxel is on, and where",
    )
    attention.add_argument("--weights", type=Path, metavar="DIR", help="folder of the papers' networks")
    attention.add_argument("--device", default="auto", help="auto, cpu, cuda (default: a GPU where there is one)")
    attention.add_argument("--no-progress", action="store_true", help="no progress bars or lines")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = build_parser().parse_args(argv)
    if not args.run.is_dir():
        raise UserError(f"{args.run}: no such folder; expected the --out folder of a finished run")
    from benchmark.results import find_variant
    from benchmark.running import use_weights

    name, reconstruct = find_variant(args.run, args.variant)
    use_weights(args.weights)
    out = args.out or args.run / "analysis" / f"attention-{name}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); choose another folder with --out") from error
    # What follows brings in torch.
    from benchmark.analyze.attention import analyse
    from benchmark.devices import choose_device
    from benchmark.progress import Progress

    found = analyse(
        name,
        reconstruct,
        images=args.images,
        count=args.count,
        data=args.data,
        device=choose_device(args.device),
        progress=Progress(enabled=not args.no_progress),
    )
    found.write(out)
    print("\n".join(found.sentences()))
    print(f"page: {out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
