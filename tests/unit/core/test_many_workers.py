"""What concerns one worker costs what one costs, however many there are.

Counted in steps of the interpreter, which are the same on a busy machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from socketprotector.core.decide import decide
from socketprotector.core.events import (
    Event,
    Launched,
    ReloadRequested,
    ScaleRequested,
    StopRequested,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import Fleet
from tests.steps import steps_of

FEW, MANY = 10, 80
#: More than in proportion: what the halves of a longer list and its one look cost more.
SLACK = 1.3


class Life:
    """A fleet, and its workers' numbers from the first to the last."""

    def __init__(self, workers: int) -> None:
        self.fleet = Fleet(workers_wanted=workers)
        self.workers = workers
        self.tell(Launched())
        self.all_ready()

    def tell(self, *events: Event) -> None:
        for event in events:
            self.fleet, _ = decide(self.fleet, event)

    def all_ready(self) -> None:
        last = self.fleet.next_worker
        self.tell(*(WorkerReady(n, retires=True) for n in range(last - self.workers, last)))

    def reload(self) -> None:
        first = self.fleet.next_worker - self.workers
        self.tell(ReloadRequested())
        self.all_ready()
        self.tell(*(WorkerExited(n, "exited", 20.0) for n in range(first, first + self.workers)))

    def crash(self) -> None:
        first = self.fleet.next_worker - self.workers
        gone = range(first, first + self.workers)
        self.tell(*(WorkerExited(n, "killed", 20.0) for n in gone))
        self.all_ready()

    def scale(self) -> None:
        self.tell(ScaleRequested(0, to=2 * self.workers), ScaleRequested(0, to=self.workers))

    def stop(self) -> None:
        self.tell(StopRequested(quick=True))
        first = self.fleet.next_worker - self.workers
        self.tell(*(WorkerExited(n, "exited") for n in range(first, first + self.workers)))


@pytest.mark.parametrize("what", [Life.reload, Life.crash, Life.scale, Life.stop])
def test_eight_times_the_workers_take_eight_times_the_steps(what: Callable[[Life], None]) -> None:
    lives = Life(FEW), Life(MANY)
    few, many = (steps_of(partial(what, life)) for life in lives)

    assert many < few * MANY / FEW * SLACK
