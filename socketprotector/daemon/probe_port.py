"""How a generation that gets no clients yet is reached.

Where workers take connections from a channel, by a port of loopback: what comes there is sent into
its channel, beside all that is counted.  Nothing else is ever in the channel of a generation that
has not served, so what is left there is thrown away when it is given up, or is to serve.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from socketprotector_client import wire

from ..system import reuseport
from ..system.channel import Channel
from ..system.cleanup import on_error
from ..system.listener import AGAIN
from ..system.loop import Loop
from ..system.polling import events_of

#: Questions come one after the other; those of a command may be a few at once.
BACKLOG = 16
#: How soon to accept again where the system was out of something.
_ACCEPT_AGAIN_S = 0.1


@dataclass(slots=True, repr=False, eq=False)
class Way:
    """How one is reached: where to connect to, and as whom."""

    address: tuple[str, int]
    mark: reuseport.Mark | None
    #: Whether this connection to it was not taken yet.  Raises OSError.
    waits: Callable[[socket.socket], bool]
    #: It is needed no more.
    close: Callable[[], None]


class ProbePort:
    """A port of loopback; owns its socket."""

    def __init__(self, loop: Loop, channel: Channel, index: int) -> None:
        """Send what comes there into a channel, as by the listener of this index.

        Raises OSError.
        """
        self._loop, self._channel, self._index = loop, channel, index
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        with on_error(self._socket.close):
            self._socket.setblocking(False)
            self._socket.bind(("127.0.0.1", 0))
            self._socket.listen(BACKLOG)
            loop.watch(self._socket.fileno(), self._came)

    @property
    def way(self) -> Way:
        """How its generation is reached."""
        host, port = self._socket.getsockname()
        return Way((host, port), None, self._waits, self.close)

    def close(self) -> None:
        """Send nothing more."""
        self._loop.cancel(self)
        self._loop.unwatch(self._socket.fileno())
        self._socket.close()

    def _waits(self, one: socket.socket) -> bool:
        return bool(events_of(self._socket, select.POLLIN)) or self._channel.depth() > 0

    def _watch(self) -> None:
        try:
            self._loop.watch(self._socket.fileno(), self._came)
        except OSError:
            self._loop.call_after(self, _ACCEPT_AGAIN_S, self._watch)

    def _came(self) -> None:
        """Send one; what cannot be sent is closed, and asked again."""
        try:
            one, _ = self._socket.accept()
        except OSError as error:
            if error.errno not in AGAIN:
                # Out of descriptors: it stays readable, so only a timer helps.
                self._loop.unwatch(self._socket.fileno())
                self._loop.call_after(self, _ACCEPT_AGAIN_S, self._watch)
            return
        # Accepted at 0: it is no client's (docs/protocol.md).
        header = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, self._index, 0, 0)
        with one, suppress(OSError):
            self._channel.send(header, one.fileno())


def forget_probes(channel: Channel) -> None:
    """Close what was asked and not taken: it is in front of all clients.  Raises OSError."""
    while (header := channel.peek()) and not wire.HEADER.unpack(header)[-1]:
        taken = channel.take_back()
        if taken is not None and taken[1] >= 0:
            os.close(taken[1])
