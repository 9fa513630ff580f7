"""The figures of an analysis, drawn with Pillow: white ground, readable at the width of a page."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.optimize import linear_sum_assignment

from benchmark.analyze.attention import Analysis, Grid
from methods.brain_it.attention import Floats, centres

SHOWN_TOKENS = 12  # of the semantic figure
LOWLEVEL_SIDE = 16  # the layer nearest to it stands for the low-level branch
_CELL, _GAP, _MARGIN, _TITLE = 44, 4, 12, 26
VIEWS = ("from behind", "from below")
_INK, _SOFT = (40, 40, 40), (110, 110, 110)
Colour = tuple[int, int, int]


def main_grids(analysis: Analysis) -> tuple[Grid, Grid]:
    """Return the semantic grid, and the low-level one whose side is nearest to sixteen places."""
    semantic, *layers = analysis.grids
    return semantic, min(layers, key=lambda grid: abs(grid.maps.shape[-1] - LOWLEVEL_SIDE))


def spread_centres(maps: Floats) -> Floats:
    """Return where each token's map is strongest, (C, 2) x and y in 0..1, stretched to fill the square.

    A centre of mass never lies at the edge, and maps of one model may all lean to the middle: 95 % of the tokens are
    brought inside, the others to the edge.
    """
    away = centres(maps) - 0.5
    reach = max(float(np.quantile(np.abs(away).max(1), 0.95)), 1e-6)
    spread: Floats = 0.5 + np.clip(0.5 * away / reach, -0.5, 0.5)
    return spread


def colours(maps: Floats) -> list[Colour]:
    """Return each token's colour: hue by the direction of its place from the middle, paler near the middle."""
    out = []
    for x, y in spread_centres(maps) - 0.5:
        hue = (math.atan2(-y, x) / (2 * math.pi)) % 1
        far = min(1.0, math.hypot(x, y) * 2)
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.25 + 0.75 * far, 0.88)
        out.append((round(255 * red), round(255 * green), round(255 * blue)))
    return out


def places_on_sheet(maps: Floats) -> tuple[np.ndarray, int]:
    """Lay the tokens out on a sheet so that each lies near the place of the image that it serves.

    Returns:
        (C, 2) column and row of each token, no two alike; and the number of columns.
    """
    columns = math.ceil(math.sqrt(len(maps)))
    rows = math.ceil(len(maps) / columns)
    cells = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2)
    at = (cells + 0.5) / [columns, rows]
    cost = ((spread_centres(maps)[:, None] - at[None]) ** 2).sum(-1)
    tokens, chosen = linear_sum_assignment(cost)
    out = np.empty((len(maps), 2), np.int64)
    out[tokens] = cells[chosen]
    return out, columns


def shades(one: Floats) -> np.ndarray:
    """Return a map as uint8, 0 at its smallest and 255 at its largest value; a flat one is grey."""
    one = one.astype(np.float32).astype(np.float64)  # as maps are saved, so that who reads these draws the same
    low, high = float(one.min()), float(one.max())
    if high - low < 1e-12:
        return np.full(one.shape, 128, np.uint8)
    return np.rint(255 * (one - low) / (high - low)).astype(np.uint8)


def spatial(analysis: Analysis) -> Image.Image:
    """Draw every token's map, a square each, laid out by the place that it serves; one sheet a branch (Fig. S12a)."""
    return _side_by_side([_spatial_sheet(grid) for grid in main_grids(analysis)])


def _spatial_sheet(grid: Grid) -> Image.Image:
    where, columns = places_on_sheet(grid.maps)
    step = _CELL + _GAP
    rows = int(where[:, 1].max()) + 1
    sheet = Image.new("RGB", (2 * _MARGIN + columns * step, _TITLE + 2 * _MARGIN + rows * step), "white")
    draw = ImageDraw.Draw(sheet)
    side = grid.maps.shape[-1]
    title = f"{grid.title}: {side} x {side} places, {len(grid.maps)} tokens"
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=ImageFont.load_default(15))
    for one, (column, row), colour in zip(grid.maps, where, colours(grid.maps), strict=True):
        left, top = _MARGIN + int(column) * step, _TITLE + _MARGIN + int(row) * step
        draw.rectangle((left, top, left + _CELL - 1, top + _CELL - 1), fill=colour)
        square = Image.fromarray(shades(one)).resize((_CELL - 6, _CELL - 6), Image.Resampling.NEAREST)
        sheet.paste(square.convert("RGB"), (left + 3, top + 3))
    return sheet


def cortex(analysis: Analysis) -> Image.Image:
    """Draw one subject's voxels from behind and from below, each in its token's colour; a row a branch (Fig. S12b)."""
    subject = analysis.shown[0]
    rows = []
    for grid in main_grids(analysis):
        palette = np.array(colours(grid.maps), np.uint8)
        views = [_view(analysis, subject, palette, view) for view in VIEWS]
        rows.append(_side_by_side([_key(grid), *views]))
    return _below_each_other(rows)


def seen_from(analysis: Analysis, subject: int, view: str) -> tuple[Floats, np.ndarray]:
    """Return a subject's voxels as seen from a side: (V, 2) x and y in 0..1, and their order from far to near."""
    assert analysis.anatomy is not None and analysis.anatomy.coordinates is not None
    points = analysis.anatomy.coordinates[analysis.layout.rows(analysis.subjects.index(subject))]
    plane = points[:, [0, 2]] if view == "from behind" else points[:, [0, 1]] * [-1, 1]  # from below, left is right
    depth = points[:, 1] if view == "from behind" else points[:, 2]
    middle = (plane.max(0) + plane.min(0)) / 2
    scale = 0.94 / max(float(np.ptp(plane, axis=0).max()), 1e-6)
    return (plane - middle) * scale * [1, -1] + 0.5, np.argsort(-depth, kind="stable")


def _view(analysis: Analysis, subject: int, palette: np.ndarray, view: str) -> Image.Image:
    """Draw a subject's voxels, the nearer ones on top."""
    size = 300
    points, order = seen_from(analysis, subject, view)
    labels = analysis.labels[analysis.layout.rows(analysis.subjects.index(subject))]
    radius = max(1.0, 55 / math.sqrt(len(points)))
    sheet = Image.new("RGB", (size, size + _TITLE), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 4), f"subject {subject}, {view}", fill=_INK, font=ImageFont.load_default(15))
    sides = "LR" if view == "from behind" else "RL"
    for letter, x in zip(sides, (8, size - 16), strict=True):
        draw.text((x, size), letter, fill=_SOFT, font=ImageFont.load_default(15))
    for k in order:
        x, y = points[k] * size + [0, _TITLE]
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(palette[labels[k]].tolist()))
    return sheet


def _key(grid: Grid) -> Image.Image:
    """Draw the colours of the places: where a token of each colour serves the image."""
    size = 150
    sheet = Image.new("RGB", (size + 2 * _MARGIN, size + 2 * _TITLE + 2 * _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 4), grid.title, fill=_INK, font=ImageFont.load_default(15))
    for (x, y), colour in zip(spread_centres(grid.maps), colours(grid.maps), strict=True):
        left, top = _MARGIN + x * size, _TITLE + _MARGIN + y * size
        draw.ellipse((left - 5, top - 5, left + 5, top + 5), fill=colour)
    draw.rectangle((_MARGIN, _TITLE + _MARGIN, _MARGIN + size, _TITLE + _MARGIN + size), outline=_SOFT)
    draw.text((_MARGIN, _TITLE + _MARGIN + size + 6), "place in the image", fill=_SOFT, font=ImageFont.load_default(12))
    return sheet


def outstanding(analysis: Analysis, token: int, image: int) -> Floats:
    """Return where a token attends to an image more than it does on average: (side, side), 0..1."""
    more = np.maximum(analysis.by_image[image, token] - analysis.grids[0].maps[token], 0)
    found: Floats = more / max(float(more.max()), 1e-12)
    return found


def lit(image: np.ndarray, light: Floats) -> Image.Image:
    """Return an image (S x S x 3 uint8) dark where ``light`` (side x side, 0..1) is low."""
    side = image.shape[0]
    mask = Image.fromarray(np.rint(255 * light).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    factor = 0.25 + 0.75 * np.asarray(mask, np.float32)[..., None] / 255
    return Image.fromarray(np.rint(image * factor).astype(np.uint8))


def most_selective(analysis: Analysis, count: int = SHOWN_TOKENS) -> list[int]:
    """Return the tokens whose attended contents are most alike, the most first."""
    order: list[int] = np.argsort(-analysis.selectivity.z, kind="stable").tolist()
    return order[:count]


def semantic(analysis: Analysis) -> Image.Image:
    """Draw the most selective tokens: the images in which each stands out, lit where it attends (Fig. S13)."""
    cell, label = 84, 150
    tokens = most_selective(analysis)
    k = analysis.selectivity.top.shape[1]
    step = cell + _GAP
    sheet = Image.new("RGB", (label + 2 * _MARGIN + k * step, 2 * _MARGIN + len(tokens) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for line, token in enumerate(tokens):
        top = _MARGIN + line * step
        voxels, z = int(analysis.voxels[token].sum()), analysis.selectivity.z[token]
        text = f"token {token}\n{voxels} voxels\nlikeness z = {z:.1f}"
        draw.multiline_text((_MARGIN, top + 8), text, fill=_INK, font=ImageFont.load_default(14), spacing=6)
        for column, image in enumerate(analysis.selectivity.top[token].tolist()):
            picture = lit(analysis.images[image], outstanding(analysis, token, image))
            resized = picture.resize((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(resized, (_MARGIN + label + column * step, top))
    return sheet


def _side_by_side(parts: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (sum(part.width for part in parts), max(part.height for part in parts)), "white")
    left = 0
    for part in parts:
        sheet.paste(part, (left, 0))
        left += part.width
    return sheet


def _below_each_other(parts: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet
