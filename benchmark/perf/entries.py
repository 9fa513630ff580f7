"""What ``python -m benchmark.perf`` measures, by name, and what an entry's module must offer. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Device = Literal["cpu", "cuda"]
Side = Literal["ours", "reference"]
SIDES: tuple[Side, ...] = ("ours", "reference")


@dataclass(frozen=True)
class Goal:
    """How many times faster, and how many times smaller at its peak, ours should be on a device; None: no goal."""

    faster: float | None = None
    smaller: float | None = None


@dataclass(frozen=True)
class Entry:
    """One comparison.

    Attributes:
        name: what to type.
        ours, reference: what the two sides are, for people.
        module: where its parts are: the name of a :class:`Module`.
        goals: by device; those are the devices it is measured on.
    """

    name: str
    ours: str
    reference: str
    module: str
    goals: Mapping[Device, Goal]


ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="score",
            ours="metrics.evaluate and metrics.identification, on 1000 image pairs, without the networks",
            reference="the published way: all images at once, scikit-image, np.corrcoef of truths and reconstructions",
            module="benchmark.perf.score",
            goals={"cpu": Goal(faster=5.0, smaller=3.0)},
        ),
        Entry(
            name="dip",
            ours="methods.brain_it.dip, steps of VGG-16-BN's maps at 224 pixels and 128 channels",
            reference="Ulyanov's network in ordinary torch layers, one image at a time",
            module="benchmark.perf.dip",
            goals={"cpu": Goal(faster=1.3), "cuda": Goal(faster=10.0)},
        ),
        Entry(
            name="clusters",
            ours="methods.brain_it.mixture and clustering, full covariances",
            reference="scikit-learn's GaussianMixture",
            module="benchmark.perf.clusters",
            goals={"cpu": Goal(faster=3.0), "cuda": Goal(faster=30.0)},
        ),
        Entry(
            name="generate",
            ours="methods.brain_it.generate, in the presets' batches",
            reference="one image at a time, two calls of the UNet a step",
            module="benchmark.perf.generate",
            goals={"cpu": Goal(), "cuda": Goal(faster=5.0)},
        ),
        Entry(
            name="load",
            ours="the pool that the BITs train on, from arrays mapped into memory",
            reference="one sample at a time from HDF5",
            module="benchmark.perf.load",
            goals={"cpu": Goal(faster=5.0)},
        ),
        Entry(
            name="tokenizer",
            ours="BrainTokenizer, forward and backward: 39,548 voxels, 15,000 drawn for each example, 128 clusters",
            reference="PyG's TransformerConv on the graph of kept voxels and clusters",
            module="benchmark.perf.tokenizer",
            goals={"cpu": Goal(faster=10.0, smaller=15.0), "cuda": Goal(faster=20.0, smaller=20.0)},
        ),
        Entry(
            name="bit-step",
            ours="one training step of either BIT at the paper's sizes, an eighth of its batch",
            reference="the same written plainly: PyG's tokenizer, explicit attention, all logits, torch's AdamW",
            module="benchmark.perf.bit_step",
            goals={"cpu": Goal(faster=4.0), "cuda": Goal(faster=8.0)},
        ),
        Entry(
            name="infonce",
            ours="info_nce of 16,384 tokens and its gradients",
            reference="cross-entropies of the whole matrix of logits",
            module="benchmark.perf.infonce",
            goals={"cpu": Goal(smaller=10.0), "cuda": Goal(faster=1.0, smaller=10.0)},
        ),
        Entry(
            name="encoder",
            ours="BrainEncoder, forward and backward: 32 images, 5,000 voxels each, 5 taps",
            reference="its equations written plainly, a query for every voxel of every image",
            module="benchmark.perf.encoder",
            goals={"cpu": Goal(faster=3.0), "cuda": Goal(faster=5.0)},
        ),
    )
}
"""Every entry by name."""


@dataclass(frozen=True)
class Floor:
    """Work that no implementation avoids: float32 operations (a multiply-add is two), and bytes read or written."""

    operations: float
    nbytes: float

    def seconds(self, operations_per_s: float, bytes_per_s: float) -> float:
        """Return how long a machine of these rates needs at least: the longer of the two."""
        return max(self.operations / operations_per_s, self.nbytes / bytes_per_s)


Results = dict[str, Any]  # name -> numpy array


@dataclass(frozen=True)
class Job:
    """What a worker hands to a part: whether the small correctness run is wanted, where to run, on how many threads."""

    quick: bool
    device: Device
    threads: int


@dataclass(frozen=True)
class Part:
    """A piece of an entry that is timed by itself.

    Attributes:
        name: shown in the table.
        prepare: makes the inputs, the same ones in every process; not timed.
        ours, reference: take the inputs and return named arrays; timed.
        floor: the least work it takes.
    """

    name: str
    prepare: Callable[[Job], Any]
    ours: Callable[[Any, Job], Results]
    reference: Callable[[Any, Job], Results]
    floor: Callable[[Job], Floor]


class Module(Protocol):
    """What an entry's module defines. Importing it imports everything that either side needs; only workers do."""

    PARTS: tuple[Part, ...]
    TOLERANCES: Mapping[str, float]
    """Result name -> largest difference allowed between the sides; 0 asks for equal values."""
