"""Identification against brute force, scipy and np.corrcoef."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import correlation

from metrics.identification import (
    compare,
    correlation_distance,
    correlation_matrix,
    n_way_top1,
    pairwise_correlation,
    pool_n_way_top1,
    top1,
    two_way,
    wins,
)


def features(n: int = 20, f: int = 300, noise: float = 3.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(n, f)).astype(np.float32)
    return truth, (truth + noise * rng.normal(size=(n, f))).astype(np.float32)


def published_two_way(truth: np.ndarray, recon: np.ndarray) -> np.ndarray:
    """The procedure as every published evaluation has it: a 2N x 2N matrix, column ranks, strict "<"."""
    n = len(truth)
    r = np.corrcoef(truth, recon)[:n, n:]
    congruent = np.diag(r)
    return np.array([np.sum(r[:, j] < congruent[j]) for j in range(n)]) / (n - 1)


@pytest.mark.parametrize("f", [7, 300, 20_000])
def test_two_way_equals_the_published_procedure(f: int) -> None:
    truth, recon = features(f=f, noise=10.0)
    np.testing.assert_array_equal(two_way(correlation_matrix(truth, recon)), published_two_way(truth, recon))


def test_matrix_equals_corrcoef_and_its_diagonal_exactly_the_pairs() -> None:
    truth, recon = features(n=30, f=9000)
    truth += 50.0  # activations are far from centred
    r = correlation_matrix(truth, recon)
    np.testing.assert_allclose(r, np.corrcoef(truth, recon)[:30, 30:], rtol=0, atol=2e-6)
    np.testing.assert_array_equal(np.diag(r), pairwise_correlation(truth, recon))
    np.testing.assert_allclose(np.diag(r), np.diag(np.corrcoef(truth, recon)[:30, 30:]), rtol=0, atol=1e-13)


def test_features_that_hardly_differ_are_still_ranked_as_in_float64() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=2048)
    truth = (base + 1e-3 * rng.normal(size=(25, 2048))).astype(np.float32)
    recon = (truth + 1e-3 * rng.normal(size=truth.shape)).astype(np.float32)
    r = correlation_matrix(truth, recon)
    assert (np.abs(r - 1) < 1e-5).all()  # the float32 products alone could not tell these apart
    np.testing.assert_array_equal(two_way(r), published_two_way(truth, recon))


@pytest.mark.parametrize("scale", [1e-20, 1e18])
def test_scale_of_the_features_does_not_matter(scale: float) -> None:
    truth, recon = features()
    scaled = correlation_matrix(truth * np.float64(scale), recon * np.float64(scale))
    np.testing.assert_allclose(scaled, correlation_matrix(truth, recon), atol=1e-6)


def test_distance_equals_scipy() -> None:
    truth, recon = features(n=12, f=50)
    expected = [correlation(t.astype(float), r.astype(float)) for t, r in zip(truth, recon, strict=True)]
    np.testing.assert_allclose(correlation_distance(truth, recon), expected, rtol=0, atol=1e-13)


def test_a_tie_is_a_loss_or_half_a_win() -> None:
    truth, recon = features(n=10, noise=0.1)
    truth[4] = truth[7]  # a duplicated truth costs each of its two reconstructions one comparison
    recon[4] = recon[7]
    r = correlation_matrix(truth, recon)
    assert compare(r).equal.tolist() == [0, 0, 0, 0, 1, 0, 0, 1, 0, 0]
    assert wins(r).tolist() == [9, 9, 9, 9, 8, 9, 9, 8, 9, 9]
    assert wins(r, "half")[[4, 7]].tolist() == [8.5, 8.5]
    assert top1(r).tolist() == [1, 1, 1, 1, 0, 1, 1, 0, 1, 1]
    assert top1(r, "half")[[4, 7]].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("n", [8, 64, 333])
def test_equal_truths_tie_bitwise_wherever_they_stand(n: int) -> None:
    truth, recon = features(n=n, f=5003)
    truth[n // 2 :] = truth[: n - n // 2]
    found = compare(correlation_matrix(truth, recon))
    twice = [sum(np.array_equal(t, u) for u in truth) - 1 for t in truth]
    np.testing.assert_array_equal(found.equal, twice)


def test_a_flat_reconstruction_loses_all_or_scores_chance() -> None:
    truth, recon = features(n=10, noise=0.1)
    recon[3] = 0.7
    r = correlation_matrix(truth, recon)
    assert np.isnan(r[:, 3]).all() and np.isfinite(np.delete(r, 3, axis=1)).all()
    assert wins(r)[3] == 0 and wins(r, "half")[3] == 4.5
    assert wins(r)[:3].tolist() == [9, 9, 9]
    assert compare(r).undefined.tolist() == [0, 0, 0, 9, 0, 0, 0, 0, 0, 0]
    assert two_way(r).mean() == pytest.approx(0.9)
    assert top1(r, "half")[3] == pytest.approx(0.1)


def test_a_flat_truth_is_lost_to_by_nobody_and_beaten_by_nobody() -> None:
    truth, recon = features(n=6, noise=0.1)
    truth[2] = -1.0
    r = correlation_matrix(truth, recon)
    assert wins(r).tolist() == [4, 4, 0, 4, 4, 4]
    assert wins(r, "half").tolist() == [4.5, 4.5, 2.5, 4.5, 4.5, 4.5]


def test_one_image_for_all_scores_exactly_a_half() -> None:
    truth, _ = features(n=11)
    r = correlation_matrix(truth, np.repeat(truth[:1] + 1, 11, axis=0))
    assert sorted(wins(r)) == sorted(wins(r, "half")) == list(range(11))


def test_n_way_equals_enumeration_and_drawing() -> None:
    truth, recon = features(n=9, noise=8.0)
    truth[5] = truth[2]
    r = correlation_matrix(truth, recon)
    for n, ties in itertools.product((2, 3, 6, 9), ("strict", "half")):
        expected = []
        for j in range(9):
            others = [i for i in range(9) if i != j]
            won = []
            for drawn in itertools.combinations(others, n - 1):
                beaten = all(r[i, j] < r[j, j] for i in drawn)
                unbeaten = all(r[i, j] <= r[j, j] for i in drawn)
                level = sum(r[i, j] == r[j, j] for i in drawn)
                won.append(float(beaten) if ties == "strict" else unbeaten / (level + 1))
            expected.append(np.mean(won))
        np.testing.assert_allclose(n_way_top1(r, n, ties), expected, atol=1e-12)  # type: ignore[arg-type]

    rng = np.random.default_rng(0)
    truth, recon = features(n=60, f=40, noise=4.0)
    r = correlation_matrix(truth, recon)
    hits = np.zeros(60)
    for _ in range(400):
        for j in range(60):
            drawn = rng.choice(np.delete(np.arange(60), j), 9, replace=False)
            hits[j] += (r[drawn, j] < r[j, j]).all()
    assert n_way_top1(r, 10).mean() == pytest.approx(hits.mean() / 400, abs=0.01)


def test_n_way_ends_are_two_way_and_retrieval() -> None:
    r = correlation_matrix(*features(n=40, noise=9.0))
    np.testing.assert_allclose(n_way_top1(r, 2), two_way(r), atol=1e-15)
    np.testing.assert_array_equal(top1(r), (wins(r) == 39).astype(float))
    assert (np.diff([n_way_top1(r, n).mean() for n in range(2, 41)]) <= 1e-12).all()


def test_retrieval_from_a_pool_is_the_expectation_over_draws() -> None:
    truth, recon = features(n=5, f=30, noise=3.0)
    pool = np.random.default_rng(3).normal(size=(12, 30))
    found = pool_n_way_top1(truth, recon, pool, n=4)
    for j in range(5):
        own = np.corrcoef(truth[j], recon[j])[0, 1]
        r = [np.corrcoef(p, recon[j])[0, 1] for p in pool]
        assert found[j] == pytest.approx(np.mean([max(d) < own for d in itertools.combinations(r, 3)]))
    # A pool of 72,000 images and 999 distractors: the binomials are exact integers, no overflow.
    large = pool_n_way_top1(truth[:, :3], recon[:, :3], np.random.default_rng(4).normal(size=(3000, 3)), n=1000)
    assert ((large >= 0) & (large <= 1)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(2, 40), st.integers(0, 2**32 - 1), st.sampled_from(["strict", "half"]))
def test_permuting_images_permutes_their_scores(n: int, f: int, seed: int, ties: str) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, (n, f)).astype(np.float32)  # few levels: ties and flat rows happen
    recon = rng.integers(0, 3, (n, f)).astype(np.float32)
    order = rng.permutation(n)
    r, permuted = correlation_matrix(truth, recon), correlation_matrix(truth[order], recon[order])
    for n_way in {2, n}:
        np.testing.assert_array_equal(n_way_top1(permuted, n_way, ties), n_way_top1(r, n_way, ties)[order])  # type: ignore[arg-type]
    count = compare(r)
    higher = n - 1 - count.lower - count.equal - count.undefined
    assert (higher >= 0).all()
    assert ((two_way(r, ties) >= 0) & (two_way(r, ties) <= 1)).all()  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 10), st.integers(0, 2**32 - 1))
def test_identical_images_win_everything_and_a_flat_distractor_changes_no_rank(n: int, seed: int) -> None:
    truth = np.random.default_rng(seed).normal(size=(n, 30))
    r = correlation_matrix(truth, truth)
    assert (two_way(r) == 1).all() and (top1(r) == 1).all()
    np.testing.assert_allclose(correlation_distance(truth, truth), 0, atol=1e-12)
    more = np.concatenate([truth, np.ones((1, 30))])
    np.testing.assert_array_equal(wins(correlation_matrix(more, more))[:n], wins(r))


@pytest.mark.parametrize("noise", [5.0, 1e-3])
def test_the_other_direction_lets_each_truth_choose_among_reconstructions(noise: float) -> None:
    truth, recon = features(n=25, f=2048, noise=noise)
    if noise < 1:  # features that hardly differ, so that float32 products alone could not rank them
        truth = (1 + 1e-3 * truth).astype(np.float32)
        recon = (truth + 1e-3 * np.roll(recon, 1, axis=1)).astype(np.float32)
    recon[3] = recon[8]  # two truths meet a tie
    expected = published_two_way(recon, truth)
    r = correlation_matrix(truth, recon, "truth-to-recon")
    np.testing.assert_array_equal(two_way(r, direction="truth-to-recon"), expected)
    np.testing.assert_allclose(r, correlation_matrix(truth, recon), rtol=0, atol=1e-6)
    assert compare(r, "truth-to-recon").equal[[3, 8]].tolist() == [1, 1]
    np.testing.assert_array_equal(top1(r, direction="truth-to-recon"), (expected == 1).astype(float))
    half = wins(r, "half", "truth-to-recon")
    np.testing.assert_array_equal(half, 24 * expected + 0.5 * np.isin(np.arange(25), [3, 8]))
    assert not np.array_equal(expected, two_way(correlation_matrix(truth, recon)))


def test_bad_input_is_named() -> None:
    truth, recon = features(n=4)
    recon[2, 5] = np.nan
    with pytest.raises(ValueError, match="reconstruction features of row 2 hold a NaN"):
        correlation_matrix(truth, recon)
    with pytest.raises(ValueError, match=r"truth features are \(4, 300\), reconstruction features \(3, 300\)"):
        correlation_matrix(truth, truth[:3])
    with pytest.raises(ValueError, match=r"must be \(images, features\), not of shape \(300,\)"):
        correlation_matrix(truth[0], truth[0])
    r = correlation_matrix(truth, truth)
    with pytest.raises(ValueError, match="5-way identification needs n between 2 and 4"):
        n_way_top1(r, 5)
    with pytest.raises(ValueError, match="at least 2 images"):
        two_way(r[:1, :1])
    with pytest.raises(ValueError, match="pool has 7 features an image, the reconstructions 300"):
        pool_n_way_top1(truth, truth, np.zeros((9, 7)), 3)
