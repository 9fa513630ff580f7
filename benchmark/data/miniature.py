"""The writer of a miniature NSD: images, experiment, anatomy and betas, each in NSD's own files.

``simulate`` decides where and whether; here is what.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits

from benchmark.data import paths
from benchmark.data.brain import (
    FeatureExtractor,
    Responder,
    Voxels,
    estimate_ncsnr,
    grow_brain,
    make_mesh,
    parcellate,
    session_betas,
    surface_coordinates,
    truth_description,
)
from benchmark.data.companions import path_of, write_algonauts, write_mat, write_mgh, write_surfaces, write_synthetic
from benchmark.data.photographs import Photographs
from benchmark.data.scenes import Scene, render_scenes
from benchmark.data.settings import SimulationSettings
from benchmark.progress import Progress

_CHUNK = 32  # images handled at once; fixed, so that results do not depend on the number of workers
_CALIBRATION = 256  # images on which the scale of network features is set
_MASKED = 0.67  # share of the surface that is visual cortex
_PARCELS = {"schaefer-400": 84, "schaefer-1000": 198}  # inside the mask: as many as NSD's has (Brain-IT, App. A.2)
_README = """This is a miniature of the Natural Scenes Dataset's files. Nothing in it was measured.

The images are {images}; the fMRI is simulated. settings.json says with which settings, truth.json what the
simulated brain is, truth.safetensors holds each subject's receptive fields, tuning, noise and noiseless signal,
{labels} says what each image shows.
"""


# --- the experiment ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Design:
    """Who sees what, when. All values count from 0."""

    order: np.ndarray  # column of ``seen`` shown in each trial; the same for all subjects
    seen: np.ndarray  # subjects x images per subject: NSD ids, shared ones first
    shared: np.ndarray  # NSD ids, ascending


def make_design(settings: SimulationSettings) -> Design:
    """Deal the images to the subjects and order the trials: every image ``repeats`` times, never twice in a row."""
    rng = np.random.default_rng([settings.seed, 1])
    ids = rng.permutation(settings.n_images)
    shared, own = ids[: settings.shared], ids[settings.shared :].reshape(settings.subjects, settings.unique)
    seen = np.concatenate([np.tile(shared, (settings.subjects, 1)), own], axis=1)
    order = rng.permutation(np.repeat(np.arange(settings.images_per_subject), settings.repeats))
    while len(twins := np.flatnonzero(order[1:] == order[:-1])):
        for k in twins:
            other = rng.integers(len(order))
            order[[k, other]] = order[[other, k]]
    return Design(order, seen, np.sort(shared))


@contextmanager
def _one_thread_each() -> Iterator[Callable[[], None]]:
    """Keep numeric libraries to one thread a worker: sums have one order, and workers do not stall each other."""
    before = torch.get_num_threads()
    with threadpool_limits(1):
        torch.set_num_threads(1)
        try:
            yield lambda: torch.set_num_threads(1)
        finally:
            torch.set_num_threads(before)


class Miniature:
    """One miniature NSD, to be written under ``root`` with ``workers`` threads; ``complete`` adds its companions."""

    def __init__(
        self,
        root: Path,
        settings: SimulationSettings,
        photographs: Photographs | None,
        progress: Progress,
        workers: int,
        complete: bool = False,
    ) -> None:
        self.root, self.settings, self.photographs = root, settings, photographs
        self.progress, self.workers, self.complete = progress, workers, complete
        self.design = make_design(settings)
        rng = np.random.default_rng([settings.seed, 2])
        totals = np.rint(settings.voxels * rng.uniform(0.9, 1.1, settings.subjects)).astype(int)
        left = np.rint(totals * rng.uniform(0.47, 0.50, settings.subjects)).astype(int)
        self.counts = [(int(n), int(total - n)) for n, total in zip(left, totals, strict=True)]
        self.mesh = make_mesh(max(60, round(max(map(max, self.counts)) / _MASKED)))
        self.scenes: list[Scene] = []

    def write(self) -> None:
        """Write everything but ``simulation/settings.json``."""
        with _one_thread_each() as limit, ThreadPoolExecutor(self.workers, initializer=limit) as pool:
            self.pool = pool
            try:
                self._images()
                self._external()
                self._experiment()
                self._anatomy()
                self._brains()
                self._about()
                if self.complete:
                    self._companions()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _path(self, relative: str) -> Path:
        return path_of(self.root, relative)

    def _make(self, start: int, stop: int) -> tuple[np.ndarray, list[Scene]]:
        """Return images ``start .. stop-1``; those after NSD's are the external ones."""
        if self.photographs:
            return self.photographs.read(start, stop), []
        return render_scenes(stop - start, self.settings.seed, self.settings.size, start)

    def _chunks(self, start: int, stop: int) -> list[tuple[int, int]]:
        return [(k, min(k + _CHUNK, stop)) for k in range(start, stop, _CHUNK)]

    def _images(self) -> None:
        n, size = self.settings.n_images, self.settings.size
        with h5py.File(self._path(paths.STIMULI), "w") as file, self.progress.bar("images", total=n) as bar:
            brick = file.create_dataset("imgBrick", (n, size, size, 3), np.uint8)
            chunks = self._chunks(0, n)
            for (start, stop), (images, scenes) in zip(
                chunks, self.pool.map(lambda c: self._make(*c), chunks), strict=True
            ):
                brick[start:stop] = images
                self.scenes += scenes
                bar.advance(stop - start)

    def _external(self) -> None:
        first, count = self.settings.n_images, self.settings.external
        folder = self._path(f"{paths.EXTERNAL}/-").parent

        def save(chunk: tuple[int, int]) -> list[Scene]:
            images, scenes = self._make(*chunk)
            for k, image in enumerate(images, chunk[0] - first + 1):
                Image.fromarray(image).save(folder / f"{k:012d}.jpg", quality=95, subsampling=0)
            return scenes

        with self.progress.bar("external images", total=count) as bar:
            chunks = self._chunks(first, first + count)
            for (start, stop), scenes in zip(chunks, self.pool.map(save, chunks), strict=True):
                self.scenes += scenes
                bar.advance(stop - start)

    def _experiment(self) -> None:
        settings, design = self.settings, self.design
        columns = {"masterordering": design.order[None], "subjectim": design.seen, "sharedix": design.shared[None]}
        write_mat(self._path(paths.DESIGN), columns)

        trial = np.zeros((settings.n_images, 8, 3), int)  # from 1; 0 = not seen
        for subject, seen in enumerate(design.seen):
            for column, image in enumerate(seen):
                when = np.flatnonzero(design.order == column) + 1
                trial[image, subject, : len(when)] = when
        numbers = range(1, 9)
        head = ["", "cocoId", "cocoSplit", "cropBox", "loss", "nsdId", "flagged", "BOLD5000", "shared1000"]
        head += [f"subject{s}" for s in numbers] + [f"subject{s}_rep{r}" for s in numbers for r in range(3)]
        shared = set(design.shared.tolist())
        with self._path(paths.STIM_INFO).open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(head)
            for k, when in enumerate(trial):
                fixed = [
                    k,
                    0,
                    "simulated",
                    "(0, 0, 0, 0)",
                    0.0,
                    k,
                    False,
                    False,
                    k in shared,
                ]  # no COCO image is behind it
                table.writerow([*fixed, *(when > 0).any(1).astype(int).tolist(), *when.ravel().tolist()])

    def _anatomy(self) -> None:
        for h, hemisphere in enumerate(paths.HEMISPHERES):
            points = surface_coordinates(self.mesh, h)
            faces = self.mesh.faces if h == 1 else self.mesh.faces[:, ::-1]  # mirrored: the outside stays outside
            nib.freesurfer.write_geometry(
                self._path(paths.surface(hemisphere)), points, faces, create_stamp="created by a simulation"
            )
            for short, atlas in paths.ATLASES.items():
                labels = parcellate(self.mesh, max(2, min(round(_PARCELS[short] / 2 / _MASKED), len(points) // 3)))
                count = int(labels.max()) + 1
                names = ["Unknown"] + [f"7Networks_{hemisphere[0].upper()}H_Mini_{k}" for k in range(1, count)]
                colours = np.zeros((count, 4), np.int32)
                colours[1:, :3] = np.random.default_rng(count).permutation(
                    np.mgrid[20:250:23, 20:250:23, 20:250:23].reshape(3, -1).T
                )[: count - 1]
                annotation = self._path(paths.annotation(hemisphere, atlas))
                nib.freesurfer.write_annot(annotation, labels, colours, names, fill_ctab=True)

    # --- fMRI ---------------------------------------------------------------------------------------------------------

    def _brains(self) -> None:
        settings, design = self.settings, self.design
        scenes = self.scenes[: settings.n_images]
        brains = [
            grow_brain(self.mesh, counts, settings.seed, s + 1, bool(scenes)) for s, counts in enumerate(self.counts)
        ]
        responders = [Responder(voxels) for voxels in brains]
        shared, own = design.seen[0, : settings.shared], design.seen[:, settings.shared :]
        everyone = list(range(settings.subjects))
        # (images, subjects who see them): the shared ones first, as in the columns of the design
        jobs = [(shared[a:b], everyone) for a, b in self._chunks(0, len(shared))]
        jobs += [(own[s, a:b], [s]) for s in everyone for a, b in self._chunks(0, settings.unique)]
        answers: list[list[np.ndarray]] = [[] for _ in everyone]
        with h5py.File(self.root / paths.STIMULI, "r") as file:
            images = file["imgBrick"][:]
        extractor = FeatureExtractor(images[:_CALIBRATION], settings.seed)
        self.brains, self.extractor = brains, extractor

        def answer(job: tuple[np.ndarray, Sequence[int]]) -> list[np.ndarray]:
            ids, viewers = job
            features = extractor(images[ids], [scenes[i] for i in ids] if scenes else None)
            return [responders[s].components(features) for s in viewers]

        with self.progress.bar("brain: answers to images", total=sum(len(ids) for ids, _ in jobs)) as bar:
            for (ids, viewers), components in zip(jobs, self.pool.map(answer, jobs), strict=True):
                for s, part in zip(viewers, components, strict=True):
                    answers[s].append(part)
                bar.advance(len(ids))
        truth: dict[str, np.ndarray] = {}
        with self.progress.bar("brain: scan sessions", total=settings.subjects) as bar:
            signals = [
                responder.signal(np.concatenate(parts, axis=1))
                for responder, parts in zip(responders, answers, strict=True)
            ]
            for _ in self.pool.map(lambda s: self._scan(s + 1, brains[s], signals[s]), everyone):
                bar.advance(1)
        for s, (voxels, signal) in enumerate(zip(brains, signals, strict=True)):
            order = np.argsort(design.seen[s])
            truth |= {f"subj{s + 1:02d}.{name}": array for name, array in voxels.tensors().items()}
            truth[f"subj{s + 1:02d}.signal"] = np.ascontiguousarray(signal[order])
            truth[f"subj{s + 1:02d}.signal_ids"] = np.ascontiguousarray(design.seen[s][order])
        save_file(truth, self._path("simulation/truth.safetensors"))

    def _scan(self, subject: int, voxels: Voxels, signal: np.ndarray) -> None:
        """Write one subject's masks, sessions and ncsnr."""
        settings, n = self.settings, len(self.mesh.sphere)
        columns = [np.flatnonzero(voxels.hemisphere == h) for h in (0, 1)]
        outside = []
        rng = np.random.default_rng([settings.seed, 15, subject])
        for hemisphere, own in zip(paths.HEMISPHERES, columns, strict=True):
            mask = np.zeros(n, np.float32)
            mask[voxels.vertex[own]] = 1
            np.save(self._path(paths.mask(subject, hemisphere)), mask, allow_pickle=False)
            outside.append(np.flatnonzero(mask == 0))
        scored: list[list[np.ndarray]] = [[], []]
        per_session = settings.n_trials // settings.n_sessions
        for session in range(1, settings.n_sessions + 1):
            shown = self.design.order[(session - 1) * per_session : session * per_session]
            betas = session_betas(voxels, signal[shown], settings.seed, subject, session)
            for h, hemisphere in enumerate(paths.HEMISPHERES):
                full = rng.standard_normal((per_session, n), dtype=np.float32)  # outside visual cortex: noise
                full[:, voxels.vertex[columns[h]]] = betas[:, columns[h]]
                if subject in (6, 8):
                    full[:, outside[h][:3]] = np.nan  # as in NSD, where these subjects lack some vertices
                write_mgh(self._path(paths.betas(subject, hemisphere, session)), full)
                sd = full.std(0)
                scored[h].append((full - full.mean(0)) / np.where(sd > 0, sd, 1))
        for h, hemisphere in enumerate(paths.HEMISPHERES):
            ncsnr = estimate_ncsnr(np.concatenate(scored[h]), self.design.order)
            write_mgh(self._path(paths.ncsnr(subject, hemisphere)), ncsnr[None])

    def _about(self) -> None:
        """Write what the images show, what the brain is, and that all of it is simulated."""
        n = self.settings.n_images
        where = [("nsd", k) for k in range(n)] + [("external", k) for k in range(self.settings.external)]
        if self.photographs:
            labels = "photographs.parquet"
            rows = [
                {"set": s, "index": k, "file": name} for (s, k), name in zip(where, self.photographs.names, strict=True)
            ]
        else:
            labels = "scenes.parquet"
            rows = [{"set": s, "index": k, **asdict(scene)} for (s, k), scene in zip(where, self.scenes, strict=True)]
        pq.write_table(pa.Table.from_pylist(rows), self._path(f"simulation/{labels}"))
        self._path("simulation/truth.json").write_text(json.dumps(truth_description(), indent=1) + "\n")
        images = "photographs of a folder" if self.photographs else "generated scenes"
        self._path("simulation/README.txt").write_text(_README.format(images=images, labels=labels))

    def _companions(self) -> None:
        """Write what lies beside NSD: made last, of what is there, so that it changes nothing of it."""
        write_surfaces(self.root, self.mesh)
        write_synthetic(
            self.root,
            self.settings.seed,
            self.settings.size,
            self.brains,
            len(self.mesh.sphere),
            self.extractor,
        )
        write_algonauts(self.root, self.progress)
