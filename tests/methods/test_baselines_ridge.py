"""Ridge baseline: against scikit-learn's ridge and grid search, with the same folds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.model_selection import GridSearchCV
from torch import Tensor

from methods.baselines.ridge import ALPHAS, Ridge, fold_indices, image_weights


def problem(n: int, voxels: int, shape: tuple[int, ...], seed: int = 0, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """A linear relation under noise, nothing centred."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, voxels, generator=generator, dtype=torch.float64) + 0.7
    weights = torch.randn(voxels, *shape, generator=generator, dtype=torch.float64) / voxels**0.5
    y = torch.tensordot(x, weights, 1)
    return x, y + noise * torch.randn(y.shape, generator=generator, dtype=torch.float64) + 3


@pytest.mark.parametrize(("n", "voxels"), [(12, 40), (40, 12), (7, 7)])
@pytest.mark.parametrize("alpha", [0.1, 3.0, 1e4])
def test_one_penalty_equals_sklearn(n: int, voxels: int, alpha: float) -> None:
    x, y = problem(n, voxels, (3, 4))
    new = problem(5, voxels, (1,), seed=1)[0]
    ridge = Ridge([alpha]).fit(x, y)
    reference = SklearnRidge(alpha=alpha, solver="svd").fit(x.numpy(), y.flatten(1).numpy())
    assert ridge.alpha == alpha and ridge.errors == ()
    assert ridge.predict(new).shape == (5, 3, 4)
    np.testing.assert_allclose(ridge.predict(new).flatten(1).numpy(), reference.predict(new.numpy()), atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(10, 30),
    voxels=st.integers(2, 40),
    folds=st.integers(2, 6),
    seed=st.integers(0, 100),
    noise=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_penalty_and_its_errors_equal_a_grid_search(n: int, voxels: int, folds: int, seed: int, noise: float) -> None:
    x, y = problem(n, voxels, (5,), seed, noise)
    alphas = [0.1, 1.0, 10.0, 100.0, 1e3]
    ridge = Ridge(alphas, folds=folds, seed=seed).fit(x, y)
    outs = [out.numpy() for out in fold_indices(n, folds, seed)]
    search = GridSearchCV(
        SklearnRidge(solver="svd"),
        {"alpha": alphas},
        scoring="neg_mean_squared_error",
        cv=[(np.setdiff1d(np.arange(n), out), out) for out in outs],
    ).fit(x.numpy(), y.numpy())
    assert ridge.alpha == search.best_params_["alpha"]
    np.testing.assert_allclose(ridge.errors, -search.cv_results_["mean_test_score"], rtol=1e-8)
    np.testing.assert_allclose(ridge.predict(x).numpy(), search.predict(x.numpy()), atol=1e-8)


@pytest.mark.parametrize(("n", "voxels"), [(12, 40), (40, 12)])
@pytest.mark.parametrize("alpha", [0.1, 30.0])
def test_a_prediction_is_a_weighted_sum_of_targets(n: int, voxels: int, alpha: float) -> None:
    x, y = problem(n, voxels, (3, 4))
    new = problem(5, voxels, (1,), seed=1)[0]
    weights = image_weights(x, new, alpha)
    torch.testing.assert_close(torch.tensordot(weights, y, 1), Ridge([alpha]).fit(x, y).predict(new))
    torch.testing.assert_close(weights.sum(1), torch.ones(5, dtype=torch.float64))


def test_chunks_of_targets_change_nothing() -> None:
    x, y = problem(20, 30, (4, 6))
    whole, parts = Ridge().fit(x, y), Ridge(chunk=5).fit(x, y)
    assert whole.alpha == parts.alpha
    np.testing.assert_allclose(parts.errors, whole.errors, rtol=1e-10)
    torch.testing.assert_close(parts.predict(x), whole.predict(x))


def test_half_the_precision_loses_little() -> None:
    x, y = problem(25, 60, (8,))
    single, double = Ridge().fit(x.float(), y.float()), Ridge().fit(x, y)
    assert single.alpha == double.alpha and single.predict(x.float()).dtype == torch.float32
    torch.testing.assert_close(single.predict(x.float()).double(), double.predict(x), atol=1e-4, rtol=1e-4)


def test_much_noise_asks_for_a_large_penalty_and_little_for_a_small_one() -> None:
    clean = Ridge().fit(*problem(60, 20, (10,), noise=1e-3)).alpha
    noisy = Ridge().fit(*problem(60, 20, (10,), noise=20.0)).alpha
    assert clean < 1 < noisy and {clean, noisy} <= set(ALPHAS)


def test_held_out_rows_do_not_enter_their_own_prediction() -> None:
    """Targets that have nothing to do with the inputs are predicted no better than by their mean."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 100, generator=generator), torch.randn(40, 200, generator=generator)
    ridge = Ridge().fit(x, y)
    assert min(ridge.errors) > float(y.var(0, correction=0).mean())
    assert ridge.alpha >= 1e4


def test_folds_are_a_seeded_partition() -> None:
    folds = fold_indices(23, 5, seed=3)
    assert torch.equal(torch.cat(folds).sort().values, torch.arange(23))
    assert {len(fold) for fold in folds} == {4, 5}
    assert all(torch.equal(a, b) for a, b in zip(folds, fold_indices(23, 5, seed=3), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(folds, fold_indices(23, 5, seed=4), strict=True))


def test_constant_inputs_predict_the_mean() -> None:
    _, y = problem(10, 3, (2,))
    prediction = Ridge().fit(torch.ones(10, 3), y).predict(torch.ones(4, 3))
    torch.testing.assert_close(prediction, y.mean(0).expand(4, -1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ridge([]), "positive penalties"),
        (lambda: Ridge([1.0, 0.0]), "positive penalties"),
        (lambda: Ridge(folds=1), "two folds"),
        (lambda: Ridge().fit(torch.zeros(4, 2), torch.zeros(4, 1)), "4 images into 5 folds"),
        (lambda: Ridge().fit(torch.zeros(6, 2), torch.zeros(5, 1)), r"got \(6, 2\) and \(5, 1\)"),
        (lambda: Ridge().fit(torch.zeros(6, 2), torch.zeros(6)), "targets"),
        (lambda: Ridge().fit(torch.zeros(6, 2), torch.zeros(6, 1).long()), "floating-point"),
        (lambda: Ridge().fit(torch.full((6, 2), torch.nan), torch.zeros(6, 1)), "finite"),
        (lambda: Ridge().fit(torch.zeros(6, 2), torch.full((6, 1), torch.inf)), "finite"),
        (lambda: Ridge().predict(torch.zeros(1, 2)), "before fit"),
        (lambda: Ridge([1.0]).fit(torch.zeros(6, 2), torch.zeros(6, 1)).predict(torch.zeros(1, 3)), "2 voxels"),
    ],
)
def test_what_does_not_fit_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
