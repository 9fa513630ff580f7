"""The site as a visitor meets it, in a real Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from leaderboard.schema import row_id
from metrics.cards import CARDS

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
LOOK = (Path(__file__).parent / "look.js").read_text()
TABLE = "#part0 table[data-sortable]:not(.costs)"


@pytest.fixture
def visit(browser: Any, site: SimpleNamespace) -> Iterator[Any]:
    """Open pages; afterwards each has said nothing on the console and asked for nothing outside the site's folder."""
    opened = []

    def go(name: str = "index.html", part: str = "", **look: Any) -> Any:
        page = browser.open((site.out / name).as_uri() + part, **look)
        opened.append(page)
        return page

    yield go
    folder = site.out.as_uri() + "/"
    for page in opened:
        assert page.problems == []
        assert page.requests and [url for url in page.requests if not url.startswith((folder, "data:,"))] == []
        assert page.do("window.hacked === undefined"), "a stranger's name ran as a script"
        page.close()


def column(page: Any, k: int, table: str = TABLE) -> list[str]:
    rows = f"{table} tbody[data-ranked] tr"
    return page.do(f"[...document.querySelectorAll('{rows}')].map((row) => row.cells[{k}].dataset.value)")


def shown(page: Any, selector: str) -> int:
    return page.do(
        f"[...document.querySelectorAll({json.dumps(selector)})].filter((one) => one.checkVisibility()).length"
    )


def test_a_heading_sorts_and_says_so(visit: Any) -> None:
    page = visit()
    heading = f"{TABLE} thead th:nth-child(5)"  # PixCorr
    assert page.do(f"document.querySelector('{heading} button').textContent") == "PixCorr ↑"
    before = column(page, 4)
    page.click(f"{heading} button")
    assert page.do(f"document.querySelector('{heading}').getAttribute('aria-sort')") == "descending"
    after = [float(value) for value in column(page, 4)]
    assert after == sorted(map(float, before), reverse=True) and len(set(after)) == 5
    page.click(f"{heading} button")
    assert [float(value) for value in column(page, 4)] == sorted(after)
    assert page.do(f"document.querySelectorAll('{TABLE} [aria-sort]').length") == 1
    page.click(f"{TABLE} thead th:first-child button")
    names = column(page, 0)
    assert names[1:] == ["clusters=8", "clusters=32", "clusters=128", "clusters=512"], "numbers in names count"
    sections = page.do(f"[...document.querySelectorAll('{TABLE} tr.group')].map((row) => row.textContent.trim())")
    assert sections == ["Reference (not ranked)"], "sections stay"
    unprinted = page.do(
        "const table = document.querySelector('#published table'); table.querySelector('thead th:nth-child(5) button').click(); "
        "return [...table.tBodies[0].rows].map((row) => row.cells[4].dataset.value);"
    )
    values = [float(value) for value in unprinted if value]
    assert values == sorted(values, reverse=True) and "" not in unprinted[: len(values)], (
        "rows without a value come last"
    )


def test_filters_leave_the_rows_that_have_all_that_is_chosen(visit: Any) -> None:
    page = visit()
    status = "document.querySelector('.filters [role=status]').textContent"
    everything = page.do(status)
    assert everything.split()[0] == everything.split()[2]
    page.choose(".filters [name=track]", "demo")
    assert shown(page, "#part0 tbody tr:not(.group)") and not shown(page, "#part1") and not shown(page, "#published")
    page.choose(".filters [name=track]", "paper")
    page.choose(".filters [name=amount]", "1 h")
    assert not shown(page, "#part0") and shown(page, "#part1 tbody[data-ranked] tr") == 1
    page.choose(".filters [name=rows]", "published")
    assert shown(page, "#part1 tbody[data-ranked] tr") == 0
    amounts = "[...new Set([...document.querySelectorAll('#published tbody tr')].filter((r) => r.checkVisibility()).map((r) => r.cells[1].textContent))]"
    assert page.do(amounts) == ["1h"]
    page.choose(".filters [name=protocol]", "mindeye2")
    page.choose(".filters [name=subjects]", "1, 2, 5, 7")
    assert shown(page, "#published .protocol") == 1
    count = int(page.do(status).split()[0])
    assert count == shown(page, "tbody tr:not(.group)")
    page.choose(".filters [name=protocol]", "mindbridge")
    page.choose(".filters [name=rows]", "own")
    assert page.do(status).startswith("0 of") and shown(page, ".none") == 1
    page.click(".filters [type=reset]")
    page.until(f"{status} === {json.dumps(everything)}")


def test_published_rows_stand_beside_ours_on_the_paper_track_only_and_without_a_rank(visit: Any) -> None:
    page = visit()
    group = page.do("[...document.querySelectorAll('#part1 tr.group')].map((row) => row.textContent.trim())")
    assert group == ["As printed, under protocol brain-it (not ranked: whether on the same images is not known)"]
    assert page.do("document.querySelectorAll('#part0 [data-rows=published]').length") == 0
    beside = "[...document.querySelectorAll('#part1 [data-rows=published]')]"
    assert page.do(f"{beside}.length") > 5 and page.do(f"{beside}.every((row) => row.cells[1].dataset.value === '')")
    assert page.do("document.querySelectorAll('#published tbody tr').length") == 121
    assert "No number here compares with one of the demo track" in page.do(
        "document.querySelector('#published .verdict').textContent"
    )
    assert "axes of their own" in page.do("document.querySelector('#part0').textContent")
    heading = "[...document.querySelectorAll('th')].filter((th) => /^CLIP ↑/.test(th.textContent)).map((th) => th.closest('.chapter').id + th.textContent)"
    assert "part0CLIP ↑stand-in EfficientNet-Lite2, pooled" in page.do(heading)
    assert "publishedCLIP ↑" in page.do(heading)


def test_a_run_has_a_page(visit: Any, site: SimpleNamespace) -> None:
    page = visit()
    page.click(f"{TABLE} a[href*='clusters-128']")
    page.until("location.pathname.includes('run-demo') && document.readyState === 'complete'")
    assert page.do("document.querySelector('h1').textContent") == "clusters=128"
    text = page.do("document.body.innerText")
    for part in (
        "Scores of single images",
        "clustering.n_clusters",
        "0123abc",
        "16.4 min",
        "torch",
        "Seen and reconstructed",
    ):
        assert part in text
    assert page.do("document.querySelectorAll('.curves svg[role=img]').length") == len(CARDS)
    assert shown(page, ".gallery i") == 6 * 4
    page.click(".back a")
    page.until("location.pathname.endsWith('index.html') && document.readyState === 'complete'")


def gains(site: SimpleNamespace, a: str, b: str, metric: str) -> dict[str, float]:
    """The gain of A over B, from the scores themselves."""
    data = site.scores
    m = data.metrics.index(metric)
    first, second = (data.values[data.row(("Brain-IT", name)), m] for name in (a, b))
    sign = 1 if CARDS[metric].direction == "higher" else -1
    return {
        f"image {image}, subject {subject}": sign * float(first[s, k] - second[s, k])
        for s, subject in enumerate(data.subjects)
        for k, image in enumerate(data.image_ids)
    }


def cards(page: Any) -> list[str]:
    return page.do("[...document.querySelectorAll('.card h3')].map((one) => one.firstChild.textContent)")


def test_two_chosen_rows_open_their_pair_by_keyboard_alone(visit: Any, site: SimpleNamespace) -> None:
    page = visit()
    page.press("Tab")
    assert page.do("document.activeElement.className") == "skip", "the first stop leads past everything"
    chosen = []
    for _ in range(120):
        page.press("Tab")
        name = page.do("document.activeElement.dataset?.name ?? ''")
        outline = page.do("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", "what has the focus is seen"
        if name in ("clusters=8", "clusters=512"):
            page.press(" ")
            chosen.append(name)
        if len(chosen) == 2:
            break
    assert len(chosen) == 2
    assert page.do("document.querySelector('.picked p').textContent") == f"{chosen[0]} and {chosen[1]}"
    for _ in range(20):
        page.press("Tab")
        if page.do("document.activeElement.matches('.picked a')"):
            break
    assert page.do("document.activeElement.matches('.picked a')"), "not far from the table"
    page.press("Enter")
    page.until("location.pathname.endsWith('pair.html') && document.querySelectorAll('.card').length > 0")
    assert page.do("document.querySelector('h1').textContent") == f"A {chosen[0]} against B {chosen[1]}"
    assert page.do("document.title") == f"{chosen[0]} – {chosen[1]}"


def test_a_pair_shows_the_most_changed_the_best_and_the_worst_images_first(visit: Any, site: SimpleNamespace) -> None:
    ids = {row.variant: row_id(row) for row in site.rows}
    page = visit("pair.html", f"#a={ids['clusters=128']}&b={ids['clusters=8']}")
    assert page.do("document.querySelectorAll('.card').length") == 12
    told = page.do(
        "[...document.querySelectorAll('.card .three figure:nth-child(2)')].every((one) => one.textContent === 'A clusters=128')"
    )
    assert told and shown(page, ".card i") == 36
    metric = "LPIPS"  # lower is better
    page.choose("#pair h2 ~ .choose label:nth-of-type(2) select", str(list(site.scores.metrics).index(metric)))
    own = gains(site, "clusters=128", "clusters=8", metric)
    for order, key in (("changed", abs), ("best", float), ("worst", lambda gain: -gain)):
        page.choose("#pair h2 ~ .choose label:nth-of-type(1) select", order)
        assert cards(page) == sorted(own, key=lambda name: -key(own[name]))[:12], order
    page.click("#pair > button")
    assert page.do("document.querySelectorAll('.card').length") == 32
    assert page.do("document.activeElement === document.querySelectorAll('.card')[12]"), (
        "the keyboard goes on where it was"
    )
    page.choose("#pair h2 ~ .choose label:nth-of-type(3) select", "2")
    assert all(name.endswith("subject 2") for name in cards(page))
    page.click(".card summary")
    page.until("document.querySelectorAll('.card table tbody tr').length")
    assert page.do("document.querySelectorAll('.card table tbody tr').length") == len(CARDS)


def test_a_pair_can_be_turned_round_and_left_again(visit: Any, site: SimpleNamespace) -> None:
    ids = {row.variant: row_id(row) for row in site.rows}
    page = visit("pair.html", f"#a={ids['clusters=128']}&b={ids['clusters=8']}")
    difference = "document.querySelector('#pair table tbody tr').cells[3].textContent"
    before = page.do(difference)
    page.click("#pair .choose button")
    page.until("document.querySelector('h1').textContent === 'A clusters=8 against B clusters=128'")
    after = page.do(difference)
    assert float(after) == -float(before)
    data = site.scores
    mean = [np.nanmean(data.values[data.row(("Brain-IT", name)), 0]) for name in ("clusters=8", "clusters=128")]
    assert float(after) == pytest.approx(mean[0] - mean[1], abs=6e-4)
    assert page.do("document.activeElement.textContent") == "Swap A and B"
    page.do("history.back();")
    page.until("document.querySelector('h1').textContent === 'A clusters=128 against B clusters=8'")
    page.choose("#pair .choose label:nth-of-type(2) select", "0")
    page.until("location.hash.includes('b=')")


def test_cost_and_images_follow_what_is_chosen(visit: Any) -> None:
    page = visit()
    assert page.do("document.querySelectorAll('.scatter svg .dot').length") == 5
    spoken = "document.querySelector('.scatter svg').getAttribute('aria-label')"
    assert page.do(spoken).startswith("PixCorr ↑ against wall-clock time")
    page.choose(".scatter [name=cost]", "2")
    page.choose(".scatter [name=metric]", "5")
    assert page.do(spoken).startswith("CLIP ↑ against trained parameters")
    before = page.do("document.querySelector('.gallery:not([hidden])').dataset.block")
    page.choose(".images [name=subject]", "2")
    assert page.do("document.querySelector('.gallery:not([hidden])').dataset.block") == before.replace("/1", "/2")


def test_without_its_script_the_page_is_still_a_table(browser: Any, site: SimpleNamespace) -> None:
    page = browser.open("about:blank")
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    page.go((site.out / "index.html").as_uri())
    assert shown(page, f"{TABLE} tbody tr") > 5
    page.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_kind_of_page_can_be_read_by_everyone(visit: Any, site: SimpleNamespace, width: int, dark: bool) -> None:
    run = next(f"run-{row_id(row)}.html" for row in site.rows if row.variant == "clusters=128")
    evil = next(f"run-{row_id(row)}.html" for row in site.rows if "hacked" in row.variant)
    for name in ("index.html", "pair.html", run, evil):
        page = visit(name, width=width, dark=dark, phone=width == 390)
        page.do("for (const one of document.querySelectorAll('details')) one.open = true;")
        assert page.do(f"{LOOK} return lookAtPage();") == [], name
        assert page.do(f"{LOOK} return lookAtContrast();") == [], name
