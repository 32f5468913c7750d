"""What each delivery promises to all that know the contract alone: real sockets, and one in memory.

A client is told by its port.  Workers are played here: they take when a test lets them.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest
from socketprotector_client import wire

from socketprotector.core.events import BacklogEmptied, Event
from socketprotector.daemon import inherited_listeners
from socketprotector.daemon.delivery import Delivery
from socketprotector.daemon.delivery.host import Host
from socketprotector.daemon.delivery.queue.queue_delivery import QueueDelivery
from socketprotector.daemon.delivery.shared.shared_delivery import SharedDelivery
from socketprotector.daemon.generation import OpenGeneration
from socketprotector.daemon.runtime import Runtime
from socketprotector.launch.bind_unix import give_away
from socketprotector.model.records import GenerationRecord, Program
from socketprotector.model.settings import ListenerSettings, Settings
from socketprotector.system import inherited, reuseport, socket_file
from socketprotector.system.channel import Channel
from socketprotector.system.inherited import Inherited
from socketprotector.system.listener import Listener
from socketprotector.system.listeners import listener_of
from socketprotector.system.loop import Loop
from socketprotector.system.polling import events_of
from tests import memory_delivery
from tests.memory_delivery import MemoryDelivery
from tests.running import DEADLINE_S

FIRST_FD = 3


class World(Host):
    """A delivery, and the generations and clients around it."""

    kind: type[Delivery]

    def __init__(self) -> None:
        self.posted: list[Event] = []
        self.persisted = 0
        self.events: list[str] = []  # logged
        self.lost: list[Listener] = []
        self.generations: dict[int, OpenGeneration] = {}
        self.clients: list[socket.socket] = []
        self.handed: dict[int, list[socket.socket]] = {}  # to a generation's worker
        self.taken: dict[int, list[int]] = {}  # by it
        self.earlier: list[tuple[Delivery, Loop]] = []
        self.loop = Loop()
        self.delivery = self.build([self.listener(0)])

    def build(self, listeners: list[Listener]) -> Delivery:
        self.runtime = Runtime(self.loop, cast("Any", self), self.posted.append, self._persist)
        return self.kind(self, listeners)

    def listener_lost(self, listener: Listener, reason: str) -> None:
        self.lost.append(listener)

    def listener_bound(self, listener: Listener) -> None:
        pass

    def report_untaken(
        self, seconds: float, waiting: int, ever: bool, listen: str | None = None
    ) -> None:
        pass

    @property
    def own_connection(self) -> socket.socket | None:
        return None

    def write(self, level: str, event: str, **fields: object) -> None:
        """As a log."""
        self.events.append(event)

    def _persist(self) -> bool:
        self.persisted += 1
        return True

    @abstractmethod
    def listener(self, index: int) -> Listener: ...

    # -- a generation ----------------------------------------------------------------

    def open(self, number: int) -> OpenGeneration:
        """Open a generation that knows the listeners which there are, with one worker."""
        told = wire.pack_listeners([each.settings.address for each in self.delivery.listeners])
        program = Program("/w", ("w",), "/", (), 0, (), 0, listeners=told)
        made = self.generations[number] = OpenGeneration.adopt(
            GenerationRecord(number, program), None
        )
        self.delivery.open(made, 64, fresh=True)
        self.start_worker(made)
        return made

    def start_worker(self, generation: OpenGeneration) -> None:
        listeners = tuple(each.settings for each in self.delivery.listeners)
        settings = Settings(name="x", command=("w",), directory="/", listeners=listeners)
        free = count(FIRST_FD)
        handles = self.delivery.worker_handles(generation, 0, free, settings)
        number = generation.record.number
        assert [*handles.descriptors] == [*range(FIRST_FD, next(free))]
        assert handles.environment
        self.handed[number] = [
            socket.socket(fileno=os.dup(fd)) for fd in handles.descriptors.values()
        ]
        self.taken[number] = []

    def serving(self, number: int) -> OpenGeneration:
        made = self.open(number)
        self.route_to(number)
        return made

    def route_to(self, number: int) -> None:
        generation = self.generations[number]
        again = generation.record.serving_since > 0.0
        generation.update_record(serving_since=1.0)
        self.delivery.route_to(generation, again=again)

    def replace(self, old: int, new: int) -> None:
        """Have the new one serve, and the old one drain as soon as it may, and end."""
        quiet: list[int] = []
        self.open(new)
        self.route_to(new)
        self.delivery.begin_drain(self.generations[old], lambda: quiet.append(old), reads_on=True)
        self.until(lambda: bool(quiet), old, new)
        assert quiet == [old]
        self.end(old)

    def end(self, number: int) -> None:
        generation = self.generations[number]
        self.delivery.drain(generation)
        assert generation.ended
        while self.take(number):
            pass
        del self.generations[number]
        self.delivery.release(generation)

    @abstractmethod
    def take(self, number: int) -> bool:
        """Have the worker of a generation take a client, if one is there."""

    def count(self, client: int, *numbers: int) -> int:
        return sum(self.taken[number].count(client) for number in numbers)

    # -- clients and time --------------------------------------------------------------

    def connect(self, index: int = 0) -> int:
        """Have a client come; it is told by its port."""
        to = next(each for each in self.delivery.listeners if each.index == index)
        one = socket.socket()
        self.clients.append(one)
        one.setblocking(False)
        assert one.connect_ex(to.local_address) in (0, errno.EINPROGRESS)
        return int(one.getsockname()[1])

    def turn(self) -> None:
        """Let the loop see what is due and ready, without waiting."""
        self.loop.running = True
        self.loop.call_after("end of the turn", 0.0, self._end_turn)
        self.loop.run()

    def _end_turn(self) -> None:
        self.loop.running = False

    def until(self, seen: Callable[[], bool], *takers: int) -> None:
        """Let the loop run, and the workers of these generations take, until something is seen."""
        late = time.monotonic() + DEADLINE_S
        while not seen():
            assert time.monotonic() < late, (self.taken, self.posted, self.events)
            self.turn()
            for number in takers:
                self.take(number)

    # -- the next program ----------------------------------------------------------------

    def go_on(self, *, held: bool = False) -> None:
        """Have another program in this one's place, which is killed."""
        before = self.delivery
        copies = {name: os.dup(fd) for name, fd in before.descriptors().items()}
        self.earlier.append((before, self.loop))
        self.loop = Loop()
        left = Inherited(copies)
        self.delivery = self.build(self._adopted(before, left))
        self.delivery.adopt(before.record(), left, held=held, closing=False)
        for number, each in self.generations.items():
            mine = left.take(inherited.GENERATION, number)
            assert self.delivery.adopt_generation(each, mine, draining=False)
        left.close()

    def _adopted(self, before: Delivery, left: Inherited) -> list[Listener]:
        settings = [each.settings for each in before.listeners]
        return inherited_listeners.adopt(left, settings, self.kind)

    def close(self) -> None:
        for delivery, loop in ((self.delivery, self.loop), *self.earlier):
            delivery.close()
            loop.close()
        for one in (*self.clients, *(each for its in self.handed.values() for each in its)):
            one.close()


def bound() -> socket.socket:
    """A socket bound by its number, as launch/bind.py does."""
    with socket.socket() as chooser:
        chooser.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        chooser.bind(("127.0.0.1", 0))
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(chooser.getsockname())
    return made


class QueueWorld(World):
    kind = QueueDelivery

    def listener(self, index: int) -> Listener:
        made = bound()
        made.listen()
        settings = ListenerSettings(f"tcp:127.0.0.1:{made.getsockname()[1]}")
        return listener_of(made.detach(), index, settings)

    def take(self, number: int) -> bool:
        for one in self.handed[number]:
            taken = Channel(one, one).take_back()
            if taken is not None:
                with socket.socket(fileno=taken[1]) as connection:
                    self.taken[number].append(connection.getpeername()[1])
                return True
        return False


class SharedWorld(World):
    kind = SharedDelivery

    def listener(self, index: int) -> Listener:
        first = bound()
        first.listen()
        second = reuseport.make(first)
        assert second is not None
        settings = ListenerSettings(f"tcp:127.0.0.1:{first.getsockname()[1]}")
        return listener_of(first.detach(), index, settings, shared=True, sibling=second.detach())

    def take(self, number: int) -> bool:
        for one in self.handed[number]:
            if events_of(one, select.POLLIN) == select.POLLIN:
                connection, _ = one.accept()
                with connection:
                    self.taken[number].append(connection.getpeername()[1])
                return True
        return False


class MemoryWorld(World):
    kind = MemoryDelivery

    def listener(self, index: int) -> Listener:
        return memory_delivery.listener(index)

    @property
    def memory(self) -> MemoryDelivery:
        assert isinstance(self.delivery, MemoryDelivery)
        return self.delivery

    def take(self, number: int) -> bool:
        queue = self.memory.queues.get(number)
        if queue:
            self.taken[number].append(queue.pop(0))
        return bool(queue)

    def connect(self, index: int = 0) -> int:
        to = next(each for each in self.delivery.listeners if each.index == index)
        client = 1 + sum(map(len, self.taken.values())) + sum(map(len, self.memory.queues.values()))
        self.memory.connect(to, client)
        return client

    def _adopted(self, before: Delivery, left: Inherited) -> list[Listener]:
        return [*before.listeners]

    def go_on(self, *, held: bool = False) -> None:
        queues = self.memory.queues
        super().go_on(held=held)
        self.memory.queues = queues


@pytest.fixture(params=[QueueWorld, SharedWorld, MemoryWorld], ids=["queue", "shared", "memory"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made: World = request.param()
    yield made
    made.close()


def test_clients_come_to_the_generation_with_the_route_alone(world: World) -> None:
    world.serving(1)
    world.open(2)
    client = world.connect()

    world.until(lambda: client in world.taken[1], 1, 2)

    assert world.taken == {1: [client], 2: []}


def test_clients_wait_for_a_route(world: World) -> None:
    world.open(1)
    client = world.connect()

    world.route_to(1)
    world.until(lambda: client in world.taken[1], 1)


def test_each_client_around_a_switch_is_taken_once(world: World) -> None:
    world.serving(1)
    clients = [world.connect() for _ in range(3)]
    world.replace(1, 2)
    clients += [world.connect() for _ in range(3)]

    world.until(lambda: all(world.count(each, 1, 2) for each in clients), 2)

    assert [world.count(each, 1, 2) for each in clients] == [1] * 6
    assert {*clients[3:]} <= {*world.taken[2]}


def test_generations_follow_each_other_without_end(world: World) -> None:
    world.serving(1)
    for number in range(2, 6):
        world.replace(number - 1, number)
        client = world.connect()
        world.until(lambda n=number, c=client: c in world.taken[n], number)  # type: ignore[misc]
        assert not world.delivery.keeps(number - 1)


def test_a_release_that_fails_leaves_the_route_where_it_is(world: World) -> None:
    world.serving(1)
    world.open(2)
    world.end(2)
    client = world.connect()

    world.until(lambda: client in world.taken[1], 1)


def test_the_route_goes_back_to_one_that_has_had_it(world: World) -> None:
    world.serving(1)
    world.serving(2)
    world.route_to(1)
    client = world.connect()

    world.until(lambda: client in world.taken[1], 1, 2)

    assert world.taken[2] == []


def test_it_is_known_how_many_clients_a_generation_has_not_taken(world: World) -> None:
    generation = world.serving(1)
    clients = [world.connect() for _ in range(2)]
    world.until(lambda: world.delivery.waiting(generation) == len(clients))

    world.take(1)
    assert world.delivery.waiting(generation) == 1


def test_an_order_that_is_carried_out_twice_is_carried_out(world: World) -> None:
    world.serving(1)
    world.open(2)
    for _ in range(2):
        world.route_to(2)
        world.delivery.drain(world.generations[1])
        world.delivery.hold(False)
    client = world.connect()

    world.until(lambda: client in world.taken[2], 2)


def test_nobody_gets_the_clients_of_a_hold_before_it_is_over(world: World) -> None:
    world.serving(1)
    assert world.delivery.cannot_hold() is None
    world.delivery.hold(True)
    client = world.connect()
    world.turn()
    assert not world.take(1)

    world.delivery.hold(False)
    world.until(lambda: client in world.taken[1], 1)


def test_a_generation_is_asked_that_gets_no_clients(world: World) -> None:
    world.serving(1)
    tried = world.open(2)
    way = world.delivery.reach(tried, "")
    if not world.delivery.can_ask(""):
        assert way is None
        return
    assert way is not None
    assert world.delivery.reach(tried, "no such listener") is None
    one = way.connecting()
    world.clients.append(one)
    assert one.connect_ex(way.connect_address) in (0, errno.EINPROGRESS)
    question = one.getsockname()[1]
    assert way.waits(one)

    world.until(lambda: question in world.taken[2], 1, 2)

    assert not way.waits(one)
    assert way.holds()
    assert world.taken[1] == []
    way.close()


def test_the_one_that_serves_is_asked_as_clients_ask_it(world: World) -> None:
    way = world.delivery.reach(world.serving(1), "", as_client=True)
    if way is None:
        assert not world.delivery.can_ask("")
        return
    one = way.connecting()
    world.clients.append(one)
    assert one.connect_ex(way.connect_address) in (0, errno.EINPROGRESS)

    world.until(lambda: one.getsockname()[1] in world.taken[1], 1)
    way.close()


def test_clients_of_an_added_listener_come_to_the_first_that_knows_it(world: World) -> None:
    world.serving(1)
    added = world.listener(1)
    assert world.delivery.cannot_add([added]) is None
    world.delivery.add(added, dry_run=False)
    client = world.connect(1)
    world.turn()
    assert not world.take(1)

    world.serving(2)
    world.until(lambda: client in world.taken[2], 1, 2)


def test_clients_of_a_removed_listener_are_served_that_had_connected(world: World) -> None:
    world.delivery.add(world.listener(1), dry_run=False)
    world.serving(1)
    client = world.connect(1)
    world.until(lambda: bool(world.delivery.waiting(world.generations[1])))

    world.delivery.remove(world.delivery.listeners[1])
    assert [each.index for each in world.delivery.listeners] == [0]
    world.until(lambda: client in world.taken[1], 1)


def test_a_graceful_end_serves_those_who_have_connected(world: World) -> None:
    generation = world.serving(1)
    client = world.connect()

    world.delivery.close_listeners(generation, quick=False)
    world.until(lambda: BacklogEmptied() in world.posted and client in world.taken[1], 1)

    assert world.delivery.listeners == ()
    assert world.posted.count(BacklogEmptied()) == 1


def test_it_says_how_many_wait_at_a_listener_and_how_many_can(world: World) -> None:
    [listener] = world.delivery.listeners
    world.connect()
    world.until(lambda: (world.delivery.backlog(listener) or (0, 0))[0] == 1)
    found = world.delivery.backlog(listener)

    assert found is not None
    assert found[1] > 1


def test_a_quick_end_waits_for_nobody(world: World) -> None:
    generation = world.serving(1)
    world.connect()

    world.delivery.close_listeners(generation, quick=True)

    assert world.delivery.listeners == ()
    assert world.posted == []


def test_the_next_program_serves_those_who_wait(world: World) -> None:
    world.serving(1)
    waiting = world.connect()
    world.until(lambda: bool(world.delivery.waiting(world.generations[1])))

    world.go_on()
    world.route_to(1)
    later = world.connect()
    world.until(lambda: {waiting, later} <= {*world.taken[1]}, 1)

    assert world.count(waiting, 1) == 1
    world.replace(1, 2)
    client = world.connect()
    world.until(lambda: client in world.taken[2], 2)


def test_the_next_program_goes_on_with_a_switch(world: World) -> None:
    """It was killed when the new one had the route, and the old one had yet to finish."""
    world.serving(1)
    world.serving(2)
    world.go_on()
    world.route_to(2)
    quiet: list[int] = []
    world.delivery.begin_drain(world.generations[1], lambda: quiet.append(1), reads_on=True)
    world.until(lambda: quiet == [1], 1, 2)
    world.end(1)
    client = world.connect()

    world.until(lambda: client in world.taken[2], 2)


@pytest.mark.parametrize("world", [QueueWorld, SharedWorld], ids=["queue", "shared"], indirect=True)
def test_a_socket_that_somebody_has_shut_down_gets_clients_again(world: World) -> None:
    world.serving(1)
    world.delivery.listeners[0].socket.shutdown(socket.SHUT_RDWR)
    world.until(lambda: "listens-again" in world.events)
    client = world.connect()

    world.until(lambda: client in world.taken[1], 1)
    assert world.lost == []


@pytest.mark.parametrize(
    ("name", "earlier"),
    [
        (inherited.SIBLING + "0.1", inherited.RESERVED + "0"),
        (inherited.SIBLING + "0.1", inherited.LISTENER + "0"),
    ],
)
def test_a_socket_that_a_killed_program_left_under_two_names_is_one(
    request: pytest.FixtureRequest, name: str, earlier: str
) -> None:
    """Two generations would accept from it."""
    world = SharedWorld()
    request.addfinalizer(world.close)
    [before] = world.delivery.listeners
    before.reserve()
    found = {each: os.dup(fd) for each, fd in before.descriptors().items()}
    found[name] = os.dup(found[earlier])

    left = Inherited(found)
    [listener] = inherited_listeners.adopt(left, [before.settings], SharedDelivery)

    left.close()
    fds = listener.descriptors().values()
    assert len({os.fstat(each).st_ino for each in fds}) == len(fds) == 2
    for each in (*listener.sockets, listener._reserved):
        if each is not None:
            each.close()


def test_none_is_tried_while_clients_come_to_the_socket_that_it_would_have(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    world = SharedWorld()
    request.addfinalizer(world.close)
    world.serving(1)
    world.open(2)
    with monkeypatch.context() as patched:
        patched.setattr(reuseport, "steer", fail)
        world.route_to(2)
        world.end(1)
        client = world.connect()
        assert world.delivery.cannot_try()
        world.open(3)
        world.until(lambda: client in world.taken[3], 2, 3)  # else it would be tried with clients

    world.until(lambda: world.delivery.cannot_try() is None)


def test_connections_are_counted_for_no_generation_once_several_share_a_socket(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    world = SharedWorld()
    request.addfinalizer(world.close)
    first, second = world.serving(1), world.serving(2)
    assert [world.delivery.active(each) for each in (first, second)] == [0, 0]
    [listener] = world.delivery.listeners
    monkeypatch.setattr(listener, "bind_anew", fail)
    assert isinstance(world.delivery, SharedDelivery)
    world.delivery.steering._repairs.replace(listener, second.record.socket_number)

    assert [world.delivery.active(each) for each in (first, second)] == [None, None]


def test_a_generation_is_asked_at_a_path_that_had_one_socket_left(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """It gets one of its own, so none is refused because it could not be asked."""
    world = SharedWorld()
    request.addfinalizer(world.close)
    path = str(tmp_path / "s")
    one = socket_file.bind(path, 16, (-1, -1, 0o600, None), give_away)
    socket_file.lead_to(path, one, [one])
    found = os.lstat(path)
    settings = ListenerSettings(f"unix:{path}", found.st_dev, found.st_ino, 16)
    left = listener_of(one.detach(), 0, settings, shared=True)
    for each in world.delivery.listeners:
        world.delivery.remove(each)
    world.delivery.add(left, dry_run=False)

    assert world.delivery.can_ask("")
    tried = world.open(1)

    way = world.delivery.reach(tried, "")
    assert way is not None
    way.close()


class PathWorld(SharedWorld):
    """The shared delivery at a UNIX path, each generation with a socket of its own."""

    def listener(self, index: int) -> Listener:
        self.folder = tempfile.TemporaryDirectory()
        path = f"{self.folder.name}/s{index}"
        first, second = (socket_file.bind(path, 16, (-1, -1, 0o600, None), give_away) for _ in "12")
        socket_file.lead_to(path, first, [first, second])
        found = os.lstat(path)
        settings = ListenerSettings(f"unix:{path}", found.st_dev, found.st_ino, 16, beside=True)
        return listener_of(first.detach(), index, settings, shared=True, sibling=second.detach())

    def connect_unix(self, address: str = "") -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        self.clients.append(client)
        client.connect(address or self.delivery.listeners[0].local_address[0])
        return client

    def take(self, number: int) -> bool:
        for one in self.handed[number]:
            if events_of(one, select.POLLIN) == select.POLLIN:
                one.accept()[0].close()
                self.taken[number].append(1)
                return True
        return False

    def close(self) -> None:
        super().close()
        self.folder.cleanup()


@pytest.fixture
def at_path() -> Iterator[PathWorld]:
    made = PathWorld()
    yield made
    made.close()


def test_a_graceful_end_awaits_no_client_of_a_release_that_was_called_off(
    at_path: PathWorld,
) -> None:
    """No worker accepts from its socket any more."""
    serving = at_path.serving(1)
    tried = at_path.open(2)
    at_path.connect_unix(at_path.delivery.listeners[0].address_of(tried.record.socket_number)[0])
    at_path.delivery.drain(tried)
    del at_path.generations[2]
    at_path.delivery.release(tried)
    client = at_path.connect_unix()

    at_path.delivery.close_listeners(serving, quick=False)
    at_path.until(lambda: BacklogEmptied() in at_path.posted, 1)

    assert at_path.taken[1] == [1]
    assert client.recv(1) == b""


def test_a_graceful_end_awaits_no_probe_that_has_come_beside_a_client_of_a_hold(
    at_path: PathWorld,
) -> None:
    serving = at_path.serving(1)
    at_path.delivery.hold(True)
    at_path.connect_unix()
    at_path.connect_unix().close()  # a probe that was abandoned
    at_path.delivery.hold(False)

    at_path.delivery.close_listeners(serving, quick=False)
    at_path.until(lambda: BacklogEmptied() in at_path.posted, 1)
