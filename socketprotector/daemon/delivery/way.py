"""How a generation that is asked is reached."""

from __future__ import annotations

import socket
from collections.abc import Callable

from ...model.lazy_dataclass import mutable
from ...system import bpf
from ...system.cleanup import on_error
from ..generation import OpenGeneration

#: Where a command that asks is told of it.
PROBE = "SOCKETPROTECTOR_PROBE"
#: Questions come one after the other; those of a command may be a few at once.
BACKLOG = 16
#: Of what was asked when the asked socket has left its SO_REUSEPORT group: maybe of another one.
SHUT_DOWN = "its listening socket was shut down or closed to clients meanwhile"


@mutable
class Way:
    """How one is reached: where to connect to, and as whom."""

    address: tuple[str, int]  # of a UNIX socket its path, or "@" and its name, and 0
    mark: bpf.Mark | None
    #: Whether this connection to it was not taken yet.  Raises OSError.
    waits: Callable[[socket.socket], bool]
    #: It is needed no more.
    close: Callable[[], None]
    #: A connection to it is given up that was not taken yet.
    give_up: Callable[[socket.socket], None] = lambda one: None
    #: Whether what was answered until now was answered by this generation: else it counts for
    #: nothing, and what comes later does not either.
    holds: Callable[[], bool] = lambda: True
    #: Whether workers have set what keeps clients out, and the serving ones have not: time must not
    #: tell that they are ready.
    is_closed: Callable[[], bool] = lambda: False

    @property
    def is_unix(self) -> bool:
        """Whether it is a UNIX socket."""
        return not self.address[1]

    @property
    def is_ours_alone(self) -> bool:
        """Whether a process that connects there by itself may reach another generation."""
        return self.mark is not None or self.is_unix

    @property
    def text(self) -> str:
        """HOST:PORT, or what a UNIX socket is called."""
        host, port = self.address
        if self.is_unix:
            return host
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def in_words(self) -> str:
        """The same for people."""
        return self.text if self.is_unix else "{} port {}".format(*self.address)

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


#: Makes a way to a generation by a listener's name, "" for the first; None where there can be none.
#: Raises OSError.
Reach = Callable[[OpenGeneration, str], Way | None]


def family_of(address: tuple[str, int]) -> int:
    """Return that of a Way's address."""
    host, port = address
    if not port:
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in host else socket.AF_INET
