"""Run a plan in this process, one stage after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmark.errors import RunError
from benchmark.execute import Outcome, RunOptions, execute
from benchmark.graph import Decision, Plan
from benchmark.launch import Event, OnEvent, positions, settle
from benchmark.store import Store


class InlineLauncher:
    """Needs nothing but this process; the launcher of a laptop."""

    def run(
        self, plan: Plan, decisions: Sequence[Decision], store: Store, options: RunOptions, on_event: OnEvent
    ) -> list[Outcome]:
        """See :meth:`benchmark.launch.Launcher.run`."""
        place = positions(decisions)
        outcomes: dict[str, Outcome] = {}
        for decision in decisions:
            stage = decision.stage
            position = place.get(stage.fingerprint, "")
            outcome = settle(decision, store, outcomes)
            if outcome is None:
                on_event(Event("started", stage, position, message=decision.reason))
                try:
                    outcome = execute(stage, store, replace(options, force=decision.force, position=position))
                except RunError as error:
                    outcome = Outcome(stage, "failed", error=str(error))
            outcomes[stage.fingerprint] = outcome
            on_event(Event(outcome.state, stage, position, outcome.seconds, outcome.error))
        return list(outcomes.values())
