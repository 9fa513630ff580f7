"""One cluster for all tests of this folder, and sweeps of small stages that are submitted to it."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for the tests, and through the launcher for the jobs

import slurm_stages as toys  # noqa: E402
from cluster import Cluster, why_not  # noqa: E402
from toy_sweep import submit  # noqa: E402

from benchmark.graph import Plan, Stage  # noqa: E402
from benchmark.launch.submissions import Submission, history  # noqa: E402
from benchmark.store import Store, read_json  # noqa: E402


class Sweep:
    """A plan, a store and a cluster; what a person who types the sweep's command has."""

    def __init__(self, cluster: Cluster, out: Path, targets: Sequence[Stage], **profile: Any) -> None:
        self.cluster = cluster
        self.store = Store(out / "store")
        self.plan = Plan.of(targets)
        self.out, self.targets, self.profile = out, targets, profile
        self.submissions: list[Submission] = []
        # Of a sweep that was submitted, then submitted again while it ran.
        self.submitted_in, self.again, self.waited_for = math.nan, -1, dict[str, str]()

    def submit(self, mode: str = "cached", **fields: Any) -> int:
        """Type the sweep's command; return how many stages it submitted."""
        record, count = submit(self.targets, self.out, mode, **{**self.profile, **fields})
        self.submissions.append(record)
        return count

    def stage(self, name: str, label: str = "") -> Stage:
        """A stage of the plan."""
        (found,) = [one for one in self.plan.stages if one.name == name and label in one.label]
        return found

    def job(self, stage: Stage) -> str:
        """The id of the job that the newest submission has for a stage."""
        (found,) = [one.job for one in self.submissions[-1].stages if one.fingerprint == stage.fingerprint]
        return found

    def log(self, stage: Stage) -> str:
        """What the newest job of a stage printed as errors."""
        (found,) = [one.stderr for one in self.submissions[-1].stages if one.fingerprint == stage.fingerprint]
        return Path(found).read_text() if found and Path(found).exists() else ""

    def runs(self) -> list[str]:
        """The key of every stage, for each time that it started to compute."""
        log = self.store.root / toys.LOG
        return log.read_text().splitlines() if log.exists() else []

    def states(self) -> dict[str, str]:
        """Title -> what the store says."""
        return {stage.title: self.store.state(stage).kind for stage in self.plan.stages}

    def done(self) -> bool:
        """Whether every stage has its result."""
        return set(self.states().values()) == {"done"}

    def until(self, condition: Callable[[], object], seconds: float = 60) -> None:
        """Wait for something that the jobs do."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                pytest.fail(f"not there after {seconds:g} s: {self.describe()}")
            time.sleep(0.1)

    def until_under_way(self, stage: Stage, seconds: float = 120) -> None:
        """Wait until a training, or a walk, is in its middle and has written checkpoints."""
        folder = self.store.folder(stage) / "checkpoints"

        def steps() -> int:
            if (folder / "state.json").exists():
                return int(read_json(folder / "state.json")["step"]) // 10
            return max((int(path.name.partition("-")[2]) for path in folder.glob("*/checkpoint-*")), default=0)

        self.until(lambda: steps() >= 1, seconds)

    def finish(self, seconds: float = 120) -> None:
        """Wait for the end of all jobs, then see that every stage has its result."""
        self.cluster.wait_idle(seconds)
        assert self.done(), self.describe()

    def digests(self) -> dict[str, Any]:
        """Key -> digest of every output, of the stages that are marked done; each is compared with its file.

        ``manifest.json`` is left out: it says when and by which command.
        """
        found = {}
        for stage in self.plan.stages:
            marked = self.store.folder(stage) / "DONE"
            if marked.exists():
                outputs = read_json(marked)["outputs"]
                assert self.store.verify(stage) == [], stage.title
                found[stage.key] = {name: file["sha256"] for name, file in outputs.items() if name != "manifest.json"}
        return found

    def describe(self) -> str:
        """States, jobs and the ends of the logs, for a test that fails."""
        lines = [str(self.states()), str(self.cluster.jobs())]
        for record in history(self.store):
            for one in record.stages:
                if one.stderr and not one.shared and Path(one.stderr).exists():
                    lines += ["", f"{one.title} {one.job}", Path(one.stderr).read_text()[-1500:]]
        lines.append(self.cluster.run("sacct", "-D", "-X", "-n", "-o", "jobid%15,jobname,state%20,exitcode,nodelist"))
        return "\n".join(lines)


@pytest.fixture(scope="session")
def _cluster() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the cluster is stopped then, too
    with Cluster() as started:
        before = dict(os.environ)
        os.environ.clear()
        os.environ.update(started.environment(before))
        try:
            yield started
        finally:
            os.environ.clear()
            os.environ.update(before)


@pytest.fixture
def cluster(_cluster: Cluster) -> Iterator[Cluster]:
    """A cluster that is whole and has no job."""
    _cluster.heal()
    yield _cluster
    _cluster.heal()


@pytest.fixture
def sweep(cluster: Cluster, tmp_path: Path) -> Callable[..., Sweep]:
    """Make a sweep of these targets in an empty store, with these settings of the profile."""

    def make(targets: Sequence[Stage], out: Path = tmp_path, **profile: Any) -> Sweep:
        return Sweep(cluster, out, targets, **profile)

    return make


@pytest.fixture(scope="session")
def calm(_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep of two variants, and the chains, that nobody disturbs."""
    _cluster.heal()
    targets = [*toys.scores(2, sleep=0.1), toys.chain(sleep=0.1), toys.chain(sleep=0.1, network=False)]
    one = Sweep(_cluster, tmp_path_factory.mktemp("calm"), targets)
    started = time.monotonic()
    one.submit()
    one.submitted_in = time.monotonic() - started
    one.waited_for = dict(line.split() for line in _cluster.run("squeue", "-h", "-r", "-o", "%i %E").splitlines())
    one.again = one.submit()
    _cluster.wait_idle(280)
    return one


@pytest.fixture(scope="session")
def undisturbed(calm: Sweep) -> Mapping[str, Any]:
    """Digests of the stages of two variants and of the chains, computed by jobs that nobody disturbed."""
    assert calm.done(), calm.describe()
    return calm.digests()
