"""A share of the new clients, where workers accept: the kernel draws it for each TCP client.

A share of WHOLE, which the core never orders, draws every client.  So each story has one end.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any, cast

import pytest
from socketprotector_client import wire

from socketprotector.core.events import Event, SocketLost, Stranded, Untaken
from socketprotector.daemon.delivery.shared import canary_watch
from socketprotector.daemon.delivery.shared.shared_delivery import SharedDelivery
from socketprotector.launch.bind import bind_all
from socketprotector.launch.listen_spec import Listen
from socketprotector.model.records import Counts
from socketprotector.model.settings import ListenerSettings
from socketprotector.model.share import WHOLE
from socketprotector.system import reuseport
from socketprotector.system.listener import Listener
from socketprotector.system.listeners import listener_of
from socketprotector.system.polling import events_of
from socketprotector.system.scoreboard import Board
from tests.boundary.deliveries import PathWorld, SharedWorld, bound

HALF = WHOLE // 2
CLIENTS = 8


class CanaryWorld(SharedWorld):
    """Generation 1 serves, and generation 2 is to have a share."""

    def __init__(self) -> None:
        super().__init__()
        self.serving(1)
        self.open(2)

    @property
    def shared(self) -> SharedDelivery:
        return cast("SharedDelivery", self.delivery)

    def draw(self, share: int = WHOLE) -> None:
        self.route_to(1, 2, share)

    def come(self, count: int = CLIENTS, index: int = 0) -> tuple[int, int]:
        """Let clients come; return how many came to the workers of each generation."""
        before = len(self.taken[1]), len(self.taken[2])
        for _ in range(count):
            self.connect(index)
        for number in (1, 2):
            while self.take(number):
                pass
        return len(self.taken[1]) - before[0], len(self.taken[2]) - before[1]

    def reached(self, generation: int, *, as_client: bool = False) -> int:
        """Probe a generation; return the one whose worker gets the probe."""
        target = self.delivery.reach(self.generations[generation], "", as_client=as_client)
        assert target is not None
        probe = self.probe(target)
        [got] = [number for number in (1, 2) if self.take(number) and self.count(probe, number)]
        target.close()
        return got


@pytest.fixture
def world() -> Iterator[CanaryWorld]:
    made = CanaryWorld()
    yield made
    made.close()


# -- who gets a client -------------------------------------------------------------


def test_both_generations_get_clients_until_the_share_is_over(world: CanaryWorld) -> None:
    assert world.come() == (CLIENTS, 0)
    world.draw(HALF)
    old, new = world.come(200)
    assert old + new == 200
    assert min(old, new) > 50  # with fewer a fair coin ends once in 10^12 times
    world.route_to(1)
    assert world.come() == (CLIENTS, 0)
    world.draw()
    assert world.come() == (0, CLIENTS)
    world.route_to(2)
    assert world.come() == (0, CLIENTS)


def test_without_a_route_no_socket_has_a_share(world: CanaryWorld) -> None:
    """A quick stop may leave the sockets open for the next start, which gets later clients."""
    world.draw()
    world.delivery.route_to(None)
    assert world.come() == (CLIENTS, 0)
    watch = world.shared.steering.canary_watch
    assert watch is not None
    assert not watch.runs


def test_the_next_program_gets_the_share_with_its_first_order(world: CanaryWorld) -> None:
    world.kills = True
    world.draw()
    assert world.come() == (0, CLIENTS)
    world.route_to(1)
    assert world.come() == (CLIENTS, 0)


@pytest.mark.parametrize("share", [0, WHOLE])
def test_each_probe_reaches_the_generation_that_it_is_for(world: CanaryWorld, share: int) -> None:
    world.route_to(1, 2 if share else None, share)
    for _ in range(3):
        assert world.reached(1, as_client=True) == 1
        assert world.reached(1) == 1
        assert world.reached(2) == 2


def test_a_probe_of_the_canary_is_not_taken_for_all_that_waits_there(world: CanaryWorld) -> None:
    """Over IPv6 a client of this machine has the address of a probe."""
    assert world.reached(2) == 2
    world.shared.steering.probes.probed.add((0, 1))
    world.draw()
    assert world.shared.steering.probes.probed == set()
    assert world.reached(2) == 2
    assert world.shared.steering.probes.probed == set()


def test_during_a_hold_no_client_is_drawn_and_afterwards_the_share_is_in_force(
    world: CanaryWorld,
) -> None:
    world.draw()
    world.hold(True)
    assert world.come(1) == (0, 0)
    world.hold(False)
    assert world.come() == (0, CLIENTS)
    world.hold(True)
    world.route_to(1)
    world.hold(False)
    assert world.come() == (CLIENTS, 0)


def test_clients_of_a_listener_that_one_generation_knows_go_there(world: CanaryWorld) -> None:
    world.add(world.listener(1))
    with_it = world.generations[2]
    with_it.update_record(knows=frozenset({1}))
    world.generations[1].update_record(knows=frozenset({0}))
    for each in world.handed[2]:
        each.close()
    world.start_worker(with_it)
    world.draw(1)
    assert world.come(index=0) == (CLIENTS, 0)
    assert world.come(index=1) == (0, CLIENTS)
    world.draw(WHOLE)
    assert world.come(index=0) == (CLIENTS, 0)


# -- a canary that does harm ---------------------------------------------------------


def test_a_canary_that_shuts_its_socket_down_costs_no_client(world: CanaryWorld) -> None:
    world.draw()
    [socket_2] = world.handed[2]
    socket_2.shutdown(socket.SHUT_RDWR)
    assert world.come() == (CLIENTS, 0)
    world.until(lambda: "listens-again" in world.events)
    assert world.come() == (0, CLIENTS)


def test_a_canary_that_breaks_its_socket_fails_and_gets_no_client(world: CanaryWorld) -> None:
    world.draw()
    [listener] = world.delivery.listeners
    world.shared.steering.replace(listener, 1)
    assert world.posted == [SocketLost(2)]
    assert world.come() == (CLIENTS, 0)


def test_the_route_of_a_broken_socket_is_replaced(world: CanaryWorld) -> None:
    world.draw(1)
    [listener] = world.delivery.listeners
    world.shared.steering.replace(listener, 0)
    assert world.posted == [Stranded()]


def of_canary(world: CanaryWorld) -> list[Event]:
    return [each for each in world.posted if isinstance(each, Untaken)]


def test_a_canary_that_accepts_no_client_fails(
    world: CanaryWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary_watch, "CANARY_NEVER_TAKEN_S", 0.05)
    world.draw()
    world.draw(WHOLE - 1)  # another share is no reason to begin again
    world.connect()
    world.until(lambda: bool(of_canary(world)))
    [listener] = world.delivery.listeners
    where = f"at {listener.settings.address}; clients waiting: 1"
    reason = f"no worker has accepted a connection yet {where}"
    assert of_canary(world) == [Untaken(2, reason)]
    assert world.delivery.untaken_s(world.generations[2]) is not None
    assert world.delivery.is_stuck(world.generations[2])

    world.route_to(1)
    assert world.delivery.untaken_s(world.generations[2]) is None
    quiet: list[int] = []
    world.delivery.begin_drain(world.generations[2], lambda: quiet.append(2), reads_on=False)
    assert quiet == [2], "another generation is to accept the client soon"
    world.drain(2)
    world.until(lambda: Stranded() in world.posted)


def test_the_next_program_watches_the_canary(
    world: CanaryWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary_watch, "CANARY_NEVER_TAKEN_S", 0.05)
    world.draw()
    world.connect()
    world.go_on()
    world.until(lambda: bool(of_canary(world)))


def test_a_canary_that_accepts_is_not_failed(
    world: CanaryWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary_watch, "CANARY_NEVER_TAKEN_S", 0.01)
    world.draw()
    for _ in range(5):
        assert world.come(1) == (0, 1)
        world.turn()
    accepts = cast("Any", world.shared.steering)._watch.canary.accept_watch
    world.until(lambda: accepts.awaits)
    assert of_canary(world) == []


def test_a_canary_that_is_busy_with_its_first_client_is_not_failed(
    world: CanaryWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker has accepted this client before we looked; the next client waits."""
    monkeypatch.setattr(canary_watch, "CANARY_NEVER_TAKEN_S", 0.05)
    world.draw()
    world.connect()
    first = world.accept(world.handed[2][0])
    assert first is not None
    with first:
        world.connect()
        accepts = cast("Any", world.shared.steering)._watch.canary.accept_watch
        world.until(lambda: accepts.has_accepted or of_canary(world) != [])
    assert of_canary(world) == []


@pytest.mark.parametrize("share", [WHOLE, 0])
def test_it_is_stuck_until_a_client_that_waits_is_accepted(world: CanaryWorld, share: int) -> None:
    """share: 0: it gets all clients."""
    if share:
        world.draw(share)
    else:
        world.route_to(2)
    new = world.generations[2]
    assert not world.delivery.is_stuck(new)
    assert not world.delivery.is_stuck(None)

    first, _ = world.connect(), world.connect()
    world.turn()
    for _ in range(3):  # as at the end of a stage, which is put off while this holds
        assert world.delivery.is_stuck(new)
    assert not world.delivery.is_stuck(world.generations[1])

    assert world.take(2)
    assert world.count(first, 2) == 1
    assert not world.delivery.is_stuck(new)  # a busy worker has more clients than it can accept


# -- the share is over ------------------------------------------------------------------


def test_clients_that_the_canary_has_not_accepted_stay_with_its_workers(world: CanaryWorld) -> None:
    world.draw()
    late = [world.connect() for _ in range(3)]
    quiet: list[int] = []

    world.route_to(1)
    world.delivery.begin_drain(world.generations[2], lambda: quiet.append(2), reads_on=True)
    assert world.come(0) == (0, 3)
    world.until(lambda: bool(quiet), 1, 2)
    world.end(2)

    assert [world.count(each, 2) for each in late] == [1, 1, 1]
    assert world.come() == (CLIENTS, 0)


def test_a_share_is_cheap_to_change(world: CanaryWorld) -> None:
    """A rolling reload changes it with each worker: no descriptor is made, nothing is recorded."""
    world.draw(1)
    before = world.delivery.descriptors(), world.delivery.record(), world.persisted
    for share in range(1, 100):
        world.draw(share)
    assert (world.delivery.descriptors(), world.delivery.record(), world.persisted) == before


# -- how many it has met ------------------------------------------------------------------


def test_only_workers_of_the_library_count_what_they_have_met(world: CanaryWorld) -> None:
    canary = world.generations[2]
    assert world.delivery.met(canary) is None
    canary.board = Board.make()
    assert world.delivery.met(canary) is None

    words = [0] * wire.BOARD_ACCEPTED_AT
    words[wire.BOARD_STATE], words[wire.BOARD_ACCEPTED] = wire.BOARD_COUNTED, 7
    record = b"".join(word.to_bytes(8, "little") for word in words)
    os.pwrite(canary.board.fd, record, canary.board.offset(3))
    canary.update_record(past=Counts(accepted=2))

    assert world.delivery.met(canary) == 9
    canary.forget_board()
    assert world.delivery.met(canary) == 2


# -- where no share is possible -----------------------------------------------------------


def only(made: socket.socket, address: str, *, foreign: bool = False) -> Listener:
    """A listener with one socket."""
    made.listen()
    return listener_of(made.detach(), 7, ListenerSettings(address, foreign=foreign), shared=True)


def test_each_listener_that_cannot_share_is_named(world: CanaryWorld) -> None:
    def refused(listener: Listener) -> str:
        found = world.delivery.cannot_share([*world.delivery.listeners, listener])
        assert found is not None
        listener.close()
        return found

    assert world.delivery.cannot_share(world.delivery.listeners) is None
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind("")
    name = f"unix:@{abstract.getsockname()[1:].decode()}"
    assert refused(only(abstract, name)) == (
        f"{name} is a UNIX socket: its name leads to one socket at a time"
    )
    waits = bound()
    waits.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
    assert refused(only(waits, "tcp:127.0.0.1:1")) == (
        "tcp:127.0.0.1:1 has ?defer_accept, so it has one socket for all generations"
    )
    assert refused(only(bound(), "tcp:127.0.0.1:2", foreign=True)) == (
        "tcp:127.0.0.1:2 was passed in without a second socket"
    )
    assert refused(only(bound(), "tcp:127.0.0.1:3")) == (
        "tcp:127.0.0.1:3 has one socket for all generations"
    )


def test_a_path_cannot_share() -> None:
    world = PathWorld()
    try:
        [listener] = world.delivery.listeners
        assert world.delivery.cannot_share([listener]) == (
            f"{listener.settings.address} is a UNIX socket: a path leads to one socket at a time"
        )
    finally:
        world.close()


def test_while_clients_cannot_be_steered_none_can_be_shared(
    world: CanaryWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(95, "not supported")

    with monkeypatch.context() as patched:
        patched.setattr(reuseport, "steer", fails)
        world.draw()
    [listener] = world.delivery.listeners
    assert world.delivery.cannot_share([listener]) == (
        f"{listener.settings.address}: new clients may reach the wrong generation: not supported"
    )


def test_defer_accept_is_drawn_at_the_first_packet_and_counts_with_the_first_byte() -> None:
    """Why a listener with ?defer_accept shares nothing: a client without data is in no backlog."""
    listen = Listen("127.0.0.1:0", port=0, host="127.0.0.1")
    [made] = bind_all([listen], 40, notice=print)
    second = reuseport.make(made.socket)
    assert second is not None
    with made.socket as first, second:
        for each in (first, second):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)
        reuseport.steer(first, 0, {}, 1, WHOLE)
        with socket.create_connection(first.getsockname()) as client:
            assert not events_of(second, 1)
            reuseport.steer(first, 0)
            client.sendall(b"x")
            with second.accept()[0] as accepted:
                assert accepted.recv(1) == b"x"


# -- a kill while a generation is opened -------------------------------------------


def test_a_generation_that_a_kill_left_without_tags_takes_those_of_earlier_generations(
    world: CanaryWorld,
) -> None:
    """Its connections may carry the tags that an earlier generation gave to its socket."""
    first, second = world.generations[1], world.generations[2]
    tags = first.record.accept_tags
    assert tags
    assert second.record.accept_tags
    first.update_record(accept_tags=())
    world.go_on()
    assert second.record.accept_tags, "only an earlier generation's tags may be carried"

    first.update_record(accept_tags=tags)
    second.update_record(accept_tags=())
    world.go_on()
    assert first.record.accept_tags == ()
