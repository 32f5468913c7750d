"""The event loop: one thread's wait for descriptors, signals and timers.

It uses `select.epoll` directly, because `selectors` would add 0.7 us to the wait for each
connection.

One wait returns many events.  The callback of an early event may close the descriptor of a later
event, and open another file under the same number.  So a new callback is called only for events of
later waits.  Callbacks must tolerate a wake-up without an event, because another callback may
have handled it.
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
#: Cancelled timers stay in the list until they are due, or until the list has this many of them.
#: Without this limit, a reload each second with a drain limit of a day would keep 86,400 timers.
_STALE = 64
#: The most events that one wait returns (Python asks for FD_SETSIZE - 1).
_FOUND_AT_ONCE = 1023
#: The longest wait.  epoll_wait(2) takes milliseconds as a C int, so 24.8 days at most, but an
#: operator may give any time.  A wake-up without a due timer costs almost nothing.
LONGEST_WAIT_S = 86_400.0
_COMING = "loop-coming"
#: How often to check for spare processor time again: an operator may change the quota.
_ASK_NS = 2_000_000_000


class Loop:
    """Calls back when a descriptor is ready, a timer runs out or a signal arrives."""

    def __init__(self, soon_s: float = 0.0, spare: Callable[[], bool] | None = None) -> None:
        """Make an event loop.

        soon_s: how long to poll for an expected event without sleeping.
        spare: returns whether there is processor time for polling; called now and then.
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
        self._checked_at = 0.0  # when we last checked for due timers
        self.running = True
        #: Set it each time an event is expected within soon_ns: the next wait then polls that long
        #: before it sleeps, because waking a sleeping core costs more (17 us and above).
        self.soon = False
        self.take_signals: Callable[[], None] = lambda: None

    # -- descriptors ---------------------------------------------------------

    def watch(self, fd: int, callback: Callable[[], None], events: int = READ) -> None:
        """Call back whenever fd is ready.  The caller keeps fd, and unwatches it before closing.

        Otherwise events for the closed number continue while another process has a copy: epoll(7),
        "Probing and answers".
        """
        self._epoll.register(fd, events)
        if not self._coming:
            # The timer makes run() call _until_due(), which activates new callbacks.  So run() need
            # not check for them in each turn.
            self.call_after(_COMING, 0.0, self._take_in)
        self._coming[fd] = callback

    def rewatch(self, fd: int, callback: Callable[[], None], events: int = READ) -> None:
        """Replace the callback and the events of fd, from its callback.  This needs no memory."""
        self._epoll.modify(fd, events)
        self._callbacks[fd] = callback

    def unwatch(self, fd: int) -> None:
        """Stop calling back for fd; do nothing if it is not watched."""
        if self._callbacks.pop(fd, None) or self._coming.pop(fd, None):
            self._epoll.unregister(fd)

    # -- timers --------------------------------------------------------------

    def call_after(self, key: Hashable, seconds: float, callback: Callable[[], None]) -> None:
        """Call back once after some seconds; a repeated key replaces the timer."""
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
        """Call back now if a timer has run out.  Use it in long work, during which run() waits."""
        timer = self._timers.get(key)
        if timer is not None and timer[0] <= time.monotonic():
            self.cancel(key)
            timer[2]()

    def due(self, key: Hashable) -> float | None:
        """Return the time when a timer runs out (CLOCK_MONOTONIC seconds), None if it is off."""
        timer = self._timers.get(key)
        return timer[0] if timer is not None else None

    def cancel(self, key: Hashable) -> None:
        """Cancel a timer; do nothing if it does not run."""
        self._timers.pop(key, None)
        if not self._timers:
            self._by_time.clear()

    def _take_in(self) -> None:
        """Activate the callbacks added since the last wait, all of whose events are handled."""
        self._callbacks |= self._coming
        self._coming.clear()

    def _until_due(self) -> float | None:
        """Return the seconds until the next timer: 0 if it is due, None without a timer.

        Also activate the callbacks added since the last wait.
        """
        if self._coming:
            self._take_in()
            self.cancel(_COMING)
        self._checked_at = time.monotonic()
        first = self._by_time
        while first:
            due, count, key = first[0]
            timer = self._timers.get(key)
            if timer is not None and timer[1] == count:
                return min(max(0.0, due - self._checked_at), LONGEST_WAIT_S)
            del first[0]  # cancelled
        return None

    def _run_due(self) -> None:
        """Call back for the timers that were due when the last wait began."""
        while self.running and self._by_time and self._by_time[0][0] <= self._checked_at:
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
                return  # read already
            for number in received:
                if number in wanted:  # not SIGALRM (foreign_descriptors.py)
                    callback(number)

        #: Calls back now for signals that have arrived.
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
            # Run timers only after all waiting events.  After a suspension, or a resume with old
            # timers, we must not end a worker whose READY=1 we have not read yet.
            if timeout == 0 and len(found) < _FOUND_AT_ONCE:
                self._run_due()

    def _poll_briefly(self, timeout: float | None) -> list[tuple[int, int]] | None:
        """Poll for up to soon_ns; return the events, or None."""
        self.soon = False
        poll, now = self._epoll.poll, time.monotonic_ns
        begin = now()
        if begin >= self._ask_at_ns and self._spare is not None:
            self._has_spare = self._spare()
            self._ask_at_ns = begin + _ASK_NS
        if not self._has_spare:
            return None
        limit_ns = self.soon_ns if timeout is None else min(self.soon_ns, int(timeout * 1e9))
        end = begin + limit_ns
        while now() < end:
            found = poll(0)
            if found:
                return found
        return None

    def close(self) -> None:
        """Close the loop's own descriptor."""
        self._epoll.close()
