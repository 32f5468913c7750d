"""A bound on the page's processor time for one instance, whatever the instance sends.

One thread reads from all instances.  It reads more slowly from an instance that sends events
without end, or answers that take long to parse; unread bytes stay in the instance's socket.
"""

from __future__ import annotations

import time
from collections.abc import Callable

#: The processor time before a pause: more than a reload of a hundred workers needs.
_FREE_S = 0.05
#: The allowed share of one processor.
_SHARE = 0.05


class Share:
    """The processor time spent on one instance."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        """Measure with `clock`: by default the processor time of the calling thread."""
        self._clock = clock
        self._spent_s = 0.0
        self._began_s: float | None = None

    def began(self) -> None:
        """Begin to measure."""
        self._began_s = self._clock()

    def owed_s(self) -> float:
        """Return for how many seconds to pause reading; 0.0 if the instance took little time."""
        if self._began_s is not None:
            self._spent_s += self._clock() - self._began_s
            self._began_s = None
        if self._spent_s < _FREE_S:
            return 0.0
        owed_s, self._spent_s = self._spent_s / _SHARE, 0.0
        return owed_s
