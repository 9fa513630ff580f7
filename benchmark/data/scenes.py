"""Natural-like scenes, drawn: the pictures of the miniature NSD.

A scene is a *place* (one of eight backgrounds with a horizon, an illumination and 1/f texture) with one or two
*objects* out of twelve categories at varied position, size and hue. Every picture comes with its description, so that
the simulated brain can be driven by what is in it. Scene ``i`` depends on ``(seed, i)`` alone: any part of a set can be
drawn anew.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

CATEGORIES = (
    "ball", "car", "house", "tree", "cup", "fish", "bird", "flower", "mushroom", "umbrella", "boat", "balloon",
)  # fmt: skip
PLACES = ("beach", "desert", "forest", "meadow", "snow", "city", "room", "night")

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class SceneObject:
    """One object: what, where and how it looks. Lengths are fractions of the image side."""

    category: str
    x: float  # centre, from the left
    y: float  # centre, from the top
    size: float  # height and width of its box
    hue: float  # 0..1 around the colour circle


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    place: str
    objects: tuple[SceneObject, ...]
    horizon: float  # from the top, fraction of the image
    light: float  # overall brightness, 1 = neutral
    hue_shift: float  # of the place's colours, fraction of the colour circle


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    r, g, b = colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))
    return round(255 * r), round(255 * g), round(255 * b)


def describe_scene(seed: int, index: int) -> Scene:
    """Draw the description of scene ``index`` of the set ``seed``."""
    rng = np.random.default_rng([seed, index, 0])
    place = PLACES[int(rng.integers(len(PLACES)))]
    count = 2 if rng.random() < 0.15 else 1
    kinds = rng.choice(len(CATEGORIES), size=count, replace=False)
    objects = []
    for k, kind in enumerate(kinds):
        size = float(rng.uniform(0.42, 0.72)) if count == 1 else float(rng.uniform(0.34, 0.46))
        low, high = (0.06 + size / 2, 0.94 - size / 2) if count == 1 else ((0.2, 0.3) if k == 0 else (0.7, 0.8))
        x = float(rng.uniform(low, high))
        y = float(rng.uniform(0.08 + size / 2, 0.94 - size / 2))
        objects.append(SceneObject(CATEGORIES[int(kind)], x, y, size, float(rng.random())))
    return Scene(
        place=place,
        objects=tuple(objects),
        horizon=float(rng.uniform(0.42, 0.66)),
        light=float(rng.uniform(0.85, 1.12)),
        hue_shift=float(rng.normal(0, 0.015)),
    )


# --- places -----------------------------------------------------------------------------------------------------------

_SKIES: dict[
    str, tuple[tuple[float, float, float], tuple[float, float, float]]
] = {  # hue, saturation, value: top, horizon
    "beach": ((0.57, 0.65, 0.90), (0.54, 0.25, 1.00)),
    "desert": ((0.06, 0.35, 0.95), (0.11, 0.45, 1.00)),
    "forest": ((0.30, 0.55, 0.28), (0.27, 0.50, 0.45)),
    "meadow": ((0.58, 0.45, 0.98), (0.55, 0.15, 1.00)),
    "snow": ((0.60, 0.15, 0.80), (0.58, 0.08, 0.95)),
    "city": ((0.60, 0.12, 0.62), (0.08, 0.12, 0.80)),
    "room": ((0.09, 0.25, 0.85), (0.09, 0.30, 0.75)),
    "night": ((0.66, 0.80, 0.12), (0.68, 0.70, 0.34)),
}
_GROUNDS: dict[str, tuple[float, float, float]] = {
    "beach": (0.12, 0.35, 0.92),
    "desert": (0.09, 0.60, 0.80),
    "forest": (0.28, 0.60, 0.22),
    "meadow": (0.27, 0.65, 0.62),
    "snow": (0.58, 0.04, 0.97),
    "city": (0.60, 0.05, 0.34),
    "room": (0.07, 0.60, 0.50),
    "night": (0.62, 0.45, 0.14),
}


def _draw_place(scene: Scene, side: int, rng: np.random.Generator) -> Image.Image:
    """Sky, ground and what stands at the horizon, at ``side`` pixels."""
    shift = scene.hue_shift

    def colour(hsv: tuple[float, float, float], gain: float = 1.0) -> Colour:
        return _rgb(hsv[0] + shift, hsv[1], hsv[2] * gain)

    top, low = _SKIES[scene.place]
    ground = _GROUNDS[scene.place]
    horizon = round(scene.horizon * side)
    rows = np.empty((side, 1, 3), np.float32)
    t = np.linspace(0, 1, horizon, dtype=np.float32)[:, None]
    rows[:horizon, 0] = (1 - t) * np.array(colour(top)) + t * np.array(colour(low))
    u = np.linspace(0, 1, side - horizon, dtype=np.float32)[:, None]
    rows[horizon:, 0] = (1 - u) * np.array(colour(ground, 0.82)) + u * np.array(colour(ground, 1.05))
    image = Image.fromarray(np.broadcast_to(rows, (side, side, 3)).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    s = float(side)
    if scene.place == "beach":
        sea = round(min(s * 0.97, horizon + s * rng.uniform(0.10, 0.18)))
        draw.rectangle((0, horizon, side, sea), fill=colour((0.54, 0.75, 0.62)))
        draw.line((0, sea, side, sea), fill=colour((0.54, 0.15, 0.98)), width=max(1, side // 48))
        sun = s * rng.uniform(0.1, 0.9)
        draw.ellipse((sun - s * 0.07, s * 0.05, sun + s * 0.07, s * 0.19), fill=(255, 244, 190))
    elif scene.place == "desert":
        for k in range(3):
            phase, height = rng.uniform(0, 2 * math.pi), s * rng.uniform(0.05, 0.10)
            base = horizon + s * 0.14 * k
            dune = [(x, base - height * math.sin(phase + 2.4 * math.pi * x / s)) for x in np.linspace(0, s, 17)]
            draw.polygon([*dune, (s, s), (0, s)], fill=colour(ground, 0.78 + 0.12 * k))
    elif scene.place == "forest":
        for _ in range(7):
            x, width = s * rng.uniform(0, 1), s * rng.uniform(0.03, 0.07)
            draw.rectangle(
                (x, 0, x + width, horizon + s * rng.uniform(0, 0.12)), fill=colour((0.08, 0.55, rng.uniform(0.16, 0.3)))
            )
        for _ in range(6):
            x, y, r = s * rng.uniform(0, 1), s * rng.uniform(-0.05, 0.16), s * rng.uniform(0.10, 0.18)
            draw.ellipse((x - r, y - r * 0.7, x + r, y + r * 0.7), fill=colour((0.31, 0.7, rng.uniform(0.22, 0.42))))
    elif scene.place == "meadow":
        phase = rng.uniform(0, 2 * math.pi)
        hills = [(x, horizon - s * 0.08 * (1 + math.sin(phase + 2 * math.pi * x / s))) for x in np.linspace(0, s, 17)]
        draw.polygon([*hills, (s, s), (0, s)], fill=colour((0.29, 0.55, 0.50)))
        draw.rectangle((0, horizon + s * 0.05, s, s), fill=colour(ground))
        x, y = s * rng.uniform(0.1, 0.9), s * rng.uniform(0.06, 0.2)
        for dx, r in ((-0.10, 0.05), (0.0, 0.07), (0.10, 0.05)):
            draw.ellipse((x + s * (dx - r), y - s * r * 0.7, x + s * (dx + r), y + s * r * 0.7), fill=(250, 252, 255))
    elif scene.place == "snow":
        for _ in range(3):
            x, width, height = s * rng.uniform(0, 1), s * rng.uniform(0.22, 0.4), s * rng.uniform(0.18, 0.34)
            draw.polygon(
                [(x - width, horizon), (x, horizon - height), (x + width, horizon)], fill=colour((0.60, 0.22, 0.62))
            )
            peak = [
                (x - width * 0.3, horizon - height * 0.7),
                (x, horizon - height),
                (x + width * 0.3, horizon - height * 0.7),
            ]
            draw.polygon(peak, fill=(248, 250, 255))
    elif scene.place == "city":
        x = 0.0
        while x < s:
            width, height = s * rng.uniform(0.10, 0.2), s * rng.uniform(0.15, 0.42)
            draw.rectangle((x, horizon - height, x + width, horizon), fill=colour((0.6, 0.15, rng.uniform(0.28, 0.5))))
            for wx in np.arange(x + s * 0.02, x + width - s * 0.03, s * 0.05):
                for wy in np.arange(horizon - height + s * 0.03, horizon - s * 0.04, s * 0.08):
                    draw.rectangle((wx, wy, wx + s * 0.025, wy + s * 0.04), fill=(250, 225, 140))
            x += width
        draw.line((0, (horizon + s) / 2, s, (horizon + s) / 2), fill=(230, 230, 225), width=max(1, side // 40))
    elif scene.place == "room":
        for x in np.arange(rng.uniform(0, 0.2) * s, s, s * 0.2):
            draw.line((x, horizon, x + (x - s / 2) * 0.6, s), fill=colour(ground, 0.7), width=max(1, side // 64))
        draw.rectangle((0, horizon - s * 0.03, s, horizon), fill=(245, 240, 232))
        x = s * rng.uniform(0.05, 0.6)
        draw.rectangle(
            (x, s * 0.07, x + s * 0.32, s * 0.33),
            fill=colour((0.56, 0.35, 0.97)),
            outline=(250, 248, 240),
            width=max(1, side // 36),
        )
        draw.line((x + s * 0.16, s * 0.07, x + s * 0.16, s * 0.33), fill=(250, 248, 240), width=max(1, side // 48))
    else:  # night
        for _ in range(18):
            x, y, r = s * rng.uniform(0, 1), rng.uniform(0, horizon), s * 0.007
            draw.ellipse((x - r, y - r, x + r, y + r), fill=(240, 240, 220))
        x, y, r = s * rng.uniform(0.1, 0.9), s * rng.uniform(0.08, 0.2), s * 0.075
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(248, 244, 210))
        draw.ellipse((x - r * 0.3, y - r * 1.1, x + r * 1.6, y + r * 0.8), fill=colour(top, 1.6))
    return image


# --- objects ----------------------------------------------------------------------------------------------------------


def _draw_object(draw: ImageDraw.ImageDraw, item: SceneObject, side: int) -> None:
    """Draw one object in its box; coordinates inside run from -1 to 1."""
    cx, cy, half = item.x * side, item.y * side, item.size * side / 2
    main, dark, pale = _rgb(item.hue, 0.85, 0.92), _rgb(item.hue, 0.9, 0.55), _rgb(item.hue, 0.35, 1.0)
    black, white, brown = (28, 26, 30), (246, 246, 242), (112, 72, 40)
    green = (46, 122, 52)

    def box(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        return cx + half * x0, cy + half * y0, cx + half * x1, cy + half * y1

    def points(*xy: tuple[float, float]) -> list[tuple[float, float]]:
        return [(cx + half * x, cy + half * y) for x, y in xy]

    def oval(x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        draw.ellipse(box(x0, y0, x1, y1), fill=fill)

    def block(x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        draw.rectangle(box(x0, y0, x1, y1), fill=fill)

    def shape(*xy: tuple[float, float], fill: Colour) -> None:
        draw.polygon(points(*xy), fill=fill)

    kind = item.category
    if kind == "ball":
        oval(-0.9, -0.9, 0.9, 0.9, dark)
        oval(-0.88, -0.9, 0.78, 0.76, main)
        draw.pieslice(box(-0.88, -0.9, 0.78, 0.76), -20, 50, fill=white)
        draw.pieslice(box(-0.88, -0.9, 0.78, 0.76), 160, 230, fill=white)
        oval(-0.5, -0.66, -0.1, -0.3, pale)
    elif kind == "car":
        shape((-0.6, -0.05), (-0.35, -0.52), (0.35, -0.52), (0.65, -0.05), fill=dark)
        shape((-0.48, -0.07), (-0.3, -0.42), (-0.04, -0.42), (-0.04, -0.07), fill=(190, 222, 238))
        shape((0.06, -0.07), (0.06, -0.42), (0.3, -0.42), (0.52, -0.07), fill=(190, 222, 238))
        draw.rounded_rectangle(box(-0.98, -0.08, 0.98, 0.4), radius=half * 0.14, fill=main)
        block(-0.98, 0.2, 0.98, 0.3, dark)
        for x in (-0.55, 0.55):
            oval(x - 0.25, 0.16, x + 0.25, 0.66, black)
            oval(x - 0.1, 0.31, x + 0.1, 0.51, (180, 180, 184))
        oval(0.82, 0.0, 0.97, 0.14, (255, 240, 170))
    elif kind == "house":
        block(-0.7, -0.15, 0.7, 0.92, pale)
        shape((-0.95, -0.12), (0.0, -0.95), (0.95, -0.12), fill=dark)
        block(-0.16, 0.35, 0.18, 0.92, brown)
        for x in (-0.52, 0.3):
            block(x, 0.05, x + 0.26, 0.32, (120, 170, 210))
        block(0.38, -0.85, 0.56, -0.42, (120, 70, 60))
    elif kind == "tree":
        block(-0.13, 0.25, 0.13, 0.98, brown)
        leaf, shade = _rgb(0.25 + 0.2 * (item.hue - 0.5), 0.8, 0.62), _rgb(0.25 + 0.2 * (item.hue - 0.5), 0.85, 0.4)
        for y, w in ((0.35, 0.85), (-0.1, 0.68), (-0.5, 0.5)):
            shape((-w, y), (0.0, y - 0.62), (w, y), fill=leaf)
            shape((0.05, y - 0.56), (w, y), (0.1, y), fill=shade)
    elif kind == "cup":
        draw.arc(box(0.25, -0.4, 0.98, 0.4), -90, 90, fill=dark, width=max(2, round(half * 0.16)))
        shape((-0.72, -0.6), (0.62, -0.6), (0.46, 0.8), (-0.56, 0.8), fill=main)
        shape((0.3, -0.6), (0.62, -0.6), (0.46, 0.8), (0.2, 0.8), fill=dark)
        oval(-0.72, -0.78, 0.62, -0.42, pale)
        oval(-0.6, -0.72, 0.5, -0.48, (88, 52, 30))
    elif kind == "fish":
        shape((0.45, 0.0), (0.98, -0.5), (0.98, 0.5), fill=dark)
        oval(-0.95, -0.5, 0.62, 0.5, main)
        shape((-0.3, -0.42), (0.1, -0.85), (0.35, -0.35), fill=dark)
        for x in (-0.25, 0.02, 0.29):
            draw.arc(box(x - 0.2, -0.4, x + 0.16, 0.4), -70, 70, fill=pale, width=max(1, round(half * 0.08)))
        oval(-0.76, -0.24, -0.5, 0.02, white)
        oval(-0.69, -0.17, -0.57, -0.05, black)
    elif kind == "bird":
        shape((0.4, 0.05), (0.98, -0.25), (0.9, 0.25), fill=dark)
        oval(-0.45, -0.25, 0.62, 0.5, main)
        oval(-0.78, -0.72, -0.12, -0.06, main)
        shape((-0.74, -0.48), (-1.0, -0.34), (-0.72, -0.26), fill=(240, 170, 40))
        shape((-0.15, -0.02), (0.5, -0.05), (0.15, 0.36), fill=dark)
        oval(-0.62, -0.55, -0.46, -0.39, black)
        for x in (0.0, 0.22):
            block(x, 0.46, x + 0.07, 0.9, (200, 130, 30))
    elif kind == "flower":
        block(-0.06, 0.2, 0.06, 1.0, green)
        oval(0.04, 0.5, 0.5, 0.74, green)
        for k in range(6):
            a = k * math.pi / 3
            x, y = 0.42 * math.cos(a), -0.3 + 0.42 * math.sin(a)
            oval(x - 0.3, y - 0.3, x + 0.3, y + 0.3, main)
        oval(-0.26, -0.56, 0.26, -0.04, (250, 205, 50))
    elif kind == "mushroom":
        shape((-0.24, 0.0), (0.24, 0.0), (0.32, 0.9), (-0.32, 0.9), fill=(240, 228, 204))
        draw.pieslice(box(-0.92, -0.85, 0.92, 0.95), 180, 360, fill=main)
        for x, y, r in ((-0.5, -0.2, 0.13), (0.0, -0.52, 0.16), (0.5, -0.2, 0.13)):
            oval(x - r, y - r, x + r, y + r, white)
    elif kind == "umbrella":
        block(-0.04, 0.0, 0.05, 0.8, black)
        draw.arc(box(-0.3, 0.6, 0.05, 0.96), 0, 180, fill=black, width=max(2, round(half * 0.09)))
        for k, fill in enumerate((main, pale, main, pale)):
            draw.pieslice(box(-0.95, -0.85, 0.95, 0.95), 180 + 45 * k, 225 + 45 * k, fill=fill)
    elif kind == "boat":
        shape((-0.95, 0.35), (0.95, 0.35), (0.6, 0.85), (-0.6, 0.85), fill=dark)
        block(-0.05, -0.95, 0.04, 0.35, brown)
        shape((0.08, -0.9), (0.08, 0.22), (0.82, 0.22), fill=white)
        shape((-0.1, -0.7), (-0.1, 0.22), (-0.72, 0.22), fill=main)
    else:  # balloon
        draw.line(points((0.0, 0.5), (0.08, 0.98)), fill=black, width=max(1, round(half * 0.05)))
        shape((-0.1, 0.58), (0.1, 0.58), (0.0, 0.42), fill=dark)
        oval(-0.66, -0.95, 0.66, 0.5, main)
        oval(-0.42, -0.72, -0.08, -0.28, pale)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _pink_noise(side: int, rng: np.random.Generator) -> np.ndarray:
    """Return a ``side x side`` field with a 1/f amplitude spectrum, mean 0 and standard deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((side, side), dtype=np.float32)) / frequency
    field = np.fft.irfft2(spectrum, s=(side, side)).astype(np.float32)
    return field / field.std()


def draw_scene(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw ``scene`` at ``size x size`` pixels: uint8, RGB. ``rng`` draws what the description leaves open."""
    side = 2 * size  # drawn twice as large and averaged, for smooth edges
    image = _draw_place(scene, side, rng)
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        _draw_object(draw, item, side)
    pixels = np.asarray(image.reduce(2), np.float32)
    texture = (
        1 + 0.07 * _pink_noise(size, rng)[..., None] + 0.02 * rng.standard_normal((size, size, 1), dtype=np.float32)
    )
    return np.clip(np.rint(pixels * texture * scene.light), 0, 255).astype(np.uint8)


def render_scenes(n: int, seed: int, size: int = 64, start: int = 0) -> tuple[np.ndarray, list[Scene]]:
    """Draw scenes ``start .. start+n-1`` of the set ``seed``.

    Returns:
        ``n x size x size x 3`` uint8 pictures, and their descriptions.
    """
    images = np.empty((n, size, size, 3), np.uint8)
    scenes = []
    for k in range(n):
        scene = describe_scene(seed, start + k)
        images[k] = draw_scene(scene, size, np.random.default_rng([seed, start + k, 1]))
        scenes.append(scene)
    return images, scenes
