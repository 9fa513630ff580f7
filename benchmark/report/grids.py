"""Pictures side by side in labelled rows: contact sheets, and the grids of a report (the paper's Figs. 3, 5 and 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from leaderboard.site import Gallery

TITLES = {"seen": "seen", "lowlevel": "low-level", "semantic": "semantic", "combined": "combined"}
_MARGIN, _LABEL, _GAP, _FONT = 8, 102, 4, 16


def contact_sheet(rows: Mapping[str, np.ndarray], cell: int = 76, columns: int | None = None) -> Image.Image:
    """Lay pictures out in labelled rows, one column an image; column k is the k-th image of every row.

    Args:
        rows: label -> n x H x W x 3 uint8, all of one n.
        cell: side of a picture's square, in pixels; the picture leaves 4 of them free on the right and below.
        columns: images side by side; the rows are repeated below for the rest. None shows all side by side.

    Returns:
        An RGB image, white where nothing is.
    """
    n = len(next(iter(rows.values())))
    columns = min(columns or n, n)
    blocks = [slice(start, start + columns) for start in range(0, n, columns)]
    lines = [(label, images[block]) for block in blocks for label, images in rows.items()]
    font = ImageFont.load_default(size=_FONT)
    left = max(_LABEL, *(int(font.getlength(label)) + _GAP for label in rows))
    size = (_MARGIN + left + cell * columns + _MARGIN, _MARGIN + cell * len(lines) + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for line, (label, images) in enumerate(lines):
        top = _MARGIN + line * cell
        draw.text((_MARGIN, top + (cell - _GAP) // 2), label, fill=(40, 40, 40), font=font, anchor="lm")
        for column, image in enumerate(images):
            picture = Image.fromarray(image).resize((cell - _GAP, cell - _GAP), Image.Resampling.LANCZOS)
            sheet.paste(picture, (_MARGIN + left + column * cell, top))
    return sheet


def grid(galleries: Sequence[Gallery], variants: Mapping[str, tuple[str, str]], count: int = 8) -> Image.Image | None:
    """Show the first test images of the first subject as seen, and what each variant makes of them.

    A single variant is shown by its branches instead (Fig. 6).

    Args:
        galleries: of a sweep; those images are shown that all of them have.
        variants: name -> whose gallery and which of its columns, as of :class:`leaderboard.site.Chapter`.
        count: images side by side at most, in the order given; none is selected.

    Returns:
        The grid, or None where there is nothing to show.

    Raises:
        ValueError: an image cannot be read.
    """
    if not galleries:
        return None
    subject = min(one.subject for one in galleries)
    by_owner: dict[str, dict[int | str, Gallery]] = {}
    for one in galleries:
        if one.subject == subject:
            by_owner.setdefault(one.variant, {})[one.image_id] = one
    owner, first = next(iter(by_owner.items()))
    shown = [image for image in first if all(image in images for images in by_owner.values())][:count]
    if not shown:
        return None

    def row(owner: str, kind: str) -> np.ndarray:
        return np.stack([_pixels(by_owner[owner][image], kind) for image in shown])

    made = {name: place for name, place in variants.items() if place[0] in by_owner and place[1] in TITLES}
    if len(made) < 2:
        return contact_sheet({title: row(owner, kind) for kind, title in TITLES.items()})
    return contact_sheet({TITLES["seen"]: row(owner, "seen"), **{name: row(*place) for name, place in made.items()}})


def _pixels(one: Gallery, kind: str) -> np.ndarray:
    path = getattr(one, kind)
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error
