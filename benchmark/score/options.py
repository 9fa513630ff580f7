"""The command line of ``python -m benchmark.score``: its options, and what can be said of them without an image."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmark.cli import Parser, from_zero, positive
from benchmark.errors import UserError, did_you_mean
from metrics.cards import CARDS, KEYS, PIXEL_KEYS
from metrics.protocols import PROTOCOLS, Protocol, get_protocol

ALL = "all"
DEFAULT = next(iter(PROTOCOLS))
EXAMPLES = """\
examples:
  python -m benchmark.networks fetch weights                                    once, on a machine with internet
  python -m benchmark.score --recons recons --truth truth --weights weights    Brain-IT's own evaluation
  python -m benchmark.score --recons recons.npy --truth truth.npy --protocol mindeye2-unblended --weights weights
  python -m benchmark.score --recons recons --truth truth --metrics PixCorr,SSIM,SSIM-color    needs no weights
  python -m benchmark.score --recons recons --truth truth --protocol all --metrics SSIM        how far it moves
  python -m benchmark.score --recons recons --truth truth --backbones demo      stand-ins that came with the install

Images: a folder of PNG, JPEG or WebP files paired by their names; or .npy, .npz, .safetensors, .pt, .h5::dataset with
N x H x W x 3 uint8 or N x 3 x H x W float in [0, 1]. What each protocol does: python -m metrics protocols.
exit codes: 0 fine, 1 the run failed, 2 the call or its input is wrong (nothing is written then)"""


def parser() -> Parser:
    """Return the command line's parser."""
    p = Parser(
        prog="python -m benchmark.score",
        description="Score reconstructions against the images that were seen, as a published evaluation does.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    images = p.add_argument_group("images")
    images.add_argument("--recons", required=True, metavar="PATH", help="the reconstructions")
    images.add_argument("--truth", required=True, metavar="PATH", help="the images that were seen")
    images.add_argument("--blurry", metavar="PATH", help="low-level reconstructions, for protocols that blend them in")
    images.add_argument("--ids", type=Path, metavar="FILE", help="ids of an array's rows, or which images to take")
    images.add_argument(
        "--subset",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="also score these ids from the same pass: a list, or NSD's nsd_expdesign.mat for the 982 images",
    )
    images.add_argument("--subject", type=positive, metavar="N", help="whose they are, where names do not tell")
    images.add_argument("--allow-constant", action="store_true", help="score images of one flat colour, and note them")
    scoring = p.add_argument_group("scoring")
    scoring.add_argument(
        "--protocol",
        metavar="NAME",
        help=f"{', '.join(PROTOCOLS)}, or all (default: {DEFAULT}); NAME+KEY adds a metric of metrics/added",
    )
    scoring.add_argument("--metrics", metavar="KEYS", help=f"some of {','.join(KEYS)} (default: all)")
    scoring.add_argument(
        "--n-way", metavar="N[,N]", help="also identification among so many images, exact, from the same matrices"
    )
    scoring.add_argument(
        "--distractors",
        metavar="PATH",
        help="the pool of CLIP-1000 in brain-it: other images, or an M x 768 array of their features",
    )
    scoring.add_argument("--no-calibration", action="store_true", help="leave out the chance and ceiling columns")
    scoring.add_argument("--seed", type=from_zero, default=0, help="of intervals and shuffling (default: 0)")
    networks = p.add_argument_group("networks")
    networks.add_argument(
        "--backbones",
        choices=("paper", "demo"),
        help="the papers' networks, or stand-ins under the demo protocol (default: paper)",
    )
    networks.add_argument("--weights", type=Path, metavar="DIR", help="folder of the papers' weights files")
    networks.add_argument(
        "--random-weights", type=from_zero, metavar="SEED", help="dry run: true architectures, meaningless weights"
    )
    networks.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: a GPU where there is one)"
    )
    networks.add_argument("--batch", type=positive, default=32, metavar="N", help="images a pass (default: 32)")
    networks.add_argument("--threads", type=positive, metavar="N", help="threads (default: all cores)")
    networks.add_argument("--cache", type=Path, metavar="DIR", help="keep the truths' features there for later calls")
    output = p.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", help="write scores.json; - prints it, and the table to stderr")
    output.add_argument("--per-image", type=Path, metavar="FILE", help="write every image's scores as Parquet")
    output.add_argument("--method", metavar="NAME", help="name in the Parquet file (default: from --recons)")
    output.add_argument("--no-progress", action="store_true", help="no progress bars or lines")
    return p


@dataclass(frozen=True)
class Job:
    """What was asked for, after everything was checked that needs no image.

    Attributes:
        protocols: by name; several where ``--protocol all`` was asked for.
        every: whether it was.
        kind: where networks come from.
        keys: the metrics; None for all.
        n_way: among how many images else to identify.
        notes: what a reader should know of the choice.
    """

    protocols: dict[str, Protocol]
    every: bool
    kind: Literal["paper", "demo"]
    keys: tuple[str, ...] | None
    n_way: tuple[int, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, args: argparse.Namespace) -> Job:
        """Make sense of the options, or say which do not fit together."""
        keys, n_way = _keys(args.metrics), _numbers(args.n_way)
        name = args.protocol or ("demo" if args.backbones == "demo" else DEFAULT)
        every = name == ALL
        chosen = [p for p in PROTOCOLS.values() if p.track == "paper"] if every else [_protocol(name)]
        for key in keys or ():
            if key not in chosen[0].keys:
                raise UserError(f"--metrics {args.metrics}: not in protocol {name}; type --protocol {name}+{key}")
        notes = []
        if every and args.blurry is None:
            blends = [p.name for p in chosen if p.blend is not None]
            chosen = [p for p in chosen if p.blend is None]
            notes.append(f"{', '.join(blends)} left out: it blends in low-level reconstructions (--blurry PATH)")
        job = cls(
            protocols={p.name: p for p in chosen},
            every=every,
            kind=args.backbones or ("demo" if chosen[0].track == "demo" else "paper"),
            keys=keys,
            n_way=n_way,
            notes=tuple(notes),
        )
        job._check(args, name)
        return job

    def _check(self, args: argparse.Namespace, name: str) -> None:
        first = next(iter(self.protocols.values()))
        pixels = ",".join(PIXEL_KEYS)
        if self.networks and self.kind != first.track:
            if first.track == "demo":
                raise UserError("--protocol demo: its judges are stand-ins; leave out --backbones paper")
            raise UserError(
                f"--protocol {name}: its judges are the papers' networks, not stand-ins\n"
                f"leave out --backbones demo, or --protocol, or ask for what needs no network: --metrics {pixels}"
            )
        blends = any(p.blend is not None for p in self.protocols.values())
        if blends and args.blurry is None:
            raise UserError(
                f"--protocol {name}: blends each reconstruction with a low-level one; name their folder or file with "
                f"--blurry PATH\nwithout them: --protocol {name}-unblended"
            )
        if args.blurry is not None and not blends:
            raise UserError(f"--protocol {name}: blends nothing; leave out --blurry (mindeye2 blends)")
        if args.random_weights is not None and (self.kind == "demo" or args.weights is not None):
            other = "--weights" if args.weights is not None else "--backbones demo"
            raise UserError(f"--random-weights draws the weights of the papers' networks; leave out {other}")
        if args.distractors is not None and self.pooled is None:
            raise UserError(
                "--distractors: for CLIP-1000 under --protocol brain-it only; leave it out (elsewhere retrieval is "
                "among the test images)"
            )

    @property
    def networks(self) -> list[str]:
        """The networks that will judge, CLIP last."""
        names = {
            slot.network
            for p in self.protocols.values()
            for key, slot in p.slots.items()
            if self.keys is None or key in self.keys
        }
        ordered = dict.fromkeys(network for p in self.protocols.values() for network in p.networks)
        return [name for name in ordered if name in names]

    @property
    def pooled(self) -> Protocol | None:
        """The protocol that retrieves from a pool of distractors, where there is one."""
        wanted = self.keys is None or "CLIP-1000" in self.keys
        return next((p for p in self.protocols.values() if wanted and p.retrieval.pool == "distractors"), None)


def _protocol(name: str) -> Protocol:
    base = name.partition("+")[0]
    if base not in PROTOCOLS:
        hint = did_you_mean(base, [*PROTOCOLS, ALL]) or f"; there are {', '.join(PROTOCOLS)}, {ALL}"
        raise UserError(f"--protocol {name}: no such protocol{hint}")
    try:
        return get_protocol(name)
    except ValueError as error:
        raise UserError(f"--protocol {name}: {error}") from None


def _keys(text: str | None) -> tuple[str, ...] | None:
    """Return the metrics that a list names: ``Alex(2)``, which a shell wants quoted, may be typed ``alex2``."""
    if text is None:
        return None
    known = {_bare(key): key for key in CARDS}
    chosen = []
    for word in (word.strip() for word in text.split(",")):
        if _bare(word) not in known:
            near = did_you_mean(_bare(word), known)
            hint = re.sub("'.+'", lambda found: f"'{known[found[0][1:-1]]}'", near) or f"; there are {', '.join(CARDS)}"
            raise UserError(f"--metrics {text}: no metric '{word}'{hint}")
        chosen.append(known[_bare(word)])
    return tuple(key for key in CARDS if key in chosen)


def _bare(key: str) -> str:
    return re.sub(r"[^a-z0-9]", "", key.lower())


def _numbers(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) >= 2 for word in words):
        raise UserError(f"--n-way {text}: expected whole numbers from 2, such as 2,50,1000")
    return tuple(sorted({int(word) for word in words}))


def check_outputs(args: argparse.Namespace) -> None:
    """Find out now, and not after an hour, that a result could not be written."""
    targets = {"--out": None if args.out in (None, "-") else Path(args.out), "--per-image": args.per_image}
    named = {option: path for option, path in targets.items() if path is not None}
    inputs = [args.recons, args.truth, args.blurry, args.ids, args.distractors, *args.subset]
    # realpath, unlike Path.resolve, has no error for a link that leads to itself: reading it has one.
    taken = {os.path.realpath(str(path).partition("::")[0]) for path in inputs if path is not None}
    if len({os.path.realpath(path) for path in named.values()}) < len(named):
        raise UserError(f"--out and --per-image both name {args.per_image}; choose two files")
    for option, path in named.items():
        if os.path.isdir(path):  # unlike Path.is_dir, no error where even looking is forbidden
            raise UserError(f"{option} {path}: a folder; name a file in it")
        if os.path.realpath(path) in taken:
            raise UserError(f"{option} {path}: would overwrite what is read; choose another file")
        _check_writable(option, path, path.parent)
    if args.cache is not None:
        folder = args.cache
        while not os.path.exists(folder) and folder != folder.parent:
            folder = folder.parent
        _check_writable("--cache", args.cache, folder)


def _check_writable(option: str, path: Path, folder: Path) -> None:
    if not os.path.isdir(folder):
        raise UserError(f"{option} {path}: no folder {folder}; make it: mkdir -p {shlex.quote(str(folder))}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{option} {path}: folder {folder} cannot be written to ({(error.strerror or str(error)).lower()}); "
            "choose another"
        ) from error
