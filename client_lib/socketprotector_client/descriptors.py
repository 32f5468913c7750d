"""The limit of descriptors, and a spare descriptor for the next connection.

If the receiver has no free descriptor, the kernel drops the connection.  So the library takes a
connection only while a descriptor is certainly free.
"""

from __future__ import annotations

import errno
import os
import resource
import sys

if sys.version_info < (3, 9, 6):
    # On these versions the end of a thread loads this library, and aborts the process if no
    # descriptor is free for it (bpo-44434).
    import ctypes

    try:
        ctypes.CDLL("libgcc_s.so.1")
    except OSError:
        pass  # a C library without it

#: Descriptors that the default limit leaves to the program.
LEFT_TO_PROGRAM = 64

#: accept() fails with these errors while the system is short of a resource; the connection waits.
OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def default_limit() -> int:
    """Return the default limit of open connections: RLIMIT_NOFILE less LEFT_TO_PROGRAM."""
    return max(1, _limit() - LEFT_TO_PROGRAM)


def has_room(count: int) -> bool:
    """Return whether `count` descriptors are certainly free; False if unknown.

    Since Linux 6.2 the size of /proc/self/fd is the number of open descriptors; earlier, it is 0.
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
    """A spare descriptor, released right before a connection is received.  One thread at a time."""

    def __init__(self, of: int) -> None:
        """Make spare descriptors as copies of `of`; any open file would do."""
        self._of = of
        self._fd = -1

    def hold(self) -> bool:
        """Hold a descriptor, if one is free; return whether one is held."""
        if self._fd < 0:
            try:
                self._fd = os.dup(self._of)
            except OSError:
                return False
        return True

    def release(self) -> None:
        """Close the held descriptor, if there is one."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
