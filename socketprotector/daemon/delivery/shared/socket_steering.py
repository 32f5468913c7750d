"""Steers new clients to the sockets of one generation, under --handoff listener.

Usually an address has two sockets, 0 and 1.  The old and the new generation have one socket each.
If an address has only one socket, both generations accept from it.  A TCP address leads to the
socket that a filter in the kernel selects (system/reuseport.py).  A UNIX path leads to the file of
one socket (system/path_group.py).

When the new generation is ready, we steer new clients to its socket.  The old generation then gets
no new clients.  Before we order the old generation to finish, we wait until it has accepted its
waiting clients and read from them.  Otherwise a worker might close their connections unread.
quiescing.py limits the wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from ....core.events import HeldClientsWait
from ....model.records import SteeringRecord
from ....system.listener import RESOURCE_ERRNOS, Listener
from ..probe_target import ProbeTarget
from .accept_watch import AcceptWatch
from .listener_hold import ListenerHold
from .probes import LATE_ACCEPT_S, Probes
from .quiescing import Quiescing
from .shared_listeners import SharedListeners, Steering
from .socket_repair import SocketRepair
from .socket_watch import SocketWatch
from .turns import Share, Turns

_STEER_AGAIN_S = 0.5


class SocketSteering(Steering):
    """Knows which generation accepts from which socket, and steers new clients."""

    def __init__(self, listeners: SharedListeners) -> None:
        self._listeners = listeners
        runtime = listeners.host.runtime
        self._loop, self._log = runtime.loop, runtime.log
        self._persist, self._post = runtime.persist, runtime.post
        self._not_held = ""  # why workers accept clients that we should hold; "": no fault
        self._written = self._current()  # the last value of which the state was written
        self.turns = Turns()
        self.hold = ListenerHold(listeners)
        self.probes = Probes(listeners, self.turns, self)
        self._watch = SocketWatch(listeners, self.turns, self.probes, self)
        self._quiescing = Quiescing(listeners, self.turns, self.probes, self)
        self._repairs = SocketRepair(listeners, self.turns, self.hold, self._watch, self)

    @property
    def is_steered(self) -> bool:
        """Return whether all new clients go to the right socket."""
        return not self._listeners.not_steered

    @property
    def accept_watch(self) -> AcceptWatch:
        """The watch that detects that the route's workers do not accept."""
        return self._watch.accept_watch

    @property
    def canary_watch(self) -> AcceptWatch | None:
        """The watch that detects that a canary's workers do not accept; None: no canary yet."""
        canary = self._watch.canary
        return canary.accept_watch if canary is not None else None

    def adopt(self, generation: int, socket_number: int) -> None:
        """Note from which socket an adopted generation accepts."""
        self.turns.accepting[generation] = socket_number
        # The earlier program may have been killed during a repair.
        for each in self._listeners.living:
            if each.is_alive(socket_number) and not each.is_sound(socket_number):
                self._repairs.repair(each, socket_number)
        self._repair_while_starting()
        self._watch.watch()

    def enter(self, generation: int, socket_number: int, *, fresh: bool = False) -> None:
        """Prepare each listener's socket for a generation whose workers will start soon.

        fresh: see Delivery.open(); if True, the back-off of rescues (socket_watch.py) ends.
        Raises OSError if we cannot prepare a socket that a new release (`fresh`) must have (see
        SocketRepair.must_be_reachable()).  A shortage of descriptors or memory raises no OSError.
        """
        if fresh:
            self._watch.note_new_release()
        for each in self._listeners.living:
            try:
                self._repairs.make_ready(each, socket_number)
            except OSError as error:  # unless we raise, the generation gets the socket as it is
                is_needed = self._repairs.must_be_reachable(each)
                if fresh and is_needed and error.errno not in RESOURCE_ERRNOS:
                    self._watch.watch()
                    raise
            self._repairs.undo_earlier_changes(each, socket_number, generation)
        self.turns.accepting[generation] = socket_number
        # make_ready() may have made a UNIX path's second socket, without which no hold is possible.
        self.steer()
        self._watch.watch()

    def note_new_worker(self, generation: int, knows: Callable[[int], bool]) -> None:
        """Record that a generation will get another worker, which inherits the present sockets.

        knows: returns whether the generation knows a listener, by index.
        """
        if self.turns.note_new_worker(generation, knows):
            # Write the state before the worker accepts: if we are killed, the next program must
            # know that the clients of these sockets have a worker.
            self._persist()

    def reach_as_client(
        self, name: str, knows: Callable[[int], bool] = lambda index: True
    ) -> ProbeTarget | None:
        """Return the target for probes of the serving generation; see Probes.reach_as_client()."""
        return self.probes.reach_as_client(name, knows)

    def forget(self, generation: int) -> None:
        """Forget a generation whose workers have all exited."""
        self.leave(generation)
        socket_number, _ = self.turns.leaving.pop(generation, (0, 0.0))
        self._undo_changes(generation, socket_number, gone=True)
        self._report_held_clients()  # perhaps a generation failed before it accepted held clients
        self._watch.look_again()

    def leave(self, generation: int) -> None:
        """Record that a generation's workers were ordered to finish."""
        socket_number = self.turns.leave(generation, time.monotonic())
        if socket_number is not None:
            self._undo_changes(generation, socket_number, gone=False)
        self.probes.discard()
        self._quiescing.end(generation)
        for each in self._quiescing.generations:
            if self._turn_away(each):
                self._quiescing.begin_again(each)
        self.adopt_held()
        self._watch.watch()

    def _undo_changes(self, generation: int, socket_number: int, *, gone: bool) -> None:
        """Undo a failed release's socket changes; if no generation accepts, raise short backlogs.

        gone: whether all workers of the generation have exited.
        """
        if not self._repairs.ended:  # during a close, new clients must stay refused
            self._repairs.options.end(generation, socket_number, self.turns.accepting, gone=gone)
        if self.turns.accepting and max(self.turns.accepting) < generation:  # a release has failed
            self._repair()

    def turn_hold(self, on: bool) -> None:
        """Begin or end a hold, which keeps new clients waiting (listener_hold.py)."""
        self.hold.turn(on)
        self.steer()
        if not on:  # held clients must not wait for a back-off that other clients have caused
            self._watch.end_back_off()
        self.adopt_held()
        self._report_held_clients()

    def adopt_held(self) -> None:
        free = self.turns.free
        if self.hold.on:
            return
        if free in self.turns.accepting.values():
            if any(each.has_held_client for each in self._listeners.living):
                self._post(HeldClientsWait())
            return
        is_passed_on = False
        for each in self._listeners.living:
            is_passed_on |= each.has_sibling and self.turns.pass_on(each)
            if each.is_reserved_for_clients:
                self._watch.unwatch(each)
                with suppress(OSError):  # the start of the next generation tries again
                    each.adopt_reserved(free)
                    self._listeners.note_bound(each)
        if is_passed_on:
            self.steer()
            self._persist()
        self._watch.watch()

    def _report_held_clients(self) -> None:
        """Post HeldClientsWait if held clients wait at a path's socket that no generation has."""
        free, living = self.turns.free, self._listeners.living
        is_idle = not self.hold.on and free not in self.turns.accepting.values()
        at_paths = (each for each in living if each.path and each.can_be_held)
        if is_idle and any(self.probes.clients_wait(each, free) for each in at_paths):
            self._post(HeldClientsWait())

    def expect(self, listener: Listener, *, dry_run: bool) -> None:
        """Steer a new listener's clients to the next generation, which will know the listener.

        dry_run: if True, steer to the current socket, because the next generation gets no clients.
        """
        if self.turns.expect(listener, dry_run=dry_run) == 1:
            # Clients must come to socket 1, but some may wait at socket 0: exchange the numbers.
            listener.swap()
        self.steer(listener)

    def turn_to(
        self,
        socket_number: int,
        *,
        served_before: bool = False,
        knows: Callable[[int], bool] | None = None,
        share: Share | None = None,
    ) -> None:
        """Steer new clients to socket `socket_number`, and a share of them to the other socket.

        served_before: whether the generation at `socket_number` has served before.  knows: returns
        whether this generation knows a listener, by index; None: no generation has this socket yet.
        Clients of an unknown listener stay at their present socket.  share: None: no share.
        """
        listeners, turns, canary = self._listeners.all, self.turns, self._watch.canary
        if canary is not None and turns.share and socket_number != turns.current:
            # The canary gets the route.  It counts as having served if it has accepted a client.
            served_before = canary.accept_watch.has_accepted
        # If only the share changes, accept_watch continues.
        is_watched = socket_number == turns.current and (share or turns.share) is not None
        turns.turn_to(socket_number, {each.index for each in listeners}, knows, share)
        places = {(e.index, n) for e in listeners for n in (0, 1) if turns.gets_clients(e, n)}
        self.probes.clients_come(places)
        self.probes.discard()  # perhaps the protector was killed before it could discard them
        self._repairs.repair_all()
        self.steer()
        # Try again: an earlier call may have failed because clients waited at the socket that was
        # free then.
        self.adopt_held()
        self._report_held_clients()  # perhaps the protector was killed before it could report
        self._watch.follow_canary()
        self._watch.watch()
        is_watched = is_watched and self.accept_watch.runs
        if socket_number in turns.accepting.values() and not is_watched:
            self.accept_watch.begin(served_before=served_before)

    def end_share(self) -> None:
        """End a share: steer all new clients to the route's socket."""
        if self.turns.share is not None:
            self.turns.share = None
            self.steer()
            self._watch.follow_canary()

    def record(self) -> SteeringRecord:
        """Return the record of the steering, for adopt_record() after an upgrade or a kill."""
        turns, probes = self.turns, self.probes
        return SteeringRecord(
            turns.current,
            tuple(turns.unserved),
            tuple(turns.expected.items()),
            tuple((generation, *left) for generation, left in turns.leaving.items()),
            self.hold.record,
            tuple(probes.probed),
            tuple(probes.probe_sources),
            self._repairs.options.record,
            tuple(turns.partly_served),
            tuple(turns.passed_on),
            self._groups,
            self._listeners.rights_record,
        )

    @property
    def _groups(self) -> tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]:
        """Index and group_record (order of sockets) of each listener that has a group_record."""
        records = ((each.index, each.group_record) for each in self._listeners.all)
        return tuple((index, *record) for index, record in records if record is not None)

    def adopt_record(self, record: SteeringRecord, *, held: bool) -> None:
        """Resume from the record that record() returned before an upgrade or a kill.

        held: whether a hold is in force; if not, a hold in the record ends now.
        """
        self.turns.adopt(record)
        orders = {index: (listed, order) for index, listed, order in record.groups}
        for each in self._listeners.all:
            each.group_record = orders.get(each.index)
        self._written = self._current()
        self.probes.probed, self.probes.probe_sources = set(record.asked), set(record.asked_from)
        self._repairs.options.record = record.options
        self._listeners.adopt_rights(record.rights)
        self.hold.record = record.hold
        if not held:
            self.hold.turn(on=False)

    def quiesce(
        self, generation: int, on_quiet: Callable[[], None], *, reads_on: bool = False
    ) -> None:
        """Call back when a replaced generation has accepted all its clients and read from them.

        The wait is limited: see Quiescing.begin().
        reads_on: whether the workers read from accepted clients even after the order to finish.
        If True, wait only until the clients are accepted.
        """
        leave_out = self._watch.never_accepted(generation)
        awaited = self._listeners.awaited(generation, leave_out)
        if generation not in self.turns.accepting or not awaited:
            on_quiet()
            return
        self._turn_away(generation)
        number = self.turns.accepting[generation]
        self._quiescing.begin(generation, number, on_quiet, leave_out=leave_out, reads_on=reads_on)

    def quiesce_last(self, generation: int, on_quiet: Callable[[], None], latest: float) -> None:
        """At a stop, call back when the last generation has accepted and read from its clients.

        Wait only for clients that came before this call.  Later clients are refused, or wait for
        the next start.  At a passed-in socket, later clients wait until the socket's owner (such as
        systemd) accepts them.  Exception: the generation may accept later clients at a listener's
        only socket.  The wait is limited: see Quiescing.begin().  latest: its `accept_until`.
        """
        number = self.turns.accepting.get(generation, 0)
        common = [each for each in self._listeners.living if not each.has_sibling]
        self.accept_watch.end()
        awaited = self.turns.not_given_back(self._listeners.pairs, number) or common
        if generation in self.turns.accepting and awaited:
            self._turn_away(generation)
            self._quiescing.begin(generation, number, on_quiet, common=common, accept_until=latest)
        else:
            on_quiet()

    def clients_may_be_accepted(self, listener: Listener) -> bool:
        """Return whether clients wait at a listener and workers may still accept them."""
        left_since = time.monotonic() - LATE_ACCEPT_S
        return any(
            listener.has_waiting(number)
            and self.turns.workers_may_accept(listener, number, left_since)
            for number in range(len(listener.sockets))
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """The present faults of listeners and of the steering, as messages."""
        lost = [
            f"{each.settings.address}: no client can connect; restart SocketProtector"
            for each in self._listeners.all
            if each.lost
        ]
        unsteered = [
            f"{address}: new clients may reach the wrong generation: {why}"
            for address, why in self._listeners.not_steered.items()
        ]
        if self._not_held and self.hold.on:
            unsteered.append(f"on hold, but workers accept new clients: {self._not_held}")
        return *lost, *self._repairs.warnings, *unsteered, *self._watch.stranded(held=self.hold.on)

    @property
    def has_passed_in_pair(self) -> bool:
        """Return whether a passed-in socket has a sibling: a second socket, which we bound."""
        return any(each.settings.foreign for each in self._listeners.pairs)

    def give_back(self) -> None:
        """At a passed-in address, steer new clients to the socket whose owner keeps listening."""
        self.turns.given_back = True
        if self.has_passed_in_pair:
            self.steer()

    def gets_no_client(self, generation: int) -> bool:
        turns = self.turns
        if turns.given_back or self._repairs.ended:
            return True
        is_replaced = turns.accepting[generation] != turns.current and not turns.share
        return is_replaced and not any(map(self._listeners.can_stray, self._listeners.all))

    def _turn_away(self, generation: int) -> bool:
        """If a generation gets new clients, steer them to the other socket, and return True."""
        number, turns, ended = self.turns.accepting[generation], self.turns, self._repairs.ended
        # Do nothing after end(), or if another generation accepts from the other socket.
        is_due = number == turns.current and not (ended or 1 - number in turns.accepting.values())
        if is_due:
            self.turn_to(1 - number)
        return is_due

    def end(self) -> None:
        """Stop all repairs: the listeners are about to be closed."""
        self._repairs.ended = True
        self._watch.end()

    def steer(self, only: Listener | None = None) -> bool:
        """Update the steering of all listeners, or of one; return whether all are steered.

        If steering fails, clients go to the same socket as before, whose workers keep accepting.
        """
        not_steered, not_held = dict[str, str](), ""
        if only:
            not_steered, not_held = {**self._listeners.not_steered}, self._not_held
        for each in (only,) if only else self._listeners.to_steer(closing=self._repairs.ended):
            try:
                not_held = self._steer_one(each, self.turns.number_for(each)) or not_held
            except OSError as error:
                not_steered[each.settings.address] = error.strerror or str(error)
        if new := not_steered.keys() - self._listeners.not_steered.keys():
            why = " ".join(sorted({not_steered[each] for each in new}))
            self._log.write("error", "not-steered", listen=" ".join(sorted(new)), error=why)
        if not_held and not self._not_held:
            self._log.write("error", "not-held", error=not_held)
        self._listeners.not_steered, self._not_held = not_steered, not_held
        self._loop.cancel("steer")
        if not_steered or not_held:
            self._loop.call_after("steer", _STEER_AGAIN_S, self._repair)
        self._repair_while_starting()
        if self._written != self._current():
            self._written = self._current()
            self._loop.call_after("groups", 0, self._write)
        return self.is_steered

    def _current(self) -> object:
        """Return what steering can change and the next program must know."""
        return self._groups, [[*each.descriptors()] for each in self._listeners.all]

    def _write(self) -> None:
        self._persist()

    def _repair_while_starting(self) -> None:
        """Repair repeatedly while a release starts: a worker may attach a filter, or connect()."""
        if self.turns.starting is not None and self._listeners.living and not self._repairs.ended:
            self._loop.call_after("steer", _STEER_AGAIN_S, self._repair)

    def repair(self, listener: Listener, socket_number: int) -> None:
        self._repairs.repair(listener, socket_number)

    def replace(self, listener: Listener, socket_number: int) -> None:
        self._repairs.replace(listener, socket_number)

    def _repair(self) -> None:
        if not self._repairs.ended:  # at a close, repair nothing: new clients must stay refused
            self._repairs.repair_all()
            self.steer()

    def _steer_one(self, listener: Listener, socket_number: int) -> str:
        """Steer new clients to a socket; during a hold, to the reserved socket (listener_hold.py).

        A UNIX path's clients also go there while Turns.lacks_workers() is true.
        Returns why clients cannot be held, or "".  Raises OSError if clients go to a wrong socket.
        """
        if self.turns.given_back and listener.settings.foreign:
            socket_number = 0
        not_held = ""
        if (self.hold.on or self.turns.lacks_workers(listener)) and listener.can_be_held:
            try:
                if listener.path:
                    before = listener.descriptors()
                    listener.reserve()
                    if listener.descriptors() != before:
                        # Store the new socket, so that a kill loses no client that waits there.
                        self._listeners.note_bound(listener)
                listener.steer(socket_number, self.probes.socket_by_mark, held=True)
            except OSError as error:
                not_held = error.strerror or str(error)
            else:
                return ""
        listener.steer(
            socket_number, self.probes.socket_by_mark, share=self.turns.share_of(listener)
        )
        return not_held
