"""Where a plan runs. Every launcher takes the same plan and decisions, and says how each stage ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from benchmark.errors import RunError, UserError, did_you_mean
from benchmark.execute import Outcome, RunOptions
from benchmark.graph import Decision, Plan, Stage
from benchmark.store import Store

LAUNCHERS = ("inline", "local")


@dataclass(frozen=True)
class Event:
    """Something that happened while a plan runs; ``str()`` of it is a line to show."""

    kind: Literal["note", "started", "done", "cached", "failed", "blocked"]
    stage: Stage | None
    position: str = ""  # "[7/48]" among the stages that run
    seconds: float = 0.0
    message: str = ""

    def __str__(self) -> str:
        if self.stage is None:
            return self.message
        words = {"done": f"done in {self.seconds:.1f} s"}.get(self.kind, self.kind)
        head = f"{self.position} {self.stage.title}: {words}".lstrip()
        return f"{head}: {self.message}" if self.message else head


OnEvent = Callable[[Event], None]


class Launcher(Protocol):
    """Runs what the decisions say, dependencies first."""

    def run(
        self, plan: Plan, decisions: Sequence[Decision], store: Store, options: RunOptions, on_event: OnEvent
    ) -> list[Outcome]:
        """Run the stages and return one outcome for each, in the order of the plan.

        A stage that fails blocks those that need it; the others go on, and nothing is raised for it (see
        :func:`raise_failures`).

        Raises:
            UserError: a stage found its input wrong: the rest is not started.
            KeyboardInterrupt, SystemExit: interrupted; the same command goes on from there.
        """
        ...


def make_launcher(name: str, parallel: int = 1) -> Launcher:
    """Return the launcher of that name: ``inline`` (this process) or ``local`` (``parallel`` submitit processes).

    Slurm's is none of these: it submits, and returns before anything has run (``benchmark.launch.slurm``).

    Raises:
        UserError: no such launcher, or ``parallel`` is below 1.
    """
    if parallel < 1:
        raise UserError(f"parallel is {parallel}, expected 1 or more")
    if name == "inline":
        from benchmark.launch.inline import InlineLauncher

        return InlineLauncher()
    if name == "local":
        from benchmark.launch.local import LocalLauncher

        return LocalLauncher(parallel)
    raise UserError(f"unknown launcher '{name}'{did_you_mean(name, LAUNCHERS)}; expected {' or '.join(LAUNCHERS)}")


def raise_failures(outcomes: Sequence[Outcome]) -> None:
    """Do nothing where no stage failed; else say which did, and how many were not tried because of it.

    Raises:
        RunError: at least one stage failed.
    """
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if not failed:
        return
    blocked = sum(outcome.state == "blocked" for outcome in outcomes)
    stages = "1 stage" if len(failed) == 1 else f"{len(failed)} stages"
    rest = f", {blocked} not tried because of it" if blocked else ""
    raise RunError("\n".join([f"{stages} failed{rest}:", *(f"  {outcome.error}" for outcome in failed)]))


def settle(decision: Decision, store: Store, outcomes: Mapping[str, Outcome]) -> Outcome | None:
    """Return the outcome of a stage that does not run (cached, or blocked by what it needs), else None."""
    stage = decision.stage
    if decision.action == "cached":
        return Outcome(stage, "cached", summary=store.status(stage).get("summary", {}))
    if decision.action == "blocked":
        return Outcome(stage, "blocked", error=decision.reason)
    ended = (outcomes.get(upstream.fingerprint) for upstream in stage.upstream.values())
    bad = [outcome for outcome in ended if outcome is not None and outcome.state in ("failed", "blocked")]
    if not bad:
        return None
    needs = " and ".join(
        f"{one.stage.title}, which {'failed' if one.state == 'failed' else 'did not run'}" for one in bad
    )
    return Outcome(stage, "blocked", error=f"needs {needs}")


def micro_batches(stage: Stage) -> int:
    """Return how many micro-batches make up a step of the stage's training; 0 for a stage that trains nothing."""
    training = stage.config.get("training")
    return int(training.get("accumulate", 1)) if isinstance(training, Mapping) else 0


def useful_gpus(stage: Stage, most: int) -> int:
    """Return how many of ``most`` GPUs a stage can use.

    Processes that train together take turns at a step's micro-batches: one GPU more than there are of these is idle.
    """
    share = micro_batches(stage)
    return max(count for count in range(most + 1) if not count or not share or share % count == 0)


def positions(decisions: Sequence[Decision]) -> dict[str, str]:
    """Return ``[7/48]`` for every stage that runs, by fingerprint."""
    runs = [decision.stage.fingerprint for decision in decisions if decision.action == "run"]
    return {fingerprint: f"[{index}/{len(runs)}]" for index, fingerprint in enumerate(runs, 1)}
