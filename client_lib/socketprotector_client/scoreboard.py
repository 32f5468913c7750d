"""What this worker counts, where the protector can read it: plain stores, no system call.

The protector reads whenever it likes, also after our death.  So each value is one aligned
8-byte store, which is never seen half written.

Rule: counts what is reported to it, and never fails: without a scoreboard nothing is written.

Source: docs/protocol.md, section "Scoreboard".
"""

from __future__ import annotations

import mmap
import os
import threading
import time

from . import forking, wire
from .connection import OpenConnections

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Optional, Tuple

_LAST_WAIT = wire.BOARD_WAIT_WORDS - 1
# Looked up for every connection.
_ACCEPTED, _ACTIVE, _WAITS = wire.BOARD_ACCEPTED, wire.BOARD_ACTIVE, wire.BOARD_WAITS
_DESCRIPTORS, _ACCEPTED_AT = wire.BOARD_DESCRIPTORS, wire.BOARD_ACCEPTED_AT


class Scoreboard:
    """One worker's record.  Several threads may write."""

    def __init__(self, fd: int, offset: int) -> None:
        """Map the record; takes ownership of fd.  Where that fails nothing is counted.

        fd: -1 for none.
        """
        self._words = _map(fd, offset)
        self._parents: Optional[memoryview] = None
        self._owner = os.getpid()
        self._lock = threading.Lock()
        # Tuples, because finalizers read them.
        self._open: Tuple[OpenConnections, ...] = ()
        self._now_open: Callable[[], int] = int  # of nothing it is 0
        if self._words is not None:
            self._words[wire.BOARD_STATE] = wire.BOARD_COUNTED
            forking.register(self)

    def took(self, fd: int, accepted_at_ns: int) -> None:
        """Count a connection that was taken; not one of the protector's own, accepted at 0."""
        words = self._words
        if words is None:
            if self._parents is not None:
                self._give_up()
            return
        if accepted_at_ns:
            wait_us = (time.monotonic_ns() - accepted_at_ns) // 1000
            bucket = wait_us.bit_length() if wait_us > 0 else 0
            with self._lock:
                words[_ACCEPTED] += 1
                words[_WAITS + (bucket if bucket < _LAST_WAIT else _LAST_WAIT)] += 1
        if fd < _DESCRIPTORS:
            words[_ACCEPTED_AT + fd] = accepted_at_ns
        self.count_open()

    def follow(self, connections: OpenConnections) -> None:
        """Count these among the open ones, until the last of them is closed."""
        if self._words is not None and not self._open:
            self._words[wire.BOARD_STATE] = wire.BOARD_COUNTED  # see leave_uncounted
        self._open = opened = (*(each for each in self._open if each.known()), connections)
        if len(opened) == 1:  # nearly always, and each connection would pay for the sum
            self._now_open = connections.known
        else:
            self._now_open = lambda: sum(each.known() for each in opened)

    def leave_uncounted(self) -> None:
        """Say that nothing is counted here, unless something is: what is not known is not 0."""
        if self._words is not None and not self._open:
            self._words[wire.BOARD_STATE] = wire.BOARD_UNKNOWN

    def count_open(self) -> None:
        """Write down how many connections are open now.  Also fit for a finalizer."""
        words = self._words
        if words is None:
            return
        now_open, written = self._now_open, -1
        # Without a lock, which a finalizer could find held by its own thread: the thread that
        # stores last has seen the last change.
        while (now := now_open()) != written:
            words[_ACTIVE] = written = now

    def failed(self) -> None:
        """Count a handler that raised."""
        with self._lock:
            if self._words is not None:
                self._words[wire.BOARD_ERRORS] += 1

    def _give_up(self) -> None:
        """A forked child takes, too: what its parent counts is not whole any more."""
        parents, self._parents = self._parents, None
        try:
            os.kill(self._owner, 0)
        except PermissionError:
            pass  # it lives, and is another user's now
        except OSError:
            return  # the record of a worker that has ended may be another's by now
        if parents is not None:
            parents[wire.BOARD_STATE] = wire.BOARD_UNKNOWN

    def after_fork_in_child(self) -> None:
        # It would write over what its parent counts.
        self._lock = threading.Lock()
        self._words, self._parents = None, self._parents or self._words


def _map(fd: int, offset: int) -> Optional[memoryview]:
    """Return the record as unsigned 8-byte words.

    (struct.pack_into would do, but stores byte by byte.)
    """
    if fd < 0:
        return None
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    try:
        shared = mmap.mmap(fd, offset - start + wire.BOARD_BYTES, offset=start)
    except (OSError, ValueError):
        return None  # another protector's idea of a scoreboard, or no memory
    finally:
        os.close(fd)  # the mapping stays
    return memoryview(shared)[offset - start :].cast("Q")
