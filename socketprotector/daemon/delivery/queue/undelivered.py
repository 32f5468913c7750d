"""Keeps accepted connections that are in no channel.

We keep a connection if its send failed, or if no generation that knows its listener can get the
connection now.  Kept connections are few, because we accept only connections that we can deliver.

After an upgrade or a kill, the program that replaces us (the next program) gets these connections:
their headers from the state, and their descriptors by name.  This module follows two rules:

* We remove a connection from the state before we send it.  If we are killed in between, the
  connection is lost.  If we sent the connection first, the next program might send it again, to a
  second worker.
* A descriptor's name contains a number that no other connection ever had.  If we reused a number,
  the guard or the fd store might still have an older descriptor under the same name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from socketprotector_client import wire

from ....system import inherited
from ....system.inherited import Inherited

#: Returns whether a listener is selected, by the listener's index.
Selects = Callable[[int], bool]


class Undelivered:
    """The owner of the kept connections."""

    def __init__(self, persist: Callable[[], bool]) -> None:
        """persist: writes the state; returns False if that fails."""
        self.persist = persist
        #: The highest number that was used, or skipped by adopt().  A new connection gets the next
        #: number.
        self.number = 0
        #: Number -> header and descriptor of a kept connection, in the order of sending.
        self._waiting: dict[int, tuple[bytes, int]] = {}

    def has(self, selects: Selects) -> bool:
        """Return whether a connection of a selected listener is kept."""
        return any(selects(listener_of(header)) for header, _ in self._waiting.values())

    def keep_first(self, header: bytes, fd: int) -> None:
        """Keep a connection whose send failed, in front of all others.  Takes ownership of fd."""
        self._waiting = {self._new_number(): (header, fd), **self._waiting}
        self.persist()

    def keep_older(self, header: bytes, fd: int, last_number: int) -> None:
        """Keep a connection that the caller has taken out of a queue.

        The caller takes several connections, the oldest first, and may call this method for each.
        We keep these connections in this order, in front of all connections that were kept before
        the caller began.
        last_number: the value of `self.number` when the caller began.  Takes ownership of fd.
        """
        before = tuple(self._waiting.items())
        place = next((n for n, (each, _) in enumerate(before) if each <= last_number), len(before))
        kept = self._new_number(), (header, fd)
        self._waiting = dict((*before[:place], kept, *before[place:]))
        self.persist()

    def keep_last(self, header: bytes, fd: int) -> None:
        """Keep a connection, behind all others.  Takes ownership of fd."""
        self._waiting[self._new_number()] = header, fd
        self.persist()

    def take(self, selects: Selects) -> tuple[bytes, int] | None:
        """Remove and return the first connection of a selected listener; the caller sends it.

        Returns None if there is no such connection, or if the state cannot be written.
        """
        before = self._waiting
        for number, found in before.items():
            if selects(listener_of(found[0])):
                self._waiting = {n: each for n, each in before.items() if n != number}
                if self.persist():
                    return found
                self._waiting = before
                return None
        return None

    def drop(self, selects: Selects) -> int:
        """Close the connections of selected listeners; return the number of connections."""
        gone = [n for n, (header, _) in self._waiting.items() if selects(listener_of(header))]
        for number in gone:
            os.close(self._waiting.pop(number)[1])
        return len(gone)

    def _new_number(self) -> int:
        self.number += 1
        return self.number

    # -- from one program to the next -----------------------------------------

    @property
    def waiting(self) -> tuple[tuple[int, bytes], ...]:
        """The number and header of each connection, for the state."""
        return tuple((number, header) for number, (header, _) in self._waiting.items())

    def descriptors(self) -> dict[str, int]:
        return {f"{inherited.HAND}{number}": fd for number, (_, fd) in self._waiting.items()}

    def adopt(self, number: int, waiting: Iterable[tuple[int, bytes]], unclaimed: Inherited) -> int:
        """Adopt the connections of the program that we replaced; take ownership of the descriptors.

        number: the value of `self.number` in the state.  Perhaps the replaced program stored a
        descriptor under `number + 1`, and was killed before it wrote the state.  So new connections
        get numbers above `number + 1`, and above the numbers of all stored descriptors.

        Returns how many connections are certainly lost: their descriptor or header was not stored.
        """
        stored = {int(key): found[""] for key, found in unclaimed.take_all(inherited.HAND).items()}
        self.number = max((number + 1, *stored))
        lost = 0
        for each, header in waiting:
            if each in stored:
                self._waiting[each] = header, stored.pop(each)
            else:
                lost += 1
        for stored_number, fd in stored.items():
            os.close(fd)
            # The state has no header for this descriptor.  If `stored_number` is above `number`,
            # the connection never reached the state, so the connection is lost.  Otherwise the
            # connection was removed from the state, to be sent or dropped: do not count it.
            lost += stored_number > number
        return lost


def listener_of(header: bytes) -> int:
    """Return the index of the listener to which a connection came."""
    index: int = wire.HEADER.unpack_from(header)[2]
    return index
