"""One thread's wait for everything: descriptors, signals and timers.

`select.epoll` itself, not `selectors`: the wait is part of the path of every
connection, and the wrapper adds 0.7 us to it.

One wait returns many events, and what the first of them leads to may close a number that a later
one is about, and use it again for something else.  So a callback is called only for events that
were found when it was watched already: until the next wait it stands apart.  Callbacks tolerate a
wake-up that finds nothing: what there was may have been taken meanwhile.
"""

from __future__ import annotations

import os
import select
import time
from bisect import insort
from collections.abc import Callable, Hashable, Iterable

from . import signals

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
SHUT = select.EPOLLRDHUP
#: Cancelled timers stay in the list until they come up or are this many too many: a reload
#: each second with a drain limit of a day would else keep 86,400 of them.
_STALE = 64
#: How much one wait returns at most (Python asks for FD_SETSIZE - 1).
_FOUND_AT_ONCE = 1023
#: No wait is longer: epoll_wait(2) takes milliseconds as a C int, 24.8 days, and an operator may
#: give any time.  A wake-up at which nothing is due costs nothing.
LONGEST_WAIT_S = 86_400.0
_COMING = "loop-coming"
#: How often to ask whether there is processor time to spare: an operator may change that.
_ASK_NS = 2_000_000_000


class Loop:
    """Calls back when a descriptor is ready, a timer runs out or a signal came."""

    def __init__(self, soon_s: float = 0.0, spare: Callable[[], bool] | None = None) -> None:
        """soon_s: for how long the next event is asked for again and again where it is expected.

        spare: says whether there is processor time for that; asked now and then.
        """
        self._epoll = select.epoll()
        self._spare = spare
        self._has_spare = True
        self._ask_at_ns = 0
        self.soon_ns = int(soon_s * 1_000_000_000)
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._coming: dict[int, Callable[[], None]] = {}  # watched since the last wait
        self._timers: dict[Hashable, tuple[float, int, Callable[[], None]]] = {}
        self._by_time: list[tuple[float, int, Hashable]] = []
        self._count = 0
        self._asked_at = 0.0  # when it was last asked what is due
        self.running = True
        #: Set each time an event is expected within soon_ns: then the next wait does
        #: not sleep so long.  To wake a core that sleeps costs more (17 us and above).
        self.soon = False
        self.take_signals: Callable[[], None] = lambda: None

    # -- descriptors ---------------------------------------------------------

    def watch(self, fd: int, callback: Callable[[], None], events: int = READ) -> None:
        """Call back whenever fd is ready.  The caller keeps fd and unwatches it before closing.

        Else events go on for a number that is no longer there, as long as another process has
        a copy: epoll(7), "Questions and answers".
        """
        self._epoll.register(fd, events)
        if not self._coming:
            # A timer, so that _until_due() is called, which takes them in: the path of a connection
            # need not ask for both.
            self.call_after(_COMING, 0.0, self._take_in)
        self._coming[fd] = callback

    def unwatch(self, fd: int) -> None:
        """Stop calling back for fd; nothing happens if it is not watched."""
        if self._callbacks.pop(fd, None) or self._coming.pop(fd, None):
            self._epoll.unregister(fd)

    # -- timers --------------------------------------------------------------

    def call_after(self, key: Hashable, seconds: float, callback: Callable[[], None]) -> None:
        """Call back once after some seconds; the same key again replaces the timer."""
        self._count += 1
        due = time.monotonic() + seconds
        self._timers[key] = (due, self._count, callback)
        insort(self._by_time, (due, self._count, key))
        if len(self._by_time) > 2 * len(self._timers) + _STALE:
            running = ((due, count, key) for key, (due, count, _) in self._timers.items())
            self._by_time = sorted(running)

    def extend(self, key: Hashable, seconds: float) -> None:
        """Move a running timer to so many seconds from now, if that is later."""
        timer = self._timers.get(key)
        if timer is not None and timer[0] < time.monotonic() + seconds:
            self.call_after(key, seconds, timer[2])

    def run_if_due(self, key: Hashable) -> None:
        """Call back now for a timer that has run out, while something long keeps us from run()."""
        timer = self._timers.get(key)
        if timer is not None and timer[0] <= time.monotonic():
            self.cancel(key)
            timer[2]()

    def due(self, key: Hashable) -> float | None:
        """Return when a timer runs out (CLOCK_MONOTONIC seconds), None if it does not run."""
        timer = self._timers.get(key)
        return timer[0] if timer is not None else None

    def cancel(self, key: Hashable) -> None:
        """Forget a timer; nothing happens if it does not run."""
        self._timers.pop(key, None)
        if not self._timers:
            self._by_time.clear()

    def _take_in(self) -> None:
        """Call back for descriptors watched since the last wait, all reported by now."""
        self._callbacks |= self._coming
        self._coming.clear()

    def _until_due(self) -> float | None:
        """Return how many seconds to wait for the next timer: 0 if it is due, None without one.

        What was watched since the last wait is called back for from here on.
        """
        if self._coming:
            self._take_in()
            self.cancel(_COMING)
        self._asked_at = time.monotonic()
        first = self._by_time
        while first:
            due, count, key = first[0]
            timer = self._timers.get(key)
            if timer is not None and timer[1] == count:
                return min(max(0.0, due - self._asked_at), LONGEST_WAIT_S)
            del first[0]  # cancelled
        return None

    def _run_due(self) -> None:
        """Call back for what was due when the last wait began."""
        while self.running and self._by_time and self._by_time[0][0] <= self._asked_at:
            _, count, key = self._by_time.pop(0)
            timer = self._timers.get(key)
            if timer is not None and timer[1] == count:
                self._timers.pop(key)[2]()

    # -- signals -------------------------------------------------------------

    def catch(self, numbers: Iterable[int], callback: Callable[[int], None]) -> None:
        """Call back from the loop, never from a handler, with the number of each signal."""
        wanted = tuple(numbers)
        receive = signals.catch(wanted)

        def read() -> None:
            try:
                received = os.read(receive, 512)
            except BlockingIOError:
                return  # taken meanwhile
            for number in received:
                if number in wanted:  # not that of a timer (foreign_descriptors.py)
                    callback(number)

        #: Calls back now for events that have come.
        self.take_signals = read
        self.watch(receive, read)

    # -- running -------------------------------------------------------------

    def run(self) -> None:
        """Wait and call back until `running` is cleared."""
        poll = self._epoll.poll
        callbacks = self._callbacks
        while self.running:
            timeout = self._until_due() if self._by_time else None
            found = (self._poll_briefly(timeout) if self.soon else None) or poll(timeout)
            for fd, _ in found:
                callback = callbacks.get(fd)
                if callback is not None:
                    callback()
            # After all that had come by then: a protector that has stood still, or begins with the
            # timers of another, must not end a worker that has long said that it is ready.
            if timeout == 0 and len(found) < _FOUND_AT_ONCE:
                self._run_due()

    def _poll_briefly(self, timeout: float | None) -> list[tuple[int, int]] | None:
        """Return what is ready within soon_ns, None if nothing is."""
        self.soon = False
        poll, now = self._epoll.poll, time.monotonic_ns
        begin = now()
        if begin >= self._ask_at_ns and self._spare is not None:
            self._has_spare = self._spare()
            self._ask_at_ns = begin + _ASK_NS
        if not self._has_spare:
            return None
        left = self.soon_ns if timeout is None else min(self.soon_ns, int(timeout * 1e9))
        end = begin + left
        while now() < end:
            found = poll(0)
            if found:
                return found
        return None

    def close(self) -> None:
        """Close the loop's own descriptor."""
        self._epoll.close()
