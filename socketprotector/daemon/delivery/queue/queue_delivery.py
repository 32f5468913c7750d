"""The delivery in which the protector accepts connections, and sends them into channels.

Each generation has one channel, from which all its workers take connections.  The protector keeps
both ends of the channel, so the queue in the channel survives the death of all workers.  The route
is the generation that gets the new clients; a canary may get a share of them.  A generation knows
the listeners with which it was opened.

When a generation drains, the untaken connections in its channel go to the route, if the route has
room and knows their listener.  The draining workers take the other connections.

A generation is released after its last worker has exited.  Then the connections that remain in its
channel go to the route, or to a later route that knows their listener.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial

from socketprotector_client import wire

from ....core.events import ChannelBroken
from ....model.lazy_dataclass import replace
from ....model.records import DeliveryRecord
from ....model.settings import ListenerSettings, Settings
from ....system import inherited
from ....system.channel import Channel
from ....system.inherited import Inherited
from ....system.listener import RESOURCE_ERRNOS, Listener
from ....system.listeners import listener_of
from ....system.loop import SHUT
from ...generation import OpenGeneration
from .. import Delivery, Handles
from ..host import Host
from ..probe_target import ProbeTarget
from . import probe_sender
from .forwarder import Forwarder
from .generation_channel import GenerationChannel


class QueueDelivery(Delivery):
    """The owner of the generations' channels; the Forwarder owns the listeners."""

    @classmethod
    def make_listener(
        cls, index: int, settings: ListenerSettings, fds: Sequence[int], again: tuple[int, ...]
    ) -> Listener:
        first, sibling, reserved = fds
        return listener_of(first, index, settings, sibling=sibling, reserved=reserved, again=again)

    @classmethod
    def leave(cls, listeners: Collection[Listener], record: DeliveryRecord) -> tuple[str, ...]:
        return tuple(filter(None, [each.leave(0) for each in listeners]))

    def __init__(self, host: Host, listeners: Collection[Listener]) -> None:
        self._host = host
        runtime = host.runtime
        self._loop, self._log, self._post = runtime.loop, runtime.log, runtime.post
        self._channels: dict[int, GenerationChannel] = {}
        self._route_number: int | None = None  # the number of the route's generation
        #: Generation -> how many clients it got before the last upgrade or kill of the protector.
        self._met_before: dict[int, int] = {}
        self.forwarder = Forwarder(
            runtime,
            tuple(listeners),
            broken=self._report_broken_route,
            repair=self._repair,
            untaken=host.report_untaken,
        )

    # -- a generation ----------------------------------------------------------------

    def can_probe(self, listener: str) -> bool:
        return True

    def cannot_dry_run(self) -> str | None:
        return None

    def open(self, generation: OpenGeneration, queue: int, *, fresh: bool) -> None:
        channel = GenerationChannel(Channel.make(queue), generation)
        try:
            self._watch(generation.record.number, channel)
        except OSError:
            channel.close()
            raise
        self._channels[generation.record.number] = channel
        capacity = channel.capacity()
        if capacity < queue:
            self._log.write(
                "warning",
                "queue-clamped",
                wanted=queue,
                got=capacity,
                hint="raise the sysctl net.core.wmem_max",
            )

    def worker_handles(
        self, generation: OpenGeneration, slot: int, free: Iterator[int], settings: Settings
    ) -> Handles:
        channel = next(free)
        environment = {
            wire.ENV_CHANNEL: str(channel),
            wire.ENV_LISTENERS: generation.program.listeners,
            wire.ENV_GENERATION: str(generation.record.number),
            wire.ENV_WORKER: str(slot),
            wire.ENV_WORKERS: str(max(settings.processes, slot + 1)),
        }
        return Handles({channel: self._channel_of(generation).read.fileno()}, environment)

    def sockets_of(self, generation: OpenGeneration) -> frozenset[int]:
        return frozenset({os.fstat(self._channel_of(generation).read.fileno()).st_ino})

    def reach(
        self, generation: OpenGeneration, listener: str, *, as_client: bool = False
    ) -> ProbeTarget | None:
        channel = self._channel_of(generation)
        for each in self.listeners:
            if listener in ("", each.settings.name) and generation.knows(each.index):
                watch = partial(self.forwarder.watch_of, channel)
                path, port = each.local_address
                sender = probe_sender.ProbeSender(self._loop, channel, each.index, watch)
                return sender.target(("127.0.0.1", port) if port else (path, 0))
        return None

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
        self._route_number = generation.record.number if generation is not None else None
        route, canary = (
            self._channel_of(each) if each is not None else None for each in (generation, sharing)
        )
        self.forwarder.route_to(route, canary, share)

    def met(self, generation: OpenGeneration) -> int | None:
        return self.forwarder.met(self._channel_of(generation))

    def begin_drain(
        self, generation: OpenGeneration, on_quiet: Callable[[], None], *, reads_on: bool
    ) -> None:
        on_quiet()  # at once: here no client waits at a generation's own listening socket

    def drain(self, generation: OpenGeneration) -> None:
        channel = self._channel_of(generation)
        self._loop.unwatch(channel.read.fileno())
        self.forwarder.drain(channel)

    def release(self, generation: OpenGeneration) -> None:
        channel = self._channel_of(generation)
        self._loop.unwatch(channel.read.fileno())
        self.forwarder.release(channel)

    def keeps(self, number: int) -> bool:
        return number in self._open_channels()

    def _channel_of(self, generation: OpenGeneration) -> GenerationChannel:
        return self._channels[generation.record.number]

    def _open_channels(self) -> dict[int, GenerationChannel]:
        """Forget the channels that the forwarder has closed, and return the others."""
        self._channels = {n: each for n, each in self._channels.items() if not each.closed}
        return self._channels

    def _watch(self, number: int, channel: GenerationChannel) -> None:
        """Post ChannelBroken when a worker shuts the channel down.  Raises OSError."""
        self._loop.watch(channel.read.fileno(), lambda: self._report_broken(number), SHUT)

    def _report_broken_route(self) -> None:
        if self._route_number is not None:
            self._report_broken(self._route_number)

    def _report_broken(self, number: int) -> None:
        """Stop watching a channel that a worker has shut down, and post ChannelBroken."""
        self._loop.unwatch(self._channels[number].read.fileno())
        since = self._host.generations[number].record.serving_since
        self._post(ChannelBroken(number, time.monotonic() - since if since else 0.0))

    # -- counts ------------------------------------------------------------------------

    def waiting(self, generation: OpenGeneration, *, clients_only: bool = False) -> int | None:
        if clients_only and not generation.record.serving_since:
            return 0  # the generation never got clients, so its queue has only probes
        channel = self._channel_of(generation)
        waiting = channel.depth()
        return 0 if clients_only and waiting == 1 and _has_probe_first(channel) else waiting

    def active(self, generation: OpenGeneration) -> int | None:
        return None

    def untaken_s(self, generation: OpenGeneration) -> float | None:
        channel = self._channel_of(generation)
        watch = self.forwarder.watch_of(channel)
        return watch.untaken_s(channel) if watch is not None else None

    def is_stuck(self, generation: OpenGeneration | None) -> bool:
        if generation is None:
            return False
        channel = self._channel_of(generation)
        watch = self.forwarder.watch_of(channel)
        return watch is not None and watch.is_stuck(channel)

    def queue_limit(self, generation: OpenGeneration) -> int | None:
        return self._channel_of(generation).capacity()

    # -- listeners -----------------------------------------------------------------------

    @property
    def listeners(self) -> tuple[Listener, ...]:
        return self.forwarder.listeners

    def backlog(self, listener: Listener) -> tuple[int, int] | None:
        return listener.backlog(0)

    @property
    def worker_sockets(self) -> frozenset[int]:
        return frozenset()

    def cannot_change(
        self, added: Collection[Listener], removed: Collection[Listener]
    ) -> str | None:
        return None

    def add(self, listener: Listener, *, dry_run: bool) -> None:
        self.forwarder.add(listener)

    def remove(self, listener: Listener) -> None:
        """Refuse a listener's new clients, and send its backlog to a generation.

        The backlog goes to the newest generation that knows the listener, is not finishing, and has
        had the route or a share of the clients.  Without such a generation the backlog is lost.

        Exception: if a service manager passed the socket in, the service manager keeps listening,
        and gets the backlog.
        """
        served = [
            number
            for number, each in self._host.generations.items()
            if each.record.serving_since and not each.is_finishing and each.knows(listener.index)
        ]
        self.forwarder.remove(listener, self._channels[max(served)] if served else None)

    def _repair(self, listener: Listener) -> None:
        """Listen again on a listener that was shut down; if that fails, bind another socket.

        If binding fails, too, mark the listener as lost.  Exception: if the system is short of
        descriptors or memory, raise OSError.
        """
        address = listener.settings.address
        if listener.listen_again(0):
            self._log.write("warning", "listens-again", listen=address)
            return
        try:
            listener.bind_anew(0)
        except OSError as error:
            if error.errno in RESOURCE_ERRNOS:
                raise
            listener.lost = True
            self._host.listener_lost(listener, error.strerror or str(error))
        else:
            self._log.write("warning", "socket-replaced", listen=address)
            self._host.listener_bound(listener)

    def cannot_hold(self) -> str | None:
        return None

    def hold(self, on: bool) -> None:
        self.forwarder.hold(on)

    @property
    def is_silent(self) -> bool:
        return False

    @property
    def late_s(self) -> float:
        return 0.0

    def close_listeners(
        self, serving: OpenGeneration | None, *, quick: bool, stay: bool = False
    ) -> None:
        self.forwarder.close_listeners(quick=quick, stay=stay)

    # -- the delivery as a whole -----------------------------------------------------------

    @property
    def forwarded(self) -> int | None:
        return self.forwarder.forwarded

    @property
    def lost(self) -> int | None:
        return self.forwarder.lost

    @property
    def idle_s(self) -> float:
        return self.forwarder.idle_s

    @property
    def warnings(self) -> tuple[str, ...]:
        cut_off = "its socket file was removed or replaced, so "
        return tuple(
            f"{each.settings.address}: {cut_off if each.is_cut_off else ''}"
            "no client can connect; restart SocketProtector"
            for each in self.listeners
            if each.lost or each.is_cut_off
        )

    def accept_waiting(self) -> None:
        self.forwarder.accept_waiting()

    def record(self) -> DeliveryRecord:
        met = {number: self.forwarder.met(each) for number, each in self._open_channels().items()}
        return DeliveryRecord(replace(self.forwarder.record(), met=tuple(met.items())))

    def descriptors(self) -> dict[str, int]:
        found = self.forwarder.descriptors()
        for number, channel in self._open_channels().items():
            prefix = f"{inherited.GENERATION}{number}."
            found |= {f"{prefix}{name}": fd for name, fd in channel.descriptors().items()}
        return found

    def adopt(
        self, record: DeliveryRecord, unclaimed: Inherited, *, held: bool, closing: bool
    ) -> None:
        self.forwarder.adopt(record.forwarder, unclaimed, closing=closing)
        self._met_before = dict(record.forwarder.met)

    def adopt_generation(
        self, generation: OpenGeneration, descriptors: Mapping[str, int], *, draining: bool
    ) -> bool:
        if "read" not in descriptors:
            for fd in descriptors.values():
                os.close(fd)
            return False
        record = generation.record
        channel = GenerationChannel(Channel.adopt(descriptors), generation, adopted=True)
        channel.met = self._met_before.get(record.number, 0)
        self._channels[record.number] = channel
        if draining:
            self.forwarder.adopt_drained(channel)
        if not (record.ended or record.released):
            if channel.has_ended:
                # The record says that the channel is open, but the write end is missing: the
                # earlier program was killed before it could store the write end.
                self._post(ChannelBroken(record.number))
            else:
                self._watch(record.number, channel)
        return True

    def close(self) -> tuple[str, ...]:
        surviving = self.forwarder.close()
        for channel in self._channels.values():
            channel.close()
        return surviving


def _has_probe_first(channel: Channel) -> bool:
    """Return whether the oldest connection in a channel is known to be a probe."""
    try:
        header = channel.peek()
    except OSError:  # out of memory
        return False
    return header is not None and probe_sender.is_probe(header)
