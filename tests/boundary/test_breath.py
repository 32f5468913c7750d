"""What concerns many workers is done a piece at a time, and in between clients are looked after.

Time is counted here, not taken: each start of a worker takes a millisecond of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.core.actions import Action, RouteTo, Signal, Spawn
from socketprotector.core.events import (
    Deadline,
    DeadlinePassed,
    Event,
    ScaleRequested,
    StopRequested,
    TimerKind,
    WorkerReady,
)
from socketprotector.core.fleet import Fleet
from socketprotector.core.snapshot import Snapshot
from socketprotector.daemon import out_of_memory, supervisor
from socketprotector.daemon.event_queue import EventQueue
from socketprotector.daemon.runtime import Runtime
from socketprotector.daemon.supervisor import Supervisor
from socketprotector.daemon.worker_pool import WorkerPool
from socketprotector.model.records import SettingsRecord, WorkerRecord
from socketprotector.model.settings import Settings
from socketprotector.system import inherited
from socketprotector.system.sd_notify import WATCHDOG

#: What the protector promises.
LONGEST_S = 0.05
SPAWN_S = 0.001


class Away:
    """Effects that take time, and note for how long no client was looked at."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.spawned = 0
        self.performed: list[Action] = []
        self.looked_at_s = self.fed_at_s = self.now_s
        self.longest_s = self.unfed_s = self.turn_s = 0.0
        self.delivery = SimpleNamespace(accept_waiting=self.look)
        self.reports = SimpleNamespace(repeat_messages=lambda _: None)

    def monotonic(self) -> float:
        return self.now_s

    def look(self) -> None:
        self.longest_s = max(self.longest_s, self.now_s - self.looked_at_s)
        self.looked_at_s = self.now_s

    def run_if_due(self, timer: object) -> None:
        assert timer == WATCHDOG
        self.unfed_s = max(self.unfed_s, self.now_s - self.fed_at_s)
        self.fed_at_s = self.now_s

    def perform(self, action: Action) -> None:
        self.performed.append(action)
        if isinstance(action, Spawn):
            self.spawned += 1
            self.now_s += SPAWN_S

    def turn_with(
        self, protector: Supervisor, act: Callable[[], object], turns: int = 1000
    ) -> None:
        """Do something, and let the loop turn for as long as the fleet asks for that."""
        began_s = self.now_s
        act()
        while (turn := Deadline(TimerKind.TURN)) in protector.fleet.timers and turns:
            turns -= 1
            self.turn_s = max(self.turn_s, self.now_s - began_s)
            began_s = self.now_s
            protector.runtime.post(DeadlinePassed(turn))


class Found:
    """A recovery with 600 workers."""

    def __init__(self, away: Away) -> None:
        self.away = away
        self.snapshot = Snapshot(
            Fleet(workers_wanted=600), SettingsRecord(Settings("x", ("x",), "/"))
        )

    def adopt(self) -> list[Event]:
        return []

    def adopt_workers(self) -> Iterator[tuple[Event, ...]]:
        """They are found by one who is on the way already."""
        assert self.away.performed == [RouteTo(None)]
        self.away.look()
        for _ in range(600):
            self.away.now_s += SPAWN_S
            yield ()


def protector_of(away: Away, monkeypatch: pytest.MonkeyPatch, workers: int = 600) -> Supervisor:
    monkeypatch.setattr(supervisor, "time", away)
    queue = EventQueue()
    loop = SimpleNamespace(catch=lambda *_: None, run_if_due=away.run_if_due)
    log = SimpleNamespace(write=lambda *_, **__: None)
    return Supervisor(
        Fleet(workers_wanted=workers),
        queue,
        cast("Any", away),
        cast("Any", SimpleNamespace(save=lambda: True, begin=lambda *_: None)),
        cast("Any", None),
        Runtime(cast("Any", loop), cast("Any", log), queue.post, lambda: True),
        reopen_logs=lambda: "",
        on_signal=lambda _: None,
        terminal=None,
        outlives_terminal=False,
    )


def test_while_600_workers_are_started_clients_are_looked_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    away = Away()
    protector = protector_of(away, monkeypatch)

    away.turn_with(protector, protector.launch)
    away.look()

    assert away.spawned == 600
    assert away.longest_s < LONGEST_S
    assert away.unfed_s < LONGEST_S


@pytest.mark.parametrize("wanted", [600, 99_999])
def test_a_stop_while_workers_are_started_is_acted_on_soon_and_calls_off_the_rest(
    monkeypatch: pytest.MonkeyPatch, wanted: int
) -> None:
    away = Away()
    protector = protector_of(away, monkeypatch, wanted)
    protector.launch()
    spawned = away.spawned

    protector.runtime.post(StopRequested())

    assert away.now_s - 1000.0 < LONGEST_S
    assert 0 < away.spawned == spawned
    ended = [each.worker for each in away.performed if isinstance(each, Signal)]
    assert len(ended) == spawned


@pytest.mark.parametrize("ask", [ScaleRequested(to=99_999), ScaleRequested(to=600)])
def test_the_loop_turns_between_a_few_and_a_few_of_those_that_a_number_asks_for(
    monkeypatch: pytest.MonkeyPatch, ask: Event
) -> None:
    away = Away()
    protector = protector_of(away, monkeypatch, 1)
    protector.launch()
    protector.runtime.post(WorkerReady(1))

    away.turn_with(protector, lambda: protector.runtime.post(ask), turns=20)

    assert away.spawned > 20
    assert away.turn_s < LONGEST_S


def test_while_600_workers_are_adopted_clients_are_looked_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    away = Away()

    protector_of(away, monkeypatch).adopt(cast("Any", Found(away)))
    away.look()

    assert away.longest_s < LONGEST_S
    assert away.unfed_s < LONGEST_S


def test_a_worker_that_is_not_adopted_yet_is_known_to_a_program_that_resumes_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(out_of_memory, "MemoryWatch", lambda *_: None)  # root's opens descriptors
    named = inherited.Named()
    settings = SimpleNamespace(
        secret="",
        identity=None,
        worker_identity=None,
        guarded=True,
        worker_limits=SimpleNamespace(any=False),
        policy=SimpleNamespace(kill_timeout_s=1.0),
    )
    loop = SimpleNamespace(cancel=lambda _: None)
    pool = WorkerPool(
        cast("Any", settings),
        cast("Any", SimpleNamespace(loop=loop, log=None, post=None)),
        cast("Any", SimpleNamespace(named=named)),
        remember=lambda _: None,
        delivery=cast("Any", None),
        probes=cast("Any", None),
        holders=lambda: (),
    )
    record = WorkerRecord(number=7, generation=1, pid=1, output_start=-1)

    pool.expect(record, {"process": 10, "notify": 11})

    assert pool.records() == (record,)
    assert named == {"sp.worker.7.process": 10, "sp.worker.7.notify": 11}
