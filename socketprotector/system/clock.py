"""The date, for people: in logs, in status, in what is remembered.

It may jump, so nothing is decided by it; whatever waits or measures takes CLOCK_MONOTONIC.
"""

from __future__ import annotations

import time


def date() -> float:
    """Return seconds since the epoch."""
    return time.time()
