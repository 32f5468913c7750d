"""This process as a worker: under a protector, or with its own listening sockets.

A process has one environment, one channel and one drain.  So there is one Worker, made at its
first use, not at import.
"""

from __future__ import annotations

import atexit
import os
import socket
import threading
from functools import lru_cache

from . import forking, wire
from .address import listen
from .channel import Channel
from .drain_state import Drain
from .environment import read_environment
from .intake import Intake
from .scoreboard import Scoreboard
from .sd_notify import notify
from .source import ChannelSource, ListenSource, Source
from .system import Socket
from .watchdog import Watchdog, interval_s

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List, Mapping, Optional

    from .address import ListenAddress
    from .spread import Spread

#: The protector's default of --backlog; the kernel lowers it to net.core.somaxconn.
DEFAULT_BACKLOG = 4096


@lru_cache(maxsize=None)
def current() -> Worker:
    """Return this process's Worker.  Raises ProtocolError for a broken environment."""
    return Worker(os.environ)


class Worker:
    """Owns the channel and the RETURN line for the life of the process."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        environment = read_environment(environ)
        self._board = Scoreboard(*environment.board)
        self.channel: Optional[Channel] = None
        #: The number of workers with the same queue, as configured at the start.
        self.sharers = environment.workers
        #: Whether a SocketServer uses the channel.
        self.is_lent = False
        #: Listening sockets shared with other processes (`--handoff listener`).
        self.passed = environment.passed
        self._watchdogs: List[Watchdog] = []  # they start when this process serves
        self._return_line: Optional[socket.socket] = None
        if environment.channel_fd >= 0:
            self.channel = Channel(environment.channel_fd, environment.listeners)
            # Detached at exit, so that Python does not warn; the kernel closes it.
            atexit.register(self.channel.detach)
        if environment.return_fd >= 0:
            self._return_line = Socket(fileno=environment.return_fd)
            atexit.register(self._return_line.detach)
        self._watchdog_s = interval_s(environ) if self.is_served else 0.0
        self.drain = Drain([line.fileno() for line in (self.channel, self._return_line) if line])
        #: The listener of each connection, by descriptor.  A reused descriptor
        #: replaces its entry, so the entries of open connections are right.
        self.listener_by_fd: dict[int, str] = {}
        #: Ends the connections evenly when the worker drains; None: nothing does.
        self.spread: Optional[Spread] = None
        if environment.spread_s is not None and self.is_served:
            from .spread import Spread

            self.spread = Spread(self.drain, environment.spread_s, self._board)
        self._said_ready = False
        self._lock = threading.Lock()
        forking.register(self)

    @property
    def is_served(self) -> bool:
        """Whether a protector gives this process connections, or listening sockets."""
        return self.channel is not None or bool(self.passed)

    def open_intake(self, address: Optional[ListenAddress], limit: Optional[int]) -> Intake:
        """Return a new intake, which the caller closes.

        Without a channel it accepts from the passed sockets, or binds and listens on `address`.
        Raises ValueError for a limit below 1, and the errors of address.listen.
        """
        # Checked before a socket is bound.
        if limit is not None and limit < 1:
            raise ValueError(f"cannot work with limit={limit}: at least 1 is needed")
        source: Source
        if self.channel is not None:
            source = ChannelSource(self.channel, wakes_one=True)
        elif self.passed:
            source = ListenSource([Socket(fileno=os.dup(fd)) for fd in self.passed], handed=True)
        else:
            source = ListenSource(listen(address, DEFAULT_BACKLOG), handed=False)
        return self._open(source, limit)

    def open_queue(self, channel: Channel, limit: int) -> Intake:
        """Return a new intake of a channel; the caller keeps the channel and closes the intake."""
        if channel is not self.channel:
            self.drain.follow(channel.fileno())
        return self._open(ChannelSource(channel, wakes_one=channel is self.channel), limit)

    def _open(self, source: Source, limit: Optional[int]) -> Intake:
        intake = Intake(source, self.drain, limit, self.listener_by_fd, self._board, self.spread)
        if self._return_line is not None:
            # Only the end of the line counts.  A later protector may send messages on it, which
            # only the parent reads.
            intake.drain_at_end_of(self._return_line.fileno())
        if self._watchdog_s:
            watchdog = Watchdog(self._watchdog_s, lambda: intake.may_be_silent)
            intake.on_readable(watchdog.fileno(), watchdog.answer)
            with self._lock:
                if self._said_ready:
                    watchdog.start()
                else:
                    self._watchdogs.append(watchdog)
        return intake

    def ready(self, *, retires: bool = True) -> None:
        """Send READY=1; later calls do nothing.

        If the protector is slow to read messages, it gets this message later: see notify().
        retires: whether this worker finishes when its RETURN line ends.  False for a program that
        takes from the Channel itself; its connections are not counted either.
        """
        with self._lock:
            if self._said_ready:
                return
            self._said_ready = True
            while self._watchdogs:
                self._watchdogs.pop().start()
        if not retires:
            self._board.leave_uncounted()
        elif self.spread is not None:
            self.spread.arm()
        # In one datagram: the protector must know both before it relies on either.
        can_retire = retires and self._return_line is not None
        notify("READY=1", *([wire.RETIRES_ON_RETURN] if can_retire else []))

    def after_fork_in_child(self) -> None:
        # The protector watches the parent, not the child.
        self._lock = threading.Lock()
        self._watchdog_s = 0.0
        self._watchdogs = []
