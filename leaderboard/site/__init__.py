"""The static site: ranked tables with filters, a page a run, a page a pair.

``index.html`` and the pages beside it work from ``file://`` and from any web server, and ask for nothing but files of
their own folder. Everything that comes from outside (names, notes, ids) is escaped, and the pages' policy lets no
script run that stands in their text.

    index.html       every leaderboard, and what papers printed
    run-ID.html      one for each row: scores and their spread, images, cost, settings, manifest
    pair.html        any two rows of a leaderboard, image by image
    page.css, *.js   how pages look and behave
    images/          sheets of images, named by their content
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from leaderboard.schema import row_id, write_atomically
from leaderboard.site.board import SHOWN, board
from leaderboard.site.chapters import Axis, Chapter, Gallery
from leaderboard.site.html import ASSETS, resource
from leaderboard.site.pair_page import pair_page, paired, telling
from leaderboard.site.pictures import THUMBNAIL, Pictures
from leaderboard.site.run_page import run_page

__all__ = ["SHOWN", "THUMBNAIL", "Axis", "Chapter", "Gallery", "build_report", "telling"]

_RUN_PAGE = re.compile(r"run-[a-z0-9-]*[0-9a-f]{8}\.html")


def build_report(out: Path, chapters: Sequence[Chapter], *, title: str, about: str = "") -> Path:
    """Write the site of one leaderboard or several into ``out`` and return its first page's path.

    Every file is replaced when it is whole: images first, then the pages of runs and pairs, the first page, and what it
    no longer shows is removed last.

    Raises:
        ValueError: no chapter, or an image is missing or unreadable; the message names the file.
    """
    if not chapters:
        raise ValueError("a report needs at least one chapter")
    pictures = Pictures(out / "images")
    places = [pictures.place(chapter.galleries) for chapter in chapters]
    pages: dict[str, str] = {}
    with_pairs = [{row_id(row) for row in paired(chapter)} for chapter in chapters]
    for chapter, own, ids in zip(chapters, places, with_pairs, strict=True):
        for row in chapter.ranking.rows:
            if (name := f"run-{row_id(row)}.html") not in pages:  # a row may stand in several chapters
                pages[name] = run_page(chapter, row, own, ids)
    pages["pair.html"] = pair_page(chapters, places, title)
    pages |= {name: resource(name) for name in ASSETS}
    pages["index.html"] = board(chapters, places, with_pairs, title, about)
    for name, text in pages.items():
        write_atomically(out / name, text.encode())
    for page in out.glob("run-*.html"):
        if _RUN_PAGE.fullmatch(page.name) and page.name not in pages:
            page.unlink()
    pictures.clean()
    return out / "index.html"
