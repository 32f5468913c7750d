"""Describes where and how a probe connects to one generation."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

from ...model.lazy_dataclass import mutable
from ...system import bpf, loopback, scoped
from ...system.cleanup import on_error
from ..generation import OpenGeneration

#: The environment variable with the address that a check command probes.
PROBE = "SOCKETPROTECTOR_PROBE"
#: The message about a probe if ProbeTarget.is_unchanged() returns False.
SHUT_DOWN = "the generation's socket was shut down, closed to clients or replaced during the probe"


@mutable
class ProbeTarget:
    """The address to which probes of one generation connect, and the mark of these probes.

    The sockets of two generations may share one TCP address.  The kernel then selects the socket by
    the probe's mark (system/bpf.py).  Exception: if a probe must reach the serving generation as
    clients do, its mark selects no socket.  A mark includes a source address, to which the probe's
    socket is bound.  The address belongs to this machine, so the probe cannot leave the machine.
    Over IPv4, no client has this address.
    """

    #: Host and port; for a UNIX socket: its path, or "@" and its name, with 0 as the port.
    address: tuple[str, int]
    mark: bpf.Mark | None  # None: the address alone leads to the generation
    #: Returns whether this connection still waits for a worker to accept it.  Raises OSError.
    waits: Callable[[socket.socket], bool]
    #: Releases the target after the last probe.
    close: Callable[[], None]
    #: Notes that a connection is abandoned before a worker has accepted it.
    abandon: Callable[[socket.socket], None] = lambda connection: None
    #: Returns whether all answers so far surely came from this generation.  If False, discard
    #: earlier and later answers.
    is_unchanged: Callable[[], bool] = lambda: True
    #: Returns whether the probed socket and the serving generation's socket differ in an option
    #: that can keep clients out.  If True, the probed socket perhaps refuses clients.  Then the
    #: generation must not count as ready merely because a timer has ended (ready_probe.py).
    may_refuse_clients: Callable[[], bool] = lambda: False
    #: Sends the server end of a connection over loopback to the generation, and closes our copy.
    #: None: probes connect to the address.
    give: Callable[[socket.socket], None] | None = None

    @property
    def is_unix(self) -> bool:
        """Return whether the address is a UNIX socket."""
        return not self.address[1]

    @property
    def text(self) -> str:
        """HOST:PORT, or the path or @name of a UNIX socket."""
        host, port = self.address
        if self.is_unix:
            return host
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def host_header(self) -> str:
        """The address for an HTTP request; an interface means nothing to others (RFC 6874)."""
        return "localhost" if self.is_unix else scoped.without_interface(self.text)

    @property
    def in_words(self) -> str:
        """The address for messages, such as "127.0.0.1 port 80"."""
        return self.text if self.is_unix else "{} port {}".format(*self.address)

    @property
    def connect_address(self) -> scoped.SocketAddress | str:
        """The address in the form for connect().  Raises OSError."""
        host, _ = self.address
        if not self.is_unix:
            return scoped.sockaddr(*self.address)
        return f"\0{host[1:]}" if host.startswith("@") else host

    def connect(self) -> tuple[socket.socket, int]:
        """Return a non-blocking socket that connects to the generation, and connect()'s errno.

        EAGAIN: try again.  Raises OSError.
        """
        if self.give is None:
            client = self.connecting()
            with on_error(client.close):
                return client, client.connect_ex(self.connect_address)
        client, server = loopback.pair()
        if server is None:
            return client, errno.EAGAIN
        with on_error(client.close):
            self.give(server)
        return client, 0

    def connecting(self) -> socket.socket:
        """Make a non-blocking socket that can connect to the address.  Raises OSError."""
        client = socket.socket(family_of(self.address), socket.SOCK_STREAM)
        with on_error(client.close):
            client.setblocking(False)
            if self.mark is not None:
                self.mark.put(client)
        return client


#: Returns the target of a generation by a listener's name ("" for the first); None: a probe is
#: impossible.  Raises OSError.
Reach = Callable[[OpenGeneration, str], ProbeTarget | None]


def family_of(address: tuple[str, int]) -> int:
    """Return the socket family of a target's address."""
    host, port = address
    if not port:
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in host else socket.AF_INET
