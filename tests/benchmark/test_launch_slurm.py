"""Submission to Slurm, with programs on the PATH that stand in for its commands; ``tests/slurm`` has the real ones.

The batch scripts are compared with those in ``golden/sbatch``. After a change that is meant, read the difference, then
write them anew with ``UPDATE_GOLDEN=1 pytest tests/benchmark/test_launch_slurm.py``.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmark.errors import UserError
from benchmark.execute import RunOptions, execute
from benchmark.graph import Plan, Resources, Stage
from benchmark.launch import job as jobs
from benchmark.launch import submissions
from benchmark.launch.job import StageJob, code_revision
from benchmark.launch.profile import Profile, ask
from benchmark.launch.slurm import Request, SlurmLauncher, make_executor, script, summary_lines
from benchmark.launch.submissions import Submission, SubmittedStage
from benchmark.stages import GPU, JOINT
from benchmark.store import Store

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "sbatch"
OPTIONS = RunOptions(progress=False, threads=1)

# A cluster that takes everything, remembers it, and knows what a file says of its queue.
PROGRAMS = {
    "srun": "exit 0",
    "sbatch": """
        if [ -e "$FAKE/refuse" ] && grep -q "$(cat "$FAKE/refuse")" "$1"; then
            echo "sbatch: error: Batch job submission failed: Requested node configuration is not available" >&2
            exit 1
        fi
        number=$(($(cat "$FAKE/number" 2>/dev/null || echo 100) + 1)); echo $number > "$FAKE/number"
        cp "$1" "$FAKE/$number.sh"; env > "$FAKE/$number.env"
        echo "Submitted batch job $number"
    """,
    "squeue": 'cat "$FAKE/queue" 2>/dev/null; exit 0',
    "scancel": 'echo "$@" >> "$FAKE/cancelled"',
    "sinfo": 'printf "cpu*|up|2:00:00\\ngpu|up|1-00:00:00\\nlong|up|infinite\\n"',
    "scontrol": 'echo "MaxArraySize            = ${FAKE_SIZE:-1001}"',
}


class Fake:
    """What the stand-ins were told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def scripts(self) -> dict[int, str]:
        return {int(path.stem): path.read_text() for path in sorted(self.folder.glob("*.sh"))}

    def options(self) -> dict[int, dict[str, str]]:
        """Job -> its ``#SBATCH`` options."""
        found = {}
        for number, text in self.scripts().items():
            lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
            found[number] = {line.partition("=")[0]: line.partition("=")[2].strip("'") for line in lines}
        return found

    def environment(self, number: int) -> str:
        return (self.folder / f"{number}.env").read_text()

    def cancelled(self) -> list[str]:
        path = self.folder / "cancelled"
        return path.read_text().split() if path.exists() else []

    def put_in_queue(self, record: Submission, state: str = "PENDING", reason: str = "Dependency") -> None:
        lines = [f"{stage.job}|{state}|{reason}||0:00|1:00:00|0|" for stage in record.stages if stage.job]
        (self.folder / "queue").write_text("\n".join(lines) + "\n")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    folder = tmp_path / "fake"
    (folder / "bin").mkdir(parents=True)
    for name, text in PROGRAMS.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.syspath_prepend(str(HERE))
    return Fake(folder)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs" / "store")


def toy(tmp_path: Path, name: str, run: str = "add", **fields: Any) -> Stage:
    config = {"log": str(tmp_path / "log"), "value": 1, **fields.pop("config", {})}
    return Stage(name, f"toy_stages:{run}", config, **fields)


def small_sweep(tmp_path: Path, values: tuple[int, ...] = (8, 64, 128)) -> Plan:
    """Data and an encoder for all, three stages for each variant."""
    data = toy(tmp_path, "data")
    encoder = toy(tmp_path, "encoder", upstream={"data": data}, resources=GPU)
    ends = []
    for k in values:
        own: dict[str, Any] = {"config": {"value": k}, "label": f"k={k}"}
        clusters = toy(tmp_path, "clusters", upstream={"encoder": encoder}, **own)
        joint = toy(tmp_path, "joint", upstream={"clusters": clusters, "data": data}, resources=JOINT, **own)
        ends.append(toy(tmp_path, "score", upstream={"joint": joint}, resources=GPU, **own))
    return Plan.of(ends)


def submit(
    plan: Plan, store: Store, launcher: SlurmLauncher | None = None, mode: str = "cached", **request: Any
) -> tuple[Submission, int]:
    fields: dict[str, Any] = {"sweep": "clusters", "command": "python -m benchmark.sweep clusters", "arguments": {}}
    launcher = launcher or SlurmLauncher(Profile())
    return launcher.submit(plan, mode, store, OPTIONS, Request(**{**fields, "out": store.root.parent, **request}))


# --- batch scripts ----------------------------------------------------------------------------------------------------

FULL = Profile.model_validate(
    {
        "partition": "gpu",
        "account": "brain lab",
        "qos": "normal",
        "constraint": "a100|h100",
        "reservation": "course",
        "exclude": "n[03-04]",
        "hours": 7.5,
        "gpu_type": "a100",
        "gpu_flag": "gres",
        "gpus_per_node": 2,
        "signal_seconds": 300,
        "setup": ["module purge", "module load cuda/12.4"],
        "environment": {"NOTE": "it's here", "HF_HUB_OFFLINE": 1},
        "sbatch": {"mail-type": "FAIL", "exclusive": True, "spread-job": False},
        "python": "apptainer exec --nv image.sif python",
        "cpu": {"partition": "cpu", "hours": 1},
        "stages": {"joint": {"memory_gb": 300, "qos": "long"}},
    }
)
SCRIPTS: dict[str, tuple[Profile, str, Resources, int, str]] = {
    "cpu": (Profile(), "clusters", Resources(), 1, ""),
    "cpu-array": (Profile(), "clusters", Resources(), 7, "afterok:41"),
    "gpu": (Profile(), "encoder", GPU, 1, "afterok:40"),
    "joint-one-node": (Profile(), "joint", JOINT, 7, "aftercorr:44"),
    "joint-two-nodes": (Profile(gpus_per_node=2), "joint", JOINT, 1, "afterok:44_3"),
    "joint-on-cpus": (Profile.model_validate({"device": "cpu", "stages": {"joint": {"tasks": 2, "nodes": 2}}}), "joint", JOINT, 1, ""),
    "full-cpu": (FULL, "clusters", Resources(), 3, "afterok:41"),
    "full-gpu": (FULL, "encoder", GPU, 1, ""),
    "full-joint": (FULL, "joint", JOINT, 3, "aftercorr:44"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_batch_scripts_are_the_known_ones(fake: Fake, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmark.launch.slurm._import_path", lambda: ["/home/ada/brain-it-bench"])
    monkeypatch.setattr(sys, "executable", "/home/ada/.venv/bin/python")
    monkeypatch.setenv("BRAIN_IT_WEIGHTS", "/data/weights")
    profile, stage_name, resources, count, dependency = SCRIPTS[name]
    config = {"training": {"accumulate": 4}} if stage_name == "joint" else {}
    wanted = ask(profile, Stage(stage_name, "toy_stages:add", config, resources=resources))
    logs = Path("/scratch/runs/store/.jobs/clusters-20261123-191500")
    throttle = 2 if count > 1 else None
    executor = make_executor(logs, wanted, f"clusters.{stage_name}", dependency, throttle, wanted.cpus, profile.python)
    found, golden = script(executor, count), GOLDEN / f"{name}.sh"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(found)
    assert found == golden.read_text()
    assert subprocess.run(["sh", "-n"], input=found, text=True).returncode == 0


def test_gpus_are_asked_for_by_stages_that_use_them(fake: Fake, store: Store, tmp_path: Path) -> None:
    submit(small_sweep(tmp_path), store)
    asked = {own["job-name"]: own.get("gpus-per-node") for own in fake.options().values()}
    assert asked == {
        "clusters.data": None,
        "clusters.encoder": "1",
        "clusters.clusters": None,
        "clusters.joint": "4",
        "clusters.score": "1",
    }
    tasks = {own["job-name"]: own["ntasks-per-node"] for own in fake.options().values()}
    assert tasks["clusters.joint"] == "4" and set(tasks.values()) == {"1", "4"}


# --- what is submitted ------------------------------------------------------------------------------------------------


def test_a_sweep_is_submitted_and_recorded(fake: Fake, store: Store, tmp_path: Path) -> None:
    plan = small_sweep(tmp_path)
    record, count = submit(plan, store, arguments={"quick": True})
    assert count == len(plan.stages) == 11
    own = fake.options()
    assert [(number, one["job-name"].partition(".")[2], one.get("array"), one.get("dependency")) for number, one in own.items()] == [
        (101, "data", None, None),
        (102, "encoder", None, "afterok:101"),
        (103, "clusters", "0-2%3", "afterok:102"),
        (104, "joint", "0-2%3", "aftercorr:103"),
        (105, "score", "0-2%3", "aftercorr:104"),
    ]  # fmt: skip
    assert all({"requeue", "kill-on-invalid-dep"} <= one.keys() for one in own.values())
    assert [stage.fingerprint for stage in record.stages] == [stage.fingerprint for stage in plan.stages]
    by_title = {stage.title: stage for stage in record.stages}
    joint = by_title["joint [k=64]"]
    assert joint.job == "104_1" and joint.needs == (
        by_title["clusters [k=64]"].fingerprint,
        by_title["data"].fingerprint,
    )
    assert joint.stderr == str(store.root / ".jobs" / record.id / "104_1_0_log.err")
    assert joint.resources["gpus"] == joint.resources["tasks"] == 4 and not joint.shared and not joint.force
    assert submissions.find(store, "clusters") == submissions.find(store, record.id) == record
    assert (record.out, record.arguments, record.revision) == (str(tmp_path / "runs"), {"quick": True}, code_revision())
    assert submissions.live(store) == {stage.fingerprint: stage.job for stage in record.stages}
    lines = summary_lines(record, count)
    assert lines[0] == f"submitted 11 stages in 5 jobs as {record.id}"
    assert any("104_[0-2]" in line and "joint x 3" in line and "104_N_0_log.err" in line for line in lines)
    assert lines[-1] == f"logs: {store.root}/.jobs/{record.id}/"


def test_what_a_job_is_given_runs_the_stage(fake: Fake, store: Store, tmp_path: Path) -> None:
    plan = small_sweep(tmp_path, (8,))
    record, _ = submit(plan, store, SlurmLauncher(Profile(), device="cpu"))
    for stage in record.stages:
        given = store.root / ".jobs" / record.id / f"{stage.job}_submitted.pkl"
        job = pickle.loads(given.read_bytes()).function
        assert isinstance(job, StageJob) and job.options["command"] == record.command
        assert job.options["threads"] == stage.resources["cpus"] and job.options["processes"] == 1
        job()
    assert all(store.is_done(stage) for stage in plan.stages)
    again, count = submit(plan, store)
    assert count == 0 and again == record and len(fake.scripts()) == 5


def test_arrays_split_at_the_cluster_s_size_and_keep_to_parallel(
    fake: Fake, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SIZE", "4")
    record, _ = submit(small_sweep(tmp_path, tuple(range(10))), store, SlurmLauncher(Profile(), parallel=5))
    own = fake.options()
    clusters = [number for number, one in own.items() if one["job-name"] == "clusters.clusters"]
    joint = [number for number, one in own.items() if one["job-name"] == "clusters.joint"]
    assert [own[number]["array"] for number in clusters] == ["0-3%2", "0-3%2", "0-1%1"]
    assert [own[number]["dependency"] for number in joint] == [f"aftercorr:{number}" for number in clusters]
    assert len({stage.job for stage in record.stages}) == len(record.stages)


def test_no_stage_is_submitted_twice(fake: Fake, store: Store, tmp_path: Path) -> None:
    first, _ = submit(small_sweep(tmp_path, (8, 64)), store)
    fake.put_in_queue(first)
    again, count = submit(small_sweep(tmp_path, (8, 64)), store)
    assert count == 0 and again == first and len(fake.scripts()) == 5, "its own jobs are there still"

    other, count = submit(small_sweep(tmp_path, (64, 128)), store, sweep="other")
    assert count == 3, "clusters, joint and score of 128"
    shared = {stage.title: stage for stage in other.stages if stage.shared}
    assert set(shared) == {"data", "encoder", "clusters [k=64]", "joint [k=64]", "score [k=64]"}
    job_of = {stage.title: stage.job for stage in first.stages}
    assert {title: stage.job for title, stage in shared.items()} == {title: job_of[title] for title in shared}
    assert fake.options()[106]["dependency"] == f"afterok:{job_of['encoder']}"
    assert fake.options()[107]["dependency"] == f"afterok:{job_of['data']}:106"
    assert "5 stages of jobs that were there already" in summary_lines(other, count)[0]


@pytest.mark.parametrize("why", ["gone", "never", "old code"])
def test_jobs_that_will_compute_nothing_are_submitted_anew(
    fake: Fake, store: Store, tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_sweep(tmp_path, (8,))
    first, _ = submit(plan, store)
    if why != "gone":
        fake.put_in_queue(first, reason="DependencyNeverSatisfied" if why == "never" else "Dependency")
    if why == "old code":
        monkeypatch.setattr("benchmark.launch.slurm.code_revision", lambda: "abcdef0+000000000000")
    second, count = submit(plan, store)
    assert count == 5 and {stage.job for stage in second.stages}.isdisjoint(stage.job for stage in first.stages)


def test_a_forced_stage_does_not_lean_on_a_job_that_is_not(fake: Fake, store: Store, tmp_path: Path) -> None:
    plan = small_sweep(tmp_path, (8,))
    first, _ = submit(plan, store)
    fake.put_in_queue(first)
    forced, count = submit(plan, store, mode="force")
    assert count == 5 and all(stage.force for stage in forced.stages)
    fake.put_in_queue(forced)
    assert submit(plan, store, mode="force") == (forced, 0), "typed twice, it runs once"


def test_only_some_stages_with_what_they_need(fake: Fake, store: Store, tmp_path: Path) -> None:
    plan = small_sweep(tmp_path)
    wanted = next(stage for stage in plan.stages if stage.title == "joint [k=64]")
    record, count = submit(plan, store, only=[wanted.fingerprint])
    assert count == 4
    assert [stage.title for stage in record.stages if stage.job] == [
        "data",
        "encoder",
        "clusters [k=64]",
        "joint [k=64]",
    ]


def test_a_stage_that_is_asked_for_by_force_leaves_finished_ones_as_they_are(
    fake: Fake, store: Store, tmp_path: Path
) -> None:
    plan = small_sweep(tmp_path)
    wanted = next(stage for stage in plan.stages if stage.title == "joint [k=64]")
    for stage in plan.stages[: plan.stages.index(wanted)]:
        if stage.title in ("data", "encoder", "clusters [k=64]"):
            execute(stage, store, OPTIONS)
    record, count = submit(plan, store, mode="force", only=[wanted.fingerprint])
    assert count == 1 and [stage.title for stage in record.stages if stage.job] == ["joint [k=64]"]
    _, count = submit(plan, store, mode="force")
    assert count >= 10, "who forces the sweep has all of it made again"


def test_a_refusal_leaves_nothing_in_the_queue(fake: Fake, store: Store, tmp_path: Path) -> None:
    (fake.folder / "refuse").write_text("clusters.joint")
    with pytest.raises(UserError) as caught:
        submit(small_sweep(tmp_path), store)
    assert str(caught.value) == (
        "Slurm refuses the jobs of stage joint, which ask for 4 GPUs, 32 CPUs, 256 GB, 24 h, 4 tasks: "
        "Batch job submission failed: Requested node configuration is not available"
    )
    assert sorted(fake.cancelled()) == ["101", "102", "103"] and submissions.history(store) == []


def test_variables_of_the_shell_do_not_change_the_script(
    fake: Fake, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch takes them before the script's own options, and a job's variables leak into jobs submitted from it."""
    for name in ("SBATCH_PARTITION", "SBATCH_TIMELIMIT", "SBATCH_ACCOUNT", "SLURM_NTASKS", "SLURM_CONF", "SUBMITIT_EXECUTOR"):  # fmt: skip
        monkeypatch.setenv(name, "9")
    submit(small_sweep(tmp_path, (8,)), store, SlurmLauncher(Profile(partition="gpu")))
    names = {line.partition("=")[0] for line in fake.environment(101).splitlines()}
    assert {"SBATCH_ACCOUNT", "SLURM_CONF"} <= names
    assert not names & {"SBATCH_PARTITION", "SBATCH_TIMELIMIT", "SLURM_NTASKS", "SUBMITIT_EXECUTOR"}
    assert os.environ["SBATCH_PARTITION"] == "9"


# --- before anything is submitted -------------------------------------------------------------------------------------


def problems(profile: dict[str, Any], tmp_path: Path, **launcher: Any) -> list[str]:
    own = SlurmLauncher(Profile.model_validate(profile), source=Path("my.yaml"), **launcher)
    return own.problems(small_sweep(tmp_path).stages)


def test_all_that_is_wrong_is_named_at_once(fake: Fake, tmp_path: Path) -> None:
    assert problems({"partition": "long"}, tmp_path) == []
    assert problems({"partition": "gpu", "cpu": {"partition": "cpu"}}, tmp_path) == []
    found = problems({"partition": "gpuu", "stages": {"jiont": {}, "clusters": {"partition": "gpu", "hours": 25}, "data": {"partition": "zzz"}}}, tmp_path)  # fmt: skip
    assert found == [
        "slurm: my.yaml: stages: no stage 'jiont' (did you mean 'joint'?)",
        "slurm: no partition 'zzz' (my.yaml); the cluster has cpu, gpu, long",
        "slurm: no partition 'gpuu' (did you mean 'gpu'?) (my.yaml); the cluster has cpu, gpu, long",
        "slurm: clusters: 25 h asked for, partition gpu allows 24 h; say hours: 24 in my.yaml (a job that reaches its "
        "limit goes on in a new one)",
    ]
    assert problems({}, tmp_path) == [
        "slurm: encoder, joint, score: 24 h asked for, partition cpu allows 2 h; say hours: 2 in my.yaml (a job that "
        "reaches its limit goes on in a new one)"
    ]
    assert problems({"partition": "cpu,gpu"}, tmp_path) == [], "one of them will do"
    (found,) = problems({"partition": "gpu", "stages": {"joint": {"tasks": 3}}}, tmp_path)
    assert found.startswith("slurm: my.yaml: stages: joint: tasks is 3 and gpus 4")


def test_a_machine_without_slurm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert problems({}, tmp_path) == [
        "slurm: sbatch is not on the PATH; type this on a node of the cluster that may submit jobs"
    ]


Run = Callable[..., Any]


def test_the_command_says_what_is_missing_and_submits_nothing(fake: Fake, sweep_here: Run, tmp_path: Path) -> None:
    profile = tmp_path / "p.yaml"
    profile.write_text("partition: nowhere\n")
    run = ("clusters", "--quick", "--launcher", "slurm", "--out", tmp_path / "runs")
    answer = sweep_here(*run, "--profile", profile)
    assert (answer.code, answer.out) == (2, "") and not (tmp_path / "runs").exists()
    assert answer.error == f"error: slurm: no partition 'nowhere' ({profile}); the cluster has cpu, gpu, long"
    both = sweep_here(*run, "--profile", profile, "--preset", "paper", "--data", tmp_path / "no").error
    assert "--quick is for the demo preset" in both
    run = ("clusters", "--preset", "paper", "--launcher", "slurm", "--out", tmp_path / "runs")
    lines = sweep_here(*run, "--profile", profile, "--data", tmp_path / "no").error.splitlines()
    assert lines[0] == "error: 3 things are missing:"
    heads = [line.strip().partition(":")[0] for line in lines]
    assert [head for head in heads if head in ("data", "weights", "slurm")] == ["data", "weights", "slurm"]
    profile.write_text("partion: x\n")
    answer = sweep_here("clusters", "--launcher", "slurm", "--profile", profile, "--out", tmp_path / "runs")
    assert answer.error == f"error: slurm: {profile}: unknown key 'partion' (did you mean 'partition'?)"


def test_the_command_submits_and_returns(fake: Fake, sweep_here: Run, tmp_path: Path) -> None:
    profile = tmp_path / "p.yaml"
    profile.write_text("device: cpu\npartition: gpu\ncpus: 1\n")
    run = ("clusters", "--quick", "--launcher", "slurm", "--profile", profile, "--out", tmp_path / "runs")
    before = time.monotonic()
    answer = sweep_here(*run)
    assert time.monotonic() - before < 20
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert "24 stages: 24 to run, 0 cached" in lines[0]
    assert lines[1].startswith("submitted 24 stages in 12 jobs as clusters-")
    assert f"next: python -m benchmark.sweep status clusters --out {tmp_path}/runs" in lines
    record = submissions.find(Store(tmp_path / "runs" / "store"), "clusters")
    assert record.command.endswith(f"clusters --quick --launcher slurm --profile {profile} --out {tmp_path}/runs")
    from benchmark.running import restore_arguments, save_arguments, sweep_of
    from benchmark.sweeps import load_sweep

    args = restore_arguments(record.arguments)
    assert args.out == tmp_path / "runs" and args.profile == profile and args.quick and args.data is None
    assert save_arguments(args) == dict(record.arguments)
    assert sweep_of(args) == load_sweep("clusters")
    dry = sweep_here(*run[:-1], tmp_path / "other", "--dry-run")
    assert dry.code == 0 and "as 12 jobs of Slurm:" in dry.out and not (tmp_path / "other").exists()


def test_a_single_variant_is_submitted_too(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from benchmark import run
    from benchmark.cli import main_guard
    from benchmark.running import restore_arguments, sweep_of

    arguments = ["--quick", "--seed", "3", "--device", "cpu", "--launcher", "slurm", "--out", str(tmp_path / "runs")]
    (tmp_path / "p.yaml").write_text("partition: gpu\n")
    monkeypatch.setattr(sys, "argv", ["benchmark.run", *arguments, "--profile", str(tmp_path / "p.yaml")])
    assert main_guard(run.main) == 0
    record = submissions.find(Store(tmp_path / "runs" / "store"), "run")
    assert sweep_of(restore_arguments(record.arguments)).axis.values == (3,)
    assert "gpus-per-node" not in {option for own in fake.options().values() for option in own}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wait"], "--wait needs --launcher slurm"),
        (["--profile", "x.yaml"], "--profile x.yaml needs --launcher slurm"),
        (["--launcher", "slurm", "--parallel", "0"], "parallel is 0, expected 1 or more"),
        (["--launcher", "slurm", "--profile", "x.yaml"], "slurm: --profile x.yaml: no such file; docs/slurm-profiles has examples"),
        (["--parallel", "3"], "--parallel 3 needs --launcher local or slurm"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(
    fake: Fake, sweep_here: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    answer = sweep_here("clusters", *arguments, "--out", tmp_path / "runs")
    assert (answer.code, answer.error) == (2, f"error: {message}") and not (tmp_path / "runs").exists()


# --- jobs -------------------------------------------------------------------------------------------------------------


def stage_job(stage: Stage, store: Store, **fields: Any) -> StageJob:
    options = replace(OPTIONS, command="python -m benchmark.sweep clusters")
    return StageJob(
        stage.to_dict(), str(store.root), asdict(options), fields.pop("revision", code_revision()), **fields
    )


def test_other_code_than_was_submitted_is_refused(fake: Fake, store: Store, tmp_path: Path, capsys: Any) -> None:
    stage = toy(tmp_path, "data")
    with pytest.raises(SystemExit) as caught:
        stage_job(stage, store, revision="abcdef0+000000000000")()
    message = (
        f"stage data was submitted with code abcdef0+000000000000, and starts with {code_revision()}: one sweep, one "
        "code; type again: python -m benchmark.sweep clusters"
    )
    assert caught.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "log").exists() and not store.is_done(stage)
    assert store.state(stage).kind == "failed" and store.state(stage).detail == message
    execute(stage, store, OPTIONS)
    with pytest.raises(SystemExit) as caught:  # somebody else has computed it meanwhile
        stage_job(stage, store, revision="abcdef0+000000000000")()
    assert caught.value.code == 0 and store.is_done(stage)


def test_the_commit_alone_makes_no_other_code(fake: Fake, store: Store, tmp_path: Path) -> None:
    stage_job(toy(tmp_path, "data"), store, revision=f"abcdef0+{code_revision().partition('+')[2]}")()
    assert store.is_done(toy(tmp_path, "data"))


@pytest.mark.parametrize(
    ("run", "code", "words"), [("fail", 1, "the numbers do not add up"), ("refuse", 2, "is truncated")]
)
def test_a_failed_stage_ends_with_its_code_and_one_line(
    fake: Fake, store: Store, tmp_path: Path, capsys: Any, run: str, code: int, words: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        stage_job(toy(tmp_path, "data", run), store)()
    err = capsys.readouterr().err
    assert caught.value.code == code and words in err and len(err.splitlines()) == 1


def test_a_time_limit_without_a_checkpoint_is_not_tried_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = toy(tmp_path, "data")
    job = stage_job(stage, store, limit=3600)
    assert job.checkpoint().function == job, "preempted early: it starts again"
    monkeypatch.setattr(jobs, "_STARTED", jobs._STARTED - 3600)
    with pytest.raises(UserError, match="data reached its time limit without a checkpoint .* say more hours"):
        job.checkpoint()
    kept = store.folder(stage) / "checkpoints" / "state.json"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert job.checkpoint().function == job, "it came further"
    os.utime(kept, (jobs._STARTED_AT - 600,) * 2)
    with pytest.raises(UserError, match="time limit"):
        job.checkpoint()


# --- records ----------------------------------------------------------------------------------------------------------


def record(name: str, created: str, sweep: str = "clusters", jobs: tuple[str, ...] = ()) -> Submission:
    stages = tuple(SubmittedStage(f"{n:064x}", f"data/{n:016x}", "data", job) for n, job in enumerate(jobs))
    return Submission(name, sweep, "typed", created, "a+b", "/runs", stages)


def test_records_are_found_by_sweep_and_id(store: Store) -> None:
    with pytest.raises(UserError, match="no submission in .*store: nothing was submitted"):
        submissions.find(store, "clusters")
    old = record("clusters-1", "2026-11-23T10:00:00+00:00", jobs=("7", "8_1"))
    new = record("clusters-2", "2026-11-23T11:00:00+00:00", jobs=("9",))
    seeds = record("seeds-1", "2026-11-23T12:00:00+00:00", "seeds")
    for one in (new, old, seeds):
        assert submissions.write(store, one) == store.root / ".jobs" / "submissions" / f"{one.id}.json"
    assert submissions.history(store) == [seeds, new, old]
    assert submissions.find(store, "clusters") == new and submissions.find(store, "clusters-1") == old
    assert list(submissions.live(store).values()) == ["9", "8_1"]
    with pytest.raises(UserError, match="no submission 'seed' in .*did you mean 'seeds'"):
        submissions.find(store, "seed")
    (store.root / ".jobs" / "submissions" / "clusters-2.json").write_text('{"id": 3}')
    assert submissions.history(store) == [seeds, old]
    with pytest.raises(UserError, match="record of submission clusters-2 is damaged"):
        submissions.find(store, "clusters-2")


def test_ids_are_never_used_twice(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        @staticmethod
        def now(zone: Any) -> Any:
            from datetime import datetime

            return datetime(2026, 11, 23, 19, 15)

    monkeypatch.setattr(submissions, "datetime", Clock)
    for expected in ("clusters-20261123-191500", "clusters-20261123-191500-2", "clusters-20261123-191500-3"):
        identifier = submissions.new_id(store, "clusters")
        assert identifier == expected
        submissions.write(store, record(identifier, "2026-11-23T19:15:00+00:00"))


# --- scale ------------------------------------------------------------------------------------------------------------

SCALE = """
import json, sys, time
from pathlib import Path
from dataclasses import replace
from benchmark.graph import Plan, Stage
from benchmark.launch.profile import Profile
from benchmark.launch.slurm import SlurmLauncher
from benchmark.stages import GPU, JOINT
from benchmark.store import Store

config = {f"setting{n}": {"value": n, "list": [1, 2, 3], "name": "as long as a setting is"} for n in range(20)}
started = time.process_time()
ends = []
for seed in range(10):
    for k in range(100):
        # As a sweep builds them: every variant makes all of its stages, the shared ones too.
        data = Stage("data", "toy_stages:add", config)
        encoder = Stage("encoder", "toy_stages:add", {**config, "seed": seed}, {"data": data}, resources=GPU)
        own = {**config, "k": k, "seed": seed}
        clusters = Stage("clusters", "toy_stages:add", own, {"encoder": encoder}, label=f"k={k}")
        low, semantic = (Stage(name, "toy_stages:add", own, {"data": data, "encoder": encoder, "clusters": clusters}, label=f"k={k}", resources=GPU) for name in ("lowlevel", "semantic"))
        joint = Stage("joint", "toy_stages:add", own, {"data": data, "semantic": semantic}, label=f"k={k}", resources=JOINT)
        ends.append(Stage("score", "toy_stages:add", own, {"low": low, "joint": joint}, label=f"k={k}"))
plan = Plan.of(ends)
built = time.process_time()
decisions = plan.decide(Store(sys.argv[1]))
decided = time.process_time()
launcher = SlurmLauncher(Profile(partition="gpu"), parallel=64)
arrays, asks = launcher.arrays(decisions, max_size=1001)
scripts = launcher.render(decisions, arrays, asks, Path(sys.argv[1]) / "logs")
ended = time.process_time()
# Not getrusage, which remembers the process that this one was forked from.
peak = 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
print(json.dumps({"stages": len(plan.stages), "arrays": len(arrays), "scripts": len(scripts), "seconds": ended - started,
    "parts": [built - started, decided - built, ended - decided], "bytes": peak}))
"""  # fmt: skip


def test_five_thousand_stages_are_planned_and_rendered_within_seconds(fake: Fake, tmp_path: Path) -> None:
    script_file = tmp_path / "scale.py"
    script_file.write_text(SCALE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}
    done = subprocess.run(
        [sys.executable, script_file, tmp_path / "store"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["stages"] == 5011 and found["scripts"] == found["arrays"]
    assert found["seconds"] < 5, "of processor time: 1.5 s where this was written"
    assert found["bytes"] < 500e6
