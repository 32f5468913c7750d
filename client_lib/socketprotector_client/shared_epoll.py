"""The queue beside the epoll of an event loop, so that one idle worker is woken, not all.

EPOLLEXCLUSIVE has the kernel wake one of those that wait in epoll_wait.  It does not pass through
an epoll within another: so an intake's must not be within the loop's.  The other way round there
is no harm, for no other process waits for what is in the loop's.  So the loop sleeps in the
intake's epoll, the loop's own being one of the descriptors there.

No loop has a way to ask for that.  Each has an object of type select.epoll somewhere; it is
replaced by another one that answers as it does, and where there is none all are woken, as before.

Source: epoll(7); ep_poll_callback in the kernel's fs/eventpoll.c.
"""

from __future__ import annotations

import select
import sys

from .intake import Intake
from .system import running_asyncio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, List, Optional, Tuple


class BesideEpoll:
    """An event loop's epoll, but for one number: that is the intake's, which is not in there."""

    def __init__(self, epoll: select.epoll, intake: Intake, number: int) -> None:
        """Both stay their owners'.  number: by which the loop knows the intake."""
        self._epoll = epoll
        self._intake = intake
        self._number = number
        self._events = 0  # those of it that the loop waits for
        intake.sleep_beside(epoll.fileno())

    @classmethod
    def put(cls, holder: object, name: str, intake: Intake, number: int) -> None:
        """Replace the epoll that an attribute of a loop holds, if it is one."""
        epoll = getattr(holder, name, None)
        if isinstance(epoll, select.epoll) and intake.source.wakes_one:
            setattr(holder, name, cls(epoll, intake, number))

    @staticmethod
    def take_back(holder: object, name: str, intake: Intake) -> None:
        """Give the loop its own epoll back."""
        found = getattr(holder, name, None)
        if isinstance(found, BesideEpoll) and found._intake is intake:
            setattr(holder, name, found._epoll)

    def register(self, fd: int, events: int) -> None:
        if fd == self._number:
            self._events = events
        else:
            self._epoll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        if fd == self._number:
            self._events = events
        else:
            self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        if fd == self._number:
            self._events = 0
        else:
            self._epoll.unregister(fd)

    def poll(self, timeout: Optional[float] = None, maxevents: int = -1) -> List[Tuple[int, int]]:
        if not self._events & select.EPOLLIN:
            return self._epoll.poll(timeout, maxevents)
        ours, others = self._intake.sleep(timeout)
        found = self._epoll.poll(0, maxevents) if others else []
        if ours:
            found.append((self._number, select.EPOLLIN))
            if self._events & select.EPOLLONESHOT:
                self._events = 0
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)


def loop_with_epoll() -> Tuple[object, str]:
    """Return what holds the epoll of the running loop of trio or asyncio, and its name there.

    Neither has a public name for it; where it is not to be found, there is no such attribute.
    """
    trio: Any = sys.modules.get("trio")
    try:
        return trio._core._run.GLOBAL_RUN_CONTEXT.runner.io_manager, "_epoll"
    except AttributeError:
        loop = running_asyncio()
        return getattr(loop, "_selector", loop), "_selector"
