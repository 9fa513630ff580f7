"""What ``python -m benchmark.perf`` measures, by name, and what an entry's module must offer. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Device = Literal["cpu", "cuda"]
Side = Literal["ours", "reference"]
SIDES: tuple[Side, ...] = ("ours", "reference")


@dataclass(frozen=True)
class Goal:
    """What ours should reach on a device.

    Attributes:
        faster, smaller: how many times faster, and how many times smaller at its peak, than the reference; None: no
            goal.
        seconds: part, or the end of some parts' names -> how long each may take.
    """

    faster: float | None = None
    smaller: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One comparison.

    Attributes:
        name: what to type.
        ours, reference: what the two sides are, for people; no reference where a time itself is the goal.
        module: where its parts are: the name of a :class:`Module`.
        goals: by device; those are the devices it is measured on.
    """

    name: str
    ours: str
    reference: str | None
    module: str
    goals: Mapping[Device, Goal]

    @property
    def sides(self) -> tuple[Side, ...]:
        """The sides that run."""
        return SIDES if self.reference is not None else ("ours",)


COMMANDS = (
    "benchmark.sweep",
    "benchmark.run",
    "benchmark.score",
    "benchmark.check",
    "benchmark.report",
    "benchmark.data",
    "benchmark.networks",
    "benchmark.convert",
    "benchmark.analyze",
    "benchmark.evidence",
    "benchmark.tracking",
    "benchmark.perf",
    "leaderboard",
    "metrics",
)
"""Every command of this project, as it is typed after ``python -m``."""

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
        Entry(
            name="gate",
            ours="benchmark.check and leaderboard, as typed: 200 rows of 4 subjects x 1000 images x 11 metrics",
            reference=None,
            module="benchmark.perf.gate",
            goals={"cpu": Goal(seconds=dict.fromkeys(("check", "leaderboard", "history"), 5.0))},
        ),
        Entry(
            name="sweep",
            ours="benchmark.sweep clusters --quick, all seven points",
            reference="seven runs of benchmark.run --quick, each by itself",
            module="benchmark.perf.sweep",
            goals={"cpu": Goal(faster=1 / 0.6), "cuda": Goal(faster=1 / 0.6)},
        ),
        Entry(
            name="start",
            ours="every command's --help; benchmark.sweep clusters --quick, seven points, where all is done",
            reference=None,
            module="benchmark.perf.start",
            goals={"cpu": Goal(seconds={"--help": 0.5, "cached sweep": 5.0})},
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
        ours, reference: take the inputs and return named arrays; timed. They raise where a result that has no
            counterpart is wrong.
        floor: the least work it takes; None where nothing of the kind can be counted.
        whole: how many times the paper's training does this; None where it is not a piece of one.
        starts_processes: whether the work is done in processes that it starts. Then nothing is warmed up, and the
            memory is that of the largest of them.
    """

    name: str
    prepare: Callable[[Job], Any]
    ours: Callable[[Any, Job], Results]
    reference: Callable[[Any, Job], Results] | None = None
    floor: Callable[[Job], Floor] | None = None
    whole: Callable[[Job], float] | None = None
    starts_processes: bool = False


class Module(Protocol):
    """What an entry's module defines. Importing it imports everything that either side needs; only workers do."""

    PARTS: tuple[Part, ...]
    TOLERANCES: Mapping[str, float]
    """Result name -> largest difference allowed between the sides; 0 asks for equal values."""
