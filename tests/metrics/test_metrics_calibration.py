"""What guessing and the seen images themselves score, and that knowing it costs little."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metrics.cache import TruthCache
from metrics.calibration import analytic_chance, chance_and_ceiling
from metrics.cards import CARDS, KEYS
from metrics.evaluate import evaluate
from metrics.protocols import DEMO, PROTOCOLS, get_protocol


class SmallNetwork:
    """A random convolutional network with the demo's layers; counts the images that pass."""

    def __init__(self, name: str, layers: Sequence[str], seed: int) -> None:
        torch.manual_seed(seed)
        self.name, self.digest, self.layers, self.passes = name, f"{name}-{seed}", layers, 0
        channels = [3, *range(6, 6 + len(layers))]
        self.stages = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.ReLU())
            for a, b in zip(channels[:-1], channels[1:], strict=True)
        ]

    def features(self, images: Tensor, layers: Sequence[str]) -> Mapping[str, Tensor]:
        self.passes += len(images)
        out = {}
        for layer, stage in zip(self.layers, self.stages, strict=True):
            images = stage(images)
            out[layer] = images.mean(dim=(2, 3)) if layer in ("pooled", "avgpool", "embedding") else images
        return {layer: out[layer] for layer in layers}


def backbones() -> dict[str, SmallNetwork]:
    return {
        "lite2": SmallNetwork("lite2", ["block1", "block3", "block5", "block6", "pooled"], 1),
        "augnet": SmallNetwork("augnet", ["layer1", "layer3", "avgpool"], 2),
    }


def images(n: int, size: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((n, 3, 8, 8)))
    truth = nn.functional.interpolate(coarse, (size, size), mode="bilinear").movedim(1, -1).numpy()
    recon = np.clip(0.6 * truth + 0.2 + rng.normal(0, 0.1, truth.shape), 0, 1)
    return np.round(255 * truth).astype(np.uint8), np.round(255 * recon).astype(np.uint8)


N = 24
IDS = range(100, 100 + N)
CHEAP = [key for key in KEYS if key != "LPIPS"]  # a perceptual distance compares maps, which no cache keeps


def test_the_truth_scores_best_and_chance_is_chance() -> None:
    truth, recon = images(N)
    own = evaluate(recon, truth, DEMO, backbones(), IDS)
    found = chance_and_ceiling(truth, recon, DEMO, backbones(), IDS)
    assert list(found) == ["shuffled", "mean image", "truth"]
    for key in KEYS:
        np.testing.assert_allclose(found["truth"].per_image[key], CARDS[key].best, atol=1e-6)
        for row in ("shuffled", "mean image"):
            assert CARDS[key].better(own.means[key], found[row].means[key]), (key, row)
    expected = analytic_chance(DEMO, N)
    assert expected == dict.fromkeys(["Alex(2)", "Alex(5)", "Incep", "CLIP"], 0.5) | {"CLIP-1000": 1 / N}
    for key, chance in expected.items():
        # One and the same image for all is identified by chance exactly; shuffled ones roughly.
        assert found["mean image"].means[key] == pytest.approx(chance, abs=1e-12)
        assert found["shuffled"].means[key] == pytest.approx(chance, abs=0.15)


def test_shuffled_images_go_once_each_to_a_wrong_place() -> None:
    truth, recon = images(N)
    found = chance_and_ceiling(truth, recon, DEMO, {}, IDS, rows=["shuffled"], keys=["PixCorr"], seed=3)
    assert list(found) == ["shuffled"]
    every = np.array([[np.corrcoef(t.ravel(), r.ravel())[0, 1] for r in recon] for t in truth])
    given = np.abs(every - found["shuffled"].per_image["PixCorr"][:, None]).argmin(1)
    np.testing.assert_allclose(every[np.arange(N), given], found["shuffled"].per_image["PixCorr"], atol=1e-9)
    assert sorted(given) == list(range(N)) and not (given == np.arange(N)).any()
    again, other = (
        chance_and_ceiling(truth, recon, DEMO, {}, IDS, rows=["shuffled"], keys=["PixCorr"], seed=seed)["shuffled"]
        for seed in (3, 4)
    )
    np.testing.assert_array_equal(again.per_image["PixCorr"], found["shuffled"].per_image["PixCorr"])
    assert not np.array_equal(other.per_image["PixCorr"], again.per_image["PixCorr"])


def test_every_row_is_what_scoring_its_images_gives() -> None:
    truth, recon = images(6)
    found = chance_and_ceiling(truth, recon, DEMO, backbones(), range(6), seed=1)
    every = np.array([[np.corrcoef(t.ravel(), r.ravel())[0, 1] for r in recon] for t in truth])
    order = np.abs(every - found["shuffled"].per_image["PixCorr"][:, None]).argmin(1)
    mean = np.rint(truth.astype(float).mean(0)).astype(np.uint8)
    for row, shown in (("shuffled", recon[order]), ("mean image", np.repeat(mean[None], 6, 0)), ("truth", truth)):
        plain = evaluate(shown, truth, DEMO, backbones(), range(6))
        assert tuple(found[row].per_image) == KEYS and found[row].digests == plain.digests
        for key in KEYS:
            np.testing.assert_allclose(found[row].per_image[key], plain.per_image[key], rtol=0, atol=1e-6)


def test_networks_pass_nothing_twice() -> None:
    truth, recon = images(N)
    networks, cache, recon_cache = backbones(), TruthCache(), TruthCache()
    evaluate(recon, truth, DEMO, networks, IDS, keys=CHEAP, cache=cache, recon_cache=recon_cache)
    found = chance_and_ceiling(
        truth, recon, DEMO, networks, IDS, keys=CHEAP, cache=cache, recon_cache=recon_cache, batch=5
    )
    # Truths and reconstructions once, and one mean image.
    assert {name: network.passes for name, network in networks.items()} == dict.fromkeys(networks, 2 * N + 1)
    alone = chance_and_ceiling(truth, recon, DEMO, backbones(), IDS, keys=CHEAP)
    for row, scores in found.items():
        for key in CHEAP:
            np.testing.assert_allclose(scores.per_image[key], alone[row].per_image[key], rtol=0, atol=1e-6)


def test_a_mean_image_may_be_handed_in() -> None:
    truth, recon = images(6)
    training = images(3, size=32, seed=9)[0].mean(0) / 255
    call = {"rows": ["mean image"], "keys": ["PixCorr", "SSIM"]}
    found = chance_and_ceiling(truth, recon, DEMO, {}, range(6), mean_image=training, **call)["mean image"]  # type: ignore[arg-type]
    plain = evaluate(np.repeat(training[None], 6, 0), truth, DEMO, {}, range(6), keys=call["keys"])
    for key, values in plain.per_image.items():
        np.testing.assert_array_equal(found.per_image[key], values)
    with pytest.raises(ValueError, match=r"the mean image must be \(H, W, 3\), not \(6, 64, 64, 3\)"):
        chance_and_ceiling(truth, recon, DEMO, {}, range(6), mean_image=truth, **call)  # type: ignore[arg-type]
    floats = chance_and_ceiling(truth / 255, recon, DEMO, {}, range(6), **call)["mean image"]  # type: ignore[arg-type]
    own = np.repeat((truth / 255).mean(0)[None], 6, 0)
    plain = evaluate(own, truth, DEMO, {}, range(6), keys=call["keys"])
    np.testing.assert_allclose(floats.per_image["PixCorr"], plain.per_image["PixCorr"], atol=1e-9)


def test_the_ceiling_lies_below_the_best_where_the_two_sides_are_prepared_differently() -> None:
    """MindEye2's truths pass 224 pixels on their way to 256; a reconstruction of 300 does not."""
    truth, recon = images(3, size=300)
    protocol = get_protocol("mindeye2-unblended")
    found = chance_and_ceiling(truth, recon, protocol, {}, range(3), rows=["truth"], keys=["SSIM", "PixCorr"])
    assert (found["truth"].per_image["SSIM"] < 1 - 1e-6).all() and (found["truth"].per_image["SSIM"] > 0.9).all()


def test_blended_rows_take_their_own_low_level_images_along() -> None:
    truth, recon = images(6)
    low = images(6, seed=5)[0]
    protocol = dataclasses.replace(DEMO, blend=0.75)
    found = chance_and_ceiling(truth, recon, protocol, backbones(), range(6), blurry=low)
    for key in KEYS:
        np.testing.assert_allclose(found["truth"].per_image[key], CARDS[key].best, atol=1e-6)
    plain = chance_and_ceiling(truth, recon, DEMO, backbones(), range(6))
    for key in KEYS:
        np.testing.assert_allclose(
            found["mean image"].per_image[key], plain["mean image"].per_image[key], rtol=0, atol=1e-5
        )
    # Reconstruction and low-level image are dealt out together.
    mixed = 0.75 * (recon / 255) + 0.25 * (low / 255)
    expected = chance_and_ceiling(truth, mixed, DEMO, backbones(), range(6), rows=["shuffled"])
    for key in ("PixCorr", "SSIM", "Eff"):
        np.testing.assert_allclose(
            found["shuffled"].per_image[key], expected["shuffled"].per_image[key], rtol=0, atol=1e-5
        )


def test_guessing_is_known_in_theory_for_identification_and_retrieval() -> None:
    for protocol in PROTOCOLS.values():
        chance = analytic_chance(protocol, 982)
        assert chance.pop("CLIP-1000") == pytest.approx(1 / 982)
        assert chance == dict.fromkeys(["Alex(2)", "Alex(5)", "Incep", "CLIP"], 0.5)
    assert analytic_chance(get_protocol("brain-it"), 982, distractors=True)["CLIP-1000"] == 1 / 1000


def test_progress_names_the_row() -> None:
    truth, recon = images(4)
    seen = []
    chance_and_ceiling(
        truth, recon, DEMO, backbones(), range(4), progress=lambda what, done, total: seen.append((what, done, total))
    )
    for row in ("shuffled", "mean image", "truth"):
        assert {(f"{row}: {what}", 4, 4) for what in ("pixels", "lite2", "augnet")} <= set(seen)


def test_what_cannot_be_calibrated_is_named() -> None:
    truth, recon = images(3)
    with pytest.raises(ValueError, match="no calibration row 'noise'; there are shuffled, mean image, truth"):
        chance_and_ceiling(truth, recon, DEMO, {}, range(3), rows=["noise"])
    with pytest.raises(ValueError, match="score at least 2"):
        chance_and_ceiling(truth[:1], recon[:1], DEMO, {}, range(1), keys=["SSIM"])
    with pytest.raises(ValueError, match="there are 3 truths for 2 image ids"):
        chance_and_ceiling(truth, recon[:2], DEMO, {}, range(2), keys=["SSIM"])
