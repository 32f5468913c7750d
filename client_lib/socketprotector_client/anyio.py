"""Connections for anyio, on asyncio and on trio: an anyio.abc.Listener.

anyio's own listeners hand their socket to the loop below them, and trio takes no subclass.

Source: anyio.readthedocs.io, "API reference", anyio.abc.Listener.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from typing import Any, Awaitable, Callable, Optional, Tuple

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread

from .address import ListenAddress
from .errors import Drained
from .shared_epoll import BesideEpoll, loop_of_trio
from .worker import current

#: Called with the stream of a connection.
Handler = Callable[[anyio.abc.SocketStream], Awaitable[object]]


class Listener(anyio.abc.Listener[anyio.abc.SocketStream]):
    """A listener of anyio's kind, with or without a protector."""

    def __init__(
        self, address: Optional[ListenAddress] = None, *, limit: Optional[int] = None
    ) -> None:
        """Bind `address` where there is no protector.

        `address`, `limit` and errors are those of `connections`.
        """
        self._intake = current().open_intake(address, limit)
        self._closed = False
        self._pause = anyio.CancelScope()
        self._loop: Tuple[object, str] = (None, "")  # beside whose epoll the intake's is

    async def serve(
        self, handler: Handler, task_group: Optional[anyio.abc.TaskGroup] = None
    ) -> None:
        """Await handler(stream) in a task for each connection; return when drained.

        The stream is closed after the handler.  An exception in a handler ends all, unless it runs
        in a task_group of yours.  On drain, handlers finish before this returns.  SIGTERM
        begins the drain where the program does not handle it, in the main thread.
        """
        async with anyio.create_task_group() as own:
            if (
                threading.current_thread() is threading.main_thread()
                and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            ):
                await own.start(self._obey_term)
            try:
                while True:
                    (task_group or own).start_soon(self._serve_one, handler, await self._take())
            except anyio.EndOfStream:
                own.cancel_scope.cancel()

    async def accept(self) -> anyio.abc.SocketStream:
        """Return the next connection, which is the caller's; says READY=1 the first time.

        When the worker drains it waits until all connections that it returned are closed, then
        raises anyio.EndOfStream.  Raises anyio.ClosedResourceError after aclose.
        """
        return await _stream(await self._take())

    async def aclose(self) -> None:
        """Accept no more.  What was accepted stays open."""
        if not self._closed:
            self._closed = True
            anyio.notify_closing(self._intake.fileno())
            BesideEpoll.take_back(*self._loop, self._intake)
            self._intake.close()
        await anyio.lowlevel.checkpoint()

    @property
    def extra_attributes(self) -> dict[Any, Callable[[], Any]]:
        """What anyio's listeners tell of themselves: the address of the first listener."""
        return {
            anyio.abc.SocketAttribute.local_address: lambda: self._intake.source.sockname,
        }

    async def _take(self) -> socket.socket:
        current().ready()
        await anyio.lowlevel.checkpoint()  # before, for after it there is a connection to lose
        while not self._closed:
            try:
                connection = self._intake.get(0)
            except Drained:
                await self._last_one_closed()
                raise anyio.EndOfStream from None
            if connection is not None:
                return self._intake.open.exchange(connection)
            if self._loop[0] is None:
                self._loop = _running_loop()
                BesideEpoll.put(*self._loop, self._intake)
            with anyio.CancelScope() as self._pause:
                await anyio.wait_readable(self._intake.fileno())
        raise anyio.ClosedResourceError

    async def _last_one_closed(self) -> None:
        self._intake.await_last()
        while len(self._intake.open):
            await anyio.wait_readable(self._intake.fileno())
        self._intake.recount()
        # In a thread: a callback may want this very loop to do something.
        await anyio.to_thread.run_sync(current().drain.finish)

    async def _serve_one(self, handler: Handler, plain: socket.socket) -> None:
        try:
            async with await _stream(plain) as stream:
                await handler(stream)
        finally:
            self._intake.open.ended()

    async def _obey_term(
        self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM) as signals:
            task_status.started()
            async for _ in signals:
                self._intake.ask_to_stop()
                self._intake.end()
                self._pause.cancel()


def _running_loop() -> Tuple[object, str]:
    """Return what holds the epoll of asyncio's or trio's running loop, and under which name."""
    loop = asyncio._get_running_loop()
    if loop is not None:
        return getattr(loop, "_selector", loop), "_selector"
    return loop_of_trio(), "_epoll"


async def _stream(plain: socket.socket) -> anyio.abc.SocketStream:
    kind = anyio.abc.UNIXSocketStream if plain.family == socket.AF_UNIX else anyio.abc.SocketStream
    try:
        return await kind.from_socket(plain)
    except BaseException:
        plain.close()
        raise
