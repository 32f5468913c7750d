"""Detects a release whose first programs fail early: docs/stdio.md has the rule.

A program has failed early if it ends by a signal or with a status other than 0, and has sent its
client nothing.  That does not count if the client left without sending anything.  The first program
that ends with status 0, sends something, or runs for LIVED_S proves that the release works.  After
that no program is watched.

To learn whether a program has sent something, we keep a copy of its connection for a short time.
The client notices the program's end only when that copy is closed.  So a program that has closed
its connection is no longer watched.

Source: tcp(7), linux/tcp.h (struct tcp_info), unix(7), tcp(7) (SIOCINQ, SIOCOUTQ), proc(5).
"""

from __future__ import annotations

import _socket as socket
import fcntl
import os
import select
import struct
import termios
import time

from socketprotector_client import wire

#: How many programs are watched at the same time.
WATCHED = 3
#: A program that has run for this long has not failed early.
LIVED_S = 10.0
_INFO_BYTES = 160
_INFO_WORDS = struct.Struct("=I")
#: Offsets in tcp_info: bytes queued but not sent, and segments with data received and sent.
_NOT_SENT, _SEGMENTS_IN, _SEGMENTS_OUT = 144, 152, 156
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR
_HUNG_UP = select.POLLRDHUP


class FirstPrograms:
    """The watched programs of a pool, until one works."""

    def __init__(self) -> None:
        self.work = False  # a program has worked
        #: Messages that are still to be sent to the protector.
        self.unsent: list[str] = []
        self._held: dict[int, tuple[int, float]] = {}  # by pid: our copy, and the start time

    @property
    def watches(self) -> bool:
        """Whether a program that starts now should be watched."""
        return not self.work and len(self._held) < WATCHED

    @property
    def holds(self) -> bool:
        """Whether there are copies of connections that look() should check soon."""
        return bool(self._held)

    def started(self, pid: int, fd: int) -> None:
        """Watch a program.  Takes ownership of fd, a copy of its connection."""
        self._held[pid] = fd, time.monotonic()

    def look(self) -> None:
        """Close the copies of connections whose programs can no longer fail early."""
        now = time.monotonic()
        for pid, (fd, since) in tuple(self._held.items()):
            sent = has_sent(fd)
            if sent or now - since >= LIVED_S:
                self._works()
                return
            if sent is None or has_closed(pid, fd):
                self._let_go(pid)

    def ended(self, pid: int, status: int) -> None:
        """Judge a program that has ended.  status: from wait(2)."""
        if self.work:
            return
        fd, _ = self._held.get(pid, (-1, 0.0))
        if status == 0 or (fd >= 0 and has_sent(fd)):
            self._works()
        elif fd >= 0 and has_sent(fd) is False and not has_left(fd):
            self.unsent.append(f"{wire.PROGRAM}=failed {pid} {status}")
        self._let_go(pid)

    def _works(self) -> None:
        self.work = True
        self.unsent = [f"{wire.PROGRAM}=works"]
        for pid in tuple(self._held):
            self._let_go(pid)

    def _let_go(self, pid: int) -> None:
        fd, _ = self._held.pop(pid, (-1, 0.0))
        if fd >= 0:
            os.close(fd)


def has_sent(fd: int) -> bool | None:
    """Return whether something was sent on a connection; None: unknown.

    For a UNIX socket the answer is known only while bytes of the client are unread.
    """
    info = _tcp_info(fd)
    if info is not None:
        return bool(_word(info, _NOT_SENT) or _word(info, _SEGMENTS_OUT))
    try:
        unread, unsent = _queued(fd, termios.FIONREAD), _queued(fd, termios.TIOCOUTQ)
    except OSError:
        return None
    return bool(unsent) if unread or unsent else None


def has_closed(pid: int, fd: int) -> bool:
    """Return whether a running program has closed its connection, of which fd is our copy.

    The client waits for the end of file, perhaps while the program still works.
    """
    folder, connection = f"/proc/{pid}/fd", f"socket:[{os.fstat(fd).st_ino}]"
    try:
        names = os.listdir(folder)
        # A program that is exiting may have no descriptors left: ended() judges it.
        return bool(names) and all(os.readlink(f"{folder}/{name}") != connection for name in names)
    except OSError:
        return False  # no /proc, a program of another user, or a descriptor closed just now


def has_left(fd: int) -> bool:
    """Return whether the client has left and sent nothing, like a port scanner."""
    info = _tcp_info(fd)
    if info is None or _word(info, _SEGMENTS_IN):
        return False
    poll = select.poll()
    poll.register(fd, _HUNG_UP)
    return any(events & _GONE for _, events in poll.poll(0))


def _tcp_info(fd: int) -> bytes | None:
    """Return the tcp_info of a connection; None: it is not TCP, or the kernel is too old."""
    connection = socket.socket(fileno=fd)
    try:
        info: bytes = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    except OSError:
        return None
    finally:
        connection.detach()
    return info if len(info) == _INFO_BYTES else None


def _word(info: bytes, at: int) -> int:
    (value,) = _INFO_WORDS.unpack_from(info, at)
    return int(value)


def _queued(fd: int, request: int) -> int:
    (value,) = _INFO_WORDS.unpack(fcntl.ioctl(fd, request, bytes(4)))
    return int(value)
