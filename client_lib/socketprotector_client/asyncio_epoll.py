"""The queue in the epoll of an asyncio loop itself, so that one idle worker is woken, not all.

EPOLLEXCLUSIVE has the kernel wake one of those that wait in epoll_wait.  It does not pass through
an epoll within another: nobody waits in the inner one, so all are woken.  The descriptor that an
intake gives to a loop is such an inner one.  So the queue itself moves into the loop's own epoll,
and what the loop would do for that descriptor is done for the queue.

asyncio has no way to ask for the flag.  It is set behind its back, on the epoll whose number
`selectors.EpollSelector.fileno` tells; where a loop has no such selector all are woken.

Source: epoll_ctl(2); ep_poll_callback in the kernel's fs/eventpoll.c.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import Any, Callable, Iterable, Optional

from .wait_set import WaitSet


def reader_of(number: int) -> Optional[Any]:
    """Return the handle by which the running loop is told of a descriptor, None if it is not."""
    selector = _selector_of(asyncio._get_running_loop())
    key = selector.get_map().get(number) if selector is not None else None
    reader = key.data[0] if key is not None else None
    return None if reader is None or reader.cancelled() else reader


def _selector_of(loop: Any) -> Optional[selectors.EpollSelector]:
    selector = getattr(loop, "_selector", None)
    return selector if isinstance(selector, selectors.EpollSelector) else None


class Joined:
    """One descriptor in the epoll of the running loop, for as long as that watches another one."""

    def __init__(self, fd: int, number: int, left: Callable[[], None]) -> None:
        """Do for fd what the loop does for `number`; call left when it does so no more.

        Raises ValueError where that cannot be, OSError when the system is out of something.
        """
        self._loop: Any = asyncio.get_running_loop()
        self._selector = _selector_of(self._loop)
        self._reader = reader_of(number)
        if self._selector is None or self._reader is None or fd in self._selector.get_map():
            raise ValueError("cannot join this loop")
        self._fd, self._number, self._left = fd, number, left
        self._set = WaitSet(of=self._selector.fileno())
        try:
            self._loop.add_reader(fd, self._ready)
        except BaseException:
            self._set.close()
            raise
        self._set.remove([fd])

    def add(self, fds: Iterable[int], events: int) -> None:
        self._set.add(fds, events)

    def remove(self, fds: Iterable[int]) -> None:
        self._set.remove(fds)

    def close(self) -> None:
        """Be in the loop no more."""
        try:
            self._loop.remove_reader(self._fd)
        except RuntimeError:
            pass  # it is closed
        self._set.close()

    def forget(self) -> None:
        """In a forked child: the loop is the parent's, and stays as it is."""
        self._set.close()

    def _ready(self) -> None:
        if self._reader is not None and self._reader.cancelled():
            self._reader = reader_of(self._number)
        if self._reader is None:
            self._left()
        else:
            self._reader._run()
