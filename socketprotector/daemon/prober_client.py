"""Starts probers (programs/prober.py), and exchanges messages with them.

A prober either sends HTTP probes over our connections, or forwards the connections of a listening
socket.  Our socket to the prober is called the line; when the line is closed, the prober exits.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable

from ..model.probe_spec import ProbeSpec
from ..model.text import in_units
from ..system.channel import rights_of
from ..system.cleanup import on_error
from ..system.helper import Ended, HelperProcess, Line
from ..system.loop import Loop
from .delivery.probe_target import ProbeTarget

_LINE_FD, _LISTENING_FD = 3, 4


class Prober:
    """One prober process, and our line to it."""

    def __init__(
        self,
        loop: Loop,
        *,
        answered: Callable[[str], None] = lambda why: None,
        ended: Ended,
        late: Callable[[str], None] = lambda why: None,
        forwards: tuple[ProbeTarget, socket.socket] | None = None,
    ) -> None:
        """Start the process.  Raises OSError.

        answered: called when a result comes in time, with a text: why the probe failed, or "" if
        the answer was good.  With `forwards`: called with "" for each connection to the target.
        late: called if no answer has come in time, with a text that says so.
        ended: called with a text that says how the process exited; not called after close().
        forwards: (target, socket); the prober forwards the socket's connections to the target.
        """
        self._answered, self._ended, self._late = answered, ended, late
        self._process: HelperProcess | None = None
        self._number = 0  # the number of the last probe
        arguments = [str(_LINE_FD)]
        self._line, theirs = Line.make(loop, self._on_message)
        descriptors = {_LINE_FD: theirs.fileno()}
        with on_error(self.close), theirs:
            if forwards is not None:
                target, listening = forwards
                arguments.append(str(_LISTENING_FD))
                descriptors[_LISTENING_FD] = listening.fileno()
                self._line.socket.send(_message(target, ProbeSpec("forward")), socket.MSG_DONTWAIT)
            self._process = HelperProcess.start_own(
                "prober.py", arguments, descriptors, loop, self._on_end
            )

    def send(
        self,
        connection: socket.socket,
        target: ProbeTarget,
        spec: ProbeSpec,
        limit_s: float,
        left_s: float,
    ) -> None:
        """Send a probe over the caller's connection, which need not be established yet.

        From now on, answers to earlier probes are ignored.  Raises OSError.

        left_s: how long the probe may still take.  limit_s: the probe's whole limit, which only
        appears in the text for `late`.
        """
        self._number += 1
        limit = {"limit_s": left_s, "limit": in_units(limit_s)}
        message = _message(target, spec, **limit, number=self._number)
        self._line.socket.sendmsg([message], [rights_of(connection.fileno())], socket.MSG_DONTWAIT)

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
        # The text is a sign, the probe's number, a space, and why the probe failed (see
        # programs/prober.py).  The sign "~" means that no answer came in time.
        number, _, why = text[1:].partition(" ")
        if number == str(self._number):
            (self._late if text[:1] == "~" else self._answered)(why)

    def _on_end(self, how: str) -> None:
        self.close()
        self._ended(how)


def _message(target: ProbeTarget, spec: ProbeSpec, **more: object) -> bytes:
    mark = target.mark
    return json.dumps(
        {
            "address": target.address,
            "source": mark.source if mark is not None else "",
            "options": mark.options if mark is not None else (),
            "kind": spec.kind,
            "host": spec.host,
            "path": spec.path,
            "good": spec.good,
            **more,
        }
    ).encode()
