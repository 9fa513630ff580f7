"""``python -m benchmark.networks fetch DIR`` gets the papers' weights files; ``list`` says what there is of them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark.cli import Parser, main_guard
from benchmark.errors import RunError, UserError
from benchmark.weights import (
    DOWNLOADS,
    FOLDER_VARIABLE,
    chosen_downloads,
    file_digest,
    missing_weights,
    weights_file,
    weights_folder,
)

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_GROUP = "scoring"


def build_parser() -> Parser:
    """Return the command line's parser; it imports nothing heavy."""
    parser = Parser(prog="python -m benchmark.networks", description="Weights files of the papers' networks.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    folder = f"folder of weights files (default: ${FOLDER_VARIABLE}, else ~/.cache/brain-it-bench/weights)"
    show = commands.add_parser(
        "list",
        help="networks, files, sizes, licences, sources, and which files DIR has",
        description="Print the networks that are read from files, with sizes, licences and sources, and compare the "
        "files in DIR with the published ones.",
    )
    show.add_argument("directory", metavar="DIR", type=Path, nargs="?", help=folder)
    fetch = commands.add_parser(
        "fetch",
        help="download weights files into DIR and check them",
        description="Download what DIR lacks from the publishers' servers, and check the SHA-256 of each file. A "
        "download that was cut goes on from there when the same command is typed again.",
    )
    fetch.add_argument("directory", metavar="DIR", type=Path, nargs="?", help=folder)
    fetch.add_argument(
        "--only",
        metavar="NAMES",
        default=DEFAULT_GROUP,
        help="networks or groups of networks, separated by commas (default: %(default)s)",
    )
    return parser


def state_of(name: str, folder: Path) -> tuple[str, str]:
    """Return the state of a network's file and its SHA-256 ("" where it is missing).

    ``present``: the published file; ``present, unchecked``: no SHA-256 of it is published; ``wrong``: another file,
    which may still hold the network's weights in another form.
    """
    if missing_weights([name], folder):
        part = folder / f"{DOWNLOADS[name].file}.part"
        return (f"missing, {part.stat().st_size / 1e6:.0f} MB of it there" if part.is_file() else "missing"), ""
    digest = file_digest(weights_file(name, folder))
    states = {True: "present", False: "wrong (not the published file)", None: "present, unchecked"}
    return states[DOWNLOADS[name].is_published(digest)], digest


def weights_table(folder: Path) -> Table:
    """Return one row a network: file, size, licence, published SHA-256, and the state of the file in ``folder``."""
    from rich.table import Table

    from benchmark.progress import Progress

    with Progress().bar("SHA-256 of the files", total=len(DOWNLOADS)) as bar:
        states = {}
        for name in DOWNLOADS:
            states[name] = state_of(name, folder)
            bar.advance()
    table = Table(title=f"Weights files in {folder}", title_justify="left")
    for heading in ("network", "file", "MB", "licence", "published SHA-256", "state"):
        table.add_column(heading, justify="right" if heading == "MB" else "left", overflow="fold")
    for name, download in DOWNLOADS.items():
        state, digest = states[name]
        table.add_row(
            name,
            download.file,
            f"{download.megabytes:.1f}",
            download.licence,
            f"{download.sha256[:12]}..." if download.sha256 else "none",
            f"{state}, {digest[:12]}..." if digest else state,
        )
    return table


def show(folder: Path) -> int:
    """Print the table and the sources, and what to type where files are missing."""
    from rich.console import Console

    # A pipe has no width, and a table folded to 80 columns cannot be read.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(weights_table(folder))
    for name, download in DOWNLOADS.items():
        print(f"{name} ({download.group}): {download.title}\n  {download.url}")
    if missing := missing_weights(chosen_downloads(DEFAULT_GROUP), folder):
        print(f"next: python -m benchmark.networks fetch {shlex.quote(str(folder))} --only {','.join(missing)}")
    return 0


def fetch_all(names: Sequence[str], folder: Path) -> int:
    """Download the files of ``names``; a file that its server refuses does not keep the others from coming.

    Raises:
        RunError: one was not had; the message is that of the first.
    """
    from benchmark.networks.fetch import UnreachableError, fetch
    from benchmark.progress import Progress

    problems: list[RunError] = []
    progress = Progress()
    for name in names:
        download = DOWNLOADS[name]
        if download.by_hand and not (folder / download.file).exists():
            problems.append(RunError(f"{download.file}: save it by hand from {download.url} into {folder}"))
            print(f"  not had: {problems[-1]}", flush=True)
            continue
        print(f"{download.file}: {download.title}, {download.megabytes:.1f} MB, {download.licence}", flush=True)
        print(f"  from {download.url}", flush=True)
        try:
            digest = fetch(download, folder, progress)
        except UnreachableError:
            raise
        except RunError as error:
            problems.append(error)
            print(f"  not had: {str(error).partition(chr(10))[0]}", flush=True)
            continue
        checked = {True: "as published", None: "none is published to compare with"}[download.is_published(digest)]
        print(f"  {folder / download.file}: SHA-256 {digest} ({checked})", flush=True)
    if problems:
        more = f"{len(problems)} of {len(names)} files were not had; the first: " if len(problems) > 1 else ""
        raise RunError(f"{more}{problems[0]}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = build_parser().parse_args(argv)
    folder = weights_folder(args.directory)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name the folder of the weights files")
    if args.command == "list":
        return show(folder)
    return fetch_all(chosen_downloads(args.only), folder)


if __name__ == "__main__":
    sys.exit(main_guard(main))
