"""Stages ``official-...``: the authors' weights, read from a converted file, as this project's trainings would be kept.

Each writes what the stage that it stands for writes, so everything that follows is the same. Voxels are in the same
order there and here: subject after subject, left hemisphere first, vertices ascending.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from benchmark import networks
from benchmark.context import StageContext
from benchmark.errors import UserError
from benchmark.networks.files import load_weights
from benchmark.official import PREFIX, About, read_parts
from benchmark.official_weights import load
from benchmark.stages.bit import Validation, build_bit, save_calibration, voxel_layout
from benchmark.stages.encoder import EncoderWithAdapters, save_correlation, save_mapping
from benchmark.stages.features import LowLevelTargets, encoder_taps, read_shapes
from benchmark.stages.prepare import Prepared
from benchmark.weights import file_digest
from methods.brain_it.clustering import V2C
from methods.brain_it.encoder import Adapter
from methods.brain_it.transformer import BIT


def source(ctx: StageContext) -> tuple[Path, About]:
    """Return the converted file that the stage takes its weights from, and what it tells of them.

    Raises:
        UserError: it is gone, or another than when the run was planned.
    """
    path = Path(ctx.stage.hints["file"])
    role = f"official {ctx.stage.name.removeprefix(PREFIX)}"
    if not path.is_file():
        raise UserError(f"{path}: the authors' converted weights are gone; name their folder with --official")
    if file_digest(path) != ctx.stage.digests[role]:
        raise UserError(f"{path}: has changed since the run was planned; type the command again")
    return path, About.model_validate(read_parts(path)[ctx.config["part"]])


def fill(
    module: nn.Module,
    path: Path,
    about: About,
    what: str,
    within: str = "",
    unused: tuple[str, ...] = (),
    ours: Callable[[str], str] = str,
) -> None:
    """Put the tensors of a part into ``module``, float32: all of them, but for beginnings of names in ``unused``.

    Args:
        module: the architecture.
        path: the converted file.
        about: the part.
        what: the module, for messages.
        within: beginning of the module's names in the part.
        unused: what is in the part and not in the module.
        ours: name in the part, without ``within`` -> name in the module.

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape.
    """
    prefix = about.prefix + within
    load_weights(
        module,
        path,
        what,
        tuple(prefix + name for name in unused),
        only=(prefix,),
        convert=lambda found: {ours(name.removeprefix(prefix)): tensor for name, tensor in found.items()},
    )


def run_encoder(ctx: StageContext) -> dict[str, Any]:
    """Take the encoder: its own weights and its adapters; the backbone between them is the frozen one of --weights.

    The validation images are this run's; the authors may have trained on them, so its correlations are no test.

    Outputs: as stage ``encoder``.
    """
    path, about = source(ctx)
    data = Prepared(ctx.inputs["data"])
    taps = encoder_taps(ctx.config, data, ctx.inputs["targets"], ctx.device)
    model = EncoderWithAdapters(ctx.config, data, taps)
    adapters = list(model.adapters.children())
    kept, released = len(adapters), about.sizes.get("backbone_depth", 0)
    beyond = tuple(f"adapters.{block}." for block in range(kept, released))  # after the last tap: nothing reads them
    fill(model, path, about, "the brain encoder", unused=("backbone.", *beyond), ours=_in_model)
    scale = about.settings.get("adapter_scale")
    with torch.no_grad():
        for adapter in adapters:
            assert isinstance(adapter, Adapter)
            if scale not in (None, adapter.scale):  # a map that is applied with another factor
                adapter.up.mul_(scale / adapter.scale)
    save_file(model.tensors(), ctx.out / "encoder.safetensors")
    model.to(ctx.device).eval()
    r = save_correlation(ctx.out, model.encoder, taps, data)
    return _summary(path, about, model) | {
        "correlation": float(r.quantile(0.75)),
        "median correlation": float(r.median()),
    }


def _in_model(name: str) -> str:
    """Return the name in :class:`EncoderWithAdapters` of a tensor of a converted encoder."""
    return name if name.startswith("adapters.") else f"encoder.{name}"


def run_clusters(ctx: StageContext) -> dict[str, Any]:
    """Take the voxel-to-cluster mapping.

    Output: as stage ``clusters``.
    """
    path, about = source(ctx)
    tensors, _ = load(path, ctx.config["part"])
    counts = Prepared(ctx.inputs["data"]).n_voxels
    try:
        mapping = V2C(tensors["labels"].numpy(), about.sizes["clusters"])
        mapping.per_subject(counts)
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: not the clusters of these data's {sum(counts):,} voxels: {error}") from None
    return {"file": path.name, "official sha256": about.sha256, **save_mapping(mapping, ctx.out)}


def run_lowlevel(ctx: StageContext) -> dict[str, Any]:
    """Take the low-level BIT; calibrate it on the validation images, which the authors may have trained on.

    Outputs: as stage ``lowlevel``.
    """
    path, about = source(ctx)
    data, config = Prepared(ctx.inputs["data"]), ctx.config
    upstream = ctx.stage.upstream["targets"].config
    targets = LowLevelTargets(ctx.inputs["targets"], config, upstream, data, ctx.device)
    bit = _bit(ctx, data, "lowlevel", targets.tokens.tokens, targets.tokens.width)
    save_file(bit.state_dict(), ctx.out / "bit.safetensors")
    bit.to(ctx.device).eval()
    validation = Validation(data).batches(config["batch"])
    save_calibration(ctx, validation, targets, lambda b: bit(b.betas.to(ctx.device), b.subject.to(ctx.device)).float())
    return _summary(path, about, bit)


def run_semantic(ctx: StageContext) -> dict[str, Any]:
    """Take the semantic BIT of stage 1.

    Output: as stage ``semantic``.
    """
    path, about = source(ctx)
    bit = _bit(ctx, Prepared(ctx.inputs["data"]), "semantic", *read_shapes(ctx.inputs["targets"])["semantic"])
    save_file(bit.state_dict(), ctx.out / "bit.safetensors")
    return _summary(path, about, bit)


def run_joint(ctx: StageContext) -> dict[str, Any]:
    """Take semantic BIT and denoiser of stage 2.

    Outputs: as stage ``joint``.
    """
    path, about = source(ctx)
    bit = _bit(ctx, Prepared(ctx.inputs["data"]), "joint", *read_shapes(ctx.inputs["targets"])["semantic"])
    unet = networks.generator(ctx.config["generator"]).unet
    assert isinstance(unet, nn.Module)
    fill(unet, path, about, f"the denoiser of {ctx.config['generator']}", "unet.")
    save_file(bit.state_dict(), ctx.out / "bit.safetensors")
    save_file({name: value.contiguous() for name, value in unet.state_dict().items()}, ctx.out / "unet.safetensors")
    return _summary(path, about, bit, unet)


def _bit(ctx: StageContext, data: Prepared, role: str, n_queries: int, width: int) -> BIT:
    """Return the BIT of a part, of as many tokens as this run's targets have."""
    path, about = source(ctx)
    config, within = (ctx.config["bit"], "bit.") if role == "joint" else (ctx.config, "")
    bit = build_bit(config, voxel_layout(data, ctx.inputs["clusters"]), n_queries, width)
    names = "semantic" if role == "joint" else role
    fill(bit, path, about, f"the {names} BIT of {n_queries} tokens of {width}", within)
    return bit


def _summary(path: Path, about: About, *modules: nn.Module) -> dict[str, Any]:
    parameters = sum(p.numel() for module in modules for p in module.parameters())
    return {"file": path.name, "official sha256": about.sha256, "parameters": parameters}
