"""``python -m benchmark.data``: make a miniature NSD, look a data tree over, prepare it for training."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import fields
from pathlib import Path

from benchmark.cli import Parser, main_guard
from benchmark.data.release import NEEDED, PARTS, SIZES
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


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 1,2,5,7, not '{text}'") from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


def build_parser() -> Parser:
    """Return the command line's parser; it imports nothing heavy."""
    parser = Parser(prog="python -m benchmark.data", description="Make data for the benchmark, check it, prepare it.")
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
    check = commands.add_parser(
        "check",
        help="say what is in a data tree, what is missing or wrong, and where to get it",
        description="Look a data tree (or a prepared store) over, by headers, names and sizes. Ends with 0 where all "
        "that is needed is there, 1 where something is missing or wrong.",
    )
    check.add_argument("directory", metavar="DIR", type=Path, help="the data tree, which may be empty; or a store")
    needs = f"what is needed, of {', '.join(PARTS)} (default: {','.join(NEEDED)})"
    check.add_argument("--parts", metavar="A,B", type=_words, help=needs)
    check.add_argument("--subjects", metavar="N,N", type=_numbers, help="of these subjects only, from 1 (default: all)")
    check.add_argument(
        "--source",
        choices=("auto", "nsd", "algonauts"),
        default="auto",
        help="whose betas: NSD's own, or the averages of the Algonauts 2023 release (default: what is there)",
    )
    check.add_argument("--digests", action="store_true", help="of a store: read every byte of it")
    check.add_argument("--json", action="store_true", help="print the whole report as JSON")
    prepare = commands.add_parser(
        "prepare",
        help="turn a data tree into arrays that training maps into memory",
        description="Turn the data tree DIR into a store. Interrupted or killed, it goes on when the same command is "
        "typed again; with other parts or subjects it adds them. Needs less than 8 GB of memory.",
    )
    prepare.add_argument("directory", metavar="DIR", type=Path, help="NSD, the Algonauts 2023 release, or a miniature")
    prepare.add_argument("--out", metavar="STORE", type=Path, required=True, help="the store's folder")
    makes = f"what to make, of {', '.join(PARTS)} (default: {','.join(NEEDED)}, and of the others what is there)"
    prepare.add_argument("--parts", metavar="A,B", type=_words, help=makes)
    prepare.add_argument("--subjects", metavar="N,N", type=_numbers, help="these subjects only, from 1 (default: all)")
    sizes = f"sides of the images in pixels (default: {','.join(map(str, SIZES))}, or the tree's own where smaller)"
    prepare.add_argument("--sizes", metavar="N,N", type=_numbers, help=sizes)
    prepare.add_argument("--external", metavar="N", type=int, help="at most so many external images (default: all)")
    prepare.add_argument(
        "--source", choices=("auto", "nsd", "algonauts"), default="auto", help="whose betas, as in check"
    )
    prepare.add_argument("--workers", metavar="N", type=int, help="threads that resize images (default: up to 16)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = build_parser().parse_args(argv)
    return {"simulate": _simulate, "check": _check, "prepare": _prepare}[args.command](args)


def _simulate(args: argparse.Namespace) -> int:
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


def _check(args: argparse.Namespace) -> int:
    from benchmark.data import inspection
    from benchmark.data.prepared import is_store
    from benchmark.errors import UserError

    found: inspection.Inspection | inspection.StoreInspection
    if is_store(args.directory):
        found = inspection.inspect_store(args.directory, args.digests)
        text = inspection.store_lines(found)
    else:
        if args.digests:
            raise UserError(f"--digests: {args.directory} is no prepared store; a data tree has no list of digests")
        found = inspection.inspect_tree(args.directory, args.parts, args.subjects, args.source)
        text = inspection.lines(found)
    if args.json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        print("\n".join(text))
    return 0 if found.complete else 1


def _prepare(args: argparse.Namespace) -> int:
    from benchmark.data.prepare import prepare
    from benchmark.data.wording import gigabytes
    from benchmark.errors import UserError
    from benchmark.progress import Progress, clock_time

    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: expected 1 or more")
    started = time.monotonic()
    made = prepare(
        args.directory,
        args.out,
        parts=args.parts,
        subjects=args.subjects,
        sizes=args.sizes,
        external=args.external,
        source=args.source,
        workers=args.workers,
        progress=Progress(),
    )
    data = made.data
    for note in (*made.notes, *(f"limit: {limit}" for limit in data.limits)):
        print(note, file=sys.stderr)
    voxels = sum(data.n_voxels(subject) for subject in data.subjects)
    print(
        f"{data.root}: {', '.join(data.parts)}; {len(data.subjects)} subjects with {voxels:,} voxels, "
        f"{gigabytes(data.manifest.nbytes)}; "
        + ("already there, unchanged" if made.reused else f"made in {clock_time(time.monotonic() - started)}")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
