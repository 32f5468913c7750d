"""Whether /proc can be used: it is not mounted everywhere, and may be of another PID namespace.

In a PID namespace with the /proc of another one its numbers mean other processes than to
kill(2).  `/proc/self` shows both cases: proc(5).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice

#: What cannot be had without it, in the words of an error.
MISSING = "no /proc of this PID namespace is mounted"


def is_ours() -> bool:
    """Whether there is a /proc whose numbers are those of the processes that we see."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


def sockets_of(pids: Iterable[int], most: int) -> set[int]:
    """Return the sockets that processes have, by inode, among the first so many descriptors.

    None where it is unknown.
    """
    left, found = most, set[int]()
    for pid in pids if is_ours() else ():
        try:
            with os.scandir(f"/proc/{pid}/fd") as entries:
                names = [each.path for each in islice(entries, left)]
        except OSError:
            continue
        left -= len(names)
        for name in names:
            try:
                kind, _, inode = os.readlink(name).partition(":[")
            except OSError:
                continue  # closed meanwhile
            if kind == "socket":
                found.add(int(inode.rstrip("]")))
        if not left:
            break
    return found
