"""What sends probes into a generation's channel, in memory."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from socketprotector_client import wire

from socketprotector.daemon.delivery.probe_target import ProbeTarget
from socketprotector.daemon.delivery.queue.probe_sender import ProbeSender, drop_all, is_probe
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

ADDRESS = "127.0.0.1", 80
CLIENT = any_of(None)  # the sender does not look at the probe's own end


class Connection:
    """The server end of a probe."""

    def __init__(self, kernel: Kernel, name: str) -> None:
        self._kernel, self._fd = kernel, kernel.new(name)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        self._kernel.close(self._fd)


class World(QueueWorld):
    """One generation's channel, and what sends probes into it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__(patch)
        self.watch: QueueWatch | None = None
        self.to: MemoryChannel = self.channel(1)

    def open(self, index: int = 3) -> ProbeTarget:
        made: Any = self.to
        sender = ProbeSender(any_of(self.clock), made, index, lambda: self.watch)
        return sender.target(ADDRESS)

    def probe(self, target: ProbeTarget, name: str) -> None:
        assert target.give is not None
        target.give(any_of(Connection(self.kernel, name)))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_a_probe_goes_into_the_channel_and_is_recognised_there(world: World) -> None:
    target = world.open()
    assert target.address == ADDRESS
    world.probe(target, "probe")
    [(record, name)] = world.to.line
    assert name == "probe"
    assert is_probe(record)
    assert wire.HEADER.unpack(record)[2] == 3, "as if it came by that listener"
    assert not is_probe(header(3))
    assert world.kernel.connections == []


def test_a_probe_waits_until_a_worker_takes_it(world: World) -> None:
    target = world.open()
    assert not target.waits(CLIENT)
    world.probe(target, "probe")
    assert target.waits(CLIENT)
    drain(world.to)
    assert not target.waits(CLIENT)


def test_probes_without_room_are_sent_in_order_as_soon_as_there_is_some(world: World) -> None:
    world.to.room = 1
    world.to.hold("client")
    target = world.open()
    world.probe(target, "probe")
    world.probe(target, "second")
    assert world.kernel.connections == ["probe", "second"]
    assert target.waits(CLIENT)
    drain(world.to)
    assert target.waits(CLIENT)
    world.clock.pass_time(0.1)
    assert world.to.names == ["probe"]
    world.to.room = 5
    world.clock.pass_time(0.1)
    assert world.to.names == ["probe", "second"]
    assert not world.clock.waits


def test_only_so_many_probes_are_kept(world: World) -> None:
    world.to.room = 0
    target = world.open()
    for number in range(100):
        world.probe(target, f"{number}")
    assert world.kernel.connections == [f"{number}" for number in range(64)]


def test_a_probe_that_could_not_be_sent_was_not_taken(world: World) -> None:
    """It is closed, which looks to its sender as if a worker had closed it."""
    world.to.fails = [errno.EPIPE]
    target = world.open()
    world.probe(target, "probe")
    assert world.kernel.connections == []
    with pytest.raises(BrokenPipeError):
        target.waits(CLIENT)
    assert not target.waits(CLIENT), "reported once"
    world.probe(target, "second")
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
    target = world.open()
    assert not target.waits(CLIENT), "no probe was sent yet"
    world.probe(target, "probe")
    world.to.hold("behind", "behind too")
    sent[0] += 2
    assert target.waits(CLIENT)
    assert drain(world.to, 1) == ["before"]
    assert target.waits(CLIENT)
    assert drain(world.to, 1) == ["probe"]
    assert not target.waits(CLIENT)


def test_another_sender_s_probe_behind_it_does_not_make_it_wait(world: World) -> None:
    world.watch = QueueWatch(
        any_of(world.clock),
        accepted=lambda: 0,
        send_again=lambda _: None,
        untaken=lambda *_: None,
    )
    world.watch.follow(any_of(world.to))
    first, second = world.open(), world.open()
    world.probe(first, "first")
    world.probe(second, "second")
    assert (first.waits(CLIENT), second.waits(CLIENT)) == (True, True)
    drain(world.to, 1)
    assert (first.waits(CLIENT), second.waits(CLIENT)) == (False, True)


def test_a_closed_target_leaves_nothing(world: World) -> None:
    target = world.open()
    world.to.room = 0
    world.probe(target, "probe")
    target.close()
    assert not world.clock.waits
    assert world.kernel.connections == []


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
