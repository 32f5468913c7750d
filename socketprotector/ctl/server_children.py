"""Finds the child processes of workers, such as the processes that gunicorn forks.

SocketProtector knows only processes that it starts, or that the client library reports.  To find
other child processes, this module reads /proc.  The module finds no child if /proc is missing,
hides other users' processes, or belongs to another PID namespace.
"""

from __future__ import annotations

from contextlib import suppress

from ..model.handoff_modes import MODES
from ..system import procfs
from .client import Message
from .fields import listed, number_in, text_in


def children_of(status: Message) -> dict[int, list[int]]:
    """Return a map: a worker's pid -> the pids of its living children.

    status: its pids must be of our own PID namespace (Client.shares_pids).
    """
    mode = MODES.get(text_in(status, "handoff"))
    # Under --handoff stdio and legacy, each worker is an adapter: a program of SocketProtector that
    # starts the operator's programs.  The adapter's children are these programs, not a server's
    # workers.
    if mode is None or mode.adapter or not procfs.is_ours():
        return {}
    found = {}
    for generation in listed(status, "generations"):
        for worker in listed(generation, "workers"):
            pid = number_in(worker, "pid")
            # OSError: the worker has ended, or the kernel lacks CONFIG_PROC_CHILDREN.
            with suppress(OSError):
                children = procfs.children_of(pid)
                found[pid] = sorted(filter(procfs.is_alive, children))
    return found
