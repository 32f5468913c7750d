"""A model of a folder with socket files, and a path that its value leads there.

At each call a program can be killed, and a client can come.  A guard keeps the recorded sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from socketprotector.system import path_group
from socketprotector.system.path_group import MADE, MISSING, OTHER, RESERVE, STALE, PathGroup

#: The other program's file.
FOREIGN = -1
PATH, NEW = "path", "new"


Event = Callable[["World"], None]


class Files:
    """The files of a folder, and the sockets that they lead to, by number."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.shut: set[int] = set()
        self.waiting: set[int] = set()  # where clients wait

    def own(self, one: int) -> str:
        return f"{one}~"

    def beside(self) -> list[str]:
        return [each for each in self.names if each.endswith("~")]


class World:
    """A path: its sockets, who has them, and what is wanted."""

    def __init__(self) -> None:
        self.files = Files()
        self.members: dict[int, int] = {}  # of this program
        self.recorded: dict[int, int] = {}  # which the guard has
        self.workers: dict[int, int] = {}  # the sockets that generations accept from
        self.current = 0
        self.starting: int | None = None  # the socket of the generation that starts
        self.next_socket = 0
        self.comes_at = -1
        self.calls = self.looks = 0
        self.failing = False  # no file can be linked
        self.path_before: int | None = None  # the path's socket, which must stay alive
        #: What a kill in front of each call leaves, and when clients may come.
        self.killed: list[World] | None = None
        self.moments: dict[Any, int] = {}
        self.bind_first()

    def bind_first(self) -> None:
        self.current, self.starting = 0, None
        self.held = self.lost = self.ended = False
        killed, self.killed = self.killed, None  # no guard would go on from there
        for step in (path_group.Bind(0), path_group.Bind(1), path_group.Switch(0)):
            self.perform(step)
        self.killed = killed
        self.workers[0] = self.members[0]
        self.record()

    def copy(self) -> World:
        made = World.__new__(World)
        made.__dict__.update(self.__dict__)
        made.files = Files()
        made.files.names = dict(self.files.names)
        made.files.shut, made.files.waiting = set(self.files.shut), set(self.files.waiting)
        made.members, made.recorded = dict(self.members), dict(self.recorded)
        made.workers = dict(self.workers)
        made.comes_at = -1
        made.calls = made.looks = 0
        made.killed, made.moments = None, {}
        return made

    @property
    def state(self) -> Any:
        """What the world is, whatever the sockets' numbers are."""
        numbers: dict[int, int] = {FOREIGN: FOREIGN}

        def number(one: int) -> int:
            return numbers.setdefault(one, len(numbers))

        known = tuple(
            tuple((place, number(each[place])) for place in sorted(each))
            for each in (self.members, self.recorded, self.workers)
        )
        names = sorted(
            (name if name in (PATH, NEW) else "~", number(one))
            for name, one in self.files.names.items()
        )
        waiting = sorted(number(each) for each in self.files.waiting)
        shut = sorted(number(each) for each in self.files.shut if each in numbers)
        wanted = self.current, self.starting, self.held, self.lost, self.ended
        return known, tuple(names), tuple(waiting), tuple(shut), wanted

    # -- the kernel and the file system ------------------------------------------------

    def is_alive(self, one: int) -> bool:
        having = (self.members, self.recorded, self.workers)
        return one not in self.files.shut and any(one in each.values() for each in having)

    def look(self, *, everything: bool = False) -> PathGroup:
        self.looks += 1
        names = self.files.names
        found = names.get(PATH)
        target = next((n for n, one in self.members.items() if one == found), None)
        if target is None:
            target = MISSING if found is None else OTHER
        leftovers: list[str] = []
        if target == OTHER and not self.is_alive(names[PATH]):
            leftovers = [each for each in self.files.beside() if names[each] == found]
            target = STALE if leftovers else OTHER
        if everything:
            ours = {*self.members.values()}
            gone = [e for e in self.files.beside() if names[e] not in ours]
            leftovers = [each for each in gone if not self.is_alive(names[each])]
        own = {n for n, one in self.members.items() if self.files.own(one) in names}
        waiting = {n for n, one in self.members.items() if one in self.files.waiting}
        return PathGroup(
            frozenset(self.members),
            target,
            frozenset(own),
            frozenset(waiting),
            tuple(leftovers),
        )

    def tick(self) -> None:
        """Between two calls: the program may be killed, and a client may come."""
        if self.calls == self.comes_at:
            self.client()
        if self.killed is not None:
            members, self.members = self.members, {}
            self.killed.append(self.copy())
            self.members = members
            # A client makes a difference from the next look on.
            self.moments[self.files.names.get(PATH), self.looks] = self.calls
        self.calls += 1

    def perform(self, step: path_group.Step) -> None:
        names, members = self.files.names, self.members
        match step:
            case path_group.Bind(number):
                members[number] = self.next_socket
                self.next_socket += 1
                names[self.files.own(members[number])] = members[number]
            case path_group.Keep(number):
                names[self.files.own(members[number])] = names[PATH]
            case path_group.Switch(number):
                names.pop(NEW, None)
                self.tick()
                if self.failing:
                    raise OSError("no space")
                names[NEW] = names[self.files.own(members[number])]
                self.tick()
                names[PATH] = names.pop(NEW)
            case path_group.RemovePath():
                del names[PATH]
            case path_group.RemoveStaged():
                names.pop(NEW, None)
            case path_group.RemoveFile(number):
                del names[self.files.own(members[number])]
            case path_group.RemoveLeftover(name):
                del names[name]
            case path_group.ShutDown(number):
                self.shut(members[number])
            case path_group.Close(number):
                del members[number]
            case path_group.Place(member, number):
                if number in members:
                    members[1 - number] = members.pop(number)
                elif len(members.keys() & {0, 1}) == 0:
                    number = 0
                members[number] = members.pop(member)

    def shut(self, one: int) -> None:
        self.files.shut.add(one)
        self.files.waiting.discard(one)  # its worker has refused them

    def carry_out(self, plan: path_group.Plan) -> None:
        for at, step in enumerate(plan):
            self.tick()
            try:
                self.perform(step)
            except OSError:
                for each in path_group.undo(plan[:at]):
                    self.perform(each)
                raise
            self.check_instant()
        self.tick()

    # -- what we do ----------------------------------------------------------------------

    def number(self, number: int) -> int:
        """The place of a socket number; a single socket has both numbers."""
        return number if self.is_pair else 0

    @property
    def is_pair(self) -> bool:
        return self.members.keys() >= {0, 1}

    @property
    def free(self) -> int:
        return 1 - self.current if self.current in self.workers else self.current

    def target(self) -> int:
        """The socket that clients come to, or will after a hold."""
        return self.number(1 - self.current if self.lost else self.current)

    def wanted(self) -> int:
        """The member that the path is to lead to."""
        place = self.target()
        served = self.workers.get(self.current, self.members[place])
        lacks = not self.lost and self.members[place] != served
        return RESERVE if (self.held or lacks) and self.is_pair else place

    def steer(self) -> None:
        held = self.wanted() == RESERVE
        try:
            if held:
                self.carry_out(self.look().reserve())
                self.record()
            self.carry_out(self.look().steer(self.target(), held=held))
        except OSError:
            group, to = self.look(), self.wanted()
            # A file that was removed leads nowhere; clients that wait in its socket keep it.
            is_lost = not group.can_lead_to(to) and (to != RESERVE or to in group.waiting)
            assert self.failing or group.leads_to == OTHER or is_lost, "it could be steered"
            if held:  # so no hold is possible
                with suppress(OSError):
                    self.carry_out(self.look().steer(self.target(), held=False))
            return
        group, to = self.look(), self.wanted()
        if group.is_pair or group.can_lead_to(to):
            assert group.leads_to == to, f"the path leads to {group.leads_to}, not to {to}"

    def record(self) -> None:
        self.recorded = dict(self.members)

    def adopt_held(self) -> None:
        if self.held or self.free in self.workers:
            return
        if self.wanted() == RESERVE:
            self.lost = True
        self.adopt_reserve(self.free)
        self.steer()

    def adopt_reserve(self, number: int) -> None:
        try:
            plan = self.look().adopt_reserve(number)
            self.carry_out(plan)
            if path_group.Switch(RESERVE) in plan:
                self.carry_out(self.look().adopt_reserve(number, led=True))
        except OSError:
            return
        self.record()

    def open(self) -> None:
        if self.starting is not None or self.free in self.workers:
            return
        number = self.free
        if not self.held:
            self.adopt_reserve(number)
        before = {*self.members.values()}
        try:
            plan = self.look().renew(number)
            self.carry_out(plan)
        except OSError:
            return
        self.record()
        self.starting = number
        accepts_from = self.members[self.number(number)]
        if plan:
            assert accepts_from not in before, "its socket is not new"
            assert accepts_from not in self.files.waiting or self.look().leads_to == number
        elif accepts_from not in self.files.waiting:
            assert self.look().leads_to == number, "it shares an earlier one's socket"
        self.workers[number] = accepts_from
        self.steer()
        self.check_probed()

    def route(self) -> None:
        if self.starting is None:
            return
        self.current, self.starting = self.starting, None
        self.lost = False
        self.steer()
        self.adopt_held()

    def end(self) -> None:
        """Have the newest generation that gets no clients end."""
        number = self.starting if self.starting is not None else 1 - self.current
        if self.starting is None and number in self.workers:  # it has become quiet before
            self.files.waiting.discard(self.workers[number])
        self.starting = None
        self.workers.pop(number, None)
        self.adopt_held()

    def hold(self) -> None:
        self.held = not self.held
        self.steer()
        if not self.held:
            self.adopt_held()

    def restart(self) -> None:
        """Another program goes on with what the guard has."""
        self.members, self.failing = dict(self.recorded), False
        self.mend()
        self.steer()
        self.adopt_held()

    def break_(self, number: int) -> None:
        """A worker shuts a socket down."""
        self.shut(self.members[self.number(number)])
        self.mend()

    def mend(self) -> None:
        for number in (0, 1):
            if self.members.get(number) in self.files.shut:
                try:
                    self.carry_out(self.look().bind_anew(number))
                except OSError:
                    self.drop(number)
                self.record()
                self.steer()
                self.adopt_held()

    def drop(self, number: int) -> None:
        """A broken socket cannot be bound again: the other one is left."""
        if not self.is_pair:
            return
        self.carry_out(self.look().withdraw(number))
        del self.members[number]
        self.members = {0 if n < RESERVE else n: one for n, one in self.members.items()}

    def while_full(self, event: Event) -> None:
        """The file system lets nothing be linked meanwhile; later it does."""
        self.failing = True
        event(self)
        self.failing = False
        self.steer()
        self.adopt_held()

    def start_again(self, *, killed: bool) -> None:
        """All processes end, or are killed; another program binds the path again."""
        names = self.files.names
        if killed:
            self.files.waiting.clear()
        elif self.files.waiting or names.get(PATH) == FOREIGN:
            return
        else:
            self.stop()
            self.files.waiting.clear()  # the workers have accepted later clients
        self.members, self.recorded, self.workers = {}, {}, {}
        if names.get(PATH) == FOREIGN:
            names.pop(PATH)  # its owner removes it: otherwise no program could start
        for each in [*self.files.beside(), *([PATH] if PATH in names else [])]:
            del names[each]
        self.bind_first()

    def stop(self) -> None:
        self.carry_out(self.look(everything=True).remove())
        self.ended = True

    # -- what others do --------------------------------------------------------------------

    def client(self, name: str = PATH) -> None:
        one = self.files.names.get(name, FOREIGN)
        if one != FOREIGN and self.is_alive(one):
            self.files.waiting.add(one)

    def client_at(self, number: int) -> None:
        """By the socket's own file, as by a mount of it."""
        if number in self.members:
            self.client(self.files.own(self.members[number]))

    def accept(self) -> None:
        self.files.waiting -= {*self.workers.values()}

    def lose_path(self) -> None:
        self.files.names.pop(PATH, None)

    def lose_files(self) -> None:
        self.files.names.clear()
        self.look_after()

    def lose_file(self, number: int) -> None:
        self.files.names.pop(self.files.own(self.members[self.number(number)]), None)

    def replace_path(self) -> None:
        if self.files.names.get(PATH) == FOREIGN:
            self.lose_path()
        else:
            self.files.names[PATH] = FOREIGN

    def look_after(self) -> None:
        """As SocketRepair does: a needed socket's file is gone, so another one is bound."""
        for number in (0, 1):
            starts = number == self.starting and number != self.target()
            if not (starts or number == self.target()):
                continue
            if self.look().is_out_of_reach(number):
                try:
                    self.carry_out(self.look().bind_anew(number))
                except OSError:
                    continue
                self.record()
                self.steer()
                self.adopt_held()
                if starts:
                    self.end()
        self.check_probed()

    # -- what must hold ----------------------------------------------------------------------

    def check_probed(self) -> None:
        """A probe reaches the starting generation, or clients wait for it."""
        if self.starting is not None and self.is_pair:
            self.carry_out(self.look().keep())  # as UnixListener.ensure_address() does
            group = self.look()
            can_be_probed = self.starting in group.own | group.waiting
            assert can_be_probed, "the starting generation cannot be probed"

    def happens(self, name: str) -> None:
        """Let an event happen."""
        names = self.files.names
        if name in STEADY:
            self.path_before = names.get(PATH)
            if self.path_before is not None and not self.is_safe(self.path_before):
                self.path_before = None
        EVENTS[name](self)
        self.check_instant()
        self.path_before = None
        assert MADE not in self.members
        if not self.ended:
            self.check_clients({*self.members.values(), *self.workers.values()})

    def is_safe(self, one: int) -> bool:
        """Whether a socket is there for clients even if the program is killed now."""
        having = {*self.recorded.values(), *self.workers.values()}
        return one == FOREIGN or (one in having and one not in self.files.shut)

    def check_instant(self) -> None:
        """A client can connect at each moment, and a process has its socket."""
        having = (self.members, self.recorded, self.workers)
        self.check_clients({one for each in having for one in each.values()})
        if self.path_before is None:
            return
        found = self.files.names.get(PATH)
        assert found is not None, "the path is gone"
        assert self.is_safe(found), "the path leads to no recorded socket"
        if self.path_before == FOREIGN:
            assert found == FOREIGN, "another program's file is gone"

    def check_clients(self, having: set[int]) -> None:
        lost = self.files.waiting - having
        assert not lost, f"clients of {lost} are lost"

    def check_end(self) -> None:
        """Nothing is left at the end but another program's file."""
        self.stop()
        left = {name: one for name, one in self.files.names.items() if one != FOREIGN}
        assert not left, f"{left} is left"


OURS: Mapping[str, Event] = {
    "open": lambda world: world.open(),
    "route": lambda world: world.route(),
    "end": lambda world: world.end(),
    "hold": lambda world: world.hold(),
    "restart": lambda world: world.restart(),
}
#: These leave the path leading to a socket, also if the program is killed meanwhile.
STEADY = frozenset(OURS)
OF_OTHERS: Mapping[str, Event] = {
    "client": lambda world: world.client(),
    "accept": lambda world: world.accept(),
    "shut 0": lambda world: world.break_(0),
    "shut 1": lambda world: world.break_(1),
    "shut current, full": lambda world: world.while_full(lambda one: one.break_(one.current)),
}
RARE: Mapping[str, Event] = {
    "lose files": lambda world: world.lose_files(),
    "lose path": lambda world: world.lose_path(),
    "lose file 0": lambda world: world.lose_file(0),
    "lose file 1": lambda world: world.lose_file(1),
    "replace path": lambda world: world.replace_path(),
    "client at 0": lambda world: world.client_at(0),
    "client at 1": lambda world: world.client_at(1),
    "route, full": lambda world: world.while_full(lambda world: world.route()),
    "start again": lambda world: world.start_again(killed=False),
    "all killed": lambda world: world.start_again(killed=True),
}
COMMON = {**OURS, **OF_OTHERS}
EVENTS = {**COMMON, **RARE}
