"""The drain of this worker: whether it has begun, and the callbacks for that moment.

A drain begins once and never ends.  It begins when the protector closes the channel or this
worker's RETURN line, or at SIGTERM.  The intake notices the closed channel or line when it takes
connections.  `begun` polls for it, too, because handlers may keep every thread busy.
"""

from __future__ import annotations

import os
import select
import threading
import weakref

from . import fork_hook, system
from .log import Logger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Optional, Sequence, Tuple

    from .intake import Intake

_log = Logger(__name__)


class Drain:
    """The state of one process's drain: whether more connections will come."""

    def __init__(self, fds: Sequence[int]) -> None:
        """Watch fds, which the caller keeps: end of file on any of them begins the drain."""
        #: End of file on any of these descriptors begins the drain.
        self.fds = tuple(fds)
        self._begun = False
        #: Called at the begin, perhaps in a signal handler.
        self.at_begin: Optional[Callable[[], None]] = None
        #: Held once the end of this process has begun: only one listener may begin it.
        self.end_begun = threading.Lock()
        # A tuple, because signal handlers read it.
        self._intakes: Tuple[weakref.ref[Intake], ...] = ()
        self._callbacks_called = False
        self._callbacks: list[Callable[[], object]] = []
        self._lock = threading.Lock()
        self._thread: Optional[threading.Thread] = None
        # Wakes the thread.  Never closed: a signal handler may write to the pipe at any time, and
        # its descriptor must not belong to another file then.
        self._pipe: Optional[tuple[int, int]] = None
        fork_hook.register(self)

    def follow(self, fd: int) -> None:
        """Also watch fd, which its owner must not close before the process drains or ends."""
        if fd not in self.fds:
            self.fds = (*self.fds, fd)

    def add(self, intake: Intake) -> None:
        """Count the connections of a new intake as open ones of this process."""
        with self._lock:
            found = [each for each in self.intakes() if each.open.takes or each.open.known()]
            found.append(intake)
            if len(found) > 1:  # `request` must wake each, even if no descriptor is free then
                for each in found:
                    each.waits.make_bell()
            self._intakes = tuple(map(weakref.ref, found))
            intake.board.follow([each.open for each in found])

    def intakes(self) -> list[Intake]:
        """Return the intakes of this process that take connections or have open ones.

        In a forked child, leaves out intakes whose connections belong to the parent.
        """
        found = [each() for each in self._intakes]
        return [each for each in found if each is not None]

    def begin(self) -> None:
        """Begin the drain.  Safe in a signal handler: takes no lock, never raises."""
        begun, self._begun = self._begun, True
        if not begun and self.at_begin is not None:
            self.at_begin()
        if self._pipe is not None:
            try:
                os.write(self._pipe[1], b"\0")
            except OSError:
                pass  # the pipe is full, so its reader is awake already

    def request(self, own: Intake) -> None:
        """Begin the drain; all intakes and `own` stop taking.  Safe in a signal handler."""
        self.begin()
        for each in {own, *self.intakes()}:
            try:
                each.stop_soon()
            except OSError:
                pass  # in a forked child without a free descriptor: it stops at its next `get`

    def begun(self) -> bool:
        """Return whether no more connections will come.  Costs one poll() until it is true."""
        # POLLRDHUP is reported while connections are still queued, and poll()
        # takes none of them.
        if not self._begun and self.fds and _hung_up(self.fds):
            self.begin()
        return self._begun

    def on_begin(self, callback: Callable[[], object]) -> None:
        """Call callback once when the drain begins, in the library's own thread.

        If the other callbacks have been called already, call it at once in the caller's thread.
        Raises RuntimeError if the system refuses that thread; the callback is then forgotten.
        """
        with self._lock:
            if not self._callbacks_called:
                if self._thread is None:
                    # A thread, because unknown code must not run in a signal handler, nor wait
                    # for a busy event loop.
                    self._pipe = self._pipe or os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
                    thread = threading.Thread(
                        target=self._call_back, name="socketprotector-drain", daemon=True
                    )
                    thread.start()
                    self._thread = thread
                self._callbacks.append(callback)
                return
        callback()

    def finish(self) -> None:
        """Wait until the callbacks have returned, if the drain has begun."""
        thread = self._thread
        if self._begun and thread is not None and thread is not threading.current_thread():
            thread.join()

    def after_fork_in_child(self) -> None:
        parents = self._pipe or ()
        self.at_begin = None  # meant for the parent only
        self.end_begun = threading.Lock()
        usable = [each for each in self.intakes() if not each.open.known()]
        self._intakes = tuple(map(weakref.ref, usable))
        self._pipe, self._thread, self._callbacks = None, None, []
        self._lock = threading.Lock()
        for fd in parents:
            os.close(fd)

    def _call_back(self) -> None:
        if not self._begun and self._pipe is not None:
            _hung_up(self.fds, or_readable=self._pipe[0])
        self.begin()
        with self._lock:
            self._callbacks_called = True
            callbacks = self._callbacks
        for callback in callbacks:
            try:
                callback()
            except BaseException:  # such as SystemExit, which would end this thread
                _log.exception("callback %r for the drain failed", callback)


def _hung_up(fds: Sequence[int], *, or_readable: Optional[int] = None) -> bool:
    """Return whether one of fds is at end of file.

    With or_readable, first wait for an end of file, or until or_readable is readable.
    Each call has its own poll object, because two threads cannot share a poll object.
    """
    # If gevent has patched select.poll, only or_readable wakes a waiting poll.
    poll = system.poll() if or_readable is None else select.poll()
    for fd in fds:
        poll.register(fd, select.POLLRDHUP)
    if or_readable is not None:
        poll.register(or_readable, select.POLLIN)
    return bool(poll.poll(0 if or_readable is None else None))
