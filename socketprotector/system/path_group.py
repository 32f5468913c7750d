"""The sockets of a UNIX path as a value: their files, the path's target, and plans to change it.

The value makes no system call and has no socket.  socket_file.py looks at the files, and
unix_listener.py carries out each plan.  A plan is a tuple of steps.  If a step fails, undo() says
what to remove; if the program is killed between two steps, the next program finds the same value by
looking again.

Which generation accepts from socket 0 or 1: daemon/delivery/shared/turns.py.
"""

from __future__ import annotations

import errno
import os

from ..model.lazy_dataclass import frozen, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

#: The members beside sockets 0 and 1: the socket of a hold, and a socket that has no place yet.
RESERVE, MADE = 2, 3
#: Other targets of the path: no file, a file of no member, a closed socket's file.
MISSING, OTHER, STALE = -1, -2, -3
_THEIRS = "another program has put its file there; remove it"


@frozen
class Bind:
    """Make a listening socket with a file of its own beside the path."""

    member: int


@frozen
class Keep:
    """Give the member to which the path leads a file of its own."""

    member: int


@frozen
class Switch:
    """Lead the path to a member, by a link to its file that is renamed over the path."""

    member: int


@frozen
class RemovePath:
    """Remove the path."""


@frozen
class RemoveStaged:
    """Remove the link that is left if a program was killed during a Switch."""


@frozen
class RemoveFile:
    """Remove a member's own file."""

    member: int


@frozen
class RemoveLeftover:
    """Remove the file of a closed socket."""

    name: str


@frozen
class ShutDown:
    """Shut a member down for all processes that have it."""

    member: int


@frozen
class Close:
    """Close a member; nothing changes for processes that have a copy."""

    member: int


@frozen
class Place:
    """Put a member in an empty place, 0 or 1; a single socket moves to the other place."""

    member: int
    number: int


if TYPE_CHECKING:
    FileStep = Keep | Switch | RemovePath | RemoveStaged | RemoveFile | RemoveLeftover
    Step = Bind | ShutDown | Close | Place | FileStep
    Plan = tuple[Step, ...]


@frozen
class PathGroup:
    """The members of a path, their files, and where clients wait."""

    members: frozenset[int]
    leads_to: int = MISSING  # a member, MISSING, OTHER or STALE
    own: frozenset[int] = frozenset()  # the members that have files of their own
    waiting: frozenset[int] = frozenset()  # the members at which clients wait
    leftovers: tuple[str, ...] = ()  # files of closed sockets, at the path or beside it
    #: Those of sockets 0 and 1 that had no client at a moment when the path led elsewhere.
    left_empty: frozenset[int] = frozenset()
    path: str | None = None  # for messages

    @property
    def is_pair(self) -> bool:
        """Whether there are two sockets, one for each of two generations."""
        return self.members >= {0, 1}

    def can_lead_to(self, member: int) -> bool:
        """Return whether the path can lead to a member: another program may remove its file."""
        return member in self.own or self.leads_to == member

    @property
    def is_cut_off(self) -> bool:
        """Whether no client can connect by the path, and no file is left to repair that.

        Another program has removed the files.
        """
        return not any(map(self.can_lead_to, self.members))

    @property
    def fault(self) -> str:
        """Why no client comes by the path, and what to do; "" if clients come."""
        if self.leads_to == MISSING:
            return "its socket file was removed; reload (first make its folder, if that is missing)"
        return _THEIRS if self.leads_to == OTHER else ""

    def is_out_of_reach(self, number: int) -> bool:
        """Return whether a socket must be replaced, because no path can lead to it.

        Return False while clients wait there: its workers may be about to accept them.
        """
        return self.is_pair and not self.can_lead_to(number) and number not in self.waiting

    @property
    def reserve_is_lost(self) -> bool:
        """Whether no client waits at the socket of a hold, and no client can reach it any more."""
        is_open = self.can_lead_to(RESERVE) or RESERVE in self.waiting
        return RESERVE in self.members and not is_open

    def is_passed_by(self, number: int) -> bool:
        """Return whether clients have come to a socket, but not by the path.

        They can if the file is mounted elsewhere, because a mount keeps its original file.
        """
        return self.is_pair and number in self.left_empty and self.leads_to != number

    # -- what has happened ---------------------------------------------------------

    def noted(self) -> PathGroup:
        """Return the value that remembers which sockets the path has left without a client."""
        if not self.is_pair:
            return self.replaced()
        before = self.left_empty
        passed = {n for n in (0, 1) if n in before or n not in self.waiting} - {self.leads_to}
        return replace(self, left_empty=frozenset(passed))

    def replaced(self) -> PathGroup:
        """Return the value after a socket has moved to another place."""
        return replace(self, left_empty=frozenset())

    # -- plans -----------------------------------------------------------------------

    def steer(self, number: int, *, held: bool) -> Plan:
        """Lead the path to socket 0 or 1, or during a hold to the socket of the hold.

        If another program has removed the only socket's file, no path can lead to it.
        """
        to = RESERVE if held else number
        if not (self.is_pair or self.can_lead_to(to)):
            return ()
        return self.lead_to(to)

    def lead_to(self, member: int) -> Plan:
        """Lead the path to a member.  Raises OSError if its file, or the path, is not ours."""
        if self.leads_to == member:
            return ()
        self._check_path()
        if member not in self.own:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path)
        return (*self.keep(), Switch(member), *self._remove_leftovers())

    def keep(self) -> Plan:
        """Give the path's target its own file, which it lacks if it was bound to the path."""
        lacks = self.leads_to in self.members - self.own
        return (Keep(self.leads_to),) if lacks else ()

    def renew(self, number: int) -> Plan:
        """Make a new socket, without clients yet, for a generation that has not started.

        So that generation shares its socket with no earlier generation.  The old socket stays if
        the path leads to it, or if clients wait there.
        """
        if not self.is_pair:
            return *self.keep(), Bind(MADE), Place(MADE, number)
        if self.leads_to == number or number in self.waiting:
            return ()
        self._check_path()  # otherwise a release would start in vain
        return Bind(MADE), *self._put(MADE, number)

    def bind_anew(self, number: int) -> Plan:
        """Replace a broken socket by a new socket, which no worker has yet."""
        lead: Plan = ()
        if self.leads_to == number:
            made = replace(self, members=self.members | {MADE}, own=self.own | {MADE})
            lead = made.lead_to(MADE)
        # With a sibling, workers may still accept from the old socket.
        shut = () if self.is_pair else (ShutDown(number),)
        led = replace(self, leads_to=MADE) if lead else self
        return Bind(MADE), *lead, *shut, *led._put(MADE, number)

    def reserve(self) -> Plan:
        """Make the socket of a hold, unless it exists.  Raises OSError if the path is not ours."""
        self._check_path()
        if self.reserve_is_lost:
            return Close(RESERVE), Bind(RESERVE)
        return () if RESERVE in self.members else (Bind(RESERVE),)

    def adopt_reserve(self, number: int, *, led: bool = False) -> Plan:
        """Give the socket of a hold to the generation that gets socket 0 or 1.

        Clients that wait at socket `number` come first.  If the path leads there, the path moves
        away first.  Then the caller looks again, because a client may just have come, and calls
        again with `led`.
        """
        if RESERVE not in self.members:
            return ()
        if not self.is_pair:  # the sibling was lost during the hold
            return (Place(RESERVE, number),)
        if number in self.waiting:
            return self.lead_to(number) if led else ()
        if self.leads_to == number:
            return self.lead_to(RESERVE)
        return self._put(RESERVE, number)

    def withdraw(self, member: int) -> Plan:
        """Keep new clients from a member; its workers can still accept waiting clients.

        While the path leads to the member, its file stays: the file shows that the path is ours.
        """
        stays = self.leads_to == member or member not in self.own
        return () if stays else (RemoveFile(member),)

    def remove(self) -> Plan:
        """Remove the path, unless it is another program's file, and all files beside it."""
        path = () if self.leads_to in (MISSING, OTHER) else (RemovePath(),)
        own = map(RemoveFile, sorted(self.own))
        return RemoveStaged(), *path, *own, *self._remove_leftovers()

    # -- parts of plans --------------------------------------------------------------

    def _check_path(self) -> None:
        if self.leads_to == OTHER:
            raise OSError(errno.EEXIST, _THEIRS, self.path)

    def _put(self, member: int, number: int) -> Plan:
        """Put a member in the place of another member."""
        return *self.withdraw(number), Close(number), Place(member, number)

    def _remove_leftovers(self) -> Plan:
        return tuple(map(RemoveLeftover, self.leftovers))


def undo(done: Sequence[Step]) -> Plan:
    """Return what to remove if the step after these has failed."""
    unplaced = Bind(MADE) in done and Switch(MADE) not in done
    return (RemoveFile(MADE), Close(MADE)) if unplaced else ()
