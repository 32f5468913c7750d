"""Connections for trio: a trio.abc.Listener, and the function `serve` for simple servers.

trio accepts no subclass of socket, neither for listeners nor for connections, so the drop-in
Listener does not work there.

Source: trio.readthedocs.io, "The abstract Stream API", trio.abc.Listener.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Awaitable, Callable, Optional

import trio

from .async_listener import TaskListener

if TYPE_CHECKING:
    from .address import ListenAddress

#: Called with the stream of a connection.
Handler = Callable[[trio.SocketStream], Awaitable[object]]


class Listener(TaskListener, trio.abc.Listener[trio.SocketStream]):
    """A listener for trio, with or without a protector."""

    _library, _waiting, _ended = trio, trio.lowlevel, trio.EndOfChannel

    async def accept(self) -> trio.SocketStream:
        """Return the next connection, which the caller owns; the first call sends READY=1.

        When the worker drains, this waits until all returned connections are closed, because
        trio.serve_listeners cancels handlers at the end.  Then it raises trio.EndOfChannel.
        Raises trio.ClosedResourceError after aclose.
        """
        return await self._stream(await self._take())

    @staticmethod
    async def _stream(plain: socket.socket) -> trio.SocketStream:
        return trio.SocketStream(trio.socket.from_stdlib_socket(plain))


async def serve(
    handler: Handler, address: Optional[ListenAddress] = None, *, limit: Optional[int] = None
) -> None:
    """Await handler(stream) in a task for each connection; return when drained.

    The stream is closed after the handler.  An exception in a handler cancels all handlers and is
    raised here, as by trio.serve_tcp.  On drain, handlers finish before this returns.

    `address`, `limit`, SIGTERM, READY=1 and errors are those of `connections`.
    """
    async with Listener(address, limit=limit) as listener, trio.open_nursery() as nursery:
        await listener._serve(handler, nursery, nursery)
