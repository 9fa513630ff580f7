"""Test sets and what a new subject gives: which images, which trials, in which order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.data import splits as splits_module
from benchmark.data.nsd import NSD
from benchmark.data.release import AMOUNTS, Release
from benchmark.data.splits import first_trials, shared_test_set
from benchmark.errors import UserError

SHARED = np.array([900, 3, 41, 7])


def _recordings(session: np.ndarray, published: bool = False) -> SimpleNamespace:
    """One subject's first session, and the shared images out of order."""
    return SimpleNamespace(
        root=Path("tree"),
        subjects=(1,),
        shared_ids=SHARED,
        published=published,
        trials=lambda subject: np.stack([session, session[::-1]]),
        seen=lambda subject: (np.unique(session), np.ones(len(np.unique(session)), np.int64)),
    )


def _session(length: int) -> np.ndarray:
    """Every tenth trial shows a shared image."""
    own = 1000 + np.arange(length)
    return np.where(np.arange(length) % 10 == 4, SHARED[np.arange(length) % 4], own)


@pytest.mark.parametrize(("amount", "shown"), [("1h", 750), ("30min", 375), ("15min", 188), ("15min-450", 450)])
def test_of_nsds_first_session_the_first_trials_are_taken_before_shared_ones_leave(amount: str, shown: int) -> None:
    session = _session(750)
    chosen = first_trials(_recordings(session), 1, amount)
    assert chosen.shown == shown
    expected = [t for t in range(shown) if session[t] not in SHARED]
    assert chosen.trials.tolist() == expected, "in the order of the experiment"
    np.testing.assert_array_equal(chosen.image_ids, session[expected])
    assert len(chosen.trials) == shown - (shown + 5) // 10
    assert first_trials(_recordings(session), 1, shown).trials.tolist() == expected, "a number says the same"


def test_the_amounts_nest() -> None:
    """Less data is a part of more data, not another sample."""
    recordings = _recordings(_session(750))
    chosen = [set(first_trials(recordings, 1, name).trials.tolist()) for name in ("15min", "30min", "15min-450", "1h")]
    assert chosen[0] < chosen[1] < chosen[2] < chosen[3] and len(AMOUNTS) == 4


@settings(max_examples=30, deadline=None)
@given(length=st.integers(4, 60), amount=st.integers(1, 60))
def test_any_number_of_trials_up_to_a_session(length: int, amount: int) -> None:
    session = _session(length)
    if amount > length:
        with pytest.raises(UserError, match=f"{amount} trials of a new subject: expected 1 to {length}"):
            first_trials(_recordings(session), 1, amount)
        return
    chosen = first_trials(_recordings(session), 1, amount)
    assert not np.isin(chosen.image_ids, SHARED).any() and (np.diff(chosen.trials) > 0).all()
    assert chosen.trials.max() < amount and len(chosen.trials) + np.isin(session[:amount], SHARED).sum() == amount


def test_amounts_that_are_none() -> None:
    recordings = _recordings(_session(20))
    with pytest.raises(UserError, match=r"no amount '15 min' \(did you mean '15min'\?\); choose from 1h, 30min"):
        first_trials(recordings, 1, "15 min")
    with pytest.raises(UserError, match="0 trials of a new subject: expected 1 to 20"):
        first_trials(recordings, 1, 0)
    with pytest.raises(UserError, match="the first 2 trials of subject 1 show shared images only"):
        first_trials(_recordings(np.array([3, 7, 50, 60])), 1, 2)


def test_the_test_set_is_sorted_whatever_the_order_of_the_design() -> None:
    recordings = _recordings(np.array([900, 5, 7, 3, 41, 6]))
    assert shared_test_set(recordings, [1]).tolist() == [3, 7, 41, 900]
    with pytest.raises(UserError, match="no shared image was seen by all of subjects 1"):
        shared_test_set(_recordings(np.array([5, 6])), [1])


def test_of_nsd_itself_those_who_saw_everything_have_all_shared_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits_module, "NSD_RELEASE", Release(shared=4, sessions={1: 2, 2: 1}))
    assert len(shared_test_set(_recordings(np.array([900, 5, 7, 3, 41]), published=True), [1])) == 4
    with pytest.raises(UserError, match="have 3 shared images in common; expected 4"):
        shared_test_set(_recordings(np.array([900, 5, 7, 3]), published=True), [1])
    incomplete = _recordings(np.array([900, 5, 7, 3]), published=True)
    assert len(shared_test_set(incomplete, [2])) == 3, "subject 2 did not take part in every session"


def test_the_selection_of_a_miniature_is_of_its_own_session(tiny_tree: Path) -> None:
    nsd = NSD.open(tiny_tree)
    chosen = first_trials(nsd, 2, "30min")
    assert chosen.shown == 10
    loaded = nsd.load_betas(2, average=False, sessions=[1])
    np.testing.assert_array_equal(loaded.image_ids[chosen.trials], chosen.image_ids)
    assert not np.isin(chosen.image_ids, nsd.shared_ids).any()
