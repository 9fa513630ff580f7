from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from leaderboard.ranking import rank
from leaderboard.table import markdown, print_table, text
from metrics.cards import CARDS

GOLDEN = Path(__file__).parent / "golden"
NOTES = {
    "CLIP": "stand-in EfficientNet-Lite2, pooled",
    "CLIP-1000": "stand-in EfficientNet-Lite2, pooled",
    "images": "miniature NSD",
}


@pytest.fixture
def ranking(row):
    def value(mean, half=0.02):
        return {"mean": mean, "ci_low": mean - half, "ci_high": mean + half}

    return rank(
        [
            row(
                "clusters=8",
                {"PixCorr": value(0.25), "CLIP": value(0.75, 0.05), "CLIP-1000": value(0.25), "LPIPS": value(0.5)},
            ),
            row(
                "clusters=16",
                {"PixCorr": value(0.3), "CLIP": value(0.7, 0.05), "CLIP-1000": value(0.5), "LPIPS": value(0.4)},
            ),
            row("a|b *c*", {"PixCorr": value(-0.01, 0.005)}, notes="training stopped <early>"),
            row("clusters=8 low-level", {"PixCorr": value(0.35)}, kind="branch"),
            row("mean image", {"PixCorr": value(0.125)}, kind="reference"),
            row("chance", {"CLIP": 0.5, "CLIP-1000": 1 / 24}, kind="reference"),
        ]
    )


def test_markdown_is_as_it_was(ranking):
    assert markdown(ranking, NOTES) == (GOLDEN / "table.md").read_text(encoding="utf-8")


def test_terminal_table_is_as_it_was(ranking):
    assert text(ranking, NOTES) == (GOLDEN / "table.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_the_full_table_fits_and_shows_every_value(sweep, width):
    fake = sweep(None, {"clusters=8": 8, "clusters=16": 16, "clusters=512": 512})
    shown = text(rank(fake.rows, fake.per_image, n_resamples=50), fake.notes, width)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    for row in fake.rows:
        assert row.name in shown
        for key, value in row.metrics.items():
            assert CARDS[key].format(value.mean) in shown
    headings = [line for line in shown.splitlines() if "PixCorr" in line]
    assert len(headings) == 1
    if width >= 100:
        assert "LPIPS" in headings[0]


def test_branches_and_references_stand_in_sections_of_their_own(ranking):
    lines = text(ranking).splitlines()
    at = {
        name: next(i for i, line in enumerate(lines) if name in line)
        for name in ("clusters=16", "one branch", "reference")
    }
    assert (
        at["clusters=16"] < at["one branch"] < at["reference"] < next(i for i, t in enumerate(lines) if "chance" in t)
    )


def test_style_only_on_a_terminal(ranking):
    plain, styled = io.StringIO(), io.StringIO()
    print_table(ranking, NOTES, Console(file=plain))
    print_table(ranking, NOTES, Console(file=styled, force_terminal=True, width=120, color_system="standard"))
    assert "\x1b" not in plain.getvalue()
    assert "\x1b[1m0.300\x1b[0m" in styled.getvalue()
    assert "\x1b[2m.280–.320\x1b[0m" in styled.getvalue()


def test_names_are_not_read_as_markup(row):
    ranking = rank([row("[bold]x[/bold]", {"SSIM": 0.3}), row("[/]", {"SSIM": 0.2})])
    assert "[bold]x[/bold]" in text(ranking)
