"""Which images train, which choose settings, which test (Brain-IT: shared images test, 10 % of the others validate).

And which trials a new subject gives: the first of its first session (Sec. 4.3, App. A.7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Protocol

import numpy as np

from benchmark.data.release import AMOUNTS, NSD_RELEASE
from benchmark.errors import UserError, did_you_mean


class Recordings(Protocol):
    """What a split needs to know: ``NSD``, ``Algonauts`` and ``PreparedData`` all do."""

    root: Path
    subjects: tuple[int, ...]
    shared_ids: np.ndarray
    published: bool

    def seen(self, subject: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the NSD ids of a subject's averaged recordings, ascending, and the repeats behind each."""
        ...


class Trials(Recordings, Protocol):
    """What a selection of single trials needs to know: ``NSD`` and ``PreparedData``."""

    def trials(self, subject: int) -> np.ndarray:
        """Return the NSD id shown in each trial: ``sessions x trials_per_session``."""
        ...


@dataclass(frozen=True)
class Splits:
    """NSD ids, ascending. Training and validation images were each seen by one subject alone; test images by all."""

    train: dict[int, np.ndarray]  # by subject (from 1)
    validation: dict[int, np.ndarray]
    test: np.ndarray


def make_splits(
    data: Recordings, subjects: Sequence[int] | None = None, seed: int = 0, fraction: float = 0.1
) -> Splits:
    """Split what the subjects saw.

    A subject's split depends on the seed and that subject alone, so it stays the same whichever others are used.

    Args:
        data: the recordings.
        subjects: from 1; default: all that are open.
        seed: of the validation split.
        fraction: of each subject's own images that validate (at least one of them, where there are two or more).

    Raises:
        UserError: no shared image was seen by all of the subjects, or a subject has no image of its own.
    """
    chosen = tuple(subjects or data.subjects)
    train, validation = {}, {}
    for subject in chosen:
        ids, _ = data.seen(subject)
        own = np.setdiff1d(ids, data.shared_ids)
        if len(own) < 2:
            raise UserError(f"{data.root}: subject {subject} saw {len(own)} images of its own; expected at least 2")
        order = np.random.default_rng([seed, subject]).permutation(own)
        count = max(1, round(fraction * len(own)))
        validation[subject], train[subject] = np.sort(order[:count]), np.sort(order[count:])
    test = shared_test_set(data, chosen)
    seen_by_one = np.concatenate([*train.values(), *validation.values()])
    assert len(np.unique(seen_by_one)) == len(seen_by_one) and not np.isin(seen_by_one, test).any()
    return Splits(train, validation, test)


def shared_test_set(data: Recordings, subjects: Sequence[int]) -> np.ndarray:
    """Return the shared images that all of the subjects saw, ascending in NSD id, as the metrics expect them.

    Of NSD's 1000, subjects 1, 2, 5 and 7 saw all; 907 were seen by all eight.

    Raises:
        UserError: there is none, or, of NSD itself, not all 1000 of subjects that saw everything.
    """
    test = np.unique(data.shared_ids)
    for subject in subjects:
        test = np.intersect1d(test, data.seen(subject)[0])
    named = ", ".join(map(str, subjects))
    if not len(test):
        raise UserError(f"{data.root}: no shared image was seen by all of subjects {named}; use fewer subjects")
    assert (np.diff(test) > 0).all(), "test images are in ascending order of NSD id, as the metrics expect"
    if data.published and set(subjects) <= set(NSD_RELEASE.complete_subjects) and len(test) != NSD_RELEASE.shared:
        raise UserError(
            f"{data.root}: subjects {named} have {len(test)} shared images in common; expected {NSD_RELEASE.shared}, "
            "which they all saw\nread every session of theirs"
        )
    return test


@dataclass(frozen=True)
class Selection:
    """Single trials of a new subject's first session, in the order of the experiment."""

    trials: np.ndarray  # n int64: from 0 within the first session; shared images are left out
    image_ids: np.ndarray  # n int64 NSD ids
    shown: int  # trials of the session that were taken, shared images among them


def first_trials(data: Trials, subject: int, amount: str | int = "1h") -> Selection:
    """Choose what a new subject gives: the first trials of its first session, without those of shared images.

    They are not averaged, and z-scored as the whole session is (official code: "1 h" is session 1).

    Args:
        data: the recordings.
        subject: from 1.
        amount: ``1h``, ``30min``, ``15min`` or ``15min-450`` (NSD: the first 750, 375, 188 or 450 trials), or a number
            of trials.

    Raises:
        UserError: an amount that is not known or more than a session, or data without single trials.
    """
    return select_trials(data.trials(subject)[0], data.shared_ids, subject, amount)


def select_trials(session: np.ndarray, shared_ids: np.ndarray, subject: int, amount: str | int = "1h") -> Selection:
    """Choose from the images shown in a subject's first session, one a trial; as :func:`first_trials` does."""
    if isinstance(amount, str):
        if amount not in AMOUNTS:
            known = ", ".join(AMOUNTS)
            raise UserError(
                f"no amount '{amount}'{did_you_mean(amount, AMOUNTS)}; choose from {known}, or a number of trials"
            )
        shown = ceil(AMOUNTS[amount] * len(session))
    else:
        shown = amount
    if not 1 <= shown <= len(session):
        raise UserError(f"{shown} trials of a new subject: expected 1 to {len(session)}, as its first session has")
    trials = np.flatnonzero(~np.isin(session[:shown], shared_ids))
    if not len(trials):
        raise UserError(f"the first {shown} trials of subject {subject} show shared images only; take more")
    return Selection(trials, session[trials], shown)
