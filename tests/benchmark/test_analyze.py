"""``python -m benchmark.analyze``: on the simulated brain, where the truth is known, and its files."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch.nn import functional as F

from benchmark.analyze.__main__ import main
from benchmark.analyze.figures import colours, places_on_sheet, shades
from benchmark.cli import main_guard
from benchmark.data.brain import (
    Features,
    Responder,
    Voxels,
    grow_brain,
    make_mesh,
    receptive_fields,
    surface_coordinates,
)
from benchmark.results import find_variant
from benchmark.stages.bit import build_bit, voxel_layout
from benchmark.stages.prepare import Prepared
from benchmark.store import read_json
from methods.brain_it.attention import contralaterality, cross_attention, field_agreement
from methods.brain_it.clustering import by_coordinates
from methods.brain_it.tokenizer import VoxelLayout
from methods.brain_it.transformer import BIT

pytestmark = pytest.mark.timeout(900)  # the first test that needs the small sweep waits for it

# --- the simulated brain, where every voxel's receptive field is known ------------------------------------------------

SIDE, CLUSTERS = 4, 24


@dataclass(frozen=True)
class Retina:
    """Two subjects see images whose places have nothing to do with each other; a BIT has learned to tell their colours.

    Pictures of scenes would not do: their left half tells what is in the right half, and a model may look at either.
    """

    maps: np.ndarray
    untrained: np.ndarray
    right: np.ndarray
    fields: np.ndarray
    explained: float


@pytest.fixture(scope="module")
def retina() -> Retina:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images, mesh = 800, make_mesh(240)
    brains = [grow_brain(mesh, counts, 0, s + 1, False) for s, counts in enumerate([(150, 160), (155, 145)])]
    recorded, patches = zip(*(_recorded(voxels, images, rng) for voxels in brains), strict=True)
    where = [surface_coordinates(mesh, h)[voxels.vertex[voxels.hemisphere == h]] for voxels in brains for h in (0, 1)]
    mapping = by_coordinates(np.concatenate(where), CLUSTERS)
    layout = VoxelLayout.build(mapping.per_subject([len(v) for v in brains]), CLUSTERS)
    bit = BIT(layout, dim=32, depth=1, heads=4, n_queries=SIDE**2, out_dim=3)
    with torch.no_grad():
        bit.tokenizer.voxel_embeddings.mul_(0.3 / bit.tokenizer.voxel_embeddings.std())

    betas = torch.zeros(2 * images, layout.max_voxels)
    for s, own in enumerate(recorded):
        betas[s * images : (s + 1) * images, : own.shape[1]] = torch.from_numpy(own)
    subject = torch.arange(2).repeat_interleave(images)
    targets = torch.from_numpy(np.concatenate(patches))
    held_out = torch.arange(2 * images) % images >= images - 60
    training = torch.nonzero(~held_out)[:, 0]
    test = betas[held_out], subject[held_out]
    before = cross_attention(bit.eval(), *test).numpy()

    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(bit.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, 600)
    for _ in range(600):
        pick = training[torch.randint(len(training), (32,), generator=generator)]
        optimiser.zero_grad()
        F.mse_loss(bit(betas[pick], subject[pick]), targets[pick]).backward()
        torch.nn.utils.clip_grad_norm_(bit.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    bit.eval()
    with torch.no_grad():
        explained = 1 - float(F.mse_loss(bit(*test), targets[held_out]))
    labels = mapping.labels
    fields = np.concatenate([receptive_fields(voxels, SIDE) for voxels in brains])
    sides = np.concatenate([voxels.hemisphere for voxels in brains])
    return Retina(
        maps=_maps(cross_attention(bit, *test).numpy()),
        untrained=_maps(before),
        right=np.array([sides[labels == c].mean() for c in range(CLUSTERS)]),
        fields=np.stack([fields[labels == c].mean(0).reshape(SIDE, SIDE) for c in range(CLUSTERS)]),
        explained=explained,
    )


def _recorded(voxels: Voxels, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return noisy answers to images of independent coloured squares, and the squares: n x places x 3."""
    squares = rng.standard_normal((count, 3, SIDE, SIDE)).astype(np.float32)
    colour = squares.repeat(32 // SIDE, 2).repeat(32 // SIDE, 3).reshape(count, 3, 32 * 32)

    def nothing(*shape: int) -> np.ndarray:
        return np.zeros((count, *shape), np.float32)

    features = Features(nothing(12, 1024), colour, nothing(24, 36), nothing(24, 36), nothing(16), None)
    responder = Responder(voxels)
    signal = responder.signal(responder.components(features))
    noise = rng.standard_normal(signal.shape).astype(np.float32)
    return signal + 0.7 * noise, squares.reshape(count, 3, -1).transpose(0, 2, 1)


def _maps(attention: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(attention.mean(0).T).reshape(CLUSTERS, SIDE, SIDE)


def test_maps_are_contralateral(retina: Retina) -> None:
    assert retina.explained > 0.25, "a model that predicts nothing has no map to speak of"
    found = contralaterality(retina.maps, retina.right)
    assert found.value > 0.6 and found.value > found.chance_high + 0.2 and found.p < 0.005
    halves = retina.maps[:, :, : SIDE // 2].sum((1, 2)) - retina.maps[:, :, SIDE // 2 :].sum((1, 2))
    assert (halves[retina.right > 0.9] > 0).mean() > 0.75, "the right hemisphere serves the left half"
    assert (halves[retina.right < 0.1] < 0).mean() > 0.75, "the left hemisphere serves the right half"


def test_a_tokens_map_lies_over_its_voxels_receptive_fields(retina: Retina) -> None:
    found = field_agreement(retina.maps, retina.fields)
    assert found.value > found.chance_high + 0.1 and found.p < 0.005
    assert found.each is not None and (found.each > 0).mean() > 0.7, "most tokens, not a few"


def test_both_were_learned(retina: Retina) -> None:
    trained, untrained = (contralaterality(m, retina.right).value for m in (retina.maps, retina.untrained))
    assert abs(untrained) < 0.5 < trained
    trained, untrained = (field_agreement(m, retina.fields).value for m in (retina.maps, retina.untrained))
    assert trained > untrained + 0.2


# --- the command ------------------------------------------------------------------------------------------------------


def call(*arguments: Any) -> int:
    return main_guard(lambda: main([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def made(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("analysis")
    assert call("attention", tiny_run.out, "--variant", "clusters=32", "--out", out, "--no-progress") == 0
    return out


def test_the_files_and_their_numbers(tiny_run: Any, made: Path) -> None:
    assert {path.name for path in made.iterdir()} == {
        "index.html",
        "attention.json",
        "maps.safetensors",
        "spatial.png",
        "cortex.png",
        "semantic.png",
    }
    for name in ("spatial", "cortex", "semantic"):
        with Image.open(made / f"{name}.png") as picture:
            assert (
                picture.mode == "RGB" and min(picture.size) > 150 and len(picture.convert("P").getcolors() or ()) > 20
            )
    record = read_json(made / "attention.json")
    data = Prepared(tiny_run.folder("prepare", "clusters=32"))
    layout = voxel_layout(data, tiny_run.folder("clusters", "clusters=32"))
    assert record["n_images"] == 8 and record["subjects"] == [1, 2] and len(record["tokens"]) == 32
    labels = np.split(layout.labels.numpy(), np.cumsum(data.n_voxels)[:-1])
    for token, entry in enumerate(record["tokens"]):
        assert entry["voxels"] == {str(s): int((own == token).sum()) for s, own in zip((1, 2), labels, strict=True)}
        assert set(entry["top_images"]) == set(data.shared_ids.tolist()), "all eight, in its own order"
    truth = load_file(tiny_run.folder("simulate") / "nsd" / "simulation" / "truth.safetensors")
    sides = np.concatenate([truth[f"subj{s:02d}.hemisphere"] for s in (1, 2)])
    share = [entry["right"] for entry in record["tokens"]]
    for token in range(32):
        own = sides[np.concatenate(labels) == token]
        assert share[token] == (pytest.approx(own.mean()) if len(own) else None)


def test_the_maps_are_the_mean_attention_of_the_finished_models(tiny_run: Any, made: Path) -> None:
    data = Prepared(tiny_run.folder("prepare", "clusters=32"))
    layout = voxel_layout(data, tiny_run.folder("clusters", "clusters=32"))
    maps = load_file(made / "maps.safetensors")
    assert {k: v.shape for k, v in maps.items()} == {
        "semantic": (32, 4, 4),
        **{f"low-level block{k}": (32, side, side) for k, side in enumerate((16, 15, 8, 4, 4))},
    }
    samples = data.samples(data.shared_ids)
    betas = torch.from_numpy(data.padded_betas(samples.subject, samples.row))
    for branch, role, queries, width in (("semantic", "joint", 16, 320), ("low-level", "lowlevel", 577, 112)):
        config = tiny_run.stage("reconstruct", "clusters=32").config["semantic" if role == "joint" else "lowlevel"]
        bit = build_bit(config, layout, queries, width).eval()
        bit.load_state_dict(_torch(tiny_run.folder(role, "clusters=32") / "bit.safetensors"))
        expected = cross_attention(bit, betas, torch.from_numpy(samples.subject)).mean(0).T.numpy()
        found = np.concatenate([m.reshape(32, -1) for name, m in maps.items() if name.startswith(branch)], axis=1)
        names = [name for name in maps if name.startswith(branch)]
        order = np.argsort(names, kind="stable")
        found = np.concatenate([maps[names[k]].reshape(32, -1) for k in order], axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def _torch(path: Path) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in load_file(path).items()}


class _Links(HTMLParser):
    """What a page would ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.viewport = self.language = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        self.found += [value for key in ("src", "href", "srcset") if (value := own.get(key))]
        self.language = own.get("lang") or self.language
        if own.get("name") == "viewport":
            self.viewport = own.get("content") or ""


def test_the_page_holds_all_that_it_needs(made: Path) -> None:
    text = (made / "index.html").read_text()
    links = _Links()
    links.feed(text)
    assert [link for link in links.found if not link.startswith("data:")] == []
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", text), "no network"
    assert links.viewport.startswith("width=device-width") and links.language == "en"
    assert "prefers-color-scheme: dark" in text and "@media (max-width" in text
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    data = json.loads(found.group(1).replace("<\\/", "</"))
    assert len(data["tokens"]) == 32 and len(data["images"]) == 8 == len(data["names"])
    maps = load_file(made / "maps.safetensors")
    for grid, name in zip(data["grids"], ["semantic", *(f"low-level block{k}" for k in range(5))], strict=True):
        values = np.frombuffer(base64.b64decode(grid["values"]), np.uint8).reshape(maps[name].shape)
        assert np.array_equal(values, np.stack([shades(one) for one in maps[name]]))
        assert len({tuple(place) for place in grid["places"]}) == 32, "each token has a cell of its own"
    light = np.frombuffer(base64.b64decode(data["light"]["values"]), np.uint8)
    assert light.size == 32 * 8 * data["light"]["side"] ** 2
    assert base64.b64decode(data["images"][0].partition(",")[2])[:2] == b"\xff\xd8"
    labels = np.frombuffer(base64.b64decode(data["cortex"]["views"]["from behind"]["labels"]), "<u2")
    assert np.bincount(labels, minlength=32).tolist() == [token["voxels"][0] for token in data["tokens"]]


def test_the_script_is_one_that_a_browser_reads() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node here to parse the script")
    script = Path(sys.modules["benchmark.analyze"].__file__ or "").with_name("page.js")
    assert subprocess.run([node, "--check", script], capture_output=True).returncode == 0


_VISITOR = """
<script>
const tokens = [...document.querySelectorAll("#tokens button")];
const said = () => document.querySelector("#detail h2")?.textContent ?? "";
const found = {tokens: tokens.length, fits: document.documentElement.scrollWidth <= innerWidth, first: said()};
const one = (token) => document.querySelector(`[data-token="${token}"]`);
one(3).dispatchEvent(new PointerEvent("pointerenter", {pointerType: "mouse"}));
found.hovered = said();
one(5).dispatchEvent(new PointerEvent("pointerenter", {pointerType: "touch"}));
found.swept = said();
one(7).click();
found.tapped = said();
one(3).dispatchEvent(new PointerEvent("pointerenter", {pointerType: "mouse"}));
document.querySelector("#tokens").dispatchEvent(new PointerEvent("pointerleave"));
found.left = said();
found.voxels = [...document.querySelectorAll("#detail td")].map((cell) => Number(cell.textContent));
found.pictures = document.querySelectorAll("#detail .top canvas").length;
const pixels = (canvas) => [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
found.map = pixels(document.querySelector("#detail canvas.map")).filter((_, k) => k % 4 === 0);
document.querySelector("#grid").value = "0";
document.querySelector("#grid").dispatchEvent(new Event("change"));
found.side = document.querySelector("#detail canvas.map").width;
document.querySelector("#detail button").click();
found.closed = said();
document.title = JSON.stringify(found);
</script></body>"""


@pytest.mark.parametrize("size", ["1280,900", "500,900"])
def test_a_visitor_sees_each_tokens_voxels_map_and_images(made: Path, tmp_path: Path, size: str) -> None:
    browser = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if browser is None:
        pytest.skip("no Chromium here")
    page = tmp_path / "page.html"
    page.write_text((made / "index.html").read_text().replace("</body>", _VISITOR))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={size}",
        f"--user-data-dir={tmp_path / 'b'}",
    ]
    answer = subprocess.run(
        [browser, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    title = re.search("<title>(.*?)</title>", answer.stdout, re.S)
    assert title is not None
    found = json.loads(unescape(title.group(1)))
    record, maps = read_json(made / "attention.json"), load_file(made / "maps.safetensors")
    wide = size == "1280,900"
    assert found["tokens"] == 32 and found["fits"], "the page is as wide as its window"
    assert found["first"].startswith("Token") is wide, "on a small screen nothing covers the tokens at first"
    assert (found["hovered"], found["swept"]) == ("Token 3", "Token 3"), "a finger that scrolls chooses nothing"
    assert found["tapped"] == found["left"] == "Token 7", "a tapped token stays"
    assert found["voxels"] == list(record["tokens"][7]["voxels"].values()) and found["pictures"] == 8
    assert found["map"] == shades(maps["low-level block0"][7]).ravel().tolist()
    assert found["side"] == 4 and found["closed"] == ""


def test_validation_images_and_some_of_them(tiny_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = ("--variant", "clusters=8", "--no-progress", "--out", tmp_path)
    assert call("attention", tiny_run.out, *quiet, "--images", "validation", "--count", 3) == 0
    said = capsys.readouterr().out
    assert "clusters=8: 8 tokens, 3 validation images, seen by subjects 1, 2" in said
    assert f"page: {tmp_path / 'index.html'}" in said and "receptive fields: r = " in said
    with pytest.raises(SystemExit):
        call("attention", tiny_run.out, "--count", "0")
    assert call("attention", tiny_run.out, *quiet, "--count", 2) == 2
    assert capsys.readouterr().err.endswith("error: 2 test images: expected 3 or more\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "clusters=129"], "has no finished variant 'clusters=129' (did you mean 'clusters=128'?)"),
        ([], "holds 3 variants; choose one with --variant: clusters=128, clusters=32, clusters=8"),
    ],
)
def test_what_the_run_does_not_have(
    tiny_run: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert call("attention", tiny_run.out, *arguments) == 2
    assert message in capsys.readouterr().err


def test_no_run_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("attention", tmp_path / "nowhere") == 2
    assert "no such folder" in capsys.readouterr().err
    assert call("attention", tmp_path) == 2
    assert "holds no finished variant; type: python -m benchmark.run" in capsys.readouterr().err


def test_a_variant_is_known_by_every_name_under_which_it_ran(tiny_run: Any) -> None:
    name, result = find_variant(tiny_run.out, "clusters=8")
    assert name == "clusters=8" and result.folder == tiny_run.folder("reconstruct", "clusters=8")


def test_help_is_quick_to_import() -> None:
    code = (
        "import sys, benchmark.analyze.__main__; "
        "print([m for m in ('torch', 'pandas', 'scipy', 'PIL') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- the figures' parts -----------------------------------------------------------------------------------------------


def test_tokens_lie_near_the_place_that_they_serve() -> None:
    maps = np.full((16, 4, 4), 0.1)
    for token in range(16):
        maps[token, token // 4, token % 4] = 1
    where, columns = places_on_sheet(maps)
    assert columns == 4 and where.tolist() == [[token % 4, token // 4] for token in range(16)]
    palette = colours(maps)
    assert len(set(palette)) == 16 and all(0 <= value <= 255 for colour in palette for value in colour)
    crowd, columns = places_on_sheet(np.ones((7, 3, 3)))
    assert columns == 3 and len({tuple(cell) for cell in crowd.tolist()}) == 7


def test_shades_span_a_maps_own_range() -> None:
    one = np.array([[1.0, 2.0], [3.0, 5.0]]) * 1e-3
    assert shades(one).tolist() == [[0, 64], [128, 255]]
    assert shades(np.full((2, 2), 0.3)).tolist() == [[128, 128], [128, 128]]
