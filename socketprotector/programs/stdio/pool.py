"""Takes connections while there are free slots, starts a program for each, sees programs end.

One loop.  What is fixed: no connection is taken without a slot for its program and a descriptor
to spare, and one that was taken has its program, however long that takes; our copy of it
is closed as soon as the program runs, so that the client sees the program's end (of the first
programs as soon as one of them works: first_programs.py).

A connection is pending from when it was taken until its program was started.  There is one at
most, and while there is one nothing is taken.
"""

from __future__ import annotations

import _signal as signal
import _socket as socket
import errno
import os
import select
import time

from ...system import signals
from ..worker_protocol import Notifier, receive
from .environment import Environments
from .first_programs import FirstPrograms
from .programs import Programs
from .report import Board, say
from .spawn import Starter

#: How long to wait before a program is tried again: this, then twice as long each time.
FIRST_WAIT_S = 0.01
LAST_WAIT_S = 1.0
#: How often to look at programs whose end nothing tells, and for a descriptor to spare.
_LOOK_S = 0.05
#: STATUS= is said no oftener.
_STATUS_S = 1.0
_EVENTS = select.EPOLLIN
#: One pool is woken for a connection, not all: a tenth of what a program costs is saved.  It is
#: always the same one that wakes at a low rate, which is as good as any.  One that is killed after
#: its wake-up leaves the client waiting; the protector looks after what stays in the queue.
_ONE_OF_US = select.EPOLLIN | select.EPOLLEXCLUSIVE
#: What passes, so that we do not end for it (ENOSPC: fs.epoll.max_user_watches).
_NO_MEMORY = (errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Pool:
    """Runs until there is nothing to take and no program any more."""

    def __init__(
        self,
        channel: int,
        line: int,
        slots: int,
        *,
        starter: Starter,
        environments: Environments,
        notifier: Notifier,
        board: Board,
    ) -> None:
        """Take ownership of channel and line (-1: none)."""
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, channel)
        self._line = line
        self._slots = slots
        self._starter = starter
        self._environments = environments
        self._notifier = notifier
        self._board = board
        self._taking = True
        self._listening = False  # the channel is in the epoll set
        self._pending: tuple[int, dict[bytes, bytes]] | None = None
        self._wait_s = FIRST_WAIT_S
        self._trouble = 0  # the errno that was said to be in the way of starting programs
        self._scarce = False  # that there is no descriptor was said
        #: What is to be called, and when.
        self._timers: dict[Callable[[], None], float] = {}
        if notifier.watchdog_s:
            self._call_after(0.0, self._feed_watchdog)
        self._epoll = select.epoll()
        self._first = FirstPrograms()
        self._programs = Programs(self._epoll, board, self._first.ended)
        self._wake = signals.catch((signal.SIGTERM,))
        for fd in (self._wake, line):
            if fd >= 0:
                self._epoll.register(fd, _EVENTS)
        self._spare = os.dup(2)

    def run(self) -> None:
        """Serve until drained, retired or terminated, and all programs have ended."""
        epoll, programs = self._epoll, self._programs
        self._take()
        while self._taking or len(programs) or self._pending:
            come = self._taking and not self._listening
            leave = False
            for fd, _ in epoll.poll(self._timeout_s()):
                if fd in programs:
                    come |= self._ended(fd)
                elif fd == self._line:
                    leave = self._line_ended()
                elif fd == self._wake:
                    self._signalled()
                else:
                    come = True
            come |= self._call_due()
            if come:
                self._take()
            # Not before: the others may sleep through a connection that we were woken for.
            if leave:
                self._stop_taking()

    # -- connections ---------------------------------------------------------

    def _take(self) -> None:
        """Take and start, until there is no free slot or no connection."""
        if not self._taking:
            return
        full = False
        while self._taking and not self._pending:
            full = len(self._programs) >= self._slots or not self._may_take()
            if full:
                break
            os.close(self._spare)
            self._spare = -1
            try:
                taken = receive(self._channel, say)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno not in _NO_MEMORY:
                    raise
                full = True
                self._look_soon()
                break
            if taken is None:
                self._stop_taking()
            elif taken[0] >= 0:
                self._came(*taken)
        # A pool that listens must be able to take: with EPOLLEXCLUSIVE no other one is woken.
        full = not self._may_take() or full
        self._listen(self._taking and not self._pending and not full)

    def _came(self, fd: int, listener: int, accepted_at_ns: int) -> None:
        self._board.took(accepted_at_ns)
        environment = self._environments.of(fd, listener)
        if environment is None:
            os.close(fd)  # the client is gone, which is no mistake
            return
        self._pending = fd, environment
        self._start()

    def _start(self) -> None:
        """Start a program for the pending connection, or see to it that it is tried again."""
        if self._pending is None:
            return  # a signal came first
        fd, environment = self._pending
        try:
            pid = self._starter.start(fd, environment)
        except OSError as error:
            self._not_started(error)
            return
        if self._first.watches:
            self._first.started(pid, fd)
        else:
            os.close(fd)
        self._pending = None
        self._programs.add(pid)
        if self._programs.unseen or self._first.holds:
            self._look_soon()
        if self._trouble:
            say(f"starts {self._starter.path} again")
            self._trouble, self._wait_s = 0, FIRST_WAIT_S
        self._call_after(_STATUS_S, self._say_status)

    def _not_started(self, error: OSError) -> None:
        if error.errno != self._trouble:
            self._trouble = error.errno or errno.EIO
            reason = os.strerror(self._trouble)
            if self._trouble == errno.EAGAIN:
                reason = "no more processes (the user's RLIMIT_NPROC, or the service's TasksMax)"
            say(
                f"cannot start {self._starter.path}: {reason}; the connection waits, "
                "it is tried again until it can be"
            )
        self._call_after(self._wait_s, self._start)
        self._wait_s = min(2 * self._wait_s, LAST_WAIT_S)

    def _may_take(self) -> bool:
        """Have a descriptor to spare, for the connection and then for its program's end."""
        if self._spare < 0:
            try:
                self._spare = os.dup(2)
            except OSError:
                if not self._scarce:
                    self._scarce = True
                    say(
                        f"no descriptor left at {len(self._programs)} programs of {self._slots}: "
                        "connections wait; raise --limit nofile=N, or lower --workers"
                    )
                self._look_soon()
                return False
        return True

    def _listen(self, wanted: bool) -> None:
        """Wait for connections, or do not: what may not be taken would keep us awake."""
        if wanted and not self._listening:
            try:
                self._epoll.register(self._channel.fileno(), _ONE_OF_US)
            except OSError as error:
                if error.errno not in _NO_MEMORY:
                    raise
                self._look_soon()
                wanted = False
        elif self._listening and not wanted:
            self._epoll.unregister(self._channel.fileno())
        self._listening = wanted

    # -- what else there is --------------------------------------------------

    def _ended(self, pidfd: int) -> bool:
        """Handle the end of a program; return whether there is a free slot now."""
        if not self._programs.ended(pidfd):
            return False
        if self._trouble == errno.EAGAIN:
            self._timers[self._start] = 0.0
        self._call_after(_STATUS_S, self._say_status)
        self._say_of_first()
        return True

    def _call_after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call something then, unless it is to be called sooner."""
        self._timers.setdefault(call, time.monotonic() + seconds)

    def _timeout_s(self) -> float | None:
        if not self._timers:
            return None
        return max(0.0, min(self._timers.values()) - time.monotonic())

    def _call_due(self) -> bool:
        """Call what is due; say whether there may be a connection to take."""
        now = time.monotonic()
        due = [call for call, at in self._timers.items() if now >= at]
        for call in due:
            del self._timers[call]
            call()
        return bool(due) and not self._listening

    def _feed_watchdog(self) -> None:
        self._notifier.tell("WATCHDOG=1")  # lost for once at most: half the time is left
        self._call_after(self._notifier.watchdog_s, self._feed_watchdog)

    def _say_status(self) -> None:
        count = len(self._programs)
        if self._notifier.tell(f"STATUS={count} of {self._slots} programs run"):
            self._call_after(_STATUS_S, self._say_status)

    def _say_of_first(self) -> None:
        unsaid = self._first.unsaid
        while unsaid:
            if self._notifier.tell(unsaid[0]):
                self._call_after(_LOOK_S, self._say_of_first)
                return
            del unsaid[0]

    def _look(self) -> None:
        self._programs.look()
        self._first.look()
        self._say_of_first()
        if self._programs.unseen or self._first.holds:
            self._look_soon()

    def _look_soon(self) -> None:
        self._call_after(_LOOK_S, self._look)

    def _line_ended(self) -> bool:
        """End of file on the RETURN line: retire.  Nothing is said on it yet."""
        try:
            data = os.read(self._line, 4096)
        except OSError:
            data = b""
        if not data:
            self._epoll.unregister(self._line)
        return not data

    def _signalled(self) -> None:
        """TERM: there is no more time, for the programs either."""
        os.read(self._wake, 4096)
        self._stop_taking()
        if self._pending:
            say("a connection was closed: no program could be started for it until the end")
            os.close(self._pending[0])
            self._pending = None
        # Not to the programs alone: what they have started is of this group, too, as KILL is.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGTERM)
        else:
            self._programs.signal(signal.SIGTERM)

    def _stop_taking(self) -> None:
        self._taking = False
        self._listen(False)
