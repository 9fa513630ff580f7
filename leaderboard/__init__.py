"""The leaderboard: result rows, comparison statistics, ranking, tables and the static page.

Nothing here imports torch, and nothing is imported before it is used: ``import leaderboard`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leaderboard.orderings import Ordering, print_orderings
    from leaderboard.publish import build
    from leaderboard.published import PublishedRow
    from leaderboard.ranking import Ranking, rank
    from leaderboard.schema import Cost, Interval, Manifest, Row, read_leaderboard, read_rows, write_row
    from leaderboard.site import Axis, Gallery
    from leaderboard.statistics import compare, summarise
    from leaderboard.table import markdown, print_table

_HOMES = {
    "Axis": "site",
    "Cost": "schema",
    "Gallery": "site",
    "Interval": "schema",
    "Manifest": "schema",
    "Ordering": "orderings",
    "PublishedRow": "published",
    "Ranking": "ranking",
    "Row": "schema",
    "build": "publish",
    "compare": "statistics",
    "markdown": "table",
    "print_orderings": "orderings",
    "print_table": "table",
    "rank": "ranking",
    "read_leaderboard": "schema",
    "read_rows": "schema",
    "summarise": "statistics",
    "write_row": "schema",
}

__all__ = [
    "Axis",
    "Cost",
    "Gallery",
    "Interval",
    "Manifest",
    "Ordering",
    "PublishedRow",
    "Ranking",
    "Row",
    "build",
    "compare",
    "markdown",
    "print_orderings",
    "print_table",
    "rank",
    "read_leaderboard",
    "read_rows",
    "summarise",
    "write_row",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'leaderboard' has no attribute '{name}'")
    return getattr(importlib.import_module(f"leaderboard.{_HOMES[name]}"), name)
