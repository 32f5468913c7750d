"""Serve connections in asyncio, with the streams of asyncio.start_server.

One connection is taken for each turn of the event loop, so that a worker
never takes a whole queue before its first handler has run.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from typing import Awaitable, Callable, Optional, Set

from .address import ListenAddress
from .connection import Connection
from .errors import Drained
from .intake import Intake
from .worker import current

_log = logging.getLogger(__name__)

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
    logged, the others go on.  On drain, handlers finish before this returns; if
    it is cancelled they are cancelled too.

    `address`, `limit`, SIGTERM, READY=1 and errors are those of `connections`.
    `listener_of(writer)` tells the listener.
    """
    worker = current()
    intake = worker.open_intake(address, limit)
    service = _Service(intake, handler)
    service.start()
    worker.ready()
    try:
        await service.drained
        await service.finish()
        if service.error is not None:
            raise service.error
    finally:
        service.stop()
    # In a thread: a callback may want this very loop to do something.
    await asyncio.get_running_loop().run_in_executor(None, worker.drain.finish)


class _Service:
    def __init__(self, intake: Intake, handler: StreamHandler) -> None:
        self._loop = asyncio.get_running_loop()
        self._intake = intake
        self._handler = handler
        self._tasks: Set[asyncio.Task[None]] = set()
        self._handles_term = False
        #: Why no more is taken, if that is not the drain.
        self.error: Optional[Exception] = None
        self.drained: asyncio.Future[None] = self._loop.create_future()

    def start(self) -> None:
        self._loop.add_reader(self._intake.fileno(), self._on_readable)
        self._intake.join_loop(self._intake.fileno())
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        ):
            self._loop.add_signal_handler(signal.SIGTERM, self._on_term)
            self._handles_term = True

    def stop(self) -> None:
        if self._handles_term:
            self._loop.remove_signal_handler(signal.SIGTERM)
        self._loop.remove_reader(self._intake.fileno())
        self._intake.close()
        for task in self._tasks:
            task.cancel()

    async def finish(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _on_term(self) -> None:
        self._intake.ask_to_stop()
        self._intake.end()
        self._settle(None)

    def _on_readable(self) -> None:
        try:
            connection = self._intake.get(0)
        except Drained:
            self._settle(None)
        except Exception as error:
            self._settle(error)
        else:
            self._intake.rest()
            if connection is not None:
                task = self._loop.create_task(self._serve_one(connection))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _settle(self, error: Optional[Exception]) -> None:
        self._loop.remove_reader(self._intake.fileno())
        if not self.drained.done():
            self.error = error
            self.drained.set_result(None)

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
            self._intake.failed()
            _log.exception("handler failed for a client of %s", listener)
        finally:
            writer.close()
        try:
            await writer.wait_closed()
        except OSError:
            pass  # the client was gone before all was written
