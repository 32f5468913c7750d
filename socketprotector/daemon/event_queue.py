"""Carries every event to the supervisor.

The queue is created first, because all parts that post events need it.  The supervisor takes the
events, but needs those parts, so it is created later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from ..core.events import Event


class EventQueue:
    """Events in the order in which they came."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        #: Called when there are events.
        self.drain: Callable[[], None] = lambda: None

    def post(self, event: Event) -> None:
        """Add an event, and drain the queue."""
        self._events.append(event)
        self.drain()

    def add(self, events: Iterable[Event]) -> None:
        """Add events without draining the queue: the next post() handles them."""
        self._events.extend(events)

    def __iter__(self) -> Iterator[Event]:
        """Take the events in order, until there are none."""
        while self._events:
            yield self._events.popleft()
