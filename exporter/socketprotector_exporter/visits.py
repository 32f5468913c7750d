"""Accepts the page's connections within a limit, so that idle ones do not use up descriptors.

uvicorn's own limit counts after accept: idle connections then use all descriptors, /metrics
gets none, and a listener that cannot accept stays readable and burns a core.  Here each connection
has a place.  Without a free place the listener is not watched, and the connection that has sent no
request for the longest time is closed.  A request's head is bounded in time and size.

Source: uvicorn's H11Protocol; asyncio's connect_accepted_socket.
"""

from __future__ import annotations

import asyncio
import inspect
import socket
from functools import partial
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

PLACES = 256
HEAD_BYTES = 16 * 1024
HEAD_S = 10.0
#: The pause after an accept that failed for lack of descriptors or memory.
_SHORT_S = 1.0


class Visits:
    """The connections of one listening socket."""

    def __init__(self, listening: socket.socket, config: uvicorn.Config, state: Any) -> None:
        """Accept from `listening`, for the uvicorn.Server with this config and state."""
        self._listening = listening
        self._free = PLACES
        self._is_watched = False
        #: Connections without a request yet, the oldest first, with the timers of their limits.
        self._waited_for: dict[_Visit, asyncio.TimerHandle] = {}
        self._beginning: set[asyncio.Task[None]] = set()
        arguments: dict[str, Any] = {"config": config, "server_state": state}
        if "app_state" in inspect.signature(H11Protocol).parameters:  # uvicorn 0.21
            arguments["app_state"] = {}
        self._make = partial(_Visit, self, **arguments)

    def watch(self) -> None:
        """Begin to accept."""
        if not self._is_watched:
            self._is_watched = True
            self._listening.setblocking(False)
            asyncio.get_running_loop().add_reader(self._listening, self._accept)

    def _pause(self) -> None:
        self._is_watched = False
        asyncio.get_running_loop().remove_reader(self._listening)

    def _accept(self) -> None:
        if not self._free:
            self._pause()  # until a connection has ended
            if oldest := next(iter(self._waited_for), None):
                self.note_request(oldest)
                oldest.transport.abort()
            return
        try:
            accepted, _ = self._listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError:
            self._pause()
            asyncio.get_running_loop().call_later(_SHORT_S, self.watch)
            return
        self._free -= 1
        task = asyncio.get_running_loop().create_task(self._begin(accepted))
        self._beginning.add(task)
        task.add_done_callback(self._beginning.discard)

    async def _begin(self, accepted: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._make, accepted)
        except OSError:
            accepted.close()
            self._left()

    def await_request(self, visit: _Visit) -> None:
        """Record that a connection waits for a request, which must come in time."""
        if visit not in self._waited_for:
            loop = asyncio.get_running_loop()
            self._waited_for[visit] = loop.call_later(HEAD_S, visit.transport.abort)

    def note_request(self, visit: _Visit) -> None:
        """Record that a connection has its request, or no longer waits for one."""
        if (timer := self._waited_for.pop(visit, None)) is not None:
            timer.cancel()

    def ended(self, visit: _Visit) -> None:
        """Record that a connection has ended."""
        self.note_request(visit)
        self._left()

    def _left(self) -> None:
        self._free += 1
        self.watch()


class _Heads(h11.Connection):
    """Parses the heads of requests, and nothing after a head that announces a body."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, HEAD_BYTES)
        self.has_body = False

    def next_event(self) -> Any:
        """Return the next event, except a body's: parsing small chunks would cost much time."""
        if self.has_body:
            return h11.NEED_DATA
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = (b"transfer-encoding", b"content-length")
            self.has_body = any(name in names and value != b"0" for name, value in event.headers)
        return event


class _Visit(H11Protocol):
    """One connection."""

    conn: _Heads

    def __init__(self, visits: Visits, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.conn = _Heads()
        self._visits = visits

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._visits.await_request(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._visits.ended(self)

    def data_received(self, data: bytes) -> None:
        if self.conn.has_body:
            return
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.has_body:
            self.transport.close()
        self._look()

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            self._visits.await_request(self)
        else:
            self._visits.note_request(self)
