"""A queue from which nothing is taken: a channel in memory, and no process."""

from __future__ import annotations

from typing import Any, cast

import pytest

from socketprotector.daemon.delivery import NEVER_TAKEN_S, UNTAKEN_S
from socketprotector.daemon.delivery.queue import queue_watch
from socketprotector.daemon.delivery.queue.queue_watch import FIRST_LOOK_S, QueueWatch
from tests.unit.daemon.clock import Clock


class Queue:
    """Stands for a channel: names of connections, the oldest first."""

    def __init__(self) -> None:
        self.waiting: list[bytes] = []
        self.taken_from = self.untaken_reported = self.is_scarce = False
        self.met = self.sent = 0

    def depth(self) -> int:
        return len(self.waiting)

    def peek(self) -> bytes | None:
        if self.is_scarce:
            raise OSError(12, "Cannot allocate memory")
        return self.waiting[0] if self.waiting else None


class World:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.queue = Queue()
        self.forwarded = self.repeated = 0
        self.said: list[tuple[float, int, bool]] = []
        loop = self.clock.use_in(patch, queue_watch).loop
        self.watch = QueueWatch(
            loop,
            accepted=lambda: self.forwarded,
            send_again=self._send_again,
            untaken=lambda *what: self.said.append(what),
        )
        self.watch.follow(cast("Any", self.queue))

    def _send_again(self, channel: object) -> None:
        assert channel is self.queue
        self.repeated += 1

    def send(self, name: bytes) -> None:
        self.queue.waiting.append(name)
        self.forwarded += 1
        if not self.watch.runs:
            self.watch.start()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_while_the_queue_is_empty_no_timer_runs(world: World) -> None:
    assert not world.clock.waits
    world.send(b"a")
    world.queue.waiting.clear()
    world.clock.pass_time(2 * FIRST_LOOK_S)
    assert not world.clock.waits
    assert not world.watch.runs


def test_a_queue_whose_head_stays_is_sent_again_ever_more_seldom(world: World) -> None:
    world.send(b"a")
    world.clock.pass_time(2.5 * FIRST_LOOK_S)
    assert world.repeated == 1
    world.clock.pass_time(10)
    early = world.repeated
    world.clock.pass_time(10)
    assert 0 < world.repeated - early < early + 1


def test_a_queue_whose_head_moves_is_left_alone(world: World) -> None:
    for name in (b"a", b"b", b"c", b"d"):
        world.send(name)
        world.clock.pass_time(FIRST_LOOK_S)
        world.queue.waiting.pop(0)
    assert not world.repeated
    assert world.queue.taken_from


@pytest.mark.parametrize("taken_from", [True, False])
def test_it_is_said_once_that_nothing_is_taken(world: World, taken_from: bool) -> None:
    """Of workers that have taken some later: they may be busy."""
    limit_s = UNTAKEN_S if taken_from else NEVER_TAKEN_S
    world.queue.taken_from = taken_from
    world.send(b"a")
    world.clock.pass_time(limit_s - 0.1)
    assert not world.said
    world.clock.pass_time(limit_s)
    [(seconds, depth, had_taken)] = world.said
    assert seconds >= limit_s
    assert (depth, had_taken) == (1, taken_from)


def test_a_canary_that_the_report_ends_is_not_sent_again(world: World) -> None:
    """Its queue was drained meanwhile: what is left there is its workers'."""
    ended_at: list[int] = []

    def end(*_: object) -> None:
        ended_at.append(world.repeated)
        world.watch.follow(None)

    world.watch.untaken = end
    world.send(b"a")
    world.clock.pass_time(10)
    assert [world.repeated] == ended_at
    assert not world.clock.waits
    assert not world.watch.runs
    world.queue = Queue()
    world.watch.follow(cast("Any", world.queue))
    world.send(b"b")
    world.clock.pass_time(10)
    assert len(ended_at) == 2


def test_another_route_begins_without_the_past_of_the_last(world: World) -> None:
    world.send(b"a")
    world.clock.pass_time(10)
    world.queue = Queue()
    world.watch.follow(cast("Any", world.queue))
    world.repeated = 0
    world.clock.pass_time(10)
    assert not world.repeated
    assert not world.clock.waits


def test_without_memory_it_looks_again(world: World) -> None:
    world.queue.is_scarce = True
    world.send(b"a")
    world.clock.pass_time(1)
    assert not world.repeated
    world.queue.is_scarce = False
    world.clock.pass_time(1)
    assert world.repeated


def test_it_is_stuck_until_the_first_client_is_taken(world: World) -> None:
    """As at the end of a stage, however short: it is put off while this holds."""
    channel = cast("Any", world.queue)
    assert not world.watch.is_stuck(channel)
    world.send(b"a")
    world.send(b"b")
    assert world.watch.is_stuck(channel), "no look has seen it yet"
    world.clock.pass_time(1.5 * FIRST_LOOK_S)
    assert world.watch.is_stuck(channel)
    assert not world.watch.is_stuck(cast("Any", Queue()))
    world.queue.is_scarce = True
    assert world.watch.is_stuck(channel), "unknown"
    world.queue.is_scarce = False

    world.queue.waiting.pop(0)
    assert not world.watch.is_stuck(channel), "busy workers have more clients than they can take"
    world.queue.waiting.pop(0)
    assert not world.watch.is_stuck(channel)
