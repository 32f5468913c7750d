"""A protector's life in a simulated world, from one seed.

The real modules (decide, supervisor, effects, worker pool, forwarder, channel, listener, loop,
sd_notify, process, spawn, state_file, recovery, checkpoint) run against kernel.py.  For that, names
like `os`, `socket`, `select` inside those modules are replaced while a simulation runs (`installed`
below); besides them only what is found in the file system: a command, orphaned processes, maps of
users.  The log, the output, the resident process around the supervisor, the upgrade's probe and
the process that asks a generation by HTTP are stand-ins.

The protector's wait is where the world moves: when it polls, steps chosen by the seed
happen (clients, workers, signals, time, the guard or fd store), and in the middle of
any system call something may happen too, the call may fail, or the protector be killed.
The guard may be killed as well: then the protector goes on without one, and its own kill
after that is the end of all but what workers have been sent.
In some lives a configuration is read again, and adds, removes and changes things; workers say in
other ways that they are ready; few clients may wait; numbers of processes are used again; more
workers are asked for than are started at once, or than there are descriptors for; each generation
is asked whether it serves.
After the wild part all goes well for a while, everything must come to rest and be delivered,
and a graceful stop must end it.
"""

from __future__ import annotations

import errno
import operator
import os
import random
import signal
import socket
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from socketprotector_client import wire

from socketprotector.core import workers
from socketprotector.core.events import (
    Deadline,
    DryRunRequested,
    Event,
    LameDuckRequested,
    ScaleRequested,
    TimerKind,
)
from socketprotector.core.fleet import Fleet, LameDuck, Next, Phase, Policy, State, Stop
from socketprotector.core.snapshot import Snapshot
from socketprotector.daemon import (
    checkpoint,
    config_reader,
    inherited_listeners,
    probe,
)
from socketprotector.daemon.checkpoint import Checkpoint
from socketprotector.daemon.config_reader import ConfigAnswer
from socketprotector.daemon.delivery.queue.forwarder import Forwarder
from socketprotector.daemon.delivery.queue.queue_delivery import QueueDelivery
from socketprotector.daemon.delivery.shared import accept_watch, probes, quiescing
from socketprotector.daemon.delivery.shared.shared_delivery import SharedDelivery
from socketprotector.daemon.effects import Effects
from socketprotector.daemon.event_queue import EventQueue
from socketprotector.daemon.log_output import WorkerOutput
from socketprotector.daemon.recovery import Recovery
from socketprotector.daemon.runtime import Runtime
from socketprotector.daemon.start_report import StartReport
from socketprotector.daemon.supervisor import Supervisor
from socketprotector.model import exit_text
from socketprotector.model.history import History
from socketprotector.model.ready_kinds import PROBED
from socketprotector.model.settings import ListenerSettings, Origin, Settings
from socketprotector.system import (
    accept_tags,
    bpf,
    inherited,
    memory_group,
    peer_credentials,
    proc_scan,
    process,
    procfs,
    program_spec,
    reuseport,
    sock_diag,
    socket_file,
    spawn,
    unix_listener,
)
from socketprotector.system.inherited import Inherited
from socketprotector.system.loop import Loop
from socketprotector.system.sd_notify import Outbox, Store, Systemd
from socketprotector.system.state_file import StateFile
from tests.simulation.files import Connection, File, Question, failure
from tests.simulation.kernel import (
    FAULTS,
    Datagrams,
    End,
    Kernel,
    Killed,
    Memory,
    Running,
    Socket,
    pair,
)
from tests.simulation.points import point
from tests.simulation.ports import IN, Address, Listening

#: All that have been imported for the supervisor, so that none asks the real clock.
MODULES = tuple(
    module for name, module in sorted(sys.modules.items()) if name.startswith("socketprotector.")
)
NAMES = ("os", "socket", "select", "time", "fcntl", "resource", "signal")

POLICIES = (
    Policy(),
    Policy(settle_s=5.0),
    Policy(stop_first=True),
    Policy(stop_first=True, settle_s=5.0, drain_timeout_s=9.0),
    Policy(drain_timeout_s=9.0, start_tries=1),
    Policy(max_draining=1),
    Policy(max_draining=2, settle_s=5.0, drain_timeout_s=9.0),
)
BACKLOG = 200
#: What ends a reload or a dry run, as it is logged.
VERDICTS = ("reloaded", "recovered", "reload-failed", "dry-run-passed", "dry-run-failed")
#: What --health asks by, for ever.
HEALTH = {"health"}
#: How long an HTTP probe may take.
PROBE_LIMIT_NS = 2_000_000_000
_HTTP = ("http:/", "https:/")
#: Fewer workers than that are asked for in lives with many.
MOST = 16
#: The number of the line in a worker, for --ready fd.
READY_FD = 30
#: Places of listeners in one life, those that were removed included.
PLACES = 20
#: How often the loop may be woken in a row without anything changing: a callback may be
#: woken for a number that was another's before, or find what a step has taken from it.
IDLE_WAKE_UPS = 12
#: Calls by the protector in one turn of its loop: a full queue moved costs a few each.
CALLS_A_TURN = 20_000
CALM_TURNS = 5_000
#: Why the one may be lost that the protector has in its own hands.
BY_KILL = "killed between accept and send"


class Executed(BaseException):
    """The protector has executed its new program, with these descriptors."""

    def __init__(self, descriptors: dict[str, int]) -> None:
        super().__init__()
        self.descriptors = descriptors


class Voice:
    """The lines on which a worker may say that it is ready, each with what it says there."""

    def __init__(self, environment: Mapping[str, str], given: Mapping[int, File]) -> None:
        said = {int(environment.get("EINHORN_SOCK_FD", -1)): b'{"command": "worker:ack"}\n'}
        said[READY_FD] = b"\n"
        found = [(given[place], text) for place, text in said.items() if place in given]
        self.lines = [(end, text) for end, text in found if isinstance(end, End)]
        for end, _ in self.lines:
            end.take()

    def close(self) -> None:
        while self.lines:
            self.lines.pop()[0].drop()


class Worker:
    """A process of the protected daemon."""

    def __init__(self, pid: int, environment: Mapping[str, str], given: Mapping[int, File]) -> None:
        read, line = given[3], given[4]
        assert isinstance(read, End)
        assert isinstance(line, End)
        self.pid = pid
        self.leader = self  # of its group
        self.address = environment["NOTIFY_SOCKET"]
        self.listeners = environment[wire.ENV_LISTENERS].split()
        self.voice = Voice(environment, given)
        self.read = read
        self.line = line
        self.connections: list[Connection] = []
        self.ready = False
        self.hangs = False
        self.told = False  # by TERM
        self.ended = False
        self.reaped = False
        self.orphan = False  # no child of the protector that runs now
        self.unknown = False  # to it, for the state could not be written when it was started
        self.gone = False  # reaped, by any process
        self.result = (os.CLD_EXITED, 0)
        read.take()
        line.take()

    def signal(self, number: int) -> None:
        if number == signal.SIGKILL:
            self.end(os.CLD_KILLED, number)
        else:
            self.told = True

    def end(self, code: int, status: int) -> None:
        if self.ended:
            return
        self.ended = True
        self.result = code, status
        for each in self.connections:
            each.drop()
        self.connections.clear()
        self.voice.close()
        self.read.drop()
        self.line.drop()

    @property
    def leaving(self) -> bool:
        """It has been asked to go, in any of the three ways."""
        no_more = self.read.no_receive and not self.read.queue
        return self.told or no_more or self.line.no_receive

    def take(self) -> Connection | None:
        """Take the oldest connection from the queue, if there is one."""
        if not self.read.queue:
            return None
        message = self.read.receive()
        assert message is not None
        (connection,) = message[1]
        if isinstance(connection, Question):
            connection.taken = True
            connection.drop()
            return self.take()
        assert isinstance(connection, Connection)
        assert connection.came_by is not None
        index = wire.HEADER.unpack_from(message[0])[2]
        assert self.listeners[index : index + 1] == [connection.came_by.told], "it is not told of"
        # Killed before the guard, the fd store or the state knew that it had been sent, it is sent
        # again by the next program: a fault upon a fault, and a known weakness.
        assert connection.excuse or not connection.taken_by, f"{connection} is delivered twice"
        assert connection.excuse or connection.in_queues == 0, f"{connection} is in two queues"
        connection.taken_by.append(self.pid)
        self.connections.append(connection)
        return connection


class Log:
    level = ""

    def __init__(
        self,
        note: Callable[[str], None] | None,
        events: Counter[str],
        heard: Callable[[str, Mapping[str, Any]], None],
    ) -> None:
        self._note, self._events, self._heard = note, events, heard

    def write(self, level: str, event: str, **fields: object) -> None:
        self._events[event] += 1
        if self._note and event != "decided":
            self._note(f"  log: {event} {fields}")
        self._heard(event, fields)


class Output:
    """Tells last words, at once or later, as a relay that is busy, or not at all in time."""

    def __init__(self, loop: Loop, chance: Callable[[], float]) -> None:
        self._loop = loop
        self._chance = chance
        self.named = inherited.Named()

    def descriptors(self) -> dict[str, int]:
        return {}

    def position(self) -> int:
        return 0

    @contextmanager
    def opened(self, number: int, generation: int) -> Iterator[WorkerOutput]:
        yield WorkerOutput()

    def close_oldest(self, living: int, numbers: Callable[[], Set[int]]) -> None:
        assert living == len(numbers())

    def last_words(self, number: int, start: int, done: Callable[[str], None]) -> None:
        if self._chance() < 0.5:
            done("")
        else:
            self._loop.call_after(("words", number), 2.0 * self._chance(), lambda: done("said"))

    def where_to_look(self) -> str:
        return ""


class Upgrade:
    """The probe has said yes already."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def begin(self, descriptors: dict[str, int], ready: Callable[[], None]) -> None:
        ready()

    def failed(self, reason: str) -> None:
        pass

    def end(self) -> None:
        pass

    def execute(self, descriptors: dict[str, int]) -> None:
        self._kernel.dead = True
        raise Executed(descriptors)


class Reads:
    """In the place of reader.ConfigReader: it takes a moment, and the world says what there is."""

    def __init__(self, world: World, loop: Loop, key: str) -> None:
        self._world, self._loop, self._key = world, loop, key
        self.busy = False

    def read(self, settings: Settings, done: Any, *, dry: bool = False) -> None:
        try:
            self._world.kernel.enter("fork")
        except OSError as error:
            done(ConfigAnswer(f"cannot read the configuration: {error.strerror}"))
            return
        self.busy = True
        seconds = 0.5 * self._world._chance()
        self._loop.call_after(self._key, seconds, lambda: self._end(settings, done))

    def _end(self, settings: Settings, done: Any) -> None:
        self.busy = False
        done(self._world._read_again(settings))

    def call_off(self, _answer: ConfigAnswer | None = None) -> None:
        self.busy = False
        self._loop.cancel(self._key)


class FakeExchange:
    """Stand-in for http_exchange.HttpExchange, over a fake connection or from a FakeProber."""

    why_by_header = ""

    def __init__(
        self,
        world: World,
        loop: Loop,
        connection: Any,
        request: bytes,
        _good: object,
        done: Callable[[str], None],
    ) -> None:
        self._world, self._loop, self._done = world, loop, done
        self._question: Question | None = None
        if request:  # otherwise a prober answers
            self._question = connection._file.question  # None: there is no room for it
            self._bad = world.share_of_bad_answers()
            self._later()

    def end(self, why: str) -> None:
        self._done(why)

    def close(self) -> None:
        self._loop.cancel(self)

    def _later(self) -> None:
        self._loop.call_after(self, self._world._chance(), self._look)

    def _look(self) -> None:
        question = self._question
        if question is not None and (question.over or question.taken):
            self._done(self._world.answer_to(question, self._bad))
        else:
            self._later()


class FakeProber:
    """Stand-in for prober_client.Prober: sends requests over the connections it is given.

    It may die; the protector then starts another.
    """

    def __init__(
        self,
        world: World,
        loop: Loop,
        answered: Callable[[str], None],
        late: Callable[[str], None],
        ended: Callable[[str], None],
    ) -> None:
        self._world, self._loop = world, loop
        self._answered, self._is_late, self._ended = answered, late, ended
        self._bad = world.share_of_bad_answers()
        self._question: Question | None = None
        self._sent_at = 0

    def send(self, _request: bytes, _host: str, connection: Any, **_: object) -> Any:
        self._question = connection._file.question  # None: there is no room for it
        self._sent_at = self._world.kernel.clock_ns
        self._later()
        return SimpleNamespace(close=lambda: None)

    def kill(self) -> None:
        self.close()
        self._ended("was killed")

    def close(self) -> None:
        self._loop.cancel(self)

    def _later(self) -> None:
        self._loop.call_after(self, self._world._chance(), self._look)

    def _look(self) -> None:
        world, question = self._world, self._question
        if not world._calm and world._chance() < 0.1:
            self.kill()
        elif question is not None and (question.over or question.taken):
            self._answered(world.answer_to(question, self._bad))
        elif world.kernel.clock_ns - self._sent_at > PROBE_LIMIT_NS:
            self._is_late("no answer")
        else:
            self._later()


def forwarder_of(effects: Effects) -> Forwarder | None:
    delivery = effects.delivery
    return delivery.forwarder if isinstance(delivery, QueueDelivery) else None


def number_of(worker: Any) -> int:
    """Return its number, which its notify address has."""
    return int(worker.address.rpartition("-")[2])


def is_for_questions(file: File) -> bool:
    """Whether it is of a question: that, our end of it, or where it comes to."""
    if isinstance(file, Listening):
        name = file.address.name
        return file.question is not None or name is None or str(name[0]).startswith("127.")
    return isinstance(file, Question)


class World:
    """Everything around one protector, and its lives one after another."""

    #: Whether it does so for its workers.
    ACCEPTS = True
    #: Whether it may be one of few lives in something; else it is as most are.
    UNUSUAL = True
    #: In how many lives each generation is asked whether it serves.
    ASKED = 0.15
    #: What a configuration may choose.
    POLICIES: Any = POLICIES
    #: What there is to listen on, and what a configuration that is read again can add.
    KINDS: Any = (socket.AF_INET, socket.AF_UNIX)
    ADDED: Any = KINDS
    #: How often time passes a little, by how much, and by how much else.
    TIME = (0.9, (0.0001, 0.005, 0.02, 0.3, 1.0), 20.0)
    #: How many calls of the protector pass, on average, until something interferes.
    GAPS = (30, 100, 400)

    def __init__(self, seed: int, steps: int, note: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self.steps_left = steps
        self.steps = 0
        self.turns = 0
        self.kills = 0
        self.faults = 0
        self.upgrades = 0
        self.unguarded = 0
        self.connections = 0
        self.delivered = 0
        self.lost: dict[str, int] = {}
        self.events: Counter[str] = Counter()  # in the protector's log
        self.killed_at: Counter[str] = Counter()  # by what it did
        self._note = note
        self._random = random.Random(seed)
        self._chance = self._random.random
        self.kernel = Kernel()
        self.kernel.note = note
        self.kernel.strike = self._strike
        self.kernel.turn = self._turn
        self.kernel.process_at = self._process_at
        self.kernel.group_of = self._group_of
        self.kernel.start = self._start
        self.kernel.sent = self._sent
        pick = self._random.choice
        self.kernel.group_signals = pick((True, True, False))
        self.kernel.binds_to_devices = seed % 3 != 0
        self.fd_store = pick(("none", "guard", "guard", "systemd"))
        self._listening: list[Listening] = []
        self._listed: set[str] = (
            set()
        )  # in the configuration, so that it is not added, even if lost
        # Apart from the others, so that a life without all of these is as it was before them.
        asks = random.Random(f"asks {seed}").random
        self._asks = self.UNUSUAL and asks() < self.ASKED  # each generation, and often for nothing
        self._few_clients = self._asks and asks() < 0.7
        unusual: Any = random.Random(f"unusual {seed}").choice
        if not self.UNUSUAL:
            unusual = operator.itemgetter(0)
        self._few_numbers = unusual((False, False, True))  # of processes
        self.kernel.somaxconn = unusual((socket.SOMAXCONN, socket.SOMAXCONN, 3))
        self.kernel.zombie = self._zombie
        self.settings = self._unusual(self._choose(pick), unusual)
        self._at_once = unusual((workers.AT_ONCE, workers.AT_ONCE, 1, 3))
        self._many = self._at_once < workers.AT_ONCE  # there are more than are started at once
        self.kernel.room = unusual((100_000, 90) if self._many else (100_000,))
        self.kernel.limit = self.kernel.room
        if self.ACCEPTS and unusual((False, False, True)):
            self._pass_in()
        self._lame_ducks = unusual((False, False, True))
        if self._lame_ducks:
            self._let_stops_wait(unusual((0.0, 0.5)))
        self._dry_runs = unusual((False, False, True)) or self._asks
        if unusual((False, False, True)) and (self._asks or self.ACCEPTS):
            self._have_settling_checked()
        if self._asks:
            self._have_it_asked(health=asks() < 0.5)
        self._tried: set[int] = set()  # generations that only dry runs have opened
        self._older = asks() < 0.5  # an upgrade may be to a program that knows of no dry run
        self._verdicts: set[tuple[str, int]] = set()
        self._unsaved: set[tuple[str, int]] = set()  # since the last state
        self._outdated: set[tuple[str, int]] = set()  # after which another reload has begun
        self._faulty = pick((0.0, 0.3, 0.6))  # how much of what interferes is a fault
        self._deadly = pick((0.0, 0.02, 0.1)) if self.fd_store != "none" else 0.0
        if self._asks and self.fd_store != "none":
            self._deadly += 0.05
        self._gap = pick(self.GAPS)
        self.workers: list[Any] = []
        self._processes: dict[int, Any] = {}
        self.starts: dict[int, int] = {}  # when a process started, in ticks
        self._next_pid = 100
        self._deploy_works = True
        self.store: dict[str, File] = {}
        self._told: deque[bytes] = deque()  # by the guard, how processes have ended
        self._line = pair()[1]  # the guard's or systemd's end
        self._calm = False
        self._meanwhile = False
        self._stopped = False
        self._idle_turns = 0
        self._found: dict[int, File] = {}  # ready, at the last wait
        self._changes = -1
        self._calls = 0
        self._checked: Fleet | None = None
        self._acts = [act for act, weight in self._what_happens() for _ in range(weight)]
        self._supervisor: Supervisor | None = None
        self._why_lost = ""
        self._held: set[Connection] = set()  # by the protector that was killed
        self._lost_by_kill = 0
        self._harm = 0  # what has befallen workers
        self._unkept = False  # a program was killed that had not sent all
        self._unwritten = False  # one was killed that had not written all

    def _choose(self, pick: Callable[[Any], Any]) -> Settings:
        """Bind what there is to listen on, and choose the settings."""
        return Settings(
            name="daemon",
            command=("./daemon",),
            directory="/srv",
            listeners=tuple(self._bind_one(n, pick) for n in range(pick((1, 1, 2)))),
            policy=pick(self.POLICIES),
            workers=pick((1, 1, 2, 3)),
            ready_after_s=pick((None, None, None, 1.0)),
            queue=pick((6, 12, 64, 256)),
            guarded=self.fd_store == "guard",
            secret="x",
        )

    def _unusual(self, settings: Settings, pick: Callable[[Any], Any]) -> Settings:
        """Have other settings in some lives."""
        ready = pick(("notify", "notify", "notify", "ack", "fd", "any", "any"))
        if self._asks:
            ready = ("any", "accept", "http")[self.seed % 3]
        settings = replace(settings, origin=Origin(configured=pick((False, False, True))))
        if ready == "notify":
            return settings
        return replace(
            settings,
            policy=replace(settings.policy, ready=ready),
            ready=ready,
            ready_after_s=1.0 if ready in PROBED else None,
            ready_question={"accept": "accept", "http": _HTTP[self.seed % 2]}.get(ready, ""),
            ready_fd=READY_FD if ready == "fd" else pick((-1, READY_FD)),
        )

    def share_of_bad_answers(self) -> float:
        assert self._supervisor is not None
        return self._random.choice((0.0, 0.15, 1.0) if self._supervisor.fleet.served else (0.0,))

    def answer_to(self, question: Question, bad_share: float) -> str:
        """Return why an answer is bad; "": it is good."""
        bad = not question.taken or (not self._calm and self._chance() < bad_share)
        self.events["answered-badly" if bad else "answered-well"] += 1
        return "500" if bad else ""

    def _let_stops_wait(self, idle_s: float) -> None:
        """Have a lame duck before each graceful stop."""
        policy = replace(
            self.settings.policy,
            lame_duck_s=3.0,
            lame_duck_idle_s=idle_s if self.ACCEPTS else 0.0,
        )
        self.settings = replace(self.settings, policy=policy)

    def _have_settling_checked(self) -> None:
        policy = replace(self.settings.policy, settle_s=5.0, settle_check="http:/")
        self.settings = replace(self.settings, policy=policy)

    def _have_it_asked(self, *, health: bool) -> None:
        """Have generations fail soon that do not answer."""
        policy = replace(self.settings.policy, start_timeout_s=5.0)
        self.settings = replace(
            self.settings,
            policy=policy,
            health="accept" if health else "",
            health_every_s=1.0,
            health_timeout_s=0.5,
        )

    def _pass_in(self) -> None:
        """Have the first listener be another process's that goes on listening."""
        one, *others = self.settings.listeners
        # A file of its own is its owner's to remove.
        listeners = (replace(one, foreign=True, device=0, inode=0), *others)
        self.settings = replace(self.settings, listeners=listeners)
        self._listening[0].foreign = True
        self._listening[0].take()

    def _bind(self, family: int, name: Any) -> Listening:
        """Bind the first socket of an address, as the launching process does.  Raises OSError."""
        address = self.kernel.addresses.setdefault(name, Address(family, name, self.kernel.names))
        if address.told in self._listed:
            raise failure(errno.EADDRINUSE)
        if address.is_path and address.file is None:
            self.kernel.names.pop(name, None)  # a stale one is replaced
        made = Listening(address)
        made.bind(address)
        made.listen(self.kernel.somaxconn)
        return made

    def _read_again(self, old: Settings) -> ConfigAnswer:
        """Answer as a process that has read the configuration again, where some has changed."""
        if self._calm:
            return ConfigAnswer(settings=old)
        if self._chance() < 0.1:
            return ConfigAnswer("there is a mistake in it")
        pick = self._random.choice
        places = list(old.listeners)
        self._listed = {each.address for each in places if not each.removed}
        living = [index for index, each in enumerate(places) if not each.removed]
        if len(living) > 1 and self._chance() < 0.5:
            index = pick(living)
            self._say(f"{places[index].address} is removed")
            places[index] = replace(places[index], removed=True)
        found = ConfigAnswer()
        if len(places) < PLACES and self._chance() < 0.6:
            try:
                places.append(self._add(len(places), pick, found))
            except OSError as error:
                return ConfigAnswer(str(error))
        policy = replace(
            pick(self.POLICIES),
            workers_accept=old.policy.workers_accept,
            ready=old.policy.ready,
            settle_check=old.policy.settle_check,
            start_timeout_s=old.policy.start_timeout_s,
            lame_duck_s=old.policy.lame_duck_s,
            lame_duck_idle_s=old.policy.lame_duck_idle_s,
        )
        alone = (
            old.policy.stop_first
            or policy.stop_first
            or not any(map(self._may_serve, self.workers))
        )
        for before, after in zip(old.listeners, places, strict=False):
            if after.removed and not before.removed:
                address = self._at(after.address)
                address.kept, address.harm = False, -1 if alone else self._harmed
        workers, queue = pick((1, 2, 3)), pick((6, 64))
        found.settings = replace(
            old, listeners=tuple(places), policy=policy, workers=workers, queue=queue
        )
        return found

    def _may_serve(self, worker: Any) -> bool:
        """Whether a worker may get clients: none that leaves, or by a shut-down channel."""
        return not (worker.ended or worker.leaving or worker.read.no_receive)

    def _add(self, index: int, pick: Callable[[Any], Any], found: ConfigAnswer) -> ListenerSettings:
        """Bind one more listener, maybe where one was that was removed.  Raises OSError."""
        if len(self.kernel.files) + 3 > self.kernel.limit:
            raise failure(errno.EMFILE)
        its = self._bind_one(self._random.randrange(8), pick, self.ADDED)
        one = self._listening[-1]
        self._say(f"{its.address} is added")
        one.address.served, one.address.kept = False, True
        one.address.added += 1
        found.listeners[index] = self.kernel.install(one)
        return its

    def _bind_one(
        self, number: int, pick: Callable[[Any], Any], kinds: Any = None
    ) -> ListenerSettings:
        family = pick(kinds or self.KINDS)
        name = f"/srv/s{number}" if family == socket.AF_UNIX else ("h", 1 + number)
        self._listening.append(self._bind(family, name))
        address, inode = self._listening[-1].address.told, self._listening[-1].address.path_inode
        return ListenerSettings(address, device=1 if inode else 0, inode=inode)

    def _at(self, address: str) -> Address:
        """Return what is at an address of the settings."""
        return next(e.address for e in reversed(self._listening) if e.address.told == address)

    def _to_give(self) -> dict[str, File]:
        """What the launching process passes on, by name."""
        return {f"{inherited.LISTENER}{index}": each for index, each in enumerate(self._listening)}

    # -- the lives of the protector ----------------------------------------------

    #: Whether the next program knows of no dry run.
    _is_older = False

    def live(self) -> None:
        """Run from the first start to the last end.  Raises AssertionError where it goes wrong."""
        kernel = self.kernel
        given = {name: kernel.install(each) for name, each in self._to_give().items()}
        self._state = Memory()
        given[inherited.STATE] = kernel.install(self._state)
        if self.fd_store != "none":  # it has passed on what it keeps
            self.store = {name: kernel.files[fd] for name, fd in given.items()}
            for file in self.store.values():
                file.take()
        kept = set(self.store)
        with installed(self):
            self._interfere_later()
            while True:
                try:
                    self._run(given, kept)
                    break
                except Executed as program:
                    self.upgrades += 1
                    self._say("the protector executes its new program")
                    self._is_older = self._older
                    given = self._after_exec(program.descriptors)
                    kept = set(given)
                except Killed:
                    self.kills += 1
                    self._say("the protector is killed")
                    if self.unguarded:
                        self._end_of_all("killed without a guard")
                        return
                    given = self._after_kill()
                    kept = set(given)
                except OSError as error:
                    if not self._starting:
                        raise
                    # It ends, and says why; the guard or systemd starts another.
                    self._say(f"the protector cannot start: {error}")
                    if self.unguarded:
                        self._end_of_all("cannot start without a guard")
                        return
                    if self.fd_store == "none" and not self.upgrades:
                        return
                    assert self.fd_store != "none", "an upgrade has ended it all"
                    given = self._after_kill()
                    kept = set(given)
        self._check_the_end()

    def _run(self, given: dict[str, int], kept: set[str]) -> None:
        """One program of the protector, put together as daemon/assembly.py does it."""
        kernel = self.kernel
        kernel.dead = False
        self._checked = None
        self._starting = True
        self._calls = kernel.calls
        log = cast("Any", Log(self._note, self.events, self._said))
        self._loop = Loop()
        self._only_what_was_found(self._loop)
        line: Any = None
        if self.fd_store != "none" and inherited.GUARD not in given:
            ours, self._line = pair()
            self._line.take()
            given[inherited.GUARD] = kernel.install(ours)
        if inherited.GUARD in given:
            line = Socket(kernel, given[inherited.GUARD])
        self._outbox = Outbox(self._later, line)
        snapshot = checkpoint.read(given[inherited.STATE])
        if snapshot is not None and self._unwritten:
            self._forget_others(snapshot)
        if snapshot is not None and self._is_older:
            snapshot = replace(snapshot, fleet=replace(snapshot.fleet, dry_run=False))
        self._is_older = False
        process._known.clear()
        settings = self._settings_of(snapshot)
        kind = SharedDelivery if settings.mode.workers_accept else QueueDelivery
        coming = (snapshot.settings.candidate if snapshot else None) or settings
        own = {inherited.STATE, inherited.GUARD}
        left = Inherited({name: fd for name, fd in given.items() if name not in own})
        listeners = inherited_listeners.adopt(left, coming.listeners, kind)
        if snapshot is not None and snapshot.fleet.exiting:
            self._why_lost = "killed at the very end"
            for each in listeners:
                each.close()
            for fd in sorted(set(kernel.files) - {given[inherited.STATE]}):
                kernel.files.pop(fd).drop()
            self._fixed = {given[inherited.STATE]}
            return
        file = StateFile(given[inherited.STATE])
        self._fixed = {given[each] for each in (inherited.STATE, inherited.GUARD) if each in given}
        store = self._store = Store(self._outbox, kept - {inherited.GUARD})

        def others() -> dict[str, int]:
            found = {inherited.STATE: given[inherited.STATE]}
            if line is not None and line.fileno() >= 0:
                found[inherited.GUARD] = line.fileno()
            return found

        queue, point = EventQueue(), Checkpoint(file, store, log, others)

        def save() -> bool:
            done = point.save()
            if done:
                self._unsaved.clear()
            return done

        runtime = Runtime(self._loop, log, queue.post, save)
        effects = Effects(
            settings,
            lambda host: kind(host, listeners),
            runtime,
            output=cast("Any", Output(self._loop, self._chance)),
            systemd=Systemd({}, 1, Outbox(self._later), self._outbox),
            start_report=StartReport(None, None),
        )
        self._with_releases(effects, runtime)
        self._supervisor = protector = Supervisor(
            Fleet(
                policy=settings.policy,
                workers_wanted=settings.workers,
                configured=settings.origin.configured,
            ),
            queue,
            effects,
            point,
            cast("Any", Upgrade(kernel)),
            runtime,
            reopen_logs=lambda: "",
            on_signal=lambda _: None,
            terminal=None,
            outlives_terminal=False,
        )
        if line is not None:

            def hear() -> None:
                data = line.recv(4096, 0)
                if not data:
                    self._fixed.discard(line.fileno())
                    self._loop.unwatch(line.fileno())
                    self._outbox.close()
                    effects.pool.guarded = False
                    return
                pid, _, status = data.decode().partition(" ")
                protector.effects.pool.learn_status(int(pid), *exit_text.status_of(int(status)))

            self._loop.watch(line.fileno(), hear)
        else:
            effects.pool.guarded = False
        if snapshot is None:
            left.close()
            protector.launch()
        else:
            protector.adopt(Recovery(effects, snapshot, left))
        self._starting = False
        protector.run()
        effects.close()

    def _with_releases(self, effects: Effects, runtime: Runtime) -> None:
        """Give a program its releases, if there are any."""

    def _replaced(self) -> Iterator[tuple[Any, str, Any]]:
        """Yield what one kind of life replaces in the protector's modules."""
        yield from ()

    def _forget_others(self, snapshot: Snapshot) -> None:
        """Note which workers the state does not tell of."""
        told = {each.number for each in snapshot.workers}
        told |= {each.number for each in snapshot.fleet.alive()}
        for each in self.workers:
            each.unknown = each.unknown or number_of(each) not in told
        self._unwritten = False

    def _settings_of(self, snapshot: Snapshot | None) -> Settings:
        """The settings that hold, as the resident process finds them."""
        return snapshot.settings.current if snapshot is not None else self.settings

    def _only_what_was_found(self, loop: Loop) -> None:
        """See to it that no callback gets events of what another had at its number."""
        watch = loop.watch

        def watched(fd: int, callback: Callable[[], None], events: int = IN) -> None:
            file = self.kernel.file(fd)

            def called() -> None:
                assert self._found.get(fd) is file, f"got events of what had descriptor {fd} before"
                callback()

            watch(fd, called, events)

        loop.watch = watched  # type: ignore[method-assign]

    def _later(self, again: Callable[[], None]) -> None:
        self._loop.call_after(again, 0.1, again)

    def _after_exec(self, descriptors: dict[str, int]) -> dict[str, int]:
        kernel = self.kernel
        kernel.dead = False
        kernel.epoll = None
        for fd in set(kernel.files) - set(descriptors.values()):
            file = kernel.files[fd]
            if isinstance(file, Running):
                file.process.orphan = True  # of a child that is not known any more
            kernel.forget(fd)
        kernel.wake = None
        return descriptors

    def _after_kill(self) -> dict[str, int]:
        """Let the kernel close everything, and the guard or systemd start another program."""
        kernel = self.kernel
        kernel.dead = False
        self._forget_unsaved()
        copies = set(self._outbox._unsent.values())
        held = {
            file
            for fd, file in kernel.files.items()
            if isinstance(file, Connection) and fd not in copies
        }
        passed_on = [*self.store.values(), *(f for _, files in self._line.queue for f in files)]
        undelivered = held.difference(each for each in passed_on if isinstance(each, Connection))
        assert len(undelivered) <= 1, f"undelivered: {undelivered}"
        for connection in held:  # it may be kept, and the state not know of it yet
            connection.excuse = BY_KILL
        if self._supervisor is not None and not self._everything_is_kept():
            self._unkept = True
            self._why_lost = "killed before all was kept"
            self._excuse(self._why_lost)
        else:
            self._why_lost = BY_KILL
        if self._supervisor is not None and self._supervisor.checkpoint._failing:
            self._excuse("killed while the state could not be written")
            self._unwritten = True
            self._outdated.clear()
        self._held = held
        self._lost_by_kill = 0
        kernel.end_of_process()
        self._keep()
        assert self._lost_by_kill <= 1, f"{self._lost_by_kill} connections lost by one kill"
        self._why_lost = ""
        self._line.drop()
        self._supervisor = None
        for each in self.workers:
            each.orphan = True
        # What is passed on is passed on, whatever the limit.
        kernel.limit = max(kernel.limit, len(self.store) + 12)
        return {name: kernel.install(file) for name, file in self.store.items()}

    def accepted(self, which: Socket, but: object = None) -> tuple[Counter[int], Counter[int]]:
        """In the place of accept_tags.connections()."""
        raise NotImplementedError

    def accepted_unix(self) -> Iterator[tuple[int, int, int]]:
        """In the place of sock_diag.accepted_unix()."""
        raise NotImplementedError

    def _end_of_all(self, why: str) -> None:
        """No other program is started: what waits is lost, workers finish what they have."""
        self._why_lost = why
        self.kernel.dead = False
        self.kernel.end_of_process()
        for worker in self.workers:
            worker.hangs = False
            worker.voice.close()
            if not worker.ended:
                assert worker.read.no_receive, f"{worker.pid} waits for ever on its channel"
                assert worker.line.no_receive, f"{worker.pid} waits for ever on its line"
            while not worker.ended and not worker.told and worker.take():
                pass
        for worker in self.workers:
            self.delivered += len(worker.connections)
            worker.end(os.CLD_EXITED, 0)

    def _excuse(self, why: str) -> None:
        """Whatever waits now may be lost later."""
        for file in (*self.kernel.files.values(), *self.store.values()):
            if isinstance(file, Connection):
                file.excuse = why
            elif isinstance(file, End):
                for _, files in file.queue:
                    for each in files:
                        if isinstance(each, Connection):
                            each.excuse = why

    def _everything_is_kept(self) -> bool:
        """Whether the fd store has, or will have read, all that the protector holds."""
        assert self._supervisor is not None
        wanted = self._supervisor.effects.descriptors().keys()
        return not self._outbox._unsent and wanted <= self._store.kept

    # -- what the kernel asks ------------------------------------------------------

    def _process_at(self, pid: int) -> Any:
        return self._processes[pid]

    def _group_of(self, leader: Any) -> list[Any]:
        """All processes of the group that one leads, or led."""
        return [leader]

    def _strangers(self, family: proc_scan.Family) -> Iterator[tuple[int, str, frozenset[int]]]:
        """The processes that the protector does not know, their addresses and sockets."""
        for each in self.workers:
            if not each.ended and each.pid not in family.known:
                yield each.pid, each.address, frozenset()

    def _start(
        self, argv: tuple[str, ...], environment: dict[str, str], given: dict[int, File]
    ) -> int:
        worker = Worker(self._new_pid(), environment, given)
        worker.hangs = not self._deploy_works and self._chance() < 0.5
        self.workers.append(worker)
        self._processes[worker.pid] = worker
        return worker.pid

    def _new_pid(self) -> int:
        """Number a process that starts now."""
        pid = self._free_pid()
        self.starts[pid] = process.boot_ticks()
        return pid

    def _free_pid(self) -> int:
        """Return a number, where numbers are few that of one that is gone with all of its group."""
        if self._few_numbers:
            free = [pid for pid, each in self._processes.items() if self._is_free(each.leader)]
            # Rather one that may still be taken here for the one that is gone.
            open_yet = {f.process.pid for f in self.kernel.files.values() if isinstance(f, Running)}
            free = [pid for pid in free if pid in open_yet] or free
            if free:
                return self._random.choice(free)
        self._next_pid += 1
        return self._next_pid

    def _is_free(self, leader: Any) -> bool:
        return all(each.gone for each in self._group_of(leader))

    def _zombie(self) -> Any:
        ended = (each for each in self.workers if each.ended and not each.reaped)
        return next((each for each in ended if not each.orphan), None)

    def _sent(self, connection: Connection, end: End) -> None:
        assert connection.excuse or connection.in_queues == 1, f"{connection} is in two queues"
        assert connection.excuse or not connection.taken_by, f"{connection} was delivered already"
        source = connection.source
        assert source is not None
        assert connection.came_by is not None
        came_by = connection.came_by.told
        before = source.sent.get(came_by, 0)
        if connection.kept_back:
            return  # those behind it were left there, and need not wait for it
        assert before < connection.place, f"{connection} comes after later ones"
        source.sent[came_by] = connection.place

    def _connection_lost(self, connection: Connection) -> None:
        other = self._blame(connection)
        why = self._why_lost or other
        if why == BY_KILL and connection not in self._held:
            why = other or why  # the fd store has dropped what had been closed before
        if not why or (why == BY_KILL and not self.ACCEPTS):
            raise AssertionError(f"{connection} is lost")
        # What an earlier kill has lost may have been kept until now without being known.
        if why == BY_KILL:
            self._lost_by_kill += connection in self._held or not connection.excuse
        self._say(f"  {connection} is lost: {why}")
        self.lost[why] = self.lost.get(why, 0) + 1

    def _blame(self, connection: Connection) -> str:
        """Return why a connection may be lost without a kill; empty: for no known reason."""
        return self._reason() or connection.excuse or self._of_reading(connection)

    def _of_reading(self, connection: Connection) -> str:
        """Say why one is lost by another configuration; empty: for none of that."""
        address = connection.came_by
        if address is None:
            return ""
        if connection.added < address.added:
            return "removed, and added again"
        if address.served and address.kept:
            return ""
        if not address.served:
            return "no generation has served that address yet, or does any more"
        # Generations that do not know it do not serve clients that have come by it.
        return "removed" if self._harmed > address.harm or not self.ACCEPTS else ""

    @property
    def _harmed(self) -> int:
        """How often something has befallen a worker."""
        return self._harm + self.kernel.signals

    def _reason(self) -> str:
        fleet = self._supervisor.fleet if self._supervisor is not None else None
        if fleet is None or not fleet.stopping:
            return ""
        return f"{fleet.stopping.value} stop"

    def _strike(self, call: str) -> int:
        """Say what a system call fails with (0: nothing), after something happened meanwhile."""
        if self._calm:
            self.kernel.quiet_calls = 1 << 62
            return 0
        self._interfere_later()
        what = self._chance()
        if what < self._deadly and self._has_begun():
            self.kernel.dead = True
            self.killed_at[point()[0]] += 1
            raise Killed
        if what < self._deadly + self._faulty:
            codes = FAULTS.get(call)
            if codes is None or (call == "pwrite" and not self._state.slots):
                return 0  # before the first state there is nothing to come back to
            self.faults += 1
            return self._random.choice(codes)
        self._meanwhile = True
        self._step()
        self._meanwhile = False
        return 0

    def _has_begun(self) -> bool:
        """Whether a kill is no end of it all, where there is something to be seen after that."""
        protector = self._supervisor
        return not self._asks or protector is None or protector.fleet.served

    def _interfere_later(self) -> None:
        self.kernel.quiet_calls = 1 + int(self._chance() * self._gap * 2)

    # -- turns -----------------------------------------------------------------------

    def _turn(self, timeout: float | None) -> list[tuple[int, int]]:
        """Let the world go on, as long as the protector waits."""
        kernel = self.kernel
        epoll = kernel.epoll
        assert epoll is not None
        self._check()
        due = None if timeout is None else kernel.clock_ns + int(timeout * 1e9) + 1
        while not self._calm:
            told = epoll.told()
            if told and self._chance() < 0.7:
                return self._wake(told)
            if due is not None and kernel.clock_ns >= due:
                return self._wake(told)
            if self.steps_left <= 0:
                self._be_calm()
                break
            self._step()
        return self._calm_turn(due)

    def _wake(self, told: list[tuple[int, int]]) -> list[tuple[int, int]]:
        kernel = self.kernel
        if told and kernel.changes == self._changes:
            self._idle_turns += 1
            assert self._idle_turns < IDLE_WAKE_UPS, f"it spins, woken by {told}"
        else:
            self._idle_turns = 0
        self._changes = kernel.changes
        assert kernel.calls - self._calls < CALLS_A_TURN, "it does not come back to its loop"
        self._calls = kernel.calls
        self.turns += 1
        self._found = {fd: kernel.files[fd] for fd, _ in told}
        if len(told) > 1:
            self._random.shuffle(told)
        return told

    def _step(self) -> None:
        """Let one thing happen that the seed chooses."""
        self.steps_left -= 1
        self.steps += 1
        self.kernel.changes += 1
        self._acts[int(self._chance() * len(self._acts))]()

    def _say(self, text: str) -> None:
        if self._note:
            self._note(text)

    # -- what may happen ---------------------------------------------------------------

    def _what_happens(self) -> list[tuple[Callable[[], None], int]]:
        return [
            (self._connect, 2 if self._few_clients else 300),
            (self._crowd, 10 * (not self._few_clients)),
            (self._take, 250),
            (self._take_all, 40),
            (self._finish, 150),
            (self._time, 120),
            (self._become_ready, 100 + 200 * self.settings.origin.configured),
            (self._obey, 120),
            (self._keep, 80),
            (self._crash, 15),
            (self._hang, 8),
            (self._go_on, 15),
            (self._shut_channel, 6),
            (self._nonsense, 20),
            (self._hup, 20 + 20 * self.settings.origin.configured),
            (self._more, 6),
            (self._fewer, 6),
            (self._upgrade, 5 if self.fd_store != "none" else 0),
            (self._scarce, 5),
            (self._plenty, 15),
            (self._deploy, 30 if self._asks else 6),
            (self._term, 1 if self.seed % 4 == 0 else 0),
            (self._int, 1 if self.seed % 8 == 0 else 0),
            (self._unguard, 3 if self.seed % 6 == 2 and self.fd_store == "guard" else 0),
            (self._children_ended, 10 * self._few_numbers),
            (self._scale, 20 * self._many),
            (self._lame_duck, 5 * self._lame_ducks),
            (self._dry_run, 60 * self._dry_runs),
        ]

    def _connect(self) -> None:
        at = self._listening[int(self._chance() * len(self._listening))]
        comes_in = at.references and at.listens and not (at.refuses or at.full)
        if comes_in and len(at.backlog) < BACKLOG:
            self.connections += 1
            connection = Connection(self.connections, self._connection_lost)
            connection.references = 1
            connection.came_by, connection.added = at.address, at.address.added
            at.backlog.append(connection)
            if self._note:
                self._note(f"{connection} comes")

    def _crowd(self) -> None:
        for _ in range(self._random.randrange(5, 40)):
            self._connect()

    def _active_worker(self) -> Worker | None:
        """A living worker that does something."""
        if not self.workers:
            return None
        worker = self.workers[int(self._chance() * len(self.workers))]
        if worker.ended:
            if worker.gone:
                self.workers.remove(worker)
            return None
        return None if worker.hangs else worker

    def _take(self) -> None:
        worker = self._active_worker()
        if worker and not worker.leaving and (found := worker.take()) and self._note:
            self._note(f"{worker.pid} takes {found}")

    def _take_all(self) -> None:
        worker = self._active_worker()
        if worker and not worker.told and not worker.line.no_receive:
            self._say(f"{worker.pid} takes all {len(worker.read.queue)}")
            while worker.take():
                pass

    def _finish(self) -> None:
        worker = self._active_worker()
        if worker and worker.connections:
            self.delivered += 1
            worker.connections.pop().drop()

    def _time(self) -> None:
        chance = self._chance()
        often, pauses, pause = self.TIME
        if self._asks:  # else no generation would have time to answer
            often = 0.998
        seconds = self._random.choice(pauses) if chance < often else pause
        if "look" in self._loop._timers:
            seconds = min(seconds, 1.0)  # a process that looks for leftovers does not hang
        if "leftovers-end" in self._loop._timers:
            seconds = min(seconds, 1.0)  # nor do we stand still for half a minute at the very end
        self.kernel.clock_ns += int(seconds * 1e9 * (1 + chance))

    def _tell(self, worker: Any, text: bytes, *files: File) -> bool:
        """Say something, if there is room; return whether there was."""
        to = self.kernel.bound.get(worker.address)
        if to is not None and len(to.queue) >= Datagrams.ROOM:
            return False
        if to is not None:
            for each in files:
                each.take()
            to.queue.append((text, worker.pid, files))
        return True

    def _become_ready(self) -> None:
        worker = self._active_worker()
        if worker and not worker.ready:
            retires = b"\nX_SOCKETPROTECTOR_RETIRE=1" if self._chance() < 0.5 else b""
            worker.ready = self._say_ready(worker, retires)  # else it waits for room
            self._say(f"{worker.pid} is ready" if worker.ready else f"{worker.pid} finds no room")

    def _say_ready(self, worker: Any, more: bytes = b"") -> bool:
        """Say READY=1, or the same in another way that counts; return whether it was said."""
        ready, lines = self.settings.ready, worker.voice.lines
        if ready == "notify" or (ready in PROBED and self._chance() < 0.5):
            return self._tell(worker, b"READY=1" + more)
        if ready != "fd" and not self._calm and self._chance() < 0.3:
            return self._ack(worker.pid)
        end, text = self._random.choice(lines)
        half = int(self._chance() * len(text))
        try:
            for part in filter(None, (text[:half], text[half:])):
                end.send(part, ())
        except OSError:  # a real one would be killed by SIGPIPE
            assert not self._is_heard(worker), f"{worker.pid} speaks, and is not heard"
            self._end(worker, os.CLD_KILLED, signal.SIGPIPE)
        else:
            if self._chance() < 0.5:
                lines.remove((end, text))
                end.drop()
        return True

    def _is_heard(self, worker: Any) -> bool:
        """Whether the protector knows it, and has not lost its line by a kill."""
        if self._supervisor is None or self._starting or self._unkept:
            return False
        # By its number: one that was killed before it was known may have the pid of another.
        records = self._supervisor.effects.pool.records()
        return number_of(worker) in {each.number for each in records if not each.orphaned}

    def _ack(self, pid: int) -> bool:
        """Say it by the control socket; return whether it was open."""
        if self._starting or self._supervisor is None or self.kernel.wake is None:
            return False
        acked = self._supervisor.effects.pool.acked
        self._loop.call_after(("acked", pid), 0.0, lambda: acked(pid))
        self._children_ended()  # so that it looks whose time has come
        return True

    def _obey(self) -> None:
        """A worker that has been asked to go goes, after its last connection."""
        worker = self._active_worker()
        if worker and worker.leaving:
            if worker.connections:
                self.delivered += 1
                worker.connections.pop().drop()
            else:
                self._end(worker, os.CLD_EXITED, 0)

    def _end(self, worker: Any, code: int, status: int) -> None:
        self._say(f"{worker.pid} ends with status {status}")
        self._harm += 1
        worker.end(code, status)

    def _crash(self) -> None:
        worker = self._active_worker()
        if worker:
            self._end(worker, os.CLD_KILLED, signal.SIGSEGV)

    def _hang(self) -> None:
        if worker := self._active_worker():
            worker.hangs = True

    def _go_on(self) -> None:
        if self.workers:
            self._random.choice(self.workers).hangs = False

    def _shut_channel(self) -> None:
        worker = self._active_worker()
        if worker:
            self._say(f"{worker.pid} shuts its channel down")
            self._harm += 1
            worker.read.shutdown(self._random.choice((socket.SHUT_RD, socket.SHUT_RDWR)))

    def _nonsense(self) -> None:
        worker = self._active_worker()
        if not worker:
            return
        match self._random.randrange(6):
            case 0:
                self._tell(worker, b"\xff\x00=READY\n=1\nREADY")
            case 1:
                self._tell(worker, b"BARRIER=1", File())
            case 2:
                self._tell(worker, b"BARRIER=1", File(), File())
            case 3:
                self._tell(worker, b"EXTEND_TIMEOUT_USEC=%d" % self._random.randrange(10**8))
            case 4:
                self._tell(worker, b"EXTEND_TIMEOUT_USEC=" + "\u0663".encode() + b"\nREADY=2")
            case 5:
                while self._tell(worker, b"STATUS=busy\nSTOPPING=1", File()):
                    if worker.address not in self.kernel.bound:
                        break

    def _signal(self, number: signal.Signals) -> None:
        wake = self.kernel.wake
        if wake is not None:
            self._say(f"the protector gets {number.name}")
            wake.bytes.append(number)

    def _children_ended(self) -> None:
        self._signal(signal.SIGCHLD)

    def _hup(self) -> None:
        self._signal(signal.SIGHUP)

    def _more(self) -> None:
        if self._supervisor and self._supervisor.fleet.workers_wanted < 4:
            self._signal(signal.SIGTTIN)

    def _fewer(self) -> None:
        self._signal(signal.SIGTTOU)

    def _scale(self) -> None:
        """A client of the control socket wants another number of workers."""
        protector = self._supervisor
        if self._starting or protector is None or self.kernel.wake is None:
            return
        asked = ScaleRequested(to=self._random.randrange(1, MOST))
        self._say(f"{asked.to} workers are asked for")

        def scale() -> None:
            protector.scale(asked)

        self._loop.call_after("scale", 0.0, scale)
        self._children_ended()  # so that it looks whose time has come

    def _lame_duck(self) -> None:
        """A client of the control socket has balancers told, or takes that back."""
        self._request("lame-duck", LameDuckRequested(self._chance() < 0.5))

    def _dry_run(self) -> None:
        """A client of the control socket wants to know whether a reload would succeed."""
        self._request("dry-run", DryRunRequested())

    def _request(self, key: str, asked: Event) -> None:
        protector = self._supervisor
        if self._starting or protector is None or self.kernel.wake is None:
            return
        self._say(f"{asked}")
        self._loop.call_after(key, 0.0, lambda: protector.runtime.post(asked))
        self._children_ended()  # so that it looks whose time has come

    def _upgrade(self) -> None:
        self._signal(signal.SIGUSR2)

    def _term(self) -> None:
        self._signal(signal.SIGTERM)

    def _int(self) -> None:
        if self._chance() < 0.3:
            self._signal(signal.SIGINT)

    def _unguard(self) -> None:
        """The guard is killed; the protector goes on."""
        if self.unguarded:
            return
        self._say("the guard is killed")
        self.unguarded = 1
        self.fd_store = "none"
        self._line.drop()
        kept, self.store = self.store, {}
        for file in kept.values():
            file.drop()

    def _scarce(self) -> None:
        if self._faulty and not self._meanwhile:  # between our calls: else the kernel drops some
            self.kernel.limit = len(self.kernel.files) + self._random.randrange(8)

    def _plenty(self) -> None:
        self.kernel.limit = self.kernel.room

    def _deploy(self) -> None:
        self._deploy_works = self._chance() < 0.6

    def _keep(self) -> None:
        """The guard or systemd reads what it was sent; the guard reaps."""
        for data, files in self._read_line():
            fields = dict(line.split("=", 1) for line in data.decode().split("\n"))
            name = fields.get("FDNAME", "")
            if "FDSTORE" in fields:
                assert len(files) == 1
                assert name not in self.store, f"{name} is kept twice"
                self._say(f"the fd store keeps {name}")
                self.store[name] = files[0]
                files[0].take()
            elif "FDSTOREREMOVE" in fields and name in self.store:
                self._say(f"the fd store drops {name}")
                self.store.pop(name).drop()
            for each in files:
                each.drop()
        for worker in self.workers:
            if worker.orphan and worker.ended and not worker.gone:
                worker.gone = True
                if self.fd_store == "guard" and not self._line.peer.is_closed:
                    code, status = worker.result
                    said = status << 8 if code == os.CLD_EXITED else status
                    self._line.send(b"%d %d" % (worker.pid, said), ())

    def _read_line(self) -> Iterator[tuple[bytes, tuple[File, ...]]]:
        while self._line.queue:
            message = self._line.receive()
            assert message is not None
            yield message

    # -- how it ends -------------------------------------------------------------------

    def _be_calm(self) -> None:
        self._say("from now on all goes well")
        self._calm = True
        self._calm_turns = 0
        self._deploy_works = True
        self.kernel.limit = self.kernel.room
        self.kernel.quiet_calls = 1 << 62

    def _calm_turn(self, due: int | None) -> list[tuple[int, int]]:
        """All do at once what is to be done; time passes only when nothing is."""
        kernel = self.kernel
        assert kernel.epoll is not None
        self._calm_turns += 1
        assert self._calm_turns < CALM_TURNS, "it never comes to rest"
        self._all_do_well()
        told = kernel.epoll.told()
        if told:
            return self._wake(told)
        if due is not None and self._loop._timers.keys() - HEALTH:
            kernel.clock_ns = max(kernel.clock_ns, due)
            return self._wake([])
        if self._zombie() is not None:  # so the kernel has reported it
            self._children_ended()
            return self._wake(kernel.epoll.told())
        if self._tempt():
            return self._wake(kernel.epoll.told())
        self._check_rest()
        assert not self._stopped, "it waits for ever instead of ending"
        self._stopped = True
        self._come_late()
        self._signal(signal.SIGTERM)
        return self._wake(kernel.epoll.told())

    def _tempt(self) -> bool:
        """Let something happen at rest that must come to rest again; return whether it did."""
        return False

    def _come_late(self) -> None:
        """Let something happen just before the last stop."""

    def _all_do_well(self) -> None:
        self._keep()
        for worker in self.workers:
            if worker.ended:
                continue
            worker.hangs = False
            if not worker.ready:
                worker.ready = self._say_ready(worker)
            if not worker.told and not worker.line.no_receive:
                while worker.take():
                    pass
            for each in worker.connections:
                self.delivered += 1
                each.drop()
            worker.connections.clear()
            if worker.leaving:
                self._end(worker, os.CLD_EXITED, 0)
        self.workers = [each for each in self.workers if not each.ended or not each.reaped]

    # -- what must hold ----------------------------------------------------------------

    def _check(self) -> None:
        """What holds whenever the protector waits."""
        protector = self._supervisor
        assert protector is not None
        act = protector.effects
        held = [each for each in self.kernel.files.values() if type(each) is Connection]
        if held:  # a copy may be on its way to the fd store
            copies = set(self._outbox._unsent.values())
            files = self.kernel.files.items()
            held = [each for fd, each in files if type(each) is Connection and fd not in copies]
        # Of each listener that is removed there may be one.
        forwarder = forwarder_of(act)
        hands = len(forwarder.undelivered.waiting) if forwarder is not None else 0
        assert len(held) == hands, f"{held} undelivered"
        for each in held:
            assert each.excuse or each.in_queues == 0, f"{each} is undelivered and in a queue"
            assert each.excuse or not each.taken_by, f"{each} is undelivered and was delivered"
        self._look_at_places(act)
        if self.turns % 16 == 0:
            self._check_descriptors()
        if protector.fleet is not self._checked:
            self._checked = protector.fleet
            self._check_fleet(protector.fleet, act)

    def _look_at_places(self, act: Effects) -> None:
        """See which addresses are served, as soon as no other configuration is tried."""
        if act.live_settings.record.candidate is not None or self._reason():
            return
        settings = act.live_settings.settings.listeners
        there = {each.settings.address for each in act.delivery.listeners}
        for each in self._listening:
            each.address.served = each.address.kept = each.address.told in there
        wanted = {each.address for each in settings if not each.removed}
        assert self._unkept or wanted == there, f"{wanted} are to be served, and {there} are"

    def _check_descriptors(self) -> None:
        protector = self._supervisor
        assert protector is not None
        known = {*self._fixed, *protector.effects.descriptors().values()}
        known |= set(self._outbox._unsent.values())
        if (forwarder := forwarder_of(protector.effects)) is not None:
            known.add(forwarder._shortage.reserve)
        running = [each.process for each in self.kernel.files.values() if isinstance(each, Running)]
        ours = {each.pid for each in running if not (each.orphan or each.gone)}
        unknown = ours.difference(process._known)
        assert not unknown, f"{unknown} would be reaped as strangers"
        epoll = self.kernel.epoll
        left = {
            fd: file
            for fd, file in self.kernel.files.items()
            if fd not in known and file is not epoll and file is not self.kernel.wake
        }
        left = {fd: file for fd, file in left.items() if not is_for_questions(file)}
        assert not left, f"unknown descriptors: {left}"

    def _check_fleet(self, fleet: Fleet, act: Effects) -> None:
        for phase in (Phase.STARTING, Phase.SETTLING, Phase.SERVING):
            assert len(fleet.all_of(phase)) <= 1, f"two are {phase.value}"
        running = {key for key in self._loop._timers if isinstance(key, Deadline)}
        assert running == fleet.timers, f"timers: {running} {fleet.timers}"
        route = fleet.route
        starting = fleet.of(Phase.STARTING)
        if fleet.dry_run and starting:
            self._tried.add(starting.number)
        assert route is None or route.number not in self._tried, "what was only tried serves"
        assert act._route == (route.number if route else None), "another route"
        self._check_history(fleet, act.reports.run.history)
        lame_duck = fleet.lame_duck is not LameDuck.OFF
        forwarder = forwarder_of(act)
        closing = forwarder is not None and forwarder._closing
        assert not (lame_duck and closing), "it does not accept any more"
        looked_after = {each.number for each in act.pool.records()}  # with what outlives a leader
        # What a killed program had begun to start is looked for.
        unfinished = {*act.pool.leftovers.lost}
        left = unfinished | act.pool.groups.numbers
        looked_after |= unfinished
        assert {each.number for each in fleet.alive()} == looked_after
        never_opened = {
            each.number
            for each in fleet.generations
            if each.workers and {worker.number for worker in each.workers} <= left
        }
        numbers = {each.number for each in fleet.generations}
        assert numbers - never_opened <= set(act.generations) <= numbers
        if fleet.served and not fleet.stopping and not route and not fleet.incoming:
            waits = Deadline(TimerKind.OPEN) in fleet.timers
            policy = fleet.policy_of(fleet.to_open is Next.FRESH)
            before = [g for g in fleet.generations if g.quiescing or g.phase is Phase.ABANDONED]
            to_come = fleet.to_open and (policy.stop_first or before)
            assert waits or to_come, "no generation will ever serve"

    def _said(self, event: str, fields: Mapping[str, Any]) -> None:
        """Look at what the protector logs, at once."""
        if event in ("reloading", "dry-run"):
            self._outdated |= self._verdicts
        elif event in VERDICTS:
            verdict = event, fields["generation"]
            assert verdict not in self._outdated, f"{verdict} is said again, amid another reload"
            self._verdicts.add(verdict)
            self._unsaved.add(verdict)

    def _forget_unsaved(self) -> None:
        """Let the next program say again what the state does not tell: it repeats a decision."""
        self._verdicts -= self._unsaved
        self._outdated -= self._unsaved
        self._unsaved.clear()

    def _check_history(self, fleet: Fleet, history: History) -> None:
        """Whoever waits for a verdict must not wait for ever."""
        tried = history.dry_run is not None and history.dry_run.result == "running"
        assert tried == fleet.dry_run, f"of a dry run {history.dry_run} is said"
        running = {each.generation for each in history.reloads if each.result == "running"}
        coming = {each.number for each in (fleet.incoming,) if each is not None}
        assert running <= coming, f"of reloads {history.reloads} is said"

    def _check_rest(self) -> None:
        """All goes well and nothing is to be done any more: so all must be done."""
        protector = self._supervisor
        assert protector is not None
        fleet = protector.fleet
        self._check_waiting()
        if not fleet.stopping:
            (serving,) = fleet.generations
            assert serving.phase is Phase.SERVING
            # A worker that a killed program had begun to start finishes with its generation.
            lost = {*protector.effects.pool.leftovers.lost, *protector.effects.pool.groups.numbers}
            workers = [each for each in serving.workers if each.number not in lost]
            assert all(each.state is State.READY for each in workers)
            assert len(workers) == fleet.workers_wanted
            assert not fleet.timers
            self._check_serving(serving.number)

    def _check_waiting(self) -> None:
        """No client waits any more."""
        assert self._supervisor is not None
        stopping = self._supervisor.fleet.stopping
        for each in self._listening:
            if not (each.foreign and (stopping or not each.address.kept)):
                assert not each.backlog, "clients wait for ever"
        forwarder = forwarder_of(self._supervisor.effects)
        routed = forwarder.outlet.route if forwarder is not None else None
        assert (
            forwarder is None or routed is None or not (forwarder.undelivered.has(routed.knows_of))
        ), "one waits for ever"
        assert not any(each.read.queue for each in self.workers), "a queue is never emptied"

    def _check_serving(self, number: int) -> None:
        """What holds at rest of the generation that serves."""

    def _check_left(self) -> None:
        """Nothing is left but what the protector's own end will close."""

    def _finish_all(self, worker: Any) -> None:
        """Let a worker finish what it has, and end."""
        for each in worker.connections:
            self.delivered += 1
            each.drop()
        worker.connections.clear()
        worker.end(os.CLD_EXITED, 0)

    def _check_the_end(self) -> None:
        protector = self._supervisor
        if protector is None:  # it had ended when it was killed
            return
        if self._stopped and protector.fleet.stopping is Stop.GRACEFUL:
            assert not self.lost.get("graceful stop"), "a stop in calm has lost connections"
        for each in self.workers:
            if each.unknown and each.leaving:  # no program waits for it: it ends in its own time
                self._finish_all(each)
        for each in self.workers:
            assert each.ended, f"worker {each.pid} is left behind"
        kernel = self.kernel
        for each in self.workers:
            # Else it is reaped as a stranger: here, or by the process that adopts it now.
            assert each.reaped or each.orphan or each.pid not in process._known
        left = {
            fd: file
            for fd, file in kernel.files.items()
            if fd not in self._fixed and file is not kernel.epoll and file is not kernel.wake
        }
        left = {fd: f for fd, f in left.items() if fd not in self._outbox._unsent.values()}
        assert not left, f"left open at the end: {left}"
        self._check_left()


@contextmanager
def installed(world: World) -> Iterator[None]:
    """Have the protector's modules speak with the simulated kernel, for as long as this lasts."""
    kernel = world.kernel
    replaced: list[tuple[Any, str, Any]] = []

    def put(module: Any, name: str, value: Any) -> None:
        replaced.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def resolve(command: Any, directory: str, search: str) -> tuple[str, tuple[str, ...]]:
        kernel.enter("resolve")
        if not world._deploy_works and world._chance() < 0.3:
            raise failure(2, command[0])
        return f"/srv/{command[0]}", tuple(command)

    class Found(proc_scan.Stranger):
        def open(self) -> int:
            return kernel._pidfd_open(self.pid)

    class Look:
        """A look at /proc takes a moment, and what is found is as it was at its end."""

        def __init__(self, loop: Loop, family: proc_scan.Family, done: proc_scan.Done) -> None:
            self._loop, self._family, self._done = loop, family, done
            loop.call_after("look", 0.1 * world._chance(), self._end)

        def _end(self) -> None:
            found = [
                Found(pid, world.starts[pid], bool(address), address, sockets)
                for pid, address, sockets in world._strangers(self._family)
            ]
            self._done([*found], "")

        def call_off(self) -> None:
            self._loop.cancel("look")

    def look(
        loop: Loop, family: proc_scan.Family, identity: object, limit_s: float, done: Any
    ) -> Look:
        kernel.enter("fork")
        return Look(loop, family, done)

    try:
        for module in MODULES:
            for name in NAMES:
                if hasattr(module, name):
                    put(module, name, getattr(kernel.modules, name))
        put(program_spec, "resolve", resolve)
        put(probe, "Prober", lambda loop, **told: FakeProber(world, loop, **told))
        put(probe, "HttpExchange", lambda loop, *given: FakeExchange(world, loop, *given))
        put(config_reader, "ConfigReader", lambda _, loop, key: Reads(world, loop, key))
        put(bpf, "attach", lambda to, option, code: to.attach(option, code[-1][3]))
        put(reuseport, "steer", kernel.steer)
        put(accept_tags, "connections", world.accepted)
        put(sock_diag, "listening", kernel.listening)
        put(sock_diag, "queue_of_unix", kernel.queue_of_unix)
        put(sock_diag, "unaccepted", kernel.unaccepted)
        put(unix_listener, "locked", kernel.locked)
        put(unix_listener, "give", kernel.give)
        put(quiescing, "unread", kernel.unread)
        put(quiescing, "still_unread", kernel.still_unread)
        for module in (accept_watch, probes):
            put(module, "unaccepted", kernel.unaccepted)
        put(probes, "is_waiting", kernel.is_waiting)
        put(probes, "why_unreachable", lambda *_: "")
        put(probes, "end_of", kernel.end_of)
        put(bpf, "comes_from", kernel.comes_from)
        put(socket_file, "give", kernel.give)
        put(socket_file, "file_of", kernel.file_of)
        put(sock_diag, "accepted_unix", world.accepted_unix)
        put(sock_diag, "file_key", kernel.file_key)
        put(quiescing, "file_key", kernel.file_key)
        put(quiescing, "accepted_unix", world.accepted_unix)
        put(spawn, "_fork", kernel.fork)
        put(proc_scan, "Scan", look)
        put(procfs, "children_of", lambda _: [*world._processes])
        put(workers, "AT_ONCE", world._at_once)
        put(memory_group.Events, "open", lambda: None)
        put(peer_credentials, "_ambiguous", lambda *_: frozenset())
        for module, name, value in world._replaced():
            put(module, name, value)
        yield
    finally:
        for module, name, value in reversed(replaced):
            setattr(module, name, value)
