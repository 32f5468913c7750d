"""Where connections go whatever happens: listeners and channels in memory, and no process."""

from __future__ import annotations

import errno
import random
from collections import Counter

import pytest
from socketprotector_client import wire

from socketprotector.core.events import BacklogEmptied
from socketprotector.daemon.delivery import LAST_S, QUIET_S
from socketprotector.daemon.delivery.queue import canary, forwarder
from socketprotector.daemon.delivery.queue.forwarder import ROUNDS, Forwarder
from socketprotector.daemon.delivery.queue.queue_watch import FIRST_LOOK_S, SAVE_S
from socketprotector.daemon.delivery.queue.shortage import FIRST_WAIT_S, LAST_WAIT_S
from socketprotector.model.records import ForwarderRecord
from socketprotector.system.inherited import Inherited
from tests.unit.daemon.queue_world import (
    PROBE,
    MemoryChannel,
    MemoryListener,
    QueueWorld,
    any_of,
    drain,
    failure,
    header,
)

#: How long after a connection the state is written at the latest.
LATEST_S = FIRST_LOOK_S + SAVE_S + 0.1


class World(QueueWorld):
    """A forwarder with listeners 0 and 1."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__(patch, forwarder)
        self.broken = 0
        self.repaired: list[MemoryListener] = []
        self.repair_fails = 0
        self.one, self.two = self.listener(0), self.listener(1)
        self.forwarder = self.made(self.one, self.two)

    def made(self, *listeners: MemoryListener) -> Forwarder:
        return Forwarder(
            self.runtime,
            [any_of(each) for each in listeners],
            broken=self._note_broken,
            repair=any_of(self._repair),
        )

    def _note_broken(self) -> None:
        self.broken += 1

    def _repair(self, listener: MemoryListener) -> None:
        self.repaired.append(listener)
        if self.repair_fails:
            raise failure(self.repair_fails)
        listener.alive = True
        listener.number += 100  # another socket was bound

    def route_to(self, channel: MemoryChannel | None, *sharing: object) -> None:
        self.forwarder.route_to(any_of(channel), *map(any_of, sharing))

    def drain(self, channel: MemoryChannel) -> None:
        self.forwarder.drain(any_of(channel))

    def release(self, channel: MemoryChannel) -> None:
        self.forwarder.release(any_of(channel))

    def remove(self, listener: MemoryListener, to: MemoryChannel | None) -> None:
        self.forwarder.remove(any_of(listener), any_of(to))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_connections_go_to_the_route_and_our_copies_are_closed(world: World) -> None:
    route = world.channel(1)
    world.route_to(route)
    world.one.backlog += ["a", "b"]
    world.turn()
    world.turn()

    assert route.names == ["a", "b"]
    assert world.kernel.connections == []
    assert world.forwarder.forwarded == 2


def test_the_count_is_saved_soon_after_connections_and_not_while_there_are_none(
    world: World,
) -> None:
    route = world.channel(1)
    world.route_to(route)
    world.clock.pass_time(2 * LATEST_S)
    assert world.clock.saves == 0

    for _ in range(3):
        world.one.backlog += ["a"]
        world.turn()
        route.line.clear()
        saves = world.clock.saves
        world.clock.pass_time(LATEST_S)
        assert world.clock.saves == saves + 1
        world.clock.pass_time(2 * LATEST_S)
        assert world.clock.saves == saves + 1


def test_connections_carry_the_listener_that_they_came_by(world: World) -> None:
    route = world.channel(1)
    world.route_to(route)
    world.two.backlog.append("a")
    world.turn()

    [(record, _)] = route.line
    version, kind, listener, state, time = wire.HEADER.unpack(record)
    assert (version, kind, listener, state) == (wire.VERSION, wire.KIND_CONNECTION, 1, 0)
    assert time == int(world.clock.now * 1e9)


def test_without_a_route_and_during_a_hold_clients_stay_in_the_backlog(world: World) -> None:
    route = world.channel(1)
    world.one.backlog.append("a")
    world.turn()
    assert world.one.backlog == ["a"]

    world.route_to(route)
    world.forwarder.hold(True)
    world.turn()
    assert world.one.backlog == ["a"]

    world.forwarder.hold(False)
    world.turn()
    assert route.names == ["a"]

    world.route_to(None)
    world.one.backlog.append("b")
    world.turn()
    assert world.one.backlog == ["b"]


def test_a_client_of_a_listener_that_the_route_does_not_know_stays_in_the_backlog(
    world: World,
) -> None:
    world.route_to(world.channel(1, 0))
    world.two.backlog.append("a")
    world.turn()
    assert world.two.backlog == ["a"]


def test_a_look_accepts_while_the_loop_is_blocked_and_ends_however_many_come(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    route = world.channel(1)
    world.route_to(route)
    world.one.backlog += ["a", "b", "c"]
    world.forwarder.accept_waiting()
    assert route.names == ["a", "b", "c"]

    looks = world.forwarder.forwarded

    def accept(*_: object) -> tuple[int, None]:
        return world.kernel.new("endless"), None

    monkeypatch.setattr(world.one.socket, "_accept", accept)
    world.route_to(route)
    world.forwarder.accept_waiting()
    assert world.forwarder.forwarded - looks >= ROUNDS


def test_a_look_waits_for_room_in_the_queue(world: World) -> None:
    route = world.channel(1, room=1)
    world.route_to(route)
    world.one.backlog += ["a", "b", "c", "d"]
    world.forwarder.accept_waiting()
    assert world.one.backlog == ["c", "d"]
    assert world.kernel.connections == ["b"]

    drain(route)
    world.forwarder.accept_waiting()
    assert route.names == ["b"]


# -- a generation drains -----------------------------------------------------------------


def test_a_drained_generation_returns_what_it_has_not_taken_in_its_order(world: World) -> None:
    old, new = world.channel(1), world.channel(2)
    old.hold("a", "b", "c")
    new.hold("before")
    world.route_to(new)
    world.drain(old)

    assert (old.names, new.names) == ([], ["before", "a", "b", "c"])
    assert old.has_ended
    assert not old.closed
    assert world.kernel.connections == []


def test_what_finds_no_room_stays_with_the_drained_generation(world: World) -> None:
    old, new = world.channel(1), world.channel(2, room=2)
    old.hold("a", "b", "c", "d")
    world.route_to(new)
    world.drain(old)

    assert (new.names, old.names) == (["a", "b"], ["d"])
    assert old.has_ended
    drain(new)
    world.turn(new)
    assert new.names == ["c"]  # the one whose send failed
    assert old.names == ["d"]


def test_without_a_route_the_drained_generation_takes_the_rest(world: World) -> None:
    old = world.channel(1)
    old.hold("a")
    world.drain(old)
    world.route_to(world.channel(2))

    assert (old.names, old.has_ended) == (["a"], True)


def test_the_route_itself_keeps_its_connections_when_it_is_drained(world: World) -> None:
    route = world.channel(1)
    route.hold("a", "b")
    world.route_to(route)
    world.drain(route)
    assert (route.names, route.has_ended) == (["a", "b"], True)


def test_a_channel_that_a_worker_shut_down_is_emptied_for_the_next_route(world: World) -> None:
    old, new = world.channel(1), world.channel(2)
    old.hold("a", "b")
    old.shut = True
    world.drain(old)
    assert old.names == ["a", "b"]

    world.route_to(new)
    assert new.names == ["a", "b"]
    assert not old.closed, "its workers may still live"
    world.release(old)
    assert old.closed


def test_an_empty_channel_that_was_shut_down_is_left_alone(world: World) -> None:
    old = world.channel(1)
    old.shut = True
    world.drain(old)
    world.release(old)
    world.route_to(world.channel(2))
    assert old.closed


def test_a_released_generation_leaves_its_connections_to_the_next_route(world: World) -> None:
    old, new = world.channel(1), world.channel(2)
    old.hold("a", "b")
    world.release(old)
    assert not old.closed
    assert old.has_ended

    world.route_to(new)
    assert (new.names, old.closed) == (["a", "b"], True)


def test_a_released_generation_returns_the_rest_once_there_is_room(world: World) -> None:
    old, new = world.channel(1), world.channel(2, room=1)
    old.hold("a", "b", "c")
    world.route_to(new)
    world.release(old)
    assert (new.names, old.closed) == (["a"], False)
    for expected in ("b", "c"):
        drain(new)
        world.turn(new)
        assert new.names == [expected]
    assert old.closed
    drain(new)
    world.turn(new)
    world.one.backlog.append("d")
    world.turn(new)
    assert new.names == ["d"]


def test_an_empty_channel_is_closed_at_once_even_without_a_route(world: World) -> None:
    old = world.channel(1)
    world.release(old)
    assert old.closed


def test_leftovers_go_before_later_clients_and_the_oldest_generation_first(world: World) -> None:
    first, second, new = world.channel(1), world.channel(2), world.channel(3)
    first.hold("a")
    second.hold("b")
    world.release(first)
    world.release(second)
    world.one.backlog.append("c")
    world.route_to(new)
    world.turn()
    assert new.names == ["a", "b", "c"]


def test_a_connection_by_a_listener_that_the_route_does_not_know_goes_back(world: World) -> None:
    old, new = world.channel(1, 0, 1), world.channel(2, 0)
    old.hold("a", listener=1)
    old.hold("b")
    old.hold("c", listener=1)
    world.route_to(new)
    world.drain(old)

    assert (new.names, old.names) == (["b"], ["a", "c"])
    assert world.kernel.connections == []


def test_a_channel_that_has_ended_keeps_it_with_all_behind_it(world: World) -> None:
    old, new = world.channel(1, 0, 1), world.channel(2, 0)
    old.hold("a")
    old.hold("b", listener=1)
    old.hold("c")
    old.end()
    world.route_to(new)
    world.drain(old)
    assert (new.names, old.names) == (["a"], ["b", "c"])


def test_without_workers_it_is_kept_for_a_generation_that_knows_the_listener(
    world: World,
) -> None:
    old, new, later = world.channel(1), world.channel(2, 0), world.channel(3)
    old.hold("a", listener=1)
    old.hold("b")
    world.route_to(new)
    world.release(old)
    assert (new.names, old.closed) == (["b"], True)
    assert world.kernel.connections == ["a"]

    world.route_to(later)
    assert (later.names, world.kernel.connections) == (["a"], [])
    assert world.forwarder.lost == 0


def test_it_is_lost_if_its_listener_is_gone(world: World) -> None:
    old = world.channel(1)
    old.hold("a", listener=7)
    world.route_to(world.channel(2, 0))
    world.release(old)
    assert world.kernel.connections == []
    assert world.forwarder.lost == 1


def test_a_connection_that_cannot_be_put_back_is_kept(world: World) -> None:
    old, new = world.channel(1, 0, 1), world.channel(2, 0)
    old.hold("a", listener=1)
    old.hold("b")
    old.fails = [errno.ENOBUFS]
    world.route_to(new)
    world.drain(old)
    assert world.kernel.connections == ["a"]
    assert world.clock.lines == ["resources-exhausted"]
    assert (new.names, old.names) == ([], ["b"]), "the rest stays during the shortage"


def test_probes_are_discarded_and_no_loss(world: World) -> None:
    old, new = world.channel(1), world.channel(2)
    old.line.append((PROBE, "probe"))
    old.hold("a")
    world.route_to(new)
    world.drain(old)
    assert (old.names, new.names) == ([], ["a"])
    assert world.kernel.connections == []
    assert world.forwarder.lost == 0


@pytest.mark.parametrize(("record", "lost"), [(header(0), 1), (PROBE, 0)])
def test_a_connection_that_the_kernel_drops_is_counted_unless_it_is_a_probe(
    world: World, record: bytes, lost: int
) -> None:
    old = world.channel(1)
    old.line.append((record, "a"))
    world.route_to(world.channel(2))
    world.kernel.most = 0  # another process has taken the number of the reserve meanwhile
    world.drain(old)
    assert world.forwarder.lost == lost
    assert old.names == []


def test_a_shortage_while_taking_back_leaves_the_rest_for_later(world: World) -> None:
    old, new = world.channel(1), world.channel(2)
    old.hold("a", "b")
    world.release(old)
    old.take_fails = [errno.ENOMEM]
    world.route_to(new)
    assert (old.names, new.names) == (["a", "b"], [])
    world.clock.pass_time(2 * FIRST_WAIT_S)
    assert (new.names, old.closed) == (["a", "b"], True)


def test_the_headers_of_a_channel_that_has_ended_cannot_be_read_during_a_shortage(
    world: World,
) -> None:
    old, new = world.channel(1, 0, 1), world.channel(2, 0)
    old.hold("a")
    old.shut = True
    world.drain(old)
    old.take_fails = [errno.ENOMEM]
    world.route_to(new)
    assert (old.names, new.names) == (["a"], [])
    world.clock.pass_time(2 * FIRST_WAIT_S)
    assert new.names == ["a"]


def test_a_channel_that_seems_empty_and_is_not_is_looked_at_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = world.channel(1), world.channel(2)
    old.hold("a")
    world.release(old)
    with monkeypatch.context() as patch:
        patch.setattr(old, "take_back", lambda: None)
        world.route_to(new)
    assert not old.closed
    world.clock.pass_time(2 * FIRST_WAIT_S)
    assert (new.names, old.closed) == (["a"], True)


# -- failures ----------------------------------------------------------------------------


def test_a_full_queue_stops_accepting_until_there_is_room(world: World) -> None:
    route = world.channel(1, room=1)
    world.route_to(route)
    world.one.backlog += ["a", "b", "c"]
    world.turn(route)
    world.turn(route)
    assert (route.names, world.one.backlog) == (["a"], ["c"])
    assert world.kernel.connections == ["b"]

    assert drain(route) == ["a"]
    world.turn(route)
    assert drain(route) == ["b"]
    world.turn(route)
    assert route.names == ["c"]
    assert world.forwarder.forwarded == 3


def test_a_broken_route_is_reported_and_loses_no_connection(world: World) -> None:
    route, next_route = world.channel(1), world.channel(2)
    world.route_to(route)
    route.shut = True
    world.one.backlog += ["a", "b"]
    world.turn()
    assert world.broken == 1
    assert world.one.backlog == ["b"]

    world.route_to(next_route)
    world.turn()
    assert next_route.names == ["a", "b"]


def test_out_of_descriptors_clients_wait_and_are_accepted_by_a_timer(world: World) -> None:
    route = world.channel(1)
    world.route_to(route)
    world.kernel.most = len(world.kernel.open)
    world.one.backlog.append("a")
    world.turn()
    assert world.clock.lines == ["resources-exhausted"]
    assert world.one.backlog == ["a"]
    assert not world.clock.watched

    world.kernel.most += 1
    world.clock.pass_time(2 * LAST_WAIT_S)
    world.turn()
    assert route.names == ["a"]


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ECONNABORTED, errno.EPROTO])
def test_a_client_that_is_gone_again_changes_nothing(world: World, code: int) -> None:
    route = world.channel(1)
    world.route_to(route)
    world.one.fails = [code]
    world.turn()
    assert world.one.fileno() in world.clock.watched
    assert not world.clock.lines
    assert not world.repaired


def test_an_error_that_is_not_documented_is_tried_again(world: World) -> None:
    """EINVAL is that of a socket that does not listen, and this one does."""
    route = world.channel(1)
    world.route_to(route)
    world.one.fails = [errno.EINVAL]
    world.one.backlog.append("a")
    world.turn()
    assert not world.repaired
    world.clock.pass_time(2 * FIRST_WAIT_S)
    world.turn()
    assert route.names == ["a"]


def test_a_socket_that_was_shut_down_for_a_stop_does_not_wake_us(world: World) -> None:
    world.route_to(world.channel(1))
    world.one.always_readable = world.one.hangs_up = True
    world.one.fails = [errno.EAGAIN]
    world.turn()
    assert world.one.fileno() not in world.clock.watched
    assert world.two.fileno() in world.clock.watched
    assert not world.repaired


@pytest.mark.parametrize("unix", [False, True])
def test_a_listener_that_a_worker_shut_down_is_repaired(world: World, unix: bool) -> None:
    route = world.channel(1)
    world.route_to(route)
    if unix:
        world.one.hangs_up = True
        world.one.fails = [errno.EAGAIN]
    else:
        world.one.alive = False
    world.turn()
    assert world.repaired == [world.one]
    watched = {world.one.fileno(), world.two.fileno()}
    assert world.clock.watched.keys() == watched, "and not the closed one"
    world.one.hangs_up = False
    world.one.backlog.append("a")
    world.turn()
    assert route.names == ["a"]


@pytest.mark.parametrize("unix", [False, True])
def test_a_socket_that_an_earlier_program_shut_down_for_its_stop_is_not_repaired(
    world: World, unix: bool
) -> None:
    """The route comes back before the order to close the listeners."""
    world.forwarder.adopt(ForwarderRecord(), Inherited({}), closing=True)
    world.one.hangs_up, world.one.alive = unix, unix
    world.one.fails = [errno.EAGAIN] if unix else []
    world.two.backlog.append("a")
    route = world.channel(1)
    world.route_to(route)

    world.forwarder.accept_waiting()

    assert not world.repaired
    assert route.names == ["a"], "a client of another listener"
    world.forwarder.close_listeners(quick=False)
    world.clock.pass_time(3 * QUIET_S)
    assert world.clock.posted == [BacklogEmptied()]


def test_a_repair_that_lacks_descriptors_is_repeated(world: World) -> None:
    route = world.channel(1)
    world.route_to(route)
    world.one.alive = False
    world.repair_fails = errno.EMFILE
    world.turn()
    assert world.clock.lines == ["resources-exhausted"]
    world.repair_fails = 0
    world.clock.pass_time(2 * FIRST_WAIT_S)
    world.turn()
    assert world.one.alive
    world.one.backlog.append("a")
    world.turn()
    assert route.names == ["a"]


def test_a_lost_listener_is_not_watched(world: World) -> None:
    world.one.lost = True
    world.route_to(world.channel(1))
    assert world.clock.watched.keys() == {world.two.fileno()}


def test_a_listener_that_cannot_be_watched_is_tried_again(world: World) -> None:
    route = world.channel(1)
    world.clock.cannot_watch = True
    world.route_to(route)
    assert world.clock.lines == ["resources-exhausted"]
    world.clock.cannot_watch = False
    world.clock.pass_time(2 * FIRST_WAIT_S)
    world.one.backlog.append("a")
    world.turn()
    assert route.names == ["a"]


# -- listeners come and go, and the end --------------------------------------------------


def test_a_listener_that_is_added_is_accepted_from(world: World) -> None:
    route = world.channel(1)
    world.route_to(route)
    added = world.listener(2)
    world.forwarder.add(any_of(added))
    added.backlog.append("a")
    world.turn()
    assert route.names == ["a"]
    assert [each.index for each in world.forwarder.listeners] == [0, 1, 2]


def test_a_removed_listener_s_backlog_goes_to_the_generation_that_knows_it(world: World) -> None:
    old, new = world.channel(1, 0, 1), world.channel(2)
    world.route_to(new)
    world.two.backlog += ["a", "b"]
    world.remove(world.two, old)
    assert world.two.refuses
    assert "listener1" in world.forwarder.descriptors()
    world.clock.pass_time(3 * QUIET_S)
    assert (old.names, world.two.closed) == (["a", "b"], True)
    assert world.forwarder.forwarded == 2
    assert world.two.fileno() not in world.clock.watched
    assert world.forwarder.descriptors().keys() == {"listener0"}
    world.forwarder.accept_waiting()  # it does not accept from a closed listener


def test_a_generation_that_gets_a_backlog_ends_after_it(world: World) -> None:
    old = world.channel(1, 0, 1)
    world.route_to(world.channel(2, 0))
    world.two.backlog.append("a")
    world.remove(world.two, old)
    world.drain(old)
    assert not old.has_ended
    world.clock.pass_time(3 * QUIET_S)
    assert (old.names, old.has_ended) == (["a"], True)


def test_a_released_generation_gets_no_backlog(world: World) -> None:
    old = world.channel(1, 0, 1, room=0)
    world.route_to(world.channel(2, 0))
    world.two.backlog.append("a")
    world.remove(world.two, old)
    world.drain(old)
    world.release(old)
    assert (world.two.closed, old.closed) == (True, True)
    assert world.forwarder.lost == 1


def test_a_channel_that_was_shut_down_ends_at_once(world: World) -> None:
    """Its workers may never read it again, so no backlog can be sent there."""
    old = world.channel(1, 0, 1)
    world.route_to(world.channel(2, 0))
    world.remove(world.two, old)
    old.shut = True
    world.drain(old)
    assert old.has_ended


def test_a_channel_that_was_shut_down_and_emptied_is_closed_at_its_release(world: World) -> None:
    old = world.channel(1)
    old.hold("a")
    old.shut = True
    world.drain(old)
    assert drain(old) == ["a"]  # a worker took it after all
    world.release(old)
    assert old.closed
    world.route_to(world.channel(2))


def test_a_removed_listener_that_no_generation_knows_is_closed_with_its_clients(
    world: World,
) -> None:
    world.two.backlog += ["a", "b"]
    world.remove(world.two, None)
    assert world.two.closed
    assert world.forwarder.lost == 2
    assert world.clock.fields[-1]["lost"] == 2


def test_a_graceful_close_sends_the_backlog_on_and_then_says_so(world: World) -> None:
    route = world.channel(1)
    world.route_to(route)
    world.one.backlog += ["a", "b"]
    world.forwarder.close_listeners(quick=False)
    assert world.one.refuses
    world.turn()
    assert route.names == ["a", "b"]
    world.clock.pass_time(QUIET_S)
    assert not world.clock.posted, "clients have come since the last look"
    world.clock.pass_time(QUIET_S)
    assert world.clock.posted == [BacklogEmptied()]
    assert world.one.closed
    assert world.two.closed
    assert not world.clock.watched


def test_it_waits_while_clients_come(world: World) -> None:
    route = world.channel(1)
    world.route_to(route)
    world.forwarder.close_listeners(quick=False)
    for _ in range(3):
        world.one.backlog.append("a")
        world.clock.pass_time(QUIET_S)
        assert not world.clock.posted
    world.clock.pass_time(QUIET_S)
    assert world.clock.posted == [BacklogEmptied()]


def test_it_waits_for_connections_of_a_released_generation(world: World) -> None:
    old, route = world.channel(1), world.channel(2, room=1)
    old.hold("a", "b", "c")
    world.route_to(route)
    world.release(old)
    world.forwarder.close_listeners(quick=False)
    world.clock.pass_time(10 * QUIET_S)
    assert not world.clock.posted
    for _ in range(4):
        drain(route)
        world.turn(route)
    world.clock.pass_time(3 * QUIET_S)
    assert world.clock.posted == [BacklogEmptied()]


def test_clients_that_cannot_be_refused_are_waited_for_a_while(world: World) -> None:
    open_to_all = world.listener(2, can_refuse=False)
    world.forwarder.add(any_of(open_to_all))
    route = world.channel(1)
    world.route_to(route)
    world.forwarder.close_listeners(quick=False)
    began = world.clock.now
    while not world.clock.posted:
        open_to_all.backlog.append("a")
        world.clock.pass_time(QUIET_S)
        assert world.clock.now < began + 2 * LAST_S
    assert world.clock.now >= began + LAST_S
    assert open_to_all.closed


def test_where_all_are_refused_there_is_no_limit(world: World) -> None:
    """They had connected, so each of them is served however long that takes."""
    route = world.channel(1)
    world.route_to(route)
    world.forwarder.close_listeners(quick=False)
    for _ in range(int(2 * LAST_S / QUIET_S)):
        world.one.backlog.append("a")
        world.clock.pass_time(QUIET_S)
    assert not world.clock.posted


def test_a_quick_close_is_at_once_posts_nothing_and_counts_the_clients_as_lost(
    world: World,
) -> None:
    world.route_to(world.channel(1))
    world.one.backlog += ["a", "b"]
    world.forwarder.close_listeners(quick=True)
    world.clock.pass_time(10 * QUIET_S)
    assert world.one.closed
    assert world.forwarder.lost == 2
    assert [*world.kernel.open.values()] == ["reserve"], "the clients are reset"
    assert not world.clock.posted
    assert not world.forwarder.listeners


def test_a_quick_close_ends_a_graceful_one(world: World) -> None:
    world.route_to(world.channel(1))
    world.forwarder.close_listeners(quick=False)
    world.forwarder.close_listeners(quick=True)
    world.clock.pass_time(10 * QUIET_S)
    assert not world.clock.posted


def test_a_listener_that_was_passed_in_is_accepted_from_no_more_and_keeps_its_clients(
    world: World,
) -> None:
    """Its owner keeps listening, so its backlog may never be empty."""
    passed_in = world.listener(2, foreign=True)
    world.forwarder.add(any_of(passed_in))
    world.route_to(world.channel(1))
    passed_in.backlog.append("a")
    world.forwarder.close_listeners(quick=False)
    world.forwarder.hold(False)
    world.turn()
    world.clock.pass_time(3 * QUIET_S)
    assert world.clock.posted == [BacklogEmptied()]
    assert passed_in.closed
    assert (passed_in.backlog, passed_in.refuses) == (["a"], False)


def test_listeners_that_survive_serve_earlier_clients_and_leave_later_ones_to_the_next_start(
    world: World,
) -> None:
    route = world.channel(1)
    world.route_to(route)
    world.one.backlog.append("a")
    world.forwarder.close_listeners(quick=False, stay=True)
    world.one.backlog.append("later")
    world.turn()
    world.clock.pass_time(2 * QUIET_S)
    assert not world.one.refuses
    assert route.names == ["a"]
    assert world.clock.posted == [BacklogEmptied()]
    assert not world.one.closed
    assert world.one.backlog == ["later"]

    world.one.survives = True
    assert world.forwarder.close() == ("listener0",)
    assert world.forwarder.listeners == ()


def test_listeners_that_survive_wait_for_a_removed_one(world: World) -> None:
    old, new = world.channel(1, 0, 1), world.channel(2, 0)
    world.route_to(new)
    world.two.backlog.append("a")
    world.remove(world.two, old)
    world.forwarder.close_listeners(quick=False, stay=True)
    assert not world.clock.posted
    world.clock.pass_time(4 * QUIET_S)
    assert old.names == ["a"]
    assert world.clock.posted == [BacklogEmptied()]


def test_a_listener_that_fails_during_a_stop_is_not_repaired(world: World) -> None:
    world.route_to(world.channel(1))
    world.forwarder.close_listeners(quick=False)
    world.one.alive = False
    world.clock.pass_time(3 * QUIET_S)
    assert not world.repaired
    assert world.clock.posted == [BacklogEmptied()]


def test_at_the_end_each_connection_that_no_worker_has_is_counted_as_lost(world: World) -> None:
    old, route = world.channel(1), world.channel(2, room=1)
    old.hold("a", "b", "c")
    old.line.append((PROBE, "probe"))
    world.release(old)
    world.route_to(route)
    world.one.backlog.append("d")
    world.turn()
    world.forwarder.close()
    assert route.names == ["a"]
    assert world.forwarder.lost == 3
    assert world.kernel.open == {}
    assert old.closed
    assert world.one.closed
    assert not world.clock.watched


def test_at_the_end_nothing_is_left_open(world: World) -> None:
    old = world.channel(1, 0, 1)
    world.route_to(world.channel(2, 0))
    world.two.backlog.append("a")
    world.remove(world.two, old)
    world.one.backlog.append("b")
    world.forwarder.close_listeners(quick=False)
    assert world.forwarder.close() == ()
    assert world.two.closed
    assert world.forwarder.lost == 1
    assert world.forwarder.listeners == ()
    assert world.kernel.open == {}
    assert world.clock.due("forwarder-quiet") is None


# -- counts, and the next program --------------------------------------------------------


def test_no_client_has_come_since_the_last_one(world: World) -> None:
    world.route_to(world.channel(1))
    world.one.backlog.append("a")
    assert world.forwarder.idle_s == 0.0
    world.turn()
    world.clock.pass_time(5.0)
    assert world.forwarder.idle_s == pytest.approx(5.0)


def test_the_next_program_goes_on_with_the_counts_and_connections(world: World) -> None:
    route = world.channel(1, room=1)
    world.route_to(route)
    world.one.backlog += ["a", "b"]
    world.turn(route)
    world.turn(route)
    record = world.forwarder.record()
    assert (record.forwarded, record.lost) == (2, 0)
    descriptors = world.forwarder.descriptors()
    inherited = {name: fd for name, fd in descriptors.items() if not name.startswith("listener")}
    assert [world.kernel.open[fd] for fd in inherited.values()] == ["b"]

    after = world.made(MemoryListener(world.kernel, 2))
    after.adopt(record, Inherited(inherited), closing=False)
    after.adopt_drained(any_of(route))
    next_route = world.channel(2)
    after.route_to(any_of(next_route))
    assert next_route.names == ["b", "a"]
    assert after.forwarded == 2
    assert after.record().number > record.number


def test_the_record_of_an_older_program_has_its_one_undelivered_connection(world: World) -> None:
    fd = world.kernel.new("a")
    left = Inherited({"sp.hand.5": fd})
    world.forwarder.adopt(ForwarderRecord(3, 1, header(0), 5), left, closing=False)
    route = world.channel(1)
    world.route_to(route)
    assert route.names == ["a"]
    assert (world.forwarder.forwarded, world.forwarder.lost) == (3, 1)


def test_an_empty_channel_of_an_earlier_program_is_not_waited_for(world: World) -> None:
    old = world.channel(1)
    world.forwarder.adopt_drained(any_of(old))
    world.forwarder.close_listeners(quick=False)
    world.clock.pass_time(2 * QUIET_S)
    assert world.clock.posted == []  # there is no route: clients may come until there is one
    world.route_to(world.channel(2))
    world.clock.pass_time(2 * QUIET_S)
    assert world.clock.posted == [BacklogEmptied()]


def test_new_connections_are_counted_by_channel(world: World) -> None:
    old, new = world.channel(1), world.channel(2)
    old.hold("earlier")
    world.route_to(old)
    world.one.backlog += ["a", "b"]
    world.turn()
    world.turn()
    world.route_to(new)
    world.drain(old)
    world.one.backlog.append("c")
    world.turn()
    assert new.names == ["earlier", "a", "b", "c"]
    met = [world.forwarder.met(any_of(each)) for each in (old, new)]
    assert met == [2, 1], "what was taken back is not new"
    watches = [world.forwarder.watch_of(any_of(each)) for each in (old, new)]
    assert watches == [None, world.forwarder.queue_watch]


def test_a_canary_gets_its_share_and_its_own_counts(world: World) -> None:
    route, sharing = world.channel(1), world.channel(2)
    world.route_to(route, sharing, 5_000)
    world.one.backlog += [str(n) for n in range(10)]
    for _ in range(10):
        world.turn()
    assert (len(route.line), len(sharing.line)) == (5, 5)
    met = [world.forwarder.met(any_of(each)) for each in (route, sharing)]
    assert met == [5, 5]
    assert world.forwarder.watch_of(any_of(route)) is world.forwarder.queue_watch
    of_canary = world.forwarder.watch_of(any_of(sharing))
    assert of_canary not in (None, world.forwarder.queue_watch)
    assert world.forwarder.record().shared == 10
    world.route_to(route, sharing, 10_000)
    world.one.backlog.append("last")
    world.turn()
    assert world.forwarder.record().shared == 11
    assert sharing.names[-1] == "last"

    world.route_to(sharing)
    assert world.forwarder.watch_of(any_of(route)) is None
    assert world.forwarder.watch_of(any_of(sharing)) is world.forwarder.queue_watch


def test_the_share_goes_on_where_an_earlier_program_has_counted(world: World) -> None:
    world.forwarder.adopt(ForwarderRecord(shared=7), Inherited({}), closing=False)
    assert world.forwarder.record().shared == 7
    world.route_to(world.channel(1), world.channel(2), 1)
    assert world.forwarder.record().shared == 7


def test_a_client_that_only_the_canary_can_get_is_kept_while_its_queue_is_full(
    world: World,
) -> None:
    """And only its listener waits: the clients of the route's go on."""
    route, sharing = world.channel(1, 0), world.channel(2, room=1)
    world.route_to(route, sharing, 0)
    world.two.backlog += ["a", "b", "c"]
    world.turn()
    world.turn()
    assert (sharing.names, world.two.backlog) == (["a"], ["c"])
    world.one.backlog.append("d")
    world.turn()
    assert route.names == ["d"]

    drain(sharing)
    world.clock.pass_time(2 * canary._AGAIN_S)
    assert sharing.names == ["b"]
    drain(sharing)
    world.turn()
    assert sharing.names == ["c"]


# -- all together ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_each_client_is_in_one_place_whatever_happens(world: World, seed: int) -> None:
    """Generations, listeners, shortages and full queues come and go at random."""
    chance = random.Random(seed)
    channels: list[MemoryChannel] = []
    routed: MemoryChannel | None = None
    drained: list[MemoryChannel] = []
    came = 0
    taken: list[str] = []

    def open_route() -> None:
        nonlocal routed
        if routed is not None:
            drained.append(routed)
        knows = chance.choice([(), (0, 1), (0,), (1,)])
        made = world.channel(len(channels) + 1, *knows, room=chance.choice([1, 3, 50]))
        channels.append(made)
        world.route_to(made)
        routed = made
        if drained and chance.random() < 0.7:
            world.drain(drained[-1])

    def connect() -> None:
        nonlocal came
        for _ in range(chance.randrange(4)):
            chance.choice((world.one, world.two)).backlog.append(f"client {came}")
            came += 1

    def take() -> None:
        each = chance.choice(channels or [world.channel(0)])
        taken.extend(drain(each, chance.randrange(3)))

    def release() -> None:
        if drained:
            each = drained.pop(chance.randrange(len(drained)))
            world.drain(each)
            world.release(each)

    def fail() -> None:
        if routed is not None:
            routed.fails.append(chance.choice([errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN]))

    def be_short() -> None:
        world.kernel.most = chance.choice([1000, len(world.kernel.open) + chance.randrange(2)])

    def hold() -> None:
        world.forwarder.hold(chance.random() < 0.5)

    def turn() -> None:
        world.turn(*channels)
        world.clock.pass_time(chance.choice([0.0, 0.01, 1.0]))

    orders = (open_route, connect, connect, take, release, fail, be_short, hold, turn, turn)
    for _ in range(120):
        chance.choice(orders)()
        places = Counter(
            [
                *world.kernel.connections,
                *world.one.backlog,
                *world.two.backlog,
                *(name for each in channels for name in each.names),
                *taken,
            ]
        )
        assert set(places.values()) <= {1}
        assert len(places) == came - world.forwarder.lost
    assert world.forwarder.lost == 0

    # Once all is well again, all clients reach workers.
    world.kernel.most = 1000
    world.forwarder.hold(False)
    last = world.channel(99)
    channels.append(last)
    world.route_to(last)
    for each in channels[:-1]:
        each.fails.clear()
        if not each.closed:
            world.drain(each)
            world.release(each)
    for _ in range(came + 10):
        turn()
    taken += [name for each in channels for name in each.names]
    assert sorted(taken) == sorted(f"client {n}" for n in range(came))
    assert all(each.closed for each in channels[:-1])
