"""This worker's counts, in memory that the protector reads: plain stores, no system call.

The protector may read at any time, also after the worker's death.  So each value is written by one
aligned 8-byte store: no reader sees half of it.

Rule: never fails; without a scoreboard nothing is written.

Source: docs/protocol.md, section "Scoreboard".
"""

from __future__ import annotations

import mmap
import os
import threading
import time

from . import fork_hook, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Optional, Sequence

    from .connection import OpenConnections

_LAST_WAIT = wire.BOARD_WAIT_WORDS - 1
# Module variables, because each connection needs them.
_ACCEPTED, _ACTIVE, _WAITS = wire.BOARD_ACCEPTED, wire.BOARD_ACTIVE, wire.BOARD_WAITS
_DESCRIPTORS, _ACCEPTED_AT = wire.BOARD_DESCRIPTORS, wire.BOARD_ACCEPTED_AT


class Scoreboard:
    """One worker's record.  Several threads may write."""

    def __init__(self, fd: int, offset: int) -> None:
        """Map the record at `offset` (bytes); take ownership of fd.  On failure count nothing.

        fd: -1 if there is no scoreboard.
        """
        self._file = _map(fd)
        self._slot = offset // wire.BOARD_BYTES
        self._words = _record(self._file, self._slot)
        self._parents: Optional[memoryview] = None
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._now_open: Callable[[], int] = int  # returns 0
        if self._words is not None:
            self._words[wire.BOARD_STATE] = wire.BOARD_COUNTED
            fork_hook.register(self)

    def count_taken(self, fd: int, accepted_at_ns: int) -> None:
        """Count a taken connection.

        accepted_at_ns: 0 for a connection of the protector's own, which is not counted.
        """
        words = self._words
        if words is None:
            if self._parents is not None:
                self._mark_uncounted()
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

    def follow(self, opened: Sequence[OpenConnections]) -> None:
        """Count these connections, and no others, as open."""
        if self._words is not None and self._now_open is int:
            self._words[wire.BOARD_STATE] = wire.BOARD_COUNTED  # see leave_uncounted
        # `known` refers only to a set, so the board keeps nothing else alive.
        counts = [each.known for each in opened]
        if len(counts) == 1:  # nearly always; it saves a sum for each connection
            self._now_open = counts[0]
        else:
            self._now_open = lambda: sum(count() for count in counts)

    def leave_uncounted(self) -> None:
        """Mark the counts as unknown, unless follow() has been called: unknown is not 0."""
        if self._words is not None and self._now_open is int:
            self._words[wire.BOARD_STATE] = wire.BOARD_UNKNOWN

    def count_open(self) -> None:
        """Store the number of open connections.  Safe in a finalizer."""
        words = self._words
        if words is None:
            return
        now_open, written = self._now_open, -1
        # Without a lock, because a finalizer may run in the thread that holds it.  The loop ensures
        # that the thread which stores last has seen the last change.
        while (now := now_open()) != written:
            words[_ACTIVE] = written = now

    @property
    def words(self) -> Optional[memoryview]:
        """The record, for the words that are no counts; None if there is no record."""
        return self._words

    def count_error(self) -> None:
        """Count a handler that raised an exception."""
        with self._lock:
            if self._words is not None:
                self._words[wire.BOARD_ERRORS] += 1

    # Children: each has a record of its own; the parent's record gets the counts of ended children

    def open_children(self, count: int) -> None:
        """Make room for the records of `count` children; without room they are not counted."""
        first = wire.BOARD_WORKER_SLOTS + self._slot * count
        if self._words is None or _record(self._file, first + count - 1) is None:
            return
        for number in range(count):
            _clear(_record(self._file, first + number))
        self._words[wire.BOARD_CHILDREN] = count
        self._words[wire.BOARD_CHILDREN_FROM] = first

    def begin_child(self, number: int) -> None:
        """Begin to count in this child's own record; for a child, right after the fork."""
        words = self._child(self._parents, number)
        if words is not None:
            self._parents, self._words = None, words
            words[wire.BOARD_PID] = os.getpid()
            words[wire.BOARD_STATE] = wire.BOARD_COUNTED

    def end_child(self, number: int) -> Optional[int]:
        """Add the counts of a dead child to this record; return how many connections it had open.

        Returns None if the child did not count.
        """
        ours, words = self._words, self._child(self._words, number)
        if ours is None or words is None:
            return None
        is_counted = words[wire.BOARD_STATE] == wire.BOARD_COUNTED
        active = words[wire.BOARD_ACTIVE]
        added = (wire.BOARD_ACCEPTED, wire.BOARD_ERRORS)
        counts = {each: words[each] for each in (*added, *range(_WAITS, _WAITS + _LAST_WAIT + 1))}
        _clear(words)
        for each, value in counts.items():
            ours[each] += value
        return active if is_counted else None

    def leave(self) -> None:
        """Stop counting: the record may belong to another process by now."""
        self._words = self._parents = None

    def _child(self, parents: Optional[memoryview], number: int) -> Optional[memoryview]:
        """Return the record of a child; None if it has none."""
        if parents is None or number >= parents[wire.BOARD_CHILDREN]:
            return None
        return _record(self._file, parents[wire.BOARD_CHILDREN_FROM] + number)

    def _mark_uncounted(self) -> None:
        """Mark the parent's record as uncounted: a forked child takes connections, too."""
        parents, self._parents = self._parents, None
        try:
            os.kill(self._owner, 0)
        except PermissionError:
            pass  # the parent lives, as another user
        except OSError:
            return  # the parent has ended, and its record may belong to another worker by now
        if parents is not None:
            parents[wire.BOARD_STATE] = wire.BOARD_UNKNOWN

    def after_fork_in_child(self) -> None:
        # Otherwise the child would overwrite its parent's counts.
        self._lock = threading.Lock()
        self._words, self._parents = None, self._parents or self._words


def _map(fd: int) -> Optional[memoryview]:
    """Return all records as unsigned 8-byte words, or None if they cannot be mapped.

    Not struct.pack_into, which stores byte by byte.
    """
    if fd < 0:
        return None
    try:
        return memoryview(mmap.mmap(fd, 0)).cast("Q")
    except (OSError, TypeError, ValueError):
        return None  # not a scoreboard, or no memory
    finally:
        os.close(fd)  # the mapping stays


def _record(file: Optional[memoryview], slot: int) -> Optional[memoryview]:
    """Return the record in a slot; None if there is none."""
    at = slot * wire.BOARD_WORDS
    if file is None or not 0 <= at <= len(file) - wire.BOARD_WORDS:
        return None
    return file[at : at + wire.BOARD_WORDS]


def _clear(words: Optional[memoryview]) -> None:
    if words is not None:
        words[:] = memoryview(bytes(wire.BOARD_BYTES)).cast("Q")
