"""A generation's scoreboard: the workers' counters, in memory shared with the protector.

The worker in a slot writes its record, and the protector reads it on request.  The memory cannot
be resized, so no process can make a read fail by truncating it.  We do not trust
the values of workers: each value has a limit.

Source: docs/protocol.md, section "Scoreboard"; memfd_create(2), fcntl(2) for the seals; lseek(2),
SEEK_DATA.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
from collections.abc import Iterator

from socketprotector_client import wire

from ..model.records import Counts
from .cleanup import on_error

#: The number of workers' slots that are counted; the memory of an unused slot is never touched.
SLOTS = wire.BOARD_WORKER_SLOTS
#: The number of slots with those of forked children, which follow.
_ALL_SLOTS = SLOTS + wire.BOARD_CHILD_SLOTS
_COUNTERS = struct.Struct(f"{wire.BOARD_ACCEPTED_AT}Q")
_TIMES = struct.Struct(f"{wire.BOARD_DESCRIPTORS}Q")
_SPREAD = struct.Struct("2Q")
_NOTHING = bytes(wire.BOARD_BYTES)
#: The highest value that we accept.
_MOST = 2**53
_MOST_OPEN = 2**20
_MOST_PID = 2**22
_NO_WORDS = (0,) * wire.BOARD_ACCEPTED_AT


class Board:
    """The scoreboard of one generation.  Owns its memfd."""

    def __init__(self, fd: int) -> None:
        """Use the memfd of a scoreboard that this program or an earlier program has made."""
        self.fd = fd

    @classmethod
    def make(cls) -> Board:
        """Return an empty scoreboard.  Raises OSError."""
        fd = os.memfd_create("sp.board", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with on_error(os.close, fd):
            os.ftruncate(fd, _ALL_SLOTS * wire.BOARD_BYTES)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return cls(fd)

    def offset(self, slot: int) -> int:
        """Return the offset of a slot's record, -1 if the slot is not counted."""
        return slot * wire.BOARD_BYTES if slot < SLOTS else -1

    def written_slots(self) -> Iterator[int]:
        """Yield the workers' slots that may have a record; the others were never written."""
        slot = 0
        while slot < SLOTS:
            try:
                at = os.lseek(self.fd, slot * wire.BOARD_BYTES, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # the system cannot find written slots
                    yield from range(slot, SLOTS)
                return
            slot = at // wire.BOARD_BYTES
            if slot < SLOTS:
                yield slot
            slot += 1

    def read(self, slot: int) -> Counts | None:
        """Return the counts of the worker in a slot; None if it does not count."""
        return self.read_any(slot) if slot < SLOTS else None

    def read_any(self, slot: int) -> Counts | None:
        """Return the counts in a slot, also of a forked child; None: it does not count."""
        words = self._words(slot)
        if words[wire.BOARD_STATE] != wire.BOARD_COUNTED:
            return None
        waits = words[wire.BOARD_WAITS : wire.BOARD_WAITS + wire.BOARD_WAIT_WORDS]
        return Counts(
            accepted=min(words[wire.BOARD_ACCEPTED], _MOST),
            active=min(words[wire.BOARD_ACTIVE], words[wire.BOARD_ACCEPTED], _MOST_OPEN),
            errors=min(words[wire.BOARD_ERRORS], _MOST),
            waits=tuple(min(each, _MOST) for each in waits),
        )

    def child_slots(self, slot: int) -> range:
        """Return the slots of the records of a worker's forked children."""
        words = self._words(slot) if slot < SLOTS else _NO_WORDS
        first, count = words[wire.BOARD_CHILDREN_FROM], words[wire.BOARD_CHILDREN]
        is_valid = first >= SLOTS and first + count <= _ALL_SLOTS
        return range(first, first + count) if is_valid else range(0)

    def pid(self, slot: int) -> int:
        """Return the pid that the forked child in a slot has written; 0: there is none."""
        return min(self._words(slot)[wire.BOARD_PID], _MOST_PID)

    def _words(self, slot: int) -> tuple[int, ...]:
        data = os.pread(self.fd, _COUNTERS.size, slot * wire.BOARD_BYTES)
        # An earlier program's scoreboard has no records of children.
        return _COUNTERS.unpack(data) if len(data) == _COUNTERS.size else _NO_WORDS

    def accepted_at(self, slot: int) -> dict[int, int]:
        """Return descriptor -> time of accept (CLOCK_MONOTONIC ns), including stale entries."""
        at = slot * wire.BOARD_BYTES + 8 * wire.BOARD_ACCEPTED_AT
        data = os.pread(self.fd, _TIMES.size, at) if slot < _ALL_SLOTS else b""
        times = _TIMES.unpack(data) if len(data) == _TIMES.size else ()
        return {fd: ns for fd, ns in enumerate(times) if ns}

    def spread(self, slot: int) -> tuple[bool, int]:
        """Return whether the worker in a slot ends its connections evenly, and by when it must.

        The time is CLOCK_MONOTONIC ns; 0: no order yet; wire.SPREAD_NEVER: it must not.
        """
        if slot >= SLOTS:
            return False, 0
        words = os.pread(self.fd, _SPREAD.size, slot * wire.BOARD_BYTES + 8 * wire.BOARD_SPREADS)
        spreads, until = _SPREAD.unpack(words)
        return spreads == 1, until

    def order_spread(self, slot: int, until: int) -> None:
        """Order the worker in a slot to end its connections by this time."""
        if slot < SLOTS:
            at = slot * wire.BOARD_BYTES + 8 * wire.BOARD_SPREAD_UNTIL
            os.pwrite(self.fd, until.to_bytes(8, sys.byteorder), at)

    def clear(self, slot: int) -> None:
        """Clear a slot's record, and its forked children's records, for its next worker."""
        for each in (*self.child_slots(slot), slot) if slot < SLOTS else ():
            os.pwrite(self.fd, _NOTHING, each * wire.BOARD_BYTES)

    def close(self) -> None:
        os.close(self.fd)
