"""``python -m benchmark.data simulate DIR``: make a miniature NSD."""

from __future__ import annotations

import sys
import time
from dataclasses import fields
from pathlib import Path

from benchmark.cli import Parser, main_guard
from benchmark.data.settings import SimulationSettings

_HELP = {
    "subjects": "subjects, 1 to 8",
    "seed": "everything is drawn from it",
    "size": "side of the images in pixels",
    "shared": "images that every subject sees (they test)",
    "unique": "images of each subject alone (they train)",
    "external": "images without fMRI",
    "voxels": "about so many voxels a subject",
    "sessions": "at most so many scan sessions a subject",
    "repeats": "times that an image is shown, 1 to 3",
}


def build_parser() -> Parser:
    """Return the command line's parser; it imports nothing heavy."""
    parser = Parser(prog="python -m benchmark.data", description="Make data for the benchmark.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    simulate = commands.add_parser(
        "simulate",
        help="write a miniature NSD: generated scenes or your photographs, and a simulated brain",
        description="Write a miniature NSD into DIR, in NSD's own files, with the truth behind it in DIR/simulation. "
        "The same command again reuses what is there.",
    )
    simulate.add_argument("directory", metavar="DIR", type=Path, help="where to; must be free, or hold the same data")
    photographs = "use the photographs in FOLDER (jpg, png, webp) instead of generated scenes"
    simulate.add_argument("--images", metavar="FOLDER", type=Path, help=photographs)
    complete = "also what the paper uses and the demo does not: NSD-Synthetic, an Algonauts 2023 release, more surfaces"
    simulate.add_argument("--complete", action="store_true", help=complete)
    for field in fields(SimulationSettings):
        simulate.add_argument(
            f"--{field.name}",
            metavar="N",
            type=int,
            default=field.default,
            help=_HELP[field.name] + " (default: %(default)s)",
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = build_parser().parse_args(argv)
    settings = SimulationSettings(**{field.name: getattr(args, field.name) for field in fields(SimulationSettings)})
    from benchmark.data.simulate import simulate  # brings in torch
    from benchmark.progress import Progress

    started = time.monotonic()
    print(f"miniature NSD: {settings.subjects} subjects, seed {settings.seed}, into {args.directory}", file=sys.stderr)
    result = simulate(args.directory, settings, args.images, Progress(), complete=args.complete)
    used = result.settings
    print(
        f"{result.root}: {used.n_images} images ({used.shared} shared), {used.external} external, "
        f"{used.subjects} subjects with {used.n_trials} trials in {used.n_sessions} sessions; "
        + ("already there, unchanged" if result.reused else f"made in {time.monotonic() - started:.0f} s")
    )
    print(f"next: python -m benchmark.sweep clusters --data {result.root}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
