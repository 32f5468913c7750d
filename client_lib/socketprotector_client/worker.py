"""This process as a worker: under a protector, or with its own listening sockets.

A process has one environment, one channel and one drain.  So there is one Worker, made at its
first use, not at import.
"""

from __future__ import annotations

import atexit
import os
import socket
import threading

from . import fork_hook, wire
from .address import listen, name_of
from .channel import Channel, has_ended
from .drain_state import Drain
from .environment import read_environment
from .intake import Intake
from .log import Logger
from .scoreboard import Scoreboard
from .sd_notify import notify
from .source import ChannelSource, ListenSource, Source
from .system import Socket
from .watchdog import Watchdog, interval_s

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, List, Mapping, Optional, Tuple

    from .address import ListenAddress
    from .seat import Seat, Seats
    from .spread import Spread

#: The protector's default of --backlog; the kernel lowers it to net.core.somaxconn.
DEFAULT_BACKLOG = 4096


_log = Logger(__name__)
_made: List[Worker] = []
# Two Workers would both close the scoreboard's descriptor, and the second might close another file.
_making = threading.RLock()
# A child that is forked meanwhile would wait for ever for the lock.
os.register_at_fork(
    before=_making.acquire, after_in_parent=_making.release, after_in_child=_making.release
)


def current() -> Worker:
    """Return this process's Worker.  Raises ProtocolError for a broken environment."""
    if not _made:
        with _making:
            if not _made:
                _made.append(Worker(os.environ))
    return _made[0]


class Worker:
    """Owns the channel and the RETURN line for the life of the process."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        environment = read_environment(environ)
        self.board = Scoreboard(*environment.board)
        self.channel: Optional[Channel] = None
        #: The number of workers with the same queue, as configured at the start.
        self.sharers = environment.workers
        #: Whether a SocketServer uses the channel.
        self.is_lent = False
        #: Listening sockets shared with other processes (`--handoff listener`).
        self.passed, self._paths = environment.passed, environment.paths
        #: In a forked child of a SocketServer: the child's seat.
        self.seat: Optional[Seat] = None
        #: In such a child, without a protector: the queue of the SocketServer.
        self.shared: Optional[Channel] = None
        #: Called with its number in each such child, right after the fork.
        self.post_fork: List[Callable[[int], object]] = []
        self._watchdogs: List[Watchdog] = []  # they start when this process serves
        self._return_line: Optional[socket.socket] = None
        if environment.channel_fd >= 0:
            self.channel = Channel(environment.channel_fd, environment.listeners)
            # Detached at exit, so that Python does not warn; the kernel closes it.
            atexit.register(self.channel.detach)
        if environment.return_fd >= 0:
            self._return_line = Socket(fileno=environment.return_fd)
            atexit.register(self._return_line.detach)
        #: How often to send WATCHDOG=1; 0.0: never.
        self.watchdog_s = interval_s(environ) if self.is_served else 0.0
        self.drain = Drain([line.fileno() for line in (self.channel, self._return_line) if line])
        #: The listener of each connection, by descriptor.  A reused descriptor
        #: replaces its entry, so the entries of open connections are right.
        self.listener_by_fd: dict[int, str] = {}
        #: Ends the connections evenly when the worker drains; None: nothing does.
        self.spread: Optional[Spread] = None
        if environment.spread_s is not None and self.is_served:
            from .spread import Spread

            self.spread = Spread(self.drain, environment.spread_s, self.board)
        self._first_address = ""
        self._said_ready = False
        self._parents_watchdog_s = 0.0
        self._lock = threading.Lock()
        fork_hook.register(self)

    @property
    def is_served(self) -> bool:
        """Whether another process gives this one connections, or listening sockets."""
        return self.channel is not None or bool(self.passed) or self.shared is not None

    @property
    def has_retired(self) -> bool:
        """Whether the protector has ended the RETURN line: others take the queued connections."""
        return self._return_line is not None and has_ended(self._return_line)

    @property
    def _outlives_parent(self) -> bool:
        """Whether a forked child still gets connections when its parent has ended.

        Without a protector the queue ends with the parent, and the children serve it to its end.
        """
        return self.channel is not None or bool(self.passed)

    @property
    def passed_names(self) -> Tuple[str, ...]:
        """The names of the passed listening sockets, such as `tcp:0.0.0.0:4321`."""
        found = []
        for fd in self.passed:
            with Socket(fileno=os.dup(fd)) as copy:
                is_unix = copy.family == socket.AF_UNIX
                path = self._paths.get(fd) if is_unix else None
                found.append(name_of(copy.family, path or copy.getsockname()))
        return tuple(found)

    def open_intake(self, address: Optional[ListenAddress], limit: Optional[int]) -> Intake:
        """Return a new intake, which the caller closes.

        Without a channel it accepts from the passed sockets, or binds and listens on `address`.
        Raises ValueError for a limit below 1, and the errors of address.listen.
        """
        # Checked before a socket is bound.
        if limit is not None and limit < 1:
            raise ValueError(f"cannot work with limit={limit}: at least 1 is needed")
        if self.is_served and address is not None:
            self._compare(str(address))
        if self.shared is not None:
            return self.open_queue(self.shared, limit)
        source: Source
        if self.channel is not None:
            source = ChannelSource(self.channel, wakes_one=True)
        elif self.passed:
            handed = [Socket(fileno=os.dup(fd)) for fd in self.passed]
            source = ListenSource(handed, handed=True, names=self.passed_names)
        else:
            source = ListenSource(listen(address, DEFAULT_BACKLOG), handed=False)
        return self._open(source, limit)

    def _compare(self, address: str) -> None:
        """Warn if this process names a second address: both get the clients of all listeners."""
        self._first_address = first = self._first_address or address
        if first != address:
            _log.warning(
                "clients of %s and %s can reach either: under a protector they share one queue; "
                "use one listener, and read client.listener",
                first,
                address,
            )

    def open_queue(self, channel: Channel, limit: Optional[int]) -> Intake:
        """Return a new intake of a channel; the caller keeps the channel and closes the intake."""
        if channel is not self.channel:
            self.drain.follow(channel.fileno())
        return self._open(ChannelSource(channel, wakes_one=channel is self.channel), limit)

    def _open(self, source: Source, limit: Optional[int]) -> Intake:
        intake = Intake(source, self.drain, limit, self.listener_by_fd, self.board, self.spread)
        if self._return_line is not None:
            # Only the end of the line counts.  A newer protector may send messages on it, which
            # only the parent reads.
            intake.drain_at_end_of(self._return_line.fileno())
        if self.seat is not None and self._outlives_parent:
            if self._return_line is None:
                intake.drain_at_end_of(self.seat.parents_end)
            else:  # the protector ends the line, at once or when the next parent is ready
                intake.at_end_of(self.seat.parents_end, self.board.leave)
        if self.watchdog_s:
            watchdog = Watchdog(self.watchdog_s, lambda: intake.may_be_silent)
            intake.on_readable(watchdog.fileno(), watchdog.answer)
            intake.watchdog = watchdog
            with self._lock:
                if self._said_ready:
                    watchdog.start()
                else:
                    self._watchdogs.append(watchdog)
        return intake

    def ready(self, *, retires: bool = True, takes: bool = True) -> None:
        """Send READY=1; later calls do nothing.

        If the protector is slow to read messages, it gets this message later: see notify().
        retires: whether this worker finishes when its RETURN line ends.  False for a program that
        takes from the Channel itself; its connections are not counted either.
        takes: whether this process takes connections itself, not only its forked children.
        """
        with self._lock:
            if self._said_ready:
                return
            self._said_ready = True
            while self._watchdogs:
                self._watchdogs.pop().start()
        if not retires:
            self.board.leave_uncounted()
        elif self.spread is not None and takes:
            self.spread.arm()
        if self.seat is not None:
            self.seat.ready()  # the parent sends READY=1 once all its children serve
            return
        # In one datagram: the protector must know both before it relies on either.
        can_retire = retires and self._return_line is not None
        notify("READY=1", *([wire.RETIRES_ON_RETURN] if can_retire else []))

    def take_seat(self, seats: Seats, number: int) -> None:
        """Become a child of a SocketServer, with a record and a watchdog of its own."""
        os.environ[wire.ENV_CHILD] = str(number)
        self.board.begin_child(number)
        self.seat = seats.take(number, self.board.leave)
        self.watchdog_s, self._said_ready = self._parents_watchdog_s, False
        if self._outlives_parent and self._return_line is None:
            self.drain.follow(self.seat.parents_end)
        self.drain.at_begin = self.seat.leave

    def after_fork_in_child(self) -> None:
        # The protector watches the parent, not the child.
        self._parents_watchdog_s = 0.0 if self.seat is not None else self.watchdog_s
        self.seat = None
        self._lock = threading.Lock()
        self.watchdog_s = 0.0
        self._watchdogs = []
