from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

import leaderboard
from leaderboard.schema import row_id
from leaderboard.site import Axis
from leaderboard.site.charts import tick_label, ticks
from metrics.cards import CARDS

FILES = ("images", "index.html", "leaderboard.json", "page.css", "page.js", "pair.html", "pair.js")
EVIL = "<script>alert('x')</script>&\"--><b>"
VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """Checks that elements nest, and collects what a test asks about."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text, self.script = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice: {names}"
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.script if self.open and self.open[-1] in ("script", "style") else self.text).append(data)

    def all(self, tag, **attributes):
        return [
            found
            for name, found in self.elements
            if tag in (None, name) and all(found.get(key.rstrip("_")) == value for key, value in attributes.items())
        ]


@pytest.fixture(scope="module")
def made(tmp_path_factory, sweep):
    pictures = tmp_path_factory.mktemp("pictures")
    fake = sweep(pictures, {"clusters=8": 8, "clusters=64": 64, "clusters=512": 512})
    out = tmp_path_factory.mktemp("made") / "site"
    ranking = leaderboard.build(out, fake.rows, fake.per_image, fake.galleries, fake.axis, fake.notes, title="A sweep")
    return out, fake, ranking


@pytest.fixture
def built(made, tmp_path):
    out, fake, ranking = made
    return shutil.copytree(out, tmp_path / "site"), fake, ranking


def _images(page_text):
    return re.findall(r"url\('([^']+)'\)", page_text)


def test_build_writes_the_leaderboard_and_returns_the_ranking(built):
    out, fake, ranking = built
    runs = [f"run-{row_id(row)}.html" for row in ranking.rows]
    assert {path.name for path in out.iterdir()} == {*FILES, *runs}
    rows = leaderboard.read_leaderboard(out / "leaderboard.json")
    assert rows == list(ranking.rows)
    assert {row.variant for row in rows} == {row.variant for row in fake.rows}
    assert list(json.loads((out / "leaderboard.json").read_text())) == ["rows"]


def test_the_page_asks_for_nothing_but_its_own_images(built):
    out, *_ = built
    named = set()
    for path in out.glob("*.html"):
        text = path.read_text()
        page = Page(text)
        assert "url(http" not in text and not page.all("img") and not page.all("iframe")
        assert [link["href"] for link in page.all("link")] == ["data:,", "page.css"]
        policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
        assert policy.startswith("default-src 'none'; script-src 'self' file:;")
        for script in page.all("script"):
            assert script.get("src") in ("page.js", "pair.js") or script.get("type") == "application/json"
        for link in page.all("a"):
            name, _, part = link["href"].partition("#")
            assert not name or (out / name).is_file(), link["href"]
            assert name or part == "main" or page.all(None, id=part), f"{link['href']} leads nowhere in {path.name}"
        named |= set(_images(text))
    data = re.search(r'id="data">(.*?)</script>', (out / "pair.html").read_text(), re.S)
    assert {
        name
        for group in json.loads(data[1])
        for row in group["rows"]
        for name in (row["pictures"] or {"sheets": []})["sheets"]
    } == {image.removeprefix("images/") for image in named}
    assert named and all(re.fullmatch(r"images/[0-9a-f]{20}\.png", image) for image in named)
    assert {path.name for path in (out / "images").iterdir()} == {image.removeprefix("images/") for image in named}
    for name in ("page.js", "pair.js", "page.css"):
        code = re.sub(r"(?m)^\s*//.*$|; // .*$", "", (out / name).read_text()).replace("http://www.w3.org/2000/svg", "")
        assert "//" not in code and "fetch" not in code and "@import" not in code and "XMLHttp" not in code


def test_images_stand_where_the_page_looks_for_them(built):
    out, fake, _ = built
    text = (out / "index.html").read_text()
    blocks = re.findall(
        r'data-block="(\d+)/(\d+)".*?--seen:url\(\'(.*?)\'\);--made:url\(\'(.*?)\'\);--rows:(\d+)', text
    )
    assert len(blocks) == 3 * 2
    options = [
        name
        for name in re.findall(r"<option value=\"\d+\">([^<]+)", text.split('class="images"')[1])
        if "subject" not in name
    ]
    for number, subject, seen, made, rows in blocks:
        items = [g for g in fake.galleries if (g.variant, g.subject) == (options[int(number)], int(subject))]
        assert len(items) == int(rows) == 3
        with Image.open(out / seen) as left, Image.open(out / made) as right:
            for index, item in enumerate(items):
                top = 64 * index
                assert left.crop((0, top, 64, top + 64)).tobytes() == Image.open(item.seen).tobytes()
                for column, name in enumerate(("lowlevel", "semantic", "combined")):
                    cell = right.crop((64 * column, top, 64 * column + 64, top + 64))
                    assert cell.tobytes() == Image.open(getattr(item, name)).tobytes()
    assert len({seen for _, _, seen, _, _ in blocks}) == 1  # the same seen images are stored once


def test_every_image_is_described_and_carries_its_pixcorr(built):
    out, fake, ranking = built
    page = Page((out / "index.html").read_text())
    cells = page.all("i", role="img")
    assert len(cells) == 4 * len(fake.galleries)
    assert cells[0]["aria-label"] == "image 100, seen"
    best = ranking.entries[0].row
    expected = fake.values[best.key]["PixCorr"][0, 0]
    first = next(i for i, t in enumerate(page.text) if t == "r 0.250")
    assert [t for t in page.text[first : first + 6] if t.startswith("r ")][2] == f"r {expected:.3f}"


def test_the_best_variant_is_shown_first_and_the_others_are_hidden(built):
    out, _, ranking = built
    page = Page((out / "index.html").read_text())
    blocks = page.all("section", class_="gallery")
    assert [("hidden" in block) for block in blocks] == [False] + [True] * 5
    assert blocks[0]["aria-label"] == f"{ranking.entries[0].row.variant}, subject 1"
    assert [found["name"] for found in page.all("select")][-2:] == ["variant", "subject"]


def test_the_table_has_sections_headings_that_sort_and_stand_in_notes(built):
    out, fake, ranking = built
    text = (out / "index.html").read_text()
    table = text.split("<table data-sortable>")[1].split("</table>")[0]
    page = Page(f"<table>{table}</table>")
    headings = page.all("th", scope="col")
    assert len(headings) == len(page.all("button")) == 4 + 11
    assert [heading["data-first"] for heading in headings[4:]] == [
        "descending" if CARDS[key].direction == "higher" else "ascending" for key in ranking.metrics
    ]
    assert sum("aria-sort" in heading for heading in headings) == 1
    assert "of 24; stand-in EfficientNet-Lite2, pooled" in page.text
    assert ranking.sentence[1:] in text
    ranked, reference = table.split("<tbody data-ranked>")[1].split("<tbody>")
    assert all(name in ranked for name in ("clusters=8", "clusters=64", "clusters=512"))
    assert "Reference (not ranked)" in reference and "mean image" not in ranked


def test_curves_have_a_panel_a_metric_and_a_point_a_variant(built):
    out, *_ = built
    page = Page((out / "index.html").read_text())
    panels = page.all("svg", role="img")
    assert len(panels) == 11
    assert panels[0]["aria-label"].startswith("PixCorr against clusters. 8: 0.")
    assert len(page.all("circle", class_="dot")) == 33
    assert len(page.all("path", class_="bar")) == 33
    for circle in page.all("circle"):
        assert 40 <= float(circle["cx"]) <= 252 and 8 <= float(circle["cy"]) <= 130


def test_everything_from_outside_is_escaped(tmp_path, sweep):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    fake = sweep(pictures, {EVIL: 8, "clusters=64": 64})
    rows = [row.model_copy(update={"notes": EVIL, "protocol": EVIL, "method": row.method}) for row in fake.rows]
    galleries = [replace(item, image_id=EVIL) for item in fake.galleries]
    notes = {"CLIP": EVIL, EVIL: EVIL}
    leaderboard.build(
        tmp_path / "site",
        rows,
        fake.per_image,
        galleries,
        Axis(EVIL, fake.axis.values),
        notes,
        title=EVIL,
        about=EVIL,
        n_resamples=20,
    )
    for path in (tmp_path / "site").glob("*.html"):
        text = path.read_text()
        page = Page(text)
        scripts = [script.get("src", script.get("type")) for script in page.all("script")]
        assert scripts == (["pair.js", "application/json"] if path.name == "pair.html" else ["page.js"])
        assert "<script>" not in text and "alert('x')" not in text.split('id="data"')[0]
    text = (tmp_path / "site" / "index.html").read_text()
    page = Page(text)
    assert "<script>" not in text and EVIL in page.text
    assert any(found.get("aria-label") == f"image {EVIL}, seen" for found in page.all("i"))


def test_building_again_is_stable_drops_old_images_and_keeps_what_is_not_its_own(built):
    out, fake, _ = built
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / "images" / "mine.png").write_bytes(b"")
    leaderboard.build(out, fake.rows, fake.per_image, fake.galleries, fake.axis, fake.notes, title="A sweep")
    assert {path: path.read_bytes() for path in before} == before
    leaderboard.build(out, fake.rows, fake.per_image, fake.galleries[:2], fake.axis, fake.notes)
    shown = {path.name for path in out.iterdir()}
    leaderboard.build(out, fake.rows[1:], fake.per_image, fake.galleries[2:4], fake.axis, fake.notes)
    assert shown - {path.name for path in out.iterdir()} == {f"run-{row_id(fake.rows[0])}.html"}
    leaderboard.build(out, fake.rows, fake.per_image, fake.galleries[:2], fake.axis, fake.notes)
    left = {path.name for path in (out / "images").iterdir()} - {"mine.png"}
    assert left == {image.removeprefix("images/") for image in _images((out / "index.html").read_text())}
    assert len(left) == 2 and (out / "images" / "mine.png").exists()


def test_a_page_of_rows_alone(tmp_path, row):
    ranking = leaderboard.build(tmp_path, [row("a", {"SSIM": 0.4}), row("b", {"SSIM": 0.3})])
    page = Page((tmp_path / "index.html").read_text())
    assert ranking.entries[0].row.variant == "a"
    assert not page.all("section", class_="gallery") and not page.all("svg")
    assert "No scores of single images were kept" in "".join(
        Page((tmp_path / f"run-{row_id(ranking.rows[0])}.html").read_text()).text
    )
    assert not (tmp_path / "images").exists()


def test_a_gallery_image_that_cannot_be_read_is_named_and_the_old_page_stays(built, tmp_path):
    out, fake, _ = built
    before = (out / "index.html").read_bytes()
    broken = tmp_path / "broken.png"
    broken.write_bytes(fake.galleries[0].seen.read_bytes()[:100])
    for path in (broken, tmp_path / "absent.png"):
        with pytest.raises(ValueError, match=f"{path.name}: not a readable image"):
            leaderboard.build(out, fake.rows, None, [replace(fake.galleries[0], combined=path)])
    assert (out / "index.html").read_bytes() == before
    assert leaderboard.read_leaderboard(out / "leaderboard.json")


def test_large_images_become_thumbnails(tmp_path, row):
    for name in ("seen", "lowlevel", "semantic", "combined"):
        Image.new("RGB", (425, 425), "red" if name == "seen" else "blue").save(tmp_path / f"{name}.png")
    item = leaderboard.Gallery(
        "a", 1, 7, *(tmp_path / f"{name}.png" for name in ("seen", "lowlevel", "semantic", "combined"))
    )
    leaderboard.build(tmp_path / "site", [row("a", {"SSIM": 0.4})], None, [item])
    sizes = {Image.open(path).size for path in (tmp_path / "site" / "images").iterdir()}
    assert sizes == {(192, 192), (576, 192)}


@pytest.mark.parametrize(("low", "high"), [(0.31, 0.36), (0, 1), (-0.02, 0.01), (0.5, 0.5), (0.499, 0.501), (0.1, 7)])
def test_ticks_are_round_few_and_span_the_values(low, high):
    marks = ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high
    assert 2 <= len(marks) <= 6
    labels = [tick_label("SSIM", mark, marks) for mark in marks]
    assert len(set(labels)) == len(labels)
    assert [float(label) for label in labels] == pytest.approx(marks)
