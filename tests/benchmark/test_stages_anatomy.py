"""Clusters by place and by parcels, and reconstructions of NSD-Synthetic: settings, stages, refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmark.config import QUICK, Variant, demo
from benchmark.context import StageContext
from benchmark.data import paths
from benchmark.data.nsd import NSD
from benchmark.data.prepare import prepare
from benchmark.data.settings import SimulationSettings
from benchmark.data.simulate import simulate
from benchmark.data.synthetic import Synthetic
from benchmark.errors import UserError
from benchmark.graph import Plan, Stage
from benchmark.progress import Progress
from benchmark.smoke import smoke_stages
from benchmark.stages import KINDS, anatomy, encoder, synthetic, variant_stages
from benchmark.stages.encoder import load_mapping
from benchmark.stages.prepare import Prepared, run_simulate
from benchmark.stages.prepare import run as run_prepare
from benchmark.store import read_json
from benchmark.sweeps import load_sweep
from benchmark.tracking import NoTracker
from methods.brain_it.clustering import by_coordinates

pytestmark = pytest.mark.timeout(900)  # the first test that needs the small sweep waits for it

METHODS = ("coordinates", "schaefer-400", "schaefer-1000")
SMALL = SimulationSettings(subjects=2, seed=3, size=32, shared=6, unique=20, external=4, voxels=160, sessions=3)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature NSD with NSD-Synthetic beside it; to read, not to change."""
    return simulate(tmp_path_factory.mktemp("data") / "tree", SMALL, workers=1, complete=True).root


@pytest.fixture(scope="module")
def store(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree, prepared."""
    out = tmp_path_factory.mktemp("data") / "store"
    prepare(tree, out, workers=1)
    return out


@pytest.fixture
def broken(tree: Path, tmp_path: Path) -> Path:
    """A copy of the tree, to break."""
    return Path(shutil.copytree(tree, tmp_path / "broken"))


def stage_named(variant: Variant, name: str, digest: str | None = None) -> Stage:
    own = variant_stages(variant, "x", digest)
    return {stage.name: stage for stage in Plan.of([own.end]).stages}[name]


def context(stage: Stage, out: Path, tree: Path | None = None, **inputs: Path) -> StageContext:
    out.mkdir(parents=True, exist_ok=True)
    return StageContext(
        stage,
        stage.config,
        out,
        inputs,
        out / "checkpoints",
        NoTracker(),
        Progress(enabled=False),
        "cpu",
        1,
        1e9,
        tree,
    )


def prepared(data: Path, out: Path) -> Path:
    """Run stage ``prepare`` on a tree or a store."""
    variant = demo().with_settings({"data.image_size": 32})
    run_prepare(context(stage_named(variant, "prepare", "d" * 64), out, data))
    return out


def clustered(method: str, data: Path, out: Path, **settings: Any) -> Path:
    """Run stages ``anatomy`` and ``clusters`` on a tree or a store."""
    changes = {"clustering.method": method, "data.image_size": 32, **settings}
    variant = demo().with_settings(changes)
    given = {"data": prepared(data, out / "prepare")}
    anatomy.run(context(stage_named(variant, "anatomy", "d" * 64), out / "anatomy", data, **given))
    summary = encoder.run_clusters(
        context(stage_named(variant, "clusters", "d" * 64), out / "clusters", anatomy=out / "anatomy")
    )
    assert summary["clusters"] == load_mapping(out / "clusters").n_clusters
    return out


# --- the plan ---------------------------------------------------------------------------------------------------------


def chain(**settings: Any) -> dict[str, Stage]:
    own = variant_stages(demo().with_settings(settings), "x")
    return {stage.name: stage for stage in Plan.of([own.score, own.references]).stages}


def test_functional_clusters_know_nothing_of_anatomy() -> None:
    """Caches that were made before there was a choice stay valid."""
    before = chain()
    assert "anatomy" not in before and set(before["clusters"].upstream) == {"encoder"}
    assert before["clusters"].config == {"n_clusters": 128, "covariance": "diag", "max_iter": 100, "seed": 0}
    assert "test_set" not in before["reconstruct"].config["generation"]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_again_clusters_and_what_follows(method: str) -> None:
    before, after = chain(), chain(**{"clustering.method": method})
    assert set(after) == {*before, "anatomy"} and set(after["clusters"].upstream) == {"anatomy"}
    same = {name for name in before if before[name].fingerprint == after[name].fingerprint}
    assert same == {"simulate", "prepare", "targets", "encoder", "external"}
    assert after["anatomy"].upstream["nsd"].fingerprint == before["simulate"].fingerprint, "no second brain is made"


def test_only_what_a_method_reads_is_in_its_clusters_fingerprint() -> None:
    def clusters(method: str, **settings: Any) -> str:
        return chain(**{"clustering.method": method, **settings})["clusters"].fingerprint

    for method in METHODS:
        assert clusters(method) == clusters(method, **{"clustering.max_iter": 7, "clustering.covariance": "full"})
        assert clusters(method) == clusters(method, **{"encoder.embed_dim": 24})
    for change in ({"clustering.n_clusters": 8}, {"seed": 1}):
        assert clusters("schaefer-400") == clusters("schaefer-400", **change)
        assert clusters("coordinates") != clusters("coordinates", **change)
    assert len({clusters(method) for method in METHODS}) == 3


def test_the_sweep_is_the_papers() -> None:
    sweep = load_sweep("clustering")
    assert sweep.axis.values == ("functional", *METHODS) and sweep.axis.main == "functional"
    assert sweep.axis.setting == "clustering.method" and sweep.answers.startswith("Table T2")


def test_nsd_synthetic_adds_two_stages_and_takes_scores_away() -> None:
    own = variant_stages(demo().with_settings({"generation.test_set": "nsd-synthetic"}), "x")
    natural = variant_stages(demo(), "x")
    assert natural.end is natural.score and natural.synthetic is None
    assert own.end is own.synthetic and own.end.name == "reconstruct-synthetic"
    stages = {stage.fingerprint: stage.name for stage in Plan.of([own.end]).stages}
    known = {stage.fingerprint for stage in natural.chain}
    assert sorted(name for key, name in stages.items() if key not in known) == [
        "reconstruct-synthetic",
        "simulate",
        "synthetic",
    ]
    assert own.score.fingerprint == natural.score.fingerprint
    given = variant_stages(demo().with_settings({"generation.test_set": "nsd-synthetic"}), "x", "d" * 64)
    names = [stage.name for stage in Plan.of([given.end]).stages]
    assert "simulate" not in names, "a data tree has its own"


def test_a_smoke_run_has_neither() -> None:
    for settings, message in (
        ({"clustering.method": "coordinates"}, "clustering.method 'coordinates' needs data with anatomy"),
        ({"generation.test_set": "nsd-synthetic"}, "generation.test_set 'nsd-synthetic' needs the data set"),
    ):
        with pytest.raises(UserError, match=message):
            smoke_stages(demo().with_settings({**settings, "score.random_weights": 0}), 1e12)


# --- clusters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tree", "store"])
@pytest.mark.parametrize("method", METHODS)
def test_clusters_are_the_places_of_the_true_files(
    method: str, kind: str, request: pytest.FixtureRequest, tree: Path, tmp_path: Path
) -> None:
    """From FreeSurfer's own formats, read here by nibabel, through the stages, to each voxel's cluster."""
    import nibabel as nib

    out = clustered(method, request.getfixturevalue(kind), tmp_path, **{"clustering.n_clusters": 12})
    mapping = load_mapping(out / "clusters")
    expected: list[Any] = []
    for subject in (1, 2):
        for side, hemisphere in enumerate(paths.HEMISPHERES):
            used = np.load(tree / paths.mask(subject, hemisphere)) > 0
            if method == "coordinates":
                points, _ = nib.freesurfer.read_geometry(tree / paths.surface(hemisphere))
                expected += points[used].tolist()
            else:
                labels, _, _ = nib.freesurfer.read_annot(tree / paths.annotation(hemisphere, paths.ATLASES[method]))
                expected += [(side, int(label)) for label in labels[used]]
    assert len(mapping.labels) == len(expected) == sum(Prepared(out / "prepare").n_voxels)
    if method == "coordinates":
        assert mapping.n_clusters == 12
        assert np.array_equal(mapping.labels, by_coordinates(np.array(expected, np.float32), 12).labels)
        return
    pairs = set(zip(expected, mapping.labels.tolist(), strict=True))
    assert len(pairs) == len(set(expected)) == mapping.n_clusters, "a parcel is a cluster, and none has two"
    both = {label: {side for (side, _), own in pairs if own == label} for label in mapping.labels.tolist()}
    assert all(len(sides) == 1 for sides in both.values()), "the hemispheres share no parcel"


def test_a_cluster_of_coordinates_is_one_place(tree: Path, tmp_path: Path) -> None:
    out = clustered("coordinates", tree, tmp_path, **{"clustering.n_clusters": 12})
    labels, points = load_mapping(out / "clusters").labels, np.load(out / "anatomy" / "anatomy.npy")
    within = np.mean([points[labels == c].std(0).mean() for c in range(12)])
    assert within < 0.4 * points.std(0).mean()


def test_the_seed_and_the_number_of_clusters_count(tree: Path, tmp_path: Path) -> None:
    a, b = (
        load_mapping(clustered("coordinates", tree, tmp_path / str(seed), seed=seed) / "clusters").labels
        for seed in (0, 1)
    )
    assert not np.array_equal(a, b)
    with pytest.raises(UserError, match="clustering.n_clusters is 5000, but there are"):
        clustered("coordinates", tree, tmp_path / "many", **{"clustering.n_clusters": 5000})


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(sweep_here: Callable[..., Any], data: Path, *arguments: str) -> str:
    """Return the error of a run on data that lack something; nothing may have been computed."""
    out = data.parent / "runs"
    answer = sweep_here("clustering", "--data", data, "--out", out, "--set=generation.subjects=[1,2]", *arguments)
    assert answer.code == 2 and not (out / "store").exists(), answer.err
    return str(answer.error)


def test_a_tree_without_surfaces_is_refused_before_anything_runs(broken: Path, sweep_here: Callable[..., Any]) -> None:
    (broken / paths.surface("rh")).unlink()
    error = refused(sweep_here, broken)
    assert len(error.splitlines()) <= 2 and "clustering.method coordinates" in error
    assert f"put {paths.surface('lh')} and rh.pial" in error and f"into {broken}" in error and "aws s3 sync" in error


def test_a_tree_without_an_atlas_is_refused_before_anything_runs(broken: Path, sweep_here: Callable[..., Any]) -> None:
    (broken / paths.annotation("lh", paths.ATLASES["schaefer-1000"])).unlink()
    error = refused(sweep_here, broken)
    assert len(error.splitlines()) <= 2 and "clustering.method schaefer-1000" in error
    assert "lh.Schaefer2018_1000Parcels_7Networks_order.annot" in error and "curl -L" in error


def test_a_store_without_anatomy_says_to_prepare_it_again(
    tree: Path, tmp_path: Path, sweep_here: Callable[..., Any]
) -> None:
    out = tmp_path / "store"
    prepare(tree, out, parts=["betas", "images", "external"], workers=1)
    error = refused(sweep_here, out)
    assert "clustering.method coordinates" in error and "prepare again: python -m benchmark.data prepare" in error
    error = refused(sweep_here, out, "--only=functional", "--set=generation.test_set=nsd-synthetic")
    assert "generation.test_set nsd-synthetic" in error and "--parts synthetic" in error


def test_a_tree_without_nsd_synthetic_is_refused(broken: Path, sweep_here: Callable[..., Any]) -> None:
    (broken / paths.synthetic_betas(2, "rh")).unlink()
    error = refused(sweep_here, broken, "--only=functional", "--set=generation.test_set=nsd-synthetic")
    assert "generation.test_set nsd-synthetic" in error and "rh.betas_nsdsynthetic.mgh" in error
    assert len(error.splitlines()) == 2 and "benchmark.data check" in error


def test_what_is_not_asked_for_need_not_be_there(broken: Path, sweep_here: Callable[..., Any]) -> None:
    shutil.rmtree(broken / "nsddata" / "freesurfer")
    (broken / paths.synthetic_betas(2, "rh")).unlink()
    arguments = ("--only=functional", "--set=generation.subjects=[1,2]", "--dry-run", "--out", broken / "runs")
    assert sweep_here("clustering", "--data", broken, *arguments).code == 0


# --- NSD-Synthetic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tree", "store"])
def test_the_recordings_are_the_loaders(kind: str, request: pytest.FixtureRequest, tree: Path, tmp_path: Path) -> None:
    data = request.getfixturevalue(kind)
    variant = demo().with_settings(
        {"generation.test_set": "nsd-synthetic", "generation.subjects": [2], "data.image_size": 32}
    )
    stage = stage_named(variant, "synthetic", "d" * 64)
    assert synthetic.run(context(stage, tmp_path / "out", data)) == {"subjects": 1, "images": 16}
    own = Synthetic.open(NSD.open(tree))
    betas = np.load(tmp_path / "out" / "betas_subj2.npy")
    tolerance = 0 if kind == "tree" else 2e-3  # a store keeps half precision
    np.testing.assert_allclose(betas, own.load_betas(2).betas, rtol=tolerance, atol=tolerance)
    assert np.array_equal(np.load(tmp_path / "out" / "images_subj2.npy"), own.images(2, range(16), 32))
    as_data = synthetic.SyntheticData(prepared(data, tmp_path / "prepare"), tmp_path / "out", [2])
    assert [len(ids) for ids in as_data.seen_ids] == [0, 16]
    padded = as_data.padded_betas(np.array([1, 1]), np.array([3, 15]))
    assert np.array_equal(padded[:, : as_data.n_voxels[1]], betas[[3, 15]]) and padded.dtype == np.float32


def test_the_complete_miniature_is_the_same_brain(tmp_path: Path) -> None:
    """The simulated recordings of NSD-Synthetic are those of the brain that the model was trained on."""
    variant = (
        demo()
        .with_settings({**QUICK, "generation.test_set": "nsd-synthetic"})
        .with_settings({"data.simulation": SMALL})
    )
    own = variant_stages(variant, "x")
    plain, complete = own.prepare.upstream["nsd"], own.end.upstream["synthetic"].upstream["nsd"]
    trees = []
    for stage in (plain, complete):
        run_simulate(context(stage, tmp_path / stage.fingerprint))
        trees.append(NSD.open(tmp_path / stage.fingerprint / "nsd"))
    assert not (trees[0].root / paths.SYNTHETIC_STIMULI).exists()
    added = trees[1].file_digests.keys() - trees[0].file_digests.keys()
    assert {name: trees[1].file_digests[name] for name in trees[0].file_digests} == trees[0].file_digests
    assert any("nsdsynthetic" in name for name in added)


def test_nsd_synthetic_is_reconstructed_by_a_finished_variant(
    tiny_run: Any, tmp_path: Path, sweep_here: Callable[..., Any]
) -> None:
    shutil.copytree(tiny_run.out / "store", tmp_path / "store")
    arguments = [argument for argument in tiny_run.arguments if "test_images" not in argument]
    command = (*arguments, "--only=8", "--out", tmp_path, "--set=generation.test_set=nsd-synthetic")
    answer = sweep_here(*command, "--set=generation.test_images=14")
    assert answer.code == 0, answer.err
    assert "12 stages: 3 to run, 9 cached" in answer.out, "what was trained stays"
    variant = tiny_run.variants["clusters=8"].with_settings(
        {"generation.test_set": "nsd-synthetic", "generation.test_images": 14}
    )
    end = variant_stages(variant, "clusters=8").end
    folder = tmp_path / "store" / end.key
    assert f"clusters=8: NSD-Synthetic as seen and reconstructed: {folder}/grid_subj*.png" in answer.out
    assert not (tmp_path / "leaderboard").exists(), "no protocol scores these images"
    names = {synthetic.file_name(s, image) for s in (1, 2) for image in range(14)}
    assert "subj02_synthetic013.png" in names
    for kind in ("seen", *KINDS):
        assert {path.name for path in (folder / kind).iterdir()} == names
    recorded = tmp_path / "store" / end.upstream["synthetic"].key
    for name, subject, image in (("subj02_synthetic013.png", 2, 13), ("subj01_synthetic000.png", 1, 0)):
        seen = np.load(recorded / f"images_subj{subject}.npy")[image]
        assert np.array_equal(np.asarray(Image.open(folder / "seen" / name)), seen)
    first, second = (np.asarray(Image.open(folder / "seen" / f"subj0{s}_synthetic013.png")) for s in (1, 2))
    assert not np.array_equal(first, second), "coloured images are each subject's own"
    with Image.open(folder / "grid_subj01.png") as grid:
        assert grid.width > 14 * 76 and grid.height > 4 * 76
    summary = read_json(folder / "status.json")["summary"]
    assert summary["images"] == 14 and summary["subjects"] == 2 and -1 <= summary["PixCorr"] <= 1
    again = sweep_here(*command, "--set=generation.test_images=14")
    assert again.code == 0 and "0 to run, 12 cached" in again.out and "grid_subj" in again.out


def test_a_responses_image_follows_from_its_recording(tiny_run: Any, tmp_path: Path) -> None:
    """Dealt the recordings of other images, the stage makes other pictures, and the seed alone does not."""
    settings = {"generation.test_set": "nsd-synthetic", "generation.test_images": 3, "generation.subjects": [1]}
    variant = tiny_run.variants["clusters=8"].with_settings(settings)
    end = variant_stages(variant, "clusters=8").end
    data = Prepared(tiny_run.folder("prepare", "clusters=8"))
    rng = np.random.default_rng(0)
    betas = rng.standard_normal((5, data.n_voxels[0])).astype(np.float32)
    images = rng.integers(0, 256, (5, 64, 64, 3), np.uint8)
    made = []
    for number, own in enumerate((betas, betas, betas[[3, 1, 2, 0, 4]])):
        given = tmp_path / f"given{number}"
        given.mkdir()
        np.save(given / "betas_subj1.npy", own)
        np.save(given / "images_subj1.npy", images)
        ctx = tiny_run.context(end, tmp_path / f"out{number}")
        known = {role: path for role, path in ctx.inputs.items() if role != "synthetic"}
        synthetic.run_reconstruct(replace(ctx, inputs={**known, "synthetic": given}))
        names = [synthetic.file_name(1, image) for image in range(3)]
        made.append([np.asarray(Image.open(ctx.out / "combined" / name)).astype(int) for name in names])
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(made[0], made[1], strict=True))
    changed = [np.abs(a - b).max() > 2 for a, b in zip(made[0], made[2], strict=True)]
    assert changed == [True, False, False]
