"""The protector's two ends of a generation's channel.

Both ends are kept, so that the queue outlives the workers and can be taken back.
Never set O_NONBLOCK or a time-out here: the flag would be every worker's too, for it belongs to the
open file description (fcntl(2)).

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
    FIONREAD = 0x541B  # asm-generic/ioctls.h; to load termios takes 60 KB

SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
#: What sending says once a worker has shut the channel down.
BROKEN = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})
_TAKE_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
#: CMSG_SPACE of one int has room for two: the second would be received unnoticed, and stay open.
_ONE_DESCRIPTOR = socket.CMSG_LEN(4)
_PACK_DESCRIPTOR = struct.Struct("i").pack
#: Read here, not at the first channel: a client library that lacks it is an incomplete
#: installation, which the probe of an upgrade is to find by importing this.
_CHARGE_BYTES = wire.RECORD_CHARGE_BYTES


class Channel:
    """A generation's queue: `write` is ours alone, `read` is shared with its workers."""

    def __init__(self, read: socket.socket, write: socket.socket) -> None:
        """Take ownership of both ends; `write` is already closed if the channel was ended."""
        self.read = read
        self.write = write
        #: The listeners that its workers know, by index; None: all there are.
        self.knows: frozenset[int] | None = None
        #: Whether any worker has been seen to take from it.
        self.taken_from = False
        #: Whether it was said that no worker does.
        self.said_untaken = False

    def knows_of(self, index: int) -> bool:
        """Whether its workers can be given connections of a listener."""
        return self.knows is None or index in self.knows

    @classmethod
    def make(cls, queue: int) -> Channel:
        """Make the pair with room for about `queue` untaken connections.

        Raises OSError when the system is out of descriptors or memory.
        """
        read, write = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with on_error(read.close), on_error(write.close):
            # Nothing is read here, and what a worker had sent would be an ECONNRESET for the
            # next worker that takes once this end is closed (unix_release_sock).
            write.shutdown(socket.SHUT_RD)
            # The kernel doubles what is asked and clamps it to 2 x net.core.wmem_max.
            wanted = queue * _CHARGE_BYTES // 2
            write.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, wanted)
        return cls(read, write)

    @classmethod
    def adopt(cls, descriptors: Mapping[str, int]) -> Channel:
        """Take ownership of the ends that descriptors() named in an earlier program.

        Raises KeyError when the read end is missing.  Without a write end it was ended.
        """
        read = socket.socket(fileno=descriptors["read"])
        write = socket.socket(fileno=descriptors.get("write", descriptors["read"]))
        if "write" not in descriptors:
            write.detach()  # a closed one, made without a descriptor, because none may be free
        adopted = cls(read, write)
        adopted.taken_from = True  # an earlier program may have taken from it
        return adopted

    def descriptors(self) -> dict[str, int]:
        """Return what an adopter needs, by name."""
        found = {"read": self.read.fileno()}
        if not self.has_ended:
            found["write"] = self.write.fileno()
        return found

    def capacity(self) -> int:
        """Return how many untaken connections it has room for."""
        granted = self.write.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        return -(-granted // _CHARGE_BYTES)

    @property
    def closed(self) -> bool:
        return self.read.fileno() < 0

    @property
    def has_ended(self) -> bool:
        """Whether workers read end of file, after what is queued."""
        return self.write.fileno() < 0

    def depth(self) -> int:
        """Return how many connections were sent and not yet taken."""
        waiting = bytearray(4)
        fcntl.ioctl(self.read, FIONREAD, waiting)
        return int.from_bytes(waiting, "little") // wire.HEADER.size

    def is_shut(self) -> bool:
        """Say whether a worker has shut it down, so that nothing more can be sent through it."""
        if self.has_ended:
            return False
        return bool(events_of(self.read, select.POLLRDHUP))

    def has_room(self) -> bool:
        """Say whether its write end would wake a process that waits for room."""
        return bool(events_of(self.write, select.POLLOUT))

    def send(self, header: bytes, fd: int) -> None:
        """Queue a connection; the caller still owns fd.  Raises OSError: BROKEN, EAGAIN if full.

        A new connection goes without this call, which would be one more: see acceptor.py.
        """
        self.write.sendmsg([header], [rights_of(fd)], SEND_FLAGS)

    def peek(self) -> bytes | None:
        """Return the header of the oldest untaken message, which stays; None when nothing waits."""
        try:
            # No room for descriptors: none is made.
            data, _, _, _ = self.read.recvmsg(
                wire.HEADER.size, 0, socket.MSG_PEEK | socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return None
        return data or None

    def take_back(self) -> tuple[bytes, int] | None:
        """Receive the oldest untaken message as (header and state, descriptor).

        The caller owns the descriptor and has one to spare: without a free one the kernel
        drops the connection, and -1 stands in its place.  None when nothing waits.
        """
        try:
            data, ancillary, _, _ = self.read.recvmsg(
                wire.HEADER.size + wire.STATE_MAX_BYTES, _ONE_DESCRIPTOR, _TAKE_FLAGS
            )
        except BlockingIOError:
            return None
        if not data:
            return None  # end of file: a worker has shut it down
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                return data, int.from_bytes(content[:4], sys.byteorder)
        return data, -1

    def end(self) -> None:
        """Let the workers read end of file after what is queued.

        shutdown(), because a copy of this end may live elsewhere, and close() alone
        would then tell no worker.
        """
        if not self.has_ended:
            with suppress(OSError):  # a worker has shut it down already
                self.write.shutdown(socket.SHUT_WR)
            self.write.close()

    def close(self) -> None:
        """Close all that is left of the channel."""
        self.end()
        self.read.close()


def rights_of(fd: int) -> tuple[int, int, bytes]:
    """Return what carries a descriptor in a message."""
    return socket.SOL_SOCKET, socket.SCM_RIGHTS, _PACK_DESCRIPTOR(fd)
