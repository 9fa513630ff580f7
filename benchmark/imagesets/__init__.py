"""Sets of images from anywhere: a folder of pictures, or an array in any of the usual files.

``read_images`` opens what ``--recons`` and ``--truth`` name. ``paired`` aligns the two. ``read_ids`` and
``read_subset`` read lists of image ids.
"""

from __future__ import annotations

from benchmark.imagesets.imageset import ImageSet, paired
from benchmark.imagesets.labels import read_ids, read_subset
from benchmark.imagesets.reading import read_images

__all__ = ["ImageSet", "paired", "read_ids", "read_images", "read_subset"]
