"""Learning curves of BIT beside an MLP and a ridge: ``learning.json`` and ``learning.svg``.

Light to import; ``curves`` measures.
"""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmark.config import Variant, demo
from benchmark.errors import UserError, did_you_mean
from benchmark.progress import Progress
from benchmark.stages import variant_stages
from benchmark.store import Store, write_json, write_text

BRANCHES = {"semantic": "Semantic tokens", "lowlevel": "Low-level tokens"}
CLUSTERS = 128

NOTES = (
    "Score: Pearson correlation of an image's predicted with its true tokens, flattened; mean over each subject's "
    "validation images, then over subjects. Test images are read nowhere.",
    "BIT is trained by the variant's recipe. Each MLP sees the same batches for as many CPU seconds as BIT took, its "
    "one-cycle schedule fitted to that; its learning rate is the best of those tried on the validation images. Of both "
    "the weights with the least validation loss are kept, which flatters both alike; the ridge chooses its penalty on "
    "training images only.",
    "Predictions trained with InfoNCE are mapped linearly to the true tokens, layer by layer, each half of the "
    "validation images with the map fitted to the other half.",
    "Seconds are CPU seconds of training, validation left out; a ridge's are those of all subjects, "
    "cross-validation included.",
    "Less than all images: no external images, whose recordings an encoder that saw all images predicts. BIT's "
    "clusters (and its voxel embeddings where the recipe starts them at the encoder's) come from that encoder at every "
    "size.",
    "'mean' predicts the mean of the subject's training tokens.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand ``learning``; ``run`` takes what they are parsed to."""
    parser.add_argument(
        "--store",
        type=Path,
        default=Path("runs/store"),
        metavar="DIR",
        help="the store of a finished sweep (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the files go")
    parser.add_argument(
        "--branches", nargs="+", choices=BRANCHES, default=list(BRANCHES), help="which branches (default: both)"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="repeat with N seeds (default: %(default)s)")
    parser.add_argument(
        "--seconds-limit", type=float, metavar="S", help="cut each training to about S CPU seconds (default: no cut)"
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="threads of each training (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="one seed and few steps, to see that it works")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    learning(
        args.store,
        args.out,
        branches=args.branches,
        seeds=args.seeds,
        seconds_limit=args.seconds_limit,
        threads=args.threads,
        quick=args.quick,
    )
    return 0


def learning(
    store_root: Path,
    out: Path,
    *,
    branches: Sequence[str] = tuple(BRANCHES),
    seeds: int = 3,
    seconds_limit: float | None = None,
    threads: int = 1,
    quick: bool = False,
    variant: Variant | None = None,
) -> dict[str, Any]:
    """Measure how BIT, an MLP and a ridge learn; write ``learning.json`` and ``learning.svg`` into ``out``.

    Args:
        store_root: store of a finished sweep.
        out: folder for the two files.
        branches: of ``semantic`` and ``lowlevel``.
        seeds: of networks, batches and subsets of images: 0, 1, ...
        seconds_limit: CPU seconds that a training may take at most.
        threads: of PyTorch.
        quick: one seed and a few steps.
        variant: whose data and recipes; by default the ``demo`` preset with 128 clusters.

    Returns:
        What ``learning.json`` holds.

    Raises:
        UserError: an unknown branch, a number out of range, or a store without the stages that are needed.
    """
    for name in branches:
        if name not in BRANCHES:
            raise UserError(f"unknown branch '{name}'{did_you_mean(name, BRANCHES)}; known: {', '.join(BRANCHES)}")
    for option, value in (("seeds", seeds), ("threads", threads), ("seconds-limit", seconds_limit)):
        if value is not None and value <= 0:
            raise UserError(f"--{option} {value}: expected more than 0")
    variant = variant or demo().with_settings({"clustering.n_clusters": CLUSTERS})
    label = f"clusters={variant.clustering.n_clusters}"
    stages = variant_stages(variant, label)
    store = Store(store_root)
    wanted = {name: getattr(stages, name) for name in branches}
    for stage in wanted.values():
        for upstream in stage.upstream.values():
            if not store.is_done(upstream):
                raise UserError(
                    f"{store_root} has no result of stage {upstream.title} as this release configures it\n"
                    "type python -m benchmark.sweep clusters --out DIR and name DIR/store with --store"
                )

    import torch

    from benchmark.evidence.curves import Branch, Design, measure

    torch.set_num_threads(threads)
    design = Design(seeds=seeds, max_seconds=seconds_limit)
    if quick:
        design = Design(
            sizes=(8,),
            seeds=1,
            checkpoints=2,
            rates=(1e-3,),
            hidden=32,
            probe_steps=2,
            max_steps=6,
            max_seconds=seconds_limit,
        )
    record: dict[str, Any] = {
        "variant": label,
        "settings": {**asdict(design), "threads": threads, "quick": quick},
        "torch": str(torch.__version__),
        "machine": platform.machine(),
        "notes": list(NOTES),
        "branches": {},
    }
    for name, stage in wanted.items():
        branch = Branch(stage, store)
        runs, tried = measure(branch, design, Progress())
        record["branches"][name] = {
            "recipe": stage.config,
            "subjects": len(branch.data.subjects),
            "validation_recordings": len(branch.rows),
            "learning_rates_tried": tried,
            "summary": _summary([asdict(run) for run in runs]),
            "runs": [asdict(run) for run in runs],
        }
        print(_table(name, record["branches"][name]["summary"]), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "learning.json", record)
    write_text(out / "learning.svg", figure(record))
    print(f"{out / 'learning.json'}, {out / 'learning.svg'}")
    return record


def _summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and range over seeds for each method and number of images, the most images first."""
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for one in runs:
        groups.setdefault((-one["images"], one["method"]), []).append(one)
    return [
        {
            "method": method,
            "images": -images,
            "seeds": len(members),
            "correlation": fmean(one["correlation"] for one in members),
            "lowest": min(one["correlation"] for one in members),
            "highest": max(one["correlation"] for one in members),
            "seconds": fmean(one["seconds"] for one in members),
        }
        for (images, method), members in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def _table(name: str, summary: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{BRANCHES[name]}: correlation on validation images (lowest to highest seed), CPU seconds"]
    for row in summary:
        spread = f" ({row['lowest']:.3f} to {row['highest']:.3f})" if row["seeds"] > 1 else ""
        who = f"{row['images']:>6} images  {row['method']:<18}"
        lines.append(f"{who} {row['correlation']:.3f}{spread}  {row['seconds']:6.1f} s")
    return "\n".join(lines)


# --- the figure -------------------------------------------------------------------------------------------------------

# Colours of Okabe and Ito, told apart by every kind of colour vision; markers and dashes say the same again.
_STYLES = {
    "BIT": ("#0072B2", "", "circle"),
    "MLP": ("#D55E00", "", "square"),
    "MLP, squared error": ("#D55E00", "7 4", "square"),
    "ridge": ("#222222", "", "triangle"),
    "mean": ("#767676", "2 4", ""),
}
_WIDTH, _PANEL_HEIGHT = 1000, 370
_PANEL_WIDTH, _LEFT, _LABELS, _TOP, _BOTTOM = 500, 62, 160, 46, 52


@dataclass(frozen=True)
class _Series:
    """One method's points in a panel: x, mean, lowest and highest of the seeds."""

    method: str
    points: list[tuple[float, float, float, float]]
    across: bool = False  # a level, drawn across the panel


def figure(record: Mapping[str, Any]) -> str:
    """Draw a row for each branch: correlation against images per subject, and against CPU seconds, as SVG."""
    rows = []
    for number, (name, branch) in enumerate(record["branches"].items()):
        by_images, by_seconds = _against_images(branch), _against_seconds(branch)
        values = [value for series in (*by_images, *by_seconds) for point in series.points for value in point[1:]]
        top = math.ceil(max(*values, 0.1) * 10 + 0.2) / 10
        images = sorted({point[0] for series in by_images for point in series.points})
        longest = max(point[0] for series in by_seconds for point in series.points)
        step = 10 ** math.floor(math.log10(longest / 2)) if longest > 0 else 1.0
        step *= next(factor for factor in (1, 2, 5, 10) if longest / (step * factor) <= 6)
        seconds = [step * k for k in range(int(longest / step) + 1)]
        title, y = BRANCHES[name], number * _PANEL_HEIGHT
        rows.append(_panel(0, y, title, "training images per subject", by_images, images, math.log, top))
        rows.append(_panel(_PANEL_WIDTH, y, title, "CPU seconds of training", by_seconds, seconds, float, top))
    height = len(rows) // 2 * _PANEL_HEIGHT
    spoken = "Correlation of predicted with true tokens on validation images, mean over subjects, of BIT, MLP and ridge"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" font-family="Helvetica, Arial, sans-serif" font-size="14" fill="#222222">\n'
        f'<title>{escape(spoken)}</title>\n<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>\n'
        + "".join(rows)
        + "</svg>\n"
    )


def _against_images(branch: Mapping[str, Any]) -> list[_Series]:
    series = []
    for method in _STYLES:
        rows = sorted((row for row in branch["summary"] if row["method"] == method), key=lambda row: row["images"])
        if method == "mean":
            rows = rows[-1:]
        points = [(row["images"], row["correlation"], row["lowest"], row["highest"]) for row in rows]
        if points:
            series.append(_Series(method, points, across=method == "mean"))
    return series


def _against_seconds(branch: Mapping[str, Any]) -> list[_Series]:
    """Return the methods on all images: networks by their validations, the others by their one result."""
    most = max(row["images"] for row in branch["summary"])
    series = []
    for method in _STYLES:
        runs = [one for one in branch["runs"] if one["method"] == method and one["images"] == most]
        points = []
        if runs and runs[0]["curve"]:
            for entries in zip(*(one["curve"] for one in runs), strict=False):
                found = [entry["correlation"] for entry in entries]
                points.append((fmean(entry["seconds"] for entry in entries), fmean(found), min(found), max(found)))
        elif runs:
            found = [one["correlation"] for one in runs]
            points.append((runs[0]["seconds"], fmean(found), min(found), max(found)))
        if points:
            series.append(_Series(method, points, across=method in ("mean", "ridge")))
    return series


def _panel(
    x0: float,
    y0: float,
    title: str,
    x_title: str,
    series: Sequence[_Series],
    ticks: Sequence[float],
    scale: Callable[[float], float],
    top: float,
) -> str:
    """Draw one panel with its corner at (x0, y0); methods are named at the right end of their lines."""
    left, right = x0 + _LEFT, x0 + _PANEL_WIDTH - _LABELS
    upper, lower = y0 + _TOP, y0 + _PANEL_HEIGHT - _BOTTOM
    ends = [scale(value) for value in (*ticks, *(point[0] for one in series for point in one.points))]
    first, last = min(ends), max(ends)

    def x(value: float) -> float:
        return left + 8 + (right - left - 16) * ((scale(value) - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return lower - (lower - upper) * max(value, 0.0) / top

    parts = [f'<text x="{left}" y="{y0 + 26}" font-size="16" font-weight="bold">{escape(title)}</text>']
    for k in range(round(top * 10) + 1):
        parts.append(f'<path d="M{left} {y(k / 10):.1f}H{right}" stroke="#e2e2e2"/>')
        parts.append(f'<text x="{left - 8}" y="{y(k / 10) + 5:.1f}" text-anchor="end">{k / 10:.1f}</text>')
    for tick in ticks:
        parts.append(f'<path d="M{x(tick):.1f} {lower}v5" stroke="#888888"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{lower + 20}" text-anchor="middle">{tick:g}</text>')
    middle = (upper + lower) / 2
    parts.append(f'<text x="{(left + right) / 2}" y="{lower + 42}" text-anchor="middle">{escape(x_title)}</text>')
    turn = f'transform="rotate(-90 {x0 + 18} {middle})"'
    parts.append(f'<text x="{x0 + 18}" y="{middle}" text-anchor="middle" {turn}>correlation</text>')
    for one in series:
        colour, dash, marker = _STYLES[one.method]
        line = f'stroke="{colour}" stroke-width="2.2" fill="none"' + (f' stroke-dasharray="{dash}"' if dash else "")
        if one.across:
            parts.append(f'<path d="M{left} {y(one.points[-1][1]):.1f}H{right}" {line} opacity="0.6"/>')
        else:
            path = "L".join(f"{x(point[0]):.1f} {y(point[1]):.1f}" for point in one.points)
            parts.append(f'<path d="M{path}" {line}/>')
        for at, mean, low, high in one.points:
            if high > low:
                parts.append(
                    f'<path d="M{x(at):.1f} {y(low):.1f}V{y(high):.1f}" stroke="{colour}" stroke-width="1.2"/>'
                )
            parts.append(_marker(marker, x(at), y(mean), "#ffffff" if dash else colour, colour))
    names = sorted(((y(one.points[-1][1]), one.method) for one in series), key=lambda name: name[0])
    below = upper - 18.0
    for level, method in names:
        below = max(level, below + 17)
        level_mean = next(one.points[-1][1] for one in series if one.method == method)
        text = f"{escape(method)} {level_mean:.2f}"
        parts.append(
            f'<text x="{right + 6}" y="{below + 5:.1f}" fill="{_STYLES[method][0]}" font-size="13">{text}</text>'
        )
    return "\n".join(parts) + "\n"


def _marker(shape: str, x: float, y: float, fill: str, stroke: str) -> str:
    paint = f'fill="{fill}" stroke="{stroke}" stroke-width="1.5"'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {paint}/>'
    if shape == "square":
        return f'<rect x="{x - 3.6:.1f}" y="{y - 3.6:.1f}" width="7.2" height="7.2" {paint}/>'
    if shape == "triangle":
        return f'<path d="M{x:.1f} {y - 5:.1f}l4.8 8.4h-9.6z" {paint}/>'
    return ""
