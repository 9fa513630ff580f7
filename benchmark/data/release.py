"""The published numbers of the data sets, against which a tree is checked. Imports nothing heavy.

Sources: Allen et al. 2022 and the NSD data manual (sessions, trials, images, vertices); Gifford et al. 2023 and the
``algonauts_2023`` repository (vertices in use, training and test images); Gifford et al. 2025 (NSD-Synthetic); Lin et
al. 2014 (COCO).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction


def _by_subject(*values: int) -> dict[int, int]:
    return dict(enumerate(values, start=1))


@dataclass(frozen=True)
class Release:
    """How much of everything was released; the defaults are NSD's. Subjects count from 1."""

    images: int = 73_000
    image_side: int = 425
    shared: int = 1000
    """Images that every subject was to see."""
    images_per_subject: int = 10_000
    trials_designed: int = 30_000
    trials_per_session: int = 750
    vertices: int = 163_842
    """Of each of fsaverage's hemispheres."""
    sessions: Mapping[int, int] = field(default_factory=lambda: _by_subject(40, 40, 32, 30, 40, 32, 40, 30))
    """Sessions that were released; the design lists 40 for all."""
    voxels: Mapping[int, tuple[int, int]] = field(
        default_factory=lambda: {
            **{subject: (19_004, 20_544) for subject in (1, 2, 3, 4, 5, 7)},
            6: (18_978, 20_220),
            8: (18_981, 20_530),
        }
    )
    """Vertices in use, left and right: nsdgeneral and RSC, without those that lack data in some session."""
    synthetic_trials: int = 744
    synthetic_images: tuple[int, int] = (220, 64)
    """Images that all subjects saw alike, and coloured ones that differ between subjects."""
    synthetic_sides: tuple[int, int] = (714, 1360)
    """Height and width."""
    external: int = 123_403
    """Photographs in COCO's unlabeled2017."""
    algonauts_training: Mapping[int, int] = field(
        default_factory=lambda: _by_subject(9841, 9841, 9082, 8779, 9841, 9082, 9841, 8779)
    )
    algonauts_test: Mapping[int, int] = field(
        default_factory=lambda: _by_subject(159, 159, 293, 395, 159, 293, 159, 395)
    )
    algonauts_withheld: int = 3
    """Sessions at the end whose betas the Algonauts release leaves out."""

    @property
    def subjects(self) -> tuple[int, ...]:
        """All subjects, ascending."""
        return tuple(sorted(self.sessions))

    def n_voxels(self, subject: int) -> int:
        """Return the number of vertices in use of both hemispheres."""
        return sum(self.voxels[subject])

    @property
    def complete_subjects(self) -> tuple[int, ...]:
        """Those who took part in every designed session, and so saw every shared image three times."""
        most = max(self.sessions.values())
        return tuple(subject for subject, sessions in self.sessions.items() if sessions == most)


NSD_RELEASE = Release()

NEEDED = ("betas", "images", "external")
OPTIONAL = ("synthetic", "atlases", "surfaces", "ncsnr")
PARTS = (*NEEDED, *OPTIONAL)
"""Parts of the data: what training and Table 1 need, and what single experiments do."""

SIZES = (256, 224, 112)
"""Sides of the images that the paper's networks see: diffusion, encoder, VGG."""

AMOUNTS: Mapping[str, Fraction] = {
    "1h": Fraction(1),
    "30min": Fraction(1, 2),
    "15min": Fraction(1, 4),
    "15min-450": Fraction(3, 5),
}
"""Parts of the first session that a new subject gives (Brain-IT, App. A.7): of its 750 trials, the first 750, 375, 188.

How the paper took its 15 minutes is not published. A quarter of an hour is three of twelve runs, 188 trials; its text
says 450 samples, which is the variant ``15min-450``.
"""
