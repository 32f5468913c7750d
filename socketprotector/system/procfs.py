"""Facts about processes from /proc, which may be missing, or of another PID namespace.

The pids in the /proc of another PID namespace are not those of kill(2).  `/proc/self` reveals both
cases: proc(5).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice

from ..model.lazy_dataclass import frozen

#: The error text without a usable /proc.
MISSING = "no /proc of this PID namespace is mounted"
#: The states of a process that has ended.
ENDED = (b"Z", b"X")
#: PF_EXITING of linux/sched.h; SIGKILL in a set of pending signals.
_EXITING, _KILL = 0x4, 1 << (signal.SIGKILL - 1)
#: How many descriptors to search for sockets: each takes microseconds.
_SEARCHED = 1000


def is_ours() -> bool:
    """Return whether /proc is mounted and of our own PID namespace."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


def peak_kib() -> int | None:
    """Return this program's peak memory in KiB; None if unknown."""
    try:
        with open("/proc/self/status", "rb") as file:
            _, found, rest = file.read().partition(b"\nVmHWM:")
    except OSError:
        return None
    return int(rest.split(None, 1)[0]) if found else None


@frozen
class Stat:
    """What the kernel tells about a process."""

    state: bytes  # one letter
    parent: int
    group: int
    session: int
    start: int  # see process.boot_ticks()


def stat_of(pid: int | str) -> Stat | None:
    """Return the facts about a process; None if unknown."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return None
    state, *numbers = stat.rpartition(b")")[2].split()[:20]
    parent, group, session = map(int, numbers[:3])
    return Stat(state, parent, group, session, int(numbers[18]))


def is_ending(pid: int) -> bool:
    """Return whether a process has got SIGKILL, or is exiting; False if unknown."""
    with suppress(OSError, ValueError, IndexError):
        with open(f"/proc/{pid}/stat", "rb") as file:
            if int(file.read().rpartition(b")")[2].split()[6]) & _EXITING:
                return True
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith((b"SigPnd:", b"ShdPnd:")) and int(line.split()[1], 16) & _KILL:
                    return True
    return False


def is_alive(pid: int) -> bool | None:
    """Return whether a process has not exited; None if unknown."""
    stat = stat_of(pid)
    return stat.state not in ENDED if stat is not None else None


def children_of(pid: int) -> list[int]:
    """Return the children of all threads of a process, those that have exited included.

    Raises OSError if the process is gone, or /proc does not show it.

    Source: proc(5), `task/TID/children` (CONFIG_PROC_CHILDREN).
    """
    found = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        folder = f"/proc/{pid}/task/{thread}"
        try:
            with open(f"{folder}/children", encoding="ascii") as file:
                found += [int(word) for word in file.read().split()]
        except (FileNotFoundError, ProcessLookupError):
            if os.path.exists(folder):  # otherwise the thread has ended meanwhile
                raise
    return found


def sockets(pid: int | str) -> Iterator[tuple[int, int]]:
    """Yield the open sockets of a process or thread (PID/task/TID): descriptor and inode.

    Raises OSError if the process is gone, or /proc does not show it.
    """
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            kind, _, inode = os.readlink(f"/proc/{pid}/fd/{name}").partition(":[")
            if kind == "socket":
                yield int(name), int(inode.rstrip("]"))


def sockets_of(pids: Iterable[int], most: int = _SEARCHED) -> set[int]:
    """Return the inodes of the processes' sockets, among their first `most` descriptors.

    Empty if unknown.
    """
    budget, found = most, set[int]()
    for pid in pids if is_ours() else ():
        try:
            with os.scandir(f"/proc/{pid}/fd") as entries:
                names = [each.path for each in islice(entries, budget)]
        except OSError:
            continue
        budget -= len(names)
        for name in names:
            with suppress(OSError):  # closed meanwhile
                kind, _, inode = os.readlink(name).partition(":[")
                if kind == "socket":
                    found.add(int(inode.rstrip("]")))
        if not budget:
            break
    return found
