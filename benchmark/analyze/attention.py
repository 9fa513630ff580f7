"""From a finished variant to its Brain Tokens' maps: reads its stages, computes, and hands over to the figures."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file
from torch import Tensor

from benchmark.data.brain import Voxels, receptive_fields
from benchmark.data.nsd import NSD
from benchmark.data.prepared import PreparedData
from benchmark.errors import UserError
from benchmark.progress import Progress
from benchmark.results import Result
from benchmark.stages.bit import build_bit, voxel_layout
from benchmark.stages.features import LowLevelTargets, as_pixels, read_shapes, semantic_network
from benchmark.stages.prepare import TREE, Prepared, Samples, open_data
from benchmark.stages.transfer import whole_bit
from benchmark.store import write_json
from methods.brain_it.attention import (
    Agreement,
    Floats,
    Selectivity,
    contralaterality,
    cross_attention,
    field_agreement,
    semantic_selectivity,
)
from methods.brain_it.tokenizer import VoxelLayout
from methods.brain_it.transformer import BIT

TRUTH = "simulation/truth.safetensors"
_BATCH = 8  # recordings at a time: 7190 queries x 128 tokens x 8 heads of each are 29 MB a block


@dataclass(frozen=True)
class Grid:
    """The maps of one grid of places: of the semantic tokens, or of a layer of the low-level branch.

    Attributes:
        title: for people.
        maps: (C, side, side) attention of each place to each token, averaged over the images.
        contralateral: tokens of one hemisphere serve the other half of the image; None where sides are not known.
        fields: maps lie over the voxels' receptive fields; None where these are not known.
    """

    title: str
    maps: Floats
    contralateral: Agreement | None = None
    fields: Agreement | None = None


@dataclass(frozen=True)
class Anatomy:
    """Where the voxels are, all subjects' one after the other.

    Attributes:
        right: (N,) bool, on the right hemisphere.
        coordinates: (N, 3) mm: right, anterior, superior; None where the data have no surfaces.
        voxels: each subject's true voxels, where the brain is simulated.
    """

    right: np.ndarray
    coordinates: np.ndarray | None
    voxels: tuple[Voxels, ...] = ()


@dataclass(frozen=True)
class Analysis:
    """All that the figures and the page show.

    Attributes:
        variant: its name.
        subjects: from 1; all that the model knows.
        layout: their voxels and clusters.
        shown: subjects whose recordings were looked at, from 1.
        images: (n, S, S, 3) uint8, what they saw.
        ids: (n,) NSD ids.
        kind: ``test`` or ``validation``.
        grids: the semantic grid first.
        by_image: (n, C, side, side) maps of the semantic branch on each image.
        selectivity: contents that tokens attend to.
        anatomy: where the voxels are; None where it is not known.
        alike: correlation of the images with their mirror images, which says how much left and right differ at all.
    """

    variant: str
    subjects: tuple[int, ...]
    layout: VoxelLayout
    shown: tuple[int, ...]
    images: np.ndarray
    ids: np.ndarray
    kind: str
    grids: tuple[Grid, ...]
    by_image: Floats
    selectivity: Selectivity
    anatomy: Anatomy | None
    alike: float

    @property
    def labels(self) -> np.ndarray:
        """(N,) cluster of each voxel."""
        return self.layout.labels.numpy()

    @property
    def voxels(self) -> np.ndarray:
        """(C, subjects) voxels of each subject in each cluster."""
        counts = self.layout.n_voxels
        per_subject = np.split(self.labels, np.cumsum(counts)[:-1])
        return np.stack([np.bincount(own, minlength=self.layout.n_clusters) for own in per_subject], axis=1)

    @property
    def right(self) -> Floats | None:
        """(C,) share of each cluster's voxels on the right hemisphere, NaN where it has none."""
        return None if self.anatomy is None else _cluster_means(self.anatomy.right.astype(float), self.layout)

    def sentences(self) -> list[str]:
        """Return the findings, one a line."""
        subjects = ", ".join(map(str, self.shown))
        tokens, images = self.layout.n_clusters, len(self.ids)
        lines = [f"{self.variant}: {tokens} tokens, {images} {self.kind} images, seen by subjects {subjects}"]
        for grid in self.grids:
            if grid.contralateral is not None:
                lines.append(f"{grid.title}: right hemisphere, left of the image: r = {_said(grid.contralateral)}")
            if grid.fields is not None:
                lines.append(f"{grid.title}: maps over their voxels' receptive fields: r = {_said(grid.fields)}")
        if self.anatomy is None:
            lines.append("hemispheres are not known; name the run's data with --data DIR to compare with them")
        lines.append(f"images and their mirror images correlate {self.alike:.2f}: at 1, left and right are the same")
        return lines

    def record(self) -> dict[str, Any]:
        """Return the numbers for ``attention.json``."""

        def plain(found: Agreement | None) -> dict[str, float] | None:
            return None if found is None else {k: v for k, v in asdict(found).items() if k != "each"}

        right = self.right
        return {
            "variant": self.variant,
            "images": self.kind,
            "n_images": len(self.ids),
            "subjects": list(self.shown),
            "mirror_correlation": self.alike,
            "grids": {
                grid.title: {"contralateral": plain(grid.contralateral), "receptive_fields": plain(grid.fields)}
                for grid in self.grids
            },
            "tokens": [
                {
                    "token": token,
                    "voxels": {str(s): int(n) for s, n in zip(self.subjects, own, strict=True)},
                    "right": None if right is None or np.isnan(right[token]) else float(right[token]),
                    "selectivity": float(self.selectivity.z[token]),
                    "top_images": self.ids[self.selectivity.top[token]].tolist(),
                }
                for token, own in enumerate(self.voxels)
            ],
        }

    def write(self, out: Path) -> None:
        """Write all files into ``out``."""
        from benchmark.analyze import figures, page

        pictures = {"spatial": figures.spatial(self), "semantic": figures.semantic(self)}
        if self.anatomy is not None and self.anatomy.coordinates is not None:
            pictures["cortex"] = figures.cortex(self)
        for name, picture in pictures.items():
            _whole(out / f"{name}.png", partial(picture.save, format="PNG"))
        maps = {grid.title: np.ascontiguousarray(grid.maps, np.float32) for grid in self.grids}
        _whole(out / "maps.safetensors", lambda path: save_arrays(maps, path))
        write_json(out / "attention.json", self.record())
        page.write(self, out / "index.html")


def _whole(path: Path, write: Callable[[Path], None]) -> None:
    """Have a file written beside its place, and put it there when it is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def _said(found: Agreement) -> str:
    value, chance, high = map(two_digits, (found.value, found.chance, found.chance_high))
    return f"{value} (chance {chance}, 95 % of it below {high}; p = {found.p:.2g})"


def two_digits(value: float) -> str:
    """Return a number with two digits after the point, without a sign before nought."""
    return f"{round(value, 2) + 0.0:.2f}"


def analyse(
    name: str,
    reconstruct: Result,
    *,
    images: str = "test",
    count: int | None = None,
    data: Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Analysis:
    """Look at what a finished variant's Brain Tokens contribute to.

    Args:
        name: of the variant.
        reconstruct: its stage ``reconstruct``, whose upstream stages hold the models and the data.
        images: ``test`` or ``validation``.
        count: the first so many images.
        data: folder of the data that the run read; where it simulated them they are found.
        device: where the models run.
        progress: shows bars.

    Raises:
        UserError: a stage is missing, the data are other ones, or there are fewer than three images.
    """
    progress = progress or Progress(enabled=False)
    prepared, targets = Prepared(reconstruct.needs("data").folder), reconstruct.needs("targets")
    for branch in ("semantic", "lowlevel"):
        if "predictor" in reconstruct.config[branch]:
            kind = reconstruct.config[branch]["predictor"]
            raise UserError(f"{name}: its {branch} branch is no BIT ({kind}); only BIT has Brain Tokens to look at")
    layout = voxel_layout(prepared, reconstruct.needs("clusters").folder)
    subjects = tuple(reconstruct.config["generation"]["subjects"])
    if images == "validation":
        subjects = prepared.subjects
        ids = prepared.validation_ids
    else:
        ids = prepared.test_ids(subjects)
    ids = ids[:count]
    if len(ids) < 3:
        raise UserError(f"{len(ids)} {images} images: expected 3 or more")
    samples = _of(prepared.samples(ids), [prepared.subjects.index(s) for s in subjects])
    anatomy = _anatomy(reconstruct.needs("data"), prepared, data)

    low = reconstruct.config["lowlevel"]
    tokens = LowLevelTargets(targets.folder, low, dict(targets.config), prepared).tokens
    shape = read_shapes(targets.folder)["semantic"]
    jobs: list[tuple[str, str, Mapping[str, Any], int, int]] = [
        ("semantic", _semantic_role(reconstruct), reconstruct.config["semantic"], *shape),
        ("low-level", "lowlevel", low, tokens.tokens, tokens.width),
    ]
    found: dict[str, np.ndarray] = {}
    with progress.bar("attention", total=2 * len(samples)) as bar:
        for branch, role, config, n_queries, width in jobs:
            bit = build_bit(config, layout, n_queries, width)
            bit.load_state_dict(_trained(reconstruct, role))
            bit.to(device).eval()
            found[branch] = _attention(bit, prepared, samples, ids if branch == "semantic" else ids[:0], device, bar)
    by_image = found["semantic"]
    grids = [_grid("semantic", by_image.mean(0), layout, anatomy)]
    start = 0
    for layer, size in zip(low["layers"], tokens.layer_sizes, strict=True):
        part = found["low-level"][0, start : start + size]
        grids.append(_grid(f"low-level {layer}", part, layout, anatomy))
        start += size
    seen = np.asarray(prepared.images[ids])
    with progress.bar("contents", total=1):
        contents = _contents(targets, seen, device)
    side = grids[0].maps.shape[-1]
    return Analysis(
        variant=name,
        subjects=prepared.subjects,
        layout=layout,
        shown=subjects,
        images=seen,
        ids=ids,
        kind=images,
        grids=tuple(grids),
        by_image=by_image.transpose(0, 2, 1).reshape(len(ids), layout.n_clusters, side, side),
        selectivity=semantic_selectivity(by_image, contents),
        anatomy=anatomy,
        alike=_mirror_correlation(seen),
    )


def _trained(reconstruct: Result, role: str) -> dict[str, Tensor]:
    """Return the tensors of a BIT: whole, or a new subject's voxel table in the base model."""
    base, folder = reconstruct.upstream(f"base_{role}"), reconstruct.needs(role).folder
    return load_file(folder / "bit.safetensors") if base is None else whole_bit(base.folder, folder)


def _semantic_role(reconstruct: Result) -> str:
    """Return the stage that trained the semantic BIT last."""
    return "joint" if "joint" in reconstruct.record["upstream"] else "semantic"


def _of(samples: Samples, positions: Sequence[int]) -> Samples:
    """Return the recordings of these subjects alone."""
    keep = np.isin(samples.subject, positions)
    return replace(samples, **{f.name: getattr(samples, f.name)[keep] for f in fields(samples)})


def _attention(bit: BIT, data: Prepared, samples: Samples, ids: np.ndarray, device: str, bar: Any) -> np.ndarray:
    """Return maps averaged over the recordings of each of ``ids`` (n x T x C), or, without, of all (1 x T x C)."""
    row = np.searchsorted(ids, samples.image) if len(ids) else np.zeros(len(samples), np.int64)
    total = np.zeros((max(1, len(ids)), bit.query_tokens.shape[0], bit.tokenizer.layout.n_clusters), np.float32)
    for start in range(0, len(samples), _BATCH):
        part = slice(start, start + _BATCH)
        betas = torch.from_numpy(data.padded_betas(samples.subject[part], samples.row[part]))
        subject = torch.from_numpy(samples.subject[part])
        maps = cross_attention(bit, betas.to(device), subject.to(device)).cpu().numpy()
        for k, one in zip(row[part], maps, strict=True):
            total[k] += one
        bar.advance(len(maps))
    return total / np.bincount(row, minlength=len(total))[:, None, None]


def _grid(title: str, attention: np.ndarray, layout: VoxelLayout, anatomy: Anatomy | None) -> Grid:
    """Compare maps (T x C) with what is known of the voxels."""
    side = math.isqrt(len(attention))
    if side**2 != len(attention):
        raise UserError(f"{title}: {len(attention)} tokens are no square grid of places")
    maps = np.ascontiguousarray(attention.T).reshape(-1, side, side)
    if anatomy is None:
        return Grid(title, maps)
    right = _cluster_means(anatomy.right.astype(float), layout)
    agreement = None
    if anatomy.voxels:
        own = np.concatenate([receptive_fields(voxels, side) for voxels in anatomy.voxels])
        agreement = field_agreement(maps, _cluster_means(own, layout).reshape(-1, side, side))
    return Grid(title, maps, contralaterality(maps, right), agreement)


def _cluster_means(values: np.ndarray, layout: VoxelLayout) -> np.ndarray:
    """Return the mean over each cluster's voxels: C, or C x D; NaN where it has none."""
    labels = layout.labels.numpy()
    sums = np.zeros((layout.n_clusters, *values.shape[1:]))
    np.add.at(sums, labels, values)
    counts = np.bincount(labels, minlength=layout.n_clusters).astype(float)
    counts[counts == 0] = np.nan
    return sums / counts.reshape(-1, *[1] * (values.ndim - 1))


@torch.inference_mode()
def _contents(targets: Result, images: np.ndarray, device: str) -> np.ndarray:
    """Return what the frozen semantic network says of the images' places: n x T x D float32."""
    network = semantic_network(targets.config).to(device)
    size = getattr(network, "input_size", None)

    def tokens(part: np.ndarray) -> Tensor:
        found: Tensor = network(as_pixels(part, size).to(device)).float().cpu()
        return found

    return torch.cat([tokens(images[k : k + _BATCH]) for k in range(0, len(images), _BATCH)]).numpy()


def _anatomy(prepare: Result, prepared: Prepared, data: Path | None) -> Anatomy | None:
    """Open the data behind a run and say where its voxels are."""
    tree = prepare.upstream(TREE)
    if tree is not None:
        source: NSD | PreparedData = open_data(tree.folder / TREE)
    elif data is not None:
        source = open_data(data)
        if source.digest() != prepare.record["digests"].get(TREE):
            raise UserError(f"--data {data}: are not the data that the run read (their digest differs)")
    else:
        return None
    left = [len(source.vertices(subject, "lh")) for subject in prepared.subjects]
    right = np.concatenate([np.arange(n) >= k for n, k in zip(prepared.n_voxels, left, strict=True)])
    try:
        places: np.ndarray | None = np.concatenate([source.coordinates(s) for s in prepared.subjects])
    except UserError:  # no surfaces: no figure of the cortex
        places = None
    return Anatomy(right, places, _true_voxels(source.root / TRUTH, prepared.subjects))


def _true_voxels(path: Path, subjects: Sequence[int]) -> tuple[Voxels, ...]:
    """Return the simulated brains' true voxels; none where the data were measured."""
    if not path.is_file():
        return ()
    truth = load_arrays(path)
    return tuple(Voxels(**{f.name: truth[f"subj{s:02d}.{f.name}"] for f in fields(Voxels)}) for s in subjects)


def _mirror_correlation(images: np.ndarray) -> float:
    """Return the correlation of images with their mirror images, each pixel's mean over the images taken off."""
    x = images.astype(np.float32) - images.mean(0, dtype=np.float32)
    return float(np.corrcoef(x.ravel(), x[:, :, ::-1].ravel())[0, 1])
