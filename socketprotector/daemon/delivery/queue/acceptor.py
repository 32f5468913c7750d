"""The fast path of a connection: accept, send to the channel of the route, close our copy.

The route is the generation that gets all new clients, except the share of a canary.

The interval between connections decides how many connections we accept per wake-up, and whether we
busy-poll for the next connection.  forwarder.py handles a failed accept().  outlet.py or canary.py
handles a failed send.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from socketprotector_client import wire

from ....model.lazy_dataclass import KW_ONLY, field, mutable
from ....system.channel import SEND_FLAGS, rights_of
from ....system.listener import Listener, accept_of
from ....system.loop import Loop
from .queue_watch import QueueWatch

#: Sends one message, with these buffers, ancillary data and flags, as socket.sendmsg() does.  We do
#: not use Channel.send(), because it would cost one more Python call for each connection.
Send = Callable[[list[bytes], list[tuple[int, int, bytes]], int], object]
#: Usually a wake-up accepts only one connection: a second accept() that finds no client would cost
#: as much as another wake-up (4 us).  But if we accept two connections within BUSY_NS, we assume
#: that clients queue up.  From then on each wake-up accepts up to BURST connections, until a
#: wake-up finds fewer than two.
BUSY_NS = 25_000
BURST = 32
#: After this many single connections in quick succession, we busy-poll for the next connection
#: (--busy-poll).  If several connections come at once, we do not busy-poll: workers need the core.
STEADY = 8


@mutable
class Acceptor:
    """Accepts connections from listeners, and sends each connection to a channel."""

    loop: Loop
    queue_watch: QueueWatch  # watches the route's queue
    _: KW_ONLY
    #: Called when accept() fails, for example because no client waits.
    accept_failed: Callable[[Listener, OSError], None]
    #: Called when a send fails; takes ownership of the descriptor.
    send_failed: Callable[[bytes, int, OSError], None]
    #: The number of accepted connections, including connections whose send failed.
    accepted: int = 0
    last_ns: int = 0  # when the last connection was accepted, by time.monotonic_ns()
    _watched: dict[int, Callable[[], None]] = field(default_factory=dict)  # by fileno()
    _steady: int = 0  # how many single connections came in quick succession

    def begin(self, listener: Listener, send: Send) -> None:
        """Accept from this listener, too.  Raises OSError.

        send: sendmsg() of the route's channel, or a function of the CanaryQueue (canary.py).
        """
        fd = listener.fileno()
        if fd not in self._watched:
            on_readable = self._accept_to(send, listener)
            self.loop.watch(fd, on_readable)
            self._watched[fd] = on_readable

    def end(self, listener: Listener) -> None:
        """Stop accepting from a listener."""
        if self._watched.pop(listener.fileno(), None) is not None:
            self.loop.unwatch(listener.fileno())

    def end_all(self) -> None:
        for fd in self._watched:
            self.loop.unwatch(fd)
        self._watched.clear()

    def accept_now(self, can_send: Callable[[], bool]) -> None:
        """Accept from each listener, without waiting for the loop, while can_send returns True."""
        for on_readable in tuple(self._watched.values()):
            if can_send():  # the last send may have filled the channel, or found it broken
                on_readable()

    def _accept_to(self, send: Send, listener: Listener) -> Callable[[], None]:
        """Return the callback for a readable listener: a closure, which is the fastest kind."""
        accept = accept_of(listener)
        now, close = time.monotonic_ns, os.close
        # All headers of a listener begin with the same bytes, so pack these bytes once.
        common = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, listener.index, 0, 0)[:-8]
        # Keep the packed descriptor.  The next connection's descriptor usually has the same number,
        # because the kernel takes the lowest free number.
        packed_fd, rights = -1, [rights_of(-1)]
        most = 1  # how many connections one on_readable() call accepts at most

        def on_readable() -> None:
            nonlocal packed_fd, rights, most
            before = at = self.last_ns
            for count in range(most):
                try:
                    fd, _ = accept()
                except OSError as error:
                    if count:
                        self._count_sent(count, at)
                    self._steady = 0
                    if count < 2:
                        most = 1
                    self.accept_failed(listener, error)
                    return
                at = now()
                header = common + at.to_bytes(8, "little")
                if fd != packed_fd:
                    packed_fd, rights = fd, [rights_of(fd)]
                try:
                    send([header], rights, SEND_FLAGS)
                except OSError as error:
                    if count:
                        self._count_sent(count, at)
                    self.accepted += 1
                    self.last_ns = at
                    # QueueWatch.sent is computed from `accepted`, which counts this connection.
                    # The connection was not sent, so subtract_counted() undoes the count.
                    self.queue_watch.subtract_counted()
                    self.send_failed(header, fd, error)
                    return
                close(fd)
            self._count_sent(most, at)
            if most > 1:
                self._steady = 0
            elif at - before > BUSY_NS:
                self._decide_busy_poll(at - before)
            else:
                most = BURST

        return on_readable

    def _count_sent(self, count: int, last_ns: int) -> None:
        """Count sent connections; last_ns: when the last connection was accepted."""
        self.accepted += count
        self.last_ns = last_ns
        if not self.queue_watch.runs:
            self.queue_watch.start()

    def _decide_busy_poll(self, since_ns: int) -> None:
        """Decide whether to busy-poll for the next connection.

        since_ns: the time between the last two connections.
        """
        self._steady = self._steady + 1 if since_ns < self.loop.soon_ns else 0
        self.loop.soon = self._steady >= STEADY
