"""The seat of a forked child: what parent and child know of each other, without a system call.

A row of shared memory has the child's state, and the time of the last turn of its serving loop.
Only the parent has the write end of a pipe, so the end of the pipe tells the child that the parent
has ended.  A protector's queue would not tell this, because the queue outlives the parent.
"""

from __future__ import annotations

import mmap
import os
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable

#: The states of a child.
STARTING, READY, LEAVING = range(3)
_STATE, _TURN, _ROW_WORDS = 0, 1, 2
#: The most children of one parent.
MOST = 1024


class Seats:
    """The rows of all children of one parent."""

    def __init__(self) -> None:
        # Noted here, because the parent may end before a child looks.
        self._parent = os.getpid()
        self._words = memoryview(mmap.mmap(-1, 8 * _ROW_WORDS * MOST)).cast("Q")
        #: The end of the pipe that children watch, and the end that only the parent has.
        self.parents_end, self._write_fd = os.pipe2(os.O_CLOEXEC)

    def clear(self, number: int) -> None:
        """Prepare a row for a new child."""
        self._words[_ROW_WORDS * number + _STATE] = STARTING
        self._words[_ROW_WORDS * number + _TURN] = 0

    def state(self, number: int) -> int:
        """Return the state of a child: STARTING, READY or LEAVING."""
        return self._words[_ROW_WORDS * number + _STATE]

    def silent_s(self, number: int) -> float:
        """Return the seconds since a child's last turn; 0.0 before its first."""
        turn = self._words[_ROW_WORDS * number + _TURN]
        return (time.monotonic_ns() - turn) / 1e9 if turn else 0.0

    def take(self, number: int, orphaned: Callable[[], None]) -> Seat:
        """Return the seat of this process, a child that was just forked."""
        os.close(self._write_fd)
        row = self._words[_ROW_WORDS * number : _ROW_WORDS * (number + 1)]
        return Seat(row, self._parent, self.parents_end, orphaned)

    def close(self) -> None:
        os.close(self.parents_end)
        os.close(self._write_fd)


class Seat:
    """This process's place among its siblings."""

    def __init__(
        self, row: memoryview, parent: int, parents_end: int, orphaned: Callable[[], None]
    ) -> None:
        """orphaned: called at the begin of the drain if the parent has ended."""
        self.parents_end = parents_end
        self._row = row
        self._parent = parent
        self._orphaned = orphaned

    def ready(self) -> None:
        """Tell the parent that this child serves."""
        if self._row[_STATE] == STARTING:
            self._tell(READY)

    def turn(self) -> None:
        """Record that the serving loop turns."""
        self._row[_TURN] = time.monotonic_ns()

    def leave(self) -> None:
        """Tell the parent that this child takes no more connections.  Safe in a signal handler."""
        if os.getppid() != self._parent:
            self._orphaned()
        else:
            self._tell(LEAVING)

    def _tell(self, state: int) -> None:
        self._row[_STATE] = state
        if os.getppid() == self._parent:
            # The parent waits for this signal, and looks at all rows then.
            os.kill(self._parent, signal.SIGCHLD)
