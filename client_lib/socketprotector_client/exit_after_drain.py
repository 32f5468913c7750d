"""The end of a drained worker whose server has no notion of draining.

A server that handles SIGTERM can finish: it gets one.  Any other server
would be killed by the signal in the middle of its answers.  For such a server
accept() waits until all handed-out connections are closed, and then exits.

A finishing server closes idle connections.  A connection that was just taken looks idle
while its first request is under way or unread, and its client would
be disconnected without an answer.  So SIGTERM waits for such connections.
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

# If the server runs in a thread of its own, the main thread may wait for something else.
# If it waits for the server's end, the process has exited long before.
_MAIN_THREAD_GRACE_S = 2.0

# How long a connected client may take to begin its request.  Browsers open
# connections ahead of need and then send nothing.
_FIRST_REQUEST_S = 1.0
# All must be read twice in a row: an event loop handles a request one turn after it has read it.
_POLL_S = 0.01
_POLLS = 2


class DrainExit:
    """The exit of the process whose listener has drained."""

    def __init__(self, intake: Intake, pid: Optional[int] = None) -> None:
        """Find out whether the program handles SIGTERM; `begin` begins the exit.

        pid: the process that gets SIGTERM instead, such as a parent that ends its children.
        """
        self._intake = intake
        self._pid = os.getpid() if pid is None else pid
        # None: a handler installed from C.  A TermWatch's handler is ours, not the program's.
        handler = signal.getsignal(signal.SIGTERM)
        is_own = isinstance(getattr(handler, "__self__", None), TermWatch)
        self._waits = pid is None and (is_own or handler in (signal.SIG_DFL, signal.SIG_IGN))
        self._sent = 0  # signals from here

    def begin(self) -> None:
        """Send SIGTERM once the clients' bytes are read, if the program handles that signal."""
        if self._waits:
            self._intake.await_last()
        elif not len(self._intake.open):
            self._send()
        else:
            # In a thread, because the event loop must keep reading from the clients.
            threading.Thread(
                target=self._term_when_read, name="socketprotector-leave", daemon=True
            ).start()

    def resend(self) -> None:
        """Send SIGTERM again, for a handler that took the first one as the begin of the drain.

        Call it in that handler.  Only one signal is sent again: a draining server needs no other
        begin.
        """
        if self._sent == 1:
            self._send()

    def _send(self) -> None:
        self._sent += 1  # before the signal, whose handler may run at once
        os.kill(self._pid, signal.SIGTERM)

    def wait(self, timeout_s: Optional[float]) -> None:
        """Wait up to timeout_s for the process's end, and return if it has not come.

        Raises SystemExit(0) once the last connection is closed, if the server
        does not handle SIGTERM.
        """
        while True:
            if self._waits and not len(self._intake.open):
                self._exit()
            self._intake.waits.wait(timeout_s)
            if timeout_s is not None:
                return

    def _term_when_read(self) -> None:
        deadline = time.monotonic() + _FIRST_REQUEST_S
        polls = 0
        while polls < _POLLS and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            polls = 0 if self._intake.open.any_unread() else polls + 1
        self._send()

    def _exit(self) -> None:
        self._waits = False
        self._intake.waits.hush()
        # No event announces connections that ssl has closed; uncounted, they would look lost.
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
