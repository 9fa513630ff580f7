"""What a miniature NSD has beside it when it is made ``--complete``: data that the paper uses and the demo does not.

NSD-Synthetic, a release of averaged betas as Algonauts 2023 made it, and fsaverage's other surfaces, each in the files
of the true one. All of it is made of the finished miniature, whose own files stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
from PIL import Image
from scipy.io import savemat

from benchmark.data import paths
from benchmark.data.brain import FeatureExtractor, Mesh, Responder, Voxels, session_betas, surface_coordinates
from benchmark.data.images import centre_crop
from benchmark.data.nsd import NSD
from benchmark.data.release import NSD_RELEASE
from benchmark.progress import Progress

COMMON, COLOURED = 12, 4
"""Images of NSD-Synthetic that are the same for all subjects (NSD: 220), and those that are not (NSD: 64)."""
SYNTHETIC_REPEATS = 2
_SESSION = 99  # number of NSD-Synthetic's session, to draw its noise by


def path_of(root: Path, relative: str) -> Path:
    """Return where a file goes; its folder is made."""
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_mgh(path: Path, values: np.ndarray) -> None:
    """Write ``frames x vertices`` as FreeSurfer does: float32 (vertices, 1, 1, frames)."""
    data = values.T.astype(np.float32)[:, None, None, :]
    nib.save(nib.MGHImage(data if len(values) > 1 else data[..., 0], np.eye(4)), path)


def write_mat(path: Path, matrices: dict[str, np.ndarray]) -> None:
    """Write matrices that count from 0 as MATLAB has them, from 1, in a file that does not hold the time of day."""
    savemat(
        path,
        {
            name: (array + 1).astype(np.uint16 if array.max() < 2**16 - 1 else np.int32)
            for name, array in matrices.items()
        },
    )
    with path.open("r+b") as file:  # the header's free text holds the time of day
        file.write(b"MATLAB 5.0 MAT-file, miniature NSD".ljust(116))


def write_surfaces(root: Path, mesh: Mesh) -> None:
    """Write fsaverage's surfaces that a miniature lacks: white, inflated, sphere."""
    for h, hemisphere in enumerate(paths.HEMISPHERES):
        pial = surface_coordinates(mesh, h)
        centre = (pial.max(0) + pial.min(0)) / 2
        shapes = {
            "white": centre + 0.94 * (pial - centre),
            "inflated": mesh.sphere * np.array([40.0, 90.0, 60.0]) * [-1.0 if h == 0 else 1.0, 1, 1],
            "sphere": mesh.sphere * 100.0 * [-1.0 if h == 0 else 1.0, 1, 1],
        }
        faces = mesh.faces if h == 1 else mesh.faces[:, ::-1]
        for name, points in shapes.items():
            path = path_of(root, paths.surface(hemisphere, name))
            nib.freesurfer.write_geometry(path, points, faces, create_stamp="created by a simulation")


def _patterns(rng: np.random.Generator, count: int, height: int, width: int, coloured: bool) -> np.ndarray:
    """Draw gratings and noise: ``count x height x width x 3`` in [0, 1]."""
    y, x = np.mgrid[:height, :width] / height
    out = np.empty((count, height, width, 3))
    for k in range(count):
        angle, cycles = rng.uniform(0, np.pi), rng.uniform(2, 9)
        grey = 0.5 + 0.5 * np.sin(2 * np.pi * cycles * (x * np.cos(angle) + y * np.sin(angle)))
        if k % 3 == 2:
            grey = rng.uniform(0, 1, (height, width))
        tint = rng.uniform(0.2, 1, 3) if coloured else np.ones(3)
        out[k] = grey[:, :, None] * tint
    return out


def write_synthetic(
    root: Path, seed: int, side: int, voxels: Sequence[Voxels], n_vertices: int, extractor: FeatureExtractor
) -> None:
    """Write NSD-Synthetic: wide images whose values are luminances, one session of every subject, its design."""
    rng = np.random.default_rng([seed, 30])
    height, width = side, round(1.9 * side)

    def write_brick(relative: str, count: int, coloured: bool) -> np.ndarray:
        """Return the images as they are seen, cropped."""
        seen = _patterns(rng, count, height, width, coloured)
        with h5py.File(path_of(root, relative), "w") as file:
            file["imgBrick"] = np.rint(seen**2 * 255).astype(np.uint8)
        return np.stack([centre_crop(np.rint(image * 255).astype(np.uint8)) for image in seen])

    common = write_brick(paths.SYNTHETIC_STIMULI, COMMON, False)
    count = COMMON + COLOURED
    order = rng.permutation(np.repeat(np.arange(count), SYNTHETIC_REPEATS))
    twice = np.sort(rng.choice(len(order), 4, replace=False))  # one-back trials: the same image again
    order = np.insert(order, twice, order[twice])
    write_mat(path_of(root, paths.SYNTHETIC_DESIGN), {"masterordering": order[None]})
    for subject, own in enumerate(voxels, start=1):
        images = np.concatenate([common, write_brick(paths.synthetic_colour_stimuli(subject), COLOURED, True)])
        responder = Responder(own)
        signal = responder.signal(responder.components(extractor(images, None)))
        betas = session_betas(own, signal[order], seed, subject, _SESSION)
        for h, hemisphere in enumerate(paths.HEMISPHERES):
            full = rng.standard_normal((len(order), n_vertices), dtype=np.float32)
            columns = np.flatnonzero(own.hemisphere == h)
            full[:, own.vertex[columns]] = betas[:, columns]
            write_mgh(path_of(root, paths.synthetic_betas(subject, hemisphere)), full)


def write_algonauts(root: Path, progress: Progress) -> None:
    """Write what Algonauts 2023 would have made of this data: averages without the last sessions, and images."""
    nsd = NSD.open(root)
    with progress.bar("Algonauts release", total=len(nsd.subjects)) as bar:
        for subject in nsd.subjects:
            withheld = min(NSD_RELEASE.algonauts_withheld, nsd.sessions[subject] // 2)
            kept = nsd.sessions[subject] - withheld
            averages = nsd.load_betas(subject, sessions=range(1, kept + 1))
            left = len(nsd.vertices(subject, "lh"))
            for hemisphere, part in zip(paths.HEMISPHERES, np.split(averages.betas, [left], axis=1), strict=True):
                path = path_of(root, paths.algonauts_betas(subject, hemisphere))
                np.save(path, np.ascontiguousarray(part), allow_pickle=False)
            test = np.setdiff1d(nsd.trials(subject)[kept:], averages.image_ids)
            for split, short, ids in (("training", "train", averages.image_ids), ("test", "test", test)):
                for k, (number, image) in enumerate(zip(ids, nsd.images(ids), strict=True), start=1):
                    name = f"{paths.algonauts_images(subject, split)}/{short}-{k:04d}_nsd-{number:05d}.png"
                    Image.fromarray(image).save(path_of(root, name))
            bar.advance(1)
