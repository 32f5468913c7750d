"""The common part of the listeners for trio and anyio, whose APIs use the same names.

Rule: imports neither library.
"""

from __future__ import annotations

import signal
import socket
from typing import TYPE_CHECKING, Any, Awaitable, Callable, List, Optional, Tuple, Type

from .errors import Drained
from .shared_epoll import BesideEpoll, loop_with_epoll
from .signals import term_is_free
from .worker import current

if TYPE_CHECKING:
    from .address import ListenAddress

_Handler = Callable[[Any], Awaitable[object]]


class TaskListener:
    """A listener for tasks; once drained, it ends when its last connection has ended."""

    #: The library, its module with wait_readable, and its exception for the end of connections.
    _library: Any
    _waiting: Any
    _ended: Type[Exception]

    def __init__(
        self, address: Optional[ListenAddress] = None, *, limit: Optional[int] = None
    ) -> None:
        """Take connections from the protector; without one, bind `address`.

        `address`, `limit` and errors are those of `connections`.
        """
        self._intake = current().open_intake(address, limit)
        self._closed = False
        self._pause = self._library.CancelScope()
        # The cancel scopes of the tasks that wait for SIGTERM; and how many calls of `serve` and of
        # handlers need these tasks.
        self._obeying: List[Any] = []
        self._serving = 0
        # The object that holds the loop's epoll, and the attribute; BesideEpoll replaces the epoll.
        self._loop: Tuple[object, str] = (None, "")

    async def aclose(self) -> None:
        """Stop accepting; accepted connections stay open."""
        if not self._closed:
            self._closed = True
            self._waiting.notify_closing(self._intake.fileno())
            BesideEpoll.take_back(*self._loop, self._intake)
            self._intake.close()
        await self._library.lowlevel.checkpoint()

    @staticmethod
    async def _stream(plain: socket.socket) -> Any:
        """Return the library's stream; None if the client has reset the connection."""
        raise NotImplementedError

    async def _take(self) -> socket.socket:
        current().ready()
        # Allow a cancellation here: after a connection is taken, a cancellation would lose it.
        await self._library.lowlevel.checkpoint()
        while not self._closed:
            try:
                connection = self._intake.get_now()
            except Drained:
                await self._last_one_closed()
                raise self._ended from None
            if connection is not None:
                return self._intake.open.exchange(connection)
            if self._loop[0] is None:
                self._loop = loop_with_epoll()
                BesideEpoll.put(*self._loop, self._intake, self._intake.fileno())
            with self._library.CancelScope() as self._pause:
                await self._waiting.wait_readable(self._intake.fileno())
        raise self._library.ClosedResourceError

    async def _last_one_closed(self) -> None:
        self._intake.await_last()
        while len(self._intake.open):
            await self._waiting.wait_readable(self._intake.fileno())
        # No event announces the end of detached connections.  Without a new count they would look
        # lost.
        self._intake.board.count_open()
        # Use a thread, because a callback may need this event loop.
        await self._library.to_thread.run_sync(current().drain.finish)

    async def _serve(self, handler: _Handler, own: Any, tasks: Any) -> None:
        """Start a handler in `tasks` for each connection; once drained, end the task in `own`."""
        if term_is_free():
            self._obeying.append(self._library.CancelScope())
            await own.start(self._obey_term, self._obeying[-1])
        self._serving += 1
        try:
            while True:
                plain = await self._take()
                self._serving += 1
                tasks.start_soon(self._serve_one, handler, plain)
        except self._ended:
            pass  # drained; a handler may still run after it has closed its stream
        finally:
            self._one_ended()

    def _one_ended(self) -> None:
        self._serving -= 1
        if not self._serving:
            for each in self._obeying:
                each.cancel()

    async def _serve_one(self, handler: _Handler, plain: socket.socket) -> None:
        try:
            stream = await self._stream(plain)
            if stream is not None:
                async with stream:
                    await handler(stream)
        finally:
            self._intake.open.ended()
            self._one_ended()

    async def _obey_term(self, obeying: Any, *, task_status: Any) -> None:
        with obeying, self._library.open_signal_receiver(signal.SIGTERM) as signals:
            task_status.started()
            async for _ in signals:
                self._intake.request_drain()
                self._pause.cancel()
