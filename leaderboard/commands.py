"""What ``python -m leaderboard`` does."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from leaderboard import formats
from leaderboard.published import PublishedRow, read_published
from leaderboard.ranking import group, rank
from leaderboard.results import RESULTS, Result, find, read_results, write_result
from leaderboard.schema import Interval, Manifest, Row, row_id, write_leaderboard
from leaderboard.site import Chapter, build_report
from leaderboard.statistics import Scores, compare, joined, scores
from leaderboard.table import markdown, print_table
from metrics.cards import CARDS

DEFAULT = Path("runs")


def show(args: argparse.Namespace) -> None:
    """Print own rows in one table for each track and protocol hash, and published rows in one for each protocol."""
    paths = args.paths
    if not paths and not args.published and (DEFAULT / "leaderboard").is_dir():
        paths = [DEFAULT]
    rankings = [
        rank([result.row for result in results], per_image(results))
        for results in groups(gather(paths))
        if _wanted(results[0].row.protocol, args.protocol) and _wanted(results[0].row.track, args.track)
    ]
    printed = []
    if args.published or not paths:
        printed = [
            row
            for row in read_published()
            if _wanted(row.protocol or "unknown", args.protocol)
            and _wanted(row.data, args.data)
            and _wanted("paper", args.track)
            and (row.metrics or row.evidence == "not_read")
        ]
    if not rankings and not printed:
        options = ("protocol", "track", "data")
        chosen = ", ".join(f"--{name} {getattr(args, name)}" for name in options if getattr(args, name))
        told = f" with {chosen}" if chosen else ""
        raise ValueError(f"no rows{told}; see them all: python -m leaderboard show --published")
    if args.format == "json":
        print(formats.as_json(rankings, printed))
    elif args.format == "csv":
        sys.stdout.write(formats.as_csv(rankings, printed))
    elif args.format == "latex":
        print(formats.as_latex(rankings, printed))
    elif args.format == "markdown":
        print("\n".join([*map(markdown, rankings), *([formats.published_markdown(printed)] if printed else [])]))
    else:
        for ranking in rankings:
            print_table(ranking)
            print()
        formats.print_published(printed)


def build(args: argparse.Namespace) -> None:
    """Gather rows with their scores into ``--out``: one site, with a table for each track and protocol hash."""
    found = groups(gather(args.paths))
    chapters = []
    for results in found:
        for result in results:
            write_result(args.out / RESULTS, result.row, result.per_image())
        row, data = results[0].row, per_image(results)
        ranking = rank([result.row for result in results], data)
        title = f"{row.track} track, protocol {row.protocol} ({row.protocol_hash[:8]})"
        chapters.append(Chapter(ranking, args.title if len(found) == 1 else title, per_image=data))
    about = "Rows of different tracks or protocols are never ranked together: each has a table of its own."
    page = build_report(args.out, chapters, title=args.title, about=about)
    write_leaderboard(args.out / "leaderboard.json", (row for chapter in chapters for row in chapter.ranking.rows))
    for chapter in chapters:
        ranking = chapter.ranking
        print(
            f"{page}: {len(ranking.rows)} rows of the {ranking.track} track, protocol {ranking.protocol} "
            f"({ranking.protocol_hash[:8]})"
        )


def compare_rows(args: argparse.Namespace) -> None:
    """Print A minus B on every metric that both have, with interval and test."""
    results = gather(args.paths or [DEFAULT]) if not all(Path(name).is_file() for name in (args.a, args.b)) else []
    a, b = (read_results(Path(name))[0] if Path(name).is_file() else find(results, name) for name in (args.a, args.b))
    refuse_unlike(a.row, b.row)
    tables = []
    for result in (a, b):
        table = result.per_image()
        if table is None:
            raise ValueError(
                f"{result.id} has no per-image scores beside it; score it again with --per-image and add it"
            )
        tables.append(table)
    import pyarrow as pa

    found = compare(pa.concat_tables([t.replace_schema_metadata() for t in tables]), a.row.key, b.row.key)
    if args.format == "json":
        print(json.dumps({"a": a.id, "b": b.id, "metrics": {k: asdict(v) for k, v in found.items()}}, indent=2))
        return
    formats.print_comparison(a, b, found)


def add(args: argparse.Namespace) -> None:
    """Check rows from elsewhere, keep them in ``--to``, and say what they are comparable with."""
    incoming = _incoming(args)
    there = read_results(args.to) if (args.to / RESULTS).is_dir() else []
    for result in incoming:
        table = result.per_image()
        if table is not None:
            _same_means(result.row, table)
        path = write_result(args.to / RESULTS, result.row, table)
        print(f"{path}: {result.row.method} {result.row.variant}".rstrip())
    for line in comparable_with(incoming[0].row, [result.row for result in there]):
        print(line)


def gather(paths: Sequence[Path]) -> list[Result]:
    """Return the results of all paths, each row once.

    Raises:
        ValueError: a path has none, or two rows of one identity differ.
    """
    found: dict[str, Result] = {}
    for path in paths:
        for result in read_results(path):
            other = found.get(result.id)
            if other is not None and other.row.metrics != result.row.metrics:
                raise ValueError(
                    f"two rows are {result.id}, with different numbers ({path} has one of them); leave one out"
                )
            if other is None or other.scores is None:
                found[result.id] = result
    return list(found.values())


def groups(results: Sequence[Result]) -> list[list[Result]]:
    """Sort results into those that may be ranked together."""
    by_id = {result.id: result for result in results}
    return [[by_id[row_id(row)] for row in rows] for rows in group([result.row for result in results]).values()]


def per_image(results: Sequence[Result]) -> Scores | None:
    """Return the scores of all results of one track that have some; None where none has."""

    def read(result: Result) -> Scores | None:
        table = result.per_image()
        return None if table is None else scores(table, result.row.track)

    with ThreadPoolExecutor(4) as threads:  # reading and sorting let others run
        parts = [part for part in threads.map(read, results) if part is not None]
    return joined(parts) if parts else None


def refuse_unlike(a: Row, b: Row) -> None:
    """Do nothing where two rows may be compared.

    Raises:
        ValueError: they are of different tracks or protocol hashes; says which.
    """
    if a.track != b.track:
        raise ValueError(
            f"{row_id(a)} is of the {a.track} track, {row_id(b)} of the {b.track} track: they never compare"
        )
    if a.protocol_hash != b.protocol_hash:
        names = f"{a.protocol} ({a.protocol_hash[:8]}) and {b.protocol} ({b.protocol_hash[:8]})"
        raise ValueError(f"scored differently, under {names}: score both under one protocol, on the same images")


def comparable_with(row: Row, others: Sequence[Row]) -> list[str]:
    """Say in a line or two with which other rows, own and published, a row may be compared."""
    same = [other for other in others if (other.track, other.protocol_hash) == (row.track, row.protocol_hash)]
    lines = [
        f"comparable image by image with {len(same)} of the {len(others)} rows that were there "
        f"(same track and protocol hash {row.protocol_hash[:8]})"
    ]
    if row.track != "paper":
        lines.append(f"with no published row: it is of the {row.track} track")
        return lines
    printed = [one for one in read_published() if one.protocol == row.protocol and one.metrics]
    near = [one for one in printed if one.subjects == row.subjects and one.test_images == row.n_images]
    if near:
        lines.append(f"with {len(near)} published rows, of the same subjects and number of images: {_few(near)}")
    else:
        lines.append(
            f"with no published row as it is: protocol {row.protocol} was printed for "
            f"{', '.join(sorted({_population(one) for one in printed})) or 'no row'}; this row is of "
            f"subjects {', '.join(map(str, row.subjects))} and {row.n_images} images"
        )
    return lines


def _few(rows: Sequence[PublishedRow]) -> str:
    names = [row.id for row in rows]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _population(row: PublishedRow) -> str:
    subjects = "unstated subjects" if row.subjects is None else f"subjects {'+'.join(map(str, row.subjects))}"
    return f"{subjects} on {row.test_images or 'an unstated number of'} images"


def _incoming(args: argparse.Namespace) -> list[Result]:
    source = args.source
    if source.is_file() and source.name != "leaderboard.json":
        try:
            data = json.loads(source.read_bytes())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{source}: not JSON ({error}); expected scores.json of python -m benchmark.score"
            ) from error
        if isinstance(data, dict) and "schema_version" not in data:
            return [_from_scores(data, args)]
    if args.method or args.variant or args.per_image or args.data:
        raise ValueError("--method, --variant, --data and --per-image are for a scores.json; rows of a run have theirs")
    return [result for result in read_results(source) if result.row.kind == "method"]


def _from_scores(data: Mapping[str, Any], args: argparse.Namespace) -> Result:
    """Make a row of what ``python -m benchmark.score`` wrote."""
    source = args.source
    missing = [key for key in ("protocol", "protocol_hash", "n_images", "metrics", "track") if key not in data]
    if missing:
        raise ValueError(f"{source}: lacks {', '.join(missing)}; expected scores.json of python -m benchmark.score")
    if not args.method:
        raise ValueError(f"{source}: whose scores are these? name the method with --method NAME")
    try:
        made = data.get("manifest") or {}
        subjects = tuple(sorted(int(subject) for subject in data.get("subjects") or {1: None}))
        git = made.get("git") or {}
        row = Row(
            method=args.method,
            variant=args.variant,
            track=data["track"],
            protocol=data["protocol"],
            protocol_hash=data["protocol_hash"],
            subjects=subjects,
            n_images=data["n_images"],
            metrics={key: Interval.model_validate(value) for key, value in data["metrics"].items()},
            manifest=Manifest(
                git=(git.get("revision") or "") + ("+dirty" if git.get("dirty") else "") or None,
                packages=made.get("packages") or {},
                hardware={key: str(value) for key, value in (made.get("hardware") or {}).items()},
                seeds=made.get("seeds") or {},
                data=made.get("data") or {},
                weights=made.get("weights") or {},
            ),
            source=args.origin or str(source),
            notes="; ".join(data.get("notes") or ()),
            data=args.data,
            judges=data.get("judges") or {},
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: not the scores of python -m benchmark.score ({_first_line(error)})") from error
    if args.per_image is None:
        return Result(row)
    if not args.per_image.is_file():
        raise ValueError(f"{args.per_image}: no such file")
    return _Renamed(row, args.per_image)


class _Renamed(Result):
    """A row whose scores stand in their file under another name: that of the folder that was scored."""

    def per_image(self) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        assert self.scores is not None
        try:
            table = pq.read_table(self.scores)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{self.scores}: not a Parquet file of scores ({error})") from error
        keys = [name for name in ("method", "variant") if name in table.column_names]
        if len(keys) < 2:
            raise ValueError(f"{self.scores}: lacks the columns method and variant; expected one of benchmark.score")
        own = table.filter(pc.not_equal(table["method"], "reference"))
        names = sorted(set(zip(own["method"].to_pylist(), own["variant"].to_pylist(), strict=True)))
        if len(names) != 1:
            raise ValueError(f"{self.scores}: scores of {len(names)} rows; expected one")
        for column, value in zip(keys, self.row.key, strict=True):
            own = own.set_column(own.column_names.index(column), column, pa.array([value] * len(own), pa.string()))
        return own


def _same_means(row: Row, table: Any) -> None:
    """Refuse scores that are not those of the row."""
    data = scores(table, row.track)
    import numpy as np

    for key, interval in row.metrics.items():
        if key not in data.metrics:
            continue
        mean = float(np.nanmean(data.values[data.row(row.key), data.metrics.index(key)]))
        if abs(mean - interval.mean) > 1e-6:
            raise ValueError(
                f"{key} is {CARDS[key].format(interval.mean)} in the row, and {CARDS[key].format(mean)} in its "
                "per-image scores: they are of different runs"
            )


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, "))))
    return str(error).strip().splitlines()[0]


def _wanted(value: str, chosen: str | None) -> bool:
    return chosen is None or value == chosen
