"""Tells HAProxy whether to send clients to an instance, at its agent-check.

HAProxy connects and sends the name of an instance (`agent-send "web\\n"`); it is answered with one
line, and the connection ends:

    up 100%         it is ready.  So it is while it is held: its clients wait and are served
    up ready 100%   the same, and undo a drain; see below
    up drain        it is a lame duck: no new clients, those that are there go on
    down #WORD      it does not serve; the word is its phase

An instance that does not answer, or that is not there, gets no answer either: HAProxy then leaves
everything as it is, and its own check (`check`) decides.

Only the agent undoes a drain that it has ordered, and it does that with `ready`.  But that undoes
also what an operator has set in HAProxy (`set server ... state maint`), so it is not said for ever:
only for a minute after a drain, and after the first look at an instance that was started anew, or
at any by an exporter that was started anew, for neither knows what HAProxy was told before.

No weight by load: leastconn sees that sooner.  No last words: anyone may read HAProxy's page.

Source: HAProxy 2.6, configuration manual, 5.2, "agent-check" and "agent-send".
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from socketserver import BaseRequestHandler

from socketprotector.ctl.api import Status, is_lame_duck, measure, why_not_ready

from .bounded import CONNECTION_S, BoundedServer
from .collector import ProtectorCollector

#: How long `ready` is said: many checks, whatever agent-inter is (2 s by default).
READY_S = 60.0
_WORD = re.compile(r"[a-z-]{1,32}")
_NAME_BYTES = 256


@dataclass(frozen=True, slots=True)
class Told:
    """What HAProxy was told of an instance."""

    #: That of the instance, as its status has it: another one is another instance.
    started_at: float | None
    #: When it was first told that it is ready, after a drain or at all; None: not yet.
    ready_since_s: float | None = None


def advise(before: Told | None, status: Status, now_s: float) -> tuple[Told, str]:
    """Return the line for an instance, and what is to be remembered until the next one.

    before: what was remembered of it; None: it was never asked for.  now_s: of a monotonic clock.
    """
    started_at = measure(status, "started_at")
    known = before if before is not None and before.started_at == started_at else Told(started_at)
    if is_lame_duck(status):
        return Told(started_at), "up drain"
    if why := why_not_ready(status):
        return known, f"down #{why if _WORD.fullmatch(why) else 'not-serving'}"
    since_s = now_s if known.ready_since_s is None else known.ready_since_s
    line = "up ready 100%" if now_s - since_s < READY_S else "up 100%"
    return Told(started_at, since_s), line


class Agent(BoundedServer):
    """Answers HAProxy's agent-checks."""

    def __init__(
        self,
        address: tuple[str, int],
        instances: ProtectorCollector,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Bind and listen.  Raises OSError."""
        self._instances, self._clock = instances, clock
        self._told: dict[str, Told] = {}  # by the path of the control socket
        self._telling = threading.Lock()
        super().__init__(address, _Handler)

    def answer(self, name: str) -> str:
        """Return the line for the instance of that name; empty where it does not answer."""
        found = [each for _, each in self._instances.ask_one(name)]
        if len(found) != 1 or found[0] is None or found[0].result is None:
            return ""
        path = found[0].path
        with self._telling:
            self._told[path], line = advise(self._told.get(path), found[0].result, self._clock())
        return line


class _Handler(BaseRequestHandler):
    """One check."""

    server: Agent

    def handle(self) -> None:
        name = self._name()
        if not name:
            return
        self.server.asked(self.request)
        if line := self.server.answer(name):
            self.request.sendall(f"{line}\n".encode())

    def _name(self) -> str:
        """Read the name; empty where none has come in time."""
        until_s, read = time.monotonic() + CONNECTION_S, b""
        while b"\n" not in read:
            left_s = until_s - time.monotonic()
            if left_s <= 0 or len(read) > _NAME_BYTES:
                return ""
            self.request.settimeout(left_s)
            piece = self.request.recv(_NAME_BYTES)
            if not piece:
                return ""
            read += piece
        return read.partition(b"\n")[0].decode(errors="replace").strip()
