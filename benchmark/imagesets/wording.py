"""Messages about somebody else's files: their names and their libraries' complaints, fit for one line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from benchmark.errors import UserError

SHOWN = 3


def one_line(text: object, longest: int = 160) -> str:
    """Return ``text`` with everything unprintable escaped (a file name may hold a line break), cut to ``longest``."""
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
    return escaped if len(escaped) <= longest else escaped[: longest - 3] + "..."


def listed(names: Sequence[object], total: int | None = None) -> str:
    """Return ``a, b, c and 4 more``; ``total`` says how many there are where ``names`` are the first of them."""
    more = (len(names) if total is None else total) - min(len(names), SHOWN)
    return ", ".join(one_line(name, 80) for name in names[:SHOWN]) + (f" and {more} more" if more else "")


def counted(number: int, noun: str) -> str:
    """Return ``1 image``, ``2 images``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def place(path: Path | str) -> str:
    """Return a path as messages show it."""
    return one_line(path, 400)


def reason(error: BaseException) -> str:
    """Return a library's complaint without its path, on one line."""
    if isinstance(error, OSError) and error.errno is not None:
        return one_line(os.strerror(error.errno).lower() if error.errno > 0 else error)
    return one_line(error) or type(error).__name__


def unreadable(path: Path | str, error: OSError) -> UserError:
    """Return the error for a file or folder that the system does not hand out."""
    remedy = "ask for read permission (chmod u+r)" if isinstance(error, PermissionError) else "check the path"
    return UserError(f"{place(path)}: cannot be read ({reason(error)}); {remedy}")


def damaged(path: Path | str, error: BaseException, expected: str) -> UserError:
    """Return the error for a file that its library cannot make sense of."""
    return UserError(f"{place(path)}: damaged ({reason(error)}); expected {expected}; copy or write it again")
