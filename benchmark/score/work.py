"""From paths to results: the images are opened, looked at, and scored under each protocol that was asked for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from benchmark.devices import choose_device
from benchmark.errors import RunError, UserError
from benchmark.imagesets import ImageSet, paired, read_images, read_subset
from benchmark.imagesets.npy import read_header
from benchmark.imagesets.wording import counted, damaged, one_line, place, reason, unreadable
from benchmark.progress import Progress
from benchmark.score.options import Job
from benchmark.score.steps import Steps, passes
from benchmark.weights import file_digest, require_weights
from metrics.protocols import Protocol

if TYPE_CHECKING:
    from benchmark.score.scoring import Distractors, Result
    from metrics.cache import TruthCache

_READ = 16
_CLIP_FEATURES = 768
_CACHE_BYTES = 4 << 30  # the truths' features of four protocols at 1000 images each


@dataclass(frozen=True)
class Work:
    """What was scored.

    Attributes:
        results: protocol -> scores.
        data: what was read -> SHA-256 of its pixels.
    """

    results: dict[str, Result]
    data: dict[str, str]


def score(args: argparse.Namespace, job: Job) -> Work:
    """Do what the command line asks for.

    Raises:
        UserError: an image, a file or an id is not as it must be; it is named.
        RunError: memory ran out.
    """
    progress = Progress(enabled=not args.no_progress)
    recons = read_images(args.recons, ids=args.ids, what="reconstructions")
    truths = read_images(args.truth, ids=args.ids, what="truths")
    paired(recons, truths)
    blurry = None
    if args.blurry is not None:
        blurry = read_images(args.blurry, ids=args.ids, what="low-level reconstructions")
        paired(recons, blurry)
    subsets = _subsets(args.subset)
    pool = None if args.distractors is None or job.pooled is None else _Pool.open(args.distractors, job.pooled, truths)
    device = choose_device(args.device)
    sets = [images for images in (recons, truths, blurry) if images is not None]
    _look_at(sets, args.allow_constant, progress)
    if job.kind == "paper" and args.random_weights is None:  # after the images: they are what people get wrong
        require_weights(job.networks, args.weights)

    # Only now what takes seconds to import: whatever is wrong so far has been said at once.
    import torch

    from benchmark.networks import scoring_backbones
    from benchmark.score.scoring import score_images
    from metrics.cache import TruthCache

    threads = args.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    backbones: Mapping[str, Any] = {}
    if job.networks:
        backbones = scoring_backbones(
            job.networks, kind=job.kind, weights=args.weights, device=device, random_seed=args.random_weights
        )
    cache = TruthCache(max_bytes=min(_CACHE_BYTES, psutil.virtual_memory().available // 4), folder=args.cache)
    calibrate = not args.no_calibration and not job.every
    results = {}
    owners = recons.subjects or (1,) * len(recons)
    costs = [
        (cost, owners.count(subject))
        for protocol in job.protocols.values()
        for subject in sorted(set(owners))
        for cost in passes(protocol, job.keys, calibrate)
    ]
    try:
        distractors = None if pool is None else pool.features(backbones, cache, args.batch, device, progress)
        with progress.bar("scoring", total=sum(cost * n for cost, n in costs), share=True) as bar:
            steps = Steps(bar, costs)
            for name, protocol in job.protocols.items():
                results[name] = score_images(
                    recons,
                    truths,
                    protocol,
                    backbones,
                    keys=job.keys,
                    blurry=blurry if protocol.blend is not None else None,
                    distractors=distractors,
                    subsets=subsets,
                    n_way=job.n_way,
                    calibrate=calibrate,
                    method=args.method or Path(args.recons.partition("::")[0]).resolve().stem,
                    variant=name if job.every else "",
                    subject=args.subject,
                    cache=cache,
                    batch=args.batch,
                    device=device,
                    threads=threads,
                    seed=args.seed,
                    progress=steps,
                )
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise RunError(f"memory ran out ({one_line(error)}); try --batch {max(1, args.batch // 4)}") from error
    except OSError as error:  # of the cache; the readers name their files themselves
        raise RunError(f"--cache {place(args.cache)}: {reason(error)}; make room, or leave it out") from error
    data = {images.what: images.digest for images in sets}
    if distractors is not None:
        data["distractors"] = distractors.digest
    return Work(results, data)


def _subsets(files: Sequence[Path]) -> dict[str, tuple[int | str, ...]]:
    found: dict[str, tuple[int | str, ...]] = {}
    for file in files:
        name, ids = read_subset(file)
        if name in found:
            raise UserError(f"--subset {place(file)}: a second subset called {one_line(name, 60)}; rename the file")
        found[name] = ids
    return found


def _look_at(sets: Sequence[ImageSet], allow_constant: bool, progress: Progress) -> None:
    """Read every image once, so that what is wrong with one is known before the first network runs.

    Raises:
        UserError: an image cannot be decoded, holds NaN, leaves [0, 1], or is one flat colour.
    """
    with progress.bar("reading images", total=sum(len(images) for images in sets)) as bar:
        for images in sets:
            constant = []
            for start in range(0, len(images), _READ):
                batch = images[start : start + _READ]
                flat = batch.reshape(len(batch), -1)
                constant += [start + int(k) for k in np.flatnonzero(flat.min(axis=1) == flat.max(axis=1))]
                bar.advance(len(batch))
            if constant and not allow_constant:
                more = f" (and {len(constant) - 1} more)" if len(constant) > 1 else ""
                raise UserError(
                    f"{images.name(constant[0])}: one flat colour{more}; its correlation with anything is undefined\n"
                    "make it again, or leave it out on both sides; to score it as it is: --allow-constant"
                )


@dataclass(frozen=True)
class _Pool:
    """Where the distractors of CLIP-1000 come from: images, or their features in an ``.npy`` file."""

    protocol: Protocol
    path: Path
    images: ImageSet | None

    @classmethod
    def open(cls, path: str, protocol: Protocol, truths: ImageSet) -> _Pool:
        """Open the pool and look at its size and ids."""
        needed = (protocol.retrieval.n or 1) - 1
        file = Path(path)
        if file.suffix.lower() == ".npy" and file.is_file():
            try:
                with file.open("rb") as stream:
                    header = read_header(stream, place(file))
            except OSError as error:
                raise unreadable(file, error) from error
            if len(header.shape) == 2:
                if header.shape[1] != _CLIP_FEATURES or header.dtype.kind != "f":
                    raise UserError(
                        f"{place(file)}: {header.dtype} {header.shape}; expected M x {_CLIP_FEATURES} floats, the "
                        "image embeddings of CLIP ViT-L/14"
                    )
                _check_pool(file, header.shape[0], needed)
                return cls(protocol, file, None)
        images = read_images(path, what="distractors")
        _check_pool(file, len(images), needed)
        both = set(images.ids) & set(truths.ids) if images.has_ids and truths.has_ids else set()
        if both:
            first = min(both, key=str)
            raise UserError(
                f"{place(path)}: {counted(len(both), 'distractor')} among the test images (first: {one_line(first)}); "
                "leave them out"
            )
        return cls(protocol, file, images)

    def features(
        self, backbones: Mapping[str, Any], cache: TruthCache, batch: int, device: str, progress: Progress
    ) -> Distractors:
        """Read the features, or compute them where neither file nor cache has them."""
        from benchmark.score.scoring import Distractors
        from metrics.evaluate import slot_features

        if self.images is None:
            try:
                features = np.load(self.path, allow_pickle=False)
            except (OSError, ValueError) as error:
                raise damaged(self.path, error, "a whole .npy array") from error
            if not np.isfinite(features).all():
                row = int((~np.isfinite(features).all(axis=1)).argmax())
                raise UserError(f"{place(self.path)}, row {row}: holds NaN or infinity; compute it again")
            return Distractors(features, file_digest(self.path))
        key = next(k for k, slot in self.protocol.slots.items() if slot.measure == "retrieval")
        backbone = backbones[self.protocol.slots[key].network]
        entry = ("distractors", self.images.digest, self.protocol.name, backbone.digest, device.split(":")[0])
        known = cache.get(entry)
        if known is None:
            with progress.bar("distractors", total=len(self.images)) as bar:
                known = slot_features(
                    self.images,
                    self.protocol,
                    key,
                    backbone,
                    range(len(self.images)),
                    batch=batch,
                    device=device,
                    progress=lambda what, done, total: bar.advance(done - bar.done),
                )
            cache.put(entry, known)
        return Distractors(known, self.images.digest)


def _check_pool(path: Path, found: int, needed: int) -> None:
    if found < needed:
        raise UserError(f"{place(path)}: {counted(found, 'distractor')}; expected at least {needed}")
