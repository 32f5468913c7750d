"""How a generation that is asked is reached.

Where workers take connections from a channel, by a port of loopback: what comes there is sent into
its channel, beside all that is counted.  Nothing else is ever in the channel of a generation that
has not served, so what is left there is thrown away when it is given up, or is to serve.  In that
of one that serves (--health) it stands among the clients, and is thrown away where these are taken
back.
"""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Callable

from socketprotector_client import wire

from ..model.lazy_dataclass import mutable
from ..model.question import Question
from ..system import reuseport
from ..system.channel import Channel
from ..system.cleanup import on_error
from ..system.listener import AGAIN
from ..system.loop import Loop
from ..system.polling import events_of
from .generation import OpenGeneration
from .queue_watch import QueueWatch

#: Where a command that asks is told of it.
PROBE = "SOCKETPROTECTOR_PROBE"
#: Questions come one after the other; those of a command may be a few at once.
BACKLOG = 16
#: Of what was asked when the asked socket has left its SO_REUSEPORT group: maybe of another one.
SHUT_DOWN = "its listening socket was shut down meanwhile"
#: How soon to accept again where the system was out of something.
_ACCEPT_AGAIN_S = 0.1


@mutable
class Way:
    """How one is reached: where to connect to, and as whom."""

    address: tuple[str, int]  # of a UNIX socket its path, or "@" and its name, and 0
    mark: reuseport.Mark | None
    #: Whether this connection to it was not taken yet.  Raises OSError.
    waits: Callable[[socket.socket], bool]
    #: It is needed no more.
    close: Callable[[], None]
    #: A connection to it is given up that was not taken yet.
    give_up: Callable[[socket.socket], None] = lambda one: None
    #: Whether what was answered until now was answered by this generation: else it counts for
    #: nothing, and what comes later does not either.
    holds: Callable[[], bool] = lambda: True

    @property
    def is_unix(self) -> bool:
        """Whether it is a UNIX socket."""
        return not self.address[1]

    @property
    def text(self) -> str:
        """HOST:PORT, or what a UNIX socket is called."""
        host, port = self.address
        if self.is_unix:
            return host
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def target(self) -> tuple[str, int] | str:
        """What connect() takes."""
        host, _ = self.address
        if not self.is_unix:
            return self.address
        return f"\0{host[1:]}" if host.startswith("@") else host

    def connecting(self) -> socket.socket:
        """Make a socket that may connect there, and does not wait.  Raises OSError."""
        one = socket.socket(family_of(self.address), socket.SOCK_STREAM)
        with on_error(one.close):
            one.setblocking(False)
            if self.mark is not None:
                self.mark.put(one)
        return one


#: Makes a way to a generation; None where there can be none.  Raises OSError.
Reach = Callable[[OpenGeneration, Question], Way | None]


def family_of(address: tuple[str, int]) -> int:
    """Return that of a Way's address."""
    host, port = address
    if not port:
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in host else socket.AF_INET


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
    def way(self) -> Way:
        """How its generation is reached."""
        host, port = self._socket.getsockname()
        return Way((host, port), None, self._waits, self.close)

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
                self._beside.extra += 1  # what another port sent before does not stand behind it
                self._behind = self._beside.sent
                if not self._beside.runs:
                    self._beside.start()
        one.close()
        self._kept = None


def is_probe(header: bytes) -> bool:
    """Whether a record in a channel is a question of ours."""
    return not wire.HEADER.unpack_from(header)[-1]
