"""The two calibration curves of the gate, drawn with Pillow, and their numbers."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmark.check.simulate import DESIGNS, Design, Share, false_alarms, power
from benchmark.errors import RunError
from benchmark.imagesets.wording import place, reason
from benchmark.progress import Progress
from leaderboard.gate import Rules
from leaderboard.schema import write_atomically

ALARMS, POWER, NUMBERS = "gate-false-alarms.png", "gate-power.png", "gate-calibration.json"
RULES = Rules(n_resamples=1000, n_permutations=3999)
"""As the gate's own, with fewer draws."""

_SIZE = (860, 560)
_LEFT, _TOP, _RIGHT, _BOTTOM = 80, 60, 30, 70
_COLOURS = ((11, 92, 171), (196, 84, 16), (20, 130, 90))
_INK, _SOFT, _GRID = (40, 40, 40), (110, 110, 110), (225, 225, 225)


def calibrate(out: Path, pairs: int, seed: int, progress: Progress) -> dict[str, Any]:
    """Simulate, draw both curves into ``out``, and return the numbers, which are written beside them.

    Args:
        out: folder.
        pairs: simulated pairs for each design.
        seed: of the simulation.
        progress: shows a bar.

    Raises:
        RunError: a file cannot be written.
    """
    alarms: dict[Design, list[Share]] = {}
    found: dict[Design, list[Share]] = {}
    with progress.bar("simulated pairs", total=2 * pairs * len(DESIGNS)) as bar:
        for design in DESIGNS:
            alarms[design] = false_alarms(design, RULES, pairs, seed, bar.advance)
            found[design] = power(design, RULES, pairs, seed + 1, bar.advance)
    numbers = {
        "pairs": pairs,
        "seed": seed,
        "alpha": RULES.alpha,
        "power": RULES.power,
        "false_alarms": _numbers(alarms),
        "found": _numbers(found),
    }
    first = _chart(
        "Equal models that fail",
        "rate that is promised (--alpha)",
        alarms,
        highest=max(share.at for share in alarms[DESIGNS[0]]) * 1.15,
        diagonal=True,
    )
    second = _chart(
        "Models that are worse in one metric and fail",
        "true drop, in units of the drop that the gate says it detects",
        found,
        highest=1.0,
        level=RULES.power,
    )
    try:
        for name, image in ((ALARMS, first), (POWER, second)):
            buffer = io.BytesIO()
            image.save(buffer, format="PNG", optimize=True)
            write_atomically(out / name, buffer.getvalue())
        write_atomically(out / NUMBERS, (json.dumps(numbers, indent=2) + "\n").encode())
    except OSError as error:
        raise RunError(f"{place(out)}: cannot be written to ({reason(error)})") from error
    return numbers


def table(numbers: Mapping[str, Any]) -> str:
    """Return the numbers as two Markdown tables."""
    parts = []
    for title, key in (("promised", "false_alarms"), ("drop / detectable", "found")):
        curves: Mapping[str, Sequence[Mapping[str, float]]] = numbers[key]
        at = [point["at"] for point in next(iter(curves.values()))]
        lines = [f"| {title} | " + " | ".join(f"{x:g}" for x in at) + " |", "|:--|" + "--:|" * len(at)]
        for design, points in curves.items():
            cells = (f"{p['share']:.3f} [{p['low']:.3f}, {p['high']:.3f}]" for p in points)
            lines.append(f"| {design} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _numbers(curves: Mapping[Design, Sequence[Share]]) -> dict[str, list[dict[str, float]]]:
    return {
        str(design): [{"at": s.at, "share": s.value, "low": s.interval[0], "high": s.interval[1]} for s in shares]
        for design, shares in curves.items()
    }


def _chart(
    title: str,
    across: str,
    curves: Mapping[Design, Sequence[Share]],
    highest: float,
    diagonal: bool = False,
    level: float | None = None,
) -> Image.Image:
    """Draw shares with their intervals, a line a design."""
    image = Image.new("RGB", _SIZE, "white")
    draw = ImageDraw.Draw(image)
    text, small = ImageFont.load_default(17), ImageFont.load_default(14)
    widest = max(share.at for shares in curves.values() for share in shares) * (1.15 if diagonal else 1.0)

    def x(value: float) -> float:
        return _LEFT + value / widest * (_SIZE[0] - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _SIZE[1] - _BOTTOM - value / highest * (_SIZE[1] - _TOP - _BOTTOM)

    draw.text((_LEFT, 18), title, fill=_INK, font=text)
    draw.text(((_LEFT + _SIZE[0] - _RIGHT) / 2, _SIZE[1] - 24), across, fill=_SOFT, font=small, anchor="mm")
    for k in range(6):
        tick = k * (0.05 if diagonal else 0.2)
        if tick <= highest:
            draw.line([x(0), y(tick), x(widest), y(tick)], fill=_GRID)
            draw.text((_LEFT - 10, y(tick)), f"{100 * tick:.0f} %", fill=_SOFT, font=small, anchor="rm")
    for share in next(iter(curves.values())):
        draw.text((x(share.at), _SIZE[1] - _BOTTOM + 14), f"{share.at:g}", fill=_SOFT, font=small, anchor="mm")
    if diagonal:
        _dashed(draw, (x(0), y(0)), (x(widest), y(widest)))
        draw.text((x(widest) - 130, y(widest * 0.93)), "promised", fill=_SOFT, font=small, anchor="rm")
    if level is not None:
        _dashed(draw, (x(0), y(level)), (x(widest), y(level)))
        _dashed(draw, (x(1), y(0)), (x(1), y(highest)))
        draw.text((x(0) + 8, y(level) - 12), f"stated: {100 * level:.0f} % at 1", fill=_SOFT, font=small, anchor="lm")
    for number, (design, shares) in enumerate(curves.items()):
        colour, shift = _COLOURS[number % len(_COLOURS)], 4 * (number - 1)
        points = [(x(share.at) + shift, y(share.value)) for share in shares]
        draw.line(points, fill=colour, width=3, joint="curve")
        for (px, py), share in zip(points, shares, strict=True):
            low, high = share.interval
            draw.line([px, y(low), px, y(min(high, highest))], fill=colour, width=2)
            draw.ellipse([px - 4, py - 4, px + 4, py + 4], fill=colour)
        down = _TOP + (120 if level is not None else 14) + 24 * number
        left = _LEFT + 24
        draw.line([left, down, left + 26, down], fill=colour, width=3)
        draw.text((left + 34, down), str(design), fill=_INK, font=small, anchor="lm")
    return image


def _dashed(draw: ImageDraw.ImageDraw, start: tuple[float, float], stop: tuple[float, float], parts: int = 60) -> None:
    for k in range(0, parts, 2):
        a, b = k / parts, (k + 1) / parts
        draw.line(
            [
                start[0] + a * (stop[0] - start[0]),
                start[1] + a * (stop[1] - start[1]),
                start[0] + b * (stop[0] - start[0]),
                start[1] + b * (stop[1] - start[1]),
            ],
            fill=_SOFT,
            width=2,
        )
