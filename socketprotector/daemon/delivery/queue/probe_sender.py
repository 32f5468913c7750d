"""Sends the probes of one generation into the generation's channel.

Probes do not count as accepted clients.  Until a generation gets clients, its channel has only
probes.  Afterwards probes, such as the probes of --health, wait among clients.  When a channel's
connections go to another generation, we discard the probes among them.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Callable

from socketprotector_client import wire

from ....system.channel import Channel
from ....system.loop import Loop
from ..probe_target import ProbeTarget
from .queue_watch import QueueWatch

#: The pause before we try again to send into a full channel, and how many probes wait for that.
_SEND_AGAIN_S, _KEPT = 0.1, 64


class ProbeSender:
    """Sends probes into one channel."""

    def __init__(
        self,
        loop: Loop,
        channel: Channel,
        index: int,
        watch: Callable[[], QueueWatch | None] = lambda: None,
    ) -> None:
        """index: the listener by which the probes seem to come.

        watch: returns the QueueWatch that counts the clients and probes sent to the channel; None:
        the channel gets no clients.
        """
        self._loop, self._channel, self._index, self._watch = loop, channel, index, watch
        self._sent_at_probe = 0  # the value of QueueWatch.sent just after the last probe was sent
        self._kept: deque[socket.socket] = deque()  # probes that were not sent yet
        self._failed: OSError | None = None  # the error of the last send; _waits() raises it

    def target(self, address: tuple[str, int]) -> ProbeTarget:
        """Return the target of these probes; address: for messages and the Host header."""
        return ProbeTarget(address, None, self._waits, self.close, give=self.send)

    def close(self) -> None:
        self._loop.cancel(self)
        while self._kept:
            self._kept.popleft().close()

    def send(self, probe: socket.socket) -> None:
        """Send a connection, now or when the channel has room, and close our copy."""
        if len(self._kept) == _KEPT:
            probe.close()
            return
        self._kept.append(probe)
        if len(self._kept) == 1:
            self._send_kept()

    def _waits(self, client: socket.socket) -> bool:
        """Return whether the last probe waits for a worker; raise OSError if its send failed."""
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed
        if self._kept:
            return True
        # Connections leave the queue oldest first.  `behind` is the number of connections that we
        # sent after the probe.  If the queue has more than `behind` connections, the probe is
        # still in the queue.
        watch = self._watch()
        behind = watch.sent - self._sent_at_probe if watch is not None else 0
        return self._channel.depth() > behind

    def _send_kept(self) -> None:
        while self._kept:
            # The accept time 0 means a probe (docs/protocol.md).
            header = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, self._index, 0, 0)
            try:
                self._channel.send(header, self._kept[0].fileno())
            except OSError as error:
                if error.errno == errno.EAGAIN:
                    self._loop.call_after(self, _SEND_AGAIN_S, self._send_kept)
                    return
                self._failed = error  # otherwise _waits() would report that a worker took the probe
            else:
                watch = self._watch()
                if watch is not None:
                    # Include this probe in `sent`.  The channel may have another ProbeSender, whose
                    # _waits() computes from `sent` how many connections are behind its own probe.
                    watch.add_uncounted()
                    self._sent_at_probe = watch.sent
            self._kept.popleft().close()


def is_probe(header: bytes) -> bool:
    """Return whether this is the header of one of our probes."""
    return not wire.HEADER.unpack_from(header)[-1]


def drop_all(channel: Channel) -> int:
    """Discard all connections in a channel; return how many were clients."""
    found = 0
    try:
        while taken := channel.take_back():
            header, fd = taken
            found += not is_probe(header)
            if fd >= 0:
                os.close(fd)
    except OSError:
        # Out of memory.  The connections left in the channel count as clients, and are closed with
        # the channel.
        found += channel.depth()
    return found
