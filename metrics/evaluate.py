"""Score a set of reconstructions under a protocol: every metric from one pass of each network at each size.

A network is handed in as a :class:`Backbone`. All resizing happens here, as the protocol tells; a backbone gets RGB in
[0, 1] and only takes out its own mean and deviation. Images are read a batch at a time, so they may lie on a disk.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metrics import added
from metrics.cache import Features, TruthCache
from metrics.cards import PIXEL_KEYS, card
from metrics.identification import (
    Floats,
    compare,
    correlation_matrix,
    n_way_top1,
    pairwise_correlation,
    pool_n_way_top1,
    top1,
    two_way,
)
from metrics.images import Checked, Images, acting
from metrics.passes import Backbone, Id, Passes, Progress, Source
from metrics.protocols import Protocol, Slot


@dataclass(frozen=True)
class Scores:
    """What :func:`evaluate` found.

    Attributes:
        protocol: the protocol that was followed.
        image_ids: the images, in the order of every array here.
        per_image: key -> (N,) float64, in the canonical order of keys. Two-way and retrieval are fractions.
        matrices: key -> (N, N) correlations r[truth, reconstruction], for two-way and for retrieval among the test set.
        counts: key -> what the numbers do not show: "constant" (pairs without a defined correlation), "ties" and
            "undefined" (comparisons), "candidates" (among how many retrieval chose).
        notes: sentences a reader should see: constant images, ties, other sizes or images than the protocol's.
        digests: backbone name in the protocol -> digest, for those that were used.
        undefined: key -> (N,) whether a pair has no defined correlation, so that its value is the protocol's choice.
        constant: "reconstruction" or "truth" -> ids of images that are one flat colour.
        remarks: the notes that hold for the whole pass, whichever of its images are looked at.
    """

    protocol: Protocol
    image_ids: tuple[Id, ...]
    per_image: dict[str, Floats]
    matrices: dict[str, Floats]
    counts: dict[str, dict[str, int]]
    notes: tuple[str, ...]
    digests: dict[str, str]
    undefined: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    constant: dict[str, tuple[Id, ...]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def means(self) -> dict[str, float]:
        """Mean over the images, by key."""
        return aggregates(self.per_image)

    def n_way(self, key: str, n: int) -> Floats:
        """Return each image's chance of being identified by ``key`` among ``n`` images drawn from the test set: (N,).

        n = 2 is two-way identification, n = N retrieval among all; exact for every n between, without drawing.

        Raises:
            ValueError: ``key`` identifies nothing among the test images, or ``n`` is not between 2 and N.
        """
        if key not in self.matrices:
            known = f"these do: {', '.join(self.matrices)}" if self.matrices else "no metric here does"
            raise ValueError(f"'{key}' compares no image with the other test images; {known}")
        rule = self.protocol.identification
        return n_way_top1(self.matrices[key], n, rule.ties, rule.direction)


def aggregates(per_image: Mapping[str, Floats]) -> dict[str, float]:
    """Return the mean over the images of each metric."""
    return {key: float(np.mean(values)) for key, values in per_image.items()}


@torch.inference_mode()
def evaluate(
    recons: Images,
    truths: Images,
    protocol: Protocol,
    backbones: Mapping[str, Backbone],
    image_ids: Sequence[Id],
    *,
    keys: Collection[str] | None = None,
    blurry: Images | None = None,
    distractors: NDArray[np.floating] | None = None,
    cache: TruthCache | None = None,
    recon_cache: TruthCache | None = None,
    batch: int = 32,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score reconstructions against the images that were seen.

    Args:
        recons: (N, H, W, 3), uint8 or float in [0, 1]: an array, or what reads one when it is sliced.
        truths: (N, H', W', 3) likewise; row k is what reconstruction k should show.
        protocol: how to score.
        backbones: the protocol's network names -> networks; those that ``keys`` do not need may be missing. Each is
            asked for once and in the protocol's order, so a mapping may load them on demand.
        image_ids: N ids, none twice; they name images in messages and results.
        keys: the metrics to compute; all of the protocol's by default.
        blurry: (N, H'', W'', 3) low-level reconstructions, where the protocol blends them in.
        distractors: (M, F) features of the retrieval pool from :func:`slot_features`, where the protocol has a pool
            apart from the test set. Without them "CLIP-1000" is retrieval among the test set, and a note says so.
        cache: features of the truths to read and to fill.
        recon_cache: likewise for the reconstructions, where they will be looked at again (:mod:`metrics.calibration`).
        batch: images a forward pass; changes memory and speed only. Halved where memory runs out.
        device: where images are resized for the networks and handed to them.
        threads: threads for the pixel metrics; as many as torch uses by default.
        progress: called as (what, done, total) after each batch.

    Returns:
        The scores by image.

    Raises:
        ValueError: an image, id, key or network is missing or malformed; the message names it.
        MemoryError: not even one image at a time fits into memory.
    """
    ids = _check_ids(image_ids)
    wanted = _check_keys(keys, protocol)
    slots = {key: slot for key, slot in protocol.slots.items() if key in wanted}
    _check_networks(slots, protocol, backbones)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    if (protocol.blend is None) != (blurry is None):
        told = (
            "blends in low-level reconstructions: pass blurry="
            if blurry is None
            else "blends nothing: leave out blurry="
        )
        raise ValueError(f"protocol '{protocol.name}' {told}")
    if len(ids) < 2 and any(slot.measure in ("identification", "retrieval") for slot in slots.values()):
        raise ValueError("identification compares images with each other: score at least 2")
    pool = distractors if protocol.retrieval.pool == "distractors" else None
    if pool is not None and protocol.retrieval.n is not None and len(pool) < protocol.retrieval.n - 1:
        raise ValueError(
            f"there are {len(pool)} distractors; protocol '{protocol.name}' draws {protocol.retrieval.n - 1} of them"
        )
    passes = Passes(
        protocol=protocol,
        ids=ids,
        recons=Checked(recons, ids, "reconstruction"),
        truths=Checked(truths, ids, "truth"),
        blurry=None if blurry is None else Checked(blurry, ids, "low-level reconstruction"),
        batch=batch,
        device=device,
        progress=progress or (lambda what, done, total: None),
    )
    found = _Found()
    pixels = (*PIXEL_KEYS, *(slot.key for slot in protocol.pixels))
    if pixel_keys := [key for key in pixels if key in wanted]:
        found.values.update(passes.pixel_metrics(pixel_keys, threads or torch.get_num_threads()))
    if "PixCorr" in wanted:
        found.values["PixCorr"] = found.settled("PixCorr", found.values["PixCorr"], protocol)

    digests = {}
    for network in protocol.networks:
        own = {key: slot for key, slot in slots.items() if slot.network == network}
        if not own:
            continue
        backbone = backbones[network]
        digests[network] = backbone.digest
        for resize in dict.fromkeys(slot.resize for slot in own.values()):
            group = {key: slot for key, slot in own.items() if slot.resize == resize}
            _network_metrics(passes, backbone, group, pool, cache, recon_cache, found)

    constant = {side.what: tuple(ids[k] for k in sorted(side.constant)) for side in (passes.recons, passes.truths)}
    remarks = (*_sizes(protocol, passes.recons.size, passes.truths.size), *passes.remarks)
    return _scores(protocol, ids, found, digests, constant, remarks)


def subset(scores: Scores, image_ids: Sequence[Id]) -> Scores:
    """Return what scoring only these of the images would have found, without another pass.

    Identification and retrieval among the test set are counted anew, since they depend on the other images; retrieval
    from a pool and everything that looks at one pair alone is carried over.

    Raises:
        ValueError: an id was not scored or is named twice, or there are fewer than two.
    """
    ids = _check_ids(image_ids)
    place = {image: k for k, image in enumerate(scores.image_ids)}
    missing = [image for image in ids if image not in place]
    if missing:
        raise ValueError(f"{len(missing)} of the subset's {len(ids)} images were not scored: {_listed(missing)}")
    if len(ids) < 2 and scores.matrices:
        raise ValueError("identification compares images with each other: a subset needs at least 2")
    rows = np.array([place[image] for image in ids])
    found = _Found(
        values={key: values[rows] for key, values in scores.per_image.items() if key not in scores.matrices},
        counts={key: dict(count) for key, count in scores.counts.items() if key not in scores.matrices},
    )
    for key, undefined in scores.undefined.items():
        found.undefined[key] = undefined[rows]
        found.counts[key]["constant"] = int(undefined[rows].sum())
    for key, matrix in scores.matrices.items():
        found.identify(key, scores.protocol.slots[key], matrix[np.ix_(rows, rows)], scores.protocol)
    kept = set(ids)
    constant = {what: tuple(i for i in flat if i in kept) for what, flat in scores.constant.items()}
    return _scores(scores.protocol, ids, found, dict(scores.digests), constant, scores.remarks)


@torch.inference_mode()
def slot_features(
    images: Images,
    protocol: Protocol,
    key: str,
    backbone: Backbone,
    image_ids: Sequence[Id],
    *,
    batch: int = 32,
    device: str = "cpu",
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Return what metric ``key`` compares for seen images, e.g. a chunk of a retrieval pool: (N, F).

    Args:
        images: (N, H, W, 3), uint8 or float in [0, 1], prepared as the protocol prepares truths.
        protocol: how.
        key: a metric that one network layer fills, e.g. "CLIP-1000".
        backbone: the network of that slot.
        image_ids: N ids, for messages.
        batch: images a forward pass; halved where memory runs out.
        device: where images are resized.
        progress: called as (what, done, total) after each batch.

    Raises:
        ValueError: an image is malformed, or ``key`` has no feature vector under this protocol.
        MemoryError: not even one image at a time fits into memory.
    """
    slot = protocol.slots.get(key)
    if slot is None or slot.reduce == "maps":
        raise ValueError(f"metric '{key}' compares no feature vectors under protocol '{protocol.name}'")
    ids = _check_ids(image_ids)
    side = Checked(images, ids, "image")
    passes = Passes(protocol, ids, side, side, None, batch, device, progress or (lambda what, done, total: None))
    rows: dict[Source, Features] = {}

    def step(chunk: slice) -> None:
        passes.store(rows, (slot.layers[0], slot.reduce), passes.forward(backbone, [slot], chunk, "truth"), chunk)

    passes.in_batches(backbone.name, step)
    return rows[slot.layers[0], slot.reduce]


@dataclass
class _Found:
    """What is known so far of an evaluation, by key."""

    values: dict[str, Floats] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    matrices: dict[str, Floats] = field(default_factory=dict)
    undefined: dict[str, NDArray[np.bool_]] = field(default_factory=dict)

    def settled(self, key: str, r: Floats, protocol: Protocol) -> Floats:
        """Give pairs without a defined correlation the value that the protocol says, and count them."""
        self.undefined[key] = np.isnan(r)
        self.counts[key] = {"constant": int(np.isnan(r).sum())}
        return np.where(np.isnan(r), 0.0, r) if protocol.constant == "zero" else r

    def identify(self, key: str, slot: Slot, matrix: Floats, protocol: Protocol) -> None:
        """Count who is identified by, or retrieved from, the correlations of all truths with all reconstructions."""
        rule = protocol.identification
        found = compare(matrix, rule.direction)
        self.matrices[key] = matrix
        self.counts[key] = {"ties": int(found.equal.sum()), "undefined": int(found.undefined.sum())}
        if slot.measure == "identification":
            self.values[key] = two_way(matrix, rule.ties, rule.direction)
        else:
            self.values[key] = top1(matrix, rule.ties, rule.direction)
            self.counts[key]["candidates"] = len(matrix)


def _network_metrics(
    passes: Passes,
    backbone: Backbone,
    group: Mapping[str, Slot],
    pool: NDArray[np.floating] | None,
    cache: TruthCache | None,
    recon_cache: TruthCache | None,
    found: _Found,
) -> None:
    """Fill the keys of ``group``, which take the same network at the same size.

    Features live no longer than this call: AlexNet's are gone before the next network's come.
    """
    truth, recon, distances = passes.network_pass(backbone, group, cache, recon_cache)
    found.values.update(distances)
    rule, retrieval = passes.protocol.identification, passes.protocol.retrieval
    correlations: dict[Source, Floats] = {}  # keys that compare the same features share one matrix
    for key, slot in group.items():
        source = (slot.layers[0], slot.reduce)
        if slot.measure == "perceptual":
            continue
        if slot.measure == "added":
            pairs = zip(truth[source], recon[source], passes.ids, strict=True)
            found.values[key] = np.array([added.metric(key)(*pair) for pair in pairs])
            continue
        if slot.measure == "distance":
            r = pairwise_correlation(truth[source], recon[source])
            found.values[key] = 1.0 - found.settled(key, r, passes.protocol)
            continue
        if slot.measure == "retrieval" and pool is not None and retrieval.n is not None:
            found.counts[key] = {"candidates": retrieval.n}
            found.values[key] = pool_n_way_top1(truth[source], recon[source], pool, retrieval.n, rule.ties)
            continue
        if source not in correlations:
            correlations[source] = correlation_matrix(truth[source], recon[source], rule.direction)
        found.identify(key, slot, correlations[source], passes.protocol)


def _scores(
    protocol: Protocol,
    ids: tuple[Id, ...],
    found: _Found,
    digests: dict[str, str],
    constant: dict[str, tuple[Id, ...]],
    remarks: tuple[str, ...],
) -> Scores:
    """Put the findings in order and say in words what the numbers do not show."""
    notes = []
    if protocol.n_images is not None and len(ids) != protocol.n_images:
        notes.append(
            f"protocol '{protocol.name}' scores {protocol.n_images} images ({protocol.images}); these are {len(ids)}"
        )
    for what, flat in constant.items():
        if flat:
            notes.append(f"{len(flat)} constant {what}{'s' * (len(flat) > 1)}: {_listed(flat)}")
    notes.extend(remarks)
    how = "as lost" if protocol.identification.ties == "strict" else "half"
    counts = {key: found.counts[key] for key in protocol.keys if key in found.counts}
    for key, count in counts.items():
        in_test_set = key in found.matrices and protocol.slots[key].measure == "retrieval"
        if in_test_set and protocol.retrieval.pool == "distractors":
            notes.append(
                f"{key}: no distractors were given, so this is top-1 among the {len(ids)} test images and compares with"
                f" no {key} from a pool ({protocol.retrieval.sentence})"
            )
        if count.get("ties"):
            notes.append(f"{key}: {count['ties']} comparisons tie and count {how}")
        if count.get("undefined"):
            notes.append(f"{key}: {count['undefined']} comparisons with constant features count {how}")
        if count.get("constant"):
            notes.append(
                f"{key}: {count['constant']} pairs have no defined correlation, which counts as {protocol.constant}"
            )

    def ordered(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: values[key] for key in protocol.keys if key in values}

    return Scores(
        protocol=protocol,
        image_ids=ids,
        per_image=ordered(found.values),
        matrices=ordered(found.matrices),
        counts=counts,
        notes=tuple(notes),
        digests=digests,
        undefined=ordered(found.undefined),
        constant=constant,
        remarks=remarks,
    )


def _sizes(protocol: Protocol, recon: int, truth: int) -> list[str]:
    """Say where the images' sizes are not those that the protocol was published with."""
    found = []
    if protocol.recon_size is not None and recon != protocol.recon_size:
        found.append(
            f"these reconstructions have {recon} pixels a side, those that protocol '{protocol.name}' was published"
            f" with {protocol.recon_size}"
        )
    for step in acting((protocol.truth,), truth):
        found.append(f"truths of {truth} pixels a side were brought to those of protocol '{protocol.name}': {step}")
    return found


def _check_keys(keys: Collection[str] | None, protocol: Protocol) -> set[str]:
    if keys is None:
        return set(protocol.keys)
    if isinstance(keys, str) or not keys:
        raise ValueError("keys must be a list of metric keys, at least one; leave it out for all")
    wanted = {card(key).key for key in keys}
    if absent := sorted(wanted - set(protocol.keys)):
        raise ValueError(f"protocol '{protocol.name}' has no {absent[0]}; '{protocol.name}+{absent[0]}' has")
    return wanted


def _check_networks(slots: Mapping[str, Slot], protocol: Protocol, backbones: Mapping[str, Backbone]) -> None:
    for network in protocol.networks:
        own = [key for key, slot in slots.items() if slot.network == network]
        if own and network not in backbones:
            raise ValueError(
                f"protocol '{protocol.name}' needs the network '{network}' for {', '.join(own)};"
                f" given: {', '.join(backbones) or 'none'}"
            )


def _check_ids(image_ids: Sequence[Id]) -> tuple[Id, ...]:
    ids = tuple(i if isinstance(i, str) else int(i) for i in image_ids)
    if not ids:
        raise ValueError("there is no image to score: image_ids is empty")
    seen: set[Id] = set()
    for i in ids:
        if i in seen:
            raise ValueError(f"image id {i} occurs twice; every image is scored once")
        seen.add(i)
    return ids


def _listed(ids: Sequence[Id], most: int = 8) -> str:
    return ", ".join(str(i) for i in ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")
