"""With what a result was made: code, packages, hardware, seeds, data."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from benchmark.graph import Stage

# Those whose version can change a number.
_PACKAGES = (
    "brain-it-bench",
    "accelerate",
    "diffusers",
    "h5py",
    "imgsim",
    "lpips",
    "nibabel",
    "numpy",
    "open_clip_torch",
    "pandas",
    "pillow",
    "pyarrow",
    "safetensors",
    "scikit-image",
    "scikit-learn",
    "scipy",
    "timm",
    "torch",
    "torch_geometric",
    "torchmetrics",
    "torchvision",
)


def make_manifest(stage: Stage, command: str = "") -> dict[str, Any]:
    """Describe what a stage is computed with, as JSON-able data; ``command`` is this process's own by default."""
    return {
        "fingerprint": stage.fingerprint,
        **surroundings(command),
        "seeds": _seeds(stage.config),
        "digests": dict(stage.digests),
        "upstream": {role: upstream.fingerprint for role, upstream in stage.upstream.items()},
    }


def surroundings(command: str = "") -> dict[str, Any]:
    """Describe code, packages, machine and command of this process, as JSON-able data."""
    return {
        "git": git_state(),
        "python": platform.python_version(),
        "packages": _package_versions(),
        "hardware": _hardware(),
        "command": command or shlex.join(sys.argv),
    }


@lru_cache(maxsize=1)
def git_state() -> dict[str, Any] | None:
    """Return ``{"revision", "dirty"}`` of this package's own checkout; None where it is installed without one.

    Read once a process, when the first stage starts: later edits of the working tree are not the code that runs.
    """
    here = Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        # Installed into an environment inside some other repository, this file is not one of that repository's.
        git("ls-files", "--error-unmatch", here.name)
        return {
            "revision": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


@lru_cache(maxsize=1)
def _package_versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _hardware() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
    }


@lru_cache(maxsize=1)
def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    torch = sys.modules.get("torch")  # a stage that did not import it used no GPU, and need not wait for the import
    if torch is None or not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in found]


def _seeds(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every setting called ``seed``, ``seeds`` or ``..._seed``, by its dotted name."""
    seeds: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("seed", "seeds") or key.endswith("_seed"):
            seeds[prefix + key] = value
        elif isinstance(value, Mapping):
            seeds |= _seeds(value, f"{prefix}{key}.")
    return seeds
