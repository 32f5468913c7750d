"""The credentials of a UNIX socket's peer, and the ambiguous overflow uid.

In a user namespace all users without a mapping appear as a single user, the overflow user, which
has the uid of `nobody`.  So that uid identifies a user only if every uid is mapped.

Source: user_namespaces(7), unix(7), pidfd_send_signal(2).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterable

_USERS, _GROUPS = ("uid_map", "overflowuid"), ("gid_map", "overflowgid")
#: The kernel's default for the overflow uid and gid.
_OVERFLOW = 65534
#: The number of mapped ids without a user namespace: all ids are mapped.
_ALL = 2**32 - 1
_SO_PEERPIDFD = 77  # Linux 6.5


def unmistakable_users(uids: Iterable[int]) -> frozenset[int]:
    """Return the uids that identify a single user each."""
    return frozenset(uids) - _ambiguous(*_USERS)


def unmistakable_groups(gids: Iterable[int]) -> frozenset[int]:
    """Return the gids that identify a single group each."""
    return frozenset(gids) - _ambiguous(*_GROUPS)


def may_be_signalled(connection: socket.socket) -> bool:
    """Return whether we may signal the peer's process; if so, it can be trusted.

    It then runs as our user; or it is in our user namespace, where we may signal every process.
    A process from outside is refused, because the kernel compares users, not their numbers.  Return
    False also if the process has ended, or before Linux 6.5, which does not identify the peer.
    """
    try:
        found = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
        pidfd = int.from_bytes(found, sys.byteorder)
    except OSError:
        return False
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except OSError:
        return False
    finally:
        os.close(pidfd)
    return True


def _ambiguous(map_name: str, overflow_name: str) -> frozenset[int]:
    """Return the overflow number, if several users or groups may have it."""
    try:
        with open(f"/proc/self/{map_name}", encoding="ascii") as file:
            if sum(int(line.split()[2]) for line in file) >= _ALL:
                return frozenset()
    except FileNotFoundError:
        if os.path.exists("/proc/self"):
            return frozenset()  # a kernel without user namespaces
    except (OSError, ValueError, IndexError):
        pass
    try:
        with open(f"/proc/sys/kernel/{overflow_name}", encoding="ascii") as file:
            return frozenset({int(file.read())})
    except (OSError, ValueError):
        return frozenset({_OVERFLOW})
