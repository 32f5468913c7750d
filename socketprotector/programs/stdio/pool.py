"""Takes connections while slots are free, starts a program for each, and reaps the programs.

A connection is taken only if there is a slot for its program and a spare descriptor.  Starting the
program is tried until it succeeds.  Then we close our copy of the connection, so that the client
notices the program's end.  (Copies for the first programs are kept longer: first_programs.py.)

A connection is pending until its program has started.  Only one connection is pending, and
meanwhile no other connection is taken.
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

#: How long to wait before another try to start a program; twice as long each time.
FIRST_WAIT_S = 0.01
LAST_WAIT_S = 1.0
#: How often to check programs without a pidfd, and whether a descriptor is free again.
_LOOK_S = 0.05
#: The shortest interval of STATUS= messages.
_STATUS_S = 1.0
_EVENTS = select.EPOLLIN
#: A connection wakes one pool, not all, which saves a tenth of a program's cost.  At a low rate the
#: kernel always wakes the same pool, which does no harm.  If a pool is killed after its wake-up,
#: the client waits in the queue until the protector sends it again.
_ONE_OF_US = select.EPOLLIN | select.EPOLLEXCLUSIVE
#: Temporary errors, which must not end the pool (ENOSPC: fs.epoll.max_user_watches).
_NO_MEMORY = (errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC)
#: The program's file is missing or unusable.  A pool that drains does not wait for it.
_NO_PROGRAM = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ENOEXEC, errno.ELOOP)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Pool:
    """The programs of one worker, and the connections that it takes for them."""

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
        """Take ownership of the channel, and of the RETURN line (-1: none)."""
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
        self._trouble = 0  # the logged errno that keeps programs from starting; 0: none
        self._scarce = False  # the log says that no descriptor is free
        #: When to call each function.
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
            # After _take(): the wake-up for a connection came to us, and other pools may sleep.
            if leave:
                self._stop_taking()

    # -- connections ---------------------------------------------------------

    def _take(self) -> None:
        """Take connections and start their programs, while there are both slots and connections."""
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
                self._add_pending(*taken)
        # A pool that listens must be able to take: with EPOLLEXCLUSIVE no other pool is woken.
        full = not self._may_take() or full
        self._listen(self._taking and not self._pending and not full)

    def _add_pending(self, fd: int, listener: int, accepted_at_ns: int) -> None:
        self._board.took(accepted_at_ns)
        environment = self._environments.of(fd, listener)
        if environment is None:
            os.close(fd)  # the client has left, which is no error
            return
        self._pending = fd, environment
        self._start()
        self._count()

    def _start(self) -> None:
        """Start a program for the pending connection; if that fails, try again later."""
        if self._pending is None:
            return  # it was closed, at SIGTERM or because this pool drains
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
            say(f"can start {self._starter.path} again")
            self._trouble, self._wait_s = 0, FIRST_WAIT_S
        self._call_after(_STATUS_S, self._say_status)

    def _not_started(self, error: OSError) -> None:
        if error.errno != self._trouble:
            self._trouble = error.errno or errno.EIO
            say(f"{self._why_not()}; trying again, while the connection waits")
            self._call_after(_STATUS_S, self._say_status)
        if self._trouble in _NO_PROGRAM and self._is_last():
            self._taking = False
            self._board.failed()
            self._close_pending(self._why_not())
            return
        self._call_after(self._wait_s, self._start)
        self._wait_s = min(2 * self._wait_s, LAST_WAIT_S)

    def _is_last(self) -> bool:
        """Return whether this pool drains or retires, and no connection follows the pending one.

        At a stop there is no new generation that could take the queued connections.
        """
        try:
            flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
            return not self._taking or not self._channel.recv(1, flags)
        except OSError:
            return False  # the queue is empty, but more may come

    def _why_not(self) -> str:
        reason = os.strerror(self._trouble)
        if self._trouble == errno.EAGAIN:
            reason = "no more processes (the user's RLIMIT_NPROC, or the service's TasksMax)"
        elif self._trouble == errno.ENOENT and os.path.exists(self._starter.path):
            reason = "the interpreter in its first line is missing"
        return f"cannot start {self._starter.path}: {reason}"

    def _close_pending(self, why: str) -> None:
        if self._pending:
            say(f"a connection was closed: {why}")
            os.close(self._pending[0])
            self._pending = None
            self._count()

    def _count(self) -> None:
        """Count the open connections in the scoreboard, the pending one, too."""
        self._board.active(len(self._programs) + (self._pending is not None))

    def _may_take(self) -> bool:
        """Open the spare descriptor if it was used; return whether a connection can be taken.

        The connection needs that descriptor, and later the pidfd of its program.
        """
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
        """Watch the channel, or stop watching: unwanted connections would wake us all the time."""
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

    # -- programs, timers and signals ------------------------------------------

    def _ended(self, pidfd: int) -> bool:
        """Handle the end of a program; return whether there is a free slot now."""
        if not self._programs.ended(pidfd):
            return False
        self._count()
        if self._trouble == errno.EAGAIN:
            self._timers[self._start] = 0.0
        self._call_after(_STATUS_S, self._say_status)
        self._report_first()
        return True

    def _call_after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call a function after this time, unless it will be called sooner."""
        self._timers.setdefault(call, time.monotonic() + seconds)

    def _timeout_s(self) -> float | None:
        if not self._timers:
            return None
        return max(0.0, min(self._timers.values()) - time.monotonic())

    def _call_due(self) -> bool:
        """Call the functions that are due; return whether there may be a connection to take."""
        now = time.monotonic()
        due = [call for call, at in self._timers.items() if now >= at]
        for call in due:
            del self._timers[call]
            call()
        return bool(due) and not self._listening

    def _feed_watchdog(self) -> None:
        self._notifier.send("WATCHDOG=1")  # one message may be lost: half the limit is left
        self._call_after(self._notifier.watchdog_s, self._feed_watchdog)

    def _say_status(self) -> None:
        count = len(self._programs)
        trouble = f"; a connection waits: {self._why_not()}" if self._pending else ""
        if self._notifier.send(f"STATUS={count} of {self._slots} programs run{trouble}"):
            self._call_after(_STATUS_S, self._say_status)

    def _report_first(self) -> None:
        unsent = self._first.unsent
        while unsent:
            if self._notifier.send(unsent[0]):
                self._call_after(_LOOK_S, self._report_first)
                return
            del unsent[0]

    def _look(self) -> None:
        self._programs.look()
        self._count()
        self._first.look()
        self._report_first()
        if self._programs.unseen or self._first.holds:
            self._look_soon()

    def _look_soon(self) -> None:
        self._call_after(_LOOK_S, self._look)

    def _line_ended(self) -> bool:
        """Return whether the RETURN line has ended; the protector sends no data there."""
        try:
            data = os.read(self._line, 4096)
        except OSError:
            data = b""
        if not data:
            self._epoll.unregister(self._line)
        return not data

    def _signalled(self) -> None:
        """Handle SIGTERM: stop taking, and pass the signal on to the programs."""
        os.read(self._wake, 4096)
        self._close_pending("TERM came before its program could be started")
        self._stop_taking()
        # To the whole process group, as with KILL: it includes processes that programs started.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGTERM)
        else:
            self._programs.signal(signal.SIGTERM)

    def _stop_taking(self) -> None:
        self._taking = False
        self._listen(False)
        if self._trouble in _NO_PROGRAM:
            self._start()  # the last try, now that a deploy has perhaps put the file back
