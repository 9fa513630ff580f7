"""The second tracker, read back with TensorBoard's own reader."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

from benchmark.cli import main_guard
from benchmark.execute import RunOptions, execute
from benchmark.store import Store
from benchmark.tracking import open_tracker
from benchmark.tracking.__main__ import main
from benchmark.tracking.base import Table

HERE = Path(__file__).parent
RUN: dict[str, Any] = {
    "group": "clusters",
    "job_type": "lowlevel",
    "run_id": "0123456789abcdef",
    "name": "lowlevel clusters=8",
    "config": {"lr": 5e-4, "clusters": {"n": 128}, "layers": [1, 2]},
    "tags": ("lowlevel", "clusters=8"),
}


class Read:
    """A run as TensorBoard shows it."""

    def __init__(self, tracking: Path) -> None:
        self.events = EventAccumulator(str(tracking / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
        self.events.Reload()

    def curve(self, name: str) -> list[tuple[int, float]]:
        return [(event.step, pytest.approx(event.value)) for event in self.events.Scalars(name)]

    def text(self, name: str) -> str:
        return str(self.events.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode())

    def record(self, name: str) -> Any:
        return json.loads(self.text(name))

    def image(self, name: str) -> Image.Image:
        return Image.open(io.BytesIO(self.events.Images(name)[-1].encoded_image_string))

    def parameters(self) -> dict[str, Any]:
        content = self.events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
        info = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
        kinds = ("number_value", "string_value", "bool_value")
        return {
            name: next(getattr(value, kind) for kind in kinds if value.HasField(kind))
            for name, value in info.hparams.items()
        }


def test_what_is_logged_is_read_back(tmp_path: Path) -> None:
    tracker = open_tracker("tensorboard", tmp_path, **RUN)
    for step in range(3):
        tracker.log({"train/loss": 1 / (1 + step), "epoch": step / 2}, 10 * step)
    pictures = [tmp_path / f"{name}.png" for name in ("a", "b")]
    for path, colour in zip(pictures, ("red", "blue"), strict=True):
        Image.new("RGB", (8, 8), colour).save(path)
    tracker.image("first", pictures[0])
    tracker.table(Table("reconstructions", ("key", "seen", "made", "PixCorr"), (("x", *pictures, 0.25),)))
    tracker.summary({"PixCorr": 0.25, "PixCorr_ci_low": 0.125, "by": {"subject": 1}, "note": "fine"})
    tracker.finish("done")
    read = Read(tmp_path)
    assert read.curve("train/loss") == [(0, 1.0), (10, 0.5), (20, 1 / 3)]
    assert read.curve("epoch") == [(0, 0.0), (10, 0.5), (20, 1.0)]
    assert read.curve("summary/PixCorr_ci_low") == [(20, 0.125)] and read.curve("summary/by.subject") == [(20, 1.0)]
    assert read.record("config") == RUN["config"] and read.record("summary")["note"] == "fine"
    assert read.record("run")["id"] == RUN["run_id"] and read.record("run")["tags"] == list(RUN["tags"])
    assert read.parameters() == {"lr": 5e-4, "clusters.n": 128.0, "layers": "[1, 2]"}
    assert read.image("first").size == (8, 8)
    grid = read.image("reconstructions").convert("RGB")
    assert grid.size == (192, 96) and grid.getpixel((5, 5)) == (255, 0, 0) and grid.getpixel((100, 5)) == (0, 0, 255)
    assert read.text("reconstructions").splitlines()[2] == "| x | a.png | b.png | 0.25 |"
    assert read.text("status") == "done"
    assert (tmp_path / "metrics.jsonl").read_text().count('"step"') == 3, "JSON lines are kept beside"


def test_a_resumed_stage_hides_what_it_repeats(tmp_path: Path) -> None:
    for steps, status in ((range(0, 5), "interrupted"), (range(3, 7), "done")):
        tracker = open_tracker("tensorboard", tmp_path, **RUN)
        for step in steps:
            tracker.log({"loss": float(step + 100 * (status == "done"))}, step)
        tracker.finish(status)  # type: ignore[arg-type]
    assert Read(tmp_path).curve("loss") == [(0, 0), (1, 1), (2, 2), (3, 103), (4, 104), (5, 105), (6, 106)]


def test_a_full_disk_does_not_stop_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    tracker = open_tracker("tensorboard", tmp_path, **RUN)
    tracker.log({"loss": 1.0}, 1)
    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    tracker.log({"loss": 1.0}, 2)
    tracker.log({"loss": 1.0}, 3)
    tracker.finish("done")
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == [
        "tracking: TensorBoard stopped at 'log' ([Errno 28] No space left on device); the stage goes on"
    ]
    assert (tmp_path / "metrics.jsonl").read_text().count('"step"') == 3


def test_runs_of_a_variant_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    import tracked_stages

    out = tmp_path / "out"
    store = Store(out / "store")
    made = tracked_stages.stages()
    for stage in made.values():
        execute(stage, store, RunOptions(progress=False, threads=1, tracker="tensorboard", group="clusters"))
    places = {name: store.folder(stage) / "tracking" for name, stage in made.items()}

    def same() -> list[Any]:
        reads = {name: Read(place) for name, place in places.items()}
        low, score = reads["lowlevel"], reads["score"]
        assert score.image("reconstructions").size == (4 * 96, 24 * 96)
        artifact = f"artifact/score-{made['score'].fingerprint[:16]}"
        scalars = [name for name in score.events.Tags()["scalars"] if "_s" not in name and "memory" not in name]
        return [
            {step: value.expected for step, value in low.curve("train/loss")},
            {name: score.curve(name)[-1][1].expected for name in scalars},
            [read.record("config") for read in reads.values()],
            [read.parameters() for read in reads.values()],
            score.text("reconstructions"),
            score.record(artifact)["uses"],
            reads["reconstruct"].record(f"artifact/reconstruct-{made['reconstruct'].fingerprint[:16]}")["references"],
        ]

    before = same()
    assert before[0] == {0: 1.0, 10: pytest.approx(1 / 11), 20: pytest.approx(1 / 21), 30: pytest.approx(1 / 31)}
    assert before[1]["summary/PixCorr_ci_low"] < before[1]["summary/PixCorr"] < before[1]["summary/PixCorr_ci_high"]
    assert before[5] == [f"reconstruct-{made['reconstruct'].fingerprint[:16]}"] and before[6] == 4 * 28 - 14
    for _ in range(2):
        assert main_guard(lambda: main(["rebuild", "--out", str(out), "--tracker", "tensorboard"])) == 0
        assert same() == before
    assert f"tensorboard --logdir {out / 'store'}" in capsys.readouterr().out
