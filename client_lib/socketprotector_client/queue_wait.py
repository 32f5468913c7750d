"""In which set the queue is waited for, and at which place in the line of those that wait.

The set is the intake's own, or the one of an event loop that waits for the queue itself.  The
kernel wakes the first waiter (EPOLLEXCLUSIVE).  A worker that has taken a connection moves to the
end of the line, or it would get nearly all of them.
"""

from __future__ import annotations

import select

from .source import Source
from .wait_set import WaitSet


class QueueWait:
    """The descriptors of a source, while they are waited for."""

    def __init__(self, source: Source, own: WaitSet) -> None:
        """own: the intake's set, in which they begin."""
        self.fds = tuple(source.fds)
        #: Whether they are waited for: the intake has neither paused nor ended.
        self.waited = True
        #: Whether a loop's set has them, not the intake's own.
        self.elsewhere = False
        #: Whether a connection has been taken since they moved to the end of the line.
        self.stands_first = False
        self._wakes_one = source.wakes_one
        self._events = select.EPOLLIN | (select.EPOLLEXCLUSIVE if source.wakes_one else 0)
        self._own = self._set = own
        own.add(self.fds, self._events)

    @property
    def may_join(self) -> bool:
        """Whether they may move into the set of an event loop."""
        return self.waited and self._wakes_one and not self.elsewhere

    def join(self, loop: WaitSet) -> None:
        """Wait in the set of a loop, which becomes ours, until `leave_loop`.

        Then one of the idle workers is woken for a connection, not all.
        """
        self._set, self.elsewhere = loop, True
        try:
            loop.add(self.fds, self._events)
        except OSError:
            self.leave_loop()
        else:
            self._own.remove(self.fds)

    def leave_loop(self) -> None:
        """Wait in the intake's own set, as before `join`."""
        joined, self._set = self._set, self._own
        if joined is not self._own:  # of two threads one has found it
            self.elsewhere = False
            joined.close()
            if self.waited:
                self._own.add(self.fds, self._events)

    def share(self) -> None:
        """Have the kernel wake one of several threads that wait, not each in turn."""
        self._events |= select.EPOLLET
        self.stand_last()

    def stand_last(self) -> None:
        """Let the other waiters be woken before us; what has come meanwhile is not missed."""
        self.stands_first = False
        if self._wakes_one and self.waited:
            self._set.remove(self.fds)
            self._set.add(self.fds, self._events)

    def rest(self) -> None:
        """Stand last in a loop that turns now: the caller takes no more before."""
        if self.stands_first and self.elsewhere:
            self.stand_last()

    def pause(self) -> None:
        """Leave further connections in the queue."""
        # In this order: a thread that sees the flag adds what has been removed.
        self._set.remove(self.fds)
        self.waited = False

    def resume(self) -> None:
        """Wait for them again."""
        self.waited = True
        self._set.add(self.fds, self._events)

    def after_fork_in_child(self, ends: list[int]) -> None:
        """Wait in the child's own copy of the intake's set, which it has to itself from here on."""
        if self.elsewhere:
            self._set.forget()
            self._set, self.elsewhere = self._own, False
        else:
            self.stands_first = False
        self._own.renew(self.fds if self.waited else (), ends, self._events)
