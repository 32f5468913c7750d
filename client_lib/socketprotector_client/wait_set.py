"""One descriptor that is readable when anything an intake waits for is readable.

The descriptor is an epoll of this process.  Event loops cannot watch the channel itself: all
workers share it, and at its end it stays readable for ever.  The channel would even stay in a
loop's epoll after dup2() or close(), while another worker holds it open.  A descriptor that is
removed from this epoll is removed for every watcher.

Safe with other threads and the garbage collector, without a lock: each step is one system call,
and a repeated step is harmless.
"""

from __future__ import annotations

import os
import select
import socket
import time

from .system import Socket, epoll

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterable, Optional

_EVENTS_AT_ONCE = 8
_RETRY_S = 0.05
#: The longest time for epoll_wait(2), whose C int of milliseconds ends at 24.8 days.
LONGEST_WAIT_S = 86_400.0


class WaitSet:
    """A set of descriptors to wait for; their owners keep them."""

    def __init__(self, of: int = -1) -> None:
        """Make a set in a new epoll, or in the epoll `of`, whose owner keeps its descriptor."""
        self._epoll = epoll() if of < 0 else epoll.fromfd(os.dup(of))
        self._bell: Optional[socket.socket] = None

    def fileno(self) -> int:
        """Return the descriptor that is readable when any descriptor of the set is."""
        return self._epoll.fileno()

    def wait(self, timeout_s: Optional[float]) -> list[int]:
        """Wait, and return the descriptors that are readable or at end of file.

        Returns none after timeout_s, or after a day if timeout_s is longer.
        """
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
                # Another thread may have closed the set.  That is no error of this caller, which
                # may only have closed a connection.
                if not self._epoll.closed:
                    raise

    def remove(self, fds: Iterable[int]) -> None:
        for fd in fds:
            try:
                self._epoll.unregister(fd)
            except (OSError, ValueError):
                pass  # it was not in the set, or the set is closed

    def ring(self) -> None:
        """Make the set readable until `hush`.

        Safe in a signal handler, but the first call may raise OSError.
        """
        if not self._epoll.closed:
            self.add([self.make_bell().fileno()])

    def make_bell(self) -> socket.socket:
        """Make what `ring` needs, so that it raises no OSError later.  Raises OSError."""
        if self._bell is None:
            # A new stream socket polls as hung up, and takes one descriptor where a pipe takes two.
            self._bell = Socket(socket.AF_UNIX, socket.SOCK_STREAM)
        return self._bell

    def ring_surely(self) -> None:
        """Ring, and wait until the kernel has room for that: other threads depend on it."""
        while True:
            try:
                return self.ring()
            except OSError:
                time.sleep(_RETRY_S)

    def hush(self) -> None:
        """End the effect of `ring`."""
        if self._bell is not None:
            self.remove([self._bell.fileno()])

    def renew(self, ends: Iterable[int]) -> None:
        """Put a new epoll under the same number.  For a forked child, which shared the parent's.

        A removal from the inherited epoll would also remove the descriptor for the parent.
        """
        if not self._epoll.closed:
            try:
                fresh = epoll()
                os.dup2(fresh.fileno(), self._epoll.fileno(), inheritable=False)
                fresh.close()
                self.add(ends, select.EPOLLRDHUP)
            except OSError:
                # Otherwise the child would change the parent's set, or never end.
                self._epoll.close()
                raise
        if self._bell is not None:
            self._bell.close()
            self._bell = None

    def forget(self) -> None:
        """Close this set without a change to another owner's epoll.  For a forked child."""
        WaitSet.close(self)

    def close(self) -> None:
        self._epoll.close()
        if self._bell is not None:
            self._bell.close()
