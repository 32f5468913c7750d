"""Whether /proc may be asked: it is not mounted everywhere, and need not tell of our processes.

In a PID namespace with the /proc of another one its numbers mean other processes than to
kill(2).  `/proc/self` gives both away: proc(5).
"""

from __future__ import annotations

import os

#: What cannot be had without it, in the words of an error.
MISSING = "no /proc of this PID namespace is mounted"


def is_ours() -> bool:
    """Whether there is a /proc whose numbers are those of the processes that we see."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


def sockets_of(pid: int) -> set[int]:
    """Return the sockets that a process has, by inode; none where nobody tells."""
    folder = f"/proc/{pid}/fd"
    found: set[int] = set()
    try:
        for name in os.listdir(folder):
            kind, _, inode = os.readlink(f"{folder}/{name}").partition(":[")
            if kind == "socket":
                found.add(int(inode.rstrip("]")))
    except OSError:
        pass
    return found
