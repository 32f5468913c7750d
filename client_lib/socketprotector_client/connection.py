"""A connection as it is handed out, and the count of those still open.

The count decides when a worker may take more and when a draining one may
leave, so it must be right however a connection ends: closed, closed only by
the last file made from it, dropped without close, or wrapped in TLS.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import termios
import weakref
from socket import AddressFamily, SocketKind

from .system import Socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Optional, Union

# So many can be asked for each connection that is taken: 0.3 us each.
_FEW = 32


class Connection(Socket):
    """A plain blocking socket that also knows where it came from."""

    # Each connection pays for what is here: slots are half as dear as a dict.
    __slots__ = (
        "_entry", "_ledger", "_sockname", "accepted_at_ns", "family", "listener", "peer", "type"
    )  # fmt: skip

    # The socket's own properties look up the enum each time, for as long as accept() takes.
    family: AddressFamily
    type: SocketKind

    def __init__(
        self, family: int = -1, type: int = -1, proto: int = -1, fileno: Optional[int] = None
    ) -> None:
        _init(self, family, type, proto, fileno)
        self.family = family if isinstance(family, AddressFamily) else super().family
        self.type = type if isinstance(type, SocketKind) else super().type
        #: Name of the listener it came through, such as `tcp:0.0.0.0:4321`.
        self.listener = ""
        #: The client's address, as accept() gives it.
        self.peer: Any = None
        #: CLOCK_MONOTONIC nanoseconds at which it was accepted.
        self.accepted_at_ns = 0
        self._sockname: Any = None
        self._ledger: Optional[OpenConnections] = None
        self._entry: Optional[weakref.ref[Connection]] = None  # in the ledger

    def getpeername(self) -> Any:
        """Return the client's address without asking the kernel: it stays known after a reset."""
        if self.peer is None or self.fileno() < 0:
            return Socket.getpeername(self)
        return self.peer

    def getsockname(self) -> Any:
        """Return the address that the client connected to; the kernel is asked once."""
        if self._sockname is None or self.fileno() < 0:
            self._sockname = Socket.getsockname(self)
        return self._sockname

    def close(self) -> None:
        """Close the socket; files made from it with makefile() keep it open."""
        _close(self)
        # The last of those files calls close() again.
        ledger = self._ledger
        if ledger is not None and self.fileno() < 0:
            ledger.forget(self)

    def detach(self) -> int:
        """Give up the descriptor, which counts as open until it is closed."""
        ledger = self._ledger
        if ledger is not None:
            try:
                ledger.follow(self)
            except OSError:  # uvloop closes the number first; it must not be closed again
                ledger.forget(self)
        return super().detach()

    def dup(self) -> Connection:
        """Return a second descriptor of the same connection; it counts on its own."""
        copy = super().dup()
        copy.listener, copy.peer = self.listener, self.peer
        copy.accepted_at_ns = self.accepted_at_ns
        if self._ledger is not None:
            self._ledger.add(copy)
        return copy


# super() would be looked up, and made, for each connection.
_init, _close = Socket.__init__, Socket.close


class OpenConnections:
    """How many handed-out connections are open.  Thread-safe without a lock.

    A lock would be taken by the garbage collector in the middle of whatever
    holds it; single operations on sets and dicts are atomic instead.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        """Call on_change after each end that is noticed, in whichever thread it happens.

        Also when an end can no longer be noticed, only looked for.
        """
        self._on_change = on_change
        self._when_collected = self._collected  # one bound method for all
        # All: by the object, or by the descriptor that was detached.
        self._open: set[Union[weakref.ref[Connection], int]] = set()
        # Descriptor to inode, of those that ssl or others took over: no event
        # says that they were closed.
        self._detached: dict[int, int] = {}
        self._look_at = 0
        #: Returns how many there are as far as is known, without asking the system.
        self.known = self._open.__len__

    def __len__(self) -> int:
        if self._detached:
            self._drop_closed()
        return len(self._open)

    def reached(self, limit: int) -> bool:
        """Return whether so many are open.

        Those that must be asked are not all asked each time where they are many.
        """
        if self._detached:
            asked = len(self._detached)
            if asked <= _FEW or asked >= self._look_at or len(self._open) >= limit:
                self._drop_closed()
                self._look_at = 2 * len(self._detached)
        return len(self._open) >= limit

    @property
    def must_be_asked(self) -> bool:
        """Whether one of them may end without on_change being called."""
        return bool(self._detached)

    def any_unread(self) -> bool:
        """Whether one of them has sent nothing yet, or something that was not read.

        For any thread; one that is closed meanwhile may be mistaken for another.
        """
        known = [one if isinstance(one, int) else one() for one in list(self._open)]
        numbers = [one.fileno() if isinstance(one, Connection) else one for one in known]
        return any(_is_unread(fd) for fd in numbers if fd is not None and fd >= 0)

    def add(self, connection: Connection) -> None:
        connection._ledger = self
        connection._entry = entry = weakref.ref(connection, self._when_collected)
        self._open.add(entry)

    def forget(self, connection: Connection) -> None:
        entry = connection._entry
        if entry is not None:  # another reference would cost more to make and to hash
            connection._entry = None  # and see the object's end
            self._open.discard(entry)
        on_change = self._on_change  # (called as an attribute it would be looked up anew)
        on_change()

    def follow(self, connection: Connection) -> None:
        fd = connection.fileno()
        if fd >= 0:
            self._detached[fd] = os.fstat(fd).st_ino
            self._open.add(fd)
            self.forget(connection)

    def exchange(self, connection: Connection) -> socket.socket:
        """Return a plain socket instead of the connection, for libraries that take no subclass.

        Call `ended` after its end; else it is only looked for.
        """
        return Socket(connection.family, connection.type, connection.proto, connection.detach())

    def ended(self) -> None:
        """One of those that must be asked has ended."""
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
                # The number may belong to another file by now.
                is_open = os.fstat(fd).st_ino == inode
            except OSError:
                is_open = False
            if not is_open:
                self._detached.pop(fd, None)
                self._open.discard(fd)


# struct tcp_info in linux/tcp.h: tcpi_bytes_received, and room up to its end.
_BYTES_RECEIVED_AT = 128
_TCP_INFO_BYTES = 136


def _is_unread(fd: int) -> bool:
    try:
        unread: int = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]
        if unread:
            return True
        borrowed = Socket(fileno=fd)
    except OSError:
        return False  # it was closed just now
    try:
        found = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    except OSError:
        return False  # a UNIX socket, where nothing counts, or the client is gone
    finally:
        borrowed.detach()
    # An end of file counts as one byte.
    return len(found) == _TCP_INFO_BYTES and not any(found[_BYTES_RECEIVED_AT:])
