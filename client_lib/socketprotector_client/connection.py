"""A connection that the library hands out, and the count of open connections.

The count decides when a worker may take more connections, and when a draining worker may
exit.  So the count must be right however a connection ends: by close(), by closing the last
file made from the connection, without close(), or wrapped in TLS.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import termios
import weakref
from socket import AddressFamily, SocketKind

from .system import Socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Optional, Union

# Up to this many detached descriptors, all are polled for each taken connection: 0.3 us each.
_FEW = 32
# The objects with detached connections: perhaps nothing else keeps them, or their intake, alive.
_KEPT: set[OpenConnections] = set()


class Connection(Socket):
    """A plain blocking socket that also knows its listener, its peer and its time of accept."""

    # Slots: half the cost of a dict, for each connection.
    __slots__ = (
        "_entry", "_ledger", "_sockname", "accepted_at_ns", "family", "listener", "peer", "type"
    )  # fmt: skip

    # Attributes: the socket's own properties look up an enum, which costs as much as an accept().
    family: AddressFamily
    type: SocketKind

    def __init__(
        self, family: int = -1, type: int = -1, proto: int = -1, fileno: Optional[int] = None
    ) -> None:
        _init(self, family, type, proto, fileno)
        self.family = family if isinstance(family, AddressFamily) else super().family
        self.type = type if isinstance(type, SocketKind) else super().type
        #: Name of the listener that the client connected to, such as `tcp:0.0.0.0:4321`.
        self.listener = ""
        #: The client's address, as accept() returns it.
        self.peer: Any = None
        #: Time of accept in CLOCK_MONOTONIC nanoseconds.
        self.accepted_at_ns = 0
        self._sockname: Any = None
        self._ledger: Optional[OpenConnections] = None
        self._entry: Optional[weakref.ref[Connection]] = None  # in the ledger

    def getpeername(self) -> Any:
        """Return the client's address without a system call, even after a reset."""
        if self.peer is None or self.fileno() < 0:
            return Socket.getpeername(self)
        return self.peer

    def getsockname(self) -> Any:
        """Return the address that the client connected to, with one system call at most."""
        if self._sockname is None or self.fileno() < 0:
            self._sockname = Socket.getsockname(self)
        return self._sockname

    def close(self) -> None:
        """Close the socket; files made from it with makefile() keep it open."""
        try:
            _close(self)
        finally:  # also if the program has closed the descriptor behind our back: EBADF
            # The last of those files calls close() again.
            ledger = self._ledger
            if ledger is not None and self.fileno() < 0:
                ledger.forget(self)

    def detach(self) -> int:
        """Return the descriptor without closing it; it counts as open until it is closed."""
        ledger = self._ledger
        if ledger is not None:
            try:
                ledger.follow(self)
            except OSError:  # uvloop has already closed the descriptor; do not close it again
                ledger.forget(self)
        return super().detach()

    def dup(self) -> Connection:
        """Return a second descriptor of the same connection; both count as open."""
        copy = super().dup()
        copy.listener, copy.peer = self.listener, self.peer
        copy.accepted_at_ns = self.accepted_at_ns
        if self._ledger is not None:
            self._ledger.add(copy)
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return the state by which multiprocessing passes the connection to another process.

        The connection counts as open only in this process.  While multiprocessing is loaded, copy
        and pickle make such a duplicate, too.
        """
        reduction: Any = sys.modules.get("multiprocessing.reduction")
        if reduction is None:
            return super().__reduce_ex__(protocol)  # raises TypeError
        known = self.listener, self.peer, self.accepted_at_ns
        duplicate = reduction.DupFd(self.fileno())
        return _received, (duplicate, self.family, self.type, self.proto, known)


def _received(duplicate: Any, family: int, type: int, proto: int, known: Any) -> Connection:
    fd = duplicate.detach()
    os.set_inheritable(fd, False)
    connection = Connection(family, type, proto, fd)
    connection.listener, connection.peer, connection.accepted_at_ns = known
    return connection


# Module variables, because super() would cost a lookup and an object for each connection.
_init, _close = Socket.__init__, Socket.close


class OpenConnections:
    """The handed-out connections that are open.  Thread-safe without a lock.

    A lock could deadlock, because the garbage collector may call _collected() in the thread that
    holds the lock.  Instead, single operations on sets and dicts are atomic.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        """Call on_change after a connection was closed or detached, in the thread that did so.

        No event announces the end of a detached connection: it must be polled for.
        """
        self._on_change = on_change
        #: Whether connections may still be added.
        self.takes = True
        self._when_collected = self._collected  # one bound method for all
        # All open connections: an object, or a detached descriptor.
        self._open: set[Union[weakref.ref[Connection], int]] = set()
        # Detached descriptor -> inode.  ssl or other code owns these, and no event
        # announces that they were closed.
        self._detached: dict[int, int] = {}
        self._next_poll_at = 0  # the number of detached descriptors at which the next poll is due
        #: Returns the number of connections not known to be closed, without a system call.
        self.known = self._open.__len__

    def __len__(self) -> int:
        if self._detached:
            self._drop_closed()
        return len(self._open)

    def reached(self, limit: int) -> bool:
        """Return whether at least `limit` connections are open.

        If there are many detached descriptors, not every call polls them.
        """
        if self._detached:
            detached = len(self._detached)
            if detached <= _FEW or detached >= self._next_poll_at or len(self._open) >= limit:
                self._drop_closed()
                self._next_poll_at = 2 * len(self._detached)
        return len(self._open) >= limit

    @property
    def must_be_polled(self) -> bool:
        """Whether a connection may end without a call of on_change."""
        return bool(self._detached)

    def any_beginning(self) -> bool:
        """Return whether some client's first request is unread, or may be on its way.

        Safe in any thread.  A connection that is closed meanwhile may be mistaken for a new one.
        """
        known = [one if isinstance(one, int) else one() for one in list(self._open)]
        numbers = [one.fileno() if isinstance(one, Connection) else one for one in known]
        return any(_is_beginning(fd) for fd in numbers if fd is not None and fd >= 0)

    def add(self, connection: Connection) -> None:
        connection._ledger = self
        connection._entry = entry = weakref.ref(connection, self._when_collected)
        self._open.add(entry)

    def forget(self, connection: Connection) -> None:
        entry = connection._entry
        if entry is not None:  # we keep the reference: a new one costs more to make and to hash
            connection._entry = None  # otherwise the reference would report the object's end
            self._open.discard(entry)
        on_change = self._on_change  # a local variable is faster to call than an attribute
        on_change()

    def follow(self, connection: Connection) -> None:
        fd = connection.fileno()
        if fd >= 0:
            self._detached[fd] = os.fstat(fd).st_ino
            self._open.add(fd)
            _KEPT.add(self)
            self.forget(connection)

    def exchange(self, connection: Connection) -> socket.socket:
        """Return a plain socket for the connection, for libraries that accept no subclass.

        Call `ended` when the connection has ended; without that call its end must be polled for.
        """
        return Socket(connection.family, connection.type, connection.proto, connection.detach())

    def ended(self) -> None:
        """Record that a detached connection has ended."""
        if len(self._detached) <= _FEW:
            self._drop_closed()
        self._on_change()

    def _collected(self, reference: weakref.ref[Connection]) -> None:
        if reference in self._open:
            self._open.discard(reference)
            self._on_change()

    def _drop_closed(self) -> None:
        for fd, inode in list(self._detached.items()):
            try:
                # The descriptor may belong to another file by now.
                is_open = os.fstat(fd).st_ino == inode
            except OSError:
                is_open = False
            if not is_open:
                self._detached.pop(fd, None)
                self._open.discard(fd)
        if not self._detached:
            _KEPT.discard(self)


# struct tcp_info in linux/tcp.h: the offsets of tcpi_last_data_sent (milliseconds ago) and
# tcpi_bytes_received, and the size up to its end.
_LAST_SENT_AT, _BYTES_RECEIVED_AT = 44, 128
_TCP_INFO_BYTES = 136
# A client in a TLS handshake has sent at most _HANDSHAKE_BYTES.  It sends its request within
# _HANDSHAKE_MS after the server's part of the handshake, unless its network is very slow.
_HANDSHAKE_BYTES, _HANDSHAKE_MS = 4096, 500


def unread_bytes(fd: int) -> int:
    """Return how many bytes the client has sent that were not read yet.  Raises OSError."""
    (unread,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
    return int(unread)


def _is_beginning(fd: int) -> bool:
    try:
        if unread_bytes(fd):
            return True
        # SOCK_NONBLOCK in the type: otherwise Python would set O_NONBLOCK on the program's
        # connection if the program has called socket.setdefaulttimeout().
        borrowed = Socket(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK, fileno=fd)
    except OSError:
        return False  # another thread has closed it
    try:
        found = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    except OSError:
        return False  # a UNIX socket, which has no such counter, or the client is gone
    finally:
        borrowed.detach()
    if len(found) != _TCP_INFO_BYTES:
        return False
    # An end of file counts as one byte.
    (received,) = struct.unpack_from("=Q", found, _BYTES_RECEIVED_AT)
    (sent_ms_ago,) = struct.unpack_from("=I", found, _LAST_SENT_AT)
    is_handshake = bool(received <= _HANDSHAKE_BYTES and sent_ms_ago < _HANDSHAKE_MS)
    return is_handshake or received == 0
