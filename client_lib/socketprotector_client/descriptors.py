"""How many descriptors there are, and one held ready for the next connection.

The kernel drops a connection that it cannot give a number to, and only the receiver learns of
it.  So none is taken unless one number is certainly free.
"""

from __future__ import annotations

import os
import resource
import sys

if sys.version_info < (3, 9, 6):
    # There the end of a thread loads this library, and aborts the process where no descriptor
    # is free for it (bpo-44434).
    import ctypes

    try:
        ctypes.CDLL("libgcc_s.so.1")
    except OSError:
        pass  # another C library

#: Descriptors that are left to the program by the default limit.
LEFT_TO_PROGRAM = 64


def default_limit() -> int:
    """Return how many connections this process may hold: RLIMIT_NOFILE less a reserve."""
    return max(1, _limit() - LEFT_TO_PROGRAM)


def has_room(count: int) -> bool:
    """Return whether so many descriptors are free for certain; False where it is not known.

    Linux gives how many are open as the size of /proc/self/fd since 6.2; before, it is 0.
    """
    try:
        used = os.stat("/proc/self/fd").st_size
    except OSError:
        return False
    return used > 0 and _limit() - used >= count


def _limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 30 if soft == resource.RLIM_INFINITY else soft


class Spare:
    """A descriptor to give up right before one is received.  One thread at a time."""

    def __init__(self, of: int) -> None:
        """Hold a copy of the descriptor `of`: any open file would do."""
        self._of = of
        self._fd = -1

    def hold(self) -> bool:
        """Return whether a descriptor is held, after trying to get one."""
        if self._fd < 0:
            try:
                self._fd = os.dup(self._of)
            except OSError:
                return False
        return True

    def give_up(self) -> None:
        """Close what is held, if anything."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
