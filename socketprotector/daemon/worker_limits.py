"""When a worker has done enough and is to make room for another: --max-requests, -memory, -age.

The numbers are looked at once a second, and only where one of these is asked for.
"""

from __future__ import annotations

import binascii
import os

from ..model.settings import Limits
from ..system import procfs

#: How often to look.
EVERY_S = 1.0
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")


def exceeded(
    limits: Limits, key: str, *, age_s: float, pid: int, accepted: int | None
) -> str | None:
    """Return which limit a worker has reached, in words; None: none of them.

    key: whatever is this worker's own, so that those which began together do not end together.
    accepted: connections it has taken, None where nobody counts.
    """
    if limits.age_s and age_s >= limits.age_s:
        return f"older than {limits.age_s:g} s"
    if limits.requests and accepted is not None:
        # Not hash(): it differs from one program to the next.
        spread = binascii.crc32(key.encode()) % (2 * limits.requests_spread + 1)
        most = limits.requests - limits.requests_spread + spread
        if accepted >= most:
            return f"{accepted} connections, {most} were its share"
    if limits.memory_bytes and (used := resident_bytes(pid) or 0) >= limits.memory_bytes:
        return f"{used >> 20} MiB resident, {limits.memory_bytes >> 20} are allowed"
    return None


def resident_bytes(pid: int) -> int | None:
    """Return the resident memory of a process, None if it is gone or cannot be looked at."""
    try:
        if not procfs.is_ours():
            return None
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return None
