"""The answers to HAProxy's agent-check: whether to send clients to an instance.

HAProxy connects and sends the name of an instance (`agent-send "web\\n"`).  The agent answers with
one line, and closes the connection:

    up 100%         the instance is ready; also during a hold, after which its clients are served
    up ready 100%   the same; and HAProxy ends a drain, see below
    up drain        the instance is a lame duck: no new clients, but present ones stay
    down #WORD      the instance does not serve; the word is its phase

If the instance is missing or does not answer, the agent sends nothing.  HAProxy then keeps the last
answer: a server that is drained or down stays so, and otherwise HAProxy's own check decides.

After an agent has answered `drain`, only `ready` ends the drain in HAProxy.  But `ready` also
undoes an operator's `set server ... state maint`.  So the agent sends `ready` for a minute only.
The minute begins with the agent's first `ready` after a drain or a restart of the instance.  After
a restart of the exporter, each instance gets such a minute: earlier answers are then unknown.

The answer has no weight by load, because HAProxy's leastconn notices load sooner.  The answer has
no last words of workers, because anyone may read HAProxy's page.

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

#: How long the agent sends `ready`: for many checks with any agent-inter (2 s by default).
READY_S = 60.0
_WORD = re.compile(r"[a-z-]{1,32}")
_NAME_BYTES = 256


@dataclass(frozen=True, slots=True)
class Advice:
    """The agent's last advice to HAProxy about an instance."""

    #: The start time in the instance's status, which changes with a restart.
    started_at: float | None
    #: The time of the first `ready` since a drain or a start; None: none was sent yet.
    ready_since_s: float | None = None


def advise(before: Advice | None, status: Status, now_s: float) -> tuple[Advice, str]:
    """Return the advice for an instance, and its line.

    before: the last advice; None: this is the first check.  now_s: a monotonic time.
    """
    started_at = measure(status, "started_at")
    known = before if before is not None and before.started_at == started_at else Advice(started_at)
    if is_lame_duck(status):
        return Advice(started_at), "up drain"
    if why := why_not_ready(status):
        return known, f"down #{why if _WORD.fullmatch(why) else 'not-serving'}"
    since_s = now_s if known.ready_since_s is None else known.ready_since_s
    line = "up ready 100%" if now_s - since_s < READY_S else "up 100%"
    return Advice(started_at, since_s), line


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
        self._advice: dict[str, Advice] = {}  # by the path of the control socket
        self._advising = threading.Lock()
        super().__init__(address, _Handler)

    def answer(self, name: str) -> str:
        """Return the line for the instance with this name; "" if the instance does not answer."""
        found = [each for _, each in self._instances.query_one(name)]
        if len(found) != 1 or found[0] is None or found[0].result is None:
            return ""
        path = found[0].path
        with self._advising:
            before = self._advice.get(path)
            self._advice[path], line = advise(before, found[0].result, self._clock())
        return line


class _Handler(BaseRequestHandler):
    """One check."""

    server: Agent

    def handle(self) -> None:
        name = self._name()
        if not name:
            return
        self.server.begin_answer(self.request)
        if line := self.server.answer(name):
            self.request.sendall(f"{line}\n".encode())

    def _name(self) -> str:
        """Return the name that HAProxy sends; empty if none comes in time."""
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
