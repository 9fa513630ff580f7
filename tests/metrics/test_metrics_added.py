"""Metrics beside the eleven: found, checked, scored, hashed only where a protocol asks for them."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from leaderboard.formats import as_csv
from leaderboard.schema import Interval, Row
from metrics import added
from metrics.__main__ import main
from metrics.cards import CARDS, KEYS, card
from metrics.evaluate import evaluate, subset
from metrics.pixel import pixcorr
from metrics.protocols import DEMO, PROTOCOLS, Resize, get_protocol, metric_versions, protocol_hash, protocol_record

HEAD = """
import numpy as np
from metrics.added import Metric
from metrics.cards import Card
from metrics.protocols import Resize

def card(key, **changes):
    about = {"name": f"{key} of a test", "version": "1", "direction": "higher", "low": -1.0, "high": 1.0}
    about |= {"percent": False, "input_size": "any", "network": None, "layer": None, "reference": "tests"}
    return Card(key=key, **{**about, **changes})

def pearson(x, y):
    return np.corrcoef(np.asarray(x, np.float64).reshape(-1), np.asarray(y, np.float64).reshape(-1))[0, 1]
"""
PIXELS = 'METRIC = Metric(card=card("Same-as-PixCorr"), function=pearson)'
SMALL = 'METRIC = Metric(card=card("Small"), function=pearson, resize=Resize(16, "bilinear", antialias=True))'
VECTORS = """METRIC = Metric(card=card("Same-as-Eff", direction="lower", low=0.0, high=2.0),
                function=lambda x, y: 1 - pearson(x, y), features="Eff")"""


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Path]]:
    """Put a file beside the metrics that were added: (name, what follows HEAD)."""
    monkeypatch.setattr(added, "__path__", [str(tmp_path)])

    def forget() -> None:
        added.metrics.cache_clear()
        CARDS.__dict__.pop("_by_key", None)
        for name in [name for name in sys.modules if name.startswith("metrics.added.")]:
            del sys.modules[name]

    def write(name: str, text: str) -> Path:
        path = tmp_path / f"{name}.py"
        path.write_text(HEAD + textwrap.dedent(text) + "\n")
        forget()
        return path

    forget()
    yield write
    forget()


class Backbone:
    """Features that are a fixed random projection of the pixels."""

    def __init__(self, name: str) -> None:
        self.name, self.digest = name, f"digest of {name}"

    def features(self, images: torch.Tensor, layers: list[str]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        weights = torch.randn(images[0].numel(), 6, generator=generator) / 50
        found = (images.flatten(1) @ weights)[:, :, None, None].expand(-1, -1, 3, 3)
        return dict.fromkeys(layers, found + torch.linspace(0, 1, 9).reshape(3, 3))


def images(n: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 256, (n, 64, 64, 3), dtype=np.uint8)
    return truth, np.clip(truth.astype(int) + rng.integers(-90, 90, truth.shape), 0, 255).astype(np.uint8)


BACKBONES = {name: Backbone(name) for name in DEMO.networks}


def hashes() -> dict[str, str]:
    return {p.name: protocol_hash(p, {}, range(4)) for p in PROTOCOLS.values()}


def test_what_is_not_asked_for_changes_nothing(add: Callable[..., Path]) -> None:
    before, records = hashes(), {name: protocol_record(p) for name, p in PROTOCOLS.items()}
    add("first", PIXELS)
    assert tuple(CARDS) == (*KEYS, "Same-as-PixCorr") and card("Same-as-PixCorr").arrow == "↑"
    assert hashes() == before and {name: protocol_record(p) for name, p in PROTOCOLS.items()} == records
    assert all(p.keys == KEYS and tuple(metric_versions(p)) == KEYS for p in PROTOCOLS.values())
    assert get_protocol("demo") is DEMO
    truth, recon = images()
    assert tuple(evaluate(recon, truth, DEMO, BACKBONES, range(5)).per_image) == KEYS


def test_the_hash_knows_metric_size_and_version(add: Callable[..., Path]) -> None:
    add("first", PIXELS)
    add("second", SMALL)
    names = ("demo", "demo+Same-as-PixCorr", "demo+Small", "demo+Small+Same-as-PixCorr")
    found = {name: protocol_hash(get_protocol(name), {}, range(4)) for name in names}
    assert len(set(found.values())) == 4
    assert protocol_hash(get_protocol("demo+Same-as-PixCorr+Small"), {}, range(4)) == found[names[3]]
    add("second", SMALL.replace("16", "24"))
    assert protocol_hash(get_protocol("demo+Small"), {}, range(4)) != found["demo+Small"]
    add("second", SMALL.replace('"Small"', '"Small", version="2"'))
    assert protocol_hash(get_protocol("demo+Small"), {}, range(4)) != found["demo+Small"]
    assert protocol_hash(get_protocol("demo+Same-as-PixCorr"), {}, range(4)) == found["demo+Same-as-PixCorr"]


def test_values_are_those_of_known_metrics_by_the_same_arithmetic(add: Callable[..., Path]) -> None:
    add("a", PIXELS)
    add("b", SMALL)
    add("c", VECTORS)
    truth, recon = images()
    protocol = get_protocol("demo+Same-as-PixCorr+Same-as-Eff+Small")
    scores = evaluate(recon, truth, protocol, BACKBONES, range(5), threads=2)
    assert tuple(scores.per_image) == (*KEYS, "Same-as-PixCorr", "Small", "Same-as-Eff") == protocol.keys
    own = scores.per_image
    np.testing.assert_allclose(own["Same-as-PixCorr"], own["PixCorr"], atol=1e-12)
    np.testing.assert_allclose(own["Same-as-Eff"], own["Eff"], atol=1e-6)
    small = [
        torch.nn.functional.interpolate(
            torch.from_numpy(x).double().movedim(-1, 1) / 255, 16, mode="bilinear", antialias=True, align_corners=False
        )
        for x in (truth, recon)
    ]
    np.testing.assert_allclose(own["Small"], pixcorr(*(x.movedim(1, -1).numpy() for x in small)), atol=1e-9)
    plain = evaluate(recon, truth, DEMO, BACKBONES, range(5), threads=1)
    for key in KEYS:
        np.testing.assert_array_equal(own[key], plain.per_image[key])
    some = evaluate(recon, truth, protocol, {}, range(5), keys=["Small"])
    assert tuple(some.per_image) == ("Small",)
    np.testing.assert_array_equal(subset(scores, [1, 3]).per_image["Small"], own["Small"][[1, 3]])
    assert protocol.describe("Small") == "Small of a test, at 16 px"
    assert protocol.describe("Same-as-Eff") == f"Same-as-Eff of a test; {DEMO.describe('Eff')}"


def test_a_value_that_the_card_forbids_is_told_with_its_image(add: Callable[..., Path]) -> None:
    add("far", 'METRIC = Metric(card=card("Far"), function=lambda x, y: 1.5)')
    truth, recon = images(2)
    with pytest.raises(ValueError, match=r"metric 'Far' gave 1.5 for image 7; its card says -1 .. 1"):
        evaluate(recon, truth, get_protocol("demo+Far"), {}, [7, 8], keys=["Far"])
    add("far", 'METRIC = Metric(card=card("Far"), function=lambda x, y: np.nan)')
    with pytest.raises(ValueError, match="gave nan for image 7"):
        evaluate(recon, truth, get_protocol("demo+Far"), {}, [7, 8], keys=["Far"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "has no METRIC; expected METRIC = Metric(card=..., function=...)"),
        ("1 / 0", "wrong.py: the metric cannot be read: ZeroDivisionError: division by zero"),
        ("def f(:", "the metric cannot be read: SyntaxError"),
        ('METRIC = Metric(card=card("pix corr"), function=pearson)', "key 'pix corr'; expected letters"),
        ('METRIC = Metric(card=card("a+b"), function=pearson)', "key 'a+b'; expected letters"),
        ('METRIC = Metric(card=card("pixcorr"), function=pearson)', "key 'pixcorr' is taken by one of the eleven"),
        ('METRIC = Metric(card=card("Fine"), function=pearson)', "key 'Fine' is taken by"),
    ],
)
def test_a_wrong_file_is_named(
    add: Callable[..., Path], text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    add("fine", 'METRIC = Metric(card=card("Fine"), function=pearson)')
    path = add("wrong", text)
    with pytest.raises(added.MetricFileError) as caught:
        list(CARDS)
    assert str(path) in str(caught.value) and message in str(caught.value) and "\n" not in str(caught.value)
    assert main(["list"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_folder_that_is_not_there_is_named(add: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(added.VARIABLE, "/no/such")
    with pytest.raises(added.MetricFileError, match="BRAIN_IT_EXTENSIONS is /no/such: no such folder"):
        list(CARDS)


def test_wrong_names_get_the_nearest(add: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    add("small", SMALL)
    for name, message in (
        ("demo+Smal", r"no metric 'Smal' in .*did you mean 'Small'"),
        ("demmo+Small", r"no protocol 'demmo' \(did you mean 'demo'"),
        ("demo+CLIP", r"every protocol has CLIP; leave out \+CLIP"),
        ("demo+", "no metric ''"),
    ):
        with pytest.raises(ValueError, match=message):
            get_protocol(name)
    with pytest.raises(ValueError, match=r"protocol 'demo' has no Small; 'demo\+Small' has"):
        evaluate(*images(2), DEMO, {}, range(2), keys=["Small"])
    add("maps", 'METRIC = Metric(card=card("Maps"), function=pearson, features="LPIPS")')
    with pytest.raises(ValueError, match=r"metric 'Maps': features is 'LPIPS'; expected one of Alex\(2\), "):
        get_protocol("brain-it+Maps")
    assert main(["protocols", "demo+Small"]) == 0
    assert "Small" in capsys.readouterr().out


def test_tables_show_it_and_a_machine_without_its_file_says_so(add: Callable[..., Path]) -> None:
    def row() -> Row:
        return Row(
            method="m",
            variant="v",
            track="demo",
            protocol="demo+Small",
            protocol_hash="0" * 64,
            subjects=(1,),
            n_images=2,
            metrics={"Small": Interval(mean=0.5), "PixCorr": Interval(mean=0.1)},
            source="here",
        )

    with pytest.raises(ValueError, match=r"unknown metric Small; known: .* needs its file in metrics/added here, too"):
        row()
    path = add("small", SMALL)
    assert tuple(row().metrics) == ("PixCorr", "Small")
    assert "Small" not in as_csv([], []), "what no row has makes no column"
    path.unlink()


def test_the_resize_of_a_file_is_that_of_the_protocols(add: Callable[..., Path]) -> None:
    add("small", SMALL)
    (slot,) = get_protocol("demo+Small").pixels
    assert slot.resize == Resize(16, "bilinear", antialias=True)
    assert protocol_record(get_protocol("demo+Small"))["pixels"] == [
        {"key": "Small", "resize": {"size": 16, "filter": "bilinear", "antialias": True}}
    ]
