"""What the stages of a plan will take: GPU-hours, disk and memory, before anything is submitted.

Hours are the paper's own where it gives them (App. D: low-level BIT 12 h and semantic BIT 8 h on one H100, joint
training 10 h on four), scaled by steps and batch; the rest follows from counted operations at a rate that an H100 keeps
up. Disk follows from shapes. They are estimates: what a stage took stands in its ``status.json`` afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmark.config import BranchConfig, Variant, paper
from benchmark.graph import Decision, Stage
from benchmark.predictors import method_name

NSD_IMAGES, TRAINING_IMAGES, COCO_IMAGES = 73_000, 72_000, 123_403
VOXELS, SUBJECTS, SHARED, SYNTHETIC = 315_997, 8, 1000, 284
_RATE = 1e14  # operations a second that an H100 keeps up in TF32 and half precision, about a quarter of its best
_GB = 1e9

# Operations of one forward pass on one image, two for each multiplication.
_VIT_L, _BIGG, _VGG_112 = 1.6e11, 9.7e11, 8e9
_DIP_NET = 1.2e11  # hourglass of 128 channels at 224 pixels
_UNET_256, _UNET_768, _VAE_256 = 4e11, 3.4e12, 2.5e12
_JUDGES = 3e11
_UNET_PARAMETERS, _BIT_TRUNK = 2.5e9, 3.6e7
_BANDWIDTH = 2e12  # bytes a second
_SLOWER = 100  # eigendecompositions in float64
_TOKENS = {"lowlevel": (7190 * 512, _VGG_112), "semantic": (256 * 1664, 0.0)}  # values of an image, and making them


@dataclass(frozen=True)
class Estimate:
    """What one stage will take.

    Attributes:
        gpu_hours: hours of all its GPUs together.
        disk: bytes of its results.
        scratch: bytes of checkpoints while it runs.
        memory: bytes on each GPU, or of main memory where it uses none.
    """

    gpu_hours: float
    disk: float
    scratch: float
    memory: float

    def __add__(self, other: Estimate) -> Estimate:
        """Both, one after the other."""
        return Estimate(
            self.gpu_hours + other.gpu_hours,
            self.disk + other.disk,
            max(self.scratch, other.scratch),
            max(self.memory, other.memory),
        )


NOTHING = Estimate(0, 0, 0, 0)


def estimate(stage: Stage, variant: Variant) -> Estimate:
    """Return what ``stage`` of ``variant`` will take on NSD and COCO; shapes of the paper's networks are taken."""
    maker = _MAKERS.get(stage.name)
    if stage.name == "targets" and "stored" not in {"latents": "stored", **stage.config["store"]}.values():
        return NOTHING  # only their shapes are noted
    return maker(variant) if maker else NOTHING


def _steps(training: Any) -> int:
    steps: int = training.total_steps * training.accumulate
    return steps


def _external(variant: Variant) -> int:
    limit = variant.data.external_images
    return COCO_IMAGES if limit is None else min(limit, COCO_IMAGES)


def _prepare(variant: Variant) -> Estimate:
    pixels = 3 * variant.data.image_size**2
    betas = 10_000 * VOXELS * 4
    return Estimate(0, (NSD_IMAGES + _external(variant)) * pixels + betas, 0, 8e9)


def _targets(variant: Variant) -> Estimate:
    rows = TRAINING_IMAGES + _external(variant)
    store = variant.targets
    size = 4 * 32 * 32 * 2
    operations = _VAE_256
    if store.semantic == "stored":
        size += 256 * 1664 * 2
        operations += _BIGG
    if store.lowlevel == "stored":
        size += 1_530_368 * 2
        operations += _VGG_112
    return Estimate(rows * operations / _RATE / 3600, rows * size, 0, 12e9)


def _encoder(variant: Variant) -> Estimate:
    config = variant.encoder
    images = _steps(config.training) * config.batch
    passes = 4 if config.adapter_rank else 0  # forward, forward again, and twice as much backward
    readers = config.voxels_per_example * 257 * 256 * 5 * 2 * 3
    table = VOXELS * config.embed_dim * 4
    return Estimate(images * (passes * _VIT_L + readers) / _RATE / 3600, table + 4e7, 5 * table, 40e9)


def _predicted(variant: Variant) -> Estimate:
    if variant.targets.external == "live":
        return NOTHING
    images = _external(variant)
    operations = _VIT_L + VOXELS * 257 * 256 * 5 * 2
    return Estimate(images * operations / _RATE / 3600, images * VOXELS * 2, 0, 20e9)


def _clusters(variant: Variant) -> Estimate:
    return Estimate(0, VOXELS * 4, 0, 16e9)


def _branch(branch: str, paper_hours: float) -> Any:
    def maker(variant: Variant) -> Estimate:
        config, published = getattr(variant, branch), getattr(paper(), branch)
        if config.method is not None:
            other = _METHODS.get(method_name(config.predictor))
            return NOTHING if other is None else other(config, *_TOKENS[branch])
        share = _steps(config.training) * config.batch / (_steps(published.training) * published.batch)
        parameters = (VOXELS * config.dim + _BIT_TRUNK) * 4
        live = 1.5 if variant.targets.external == "live" else 1.0
        return Estimate(paper_hours * share * live, parameters, 5 * parameters, 70e9)

    return maker


def _mlp(config: BranchConfig, values: int, target: float) -> Estimate:
    """Return what an MLP takes: linear maps of the voxels and of the last hidden space are nearly all of it."""
    mlp: Any = config.method
    steps = _steps(config.training)
    images = steps * config.batch
    weights = (VOXELS + values + mlp.blocks * mlp.hidden) * mlp.hidden
    used = (VOXELS / SUBJECTS + values + mlp.blocks * mlp.hidden) * mlp.hidden  # an image has one subject's voxels
    moved = 40 * weights * steps / _BANDWIDTH  # AdamW reads and writes weights, moments and gradients
    seconds = images * (6 * used + target) / _RATE + moved
    return Estimate(seconds / 3600, 4 * weights, 20 * weights, 16 * weights + 12 * config.batch * values)


def _ridge(config: BranchConfig, values: int, target: float) -> Estimate:
    """Return what a ridge takes: one eigendecomposition a fold, layer and subject, and predictions for validation."""
    seen, held_out = 0.9 * TRAINING_IMAGES / SUBJECTS, 0.1 * TRAINING_IMAGES
    folds = 6 * 5 * SUBJECTS * 10 * seen**3  # eigendecompositions: five folds and all, of at most five layers
    predictions = 2 * held_out * (2 * seen * values + seen * target / 64)  # for calibration and for the correlation
    memory = 24 * seen * VOXELS / SUBJECTS + 12 * 256 * values
    return Estimate((_SLOWER * folds + predictions) / _RATE / 3600, 1e4, 0, memory)


_METHODS = {"mlp": _mlp, "ridge": _ridge}  # what others take nobody has counted


def _joint(variant: Variant) -> Estimate:
    config, published = variant.joint, paper().joint
    share = _steps(config.training) * config.batch / (_steps(published.training) * published.batch)
    parameters = (_UNET_PARAMETERS + VOXELS * variant.semantic.dim + _BIT_TRUNK) * 4
    return Estimate(40 * share, parameters, 5 * parameters, 75e9)


def _official_bit(variant: Variant) -> Estimate:
    return Estimate(0, (VOXELS * variant.semantic.dim + _BIT_TRUNK) * 4, 0, 16e9)


def _official_joint(variant: Variant) -> Estimate:
    return _official_bit(variant) + Estimate(0, _UNET_PARAMETERS * 4, 0, 40e9)


def _reconstruct(variant: Variant) -> Estimate:
    count = SYNTHETIC if variant.generation.test_set == "nsd-synthetic" else SHARED
    images = len(variant.generation.subjects) * (variant.generation.test_images or count)
    dip = variant.dip.steps * 3 * (_DIP_NET + _VGG_112)
    whole, rest = variant.generation.steps, variant.generation.steps - variant.generation.start_step
    sampling = 2 * (whole + rest) * _UNET_256 + 3 * _VAE_256
    if variant.networks.refiner is not None:
        steps = variant.refinement.steps - variant.refinement.start_step
        sampling += 2 * steps * _UNET_768 + 18 * _VAE_256
    side = variant.generation.saved_size or 256
    kept = images * 4 * side**2 * 2
    return Estimate(images * (dip + sampling) / _RATE / 3600, kept, images * 3 * 4 * 256**2 * 12, 40e9)


def _score(variant: Variant) -> Estimate:
    images = len(variant.generation.subjects) * (variant.generation.test_images or SHARED)
    return Estimate(3 * images * _JUDGES / _RATE / 3600, images * 33 * 100, 0, 12e9)


def _recordings(variant: Variant) -> float:
    """Return about how many recordings of a new subject a transfer uses: a tenth of its trials show shared images."""
    trials = {"15min": 188, "450": 450, "30min": 375, "1h": 750}
    amount = variant.transfer.amount
    return TRAINING_IMAGES / SUBJECTS if amount == "full" else 0.9 * trials[amount]


def _transfer_data(variant: Variant) -> Estimate:
    voxels = VOXELS / SUBJECTS
    return Estimate(0, (10_000 + 750) * voxels * 4, 0, 8e9)  # the images have a second name, not a copy


def _transfer_targets(variant: Variant) -> Estimate:
    whole, rows = _targets(variant), TRAINING_IMAGES + _external(variant)
    share = TRAINING_IMAGES / SUBJECTS / rows
    return Estimate(whole.gpu_hours * share, whole.disk * share, 0, whole.memory)


def _transfer_encoder(variant: Variant) -> Estimate:
    config, table = variant.encoder, variant.transfer.encoder
    images = _recordings(variant) * table.epochs
    readers = config.voxels_per_example * 257 * 256 * 5 * 2 * 3
    kept = VOXELS / SUBJECTS * config.embed_dim * 4
    return Estimate(images * (_VIT_L + readers) / _RATE / 3600, kept, 6 * kept, 20e9)


def _transfer_external(variant: Variant) -> Estimate:
    whole = _predicted(variant)
    return Estimate(whole.gpu_hours / 2, whole.disk / SUBJECTS, 0, whole.memory)  # the backbone is half of it


def _table(branch: str, paper_hours: float, memory: float) -> Any:
    """Return what a voxel table takes: as much an example as the whole model, whose gradients pass through it."""

    def maker(variant: Variant) -> Estimate:
        table, published = getattr(variant.transfer, branch), getattr(paper(), branch)
        samples = _recordings(variant) * variant.transfer.real_every * table.epochs
        share = samples / (_steps(published.training) * published.batch)
        kept = VOXELS / SUBJECTS * variant.semantic.dim * 4
        return Estimate(paper_hours * share, kept, 6 * kept, memory)

    return maker


_MAKERS = {
    "prepare": _prepare,
    "targets": _targets,
    "encoder": _encoder,
    "external": _predicted,
    "clusters": _clusters,
    "lowlevel": _branch("lowlevel", 12),
    "semantic": _branch("semantic", 8),
    "joint": _joint,
    "official-lowlevel": _official_bit,
    "official-semantic": _official_bit,
    "official-joint": _official_joint,
    "reconstruct": _reconstruct,
    "reconstruct-synthetic": _reconstruct,
    "transfer-data": _transfer_data,
    "transfer-targets": _transfer_targets,
    "transfer-encoder": _transfer_encoder,
    "transfer-external": _transfer_external,
    "transfer-lowlevel": _table("lowlevel", 12, 50e9),
    "transfer-semantic": _table("semantic", 8, 50e9),
    "transfer-joint": _table("joint", 40, 45e9),
    "transfer-reconstruct": _reconstruct,
    "score": _score,
    "references": _score,
}


def plan_lines(decisions: Sequence[Decision], variants: Mapping[str, Variant], owner: Mapping[str, str]) -> list[str]:
    """Return a table of what will run and what it will take.

    Args:
        decisions: of the plan.
        variants: by name.
        owner: fingerprint of a stage -> name of a variant that it belongs to.
    """
    rows = [("", "stage", "GPUs", "GPU-hours", "disk", "memory", "why")]
    total = NOTHING
    for decision in decisions:
        stage = decision.stage
        cost = estimate(stage, variants[owner[stage.fingerprint]]) if decision.action == "run" else NOTHING
        total += cost
        amounts = ("", "", "") if cost is NOTHING else (_hours(cost), _size(cost.disk), _size(cost.memory))
        gpus = str(stage.resources.gpus) if stage.resources.gpus else ""
        rows.append((decision.action, stage.title, gpus, *amounts, decision.reason))
    rows.append(("", "in all", "", _hours(total), _size(total.disk + total.scratch), _size(total.memory), "estimated"))
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  " + "  ".join(_cell(cell, widths[k], k) for k, cell in enumerate(row)).rstrip() for row in rows]


def sweep_lines(sweeps: Mapping[str, Sequence[tuple[Stage, Variant]]]) -> list[str]:
    """Return a table of what sweeps take: each by itself, and one after the other, when what they share is there.

    Args:
        sweeps: name -> its stages, each with a variant that it belongs to.
    """
    rows = [("sweep", "stages", "GPU-hours", "disk", "then new", "GPU-hours", "disk")]
    known: set[str] = set()
    everything = NOTHING
    for name, stages in sweeps.items():
        new = [(stage, variant) for stage, variant in stages if stage.fingerprint not in known]
        known |= {stage.fingerprint for stage, _ in stages}
        alone, added = (_sum(part) for part in (stages, new))
        everything += added
        rows.append((name, *_amounts(len(stages), alone), *_amounts(len(new), added)))
    rows.append(("in all", "", "", "", *_amounts(len(known), everything)))
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    cells = [[cell.rjust(widths[k]) if k else cell.ljust(widths[k]) for k, cell in enumerate(row)] for row in rows]
    note = f"estimated; disk includes the largest stage's checkpoints; at most {_size(everything.memory)} of a GPU"
    return [*("  ".join(row).rstrip() for row in cells), note]


def _sum(stages: Sequence[tuple[Stage, Variant]]) -> Estimate:
    return sum((estimate(stage, variant) for stage, variant in stages), NOTHING)


def _amounts(count: int, cost: Estimate) -> tuple[str, str, str]:
    return f"{count}", _hours(cost), _size(cost.disk + cost.scratch)


def needed_disk(decisions: Sequence[Decision], variants: Mapping[str, Variant], owner: Mapping[str, str]) -> float:
    """Return the bytes that the stages which run will write, the largest one's checkpoints included."""
    total = NOTHING
    for decision in decisions:
        if decision.action == "run":
            total += estimate(decision.stage, variants[owner[decision.stage.fingerprint]])
    return total.disk + total.scratch


def _cell(text: str, width: int, column: int) -> str:
    return text.rjust(width) if 2 <= column <= 5 else text.ljust(width)


def _hours(cost: Estimate) -> str:
    return f"{cost.gpu_hours:.1f}" if cost.gpu_hours >= 0.05 else ""


def _size(count: float) -> str:
    return f"{count / _GB:,.0f} GB" if count >= _GB else f"{count / 1e6:.0f} MB"
