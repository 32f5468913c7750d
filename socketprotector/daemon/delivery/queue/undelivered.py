"""Connections that were accepted and are in no channel: we alone have them.

Nothing is accepted that could not be delivered, so there are few: the one whose send failed, and
those whose listener the route does not know, which wait for a generation that does.

All of them outlive the program: their headers are in the state, their descriptors go to the next
program by name.  Two things are easily got wrong here:

* A connection is taken out of the state before it is sent.  Killed in between we lose it.  The
  other way round the next program would send a copy of what a worker serves already.
* The name of a descriptor is a number that no other connection ever had.  What keeps descriptors
  for us (the guard, systemd's store) may still hold an older one under a number that is free again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from socketprotector_client import wire

from ....system import inherited
from ....system.inherited import Inherited

#: Says of which listeners, by index, connections are meant.
Wanted = Callable[[int], bool]


class Undelivered:
    """Owns the descriptors of these connections."""

    def __init__(self, persist: Callable[[], bool]) -> None:
        """persist: writes the state; False: it could not be written."""
        self.persist = persist
        #: The highest number that was ever used.
        self.number = 0
        #: Header and descriptor by number, in the order of their turns.
        self._waiting: dict[int, tuple[bytes, int]] = {}

    def has(self, wanted: Wanted) -> bool:
        """Whether one waits that came by such a listener."""
        return any(wanted(listener_of(header)) for header, _ in self._waiting.values())

    def keep_first(self, header: bytes, fd: int) -> None:
        """Have one wait that could not be sent: it goes next.  Takes ownership of fd."""
        self._waiting = {self._new_number(): (header, fd), **self._waiting}
        self.persist()

    def keep_last(self, header: bytes, fd: int) -> None:
        """Have one wait behind the others.  Takes ownership of fd."""
        self._waiting[self._new_number()] = header, fd
        self.persist()

    def take(self, wanted: Wanted) -> tuple[bytes, int] | None:
        """Give the first that came by such a listener to the caller, to be sent.

        None where there is none, or where that could not be written down.
        """
        before = self._waiting
        for number, found in before.items():
            if wanted(listener_of(found[0])):
                self._waiting = {n: each for n, each in before.items() if n != number}
                if self.persist():
                    return found
                self._waiting = before
                return None
        return None

    def drop(self, wanted: Wanted) -> int:
        """Close those that came by such listeners; return how many."""
        gone = [n for n, (header, _) in self._waiting.items() if wanted(listener_of(header))]
        for number in gone:
            os.close(self._waiting.pop(number)[1])
        return len(gone)

    def _new_number(self) -> int:
        self.number += 1
        return self.number

    # -- to the next program and from the one before -------------------------

    @property
    def waiting(self) -> tuple[tuple[int, bytes], ...]:
        """What the state has of them: number and header of each."""
        return tuple((number, header) for number, (header, _) in self._waiting.items())

    def descriptors(self) -> dict[str, int]:
        """Return all descriptors, by name."""
        return {f"{inherited.HAND}{number}": fd for number, (_, fd) in self._waiting.items()}

    def adopt(self, number: int, waiting: Iterable[tuple[int, bytes]], left: Inherited) -> None:
        """Go on with what an earlier program had; takes their descriptors.

        number: the highest that it has written down.  Killed before it could write, it may have
        had one more stored.  One without a descriptor could not be stored in time.
        """
        self.number = number + 1
        for each, header in waiting:
            fd = left.take_one(f"{inherited.HAND}{each}")
            if fd is not None:
                self._waiting[each] = header, fd


def listener_of(header: bytes) -> int:
    """Return the index of the listener that a connection came by."""
    index: int = wire.HEADER.unpack_from(header)[2]
    return index
