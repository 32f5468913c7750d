"""The intake: takes connections one at a time, counts them, and stops at the limit or the drain.

All ways to get connections (iterator, threads, asyncio, drop-in listener) use an intake.  At
the limit, and after the end, an intake does not watch the channel.  So nothing spins, and no flag
of the shared channel is changed.

Rule: never takes a connection without a free descriptor.
"""

from __future__ import annotations

import os
import select
import threading
import time

from . import fork_hook, system
from .connection import Connection, OpenConnections
from .descriptors import OUT_OF_RESOURCES, Spare, default_limit, has_room
from .drain_state import Drain
from .errors import Drained
from .log import Logger
from .queue_wait import QueueWait
from .scoreboard import Scoreboard
from .source import Source
from .wait_set import WaitSet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Optional, Tuple

    from .spread import Spread
    from .watchdog import Watchdog

_log = Logger(__name__)

_RETRY_S = 0.05  # if no event announces the right moment

# The number of free descriptors is checked once for a row of this many connections, if _OTHERS more
# are free for other threads.
_ROW, _OTHERS = 32, 256


class Intake:
    """The connections of one call of `connections` or `serve`, or of one listener.

    Several threads may call `get`.
    """

    watchdog: Optional[Watchdog] = None  # it pings the loop of this intake

    def __init__(
        self,
        source: Source,
        drain: Drain,
        limit: Optional[int],
        names: dict[int, str],
        board: Scoreboard,
        spread: Optional[Spread] = None,
    ) -> None:
        """Take ownership of source.  At most `limit` connections are open at once.

        names: filled with the listener of each connection, by descriptor.
        board: counts the connections.
        spread: ends the connections evenly when the worker drains.
        """
        opened = OpenConnections if spread is None else spread.open_connections
        self.open = opened(self._changed)
        self.board = board
        self.source = source
        #: Called in a forked child, after this intake's descriptor has become a new epoll.
        self.on_renewal: Optional[Callable[[], None]] = None
        self.drain = drain
        self.limit = default_limit() if limit is None else limit
        self._names = names
        self._beside = -1  # an event loop's descriptor, which `sleep` also waits for
        self._actions: dict[int, Callable[[], None]] = {}
        self._ends: list[int] = []
        self.waits = WaitSet()
        self.queue = QueueWait(source, self.waits, self._cannot_wait)
        self._fds = self.queue.fds
        # The usual result of a wait, with a shortcut in _look; no shortcut with several listeners.
        self._channel_alone = [*self._fds] if len(self._fds) == 1 else [-1]
        self._drain_requested = self._ended = False
        self._pooled = False  # whether several threads call `get`: all may be busy, but not stuck
        self._idle: set[int] = set()  # threads of the pool that wait until the kernel chooses one
        self._left: Optional[Callable[[], int]] = None  # see await_last
        self._will_look_again = False
        self._lacks = False  # whether the last try to wait for the queue failed
        # The descriptor that get_next takes from; -1: look at all descriptors first.
        self._row_fd = -1
        self._room = -1  # how many more descriptors are certainly free; -1: unknown
        self._spare = Spare(self.waits.fileno())
        self._spare.hold()
        self._turn = threading.Lock()
        self._pid = os.getpid()
        fork_hook.register(self)
        drain.add(self)

    def fileno(self) -> int:
        """Return the descriptor that is readable when `get` would not wait."""
        return self.waits.fileno()

    def on_readable(self, fd: int, act: Callable[[], None]) -> None:
        """Make `get` call act when fd is readable.  The caller keeps fd.

        Has no effect in a forked child, because only the parent reads fd.
        """
        self._actions[fd] = act
        self.waits.add([fd])

    def drain_at_end_of(self, fd: int) -> None:
        """Begin the drain when fd is at end of file.  The caller keeps fd.

        Nothing is read from fd, so forked children may watch it, too.
        """
        self._ends.append(fd)
        self._actions[fd] = self.drained
        self.waits.add([fd], select.EPOLLRDHUP)

    def at_end_of(self, fd: int, act: Callable[[], None]) -> None:
        """Call act once when fd is at end of file.  The caller keeps fd."""

        def once() -> None:
            self.waits.remove([fd])
            del self._actions[fd]
            act()

        self._actions[fd] = once
        self.waits.add([fd], select.EPOLLRDHUP)

    def get(self, timeout_s: Optional[float] = None) -> Optional[Connection]:
        """Wait for the next connection and return it; None if none came within timeout_s.

        The caller owns the connection.  Raises Drained once no more will come, and
        ProtocolError for a message of another version.
        """
        if self._pooled and self.source.wakes_one:
            return self._get_chosen()
        # One thread waits for connections, the others for the lock.  So a connection wakes one
        # thread, not all.
        if not self._turn.acquire(timeout=-1 if timeout_s is None else timeout_s):
            return None
        try:
            self._room = -1
            if self.queue.in_loop:
                self.queue.leave_loop()
            if self.queue.has_taken:
                self.queue.move_behind()
            deadline = None if timeout_s is None else time.monotonic() + timeout_s
            while not self._ended:
                connection = self._look(self.waits.wait(timeout_s))
                if connection is not None:
                    return connection
                if deadline is not None and not self._ended:
                    timeout_s = deadline - time.monotonic()
                    if timeout_s <= 0:
                        return None
            raise Drained
        finally:
            self._turn.release()

    def share(self) -> None:
        """Prepare for several threads that call `get` without a timeout."""
        self._pooled = True
        if self.source.wakes_one:
            self.queue.share()
            # Make the bell now: later there may be no free descriptor for it, and a thread that
            # ends must wake the others.
            self.waits.ring()
            self.waits.hush()

    def get_now(self) -> Optional[Connection]:
        """Return a connection as `get` does, without waiting; None if none waits.

        This begins a row of connections, which get_next() may continue.
        """
        if not self._turn.acquire(False):
            return None
        try:
            if self._ended:
                raise Drained
            self._row_fd = self._fds[0] if len(self._fds) == 1 else -1
            self._room = -1
            connection = self._look(self.waits.wait(0))
            if connection is None and self._ended:
                raise Drained
            return connection
        finally:
            self._turn.release()

    def get_next(self) -> Optional[Connection]:
        """Return the row's next connection, right after get_now(); look at no other descriptors."""
        turn = self._turn
        if not turn.acquire(False):
            return None
        try:
            if self._row_fd >= 0:
                if self._room < 0:
                    self._room = _ROW if has_room(_ROW + _OTHERS) else 0
                connection = self._take(self._row_fd)
                if connection is None and self._ended:
                    raise Drained
                return connection
        finally:
            turn.release()
        return self.get_now()

    def has_more(self) -> bool:
        """Return whether `get` would not wait."""
        if self.waits.wait(0):
            return True
        if not (self.queue.in_loop and self.queue.waited):
            return False
        poll = system.poll()
        poll.register(self._fds[0], select.POLLIN)
        return bool(poll.poll(0))

    def sleep_beside(self, fd: int) -> None:
        """Make `sleep` also wait for fd, which the caller keeps."""
        self.waits.remove([self._beside])
        self._beside = fd
        self.waits.add([fd])

    def sleep(self, timeout_s: Optional[float]) -> Tuple[bool, bool]:
        """Wait so that a connection wakes one idle worker, not all.

        Return whether `get` would not wait, and whether the descriptor of sleep_beside is readable.
        """
        if self.queue.in_loop:
            self.queue.leave_loop()
        if self.queue.has_taken:
            self.queue.move_behind()
        ready = self.waits.wait(timeout_s)
        others = self._beside in ready
        return len(ready) > others, others

    def request_drain(self) -> None:
        """Begin the drain; all intakes of this process stop taking.  Safe in a signal handler."""
        self.drain.request(self)

    def stop_soon(self) -> None:
        """Wake `get`, which stops taking.  Safe in a signal handler; may raise OSError."""
        self._drain_requested = True
        self._row_fd = -1
        if not self._ended:
            self.waits.ring()

    def drained(self) -> None:
        """Begin the drain and stop taking, as the protector requests."""
        self.drain.begin()
        self.end()

    def interrupt(self) -> None:
        """Stop taking, and wake every thread that waits in `get`."""
        self.end()
        self.waits.ring_surely()

    @property
    def may_be_silent(self) -> bool:
        """Whether a healthy worker may make no call of `get`: it drains, or a pool is busy."""
        return self._ended or (self._pooled and not self._idle and not self._turn.locked())

    def end(self) -> None:
        """Stop taking: queued connections stay for other workers, handed-out ones stay open."""
        if self._ended:
            return
        self._ended = True
        self._row_fd = -1
        self.open.takes = False
        self.queue.waited = False
        self.queue.leave_loop()
        # Remove them before closing: other processes have these files open, so after close() they
        # would stay in the epoll, under stale numbers (epoll(7), "Questions and answers").
        self.waits.remove((*self._fds, *self._actions))
        self.source.close()
        self._spare.release()

    def await_last(self, left: Optional[Callable[[], int]] = None) -> None:
        """After the end: make `fileno` readable once all handed-out connections are closed.

        left: returns how many are open, if those of other intakes count, too.
        """
        self._left = left or self.open.__len__
        self._look_again()

    def close(self) -> None:
        """Stop taking, and close the descriptor."""
        self.end()
        self.waits.close()

    def after_fork_in_child(self) -> None:
        self._turn, self._idle = threading.Lock(), set()
        self._pid = os.getpid()
        self._beside, self._will_look_again = -1, False
        self._actions = dict.fromkeys(self._ends, self.drained)
        # The child needs its own epoll; releasing the spare frees a descriptor for it.
        self._spare.release()
        self.queue.after_fork_in_child([] if self._ended else self._ends)
        if not self._ended:
            self._spare.hold()
        if self.on_renewal is not None:
            self.on_renewal()

    def _get_chosen(self) -> Connection:
        """Return a connection as `get` does, while all threads wait and the kernel wakes one.

        If the threads waited for a lock instead, each connection would wake a second thread.
        """
        me = threading.get_ident()
        while not self._ended:
            self._idle.add(me)
            try:
                ready = self.waits.wait(None)
            finally:
                self._idle.discard(me)
            with self._turn:
                if self._ended:
                    break
                if ready != self._channel_alone:
                    # Another thread may have carried out the action meanwhile.
                    ready = [fd for fd in ready if fd in self._fds] + self.waits.wait(0)
                self._room = -1
                connection = self._look(ready)
                if any(fd in self._fds for fd in ready):
                    self.queue.move_behind()  # otherwise no thread wakes for the next connection
            if connection is not None:
                return connection
        self.waits.ring_surely()  # for the others
        raise Drained

    def _look(self, ready: list[int]) -> Optional[Connection]:
        if self.queue.in_loop and self.queue.waited:
            ready += self._fds  # the loop watches these, and may have seen a connection
        if ready == self._channel_alone and not self._drain_requested:
            return self._take(ready[0])
        # Actions before connections: under load a connection is always waiting.
        for fd in ready:
            if fd in self._actions:
                self._actions[fd]()
        if self._drain_requested:
            self.end()
            self.waits.hush()
        for fd in ready:
            if self._ended:
                break
            if fd in self._fds:
                connection = self._take(fd)
                if connection is not None:
                    return connection
        return None

    def _take(self, fd: int) -> Optional[Connection]:
        if self.open.reached(self.limit):
            self._pause(short=False)
            return None
        room = self._room
        if room > 0:
            self._room = room - 1
        else:
            if not self._spare.hold():
                self._pause(short=True)
                return None
            self._spare.release()
        try:
            connection = self.source.take(fd)
        except Drained:
            self.drained()
            return None
        except OSError as error:
            if error.errno not in OUT_OF_RESOURCES:
                raise
            _log.error("%s; trying again in %s s", error, _RETRY_S)
            self._pause(short=True)
            return None
        finally:
            # Before the next wake-up: if this worker wakes but cannot take, no other worker wakes.
            if room <= 0 and not self._ended and not self._spare.hold():
                self._pause(short=True)
        if connection is not None:
            self.queue.has_taken = True
            number = connection.fileno()
            self._names[number] = connection.listener
            self.open.add(connection)
            self.board.count_taken(number, connection.accepted_at_ns)
            if self.open.known() >= self.limit and self.open.reached(self.limit):
                self._pause(short=False)
        return connection

    def _pause(self, *, short: bool) -> None:
        """Stop taking until a connection of ours is closed; if short of a resource, retry soon."""
        self._row_fd = -1
        self.queue.pause()
        if not short and len(self.open) < self.limit:
            self._resume()  # a connection was closed just before the pause began
        elif short or self.open.must_be_polled:
            self._look_again_later()

    def _resume(self) -> None:
        # Without a lock, in any thread: resuming too early is harmless, because _take
        # checks the count again.
        if not self.queue.waited and not self._ended and os.getpid() == self._pid:
            self.queue.resume()
            if self._ended:  # meanwhile, in another thread
                self.queue.pause()
            if self.queue.waited:
                self._lacks = False

    def _cannot_wait(self, error: OSError) -> None:
        """Pause: the kernel lacks memory or a watch (epoll_ctl(2): ENOMEM, ENOSPC)."""
        if not self._lacks:  # logged once, not at each try
            _log.error("cannot wait for connections: %s; trying again", error.strerror)
        self._lacks = True
        self._pause(short=True)

    def _changed(self) -> None:
        self.board.count_open()
        if not self.queue.waited or self._left is not None:
            self._look_again()

    def _look_again(self) -> None:
        """Resume or end, depending on the number of open connections.  For any thread."""
        if not self.queue.waited:
            self._resume()
        if self._left is not None and os.getpid() == self._pid:
            left = self._left()
            if not left:
                self._left = None
                self.waits.ring()
            elif self.open.must_be_polled or left > self.open.known():
                self._look_again_later()

    def _look_again_later(self) -> None:
        if not self._will_look_again:
            self._will_look_again = True
            timer = threading.Timer(_RETRY_S, self._on_timer)
            timer.daemon = True
            try:
                timer.start()
            except RuntimeError:  # the system refuses a thread, so this thread waits
                while not (self.queue.waited or self._ended):
                    time.sleep(_RETRY_S)
                    self._resume()
                self._will_look_again = False
                if self._ended:  # the last connections may need this thread
                    raise

    def _on_timer(self) -> None:
        self._will_look_again = False
        self._look_again()
