"""Whether this worker is draining, and who wants to be told.

Draining begins once and never ends.  It begins when the protector ends the
channel or this worker's RETURN line, or at SIGTERM.  The first two are seen
by whoever takes connections; `begun` looks for itself, so that a handler that
keeps every thread busy learns it too.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from typing import Callable, Optional, Sequence

from . import forking, system

_log = logging.getLogger(__name__)


class Drain:
    """The fact that no more connections will come, for one process."""

    def __init__(self, fds: Sequence[int]) -> None:
        """Watch fds, which stay the caller's: the end of one of them begins the drain."""
        self._fds = tuple(fds)
        self._begun = False
        self._told = False
        self._callbacks: list[Callable[[], object]] = []
        self._lock = threading.Lock()
        self._teller: Optional[threading.Thread] = None
        # Never closed: a signal handler writes to it at any time, and must not
        # hit a number that was given to another file.
        self._wake_fd = -1
        self._woken_fd = -1
        forking.register(self)

    def follow(self, fd: int) -> None:
        """Watch fd, too, which its owner never closes before the process ends or drains."""
        if fd not in self._fds:
            self._fds = (*self._fds, fd)

    def begin(self) -> None:
        """Begin to drain.  May be called from a signal handler: no lock, never raises."""
        self._begun = True
        if self._wake_fd >= 0:
            try:
                os.write(self._wake_fd, b"\0")
            except OSError:
                pass  # the pipe is full, so its reader is awake already

    def begun(self) -> bool:
        """Return whether no more connections will come.  One poll() until then."""
        # POLLRDHUP is there while connections are still queued, and asking
        # for it takes none.
        if not self._begun and self._fds and _hung_up(self._fds, timeout_ms=0):
            self.begin()
        return self._begun

    def on_begin(self, callback: Callable[[], object]) -> None:
        """Call callback once when the drain begins, in a thread of this library's own.

        At once, in the calling thread, if all others have been told already.
        """
        with self._lock:
            if not self._told:
                self._callbacks.append(callback)
                if self._teller is None:
                    self._start_teller()
                return
        callback()

    def finish(self) -> None:
        """Wait until the callbacks have returned, if the drain has begun."""
        teller = self._teller
        if self._begun and teller is not None and teller is not threading.current_thread():
            teller.join()

    def after_fork_in_child(self) -> None:
        parents = self._wake_fd, self._woken_fd
        self._wake_fd, self._woken_fd, self._teller, self._callbacks = -1, -1, None, []
        self._lock = threading.Lock()
        for fd in parents:
            if fd >= 0:
                os.close(fd)

    def _start_teller(self) -> None:
        # A thread, because neither a signal handler nor a loop that may be
        # busy for long is a place to call a stranger's code from.
        self._woken_fd, self._wake_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._teller = threading.Thread(
            target=self._tell, name="socketprotector-drain", daemon=True
        )
        self._teller.start()

    def _tell(self) -> None:
        if not self._begun:
            _hung_up(self._fds, timeout_ms=None, wake_fd=self._woken_fd)
        self._begun = True
        with self._lock:
            self._told = True
            callbacks = self._callbacks
        for callback in callbacks:
            try:
                callback()
            except Exception:
                _log.exception("callback %r for the drain failed", callback)


def _hung_up(fds: Sequence[int], *, timeout_ms: Optional[int], wake_fd: int = -1) -> bool:
    # A poll object of its own for each call: two threads cannot share one.
    # One that waits is gevent's where gevent has patched, and wakes up by wake_fd only.
    poll = system.poll() if timeout_ms == 0 else select.poll()
    for fd in fds:
        poll.register(fd, select.POLLRDHUP)
    if wake_fd >= 0:
        poll.register(wake_fd, select.POLLIN)
    return bool(poll.poll(timeout_ms))
