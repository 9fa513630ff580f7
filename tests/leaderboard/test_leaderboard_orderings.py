"""What a paper ordered, asked of our own images: made-up scores whose truth is known."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from leaderboard.orderings import (
    Difference,
    Ordering,
    differences,
    differences_lines,
    differences_markdown,
    orderings,
    orderings_markdown,
    print_orderings,
)
from leaderboard.published import PublishedRow, published
from leaderboard.statistics import seeds_test

MAIN = ("Brain-IT", "clusters=128")


def table(shifts: dict[str, list[float]], images: int = 60, noise: float = 0.05) -> pa.Table:
    """PixCorr and Eff of variants, ``shifts`` apart from a common base; one shift a seed."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.6, (2, images))
    rows = []
    for variant, by_seed in shifts.items():
        for seed, shift in enumerate(by_seed):
            values = base + shift + noise * rng.standard_normal(base.shape)
            for subject in range(2):
                for image in range(images):
                    value = float(values[subject, image])
                    head = ("demo", "Brain-IT", variant, subject + 1, seed, str(image))
                    rows += [(*head, metric, value) for metric in ("PixCorr", "Eff")]
    names = ("track", "method", "variant", "subject", "seed", "image_id", "metric", "value")
    return pa.table({name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})


def printed(pixcorr: float, eff: float) -> PublishedRow:
    return published()["brainit_40h"].model_copy(update={"metrics": {"PixCorr": pixcorr, "Eff": eff, "SSIM": 0.5}})


def verdicts(shifts: dict[str, list[float]], row: PublishedRow) -> dict[str, str]:
    key = ("Brain-IT", "clusters=8")
    found = orderings(table(shifts), {key: row}, (MAIN, printed(0.4, 0.6)))
    return {one.metric: one.verdict for one in found}


def test_lower_in_both_holds_and_higher_where_the_paper_has_lower_is_reversed() -> None:
    shifts = {"clusters=128": [0.0], "clusters=8": [-0.1]}
    assert verdicts(shifts, printed(0.3, 0.7)) == {"PixCorr": "holds", "Eff": "reversed"}


def test_noise_cannot_be_told_and_equal_print_is_no_ordering() -> None:
    shifts = {"clusters=128": [0.0], "clusters=8": [0.0]}
    assert verdicts(shifts, printed(0.3, 0.6)) == {"PixCorr": "cannot be told", "Eff": "printed equal"}


def test_one_seed_that_disagrees_keeps_a_verdict_back() -> None:
    shifts = {"clusters=128": [0.0, 0.0, 0.0], "clusters=8": [-0.3, -0.3, 0.1]}
    assert verdicts(shifts, printed(0.3, 0.5))["PixCorr"] == "cannot be told"
    shifts["clusters=8"] = [-0.3, -0.3, -0.25]
    assert verdicts(shifts, printed(0.3, 0.5))["PixCorr"] == "holds"


def test_seeds_that_scatter_as_widely_as_they_differ_tell_nothing_however_many_images_there_are() -> None:
    shifts = {"clusters=128": [0.0, 0.0, 0.0], "clusters=8": [-0.3, -0.05, -0.02]}
    assert verdicts(shifts, printed(0.3, 0.5))["PixCorr"] == "cannot be told"


def test_what_a_seed_does_to_both_rows_counts_for_neither() -> None:
    shifts = {"clusters=128": [0.0, 0.2, -0.2], "clusters=8": [-0.1, 0.1, -0.3]}
    assert verdicts(shifts, printed(0.3, 0.5))["PixCorr"] == "holds"
    other_seeds = table(shifts).to_pandas()
    other_seeds.loc[other_seeds.variant == "clusters=8", "seed"] += 3
    key = ("Brain-IT", "clusters=8")
    (one,) = [
        o
        for o in orderings(pa.Table.from_pandas(other_seeds), {key: printed(0.3, 0.6)}, (MAIN, printed(0.4, 0.6)))
        if o.metric == "PixCorr"
    ]
    assert one.verdict == "cannot be told", "seeds that are not the same do not pair"


def test_equal_methods_whose_trainings_scatter_are_seldom_told_apart() -> None:
    """False alarms over draws of three trainings a side: at most the 5 % that are promised (here, within 2 s.d.)."""
    rng = np.random.default_rng(1)
    draws, told = 200, 0
    for _ in range(draws):
        a, b = (
            rng.normal(0, 0.05, (3, 1, 1, 1)) + rng.normal(0.4, 0.1, (1, 1, 2, 40)) + rng.normal(0, 0.05, (3, 1, 2, 40))
            for _ in range(2)
        )
        low, high, p = seeds_test(a, b, paired=True, n_resamples=200)
        told += bool(p[0] < 0.05 and (low[0] > 0 or high[0] < 0))
    assert told <= 0.05 * draws + 2 * (0.05 * 0.95 * draws) ** 0.5


def test_a_metric_that_one_side_lacks_is_not_asked() -> None:
    row = published()["brainit_40h"].model_copy(update={"metrics": {"SSIM": 0.4, "PixCorr": 0.3}})
    assert set(verdicts({"clusters=128": [0.0], "clusters=8": [0.0]}, row)) == {"PixCorr"}


def test_rows_scored_on_other_images_are_refused() -> None:
    whole = table({"clusters=128": [0.0], "clusters=8": [0.0]})
    images = whole["image_id"].to_pylist()
    variants = whole["variant"].to_pylist()
    keep = [not (v == "clusters=8" and i == "7") for v, i in zip(variants, images, strict=True)]
    with pytest.raises(ValueError, match="not the same subjects and images"):
        orderings(
            whole.filter(pa.array(keep)), {("Brain-IT", "clusters=8"): printed(0.3, 0.6)}, (MAIN, printed(0.4, 0.6))
        )


def found() -> list[Ordering]:
    key = ("Brain-IT", "clusters=8")
    shifts = {"clusters=128": [0.0], "clusters=8": [-0.1]}
    return orderings(table(shifts), {key: printed(0.3, 0.6)}, (MAIN, printed(0.4, 0.6)))


def test_the_markdown_table_has_a_row_a_variant_and_says_what_the_paper_says() -> None:
    lines = orderings_markdown(found()).splitlines()
    assert lines[0] == "| against clusters=128 | PixCorr | Eff |"
    assert lines[2] == "| clusters=8 | worse: holds | = |"
    assert orderings_markdown([]) == ""


def test_the_printed_table_counts_what_holds(capsys: pytest.CaptureFixture[str]) -> None:
    print_orderings(found(), "Table T3")
    text = capsys.readouterr().out
    assert text.startswith(
        "The orderings of Table T3, asked of our images: of 1 orderings that the paper prints, 1 hold"
    )
    assert "against clusters=128" in text and "clusters=8" in text and "?: cannot be told at this size" in text
    print_orderings([], "Table T3")
    assert not capsys.readouterr().out


# --- differences, printed anywhere or not -----------------------------------------------------------------------------


def apart(shifts: dict[str, list[float]]) -> list[Difference]:
    others: dict[tuple[str, str], None] = dict.fromkeys(("Brain-IT", v) for v in shifts if v != "clusters=128")
    return differences(table(shifts), others, MAIN)


def test_differences_are_those_of_the_means_and_told_by_direction() -> None:
    found = apart({"clusters=128": [0.0], "clusters=8": [-0.1], "clusters=16": [0.0]})
    assert [(one.variant, one.metric) for one in found] == [
        (v, m) for v in ("clusters=8", "clusters=16") for m in ("PixCorr", "Eff")
    ]
    pixcorr, eff, *level = found
    assert pixcorr.difference == pytest.approx(-0.1, abs=0.02) and pixcorr.ci_low < -0.1 < pixcorr.ci_high
    assert (pixcorr.told, pixcorr.better) == (True, False)
    assert (eff.told, eff.better) == (True, True), "of Eff, less is better"
    assert not any(one.told for one in level)


def test_differences_are_said_in_a_table_and_in_words() -> None:
    found = apart({"clusters=128": [0.0], "clusters=8": [-0.1], "clusters=16": [0.0]})
    lines = differences_markdown(found).splitlines()
    assert lines[0] == "| minus clusters=128 | PixCorr ↑ | Eff ↓ |" and len(lines) == 4
    assert lines[2].startswith("| clusters=8 | -0.") and lines[2].count("better") == lines[2].count("worse") == 1
    assert "better" not in lines[3] and "worse" not in lines[3]
    assert differences_lines(found) == [
        "clusters=8 against clusters=128: better on Eff; worse on PixCorr",
        "clusters=16 against clusters=128: cannot be told on any metric",
    ]
    assert differences_markdown([]) == "" and differences_lines([]) == []
