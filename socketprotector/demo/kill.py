"""Kills a process after suspending it and recording its open connections.

So a connection that ended with its process can be distinguished from a lost connection, by its port
and not by the time.

Source: proc(5): `fd`, `net/tcp` and `task/TID/stat`.
"""

from __future__ import annotations

import os
import signal
import time

from ..system import procfs
from .seen import Kill

_STOPS_S = 1.0
#: States of a thread that does not run: stopped, traced, or ended.
_STILL = (b"T", b"t", b"Z", b"X")
_LISTENS = "0A"


def kill(pid: int) -> Kill:
    """Send KILL to a process; return the time, and the connections that it held.

    Raises OSError if it is gone, or /proc does not show it.
    """
    os.kill(pid, signal.SIGSTOP)
    try:
        held = accepted_by(pid)
    finally:
        at_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
    return Kill(at_s, held)


def accepted_by(pid: int) -> frozenset[int]:
    """Return the ports of the local IPv4 clients whose TCP connections a process has open.

    The process has got SIGSTOP; this waits for its threads to stop, a second at most.  Raises
    OSError if it is gone, or /proc does not show it.
    """
    until_s = time.monotonic() + _STOPS_S
    while _runs(pid) and time.monotonic() < until_s:
        time.sleep(0.001)
    inodes = {str(inode) for _, inode in procfs.sockets(pid)}
    with open("/proc/net/tcp", encoding="ascii") as table:
        next(table)  # the headings
        rows = (line.split() for line in table)
        return frozenset(
            int(row[2].rpartition(":")[2], 16)
            for row in rows
            if row[9] in inodes and row[3] != _LISTENS
        )


def _runs(pid: int) -> bool:
    """Return whether a thread of a process runs.  Raises OSError without such a process."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{thread}/stat", "rb") as file:
                state = file.read().rpartition(b")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        if state not in _STILL:
            return True
    return False
