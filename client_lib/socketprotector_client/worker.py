"""What this process is: a protector's worker, or one that listens by itself.

A process has one environment, one channel and one drain, so there is one
Worker, made when it is first asked for and never at import.
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

#: As the protector's --backlog; the kernel lowers it to net.core.somaxconn.
DEFAULT_BACKLOG = 4096


@lru_cache(maxsize=None)
def current() -> Worker:
    """Return what this process is.  Raises ProtocolError for a broken environment."""
    return Worker(os.environ)


class Worker:
    """Owns the channel and the RETURN line for the life of the process."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        environment = read_environment(environ)
        self._board = Scoreboard(*environment.board)
        self.channel: Optional[Channel] = None
        #: How many workers take connections from the same queue, as far as is known.
        self.sharers = environment.workers
        #: Whether a SocketServer uses the channel.
        self.is_lent = False
        #: Listening sockets that others have, too (`--handoff listener`).
        self.passed = environment.passed
        self._watchdogs: List[Watchdog] = []  # to be started when this process serves
        self._return_line: Optional[socket.socket] = None
        if environment.channel_fd >= 0:
            self.channel = Channel(environment.channel_fd, environment.listeners)
            # Kept for life: closing is the kernel's job, without a warning at exit.
            atexit.register(self.channel.detach)
        if environment.return_fd >= 0:
            self._return_line = Socket(fileno=environment.return_fd)
            atexit.register(self._return_line.detach)
        self._watchdog_s = interval_s(environ) if self.is_served else 0.0
        self.drain = Drain([line.fileno() for line in (self.channel, self._return_line) if line])
        #: Which listener each connection came through.  Entries are replaced when
        #: their number is used again, so those of open connections are right.
        self.listener_by_fd: dict[int, str] = {}
        self._said_ready = False
        self._lock = threading.Lock()
        forking.register(self)

    @property
    def is_served(self) -> bool:
        """Whether a protector gives this process connections, or listening sockets."""
        return self.channel is not None or bool(self.passed)

    def open_intake(self, address: Optional[ListenAddress], limit: Optional[int]) -> Intake:
        """Return a new intake; the caller closes it.

        Without a protector it accepts from what it was handed, or binds and listens on address.
        Raises what address.listen raises.
        """
        # Before anything is bound.
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
        """Return a new intake from a channel, which stays the caller's; the caller closes it."""
        if channel is not self.channel:
            self.drain.follow(channel.fileno())
        return self._open(ChannelSource(channel, wakes_one=channel is self.channel), limit)

    def _open(self, source: Source, limit: Optional[int]) -> Intake:
        intake = Intake(source, self.drain, limit, self.listener_by_fd, self._board)
        if self._return_line is not None:
            # Nothing is sent on it yet; a later protector may, to the process that it started.
            intake.obey_end(self._return_line.fileno())
        if self._watchdog_s:
            watchdog = Watchdog(self._watchdog_s, lambda: intake.may_be_silent)
            intake.obey(watchdog.fileno(), watchdog.answer)
            with self._lock:
                if self._said_ready:
                    watchdog.start()
                else:
                    self._watchdogs.append(watchdog)
        return intake

    def ready(self, *, retires: bool = True) -> None:
        """Say READY=1, the first time; later calls do nothing.

        Where the protector has not read on for a while it is heard once it does: see notify().
        retires: whether this worker leaves when its RETURN line ends; not where the program takes
        from the Channel itself, which is not counted either.
        """
        with self._lock:
            if self._said_ready:
                return
            self._said_ready = True
            while self._watchdogs:
                self._watchdogs.pop().start()
        if not retires:
            self._board.leave_uncounted()
        # In one datagram: the protector must know both before it relies on one.
        can_retire = retires and self._return_line is not None
        notify("READY=1", *([wire.RETIRES_ON_RETURN] if can_retire else []))

    def after_fork_in_child(self) -> None:
        # It is the parent that the protector watches.
        self._lock = threading.Lock()
        self._watchdog_s = 0.0
        self._watchdogs = []
