"""Settings of the miniature NSD. Imports nothing heavy, so that ``--help`` and the configuration can read them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from benchmark.errors import UserError

SIMULATION_VERSION = 1  # raised whenever the same settings would give other data


@dataclass(frozen=True)
class SimulationSettings:
    """How much of everything a miniature NSD has. The defaults are the ``demo`` preset's."""

    subjects: int = 8
    seed: int = 0
    size: int = 64
    """Side of the images in pixels."""
    shared: int = 24
    """Images that every subject sees (NSD: 1000)."""
    unique: int = 352
    """Images that one subject alone sees, for each subject (NSD: 9000)."""
    external: int = 1500
    """Images without fMRI (COCO unlabeled2017: 120k)."""
    voxels: int = 1000
    """About so many cortical vertices a subject, both hemispheres together; each subject has 90-110 % of it."""
    sessions: int = 6
    """At most so many scan sessions; fewer where the trials do not divide evenly."""
    repeats: int = 3

    def __post_init__(self) -> None:
        """Refuse what NSD's files cannot hold or what is too little to simulate."""
        bounds = {
            "subjects": (1, 8),
            "seed": (0, 2**31 - 1),
            "size": (16, 1024),
            "shared": (1, 10_000),
            "unique": (1, 100_000),
            "external": (0, 1_000_000),
            "voxels": (40, 100_000),
            "sessions": (1, 99),
            "repeats": (1, 3),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"--{name} {value}: expected a number from {low} to {high}")
        if self.images_per_subject < 3:
            raise UserError(f"--shared {self.shared} --unique {self.unique}: expected at least 3 images a subject")

    @property
    def images_per_subject(self) -> int:
        """Images that each subject sees."""
        return self.shared + self.unique

    @property
    def n_images(self) -> int:
        """Images in ``nsd_stimuli.hdf5``."""
        return self.shared + self.subjects * self.unique

    @property
    def n_trials(self) -> int:
        """Trials of each subject."""
        return self.images_per_subject * self.repeats

    @property
    def n_sessions(self) -> int:
        """Sessions of equal length: the largest number up to ``sessions`` that divides the trials."""
        return max(n for n in range(1, self.sessions + 1) if self.n_trials % n == 0)

    def differences(self, other: dict[str, int]) -> str:
        """Name the settings in which ``other`` (as ``asdict`` gives it) is different: ``voxels 1000, not 800``."""
        mine = asdict(self)
        return ", ".join(f"{k} {other.get(k)}, not {v}" for k, v in mine.items() if other.get(k) != v)
