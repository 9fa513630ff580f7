"""Checkpoints of a running training: safetensors and JSON, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

logger = logging.getLogger(__name__)

TENSORS, STATE = "tensors.safetensors", "state.json"
KEEP = 2


def save(folder: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint into ``folder`` and drop all but the newest two.

    A checkpoint is a folder ``checkpoint-N`` that appears by a rename once both of its files are on the disk.

    Args:
        folder: where the checkpoints of one training lie; made if missing.
        tensors: tensors of any device and layout.
        state: JSON-able values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    existing = _existing(folder)
    serial = int(existing[-1].name.split("-")[1]) + 1 if existing else 0
    unfinished = folder / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    # Copies, because safetensors refuses tensors that share memory.
    save_file(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, unfinished / TENSORS
    )
    (unfinished / STATE).write_text(json.dumps({**state, "sha256": _sha256(unfinished / TENSORS)}))
    for file in (unfinished / TENSORS, unfinished / STATE, unfinished):
        _to_disk(file)
    os.rename(unfinished, folder / f"checkpoint-{serial:06d}")
    _to_disk(folder)
    for old in existing[: max(0, len(existing) + 1 - KEEP)]:
        shutil.rmtree(old, ignore_errors=True)


def load(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Return the newest checkpoint in ``folder`` that is whole, as (tensors on the CPU, state), or None."""
    for place in reversed(_existing(folder)):
        try:
            state = json.loads((place / STATE).read_text())
            if state.pop("sha256") != _sha256(place / TENSORS):
                raise ValueError("the checksum of the tensors does not match")
            return load_file(place / TENSORS), state
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            logger.warning("%s is damaged, going back to the one before: %s", place, error)
    return None


def _existing(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-[0-9]*"))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
