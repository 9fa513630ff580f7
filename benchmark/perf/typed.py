"""Runs a command of this project as a user types it: for entries whose times are those of whole processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from benchmark.errors import RunError


def typed(*arguments: str | Path, codes: Collection[int] = (0,)) -> str:
    """Run ``python -m`` with these arguments, and return what it printed.

    Raises:
        RunError: it ended with none of ``codes``; the message has its last line.
    """
    words = ["-m", *map(str, arguments)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode not in codes:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise RunError(f"python {' '.join(words)} ended with {done.returncode}: {said[-1]}")
    return done.stdout
