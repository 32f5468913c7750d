"""Reports of the pool: counts to the protector, messages to the log.

No function here raises: a failed report must not end a program.  Source: docs/protocol.md.
"""

from __future__ import annotations

import mmap
import os
import time

from socketprotector_client import wire

from ..worker_protocol import write_line

NAME = "socketprotector-stdio"
_LAST_WAIT = wire.BOARD_WAIT_WORDS - 1


def say(text: str) -> None:
    """Write a line to the log, after this program's name.  Never raises."""
    write_line(NAME, text)


class Board:
    """Counts in the scoreboard, if there is one: plain stores, no system call."""

    def __init__(self, value: str) -> None:
        """Map the record; value: of SOCKETPROTECTOR_SCOREBOARD, perhaps empty."""
        self._words = _map(value)
        self._words[wire.BOARD_STATE] = wire.BOARD_COUNTED

    def took(self, accepted_at_ns: int) -> None:
        """Count a taken connection.

        accepted_at_ns: 0 for a connection of the protector's own, which is not counted.
        """
        words = self._words
        if not accepted_at_ns:
            return
        wait_us = (time.monotonic_ns() - accepted_at_ns) // 1000
        bucket = wait_us.bit_length() if wait_us > 0 else 0
        words[wire.BOARD_ACCEPTED] += 1
        words[wire.BOARD_WAITS + min(bucket, _LAST_WAIT)] += 1

    def active(self, count: int) -> None:
        self._words[wire.BOARD_ACTIVE] = count

    def failed(self) -> None:
        """Count a program that did not end with status 0."""
        self._words[wire.BOARD_ERRORS] += 1


def _map(value: str) -> memoryview:
    """Return the record as 8-byte words; without a scoreboard, a buffer that no process reads."""
    fd, _, offset = value.partition(":")
    if fd.isdecimal() and offset.isdecimal():
        start = int(offset) // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        begin = int(offset) - start
        try:
            shared = mmap.mmap(int(fd), begin + wire.BOARD_BYTES, offset=start)
            os.close(int(fd))  # the mapping stays
            return memoryview(shared)[begin:].cast("Q")
        except (OSError, ValueError):
            pass  # the scoreboard of an incompatible protector, or no memory
    return memoryview(bytearray(wire.BOARD_BYTES)).cast("Q")
