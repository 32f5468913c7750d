"""The fast path of a connection: accept, send to the route, close our copy.

How close together connections come decides how many a wake-up accepts, and whether we busy-poll for
the next one.  The forwarder handles failures, and all else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

from socketprotector_client import wire

from ....model.lazy_dataclass import KW_ONLY, field, mutable
from ....system.channel import SEND_FLAGS, Channel, rights_of
from ....system.listener import Listener, accept_of
from ....system.loop import Loop
from .queue_watch import QueueWatch

#: Connections closer together than this were waiting: then a wake-up takes all that wait, so many
#: at most, as long as it finds more than one.  Else it takes one, because the accept that finds
#: nothing costs 4 us (measured), and so does another turn of the loop.
BUSY_NS = 25_000
BURST = 32
#: So many in a row came one by one, and each soon after the other: then the next one is expected
#: to do so, too, and waited for awake (--busy-poll).  Where several come at once it is not: then
#: the core is better left to the workers.
STEADY = 8


@mutable
class Acceptor:
    """Accepts from the watched listeners, and sends to one channel."""

    loop: Loop
    queue: QueueWatch
    _: KW_ONLY
    #: Called when accept fails, also because no client waits.
    accept_failed: Callable[[Listener, OSError], None]
    #: Called when a send fails; takes ownership of the descriptor.
    send_failed: Callable[[bytes, int, OSError], None]
    #: How many connections were accepted, with failed sends.
    accepted: int = 0
    last_ns: int = 0  # when the last one was accepted
    _watched: dict[int, Callable[[], None]] = field(default_factory=dict)  # the listeners
    _steady: int = 0  # so many came one by one, each soon after the other

    def begin(self, listeners: Iterable[Listener], route: Channel) -> None:
        """Accept from these listeners, too, and send to the route.  Raises OSError."""
        for listener in listeners:
            fd = listener.fileno()
            if fd not in self._watched:
                ready = self._accept_to(route, listener)
                self.loop.watch(fd, ready)
                self._watched[fd] = ready

    def end(self, listener: Listener) -> None:
        """Stop accepting from a listener."""
        if self._watched.pop(listener.fileno(), None) is not None:
            self.loop.unwatch(listener.fileno())

    def end_all(self) -> None:
        for fd in self._watched:
            self.loop.unwatch(fd)
        self._watched.clear()

    def accept_now(self, can: Callable[[], bool]) -> None:
        """Accept from each listener, without waiting for the loop, as long as `can` says yes."""
        for ready in tuple(self._watched.values()):
            if can():  # the last send may have filled the channel, or found it broken
                ready()

    def _accept_to(self, route: Channel, listener: Listener) -> Callable[[], None]:
        """Return the callback for a listener; its closure has all that a connection needs."""
        accept = accept_of(listener)
        # Not Channel.send(), which would be one more call for each connection.
        send = route.write.sendmsg
        now, close = time.monotonic_ns, os.close
        # The common part is packed once: that halves the cost of the Python code.
        begin = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, listener.index, 0, 0)[:-8]
        # Kept from the connection before: the kernel reuses the number that was closed last.
        number, rights = -1, [rights_of(-1)]
        most = 1  # how many to accept in one go

        def ready() -> None:
            nonlocal number, rights, most
            before = at = self.last_ns
            for count in range(most):
                try:
                    fd, _ = accept()
                except OSError as error:
                    if count:
                        self._took(count, at)
                    self._steady = 0
                    if count < 2:
                        most = 1
                    self.accept_failed(listener, error)
                    return
                at = now()
                header = begin + at.to_bytes(8, "little")
                if fd != number:
                    number, rights = fd, [rights_of(fd)]
                try:
                    send([header], rights, SEND_FLAGS)
                except OSError as error:
                    if count:
                        self._took(count, at)
                    self.accepted += 1  # but it is in no queue yet
                    self.last_ns = at
                    self.queue.take_away()
                    self.send_failed(header, fd, error)
                    return
                close(fd)
            self._took(most, at)
            if most > 1:
                self._steady = 0
            elif at - before > BUSY_NS:
                self._one_by_one(at - before)
            else:
                most = BURST

        return ready

    def _took(self, count: int, last_ns: int) -> None:
        """Count sent connections; last_ns: when the last was accepted."""
        self.accepted += count
        self.last_ns = last_ns
        if not self.queue.runs:
            self.queue.start()

    def _one_by_one(self, since_ns: int) -> None:
        """Decide whether to busy-poll after a single connection, by its distance to the last."""
        self._steady = self._steady + 1 if since_ns < self.loop.soon_ns else 0
        self.loop.soon = self._steady >= STEADY
