"""Takes connections while there are places, starts a program for each, sees the programs end.

One loop.  What is fixed: no connection is taken without a place for its program and a descriptor
to spare, and one that was taken has its program, however long that takes; our copy of it
is closed as soon as the program runs, so that the client sees the program's end.

A connection is `in hand` from when it was taken until its program was started.  There is one at
most, and while there is one nothing is taken.
"""

from __future__ import annotations

import _signal as signal
import _socket as socket
import errno
import os
import select
import struct
import time

from socketprotector_client import wire

from .environment import Environments
from .programs import Programs
from .report import Board, Notifier, say
from .spawn import Starter

#: How long to wait before a program is tried again: this, then twice as long each time.
FIRST_WAIT_S = 0.01
LAST_WAIT_S = 1.0
#: How often to look at programs whose end nothing tells, and for a descriptor to spare.
_LOOK_S = 0.05
#: STATUS= is said no oftener.
_STATUS_S = 1.0
_NEVER = float("inf")
_EVENTS = select.EPOLLIN
#: One pool is woken for a connection, not all: a tenth of what a program costs is saved.  It is
#: always the same one that wakes at a low rate, which is as good as any.
_ONE_OF_US = select.EPOLLIN | select.EPOLLEXCLUSIVE
#: What passes, so that we do not end for it (ENOSPC: fs.epoll.max_user_watches).
_NO_MEMORY = (errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC)
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
# Room for one descriptor, and not for a second one that would not be looked for.
_CONTROL_BYTES = socket.CMSG_LEN(4)
_HEADER, _HEADER_BYTES = wire.HEADER.unpack, wire.HEADER.size
_FD = struct.Struct("i").unpack


class Pool:
    """Runs until there is nothing to take and no program any more."""

    def __init__(
        self,
        channel: int,
        line: int,
        places: int,
        *,
        starter: Starter,
        environments: Environments,
        notifier: Notifier,
        board: Board,
        word_every_s: float,
    ) -> None:
        """channel and line (-1: none) become ours; word_every_s: how often to say WATCHDOG=1."""
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, channel)
        self._line = line
        self._places = places
        self._starter = starter
        self._environments = environments
        self._notifier = notifier
        self._board = board
        self._taking = True
        self._listening = False  # the channel is in the epoll set
        self._hand: tuple[int, dict[bytes, bytes]] | None = None
        self._wait_s = FIRST_WAIT_S
        self._trouble = 0  # the errno that was said to be in the way of starting programs
        self._scarce = False  # that there is no descriptor was said
        self._try_at = self._look_at = self._status_at = _NEVER
        self._word_every_s = word_every_s
        self._word_at = time.monotonic() if word_every_s else _NEVER
        self._epoll = select.epoll()
        self._programs = Programs(self._epoll, board)
        self._wake, wakes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)  # it is in the pipe
        for fd in (self._wake, line):
            if fd >= 0:
                self._epoll.register(fd, _EVENTS)
        self._spare = os.dup(2)

    def run(self) -> None:
        """Serve until drained, retired or terminated, and all programs have ended."""
        epoll, programs = self._epoll, self._programs
        self._take()
        while self._taking or len(programs) or self._hand:
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
            now = time.monotonic()
            if now >= min(self._try_at, self._look_at, self._status_at, self._word_at):
                self._timers(now)
            if come:
                self._take()
            # Not before: the others may sleep through a connection that we were woken for.
            if leave:
                self._stop_taking()

    # -- connections ---------------------------------------------------------

    def _take(self) -> None:
        """Take and start, until there is no place or no connection."""
        if not self._taking:
            return
        full = False
        while self._taking and not self._hand:
            full = len(self._programs) >= self._places or not self._may_take()
            if full:
                break
            os.close(self._spare)
            self._spare = -1
            try:
                message = self._channel.recvmsg(_HEADER_BYTES, _CONTROL_BYTES, _FLAGS)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno not in _NO_MEMORY:
                    raise
                full = True
                self._look_soon()
                break
            self._came(*message)
        # Who listens has what it takes: the others are not woken for what we were woken for.
        full = not self._may_take() or full
        self._listen(self._taking and not self._hand and not full)

    def _came(self, data: bytes, control: list[tuple[int, int, bytes]], flags: int, _: str) -> None:
        """Deal with one message from the channel."""
        fd = _FD(control[0][2])[0] if control else -1
        if fd < 0:
            if not data:
                self._stop_taking()
            elif flags & socket.MSG_CTRUNC:
                say("a connection was lost: no descriptor left for it")
            return
        version, kind, listener, _, accepted_at_ns = (
            _HEADER(data) if len(data) == _HEADER_BYTES else (0, 0, 0, 0, 0)
        )
        if (version, kind) != (wire.VERSION, wire.KIND_CONNECTION):
            say(
                f"cannot serve a message of version {version}, kind {kind}: "
                "its connection is closed"
            )
            os.close(fd)
            return
        self._board.took(accepted_at_ns)
        environment = self._environments.of(fd, listener)
        if environment is None:
            os.close(fd)  # the client is gone, which is no mistake
            return
        self._hand = fd, environment
        self._start()

    def _start(self) -> None:
        """Start a program for the connection in hand, or see to it that it is tried again."""
        assert self._hand is not None
        fd, environment = self._hand
        try:
            pid = self._starter.start(fd, environment)
        except OSError as error:
            self._not_started(error)
            return
        os.close(fd)
        self._hand = None
        self._programs.add(pid)
        if self._programs.unseen:
            self._look_soon()
        if self._trouble:
            say(f"starts {self._starter.path} again")
            self._trouble, self._wait_s, self._try_at = 0, FIRST_WAIT_S, _NEVER
        self._status_due()

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
        self._try_at = time.monotonic() + self._wait_s
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
                        f"no descriptor left at {len(self._programs)} programs of {self._places}: "
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
        """A program has ended; say whether there is a place now."""
        if not self._programs.ended(pidfd):
            return False
        if self._trouble == errno.EAGAIN:
            self._try_at = 0.0
        self._status_due()
        return True

    def _status_due(self) -> None:
        if self._status_at == _NEVER:
            self._status_at = time.monotonic() + _STATUS_S

    def _timeout_s(self) -> float | None:
        soonest = min(self._try_at, self._look_at, self._status_at, self._word_at)
        if soonest == _NEVER:
            return None
        return max(0.0, soonest - time.monotonic())

    def _timers(self, now: float) -> None:
        if now >= self._word_at:
            self._notifier.tell("WATCHDOG=1")  # lost for once at most: half the time is left
            self._word_at = now + self._word_every_s
        if now >= self._status_at:
            self._status_at = _NEVER
            count = len(self._programs)
            if self._notifier.tell(f"STATUS={count} of {self._places} programs run"):
                self._status_due()
        if now >= self._look_at:
            self._look_at = _NEVER
            self._programs.look()
            if self._programs.unseen:
                self._look_soon()
        if now >= self._try_at:
            self._try_at = _NEVER
            if self._hand:
                self._start()
        if not self._listening:
            self._take()

    def _look_soon(self) -> None:
        self._look_at = min(self._look_at, time.monotonic() + _LOOK_S)

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
        if self._hand:
            say("a connection was closed: no program could be started for it until the end")
            os.close(self._hand[0])
            self._hand, self._try_at = None, _NEVER
        # Not to the programs alone: what they have started is of this group, too, as KILL is.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGTERM)
        else:
            self._programs.signal(signal.SIGTERM)

    def _stop_taking(self) -> None:
        self._taking = False
        self._listen(False)
