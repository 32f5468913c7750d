"""What a worker's start, messages, signals and exit change in the pool, without any process."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.core.actions import WorkerSignal
from socketprotector.core.events import Answered, Event, WorkerExited, WorkerReady
from socketprotector.daemon import worker_pool as module
from socketprotector.daemon.worker_pool import WorkerPool
from socketprotector.model.lazy_dataclass import replace
from socketprotector.model.policy import Policy
from socketprotector.model.records import WorkerRecord
from socketprotector.model.settings import Limits, Settings
from socketprotector.system.process import End

from .clock import Clock

SETTINGS = Settings("name", ("sh",), "/")


class Worker:
    """A worker process in memory; its pid is its number plus 100."""

    def __init__(self, world: World, number: int, generation: Any) -> None:
        self.record = WorkerRecord(number, generation.record.number, 100 + number, 0)
        self.generation = generation
        self.signals: list[int] = []
        self.may_signal = True
        self.has_exited = False
        self.ready_calls: list[Callable[[str], None]] = []
        self.calls: list[str] = []
        self.process: Any = SimpleNamespace(
            pid=100 + number,
            pidfd=200 + number,
            signal=self._signal,
            kill_group=lambda: self._signal(-signal.SIGKILL),
            has_ended=lambda: self.has_exited,
            discard=lambda: self.calls.append("discard"),
        )
        self.notify: Any = SimpleNamespace(fileno=lambda: 300 + number, peek=lambda _: None)
        self.line: Any = None
        self.readiness: Any = SimpleNamespace(
            watch=self._watch,
            note_ready=lambda: self.calls.append("known"),
            start_timer=lambda: self.calls.append("wait"),
            stop_check=lambda: self.calls.append("stop check"),
            check=lambda: self.calls.append("check"),
            is_checked=False,
            by_ack=True,
            by_message=True,
            last="",
        )
        self.registered: dict[str, int] = {}
        self.end_from_guard: End | None = None
        self.awaits_end = False
        self._world = world

    def _watch(self, ready: Callable[[str], None], *_: object, **__: object) -> None:
        if self._world.is_short:
            raise OSError(12, "Cannot allocate memory")
        self.ready_calls.append(ready)

    def _signal(self, number: int) -> None:
        if not self.may_signal:
            raise PermissionError(1, "Operation not permitted")
        self.signals.append(number)

    @property
    def became_ready(self) -> bool:
        return self.record.ready_at is not None

    def descriptors(self) -> dict[str, int]:
        return {f"worker.{self.record.number}.process": self.process.pidfd}

    def close(self) -> None:
        self.calls.append("close")

    def uses_the_library(self) -> None:
        self.line = SimpleNamespace(shutdown=lambda how: self.calls.append(f"shut {how}"))
        self.record = replace(self.record, retires=True)


class World:
    """A pool of workers in memory, and its calls of the parts around it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.started: dict[int, Worker] = {}
        self.cannot_start: Exception | None = None
        self.is_short = False  # of memory, once a worker's messages are watched
        self.end: End | None = End(False, "exit status 1")
        self.group_signals: list[tuple[int, int]] = []
        self.retired_groups: list[int] = []
        self.drained_groups: list[int] = []
        self.group_records: list[WorkerRecord] = []
        self.released: list[int] = []
        self.output = SimpleNamespace(named={}, close_oldest=lambda *_: None)
        groups = SimpleNamespace(
            signal=lambda number, sign: self.group_signals.append((number, sign)),
            retire=self.retired_groups.append,
            drain=self.drained_groups.append,
            records=lambda: tuple(self.group_records),
            look=lambda: None,
            numbers=frozenset(),
            pids=lambda: (),
        )
        patch.setattr(module, "Groups", lambda *_: groups)
        self.orders_to_lost: list[tuple[object, ...]] = []
        self.leftovers = SimpleNamespace(
            retire=lambda number: self.orders_to_lost.append((number,)),
            order=lambda *order: self.orders_to_lost.append(order),
            drain=lambda generation: self.orders_to_lost.append(("drain", generation)),
        )
        patch.setattr(module, "Leftovers", lambda *_, **__: self.leftovers)
        spawner = SimpleNamespace(
            start=self._start, settings=SETTINGS, addresses=lambda number: (f"@{number}",)
        )
        patch.setattr(module, "WorkerSpawner", lambda *_: spawner)
        ends = SimpleNamespace(end_of=lambda *_, **__: self.end, close=self._close)
        patch.setattr(module, "post_mortem", SimpleNamespace(PostMortem=lambda *_, **__: ends))
        watch = SimpleNamespace(why_killed=lambda: "")
        patch.setattr(module, "out_of_memory", SimpleNamespace(MemoryWatch=lambda *_: watch))
        self.limits: list[Settings] = []
        limits = SimpleNamespace(apply_settings=self.limits.append, warnings=("raise it",))

        def limit_watch(settings: Settings, *_: object) -> object:
            self.limits.append(settings)
            return limits

        patch.setattr(module, "worker_recycling", SimpleNamespace(LimitWatch=limit_watch))
        self.pool = WorkerPool(
            SETTINGS,
            self.clock.use_in(patch, module),
            cast("Any", self.output),
            remember=lambda _: None,
            delivery=cast("Any", None),
            probes=cast("Any", SimpleNamespace(release=self.released.append)),
            holders=lambda: (),
        )

    def _start(self, number: int, _slot: int, generation: Any) -> Worker:
        if self.cannot_start is not None:
            raise self.cannot_start
        self.started[number] = Worker(self, number, generation)
        return self.started[number]

    def _close(self, worker: Worker, end: End, *, proved_ready: bool) -> Event:
        return WorkerExited(worker.record.number, f"{end.how} {proved_ready}")

    def generation(self, number: int = 1, **program: object) -> Any:
        given = {"finish_signal": 0, "ready": "notify", "watchdog_s": 0.0, "ready_check": ""}
        given["is_probed"] = False
        return SimpleNamespace(
            record=SimpleNamespace(number=number, serving_since=0.0),
            program=SimpleNamespace(**{**given, **program}),
        )

    def spawn(self, number: int, generation: Any = None) -> Worker:
        self.pool.spawn(number, 0, generation or self.generation())
        return self.started[number]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_a_worker_that_cannot_start_is_reported_as_its_exit(world: World) -> None:
    world.cannot_start = OSError(8, "Exec format error")
    world.pool.spawn(1, 0, world.generation())

    assert world.clock.posted == [WorkerExited(1, "cannot start: Exec format error")]
    assert world.pool.records() == ()


@pytest.mark.parametrize("at", ["its end", "its readiness"])
def test_a_worker_that_cannot_be_watched_is_ended_and_reported(world: World, at: str) -> None:
    world.clock.cannot_watch = at == "its end"
    world.is_short = at == "its readiness"
    worker = world.spawn(1)

    assert worker.calls == ["discard", "close"]
    assert world.clock.posted == [
        WorkerExited(1, "cannot watch the worker: Cannot allocate memory")
    ]
    assert (world.pool.records(), world.clock.watched) == ((), {})


def test_a_started_worker_is_in_the_state_with_its_descriptors(world: World) -> None:
    worker = world.spawn(1)

    assert world.pool.records() == (worker.record,)
    assert world.pool.descriptors == {"worker.1.process": 201}
    assert world.clock.watched.keys() == {201, 301}
    assert world.clock.lines == ["spawned"]


def test_after_its_exit_a_worker_is_in_the_state_no_longer(world: World) -> None:
    world.spawn(1)
    world.clock.watched[201]()

    assert world.clock.posted == [WorkerExited(1, "exit status 1 False")]
    assert (world.pool.records(), world.pool.descriptors, world.clock.watched) == ((), {}, {})


def test_a_worker_whose_end_is_not_known_yet_stays(world: World) -> None:
    worker = world.spawn(1)
    world.end = None
    world.clock.watched[201]()

    assert world.clock.posted == []
    assert world.pool.records() == (worker.record,)


def test_ready_is_noted_once(world: World) -> None:
    worker = world.spawn(1)
    worker.ready_calls[0]("fd")
    worker.ready_calls[0]("fd")

    assert world.clock.posted == [WorkerReady(1, False, False)]
    assert (worker.record.ready_by, worker.record.ready_at) == ("fd", world.clock.now)
    assert world.pool.records() == (worker.record,)
    assert worker.calls == ["known"]
    assert world.released == []  # it has no probe address
    assert world.pool.proved_ready


def test_a_generation_has_a_ready_worker_until_the_last_one_exits(world: World) -> None:
    world.spawn(1)
    world.spawn(2, world.generation(2))
    assert not world.pool.has_ready(1)

    world.started[1].ready_calls[0]("notify")
    assert (world.pool.has_ready(1), world.pool.has_ready(2)) == (True, False)
    world.clock.watched[201]()
    assert not world.pool.has_ready(1)


def test_a_timer_is_no_sign_of_life(world: World) -> None:
    world.spawn(1).ready_calls[0]("timer")

    assert world.clock.posted == [WorkerReady(1, False, False)]
    assert not world.pool.proved_ready


def test_a_worker_that_has_exited_does_not_become_ready(world: World) -> None:
    worker = world.spawn(1)
    worker.has_exited = True
    worker.ready_calls[0]("fd")

    assert world.clock.posted == []
    assert (worker.record.ready_by, worker.record.ready_at) == ("fd", None)


def test_workers_that_accept_finish_by_a_signal(world: World) -> None:
    world.spawn(1, world.generation(finish_signal=15)).ready_calls[0]("timer")

    assert world.clock.posted == [WorkerReady(1, True, False)]


def test_an_ack_counts_for_the_worker_with_that_pid(world: World) -> None:
    world.spawn(1)
    second = world.spawn(2)
    second.readiness.by_ack = False
    for pid in (101, 102, 103):
        world.pool.acked(pid)

    assert world.clock.posted == [WorkerReady(1, False, False)]


def test_an_answer_makes_all_workers_of_a_generation_ready_if_none_has_exited(
    world: World,
) -> None:
    workers = [world.spawn(1), world.spawn(2)]
    other = world.spawn(3, world.generation(2))
    workers[1].has_exited = True
    world.pool.answered(1, "accept")
    assert world.clock.posted == []

    workers[1].has_exited = False
    world.pool.answered(1, "accept")

    assert world.clock.posted == [Answered(1, False)]
    assert [each.became_ready for each in (*workers, other)] == [True, True, False]


def test_an_answer_is_too_early_while_a_worker_on_the_library_still_starts(world: World) -> None:
    """One of several workers that accept has answered.  Its answer says nothing of the others."""
    world.pool.apply_settings(replace(SETTINGS, policy=Policy(workers_accept=True)))
    world.spawn(1)
    world.spawn(2)
    world.pool._on_ready(1, "notify", retires=True)
    assert not world.pool.answered(1, "accept")

    world.pool._on_ready(2, "notify", retires=True)
    assert world.pool.answered(1, "accept")
    ready = [WorkerReady(1, True, True), WorkerReady(2, True, True)]
    assert world.clock.posted == [*ready, Answered(1, True)]


def test_a_generation_that_cannot_be_probed_waits_for_a_timer(world: World) -> None:
    ready, starting = world.spawn(1), world.spawn(2)
    other = world.spawn(3, world.generation(2))
    ready.ready_calls[0]("fd")
    world.pool.allow_timer(1)

    assert [("wait" in each.calls) for each in (ready, starting, other)] == [False, True, False]


@pytest.mark.parametrize(
    ("kind", "sent", "changes"),
    [
        (WorkerSignal.TERM, signal.SIGTERM, {"asked_to_exit": True}),
        (WorkerSignal.KILL, -signal.SIGKILL, {"asked_to_exit": True, "killed": True}),
        (WorkerSignal.ABRT, signal.SIGABRT, {"aborted": True}),
    ],
)
def test_a_signal_is_sent_and_recorded(
    world: World, kind: WorkerSignal, sent: int, changes: dict[str, bool]
) -> None:
    worker = world.spawn(1)
    before = worker.record
    world.pool.signal(1, kind)

    assert worker.signals == [sent]
    assert worker.record == replace(before, **cast("Any", changes))
    assert world.pool.records() == (worker.record,)


def test_the_end_of_an_aborted_worker_stays_a_crash_when_it_is_killed(world: World) -> None:
    worker = world.spawn(1)
    world.pool.signal(1, WorkerSignal.ABRT)
    world.pool.signal(1, WorkerSignal.KILL)

    assert worker.record.killed
    assert not worker.record.asked_to_exit


def test_a_signal_that_we_may_not_send_is_logged_and_not_recorded(world: World) -> None:
    worker = world.spawn(1)
    worker.may_signal = False
    before = worker.record
    world.pool.signal(1, WorkerSignal.TERM)

    assert worker.record == before
    assert world.clock.lines[-1] == "cannot-signal"


def test_orders_for_a_worker_that_has_exited_go_to_its_process_group(world: World) -> None:
    """If a kill of the protector has lost it, they go to the processes with its address."""
    world.pool.signal(9, WorkerSignal.TERM)
    world.pool.signal(9, WorkerSignal.KILL)
    world.pool.retire(9)

    assert world.group_signals == [(9, signal.SIGTERM), (9, signal.SIGKILL)]
    assert world.orders_to_lost == [(9, signal.SIGTERM), (9, signal.SIGKILL), (9,)]
    assert world.retired_groups == [9]


def test_a_worker_of_the_library_finishes_at_the_end_of_its_line(world: World) -> None:
    worker = world.spawn(1, world.generation(finish_signal=15))
    worker.uses_the_library()
    world.pool.retire(1)

    assert (worker.calls, worker.signals) == ([f"shut {socket.SHUT_WR}"], [])
    assert worker.record.asked_to_exit


def test_another_worker_that_accepts_finishes_by_its_signal_once(world: World) -> None:
    worker = world.spawn(1, world.generation(finish_signal=int(signal.SIGQUIT)))
    queued = world.spawn(2)
    for _ in range(2):
        world.pool.drain(1)

    assert (worker.signals, queued.signals) == ([signal.SIGQUIT], [])
    assert world.orders_to_lost == [("drain", 1)] * 2
    assert worker.record.asked_to_exit
    assert not queued.record.asked_to_exit  # the end of its channel does that


def test_all_retire_only_if_every_worker_does_and_none_left_orphans(world: World) -> None:
    first, second = world.spawn(1), world.spawn(2)
    world.spawn(3, world.generation(2))
    assert not world.pool.all_retire(1)
    assert not world.pool.all_retire(7)  # it has no workers
    for each in (first, second):
        world.pool._note(cast("Any", each), retires=True)
    assert world.pool.all_retire(1)

    world.group_records = [replace(first.record, number=9)]

    assert not world.pool.all_retire(1)


def test_a_probe_address_is_released_when_no_worker_is_checked_any_more(world: World) -> None:
    generation = world.generation(ready="check")
    first, second = world.spawn(1, generation), world.spawn(2, generation)
    second.readiness.is_checked = True
    first.ready_calls[0]("check")
    assert world.released == []

    second.readiness.is_checked = False
    second.ready_calls[0]("check")

    assert world.released == [1]


def test_the_guard_tells_how_a_worker_ended(world: World) -> None:
    worker = world.spawn(1)
    world.pool.learn_status(101, False, "killed by SIGKILL")
    assert worker.end_from_guard == End(False, "killed by SIGKILL")
    assert world.clock.posted == []  # its pidfd will report the exit

    worker.awaits_end = True
    world.pool.learn_status(101, False, "killed by SIGKILL")
    world.pool.learn_status(999, True, "of a helper")

    assert world.clock.posted == [WorkerExited(1, "exit status 1 False")]


def test_the_words_of_workers_that_share_the_log_are_no_ones_own(world: World) -> None:
    first = world.spawn(1)
    assert first.record.output_start == 0
    second = world.spawn(2)

    assert [each.output_start for each in world.pool.records()] == [-1, -1]
    assert second.record.output_start == -1


def test_a_reload_changes_when_what_failed_workers_left_gets_kill(world: World) -> None:
    world.pool.apply_settings(replace(SETTINGS, policy=Policy(kill_timeout_s=9.0)))

    assert world.leftovers.kill_timeout_s == 9.0


def test_limits_are_watched_only_once_a_setting_asks_for_it(world: World) -> None:
    world.pool.apply_settings(replace(SETTINGS, watchdog_s=3.0))
    assert world.limits == []
    assert not world.pool.warnings
    limited = replace(SETTINGS, worker_limits=Limits(age_s=60.0))
    world.pool.apply_settings(limited)
    world.pool.apply_settings(SETTINGS)

    assert world.limits == [limited, SETTINGS]
    assert world.pool.warnings == ("raise it",)


def test_checks_stop_for_an_upgrade_and_start_again_after_a_failed_one(world: World) -> None:
    worker = world.spawn(1)
    calls: list[str] = []
    cast("Any", world.pool).leftovers = SimpleNamespace(
        stop_looking=lambda: calls.append("stop"), schedule=lambda: calls.append("schedule")
    )
    cast("Any", world.pool)._probes.release_all = lambda: calls.append("release")
    world.pool.suspend()
    world.pool.resume()

    assert worker.calls == ["stop check", "check"]
    assert calls == ["release", "stop", "schedule"]
