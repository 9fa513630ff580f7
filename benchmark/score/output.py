"""What a scoring leaves behind: a table on the terminal, ``scores.json``, and every image's scores as Parquet."""

from __future__ import annotations

import argparse
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from benchmark.errors import RunError
from benchmark.imagesets.wording import place, reason
from benchmark.manifest import surroundings
from benchmark.score.options import Job
from benchmark.score.scoring import Result
from benchmark.score.tables import print_comparison, print_result
from benchmark.score.work import Work
from leaderboard.results import PROTOCOLS
from leaderboard.schema import write_atomically


def show(args: argparse.Namespace, job: Job, results: Mapping[str, Result]) -> None:
    """Print the table: to stderr where ``--out -`` claims stdout."""
    console = Console(stderr=args.out == "-", highlight=False)
    if job.every:
        print_comparison(results, job.notes, console)
    else:
        print_result(next(iter(results.values())), console)


def write(args: argparse.Namespace, job: Job, work: Work, arguments: Sequence[str]) -> None:
    """Write the files that were asked for, each whole or not at all.

    Raises:
        RunError: the disk is full, or the like.
    """
    written = []
    if args.per_image is not None:
        buffer = io.BytesIO()
        table = pa.concat_tables([result.per_image for result in work.results.values()])
        pq.write_table(table.replace_schema_metadata({PROTOCOLS: json.dumps(_protocols(job, work.results))}), buffer)
        written.append(_write(args.per_image, buffer.getvalue()))
    if args.out is not None:
        text = json.dumps(_content(args, job, work, arguments), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        if args.out == "-":
            print(text, end="")
        else:
            written.append(_write(Path(args.out), text.encode()))
    if written:
        Console(stderr=args.out == "-", highlight=False).print(f"written: {', '.join(written)}", markup=False)


def _protocols(job: Job, results: Mapping[str, Result]) -> dict[str, dict[str, str]]:
    """Return variant -> how its scores were made, for the metadata of the Parquet: scores outlive what lies beside."""
    return {
        name if job.every else "": {"protocol": name, "protocol_hash": result.overall.protocol_hash}
        for name, result in results.items()
    }


def _content(args: argparse.Namespace, job: Job, work: Work, arguments: Sequence[str]) -> dict[str, Any]:
    around = surroundings(shlex.join(["python", "-m", "benchmark.score", *arguments]))

    def one(result: Result) -> dict[str, Any]:
        seeds = {"intervals and shuffling": args.seed}
        return result.as_json({**around, "seeds": seeds, "data": work.data, "weights": result.digests})

    if not job.every:
        return one(next(iter(work.results.values())))
    return {"protocols": {name: one(result) for name, result in work.results.items()}, "notes": list(job.notes)}


def _write(path: Path, content: bytes) -> str:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise RunError(f"{place(path)}: cannot be written ({reason(error)})") from error
    return place(path)
