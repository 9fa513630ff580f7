"""The page of the images that got worse: seen, baseline's and candidate's, the largest drop first. One file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from benchmark.check.output import footnotes, heading, signed, slot_notes
from benchmark.imagesets.wording import one_line
from benchmark.stages import image_name, seen_name
from leaderboard.gate import Check, Worse
from leaderboard.site import THUMBNAIL
from metrics.cards import CARDS, format_value

_COLUMNS = ("seen", "baseline", "candidate")


def worse_page(check: Check, baseline: Path | None, candidate: Path | None, count: int) -> str:
    """Return the page as HTML; it needs no other file.

    Args:
        check: what the gate found.
        baseline: folder of stage ``reconstruct`` with the baseline's images; None where they are not at hand.
        candidate: likewise.
        count: how many images at most.
    """
    shown = check.worse[:count]
    blocking = [f.metric for f in check.findings if f.role == "blocking"] or [f.metric for f in check.findings]
    total = len(check.worse)
    about = (
        f"{len(shown)} of {total} images (each subject counted) that the candidate reconstructs "
        "worse, the largest drop first: mean over the blocking metrics, each in standard deviations of its differences."
        if total
        else "No image got worse."
    )
    missing = [name for name, folder in (("baseline", baseline), ("candidate", candidate)) if folder is None]
    pictures = f" The images of the {' and the '.join(missing)} are not at hand." if missing and total else ""
    cards = "".join(_card(worse, blocking, {"baseline": baseline, "candidate": candidate}) for worse in shown)
    notes = "".join(f"<li>{escape(one_line(line, 1000))}</li>" for line in footnotes(check, slot_notes(check.protocol)))
    title = "Images that got worse"
    style = files("leaderboard").joinpath("page.css").read_text(encoding="utf-8")
    own = files("benchmark.check").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>\n{style}{own}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n"
        f"<p>candidate {escape(one_line(check.candidate, 300))}, baseline {escape(one_line(check.baseline, 300))}; "
        f"{escape(heading(check))}.</p>\n"
        f'<p class="verdict">{escape(check.sentence)}</p>\n<p class="soft">{about}{pictures}</p>\n{cards}'
        f'<ul class="notes">{notes}</ul>\n</main>\n</body>\n</html>\n'
    )


def _card(worse: Worse, blocking: list[str], folders: Mapping[str, Path | None]) -> str:
    name = f"image {one_line(worse.image_id, 60)}, subject {worse.subject}"
    rows = "".join(
        f"<tr{_mark(key, *worse.values[key])}><th scope='row'>{escape(key)} {CARDS[key].arrow}</th>"
        f"<td>{format_value(key, worse.values[key][0])}</td><td>{format_value(key, worse.values[key][1])}</td>"
        f"<td>{signed(key, worse.values[key][1] - worse.values[key][0])}</td></tr>"
        for key in blocking
        if key in worse.values
    )
    figures = "".join(
        f"<figure>{picture}<figcaption>{column}</figcaption></figure>"
        for column, picture in _pictures(worse, folders).items()
    )
    return (
        f'<section class="worse"><h2>{escape(name)} <small>drop {worse.drop:.2f}</small></h2>\n'
        f'<div class="beside">{figures}<table><thead><tr><th scope="col">metric</th><th scope="col">baseline</th>'
        f'<th scope="col">candidate</th><th scope="col">difference</th></tr></thead><tbody>{rows}</tbody></table></div>'
        "</section>\n"
    )


def _mark(key: str, baseline: float, candidate: float) -> str:
    return ' class="lost"' if CARDS[key].better(baseline, candidate) else ""


def _pictures(worse: Worse, folders: Mapping[str, Path | None]) -> dict[str, str]:
    """Return column -> an ``img``, for those that are there."""
    if not worse.image_id.isdigit():
        return {}
    image = int(worse.image_id)
    combined = Path("combined") / image_name(worse.subject, image)
    places = {name: folder / combined for name, folder in folders.items() if folder is not None}
    seen = [folder / "seen" / seen_name(image) for folder in folders.values() if folder is not None]
    if seen:
        places["seen"] = seen[0]
    found = {}
    for column in _COLUMNS:
        data = _thumbnail(places[column]) if column in places else None
        if data is not None:
            alt = escape(f"{column}, image {image}")
            found[column] = f'<img alt="{alt}" src="data:image/png;base64,{data}">'
    return found


def _thumbnail(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return None  # pictures are an extra: the numbers are there
    rgb.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    rgb.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
