"""Put the queue into an asyncio loop's own epoll, so that a connection wakes one idle worker.

EPOLLEXCLUSIVE makes the kernel wake one waiter in epoll_wait.  The flag has no effect through
a nested epoll: no process waits in the inner epoll, so all workers wake.  The descriptor that
an intake gives to a loop is such an inner epoll.  So the queue itself moves into the loop's
epoll.  An event of the queue runs the reader that the loop has for the intake's descriptor.

asyncio has no option for the flag, so this module adds the queue to the loop's epoll, by the
descriptor that `selectors.EpollSelector.fileno` returns.  For a loop without such a selector all
workers wake.

Source: epoll_ctl(2); ep_poll_callback in the kernel's fs/eventpoll.c.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import Any, Optional

from .intake import Intake
from .wait_set import WaitSet


def join_loop(intake: Intake, number: int) -> None:
    """Make the running loop, which watches `number` for an intake, wait for the queue itself.

    If that is impossible, change nothing.
    """
    if intake.queue.may_join:
        try:
            intake.queue.join(_Joined(intake, number))
        except (OSError, ValueError):
            pass


def reader_of(number: int) -> Optional[Any]:
    """Return the running loop's reader handle for a descriptor, None without one."""
    selector = _selector_of(asyncio._get_running_loop())
    key = selector.get_map().get(number) if selector is not None else None
    reader = key.data[0] if key is not None else None
    return None if reader is None or reader.cancelled() else reader


def _selector_of(loop: Any) -> Optional[selectors.EpollSelector]:
    selector = getattr(loop, "_selector", None)
    return selector if isinstance(selector, selectors.EpollSelector) else None


class _Joined(WaitSet):
    """The epoll of the running loop, while the loop watches the intake's descriptor."""

    def __init__(self, intake: Intake, number: int) -> None:
        """Run the loop's reader for `number` when the queue is readable.

        Raises ValueError if the loop does not allow that, OSError if the system lacks a resource.
        """
        self._loop: Any = asyncio.get_running_loop()
        selector = _selector_of(self._loop)
        self._reader = reader_of(number)
        (self._fd,) = intake.source.fds
        if selector is None or self._reader is None or self._fd in selector.get_map():
            raise ValueError("cannot join this loop")
        self._intake, self._number = intake, number
        super().__init__(of=selector.fileno())
        try:
            self._loop.add_reader(self._fd, self._ready)
        except BaseException:
            super().close()
            raise
        self.remove([self._fd])

    def close(self) -> None:
        """Remove the queue from the loop."""
        try:
            self._loop.remove_reader(self._fd)
        except RuntimeError:
            pass  # the loop is closed
        super().close()

    def _ready(self) -> None:
        if self._reader is not None and self._reader.cancelled():
            self._reader = reader_of(self._number)
        if self._reader is None:
            self._intake.queue.leave_loop()
        else:
            self._reader._run()
