"""What a program that is killed has said is not said again by the next one.

A verdict that is said twice would be taken for that of the reload which was asked for in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.core.actions import Action, Report, ReportKind
from socketprotector.core.events import (
    Deadline,
    DeadlinePassed,
    DryRunRequested,
    Event,
    ReloadRequested,
    RenewRequested,
    TimerKind,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import Fleet
from socketprotector.daemon.event_queue import EventQueue
from socketprotector.daemon.runtime import Runtime
from socketprotector.daemon.supervisor import Supervisor


class Killed:
    """Effects; in the middle of each it may be killed: what would the next one say again?"""

    def __init__(self) -> None:
        self.written: tuple[Report, ...] = ()
        self.said: list[Report] = []
        self.said_again: set[Report] = set()
        self.delivery = SimpleNamespace(accept_waiting=lambda: None)

    def snapshot(self, fleet: Fleet, actions: Iterable[Action]) -> tuple[Report, ...]:
        return tuple(each for each in actions if isinstance(each, Report))

    def perform(self, action: Action) -> None:
        self.said_again.update(set(self.written).intersection(self.said))
        if isinstance(action, Report):
            self.said.append(action)


def protector_of(killed: Killed, upgrade: object = None, **checkpoint: object) -> Supervisor:
    queue = EventQueue()
    states: list[Any] = []

    def persist() -> bool:
        killed.written = states[0]()
        return True

    loop = SimpleNamespace(catch=lambda *_: None, run_if_due=lambda _: None)
    log = SimpleNamespace(write=lambda *_, **__: None)
    return Supervisor(
        Fleet(),
        queue,
        cast("Any", killed),
        cast(
            "Any", SimpleNamespace(begin=lambda _, snapshot: states.append(snapshot), **checkpoint)
        ),
        cast("Any", upgrade),
        Runtime(cast("Any", loop), cast("Any", log), queue.post, persist),
        reopen_logs=lambda: "",
        on_signal=lambda _: None,
        terminal=None,
        outlives_terminal=False,
    )


FAILS, IS_READY = WorkerExited(2, "exited with status 1"), WorkerReady(2)


@pytest.mark.parametrize(
    ("asked", "comes", "verdict"),
    [
        (ReloadRequested(), IS_READY, ReportKind.RELOADED),
        (ReloadRequested(), FAILS, ReportKind.RELOAD_FAILED),
        (RenewRequested(), IS_READY, ReportKind.RECOVERED),
        (DryRunRequested(), IS_READY, ReportKind.DRY_RUN_PASSED),
        (DryRunRequested(), FAILS, ReportKind.DRY_RUN_FAILED),
    ],
)
def test_a_verdict_is_written_down_as_said_before_the_next_reload_begins(
    asked: Event, comes: Event, verdict: ReportKind
) -> None:
    killed = Killed()
    protector = protector_of(killed)
    protector.launch()
    protector.runtime.post(WorkerReady(1))
    protector.runtime.post(asked)
    protector.runtime.post(DeadlinePassed(Deadline(TimerKind.TURN)))
    protector.runtime.post(ReloadRequested())

    protector.runtime.post(comes)

    assert [each.news for each in killed.said[-2:]] == [verdict, ReportKind.RELOADING]
    assert [each for each in killed.said_again if each.news is verdict] == []


class Upgrading:
    """The new program can take over; call back to have it done."""

    def begin(self, _: object, ready: Callable[[], None]) -> None:
        self.ready = ready

    def failed(self, reason: str) -> None:
        self.reason = reason


def test_a_dry_run_is_not_called_off_for_an_upgrade_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It fails because no guard or systemd has read all that the protector sent."""
    monkeypatch.setattr("socketprotector.daemon.supervisor._LONGEST_WAIT_S", 0.0)
    killed, upgrade = Killed(), Upgrading()
    protector = protector_of(
        killed,
        upgrade,
        store=SimpleNamespace(flushed=False),
        write=lambda: True,
        descriptors=dict[str, int],
    )
    later: list[Callable[[], None]] = []
    loop = cast("Any", protector.runtime.loop)
    loop.due = lambda _: None
    loop.call_after = lambda *call: later.append(call[-1])
    protector.launch()
    for each in (WorkerReady(1), DryRunRequested(), DeadlinePassed(Deadline(TimerKind.TURN))):
        protector.runtime.post(each)

    protector.begin_upgrade()
    upgrade.ready()
    later.pop()()

    assert "has not responded" in upgrade.reason
    assert protector.fleet.dry_run
    assert killed.said[-1].news is ReportKind.DRY_RUN
