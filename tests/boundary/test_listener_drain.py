"""Listeners that come and go while generations know different ones: real sockets, no processes."""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
from socketprotector_client import wire

from socketprotector.daemon.delivery import QUIET_S
from socketprotector.daemon.delivery.queue.forwarder import Forwarder
from socketprotector.daemon.delivery.queue.generation_channel import GenerationChannel
from socketprotector.daemon.runtime import Runtime
from socketprotector.model.settings import ListenerSettings
from socketprotector.system.inherited import Inherited
from socketprotector.system.listener import Listener
from socketprotector.system.listeners import listener_of
from socketprotector.system.loop import Loop
from tests.boundary.conftest import Turns
from tests.generation_channel import generation_channel


class Scarce(socket.socket):
    """One that cannot send now and then: the system is short of something."""

    def __init__(self, fileno: int) -> None:
        super().__init__(fileno=fileno)
        self.failures = 0

    def sendmsg(self, *words: Any) -> int:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        return super().sendmsg(*words)


class World:
    """A forwarder with listeners 0 and 1, and two generations' channels."""

    def __init__(self, folder: Path, turns: Turns) -> None:
        self.loop = Loop()
        self._ticks = os.eventfd(1)  # always readable
        self.loop.watch(self._ticks, turns.tick)
        self.folder = folder
        self.listeners = [self.listener(0), self.listener(1)]
        self.persisted = 0
        self.holds = True  # what is said to have changed can be written down
        self.troubles: list[tuple[str, str]] = []
        self.said: list[tuple[str, int]] = []  # of clients that are lost
        self.forwarder = self.another(self.listeners)
        self.old, self.new = self.channel({0, 1}), self.channel({0})
        self.clients: list[socket.socket] = []

    def another(self, listeners: list[Listener]) -> Forwarder:
        return Forwarder(
            Runtime(self.loop, cast("Any", self), lambda event: None, self._persist),
            listeners,
            broken=lambda: None,
            repair=lambda listener: None,
        )

    def write(self, level: str, event: str, **fields: Any) -> None:
        """As a log."""
        if event == "clients-lost":
            assert level == "warning"
            self.said.append((fields["address"].rpartition("/")[2], fields["lost"]))
        else:
            assert (level, event) == ("error", "resources-exhausted")
            self.troubles.append((fields["call"], fields["error"]))

    def _persist(self) -> bool:
        self.persisted += 1
        return self.holds

    def listener(self, index: int, *, foreign: bool = False) -> Listener:
        sock = socket.socket(socket.AF_UNIX)
        path = str(self.folder / f"s{index}")
        sock.bind(path)
        sock.listen(50)
        sock.setblocking(False)
        found = os.lstat(path)
        ours = (0, 0) if foreign else (found.st_dev, found.st_ino)
        settings = ListenerSettings(f"unix:{path}", *ours, foreign=foreign)
        return listener_of(sock.detach(), index, settings)

    def channel(self, knows: set[int], queue: int = 64) -> GenerationChannel:
        made = generation_channel(queue, frozenset(knows))
        made.write = Scarce(made.write.detach())
        return made

    def connect(self, index: int, times: int = 1) -> None:
        for _ in range(times):
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(self.folder / f"s{index}"))
            self.clients.append(client)

    def say(self) -> None:
        """Have each client say its number, in the order in which they came."""
        for number, client in enumerate(self.clients):
            client.sendall(bytes([number]))

    def turn(self, seconds: float = 0.1) -> None:
        """Let the loop go round for so long: a thousand turns a second."""

        def enough() -> None:
            self.loop.running = False

        self.loop.running = True
        self.loop.call_after("enough", seconds, enough)
        self.loop.run()

    def close(self) -> None:
        self.forwarder.close()
        for each in (self.old, self.new):
            each.close()
        for client in self.clients:
            client.close()
        self.loop.close()
        os.close(self._ticks)


@pytest.fixture
def world(tmp_path: Path, turns: Turns) -> Iterator[World]:
    made = World(tmp_path, turns)
    yield made
    made.close()


def taken(channel: GenerationChannel) -> list[int]:
    """The listeners of what waits in a channel, oldest first."""
    found = []
    while (each := channel.take_back()) is not None:
        found.append(wire.HEADER.unpack(each[0])[2])
        os.close(each[1])
    return found


def heard(channel: GenerationChannel) -> list[int]:
    """What the clients queued in a channel have sent, oldest first."""
    found: list[int] = []
    while (each := channel.take_back()) is not None:
        with socket.socket(fileno=each[1]) as connection:
            found += connection.recv(1)
    return found


def short(channel: GenerationChannel, times: int = 1) -> None:
    """Have the system be short of something when something is sent there."""
    assert isinstance(channel.write, Scarce)
    channel.write.failures = times


def test_a_route_gets_nothing_by_a_listener_that_it_does_not_know(world: World) -> None:
    world.forwarder.route_to(world.new)
    world.connect(1)
    world.connect(0)

    world.turn()

    assert taken(world.new) == [0]
    world.forwarder.route_to(world.old)
    world.turn()
    assert taken(world.old) == [1]


def test_taking_back_leaves_what_the_route_does_not_know_in_its_order(world: World) -> None:
    world.forwarder.route_to(world.old)
    for index in (1, 0, 1, 0, 0):
        world.connect(index)
        world.turn()
    world.forwarder.route_to(world.new)

    world.forwarder.drain(world.old)

    assert taken(world.new) == [0, 0, 0]
    assert taken(world.old) == [1, 1]
    assert world.old.write.fileno() < 0
    assert world.forwarder.lost == 0


def test_what_the_workers_of_an_ended_channel_alone_know_is_left_to_them(world: World) -> None:
    world.forwarder.route_to(world.old)
    for index in (0, 1, 0):
        world.connect(index)
        world.turn()
    world.old.end()  # by the program before this one
    world.forwarder.route_to(world.new)

    world.forwarder.adopt_drained(world.old)
    world.forwarder.hold(False)

    assert (taken(world.new), taken(world.old)) == ([0], [1, 0])


def test_a_channel_that_was_drained_by_an_earlier_program_as_well_is_emptied_once(
    world: World,
) -> None:
    world.forwarder.route_to(world.old)
    world.connect(0)
    world.turn()
    world.forwarder.route_to(None)
    world.old.read.shutdown(socket.SHUT_RD)
    world.forwarder.adopt_drained(world.old)
    world.forwarder.drain(world.old)
    assert taken(world.old) == [0]  # by a worker that looks again

    world.forwarder.release(world.old)
    world.forwarder.route_to(world.new)
    world.turn()

    assert world.old.closed


def test_a_connection_that_no_generation_is_left_for_is_counted_as_lost(world: World) -> None:
    world.forwarder.route_to(world.old)
    for index in (0, 1, 0):
        world.connect(index)
        world.turn()
    world.forwarder.route_to(world.new)
    world.forwarder.remove(world.listeners[1], None)

    world.forwarder.release(world.old)

    assert (taken(world.new), world.forwarder.lost) == ([0, 0], 1)
    assert world.old.closed


def test_what_a_generation_that_is_gone_has_left_goes_to_another_that_knows_the_listener(
    world: World,
) -> None:
    """It could not be given to that one while it had the route: then that was full."""
    world.forwarder.route_to(world.old)
    for index in (0, 1, 0, 1):
        world.connect(index)
        world.turn()
    before = world.channel({0, 1})
    world.forwarder.route_to(world.new)

    world.forwarder.release(world.old)
    world.forwarder.remove(world.listeners[1], before)
    world.turn(4 * QUIET_S)

    assert (taken(world.new), taken(before), world.forwarder.lost) == ([0, 0], [1, 1], 0)
    before.close()


def test_clients_waiting_at_a_removed_listener_go_to_the_channel_that_is_ended_after_it(
    world: World,
) -> None:
    world.forwarder.route_to(world.new)
    world.connect(1, 3)
    world.turn()

    world.forwarder.remove(world.listeners[1], world.old)
    world.forwarder.drain(world.old)

    assert not (world.folder / "s1").exists()
    assert world.old.write.fileno() >= 0, "ended before the last one was sent"
    assert "sp.listener.1" in world.forwarder.descriptors()
    world.turn(3 * QUIET_S)
    assert taken(world.old) == [1, 1, 1]
    assert world.old.write.fileno() < 0
    assert "sp.listener.1" not in world.forwarder.descriptors()
    assert world.persisted
    assert world.forwarder.forwarded == 3


def test_a_full_channel_is_waited_for(world: World) -> None:
    small = world.channel({0, 1}, queue=6)
    room = small.capacity()
    world.connect(1, room + 4)
    world.forwarder.route_to(world.new)

    world.forwarder.remove(world.listeners[1], small)
    world.forwarder.drain(small)
    world.turn(3 * QUIET_S)

    assert taken(small) == [1] * room
    world.turn(4 * QUIET_S)
    assert taken(small) == [1] * 4
    assert small.write.fileno() < 0
    small.close()


def test_an_undelivered_one_for_the_old_generation_is_not_given_to_the_new_one(
    world: World,
) -> None:
    small = world.channel({0, 1}, queue=6)
    room = small.capacity()
    world.forwarder.route_to(small)
    world.connect(1, room + 1)
    world.turn()
    assert world.forwarder.undelivered.waiting

    world.forwarder.route_to(world.new)
    world.connect(0)
    world.turn()
    assert taken(world.new) == [0], "what waits for the old one holds up the new one"
    world.forwarder.remove(world.listeners[1], small)
    world.forwarder.drain(small)
    assert taken(small) == [1] * room
    world.turn(4 * QUIET_S)

    assert taken(small) == [1]
    assert world.forwarder.lost == 0
    small.close()


def test_an_undelivered_one_for_want_of_memory_goes_first_where_its_listener_is_removed(
    world: World,
) -> None:
    """As when a generation is rolled back that alone knew it."""
    world.forwarder.route_to(world.old)
    short(world.old)
    world.connect(1, 3)
    world.say()
    world.turn(0.002)
    assert world.forwarder.undelivered.waiting

    world.forwarder.remove(world.listeners[1], world.old)
    world.turn(4 * QUIET_S)

    assert (heard(world.old), world.forwarder.lost) == ([0, 1, 2], 0)
    assert world.forwarder.forwarded == 3


def test_a_client_parked_for_a_generation_without_the_route_outlives_the_program(
    world: World,
) -> None:
    small = world.channel({0, 1}, queue=6)
    world.forwarder.route_to(small)
    world.connect(1, small.capacity() + 1)
    world.turn()
    world.forwarder.route_to(world.new)

    ((number, header),) = world.forwarder.undelivered.waiting
    found = world.forwarder.descriptors()
    hand, first = (os.dup(found[name]) for name in (f"sp.hand.{number}", "sp.listener.1"))
    listener = listener_of(first, 1, world.listeners[1].settings)
    taken(small)
    persisted = world.persisted
    after = world.another([listener])
    left = Inherited({f"sp.hand.{number}": hand})
    after.undelivered.adopt(number, [(number, header)], left)
    after.remove(listener, small)
    world.turn(4 * QUIET_S)

    assert taken(small) == [1]
    assert (after.undelivered.waiting, after.lost) == ((), 0)
    assert world.persisted > persisted, "sent before that was written down: once more after a kill"
    after.close()
    small.close()


def left(world: World, before: GenerationChannel, clients: int) -> None:
    """Have a generation leave so many clients of listener 1, which only the old one knows."""
    world.forwarder.route_to(world.old)
    world.connect(1, clients)
    world.turn()
    world.say()
    world.forwarder.route_to(world.new)
    world.forwarder.release(world.old)
    assert len(world.forwarder.undelivered.waiting) == clients
    world.forwarder.remove(world.listeners[1], before)


@pytest.mark.parametrize("trouble", ["send", "write down"])
def test_clients_parked_for_another_generation_get_to_it_in_their_order(
    world: World, trouble: str
) -> None:
    """Also where one could not be sent, or that it would be could not be written down."""
    before = world.channel({0, 1})
    left(world, before, 3)
    short(before, int(trouble == "send"))
    world.holds = trouble == "send"

    world.turn(QUIET_S / 2)
    assert len(world.forwarder.undelivered.waiting) == 3, "some were sent"
    world.holds = True
    world.turn(4 * QUIET_S)

    assert (heard(before), world.forwarder.lost) == ([0, 1, 2], 0)
    before.close()


def test_one_that_cannot_be_put_back_for_want_of_memory_is_sent_later_and_that_is_reported(
    world: World,
) -> None:
    world.forwarder.route_to(world.old)
    for index in (1, 0, 1, 0):
        world.connect(index)
        world.turn()
    world.forwarder.route_to(world.new)
    world.forwarder.remove(world.listeners[1], world.old)

    short(world.old)
    world.forwarder.drain(world.old)
    world.turn(4 * QUIET_S)

    # What was not reached is left to the workers that have it, as where there is no room.
    assert taken(world.new) + taken(world.old) == [0, 1, 0, 1]
    assert world.troubles == [("sendmsg", os.strerror(errno.ENOBUFS))]
    assert world.forwarder.lost == 0


def test_a_draining_listener_waits_for_no_generation_that_is_gone_or_broken(world: World) -> None:
    world.forwarder.route_to(world.new)
    world.forwarder.remove(world.listeners[1], world.old)
    world.forwarder.drain(world.old)

    world.forwarder.release(world.old)

    assert "sp.listener.1" not in world.forwarder.descriptors()
    assert world.old.closed


def test_a_channel_that_is_shut_down_ends_the_draining_listener(world: World) -> None:
    world.connect(1)
    world.forwarder.route_to(world.new)
    world.old.read.shutdown(socket.SHUT_RDWR)

    world.forwarder.remove(world.listeners[1], world.old)
    world.turn(0.1)

    assert "sp.listener.1" not in world.forwarder.descriptors()
    assert (world.forwarder.lost, world.said) == (1, [("s1", 1)])


def no_generation(world: World) -> None:
    world.forwarder.remove(world.listeners[1], None)


def broken_generation(world: World) -> None:
    world.old.read.shutdown(socket.SHUT_RDWR)
    world.forwarder.remove(world.listeners[1], world.old)
    world.turn(4 * QUIET_S)


def generation_that_goes(world: World) -> None:
    world.forwarder.remove(world.listeners[1], world.old)
    world.forwarder.drain(world.old)
    world.forwarder.release(world.old)


def stop(world: World) -> None:
    world.forwarder.remove(world.listeners[1], world.old)
    world.forwarder.close_listeners(quick=True)


def all_that_are_free() -> list[int]:
    found = []
    with suppress(OSError):
        while True:
            found.append(os.dup(0))
    return found


@pytest.mark.parametrize("end", [no_generation, broken_generation, generation_that_goes, stop])
@pytest.mark.parametrize("free", [1, 0])
def test_clients_of_a_removed_listener_that_no_generation_takes_are_counted_and_said(
    world: World, end: Callable[[World], None], free: int
) -> None:
    """Also where no descriptor is free but the reserve."""
    world.forwarder.route_to(world.new)
    world.turn()
    world.connect(1, 3)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken_up: list[int] = []
    try:
        if not free:
            limit = max(map(int, os.listdir("/proc/self/fd"))) + 1
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
            taken_up += all_that_are_free()
        end(world)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for each in taken_up:
            os.close(each)
    world.turn(4 * QUIET_S)

    assert (world.forwarder.lost, world.forwarder.forwarded, world.said) == (3, 3, [("s1", 3)])
    assert [client.recv(1) for client in world.clients] == [b"", b"", b""]


def test_one_that_lets_new_ones_in_is_closed_in_the_end(
    world: World, turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system does not let us refuse them, however many they are."""
    monkeypatch.setattr("socketprotector.daemon.delivery.queue.listener_drain.time", turns)
    monkeypatch.setattr(world.listeners[1], "refuse_new", lambda: False)
    monkeypatch.setattr("socketprotector.daemon.delivery.queue.listener_drain.LAST_S", QUIET_S)
    monkeypatch.setattr("socketprotector.daemon.delivery.queue.listener_drain.BURST", 1)
    world.forwarder.route_to(world.new)
    world.forwarder.remove(world.listeners[1], world.old)
    came = 0
    while "sp.listener.1" in world.forwarder.descriptors():
        world.connect(1)
        came += 1
        world.turn(0.01)
        taken(world.old)
        assert came < 1000


def test_waiting_clients_are_served_however_slowly_where_no_new_ones_get_in(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socketprotector.daemon.delivery.queue.listener_drain.LAST_S", 0.0)
    small = world.channel({0, 1}, queue=6)
    world.connect(1, 40)
    world.forwarder.route_to(world.new)
    world.forwarder.remove(world.listeners[1], small)

    served = 0
    while served < 40:
        world.turn(2 * QUIET_S)
        served += len(taken(small))

    assert world.forwarder.lost == 0
    small.close()


def test_a_listener_of_another_process_is_only_released(world: World) -> None:
    foreign = world.listener(2, foreign=True)
    copy = socket.socket(fileno=os.dup(foreign.fileno()))
    world.forwarder.add(foreign)
    world.connect(2)

    world.forwarder.remove(foreign, world.old)

    assert (world.folder / "s2").exists()
    assert copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    copy.accept()[0].close()
    copy.close()


def test_an_undelivered_one_of_another_processs_listener_is_sent_when_that_was_released(
    world: World,
) -> None:
    foreign = world.listener(2, foreign=True)
    copy = socket.socket(fileno=os.dup(foreign.fileno()))
    world.forwarder.add(foreign)
    small = world.channel({0, 2}, queue=6)
    room = small.capacity()
    world.forwarder.route_to(small)
    world.connect(2, room + 1)
    world.turn()
    assert world.forwarder.undelivered.waiting

    world.forwarder.route_to(world.new)
    world.forwarder.remove(foreign, small)
    world.forwarder.drain(small)
    world.connect(2)
    assert taken(small) == [2] * room
    world.turn(4 * QUIET_S)

    assert taken(small) == [2]
    assert world.forwarder.lost == 0
    assert small.write.fileno() < 0
    copy.accept()[0].close()  # a client that came after that is its owner's
    copy.close()
    small.close()


def test_a_quick_stop_closes_what_is_being_emptied(world: World) -> None:
    world.connect(1)
    world.forwarder.route_to(world.new)
    world.forwarder.remove(world.listeners[1], world.old)
    world.forwarder.drain(world.old)

    world.forwarder.close_listeners(quick=True)

    assert world.forwarder.descriptors() == {}
    assert world.old.write.fileno() < 0
