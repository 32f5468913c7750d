"""Probes of a generation, whoever gets the clients: how they reach it, and how they are told apart.

At a TCP address a probe has a mark (system/bpf.py), by which the kernel steers it.  At a UNIX
path it connects to the file of that generation's socket.  A probe that no worker has accepted is
thrown away, so that no generation is started for it.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial

from ....system import bpf, reuseport, socket_copy, socket_snapshot
from ....system.listener import SCARCE, Listener
from ....system.sock_diag import end_of, is_waiting, unaccepted
from ..way import Way, family_of
from .turns import Turns

#: What is told to finish may accept for that long: gunicorn's threads look around once a second.
LEAVES_S = 2.0
#: Where questions by IPv6 come from, as do clients of this machine.
_SOURCE_OF_IPV6 = "::1"
#: Another socket cannot be had now, and can be later.
LATER = SCARCE | {errno.EBUSY}


def _waits(listening: socket.socket, address: tuple[str, int], client: socket.socket) -> bool:
    """Whether a client of ours waits to be accepted; others may, too.  Raises OSError."""
    if not listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise OSError(errno.ENOTCONN, "it does not listen")  # so it came to the other one
    if listening.family == socket.AF_UNIX:
        return os.fstat(client.fileno()).st_ino in unaccepted(listening)
    try:
        return is_waiting(client, address, socket_copy.device_of(listening))
    except OSError:  # sock_diag is not there
        return _has_waiting(listening)


def _end_of(client: socket.socket, listening: socket.socket) -> bytes | int:
    """Return what unaccepted() tells a client of ours by."""
    if listening.family == socket.AF_UNIX:
        return os.fstat(client.fileno()).st_ino
    return end_of(client, listening.family)


def _has_waiting(listening: socket.socket) -> bool:
    return reuseport.queue(listening)[0] > 0


class Probes:
    """What is asked, and what of it waits where."""

    def __init__(
        self,
        pairs: Callable[[], Sequence[Listener]],
        turns: Turns,
        *,
        steer: Callable[[], bool],
        persist: Callable[[], bool],
    ) -> None:
        """pairs: the listeners with two sockets.  steer: tells the kernel, and returns whether it
        knows now.  persist: writes the record down."""
        self._pairs, self._turns = pairs, turns
        self._steer, self._persist = steer, persist
        #: Listeners and socket numbers to which no client comes, but questions by IPv6 or at a UNIX
        #: socket do, of this program or one before.
        self.asked: set[tuple[int, int]] = set()
        #: Those to which questions by IPv4 come, each with an address that no client has.
        self.asked_from: set[tuple[int, int, str]] = set()
        #: With what mark the generation that gets the clients is asked, by listener and socket.
        self._marks: dict[tuple[int, int], bpf.Mark] = {}
        #: Of connections that come to a socket whoever gets the clients: its generation is asked.
        self.questions: dict[bpf.Mark, int] = {}
        #: Of those that serve: where questions came that no worker has taken, and their ends.
        self._given_up: list[tuple[socket.socket, bytes | int]] = []

    def reach(
        self,
        listeners: Sequence[Listener],
        name: str,
        knows: Callable[[int], bool] = lambda index: True,
    ) -> Way | None:
        """Return how the generation that gets the clients is reached: as clients reach it.

        name: the listener's, "" for the first.  knows: whether that generation knows a listener,
        by index.  None: there is no such one.
        """
        for each in listeners:
            if name in ("", each.settings.name) and knows(each.index):
                asked = each.socket_for(self._turns.current)
                # As for ask(): so it never leaves this machine, where an address is another one's.
                unix = asked.family == socket.AF_UNIX
                address = each.address_of(self._turns.current)
                mark = None if unix else self._mark_for(each, address)
                way = Way(address, mark, partial(_waits, asked, address), lambda: None)
                if each.has_sibling:  # else the next generation takes it
                    way.give_up = partial(self._give_up, asked)
                return way
        return None

    def _mark_for(self, listener: Listener, address: tuple[str, int]) -> bpf.Mark:
        place = listener.index, self._turns.current
        if place not in self._marks:
            mark = self._marks[place] = bpf.Mark.draw(family_of(address))
            self._will_come_from(place, mark)
        return self._marks[place]

    def _will_come_from(
        self, place: tuple[int, int], mark: bpf.Mark | None, *, no_clients: bool = False
    ) -> None:
        """Have the next program, too, know questions with a mark from clients.

        Those of IPv6 have the address of clients on this machine, and those at a UNIX socket none:
        only where no client comes.
        """
        if mark is not None and mark.family == socket.AF_INET:
            self.asked_from.add((*place, mark.source))
        elif no_clients and place not in self.asked:
            self.asked.add(place)
        else:
            return
        self._persist()  # before the first one: the next program finds it, if we are killed

    def _give_up(self, asked: socket.socket, one: socket.socket) -> None:
        self._given_up.append((asked, _end_of(one, asked)))

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
        socket_number = self._turns.accepting.get(generation)
        if socket_number is None:
            return None
        found = self._askable(name, knows)
        if found is None:
            return None
        for its, told_at in self._turns.leaving.values():
            if found.is_fresh[socket_number]:
                break
            if its == socket_number and time.monotonic() < told_at + LEAVES_S:
                why = "workers that were told to finish may still accept from its socket"
                raise OSError(errno.EAGAIN, why)
        address, asked = found.address_of(socket_number), found.socket_for(socket_number)
        place = found.index, socket_number
        no_clients = socket_number != self._turns.number_for(found) and not _has_waiting(asked)
        waits = partial(_waits, asked, address)
        # While it is in no group the kernel gives what has this mark to the other one.
        times, closing = found.joined[socket_number], socket_snapshot.closing
        closed, serving = closing(asked), found.socket_for(self._turns.number_for(found))

        def holds() -> bool:
            return (
                found.joined[socket_number] == times
                and found.is_alive(socket_number)
                and closing(asked) == closed
            )

        if asked.family == socket.AF_UNIX:  # it has a file of its own
            self._will_come_from(place, None, no_clients=no_clients)
            return Way(address, None, waits, lambda: None, holds=holds)
        while (mark := bpf.Mark.draw(family_of(address))) in self.questions:
            pass  # of IPv6 there are few
        self.questions[mark] = socket_number
        self._will_come_from(place, mark, no_clients=no_clients)
        if not self._steer():  # they would come to the generation before, which answers
            del self.questions[mark]
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
        named = (each for each in self._pairs() if name in ("", each.settings.name))
        return next((each for each in named if not each.lost and knows(each.index)), None)

    def _stop_asking(self, mark: bpf.Mark) -> None:
        """It is no more reached by this one."""
        if self.questions.pop(mark, None) is not None:
            self._steer()

    def _questions_at(self, listener: Listener, number: int) -> int | None:
        """Return how many questions wait at one of its sockets; None: a client does, too.

        Raises OSError.
        """
        one, place = listener.socket_for(number), (listener.index, number)
        if not listener.has_waiting(number):
            return 0
        given_up = {end for asked, end in self._given_up if asked is one}
        sources = {each[2] for each in self.asked_from if each[:2] == place}
        if place in self.asked:
            sources.add(_SOURCE_OF_IPV6)
        if not (given_up or sources):
            return None
        waiting, _ = reuseport.queue(one)  # first: those that come later stand behind
        if one.family == socket.AF_UNIX and place in self.asked:
            return waiting
        ends = unaccepted(one)
        gone = {0} if given_up else set()  # a question whose process has closed it
        ours = [end for end in ends if end in given_up | gone or bpf.comes_from(end, sources)]
        return waiting if waiting <= len(ours) else None

    def clients_wait(self, listener: Listener, number: int) -> bool:
        """Whether not only questions wait at one of its sockets, as far as is known."""
        try:
            return self._questions_at(listener, number) is None
        except OSError:
            return True

    def discard(self) -> set[tuple[int, int]]:
        """Have none wait where no worker accepts: no generation is to be started for it.

        Where a client waits, too, one is: it accepts them all.  Returns where that cannot be known
        now, by listener and socket number.
        """
        unknown = set()
        for each, number in [(each, number) for each in self._pairs() for number in (0, 1)]:
            there = number in self._turns.accepting.values()
            accepts = there and self._turns.is_served(each, number)
            if accepts or each not in self._turns.own(self._pairs(), number):
                continue
            one, place = each.socket_for(number), (each.index, number)
            try:
                waiting = self._questions_at(each, number)
                if waiting is None:
                    continue
                reuseport.discard_waiting(one, waiting)
            except OSError as error:
                if error.errno in LATER:
                    unknown.add(place)
                continue
            self._given_up = [given for given in self._given_up if given[0] is not one]
            self.asked_from = {entry for entry in self.asked_from if entry[:2] != place}
            self.asked.discard(place)
            self._marks.pop(place, None)
        return unknown

    def clients_come(self, places: set[tuple[int, int]]) -> None:
        """Note that clients come from now on to sockets, by listener and number."""
        self.asked -= places
