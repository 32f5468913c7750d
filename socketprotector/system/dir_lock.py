"""Locks a folder while a file in it is checked and replaced.

A process holds this lock while it checks that a file is stale and replaces it.  So two processes
that start at once cannot remove each other's file.

Source: flock(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import sock_diag

#: The longest wait for the lock.  SocketProtector holds it only for a few system calls, so after
#: this time another program must hold it.
_LOCK_S = 5.0
_LOOK_AGAIN_MS = 5


@contextmanager
def locked(path: str, patience_s: float = _LOCK_S) -> Iterator[str]:
    """Hold the lock of the folder that contains `path`; yield a path to the file in that folder.

    Use the yielded path for all that removes, replaces or changes the file.  It stays in the locked
    folder, even if a user who may change links or folders on `path` makes that lead elsewhere.
    (Without /proc, it is `path` itself.)

    Raises OSError; EBUSY if another program keeps the folder locked for patience_s.
    """
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        until = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise OSError(
                        errno.EBUSY, "another program keeps the folder locked", path
                    ) from None
                select.poll().poll(_LOOK_AGAIN_MS)
        inside = f"/proc/self/fd/{folder}"
        yield os.path.join(inside, os.path.basename(path)) if os.path.isdir(inside) else path
    finally:
        os.close(folder)


def give(
    sock: socket.socket, path: str, uid: int, gid: int, chown: Callable[[int, int, int], None]
) -> os.stat_result:
    """Set the user and group (-1: unchanged) of the file of a socket that we have just bound.

    Returns the file's stat result.  Raises OSError.
    This uses a descriptor, because another user with write access to the folder could replace the
    file meanwhile.
    """
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if (
            not stat.S_ISSOCK(found.st_mode)
            or found.st_nlink > 1
            or found.st_uid != os.geteuid()
            or not sock_diag.is_bound_to(sock, fd)
        ):
            why = f"user {found.st_uid} owns the file there; remove it or choose another path"
            raise OSError(errno.EEXIST, why)
        if (uid, gid) != (-1, -1):
            chown(fd, uid, gid)
        return found
    finally:
        os.close(fd)
