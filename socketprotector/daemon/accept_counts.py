"""How many connections each generation has open that accepts them itself, as the kernel tells.

For `status`: what a generation accepts has a mark of its own (system/accept_marks.py).  To ask the
kernel takes at most ASKING_SHARE of our time, however many connections there are and however often
we are asked; in between the answer of before is given again.
"""

from __future__ import annotations

import errno
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from ..system import accept_marks
from ..system.listener import Listener
from .accept_watch import ASKING_SHARE


@dataclass(slots=True, repr=False, eq=False)
class AcceptCounts:
    """Asks for all generations at once."""

    listeners: Callable[[], Sequence[Listener]]
    #: Returns a connection of ours, which does not count, if there is one.
    ours: Callable[[], socket.socket | None] = lambda: None
    #: By the listener's index; those where the kernel does not tell are missing.
    _found: dict[int, Counter[int]] = field(default_factory=dict)
    _again_at: float = 0.0

    def enter(
        self, socket_number: int, taken: Collection[tuple[int, int]]
    ) -> tuple[tuple[int, int], ...]:
        """Have what is accepted at a socket, 0 or 1, by a generation that is yet to be started told
        from all else; return the marks, with the indices of their listeners.

        taken: those of other generations.  None where its connections cannot be told from others.
        """
        shared = [each for each in self.listeners() if each.shared and not each.lost]
        try:
            return tuple(self._mark(each, socket_number, taken) for each in shared)
        except OSError:
            return ()

    def _mark(
        self, listener: Listener, socket_number: int, taken: Collection[tuple[int, int]]
    ) -> tuple[int, int]:
        """Return a listener and the mark of what is accepted at one of its sockets.

        Raises OSError where no process but a generation's own can be kept from having it.
        """
        if not listener.has_sibling:
            raise OSError(errno.EOPNOTSUPP, "all generations accept from it")
        one, other = (listener.socket_for(n) for n in (socket_number, 1 - socket_number))
        waiting = listener.has_waiting(socket_number)  # they have the mark of before
        # Also those of generations that are gone, or of which they are not known any more: a
        # process may have left its group, or have passed a connection on.
        found = self._found[listener.index] = accept_marks.connections(one, self.ours())
        used = {its for index, its in taken if index == listener.index} | found.keys()
        mark = accept_marks.mark_of(one)
        if not mark or mark in used:
            used |= {accept_marks.mark_of(other), *accept_marks.connections(one, waiting=True)}
            mark = min(set(range(1, accept_marks.MARKS + 1)) - used, default=0)
            accept_marks.mark(one, mark)
            if waiting or not mark:
                raise OSError(errno.EBUSY, "clients wait there, or there are too many generations")
        return listener.index, mark

    def active(self, marks: Collection[tuple[int, int]]) -> int | None:
        """Return how many connections of these marks processes have open; None: it is not known.

        marks: of a generation, with the indices of their listeners; none: it is not known.
        """
        if marks and time.monotonic() >= self._again_at:
            self._ask()
        if not marks or any(index not in self._found for index, _ in marks):
            return None
        return sum(self._found[index][mark] for index, mark in marks)

    def _ask(self) -> None:
        began = time.monotonic()
        self._found.clear()
        for each in self.listeners():
            if each.has_sibling:
                try:
                    self._found[each.index] = accept_marks.connections(each.socket, self.ours())
                except OSError:
                    continue
        ended = time.monotonic()
        self._again_at = ended + (ended - began) / ASKING_SHARE
