"""How many connections each generation has open that accepts them itself, as the kernel tells.

For `status`: what a generation accepts has a mark of its own (system/accept_marks.py); what it
accepts with NO_MARK is counted for none, and takes nothing from the counts of others.  To ask the
kernel takes at most ASKING_SHARE of our time, however many connections there are and however often
we are asked; in between the answer of before is given again.
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

#: Of generations for which there was no mark of their own.
NO_MARK = 0
_OTHERS_WAIT = "clients wait there with the mark of another generation"


@mutable
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

        taken: those of other generations.  Empty where it may accept connections that have the mark
        of another one, which is not to be told from it any more.
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

        Raises OSError where what is accepted there may have the mark of another generation.
        """
        if not listener.has_sibling:
            raise OSError(errno.EOPNOTSUPP, "all generations accept from it")
        one = listener.socket_for(socket_number)
        if one.family == socket.AF_UNIX:
            mark = socket_file.number_of(one)
            # Also one whose marks are not known any more.
            if (listener.index, mark) in taken or socket_file.connections(listener.path)[mark]:
                raise OSError(errno.EBUSY, "it is the socket of another generation")
            return listener.index, mark
        used = {its for index, its in taken if index == listener.index} - {NO_MARK}
        if accept_marks.mark_of(one) in used and listener.has_waiting(socket_number):
            # It keeps the mark: a program that goes on after a kill must come to the same.
            raise OSError(errno.EBUSY, _OTHERS_WAIT)
        mark = NO_MARK
        with suppress(OSError):  # no descriptor to ask with, say, or the kernel does not tell
            mark = self._unused(listener, socket_number, used)
        had = accept_marks.mark(one, mark, used)
        if had and listener.has_waiting(socket_number):
            # They have one of those, whoever accepts them.
            had |= accept_marks.mark(one, NO_MARK, used)
            if not had.isdisjoint(used):
                raise OSError(errno.EBUSY, _OTHERS_WAIT)
            mark = NO_MARK
        return listener.index, mark

    def _unused(self, listener: Listener, socket_number: int, used: Collection[int]) -> int:
        """Return a mark that is not in use, the socket's own if it can be; NO_MARK: there is none.

        used: those of generations that are known.  Raises OSError.
        """
        one, other = (listener.socket_for(n) for n in (socket_number, 1 - socket_number))
        # Also those of generations that are gone, or of which they are not known any more: a
        # process may have left its group, or have passed a connection on.
        found = self._found[listener.index] = accept_marks.connections(one, self.ours())
        mark = accept_marks.mark_of(one)
        if mark != NO_MARK and mark not in {*used, *found}:
            return mark
        waiting = accept_marks.connections(one, waiting=True)
        all_used = {*used, *found, *waiting, accept_marks.mark_of(other)}
        return min(set(range(1, accept_marks.MARKS + 1)) - all_used, default=NO_MARK)

    def active(self, marks: Collection[tuple[int, int]]) -> int | None:
        """Return how many connections of these marks processes have open; None: it is not known.

        marks: of a generation, with the indices of their listeners; none: it is not known.
        """
        if marks and time.monotonic() >= self._again_at:
            self._ask()
        if not marks or any(mark == NO_MARK or index not in self._found for index, mark in marks):
            return None
        return sum(self._found[index][mark] for index, mark in marks)

    def _ask(self) -> None:
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
