"""How far a scoring is: its passes weighted by what they cost, so that the time left is told from the first one on."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from benchmark.progress import Bar
from metrics.cards import PIXEL_KEYS
from metrics.protocols import Protocol

# Milliseconds an image on one CPU core, roughly; only their proportions matter.
_PIXELS = 30
_COSTS = {
    "alexnet": 14,
    "efficientnet_b1": 45,
    "efficientnet_b1_v1": 45,
    "swav_resnet50": 71,
    "inception_v3": 154,
    "clip_vit_l14": 1080,
    "augnet": 25,
    "lite2": 10,
}
_REFERENCES = 3  # rows that a calibration adds


def passes(protocol: Protocol, keys: Collection[str] | None, calibrate: bool) -> list[int]:
    """Return what each pass over the images of a subject costs, in the order in which they are made.

    The rows of a calibration find the features in a cache, all but the maps of a perceptual distance.
    """
    wanted = {key: slot for key, slot in protocol.slots.items() if keys is None or key in keys}
    own, again = [], []
    if keys is None or {*PIXEL_KEYS, *(slot.key for slot in protocol.pixels)} & set(keys):
        own.append(_PIXELS)
        again.append(_PIXELS)
    for network in protocol.networks:
        slots = [slot for slot in wanted.values() if slot.network == network]
        for resize in dict.fromkeys(slot.resize for slot in slots):
            cost = 2 * _COSTS.get(network, 50)
            own.append(cost)
            maps = any(slot.measure == "perceptual" for slot in slots if slot.resize == resize)
            again.append(cost if maps else 0)
    return own + (again * _REFERENCES if calibrate else [])


class Steps:
    """Turns what an evaluation tells of itself into the progress of one bar.

    Args:
        bar: counts to the sum of ``costs``, each times its images.
        costs: cost and number of images of each pass to come.
    """

    def __init__(self, bar: Bar, costs: Sequence[tuple[int, int]]) -> None:
        self._bar, self._costs = bar, costs
        self._pass, self._what, self._done = -1, "", 0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Take note that ``done`` of ``total`` images have passed ``what``."""
        if what != self._what or done <= self._done:
            self._pass += 1
        self._what, self._done = what, done
        before = sum(cost * n for cost, n in self._costs[: self._pass])
        now = self._costs[self._pass][0] * done if self._pass < len(self._costs) else 0
        self._bar.advance(max(0, before + now - self._bar.done), f"{what} {done}/{total}")
