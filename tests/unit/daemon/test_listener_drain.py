"""Removed listeners and their clients: listeners and channels in memory, and no process."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from socketprotector_client import wire

from socketprotector.daemon.delivery import LAST_S, QUIET_S
from socketprotector.daemon.delivery.queue import listener_drain
from socketprotector.daemon.delivery.queue.listener_drain import BURST, MOST_LOST, DrainingListeners
from socketprotector.daemon.delivery.queue.shortage import Shortage
from socketprotector.daemon.delivery.queue.undelivered import Undelivered
from tests.unit.daemon.queue_world import (
    MemoryChannel,
    MemoryListener,
    QueueWorld,
    any_of,
    drain,
    header,
)


class World(QueueWorld):
    """The listeners that are drained, and the generation that knows them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__(patch, listener_drain)
        self.undelivered = Undelivered(self._persist)
        self.saves = 0
        shortage = Shortage(self.runtime, stop=lambda: None, retry=lambda: None)
        self.drains = DrainingListeners(self.runtime, self.undelivered, shortage)
        self.to = self.channel(1)

    def _persist(self) -> bool:
        self.saves += 1
        return self.writable

    def begin(self, listener: MemoryListener, to: MemoryChannel | None = None) -> None:
        self.drains.begin(any_of(listener), any_of(to or self.to))

    def removed(self, *clients: str, **how: Any) -> MemoryListener:
        """A listener that is removed while these clients wait."""
        made = self.listener(len(self.listeners), **how)
        made.backlog += clients
        self.begin(made)
        return made


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_connected_clients_are_delivered_and_then_the_listener_is_closed(world: World) -> None:
    listener = world.removed("a", "b")
    assert listener.refuses
    world.clock.pass_time(0.0)
    assert world.to.names == ["a", "b"]
    assert [record[2:4] for record, _ in world.to.line] == [header(0)[2:4]] * 2
    accepted_at = [wire.HEADER.unpack(record)[4] for record, _ in world.to.line]
    assert all(accepted_at), "a worker would take it for a connection of ours, and not count it"
    assert any_of(world.drains.listeners) == (listener,)

    world.clock.pass_time(2.5 * QUIET_S)
    assert listener.closed
    assert world.drains.listeners == ()
    assert (world.drains.accepted, world.drains.lost) == (2, 0)
    assert world.kernel.connections == []
    assert not world.clock.waits
    assert not world.clock.lines


def test_a_client_whose_handshake_is_under_way_is_delivered_too(world: World) -> None:
    listener = world.removed()
    world.clock.pass_time(0.75 * QUIET_S)
    assert not listener.closed
    listener.backlog.append("a")
    world.clock.pass_time(QUIET_S)
    assert world.to.names == ["a"]
    assert not listener.closed, "a client has come since the last look"
    world.clock.pass_time(2.5 * QUIET_S)
    assert listener.closed


def test_many_clients_do_not_keep_the_loop_from_other_events(world: World) -> None:
    listener = world.removed(*(str(n) for n in range(BURST + 10)))
    turns: list[int] = []
    world.clock.call_after("other", 0.0, lambda: turns.append(len(world.to.line)))
    world.clock.pass_time(0.0)
    assert turns == [BURST]
    assert len(world.to.line) == BURST + 10
    world.clock.pass_time(3 * QUIET_S)
    assert listener.closed


def test_a_full_channel_delays_the_clients_and_keeps_the_listener_open(world: World) -> None:
    world.to.room = 1
    listener = world.removed("a", "b")
    world.clock.pass_time(10 * LAST_S)
    assert (world.to.names, listener.backlog, listener.closed) == (["a"], ["b"], False)
    assert world.kernel.connections == []

    drain(world.to)
    world.clock.pass_time(QUIET_S)
    assert world.to.names == ["b"]
    drain(world.to)
    world.clock.pass_time(2.5 * QUIET_S)
    assert listener.closed


def test_a_listener_that_cannot_refuse_clients_is_closed_after_a_while(world: World) -> None:
    listener = world.removed(can_refuse=False)
    began = world.clock.now
    while not listener.closed:
        listener.backlog.append("a")
        world.clock.pass_time(QUIET_S)
        assert world.clock.now < began + LAST_S + 1
    assert world.clock.now > began + LAST_S - QUIET_S


def test_a_listener_without_further_clients_is_closed_long_before(world: World) -> None:
    listener = world.removed("a", can_refuse=False)
    world.clock.pass_time(3 * QUIET_S)
    assert listener.closed


def test_where_clients_are_refused_all_earlier_ones_are_delivered_however_long_it_takes(
    world: World,
) -> None:
    listener = world.removed()
    for _ in range(int(2 * LAST_S / QUIET_S)):
        listener.backlog.append("a")
        world.clock.pass_time(QUIET_S)
    assert not listener.closed


def test_undelivered_connections_go_first_and_are_waited_for(world: World) -> None:
    world.to.room = 0
    world.undelivered.keep_last(header(0), world.kernel.new("kept"))
    world.undelivered.keep_last(header(1), world.kernel.new("of another listener"))
    listener = world.removed("a", can_refuse=False)
    world.clock.pass_time(2 * LAST_S)
    assert not listener.closed, "it waits for the connection that was accepted already"

    world.to.room = 10
    world.clock.pass_time(QUIET_S)
    assert world.to.names == ["kept", "a"]
    assert world.kernel.connections == ["of another listener"]
    world.clock.pass_time(2.5 * QUIET_S)
    assert listener.closed


def test_a_connection_that_finds_no_room_after_all_is_kept_and_goes_next(world: World) -> None:
    world.to.fails = [errno.ENOBUFS]
    world.removed("a", "b")
    world.clock.pass_time(0.0)
    assert (world.to.names, world.kernel.connections) == ([], ["a"])
    world.clock.pass_time(QUIET_S)
    assert world.to.names == ["a", "b"]


def test_while_the_state_cannot_be_written_an_undelivered_connection_waits(world: World) -> None:
    world.undelivered.keep_last(header(0), world.kernel.new("kept"))
    world.writable = False
    listener = world.removed("a")
    world.clock.pass_time(5 * QUIET_S)
    assert (world.to.names, listener.backlog, listener.closed) == ([], ["a"], False)
    world.writable = True
    world.clock.pass_time(QUIET_S)
    assert world.to.names == ["kept", "a"]


def test_a_broken_channel_loses_the_rest_which_is_logged(world: World) -> None:
    world.to.shut = True
    listener = world.removed("a", "b", "c")
    world.clock.pass_time(0.0)
    assert listener.closed
    assert world.drains.listeners == ()
    assert (world.drains.accepted, world.drains.lost) == (3, 3)
    assert world.clock.lines == ["clients-lost"]
    assert world.clock.fields[0] == {"address": listener.settings.address, "lost": 3}
    assert world.kernel.connections == []
    assert not world.clock.waits


def test_out_of_descriptors_the_listener_stays_open(world: World) -> None:
    listener = world.removed("a")
    world.kernel.most = 0
    world.clock.pass_time(5 * QUIET_S)
    assert (listener.closed, listener.backlog) == (False, ["a"])
    world.kernel.most = 1000
    world.clock.pass_time(QUIET_S)
    assert world.to.names == ["a"]
    assert world.drains.accepted == 1


def test_a_socket_that_was_passed_in_keeps_its_clients_for_its_owner(world: World) -> None:
    world.undelivered.keep_last(header(0), world.kernel.new("kept"))
    listener = world.removed("a", foreign=True)
    world.clock.pass_time(3 * QUIET_S)
    assert not listener.refuses
    assert (listener.backlog, listener.closed) == (["a"], True)
    assert world.to.names == ["kept"], "we have accepted it"
    assert world.drains.lost == 0
    assert not world.clock.lines


def test_a_channel_ends_once_the_last_listener_has_drained_to_it(world: World) -> None:
    other = world.channel(2)
    assert not world.drains.end_channel_later(any_of(world.to))
    first = world.removed("a")
    second = world.removed("b")
    assert not world.drains.end_channel_later(any_of(other))
    assert world.drains.end_channel_later(any_of(world.to))
    world.clock.pass_time(0.0)
    world.drains.close(any_of(world.listener(9)))
    assert not world.to.has_ended
    first.backlog.append("c")
    world.clock.pass_time(2.5 * QUIET_S)
    assert (first.closed, second.closed, world.to.has_ended) == (False, True, False)
    world.clock.pass_time(2.5 * QUIET_S)
    assert (first.closed, world.to.has_ended) == (True, True)
    assert not other.has_ended


def test_a_channel_that_nobody_ordered_to_end_stays_open(world: World) -> None:
    world.removed("a")
    world.clock.pass_time(3 * QUIET_S)
    assert not world.to.has_ended


def test_the_listeners_of_a_generation_that_is_gone_are_closed_with_their_clients(
    world: World,
) -> None:
    mine = world.removed("a", "b")
    other_channel = world.channel(2)
    other = world.listener(7)
    world.begin(other, other_channel)
    saves = world.saves
    world.drains.close_draining(any_of(world.to))
    assert mine.closed
    assert not other.closed
    assert any_of(world.drains.listeners) == (other,)
    assert world.drains.lost == 2
    assert world.saves > saves, "the next program gets no descriptor of it"
    world.clock.pass_time(3 * QUIET_S)
    assert other.closed


def test_at_the_end_all_are_closed(world: World) -> None:
    first, second = world.removed("a"), world.removed()
    world.drains.close_draining()
    assert first.closed
    assert second.closed
    assert not world.clock.waits


def test_what_a_listener_without_a_generation_loses_is_counted_without_a_free_descriptor(
    world: World,
) -> None:
    listener = world.listener(0)
    listener.backlog += ["a", "b"]
    listener.fails = [errno.ECONNABORTED]
    world.undelivered.keep_last(header(0), world.kernel.new("kept"))
    world.undelivered.keep_last(header(1), world.kernel.new("of another listener"))
    world.kernel.most = len(world.kernel.open) - 1  # full once the kept one is closed
    world.drains.close(any_of(listener))
    assert (world.drains.accepted, world.drains.lost) == (2, 3)
    assert world.kernel.connections == ["of another listener"]
    assert listener.closed
    assert "reserve" in world.kernel.open.values(), "the reserve is there again"


def test_clients_that_come_as_fast_as_they_are_counted_do_not_keep_us(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = world.listener(0, can_refuse=False)
    monkeypatch.setattr(listener.socket, "_accept", lambda: (world.kernel.new("endless"), None))
    world.drains.close(any_of(listener))
    assert world.drains.lost == MOST_LOST


def test_a_listener_without_clients_is_closed_without_a_word(world: World) -> None:
    listener = world.listener(0)
    world.drains.close(any_of(listener))
    assert listener.closed
    assert not world.clock.lines
