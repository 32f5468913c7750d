"""A folder, locked while a file in it is looked at and replaced.

Whoever finds something stale and puts its own in the place does both under this lock; so
two that start at once cannot remove each other's, and need no tries and no guesses.

Source: flock(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: It is held for some system calls; who holds it for so long is no program of ours.
_LOCK_S = 5.0
_LOOK_AGAIN_MS = 5


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold the lock of the folder that `path` is in.

    Raises OSError, EBUSY when another program keeps the folder locked.
    """
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        until = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise OSError(
                        errno.EBUSY, "another program keeps the folder locked", path
                    ) from None
                select.poll().poll(_LOOK_AGAIN_MS)
        yield
    finally:
        os.close(folder)
