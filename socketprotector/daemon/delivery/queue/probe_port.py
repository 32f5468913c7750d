"""A loopback port for probes of one generation.

The port sends its connections, the probes, into the generation's channel.  Probes do not count as
accepted clients.  Until a generation gets clients, its channel has only probes.  Afterwards probes,
such as the probes of --health, wait among clients.  When a channel's connections go to another
generation, we discard the probes among them.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable

from socketprotector_client import wire

from ....system.channel import Channel
from ....system.cleanup import on_error
from ....system.listener import TRANSIENT_ERRNOS
from ....system.loop import Loop
from ....system.polling import events_of
from ..probe_target import BACKLOG, ProbeTarget
from .queue_watch import QueueWatch

#: The pause before a port accepts or sends again.
_ACCEPT_AGAIN_S = 0.1


class ProbePort:
    """One probe port; it owns its socket."""

    def __init__(
        self,
        loop: Loop,
        channel: Channel,
        index: int,
        watch: Callable[[], QueueWatch | None] = lambda: None,
    ) -> None:
        """Send the port's connections into a channel, as connections of the listener `index`.

        watch: returns the QueueWatch that counts the clients and probes sent to the channel; None:
        the channel gets no clients.

        Raises OSError.
        """
        self._loop, self._channel, self._index, self._watch = loop, channel, index, watch
        self._sent_at_probe = 0  # the value of QueueWatch.sent just after the last probe was sent
        self._kept: socket.socket | None = None  # a probe that was accepted, but not sent yet
        self._failed: OSError | None = None  # the error of the last send; _waits() raises it
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        with on_error(self._socket.close):
            self._socket.setblocking(False)
            self._socket.bind(("127.0.0.1", 0))
            self._socket.listen(BACKLOG)
            loop.watch(self._socket.fileno(), self._accept)

    @property
    def target(self) -> ProbeTarget:
        host, port = self._socket.getsockname()
        return ProbeTarget((host, port), None, self._waits, self.close)

    def close(self) -> None:
        self._loop.cancel(self)
        self._loop.unwatch(self._socket.fileno())
        self._socket.close()
        if self._kept is not None:
            self._kept.close()

    def _waits(self, client: socket.socket) -> bool:
        """Return whether the last probe waits for a worker; raise OSError if its send failed."""
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed
        if self._kept is not None or events_of(self._socket, select.POLLIN):
            return True
        # Connections leave the queue oldest first.  `behind` is the number of connections that we
        # sent after the probe.  If the queue has more than `behind` connections, the probe is
        # still in the queue.
        watch = self._watch()
        behind = watch.sent - self._sent_at_probe if watch is not None else 0
        return self._channel.depth() > behind

    def _accept_later(self) -> None:
        """Accept or send again after a pause.

        The socket may stay readable, so it is not watched during the pause.
        """
        self._loop.unwatch(self._socket.fileno())
        self._loop.call_after(self, _ACCEPT_AGAIN_S, self._accept_again)

    def _accept_again(self) -> None:
        try:
            self._loop.watch(self._socket.fileno(), self._accept)
        except OSError:
            self._accept_later()
        else:
            if self._kept is not None:
                self._send()

    def _accept(self) -> None:
        if self._kept is not None:
            return
        try:
            self._kept, _ = self._socket.accept()
        except OSError as error:
            if error.errno not in TRANSIENT_ERRNOS:
                self._accept_later()  # out of descriptors or memory
        else:
            self._send()

    def _send(self) -> None:
        """Send the accepted probe now, or after a pause if the channel is full."""
        probe = self._kept
        assert probe is not None
        # The accept time 0 means a probe (docs/protocol.md).
        header = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, self._index, 0, 0)
        try:
            self._channel.send(header, probe.fileno())
        except OSError as error:
            if error.errno == errno.EAGAIN:
                self._accept_later()
                return
            self._failed = error  # otherwise _waits() would report that a worker took the probe
        else:
            watch = self._watch()
            if watch is not None:
                # Include this probe in `sent`.  The channel may have another probe port, whose
                # _waits() computes from `sent` how many connections are behind its own probe.
                watch.add_uncounted()
                self._sent_at_probe = watch.sent
        probe.close()
        self._kept = None


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
