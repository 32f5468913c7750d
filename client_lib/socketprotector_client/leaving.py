"""How a worker ends whose server knows nothing of draining.

A server that handles SIGTERM knows how to finish: it is sent one.  Any other
would be killed by it in the middle of its answers; for that one the
connections handed out are counted down, and then its accept() exits.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import Optional

from .intake import Intake
from .worker import current

_log = logging.getLogger(__name__)

# A server in a thread of its own has the main thread waiting for something.
# If that is the server's end, the process is gone long before.
_MAIN_THREAD_GRACE_S = 2.0


class Leave:
    """The end of the process that a drained listener belongs to."""

    def __init__(self, intake: Intake) -> None:
        """Begin it.  Sends SIGTERM to this process if it has a handler for that."""
        self._intake = intake
        # None is a handler that was installed from C.
        handled = signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
        self._waits = not handled
        if handled:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            intake.await_last()

    def proceed(self, timeout_s: Optional[float]) -> None:
        """Wait up to timeout_s for the end; return if it has not come yet.

        Raises SystemExit(0) when it is this server that ends the process and
        the last connection is closed.
        """
        while True:
            if self._waits and not len(self._intake.open):
                self._exit()
            self._intake.idle(timeout_s)
            if timeout_s is not None:
                return

    def _exit(self) -> None:
        self._waits = False
        self._intake.hush()
        current().drain.finish()
        if threading.current_thread() is not threading.main_thread():
            timer = threading.Timer(_MAIN_THREAD_GRACE_S, _interrupt_main)
            timer.daemon = True
            timer.start()
        raise SystemExit(0)


def _interrupt_main() -> None:
    _log.warning(
        "the server has ended but the main thread goes on; interrupting it as Ctrl-C would "
        "(use on_drain to end it)"
    )
    os.kill(os.getpid(), signal.SIGINT)
