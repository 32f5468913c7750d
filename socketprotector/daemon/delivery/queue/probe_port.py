"""A port of loopback by which a generation is asked that takes connections from a channel.

What comes there is sent into its channel, beside all that is counted.  Nothing else is ever in the
channel of a generation that has not served, so what is left there is thrown away when it is given
up, or is to serve.  In that of one that serves (--health) it stands among the clients, and is
thrown away where these are taken back.
"""

from __future__ import annotations

import errno
import select
import socket

from socketprotector_client import wire

from ....system.channel import Channel
from ....system.cleanup import on_error
from ....system.listener import AGAIN
from ....system.loop import Loop
from ....system.polling import events_of
from ..probe_target import BACKLOG, ProbeTarget
from .queue_watch import QueueWatch

#: How soon to accept again where the system was out of something.
_ACCEPT_AGAIN_S = 0.1


class ProbePort:
    """A port of loopback; owns its socket."""

    def __init__(
        self,
        loop: Loop,
        channel: Channel,
        index: int,
        beside: QueueWatch | None = None,
    ) -> None:
        """Send what comes there into a channel, as by the listener of this index.

        beside: of what is sent there, too: clients, and another's questions.  Raises OSError.
        """
        self._loop, self._channel, self._index, self._beside = loop, channel, index, beside
        self._behind = 0  # how much had been sent when the last question was
        self._kept: socket.socket | None = None  # there is no room for it yet
        self._failed: OSError | None = None
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        with on_error(self._socket.close):
            self._socket.setblocking(False)
            self._socket.bind(("127.0.0.1", 0))
            self._socket.listen(BACKLOG)
            loop.watch(self._socket.fileno(), self._came)

    @property
    def way(self) -> ProbeTarget:
        """How its generation is reached."""
        host, port = self._socket.getsockname()
        return ProbeTarget((host, port), None, self._waits, self.close)

    def close(self) -> None:
        """Send nothing more."""
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
        # All that were sent after it stand behind it.
        behind = self._beside.sent - self._behind if self._beside is not None else 0
        return self._channel.depth() > behind

    def _later(self) -> None:
        """It stays readable, so only a timer helps."""
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
            if error.errno not in AGAIN:
                self._later()  # out of descriptors
        else:
            self._send()

    def _send(self) -> None:
        """Send the one that was accepted, as soon as there is room."""
        one = self._kept
        assert one is not None
        # Accepted at 0: it is no client's (docs/protocol.md).
        header = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, self._index, 0, 0)
        try:
            self._channel.send(header, one.fileno())
        except OSError as error:
            if error.errno == errno.EAGAIN:
                self._later()
                return
            self._failed = error  # that it is closed must not look as if it had been taken
        else:
            if self._beside is not None:
                self._beside.add_uncounted()  # what another port sent does not stand behind it
                self._behind = self._beside.sent
        one.close()
        self._kept = None


def is_probe(header: bytes) -> bool:
    """Whether a record in a channel is a question of ours."""
    return not wire.HEADER.unpack_from(header)[-1]
