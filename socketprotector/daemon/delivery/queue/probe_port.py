"""A loopback port for probes of a generation that takes connections from a channel.

Its connections are sent into that channel, and no count includes them.  The channel of a generation
that has not served holds nothing else: the rest is discarded when it fails or begins to serve.  In
a serving generation's channel (--health) probes queue among the clients, and are discarded when
those are taken back.
"""

from __future__ import annotations

import errno
import select
import socket

from socketprotector_client import wire

from ....system.channel import Channel
from ....system.cleanup import on_error
from ....system.listener import TRANSIENT_ERRNOS
from ....system.loop import Loop
from ....system.polling import events_of
from ..probe_target import BACKLOG, ProbeTarget
from .queue_watch import QueueWatch

#: How soon to accept again after a shortage.
_ACCEPT_AGAIN_S = 0.1


class ProbePort:
    """One probe port; it owns its socket."""

    def __init__(
        self,
        loop: Loop,
        channel: Channel,
        index: int,
        beside: QueueWatch | None = None,
    ) -> None:
        """Send its connections into a channel, as if they came by the listener of this index.

        beside: counts what else is sent there: clients, and other probes.  Raises OSError.
        """
        self._loop, self._channel, self._index, self._beside = loop, channel, index, beside
        self._behind = 0  # how much had been sent at the last probe
        self._kept: socket.socket | None = None  # a probe that the channel has no room for yet
        self._failed: OSError | None = None
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        with on_error(self._socket.close):
            self._socket.setblocking(False)
            self._socket.bind(("127.0.0.1", 0))
            self._socket.listen(BACKLOG)
            loop.watch(self._socket.fileno(), self._came)

    @property
    def target(self) -> ProbeTarget:
        """Where a probe of its generation connects."""
        host, port = self._socket.getsockname()
        return ProbeTarget((host, port), None, self._waits, self.close)

    def close(self) -> None:
        """Close the port, and stop sending."""
        self._loop.cancel(self)
        self._loop.unwatch(self._socket.fileno())
        self._socket.close()
        if self._kept is not None:
            self._kept.close()

    def _waits(self, one: socket.socket) -> bool:
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed
        if self._kept is not None or events_of(self._socket, select.POLLIN):
            return True
        # Later connections queue behind the probe.
        behind = self._beside.sent - self._behind if self._beside is not None else 0
        return self._channel.depth() > behind

    def _later(self) -> None:
        """Accept again by a timer: the socket stays readable."""
        self._loop.unwatch(self._socket.fileno())
        self._loop.call_after(self, _ACCEPT_AGAIN_S, self._again)

    def _again(self) -> None:
        try:
            self._loop.watch(self._socket.fileno(), self._came)
        except OSError:
            self._later()
        else:
            if self._kept is not None:
                self._send()

    def _came(self) -> None:
        if self._kept is not None:
            return
        try:
            self._kept, _ = self._socket.accept()
        except OSError as error:
            if error.errno not in TRANSIENT_ERRNOS:
                self._later()  # out of descriptors
        else:
            self._send()

    def _send(self) -> None:
        """Send the accepted probe, as soon as there is room."""
        probe = self._kept
        assert probe is not None
        # The accept time 0 marks a probe (docs/protocol.md).
        header = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, self._index, 0, 0)
        try:
            self._channel.send(header, probe.fileno())
        except OSError as error:
            if error.errno == errno.EAGAIN:
                self._later()
                return
            self._failed = error  # its close must not look as if a worker had taken it
        else:
            if self._beside is not None:
                self._beside.add_uncounted()  # probes of another port do not queue behind it
                self._behind = self._beside.sent
        probe.close()
        self._kept = None


def is_probe(header: bytes) -> bool:
    """Return whether a record in a channel is a probe of ours."""
    return not wire.HEADER.unpack_from(header)[-1]
