"""Connections that were accepted and are in no channel: we alone have them.

Nothing is accepted that could not be delivered, so there are few.  At most one is pending, the one
whose send failed: it goes before all others, to whichever generation has the route by then.  Parked
are those whose listener the route does not know: they wait for a generation that does.

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

from ..system import inherited
from ..system.channel import Channel
from ..system.inherited import Inherited


class Undelivered:
    """Owns the descriptors of the pending connection and of those that are parked."""

    def __init__(self, persist: Callable[[], bool]) -> None:
        """persist: writes the state; False: it could not be written."""
        self.persist = persist
        #: Header and descriptor of the one that goes next.
        self.pending: tuple[bytes, int] | None = None
        #: The highest that was ever used; of the pending one, if there is one.
        self.number = 0
        self._parked: dict[int, tuple[bytes, int]] = {}  # in the order of their turns

    # -- the pending one -----------------------------------------------------

    def keep(self, header: bytes, fd: int) -> None:
        """Have one pending that could not be sent.  Takes ownership of fd."""
        self.pending = header, fd
        self.number += 1
        self.persist()

    def take(self) -> tuple[bytes, int] | None:
        """Give the pending one to the caller, to be sent.

        None where that could not be written down: then it is still pending.
        """
        found, self.pending = self.pending, None
        if self.persist():
            return found
        self.pending = found
        return None

    def choose(self, route: Channel) -> None:
        """Have one pending that the route knows the listener of, if there is any."""
        if self.pending is not None and not route.knows_of(listener_of(self.pending[0])):
            self._park_pending()
        if self.pending is None:
            for number, (header, fd) in self._parked.items():
                if route.knows_of(listener_of(header)):
                    del self._parked[number]
                    self.keep(header, fd)
                    return

    # -- those that are parked -----------------------------------------------

    def has_parked(self, listener: int) -> bool:
        """Whether one is parked that came by a listener."""
        return any(listener_of(header) == listener for header, _ in self._parked.values())

    def park(self, header: bytes, fd: int) -> None:
        """Let one wait behind the others.  Takes ownership of fd."""
        self._parked[self._new_number()] = header, fd
        self.persist()

    def park_first(self, header: bytes, fd: int) -> None:
        """Let one wait that was taken and could not be sent: it is next again."""
        self._parked = {self._new_number(): (header, fd), **self._parked}
        self.persist()

    def park_pending_of(self, listener: int) -> None:
        """Let the pending one wait, before the others, if it came by this listener."""
        if self.pending is not None and listener_of(self.pending[0]) == listener:
            self._park_pending()

    def take_parked(self, listener: int) -> tuple[bytes, int] | None:
        """Give the first that came by a listener to the caller, to be sent.

        None where there is none, or where that could not be written down.
        """
        for number, (header, fd) in self._parked.items():
            if listener_of(header) == listener:
                before = self._parked
                self._parked = {n: each for n, each in before.items() if n != number}
                if self.persist():
                    return header, fd
                self._parked = before
                return None
        return None

    def drop(self, listener: int) -> int:
        """Close those parked that came by a listener; return how many."""
        gone = [n for n, (header, _) in self._parked.items() if listener_of(header) == listener]
        for number in gone:
            os.close(self._parked.pop(number)[1])
        return len(gone)

    def close(self) -> int:
        """Close all; return how many."""
        fds = list(self.descriptors().values())
        self.pending = None
        self._parked.clear()
        for fd in fds:
            os.close(fd)
        return len(fds)

    def _park_pending(self) -> None:
        if self.pending is not None:
            (header, fd), self.pending = self.pending, None
            self.park(header, fd)

    def _new_number(self) -> int:
        """Return one to park under: the pending one has the highest, which the state has."""
        self.number += 2
        return self.number - 1

    # -- to the next program and from the one before -------------------------

    @property
    def pending_header(self) -> bytes | None:
        """What the state has of the pending one, beside its number."""
        return self.pending[0] if self.pending is not None else None

    @property
    def parked(self) -> tuple[tuple[int, bytes], ...]:
        """What the state has of those that are parked: number and header of each."""
        return tuple((number, header) for number, (header, _) in self._parked.items())

    def descriptors(self) -> dict[str, int]:
        """Return all descriptors, by name."""
        numbered = [(number, fd) for number, (_, fd) in self._parked.items()]
        if self.pending is not None:
            numbered.append((self.number, self.pending[1]))
        return {f"{inherited.HAND}{number}": fd for number, fd in numbered}

    def adopt(
        self,
        pending: bytes | None,
        number: int,
        parked: Iterable[tuple[int, bytes]],
        left: Inherited,
    ) -> None:
        """Go on with what an earlier program had; takes their descriptors.

        One without a descriptor could not be stored in time: its number is not used again.
        """
        self.number = number
        fd = left.take_one(f"{inherited.HAND}{number}") if pending is not None else None
        if pending is None or fd is None:
            self.number += 1
        else:
            self.pending = pending, fd
        for each, header in parked:
            fd = left.take_one(f"{inherited.HAND}{each}")
            if fd is not None:
                self._parked[each] = header, fd


def listener_of(header: bytes) -> int:
    """Return the index of the listener that a connection came by."""
    index: int = wire.HEADER.unpack_from(header)[2]
    return index
