"""Profile files: what they may say, and what each stage then asks of the cluster."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmark.config import paper
from benchmark.errors import UserError
from benchmark.graph import Resources, Stage
from benchmark.launch.profile import STAGES, Profile, ask, profile_path, read_profile
from benchmark.stages import GPU, JOINT

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "slurm-profiles").glob("*.yaml"))


def stage(name: str, resources: Resources = GPU, accumulate: int | None = None) -> Stage:
    config = {} if accumulate is None else {"training": {"accumulate": accumulate}}
    return Stage(name, "toy_stages:add", config, resources=resources)


def profile(tmp_path: Path, text: str) -> Profile:
    path = tmp_path / "slurm.yaml"
    path.write_text(text)
    return read_profile(path)


CPU = Resources()


def test_without_a_profile_stages_ask_for_what_they_say() -> None:
    nothing = read_profile(None)
    clusters, encoder, joint = (
        ask(nothing, stage(*one)) for one in (("clusters", CPU), ("encoder",), ("joint", JOINT))
    )
    assert (clusters.device, clusters.gpus, clusters.cpus, clusters.tasks) == ("cpu", 0, 2, 1)
    assert (clusters.minutes, clusters.memory_mb) == (60, 8 * 1024)
    assert (encoder.device, encoder.gpus, encoder.cpus, encoder.minutes) == ("cuda", 1, 8, 24 * 60)
    assert (joint.gpus, joint.tasks, joint.nodes, joint.cpus, joint.memory_mb) == (4, 4, 1, 8, 256 * 1024)
    assert joint.words() == "4 GPUs, 32 CPUs, 256 GB, 24 h, 4 tasks"


def test_what_is_said_nearest_to_a_stage_counts(tmp_path: Path) -> None:
    own = profile(
        tmp_path,
        """
        partition: gpu
        account: brain
        hours: 10
        setup: [module load cuda]
        environment: {HF_HUB_OFFLINE: 1, TOKENIZERS_PARALLELISM: false}
        sbatch: {mail-type: FAIL}
        cpu: {partition: cpu, hours: 2}
        stages:
          joint: {partition: big, constraint: h100, memory_gb: 400, environment: {NCCL_DEBUG: INFO}}
          clusters: {hours: 0.5, sbatch: {comment: short}}
        """,
    )
    encoder, clusters, joint = (ask(own, stage(*one)) for one in (("encoder",), ("clusters", CPU), ("joint", JOINT)))
    assert dict(encoder.options) == {"partition": "gpu", "account": "brain", "mail-type": "FAIL"}
    assert (encoder.minutes, encoder.setup) == (600, ("module load cuda",))
    assert dict(encoder.environment) == {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    assert dict(clusters.options) == {"partition": "cpu", "account": "brain", "mail-type": "FAIL", "comment": "short"}
    assert clusters.minutes == 30 and ask(own, stage("prepare", CPU)).minutes == 120
    assert dict(joint.options)["partition"] == "big" and dict(joint.options)["constraint"] == "h100"
    assert joint.memory_mb == 400 * 1024 and dict(joint.environment)["NCCL_DEBUG"] == "INFO"


def test_more_gpus_than_a_node_has_are_spread_over_nodes(tmp_path: Path) -> None:
    two = ask(profile(tmp_path, "gpus_per_node: 2\ngpu_type: a100"), stage("joint", JOINT))
    assert (two.nodes, two.tasks, two.gpus, two.memory_mb, two.cpus) == (2, 4, 2, 128 * 1024, 8)
    fewer = ask(profile(tmp_path, "stages: {joint: {gpus: 2, cpus: 9}}"), stage("joint", JOINT))
    assert (fewer.nodes, fewer.tasks, fewer.gpus, fewer.cpus) == (1, 2, 2, 5)


@pytest.mark.parametrize(("accumulate", "gpus"), [(1, 1), (2, 2), (3, 3), (4, 4), (6, 3), (8, 4)])
def test_joint_training_asks_for_the_gpus_that_it_can_use(tmp_path: Path, accumulate: int, gpus: int) -> None:
    joint = stage("joint", JOINT, accumulate)
    found = ask(read_profile(None), joint)
    assert (found.gpus, found.tasks, found.cpus, found.memory_mb) == (gpus, gpus, 8, gpus * 64 * 1024)
    more = profile(tmp_path, "stages: {joint: {gpus: 5}}")
    with pytest.raises(UserError, match=f"5 processes cannot share the {accumulate} micro-batches of a step evenly"):
        ask(more, joint)


def test_joint_training_gets_four_gpus_in_the_paper_s_preset() -> None:
    assert paper().joint.training.accumulate == 4 == ask(read_profile(None), stage("joint", JOINT, 4)).gpus


@pytest.mark.parametrize("said", ["profile", "option"])
def test_on_cpus_no_stage_asks_for_a_gpu(tmp_path: Path, said: str) -> None:
    text = "stages: {joint: {tasks: 2, nodes: 2}}\ncpu: {partition: cpu}\ngpu_type: a100\n"
    own = profile(tmp_path, text + ("device: cpu" if said == "profile" else "device: cuda"))
    device = "auto" if said == "profile" else "cpu"
    encoder, joint = ask(own, stage("encoder"), device), ask(own, stage("joint", JOINT), device)
    assert (encoder.device, encoder.gpus, encoder.gpu_type, encoder.tasks) == ("cpu", 0, None, 1)
    assert encoder.partition == "cpu", "a stage without a GPU, whatever it asked for"
    assert (joint.device, joint.gpus, joint.tasks, joint.nodes, joint.cpus) == ("cpu", 0, 2, 2, 16)
    alone = ask(profile(tmp_path, "device: cpu"), stage("joint", JOINT))
    assert (alone.tasks, alone.nodes) == (1, 1)


@pytest.mark.parametrize(
    ("text", "resources", "message"),
    [
        ("stages: {joint: {gpus: 3, nodes: 2}}", JOINT, "joint: 3 tasks cannot be spread evenly over 2 nodes"),
        (
            "stages: {joint: {tasks: 2}}",
            JOINT,
            "joint: tasks is 2 and gpus 4, expected one task for each GPU; leave out tasks",
        ),
        ("stages: {joint: {tasks: 2}}", GPU, "joint: tasks is 2, but this stage runs as one; leave it out"),
        ("stages: {joint: {gpus: 2}}", GPU, "joint: gpus is 2, but this stage uses one; leave it out"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(tmp_path: Path, text: str, resources: Resources, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        ask(profile(tmp_path, text), stage("joint", resources))


SLIPS: list[tuple[str, str]] = [
    ("partion: gpu", "unknown key 'partion' (did you mean 'partition'?)"),
    ("time: 10", "unknown key 'time' (did you mean 'hours'?)"),
    ("stages: {joint: {mem: 3}}", "stages: joint: unknown key 'mem' (did you mean 'memory_gb'?)"),
    ("cpu: {gpus: 3}", "cpu: unknown key 'gpus'"),
    ("hours: 0", "hours: Input should be greater than 0 (given 0)"),
    ("hours: soon", "hours: Input should be a valid number, unable to parse string as a number (given 'soon')"),
    ("cpus: 1.5", "cpus: Input should be a valid integer, got a number with a fractional part (given 1.5)"),
    ("device: gpu", "device: Input should be 'auto', 'cpu' or 'cuda' (given 'gpu')"),
    ("partition: ''", "partition: expected one line of text"),
    ("setup: module load cuda", "setup: Input should be a valid tuple"),
    ("setup: ['#SBATCH --mem=1']", "setup: options belong to 'sbatch'"),
    ("sbatch: {mem: 4G}", "sbatch: 'mem' is set by memory_gb"),
    ("sbatch: {--partition: x}", "sbatch: '--partition' is set by partition"),
    ("sbatch: {cpus_per_task: 3}", "sbatch: 'cpus_per_task' is set by cpus"),
    ("sbatch: {array: 1-3}", "sbatch: 'array' is set by the launcher, leave it out"),
    ('sbatch: {"x\\n#y": 1}', "is no option of sbatch"),
    ('sbatch: {comment: "a\\nrm -rf x"}', "'comment': expected one line of text"),
    ("environment: {A-B: 1}", "environment: 'A-B' is no name of a variable"),
    ("partition: [", "line 1: not YAML"),
    ("- a", "expected lines such as 'partition: gpu', found list"),
    ("partition: !!python/object/apply:os.getcwd []", "not YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), SLIPS, ids=[text for text, _ in SLIPS])
def test_a_slip_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        profile(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "slurm.yaml")) and message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_profile_is_found_where_configuration_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert profile_path() is None and read_profile(None) == Profile()
    own = tmp_path / "brain-it-bench" / "slurm.yaml"
    own.parent.mkdir()
    own.write_text("partition: mine\n")
    assert profile_path() == own and read_profile(own).partition == "mine"
    assert profile_path(tmp_path / "other.yaml") == tmp_path / "other.yaml"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    own.parent.rename(tmp_path / "kept")
    (tmp_path / ".config").mkdir()
    (tmp_path / "kept").rename(tmp_path / ".config" / "brain-it-bench")
    assert profile_path() == tmp_path / ".config" / "brain-it-bench" / "slurm.yaml"
    with pytest.raises(UserError, match="--profile .*other.yaml: no such file; docs/slurm-profiles has examples"):
        read_profile(tmp_path / "other.yaml")
    (tmp_path / "empty.yaml").touch()
    assert read_profile(tmp_path / "empty.yaml") == Profile()


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_examples_are_read_and_mention_stages_that_exist(path: Path) -> None:
    example = read_profile(path)
    assert set(example.stages) <= set(STAGES)
    for name in STAGES:
        resources: Any = JOINT if name == "joint" else CPU if name == "clusters" else GPU
        assert ask(example, stage(name, resources)).minutes > 0


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3
