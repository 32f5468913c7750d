"""What /proc shows of processes; it is not mounted everywhere, and may be of another PID namespace.

In a PID namespace with the /proc of another one its numbers mean other processes than to
kill(2).  `/proc/self` shows both cases: proc(5).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice

#: What cannot be had without it, in the words of an error.
MISSING = "no /proc of this PID namespace is mounted"


def is_ours() -> bool:
    """Whether there is a /proc whose numbers are those of the processes that we see."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


def peak_kib() -> int | None:
    """Return the most memory that this program has had, in KiB; None: not known."""
    try:
        with open("/proc/self/status", "rb") as file:
            _, found, rest = file.read().partition(b"\nVmHWM:")
    except OSError:
        return None
    return int(rest.split(None, 1)[0]) if found else None


def state_of(pid: int | str) -> tuple[bytes, int] | None:
    """Return the state of a process, one letter, and its process group; None: not known."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return None
    state, _, group = stat.rpartition(b")")[2].split()[:3]
    return state, int(group)


def parent_of(pid: int) -> int | None:
    """Return the parent of a process; None: not known."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, IndexError):
        return None


def sockets(pid: int) -> Iterator[tuple[int, int]]:
    """Yield the sockets that a process has open: number and inode.

    Raises OSError where it is gone, or /proc does not show it.
    """
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            kind, _, inode = os.readlink(f"/proc/{pid}/fd/{name}").partition(":[")
            if kind == "socket":
                yield int(name), int(inode.rstrip("]"))


def sockets_of(pids: Iterable[int], most: int) -> set[int]:
    """Return the sockets that processes have, by inode, among the first so many descriptors.

    Empty where it is unknown.
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
            with suppress(OSError):  # closed meanwhile
                kind, _, inode = os.readlink(name).partition(":[")
                if kind == "socket":
                    found.add(int(inode.rstrip("]")))
        if not left:
            break
    return found
