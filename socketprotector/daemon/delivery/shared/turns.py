"""Knows which generation accepts from which socket, and which socket gets a listener's clients.

This module makes no system call: socket_steering.py applies the assignment to the kernel.
"""

from __future__ import annotations

from ....model.lazy_dataclass import field, frozen, mutable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from ....model.records import SteeringRecord
    from ....system.listener import Listener


@frozen
class Share:
    """The share of the new clients that a canary gets, at socket number `1 - Turns.current`."""

    generation: int  # the canary's number
    part: int  # in ten-thousandths of the new clients
    listeners: frozenset[int]  # indices of listeners known to the canary and the current generation


@mutable
class Turns:
    """The assignment of sockets to generations.

    A listener's sockets have the numbers 0 and 1.  If a listener has a single socket, both numbers
    mean this socket.  The current generation accepts from the socket number `current`.
    """

    current: int = 0  # the number of the socket that gets new clients
    #: Generation -> the number of the socket that its workers accept from.
    accepting: dict[int, int] = field(default_factory=dict)
    #: Finishing generation -> the number of its socket, and when it was ordered to finish.
    leaving: dict[int, tuple[int, float]] = field(default_factory=dict)
    #: Index of a listener that the current generation does not know -> the number of the socket
    #: that gets the listener's clients.
    expected: dict[int, int] = field(default_factory=dict)
    #: Pairs of generation and listener index: the generation has workers without the listener's
    #: present socket.  These workers started before the listener was added, or before its socket
    #: was replaced or dropped.
    unserved: frozenset[tuple[int, int]] = frozenset()
    #: Those pairs of `unserved` whose generation also has newer workers with the socket.
    partly_served: frozenset[tuple[int, int]] = frozenset()
    #: Indices of listeners whose clients wait at the next generation's socket, because some or all
    #: workers of the current generation lack the listener's present socket.
    passed_on: frozenset[int] = frozenset()
    #: True once a stop has begun to close the listeners: each socket that a service manager passed
    #: in (`foreign` in model/settings.py) was given back to the service manager.  All new clients
    #: of the socket's address go to this socket, where the service manager keeps listening.
    given_back: bool = False
    #: None: there is no canary.  Not recorded: after an upgrade or a kill, the next program repeats
    #: the action RouteTo, which sets the share again.
    share: Share | None = None

    def adopt(self, record: SteeringRecord) -> None:
        """Resume from the record of an earlier program."""
        self.current, self.passed_on = record.socket_number, frozenset(record.lost)
        self.unserved = frozenset(record.unserved)
        self.partly_served = frozenset(record.partly_served)
        self.expected = dict(record.expected)
        self.leaving = {generation: (number, at) for generation, number, at in record.leaving}

    @property
    def free(self) -> int:
        """The socket number, 0 or 1, that the next generation gets."""
        return 1 - self.current if self.current in self.accepting.values() else self.current

    @property
    def routed(self) -> set[int]:
        """The generations that accept from the socket number `current`."""
        return {each for each, number in self.accepting.items() if number == self.current}

    @property
    def starting(self) -> int | None:
        """The newest generation, if it is not current; otherwise None."""
        newest = max(self.accepting, default=0)
        return newest if self.accepting.get(newest, self.current) != self.current else None

    def number_for(self, listener: Listener) -> int:
        """Return the number of the socket that gets new clients, or will get them after a hold."""
        if listener.index in self.passed_on:
            return 1 - self.current
        return self.expected.get(listener.index, self.current)

    def share_of(self, listener: Listener) -> int:
        """Return the canary's share of a listener's new clients, in ten-thousandths.

        0: a single socket gets all new clients of the listener.
        """
        share, other = self.share, 1 - self.current
        if share is None or listener.index not in share.listeners or not listener.has_sibling:
            return 0
        if self.number_for(listener) == other or not self.is_served(listener, other):
            return 0
        return 0 if self.given_back and listener.settings.foreign else share.part

    def gets_clients(self, listener: Listener, number: int) -> bool:
        """Return whether new clients go to this socket of the listener, or will after a hold."""
        return number == self.number_for(listener) or self.share_of(listener) > 0

    def accepting_at(self, listener: Listener, number: int) -> set[int]:
        """Return the generations that accept from the listener's socket of this number."""
        count = len(listener.sockets)
        return {
            generation
            for generation, accepts in self.accepting.items()
            if accepts % count == number % count
        }

    def takers(self, listener: Listener, number: int) -> set[int]:
        """Return the generations with workers that have the listener's socket of this number."""
        lacking = self.unserved - self.partly_served
        generations = self.accepting_at(listener, number)
        return {each for each in generations if (each, listener.index) not in lacking}

    def is_served(self, listener: Listener, number: int) -> bool:
        """Return whether all workers of some generation accept from this socket, or will.

        Also return True once a passed-in listener was given back (`given_back`): then the service
        manager accepts.
        """
        if self.given_back and listener.settings.foreign:
            return True
        generations = self.accepting_at(listener, number)
        if not generations:
            # In two cases the next generation will accept here without a rescue (socket_watch.py).
            # Case 1: no generation accepts from any socket.  Case 2: new clients come to this
            # socket, and the listener is not in `passed_on`.  (The clients of a listener in
            # `passed_on` need a rescue.)
            is_next = number == self.number_for(listener) and listener.index not in self.passed_on
            return not self.accepting or is_next
        return any((generation, listener.index) not in self.unserved for generation in generations)

    def workers_may_accept(self, listener: Listener, number: int, left_since: float) -> bool:
        """Return whether workers might still accept from the listener's socket of this number.

        left_since: workers that were ordered to finish before this time accept no more.
        """
        if self.takers(listener, number):
            return True
        count = len(listener.sockets)
        return any(
            left_number % count == number % count and ordered_at > left_since
            for left_number, ordered_at in self.leaving.values()
        )

    def not_given_back(
        self, listeners: Iterable[Listener], number: int, generation: int = 0
    ) -> list[Listener]:
        """Return these listeners, except those whose socket `number` was given back.

        generation: if it is not 0, also leave out a listener if no worker of this generation has
        the listener's present socket.
        """
        is_given_back = self.given_back and number == 0
        lacking = self.unserved - self.partly_served
        return [
            each
            for each in listeners
            if not (is_given_back and each.settings.foreign)
            and (generation, each.index) not in lacking
        ]

    def leave(self, generation: int, now: float) -> int | None:
        """Record that a generation was ordered to finish; return the number of its socket.

        None: the generation was not in `accepting`.
        """
        number = self.accepting.pop(generation, None)
        if number is not None:
            self.leaving[generation] = number, now
        self.unserved = frozenset(each for each in self.unserved if each[0] != generation)
        self.partly_served &= self.unserved
        return number

    def expect(self, listener: Listener, *, dry_run: bool) -> int:
        """Let a new listener's clients wait for the next generation; return the socket's number.

        dry_run: if True, the next generation gets no clients, so the new listener's clients wait
        at the current socket.
        """
        number = self.expected[listener.index] = self.current if dry_run else self.free
        # Leave the listener out of `unserved` if it has a single socket, or in a dry run.  In both
        # cases its clients wait at the current socket.  An entry in `unserved` would start a rescue
        # (socket_watch.py) for these clients.
        if listener.has_sibling and not dry_run:
            self.unserved |= {(generation, listener.index) for generation in self.accepting}
        return number

    def turn_to(
        self,
        number: int,
        indices: Collection[int],
        knows: Callable[[int], bool] | None,
        share: Share | None = None,
    ) -> None:
        """Assign new clients to socket `number`, and a canary's share to the other socket.

        indices: the indices of all listeners.  knows: returns whether the generation at socket
        `number` knows a listener; None: no generation has this socket yet.  If this generation
        does not know a listener, the listener's clients stay at their present socket.
        """
        if knows is not None and number != self.current:
            unknown = {index: self.current for index in indices if not knows(index)}
            self.expected = unknown | self.expected
        self.expected = {
            index: socket_number
            for index, socket_number in self.expected.items()
            if index in indices and not (knows and knows(index))
        }
        self.passed_on = frozenset() if number != self.current else self.passed_on & set(indices)
        self.current, self.share = number, share

    def lacks_workers(self, listener: Listener) -> bool:
        """Return whether a UNIX path's clients go to a socket that some workers lack.

        Only workers of the generation that accepts there matter.  One worker without the socket is
        enough, even if the generation's newer workers have the socket (`partly_served`).  Return
        False if the listener is already in `passed_on`.
        """
        if not listener.path or listener.index in self.passed_on:
            return False
        return not self.is_served(listener, self.number_for(listener))

    def pass_on(self, listener: Listener) -> bool:
        """If lacks_workers() is true, add the listener to `passed_on`; return whether it was added.

        The clients of a listener in `passed_on` wait for the next generation.
        """
        is_added = self.lacks_workers(listener)
        if is_added:
            self.passed_on |= {listener.index}
        return is_added

    def note_replaced(self, listener: Listener, number: int | None) -> set[int]:
        """Record that a socket was replaced or dropped.

        Returns the generations whose workers had the replaced or dropped socket.  These workers
        lack the listener's present socket.

        number: the socket's number; None: all generations share the socket.
        """
        lacking = {each for each, accepts in self.accepting.items() if number in (None, accepts)}
        pairs = {(generation, listener.index) for generation in lacking}
        self.unserved |= pairs
        self.partly_served -= pairs
        return lacking

    def note_new_worker(self, generation: int, knows: Callable[[int], bool]) -> bool:
        """Record that a worker of a generation will start with the present sockets.

        Returns whether the worker has a socket that all earlier workers of the generation lack.

        knows: returns whether the generation knows a listener, by index.
        """
        served = {each for each in self.unserved if each[0] == generation and knows(each[1])}
        has_new_socket = not served <= self.partly_served
        self.partly_served |= served
        return has_new_socket
