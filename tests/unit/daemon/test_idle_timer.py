"""Timers that run on: of --lame-duck-idle for each client, of a canary whose clients wait.

And a start's, which first reads what its workers have sent.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import SimpleNamespace
from typing import cast

from socketprotector.core.actions import Action, StartTimer
from socketprotector.core.events import Deadline, DeadlinePassed, Event, TimerKind
from socketprotector.daemon.effects import Effects

IDLE = Deadline(TimerKind.LAME_DUCK_IDLE)
NO_MESSAGES = SimpleNamespace(catch_up=lambda deadline: None)


class Timer:
    """A loop's, which runs out when a test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.is_set = False
        self._callback: Callable[[], None] = lambda: None

    def call_after(self, _: Hashable, seconds: float, callback: Callable[[], None]) -> None:
        self.seconds, self.is_set, self._callback = seconds, True, callback

    def due(self, _: Hashable) -> float | None:
        return self.seconds if self.is_set else None

    def run_out(self) -> None:
        self.is_set = False
        self._callback()


def test_it_runs_out_when_no_client_has_come_for_its_whole_time() -> None:
    timer, posted = Timer(), list[Event]()
    effects = SimpleNamespace(
        _loop=timer,
        _note_due=lambda _: None,
        _post=posted.append,
        delivery=SimpleNamespace(idle_s=0.0),
        pool=SimpleNamespace(proved_ready=True, messages=NO_MESSAGES),
    )
    Effects._start_timer(cast("Effects", effects), IDLE, 2.0)
    assert timer.seconds == 2.0

    effects.delivery.idle_s = 0.5
    timer.run_out()
    assert timer.seconds == 1.5

    effects.delivery.idle_s = 0.0  # one waits
    timer.run_out()
    assert timer.seconds == 2.0
    assert posted == []

    effects.delivery.idle_s = 2.0
    timer.run_out()
    assert posted == [DeadlinePassed(IDLE)]


def test_the_workers_messages_are_read_before_a_deadline_counts() -> None:
    timer, done = Timer(), list[Deadline | Event]()
    start = Deadline(TimerKind.START, 2)
    effects = SimpleNamespace(
        _loop=timer,
        _note_due=lambda _: None,
        _post=done.append,
        _start_advice=lambda number: "",
        delivery=SimpleNamespace(is_stuck=None),
        pool=SimpleNamespace(messages=SimpleNamespace(catch_up=done.append)),
    )
    Effects._start_timer(cast("Effects", effects), start, 60.0)
    timer.run_out()

    assert done == [start, DeadlinePassed(start, stuck=False)]


def test_a_start_that_such_a_message_extends_goes_on() -> None:
    """EXTEND_TIMEOUT_USEC, behind more messages than a turn of the loop reads."""
    timer, posted, extended = Timer(), list[Event](), list[Action]()
    start = Deadline(TimerKind.START, 2)
    effects: Effects

    def catch_up(deadline: Deadline) -> None:
        while extended:
            Effects.perform(effects, extended.pop())

    effects = cast(
        "Effects",
        SimpleNamespace(
            _loop=timer,
            _note_due=lambda _: None,
            _post=posted.append,
            _start_advice=lambda number: "",
            _start_timer=lambda *given: Effects._start_timer(effects, *given),
            delivery=SimpleNamespace(is_stuck=None),
            pool=SimpleNamespace(messages=SimpleNamespace(catch_up=catch_up)),
        ),
    )
    Effects._start_timer(effects, start, 60.0)
    extended.append(StartTimer(start, 30.0, extend=True))
    timer.run_out()
    assert posted == []
    assert timer.seconds == 30.0

    timer.run_out()
    assert posted == [DeadlinePassed(start, stuck=False)]


def test_the_end_of_a_stage_says_whether_clients_wait_in_vain() -> None:
    timer, posted = Timer(), list[Event]()
    settle = Deadline(TimerKind.SETTLE, 2)
    effects = SimpleNamespace(
        _loop=timer,
        _note_due=lambda _: None,
        _post=posted.append,
        delivery=SimpleNamespace(is_stuck=lambda generation: generation == "stuck"),
        generations={2: "stuck"},
        _sharing=2,
        met=lambda number: 7 + number,
        pool=SimpleNamespace(messages=NO_MESSAGES),
        probing=SimpleNamespace(note_settle_over=lambda _: False),
    )
    Effects._start_timer(cast("Effects", effects), settle, 60.0)
    timer.run_out()
    effects.generations[2] = "served"
    timer.run_out()
    assert posted == [
        DeadlinePassed(settle, met=9, stuck=True),
        DeadlinePassed(settle, met=9, stuck=False),
    ]
    effects._sharing = None
    effects.met = None  # to count takes a system call for each worker, which only a share needs
    timer.run_out()
    assert posted[2:] == [DeadlinePassed(settle)]
