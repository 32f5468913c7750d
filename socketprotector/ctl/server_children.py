"""Finds the child processes of an unmodified server, such as gunicorn's workers.

SocketProtector knows only the processes that it starts, so socketprotectorctl reads /proc.  No
children are found if /proc is missing, hides the children, or belongs to another PID namespace.

Source: proc(5), `task/TID/children` (CONFIG_PROC_CHILDREN) and `stat`.
"""

from __future__ import annotations

import os

from ..model.handoff_modes import MODES
from ..system import procfs
from .client import Message
from .fields import listed, number_in, text_in


def children_of(status: Message) -> dict[int, list[int]]:
    """Return the pids of each worker's living children, by the worker's pid."""
    mode = MODES.get(text_in(status, "handoff"))
    # Under stdio and legacy each worker is a process of SocketProtector (an adapter).  Its children
    # are the operator's programs, not forks of a server.
    if mode is None or mode.adapter or not procfs.is_ours():
        return {}
    parents = {number_in(status, "pid"), number_in(status, "main_pid")}
    found = {}
    for generation in listed(status, "generations"):
        for worker in listed(generation, "workers"):
            pid = number_in(worker, "pid")
            # If the protector runs in another PID namespace, our namespace may have an unrelated
            # process with the worker's pid.  Its parent differs, so leave the process out.
            if pid > 0 and procfs.parent_of(pid) in parents:
                found[pid] = [each for each in _children(pid) if _is_alive(each)]
    return found


def _children(pid: int) -> list[int]:
    """Return the pids of a process's children that /proc shows."""
    found = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                found += [int(word) for word in file.read().split()]
    except OSError:
        pass  # the process has ended, or the kernel lacks CONFIG_PROC_CHILDREN
    return sorted(found)


def _is_alive(pid: int) -> bool:
    state = procfs.state_of(pid)
    return state is not None and state[0] not in (b"Z", b"X")
