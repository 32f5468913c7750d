"""The queue in the epoll of an asyncio loop itself, so that one idle worker is woken, not all.

EPOLLEXCLUSIVE has the kernel wake one of those that wait in epoll_wait.  It does not pass through
an epoll within another: no process waits in the inner one, so all are woken.  The descriptor that
an intake gives to a loop is such an inner one.  So the queue itself moves into the loop's own
epoll, and what the loop would do for that descriptor is done for the queue.

asyncio has no way to ask for the flag.  It is set behind its back, on the epoll whose number
`selectors.EpollSelector.fileno` tells; where a loop has no such selector all are woken.

Source: epoll_ctl(2); ep_poll_callback in the kernel's fs/eventpoll.c.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import Any, Optional

from .intake import Intake
from .wait_set import WaitSet


def join_loop(intake: Intake, number: int) -> None:
    """Let the running loop, which watches `number` for an intake, wait for the queue itself.

    Where it cannot be, nothing is changed.
    """
    if intake.queue.may_join:
        try:
            intake.queue.join(_Joined(intake, number))
        except (OSError, ValueError):
            pass


def reader_of(number: int) -> Optional[Any]:
    """Return the handle that the running loop has for a descriptor, None if it watches no such."""
    selector = _selector_of(asyncio._get_running_loop())
    key = selector.get_map().get(number) if selector is not None else None
    reader = key.data[0] if key is not None else None
    return None if reader is None or reader.cancelled() else reader


def _selector_of(loop: Any) -> Optional[selectors.EpollSelector]:
    selector = getattr(loop, "_selector", None)
    return selector if isinstance(selector, selectors.EpollSelector) else None


class _Joined(WaitSet):
    """The epoll of the running loop, for as long as that watches the intake's descriptor."""

    def __init__(self, intake: Intake, number: int) -> None:
        """Do for the queue what the loop does for `number`.

        Raises ValueError where that cannot be, OSError when the system is out of something.
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
        """Be in the loop no more."""
        try:
            self._loop.remove_reader(self._fd)
        except RuntimeError:
            pass  # it is closed
        super().close()

    def _ready(self) -> None:
        if self._reader is not None and self._reader.cancelled():
            self._reader = reader_of(self._number)
        if self._reader is None:
            self._intake.queue.leave_loop()
        else:
            self._reader._run()
