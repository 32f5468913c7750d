"""Counts the open connections of each generation whose workers accept, from the kernel's data.

For `status`: connections that a generation accepts carry its accept mark (system/accept_marks.py).
Connections with NO_MARK count for no generation.  Queries to the kernel take at most ASKING_SHARE
of our time, however many connections there are.  If `status` is requested more often, the last
answer is repeated.
"""

from __future__ import annotations

import errno
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

from ....model.lazy_dataclass import field, mutable
from ....system import accept_marks, socket_file
from ....system.listener import Listener
from .accept_watch import ASKING_SHARE

#: The mark of a generation that found no unused mark.
NO_MARK = 0
_OTHERS_WAIT = "clients wait there with the mark of another generation"


@mutable
class AcceptCounts:
    """The open connections of all generations, queried at once."""

    listeners: Callable[[], Sequence[Listener]]
    #: Returns our own connection, if there is one; it does not count.
    ours: Callable[[], socket.socket | None] = lambda: None
    #: The connections of each mark, by listener index; without listeners that the kernel does not
    #: report.
    _found: dict[int, Counter[int]] = field(default_factory=dict)
    _again_at: float = 0.0

    def enter(
        self, socket_number: int, taken: Collection[tuple[int, int]]
    ) -> tuple[tuple[int, int], ...]:
        """Mark a socket, 0 or 1, for a generation that will start; return its marks.

        Each mark comes with its listener's index.  taken: the marks of other generations.  The
        result is empty if queued connections may carry another generation's mark: then the two
        cannot be counted apart any more.
        """
        shared = [each for each in self.listeners() if each.shared and not each.lost]
        try:
            return tuple(self._mark(each, socket_number, taken) for each in shared)
        except OSError:
            return ()

    def _mark(
        self, listener: Listener, socket_number: int, taken: Collection[tuple[int, int]]
    ) -> tuple[int, int]:
        """Return a listener's index, and the mark that connections accepted at its socket get.

        Raises OSError if they may carry the mark of another generation.
        """
        if not listener.has_sibling:
            raise OSError(errno.EOPNOTSUPP, "all generations accept from it")
        listening = listener.socket_for(socket_number)
        if listening.family == socket.AF_UNIX:
            mark = socket_file.number_of(listening)
            # Connections may also belong to a generation whose marks we no longer know.
            if (listener.index, mark) in taken or socket_file.connections(listener.path)[mark]:
                raise OSError(errno.EBUSY, "it is the socket of another generation")
            return listener.index, mark
        used = {mark for index, mark in taken if index == listener.index} - {NO_MARK}
        if accept_marks.mark_of(listening) in used and listener.has_waiting(socket_number):
            # Keep the mark, so that the next program after a kill comes to the same result.
            raise OSError(errno.EBUSY, _OTHERS_WAIT)
        mark = NO_MARK
        with suppress(OSError):  # for example no descriptor is left, or the kernel says nothing
            mark = self._unused(listener, socket_number, used)
        earlier = accept_marks.mark(listening, mark, used)
        if earlier and listener.has_waiting(socket_number):
            # Queued connections already carry one of these marks.
            earlier |= accept_marks.mark(listening, NO_MARK, used)
            if not earlier.isdisjoint(used):
                raise OSError(errno.EBUSY, _OTHERS_WAIT)
            mark = NO_MARK
        return listener.index, mark

    def _unused(self, listener: Listener, socket_number: int, used: Collection[int]) -> int:
        """Return an unused mark, preferably the socket's own; NO_MARK: none is left.

        used: the marks of known generations.  Raises OSError.
        """
        listening, other = (listener.socket_for(n) for n in (socket_number, 1 - socket_number))
        # Marks of released generations may be among them: a process may have left its process
        # group, or have passed a connection on.
        found = self._found[listener.index] = accept_marks.connections(listening, self.ours())
        mark = accept_marks.mark_of(listening)
        if mark != NO_MARK and mark not in {*used, *found}:
            return mark
        waiting = accept_marks.connections(listening, waiting=True)
        all_used = {*used, *found, *waiting, accept_marks.mark_of(other)}
        return min(set(range(1, accept_marks.MARKS + 1)) - all_used, default=NO_MARK)

    def active(self, marks: Collection[tuple[int, int]]) -> int | None:
        """Return how many open connections carry these marks; None: unknown.

        marks: a generation's marks with their listeners' indices; empty: they are unknown.
        """
        if marks and time.monotonic() >= self._again_at:
            self._query()
        if not marks or any(mark == NO_MARK or index not in self._found for index, mark in marks):
            return None
        return sum(self._found[index][mark] for index, mark in marks)

    def _query(self) -> None:
        """Count the open connections of all listeners."""
        began = time.monotonic()
        self._found.clear()
        for each in self.listeners():
            if each.has_sibling:
                try:
                    if each.path:
                        self._found[each.index] = socket_file.connections(each.path)
                        continue
                    self._found[each.index] = accept_marks.connections(each.socket, self.ours())
                except OSError:
                    continue
        ended = time.monotonic()
        self._again_at = ended + (ended - began) / ASKING_SHARE
