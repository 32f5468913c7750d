"""The protector's two ends of a generation's channel.

The protector keeps both ends, so that the queue outlives the workers and can be reclaimed.
Never set O_NONBLOCK or a timeout on an end: both belong to the open file description (fcntl(2)), so
they would affect every worker.

Source: docs/protocol.md, section "Channel"; unix(7), cmsg(3).
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress

from socketprotector_client import wire

from .cleanup import on_error
from .polling import events_of

if os.uname().machine.startswith(("alpha", "mips", "ppc", "sh", "sparc", "xtensa")):
    import termios

    FIONREAD: int = termios.FIONREAD
else:
    FIONREAD = 0x541B  # asm-generic/ioctls.h; loading termios costs 60 KB

SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
#: The errors of sending once a worker has shut the channel down.
BROKEN = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})
_TAKE_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
#: CMSG_SPACE of one int has room for two: a second descriptor would be received unnoticed, and stay
#: open.
_ONE_DESCRIPTOR = socket.CMSG_LEN(4)
_PACK_DESCRIPTOR = struct.Struct("i").pack
#: Read at import, not at the first channel.  So the probe of an upgrade, which imports this module,
#: detects an incomplete installation: a client library without this constant.
_CHARGE_BYTES = wire.RECORD_CHARGE_BYTES


class Channel:
    """A generation's queue: only the protector has `write`; its workers share `read`."""

    def __init__(self, read: socket.socket, write: socket.socket) -> None:
        """Take ownership of both ends; `write` is already closed if the channel was ended."""
        self.read = read
        self.write = write

    @staticmethod
    def make(queue: int) -> Channel:
        """Return a new channel with room for about `queue` untaken connections (--queue).

        Only the kernel limits the number: we accept connections until a send fails with EAGAIN.

        Raises OSError if the system is out of descriptors or memory.
        """
        read, write = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with on_error(read.close), on_error(write.close):
            # The write end is never read.  If a worker sent something, the next worker would
            # get ECONNRESET when this end is closed (unix_release_sock).
            write.shutdown(socket.SHUT_RD)
            # The kernel doubles this value, and clamps it to 2 x net.core.wmem_max.
            wanted = queue * _CHARGE_BYTES // 2
            write.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, wanted)
        return Channel(read, write)

    @staticmethod
    def adopt(descriptors: Mapping[str, int]) -> Channel:
        """Return a channel that owns the ends which descriptors() named in an earlier program.

        Without a write end the channel was ended.  Raises KeyError if the read end is missing.
        """
        read = socket.socket(fileno=descriptors["read"])
        write = socket.socket(fileno=descriptors.get("write", descriptors["read"]))
        if "write" not in descriptors:
            write.detach()  # make a closed socket without a descriptor, because none may be free
        return Channel(read, write)

    def descriptors(self) -> dict[str, int]:
        """Return the descriptors for adopt() in the next program, by name."""
        found = {"read": self.read.fileno()}
        if not self.has_ended:
            found["write"] = self.write.fileno()
        return found

    def capacity(self) -> int:
        """Return how many untaken connections the channel has room for."""
        granted = self.write.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        return -(-granted // _CHARGE_BYTES)

    @property
    def closed(self) -> bool:
        return self.read.fileno() < 0

    @property
    def has_ended(self) -> bool:
        """Whether workers read end of file after the queued connections."""
        return self.write.fileno() < 0

    def depth(self) -> int:
        """Return the number of untaken connections."""
        waiting = bytearray(4)
        fcntl.ioctl(self.read, FIONREAD, waiting)
        return int.from_bytes(waiting, "little") // wire.HEADER.size

    def is_shut(self) -> bool:
        """Return True if a worker has shut the channel down, so that nothing more can be sent."""
        if self.has_ended:
            return False
        return bool(events_of(self.read, select.POLLRDHUP))

    def has_room(self) -> bool:
        """Return True if the write end has room, as poll(2) reports it."""
        return bool(events_of(self.write, select.POLLOUT))

    def send(self, header: bytes, fd: int) -> None:
        """Queue a connection; the caller still owns fd.  Raises OSError: BROKEN, EAGAIN if full.

        acceptor.py sends new connections itself, to save a Python call for each.
        """
        self.write.sendmsg([header], [rights_of(fd)], SEND_FLAGS)

    def peek(self) -> bytes | None:
        """Return the header of the oldest message, which stays queued; None if there is none."""
        try:
            # Without room for descriptors the kernel creates none.
            data, _, _, _ = self.read.recvmsg(
                wire.HEADER.size, 0, socket.MSG_PEEK | socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return None
        return data or None

    def take_back(self) -> tuple[bytes, int] | None:
        """Take the oldest message: (header and state, descriptor); None if the queue is empty.

        The caller owns the descriptor, and must have a free one: otherwise the kernel
        drops the connection, and -1 is returned in its place.
        """
        try:
            data, ancillary, _, _ = self.read.recvmsg(
                wire.HEADER.size + wire.STATE_MAX_BYTES, _ONE_DESCRIPTOR, _TAKE_FLAGS
            )
        except BlockingIOError:
            return None
        if not data:
            return None  # end of file: a worker has shut the channel down
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                return data, int.from_bytes(content[:4], sys.byteorder)
        return data, -1

    def end(self) -> None:
        """Let the workers read end of file after the queued connections.

        close() alone would have no effect on the workers while another process has a copy of the
        write end, so this uses shutdown() first.
        """
        if not self.has_ended:
            with suppress(OSError):  # a worker has shut it down already
                self.write.shutdown(socket.SHUT_WR)
            self.write.close()

    def close(self) -> None:
        """Close both ends."""
        self.end()
        self.read.close()


def rights_of(fd: int) -> tuple[int, int, bytes]:
    """Return the ancillary data that carries a descriptor in a message."""
    return socket.SOL_SOCKET, socket.SCM_RIGHTS, _PACK_DESCRIPTOR(fd)
