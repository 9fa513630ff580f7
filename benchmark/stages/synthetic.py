"""Stages ``synthetic`` and ``reconstruct-synthetic``: NSD-Synthetic, images that no photograph is like (Fig. S14).

Nothing trains on them, and they are not scored: the protocols compare photographs, and two-way identification among
gratings and noise says little of what Brain-IT is for. They are looked at: ``grid_subjXX.png`` shows every image as it
was seen, and below it what was made of the brain's response. One number goes with them, PixCorr beside that of the
same reconstructions dealt out to other images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.context import StageContext
from benchmark.data.nsd import NSD
from benchmark.data.prepared import PreparedData
from benchmark.data.synthetic import Synthetic
from benchmark.errors import UserError
from benchmark.stages import KINDS
from benchmark.stages.prepare import Prepared, source_of
from benchmark.stages.reconstruct import as_shown, read_images, reconstruct, save_images
from benchmark.stages.score import dealt_out
from metrics.pixel import pixcorr

GRID_COLUMNS = 16


def file_name(subject: int, image: int) -> str:
    """Return the file name of a seen image and of its reconstruction: coloured images differ between subjects."""
    return f"subj{subject:02d}_synthetic{image:03d}.png"


def run(ctx: StageContext) -> dict[str, Any]:
    """Read NSD-Synthetic.

    Outputs, for each subject: ``images_subjX.npy`` (284 x S x S x 3 uint8, as seen) and ``betas_subjX.npy`` (284 x V
    float32: z-scored over the session, repeats averaged).
    """
    size, subjects = ctx.config["image_size"], ctx.config["subjects"]
    source = source_of(ctx)
    count = 0
    with ctx.progress.bar("NSD-Synthetic", total=len(subjects)) as bar:
        for subject in subjects:
            images, betas = recordings(source, subject, size)
            np.save(ctx.out / f"images_subj{subject}.npy", images)
            np.save(ctx.out / f"betas_subj{subject}.npy", betas.astype(np.float32))
            count = len(images)
            bar.advance(1, f"subject {subject}")
    return {"subjects": len(subjects), "images": count}


def recordings(source: NSD | PreparedData, subject: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a subject's images of NSD-Synthetic (n x size x size x 3 uint8) and its recordings (n x V).

    Raises:
        UserError: the data lack them.
    """
    if isinstance(source, PreparedData):
        return source.synthetic_images(subject, size), source.synthetic(subject)[0]
    synthetic = Synthetic.open(source, [subject])
    seen = synthetic.load_betas(subject)
    return synthetic.images(subject, seen.image_ids, size), seen.betas


def check(source: NSD | PreparedData, subjects: Sequence[int], size: int) -> None:
    """Refuse data without NSD-Synthetic, from headers and sizes.

    Raises:
        UserError: something is missing; says what to put where.
    """
    try:
        if isinstance(source, NSD):
            Synthetic.open(source, subjects)
            return
        for subject in subjects:
            recordings(source, subject, size)
    except UserError as error:
        remedy = f"python -m benchmark.data check {source.root} --parts synthetic says what to put where"
        if isinstance(source, PreparedData):
            remedy = f"prepare it: python -m benchmark.data prepare TREE --out {source.root} --parts synthetic"
        raise UserError(f"generation.test_set nsd-synthetic: {str(error).splitlines()[0]}\n{remedy}") from error


class SyntheticData(Prepared):
    """The prepared data with NSD-Synthetic in the place of NSD's recordings; images count from 0.

    Args:
        prepared: folder of stage ``prepare``.
        synthetic: folder of stage ``synthetic``.
        subjects: whose recordings are there.
    """

    def __init__(self, prepared: Path, synthetic: Path, subjects: Sequence[int]) -> None:
        super().__init__(prepared)
        self.seen_images = {s: np.load(synthetic / f"images_subj{s}.npy", mmap_mode="r") for s in subjects}
        empty = [np.empty((0, count), np.float32) for count in self.n_voxels]
        self.betas = [
            np.load(synthetic / f"betas_subj{s}.npy", mmap_mode="r") if s in subjects else none
            for s, none in zip(self.subjects, empty, strict=True)
        ]
        self.seen_ids = [np.arange(len(betas)) for betas in self.betas]


def run_reconstruct(ctx: StageContext) -> dict[str, Any]:
    """Reconstruct NSD-Synthetic.

    Outputs: folders ``seen``, ``lowlevel``, ``semantic`` and ``combined`` as of stage ``reconstruct`` (one PNG an image
    and subject: ``subjXX_syntheticYYY.png``, images from 0), ``index.npy``, and ``grid_subjXX.png``.
    """
    subjects = ctx.config["generation"]["subjects"]
    data = SyntheticData(ctx.inputs["data"], ctx.inputs["synthetic"], subjects)
    limit = ctx.config["generation"]["test_images"]
    count = len(data.seen_images[subjects[0]])
    ids = np.arange(count if limit is None else min(limit, count))
    index = np.array([(subject, image) for subject in subjects for image in ids], np.int64)
    np.save(ctx.out / "index.npy", index)
    names = [file_name(subject, image) for subject, image in index.tolist()]
    reconstruct(ctx, data, index, names)
    own: list[float] = []
    others: list[float] = []
    for position, subject in enumerate(subjects):
        mine = names[position * len(ids) : (position + 1) * len(ids)]
        seen = as_shown(np.asarray(data.seen_images[subject][ids]), ctx.config["generation"]["saved_size"])
        save_images(ctx.out / "seen", mine, seen)
        made = {kind: read_images(ctx.out / kind, mine) for kind in KINDS}
        _grid(seen, made).save(ctx.out / f"grid_subj{subject:02d}.png")
        wrong = dealt_out(len(ids), ctx.config["seed"], subject)
        own += pixcorr(seen, made["combined"]).tolist()
        others += pixcorr(seen, made["combined"][wrong]).tolist()
    ctx.tracker.image("NSD-Synthetic", ctx.out / f"grid_subj{subjects[0]:02d}.png")
    return {
        "images": len(ids),
        "subjects": len(subjects),
        "PixCorr": float(np.nanmean(own)),
        "PixCorr of another image's": float(np.nanmean(others)),
    }


def _grid(seen: np.ndarray, made: dict[str, np.ndarray]) -> Any:
    from benchmark.evidence.pictures import TITLES, contact_sheet

    return contact_sheet({"seen": seen, **{TITLES[kind]: images for kind, images in made.items()}}, 76, GRID_COLUMNS)
