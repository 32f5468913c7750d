"""The exit status of the command that was typed is the outcome of the first start.

So the launching process waits for it, and gets one JSON object a line (launch/await_verdict.py is
the other side).  In the foreground nothing waits, and the reason of a failure goes to the terminal.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from functools import partial

from ..model.errors import Refusal
from ..system import inherited
from ..system.loop import Loop
from ..system.terminal import tell


class StartReport:
    """Says how the start went: once, and only the start."""

    def __init__(self, line: int | None, terminal: int | None, pid: int) -> None:
        """Take ownership of the descriptors.  pid: of whose end it is to wait for."""
        self._pid = pid
        self._socket = socket.socket(fileno=line) if line is not None else None
        self._terminal = terminal
        self._unwatch: Callable[[], None] = lambda: None
        self.failure = ""

    def watch(self, loop: Loop, gone: Callable[[], None]) -> None:
        """Call back when the launching process exits before it gets a report."""
        if self._socket is not None:
            self._unwatch = partial(loop.unwatch, self._socket.fileno())

            def hung_up() -> None:
                self._unwatch()
                gone()

            loop.watch(self._socket.fileno(), hung_up)
            self._say(pid=self._pid)

    def descriptors(self) -> dict[str, int]:
        """Return what the next program needs to tell it in our place, by name."""
        found = {}
        if self._socket is not None:
            found[inherited.LAUNCHER] = self._socket.fileno()
        if self._terminal is not None:
            found[inherited.TERMINAL] = self._terminal
        return found

    def started(self) -> None:
        """Tell that the first generation serves; this is the last word."""
        self._say(ready=True)
        if self._socket is not None:
            self._unwatch()
            self._socket.close()
            self._socket = None
        if self._terminal is not None:
            os.close(self._terminal)
            self._terminal = None

    def failed(self, status: int) -> None:
        """Tell, at the very end, that the start has failed and nothing is left behind.

        The line stays open until this process has ended: that is what the other side waits for.
        """
        self._say(
            failed=self.failure or "it was stopped before anything served",
            status=status or Refusal.status,
        )
        if self._terminal is not None and self.failure:
            tell(self.failure, self._terminal)

    def _say(self, **words: object) -> None:
        if self._socket is not None:
            try:
                # A few lines in all, for which there is room though it should not read them.
                data = json.dumps(words).encode() + b"\n"
                self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError:
                pass  # it was killed; its end of the line says so to the loop
