"""Transfer to a new subject: who shares what, which recordings are used, what is trained, and what is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmark import networks
from benchmark.config import QUICK, SMALLEST, Variant, demo, paper
from benchmark.context import StageContext
from benchmark.data.nsd import NSD
from benchmark.data.prepare import prepare as make_store
from benchmark.data.settings import SimulationSettings
from benchmark.data.simulate import simulate
from benchmark.errors import RunError, UserError
from benchmark.estimate import estimate
from benchmark.execute import RunOptions, execute
from benchmark.graph import Plan, Stage
from benchmark.progress import Progress
from benchmark.shards import Shards
from benchmark.stages import VariantStages, bit, transfer, variant_stages
from benchmark.stages.bit import build_bit, voxel_layout
from benchmark.stages.encoder import load_mapping
from benchmark.stages.prepare import TREE, Prepared
from benchmark.stages.transfer import FULL, MixedPool, NewSubject
from benchmark.store import CHECKPOINTS, Store
from benchmark.sweeps import load_sweep
from methods.brain_it.transfer import BIT_TABLE, ENCODER_TABLE, frozen_digest

pytestmark = pytest.mark.timeout(900)  # the first test that needs the finished transfer waits for it

NEW = 2  # held out
AMOUNTS = ("15min", "450", "30min", "1h", FULL)
SMALL = {
    **SMALLEST,
    "data.simulation.subjects": 3,
    "data.simulation.external": 30,
    "clustering.n_clusters": 12,
    "transfer.subject": NEW,
    "transfer.encoder.epochs": 2,
    "transfer.lowlevel.epochs": 1,
    "transfer.lowlevel.batch": 8,
    "transfer.semantic.epochs": 1,
    "transfer.semantic.batch": 8,
    "transfer.joint.epochs": 1,
    "transfer.joint.batch": 8,
}
OWN = ["transfer-encoder", "transfer-external", "transfer-clusters", "transfer-lowlevel", "transfer-semantic"]
OWN += ["transfer-joint", "transfer-reconstruct", "score"]
TABLES = ("encoder", "lowlevel", "semantic", "joint")


def variant(amount: str = "1h", **settings: Any) -> Variant:
    """A small variant; settings are dotted, with ``__`` for the dots."""
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    return demo().with_settings(QUICK).with_settings({**SMALL, "transfer.amount": amount, **dotted})


def plan(chosen: Variant) -> dict[str, Stage]:
    own = variant_stages(chosen, "x")
    return {stage.name: stage for stage in Plan.of([own.score, own.references]).stages}


class _NoTracker:
    def log(self, metrics: dict[str, float], step: int) -> None: ...
    def summary(self, values: dict[str, Any]) -> None: ...
    def image(self, name: str, path: Path) -> None: ...
    def finish(self, status: str) -> None: ...


@dataclass(frozen=True)
class Finished:
    """Two amounts, finished; every test may read them and none may change them."""

    store: Store
    stages: dict[str, VariantStages]

    def stage(self, name: str, amount: str = "1h") -> Stage:
        own = self.stages[amount]
        return {stage.name: stage for stage in (*own.chain, own.references)}[name]

    def folder(self, name: str, amount: str = "1h") -> Path:
        return self.store.folder(self.stage(name, amount))

    def table(self, name: str, amount: str = "1h") -> Tensor:
        return load_file(self.folder(f"transfer-{name}", amount) / "table.safetensors")["table"]

    def data(self, amount: str = "1h") -> NewSubject:
        return NewSubject(self.folder("transfer-data"), Prepared(self.folder("prepare")), amount)

    @property
    def nsd(self) -> NSD:
        return NSD.open(self.folder("simulate") / TREE)

    def context(self, stage: Stage, out: Path, **changes: Any) -> StageContext:
        """What the code of ``stage`` is handed when it writes to ``out``; ``changes`` are made to its config."""
        config = {**stage.config, **changes}
        out.mkdir(parents=True, exist_ok=True)
        return StageContext(
            stage=replace(stage, config=config),
            config=config,
            out=out,
            inputs={role: self.store.folder(upstream) for role, upstream in stage.upstream.items()},
            checkpoints=out / "checkpoints",
            tracker=_NoTracker(),
            progress=Progress(enabled=False),
            device="cpu",
            threads=1,
            checkpoint_seconds=1e9,
        )


def run(stages: VariantStages, store: Store, last: Stage | None = None) -> None:
    """Compute what is missing of a variant, up to one of its stages."""
    for stage in Plan.of([last or stages.references, *([] if last else [stages.score])]).stages:
        assert execute(stage, store, RunOptions(threads=1, progress=False)).state in ("done", "cached")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    store = Store(tmp_path_factory.mktemp("transfer") / "store")
    stages = {amount: variant_stages(variant(amount), f"amount={amount}") for amount in ("1h", FULL)}
    for own in stages.values():
        run(own, store)
    return Finished(store, stages)


# --- the stages -------------------------------------------------------------------------------------------------------


def test_the_sweep_is_the_papers() -> None:
    sweep = load_sweep("transfer")
    assert sweep.axis.setting == "transfer.amount" and sweep.axis.main == "1h"
    assert set(sweep.axis.values) == set(AMOUNTS) and sweep.base == {"transfer.subject": 1}
    tables = paper().transfer
    assert (tables.subject, tables.real_every) == (None, 4)
    found = {
        name: (own.epochs, own.batch, own.accumulate, own.optimiser.name, own.optimiser.lr, own.schedule.kind)
        for name in TABLES
        for own in [getattr(tables, name)]
    }
    assert found == {  # the official code
        "encoder": (30, 32, 1, "adam-amsgrad", 1e-3, "constant"),
        "lowlevel": (50, 64, 1, "adamw", 5e-4, "constant"),
        "semantic": (50, 128, 1, "adamw", 5e-4, "constant"),
        "joint": (200, 16, 4, "adamw", 1e-5, "constant"),
    }
    assert all(getattr(tables, name).optimiser.weight_decay is None for name in TABLES)


@pytest.mark.parametrize(
    ("batch", "accumulate", "epochs", "samples", "steps"),
    [(64, 1, 50, 4 * 675, 2110), (16, 4, 200, 2700, 8438), (8, 1, 3, 5, 2), (8, 1, 1, 8, 1)],
)
def test_epochs_follow_from_the_number_of_recordings(
    batch: int, accumulate: int, epochs: int, samples: int, steps: int
) -> None:
    """Every epoch is seen, and not a whole batch more."""
    table = paper().transfer.joint.model_copy(update={"batch": batch, "accumulate": accumulate, "epochs": epochs})
    training = table.training(samples, seed=5)
    assert training.total_steps == steps and training.seed == 5 and training.select is None
    assert 0 <= steps * batch * accumulate - samples * epochs < batch * accumulate
    assert -(-steps // training.epoch_steps) <= epochs


def test_the_amounts_share_the_base_models_and_what_the_networks_say() -> None:
    own = {amount: plan(variant(amount)) for amount in AMOUNTS}
    shared = {name for name in own["1h"] if len({own[amount][name].fingerprint for amount in AMOUNTS}) == 1}
    assert shared == set(own["1h"]) - set(OWN) - {"references"}
    assert {"transfer-data", "transfer-targets", "encoder", "joint", "lowlevel"} <= shared
    assert all(len({own[amount][name].fingerprint for amount in AMOUNTS}) == 5 for name in OWN)


def test_the_base_models_are_the_ordinary_stages_over_other_data() -> None:
    """Nothing but the data differs: no setting of a transfer reaches them, nor do they reconstruct."""
    ordinary = plan(variant(transfer__subject=None, generation__subjects=(NEW,)))
    own = plan(variant())
    assert own["prepare"].config == {**ordinary["prepare"].config, "leave_out": NEW}
    base = ("targets", "encoder", "external", "clusters", "lowlevel", "semantic", "joint")
    for name in base:
        ours, theirs = own[name], ordinary[name]
        assert (ours.config, ours.digests, ours.run) == (theirs.config, theirs.digests, theirs.run)
        assert ours.fingerprint != theirs.fingerprint
    assert "reconstruct" not in own and own["simulate"].fingerprint == ordinary["simulate"].fingerprint
    assert own["transfer-reconstruct"].config == ordinary["reconstruct"].config
    assert own["score"].config == ordinary["score"].config
    assert not set(ordinary) & set(OWN) - {"score"}


@pytest.mark.parametrize(
    ("setting", "value", "again"),
    [
        ("transfer.subject", 1, None),
        ("transfer.encoder.epochs", 3, {*OWN}),
        ("transfer.lowlevel.optimiser.lr", 0.1, {"transfer-lowlevel", "transfer-reconstruct", "score"}),
        ("transfer.semantic.batch", 9, {"transfer-semantic", "transfer-joint", "transfer-reconstruct", "score"}),
        ("transfer.joint.epochs", 3, {"transfer-joint", "transfer-reconstruct", "score"}),
        (
            "transfer.real_every",
            3,
            {"transfer-lowlevel", "transfer-semantic", "transfer-joint", "transfer-reconstruct", "score"},
        ),
        ("dip.steps", 3, {"transfer-reconstruct", "score"}),
    ],
)
def test_a_setting_runs_again_what_it_changes_and_no_more(setting: str, value: Any, again: set[str] | None) -> None:
    before, after = plan(variant()), plan(variant().with_settings({setting: value}))
    changed = {name for name in before if before[name].fingerprint != after[name].fingerprint}
    assert changed == (set(before) - {"simulate"} if again is None else {*again, "references"})


def test_without_a_new_subject_the_settings_change_nothing() -> None:
    settings = {"transfer.amount": "15min", "transfer.joint.epochs": 7}
    one, other = demo(), demo().with_settings(settings)
    assert {n: s.fingerprint for n, s in plan(one).items()} == {n: s.fingerprint for n, s in plan(other).items()}


def test_the_estimate_knows_every_stage_and_grows_with_the_amount() -> None:
    hours = []
    for amount in AMOUNTS:
        full = paper().with_settings({"transfer.subject": 1, "transfer.amount": amount})
        stages = Plan.of([variant_stages(full, "x", "d" * 64, absent="missing").score]).stages
        costs = {stage.name: estimate(stage, full) for stage in stages}
        assert {name for name, cost in costs.items() if not cost.disk} == {"transfer-clusters"}
        hours.append(costs["transfer-joint"].gpu_hours)
        assert costs["transfer-semantic"].disk < costs["semantic"].disk / 8, "a table is kept, not a model"
    order = [hours[AMOUNTS.index(amount)] for amount in ("15min", "30min", "450", "1h", FULL)]
    assert order == sorted(order) and order[3] == pytest.approx(40 * 200 * 4 * 675 / (10 * 2900 * 64))


def test_the_new_subject_is_who_is_reconstructed() -> None:
    chosen = demo().with_settings({"transfer.subject": 5, "generation.subjects": [1, 2]})
    assert chosen.generation.subjects == (5,) and Variant.model_validate(chosen.model_dump()) == chosen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transfer.amount": "2h"}, "transfer.amount: Input should be 'full', '1h', '30min', '15min' or '450'"),
        ({"transfer.amount": True}, "transfer.amount: Input should be"),
        ({"joint.enabled": False}, "transfer.subject needs BITs in both branches, and joint training"),
        ({"lowlevel.predictor": "ridge"}, "transfer.subject needs BITs in both branches"),
        ({"generation.test_set": "nsd-synthetic"}, "transfer.subject needs generation.test_set 'nsd'"),
        ({"transfer.subject": 0}, "transfer.subject: Input should be greater than 0"),
    ],
)
def test_what_is_no_transfer_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        variant().with_settings(settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert variant().with_settings({"transfer.amount": 450}).transfer.amount == "450", "as YAML reads it"


# --- the data ---------------------------------------------------------------------------------------------------------


def test_the_base_models_never_meet_the_new_subject(finished: Finished) -> None:
    data, new = Prepared(finished.folder("prepare")), finished.data(FULL)
    assert data.subjects == (1, 3) and new.subjects == (NEW,)
    assert not np.isin(new.seen_ids[0], data.target_ids).any(), "nor an image of its own"
    assert len(data.betas) == 2 and not (data.folder / f"betas_subj{NEW}.npy").exists()
    assert load_mapping(finished.folder("clusters")).labels.shape == (sum(data.n_voxels),)


def test_single_trials_of_the_first_session_in_order(finished: Finished) -> None:
    """Not averaged, z-scored over the session, shared images gone; less is a beginning of more."""
    nsd = finished.nsd
    ids, betas = nsd.trials(NEW)[0], nsd.session_betas(NEW, 1)
    raw = nsd.load_betas(NEW, average=False, sessions=[1])
    np.testing.assert_allclose(raw.betas.mean(0), 0, atol=1e-5)
    assert np.array_equal(raw.betas, betas)
    own = ~np.isin(ids, nsd.shared_ids)
    parts = {"15min": 1 / 4, "30min": 1 / 2, "450": 3 / 5, "1h": 1}
    for amount, part in parts.items():
        data = finished.data(amount)
        shown = int(np.ceil(part * len(ids) - 1e-9))
        samples = data.samples(data.train_ids)
        assert data.shown == shown and len(samples) == own[:shown].sum() < shown or not (~own[:shown]).any()
        assert np.array_equal(samples.image, ids[:shown][own[:shown]])
        assert np.array_equal(data.betas[0][samples.row], betas[:shown][own[:shown]])
        assert data.used() == {"trials shown": shown, "recordings": len(samples), "images": len(data.train_ids)}
    assert (~own).any(), "this session shows shared images"


def test_of_nsds_sessions_the_amounts_are_the_published_numbers() -> None:
    from benchmark.data.splits import select_trials

    session = np.arange(750)
    counts = {
        amount: select_trials(session, np.array([-1]), 1, transfer.session_amount(amount)).shown
        for amount in AMOUNTS
        if amount != FULL
    }
    assert counts == {"15min": 188, "450": 450, "30min": 375, "1h": 750}


def test_full_is_the_average_of_every_image_of_its_own(finished: Finished) -> None:
    data, nsd = finished.data(FULL), finished.nsd
    seen = nsd.load_betas(NEW)
    own = ~np.isin(seen.image_ids, nsd.shared_ids)
    samples = data.samples(data.train_ids)
    assert data.shown is None and np.array_equal(samples.image, seen.image_ids[own])
    assert np.array_equal(data.betas[0][samples.row], seen.betas[own])
    assert "trials shown" not in data.used() and data.used()["recordings"] == own.sum()


def test_external_images_keep_their_place(finished: Finished) -> None:
    data = finished.data()
    rows = len(data.target_ids) + np.array([3, 0])
    assert np.array_equal(data.target_images(rows), data.base.external[[3, 0]])
    assert np.array_equal(data.base.target_images(data.in_base(rows)), data.base.external[[3, 0]])


def test_a_store_gives_the_same_recordings(finished: Finished, tmp_path: Path) -> None:
    tree = finished.folder("simulate") / TREE
    make_store(tree, tmp_path / "store", parts=["betas", "images", "external"], sizes=[64])
    stage = finished.stage("transfer-data")
    ctx = finished.context(stage, tmp_path / "out")
    inputs = {"base": ctx.inputs["base"]}
    summary = transfer.run_data(replace(ctx, inputs=inputs, data=tmp_path / "store"))
    assert summary == finished.store.status(stage)["summary"]
    for name in (f"trials_subj{NEW}.npy", f"betas_subj{NEW}.npy"):
        ours, theirs = np.load(tmp_path / "out" / name), np.load(finished.folder("transfer-data") / name)
        np.testing.assert_allclose(ours.astype(np.float32), theirs, atol=5e-3)
    for name in (f"trial_ids_subj{NEW}.npy", f"ids_subj{NEW}.npy", "images.npy"):
        assert np.array_equal(np.load(tmp_path / "out" / name), np.load(finished.folder("transfer-data") / name))
    assert json.loads((tmp_path / "out/meta.json").read_text()) == json.loads(
        (finished.folder("transfer-data") / "meta.json").read_text()
    )


@pytest.fixture(scope="module")
def algonauts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was made of the Algonauts release of a simulated brain."""
    folder = tmp_path_factory.mktemp("algonauts")
    settings = SimulationSettings(
        subjects=2, size=32, shared=8, unique=22, external=6, voxels=80, sessions=3, repeats=2
    )
    tree = simulate(folder / "tree", settings, workers=1, complete=True).root
    return make_store(tree, folder / "store", parts=["betas", "images", "external"], source="algonauts").data.root


def test_averages_alone_are_refused_before_anything_runs(
    algonauts: Path, sweep_here: Callable[..., Any], tmp_path: Path
) -> None:
    answer = sweep_here(
        "transfer", "--quick", "--data", algonauts, "--out", tmp_path / "runs", "--set=data.image_size=32"
    )
    assert answer.code == 2 and "Algonauts 2023 release" in answer.error and "single trials" in answer.error
    assert len(answer.error.splitlines()) == 2 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["transfer.subject=7"], "transfer.subject is 7; the simulation has subjects 1, 2, 3, 4"),
        (["transfer.amount=1h"], "sweep transfer varies transfer.amount itself"),
    ],
)
def test_a_wrong_call_is_answered_in_two_lines(
    sweep_here: Callable[..., Any], tmp_path: Path, settings: list[str], message: str
) -> None:
    answer = sweep_here(
        "transfer", "--quick", "--dry-run", "--out", tmp_path, *(f"--set={setting}" for setting in settings)
    )
    assert answer.code == 2 and message in answer.error and len(answer.error.splitlines()) <= 2


def test_somebody_else_is_needed(finished: Finished, tmp_path: Path) -> None:
    nsd = NSD.open(finished.folder("simulate") / TREE, subjects=[NEW])
    with pytest.raises(UserError, match=f"transfer.subject is {NEW}, and the data have nobody else"):
        transfer.first_session(nsd, NEW)
    with pytest.raises(UserError, match="transfer.subject is 1; the data have subjects 2"):
        transfer.first_session(nsd, 1)


# --- what is trained --------------------------------------------------------------------------------------------------


def test_a_voxel_takes_the_cluster_of_the_nearest_known_one(finished: Finished) -> None:
    known = load_file(finished.folder("encoder") / "encoder.safetensors")[ENCODER_TABLE]
    new = finished.table("encoder")
    unit = [x / x.norm(dim=1, keepdim=True) for x in (new, known)]
    nearest = torch.cdist(unit[0].double(), unit[1].double()).argmin(1).numpy()
    folder = finished.folder("transfer-clusters")
    assert np.array_equal(np.load(folder / "nearest.npy"), nearest)
    base, mapping = load_mapping(finished.folder("clusters")), load_mapping(folder)
    assert np.array_equal(mapping.labels, base.labels[nearest]) and mapping.n_clusters == base.n_clusters
    assert len(mapping.labels) == finished.data().n_voxels[0]


@pytest.mark.parametrize("role", ["lowlevel", "semantic", "joint"])
def test_a_table_starts_at_the_nearest_known_voxels_or_at_the_stage_before(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    starts: list[Tensor] = []

    def fit(ctx: Any, model: Any, table: Tensor, *rest: Any, **more: Any) -> dict[str, Any]:
        starts.append(table.detach().clone())
        return {}

    monkeypatch.setattr(transfer, "fit_table", fit)
    getattr(transfer, f"run_{role}")(finished.context(finished.stage(f"transfer-{role}"), tmp_path))
    if role == "joint":
        assert torch.equal(starts[0], finished.table("semantic"))
    else:
        known = load_file(finished.folder(role) / "bit.safetensors")[BIT_TABLE]
        assert torch.equal(starts[0], known[np.load(finished.folder("transfer-clusters") / "nearest.npy")])
    assert not torch.equal(starts[0], finished.table(role)), "and it learns"


def frozen_of_base(finished: Finished, role: str) -> str:
    """The digest of the base models' weights, from what their stages wrote."""
    if role == "encoder":
        from benchmark.stages.encoder import EncoderWithAdapters
        from benchmark.stages.features import encoder_taps

        config, data = finished.stage("encoder").config, Prepared(finished.folder("prepare"))
        model: torch.nn.Module = EncoderWithAdapters(
            config, data, encoder_taps(config, data, finished.folder("targets"), "cpu")
        )
        model.load(finished.folder("encoder") / "encoder.safetensors")
        model.requires_grad_(False)
        model.encoder.voxel_embedding.requires_grad_(True)
        return frozen_digest(model)
    stage = finished.stage(role)
    trained = load_file(finished.folder(role) / "bit.safetensors")
    layout = voxel_layout(Prepared(finished.folder("prepare")), finished.folder("clusters"))
    sizes = stage.config["bit"] if role == "joint" else stage.config
    own = build_bit(sizes, layout, len(trained["query_tokens"]), len(trained["proj.bias"]))
    own.load_state_dict(trained)
    own.requires_grad_(False)
    own.tokenizer.voxel_embeddings.requires_grad_(True)
    if role != "joint":
        return frozen_digest(own)
    unet = networks.generator(stage.config["generator"], unet=finished.folder("joint") / "unet.safetensors").unet
    assert isinstance(unet, torch.nn.Module)
    return frozen_digest(bit.BrainToImage(own, unet.requires_grad_(False)))


@pytest.mark.parametrize("amount", ["1h", FULL])
@pytest.mark.parametrize("role", TABLES)
def test_what_is_frozen_is_the_base_models_to_the_bit(finished: Finished, role: str, amount: str) -> None:
    """The digest that a stage took after its training is that of the weights which the base model's stage wrote."""
    stage = finished.stage(f"transfer-{role}", amount)
    summary = finished.store.status(stage)["summary"]
    assert summary["frozen"] == frozen_of_base(finished, role)
    table = finished.table(role, amount)
    assert summary["parameters"] == table.numel() and len(table) == finished.data().n_voxels[0]
    assert table.isfinite().all() and np.isfinite(summary["loss"])
    kept = {path.name for path in finished.folder(f"transfer-{role}", amount).glob("*.safetensors")}
    assert kept == {"table.safetensors"}, "and the table is all that is kept"


def test_training_moves_no_frozen_weight(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As before, by the weights themselves instead of a digest."""
    seen: list[dict[str, Tensor]] = []
    train = transfer.train

    def watched(model: torch.nn.Module, *rest: Any, **more: Any) -> Any:
        copy = lambda: {name: value.detach().clone() for name, value in model.state_dict().items()}  # noqa: E731
        seen.append(copy())
        result = train(model, *rest, **more)
        seen.append(copy())
        return result

    monkeypatch.setattr(transfer, "train", watched)
    transfer.run_joint(finished.context(finished.stage("transfer-joint"), tmp_path))
    before, after = seen
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"bit.{BIT_TABLE}"} and len(before) > 100
    assert torch.equal(load_file(tmp_path / "table.safetensors")["table"], after[f"bit.{BIT_TABLE}"])
    assert torch.equal(after[f"bit.{BIT_TABLE}"], finished.table("joint")), "the same again, to the bit"


def test_a_table_is_not_kept_if_anything_else_changed(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = transfer.train

    def careless(model: torch.nn.Module, *rest: Any, **more: Any) -> Any:
        result = train(model, *rest, **more)
        with torch.no_grad():
            model.query_tokens[0, 0] += 1e-6
        return result

    monkeypatch.setattr(transfer, "train", careless)
    with pytest.raises(RunError, match="a frozen weight changed"):
        transfer.run_semantic(finished.context(finished.stage("transfer-semantic"), tmp_path))
    assert not (tmp_path / "table.safetensors").exists()


def test_training_lowers_the_loss(finished: Finished, tmp_path: Path) -> None:
    for role in ("encoder", "lowlevel", "semantic"):
        stage = finished.stage(f"transfer-{role}")
        table = {**stage.config["table"], "epochs": 60}
        changes = {} if role == "encoder" else {"real_every": 1}  # the recordings alone can be learnt by heart
        ctx = finished.context(stage, tmp_path / role, table=table, **changes)
        summary = getattr(transfer, f"run_{role}")(ctx)
        assert summary["loss"] < summary["first epoch's loss"], role
        assert summary["recordings"] == len(finished.data().samples(finished.data().train_ids))
        if role == "encoder":
            assert summary["correlation (training)"] > 0.1


def test_the_table_follows_from_the_seed(finished: Finished, tmp_path: Path) -> None:
    for role in ("encoder", "semantic"):
        stage = finished.stage(f"transfer-{role}")
        getattr(transfer, f"run_{role}")(finished.context(stage, tmp_path / role / "same"))
        getattr(transfer, f"run_{role}")(finished.context(stage, tmp_path / role / "other", seed=1))
        same, other = (load_file(tmp_path / role / n / "table.safetensors")["table"] for n in ("same", "other"))
        assert torch.equal(same, finished.table(role)) and not torch.equal(other, same)


# --- what it is trained on --------------------------------------------------------------------------------------------


def pool(finished: Finished, out: Path, amount: str = "1h", **changes: Any) -> tuple[NewSubject, MixedPool]:
    ctx = finished.context(finished.stage("transfer-semantic", amount), out, **changes)
    data = NewSubject.of(ctx)
    return data, MixedPool(ctx, data)


@pytest.mark.parametrize("amount", ["1h", FULL])
def test_one_sample_in_four_is_a_recording(finished: Finished, tmp_path: Path, amount: str) -> None:
    data, mixed = pool(finished, tmp_path, amount)
    real, size = len(mixed.samples), 8
    assert mixed.epoch == 4 * real
    batches = [mixed.draw(size, step, torch.Generator().manual_seed(step)) for step in range(mixed.epoch // size)]
    rows = np.concatenate([batch.rows for batch in batches])
    betas = torch.cat([batch.betas for batch in batches]).numpy()
    own = rows < len(data.target_ids)
    assert abs(int(own.sum()) - len(rows) / 4) <= size
    predicted = Shards(finished.folder("transfer-external", amount) / "betas")
    assert predicted.shape == (30, data.n_voxels[0])
    assert np.array_equal(betas[~own], predicted[rows[~own] - len(data.target_ids)].astype(np.float32))
    known = {betas.tobytes() for betas in data.betas[0][mixed.samples.row]}
    drawn = [recording.tobytes() for recording in betas[own]]
    assert set(drawn) <= known and len(set(drawn)) == len(drawn), "each recording once an epoch"
    for recording, row in zip(betas[own], rows[own], strict=True):
        candidates = data.betas[0][data.seen_ids[0] == data.target_ids[row]]
        assert (candidates == recording).all(1).any(), "of the image that it is a target of"


def test_without_external_images_the_recordings_are_all(finished: Finished, tmp_path: Path) -> None:
    data, mixed = pool(finished, tmp_path, external_used=0.0)
    assert mixed.epoch == len(mixed.samples)
    assert (mixed.draw(40, 0, torch.Generator()).rows < len(data.target_ids)).all()
    data, mixed = pool(finished, tmp_path, external_used=0.1)
    rows = np.concatenate([mixed.draw(8, step, torch.Generator()).rows for step in range(12)])
    assert len(np.unique(rows[rows >= len(data.target_ids)])) == 3


def test_each_image_has_its_own_targets(finished: Finished, tmp_path: Path) -> None:
    """Own images by the new subject's targets, external ones by the base models', on the base models' scale."""
    stage = finished.stage("transfer-lowlevel")
    ctx = finished.context(stage, tmp_path)
    data = NewSubject.of(ctx)
    own, base = finished.folder("transfer-targets"), finished.folder("targets")
    rows = np.array([2, len(data.target_ids) + 5, 0, len(data.target_ids)])
    external = len(data.base.target_ids) + np.array([5, 0])
    semantic = transfer._Semantic(finished.context(finished.stage("transfer-semantic"), tmp_path), data)(rows)
    stored = Shards(own / "semantic")[[2, 0]], Shards(base / "semantic")[external]
    assert torch.equal(semantic[[0, 2]], torch.from_numpy(stored[0]).float())
    assert torch.equal(semantic[[1, 3]], torch.from_numpy(stored[1]).float())

    from benchmark.stages.features import LowLevelTargets

    low = transfer._LowLevel(ctx, data)
    scale = LowLevelTargets(base, stage.config)
    maps = [torch.from_numpy(Shards(own / f"lowlevel_{k}")[[2, 0]]).float() for k in range(5)]
    found = low(rows)
    assert torch.equal(found[[0, 2]], scale.tokens.merge(scale.standardised(maps)))
    assert torch.equal(found[[1, 3]], scale(external))
    assert not torch.equal(found[[0, 2]], LowLevelTargets(own, stage.config)(np.array([2, 0])))
    assert torch.equal(low(rows[[1]]), found[[1]]) and torch.equal(low(rows[[0]]), found[[0]])


@pytest.mark.slow
def test_live_backbones_and_targets_train_too(finished: Finished, tmp_path: Path) -> None:
    """The paper's way: trained adapters, shifted images, targets and predictions made when they are asked for."""
    live = variant(
        encoder__adapter_rank=2,
        encoder__max_shift=1,
        targets__semantic="live",
        targets__lowlevel="live",
        targets__external="live",
        lowlevel__standardise=False,
        lowlevel__centre=False,
        lowlevel__voxels_per_example=40,
        transfer__encoder__epochs=1,
    )
    stages = variant_stages(live, "live")
    store = Store(tmp_path / "store")
    (store.folder(stages.prepare.upstream["nsd"]).parent).mkdir(parents=True)
    store.folder(stages.prepare.upstream["nsd"]).symlink_to(finished.folder("simulate"))
    assert stages.lowlevel is not None and stages.semantic is not None
    for stage in (stages.lowlevel, stages.semantic):
        run(stages, store, stage)
        assert set(load_file(store.folder(stage) / "table.safetensors")) == {"table"}
    assert not (store.folder(stages.lowlevel.upstream["external"]) / "betas").exists()

    ctx = replace(
        finished.context(stages.semantic, tmp_path / "out"),
        inputs={role: store.folder(upstream) for role, upstream in stages.semantic.upstream.items()},
    )
    data = NewSubject.of(ctx)
    drawn = MixedPool(ctx, data).draw(8, 0, torch.Generator())
    external = drawn.rows >= len(data.target_ids)
    predict = transfer.NewPredictor(ctx, stages.lowlevel.upstream["external"].config, data)
    assert external.any()
    torch.testing.assert_close(drawn.betas[external], predict(drawn.rows[external], [0])[0])


# --- reconstruction ---------------------------------------------------------------------------------------------------


def test_the_tables_stand_in_the_base_models_when_images_are_made(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[StageContext] = []
    monkeypatch.setattr(transfer.reconstruct, "run", lambda ctx: handed.append(ctx) or {})
    transfer.run_reconstruct(finished.context(finished.stage("transfer-reconstruct"), tmp_path))
    (ctx,) = handed
    for role in ("lowlevel", "joint"):
        made, base = (load_file(folder / "bit.safetensors") for folder in (ctx.inputs[role], finished.folder(role)))
        assert torch.equal(made.pop(BIT_TABLE), finished.table(role)) and base.pop(BIT_TABLE) is not None
        assert made.keys() == base.keys() and all(torch.equal(made[name], base[name]) for name in made)
    for role, name in (("joint", "unet"), ("lowlevel", "calibration")):
        file = f"{name}.safetensors"
        assert (ctx.inputs[role] / file).read_bytes() == (finished.folder(role) / file).read_bytes()
    transfer.run_reconstruct(finished.context(finished.stage("transfer-reconstruct"), tmp_path))  # after a kill


def test_the_new_subjects_images_are_reconstructed_and_scored(finished: Finished) -> None:
    folders = [finished.folder("transfer-reconstruct", amount) for amount in ("1h", FULL)]
    shared = Prepared(finished.folder("transfer-data")).test_ids([NEW])
    for folder in folders:
        index = np.load(folder / "index.npy")
        assert (index[:, 0] == NEW).all() and np.array_equal(index[:, 1], shared[: len(index)])
        assert len(list((folder / "combined").glob("*.png"))) == len(index) == SMALL["generation.test_images"]
        assert not list(folder.glob("**/bit.safetensors")), "no second copy of the base models is kept"
    one, other = ({p.name: p.read_bytes() for p in (f / "combined").glob("*.png")} for f in folders)
    assert one.keys() == other.keys() and one != other
    about = json.loads((finished.folder("score") / "protocol.json").read_text())
    assert about["subjects"] == [NEW]
    assert "reference shuffled PixCorr" in finished.store.status(finished.stage("references"))["summary"]


# --- resuming ---------------------------------------------------------------------------------------------------------

KILL_AT = 2
SCRIPT = """
import json, os, signal, sys
from benchmark.execute import RunOptions, execute
from benchmark.graph import Stage
from benchmark import training
from benchmark.store import Store

take = training._Batches.take
def deadly(self, step):
    if step == {kill_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return take(self, step)
training._Batches.take = deadly
stage = Stage.from_dict(json.load(open(sys.argv[2])))
execute(stage, Store(sys.argv[1]), RunOptions(threads=1, progress=False, checkpoint_seconds=0.0))
"""


@pytest.mark.parametrize("role", ["lowlevel", pytest.param("joint", marks=pytest.mark.slow)])
def test_kill_9_in_the_middle_gives_the_same_table(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    stage = finished.stage(f"transfer-{role}")
    store = Store(tmp_path / "store")
    for upstream in Plan.of([stage]).stages[:-1]:
        store.folder(upstream).parent.mkdir(parents=True, exist_ok=True)
        store.folder(upstream).symlink_to(finished.store.folder(upstream))
    (tmp_path / "stage.json").write_text(json.dumps(stage.to_dict()))
    killed = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(kill_at=KILL_AT), str(store.root), str(tmp_path / "stage.json")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    state = store.state(stage)
    assert state.kind == "interrupted" and state.resumable
    for checkpoint in (store.folder(stage) / CHECKPOINTS).rglob("*.safetensors"):
        names = set(load_file(checkpoint))
        assert {name for name in names if name.startswith("model/")} and len(names) <= 4, "the table and its moments"

    steps: list[int] = []
    draw = MixedPool.draw
    monkeypatch.setattr(MixedPool, "draw", lambda self, size, step, g: steps.append(step) or draw(self, size, step, g))
    assert execute(stage, store, RunOptions(threads=1, progress=False)).state == "done"
    assert steps[0] == KILL_AT, "it goes on from the last checkpoint"
    assert len(steps) > 1
    resumed = (store.folder(stage) / "table.safetensors").read_bytes()
    assert resumed == (finished.folder(f"transfer-{role}") / "table.safetensors").read_bytes()
    assert store.status(stage)["summary"] == finished.store.status(finished.stage(f"transfer-{role}"))["summary"]
