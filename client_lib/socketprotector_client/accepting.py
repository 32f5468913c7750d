"""The process that accepts for a SocketServer: from the backlog into the queue, nothing else.

A process of its own, not a thread: a program that forks must have no thread, or its
children inherit locks that nobody will ever release.  It begins with a fresh interpreter and
nothing but the descriptors below, and ends when the parent's line does, however that
comes about.  Then nobody new gets in, and who has connected is still queued.

Rule: holds one connection at most.  While the queue is full the backlog holds the rest.

Source: tcp(7), unix(7), socket(7) for SO_ATTACH_FILTER.
"""

from __future__ import annotations

import array
import errno
import logging
import os
import select
import signal
import socket
import struct
import sys
import time
from typing import Mapping, Optional, Sequence

from . import wire
from .source import NOTHING_TO_ACCEPT

_log = logging.getLogger(__name__)

#: What `python -c` runs; the arguments are those of `arguments`.
PROGRAM = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from socketprotector_client.accepting import main; main()"
)

#: The kernel charges one 16-byte message with one descriptor so much against SO_SNDBUF
#: (measured: 278 messages in the default 212,992 bytes).
MESSAGE_CHARGE_BYTES = 768

# How soon to look again while the system is short of something.
_RETRY_S = 0.05
# Handshakes that are under way at the stop finish in so long, or begin again.
_QUIET_S = 0.2
# Looks in a row that find somebody, after which the stop is over all the same: where the
# system does not let us refuse new ones they might come for ever.
_BUSY_LOOKS = 50
# Connections of one listener in one go; then the others, and the parent, have their turn.
_BURST = 64

# What sending says once nobody can take any more.
_BROKEN = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})

_SO_ATTACH_FILTER = 26
# Drops segments with SYN and without ACK and passes the rest, so that nobody new comes
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


def arguments(parent_fd: int, queue_fd: int, listeners: Mapping[int, str]) -> list[str]:
    """Return the arguments for PROGRAM; the names of the listeners are for `ps`."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return [
        package,
        str(parent_fd),
        str(queue_fd),
        *(f"{fd}={name}" for fd, name in listeners.items()),
    ]


def main() -> None:
    """Accept until the parent's line ends, then empty the backlog and exit."""
    # Its end follows from the parent's; a signal to all processes of a service must not
    # cut off who waits.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent_fd, queue_fd, *listeners = sys.argv[2:]
    acceptor = _Acceptor(
        socket.socket(fileno=int(parent_fd)),
        socket.socket(fileno=int(queue_fd)),
        [socket.socket(fileno=int(one.partition("=")[0])) for one in listeners],
    )
    try:
        acceptor.accept_for_parent()
        acceptor.empty()
    except BrokenPipeError:
        pass  # nobody is left who could take a connection
    finally:
        acceptor.close()


class _Acceptor:
    """Owns the listeners and the writing end of the queue."""

    def __init__(
        self, parent: socket.socket, queue: socket.socket, listeners: Sequence[socket.socket]
    ) -> None:
        self._parent = parent
        self._queue = queue
        self._listeners = {one.fileno(): (index, one) for index, one in enumerate(listeners)}
        self._hand: Optional[tuple[bytes, socket.socket]] = None  # accepted, and no room for it
        self._shortage = 0  # errno of what the system is short of

    def accept_for_parent(self) -> None:
        """Move connections until the parent's line ends.  Raises BrokenPipeError."""
        self._parent.send(b"\0")  # the parent waits for it
        while True:
            ready = self._wait(None, self._parent.fileno())
            if self._parent.fileno() in ready:
                return
            self._move(ready)

    def empty(self) -> None:
        """Let nobody new in, and move who has connected.  Raises BrokenPipeError."""
        for _, listener in self._listeners.values():
            _refuse_new(listener)
        # A UNIX socket knows no handshake.
        shakes_hands = any(one.family != socket.AF_UNIX for _, one in self._listeners.values())
        looks_left = _BUSY_LOOKS
        while looks_left:
            moved = self._move(list(self._listeners))
            if self._hand is not None or self._shortage:
                self._wait(None)
                continue
            if moved:
                looks_left -= 1
                continue
            # Readable for ever is what was shut down: only who shakes hands is waited for.
            if not shakes_hands or not self._wait(_QUIET_S):
                return

    def close(self) -> None:
        """End the queue for its readers.  shutdown(), because a copy may live elsewhere."""
        for end in (self._queue, *(one for _, one in self._listeners.values())):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # was shut down already
            end.close()

    def _wait(self, timeout_s: Optional[float], *also: int) -> list[int]:
        """Wait until there is something to do; return what is readable."""
        poll = select.poll()
        for fd in also:
            poll.register(fd, select.POLLIN)
        if self._shortage:
            timeout_s = _RETRY_S
        elif self._hand is not None:
            poll.register(self._queue, select.POLLOUT)
        else:
            for fd, (_, listener) in self._listeners.items():
                if listener.family != socket.AF_UNIX or also:
                    poll.register(fd, select.POLLIN)
        found = [fd for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)]
        # After a shortage nobody has said which: all are looked at.
        return found or list(self._listeners) if self._shortage else found

    def _move(self, fds: Sequence[int]) -> int:
        """Accept from the listeners among fds and queue; return how many came."""
        was_short, self._shortage = self._shortage, 0
        moved = 0
        try:
            if self._send():
                for fd in fds:
                    if fd in self._listeners:
                        moved += self._move_from(*self._listeners[fd])
        except BrokenPipeError:
            raise
        except OSError as error:
            self._shortage = error.errno or errno.EIO
            if self._shortage != was_short:  # once, not each time it is tried
                _log.error("cannot accept: %s; trying again", os.strerror(self._shortage))
        return moved

    def _move_from(self, index: int, listener: socket.socket) -> int:
        for moved in range(_BURST):
            try:
                connection, _ = listener.accept()
            except OSError as error:
                # EINVAL: it was shut down, and nobody waits there any more.
                if error.errno in NOTHING_TO_ACCEPT or error.errno == errno.EINVAL:
                    return moved
                raise
            header = wire.HEADER.pack(
                wire.VERSION, wire.KIND_CONNECTION, index, 0, time.monotonic_ns()
            )
            self._hand = header, connection
            if not self._send():
                return moved + 1
        return _BURST

    def _send(self) -> bool:
        """Queue what is in hand; return whether the hand is empty."""
        if self._hand is None:
            return True
        header, connection = self._hand
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [connection.fileno()]))]
        try:
            self._queue.sendmsg([header], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _BROKEN:
                raise BrokenPipeError from error
            raise
        self._hand = None
        connection.close()
        return True


def _refuse_new(listener: socket.socket) -> None:
    """Let nobody new connect; who has connected can still be accepted."""
    if listener.family == socket.AF_UNIX:
        # In this order: once connections are refused, another may take the path for its own.
        path = listener.getsockname()
        if isinstance(path, str) and path:
            try:
                os.unlink(path)
            except OSError:
                pass  # somebody else has removed it
        listener.shutdown(socket.SHUT_RD)
        return
    program = array.array("B", _NO_NEW_CLIENTS)
    address, length = program.buffer_info()
    try:
        listener.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", length // 8, address)
        )
    except OSError:
        pass  # not granted (optmem_max): new ones come until it is closed
