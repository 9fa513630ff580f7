"""The authors' weights in the place of trainings: the same images as from those weights where they were trained."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmark import official, run
from benchmark.cli import main_guard
from benchmark.config import Variant, demo, paper
from benchmark.errors import UserError
from benchmark.estimate import NOTHING, estimate
from benchmark.execute import RunOptions, execute
from benchmark.graph import Stage
from benchmark.networks import encoder_backbone
from benchmark.official import Part, find, take
from benchmark.official_weights import convert
from benchmark.running import restore_arguments, save_arguments
from benchmark.stages import variant_stages
from benchmark.store import Store, read_json, sha256_file
from leaderboard import Row, read_rows
from methods.brain_it.clustering import V2C
from methods.brain_it.official import MAPPING_VERSION, fit

sys.path.insert(0, str(Path(__file__).parent))
import released_architecture as released

pytestmark = pytest.mark.timeout(900)  # the first test that needs the small sweep waits for it

MAIN = "clusters=128"
Answer = tuple[int, str, str]


@pytest.fixture
def run_here(
    tiny_run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """Run ``python -m benchmark.run`` with the small sweep's settings."""

    def call(*arguments: object) -> Answer:
        settings = tiny_run.arguments[1:]
        monkeypatch.setattr(sys, "argv", ["benchmark.run", *settings, "--no-progress", *map(str, arguments)])
        code = main_guard(run.main)
        return (code, *capsys.readouterr())

    return call


# --- Files ------------------------------------------------------------------------------------------------------------


def converted(path: Path, role: str, tensors: Mapping[str, Tensor], sizes: Mapping[str, int], **settings: Any) -> Path:
    """Write what ``python -m benchmark.convert`` writes, for models that the authors have no file of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"kind": role, "file": f"{role}.pth", "sha256": "0" * 64, "prefix": "", "sizes": sizes}
    parts = {role: {**about, "settings": settings}}
    metadata = json.dumps({"mapping_version": MAPPING_VERSION, "parts": parts})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {official.METADATA: metadata})
    return path


def as_released(bit: Mapping[str, Tensor], heads: int, path: Path) -> Path:
    """Write one of our BITs as the authors would have: a pickled module with their names."""
    sizes = {name: bit[f"{name}"].shape for name in ("tokenizer.voxel_embeddings", "query_tokens", "proj.weight")}
    (voxels, dim), (tokens, _), (out, _) = sizes.values()
    depth = len({name.split(".")[1] for name in bit if name.startswith("blocks.")})
    clusters = len(bit["tokenizer.cluster_embeddings"])
    theirs = released.Decoder(released.dec_param(voxels, clusters, tokens, out, dim, depth, heads))
    shapes = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    names = fit(shapes, {}, {}, lambda unet: {}).names
    theirs.load_state_dict({names[ours]: value for ours, value in bit.items()})
    released.save(theirs, path)
    return path


def weights(tiny_run: Any, *roles: str, folder: Path) -> Path:
    """Write the weights that the small sweep trained for its main variant as converted official files."""
    variant, scratch = tiny_run.variants[MAIN], folder.with_name(f"{folder.name}-released")
    scratch.mkdir()
    folder.mkdir()
    if "clusters" in roles:
        np.save(scratch / "v2c.npy", V2C.load(tiny_run.folder("clusters") / "v2c.safetensors").table())
        convert([scratch / "v2c.npy"], folder / "a.safetensors")
    for role, branch in (("lowlevel", variant.lowlevel), ("semantic", variant.semantic)):
        if role in roles:
            bit = load_file(tiny_run.folder(role) / "bit.safetensors")
            convert([as_released(bit, branch.heads, scratch / f"{role}.pth")], folder / f"the {role} one.safetensors")
    if "joint" in roles:
        bit, unet = (load_file(tiny_run.folder("joint") / f"{name}.safetensors") for name in ("bit", "unet"))
        tensors = {f"bit.{name}": value for name, value in bit.items()}
        tensors |= {f"unet.{name}": value for name, value in unet.items()}
        sizes = {"voxels": len(bit["tokenizer.voxel_embeddings"]), "clusters": 128, "dim": 16, "depth": 1}
        converted(folder / "x.safetensors", "joint", tensors, {**sizes, "hidden": 64, "out_dim": 320}, heads=2)
    if "encoder" in roles:
        tensors = load_file(tiny_run.folder("encoder") / "encoder.safetensors")
        sizes = {"voxels": len(tensors["voxel_embedding"]), "positions": 64, "embed_dim": 48, "inner": 24}
        # As in theirs, the frozen backbone comes along.
        tensors |= {"backbone.cls_token": torch.zeros(1, 1, 8)}
        converted(folder / "e.safetensors", "encoder", tensors, sizes, taps=list(variant.encoder.taps))
    return folder


@pytest.fixture
def everything(tiny_run: Any, tmp_path: Path) -> Path:
    return weights(tiny_run, "clusters", "lowlevel", "joint", folder=tmp_path / "official")


def plan(answer: Answer) -> dict[str, str]:
    """What ``--dry-run`` printed: stage -> run, cached or blocked."""
    lines = (line.split() for line in answer[1].splitlines() if line.startswith("  "))
    return {words[1]: words[0] for words in lines}


def row_of(out: Path) -> Row:
    rows = [row for row in read_rows(out / "leaderboard" / "results") if row.kind == "method"]
    assert len(rows) == 1
    return rows[0]


# --- The whole chain --------------------------------------------------------------------------------------------------


def test_the_images_are_those_of_the_same_weights(
    tiny_run: Any, everything: Path, run_here: Callable[..., Answer], tmp_path: Path
) -> None:
    """The small sweep's own weights, through the authors' files: every image and score is the same, to the bit."""
    out = tmp_path / "runs"
    code, said, error = run_here("--official", everything, "--out", out)
    assert code == 0, error
    took = "clusters (a.safetensors), lowlevel (the lowlevel one.safetensors), joint (x.safetensors)"
    assert f"the authors' weights: {took}\n" in said

    store = Store(out / "store")
    ran = {path.parent.parent.name for path in store.root.glob("*/*/DONE")}
    assert ran == {
        *("simulate", "prepare", "targets", "official-clusters", "official-lowlevel", "official-joint"),
        *("reconstruct", "score", "references"),
    }
    (reconstruct,) = store.root.glob("reconstruct/*")
    for kind in ("lowlevel", "semantic", "combined"):
        expected = sorted((tiny_run.folder("reconstruct") / kind).iterdir())
        assert expected
        for image in expected:
            assert (reconstruct / kind / image.name).read_bytes() == image.read_bytes()
    (targets,) = store.root.glob("targets/*")
    assert {path.name for path in targets.iterdir()} >= {"shapes.json", "lowlevel_0"}
    assert not list(targets.glob("semantic*")) and not list(targets.glob("latents*"))  # nothing is trained on them
    for file in ("bit", "calibration"):
        (mine,) = store.root.glob(f"official-lowlevel/*/{file}.safetensors")
        theirs = load_file(tiny_run.folder("lowlevel") / f"{file}.safetensors")
        for name, value in load_file(mine).items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)

    row = row_of(out)
    assert row.method == "Brain-IT (authors' weights)"
    assert row.notes == "the authors' released weights: clusters, lowlevel, joint"
    assert row.notes in said and row.notes in (out / "leaderboard" / "index.html").read_text().replace("&#x27;", "'")
    assert row.manifest.weights["official joint"] == sha256_file(everything / "x.safetensors")
    trained = [row for row in read_rows(tiny_run.out / "leaderboard" / "results") if row.variant == MAIN]
    assert row.metrics == trained[0].metrics and row.cost.parameters == trained[0].cost.parameters - sum(
        value.numel() for value in load_file(tiny_run.folder("encoder") / "encoder.safetensors").values()
    )

    # Where the files lie is nobody's business.
    moved = everything.rename(tmp_path / "elsewhere")
    for number, path in enumerate(sorted(moved.iterdir())):
        path.rename(moved / f"{number}.safetensors")
    assert set(plan(run_here("--official", moved, "--out", out, "--dry-run")).values()) == {"cached"}
    # The same weights trained here are another row.
    answer = run_here("--out", out, "--dry-run")
    assert plan(answer)["joint"] == plan(answer)["reconstruct"] == "run"
    # Other weights are another result.
    tensors = load_file(moved / "1.safetensors")
    with_more = {**tensors, "proj.bias": tensors["proj.bias"] + 1}
    sizes = {"voxels": len(tensors["tokenizer.voxel_embeddings"]), "clusters": 128, "dim": 16, "depth": 1}
    converted(moved / "1.safetensors", "bit", with_more, {**sizes, "hidden": 64, "out_dim": 112}, heads=2)
    later = plan(run_here("--official", moved, "--out", out, "--dry-run"))
    assert {name for name, action in later.items() if action == "run"} == {
        *("official-lowlevel", "reconstruct", "score", "references")
    }


@pytest.mark.parametrize(
    ("roles", "trained", "credit"),
    [
        (("encoder",), {"external", "clusters", "lowlevel", "semantic", "joint"}, " (authors' encoder)"),
        (("clusters",), {"encoder", "external", "lowlevel", "semantic", "joint"}, " (authors' clusters)"),
        (("encoder", "clusters"), {"external", "lowlevel", "semantic", "joint"}, " (authors' encoder, clusters)"),
        (("clusters", "lowlevel"), {"encoder", "external", "semantic", "joint"}, " (authors' clusters, lowlevel)"),
        (("clusters", "semantic"), {"encoder", "external", "lowlevel", "joint"}, " (authors' clusters, semantic)"),
        (("clusters", "joint"), {"encoder", "external", "lowlevel"}, " (authors' clusters, joint)"),
        (("clusters", "lowlevel", "joint"), set(), " (authors' weights)"),
        (("encoder", "clusters", "lowlevel", "semantic", "joint"), set(), " (authors' weights)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_only_what_is_needed_runs(
    tiny_run: Any, tmp_path: Path, roles: tuple[str, ...], trained: set[str], credit: str
) -> None:
    parts, problems = find(weights(tiny_run, *roles, folder=tmp_path / "official"), width=112)
    assert not problems and set(parts) == set(roles)
    variant, usual = tiny_run.variants[MAIN], tiny_run.stages[MAIN]
    stages = take(usual, parts)
    assert official.misfits(tmp_path, parts, {MAIN: variant}, {MAIN: stages}, None) == []
    names = {stage.name for stage in stages.chain}
    assert names & {"encoder", "external", "clusters", "lowlevel", "semantic", "joint"} == trained
    used = set(roles) if trained else {"clusters", "lowlevel", "joint"}
    assert {name for name in names if name.startswith("official-")} == {f"official-{role}" for role in used}
    assert official.credit(stages)[0] == credit
    kept = {stage.name: stage.config.get("store") for stage in stages.chain}["targets"]
    assert ("latents" in kept) == ("joint" not in trained)
    assert kept["semantic"] == ("stored" if "semantic" in trained else "live")
    assert kept["encoder"] == ("stored" if trained & {"encoder", "external"} else "live")
    if "joint" in trained and "semantic" in trained:  # what others already computed is not computed again
        assert stages.score.upstream["reconstruct"].upstream["targets"] == usual.reconstruct.upstream["targets"]


def test_without_files_nothing_changes(tiny_run: Any) -> None:
    assert take(tiny_run.stages[MAIN], {}) is tiny_run.stages[MAIN]


def official_stage(tiny_run: Any, folder: Path, role: str) -> Stage:
    parts, _ = find(folder, width=112)
    return next(s for s in take(tiny_run.stages[MAIN], parts).chain if s.name == f"official-{role}")


def copy_of(tiny_run: Any, stage: Stage, tmp_path: Path) -> Store:
    """Return a store with what ``stage`` reads of the small sweep, and with the authors' clusters."""
    store = Store(tmp_path / "store")
    for upstream in stage.upstream.values():
        if tiny_run.store.is_done(upstream):
            shutil.copytree(tiny_run.store.folder(upstream), store.folder(upstream), dirs_exist_ok=True)
        else:
            copy_of(tiny_run, upstream, tmp_path)
            execute(upstream, store, RunOptions(threads=1, progress=False))
    return store


@pytest.mark.parametrize(("role", "others"), [("encoder", ()), ("semantic", ("clusters",)), ("clusters", ())])
def test_a_stage_writes_what_its_training_writes(
    tiny_run: Any, tmp_path: Path, role: str, others: tuple[str, ...]
) -> None:
    folder = weights(tiny_run, role, *others, folder=tmp_path / "official")
    stage = official_stage(tiny_run, folder, role)
    store = copy_of(tiny_run, stage, tmp_path)
    outcome = execute(stage, store, RunOptions(threads=1, progress=False))
    theirs, ours = tiny_run.folder(role), store.folder(stage)
    for path in sorted(theirs.glob("*.safetensors")):
        expected, found = load_file(path), load_file(ours / path.name)
        assert found.keys() == expected.keys() - {"means"}
        for name in found:
            assert torch.equal(found[name], expected[name]), name
    for path in theirs.glob("*.npy"):
        np.testing.assert_allclose(np.load(ours / path.name), np.load(path), atol=1e-6)
    trained = read_json(theirs / "status.json")["summary"]
    for name in trained.keys() & outcome.summary.keys() - {"converged", "log_likelihood"}:  # which files do not tell
        assert outcome.summary[name] == pytest.approx(trained[name], rel=1e-5), name
    assert "parameters" in outcome.summary or role == "clusters"
    assert outcome.summary["official sha256"] and str(tmp_path) not in json.dumps(dict(outcome.summary))


def test_parts_of_one_file(tiny_run: Any, tmp_path: Path) -> None:
    weights(tiny_run, "clusters", "lowlevel", folder=tmp_path / "single")
    together = tmp_path / "together"
    together.mkdir()
    released_files = [tmp_path / "single-released" / name for name in ("v2c.npy", "lowlevel.pth")]
    convert(released_files, together / "all.safetensors")
    stage = official_stage(tiny_run, together, "lowlevel")
    assert stage.digests["official lowlevel"] == stage.upstream["clusters"].digests["official clusters"]
    store = copy_of(tiny_run, stage, tmp_path)
    execute(stage, store, RunOptions(threads=1, progress=False))
    expected = load_file(tiny_run.folder("lowlevel") / "bit.safetensors")
    found = load_file(store.folder(stage) / "bit.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    labels = V2C.load(store.folder(stage.upstream["clusters"]) / "v2c.safetensors").labels
    assert np.array_equal(labels, V2C.load(tiny_run.folder("clusters") / "v2c.safetensors").labels)


def test_adapters_of_another_scale_are_the_same_maps(tiny_run: Any, tmp_path: Path) -> None:
    """x + s A B x: what was trained with one factor s is kept with the one that is applied here."""
    usual = tiny_run.stages[MAIN]
    rank, taps = 2, [1, 2]
    config = {**usual.encoder.config, "adapter_rank": rank, "taps": taps}
    stages = replace(usual, encoder=replace(usual.encoder, config=config))
    stages = replace(
        stages, clusters=replace(usual.clusters, upstream={"encoder": stages.encoder}), lowlevel=None, joint=None
    )
    backbone = encoder_backbone("lite0", taps, rank, 8)
    known = load_file(tiny_run.folder("encoder") / "encoder.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors = {name: value for name, value in known.items() if not re.match(r"readers\.[2-9]", name)}
    tensors["readout"] = known["readout"][:, : 2 * 24].clone()
    adapters = {
        f"adapters.{name}": torch.randn(value.shape, generator=generator)
        for name, value in backbone.adapters.state_dict().items()
    }
    beyond = {"adapters.2.up": torch.zeros(5, rank), "adapters.2.down": torch.zeros(rank, 5)}  # after the last tap
    sizes = {"voxels": len(known["voxel_embedding"]), "rank": rank, "backbone_depth": 3}
    own = backbone.adapters[0].scale
    found = []
    for number, (scale, factor) in enumerate(((own, 8.0), (8.0 * own, 1.0))):
        ups = {name: value * (factor if name.endswith("up") else 1.0) for name, value in adapters.items()}
        path = converted(
            tmp_path / f"{number}.safetensors", "encoder", {**tensors, **ups, **beyond}, sizes, adapter_scale=scale
        )
        part = Part(path, "encoder", official.About.model_validate(official.read_parts(path)["encoder"]))
        stage = take(replace(stages, score=stages.clusters, references=stages.clusters), {"encoder": part}).encoder
        store = copy_of(tiny_run, stage, tmp_path / str(number))
        execute(stage, store, RunOptions(threads=1, progress=False))
        found.append(load_file(store.folder(stage) / "encoder.safetensors"))
        shutil.rmtree(tmp_path / str(number))
    assert found[0].keys() == found[1].keys() == {**tensors, **adapters}.keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=0)
    assert torch.equal(found[0]["adapters.0.up"], 8 * adapters["adapters.0.up"])


# --- What is wrong is said before anything runs -----------------------------------------------------------------------


def error(answer: Answer, lines: int = 2) -> str:
    """Return the error of a call that was refused: short, and before anything ran."""
    code, _, said = answer
    assert code == 2 and "Traceback" not in said and said.startswith("error: ")
    assert len(said.splitlines()) <= lines, said
    return said


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["lowlevel.depth=2"], "lowlevel.depth is 2, but 1 in the lowlevel one.safetensors"),
        (["lowlevel.heads=4"], "lowlevel.heads is 4, but 2 in the lowlevel one.safetensors"),
        (["semantic.dim=32", "semantic.depth=3"], "semantic.dim is 32, but 16 in x.safetensors; semantic.depth is 3"),
        (
            ["clustering.n_clusters=64"],
            "clustering.n_clusters is 64, but 128 in a.safetensors, the lowlevel one.safetensors, x.safetensors",
        ),
        (["lowlevel.width=120"], "lowlevel.width is 120, but 112"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_another_architecture_is_refused_with_what_mends_it(
    everything: Path, run_here: Callable[..., Answer], tmp_path: Path, settings: list[str], complaint: str
) -> None:
    if settings == ["lowlevel.width=120"]:  # a file that says which branch it is of
        path = everything / "the lowlevel one.safetensors"
        about = official.read_parts(path)["bit"]
        converted(path, "lowlevel", load_file(path), about["sizes"], **about["settings"])
    changed = [f"--set={setting}" for setting in settings]
    said = error(run_here("--official", everything, "--out", tmp_path / "runs", *changed))
    assert complaint in said
    mend = re.findall(r"--set (\S+)", said)
    assert len(mend) == len(settings)
    code, _, _ = run_here(
        "--official", everything, "--out", tmp_path / "runs", "--dry-run", *changed, *(f"--set={s}" for s in mend)
    )
    assert code == 0 and not (tmp_path / "runs").exists()


def test_an_encoder_of_other_taps(tiny_run: Any, run_here: Callable[..., Answer], tmp_path: Path) -> None:
    folder = weights(tiny_run, "encoder", folder=tmp_path / "official")
    said = error(run_here("--official", folder, "--set=encoder.taps=[1,2]", "--set=encoder.grid=4", "--dry-run"))
    assert "encoder.taps is [1,2], but [1,2,3,5,7] in e.safetensors" in said
    assert "--set encoder.taps=[1,2,3,5,7] --set encoder.grid=8" in said


def test_bits_need_their_clusters(tiny_run: Any, run_here: Callable[..., Answer], tmp_path: Path) -> None:
    folder = weights(tiny_run, "lowlevel", "joint", folder=tmp_path / "official")
    said = error(run_here("--official", folder, "--out", tmp_path / "runs"))
    assert "lowlevel, joint need the voxels' clusters" in said and "--official v2c_128_mapping_gmm_v2.npy" in said
    assert not (tmp_path / "runs").exists()


def test_everything_wrong_is_named_at_once(
    tiny_run: Any, everything: Path, run_here: Callable[..., Answer], tmp_path: Path
) -> None:
    whole = (everything / "x.safetensors").read_bytes()
    (everything / "x.safetensors").write_bytes(whole[:-100])
    save_file({"a": torch.zeros(2)}, everything / "mine.safetensors")
    shutil.copy(everything / "the lowlevel one.safetensors", everything / "again.safetensors")
    (everything / "broken.safetensors").write_bytes(b"not a file of tensors")
    arguments = ("--official", everything, "--data", tmp_path / "nowhere", "--set=lowlevel.depth=2")
    said = error(run_here(*arguments, "--out", tmp_path / "runs"), lines=12)
    assert "6 things are missing:" in said
    for complaint in (
        "nowhere: no such data folder",
        "x.safetensors: not a converted official file (",
        "mine.safetensors: not a converted official file (its metadata do not say so)",
        "broken.safetensors: not a converted official file (",
        "again.safetensors, the lowlevel one.safetensors are all of the role 'lowlevel'; leave one there",
        "lowlevel.depth is 2, but 1 in again.safetensors",
    ):
        assert complaint in said


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ("{", "not a converted official file (Expecting property name"),
        ("[]", "not a converted official file ("),
        (json.dumps({"mapping_version": MAPPING_VERSION, "parts": {"joint": {"kind": "x"}}}), "file: Field required"),
        (
            json.dumps({"mapping_version": MAPPING_VERSION, "parts": {"joint": 3}}),
            "not a converted official file (",
        ),
        (json.dumps({"mapping_version": 99, "parts": {}}), "converted by another version (99, not 1)"),
    ],
)
def test_damaged_metadata(tmp_path: Path, metadata: str, complaint: str) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "m.safetensors", {official.METADATA: metadata})
    parts, (problem,) = find(tmp_path, width=112)
    assert parts == {} and complaint in problem and problem.startswith(f"official: {tmp_path / 'm.safetensors'}")
    assert len(problem.splitlines()) <= 2


def test_folders_without_converted_files(run_here: Callable[..., Answer], tmp_path: Path) -> None:
    assert "no such folder" in error(run_here("--official", tmp_path / "none"))
    (tmp_path / "combined_model.ckpt").touch()
    said = error(run_here("--official", tmp_path))
    assert f"python -m benchmark.convert --official {tmp_path}/combined_model.ckpt --out {tmp_path}/NAME" in said


def test_files_of_other_voxels(
    tiny_run: Any, everything: Path, run_here: Callable[..., Answer], tmp_path: Path
) -> None:
    data = tiny_run.store.folder(tiny_run.stages[MAIN].prepare.upstream["nsd"]) / "nsd"
    code, _, said = run_here("--official", everything, "--data", data, "--dry-run")
    assert code == 0, said
    path = everything / "x.safetensors"
    about = official.read_parts(path)["joint"]
    voxels = about["sizes"]["voxels"]
    converted(path, "joint", load_file(path), {**about["sizes"], "voxels": voxels + 1}, **about["settings"])
    said = error(run_here("--official", everything, "--data", data))
    assert (
        f"they differ in voxels (a.safetensors {voxels}, the lowlevel one.safetensors {voxels}, x.safetensors" in said
    )
    for name in everything.iterdir():
        ((role, own),) = official.read_parts(name).items()
        converted(name, role, load_file(name), {**own["sizes"], "voxels": 315_997}, **own["settings"])
    said = error(run_here("--official", everything, "--data", data))
    assert "the weights are of 315,997 voxels" in said and f"the data have {voxels:,}" in said


def test_a_transfer_has_nobody_new(everything: Path, tiny_run: Any) -> None:
    variant = tiny_run.variants[MAIN].with_settings({"transfer.subject": 2})
    stages = variant_stages(variant, "x", data_digest="0" * 64)
    parts, _ = find(everything, width=112)
    assert take(stages, parts) is stages
    (problem,) = official.misfits(everything, parts, {"x": variant}, {"x": stages}, None)
    assert "--set transfer.subject=null" in problem


def test_what_stands_in_for_a_bit_is_still_fitted(everything: Path, tiny_run: Any) -> None:
    variant = tiny_run.variants[MAIN].with_settings({"lowlevel.predictor": "ridge"})
    parts, _ = find(everything, width=112)
    stages = take(variant_stages(variant, "x"), parts)
    names = {stage.name for stage in stages.chain}
    assert "lowlevel" in names and "official-lowlevel" not in names and "official-joint" in names
    assert official.told(parts, stages).endswith("; not needed: lowlevel (the lowlevel one.safetensors)")
    assert official.misfits(everything, parts, {"x": variant}, {"x": stages}, None) == []


def test_a_sweep_names_the_variants_that_do_not_fit(everything: Path, tiny_run: Any) -> None:
    parts, _ = find(everything, width=112)
    stages = {name: take(own, parts) for name, own in tiny_run.stages.items()}
    problems = official.misfits(everything, parts, tiny_run.variants, stages, None)
    others = [name for name in tiny_run.variants if name != MAIN]
    assert len(problems) == len(others) and all("leave out --official, or these with --only" in p for p in problems)
    assert all(any(problem.startswith(f"official: {name}: ") for problem in problems) for name in others)


def test_weights_that_are_not_what_their_metadata_say(
    everything: Path, run_here: Callable[..., Answer], tiny_run: Any, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    shutil.copytree(tiny_run.out / "store" / "simulate", out / "store" / "simulate")
    shutil.copytree(tiny_run.out / "store" / "prepare", out / "store" / "prepare")
    path = everything / "the lowlevel one.safetensors"
    about = official.read_parts(path)["bit"]
    tensors = load_file(path)
    del tensors["proj.bias"]
    converted(path, "bit", tensors, about["sizes"], **about["settings"])
    code, _, said = run_here("--official", everything, "--out", out)
    assert code == 2 and "the low" in said and "'proj.bias' is missing (1 of its" in said and "Traceback" not in said


def test_files_that_change_or_go_after_planning(tiny_run: Any, tmp_path: Path) -> None:
    folder = weights(tiny_run, "clusters", folder=tmp_path / "official")
    stage = official_stage(tiny_run, folder, "clusters")
    store = copy_of(tiny_run, stage, tmp_path)
    path = folder / "a.safetensors"
    np.save(tmp_path / "v2c.npy", np.arange(stage_voxels(path))[None])
    convert([tmp_path / "v2c.npy"], path)
    with pytest.raises(UserError, match="has changed since the run was planned"):
        execute(stage, store, RunOptions(threads=1, progress=False))
    path.unlink()
    with pytest.raises(UserError, match=r"are gone; name their folder with --official"):
        execute(stage, store, RunOptions(threads=1, progress=False))


def stage_voxels(path: Path) -> int:
    return int(official.read_parts(path)["clusters"]["sizes"]["voxels"])


# --- Settings that a plan is made of ----------------------------------------------------------------------------------


def test_the_options_outlive_a_submission(tmp_path: Path) -> None:
    args = restore_arguments({"official": str(tmp_path)})
    assert args.official == tmp_path and save_arguments(args)["official"] == str(tmp_path)
    assert restore_arguments({}).official is None


def test_the_paper_s_plan_needs_no_training(tmp_path: Path) -> None:
    """With what the authors released: hours and disk of the trainings and of the targets are spared."""
    bit = {"voxels": 315_997, "clusters": 128, "dim": 512, "depth": 5, "hidden": 2048}
    some = {"a": torch.zeros(1)}
    converted(tmp_path / "1.safetensors", "clusters", some, {"voxels": 315_997, "clusters": 128})
    converted(tmp_path / "2.safetensors", "lowlevel", some, {**bit, "tokens": 7190, "out_dim": 512}, heads=8)
    converted(tmp_path / "3.safetensors", "semantic", some, {**bit, "tokens": 256, "out_dim": 1664}, heads=8)
    converted(tmp_path / "4.safetensors", "joint", some, {**bit, "tokens": 256, "out_dim": 1664}, heads=8)
    encoder = {"voxels": 315_997, "positions": 257, "embed_dim": 256, "inner": 128, "rank": 7}
    converted(tmp_path / "5.safetensors", "encoder", some, encoder, taps=[1, 6, 12, 18, 24])
    variant: Variant = paper()
    stages = variant_stages(variant, "x", data_digest="0" * 64, absent="missing")
    parts, problems = find(tmp_path, variant.lowlevel.width)
    taken = take(stages, parts)
    assert problems == official.misfits(tmp_path, parts, {"x": variant}, {"x": taken}, 315_997) == []
    spared = take(stages, {"encoder": parts["encoder"]})
    assert official.misfits(tmp_path, parts, {"x": variant}, {"x": spared}, 315_997) == []
    assert {stage.name for stage in taken.chain} == {
        *("prepare", "targets", "official-clusters", "official-lowlevel", "official-joint", "reconstruct", "score"),
    }
    targets = taken.reconstruct.upstream["targets"]
    assert estimate(targets, variant) == NOTHING
    hours = sum(estimate(stage, variant).gpu_hours for stage in taken.chain)
    assert hours < 15 < 60 < sum(estimate(stage, variant).gpu_hours for stage in stages.chain)
    rebuilt = Stage.from_dict(taken.end.to_dict())  # as a job on another machine gets it
    assert rebuilt.fingerprint == taken.end.fingerprint
    assert str(tmp_path) not in json.dumps([stage.record() for stage in taken.chain])


def test_the_demo_s_own_settings_fit_no_paper_weights(tmp_path: Path) -> None:
    sizes = {"voxels": 315_997, "clusters": 128, "dim": 512, "depth": 5, "hidden": 1024, "out_dim": 512}
    converted(tmp_path / "2.safetensors", "lowlevel", {"a": torch.zeros(1)}, sizes, heads=8)
    variant = demo()
    parts, _ = find(tmp_path, variant.lowlevel.width)
    stages = take(variant_stages(variant, "x"), parts)
    clusters, hidden, settings = official.misfits(tmp_path, parts, {"x": variant}, {"x": stages}, None)
    assert "need the voxels' clusters" in clusters and "4 x its width" in hidden + settings
    assert "--set lowlevel.dim=512" in hidden + settings
