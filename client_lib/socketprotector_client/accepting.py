"""The accepting process of a SocketServer: it moves connections from the backlog to the queue.

A thread cannot do this, because a program that forks must have no thread: the children would
inherit locks that are never released.  The accepting process is a fresh interpreter with only the
descriptors below.  Its line to the parent is a socket pair.  When the parent closes the line, or is
killed, the accepting process refuses new clients, queues the connected clients, and exits.

Rule: the process holds at most one connection.  While the queue is full, the backlog holds the
rest.

Source: tcp(7), unix(7), socket(7) for SO_ATTACH_FILTER; sock_bindtoindex() in net/core/sock.c for
SO_BINDTOIFINDEX.
"""

from __future__ import annotations

import array
import errno
import os
import select
import signal
import socket
import struct
import sys
import time

from . import wire
from .address import OwnPaths
from .log import Logger
from .source import NOTHING_TO_ACCEPT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterable, Mapping, Optional, Sequence

_log = Logger(__name__)

#: The program that `python -c` runs; arguments() returns its arguments.
PROGRAM = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from socketprotector_client.accepting import main; main()"
)

# How soon to try again while the system is short of a resource.
_RETRY_S = 0.05
# A handshake that is under way at the stop finishes within this time, or the client repeats it.
_QUIET_MS = 200
# The most connections to queue after the stop: more than a backlog holds.  Without this limit, the
# process might never end if the system does not let us refuse new clients.
_MOST_AT_STOP = 1 << 16
# The most connections to take from a listener before looking at other listeners and the parent.
_BURST = 64

# The errors of sending when no process is left to take connections.
_BROKEN = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})

_SO_BINDTOIFINDEX, _NO_DEVICE = 62, 0x7FFFFFFF
_SO_ATTACH_FILTER = 26
# Drops segments with SYN and without ACK, and passes all others.  So no client begins to connect
# while handshakes that are under way finish.
_NO_NEW_CLIENTS = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # load the byte with the flags
        (0x54, 0, 0, 0x12),  # keep SYN and ACK
        (0x15, 0, 1, 0x02),  # SYN alone?
        (0x06, 0, 0, 0),  # drop
        (0x06, 0, 0, 0xFFFFFFFF),  # pass
    )
)


def arguments(queue_fd: int, listeners: Mapping[int, str]) -> list[str]:
    """Return the arguments for PROGRAM.  Its standard input must be the parent's line.

    The names of the listeners are only for the output of `ps`.
    """
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return [package, str(queue_fd), *(f"{fd}={name}" for fd, name in listeners.items())]


def main() -> None:
    """Accept until the parent's line ends, then empty the backlog and exit."""
    # This process ends only after its parent: a signal to all processes of a service must not cut
    # off waiting clients.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    numbers = [0, *(int(word.partition("=")[0]) for word in sys.argv[2:])]
    parent, queue, *listeners = (socket.socket(fileno=number) for number in numbers)
    acceptor = _Acceptor(parent, queue, listeners)
    try:
        acceptor.accept_for_parent()
        acceptor.empty()
    except BrokenPipeError:
        pass  # no process is left to take connections
    finally:
        acceptor.close()


class _Acceptor:
    """Moves connections; owns the listeners and the writing end of the queue."""

    def __init__(
        self, parent: socket.socket, queue: socket.socket, listeners: Sequence[socket.socket]
    ) -> None:
        self._parent = parent
        self._queue = queue
        self._listeners = {one.fileno(): (index, one) for index, one in enumerate(listeners)}
        self._paths = OwnPaths(listeners)
        self._pending: Optional[tuple[bytes, socket.socket]] = None  # accepted, not queued
        self._shortage = 0  # the errno of the current shortage, 0 without one

    def accept_for_parent(self) -> None:
        """Move connections to the queue until the parent's line ends.  Raises BrokenPipeError."""
        self._parent.send(b"\0")  # the parent waits for this byte
        parent = self._parent.fileno()
        while parent not in (ready := self._wait([parent, *self._listeners])):
            self._move(ready)

    def empty(self) -> None:
        """Refuse new clients, and queue the connected clients.  Raises BrokenPipeError."""
        self._paths.remove()
        for _, listener in self._listeners.values():
            _refuse_new(listener)
        # Wait only for TCP: a UNIX socket has no handshake, and stays readable after its shutdown.
        over_tcp = [fd for fd, (_, one) in self._listeners.items() if one.family != socket.AF_UNIX]
        remaining = _MOST_AT_STOP
        while remaining > 0:
            moved = self._move(self._listeners)
            remaining -= moved
            if moved or self._shortage:
                continue
            if self._pending is not None:
                self._wait([])
            elif not over_tcp or not self._wait(over_tcp, _QUIET_MS):
                return

    def close(self) -> None:
        """End the queue for its readers; shutdown() does so even if other processes have copies."""
        for end in (self._queue, *(one for _, one in self._listeners.values())):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it was shut down already
            end.close()

    def _wait(self, fds: Iterable[int], timeout_ms: Optional[int] = None) -> list[int]:
        """Wait, and return the readable fds; while the queue is full, ignore the listeners."""
        poll = select.poll()
        if self._pending is not None:
            poll.register(self._queue, select.POLLOUT)
        for fd in fds:
            if self._pending is None or fd not in self._listeners:
                poll.register(fd, select.POLLIN)
        return [fd for fd, _ in poll.poll(timeout_ms)]

    def _move(self, fds: Iterable[int]) -> int:
        """Accept from the listeners among fds and queue the connections; return their number."""
        moved = 0
        try:
            for fd in self._listeners.keys() & fds:
                for _ in range(_BURST):
                    if not self._send() or not self._accept(*self._listeners[fd]):
                        break
                    moved += 1
            self._send()
            self._shortage = 0
        except OSError as error:
            if error.errno in _BROKEN:
                raise BrokenPipeError from error
            if self._shortage != error.errno:  # log it once, not at each try
                _log.error("cannot accept: %s; trying again", error.strerror)
            self._shortage = error.errno or errno.EIO
            time.sleep(_RETRY_S)
        return moved

    def _accept(self, index: int, listener: socket.socket) -> bool:
        """Accept a connection into `_pending`; return False if no client waits."""
        try:
            connection, _ = listener.accept()
        except OSError as error:
            # EINVAL: the listener was shut down, and no client waits there any more.
            if error.errno in NOTHING_TO_ACCEPT or error.errno == errno.EINVAL:
                return False
            raise
        header = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, index, 0, time.monotonic_ns())
        self._pending = header, connection
        return True

    def _send(self) -> bool:
        """Queue the pending connection; return False if it is still pending."""
        if self._pending is None:
            return True
        header, connection = self._pending
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [connection.fileno()]))]
        try:
            self._queue.sendmsg([header], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        self._pending = None
        connection.close()
        return True


def _refuse_new(listener: socket.socket) -> None:
    """Let no new client connect; connected clients can still be accepted."""
    if listener.family == socket.AF_UNIX:
        listener.shutdown(socket.SHUT_RD)
        return
    # A socket that is bound to a device gets only clients of that device.  A handshake under way
    # finishes, because it keeps the device that the socket had when the handshake began.
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, _NO_DEVICE)
        return
    except OSError:
        pass  # the kernel is older than 5.7, and requires CAP_NET_RAW
    program = array.array("B", _NO_NEW_CLIENTS)
    address, length = program.buffer_info()
    try:
        listener.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", length // 8, address)
        )
    except OSError:
        pass  # no permission (since 2026 only root has it): clients still connect until close()
