"""From finished stages to the leaderboard: rows, the terminal's table, ``leaderboard.json`` and the site."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmark.config import PRESETS, Variant
from benchmark.graph import Stage, flat
from benchmark.official import PREFIX, credit
from benchmark.report.answers import Answer
from benchmark.stages import METHOD, VariantStages, image_name, seen_name
from benchmark.store import MANIFEST, Store, read_json
from benchmark.sweeps import Sweep
from leaderboard import (
    Axis,
    Cost,
    Gallery,
    Manifest,
    Ordering,
    Ranking,
    Row,
    build,
    compare,
    summarise,
)
from leaderboard.orderings import differences, orderings
from leaderboard.published import published
from leaderboard.results import RESULTS, write_result
from leaderboard.site import SHOWN, telling
from leaderboard.statistics import Key
from leaderboard.statistics import scores as arranged
from metrics.protocols import Protocol, get_protocol

PICTURES = 96  # of each subject: the first in the order of the test set, then those on which variants differ most
BRANCHES = {"lowlevel": "low-level image alone", "semantic": "semantic image alone", "combined": "both branches"}


@dataclass(frozen=True)
class Report:
    """What a sweep came to."""

    ranking: Ranking
    page: Path
    answer: Answer


@dataclass(frozen=True)
class Training:
    """One training of a variant: its settings, seed included, and its finished stages."""

    variant: Variant
    stages: VariantStages


def write_report(
    out: Path, store: Store, sweep: Sweep, trainings: Mapping[str, Sequence[Training]], main: str
) -> Report:
    """Write the leaderboard of a finished sweep.

    Args:
        out: folder of the run; the leaderboard goes to ``out/leaderboard``.
        store: where the stages' results are.
        sweep: what was swept.
        trainings: variant name -> its trainings, one a seed, of those that finished. A row is over all of them; its
            images are the first one's.
        main: the variant whose branches and shuffled images stand in the table.
    """
    variants = {name: own[0].variant for name, own in trainings.items()}
    stages = {name: own[0].stages for name, own in trainings.items()}
    about = read_json(store.folder(stages[main].score) / "protocol.json")
    protocol = get_protocol(about["protocol"])
    credited = {name: credit(own) for name, own in stages.items()}
    keys = {name: (_place(variants[name])[0] + credited[name][0], name) for name in stages}
    tables = [
        _scores(store, one.stages.score, {variants[name].score.images: keys[name]})
        for name, own in trainings.items()
        for one in own
    ]
    # Where a variant is a branch of the main one, it is that branch's row.
    alone = {
        variants[name].score.images: keys[name]
        for name, own in stages.items()
        if own.reconstruct.fingerprint == stages[main].reconstruct.fingerprint
    }
    branch_names = {kind: (keys[main][0], f"{main}, {title}") for kind, title in BRANCHES.items() if kind not in alone}
    tables += [_scores(store, one.stages.score, branch_names) for one in trainings[main]] if branch_names else []
    reference_names = {"mean image": ("reference", "mean image"), "shuffled": ("reference", "shuffled")}
    tables += [_scores(store, one.stages.references, reference_names) for one in trainings[main]]
    per_image = pa.concat_tables(tables)
    intervals = summarise(per_image)
    notes = {key: protocol.describe(key) for key in (*protocol.slots, *(slot.key for slot in protocol.pixels))}
    answered = sweep.answered()
    common: dict[str, Any] = {
        "track": variants[main].track,
        "protocol": protocol.name,
        "protocol_hash": about["protocol_hash"],
        "subjects": tuple(about["subjects"]),
        "n_images": about["n_images"],
        "judges": notes,
    }
    seeds = {name: tuple(one.variant.seed for one in own) for name, own in trainings.items()}
    rows = []
    for name, own in trainings.items():
        folder = store.folder(stages[name].score)
        rows.append(
            Row(
                method=keys[name][0],
                variant=name,
                kind=_place(variants[name])[1],
                metrics=intervals[keys[name]],
                seeds=seeds[name],
                cost=_cost(store, [one.stages for one in own]),
                manifest=_manifest(store, own[0]),
                source=_relative(folder, out),
                notes=credited[name][1],
                data=_amount(variants[name]),
                answers=answered.get(name, ""),
                **_settings(variants[name]),
                **common,
            )
        )
    for method, variant in branch_names.values():
        source = _relative(store.folder(stages[main].score), out)
        rows.append(
            Row(
                method=method,
                variant=variant,
                kind="branch",
                metrics=intervals[method, variant],
                seeds=seeds[main],
                source=source,
                data=_amount(variants[main]),
                **_settings(variants[main]),
                **common,
            )
        )
    source = _relative(store.folder(stages[main].references), out)
    for method, variant in reference_names.values():
        rows.append(
            Row(
                method=method,
                variant=variant,
                kind="reference",
                metrics=intervals[method, variant],
                seeds=seeds[main],
                source=source,
                **common,
            )
        )
    rows.append(
        Row(
            method="reference",
            variant="chance",
            kind="reference",
            metrics=_chance(protocol, about["n_images"]),
            seeds=seeds[main],
            source="by arithmetic",
            **common,
        )
    )
    folder = out / "leaderboard"
    scored = set(intervals)
    for row in rows:
        write_result(folder / RESULTS, row, per_image if row.key in scored else None)
    first: dict[str, str] = {}  # whose images these are: the same images are shown once
    for name, finished in stages.items():
        first.setdefault(finished.reconstruct.fingerprint, name)
    shown = _shown(per_image, [keys[name] for name in stages])
    galleries = [g for name in first.values() for g in _galleries(store, stages[name], name, shown)]
    pictures = {n: (first[own.reconstruct.fingerprint], str(variants[n].score.images)) for n, own in stages.items()}
    main_images = first[stages[main].reconstruct.fingerprint]
    pictures |= {variant: (main_images, kind) for kind, (_, variant) in branch_names.items()}
    axis = _axis(sweep, stages)
    ranking = build(
        folder,
        rows,
        per_image,
        galleries,
        axis,
        notes,
        pictures,
        title=sweep.title,
        about=sweep.question,
    )
    lowlevel = alone["lowlevel"] if "lowlevel" in alone else branch_names["lowlevel"]
    sentences = _sentences(per_image, lowlevel)
    found = _orderings(per_image, sweep, keys, main)
    others: dict[Key, None] = dict.fromkeys(key for key in keys.values() if key != keys[main])
    apart = tuple(differences(per_image, others, keys[main]))
    answer = Answer(
        sweep=sweep.name,
        title=sweep.title,
        question=sweep.question,
        table=sweep.answers,
        rows=ranking.rows,
        notes=notes,
        sentences=sentences,
        orderings=found,
        differences=apart,
        axis=axis,
        galleries=tuple(galleries),
        pictures=pictures,
    )
    answer.save(out)
    return Report(ranking, folder / "index.html", answer)


def _orderings(
    per_image: pa.Table, sweep: Sweep, keys: Mapping[str, tuple[str, str]], main: str
) -> tuple[Ordering, ...]:
    """Ask the orderings of the published table that the sweep answers, against the main variant."""
    answered = {name: published()[row] for name, row in sweep.answered().items() if name in keys}
    if main not in answered:
        return ()
    others = {keys[name]: row for name, row in answered.items() if name != main}
    return tuple(orderings(per_image, others, (keys[main], answered[main])))


def _place(variant: Variant) -> tuple[str, Literal["method", "reference"]]:
    """Return what a variant's method is called, and whether it is ranked: what knows the test images is not."""
    if "oracle" in (variant.semantic.predictor, variant.lowlevel.predictor):
        return "reference", "reference"
    method = variant.semantic.method
    return METHOD if method is None else method.title, "method"


def _sentences(per_image: pa.Table, lowlevel: tuple[str, str]) -> tuple[str, ...]:
    """Say whether the low-level image beats the mean image in PixCorr, image by image."""
    found = compare(per_image, lowlevel, ("reference", "mean image"), metrics=["PixCorr"])["PixCorr"]
    words = "above" if found.difference > 0 else "below"
    return (
        f"low-level image ({lowlevel[1].split(',')[0]}): PixCorr {abs(found.difference):.3f} {words} the mean image's "
        f"(paired over images, 95 % CI {found.ci_low:+.3f} to {found.ci_high:+.3f}, p = {found.p:.2g})",
    )


def _scores(store: Store, stage: Stage, names: Mapping[str, tuple[str, str]]) -> pa.Table:
    """Read a stage's per-image scores; keep the variants in ``names`` and give them these (method, variant)."""
    table = pq.read_table(store.folder(stage) / "scores.parquet")
    parts = []
    for variant, (method, name) in names.items():
        part = table.filter(pc.equal(table["variant"], variant))
        for column, value in (("method", method), ("variant", name)):
            place = part.schema.get_field_index(column)
            part = part.set_column(place, column, pa.array([value] * len(part), pa.string()))
        parts.append(part)
    return pa.concat_tables([part.replace_schema_metadata() for part in parts])


def _chance(protocol: Protocol, n_images: int) -> dict[str, Any]:
    """Return what guessing scores: one half in two-way identification, 1 in N in retrieval among the test images."""
    values = {"identification": 0.5, "retrieval": 1 / n_images}
    return {key: {"mean": values[slot.measure]} for key, slot in protocol.slots.items() if slot.measure in values}


def _cost(store: Store, trainings: Sequence[VariantStages]) -> Cost:
    """Return what one training cost, shared stages included; of several their mean, and the largest peak."""
    each = [_cost_of_one(store, own) for own in trainings]
    return Cost(
        gpu_hours=float(np.mean([cost["gpu_hours"] for cost in each])),
        wall_s=float(np.mean([cost["wall_s"] for cost in each])),
        peak_memory_bytes=max(int(cost["peak_memory_bytes"]) for cost in each),
        parameters=int(each[0]["parameters"]),
    )


def _cost_of_one(store: Store, stages: VariantStages) -> dict[str, float]:
    statuses = [store.status(stage) for stage in stages.chain]
    wall = sum(status.get("wall_s", 0.0) for status in statuses)
    on_gpu = sum(
        s.get("wall_s", 0.0) * stage.resources.gpus
        for s, stage in zip(statuses, stages.chain, strict=True)
        if s.get("device") != "cpu"
    )
    parts = {"encoder", "lowlevel", "semantic" if stages.joint is None else "joint"}  # joint's are semantic's and more
    trained = [
        status.get("summary", {}).get("parameters", 0)
        for status, stage in zip(statuses, stages.chain, strict=True)
        if stage.name.removeprefix(PREFIX) in parts
    ]
    peak = max(status.get("peak_memory_bytes", 0) for status in statuses)
    return {"gpu_hours": on_gpu / 3600, "wall_s": wall, "peak_memory_bytes": peak, "parameters": sum(trained)}


def _manifest(store: Store, training: Training) -> Manifest:
    """Return what a training was made from; those of a row differ in nothing but the variant's seed."""
    stages, variant = training.stages, training.variant
    made = read_json(store.folder(stages.score) / MANIFEST)
    git = made.get("git")
    seeds = {"variant": variant.seed, "validation split": variant.data.validation_seed}
    if variant.data.simulation is not None and "nsd" in stages.prepare.upstream:
        seeds["simulation"] = variant.data.simulation.seed
    weights = {
        role: digest for stage in stages.chain for role, digest in stage.digests.items() if stage is not stages.prepare
    }
    data = {"prepared": stages.prepare.fingerprint, **stages.prepare.digests}
    return Manifest(
        git=None if not git else git["revision"] + ("+dirty" if git["dirty"] else ""),
        packages=made["packages"],
        hardware={key: str(value) for key, value in made["hardware"].items()},
        seeds=seeds,
        data=data,
        weights=weights,
    )


def _axis(sweep: Sweep, names: Collection[str]) -> Axis | None:
    """Return what the sweep varied: values at their place, or side by side; None of a single variant."""
    values = {sweep.variant(value): value for value in sweep.axis.values if sweep.variant(value) in names}
    if len(values) < 2:
        return None
    places = {name: sweep.axis.position(value) for name, value in values.items()}
    known = {name: place for name, place in places.items() if place is not None}
    if len(known) == len(values):
        return Axis(sweep.axis.unit or sweep.axis.name, known, log=sweep.axis.log)
    side_by_side = {name: float(place) for place, name in enumerate(values)}
    return Axis(sweep.axis.name, side_by_side, log=False, labels={name: str(value) for name, value in values.items()})


def _amount(variant: Variant) -> str:
    """Return how much fMRI of the test subject a variant trained on, as published rows say it."""
    return variant.transfer.amount if variant.transfer.subject is not None else "full"


def _settings(variant: Variant) -> dict[str, Any]:
    """Return all settings, and what the preset has in the place of those that differ."""
    config = flat(variant.model_dump(mode="json"))
    preset = flat(PRESETS.get(variant.track, PRESETS["paper"])().model_dump(mode="json"))
    return {"config": config, "changed": {k: preset.get(k) for k, v in config.items() if preset.get(k) != v}}


def _shown(per_image: pa.Table, keys: Sequence[tuple[str, str]]) -> list[str]:
    """Return ids of the images that the site has pictures of, those that it shows as they come first."""
    data = arranged(per_image)
    order = [*range(min(SHOWN, len(data.image_ids))), *telling(data, keys)]
    return [data.image_ids[place] for place in list(dict.fromkeys(order))[:PICTURES]]


def _galleries(store: Store, stages: VariantStages, name: str, shown: Sequence[str]) -> list[Gallery]:
    folder = store.folder(stages.reconstruct)
    index = np.load(folder / "index.npy")
    table = pq.read_table(
        store.folder(stages.score) / "scores.parquet", filters=[("metric", "=", "PixCorr")]
    ).to_pylist()
    pixcorr = {(row["subject"], row["image_id"], row["variant"]): row["value"] for row in table}
    there = sorted(index.tolist(), key=lambda one: shown.index(str(one[1])) if str(one[1]) in shown else -1)
    galleries = []
    for subject, image in there:
        if str(image) not in shown:
            continue
        file = image_name(subject, image)
        galleries.append(
            Gallery(
                name,
                subject,
                image,
                folder / "seen" / seen_name(image),
                lowlevel=folder / "lowlevel" / file,
                semantic=folder / "semantic" / file,
                combined=folder / "combined" / file,
                pixcorr={kind: pixcorr[subject, image, kind] for kind in ("lowlevel", "semantic", "combined")},
            )
        )
    return galleries


def _relative(folder: Path, out: Path) -> str:
    return str(folder.relative_to(out)) if folder.is_relative_to(out) else str(folder)
