"""`story`: a fleet that is told events, one at a time, and the actions it answered with."""

from __future__ import annotations

import pytest

from socketprotector.events import (
    Action,
    Deadline,
    DeadlinePassed,
    Event,
    Launched,
    Wait,
    WorkerReady,
)
from socketprotector.fleet import Fleet, Phase, Policy
from socketprotector.lifecycle import decide


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
        self.fleet, actions = decide(self.fleet, event)
        return list(actions)

    def when_over(self, wait: Wait, target: int = 0) -> list[Action]:
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
