"""What blocks the sending of connections, and which connection goes first afterwards."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from socketprotector_client import wire

from socketprotector.daemon.delivery.queue import outlet as module
from socketprotector.daemon.delivery.queue.outlet import Outlet
from tests.unit.daemon.kept import Kept

CLIENT = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, 0, 0, 1)
PROBE = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, 0, 0, 0)
OTHER = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, 1, 0, 1)


class Queue:
    """A channel in memory; fails: the next send has this error."""

    def __init__(self, *known: int) -> None:
        self.sent: list[int] = []
        self.fails = 0
        self.room = False
        self._known = known
        self.write = SimpleNamespace(fileno=lambda: 40)

    def knows_of(self, index: int) -> bool:
        return index in self._known

    def has_room(self) -> bool:
        return self.room

    def send(self, _: bytes, fd: int) -> None:
        if self.fails:
            raise OSError(self.fails, os.strerror(self.fails))
        self.sent.append(fd)


class World:
    """An outlet, and what it did to the parts around it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.closed: list[int] = []
        self.calls: list[str] = []
        self.watched: dict[int, Callable[[], None]] = {}
        self.shortages: list[str] = []
        self.cannot_watch = False
        self.kept = Kept()
        patch.setattr(module, "os", SimpleNamespace(close=self.closed.append))
        self.shortage = SimpleNamespace(
            lasts=False, begin=self._short, pause=self._pause, open_reserve=bool
        )
        self.outlet = Outlet(
            cast("Any", SimpleNamespace(watch=self._watch, unwatch=self.watched.pop)),
            cast("Any", self.kept),
            cast("Any", SimpleNamespace(follow=lambda _: None, add_uncounted=lambda: None)),
            cast("Any", self.shortage),
            lambda: self.calls.append("stop"),
            lambda: self.calls.append("resume"),
            lambda: self.calls.append("broken"),
        )

    def _watch(self, fd: int, callback: Callable[[], None], _: int) -> None:
        if self.cannot_watch:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        self.watched[fd] = callback

    def _short(self, call: str, _: OSError) -> None:
        self.shortage.lasts = True
        self.shortages.append(call)

    def _pause(self) -> None:
        self.shortage.lasts = True
        self.calls.append("pause")

    def lead_to(self, *known: int) -> Queue:
        made = Queue(*known)
        self.outlet.lead_to(cast("Any", made))
        return made

    def send(self, queue: Queue, header: bytes, fd: int) -> None:
        self.outlet.send(cast("Any", queue), header, fd)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_our_copy_of_a_sent_connection_is_closed(world: World) -> None:
    queue = world.lead_to(0)
    world.send(queue, CLIENT, 5)

    assert (queue.sent, world.closed, world.kept.waiting) == ([5], [5], [])
    assert world.outlet.is_free


def test_a_full_queue_keeps_the_connection_until_there_is_room(world: World) -> None:
    queue = world.lead_to(0)
    queue.fails = errno.EAGAIN
    world.send(queue, CLIENT, 5)
    assert world.calls == ["stop"]
    assert not world.outlet.is_free
    queue.fails = 0
    world.outlet.send_kept()
    assert queue.sent == []  # the queue is still watched for room

    world.watched[40]()
    world.outlet.send_kept()

    assert world.calls == ["stop", "resume"]
    assert (queue.sent, world.closed, world.watched) == ([5], [5], {})
    assert world.outlet.is_free


def test_a_look_resumes_only_when_the_full_queue_has_room(world: World) -> None:
    queue = world.lead_to(0)
    world.outlet.resume_if_room()
    queue.fails = errno.EAGAIN
    world.send(queue, CLIENT, 5)
    world.outlet.resume_if_room()
    assert world.calls == ["stop"]

    queue.room = True
    world.outlet.resume_if_room()

    assert world.calls == ["stop", "resume"]


def test_another_route_is_not_blocked_by_the_full_queue_of_the_one_before(world: World) -> None:
    before = world.lead_to(0)
    before.fails = errno.EAGAIN
    world.send(before, CLIENT, 5)

    after = world.lead_to(0)
    world.outlet.send_kept()

    assert (before.sent, after.sent, world.watched) == ([], [5], {})


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOMEM])
def test_a_probe_whose_send_failed_is_closed_and_not_kept(world: World, code: int) -> None:
    queue = world.lead_to(0)
    queue.fails = code
    world.send(queue, PROBE, 5)

    assert (world.closed, world.kept.waiting) == ([5], [])
    assert not world.outlet.is_free


def test_a_broken_channel_loses_the_route_and_no_connection(world: World) -> None:
    queue = world.lead_to(0)
    queue.fails = errno.EPIPE
    world.send(queue, CLIENT, 5)

    assert world.calls == ["stop", "broken"]
    assert world.outlet.route is None
    assert (world.closed, world.kept.waiting) == ([], [(CLIENT, 5)])
    assert not world.outlet.is_free


@pytest.mark.parametrize("code", [errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS])
def test_a_shortage_keeps_the_connection(world: World, code: int) -> None:
    queue = world.lead_to(0)
    queue.fails = code
    world.send(queue, CLIENT, 5)

    assert (world.shortages, world.watched) == (["sendmsg"], {})
    assert world.kept.waiting == [(CLIENT, 5)]
    assert not world.outlet.is_free


def test_a_full_queue_that_cannot_be_watched_is_a_shortage(world: World) -> None:
    """Otherwise no event would ever resume it."""
    world.cannot_watch = True
    queue = world.lead_to(0)
    queue.fails = errno.EAGAIN
    world.send(queue, CLIENT, 5)

    assert world.shortages == ["epoll_ctl"]
    world.shortage.lasts = False
    queue.fails = 0
    world.outlet.send_kept()
    assert queue.sent == [5]


def test_a_connection_of_a_listener_that_the_route_does_not_know_stays_and_blocks_none(
    world: World,
) -> None:
    world.kept.waiting = [(OTHER, 6), (CLIENT, 5), (CLIENT, 7)]
    queue = world.lead_to(0)
    assert not world.outlet.is_free

    world.outlet.send_kept()

    assert (queue.sent, world.kept.waiting) == ([5, 7], [(OTHER, 6)])
    assert world.outlet.is_free


def test_a_kept_connection_is_not_sent_before_its_removal_is_in_the_state(world: World) -> None:
    world.kept.waiting = [(CLIENT, 5)]
    world.kept.writable = False
    queue = world.lead_to(0)

    world.outlet.send_kept()

    assert (queue.sent, world.calls, world.shortages) == ([], ["pause"], [])


def test_kept_connections_that_break_the_route_are_all_kept(world: World) -> None:
    world.kept.waiting = [(CLIENT, 5), (CLIENT, 7)]
    queue = world.lead_to(0)
    queue.fails = errno.EPIPE

    world.outlet.send_kept()

    assert world.kept.waiting == [(CLIENT, 5), (CLIENT, 7)]
    assert world.calls == ["stop", "broken"]
