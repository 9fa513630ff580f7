"""Looking at the files of a data tree, one group after the other; ``inspection`` makes a report of it.

Everything is read from headers, names and sizes; only small files (design, masks, labels) are read whole. Unlike the
loaders, which stop at the first thing that is wrong, this finds all of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image

from benchmark.data import formats, paths, supplies
from benchmark.data.algonauts import SPLITS
from benchmark.data.formats import Wrong
from benchmark.data.release import Release

Result = TypeVar("Result")
State = Literal["complete", "missing", "incomplete", "wrong"]
_COCO_BYTES = 20_000_000_000  # unpacked, about


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be."""

    path: str  # below the root
    found: str
    expected: str


@dataclass
class Item:
    """A group of files that come together."""

    part: str
    name: str
    supply: str
    commands: tuple[str, ...] = ()
    needed: bool = False
    files: int = 0  # that there should be
    present: int = 0
    bytes_expected: int = 0
    bytes_present: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def state(self) -> State:
        """What is the matter with it, in a word."""
        if not self.problems:
            return "complete"
        if any(problem.found != "missing" for problem in self.problems):
            return "wrong"
        return "incomplete" if self.present else "missing"

    def as_json(self) -> dict[str, Any]:
        """Return it for ``--json``."""
        return {**asdict(self), "state": self.state}


class Look:
    """Looks at one group of files after the other.

    Args:
        root: the tree's folder.
        release: the numbers that it must have; 0 vertices: any number, the same for all.
        subjects: whose files to look for, from 1.
        miniature: whether this program made the tree.
    """

    def __init__(self, root: Path, release: Release, subjects: Sequence[int], miniature: bool) -> None:
        self.root, self.release, self.subjects, self.miniature = root, release, subjects, miniature
        self.vertices: dict[str, int] = dict.fromkeys(paths.HEMISPHERES, release.vertices)  # 0: not known yet
        self.used: dict[tuple[int, str], int] = {}

    def _item(self, part: str, name: str, supply: str, *commands: str) -> Item:
        return Item(part, name, "simulation" if self.miniature else supply, () if self.miniature else commands)

    def _file(
        self,
        item: Item,
        relative: str,
        what: str,
        reader: Callable[[Path], Result],
        size: int = 0,
        check: Callable[[Result], None] | None = None,
    ) -> Result | None:
        """Read one file of an item; note what is wrong with it.

        Args:
            item: to note it in.
            relative: path below the root.
            what: what the file holds.
            reader: reads it or its header.
            size: its bytes, where they are known beforehand.
            check: raises ``Wrong`` where what was read is not what this file should hold.
        """
        item.files += 1
        item.bytes_expected += size
        path = self.root / relative
        if path.is_file():
            item.present += 1
            item.bytes_present += path.stat().st_size
        try:
            result = formats.read(path, what, reader)
            if check is not None:
                check(result)
        except Wrong as wrong:
            item.problems.append(Problem(relative, wrong.found, wrong.expected))
            return None
        if not size:
            item.bytes_expected += path.stat().st_size
        return result

    # --- NSD ----------------------------------------------------------------------------------------------------------

    def nsd_images(self) -> list[Item]:
        """Return the images, and the design with the list of images."""
        release = self.release
        stimuli = self._item(
            "images",
            f"{release.images:,} images of {release.image_side} x {release.image_side}",
            "nsd",
            supplies.bucket("nsddata_stimuli/stimuli", "nsd/nsd_stimuli.hdf5"),
        )

        def right_images(shape: tuple[int, int, int]) -> None:
            _expect(shape, (release.images, release.image_side, release.image_side), "images x height x width")

        size = 3 * release.images * release.image_side**2
        self._file(stimuli, paths.STIMULI, "the images", formats.brick_shape, size, right_images)
        design = self._item(
            "images",
            "design and list of images",
            "nsd",
            supplies.bucket("nsddata/experiments", "nsd/nsd_expdesign.mat", "nsd/nsd_stim_info_merged.csv"),
        )

        def right_design(found: formats.Design) -> None:
            found.check()
            _expect(len(found.order), release.trials_designed, "trials")
            _expect(found.seen.shape, (len(release.sessions), release.images_per_subject), "subjects x images")
            _expect(len(found.shared), release.shared, "shared images")

        read = self._file(
            design,
            paths.DESIGN,
            "the order of images (masterordering, subjectim, sharedix)",
            lambda path: formats.read_design(path, release.images),
            check=right_design,
        )

        def right_list(rows: list[tuple[int, bool]]) -> None:
            _expect(len(rows), release.images, "lines")
            if read is not None and sorted(i for i, shared in rows if shared) != read.shared.tolist():
                raise Wrong("shared1000 disagrees with sharedix of the design", "the same images in both")

        self._file(
            design, paths.STIM_INFO, "the list of images (one line an image)", formats.read_stim_info, check=right_list
        )
        return [stimuli, design]

    def nsd_betas(self) -> list[Item]:
        """Return the masks, and the betas of each subject."""
        items = [self._masks()]
        for subject in self.subjects:
            sessions, trials = self.release.sessions[subject], self.release.trials_per_session
            name = f"subject {subject}: {sessions} sessions of {trials} trials"
            item = self._item("betas", name, "nsd", self._betas_command("betas_fithrf_GLMdenoise_RR"))
            for session in range(1, sessions + 1):
                for hemisphere in paths.HEMISPHERES:
                    relative = paths.betas(subject, hemisphere, session)
                    self._mgh(item, relative, hemisphere, trials, f"betas of session {session} of {sessions}")
            items.append(item)
        return items

    def _betas_command(self, kind: str) -> str:
        folders = supplies.subjects_pattern(self.subjects)
        return supplies.bucket("nsddata_betas/ppdata", f"{folders}/fsaverage/{kind}/*.mgh")

    def _mgh(self, item: Item, relative: str, hemisphere: str, frames: int, what: str) -> None:
        vertices = self.vertices[hemisphere]

        def right(shape: tuple[int, int]) -> None:
            if not frames:  # a miniature's
                _expect(shape[0], self.vertices[hemisphere] or shape[0], "vertices")
            else:
                _expect(shape, (self.vertices[hemisphere] or shape[0], frames), "vertices x trials")
            self.vertices[hemisphere] = shape[0]

        size = formats.mgh_bytes(vertices, frames) if vertices and frames else 0
        self._file(item, relative, what, formats.mgh_shape, size, right)

    def _masks(self) -> Item:
        """The Algonauts masks, or the labels that they can be made of."""
        total = sum(self.release.n_voxels(s) for s in self.subjects if s in self.release.voxels)
        labels = [label for hemisphere in paths.HEMISPHERES for label in paths.general_labels(hemisphere)]
        masks = [paths.mask(s, h) for s in self.subjects for h in paths.HEMISPHERES]
        by_labels = not any((self.root / mask).is_file() for mask in masks) and all(
            (self.root / label).is_file() for label in labels
        )
        title = f"masks: {total:,} vertices of {len(self.subjects)} subjects" if total else "masks of the vertices"
        if by_labels:
            item = self._item("betas", f"{title} (to be made of nsdgeneral and RSC)", "nsd")
            for label in labels:
                self._file(item, label, "a label of the visual cortex", formats.read_label)
            return item
        item = self._item(
            "betas",
            title,
            "algonauts",
            f"unpack the subjects' folders into {paths.ALGONAUTS} (roi_masks is enough); or, without that form,",
            supplies.bucket(paths.LABELS, "?h.nsdgeneral.mgz"),
            "and put {lh,rh}.nsdgeneralRSC.mgz from https://github.com/gifale95/algonauts_2023 "
            f"(code/01_challenge_data_preparation) into {paths.LABELS}",
        )
        for subject in self.subjects:
            for side, hemisphere in enumerate(paths.HEMISPHERES):
                self._mask(item, subject, side, hemisphere)
        return item

    def _mask(self, item: Item, subject: int, side: int, hemisphere: str) -> None:
        relative = paths.mask(subject, hemisphere)

        def reader(path: Path) -> np.ndarray:
            vertices = self.vertices[hemisphere] or int(np.prod(formats.npy_header(path)[0]))
            used = formats.read_mask(path, vertices)
            self.vertices[hemisphere] = vertices
            return used

        def right(used: np.ndarray) -> None:
            if subject in self.release.voxels:
                _expect(len(used), self.release.voxels[subject][side], "vertices in use")

        used = self._file(item, relative, "the mask of the vertices to use", reader, check=right)
        if used is not None:
            self.used[subject, hemisphere] = len(used)

    def ncsnr(self) -> Item:
        """Return the noise ceilings."""
        item = self._item("ncsnr", "noise ceilings", "nsd", self._betas_command("betas_fithrf_GLMdenoise_RR"))
        for subject in self.subjects:
            for hemisphere in paths.HEMISPHERES:
                self._mgh(item, paths.ncsnr(subject, hemisphere), hemisphere, 1, "the ncsnr of each vertex")
        return item

    # --- Algonauts ----------------------------------------------------------------------------------------------------

    def algonauts(self) -> list[Item]:
        """Return the masks, and images and averages of each subject, of the Algonauts 2023 release."""
        items = [self._masks()]
        for subject in self.subjects:
            unpack = f"unpack the subjects' folders into {paths.ALGONAUTS}"
            images = self._item("images", f"subject {subject}: Algonauts images", "algonauts", unpack)
            counts = {split: self._named_images(images, subject, split) for split in SPLITS}
            betas = self._item("betas", f"subject {subject}: Algonauts averages", "algonauts", unpack)
            for hemisphere in paths.HEMISPHERES:
                used = self.used.get((subject, hemisphere), 0)

                def right(
                    header: tuple[tuple[int, ...], np.dtype[Any]], rows: int = counts["training"], used: int = used
                ) -> None:
                    shape, dtype = header
                    _expect(dtype, np.dtype(np.float32), "")
                    if rows and used:
                        _expect(shape, (rows, used), "images x vertices")

                size = 4 * self.release.algonauts_training.get(subject, 0) * used
                size += 128 if size else 0
                relative = paths.algonauts_betas(subject, hemisphere)
                self._file(betas, relative, "the averaged betas", formats.npy_header, size, right)
            items += [images, betas]
        return items

    def _named_images(self, item: Item, subject: int, split: str) -> int:
        """Note the images of a folder by their names; return how many there are."""
        release = self.release
        relative = paths.algonauts_images(subject, split)
        expected = (release.algonauts_training if split == "training" else release.algonauts_test).get(subject)
        sizes = _sizes(self.root / relative, ".png")
        item.present += len(sizes)
        item.bytes_present += sum(sizes.values())
        item.files += expected if expected is not None else len(sizes)
        if expected is not None and not sizes:
            item.problems.append(Problem(relative, "missing", f"{expected} images"))
        elif expected is not None and len(sizes) != expected:
            item.problems.append(Problem(relative, f"{len(sizes)} images", f"{expected}"))
        item.problems += [Problem(f"{relative}/{n}", "is empty", "a PNG file") for n, size in sizes.items() if not size]
        return len(sizes)

    # --- images without fMRI ------------------------------------------------------------------------------------------

    def external(self) -> Item:
        """Return the photographs without fMRI."""
        expected, root = self.release.external, self.root
        what = "external images" if self.miniature else "photographs of COCO unlabeled2017"
        item = self._item("external", f"{expected:,} {what}", "coco", supplies.photographs())
        sizes = _sizes(root / paths.EXTERNAL, ".jpg")
        item.files, item.present = expected, len(sizes)
        item.bytes_present = sum(sizes.values())
        item.bytes_expected = item.bytes_present if self.miniature else _COCO_BYTES
        if len(sizes) != expected:
            found = f"{len(sizes):,} photographs" if sizes else "missing"
            archive = root / "coco" / "unlabeled2017.zip"
            if not sizes and archive.is_file():
                found = f"not unpacked (coco/{archive.name} is there)"
            item.problems.append(Problem(paths.EXTERNAL, found, f"{expected:,} photographs"))
        item.problems += [
            Problem(f"{paths.EXTERNAL}/{name}", "is empty", "a JPEG file") for name, size in sizes.items() if not size
        ]
        if sizes:
            name = next(iter(sizes))
            try:
                with Image.open(root / paths.EXTERNAL / name) as image:
                    image.size  # noqa: B018 (the header is what is read)
            except OSError as error:
                item.problems.append(Problem(f"{paths.EXTERNAL}/{name}", f"damaged ({error})", "a JPEG file"))
        return item

    # --- what single experiments need ---------------------------------------------------------------------------------

    def synthetic(self) -> list[Item]:
        """Return NSD-Synthetic: what was shown, and the recordings."""
        release = self.release
        names = [paths.SYNTHETIC_STIMULI, *(paths.synthetic_colour_stimuli(s) for s in self.subjects)]
        common, coloured = release.synthetic_images
        title = f"NSD-Synthetic: {common + coloured} images" if common else "NSD-Synthetic: images"
        images = self._item(
            "synthetic",
            title,
            "nsd",
            supplies.bucket("nsddata_stimuli/stimuli", "nsdsynthetic/*.hdf5"),
            supplies.bucket("nsddata/experiments", "nsdsynthetic/nsdsynthetic_expdesign.mat"),
        )
        found: dict[str, tuple[int, int, int] | None] = {}
        for name in names:
            count = common if name == paths.SYNTHETIC_STIMULI else coloured

            def right(shape: tuple[int, int, int], count: int = count) -> None:
                if count:
                    _expect(shape, (count, *release.synthetic_sides), "images x height x width")

            size = 3 * count * int(np.prod(release.synthetic_sides)) if count else 0
            found[name] = self._file(
                images,
                name,
                "NSD-Synthetic's images",
                lambda path: formats.brick_shape(path, square=False),
                size,
                right,
            )
        known = [shape[0] for shape in (found[names[0]], found[names[1]]) if shape is not None]
        trials = release.synthetic_trials

        def right_order(order: np.ndarray) -> None:
            _expect(len(order), trials or len(order), "trials")

        limit = common + coloured or (sum(known) if len(known) == 2 else 10**6)
        order = self._file(
            images,
            paths.SYNTHETIC_DESIGN,
            "the order of NSD-Synthetic's images",
            lambda path: formats.read_synthetic_order(path, limit),
            check=right_order,
        )
        command = self._betas_command("nsdsyntheticbetas_fithrf_GLMdenoise_RR")
        betas = self._item("synthetic", "NSD-Synthetic: recordings", "nsd", command)
        for subject in self.subjects:
            for hemisphere in paths.HEMISPHERES:
                frames = trials or (len(order) if order is not None else 0)
                relative = paths.synthetic_betas(subject, hemisphere)
                self._mgh(betas, relative, hemisphere, frames, "NSD-Synthetic's betas")
        return [images, betas]

    def atlases(self) -> list[Item]:
        """Return the Schaefer parcellations."""
        items = []
        for short, name in paths.ATLASES.items():
            files = [paths.annotation(hemisphere, name) for hemisphere in paths.HEMISPHERES]
            item = self._item("atlases", short, "schaefer", supplies.atlas(name))
            for hemisphere, file in zip(paths.HEMISPHERES, files, strict=True):

                def right(read: tuple[np.ndarray, int], hemisphere: str = hemisphere) -> None:
                    _expect(len(read[0]), self.vertices[hemisphere] or len(read[0]), "vertices")

                self._file(item, file, "the parcel of each vertex", formats.read_annotation, check=right)
            items.append(item)
        return items

    def surfaces(self) -> list[Item]:
        """Return fsaverage's surfaces."""
        items = []
        for name in paths.SURFACE_NAMES:
            command = supplies.bucket(paths.SURFACES, *(f"?h.{surface}" for surface in paths.SURFACE_NAMES))
            item = self._item("surfaces", f"fsaverage {name}", "fsaverage", command)
            for hemisphere in paths.HEMISPHERES:
                file = paths.surface(hemisphere, name)
                there = [n for n in (file, f"{file}.gii", f"{file}.surf.gii") if (self.root / n).is_file()]

                def right(points: np.ndarray, hemisphere: str = hemisphere) -> None:
                    _expect(len(points), self.vertices[hemisphere] or len(points), "vertices")

                self._file(item, (there or [file])[0], "the place of each vertex", formats.read_surface, check=right)
            items.append(item)
        return items


def _expect(found: Any, expected: Any, what: str) -> None:
    if found != expected:
        raise Wrong(f"{_words(found)} {what}".strip(), _words(expected))


def _words(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _sizes(folder: Path, suffix: str) -> dict[str, int]:
    """Return the sizes of a folder's files with an ending, by name, ascending."""
    try:
        with os.scandir(folder) as entries:
            own = {entry.name: entry.stat().st_size for entry in entries if entry.name.endswith(suffix)}
    except OSError:
        return {}
    return dict(sorted(own.items()))
