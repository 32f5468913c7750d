"""Carries every event to the supervisor.

The queue is created before the supervisor: the supervisor needs parts that post events, and these
parts need the queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from ..core.events import Event


class EventQueue:
    """Events in the order in which they came."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        #: Handles all queued events; set by the supervisor.
        self.drain: Callable[[], None] = lambda: None

    def post(self, event: Event) -> None:
        """Add an event, and drain the queue."""
        self._events.append(event)
        self.drain()

    def add(self, events: Iterable[Event]) -> None:
        """Add events without draining the queue; the next drain() handles them."""
        self._events.extend(events)

    def __iter__(self) -> Iterator[Event]:
        """Remove and yield the events in order, until the queue is empty."""
        while self._events:
            yield self._events.popleft()
