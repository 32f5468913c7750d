"""What a worker's messages change, when they are removed, and when silence replaces a worker."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest
from socketprotector_client import wire

from socketprotector.core.events import Deadline, ReplaceRequested, TimeExtended, TimerKind
from socketprotector.daemon import worker_messages as module
from socketprotector.daemon.worker_messages import WorkerMessages

from .clock import Clock

FD, WATCHDOG_S = 40, 30.0


class Notify:
    """A notify socket in memory; fails: the next look at a message has this error."""

    def __init__(self, calls: list[str]) -> None:
        self.queued: list[dict[str, str]] = []
        self.fails = 0
        self._calls = calls

    def fileno(self) -> int:
        return FD

    def peek(self, pid: int) -> Mapping[str, str] | None:
        assert pid == 7
        if self.fails:
            raise OSError(self.fails, os.strerror(self.fails))
        return self.queued[0] if self.queued else None

    def remove(self) -> None:
        self._calls.append("take")
        del self.queued[0]


class World:
    """Worker 1 and its messages."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.calls: list[str] = []
        self.notify = Notify(self.calls)
        self.by_message = True
        self.ready: list[tuple[str, bool]] = []
        self.programs: list[str] = []
        self.cannot_note = False
        self.worker: Any = SimpleNamespace(
            record=SimpleNamespace(generation=3, watched=False, status=""),
            generation=SimpleNamespace(program=SimpleNamespace(watchdog_s=WATCHDOG_S)),
            process=SimpleNamespace(pid=7),
            notify=self.notify,
            readiness=SimpleNamespace(by_message=True),
            became_ready=True,
        )
        first: Any = SimpleNamespace(handle=lambda _, text: self.programs.append(text))
        with pytest.MonkeyPatch.context() as patch:
            runtime = self.clock.use_in(patch)
        self.messages = WorkerMessages(
            *(runtime, cast("Any", {1: self.worker}), first, self._note, self._ready),
            lambda: cast("Any", SimpleNamespace(child_failed=self._child_failed)),
        )

    def _child_failed(self, worker: Any, text: str) -> None:
        self.calls.append(f"child {text}")

    def _note(self, worker: Any, **changes: object) -> None:
        if self.cannot_note:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        self.calls.append("note")
        vars(worker.record).update(changes)

    def _ready(self, number: int, by: str, *, retires: bool) -> None:
        assert (number, by) == (1, "notify")
        self.calls.append("ready")
        self.ready.append((by, retires))

    def say(self, **fields: str) -> None:
        self.notify.queued.append(fields)
        self.messages.read(1)


@pytest.fixture
def world() -> World:
    made = World()
    made.messages.watch(1, made.worker)
    return made


def test_ready_counts_only_where_messages_make_a_worker_ready(world: World) -> None:
    world.say(READY="1")
    world.say(READY="1", **dict([wire.RETIRES_ON_RETURN.split("=")]))
    world.say(READY="0")
    world.say(READY="1", **{wire.RETIRES_ON_RETURN.split("=")[0]: "0"})
    world.worker.readiness.by_message = False
    world.say(READY="1")

    assert world.ready == [("notify", False), ("notify", True), ("notify", False)]


def test_a_message_is_removed_only_after_it_was_handled(world: World) -> None:
    world.notify.queued += [{"READY": "1"}, {"STATUS": "warming up"}]
    world.messages.read(1)

    assert world.calls == ["ready", "take", "note", "take"]
    assert world.notify.queued == []


def test_a_message_that_could_not_be_handled_is_read_again(world: World) -> None:
    world.cannot_note = True
    world.say(STATUS="warming up")
    assert (world.notify.queued, world.clock.watched) == ([{"STATUS": "warming up"}], {})
    assert world.clock.lines == ["cannot-read-messages"]

    world.cannot_note = False
    world.clock.cannot_watch = True
    world.clock.pass_time(0.15)
    assert world.clock.waits
    world.clock.cannot_watch = False
    world.clock.pass_time(0.15)
    world.clock.watched[FD]()

    assert world.worker.record.status == "warming up"
    assert world.notify.queued == []


def test_a_worker_that_sends_without_end_is_left_after_a_while(world: World) -> None:
    world.notify.queued = [{"STATUS": "more"}] * (module._READ_AT_ONCE + 5)
    world.messages.read(1)

    assert len(world.notify.queued) == 5
    assert FD in world.clock.watched  # so that the loop calls again


@pytest.mark.parametrize(
    ("deadline", "is_read"),
    [
        (Deadline(TimerKind.START, 3), True),
        (Deadline(TimerKind.START, 1), False),
        (Deadline(TimerKind.WORKER_START, 1), True),
        (Deadline(TimerKind.WORKER_START, 3), False),
        (Deadline(TimerKind.DRAIN, 3), False),
    ],
)
def test_ready_counts_even_if_it_waits_behind_more_messages_than_a_turn_reads(
    world: World, deadline: Deadline, is_read: bool
) -> None:
    world.notify.queued = [{"STATUS": "more"}] * (module._READ_IN_A_TURN + 1) + [{"READY": "1"}]
    world.clock.watched[FD]()
    assert world.ready == []

    world.messages.catch_up(deadline)

    assert world.ready == [("notify", False)] * is_read


@pytest.mark.parametrize("failed", [False, True])
def test_a_worker_that_sends_without_end_is_left_soon_in_a_turn_of_the_loop(
    world: World, failed: bool
) -> None:
    """Each message may take a millisecond, and an operator's request takes several turns."""
    if failed:  # then the protector watches the socket again
        world.notify.fails = errno.ENOMEM
        world.messages.read(1)
        world.notify.fails = 0
        world.clock.pass_time(0.15)
    world.notify.queued = [{"STATUS": "more"}] * 1000
    world.clock.watched[FD]()

    assert 800 < len(world.notify.queued) < 1000


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2500000", 2.5), ("9" * 15, 999999999.999999), ("9" * 16, None), ("-1", None), ("²", None)],
)
def test_a_worker_may_ask_for_a_plain_number_of_microseconds(
    world: World, text: str, seconds: float | None
) -> None:
    world.say(EXTEND_TIMEOUT_USEC=text)

    assert world.clock.posted == ([TimeExtended(1, seconds)] if seconds is not None else [])


def test_a_long_status_is_cut_off(world: World) -> None:
    world.say(STATUS="x" * 600)

    assert world.worker.record.status == "x" * 500


def test_a_pools_report_about_its_first_program_is_passed_on(world: World) -> None:
    world.say(**{wire.PROGRAM: "failed 12 256"})

    assert world.programs == ["failed 12 256"]


STUCK = ReplaceRequested(1, "no WATCHDOG=1 for 30s", hung=True)


def test_a_report_about_a_forked_child_is_passed_on(world: World) -> None:
    world.say(**{wire.CHILD: "0 8 9 -"})

    assert "child 0 8 9 -" in world.calls


def test_a_worker_that_stops_its_watchdog_messages_is_replaced_as_stuck(world: World) -> None:
    world.say(WATCHDOG="1")
    world.clock.pass_time(20)
    world.say(WATCHDOG="1")
    world.clock.pass_time(29)
    assert world.clock.posted == []
    world.clock.pass_time(2)

    assert world.clock.posted == [STUCK]
    assert world.clock.lines == ["worker-stuck"]


def test_a_watchdog_message_that_we_were_too_busy_to_read_counts(world: World) -> None:
    world.say(WATCHDOG="1")
    world.notify.queued.append({"WATCHDOG": "1"})
    world.clock.pass_time(45)
    assert world.clock.posted == []

    world.clock.pass_time(20)
    assert world.clock.posted == [STUCK]


def test_a_worker_that_stood_still_with_us_has_its_time_once_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a frozen container: the worker is not stuck, and its clients are waiting."""
    world.clock.use_in(monkeypatch, module)
    world.say(WATCHDOG="1")
    world.clock.now += 1000
    world.clock.pass_time(29)
    assert world.clock.posted == []

    world.clock.now += 1000
    world.clock.pass_time(0)
    assert world.clock.posted == [STUCK]


@pytest.mark.parametrize("why", ["never sent one", "not ready", "no option"])
def test_a_worker_without_a_watchdog_may_be_silent(world: World, why: str) -> None:
    world.worker.became_ready = why != "not ready"
    world.worker.generation.program.watchdog_s = 0.0 if why == "no option" else WATCHDOG_S
    world.say(**({"STATUS": "idle"} if why == "never sent one" else {"WATCHDOG": "1"}))
    world.messages.await_watchdog(1, world.worker)
    world.clock.pass_time(1000)

    assert world.clock.posted == []


def test_a_worker_that_has_ended_is_neither_read_nor_awaited(world: World) -> None:
    world.say(WATCHDOG="1")
    world.notify.fails = errno.ENOMEM
    world.messages.read(1)
    world.messages.unwatch(1, world.worker)

    assert not world.clock.waits
    assert world.clock.watched == {}
