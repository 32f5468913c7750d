"""The SO_REUSEPORT group of a TCP address as a value: its members, and the plans to steer clients.

The value makes no system call and has no socket.  A plan is a generator of steps.  tcp_listener.py
carries each step out and sends back its error, or None.

The kernel counts members in the order of listen(2) until a member leaves: the last member then
takes that position.  A program selects members by position.  sock_diag reports only the order of
listen(2), which is another order once a member other than the last has left.  So SILENT joins last,
and leaves before another socket could join behind it.  Between plans both orders are the same, or
SILENT has the position of a shut-down socket, whose clients then get no answer.

A foreign member, which this module cannot remove, breaks that rule.  No plan can restore the order
without a shutdown of a socket at which clients may wait.  So the state records both orders then.
A program that is killed in the middle of such a plan leaves an old record.
"""

from __future__ import annotations

import errno

from ..model.lazy_dataclass import field, frozen, mutable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from typing import Any

    Order = tuple[int, ...]
    Record = tuple[Order, Order]  # the fields `listed` and `order` of a Group

#: The numbers of members other than sockets 0 and 1: our silent socket, and foreign sockets.
SILENT, OTHER = 2, -1


@frozen
class Attach:
    """Attach a program to the group, with the positions for new clients and for each mark."""

    to: int  # the member whose socket it is attached to
    position: int
    marked: Mapping[Any, int]
    drawn: int = 0  # the position of new clients in the share
    share: int = 0  # in ten thousandths


@frozen
class Join:
    """Let a member listen; it becomes the group's last member."""

    member: int


@frozen
class Leave:
    """Shut a member down."""

    member: int


if TYPE_CHECKING:
    Step = Attach | Join | Leave
    Plan = Generator[Step, OSError | None, None]
    #: A part of a plan that ends with an error or None.
    Try = Generator[Step, OSError | None, OSError | None]


@mutable
class Group:
    """The members of an address's group, and the targets of its clients."""

    sockets: Order  # 0, and 1 if there are two sockets
    listed: Order  # the members in the order of listen(2)
    order: Order | None  # the members by the kernel's positions; None: unknown
    to: int | None = None  # the target of new clients: 0, 1 or SILENT; None: not steered yet
    marked: Mapping[Any, int] = field(default_factory=dict)  # the target of each mark
    share: int = 0  # the ten thousandths of new clients for the other of sockets 0 and 1

    @classmethod
    def of(cls, count: int) -> Group:
        """Return the group of `count` sockets that began to listen one after the other."""
        members = tuple(range(count))
        return cls(members, members, members)

    @property
    def record(self) -> Record | None:
        """Both orders, if the next program cannot derive the positions; otherwise None."""
        next_one = Group.of(len(self.sockets))
        same = self.order == self.listed or next_one._order_of(self.listed) is None
        if self.order is None or (same and OTHER not in self.listed):
            return None
        return self.listed, self.order

    # -- what has happened ---------------------------------------------------------

    def found(self, listed: Order) -> None:
        """Note the present members, in the order of listen(2)."""
        if listed != self.listed:
            self.order, self.listed = self._order_of(listed), listed

    def _order_of(self, listed: Order) -> Order | None:
        if SILENT in listed[:-1] and OTHER not in listed:
            return None  # a server has called listen() again, perhaps more than once
        left, joined = _changes(self.listed, listed)
        # If some have left and others have joined, we do not know in which sequence.
        if self.order is not None and not (left and joined):
            order = self.order
            for each in left:
                order = _without(order, each)
            return (*order, *joined)
        # The members in front of SILENT have listened since before SILENT joined.
        is_known = SILENT not in listed or set(self.sockets) <= set(listed)
        return listed if is_known else None

    def joined(self, member: int) -> None:
        """Record that a member listens; it is the last member now."""
        if member not in self.listed:
            self.listed = *self.listed, member
            if self.order is not None:
                self.order = *self.order, member

    def left(self, member: int) -> None:
        """Record that a member was shut down or closed."""
        self.listed = tuple(each for each in self.listed if each != member)
        if self.order is not None:
            self.order = _without(self.order, member)
        elif SILENT not in self.listed:
            self.order = self.listed

    def swap(self) -> None:
        """Exchange sockets 0 and 1."""
        other = {0: 1, 1: 0}
        self.listed = tuple(other.get(each, each) for each in self.listed)
        self.order = self.listed

    # -- plans -----------------------------------------------------------------------

    def steer(
        self, to: int, marked: Mapping[Any, int], *, held: bool, guarded: bool, share: int = 0
    ) -> Plan:
        """Steer new clients to a socket, or during a hold to SILENT, and each mark to its socket.

        guarded: SILENT must take the position of a socket that is shut down.  share: the part of
        new clients for the other socket: none during a hold, or while that socket is shut down.
        """
        yield from self._restore_order()
        self.to, self.marked = SILENT if held else to, dict(marked)
        self.share = 0 if held else share
        stays = held or guarded
        if stays and not self._is_silent_placed(held=held):
            yield from self._end_silence()
        if stays and not self.is_silent:
            error = yield from self._try(Join(SILENT))
            if error is not None and held:
                raise error
        error = yield from self._attach(self._order if stays else self._without_silent)
        if error is not None:
            raise error
        if not stays and self.is_silent:
            yield from self._do(Leave(SILENT))

    def listen_again(self, number: int) -> Plan:
        """Listen on a socket, even after two shutdowns or half a shutdown.

        Connections would inherit that shutdown, unless the socket is shut down while it listens.
        So the socket joins twice.
        """
        yield from self._restore_order()
        # An earlier program, or a server, may have steered the group to any position before this.
        yield from self._attach(self._order, away=None if self.is_silent else number)
        yield from self._do(Join(number))
        yield from self._do(Leave(number))
        if self.is_silent and not self._order[-1] == self.listed[-1] == SILENT:
            # If the socket joined behind SILENT, it would later take SILENT's position, before an
            # older member.
            yield from self._end_silence()
        held = self.to == SILENT and self.is_silent
        yield from self._attach(self._order if held else (*self._without_silent, number))
        yield from self._do(Join(number))
        if held:
            yield from self._attach(self._order)
        elif self.is_silent:
            yield from self._do(Leave(SILENT))

    def make_room(self, number: int) -> Plan:
        """Remove a socket from the group, before a new socket replaces it."""
        if number in self.listed:
            if not self.is_silent:  # otherwise SILENT takes its position
                yield from self._attach(self._order, away=number)
            yield from self._do(Leave(number))
        yield from self._end_silence()
        yield from self._attach(self._order)
        yield from self._end_silence()

    def end_silence(self) -> Plan:
        """Remove SILENT from the group."""
        yield from self._end_silence()

    # -- parts of plans --------------------------------------------------------------

    @property
    def is_silent(self) -> bool:
        """Whether SILENT is a member."""
        return SILENT in self.listed

    @property
    def _order(self) -> Order:
        return self.listed if self.order is None else self.order

    @property
    def _without_silent(self) -> Order:
        """The order without SILENT."""
        return _without(self._order, SILENT)

    def _is_silent_placed(self, *, held: bool) -> bool:
        """Return whether SILENT, if it is a member, has a suitable position."""
        if held or not self.is_silent:
            return True
        return self._order[-1] == SILENT or not set(self.sockets) <= set(self._order)

    def _restore_order(self) -> Plan:
        """Restore known positions if a server has changed them.

        The last member leaves before SILENT leaves, and joins again afterwards.  So at each step
        the next program can derive the positions from the order of listen(2).
        """
        if self.order is not None:
            if OTHER in self.listed and SILENT in self.listed[:-1]:
                yield from self._end_silence()  # steer() lets it join again, as the last
            return
        last = self.listed[-1]
        several = len(self.listed) > 2 and last not in (SILENT, OTHER)
        if several:
            yield from self._do(Leave(last))
        yield from self._end_silence()
        if several:
            yield from self._attach((*self.listed, last))
            yield from self._do(Join(last))

    def _end_silence(self) -> Plan:
        if self.is_silent:
            if self.order is not None and len(self._without_silent) > 1:
                yield from self._attach(self._without_silent)  # the positions after SILENT has left
            yield from self._do(Leave(SILENT))

    def _attach(self, order: Order, away: int | None = None) -> Try:
        """Attach a program with the targets' positions in an order.

        away: a member that is treated as if it had left.
        If servers have locked the filters of their sockets, SILENT joins to attach the program.
        """
        error: OSError | None = OSError(errno.ENOTCONN, "it does not listen")
        present = [each for each in order if each not in (away, OTHER)]
        fallback = next(iter(present or order), 0)
        if SILENT in present:
            fallback = SILENT

        def position(member: int | None) -> int:
            target = member if member in present else fallback
            return order.index(target) if target in order else 0

        marked = {mark: position(number) for mark, number in self.marked.items()}
        other = 1 - self.to if self.share and self.to is not None else None
        draw = (position(other), self.share) if other in present else (0, 0)
        to = position(self.to)
        for member in reversed(self._order):
            if member != OTHER:
                error = yield from self._try(Attach(member, to, marked, *draw))
                if error is None:
                    return None
        if isinstance(error, PermissionError) and not self.is_silent:
            error = yield from self._try(Join(SILENT))
            if error is None:
                error = yield from self._try(Attach(SILENT, to, marked, *draw))
        return error

    def _try(self, step: Step) -> Try:
        error = yield step
        if error is None:
            if isinstance(step, Join):
                self.joined(step.member)
            elif isinstance(step, Leave):
                self.left(step.member)
        return error

    def _do(self, step: Join | Leave) -> Plan:
        error = yield from self._try(step)
        if error is not None:
            raise error


def _without(order: Order, member: int) -> Order:
    """Return the order after a member has left: the last member takes that member's position."""
    if member not in order:
        return order
    at = order.index(member)
    return (*order[:at], order[-1], *order[at + 1 : -1]) if at < len(order) - 1 else order[:-1]


def _changes(before: Order, now: Order) -> tuple[Order, Order]:
    """Return the members that have left, and the members that have joined.

    A member that has left and joined again is in both.
    """
    left: Order = ()
    count = 0  # of the members that have stayed: they precede those that have joined
    for each in before:
        if now[count : count + 1] == (each,):
            count += 1
        else:
            left = *left, each
    return left, now[count:]
