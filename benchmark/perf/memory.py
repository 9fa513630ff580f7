"""The most memory that this process had resident since a moment of choice."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident() -> int:
    """Return the bytes resident now."""
    return int(psutil.Process().memory_info().rss)


def reset_peak() -> bool:
    """Let the high-water mark start from now; False where the system keeps one for the process's whole life only."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak() -> int:
    """Return the high-water mark of resident bytes."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
