"""The queue beside the epoll of an event loop, so that one idle worker is woken, not all.

EPOLLEXCLUSIVE has the kernel wake one of those that wait in epoll_wait.  It does not pass through
an epoll within another: so an intake's must not be within the loop's.  The other way round there
is no harm, for nobody else waits for what is in the loop's.  So the loop sleeps in the
intake's epoll, the loop's own being one of the descriptors there.

No loop has a way to ask for that.  Each has an object of type select.epoll somewhere; another one
that answers as it does is put in its place, and where there is none all are woken, as before.

Source: epoll(7); ep_poll_callback in the kernel's fs/eventpoll.c.
"""

from __future__ import annotations

import select
import sys
from typing import Any, List, Optional, Tuple

from .intake import Intake


class BesideEpoll:
    """An event loop's epoll, but for one number: that is the intake's, which is not in there."""

    def __init__(self, epoll: select.epoll, intake: Intake) -> None:
        """Both stay their owners'."""
        self._epoll = epoll
        self._intake = intake
        self._number = intake.fileno()
        self._events = 0  # what the loop wants to be told of it
        intake.sleep_beside(epoll.fileno())

    @classmethod
    def put(cls, holder: object, name: str, intake: Intake, number: int = -1) -> bool:
        """Put one in the place of the epoll that an attribute of a loop holds, if it is one.

        number: by which the loop knows the intake, if not by its own.
        """
        epoll = getattr(holder, name, None)
        if not isinstance(epoll, select.epoll) or not intake.source.wakes_one:
            return False
        beside = cls(epoll, intake)
        if number >= 0:
            beside._number = number
        setattr(holder, name, beside)
        return True

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


def loop_of_trio() -> object:
    """Return what holds the epoll of trio's running loop; None where it is not to be found.

    trio has no public name for it.
    """
    trio: Any = sys.modules.get("trio")
    try:
        return trio._core._run.GLOBAL_RUN_CONTEXT.runner.io_manager
    except AttributeError:
        return None
