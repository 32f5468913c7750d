"""SIGTERM as a way to begin the drain, while a call of this library serves.

Rule: the handler only notes the fact and never raises, so it may strike
anywhere, even between a connection's arrival and its owner.  The signal also
becomes a byte in a pipe (signal.set_wakeup_fd), so that a thread that is just
going to wait does not miss it.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Callable, Optional

from . import forking

if TYPE_CHECKING:
    from .intake import Intake


class TermWatch:
    """Begins the drain at SIGTERM from `start` to `stop`, where nobody else handles it.

    It does nothing outside the main thread or where the program has a handler.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin = begin
        self._pipe: Optional[tuple[int, int]] = None
        self._previous_wakeup_fd = -1

    def start(self) -> int:
        """Install the handler; return a descriptor to wait on, -1 if there is none."""
        if threading.current_thread() is not threading.main_thread():
            return -1
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return -1
        read_fd, write_fd = self._pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._previous_wakeup_fd = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_term)
        forking.register(self)
        return read_fd

    def read(self) -> None:
        """Empty the pipe; begin the drain if SIGTERM was among the signals."""
        # Not left to the handler alone: that runs in the main thread, which
        # may be waiting for the very thread that is reading here.
        if self._pipe is not None and signal.SIGTERM in os.read(self._pipe[0], 4096):
            self._begin()

    def stop(self) -> None:
        """Put everything back as it was."""
        if self._pipe is None:
            return
        # A generator may be collected in another thread; then the handler
        # stays, which does no harm, and so must its pipe.
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) == self._on_term:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._restore_wakeup_fd(self._pipe[1], self._previous_wakeup_fd)
        self._close_pipe()

    def after_fork_in_child(self) -> None:
        if self._pipe is not None:
            if signal.getsignal(signal.SIGTERM) == self._on_term:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._restore_wakeup_fd(self._pipe[1], -1)
            self._close_pipe()

    def _on_term(self, signum: int, frame: Optional[FrameType]) -> None:
        self._begin()

    @staticmethod
    def is_own(handler: object) -> bool:
        """Whether a signal's handler is one of these, and not the program's."""
        return isinstance(getattr(handler, "__self__", None), TermWatch)

    @staticmethod
    def _restore_wakeup_fd(ours: int, previous: int) -> None:
        current = signal.set_wakeup_fd(previous)
        if current != ours:  # somebody else's by now
            signal.set_wakeup_fd(current)

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            for fd in self._pipe:
                os.close(fd)
            self._pipe = None


def watch_term(intake: Intake) -> TermWatch:
    watch = TermWatch(intake.ask_to_stop)
    fd = watch.start()
    if fd >= 0:
        intake.obey(fd, watch.read)
    return watch
