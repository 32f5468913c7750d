"""The launching process, as the resident one sees it: somebody who waits for a verdict.

One JSON object a line over a socketpair; see launch.py for the other side.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable

from .loop import Loop


class Launcher:
    """Tells the launcher how the start went.  In the foreground there is none."""

    def __init__(self, fd: int | None) -> None:
        """Take ownership of the descriptor."""
        self._socket = socket.socket(fileno=fd) if fd is not None else None
        self._loop: Loop | None = None
        self.failure = ""

    def watch(self, loop: Loop, gone: Callable[[], None]) -> None:
        """Call back when the launcher goes away before it was told anything."""
        if self._socket is not None:
            self._loop = loop
            loop.watch(self._socket.fileno(), gone)
            self._say(pid=os.getpid())

    def started(self) -> None:
        """Tell that the first generation serves; this is the last word."""
        self._say(ready=True)
        self.close()

    def failed(self, status: int) -> None:
        """Tell, at the very end, that the start has failed and nothing is left behind."""
        self._say(failed=self.failure, status=status)
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            if self._loop is not None:
                self._loop.unwatch(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _say(self, **words: object) -> None:
        if self._socket is not None:
            try:
                self._socket.sendall(json.dumps(words).encode() + b"\n")
            except OSError:
                pass  # it was killed; its end of the line says so to the loop
