from __future__ import annotations

import numpy as np
import pytest

from leaderboard.ranking import group, rank
from leaderboard.statistics import summarise
from metrics.cards import CARDS


def _names(ranking):
    return [entry.row.variant for entry in ranking.entries]


def test_direction_comes_from_the_cards(row):
    rows = [row("a", {"SSIM": 0.3, "LPIPS": 0.5}), row("b", {"SSIM": 0.4, "LPIPS": 0.4})]
    ranking = rank(rows)
    assert _names(ranking) == ["b", "a"]
    assert ranking.entries[0].ranks == {"SSIM": 1, "LPIPS": 1}
    assert ranking.entries[1].mean_rank == 2
    assert ranking.best("SSIM") == ranking.best("LPIPS") == {("Brain-IT", "b")}


def test_overall_is_the_mean_rank_and_ties_share(row):
    rows = [
        row("a", {"PixCorr": 0.3, "SSIM": 0.3, "CLIP": 0.9}),
        row("b", {"PixCorr": 0.3, "SSIM": 0.2, "CLIP": 0.8}),
        row("c", {"PixCorr": 0.1, "SSIM": 0.1, "CLIP": 0.7}),
        row("d", {"PixCorr": 0.1, "SSIM": 0.1, "CLIP": 0.7}),
    ]
    ranking = rank(rows)
    assert [entry.rank for entry in ranking.entries] == [1, 2, 3, 3]
    assert ranking.entries[0].ranks["PixCorr"] == 1.5
    assert ranking.entries[0].mean_rank == pytest.approx(3.5 / 3)
    assert ranking.best("PixCorr") == {("Brain-IT", "a"), ("Brain-IT", "b")}
    assert "no per-image scores" in ranking.sentence


def test_a_tie_for_the_first_place_is_said(row):
    ranking = rank([row("a", {"SSIM": 0.3, "LPIPS": 0.5}), row("b", {"SSIM": 0.4, "LPIPS": 0.6})])
    assert ranking.sentence == "best: a tie of a, b (mean rank 1.5)"


def test_a_missing_metric_means_no_overall_rank_and_shifts_nobody(row):
    full = [row("a", {"SSIM": 0.3, "LPIPS": 0.5}), row("b", {"SSIM": 0.2, "LPIPS": 0.6})]
    ranking = rank([row("partial", {"SSIM": 0.9}), *full])
    assert _names(ranking) == ["a", "b", "partial"]
    assert (ranking.entries[2].rank, ranking.entries[2].mean_rank) == (None, None)
    assert ranking.entries[:2] == rank(full).entries
    assert ranking.best("SSIM") == {("Brain-IT", "partial")}
    lonely = rank([row("x", {"SSIM": 0.9}), row("y", {"LPIPS": 0.9})])
    assert lonely.sentence == "no row has every metric, so none has an overall rank"


def test_references_and_branches_are_carried_along_unranked(row):
    rows = [
        row("mean image", {"SSIM": 0.9, "LPIPS": 0.0, "CLIP": 1.0}, kind="reference"),
        row("a", {"SSIM": 0.3, "LPIPS": 0.5}),
        row("a low-level", {"SSIM": 0.8}, kind="branch"),
    ]
    ranking = rank(rows)
    assert _names(ranking) == ["a"]
    assert ranking.entries[0].rank == 1  # what only a reference has is not missing from a method
    assert ranking.best("SSIM") == {("Brain-IT", "a")}
    assert ranking.best("CLIP") == set()
    assert [item.variant for item in ranking.rows] == ["a", "a low-level", "mean image"]
    assert ranking.sentence == "only one ranked row: a"


def test_tracks_and_protocols_are_never_mixed(row):
    rows = [
        row("a", {"SSIM": 0.3}),
        row("b", {"SSIM": 0.3}, track="paper"),
        row("c", {"SSIM": 0.3}, protocol_hash="f" * 16),
    ]
    for pair in (rows[:2], rows[::2]):
        with pytest.raises(ValueError, match="never ranked together"):
            rank(pair)
    assert [len(members) for members in group([*rows, rows[0]]).values()] == [2, 1, 1]
    assert all(rank(members) for members in group(rows).values())


def test_no_rows_and_the_same_row_twice_are_refused(row):
    with pytest.raises(ValueError, match="no rows"):
        rank([])
    with pytest.raises(ValueError, match="more than one row of Brain-IT a"):
        rank([row("a", {}), row("a", {})])


def _sweep_of_three(row, table_of, gap, metrics=tuple(CARDS)):
    generator = np.random.default_rng(0)
    shared = {key: generator.normal(0.5, 0.1, size=(2, 30)) for key in metrics}
    values = {}
    for place, variant in enumerate("abc"):
        values["Brain-IT", variant] = {
            key: shared[key]
            + (-1 if CARDS[key].direction == "higher" else 1) * gap * place
            + generator.normal(0, 0.05, size=(2, 30))
            for key in metrics
        }
    table = table_of(values)
    return [
        row(variant, {k: v.model_dump() for k, v in found.items()}) for (_, variant), found in summarise(table).items()
    ], table


def test_clear_differences_give_sure_ranks(row, table_of):
    ranking = rank(*_sweep_of_three(row, table_of, gap=0.2))
    assert _names(ranking) == ["a", "b", "c"]
    assert [(e.p_best, e.rank_low, e.rank_high) for e in ranking.entries] == [(1, 1, 1), (0, 2, 2), (0, 3, 3)]
    assert [e.shown_place for e in ranking.entries] == ["1", "2", "3"]
    assert ranking.sentence == "best: a (mean rank 1.0; best in 100 % of resamples; separable from b on all 11 metrics)"


def test_equal_rows_give_unsure_ranks(row, table_of):
    rows, table = _sweep_of_three(row, table_of, gap=0.0)
    ranking = rank(rows, table)
    assert sum(entry.p_best for entry in ranking.entries) == pytest.approx(1)
    assert all(entry.rank_low <= entry.rank <= entry.rank_high for entry in ranking.entries)
    assert all(entry.rank_high - entry.rank_low >= 1 for entry in ranking.entries)
    assert [(entry.place, entry.tied) for entry in ranking.entries] == [(1, True)] * 3, "overlapping intervals are ties"
    assert ranking.entries[0].shown_place == "1="
    assert "not separable from" in ranking.sentence
    assert rank(rows, table) == ranking
    assert rank(rows[::-1], table).entries == ranking.entries


def test_a_row_is_tied_only_with_those_whose_intervals_meet_its_own(row, table_of):
    rows, table = _sweep_of_three(row, table_of, gap=0.2)
    columns = table.to_pydict()
    rng = np.random.default_rng(3)
    shift = {"a": 0.0, "b": 0.4, "c": 0.4}  # b and c change places from image to image, a stays ahead of both
    for index, (metric, variant) in enumerate(zip(columns["metric"], columns["variant"], strict=True)):
        sign = -1 if CARDS[metric].direction == "higher" else 1
        columns["value"][index] = 0.5 + sign * shift[variant] + rng.normal(0, 0.05)
    ranking = rank([row(v, {k: i.model_dump() for k, i in found.items()}) for (_, v), found in summarise(columns).items()], columns)  # fmt: skip
    assert [(e.row.variant, e.shown_place) for e in ranking.entries if e.row.variant == "a"] == [("a", "1")]
    assert sorted(e.shown_place for e in ranking.entries) == ["1", "2=", "2="]


def test_rows_without_intervals_tie_only_where_their_mean_ranks_are_equal(row):
    ranking = rank([row("a", {"SSIM": 0.4}), row("b", {"SSIM": 0.3}), row("c", {"SSIM": 0.3})])
    assert [e.shown_place for e in ranking.entries] == ["1", "2=", "2="]


def test_being_behind_on_a_metric_is_said(row, table_of):
    rows, table = _sweep_of_three(row, table_of, gap=0.2)
    columns = table.to_pydict()
    for index, (metric, variant) in enumerate(zip(columns["metric"], columns["variant"], strict=True)):
        if metric == "SSIM" and variant == "b":
            columns["value"][index] += 1
    rows = [
        row(variant, {k: v.model_dump() for k, v in found.items()})
        for (_, variant), found in summarise(columns).items()
    ]
    assert rank(rows, columns).sentence.endswith("separable from b on all 11 metrics; behind it on 1)")


def test_per_image_scores_of_only_some_rows_give_no_uncertainty(row, table_of):
    rows, table = _sweep_of_three(row, table_of, gap=0.2)
    ranking = rank([*rows, row("d", {key: 0.5 for key in CARDS})], table)
    assert all(entry.p_best is None for entry in ranking.entries)


def test_the_method_is_named_where_there_are_several(row):
    ranking = rank(
        [row("a", {"SSIM": 0.3}), row("a", {"SSIM": 0.2}, method="ridge"), row("", {"SSIM": 0.1}, method="MLP")]
    )
    assert [ranking.name(entry.row) for entry in ranking.entries] == ["Brain-IT, a", "ridge, a", "MLP"]
