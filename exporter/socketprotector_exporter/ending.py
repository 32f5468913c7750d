"""Ends the process when TERM or INT comes.

A thread waits for these signals.  An exception from a signal handler can get lost: Python ignores
it in the callback of a weak reference.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from socketprotector.ctl.api import SystemRefused

#: How long a signal waits while the start makes a file.  connect() to a stale socket file can hang.
_MAKING_S = 1.0


class Ending:
    """Removes a file of the process, and exits with status 0."""

    def __init__(self) -> None:
        #: Held while the process makes its file and sets `remove_file`.
        self.making = threading.Lock()
        self.remove_file: Callable[[], None] = lambda: None

    def await_signals(self) -> None:
        """Start the thread.  Call this before any other thread starts.

        Raises SystemRefused if the thread cannot start.  The signals stay blocked in the calling
        thread, and in the threads that start later.
        """
        awaited = {signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
        start_thread("end", lambda: self._end(awaited))

    def _end(self, awaited: set[signal.Signals]) -> None:
        try:
            signal.sigwait(awaited)
            self.making.acquire(timeout=_MAKING_S)
            self.remove_file()
        finally:
            # At a normal end of Python the other threads would still run, and fail.  The kernel
            # closes the sockets.
            os._exit(0)


def start_thread(name: str, run: Callable[[], None]) -> None:
    """Start a thread that ends with the process.  Raises SystemRefused if it cannot start."""
    try:
        threading.Thread(target=run, name=name, daemon=True).start()
    except RuntimeError as error:  # the only reason is a lack of memory or of processes
        raise SystemRefused(
            f"{error}: raise the limit of memory or processes (ulimit -v, ulimit -u; LimitAS=, "
            "LimitNPROC= or TasksMax= of a unit)"
        ) from error
