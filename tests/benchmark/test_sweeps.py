"""The sweeps' files, and which stages a changed setting runs again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmark import stages as stages_module
from benchmark import sweeps
from benchmark.config import PRESETS, Variant, demo
from benchmark.errors import UserError
from benchmark.graph import Plan, Resources, Stage
from benchmark.stages import variant_stages
from benchmark.sweeps import Sweep, load_sweep, sweep_names

GOOD: dict[str, Any] = {
    "title": "How wide?",
    "question": "Does width matter?",
    "answers": "nothing",
    "base": {"lowlevel.depth": 1},
    "axis": {"name": "width", "setting": "lowlevel.dim", "values": [8, 16], "quick": [8], "main": 8},
}


# --- the files --------------------------------------------------------------------------------------------------------


def test_the_cluster_sweep_is_the_papers() -> None:
    sweep = load_sweep("clusters")
    assert sweep.axis.values == (8, 16, 32, 64, 128, 256, 512)
    assert sweep.axis.quick == (8, 32, 128) and sweep.axis.main == 128 and sweep.axis.log
    assert sweep.axis.setting == "clustering.n_clusters" and sweep.answers.startswith("Table T3")
    assert list(sweep.settings()) == [f"clusters={n}" for n in sweep.axis.values]
    assert sweep.settings(quick=True)["clusters=32"] == {"clustering.n_clusters": 32}


@pytest.mark.parametrize("name", sweep_names())
@pytest.mark.parametrize("preset", PRESETS)
def test_every_sweep_makes_variants_that_differ(name: str, preset: str) -> None:
    sweep = load_sweep(name)
    for quick in (False, True):
        variants = [PRESETS[preset]().with_settings(settings) for settings in sweep.settings(quick).values()]
        assert len({variant.model_dump_json() for variant in variants}) == len(variants)
        assert sweep.variant(sweep.axis.main) in sweep.settings(quick), "the reference variant always runs"


def test_only_some_of_a_sweeps_values() -> None:
    sweep = load_sweep("clusters")
    some = sweep.only(["128", "16"])
    assert list(some.settings()) == list(some.settings(quick=True)) == ["clusters=16", "clusters=128"]
    assert some.axis.main == 128 and sweep.only(["64", "32"]).axis.main == 32
    assert sweep.only(list(map(str, sweep.axis.values))).settings() == sweep.settings()
    with pytest.raises(UserError, match="--only 100: sweep clusters has 8, 16, 32"):
        sweep.only(["100"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sweeps, "FOLDER", tmp_path)
    return tmp_path


def write(folder: Path, **changes: Any) -> None:
    (folder / "width.yaml").write_text(yaml.safe_dump({**GOOD, **changes}, sort_keys=False))


NAMED: dict[str, Any] = {
    "name": "kind",
    "variants": {"small": {"lowlevel.dim": 8, "semantic.dim": 8}, "tall": {"lowlevel.depth": 9}, "plain": None},
    "main": "plain",
}


def test_values_that_are_no_numbers_may_have_places_in_plots(folder: Path) -> None:
    named = {"name": "amount", "setting": "transfer.amount", "values": ["1h", "15min"], "quick": ["1h"], "main": "1h"}
    write(folder, axis={**named, "positions": {"1h": 60}, "unit": "minutes of data"})
    axis = load_sweep("width").axis
    assert (axis.position("1h"), axis.position("15min"), axis.unit) == (60.0, None, "minutes of data")
    write(folder)
    assert load_sweep("width").axis.position(16) == 16.0
    write(folder, axis={**named, "positions": {"2h": 120}})
    with pytest.raises(UserError, match=r"axis.positions has '2h', which is not among axis.values"):
        load_sweep("width")


def test_an_axis_may_name_sets_of_settings(folder: Path) -> None:
    write(folder, axis=NAMED)
    sweep = load_sweep("width")
    assert sweep.axis.values == sweep.axis.quick == ("small", "tall", "plain")
    assert sweep.axis.varied == ("lowlevel.dim", "semantic.dim", "lowlevel.depth")
    assert sweep.settings() == sweep.settings(quick=True)
    assert sweep.settings() == {
        "kind=small": {"lowlevel.depth": 1, "lowlevel.dim": 8, "semantic.dim": 8},
        "kind=tall": {"lowlevel.depth": 9},
        "kind=plain": {"lowlevel.depth": 1},
    }
    some = sweep.only(["plain", "small"])
    assert list(some.settings()) == ["kind=small", "kind=plain"] and some.axis.main == "plain"
    assert (
        sweep.only(["tall"]).axis.main == "tall" and sweep.only(["tall"]).settings()["kind=tall"]["lowlevel.depth"] == 9
    )
    write(folder, axis={**NAMED, "quick": ["tall", "plain"]})
    assert list(load_sweep("width").settings(quick=True)) == ["kind=tall", "kind=plain"]


def test_a_sweep_is_read_from_its_file(folder: Path) -> None:
    write(folder)
    sweep = load_sweep("width")
    assert isinstance(sweep, Sweep) and sweep_names() == ["width"] == [sweep.name]
    assert sweep.settings() == {
        "width=8": {"lowlevel.depth": 1, "lowlevel.dim": 8},
        "width=16": {"lowlevel.depth": 1, "lowlevel.dim": 16},
    }
    assert list(sweep.settings(quick=True)) == ["width=8"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"title": None}, "width.yaml: title: Input should be a valid string"),
        ({"axes": 3}, "width.yaml: axes: Extra inputs are not permitted"),
        ({"axis": {**GOOD["axis"], "values": []}}, "width.yaml: axis.values: Tuple should have at least 1 item"),
        ({"axis": {**GOOD["axis"], "quick": [9]}}, "width.yaml: axis.quick has 9, which is not among axis.values"),
        ({"axis": {k: v for k, v in GOOD["axis"].items() if k != "main"}}, "width.yaml: axis.main: Field required"),
        ({"axis": {**GOOD["axis"], "main": 9}}, "width.yaml: axis.main has 9, which is not among axis.values"),
        (
            {"axis": {k: v for k, v in GOOD["axis"].items() if k != "setting"}},
            "width.yaml: axis: give setting and values, or variants",
        ),
        (
            {"axis": {**NAMED, "setting": "lowlevel.dim"}},
            "width.yaml: axis: variants take the place of setting, values and log",
        ),
        ({"axis": {**NAMED, "variants": ["a"]}}, "width.yaml: axis.variants: Input should be a valid dictionary"),
        ({"axis": {**NAMED, "variants": {}}}, "width.yaml: axis.values: Tuple should have at least 1 item"),
        ({"axis": {**NAMED, "variants": {"a": 3}, "main": "a"}}, "width.yaml: axis.variants.a: Input should be"),
        ({"axis": {**NAMED, "main": "large"}}, "width.yaml: axis.main has 'large', which is not among axis.values"),
        ({"axis": {**NAMED, "quick": ["tal"]}}, "width.yaml: axis.quick has 'tal', which is not among axis.values"),
    ],
)
def test_a_wrong_file_is_named_with_its_field(folder: Path, changes: dict[str, Any], message: str) -> None:
    write(folder, **changes)
    with pytest.raises(UserError) as caught:
        load_sweep("width")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- 3\n", "title: [\n", "just words"])
def test_a_file_that_is_no_sweep_is_named(folder: Path, text: str) -> None:
    (folder / "width.yaml").write_text(text)
    with pytest.raises(UserError, match=r"width\.yaml"):
        load_sweep("width")


def test_an_unknown_name_gets_the_nearest(folder: Path) -> None:
    write(folder)
    for wrong, hint in (
        ("widht", "did you mean 'width'?"),
        ("lst", "did you mean 'list'?"),
        ("qqq", "choose from width"),
    ):
        with pytest.raises(UserError, match=f"unknown sweep '{wrong}'.*{hint[:-1]}"):
            load_sweep(wrong)
    with pytest.raises(UserError, match="unknown sweep '../width'"):
        load_sweep("../width")


def test_a_sweep_may_lie_anywhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder)
    own = tmp_path / "elsewhere"
    own.mkdir()
    for name in ("my-own", "width", "run", "My Own"):
        (own / f"{name}.yaml").write_text((folder / "width.yaml").read_text())
    sweep = load_sweep(str(own / "my-own.yaml"))
    assert sweep.name == "my-own" and sweep.settings() == load_sweep("width").settings()
    assert sweep_names() == ["width"], "a list of what comes with the project"
    monkeypatch.chdir(own)
    assert load_sweep("my-own.yaml") == sweep
    assert load_sweep(str(folder / "width.yaml")).name == "width"
    for wrong in ("width", "run", "My Own"):
        with pytest.raises(UserError, match=rf"{wrong}.yaml: a sweep is called as its file, so not '{wrong}'"):
            load_sweep(f"{wrong}.yaml")
    with pytest.raises(UserError, match=r"none.yaml: no such file; a sweep of sweeps/ goes by its name: width"):
        load_sweep("none.yaml")
    (own / "my-own.yaml").write_text("title: [")
    with pytest.raises(UserError, match=r"my-own.yaml: not a sweep"):
        load_sweep("my-own.yaml")


# --- what runs again --------------------------------------------------------------------------------------------------

ORDER = ["simulate", "prepare", "targets", "encoder", "external", "clusters", "lowlevel", "semantic", "joint"]
ORDER += ["reconstruct", "score", "references"]
BELOW_DATA = set(ORDER) - {"simulate"}
BELOW_ENCODER = set(ORDER) - {"simulate", "prepare", "targets"}
BELOW_CLUSTERS = BELOW_ENCODER - {"encoder", "external"}
IMAGES = {"reconstruct", "score", "references"}


def plan(variant: Variant, label: str = "x", digest: str | None = None) -> dict[str, Stage]:
    own = variant_stages(variant, label, digest)
    return {stage.name: stage for stage in Plan.of([own.score, own.references]).stages}


@pytest.mark.parametrize(
    ("path", "value", "again"),
    [
        ("data.simulation.seed", 1, set(ORDER)),
        ("data.image_size", 32, BELOW_DATA),
        ("data.validation_seed", 1, BELOW_DATA),
        ("data.external_images", 3, BELOW_DATA),
        ("lowlevel.layers", ["block0", "block1", "block2", "block3", "block5"], BELOW_DATA - {"prepare"}),
        ("encoder.taps", [1, 2], BELOW_DATA - {"prepare"}),
        ("encoder.embed_dim", 24, BELOW_ENCODER),
        ("encoder.training.steps", 501, BELOW_ENCODER),
        ("seed", 1, BELOW_ENCODER),
        ("clustering.n_clusters", 8, BELOW_CLUSTERS),
        ("clustering.covariance", "tied", BELOW_CLUSTERS),
        ("lowlevel.dim", 48, {"lowlevel", *IMAGES}),
        ("lowlevel.centre", False, {"lowlevel", *IMAGES}),
        ("lowlevel.training.optimiser.lr", 0.1, {"lowlevel", *IMAGES}),
        ("semantic.depth", 7, {"semantic", "joint", *IMAGES}),
        ("semantic.training.steps", 401, {"semantic", "joint", *IMAGES}),
        ("joint.offset_noise", 0.0, {"joint", *IMAGES}),
        ("data.external_used", 0.5, {"lowlevel", "semantic", "joint", *IMAGES}),
        ("lowlevel.predictor", "mlp-mse", {"lowlevel", *IMAGES}),
        ("lowlevel.predictor", "ridge", {"lowlevel", *IMAGES}),
        ("lowlevel.mlp.hidden", 9, set()),
        ("refinement.also_semantic", True, set()),
        ("score.images", "semantic", {"references"}),
        ("dip.steps", 3, IMAGES),
        ("dip.calibrate", False, IMAGES),
        ("generation.guidance", 3.25, IMAGES),
        ("generation.subjects", [1], IMAGES),
        ("track", "other", {"score", "references"}),
    ],
)
def test_a_setting_runs_again_what_it_changes_and_no_more(path: str, value: Any, again: set[str]) -> None:
    before, after = plan(demo()), plan(demo().with_settings({path: value}))
    assert set(before) == set(ORDER)
    assert {name for name in ORDER if before[name].fingerprint != after[name].fingerprint} == again


def test_how_and_where_it_runs_is_in_no_fingerprint() -> None:
    a, b = plan(demo(), "clusters=128"), plan(demo(), "another label")
    assert {n: s.fingerprint for n, s in a.items()} == {n: s.fingerprint for n, s in b.items()}
    bigger = replace(a["lowlevel"], resources=Resources(gpus=4), label="")
    assert bigger.fingerprint == a["lowlevel"].fingerprint
    words = ("device", "thread", "worker", "tracker", "path", "folder", "out")
    keys = {key for stage in a.values() for key in _keys(stage.config)}
    assert [key for key in keys if key in words] == []


def _keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*(_keys(item) for item in value.values()))
    return set()


def test_the_seed_of_the_variant_draws_batches_too() -> None:
    own = plan(demo().with_settings({"seed": 3, "lowlevel.training.seed": 10}))
    assert {name: own[name].config["training"]["seed"] for name in ("encoder", "lowlevel", "semantic", "joint")} == {
        "encoder": 3,
        "lowlevel": 13,
        "semantic": 3,
        "joint": 3,
    }


def test_external_images_enter_where_they_are_drawn() -> None:
    """The demo's joint training draws none: how many there are is in no config of its own."""
    own = plan(demo().with_settings({"data.external_used": 0.5}))
    assert own["lowlevel"].config["external_used"] == own["semantic"].config["external_used"] == 0.5
    assert "external_used" not in own["joint"].config
    everything = plan(demo().with_settings({"data.external_used": 1}))
    assert everything["score"].fingerprint == plan(demo())["score"].fingerprint


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"lowlevel.predictor": "ridge", "semantic.predictor": "ridge"}, {"lowlevel", "semantic"}),
        (
            {"lowlevel.predictor": "mlp-infonce", "semantic.predictor": "mlp"},
            {"encoder", "external", "lowlevel", "semantic"},
        ),
        ({"lowlevel.predictor": "oracle", "semantic.predictor": "oracle"}, set()),
        ({"lowlevel.predictor": "oracle"}, set(ORDER) & {*BELOW_ENCODER} - {"lowlevel", *IMAGES}),
        ({"joint.enabled": False}, {"encoder", "external", "clusters", "lowlevel", "semantic"}),
    ],
)
def test_what_stands_in_a_bits_place_gets_nothing_that_a_bit_is_built_on(
    settings: dict[str, Any], names: set[str]
) -> None:
    own = plan(demo().with_settings(settings))
    assert set(own) == {"simulate", "prepare", "targets", *names, *IMAGES}
    assert ("joint" in own["reconstruct"].upstream) == ("joint" in names)


def test_an_mlp_has_the_branchs_recipe_and_its_own_rate() -> None:
    before, after = plan(demo()), plan(demo().with_settings({"lowlevel.predictor": "mlp-infonce"}))
    bit, mlp = dict(before["lowlevel"].config), dict(after["lowlevel"].config)
    assert mlp["training"]["optimiser"]["lr"] == demo().lowlevel.mlp.lr and not mlp["training"]["optimiser"]["groups"]
    assert {**mlp["training"], "optimiser": None} == {**bit["training"], "optimiser": None}
    assert all(mlp[name] == bit[name] for name in ("batch", "seed", "external_fraction", "layers", "sampled", "scale"))
    squared = plan(demo().with_settings({"lowlevel.predictor": "mlp-mse"}))["lowlevel"].config
    assert {k for k in mlp if mlp[k] != squared.get(k)} == {"predictor", "scale"} and "scale" not in squared


def test_the_sweep_of_branches_trains_and_reconstructs_once() -> None:
    """On the demo, what is scored is what the sweep of clusters scores, too."""
    sweep = load_sweep("branches")
    variants = {name: demo().with_settings(own) for name, own in sweep.settings().items()}
    assert [name for name, variant in variants.items() if variant.lacks] == [
        "branches=semantic-refined",
        "branches=unrefined",
    ]
    scores = {
        variant_stages(variant, name).score.fingerprint for name, variant in variants.items() if variant.lacks is None
    }
    assert scores == {plan(demo())["score"].fingerprint}
    full = {
        name: variant_stages(PRESETS["paper"]().with_settings(own), name, "d" * 64, absent="missing")
        for name, own in sweep.settings().items()
    }
    assert len({own.reconstruct.fingerprint for own in full.values()}) == 1
    assert len({own.score.fingerprint for own in full.values()}) == 3, "the usual images, and two more sets"


def test_a_sweep_shares_what_does_not_depend_on_its_axis() -> None:
    sweep = load_sweep("clusters")
    own = {name: variant_stages(demo().with_settings(s), name) for name, s in sweep.settings().items()}
    stages = Plan.of([*(o.score for o in own.values()), own["clusters=128"].references]).stages
    count = {name: sum(stage.name == name for stage in stages) for name in ORDER}
    shared = {"simulate", "prepare", "targets", "encoder", "external", "references"}
    assert count == {name: 1 if name in shared else 7 for name in ORDER}
    done: set[str] = set()
    for stage in stages:
        assert all(upstream.fingerprint in done for upstream in stage.upstream.values())
        done.add(stage.fingerprint)
    assert {s.name for s in own["clusters=8"].chain} == set(ORDER) - {"references"}


def test_a_data_tree_takes_the_place_of_the_simulation() -> None:
    own, other = plan(demo(), digest="a" * 64), plan(demo(), digest="b" * 64)
    assert "simulate" not in own and own["prepare"].digests == {"nsd": "a" * 64}
    assert all(own[name].fingerprint != other[name].fingerprint for name in own)
    elsewhere = plan(demo().with_settings({"data.simulation.seed": 5}), digest="a" * 64)
    assert elsewhere["score"].fingerprint == own["score"].fingerprint, "an unused setting changes nothing"


def test_weights_and_the_rules_of_scoring_are_in_the_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    before = plan(demo())
    monkeypatch.setattr(stages_module, "network_digests", lambda names, absent=None: {role: "0" * 64 for role in names})
    after = plan(demo())
    changed = {name for name in ORDER if before[name].fingerprint != after[name].fingerprint}
    assert changed == BELOW_DATA - {"prepare"}
    monkeypatch.undo()
    record = stages_module.protocol_record
    monkeypatch.setattr(stages_module, "protocol_record", lambda protocol: {**record(protocol), "constant": "nan"})
    after = plan(demo())
    changed = {name for name in ORDER if before[name].fingerprint != after[name].fingerprint}
    assert changed == {"score", "references"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"networks.lowlevel": "vgg17"}, "networks.lowlevel is 'vgg17', which this release cannot load; it has lite0"),
        ({"score.protocol": "dmeo"}, "score.protocol: no protocol 'dmeo' (did you mean 'demo'?)"),
        ({"score.protocol": "brain-it"}, "weights missing: alexnet.pth"),
        ({"transfer.subject": 1, "joint.enabled": False}, "transfer.subject needs BITs in both branches"),
        ({"transfer.subject": 1, "lowlevel.predictor": "ridge"}, "transfer.subject needs BITs in both branches"),
        ({"score.images": "semantic-refined"}, "score.images 'semantic-refined' needs refinement.also_semantic"),
        ({"networks.generator": "sdxl-unclip"}, "weights missing: unclip6_epoch0_step110000.ckpt"),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRAIN_IT_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError) as caught:
        variant_stages(demo().with_settings(settings), "x")
    assert message in str(caught.value) and len(str(caught.value).splitlines()) <= 2
