"""The worlds in which a story of a delivery happens: real sockets of each kind, and memory.

A client has a number.  Workers are played here: they take clients when a story lets them.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable
from itertools import count
from typing import Any, cast

import pytest
from socketprotector_client import wire

from socketprotector.core.events import Event
from socketprotector.daemon import inherited_listeners
from socketprotector.daemon.delivery import Delivery
from socketprotector.daemon.delivery.host import Host
from socketprotector.daemon.delivery.probe_target import ProbeTarget
from socketprotector.daemon.delivery.queue.queue_delivery import QueueDelivery
from socketprotector.daemon.delivery.shared.shared_delivery import SharedDelivery
from socketprotector.daemon.generation import OpenGeneration
from socketprotector.daemon.runtime import Runtime
from socketprotector.launch.bind_unix import bind_unix, give_away
from socketprotector.launch.listen_spec import Listen
from socketprotector.model.records import GenerationRecord, Program
from socketprotector.model.settings import ListenerSettings, Settings
from socketprotector.system import inherited, reuseport, socket_file
from socketprotector.system.channel import Channel
from socketprotector.system.inherited import Inherited
from socketprotector.system.listener import Listener
from socketprotector.system.listeners import listener_of
from socketprotector.system.loop import Loop
from socketprotector.system.polling import events_of
from socketprotector.system.scoped import SocketAddress
from tests import memory_delivery
from tests.boundary import ending
from tests.memory_delivery import MemoryDelivery
from tests.running import DEADLINE_S

FIRST_FD = 3
BACKLOG = 16


class World(Host):
    """A delivery, and the generations and clients around it."""

    kind: type[Delivery]
    #: After a hold, only a new generation gets the clients that waited.
    renews = False
    #: During a hold a client gets no answer.
    is_silent_on_hold = True

    def __init__(self) -> None:
        self.posted: list[Event] = []
        self.persisted = 0
        self.events: list[str] = []  # logged
        self.lines: dict[str, dict[str, object]] = {}  # the last line of each event
        self.lost: list[Listener] = []
        self.removed: list[Listener] = []
        self.generations: dict[int, OpenGeneration] = {}
        self.released: dict[int, OpenGeneration] = {}  # whose clients still wait
        self.draining: set[int] = set()
        self.route: int | None = None
        self.sharing: int | None = None  # the generation with a share, and that share
        self.share = 0
        self.held = False
        self.kills = False  # a kill after each order
        self.numbers = count(1)  # of clients and probes
        self.clients: dict[int, socket.socket] = {}
        self.names: dict[object, int] = {}  # a client's number, by its end's name
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
        """Note a line of the log."""
        self.events.append(event)
        self.lines[event] = fields

    def _persist(self) -> bool:
        self.persisted += 1
        return True

    @abstractmethod
    def listener(self, index: int) -> Listener:
        """Make a listener, as the launching process does."""

    # -- a generation ----------------------------------------------------------------

    def open(self, number: int, *, queue: int = 64, without: int = -1) -> OpenGeneration:
        """Open a generation that knows the present listeners but one, with one worker."""
        known = [
            each.settings.address if each.index != without else "-"
            for each in self.delivery.listeners
        ]
        listeners = wire.pack_listeners(known)
        program = Program("/w", ("w",), "/", (), 0, (), 0, listeners=listeners)
        made = self.generations[number] = OpenGeneration.adopt(
            GenerationRecord(number, program), None
        )
        self.delivery.open(made, queue, fresh=True)
        self.start_worker(made)
        self._ordered()
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

    def route_to(self, number: int | None, sharing: int | None = None, share: int = 0) -> None:
        self.route, self.sharing, self.share = number, sharing, share
        self._route()
        self._ordered()

    def _route(self) -> None:
        generation = self.generations[self.route] if self.route is not None else None
        again = generation is not None and generation.record.serving_since > 0.0
        sharing = self.generations[self.sharing] if self.sharing is not None else None
        for each in filter(None, (generation, sharing)):
            each.update_record(serving_since=1.0)
        self.delivery.route_to(generation, served_before=again, sharing=sharing, share=self.share)

    def replace(self, old: int, new: int) -> None:
        """Route clients to a new generation; drain and end the old one as soon as it may."""
        quiet: list[int] = []
        self.open(new)
        self.route_to(new)
        self.delivery.begin_drain(self.generations[old], lambda: quiet.append(old), reads_on=True)
        self.until(lambda: bool(quiet), old, new)
        assert quiet == [old]
        self.end(old)

    def drain(self, number: int) -> None:
        self.draining.add(number)
        self.delivery.drain(self.generations[number])
        assert self.generations[number].is_finishing
        self._ordered()

    def end(self, number: int) -> None:
        """Drain a generation, let its worker take all clients and exit, and release it."""
        self.drain(number)
        while self.take(number):
            pass
        self.release(number)

    def release(self, number: int) -> None:
        generation = self.generations.pop(number)
        self.draining.discard(number)
        self.delivery.release(generation)
        if self.delivery.keeps(number):
            generation.update_record(released=True)
            self.released[number] = generation
        self._ordered()

    def hold(self, on: bool) -> None:
        self.held = on
        self.delivery.hold(on)
        self._ordered()

    def add(self, listener: Listener, *, dry_run: bool = False) -> None:
        assert self.delivery.cannot_change([listener], []) is None
        self.delivery.add(listener, dry_run=dry_run)
        self._ordered()

    def remove(self, index: int) -> None:
        removed = next(each for each in self.delivery.listeners if each.index == index)
        self.delivery.remove(removed)
        self.removed.append(removed)
        self._ordered()

    def _ordered(self) -> None:
        if self.kills:
            self.go_on()

    def take(self, number: int) -> bool:
        """Let the worker of a generation take a client, if there is one."""
        for one in self.handed[number]:
            connection = self.accept(one)
            if connection is not None:
                with connection:
                    self.taken[number].append(self.names[connection.getpeername()])
                return True
        return False

    @abstractmethod
    def accept(self, handed: socket.socket) -> socket.socket | None:
        """Return a client's connection from what a worker was handed; None: there is none."""

    def count(self, client: int, *numbers: int) -> int:
        return sum(self.taken.get(number, []).count(client) for number in numbers)

    # -- clients and time --------------------------------------------------------------

    def connect(self, index: int = 0) -> int:
        """Connect a client to a listener, and return its number."""
        to = next(each for each in self.delivery.listeners if each.index == index)
        host, port = to.local_address
        return self.connect_to(socket.socket(to.socket.family), (host, port) if port else host)

    def connect_to(self, one: socket.socket, address: SocketAddress | str) -> int:
        """Connect a client or a probe, which then belongs to this world; return its number."""
        number = next(self.numbers)
        self.clients[number] = one
        one.setblocking(False)
        if one.family == socket.AF_UNIX:
            one.bind("")  # the kernel draws an abstract name, which the worker's end reports
        elif one.getsockname() == ("0.0.0.0", 0):
            one.bind(("127.0.0.1", 0))  # without it, clients of two listeners may share a port
        assert one.connect_ex(address) in (0, errno.EINPROGRESS)
        self.names[one.getsockname()] = number
        return number

    def probe(self, target: ProbeTarget) -> int:
        """Connect a probe of a generation, and return its number."""
        if target.give is None:
            return self.connect_to(target.connecting(), target.connect_address)
        one, code = target.connect()
        assert code == 0
        number = next(self.numbers)
        self.clients[number] = one
        self.names[one.getsockname()] = number
        return number

    def waits(self, target: ProbeTarget, probe: int) -> bool:
        """Return whether no worker has accepted a probe yet."""
        return target.waits(self.clients[probe])

    def turn(self) -> None:
        """Let the loop see what is due and ready, without waiting."""
        ending.turn(self.loop)

    def until(self, seen: Callable[[], bool], *takers: int) -> None:
        """Let the loop run, and these generations' workers take, until something is seen."""
        late = time.monotonic() + DEADLINE_S
        while not seen():
            assert time.monotonic() < late, (self.taken, self.posted, self.events)
            self.turn()
            for number in takers:
                self.take(number)

    # -- the next program ----------------------------------------------------------------

    def go_on(self, *, closing: bool = False) -> None:
        """Kill this program; the next one adopts everything, and repeats the orders in force.

        closing: a stop had closed the listeners.
        """
        before = self.delivery
        self.released = {n: each for n, each in self.released.items() if before.keeps(n)}
        copies = {name: os.dup(fd) for name, fd in before.descriptors().items()}
        self.earlier.append((before, self.loop))
        self.loop = Loop()
        left = Inherited(copies)
        self.delivery = self.build(self._adopted(before, left))
        self.delivery.adopt(before.record(), left, held=self.held, closing=closing)
        for number, each in (self.generations | self.released).items():
            mine = left.take(inherited.GENERATION, number)
            draining = number in self.draining
            assert self.delivery.adopt_generation(each, mine, draining=draining)
        left.close()
        gone = {each.index for each in self.removed}
        for listener in [each for each in self.delivery.listeners if each.index in gone]:
            self.delivery.remove(listener)
        for each in self.released.values():
            self.delivery.release(each)
        if self.held:
            self.delivery.hold(True)
        self._route()
        for number in self.draining:
            self.delivery.drain(self.generations[number])

    def _adopted(self, before: Delivery, left: Inherited) -> list[Listener]:
        known = sorted((*before.listeners, *self.removed), key=lambda each: each.index)
        settings = [each.settings for each in known]
        return inherited_listeners.adopt(left, settings, self.kind)

    def close(self) -> None:
        for delivery, loop in ((self.delivery, self.loop), *self.earlier):
            delivery.close()
            loop.close()
        for handed in (self.clients.values(), *self.handed.values()):
            for one in handed:
                one.close()


def bound() -> socket.socket:
    """Return a socket bound by its number, as launch/bind.py does."""
    with socket.socket() as chooser:
        chooser.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        chooser.bind(("127.0.0.1", 0))
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(chooser.getsockname())
    return made


class QueueWorld(World):
    """The protector accepts, over TCP."""

    kind = QueueDelivery
    is_silent_on_hold = False

    def listener(self, index: int) -> Listener:
        made = bound()
        made.listen()
        settings = ListenerSettings(f"tcp:127.0.0.1:{made.getsockname()[1]}")
        return listener_of(made.detach(), index, settings)

    def accept(self, handed: socket.socket) -> socket.socket | None:
        taken = Channel(handed, handed).take_back()
        return socket.socket(fileno=taken[1]) if taken is not None else None


class SharedWorld(World):
    """Workers accept, over TCP."""

    kind = SharedDelivery

    def listener(self, index: int) -> Listener:
        first = bound()
        first.listen()
        second = reuseport.make(first)
        assert second is not None
        settings = ListenerSettings(f"tcp:127.0.0.1:{first.getsockname()[1]}")
        return listener_of(first.detach(), index, settings, shared=True, sibling=second.detach())

    def accept(self, handed: socket.socket) -> socket.socket | None:
        return handed.accept()[0] if events_of(handed, select.POLLIN) == select.POLLIN else None


class UnixWorld(World):
    """A world whose listeners have paths, in a folder of its own."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        super().__init__()

    def close(self) -> None:
        super().close()
        self.folder.cleanup()

    def bind(self, index: int, *, beside: bool) -> tuple[socket.socket, ListenerSettings]:
        path = f"{self.folder.name}/s{index}"
        return bind_unix(Listen(path, path=path), path, BACKLOG, beside=beside)


class QueueUnixWorld(UnixWorld, QueueWorld):
    """The protector accepts, at a path."""

    def listener(self, index: int) -> Listener:
        made, settings = self.bind(index, beside=False)
        return listener_of(made.detach(), index, settings)


class PathWorld(UnixWorld, SharedWorld):
    """Workers accept, at a path; each generation has a socket of its own."""

    renews = True

    def listener(self, index: int) -> Listener:
        first, settings = self.bind(index, beside=True)
        path = settings.address.removeprefix("unix:")
        second = socket_file.bind(path, BACKLOG, socket_file.rights_of(path), give_away)
        return listener_of(first.detach(), index, settings, shared=True, sibling=second.detach())


class MemoryWorld(World):
    """A delivery without sockets: its listeners and queues outlive a program, as the kernel's."""

    kind = MemoryDelivery

    def __init__(self) -> None:
        self.queues: dict[int, list[int]] = {}
        super().__init__()

    def build(self, listeners: list[Listener]) -> Delivery:
        self.memory = cast("MemoryDelivery", super().build(listeners))
        self.memory.queues = self.queues
        return self.memory

    def listener(self, index: int) -> Listener:
        return memory_delivery.listener(index)

    def take(self, number: int) -> bool:
        queue = self.queues.get(number)
        if queue:
            self.taken[number].append(queue.pop(0))
        return bool(queue)

    def accept(self, handed: socket.socket) -> socket.socket | None:
        raise NotImplementedError

    def connect(self, index: int = 0) -> int:
        to = next(each for each in self.delivery.listeners if each.index == index)
        client = next(self.numbers)
        self.memory.connect(to, client)
        return client

    def probe(self, target: ProbeTarget) -> int:
        probe = -next(self.numbers)
        self.memory.probe(target, probe)
        return probe

    def waits(self, target: ProbeTarget, probe: int) -> bool:
        return target.waits(cast("Any", probe))

    def _adopted(self, before: Delivery, left: Inherited) -> list[Listener]:
        return [*before.listeners]


WORLDS: dict[str, type[World]] = {
    "queue": QueueWorld,
    "queue_unix": QueueUnixWorld,
    "shared": SharedWorld,
    "shared_path": PathWorld,
    "memory": MemoryWorld,
}


def except_in(**reasons: str) -> pytest.MarkDecorator:
    """Return a mark for a story that these worlds cannot have, each with the reason."""
    assert reasons.keys() <= WORLDS.keys()
    assert all(reasons.values())
    kept = [each for each in WORLDS if each not in reasons]
    return pytest.mark.parametrize("world", kept, indirect=True)
