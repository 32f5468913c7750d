"""How a worker ends whose server knows nothing of draining.

A server that handles SIGTERM knows how to finish: it is sent one.  Any other
would be killed by it in the middle of its answers; for that one the
connections handed out are counted down, and then its accept() exits.

Servers that finish close idle connections.  One that was taken a moment ago looks idle to them,
too, while its first request is still on its way, or has come and was not read.  Its client would
be disconnected without an answer; so SIGTERM waits for those.
"""

from __future__ import annotations

import os
import signal
import threading
import time

from .intake import Intake
from .log import Logger
from .signals import TermWatch
from .worker import current

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

_log = Logger(__name__)

# A server in a thread of its own has the main thread waiting for something.
# If that is the server's end, the process is gone long before.
_MAIN_THREAD_GRACE_S = 2.0

# How long a client that has connected may take to begin its request; browsers open
# connections ahead of need and then say nothing.
_FIRST_WORDS_S = 1.0
# Twice in a row all has to be read: an event loop that has read a request takes it up in the
# turn after that.
_LOOK_S = 0.01
_LOOKS = 2


class Leave:
    """The end of the process that a drained listener belongs to."""

    def __init__(self, intake: Intake, pid: Optional[int] = None) -> None:
        """Look for what there is; `begin` begins it.

        pid: the process that gets SIGTERM instead (a parent that ends its children by itself).
        """
        self._intake = intake
        self._pid = os.getpid() if pid is None else pid
        # None is a handler that was installed from C; a TermWatch's is not the program's.
        handler = signal.getsignal(signal.SIGTERM)
        is_own = isinstance(getattr(handler, "__self__", None), TermWatch)
        self._waits = pid is None and (is_own or handler in (signal.SIG_DFL, signal.SIG_IGN))
        self._signals = 0  # sent by us

    def begin(self) -> None:
        """Begin it.  Sends SIGTERM to this process if it has a handler for that."""
        if self._waits:
            self._intake.await_last()
        elif not len(self._intake.open):
            self._send()
        else:
            # A thread, for the loop has to go on to read what is waited for.
            threading.Thread(
                target=self._term_when_read, name="socketprotector-leave", daemon=True
            ).start()

    def again(self) -> None:
        """Send it once more: its handler took the first one for the begin of the drain.

        One that came from elsewhere may have been; but what drains already needs no such begin.
        For the handler itself.
        """
        if self._signals == 1:
            self._send()

    def _send(self) -> None:
        self._signals += 1  # before: the handler may run at once
        os.kill(self._pid, signal.SIGTERM)

    def proceed(self, timeout_s: Optional[float]) -> None:
        """Wait up to timeout_s for the end; return if it has not come yet.

        Raises SystemExit(0) when it is this server that ends the process and
        the last connection is closed.
        """
        while True:
            if self._waits and not len(self._intake.open):
                self._exit()
            self._intake.waits.wait(timeout_s)
            if timeout_s is not None:
                return

    def _term_when_read(self) -> None:
        deadline = time.monotonic() + _FIRST_WORDS_S
        looks = 0
        while looks < _LOOKS and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            looks = 0 if self._intake.open.any_unread() else looks + 1
        self._send()

    def _exit(self) -> None:
        self._waits = False
        self._intake.waits.hush()
        # Those that ssl has closed were not seen to end, and would pass for lost.
        self._intake.board.count_open()
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
