"""The page of an analysis: one file with its style, script, maps and pictures, which asks for nothing else."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmark.analyze.attention import Analysis, Grid, two_digits
from benchmark.analyze.figures import VIEWS, colours, main_grids, outstanding, places_on_sheet, seen_from, shades
from benchmark.store import write_text
from methods.brain_it.attention import Agreement

THUMBNAIL = 96
"""Longest side of a picture on the page, in pixels."""


def write(analysis: Analysis, path: Path) -> None:
    """Write the page; it replaces an older one when it is whole."""
    write_text(path, page(analysis))


def page(analysis: Analysis) -> str:
    """Return the page's HTML."""
    facts = {
        "variant": analysis.variant,
        "tokens": str(analysis.layout.n_clusters),
        f"{analysis.kind} images": str(len(analysis.ids)),
        "seen by subjects": ", ".join(map(str, analysis.shown)),
    }
    shown = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())
    options = "".join(
        f'<option value="{k}">{escape(grid.title)} ({grid.maps.shape[-1]} x {grid.maps.shape[-1]})</option>'
        for k, grid in enumerate(analysis.grids)
    )
    start = list(analysis.grids).index(main_grids(analysis)[1])
    # "</" ends a script wherever it stands.
    data = json.dumps(_data(analysis), separators=(",", ":")).replace("</", "<\\/")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>Brain Tokens: {escape(analysis.variant)}</title>\n"
        f"<style>\n{_resource('page.css')}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>What each Brain Token contributes to</h1>\n"
        "<p>Each square is one token, the summary of one cluster of voxels: where in the image are the features that "
        "read from it? Bright are the places that attend to the token most, averaged over blocks, heads and images. "
        "Squares lie near the place that they serve; the colour of the frame says it too.</p>\n"
        f'<dl class="facts">{shown}</dl>\n'
        '<form class="choose"><label>maps of <select id="grid" autocomplete="off" '
        f'data-start="{start}">{options}</select></label> '
        '<label>order <select id="order" autocomplete="off"><option value="place">by place</option>'
        '<option value="contents">by likeness of contents</option></select></label></form>\n'
        '<div class="work">\n<div id="tokens" role="group" aria-label="Brain Tokens"></div>\n'
        '<aside id="detail" aria-live="polite"><p class="soft">Point at a token, or tap it.</p></aside>\n</div>\n'
        f'{_findings(analysis)}</main>\n<script type="application/json" id="data">{data}</script>\n'
        f"<script>\n{_resource('page.js')}</script>\n</body>\n</html>\n"
    )


def _findings(analysis: Analysis) -> str:
    """Return the table of what the maps agree with, and how well chance would do."""
    if analysis.anatomy is None:
        return f'<p class="soft">{escape(analysis.sentences()[-2])}.</p>\n'

    def cells(found: Agreement | None) -> str:
        if found is None:
            return "<td></td><td></td><td></td>"
        value, chance, high = map(two_digits, (found.value, found.chance, found.chance_high))
        return f"<td>{value}</td><td>{chance}; {high}</td><td>{found.p:.2g}</td>"

    rows = "".join(
        f'<tr><th scope="row">{escape(grid.title)}</th>{cells(grid.contralateral)}{cells(grid.fields)}</tr>'
        for grid in analysis.grids
    )
    three = '<th scope="col">r</th><th scope="col">chance; 95 %</th><th scope="col">p</th>'
    return (
        '<h2 id="findings">What the maps agree with</h2>\n'
        "<p>Contralateral: the more of a token's voxels lie on the right hemisphere, the further left lies its map "
        "(correlation over tokens). Receptive fields, known of a simulated brain: a token's map lies over the mean "
        "receptive field of its voxels (correlation over places, mean of the tokens). Chance: tokens paired at random, "
        f"their mean and 95th percentile. {escape(_capital(analysis.sentences()[-1]))}.</p>\n"
        '<div class="scroll" role="region" aria-labelledby="findings" tabindex="0"><table>\n<thead>'
        '<tr><td></td><th colspan="3" scope="colgroup">contralateral</th>'
        '<th colspan="3" scope="colgroup">receptive fields</th></tr>'
        f'<tr><th scope="col">maps of</th>{three}{three}</tr></thead>\n<tbody>{rows}</tbody>\n</table></div>\n'
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _resource(name: str) -> str:
    return files("benchmark.analyze").joinpath(name).read_text(encoding="utf-8")


def _data(analysis: Analysis) -> dict[str, Any]:
    """Return what the script draws: bytes as base64."""
    used = sorted(set(analysis.selectivity.top.ravel().tolist()))
    number = {image: k for k, image in enumerate(used)}
    right = analysis.right
    light = [
        np.rint(255 * outstanding(analysis, token, image)).astype(np.uint8)
        for token, top in enumerate(analysis.selectivity.top.tolist())
        for image in top
    ]
    return {
        "subjects": list(analysis.subjects),
        "grids": [_grid(grid) for grid in analysis.grids],
        "tokens": [
            {
                "voxels": own.tolist(),
                "right": None if right is None or np.isnan(right[token]) else round(float(right[token]), 3),
                "likeness": round(float(analysis.selectivity.z[token]), 2),
                "top": [number[image] for image in analysis.selectivity.top[token].tolist()],
            }
            for token, own in enumerate(analysis.voxels)
        ],
        "light": {"side": analysis.by_image.shape[-1], "values": _bytes(np.stack(light))},
        "images": [_thumbnail(analysis.images[image]) for image in used],
        "names": [f"image {analysis.ids[image]}" for image in used],
        "cortex": _cortex(analysis),
    }


def _grid(grid: Grid) -> dict[str, Any]:
    where, columns = places_on_sheet(grid.maps)
    return {
        "side": grid.maps.shape[-1],
        "columns": columns,
        "places": where.tolist(),
        "colours": [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in colours(grid.maps)],
        "share": [[float(f"{value:.3g}") for value in (one.min(), one.max())] for one in grid.maps],
        "values": _bytes(np.stack([shades(one) for one in grid.maps])),
    }


def _cortex(analysis: Analysis) -> dict[str, Any] | None:
    """Return where one subject's voxels are, and whose clusters."""
    if analysis.anatomy is None or analysis.anatomy.coordinates is None:
        return None
    subject = analysis.shown[0]
    labels = analysis.labels[analysis.layout.rows(analysis.subjects.index(subject))]
    views = {}
    for view in VIEWS:
        points, order = seen_from(analysis, subject, view)
        where = np.rint(points[order] * 65535).astype("<u2")
        views[view] = {"points": _bytes(where), "labels": _bytes(labels[order].astype("<u2"))}
    return {"subject": subject, "views": views}


def _bytes(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _thumbnail(image: np.ndarray) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
