"""Starts probers (programs/prober.py), and exchanges messages with them.

A prober either sends HTTP probes over connections that we pass to it, or forwards the connections
of a listening socket.  The prober exits when we exit or close our socket to it (the line).
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
        heard: Callable[[str], None] = lambda why: None,
        ended: Ended,
        late: Callable[[str], None] = lambda why: None,
        forwards: tuple[ProbeTarget, socket.socket] | None = None,
    ) -> None:
        """Start the process.  Raises OSError.

        heard: called for each answer, with the reason why it is bad; "" for a good answer.
        late: called instead of `heard`, with the reason, if no answer came in time.
        ended: called with how the process exited, unless close() has ended it.
        forwards: (target, socket); the prober forwards the socket's connections to the target.
        """
        self._heard, self._ended, self._late = heard, ended, late
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
                "prober.py", arguments, descriptors, loop, self._has_ended
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

        limit_s: how long a good answer may take.  left_s: how much of this time is left.  Answers
        to earlier probes are ignored from now on.  Raises OSError.
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
        """Kill a prober that does not answer; `ended` is called as usual."""
        if self._process is not None:
            self._process.process.kill_group()

    def _on_message(self, text: str) -> None:
        # The text has a sign, the probe's number, a space, and why the answer is bad.  The sign "~"
        # means: no answer in time (programs/prober.py).
        number, _, why = text[1:].partition(" ")
        if number == str(self._number):
            (self._late if text[:1] == "~" else self._heard)(why)

    def _has_ended(self, how: str) -> None:
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
