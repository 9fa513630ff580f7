"""Scores as tables for the terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from benchmark.imagesets.wording import one_line
from benchmark.score.scoring import RANDOM, Block, Metrics, Result
from leaderboard.schema import Interval
from leaderboard.table import PLAIN_WIDTH, bounds
from metrics.cards import CARDS, MISSING, format_value

INTERVALS = {
    1: "95 % intervals: BCa bootstrap over images.",
    2: "95 % intervals: bootstrap over subjects and images.",
}
_CALIBRATION = {
    "shuffled": "reconstructions dealt to wrong images (chance)",
    "mean image": "the mean of the truths every time",
    "truth": "the truths themselves, resized as reconstructions are (ceiling)",
}


def print_result(result: Result, console: Console) -> None:
    """Print one protocol's scores, what to hold them against, and what a reader must know."""
    _print(console, _result_parts(result, _width(console)))


def print_comparison(results: Mapping[str, Result], notes: Sequence[str], console: Console) -> None:
    """Print the same reconstructions under several protocols, and how far the numbers move."""
    _print(console, _comparison_parts(results, notes, _width(console)))


def _print(console: Console, parts: Iterator[RenderableType]) -> None:
    """Print: styled on a terminal, plain text of :data:`PLAIN_WIDTH` columns anywhere else."""
    if console.is_terminal:
        for part in parts:
            console.print(part, markup=False)
        return
    plain = Console(file=io.StringIO(), width=PLAIN_WIDTH, highlight=False, no_color=True)
    for part in parts:
        plain.print(part, markup=False, soft_wrap=isinstance(part, Text))
    assert isinstance(plain.file, io.StringIO)
    for line in plain.file.getvalue().splitlines():
        print(line.rstrip(), file=console.file)


def _width(console: Console) -> int:
    return console.width if console.is_terminal else PLAIN_WIDTH


def _result_parts(result: Result, width: int) -> Iterator[RenderableType]:
    yield from _warning([result])
    yield Text(heading(result), style="bold")
    yield Text()
    yield _main_table(result)
    for title, columns in _others(result):
        yield Text()
        yield Text(title, style="italic")
        names = list(columns)
        room = max(1, (width - 14) // 25)
        for start in range(0, len(names), room):
            yield _columns({name: columns[name] for name in names[start : start + room]})
    yield Text()
    for name in result.calibration:
        yield Text(f"{name}: {_CALIBRATION.get(name, name)}", style="dim")
    yield Text(INTERVALS[min(2, max(1, len(result.overall.by_subject)))], style="dim")
    if result.overall.candidates is not None:
        yield Text(f"CLIP-1000: top-1 among {result.overall.candidates} images", style="dim")
    extra = [key for key in result.overall.metrics if key in result.protocol.extra]
    if extra:
        yield Text(f"{', '.join(extra)}: not in that publication; computed with its preparation", style="dim")
    for note in result.notes:
        yield Text(f"note: {one_line(note, 1000)}")


def heading(result: Result) -> str:
    """Return one line: protocol, track, how many images and subjects."""
    block = result.overall
    subjects = len(block.by_subject) or 1
    return (
        f"protocol {result.protocol.name} ({block.protocol_hash[:8]}), {result.track} track, "
        f"{block.n_images} images{f' of each of {subjects} subjects' if subjects > 1 else ''}"
    )


def _warning(results: Sequence[Result]) -> Iterator[RenderableType]:
    if any(result.track == RANDOM for result in results):
        yield Text("RANDOM WEIGHTS: a dry run. Metrics that take a network mean nothing here.", style="bold red")


def _main_table(result: Result) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("95 %", no_wrap=True)
    for name in result.calibration:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what it is", style="dim", overflow="fold")
    for key, value in result.overall.metrics.items():
        table.add_row(
            f"{key} {CARDS[key].arrow}",
            Text(shown(key, value), style="bold"),
            "" if value is None else bounds(key, value),
            *(shown(key, metrics.get(key)) for metrics in result.calibration.values()),
            result.protocol.describe(key),
        )
    return table


def shown(key: str, value: Interval | None) -> str:
    """Return a mean as the field prints it."""
    return MISSING if value is None else format_value(key, value.mean)


def _others(result: Result) -> Iterator[tuple[str, dict[str, Metrics]]]:
    """Yield what stands beside the main table: title, and the columns by name."""
    for name, block in result.subsets.items():
        yield _subset_title(name, block), {"value": block.metrics}
    if len(result.overall.by_subject) > 1:
        yield "by subject", {f"subject {number}": own for number, own in result.overall.by_subject.items()}
    if result.overall.n_way:
        yield "identified among n images", {f"{n}-way": own for n, own in result.overall.n_way.items()}


def _subset_title(name: str, block: Block) -> str:
    return f"subset {one_line(name, 60)} ({block.protocol_hash[:8]}): {block.n_images} images, from the same pass"


def _columns(columns: Mapping[str, Metrics]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("metric", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
        table.add_column("95 %", no_wrap=True, style="dim")
    for key in next(iter(columns.values())):
        cells = []
        for metrics in columns.values():
            value = metrics.get(key)
            cells += [shown(key, value), "" if value is None else bounds(key, value)]
        table.add_row(f"{key} {CARDS[key].arrow}", *cells)
    return table


def _comparison_parts(results: Mapping[str, Result], notes: Sequence[str], width: int) -> Iterator[RenderableType]:
    yield from _warning(list(results.values()))
    first = next(iter(results.values()))
    yield Text(f"the same {first.overall.n_images} images under {len(results)} protocols", style="bold")
    keys = list(first.overall.metrics)
    lead = max(len(name) for name in (*results, "largest - smallest")) + 2 + 8 + 5
    room = max(1, (width - lead) // 9)
    for start in range(0, len(keys), room):
        yield Text()
        yield _comparison_table(results, keys[start : start + room])
    yield Text()
    yield Text(
        "images, px: how many images, and reconstructions of which size, a protocol was published with", style="dim"
    )
    told: dict[str, list[str]] = {}
    for name, result in results.items():
        for note in result.notes:
            if note not in result.unlike:
                told.setdefault(note, []).append(name)
    for note in notes:
        yield Text(f"note: {one_line(note, 1000)}")
    for note, names in told.items():
        where = "" if len(names) == len(results) else f"{', '.join(names)}: "
        yield Text(f"note: {where}{one_line(note, 1000)}")
    yield Text("Scores under different protocols are never ranked together: these differences are the protocols' own.")


def _comparison_table(results: Mapping[str, Result], keys: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("protocol", no_wrap=True)
    for title in ("images", "px", *(f"{key}\n{CARDS[key].arrow}" for key in keys)):
        table.add_column(title, justify="right", no_wrap=True)
    for name, result in results.items():
        published = (result.protocol.n_images, result.protocol.recon_size)
        cells = (shown(key, result.overall.metrics.get(key)) for key in keys)
        table.add_row(name, *(str(number or MISSING) for number in published), *cells)
    table.add_row()
    means = {key: _means(results, key) for key in keys}
    movements = {
        "smallest": lambda values: min(values),
        "largest": lambda values: max(values),
        "largest - smallest": lambda values: max(values) - min(values),
    }
    for title, movement in movements.items():
        cells = (format_value(key, movement(means[key])) if means[key] else MISSING for key in keys)
        table.add_row(title, "", "", *cells, style="bold" if "-" in title else "dim")
    return table


def _means(results: Mapping[str, Result], key: str) -> list[float]:
    found = (result.overall.metrics.get(key) for result in results.values())
    return [value.mean for value in found if value is not None]
