"""What runs hold of a variant, and that they are the same when they are made again from the store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from wandb.util import get_core_path

from benchmark.cli import main_guard
from benchmark.errors import RunError
from benchmark.execute import RunOptions, execute
from benchmark.report.answers import Answer
from benchmark.store import STATUS, Store, read_json, write_json
from benchmark.tracking.__main__ import main
from benchmark.tracking.board import board_folder, track_board
from benchmark.tracking.directions import direction
from benchmark.tracking.findings import TABLE_IMAGES
from benchmark.tracking.rebuild import curves
from leaderboard import Interval, Row, summarise
from leaderboard.results import RESULTS, write_result
from metrics.cards import CARDS

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Find the stages, in the home of a user who never heard of W&B."""
    monkeypatch.syspath_prepend(str(HERE))
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def run_variant(store: Store, tracker: Any, group: str = "clusters", **changes: Any) -> dict[str, Any]:
    import tracked_stages

    options = RunOptions(progress=False, threads=1, tracker=tracker, group=group)
    made = tracked_stages.stages(**changes)
    for stage in made.values():
        execute(stage, store, options)
    return made


class Read:
    """A run as W&B's own reader shows it."""

    def __init__(self, tracking: Path) -> None:
        (folder,) = (tracking / "wandb").glob("offline-run-*")
        self.folder = folder
        # W&B's own process may still be writing the last record.
        deadline = time.monotonic() + 20
        while not self._load() and time.monotonic() < deadline:
            time.sleep(0.1)

    def _load(self) -> bool:
        (file,) = self.folder.glob("run-*.wandb")
        # What `wandb leet inspect` starts, without the seconds that the import of W&B takes.
        command = [get_core_path(), "leet", "inspect", "--json", "--run-file", str(file)]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        records = [json.loads(line) for line in shown.splitlines()]
        self.by_type: dict[str, list[Any]] = {}
        for record in records:
            self.by_type.setdefault(record["type"], []).append(record[record["type"]])
        self.run = self.by_type["run"][0]
        self.history = [one["item"] for one in self.by_type.get("history", [])]
        self.summary: dict[str, Any] = {}
        for one in self.by_type.get("summary", []):
            self.summary.update(one.get("update", {}))
        self.artifacts = {one["name"]: one for one in self.by_type.get("artifact", [])}
        self.goals = {one["name"]: one["summary"] for one in self.by_type.get("metric", []) if "summary" in one}
        return "exit" in self.by_type

    @property
    def config(self) -> dict[str, Any]:
        return {name: value for name, value in self.run["config"]["update"].items() if name != "_wandb"}

    @property
    def exit_code(self) -> int:
        return int(self.by_type["exit"][0].get("exit_code", 0))

    def table(self, name: str) -> pd.DataFrame:
        contents = self.artifacts[f"run-{self.run['run_id']}-{name}"]["manifest"]["contents"]
        (file,) = [entry["local_path"] for entry in contents if entry["path"] == f"{name}.table.json"]
        content = json.loads(Path(file).read_text())
        return pd.DataFrame(content["data"], columns=content["columns"])

    def same(self) -> dict[str, Any]:
        """What must be the same in a run that is made again: all but when that was, and what W&B counts by itself."""
        own = ("_timestamp", "_runtime", "_step", "_wandb.runtime", "wall_s", "cpu_s", "peak_memory_bytes")
        places = ("artifact_path", "_latest_artifact_path", "sha256", "size", "path")

        def kept(values: dict[str, Any]) -> dict[str, Any]:
            return {k: v for k, v in values.items() if k not in own and k.rpartition(".")[2] not in places}

        lines: dict[Any, dict[str, Any]] = {}
        for item in self.history:  # a step that was logged twice counts once, in its last form
            lines.setdefault(item.get("global_step"), {}).update(kept(item))
        return {
            "run": {k: self.run.get(k) for k in ("run_id", "run_group", "job_type", "display_name", "project", "tags")},
            "config": self.config,
            "history": lines,
            "summary": kept(self.summary),
            "goals": self.goals,
            "exit": self.exit_code,
            "artifacts": {
                one["name"]: (one["type"], one.get("metadata"), one["manifest"]["contents"])
                for one in self.artifacts.values()
                if one["type"] != "run_table"
            },
        }


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        code = main_guard(lambda: main([str(one) for one in arguments]))
    except SystemExit as error:
        code = int(error.code or 0)
    return code, *capsys.readouterr()


def test_runs_of_a_variant_hold_what_it_came_to(tmp_path: Path) -> None:
    store = Store(tmp_path / "out" / "store")
    made = run_variant(store, "wandb")
    reads = {name: Read(store.folder(stage) / "tracking") for name, stage in made.items()}
    lowlevel, recons, score = (reads[name] for name in ("lowlevel", "reconstruct", "score"))

    assert score.run["run_id"] == made["score"].fingerprint[:16] and score.run["run_group"] == "clusters"
    assert score.run["tags"] == ["score", "clusters=8", "demo"] and score.run["project"] == "brain-it-bench"
    assert score.config["stage"]["fingerprint"] == made["score"].fingerprint
    assert score.config["stage"]["upstream"] == {"reconstruct": made["reconstruct"].key}
    assert score.config["protocol"] == "demo" and score.config["made_with"]["hardware"]["cores"] >= 1
    assert all("environment" in read.by_type for read in reads.values()), "system metrics are on"

    # Directions: those of the cards, losses down, correlations up.
    assert lowlevel.goals["train/loss"] == {"min": True, "last": True}
    assert lowlevel.goals["validation/correlation"] == {"max": True, "last": True}
    assert {key: "max" if "max" in score.goals[key] else "min" for key in CARDS} == {
        key: "max" if card.direction == "higher" else "min" for key, card in CARDS.items()
    }
    assert lowlevel.summary["train/loss"] == {"min": pytest.approx(1 / 31), "last": pytest.approx(1 / 31)}

    # Scores with their bounds are those of the leaderboard's own statistics.
    per_image = pd.read_parquet(store.folder(made["score"]) / "scores.parquet")
    import pyarrow as pa

    for (_, kind), metrics in summarise(pa.Table.from_pandas(per_image)).items():
        for metric, interval in metrics.items():
            name = metric if kind == "combined" else f"{kind}/{metric}"
            found = [score.summary[f"{name}{end}"] for end in ("", "_ci_low", "_ci_high")]
            assert found == pytest.approx([interval.mean, interval.ci_low, interval.ci_high])

    # The table: the first images of the test set for each subject, seen, reconstructed, and scored one by one.
    table = score.table("reconstructions")
    assert list(table.columns) == ["key", "image_id", "subject", "seen", "lowlevel", "semantic", "combined", *CARDS]
    assert len(table) == 2 * TABLE_IMAGES and table["key"].is_unique
    assert sorted(table["image_id"].unique()) == sorted(per_image["image_id"].unique())[:TABLE_IMAGES]
    own = per_image[per_image["variant"] == "combined"].set_index(["subject", "image_id", "metric"])["value"]
    for row in table.to_dict("records"):
        assert row["key"] == f"subj{row['subject']:02d}_nsd{row['image_id']:05d}"
        assert all(row[key] == pytest.approx(own[row["subject"], row["image_id"], key]) for key in CARDS)
        assert {row[kind]["_type"] for kind in ("seen", "lowlevel", "semantic", "combined")} == {"image-file"}

    # Artifacts and their lineage: weights and scores as files, images by reference.
    names = [f"{name}-{stage.fingerprint[:16]}" for name, stage in made.items()]
    (weights,), (images,), scores = (
        [one for one in read.artifacts.values() if one["type"] != "run_table"] for read in reads.values()
    )
    (scored,) = scores
    assert [weights["name"], images["name"], scored["name"]] == names
    assert [weights["type"], images["type"], scored["type"]] == ["checkpoint", "reconstructions", "scores"]
    assert {e["path"] for e in weights["manifest"]["contents"]} >= {"bit.safetensors", "config.yaml", "outputs.json"}
    assert {e["path"] for e in scored["manifest"]["contents"]} >= {"scores.parquet", "protocol.json", "manifest.json"}
    references = {e["path"]: e for e in images["manifest"]["contents"] if "ref" in e}
    folder = store.folder(made["reconstruct"])
    assert set(references) == {path.relative_to(folder).as_posix() for path in folder.glob("*/*.png")}
    one = references["combined/subj01_nsd00003.png"]
    assert one["ref"] == (folder / "combined/subj01_nsd00003.png").as_uri() and one["digest"]
    metadata = [json.loads(artifact["metadata"]) for artifact in (weights, images, scored)]
    assert [about["uses"] for about in metadata] == [[], names[:1], names[1:2]]
    assert metadata[1]["upstream"] == {"lowlevel": made["lowlevel"].key} and metadata[0]["config"] == {"seed": 0}
    # Nothing of an artifact was copied but what a table shows.
    assert not list((store.folder(made["lowlevel"]) / "tracking").rglob("staging/*"))


def test_two_variants_join_on_their_tables(tmp_path: Path) -> None:
    store = Store(tmp_path / "out" / "store")
    tables = [
        Read(store.folder(run_variant(store, "wandb", seed=seed, label=f"seed={seed}")["score"]) / "tracking").table(
            "reconstructions"
        )
        for seed in (0, 1)
    ]
    assert tables[0]["key"].tolist() == tables[1]["key"].tolist()
    assert list(tables[0].columns) == list(tables[1].columns)
    joined = tables[0].merge(tables[1], on="key", validate="one_to_one")
    assert len(joined) == 2 * TABLE_IMAGES and (joined["PixCorr_x"] != joined["PixCorr_y"]).all()


def test_a_failed_stage_is_a_failed_run(tmp_path: Path) -> None:
    store = Store(tmp_path / "out" / "store")
    with pytest.raises(RunError, match="the loss is nan"):
        run_variant(store, "wandb", fails=True)
    (folder,) = (store.root / "lowlevel").iterdir()
    read = Read(folder / "tracking")
    assert read.exit_code == 1 and read.summary["state"] == "failed" and "loss is nan" in read.summary["error"]
    assert not read.artifacts and len(read.history) == 12


def test_runs_are_made_again_as_they_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    store = Store(out / "store")
    made = run_variant(store, "wandb")
    with pytest.raises(RunError):
        run_variant(store, "wandb", seed=1, label="seed=1", fails=True)
    folders = [store.folder(stage) for stage in made.values()] + [
        folder for folder in (store.root / "lowlevel").iterdir() if folder != store.folder(made["lowlevel"])
    ]
    before = [Read(folder / "tracking").same() for folder in folders]
    for folder in folders:
        shutil.rmtree(folder / "tracking" / "wandb")

    code, told, _ = call(capsys, "rebuild", "--out", out, "--dry-run")
    assert code == 0 and told.startswith("would make 4 runs in wandb: 4 stages, 0 leaderboards\n")
    assert "failed      lowlevel [seed=1]" in told and not list(out.rglob("wandb"))
    for _ in range(2):  # the second time changes nothing
        code, told, _ = call(capsys, "rebuild", "--out", out)
        assert code == 0 and "\nmade 4 runs; they are offline" in told and "system metrics" in told
        assert [Read(folder / "tracking").same() for folder in folders] == before
    for folder in folders:
        assert "stats" not in Read(folder / "tracking").by_type, "this machine is not the one that it ran on"
        assert sorted(path.name for path in (folder / "tracking").iterdir()) == ["metrics.jsonl", "wandb"]
    times = [item["_timestamp"] for item in Read(folders[0] / "tracking").history if "train/loss" in item]
    logged = {step: when for step, when, _ in curves(folders[0] / "tracking")}
    assert times == pytest.approx([logged[step] for step in (0, 10, 20, 30)])


def test_curves_are_as_the_last_attempt_left_them(tmp_path: Path) -> None:
    lines = [
        {"time": 1.0, "step": 10, "a": 1.0, "b": 5.0},
        {"time": 2.0, "step": 20, "a": 2.0},
        {"time": 3.0, "step": 10, "a": 3.0},
        {"time": 3.5, "summary": {"a": 9}},
        {"time": 4.0, "step": 20, "a": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "a')
    found = list(curves(tmp_path))
    assert [(step, when) for step, when, _ in found] == [(10, 3.0), (20, 4.0)]
    assert found[0][2] == {"a": 3.0, "b": 5.0} and pd.isna(found[1][2]["a"])


def test_what_a_store_lacks_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert call(capsys, "rebuild", "--out", out)[0] == 2
    store = Store(out / "store")
    made = run_variant(store, "none", group="")
    (store.root / "lowlevel" / "0123456789abcdef").mkdir()
    (store.root / "lowlevel" / "0123456789abcdef" / "config.yaml").write_text("- no settings")
    code, told, error = call(capsys, "rebuild", "--out", out, "--mode", "offline")
    assert code == 1 and error == "error: 1 of 4 runs could not be made; the others are\n"
    assert "cannot be made again: curves (it ran with --tracker none): " in told and "again: its sweep: " in told
    assert "cannot be read: " in told and "0123456789abcdef" in told
    read = Read(store.folder(made["score"]) / "tracking")
    assert not read.run.get("run_group") and "PixCorr_ci_low" in read.summary


def test_a_store_cannot_make_a_run_read_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    store = Store(out / "store")
    made = run_variant(store, "jsonl")
    secret = tmp_path / "secret.png"
    next(store.folder(made["reconstruct"]).glob("combined/*.png")).rename(secret)
    metrics = store.folder(made["lowlevel"]) / "tracking" / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write(json.dumps({"time": 1, "image": "secret", "path": str(secret)}) + "\n")
    assert call(capsys, "rebuild", "--out", out)[0] == 0
    assert not any("secret" in item for item in Read(metrics.parent).history)


def answer_of(out: Path, made: dict[str, Any]) -> Answer:
    """A finished sweep's answer, with its rows and per-image scores where a sweep puts them."""
    import pyarrow.parquet as pq

    folder = Store(out / "store").folder(made["score"])
    table = pq.read_table(folder / "scores.parquet")
    intervals = summarise(table)
    common: dict[str, Any] = {"track": "demo", "protocol": "demo", "protocol_hash": "0" * 16, "subjects": (1, 2)}
    common |= {"n_images": 14, "seeds": (0,)}
    source = f"store/{made['score'].key}"
    rows = [Row(method=m, variant=v, metrics=found, source=source, **common) for (m, v), found in intervals.items()]
    for row in rows:
        write_result(out / "leaderboard" / RESULTS, row, table)
    chance = Row(method="reference", variant="chance", kind="reference", metrics={"CLIP": Interval(mean=0.5)},
                 source="by arithmetic", **common)  # fmt: skip
    answer = Answer("clusters", "How many clusters?", "Which?", "Table T3", (*rows, chance))
    answer.save(out)
    return answer


def test_a_sweep_ends_with_a_run_of_its_leaderboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    made = run_variant(Store(out / "store"), "jsonl", group="")
    answer = answer_of(out, made)
    assert track_board(out, answer, "wandb") and not track_board(out, answer, "wandb"), "once"
    (folder,) = board_folder(out, "clusters").iterdir()
    read = Read(folder)
    assert read.run["job_type"] == "leaderboard" and read.run["run_group"] == "clusters"
    assert read.run["run_id"] == folder.name
    row = next(row for row in answer.rows if row.variant == "combined")
    found = [read.summary[f"combined/PixCorr{end}"] for end in ("", "_ci_low", "_ci_high")]
    assert found == [row.metrics["PixCorr"].mean, row.metrics["PixCorr"].ci_low, row.metrics["PixCorr"].ci_high]
    assert read.summary["chance/CLIP"] == 0.5 and "chance/CLIP_ci_low" not in read.summary
    table = read.table("leaderboard")
    assert table["variant"].tolist() == [row.variant for row in answer.rows]
    assert table.set_index("variant").loc["combined", "PixCorr_ci_high"] == row.metrics["PixCorr"].ci_high
    (artifact,) = [one for one in read.artifacts.values() if one["type"] == "leaderboard"]
    paths = {entry["path"] for entry in artifact["manifest"]["contents"]}
    assert "leaderboard.json" in paths and sum(path.endswith(".parquet") for path in paths) == 3
    assert json.loads(artifact["metadata"])["uses"] == [f"score-{made['score'].fingerprint[:16]}"]

    before = read.same()
    code, told, _ = call(capsys, "rebuild", "--out", out)
    assert code == 0 and told.startswith("making 4 runs in wandb: 3 stages, 1 leaderboards")
    assert Read(folder).same() == before
    # Which sweep a stage ran for is also known from the sweep's rows.
    assert Read(Store(out / "store").folder(made["lowlevel"]) / "tracking").run["run_group"] == "clusters"


def test_what_fails_half_way_keeps_the_run_that_was_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    store = Store(out / "store")
    made = run_variant(store, "wandb")
    before = Read(store.folder(made["score"]) / "tracking").same()
    status = store.folder(made["score"]) / STATUS
    (store.folder(made["score"]) / "scores.parquet").write_bytes(b"no parquet")
    code, told, error = call(capsys, "rebuild", "--out", out)
    assert code == 1 and "score [clusters=8]: " in told and error.startswith("error: 1 of 3 runs could not be made")
    assert Read(status.parent / "tracking").same() == before


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("train/loss", "min"),
        ("semantic/validation/loss", "min"),
        ("median correlation", "max"),
        ("PixCorr", "max"),
        ("lowlevel/Alex(2)", "max"),
        ("Brain-IT combined LPIPS", "min"),
        ("SwAV", "min"),
        ("PixCorr_ci_low", None),
        ("epoch", None),
        ("train/lr", None),
        ("", None),
    ],
)
def test_direction(name: str, better: str | None) -> None:
    assert direction(name) == better


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rebuidl"], "did you mean 'rebuild'"),
        (["rebuild", "--tracker", "wandbb"], "did you mean 'wandb'"),
        (["rebuild", "--tracker", "tensorboard", "--mode", "online"], "--mode online is W&B's"),
        ([], "see python -m benchmark.tracking --help"),
    ],
)
def test_slips_cost_a_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = call(capsys, *arguments)
    assert code == 2 and words in error and error.count("\n") == 1


def test_help_answers_at_once(start: Callable[[], float] = time.monotonic) -> None:
    code = (
        "import sys; from benchmark.tracking.__main__ import parser; parser().format_help(); "
        "assert not {'wandb', 'torch', 'numpy', 'pydantic', 'yaml', 'pyarrow'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_old_status_files_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    store = Store(out / "store")
    made = run_variant(store, "jsonl")
    for stage in made.values():  # as stages were kept before they wrote down their sweep
        status = read_json(store.folder(stage) / STATUS)
        del status["sweep"]
        write_json(store.folder(stage) / STATUS, status)
    answer_of(out, made)
    assert call(capsys, "rebuild", "--out", out)[0] == 0
    assert Read(store.folder(made["reconstruct"]) / "tracking").run["run_group"] == "clusters"
    assert yaml.safe_load((store.folder(made["score"]) / "config.yaml").read_text())["name"] == "score"
