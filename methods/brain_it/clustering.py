"""Voxel-to-cluster mapping (V2C): functional clusters of voxels, shared by all subjects (Brain-IT, Sec. 3.1).

Voxels of all subjects are clustered together by their encoder embeddings, so a cluster holds voxels of many brains that
do the same thing, and each voxel belongs to exactly one cluster::

    v2c = gaussian_mixture(normalise(encoder_embeddings), n_clusters=128)

The alternatives of Brain-IT, App. A.2, `by_coordinates` and `by_atlas`, ask for anatomy instead. A new subject's voxels
take the cluster of the most similar known voxel: `nearest_voxel_labels`.

Everywhere, N is the number of voxels of all subjects, subject after subject.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from methods.brain_it.mixture import fit_full_mixture

Covariance = Literal["full", "tied", "diag", "spherical"]
FloatArray = NDArray[np.float32]

# Floats in one block of a voxels x clusters or voxels x voxels matrix (256 MB).
_BLOCK_ELEMENTS = 2**26


@dataclass(frozen=True)
class ClusterSizes:
    """How many voxels the clusters hold, over all subjects, and how many clusters a subject has no voxel in.

    A cluster without voxels of a subject gives that subject a token that says nothing of its activity.
    """

    minimum: int
    median: float
    maximum: int
    empty: int
    empty_per_subject: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class V2C:
    """Which cluster each voxel belongs to.

    Attributes:
        labels: (N,) int32 in 0..n_clusters-1.
        n_clusters: clusters, empty ones included.
        means: (n_clusters, D) float32 centres in the clustered space; None where the mapping has none (atlas, table).
        method: how it was made, e.g. "gmm-full", "kmeans", "atlas", "table".
        log_likelihood: mean log-likelihood of a fitted voxel, for mixtures.
        converged: whether the fit stopped by itself before its limit of iterations.

    Raises:
        ValueError: labels are not 1-D or lie outside 0..n_clusters-1.
    """

    labels: NDArray[np.int32]
    n_clusters: int
    means: FloatArray | None = None
    method: str = "table"
    log_likelihood: float | None = None
    converged: bool = True

    def __post_init__(self) -> None:
        labels = np.asarray(self.labels)
        if labels.ndim != 1 or labels.size == 0 or labels.dtype.kind not in "iu":
            raise ValueError(f"V2C: labels of shape {labels.shape}, {labels.dtype}; expected integers of shape (N,)")
        if labels.min() < 0 or labels.max() >= self.n_clusters:
            raise ValueError(f"V2C: labels {labels.min()}..{labels.max()}; expected 0..{self.n_clusters - 1}")
        object.__setattr__(self, "labels", labels.astype(np.int32))

    def per_subject(self, voxel_counts: Sequence[int]) -> list[NDArray[np.int32]]:
        """Return each subject's labels.

        Raises:
            ValueError: the counts do not add up to N.
        """
        if sum(voxel_counts) != len(self.labels):
            raise ValueError(f"V2C: voxel counts add up to {sum(voxel_counts)}; expected {len(self.labels)} voxels")
        return np.split(self.labels, np.cumsum(voxel_counts)[:-1])

    def sizes(self, voxel_counts: Sequence[int] = ()) -> ClusterSizes:
        """Return how large the clusters are; empty clusters a subject too if voxel counts are given."""
        sizes = np.bincount(self.labels, minlength=self.n_clusters)
        per_subject = self.per_subject(voxel_counts) if len(voxel_counts) else []
        return ClusterSizes(
            minimum=int(sizes.min()),
            median=float(np.median(sizes)),
            maximum=int(sizes.max()),
            empty=int((sizes == 0).sum()),
            empty_per_subject=tuple(self.n_clusters - len(np.unique(labels)) for labels in per_subject),
        )

    def table(self) -> NDArray[np.int64]:
        """Return the official code's form: (n_clusters, largest cluster) voxel numbers, ascending, padded with -1."""
        sizes = np.bincount(self.labels, minlength=self.n_clusters)
        order = np.argsort(self.labels, kind="stable")
        table = np.full((self.n_clusters, sizes.max()), -1, dtype=np.int64)
        table[np.arange(sizes.max()) < sizes[:, None]] = order
        return table

    @classmethod
    def from_table(cls, table: NDArray[Any], means: FloatArray | None = None) -> V2C:
        """Read the official code's form (see `table`).

        Raises:
            ValueError: not a 2-D integer table that names every voxel 0..N-1 exactly once.
        """
        table = np.asarray(table)
        if table.ndim != 2 or table.dtype.kind not in "iu":
            raise ValueError(
                f"V2C: table of shape {table.shape}, {table.dtype}; expected integers (n_clusters, largest cluster)"
            )
        clusters, columns = np.nonzero(table != -1)
        voxels = table[clusters, columns]
        if not np.array_equal(np.sort(voxels), np.arange(len(voxels))):
            raise ValueError("V2C: table does not name every voxel 0..N-1 exactly once; expected padding with -1 only")
        labels = np.empty(len(voxels), dtype=np.int32)
        labels[voxels] = clusters
        return cls(labels, len(table), means, "table")

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write one safetensors file; all but the arrays is JSON in its header, under "v2c", beside `metadata`."""
        tensors: dict[str, NDArray[Any]] = {"labels": self.labels}
        if self.means is not None:
            tensors["means"] = np.ascontiguousarray(self.means)
        meta = {
            "n_clusters": self.n_clusters,
            "method": self.method,
            "log_likelihood": self.log_likelihood,
            "converged": self.converged,
        }
        save_file(tensors, path, metadata={**(metadata or {}), "v2c": json.dumps(meta, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> V2C:
        """Read a file that `save` wrote.

        Raises:
            ValueError: the file is something else.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                meta = json.loads((file.metadata() or {})["v2c"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            return cls(labels=tensors["labels"], means=tensors.get("means"), **meta)
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path}: not a voxel-to-cluster file; expected one written by V2C.save") from error


def normalise(embeddings: NDArray[Any]) -> FloatArray:
    """Return embeddings (N, D) scaled to length 1, as float32. A row of zeros stays as it is."""
    x = np.asarray(embeddings, dtype=np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.finfo(np.float32).tiny)


def gaussian_mixture(
    embeddings: NDArray[Any],
    n_clusters: int = 128,
    *,
    covariance: Covariance = "full",
    seed: int = 0,
    max_iter: int = 100,
    tolerance: float = 1e-3,
    regularisation: float = 1e-6,
    subsample: int | None = None,
) -> V2C:
    """Cluster voxels by a Gaussian mixture; each takes its likeliest component (Brain-IT, Sec. 3.1; official defaults).

    scikit-learn's mixture in float32, one k-means initialisation; with full covariances by the same steps in another
    order (:mod:`methods.brain_it.mixture`). Give it `normalise`d embeddings: nothing is scaled here.

    Args:
        embeddings: (N, D).
        n_clusters: components (the paper sweeps 8 to 512).
        covariance: shape of a component. "diag" is far cheaper, and what small clusters of many dimensions can support.
        seed: seeds the initialisation and the subsample.
        max_iter: most EM iterations.
        tolerance: stop when the mean log-likelihood gains less.
        regularisation: added to the variances.
        subsample: fit on this many voxels, drawn at random; all voxels are labelled all the same.

    Raises:
        ValueError: fewer voxels than clusters, values that are not finite, or a mixture that cannot be fitted.
    """
    x = _points("gaussian_mixture", embeddings, n_clusters)
    fitted = x
    if subsample is not None and subsample < len(x):
        rows = np.random.default_rng(seed).choice(len(x), subsample, replace=False)
        fitted = _points("gaussian_mixture: subsample", x[np.sort(rows)], n_clusters)
    try:
        labels, means, log_likelihood, converged = _fit_mixture(
            x, fitted, n_clusters, covariance, seed, max_iter, tolerance, regularisation
        )
    except ValueError as error:
        raise ValueError(
            f"gaussian_mixture: cannot fit {n_clusters} clusters to {len(fitted)} voxels in {x.shape[1]} dimensions; "
            f'use fewer clusters, covariance "diag" or more regularisation ({error})'
        ) from error
    return V2C(
        labels,
        n_clusters,
        means=means.astype(np.float32),
        method=f"gmm-{covariance}",
        log_likelihood=log_likelihood,
        converged=converged,
    )


def _fit_mixture(
    x: FloatArray,
    fitted: FloatArray,
    n_clusters: int,
    covariance: Covariance,
    seed: int,
    max_iter: int,
    tolerance: float,
    regularisation: float,
) -> tuple[NDArray[Any], NDArray[Any], float, bool]:
    """Return labels of ``x``, means, log-likelihood and whether the fit to ``fitted`` converged."""
    if covariance == "full":
        full = fit_full_mixture(
            fitted, n_clusters, seed=seed, max_iter=max_iter, tolerance=tolerance, regularisation=regularisation
        )
        return full.predict(torch.from_numpy(x)).numpy(), full.means.numpy(), full.log_likelihood, full.converged
    mixture = GaussianMixture(
        n_clusters,
        covariance_type=covariance,
        tol=tolerance,
        reg_covar=regularisation,
        max_iter=max_iter,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported as V2C.converged
        mixture.fit(fitted)
    block = max(1, _BLOCK_ELEMENTS // (n_clusters * x.shape[1]))
    labels = np.concatenate([mixture.predict(x[i : i + block]) for i in range(0, len(x), block)])
    return labels, mixture.means_, float(mixture.lower_bound_), bool(mixture.converged_)


def by_coordinates(
    coordinates: NDArray[Any], n_clusters: int = 128, *, method: Literal["kmeans", "gmm"] = "kmeans", seed: int = 0
) -> V2C:
    """Cluster voxels by where they are (Brain-IT, App. A.2; the paper does not name the algorithm).

    Args:
        coordinates: (N, 3) positions in a space common to the subjects (fsaverage), any unit.
        n_clusters: clusters.
        method: "kmeans", or "gmm" for a full-covariance mixture.
        seed: seeds the initialisation.

    Raises:
        ValueError: fewer voxels than clusters, values that are not finite, not three coordinates, or an unknown method.
    """
    x = _points("by_coordinates", coordinates, n_clusters)
    if x.shape[1] != 3:
        raise ValueError(f"by_coordinates: coordinates {x.shape}; expected (N, 3)")
    if method == "gmm":
        return gaussian_mixture(x, n_clusters, seed=seed)
    if method != "kmeans":
        raise ValueError(f'by_coordinates: method "{method}"; expected "kmeans" or "gmm"')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct positions than clusters: some stay empty
        kmeans = KMeans(n_clusters, random_state=seed).fit(x)
    return V2C(
        kmeans.labels_,
        n_clusters,
        means=kmeans.cluster_centers_.astype(np.float32),
        method="kmeans",
        converged=kmeans.n_iter_ < kmeans.max_iter,
    )


def by_atlas(parcels: NDArray[Any]) -> V2C:
    """Make every parcel of an atlas a cluster (Brain-IT, App. A.2: Schaefer-400 gives 84, Schaefer-1000 gives 198).

    Args:
        parcels: (N,) parcel ids, any integers; clusters are the ids that occur, in ascending order. The atlas's "no
            parcel" id, if it occurs, is a cluster like the others, because each voxel belongs to one.

    Raises:
        ValueError: not a 1-D array of integers.
    """
    ids = np.asarray(parcels)
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise ValueError(f"by_atlas: parcels of shape {ids.shape}, {ids.dtype}; expected integers of shape (N,)")
    present, labels = np.unique(ids, return_inverse=True)
    return V2C(labels.astype(np.int32), len(present), method="atlas")


def nearest_voxel_labels(
    new_embeddings: NDArray[Any], reference_embeddings: NDArray[Any], reference_labels: NDArray[Any]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Give each new voxel the cluster of the nearest reference voxel (transfer to a new subject; official code).

    Distance is L2 between embeddings scaled to length 1 (done here).

    Args:
        new_embeddings: (M, D) encoder embeddings of the new subject.
        reference_embeddings: (N, D) encoder embeddings of the subjects that were clustered.
        reference_labels: (N,) their clusters.

    Returns:
        labels (M,) int32 and the nearest reference voxels (M,) int64, the first among equals.

    Raises:
        ValueError: shapes do not fit, or values that are not finite.
    """
    new = normalise(_points("nearest_voxel_labels: new_embeddings", new_embeddings))
    reference = normalise(_points("nearest_voxel_labels: reference_embeddings", reference_embeddings))
    labels = np.asarray(reference_labels)
    if new.shape[1] != reference.shape[1] or labels.shape != (len(reference),):
        raise ValueError(
            f"nearest_voxel_labels: new {new.shape}, reference {reference.shape}, labels {labels.shape}; "
            "expected (M, D), (N, D), (N,)"
        )
    # Between unit vectors the smallest distance is the largest dot product.
    block = max(1, _BLOCK_ELEMENTS // len(reference))
    nearest = np.concatenate([(new[i : i + block] @ reference.T).argmax(axis=1) for i in range(0, len(new), block)])
    return labels[nearest].astype(np.int32), nearest.astype(np.int64)


def _points(name: str, points: NDArray[Any], n_clusters: int = 1) -> FloatArray:
    """Check points (N, D) and return them as float32."""
    x = np.asarray(points, dtype=np.float32)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name}: shape {x.shape}; expected (voxels, dimensions)")
    bad = ~np.isfinite(x).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{name}: {bad.sum()} of {len(x)} voxels have NaN or infinite values, the first is voxel {bad.argmax()}"
        )
    if n_clusters < 1 or n_clusters > len(x):
        raise ValueError(f"{name}: {n_clusters} clusters for {len(x)} voxels; expected 1..{len(x)} clusters")
    return x
