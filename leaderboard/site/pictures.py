"""Images joined into sheets, one for so many images of a variant and subject, and named by their content.

Few files, and equal images once. A page shows an image as a window on a sheet.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from leaderboard.schema import write_atomically
from leaderboard.site.chapters import Gallery

THUMBNAIL = 192
"""Longest side of an image on the page, in pixels; smaller images stay as they are."""

MADE = ("lowlevel", "semantic", "combined")
COLUMNS = {"seen": "seen", "lowlevel": "low-level", "semantic": "semantic", "combined": "combined"}

_ROWS = 24  # of a sheet: browsers on phones shrink pictures that are much larger
_NAME = re.compile(r"[0-9a-f]{20}\.png")


@dataclass(frozen=True)
class Place:
    """Where an image lies: the sheets of seen and of made images, its row on both, and how many these have."""

    seen: str
    made: str
    row: int
    rows: int

    @property
    def down(self) -> str:
        """The row as a background's position."""
        return f"{100 * self.row / (self.rows - 1):.4f}%" if self.rows > 1 else "0"


class Pictures:
    """The sheets of a site in ``folder``, written as images are placed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.used: set[str] = set()

    def place(self, galleries: Iterable[Gallery]) -> dict[tuple[str, int, str], Place]:
        """Write the sheets of these images; return (variant, subject, image id) -> where each lies.

        Raises:
            ValueError: an image is missing or unreadable; the message names the file.
        """
        blocks: dict[tuple[str, int], list[Gallery]] = {}
        for item in galleries:
            blocks.setdefault((item.variant, item.subject), []).append(item)
        places = {}
        for (variant, subject), items in blocks.items():
            for start in range(0, len(items), _ROWS):
                part = items[start : start + _ROWS]
                seen = self._sheet([[item.seen] for item in part])
                made = self._sheet([[getattr(item, column) for column in MADE] for item in part])
                for row, item in enumerate(part):
                    places[variant, subject, str(item.image_id)] = Place(seen, made, row, len(part))
        return places

    def clean(self) -> None:
        """Delete sheets that no page shows any more; other files stay."""
        for image in self.folder.glob("*.png"):
            if _NAME.fullmatch(image.name) and image.name not in self.used:
                image.unlink()

    def _sheet(self, cells: Sequence[Sequence[Path]]) -> str:
        """Join images (rows of columns) into one PNG named by its content; return the file name."""
        images = [[_thumbnail(path) for path in row] for row in cells]
        side = max(max(image.size) for row in images for image in row)
        sheet = Image.new("RGB", (side * len(cells[0]), side * len(cells)))
        for down, row in enumerate(images):
            for across, image in enumerate(row):
                if image.size != (side, side):
                    image = image.resize((side, side), Image.Resampling.BICUBIC)
                sheet.paste(image, (across * side, down * side))
        buffer = io.BytesIO()
        sheet.save(buffer, format="PNG")
        name = hashlib.sha256(buffer.getvalue()).hexdigest()[:20] + ".png"
        if not (self.folder / name).exists():
            write_atomically(self.folder / name, buffer.getvalue())
        self.used.add(name)
        return name


def _thumbnail(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error
    rgb.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return rgb


def window(place: Place, column: str, image_id: object) -> str:
    """Return one image of a block whose style names the sheets (see :func:`sheets_style`)."""
    label = escape(f"image {image_id}, {COLUMNS[column]}")
    return f'<i class="{column}" role="img" aria-label="{label}" style="--y:{place.down}"></i>'


def sheets_style(place: Place) -> str:
    """Return the style of a block that shows images of ``place``'s sheets."""
    return f"--seen:url('images/{place.seen}');--made:url('images/{place.made}');--rows:{place.rows}"
