"""The running programs: each has a pidfd in the pool's epoll set, and is reaped once.

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
    """The programs that were started and are not reaped yet."""

    def __init__(
        self, epoll: select.epoll, board: Board, ended: Callable[[int, int], None]
    ) -> None:
        """ended: called with a program's pid and its status from wait(2)."""
        self._epoll = epoll
        self._board = board
        self._ended = ended
        self._pids: dict[int, int] = {}  # by pidfd
        self._unwatched: list[int] = []  # pids of programs without a pidfd

    def __len__(self) -> int:
        return len(self._pids) + len(self._unwatched)

    def __contains__(self, fd: int) -> bool:
        return fd in self._pids

    @property
    def unseen(self) -> bool:
        """Whether look() must be called periodically, because programs have no pidfd."""
        return bool(self._unwatched)

    def add(self, pid: int) -> None:
        """Add a program that was started, and watch for its end."""
        pidfd = -1
        try:
            pidfd = os.pidfd_open(pid)
            self._epoll.register(pidfd, select.EPOLLIN)
            self._pids[pidfd] = pid
        except OSError:  # out of descriptors, or of memory
            if pidfd >= 0:
                os.close(pidfd)
            self._unwatched.append(pid)

    def ended(self, pidfd: int) -> bool:
        """Reap the program whose pidfd is readable; return False if it cannot be reaped yet."""
        if not self._reap(self._pids[pidfd]):
            return False  # its tracer must wait for it first
        del self._pids[pidfd]
        # Explicitly: a starting program may have a copy of the pidfd, so close() is not enough.
        self._epoll.unregister(pidfd)
        os.close(pidfd)
        return True

    def look(self) -> None:
        """Reap the ended programs that have no pidfd."""
        self._unwatched = [pid for pid in self._unwatched if not self._reap(pid)]

    def signal(self, number: int) -> None:
        """Send all programs a signal: until they are reaped, their pids cannot be reused."""
        for pid in (*self._pids.values(), *self._unwatched):
            os.kill(pid, number)

    def _reap(self, pid: int) -> bool:
        """Reap a program if it has ended; return whether it was reaped."""
        reaped, status = os.waitpid(pid, os.WNOHANG)
        if reaped:
            self._ended(pid, status)
        if reaped and status:
            self._board.failed()
        return bool(reaped)
