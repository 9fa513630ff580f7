"""Score a set of reconstructions under a protocol: every metric from one pass of each network at each size.

A network is handed in as a :class:`Backbone`. All resizing happens here, as the protocol tells; a backbone gets RGB in
[0, 1] and only takes out its own mean and deviation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from typing import Protocol as TypingProtocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from metrics.cards import KEYS, card
from metrics.identification import (
    Floats,
    compare,
    correlation_matrix,
    pairwise_correlation,
    pool_n_way_top1,
    top1,
    two_way,
)
from metrics.perceptual import lpips_heads, perceptual_distance
from metrics.pixel import pixcorr, ssim
from metrics.protocols import Protocol, Resize, Slot

Images = NDArray[np.uint8] | NDArray[np.floating]
Progress = Callable[[str, int, int], None]

_PIXEL_KEYS = ("PixCorr", "SSIM", "SSIM-color")


class Backbone(TypingProtocol):
    """A frozen network as the metrics see it."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def digest(self) -> str:
        """SHA-256 of its weights."""

    def features(self, images: Tensor, layers: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the named layers' outputs for (B, 3, H, W) float32 RGB in [0, 1]: (B, C, H, W) or (B, F) each."""


@dataclass(frozen=True)
class Scores:
    """What :func:`evaluate` found.

    Attributes:
        protocol: the protocol that was followed.
        image_ids: the images, in the order of every array here.
        per_image: key -> (N,) float64, in the canonical order of keys. Two-way and retrieval are fractions.
        matrices: key -> (N, N) correlations r[truth, reconstruction], for two-way and for retrieval among the test set.
        counts: key -> what the numbers do not show: "constant" (pairs without a defined correlation), "ties" and
        "undefined"
            (comparisons), "candidates" (among how many retrieval chose).
        notes: sentences a reader should see: constant images, ties, a metric left out and why.
        digests: backbone name in the protocol -> digest, for those that were used.
    """

    protocol: Protocol
    image_ids: tuple[int | str, ...]
    per_image: dict[str, Floats]
    matrices: dict[str, Floats]
    counts: dict[str, dict[str, int]]
    notes: tuple[str, ...]
    digests: dict[str, str]

    @property
    def means(self) -> dict[str, float]:
        """Mean over the images, by key."""
        return aggregates(self.per_image)


@dataclass
class TruthCache:
    """Features of the seen images, kept between calls that score several sets against the same truths.

    Entries are keyed by the truths' pixels and preparation, the network's digest, the layer and the size, so one cache
    serves any number of protocols and test sets. What would pass ``max_bytes`` is computed anew each time instead.
    """

    max_bytes: int = 1 << 30
    _entries: dict[tuple[Any, ...], NDArray[np.float32]] = field(default_factory=dict, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(entry.nbytes for entry in self._entries.values())

    def get(self, key: tuple[Any, ...]) -> NDArray[np.float32] | None:
        """Return the features stored under ``key``, or None."""
        return self._entries.get(key)

    def fits(self, nbytes: int) -> bool:
        """Return whether ``nbytes`` more may be kept."""
        return self.nbytes + nbytes <= self.max_bytes

    def put(self, key: tuple[Any, ...], features: NDArray[np.float32]) -> None:
        """Keep ``features`` if they fit."""
        if self.fits(features.nbytes):
            self._entries[key] = features


def aggregates(per_image: Mapping[str, Floats]) -> dict[str, float]:
    """Return the mean over the images of each metric."""
    return {key: float(np.mean(values)) for key, values in per_image.items()}


@torch.inference_mode()
def evaluate(
    recons: Images,
    truths: Images,
    protocol: Protocol,
    backbones: Mapping[str, Backbone],
    image_ids: Sequence[int | str],
    *,
    keys: Collection[str] | None = None,
    blurry: Images | None = None,
    distractors: NDArray[np.floating] | None = None,
    cache: TruthCache | None = None,
    batch: int = 32,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score reconstructions against the images that were seen.

    Args:
        recons: (N, H, W, 3), uint8 or float in [0, 1].
        truths: (N, H', W', 3) likewise; row k is what reconstruction k should show.
        protocol: how to score.
        backbones: the protocol's network names -> networks; those that ``keys`` do not need may be missing.
        image_ids: N ids, none twice; they name images in messages and results.
        keys: the metrics to compute; all of the protocol's by default.
        blurry: (N, H, W, 3) low-level reconstructions, where the protocol blends them in.
        distractors: (M, F) features of the retrieval pool from :func:`slot_features`, where the protocol has a pool
        apart
            from the test set. Without them "CLIP-1000" is left out and a note says so.
        cache: features of the truths to read and to fill.
        batch: images a forward pass; changes memory and speed only.
        device: where images are resized and handed to the networks.
        threads: threads for the pixel metrics; as many as torch uses by default.
        progress: called as (what, done, total) after each batch.

    Returns:
        The scores by image.

    Raises:
        ValueError: an image, id, key or network is missing or malformed; the message names it.
    """
    ids = _check_ids(image_ids)
    wanted = _check_keys(keys)
    _check_images(recons, ids, "reconstruction")
    _check_images(truths, ids, "truth")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    if (protocol.blend is None) != (blurry is None):
        told = (
            "blends in low-level reconstructions: pass blurry="
            if blurry is None
            else "blends nothing: leave out blurry="
        )
        raise ValueError(f"protocol '{protocol.name}' {told}")
    if blurry is not None:
        _check_images(blurry, ids, "low-level reconstruction")
    if len(ids) < 2 and any(
        s.measure in ("identification", "retrieval") for k, s in protocol.slots.items() if k in wanted
    ):
        raise ValueError("identification compares images with each other: score at least 2")
    notes: list[str] = []
    if protocol.n_images is not None and len(ids) != protocol.n_images:
        notes.append(
            f"protocol '{protocol.name}' scores {protocol.n_images} images ({protocol.images}); these are {len(ids)}"
        )
    for name, images in (("reconstruction", recons), ("truth", truths)):
        constant = [i for i, image in zip(ids, images, strict=True) if image.min() == image.max()]
        if constant:
            notes.append(f"{len(constant)} constant {name}{'s' * (len(constant) > 1)}: {_listed(constant)}")

    run = _Run(protocol, ids, recons, truths, blurry, batch, device, progress or (lambda what, done, total: None))
    result: dict[str, Floats] = {}
    counts: dict[str, dict[str, int]] = {}
    matrices: dict[str, Floats] = {}

    pixel_keys = [key for key in _PIXEL_KEYS if key in wanted]
    if pixel_keys:
        result.update(run.pixel_metrics(pixel_keys, threads or torch.get_num_threads()))
    if "PixCorr" in result:
        result["PixCorr"], counts["PixCorr"] = _settle(result["PixCorr"], protocol)

    slots = {key: slot for key, slot in protocol.slots.items() if key in wanted}
    ties = protocol.identification.ties
    pooled = protocol.retrieval.pool == "distractors"
    if pooled and distractors is None:
        for key in [key for key, slot in slots.items() if slot.measure == "retrieval"]:
            del slots[key]
            notes.append(
                f"{key} left out: protocol '{protocol.name}' retrieves from a pool apart from the test set"
                f" ({protocol.retrieval.sentence}); pass its features as distractors="
            )
    for network in protocol.networks:
        own = {key: slot for key, slot in slots.items() if slot.network == network}
        if own and network not in backbones:
            raise ValueError(
                f"protocol '{protocol.name}' needs the network '{network}' for {', '.join(own)};"
                f" given: {', '.join(backbones) or 'none'}"
            )
        for resize in dict.fromkeys(slot.resize for slot in own.values()):
            group = {key: slot for key, slot in own.items() if slot.resize == resize}
            truth, recon, distances = run.network_pass(backbones[network], group, cache)
            result.update(distances)
            correlations: dict[Source, Floats] = {}  # keys that compare the same features share one matrix
            for key, slot in group.items():
                source = (slot.layers[0], slot.reduce)
                if slot.measure == "perceptual":
                    continue
                if slot.measure == "distance":
                    r, counts[key] = _settle(pairwise_correlation(truth[source], recon[source]), protocol)
                    result[key] = 1.0 - r
                    continue
                if slot.measure == "retrieval" and pooled:
                    assert distractors is not None and protocol.retrieval.n is not None
                    counts[key] = {"candidates": protocol.retrieval.n}
                    result[key] = pool_n_way_top1(truth[source], recon[source], distractors, protocol.retrieval.n, ties)
                    continue
                if source not in correlations:
                    correlations[source] = correlation_matrix(truth[source], recon[source])
                matrices[key] = correlations[source]
                found = compare(matrices[key])
                counts[key] = {"ties": int(found.equal.sum()), "undefined": int(found.undefined.sum())}
                if slot.measure == "identification":
                    result[key] = two_way(matrices[key], ties)
                else:
                    counts[key]["candidates"] = len(ids)
                    result[key] = top1(matrices[key], ties)

    how = "as lost" if ties == "strict" else "half"
    for key, count in counts.items():
        if count.get("ties"):
            notes.append(f"{key}: {count['ties']} comparisons tie and count {how}")
        if count.get("undefined"):
            notes.append(f"{key}: {count['undefined']} comparisons with constant features count {how}")
        if count.get("constant"):
            notes.append(
                f"{key}: {count['constant']} pairs have no defined correlation, which counts as {protocol.constant}"
            )
    return Scores(
        protocol=protocol,
        image_ids=ids,
        per_image={key: result[key] for key in KEYS if key in result},
        matrices=matrices,
        counts={key: counts[key] for key in KEYS if key in counts},
        notes=tuple(notes),
        digests={n: backbones[n].digest for n in protocol.networks if any(s.network == n for s in slots.values())},
    )


@torch.inference_mode()
def slot_features(
    images: Images,
    protocol: Protocol,
    key: str,
    backbone: Backbone,
    image_ids: Sequence[int | str],
    *,
    batch: int = 32,
    device: str = "cpu",
) -> NDArray[np.float32]:
    """Return what metric ``key`` compares for seen images, e.g. a chunk of a retrieval pool: (N, F).

    Args:
        images: (N, H, W, 3), uint8 or float in [0, 1], prepared as the protocol prepares truths.
        protocol: how.
        key: a metric that one network layer fills, e.g. "CLIP-1000".
        backbone: the network of that slot.
        image_ids: N ids, for messages.
        batch: images a forward pass.
        device: where images are resized.

    Raises:
        ValueError: an image is malformed, or ``key`` has no feature vector under this protocol.
    """
    slot = protocol.slots.get(key)
    if slot is None or slot.reduce == "maps":
        raise ValueError(f"metric '{key}' compares no feature vectors under protocol '{protocol.name}'")
    ids = _check_ids(image_ids)
    _check_images(images, ids, "image")
    run = _Run(protocol, ids, images, images, None, batch, device, lambda what, done, total: None)
    chunks = [
        _reduced(run.forward(backbone, [slot], chunk, "truth")[slot.layers[0]], slot.reduce).numpy()
        for chunk in run.chunks()
    ]
    return np.concatenate(chunks)


Source = tuple[str, str]  # layer, reduce


@dataclass(frozen=True)
class _Run:
    """The images of one evaluation and how to read them in batches."""

    protocol: Protocol
    ids: tuple[int | str, ...]
    recons: Images
    truths: Images
    blurry: Images | None
    batch: int
    device: str
    progress: Progress

    def chunks(self, size: int | None = None) -> list[slice]:
        step = size or self.batch
        return [slice(start, min(start + step, len(self.ids))) for start in range(0, len(self.ids), step)]

    def prepared(self, chunk: slice, side: str, dtype: torch.dtype) -> Tensor:
        """Images of one side, (B, 3, H, W) in [0, 1], after the steps that all metrics share."""
        steps = (self.protocol.truth if side == "truth" else self.protocol.recon, self.protocol.common)

        def prepare(images: Images) -> Tensor:
            tensor = _as_tensor(images[chunk], dtype, self.device)
            for step in steps:
                tensor = resized(tensor, step)
            return tensor

        if side == "truth":
            return prepare(self.truths)
        recon = prepare(self.recons)
        if self.blurry is None or self.protocol.blend is None:
            return recon
        return self.protocol.blend * recon + (1.0 - self.protocol.blend) * prepare(self.blurry)

    def pixel_metrics(self, keys: Sequence[str], threads: int) -> dict[str, Floats]:
        spec = self.protocol.ssim

        def one(chunk: slice) -> dict[str, float]:
            # In float64, one pair at a time: fastest (it stays in the cache), and the smallest.
            with torch.inference_mode():
                pair = [self.prepared(chunk, side, torch.float64) for side in ("truth", "recon")]
                if pair[0].shape != pair[1].shape and (self.protocol.pixcorr is None or spec.resize is None):
                    raise ValueError(
                        f"image {self.ids[chunk.start]}: the truth has {pair[0].shape[-1]} pixels a side, the"
                        f" reconstruction {pair[1].shape[-1]};"
                        f" protocol '{self.protocol.name}' brings them to no common size"
                    )
                sized = {r: [_as_images(resized(x, r)) for x in pair] for r in {self.protocol.pixcorr, spec.resize}}
            values = {}
            if "PixCorr" in keys:
                values["PixCorr"] = pixcorr(*sized[self.protocol.pixcorr])
            if "SSIM" in keys:
                values["SSIM"] = ssim(*sized[spec.resize], spec=spec)
            if "SSIM-color" in keys:
                values["SSIM-color"] = ssim(*sized[spec.resize], colour=True, spec=spec)
            return {key: float(value[0]) for key, value in values.items()}

        table: dict[str, list[float]] = {key: [] for key in keys}
        with ThreadPoolExecutor(max(1, threads)) as pool:
            for done, values in enumerate(pool.map(one, self.chunks(1)), start=1):
                for key, value in values.items():
                    table[key].append(value)
                if done % self.batch == 0 or done == len(self.ids):
                    self.progress("pixels", done, len(self.ids))
        return {key: np.array(values) for key, values in table.items()}

    def network_pass(
        self, backbone: Backbone, group: Mapping[str, Slot], cache: TruthCache | None
    ) -> tuple[dict[Source, NDArray[np.float32]], dict[Source, NDArray[np.float32]], dict[str, Floats]]:
        """Pass both sides once through ``backbone`` for all slots of one size.

        Returns:
            Features of the truths and of the reconstructions, (N, F) by (layer, reduce), and the perceptual distances
            by key (their maps are compared batch by batch: kept, they would fill gigabytes).
        """
        slots = list(group.values())
        perceptual = [s for s in slots if s.measure == "perceptual"]
        vectors: list[Source] = list(dict.fromkeys((s.layers[0], s.reduce) for s in slots if s not in perceptual))
        maps: list[Source] = list(dict.fromkeys((layer, "maps") for s in perceptual for layer in s.layers))
        truth_rows: dict[Source, NDArray[np.float32]] = {}
        recon_rows: dict[Source, NDArray[np.float32]] = {}
        if cache is not None:
            for source in [*vectors, *maps]:
                if (cached := cache.get(self.cache_key(backbone, slots[0].resize, source))) is not None:
                    truth_rows[source] = cached
        complete = len(truth_rows) == len(vectors) + len(maps)
        kept = vectors

        distances: dict[str, list[Tensor]] = {key: [] for key, slot in group.items() if slot.measure == "perceptual"}
        for chunk in self.chunks():
            recon = self.forward(backbone, slots, chunk, "recon")
            if complete:
                truth = {layer: torch.from_numpy(truth_rows[layer, "maps"][chunk]).to(self.device) for layer, _ in maps}
            else:
                truth = self.forward(backbone, slots, chunk, "truth")
                if cache is not None and chunk.start == 0:
                    need = sum(4 * truth[layer][0].numel() * len(self.ids) for layer, _ in [*vectors, *maps])
                    kept = [*vectors, *maps] if cache.fits(need) else vectors
                for source in kept:
                    self.store(truth_rows, source, truth, chunk)
            for source in vectors:
                self.store(recon_rows, source, recon, chunk)
            for key, values in distances.items():
                slot = group[key]
                heads = lpips_heads(slot.heads) if slot.heads else None
                values.append(
                    perceptual_distance([truth[n] for n in slot.layers], [recon[n] for n in slot.layers], heads)
                )
            self.progress(backbone.name, chunk.stop, len(self.ids))
        if cache is not None and not complete:
            for source in kept:
                cache.put(self.cache_key(backbone, slots[0].resize, source), truth_rows[source])
        return truth_rows, recon_rows, {key: torch.cat(values).numpy() for key, values in distances.items()}

    def store(
        self, rows: dict[Source, NDArray[np.float32]], source: Source, features: Mapping[str, Tensor], chunk: slice
    ) -> None:
        values = _reduced(features[source[0]], source[1]).numpy()
        if chunk.start == 0:  # also where a cached array of the same name must not be written into
            rows[source] = np.empty((len(self.ids), *values.shape[1:]), dtype=np.float32)
        rows[source][chunk] = values

    def forward(self, backbone: Backbone, slots: Sequence[Slot], chunk: slice, side: str) -> dict[str, Tensor]:
        """Layer outputs of one batch, checked."""
        images = resized(self.prepared(chunk, side, torch.float32), slots[0].resize)
        layers = list(dict.fromkeys(layer for slot in slots for layer in slot.layers))
        outputs = backbone.features(images, layers)
        for layer in layers:
            if layer not in outputs:
                raise ValueError(
                    f"network '{backbone.name}' returned no layer '{layer}'; it returned {', '.join(outputs)}"
                )
            if len(outputs[layer]) != len(images):
                raise ValueError(
                    f"network '{backbone.name}', layer '{layer}' gave {len(outputs[layer])} outputs for {len(images)}"
                    " images"
                )
            finite = torch.isfinite(outputs[layer]).flatten(1).all(dim=1)
            if not finite.all():
                bad = self.ids[chunk.start + int((~finite).nonzero()[0])]
                raise ValueError(
                    f"network '{backbone.name}', layer '{layer}' gave a NaN or an infinity for the {_SIDES[side]}"
                    f" of image {bad}"
                )
        return {layer: outputs[layer] for layer in layers}

    def cache_key(self, backbone: Backbone, resize: Resize | None, source: Source) -> tuple[Any, ...]:
        return (self.truth_digest, self.protocol.truth, self.protocol.common, backbone.digest, resize, *source)

    @cached_property
    def truth_digest(self) -> str:
        array = np.ascontiguousarray(self.truths)
        return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()


_SIDES = {"truth": "truth", "recon": "reconstruction"}


def resized(images: Tensor, resize: Resize | None) -> Tensor:
    """Resample (B, 3, H, W) to the square size that ``resize`` names; return them as they are where they have it."""
    if resize is None or images.shape[-2:] == (resize.size, resize.size):
        return images
    size = (resize.size, resize.size)
    return functional.interpolate(images, size, mode=resize.filter, align_corners=False, antialias=resize.antialias)


def _as_tensor(images: Images, dtype: torch.dtype, device: str) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(images)).to(device).movedim(-1, 1)
    return tensor.to(dtype) / 255 if images.dtype == np.uint8 else tensor.to(dtype)


def _as_images(tensor: Tensor) -> Floats:
    return np.ascontiguousarray(tensor.movedim(1, -1).cpu().numpy())


def _reduced(features: Tensor, reduce: str) -> Tensor:
    features = features.float().cpu()
    if reduce == "flatten":
        return features.flatten(1)
    return features.mean(dim=(2, 3)) if reduce == "mean" else features


def _settle(r: Floats, protocol: Protocol) -> tuple[Floats, dict[str, int]]:
    """Give pairs without a defined correlation the value that the protocol says, and count them."""
    undefined = np.isnan(r)
    return (np.where(undefined, 0.0, r) if protocol.constant == "zero" else r), {"constant": int(undefined.sum())}


def _check_keys(keys: Collection[str] | None) -> set[str]:
    if keys is None:
        return set(KEYS)
    if isinstance(keys, str) or not keys:
        raise ValueError("keys must be a list of metric keys, at least one; leave it out for all")
    return {card(key).key for key in keys}


def _check_ids(image_ids: Sequence[int | str]) -> tuple[int | str, ...]:
    ids = tuple(i if isinstance(i, str) else int(i) for i in image_ids)
    if not ids:
        raise ValueError("there is no image to score: image_ids is empty")
    seen: set[int | str] = set()
    for i in ids:
        if i in seen:
            raise ValueError(f"image id {i} occurs twice; every image is scored once")
        seen.add(i)
    return ids


def _check_images(images: Images, ids: Sequence[int | str], what: str) -> None:
    if not isinstance(images, np.ndarray):
        raise ValueError(f"{what}s must be a numpy array (N, H, W, 3), not {type(images).__name__}")
    if images.ndim != 4 or images.shape[-1] != 3:
        hint = "; move the channels last" if images.ndim == 4 and images.shape[1] == 3 else ""
        raise ValueError(f"{what}s must be (N, H, W, 3), not {images.shape}{hint}")
    if len(images) != len(ids):
        raise ValueError(f"there are {len(images)} {what}s for {len(ids)} image ids: every image needs one")
    if images.shape[1] != images.shape[2] or images.shape[1] == 0:
        raise ValueError(f"{what}s are {images.shape[2]} x {images.shape[1]} pixels: crop them square before scoring")
    if images.dtype == np.uint8:
        return
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"{what}s must be uint8, or float in [0, 1], not {images.dtype}")
    for k, image in enumerate(images):
        low, high = float(image.min()), float(image.max())
        if not np.isfinite(low + high):
            raise ValueError(f"{what} of image {ids[k]} (row {k}) holds a NaN or an infinity")
        if low < 0.0 or high > 1.0:
            remedy = "divide by 255" if high > 2.0 else "map [-1, 1] to [0, 1]" if low < -0.5 else "clip them"
            raise ValueError(
                f"{what} of image {ids[k]} (row {k}) has values in [{low:.4g}, {high:.4g}]; floats must be in [0, 1]:"
                f" {remedy}"
            )


def _listed(ids: Sequence[int | str], most: int = 8) -> str:
    return ", ".join(str(i) for i in ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")
