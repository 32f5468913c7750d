"""Starts probers (programs/prober.py), and exchanges messages with them.

A prober sends requests over TLS, and forwards connections.  Our socket to the prober is called the
line; when the line is closed, the prober exits.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable

from ..model.text import in_units
from ..system.channel import rights_of
from ..system.cleanup import on_error
from ..system.helper import Ended, HelperProcess, Line
from ..system.loop import Loop
from .delivery.probe_target import ProbeTarget

_LINE_FD = 3


class Prober:
    """One prober process, and our line to it."""

    def __init__(
        self,
        loop: Loop,
        *,
        answered: Callable[[str], None] = lambda why: None,
        ended: Ended,
        late: Callable[[str], None] = lambda why: None,
    ) -> None:
        """Start the process.  Raises OSError.

        answered: called when all of an answer has come in time, with "", or with why the
        connection failed.  Without a request: called with "" for each forwarded connection.
        late: called if an answer has not ended in time, with a text that says so.
        ended: called with a text that says how the process exited; not called after close().
        """
        self._answered, self._ended, self._late = answered, ended, late
        self._process: HelperProcess | None = None
        self._number = 0  # the number of the last request
        self._line, theirs = Line.make(loop, self._on_message)
        descriptors = {_LINE_FD: theirs.fileno()}
        with on_error(self.close), theirs:
            self._process = HelperProcess.start_own(
                "prober.py", [str(_LINE_FD)], descriptors, loop, self._on_end
            )

    def send(
        self,
        request: bytes,
        host: str,
        connection: socket.socket,
        *,
        limit_s: float,
        left_s: float,
    ) -> socket.socket:
        """Send a request over TLS, and return a non-blocking socket that receives the answer.

        From now on, reports on earlier requests are ignored.  Raises OSError.

        host: the Host header.  connection: the caller's, which need not be established yet.
        left_s: how long the probe may still take.  limit_s: the probe's whole limit, which only
        appears in the text for `late`.
        """
        self._number += 1
        message = {
            "host": host,
            "request": request.decode("ascii"),
            "number": self._number,
            "limit_s": left_s,
            "limit": in_units(limit_s),
        }
        answer, theirs = socket.socketpair()
        with on_error(answer.close), theirs:
            answer.setblocking(False)
            given = [rights_of(each.fileno()) for each in (connection, theirs)]
            self._line.socket.sendmsg([json.dumps(message).encode()], given, socket.MSG_DONTWAIT)
        return answer

    def forward(self, connection: socket.socket, target: ProbeTarget) -> None:
        """Forward a connection to a target.  Raises OSError."""
        given = [rights_of(connection.fileno())]
        self._line.socket.sendmsg([_target_message(target)], given, socket.MSG_DONTWAIT)

    def close(self) -> None:
        """Close the line, so that the prober exits."""
        self._line.close()
        if self._process is not None:
            self._process.close()
            self._process = None

    def kill(self) -> None:
        """Kill a silent prober; `ended` is then called."""
        if self._process is not None:
            self._process.process.kill_group()

    def _on_message(self, text: str) -> None:
        # The text is a sign, the request's number, a space, and why the connection failed (see
        # programs/prober.py).  The sign "~" means that the answer did not end in time.
        number, _, why = text[1:].partition(" ")
        if number == str(self._number):
            (self._late if text[:1] == "~" else self._answered)(why)

    def _on_end(self, how: str) -> None:
        self.close()
        self._ended(how)


def _target_message(target: ProbeTarget) -> bytes:
    mark = target.mark
    return json.dumps(
        {
            "address": target.address,
            "source": mark.source if mark is not None else "",
            "options": mark.options if mark is not None else (),
        }
    ).encode()
