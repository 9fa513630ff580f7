"""One evaluation from images to scores: wiring, sharing, invariants, and what it says of bad input."""

import dataclasses
import time
from collections.abc import Mapping, Sequence

import lpips
import numpy as np
import pytest
import torch
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import alexnet

from metrics.cards import CARDS, KEYS
from metrics.evaluate import TruthCache, evaluate, slot_features
from metrics.identification import correlation_matrix, top1, two_way
from metrics.protocols import BRAIN_IT, DEMO, Resize


class SmallNetwork:
    """A random convolutional network with the layer names that a protocol asks for."""

    def __init__(self, name: str, layers: Sequence[str], seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.name, self.digest = name, f"{name}-{seed}"
        self.stages = nn.ModuleDict()
        channels = 3
        for k, layer in enumerate(layers):
            stage = nn.Sequential(nn.Conv2d(channels, 6 + k, 3, stride=2, padding=1), nn.ReLU())
            self.stages[layer.replace(".", "_")] = stage
            channels = 6 + k
        self.layers = list(layers)
        self.passes = 0
        self.sizes: set[tuple[int, ...]] = set()

    def features(self, images: Tensor, layers: Sequence[str]) -> Mapping[str, Tensor]:
        assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
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
        ("list", "must be a numpy array"),
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
