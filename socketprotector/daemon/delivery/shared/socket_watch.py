"""Watches for sockets that were shut down, and for stranded clients.

A client is stranded if no generation accepts, or is about to accept, from the socket where the
client waits.  A generation counts as accepting only if all its workers have the socket.  A rescue
starts another generation (event `stranded`), which accepts from the client's socket.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from functools import partial

from ....core.events import Stranded
from ....system.listener import Listener
from ....system.loop import READ, SHUT
from ....system.sock_diag import Line
from . import canary_watch
from .accept_watch import AcceptWatch, Backlogs, known_clients
from .open_counts import has_open
from .probes import Probes
from .shared_listeners import SharedListeners, Steering
from .turns import Turns

#: Finishing workers (workers that were ordered to finish) may still accept clients for a moment.
#: So if finishing workers might accept all stranded clients, a rescue starts only after
#: FIRST_RESCUE_S.  The pause between two rescues (the back-off) begins at FIRST_RESCUE_S and
#: doubles up to LAST_RESCUE_S.
FIRST_RESCUE_S = 1.0
LAST_RESCUE_S = 600.0

_RESCUE = "steering-rescue"
_REPAIR = "steering-repair"
_REPAIR_AGAIN_S = 0.1
_MOUNTED = "clients use a mount of an old socket file; mount the folder, not the file"


class SocketWatch(Backlogs):
    """Wakes us when clients need a rescue, or when a socket needs a repair."""

    def __init__(
        self,
        listeners: SharedListeners,
        turns: Turns,
        probes: Probes,
        steering: Steering,
    ) -> None:
        self._listeners, self._turns, self._probes = listeners, turns, probes
        runtime = listeners.host.runtime
        self._loop, self._log, self._post = runtime.loop, runtime.log, runtime.post
        self._steering = steering
        self.accept_watch = AcceptWatch(self._loop, self)
        self.canary: canary_watch.CanaryWatch | None = None  # None: there was no canary yet
        self._ended = False
        self._rescue_s = 0.0  # the pause between the last rescue and the next rescue
        self._rescued_at = 0.0

    def end(self) -> None:
        """Stop watching."""
        self._ended = True
        for watch, _ in self._watches():
            watch.end()
        for each in self._listeners.living:
            self.unwatch(each)
        self._loop.cancel(_RESCUE)
        self._loop.cancel(_REPAIR)

    def note_new_release(self) -> None:
        """Note a new release: end the back-off that earlier stranded clients have caused."""
        self._rescue_s = 0.0

    def end_back_off(self) -> None:
        """End the back-off, and cancel a planned rescue."""
        self._loop.cancel(_RESCUE)
        self._rescue_s = 0.0

    def look_again(self) -> None:
        """Look for stranded clients now: the last worker that could accept them may be gone."""
        self._loop.cancel(_RESCUE)
        self.watch()
        clients_wait = any(each.has_waiting(number) for each, number in self._without_worker())
        if clients_wait and not self._ended:
            self._plan_rescue()

    def unwatch(self, listener: Listener) -> None:
        """Stop watching a listener's sockets, which may be replaced before the next watch()."""
        for each in listener.sockets:
            self._loop.unwatch(each.fileno())

    def follow_canary(self) -> None:
        """Watch the present canary, if there is one."""
        if self.canary is None and self._turns.share is not None:
            parts = self._listeners, self._turns, self._probes
            self.canary = canary_watch.CanaryWatch(*parts, self.watch)
        if self.canary is not None:
            self.canary.follow()

    def watch_later(self) -> None:
        """Watch again after a pause, because a worker may shut its socket down repeatedly."""
        self._loop.call_after(_REPAIR, _REPAIR_AGAIN_S, self.watch)

    def _without_worker(self) -> list[tuple[Listener, int]]:
        """Return the sockets at which a client would be stranded (see the module docstring)."""
        return [
            (each, number)
            for each in self._listeners.living
            for number in range(len(each.sockets))
            if not self._turns.is_served(each, number)
        ]

    def watch(self) -> None:
        """Watch for sockets that are shut down, and for stranded clients.

        If an AcceptWatch awaits the next client, watch for this client, too.
        """
        if self._ended:
            return
        if self._turns.current not in self._turns.accepting.values():
            self.accept_watch.end()
        without_worker = self._without_worker()
        if not without_worker:
            self._loop.cancel(_RESCUE)
        # While a rescue is planned, stranded clients need not wake us.
        stranding = [] if self._loop.due(_RESCUE) is not None else without_worker
        awaited = [
            each
            for watch, sockets in self._watches(without_worker)
            if watch.awaits
            for each in sockets
        ]
        try:
            for each in self._listeners.living:
                each.note()  # for later repairs, and for is_passed_by()
                for number, listening in enumerate(each.sockets):
                    self._loop.unwatch(listening.fileno())
                    reads = (each, number) in stranding or (each, number) in awaited
                    events = SHUT | READ if reads else SHUT
                    look = partial(self._look_at, each, number)
                    self._loop.watch(listening.fileno(), look, events)
        except OSError:  # max_user_watches is reached, or no memory is left
            for each in self._listeners.living:
                self.unwatch(each)  # a socket left in epoll would wake us all the time
            self._loop.call_after(_REPAIR, _REPAIR_AGAIN_S, self.watch)
            if stranding:
                self._plan_rescue()

    def _look_at(self, listener: Listener, number: int) -> None:
        if not listener.is_alive(number):
            self._steering.repair(listener, number)
        elif (listener, number) in self._without_worker():
            self._plan_rescue()
        for watch, sockets in self._watches():
            # A worker may have accepted the client by now.  So note_client() does not conclude that
            # the client waits: it plans a look at the backlog.
            if watch.awaits and (listener, number) in sockets:
                watch.note_client(listener.index)

    def _watches(
        self, without_worker: Sequence[tuple[Listener, int]] = ()
    ) -> list[tuple[AcceptWatch, list[tuple[Listener, int]]]]:
        """Return accept_watch and the canary's watch, each with its sockets.

        accept_watch watches the current generation.  There is no second watch if there was no
        canary yet.
        without_worker: the sockets to leave out for accept_watch.
        """
        found = [(self.accept_watch, self._served_sockets(without_worker))]
        if self.canary is not None:
            found.append((self.canary.accept_watch, self.canary.sockets))
        return found

    def _served_sockets(
        self, without_worker: Sequence[tuple[Listener, int]]
    ) -> list[tuple[Listener, int]]:
        """Return the current generation's sockets, except those in `without_worker`."""
        known = [each for each in self._listeners.living if each.index not in self._turns.expected]
        found = [(each, self._turns.current % len(each.sockets)) for each in known]
        return [each for each in found if each not in without_worker]

    def waiting_clients(self) -> dict[int, Line]:
        """Return known_clients() of the current generation's sockets."""
        served = self._served_sockets(self._without_worker())
        return known_clients(served, lambda each, number: each.has_waiting(number))

    def has_open(self, index: int) -> bool:
        return has_open(self._listeners, self._served_sockets(()), index)

    def report_untaken(self, seconds: float, waiting: int, ever: bool, at: frozenset[int]) -> None:
        """Report the addresses at which workers do not accept."""
        # Record these listeners for never_accepted(), but only if there was a canary: perhaps this
        # generation was the canary before it got all clients.
        if self.canary is not None and not ever:
            generation = max(self._turns.routed, default=0)
            self.canary.never_accepted = generation, at - self.accept_watch.accepted
        addresses = [each.settings.address for each in self._listeners.living if each.index in at]
        self._listeners.host.report_untaken(seconds, waiting, ever, " ".join(addresses))

    def never_accepted(self, generation: int) -> Collection[int]:
        """Return the indices of listeners at which a generation surely has accepted no client.

        We record such listeners only if there was a canary.  We return them only for the newest
        generation.  An older generation may have got the route back, and may have accepted clients
        since.
        """
        if self.canary is None or generation != max(self._turns.accepting, default=0):
            return ()
        canary, at = self.canary.never_accepted
        return at if canary == generation else ()

    def stranded(self, *, held: bool) -> tuple[str, ...]:
        """Return messages about stranded clients, once a rescue was needed; none during a hold."""
        if held or not self._rescue_s:
            return ()
        return tuple(
            f"{each.settings.address}: clients wait, and no worker has their socket; "
            "SocketProtector starts the last good command for them: see `crashes` if it fails"
            for each, number in self._without_worker()
            if each.has_waiting(number)
        )

    def _plan_rescue(self) -> None:
        """Call _rescue() now, or after a pause in which finishing workers may accept the clients.

        If clients wait at a socket that no finishing worker has, we omit this pause.  But after a
        recent rescue there is always a pause (the back-off).
        """
        leaving, may_accept = {number for number, _ in self._turns.leaving.values()}, True
        for each, number in self._without_worker():
            self._loop.unwatch(each.socket_for(number).fileno())
            finishing = {left_number % len(each.sockets) for left_number in leaving}
            may_accept &= number in finishing or not each.has_waiting(number)
        since_s = time.monotonic() - self._rescued_at
        if since_s > LAST_RESCUE_S:
            self._rescue_s = 0.0
        delay_s = max(FIRST_RESCUE_S if may_accept else 0.0, self._rescue_s - since_s)
        if delay_s > 0:
            self._loop.call_after(_RESCUE, delay_s, self._rescue)
        else:
            self._rescue()

    def _rescue(self) -> None:
        """If clients are stranded, post Stranded, which starts a generation."""
        unreadable = self._probes.discard()
        readable = [
            (each, number)
            for each, number in self._without_worker()
            if (each.index, number) not in unreadable
        ]
        waiting = [(each, number) for each, number in readable if each.has_waiting(number)]
        if waiting:
            addresses = " ".join(each.settings.address for each, _ in waiting)
            passed_by = any(each.is_passed_by(number) for each, number in waiting)
            hint = _MOUNTED if passed_by else None
            self._log.write("warning", "stranded", listen=addresses, hint=hint)
            self._rescued_at = time.monotonic()
            self._rescue_s = min(2 * self._rescue_s or FIRST_RESCUE_S, LAST_RESCUE_S)
            self._post(Stranded())
        if unreadable:
            self._loop.call_after(_RESCUE, FIRST_RESCUE_S, self._rescue)
        self.watch()  # so that clients wake us again if no generation can be opened now
