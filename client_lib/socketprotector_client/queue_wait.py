"""A worker's wait for the queue: in which epoll, and at which place among the waiting workers.

The queue is in the intake's own epoll, or in an event loop's epoll.  The kernel wakes the first
waiter (EPOLLEXCLUSIVE).  A worker that has taken a connection moves behind the other workers;
otherwise it would get nearly all connections.
"""

from __future__ import annotations

import select

from .source import Source
from .wait_set import WaitSet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable


class QueueWait:
    """The wait for the descriptors of one source."""

    def __init__(self, source: Source, own: WaitSet, cannot: Callable[[OSError], None]) -> None:
        """Begin to wait in the intake's own set.

        cannot: called when a later addition to a set fails; must call pause(), and later resume().
        """
        self.fds = tuple(source.fds)
        #: Whether the intake waits for connections: it has neither paused nor ended.
        self.waited = True
        #: Whether the descriptors are in an event loop's set, not in the intake's own.
        self.in_loop = False
        #: Whether this worker has taken a connection since it moved behind the other workers.
        self.has_taken = False
        self._wakes_one = source.wakes_one
        self._events = select.EPOLLIN | (select.EPOLLEXCLUSIVE if source.wakes_one else 0)
        self._own = self._set = own
        self._cannot = cannot
        own.add(self.fds, self._events)

    @property
    def may_join(self) -> bool:
        """Whether the descriptors may move into the set of an event loop."""
        return self.waited and self._wakes_one and not self.in_loop

    def join(self, loop: WaitSet) -> None:
        """Wait in the set of an event loop until `leave_loop`; takes ownership of the set.

        A connection then wakes one idle worker, not all.
        """
        self._set, self.in_loop = loop, True
        try:
            loop.add(self.fds, self._events)
        except OSError:
            self.leave_loop()
        else:
            self._own.remove(self.fds)

    def leave_loop(self) -> None:
        """Wait in the intake's own set, as before `join`."""
        joined, self._set = self._set, self._own
        if joined is not self._own:  # if two threads call this, only one gets here
            self.in_loop = False
            joined.close()
            if self.waited:
                self._add()

    def share(self) -> None:
        """Make the kernel wake one of several waiting threads, not each in turn."""
        self._events |= select.EPOLLET
        self.move_behind()

    def move_behind(self) -> None:
        """Move behind the other waiting workers, without missing a connection."""
        self.has_taken = False
        if self._wakes_one and self.waited:
            self._set.remove(self.fds)
            self._add()

    def move_back_in_loop(self) -> None:
        """Move behind the other workers if in a loop; call this at the end of a loop's turn."""
        if self.has_taken and self.in_loop:
            self.move_behind()

    def pause(self) -> None:
        """Leave further connections in the queue."""
        # In this order: once the flag is cleared, another thread may add the descriptors again.
        self._set.remove(self.fds)
        self.waited = False

    def resume(self) -> None:
        """Wait for connections again."""
        self.waited = True
        self._add()

    def _add(self) -> None:
        try:
            self._set.add(self.fds, self._events)
        except OSError as error:
            self._cannot(error)

    def after_fork_in_child(self, ends: list[int]) -> None:
        """Wait in a set of the child's own, which replaces its copy of the parent's."""
        if self.in_loop:
            self._set.forget()
            self._set, self.in_loop = self._own, False
        else:
            self.has_taken = False
        self._own.renew(ends)
        if self.waited:
            self._add()
