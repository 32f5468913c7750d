"""Detects a canary whose workers do not accept their share of the new clients.

A canary is a new generation that at first gets only a share of the clients.  The route is the
generation that gets all other clients.  The canary's clients wait at other sockets than the route's
clients.  The canary fails if its workers accept none of the clients at one of its sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from ....core.events import Untaken
from ....system.listener import Listener
from ....system.sock_diag import Line
from .. import UNTAKEN_S, untaken_message
from .accept_watch import AcceptWatch, Backlogs, known_clients
from .open_counts import has_open
from .probes import Probes
from .shared_listeners import SharedListeners
from .turns import Turns

#: The canary fails if clients wait at a listener, and the canary's workers accept none there for
#: this time.  After a first client is accepted at the listener, the limit is UNTAKEN_S: the workers
#: may just be busy.
CANARY_NEVER_TAKEN_S = 2.0


class CanaryWatch(Backlogs):
    """Watches the backlogs of a canary's sockets."""

    def __init__(
        self,
        listeners: SharedListeners,
        turns: Turns,
        probes: Probes,
        watch: Callable[[], None],
    ) -> None:
        """watch: updates the descriptors that the loop watches."""
        self._listeners, self._turns, self._probes = listeners, turns, probes
        runtime = listeners.host.runtime
        self._post, self._watch = runtime.post, watch
        self._canary = 0  # the generation's number; 0: no canary
        #: The last generation reported for waiting clients, and the indices of those of its
        #: listeners at which it had never accepted a client.  Set by report_untaken(), and by
        #: SocketWatch for the generation that has the route.
        self.never_accepted: tuple[int, Collection[int]] = (0, ())
        limits_s = CANARY_NEVER_TAKEN_S, UNTAKEN_S
        timer = "canary-untaken"
        self.accept_watch = AcceptWatch(runtime.loop, self, limits_s=limits_s, timer=timer)

    def follow(self) -> None:
        """Watch the present canary, if there is one.

        If only the canary's share has changed, the watch does not restart.
        """
        share = self._turns.share
        canary = share.generation if share is not None else 0
        if canary != self._canary:
            self._canary = canary
            if canary:
                self.accept_watch.begin(served_before=False)
            else:
                self.accept_watch.end()

    @property
    def sockets(self) -> list[tuple[Listener, int]]:
        """The sockets at which clients of the canary may wait."""
        turns, share = self._turns, self._turns.share
        if share is None:
            return []
        number = 1 - turns.current
        return [
            (each, number)
            for each in self._listeners.living
            if each.has_sibling and share.generation in turns.accepting_at(each, number)
        ]

    def watch(self) -> None:
        self._watch()

    def waiting_clients(self) -> dict[int, Line]:
        """Return known_clients() of the canary's sockets."""
        return known_clients(self.sockets, self._probes.clients_wait)

    def has_open(self, index: int) -> bool:
        return has_open(self._listeners, self.sockets, index)

    def report_untaken(self, seconds: float, waiting: int, ever: bool, at: frozenset[int]) -> None:
        """Let the canary fail: post Untaken with the addresses at which its clients wait."""
        if not ever:
            self.never_accepted = self._canary, at - self.accept_watch.accepted
        addresses = [each.settings.address for each in self._listeners.living if each.index in at]
        reason = f"{untaken_message(seconds, ever=ever)} at {' '.join(addresses)}"
        self._post(Untaken(self._canary, f"{reason}; clients waiting: {waiting}"))
