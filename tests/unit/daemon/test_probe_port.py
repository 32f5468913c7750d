"""The port by which a generation is probed that takes connections from a channel, in memory."""

from __future__ import annotations

import errno
import socket
from types import SimpleNamespace
from typing import Any

import pytest
from socketprotector_client import wire

from socketprotector.daemon.delivery.queue import probe_port as module
from socketprotector.daemon.delivery.queue.probe_port import ProbePort, drop_all, is_probe
from socketprotector.daemon.delivery.queue.queue_watch import QueueWatch
from tests.unit.daemon.queue_world import (
    PROBE,
    Kernel,
    MemoryChannel,
    QueueWorld,
    any_of,
    drain,
    failure,
    header,
)

CLIENT = any_of(None)  # the port does not look at the probe's own end


class Connection:
    """An accepted probe."""

    def __init__(self, kernel: Kernel, name: str) -> None:
        self._kernel, self._fd = kernel, kernel.new(name)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        self._kernel.close(self._fd)


class Port:
    """A listening socket on a port of its own."""

    def __init__(self, world: World, number: int) -> None:
        self._world, self._number = world, number
        self.backlog: list[str] = []
        self.closed = False
        self.address = ("", 0)
        self.listens = 0
        self.blocks = True

    def setblocking(self, blocks: bool) -> None:
        self.blocks = blocks

    def bind(self, address: tuple[str, int]) -> None:
        if self._world.cannot_bind:
            raise failure(errno.EADDRINUSE)
        self.address = address[0], 40_000 + self._number

    def getsockname(self) -> tuple[str, int]:
        return self.address

    def listen(self, backlog: int) -> None:
        self.listens = backlog

    def fileno(self) -> int:
        return self._number

    def accept(self) -> tuple[Connection, None]:
        if not self.backlog:
            raise BlockingIOError(errno.EAGAIN, "no probe")
        made = Connection(self._world.kernel, self.backlog[0])
        del self.backlog[0]
        return made, None

    def close(self) -> None:
        self.closed = True


class World(QueueWorld):
    """One generation's channel, and the ports that were opened to it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__(patch)
        self.ports: list[Port] = []
        self.cannot_bind = False
        self.watch: QueueWatch | None = None
        kinds = SimpleNamespace(
            socket=self._socket, AF_INET=socket.AF_INET, SOCK_STREAM=socket.SOCK_STREAM
        )
        patch.setattr(module, "socket", kinds)
        patch.setattr(module, "events_of", lambda port, _: bool(port.backlog))
        self.to: MemoryChannel = self.channel(1)

    def _socket(self, *_: object) -> Port:
        self.ports.append(Port(self, 50 + len(self.ports)))
        return self.ports[-1]

    def open(self, index: int = 3) -> ProbePort:
        made: Any = self.to
        return ProbePort(any_of(self.clock), made, index, lambda: self.watch)

    def probe(self, name: str, port: int = -1) -> None:
        """Have a probe connect, and the loop turn."""
        self.ports[port].backlog.append(name)
        self.turn_ports()

    def turn_ports(self) -> None:
        for each in self.ports:
            if each.backlog and each.fileno() in self.clock.watched:
                self.clock.watched[each.fileno()]()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_a_probe_goes_into_the_channel_and_is_recognised_there(world: World) -> None:
    target = world.open().target
    assert target.address == ("127.0.0.1", 40_050)
    assert world.ports[0].listens > 0
    assert not world.ports[0].blocks
    world.probe("probe")
    [(record, name)] = world.to.line
    assert name == "probe"
    assert is_probe(record)
    assert wire.HEADER.unpack(record)[2] == 3, "as if it came by that listener"
    assert not is_probe(header(3))
    assert world.kernel.connections == []


def test_a_probe_waits_until_a_worker_takes_it(world: World) -> None:
    target = world.open().target
    assert not target.waits(CLIENT)
    world.ports[0].backlog.append("probe")
    assert target.waits(CLIENT)
    world.turn_ports()
    assert target.waits(CLIENT)
    drain(world.to)
    assert not target.waits(CLIENT)


def test_a_probe_without_room_is_sent_as_soon_as_there_is_some(world: World) -> None:
    world.to.room = 1
    world.to.hold("client")
    target = world.open().target
    world.probe("probe")
    world.probe("second")
    assert world.kernel.connections == ["probe"]
    assert not world.clock.watched, "the port stays readable, so it must not wake us"
    assert target.waits(CLIENT)
    drain(world.to)
    assert target.waits(CLIENT)
    world.clock.pass_time(0.1)
    assert world.to.names == ["probe"]
    world.to.room = 5
    world.turn_ports()
    assert world.to.names == ["probe", "second"]


def test_out_of_descriptors_a_probe_is_accepted_by_a_timer(world: World) -> None:
    target = world.open().target
    world.kernel.most = 0
    world.probe("probe")
    assert not world.clock.watched
    assert target.waits(CLIENT)
    world.kernel.most = 10
    world.clock.pass_time(0.1)
    world.turn_ports()
    assert world.to.names == ["probe"]


def test_a_port_that_cannot_be_watched_again_is_tried_again(world: World) -> None:
    world.open()
    world.kernel.most = 0
    world.probe("probe")
    world.kernel.most = 10
    world.clock.cannot_watch = True
    world.clock.pass_time(0.3)
    world.clock.cannot_watch = False
    world.clock.pass_time(0.1)
    world.turn_ports()
    assert world.to.names == ["probe"]


def test_a_probe_that_is_gone_again_changes_nothing(world: World) -> None:
    world.open()
    world.clock.watched[50]()
    assert world.clock.watched
    assert not world.clock.waits


def test_a_probe_that_could_not_be_sent_was_not_taken(world: World) -> None:
    """It is closed, which looks to its sender as if a worker had closed it."""
    world.to.fails = [errno.EPIPE]
    target = world.open().target
    world.probe("probe")
    assert world.kernel.connections == []
    with pytest.raises(BrokenPipeError):
        target.waits(CLIENT)
    assert not target.waits(CLIENT), "reported once"
    world.probe("second")
    assert world.to.names == ["second"]


def test_clients_behind_a_probe_do_not_make_it_wait(world: World) -> None:
    sent = [0]
    world.watch = QueueWatch(
        any_of(world.clock),
        accepted=lambda: sent[0],
        send_again=lambda _: None,
        untaken=lambda *_: None,
    )
    world.to.hold("before")
    world.watch.follow(any_of(world.to))
    target = world.open().target
    assert not target.waits(CLIENT), "no probe was sent yet"
    world.probe("probe")
    world.to.hold("behind", "behind too")
    sent[0] += 2
    assert target.waits(CLIENT)
    assert drain(world.to, 1) == ["before"]
    assert target.waits(CLIENT)
    assert drain(world.to, 1) == ["probe"]
    assert not target.waits(CLIENT)


def test_another_port_s_probe_behind_it_does_not_make_it_wait(world: World) -> None:
    world.watch = QueueWatch(
        any_of(world.clock),
        accepted=lambda: 0,
        send_again=lambda _: None,
        untaken=lambda *_: None,
    )
    world.watch.follow(any_of(world.to))
    first, second = world.open().target, world.open().target
    world.probe("first", 0)
    world.probe("second", 1)
    assert (first.waits(CLIENT), second.waits(CLIENT)) == (True, True)
    drain(world.to, 1)
    assert (first.waits(CLIENT), second.waits(CLIENT)) == (False, True)


def test_a_closed_port_leaves_nothing(world: World) -> None:
    target = world.open().target
    world.to.room = 0
    world.probe("probe")
    target.close()
    assert world.ports[0].closed
    assert not world.clock.watched
    assert not world.clock.waits
    assert world.kernel.connections == []

    target = world.open().target
    target.close()
    assert not world.clock.watched


@pytest.mark.parametrize("fails", ["cannot_bind", "cannot_watch"])
def test_a_port_that_cannot_be_opened_leaves_no_socket(world: World, fails: str) -> None:
    setattr(world.clock if fails == "cannot_watch" else world, fails, True)
    with pytest.raises(OSError, match=r"in use|memory"):
        world.open()
    assert world.ports[0].closed


def test_without_a_watch_the_channel_has_probes_alone(world: World) -> None:
    target = ProbePort(any_of(world.clock), any_of(world.to), 0).target
    world.probe("probe")
    assert target.waits(CLIENT)
    drain(world.to)
    assert not target.waits(CLIENT)


def test_what_is_left_in_a_channel_is_closed_and_its_clients_are_counted(world: World) -> None:
    world.to.hold("a", "b")
    world.to.line.insert(1, (PROBE, "probe"))
    assert drop_all(any_of(world.to)) == 2
    assert world.to.line == []
    assert world.kernel.open == {}


def test_without_a_descriptor_they_are_counted_too(world: World) -> None:
    world.to.hold("a")
    world.kernel.most = 0
    assert drop_all(any_of(world.to)) == 1


def test_out_of_memory_the_rest_counts_as_clients(world: World) -> None:
    world.to.hold("a", "b", "c")
    takes = iter([False, True])
    take_back = world.to.take_back

    def take() -> Any:
        if next(takes):
            raise failure(errno.ENOMEM)
        return take_back()

    world.to.take_back = take  # type: ignore[method-assign]
    assert drop_all(any_of(world.to)) == 3
