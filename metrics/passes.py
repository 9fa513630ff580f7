"""Images through networks and pixel metrics, a batch at a time: what an evaluation spends its time and memory on."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal
from typing import Protocol as TypingProtocol

import numpy as np
import torch
from torch import Tensor

from metrics import added
from metrics.cache import Features, TruthCache
from metrics.identification import Floats
from metrics.images import Checked, Reordered, acting, as_tensor, resized
from metrics.perceptual import lpips_heads, perceptual_distance
from metrics.pixel import pixel_scores
from metrics.protocols import Protocol, Resize, Slot

Progress = Callable[[str, int, int], None]
Id = int | str
Source = tuple[str, str]  # layer, reduce
Side = Literal["truth", "recon"]

_SIDES: tuple[Side, Side] = ("truth", "recon")


class Backbone(TypingProtocol):
    """A frozen network as the metrics see it."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def digest(self) -> str:
        """SHA-256 of its weights."""

    def features(self, images: Tensor, layers: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the named layers' outputs for (B, 3, H, W) float32 RGB in [0, 1]: (B, C, H, W) or (B, F) each.

        Values lie a little outside of [0, 1] where a protocol enlarges tensors by bicubic, as the published code does.
        """


@dataclass
class Passes:
    """The images of one evaluation, and the passes over them.

    Attributes:
        protocol: how images are prepared.
        ids: their ids, for messages.
        recons, truths, blurry: where they come from.
        batch: images a forward pass.
        device: where networks compute.
        progress: called as (what, done, total) after each batch.
        remarks: what the passes had to say.
    """

    protocol: Protocol
    ids: tuple[Id, ...]
    recons: Checked
    truths: Checked
    blurry: Checked | None
    batch: int
    device: str
    progress: Progress
    remarks: list[str] = field(default_factory=list)

    def steps(self, side: Side) -> tuple[Resize | None, Resize | None]:
        """What all metrics share: the own step of that side, then the common one."""
        return (self.protocol.truth if side == "truth" else self.protocol.recon, self.protocol.common)

    def prepared(self, chunk: slice, side: Side, dtype: torch.dtype, device: str) -> Tensor:
        """Images of one side, (B, 3, H, W) in [0, 1], after the steps that all metrics share."""

        def prepare(images: Checked) -> Tensor:
            tensor = as_tensor(images.read(chunk), dtype, device)
            for step in self.steps(side):
                tensor = resized(tensor, step)
            return tensor

        if side == "truth":
            return prepare(self.truths)
        recon = prepare(self.recons)
        if self.blurry is None or self.protocol.blend is None:
            return recon
        return self.protocol.blend * recon + (1.0 - self.protocol.blend) * prepare(self.blurry)

    def in_batches(self, what: str, step: Callable[[slice], None]) -> None:
        """Call ``step`` for one batch after the other, smaller ones from where memory runs out."""
        size, start = self.batch, 0
        while start < len(self.ids):
            chunk = slice(start, min(start + size, len(self.ids)))
            try:
                step(chunk)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                if size == 1:
                    raise MemoryError(f"{what}: memory runs out even with one image at a time") from error
                size = max(1, min(size, chunk.stop - chunk.start) // 2)
            else:
                start = chunk.stop
                self.progress(what, start, len(self.ids))
                continue
            # Only here has the exception let go of the tensors that it was raised over.
            gc.collect()
            if self.device.startswith("cuda"):
                torch.cuda.empty_cache()
        if size < self.batch:
            self.remarks.append(f"{what}: memory ran out; batches were made smaller, down to {size}")

    def pixel_metrics(self, keys: Sequence[str], threads: int) -> dict[str, Floats]:
        """Return the pixel metrics ``keys`` of every pair, (N,) each."""
        spec = self.protocol.ssim
        extra = {slot.key: (slot.resize, added.metric(slot.key)) for slot in self.protocol.pixels}
        by_size: dict[Resize | None, list[str]] = {}
        for key in keys:
            size = extra[key][0] if key in extra else self.protocol.pixcorr if key == "PixCorr" else spec.resize
            by_size.setdefault(size, []).append(key)

        def one(row: int) -> dict[str, float]:
            # In float64, one pair at a time: fastest (it stays in the cache), and the smallest. Never on a GPU, so that
            # the same images have the same values everywhere.
            values: dict[str, float] = {}
            with torch.inference_mode():
                pair = [self.prepared(slice(row, row + 1), side, torch.float64, "cpu") for side in _SIDES]
                for resize, own in by_size.items():
                    truth, recon = (resized(x.contiguous(), resize)[0].movedim(0, -1).numpy() for x in pair)
                    if truth.shape != recon.shape:
                        raise ValueError(
                            f"image {self.ids[row]}: the truth has {len(truth)} pixels a side, the reconstruction"
                            f" {len(recon)}; protocol '{self.protocol.name}' brings them to no common size"
                        )
                    values.update(pixel_scores(truth, recon, [key for key in own if key not in extra], spec))
                    values |= {key: extra[key][1](truth, recon, self.ids[row]) for key in own if key in extra}
            return values

        table = {key: np.empty(len(self.ids)) for key in keys}
        torch_threads = torch.get_num_threads()
        try:
            # One thread of torch's in each of the pool's: more would wait for each other and for the processor.
            with ThreadPoolExecutor(max(1, threads), initializer=torch.set_num_threads, initargs=(1,)) as pool:
                for row, values in enumerate(pool.map(one, range(len(self.ids)))):
                    for key, value in values.items():
                        table[key][row] = value
                    if (row + 1) % self.batch == 0 or row + 1 == len(self.ids):
                        self.progress("pixels", row + 1, len(self.ids))
        finally:
            torch.set_num_threads(torch_threads)  # what the pool's threads set holds for every later thread
        return table

    def network_pass(
        self,
        backbone: Backbone,
        group: Mapping[str, Slot],
        cache: TruthCache | None,
        recon_cache: TruthCache | None,
    ) -> tuple[dict[Source, Features], dict[Source, Features], dict[str, Floats]]:
        """Pass both sides once through ``backbone`` for all slots of one size, as far as no cache knows the features.

        Returns:
            Features of the truths and of the reconstructions, (N, F) by (layer, reduce), and the perceptual distances
            by key (their maps are compared batch by batch: kept, they would fill gigabytes).
        """
        slots = list(group.values())
        perceptual = [s for s in slots if s.measure == "perceptual"]
        vectors: list[Source] = list(dict.fromkeys((s.layers[0], s.reduce) for s in slots if s not in perceptual))
        maps: list[Source] = list(dict.fromkeys((layer, "maps") for s in perceptual for layer in s.layers))
        resize = slots[0].resize
        truth_rows = self.known("truth", backbone, resize, [*vectors, *maps], [cache])
        recon_rows = self.known("recon", backbone, resize, vectors, [recon_cache, cache])
        truth_known = len(truth_rows) == len(vectors) + len(maps)
        recon_known = len(recon_rows) == len(vectors) and not maps
        distances = {key: np.empty(len(self.ids)) for key, slot in group.items() if slot.measure == "perceptual"}
        kept = vectors
        one: dict[str, Tensor] = {}  # where all reconstructions are one image, it passes once

        def step(chunk: slice) -> None:
            nonlocal kept
            recon: Mapping[str, Tensor] = {}
            if not recon_known and self.recons_are_one:
                if not one:
                    one.update(self.forward(backbone, slots, slice(0, 1), "recon"))
                    for source in vectors:
                        row = _reduced(one[source[0]], source[1]).numpy()
                        recon_rows[source] = np.broadcast_to(row, (len(self.ids), *row.shape[1:]))
                recon = {layer: x.expand(chunk.stop - chunk.start, *x.shape[1:]) for layer, x in one.items()}
            elif not recon_known:
                recon = self.forward(backbone, slots, chunk, "recon")
                for source in vectors:
                    self.store(recon_rows, source, recon, chunk)
            if truth_known:
                truth = {layer: torch.from_numpy(truth_rows[layer, "maps"][chunk]).to(self.device) for layer, _ in maps}
            else:
                truth = self.forward(backbone, slots, chunk, "truth")
                if cache is not None and chunk.start == 0:
                    need = sum(4 * truth[layer][0].numel() * len(self.ids) for layer, _ in [*vectors, *maps])
                    kept = [*vectors, *maps] if maps and cache.fits(need) else vectors
                for source in kept:
                    self.store(truth_rows, source, truth, chunk)
            for key, values in distances.items():
                slot = group[key]
                heads = lpips_heads(slot.heads) if slot.heads else None
                values[chunk] = perceptual_distance(
                    [truth[n] for n in slot.layers], [recon[n] for n in slot.layers], heads
                ).numpy()

        if not (truth_known and recon_known):
            self.in_batches(backbone.name, step)
        else:
            self.progress(backbone.name, len(self.ids), len(self.ids))
        if not truth_known:
            self.keep("truth", backbone, resize, {source: truth_rows[source] for source in kept}, cache)
        if not recon_known:
            self.keep("recon", backbone, resize, recon_rows, recon_cache)
        return truth_rows, recon_rows, distances

    @property
    def recons_are_one(self) -> bool:
        """Whether all reconstructions are one image, which then passes once."""
        sides = [self.recons] if self.blurry is None else [self.recons, self.blurry]
        return all(isinstance(side.images, Reordered) and len(side.images.base) == 1 for side in sides)

    def store(self, rows: dict[Source, Features], source: Source, features: Mapping[str, Tensor], chunk: slice) -> None:
        """Put what is kept of a batch's ``features`` into its rows."""
        values = _reduced(features[source[0]], source[1]).numpy()
        if chunk.start == 0:  # also where a cached array of the same name must not be written into
            rows[source] = np.empty((len(self.ids), *values.shape[1:]), dtype=np.float32)
        rows[source][chunk] = values

    def forward(self, backbone: Backbone, slots: Sequence[Slot], chunk: slice, side: Side) -> dict[str, Tensor]:
        """Layer outputs of one batch, checked."""
        images = resized(self.prepared(chunk, side, torch.float32, self.device), slots[0].resize)
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
                    f"network '{backbone.name}', layer '{layer}' gave a NaN or an infinity for the"
                    f" {self.side(side).what} of image {bad}"
                )
        return {layer: outputs[layer] for layer in layers}

    def side(self, side: Side) -> Checked:
        """Return the images of one side."""
        return self.truths if side == "truth" else self.recons

    def known(
        self,
        side: Side,
        backbone: Backbone,
        resize: Resize | None,
        sources: Sequence[Source],
        caches: Sequence[TruthCache | None],
    ) -> dict[Source, Features]:
        """Features of one side that a cache holds: of the very images, or of those that they reorder."""
        images, found = self.side(side).images, {}
        for cache in caches:
            if cache is None:
                continue
            for source in sources:
                if source in found or (rows := cache.get(self.cache_key(side, backbone, resize, source))) is None:
                    continue
                found[source] = rows[images.order] if isinstance(images, Reordered) else rows
        return found

    def keep(
        self,
        side: Side,
        backbone: Backbone,
        resize: Resize | None,
        rows: Mapping[Source, Features],
        cache: TruthCache | None,
    ) -> None:
        """Put features of one side into a cache, which knows images in their original order only."""
        if cache is not None and not isinstance(self.side(side).images, Reordered):
            for source, features in rows.items():
                cache.put(self.cache_key(side, backbone, resize, source), features)

    def cache_key(self, side: Side, backbone: Backbone, resize: Resize | None, source: Source) -> tuple[Any, ...]:
        """Everything that decides features: pixels, preparation, weights, where it runs, and what is kept of them.

        It does not say which side it is of, so that a truth that is scored as a reconstruction finds its features where
        both are prepared alike.
        """

        def prepared(images: Checked) -> tuple[Any, ...]:
            return images.digest, acting((*self.steps(side), resize), images.size)

        key = prepared(self.side(side))
        if side == "recon" and self.blurry is not None:
            key = (*key, self.protocol.blend, *prepared(self.blurry))
        return (*key, backbone.digest, torch.device(self.device).type, *source)


def _reduced(features: Tensor, reduce: str) -> Tensor:
    features = features.float().cpu()
    if reduce == "flatten":
        return features.flatten(1)
    return features.mean(dim=(2, 3)) if reduce == "mean" else features


def _out_of_memory(error: BaseException) -> bool:
    told = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(t in str(error).lower() for t in told)
