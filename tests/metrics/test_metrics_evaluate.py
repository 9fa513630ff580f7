"""One evaluation from images to scores: wiring, sharing, invariants, and what it says of bad input."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import alexnet

from metrics.cards import CARDS, KEYS
from metrics.evaluate import TruthCache, evaluate, slot_features, subset
from metrics.identification import correlation_matrix, n_way_top1, top1, two_way
from metrics.images import Reordered, resized
from metrics.protocols import BRAIN_IT, DEMO, PROTOCOLS, Protocol, Resize, get_protocol

PUBLISHED = [protocol for protocol in PROTOCOLS.values() if protocol.track == "paper"]


class SmallNetwork:
    """A random convolutional network with the layer names that a protocol asks for."""

    def __init__(self, name: str, layers: Sequence[str], seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.name, self.digest = name, f"{name}-{seed}"
        self.stages = nn.ModuleDict()
        channels = 3
        for k, layer in enumerate(layers):
            out = (64, 192, 384, 256, 256)[k] if name == "alexnet" else 6 + k  # as many as LPIPS weighs
            stage = nn.Sequential(nn.Conv2d(channels, out, 3, stride=4 if out > 60 else 2, padding=1), nn.ReLU())
            self.stages[layer.replace(".", "_")] = stage
            channels = out
        self.layers = list(layers)
        self.passes = 0
        self.sizes: set[tuple[int, ...]] = set()

    def features(self, images: Tensor, layers: Sequence[str]) -> Mapping[str, Tensor]:
        assert images.dtype == torch.float32 and images.min() >= -0.3 and images.max() <= 1.3  # bicubic overshoots
        self.passes += len(images)
        self.sizes.add(tuple(images.shape[1:]))
        x, out = images, {}
        for layer in self.layers:
            x = self.stages[layer.replace(".", "_")](x)
            out[layer] = x.mean(dim=(2, 3)) if layer in ("pooled", "avgpool", "embedding") else x
        return {layer: out[layer] for layer in layers}


def demo_backbones() -> dict[str, SmallNetwork]:
    return {
        "lite2": SmallNetwork("lite2", ["block1", "block3", "block5", "block6", "pooled"], 1),
        "augnet": SmallNetwork("augnet", ["layer1", "layer3", "avgpool"], 2),
    }


def published_backbones(protocol: Protocol) -> dict[str, SmallNetwork]:
    """One small network for each that the protocol names, with the layers that it reads."""
    layers: dict[str, list[str]] = {}
    for slot in protocol.slots.values():
        layers.setdefault(slot.network, []).extend(slot.layers)
    order = {name: sorted(set(own), key=lambda n: int(n.partition(".")[2] or 0)) for name, own in layers.items()}
    return {name: SmallNetwork(name, own, seed) for seed, (name, own) in enumerate(order.items())}


class Streamed:
    """Images that are read from somewhere when sliced, as from a folder; notes how many at a time."""

    def __init__(self, images: np.ndarray) -> None:
        self._images, self.most, self.reads = images, 0, 0
        self.shape, self.dtype = images.shape, images.dtype

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, rows: slice) -> np.ndarray:
        read = self._images[rows].copy()
        self.most, self.reads = max(self.most, len(read)), self.reads + 1
        return read


def images(n: int = 7, size: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((n, 3, 8, 8)))
    truth = functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1).movedim(1, -1).numpy()
    recon = np.clip(0.6 * truth + 0.2 + rng.normal(0, 0.1, truth.shape), 0, 1)
    return np.round(255 * truth).astype(np.uint8), np.round(255 * recon).astype(np.uint8)


IDS = list(range(100, 107))


def test_demo_fills_all_eleven_keys_in_order_and_in_range() -> None:
    truth, recon = images()
    backbones = demo_backbones()
    scores = evaluate(recon, truth, DEMO, backbones, IDS)
    assert tuple(scores.per_image) == KEYS and scores.image_ids == tuple(IDS)
    for key, values in scores.per_image.items():
        card = CARDS[key]
        assert values.shape == (7,) and values.dtype == np.float64
        assert (values >= card.low).all() and (card.high is None or (values <= card.high).all())
        assert scores.means[key] == pytest.approx(values.mean())
    assert scores.counts["CLIP-1000"]["candidates"] == 7
    assert scores.digests == {"lite2": "lite2-1", "augnet": "augnet-2"}
    assert scores.notes == ()
    # One pass a network for truths and reconstructions together, whatever the number of metrics.
    assert {name: b.passes for name, b in backbones.items()} == {"lite2": 14, "augnet": 14}
    assert backbones["lite2"].sizes == {(3, 128, 128)}


def test_demo_equals_each_metric_computed_plainly() -> None:
    truth, recon = images()
    backbones = demo_backbones()
    found = evaluate(recon, truth, DEMO, backbones, IDS, batch=3).per_image
    t, r = truth / 255, recon / 255
    np.testing.assert_allclose(
        found["PixCorr"], [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(t, r, strict=True)], atol=1e-12
    )
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    np.testing.assert_allclose(
        found["SSIM"],
        [structural_similarity(rgb2gray(a), rgb2gray(b), **options) for a, b in zip(t, r, strict=True)],
        atol=1e-12,
    )

    def layer(network: str, name: str, x: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(x).movedim(-1, 1).float()
        big = functional.interpolate(tensor, (128, 128), mode="bilinear", align_corners=False)
        with torch.inference_mode():
            return backbones[network].features(big, [name])[name]

    def pearson(a: Tensor, b: Tensor) -> list[float]:
        return [np.corrcoef(x.flatten(), y.flatten())[0, 1] for x, y in zip(a.double(), b.double(), strict=True)]

    block6 = [layer("lite2", "block6", x).flatten(1).numpy() for x in (t, r)]
    np.testing.assert_array_equal(found["Incep"], two_way(correlation_matrix(*block6), "half"))
    pooled = [layer("lite2", "pooled", x).numpy() for x in (t, r)]
    np.testing.assert_array_equal(found["CLIP-1000"], top1(correlation_matrix(*pooled), "half"))
    block5 = [layer("lite2", "block5", x).mean(dim=(2, 3)) for x in (t, r)]
    np.testing.assert_allclose(found["Eff"], 1 - np.array(pearson(*block5)), atol=1e-6)
    avgpool = [layer("augnet", "avgpool", x) for x in (t, r)]
    np.testing.assert_allclose(found["SwAV"], 1 - np.array(pearson(*avgpool)), atol=1e-6)
    expected = torch.zeros(7)
    for name in ("block1", "block3", "block5"):
        a, b = (functional.normalize(layer("lite2", name, x), dim=1) for x in (t, r))
        expected += (a - b).square().sum(1).mean((1, 2))
    np.testing.assert_allclose(found["LPIPS"], expected, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 7, 50])
def test_batch_threads_and_dtype_change_no_score(batch: int) -> None:
    truth, recon = images()
    whole = evaluate(recon, truth, DEMO, demo_backbones(), IDS, threads=1)
    parts = evaluate(recon / 255, (truth / 255).astype(np.float64), DEMO, demo_backbones(), IDS, batch=batch, threads=2)
    for key in KEYS:
        np.testing.assert_allclose(parts.per_image[key], whole.per_image[key], rtol=0, atol=1e-6)


def test_identical_images_score_best() -> None:
    truth, _ = images()
    scores = evaluate(truth, truth, DEMO, demo_backbones(), IDS)
    for key, values in scores.per_image.items():
        np.testing.assert_allclose(values, CARDS[key].best, atol=1e-6)


def test_permuting_images_permutes_their_scores() -> None:
    truth, recon = images()
    order = np.random.default_rng(1).permutation(7)
    scores = evaluate(recon, truth, DEMO, demo_backbones(), IDS)
    permuted = evaluate(recon[order], truth[order], DEMO, demo_backbones(), np.array(IDS)[order])
    assert permuted.image_ids == tuple(np.array(IDS)[order])
    for key in KEYS:
        np.testing.assert_allclose(permuted.per_image[key], scores.per_image[key][order], rtol=0, atol=1e-6)


def test_truth_features_are_computed_once_for_many_variants() -> None:
    truth, recon = images()
    plain = evaluate(recon, truth, DEMO, demo_backbones(), IDS)
    cache, backbones = TruthCache(), demo_backbones()
    evaluate(truth, truth, DEMO, backbones, IDS, cache=cache, batch=4)
    assert backbones["lite2"].passes == 14 and cache.nbytes > 0
    again = evaluate(recon, truth, DEMO, backbones, IDS, cache=cache, batch=4)
    assert backbones["lite2"].passes == 21
    for key in KEYS:
        np.testing.assert_allclose(again.per_image[key], plain.per_image[key], rtol=0, atol=1e-6)
    # Other truths, other weights: nothing of it may be reused.
    evaluate(recon, recon, DEMO, backbones, IDS, cache=cache)
    assert backbones["lite2"].passes == 35
    backbones["lite2"].digest = "other"
    evaluate(recon, truth, DEMO, backbones, IDS, cache=cache)
    assert backbones["lite2"].passes == 49
    # A cache without room costs time and changes nothing.
    small = TruthCache(max_bytes=1000)
    for _ in range(2):
        tight = evaluate(recon, truth, DEMO, demo_backbones(), IDS, cache=small)
        assert small.nbytes <= 1000
        np.testing.assert_allclose(tight.per_image["LPIPS"], plain.per_image["LPIPS"], atol=1e-6)


class RandomAlexNet:
    """AlexNet of random weights, tapped after its ReLUs."""

    name, digest = "alexnet", "random"

    def __init__(self, reference: lpips.LPIPS) -> None:
        with torch.device("meta"):
            trunk = alexnet(weights=None).features.eval()
        self.trunk = trunk.to_empty(device="cpu")
        parts = [getattr(reference.net, f"slice{k}") for k in range(1, 6)]
        self.trunk.load_state_dict({name: value for part in parts for name, value in part.state_dict().items()})
        self.calls: list[tuple[int, tuple[str, ...]]] = []

    def features(self, images: Tensor, layers: Sequence[str]) -> Mapping[str, Tensor]:
        self.calls.append((images.shape[-1], tuple(layers)))
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x, out = (images - mean) / std, {}
        for k, module in enumerate(self.trunk):
            x = module(x.clone())
            out[f"features.{k}"] = x
        return {layer: out[layer].clone() for layer in layers}


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained'", "ignore:Arguments other than a weight enum")
def test_brain_it_goes_through_224_and_scores_lpips_at_425() -> None:
    torch.manual_seed(0)
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    network = RandomAlexNet(reference)
    truth, recon = images(n=3, size=256)
    keys = ["PixCorr", "SSIM", "SSIM-color", "LPIPS", "Alex(2)", "Alex(5)"]
    scores = evaluate(recon, truth, BRAIN_IT, {"alexnet": network}, IDS[:3], keys=keys, batch=2)
    # Alex(2) and Alex(5) share a pass; LPIPS has its own size, so a pass of its own.
    assert {size for size, _ in network.calls} == {256, 425}
    assert all(layers == ("features.4", "features.11") for size, layers in network.calls if size == 256)

    def resized(x: np.ndarray, size: int) -> Tensor:
        t = torch.from_numpy(x).movedim(-1, 1) / 255
        t = functional.interpolate(t, (224, 224), mode="bilinear", align_corners=False, antialias=False)
        return functional.interpolate(t, (size, size), mode="bilinear", align_corners=False, antialias=False)

    t, r = (resized(x, 425) for x in (truth, recon))
    with torch.inference_mode():
        np.testing.assert_allclose(scores.per_image["LPIPS"], reference(2 * t - 1, 2 * r - 1).flatten(), rtol=2e-5)
    t, r = (x.movedim(1, -1).numpy() for x in (t, r))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    for k in range(3):
        assert scores.per_image["PixCorr"][k] == pytest.approx(np.corrcoef(t[k].ravel(), r[k].ravel())[0, 1], abs=1e-6)
        grey = structural_similarity(rgb2gray(t[k]), rgb2gray(r[k]), **options)
        assert scores.per_image["SSIM"][k] == pytest.approx(grey, abs=1e-6)
        colour = structural_similarity(t[k], r[k], channel_axis=-1, **options)
        assert scores.per_image["SSIM-color"][k] == pytest.approx(colour, abs=1e-6)
    assert any("scores 1000 images" in note for note in scores.notes)


def test_antialias_flag_reaches_the_resampling() -> None:
    truth, recon = images(size=128)
    off = dataclasses.replace(DEMO, common=Resize(64, "bilinear", antialias=False))
    keys = ["PixCorr"]
    a, b = (evaluate(recon, truth, p, {}, IDS, keys=keys).per_image["PixCorr"] for p in (DEMO, off))
    assert (np.abs(a - b) > 1e-3).all()


def test_pool_retrieval_falls_back_to_the_test_set_and_says_so() -> None:
    protocol = dataclasses.replace(DEMO, retrieval=dataclasses.replace(DEMO.retrieval, pool="distractors", n=5))
    truth, recon = images()
    backbones = demo_backbones()
    without = evaluate(recon, truth, protocol, backbones, IDS, keys=["CLIP", "CLIP-1000"])
    own = evaluate(recon, truth, DEMO, backbones, IDS, keys=["CLIP-1000"])
    np.testing.assert_array_equal(without.per_image["CLIP-1000"], own.per_image["CLIP-1000"])
    assert without.counts["CLIP-1000"]["candidates"] == 7
    assert any(
        note.startswith("CLIP-1000: no distractors were given, so this is top-1 among the 7 test images")
        for note in without.notes
    )
    assert not any("distractors" in note for note in own.notes)
    pool = slot_features(images(n=9, seed=5)[0], protocol, "CLIP-1000", backbones["lite2"], range(9), batch=4)
    assert pool.shape == (9, 10)
    scores = evaluate(recon, truth, protocol, backbones, IDS, distractors=pool)
    assert scores.counts["CLIP-1000"] == {"candidates": 5}
    assert ((scores.per_image["CLIP-1000"] >= 0) & (scores.per_image["CLIP-1000"] <= 1)).all()
    assert "CLIP-1000" not in scores.matrices and not any("no distractors" in note for note in scores.notes)
    with pytest.raises(ValueError, match="there are 3 distractors; protocol 'demo' draws 4 of them"):
        evaluate(recon, truth, protocol, backbones, IDS, distractors=pool[:3])


def test_blend_mixes_the_low_level_image_in() -> None:
    protocol = dataclasses.replace(DEMO, blend=0.75)
    truth, recon = images()
    blurry = images(seed=9)[0]
    found = evaluate(recon, truth, protocol, {}, IDS, keys=["PixCorr"], blurry=blurry).per_image["PixCorr"]
    mixed = 0.75 * (recon / 255) + 0.25 * (blurry / 255)
    expected = evaluate(mixed, truth, DEMO, {}, IDS, keys=["PixCorr"]).per_image["PixCorr"]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    with pytest.raises(ValueError, match="blends in low-level reconstructions: pass blurry="):
        evaluate(recon, truth, protocol, {}, IDS, keys=["PixCorr"])
    with pytest.raises(ValueError, match="blends nothing"):
        evaluate(recon, truth, DEMO, {}, IDS, keys=["PixCorr"], blurry=blurry)


def test_constant_images_are_named_counted_and_never_silently_nan() -> None:
    truth, recon = images()
    recon[2] = 128
    scores = evaluate(recon, truth, DEMO, demo_backbones(), IDS)
    assert scores.per_image["PixCorr"][2] == 0.0 and scores.counts["PixCorr"]["constant"] == 1
    assert "1 constant reconstruction: 102" in scores.notes
    assert "PixCorr: 1 pairs have no defined correlation, which counts as zero" in scores.notes
    assert all(np.isfinite(values).all() for values in scores.per_image.values())
    faithful = evaluate(recon, truth, dataclasses.replace(DEMO, constant="nan"), {}, IDS, keys=["PixCorr"])
    assert np.isnan(faithful.per_image["PixCorr"][2]) and np.isnan(faithful.means["PixCorr"])


def test_ties_are_reported() -> None:
    truth, recon = images()
    truth[5], recon[5] = truth[1], recon[1]
    scores = evaluate(recon, truth, DEMO, demo_backbones(), IDS, batch=1)
    assert scores.counts["CLIP"]["ties"] == 2
    assert "CLIP: 2 comparisons tie and count half" in scores.notes


def test_pixels_of_a_hundred_demo_pairs_take_under_a_second() -> None:
    truth, recon = images(n=100)
    rng = np.random.default_rng(0)
    start = time.process_time()
    evaluate(recon, truth, DEMO, {}, range(100), keys=["PixCorr", "SSIM", "SSIM-color"], threads=1)
    two_way(
        correlation_matrix(rng.random((100, 20_000), dtype=np.float32), rng.random((100, 20_000), dtype=np.float32))
    )
    assert time.process_time() - start < 3.0  # measured 0.4 s; the margin is for a busy machine


def test_progress_reaches_the_end_of_every_pass() -> None:
    truth, recon = images()
    seen: list[tuple[str, int, int]] = []
    evaluate(recon, truth, DEMO, demo_backbones(), IDS, batch=3, progress=lambda *step: seen.append(step))
    assert {("pixels", 7, 7), ("lite2", 7, 7), ("augnet", 7, 7), ("lite2", 3, 7)} <= set(seen)


def bad(change: str) -> dict[str, object]:
    truth, recon = images()
    float_recon = recon / 255
    nan, wide, sym = float_recon.copy(), float_recon * 255, 2 * float_recon - 1
    nan[4, 3, 3, 1] = np.nan
    return {
        "nan": {"recons": nan},
        "0..255": {"recons": wide},
        "-1..1": {"recons": sym},
        "over": {"recons": float_recon * 1.2},
        "int": {"truths": truth.astype(np.int64)},
        "count": {"recons": recon[:5]},
        "channels": {"recons": recon.transpose(0, 3, 1, 2)},
        "grey": {"truths": truth[..., 0]},
        "oblong": {"recons": recon[:, :50]},
        "list": {"recons": [0]},
        "twice": {"image_ids": [1, 2, 3, 4, 5, 6, 2]},
        "none": {"image_ids": []},
        "key": {"keys": ["Alex2"]},
        "text": {"keys": "CLIP"},
        "network": {"backbones": {"augnet": demo_backbones()["augnet"]}},
        "batch": {"batch": 0},
        "one": {"recons": recon[:1], "truths": truth[:1], "image_ids": [1]},
    }[change]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nan", r"reconstruction of image 104 \(row 4\) holds a NaN"),
        ("0..255", r"reconstruction of image 100 \(row 0\) has values in .*: divide by 255"),
        ("-1..1", r"image 100 .*: map \[-1, 1\] to \[0, 1\]"),
        ("over", r"floats must be in \[0, 1\]: clip them"),
        ("int", r"truths must be uint8, or float in \[0, 1\], not int64"),
        ("count", "there are 5 reconstructions for 7 image ids"),
        ("channels", r"must be \(N, H, W, 3\), not \(7, 3, 64, 64\); move the channels last"),
        ("grey", r"truths must be \(N, H, W, 3\), not \(7, 64, 64\)"),
        ("oblong", "reconstructions are 64 x 50 pixels: crop them square"),
        ("list", "must be a numpy array .*, or be read like one, not list"),
        ("twice", "image id 2 occurs twice"),
        ("none", "image_ids is empty"),
        ("key", r"no metric 'Alex2' \(did you mean 'Alex\(2\)'\?\)"),
        ("text", "keys must be a list"),
        ("network", "protocol 'demo' needs the network 'lite2' for .*CLIP.*; given: augnet"),
        ("batch", "batch must be at least 1, not 0"),
        ("one", "score at least 2"),
    ],
)
def test_bad_input_is_named_with_its_remedy(change: str, message: str) -> None:
    truth, recon = images()
    call = {"recons": recon, "truths": truth, "backbones": demo_backbones(), "image_ids": IDS} | bad(change)
    with pytest.raises(ValueError, match=message) as caught:
        evaluate(protocol=DEMO, **call)  # type: ignore[arg-type]
    assert str(caught.value).count("\n") <= 1


def test_networks_are_missed_before_any_image_is_read() -> None:
    truth, recon = images()
    stream = Streamed(recon)
    with pytest.raises(ValueError, match="needs the network 'augnet'"):
        evaluate(stream, truth, DEMO, {"lite2": demo_backbones()["lite2"]}, IDS)
    assert stream.reads == 0


def test_images_without_a_common_size_are_refused() -> None:
    protocol = dataclasses.replace(DEMO, common=None)
    truth, recon = images(size=96)[0], images(size=64)[1]
    with pytest.raises(ValueError, match="image 100: the truth has 96 pixels a side, the reconstruction 64"):
        evaluate(recon, truth, protocol, {}, IDS, keys=["SSIM"])


class Broken(SmallNetwork):
    def features(self, images: Tensor, layers: Sequence[str]) -> Mapping[str, Tensor]:
        out = dict(super().features(images, layers))
        if self.name == "nan":
            out["pooled"] = out["pooled"].clone()
            out["pooled"][1, 0] = float("nan")
        elif self.name == "short":
            out["pooled"] = out["pooled"][:-1]
        else:
            del out["pooled"]
        return out


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "network 'nan', layer 'pooled' gave a NaN or an infinity for the reconstruction of image 101"),
        ("short", "network 'short', layer 'pooled' gave 6 outputs for 7 images"),
        ("gone", "network 'gone' returned no layer 'pooled'; it returned block"),
    ],
)
def test_a_broken_network_is_named(kind: str, message: str) -> None:
    truth, recon = images()
    backbones = demo_backbones() | {"lite2": Broken(kind, ["block1", "block3", "block5", "block6", "pooled"])}
    with pytest.raises(ValueError, match=message):
        evaluate(recon, truth, DEMO, backbones, IDS)


def test_feature_vectors_exist_only_for_slots_that_compare_them() -> None:
    truth, _ = images()
    for key in ("LPIPS", "SSIM"):
        with pytest.raises(ValueError, match=f"metric '{key}' compares no feature vectors"):
            slot_features(truth, DEMO, key, demo_backbones()["lite2"], IDS)


# Published protocols.


@pytest.mark.parametrize("protocol", PUBLISHED, ids=lambda p: p.name)
def test_every_published_protocol_fills_all_keys_and_equal_images_score_best(protocol: Protocol) -> None:
    backbones = published_backbones(protocol)
    order: list[str] = []
    truth, recon = images(n=4, size=80)
    low = images(n=4, size=80, seed=3)[0] if protocol.blend else None
    scores = evaluate(
        recon,
        truth,
        protocol,
        backbones,
        IDS[:4],
        blurry=low,
        threads=1,
        progress=lambda what, done, total: order.append(what),
    )
    assert tuple(scores.per_image) == KEYS
    for key, values in scores.per_image.items():
        assert (values >= CARDS[key].low).all() and (CARDS[key].high is None or (values <= CARDS[key].high).all())
    # CLIP last; one pass of AlexNet where its metrics share a size, two where they do not.
    assert order[0] == "pixels" and order[-1] == "clip_vit_l14"
    alexnet_sizes = {protocol.slots[key].resize for key in ("Alex(2)", "Alex(5)", "LPIPS")}
    passes = dict.fromkeys(backbones, 8) | {"alexnet": 8 * len(alexnet_sizes)}
    assert {name: b.passes for name, b in backbones.items()} == passes
    assert len(alexnet_sizes) == (2 if protocol.name == "brain-it" else 1)

    # Truths of the size that they have in this evaluation, so that both sides go the same way.
    size = protocol.truth.size if protocol.truth else 80
    same = images(n=4, size=size)[0]
    scores = evaluate(same, same, protocol, backbones, IDS[:4], blurry=same if protocol.blend else None, threads=1)
    for key, values in scores.per_image.items():
        np.testing.assert_allclose(values, CARDS[key].best, atol=1e-6)


@pytest.mark.parametrize("filter_", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [24, 200])
def test_the_pil_engine_is_pil_on_8_bit_images(filter_: str, size: int) -> None:
    truth, _ = images(n=3, size=64)
    step = Resize(size, filter_, antialias=True, engine="pil")  # type: ignore[arg-type]
    expected = np.stack(
        [np.asarray(Image.fromarray(t).resize((size, size), getattr(Image.Resampling, filter_.upper()))) for t in truth]
    )
    for dtype in (torch.float32, torch.float64):
        found = resized(torch.from_numpy(truth).movedim(-1, 1).to(dtype) / 255, step)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.movedim(1, -1).mul(255).round().to(torch.uint8).numpy(), expected)
    # What has the size already is not rounded.
    same = torch.rand(2, 3, size, size)
    assert resized(same, step) is same
    # Values between two bytes go to the nearer one, and do not wrap.
    flat = torch.tensor([0.0, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 1.0]).view(5, 1, 1, 1).expand(5, 3, 8, 8)
    assert (resized(flat, step)[:, 0, 4, 4] * 255).round().tolist() == [0, 0, 1, 255, 255]


def test_brain_diffuser_scores_pixels_of_8_bit_images_that_pil_resized() -> None:
    truth, recon = images(n=2, size=425)[0], images(n=2, size=512)[1]
    found = {
        name: evaluate(recon, truth, get_protocol(name), {}, IDS[:2], keys=["PixCorr", "SSIM", "SSIM-color"])
        for name in ("brain-diffuser", "brain-diffuser-skimage017")
    }
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    for k in range(2):
        t = truth[k] / 255
        r = np.asarray(Image.fromarray(recon[k]).resize((425, 425))) / 255  # PIL's default is bicubic
        plain, columns = (found[name].per_image for name in found)
        assert plain["PixCorr"][k] == pytest.approx(np.corrcoef(t.ravel(), r.ravel())[0, 1], abs=1e-12)
        assert plain["SSIM"][k] == pytest.approx(structural_similarity(rgb2gray(r), rgb2gray(t), **options), abs=1e-7)
        by_column = structural_similarity(rgb2gray(r), rgb2gray(t), channel_axis=-1, **options)
        assert columns["SSIM"][k] == pytest.approx(by_column, abs=1e-7)
        assert abs(columns["SSIM"][k] - plain["SSIM"][k]) > 0.01
        assert columns["SSIM-color"][k] == plain["SSIM-color"][k]
        assert columns["PixCorr"][k] == plain["PixCorr"][k]


def test_other_sizes_than_the_published_are_noted_and_truths_brought_to_theirs() -> None:
    truth, recon = images(n=2, size=100)[0], images(n=2, size=90)[1]
    notes = evaluate(recon, truth, get_protocol("mindeye1"), {}, IDS[:2], keys=["PixCorr"]).notes
    assert "these reconstructions have 90 pixels a side, those that protocol 'mindeye1' was published with 512" in notes
    step = "256 px bilinear, antialias on"
    assert f"truths of 100 pixels a side were brought to those of protocol 'mindeye1': {step}" in notes
    own = images(n=2, size=256)[0]
    fitting = evaluate(images(n=2, size=512)[1], own, get_protocol("mindeye1"), {}, IDS[:2], keys=["PixCorr"]).notes
    assert len(fitting) == 1 and fitting[0].startswith("protocol 'mindeye1' scores 982 images")


def test_truths_can_be_made_to_choose_among_reconstructions() -> None:
    truth, recon = images()
    other = dataclasses.replace(DEMO.identification, direction="truth-to-recon")
    protocol = dataclasses.replace(DEMO, identification=other)
    keys = ["CLIP", "CLIP-1000"]
    found = evaluate(recon, truth, protocol, demo_backbones(), IDS, keys=keys)
    swapped = evaluate(truth, recon, DEMO, demo_backbones(), IDS, keys=keys)
    for key in keys:
        np.testing.assert_array_equal(found.per_image[key], swapped.per_image[key])
        np.testing.assert_allclose(found.matrices[key], swapped.matrices[key].T, atol=1e-6)
    np.testing.assert_array_equal(found.n_way("CLIP", 3), swapped.n_way("CLIP", 3))


# Streams, memory and caches.


@pytest.mark.parametrize("as_float", [False, True])
def test_images_may_be_read_from_anywhere_a_batch_at_a_time(as_float: bool) -> None:
    truth, recon = images(size=96)[0], images(size=64)[1]
    if as_float:
        recon = (recon / 255).astype(np.float32)
    plain = evaluate(recon, truth, DEMO, demo_backbones(), IDS)
    streams = Streamed(recon), Streamed(truth)
    found = evaluate(*streams, DEMO, demo_backbones(), IDS, batch=3)
    assert [stream.most for stream in streams] == [3, 3]
    for key in KEYS:
        np.testing.assert_allclose(found.per_image[key], plain.per_image[key], rtol=0, atol=1e-6)
    pool = slot_features(Streamed(truth), DEMO, "CLIP", demo_backbones()["lite2"], IDS, batch=2)
    np.testing.assert_allclose(pool, slot_features(truth, DEMO, "CLIP", demo_backbones()["lite2"], IDS), atol=1e-6)


def test_what_is_read_is_checked_and_named() -> None:
    truth, recon = images()
    floats = (recon / 255).astype(np.float32)
    floats[5, 0, 0, 0] = 1.5
    stream = Streamed(floats)
    stream.name = lambda k: f"{k:03d}.png"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"reconstruction of image 105 \(005.png\) has values in .*: clip them"):
        evaluate(stream, truth, DEMO, demo_backbones(), IDS, keys=["SwAV"], batch=4)
    shrunk = Streamed(recon)
    shrunk.shape = (7, 80, 80, 3)
    with pytest.raises(ValueError, match=r"read as uint8 \(4, 64, 64, 3\), not as uint8 \(4, 80, 80, 3\)"):
        evaluate(shrunk, truth, DEMO, demo_backbones(), IDS, keys=["SwAV"], batch=4)


class Cramped(SmallNetwork):
    """Has room for so many images at once."""

    room = 2

    def features(self, images: Tensor, layers: Sequence[str]) -> Mapping[str, Tensor]:
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")
        return super().features(images, layers)


def test_batches_shrink_where_memory_runs_out() -> None:
    truth, recon = images()
    plain = evaluate(recon, truth, DEMO, demo_backbones(), IDS)
    backbones = demo_backbones() | {"lite2": Cramped("lite2", ["block1", "block3", "block5", "block6", "pooled"], 1)}
    found = evaluate(recon, truth, DEMO, backbones, IDS, batch=7)
    assert "lite2: memory ran out; batches were made smaller, down to 1" in found.notes  # 7, 3, 1
    for key in KEYS:
        np.testing.assert_allclose(found.per_image[key], plain.per_image[key], rtol=0, atol=1e-6)
    backbones["lite2"].room = 0
    with pytest.raises(MemoryError, match="lite2: memory runs out even with one image at a time"):
        evaluate(recon, truth, DEMO, backbones, IDS)


def test_other_errors_of_a_network_are_not_taken_for_want_of_memory() -> None:
    class Wrong(SmallNetwork):
        def features(self, images: Tensor, layers: Sequence[str]) -> Mapping[str, Tensor]:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    truth, recon = images()
    backbones = demo_backbones() | {"lite2": Wrong("lite2", ["block1"])}
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        evaluate(recon, truth, DEMO, backbones, IDS)


def test_a_folder_keeps_features_for_other_processes(tmp_path: Path) -> None:
    truth, recon = images()
    keys = [key for key in KEYS if key != "LPIPS"]  # its maps are kept nowhere
    plain = evaluate(recon, truth, DEMO, demo_backbones(), IDS, keys=keys)

    def scored(**more: object) -> tuple[dict[str, int], TruthCache]:
        backbones, cache = demo_backbones(), TruthCache(folder=tmp_path / "features")
        found = evaluate(recon, truth, DEMO, backbones, IDS, keys=keys, cache=cache, **more)  # type: ignore[arg-type]
        for key in keys:
            np.testing.assert_allclose(found.per_image[key], plain.per_image[key], rtol=0, atol=1e-6)
        return {name: b.passes for name, b in backbones.items()}, cache

    assert scored() == ({"lite2": 14, "augnet": 14}, TruthCache(folder=tmp_path / "features"))  # nothing in memory
    assert scored()[0] == {"lite2": 7, "augnet": 7}
    both = {"recon_cache": TruthCache(folder=tmp_path / "recons")}
    assert scored(**both)[0] == {"lite2": 7, "augnet": 7}
    assert scored(**both)[0] == {"lite2": 0, "augnet": 0}
    # What cannot be read is made anew; nothing but whole files lie there.
    files = sorted((tmp_path / "features").iterdir())
    assert len(files) == 6 and {file.suffix for file in files} == {".safetensors"}
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].write_bytes(files[2].read_bytes())  # whole, but of other features
    assert sum(scored()[0].values()) in (21, 28)
    assert scored()[0] == {"lite2": 7, "augnet": 7}


def test_features_are_never_taken_for_those_of_another_preparation(tmp_path: Path) -> None:
    truth, recon = images(n=4, size=80)
    cache = TruthCache(folder=tmp_path)
    for protocol in PUBLISHED:
        backbones = published_backbones(protocol)
        keys = ["CLIP", "Eff", "SwAV"]
        low = recon if protocol.blend else None
        call = {"keys": keys, "blurry": low}
        plain = evaluate(recon, truth, protocol, backbones, IDS[:4], **call)  # type: ignore[arg-type]
        for _ in range(2):
            found = evaluate(recon, truth, protocol, backbones, IDS[:4], cache=cache, recon_cache=cache, **call)  # type: ignore[arg-type]
            for key in keys:
                np.testing.assert_allclose(found.per_image[key], plain.per_image[key], rtol=0, atol=1e-6)


def test_one_cache_serves_both_sides_and_any_order() -> None:
    truth, recon = images()
    keys = [key for key in KEYS if key != "LPIPS"]
    order = np.array([3, 1, 0, 6, 2, 5, 4])
    cache, backbones = TruthCache(), demo_backbones()
    evaluate(recon, truth, DEMO, backbones, IDS, keys=keys, cache=cache, recon_cache=cache)
    for base in (recon, truth):
        expected = evaluate(base[order], truth, DEMO, demo_backbones(), IDS, keys=keys)
        found = evaluate(Reordered(base, order), truth, DEMO, backbones, IDS, keys=keys, cache=cache)
        for key in keys:
            np.testing.assert_allclose(found.per_image[key], expected.per_image[key], rtol=0, atol=1e-6)
    assert {name: b.passes for name, b in backbones.items()} == {"lite2": 14, "augnet": 14}
    # An order that no cache knows is read as it stands, and not kept as if it were the original.
    fresh = TruthCache()
    evaluate(Reordered(recon, order), truth, DEMO, backbones, IDS, keys=keys, recon_cache=fresh)
    assert fresh.nbytes == 0


# Subsets and n-way scores.


def test_a_subset_is_what_scoring_it_alone_would_have_found() -> None:
    truth, recon = images(n=9)
    recon[2] = 128  # constant
    truth[5], recon[5] = truth[1], recon[1]  # ties
    ids = [f"nsd{k:05d}" for k in range(9)]
    whole = evaluate(recon, truth, DEMO, demo_backbones(), ids)
    for rows in ([5, 1, 2, 8], [0, 3, 4], list(range(9))[::-1]):
        chosen = [ids[k] for k in rows]
        found = subset(whole, chosen)
        alone = evaluate(recon[rows], truth[rows], DEMO, demo_backbones(), chosen)
        assert found.image_ids == alone.image_ids and tuple(found.per_image) == KEYS
        assert (found.counts, found.digests, found.constant) == (alone.counts, alone.digests, alone.constant)
        assert found.notes == alone.notes
        for key in KEYS:
            np.testing.assert_allclose(found.per_image[key], alone.per_image[key], rtol=0, atol=1e-6)
        for n in (2, 3):
            np.testing.assert_array_equal(found.n_way("CLIP", n), alone.n_way("CLIP", n))
    assert subset(subset(whole, ids[:6]), ids[2:4]).counts == subset(whole, ids[2:4]).counts
    # A smaller test set makes retrieval easier, never harder.
    assert (subset(whole, ids[:5]).per_image["CLIP-1000"] >= whole.per_image["CLIP-1000"][:5]).all()


def test_a_subset_keeps_what_a_pool_gave_and_marks_what_the_pool_would_have_given() -> None:
    protocol = dataclasses.replace(DEMO, retrieval=dataclasses.replace(DEMO.retrieval, pool="distractors", n=5))
    truth, recon = images()
    pool = slot_features(images(n=9, seed=5)[0], protocol, "CLIP-1000", demo_backbones()["lite2"], range(9))
    whole = evaluate(recon, truth, protocol, demo_backbones(), IDS, distractors=pool)
    found = subset(whole, IDS[2:5])
    np.testing.assert_array_equal(found.per_image["CLIP-1000"], whole.per_image["CLIP-1000"][2:5])
    assert found.counts["CLIP-1000"] == {"candidates": 5}
    fallback = subset(evaluate(recon, truth, protocol, demo_backbones(), IDS), IDS[2:5])
    assert fallback.counts["CLIP-1000"]["candidates"] == 3
    assert any("top-1 among the 3 test images" in note for note in fallback.notes)


def test_a_subset_of_other_images_is_refused() -> None:
    truth, recon = images()
    scores = evaluate(recon, truth, DEMO, demo_backbones(), IDS, keys=["CLIP", "SSIM"])
    with pytest.raises(ValueError, match="2 of the subset's 3 images were not scored: 1, 2"):
        subset(scores, [1, 2, 103])
    with pytest.raises(ValueError, match="image id 103 occurs twice"):
        subset(scores, [103, 103])
    with pytest.raises(ValueError, match="a subset needs at least 2"):
        subset(scores, [103])


def test_every_n_way_score_comes_from_the_same_pass() -> None:
    truth, recon = images()
    scores = evaluate(recon, truth, DEMO, demo_backbones(), IDS)
    np.testing.assert_allclose(scores.n_way("CLIP", 2), scores.per_image["CLIP"], atol=1e-12)
    np.testing.assert_allclose(scores.n_way("CLIP-1000", 7), scores.per_image["CLIP-1000"], atol=1e-12)
    expected = n_way_top1(scores.matrices["Alex(2)"], 4, "half")
    np.testing.assert_array_equal(scores.n_way("Alex(2)", 4), expected)
    with pytest.raises(ValueError, match="'Eff' compares no image with the other test images; these do: Alex"):
        scores.n_way("Eff", 2)
    with pytest.raises(ValueError, match="8-way identification needs n between 2 and 7"):
        scores.n_way("CLIP", 8)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(2, 6), st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]), st.sampled_from([16, 64, 70]), st.data()
)
def test_whatever_the_images_scores_keep_their_ranges_and_follow_the_images(
    n: int, seed: int, levels: int, size: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    # Few levels: flat images, equal images and ties are among them.
    truth, recon = (
        (255 // levels * rng.integers(0, levels + 1, (n, 1, 1, 3))).astype(np.uint8).repeat(size, 1).repeat(size, 2)
        for _ in range(2)
    )
    for side in (truth, recon):
        for k in range(n):
            if rng.random() < 0.7:
                side[k, : size // 2] = rng.integers(0, 256, 3)
    order = np.array(data.draw(st.permutations(range(n))))
    batch = data.draw(st.integers(1, n))
    scores = evaluate(recon, truth, DEMO, demo_backbones(), range(n), threads=1)
    again = evaluate(recon[order], truth[order], DEMO, demo_backbones(), order, batch=batch, threads=2)
    for key, values in scores.per_image.items():
        card = CARDS[key]
        assert np.isfinite(values).all()
        assert (values >= card.low - 1e-9).all() and (card.high is None or (values <= card.high + 1e-9).all())
        if DEMO.slots.get(key) is None or DEMO.slots[key].measure in ("distance", "perceptual"):
            np.testing.assert_allclose(again.per_image[key], values[order], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(sorted(again.constant["truth"]), sorted(scores.constant["truth"]))
