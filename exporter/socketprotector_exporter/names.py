"""Looks names of hosts up, without one that nobody answers for delaying another.

getaddrinfo() cannot be given up, and takes 10 s and more where a name server is silent.  So each
name has a thread for it, and is asked with what was found last.  The threads are daemons: no end of
the program waits for them.

Source: getaddrinfo(3), resolv.conf(5).
"""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import suppress


class Names:
    """The addresses that names have had, in the event loop of who asks."""

    def __init__(self) -> None:
        self._known: dict[str, list[str]] = {}
        self._under_way: dict[str, asyncio.Future[list[str]]] = {}

    async def addresses(self, name: str) -> list[str]:
        """Return what was found last, and have it looked up for the next time.

        Waits where nothing is known.  Raises OSError, UnicodeError and RuntimeError: no thread.
        """
        under_way = self._under_way.get(name) or self._look_up(name)
        known = self._known.get(name)
        return await asyncio.shield(under_way) if known is None else known

    def forget(self) -> None:
        """Nobody asks any more: what was found may be so no longer."""
        self._known.clear()

    def _look_up(self, name: str) -> asyncio.Future[list[str]]:
        loop = asyncio.get_running_loop()

        def look_up() -> None:
            found: list[str] | Exception
            try:
                all_of_it = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
                found = [str(each[4][0]) for each in all_of_it]
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
            self._known.pop(name, None)  # as the servers say; these are there, and know of none
        under_way.set_exception(found)
        under_way.exception()  # nobody may wait for it
