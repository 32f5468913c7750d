"""Which socket the workers of a generation accept from, under --handoff listener.

Each address has two sockets, 0 and 1, in one SO_REUSEPORT group (system/reuseport.py).  Of two
generations that follow each other each has its own.  A program in the kernel steers new clients to
the current generation, as soon as it is ready.  So the generation before it gets
no new clients: it quiesces (quiescing.py) before it is told to finish.  A server that is told
earlier closes connections that it has just accepted.

A listener without a second socket is common to both generations.

A listening socket is an open file description that all workers share: any of them can shut it down
for all.  It listens again then; or another one is bound in its place, which workers that run
already do not have: for that there must be another generation.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from ....core.events import SocketLost, Stranded
from ....model.records import SteeringRecord
from ....system import reuseport, socket_snapshot
from ....system.listener import SCARCE, Listener
from ....system.loop import READ, SHUT
from ....system.sock_diag import Line, end_of, is_waiting, unaccepted
from ...runtime import Runtime
from ..way import Way, family_of
from .accept_watch import AcceptWatch
from .listener_hold import ListenerHold
from .quiescing import Quiescing
from .socket_restoring import SocketRestoring

#: What is told to finish may accept for that long: gunicorn's threads look around once a second.
LEAVES_S = 2.0
_STEER_AGAIN_S = 0.5
#: How long workers that were told to finish have to accept waiting clients, before a generation is
#: started for these; and how long after that a second one is, at the earliest.
FIRST_RESCUE_S = 1.0
LAST_RESCUE_S = 600.0

_RESCUE = "steering-rescue"
_MEND = "steering-mend"
_MEND_AGAIN_S = 0.1
#: Where questions by IPv6 come from, as do clients of this machine.
_SOURCE_OF_IPV6 = "::1"
_RESTART = "restart SocketProtector: until then a release that fails may keep clients out"
_MOUNTED = "clients came to a socket that the path has left: mount its folder, not its file"
#: Another socket cannot be had now, and can be later.
_LATER = SCARCE | {errno.EBUSY}


def _waits(listening: socket.socket, address: tuple[str, int], client: socket.socket) -> bool:
    """Whether a client of ours waits to be accepted; others may, too.  Raises OSError."""
    if not listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise OSError(errno.ENOTCONN, "it does not listen")  # so it came to the other one
    if listening.family == socket.AF_UNIX:
        return os.fstat(client.fileno()).st_ino in unaccepted(listening)
    try:
        return is_waiting(client, address, reuseport.device_of(listening))
    except OSError:  # sock_diag is not there
        return _has_waiting(listening)


def _end_of(client: socket.socket, listening: socket.socket) -> bytes | int:
    """Return what unaccepted() tells a client of ours by."""
    if listening.family == socket.AF_UNIX:
        return os.fstat(client.fileno()).st_ino
    return end_of(client, listening.family)


def _has_waiting(listening: socket.socket) -> bool:
    return reuseport.queue(listening)[0] > 0


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
        self._loop, self._log, self._post = runtime.loop, runtime.log, runtime.post
        self._persist = runtime.persist
        self._bound = bound
        self._lost = lost
        self._say_untaken = untaken
        self.accept_watch = AcceptWatch(
            self._loop, lines=self._lines, await_one=self._watch, say=self._untaken_by
        )
        self._ended = False
        self._given_back = False  # sockets that were passed in get the new clients
        #: Generations, each with a listener whose socket they do not have: it was
        #: bound, or added, after they had been started.
        self.unserved: frozenset[tuple[int, int]] = frozenset()
        #: Those of them whose later workers have that socket, beside others that do not.
        self._partly_served: frozenset[tuple[int, int]] = frozenset()
        self.current = 0  # to which new clients come
        self._accepting: dict[int, int] = {}  # generation -> socket number
        #: Those that were told to finish and live on: the socket, and when.
        self._leaving: dict[int, tuple[int, float]] = {}
        self._quiescing = Quiescing(
            runtime,
            own=self.own,
            clients_wait=self.clients_wait,
            is_steered=lambda: self._steered,
        )
        #: Listeners that the generation whose turn it is does not know: where their clients wait.
        self._expected: dict[int, int] = {}
        self._steered = True  # the kernel knows the current one
        self._as_held = True  # and who is to get no answer
        self.hold = ListenerHold(listeners)
        self._restoring = SocketRestoring(runtime, listeners, self._replace)
        #: Listeners and socket numbers to which no client comes, but questions by IPv6 do, of this
        #: program or one before: what comes there from the same address is one.
        self._asked: set[tuple[int, int]] = set()
        #: Those to which questions by IPv4 come, each with an address that no client has.
        self._asked_from: set[tuple[int, int, str]] = set()
        #: With what mark the generation that gets the clients is asked, by listener and socket.
        self._marks: dict[tuple[int, int], reuseport.Mark] = {}
        #: Of connections that come to a socket whoever gets the clients: its generation is asked.
        self._questions: dict[reuseport.Mark, int] = {}
        #: Of those that serve: where questions came that no worker has taken, and their ends.
        self._given_up: list[tuple[socket.socket, bytes | int]] = []
        self._rescue_s = 0.0  # for so long after the last one none is started for them
        self._rescued_at = 0.0

    @property
    def free(self) -> int:
        """The socket number, 0 or 1, that the next generation gets."""
        return 1 - self.current if self.current in self._accepting.values() else self.current

    def adopt(self, generation: int, socket_number: int) -> None:
        """The workers of a generation have accepted there under an earlier program."""
        self._accepting[generation] = socket_number
        for each in self._shared:  # that one may have been killed while it listened again
            if each.is_alive(socket_number) and not each.is_sound(socket_number):
                self.mend(each, socket_number)
        self._steer_while_starting()
        self._watch()

    def enter(self, generation: int, socket_number: int, *, fresh: bool = False) -> None:
        """The workers of a generation, which are yet to be started, accept there.

        fresh: it is a new release, so what it leaves is not due to the generations before it.
        Raises OSError where the path of a new release could not lead to its socket.
        """
        if fresh:
            self._rescue_s = 0.0
        for each in self._shared:
            try:
                self._make_ready(each, socket_number, generation)
            except OSError as error:  # else it has the one that there is
                if fresh and each.has_sibling and error.errno not in SCARCE:
                    self._watch()
                    raise
            self._make_sound(each, socket_number, generation)
        self._accepting[generation] = socket_number
        self._steer_while_starting()
        self._watch()

    def grow(self, generation: int, knows: Callable[[int], bool]) -> None:
        """A generation is about to get another worker, which has the sockets that there are now.

        knows: whether its workers have a listener, by index.
        """
        its = {each for each in self.unserved if each[0] == generation and knows(each[1])}
        if not its <= self._partly_served:
            self._partly_served |= its
            self._persist()  # before it accepts: the next program waits for its clients, too

    def waiting(self, generation: int, knows: Callable[[int], bool]) -> int | None:
        """Return how many clients wait for a generation to accept them; None: it is not known.

        knows: whether its workers have a listener, by index.  At one that only a later generation
        is to have, or that is tried, clients may wait at the socket with its number, too.
        """
        if generation not in self._accepting:
            return 0
        number, count = self._accepting[generation], 0
        for each in self._shared:
            if not knows(each.index):
                continue
            place = number % len(each.sockets)
            if sum(its % len(each.sockets) == place for its in self._accepting.values()) > 1:
                return None
            one = each.socket_for(number)
            try:
                unix = one.family == socket.AF_UNIX
                count += len(unaccepted(one)) if unix else reuseport.queue(one)[0]
            except (OSError, struct.error):
                return None
        return count

    def reach(self, name: str, knows: Callable[[int], bool] = lambda index: True) -> Way | None:
        """Return how the generation that gets the clients is reached: as clients reach it.

        name: the listener's, "" for the first.  knows: whether that generation knows a listener,
        by index.  None: there is no such one.
        """
        for each in self._shared:
            if name in ("", each.settings.name) and knows(each.index):
                asked = each.socket_for(self.current)
                # As for ask(): so it never leaves this machine, where an address is another one's.
                unix = asked.family == socket.AF_UNIX
                address = each.address_of(self.current)
                mark = None if unix else self._mark_for(each, address)
                way = Way(address, mark, partial(_waits, asked, address), lambda: None)
                if each.has_sibling:  # else the next generation takes it
                    way.give_up = partial(self._give_up, asked)
                return way
        return None

    def _mark_for(self, listener: Listener, address: tuple[str, int]) -> reuseport.Mark:
        place = listener.index, self.current
        if place not in self._marks:
            mark = self._marks[place] = reuseport.Mark.draw(family_of(address))
            self._will_come_from(place, mark)
        return self._marks[place]

    def _will_come_from(
        self, place: tuple[int, int], mark: reuseport.Mark | None, *, no_clients: bool = False
    ) -> None:
        """Have the next program, too, know questions with a mark from clients.

        Those of IPv6 have the address of clients on this machine, and those at a UNIX socket none:
        only where no client comes.
        """
        if mark is not None and mark.family == socket.AF_INET:
            self._asked_from.add((*place, mark.source))
        elif no_clients and place not in self._asked:
            self._asked.add(place)
        else:
            return
        self._persist()  # before the first one: the next program finds it, if we are killed

    def _give_up(self, asked: socket.socket, one: socket.socket) -> None:
        self._given_up.append((asked, _end_of(one, asked)))

    @property
    def holds(self) -> bool:
        """Whether new clients get no answer."""
        return self.hold.on

    def ask(
        self, generation: int, name: str, knows: Callable[[int], bool] = lambda index: True
    ) -> Way | None:
        """Have a generation reached, whoever gets the new clients, by connections with a mark.

        name: the listener's, "" for the first that has two sockets.  knows: whether the generation
        knows a listener, by index.  None: there is no such one.
        Also the generation that gets the clients: a hold does not keep the question out then, and
        it never leaves this machine (the address may be another one's).  Raises OSError; EAGAIN
        also while workers of an earlier one could answer.
        """
        socket_number = self._accepting.get(generation)
        if socket_number is None:
            return None
        found = self._askable(name, knows)
        if found is None:
            return None
        for its, told_at in self._leaving.values():
            if found.is_fresh[socket_number]:
                break
            if its == socket_number and time.monotonic() < told_at + LEAVES_S:
                why = "workers that were told to finish may still accept from its socket"
                raise OSError(errno.EAGAIN, why)
        address, asked = found.address_of(socket_number), found.socket_for(socket_number)
        place = found.index, socket_number
        no_clients = socket_number != self.number_for(found) and not _has_waiting(asked)
        waits = partial(_waits, asked, address)
        # While it is in no group the kernel gives what has this mark to the other one.
        times, closing = found.joined[socket_number], socket_snapshot.closing
        closed, serving = closing(asked), found.socket_for(self.number_for(found))

        def holds() -> bool:
            return (
                found.joined[socket_number] == times
                and found.is_alive(socket_number)
                and closing(asked) == closed
            )

        if asked.family == socket.AF_UNIX:  # it has a file of its own
            self._will_come_from(place, None, no_clients=no_clients)
            return Way(address, None, waits, lambda: None, holds=holds)
        while (mark := reuseport.Mark.draw(family_of(address))) in self._questions:
            pass  # of IPv6 there are few
        self._questions[mark] = socket_number
        self._will_come_from(place, mark, no_clients=no_clients)
        self._steer()
        if not self._steered:  # they would come to the generation before, which answers
            del self._questions[mark]
            raise OSError(errno.EAGAIN, "new clients cannot be steered now")
        close = partial(self._stop_asking, mark)

        def is_closed() -> bool:
            return closed != closing(serving)

        return Way(address, mark, waits, close, holds=holds, is_closed=is_closed)

    def can_ask(self, name: str) -> bool:
        """Whether there is a listener that ask() takes."""
        return self._askable(name) is not None

    def _askable(
        self, name: str, knows: Callable[[int], bool] = lambda index: True
    ) -> Listener | None:
        named = (each for each in self._pairs if name in ("", each.settings.name))
        return next((each for each in named if not each.lost and knows(each.index)), None)

    def _stop_asking(self, mark: reuseport.Mark) -> None:
        """It is no more reached by this one."""
        if self._questions.pop(mark, None) is not None:
            self._steer()

    def gone(self, generation: int) -> None:
        """It has no workers any more."""
        self.leave(generation)
        socket_number, _ = self._leaving.pop(generation, (0, 0.0))
        self._take_back(generation, socket_number, gone=True)
        self._loop.cancel(_RESCUE)  # maybe no process is left that could accept its clients
        self._watch()

    def leave(self, generation: int) -> None:
        """Its workers accept no more: they were told to finish, which takes each server a while."""
        socket_number = self._accepting.pop(generation, None)
        if socket_number is not None:
            self._leaving[generation] = socket_number, time.monotonic()
            self._take_back(generation, socket_number, gone=False)
        self._discard_questions()
        self.unserved = frozenset(each for each in self.unserved if each[0] != generation)
        self._partly_served &= self.unserved
        self._quiescing.end(generation)
        for each in self._quiescing.generations:
            if self._turn_away(each):
                self._quiescing.begin_again(each)
        self._adopt_held()
        self._watch()

    def _take_back(self, generation: int, socket_number: int, *, gone: bool) -> None:
        """Undo what it has done to sockets; steer if it has failed: it may have steered, too."""
        if not self._ended:  # else new clients are refused, and that stays so
            self._restoring.end(generation, socket_number, self._accepting, gone=gone)
        if self._accepting and max(self._accepting) < generation:
            self._repair()

    def _questions_at(self, listener: Listener, number: int) -> int | None:
        """Return how many questions wait at one of its sockets; None: a client does, too.

        Raises OSError.
        """
        one, place = listener.socket_for(number), (listener.index, number)
        if not listener.has_waiting(number):
            return 0
        given_up = {end for asked, end in self._given_up if asked is one}
        sources = {each[2] for each in self._asked_from if each[:2] == place}
        if place in self._asked:
            sources.add(_SOURCE_OF_IPV6)
        if not (given_up or sources):
            return None
        waiting, _ = reuseport.queue(one)  # first: those that come later stand behind
        if one.family == socket.AF_UNIX and place in self._asked:
            return waiting
        ends = unaccepted(one)
        gone = {0} if given_up else set()  # a question whose process has closed it
        ours = [end for end in ends if end in given_up | gone or reuseport.comes_from(end, sources)]
        return waiting if waiting <= len(ours) else None

    def clients_wait(self, listener: Listener, number: int) -> bool:
        """Whether not only questions wait at one of its sockets, as far as is known."""
        try:
            return self._questions_at(listener, number) is None
        except OSError:
            return True

    def _discard_questions(self) -> set[tuple[int, int]]:
        """Have none wait where no worker accepts: no generation is to be started for it.

        Where a client waits, too, one is: it accepts them all.  Returns where that cannot be known
        now, by listener and socket number.
        """
        unknown = set()
        for each, number in [(each, number) for each in self._pairs for number in (0, 1)]:
            accepts = number in self._accepting.values() and self._is_served(each, number)
            if accepts or each not in self.own(number):
                continue
            one, place = each.socket_for(number), (each.index, number)
            try:
                waiting = self._questions_at(each, number)
                if waiting is None:
                    continue
                reuseport.discard_waiting(one, waiting)
            except OSError as error:
                if error.errno in _LATER:
                    unknown.add(place)
                continue
            self._given_up = [given for given in self._given_up if given[0] is not one]
            self._asked_from = {entry for entry in self._asked_from if entry[:2] != place}
            self._asked.discard(place)
            self._marks.pop(place, None)
        return unknown

    def turn_hold(self, on: bool) -> None:
        """Leave new clients without an answer; their kernels try again, and come in after it."""
        self.hold.turn(on)
        self._steer()
        self._adopt_held()

    def _adopt_held(self) -> None:
        """Have clients that have waited at a socket during a hold served by the next generation."""
        free = self.free
        if not self.hold.on and free not in self._accepting.values():
            for each in self._pairs:
                if each.is_reserved_for_clients:
                    self._unwatch(each)
                    with suppress(OSError):  # then as the next generation starts
                        each.adopt_reserved(free)
                        self._bound(each)
            self._watch()

    def expect(self, listener: Listener, *, dry_run: bool) -> None:
        """Steer the clients of a new listener to the generation that is to know it.

        dry_run: that is to get none, so to the socket where they will never be accepted.
        """
        number = self.current if dry_run else self.free
        if number == 1:
            listener.swap()  # until now clients came to the first one
        self._expected[listener.index] = number
        if listener.has_sibling and not dry_run:  # else clients wait where a generation is
            self.unserved |= {(generation, listener.index) for generation in self._accepting}
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
        there = {each.index for each in self._listeners()}
        if knows is not None and socket_number != self.current:
            unknown = {index: self.current for index in there if not knows(index)}
            self._expected = unknown | self._expected
        self._expected = {
            index: its
            for index, its in self._expected.items()
            if index in there and not (knows and knows(index))
        }
        self.current = socket_number
        # From now on clients come there.
        self._asked -= {(each.index, self.number_for(each)) for each in self._listeners()}
        self._discard_questions()  # an earlier program may not have come to it
        self._steer()
        self._watch()
        if socket_number in self._accepting.values():
            self.accept_watch.begin(before_us=again)

    def record(self) -> SteeringRecord:
        """Return what another program would have to know."""
        return SteeringRecord(
            self.current,
            tuple(self.unserved),
            tuple(self._expected.items()),
            tuple((generation, *its) for generation, its in self._leaving.items()),
            self.hold.record,
            tuple(self._asked),
            tuple(self._asked_from),
            self._restoring.record,
            tuple(self._partly_served),
        )

    def adopt_record(self, record: SteeringRecord, *, held: bool) -> None:
        """Go on with what an earlier program had told the kernel.

        held: there is to be a hold, which it may not have come to begin, or to end.
        """
        self.current = record.socket_number
        self.unserved = frozenset(record.unserved)
        self._partly_served = frozenset(record.partly_served)
        self._expected = dict(record.expected)
        self._leaving = {generation: (its, at) for generation, its, at in record.leaving}
        self._asked = set(record.asked)
        self._asked_from = set(record.asked_from)
        self._restoring.record = record.options
        self.hold.record = record.hold
        if not held:
            self.hold.turn(on=False)

    def quiesce(self, generation: int, over: Callable[[], None], *, reads_on: bool = False) -> None:
        """Call back when a generation whose turn is over has accepted and read from all clients.

        reads_on: when it has accepted them.
        """
        if generation not in self._accepting or not self._pairs:
            over()
            return
        self._turn_away(generation)
        self._quiescing.begin(generation, self._accepting[generation], over, reads_on=reads_on)

    def quiesce_last(self, generation: int, over: Callable[[], None]) -> None:
        """Call back when the last generation has accepted all that came to it before.

        Later clients wait for the next start: at once where there is a second socket, else as soon
        as the generation is told to finish.
        """
        self.give_back()
        socket_number = self._accepting.get(generation, 0)
        common = [each for each in self._shared if not each.has_sibling]
        self.accept_watch.end()
        if generation in self._accepting and (self.own(socket_number) or common):
            self._turn_away(generation)
            self._quiescing.begin(generation, socket_number, over, common=common)
        else:
            over()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What releases have broken and only a restart repairs."""
        lost = [
            f"{each.settings.address}: no client can connect; restart SocketProtector"
            for each in self._listeners()
            if each.lost
        ]
        spent = [
            f"{each.settings.address}: a release broke a socket, and no spare is left; {_RESTART}"
            for each in self._shared
            if each.has_no_spare
        ]
        return *lost, *spent

    @property
    def share(self) -> bool:
        """Whether there is a second socket of ours beside one that was passed in."""
        return any(each.settings.foreign for each in self._pairs)

    def give_back(self) -> None:
        """Steer new clients to the sockets that were passed in: their owner goes on listening."""
        self._given_back = True
        if self.share:
            self._steer()

    def own(self, socket_number: int, generation: int = 0) -> list[Listener]:
        """The pairs whose socket of this number gets no new clients while the other one does.

        generation: only those that it has, or some of its workers.
        """
        owners = self._given_back and socket_number == 0
        pairs = [each for each in self._pairs if not (owners and each.settings.foreign)]
        without = self.unserved - self._partly_served
        return [each for each in pairs if (generation, each.index) not in without]

    def _turn_away(self, generation: int) -> bool:
        """Have new clients wait for a generation that is yet to come; say whether that is news.

        They wait at a socket from which no worker accepts, if there is one.
        """
        socket_number = self._accepting[generation]
        turns = socket_number == self.current and 1 - socket_number not in self._accepting.values()
        if turns:
            self.turn_to(1 - socket_number)
        return turns

    def end(self) -> None:
        """The listeners are about to be closed: what is shut down now may stay so."""
        self._ended = True
        self.accept_watch.end()
        for each in self._shared:
            self._unwatch(each)
        self._loop.cancel(_RESCUE)
        self._loop.cancel(_MEND)

    # -- whose turn it is --------------------------------------------------------

    @property
    def _pairs(self) -> list[Listener]:
        return [each for each in self._listeners() if each.has_sibling]

    def _steer(self) -> None:
        """Tell the kernel; until it is told they come to the other socket, whose workers go on."""
        not_steered: OSError | None = None
        not_held: OSError | None = None
        for each in self._listeners():
            try:
                not_held = self._steer_one(each, self.number_for(each)) or not_held
            except OSError as error:
                not_steered = error
        if not_steered is not None and self._steered:
            self._log.write("error", "not-steered", error=not_steered.strerror)
        if not_held is not None and self._as_held:
            self._log.write("error", "not-held", error=not_held.strerror)
        self._steered, self._as_held = not_steered is None, not_held is None
        self._loop.cancel("steer")
        if not (self._steered and self._as_held):
            self._loop.call_after("steer", _STEER_AGAIN_S, self._repair)
        self._steer_while_starting()

    def _steer_while_starting(self) -> None:
        """Repair again and again while a release starts: its workers can take the clients.

        By clearing SO_REUSEPORT, or by a filter for the group; or they connect the socket.
        """
        if self._starting is not None and self._shared and not self._ended:
            self._loop.call_after("steer", _STEER_AGAIN_S, self._repair)

    @property
    def _starting(self) -> int | None:
        """The newest generation, until new clients come to its socket."""
        newest = max(self._accepting, default=0)
        return newest if self._accepting.get(newest, self.current) != self.current else None

    def _repair(self) -> None:
        self._mend_all()
        self._steer()

    def number_for(self, listener: Listener) -> int:
        """Return to which of its sockets new clients come, or after a hold."""
        return self._expected.get(listener.index, self.current)

    def _steer_one(self, listener: Listener, socket_number: int) -> OSError | None:
        """Have new clients come to one of its sockets, or during a hold get no answer.

        Returns why it cannot be held now.  Raises OSError where clients come to the other socket.
        """
        if self._given_back and listener.settings.foreign:
            socket_number = 0
        not_held = None
        if self.hold.on and listener.can_be_held:
            try:
                listener.steer(socket_number, self._questions, held=True)
            except OSError as error:
                not_held = error
            else:
                return None
        listener.steer(socket_number, self._questions)
        return not_held

    # -- a socket that was shut down ---------------------------------------------------

    @property
    def _shared(self) -> list[Listener]:
        return [each for each in self._listeners() if each.shared and not each.lost]

    def mend(self, listener: Listener, socket_number: int) -> None:
        """Have a socket that was shut down listen again, or another one in its place."""
        if self._ended or listener.lost:
            return
        self._loop.unwatch(listener.socket_for(socket_number).fileno())
        if listener.listen_again(socket_number):
            # Before it is logged: until then new clients wait at the other socket, in vain.
            self._steer()
            self._log.write("warning", "listens-again", listen=listener.settings.address)
        else:
            self._replace(listener, socket_number)
        # By a timer: a worker that does it again and again must not keep us busy.
        self._loop.call_after(_MEND, _MEND_AGAIN_S, self._watch)

    def _mend_all(self) -> None:
        """Mend the sockets that get no client.  Of these epoll reports only one that was shut down.

        One that a worker has connected is not reported, nor one on a device that is gone.
        """
        for each in self._shared:
            for number in range(len(each.sockets)):
                if not each.is_alive(number):
                    self.mend(each, number)
                elif self._is_out_of_reach(each, number):
                    self._replace(each, number)

    def _is_out_of_reach(self, listener: Listener, number: int) -> bool:
        """Whether no client can come to a socket that listens: its device or its file is gone.

        A release that starts on such a device cannot be asked, and time alone would make it ready.
        """
        if number == self.number_for(listener):
            return not listener.can_be_led_to(number)
        starts_there = self._accepting.get(self._starting or 0) == number
        return starts_there and reuseport.device_is_gone(listener.socket_for(number))

    def _make_ready(self, listener: Listener, socket_number: int, generation: int) -> None:
        """Have no generation begin with a socket of an earlier one.  Raises OSError."""
        if not listener.is_alive(socket_number) or not listener.is_sound(socket_number):
            self.mend(listener, socket_number)
        self._unwatch(listener)
        if listener.is_reserved_for_clients and not self.hold.on:
            listener.adopt_reserved(socket_number)
            self._bound(listener)
        # Clients of a single one that no generation has come with the next generation.
        awaited = any(index == listener.index for _, index in self.unserved)
        if (listener.has_sibling or not awaited) and listener.renew(socket_number):
            self._bound(listener)

    def _make_sound(self, listener: Listener, socket_number: int, generation: int) -> None:
        """Have no generation begin with what an earlier one has done to a socket."""
        if not listener.has_sibling:
            listener.let_in()
        elif socket_number not in self._accepting.values():
            try:
                reuseport.reset(listener.socket_for(socket_number))
            except OSError:  # locked, and so it stays
                self._replace(listener, socket_number)

        def is_alone() -> bool:
            place = socket_number % len(listener.sockets)
            return all(its % len(listener.sockets) != place for its in self._accepting.values())

        self._restoring.begin(generation, listener, socket_number, is_alone)

    def _replace(self, listener: Listener, socket_number: int) -> None:
        """Have another socket in the place of one that a worker has broken."""
        self._loop.unwatch(listener.socket_for(socket_number).fileno())
        address = listener.settings.address
        common = not listener.has_sibling
        try:
            listener.bind_anew(socket_number)
        except OSError as error:
            if error.errno in _LATER:
                return
            if common:
                listener.lost = True
                self._lost(listener, error.strerror or str(error))
                return
            listener.go_on_without(socket_number)
            why = error.strerror
            self._log.write("warning", "one-socket-left", listen=address, error=why, hint=_RESTART)
        self._steer()
        if common or listener.has_sibling:
            self._log.write("warning", "bound-anew", listen=address)
        without = {
            (generation, listener.index)
            for generation, its in self._accepting.items()
            if common or its == socket_number
        }
        self.unserved |= without
        self._partly_served -= without
        self._bound(listener)
        lost = {generation for generation, _ in without}
        starting = self._starting
        if starting in lost:
            # First: until it is gone no other one is started for the clients.
            self._post(SocketLost(starting))
            lost.remove(starting)
        if lost:
            self._post(Stranded())

    # -- sockets without workers ------------------------------------------------------

    def _in_vain(self) -> list[tuple[Listener, int]]:
        """Return the sockets from which no worker accepts."""
        return [
            (each, number)
            for each in self._shared
            for number in range(len(each.sockets))
            if not self._is_served(each, number)
        ]

    def _is_served(self, listener: Listener, number: int) -> bool:
        if self._given_back and listener.settings.foreign:
            return True  # its owner accepts
        there = {
            generation
            for generation, socket_number in self._accepting.items()
            if socket_number % len(listener.sockets) == number
        }
        if not there:
            # While no generation accepts at all, or where the next one will, clients wait for that.
            return not self._accepting or number == self.number_for(listener)
        return any((generation, listener.index) not in self.unserved for generation in there)

    def _watch(self) -> None:
        """Watch for sockets that are shut down, and for clients that wait in vain.

        And for the next client at all, where it is not known that the workers accept.
        """
        if self._ended:
            return
        if self.current not in self._accepting.values():
            self.accept_watch.end()
        in_vain = self._in_vain()
        if not in_vain:
            self._loop.cancel(_RESCUE)
        looked_at = [] if self._loop.due(_RESCUE) is not None else in_vain
        awaited = self._lines_of(in_vain) if self.accept_watch.awaits else []
        try:
            for each in self._shared:
                each.note()
                for number, one in enumerate(each.sockets):
                    self._loop.unwatch(one.fileno())
                    expected = (each, number) in looked_at or (each, number) in awaited
                    events = SHUT | READ if expected else SHUT
                    self._loop.watch(one.fileno(), partial(self._look_at, each, number), events)
        except OSError:  # of epoll: no memory
            for each in self._shared:
                self._unwatch(each)  # until then none may wake us
            self._loop.call_after(_MEND, _MEND_AGAIN_S, self._watch)
            if looked_at:
                self._rescue_later()

    def _unwatch(self, listener: Listener) -> None:
        """Forget a listener's sockets until the next _watch(): others may take their place."""
        for each in listener.sockets:
            self._loop.unwatch(each.fileno())

    def _look_at(self, listener: Listener, number: int) -> None:
        if not listener.is_alive(number):
            self.mend(listener, number)
        elif (listener, number) in self._in_vain():
            self._rescue_later()
        elif self.accept_watch.awaits:
            # A worker may have accepted by now: then none waits at the look.
            self.accept_watch.came(listener.index)

    def _lines_of(self, in_vain: Sequence[tuple[Listener, int]]) -> list[tuple[Listener, int]]:
        """Return the sockets that new clients are steered to and workers accept from."""
        known = [each for each in self._shared if each.index not in self._expected]
        found = [(each, self.current % len(each.sockets)) for each in known]
        return [each for each in found if each not in in_vain]

    def _lines(self) -> dict[int, Line]:
        """Return the clients that wait for the generation whose turn it is, as far as is known."""
        found: dict[int, Line] = {}
        for each, number in self._lines_of(self._in_vain()):
            if not each.has_waiting(number):
                found[each.index] = ()
                continue
            try:
                line = unaccepted(each.socket_for(number))
            except OSError:
                continue
            if line:  # else they came from another network namespace
                found[each.index] = line
        return found

    def _untaken_by(self, seconds: float, waiting: int, ever: bool, at: frozenset[int]) -> None:
        addresses = [each.settings.address for each in self._listeners() if each.index in at]
        self._say_untaken(seconds, waiting, ever, " ".join(addresses))

    def _rescue_later(self) -> None:
        """Look again later: a worker that was told to finish may still accept them.

        At once where there is none, unless a generation was started for clients just now.
        """
        leaving, may_accept = {its for its, _ in self._leaving.values()}, True
        for each, number in self._in_vain():
            self._loop.unwatch(each.socket_for(number).fileno())
            there = {its % len(each.sockets) for its in leaving}
            may_accept &= number in there or not each.has_waiting(number)
        since_s = time.monotonic() - self._rescued_at
        if since_s > LAST_RESCUE_S:
            self._rescue_s = 0.0
        delay_s = max(FIRST_RESCUE_S if may_accept else 0.0, self._rescue_s - since_s)
        self._loop.call_after(_RESCUE, delay_s, self._rescue)

    def _rescue(self) -> None:
        unknown = self._discard_questions()
        clients = [each for each in self._in_vain() if (each[0].index, each[1]) not in unknown]
        waiting = [(each, number) for each, number in clients if each.has_waiting(number)]
        if waiting:
            addresses = " ".join(each.settings.address for each, _ in waiting)
            passed_by = any(each.is_passed_by(number) for each, number in waiting)
            hint = _MOUNTED if passed_by else None
            self._log.write("warning", "stranded", listen=addresses, hint=hint)
            self._rescued_at = time.monotonic()
            self._rescue_s = min(2 * self._rescue_s or FIRST_RESCUE_S, LAST_RESCUE_S)
            self._post(Stranded())
        if unknown:
            self._loop.call_after(_RESCUE, FIRST_RESCUE_S, self._rescue)
        self._watch()  # it may be that no generation could be opened now
