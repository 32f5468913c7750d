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
import sys
from typing import Any, Optional, Tuple

from .address import ListenAddress, name_of
from .connection import Connection
from .errors import Drained
from .exit_after_drain import Leave
from .intake import Intake
from .signals import TermWatch, watch_term
from .system import Socket
from .worker import DEFAULT_BACKLOG, current

# One for each turn of an event loop costs a third of the rate, 16 a fortieth; more gains nothing.
# All workers together: a row leaves the others, who are just waking up, without their share.
_MOST = 32

_AGAIN = os.strerror(errno.EAGAIN)

_ANSWERS = {
    socket.SO_ACCEPTCONN: 1,
    socket.SO_TYPE: int(socket.SOCK_STREAM),
    socket.SO_ERROR: 0,
}


class Listener(Socket):
    """A drop-in for a listening socket, with or without a protector."""

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
        self._reader: object = None  # by which asyncio was told of us when it called accept
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
            self._join_later(intake)
        try:
            if timeout_s != 0.0:
                connection = intake.get(timeout_s)
            elif self._taken < self._take:
                connection = intake.get_further() if self._taken else intake.get_now()
                if connection is None and self._adapts and 1 < self._take >= self._taken * 2:
                    self._take //= 2
            elif self._adapts and self._take < self._most and intake.has_more():
                self._take *= 2
        except Drained:
            if self._leave is None:
                self._leave = self._begin_leave()
            self._leave.proceed(timeout_s)
        if connection is None:
            self._taken = 0
            if timeout_s == 0:
                intake.rest()
                raise BlockingIOError(errno.EAGAIN, _AGAIN)
            raise socket.timeout("timed out")
        self._taken += self._counts
        return connection, connection.peer

    def bind(self, address: Any) -> None:
        """Bind and listen, unless there is a protector or it is bound already."""
        if self._intake is None:
            if isinstance(address, tuple):
                # Exactly what the caller says, not what a bare port would mean.
                host = address[0] or "0.0.0.0"
                address = (host, address[1])
            else:
                address = name_of(socket.AF_UNIX, address)
            self._open(address)

    def listen(self, backlog: int = DEFAULT_BACKLOG) -> None:
        """Say READY=1; without a protector, also set the backlog."""
        self._leave_loop()
        intake = self._opened()
        intake.source.set_backlog(backlog)
        current().ready()
        loop = _running_loop()
        if loop is not None and self._may_join:
            loop.call_soon(self._join, intake)  # it begins to watch this socket now

    def setblocking(self, flag: bool) -> None:
        """Set this socket's mode, which is nobody else's.

        Raises RuntimeError on uvloop, which asks for it before it accepts below Python.
        """
        if not flag:
            _refuse_uvloop()
        self._leave_loop()
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
        if level == socket.SOL_SOCKET and optname in _ANSWERS and not buflen:
            return _ANSWERS[optname]
        if level == socket.SOL_SOCKET and optname == socket.SO_DOMAIN and not buflen:
            return int(self.family)
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
        """Refused: what is left is no socket, so nobody could accept from it."""
        raise OSError(
            errno.EOPNOTSUPP, "cannot detach a Listener: wrap the accepted connections instead"
        )

    def stop_accepting(self) -> None:
        """Begin to drain, as if the protector had said so.  For a signal's handler.

        Raises OSError when the system is out of descriptors.
        """
        intake = self._opened()
        intake.ask_to_stop()
        intake.ring()

    def _join_later(self, intake: Intake) -> None:
        """Have asyncio wait for the queue itself, where it calls accept for the second time.

        Whoever wants one connection only (loop.sock_accept) is another reader each time.
        """
        before = self._reader
        self._may_join = self._is_watched()
        if self._may_join and self._reader is before:
            self._join(intake)

    def _join(self, intake: Intake) -> None:
        if self._may_join and self._is_watched():
            self._may_join = False
            intake.join_loop(self.fileno())

    def _is_watched(self) -> bool:
        """Find out by which reader asyncio watches this socket, if it does."""
        if _running_loop() is None:
            return False
        from .asyncio_epoll import reader_of

        self._reader = reader_of(self.fileno())
        return self._reader is not None

    def _leave_loop(self) -> None:
        # A loop begins to use this socket; if it is not the first one, each is told as before.
        if self._intake is not None and not self._may_join:
            self._intake.leave_loop()

    def _begin_leave(self) -> Leave:
        return Leave(self._opened())

    def _open(self, address: Optional[ListenAddress]) -> None:
        self._intake = current().open_intake(address, self._limit)
        self._intake.on_renewal = self._take_number
        self._take_number()
        if current().passed:
            # Nothing but the signal says that it is over.
            self._term = watch_term(self._intake)

    def _take_number(self) -> None:
        # This socket's number now stands for the epoll.  The reverse, a socket
        # made of the epoll's number, CPython refuses.
        if self._intake is not None and self.fileno() >= 0:
            os.dup2(self._intake.fileno(), self.fileno(), inheritable=False)

    def _opened(self) -> Intake:
        if self._intake is None:
            raise ValueError(
                "cannot tell where to listen: there is no protector and no address was given"
            )
        return self._intake


def _refuse_uvloop() -> None:
    # Silence would be worse: it would listen on what is no socket, and no client be served.
    loop = _running_loop()
    if loop is not None and type(loop).__module__.partition(".")[0] == "uvloop":
        raise RuntimeError(
            "cannot use a Listener on uvloop, which accepts below Python: use asyncio's own event "
            "loop (uvicorn: --loop asyncio), or no Listener and the protector's --handoff listener"
        )


def _running_loop() -> Any:
    asyncio = sys.modules.get("asyncio")
    return asyncio._get_running_loop() if asyncio is not None else None
