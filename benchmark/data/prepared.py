"""A prepared store: everything of a data tree that training reads, as arrays that are mapped into memory.

``python -m benchmark.data prepare`` makes it. In its folder::

    store.json                    what it was made of, and how each file is checked
    images.parquet                row, NSD id, whether it is shared, its only viewer (0: several or none)
    images_256.npy  ...           n x 256 x 256 x 3 uint8, of every size that was asked for
    external.parquet, external_256.npy ...     photographs without fMRI, by their names
    subj01/averaged.parquet       row, NSD id, repeats, whether it is shared
    subj01/averaged.npy           images seen x voxels float16: z-scored in each session, repeats averaged
    subj01/trials.parquet, subj01/trials.npy   single trials, in the order of the experiment
    subj01/voxels.parquet         hemisphere, vertex, ncsnr, parcels of each atlas, coordinates on each surface
    subj01/synthetic.parquet, subj01/synthetic.npy, subj01/synthetic_256.npy ...     NSD-Synthetic

Subjects, NSD ids, sessions and trials are counted as in ``nsd``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmark.data import paths
from benchmark.data.arrays import ArrayRecord, damages
from benchmark.data.splits import Selection, first_trials, shared_test_set
from benchmark.errors import UserError, did_you_mean
from benchmark.store import read_json, sha256_file

MANIFEST = "store.json"
VERSION = 1  # raised whenever the same data would give another store


def subject_folder(subject: int) -> str:
    """Return the folder of a subject inside a store."""
    return f"subj{subject:02d}"


def is_store(folder: Path) -> bool:
    """Return whether a folder is a prepared store, or was to become one."""
    return (folder / MANIFEST).is_file()


class Manifest:
    """``store.json``: read, checked and written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = {}
        self.arrays: dict[str, ArrayRecord] = {}
        self.tables: dict[str, dict[str, Any]] = {}  # file -> bytes, sha256, identity

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a store.

        Raises:
            UserError: there is none, it is damaged, or it is of another version of this program.
        """
        manifest = cls(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise UserError(
                f"{folder}: no prepared store (no {MANIFEST}); "
                f"make one: python -m benchmark.data prepare DIR --out {folder}"
            )
        try:
            content = read_json(path)
            version = content["version"]
            manifest.about = dict(content["about"])
            manifest.arrays = {_inside(n): ArrayRecord.from_json(r) for n, r in content["arrays"].items()}
            manifest.tables = {
                _inside(n): {"bytes": int(r["bytes"]), "sha256": str(r["sha256"]), "identity": r["identity"]}
                for n, r in content["tables"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: damaged ({error}); delete the store and prepare it again: rm -r {folder}"
            ) from error
        if version != VERSION:
            raise UserError(
                f"{folder}: was prepared by another version of this program; "
                f"delete it and prepare it again: rm -r {folder}"
            )
        return manifest

    def as_json(self) -> dict[str, Any]:
        """Return the manifest for its file."""
        return {
            "version": VERSION,
            "about": self.about,
            "arrays": {name: record.as_json() for name, record in sorted(self.arrays.items())},
            "tables": dict(sorted(self.tables.items())),
        }

    def digest(self) -> str:
        """Return a SHA-256 of everything in the store."""
        content = {
            "arrays": {name: [record.dtype, record.shape, record.sha256] for name, record in self.arrays.items()},
            "tables": {name: record["sha256"] for name, record in self.tables.items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def damages(self, digests: bool) -> list[str]:
        """Return what is wrong with the store's files, a line each: sizes, or also every byte's digest."""
        found = []
        for name, record in self.arrays.items():
            found += [f"{name}: {what}" for what in damages(self.folder / name, record, digests)]
        for name, entry in self.tables.items():
            path = self.folder / name
            if not path.is_file():
                found.append(f"{name}: missing")
            elif path.stat().st_size != entry["bytes"]:
                found.append(f"{name}: {path.stat().st_size} bytes, expected {entry['bytes']}")
            elif digests and sha256_file(path) != entry["sha256"]:
                found.append(f"{name}: differs from what was written (SHA-256)")
        return found

    @property
    def nbytes(self) -> int:
        """Size of the arrays and tables."""
        return sum(r.nbytes for r in self.arrays.values()) + sum(e["bytes"] for e in self.tables.values())


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{name} is outside the store")
    return name


class PreparedData:
    """An opened store. Arrays are mapped, not read.

    Attributes:
        root: the store's folder.
        kind: what it was made of: ``nsd``, ``miniature`` or ``algonauts``.
        published: whether that was NSD itself.
        limits: what cannot be done with this data, a sentence each.
        subjects: ascending, from 1.
        shared_ids: NSD ids that every subject was to see, ascending.
        sizes: sides of the images, in pixels, the largest first.
        parts: what the store holds, of ``release.PARTS``.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.root = manifest.folder
        about = manifest.about
        self.kind: str = about["kind"]
        self.published: bool = about["published"]
        self.limits: tuple[str, ...] = tuple(about["limits"])
        self.subjects: tuple[int, ...] = tuple(about["subjects"])
        self.sizes: tuple[int, ...] = tuple(about["sizes"])
        self.parts: tuple[str, ...] = tuple(about["parts"])
        self.shared_ids = np.array(about["shared_ids"], np.int64)
        self._sessions: Mapping[str, int] = about["sessions"]

    @classmethod
    def open(cls, folder: Path | str) -> PreparedData:
        """Open a store; checks the presence and the size of every file, not their content.

        Raises:
            UserError: it is no store, not finished, or damaged; names the file.
        """
        manifest = Manifest.read(Path(folder))
        if not manifest.about.get("complete"):
            raise UserError(
                f"{folder}: the store is not finished; go on: python -m benchmark.data prepare DIR --out {folder}"
            )
        wrong = manifest.damages(digests=False)
        if wrong:
            raise UserError(
                f"{manifest.folder}/{wrong[0]}\n"
                f"delete that file and prepare again: python -m benchmark.data prepare DIR --out {folder}"
            )
        try:
            return cls(manifest)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder}/{MANIFEST}: damaged ({error}); prepare the store again") from error

    def digest(self) -> str:
        """Return a SHA-256 that identifies the content of the store, wherever it lies."""
        return self.manifest.digest()

    def _array(self, name: str, what: str) -> np.ndarray:
        if name not in self.manifest.arrays:
            raise UserError(f"{self.root}: has no {what}")
        return np.load(self.root / name, mmap_mode="r", allow_pickle=False)

    def _table(self, name: str, what: str) -> dict[str, np.ndarray]:
        if name not in self.manifest.tables:
            raise UserError(f"{self.root}: has no {what}")
        table = pq.read_table(self.root / name)
        return {column: table[column].to_numpy() for column in table.column_names}

    def _require(self, subject: int) -> str:
        if subject not in self.subjects:
            raise UserError(f"{self.root}: no subject {subject}; prepared: {', '.join(map(str, self.subjects))}")
        return subject_folder(subject)

    # --- images -------------------------------------------------------------------------------------------------------

    @cached_property
    def image_ids(self) -> np.ndarray:
        """NSD id of each row of the images, ascending."""
        return self._table("images.parquet", "images")["nsd_id"]

    def images(self, size: int) -> np.ndarray:
        """Return all images of a size, mapped: ``n x size x size x 3`` uint8; ``image_rows`` says which is which."""
        return self._array(f"images_{size}.npy", f"images of {size} pixels (has {self._sizes()})")

    def image_rows(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the rows of images by NSD id.

        Raises:
            ValueError: an id that is not in the store.
        """
        wanted = np.asarray(ids, np.int64)
        rows = np.searchsorted(self.image_ids, wanted)
        if not np.array_equal(self.image_ids[np.minimum(rows, len(self.image_ids) - 1)], wanted):
            raise ValueError("an image that is not in the store")
        return rows

    @cached_property
    def external_names(self) -> np.ndarray:
        """File name of each row of the external images, ascending; empty where the store has none."""
        name = "external.parquet"
        return self._table(name, "")["file"] if name in self.manifest.tables else np.empty(0, object)

    def external(self, size: int) -> np.ndarray:
        """Return all external images of a size, mapped: ``n x size x size x 3`` uint8."""
        return self._array(f"external_{size}.npy", f"external images of {size} pixels (has {self._sizes()})")

    def _sizes(self) -> str:
        return ", ".join(map(str, self.sizes))

    # --- recordings ---------------------------------------------------------------------------------------------------

    def n_voxels(self, subject: int) -> int:
        """Return the number of voxels of both hemispheres."""
        self._require(subject)
        return int(self.manifest.about["n_voxels"][str(subject)])

    def seen(self, subject: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the NSD ids of a subject's averaged recordings, ascending, and their repeats (0: not known)."""
        table = self._table(f"{self._require(subject)}/averaged.parquet", "averaged recordings")
        return table["nsd_id"], table["repeats"]

    def averaged(self, subject: int) -> np.ndarray:
        """Return a subject's averaged recordings, mapped: ``images seen x V`` float16, rows as in ``seen``."""
        return self._array(f"{self._require(subject)}/averaged.npy", "averaged recordings")

    def trials(self, subject: int) -> np.ndarray:
        """Return the NSD id shown in each trial: ``sessions x trials_per_session`` int64.

        Raises:
            UserError: the store has no single trials.
        """
        table = self._table(f"{self._require(subject)}/trials.parquet", self._no_trials)
        return table["nsd_id"].reshape(self._sessions[str(subject)], -1)

    def trial_betas(self, subject: int) -> np.ndarray:
        """Return a subject's single trials, mapped: ``trials x V`` float16, in the order of the experiment."""
        return self._array(f"{self._require(subject)}/trials.npy", self._no_trials)

    @property
    def _no_trials(self) -> str:
        """What is missing where there are no single trials, and why."""
        if self.kind != "algonauts":
            return "single trials"
        return "single trials: the Algonauts 2023 release, which it was made of, holds averages only"

    def first_trials(self, subject: int, amount: str | int = "1h") -> tuple[Selection, np.ndarray]:
        """Return what a new subject gives, and its recordings (``n x V`` float16); see ``splits.first_trials``."""
        chosen = first_trials(self, subject, amount)
        return chosen, np.array(self.trial_betas(subject)[chosen.trials])

    def test_ids(self, subjects: Sequence[int]) -> np.ndarray:
        """Return the shared images that all of these subjects saw, ascending; see ``splits.shared_test_set``."""
        return shared_test_set(self, subjects)

    # --- NSD-Synthetic ------------------------------------------------------------------------------------------------

    def synthetic(self, subject: int) -> tuple[np.ndarray, np.ndarray]:
        """Return NSD-Synthetic's averaged recordings (``284 x V`` float16) and the repeats behind each image."""
        folder = self._require(subject)
        table = self._table(f"{folder}/synthetic.parquet", f"NSD-Synthetic of subject {subject}")
        return self._array(f"{folder}/synthetic.npy", "NSD-Synthetic"), table["repeats"]

    def synthetic_images(self, subject: int, size: int) -> np.ndarray:
        """Return NSD-Synthetic's images as a subject saw them: ``284 x size x size x 3`` uint8."""
        name = f"{self._require(subject)}/synthetic_{size}.npy"
        return self._array(name, f"NSD-Synthetic images of {size} pixels (has {self._sizes()})")

    # --- anatomy ------------------------------------------------------------------------------------------------------

    def _voxels(self, subject: int, columns: Sequence[str], what: str) -> list[np.ndarray]:
        table = self._table(f"{self._require(subject)}/voxels.parquet", "voxels")
        absent = [column for column in columns if column not in table]
        if absent:
            raise UserError(
                f"{self.root}: has no {what}\n"
                "put its files into the data tree (python -m benchmark.data check DIR says which) and prepare again"
            )
        return [table[column] for column in columns]

    def vertices(self, subject: int, hemisphere: str) -> np.ndarray:
        """Return the fsaverage vertices of a hemisphere's voxels (``lh`` or ``rh``), ascending."""
        side, vertex = self._voxels(subject, ["hemisphere", "vertex"], "vertices")
        return vertex[side == paths.HEMISPHERES.index(hemisphere)].astype(np.int64)

    def coordinates(self, subject: int, surface: str = paths.SURFACE_NAMES[0]) -> np.ndarray:
        """Return each voxel's place on one of fsaverage's surfaces: ``V x 3`` float32, mm."""
        names = [f"{surface}_{axis}" for axis in "xyz"]
        hint = did_you_mean(surface, paths.SURFACE_NAMES) if surface not in paths.SURFACE_NAMES else ""
        return np.stack(self._voxels(subject, names, f"surface '{surface}'{hint}"), axis=1)

    def parcels(self, subject: int, name: str = "schaefer-400") -> np.ndarray:
        """Return each voxel's parcel in an atlas: ``V`` int64, 0 = none; the right side's numbers follow the left's."""
        hint = did_you_mean(name, paths.ATLASES) if name not in paths.ATLASES else ""
        return self._voxels(subject, [name], f"atlas '{name}'{hint}")[0].astype(np.int64)

    def ncsnr(self, subject: int) -> np.ndarray:
        """Return the noise-ceiling signal-to-noise ratio of each voxel: ``V`` float32; 0 where NSD has NaN."""
        return self._voxels(subject, ["ncsnr"], "ncsnr")[0]
