"""The gate: what it calls a regression, what it refuses, and whether it keeps its promises."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from benchmark.check.simulate import ALPHAS, DROPS, Design, equal_pairs, false_alarms, power
from leaderboard.changes import change_points
from leaderboard.gate import BLOCKING, Check, Margin, Rules, Side, check, measure, read_margins
from leaderboard.statistics import bootstrap_interval, bootstrap_seeds, lower_p, spread
from metrics.cards import CARDS

QUICK = Rules(n_resamples=400, n_permutations=999)
HASH = "0123456789abcdef"


def table(values: dict[str, np.ndarray], seed: int = 0, track: str = "demo", first: int = 100) -> pa.Table:
    """Per-image scores from metric -> (subjects, images)."""
    rows: list[tuple[Any, ...]] = [
        (track, "m", "v", s + 1, seed, first + i, key, float(value))
        for key, cells in values.items()
        for (s, i), value in np.ndenumerate(cells)
    ]
    names = ("track", "method", "variant", "subject", "seed", "image_id", "metric", "value")
    return pa.table({name: [row[k] for row in rows] for k, name in enumerate(names)})


def side(values: dict[str, np.ndarray], name: str = "model", **other: Any) -> Side:
    return Side(name, table(values, **other), "demo", HASH)


def cells(
    seed: int, n_subjects: int = 2, n_images: int = 40, keys: tuple[str, ...] = BLOCKING
) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=(1, n_images))
    return {key: 0.5 + 0.1 * shared + 0.05 * generator.normal(size=(n_subjects, n_images)) for key in keys}


def moved(values: dict[str, np.ndarray], noise: float = 0.02, seed: int = 9, **changes: float) -> dict[str, np.ndarray]:
    """The same scores with noise, each metric better (positive) or worse by so much; ``Alex2`` for ``Alex(2)``."""
    generator = np.random.default_rng(seed)
    bare = {key.replace("(", "").replace(")", "").replace("-", ""): key for key in CARDS}
    gain = {bare[name]: change for name, change in changes.items()}
    sign = {key: 1 if CARDS[key].direction == "higher" else -1 for key in values}
    return {
        key: v + noise * generator.normal(size=v.shape) + sign[key] * gain.get(key, 0.0) for key, v in values.items()
    }


def gate(candidate: dict[str, np.ndarray], baseline: dict[str, np.ndarray], rules: Rules = QUICK) -> Check:
    return check(side(candidate, "new"), side(baseline, "old"), rules)


# --- the decision -----------------------------------------------------------------------------------------------------


def test_a_drop_regresses_and_a_gain_improves_in_the_direction_of_each_card() -> None:
    old = cells(0)
    found = gate(moved(old, PixCorr=-0.03, Eff=-0.03, SSIM=0.03, SwAV=0.03), old)
    assert {f.metric for f in found.of("regressed")} == {"PixCorr", "Eff"} and not found.passed
    assert {f.metric for f in found.of("improved")} == {"SSIM", "SwAV"}
    by_key = {f.metric: f for f in found.findings}
    assert by_key["Eff"].difference > 0 and by_key["Eff"].drop > 0, "a larger distance is a drop"
    assert by_key["SwAV"].difference < 0 and by_key["SwAV"].drop < 0
    for f in found.findings:
        assert f.ci_low <= f.difference <= f.ci_high
        assert f.difference == pytest.approx(f.candidate - f.baseline)
    assert found.sentence == "FAILED: PixCorr, Eff regressed; SSIM, SwAV improved"


def test_equal_scores_pass_and_are_said_to_be_identical() -> None:
    found = gate(cells(1), cells(1))
    assert found.passed and not found.of("improved") and not found.worse
    assert all(f.difference == 0 and f.detectable is None for f in found.findings)
    assert "the scores are identical" in found.notes


def test_swapping_the_sides_swaps_the_verdicts() -> None:
    old = cells(2)
    new = moved(old, CLIP=-0.03, Eff=0.03)
    there, back = gate(new, old), gate(old, new)
    assert [f.metric for f in there.of("regressed")] == [f.metric for f in back.of("improved")] == ["CLIP"]
    assert [f.metric for f in there.of("improved")] == [f.metric for f in back.of("regressed")] == ["Eff"]


def test_a_drop_within_its_margin_passes() -> None:
    old = cells(3)
    new = moved(old, noise=0.005, PixCorr=-0.03)
    assert not gate(new, old, replace(QUICK, blocking=read_margins("PixCorr"))).passed
    assert not gate(new, old, replace(QUICK, blocking=read_margins("PixCorr:0.02"))).passed
    assert gate(new, old, replace(QUICK, blocking=read_margins("PixCorr:0.03"))).passed, "not shown to be beyond it"
    assert gate(new, old, replace(QUICK, blocking=read_margins("PixCorr:0.05"))).passed
    (f, *_) = gate(new, old, replace(QUICK, blocking=read_margins("PixCorr:10%"))).findings
    assert f.margin == pytest.approx(0.1 * np.mean(old["PixCorr"])) and f.verdict == "no change shown"


def test_what_advises_never_fails_and_moves_nothing_that_blocks() -> None:
    old = cells(4, keys=tuple(CARDS))
    new = moved(old, LPIPS=-0.05, SSIMcolor=-0.05)
    found = gate(new, old)
    assert found.passed and {f.metric for f in found.of("regressed", "advisory")} == {"LPIPS", "SSIM-color"}
    alone = gate({k: new[k] for k in BLOCKING}, {k: old[k] for k in BLOCKING})
    assert [f.q for f in alone.findings] == [f.q for f in found.findings if f.role == "blocking"]
    only = gate(new, old, replace(QUICK, blocking=read_margins("SSIM"), advisory=read_margins("CLIP")))
    assert [(f.metric, f.role) for f in only.findings] == [("SSIM", "blocking"), ("CLIP", "advisory")]


def test_q_is_benjamini_hochberg_over_the_blocking_metrics() -> None:
    found = gate(moved(cells(5), PixCorr=-0.006, CLIP=-0.004), cells(5))
    assert [f.q for f in found.findings] == pytest.approx(stats.false_discovery_control([f.p for f in found.findings]))


@pytest.mark.parametrize("shift", [-0.6, -0.2, 0.0, 0.3])
def test_the_one_sided_p_is_that_of_scipy(shift: float) -> None:
    values = np.random.default_rng(6).normal(shift, 1, (1, 11))
    expected = stats.permutation_test(
        (values[0],), np.mean, permutation_type="samples", alternative="less", n_resamples=np.inf
    )
    assert float(lower_p(values)) == pytest.approx(expected.pvalue, abs=2**-11)


def test_subjects_who_disagree_do_not_fail() -> None:
    old = cells(7, n_subjects=4, n_images=200, keys=("PixCorr",))
    new = moved(old, noise=0.01)
    new["PixCorr"] += np.array([[-0.08], [0.06], [-0.07], [0.05]])
    found = gate(new, old, replace(QUICK, blocking=read_margins("PixCorr")))
    (f,) = found.findings
    assert f.q < 0.001 and f.ci_low < 0 < f.ci_high and f.verdict == "no change shown"


def test_the_images_that_got_worse_are_listed_the_worst_first() -> None:
    old = cells(8)
    new = moved(old, noise=0.001)
    for key in new:
        new[key][1, 5] += -0.3 if CARDS[key].direction == "higher" else 0.3
        new[key][0, 7] += -0.1 if CARDS[key].direction == "higher" else 0.1
    found = gate(new, old).worse
    assert [(w.subject, w.image_id) for w in found[:2]] == [(2, "105"), (1, "107")]
    assert all(a.drop >= b.drop > 0 for a, b in zip(found, found[1:], strict=False))
    assert found[0].values["SSIM"] == pytest.approx((old["SSIM"][1, 5], new["SSIM"][1, 5]))


def test_no_value_where_the_baseline_has_one_is_a_regression() -> None:
    old = cells(10)
    new = moved(old, noise=0.001)
    new["PixCorr"][0, 3] = np.nan
    found = gate(new, old)
    (f,) = found.of("regressed", "blocking")
    assert f.metric == "PixCorr" and f.undefined == 1 and any("flat colour" in note for note in found.notes)
    new["PixCorr"][:] = np.nan
    (f,) = gate(new, old).of("regressed", "blocking")
    assert (
        f.undefined == old["PixCorr"].size
        and np.isnan(f.candidate)
        and f.baseline == pytest.approx(old["PixCorr"].mean())
    )
    with pytest.raises(ValueError, match="PixCorr blocks, but the baseline has no value on 80 images"):
        gate(old, new)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_different_tracks_protocols_subjects_and_images_are_refused_with_the_reason() -> None:
    values, wider = cells(11), cells(11, n_subjects=3)
    a = side(values, "new")
    with pytest.raises(ValueError, match="different tracks: new is of 'demo', old of 'paper'"):
        check(a, side(values, "old", track="paper"), QUICK)
    with pytest.raises(ValueError, match="different protocols: new was scored under demo, old under brain-it"):
        check(a, replace(side(values, "old"), protocol="brain-it"), QUICK)
    with pytest.raises(ValueError, match="different protocols: demo 01234567 and ffffffff, on the same images"):
        check(a, replace(side(values, "old"), protocol_hash="f" * 16), QUICK)
    with pytest.raises(ValueError, match=r"different subjects: 1, 2 \(new\) and 1, 2, 3 \(old\)"):
        check(a, side(wider, "old"), QUICK)
    with pytest.raises(
        ValueError, match=r"different image sets: 2 only in new \(first: 100 of subject 1\), 2 only in old"
    ):
        check(a, side(values, "old", first=101), QUICK)
    with pytest.raises(ValueError, match="old: nothing says under which protocol"):
        check(a, replace(side(values, "old"), protocol=None, protocol_hash=None), QUICK)
    found = check(a, replace(side(values, "old"), protocol=None, protocol_hash=None), QUICK, same_protocol=True)
    assert found.passed and any("caller's word" in note for note in found.notes)


def test_metrics_that_would_block_must_be_there() -> None:
    old = cells(12)
    new = {key: value for key, value in old.items() if key != "CLIP"}
    with pytest.raises(ValueError, match="CLIP would block, but only the baseline has scores of it"):
        gate(new, old)
    with pytest.raises(ValueError, match="LPIPS would block, but neither side has scores of it"):
        gate(old, old, replace(QUICK, blocking=read_margins("LPIPS")))
    found = gate(new, old, replace(QUICK, blocking=read_margins("SSIM")))
    assert any(note.startswith("CLIP: only one side") for note in found.notes)
    assert gate(old, old, replace(QUICK, blocking=read_margins("all:1%"))).passed, "all means all that there are"
    none = gate(moved(old, PixCorr=-0.1), old, replace(QUICK, blocking={}))
    assert none.passed and none.of("regressed", "advisory")


def test_too_few_images_to_ever_fail_are_refused() -> None:
    few = cells(13, n_images=4)
    with pytest.raises(ValueError, match="4 test images: no drop, however large"):
        gate(few, few)
    some = cells(13, n_images=6)
    found = gate(moved(some), some)
    assert all(f.detectable is None for f in found.findings) and any("never found" in note for note in found.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("PixCor:0.1", "no metric 'PixCor' (did you mean 'PixCorr'?)"),
        ("PixCorr:a", "'a' is no margin"),
        ("PixCorr:-1%", "'-1%' is no margin"),
        ("PixCorr:nan", "'nan' is no margin"),
        ("", "no metric ''"),
    ],
)
def test_margins_that_make_no_sense_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_margins(text)
    assert message in str(caught.value)


def test_margins_are_read_as_typed() -> None:
    assert read_margins("PixCorr:0.005, alex2:1%,ssim") == {
        "PixCorr": Margin(0.005),
        "Alex(2)": Margin(0.01, True),
        "SSIM": Margin(),
    }
    assert read_margins("CLIP:2%,all") == {**dict.fromkeys(CARDS, Margin()), "CLIP": Margin(0.02, True)}
    assert read_margins("none") == {}
    with pytest.raises(ValueError, match="both blocking and advisory"):
        Rules(blocking=read_margins("CLIP"), advisory=read_margins("CLIP"))


# --- seeds ------------------------------------------------------------------------------------------------------------


def with_seeds(values: dict[str, np.ndarray], levels: list[float], name: str, seed: int) -> Side:
    """Trainings whose PixCorr differs in level."""
    tables = []
    for number, level in enumerate(levels):
        own = moved(values, noise=0.01, seed=seed + number)
        own["PixCorr"] += level
        tables.append(table(own, seed=number))
    return Side(name, pa.concat_tables(tables), "demo", HASH)


def test_what_varies_between_trainings_is_no_regression_where_both_sides_have_seeds() -> None:
    values = cells(14)
    old = with_seeds(values, [0.03, -0.02, 0.01], "old", 20)
    new = with_seeds(values, [-0.04, 0.02, -0.03], "new", 30)
    rules = replace(QUICK, blocking=read_margins("PixCorr"))
    found = check(new, old, rules)
    assert found.passed and found.seeds == ((0, 1, 2), (0, 1, 2))
    one = check(with_seeds(values, [-0.0167], "new", 30), with_seeds(values, [0.0067], "old", 20), rules)
    assert not one.passed, "of two single checkpoints the same difference is clear"
    clear = check(with_seeds(values, [-0.3, -0.31, -0.29], "new", 30), old, rules)
    assert [f.metric for f in clear.of("regressed", "blocking")] == ["PixCorr"]
    half = check(new, with_seeds(values, [0.0], "old", 20), rules)
    assert any("only one side has several seeds" in note for note in half.notes)


def test_a_seed_without_an_image_is_refused() -> None:
    values = cells(15)
    short = {key: value[:, :-1] for key, value in values.items()}
    both = Side("new", pa.concat_tables([table(values), table(short, seed=1)]), "demo", HASH)
    with pytest.raises(ValueError, match=r"new: PixCorr of seed 1 lacks 2 images \(first: 139 of subject 1\)"):
        check(both, side(values), QUICK)


def test_resampled_seeds_have_the_variance_of_their_mean() -> None:
    generator = np.random.default_rng(16)
    ratios = []
    for _ in range(60):
        levels = generator.normal(size=(4, 1, 1))
        a = np.broadcast_to(levels, (4, 1, 30)).copy()  # nothing varies but the seed
        means = bootstrap_seeds(a, np.zeros((1, 1, 30)), 500)
        ratios.append(means.var() / (levels.var(ddof=1) / 4))
    assert np.mean(ratios) == pytest.approx(1, abs=0.1)


def test_the_spread_is_that_of_the_mean_over_images() -> None:
    values = np.random.default_rng(17).normal(size=(3, 25))
    variance, freedom = spread(values)
    assert float(variance) == pytest.approx(stats.sem(values.mean(axis=0)) ** 2) and float(freedom) == 24


# --- promises ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", [Design(1, 24), Design(3, 30), Design(2, 24, 3)], ids=str)
def test_a_thousand_equal_pairs_fail_at_most_at_the_promised_rate(design: Design) -> None:
    for share in false_alarms(design, QUICK, 1000, seed=1):
        assert share.interval[0] <= share.at, f"{share.value:.3f} fail where {share.at} are promised"
    assert len(ALPHAS) >= 3


@pytest.mark.parametrize("design", [Design(1, 24), Design(3, 30), Design(2, 24, 3)], ids=str)
def test_the_drop_that_is_said_to_be_detected_is_found_with_the_stated_power(design: Design) -> None:
    found = {share.at: share for share in power(design, replace(QUICK, n_permutations=1999), 800, seed=3)}
    assert found[1.0].interval[1] >= QUICK.power, f"found in {found[1.0].value:.3f}"
    assert found[0.0].interval[0] <= QUICK.alpha
    assert found[1.5].value > 0.9
    shares = [found[drop].value for drop in DROPS]
    assert all(a <= b + 0.03 for a, b in zip(shares, shares[1:], strict=False)), "the larger, the easier"


def test_many_pairs_at_once_are_measured_as_one_by_one() -> None:
    candidate, baseline = equal_pairs(Design(2, 20, 2), 3, np.random.default_rng(3))
    higher = np.array([CARDS[key].direction == "higher" for key in BLOCKING])
    margin = np.full(len(BLOCKING), 0.01)
    together = measure(candidate, baseline, higher, margin, QUICK)
    for k in range(3):
        alone = measure(candidate[:, k], baseline[:, k], higher, margin, QUICK)
        for name in ("gain", "low", "high", "p_worse", "p_better", "error", "freedom"):
            np.testing.assert_allclose(getattr(together, name)[k], getattr(alone, name), err_msg=name)


def test_the_interval_is_that_of_the_leaderboard() -> None:
    old, new = cells(18), moved(cells(18))
    found = gate(new, old)
    f = found.findings[0]
    low, high = bootstrap_interval(new[f.metric] - old[f.metric], QUICK.n_resamples, QUICK.seed, 0.9)
    assert (f.ci_low, f.ci_high) == pytest.approx((float(low), float(high)))


# --- change points ----------------------------------------------------------------------------------------------------


def test_a_level_that_moves_and_stays_is_found_where_it_moved() -> None:
    generator = np.random.default_rng(0)
    series = generator.normal(0, 0.01, (24, 4))
    series[8:, 0] -= 0.1
    series[16:, 1:3] += 0.1
    found = change_points(series)
    assert [change.index for change in found] == [8, 16] and all(change.p <= 0.05 for change in found)
    assert found[0].before[0] - found[0].after[0] == pytest.approx(0.1, abs=0.02)
    assert found[0].after == pytest.approx(found[1].before)


def test_sequences_that_never_change_show_a_change_point_at_most_at_the_promised_rate() -> None:
    generator = np.random.default_rng(1)
    hits = sum(bool(change_points(generator.standard_t(3, (10, 3)), n_permutations=199)) for _ in range(300))
    assert stats.binomtest(hits, 300).proportion_ci().low <= 0.05


def test_few_checkpoints_show_nothing() -> None:
    for n in range(1, 8):
        assert change_points(np.repeat([0.0, 1.0], [n // 2, n - n // 2])[:, None]) == []
    assert [c.index for c in change_points(np.repeat([0.0, 1.0], 4)[:, None])] == [4]
    assert change_points(np.full((20, 3), 0.4)) == []


def test_an_undefined_score_has_no_place_in_a_sequence() -> None:
    with pytest.raises(ValueError, match="undefined"):
        change_points(np.array([[0.1], [np.nan]]))


def test_the_verdict_does_not_depend_on_whether_images_are_listed() -> None:
    old = cells(3)
    sides = side(moved(old, SSIM=-0.1), "new"), side(old, "old")
    with_images, without = check(*sides, QUICK), check(*sides, QUICK, list_images=False)
    assert with_images.worse and without.worse == ()
    assert dataclasses.replace(with_images, worse=()) == without
