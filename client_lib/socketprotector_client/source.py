"""Where connections come from: the channel, or listening sockets of our own.

Both give the same thing, so that nothing above needs to know whether there is
a protector.

Rule: a source never waits, never counts and never decides when to take.
"""

from __future__ import annotations

import errno
import os
import socket
import time

from .address import close_all, family_of, name_of, sockname_of
from .channel import Channel
from .connection import Connection
from .log import Logger
from .system import Socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, List, Optional, Sequence

_log = Logger(__name__)

# The kernel took the connection from the backlog and it was broken already,
# or the network failed just then: man 2 accept says to go on as after EAGAIN.
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


class Source:
    """What an Intake takes from."""

    #: Have the kernel wake one waiter, not all.  A worker may die between wake-up and take: only
    #: where the protector then wakes another.
    wakes_one = False
    #: The descriptors to wait on.
    fds: Sequence[int]
    #: What getsockname() gives on the first listener.
    sockname: Any

    def take(self, fd: int) -> Optional[Connection]:
        """Take one connection from fd, None if there is none.  The caller owns it."""
        raise NotImplementedError

    def set_backlog(self, backlog: int) -> None:
        """Let so many connections wait in the kernel, where that is ours to say."""

    def close(self) -> None:
        """Give up what this source owns."""


class ChannelSource(Source):
    """Connections that the protector accepted.  The channel stays the caller's."""

    def __init__(self, channel: Channel, *, wakes_one: bool) -> None:
        """wakes_one: the protector is behind it, which sends again what is not taken."""
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
            kind = _Kind("")  # this generation does not know it: ask the kernel
        connection = Connection(kind.family, kind.type, kind.proto, fd)
        try:
            connection.peer = Socket.getpeername(connection)
        except OSError:
            # The client reset it while it was queued: whatever it had sent is
            # gone with it, and accept() would not have shown it either.
            _log.debug("a client of %s was gone before its connection was taken", kind.name)
            connection.close()
            return None
        connection.listener = kind.name
        connection.accepted_at_ns = accepted_at_ns
        return connection


class _Kind:
    """What is known of all connections of one listener."""

    def __init__(self, name: str) -> None:
        family = family_of(name)
        self.name = name
        self.family = -1 if family is None else family
        self.type = -1 if family is None else socket.SOCK_STREAM
        # As in sockets that asyncio makes itself: it sets TCP_NODELAY only
        # where the protocol number says TCP.
        self.proto = {-1: -1, int(socket.AF_UNIX): 0}.get(self.family, socket.IPPROTO_TCP)


class ListenSource(Source):
    """Connections that this process accepts itself, from sockets of its own or handed ones."""

    def __init__(self, listeners: List[socket.socket], *, handed: bool) -> None:
        """Take ownership of the sockets; handed: other processes accept from them, too, and go on.

        Sets O_NONBLOCK for all of them: a worker that comes second must not wait in accept().
        """
        for one in listeners:
            one.setblocking(False)
        self._owner_pid = os.getpid()
        self._handed = handed
        self.listeners = listeners
        self._by_fd = {
            one.fileno(): (one, _Kind(name_of(one.family, one.getsockname()))) for one in listeners
        }
        self.fds = tuple(self._by_fd)
        self.sockname = listeners[0].getsockname()

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
        connection.accepted_at_ns = time.monotonic_ns()
        return connection

    def set_backlog(self, backlog: int) -> None:
        for one in () if self._handed else self.listeners:
            one.listen(backlog)

    def close(self) -> None:
        if os.getpid() == self._owner_pid and not self._handed:
            close_all(self.listeners)
        else:  # the UNIX sockets of others stay, as a forked child's parent's
            for one in self.listeners:
                one.close()
        self.listeners = []
