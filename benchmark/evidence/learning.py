"""Learning curves of BIT beside an MLP and a ridge: ``learning.json`` and ``learning.svg``.

Light to import; ``curves`` measures.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmark.config import Variant, demo
from benchmark.errors import UserError, did_you_mean
from benchmark.graph import Stage, canonical_json
from benchmark.progress import Progress
from benchmark.stages import variant_stages
from benchmark.store import Store, read_json, write_json, write_text

if TYPE_CHECKING:
    from benchmark.evidence.curves import Findings

BRANCHES = {"semantic": "Semantic tokens", "lowlevel": "Low-level tokens"}
CLUSTERS = 128
SIZES = (40, 80, 160)
VERSION = 1  # of the measurement: to raise it makes runs that are there already be repeated

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
    "cross-validation included. They leave out the encoder that BIT's clusters and first embeddings come from: "
    "encoder_seconds are its CPU seconds, validation included, where they are known. One encoder serves both branches. "
    "'MLP, equal time with the encoder counted' is one more MLP on all images, with the first seed and the learning "
    "rate that was chosen, given BIT's seconds and the encoder's.",
    "Less than all images: drawn at random for each seed, the larger sets containing the smaller. BIT's encoder is "
    "then trained anew on these alone (by the sweep's recipe, its weights chosen on the validation images) and the "
    "voxels are clustered by it. No external images, for there the sweep's encoder, which saw all images, predicts "
    "the recordings; on all images BIT and MLP see the same external ones.",
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
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="where the files go; runs that learning.json there holds already are not repeated",
    )
    parser.add_argument(
        "--branches", nargs="+", choices=BRANCHES, default=list(BRANCHES), help="which branches (default: both)"
    )
    parser.add_argument(
        "--sizes",
        type=_sizes,
        default=SIZES,
        metavar="N,N,...",
        help=f"training images per subject, beside all of them (default: {','.join(map(str, SIZES))})",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="repeat with N seeds (default: %(default)s)")
    parser.add_argument(
        "--seconds-limit", type=float, metavar="S", help="cut each BIT and MLP to about S CPU seconds (default: no cut)"
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="threads of each training (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="one seed, one small size and few steps: does it work?")


def _sizes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected whole numbers from 1 with commas between, not '{text}'")
    return tuple(map(int, parts))


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    learning(
        args.store,
        args.out,
        branches=args.branches,
        sizes=args.sizes,
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
    sizes: Sequence[int] = SIZES,
    seeds: int = 3,
    seconds_limit: float | None = None,
    threads: int = 1,
    quick: bool = False,
    variant: Variant | None = None,
) -> dict[str, Any]:
    """Measure how BIT, an MLP and a ridge learn; write ``learning.json`` and ``learning.svg`` into ``out``.

    ``learning.json`` is written after each run. Runs of the same stages and settings that it holds already are kept and
    not repeated, nor is a branch lost that is not measured this time.

    Args:
        store_root: store of a finished sweep.
        out: folder for the two files.
        branches: of ``semantic`` and ``lowlevel``.
        sizes: training images per subject, beside all of them.
        seeds: of networks, batches and subsets of images: 0, 1, ...
        seconds_limit: CPU seconds that a training may take at most.
        threads: of PyTorch.
        quick: one seed, one small size and a few steps.
        variant: whose data and recipes; by default the ``demo`` preset with 128 clusters.

    Returns:
        What ``learning.json`` holds.

    Raises:
        UserError: an unknown branch, a number out of range, or a store without the stages that are needed.
    """
    for name in branches:
        if name not in BRANCHES:
            raise UserError(f"unknown branch '{name}'{did_you_mean(name, BRANCHES)}; known: {', '.join(BRANCHES)}")
    for option, value in (
        ("seeds", seeds),
        ("sizes", min(sizes, default=None)),
        ("threads", threads),
        ("seconds-limit", seconds_limit),
    ):
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

    from benchmark.evidence.curves import Bases, Branch, Design, Findings, Run, measure

    torch.set_num_threads(threads)
    design = Design(sizes=tuple(sizes), seeds=seeds, max_seconds=seconds_limit)
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
    # Which sizes and seeds there are says each run.
    settings = {key: value for key, value in asdict(design).items() if key not in ("sizes", "seeds")}
    settings |= {"threads": threads, "torch": str(torch.__version__), "version": VERSION}
    path = out / "learning.json"
    known = _known_branches(path, {name: _fingerprint(getattr(stages, name), settings) for name in BRANCHES})
    measured = {name: Branch(stage, store) for name, stage in wanted.items()}
    findings = {
        name: Findings(**{key: [Run(**one) for one in known.get(name, {}).get(key, [])] for key in ("runs", "trials")})
        for name in wanted
    }

    def record() -> dict[str, Any]:
        blocks = {
            name: {
                "fingerprint": _fingerprint(stage, settings),
                "recipe": stage.config,
                "encoder_recipe": stage.upstream["encoder"].config,
                "subjects": len(measured[name].data.subjects),
                "validation_recordings": len(measured[name].rows),
                **_results(findings[name]),
            }
            for name, stage in wanted.items()
        }
        return {
            "variant": label,
            "settings": settings,
            "machine": platform.machine(),
            "notes": list(NOTES),
            "branches": {name: (known | blocks)[name] for name in BRANCHES if name in known | blocks},
        }

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        bases = Bases(next(iter(wanted.values())), store, Path(folder), design, Progress())
        measure(measured, bases, design, Progress(), findings, lambda: write_json(path, record()))
    result = record()
    write_json(path, result)
    write_text(out / "learning.svg", figure(result))
    for name, block in result["branches"].items():
        print(_table(name, block["summary"]))
    print(f"{path}, {out / 'learning.svg'}", flush=True)
    return result


def _fingerprint(stage: Stage, settings: Mapping[str, Any]) -> str:
    """Return what two runs of one method, size and seed must share to be the same run."""
    return hashlib.sha256(canonical_json({"stage": stage.fingerprint, "settings": settings}).encode()).hexdigest()


def _known_branches(path: Path, fingerprints: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the branches in an earlier ``learning.json`` that were measured as they would be now."""
    try:
        found = read_json(path)["branches"]
        return {
            name: found[name] for name, own in fingerprints.items() if found.get(name, {}).get("fingerprint") == own
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _results(found: Findings) -> dict[str, Any]:
    tried: dict[str, dict[str, float]] = {}
    for trial in found.trials:
        tried.setdefault(trial.method, {})[f"{trial.learning_rate:g}"] = trial.correlation
    runs = [asdict(run) for run in found.runs]
    return {
        "learning_rates_tried": tried,
        "summary": _summary(runs),
        "runs": runs,
        "trials": [asdict(run) for run in found.trials],
    }


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
            "encoder_seconds": _mean_of_known(one["encoder_seconds"] for one in members),
        }
        for (images, method), members in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def _mean_of_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _table(name: str, summary: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{BRANCHES[name]}: correlation on validation images (lowest to highest seed), CPU seconds"]
    for row in summary:
        spread = f" ({row['lowest']:.3f} to {row['highest']:.3f})" if row["seeds"] > 1 else ""
        who = f"{row['images']:>6} images  {row['method']:<41}"
        lines.append(f"{who} {row['correlation']:.3f}{spread}  {row['seconds']:6.1f} s")
    return "\n".join(lines)


# --- the figure -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Style:
    """How a method is drawn. Colours of Okabe and Ito; markers and dashes tell the methods apart without them."""

    name: str
    colour: str
    dash: str = ""
    marker: str = ""


# Methods in the order in which they are drawn, the last on top.
_STYLES = {
    "mean": _Style("mean", "#767676", dash="2 4"),
    "ridge": _Style("ridge", "#222222", marker="triangle"),
    "MLP, equal time with the encoder counted": _Style("MLP + encoder time", "#B04A00", dash="9 3 2 3"),
    "MLP, squared error": _Style("MLP, squared error", "#D55E00", dash="7 4", marker="square"),
    "MLP": _Style("MLP", "#D55E00", marker="square"),
    "BIT": _Style("BIT", "#0072B2", marker="circle"),
}
_ONE_RESULT = ("mean", "ridge", "MLP, equal time with the encoder counted")  # beside the curves over seconds: a level
_WIDTH, _PANEL_HEIGHT = 1000, 360
_PANEL_WIDTH, _LEFT, _LABELS, _TOP, _BOTTOM = 500, 58, 182, 44, 54
_LINE = 17  # from one label to the next


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
        longest = max(point[0] for series in by_seconds if not series.across for point in series.points)
        step = 10 ** math.floor(math.log10(longest / 2)) if longest > 0 else 1.0
        step *= next(factor for factor in (1, 2, 5, 10) if longest / (step * factor) <= 6)
        seconds = [step * k for k in range(int(longest / step) + 1)]
        title, y = BRANCHES[name], number * _PANEL_HEIGHT
        rows.append(_panel(0, y, title, "training images per subject (log scale)", by_images, images, math.log, top))
        rows.append(
            _panel(_PANEL_WIDTH, y, title, "CPU seconds of training, all images", by_seconds, seconds, float, top)
        )
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
        points = [(row["images"], row["correlation"], row["lowest"], row["highest"]) for row in rows]
        if method == "mean":
            series.append(_Series(method, points[-1:], across=True))
        elif len(points) > 1 or method not in _ONE_RESULT:
            series.append(_Series(method, points))
    return [one for one in series if one.points]


def _against_seconds(branch: Mapping[str, Any]) -> list[_Series]:
    """Return the methods on all images: networks by their validations, the others by their one result."""
    most = max(row["images"] for row in branch["summary"])
    series = []
    for method in _STYLES:
        runs = [one for one in branch["runs"] if one["method"] == method and one["images"] == most]
        points = []
        if method in _ONE_RESULT:
            found = [one["correlation"] for one in runs]
            points = [(0.0, value, value, value) for value in found]
        else:
            for entries in zip(*(one["curve"] for one in runs), strict=False):
                found = [entry["correlation"] for entry in entries]
                points.append((fmean(entry["seconds"] for entry in entries), fmean(found), min(found), max(found)))
        if points:
            series.append(_Series(method, points, across=method in _ONE_RESULT))
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
    ends = [scale(value) for value in (*ticks, *(p[0] for one in series if not one.across for p in one.points))]
    first, last = min(ends), max(ends)

    def x(value: float) -> float:
        return left + 10 + (right - left - 20) * ((scale(value) - first) / (last - first) if last > first else 0.5)

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
        style = _STYLES[one.method]
        line = f'stroke="{style.colour}" stroke-width="2.2" fill="none"'
        line += f' stroke-dasharray="{style.dash}"' if style.dash else ""
        if one.across:
            parts.append(f'<path d="M{left} {y(one.points[-1][1]):.1f}H{right}" {line}/>')
            continue
        path = "L".join(f"{x(point[0]):.1f} {y(point[1]):.1f}" for point in one.points)
        parts.append(f'<path d="M{path}" {line}/>')
        for at, mean, low, high in one.points:
            if high > low:
                bar = f'<path d="M{x(at):.1f} {y(low):.1f}V{y(high):.1f}" stroke="{style.colour}" stroke-width="1.2"/>'
                parts.append(bar)
            parts.append(_marker(style.marker, x(at), y(mean), "#ffffff" if style.dash else style.colour, style.colour))
    named = sorted(series, key=lambda one: -one.points[-1][1])
    levels = [y(one.points[-1][1]) for one in named]
    for one, level, at in zip(named, levels, _spread(levels, lower), strict=True):
        style = _STYLES[one.method]
        end = right if one.across else x(one.points[-1][0]) + 7
        # A thread from the line's end, for a label may have had to make room for others.
        parts.append(
            f'<path d="M{end:.1f} {level:.1f}L{right + 14} {at:.1f}" stroke="{style.colour}" stroke-width="0.8"/>'
        )
        text = f"{escape(style.name)} {one.points[-1][1]:.2f}"
        parts.append(f'<text x="{right + 18}" y="{at + 4.5:.1f}" fill="{style.colour}" font-size="13">{text}</text>')
    return "\n".join(parts) + "\n"


def _spread(levels: Sequence[float], lowest: float) -> list[float]:
    """Return heights for labels near the levels (ascending), far enough apart, none below ``lowest``."""
    out: list[float] = []
    for level in levels:
        out.append(max(level, out[-1] + _LINE) if out else level)
    below = lowest + _LINE
    for k in reversed(range(len(out))):
        below = out[k] = min(out[k], below - _LINE)
    return out


def _marker(shape: str, x: float, y: float, fill: str, stroke: str) -> str:
    paint = f'fill="{fill}" stroke="{stroke}" stroke-width="1.5"'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {paint}/>'
    if shape == "square":
        return f'<rect x="{x - 3.6:.1f}" y="{y - 3.6:.1f}" width="7.2" height="7.2" {paint}/>'
    return f'<path d="M{x:.1f} {y - 5:.1f}l4.8 8.4h-9.6z" {paint}/>'
