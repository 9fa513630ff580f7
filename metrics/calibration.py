"""What a score must be read between: what guessing gives, and what the seen images themselves give.

No metric's scale explains itself. Under one and the same protocol grey SSIM may be .3 for reconstructions that belong
to other images, and below 1 for the seen images themselves where the protocol prepares the two sides differently.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from metrics.cache import TruthCache
from metrics.evaluate import Backbone, Id, Progress, Scores, evaluate
from metrics.images import Checked, Images, Reordered
from metrics.protocols import Protocol

ROWS = ("shuffled", "mean image", "truth")
_CHUNK = 16


def chance_and_ceiling(
    truths: Images,
    recons: Images,
    protocol: Protocol,
    backbones: Mapping[str, Backbone],
    image_ids: Sequence[Id],
    *,
    rows: Collection[str] = ROWS,
    mean_image: NDArray[np.uint8] | NDArray[np.floating] | None = None,
    seed: int = 0,
    keys: Collection[str] | None = None,
    blurry: Images | None = None,
    distractors: NDArray[np.floating] | None = None,
    cache: TruthCache | None = None,
    recon_cache: TruthCache | None = None,
    batch: int = 32,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Scores]:
    """Score what any set of reconstructions must be compared with, under the same protocol and on the same images.

    "shuffled" deals the reconstructions to wrong images, by one random cycle through all of them: what a method gets
    for images of the right kind that tell nothing. "mean image" shows the mean of the truths every time: what playing
    safe gets. "truth" gives the truths themselves as reconstructions, by the protocol's way for reconstructions: the
    best that can be had. Where the protocol blends, the last two are their own low-level versions, and "shuffled" deals
    out both together.

    Hand in the ``cache`` and ``recon_cache`` that :func:`metrics.evaluate.evaluate` filled with these images: then the
    expensive networks pass little more than one mean image.

    Args:
        truths, recons, protocol, backbones, image_ids: as in :func:`metrics.evaluate.evaluate`.
        rows: which of the three.
        mean_image: (H, W, 3) in place of the truths' own mean, e.g. that of the training images.
        seed: of the cycle.
        keys, blurry, distractors, cache, recon_cache, batch, device, threads: as there.
        progress: called as ("ROW: what", done, total).

    Returns:
        Row name -> scores, in the order above. What guessing gives in theory: :func:`analytic_chance`.

    Raises:
        ValueError: a row is unknown, the mean image is malformed, there are fewer than two images, or as in
            ``evaluate``.
        MemoryError: as in ``evaluate``.
    """
    unknown = sorted(set(rows) - set(ROWS))
    if unknown:
        raise ValueError(f"no calibration row '{unknown[0]}'; there are {', '.join(ROWS)}")
    n = len(image_ids)
    if n < 2:
        raise ValueError("chance compares images with each other: score at least 2")
    cache = cache if cache is not None else TruthCache()

    def score(row: str, images: Images, low: Images | None) -> Scores:
        return evaluate(
            images,
            truths,
            protocol,
            backbones,
            image_ids,
            keys=keys,
            blurry=low,
            distractors=distractors,
            cache=cache,
            recon_cache=recon_cache,
            batch=batch,
            device=device,
            threads=threads,
            progress=progress and (lambda what, done, total: progress(f"{row}: {what}", done, total)),
        )

    def own(images: Images) -> Images | None:
        return images if protocol.blend is not None else None

    found = {}
    if "shuffled" in rows:
        order = _cycle(n, seed)
        found["shuffled"] = score(
            "shuffled", Reordered(recons, order), None if blurry is None else Reordered(blurry, order)
        )
    if "mean image" in rows:
        mean = _mean(Checked(truths, image_ids, "truth")) if mean_image is None else mean_image
        repeated = Reordered(_one(mean), np.zeros(n, dtype=np.int64))
        found["mean image"] = score("mean image", repeated, own(repeated))
    if "truth" in rows:
        found["truth"] = score("truth", truths, own(truths))
    return found


def analytic_chance(protocol: Protocol, n_images: int, *, distractors: bool = False) -> dict[str, float]:
    """Return what guessing scores in expectation, for the metrics where theory knows: by key.

    One half in two-way identification, one in N in retrieval. The other metrics' values of unrelated images depend on
    the images: :func:`chance_and_ceiling` measures them.

    Args:
        protocol: how it is scored.
        n_images: how many test images there are.
        distractors: whether retrieval chooses from the protocol's pool rather than among the test images.
    """
    candidates = protocol.retrieval.n if distractors and protocol.retrieval.n is not None else n_images
    chance = {"identification": 0.5, "retrieval": 1.0 / candidates}
    return {key: chance[slot.measure] for key, slot in protocol.slots.items() if slot.measure in chance}


def _cycle(n: int, seed: int) -> NDArray[np.int64]:
    """Return a random order that leaves nothing in its place: along one cycle through all."""
    places = np.random.default_rng(seed).permutation(n)
    order = np.empty(n, dtype=np.int64)
    order[places] = np.roll(places, 1)
    return order


def _mean(truths: Checked) -> NDArray[np.uint8] | NDArray[np.floating]:
    total = np.zeros(truths.images.shape[1:])
    for start in range(0, len(truths.ids), _CHUNK):
        total += truths.read(slice(start, min(start + _CHUNK, len(truths.ids)))).sum(axis=0, dtype=np.float64)
    mean = total / len(truths.ids)
    return np.rint(mean).astype(np.uint8) if truths.images.dtype == np.uint8 else mean


def _one(image: NDArray[np.uint8] | NDArray[np.floating]) -> NDArray[np.uint8] | NDArray[np.floating]:
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"the mean image must be (H, W, 3), not {image.shape}")
    return image[None]
