"""A preset at its full size without data and weights: every model built, two steps of each stage, one reconstruction.

Weights are drawn from a seed, the data are random numbers in the true shapes. What does not fit into memory is checked
on the ``meta`` device and marked so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from benchmark.config import Variant
from benchmark.graph import Plan, Stage
from benchmark.stages import VariantStages, variant_stages

if TYPE_CHECKING:
    from benchmark.execute import Outcome, RunOptions
    from benchmark.store import Store

VOXELS = (39548, 39548, 39548, 39548, 39548, 39198, 39548, 39511)
"""NSD's vertices in the Algonauts mask, 315,997 in all."""
STEPS = 2
# Weights, gradients and two moments in float32, and activations of the checkpointed denoiser beside them.
_JOINT_BYTES_A_PARAMETER = 16
_JOINT_ACTIVATIONS = 8e9
_JOINT_PARAMETERS = 2.7e9


def smoke_variant(variant: Variant, gpu: bool) -> Variant:
    """Return ``variant`` with the weights of its networks drawn, and two steps of each training.

    Model sizes, losses, token counts and image sizes stay. On a CPU batches are smaller (two examples), fp16 is fp32,
    and the sampler takes fewer steps.
    """

    def drawn(name: str | None) -> str | None:
        return name if name in (None, "demo", "lite0") else f"{name}@random-0"

    changes: dict[str, Any] = {
        f"networks.{role}": drawn(name) for role, name in variant.networks.model_dump().items() if name is not None
    }
    for part in ("encoder", "lowlevel", "semantic", "joint"):
        changes |= {
            f"{part}.training.steps": STEPS,
            f"{part}.training.epochs": None,
            f"{part}.training.steps_per_epoch": None,
            f"{part}.training.validate_every": STEPS,
            f"{part}.training.accumulate": 1,
            f"{part}.training.schedule": {"kind": "constant"},
        }
        if not gpu:
            changes |= {f"{part}.batch": 2, f"{part}.training.precision": "fp32"}
    changes |= {
        "clustering.max_iter": 1,
        "dip.steps": STEPS,
        "generation.steps": 4,
        "generation.start_step": 2,
        "generation.subjects": (1,),
        "generation.test_images": 2,
        "generation.batch": 2,
        "refinement.steps": 25,
        "refinement.start_step": 24,
        "refinement.batch": 1,
        "score.random_weights": 0,
        "track": f"{variant.track}-smoke",
    }
    if not gpu:
        changes |= {"generation.precision": "fp32", "targets.batch": 2}
    return variant.with_settings(changes)


def smoke_stages(variant: Variant, memory: float) -> VariantStages:
    """Return the stages of a smoke run.

    Args:
        variant: from :func:`smoke_variant`.
        memory: bytes of the device; joint training is checked on the ``meta`` device where it would not fit.
    """
    data = Stage(
        name="prepare",
        run="benchmark.stages.smoke:run_data",
        config={
            "seed": 0,
            "image_size": variant.data.image_size,
            "voxels": list(VOXELS),
            "shared": 2,
            "unique": 2,
            "external": 2,
        },
    )
    stages = variant_stages(variant, "smoke", prepare=data)
    if stages.joint is None or memory >= _JOINT_BYTES_A_PARAMETER * _JOINT_PARAMETERS + _JOINT_ACTIVATIONS:
        return stages
    return _with_joint(stages, replace(stages.joint, run="benchmark.stages.smoke:run_joint", name="joint-shapes"))


def _with_joint(stages: VariantStages, joint: Stage) -> VariantStages:
    def over(stage: Stage, **upstream: Stage) -> Stage:
        return replace(stage, upstream={**stage.upstream, **upstream})

    reconstruct = over(stages.reconstruct, joint=joint)
    return replace(
        stages,
        joint=joint,
        reconstruct=reconstruct,
        score=over(stages.score, reconstruct=reconstruct),
        references=over(stages.references, reconstruct=reconstruct),
    )


@dataclass(frozen=True)
class Line:
    """What one stage of a smoke run took."""

    stage: str
    parameters: int | None
    seconds: float
    peak_bytes: int
    note: str


def smoke(
    stages: VariantStages, store: Store, options: RunOptions, show: Callable[[object], None]
) -> tuple[list[Line], list[Outcome]]:
    """Run the stages, each in a process of its own so that its peak memory is its own.

    Returns:
        A line for each stage that has a result, and how all of them ended.
    """
    from benchmark.launch import make_launcher

    plan = Plan.of([stages.score])
    decisions = plan.decide(store)
    outcomes = make_launcher("local").run(plan, decisions, store, options, show)
    lines = []
    for outcome in outcomes:
        if outcome.state in ("done", "cached"):
            status: Mapping[str, Any] = store.status(outcome.stage)
            summary = status.get("summary", {})
            lines.append(
                Line(
                    outcome.stage.name,
                    summary.get("parameters"),
                    float(status.get("wall_s", 0.0)),
                    int(status.get("peak_memory_bytes", 0)),
                    str(summary.get("checked", "")),
                )
            )
    return lines, outcomes


def table(lines: list[Line]) -> str:
    """Return the lines as a Markdown table, which also reads well on a terminal."""
    rows = ["| stage | parameters | seconds | peak memory | |", "|---|--:|--:|--:|---|"]
    for line in lines:
        parameters = f"{line.parameters:,}" if line.parameters else ""
        rows.append(
            f"| {line.stage} | {parameters} | {line.seconds:.0f} | {line.peak_bytes / 1e9:.1f} GB | {line.note} |"
        )
    return "\n".join(rows)


def free_memory(device: str) -> float:
    """Return the bytes that a stage may use: of the GPU, or free in main memory."""
    if device != "cpu":
        import torch

        return float(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return float(psutil.virtual_memory().available)
