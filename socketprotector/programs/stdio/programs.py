"""The programs that run: each has a pidfd in the pool's epoll set, and is waited for once.

Source: pidfd_open(2), waitpid(2).
"""

from __future__ import annotations

import os
import select

from .report import Board

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Programs:
    """Those that were started and have not been waited for."""

    def __init__(
        self, epoll: select.epoll, board: Board, ended: Callable[[int, int], None]
    ) -> None:
        """ended: called with the pid and the status of each, as wait(2) gives it."""
        self._epoll = epoll
        self._board = board
        self._ended = ended
        self._pids: dict[int, int] = {}  # by pidfd
        self._blind: list[int] = []  # pids of those whose end nothing will tell

    def __len__(self) -> int:
        return len(self._pids) + len(self._blind)

    def __contains__(self, fd: int) -> bool:
        return fd in self._pids

    @property
    def unseen(self) -> bool:
        """Whether there are some to be looked at now and then."""
        return bool(self._blind)

    def add(self, pid: int) -> None:
        """Wait for the end of a child of ours."""
        pidfd = -1
        try:
            pidfd = os.pidfd_open(pid)
            self._epoll.register(pidfd, select.EPOLLIN)
            self._pids[pidfd] = pid
        except OSError:  # out of descriptors, or of memory
            if pidfd >= 0:
                os.close(pidfd)
            self._blind.append(pid)
        self._board.running(len(self))

    def ended(self, pidfd: int) -> bool:
        """Take the status of the one whose pidfd is readable; say whether it is gone."""
        if not self._waited_for(self._pids[pidfd]):
            return False  # its tracer is to be told first
        del self._pids[pidfd]
        # What we have just started may hold a copy of it for a moment.
        self._epoll.unregister(pidfd)
        os.close(pidfd)
        self._board.running(len(self))
        return True

    def look(self) -> None:
        """Take the status of those that have ended without our being told."""
        self._blind = [pid for pid in self._blind if not self._waited_for(pid)]
        self._board.running(len(self))

    def signal(self, number: int) -> None:
        """Send all of them a signal.  They are not reaped, so their pids are no other process's."""
        for pid in (*self._pids.values(), *self._blind):
            os.kill(pid, number)

    def _waited_for(self, pid: int) -> bool:
        gone, status = os.waitpid(pid, os.WNOHANG)
        if gone:
            self._ended(pid, status)
        if gone and status:
            self._board.failed()
        return bool(gone)
