"""How amounts are written for people."""

from __future__ import annotations


def gigabytes(n: int | float) -> str:
    """Return a number of bytes as people say it: ``39.6 GB``, ``480 MB``, ``12 kB`` (decimal, as disks are sold)."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= factor:
            value = n / factor
            return f"{value:.1f} {unit}" if value < 100 and unit in ("TB", "GB") else f"{value:.0f} {unit}"
    return f"{n:.0f} bytes"
