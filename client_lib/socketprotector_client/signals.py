"""SIGTERM begins the drain, while a call of this library serves.

Rule: the handler only records the signal and never raises.  So it may run at any moment, even
while a taken connection has no owner yet.  Python also writes a byte to a pipe for the signal
(signal.set_wakeup_fd), so a thread that is about to wait does not miss it.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from types import FrameType

from . import fork_hook, system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterable, Optional

    from .intake import Intake


def term_is_free() -> bool:
    """Return whether the library may handle SIGTERM: in the main thread, without a handler."""
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


class TermWatch:
    """Begins the drain at SIGTERM until `stop`, if the library may handle that signal."""

    def __init__(self, intake: Intake) -> None:
        self._begin = intake.request_drain
        self._pipe: Optional[tuple[int, int]] = None
        self._previous_wakeup_fd = -1
        if term_is_free():
            read_fd, write_fd = self._pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            found = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
            if found >= 0 and system.running_asyncio() is not None:
                # This descriptor is asyncio's; without it asyncio would call none of the program's
                # handlers.  The descriptor wakes the loop, and then our handler runs.
                signal.set_wakeup_fd(found)
            else:
                self._previous_wakeup_fd = found
            signal.signal(signal.SIGTERM, self._on_term)
            fork_hook.register(self)
            intake.on_readable(read_fd, self._read)

    def stop(self) -> None:
        """Restore SIGTERM's default and the previous wakeup descriptor."""
        # A generator may be collected in another thread.  Then the handler
        # stays, harmlessly, and its pipe must stay, too.
        if threading.current_thread() is threading.main_thread():
            self._undo(self._previous_wakeup_fd)

    def after_fork_in_child(self) -> None:
        self._undo(-1)

    def _read(self) -> None:
        # The handler alone is not enough: it runs in the main thread, which
        # may wait for the thread that reads here.
        if self._pipe is not None and signal.SIGTERM in os.read(self._pipe[0], 4096):
            self._begin()

    def _on_term(self, signum: int, frame: Optional[FrameType]) -> None:
        self._begin()

    def _undo(self, wakeup_fd: int) -> None:
        if self._pipe is None:
            return
        if signal.getsignal(signal.SIGTERM) == self._on_term:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        found = signal.set_wakeup_fd(-1)
        # If the descriptor found is not ours, it is the program's or asyncio's: put it back.  The
        # previous one may be closed by now.
        signal.set_wakeup_fd(wakeup_fd if found == self._pipe[1] else found)
        for fd in self._pipe:
            os.close(fd)
        self._pipe = None


class SignalWait:
    """Waits for signals, whichever thread of the process gets them.

    Not sigtimedwait(2): a thread of a library such as numpy does not block the signals.  While our
    thread does not wait, such a thread would get them; they would be lost, or end the process.
    """

    def __init__(self, wanted: Iterable[signal.Signals]) -> None:
        """Wait for these signals from now on.  Only for the main thread."""
        self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wakeup_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._before = {each: signal.signal(each, _note) for each in wanted}
        self._poll = system.poll()
        self._poll.register(self._read_fd, select.POLLIN)

    def wait(self, until: Optional[float]) -> bytes:
        """Wait for a signal until a time (None: for ever); return the signals that have come."""
        timeout_ms = None if until is None else max(0.0, until - time.monotonic()) * 1000
        self._poll.poll(timeout_ms)
        try:
            return os.read(self._read_fd, 4096)
        except BlockingIOError:
            return b""

    def fork(self) -> int:
        """Fork; the child gets the handlers as they were before."""
        # Block the signals: otherwise the child could write its own signals into the parent's pipe.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._before)
        pid = -1
        try:
            pid = os.fork()
            if not pid:
                self.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return pid

    def close(self) -> None:
        """Restore the handlers."""
        for each, handler in self._before.items():
            if handler is not None:  # otherwise it was not Python's
                signal.signal(each, handler)
        signal.set_wakeup_fd(self._wakeup_fd)
        os.close(self._read_fd)
        os.close(self._write_fd)


def _note(signum: int, frame: Optional[FrameType]) -> None:
    """Do nothing: Python has written the signal to the pipe."""
