"""A delivery in memory: a client is a number, and a listener a list of those that wait there.

It keeps the contract as the two real ones do (tests/boundary/test_delivery.py), without a socket
or a loop, for tests of what stands above it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

from socketprotector.core.events import BacklogEmptied
from socketprotector.daemon.delivery import Delivery, Handles
from socketprotector.daemon.delivery.host import Host
from socketprotector.daemon.delivery.probe_target import ProbeTarget
from socketprotector.daemon.generation import OpenGeneration
from socketprotector.model.records import DeliveryRecord, ForwarderRecord
from socketprotector.model.settings import ListenerSettings, Settings
from socketprotector.model.share import in_share
from socketprotector.system.inherited import Inherited
from socketprotector.system.listener import Listener


def listener(index: int) -> Listener:
    """One with a backlog, which outlives a delivery."""
    settings = ListenerSettings(f"tcp:127.0.0.1:{index + 1}")
    made = SimpleNamespace(
        index=index, settings=settings, backlog=[], lost=False, sockets=[], descriptors=dict
    )
    return cast("Listener", made)


#: How many clients can wait at a listener.
MOST = 100


class MemoryDelivery(Delivery):
    """Has a queue for each generation, and moves clients at once."""

    @classmethod
    def make_listener(
        cls, index: int, settings: ListenerSettings, fds: Sequence[int], again: tuple[int, ...]
    ) -> Listener:
        raise NotImplementedError

    @classmethod
    def leave(cls, listeners: Collection[Listener], record: DeliveryRecord) -> tuple[str, ...]:
        return ()

    def __init__(self, host: Host, listeners: Collection[Listener]) -> None:
        self._host = host
        self._listeners = list(listeners)
        #: The clients that a generation was brought and has not taken; a probe is negative.
        self.queues: dict[int, list[int]] = {}
        #: The drained generations, whose clients go to the route; True: it is released.
        self._drained: dict[int, bool] = {}
        self._route: OpenGeneration | None = None
        self._sharing: OpenGeneration | None = None
        self._share = 0
        self._shared = 0  # how many clients were counted for a share
        self._met: dict[int, int] = {}
        self._held = False
        self._closing = False  # the listeners stay, for the next start

    def connect(self, to: Listener, client: int) -> None:
        """Have a client come."""
        cast("Any", to).backlog.append(client)
        self._move()

    def probe(self, target: ProbeTarget, probe: int) -> None:
        """Have a probe come."""
        _, number = target.address
        self.queues[number].append(probe)

    def _move(self) -> None:
        route = self._route.record.number if self._route is not None else None
        for number, is_released in [*self._drained.items()]:
            left = self.queues[number]
            if route not in (None, number):
                self.queues[route] += [each for each in left if each > 0]
                left.clear()
            if is_released and not left:
                del self.queues[number], self._drained[number]
        if self._route is None or self._held or self._closing:
            return
        for each in self._listeners:
            backlog = cast("Any", each).backlog
            while backlog and (to := self._next(self._route, each.index)):
                number = to.record.number
                self.queues[number].append(backlog.pop(0))
                self._met[number] = self._met.get(number, 0) + 1

    def _next(self, route: OpenGeneration, listener: int) -> OpenGeneration | None:
        """Which generation gets the next client of a listener."""
        if self._sharing is None or not self._sharing.knows(listener):
            return route if route.knows(listener) else None
        if not route.knows(listener):
            return self._sharing
        self._shared += 1
        return self._sharing if in_share(self._shared - 1, self._share) else route

    def _take_from(self, listener: Listener, to: OpenGeneration) -> None:
        backlog = cast("Any", listener).backlog
        self.queues[to.record.number] += backlog
        backlog.clear()

    def _named(self, name: str) -> Iterator[Listener]:
        return (each for each in self._listeners if name in ("", each.settings.name))

    def can_probe(self, listener: str) -> bool:
        return any(self._named(listener))

    def cannot_dry_run(self) -> str | None:
        return None

    def open(self, generation: OpenGeneration, queue: int, *, fresh: bool) -> None:
        self.queues[generation.record.number] = []

    def worker_handles(
        self, generation: OpenGeneration, slot: int, free: Iterator[int], settings: Settings
    ) -> Handles:
        return Handles({}, {"SLOT": str(slot)})

    def reach(
        self, generation: OpenGeneration, listener: str, *, as_client: bool = False
    ) -> ProbeTarget | None:
        if not any(generation.knows(each.index) for each in self._named(listener)):
            return None
        number = generation.record.number

        def waits(probe: object) -> bool:
            return probe in self.queues[number]

        return ProbeTarget(("generation", number), None, waits, lambda: None)

    def cannot_share(self, listeners: Collection[Listener]) -> str | None:
        return None

    def route_to(
        self,
        generation: OpenGeneration | None,
        *,
        served_before: bool = False,
        sharing: OpenGeneration | None = None,
        share: int = 0,
    ) -> None:
        self._route, self._sharing, self._share = generation, sharing, share
        self._move()

    def met(self, generation: OpenGeneration) -> int | None:
        return self._met.get(generation.record.number, 0)

    def begin_drain(
        self, generation: OpenGeneration, on_quiet: Callable[[], None], *, reads_on: bool
    ) -> None:
        on_quiet()

    def drain(self, generation: OpenGeneration) -> None:
        generation.note_finishing()
        self._drained.setdefault(generation.record.number, False)
        self._move()

    def release(self, generation: OpenGeneration) -> None:
        generation.note_finishing()
        self._drained[generation.record.number] = True
        self._move()

    def keeps(self, number: int) -> bool:
        return number in self.queues

    def waiting(self, generation: OpenGeneration, *, clients_only: bool = False) -> int | None:
        queue = self.queues[generation.record.number]
        return 0 if clients_only and all(each < 0 for each in queue) else len(queue)

    def active(self, generation: OpenGeneration) -> int | None:
        return None

    def untaken_s(self, generation: OpenGeneration) -> float | None:
        return None

    def is_stuck(self, generation: OpenGeneration | None) -> bool:
        return False

    def queue_limit(self, generation: OpenGeneration) -> int | None:
        return None

    @property
    def listeners(self) -> tuple[Listener, ...]:
        return tuple(self._listeners)

    def backlog(self, listener: Listener) -> tuple[int, int] | None:
        return len(cast("Any", listener).backlog), MOST

    def sockets_of(self, generation: OpenGeneration) -> frozenset[int]:
        return frozenset()

    @property
    def worker_sockets(self) -> frozenset[int]:
        return frozenset()

    def cannot_change(
        self, added: Collection[Listener], removed: Collection[Listener]
    ) -> str | None:
        return None

    def add(self, listener: Listener, *, dry_run: bool) -> None:
        self._listeners.append(listener)
        self._move()

    def remove(self, listener: Listener) -> None:
        self._listeners.remove(listener)
        served = [each for each in self._host.generations.values() if each.record.serving_since]
        for each in served[-1:]:
            self._take_from(listener, each)

    def cannot_hold(self) -> str | None:
        return None

    def hold(self, on: bool) -> None:
        self._held = on
        self._move()

    @property
    def is_silent(self) -> bool:
        return self._held

    @property
    def late_s(self) -> float:
        return 0.0

    def close_listeners(
        self, serving: OpenGeneration | None, *, quick: bool, stay: bool = False
    ) -> None:
        self._closing = True
        if not stay:
            self._listeners.clear()
        if not quick:
            self._host.runtime.post(BacklogEmptied())

    @property
    def forwarded(self) -> int | None:
        return None

    @property
    def lost(self) -> int | None:
        return None

    @property
    def idle_s(self) -> float:
        return 0.0

    @property
    def warnings(self) -> tuple[str, ...]:
        return ()

    def accept_waiting(self) -> None:
        self._move()

    def record(self) -> DeliveryRecord:
        forwarder = ForwarderRecord(shared=self._shared, met=tuple(self._met.items()))
        return DeliveryRecord(forwarder)

    def descriptors(self) -> dict[str, int]:
        return {}

    def adopt(self, record: DeliveryRecord, left: Inherited, *, held: bool, closing: bool) -> None:
        self._held = held
        self._shared, self._met = record.forwarder.shared, dict(record.forwarder.met)

    def adopt_generation(
        self, generation: OpenGeneration, descriptors: Mapping[str, int], *, draining: bool
    ) -> bool:
        if draining:
            self._drained[generation.record.number] = False
        return generation.record.number in self.queues

    def close(self) -> tuple[str, ...]:
        self._listeners.clear()
        return ()
