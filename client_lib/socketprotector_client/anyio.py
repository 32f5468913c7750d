"""Connections for anyio, on asyncio and on trio: an anyio.abc.Listener.

The drop-in Listener does not work there: anyio's own listeners pass their socket to the event loop,
and trio accepts no subclass of socket.

Source: anyio.readthedocs.io, "API reference", anyio.abc.Listener.
"""

from __future__ import annotations

import socket
from typing import Any, Awaitable, Callable, Optional

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread

from .async_listener import TaskListener

#: Called with the stream of a connection.
Handler = Callable[[anyio.abc.SocketStream], Awaitable[object]]


class Listener(TaskListener, anyio.abc.Listener[anyio.abc.SocketStream]):
    """A listener for anyio, with or without a protector."""

    _library, _waiting, _ended = anyio, anyio, anyio.EndOfStream

    async def serve(
        self, handler: Handler, task_group: Optional[anyio.abc.TaskGroup] = None
    ) -> None:
        """Await handler(stream) in a task for each connection; return when drained.

        The stream is closed after the handler.  An exception in a handler cancels all handlers and
        is raised here, unless they run in your own task_group.  On drain, handlers finish before
        this returns.  SIGTERM begins the drain if this is the main thread and the program does not
        handle the signal.
        """
        async with anyio.create_task_group() as own:
            await self._serve(handler, own, task_group or own)

    async def accept(self) -> anyio.abc.SocketStream:
        """Return the next connection, which the caller owns; the first call sends READY=1.

        When the worker drains, this waits until all returned connections are closed, and then
        raises anyio.EndOfStream.  Raises anyio.ClosedResourceError after aclose.
        """
        while True:
            stream = await self._stream(await self._take())
            if stream is not None:
                return stream

    @property
    def extra_attributes(self) -> dict[Any, Callable[[], Any]]:
        """The typed attributes of anyio's listeners: the address of the first listener."""
        return {anyio.abc.SocketAttribute.local_address: lambda: self._intake.source.sockname}

    @staticmethod
    async def _stream(plain: socket.socket) -> Optional[anyio.abc.SocketStream]:
        unix, tcp = anyio.abc.UNIXSocketStream, anyio.abc.SocketStream
        kind = unix if plain.family == socket.AF_UNIX else tcp
        try:
            return await kind.from_socket(plain)
        except ValueError:  # "the socket must be connected": the client has reset it
            plain.close()
            return None
        except BaseException:
            plain.close()
            raise
