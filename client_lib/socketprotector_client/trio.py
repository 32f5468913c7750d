"""Connections for trio: a trio.abc.Listener, and `serve` where nothing else is needed.

trio takes no subclass of socket, neither for listening nor for what was accepted, so the drop-in
Listener cannot be used there.

Source: trio.readthedocs.io, "The abstract Stream API", trio.abc.Listener.
"""

from __future__ import annotations

import signal
import socket
import threading
from typing import Awaitable, Callable, Optional

import trio

from .address import ListenAddress
from .errors import Drained
from .shared_epoll import BesideEpoll, loop_of_trio
from .worker import current

#: Called with the stream of a connection.
Handler = Callable[[trio.SocketStream], Awaitable[object]]


class Listener(trio.abc.Listener[trio.SocketStream]):
    """A listener of trio's kind, with or without a protector."""

    def __init__(
        self, address: Optional[ListenAddress] = None, *, limit: Optional[int] = None
    ) -> None:
        """Bind `address` where there is no protector.

        `address`, `limit` and errors are those of `connections`.
        """
        self._intake = current().open_intake(address, limit)
        self._closed = False
        self._pause = trio.CancelScope()
        self._loop: object = None  # beside whose epoll the intake's is

    async def accept(self) -> trio.SocketStream:
        """Return the next connection, which is the caller's; says READY=1 the first time.

        When the worker drains it waits until all connections that it returned are closed, for
        trio.serve_listeners cancels their handlers at the end; then it raises trio.EndOfChannel.
        Raises trio.ClosedResourceError after aclose.
        """
        return trio.SocketStream(trio.socket.from_stdlib_socket(await self._take()))

    async def aclose(self) -> None:
        """Accept no more.  What was accepted stays open."""
        if not self._closed:
            self._closed = True
            trio.lowlevel.notify_closing(self._intake.fileno())
            BesideEpoll.take_back(self._loop, "_epoll", self._intake)
            self._intake.close()
        await trio.lowlevel.checkpoint()

    async def _take(self) -> socket.socket:
        current().ready()
        await trio.lowlevel.checkpoint()  # before, for after it there is a connection to lose
        while not self._closed:
            try:
                connection = self._intake.get(0)
            except Drained:
                await self._last_one_closed()
                raise trio.EndOfChannel from None
            if connection is not None:
                return self._intake.open.exchange(connection)
            if self._loop is None:
                self._loop = loop_of_trio()
                BesideEpoll.put(self._loop, "_epoll", self._intake)
            with trio.CancelScope() as self._pause:
                await trio.lowlevel.wait_readable(self._intake.fileno())
        raise trio.ClosedResourceError

    async def _last_one_closed(self) -> None:
        self._intake.await_last()
        while len(self._intake.open):
            await trio.lowlevel.wait_readable(self._intake.fileno())
        self._intake.recount()
        # In a thread: a callback may want this very loop to do something.
        await trio.to_thread.run_sync(current().drain.finish)

    async def _serve_one(self, handler: Handler, plain: socket.socket) -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(plain))
        try:
            await handler(stream)
        finally:
            await trio.aclose_forcefully(stream)
            self._intake.open.ended()

    async def _obey_term(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            task_status.started()
            async for _ in signals:
                self._intake.ask_to_stop()
                self._intake.end()
                self._pause.cancel()


async def serve(
    handler: Handler, address: Optional[ListenAddress] = None, *, limit: Optional[int] = None
) -> None:
    """Await handler(stream) in a task for each connection; return when drained.

    The stream is closed after the handler.  An exception in a handler ends all, as with
    trio.serve_tcp.  On drain, handlers finish before this returns.

    `address`, `limit`, SIGTERM, READY=1 and errors are those of `connections`.
    """
    async with Listener(address, limit=limit) as listener, trio.open_nursery() as nursery:
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        ):
            await nursery.start(listener._obey_term)
        try:
            while True:
                nursery.start_soon(listener._serve_one, handler, await listener._take())
        except trio.EndOfChannel:
            nursery.cancel_scope.cancel()
