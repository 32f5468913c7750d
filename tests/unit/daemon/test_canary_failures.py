"""What becomes of a canary's connections that its queue does not take."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any, cast

import pytest
from socketprotector_client import wire

from socketprotector.core.events import Event, Untaken
from socketprotector.daemon.delivery import UNTAKEN_S
from socketprotector.daemon.delivery.queue import canary as module
from socketprotector.daemon.delivery.queue import queue_watch
from socketprotector.daemon.delivery.queue.canary import CANARY_NEVER_TAKEN_S, CanaryQueue
from tests.unit.daemon.clock import Clock
from tests.unit.daemon.kept import Kept

#: By a listener that both generations know, by one that only the canary knows, and a probe.
SHARED = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, 0, 0, 1)
ALONE = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, 1, 0, 1)
PROBE = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, 0, 0, 0)
FD = 5


class Queue:
    """A channel in memory."""

    def __init__(self, *known: int) -> None:
        self.waiting: list[tuple[bytes, int]] = []
        self.room = True
        self.fails = False
        self.met = self.sent = 0
        self.taken_from = self.untaken_reported = False
        self.write = SimpleNamespace(sendmsg=self.sendmsg)
        self.generation = SimpleNamespace(record=SimpleNamespace(number=2))
        self._known = known

    def knows_of(self, index: int) -> bool:
        return index in self._known

    def depth(self) -> int:
        return len(self.waiting)

    def peek(self) -> bytes | None:
        return self.waiting[0][0] if self.waiting else None

    def has_room(self) -> bool:
        return self.room

    def send(self, header: bytes, fd: int) -> None:
        if self.fails:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        self.waiting.append((header, fd))

    def sendmsg(self, buffers: list[bytes], rights: object, flags: int) -> None:
        self.send(buffers[0], FD)


class World:
    """A canary with half of the connections, and an outlet in memory."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.posted: list[Event] = []
        self.kept = Kept()
        self.route, self.channel = Queue(0), Queue(0, 1)
        self.closed: list[int] = []
        self.outlet = SimpleNamespace(
            route=self.route,
            is_free=True,
            undelivered=self.kept,
            queue_watch=SimpleNamespace(add_uncounted=lambda: None),
            shortage=SimpleNamespace(lasts=False, take_back=self._take_back),
            lost=0,
            let_go=self.closed.append,
            send=lambda route, header, fd: route.send(header, fd),
        )
        loop = self.clock.use_in(patch, queue_watch).loop
        self.canary = CanaryQueue(
            loop, self.posted.append, cast("Any", self.outlet), self._resume, count=0
        )
        self.canary.lead_to(cast("Any", self.channel), 5000)

    def _resume(self) -> None:
        self.canary.send_kept()

    @staticmethod
    def _take_back(channel: Queue) -> tuple[bytes, int] | None:
        return channel.waiting.pop(0) if channel.waiting else None

    def come(self, index: int, count: int = 1) -> None:
        send = self.canary.sender(index)
        assert send is not None
        for _ in range(count):
            send([SHARED], [], 0)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_a_connection_that_it_cannot_take_goes_to_the_route_and_is_counted(world: World) -> None:
    world.channel.fails = True
    world.come(0, 4)
    assert world.route.depth() == 4
    assert world.canary.accepted == 0
    world.channel.fails = False
    world.come(0, 4)

    assert (world.route.depth(), world.channel.depth()) == (6, 2)
    assert world.canary.count == 8


def test_a_listener_that_it_does_not_know_is_not_its_own(world: World) -> None:
    assert world.canary.sender(2) is None
    assert not world.canary.only_canary_knows(0)
    assert not world.canary.only_canary_knows(2)
    assert world.canary.only_canary_knows(1)


@pytest.mark.parametrize("why", ["no room", "not written", "the send fails"])
def test_a_kept_connection_is_sent_once_that_is_possible(world: World, why: str) -> None:
    world.kept.waiting += [(ALONE, 7)]
    world.channel.room = why != "no room"
    world.kept.writable = why != "not written"
    world.channel.fails = why == "the send fails"
    world.canary.send_kept()
    assert world.canary.sender(1) is None
    assert world.canary.sender(0) is not None
    world.clock.pass_time(1)
    assert world.kept.waiting == [(ALONE, 7)]

    world.channel.room = world.kept.writable = True
    world.channel.fails = False
    world.clock.pass_time(module._AGAIN_S)

    assert world.channel.waiting == [(ALONE, 7)]
    assert (world.kept.waiting, world.closed) == ([], [7])
    assert world.canary.sender(1) is not None


def test_a_connection_of_the_route_is_none_of_those_that_it_sends(world: World) -> None:
    world.kept.waiting += [(SHARED, 7)]
    world.canary.send_kept()

    assert world.kept.waiting == [(SHARED, 7)]


def test_no_connection_is_sent_again_by_a_canary_that_was_called_off(world: World) -> None:
    world.canary.keep(ALONE, 7)
    world.canary.lead_to(None, 0)

    assert not world.clock.waits
    assert world.canary.sender(0) is None
    assert world.kept.waiting == [(ALONE, 7)]


def test_connections_that_stay_are_sent_again_in_their_order(world: World) -> None:
    world.channel.waiting += [(SHARED, 7), (ALONE, 8), (SHARED, -1), (PROBE, -1), (PROBE, 9)]
    world.canary.watch.send_again(cast("Any", world.channel))

    assert world.channel.waiting == [(SHARED, 7), (ALONE, 8), (PROBE, 9)]
    assert world.outlet.lost == 1


def test_a_connection_that_cannot_be_sent_again_is_not_lost(world: World) -> None:
    world.channel.waiting += [(SHARED, 7), (ALONE, 8), (PROBE, 9)]
    world.channel.fails = True
    world.canary.watch.send_again(cast("Any", world.channel))

    assert world.route.waiting == [(SHARED, 7)]
    assert world.kept.waiting == [(ALONE, 8)]
    assert world.closed == [9]


def test_while_the_route_is_full_such_a_connection_waits_behind_others(world: World) -> None:
    world.kept.waiting += [(SHARED, 6)]
    world.channel.waiting += [(SHARED, 7)]
    world.channel.fails = True
    world.outlet.is_free = False
    world.canary.watch.send_again(cast("Any", world.channel))

    assert world.route.waiting == []
    assert world.kept.waiting == [(SHARED, 6), (SHARED, 7)]


def test_during_a_shortage_nothing_is_taken_out_of_its_queue(world: World) -> None:
    world.channel.waiting += [(SHARED, 7)]
    world.outlet.shortage.lasts = True
    world.canary.watch.send_again(cast("Any", world.channel))

    assert world.channel.waiting == [(SHARED, 7)]
    assert not world.closed


@pytest.mark.parametrize("taken_from", [True, False])
def test_workers_that_take_nothing_fail_it_and_busy_workers_later(
    world: World, taken_from: bool
) -> None:
    limit_s = UNTAKEN_S if taken_from else CANARY_NEVER_TAKEN_S
    world.channel.taken_from = taken_from
    world.come(0, 2)
    world.clock.pass_time(limit_s - 0.1)
    assert not world.posted
    world.clock.pass_time(2 * module._LAST_LOOK_S)

    since = f"for {limit_s:.0f} s" if taken_from else "yet"
    reason = f"no worker has accepted a connection {since}; clients waiting: 1"
    assert world.posted == [Untaken(2, reason)]
    world.clock.pass_time(10 * limit_s)
    assert len(world.posted) == 1
