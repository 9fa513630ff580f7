"""Stage ``anatomy``: where the voxels are, for clusters that ask for place instead of function (App. A.2).

It stands upstream of ``clusters`` only where ``clustering.method`` needs it: everything else is fitted without anatomy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.context import StageContext
from benchmark.data import paths
from benchmark.data.nsd import NSD
from benchmark.data.prepared import PreparedData
from benchmark.data.supplies import SUPPLIES, atlas, bucket
from benchmark.errors import UserError
from benchmark.stages.prepare import Prepared, source_of
from methods.brain_it.clustering import V2C, by_atlas, by_coordinates

COORDINATES = "coordinates"
FILE = "anatomy.npy"


def run(ctx: StageContext) -> dict[str, Any]:
    """Read each voxel's place or parcel.

    Output: ``anatomy.npy``, all subjects' voxels in the order of ``Prepared``: N x 3 float32 coordinates (mm: right,
    anterior, superior), or N int64 parcels of an atlas.
    """
    what = ctx.config["what"]
    values = anatomy(source_of(ctx), Prepared(ctx.inputs["data"]).subjects, what)
    np.save(ctx.out / FILE, values)
    if what == COORDINATES:
        return {"voxels": len(values)}
    return {"voxels": len(values), "parcels": len(np.unique(values))}


def anatomy(source: NSD | PreparedData, subjects: Iterable[int], what: str) -> np.ndarray:
    """Return the coordinates (N x 3) or the parcels (N) of all voxels of these subjects, one after the other.

    Args:
        source: the data.
        subjects: from 1.
        what: ``coordinates``, or the name of an atlas.

    Raises:
        UserError: the data lack them, or a file is damaged; says what to put where.
    """
    try:
        parts = [source.coordinates(s) if what == COORDINATES else source.parcels(s, what) for s in subjects]
    except UserError as error:
        raise UserError(f"clustering.method {what}: {str(error).splitlines()[0]}\n{_remedy(source, what)}") from error
    return np.concatenate(parts)


def _remedy(source: NSD | PreparedData, what: str) -> str:
    """Say what to put where."""
    if what == COORDINATES:
        files = [paths.surface(hemisphere) for hemisphere in paths.HEMISPHERES]
        command = bucket(paths.SURFACES, "*.pial")
        supply = SUPPLIES["fsaverage"]
    else:
        files = [paths.annotation(hemisphere, paths.ATLASES[what]) for hemisphere in paths.HEMISPHERES]
        command = atlas(paths.ATLASES[what])
        supply = SUPPLIES["schaefer"]
    where, again = f"{source.root}", ""
    if isinstance(source, PreparedData):
        where = "the data tree that the store was made of"
        again = f", then prepare again: python -m benchmark.data prepare TREE --out {source.root}"
    return f"put {files[0]} and {Path(files[1]).name} ({supply.name}) into {where}{again}; there, type: {command}"


def cluster_by_anatomy(folder: Path, config: Mapping[str, Any]) -> V2C:
    """Cluster voxels by what stage ``anatomy`` wrote into ``folder``, as ``config`` of stage ``clusters`` says.

    Raises:
        UserError: more clusters than voxels.
    """
    values = np.load(folder / FILE)
    if config["method"] != COORDINATES:
        return by_atlas(values)
    if config["n_clusters"] > len(values):
        raise UserError(f"clustering.n_clusters is {config['n_clusters']}, but there are {len(values)} voxels")
    return by_coordinates(values, config["n_clusters"], seed=config["seed"])
