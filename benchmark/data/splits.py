"""Which images train, which choose settings, which test (Brain-IT: shared images test, 10 % of the others validate)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmark.data.nsd import NSD
from benchmark.errors import UserError


@dataclass(frozen=True)
class Splits:
    """NSD ids, ascending. Training and validation images were each seen by one subject alone; test images by all."""

    train: dict[int, np.ndarray]  # by subject (from 1)
    validation: dict[int, np.ndarray]
    test: np.ndarray


def make_splits(nsd: NSD, subjects: Sequence[int] | None = None, seed: int = 0, fraction: float = 0.1) -> Splits:
    """Split what the subjects saw.

    A subject's split depends on the seed and that subject alone, so it stays the same whichever others are used.

    Args:
        nsd: the data.
        subjects: from 1; default: all that are open.
        seed: of the validation split.
        fraction: of each subject's own images that validate (at least one of them, where there are two or more).

    Raises:
        UserError: no shared image was seen by all of the subjects, or a subject has no image of its own.
    """
    chosen = tuple(subjects or nsd.subjects)
    train, validation = {}, {}
    test = nsd.shared_ids
    for subject in chosen:
        ids, _ = nsd.seen(subject)
        own = np.setdiff1d(ids, nsd.shared_ids)
        if len(own) < 2:
            raise UserError(f"{nsd.root}: subject {subject} saw {len(own)} images of its own; expected at least 2")
        order = np.random.default_rng([seed, subject]).permutation(own)
        count = max(1, round(fraction * len(own)))
        validation[subject], train[subject] = np.sort(order[:count]), np.sort(order[count:])
        test = np.intersect1d(test, ids)
    if not len(test):
        raise UserError(
            f"{nsd.root}: no shared image was seen by all of subjects {', '.join(map(str, chosen))}; use fewer subjects"
        )
    assert (np.diff(test) > 0).all(), "test images are in ascending order of NSD id, as the metrics expect"
    seen_by_one = np.concatenate([*train.values(), *validation.values()])
    assert len(np.unique(seen_by_one)) == len(seen_by_one) and not np.isin(seen_by_one, test).any()
    return Splits(train, validation, test)
