"""Who accepts where: real sockets and the real loop; the clock is moved by hand."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.core.events import Event, HeldClientsWait, SocketLost, Stranded
from socketprotector.daemon import probe
from socketprotector.daemon.delivery import NEVER_TAKEN_S
from socketprotector.daemon.delivery.host import Host
from socketprotector.daemon.delivery.probe_target import SHUT_DOWN
from socketprotector.daemon.delivery.shared import probes, quiescing
from socketprotector.daemon.delivery.shared.probes import LATE_ACCEPT_S
from socketprotector.daemon.delivery.shared.quiescing import (
    GENERATION_LAST_S,
    GENERATION_QUIET_S,
    SILENT_S,
)
from socketprotector.daemon.delivery.shared.shared_listeners import SharedListeners
from socketprotector.daemon.delivery.shared.socket_steering import SocketSteering
from socketprotector.daemon.delivery.shared.socket_watch import FIRST_RESCUE_S
from socketprotector.daemon.ready_probe import ReadyProbe
from socketprotector.daemon.runtime import Runtime
from socketprotector.launch.bind_unix import give_away
from socketprotector.model.records import SteeringRecord
from socketprotector.model.settings import ListenerSettings
from socketprotector.system import bpf, reuseport, sock_diag, socket_copy, socket_file
from socketprotector.system.listener import Listener
from socketprotector.system.listeners import listener_of
from socketprotector.system.loop import READ, Loop
from tests import needs
from tests.boundary import ending
from tests.boundary.listening import ignore_clients
from tests.namespaces import socket_elsewhere
from tests.running import DEADLINE_S, shared_path
from tests.unanswered import Unanswered

ONE_S = struct.pack("ll", 1, 0)


class Told:
    """A log that keeps its events."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.hints: list[str] = []
        self.then: Callable[[], None] = lambda: None

    def write(self, level: str, event: str, **fields: object) -> None:
        self.events.append(event)
        if hint := fields.get("hint"):
            self.hints.append(str(hint))
        self.then()


class World(Host):
    """One address, and the time, which stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        self.unread: dict[bytes, bool] = {}  # and whether he is silent
        self.unaccepted: set[bytes] = set()  # of those
        self.asked, self.asking_s = 0, 0.0
        self.loop, self.log = Loop(), Told()
        self.quiesced: list[int] = []
        self.stranded = self.held = 0
        self.socket_lost: list[int] = []
        self.bound: list[Listener] = []
        self.lost: list[Listener] = []
        self.untaken: list[tuple[float, int, bool, str]] = []
        self.shaking: set[bytes] = set()  # clients who are about to connect
        monkeypatch.setattr(quiescing, "unread", self.ask)
        monkeypatch.setattr(quiescing, "still_unread", self.ask_again)
        # By its number, as launch/bind.py does.
        with socket.socket() as chooser:
            chooser.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            chooser.bind(("127.0.0.1", 0))
            first = socket.socket()
            first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            first.bind(chooser.getsockname())
        first.listen()
        second = reuseport.make(first)
        assert second is not None
        settings = ListenerSettings(f"tcp:127.0.0.1:{first.getsockname()[1]}")
        fds = first.detach(), second.detach()
        self.listener = listener_of(fds[0], 0, settings, shared=True, sibling=fds[1])
        self.shared = SharedListeners(self, [self.listener])
        self.clients: list[socket.socket] = []
        self.written: SteeringRecord | None = None
        self.generations = {}
        self.runtime = Runtime(self.loop, cast("Any", self.log), self.post, self.persist)
        self.steering = self._made()

    def _made(self) -> SocketSteering:
        return SocketSteering(self.shared)

    @property
    def listeners(self) -> list[Listener]:
        return self.shared.all

    def listener_lost(self, listener: Listener, reason: str) -> None:
        self.lost.append(listener)

    def listener_bound(self, listener: Listener) -> None:
        self.bound.append(listener)

    def report_untaken(
        self, seconds: float, waiting: int, ever: bool, listen: str | None = None
    ) -> None:
        assert listen is not None
        self.untaken.append((seconds, waiting, ever, listen))

    @property
    def own_connection(self) -> socket.socket | None:
        return None

    def persist(self) -> bool:
        self.written = self.steering.record()
        self.stored = {name for each in self.listeners for name in each.descriptors()}
        return True

    def resume(
        self, *accepting: tuple[int, int], held: bool = False, record: SteeringRecord | None = None
    ) -> None:
        """Have another program go on, with generations and their sockets; the first one serves.

        record: what it finds, where that is not all that the program before has known.
        """
        before, self.steering = self.steering, self._made()
        self.steering.adopt_record(record or before.record(), held=held)
        for generation, socket_number in accepting:
            self.steering.adopt(generation, socket_number)
        if held:
            self.steering.turn_hold(True)
        for _, socket_number in accepting[:1]:
            self.steering.turn_to(socket_number, served_before=True)

    def quiesce(self, generation: int, *, reads_on: bool = False) -> None:
        over = partial(self.quiesced.append, generation)
        self.steering.quiesce(generation, over, reads_on=reads_on)

    def add(self) -> Listener:
        """Another listener, with one socket for all generations."""
        made = socket.socket(socket.AF_UNIX)
        made.bind("")
        made.listen()
        address = f"unix:@{made.getsockname()[1:].decode()}"
        self.listeners.append(listener_of(made.detach(), 1, ListenerSettings(address), shared=True))
        return self.listeners[-1]

    def add_pair(self, index: int) -> Listener:
        """Another listener, with two sockets."""
        made = socket.create_server(("127.0.0.1", 0))
        second = reuseport.make(made)
        assert second is not None
        settings = ListenerSettings(f"tcp:127.0.0.1:{made.getsockname()[1]}")
        self.listeners.append(
            listener_of(made.detach(), index, settings, shared=True, sibling=second.detach())
        )
        return self.listeners[-1]

    def ask(
        self, family: int, ports: Collection[int], *, in_handshake: bool
    ) -> dict[int, dict[bytes, bool]]:
        return dict.fromkeys(ports, self._answer(in_handshake))

    def ask_again(
        self, family: int, clients: Collection[bytes], *, in_handshake: bool
    ) -> dict[bytes, bool]:
        return {who: it for who, it in self._answer(in_handshake).items() if who in clients}

    def _answer(self, in_handshake: bool) -> dict[bytes, bool]:
        self.asked += 1
        self.now += self.asking_s
        if in_handshake:
            return dict.fromkeys(self.shaking, False)
        return {who: it for who, it in self.unread.items() if who not in self.unaccepted}

    def post(self, event: Event) -> None:
        match event:
            case SocketLost(generation):
                self.socket_lost.append(generation)
            case Stranded():
                self.stranded += 1
            case HeldClientsWait():
                self.held += 1

    def connect(self) -> None:
        self.clients.append(socket.create_connection(self.listener.socket.getsockname()))

    def put_question(self, generation: int) -> None:
        """Ask a generation and leave it at that, as one that is killed then."""
        way = self.steering.probes.reach_by_mark(generation, "")
        assert way is not None
        ours = way.connecting()
        self.clients.append(ours)
        assert ours.connect_ex(way.connect_address) in (0, errno.EINPROGRESS)
        assert way.waits(ours)

    def accept(self, socket_number: int) -> None:
        self.listener.socket_for(socket_number).accept()[0].close()

    def waiting(self) -> list[int]:
        return [
            socket_number for socket_number in (0, 1) if self.listener.has_waiting(socket_number)
        ]

    def turn(self) -> None:
        """Let the loop see what is due and ready, without waiting."""
        ending.turn(self.loop)

    def pass_time(self, seconds: float) -> None:
        """As the loop's timers see it: from one that is due to the next."""
        until = self.now + seconds
        due = self.now
        while self.now < until:
            self.now = min(max(self.now + 0.01, due), until)
            self.turn()
            due = min((each for each, _, _ in self.loop._timers.values()), default=until)

    def close(self) -> None:
        for each in self.clients:
            each.close()
        for listener in self.listeners:
            listener.close()
        self.loop.close()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(monkeypatch)
    yield made
    made.close()


@pytest.fixture
def reloaded(world: World) -> World:
    """Generation 1 has just been superseded by 2."""
    world.steering.enter(1, world.steering.turns.free)
    world.steering.turn_to(0)
    world.steering.enter(2, world.steering.turns.free)
    return world


def supersede(world: World) -> None:
    world.steering.turn_to(1)
    world.quiesce(1)


@pytest.mark.parametrize("clients", [0, 1])
def test_a_question_that_is_given_up_is_discarded_unless_a_client_waits_too(
    reloaded: World, clients: int
) -> None:
    """No generation is started for it; for a client one is."""
    way = reloaded.steering.reach_as_client("")
    assert way is not None
    with way.connecting() as ours:
        assert ours.connect_ex(way.address) in (0, errno.EINPROGRESS)
        for _ in range(clients):
            reloaded.connect()
        assert way.waits(ours)
        way.abandon(ours)
    reloaded.steering.turn_to(1)
    assert reloaded.waiting() == [0]

    reloaded.steering.leave(1)

    assert reloaded.waiting() == ([0] if clients else [])


def test_one_that_asks_never_leaves_this_machine(world: World) -> None:
    way = world.steering.reach_as_client("")
    assert way is not None
    with way.connecting() as ours:
        assert ours.getsockname()[0].startswith("127.")


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])
def test_nor_does_a_health_check_where_another_machine_has_the_address(
    world: World, host: str
) -> None:
    """Its command would check that machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family)
    made.setsockopt(socket.IPPROTO_IP, socket_copy.IP_FREEBIND, 1)
    made.bind((host, 0))
    made.listen()
    settings = ListenerSettings(f"tcp:[{host}]:{made.getsockname()[1]}", name="away")
    world.listeners.append(listener_of(made.detach(), 1, settings, shared=True))

    with pytest.raises(OSError, match=f"no interface has the address {host} now"):
        world.steering.reach_as_client("away")


@needs.root_with("unshare")
def test_nor_does_it_look_for_a_socket_of_another_network_namespace_here(world: World) -> None:
    with socket_elsewhere() as made:
        settings = ListenerSettings("tcp:127.0.0.1:80", name="away")
        world.listeners.append(listener_of(os.dup(made.fileno()), 1, settings, shared=True))

        with pytest.raises(OSError, match="another network namespace"):
            world.steering.reach_as_client("away")


def test_the_next_generation_gets_the_other_socket_and_no_client_before_its_turn(
    reloaded: World,
) -> None:
    reloaded.connect()
    assert reloaded.waiting() == [0]

    supersede(reloaded)
    reloaded.accept(0)
    reloaded.connect()

    assert reloaded.waiting() == [1]


def test_where_no_generation_accepts_the_next_one_serves_waiting_clients(world: World) -> None:
    world.connect()
    assert world.steering.turns.free == 0
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.leave(1)  # as under stop-first
    world.connect()

    assert world.steering.turns.free == 0
    assert world.waiting() == [0]


def test_clients_wait_for_the_next_generation_as_soon_as_a_failed_one_has_left_its_socket(
    world: World,
) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.enter(2, 1)
    world.quiesce(1)
    world.connect()
    assert world.waiting() == [0], "where the failed one still accepts, none may come"

    world.steering.leave(2)
    world.connect()
    assert world.waiting() == [0, 1]

    world.accept(0)
    world.pass_time(GENERATION_QUIET_S + 0.2)
    assert world.quiesced == [1]


def test_one_goes_on_while_clients_come_to_it_and_an_earlier_one_has_the_other_socket(
    reloaded: World,
) -> None:
    """Under stop-first, right after another reload."""
    reloaded.steering.turn_to(1)
    reloaded.quiesce(2)
    reloaded.pass_time(GENERATION_LAST_S + 1)
    assert reloaded.quiesced == []

    reloaded.steering.leave(1)
    reloaded.pass_time(GENERATION_QUIET_S + 0.3)

    assert reloaded.quiesced == [2]


def test_clients_of_a_socket_that_another_has_replaced_are_read_first(reloaded: World) -> None:
    """It has accepted them before a worker shut the socket down."""
    reloaded.steering.turns.note_replaced(reloaded.listener, 0)
    reloaded.unread = {b"early": False}
    supersede(reloaded)
    reloaded.pass_time(GENERATION_QUIET_S + 1)
    assert reloaded.quiesced == []

    reloaded.unread = {}
    reloaded.pass_time(GENERATION_QUIET_S + 0.3)

    assert reloaded.quiesced == [1]


def test_one_quiesces_though_clients_come_while_no_other_generation_accepts(world: World) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.connect()
    world.quiesce(1)  # under stop-first
    world.connect()
    assert world.waiting() == [0, 1]

    world.accept(0)
    world.pass_time(GENERATION_QUIET_S + 0.2)
    assert world.quiesced == [1]
    world.steering.leave(1)

    assert world.steering.turns.free == 1


def test_where_the_kernel_cannot_tell_for_the_moment_no_client_is_forgotten(
    reloaded: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, in_handshake: bool) -> dict[bytes, bool]:
        raise OSError(errno.EMFILE, "Too many open files")

    reloaded.unread = {b"slow": False}
    monkeypatch.setattr(quiescing, "unread", fails)
    supersede(reloaded)
    reloaded.pass_time(2 * GENERATION_QUIET_S)
    assert reloaded.quiesced == []
    monkeypatch.setattr(quiescing, "unread", reloaded.ask)
    reloaded.pass_time(2 * GENERATION_QUIET_S)
    monkeypatch.setattr(quiescing, "still_unread", fails)
    reloaded.pass_time(2 * GENERATION_QUIET_S)
    assert reloaded.quiesced == []
    monkeypatch.setattr(quiescing, "still_unread", reloaded.ask_again)
    reloaded.unread = {}
    reloaded.pass_time(2 * GENERATION_QUIET_S)

    assert reloaded.quiesced == [1]


def test_one_quiesces_when_no_client_has_come_for_a_while(reloaded: World) -> None:
    supersede(reloaded)
    reloaded.pass_time(GENERATION_QUIET_S - 0.15)
    assert reloaded.quiesced == []

    reloaded.pass_time(0.3)

    assert reloaded.quiesced == [1]
    assert reloaded.log.events == []


def test_a_waiting_client_is_waited_for_and_then_has_time_to_speak(reloaded: World) -> None:
    reloaded.connect()
    supersede(reloaded)
    reloaded.pass_time(3 * GENERATION_QUIET_S)
    assert reloaded.quiesced == []
    reloaded.accept(0)
    reloaded.pass_time(GENERATION_QUIET_S - 0.15)
    assert reloaded.quiesced == []

    reloaded.pass_time(0.4)

    assert reloaded.quiesced == [1]


def test_a_client_that_another_generation_must_accept_holds_nothing_up(reloaded: World) -> None:
    """As where the next one's workers crash again and again, and another reload is to help."""
    reloaded.connect()  # to the one that quiesces
    reloaded.unread = {b"his": False, b"theirs": False}
    reloaded.unaccepted = {b"his", b"theirs"}
    supersede(reloaded)
    reloaded.pass_time(2 * GENERATION_QUIET_S)
    assert reloaded.quiesced == []

    reloaded.accept(0)
    del reloaded.unread[b"his"]
    reloaded.pass_time(GENERATION_QUIET_S + 0.3)

    assert reloaded.quiesced == [1]


@pytest.mark.parametrize("killed", [False, True])
def test_a_socket_that_only_a_later_worker_has_is_waited_for(world: World, killed: bool) -> None:
    """Else that worker is told to finish with clients that it has not read from."""
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering._repairs.replace(world.listener, 0)
    world.steering.note_new_worker(1, lambda index: True)
    world.steering.enter(2, world.steering.turns.free)
    world.connect()
    if killed:
        assert world.written is not None
        world.resume((1, 0), (2, 1), record=world.written)
    supersede(world)
    world.pass_time(3 * GENERATION_QUIET_S)
    assert world.quiesced == []

    world.accept(0)
    world.pass_time(2 * GENERATION_QUIET_S)

    assert world.quiesced == [1]


def test_a_socket_that_no_worker_has_is_not_waited_for(world: World) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering._repairs.replace(world.listener, 0)
    world.steering.note_new_worker(1, lambda index: False)
    world.steering.enter(2, world.steering.turns.free)
    world.connect()
    supersede(world)

    world.pass_time(2 * GENERATION_QUIET_S)

    assert world.quiesced == [1]


def test_an_unread_client_that_came_before_is_waited_for_and_no_later_one(
    reloaded: World,
) -> None:
    reloaded.unread = {b"slow": False}
    supersede(reloaded)
    reloaded.unread[b"new"] = False  # at the other socket
    reloaded.pass_time(2 * SILENT_S)
    assert reloaded.quiesced == []

    del reloaded.unread[b"slow"]
    reloaded.pass_time(GENERATION_QUIET_S - 0.15)
    assert reloaded.quiesced == []
    reloaded.pass_time(0.4)

    assert reloaded.quiesced == [1]


def test_a_client_that_says_nothing_is_waited_for_a_little_longer(reloaded: World) -> None:
    reloaded.unread = {b"silent": True}
    supersede(reloaded)
    reloaded.pass_time(SILENT_S - 0.2)
    assert reloaded.quiesced == []

    reloaded.pass_time(0.4)

    assert reloaded.quiesced == [1]


def test_a_client_that_speaks_at_last_is_waited_for_until_it_is_read(reloaded: World) -> None:
    reloaded.unread = {b"silent": True}
    supersede(reloaded)
    reloaded.pass_time(SILENT_S - 0.2)
    reloaded.unread[b"silent"] = False  # and no worker reads it
    reloaded.pass_time(SILENT_S)
    assert reloaded.quiesced == []

    reloaded.unread.clear()
    reloaded.pass_time(GENERATION_QUIET_S + 0.3)

    assert reloaded.quiesced == [1]


def test_a_machine_that_stands_still_shortens_no_clients_time(reloaded: World) -> None:
    reloaded.unread = {b"silent": True}
    supersede(reloaded)
    reloaded.pass_time(SILENT_S / 2)
    reloaded.now += 2 * SILENT_S
    reloaded.turn()

    assert reloaded.quiesced == []
    reloaded.unread.clear()
    reloaded.pass_time(GENERATION_QUIET_S + 0.3)
    assert reloaded.quiesced == [1]


def test_where_there_are_many_to_ask_for_it_is_done_less_often(reloaded: World) -> None:
    reloaded.unread = {b"slow": False}
    reloaded.asking_s = 0.2
    supersede(reloaded)
    reloaded.asked = 0

    reloaded.pass_time(8)

    assert reloaded.quiesced == []
    assert 3 <= reloaded.asked <= 4  # a tenth of the time at most


def test_a_flood_of_handshakes_is_not_waited_for_for_ever(reloaded: World) -> None:
    reloaded.unread = {b"never": False}
    supersede(reloaded)

    reloaded.pass_time(GENERATION_LAST_S + 0.3)

    assert reloaded.quiesced == [1]
    assert reloaded.log.events == []  # no client is left waiting


def test_one_that_does_not_accept_has_its_time_and_is_reported(reloaded: World) -> None:
    reloaded.connect()
    supersede(reloaded)

    reloaded.pass_time(GENERATION_LAST_S + 0.3)

    assert reloaded.quiesced == [1]
    assert reloaded.log.events == ["not-accepted"]
    reloaded.steering.leave(1)
    reloaded.pass_time(FIRST_RESCUE_S + 0.3)
    assert reloaded.stranded == 1


def test_a_client_that_comes_where_no_worker_accepts_is_reported_soon(reloaded: World) -> None:
    supersede(reloaded)
    reloaded.steering.leave(1)
    reloaded.pass_time(60)
    assert reloaded.stranded == 0

    reuseport.steer(reloaded.listener.socket, 0)  # as a slow handshake would
    reloaded.connect()
    reloaded.pass_time(FIRST_RESCUE_S + 0.3)

    assert reloaded.stranded == 1
    assert reloaded.log.events == ["stranded"]


def test_one_that_is_accepted_after_all_is_no_reason(reloaded: World) -> None:
    reloaded.connect()
    supersede(reloaded)
    reloaded.steering.leave(1)
    reloaded.turn()
    reloaded.accept(0)

    reloaded.pass_time(5)

    assert reloaded.stranded == 0


def test_nothing_wakes_us_while_no_client_comes(reloaded: World) -> None:
    supersede(reloaded)
    reloaded.steering.leave(1)
    reloaded.pass_time(5)

    assert reloaded.loop.due(("quiesce", 1)) is None
    assert reloaded.loop.due("steering-rescue") is None
    assert reloaded.loop.due("steer") is None


def test_in_vain_it_is_reported_less_and_less_often(reloaded: World) -> None:
    """As where the generation that is started for them fails, again and again."""
    reloaded.connect()
    supersede(reloaded)
    reloaded.steering.leave(1)

    told = []
    for _ in range(60):
        reloaded.pass_time(1)
        told.append(reloaded.stranded)

    assert told[1:3] == [1, 2]
    assert told[4] == 3
    assert told[-1] == 6  # after 1, 2, 4, 8, 16 and 32 s


def test_where_no_process_is_left_that_could_accept_a_client_it_is_reported_at_once(
    reloaded: World,
) -> None:
    supersede(reloaded)
    reloaded.steering.leave(1)
    reuseport.steer(reloaded.listener.socket, 0)
    reloaded.connect()
    reloaded.pass_time(FIRST_RESCUE_S / 2)
    assert reloaded.stranded == 0

    reloaded.steering.forget(1)
    reloaded.pass_time(0.02)

    assert reloaded.stranded == 1


def test_each_release_that_fails_has_its_clients_reported_at_once(reloaded: World) -> None:
    """But not again and again, where the generation that is started for them fails."""
    for release in (2, 4, 6):
        reuseport.steer(reloaded.listener.socket, 1)  # as it does
        reloaded.connect()
        before = reloaded.stranded
        reloaded.steering.leave(release)
        reloaded.steering.forget(release)
        reloaded.pass_time(0.02)
        assert reloaded.stranded == before + 1
        reloaded.steering.enter(release + 1, 1)  # the one for them
        reloaded.steering.leave(release + 1)
        reloaded.steering.forget(release + 1)
        reloaded.pass_time(FIRST_RESCUE_S / 2)
        assert reloaded.stranded == before + 1
        reloaded.steering.enter(release + 2, 1, fresh=True)


def test_the_generation_that_comes_for_them_ends_that(reloaded: World) -> None:
    reloaded.connect()
    supersede(reloaded)
    reloaded.steering.leave(1)
    reloaded.pass_time(FIRST_RESCUE_S + 0.3)
    assert reloaded.steering.turns.free == 0

    reloaded.steering.enter(3, 0)
    reloaded.pass_time(30)

    assert reloaded.stranded == 1


def test_until_the_kernel_steers_to_the_new_one_the_old_one_serves(
    reloaded: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    with monkeypatch.context() as broken:
        broken.setattr(reuseport, "steer", fails)
        supersede(reloaded)
        reloaded.pass_time(2 * GENERATION_LAST_S)
        assert reloaded.quiesced == []
        assert reloaded.log.events == ["not-steered"]
        [warning] = reloaded.steering.warnings
        assert warning.endswith(": new clients may reach the wrong generation: no memory")
        reloaded.connect()
        assert reloaded.waiting() == [0]
        reloaded.accept(0)

    reloaded.pass_time(GENERATION_QUIET_S + 1)
    assert reloaded.quiesced == [1]
    reloaded.connect()
    assert reloaded.waiting() == [1]


def test_where_the_kernel_does_not_report_handshakes_only_time_counts(
    reloaded: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, in_handshake: bool) -> dict[bytes, bool]:
        raise OSError(errno.ENOENT, "no sock_diag")

    monkeypatch.setattr(quiescing, "unread", fails)
    supersede(reloaded)
    reloaded.pass_time(GENERATION_QUIET_S + 0.3)

    assert reloaded.quiesced == [1]


def test_without_a_second_socket_one_quiesces_at_once(world: World) -> None:
    plain = socket.create_server(("127.0.0.1", 0))
    kept, world.shared.all = (
        world.listeners,
        [listener_of(plain.detach(), 1, ListenerSettings("tcp:127.0.0.1:81"), shared=True)],
    )
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.enter(2, world.steering.turns.free)
    supersede(world)

    assert world.quiesced == [1]
    world.listeners[0].close()
    world.shared.all = kept


def test_clients_of_a_new_listener_go_to_the_next_generation(world: World) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)

    world.steering.expect(world.listener, dry_run=False)
    world.connect()

    assert world.waiting() == [1] == [world.steering.turns.free]


def test_to_steer_one_of_many_new_listeners_steers_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steering all for each took minutes where a reload added hundreds."""
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    added = world.add_pair(1)
    monkeypatch.setattr(world.listener, "steer", lambda *_, **__: pytest.fail("another one"))

    world.steering.expect(added, dry_run=False)

    world.clients.append(socket.create_connection(added.socket.getsockname()))
    assert added.has_waiting(1)
    monkeypatch.undo()


def test_they_do_so_too_once_the_next_generation_is_asked(world: World) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.expect(world.listener, dry_run=False)
    world.steering.enter(2, world.steering.turns.free)

    way = world.steering.probes.reach_by_mark(2, "")
    assert way is not None
    way.close()
    world.connect()

    assert world.waiting() == [1] == [1 - world.steering.turns.current]


def test_and_where_no_worker_accepts_if_that_is_only_tried(world: World) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)

    world.steering.expect(world.listener, dry_run=True)
    world.connect()

    assert world.waiting() == [0] == [world.steering.turns.current]


def test_another_program_steers_the_clients_of_a_new_listener_as_the_one_before(
    world: World,
) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.expect(world.listener, dry_run=False)
    world.steering.enter(2, 1)

    world.resume((1, 0), (2, 1))
    world.connect()
    assert world.waiting() == [1]

    world.steering.turn_to(1, knows=lambda index: True)
    world.steering.enter(3, 0)
    world.steering.turn_to(0, knows=lambda index: True)  # and a later one gets the others
    world.connect()
    assert world.waiting() == [0, 1]


def test_a_client_that_comes_before_a_new_listener_is_steered_waits_for_the_next_generation(
    world: World,
) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.connect()  # between listen(), in another process, and now

    world.steering.expect(world.listener, dry_run=False)
    world.connect()

    assert world.waiting() == [1]
    for _ in range(2):
        world.accept(1)


def test_the_generation_before_waits_for_no_client_of_a_new_listener(world: World) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.expect(world.listener, dry_run=False)
    world.steering.enter(2, 1)
    reuseport.steer(world.listener.socket_for(0), 1)  # it was the last to listen
    world.connect()  # astray
    assert world.waiting() == [0]
    supersede(world)
    world.pass_time(GENERATION_QUIET_S + 0.2)

    assert world.quiesced == [1]
    assert world.stranded, "the client gets a generation that has the listener"


@pytest.mark.parametrize("dry_run", [True, False])
def test_clients_that_wait_for_one_that_is_to_know_their_listener_are_none_that_it_neglects(
    world: World, dry_run: bool
) -> None:
    """Neither is another generation started for them."""
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    for each in (world.listener, world.add()):
        world.steering.expect(each, dry_run=dry_run)
    world.connect()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("\0" + world.listeners[1].settings.address.removeprefix("unix:@"))
        world.pass_time(2 * NEVER_TAKEN_S)
        assert (world.untaken, world.stranded, world.log.events) == ([], 0, [])

        world.steering.enter(2, 1)
        world.pass_time(2 * NEVER_TAKEN_S)
        assert (world.untaken, world.stranded, world.log.events) == ([], 0, [])

        world.steering.turn_to(1, knows=lambda index: True)  # it does neglect them
        world.pass_time(2 * NEVER_TAKEN_S)
        assert [said[1] for said in world.untaken] == [1 if dry_run else 2]


# -- a socket that was shut down ---------------------------------------------------------


@pytest.mark.parametrize("socket_number", [0, 1])
def test_one_that_is_shut_down_listens_again_and_clients_come_where_they_should(
    reloaded: World, socket_number: int
) -> None:
    reloaded.steering.turn_to(1)
    reloaded.listener.socket_for(socket_number).shutdown(socket.SHUT_RDWR)

    reloaded.turn()

    assert reloaded.log.events == ["listens-again"]
    reloaded.connect()
    assert reloaded.waiting() == [1]
    assert (reloaded.bound, reloaded.lost, reloaded.stranded) == ([], [], 0)


@pytest.mark.parametrize("socket_number", [0, 1])
def test_when_listening_again_is_reported_clients_are_steered_right_already(
    reloaded: World, socket_number: int
) -> None:
    reloaded.steering.turn_to(socket_number)
    reloaded.listener.socket_for(socket_number).shutdown(socket.SHUT_RDWR)
    reloaded.log.then = reloaded.connect

    reloaded.turn()

    assert reloaded.waiting() == [socket_number]


def test_again_and_again_it_is_mended_ten_times_a_second_at_most(reloaded: World) -> None:
    for _ in range(100):
        if reloaded.listener.is_alive(0):
            reloaded.listener.socket.shutdown(socket.SHUT_RDWR)
        reloaded.pass_time(0.01)

    assert 5 <= reloaded.log.events.count("listens-again") <= 11


def test_of_clients_of_an_accepting_generation_only_the_first_wakes_us(reloaded: World) -> None:
    seen: list[int] = []
    watch = reloaded.loop.watch

    def counted(fd: int, callback: Callable[[], None], events: int = READ) -> None:
        def woken() -> None:
            seen.append(fd)
            callback()

        watch(fd, woken, events)

    reloaded.loop.watch = counted  # type: ignore[method-assign]
    reloaded.steering.turn_to(0)
    for _ in range(10):
        reloaded.connect()
        reloaded.turn()

    assert len(seen) == 1


def test_what_an_earlier_generation_has_attached_is_gone_before_the_next_one_begins(
    reloaded: World,
) -> None:
    supersede(reloaded)
    reloaded.steering.leave(1)
    reuseport.refuse_new(reloaded.listener.socket)

    reloaded.steering.enter(3, reloaded.steering.turns.free)
    reloaded.steering.turn_to(0)
    reloaded.connect()

    assert reloaded.waiting() == [0]


def test_one_whose_filter_is_locked_is_bound_anew_before_the_next_one_begins(
    reloaded: World,
) -> None:
    supersede(reloaded)
    reloaded.steering.leave(1)
    reuseport.refuse_new(reloaded.listener.socket)
    reloaded.listener.socket.setsockopt(socket.SOL_SOCKET, 44, 1)  # SO_LOCK_FILTER

    reloaded.steering.enter(3, reloaded.steering.turns.free)
    reloaded.steering.turn_to(0)
    reloaded.connect()

    assert reloaded.waiting() == [0]
    assert reloaded.bound == [reloaded.listener]
    assert reloaded.stranded == 0  # one that begins now has it


@needs.ROOT  # to change the device of a socket that has one takes CAP_NET_RAW
def test_where_clients_are_kept_out_of_one_for_all_they_are_let_in_by_the_next_generation(
    world: World,
) -> None:
    plain = socket.create_server(("127.0.0.1", 0))
    address = f"tcp:127.0.0.1:{plain.getsockname()[1]}"
    world.listeners.append(listener_of(plain.detach(), 1, ListenerSettings(address), shared=True))
    common = world.listeners[1]
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    reuseport.refuse_new(common.socket)  # by 1, which accepts there until 2 is ready
    common.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, ONE_S)

    world.steering.enter(2, world.steering.turns.free)
    world.clients.append(socket.create_connection(common.socket.getsockname(), timeout=5))

    assert common.has_waiting()
    assert common.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == ONE_S


@pytest.mark.parametrize("locked", [0, 1])
def test_one_listens_again_beside_one_whose_filter_is_locked(reloaded: World, locked: int) -> None:
    reloaded.listener.socket_for(locked).setsockopt(socket.SOL_SOCKET, 44, 1)  # SO_LOCK_FILTER
    reloaded.steering.turn_to(1 - locked)
    reloaded.listener.socket_for(1 - locked).shutdown(socket.SHUT_RDWR)

    reloaded.turn()
    reloaded.connect()

    assert reloaded.log.events == ["listens-again"]
    assert reloaded.waiting() == [1 - locked]


def test_one_is_bound_anew_beside_one_whose_filter_is_locked(reloaded: World) -> None:
    for socket_number in (0, 1):
        reloaded.listener.socket_for(socket_number).setsockopt(socket.SOL_SOCKET, 44, 1)
    reloaded.steering.turn_to(1)
    reloaded.steering.leave(1)  # of socket 0, which is bound anew

    reloaded.steering.enter(3, reloaded.steering.turns.free)
    reloaded.steering.turn_to(0)
    reloaded.connect()

    assert reloaded.bound == [reloaded.listener]
    assert reloaded.waiting() == [0]


@pytest.mark.parametrize("begins", ["adopted", "started"])
def test_no_generation_has_a_socket_whose_connections_are_shut_down(
    world: World, begins: str
) -> None:
    one, second = world.listener.sockets
    if begins == "started":  # beside another one, on the same socket
        second.close()
        del world.listener.sockets[1]
        world.steering.adopt(1, 0)
    for _ in range(2):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
    one.listen(5)  # by the process that has done that, or by a program that was killed then
    assert not world.listener.is_sound(0)

    if begins == "started":
        world.steering.enter(2, 1)
    else:
        world.steering.adopt(1, 0)

    assert world.listener.is_sound(0)


def test_a_release_that_loses_its_own_socket_as_it_starts_is_no_reason_to_replace_another(
    world: World,
) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.enter(2, 1)
    one = world.listener.socket_for(1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)  # so that it cannot listen again
    one.shutdown(socket.SHUT_RDWR)
    with suppress(OSError):
        one.listen()
    world.turn()

    assert world.log.events == ["socket-replaced"]
    assert (world.socket_lost, world.stranded) == ([2], 0)


def test_one_that_is_bound_anew_needs_a_generation_that_has_it(
    world: World, tmp_path: Path
) -> None:
    path = shared_path(tmp_path)
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(path))
    unix.listen(5)
    found = path.stat()
    settings = ListenerSettings(f"unix:{path}", found.st_dev, found.st_ino, 5)
    world.listeners.append(listener_of(unix.detach(), 1, settings, shared=True))
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.listeners[1].socket.shutdown(socket.SHUT_RD)
    world.turn()
    assert (world.stranded, world.steering.turns.unserved) == (1, frozenset({(1, 1)}))

    with socket.socket(socket.AF_UNIX) as client:  # and it could not be opened
        client.connect(str(path))
        world.pass_time(FIRST_RESCUE_S / 2)
        assert world.stranded == 2
        world.steering.enter(2, world.steering.turns.free)
        world.pass_time(60)
        assert world.stranded == 2
        world.steering.leave(2)  # it has failed
        world.pass_time(FIRST_RESCUE_S + 0.3)
        assert world.stranded == 3
        world.steering.enter(3, world.steering.turns.free)
        world.steering.leave(1)
        world.pass_time(60)

    assert (world.stranded, world.steering.turns.unserved) == (3, frozenset())


def test_an_address_that_cannot_be_bound_again_is_lost_and_reported_once(world: World) -> None:
    made = socket.socket(socket.AF_UNIX)
    made.bind("")
    made.listen()
    settings = ListenerSettings(f"unix:@{made.getsockname()[1:].decode()}", backlog=5)
    copy = socket.socket(fileno=os.dup(made.fileno()))
    world.listeners.append(listener_of(made.detach(), 1, settings, shared=True))
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    copy.shutdown(socket.SHUT_RDWR)
    world.pass_time(3)

    assert world.lost == [world.listeners[1]]
    assert world.stranded == 0
    copy.close()


def test_at_a_stop_what_is_shut_down_stays_so(reloaded: World) -> None:
    reloaded.steering.end()
    reloaded.listener.socket.shutdown(socket.SHUT_RDWR)
    reloaded.pass_time(3)

    assert reloaded.log.events == []
    assert not reloaded.listener.is_alive(0)


def test_after_the_last_generation_clients_wait_at_the_other_socket_for_the_next_start(
    world: World,
) -> None:
    world.steering.enter(1, world.steering.turns.free)
    world.steering.turn_to(0)
    world.connect()
    over: list[bool] = []

    world.steering.quiesce_last(1, lambda: over.append(True), float("inf"))
    world.connect()
    assert world.waiting() == [0, 1]
    world.pass_time(GENERATION_LAST_S + 1.0)
    assert not over, "who came before is still to be accepted"
    world.accept(0)
    world.pass_time(2.0)

    assert over == [True]
    world.steering.leave(1)
    world.pass_time(5.0)
    assert world.stranded == 0
    world.steering.end()
    [left] = [each.leave(world.steering.turns.current) for each in world.listeners]
    assert left == "sp.twin.0"


def test_the_last_generation_yields_when_the_one_before_it_has_left_the_other_socket(
    reloaded: World,
) -> None:
    supersede(reloaded)
    over: list[bool] = []
    reloaded.unread = {b"client": False}
    reloaded.steering.quiesce_last(2, lambda: over.append(True), float("inf"))
    reloaded.connect()
    assert reloaded.waiting() == [1]
    reloaded.accept(1)

    reloaded.steering.leave(1)
    reloaded.unread = {}
    reloaded.pass_time(0.5)
    reloaded.connect()
    assert reloaded.waiting() == [0]
    reloaded.pass_time(2.0)
    assert over == [True]


@pytest.mark.parametrize("socket_number", [0, 1])
def test_of_two_sockets_the_one_that_clients_come_to_is_left_and_the_other_is_dead(
    world: World, socket_number: int
) -> None:
    copies = [each.dup() for each in world.listener.sockets]
    world.listener.steer(socket_number)
    world.connect()

    assert world.listener.leave(socket_number) == ("sp.listener.0", "sp.twin.0")[socket_number]

    listens = [each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for each in copies]
    assert listens == [socket_number == 0, socket_number == 1]
    copies[socket_number].accept()[0].close()
    world.clients.append(socket.create_connection(copies[socket_number].getsockname()))
    for each in copies:
        each.close()
    world.listeners.clear()


# -- workers that read from whom they have accepted before they leave -----------------


def supersede_library(world: World) -> None:
    world.steering.turn_to(1)
    world.quiesce(1, reads_on=True)


def test_one_that_reads_on_is_told_to_finish_as_soon_as_no_client_waits(reloaded: World) -> None:
    reloaded.unread = {b"accepted, and not heard": False, b"silent": True}
    supersede_library(reloaded)
    assert reloaded.quiesced == []

    reloaded.pass_time(0.05)

    assert reloaded.quiesced == [1]


def test_it_first_accepts_the_clients_that_have_come(reloaded: World) -> None:
    reloaded.connect()
    supersede_library(reloaded)
    reloaded.pass_time(SILENT_S)
    assert reloaded.quiesced == []

    reloaded.accept(0)
    reloaded.pass_time(0.05)

    assert reloaded.quiesced == [1]


def test_it_waits_for_clients_that_were_connecting_at_the_switch_and_no_later_ones(
    reloaded: World,
) -> None:
    reloaded.shaking = {b"slow"}
    supersede_library(reloaded)
    reloaded.shaking.add(b"later, at the other socket")
    reloaded.pass_time(SILENT_S)
    assert reloaded.quiesced == []

    reloaded.shaking.remove(b"slow")
    reloaded.connect()
    reloaded.pass_time(0.05)

    assert reloaded.quiesced == [1]


def test_it_waits_for_half_a_handshake_no_longer_than_others(reloaded: World) -> None:
    reloaded.shaking = {b"never"}
    supersede_library(reloaded)

    reloaded.pass_time(GENERATION_LAST_S + 0.3)

    assert reloaded.quiesced == [1]


# -- asked before its turn ---------------------------------------------------------------


def left(world: World) -> SocketSteering:
    """Generation 3 starts at the socket of 1, which was told to finish a moment ago."""
    supersede(world)
    world.steering.leave(1)
    world.steering.enter(3, world.steering.turns.free)
    return world.steering


def test_none_is_asked_while_one_before_it_may_answer_in_its_place(reloaded: World) -> None:
    steering = left(reloaded)
    with pytest.raises(BlockingIOError, match="may still accept"):
        steering.probes.reach_by_mark(3, "")

    reloaded.now += LATE_ACCEPT_S
    way = steering.probes.reach_by_mark(3, "")

    assert way is not None
    way.close()


def test_nor_by_another_program(reloaded: World) -> None:
    left(reloaded)
    reloaded.resume((2, 1), (3, 0))
    with pytest.raises(BlockingIOError, match="may still accept"):
        reloaded.steering.probes.reach_by_mark(3, "")

    reloaded.now += LATE_ACCEPT_S
    way = reloaded.steering.probes.reach_by_mark(3, "")

    assert way is not None
    way.close()


def test_one_is_asked_once_that_has_gone(reloaded: World) -> None:
    steering = left(reloaded)
    steering.forget(1)

    way = steering.probes.reach_by_mark(3, "")

    assert way is not None
    way.close()


class Answers:
    """Generation 2 while it is probed: its verdicts, and the number of HTTP probes."""

    def __init__(self, world: World, ready: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heard: list[Callable[[str], None]] = []
        self.ready: list[int] = []
        self.early = False  # whether an answer does not count yet
        monkeypatch.setattr(probe, "HttpExchange", self._begin)
        runtime = Runtime(world.loop, cast("Any", world.log), world.post, world.persist)
        self.ready_probe = ReadyProbe(
            runtime,
            reach=lambda generation, asked: world.steering.probes.reach_by_mark(
                generation.record.number, ""
            ),
            answered=self._answered,
            inconclusive=self.ready.append,
        )
        program = SimpleNamespace(
            ready=ready.partition(":")[0], ready_after_s=None, ready_question=ready
        )
        record = SimpleNamespace(number=2)
        self.ready_probe.begin(cast("Any", SimpleNamespace(program=program, record=record)))

    def _answered(self, number: int, kind: str) -> bool:
        self.ready.append(number)
        return not self.early

    def _begin(self, *arguments: Any) -> object:
        self.heard.append(arguments[-1])
        return SimpleNamespace(why_by_header="", close=lambda: None)


def test_what_another_one_has_accepted_while_the_asked_one_was_shut_down_is_no_answer(
    reloaded: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one that was passed in: else it has no answer at all meanwhile."""
    reloaded.listener.settings = replace(reloaded.listener.settings, foreign=True)
    reloaded.listener.socket_for(1).shutdown(socket.SHUT_RDWR)
    its = Answers(reloaded, "accept", monkeypatch)
    assert reloaded.waiting() == [0]  # so does the kernel
    reloaded.accept(0)
    reloaded.pass_time(0.3)
    assert its.ready == []

    assert reloaded.waiting() == [1]
    reloaded.accept(1)
    reloaded.pass_time(0.3)

    assert its.ready == [2]


@pytest.mark.parametrize("mended", [False, True])
def test_nor_what_was_answered_by_http_meanwhile(
    reloaded: World, mended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    its = Answers(reloaded, "http:/", monkeypatch)
    reloaded.listener.socket_for(1).shutdown(socket.SHUT_RDWR)
    if mended:
        reloaded.pass_time(0.3)
    its.heard[0]("")
    assert its.ready == []
    assert its.ready_probe.why_not_ready == SHUT_DOWN

    reloaded.pass_time(0.3)
    assert len(its.heard) == 2
    its.heard[1]("")

    assert its.ready == [2]


def test_a_generation_whose_answer_is_too_early_is_probed_again(
    reloaded: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    its = Answers(reloaded, "http:/", monkeypatch)
    its.early = True
    its.heard[0]("")
    assert its.ready == [2]

    its.early = False
    reloaded.pass_time(0.3)
    its.heard[1]("")
    reloaded.pass_time(0.3)

    assert its.ready == [2, 2]
    assert len(its.heard) == 2


def test_no_client_gets_to_one_that_is_asked_while_the_other_is_shut_down(reloaded: World) -> None:
    way = reloaded.steering.probes.reach_by_mark(2, "")
    assert way is not None
    reloaded.listener.socket.shutdown(socket.SHUT_RDWR)
    with Unanswered(reloaded.listener.socket.getsockname()) as late:
        assert reloaded.waiting() == []
        reloaded.pass_time(0.3)
        late.connects()
        assert reloaded.waiting() == [0]
    way.close()
    assert there_are(reloaded) == 2


def test_of_a_question_that_cannot_be_put_the_kernel_keeps_nothing(
    reloaded: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again and again; and of IPv6 there are few marks."""
    with monkeypatch.context() as patched:
        patched.setattr(reuseport, "queue", raising(errno.ENOBUFS, "no buffer"))
        with pytest.raises(OSError, match="no buffer"):
            reloaded.steering.probes.reach_by_mark(2, "")
    marked: list[Mapping[bpf.Mark, int]] = []
    monkeypatch.setattr(reuseport, "steer", lambda one, member, marks, *draw: marked.append(marks))

    reloaded.steering.turn_to(0, served_before=True)

    assert marked
    assert not any(marked)


def raising(number: int, text: str) -> Callable[..., None]:
    def fails(*_: object) -> None:
        raise OSError(number, text)

    return fails


# -- who waits for whom -----------------------------------------------------------------


def queue_of(world: World, knows: Mapping[int, Container[int]]) -> Callable[[int], int | None]:
    """Return what status says of generations.  knows: their numbers, and indices of listeners."""
    return lambda number: world.steering.probes.waiting(number, knows[number].__contains__)


def test_clients_at_a_generations_own_socket_are_counted_for_it(reloaded: World) -> None:
    its = queue_of(reloaded, {1: range(1), 2: range(1)})
    reloaded.connect()
    reloaded.connect()
    assert [its(n) for n in (1, 2)] == [2, 0]

    supersede(reloaded)
    reloaded.connect()
    assert [its(n) for n in (1, 2)] == [2, 1]
    reloaded.steering.leave(1)
    assert [its(n) for n in (1, 2)] == [0, 1]


def test_at_a_socket_of_two_generations_it_is_unknown_for_which_a_client_waits(
    reloaded: World,
) -> None:
    its = queue_of(reloaded, {1: range(1), 2: range(1)})
    reloaded.listener.drop_socket(1)
    reloaded.connect()
    assert [its(n) for n in (1, 2)] == [None, None]

    reloaded.steering.leave(1)
    assert its(2) == 1


@pytest.mark.parametrize("dry_run", [True, False])
def test_clients_at_a_listener_are_counted_for_no_generation_that_does_not_know_it(
    world: World, dry_run: bool
) -> None:
    """One that is tried, or that the next generation is to have, whatever there is of that."""
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    its = queue_of(world, {1: range(0), 2: range(1)})
    world.steering.expect(world.listener, dry_run=dry_run)
    world.connect()
    assert [its(1), its(2)] == [0, 0]

    world.steering.enter(2, 1)
    assert [its(1), its(2)] == [0, 0 if dry_run else 1]


# -- a hold -------------------------------------------------------------------------


def on_hold(world: World, on: bool = True) -> None:
    world.steering.turn_hold(on)


def there_are(world: World) -> int:
    """How many sockets listen at its address."""
    return len(sock_diag.listening(socket.AF_INET, world.listener.port))


def test_under_a_hold_new_clients_get_no_answer_and_come_in_after_it(reloaded: World) -> None:
    reloaded.connect()
    on_hold(reloaded)
    with Unanswered(reloaded.listener.socket.getsockname()) as late:
        late.tries_again()
        assert reloaded.waiting() == [0]
        reloaded.accept(0)
        assert reloaded.waiting() == []

        on_hold(reloaded, False)
        late.connects()

    assert there_are(reloaded) == 2
    assert reloaded.waiting() == [0]


def test_a_stop_after_a_hold_refuses_new_clients(reloaded: World) -> None:
    on_hold(reloaded)
    on_hold(reloaded, False)

    assert reloaded.listener.refuse_new()

    with socket.socket() as late:
        late.settimeout(DEADLINE_S)
        assert late.connect_ex(reloaded.listener.socket.getsockname()) == errno.ECONNREFUSED


def test_a_reload_meanwhile_lets_no_client_in_either(reloaded: World) -> None:
    on_hold(reloaded)
    supersede(reloaded)
    with Unanswered(reloaded.listener.socket.getsockname()) as late:
        late.tries_again()
        reloaded.pass_time(GENERATION_QUIET_S + 0.3)
        assert reloaded.quiesced == [1]
        reloaded.steering.leave(1)
        reloaded.steering.enter(3, reloaded.steering.turns.free)
        assert reloaded.waiting() == []

        on_hold(reloaded, False)
        late.connects()

    assert reloaded.waiting() == [1]


def test_a_handshake_under_way_at_a_switch_before_it_ends_well(
    reloaded: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not waited for: no worker's socket is any different."""
    supersede(reloaded)
    reloaded.shaking = {b"begun before the switch"}
    on_hold(reloaded)
    with Unanswered(reloaded.listener.socket.getsockname()) as late:
        late.tries_again()
        on_hold(reloaded, False)
        late.connects()
    assert reloaded.waiting() == [1]


@pytest.mark.parametrize("generation", [1, 2])
def test_a_generation_can_be_asked_amid_a_hold(reloaded: World, generation: int) -> None:
    """Also the one that the clients come to, when it has to be started anew."""
    on_hold(reloaded)
    way = reloaded.steering.probes.reach_by_mark(generation, "")
    assert way is not None
    with socket.socket() as ours:
        assert way.mark is not None
        way.mark.put(ours)
        ours.settimeout(DEADLINE_S)
        ours.connect(way.address)

        assert reloaded.waiting() == [generation - 1]
        assert way.waits(ours)
        reloaded.accept(generation - 1)
        assert not way.waits(ours)
    way.close()
    on_hold(reloaded, False)


@pytest.mark.parametrize("goes_on", ["asks", "looks", "does not know it"])
def test_what_a_killed_program_has_asked_is_no_client_to_the_next_one(
    reloaded: World, goes_on: str
) -> None:
    """Else a generation that failed its dry run is started again for it."""
    reloaded.put_question(2)
    known = [(1, 0)] if goes_on == "does not know it" else [(1, 0), (2, 1)]
    reloaded.resume(*known, record=reloaded.written)  # of before its question
    if goes_on == "asks":
        reloaded.put_question(2)

    reloaded.steering.forget(2)
    reloaded.pass_time(2 * FIRST_RESCUE_S)

    assert reloaded.waiting() == []
    assert reloaded.stranded == 0


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("client", [False, True])
def test_what_one_that_had_clients_was_asked_is_no_client_either(
    reloaded: World, client: bool, resumed: bool
) -> None:
    """As by --settle-check or --health, where its workers hang."""
    reloaded.steering.turn_to(1)
    reloaded.put_question(2)
    if client:
        reloaded.connect()
    if resumed:
        reloaded.resume((1, 0), (2, 1), record=reloaded.written)
    reloaded.steering.turn_to(0)
    reloaded.steering.forget(2)
    reloaded.pass_time(FIRST_RESCUE_S / 2)

    assert reloaded.waiting() == [1] * client
    assert reloaded.stranded == client


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ECONNABORTED, errno.EPROTO])
def test_a_question_that_cannot_be_closed_for_the_moment_is_none_either(
    reloaded: World, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    discard = reuseport.discard_waiting

    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    reloaded.put_question(2)
    monkeypatch.setattr(reuseport, "discard_waiting", fails)
    reloaded.steering.forget(2)
    reloaded.pass_time(2 * FIRST_RESCUE_S)
    assert reloaded.waiting() == [1]
    assert reloaded.loop.due("steering-rescue"), "until then nothing wakes us for it"
    monkeypatch.setattr(reuseport, "discard_waiting", discard)
    reloaded.pass_time(2 * FIRST_RESCUE_S)

    assert reloaded.waiting() == []
    assert reloaded.stranded == 0


@pytest.mark.parametrize("resumed", [False, True])
def test_a_client_that_has_come_where_one_was_asked_is_never_discarded(
    reloaded: World, resumed: bool
) -> None:
    reloaded.put_question(2)
    reloaded.steering.turn_to(1)  # it serves for a moment
    reloaded.connect()
    reloaded.steering.turn_to(0)
    if resumed:
        reloaded.resume((1, 0), (2, 1))
    reloaded.steering.forget(2)

    assert reloaded.waiting() == [1]


@pytest.mark.parametrize("resumed", [False, True])
def test_nor_one_that_came_while_the_other_socket_was_shut_down(
    reloaded: World, resumed: bool
) -> None:
    """A generation is started for it, as for any that waits in vain."""
    reloaded.listener.settings = replace(reloaded.listener.settings, foreign=True)  # no third one
    reloaded.put_question(2)
    reloaded.listener.socket.shutdown(socket.SHUT_RDWR)
    reloaded.connect()
    reloaded.pass_time(0.2)
    assert reloaded.waiting() == [1]
    if resumed:
        reloaded.resume((1, 0), (2, 1))
    reloaded.steering.forget(2)
    reloaded.pass_time(FIRST_RESCUE_S / 2)

    assert reloaded.waiting() == [1]
    assert reloaded.stranded == 1


@pytest.mark.parametrize("resumed", [False, True])
def test_nor_one_of_a_listener_that_only_the_asked_one_has(world: World, resumed: bool) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.expect(world.listener, dry_run=False)
    world.steering.enter(2, world.steering.turns.free)
    world.put_question(2)
    world.connect()
    if resumed:
        world.resume((1, 0), (2, 1))
    world.steering.forget(2)

    assert world.waiting() == [1]


def test_nor_one_that_its_owner_is_to_accept(reloaded: World) -> None:
    reloaded.listener.settings = replace(reloaded.listener.settings, foreign=True)
    reloaded.steering.turn_to(1)
    reloaded.steering.leave(1)
    reloaded.steering.forget(1)
    reloaded.steering.enter(3, 0)
    reloaded.put_question(3)
    reloaded.steering.give_back()
    reloaded.connect()
    reloaded.steering.forget(3)

    assert reloaded.waiting() == [0]


@pytest.mark.parametrize("resumed", [False, True])
def test_a_generation_that_settled_and_hung_leaves_no_client_where_only_questions_wait(
    reloaded: World, resumed: bool
) -> None:
    """It is told to finish as soon as others are, and none is started in its place."""
    reloaded.steering.turn_to(1)
    for _ in range(2):
        reloaded.put_question(2)
    if resumed:
        reloaded.resume((2, 1), (1, 0), record=reloaded.written)
    reloaded.steering.turn_to(0, served_before=True)
    reloaded.quiesce(2)
    reloaded.pass_time(GENERATION_QUIET_S + 0.2)
    assert reloaded.quiesced == [2]
    assert "not-accepted" not in reloaded.log.events

    reloaded.steering.forget(2)
    reloaded.pass_time(2 * FIRST_RESCUE_S)

    assert reloaded.waiting() == []
    assert reloaded.stranded == 0


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(1, 0), (0, 1), (0, 0), (1,)])
def test_a_hold_outlives_a_socket_that_is_shut_down(
    reloaded: World, numbers: tuple[int, ...]
) -> None:
    on_hold(reloaded)
    for number in numbers:
        reloaded.listener.socket_for(number).shutdown(socket.SHUT_RDWR)
        reloaded.pass_time(0.3)

    with Unanswered(reloaded.listener.socket.getsockname()) as late:
        late.tries_again()
        assert reloaded.waiting() == []
        on_hold(reloaded, False)
        late.connects()
    assert reloaded.waiting() == [0]
    reloaded.steering.turn_to(1)
    reloaded.connect()
    assert reloaded.waiting() == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(0,), (1,), (0, 1), (1, 0), (1, 0, 1)])
@pytest.mark.parametrize("meant", [0, 1])
def test_one_that_its_server_has_had_listen_again_is_found(
    reloaded: World, numbers: tuple[int, ...], meant: int
) -> None:
    """Before we could see that it was shut down: so its position in the group is not known."""
    on_hold(reloaded)
    for number in numbers:
        one = reloaded.listener.socket_for(number)
        one.shutdown(socket.SHUT_RDWR)
        one.listen()
    reloaded.steering.turn_to(meant)

    with Unanswered(reloaded.listener.socket.getsockname()) as late:
        late.tries_again()
        on_hold(reloaded, False)
        late.connects()
    assert reloaded.waiting() == [meant]


def test_without_sock_diag_a_hold_begins_and_ends(
    reloaded: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> dict[int, int]:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("socketprotector.system.sock_diag.listening", fails)
    reloaded.listener.socket_for(0).shutdown(socket.SHUT_RDWR)
    reloaded.pass_time(0.3)  # so it has become the last
    on_hold(reloaded)
    with Unanswered(reloaded.listener.socket.getsockname()) as late:
        late.tries_again()
        on_hold(reloaded, False)
        late.connects()
    assert reloaded.waiting() == [0]


@pytest.mark.parametrize("copies", [True, False])
def test_another_program_ends_a_hold_of_which_it_knows_no_more(
    reloaded: World, copies: bool
) -> None:
    """Also while the fd store has a copy of the socket still."""
    on_hold(reloaded)
    fds = {name: os.dup(fd) for name, fd in reloaded.listener.descriptors().items()}
    listener = listener_of(
        fds.pop("sp.listener.0"),
        0,
        reloaded.listener.settings,
        shared=True,
        sibling=fds.pop("sp.twin.0"),
        reserved=fds.pop("sp.reserved.0"),
    )
    assert fds == {}
    if copies:
        reloaded.listeners.append(listener)
    else:
        reloaded.listener.close()
        reloaded.listeners[:] = [listener]
    other = SocketSteering(SharedListeners(reloaded, [listener]))
    other.adopt_record(reloaded.steering.record(), held=False)
    reloaded.listener = listener

    other.turn_to(0, served_before=True)

    reloaded.connect()
    assert reloaded.waiting() == [0]
    assert there_are(reloaded) == 2


def test_the_third_socket_that_replaces_a_retired_one_is_stored(reloaded: World) -> None:
    way = reloaded.steering.probes.reach_by_mark(2, "")
    assert way is not None
    reloaded.pass_time(0.1)
    assert reloaded.stored == {"sp.listener.0", "sp.twin.0", "sp.reserved.0"}

    way.close()
    reloaded.pass_time(0.1)

    assert reloaded.stored == {"sp.listener.0", "sp.twin.0", "sp.reserved.0.1"}


def test_another_program_that_knows_no_hold_lets_clients_in(reloaded: World) -> None:
    """An older one: it closes what it does not know."""
    on_hold(reloaded)
    address = reloaded.listener.socket.getsockname()
    with Unanswered(address) as late:
        late.tries_again()
        reloaded.listener.close_reserved()
        for number in (1, 0):
            reuseport.steer(reloaded.listener.socket, number)
            reloaded.connect()
            assert reloaded.waiting() == [number]
            reloaded.accept(number)
        late.connects()


@pytest.mark.slow
@pytest.mark.parametrize("locked", [(0,), (1,), (0, 1)])
def test_servers_that_lock_their_filters_neither_prevent_a_hold_nor_keep_one(
    reloaded: World, locked: tuple[int, ...]
) -> None:
    on_hold(reloaded)
    for number in locked:
        reloaded.listener.socket_for(number).setsockopt(socket.SOL_SOCKET, 44, 1)  # SO_LOCK_FILTER
    with Unanswered(reloaded.listener.socket.getsockname()) as late:
        late.tries_again()
        reloaded.steering.turn_to(1)
        on_hold(reloaded, False)
        late.connects()
    assert reloaded.waiting() == [1]
    on_hold(reloaded)
    reloaded.steering.turn_to(0)
    on_hold(reloaded, False)
    reloaded.connect()
    assert reloaded.waiting() == [0, 1]
    assert (there_are(reloaded), reloaded.log.events) == (2, [])


def test_nor_do_they_prevent_a_switch(reloaded: World) -> None:
    for number in (0, 1):
        reloaded.listener.socket_for(number).setsockopt(socket.SOL_SOCKET, 44, 1)

    supersede(reloaded)

    reloaded.connect()
    assert reloaded.waiting() == [1]
    assert (there_are(reloaded), reloaded.log.events) == (2, [])


def test_one_listener_that_fails_keeps_none_of_the_others_on_hold(
    reloaded: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fails:
        index, lost, shared, has_sibling, can_be_held = 1, False, True, False, True
        path, path_fault, settings = "", "", ListenerSettings("tcp:127.0.0.1:1")
        is_reserved_for_clients, has_held_client, group_record = False, False, None

        def descriptors(self) -> dict[str, int]:
            return {}

        def steer(self, *_: object, **__: object) -> None:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

    for fails_first in (True, False):
        fails = cast("Any", Fails())
        its = [fails, reloaded.listener] if fails_first else [reloaded.listener, fails]
        monkeypatch.setattr(reloaded.shared, "all", its)
        on_hold(reloaded)
        with Unanswered(reloaded.listener.socket.getsockname()) as late:
            late.tries_again()
            on_hold(reloaded, False)
            late.connects()
        reloaded.accept(0)
        assert reloaded.log.events == ["not-steered"]
    monkeypatch.undo()


def test_where_no_silent_socket_can_be_had_clients_are_served_until_it_can(
    reloaded: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as short:
        short.setattr("socketprotector.system.reuseport.reserve", fails)
        found = reloaded.steering.hold.prepare()
        assert found == f"{reloaded.listener.settings.address}: Too many open files"
        on_hold(reloaded)
        reloaded.connect()
        assert reloaded.waiting() == [0]
        reloaded.pass_time(2.0)
        assert reloaded.log.events == ["not-held"]
        why = "on hold, but workers accept new clients: Too many open files"
        assert reloaded.steering.warnings == (why,)
        supersede(reloaded)  # which waits for no hold
        reloaded.accept(0)
        reloaded.pass_time(GENERATION_QUIET_S + 0.3)
        assert reloaded.quiesced == [1]
    reloaded.pass_time(1.0)

    with Unanswered(reloaded.listener.socket.getsockname()) as late:
        late.tries_again()


def test_one_socket_for_all_generations_is_held_too(world: World) -> None:
    """As with ?defer_accept, and where the second one could not be bound anew."""
    world.listener.drop_socket(1)
    assert world.steering.hold.prepare() is None
    for _ in range(2):
        on_hold(world)
        with Unanswered(world.listener.socket.getsockname()) as late:
            late.tries_again()
            assert world.waiting() == []
            on_hold(world, False)
            late.connects()
        world.accept(0)
    assert there_are(world) == 1


def test_questions_of_two_generations_do_not_meet(reloaded: World) -> None:
    ways = [reloaded.steering.probes.reach_by_mark(generation, "") for generation in (1, 2)]
    for meant, way in enumerate(ways):
        assert way is not None
        assert way.mark is not None
        with socket.socket() as ours:
            way.mark.put(ours)
            ours.connect(way.address)
            assert reloaded.waiting() == [meant]
            reloaded.accept(meant)
        way.close()
        reloaded.connect()
        reloaded.accept(0)


def test_what_is_not_ours_alone_cannot_be_held(world: World, tmp_path: Path) -> None:
    assert world.steering.hold.prepare() is None
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        settings = ListenerSettings(f"unix:{tmp_path / 's'}")
        world.listeners.append(listener_of(os.dup(unix.fileno()), 1, settings, shared=True))
    assert world.steering.hold.prepare() == (
        f"unix:{tmp_path / 's'} has one socket for all generations, "
        "from which workers accept directly"
    )
    world.listener.settings = replace(world.listener.settings, foreign=True)
    cannot = f"{world.listener.settings.address}: another program opened this socket, and keeps"
    assert (world.steering.hold.prepare() or "").startswith(cannot)
    world.listeners[0].lost = world.listeners[1].lost = True
    assert world.steering.hold.prepare() is None


def test_those_that_tried_meanwhile_may_come_for_as_long_again_and_a_second(
    reloaded: World,
) -> None:
    hold = reloaded.steering.hold
    assert hold.late_s == 0.0
    on_hold(reloaded)
    reloaded.now += 1.0
    on_hold(reloaded)  # asked for again, as each second of `socketprotectorctl hold`
    reloaded.now += 1.5
    on_hold(reloaded, False)
    assert hold.late_s == pytest.approx(3.5)
    reloaded.now += 3.0
    on_hold(reloaded, False)
    assert hold.late_s == pytest.approx(0.5)
    reloaded.now += 1.0
    assert hold.late_s == 0.0
    on_hold(reloaded)
    reloaded.now += 3600.0
    on_hold(reloaded, False)
    assert hold.late_s == pytest.approx(10.0)


def test_a_shorter_hold_takes_no_time_from_those_that_tried_during_one_before(
    reloaded: World,
) -> None:
    for seconds in (8.0, 0.5):
        on_hold(reloaded)
        reloaded.now += seconds
        on_hold(reloaded, False)
    assert reloaded.steering.hold.late_s == pytest.approx(9.0 - 0.5)


@pytest.mark.parametrize("held", [True, False])
def test_another_program_knows_for_how_long_they_have_tried(reloaded: World, held: bool) -> None:
    """held: the one before did not come to end it."""
    on_hold(reloaded)
    reloaded.now += 4.0
    if held:
        reloaded.resume((1, 0), held=True)
        reloaded.now += 2.0
        on_hold(reloaded, False)
        assert reloaded.steering.hold.late_s == pytest.approx(7.0)
        reloaded.now += 1.0
    reloaded.resume((1, 0))
    assert not reloaded.steering.hold.on
    assert reloaded.steering.hold.late_s == pytest.approx(6.0 if held else 5.0)


def test_for_a_question_that_waits_not_all_connections_of_the_system_are_gone_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probes, "unaccepted", None)  # which the kernel does then
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(address := listener.getsockname()) as client,
    ):
        assert probes._waits(listener, address, client)
        with listener.accept()[0]:
            assert not probes._waits(listener, address, client)


def test_one_is_reached_and_asked_at_a_listener_that_it_knows(world: World) -> None:
    added = world.add_pair(1)
    ports = [added.port, world.listener.port]
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.enter(2, 1)

    def asked(*knows: Callable[[int], bool]) -> list[int]:
        ways = (
            world.steering.reach_as_client("", *knows),
            world.steering.probes.reach_by_mark(2, "", *knows),
        )
        for way in ways:
            assert way is not None
            way.close()
        return [way.address[1] for way in ways if way]

    assert asked(lambda index: index == 1) == ports[:1] * 2
    assert asked() == ports[1:] * 2, "the positive control"


def test_many_listeners_are_one_request_and_slow_answers_cost_no_more_time(world: World) -> None:
    """Where each look takes longer, fewer of them make up the quiet time, which is in seconds."""
    for index in range(2, 12):
        world.add_pair(index)
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.enter(2, 1)
    world.asking_s = 0.05  # so half a second passes between two looks
    supersede(world)
    assert world.asked == 1, "for all of a family"

    world.pass_time(1.5 * (GENERATION_QUIET_S + 0.5))

    assert world.quiesced == [1]


def test_quiet_time_is_in_seconds_where_each_look_takes_its_time(reloaded: World) -> None:
    """And so is the time for a client that says nothing, whom each look asks for."""
    reloaded.unread = {b"silent": True}
    reloaded.asking_s = 0.05  # so half a second passes between two looks
    supersede(reloaded)

    reloaded.pass_time(SILENT_S - 0.6)
    assert reloaded.quiesced == []

    reloaded.pass_time(1.6)
    assert reloaded.quiesced == [1]


# -- what a failed release has left ------------------------------------------------


def limit(one: socket.socket) -> int:
    return reuseport.queue(one)[1]


@pytest.mark.parametrize("how", ["goes on", "another program"])
def test_a_generation_begins_on_a_socket_as_it_was_made(world: World, how: str) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.enter(2, 1)
    one = world.listener.socket_for(1)
    before = limit(one)
    one.listen(5)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
    world.listener.socket_for(0).listen(7)  # of the one that serves
    if how == "another program":
        world.resume((1, 0), (2, 1))
    world.steering.leave(2)
    world.steering.forget(2)

    world.steering.enter(3, 1)

    assert limit(one) == before > 7
    assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT) == 0
    assert limit(world.listener.socket_for(0)) == 7
    assert world.log.events == []


def steal_by_leaving_the_group(one: socket.socket) -> None:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)


def steal_by_steering(one: socket.socket) -> None:
    reuseport.steer(one, 1)


@pytest.mark.parametrize("steal", [steal_by_leaving_the_group, steal_by_steering])
@pytest.mark.parametrize("how", ["goes on", "another program"])
def test_a_release_that_takes_clients_while_it_starts_gets_them_for_half_a_second(
    world: World, steal: Callable[[socket.socket], None], how: str
) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.enter(2, 1)
    for _ in range(2):
        steal(world.listener.socket_for(1))
        world.connect()
        assert world.waiting() == [1]
        world.accept(1)
        if how == "another program":
            world.resume((1, 0), (2, 1))

        world.pass_time(0.6)

        world.connect()
        assert world.waiting() == [0]
        world.accept(0)
    world.steering.turn_to(1)
    assert world.loop.due("steer") is None, "nothing wakes us when no release starts"


def test_clients_come_to_the_serving_one_again_when_another_has_failed(world: World) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.enter(2, 1)
    one = world.listener.socket_for(1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)  # so that all come to it
    world.connect()
    assert world.waiting() == [1]
    world.accept(1)

    world.steering.leave(2)
    world.connect()
    assert world.waiting() == [0]
    world.accept(0)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)  # as it ends
    world.steering.forget(2)
    world.connect()

    assert world.waiting() == [0]


def test_the_limit_in_status_is_that_of_the_socket_that_clients_come_to(world: World) -> None:
    for number, backlog in enumerate((5, 7)):
        world.listener.socket_for(number).listen(backlog)

    limits = [world.listener.backlog(number) for number in (0, 1)]

    assert limits == [(0, 5), (0, 7)]
    world.steering.enter(1, 0)
    world.steering.turn_to(1)
    assert world.steering.turns.number_for(world.listener) == 1, "as status asks"


def test_a_failed_one_leaves_the_whole_backlog_while_no_generation_accepts(world: World) -> None:
    common = world.add().socket
    for one in (common, world.listener.socket_for(0)):
        made = limit(one)
        world.steering.enter(1, 0)
        one.listen(1)
        world.steering.leave(1)
        assert limit(one) == made > 1
        one.listen(1)  # as it ends
        world.steering.forget(1)
        assert limit(one) == made


def test_a_socket_that_was_shut_down_does_not_listen_again_before_its_place_is_known(
    world: World,
) -> None:
    one = world.listener.socket_for(0)
    world.steering.enter(1, 0)
    one.shutdown(socket.SHUT_RDWR)
    world.steering.leave(1)

    assert not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def test_a_socket_that_answers_signed_clients_alone_is_replaced(world: World) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.enter(2, 1)
    ignore_clients(world.listener.socket_for(1))
    world.steering.forget(2)

    world.steering.enter(3, 1)
    world.steering.turn_to(1)

    assert world.log.events == ["socket-replaced"]
    world.connect()
    assert world.waiting() == [1]


@pytest.mark.parametrize("spare", [True, False])
def test_a_common_one_that_answers_signed_clients_alone_is_replaced_if_that_is_sure(
    world: World, monkeypatch: pytest.MonkeyPatch, spare: bool
) -> None:
    def fails(*_: object) -> socket.socket:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    world.listener.drop_socket(1)
    if spare:
        world.listener.reserve()
    monkeypatch.setattr(socket_copy, "bind_beside", fails)
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.listener.socket.listen(7)  # as it serves
    world.steering.enter(2, 1)
    ignore_clients(world.listener.socket)

    world.steering.leave(2)
    world.steering.forget(2)

    assert world.log.events == (["socket-replaced"] if spare else ["not-restored"])
    assert world.stranded == (1 if spare else 0)
    if spare:
        assert world.steering.turns.unserved == {(1, 0)}
        assert limit(world.listener.socket) == 7
        with socket.create_connection(world.listener.socket.getsockname(), timeout=DEADLINE_S):
            assert world.waiting()
        assert "no spare is left" in world.steering.warnings[0]


def test_where_no_other_one_can_be_had_that_of_the_serving_generation_is_left_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> socket.socket:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    serving = world.listener.socket_for(0)
    serving.listen(7)
    world.steering.enter(2, 1)
    world.listener.socket_for(1).setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, 2000)
    world.steering.forget(2)
    monkeypatch.setattr(socket_copy, "bind_beside", fails)

    world.steering.enter(3, 1)

    assert world.log.events == ["one-socket-left"]
    assert world.listener.sockets == [serving]
    serving.listen(5)  # by 3, and so does what follows
    serving.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, ONE_S)
    world.steering.leave(3)
    assert serving.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == bytes(16)
    assert limit(serving) == 7


@needs.ROOT  # since 2026 kernels want CAP_NET_ADMIN for a filter
def test_a_filter_of_a_failed_one_is_taken_from_a_common_socket(world: World) -> None:
    world.listener.drop_socket(1)
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.enter(2, 1)
    bpf.attach(world.listener.socket, 26, ((6, 0, 0, 0),))  # SO_ATTACH_FILTER: drop

    world.steering.leave(2)

    assert world.log.events == []
    with socket.create_connection(world.listener.socket.getsockname(), timeout=DEADLINE_S):
        assert world.waiting()


def test_a_socket_that_cannot_be_as_it_was_made_is_replaced(world: World) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.enter(2, 1)
    one = world.listener.socket_for(1)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, 2000)
    world.steering.forget(2)

    world.steering.enter(3, 1)

    assert world.log.events == ["socket-replaced"]
    other = world.listener.socket_for(1)
    assert other is not one
    assert other.getsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP) == 0


@pytest.mark.parametrize("how", ["goes on", "another program"])
def test_a_failed_one_leaves_a_common_socket_as_the_serving_one_had_it(
    world: World, how: str
) -> None:
    common = world.add().socket
    world.steering.enter(1, 0)
    common.listen(70)
    world.steering.turn_to(0)
    world.steering.enter(2, 1)
    common.listen(5)
    if how == "another program":
        world.resume((1, 0), (2, 1))

    world.steering.leave(2)

    assert limit(common) == 70
    common.listen(6)  # as it ends
    world.steering.forget(2)
    assert limit(common) == 70


def test_a_generation_begins_on_a_common_socket_with_its_whole_backlog(world: World) -> None:
    common = world.add().socket
    world.steering.enter(1, 0)
    made = limit(common)
    common.listen(5)
    world.steering.turn_to(0)

    world.steering.enter(2, 1)
    assert limit(common) == made > 5
    world.steering.leave(2)
    assert limit(common) == 5, "as the serving one had it"
    world.steering.forget(2)

    world.steering.enter(3, 1)
    world.steering.turn_to(1)
    world.steering.leave(1)
    world.steering.forget(1)
    assert limit(common) == made


def test_what_a_generation_has_set_stays_while_it_serves(world: World) -> None:
    common = world.add().socket
    world.steering.enter(1, 0)
    world.steering.enter(2, 1)
    common.listen(5)  # the first one, of which the second is to follow
    world.steering.turn_to(1)
    common.listen(60)
    world.steering.leave(1)
    world.steering.forget(1)
    assert limit(common) == 60
    world.steering.enter(3, 0)
    common.listen(8)
    world.steering.leave(3)
    world.steering.enter(4, 0)  # while the workers of 3 still end
    common.listen(50)
    world.steering.forget(3)

    assert limit(common) == 50


def test_an_option_of_a_common_socket_that_cannot_be_restored_is_a_warning(world: World) -> None:
    common = world.add().socket
    world.steering.enter(1, 0)
    world.steering.enter(2, 1)
    common.setsockopt(socket.SOL_SOCKET, 44, 1)  # SO_LOCK_FILTER

    world.steering.leave(2)
    world.steering.forget(2)

    assert world.log.events == ["not-restored"]


def wants_most_ttl(one: socket.socket) -> None:
    one.setsockopt(socket.IPPROTO_IP, socket_copy.IP_MINTTL, 255)


@pytest.mark.parametrize("close", [ignore_clients, wants_most_ttl])
def test_what_is_answered_before_workers_keep_clients_out_counts_for_nothing(
    reloaded: World, close: Callable[[socket.socket], None]
) -> None:
    before = reloaded.steering.probes.reach_by_mark(2, "")
    assert before is not None
    assert (before.is_unchanged(), before.may_refuse_clients()) == (True, False)

    close(reloaded.listener.socket_for(1))

    assert not before.is_unchanged()
    before.close()
    later = reloaded.steering.probes.reach_by_mark(2, "")
    assert later is not None
    assert (later.is_unchanged(), later.may_refuse_clients()) == (True, True)
    later.close()
    reloaded.resume((1, 0), (2, 1))
    later = reloaded.steering.probes.reach_by_mark(2, "")
    assert later is not None
    assert later.may_refuse_clients()
    close(reloaded.listener.socket_for(0))  # so do those that serve: it is their way
    assert not later.may_refuse_clients()


def test_a_socket_listens_again_with_its_own_limit(world: World) -> None:
    world.steering.enter(1, 0)
    world.steering.enter(2, 1)
    before = limit(world.listener.socket_for(1))
    world.listener.socket_for(0).listen(5)
    world.listener.note()

    world.listener.socket_for(1).shutdown(socket.SHUT_RDWR)
    assert world.listener.listen_again(1)

    assert limit(world.listener.socket_for(1)) == before > 5


@pytest.fixture
def pair(world: World, tmp_path: Path) -> Listener:
    """A path that leads to one of two sockets."""
    path = str(tmp_path / "s")
    made = [
        socket_file.bind(path, 16, socket_file.Rights(-1, -1, 0o600), give_away) for _ in range(2)
    ]
    socket_file.lead_to(path, made[0], made)
    found = os.lstat(path)
    settings = ListenerSettings(f"unix:{path}", found.st_dev, found.st_ino, 16)
    first, second = (each.detach() for each in made)
    world.listeners.append(listener_of(first, 1, settings, shared=True, sibling=second))
    return world.listeners[-1]


def come(world: World, path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    world.clients.append(client)
    client.connect(path)
    return client


def test_no_socket_is_watched_that_is_closed(world: World, pair: Listener) -> None:
    """Else its number, which another one gets, is watched for that one."""
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    before = pair.socket_for(1)
    number = before.fileno()

    world.steering.enter(2, 1)

    assert before.fileno() < 0, "the next generation has another socket"
    assert number not in world.loop._callbacks | world.loop._coming


def test_a_client_at_the_socket_of_a_probed_generation_is_kept_while_the_path_cannot_change(
    world: World, pair: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path still leads to the socket of the generation before the serving one."""

    def fail(*_: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    pair.settings = replace(pair.settings, name="s")
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.enter(2, 1)
    monkeypatch.setattr(os, "rename", fail)
    world.steering.turn_to(1)
    world.steering.forget(1)
    world.pass_time(LATE_ACCEPT_S + 0.1)
    world.steering.enter(3, 0)
    assert world.steering.probes.reach_by_mark(3, "s") is not None
    come(world, pair.path)

    world.steering.forget(3)

    assert pair.has_waiting(0)


def test_a_client_of_a_probed_generation_is_kept_by_the_program_after_a_kill_at_the_switch(
    world: World, pair: Listener
) -> None:
    pair.settings = replace(pair.settings, name="s")
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.enter(2, 1)
    assert world.steering.probes.reach_by_mark(2, "s") is not None
    world.steering.turn_to(1)
    come(world, pair.path)

    world.resume((1, 0), record=world.written)

    assert pair.has_waiting(1)


def test_a_release_starts_for_other_listeners_where_files_of_a_path_were_removed_before_a_kill(
    world: World, pair: Listener
) -> None:
    """The next program does not know the files' rights, so it can make none.

    A release without any client fails.
    """
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    for each in {pair.path, pair.ensure_address(0)[0], pair.ensure_address(1)[0]}:
        os.unlink(each)
    pair.__dict__["file_rights"] = None
    world.resume((1, 0))
    world.steering.enter(2, 1, fresh=True)
    assert any("no client can connect" in each for each in world.steering.warnings)
    world.steering.forget(2)

    for other in world.listeners:
        other.lost = other is not pair
    with pytest.raises(OSError, match=r"no client can connect; restart SocketProtector") as failed:
        world.steering.enter(2, 1, fresh=True)

    assert failed.value.filename == pair.local_address[0]
    assert 2 not in world.steering.turns.accepting
    world.steering.enter(3, 1)  # no release: a worker's clients are served on


def test_a_probe_of_a_path_counts_only_if_it_has_reached_the_generation_s_own_socket(
    world: World, pair: Listener
) -> None:
    """By device and inode of its file: another program may have put a socket of its own there."""
    pair.settings = replace(pair.settings, name="s")
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.enter(2, 1)
    way = world.steering.probes.reach_by_mark(2, "s")
    assert way is not None
    file = Path(way.text)
    aside = file.with_name("aside")
    file.rename(aside)
    assert not way.is_unchanged()
    with socket.socket(socket.AF_UNIX) as other, way.connecting() as client:
        other.bind(way.text)
        other.listen()
        assert client.connect_ex(way.connect_address) == 0
        assert not way.waits(client), "it looks as if a worker had accepted it"
        assert not way.is_unchanged()
        with pytest.raises(OSError, match="another program has replaced"):
            world.steering.probes.reach_by_mark(2, "s")
    aside.rename(file)
    assert way.is_unchanged()


@pytest.mark.parametrize("held", [1, 2])
def test_clients_that_have_waited_at_each_socket_are_all_served(
    world: World, pair: Listener, held: int
) -> None:
    """Those of a hold too, at the next turn if the free socket had clients of its own."""
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.turn_hold(True)
    for _ in range(held):
        come(world, pair.path)
    come(world, pair.ensure_address(1)[0])  # as at a generation that has failed
    world.steering.turn_hold(False)
    assert pair.is_reserved_for_clients

    world.steering.turn_to(1)
    world.steering.leave(1)
    world.steering.forget(1)
    world.steering.enter(2, 1)
    pair.socket_for(1).accept()[0].close()
    world.steering.turn_to(1)

    assert not pair.is_reserved_for_clients
    assert pair.has_waiting(0)
    world.pass_time(2 * FIRST_RESCUE_S)
    assert world.stranded, "the next generation gets them"


def test_a_socket_for_a_hold_is_kept_before_clients_come_to_it(
    world: World, pair: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guard has it then, and the next program what waits there."""
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    led: list[tuple[bool, list[Listener]]] = []
    steer = type(pair).steer

    def steered(listener: Listener, *arguments: Any, held: bool = False) -> None:
        if listener is pair and held:
            led.append((listener.is_reserved_for_clients, list(world.bound)))
        steer(listener, *arguments, held=held)

    monkeypatch.setattr(type(pair), "steer", steered)
    world.steering.turn_hold(True)

    assert led == [(True, [pair])]


def test_a_client_of_a_path_that_waited_is_read_from_before_one_quiesces(
    world: World, pair: Listener
) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    client = come(world, pair.path)
    client.send(b"a request")
    world.steering.enter(2, 1)
    supersede(world)
    world.pass_time(GENERATION_QUIET_S)
    accepted, _ = pair.socket_for(0).accept()
    with accepted:
        world.pass_time(2 * GENERATION_QUIET_S)
        assert world.quiesced == []
        accepted.recv(100)
        world.pass_time(2 * GENERATION_QUIET_S)

    assert world.quiesced == [1]


def test_the_last_socket_of_a_path_is_bound_anew_whatever_the_path_led_to_before(
    world: World, pair: Listener
) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    pair.bind_anew(0)
    pair.drop_socket(1)
    pair.socket.shutdown(socket.SHUT_RDWR)

    world.steering._repairs.repair(pair, 0)

    assert world.lost == []
    come(world, pair.path)
    assert pair.has_waiting()


@pytest.mark.parametrize("failing", [(), ("link",), ("rename",)])
def test_a_path_whose_socket_was_broken_leads_to_the_other_as_soon_as_its_folder_lets_it(
    world: World,
    pair: Listener,
    monkeypatch: pytest.MonkeyPatch,
    failing: tuple[str, ...],
) -> None:
    """No other socket can be made for a while: the file that is there is still known as ours."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    pair.socket_for(0).shutdown(socket.SHUT_RDWR)
    with monkeypatch.context() as full:
        full.setattr(socket_file, "bind", fail)
        for each in failing:
            full.setattr(os, each, fail)
        world.steering._repairs.repair(pair, 0)
        world.pass_time(1.0)
    world.pass_time(1.0)

    assert not pair.has_sibling
    come(world, pair.path)
    assert pair.has_waiting()
    folder = os.path.dirname(pair.path)
    assert len(os.listdir(folder)) == 2, "the path, and the file of its socket"
    pair.refuse_new()
    assert os.listdir(folder) == []


def test_a_path_that_leads_to_a_broken_socket_is_removed_at_the_end(
    world: World, pair: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    pair.socket_for(0).shutdown(socket.SHUT_RDWR)
    with monkeypatch.context() as full:
        full.setattr(socket_file, "bind", fail)
        full.setattr(os, "link", fail)
        world.steering._repairs.repair(pair, 0)

    pair.refuse_new()

    assert os.listdir(os.path.dirname(pair.path)) == []


def test_clients_of_a_hold_are_served_where_one_socket_was_left_meanwhile(
    world: World, pair: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> socket.socket:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.turn_hold(True)
    come(world, pair.path)
    with monkeypatch.context() as read_only:
        read_only.setattr(socket_file, "bind", fails)
        pair.socket_for(0).shutdown(socket.SHUT_RDWR)
        world.pass_time(1.0)
        assert "one-socket-left" in world.log.events
        before = world.stranded

        world.steering.turn_hold(False)
        world.pass_time(2 * FIRST_RESCUE_S)

    assert world.stranded > before, "a generation is started for them"
    world.steering.enter(2, 1)
    assert pair.has_waiting(1)


def test_clients_of_a_hold_are_served_though_both_sockets_were_broken_meanwhile(
    world: World, pair: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> socket.socket:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.turn_hold(True)
    come(world, pair.path)
    monkeypatch.setattr(socket_file, "bind", fails)
    for number in (1, 0):
        pair.socket_for(number).shutdown(socket.SHUT_RDWR)
        world.steering._repairs.repair(pair, number)

    assert world.lost == []
    assert world.stranded
    assert pair.has_waiting()
    world.steering.turn_hold(False)
    come(world, pair.path)


def test_a_listener_that_is_closed_for_a_repair_of_another_is_not_looked_at(
    world: World, pair: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that a reload has added: the reload is called off for the clients of the other."""
    world.listeners.reverse()
    added = world.listener
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    pair.socket_for(0).shutdown(socket.SHUT_RDWR)

    def close(_: Event) -> None:
        if added in world.listeners:
            world.listeners.remove(added)
            added.close()

    monkeypatch.setattr(world.steering._repairs, "_post", close)
    world.steering._repair()

    assert world.log.events == ["socket-replaced"]
    assert world.listeners == [pair]


def test_a_hold_applies_to_a_path_again_as_soon_as_it_has_two_sockets_again(
    world: World, pair: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> socket.socket:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    with monkeypatch.context() as read_only:
        read_only.setattr(socket_file, "bind", fails)
        pair.socket_for(1).shutdown(socket.SHUT_RDWR)
        world.steering._repairs.repair(pair, 1)
    assert not pair.has_sibling
    world.steering.turn_hold(True)

    world.steering.enter(2, 1)
    come(world, pair.path)

    assert pair.has_held_client


def test_a_client_that_comes_as_another_socket_is_put_in_the_place_of_its_one_waits_on(
    world: World, pair: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No generation accepts there, so the path leads to the socket that a hold's is to replace."""
    pair.reserve()
    rename = os.rename

    def lead(source: str, path: str) -> None:
        if not world.clients and path == pair.path:
            come(world, path)
        rename(source, path)

    monkeypatch.setattr(os, "rename", lead)
    pair.adopt_reserved(0)

    assert len(world.clients) == 1
    assert pair.has_waiting(0)
    assert socket_file.leads_to(pair.path, pair.socket_for(0))


@pytest.mark.parametrize("turned", [False, True], ids=["it starts", "it settles"])
@pytest.mark.parametrize("killed", [False, True])
def test_clients_of_a_hold_are_told_of_as_long_as_two_generations_have_both_sockets(
    world: World, pair: Listener, turned: bool, killed: bool
) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.turn_hold(True)
    come(world, pair.path)
    world.steering.enter(2, 1)
    if turned:
        world.steering.turn_to(1)
    assert world.held == 0
    if killed:
        world.resume(*((2, 1), (1, 0)) if turned else ((1, 0), (2, 1)))
    else:
        world.steering.turn_hold(False)
    assert world.held

    world.steering.turn_to(0, served_before=True)
    world.steering.leave(2)
    assert pair.has_waiting(1)
    before = world.held
    world.steering.forget(2)  # it may have failed for them: a stop must know at once
    assert world.held == before + 1
    world.steering.enter(3, 1)
    assert world.held == before + 1
    assert not pair.is_reserved_for_clients


@pytest.mark.parametrize("killed", [False, True])
def test_a_mount_is_only_blamed_for_clients_that_come_where_the_path_does_not_lead(
    world: World, pair: Listener, killed: bool
) -> None:
    """Those of a hold wait on where the start for them has failed."""
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.turn_hold(True)
    come(world, pair.path)
    world.steering.turn_hold(False)
    world.steering.enter(2, 1)
    if killed:
        world.resume((1, 0), (2, 1))
    world.steering.forget(2)
    world.pass_time(2 * FIRST_RESCUE_S)
    assert world.stranded
    assert world.log.hints == []

    world.steering.enter(2, 1)
    pair.socket_for(1).accept()[0].close()
    world.steering.forget(2)
    come(world, pair.ensure_address(1)[0])
    world.pass_time(10 * FIRST_RESCUE_S)
    assert any("mount the folder" in each for each in world.log.hints)


def test_a_hold_at_a_path_is_possible_again_as_soon_as_its_folder_is_there(
    world: World, pair: Listener
) -> None:
    """A missing folder stands for one that is read-only, which it is for no root."""
    folder = Path(pair.path).parent
    aside = folder.with_name(f"{folder.name}-aside")
    folder.rename(aside)
    cannot = world.steering.hold.prepare() or ""
    aside.rename(folder)

    assert cannot.endswith("; a hold is possible once files can be made in the socket's directory")
    assert world.steering.hold.prepare() is None


@pytest.mark.parametrize("as_client", [False, True])
def test_probes_reach_the_socket_of_a_path_though_its_file_was_removed(
    world: World, pair: Listener, as_client: bool
) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    for number in (0, 1):
        os.unlink(pair.ensure_address(number)[0])

    probes, there = world.steering.probes, pair.index.__eq__
    target = probes.reach_as_client("", there) if as_client else probes.reach_by_mark(1, "", there)
    assert target is not None
    come(world, target.address[0])
    assert pair.has_waiting(0)


def lose_its_socket(world: World, pair: Listener) -> None:
    """A worker of the serving generation, 1, shuts it down."""
    pair.socket_for(0).shutdown(socket.SHUT_RDWR)
    world.turn()
    assert "socket-replaced" in world.log.events


def lose_its_file(world: World, pair: Listener) -> None:
    """Another program removes it while a release settles, which then fails."""
    world.steering.enter(2, 1)
    world.steering.turn_to(1)
    for each in map(Path, (pair.path, pair.ensure_address(0)[0], pair.ensure_address(1)[0])):
        each.unlink(missing_ok=True)
    world.steering.turn_to(0, served_before=True)
    come(world, pair.path)
    assert not pair.has_waiting(1), "the failed release gets no more clients"
    world.steering.leave(2)
    world.steering.forget(2)
    assert "not-steered" not in world.log.events


@pytest.mark.parametrize("lose", [lose_its_socket, lose_its_file])
@pytest.mark.parametrize("killed", [False, True])
def test_clients_of_a_lost_socket_wait_for_one_generation_alone(
    world: World, pair: Listener, lose: Callable[[World, Listener], None], killed: bool
) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    lose(world, pair)
    assert world.stranded
    if killed:
        assert world.written is not None
        world.resume((1, 0), record=world.written)
    come(world, pair.path)
    before = world.stranded
    world.pass_time(2 * FIRST_RESCUE_S)
    assert world.stranded > before, "as long as no generation has begun"

    world.steering.enter(3, world.steering.turns.free)
    come(world, pair.path)
    assert pair.has_waiting(1)
    assert not pair.has_waiting(0)
    assert not pair.is_reserved_for_clients
    before = world.stranded
    world.pass_time(60)
    world.steering.turn_to(1)
    come(world, pair.path)
    assert pair.has_waiting(1)
    assert not pair.has_waiting(0)
    world.steering.leave(1)
    world.pass_time(60)
    assert world.stranded == before


def test_clients_of_a_lost_socket_wait_on_when_the_next_generation_fails(
    world: World, pair: Listener
) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    lose_its_socket(world, pair)
    world.steering.enter(2, 1)
    come(world, pair.path)
    world.steering.leave(2)
    world.steering.forget(2)
    before = world.stranded
    world.pass_time(2 * FIRST_RESCUE_S)

    assert world.stranded > before
    world.steering.enter(3, 1)
    come(world, pair.path)
    assert pair.has_waiting(1)
    assert not pair.has_waiting(0)


def test_a_release_that_a_stop_calls_off_brings_no_client_back(
    world: World, pair: Listener
) -> None:
    """It ends when new clients are refused already: nothing that it has broken is repaired."""
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.enter(2, 1)
    world.steering.end()
    assert pair.refuse_new()

    world.steering.forget(2)
    world.pass_time(1.0)

    assert os.listdir(os.path.dirname(pair.path)) == []
    assert "socket-replaced" not in world.log.events


def test_a_path_whose_only_socket_lost_its_file_keeps_no_generation_from_its_end(
    world: World, pair: Listener
) -> None:
    """No client comes by it, so none is to be brought elsewhere before."""
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    pair.drop_socket(1)
    for each in (pair.path, socket_file.own_file(pair.path, pair.socket)):
        os.unlink(each)
    pair.__dict__["file_rights"] = None  # as in a program that was executed since
    world.steering.enter(2, 1)

    supersede(world)
    world.pass_time(2 * GENERATION_QUIET_S)

    assert world.quiesced == [1]
    assert "not-steered" not in world.log.events


@pytest.mark.parametrize("waits_at_path", [False, True])
@pytest.mark.parametrize("fault", ["the folder is renamed", "no memory"])
def test_an_address_that_cannot_be_steered_limits_the_wait_for_its_own_clients_alone(
    world: World, pair: Listener, monkeypatch: pytest.MonkeyPatch, fault: str, waits_at_path: bool
) -> None:
    """Where its path leads nowhere, no new client comes, so all are waited for."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    if waits_at_path:
        come(world, pair.path)
    else:
        world.connect()
    folder = Path(pair.path).parent
    if fault == "no memory":
        monkeypatch.setattr(pair, "steer", fail)
    else:
        # The next case gets this folder's name again.
        folder.rename(f"{folder}-renamed-{waits_at_path}")
    over: list[bool] = []

    world.steering.give_back()
    world.steering.quiesce_last(1, lambda: over.append(True), float("inf"))
    assert world.log.events == ["not-steered"]
    world.pass_time(GENERATION_LAST_S + 1.0)

    assert bool(over) == (fault == "no memory" and waits_at_path)
    (pair.socket_for(0) if waits_at_path else world.listener.socket_for(0)).accept()[0].close()
    world.pass_time(2.0)
    assert over == [True]
