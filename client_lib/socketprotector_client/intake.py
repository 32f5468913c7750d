"""Takes connections one at a time, counts them, and knows when to stop.

All ways to get connections (iterator, threads, asyncio, drop-in listener) take from here.  At
the limit, and after the end, the channel is simply not waited for: nothing
spins, and no flag of the shared channel is ever touched.

Rule: never takes a connection without a descriptor to spare.
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time

from . import forking, system
from .connection import Connection, OpenConnections
from .descriptors import Spare, default_limit, has_room
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

_log = Logger(__name__)

# How soon to look again when no event will say that it is worth it.
_RETRY_S = 0.05

# A look at how many descriptors are free serves so many connections in a row, where other
# threads have that many to open meanwhile.
_ROW, _OTHERS = 32, 256

# accept() fails with these while the system is short of something; the
# connection waits.
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Intake:
    """The connections of one call or listener.  Several threads may call `get`."""

    def __init__(
        self,
        source: Source,
        drain: Drain,
        limit: Optional[int],
        names: dict[int, str],
        board: Scoreboard,
    ) -> None:
        """Take ownership of source.  At most limit connections are open at once.

        names: gets the listener of each connection, by descriptor.
        board: counts them.
        """
        self.open = OpenConnections(self._changed)
        self.board = board
        board.follow(self.open)
        self.source = source
        #: Called in a forked child after the descriptor stands for another epoll.
        self.on_renewal: Optional[Callable[[], None]] = None
        self._drain = drain
        self._limit = default_limit() if limit is None else limit
        self._names = names
        self._beside = -1  # an event loop's descriptor, which `sleep` waits for, too
        self._orders: dict[int, Callable[[], None]] = {}
        self._ends: list[int] = []
        self.waits = WaitSet()
        self.queue = QueueWait(source, self.waits)
        self._fds = self.queue.fds
        # What is readable nearly always; with several, what never is.
        self._channel_alone = [*self._fds] if len(self._fds) == 1 else [-1]
        self._stop_asked = False
        self._ended = False
        # Several threads call `get`; that all are busy does not mean that one hangs.
        self._pooled = False
        # Those of them that wait for the kernel to choose one.
        self._idle: set[int] = set()
        self._awaits_last = False
        self._will_look_again = False
        # What get_further takes from; -1: all must be looked at first.
        self._row_fd = -1
        # So many more find a free descriptor; -1: not known.
        self._room = -1
        self._spare = Spare(self.waits.fileno())
        self._spare.hold()
        self._turn = threading.Lock()
        self._pid = os.getpid()
        forking.register(self)

    def fileno(self) -> int:
        """Return the descriptor that is readable when `get` has something to do."""
        return self.waits.fileno()

    def obey(self, fd: int, act: Callable[[], None]) -> None:
        """Call act from `get` when fd is readable.  fd stays the caller's.

        Not in a forked child: there fd is the parent's to read.
        """
        self._orders[fd] = act
        self.waits.add([fd])

    def obey_end(self, fd: int) -> None:
        """Begin the drain at the end of fd, from which nothing is read.  fd stays the caller's.

        So forked children may do it as well.
        """
        self._ends.append(fd)
        self._orders[fd] = self.drained
        self.waits.add([fd], select.EPOLLRDHUP)

    def get(self, timeout_s: Optional[float] = None) -> Optional[Connection]:
        """Wait for the next connection and return it, None if none came within timeout_s.

        The caller owns it.  Raises Drained once nothing more will come, and
        ProtocolError for a message of another version.
        """
        if self._pooled and self.source.wakes_one:
            return self._get_chosen()
        # One thread waits, the others wait for the lock: a connection wakes
        # one of them, not all.
        if not self._turn.acquire(timeout=-1 if timeout_s is None else timeout_s):
            return None
        try:
            self._room = -1
            if self.queue.elsewhere:
                self.queue.leave_loop()
            if self.queue.stands_first:
                self.queue.stand_last()
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
        """Several threads will call `get`, without a timeout."""
        self._pooled = True
        if self.source.wakes_one:
            self.queue.share()
            # A thread that ends must be able to wake the others, without a descriptor to spare.
            self.waits.ring()
            self.waits.hush()

    def get_now(self) -> Optional[Connection]:
        """As `get`, without waiting.  A row begins that get_further may continue."""
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

    def get_further(self) -> Optional[Connection]:
        """The same right after get_now, with no look at anything but connections."""
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
        """Return whether `get` would have something to do."""
        if self.waits.wait(0):
            return True
        if not (self.queue.elsewhere and self.queue.waited):
            return False
        poll = system.poll()
        poll.register(self._fds[0], select.POLLIN)
        return bool(poll.poll(0))

    def sleep_beside(self, fd: int) -> None:
        """Have `sleep` wait for another descriptor, too, which stays the caller's."""
        self.waits.remove([self._beside])
        self._beside = fd
        self.waits.add([fd])

    def sleep(self, timeout_s: Optional[float]) -> Tuple[bool, bool]:
        """Wait where one of the idle workers is woken for a connection, not all.

        Return whether `get` has something to do, and whether the other descriptor is readable.
        """
        if self.queue.elsewhere:
            self.queue.leave_loop()
        if self.queue.stands_first:
            self.queue.stand_last()
        ready = self.waits.wait(timeout_s)
        others = self._beside in ready
        return len(ready) > others, others

    def ask_to_stop(self) -> None:
        """Begin the drain; take no more once `get` is awake.  Fit for a signal handler."""
        self._stop_asked = True
        self._row_fd = -1
        self._drain.begin()

    def drained(self) -> None:
        """Begin the drain and take no more: the protector said so."""
        self._drain.begin()
        self.end()

    def interrupt(self) -> None:
        """Take no more, and let every thread that waits in `get` know."""
        self.end()
        self.waits.ring()

    @property
    def may_be_silent(self) -> bool:
        """Whether all is well though `get` is not called: no more is taken, or a pool is busy."""
        return self._ended or (self._pooled and not self._idle and not self._turn.locked())

    def end(self) -> None:
        """Take no more.  What is queued stays for others; what was handed out stays open."""
        if self._ended:
            return
        self._ended = True
        self._row_fd = -1
        self.queue.waited = False
        self.queue.leave_loop()
        # Before closing: other processes have these files open, too, so closing alone would leave
        # them in the epoll, under numbers that are gone (epoll(7), "Questions and answers").
        self.waits.remove((*self._fds, *self._orders))
        self.source.close()
        self._spare.give_up()

    def await_last(self) -> None:
        """After the end: become readable when no handed-out connection is open."""
        self._awaits_last = True
        self._look_again()

    def close(self) -> None:
        """Take no more and close the descriptor."""
        self.end()
        self.waits.close()

    def after_fork_in_child(self) -> None:
        self._turn = threading.Lock()
        self._idle = set()
        self._pid = os.getpid()
        self._beside = -1
        self._will_look_again = False
        self._orders = dict.fromkeys(self._ends, self.drained)
        # It is a copy of the parent's epoll, and leaves a descriptor for another one.
        self._spare.give_up()
        self.queue.after_fork_in_child([] if self._ended else self._ends)
        if not self._ended:
            self._spare.hold()
        if self.on_renewal is not None:
            self.on_renewal()

    def _get_chosen(self) -> Connection:
        """As `get`, where all threads wait and the kernel wakes one of them.

        Where they wait for a lock instead, a second one would wake for each connection.
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
                    # Another thread may have carried out the order meanwhile.
                    ready = [fd for fd in ready if fd in self._fds] + self.waits.wait(0)
                self._room = -1
                connection = self._look(ready)
                if any(fd in self._fds for fd in ready):
                    self.queue.stand_last()  # or no thread would be woken for what else is there
            if connection is not None:
                return connection
        self.waits.ring()  # for the others
        raise Drained

    def _look(self, ready: list[int]) -> Optional[Connection]:
        if self.queue.elsewhere and self.queue.waited:
            ready += self._fds  # the loop has seen them, or may have
        if ready == self._channel_alone and not self._stop_asked:
            return self._take(ready[0])
        # Orders before connections: under load there is always a connection.
        for fd in ready:
            if fd in self._orders:
                self._orders[fd]()
        if self._stop_asked:
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
        if self.open.reached(self._limit):
            self._pause(short=False)
            return None
        room = self._room
        if room > 0:
            self._room = room - 1
        else:
            if not self._spare.hold():
                self._pause(short=True)
                return None
            self._spare.give_up()
        try:
            connection = self.source.take(fd)
        except Drained:
            self.drained()
            return None
        except OSError as error:
            if error.errno not in _OUT_OF_RESOURCES:
                raise
            _log.error("%s; trying again in %s s", error, _RETRY_S)
            self._pause(short=True)
            return None
        finally:
            # Before the next one: a worker that is woken and cannot take leaves the others asleep.
            if room <= 0 and not self._ended and not self._spare.hold():
                self._pause(short=True)
        if connection is not None:
            self.queue.stands_first = True
            number = connection.fileno()
            self._names[number] = connection.listener
            self.open.add(connection)
            self.board.took(number, connection.accepted_at_ns)
            if self.open.known() >= self._limit and self.open.reached(self._limit):
                self._pause(short=False)
        return connection

    def _pause(self, *, short: bool) -> None:
        """Leave further connections in the queue.

        Until one of ours is closed; if the system is short of something, until it may have it.
        """
        self._row_fd = -1
        self.queue.pause()
        if not short and len(self.open) < self._limit:
            self._resume()  # one was closed in between, and has seen no pause
        elif short or self.open.must_be_asked:
            self._look_again_later()

    def _resume(self) -> None:
        # Without a lock, in any thread: too early is harmless, for _take looks
        # at the count again.
        if not self.queue.waited and not self._ended and os.getpid() == self._pid:
            self.queue.resume()
            if self._ended:  # in the meantime, by another thread
                self.queue.pause()

    def _changed(self) -> None:
        self.board.count_open()
        if not self.queue.waited or self._awaits_last:
            self._look_again()

    def _look_again(self) -> None:
        """See what follows from the number of open connections, in any thread."""
        if not self.queue.waited:
            self._resume()
        if self._awaits_last and os.getpid() == self._pid:
            if not len(self.open):
                self._awaits_last = False
                self.waits.ring()
            elif self.open.must_be_asked:
                self._look_again_later()

    def _look_again_later(self) -> None:
        if not self._will_look_again:
            self._will_look_again = True
            timer = threading.Timer(_RETRY_S, self._on_timer)
            timer.daemon = True
            timer.start()

    def _on_timer(self) -> None:
        self._will_look_again = False
        self._look_again()
