"""Score anybody's reconstructions under a published protocol.

``python -m benchmark.score`` is the command; :func:`score_images` is what other code calls. Nothing heavy is imported
until it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmark.score.scoring import Block, Distractors, Result, score_images

_HOME = "benchmark.score.scoring"

__all__ = ["Block", "Distractors", "Result", "score_images"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'benchmark.score' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME), name)


def __dir__() -> list[str]:
    return sorted(__all__)
