"""What the pool reports: its status to the protector, messages to people.

Nothing here raises: a failed report must not end a program.  Source: docs/protocol.md.
"""

from __future__ import annotations

import _socket as socket
import errno
import mmap
import os
import time

from socketprotector_client import wire

NAME = "socketprotector-stdio"
_FULL = (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM)
_LAST_WAIT = wire.BOARD_WAIT_WORDS - 1
_STATE, _ACCEPTED = wire.BOARD_STATE, wire.BOARD_ACCEPTED
_ACTIVE, _ERRORS, _WAITS = wire.BOARD_ACTIVE, wire.BOARD_ERRORS, wire.BOARD_WAITS


def say(text: str) -> None:
    """Write a line to the log."""
    try:
        os.write(2, f"{NAME}: {text}\n".encode("utf-8", "backslashreplace"))
    except OSError:
        pass


class Notifier:
    """Speaks sd_notify on a socket that it keeps, so that it can when descriptors are scarce."""

    def __init__(self, address: str) -> None:
        """address: the value of NOTIFY_SOCKET, perhaps empty."""
        self._address = "\0" + address[1:] if address[:1] == "@" else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None

    def tell(self, text: str, *, wait: bool = False) -> bool:
        """Say it; return whether it is worth saying again: there was no room.

        wait: for room instead, as long as it takes.
        """
        if self._socket is None:
            return False
        flags = socket.MSG_NOSIGNAL if wait else socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT
        try:
            self._socket.sendto(text.encode(), flags, self._address)
        except OSError as error:
            return error.errno in _FULL
        return False


class Board:
    """Counts in the scoreboard, if there is one: plain stores, no system call."""

    def __init__(self, value: str) -> None:
        """Map the record; value: that of SOCKETPROTECTOR_SCOREBOARD, perhaps empty."""
        self._words = _map(value)
        self._words[_STATE] = wire.BOARD_COUNTED

    def took(self, accepted_at_ns: int) -> None:
        words = self._words
        wait_us = (time.monotonic_ns() - accepted_at_ns) // 1000
        bucket = wait_us.bit_length() if wait_us > 0 else 0
        words[_ACCEPTED] += 1
        words[_WAITS + (bucket if bucket < _LAST_WAIT else _LAST_WAIT)] += 1

    def running(self, count: int) -> None:
        self._words[_ACTIVE] = count

    def failed(self) -> None:
        """Count a program that ended otherwise than with status 0."""
        self._words[_ERRORS] += 1


def _map(value: str) -> memoryview:
    """Return the record as 8-byte words; without a scoreboard some that are never read."""
    fd, _, offset = value.partition(":")
    if fd.isdecimal() and offset.isdecimal():
        start = int(offset) // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        begin = int(offset) - start
        try:
            shared = mmap.mmap(int(fd), begin + wire.BOARD_BYTES, offset=start)
            os.close(int(fd))  # the mapping stays
            return memoryview(shared)[begin:].cast("Q")
        except (OSError, ValueError):
            pass  # another protector's idea of a scoreboard, or no memory
    return memoryview(bytearray(wire.BOARD_BYTES)).cast("Q")
