"""The listening sockets in the resident process: accept from them, and end them well.

They are bound before this process begins (address.py) and arrive as descriptors.

Source: tcp(7), unix(7).
"""

from __future__ import annotations

import errno
import os
import select
import socket

from . import twin
from .settings import ListenerSettings

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
        self,
        fd: int,
        index: int,
        settings: ListenerSettings,
        *,
        shared: bool = False,
        second: int = -1,
    ) -> None:
        """Adopt a bound, listening descriptor.  `index` is for life.

        shared: workers have it too, and accept from it: then it is theirs to the end.  second:
        another one for the same address (twin.py), so that two generations have one each.
        """
        self.socket = socket.socket(fileno=fd)
        self.second = socket.socket(fileno=second) if second >= 0 else None
        self.shared = shared
        if not shared:
            # Whoever passes it in may have changed that.  On one that workers share nothing may be
            # set: flags and options are those of the living ones, which may rely on them.
            self.socket.setblocking(False)
        self.index = index
        self.settings = settings
        #: It tells of clients whether there are any or not, so nobody should wait for it.
        self.always_readable = False

    def fileno(self) -> int:
        return self.socket.fileno()

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        return (self.socket, self.second) if self.second is not None else (self.socket,)

    def of_side(self, side: int) -> socket.socket:
        """The socket of the generations on a side, 0 or 1; both have the same if it is alone."""
        return self.sockets[side % len(self.sockets)]

    @property
    def blocks(self) -> bool:
        """Whether accept() waits, for all who have it: who accepts there can change that."""
        return os.get_blocking(self.fileno())

    @property
    def listens(self) -> bool:
        """Whether it was not shut down yet."""
        return bool(self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))

    def claim(self) -> None:
        """Listen once more: clients of a UNIX socket see the pid and user of who did it last."""
        if self.settings.backlog:
            self.socket.listen(self.settings.backlog)

    def refuse_new(self) -> bool:
        """Let nobody new connect; who has connected can still be accepted.

        Returns whether that could be had: else new ones come until it is closed, and after that,
        where somebody has given it to us who goes on listening.
        """
        if self.settings.foreign:
            return False
        if self.socket.family == socket.AF_UNIX:
            self._remove_file()
            if not self.shared:
                self.socket.shutdown(socket.SHUT_RD)
                self.always_readable = True
            return True  # or they would have to know it by another name
        try:
            for each in self.sockets:
                twin.refuse_new(each)
        except OSError:
            return False  # optmem_max, or a filter that is locked
        return True

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
        for each in self.sockets:
            each.close()

    def has_waiting(self, side: int | None = None) -> bool:
        """Whether somebody has connected and was not accepted yet; side: only there."""
        poll = select.poll()
        for each in self.sockets if side is None else (self.of_side(side),):
            poll.register(each, select.POLLIN)
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
