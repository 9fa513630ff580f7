"""The stages that make up a variant, in the order in which the data flows; one module each.

Imports no torch: the functions that run are named, not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmark.config import (
    BranchConfig,
    EncoderConfig,
    JointConfig,
    LowLevelConfig,
    OptimiserConfig,
    SemanticConfig,
    Variant,
)
from benchmark.data.settings import SIMULATION_VERSION
from benchmark.errors import UserError
from benchmark.graph import Plan, Resources, Stage
from benchmark.predictors import methods
from benchmark.weights import network_digests
from methods.predictors import Method, Network
from metrics.protocols import get_protocol, metric_versions, protocol_record

METHOD = "Brain-IT"  # what the scores and the leaderboard call it
KINDS = ("lowlevel", "semantic", "combined")  # of images, those of every variant
GPU = Resources(gpus=1, cpus=8, memory_gb=64, hours=24)
JOINT = Resources(gpus=4, cpus=32, memory_gb=256, hours=24)


_LOWLEVEL_TARGETS = ("width", "input_size", "layers", "windows", "sampled", "standardise", "centre")


def seen_name(image_id: int) -> str:
    """Return the file name of a seen image."""
    return f"nsd{image_id:05d}.png"


def image_name(subject: int, image_id: int) -> str:
    """Return the file name of a reconstruction."""
    return f"subj{subject:02d}_nsd{image_id:05d}.png"


@dataclass(frozen=True)
class VariantStages:
    """The stages of one variant, by role."""

    prepare: Stage
    encoder: Stage
    clusters: Stage
    lowlevel: Stage | None  # None: the true features are known
    semantic: Stage | None
    joint: Stage | None  # None: the generator stays as it was made
    reconstruct: Stage
    score: Stage
    references: Stage
    synthetic: Stage | None = None  # reconstructions of NSD-Synthetic, where these are asked for instead of scores

    @property
    def end(self) -> Stage:
        """What the variant is finished with."""
        return self.synthetic or self.score

    @property
    def chain(self) -> tuple[Stage, ...]:
        """The stages that the variant's cost is made of."""
        found: dict[str, Stage] = {}

        def visit(stage: Stage) -> None:
            for upstream in stage.upstream.values():
                visit(upstream)
            found.setdefault(stage.fingerprint, stage)

        visit(self.score)
        return tuple(found.values())


def owners(stages: dict[str, VariantStages]) -> dict[str, str]:
    """Return fingerprint of every stage, references included -> name of the first variant that it belongs to."""
    return {
        stage.fingerprint: name
        for name, own in reversed(stages.items())
        for stage in Plan.of([own.end, own.references]).stages
    }


def variant_stages(
    variant: Variant,
    label: str,
    data_digest: str | None = None,
    prepare: Stage | None = None,
    absent: str | None = None,
) -> VariantStages:
    """Return the stages of ``variant``; of a transfer, those of its base models too (:func:`transfer_stages`).

    Args:
        variant: what to run.
        label: how people know it, e.g. ``clusters=128``.
        data_digest: SHA-256 of the NSD tree that ``--data`` names; None simulates one.
        prepare: a stage that writes what stage ``prepare`` writes, instead of it.
        absent: stands for the digest of a weights file that is not there, for a plan that will not run.

    Raises:
        UserError: a network that this release cannot load, or a setting that it does not know.
    """
    new, variant_label = variant.transfer.subject, label
    if new is not None:
        label = f"without subject {new}"
        if prepare is not None:
            raise UserError("transfer.subject needs the data set; leave it out here")
    seed, networks = variant.seed, variant.networks
    weights = network_digests(networks.roles(), absent)
    memory = {name: value for name, value in variant.memory.model_dump().items() if value}
    checkpointing = {name: value for name, value in memory.items() if name == "checkpointing"}
    sampling = {name: value for name, value in memory.items() if name != "checkpointing"}
    # Features that training changes cannot be kept.
    static = not variant.encoder.adapter_rank and not variant.encoder.max_shift

    def dump(part: Any) -> dict[str, Any]:
        return part.model_dump(mode="json")

    def trained(part: EncoderConfig | BranchConfig | JointConfig) -> dict[str, Any]:
        # The variant's seed draws the batches too, not the first weights alone.
        training = {**dump(part.training), "seed": seed + part.training.seed}
        return {**dump(part), "training": training, "seed": seed}

    prepare_upstream: dict[str, Stage] = {}
    digests: dict[str, str] = {}
    if prepare is not None:
        pass
    elif data_digest is None:
        assert variant.data.simulation is not None, "a variant without a simulation needs --data"
        prepare_upstream["nsd"] = Stage(
            name="simulate",
            run="benchmark.stages.prepare:run_simulate",
            config={"settings": asdict(variant.data.simulation)},
            code_version=SIMULATION_VERSION,
        )
    else:
        digests["nsd"] = data_digest
    data = variant.data
    reads_data = prepare is None
    prepare = prepare or Stage(
        name="prepare",
        run="benchmark.stages.prepare:run",
        config={
            "image_size": data.image_size,
            "validation_fraction": data.validation_fraction,
            "validation_seed": data.validation_seed,
            "external_images": data.external_images,
            **({} if new is None else {"leave_out": new}),
        },
        upstream=prepare_upstream,
        digests=digests,
    )
    targets = Stage(
        name="targets",
        run="benchmark.stages.targets:run",
        config={
            **{role: name for role, name in networks.roles().items() if role != "refiner"},
            **(_taps(variant) if static else {}),
            "encoder_size": variant.encoder.input_size,
            "lowlevel_size": variant.lowlevel.input_size,
            "layers": list(variant.lowlevel.layers),
            "clip_input": variant.targets.clip_input,
            "precision": variant.targets.precision,
            "store": {
                "encoder": "stored" if static else "live",
                "semantic": variant.targets.semantic,
                "lowlevel": variant.targets.lowlevel,
            },
        },
        upstream={"data": prepare},
        digests={role: digest for role, digest in weights.items() if role != "refiner"},
        resources=GPU,
        hints={"batch": variant.targets.batch},
    )
    shared = {"data": prepare, "targets": targets}
    encoder_config = {**trained(variant.encoder), "network": networks.encoder}
    encoder = Stage(
        name="encoder",
        run="benchmark.stages.encoder:run",
        config=encoder_config,
        upstream=shared,
        digests={"encoder": weights["encoder"]},
        resources=GPU,
        hints=checkpointing,
    )
    external = Stage(
        name="external",
        run="benchmark.stages.encoder:run_external",
        config={
            **{name: encoder_config[name] for name in ("network", "embed_dim", "inner", "dropout", "max_shift")},
            **_taps(variant),
            "input_size": variant.encoder.input_size,
            "store": variant.targets.external,
        },
        upstream={**shared, "encoder": encoder},
        digests={"encoder": weights["encoder"]},
        resources=GPU,
    )
    if variant.needs_anatomy and not reads_data:
        raise UserError(f"clustering.method '{variant.clustering.method}' needs data with anatomy; leave it out here")
    clusters = Stage(
        name="clusters",
        run="benchmark.stages.encoder:run_clusters",
        label=label,
        **_clustering(variant, encoder, {"data": prepare, **prepare_upstream}, digests),
    )
    learns = {**shared, "encoder": encoder, "external": external}
    used = {} if data.external_used == 1 else {"external_used": data.external_used}

    def branch(name: str, part: LowLevelConfig | SemanticConfig) -> Stage | None:
        """Return the stage that makes what predicts a branch's tokens: a BIT, or what stands in its place."""
        if part.predictor == "oracle":
            return None
        config, run, version = trained(part), f"benchmark.stages.bit:run_{name}", 1
        upstream = {**learns, "clusters": clusters}
        if part.method is None:
            config = {k: v for k, v in config.items() if k != "predictor" and k not in methods()}
        else:
            network = isinstance(part.method, Network)
            run = f"benchmark.stages.baselines:run_{'network' if network else 'predictor'}"
            config = _stand_in(part, part.method, config)
            upstream, version = learns if network else shared, part.method.version
        # What no external image enters does not change with their number.
        config |= used if config.get("external_fraction", 0) != 0 else {}
        return Stage(
            name=name, run=run, config=config, upstream=upstream, code_version=version, label=label, resources=GPU
        )

    lowlevel, semantic = branch("lowlevel", variant.lowlevel), branch("semantic", variant.semantic)
    bit_sizes = {name: dump(variant.semantic)[name] for name in ("dim", "depth", "heads", "voxels_per_example")}
    joint = None
    if variant.trains_jointly:
        assert semantic is not None
        config = {**trained(variant.joint), "bit": bit_sizes, "generator": networks.generator}
        del config["enabled"]
        joint = Stage(
            name="joint",
            run="benchmark.stages.bit:run_joint",
            config=config | (used if config["external_fraction"] != 0 else {}),
            upstream={**learns, "clusters": clusters, "semantic": semantic},
            digests={"generator": weights["generator"]},
            hints=checkpointing,
            label=label,
            resources=JOINT,
        )
    low, refinement = dump(variant.lowlevel), dump(variant.refinement)
    if networks.refiner is None or not refinement["also_semantic"]:
        del refinement["also_semantic"]
    sizes = ("dim", "depth", "heads")
    has_bit = "bit" in (variant.lowlevel.predictor, variant.semantic.predictor)
    read = {"data": prepare, "targets": targets, "clusters": clusters if has_bit else None, "lowlevel": lowlevel}
    read |= {"semantic": semantic} if joint is None else {"joint": joint}
    reconstruct = Stage(
        name="reconstruct",
        run="benchmark.stages.reconstruct:run",
        config={
            "seed": seed,
            "generation": {k: v for k, v in dump(variant.generation).items() if k not in ("batch", "test_set")},
            "dip": {k: v for k, v in dump(variant.dip).items() if k != "batch"},
            "semantic": {name: bit_sizes[name] for name in sizes}
            if variant.semantic.predictor == "bit"
            else {"predictor": variant.semantic.predictor},
            "lowlevel": {name: low[name] for name in (*sizes, *_LOWLEVEL_TARGETS)}
            if variant.lowlevel.predictor == "bit"
            else {name: low[name] for name in ("predictor", *_LOWLEVEL_TARGETS)},
            "lowlevel_network": networks.lowlevel,
            "generator": networks.generator,
            "refiner": networks.refiner,
            "refinement": {k: v for k, v in refinement.items() if k != "batch"},
        },
        upstream={role: stage for role, stage in read.items() if stage is not None},
        digests={role: weights[role] for role in ("generator", "lowlevel", "refiner") if role in weights},
        hints={
            "dip": variant.dip.batch,
            "generation": variant.generation.batch,
            "refinement": variant.refinement.batch,
            **sampling,
        },
        label=label,
        resources=GPU,
    )
    try:
        protocol = get_protocol(variant.score.protocol)
    except ValueError as error:
        raise UserError(f"score.protocol: {error}") from None
    score_config = {
        "protocol": protocol.name,
        "track": variant.track,
        "seed": seed,
        # What the name stands for: scores of an older form of a protocol or a metric are not taken for today's.
        "rules": {**protocol_record(protocol), "metrics": metric_versions(protocol)},
        "random_weights": variant.score.random_weights,
    }
    judges = _judges(protocol.networks, variant.score.random_weights, absent)
    both = sorted(set(judges) & set(networks.roles().values()))
    if both:
        raise UserError(f"network '{both[0]}' judges in protocol {protocol.name}, so it cannot be a target too")
    shown = variant.score.images
    score = Stage(
        name="score",
        run="benchmark.stages.score:run",
        config=score_config | ({} if shown in KINDS else {"images": shown}),
        upstream={"reconstruct": reconstruct},
        digests=judges,
        label=label,
        resources=GPU,
    )
    references = Stage(
        name="references",
        run="benchmark.stages.score:run_references",
        config=score_config | ({} if shown == "combined" else {"images": shown}),
        upstream={"data": prepare, "reconstruct": reconstruct},
        digests=judges,
        label=label,
        resources=GPU,
    )
    synthetic = None
    if variant.generation.test_set == "nsd-synthetic":
        if not reads_data:
            raise UserError("generation.test_set 'nsd-synthetic' needs the data set; leave it out here")
        if lowlevel is None or semantic is None:
            raise UserError("generation.test_set 'nsd-synthetic' is for what was recorded; predictor oracle knows NSD")
        synthetic = _on_synthetic(reconstruct, prepare, prepare_upstream, digests)
    own = VariantStages(
        prepare, encoder, clusters, lowlevel, semantic, joint, reconstruct, score, references, synthetic
    )
    return own if new is None else transfer_stages(variant, own, variant_label)


def transfer_stages(variant: Variant, base: VariantStages, label: str) -> VariantStages:
    """Return the stages that bring a new subject's voxels into trained base models.

    Only what depends on the amount of its data differs between the amounts: they share the base models, and what the
    frozen networks say of the images that it saw.

    Args:
        variant: what to run; its ``transfer`` says for whom.
        base: the stages over the data of all others.
        label: how people know the variant.
    """
    assert base.lowlevel is not None and base.semantic is not None and base.joint is not None
    transfer, prepare, encoder = variant.transfer, base.prepare, base.encoder
    targets, external = encoder.upstream["targets"], base.lowlevel.upstream["external"]
    whose = f"subject {transfer.subject}"
    amount = {"amount": transfer.amount}
    data = Stage(
        name="transfer-data",
        run="benchmark.stages.transfer:run_data",
        config={
            **{name: prepare.config[name] for name in ("image_size", "validation_fraction", "validation_seed")},
            "subject": transfer.subject,
        },
        upstream={**prepare.upstream, "base": prepare},
        label=whose,
    )
    own_targets = replace(targets, name="transfer-targets", upstream={"data": data}, label=whose)
    read = {"data": data, "base": prepare}

    def table(name: str) -> dict[str, Any]:
        settings = getattr(transfer, name).model_dump(mode="json")
        return {**amount, "seed": variant.seed, "table": settings}

    adapted = Stage(
        name="transfer-encoder",
        run="benchmark.stages.transfer:run_encoder",
        config={
            **{name: value for name, value in external.config.items() if name != "store"},
            "voxels_per_example": variant.encoder.voxels_per_example,
            **table("encoder"),
        },
        upstream={**read, "targets": own_targets, "encoder": encoder},
        digests=encoder.digests,
        label=label,
        resources=GPU,
    )
    predicts = {**read, "base_targets": targets, "encoder": encoder, "adapted": adapted}
    predicted = Stage(
        name="transfer-external",
        run="benchmark.stages.transfer:run_external",
        config={**external.config, **amount},
        upstream=predicts,
        digests=external.digests,
        label=label,
        resources=GPU,
    )
    clusters = Stage(
        name="transfer-clusters",
        run="benchmark.stages.transfer:run_clusters",
        config={},
        upstream={"encoder": encoder, "clusters": base.clusters, "adapted": adapted},
        label=label,
    )
    learns = {**predicts, "targets": own_targets, "external": predicted, "clusters": clusters}
    sizes = ("dim", "depth", "heads", "voxels_per_example")
    used = {} if variant.data.external_used == 1 else {"external_used": variant.data.external_used}
    mixed = {"real_every": transfer.real_every, **used}
    lowlevel = Stage(
        name="transfer-lowlevel",
        run="benchmark.stages.transfer:run_lowlevel",
        config={
            **{name: base.lowlevel.config[name] for name in (*sizes, *_LOWLEVEL_TARGETS, "scale")},
            **table("lowlevel"),
            **mixed,
        },
        upstream={**learns, "lowlevel": base.lowlevel},
        label=label,
        resources=GPU,
    )
    semantic = Stage(
        name="transfer-semantic",
        run="benchmark.stages.transfer:run_semantic",
        config={**{name: base.semantic.config[name] for name in sizes}, **table("semantic"), **mixed},
        upstream={**learns, "semantic": base.semantic},
        label=label,
        resources=GPU,
    )
    joint = Stage(
        name="transfer-joint",
        run="benchmark.stages.transfer:run_joint",
        config={
            **{name: base.joint.config[name] for name in ("bit", "generator", "offset_noise")},
            **table("joint"),
            **mixed,
        },
        upstream={**learns, "semantic": semantic, "joint": base.joint},
        digests=base.joint.digests,
        hints=base.joint.hints,
        label=label,
        resources=JOINT,
    )
    trained = {"lowlevel": lowlevel, "base_lowlevel": base.lowlevel, "joint": joint, "base_joint": base.joint}
    reconstruct = replace(
        base.reconstruct,
        name="transfer-reconstruct",
        run="benchmark.stages.transfer:run_reconstruct",
        upstream={"data": data, "targets": targets, "clusters": clusters, **trained},
        label=label,
    )
    score = replace(base.score, upstream={"reconstruct": reconstruct}, label=label)
    references = replace(base.references, upstream={"data": data, "reconstruct": reconstruct}, label=label)
    return VariantStages(prepare, adapted, clusters, lowlevel, semantic, joint, reconstruct, score, references)


def _stand_in(part: BranchConfig, method: Method, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return configuration of a branch whose tokens another method predicts: only what it reads.

    Args:
        part: the branch's settings.
        method: what predicts.
        config: the configuration that its BIT would have.
    """
    targets = _LOWLEVEL_TARGETS if isinstance(part, LowLevelConfig) else ()
    own = {name: config[name] for name in ("predictor", "batch", "seed", *targets)}
    settings = method.model_dump(mode="json")
    if not isinstance(method, Network):
        return {**own, **settings}
    rates = {name: settings.pop(name) for name in ("lr", "weight_decay")}
    own |= {**settings, "external_fraction": config["external_fraction"]}
    own |= {"scale": config["scale"]} if part.predictor.endswith("-infonce") else {}
    optimiser = OptimiserConfig(**rates).model_dump(mode="json")
    return {**own, "training": {**config["training"], "optimiser": optimiser}}


def _clustering(
    variant: Variant, encoder: Stage, sources: Mapping[str, Stage], digests: Mapping[str, str]
) -> dict[str, Any]:
    """Return configuration, upstream and version of stage ``clusters``: only what its method reads.

    Args:
        variant: what to run.
        encoder: its stage ``encoder``.
        sources: its stage ``prepare`` as ``data``, and what that is made of.
        digests: of the data tree, where one is given.
    """
    settings = variant.clustering.model_dump(mode="json")
    if not variant.needs_anatomy:
        functional = {name: value for name, value in settings.items() if name != "method"}
        version = 2 if variant.clustering.covariance == "full" else 1  # whose fit is no longer scikit-learn's
        config = {**functional, "seed": variant.seed}
        return {"config": config, "upstream": {"encoder": encoder}, "code_version": version}
    by_place = variant.clustering.method == "coordinates"
    own = {"n_clusters": variant.clustering.n_clusters, "seed": variant.seed} if by_place else {}
    anatomy = Stage(
        name="anatomy",
        run="benchmark.stages.anatomy:run",
        config={"what": variant.clustering.method},
        upstream=sources,
        digests=digests,
    )
    return {"config": {"method": variant.clustering.method, **own}, "upstream": {"anatomy": anatomy}}


def _on_synthetic(
    reconstruct: Stage, prepare: Stage, sources: Mapping[str, Stage], digests: Mapping[str, str]
) -> Stage:
    """Return the stage that reconstructs NSD-Synthetic as ``reconstruct`` does the shared images."""
    complete = {
        role: replace(stage, config={**stage.config, "complete": True}) for role, stage in sources.items()
    }  # the same miniature NSD, with NSD-Synthetic beside it
    recordings = Stage(
        name="synthetic",
        run="benchmark.stages.synthetic:run",
        config={
            "image_size": prepare.config["image_size"],
            "subjects": reconstruct.config["generation"]["subjects"],
        },
        upstream=complete,
        digests=digests,
    )
    return replace(
        reconstruct,
        name="reconstruct-synthetic",
        run="benchmark.stages.synthetic:run_reconstruct",
        upstream={**reconstruct.upstream, "synthetic": recordings},
    )


def _taps(variant: Variant) -> dict[str, Any]:
    """Return where the encoder's backbone is read."""
    encoder = variant.encoder
    return {"taps": list(encoder.taps), "adapter_rank": encoder.adapter_rank, "grid": encoder.grid}


def _judges(names: Mapping[str, Any], random_weights: int | None, absent: str | None) -> dict[str, str]:
    suffix = "" if random_weights is None else f"@random-{random_weights}"
    return {name: network_digests({"judge": name + suffix}, absent)["judge"] for name in names}
