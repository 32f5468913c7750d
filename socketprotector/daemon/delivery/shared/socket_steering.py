"""Which socket the workers of a generation accept from, under --handoff listener.

Each address has two sockets, 0 and 1, in one SO_REUSEPORT group (system/reuseport.py).  Of two
generations that follow each other each has its own.  A program in the kernel steers new clients to
the current generation, as soon as it is ready.  So the generation before it gets
no new clients: it quiesces (quiescing.py) before it is told to finish.  A server that is told
earlier closes connections that it has just accepted.

A listener without a second socket is common to both generations.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from ....core.events import HeldClientsWait
from ....model.records import SteeringRecord
from ....system import reuseport
from ....system.listener import SCARCE, Listener
from ....system.sock_diag import unaccepted
from ...runtime import Runtime
from ..way import Way
from .accept_watch import AcceptWatch
from .listener_hold import ListenerHold
from .probes import Probes
from .quiescing import Quiescing
from .socket_repair import RESTART, SocketRepair
from .socket_watch import SocketWatch
from .turns import Turns

_STEER_AGAIN_S = 0.5


class SocketSteering:
    """Knows which generation accepts from which socket, and steers new clients."""

    def __init__(
        self,
        listeners: Callable[[], Sequence[Listener]],
        runtime: Runtime,
        *,
        bound: Callable[[Listener], None],
        lost: Callable[[Listener, str], None],
        untaken: Callable[[float, int, bool, str], None],
    ) -> None:
        """listeners: those that there are; their owner's.

        bound: a listener has another socket.  lost: one has none any more, and why.
        untaken: for so many seconds none of so many clients was accepted, whether any ever was, and
        at which addresses.
        """
        self._listeners = listeners
        self._loop, self._log = runtime.loop, runtime.log
        self._persist, self._post = runtime.persist, runtime.post
        self._bound = bound
        #: Addresses whose clients the kernel does not send where it is their turn, and why.
        self._not_steered: dict[str, str] = {}
        self._as_held = True  # and who is to get no answer
        self.turns = Turns()
        self.probes = Probes(
            lambda: self._pairs, self.turns, steer=self._steer, persist=runtime.persist
        )
        self._watch = SocketWatch(
            lambda: self._shared,
            runtime,
            self.turns,
            self.probes,
            mend=lambda listener, number: self._repairs.mend(listener, number),
            untaken=untaken,
        )
        self._quiescing = Quiescing(
            runtime,
            own=lambda number, generation: self.turns.own(self._pairs, number, generation),
            is_replaced=lambda each, generation: (generation, each.index) in self.turns.unserved,
            clients_wait=self.probes.clients_wait,
            is_steered=self._comes_to_others,
        )
        self.hold = ListenerHold(listeners)
        self._repairs = SocketRepair(
            lambda: self._shared,
            runtime,
            self.turns,
            self.hold,
            steer=self._steer,
            adopt_held=self._adopt_held,
            unwatch=self._watch.unwatch,
            watch_later=self._watch.watch_later,
            bound=bound,
            lost=lost,
        )

    @property
    def is_steered(self) -> bool:
        """Whether all clients come where it is their turn."""
        return not self._not_steered

    @property
    def accept_watch(self) -> AcceptWatch:
        """What waits for the first client, where it is not known that the workers accept."""
        return self._watch.accepts

    def adopt(self, generation: int, socket_number: int) -> None:
        """The workers of a generation have accepted there under an earlier program."""
        self.turns.accepting[generation] = socket_number
        for each in self._shared:  # that one may have been killed while it listened again
            if each.is_alive(socket_number) and not each.is_sound(socket_number):
                self._repairs.mend(each, socket_number)
        self._steer_while_starting()
        self._watch.watch()

    def enter(self, generation: int, socket_number: int, *, fresh: bool = False) -> None:
        """The workers of a generation, which are yet to be started, accept there.

        fresh: it is a new release, so what it leaves is not due to the generations before it.
        Raises OSError where the path of a new release could not lead to its socket.
        """
        if fresh:
            self._watch.begin_anew()
        for each in self._shared:
            try:
                self._repairs.make_ready(each, socket_number)
            except OSError as error:  # else it has the one that there is
                if fresh and each.has_sibling and error.errno not in SCARCE:
                    self._watch.watch()
                    raise
            self._repairs.make_sound(each, socket_number, generation)
        self.turns.accepting[generation] = socket_number
        self._steer_while_starting()
        self._watch.watch()

    def grow(self, generation: int, knows: Callable[[int], bool]) -> None:
        """A generation is about to get another worker, which has the sockets that there are now.

        knows: whether its workers have a listener, by index.
        """
        if self.turns.grow(generation, knows):
            self._persist()  # before it accepts: the next program waits for its clients, too

    def waiting(
        self, generation: int, knows: Callable[[int], bool], *, clients_only: bool = False
    ) -> int | None:
        """Return how many clients wait for a generation to accept them; None: it is not known.

        clients_only: 0 at a socket where only probes of ours wait.
        knows: whether its workers have a listener, by index.  At one that only a later generation
        is to have, or that is tried, clients may wait at the socket with its number, too.
        """
        if generation not in self.turns.accepting:
            return 0
        number, count = self.turns.accepting[generation], 0
        for each in self._shared:
            if not knows(each.index):
                continue
            if clients_only and not self.probes.clients_wait(each, number):
                continue
            if len(self.turns.at(each, number)) > 1:
                return None
            one = each.socket_for(number)
            try:
                unix = one.family == socket.AF_UNIX
                count += len(unaccepted(one)) if unix else reuseport.queue(one)[0]
            except (OSError, struct.error):
                return None
        return count

    def reach(self, name: str, knows: Callable[[int], bool] = lambda index: True) -> Way | None:
        """Return how the generation that gets the clients is reached; see Probes.reach()."""
        return self.probes.reach(self._shared, name, knows)

    def gone(self, generation: int) -> None:
        """It has no workers any more."""
        self.leave(generation)
        socket_number, _ = self.turns.leaving.pop(generation, (0, 0.0))
        self._take_back(generation, socket_number, gone=True)
        self._watch.look_again()

    def leave(self, generation: int) -> None:
        """Its workers accept no more: they were told to finish, which takes each server a while."""
        socket_number = self.turns.leave(generation, time.monotonic())
        if socket_number is not None:
            self._take_back(generation, socket_number, gone=False)
        self.probes.discard()
        self._quiescing.end(generation)
        for each in self._quiescing.generations:
            if self._turn_away(each):
                self._quiescing.begin_again(each)
        self._adopt_held()
        self._watch.watch()

    def _take_back(self, generation: int, socket_number: int, *, gone: bool) -> None:
        """Undo what it has done to sockets; steer if it has failed: it may have steered, too."""
        if not self._repairs.ended:  # else new clients are refused, and that stays so
            self._repairs.options.end(generation, socket_number, self.turns.accepting, gone=gone)
        if self.turns.accepting and max(self.turns.accepting) < generation:
            self._repair()

    def turn_hold(self, on: bool) -> None:
        """Leave new clients without an answer; their kernels try again, and come in after it."""
        self.hold.turn(on)
        self._steer()
        if not on:  # its clients wait for no back-off that others have caused
            self._watch.end_back_off()
        self._adopt_held()

    def _adopt_held(self) -> None:
        """Have clients that have waited at a socket during a hold served by the next generation."""
        free = self.turns.free
        if self.hold.on:
            return
        if free in self.turns.accepting.values():
            if any(each.has_held_client for each in self._shared):
                self._post(HeldClientsWait())
            return
        moved = False
        for each in self._shared:
            moved |= each.has_sibling and self.turns.move_lost(each)
            if each.is_reserved_for_clients:
                self._watch.unwatch(each)
                with suppress(OSError):  # then as the next generation starts
                    each.adopt_reserved(free)
                    self._bound(each)
        if moved:
            self._steer()
            self._persist()
        self._watch.watch()

    def expect(self, listener: Listener, *, dry_run: bool) -> None:
        """Steer the clients of a new listener to the generation that is to know it.

        dry_run: that is to get none, so to the socket where they will never be accepted.
        """
        if self.turns.expect(listener, dry_run=dry_run) == 1:
            listener.swap()  # until now clients came to the first one
        self._steer()

    def turn_to(
        self,
        socket_number: int,
        *,
        again: bool = False,
        knows: Callable[[int], bool] | None = None,
    ) -> None:
        """Have new clients come to socket 0 or 1.

        again: its generation had its turn before.  knows: whether it knows a listener, by index;
        None: it is yet to come.  Clients of one that it does not know stay where they come now: at
        a generation that knows it, until the listener is removed.
        """
        listeners = self._listeners()
        self.turns.turn_to(socket_number, {each.index for each in listeners}, knows)
        self.probes.clients_come({(each.index, self.turns.number_for(each)) for each in listeners})
        self.probes.discard()  # an earlier program may not have come to it
        self._repairs.mend_all()
        self._steer()
        self._adopt_held()  # clients may have waited at both sockets until now
        self._watch.watch()
        if socket_number in self.turns.accepting.values():
            self.accept_watch.begin(before_us=again)

    def record(self) -> SteeringRecord:
        """Return what another program would have to know."""
        turns, probes = self.turns, self.probes
        return SteeringRecord(
            turns.current,
            tuple(turns.unserved),
            tuple(turns.expected.items()),
            tuple((generation, *its) for generation, its in turns.leaving.items()),
            self.hold.record,
            tuple(probes.asked),
            tuple(probes.asked_from),
            self._repairs.options.record,
            tuple(turns.partly_served),
            tuple(turns.lost),
        )

    def adopt_record(self, record: SteeringRecord, *, held: bool) -> None:
        """Go on with what an earlier program had told the kernel.

        held: there is to be a hold, which it may not have come to begin, or to end.
        """
        turns, probes = self.turns, self.probes
        turns.current = record.socket_number
        turns.unserved = frozenset(record.unserved)
        turns.partly_served = frozenset(record.partly_served)
        turns.lost = frozenset(record.lost)
        turns.expected = dict(record.expected)
        turns.leaving = {generation: (its, at) for generation, its, at in record.leaving}
        probes.asked, probes.asked_from = set(record.asked), set(record.asked_from)
        self._repairs.options.record = record.options
        self.hold.record = record.hold
        if not held:
            self.hold.turn(on=False)

    def quiesce(self, generation: int, over: Callable[[], None], *, reads_on: bool = False) -> None:
        """Call back when a generation whose turn is over has accepted and read from all clients.

        reads_on: when it has accepted them.
        """
        if generation not in self.turns.accepting or not self._pairs:
            over()
            return
        self._turn_away(generation)
        self._quiescing.begin(generation, self.turns.accepting[generation], over, reads_on=reads_on)

    def quiesce_last(self, generation: int, over: Callable[[], None]) -> None:
        """Call back when the last generation has accepted all that came to it before.

        Later clients wait for the next start: at once where there is a second socket, else as soon
        as the generation is told to finish.
        """
        self.give_back()
        socket_number = self.turns.accepting.get(generation, 0)
        common = [each for each in self._shared if not each.has_sibling]
        self.accept_watch.end()
        awaited = self.turns.own(self._pairs, socket_number) or common
        if generation in self.turns.accepting and awaited:
            self._turn_away(generation)
            self._quiescing.begin(generation, socket_number, over, common=common)
        else:
            over()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What keeps clients from where they should come."""
        lost = [
            f"{each.settings.address}: no client can connect; restart SocketProtector"
            for each in self._listeners()
            if each.lost
        ]
        spent = [
            f"{each.settings.address}: a release broke a socket, and no spare is left; {RESTART}"
            for each in self._shared
            if each.has_no_spare
        ]
        others = [
            f"{address}: new clients do not come to the newest generation: {why}"
            for address, why in self._not_steered.items()
        ]
        return *lost, *spent, *others

    @property
    def share(self) -> bool:
        """Whether there is a second socket of ours beside one that was passed in."""
        return any(each.settings.foreign for each in self._pairs)

    def give_back(self) -> None:
        """Steer new clients to the sockets that were passed in: their owner goes on listening."""
        self.turns.given_back = True
        if self.share:
            self._steer()

    def _comes_to_others(self, generation: int) -> bool:
        """Whether no new client comes to a generation.

        One does as long as an earlier generation has not left the other socket.
        """
        return self.is_steered and self.turns.accepting[generation] != self.turns.current

    def _turn_away(self, generation: int) -> bool:
        """Have new clients wait for a generation that is yet to come; say whether that is news.

        They wait at a socket from which no worker accepts, if there is one.
        """
        number, turns = self.turns.accepting[generation], self.turns
        is_due = number == turns.current and 1 - number not in turns.accepting.values()
        if is_due:
            self.turn_to(1 - number)
        return is_due

    def end(self) -> None:
        """The listeners are about to be closed: what is shut down now may stay so."""
        self._repairs.ended = True
        self._watch.end()

    # -- whose turn it is --------------------------------------------------------

    @property
    def _pairs(self) -> list[Listener]:
        return [each for each in self._listeners() if each.has_sibling]

    def _steer(self) -> bool:
        """Tell the kernel; until it is told they come to the other socket, whose workers go on.

        Returns whether it was told.
        """
        not_steered: dict[str, str] = {}
        not_held: OSError | None = None
        for each in self._listeners():
            try:
                not_held = self._steer_one(each, self.turns.number_for(each)) or not_held
            except OSError as error:
                not_steered[each.settings.address] = error.strerror or str(error)
        if new := not_steered.keys() - self._not_steered.keys():
            why = " ".join(sorted({not_steered[each] for each in new}))
            self._log.write("error", "not-steered", listen=" ".join(sorted(new)), error=why)
        if not_held is not None and self._as_held:
            self._log.write("error", "not-held", error=not_held.strerror)
        self._not_steered, self._as_held = not_steered, not_held is None
        self._loop.cancel("steer")
        if self._not_steered or not self._as_held:
            self._loop.call_after("steer", _STEER_AGAIN_S, self._repair)
        self._steer_while_starting()
        return self.is_steered

    def _steer_while_starting(self) -> None:
        """Repair again and again while a release starts: its workers can take the clients.

        By clearing SO_REUSEPORT, or by a filter for the group; or they connect the socket.
        """
        if self.turns.starting is not None and self._shared and not self._repairs.ended:
            self._loop.call_after("steer", _STEER_AGAIN_S, self._repair)

    def _repair(self) -> None:
        if not self._repairs.ended:  # else it would bring clients whom no generation serves
            self._repairs.mend_all()
            self._steer()

    def _steer_one(self, listener: Listener, socket_number: int) -> OSError | None:
        """Have new clients come to one of its sockets, or during a hold get no answer.

        So they wait, too, at a path whose socket the current generation lost.  Returns why they
        cannot be held now.  Raises OSError where clients come to the other socket.
        """
        if self.turns.given_back and listener.settings.foreign:
            socket_number = 0
        not_held = None
        if (self.hold.on or self.turns.lacks(listener)) and listener.can_be_held:
            try:
                if listener.path and not listener.is_reserved_for_clients:
                    listener.reserve()
                    self._bound(listener)  # so that a kill loses no client that waits there
                listener.steer(socket_number, self.probes.questions, held=True)
            except OSError as error:
                not_held = error
            else:
                return None
        listener.steer(socket_number, self.probes.questions)
        return not_held

    @property
    def _shared(self) -> list[Listener]:
        return [each for each in self._listeners() if each.shared and not each.lost]
