"""Serving in asyncio, with the streams of asyncio.start_server.

Each turn of the event loop takes one connection.  So a worker never takes the whole queue before
its first handler has run.
"""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Awaitable, Callable, Optional, Set

from .asyncio_epoll import join_loop
from .connection import Connection
from .errors import Drained
from .intake import Intake
from .log import Logger
from .signals import term_is_free
from .worker import current

if TYPE_CHECKING:
    from .address import ListenAddress

_log = Logger(__name__)

#: Called with the two streams of a connection.
StreamHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[object]]


async def aserve(
    handler: StreamHandler,
    address: Optional[ListenAddress] = None,
    *,
    limit: Optional[int] = None,
) -> None:
    """Await handler(reader, writer) in a task for each connection; return when drained.

    The writer is closed after the handler.  An exception in a handler is
    logged, and serving continues.  On drain, handlers finish before this returns; a
    cancellation of this call cancels the handlers.

    `address`, `limit`, SIGTERM, READY=1 and errors are those of `connections`.
    `listener_of(writer)` returns the listener's address.
    """
    worker = current()
    intake = worker.open_intake(address, limit)
    loop, number = asyncio.get_running_loop(), intake.fileno()
    service = _Service(intake, handler)
    loop.add_reader(number, service.take_one)
    join_loop(intake, number)
    handles_term = term_is_free()
    if handles_term:
        loop.add_signal_handler(signal.SIGTERM, service.drain)
    worker.ready()
    try:
        error = await service.ended
        while service.tasks:
            await asyncio.wait(service.tasks)
        if error is not None:
            raise error
    finally:
        if handles_term:
            loop.remove_signal_handler(signal.SIGTERM)
        loop.remove_reader(number)
        intake.close()
        for task in service.tasks:
            task.cancel()
    # In a thread: a callback may need this event loop.
    await loop.run_in_executor(None, worker.drain.finish)


class _Service:
    def __init__(self, intake: Intake, handler: StreamHandler) -> None:
        self._loop = asyncio.get_running_loop()
        self._intake = intake
        self._handler = handler
        self.tasks: Set[asyncio.Task[None]] = set()
        #: Done when no more connections are taken; its result is None at a drain, or the error.
        self.ended: asyncio.Future[Optional[Exception]] = self._loop.create_future()

    def take_one(self) -> None:
        try:
            connection = self._intake.get_now()
        except Drained:
            self._end(None)
        except Exception as error:
            self._end(error)
        else:
            self._intake.queue.move_back_in_loop()
            if connection is not None:
                task = self._loop.create_task(self._serve_one(connection))
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)

    def drain(self) -> None:
        self._intake.request_drain()
        self._intake.end()
        self._end(None)

    def _end(self, error: Optional[Exception]) -> None:
        self._loop.remove_reader(self._intake.fileno())
        if not self.ended.done():
            self.ended.set_result(error)

    async def _serve_one(self, connection: Connection) -> None:
        listener = connection.listener
        try:
            reader, writer = await asyncio.open_connection(sock=connection)
        except BaseException:
            connection.close()
            raise
        try:
            await self._handler(reader, writer)
        except Exception:
            self._intake.board.count_error()
            _log.exception("handler failed for a client of %s", listener)
        finally:
            writer.close()
        try:
            await writer.wait_closed()
        except OSError:
            pass  # the client disconnected before all was written
