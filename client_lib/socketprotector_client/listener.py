"""A listening socket whose accept() takes from the protector.

For frameworks that want a socket: asyncio, aiohttp, uvicorn, waitress,
socketserver, http.server.  They call accept in Python, so a subclass is
enough; uvloop and others that accept below Python cannot use it.

The descriptor that the framework watches is the intake's epoll, private to
this process.  So the framework may set it non-blocking, shut it down or close
it without touching the channel, which all workers share.
"""

from __future__ import annotations

import errno
import os
import socket

from .address import name_of
from .connection import Connection
from .errors import Drained
from .exit_after_drain import Leave
from .intake import Intake
from .signals import TermWatch
from .system import Socket, running_asyncio
from .worker import DEFAULT_BACKLOG, current

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional, Tuple

    from .address import ListenAddress

# One for each turn of an event loop costs a third of the rate, 16 a fortieth; more is no gain.
# All workers together: a row leaves the others, who are just waking up, without their share.
_MOST = 32

_AGAIN = os.strerror(errno.EAGAIN)


class Listener(Socket):
    """A drop-in for a listening socket, with or without a protector."""

    #: The process that is sent SIGTERM at the end, if not this one.
    _ended_by: Optional[int] = None

    def __init__(
        self,
        address: Optional[ListenAddress] = None,
        *,
        limit: Optional[int] = None,
        take: Optional[int] = 0,
    ) -> None:
        """Bind `address` where there is no protector, or leave that to bind().

        While `limit` accepted connections are open, further ones stay in the queue.

        Event loops call accept until it fails, and would take the whole queue
        before they serve the first: after `take` connections in a row accept
        fails once with BlockingIOError.  0: after the first, and under load, where the
        queue is never empty, after up to 32, shared by all workers of the generation.
        None for loops that accept once for each wake-up.  Without effect on a blocking listener.

        Raises what `connections` raises, except that the address may be missing.
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
        self._leave: Optional[Leave] = None
        self._term: Optional[TermWatch] = None
        try:
            if address is not None or current().is_served:
                self._open(address)
        except BaseException:
            super().close()
            raise

    def accept(self) -> Tuple[Connection, Any]:
        """Return (socket, client's address), as socket.accept does.

        When the worker drains nothing is returned any more, and the process
        ends: by SIGTERM if it has a handler for that, else with SystemExit(0) from
        here once every connection handed out is closed.
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
            # asyncio accepts up to `backlog` times in a row (_accept_connection): of 60 in the
            # queue it took all 60 before its first handler ran.
            elif self._taken < self._take:
                connection = intake.get_further() if self._taken else intake.get_now()
                if connection is None and self._adapts and 1 < self._take >= self._taken * 2:
                    self._take //= 2
            elif self._adapts and self._take < self._most and intake.has_more():
                self._take *= 2
        except Drained:
            if self._leave is None:
                self._leave = Leave(intake, self._ended_by)
                self._leave.begin()
            self._leave.proceed(timeout_s)
        if connection is None:
            self._taken = 0
            if timeout_s == 0:
                intake.queue.rest()
                raise BlockingIOError(errno.EAGAIN, _AGAIN)
            raise socket.timeout("timed out")
        self._taken += self._counts
        return connection, connection.peer

    def bind(self, address: Any) -> None:
        """Bind and listen, unless there is a protector or it is bound already."""
        if self._intake is None:
            if isinstance(address, tuple):
                # Exactly what the caller says, not what a bare port would mean.
                address = (address[0] or "0.0.0.0", address[1])
            else:
                address = name_of(socket.AF_UNIX, address)
            self._open(address)

    def listen(self, backlog: int = DEFAULT_BACKLOG) -> None:
        """Say READY=1; without a protector, also set the backlog."""
        intake = self._opened()
        intake.queue.leave_loop()  # another one may begin to use this socket
        intake.source.set_backlog(backlog)
        current().ready()

    def setblocking(self, flag: bool) -> None:
        """Set the mode of this socket, which no other process shares.

        Raises RuntimeError on uvloop, which asks for it before it accepts below Python.
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
        """Answer what a listening stream socket answers; other options are not known here."""
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
        """Do nothing: the protector's listeners are set by its own options."""

    def shutdown(self, how: int) -> None:
        """Do nothing: on the channel it would end the whole generation."""

    def close(self) -> None:
        """Accept no more.  The channel stays open for the other workers and listeners."""
        super().close()
        if self._intake is not None and self.fileno() < 0:
            self._intake.close()
            if self._term is not None:
                self._term.stop()

    def detach(self) -> int:
        """Refused: what is left is no socket, so accept() would fail on it."""
        raise OSError(
            errno.EOPNOTSUPP, "cannot detach a Listener: wrap the accepted connections instead"
        )

    def stop_accepting(self) -> None:
        """Begin to drain, as if the protector had said so.  For a signal's handler.

        Raises OSError when the system is out of descriptors.
        """
        intake = self._opened()
        intake.ask_to_stop()
        intake.waits.ring()
        if self._leave is not None:
            self._leave.again()

    def _join_loop(self, intake: Intake) -> None:
        """Have asyncio wait for the queue itself, where it calls accept for the second time.

        loop.sock_accept, which wants one connection only, is another reader each time.
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
        if current().passed:
            # A server without a RETURN line is told by the signal alone.
            self._term = TermWatch(intake)
        return intake

    def _take_number(self) -> None:
        # This socket's number now stands for the epoll.  The reverse, a socket
        # made of the epoll's number, CPython refuses.
        if self.fileno() >= 0:
            os.dup2(self._opened().fileno(), self.fileno(), inheritable=False)


def _refuse_uvloop() -> None:
    # Silence would be worse: it would listen on what is no socket, and serve no client.
    if type(running_asyncio()).__module__.partition(".")[0] == "uvloop":
        raise RuntimeError(
            "cannot use a Listener on uvloop, which accepts below Python: use asyncio's own event "
            "loop (uvicorn: --loop asyncio), or no Listener and the protector's --handoff listener"
        )
