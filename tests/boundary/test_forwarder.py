"""The path of a connection when things fail: nothing is lost, nothing leaks, nothing spins.

Listener, channel and loop are fakes of ours that fail where a test says; descriptors are real.
"""

from __future__ import annotations

import errno
import os
import resource
import struct
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
from socketprotector_client import wire

from socketprotector.core.events import BacklogEmptied, Event
from socketprotector.daemon.delivery import LAST_S, NEVER_TAKEN_S, QUIET_S, UNTAKEN_S
from socketprotector.daemon.delivery.queue.acceptor import BURST, STEADY
from socketprotector.daemon.delivery.queue.forwarder import Forwarder
from socketprotector.daemon.delivery.queue.queue_watch import (
    FIRST_LOOK_S,
    LAST_LOOK_S,
)
from socketprotector.daemon.delivery.queue.shortage import FIRST_WAIT_S, LAST_WAIT_S
from socketprotector.daemon.runtime import Runtime
from socketprotector.model.settings import ListenerSettings
from socketprotector.system.channel import BROKEN, rights_of
from socketprotector.system.listener import TRANSIENT_ERRNOS, Listener
from socketprotector.system.loop import Loop
from tests.generation_channel import generation_channel
from tests.together import together

FD = struct.Struct("i")
SCARCE = [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS]
#: What no manual page names for the call: it must not end the protector either.
UNFORESEEN = [errno.EACCES, errno.EIO, errno.EBADF]


def name(code: int) -> str:
    return errno.errorcode[code]


class Faults:
    """Says which calls fail: the n-th from now with an errno; others go through."""

    def __init__(self) -> None:
        self.coming: dict[int, int] = {}
        self.calls = 0

    def fail(self, code: int, *, after: int = 0, times: int = 1) -> None:
        self.coming |= {self.calls + after + n: code for n in range(times)}

    def call(self) -> None:
        code = self.coming.pop(self.calls, 0)
        self.calls += 1
        if code:
            raise OSError(code, os.strerror(code))


class FakeListener:
    """Clients wait in `backlog` by number; accept gives a memfd of that name."""

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self.socket = self
        self.sockets = (self,)
        self.backlog: deque[int] = deque()
        self.accepts = Faults()
        self.always_readable = False
        self.closed = False
        self.settings = ListenerSettings("tcp:127.0.0.1:80")
        self.refuses = True
        self.lost = self.hangs_up = False
        self.alive = True
        self.number = 10_000 + index

    def is_alive(self) -> bool:
        return self.alive

    def fileno(self) -> int:
        return self.number

    def _accept(self) -> tuple[int, None]:
        self.accepts.call()
        if not self.backlog:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return os.memfd_create(str(self.backlog.popleft())), None

    def has_waiting(self) -> bool:
        return bool(self.backlog)

    def refuse_new(self) -> bool:
        self.always_readable = True  # as a UNIX socket that was shut down
        return self.refuses

    def close(self) -> None:
        self.closed = True


class FakeChannel:
    """A queue with room for `room` connections; each held by a duplicate, as the kernel does."""

    numbers = iter(range(20_000, 100_000))

    def __init__(self, room: int = 1000) -> None:
        self.write = self
        self.known: frozenset[int] | None = None
        self.taken_from = False
        self.untaken_reported = False
        self.met = self.sent = 0
        self.number = next(self.numbers)
        self.room = room
        self.queue: deque[tuple[bytes, int]] = deque()
        self.sends = Faults()
        self.takes = Faults()
        self.ended = False
        self.closed = False
        self.shut = False

    def fileno(self) -> int:
        return self.number

    def sendmsg(self, buffers: list[bytes], rights: list[tuple[int, int, bytes]], _: int) -> None:
        self.sends.call()
        assert not self.ended, "sent into a channel that has ended"
        if self.shut:
            raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))
        if len(self.queue) >= self.room:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        (fd,) = FD.unpack(rights[0][2])
        self.queue.append((buffers[0], os.dup(fd)))

    def send(self, header: bytes, fd: int) -> None:
        self.sendmsg([header], [rights_of(fd)], 0)

    def depth(self) -> int:
        return len(self.queue)

    def is_shut(self) -> bool:
        return self.shut and not self.ended

    def peek(self) -> bytes | None:
        return self.queue[0][0] if self.queue else None

    def take_back(self) -> tuple[bytes, int] | None:
        self.takes.call()
        return self.queue.popleft() if self.queue else None

    def end(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.ended = self.closed = True
        while self.queue:
            os.close(self.queue.popleft()[1])

    def taken(self) -> list[int]:
        """Take all as workers do, and return their numbers."""
        numbers = []
        while self.queue:
            _, fd = self.queue.popleft()
            numbers.append(int(os.readlink(f"/proc/self/fd/{fd}").split(":")[1].split(" ")[0]))
            os.close(fd)
        return numbers

    def knows_of(self, index: int) -> bool:
        return self.known is None or index in self.known


class FakeLoop:
    """Calls back when a test says so."""

    def __init__(self) -> None:
        self.watched: dict[int, Callable[[], None]] = {}
        self.timers: dict[Hashable, tuple[float, Callable[[], None]]] = {}
        self.looks: list[tuple[float, Callable[[], None]]] = []  # at the queue, after sending
        self.watches = Faults()
        self.soon_ns = 0
        self.soon = False

    def watch(self, fd: int, callback: Callable[[], None], _: int = 0) -> None:
        self.watches.call()
        assert fd not in self.watched, "watched twice: the kernel says EEXIST"
        self.watched[fd] = callback

    def unwatch(self, fd: int) -> None:
        self.watched.pop(fd, None)

    def call_after(self, key: Hashable, seconds: float, callback: Callable[[], None]) -> None:
        if key == "forwarder-look":
            self.looks = [(seconds, callback)]
        elif key != "forwarder-save":
            self.timers[key] = (seconds, callback)

    def cancel(self, key: Hashable) -> None:
        self.timers.pop(key, None)

    def due(self, key: Hashable) -> None:
        assert key == "forwarder-save"

    def wake(self, what: FakeListener | FakeChannel) -> None:
        if callback := self.watched.get(what.fileno()):
            callback()

    def look(self) -> float:
        """Have it look at the queue; return how long that was to wait, 0 if it would not look."""
        if not self.looks:
            return 0.0
        ((seconds, callback),) = self.looks
        self.looks = []
        callback()
        return seconds

    def pass_time(self) -> list[float]:
        """Run what is due by now, whenever that is; return how long it was to wait."""
        due = list(self.timers.values())
        self.timers.clear()
        for _, callback in due:
            callback()
        return [seconds for seconds, _ in due]


class World:
    """A forwarder among fakes, and what it has told."""

    def __init__(self, listeners: int = 1) -> None:
        self.loop = FakeLoop()
        self.listeners = [FakeListener(index) for index in range(listeners)]
        self.broken = 0
        self.emptied = 0
        self.troubles: list[tuple[str, str]] = []
        self.channels: list[FakeChannel] = []
        self.dead: list[int] = []  # listeners that were shut down
        self.untaken: list[float] = []
        self.loses = True
        self.mending: OSError | None = None  # how that fails
        self.on_broken: Callable[[], None] = lambda: None
        self.forwarder = Forwarder(
            Runtime(cast("Loop", self.loop), cast("Any", self), self._post, lambda: True),
            [cast("Listener", each) for each in self.listeners],
            broken=self._broken,
            repair=self._repair,
            untaken=lambda seconds, waiting, ever: self.untaken.append(seconds),
        )

    def write(self, level: str, event: str, **fields: Any) -> None:
        """As a log."""
        if event != "clients-lost":
            assert (level, event) == ("error", "resources-exhausted")
            self.troubles.append((fields["call"], fields["error"]))

    def _broken(self) -> None:
        self.broken += 1
        self.on_broken()

    def _repair(self, listener: Listener) -> None:
        if self.mending is not None:
            raise self.mending
        self.dead.append(listener.index)
        listener.lost = self.loses

    def _post(self, event: Event) -> None:
        assert event == BacklogEmptied()
        self.emptied += 1

    def channel(self, room: int = 1000) -> Any:
        self.channels.append(FakeChannel(room))
        return self.channels[-1]

    def turn(self, times: int = 50) -> None:
        """Let the loop go round while clients wait, as a level-triggered epoll does."""
        for _ in range(times):
            for listener in self.listeners:
                if listener.backlog:
                    self.loop.wake(listener)

    @property
    def accepting(self) -> bool:
        return any(listener.fileno() in self.loop.watched for listener in self.listeners)


@contextmanager
def a_world() -> Iterator[World]:
    made = World()
    try:
        yield made
    finally:
        made.forwarder.close()
        for channel in made.channels:
            channel.close()
    assert made.loop.timers == {}


@pytest.fixture
def world() -> Iterator[World]:
    with a_world() as made:
        yield made


# -- accept ---------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(TRANSIENT_ERRNOS), ids=name)
def test_an_accept_that_finds_nothing_waits_for_the_next_client(world: World, code: int) -> None:
    channel = world.channel()
    world.forwarder.route_to(channel)
    world.listeners[0].accepts.fail(code)

    world.loop.wake(world.listeners[0])

    assert (world.accepting, world.loop.timers, world.troubles) == (True, {}, [])
    world.listeners[0].backlog.append(1)
    world.turn()
    assert channel.taken() == [1]


@pytest.mark.parametrize("code", [*SCARCE, *UNFORESEEN], ids=name)
def test_an_accept_that_fails_is_tried_again_by_a_timer(world: World, code: int) -> None:
    channel = world.channel()
    world.forwarder.route_to(channel)
    world.listeners[0].backlog.append(1)
    world.listeners[0].accepts.fail(code, times=8)

    world.turn()

    waits = []
    while world.loop.timers:
        assert not world.accepting  # it would stay readable
        waits += world.loop.pass_time()
        world.turn(1)
    assert waits == [min(FIRST_WAIT_S * 2**n, LAST_WAIT_S) for n in range(8)]
    assert world.troubles == [("accept", os.strerror(code))]  # reported once
    assert channel.taken() == [1]


def come_one_by_one(world: World, count: int) -> list[bool]:
    """So many clients, each after the one before was served; whether the next was expected."""
    expected = []
    for _ in range(count):
        world.listeners[0].backlog.append(1)
        world.loop.soon = False
        world.loop.wake(world.listeners[0])
        expected.append(world.loop.soon)
    return expected


def test_after_some_that_came_one_by_one_the_next_is_expected(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "socketprotector.daemon.delivery.queue.acceptor.BUSY_NS", 0
    )  # each of them came alone
    world.loop.soon_ns = 10**15  # and soon
    world.forwarder._acceptor.last_ns = time.monotonic_ns()
    world.forwarder.route_to(world.channel())

    assert come_one_by_one(world, STEADY + 3) == [False] * (STEADY - 1) + [True] * 4

    world.forwarder._acceptor.last_ns = 0  # the last one came long ago
    world.loop.soon_ns = 1
    assert come_one_by_one(world, STEADY + 3) == [False] * (STEADY + 3)


def test_it_is_idle_since_the_last_client_unless_one_waits(world: World) -> None:
    world.forwarder._acceptor.last_ns = 0
    world.forwarder.route_to(world.channel(room=1))
    assert world.forwarder.idle_s > 0

    before_s = time.monotonic()
    assert come_one_by_one(world, 1) == [False]
    assert 0 < world.forwarder.idle_s <= time.monotonic() - before_s

    come_one_by_one(world, 2)  # there is no room: one is in hand, and one waits
    assert world.forwarder.idle_s == 0


def test_where_several_come_at_once_there_is_no_busy_polling(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socketprotector.daemon.delivery.queue.acceptor.BUSY_NS", 10**18)
    world.loop.soon_ns = 10**19
    world.forwarder.route_to(world.channel())

    assert come_one_by_one(world, STEADY + 3) == [False] * (STEADY + 3)


def wake_ups_and_accepts(world: World, waiting: int) -> tuple[int, int]:
    """Have so many wait at once; return what it took until none waits."""
    listener = world.listeners[0]
    listener.backlog.extend(range(waiting))
    before, wake_ups = listener.accepts.calls, 0
    while listener.backlog:
        world.loop.wake(listener)
        wake_ups += 1
    return wake_ups, listener.accepts.calls - before


def test_as_many_as_wait_are_taken_in_one_go(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that others keep busy many wait at each wake-up, which itself costs most."""
    monkeypatch.setattr("socketprotector.daemon.delivery.queue.acceptor.BUSY_NS", 10**18)
    world.forwarder.route_to(world.channel())

    wake_ups_and_accepts(world, 3)  # close together

    assert wake_ups_and_accepts(world, BURST - 1) == (1, BURST)  # the last one finds none
    assert wake_ups_and_accepts(world, 64) == (2, 64)
    assert world.forwarder.forwarded == 3 + BURST - 1 + 64


def test_each_connection_is_counted_once_also_where_it_has_to_wait(world: World) -> None:
    small, other = world.channel(room=2), world.channel()
    world.listeners[0].backlog.extend([1, 2, 3])
    world.forwarder.route_to(small)

    world.turn()

    assert world.forwarder.undelivered.waiting, "there was room for all"
    assert world.forwarder.forwarded == 3
    assert small.taken() == [1, 2]
    world.loop.wake(small)
    world.forwarder.route_to(other)
    world.forwarder.drain(small)
    assert other.taken() == [3]
    assert world.forwarder.forwarded == 3


def test_a_single_client_costs_one_wake_up_and_one_accept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.forwarder.route_to(world.channel())
    monkeypatch.setattr("socketprotector.daemon.delivery.queue.acceptor.BUSY_NS", 10**18)
    wake_ups_and_accepts(world, 2 * BURST)

    monkeypatch.setattr("socketprotector.daemon.delivery.queue.acceptor.BUSY_NS", 0)

    wake_ups_and_accepts(world, 1)  # for the last time it is seen whether there is another one
    assert [wake_ups_and_accepts(world, 1) for _ in range(3)] == [(1, 1)] * 3


# -- send -----------------------------------------------------------------------------


@pytest.mark.parametrize("code", [*SCARCE, *UNFORESEEN], ids=name)
def test_a_send_that_fails_is_tried_again_by_a_timer(world: World, code: int) -> None:
    channel = world.channel()
    world.forwarder.route_to(channel)
    world.listeners[0].backlog.extend([1, 2])
    channel.sends.fail(code, times=3)

    world.turn()

    waits = []
    while world.loop.timers:
        assert not world.accepting
        assert channel.taken() == []
        waits += world.loop.pass_time()
    world.turn()
    assert waits == [FIRST_WAIT_S, 2 * FIRST_WAIT_S, 4 * FIRST_WAIT_S]
    assert world.troubles == [("sendmsg", os.strerror(code))]
    assert channel.taken() == [1, 2]


@pytest.mark.parametrize("code", sorted(BROKEN), ids=name)
def test_a_broken_channel_is_reported_once_and_the_undelivered_one_goes_first_to_the_next(
    world: World, code: int
) -> None:
    first, second = world.channel(), world.channel()
    world.forwarder.route_to(first)
    world.listeners[0].backlog.extend([1, 2, 3])
    first.sends.fail(code, after=1)

    world.turn()

    assert (world.broken, world.accepting, list(world.listeners[0].backlog)) == (1, False, [3])
    world.forwarder.route_to(second)
    world.turn()
    assert second.taken() == [2, 3]
    assert first.taken() == [1]


def test_a_new_route_from_within_the_news_that_the_old_one_is_broken(world: World) -> None:
    first, second = world.channel(), world.channel()
    world.forwarder.route_to(first)
    first.shut = True

    def replace() -> None:
        world.forwarder.route_to(None)
        world.forwarder.drain(first)
        world.forwarder.route_to(second)

    world.on_broken = replace
    world.listeners[0].backlog.extend([1, 2])

    world.turn()

    assert second.taken() == [1, 2]


def test_a_full_channel_stops_accepting_until_there_is_room(world: World) -> None:
    channel = world.channel(room=2)
    world.forwarder.route_to(channel)
    world.listeners[0].backlog.extend(range(6))

    world.turn()

    assert (world.accepting, list(world.listeners[0].backlog)) == (False, [3, 4, 5])
    assert world.loop.timers == {}
    assert list(world.loop.watched) == [channel.fileno()]
    assert channel.taken() == [0, 1]
    world.loop.wake(channel)
    world.turn()
    assert channel.taken() == [2, 3]
    world.loop.wake(channel)
    world.turn()
    assert channel.taken() == [4, 5]


def test_the_undelivered_one_goes_first_to_the_next_route(world: World) -> None:
    full, new = world.channel(room=1), world.channel()
    world.forwarder.route_to(full)
    world.listeners[0].backlog.extend([0, 1, 2])
    world.turn()

    world.forwarder.route_to(new)
    world.forwarder.drain(full)
    world.turn()

    assert new.taken() == [1, 0, 2]
    assert full.ended
    assert full.fileno() not in world.loop.watched


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM], ids=name)
@pytest.mark.parametrize("nth", range(3))
def test_a_watch_that_fails_is_tried_again_by_a_timer(world: World, code: int, nth: int) -> None:
    channel = world.channel(room=1)
    world.loop.watches.fail(code, after=nth)
    world.forwarder.route_to(channel)
    world.listeners[0].backlog.extend([0, 1, 2])

    seen: list[int] = []
    for _ in range(20):
        world.turn()
        seen += channel.taken()
        world.loop.wake(channel)
        world.loop.pass_time()

    assert seen == [0, 1, 2]


# -- the n-th call fails ----------------------------------------------------------------


@together("code", [*SCARCE, *UNFORESEEN, errno.EAGAIN])
@together("call", ["accept", "sendmsg", "recvmsg"])
@together("nth", range(8))
def test_whatever_call_fails_nothing_is_lost_and_nothing_leaks(
    code: int, call: str, nth: int
) -> None:
    """Five to a first channel, a reload, five more: all must come out, in either queue."""
    with a_world() as world:
        old, new = world.channel(), world.channel()
        faults = {
            "accept": [world.listeners[0].accepts],
            "sendmsg": [old.sends, new.sends],
            "recvmsg": [old.takes],
        }[call]
        for each in faults:
            each.fail(code, after=nth)
        world.forwarder.route_to(old)
        world.listeners[0].backlog.extend(range(5))
        world.turn()

        world.forwarder.route_to(new)
        world.forwarder.drain(old)
        world.listeners[0].backlog.extend(range(5, 10))
        for _ in range(10):
            world.turn()
            world.loop.wake(old)
            world.loop.wake(new)
            world.loop.pass_time()

        assert sorted(old.taken() + new.taken()) == list(range(10))
        assert world.forwarder.lost == 0
        assert world.accepting


# -- taking back ------------------------------------------------------------------------


def test_connections_no_worker_has_taken_go_to_the_new_route_oldest_first(world: World) -> None:
    old, new = world.channel(), world.channel()
    world.forwarder.route_to(old)
    world.listeners[0].backlog.extend(range(5))
    world.turn()
    world.listeners[0].backlog.extend([5, 6])

    world.forwarder.route_to(new)
    world.forwarder.drain(old)
    world.turn()

    assert (new.taken(), old.ended) == ([0, 1, 2, 3, 4, 5, 6], True)


def ask_in(channel: FakeChannel) -> int:
    """Send a question of ours there; return our end of it."""
    ours, theirs = os.pipe()
    channel.send(wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, 0, 0, 0), theirs)
    os.close(theirs)
    return ours


def test_a_question_that_no_worker_has_taken_goes_to_no_other_generation(world: World) -> None:
    old, new = world.channel(), world.channel()
    world.forwarder.route_to(old)
    world.listeners[0].backlog.extend([0])
    world.turn()
    ours = ask_in(old)
    world.listeners[0].backlog.extend([1])
    world.turn()

    world.forwarder.route_to(new)
    world.forwarder.drain(old)

    assert new.taken() == [0, 1]
    assert os.read(ours, 1) == b""  # it was closed
    assert world.forwarder.lost == 0
    os.close(ours)


@pytest.mark.parametrize("code", [*SCARCE, *sorted(BROKEN), errno.EAGAIN], ids=name)
def test_a_question_that_cannot_be_sent_again_is_kept_for_no_other_generation(
    world: World, code: int
) -> None:
    asked, new = world.channel(), world.channel()
    world.forwarder.route_to(asked)
    world.listeners[0].backlog.extend([1])
    world.turn()
    os.close(asked.queue.popleft()[1])  # a worker has taken it
    ours = ask_in(asked)
    world.loop.look()
    asked.sends.fail(code)

    world.loop.look()
    assert world.forwarder.undelivered.waiting == ()
    world.forwarder.route_to(new)
    world.loop.pass_time()

    assert os.read(ours, 1) == b""  # it was closed
    assert (new.depth(), world.forwarder.lost) == (0, 0)
    os.close(ours)


def test_a_question_is_not_counted_as_lost(world: World) -> None:
    gone = world.channel()
    world.forwarder.route_to(gone)
    world.listeners[0].backlog.extend([1])
    world.turn()
    ours = ask_in(gone)
    world.forwarder.route_to(None)
    world.forwarder.release(gone)

    world.forwarder.close()

    assert os.read(ours, 1) == b""
    assert (world.forwarder.lost, gone.closed) == (1, True)
    os.close(ours)


def test_what_finds_no_room_in_the_new_channel_stays_with_the_old_workers(world: World) -> None:
    old, new = world.channel(), world.channel(room=2)
    world.forwarder.route_to(old)
    world.listeners[0].backlog.extend(range(5))
    world.turn()

    world.forwarder.route_to(new)
    world.forwarder.drain(old)

    assert (new.depth(), old.taken(), old.ended) == (2, [3, 4], True)  # and 2 is undelivered
    assert new.taken() == [0, 1]
    world.loop.wake(new)
    assert new.taken() == [2]


def test_a_channel_that_a_worker_shut_down_is_emptied_for_the_next_route(world: World) -> None:
    old, new = world.channel(), world.channel()
    world.forwarder.route_to(old)
    world.listeners[0].backlog.extend(range(3))
    world.turn()
    old.shut = True
    world.forwarder.route_to(None)
    world.forwarder.drain(old)

    world.forwarder.route_to(new)

    assert new.taken() == [0, 1, 2]
    assert not old.closed  # its workers live on
    world.forwarder.release(old)
    assert old.closed


def test_without_a_route_a_draining_channel_is_left_to_its_workers(world: World) -> None:
    old, new = world.channel(), world.channel()
    world.forwarder.route_to(old)
    world.listeners[0].backlog.extend(range(3))
    world.turn()

    world.forwarder.route_to(None)
    world.forwarder.drain(old)
    world.forwarder.route_to(new)

    assert (old.taken(), new.taken()) == ([0, 1, 2], [])


def test_what_a_generation_without_workers_left_waits_for_a_route(world: World) -> None:
    gone, new = world.channel(), world.channel(room=2)
    world.forwarder.route_to(gone)
    world.listeners[0].backlog.extend(range(5))
    world.turn()
    world.forwarder.route_to(None)

    world.forwarder.release(gone)
    assert not gone.closed
    world.forwarder.route_to(new)

    seen = []
    while new.depth():
        seen += new.taken()
        world.loop.wake(new)
    assert seen == [0, 1, 2, 3, 4]
    assert gone.closed


def test_nothing_is_kept_of_a_generation_that_has_left_nothing_however_long_there_is_no_route(
    world: World,
) -> None:
    """As of all that come and end in a crash loop."""
    gone = world.channel()
    world.forwarder.route_to(None)

    world.forwarder.release(gone)

    assert gone.closed


def test_the_end_counts_what_could_not_be_delivered(world: World) -> None:
    full, gone = world.channel(room=1), world.channel()
    world.forwarder.route_to(gone)
    world.listeners[0].backlog.extend([1, 2])
    world.turn()
    world.forwarder.route_to(None)
    world.forwarder.release(gone)
    world.listeners[0].backlog.extend([3])

    world.forwarder.close()

    assert (world.forwarder.lost, gone.closed, world.listeners[0].closed) == (3, True, True)
    assert world.loop.watched == {}
    assert full.depth() == 0


@pytest.mark.parametrize("code", SCARCE, ids=name)
def test_the_end_comes_though_what_is_left_cannot_be_looked_at(world: World, code: int) -> None:
    gone = world.channel()
    world.forwarder.route_to(gone)
    world.listeners[0].backlog.extend([1, 2, 3])
    world.turn()
    world.forwarder.route_to(None)
    world.forwarder.release(gone)
    gone.takes.fail(code, after=1)

    world.forwarder.close()

    assert (world.forwarder.lost, gone.closed, gone.depth()) == (3, True, 0)


def test_taking_back_works_with_the_reserve_alone() -> None:
    """Not one descriptor is free: the reserve makes room for the one in our hands."""
    world = World()
    old, new = generation_channel(), generation_channel()
    world.forwarder.route_to(old)
    world.listeners[0].backlog.extend(range(5))
    world.turn()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        world.forwarder.route_to(new)
        world.forwarder.drain(old)
        assert (old.depth(), new.depth()) == (0, 5)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert (world.forwarder.lost, world.troubles) == (0, [])
    world.forwarder.close()
    old.close()
    new.close()


# -- a graceful end -----------------------------------------------------------------------


def test_a_graceful_close_takes_what_has_connected_first(world: World) -> None:
    channel = world.channel()
    world.forwarder.route_to(channel)
    world.listeners[0].backlog.extend(range(3))

    world.forwarder.close_listeners(quick=False)

    looks = 0
    while not world.emptied:
        looks += 1
        world.turn()
        world.loop.pass_time()
    assert looks >= 1  # it has waited for those whose handshake was under way
    assert (channel.taken(), world.listeners[0].closed) == ([0, 1, 2], True)
    assert world.loop.watched == {}


def test_a_graceful_close_keeps_both_of_two_listeners_apart_in_a_full_channel() -> None:
    """The second must not overwrite the undelivered connection of the first."""
    world = World(listeners=3)
    channel = world.channel(room=1)
    for listener in world.listeners:
        listener.backlog.extend([listener.index * 10, listener.index * 10 + 1])
    world.forwarder.route_to(channel)

    world.forwarder.close_listeners(quick=False)

    seen = []
    for _ in range(30):
        seen += channel.taken()
        world.loop.wake(channel)
        world.turn()
        world.loop.pass_time()
    assert sorted(seen) == [0, 1, 10, 11, 20, 21]
    assert (world.emptied, world.forwarder.lost) == (1, 0)
    world.forwarder.close()


def test_a_listener_that_was_shut_down_is_not_waited_for_once_it_is_empty(world: World) -> None:
    """It says for ever that it is readable."""
    channel = world.channel()
    world.forwarder.route_to(channel)
    world.listeners[0].backlog.append(1)
    world.forwarder.close_listeners(quick=False)

    world.turn()
    world.loop.wake(world.listeners[0])
    world.loop.wake(world.listeners[0])

    assert not world.accepting
    assert channel.taken() == [1]


def test_a_graceful_close_is_over_at_once_where_the_listener_is_another_processs() -> None:
    """A process that goes on listening gets new clients, and there may be no end of them."""
    world = World()
    world.listeners[0].settings = ListenerSettings("tcp:127.0.0.1:80", foreign=True)
    channel = world.channel()
    world.forwarder.route_to(channel)
    world.turn()
    world.listeners[0].backlog.extend(range(100))

    world.forwarder.close_listeners(quick=False)

    assert (world.emptied, world.listeners[0].closed, world.loop.watched) == (1, True, {})
    assert channel.taken() == []
    world.forwarder.close()


def test_a_graceful_close_accepts_no_more_from_another_processs_listener_beside_ours() -> None:
    world = World(listeners=2)
    world.listeners[0].settings = ListenerSettings("tcp:127.0.0.1:80", foreign=True)
    channel = world.channel()
    world.forwarder.route_to(channel)
    world.listeners[1].backlog.append(7)

    world.forwarder.close_listeners(quick=False)
    while not world.emptied:
        world.listeners[0].backlog.append(1)
        world.turn()
        world.loop.pass_time()

    assert channel.taken() == [7]
    world.forwarder.close()


def test_a_graceful_close_has_an_end_where_new_clients_cannot_be_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    world.listeners[0].refuses = False
    channel = world.channel()
    world.forwarder.route_to(channel)
    world.forwarder.close_listeners(quick=False)
    while not world.emptied:
        now += QUIET_S
        world.listeners[0].backlog.append(1)
        world.turn()
        channel.taken()
        world.loop.pass_time()
        assert now < 1000 + 2 * LAST_S

    assert now > 1000 + LAST_S
    assert world.listeners[0].closed


def test_a_listener_that_was_shut_down_is_reported_and_not_asked_again(
    world: World,
) -> None:
    channel = world.channel()
    world.forwarder.route_to(channel)
    world.listeners[0].accepts.fail(errno.EINVAL)
    world.listeners[0].alive = False

    world.loop.wake(world.listeners[0])

    assert (world.dead, world.loop.watched, world.loop.timers) == ([0], {}, {})


def test_one_that_cannot_be_mended_for_want_of_descriptors_is_tried_again_by_a_timer(
    world: World,
) -> None:
    """It stays readable, so without one it would be asked again and again."""
    world.forwarder.route_to(world.channel())
    world.listeners[0].accepts.fail(errno.EINVAL)
    world.listeners[0].alive = False
    world.mending = OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    world.loop.wake(world.listeners[0])

    assert world.troubles == [("socket", os.strerror(errno.EMFILE))]
    assert (len(world.loop.watched), len(world.loop.timers)) == (0, 1)


def test_one_that_listens_is_not_taken_for_shut_down_because_of_an_error(world: World) -> None:
    channel = world.channel()
    world.forwarder.route_to(channel)
    world.listeners[0].backlog.append(1)
    world.listeners[0].accepts.fail(errno.EINVAL)

    world.loop.wake(world.listeners[0])
    world.loop.pass_time()
    world.turn()

    assert world.dead == []
    assert channel.taken() == [1]


@pytest.mark.parametrize("how", [errno.EINVAL, errno.EAGAIN], ids=name)
def test_one_that_listens_again_is_accepted_from_as_before(world: World, how: int) -> None:
    """A UNIX one finds no client and hangs up."""
    world.loses = False
    channel = world.channel()
    world.forwarder.route_to(channel)
    world.listeners[0].hangs_up = True
    world.listeners[0].alive = False
    world.listeners[0].accepts.fail(how)
    world.loop.wake(world.listeners[0])
    world.listeners[0].hangs_up = False
    world.listeners[0].alive = True
    world.listeners[0].backlog.append(1)
    world.turn()

    assert world.dead == [0]
    assert channel.taken() == [1]


def test_a_graceful_close_does_not_wait_for_one_that_was_shut_down(world: World) -> None:
    channel = world.channel()
    world.forwarder.route_to(channel)
    world.listeners[0].accepts.fail(errno.EINVAL, times=100)
    world.listeners[0].alive = False
    world.forwarder.close_listeners(quick=False)
    world.loop.wake(world.listeners[0])
    for _ in range(3):
        world.loop.pass_time()

    assert (world.emptied, world.dead) == (1, [])


def test_a_quick_close_waits_for_nothing(world: World) -> None:
    channel = world.channel()
    world.forwarder.route_to(channel)

    world.forwarder.close_listeners(quick=True)

    assert (world.listeners[0].closed, world.loop.watched, world.emptied) == (True, {}, 0)


def test_a_header_says_listener_and_time(world: World) -> None:
    from socketprotector_client import wire

    many = World(listeners=2)
    channel = many.channel()
    many.forwarder.route_to(channel)
    many.listeners[1].backlog.append(1)
    many.turn()

    version, kind, index, length, at = wire.HEADER.unpack(channel.queue[0][0])

    assert (version, kind, index, length) == (wire.VERSION, wire.KIND_CONNECTION, 1, 0)
    assert at > 0
    many.forwarder.close()
    channel.close()


# -- those that no worker takes ---------------------------------------------------


def waiting(world: World, *clients: int) -> Any:
    """A channel in which these wait."""
    channel = world.channel()
    world.forwarder.route_to(channel)
    world.listeners[0].backlog.extend(clients)
    world.turn()
    return channel


def test_an_empty_queue_is_looked_at_once_and_then_the_loop_sleeps(world: World) -> None:
    channel = waiting(world, 1, 2)
    assert channel.taken() == [1, 2]

    assert world.loop.look() == FIRST_LOOK_S

    assert (world.loop.look(), world.loop.timers) == (0, {})
    world.listeners[0].backlog.append(3)
    world.turn()
    assert world.loop.look() == FIRST_LOOK_S


def test_a_queue_that_moves_is_left_alone(world: World) -> None:
    channel = waiting(world, 1, 2, 3)
    for _ in range(2):
        assert world.loop.look() == FIRST_LOOK_S
        os.close(channel.take_back()[1])
    assert channel.takes.calls == 2


def test_a_queue_that_stands_still_is_sent_again_in_order_at_growing_intervals(
    world: World,
) -> None:
    channel = waiting(world, 1, 2, 3)
    world.loop.look()
    sent = channel.sends.calls

    waits = [world.loop.look() for _ in range(8)]

    assert channel.sends.calls == sent + 8 * 3
    assert waits == [min(FIRST_LOOK_S * 2**n, LAST_LOOK_S) for n in range(8)]
    assert channel.taken() == [1, 2, 3]
    world.loop.look()
    assert world.loop.look() == 0
    world.listeners[0].backlog.append(4)
    world.turn()
    assert world.loop.look() == FIRST_LOOK_S


def test_a_descriptor_is_to_spare_again_once_they_were_sent_again(world: World) -> None:
    """Others may use up all that is free until the next look, and those are to be sent then."""
    before = len(os.listdir("/proc/self/fd"))
    channel = waiting(world, 1, 2, 3)

    for _ in range(3):
        world.loop.look()

    assert len(os.listdir("/proc/self/fd")) == before + channel.depth()


def test_a_descriptor_is_to_spare_again_once_there_are_some(world: World) -> None:
    before = len(os.listdir("/proc/self/fd"))
    channel = waiting(world, 1)
    world.loop.look()
    channel.takes.fail(errno.EMFILE)
    world.loop.look()

    world.loop.pass_time()

    assert len(os.listdir("/proc/self/fd")) == before + channel.depth()


@pytest.mark.parametrize("call", ["sends", "takes"])
@pytest.mark.parametrize("code", [*SCARCE, *UNFORESEEN, errno.EAGAIN], ids=name)
def test_no_connection_is_lost_while_being_sent_again(world: World, call: str, code: int) -> None:
    channel = waiting(world, 1, 2, 3)
    world.loop.look()

    getattr(channel, call).fail(code, after=1)
    world.loop.look()

    for _ in range(3):
        world.loop.pass_time()
        world.loop.wake(channel)
    assert sorted(channel.taken()) == [1, 2, 3]
    assert world.forwarder.lost == 0
    assert not world.forwarder.undelivered.waiting


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Have so many seconds pass; eighths of one are exact."""
    now = [float(round(time.monotonic()))]
    monkeypatch.setattr(
        "socketprotector.daemon.delivery.queue.queue_watch.time.monotonic", lambda: now[0]
    )
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def looked(world: World, clock: Callable[[float], None], seconds: float) -> None:
    """Look at the queue once more, after so long."""
    clock(seconds)
    world.loop.look()


def test_where_no_connection_was_ever_taken_that_is_said_once_after_a_while(
    world: World, clock: Callable[[float], None]
) -> None:
    channel = waiting(world, 1, 2)
    looked(world, clock, 0.0)
    looked(world, clock, NEVER_TAKEN_S - 0.125)
    assert world.untaken == []
    assert world.forwarder.queue_watch.untaken_s(channel) is None

    looked(world, clock, 0.125)

    assert len(world.untaken) == 1
    assert world.untaken[0] == pytest.approx(NEVER_TAKEN_S)
    looked(world, clock, 1000.0)
    assert len(world.untaken) == 1
    assert world.forwarder.queue_watch.untaken_s(channel) == pytest.approx(1000 + NEVER_TAKEN_S)
    assert channel.taken() == [1, 2]
    looked(world, clock, 1.0)
    assert world.forwarder.queue_watch.untaken_s(channel) is None


@pytest.mark.parametrize("rest", [0, 1])
def test_where_a_connection_was_taken_before_it_takes_longer_to_be_said(
    world: World, clock: Callable[[float], None], rest: int
) -> None:
    channel = waiting(world, *range(1 + rest))
    looked(world, clock, 0.0)
    os.close(channel.take_back()[1])
    looked(world, clock, 0.0)  # sees it
    world.listeners[0].backlog.append(7)
    world.turn()
    looked(world, clock, 0.0)

    looked(world, clock, UNTAKEN_S - 0.125)
    assert world.untaken == []
    looked(world, clock, 0.125)
    assert len(world.untaken) == 1


def test_one_that_has_taken_is_not_said_to_have_taken_none_though_no_look_was_in_between(
    world: World, clock: Callable[[float], None]
) -> None:
    """Two came at once, and the one worker is busy with the first for long."""
    channel = waiting(world, 1, 2)
    os.close(channel.take_back()[1])

    looked(world, clock, 0.0)
    looked(world, clock, UNTAKEN_S - 0.125)
    assert world.untaken == []
    looked(world, clock, 0.125)

    assert len(world.untaken) == 1
    assert channel.taken_from


def test_connections_given_to_it_by_the_generation_before_do_not_count_as_taken_by_it(
    world: World, clock: Callable[[float], None]
) -> None:
    old, new = waiting(world, 1, 2), world.channel()
    world.forwarder.route_to(new)
    world.forwarder.drain(old)

    for _ in range(3):
        looked(world, clock, 0.0)

    assert new.depth() == 2
    assert not new.taken_from
    os.close(new.take_back()[1])
    looked(world, clock, 0.0)
    assert new.taken_from


def test_the_next_generation_is_given_time_of_its_own(
    world: World, clock: Callable[[float], None]
) -> None:
    old, new = waiting(world, 1), world.channel()
    looked(world, clock, 0.0)
    looked(world, clock, NEVER_TAKEN_S)
    world.forwarder.route_to(new)
    world.forwarder.drain(old)

    looked(world, clock, 0.0)
    looked(world, clock, NEVER_TAKEN_S - 0.125)
    assert len(world.untaken) == 1
    looked(world, clock, 0.125)
    assert len(world.untaken) == 2


def test_what_an_earlier_program_left_in_the_queue_is_looked_at(world: World) -> None:
    channel = waiting(world, 1)
    world.loop.looks.clear()
    fresh = World()
    fresh.forwarder.route_to(channel)

    assert fresh.loop.look() == FIRST_LOOK_S
    fresh.forwarder.close()
