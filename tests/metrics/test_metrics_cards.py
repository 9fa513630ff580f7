"""Cards and the command that prints them."""

import subprocess
import sys
from collections.abc import Mapping

import pytest

from metrics.__main__ import main
from metrics.cards import CARDS, KEYS, card, format_value
from metrics.protocols import PROTOCOLS


def test_keys_are_the_eleven_in_canonical_order() -> None:
    assert KEYS == (
        "PixCorr",
        "SSIM",
        "Alex(2)",
        "Alex(5)",
        "Incep",
        "CLIP",
        "Eff",
        "SwAV",
        "CLIP-1000",
        "LPIPS",
        "SSIM-color",
    )


def test_direction_decides_what_is_better_and_best() -> None:
    lower = {key for key, c in CARDS.items() if c.direction == "lower"}
    assert lower == {"Eff", "SwAV", "LPIPS"}
    assert CARDS["Eff"].better(0.5, 0.6) and CARDS["SSIM"].better(0.6, 0.5)
    assert not CARDS["SSIM"].better(0.5, 0.5)
    assert CARDS["LPIPS"].best == 0.0 and CARDS["CLIP"].best == 1.0


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("PixCorr", 0.3864, "0.386"),
        ("Alex(2)", 0.9841, "98.4%"),
        ("CLIP-1000", 0.393, "39.3%"),
        ("LPIPS", None, "–"),
        ("SSIM", float("nan"), "–"),
    ],
)
def test_values_are_printed_as_the_field_prints_them(key: str, value: float | None, text: str) -> None:
    assert format_value(key, value) == text


def test_unknown_key_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no metric 'SSIM-colour' \(did you mean 'SSIM-color'\?\)"):
        card("SSIM-colour")


def test_cards_and_protocols_import_nothing_heavy() -> None:
    code = "import sys, metrics.cards, metrics.protocols; assert not {'torch', 'numpy', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_package_gives_its_public_names_lazily() -> None:
    import metrics

    for name in metrics.__all__:
        assert callable(getattr(metrics, name)) or isinstance(getattr(metrics, name), Mapping | tuple)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        metrics.nothing  # noqa: B018


def test_command_prints_cards_and_protocols(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(key in printed for key in KEYS)
    assert all(f"{card.key} {card.arrow}" in printed for card in CARDS.values())
    assert main(["protocols", *PROTOCOLS]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in PROTOCOLS)


def test_command_refuses_an_unknown_word_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["protocol"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'protocols'?" in error and error.count("\n") == 1
