"""What this process and those that it started have used: memory at its highest, seconds of the processor."""

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
    return _bytes(most)


def peak_of_children() -> int:
    """Return the most bytes that any process started from here, and ended since, had resident."""
    return _bytes(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def cpu_seconds() -> float:
    """Return the seconds of the processor that this process and all that it started and that ended have had."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def _bytes(maxrss: int) -> int:
    return maxrss if sys.platform == "darwin" else maxrss * 1024
