"""The sources of connections: the channel, or listening sockets.

Both return the same objects, so that the callers need not know whether there is
a protector.

Rule: a source never waits, never counts and never decides when to take.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time

from .address import OwnPaths, family_of, name_of, sockname_of
from .channel import Channel
from .connection import Connection, unread_bytes
from .log import Logger
from .system import Socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, List, Optional, Sequence

_log = Logger(__name__)

# The connection was broken before accept(), or the network failed just then.
# accept(2) says to treat these errors like EAGAIN.
NOTHING_TO_ACCEPT = frozenset(
    {
        errno.EAGAIN,
        errno.ECONNABORTED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENONET,
        errno.ENOPROTOOPT,
        errno.EPERM,
        errno.EPROTO,
    }
)

# As getpeername(2), but also after a reset.  Source: sk_getsockopt() in net/core/sock.c.
_SO_PEERNAME = 28


class Source:
    """The source of one Intake's connections."""

    #: Whether the kernel wakes one waiter, not all.  Only under a protector, which wakes another
    #: worker if the first one dies before it takes the connection.
    wakes_one = False
    #: The descriptors to wait on.
    fds: Sequence[int]
    #: The getsockname() of the first listener.
    sockname: Any

    def take(self, fd: int) -> Optional[Connection]:
        """Take one connection from fd, which the caller then owns; return None if none waits."""
        raise NotImplementedError

    def set_backlog(self, backlog: int) -> None:
        """Set how many connections may wait in the kernel, if this process owns the listeners."""

    def close(self) -> None:
        """Close the descriptors that this source owns."""


class ChannelSource(Source):
    """The connections that the protector accepted."""

    def __init__(self, channel: Channel, *, wakes_one: bool) -> None:
        """Take from the channel, which the caller keeps.

        wakes_one: True for the protector's channel: the protector sends untaken connections again.
        """
        self._channel = channel
        self.wakes_one = wakes_one
        self._listeners = [_Kind(name) for name in channel.listeners]
        self.fds = (channel.fileno(),)
        first = next((name for name in channel.listeners if family_of(name) is not None), "")
        self.sockname = sockname_of(first)

    def take(self, fd: int) -> Optional[Connection]:
        taken = self._channel.take()
        if taken is None:
            return None
        fd, index, accepted_at_ns = taken
        try:
            kind = self._listeners[index]
        except IndexError:
            kind = _Kind("")  # unknown to this generation: the kernel knows family and type
        connection = Connection(kind.family, kind.type, kind.proto, fd)
        try:
            connection.peer = Socket.getpeername(connection)
        except OSError:  # the client has reset the connection in the queue
            connection.peer = _peer_of_reset(connection)
            if connection.peer is None:
                _log.debug("a client of %s was gone before its connection was taken", kind.name)
                connection.close()
                return None
        connection.listener = kind.name
        connection.accepted_at_ns = accepted_at_ns
        return connection


def _peer_of_reset(connection: Connection) -> Any:
    """Return the client's address after a reset; None if the client has left nothing to read.

    What the client has sent can still be read, as from a socket that accept() returns.  Without
    data the handler would only fail, as for each check by a load balancer.
    """
    is_v4 = connection.family == socket.AF_INET
    try:
        if not unread_bytes(connection.fileno()):
            return None
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERNAME, 16 if is_v4 else 28)
    except OSError:
        return None
    port, flow = struct.unpack_from("!HI", raw, 2)
    if is_v4:
        return socket.inet_ntop(socket.AF_INET, raw[4:8]), port
    (scope,) = struct.unpack_from("=I", raw, 24)
    return socket.inet_ntop(socket.AF_INET6, raw[8:24]), port, flow, scope


class _Kind:
    """The properties of all connections of one listener."""

    def __init__(self, name: str) -> None:
        family = family_of(name)
        self.name = name
        self.family = -1 if family is None else family
        self.type = -1 if family is None else socket.SOCK_STREAM
        # asyncio sets TCP_NODELAY only on a socket with the protocol number of TCP.
        self.proto = {-1: -1, int(socket.AF_UNIX): 0}.get(self.family, socket.IPPROTO_TCP)


class ListenSource(Source):
    """The connections that this process accepts itself, from its own or passed sockets."""

    def __init__(
        self, listeners: List[socket.socket], *, handed: bool, names: Sequence[str] = ()
    ) -> None:
        """Take ownership of the sockets.

        Sets O_NONBLOCK on each, because a worker that loses the race for a client must not wait in
        accept().
        handed: other processes accept from them, too, and keep them open.
        names: the names of the listeners; without them, their addresses.
        """
        for one in listeners:
            one.setblocking(False)
        self._owner_pid = os.getpid()
        self._handed = handed
        self._paths = OwnPaths(() if handed else listeners)
        self.listeners = listeners
        names = names or [name_of(one.family, one.getsockname()) for one in listeners]
        self._by_fd = {one.fileno(): (one, _Kind(names[at])) for at, one in enumerate(listeners)}
        self.fds = tuple(self._by_fd)
        is_unix = listeners[0].family == socket.AF_UNIX
        self.sockname = sockname_of(names[0]) if is_unix else listeners[0].getsockname()

    def take(self, fd: int) -> Optional[Connection]:
        listener, kind = self._by_fd[fd]
        try:
            accepted, peer = listener.accept()
        except OSError as error:
            if error.errno in NOTHING_TO_ACCEPT:
                return None
            raise
        connection = Connection(kind.family, kind.type, kind.proto, accepted.detach())
        connection.peer = peer
        connection.listener = kind.name
        # Never 0, even for a probe, which looks like a client's connection here.
        connection.accepted_at_ns = time.monotonic_ns()
        return connection

    def set_backlog(self, backlog: int) -> None:
        for one in () if self._handed else self.listeners:
            one.listen(backlog)

    def close(self) -> None:
        # In a forked child the paths stay for its parent.
        if os.getpid() == self._owner_pid:
            self._paths.remove()
        for one in self.listeners:
            one.close()
        self.listeners = []
