"""Which way a logged metric is better, from its name alone."""

from __future__ import annotations

from typing import Literal

from metrics.cards import CARDS

_SMALLER = {"loss"}
_LARGER = {"correlation"}


def direction(name: str) -> Literal["min", "max"] | None:
    """Return the better end of a metric such as ``validation/loss``, ``lowlevel/PixCorr``; None where there is none.

    The last word of the name decides: a metric's key (see its card), ``loss`` or ``correlation``. Bounds of intervals
    have no better end.
    """
    words = name.replace("/", " ").replace("_", " ").split()
    last = words[-1] if words else ""
    if card := CARDS.get(last):
        return "max" if card.direction == "higher" else "min"
    if last in _SMALLER:
        return "min"
    return "max" if last in _LARGER else None
