"""`story`: a fleet that gets events, one at a time, and the actions it answered with."""

from __future__ import annotations

import pytest

from socketprotector.core.actions import Action, CancelTimer, StartTimer
from socketprotector.core.decide import decide
from socketprotector.core.events import (
    Deadline,
    DeadlinePassed,
    Event,
    Launched,
    TimerKind,
    WorkerReady,
)
from socketprotector.core.fleet import Fleet, Phase, Policy

TURN = Deadline(TimerKind.TURN)


class Story:
    """given_...: what happened before; when(...): the actions that follow from an event."""

    def __init__(self) -> None:
        self.fleet = Fleet()

    def given(self, policy: Policy, *, workers: int = 1) -> Story:
        self.fleet = Fleet(policy=policy, workers_wanted=workers)
        return self

    def given_serving(self, policy: Policy | None = None, *, workers: int = 1) -> Story:
        """Generation 1 serves, with workers 1, 2, ..."""
        self.given(policy or Policy(), workers=workers)
        return self.and_also(Launched(), *map(WorkerReady, range(1, workers + 1)))

    def and_also(self, *events: Event) -> Story:
        for event in events:
            self.when(event)
        return self

    def when(self, event: Event) -> list[Action]:
        """Tell an event, and let the loop turn until nothing is left to be started for it."""
        actions = self.when_at_once(event)
        while TURN in self.fleet.timers:
            actions += self.when_at_once(DeadlinePassed(TURN))
        turned = (StartTimer(TURN, 0.0), CancelTimer(TURN))
        return [each for each in actions if each not in turned]

    def when_at_once(self, event: Event) -> list[Action]:
        """Tell an event; return what follows before the loop turns."""
        self.fleet, actions = decide(self.fleet, event)
        return list(actions)

    def when_over(self, wait: TimerKind, target: int = 0) -> list[Action]:
        """Let a timer run out."""
        assert Deadline(wait, target) in self.fleet.timers
        return self.when(DeadlinePassed(Deadline(wait, target)))

    def numbers(self, phase: Phase) -> set[int]:
        return {generation.number for generation in self.fleet.all_of(phase)}

    @property
    def starting(self) -> set[int]:
        return self.numbers(Phase.STARTING)

    @property
    def settling(self) -> set[int]:
        return self.numbers(Phase.SETTLING)

    @property
    def serving(self) -> set[int]:
        return self.numbers(Phase.SERVING)

    @property
    def draining(self) -> set[int]:
        return self.numbers(Phase.DRAINING)


@pytest.fixture
def story() -> Story:
    return Story()
