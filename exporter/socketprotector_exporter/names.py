"""Look-ups of host names in which a slow name delays no other.

getaddrinfo() cannot be cancelled, and takes 10 s and more if a name server is silent.  So each
look-up has its own thread, and callers meanwhile use the last result.  The threads are daemon
threads, so the program does not wait for them at its end.

Source: getaddrinfo(3), resolv.conf(5).
"""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import suppress

_NUMERIC = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV


class Names:
    """The last known addresses of names; for one event loop."""

    def __init__(self) -> None:
        self._known: dict[str, list[str]] = {}
        self._under_way: dict[str, asyncio.Future[list[str]]] = {}

    async def addresses(self, name: str) -> list[str]:
        """Return the last known addresses, and start a look-up for the next call.

        Without known addresses, wait for the look-up.  Raises OSError and UnicodeError, and
        RuntimeError if no thread can be started.
        """
        under_way = self._under_way.get(name) or self._look_up(name)
        known = self._known.get(name)
        return await asyncio.shield(under_way) if known is None else known

    def forget(self) -> None:
        """Drop the known addresses, which may be outdated at the next use."""
        self._known.clear()

    def _look_up(self, name: str) -> asyncio.Future[list[str]]:
        loop = asyncio.get_running_loop()

        def look_up() -> None:
            found: list[str] | Exception
            try:
                infos = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
                # Numeric, with the interface of a link-local address.
                found = [socket.getnameinfo(each[4], _NUMERIC)[0] for each in infos]
            except Exception as error:
                found = error
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._take, name, found)

        threading.Thread(target=look_up, name="look-up", daemon=True).start()
        self._under_way[name] = loop.create_future()
        return self._under_way[name]

    def _take(self, name: str, found: list[str] | Exception) -> None:
        under_way = self._under_way.pop(name)
        if not isinstance(found, Exception):
            self._known[name] = found
            under_way.set_result(found)
            return
        if not (isinstance(found, socket.gaierror) and found.errno == socket.EAI_AGAIN):
            self._known.pop(name, None)  # the name server has answered that there is no address
        under_way.set_exception(found)
        under_way.exception()  # marks it as read, because perhaps no caller waits for it
