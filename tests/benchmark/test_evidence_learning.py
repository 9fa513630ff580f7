"""Learning curves: what is measured, by which clock, on which images; the files, the figure, the command line."""

from __future__ import annotations

import argparse
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
from benchmark.evidence.curves import INFO_NCE, SQUARED_ERROR, Branch, Design, choose_images
from benchmark.progress import Progress
from benchmark.stages.bit import build_bit
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
def finished(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """``learning`` as its users call it, quick."""
    out = tmp_path_factory.mktemp("learning") / "new"
    variant = tiny_run.variants["clusters=128"]
    return learning.learning(tiny_run.store.root, out, quick=True, variant=variant), out


# --- what is measured -------------------------------------------------------------------------------------------------


def test_bit_is_the_one_that_the_sweep_trains(tiny_run: Any, branch: Branch) -> None:
    run = curves.train_bit(branch, SMALL, None, 0, QUIET)
    bit = build_bit(branch.config, branch.layout, branch.n_tokens, branch.width).eval()
    bit.load_state_dict(load_file(tiny_run.folder(branch.name) / "bit.safetensors"))
    assert run.per_subject == pytest.approx(branch.score(branch.loss_name, branch.predict(bit)), abs=1e-5)
    assert run.correlation == pytest.approx(np.mean(run.per_subject))
    assert (run.steps, run.images, run.loss) == (4, 14, branch.loss_name)
    assert [entry["step"] for entry in run.curve] == [2, 4]
    assert curves.train_bit(branch, SMALL, None, 1, QUIET).correlation != run.correlation


@pytest.mark.parametrize("images", [None, 8])
def test_ridge_is_scikit_learns(branch: Branch, images: int | None) -> None:
    ridge, mean = curves.fit_ridge(branch, images, seed=0)
    data = branch.data
    validation = data.samples(data.validation_ids)
    for s, seen in enumerate(data.seen_ids):
        samples = data.samples(data.train_ids)
        samples = choose_images(samples, images, 0) if images else samples
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
    assert ridge.images == (images or 14) and ridge.seconds > 0


def test_smaller_sets_are_nested_and_hold_no_other_images(branch: Branch) -> None:
    data = branch.data
    everything = data.samples(data.train_ids)
    few, more = (set(choose_images(everything, n, seed=0).image.tolist()) for n in (5, 9))
    assert few < more and len(few) == 2 * 5 and len(more) == 2 * 9
    assert few != set(choose_images(everything, 5, seed=1).image.tolist())
    pool = branch.pool(5, seed=0)
    rows = np.concatenate([pool.draw(8, k, torch.Generator().manual_seed(k)).rows for k in range(30)])
    assert set(rows.tolist()) == set(data.target_rows(np.array(sorted(few))).tolist()), "and no external image"
    assert np.array_equal(branch.pool(None, 0).samples.image, everything.image)
    assert branch.pool(None, 0).fraction == branch.config["external_fraction"]


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


def test_an_mlp_trains_as_long_as_bit(branch: Branch, clock: SimpleNamespace) -> None:
    bit = curves.train_bit(branch, SMALL, None, 0, QUIET)
    assert bit.seconds == 4 * 8 and [entry["seconds"] for entry in bit.curve] == [16, 32]
    for loss in {branch.loss_name, SQUARED_ERROR}:
        mlp = curves.train_mlp(branch, SMALL, loss, 1e-3, bit.seconds, 8, 0, QUIET)
        assert (mlp.seconds, mlp.steps, mlp.images, mlp.learning_rate) == (32, 16, 8, 1e-3)
        assert [entry["seconds"] for entry in mlp.curve] == [16, 32]
        assert mlp.method == ("MLP" if loss == branch.loss_name else "MLP, squared error")


def test_a_limit_shortens_the_recipe(low: Branch, clock: SimpleNamespace) -> None:
    design = Design(checkpoints=2, probe_steps=2, max_seconds=25.0)
    run = curves.train_bit(low, design, None, 0, QUIET)
    assert (run.steps, run.seconds) == (3, 24)
    assert curves.train_bit(low, Design(probe_steps=2, max_seconds=1e6), None, 0, QUIET).steps == 4, "but never adds"


def test_the_rate_is_chosen_once_and_serves_all(low: Branch, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, float, int | None, int]] = []

    def mlp(branch: Branch, design: Design, loss: str, rate: float, seconds: float, images: int | None, *rest: Any):  # type: ignore[no-untyped-def]
        calls.append((loss, rate, images, rest[0]))
        value = rate if loss == INFO_NCE else -rate
        return curves.Run(curves.mlp_name(branch, loss), loss, rest[0], images or 14, value, [], 1.0)

    monkeypatch.setattr(curves, "train_mlp", mlp)
    monkeypatch.setattr(curves, "train_bit", lambda b, d, images, seed, p: curves.Run("BIT", "", seed, 14, 0, [], 1.0))
    monkeypatch.setattr(curves, "fit_ridge", lambda b, images, seed: [curves.Run("ridge", "", seed, 14, 0, [], 1.0)])
    design = Design(sizes=(8, 14, 99), seeds=2, rates=(1e-3, 3e-3))
    runs, tried = curves.measure(low, design, QUIET)
    assert tried == {
        "MLP": {"0.001": 1e-3, "0.003": 3e-3},
        "MLP, squared error": {"0.001": -1e-3, "0.003": -3e-3},
    }
    for loss, best in ((INFO_NCE, 3e-3), (SQUARED_ERROR, 1e-3)):
        own = [call[1:] for call in calls if call[0] == loss]
        assert own[:2] == [(1e-3, None, 0), (3e-3, None, 0)]
        assert own[2:] == [(best, 8, 0), (best, None, 1), (best, 8, 1)], "a size that is no smaller is left out"
    assert [(run.method, run.seed) for run in runs].count(("ridge", 1)) == 1, "on all images it is the same each time"


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_record_holds_everything(finished: tuple[dict[str, Any], Path]) -> None:
    record, out = finished
    assert json.loads((out / "learning.json").read_text()) == json.loads(json.dumps(record))
    assert record["torch"] == torch.__version__ and record["settings"]["threads"] == 1
    assert record["settings"]["quick"] is True and record["notes"] and record["variant"] == "clusters=128"
    networks = {"semantic": {"BIT", "MLP"}, "lowlevel": {"BIT", "MLP", "MLP, squared error"}}
    assert record["branches"].keys() == networks.keys()
    for name, branch in record["branches"].items():
        assert branch["subjects"] == 2 and branch["validation_recordings"] == 4
        assert {(run["method"], run["images"]) for run in branch["runs"]} == {
            (method, images) for method in networks[name] | {"ridge", "mean"} for images in (14, 8)
        }
        assert branch["learning_rates_tried"].keys() == networks[name] - {"BIT"}
        for run in branch["runs"]:
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
    assert words.count("training images per subject") == words.count("CPU seconds of training") == 2
    for method in ("BIT", "MLP", "ridge", "mean"):
        assert sum(word.startswith(f"{method} ") for word in words) == 4, "named beside each of its lines"


def test_seeds_are_averaged_and_their_range_is_kept() -> None:
    runs = [
        {"method": "BIT", "images": n, "correlation": c, "seconds": 2 * c} for n, c in ((5, 0.2), (9, 0.4), (9, 0.8))
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
    }
    assert (second["images"], second["seeds"]) == (5, 1)


# --- the command line -------------------------------------------------------------------------------------------------


def test_options_reach_the_function(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
        "seeds": 2,
        "seconds_limit": 9.5,
        "threads": 1,
        "quick": True,
    }
    assert isinstance(parser.parse_args(["--out", "o"]), argparse.Namespace)


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
