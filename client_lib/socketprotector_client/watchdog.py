"""The watchdog: WATCHDOG=1 at intervals, as long as this worker's serving loop turns.

A thread pings a descriptor that the serving loop watches, and the loop answers with WATCHDOG=1.
So a blocked loop falls silent.  Before the first answer no message is sent, and the protector
expects none.  While a worker needs no loop, for example during a drain, the thread itself sends
WATCHDOG=1; otherwise that worker would look stuck.

Only the process that the protector started is pinged, and answers.  A forked child would take
pings away from its parent, or answer for a parent that is stuck.

Source: man 3 sd_watchdog_enabled.
"""

from __future__ import annotations

import os
import threading
import time

from . import fork_hook
from .sd_notify import notify
from .wait_set import LONGEST_WAIT_S

#: The digits of a 64-bit number, as systemd allows.
_USEC_DIGITS = 20

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Mapping


def interval_s(environ: Mapping[str, str]) -> float:
    """Return the interval of WATCHDOG=1: half the allowed time at most; 0 without a watchdog."""
    usec = environ.get("WATCHDOG_USEC", "")
    pid = environ.get("WATCHDOG_PID", "") or str(os.getpid())
    if not usec.isdecimal() or len(usec) > _USEC_DIGITS or pid != str(os.getpid()):
        return 0.0
    return min(int(usec) / 2_000_000, LONGEST_WAIT_S)  # sleep() allows 292 years at most


class Watchdog:
    """Pings the serving loop at intervals, from `start` to the end of the process."""

    def __init__(self, every_s: float, may_be_silent: Callable[[], bool]) -> None:
        """Ping every `every_s` seconds.

        may_be_silent: returns whether a loop that does not answer may be healthy.
        """
        self._every_s = every_s
        self._may_be_silent = may_be_silent
        self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        fork_hook.register(self)

    def start(self) -> None:
        """Begin to ping.  Call this when the program serves, because it may fork before.

        The first ping comes at once, so that the loop answers before it takes its first connection.
        The protector watches only a worker that has answered once, and a bad release may get stuck
        with its first client.
        """
        os.write(self._write_fd, b"\0")
        threading.Thread(target=self._ping, name="watchdog", daemon=True).start()

    def fileno(self) -> int:
        """Return the descriptor that is readable when `answer` is due."""
        return self._read_fd

    def answer(self) -> None:
        """Answer a ping: send WATCHDOG=1."""
        try:
            os.read(self._read_fd, 64)
        except BlockingIOError:
            return  # another thread has answered
        notify("WATCHDOG=1")

    def after_fork_in_child(self) -> None:
        # The intake's new epoll does not have these descriptors.
        for fd in (self._read_fd, self._write_fd):
            if fd >= 0:  # otherwise this is a child's child, which has inherited -1
                os.close(fd)
        self._read_fd = self._write_fd = -1

    def _ping(self) -> None:
        while True:
            time.sleep(self._every_s)
            try:
                if self._may_be_silent():
                    notify("WATCHDOG=1")
                else:
                    os.write(self._write_fd, b"\0")
            except BlockingIOError:
                pass  # the pipe is full: the loop has not answered for a long time
