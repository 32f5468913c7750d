"""The end of a drained worker whose servers do not know about drains.

A server that handles SIGTERM gets SIGTERM, and finishes.  The signal would kill any other
server in the middle of its answers.  For such a server accept() waits until all handed-out
connections are closed, also those of other listeners, and then exits.

When a server finishes, it closes idle connections.  A new connection looks idle while its first
request is under way or unread, so the server would disconnect that client without an answer.
So does a connection in a TLS handshake.  SIGTERM is therefore delayed until the first requests are
read.
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
    from typing import Optional, Set

_log = Logger(__name__)

# How long the main thread may still run after a server in another thread has ended.  A main thread
# that waits for the server exits much sooner; any other main thread might run for ever.
_MAIN_THREAD_GRACE_S = 2.0

# How long a connected client may take to begin its request.  Browsers open
# connections ahead of need and then send nothing.
_FIRST_REQUEST_S = 1.0
# The check must succeed twice in a row: an event loop handles a request one turn after reading it.
_POLL_S = 0.01
_POLLS = 2


class DrainExit:
    """The exit of the process whose listener has drained."""

    def __init__(
        self, intake: Intake, pid: Optional[int] = None, *, outlives_term: bool = False
    ) -> None:
        """Find out whether the program handles SIGTERM; `begin` begins the exit.

        pid: the process to signal instead of this one, such as a parent that ends its children.
        outlives_term: whether the server keeps running after SIGTERM, even with a handler.
        """
        self._intake = intake
        self._pid = os.getpid() if pid is None else pid
        # None: a handler installed from C.  A TermWatch's handler is ours, not the program's.
        handler = signal.getsignal(signal.SIGTERM)
        is_own = isinstance(getattr(handler, "__self__", None), TermWatch)
        is_unhandled = is_own or handler in (signal.SIG_DFL, signal.SIG_IGN)
        self._waits = pid is None and (is_unhandled or outlives_term)
        self._sent = 0  # how often this object has sent SIGTERM
        self._hurries = False

    def begin(self) -> None:
        """Send SIGTERM once the clients' bytes are read, if the program handles that signal.

        If several listeners drain, only the first of them sends it.
        """
        if self._waits or not self._intake.drain.end_begun.acquire(False):
            return
        if not self._left():
            self._send()
        else:
            # In a thread, because the event loop must keep reading from the clients.
            thread = threading.Thread(
                target=self._term_when_read, name="socketprotector-leave", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # without the signal, the worker would serve until it is killed
                _log.error("cannot wait for the last requests: the system refuses a thread")
                self._send()

    def resend(self) -> None:
        """Send SIGTERM again, for a handler that took the first SIGTERM as the begin of the drain.

        Call this in that handler.  SIGTERM is repeated only once: the drain begins only once.
        A call during a spread ends the spread.
        """
        self._hurries = True
        if self._sent == 1:
            self._send()

    def _send(self) -> None:
        self._sent += 1  # before the signal, whose handler may run at once
        os.kill(self._pid, signal.SIGTERM)

    def wait(self, timeout_s: Optional[float]) -> None:
        """Wait up to timeout_s for the end of the process; return if the process still runs.

        If the server does not handle SIGTERM, raises SystemExit(0) once the last connection of
        this process is closed.
        """
        while True:
            if self._waits:
                if not self._left():
                    self._exit()
                # Another intake may have taken a connection since ring().
                self._intake.waits.hush()
                self._intake.await_last(self._left)
            self._intake.waits.wait(timeout_s)
            if timeout_s is not None:
                return

    def _all(self) -> Set[Intake]:
        return {self._intake, *self._intake.drain.intakes()}

    def _left(self) -> int:
        return sum(len(each.open) for each in self._all())

    def _term_when_read(self) -> None:
        spread = current().spread
        if spread is not None:
            spread.wait(lambda: not self._hurries and self._left() > 0)
        deadline = time.monotonic() + _FIRST_REQUEST_S
        polls = 0
        while polls < _POLLS and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            is_beginning = any(each.open.any_beginning() for each in self._all())
            polls = 0 if is_beginning else polls + 1
        self._send()

    def _exit(self) -> None:
        self._waits = False
        self._intake.waits.hush()
        # No event announces connections that ssl has closed; uncounted, they would look lost.
        self._intake.board.count_open()
        current().drain.finish()
        is_first = self._intake.drain.end_begun.acquire(False)
        if is_first and threading.current_thread() is not threading.main_thread():
            timer = threading.Timer(_MAIN_THREAD_GRACE_S, _interrupt_main)
            timer.daemon = True
            try:
                timer.start()
            except RuntimeError:  # the system refuses a thread
                _interrupt_main()
        raise SystemExit(0)


def _interrupt_main() -> None:
    _log.warning(
        "the server has ended but the main thread still runs; interrupting it as Ctrl-C would "
        "(use on_drain to end it)"
    )
    os.kill(os.getpid(), signal.SIGINT)
