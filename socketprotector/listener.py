"""The listening sockets in the resident process: accept from them, and end them well.

They are bound before this process begins (address.py) and arrive as descriptors.

Source: tcp(7), unix(7), socket(7) for SO_ATTACH_FILTER.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import struct

from .settings import ListenerSettings

_SO_ATTACH_FILTER = 26

#: A socket filter that drops segments with SYN and without ACK and passes the rest, so that
#: nobody new comes while handshakes that are under way finish.
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

#: Nothing there, or gone again: the next wake-up brings the next client (accept(2) on Linux
#: passes on errors of the connection itself).
AGAIN = frozenset(
    {
        errno.EAGAIN,
        errno.EINTR,
        errno.ECONNABORTED,
        errno.ENETDOWN,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
        errno.ETIMEDOUT,
        errno.EPERM,
    }
)


class Listener:
    """One listening socket.  Owns its descriptor, and the socket file if it made one."""

    def __init__(
        self, fd: int, index: int, settings: ListenerSettings, *, shared: bool = False
    ) -> None:
        """Adopt a bound, listening, non-blocking descriptor.  `index` is for life.

        shared: workers have it too, and accept from it: then it is theirs to the end, and blocking,
        as most expect it, unless the settings say otherwise.
        """
        self.socket = socket.socket(fileno=fd)
        self.shared = shared
        if shared:
            self.socket.setblocking(not settings.nonblock)
        self.index = index
        self.settings = settings
        #: It tells of clients whether there are any or not, so nobody should wait for it.
        self.always_readable = False

    def fileno(self) -> int:
        return self.socket.fileno()

    @property
    def listens(self) -> bool:
        """Whether it was not shut down yet."""
        return bool(self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))

    def claim(self) -> None:
        """Listen once more: clients of a UNIX socket see the pid and user of who did it last."""
        if self.settings.backlog:
            self.socket.listen(self.settings.backlog)

    def refuse_new(self) -> None:
        """Let nobody new connect; who has connected can still be accepted."""
        if self.settings.foreign:
            return  # who has given it to us listens on
        if self.socket.family == socket.AF_UNIX:
            self._remove_file()
            if not self.shared:
                self.socket.shutdown(socket.SHUT_RD)
                self.always_readable = True
            return
        program = array.array("B", _NO_NEW_CLIENTS)
        address, length = program.buffer_info()
        try:
            self.socket.setsockopt(
                socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", length // 8, address)
            )
        except OSError:
            pass  # not granted (optmem_max, a locked filter): new ones come until it is closed

    def close(self) -> None:
        """Stop listening.  shutdown(), because a copy of the descriptor may live elsewhere.

        One that workers share ends with the last of them.
        """
        self._remove_file()
        if not self.settings.foreign and not self.shared:
            try:
                self.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # was shut down already
        self.socket.close()

    def has_waiting(self) -> bool:
        """Whether somebody has connected and was not accepted yet."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(0))

    def _remove_file(self) -> None:
        """Remove the socket file unless somebody has put another in its place."""
        if not self.settings.inode:
            return
        path = self.settings.address.removeprefix("unix:")
        try:
            found = os.lstat(path)
            if (found.st_dev, found.st_ino) == (self.settings.device, self.settings.inode):
                os.unlink(path)
        except OSError:
            pass  # removed already, or the folder is no longer ours: said at start
