"""A generation's scoreboard: the workers' counters, in memory that they share with us.

One record for each slot, written by the worker in it and read by us on request.  The memory cannot
be resized, so no read faults because another process has truncated it.  The values are the workers'
and not trusted: each is read with a limit.

Source: docs/protocol.md, section "Scoreboard"; memfd_create(2), fcntl(2) for the seals.
"""

from __future__ import annotations

import fcntl
import os
import struct

from socketprotector_client import wire

from ..model.records import Counts
from .cleanup import on_error

#: More slots than this are not counted; the memory of an unused one is never touched.
SLOTS = 1024
_COUNTERS = struct.Struct(f"{wire.BOARD_ACCEPTED_AT}Q")
_TIMES = struct.Struct(f"{wire.BOARD_DESCRIPTORS}Q")
_NOTHING = bytes(wire.BOARD_BYTES)
#: What a worker may claim at most; larger values are taken for garbage.
_MOST = 2**53
_MOST_OPEN = 2**20


class Board:
    """Owns the memfd."""

    def __init__(self, fd: int) -> None:
        """Use a scoreboard from make(), of this program or an earlier one."""
        self.fd = fd

    @classmethod
    def make(cls) -> Board:
        """Make an empty one.  Raises OSError."""
        fd = os.memfd_create("sp.board", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with on_error(os.close, fd):
            os.ftruncate(fd, SLOTS * wire.BOARD_BYTES)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return cls(fd)

    def offset(self, slot: int) -> int:
        """Return the offset of a worker's record, -1 where there is none for it."""
        return slot * wire.BOARD_BYTES if slot < SLOTS else -1

    def read(self, slot: int) -> Counts | None:
        """Return what the worker in this slot has counted; None where it does not count."""
        if slot >= SLOTS:
            return None
        words = _COUNTERS.unpack(os.pread(self.fd, _COUNTERS.size, slot * wire.BOARD_BYTES))
        if words[wire.BOARD_STATE] != wire.BOARD_COUNTED:
            return None
        waits = words[wire.BOARD_WAITS : wire.BOARD_WAITS + wire.BOARD_WAIT_WORDS]
        return Counts(
            accepted=min(words[wire.BOARD_ACCEPTED], _MOST),
            active=min(words[wire.BOARD_ACTIVE], words[wire.BOARD_ACCEPTED], _MOST_OPEN),
            errors=min(words[wire.BOARD_ERRORS], _MOST),
            waits=tuple(min(each, _MOST) for each in waits),
        )

    def accepted_at(self, slot: int) -> dict[int, int]:
        """Return CLOCK_MONOTONIC ns at accept by descriptor number, stale ones among them."""
        if slot >= SLOTS:
            return {}
        at = slot * wire.BOARD_BYTES + 8 * wire.BOARD_ACCEPTED_AT
        times = _TIMES.unpack(os.pread(self.fd, _TIMES.size, at))
        return {fd: ns for fd, ns in enumerate(times) if ns}

    def clear(self, slot: int) -> None:
        """Make the slot ready for its next worker."""
        if slot < SLOTS:
            os.pwrite(self.fd, _NOTHING, slot * wire.BOARD_BYTES)

    def close(self) -> None:
        os.close(self.fd)
