"""Bounds how much of the page's time one instance can take, whatever it sends.

All instances are heard in one thread.  One that sends events without end, or answers that take long
to read, is read more slowly; what it sends meanwhile stays in its socket.
"""

from __future__ import annotations

import time
from collections.abc import Callable

#: A reload of a hundred workers takes less: it is shown at once.
_FREE_S = 0.05
#: Of one processor.
_SHARE = 0.05


class Share:
    """The processor's time that went to one instance."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        """clock: that of the thread that hears all instances."""
        self._clock = clock
        self._spent_s = 0.0
        self._began_s: float | None = None

    def began(self) -> None:
        """Count from here on."""
        self._began_s = self._clock()

    def owed_s(self) -> float:
        """Return for how long to read no more of it; 0.0 where it has taken little."""
        if self._began_s is not None:
            self._spent_s += self._clock() - self._began_s
            self._began_s = None
        if self._spent_s < _FREE_S:
            return 0.0
        owed_s, self._spent_s = self._spent_s / _SHARE, 0.0
        return owed_s
