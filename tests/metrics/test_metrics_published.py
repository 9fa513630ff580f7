"""Every protocol against the published procedure that it is named after, on seeded photographs and made-up images."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from PIL import Image
from skimage import data
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from benchmark.networks import scoring_backbones
from benchmark.networks.scoring import ClipVitL14
from metrics.evaluate import Backbone, evaluate, slot_features
from metrics.protocols import Protocol, Resize, get_protocol

sys.path.insert(0, str(Path(__file__).parent))
import published_procedures as published

PAPERS = list(published.PAPERS)
PIXELS = ["PixCorr", "SSIM", "SSIM-color"]
Pictures = NDArray[np.uint8]  # N x H x W x 3

# Of torchvision, as lpips calls it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The parameter 'pretrained'", "ignore:Arguments other than a weight enum"
)


# --- Images -----------------------------------------------------------------------------------------------------------

_PHOTOS: list[Image.Image] = []


def photos() -> list[Image.Image]:
    """The colour photographs that ship inside scikit-image."""
    if not _PHOTOS:
        names = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")
        _PHOTOS.extend(Image.fromarray(getattr(data, name)()) for name in names)
    return _PHOTOS


def picture(k: int, size: int, rng: np.random.Generator) -> Image.Image:
    """A photograph's crop, blurred noise, a gradient or shapes on a ground, in turn."""
    if k % 4 < 2:
        photo = photos()[int(rng.integers(len(photos())))]
        side = int(rng.integers(120, min(photo.size) + 1))
        left, top = (int(rng.integers(0, length - side + 1)) for length in photo.size)
        return photo.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if k % 4 == 2:
        coarse = rng.integers(0, 256, (*rng.integers(3, 40, 2), 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    ramp = np.linspace(0, 1, size)[:, None] * rng.random(3)
    image = np.broadcast_to(255 * ramp[:, None], (size, size, 3)).astype(np.uint8).copy()
    for _ in range(4):
        (y, x), (h, w) = rng.integers(0, size, 2), rng.integers(size // 10, size // 2, 2)
        image[y : y + h, x : x + w] = rng.integers(0, 256, 3)
    return Image.fromarray(image)


def pairs(n: int, truth_size: int, recon_size: int, seed: int = 0) -> tuple[Pictures, Pictures, Pictures]:
    """Truths, reconstructions (coarse truth, somebody else's texture, other brightness, noise), low-level versions."""
    rng = np.random.default_rng(seed)
    truths, recons, lows = [], [], []
    for k in range(n):
        truth, other = picture(k, truth_size, rng), picture(k + 1, recon_size, rng)
        small = truth.resize((int(rng.integers(6, 60)),) * 2, Image.Resampling.BOX)
        coarse = small.resize((recon_size, recon_size), Image.Resampling.BICUBIC)
        share = rng.uniform(0.3, 0.9)
        recon = share * np.asarray(coarse, np.float32) + (1 - share) * np.asarray(other, np.float32)
        recon = rng.uniform(0.7, 1.2) * recon + rng.uniform(-20, 20)
        recon += rng.integers(-12, 13, recon.shape, dtype=np.int8)
        truths.append(np.asarray(truth))
        recons.append(np.clip(recon, 0, 255).astype(np.uint8))
        lows.append(np.asarray(coarse.resize((truth_size, truth_size), Image.Resampling.BILINEAR)))
    return np.stack(truths), np.stack(recons), np.stack(lows)


def pairs_of(name: str, n: int, seed: int = 0) -> tuple[Pictures, Pictures, Pictures | None]:
    """``n`` pairs in the sizes of the paper ``name``; low-level versions where it blends them in."""
    truths, recons, lows = pairs(n, *published.SIZES[name], seed=seed)
    return truths, recons, lows if get_protocol(name).blend is not None else None


def blurry_of(lows: Pictures | None) -> dict[str, Pictures]:
    return {} if lows is None else {"blurry": lows}


def test_the_pairs_are_of_every_kind_and_not_trivial() -> None:
    truths, recons, _ = pairs(40, 64, 64)
    r = np.array([published.pixcorr(t, r) for t, r in zip(truths / 255, recons / 255, strict=True)])
    assert 0.2 < r.mean() < 0.95 and r.std() > 0.05
    assert len({t.tobytes() for t in truths}) == 40 and (truths.std(axis=(1, 2, 3)) > 2).all()


# --- Pixels -----------------------------------------------------------------------------------------------------------


def check_pixels(name: str, n: int, seed: int, colours: int) -> None:
    """``n`` pairs; ``colours`` of them in colour too, which takes as long as all the rest."""
    truths, recons, lows = pairs_of(name, n, seed)
    low = blurry_of(lows)
    scores = evaluate(recons, truths, get_protocol(name), {}, range(n), keys=PIXELS, threads=1, **low)
    expected = published.pixel_scores(name, truths, recons, lows, colours=colours)
    for key, values in expected.items():
        found = scores.per_image[key][: len(values)]
        np.testing.assert_allclose(found, values, rtol=0, atol=1e-6, err_msg=f"{name}: {key}")


@pytest.mark.parametrize("name", PAPERS)
def test_pixels_of_twenty_five_pairs_a_protocol_are_the_papers(name: str) -> None:
    """Two hundred pairs in all, no two alike."""
    check_pixels(name, 25, seed=PAPERS.index(name), colours=5)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPERS)
def test_pixels_of_two_hundred_pairs_under_every_protocol_are_the_papers(name: str) -> None:
    for part in range(4):
        check_pixels(name, 50, seed=100 + part, colours=50)


def test_single_precision_as_the_papers_ran_it_rounds_below_what_they_print() -> None:
    truths, recons, _ = pairs_of("mindeye1", 8, seed=6)
    double, single = (
        published.pixel_scores("mindeye1", truths, recons, dtype=dtype, colours=2)
        for dtype in (torch.double, torch.float)
    )
    for key in PIXELS:
        np.testing.assert_allclose(single[key], double[key], rtol=0, atol=1e-5, err_msg=key)


def test_columns_of_the_reference_are_todays_scikit_image_told_that_columns_are_channels() -> None:
    truths, recons, _ = pairs(4, 60, 60)
    for truth, recon in zip(truths / 255, recons / 255, strict=True):
        expected = structural_similarity(
            rgb2gray(recon),
            rgb2gray(truth),
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
        )
        assert published.ssim_columns(truth, recon) == pytest.approx(expected, abs=1e-12)


# --- What the networks are shown, and how their features are compared -------------------------------------------------


def glance(images: Tensor) -> Tensor:
    """Stands for a network's features: B x 3 x H x W -> B x 432."""
    return adaptive_avg_pool2d(images, 12).flatten(1)


class Spy:
    """A backbone that keeps the images it was shown."""

    def __init__(self, name: str) -> None:
        self.name, self.digest = name, f"spy-{name}"
        self.seen: list[Tensor] = []

    def features(self, images: Tensor, layers: Sequence[str]) -> Mapping[str, Tensor]:
        self.seen.append(images.clone())
        return {layer: glance(images) for layer in layers}


def check_wins(found: NDArray[np.float64], r: NDArray[np.float64], what: str) -> None:
    """Two-way scores are the published counts, up to comparisons that rounding of float32 decides."""
    n, own = len(r), np.diag(r)
    others = ~np.eye(n, dtype=bool)
    fewest, most = (((r < own + margin) & others).sum(axis=0) for margin in (-1e-6, 1e-6))
    wins = np.rint(found * (n - 1))
    np.testing.assert_allclose(wins / (n - 1), found, atol=1e-12, err_msg=what)
    assert ((fewest <= wins) & (wins <= most)).all(), f"{what}: {wins}, published {published.two_way_wins(r)}"
    decided = fewest == most
    assert decided.mean() > 0.9, f"{what}: the images are too alike to rank"
    np.testing.assert_array_equal(wins[decided], published.two_way_wins(r)[decided], err_msg=what)


def compare(found: NDArray[np.float64], t: NDArray[np.float32], r: NDArray[np.float32], key: str, what: str) -> None:
    """Scores against the features of truths and reconstructions, compared as the papers compare them."""
    if key in ("Eff", "SwAV"):
        np.testing.assert_allclose(found, published.distances(t, r), rtol=0, atol=1e-5, err_msg=what)
    else:
        check_wins(found, published.correlations(t, r), what)


@pytest.mark.parametrize("name", PAPERS)
def test_networks_are_shown_the_papers_images_and_compared_as_there(name: str) -> None:
    n = 10
    truths, recons, lows = pairs_of(name, n, seed=200 + PAPERS.index(name))
    protocol, paper = get_protocol(name), published.PAPERS[name]
    keys = [key for key in published.TAPS if key != "Alex(5)"]
    spies = {network: Spy(network) for network in protocol.networks}
    scores = evaluate(recons, truths, protocol, spies, range(n), keys=keys, batch=n, **blurry_of(lows))
    low = [None] * n if lows is None else list(lows)
    for key in keys:
        network = published.TAPS[key][0]
        t = torch.cat([paper.network_image(network, picture) for picture in truths])
        r = torch.cat([paper.network_image(network, *both) for both in zip(recons, low, strict=True)])
        what = f"{name}: {key}"
        seen = torch.cat(spies[protocol.slots[key].network].seen)
        assert seen.shape == (2 * n, *t.shape[1:]), what
        first, then = (t, r) if torch.allclose(seen[:n], t, atol=1e-5) else (r, t)  # which side goes first is free
        torch.testing.assert_close(seen, torch.cat([first, then]), rtol=0, atol=1e-6, msg=lambda m, w=what: f"{w}: {m}")
        compare(scores.per_image[key], glance(t).numpy(), glance(r).numpy(), key, what)


# --- The true architectures -------------------------------------------------------------------------------------------

FILES = {
    "alexnet": "alexnet.pth",
    "inception_v3": "inception_v3.pth",
    "clip_vit_l14": "clip_vit_l14.pt",
    "efficientnet_b1": "efficientnet_b1.pth",
    "efficientnet_b1_v1": "efficientnet_b1_v1.pth",
    "swav_resnet50": "swav_resnet50.pth",
}


def test_every_protocol_names_the_weights_of_its_paper() -> None:
    imagenet_v1 = "torchvision IMAGENET1K_V1"
    for name in PAPERS:
        protocol = get_protocol(name)
        brain_diffuser = name.startswith("brain-diffuser")
        expected = {
            "Alex(2)": imagenet_v1,
            "Alex(5)": imagenet_v1,
            "LPIPS": imagenet_v1,
            "Incep": imagenet_v1,
            "CLIP": "OpenAI ViT-L/14",
            "CLIP-1000": "OpenAI ViT-L/14",
            "Eff": imagenet_v1 if brain_diffuser else "torchvision IMAGENET1K_V2",
            "SwAV": "facebookresearch/swav resnet50, 800 epochs",
        }
        assert {key: protocol.networks[slot.network].weights for key, slot in protocol.slots.items()} == expected, name
        assert protocol.identification.ties == "strict" and protocol.identification.direction == "recon-to-truth"
        assert protocol.n_images == (1000 if name == "brain-it" or name.startswith("mindeye2") else 982)


def check_network(name: str, network: str, folder: Path, n: int) -> None:
    """Everything that one network of random weights decides, under one protocol, against the paper's procedure."""
    model = published.lively(published.build(network), seed=len(network))  # type: ignore[arg-type]
    file = get_protocol(name).slots[next(key for key, (own, _) in published.TAPS.items() if own == network)].network
    torch.save(model.state_dict(), folder / FILES[file])
    compare_network(name, network, model, scoring_backbones([file], kind="paper", weights=folder)[file], n)


def compare_network(name: str, network: str, model: nn.Module, backbone: Backbone, n: int) -> None:
    """``model`` is what the paper would run, ``backbone`` what this package runs."""
    protocol, paper = get_protocol(name), published.PAPERS[name]
    keys = [key for key, (own, _) in published.TAPS.items() if own == network]
    truths, recons, lows = pairs_of(name, n, seed=300 + PAPERS.index(name))
    asked = [*keys, "LPIPS"] if network == "alexnet" else keys
    own = {protocol.slots[keys[0]].network: backbone}
    scores = evaluate(recons, truths, protocol, own, range(n), keys=asked, batch=3, **blurry_of(lows))
    for key in keys:
        t = published.features(name, key, model, truths)
        r = published.features(name, key, model, recons, lows)
        what = f"{name}: {key}"
        found = slot_features(truths[:2], protocol, key, backbone, range(2))
        np.testing.assert_allclose(found, t[:2], rtol=0, atol=1e-5 * np.abs(t).max(), err_msg=what)
        if key in scores.matrices:
            np.testing.assert_allclose(
                scores.matrices[key], published.correlations(t, r), rtol=0, atol=1e-5, err_msg=what
            )
        compare(scores.per_image[key], t, r, key, what)
    if network == "alexnet":
        sides = (
            [(truth, None) for truth in truths],
            list(zip(recons, lows if lows is not None else [None] * n, strict=True)),
        )
        if name == "brain-it":
            t, r = ([published.resize(paper.image(*pair), 425) for pair in side] for side in sides)
        else:  # in no other paper: at the size of their Alex(2) and Alex(5)
            t, r = ([paper.network_image("alexnet", *pair) for pair in side] for side in sides)
        expected = published.lpips_distances(published.lpips_model(model), t, r)
        np.testing.assert_allclose(scores.per_image["LPIPS"], expected, rtol=0, atol=1e-5, err_msg=f"{name}: LPIPS")


NETWORKS = ["alexnet", "inception_v3", "efficientnet_b1", "swav_resnet50"]


@pytest.mark.parametrize(
    ("network", "name"), [(network, "brain-it") for network in NETWORKS] + [("efficientnet_b1", "brain-diffuser")]
)
def test_true_architectures_are_tapped_and_compared_as_in_the_paper(network: str, name: str, tmp_path: Path) -> None:
    check_network(name, network, tmp_path, n=6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PAPERS if name != "brain-diffuser-skimage017"])
@pytest.mark.parametrize("network", NETWORKS)
def test_true_architectures_under_every_protocol(network: str, name: str, tmp_path: Path) -> None:
    check_network(name, network, tmp_path, n=6)


class SmallClip(ClipVitL14):
    """The same class at a fortieth of the width and two blocks."""

    @staticmethod
    def build() -> nn.Module:
        vision = CLIPVisionCfg(layers=2, width=128, head_width=64, patch_size=14, image_size=224)
        return nn.ModuleDict({"visual": _build_vision_tower(24, vision, quick_gelu=True)})


@torch.no_grad()
def test_clip_is_openais_tower_with_the_quick_gelu() -> None:
    """A small tower of the class, against OpenAI's operations written out; and that class at full size by its shapes."""
    torch.manual_seed(0)
    small = SmallClip("clip_vit_l14", "small").eval()
    for norm in (module for module in small.modules() if isinstance(module, nn.LayerNorm)):
        norm.weight.copy_(0.5 + torch.rand(norm.weight.shape))
        norm.bias.copy_(0.1 * torch.randn(norm.bias.shape))
    images = torch.stack([torch.from_numpy(p).movedim(-1, 0) / 255 for p in pairs(3, 224, 224)[0]])
    weights = {key.removeprefix("visual."): value for key, value in small.net.state_dict().items()}
    expected = published.openai_embedding(weights, heads=2, x=published.normalise(images, "clip_vit_l14"))
    found = small.features(images, ["embedding"])["embedding"]
    assert found.shape == (3, 24)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found.norm(dim=1) - 1).abs().min() > 0.05, "not brought to length 1"

    with torch.device("meta"):
        full = ClipVitL14("clip_vit_l14", "full").net.state_dict()
        expected_full = open_clip.create_model("ViT-L-14-quickgelu", device="meta").visual.state_dict()
    shapes = {key.removeprefix("visual."): value.shape for key, value in full.items()}
    assert shapes == {key: value.shape for key, value in expected_full.items()}


@pytest.fixture(scope="module")
def clip_vit_l14() -> tuple[Backbone, nn.Module]:
    """The package's CLIP of random weights, and open_clip's with the same."""
    backbone = scoring_backbones(["clip_vit_l14"], kind="paper", random_seed=7)["clip_vit_l14"]
    model = published.build("clip_vit_l14")
    model.load_state_dict({key.removeprefix("visual."): value for key, value in backbone.net.state_dict().items()})
    return backbone, model


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n"), [("brain-it", 8), ("neuropictor", 4)])
def test_clip_vit_l14_is_the_papers(name: str, n: int, clip_vit_l14: tuple[Backbone, nn.Module]) -> None:
    backbone, model = clip_vit_l14
    compare_network(name, "clip_vit_l14", model, backbone, n)


# --- Ranks ------------------------------------------------------------------------------------------------------------


def test_ranks_of_two_hundred_pairs_are_the_published_counts() -> None:
    """Two-way, any n-way and retrieval among all from one pass; integers, so equal means equal."""
    n = 200
    truths, recons, _ = pairs(n, 64, 64, seed=400)
    protocol = dataclasses.replace(get_protocol("mindeye2-unblended"), truth=None, common=None)
    spies = {"clip_vit_l14": Spy("clip_vit_l14"), "swav_resnet50": Spy("swav_resnet50")}
    scores = evaluate(recons, truths, protocol, spies, range(n), keys=["CLIP", "CLIP-1000", "SwAV"])
    t, r = (
        np.concatenate([glance(published.resize(published.to_tensor(p), 224)).numpy() for p in x])
        for x in (truths, recons)
    )
    wins = published.two_way_wins(published.correlations(t, r))
    assert len(set(wins)) > 30, "every rank from good to bad occurs"
    np.testing.assert_array_equal(np.rint(scores.per_image["CLIP"] * (n - 1)), wins)
    np.testing.assert_array_equal(scores.per_image["CLIP-1000"], wins == n - 1)
    np.testing.assert_allclose(scores.per_image["SwAV"], published.distances(t, r), rtol=0, atol=1e-5)
    for ways in (2, 3, 10, 50, 200):
        np.testing.assert_allclose(scores.n_way("CLIP", ways), published.n_way_top1(wins, ways), rtol=0, atol=1e-12)


def test_top_1_of_1000_is_the_mean_over_brain_its_draws() -> None:
    n, protocol = 6, get_protocol("brain-it")
    truths, recons, _ = pairs_of("brain-it", n, seed=500)
    others, _, _ = pairs(8, 224, 224, seed=501)
    t, r, pool = (np.concatenate([glance(published.to_tensor(p)).numpy() for p in x]) for x in (truths, recons, others))

    four = dataclasses.replace(protocol, retrieval=dataclasses.replace(protocol.retrieval, n=4))
    spies = {"clip_vit_l14": Spy("clip_vit_l14")}
    found = evaluate(recons, truths, four, spies, range(n), keys=["CLIP-1000"], distractors=pool).per_image["CLIP-1000"]
    for k in range(n):
        draws = [published.retrieval_by_drawing(t[k], r[k], pool, d) for d in itertools.combinations(range(8), 3)]
        assert found[k] == pytest.approx(np.mean(draws), abs=1e-12)
    assert 0 < found.mean() < 1

    # As large as in print: the truth and 999 of many, of which a reconstruction beats all but a few.
    rng = np.random.default_rng(502)
    pool = np.concatenate([t, rng.normal(size=(1494, t.shape[1])).astype(np.float32)])
    found = evaluate(recons, truths, protocol, spies, range(n), keys=["CLIP-1000"], distractors=pool).per_image[
        "CLIP-1000"
    ]
    for k in range(n):
        own = np.corrcoef(t[k], r[k])[0, 1]
        beaten = sum(own > np.corrcoef(other, r[k])[0, 1] for other in pool)
        assert found[k] == pytest.approx(comb(beaten, 999) / comb(1500, 999), rel=1e-9)


# --- How far the protocols move one and the same set ------------------------------------------------------------------


def test_protocols_move_one_set_in_the_known_directions() -> None:
    """Six photographs, each rebuilt from its low frequencies and another photograph's texture."""
    crops = [photo.crop((0, 0, side, side)) for photo in photos() for side in [min(photo.size)]]
    native = [np.asarray(crop.resize((425, 425), Image.Resampling.BICUBIC)) for crop in crops]
    blurred = [
        crop.resize((14, 14), Image.Resampling.BOX).resize((512, 512), Image.Resampling.BICUBIC) for crop in crops
    ]
    recons = []
    for k, low in enumerate(blurred):
        other = crops[k - 1].resize((512, 512), Image.Resampling.BICUBIC)
        coarse = crops[k - 1].resize((20, 20), Image.Resampling.BOX).resize((512, 512), Image.Resampling.BICUBIC)
        texture = np.asarray(other, np.float32) - np.asarray(coarse, np.float32)
        recons.append(np.clip(np.asarray(low, np.float32) + texture, 0, 255).astype(np.uint8))
    truths, rebuilt, lows = np.stack(native), np.stack(recons), np.stack([np.asarray(low) for low in blurred])

    def means(protocol: Protocol | str) -> dict[str, float]:
        protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
        low = blurry_of(lows if protocol.blend is not None else None)
        return evaluate(rebuilt, truths, protocol, {}, range(len(truths)), keys=PIXELS, **low).means

    table = {name: means(name) for name in PAPERS}
    for name, row in table.items():
        assert row["SSIM-color"] < row["SSIM"], name
    ssim, pixcorr = ({name: row[key] for name, row in table.items()} for key in ("SSIM", "PixCorr"))
    assert ssim["brain-diffuser-skimage017"] > ssim["brain-diffuser"] + 0.05, "columns are easier than planes"
    for key in ("PixCorr", "SSIM-color"):
        assert table["brain-diffuser-skimage017"][key] == table["brain-diffuser"][key]
    # Every step through fewer pixels blurs both images and raises their similarity.
    order = ["brain-diffuser", "mindbridge", "mindeye1", "mindeye2-unblended", "mindeye2"]
    assert all(ssim[low] < ssim[high] for low, high in itertools.pairwise(order)), ssim
    assert pixcorr["mindeye2"] > pixcorr["mindeye2-unblended"] + 0.01, "the blend brings pixels closer"
    assert max(ssim.values()) - min(ssim.values()) > 0.1, "more than most papers' improvements"

    mindeye = get_protocol("mindeye1")
    on = means(dataclasses.replace(mindeye, common=Resize(256, "bilinear", antialias=True)))
    off = table["mindeye1"]
    assert on["SSIM"] > off["SSIM"] + 0.001 and on["PixCorr"] > off["PixCorr"] + 0.001, "antialiasing is no detail"
