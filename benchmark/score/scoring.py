"""Scores of a set of reconstructions: per image, their means with intervals, and what to hold them against."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmark.errors import UserError
from benchmark.imagesets import ImageSet, paired
from leaderboard.schema import Interval
from leaderboard.statistics import COLUMNS, summarise
from metrics.calibration import chance_and_ceiling
from metrics.evaluate import Backbone, Scores, TruthCache, evaluate, subset
from metrics.protocols import Protocol, get_protocol, protocol_hash

Id = int | str
Metrics = dict[str, Interval | None]
"""Key -> mean and 95 % interval; None where a metric is undefined for one of the images."""
Progress = Callable[[str, int, int], None]

REFERENCE = "reference"
RANDOM = "random"
"""Track of scores by networks with random weights: they are never ranked beside others."""


@dataclass(frozen=True)
class Distractors:
    """The pool from which a protocol draws other images for retrieval: features (M, F), and what identifies them."""

    features: NDArray[np.floating]
    digest: str


@dataclass(frozen=True)
class Block:
    """Means over one set of images.

    Attributes:
        protocol_hash: what two scores must share to be comparable.
        n_images: images a subject.
        metrics: over all subjects.
        by_subject: subject -> the same; empty where nothing says whose the reconstructions are.
        n_way: n -> key -> chance of being identified among n images.
        candidates: among how many images "CLIP-1000" retrieved; None where it was not computed.
    """

    protocol_hash: str
    n_images: int
    metrics: Metrics
    by_subject: dict[int, Metrics] = field(default_factory=dict)
    n_way: dict[int, Metrics] = field(default_factory=dict)
    candidates: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the block as it stands in ``scores.json``: no NaN, but null."""
        data: dict[str, Any] = {
            "protocol_hash": self.protocol_hash,
            "n_images": self.n_images,
            "metrics": _plain(self.metrics),
        }
        if self.by_subject:
            data["subjects"] = {str(subject): {"metrics": _plain(own)} for subject, own in self.by_subject.items()}
        if self.n_way:
            data["n_way"] = {str(n): _plain(own) for n, own in self.n_way.items()}
        if self.candidates is not None:
            data["candidates"] = self.candidates
        return data


@dataclass(frozen=True)
class Result:
    """What :func:`score_images` found.

    Attributes:
        protocol: the protocol that was followed.
        track: the protocol's, or :data:`RANDOM`.
        subjects: whose reconstructions these are; empty where nothing says.
        overall: means over all images.
        calibration: "shuffled", "mean image", "truth" -> the same for reconstructions that know nothing, or everything.
        subsets: name -> the same images less those that are not in the subset.
        per_image: one row an image and metric, with the columns of :data:`leaderboard.statistics.COLUMNS`.
        notes: sentences a reader should see.
        unlike: those of them that say where number and size of the images are not those of the publication.
        digests: network -> SHA-256 of its weights.
    """

    protocol: Protocol
    track: str
    subjects: tuple[int, ...]
    overall: Block
    calibration: dict[str, Metrics]
    subsets: dict[str, Block]
    per_image: pa.Table
    notes: tuple[str, ...]
    unlike: tuple[str, ...]
    digests: dict[str, str]

    def as_json(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of ``scores.json``."""
        data: dict[str, Any] = {"protocol": self.protocol.name, **self.overall.as_json(), "manifest": dict(manifest)}
        data["track"] = self.track
        data["judges"] = {
            key: self.protocol.describe(key) for key in self.overall.metrics if key in self.protocol.slots
        }
        if self.calibration:
            data["calibration"] = {name: _plain(metrics) for name, metrics in self.calibration.items()}
        if self.subsets:
            data["subsets"] = {name: block.as_json() for name, block in self.subsets.items()}
        data["notes"] = list(self.notes)
        return data


def score_images(
    recons: ImageSet,
    truths: ImageSet,
    protocol: Protocol | str,
    backbones: Mapping[str, Backbone],
    *,
    keys: Collection[str] | None = None,
    blurry: ImageSet | None = None,
    distractors: Distractors | None = None,
    subsets: Mapping[str, Sequence[Id]] | None = None,
    n_way: Sequence[int] = (),
    calibrate: bool = True,
    method: str = "reconstructions",
    variant: str = "",
    subject: int | None = None,
    repeats: str = "",
    cache: TruthCache | None = None,
    batch: int = 32,
    device: str = "cpu",
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Score reconstructions of one subject or several: each against its own images, then averaged.

    Args:
        recons: the reconstructions.
        truths: the images that were seen; aligned with the reconstructions here, by id.
        protocol: how to score, or its name.
        backbones: network name -> network, for those that ``keys`` need.
        keys: metrics to compute; all by default.
        blurry: low-level reconstructions, where the protocol blends them in.
        distractors: the pool of retrieval, where the protocol has one.
        subsets: name -> ids of some of the images, scored from the same pass.
        n_way: also give identification among so many images, from the same matrices.
        calibrate: also score shuffled reconstructions, the mean image, and the truth itself (of two images or more).
        method: of the rows in the per-image table.
        variant: likewise.
        subject: whose reconstructions these are, where their names do not tell.
        repeats: how repeated presentations were combined; enters the hash.
        cache: features of the truths, kept between calls.
        batch: images a forward pass.
        device: where networks compute.
        threads: for the pixel metrics.
        seed: of the shuffling and of the intervals.
        progress: called as (what, done, total) after each batch.

    Raises:
        UserError: images, ids, keys or networks do not fit together.
    """
    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    recons, truths = paired(recons, truths)
    if blurry is not None:
        _, blurry = paired(recons, blurry)
    pool = distractors if protocol.retrieval.pool == "distractors" else None
    groups = _by_subject(recons, subject)
    _check_requests(recons, groups, protocol, keys, subsets or {}, n_way)
    if method == REFERENCE:
        raise UserError(f"method '{REFERENCE}' is what the calibration's rows are called; choose another name")
    calibrate = calibrate and min(map(len, groups.values())) > 1  # nobody to deal a lonely image to
    cache = cache if cache is not None else TruthCache()
    found: dict[int, Scores] = {}
    rows: list[_Row] = []
    try:
        for number, chosen in groups.items():
            own, seen = recons.select(chosen), truths.select(chosen)
            how: dict[str, Any] = {
                "keys": keys,
                "blurry": None if blurry is None else blurry.select(chosen),
                "distractors": None if pool is None else pool.features,
                "cache": cache,
                "recon_cache": TruthCache() if calibrate else None,
                "batch": batch,
                "device": device,
                "threads": threads,
                "progress": progress,
            }
            found[number] = evaluate(own, seen, protocol, backbones, own.ids, **how)
            rows.append(_Row(method, variant, number, own.ids, found[number].per_image))
            if calibrate:
                beside = chance_and_ceiling(seen, own, protocol, backbones, own.ids, seed=seed, **how)
                rows += [_Row(REFERENCE, name, number, own.ids, s.per_image) for name, s in beside.items()]
        told = subject is not None or recons.subjects is not None
        common = (protocol, tuple(groups) if told else (), repeats, pool, seed)
        blocks = {
            name: _block({number: subset(s, ids) for number, s in found.items()}, (), *common)
            for name, ids in (subsets or {}).items()
        }
        overall = _block(found, n_way, *common)
    except ValueError as error:  # of the metrics: an image or a network is not as it must be
        raise UserError(str(error)) from error
    first = next(iter(found.values()))
    random = any(digest.startswith(RANDOM) for digest in first.digests.values())
    track = RANDOM if random else protocol.track
    per_image = _table(track, rows)
    references = {name: own for (kind, name), own in summarise(per_image, seed=seed).items() if kind == REFERENCE}
    return Result(
        protocol=protocol,
        track=track,
        subjects=tuple(groups) if told else (),
        overall=overall,
        calibration={name: {key: own.get(key) for key in first.per_image} for name, own in references.items()},
        subsets=blocks,
        per_image=per_image,
        notes=_notes(recons, truths, found, overall),
        unlike=tuple(
            note
            for note in first.notes
            if note in first.remarks or note.startswith(f"protocol '{protocol.name}' scores ")
        ),
        digests=first.digests,
    )


@dataclass(frozen=True)
class _Row:
    """Per-image values of one subject."""

    method: str
    variant: str
    subject: int
    ids: tuple[Id, ...]
    values: Mapping[str, NDArray[np.float64]]


def _by_subject(recons: ImageSet, subject: int | None) -> dict[int, NDArray[np.int64]]:
    """Return subject -> its rows, in order; images that tell no subject are ``subject``'s, or the first's."""
    if recons.subjects is None:
        return {1 if subject is None else subject: np.arange(len(recons))}
    if subject is not None and set(recons.subjects) != {subject}:
        others = ", ".join(str(s) for s in sorted(set(recons.subjects)))
        raise UserError(f"subject {subject} was named, but the {recons.what} are those of subject {others}")
    owners = np.array(recons.subjects)
    return {int(number): np.flatnonzero(owners == number) for number in np.unique(owners)}


def _check_requests(
    recons: ImageSet,
    groups: Mapping[int, NDArray[np.int64]],
    protocol: Protocol,
    keys: Collection[str] | None,
    subsets: Mapping[str, Sequence[Id]],
    n_way: Sequence[int],
) -> None:
    """Find out before the work what could only be refused after it."""
    fewest = min(len(chosen) for chosen in groups.values())
    for n in n_way:
        if not 2 <= n <= fewest:
            raise UserError(f"{n}-way identification: there are {fewest} images; expected a number from 2 to {fewest}")
    measured = {slot.measure for key, slot in protocol.slots.items() if keys is None or key in keys}
    if n_way and "identification" not in measured:
        raise UserError("n-way identification needs a metric that identifies: Alex(2), Alex(5), Incep or CLIP")
    if fewest < 2 and measured & {"identification", "retrieval"}:
        raise UserError("one image cannot be identified among others: hand in at least 2, or leave such metrics out")
    for name, ids in subsets.items():
        if len(ids) < 2:
            raise UserError(f"subset {name}: holds 1 image; expected at least 2")
        for number, chosen in groups.items():
            own = {recons.ids[k] for k in chosen}
            missing = [i for i in ids if i not in own]
            if missing:
                whose = f" of subject {number}" if len(groups) > 1 else ""
                raise UserError(
                    f"subset {name}: {len(missing)} of its {len(ids)} images are not among the {len(own)} "
                    f"reconstructions{whose} (first: {missing[0]}); expected ids as the reconstructions have them"
                )


def _block(
    found: Mapping[int, Scores],
    n_way: Sequence[int],
    protocol: Protocol,
    subjects: tuple[int, ...],
    repeats: str,
    pool: Distractors | None,
    seed: int,
) -> Block:
    first = next(iter(found.values()))
    retrieval = [key for key, slot in protocol.slots.items() if slot.measure == "retrieval" and key in first.per_image]
    rows = [_Row("", "", number, scores.image_ids, scores.per_image) for number, scores in found.items()]
    for n in n_way:
        for number, scores in found.items():
            identified = [key for key in scores.matrices if protocol.slots[key].measure == "identification"]
            values = {key: scores.n_way(key, n) for key in identified}
            rows.append(_Row("", str(n), number, scores.image_ids, values))

    def means(some: Iterable[_Row]) -> dict[str, Metrics]:
        some = list(some)
        keys = {row.variant: list(row.values) for row in some}
        summary = summarise(_table("", some), seed=seed)
        return {variant: {key: summary["", variant].get(key) for key in own} for variant, own in keys.items()}

    every = means(rows)
    return Block(
        protocol_hash=protocol_hash(
            protocol,
            first.digests,
            list(dict.fromkeys(i for scores in found.values() for i in scores.image_ids)),
            subjects=subjects,
            repeats=repeats,
            distractors=pool.digest if pool is not None and retrieval else "",
        ),
        n_images=max(len(scores.image_ids) for scores in found.values()),
        metrics=every[""],
        by_subject={row.subject: means([row])[""] for row in rows if not row.variant} if subjects else {},
        n_way={n: every[str(n)] for n in n_way},
        candidates=first.counts[retrieval[0]]["candidates"] if retrieval else None,
    )


def _table(track: str, rows: Sequence[_Row]) -> pa.Table:
    """Return one row an image and metric; ids are whole numbers where all are."""
    numbers = all(isinstance(i, int) for row in rows for i in row.ids)
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for row in rows:
        for key, values in row.values.items():
            n = len(values)
            for name, same in (("track", track), ("method", row.method), ("variant", row.variant)):
                columns[name] += [same] * n
            columns["subject"] += [row.subject] * n
            columns["seed"] += [0] * n
            columns["image_id"] += row.ids if numbers else [str(i) for i in row.ids]
            columns["metric"] += [key] * n
            columns["value"] += values.tolist()
    return pa.table(columns)


def _notes(recons: ImageSet, truths: ImageSet, found: Mapping[int, Scores], overall: Block) -> tuple[str, ...]:
    """Gather what a reader should see, each once; what holds for one subject only says for which."""
    notes = [*recons.notes, *truths.notes]
    for number, scores in found.items():
        shared = [note for note in scores.notes if all(note in other.notes for other in found.values())]
        notes += [note if note in shared else f"subject {number}: {note}" for note in scores.notes]
    counts = {number: len(scores.image_ids) for number, scores in found.items()}
    if len(set(counts.values())) > 1:
        notes.append("subjects differ in images: " + ", ".join(f"{n} of subject {s}" for s, n in counts.items()))
    undefined = [key for key, value in overall.metrics.items() if value is None]
    if undefined:
        notes.append(f"{', '.join(undefined)}: undefined for an image, so there is no mean (null in JSON)")
    digests = next(iter(found.values())).digests
    if any(digest.startswith(RANDOM) for digest in digests.values()):
        notes.append("the networks have random weights: their metrics mean nothing")
    return tuple(dict.fromkeys(notes))


def _plain(metrics: Metrics) -> dict[str, dict[str, float | None]]:
    empty = {"mean": None, "ci_low": None, "ci_high": None}
    return {key: dict(empty) if value is None else value.model_dump() for key, value in metrics.items()}
