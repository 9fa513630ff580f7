"""Learning curves: what is measured, by which clock, on which images; the files, the figure, the command line."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV

from benchmark.cli import Parser
from benchmark.errors import UserError
from benchmark.evidence import curves, learning
from benchmark.evidence.curves import (
    ENCODER_COUNTED,
    INFO_NCE,
    SQUARED_ERROR,
    Bases,
    Basis,
    Branch,
    Design,
    Findings,
    draw_images,
)
from benchmark.progress import Progress
from benchmark.stages import encoder as encoder_stage
from benchmark.stages.bit import build_bit, voxel_layout
from benchmark.stages.encoder import load_mapping
from methods.baselines.mlp import MLP
from methods.baselines.ridge import ALPHAS, fold_indices

pytestmark = pytest.mark.timeout(900)  # the first test that needs the small sweep waits for it

SMALL = Design(sizes=(8,), seeds=1, checkpoints=2, rates=(1e-3, 3e-3), hidden=16, probe_steps=2)
QUIET = Progress(enabled=False)


@pytest.fixture(scope="module", params=["semantic", "lowlevel"])
def branch(tiny_run: Any, request: pytest.FixtureRequest) -> Branch:
    return Branch(tiny_run.stage(request.param), tiny_run.store)


@pytest.fixture(scope="module")
def low(tiny_run: Any) -> Branch:
    return Branch(tiny_run.stage("lowlevel"), tiny_run.store)


@pytest.fixture(scope="module")
def bases(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    folder = tmp_path_factory.mktemp("bases")
    return Bases(tiny_run.stage("lowlevel"), tiny_run.store, folder, SMALL, QUIET)


@pytest.fixture(scope="module")
def all_images(bases: Bases) -> Basis:
    return bases.get(None, 0)


@pytest.fixture(scope="module")
def finished(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """``learning`` as its users call it, quick."""
    out = tmp_path_factory.mktemp("learning") / "new"
    variant = tiny_run.variants["clusters=128"]
    return learning.learning(tiny_run.store.root, out, quick=True, variant=variant), out


# --- what is measured -------------------------------------------------------------------------------------------------


def test_bit_is_the_one_that_the_sweep_trains(tiny_run: Any, branch: Branch, all_images: Basis) -> None:
    run = curves.train_bit(branch, SMALL, all_images, None, 0, QUIET)
    bit = build_bit(branch.config, all_images.layout, branch.n_tokens, branch.width).eval()
    bit.load_state_dict(load_file(tiny_run.folder(branch.name) / "bit.safetensors"))
    assert run.per_subject == pytest.approx(branch.score(branch.loss_name, branch.predict(bit)), abs=1e-5)
    assert run.correlation == pytest.approx(np.mean(run.per_subject))
    assert (run.steps, run.images, run.loss) == (4, 14, branch.loss_name)
    assert [entry["step"] for entry in run.curve] == [2, 4]
    assert run.encoder_seconds == tiny_run.store.status(tiny_run.stage("encoder"))["cpu_s"] > 0
    assert curves.train_bit(branch, SMALL, all_images, None, 1, QUIET).correlation != run.correlation


@pytest.mark.parametrize("images", [None, 8])
def test_ridge_is_scikit_learns(branch: Branch, images: int | None) -> None:
    ridge, mean = curves.fit_ridge(branch, images, seed=0), curves.predict_mean(branch, images, seed=0)
    data = branch.data
    validation = data.samples(data.validation_ids)
    samples = data.samples(draw_images(data, images, 0).train_ids)
    for s, seen in enumerate(data.seen_ids):
        own, new = samples.subject == s, validation.subject == s
        assert np.array_equal(seen[samples.row[own]], samples.image[own])
        x = data.betas[s][samples.row[own]].astype(np.float64)
        y = branch.targets(data.target_rows(samples.image[own])).flatten(1).double().numpy()
        assert ridge.alphas is not None
        reference = Ridge(alpha=ridge.alphas[s], solver="svd").fit(x, y)
        if branch.name == "semantic":  # the search takes long with many targets
            outs = [out.numpy() for out in fold_indices(len(x), 5)]
            cv = [(np.setdiff1d(np.arange(len(x)), out), out) for out in outs]
            search = GridSearchCV(reference, {"alpha": ALPHAS}, scoring="neg_mean_squared_error", cv=cv).fit(x, y)
            assert ridge.alphas[s] == search.best_params_["alpha"]
        true = branch.targets(data.target_rows(validation.image[new])).flatten(1).numpy()
        found = reference.predict(data.betas[s][validation.row[new]])
        for tokens, run in ((found, ridge), (np.broadcast_to(y.mean(0), true.shape), mean)):
            expected = np.mean([np.corrcoef(p, t)[0, 1] for p, t in zip(tokens, true, strict=True)])
            assert run.per_subject[s] == pytest.approx(expected, abs=1e-4)
    assert ridge.images == mean.images == (images or 14) and ridge.seconds > 0


def test_smaller_sets_are_nested_and_hold_no_other_images(branch: Branch) -> None:
    data = branch.data
    few, more = (set(draw_images(data, n, seed=0).train_ids.tolist()) for n in (5, 9))
    assert few < more < set(data.train_ids.tolist()) and len(few) == 2 * 5 and len(more) == 2 * 9
    assert np.bincount(data.samples(np.array(sorted(few))).subject).tolist() == [5, 5]
    assert few != set(draw_images(data, 5, seed=1).train_ids.tolist())
    assert draw_images(data, None, seed=0) is data
    pool = branch.pool(5, seed=0)
    rows = np.concatenate([pool.draw(8, k, torch.Generator().manual_seed(k)).rows for k in range(30)])
    assert set(rows.tolist()) == set(data.target_rows(np.array(sorted(few))).tolist()), "and no external image"
    assert np.array_equal(branch.pool(None, 0).samples.image, data.samples(data.train_ids).image)
    assert branch.pool(None, 0).fraction == branch.config["external_fraction"]


def test_for_fewer_images_encoder_and_clusters_are_fitted_anew(
    tiny_run: Any, bases: Bases, all_images: Basis, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    fit = encoder_stage.fit_encoder

    def noted(ctx: Any, data: Any) -> dict[str, Any]:
        seen.append(data.train_ids)
        return fit(ctx, data)

    monkeypatch.setattr(curves, "fit_encoder", noted)
    few, other = bases.get(5, 0), bases.get(5, 1)
    assert bases.get(5, 0) is few, "one for both branches"
    for found, seed in zip(seen, (0, 1), strict=True):
        assert np.array_equal(found, draw_images(bases.data, 5, seed).train_ids)
    tables = [load_file(basis.encoder / "encoder.safetensors")["voxel_embedding"] for basis in (all_images, few, other)]
    assert not torch.equal(tables[0], tables[1]) and not torch.equal(tables[1], tables[2])
    assert few.encoder_seconds is not None and 0 < few.encoder_seconds < 60
    assert few.encoder.is_relative_to(bases.folder), "nothing is written into the store"
    mapping = load_mapping(few.encoder)
    assert np.array_equal(mapping.labels, encoder_stage.fit_clusters(tables[1].numpy(), bases.clusters.config).labels)
    assert few.layout.n_clusters == voxel_layout(bases.data, few.encoder).n_clusters == all_images.layout.n_clusters


def test_refitted_to_all_images_they_are_the_stores(tiny_run: Any, bases: Bases) -> None:
    everything = bases.get(14, 0)
    for name, folder in (("encoder", tiny_run.folder("encoder")), ("v2c", tiny_run.folder("clusters"))):
        again, stored = (load_file(place / f"{name}.safetensors") for place in (everything.encoder, folder))
        assert again.keys() == stored.keys() and all(torch.equal(again[key], stored[key]) for key in stored)


def test_bit_starts_from_the_basis_it_is_given(
    bases: Bases, low: Branch, all_images: Basis, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    fresh = curves.fresh_bit

    def noted(config: Any, layout: Any, encoder: Path, *rest: int) -> Any:
        given.append((layout, encoder))
        return fresh(config, layout, encoder, *rest)

    monkeypatch.setattr(curves, "fresh_bit", noted)
    few = bases.get(5, 0)
    run = curves.train_bit(low, SMALL, few, 5, 0, QUIET)
    assert given == [(few.layout, few.encoder)] and (run.images, run.encoder_seconds) == (5, few.encoder_seconds)


def test_calibration_undoes_a_linear_map_and_does_not_know_its_answers(low: Branch) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(low.true.shape, generator=generator)
    assert max(map(abs, low.score(INFO_NCE, noise))) < 0.1, "a map fitted to the images it is tried on finds much"
    assert min(low.score(SQUARED_ERROR, low.true)) == pytest.approx(1, abs=1e-5)
    turned = low.true.flip(-1) * -3
    assert max(low.score(SQUARED_ERROR, turned)) < 0.5
    assert min(low.score(INFO_NCE, turned)) > 0.5 + max(low.score(SQUARED_ERROR, turned))
    before = low._calibrated(turned)
    places = torch.from_numpy(np.unique(low.rows, return_inverse=True)[1] % 2 == 0)
    true = low.true
    try:
        low.true = torch.where(places[:, None, None], torch.randn(true.shape, generator=generator), true)
        after = low._calibrated(turned)
    finally:
        low.true = true
    assert torch.equal(after[places], before[places]) and not torch.equal(after[~places], before[~places])


# --- by which clock ---------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A step of BIT takes 8 seconds, one of an MLP 2, and each batch of validation 1000."""
    clock = SimpleNamespace(now=0.0)
    loss = Branch.loss

    def slow(self: Branch, name: str, model: Any, batch: Any, generator: Any, sample: bool) -> Any:
        clock.now += 1000.0 if not sample else 2.0 if isinstance(model, MLP) else 8.0
        return loss(self, name, model, batch, generator, sample)

    monkeypatch.setattr(Branch, "loss", slow)
    monkeypatch.setattr(curves, "time", SimpleNamespace(process_time=lambda: clock.now))
    return clock


def test_an_mlp_trains_as_long_as_bit(branch: Branch, all_images: Basis, clock: SimpleNamespace) -> None:
    bit = curves.train_bit(branch, SMALL, all_images, None, 0, QUIET)
    assert bit.seconds == 4 * 8 and [entry["seconds"] for entry in bit.curve] == [16, 32]
    for loss in {branch.loss_name, SQUARED_ERROR}:
        mlp = curves.train_mlp(branch, SMALL, loss, 1e-3, bit.seconds, 8, 0, QUIET)
        assert (mlp.seconds, mlp.steps, mlp.images, mlp.learning_rate) == (32, 16, 8, 1e-3)
        assert [entry["seconds"] for entry in mlp.curve] == [16, 32]
        assert mlp.method == ("MLP" if loss == branch.loss_name else "MLP, squared error")


def test_a_limit_shortens_the_recipe(low: Branch, all_images: Basis, clock: SimpleNamespace) -> None:
    design = Design(checkpoints=2, probe_steps=2, max_seconds=25.0)
    run = curves.train_bit(low, design, all_images, None, 0, QUIET)
    assert (run.steps, run.seconds) == (3, 24)
    design = Design(probe_steps=2, max_seconds=1e6)
    assert curves.train_bit(low, design, all_images, None, 0, QUIET).steps == 4, "but never adds"


Call = tuple[str, float, float, int | None, int]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The MLPs that are asked for: loss, rate, seconds, images, seed. Nothing is trained; BIT takes 5 s."""
    calls: list[Call] = []

    def run(method: str, images: int | None, seed: int, **rest: Any) -> curves.Run:
        fields = {"loss": "", "correlation": 0.0, "per_subject": [0.0], "seconds": 1.0, **rest}
        return curves.Run(method=method, images=images or 14, seed=seed, **fields)

    def mlp(branch: Branch, design: Design, loss: str, rate: float, *rest: Any) -> curves.Run:
        seconds, images, seed, _ = rest
        calls.append((loss, rate, seconds, images, seed))
        value = rate if loss == INFO_NCE else -rate
        return run(curves.mlp_name(branch, loss), images, seed, correlation=value, learning_rate=rate, seconds=seconds)

    def bit(branch: Branch, design: Design, basis: Basis, images: int | None, seed: int, *rest: Any) -> curves.Run:
        return run("BIT", images, seed, seconds=5.0, encoder_seconds=basis.encoder_seconds)

    monkeypatch.setattr(curves, "train_mlp", mlp)
    monkeypatch.setattr(curves, "train_bit", bit)
    monkeypatch.setattr(curves, "fit_ridge", lambda branch, images, seed: run("ridge", images, seed))
    monkeypatch.setattr(curves, "predict_mean", lambda branch, images, seed: run("mean", images, seed))
    layout: Any = None
    monkeypatch.setattr(Bases, "_refitted", lambda self, images, seed: Basis(Path(), layout, 2.0))
    monkeypatch.setattr(Bases, "_stored", lambda self: Basis(Path(), layout, 100.0))
    return calls


@pytest.fixture
def planned(tiny_run: Any, tmp_path: Path) -> Bases:
    return Bases(tiny_run.stage("lowlevel"), tiny_run.store, tmp_path, SMALL, QUIET)


def test_the_rate_is_chosen_once_and_serves_all(low: Branch, planned: Bases, calls: list[Call]) -> None:
    found = Findings()
    design = Design(sizes=(8, 14, 99), seeds=2, rates=(1e-3, 3e-3))
    curves.measure({"lowlevel": low}, planned, design, QUIET, {"lowlevel": found}, lambda: None)
    assert [(run.method, run.correlation) for run in found.trials] == [
        ("MLP", 1e-3),
        ("MLP", 3e-3),
        ("MLP, squared error", -1e-3),
        ("MLP, squared error", -3e-3),
    ]
    for loss, best in ((INFO_NCE, 3e-3), (SQUARED_ERROR, 1e-3)):
        own = [call[1:] for call in calls if call[0] == loss]
        assert own[:2] == [(1e-3, 5.0, None, 0), (3e-3, 5.0, None, 0)]
        if loss == INFO_NCE:
            assert own.pop(2) == (3e-3, 105.0, None, 0), "one more has the encoder's seconds too"
        assert own[2:] == [(best, 5.0, 8, 0), (best, 5.0, None, 1), (best, 5.0, 8, 1)], "no smaller size is left out"
    assert [(run.method, run.seed) for run in found.runs].count(("ridge", 1)) == 1, "on all images it is the same"
    assert [run.seconds for run in found.runs if run.method == ENCODER_COUNTED] == [105.0]
    assert {(run.images, run.encoder_seconds) for run in found.runs if run.method == "BIT"} == {(14, 100.0), (8, 2.0)}


def test_finished_runs_are_not_repeated(low: Branch, planned: Bases, calls: list[Call]) -> None:
    class KilledError(Exception):
        pass

    def measure(found: Findings, seeds: int, until: int = 10**6) -> None:
        saves = iter(range(until))

        def save() -> None:
            if next(saves, None) is None:
                raise KilledError

        design = Design(sizes=(8,), seeds=seeds, rates=(1e-3, 3e-3))
        curves.measure({"lowlevel": low}, planned, design, QUIET, {"lowlevel": found}, save)

    whole = Findings()
    measure(whole, 2)
    undisturbed = list(calls)
    for until in (0, 3, 4, 7, 9):
        calls.clear()
        found = Findings()
        with pytest.raises(KilledError):
            measure(found, 2, until)
        measure(found, 2)
        assert calls == undisturbed and (found.runs, found.trials) == (whole.runs, whole.trials)
    calls.clear()
    measure(whole, 3)
    assert {call[4] for call in calls} == {2}, "a further seed costs that seed alone"


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_record_holds_everything(finished: tuple[dict[str, Any], Path]) -> None:
    record, out = finished
    assert json.loads((out / "learning.json").read_text()) == json.loads(json.dumps(record))
    assert record["settings"]["torch"] == torch.__version__ and record["settings"]["threads"] == 1
    assert record["settings"]["max_steps"] == 6 and record["notes"] and record["variant"] == "clusters=128"
    networks = {"semantic": {"BIT", "MLP"}, "lowlevel": {"BIT", "MLP", "MLP, squared error"}}
    assert record["branches"].keys() == networks.keys()
    for name, branch in record["branches"].items():
        assert branch["subjects"] == 2 and branch["validation_recordings"] == 4
        assert {(run["method"], run["images"]) for run in branch["runs"]} == {
            (method, images) for method in networks[name] | {"ridge", "mean"} for images in (14, 8)
        }
        assert branch["learning_rates_tried"].keys() == networks[name] - {"BIT"}
        assert {run["method"]: run["images"] for run in branch["trials"]} == dict.fromkeys(networks[name] - {"BIT"}, 14)
        for run in branch["runs"]:
            assert (run["encoder_seconds"] is not None) == (run["method"] == "BIT")
            assert len(run["per_subject"]) == 2 and run["correlation"] == pytest.approx(np.mean(run["per_subject"]))
            assert -1 <= run["correlation"] <= 1
            if run["method"] in networks[name]:
                seconds = [entry["seconds"] for entry in run["curve"]]
                assert seconds == sorted(seconds) and seconds[-1] == run["seconds"] > 0
                assert run["curve"][-1]["step"] == run["steps"] >= run["best_step"] > 0
                (row,) = (r for r in branch["summary"] if (r["method"], r["images"]) == (run["method"], run["images"]))
                assert row["correlation"] == pytest.approx(run["correlation"]) and row["seeds"] == 1


def test_the_figure_is_drawn_from_the_record(finished: tuple[dict[str, Any], Path]) -> None:
    record, out = finished
    text = (out / "learning.svg").read_text()
    assert text == learning.figure(record) and "nan" not in text
    root = ET.fromstring(text)
    words = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("Semantic tokens") == words.count("Low-level tokens") == 2
    assert sum(word.startswith("training images per subject") for word in words) == 2
    assert words.count("CPU seconds of training, all images") == 2
    assert root.attrib["width"] == "1000" and root[1].attrib["fill"] == "#ffffff"
    for method in ("BIT", "MLP", "ridge", "mean"):
        assert sum(word.startswith(f"{method} ") for word in words) == 4, "named beside each of its lines"


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([10.0, 50.0], [10, 50]),
        ([10.0, 12.0, 60.0], [10, 27, 60]),
        ([90.0, 95.0, 100.0], [66, 83, 100]),
        ([], []),
    ],
)
def test_labels_make_room_for_each_other(levels: list[float], expected: list[float]) -> None:
    assert learning._spread(levels, 100.0) == expected


def test_the_file_is_what_the_next_call_goes_on_from(
    finished: tuple[dict[str, Any], Path], tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, out = finished
    variant = tiny_run.variants["clusters=128"]
    for file in out.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    lost = json.loads((tmp_path / "learning.json").read_text())
    runs = lost["branches"]["semantic"]["runs"]
    (place,) = (k for k, run in enumerate(runs) if (run["method"], run["images"]) == ("ridge", 8))
    del runs[place]
    (tmp_path / "learning.json").write_text(json.dumps(lost))
    for name in ("train_bit", "train_mlp", "predict_mean", "fit_encoder"):
        monkeypatch.setattr(curves, name, None)
    again = learning.learning(tiny_run.store.root, tmp_path, quick=True, variant=variant, branches=["semantic"])
    assert again["branches"]["lowlevel"] == json.loads(json.dumps(record["branches"]["lowlevel"])), "it is kept"
    semantic = again["branches"]["semantic"]["runs"]
    assert len(semantic) == len(record["branches"]["semantic"]["runs"])
    assert json.loads((tmp_path / "learning.json").read_text()) == json.loads(json.dumps(again))
    with pytest.raises(TypeError):  # other settings, so other runs: it would train
        learning.learning(tiny_run.store.root, tmp_path, quick=True, variant=variant, seconds_limit=3.0)
    (tmp_path / "learning.json").write_text("[]")
    with pytest.raises(TypeError):
        learning.learning(tiny_run.store.root, tmp_path, quick=True, variant=variant)


def test_seeds_are_averaged_and_their_range_is_kept() -> None:
    runs = [
        {"method": "BIT", "images": n, "correlation": c, "seconds": 2 * c, "encoder_seconds": 3.0}
        for n, c in ((5, 0.2), (9, 0.4), (9, 0.8))
    ]
    first, second = learning._summary(runs)
    assert first == {
        "method": "BIT",
        "images": 9,
        "seeds": 2,
        "correlation": pytest.approx(0.6),
        "lowest": 0.4,
        "highest": 0.8,
        "seconds": pytest.approx(1.2),
        "encoder_seconds": 3.0,
    }
    assert (second["images"], second["seeds"]) == (5, 1)


# --- the command line -------------------------------------------------------------------------------------------------


def test_options_reach_the_function(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(learning, "learning", lambda *places, **options: seen.update(options, places=places))
    parser = Parser()
    learning.add_arguments(parser)
    words = [
        "--store",
        "s",
        "--out",
        "o",
        "--branches",
        "semantic",
        "--sizes",
        "40,9",
        "--seeds",
        "2",
        "--seconds-limit",
        "9.5",
        "--quick",
    ]
    assert learning.run(parser.parse_args(words)) == 0
    assert seen == {
        "places": (Path("s"), Path("o")),
        "branches": ["semantic"],
        "sizes": (40, 9),
        "seeds": 2,
        "seconds_limit": 9.5,
        "threads": 1,
        "quick": True,
    }
    assert parser.parse_args(["--out", "o"]).sizes == (40, 80, 160)
    for bad in ("40,x", "0", "40,,80"):
        with pytest.raises(SystemExit) as slip:
            parser.parse_args(["--out", "o", "--sizes", bad])
        assert slip.value.code == 2
        assert f"--sizes: expected whole numbers from 1 with commas between, not '{bad}'" in capsys.readouterr().err


def test_slips_are_told_before_anything_runs(tiny_run: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no result of stage .*\n.*python -m benchmark.sweep clusters --out DIR"):
        learning.learning(tmp_path / "nothing", tmp_path)
    with pytest.raises(UserError, match="unknown branch 'semantics' \\(did you mean 'semantic'"):
        learning.learning(tiny_run.store.root, tmp_path, branches=["semantics"])
    with pytest.raises(UserError, match="--seeds 0"):
        learning.learning(tiny_run.store.root, tmp_path, seeds=0)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_waits_for_no_deep_learning_library() -> None:
    code = "import sys, benchmark.evidence.learning; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
