"""How a submission stands, told by hand-made stage folders and what Slurm's commands are made to print."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import resource
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from benchmark.cli import main_guard
from benchmark.errors import UserError
from benchmark.launch import control, submissions
from benchmark.launch.control import Watch, report, select, to_cancel, to_retry
from benchmark.launch.submissions import Submission, SubmittedStage
from benchmark.launch.table import Lines, LiveTable, table
from benchmark.store import Store, write_json

CREATED = "2026-11-23T19:15:00+00:00"
BEFORE, AFTER = "2026-11-23T19:00:00+00:00", "2026-11-23T19:30:00+00:00"
ROOT = Path(__file__).parents[2]


@dataclass
class Slurm:
    """Programs on the PATH that print what they are told to, and write down how they were called."""

    folder: Path
    queue: dict[str, tuple[str, str]] = field(default_factory=dict)
    accounting: dict[str, str] = field(default_factory=dict)

    def write(self) -> None:
        queue = [
            f"{job} |{state}|{reason}|{'n1' if state == 'RUNNING' else ''}|0:07|10:00|0"
            for job, (state, reason) in self.queue.items()
        ]
        self.program("squeue", "\n".join(queue))
        self.program("sacct", "\n".join(f"{job}|{state}|0:0|n1|61|10" for job, state in self.accounting.items()))
        self.program("scancel")
        self.program("sbatch")

    def program(self, name: str, out: str = "", code: int = 0, err: str = "") -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"{name}.out").write_text(out + "\n" if out else "")
        program = self.folder / name
        program.write_text(
            f'#!/bin/sh\necho "{name} $*" >> {self.folder}/calls\ncat {self.folder}/{name}.out\n[ -z "{err}" ] || echo "{err}" >&2\nexit {code}\n'
        )
        program.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        log = self.folder / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line.partition(" ")[2] for line in lines if line.startswith(f"{name} ")]


@dataclass
class Sweep:
    """A store with a submission of a chain of stages for two variants: encoder -> lowlevel -> score."""

    out: Path
    store: Store
    submission: Submission
    slurm: Slurm

    def stage(self, title: str) -> SubmittedStage:
        (found,) = [stage for stage in self.submission.stages if stage.title == title]
        return found

    def folder(self, title: str) -> Path:
        folder = self.store.root / self.stage(title).key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def tell(self, title: str, state: str, **fields: Any) -> Path:
        """Write a stage's status as its process would."""
        folder = self.folder(title)
        status = {
            "state": state,
            "host": "n1",
            "pid": 1,
            "started": AFTER,
            "stage": folder.parent.name,
            "label": "",
            **fields,
        }
        if state != "running":
            status.setdefault("ended", AFTER)
            status.setdefault("wall_s", 12.5)
        write_json(folder / "status.json", status)
        if state == "done":
            write_json(
                folder / "DONE",
                {"fingerprint": self.stage(title).fingerprint, "finished": status["ended"], "outputs": {}},
            )
        return folder

    def jobs(self, **states: str | tuple[str, str]) -> None:
        """Say what squeue knows: encoder="RUNNING", or low8=("PENDING", "Priority")."""
        names = {"encoder": "10", "low8": "11_0", "low16": "11_1", "score8": "12_0", "score16": "12_1"}
        self.slurm.queue = {
            names[name]: (told, "None") if isinstance(told, str) else told for name, told in states.items()
        }
        self.slurm.write()

    def report(self, **options: Any) -> control.Status:
        return report(self.store, self.submission, **options)

    def states(self) -> dict[str, str]:
        return {row.stage.title: row.state for row in self.report().rows}

    def row(self, title: str) -> control.Row:
        (found,) = [row for row in self.report().rows if row.stage.title == title]
        return found


def digits(number: int) -> str:
    return f"{number:016x}" + "0" * 48


def make_submission(out: Path, identifier: str = "clusters-20261123-191500", **changes: Any) -> Submission:
    logs = out / "store" / ".jobs" / identifier
    stages: list[SubmittedStage] = []

    def add(number: int, name: str, label: str, job: str, *needs: SubmittedStage) -> SubmittedStage:
        title = f"{name} [{label}]" if label else name
        stage = SubmittedStage(
            fingerprint=digits(number),
            key=f"{name}/{digits(number)[:16]}",
            title=title,
            job=job,
            needs=tuple(need.fingerprint for need in needs),
            stdout=str(logs / f"{job}_0_log.out"),
            stderr=str(logs / f"{job}_0_log.err"),
            resources={"gpus": 1, "memory_gb": 64.0},
        )
        stages.append(stage)
        return stage

    encoder = add(1, "encoder", "", "10")
    for index, label in enumerate(("clusters=8", "clusters=16")):
        lowlevel = add(2 + index, "lowlevel", label, f"11_{index}", encoder)
        add(4 + index, "score", label, f"12_{index}", lowlevel)
    submission = Submission(
        id=identifier,
        sweep="clusters",
        command="python -m benchmark.sweep clusters --launcher slurm",
        created=CREATED,
        revision="abc1234+0123456789ab",
        out=str(out),
        stages=tuple(stages),
        arguments={"sweep": "clusters", "only": None},
    )
    return replace(submission, **changes)


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    out = tmp_path / "runs"
    store = Store(out / "store")
    slurm = Slurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{slurm.folder}:/usr/bin:/bin")
    slurm.write()
    submission = make_submission(out)
    submissions.write(store, submission)
    return Sweep(out, store, submission, slurm)


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(sweep: Sweep, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Call ``python -m benchmark.sweep`` in this process."""
    from benchmark import sweep as module

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["benchmark.sweep", *arguments, "--out", str(sweep.out)])
        try:
            code = main_guard(module.main)
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


# --- states -----------------------------------------------------------------------------------------------------------


def test_the_queue_tells_what_waits_and_what_runs(sweep: Sweep) -> None:
    sweep.tell("encoder", "done")
    sweep.tell("lowlevel [clusters=8]", "running")
    sweep.jobs(
        low8="RUNNING",
        low16=("PENDING", "Priority"),
        score8=("PENDING", "Dependency"),
        score16=("PENDING", "Dependency"),
    )
    status = sweep.report()
    assert [(row.stage.title, row.state, row.reason) for row in status.rows] == [
        ("encoder", "done", ""),
        ("lowlevel [clusters=8]", "running", ""),
        ("score [clusters=8]", "queued", "waits for lowlevel [clusters=8]"),
        ("lowlevel [clusters=16]", "queued", "waits for its turn"),
        ("score [clusters=16]", "queued", "waits for lowlevel [clusters=16]"),
    ]
    assert (status.rows[0].seconds, status.rows[1].seconds, status.rows[1].node) == (12.5, 7, "n1")
    assert not status.ended and not status.complete and status.counts == {"running": 1, "queued": 3, "done": 1}
    (asked,) = sweep.slurm.calls("squeue")
    assert asked.endswith("--jobs=11,12"), "nothing is asked about what is done"


def test_the_store_is_believed_first(sweep: Sweep) -> None:
    for stage in sweep.submission.stages:
        sweep.tell(stage.title, "done")
    assert sweep.report().complete and sweep.slurm.calls("squeue") == []
    (sweep.folder("score [clusters=8]") / "DONE").unlink()
    sweep.slurm.accounting = {"12_0": "COMPLETED"}
    sweep.slurm.write()
    row = sweep.row("score [clusters=8]")
    assert row.state == "lost" and "left no result" in row.reason, "a job that ended well is no result"


def test_a_failure_shows_its_exception_and_what_to_type_and_holds_up_only_its_own(sweep: Sweep) -> None:
    sweep.tell("encoder", "done")
    folder = sweep.tell("lowlevel [clusters=8]", "failed", error="ValueError: the numbers do not add up")
    (folder / "traceback.txt").write_text("Traceback ...")
    sweep.jobs(low16="RUNNING", score16=("PENDING", "Dependency"), score8=("CANCELLED", "DependencyNeverSatisfied"))
    status = sweep.report(out="")
    low8, score8, low16 = status.rows[1], status.rows[2], status.rows[3]
    assert (low8.state, low8.error) == ("failed", "ValueError: the numbers do not add up")
    assert low8.traceback == str(folder / "traceback.txt")
    assert low8.retry == "python -m benchmark.sweep retry clusters 'lowlevel [clusters=8]'"
    assert (score8.state, score8.reason) == ("blocked", "needs lowlevel [clusters=8] (failed)")
    assert score8.blocked_by == ("lowlevel [clusters=8]",) and score8.retry == ""
    assert low16.state == "running" and not status.ended
    lines = table(status)
    assert "  holds up  1 stage" in lines and f"  retry it  {low8.retry}" in lines
    assert any(line.split()[:2] == ["blocked", "score"] for line in lines)


def test_a_failure_before_the_submission_is_not_one_of_it(sweep: Sweep) -> None:
    sweep.tell("encoder", "failed", error="ValueError: old", started=BEFORE, ended=BEFORE)
    sweep.jobs(encoder=("PENDING", "Resources"))
    assert sweep.row("encoder").state == "queued"
    sweep.jobs(encoder="RUNNING")
    assert sweep.row("encoder").state == "running"
    sweep.tell("encoder", "failed", error="ValueError: new")
    assert sweep.row("encoder").state == "failed", "told by the store before Slurm has noticed"


@pytest.mark.parametrize(
    ("ended", "state", "words"),
    [
        ("OUT_OF_MEMORY", "failed", "ran out of memory (64 GB were asked for)"),
        ("TIMEOUT", "interrupted", "reached its time limit after 61 s"),
        ("NODE_FAIL", "interrupted", "lost its node after 61 s"),
        ("PREEMPTED", "interrupted", "was preempted"),
        ("FAILED", "failed", "ended as FAILED; last words: ImportError: no module named nothing"),
        ("CANCELLED by 1000", "cancelled", "cancelled after 61 s"),
    ],
)
def test_jobs_that_could_not_write_down_how_they_ended(sweep: Sweep, ended: str, state: str, words: str) -> None:
    log = Path(sweep.stage("encoder").stderr)
    log.parent.mkdir(parents=True)
    log.write_text("Traceback\n  File x\nImportError: no module named nothing\nsrun: error: n1: task 0: Exited\n")
    sweep.slurm.accounting = {"10": ended}
    sweep.slurm.write()
    status = sweep.report()
    row = status.rows[0]
    assert row.state == state and words in (row.error or row.reason) and row.retry
    assert {one.state for one in status.rows[1:]} == {"blocked"} and status.ended


def test_a_requeued_job_waits_again_and_says_so(sweep: Sweep) -> None:
    sweep.tell("encoder", "interrupted")
    sweep.jobs(encoder=("PENDING", "BeginTime"))
    row = sweep.row("encoder")
    assert (row.state, row.reason) == ("queued", "was put back into the queue")
    assert sweep.row("lowlevel [clusters=8]").state != "blocked"


def test_an_element_that_was_cancelled_before_its_turn(sweep: Sweep) -> None:
    sweep.tell("encoder", "done")
    sweep.jobs(low8="RUNNING", score8=("PENDING", "Dependency"))  # Slurm has forgotten 11_1 altogether
    states = sweep.states()
    assert states["lowlevel [clusters=16]"] == "cancelled" and states["score [clusters=16]"] == "blocked"


def test_a_process_that_died_without_a_word_is_interrupted_unless_another_holds_the_stage(sweep: Sweep) -> None:
    sweep.tell("encoder", "running", host=socket.gethostname())
    assert sweep.row("encoder").state == "interrupted"
    lock = sweep.store.root / ".locks" / f"{sweep.stage('encoder').key.replace('/', '-')}.lock"
    lock.parent.mkdir()
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert sweep.row("encoder").state == "running", "somebody computes it without Slurm"


def test_a_job_that_nobody_knows_is_lost(sweep: Sweep) -> None:
    assert sweep.row("encoder").state == "lost" and sweep.row("encoder").retry


def test_without_slurm_the_store_is_told(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    sweep.tell("encoder", "done")
    sweep.tell("lowlevel [clusters=8]", "failed", error="ValueError: x")
    sweep.tell("lowlevel [clusters=16]", "running", host="node7")
    status = sweep.report()
    assert [row.state for row in status.rows] == ["done", "failed", "blocked", "running", "queued"]
    assert status.notes[0] == "squeue is not on the PATH; is this a node of a Slurm cluster?" and len(status.notes) == 2


def test_a_controller_that_is_down_is_a_note(sweep: Sweep) -> None:
    sweep.slurm.program("squeue", code=1, err="slurm_load_jobs error: Unable to contact slurm controller")
    status = sweep.report()
    assert status.notes[0].startswith("squeue failed: slurm_load_jobs error: Unable to contact")


def test_forced_stages_count_from_the_submission_on(sweep: Sweep) -> None:
    stages = tuple(replace(stage, force=True) for stage in sweep.submission.stages)
    sweep.submission = replace(sweep.submission, stages=stages)
    sweep.tell("encoder", "done", ended=BEFORE)
    sweep.jobs(encoder="RUNNING")
    assert sweep.row("encoder").state == "running"
    beside = sweep.folder("encoder").with_name(sweep.folder("encoder").name + ".forced")
    beside.mkdir()
    write_json(beside / "status.json", {"state": "failed", "error": "ValueError: x", "ended": AFTER})
    assert sweep.row("encoder").state == "failed"
    sweep.tell("encoder", "done", ended=AFTER)
    assert sweep.row("encoder").state == "done"


def test_progress_is_the_last_whole_line_of_the_metrics(sweep: Sweep) -> None:
    folder = sweep.tell("encoder", "running")
    (folder / "config.yaml").write_text("config: {training: {steps: 800}}\n")
    (folder / "tracking").mkdir()
    lines = [
        {"time": 1.0, "step": 390, "train/loss": 0.5},
        {"time": 2.0, "step": 400, "train/loss": 0.25},
        {"image": "x"},
    ]
    (folder / "tracking" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 41')
    sweep.jobs(encoder="RUNNING")
    assert sweep.row("encoder").progress == {"time": 2.0, "step": 400, "train/loss": 0.25, "steps": 800}
    assert any(line.endswith("step 400/800, train/loss 0.25") for line in table(sweep.report()))


def test_slurm_is_asked_politely(sweep: Sweep) -> None:
    watch = Watch()
    for _ in range(4):
        sweep.report(watch=watch)
    assert len(sweep.slurm.calls("squeue")) == 4 and len(sweep.slurm.calls("sacct")) == 1


# --- what to retry and to cancel --------------------------------------------------------------------------------------


def test_stages_are_named_in_many_ways(sweep: Sweep) -> None:
    status = sweep.report()

    def titles(*words: str) -> list[str]:
        return [row.stage.title for row in select(status, words)]

    assert titles("lowlevel [clusters=8]") == ["lowlevel [clusters=8]"] == titles("11_0") == titles(digits(2))
    assert titles(f"lowlevel/{digits(2)[:16]}") == ["lowlevel [clusters=8]"]
    assert titles("lowlevel") == ["lowlevel [clusters=8]", "lowlevel [clusters=16]"] == titles("11")
    assert titles("clusters=16") == ["lowlevel [clusters=16]", "score [clusters=16]"]
    with pytest.raises(UserError, match=r"no stage 'lowlvel' in clusters \(did you mean 'lowlevel'\?\)"):
        titles("lowlvel")
    with pytest.raises(UserError, match="no stage 'zzz' in clusters; there are encoder, lowlevel, score"):
        titles("zzz")


def test_a_retry_takes_what_a_stage_lacks_and_what_waits_for_it_alone(sweep: Sweep) -> None:
    sweep.tell("encoder", "done")
    sweep.tell("lowlevel [clusters=8]", "failed", error="ValueError: x")
    sweep.tell("lowlevel [clusters=16]", "failed", error="ValueError: y")
    status = sweep.report()

    def titles(*words: str) -> list[str]:
        return [row.stage.title for row in to_retry(status, words)]

    assert titles() == ["lowlevel [clusters=8]", "score [clusters=8]", "lowlevel [clusters=16]", "score [clusters=16]"]
    assert (
        titles("lowlevel [clusters=8]")
        == ["lowlevel [clusters=8]", "score [clusters=8]"]
        == titles("score [clusters=8]")
    )
    with pytest.raises(UserError, match="encoder is done: there is nothing to retry"):
        titles("encoder")


def test_a_cancel_leaves_what_others_wait_for_and_remembers(sweep: Sweep) -> None:
    sweep.tell("encoder", "done")
    running = {
        "low8": "RUNNING",
        "low16": ("PENDING", "Priority"),
        "score8": ("PENDING", "Dependency"),
        "score16": ("PENDING", "Dependency"),
    }
    sweep.jobs(**running)
    found = to_cancel(sweep.store, sweep.report())
    assert [row.stage.job for row in found.jobs] == ["11_0", "12_0", "11_1", "12_1"] and not found.kept

    # Another sweep has a stage of its own that reads lowlevel [clusters=8] of this one.
    shared = tuple(
        replace(stage, shared=True) if stage.title == "lowlevel [clusters=8]" else replace(stage, job="", shared=False)
        for stage in sweep.submission.stages[:2]
    )
    own = SubmittedStage(digits(9), f"joint/{digits(9)[:16]}", "joint", job="20", needs=(shared[1].fingerprint,))
    other = replace(sweep.submission, id="seeds-20261123-192000", sweep="seeds", stages=(*shared, own))
    submissions.write(sweep.store, other)
    sweep.slurm.queue["20"] = ("PENDING", "Dependency")
    sweep.slurm.write()
    found = to_cancel(sweep.store, sweep.report())
    assert [row.stage.job for row in found.jobs] == ["12_0", "11_1", "12_1"]
    assert [row.stage.job for row in found.kept] == ["11_0"]
    assert [row.stage.job for row in to_cancel(sweep.store, sweep.report(), ["lowlevel [clusters=8]"]).jobs] == ["11_0"]
    assert [row.stage.job for row in to_cancel(sweep.store, report(sweep.store, other)).jobs] == ["20"]

    control.cancel(sweep.store, sweep.report(), found.jobs)
    assert sweep.slurm.calls("scancel") == ["11_1 12_0 12_1"]
    sweep.jobs(low8="RUNNING")
    assert sweep.states()["lowlevel [clusters=16]"] == "cancelled"


def test_a_cancelled_stage_names_what_it_holds_up(sweep: Sweep) -> None:
    sweep.jobs(
        encoder="RUNNING",
        low8=("PENDING", "Dependency"),
        low16=("PENDING", "Dependency"),
        score8=("PENDING", "Dependency"),
    )
    found = to_cancel(sweep.store, sweep.report(), ["encoder"])
    assert [row.stage.job for row in found.jobs] == ["10"]
    assert [row.stage.title for row in found.holds_up] == [
        "lowlevel [clusters=8]",
        "score [clusters=8]",
        "lowlevel [clusters=16]",
    ]


def test_stages_that_a_retry_did_not_ask_for_are_known_from_before(sweep: Sweep) -> None:
    again = tuple(
        replace(stage, job="30" if stage.title == "encoder" else "", stdout="", stderr="")
        for stage in sweep.submission.stages
    )
    newer = replace(sweep.submission, id="clusters-20261123-200000", created="2026-11-23T20:00:00+00:00", stages=again)
    submissions.write(sweep.store, newer)
    sweep.jobs(low8="RUNNING")
    sweep.slurm.queue["30"] = ("RUNNING", "None")
    sweep.slurm.write()
    status = report(sweep.store, submissions.find(sweep.store, "clusters"))
    assert [row.state for row in status.rows][:2] == ["running", "running"]
    assert status.rows[1].stage.job == "11_0" and status.rows[1].stage.stderr.endswith("11_0_0_log.err")
    assert [row.stage.job for row in to_cancel(sweep.store, status).jobs] == ["30", "11_0"], "all of the sweep's own"


# --- the command line -------------------------------------------------------------------------------------------------


def test_status_of_a_sweep(sweep: Sweep, command: Command) -> None:
    sweep.tell("encoder", "done")
    sweep.tell("lowlevel [clusters=8]", "failed", error="ValueError: x")
    sweep.jobs(low16="RUNNING", score16=("PENDING", "Dependency"))
    code, out, err = command("status", "clusters")
    assert (code, err) == (0, "")
    assert out.startswith("clusters-20261123-191500: 5 stages: 1 running, 1 queued, 1 failed, 1 blocked, 1 done\n")
    assert f"retry it  python -m benchmark.sweep retry clusters 'lowlevel [clusters=8]' --out {sweep.out}" in out
    code, out, _ = command("status", "clusters", "--json")
    told = json.loads(out)
    assert code == 0 and told["counts"] == {"running": 1, "queued": 1, "failed": 1, "blocked": 1, "done": 1}
    assert [row["state"] for row in told["stages"]] == ["done", "failed", "blocked", "running", "queued"]
    assert told["stages"][1]["error"] == "ValueError: x" and told["stages"][2]["blocked_by"] == [
        "lowlevel [clusters=8]"
    ]
    code, out, _ = command("status")
    assert code == 0 and out.split()[0] == "clusters-20261123-191500"


def test_status_of_what_was_never_submitted(sweep: Sweep, command: Command, tmp_path: Path) -> None:
    assert command("status", "seeds")[0] == 2, "other sweeps were submitted here, this one was not"
    for path in submissions.folder(sweep.store).glob("*.json"):
        path.unlink()
    code, _, err = command("status", "clusters")
    assert code == 2 and err == (
        f"error: no results in {sweep.out}/store; name their folder with --out DIR, or type: python -m benchmark.sweep clusters\n"
    )
    sweep.tell("encoder", "done")
    folder = sweep.tell("lowlevel [clusters=8]", "failed", label="clusters=8", error="ValueError: x")
    write_json(folder / "manifest.json", {"command": "python -m benchmark.sweep clusters --quick"})
    code, out, _ = command("status", "clusters")
    assert code == 0 and "clusters (not submitted; what lies in the store): 2 stages: 1 failed, 1 done" in out
    assert "retry it  python -m benchmark.sweep clusters --quick" in out and "note:" not in out
    code, _, err = command("retry", "clusters")
    assert code == 2 and "was not submitted from" in err and len(err.splitlines()) == 1
    code, _, err = command("status", "clutsers")
    assert (code, err) == (2, "error: unknown sweep 'clutsers' (did you mean 'clusters'?)\n")


def test_logs(sweep: Sweep, command: Command) -> None:
    sweep.tell("lowlevel [clusters=8]", "failed", error="ValueError: x")
    low8, low16 = (Path(sweep.stage(f"lowlevel [clusters={n}]").stderr) for n in (8, 16))
    sweep.tell("encoder", "done")
    low8.parent.mkdir(parents=True)
    low8.write_text("".join(f"line {number}\n" for number in range(100)))
    low8.with_name("11_0_1_log.err").write_text("the second task\n")
    low16.write_text("half a line")
    low8.with_name("11_10_0_log.err").write_text("another element\n")
    code, out, _ = command("logs", "clusters", "lowlevel [clusters=8]", "--lines", "2")
    assert code == 0 and [line for line in out.splitlines() if not line.startswith("==>")] == [
        "line 98",
        "line 99",
        "the second task",
    ]
    assert len(command("logs", "clusters", "lowlevel [clusters=8]", "--lines", "0")[1].splitlines()) == 103
    assert command("logs", "clusters", "clusters=16")[1].endswith("half a line\n")
    code, out, _ = command("logs", "clusters")
    assert "line 99" in out and "half a line" in out, "of what ended badly"
    assert "has printed nothing: it is done" in command("logs", "clusters", "encoder")[1]
    told = json.loads(command("logs", "clusters", "lowlevel [clusters=8]", "--json")[1])
    assert told[0]["files"] == [str(low8), str(low8.with_name("11_0_1_log.err"))]
    assert command("logs", "clusters", "--lines", "-1")[0] == 2


def test_logs_that_are_followed_end_with_the_stages(sweep: Sweep, command: Command) -> None:
    log = Path(sweep.stage("encoder").stderr)
    log.parent.mkdir(parents=True)
    log.write_text("first\n")
    sweep.tell("encoder", "done")
    code, out, _ = command("logs", "clusters", "encoder", "--follow")
    assert code == 0 and out.splitlines()[1:] == ["first"]


def test_cancel(sweep: Sweep, command: Command) -> None:
    sweep.jobs(encoder="RUNNING", low8=("PENDING", "Dependency"), score8=("PENDING", "Dependency"))
    code, out, _ = command("cancel", "clusters", "--dry-run")
    assert code == 0 and out.startswith("would cancel 3 jobs (1 running)\n") and not sweep.slurm.calls("scancel")
    told = json.loads(command("cancel", "clusters", "encoder", "--json")[1])
    assert [one["job"] for one in told["cancelled"]] == ["10"] and told["holds_up"] == [
        "lowlevel [clusters=8]",
        "score [clusters=8]",
    ]
    assert sweep.slurm.calls("scancel") == ["10"]
    sweep.jobs()
    code, out, _ = command("cancel", "clusters")
    assert (code, out) == (0, "nothing to cancel: no job of clusters waits or runs\n")


def test_retry_says_what_it_would_do_and_what_it_cannot(
    sweep: Sweep, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep.tell("encoder", "failed", error="ValueError: x")
    code, out, _ = command("retry", "clusters", "--dry-run")
    assert code == 0 and out.splitlines()[:2] == ["would submit 5 stages:", "  encoder  failed: ValueError: x"]
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = command("retry", "clusters")
    assert code == 2 and err.startswith("error: sbatch is not on the PATH")
    for stage in sweep.submission.stages:
        sweep.tell(stage.title, "done")
    assert command("retry", "clusters") == (0, "nothing to retry: 5 done\n", "")


def test_retry_plans_the_same_again_for_these_stages_alone(
    sweep: Sweep, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import benchmark.running

    seen: list[Any] = []
    monkeypatch.setattr(benchmark.running, "run_sweep", lambda *args, **options: seen.append((*args, options)) or 0)
    arguments = {
        "sweep": "clusters",
        "only": "8,16",
        "set": ["lowlevel.dim=64"],
        "mode": "retry",
        "launcher": "slurm",
        "out": "/elsewhere",
        "dry_run": True,
    }
    submissions.write(sweep.store, replace(sweep.submission, arguments=arguments))
    sweep.tell("encoder", "done")
    sweep.tell("lowlevel [clusters=8]", "failed", error="ValueError: x")
    assert command("retry", "clusters", "lowlevel [clusters=8]")[0] == 0
    ((plan, args, options),) = seen
    assert plan.axis.values == (8, 16) and options["command"] == sweep.submission.command
    assert options["only"] == [digits(2), digits(4)]
    assert (args.mode, args.out, args.dry_run, args.set, args.launcher) == (
        "cached",
        sweep.out,
        False,
        ["lowlevel.dim=64"],
        "slurm",
    )


@pytest.mark.parametrize("verb", ["status", "logs", "cancel", "retry", "sync"])
def test_slips_are_answered_in_one_line(sweep: Sweep, command: Command, verb: str) -> None:
    code, _, err = command(verb, "seeds")
    assert code == 2 and err.startswith("error: ") and "clusters" in err and len(err.splitlines()) == 1
    code, _, err = command(verb, "clusters", "--jsn")
    assert (code, err) == (2, "error: unknown option '--jsn' (did you mean '--json'?)\n")


def test_a_command_that_is_not_one(command: Command) -> None:
    assert command("staus", "clusters")[::2] == (2, "error: unknown command 'staus' (did you mean 'status'?)\n")


def test_help_names_the_commands_and_is_light() -> None:
    code = (
        "import sys\nfrom benchmark.sweep import main\nsys.argv = ['x', *sys.argv[1:]]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'pandas', 'wandb', 'submitit', 'h5py'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    for arguments in (["--help"], ["status", "--help"], ["sync", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode == 0, done.stderr
        if arguments == ["--help"]:
            assert all(
                f"python -m benchmark.sweep {verb} " in done.stdout
                for verb in ("status", "logs", "cancel", "retry", "sync")
            )


def test_sync_finds_the_offline_runs_of_all_stages_that_do_not_run(
    sweep: Sweep, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    def offline(title: str, name: str, synced: bool = False) -> Path:
        run = sweep.folder(title) / "tracking" / "wandb" / f"offline-run-{name}" / f"run-{name}.wandb"
        run.parent.mkdir(parents=True)
        run.write_bytes(b"records, more than a header")
        if synced:
            run.with_name(f"{run.name}.synced").touch()
        return run

    assert command("sync", "clusters")[:2] == (0, "to upload: 0 offline runs of 0 stages; 0 uploaded before\n")
    sweep.tell("encoder", "done")
    sweep.tell("lowlevel [clusters=8]", "running")
    sweep.jobs(low8="RUNNING")
    waiting = [offline("encoder", "a"), offline("encoder", "b")]
    offline("encoder", "0", synced=True)
    offline("lowlevel [clusters=8]", "c")
    code, out, err = command("sync", "clusters", "--dry-run")
    assert (code, err) == (0, "") and out.splitlines() == [
        "would upload: 2 offline runs of 1 stage; 1 uploaded before",
        "1 stage still running: upload them later, with the same command",
        *(f"  encoder: {run.parent}" for run in waiting),
    ]
    told = json.loads(command("sync", "clusters", "--dry-run", "--json")[1])
    assert told["stages"] == [{"stage": "encoder", "runs": [str(run) for run in waiting]}]
    code, out, err = command("sync", "clusters")
    assert (code, out) == (2, "") and err.startswith("error: no key for W&B (https://api.wandb.ai): type wandb login")


# --- following --------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_a_change(sweep: Sweep) -> None:
    out = io.StringIO()
    lines = Lines(out)
    sweep.jobs(
        encoder="RUNNING",
        low8=("PENDING", "Dependency"),
        score8=("PENDING", "Dependency"),
        low16=("PENDING", "Dependency"),
        score16=("PENDING", "Dependency"),
    )
    lines.update(sweep.report())
    lines.update(sweep.report())
    sweep.tell("encoder", "done")
    sweep.tell("lowlevel [clusters=8]", "failed", error="ValueError: x")
    sweep.jobs(low16="RUNNING", score16=("PENDING", "Dependency"))
    lines.update(sweep.report())
    assert out.getvalue().splitlines() == [
        "clusters-20261123-191500: 5 stages: 1 running, 4 queued",
        "[0/5] encoder: running on n1 (job 10)",
        "[1/5] encoder: done in 0:12",
        "[1/5] lowlevel [clusters=8]: failed: ValueError: x",
        "[1/5] score [clusters=8]: blocked: needs lowlevel [clusters=8] (failed)",
        "[1/5] lowlevel [clusters=16]: running on n1 (job 11_1)",
    ]


def test_a_terminal_gets_a_table_that_fits(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "6")
    out = Terminal()
    live = LiveTable(out)
    sweep.jobs(encoder="RUNNING", low8=("PENDING", "Dependency"))
    live.update(sweep.report())
    first = out.getvalue().removeprefix("\x1b[J").splitlines()
    assert len(first) <= 6 and all(len(line) < 40 for line in first) and "and 3 more" in first[-2]
    live.update(sweep.report())
    assert out.getvalue().count(f"\x1b[{len(first)}F\x1b[J") == 1


def test_following_ends_with_the_last_stage(sweep: Sweep) -> None:
    for stage in sweep.submission.stages:
        sweep.tell(stage.title, "done")
    out = io.StringIO()
    assert control.follow(sweep.store, sweep.submission, stream=out, every=0.05) == 0
    sweep.folder("score [clusters=8]").joinpath("DONE").unlink()
    sweep.tell("score [clusters=8]", "failed", error="ValueError: x")
    assert control.follow(sweep.store, sweep.submission, stream=out, every=0.05) == 1


def test_ctrl_c_ends_the_looking_alone(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    sweep.jobs(encoder="RUNNING")
    monkeypatch.setattr(control.time, "sleep", stop)
    assert control.follow(sweep.store, sweep.submission, stream=io.StringIO()) == 130
    assert (
        capsys.readouterr().err
        == f"the jobs go on; look again: python -m benchmark.sweep status clusters --out {sweep.out}\n"
    )
    assert not sweep.slurm.calls("scancel")


def test_following_needs_slurm(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="Slurm's commands are not on the PATH here"):
        control.follow(sweep.store, sweep.submission, stream=io.StringIO())


def test_a_result_that_a_slow_file_system_does_not_show_yet_is_waited_for(sweep: Sweep) -> None:
    sweep.slurm.accounting = {"10": "COMPLETED"}
    sweep.slurm.write()
    watch = Watch()
    row = sweep.report(watch=watch).rows[0]
    assert row.state == "running" and "not seen here yet" in row.reason
    watch._no_result = dict.fromkeys(watch._no_result, time.monotonic() - 100)
    assert sweep.report(watch=watch).rows[0].state == "lost"


# --- size -------------------------------------------------------------------------------------------------------------


def test_status_of_five_thousand_stages_takes_less_than_two_seconds(sweep: Sweep, command: Command) -> None:
    stages: list[SubmittedStage] = []
    queue = []
    for number in range(5000):
        array, element = divmod(number, 1000)
        needs = tuple(stage.fingerprint for stage in stages[max(0, number - 1000) : number : 200])
        name = ("encoder", "lowlevel", "semantic", "joint", "score")[array]
        key = f"{name}/{digits(number)[:16]}"
        title = f"{name} [clusters={element}]"
        stages.append(
            SubmittedStage(
                digits(number), key, title, f"{100 + array}_{element}", needs, "/x/out", "/x/err", {"gpus": 1}
            )
        )
        folder = sweep.store.root / key
        if number < 3000:
            folder.mkdir(parents=True)
            write = {"state": "done", "wall_s": 1.0, "host": "n1", "started": AFTER, "ended": AFTER}
            (folder / "status.json").write_text(json.dumps(write))
            (folder / "DONE").write_text("{}")
        else:
            queue.append(
                f"{100 + array}_{element}|{'RUNNING' if number < 3200 else 'PENDING'}|Dependency|n1|0:07|10:00|0"
            )
    submissions.write(sweep.store, replace(sweep.submission, stages=tuple(stages)))
    sweep.slurm.program("squeue", "\n".join(queue))
    took, worked = [], []
    for _ in range(2):
        started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "benchmark.sweep", "status", "clusters", "--out", str(sweep.out)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
        )
        took.append(time.monotonic() - started)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        worked.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    print(f"status of 5,000 stages: {min(took):.2f} s ({min(worked):.2f} s of CPU), Python's start included")
    assert done.stdout.startswith("clusters-20261123-191500: 5,000 stages: 200 running, 1,800 queued, 3,000 done\n")
    assert len(done.stdout.splitlines()) < 80
    # What it works for is what it takes on a machine that does nothing else.
    assert min(worked) < 2.0


# --- the page ---------------------------------------------------------------------------------------------------------


def page_commands() -> list[list[str]]:
    lines = (ROOT / "docs" / "clusters.md").read_text().splitlines()
    found = [
        shlex.split(line.strip(), comments=True) for line in lines if line.startswith("    python -m benchmark.sweep")
    ]
    return [words[3:] for words in found]


@pytest.mark.parametrize("words", page_commands(), ids=" ".join)
def test_commands_of_the_page_are_understood(words: list[str]) -> None:
    from benchmark.launch.commands import parser
    from benchmark.sweep import COMMANDS
    from benchmark.sweep import parser as sweep_parser

    if words[0] in COMMANDS:
        parser(words[0]).parse_args(words[1:])
        return
    args = sweep_parser().parse_args(words)
    assert args.profile is None or (ROOT / args.profile).is_file()


def test_links_of_the_page_lead_somewhere() -> None:
    page = ROOT / "docs" / "clusters.md"
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert len(links) > 6 and all((page.parent / link).exists() for link in links)
