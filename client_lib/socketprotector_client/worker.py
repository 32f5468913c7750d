"""This process's place under a protector, or the lack of one.

A process has one environment, one channel and one drain, so there is one
Worker, made when it is first asked for and never at import.
"""

from __future__ import annotations

import atexit
import os
import socket
import threading
from functools import lru_cache
from typing import List, Mapping, Optional

from . import forking, wire
from .address import ListenAddress
from .channel import Channel
from .drain_state import Drain
from .environment import passed_listeners, read_environment
from .intake import Intake
from .scoreboard import Scoreboard
from .sd_notify import notify
from .source import ChannelSource, ListenSource, Source
from .system import Socket
from .watchdog import Watchdog, interval_s

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
        self._board = Scoreboard(
            environment.board_fd if environment else -1,
            environment.board_offset if environment else 0,
        )
        self.channel: Optional[Channel] = None
        #: Those who take connections from the same place, as far as is known.
        self.sharers = environment.workers if environment else 1
        #: Listening sockets that others have, too (`--handoff listener`); SIGTERM ends the use.
        self.passed = passed_listeners(environ) if environment is None else ()
        self._watchdog_s = interval_s(environ) if environment or self.passed else 0.0
        self._watchdogs: List[Watchdog] = []  # to be started when this process serves
        self._return_line: Optional[socket.socket] = None
        if environment is not None:
            self.channel = Channel(environment.channel_fd, environment.listeners)
            # Kept for life: closing is the kernel's job, and warning about it
            # at exit nobody's.
            atexit.register(self.channel.detach)
            if environment.return_fd >= 0:
                self._return_line = Socket(fileno=environment.return_fd)
                atexit.register(self._return_line.detach)
        self.drain = Drain([line.fileno() for line in (self.channel, self._return_line) if line])
        #: Which listener each connection came through.  Entries are replaced when
        #: their number is used again, so those of open connections are right.
        self.listener_by_fd: dict[int, str] = {}
        self._said_ready = False
        self._is_lent = False
        self._lock = threading.Lock()
        forking.register(self)

    @property
    def is_served(self) -> bool:
        """Whether connections, or who waits for them, come from somebody else."""
        return self.channel is not None or bool(self.passed)

    def open_intake(
        self,
        address: Optional[ListenAddress],
        limit: Optional[int],
        backlog: int = DEFAULT_BACKLOG,
    ) -> Intake:
        """Return a new intake; the caller closes it.

        Without a protector it accepts from what it was handed, or binds and listens on address.
        Raises ValueError if then there is none, and what address.listen raises.
        """
        # Before anything is bound.
        if limit is not None and limit < 1:
            raise ValueError(f"cannot work with limit={limit}: at least 1 is needed")
        source: Source
        if self.channel is not None:
            source = ChannelSource(self.channel, wakes_one=True)
        elif self.passed:
            source = ListenSource.passed(self.passed)
        elif address is not None:
            source = ListenSource.bound(address, backlog)
        else:
            raise ValueError(
                "cannot tell where to listen: there is no protector and no address was given"
            )
        return self._open(source, limit)

    def open_queue(self, channel: Channel, limit: int) -> Intake:
        """Return a new intake from a channel, which stays the caller's; the caller closes it."""
        if channel is not self.channel:
            self.drain.follow(channel.fileno())
        return self._open(ChannelSource(channel, wakes_one=channel is self.channel), limit)

    def lend_channel(self) -> None:
        """Note that a SocketServer uses the channel.  Raises RuntimeError if one does already."""
        if self._is_lent:
            raise RuntimeError(
                "cannot make a second SocketServer under a protector: its workers share one "
                "queue; close the first one, or give both ports to one and ask client.listener"
            )
        self._is_lent = True

    def return_channel(self) -> None:
        self._is_lent = False

    def _open(self, source: Source, limit: Optional[int]) -> Intake:
        intake = Intake(source, self.drain, limit, self.listener_by_fd, self._board)
        if self._return_line is not None:
            # Nothing is said on it yet; a later protector may, to the process that it started.
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
        from the Channel itself, which nobody counts either.
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
        if retires and self._return_line is not None:
            notify("READY=1", wire.RETIRES_ON_RETURN)
        else:
            notify("READY=1")

    def after_fork_in_child(self) -> None:
        # It is the parent that the protector watches.
        self._lock = threading.Lock()
        self._watchdog_s = 0.0
        self._watchdogs = []
