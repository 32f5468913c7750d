"""A life under --handoff listener: the workers accept, from sockets that they have in common.

Beside world.py: an address has two sockets where it is a port that we have bound, and new clients
come to the one that the kernel steers them to.  A client's handshake may be under way, it may have
said nothing yet, and workers accept, read and finish as they like.  A worker is one process, or a
master that accepts nothing with children that do; when that dies its children live on.

What must hold: each client that has connected is accepted and finished by a worker that was not
killed; new clients come to the socket that has the route; at rest nothing of an old generation
accepts.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

from socketprotector_client import wire

from socketprotector.core.events import HoldRequested
from socketprotector.core.fleet import Phase, State
from socketprotector.core.snapshot import Snapshot
from socketprotector.daemon.config_reader import ConfigAnswer
from socketprotector.daemon.control import rollout
from socketprotector.daemon.delivery.shared.open_counts import NO_TAG
from socketprotector.daemon.delivery.shared.quiescing import GENERATION_LAST_S
from socketprotector.daemon.delivery.shared.shared_delivery import SharedDelivery
from socketprotector.daemon.delivery.shared.socket_steering import SocketSteering
from socketprotector.daemon.effects import Effects
from socketprotector.model.listen_fds import FIRST_FD
from socketprotector.model.settings import ListenerSettings, Settings
from socketprotector.system import inherited, proc_scan
from tests.simulation.files import Connection, File, Question, failure
from tests.simulation.kernel import End, Socket, inode_of
from tests.simulation.ports import Address, Listening, is_drawn
from tests.simulation.world import BACKLOG, Voice, World

#: Why clients may be lost that come to an address which a worker has done something to.
MISCHIEF = "mischief"
#: How often it may come to rest after it has been disturbed there.
TEMPTATIONS = 6


def steering_of(effects: Effects) -> SocketSteering:
    delivery = effects.delivery
    assert isinstance(delivery, SharedDelivery)
    return delivery.steering


class Server:
    """A process that accepts: a worker that does so itself, or a child of one."""

    def __init__(self, pid: int, leader: Leader | None, listening: Mapping[int, Listening]) -> None:
        self.pid = pid
        self.leader = leader if leader is not None else cast("Leader", self)
        self.listening = dict(listening)
        self.connections: list[Connection] = []
        self.signalled = False  # to finish
        self.quickly = False  # and to drop what it has
        self.rude = False  # it drops the unread when told to finish
        self.hangs = False
        self.ended = False
        self.orphan = True  # no child of the protector that runs now
        self.gone = False  # reaped, by any process
        for each in self.listening.values():
            each.take()
            each.used = True

    @property
    def told(self) -> bool:
        """Whether it was told to finish."""
        return self.signalled

    def signal(self, number: int) -> None:
        """Be sent a signal."""
        if number == signal.SIGKILL:
            self.end(os.CLD_KILLED, number)
        else:
            self.signalled = True
            self.quickly = number == signal.SIGTERM != self.leader.drain_signal

    def end(self, code: int, status: int) -> None:
        """End, with all that it has."""
        if self.ended:
            return
        self.ended = True
        for each in self.connections:
            each.drop()
        self.connections.clear()
        self.stop_accepting()
        if self.leader is not self:
            self.gone = True  # its parent, or the process it was left to, reaps it

    def stop_accepting(self) -> None:
        """Close the listening sockets."""
        left, self.listening = self.listening, {}
        for each in left.values():
            each.drop()

    def accept(self, chance: float) -> Connection | None:
        """Accept a client, if any has connected."""
        waiting = [each for each in self.listening.values() if each.backlog]
        if not waiting:
            return None
        connection = waiting[int(chance * len(waiting))].backlog.popleft()
        if isinstance(connection, Question):
            connection.taken = True
            connection.drop()
            return self.accept(chance)
        connection.taken_by.append(self.pid)
        connection.late = self.told or self.leader.told or self.leader.line.no_receive
        self.connections.append(connection)
        return connection


class Leader(Server):
    """A worker: what the protector has started, and what that has."""

    def __init__(self, pid: int, environment: Mapping[str, str], given: Mapping[int, File]) -> None:
        places = range(FIRST_FD, FIRST_FD + int(environment["LISTEN_FDS"]))
        found = {place: given[place] for place in places}
        super().__init__(
            pid, None, {n: each for n, each in found.items() if isinstance(each, Listening)}
        )
        self.address = environment["NOTIFY_SOCKET"]
        self.generation = int(environment["SERVER_STARTER_GENERATION"])
        self.voice = Voice(environment, given)
        line = given[int(environment[wire.ENV_RETURN])]
        assert isinstance(line, End)
        self.line = line
        line.take()
        self.drain_signal = int(signal.SIGTERM)
        self.told_by: Callable[[Leader], None] = lambda leader: None
        self.children: list[Server] = []
        self.master = False  # it leaves accepting to them
        self.ready = False
        self.reaped = False
        self.orphan = False
        self.unknown = False
        self.result = (os.CLD_EXITED, 0)

    def end(self, code: int, status: int) -> None:
        """End; the children live on."""
        if not self.ended:
            self.result = code, status
            self.line.drop()
        self.voice.close()
        super().end(code, status)

    @property
    def told(self) -> bool:
        """Whether it was told, by a signal or, where it is on the library, on its line."""
        return self.signalled or (self.line.no_receive and not (self.master or self.rude))

    def signal(self, number: int) -> None:
        """Be sent a signal."""
        if number == self.drain_signal and not self.signalled:
            self.told_by(self)
        super().signal(number)

    @property
    def leaving(self) -> bool:
        """It has been asked to go, or the operator has to end it.

        That is one of which no program knows, and that does not end with its line.
        """
        return self.told or (self.unknown and (self.master or self.rude))

    @property
    def living(self) -> list[Server]:
        """What lives of its group."""
        return [each for each in (self, *self.children) if not each.ended]


class Handed(World):
    """Everything around one protector whose workers accept."""

    ACCEPTS = False
    ADDED: Any = ("tcp", "tcp", "tcp", "tcp6", "zero", "alone", "unix", "unix", "long", "abstract")
    KINDS: Any = (*ADDED[:8], "foreign", "long", "single", "abstract", "passed in")
    PAIRED: Any = ("tcp", "tcp", "tcp6", "zero", "unix")
    ASKED = 0.4
    GAPS = (8, 30, 100)
    TIME = (0.98, (0.001, 0.02, 0.1, 0.2, 0.5), 20.0)
    workers: list[Leader]

    def _choose(self, pick: Callable[[Any], Any]) -> Settings:
        self._seconds: dict[Listening, Listening] = {}
        self._thirds: dict[Listening, Listening] = {}
        self._has_stopped = False  # an earlier program
        self._impatient = random.Random(f"clients {self.seed}").random() < 0.3
        self._tempted = 0
        self.kernel.moved, self.kernel.asked = self._look_at_paths, self._look_at_question
        self._crowded = False  # there are too few descriptors for two generations
        self._mischievous = pick((False, False, True)) and not self._asks
        self._rude = pick((0.0, 0.5))
        self._masters = pick((0.0, 0.5, 1.0))  # how many of the workers are
        listeners = tuple(self._bind_one(n, pick) for n in range(pick((1, 1, 2))))
        return Settings(
            name="daemon",
            command=("./daemon",),
            directory="/srv",
            listeners=listeners,
            policy=replace(pick(self.POLICIES), workers_accept=True),
            handoff="listener",
            drain_signal=int(pick((signal.SIGTERM, signal.SIGQUIT))),
            workers=pick((1, 1, 2, 3)),
            ready_after_s=pick((None, None, None, 1.0)),
            guarded=self.fd_store == "guard",
            secret="x",
        )

    @property
    def _addresses(self) -> list[Address]:
        return list(dict.fromkeys(each.address for each in self._listening))

    def _may_serve(self, worker: Any) -> bool:
        return not worker.ended

    def _add(self, index: int, pick: Callable[[Any], Any], found: ConfigAnswer) -> ListenerSettings:
        its = super()._add(index, pick, found)
        second = self._seconds.get(self._listening[-1])
        if second is not None:
            found.siblings[index] = self.kernel.install(second)
        third = self._thirds.get(self._listening[-1])
        if third is not None:
            found.reserved[index] = self.kernel.install(third)
        return its

    def _bind_one(
        self, number: int, pick: Callable[[Any], Any], kinds: Any = None
    ) -> ListenerSettings:
        kind = pick(self.PAIRED if self._asks else kinds or self.KINDS)
        if kind in ("long", "single", "abstract", "passed in"):
            # Too long for the names of two files, so that the generations share one; or the
            # second one could not be had until now.
            name = "s" * 90 if kind == "long" else "s"
            path = f"/srv/{name}{number}" if kind in ("long", "single") else f"\0srv/{number}"
            one = self._bind(socket.AF_UNIX, path)
        elif kind == "unix":
            one = self._bind_beside(f"/srv/s{number}")
        else:
            family = socket.AF_INET6 if kind == "tcp6" else socket.AF_INET
            one = self._bind(family, ("h", 1 + number))
        self._listening.append(one)
        address, inode = one.address.told, one.address.path_inode
        if kind in ("foreign", "passed in"):
            one.foreign = True
            one.take()  # by the process that has passed it in
        elif kind in ("tcp", "tcp6", "zero"):
            one.port_zero = kind == "zero"
            self._seconds[one] = self._bind_second(one)
        elif kind == "unix":
            self._seconds[one] = self.kernel.bind_beside(one.address)
        if one.address.by_number and not one.foreign:
            self._thirds[one] = self._bind_third(one)
        return ListenerSettings(address, device=1 if inode else 0, inode=inode, foreign=one.foreign)

    def _bind_beside(self, path: str) -> Listening:
        """Bind the first socket of a path beside it.  Raises OSError."""
        kernel = self.kernel
        address = kernel.addresses.setdefault(path, Address(socket.AF_UNIX, path, kernel.names))
        if address.told in self._listed or kernel.names.at(path) is not None:
            raise failure(errno.EADDRINUSE)
        kernel.names.pop(path, None)
        kernel.remove_stale(path)
        made = kernel.bind_beside(address)
        kernel.names[path] = kernel.names[made.own_file]
        return made

    def _bind_second(self, first: Listening) -> Listening:
        first.reuseport = True
        first.address.group.append(first)
        second = Listening(first.address)
        second.reuseport = True
        second.bind(first.address)
        second.listen(self.kernel.somaxconn)
        first.address.steered = 0
        return second

    def _bind_third(self, first: Listening) -> Listening:
        first.reuseport = True
        third = Listening(first.address)
        third.reuseport = True
        third.bind(first.address)
        return third

    def _to_give(self) -> dict[str, File]:
        found = super()._to_give()
        for n, one in enumerate(self._listening):
            if one in self._seconds:
                found[f"{inherited.SIBLING}{n}"] = self._seconds[one]
            if one in self._thirds:
                found[f"{inherited.RESERVED}{n}"] = self._thirds[one]
        return found

    # -- what the kernel asks --------------------------------------------------------

    def _start(
        self, argv: tuple[str, ...], environment: dict[str, str], given: dict[int, File]
    ) -> int:
        worker = Leader(self._new_pid(), environment, given)
        worker.hangs = not self._deploy_works and self._chance() < 0.5
        worker.master = self._chance() < self._masters
        worker.rude = self._chance() < self._rude
        worker.drain_signal = self.settings.drain_signal
        worker.told_by = self._check_told
        self.workers.append(worker)
        self._processes[worker.pid] = worker
        return worker.pid

    def _reason(self) -> str:
        return super()._reason() or ("an earlier stop" if self._has_stopped else "")

    def _blame(self, connection: Connection) -> str:
        # A client that connects while its socket is shut down is lost when a stop closes that.
        return MISCHIEF if connection.excuse == MISCHIEF else super()._blame(connection)

    def _strangers(self, family: proc_scan.Family) -> Iterator[tuple[int, str, frozenset[int]]]:
        for leader in self.workers:
            if leader.pid not in family.known | family.groups:
                for each in leader.living:
                    address = leader.address if each is leader else ""
                    listening = each.listening.values()
                    yield each.pid, address, frozenset(inode_of(file) for file in listening)

    def _group_of(self, leader: Any) -> list[Any]:
        if leader.leader is not leader:
            return []  # one that has the number of a leader that is gone, in a group of another
        return [leader, *leader.children]

    def _excuse(self, why: str) -> None:
        super()._excuse(why)
        for address in self._addresses:
            for each in address.clients.values():
                each.excuse = why

    def _forget_others(self, snapshot: Snapshot) -> None:
        """Note which workers and questions the state does not tell of."""
        super()._forget_others(snapshot)
        told = {source for *_, source in snapshot.delivery.steering.asked_from}
        waiting = (each for address in self._addresses for each in address.listening)
        for each in (each for one in waiting for each in one.backlog):
            if isinstance(each, Question) and self.kernel.sources[b"%d" % each.number] not in told:
                each.excuse = "the protector was killed before the state told of it"

    # -- what may happen ---------------------------------------------------------------

    def _what_happens(self) -> list[tuple[Callable[[], None], int]]:
        common = dict(super()._what_happens())
        del common[self._shut_channel]
        common |= {
            self._connect: 2 if self._few_clients else 150,
            self._shake: 60,
            self._speak: 40,
            self._take: 200,
            self._read: 150,
            self._finish: 100,
            self._time: 300,
            self._obey: 150,
            self._go_away: 15 * self._impatient,
            self._fork_child: 40,
            self._crash_child: 8,
            self._mischief: 20 * self._mischievous,
            self._hold: 10,
            self._folder: 4,
            self._remove_a_file: 4 * self._mischievous,
            self._hup: 40,
            self._crash: 30,
            self._upgrade: 3 * common[self._upgrade],
            self._unguard: 6 * (self.seed % 3 == 2 and self.fd_store == "guard"),
            self._term: 2 * common[self._term],
        }
        return list(common.items())

    def _say_ready(self, worker: Any, more: bytes = b"") -> bool:
        """A master, and one that drops clients, is not on the library."""
        return super()._say_ready(worker, b"" if worker.master or worker.rude else more)

    def _hold(self) -> None:
        """A client of the control socket wants a hold."""
        protector = self._supervisor
        if self._starting or protector is None or self.kernel.wake is None:
            return
        effects = protector.effects
        if steering_of(effects).hold.refusal(effects.delivery.listeners) is not None:
            return
        settling = protector.fleet.of(Phase.SETTLING)
        left_s = rollout.settle_left_s(settling.number, effects) if settling else None
        asked = HoldRequested(self._random.choice((0.5, 3.0, 15.0)), left_s)
        self._say(f"a hold of {asked.seconds:g} s is asked for")
        self._loop.call_after("hold", 0.0, lambda: protector.runtime.post(asked))
        self._children_ended()  # so that it looks whose time has come

    def _folder(self) -> None:
        """The folder of paths cannot be written to for a while; or it can again."""
        codes = (errno.EACCES, errno.EROFS, errno.ENOSPC)
        self.kernel.unwritable = 0 if self.kernel.unwritable else self._random.choice(codes)
        self._say(f"the folder cannot be written to: {self.kernel.unwritable}")

    def _be_calm(self) -> None:
        self.kernel.unwritable = 0
        super()._be_calm()

    def _connect(self) -> None:
        self._connect_to(self._addresses[int(self._chance() * len(self._addresses))])

    def _connect_to(self, address: Address) -> None:
        if len(address.clients) >= BACKLOG:
            return
        to = address.for_new(self.connections)
        if to is not None and to.drops:
            self._check_dropped(address)
            return  # and comes again later
        if to is None:
            self._refused(address)
            return
        if to.full:
            return  # and comes again later
        self._check_socket(address, to)
        self.connections += 1
        connection = Connection(self.connections, self._connection_lost, address)
        connection.take()
        if address.disturbed or to.locked:
            connection.excuse = MISCHIEF
        under_way = address.by_number and self._chance() < 0.3
        if self._note:
            self._note(f"{connection} comes to {to.name}, socket {to.inode}")
        if under_way:
            to.handshakes.append(connection)
        else:
            self._establish(to, connection)

    def _establish(self, to: Listening, connection: Connection) -> None:
        connection.established = True
        connection.tag = to.tag
        assert not to.drops, f"{connection} would never be accepted"
        if self._chance() < 0.8:
            self._says(connection)
        if to.address.by_number and to.mask:  # it finds itself shut down
            connection.drop()
        else:
            to.backlog.append(connection)

    def _go_away(self) -> None:
        """A client closes, or resets; one that has connected is accepted all the same."""
        address = self._addresses[int(self._chance() * len(self._addresses))]
        if not address.clients:
            return
        found = self._random.choice(list(address.clients.values()))
        self._say(f"{found} goes away")
        if found.established and self._chance() < 0.5:
            self._says(found)  # the end of file, which is to be read
            return
        found.excuse = "it went away"
        del address.clients[found.number]
        for each in address.listening:
            if found in each.handshakes:
                each.handshakes.remove(found)
                found.drop()
        found.said = True  # its worker sees that it is gone

    def _shake(self) -> None:
        """A handshake ends well."""
        address = self._addresses[int(self._chance() * len(self._addresses))]
        under_way = [each for each in address.listening if each.handshakes and not each.full]
        if under_way:
            to = under_way[int(self._chance() * len(under_way))]
            self._end_handshake(to)

    def _end_handshake(self, to: Listening) -> None:
        found = to.handshakes.popleft()
        if self._only_questions_come_to(to):
            found.excuse = found.excuse or "so late that only questions were to come there"
        self._establish(to, found)

    def _only_questions_come_to(self, to: Listening) -> bool:
        """Whether the protector takes what comes to a socket for its own questions."""
        # By IPv6 a question has the address that clients of this machine have, too.
        if self._supervisor is None or to.address.family != socket.AF_INET6:
            return False
        act = self._supervisor.effects
        places = ((each, number) for each in act.delivery.listeners for number in (0, 1))
        return any(
            (each.index, number) in steering_of(act).probes.probed
            and self.kernel.files.get(each.socket_for(number).fileno()) is to
            for each, number in places
            if each.has_sibling
        )

    def _speak(self) -> None:
        """Some that are silent say something."""
        address = self._addresses[int(self._chance() * len(self._addresses))]
        for each in address.clients.values():
            if each.established and self._chance() < 0.5:
                self._says(each)

    def _says(self, connection: Connection) -> None:
        if not connection.said:
            connection.said = True
            connection.said_at, connection.said_ns = self.turns, self.kernel.clock_ns

    def _one(self) -> Server | None:
        """A process of a worker that lives and does something."""
        if not self.workers:
            return None
        worker = self.workers[int(self._chance() * len(self.workers))]
        living = worker.living
        if not living:
            if worker.gone:
                self.workers.remove(worker)
            return None
        found = living[int(self._chance() * len(living))]
        return None if found.hangs else found

    def _active_worker(self) -> Any:
        """A worker whose leader lives and does something."""
        found = self._one()
        return found if isinstance(found, Leader) else None

    def _accepts(self, server: Server) -> bool:
        return not (isinstance(server, Leader) and server.master)

    def _take(self) -> None:
        server = self._one()
        if server and self._accepts(server) and (found := server.accept(self._chance())):
            self._say(f"{server.pid} accepts {found}")
            self._check_counted(server, found)

    def _take_all(self) -> None:
        server = self._one()
        if server and self._accepts(server):
            self._say(f"{server.pid} accepts all")
            while server.accept(self._chance()):
                pass

    def _read(self) -> None:
        server = self._one()
        if server:
            for each in server.connections:
                each.heard = each.heard or each.said

    def _finish(self) -> None:
        server = self._one()
        if server:
            self._finish_one(server)

    def _finish_one(self, server: Server) -> None:
        found = next((each for each in server.connections if each.said), None)
        if found is not None:
            self.delivered += 1
            server.connections.remove(found)
            found.drop()

    def _fork_child(self) -> None:
        """A master starts another child."""
        worker = self._active_worker()
        if worker and worker.master and not worker.told:
            worker.children = [each for each in worker.children if not each.ended]
            if len(worker.children) < 3:
                child = self._fork_of(worker)
                self._say(f"{worker.pid} forks {child.pid}")

    def _fork_of(self, worker: Leader) -> Server:
        child = Server(self._new_pid(), worker, worker.listening)
        child.rude = worker.rude
        worker.children.append(child)
        self._processes[child.pid] = child
        return child

    def _crash_child(self) -> None:
        child = self._one()
        if child and child.leader is not child:
            self._end(child, os.CLD_KILLED, signal.SIGSEGV)

    def _obey(self) -> None:
        """One that was told to finish goes a step further."""
        server = self._one()
        if server and server.told:
            self._obey_once(server)

    def _obey_once(self, server: Server) -> None:
        children = server.living[1:] if isinstance(server, Leader) else []
        if server.quickly:
            self._end(server, os.CLD_EXITED, 0)
        elif server.listening:
            self._say(f"{server.pid} accepts no more")
            server.stop_accepting()
            if server.rude:
                for each in [each for each in server.connections if not each.heard]:
                    self._say(f"{server.pid} drops {each}")
                    server.connections.remove(each)
                    each.drop()
            for child in children:
                child.signal(self.settings.drain_signal)
        elif server.connections:
            self._finish_one(server)
        elif not children:
            self._end(server, os.CLD_EXITED, 0)

    def _go_on(self) -> None:
        if self.workers:
            for each in self._random.choice(self.workers).living:
                each.hangs = False

    def _refused(self, address: Address) -> None:
        """A client is refused."""
        why = self._has_stopped or self._reason() or address.disturbed
        why = why or not (address.served and address.kept)
        if self._unkept and address.is_path:  # until the path is led from what was not kept
            act = self._supervisor.effects if self._supervisor is not None else None
            why = why or self._starting or act is None or not steering_of(act).is_steered
        assert why, f"a client of {address.name} is refused"

    def _look_at_paths(self) -> None:
        """At every moment a path is a socket that lets clients in."""
        for address in self._addresses:
            if address.is_path and address.for_new() is None:
                self._refused(address)

    # -- what a worker can do to what it shares ------------------------------------------

    def _mischief(self) -> None:
        """A worker does something to a listening socket, for all processes that have it."""
        server = self._one()
        if not server or not server.listening:
            return
        one = self._random.choice(list(server.listening.values()))
        what = self._random.randrange(9)
        if what == 0:
            one.nonblocking = not one.nonblocking
            return
        self._say(f"{server.pid} does mischief {what} to socket {one.inode} of {one.name}")
        one.address.disturbed = True
        for each in (*one.backlog, *one.handshakes):
            each.excuse = MISCHIEF
        if what <= 4 or what == 8:
            hows = (socket.SHUT_RDWR, socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR)
            how = hows[(what - 1) % 4]
            for _ in range(1 + (what in (4, 8))):
                with suppress(OSError):
                    one.shutdown(how)
            if what == 8:
                with suppress(OSError):
                    one.listen(10)
        elif what == 5 and one.address.by_number:
            one.filtered = True
            one.locked = self._chance() < 0.5
        elif not one.address.by_number:
            names = (one.bound_as, one.address.name, one.own_file)
            # While the path leads to it, its own file alone says that the path is ours.  A full
            # disk may keep the path there until the socket is closed: then the operator removes it.
            if one.address.is_path and not (what == 7 and one.address.file is one):
                self.kernel.names.pop(names[what - 5], None)
        elif what == 6:
            one.reuseport = False
        elif one in one.address.group:
            one.address.steered, one.address.share = self._random.randrange(3), 0

    def _remove_a_file(self) -> None:
        """Somebody removes a path, as another server may at its end."""
        paths = [each for each in self._addresses if each.is_path]
        if not paths:
            return
        address = self._random.choice(paths)
        self._say(f"somebody removes {address.name}")
        address.disturbed = True
        for one in address.listening:
            for each in one.backlog:
                each.excuse = MISCHIEF
        self.kernel.names.pop(address.name, None)

    def _look_after_mischief(self) -> None:
        """See whether all that was done to an address is mended."""
        assert self._supervisor is not None
        act = self._supervisor.effects
        for its in act.delivery.listeners:
            address = self._at(its.settings.address)
            if not address.disturbed or its.lost or not steering_of(act).is_steered:
                continue
            files = [self.kernel.file(each.fileno()) for each in its.sockets]
            ours = [each for each in files if isinstance(each, Listening) and each.whole]
            turns = steering_of(act).turns
            if len(ours) == len(its.sockets) and self._is_steered(
                address, ours, turns.current, turns.share_of(its)
            ):
                address.disturbed = False

    def _is_steered(
        self, address: Address, ours: list[Listening], socket_number: int, share: int
    ) -> bool:
        if not address.by_number:
            has_all = len(ours) == 1 or all(each.own_file for each in ours)
            return address.file is ours[socket_number % len(ours)] and has_all
        if len(ours) == 1:
            return address.listening == ours
        group = address.group
        wanted, other = (
            group.index(each) if each in group else None
            for each in (ours[socket_number], ours[1 - socket_number])
        )
        is_shared = address.share == share and (not share or address.drawn == other)
        return all(each.reuseport for each in ours) and address.steered == wanted and is_shared

    def _check(self) -> None:
        super()._check()
        self._has_stopped = self._has_stopped or bool(self._reason())
        self._check_sockets()
        if self._mischievous:
            self._look_after_mischief()

    def _check_sockets(self) -> None:
        """No socket of a listener has two names: else two generations would accept from one."""
        assert self._supervisor is not None
        for listener in self._supervisor.effects.delivery.listeners:
            fds = listener.descriptors()
            files = {self.kernel.file(fd) for fd in fds.values()}
            assert len(files) == len(fds), f"{listener.settings.address} has one of {fds} twice"

    # -- how it ends -------------------------------------------------------------------

    def _after_kill(self) -> dict[str, int]:
        self._has_stopped = self._has_stopped or bool(self._reason())
        return super()._after_kill()

    def _after_exec(self, descriptors: dict[str, int]) -> dict[str, int]:
        self._has_stopped = self._has_stopped or bool(self._reason())
        return super()._after_exec(descriptors)

    def _end_of_all(self, why: str) -> None:
        """No other program is started: workers accept on, as if nothing had happened."""
        self._why_lost = why
        self.kernel.dead = False
        self.kernel.end_of_process()
        for address in self._addresses:
            found = {address.for_new(number) for number in range(8)}
            assert not any(to is not None and to.drops for to in found), "it stays on hold"
        for worker in self.workers:
            worker.voice.close()
        self._serve_all_clients()
        for server in self._living():
            server.end(os.CLD_EXITED, 0)

    def _living(self) -> list[Server]:
        return [each for worker in self.workers for each in worker.living]

    def _all_shake(self) -> None:
        for address in self._addresses:
            for each in address.listening:
                while each.handshakes and not each.full:
                    self._end_handshake(each)
            for client in address.clients.values():
                client.said = True

    def _serve_all_clients(self) -> None:
        waiting = None
        while waiting != (waiting := self._waiting()):
            self._all_shake()
            for server in self._living():
                server.hangs = False
                self._serve_all(server)

    def _waiting(self) -> int:
        return sum(len(each.clients) for each in self._addresses)

    def _serve_all(self, server: Server) -> None:
        while self._accepts(server) and server.accept(0.0):
            pass
        for each in server.connections:
            each.heard = True
        while server.connections:
            self._finish_one(server)

    def _all_do_well(self) -> None:
        self._keep()
        self._all_shake()
        for worker in self.workers:
            if worker.ended:
                continue
            if not worker.ready:
                worker.ready = self._say_ready(worker)
            if worker.master and not worker.told and worker.living == [worker]:
                self._fork_of(worker)
        self._serve_all_clients()
        for worker in self.workers:
            for server in (worker, *worker.children, worker):  # whose end comes last
                for _ in range(3):
                    if server.told and not server.ended:
                        self._obey_once(server)
        self.workers = [each for each in self.workers if each.living or not each.gone]

    def _tempt(self) -> bool:
        """Have a client come where no worker accepts; and a switch, which is to mend the rest."""
        protector = self._supervisor
        if protector is None or self._reason() or self._tempted >= TEMPTATIONS:
            return False
        self._tempted += 1
        listeners = [each for each in protector.effects.delivery.listeners if not each.lost]
        idle, harmed = [], []
        for its in listeners:
            address = self._at(its.settings.address)
            sockets = [self.kernel.file(each.fileno()) for each in its.sockets]
            for each in sockets:
                assert isinstance(each, Listening)
                assert each.listens, "it is still shut down"
                assert not each.astray, "it has another port"
            accepted = {to for each in self._living() for to in each.listening.values()}
            if not address.all_for_new() <= {None, *accepted}:
                idle.append(address)
            dead = any(each.mask for each in sockets if isinstance(each, Listening))
            if (address.disturbed and its.has_sibling) or (dead and address.by_number):
                harmed.append(address)
        for address in idle:
            self._connect_to(address)
        if harmed and not idle:
            if self._tempted == TEMPTATIONS:  # only another generation could mend it
                assert self._crowded, f"{harmed[0].name} is not as it was"
                return False
            self._signal(signal.SIGHUP)
        return bool(idle or harmed)

    def _come_late(self) -> None:
        for _ in range(8):
            self._connect()

    # -- what must hold ----------------------------------------------------------------

    def _check_told(self, leader: Leader) -> None:
        """The clients of a generation have been read when it is told to finish.

        For 10 s: then it is told to all the same.
        """
        protector = self._supervisor
        if protector is None or self._reason():
            return
        generation = protector.fleet.generation(leader.generation)
        # Earlier workers, not yet reaped by a protector that was killed, may have had its pid.
        records = protector.effects.pool.records()
        number = max((each.number for each in records if each.pid == leader.pid), default=0)
        found = protector.fleet.find(number)
        if found is None or found[1].state is not State.READY:
            return  # it leaves for a reason of its own
        opened = protector.effects.generations.get(leader.generation)
        if generation is None or generation.phase is not Phase.DRAINING or generation.ending:
            return
        drained_at = opened.record.drained_at if opened is not None else None
        if drained_at is None:
            return
        if self.kernel.clock_ns / 1e9 - drained_at >= GENERATION_LAST_S:
            return
        canary = steering_of(protector.effects)._watch.canary
        # Then another generation accepts what waits there.
        refused, at = canary.never_accepted if canary is not None else (0, ())
        in_vain = at if refused == leader.generation else ()
        for listener in protector.effects.delivery.listeners:
            its = self._at(listener.settings.address)
            for each in its.clients.values() if listener.has_sibling else ():
                one = (to for to in leader.listening.values() if each in to.backlog)
                mine = any(each in server.connections for server in leader.living)
                mine = mine or (any(one) and listener.index not in in_vain)
                if its.is_path and each.said_ns / 1e9 > drained_at:
                    continue  # it was silent, and that is not known of a UNIX socket
                if mine and each.said and each.said_at < self.turns and not each.excuse:
                    assert each.heard, f"{each} is not heard, and {leader.pid} told to finish"

    def _check_socket(self, address: Address, to: Listening) -> None:
        """New clients come to the socket that has the route, from when the kernel steers."""
        if self._supervisor is None or self._meanwhile or self._calm or address.disturbed:
            return
        act = self._supervisor.effects
        if act._route is None or not steering_of(act).is_steered:
            return
        assert steering_of(act).turns.current == act.generations[act._route].record.socket_number
        listeners = {each.settings.address: each for each in act.delivery.listeners}
        its = listeners.get(address.told)
        if its is None:
            return
        if its.path and self.kernel.unwritable and self._supervisor.fleet.stop_requested:
            return  # after a kill during a stop we steer no more, and cannot know that it failed
        number: int | None = steering_of(act).turns.current
        if not address.served:
            number = self._number_of_the_tried(its.index)
        elif not act.generations[act._route].knows(its.index):
            number = self._number_of_the_last_to_know(its.index)
        if number is None:
            return
        if is_drawn(self.connections, steering_of(act).turns.share_of(its)):
            number = 1 - steering_of(act).turns.current
        if its.index in steering_of(act).turns.passed_on:  # they wait for the next generation
            number = steering_of(act).turns.number_for(its)
        wanted = self.kernel.file(its.socket_for(number).fileno())
        waits = steering_of(act).hold.on or steering_of(act).turns.lacks_workers(its)
        waits = waits and its.can_be_held
        if its.path and its._reserved is not None and waits:
            reserved = self.kernel.file(its._reserved.fileno())
            if not steering_of(act)._not_held or to is reserved:
                wanted = reserved
        told = f"{address.steered} of {[each.inode for each in address.group]}"
        assert to is wanted, f"a client comes to socket {to.inode} of {to.name}: {told}"

    def _number_of_the_last_to_know(self, index: int) -> int | None:
        """Return at which socket clients of a listener stay that the serving generation lacks.

        None: no generation has it any more.  A release that failed may live on: it gets none.
        """
        assert self._supervisor is not None
        act = self._supervisor.effects
        knowing = [each for each in act.generations.values() if each.knows(index)]
        accepting = [
            each for each in knowing if each.record.number in steering_of(act).turns.accepting
        ]
        records = [each.record for each in accepting or knowing]
        last = max(records, key=lambda each: each.number, default=None)
        return None if last is None else last.socket_number

    def _number_of_the_tried(self, index: int) -> int | None:
        """Return which socket of a new listener the generation has that is the first to know it.

        Of a dry run, that which it does not have.  None: there is none yet, or its turn came.
        """
        assert self._supervisor is not None
        if self._supervisor.fleet.dry_run:
            return steering_of(self._supervisor.effects).turns.current
        act, starting = self._supervisor.effects, self._supervisor.fleet.of(Phase.STARTING)
        opened = act.generations.get(starting.number) if starting is not None else None
        known = opened is not None and opened.knows(index)
        return opened.record.socket_number if opened is not None and known else None

    def accepted(self, which: Socket, but: object = None) -> tuple[Counter[int], Counter[int]]:
        self.kernel.enter("sock_diag")
        file = self.kernel.file(which.fileno())
        assert isinstance(file, Listening)
        found = [each for server in self._living() for each in server.connections]
        opened = Counter(each.tag for each in found if each.address is file.address)
        return opened, Counter(each.tag for one in file.address.listening for each in one.backlog)

    def accepted_unix(self) -> Iterator[tuple[int, int, int]]:
        self.kernel.enter("sock_diag")
        for server in self._living():
            for each in server.connections:
                if each.tag and each.address and not each.address.by_number:
                    yield each.tag, each.number, int(each.said and not each.heard)

    def _check_counted(self, server: Server, connection: Connection) -> None:
        """What tells a generation's connections tells no other's.

        Unless its servers go on accepting though they were told to finish, or the protector was
        killed while it started them, and has yet to find them.
        """
        if self._supervisor is None or self._meanwhile or connection.late:
            return
        if connection.tag == NO_TAG:
            return  # it is counted for none
        act, mine = self._supervisor.effects, server.leader.generation
        if mine not in act.generations:
            return
        for listener in act.delivery.listeners:
            address = self._at(listener.settings.address)
            if address is not connection.address or address.disturbed:
                continue
            tag = listener.index, connection.tag
            its = [n for n, each in act.generations.items() if tag in each.record.accept_tags]
            assert its in ([], [mine]), f"{connection} of {mine} is counted for {its}"
            if its:
                known = act.generations.keys() - {mine}
                others = (each for each in self._living() if each.leader.generation in known)
                same = [
                    each
                    for other in others
                    for each in other.connections
                    if each.address is address and each.tag == connection.tag and not each.late
                ]
                assert not same, f"{same} are counted for {mine}"

    def _said(self, event: str, fields: Mapping[str, Any]) -> None:
        """A generation is started for clients alone."""
        super()._said(event, fields)
        if event in ("reloaded", "reload-failed"):
            self._crowded = "Too many open files" in (fields["reason"] or "")
        if event == "stranded":
            for told in fields["listen"].split():
                there = self._at(told).listening
                waiting = [each for one in there for each in one.backlog]
                clients = [each for each in waiting if isinstance(each, Connection) or each.excuse]
                if self._at(told).is_path:  # a question has no address that tells it from them
                    continue
                assert clients, f"another generation is started for {waiting}"

    def _look_at_question(self, question: Question, to: Listening, source: str) -> None:
        """A diverted question may be taken for a client at the socket that it comes to."""
        address = to.address
        if self._supervisor is None or not (address.disturbed and address.by_number):
            return
        act = self._supervisor.effects
        probes, current = steering_of(act).probes, steering_of(act).turns.current
        places = {(index, number) for index, number, its in probes.probe_sources if its == source}
        if address.family == socket.AF_INET6:
            places |= probes.probed | {(each.index, current) for each in act.delivery.listeners}
        meant = {
            self.kernel.file(each.socket_for(number).fileno())
            for each in act.delivery.listeners
            for index, number in places
            if index == each.index
        }
        if to not in meant:
            question.excuse = MISCHIEF

    def _check_dropped(self, address: Address) -> None:
        """A client gets no answer under a hold alone, or until a program has resumed after it."""
        if self._supervisor is None or self._meanwhile or self._calm or address.disturbed:
            return
        act = self._supervisor.effects
        if act._route is None or not steering_of(act).is_steered:
            return
        if not (address.served and address.kept):
            return  # the fd store still has it, of a candidate that no state tells of
        assert steering_of(act).hold.on, f"{address.name} does not answer"

    def _check_waiting(self) -> None:
        stopping = self._supervisor is not None and self._supervisor.fleet.stopping
        for address in self._addresses:
            for each in address.listening:
                if not (each.foreign and (stopping or not address.kept)):
                    assert not each.backlog, f"clients of socket {each.inode} wait for ever"

    def _check_serving(self, number: int) -> None:
        for server in self._living():
            if server.leader.unknown and server.leader.leaving:
                continue  # the state could not be written when it was started
            of = server.leader.generation
            assert of == number, f"{server.pid} of generation {of} goes on"
        assert self._supervisor is not None
        listeners = self._supervisor.effects.delivery.listeners
        there = [self._at(each.settings.address) for each in listeners if not each.lost]
        for address in there:
            if address.disturbed:
                continue
            accepting = [each for each in self._living() if self._accepts(each)]
            accepted = {to for each in accepting for to in each.listening.values()}
            assert address.all_for_new() <= accepted, "no worker accepts"
            assert not address.share, "another generation has a share"

    def _finish_all(self, worker: Any) -> None:
        for server in worker.living:
            for each in server.connections:
                each.said = True  # sooner or later
            while server.connections:
                self._finish_one(server)
            server.end(os.CLD_EXITED, 0)

    def _check_left(self) -> None:
        for server in self._living():
            raise AssertionError(f"{server.pid} is left behind")
        # The fd store ends, too, with what it was sent and has not read.
        unsent = [self.kernel.files[fd] for fd in self._outbox._unsent.values() if fd >= 0]
        for file in (*self.store.values(), *unsent, self._line):
            file.drop()
        self.store = {}
        self._check_files()
        for address in self._addresses:
            for each in address.listening:
                assert each.foreign, f"socket {each.inode} of {each.name} is left behind"
                refuses = each.refuses and not address.disturbed
                assert not refuses, f"{each.name} of another process refuses"

    def _check_files(self) -> None:
        """No file is left; a kill, or a folder, leaves at most what the next start finds."""
        left = [
            name
            for name, node in self.kernel.names.items()
            if isinstance(name, str) and name.startswith("/")
        ]
        assert not left or self.kills or self.kernel.not_removed, f"{left} is left behind"
        for address in self._addresses:
            if address.is_path:
                self.kernel.remove_stale(address.name)
        left = [name for name in left if name in self.kernel.names]
        assert not left, f"{left} is left behind, and no start removes it"
