"""A model of the kernel's SO_REUSEPORT group, and an address that its value steers there.

Written from reuseport_add_sock(), reuseport_detach_sock() and reuseport_select_sock() in
net/core/sock_reuseport.c.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

from socketprotector.system import reuseport_group as group
from socketprotector.system.reuseport_group import OTHER, SILENT, Attach, Group, Join, Leave

#: New clients, those of them that the share draws, and connections with a mark.
DRAWN = "drawn"
#: The share in force, in ten thousandths.
SHARE = 500


class Kernel:
    """One group."""

    def __init__(self) -> None:
        self.listed = [0, 1]  # what sock_diag reports
        self.socks = [0, 1]
        #: The position of new clients, of each mark, and of those that the share draws.
        self.program: tuple[int, dict[Any, int]] | None = (0, {})
        self.share = 0
        self.locked: frozenset[int] = frozenset()  # whose filters a server has locked

    def copy(self) -> Kernel:
        made = Kernel()
        made.listed, made.socks = list(self.listed), list(self.socks)
        made.program, made.locked = self.program, self.locked
        made.share = self.share
        return made

    @property
    def state(self) -> Any:
        return tuple(self.listed), tuple(self.socks), repr(self.program), self.locked, self.share

    def add(self, member: int) -> None:
        if member not in self.socks:
            self.listed.append(member)
            self.socks.append(member)

    def detach(self, member: int) -> None:
        if member not in self.socks:
            return
        self.listed.remove(member)
        last = self.socks.pop()
        if last != member:
            self.socks[self.socks.index(member)] = last
        if not self.socks:
            self.program = None

    def attach(self, by: int, position: int, marked: dict[Any, int], share: int) -> None:
        if by not in self.socks:
            raise OSError(errno.EINVAL, "in no group")
        if by in self.locked:
            raise PermissionError(errno.EPERM, "locked")
        self.program, self.share = (position, dict(marked)), share

    def select(self, of: str | None) -> set[int]:
        """To which members a connection can come."""
        if self.program is not None:
            position = self.program[1].get(of, self.program[0])
            if position < len(self.socks):
                return {self.socks[position]}
        return set(self.socks)  # by a hash


class World:
    """An address: what is wanted of it, the value, and the kernel."""

    #: sock_diag is there.
    sees = True
    #: What the next program has found already where this one was killed.
    left: ClassVar[set[Any]] = set()
    #: It is killed after each step, too.
    is_killed = True

    def __init__(self) -> None:
        self.kernel = Kernel()
        self.value = Group.of(2)
        self.serving = 0
        self.asked = self.held = self.shared = False
        #: The record of the group in the state.
        self.record: group.Record | None = None
        #: A client came to the other socket, because neither its own nor SILENT was a member.
        self.astray = False

    def copy(self) -> World:
        made = World()
        made.kernel, made.sees = self.kernel.copy(), self.sees
        its = self.value
        made.value = Group(its.sockets, its.listed, its.order, its.to, its.marked, its.share)
        made.serving, made.asked, made.held = self.serving, self.asked, self.held
        made.shared = self.shared
        made.record = self.record
        return made

    @property
    def state(self) -> Any:
        its = self.value
        known = its.listed, its.order, its.to, repr(its.marked), its.share
        wanted = self.serving, self.asked, self.held, self.shared
        return self.kernel.state, known, wanted, self.record

    @property
    def is_strange(self) -> bool:
        """Whether a foreign member is there, or has left another order behind."""
        return OTHER in self.kernel.socks or self.value.record is not None

    @property
    def wanted(self) -> dict[str | None, int]:
        clients = SILENT if self.held else self.serving
        drawn = 1 - self.serving if self.shared and not self.held else clients
        return {None: clients, DRAWN: drawn, "mark": 1 - self.serving}

    @property
    def marked(self) -> dict[str, int]:
        return {"mark": 1 - self.serving} if self.asked else {}

    @property
    def classes(self) -> tuple[str | None, ...]:
        return (None, *((DRAWN,) if self.shared else ()), *(("mark",) if self.asked else ()))

    def target(self, of: str | None, wanted: Mapping[str | None, int]) -> int:
        """Return where a connection is to come; without its socket there is no share."""
        is_drawn = of == DRAWN and wanted[of] in self.kernel.socks
        return wanted[of] if of != DRAWN or is_drawn else wanted[None]

    # -- what workers do -------------------------------------------------------------

    def shut(self, number: int) -> None:
        self.kernel.detach(number)

    def listen(self, number: int) -> None:
        self.kernel.add(number)

    def lock(self, number: int) -> None:
        self.kernel.locked |= {number}

    # -- what another program does -----------------------------------------------------

    def join_foreign(self) -> None:
        self.steer(self.wanted)
        self.kernel.add(OTHER)

    def leave_foreign(self) -> None:
        self.kernel.detach(OTHER)

    # -- what we do --------------------------------------------------------------------

    def happens(self, name: str) -> None:
        """Let an event happen.

        While the group is strange, the program looks after each event: two events between two
        looks can have several results that sock_diag reports alike.
        """
        (EVENTS | FOREIGN)[name](self)
        if self.is_strange:
            self.look()
        self.record = self.value.record

    def restart(self) -> None:
        """Another program knows nothing of the group but its record."""
        self.value = Group.of(2)
        if self.record is not None:
            self.value.listed, self.value.order = self.record
        self.steer(None)

    def switch(self) -> None:
        before = self.wanted
        self.serving = 1 - self.serving
        self.steer(before)

    def ask(self) -> None:
        self.asked = not self.asked
        self.steer(self.wanted)

    def share(self) -> None:
        before = self.wanted
        self.shared = not self.shared
        self.steer(before)

    def hold(self) -> None:
        before = self.wanted
        self.held = not self.held
        self.steer(before)

    def mend(self) -> None:
        for number in (0, 1):
            if number not in self.kernel.socks:
                self.look()
                self.carry_out(self.value.listen_again(number), self.wanted)
                self.steer(self.wanted)
        self.steer(self.wanted)

    def renew(self, number: int) -> None:
        """As where accepted clients would find themselves shut down."""
        self.look()
        # No program can name the position that SILENT has before a member leaves, and after it.
        before = None if self.held and number in self.kernel.socks else self.wanted
        self.carry_out(self.value.listen_again(number), before, unsound=number)
        self.steer(self.wanted)

    def bind_anew(self, number: int) -> None:
        self.look()
        self.carry_out(self.value.make_room(number), None)
        self.kernel.locked -= {number}
        self.kernel.add(number)
        self.value.joined(number)
        self.steer(None)

    # -- how -----------------------------------------------------------------------------

    def steer(self, before: dict[str | None, int] | None) -> None:
        self.look()
        guarded = self.asked and not self.held
        share = SHARE if self.shared else 0
        plan = self.value.steer(
            self.serving, self.marked, held=self.held, guarded=guarded, share=share
        )
        self.astray = False
        whole = {0, 1} <= set(self.kernel.socks)
        try:
            self.carry_out(plan, before)
        except OSError:
            assert not {*self.kernel.socks} - {OTHER}, "it could be steered"
        else:
            self.check()
            assert not (whole and self.astray)

    def look(self) -> None:
        there = self.kernel.listed
        if self.sees:
            self.value.found(tuple(there))
        else:
            kept = [each for each in self.value.listed if each in there]
            self.value.found((*kept, *(n for n in sorted(there) if n not in kept)))

    def carry_out(
        self, plan: group.Plan, before: dict[str | None, int] | None, unsound: int = OTHER
    ) -> None:
        """Do it step by step.

        before: where clients were to come until now, None: not to check.  unsound: who comes to
        this member is lost, so they may come to any.
        """
        if self.value.order is None or self.is_strange:
            before = None  # no position is known, or not at each step
        at_last = {of: self.kernel.select(of) for of in self.classes}
        there, error = list(self.kernel.socks), None
        while True:
            try:
                step = plan.send(error) if error is not None else next(plan)
            except StopIteration:
                return
            if before is not None and isinstance(step, Leave):
                self.check_trial(step.member, there)
            error = None
            try:
                perform(self.kernel, step)
            except OSError as failed:
                error = failed
            if self.sees and self.is_killed and not self.is_strange and not self.record:
                self.check_next()
            if before is not None and error is None:
                for of in self.classes:
                    wanted = {self.target(of, before), self.target(of, self.wanted)}
                    self.check_instant(of, wanted, at_last[of], unsound)
                    at_last[of] = self.kernel.select(of)

    def check_trial(self, number: int, there: Collection[int]) -> None:
        """No client may come to one that has listened only to be shut down."""
        if number != SILENT and number not in there and self.kernel.socks != [number]:
            for of in self.classes:
                assert number not in self.kernel.select(of), f"{of} comes to {number} in vain"

    def check_instant(
        self, of: str | None, wanted: set[int], at_last: set[int], unsound: int
    ) -> None:
        socks, found = self.kernel.socks, self.kernel.select(of)
        if found <= at_last | wanted | {SILENT}:
            return  # it is right, or was so before this step
        stays = {SILENT} if self.held or self.asked else set()
        instead = (wanted - {SILENT, unsound}) | stays
        assert not instead.intersection(socks), f"{of} comes to {found} of {socks}"
        self.astray = True

    def check_next(self) -> None:
        """See whether the next program, which knows nothing of the group, can go on from here."""
        left = self.kernel.state, self.serving, self.asked, self.held, self.shared
        if left not in self.left and self.kernel.socks:
            self.left.add(left)
            other = self.copy()
            other.is_killed = False
            other.restart()

    def check(self) -> None:
        """See whether all come where the value says, and the value is right."""
        socks = self.kernel.socks
        assert self.value.order == tuple(socks)
        assert self.value.listed == tuple(self.kernel.listed)
        for of in self.classes:
            its = self.target(of, self.wanted)
            instead = {SILENT} if SILENT in socks else set(socks)
            right = {its} if its in socks else instead
            assert self.kernel.select(of) <= right, f"{of} comes to {self.kernel.select(of)}"
        assert (SILENT in socks) == (self.held or self.asked)


def perform(kernel: Kernel, step: group.Step) -> None:
    match step:
        case Attach(by, position, marked, drawn, share):
            kernel.attach(by, position, {**marked, **({DRAWN: drawn} if share else {})}, share)
        case Join(member):
            kernel.add(member)
        case Leave(member):
            kernel.detach(member)


Event = Callable[[World], None]
#: What workers do to a socket, and what we do.
OF_WORKERS: Mapping[str, Event] = {
    "shut 0": lambda world: world.shut(0),
    "shut 1": lambda world: world.shut(1),
    "listen 0": lambda world: world.listen(0),
    "listen 1": lambda world: world.listen(1),
    "lock 0": lambda world: world.lock(0),
    "lock 1": lambda world: world.lock(1),
}
#: What another program does that binds the same address.
OF_OTHERS: Mapping[str, Event] = {
    "foreign joins": World.join_foreign,
    "foreign leaves": World.leave_foreign,
}
OURS: Mapping[str, Event] = {
    "switch": World.switch,
    "ask": World.ask,
    "share": World.share,
    "hold": World.hold,
    "mend": World.mend,
    "renew 0": lambda world: world.renew(0),
    "renew 1": lambda world: world.renew(1),
    "bind anew 0": lambda world: world.bind_anew(0),
    "bind anew 1": lambda world: world.bind_anew(1),
    "restart": World.restart,
}
EVENTS = {**OF_WORKERS, **OURS}
#: Another program's events with some of the others; all together have 27,000 states.
FOREIGN = {
    **{name: event for name, event in EVENTS.items() if not name.startswith(("lock", "bind"))},
    **OF_OTHERS,
}
#: What cannot be known without sock_diag.
UNSEEN = frozenset({"listen 0", "listen 1", "restart"})
