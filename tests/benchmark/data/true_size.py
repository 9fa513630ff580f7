"""Writes files with the headers and the sizes of NSD's own, and holes in place of their content."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
from nibabel.freesurfer.mghformat import MGHHeader
from PIL import Image
from scipy.io import savemat

from benchmark.data import paths
from benchmark.data.release import NSD_RELEASE, Release


def place(root: Path, relative: str) -> Path:
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def hollow_mgh(path: Path, vertices: int, frames: int) -> None:
    """Write the header of an .mgh file and make the file as long as a whole one."""
    header = MGHHeader()
    header.set_data_shape((vertices, 1, 1, frames))
    header.set_data_dtype(">f4")
    with path.open("wb") as file:
        header.writehdr_to(file)
        file.truncate(284 + 4 * vertices * frames + 20)


def hollow_brick(path: Path, shape: Sequence[int]) -> None:
    """Write an HDF5 file with an imgBrick whose space is reserved and not written."""
    with h5py.File(path, "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple(tuple(shape))
        h5py.h5d.create(file.id, b"imgBrick", h5py.h5t.NATIVE_UINT8, space, properties)


def write_design(root: Path, release: Release, seed: int = 0) -> np.ndarray:
    """Write design and list of images; return the shared ids, ascending."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(release.images)
    shared, rest = ids[: release.shared], ids[release.shared :]
    own = release.images_per_subject - release.shared
    seen = np.stack([np.concatenate([shared, rest[s * own : (s + 1) * own]]) for s in range(len(release.sessions))])
    repeats = release.trials_designed // release.images_per_subject
    order = rng.permutation(np.repeat(np.arange(release.images_per_subject), repeats))
    matrices = {"masterordering": order[None], "subjectim": seen, "sharedix": shared[None]}
    savemat(place(root, paths.DESIGN), {name: (values + 1).astype(np.int32) for name, values in matrices.items()})
    is_shared = np.isin(np.arange(release.images), shared)
    lines = [f"{k},{k},{bool(s)}" for k, s in enumerate(is_shared)]
    place(root, paths.STIM_INFO).write_text("\n".join([",nsdId,shared1000", *lines]) + "\n")
    return np.sort(shared)


def write_masks(root: Path, release: Release, subjects: Sequence[int]) -> None:
    rng = np.random.default_rng(1)
    for subject in subjects:
        for count, hemisphere in zip(release.voxels[subject], paths.HEMISPHERES, strict=True):
            mask = np.zeros(release.vertices, np.int64)
            mask[rng.choice(release.vertices, count, replace=False)] = 1
            np.save(place(root, paths.mask(subject, hemisphere)), mask)


def write_true_size(root: Path, release: Release = NSD_RELEASE) -> None:
    """Write all of NSD that this project reads, and two photographs in place of COCO's."""
    write_design(root, release)
    hollow_brick(place(root, paths.STIMULI), (release.images, release.image_side, release.image_side, 3))
    hollow_brick(place(root, paths.SYNTHETIC_STIMULI), (release.synthetic_images[0], *release.synthetic_sides, 3))
    write_masks(root, release, release.subjects)
    order = np.arange(release.synthetic_trials) % sum(release.synthetic_images) + 1
    savemat(place(root, paths.SYNTHETIC_DESIGN), {"masterordering": order[None].astype(np.float64)})
    for subject in release.subjects:
        colours = place(root, paths.synthetic_colour_stimuli(subject))
        hollow_brick(colours, (release.synthetic_images[1], *release.synthetic_sides, 3))
        for hemisphere in paths.HEMISPHERES:
            for session in range(1, release.sessions[subject] + 1):
                path = place(root, paths.betas(subject, hemisphere, session))
                hollow_mgh(path, release.vertices, release.trials_per_session)
            hollow_mgh(place(root, paths.ncsnr(subject, hemisphere)), release.vertices, 1)
            path = place(root, paths.synthetic_betas(subject, hemisphere))
            hollow_mgh(path, release.vertices, release.synthetic_trials)
    for hemisphere in paths.HEMISPHERES:
        labels = np.arange(release.vertices, dtype=np.int32) % 200 + 1
        colours = np.zeros((201, 4), np.int32)
        colours[:, 0], colours[:, 1] = np.arange(201) % 256, np.arange(201) // 256 + 1
        names = ["Background+FreeSurfer_Defined_Medial_Wall", *(f"7Networks_{k}" for k in range(200))]
        for name in paths.ATLASES.values():
            path = place(root, paths.annotation(hemisphere, name))
            nib.freesurfer.write_annot(path, labels, colours, names, fill_ctab=True)
        for surface in paths.SURFACE_NAMES:
            points = np.zeros((release.vertices, 3))
            path = place(root, paths.surface(hemisphere, surface))
            nib.freesurfer.write_geometry(path, points, np.array([[0, 1, 2]]), create_stamp="hollow")
    for name in ("000000000001.jpg", "000000000002.jpg"):
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(place(root, f"{paths.EXTERNAL}/{name}"))
