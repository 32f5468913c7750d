"""A share of the new connections goes to a second queue: exact, and no client waits for it.

Real sockets and channels, and the same in memory.
"""

from __future__ import annotations

import errno
import os
import random
import select
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from socketprotector.core.events import BacklogEmptied, ChannelBroken, Untaken
from socketprotector.daemon.delivery.queue import canary
from socketprotector.daemon.delivery.queue.queue_delivery import QueueDelivery
from socketprotector.model.share import WHOLE
from tests.boundary.deliveries import WORLDS, World

HALF = WHOLE // 2


@pytest.fixture(params=["queue", "queue_unix", "memory"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """A world whose generation 1 serves; there is a second listener."""
    made = WORLDS[request.param]()
    made.add(made.listener(1))
    made.serving(1)
    yield made
    made.close()


@pytest.fixture
def real(request: pytest.FixtureRequest) -> Iterator[World]:
    """The same over TCP alone."""
    made = WORLDS["queue"]()
    made.add(made.listener(1))
    made.serving(1)
    yield made
    made.close()


@pytest.fixture(params=[False, True], ids=["lives", "killed"])
def kills(request: pytest.FixtureRequest) -> bool:
    """Whether the protector is killed after each order, and the next program goes on."""
    return bool(request.param)


def come(world: World, count: int, listeners: int = 2) -> list[int]:
    """Let clients come one by one, to one listener after the other; return their numbers."""
    clients = []
    for n in range(count):
        before = queued(world)
        clients.append(world.connect(n % listeners))
        world.until(lambda before=before: queued(world) > before)  # type: ignore[misc]
    return clients


def queued(world: World) -> int:
    """How many connections wait in the queues of all generations."""
    return sum(world.delivery.waiting(each) or 0 for each in world.generations.values())


def take_all(world: World, *numbers: int) -> None:
    for number in numbers:
        while world.delivery.waiting(world.generations[number]):
            world.take(number)


def share_with(world: World, share: int, *, queue: int = 64) -> None:
    """Open generation 2, and give it a share."""
    world.open(2, queue=queue)
    world.route_to(1, 2, share)


def met(world: World, number: int) -> int | None:
    return world.delivery.met(world.generations[number])


def test_any_run_of_clients_over_all_listeners_has_the_share(world: World) -> None:
    draw = random.Random(33)
    share_with(world, HALF)
    for _ in range(4):
        share = draw.randrange(1, WHOLE)
        world.route_to(1, 2, share)
        clients = come(world, 50)
        take_all(world, 1, 2)
        chosen = [client in world.taken[2] for client in clients]
        for begin in range(50):
            for end in range(begin, 51):
                run = chosen[begin:end]
                assert len(run) * share // WHOLE <= sum(run) <= -(-len(run) * share // WHOLE)


def test_each_client_is_taken_once_whatever_happens_to_the_protector(
    world: World, kills: bool
) -> None:
    world.kills = kills
    clients = come(world, 4)
    share_with(world, HALF)
    clients += come(world, 10)
    world.route_to(1, 2, WHOLE // 5)  # a rolling reload: another share
    clients += come(world, 10)
    assert met(world, 2) == 5 + 2
    world.route_to(2)
    clients += come(world, 10)
    assert met(world, 2) == 5 + 2 + 10
    world.drain(1)
    take_all(world, 2, 1)

    assert [world.count(each, 1, 2) for each in clients] == [1] * len(clients)
    assert not world.delivery.lost


def test_a_canary_that_is_called_off_gives_its_clients_back(world: World, kills: bool) -> None:
    world.kills = kills
    share_with(world, HALF)
    clients = come(world, 10)
    assert world.delivery.waiting(world.generations[2]) == 5
    world.route_to(1)
    world.end(2)
    clients += come(world, 10)
    take_all(world, 1)

    assert sorted(world.taken[1]) == sorted(clients)
    assert world.taken[2] == []
    assert not world.delivery.keeps(2)


def test_a_client_of_a_hold_comes_to_one_of_both_afterwards(world: World, kills: bool) -> None:
    world.kills = kills
    share_with(world, HALF)
    world.hold(True)
    clients = [world.connect(n % 2) for n in range(4)]
    for _ in range(3):
        world.turn()
    assert not queued(world)
    world.route_to(1, 2, HALF + 1)
    world.turn()
    assert not queued(world)
    world.hold(False)
    world.until(lambda: queued(world) == len(clients))
    take_all(world, 1, 2)

    assert [world.count(each, 1, 2) for each in clients] == [1] * 4
    assert world.taken[2]


def test_a_graceful_end_serves_the_clients_of_both(world: World) -> None:
    share_with(world, HALF)
    clients = [world.connect(n % 2) for n in range(6)]
    world.delivery.close_listeners(world.generations[1], quick=False)
    world.until(lambda: BacklogEmptied() in world.posted, 1, 2)
    take_all(world, 1, 2)

    assert [world.count(each, 1, 2) for each in clients] == [1] * 6
    assert world.delivery.listeners == ()


def test_clients_of_a_listener_that_the_canary_does_not_know_stay_with_the_route(
    world: World, kills: bool
) -> None:
    world.kills = kills
    world.open(2)
    made = world.generations[2]
    made.update_record(knows=frozenset({0}))
    world.route_to(1, 2, HALF)
    [client] = [come_to(world, 1)]
    clients = [come_to(world, 0) for _ in range(4)]
    take_all(world, 1, 2)

    assert client in world.taken[1]
    assert len([each for each in clients if each in world.taken[2]]) == 2
    world.remove(1)


def come_to(world: World, listener: int) -> int:
    before = queued(world)
    client = world.connect(listener)
    world.until(lambda: queued(world) > before)
    return client


def test_clients_of_a_listener_that_the_canary_alone_knows_come_to_it(
    world: World, kills: bool
) -> None:
    world.kills = kills
    world.add(world.listener(2))
    share_with(world, 1)
    client = come_to(world, 2)
    others = come(world, 4)
    take_all(world, 1, 2)

    assert world.taken == {1: others, 2: [client]}


def test_a_canary_that_fails_serves_the_clients_that_only_it_can(real: World, kills: bool) -> None:
    real.kills = kills
    real.add(real.listener(2))
    share_with(real, HALF)
    clients = [come_to(real, listener) for listener in (2, 0, 2, 0)]
    real.route_to(1)
    real.remove(2)
    real.draining.add(2)
    real.delivery.drain(real.generations[2])  # it ends after the removed listener
    real.until(lambda: {*clients} <= {*real.taken[1], *real.taken[2]}, 1, 2)

    assert real.taken == {1: clients[1::2], 2: clients[::2]}
    assert not real.delivery.lost


def test_its_counts_are_those_of_its_queue(world: World) -> None:
    share_with(world, HALF)
    come(world, 6)

    assert [world.delivery.waiting(each) for each in world.generations.values()] == [3, 3]
    assert [met(world, number) for number in (1, 2)] == [3, 3]
    limits = [world.delivery.queue_limit(each) for each in world.generations.values()]
    assert limits[0] == limits[1]


def test_what_a_generation_has_met_survives_the_program(world: World) -> None:
    clients = come(world, 5)
    share_with(world, WHOLE // 5)
    clients += come(world, 10)
    world.go_on()
    assert [met(world, number) for number in (1, 2)] == [5 + 8, 2]
    clients += come(world, 5)

    assert [met(world, number) for number in (1, 2)] == [5 + 8 + 4, 3]
    take_all(world, 1, 2)
    assert {*clients} == {*world.taken[1], *world.taken[2]}


# -- a queue that is full, broken or not taken -------------------------------------------


def test_a_full_canary_delays_no_client(real: World) -> None:
    share_with(real, HALF, queue=2)
    room = real.delivery.queue_limit(real.generations[2]) or 0
    clients = come(real, 2 * room + 20)

    assert real.delivery.waiting(real.generations[2]) == room
    assert met(real, 2) == room
    take_all(real, 1, 2)
    later = come(real, 10)  # it gets its share again
    take_all(real, 1, 2)
    assert len([each for each in later if each in real.taken[2]]) == 5
    assert sorted(real.taken[1] + real.taken[2]) == clients + later
    assert "resources-exhausted" not in real.events


@pytest.mark.parametrize("kind", ["shared", "alone"])
@pytest.mark.parametrize(
    "code", [errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS, errno.EAGAIN, errno.EPIPE]
)
def test_no_failure_of_the_canary_delays_a_client_of_the_route(
    real: World, monkeypatch: pytest.MonkeyPatch, code: int, kind: str
) -> None:
    real.add(real.listener(2))
    real.open(2)
    assert isinstance(real.delivery, QueueDelivery)
    channel = real.delivery._channels[2]
    failing = Failing(channel.write, code)
    monkeypatch.setattr(channel, "write", failing)
    real.route_to(1, 2, HALF)
    own = [real.connect(2) for _ in range(3)] if kind == "alone" else []
    if own:
        real.until(lambda: bool(failing.failures))
    clients = come(real, 8)
    take_all(real, 1)

    assert sorted(real.taken[1]) == clients
    assert failing.failures
    assert "resources-exhausted" not in real.events
    failing.code = 0
    real.until(lambda: {*own} <= {*real.taken[2]}, 1, 2)
    assert not real.delivery.lost


class Failing:
    """A write end whose sends fail with an errno; 0: no longer."""

    def __init__(self, end: socket.socket, code: int) -> None:
        self.end, self.code, self.failures = end, code, 0

    def sendmsg(self, *message: object) -> object:
        if self.code:
            self.failures += 1
            raise OSError(self.code, os.strerror(self.code))
        return self.end.sendmsg(*message)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> object:
        return getattr(self.end, name)


def test_clients_that_only_a_full_canary_can_serve_wait_alone(real: World, kills: bool) -> None:
    real.kills = kills
    real.add(real.listener(2))
    share_with(real, 1, queue=2)
    room = real.delivery.queue_limit(real.generations[2]) or 0
    own = [real.connect(2) for _ in range(room + 5)]
    real.until(lambda: real.delivery.waiting(real.generations[2]) == room)
    clients = come(real, 4)
    take_all(real, 1)
    assert real.taken[1] == clients

    real.until(lambda: {*own} <= {*real.taken[2]}, 2)
    assert real.taken[2] == own  # in the order in which they came
    assert not real.delivery.lost


def break_canary(real: World) -> None:
    """Shut down the channel of canary 2, and wait until a look has taken its clients back."""
    real.handed[2][0].shutdown(socket.SHUT_RDWR)
    real.until(lambda: not queued(real))


def assert_next_takes(real: World, clients: list[int]) -> None:
    """Open generation 3, which serves the clients of canary 2 in their order."""
    real.open(3)
    real.route_to(3)
    real.end(2)
    real.until(lambda: {*clients} <= {*real.taken[3]}, 3)
    assert real.taken[3] == clients
    assert not real.delivery.lost


def test_clients_that_only_a_broken_canary_could_serve_keep_their_order(real: World) -> None:
    real.add(real.listener(2))
    share_with(real, HALF)
    own = [come_to(real, 2) for _ in range(4)]
    break_canary(real)

    assert_next_takes(real, own)


def test_the_clients_of_a_broken_canary_come_before_those_that_it_had_no_room_for(
    real: World,
) -> None:
    real.add(real.listener(2))
    share_with(real, 1, queue=2)
    room = real.delivery.queue_limit(real.generations[2]) or 0
    own = [real.connect(2) for _ in range(room + 1)]
    real.until(lambda: real.delivery.waiting(real.generations[2]) == room)
    assert isinstance(real.delivery, QueueDelivery)
    undelivered = real.delivery.forwarder.undelivered
    real.until(lambda: len(undelivered.waiting) == 1)
    break_canary(real)

    assert_next_takes(real, own)


def test_a_broken_canary_is_reported_and_its_clients_go_to_the_route(real: World) -> None:
    share_with(real, HALF)
    real.handed[2][0].shutdown(socket.SHUT_RDWR)
    clients = come(real, 6)

    take_all(real, 1)
    assert real.taken[1] == clients
    assert any(isinstance(e, ChannelBroken) and e.generation == 2 for e in real.posted)


def test_a_full_route_makes_the_clients_wait_as_without_a_canary(real: World) -> None:
    real.open(2)
    real.open(3, queue=2)
    real.route_to(3, 2, HALF)
    room = real.delivery.queue_limit(real.generations[3]) or 0
    clients = come(real, 2 * room)
    late = [real.connect(n % 2) for n in range(10)]

    real.until(lambda: {*late} <= {*real.taken[2], *real.taken[3]}, 2, 3)
    assert sorted(real.taken[2] + real.taken[3]) == clients + late
    assert not real.delivery.lost


def test_a_canary_whose_workers_take_nothing_is_reported_once(real: World) -> None:
    share_with(real, HALF)
    clients = come(real, 4)
    real.until(lambda: bool(real.posted), 1)
    [failed] = real.posted
    assert isinstance(failed, Untaken)
    assert failed.generation == 2
    assert failed.reason == "no worker has accepted a connection yet; clients waiting: 2"
    assert real.delivery.is_stuck(real.generations[2])
    waited_s = real.delivery.untaken_s(real.generations[2])
    assert waited_s is not None
    assert waited_s >= canary.CANARY_NEVER_TAKEN_S
    assert real.delivery.untaken_s(real.generations[1]) is None

    real.route_to(1)
    real.end(2)
    take_all(real, 1)
    assert sorted(real.taken[1]) == clients
    assert real.delivery.untaken_s(real.generations[1]) is None


def test_another_worker_is_woken_for_a_client_that_stays_in_its_queue(real: World) -> None:
    share_with(real, HALF)
    with closing(select.epoll()) as woken:
        woken.register(real.handed[2][0], select.EPOLLIN | select.EPOLLET)
        clients = come(real, 6)
        assert woken.poll(0)  # a worker that is suspended before it takes

        real.until(lambda: bool(woken.poll(0)), 1)

    take_all(real, 1, 2)
    assert real.taken[2] == [each for each in clients if each not in real.taken[1]]
    assert len(real.taken[2]) == 3


def test_a_probe_of_a_canary_is_told_from_its_clients(real: World) -> None:
    share_with(real, WHOLE // 5)
    target = real.delivery.reach(real.generations[2], "")
    assert target is not None
    probe = real.probe(target)
    real.until(lambda: real.delivery.waiting(real.generations[2]) == 1)
    come(real, 5)
    assert real.waits(target, probe)
    real.take(2)
    assert real.taken[2] == [probe]
    assert not real.waits(target, probe)  # although a client waits

    real.route_to(2)  # the next stage
    come(real, 5)
    assert not real.waits(target, probe)
    target.close()
