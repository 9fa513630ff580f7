"""Errors that a user can cause, and how they reach the terminal."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The call or its input is wrong (exit code 2).

    The message is one or two lines: what is wrong, where, what was expected, and what to type to mend it.
    """


class RunError(Exception):
    """A run failed or a check found a regression (exit code 1); the message says where to look."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the option nearest to ``word``, or an empty string where none is near."""
    near = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""
