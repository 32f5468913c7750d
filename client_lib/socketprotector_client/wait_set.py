"""One descriptor that stands for everything an intake waits for.

It is an epoll of this process's own.  The channel's own descriptor would not
do: it is shared, stays readable for ever at its end, and even replacing it
(dup2) leaves it in the epoll of an event loop as long as another worker holds
it.  What is taken out of this one is out for every watcher.

Safe against other threads and the garbage collector without a lock: each
step is one system call, and doing it twice is harmless.
"""

from __future__ import annotations

import os
import select
import socket

from .system import Socket, epoll

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterable, Optional

_EVENTS_AT_ONCE = 8
#: epoll_wait(2) takes milliseconds as a C int, 24.8 days; a program may have given any time.
LONGEST_WAIT_S = 86_400.0


class WaitSet:
    """The descriptors that are waited for.  They stay their owners'."""

    def __init__(self, of: int = -1) -> None:
        """of: another's epoll, to add to it and remove from it; -1: a new one."""
        self._epoll = epoll() if of < 0 else epoll.fromfd(os.dup(of))
        self._bell: Optional[socket.socket] = None

    def fileno(self) -> int:
        """Return the descriptor that is readable when one of the set is."""
        return self._epoll.fileno()

    def wait(self, timeout_s: Optional[float]) -> list[int]:
        """Return those that are readable or at their end, after timeout_s, or a day, none."""
        if timeout_s is not None and timeout_s > LONGEST_WAIT_S:
            timeout_s = LONGEST_WAIT_S
        return [fd for fd, _ in self._epoll.poll(timeout_s, _EVENTS_AT_ONCE)]

    def add(self, fds: Iterable[int], events: int = select.EPOLLIN) -> None:
        for fd in fds:
            try:
                self._epoll.register(fd, events)
            except FileExistsError:
                pass
            except (OSError, ValueError):
                # Closed by another thread just now: not a failure of the caller, which may
                # only have closed a connection.
                if not self._epoll.closed:
                    raise

    def remove(self, fds: Iterable[int]) -> None:
        for fd in fds:
            try:
                self._epoll.unregister(fd)
            except (OSError, ValueError):
                pass  # it was not in there, or all is closed

    def ring(self) -> None:
        """Be readable, whatever is in the set, until `hush`.

        Fit for a signal handler, but the first time it may raise OSError.
        """
        if self._epoll.closed:
            return
        if self._bell is None:
            # A fresh stream socket polls as hung up: one descriptor, not two.
            self._bell = Socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.add([self._bell.fileno()])

    def hush(self) -> None:
        """Take `ring` back."""
        if self._bell is not None:
            self.remove([self._bell.fileno()])

    def renew(self, fds: Iterable[int], ends: Iterable[int], events: int) -> None:
        """In a forked child: keep the number, but share nothing with the parent any more.

        (Nothing may be taken out of the inherited epoll, for it would be out for the parent, too.)
        """
        if not self._epoll.closed:
            fresh = epoll()
            os.dup2(fresh.fileno(), self._epoll.fileno(), inheritable=False)
            fresh.close()
            self.add(fds, events)
            self.add(ends, select.EPOLLRDHUP)
        if self._bell is not None:
            self._bell.close()
            self._bell = None

    def forget(self) -> None:
        """In a forked child: close what is ours, and leave another's epoll as it is."""
        WaitSet.close(self)

    def close(self) -> None:
        self._epoll.close()
        if self._bell is not None:
            self._bell.close()
