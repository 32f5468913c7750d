"""Detects workers that do not accept, under --handoff listener.

In this mode no connection passes through SocketProtector, and waking SocketProtector for each
connection would be costly.  So the event loop watches the sockets only until a client comes.  From
then on we *look* at intervals: a look reads the backlogs from the kernel (sock_diag).  accept()
takes the oldest client first.  So if all clients that the previous look found are still in the
backlog, no client was accepted meanwhile.  When a look finds no client, the event loop watches the
sockets again.

A *line* lists the clients that one look found in a backlog (Line of system/sock_diag.py).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping

from ....model.lazy_dataclass import field, mutable
from ....system.listener import Listener
from ....system.loop import Loop
from ....system.sock_diag import Line, none_accepted, unaccepted
from .. import NEVER_TAKEN_S, UNTAKEN_S

#: Queries to the kernel take at most this share of our time, however many connections there are.
QUERY_SHARE = 0.1


class Backlogs(ABC):
    """The backlogs of the sockets that get new clients."""

    @abstractmethod
    def waiting_clients(self) -> Mapping[int, Line]:
        """Return the clients in each backlog, by the listener's index.

        A listener is missing if its backlog is unknown.
        """

    @abstractmethod
    def has_open(self, index: int) -> bool:
        """Return whether a connection that was accepted at a listener is surely still open."""

    @abstractmethod
    def watch(self) -> None:
        """Watch for the next client if AcceptWatch.awaits is True; otherwise stop watching."""

    @abstractmethod
    def report_untaken(self, seconds: float, waiting: int, ever: bool, at: frozenset[int]) -> None:
        """Report that the workers of a generation do not accept.

        seconds: for how long.  waiting: how many clients wait.  at: the indices of the listeners
        where these clients wait.  ever: True if workers have accepted, or may have accepted, a
        client at each of these listeners.
        """


def known_clients(
    sockets: Iterable[tuple[Listener, int]], clients_wait: Callable[[Listener, int], bool]
) -> dict[int, Line]:
    """Return the clients known to wait at these sockets, by listener index.

    If no client waits at a socket, the listener's line is empty.  If clients wait, but the query
    fails or lists no client, the listener is missing.

    A listener may have two sockets, one for each of two generations.  Over TCP, the query cannot
    distinguish them: the line lists the clients of both.
    """
    found: dict[int, Line] = {}
    for each, number in sockets:
        if not clients_wait(each, number):
            found[each.index] = ()
            continue
        try:
            line = unaccepted(each.socket_for(number))
        except OSError:
            continue
        if line:  # empty: accepted by now, or the socket belongs to another network namespace
            found[each.index] = line
    return found


@mutable
class AcceptWatch:
    """Watches whether a generation accepts its new clients."""

    loop: Loop
    backlogs: Backlogs
    #: Two limits.  We report a listener if workers accept none of its waiting clients for longer
    #: than the limit.  The first limit applies until a client was accepted, or may have been
    #: accepted, at the listener.  The second limit applies afterwards.
    limits_s: tuple[float, float] = (NEVER_TAKEN_S, UNTAKEN_S)
    timer: str = "untaken"
    awaits: bool = False  # True: `backlogs` must call note_client() when a client comes
    _reported: bool = False
    #: The indices of listeners at which a client was accepted, or may have been.
    accepted: set[int] = field(default_factory=set)
    #: True: the generation has served before, so it may have accepted clients of any listener.
    _served_before: bool = False
    #: Listener index -> the line that the last look found, and since when no client was accepted.
    #: The line is empty if a client has come and no look has followed yet.
    _waiting: dict[int, tuple[Line, float]] = field(default_factory=dict)

    def begin(self, *, served_before: bool) -> None:
        """Watch the generation that gets clients from now on.

        served_before: True if the generation also got clients earlier.
        """
        self._reported, self._served_before = False, served_before
        self.accepted.clear()
        self._await()

    @property
    def runs(self) -> bool:
        """Return whether a generation is watched."""
        return self.awaits or bool(self._waiting)

    @property
    def has_accepted(self) -> bool:
        """Return whether the generation has accepted a client since begin(), or may have."""
        return bool(self.accepted)

    def end(self) -> None:
        """Stop watching the generation."""
        self.loop.cancel(self.timer)
        self._waiting.clear()
        self.awaits = False

    def note_client(self, index: int) -> None:
        """Record that a client has come to a listener."""
        self._waiting[index] = frozenset(), time.monotonic()
        self.awaits = False
        self.backlogs.watch()
        self._look_later(0.0)

    @property
    def untaken_s(self) -> float | None:
        """Return for how long no waiting client was accepted.

        None: the time is below the limit in `limits_s`, or no client waits.
        """
        return max(self._overdue().values(), default=None)

    def is_stuck(self) -> bool:
        """Look now; return whether workers at some listener are stuck.

        Workers are stuck at a listener if clients wait there, and none was accepted there since the
        last look.  If the last look found no client there, one client that waits now is enough.
        If no client is known to wait at any listener, return False without a look.
        """
        if not self._waiting:
            return False
        before = {index: line for index, (line, _) in self._waiting.items() if line}
        self._look()
        now = {index: line for index, (line, _) in self._waiting.items()}
        return any(index not in before or none_accepted(before[index], now[index]) for index in now)

    def _await(self) -> None:
        self.end()
        self.awaits = True
        self.backlogs.watch()

    def _look_later(self, query_s: float) -> None:
        """Look again later; query_s: how long the query to the kernel took."""
        accepted_before = self._served_before or self._waiting.keys() <= self.accepted
        never_s, later_s = self.limits_s
        delay_s = later_s / 2 if accepted_before else never_s / 4
        self.loop.call_after(self.timer, max(delay_s, query_s / QUERY_SHARE), self._look)

    def _look(self) -> None:
        began = time.monotonic()
        found = self.backlogs.waiting_clients()
        for index, (before, since) in list(self._waiting.items()):
            line = found.get(index)
            if line is None or not line or not none_accepted(before, line):
                # A client left or was accepted, or the backlog is unknown.  As a client may have
                # been accepted, the second limit applies from now on.
                self.accepted.add(index)
                del self._waiting[index]
            else:
                self._waiting[index] = line, since if before else began
        for index, line in found.items():
            if line:
                self._waiting.setdefault(index, (line, began))
        if not self._waiting:
            self._await()
            return
        overdue = self._overdue()
        if overdue and not self._reported:
            # A look misses clients that workers accept at once.  If such a client's connection is
            # still open, workers may be busy with this client.
            never = overdue.keys() - self.accepted
            self.accepted.update(index for index in never if self.backlogs.has_open(index))
            overdue = self._overdue()
        if overdue and not self._reported:
            self._reported = True
            count = sum(len(self._waiting[index][0]) for index in overdue)
            ever = self._served_before or overdue.keys() <= self.accepted
            seconds, at = max(overdue.values()), frozenset(overdue)
            self.backlogs.report_untaken(seconds, count, ever, at)
            if not self._waiting:  # the report has ended the canary, and so this watch
                return
        self._look_later(time.monotonic() - began)

    def _overdue(self) -> dict[int, float]:
        """Return the listeners that have reached their limit (`limits_s`).

        Listener index -> for how long no waiting client was accepted.
        """
        now = time.monotonic()
        found = {index: now - since for index, (line, since) in self._waiting.items() if line}
        return {index: seconds for index, seconds in found.items() if seconds >= self._limit(index)}

    def _limit(self, index: int) -> float:
        return self.limits_s[self._served_before or index in self.accepted]
