"""Ends connections of uvicorn at their turns in a spread: WebSockets with close code 1012.

An end of file would end a WebSocket without a close frame, and a request without its answer.  So
uvicorn ends each connection as at its own shutdown.  An answer that has begun goes on, but not for
long: its client gets the end of file later (spread.py).
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any, Dict, List

if TYPE_CHECKING:
    import uvicorn

_LONGEST_WAIT_S = 10.0


class Turns:
    """The connections of a server by descriptor."""

    def __init__(self, server: uvicorn.Server, loop: asyncio.AbstractEventLoop) -> None:
        self._open = server.server_state.connections
        self._loop = loop
        self._known: Dict[int, Any] = {}

    def end(self, numbers: List[int]) -> None:
        """End the connections with these descriptors, from another thread than the loop's.

        Waits for the loop: otherwise a busy loop would later end many due connections at once.
        """
        ended = threading.Event()
        try:
            self._loop.call_soon_threadsafe(self._end, numbers, ended)
        except RuntimeError:
            return  # the server has ended
        ended.wait(_LONGEST_WAIT_S)

    def _end(self, numbers: List[int], ended: threading.Event) -> None:
        ended.set()
        # An upgrade to WebSocket replaces a connection's protocol.
        if any(self._known.get(number) not in self._open for number in numbers):
            self._known = {_number_of(each): each for each in list(self._open)}
        for number in numbers:
            protocol = self._known.pop(number, None)
            if protocol is not None:
                protocol.shutdown()


def _number_of(protocol: Any) -> int:
    found: int = protocol.transport.get_extra_info("socket").fileno()
    return found
