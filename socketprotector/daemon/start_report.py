"""Reports to the launching process whether the first generation is serving.

The launching process is the command that the operator has started.  It waits for our report
(launch/await_verdict.py), and exits with a matching status.  Meanwhile it asks us what the start
waits for, and shows our answer.  Each of our messages is a packet with a JSON object and a newline:
a launching process of an earlier version reads lines from a stream.  In the foreground no process
waits for the report, and the reason for a failure goes to the terminal.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial

from ..model.errors import Refusal
from ..system import inherited
from ..system.loop import Loop
from ..system.terminal import tell


class StartReport:
    """Sends the result of the first start; no second result follows.

    Before the result, the launching process can ask what the start waits for.
    """

    def __init__(self, line: int | None, terminal: int | None) -> None:
        """Take ownership of the descriptors.

        line: the socket to the launching process; None: no process waits.
        terminal: where a failure is shown in the foreground; None: nowhere.
        """
        self._socket = socket.socket(fileno=line) if line is not None else None
        self._terminal = terminal
        self._unwatch: Callable[[], None] = lambda: None
        self._gone: Callable[[], None] = lambda: None
        self.failure = ""  # why the start has failed; set by Reports and Resident

    def watch(
        self, loop: Loop, gone: Callable[[], None], waits: Callable[[], Sequence[object]]
    ) -> None:
        """Whenever the launching process asks, send what the start waits for.

        gone: called if the launching process exits, or cancels the start, before the result.
        waits: returns what the start waits for.
        """
        self._gone = gone
        if self._socket is not None:
            self._unwatch = partial(loop.unwatch, self._socket.fileno())

            def on_readable() -> None:
                if self._read_question():
                    self._send(waits_for=waits())
                else:
                    self._unwatch()
                    gone()

            loop.watch(self._socket.fileno(), on_readable)

    def _read_question(self) -> bool:
        """Read what the launching process has sent; return False at end of file or an error."""
        try:
            return self._socket is not None and bool(self._socket.recv(64, socket.MSG_DONTWAIT))
        except OSError:
            return False

    def descriptors(self) -> dict[str, int]:
        """Return, by name, the descriptors that the report needs after an upgrade or a crash."""
        found = {}
        if self._socket is not None:
            found[inherited.LAUNCHER] = self._socket.fileno()
        if self._terminal is not None:
            found[inherited.TERMINAL] = self._terminal
        return found

    @property
    def is_due(self) -> bool:
        """Whether the result of the start was not sent yet."""
        return self._socket is not None or self._terminal is not None

    def started(self) -> None:
        """Report that the first generation is serving, and close the descriptors.

        If that cannot be sent, the launching process has exited, or another process has spoilt the
        connection: then cancel the start, because the launching process would report a failure.
        """
        if self._socket is not None:
            self._unwatch()
            if not self._send(ready=True):
                self._gone()
                return
            self._socket.close()
            self._socket = None
        if self._terminal is not None:
            os.close(self._terminal)
            self._terminal = None

    def failed(self, status: int) -> None:
        """Report, just before this process exits, that the start has failed.

        After started(), do nothing.

        Leave the socket open.  When this process exits, the launching process reads end of file,
        and so knows of the exit.
        """
        self._send(
            failed=self.failure or "stopped before a generation was serving",
            status=status or Refusal.status,
        )
        if self._terminal is not None and self.failure:
            tell(self.failure, self._terminal)

    def _send(self, **fields: object) -> bool:
        """Send a message; return False if it cannot be sent."""
        if self._socket is None:
            return False
        data = json.dumps(fields).encode() + b"\n"
        try:
            # The socket's buffer has room for all reports, even if none is read.
            self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True
