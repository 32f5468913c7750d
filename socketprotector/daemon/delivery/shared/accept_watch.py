"""Detects that workers do not accept, under --handoff listener.

No connection passes through us there, and none may wake us needlessly.  So only the first client
of a generation wakes us.  After a while we ask the kernel for the backlog (sock_diag), and then
again: accept() takes the oldest, so if all clients of the first answer are still in the second,
none was accepted in between.  Where the backlog is empty we wait for the next client.  So nothing
happens while no client connects, and in normal operation we wake up at most twice in LOOK_S.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from ....model.lazy_dataclass import KW_ONLY, field, mutable
from ....system.loop import Loop
from ....system.sock_diag import Line, stands
from .. import NEVER_TAKEN_S, UNTAKEN_S

#: How soon to look, and to look again: while none was ever accepted, and when one was.
FIRST_LOOK_S = NEVER_TAKEN_S / 4
LOOK_S = UNTAKEN_S / 2
#: To ask the kernel takes at most this share of our time, however many connections there are.
ASKING_SHARE = 0.1
_LOOK = "untaken"


@mutable
class AcceptWatch:
    """Watches over the generation that new clients come to."""

    loop: Loop
    _: KW_ONLY
    #: Returns the clients in each backlog, by the listener's index, as far as is known.
    lines: Callable[[], Mapping[int, Line]]
    #: `awaits` has changed: whether came() is to be called for the next client.
    await_one: Callable[[], None]
    #: For so many seconds none of so many clients was accepted, whether any ever was, and at which
    #: listeners.  Called once for each generation.
    say: Callable[[float, int, bool, frozenset[int]], None]
    awaits: bool = False
    _said: bool = False
    _accepted: set[int] = field(default_factory=set)  # listeners by which a client was
    _before_us: bool = False  # it had its turn already: a client may have been, by any
    #: The backlog, and since when all of it waits; empty: a client came, and no more is known.
    _waiting: dict[int, tuple[Line, float]] = field(default_factory=dict)

    def begin(self, *, before_us: bool) -> None:
        """Another generation has its turn, or has it again."""
        self._said, self._before_us = False, before_us
        self._accepted.clear()
        self._await()

    def end(self) -> None:
        """No generation has its turn any more."""
        self.loop.cancel(_LOOK)
        self._waiting.clear()
        self.awaits = False

    def came(self, index: int) -> None:
        """A client has come by a listener, and waits to be accepted."""
        self._waiting[index] = frozenset(), time.monotonic()
        self.awaits = False
        self.await_one()
        self._look_later(0.0)

    @property
    def seconds(self) -> float | None:
        """For how long no waiting client was accepted; None: not long enough to report."""
        return max(self._passed_over().values(), default=None)

    def _await(self) -> None:
        self.end()
        self.awaits = True
        self.await_one()

    def _look_later(self, asking_s: float) -> None:
        seldom = self._before_us or self._waiting.keys() <= self._accepted
        delay_s = LOOK_S if seldom else FIRST_LOOK_S
        self.loop.call_after(_LOOK, max(delay_s, asking_s / ASKING_SHARE), self._look)

    def _look(self) -> None:
        began = time.monotonic()
        found = self.lines()
        for index, (before, since) in list(self._waiting.items()):
            line = found.get(index)
            if line is None or not line or not stands(before, line):
                self._accepted.add(index)  # or it is not known: looked at as seldom
                del self._waiting[index]
            else:
                self._waiting[index] = line, since if before else began
        for index, line in found.items():
            if line:
                self._waiting.setdefault(index, (line, began))
        if not self._waiting:
            self._await()
            return
        passed_over = self._passed_over()
        if passed_over and not self._said:
            self._said = True
            count = sum(len(self._waiting[index][0]) for index in passed_over)
            ever = self._before_us or passed_over.keys() <= self._accepted
            self.say(max(passed_over.values()), count, ever, frozenset(passed_over))
        self._look_later(time.monotonic() - began)

    def _passed_over(self) -> dict[int, float]:
        """Return the listeners at which no client was accepted for too long, and for how long."""
        now = time.monotonic()
        found = {index: now - since for index, (line, since) in self._waiting.items() if line}
        return {index: seconds for index, seconds in found.items() if seconds >= self._limit(index)}

    def _limit(self, index: int) -> float:
        return UNTAKEN_S if self._before_us or index in self._accepted else NEVER_TAKEN_S
