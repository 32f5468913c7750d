"""The wall clock, for people: in logs, in status, in the history.

It may jump, so no decision depends on it; waits and measurements use CLOCK_MONOTONIC.
"""

from __future__ import annotations

import time


def date() -> float:
    """Return seconds since the epoch."""
    return time.time()
