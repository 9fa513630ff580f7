"""Fingerprints, order, and the reasons that a dry run gives."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.execute import RunOptions, execute
from benchmark.graph import Decision, Mode, Plan, Resources, Stage
from benchmark.store import Store

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
CONFIGS = st.dictionaries(st.text(), JSON_VALUES, max_size=5)


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def toy(tmp_path: Path, name: str = "one", run: str = "add", **fields: Any) -> Stage:
    config = {"log": str(tmp_path / "log"), "value": 1, **fields.pop("config", {})}
    return Stage(name, f"toy_stages:{run}", config, **fields)


def run(stage: Stage, store: Store, **options: Any) -> None:
    execute(stage, store, RunOptions(progress=False, threads=1, **options))


def told(decisions: list[Decision]) -> dict[str, tuple[str, str]]:
    return {decision.stage.name: (decision.action, decision.reason) for decision in decisions}


def reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(list(value))}
    return [reversed_keys(item) for item in value] if isinstance(value, list) else value


def test_fingerprint_is_the_digest_of_the_documented_json() -> None:
    data = Stage("data", "m:f", {"n": 3, "name": "é"}, digests={"images": "ab"})
    base = '{"code_version":1,"config":{"n":3,"name":"\\u00e9"},"digests":{"images":"ab"},"name":"data","upstream":{}}'
    assert data.fingerprint == hashlib.sha256(base.encode()).hexdigest()
    # Written down: a change of this value makes every stored result unfindable.
    assert data.fingerprint == "5c25f16cc4a7e26df747a5fb6b966f48f8a8b7dcf8ea6a5b59a3e48ebeb5ccc0"
    model = Stage("model", "m:g", {"lr": 1e-4, "sizes": (1, 2)}, {"data": data}, code_version=2)
    text = json.dumps(
        {"code_version": 2, "config": {"lr": 0.0001, "sizes": [1, 2]}, "digests": {}, "name": "model",
         "upstream": {"data": data.fingerprint}}, separators=(",", ":"),
    )  # fmt: skip
    assert model.fingerprint == hashlib.sha256(text.encode()).hexdigest()
    assert model.fingerprint == "6539e9d36f6cd80bee2359bfb10b575e0b8ac03611b1c72a0173dc7fa57dd9f9"


@settings(max_examples=60, deadline=None)
@given(CONFIGS)
def test_key_order_does_not_matter(config: dict[str, Any]) -> None:
    assert Stage("s", "m:f", config).fingerprint == Stage("s", "m:f", reversed_keys(config)).fingerprint


@settings(max_examples=60, deadline=None)
@given(CONFIGS, st.text())
def test_every_setting_matters_and_survives_the_trip_to_a_job(config: dict[str, Any], key: str) -> None:
    stage = Stage("s", "m:f", config)
    assert stage.fingerprint != Stage("s", "m:f", {**config, key: "another value"}).fingerprint or (
        config.get(key) == "another value"
    )
    back = Stage.from_dict(json.loads(json.dumps(stage.to_dict())))
    assert back == stage and back.fingerprint == stage.fingerprint


def test_what_does_not_enter_the_fingerprint() -> None:
    plain = Stage("s", "m:f", {"a": 1})
    assert plain.fingerprint == Stage("s", "m:f", {"a": 1}, label="a=1", resources=Resources(gpus=8)).fingerprint
    others = [
        Stage("t", "m:f", {"a": 1}),
        Stage("s", "m:f", {"a": 1.5}),
        Stage("s", "m:f", {"a": 1}, code_version=2),
        Stage("s", "m:f", {"a": 1}, digests={"w": "00"}),
        Stage("s", "m:f", {"a": 1}, {"role": plain}),
        Stage("s", "m:f", {"a": 1}, {"other": plain}),
    ]
    assert len({stage.fingerprint for stage in [plain, *others]}) == 7


def test_a_later_change_of_the_callers_dict_changes_nothing() -> None:
    config = {"a": [1]}
    stage = Stage("s", "m:f", config)
    config["a"].append(2)
    assert stage.config == {"a": [1]}


@pytest.mark.parametrize(
    "name, target, config",
    [
        ("../s", "m:f", {}),
        ("S", "m:f", {}),
        ("s", "m.f", {}),
        ("s", "m:f", {"a": float("nan")}),
        ("s", "m:f", {"a": Path("x")}),
        ("s", "m:f", {"a": {1: 2}}),
    ],
)
def test_bad_stages_are_refused(name: str, target: str, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected|JSON"):
        Stage(name, target, config)


def test_from_dict_refuses_altered_data() -> None:
    data = Stage("s", "m:f", {"a": 1}).to_dict()
    data["stages"][data["target"]]["config"]["a"] = 2
    with pytest.raises(ValueError, match="fingerprint"):
        Stage.from_dict(data)


def test_plan_orders_and_shares() -> None:
    def chain(clusters: int) -> Stage:
        label = f"clusters={clusters}"
        encoder = Stage("encoder", "m:f", {}, {"data": Stage("data", "m:f", {})}, label=label)
        gmm = Stage("clusters", "m:f", {"n": clusters}, {"encoder": encoder}, label=label)
        return Stage("score", "m:f", {}, {"clusters": gmm, "encoder": encoder}, label=label)

    plan = Plan.of([chain(8), chain(16), chain(32)])
    assert [stage.title for stage in plan.stages] == [
        "data",
        "encoder [clusters=8 +2 more]",
        "clusters [clusters=8]",
        "score [clusters=8]",
        "clusters [clusters=16]",
        "score [clusters=16]",
        "clusters [clusters=32]",
        "score [clusters=32]",
    ]
    position = {stage.fingerprint: index for index, stage in enumerate(plan.stages)}
    for stage in plan.stages:
        assert all(position[up.fingerprint] < position[stage.fingerprint] for up in stage.upstream.values())


def test_a_deep_graph_of_shared_stages_is_not_walked_path_by_path() -> None:
    stages = [Stage("s0", "m:f", {})]
    for index in range(1, 40):  # 2^39 paths from the last to the first
        stages.append(Stage(f"s{index}", "m:f", {}, {f"r{up.name}": up for up in stages}))
    assert len(Plan.of([stages[-1]]).stages) == 40
    assert Stage.from_dict(stages[-1].to_dict()).fingerprint == stages[-1].fingerprint


def test_reasons_for_what_was_never_computed(store: Store, tmp_path: Path) -> None:
    def pair(lr: float = 0.1, steps: int = 5, version: int = 1, digest: str = "00", label: str = "lr") -> Stage:
        low = toy(tmp_path, "low", config={"opt": {"lr": lr, "steps": steps}}, code_version=version,
                  digests={"vgg": digest}, label=label)  # fmt: skip
        return toy(tmp_path, "high", upstream={"low": low}, label=label)

    assert told(Plan.of([pair()]).decide(store)) == {"low": ("run", "no result yet"), "high": ("run", "no result yet")}
    assert not store.root.exists()  # a dry run leaves nothing
    first = pair()
    run(first.upstream["low"], store)
    run(first, store)
    assert told(Plan.of([pair()]).decide(store)) == {"low": ("cached", "cached"), "high": ("cached", "cached")}

    def low(stage: Stage) -> str:
        reasons = told(Plan.of([stage]).decide(store))
        assert reasons["high"] == ("run", "upstream re-runs: low")
        return reasons["low"][1]

    assert low(pair(lr=0.2)) == "config changed: opt.lr"
    assert low(pair(lr=0.2, steps=6)) == "config changed: opt.lr, opt.steps"
    assert low(pair(version=2)) == "code version 1 -> 2"
    assert low(pair(digest="11")) == "data changed: vgg"
    assert low(pair(lr=0.3, version=2)) == "code version 1 -> 2; config changed: opt.lr"
    assert told(Plan.of([pair(lr=0.2, label="other")]).decide(store))["low"] == ("run", "no result yet")

    run(pair(lr=0.2).upstream["low"], store)
    assert low(pair(lr=0.2, steps=9)) == "config changed: opt.steps"  # the nearest is named, not the newest or oldest
    assert told(Plan.of([pair(lr=0.2)]).decide(store))["high"] == ("run", "upstream changed: low")


def test_modes(store: Store, tmp_path: Path) -> None:
    done = toy(tmp_path, "done")
    failed = toy(tmp_path, "failed", "fail", upstream={"done": done})
    after = toy(tmp_path, "after", upstream={"failed": failed})
    never = toy(tmp_path, "never", upstream={"done": done})
    beyond = toy(tmp_path, "beyond", upstream={"never": never, "failed": failed})
    run(done, store)
    with pytest.raises(Exception, match="do not add up"):
        run(failed, store)
    plan = Plan.of([after, beyond])

    def actions(mode: Mode | str) -> dict[str, str]:
        return {name: action for name, (action, _) in told(plan.decide(store, mode)).items()}

    assert actions("cached") == {"done": "cached", "failed": "run", "after": "run", "never": "run", "beyond": "run"}
    reasons = told(plan.decide(store))
    assert reasons["failed"] == ("run", "failed before: ValueError: the numbers do not add up")
    assert actions("retry") == {
        "done": "cached",
        "failed": "run",
        "after": "run",
        "never": "blocked",
        "beyond": "blocked",
    }
    assert set(actions("force").values()) == {"run"}
    assert all(decision.force and decision.reason == "forced" for decision in plan.decide(store, Mode.FORCE))
    assert actions("read-only") == dict.fromkeys(["failed", "after", "never", "beyond"], "blocked") | {"done": "cached"}
    assert "nothing runs in read-only mode" in told(plan.decide(store, "read-only"))["never"][1]


def test_import_is_light() -> None:
    code = (
        "import sys, benchmark.graph, benchmark.store, benchmark.execute, benchmark.launch, benchmark.launch.inline;"
        "print([m for m in ('torch', 'numpy', 'rich', 'wandb', 'submitit') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
