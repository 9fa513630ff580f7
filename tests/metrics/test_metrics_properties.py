"""What must hold for any images under every protocol, whatever its sizes, filters and networks."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from metrics.cards import CARDS
from metrics.evaluate import Scores, evaluate, subset
from metrics.protocols import PROTOCOLS, Protocol, get_protocol

NAMES = list(PROTOCOLS)
PIXELS = ["PixCorr", "SSIM", "SSIM-color"]
CHANNELS = {"features.1": 64, "features.4": 192, "features.7": 384, "features.9": 256, "features.11": 256}
Pictures = NDArray[Any]  # N x H x W x 3


class Toy:
    """A network of one random layer a name, with as many channels as LPIPS' heads weigh."""

    def __init__(self, name: str) -> None:
        self.name, self.digest = name, f"toy-{name}"

    def features(self, images: Tensor, layers: Sequence[str]) -> Mapping[str, Tensor]:
        coarse = adaptive_avg_pool2d(images, 6)
        out = {}
        for layer in layers:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.name} {layer}".encode()))
            weights = torch.randn(CHANNELS.get(layer, 40), 3, generator=generator)
            maps = torch.einsum("bcyx,dc->bdyx", coarse, weights).relu()
            vector = layer in ("avgpool", "embedding", "pooled")
            out[layer] = maps.flatten(1) if vector else maps
        return out


def toys(protocol: Protocol) -> dict[str, Toy]:
    return {network: Toy(network) for network in protocol.networks}


def smooth(n: int, size: int, seed: int) -> NDArray[np.uint8]:
    """Distinct images with coarse and fine content."""
    generator = torch.Generator().manual_seed(seed)
    coarse = interpolate(torch.rand(n, 3, 5, 5, generator=generator), (size, size), mode="bicubic").clamp(0, 1)
    fine = torch.rand(n, 3, size, size, generator=generator)
    return (255 * (0.8 * coarse + 0.2 * fine)).round().to(torch.uint8).movedim(1, -1).numpy()


def score(protocol: Protocol | str, recons: Any, truths: Any, blurry: Any = None, **options: Any) -> Scores:
    """All metrics that ``protocol`` has, low-level reconstructions being the reconstructions if nothing else is said."""
    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    if protocol.blend is not None:
        options["blurry"] = recons if blurry is None else blurry
    ids = options.pop("ids", range(len(truths)))
    return evaluate(recons, truths, protocol, toys(protocol), ids, **{"threads": 1, **options})


def assert_same(found: Scores, expected: Scores, rows: Any = slice(None), atol: float = 1e-5) -> None:
    assert tuple(found.per_image) == tuple(expected.per_image)
    for key, values in found.per_image.items():
        np.testing.assert_allclose(values, expected.per_image[key][rows], rtol=0, atol=atol, err_msg=key)


protocols = st.sampled_from(NAMES)
seeds = st.integers(0, 2**31)
sizes = st.sampled_from([32, 57, 96])


@settings(max_examples=10, deadline=None)
@given(name=protocols, n=st.integers(2, 4), seed=seeds)
def test_the_seen_image_scores_best_and_nothing_else_does(name: str, n: int, seed: int) -> None:
    """At the size of the paper's truths: a truth of another size is resized to it, a reconstruction is not."""
    protocol = get_protocol(name)
    truths = smooth(n, protocol.truth.size if protocol.truth else 64, seed)
    best, other = score(protocol, truths, truths), score(protocol, np.roll(truths, 1, axis=0), truths)
    for key, values in best.per_image.items():
        np.testing.assert_allclose(values, CARDS[key].best, rtol=0, atol=1e-6, err_msg=key)
        worse = np.abs(other.per_image[key] - CARDS[key].best)
        assert (worse > 1e-4).all() if key not in best.matrices else worse.max() > 0.1, key


@settings(max_examples=12, deadline=None)
@given(name=protocols, n=st.integers(2, 5), size=sizes, seed=seeds, data=st.data())
def test_permuting_both_sides_permutes_the_images_and_moves_no_mean(
    name: str, n: int, size: int, seed: int, data: st.DataObject
) -> None:
    truths, recons, lows = (smooth(n, size, seed + k) for k in range(3))
    order = np.array(data.draw(st.permutations(range(n))))
    ids = np.array([f"image {k}" for k in range(n)])
    plain = score(name, recons, truths, lows, ids=list(ids))
    permuted = score(name, recons[order], truths[order], lows[order], ids=list(ids[order]))
    assert permuted.image_ids == tuple(ids[order])
    assert_same(permuted, plain, order, atol=1e-6)
    for key, mean in plain.means.items():
        assert permuted.means[key] == pytest.approx(mean, abs=1e-6)
    assert {key: count for key, count in permuted.counts.items()} == plain.counts


class Sliced:
    """Images that exist only while somebody looks at a slice of them."""

    def __init__(self, images: Pictures) -> None:
        self._images = images
        self.shape, self.dtype = images.shape, images.dtype
        self.most = 0

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, rows: slice) -> Pictures:
        found = self._images[rows].copy()
        self.most = max(self.most, len(found))
        return found


LAYOUTS = {
    "uint8": lambda x: x,
    "float32": lambda x: (x / 255).astype(np.float32),
    "float64": lambda x: x / 255,
    "columns first": np.asfortranarray,
    "channels first in memory": lambda x: np.ascontiguousarray(x.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1),
    "every second row of a larger array": lambda x: np.repeat(x, 2, axis=0)[::2],
    "read-only": lambda x: np.frombuffer(x.tobytes(), np.uint8).reshape(x.shape),
    "sliced": Sliced,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["brain-it", "brain-diffuser"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_makes_a_library_complain(layout: str, name: str) -> None:
    """Memory-mapped files and decoded pictures are read-only arrays, of which torch warns, but once a process."""
    images = smooth(2, 32, 0)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        score(name, LAYOUTS[layout](images), LAYOUTS[layout](images), keys=["PixCorr", "Eff"])
    finally:
        torch.set_warn_always(always)


@settings(max_examples=20, deadline=None)
@given(
    name=protocols,
    n=st.integers(2, 5),
    size=sizes,
    seed=seeds,
    batch=st.integers(1, 6),
    threads=st.integers(1, 3),
    layouts=st.tuples(st.sampled_from(list(LAYOUTS)), st.sampled_from(list(LAYOUTS))),
)
def test_batch_threads_type_and_layout_change_no_score(
    name: str, n: int, size: int, seed: int, batch: int, threads: int, layouts: tuple[str, str]
) -> None:
    truths, recons = smooth(n, size, seed), smooth(n, size, seed + 1)
    plain = score(name, recons, truths)
    r, t = LAYOUTS[layouts[0]](recons), LAYOUTS[layouts[1]](truths)
    assert_same(score(name, r, t, batch=batch, threads=threads), plain)
    for images in (r, t):
        assert not isinstance(images, Sliced) or images.most <= batch, "read no more than a batch at a time"


SORTS = {
    "noise": lambda rng, size: rng.integers(0, 256, (size, size, 3), dtype=np.uint8),
    "ramp": lambda rng, size: np.repeat(np.linspace(0, 255, size).astype(np.uint8)[:, None, None], size, 1).repeat(
        3, 2
    ),
    "two levels": lambda rng, size: (rng.random((size, size, 1)) < 0.1).astype(np.uint8).repeat(3, 2),
    "black": lambda rng, size: np.zeros((size, size, 3), np.uint8),
    "white": lambda rng, size: np.full((size, size, 3), 255, np.uint8),
    "grey": lambda rng, size: np.full((size, size, 3), rng.integers(1, 255), np.uint8),
    "red": lambda rng, size: np.broadcast_to(np.array([200, 3, 9], np.uint8), (size, size, 3)),
}
CONSTANT = ("black", "white", "grey")


@settings(max_examples=30, deadline=None)
@given(name=protocols, seed=seeds, size=sizes, data=st.data())
def test_values_stay_in_range_and_what_is_undefined_is_said(
    name: str, seed: int, size: int, data: st.DataObject
) -> None:
    protocol, rng = get_protocol(name), np.random.default_rng(seed)
    n = data.draw(st.integers(2, 4))
    sorts = [data.draw(st.lists(st.sampled_from(list(SORTS)), min_size=n, max_size=n)) for _ in range(2)]
    truths, recons = (np.stack([SORTS[sort](rng, size) for sort in side]) for side in sorts)
    scores = score(protocol, recons, truths)
    for key, values in scores.per_image.items():
        card, undefined = CARDS[key], scores.undefined.get(key, np.zeros(n, bool))
        defined = values[~undefined]
        assert np.isfinite(defined).all(), key
        assert (defined >= card.low - 1e-9).all() and (card.high is None or (defined <= card.high + 1e-9).all()), key
        assert scores.counts.get(key, {}).get("constant", 0) == undefined.sum(), key
        assert (np.isnan(values[undefined]) == (protocol.constant == "nan")).all(), key
        if protocol.constant == "nan" and undefined.any():
            assert np.isnan(scores.means[key]), "a mean over undefined values is undefined, as in the papers"
    flat = [k for k in range(n) if sorts[0][k] in CONSTANT or sorts[1][k] in CONSTANT]
    assert list(np.flatnonzero(scores.undefined["PixCorr"])) == flat
    for what, side in (("truth", sorts[0]), ("reconstruction", sorts[1])):
        ids = tuple(k for k in range(n) if side[k] in CONSTANT)
        assert scores.constant[what] == ids
        assert any(note.startswith(f"{len(ids)} constant {what}") for note in scores.notes) == bool(ids)
    for key, matrix in scores.matrices.items():
        others = ~np.eye(n, dtype=bool)
        level = (matrix == np.diag(matrix)) & others
        assert scores.counts[key]["ties"] == level.sum()
        assert scores.counts[key]["undefined"] == ((np.isnan(matrix) | np.isnan(np.diag(matrix))) & others).sum()


@settings(max_examples=8, deadline=None)
@given(name=protocols, n=st.integers(3, 6), seed=seeds)
def test_n_way_falls_with_n_from_two_way_to_retrieval(name: str, n: int, seed: int) -> None:
    scores = score(name, smooth(n, 32, seed + 1), smooth(n, 32, seed))
    chances = [scores.n_way("CLIP", ways) for ways in range(2, n + 1)]
    np.testing.assert_allclose(chances[0], scores.per_image["CLIP"], atol=1e-12)
    np.testing.assert_allclose(chances[-1], scores.per_image["CLIP-1000"], atol=1e-12)
    assert all((more <= fewer + 1e-12).all() for fewer, more in itertools.pairwise(chances))
    assert all((chance >= 0).all() and (chance <= 1).all() for chance in chances)


@settings(max_examples=8, deadline=None)
@given(name=protocols, n=st.integers(3, 6), seed=seeds, data=st.data())
def test_a_subset_of_one_pass_is_what_scoring_it_alone_gives(name: str, n: int, seed: int, data: st.DataObject) -> None:
    truths, recons = smooth(n, 32, seed), smooth(n, 32, seed + 1)
    recons[0] = 0  # undefined in one of them
    rows = data.draw(st.lists(st.integers(0, n - 1), min_size=2, max_size=n, unique=True))
    part = subset(score(name, recons, truths), rows)
    alone = score(name, recons[rows], truths[rows], ids=rows)
    assert part.image_ids == alone.image_ids == tuple(rows)
    assert_same(part, alone, atol=1e-6)
    assert part.counts == alone.counts
    assert part.notes == alone.notes


@settings(max_examples=5, deadline=None)
@given(n=st.integers(2, 5), seed=seeds)
def test_the_other_direction_is_the_same_with_the_sides_changed(n: int, seed: int) -> None:
    """Where both sides are prepared alike, it does not matter which is called the truth, except in who chooses."""
    forward = get_protocol("brain-it")
    rule = dataclasses.replace(forward.identification, direction="truth-to-recon")
    backward = dataclasses.replace(forward, identification=rule)
    a, b = smooth(n, 48, seed), smooth(n, 48, seed + 1)
    assert_same(score(backward, a, b), score(forward, b, a), atol=1e-6)


@settings(max_examples=5, deadline=None)
@given(n=st.integers(2, 4), size=sizes, seed=seeds)
def test_blending_a_reconstruction_with_itself_or_with_nothing_of_the_other_changes_nothing(
    n: int, size: int, seed: int
) -> None:
    truths, recons, other = (smooth(n, size, seed + k) for k in range(3))
    plain = score("mindeye2-unblended", recons, truths)
    assert_same(score("mindeye2", recons, truths, recons), plain, atol=1e-6)
    assert_same(
        score(dataclasses.replace(get_protocol("mindeye2"), blend=1.0), recons, truths, other), plain, atol=1e-6
    )
    blended = score("mindeye2", recons, truths, truths)
    assert (blended.per_image["PixCorr"] > plain.per_image["PixCorr"]).all(), "a quarter of the truth helps"


@settings(max_examples=8, deadline=None)
@given(name=protocols, seed=seeds, turns=st.integers(1, 3))
def test_pixels_do_not_care_for_mirrors_brightness_or_the_order_of_colours(name: str, seed: int, turns: int) -> None:
    protocol = get_protocol(name)
    protocol = dataclasses.replace(protocol, truth=None, blend=None)  # both sides alike
    truths, recons = smooth(2, 64, seed) / 255, smooth(2, 64, seed + 1) / 255
    plain = score(protocol, recons, truths, keys=PIXELS).per_image
    # PIL filters rows before columns and rounds in between: a turned image differs in some last bits of eight.
    atol = 2e-3 if any(r is not None and r.engine == "pil" for r in (protocol.pixcorr, protocol.ssim.resize)) else 1e-9

    def changed(change: Any, both: bool = True) -> dict[str, NDArray[np.float64]]:
        return score(protocol, change(recons), change(truths) if both else truths, keys=PIXELS).per_image

    mirrored = changed(lambda x: x[:, :, ::-1])
    for key in PIXELS:
        np.testing.assert_allclose(mirrored[key], plain[key], rtol=0, atol=atol, err_msg=key)
    turned = changed(lambda x: np.rot90(x, turns, axes=(1, 2)))
    for key in PIXELS:
        if key == "SSIM" and protocol.ssim.flavour == "columns" and turns != 2:
            assert (np.abs(turned[key] - plain[key]) > 1e-5).any(), "rows are not columns"
        else:
            np.testing.assert_allclose(turned[key], plain[key], rtol=0, atol=atol, err_msg=key)
    recoloured = changed(lambda x: x[..., ::-1])
    for key in ("PixCorr", "SSIM-color"):
        np.testing.assert_allclose(recoloured[key], plain[key], rtol=0, atol=1e-9, err_msg=key)
    assert (np.abs(recoloured["SSIM"] - plain["SSIM"]) > 1e-7).any(), "grey weighs the colours"
    dimmed = changed(lambda x: 0.5 * x + 0.2, both=False)
    np.testing.assert_allclose(dimmed["PixCorr"], plain["PixCorr"], rtol=0, atol=max(atol, 1e-9))
    assert (dimmed["SSIM"] < plain["SSIM"] + 0.5).all() and not np.allclose(dimmed["SSIM"], plain["SSIM"], atol=1e-4)
