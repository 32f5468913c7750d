"""Put an event loop's epoll into the intake's epoll, so that the kernel wakes one idle worker.

EPOLLEXCLUSIVE makes the kernel wake one waiter in epoll_wait.  The flag has no effect through
a nested epoll, so the intake's epoll must not be inside the loop's.  The loop's epoll may be inside
the intake's, because no other process waits for the loop's descriptors.  So the loop sleeps in the
intake's epoll, which watches the loop's own epoll.

No loop has an option for that.  Each loop holds an object of type select.epoll, which this module
replaces by an object with the same methods.  For a loop without such an object, all idle workers
wake.

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
    """A stand-in for a loop's epoll that keeps the intake's descriptor out of that epoll."""

    def __init__(self, epoll: select.epoll, intake: Intake, number: int) -> None:
        """Stand in for `epoll`; the caller keeps `epoll` and `intake`.

        number: the descriptor by which the loop knows the intake.
        """
        self._epoll = epoll
        self._intake = intake
        self._number = number
        self._events = 0  # the intake's events for which the loop waits
        intake.sleep_beside(epoll.fileno())

    @classmethod
    def put(cls, holder: object, name: str, intake: Intake, number: int) -> None:
        """Replace the epoll in an attribute of a loop, if the attribute holds an epoll."""
        epoll = getattr(holder, name, None)
        if isinstance(epoll, select.epoll) and intake.source.wakes_one:
            setattr(holder, name, cls(epoll, intake, number))

    @staticmethod
    def take_back(holder: object, name: str, intake: Intake) -> None:
        """Put the loop's own epoll back into the attribute."""
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
    """Return the object that holds the epoll of trio's or asyncio's loop, and its attribute.

    Neither library has a public name for it; an unknown loop's object lacks the attribute.
    """
    trio: Any = sys.modules.get("trio")
    try:
        return trio._core._run.GLOBAL_RUN_CONTEXT.runner.io_manager, "_epoll"
    except AttributeError:
        loop = running_asyncio()
        return getattr(loop, "_selector", loop), "_selector"
