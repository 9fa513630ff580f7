"""NSD-Synthetic: one more session of each of NSD's subjects, with 284 images that no photograph is like (Gifford 2025).

Brain-IT reconstructs them to show what it does outside its training distribution (App. C, Fig. S14); nothing trains on
them. The first 220 images are the same for all subjects, the last 64 (coloured noise) were made for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmark.data import formats, paths
from benchmark.data.images import centre_crop, prepare_images
from benchmark.data.nsd import NSD, SubjectBetas
from benchmark.errors import UserError


class Synthetic:
    """NSD-Synthetic beside an opened NSD, whose vertices it uses. Build it with ``Synthetic.open``.

    Attributes:
        nsd: the tree.
        subjects: those of the tree whose recordings are present, ascending, from 1.
        n_images: images of each subject, numbered from 0: 284.
        sides: height and width of the stored images.
        order: the image shown in each trial, the same for all subjects.
    """

    def __init__(self, nsd: NSD) -> None:
        self.nsd = nsd
        self.subjects: tuple[int, ...] = ()
        self.n_images = 0
        self.sides = (0, 0)
        self.order: np.ndarray = np.empty(0, np.int64)
        self._common = 0

    @classmethod
    def open(cls, nsd: NSD, subjects: Sequence[int] | None = None) -> Synthetic:
        """Check NSD-Synthetic's files, from headers and sizes.

        Args:
            nsd: the opened tree.
            subjects: these only; default: those of the tree whose recordings are present.

        Raises:
            UserError: something is missing or of the wrong shape; names the file and the expectation.
        """
        own = cls(nsd)
        release = nsd.release
        own._common, *sides = nsd._read(
            paths.SYNTHETIC_STIMULI, "NSD-Synthetic's images (HDF5 with imgBrick)", _any_brick
        )
        own.sides = (sides[0], sides[1])
        if nsd.published and (own._common, tuple(sides)) != (release.synthetic_images[0], release.synthetic_sides):
            height, width = release.synthetic_sides
            raise nsd._wrong(
                paths.SYNTHETIC_STIMULI,
                f"{own._common} images of {sides[0]} x {sides[1]}",
                f"{release.synthetic_images[0]} of {height} x {width}",
            )
        present = [s for s in nsd.subjects if (nsd.root / paths.synthetic_betas(s, "lh")).is_file()]
        own.subjects = tuple(sorted(set(subjects))) if subjects else tuple(present)
        if not own.subjects:
            raise UserError(
                f"{nsd.root}: no recordings of NSD-Synthetic; expected {paths.synthetic_betas(nsd.subjects[0], 'lh')}"
            )
        for subject in own.subjects:
            nsd._require(subject)
            relative = paths.synthetic_colour_stimuli(subject)
            count, *colour_sides = nsd._read(relative, "NSD-Synthetic's coloured images", _any_brick)
            expected = release.synthetic_images[1] if nsd.published else count
            if colour_sides != sides or count != expected:
                raise nsd._wrong(
                    relative,
                    f"{count} images of {colour_sides[0]} x {colour_sides[1]}",
                    f"{expected} of {sides[0]} x {sides[1]}",
                )
            own.n_images = own.n_images or own._common + count
            if own._common + count != own.n_images:
                raise nsd._wrong(relative, f"{count} images", f"{own.n_images - own._common}, as other subjects have")
        own.order = nsd._read(
            paths.SYNTHETIC_DESIGN,
            "the order of NSD-Synthetic's images",
            lambda path: formats.read_synthetic_order(path, own.n_images),
        )
        if nsd.published and len(own.order) != release.synthetic_trials:
            raise nsd._wrong(paths.SYNTHETIC_DESIGN, f"{len(own.order)} trials", f"{release.synthetic_trials}")
        for subject in own.subjects:
            for hemisphere in paths.HEMISPHERES:
                relative = paths.synthetic_betas(subject, hemisphere)
                vertices, trials = nsd._read(relative, "NSD-Synthetic's betas", formats.mgh_shape)
                if (vertices, trials) != (nsd._n_vertices[subject, hemisphere], len(own.order)):
                    raise nsd._wrong(
                        relative,
                        f"{vertices} vertices x {trials} trials",
                        f"{nsd._n_vertices[subject, hemisphere]} x {len(own.order)}",
                    )
        return own

    def load_betas(self, subject: int) -> SubjectBetas:
        """Read a subject's answers, z-scored over the session's trials and averaged over repeats, image after image.

        ``image_ids`` number NSD-Synthetic's images from 0. A vertex that this session did not scan is 0.
        """
        files = [paths.synthetic_betas(subject, hemisphere) for hemisphere in paths.HEMISPHERES]
        trials = self.nsd.scored(subject, files, "NSD-Synthetic's betas")
        ids, rows, repeats = np.unique(self.order, return_inverse=True, return_counts=True)
        out = np.zeros((len(ids), trials.shape[1]), np.float32)
        for row, trial in zip(rows, trials, strict=True):
            out[row] += trial
        return SubjectBetas(ids, out / repeats[:, None].astype(np.float32), repeats)

    def images(self, subject: int, ids: Sequence[int] | np.ndarray, size: int, as_seen: bool = True) -> np.ndarray:
        """Read images by their numbers from 0: the central square, resized; ``n x size x size x 3`` uint8.

        Args:
            subject: whose coloured images to read.
            ids: numbers from 0.
            size: side of the result in pixels.
            as_seen: the square root of the stored values (0..1), as public code of this data set's authors shows them:
                they are luminances, while NSD's own images are shown through a gamma of 2. False: as stored.
        """
        out = np.empty((len(ids), size, size, 3), np.uint8)
        for row, number in enumerate(np.asarray(ids, np.int64).tolist()):
            if not 0 <= number < self.n_images:
                raise ValueError(f"NSD-Synthetic's image {number}; expected 0..{self.n_images - 1}")
            common = number < self._common
            relative = paths.SYNTHETIC_STIMULI if common else paths.synthetic_colour_stimuli(subject)
            place = np.array([number if common else number - self._common])
            image = centre_crop(formats.read_brick(self.nsd.root / relative, place)[0])
            if as_seen:
                image = np.rint(np.sqrt(image / 255.0) * 255).astype(np.uint8)
            out[row] = prepare_images(image[None], size)[0]
        return out


def _any_brick(path: Path) -> tuple[int, int, int]:
    return formats.brick_shape(path, square=False)
