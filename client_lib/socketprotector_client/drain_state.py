"""Whether this worker is draining, and what is called when it begins.

Draining begins once and never ends.  It begins when the protector ends the
channel or this worker's RETURN line, or at SIGTERM.  The first two are seen
where connections are taken; `begun` looks for itself, so that a handler that
keeps every thread busy learns it too.
"""

from __future__ import annotations

import os
import select
import threading

from . import forking, system
from .log import Logger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Optional, Sequence

_log = Logger(__name__)


class Drain:
    """The fact that no more connections will come, for one process."""

    def __init__(self, fds: Sequence[int]) -> None:
        """Watch fds, which stay the caller's: the end of one of them begins the drain."""
        self._fds = tuple(fds)
        self._begun = False
        self._callbacks_called = False
        self._callbacks: list[Callable[[], object]] = []
        self._lock = threading.Lock()
        self._thread: Optional[threading.Thread] = None
        # Wakes the thread.  Never closed: a signal handler writes to it at any time, and must
        # not hit a number that was given to another file.
        self._pipe: Optional[tuple[int, int]] = None
        forking.register(self)

    def follow(self, fd: int) -> None:
        """Watch fd, too, which its owner never closes before the process ends or drains."""
        if fd not in self._fds:
            self._fds = (*self._fds, fd)

    def begin(self) -> None:
        """Begin to drain.  May be called from a signal handler: no lock, never raises."""
        self._begun = True
        if self._pipe is not None:
            try:
                os.write(self._pipe[1], b"\0")
            except OSError:
                pass  # the pipe is full, so its reader is awake already

    def begun(self) -> bool:
        """Return whether no more connections will come.  One poll() until then."""
        # POLLRDHUP is there while connections are still queued, and asking
        # for it takes none.
        if not self._begun and self._fds and _hung_up(self._fds):
            self.begin()
        return self._begun

    def on_begin(self, callback: Callable[[], object]) -> None:
        """Call callback once when the drain begins, in a thread of this library's own.

        At once, in the calling thread, if all others have been called already.
        """
        with self._lock:
            if not self._callbacks_called:
                self._callbacks.append(callback)
                if self._thread is None:
                    # Neither a signal handler nor a loop that may be busy for long may call
                    # code that we do not know.
                    self._pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
                    self._thread = threading.Thread(
                        target=self._call_back, name="socketprotector-drain", daemon=True
                    )
                    self._thread.start()
                return
        callback()

    def finish(self) -> None:
        """Wait until the callbacks have returned, if the drain has begun."""
        thread = self._thread
        if self._begun and thread is not None and thread is not threading.current_thread():
            thread.join()

    def after_fork_in_child(self) -> None:
        parents = self._pipe or ()
        self._pipe, self._thread, self._callbacks = None, None, []
        self._lock = threading.Lock()
        for fd in parents:
            os.close(fd)

    def _call_back(self) -> None:
        if not self._begun and self._pipe is not None:
            _hung_up(self._fds, or_readable=self._pipe[0])
        self._begun = True
        with self._lock:
            self._callbacks_called = True
            callbacks = self._callbacks
        for callback in callbacks:
            try:
                callback()
            except Exception:
                _log.exception("callback %r for the drain failed", callback)


def _hung_up(fds: Sequence[int], *, or_readable: Optional[int] = None) -> bool:
    """Return whether one of fds has ended; with another one, wait until it has or that can be read.

    A poll object of its own for each call: two threads cannot share one.
    """
    # One that waits is gevent's where gevent has patched, and wakes up by the other one only.
    poll = system.poll() if or_readable is None else select.poll()
    for fd in fds:
        poll.register(fd, select.POLLRDHUP)
    if or_readable is not None:
        poll.register(or_readable, select.POLLIN)
    return bool(poll.poll(0 if or_readable is None else None))
