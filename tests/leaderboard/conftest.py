"""A small made-up sweep: rows, per-image scores and images, to drive tables and the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from leaderboard.schema import Row
from leaderboard.site import Axis, Gallery
from leaderboard.statistics import summarise
from metrics.cards import CARDS

NOTES = {
    "Alex(2)": "stand-in EfficientNet-Lite2, block 1",
    "CLIP": "stand-in EfficientNet-Lite2, pooled",
    "CLIP-1000": "stand-in EfficientNet-Lite2, pooled",
}


def make_row(variant: str, metrics: dict[str, Any], **other: Any) -> Row:
    values = {
        "method": "Brain-IT",
        "variant": variant,
        "track": "demo",
        "protocol": "demo",
        "protocol_hash": "0123456789abcdef",
        "subjects": (1,),
        "n_images": 24,
        "source": "runs",
    }
    intervals = {key: value if isinstance(value, dict) else {"mean": value} for key, value in metrics.items()}
    return Row(**{**values, "metrics": intervals, **other})


def long_table(values: dict[tuple[str, str], dict[str, np.ndarray]], track: str = "demo") -> pa.Table:
    """Per-image table from arrays (subjects, images) by row and metric."""
    columns: dict[str, list[Any]] = {
        name: [] for name in ("track", "method", "variant", "subject", "seed", "image_id", "metric", "value")
    }
    for (method, variant), metrics in values.items():
        for metric, cells in metrics.items():
            for (subject, image), value in np.ndenumerate(cells):
                entry = (track, method, variant, subject + 1, 0, 100 + image, metric, float(value))
                for name, part in zip(columns, entry, strict=True):
                    columns[name].append(part)
    return pa.table(columns)


def make_sweep(
    folder: Path | None,
    variants: dict[str, float],
    *,
    n_subjects: int = 2,
    n_images: int = 24,
    shown: int = 3,
    seed: int = 0,
) -> SimpleNamespace:
    """A sweep whose quality rises with the logarithm of the axis and then falls a little."""
    generator = np.random.default_rng(seed)
    names = {name: ("Brain-IT", name) for name in variants}
    names |= {"mean image": ("baseline", "mean image"), "shuffled": ("baseline", "shuffled")}
    difficulty = generator.normal(size=(len(CARDS), n_subjects, n_images))
    values: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for name, key in names.items():
        quality = 0.3 - 0.02 * (np.log2(variants[name]) - 6.5) ** 2 if name in variants else -1.0
        values[key] = {}
        for index, (metric, card) in enumerate(CARDS.items()):
            z = quality + 0.6 * difficulty[index] + 0.5 * generator.normal(size=(n_subjects, n_images))
            if metric == "CLIP-1000":
                cells = (z > 0.6).astype(float)
            elif card.percent:
                cells = 1 / (1 + np.exp(-1.5 * z - 0.8))
            else:
                cells = 0.35 + (0.1 if card.direction == "higher" else -0.1) * z
            values[key][metric] = cells
    table = long_table(values)
    summary = summarise(table, n_resamples=200)
    rows = []
    for name, key in names.items():
        rows.append(
            make_row(
                name,
                {metric: interval.model_dump() for metric, interval in summary[key].items()},
                method=key[0],
                kind="method" if name in variants else "reference",
                subjects=tuple(range(1, n_subjects + 1)),
                n_images=n_images,
                seeds=(0,),
            )
        )
    chance = {metric: 0.5 for metric, card in CARDS.items() if card.percent} | {"CLIP-1000": 1 / n_images}
    rows.append(make_row("chance", chance, method="baseline", kind="reference", n_images=n_images))

    galleries = []
    if folder is not None:
        for variant in variants:
            for subject in range(1, n_subjects + 1):
                for image in range(shown):
                    paths = {}
                    for column in ("seen", "lowlevel", "semantic", "combined"):
                        name = f"s{image}" if column == "seen" else f"{len(galleries)}{column}"
                        paths[column] = folder / f"{name}.png"
                        if not paths[column].exists():
                            _picture(
                                paths[column], image, 0 if column == "seen" else generator.uniform(5, 60), generator
                            )
                    galleries.append(
                        Gallery(variant, subject, 100 + image, **paths, pixcorr={"lowlevel": 0.25, "semantic": 0.125})
                    )
    axis = Axis("clusters", dict(variants))
    return SimpleNamespace(rows=rows, per_image=table, galleries=galleries, axis=axis, notes=NOTES, values=values)


def _picture(path: Path, image: int, noise: float, generator: np.random.Generator) -> None:
    down, across = np.mgrid[0:64, 0:64] / 64
    base = np.stack([down, across, 0.5 + 0.5 * np.sin(6 * (across + image * down))], axis=-1) * 170 + 30
    inside = (down - 0.3 - 0.1 * image % 0.4) ** 2 + (across - 0.6) ** 2 < 0.04
    base[inside] = [(90 * image + 200) % 256, 80, (60 * image) % 256]
    base += noise * generator.normal(size=base.shape)
    Image.fromarray(base.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def row() -> Callable[..., Row]:
    return make_row


@pytest.fixture
def table_of() -> Callable[..., pa.Table]:
    return long_table


@pytest.fixture(scope="session")
def sweep() -> Callable[..., SimpleNamespace]:
    return make_sweep
