"""A listening socket whose accept() takes connections from the protector.

For frameworks that expect a socket: asyncio, aiohttp, uvicorn, waitress,
socketserver, http.server.  They call accept in Python, so a subclass is
enough; uvloop and others that accept below Python cannot use it.

The framework watches the descriptor of the intake's epoll, which is private to this process.  So
the framework may set that descriptor non-blocking, shut it down or close it: the channel, which all
workers share, is not affected.
"""

from __future__ import annotations

import errno
import os
import socket

from .address import name_of
from .connection import Connection
from .errors import Drained
from .exit_after_drain import DrainExit
from .intake import Intake
from .signals import TermWatch
from .system import Socket, running_asyncio
from .worker import DEFAULT_BACKLOG, current

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional, Tuple

    from .address import ListenAddress

# The limit of connections taken in a row, by all workers of a generation together.  A row of 1
# costs a third of the rate, a row of 16 a fortieth; longer rows gain nothing.  A long row leaves
# no connection for workers that are just waking up.
_MOST = 32

_EAGAIN_TEXT = os.strerror(errno.EAGAIN)


class Listener(Socket):
    """A drop-in for a listening socket, with or without a protector."""

    #: The process that gets SIGTERM after the drain; None: this process.
    _ended_by: Optional[int] = None
    #: Whether the server does not finish at SIGTERM, even if the program handles that signal.
    _outlives_term = False

    def __init__(
        self,
        address: Optional[ListenAddress] = None,
        *,
        limit: Optional[int] = None,
        take: Optional[int] = 0,
    ) -> None:
        """Take connections from the protector; without one, bind `address` now, or in bind().

        limit: while this number of accepted connections is open, others stay in the queue.
        take: after this many connections in a row, accept fails once with BlockingIOError.  Without
        that error an event loop would take the whole queue before it serves.  0: begin with 1,
        double the number while connections keep waiting, and halve it when few wait.  The most is
        about 32 divided by the number of workers.  None: no such errors, for loops that accept once
        for each wake-up.  A blocking listener ignores `take`.

        Raises the errors of `connections`, except that the address may be missing.
        """
        super().__init__(socket.AF_INET, socket.SOCK_STREAM)
        self._limit = limit
        self._adapts = take == 0
        self._take = take or 1
        self._most = _MOST // current().sharers
        self._counts = take is not None
        self._taken = 0
        self._said_ready = False
        self._reader: object = None  # asyncio's handle for us when it last called accept
        self._may_join = True
        self._intake: Optional[Intake] = None
        self._exit: Optional[DrainExit] = None
        self._term: Optional[TermWatch] = None
        try:
            if address is not None or current().is_served:
                self._open(address)
        except BaseException:
            super().close()
            raise

    def accept(self) -> Tuple[Connection, Any]:
        """Return (socket, client's address), as socket.accept does.

        Raises BlockingIOError if no client waits and this listener is non-blocking, and
        socket.timeout after its timeout.

        In a drain no connection is returned, and the process ends.  A process that handles
        SIGTERM gets SIGTERM; otherwise this raises SystemExit(0) once every returned
        connection is closed.
        """
        intake = self._intake or self._opened()
        if not self._said_ready:
            current().ready()
            self._said_ready = True
        timeout_s = self.gettimeout()
        connection = None
        if self._may_join and timeout_s == 0 and not self._taken:
            self._join_loop(intake)
        try:
            if timeout_s != 0.0:
                connection = intake.get(timeout_s)
            # asyncio accepts up to `backlog` times in a row (_accept_connection).  With a queue
            # of 60 connections it took all 60 before its first handler ran.
            elif self._taken < self._take:
                connection = intake.get_next() if self._taken else intake.get_now()
                if connection is None and self._adapts and 1 < self._take >= self._taken * 2:
                    self._take //= 2
            elif self._adapts and self._take < self._most and intake.has_more():
                self._take *= 2
        except Drained:
            if self._exit is None:
                self._exit = DrainExit(intake, self._ended_by, outlives_term=self._outlives_term)
                self._exit.begin()
            self._exit.wait(timeout_s)
        if connection is None:
            self._taken = 0
            if timeout_s == 0:
                intake.queue.move_back_in_loop()
                raise BlockingIOError(errno.EAGAIN, _EAGAIN_TEXT)
            raise socket.timeout("timed out")
        self._taken += self._counts
        return connection, connection.peer

    def bind(self, address: Any) -> None:
        """Bind and listen; do nothing under a protector, or if the listener is already bound."""
        if self._intake is None:
            if isinstance(address, tuple):
                # An empty host means 0.0.0.0 here, not also [::] as a bare port would.
                address = (address[0] or "0.0.0.0", address[1])
            else:
                address = name_of(socket.AF_UNIX, address)
            self._open(address)

    def listen(self, backlog: int = DEFAULT_BACKLOG) -> None:
        """Send READY=1; without a protector, also set the backlog."""
        intake = self._opened()
        intake.queue.leave_loop()  # another event loop may begin to use this socket
        intake.source.set_backlog(backlog)
        current().ready()

    def setblocking(self, flag: bool) -> None:
        """Set whether accept() of this Listener waits; no other process is affected.

        Raises RuntimeError on uvloop, which calls this and then accepts below Python.
        """
        if not flag:
            _refuse_uvloop()
        if self._intake is not None:
            self._intake.queue.leave_loop()
        super().setblocking(flag)

    def getsockname(self) -> Any:
        """Return the address of the first listener."""
        return super().getsockname() if self._intake is None else self._intake.source.sockname

    @property
    def family(self) -> socket.AddressFamily:
        """The address family of the first listener."""
        address = self.getsockname()
        if isinstance(address, (str, bytes)):
            return socket.AF_UNIX
        return socket.AF_INET if len(address) == 2 else socket.AF_INET6

    def getsockopt(self, level: int, optname: int, buflen: int = 0) -> Any:
        """Return SO_ACCEPTCONN, SO_DOMAIN, SO_ERROR or SO_TYPE of a listening stream socket.

        Raises OSError (ENOPROTOOPT) for any other option.
        """
        answers = {
            socket.SO_ACCEPTCONN: 1,
            socket.SO_DOMAIN: self.family,
            socket.SO_ERROR: 0,
            socket.SO_TYPE: socket.SOCK_STREAM,
        }
        if level == socket.SOL_SOCKET and optname in answers and not buflen:
            return int(answers[optname])
        raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))

    def setsockopt(self, *args: Any) -> None:
        """Do nothing: the protector's own options configure its listeners."""

    def shutdown(self, how: int) -> None:
        """Do nothing: a shutdown of the channel would end the whole generation."""

    def close(self) -> None:
        """Stop accepting; the channel stays open for other workers and listeners."""
        super().close()
        if self._intake is not None and self.fileno() < 0:
            self._intake.close()
            if self._term is not None:
                self._term.stop()

    def detach(self) -> int:
        """Raise OSError (EOPNOTSUPP): the descriptor is not a socket, so accept() would fail."""
        raise OSError(
            errno.EOPNOTSUPP, "cannot detach a Listener: wrap the accepted connections instead"
        )

    def stop_accepting(self) -> None:
        """Begin to drain, as at the protector's request.  Safe in a signal handler.

        Raises OSError if no descriptor is free.
        """
        intake = self._opened()
        intake.request_drain()
        intake.waits.ring()
        if self._exit is not None:
            self._exit.resend()

    def _join_loop(self, intake: Intake) -> None:
        """Make asyncio wait for the queue itself, if it accepts with the same reader again.

        loop.sock_accept, which takes one connection only, uses a new reader each time.
        """
        before, self._reader = self._reader, None
        if running_asyncio() is not None:
            from .asyncio_epoll import join_loop, reader_of

            self._reader = reader_of(self.fileno())
            if self._reader is not None and self._reader is before:
                join_loop(intake, self.fileno())
        self._may_join = self._reader is not None and self._reader is not before

    def _opened(self) -> Intake:
        return self._intake or self._open(None)

    def _open(self, address: Optional[ListenAddress]) -> Intake:
        self._intake = intake = current().open_intake(address, self._limit)
        intake.on_renewal = self._take_number
        self._take_number()
        if current().passed or current().seat is not None:
            # SIGTERM begins the drain, too; without a RETURN line nothing else does.
            self._term = TermWatch(intake)
        return intake

    def _take_number(self) -> None:
        # This socket's descriptor becomes a copy of the epoll's.  CPython refuses the reverse: to
        # make a socket object from the epoll's descriptor.
        if self.fileno() >= 0:
            os.dup2(self._opened().fileno(), self.fileno(), inheritable=False)


def _refuse_uvloop() -> None:
    # Without this error uvloop would listen on a descriptor that is no socket, and serve no client.
    if type(running_asyncio()).__module__.partition(".")[0] == "uvloop":
        raise RuntimeError(
            "cannot use a Listener on uvloop, which accepts below Python: use asyncio's own event "
            "loop (uvicorn: --loop asyncio), or no Listener and the protector's --handoff listener"
        )
