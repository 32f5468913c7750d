"""Tell the protector again and again that this worker's loop turns.

A thread only writes to a descriptor that the serving loop waits for like for everything
else; the loop answers, so one that is blocked falls silent.  As long as no loop has ever answered
nothing is sent, and the protector does not wait for a worker that never spoke.  Where no loop need
turn the thread sends it itself, or a worker that drains would pass for one that hangs.

Only the process that the protector started is asked, and answers: a forked child that answered
would take the question away from it, or speak for one that hangs.

Source: man 3 sd_watchdog_enabled.
"""

from __future__ import annotations

import os
import threading
import time

from . import forking
from .sd_notify import notify
from .wait_set import LONGEST_WAIT_S

#: Of a 64-bit number, which systemd takes.
_USEC_DIGITS = 20

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Mapping


def interval_s(environ: Mapping[str, str]) -> float:
    """Return how often to speak: half of what is allowed, or oftener; 0 without a watchdog."""
    usec = environ.get("WATCHDOG_USEC", "")
    pid = environ.get("WATCHDOG_PID", "") or str(os.getpid())
    if not usec.isdecimal() or len(usec) > _USEC_DIGITS or pid != str(os.getpid()):
        return 0.0
    return min(int(usec) / 2_000_000, LONGEST_WAIT_S)  # of sleep(): 292 years


class Watchdog:
    """Knocks every interval from `start` on, for the life of the process."""

    def __init__(self, every_s: float, may_be_silent: Callable[[], bool]) -> None:
        """may_be_silent: whether all is well though the loop does not answer."""
        self._every_s = every_s
        self._may_be_silent = may_be_silent
        self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        forking.register(self)

    def start(self) -> None:
        """Begin to knock: not before the program serves, for it may fork first.

        At once, too: the loop answers before it takes its first connection.  A release that
        hangs does so with its first clients, and a worker that never spoke is not waited for.
        """
        os.write(self._write_fd, b"\0")
        threading.Thread(target=self._knock, name="watchdog", daemon=True).start()

    def fileno(self) -> int:
        """Return the descriptor that is readable when `answer` is to be called."""
        return self._read_fd

    def answer(self) -> None:
        try:
            os.read(self._read_fd, 64)
        except BlockingIOError:
            return  # another thread was first
        notify("WATCHDOG=1")

    def after_fork_in_child(self) -> None:
        # The intake that had these in its epoll has made that anew, without them.
        for fd in (self._read_fd, self._write_fd):
            if fd >= 0:  # else this is a child's child: the numbers may be other files' by now
                os.close(fd)
        self._read_fd = self._write_fd = -1

    def _knock(self) -> None:
        while True:
            time.sleep(self._every_s)
            try:
                if self._may_be_silent():
                    notify("WATCHDOG=1")
                else:
                    os.write(self._write_fd, b"\0")
            except BlockingIOError:
                pass  # the loop has not answered for long
