"""Texts about how a process ended: its exit status, or the signal that killed it.

Pure.  daemon/out_of_memory.py adds why a process got SIGKILL.
"""

from __future__ import annotations


def ended(exited: bool, status: int, *, dumped: bool = False) -> str:
    """Return in words how a process ended: its exit status, or the signal that killed it."""
    if exited:
        return f"exited with status {status}"
    from signal import Signals  # imported here: only its names are needed, none of its calls

    try:
        name = Signals(status).name
    except ValueError:
        name = f"signal {status}"
    return f"was killed by {name}" + (" (core dumped)" if dumped else "")


def status_of(wait_status: int) -> tuple[bool, str]:
    """Return (whether a process exited with 0, how it ended in words) for a status of wait(2)."""
    if wait_status & 0x7F:
        return False, ended(False, wait_status & 0x7F, dumped=bool(wait_status & 0x80))
    return wait_status == 0, ended(True, wait_status >> 8)


#: The end of a worker that the kernel, or another process, has killed.
KILLED = ended(False, 9)
