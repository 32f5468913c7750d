"""Who accepts where: real sockets and the real loop; the clock is moved by hand."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from socketprotector.core.events import Event, Quiesced, Stranded
from socketprotector.daemon import socket_steering as module
from socketprotector.daemon.runtime import Runtime
from socketprotector.daemon.socket_steering import (
    FIRST_RESCUE_S,
    LAST_S,
    QUIET_S,
    SILENT_S,
    SocketSteering,
)
from socketprotector.model.settings import ListenerSettings
from socketprotector.system import accept_marks, reuseport
from socketprotector.system.listener import Listener
from socketprotector.system.loop import READ, Loop
from tests.unanswered import Unanswered

ONE_S = struct.pack("ll", 1, 0)


class Told:
    """A log that keeps its events."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.then: Callable[[], None] = lambda: None

    def write(self, level: str, event: str, **fields: object) -> None:
        self.events.append(event)
        self.then()


class World:
    """One address, and the time, which stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        self.unread: dict[bytes, bool] = {}  # and whether he is silent
        self.unaccepted: set[bytes] = set()  # of those
        self.asked, self.asking_s = 0, 0.0
        self.loop, self.log = Loop(), Told()
        self.quiesced: list[int] = []
        self.stranded = 0
        self.bound: list[Listener] = []
        self.lost: list[Listener] = []
        self.untaken: list[tuple[float, int, bool, str]] = []
        self.shaking: set[bytes] = set()  # clients who are about to connect
        monkeypatch.setattr(module, "unread", self.ask)
        monkeypatch.setattr(module, "handshakes", lambda *_: frozenset(self.shaking))
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
        self.listener = Listener(fds[0], 0, settings, shared=True, sibling=fds[1])
        self.listeners = [self.listener]
        self.clients: list[socket.socket] = []
        self.steering = SocketSteering(
            lambda: self.listeners,
            Runtime(self.loop, cast("Any", self.log), self.post, lambda: True),
            bound=self.bound.append,
            lost=lambda listener, why: self.lost.append(listener),
            untaken=lambda *said: self.untaken.append(said),
        )

    def ask(self, family: int, port: int, *, accepted: bool) -> dict[bytes, bool]:
        self.asked += 1
        self.now += self.asking_s
        left_out = self.unaccepted if accepted else set()
        return {who: silent for who, silent in self.unread.items() if who not in left_out}

    def post(self, event: Event) -> None:
        match event:
            case Quiesced(generation):
                self.quiesced.append(generation)
            case Stranded():
                self.stranded += 1

    def connect(self) -> None:
        self.clients.append(socket.create_connection(self.listener.socket.getsockname()))

    def accept(self, socket_number: int) -> None:
        self.listener.socket_for(socket_number).accept()[0].close()

    def waiting(self) -> list[int]:
        return [
            socket_number for socket_number in (0, 1) if self.listener.has_waiting(socket_number)
        ]

    def turn(self) -> None:
        """Let the loop see what is due and ready, without waiting."""
        self.loop.running = True
        self.loop.call_after("end of the turn", 0.0, self.end)
        self.loop.run()

    def end(self) -> None:
        self.loop.running = False

    def pass_time(self, seconds: float) -> None:
        """In small steps, as the loop's timers see it."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(self.now + 0.01, until)
            self.turn()

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
    world.steering.enter(1, world.steering.free)
    world.steering.turn_to(0)
    world.steering.enter(2, world.steering.free)
    return world


def supersede(world: World) -> None:
    world.steering.turn_to(1)
    world.steering.quiesce(1)


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
    assert world.steering.free == 0
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.leave(1)  # as under stop-first
    world.connect()

    assert world.steering.free == 0
    assert world.waiting() == [0]


def test_one_quiesces_though_clients_come_while_no_other_generation_accepts(world: World) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.connect()
    world.steering.quiesce(1)  # under stop-first
    world.connect()
    assert world.waiting() == [0, 1]

    world.accept(0)
    world.pass_time(QUIET_S + 0.2)
    assert world.quiesced == [1]
    world.steering.leave(1)

    assert world.steering.free == 1


def test_where_the_kernel_cannot_tell_for_the_moment_no_client_is_forgotten(
    reloaded: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(family: int, port: int, *, accepted: bool) -> dict[bytes, bool]:
        raise OSError(errno.EMFILE, "Too many open files")

    reloaded.unread = {b"slow": False}
    monkeypatch.setattr(module, "unread", fails)
    supersede(reloaded)
    reloaded.pass_time(2 * QUIET_S)
    assert reloaded.quiesced == []
    monkeypatch.setattr(module, "unread", reloaded.ask)
    reloaded.pass_time(2 * QUIET_S)
    monkeypatch.setattr(module, "unread", fails)
    reloaded.pass_time(2 * QUIET_S)
    assert reloaded.quiesced == []
    monkeypatch.setattr(module, "unread", reloaded.ask)
    reloaded.unread = {}
    reloaded.pass_time(2 * QUIET_S)

    assert reloaded.quiesced == [1]


def test_one_quiesces_when_no_client_has_come_for_a_while(reloaded: World) -> None:
    supersede(reloaded)
    reloaded.pass_time(QUIET_S - 0.15)
    assert reloaded.quiesced == []

    reloaded.pass_time(0.3)

    assert reloaded.quiesced == [1]
    assert reloaded.log.events == []


def test_a_waiting_client_is_waited_for_and_then_has_time_to_speak(reloaded: World) -> None:
    reloaded.connect()
    supersede(reloaded)
    reloaded.pass_time(3 * QUIET_S)
    assert reloaded.quiesced == []
    reloaded.accept(0)
    reloaded.pass_time(QUIET_S - 0.15)
    assert reloaded.quiesced == []

    reloaded.pass_time(0.4)

    assert reloaded.quiesced == [1]


def test_a_client_that_another_generation_must_accept_holds_nothing_up(reloaded: World) -> None:
    """As where the next one's workers crash again and again, and another reload is to help."""
    reloaded.connect()  # to the one that quiesces
    reloaded.unread = {b"his": False, b"theirs": False}
    reloaded.unaccepted = {b"his", b"theirs"}
    supersede(reloaded)
    reloaded.pass_time(2 * QUIET_S)
    assert reloaded.quiesced == []

    reloaded.accept(0)
    del reloaded.unread[b"his"]
    reloaded.pass_time(QUIET_S + 0.3)

    assert reloaded.quiesced == [1]


def test_an_unread_client_that_came_before_is_waited_for_and_no_later_one(
    reloaded: World,
) -> None:
    reloaded.unread = {b"slow": False}
    supersede(reloaded)
    reloaded.unread[b"new"] = False  # at the other socket
    reloaded.pass_time(2 * SILENT_S)
    assert reloaded.quiesced == []

    del reloaded.unread[b"slow"]
    reloaded.pass_time(QUIET_S - 0.15)
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
    reloaded.pass_time(QUIET_S + 0.3)

    assert reloaded.quiesced == [1]


def test_a_machine_that_stands_still_shortens_no_clients_time(reloaded: World) -> None:
    reloaded.unread = {b"silent": True}
    supersede(reloaded)
    reloaded.pass_time(SILENT_S / 2)
    reloaded.now += 2 * SILENT_S
    reloaded.turn()

    assert reloaded.quiesced == []
    reloaded.unread.clear()
    reloaded.pass_time(QUIET_S + 0.3)
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

    reloaded.pass_time(LAST_S + 0.3)

    assert reloaded.quiesced == [1]
    assert reloaded.log.events == []  # no client is left waiting


def test_one_that_does_not_accept_has_its_time_and_is_reported(reloaded: World) -> None:
    reloaded.connect()
    supersede(reloaded)

    reloaded.pass_time(LAST_S + 0.3)

    assert reloaded.quiesced == [1]
    assert reloaded.log.events == ["not-taken"]
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

    assert told[2] == 1
    assert told[4] == 2
    assert told[-1] == 5  # after 1, 3, 7, 15 and 31 s


def test_the_generation_that_comes_for_them_ends_that(reloaded: World) -> None:
    reloaded.connect()
    supersede(reloaded)
    reloaded.steering.leave(1)
    reloaded.pass_time(FIRST_RESCUE_S + 0.3)
    assert reloaded.steering.free == 0

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
        reloaded.pass_time(2 * LAST_S)
        assert reloaded.quiesced == []
        assert reloaded.log.events == ["not-steered"]
        reloaded.connect()
        assert reloaded.waiting() == [0]
        reloaded.accept(0)

    reloaded.pass_time(QUIET_S + 1)
    assert reloaded.quiesced == [1]
    reloaded.connect()
    assert reloaded.waiting() == [1]


def test_where_the_kernel_does_not_report_handshakes_only_time_counts(
    reloaded: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, accepted: bool) -> dict[bytes, bool]:
        raise OSError(errno.ENOENT, "no sock_diag")

    monkeypatch.setattr(module, "unread", fails)
    supersede(reloaded)
    reloaded.pass_time(QUIET_S + 0.3)

    assert reloaded.quiesced == [1]


def test_without_a_second_socket_one_quiesces_at_once(world: World) -> None:
    plain = socket.create_server(("127.0.0.1", 0))
    kept, world.listeners = (
        world.listeners,
        [Listener(plain.detach(), 1, ListenerSettings("tcp:127.0.0.1:81"), shared=True)],
    )
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.steering.enter(2, world.steering.free)
    supersede(world)

    assert world.quiesced == [1]
    world.listeners[0].close()
    world.listeners = kept


def test_clients_of_a_new_listener_go_to_the_next_generation(world: World) -> None:
    world.steering.enter(1, 0)
    world.steering.turn_to(0)

    world.steering.expect(world.listener)
    world.connect()

    assert world.waiting() == [1] == [world.steering.free]


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

    reloaded.steering.enter(3, reloaded.steering.free)
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

    reloaded.steering.enter(3, reloaded.steering.free)
    reloaded.steering.turn_to(0)
    reloaded.connect()

    assert reloaded.waiting() == [0]
    assert reloaded.bound == [reloaded.listener]
    assert reloaded.stranded == 0  # one that begins now has it


def test_where_clients_are_kept_out_of_one_for_all_they_are_let_in_by_the_next_generation(
    world: World,
) -> None:
    plain = socket.create_server(("127.0.0.1", 0))
    address = f"tcp:127.0.0.1:{plain.getsockname()[1]}"
    world.listeners.append(Listener(plain.detach(), 1, ListenerSettings(address), shared=True))
    common = world.listeners[1]
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    reuseport.refuse_new(common.socket)  # by 1, which accepts there until 2 is ready
    common.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, ONE_S)

    world.steering.enter(2, world.steering.free)
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

    reloaded.steering.enter(3, reloaded.steering.free)
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


def test_one_that_is_bound_anew_needs_a_generation_that_has_it(
    world: World, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(path))
    unix.listen(5)
    found = path.stat()
    settings = ListenerSettings(f"unix:{path}", found.st_dev, found.st_ino, 5)
    world.listeners.append(Listener(unix.detach(), 1, settings, shared=True))
    world.steering.enter(1, 0)
    world.steering.turn_to(0)
    world.listeners[1].socket.shutdown(socket.SHUT_RD)
    world.turn()
    assert (world.stranded, world.steering.unserved) == (1, frozenset({(1, 1)}))

    with socket.socket(socket.AF_UNIX) as client:  # and it could not be opened
        client.connect(str(path))
        world.pass_time(FIRST_RESCUE_S + 0.3)
        assert world.stranded == 2
        world.steering.enter(2, world.steering.free)
        world.pass_time(60)
        assert world.stranded == 2
        world.steering.leave(2)  # it has failed
        world.pass_time(2 * FIRST_RESCUE_S + 0.3)
        assert world.stranded == 3
        world.steering.enter(3, world.steering.free)
        world.steering.leave(1)
        world.pass_time(60)

    assert (world.stranded, world.steering.unserved) == (3, frozenset())


def test_an_address_that_cannot_be_bound_again_is_lost_and_reported_once(world: World) -> None:
    made = socket.socket(socket.AF_UNIX)
    made.bind("")
    made.listen()
    settings = ListenerSettings(f"unix:@{made.getsockname()[1:].decode()}", backlog=5)
    copy = socket.socket(fileno=os.dup(made.fileno()))
    world.listeners.append(Listener(made.detach(), 1, settings, shared=True))
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
    world.steering.enter(1, world.steering.free)
    world.steering.turn_to(0)
    world.connect()
    over: list[bool] = []

    world.steering.quiesce_last(1, lambda: over.append(True))
    world.connect()
    assert world.waiting() == [0, 1]
    world.pass_time(5.0)
    assert not over, "who came before is still to be accepted"
    world.accept(0)
    world.pass_time(2.0)

    assert over == [True]
    world.steering.leave(1)
    world.pass_time(5.0)
    assert world.stranded == 0
    world.steering.end()
    [left] = [each.leave(world.steering.current) for each in world.listeners]
    assert left == "sp.twin.0"


def test_the_last_generation_yields_when_the_one_before_it_has_left_the_other_socket(
    reloaded: World,
) -> None:
    supersede(reloaded)
    over: list[bool] = []
    reloaded.unread = {b"client": False}
    reloaded.steering.quiesce_last(2, lambda: over.append(True))
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
    world.steering.quiesce(1, reads_on=True)


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

    reloaded.pass_time(LAST_S + 0.3)

    assert reloaded.quiesced == [1]


# -- whose connections are whose --------------------------------------------------------


def test_each_generation_has_a_mark_of_its_own(world: World) -> None:
    steering = world.steering
    first = steering.enter(1, 0)
    second = steering.enter(2, 1, taken=first)
    steering.leave(1)
    again = steering.enter(3, 0, taken=second)
    steering.leave(2)
    third = steering.enter(4, 1, taken={*second, *again})

    assert len({*first, *second, *third}) == 3
    assert again == first  # nothing of the first is left


def test_where_a_client_of_another_one_waits_nothing_is_known(world: World) -> None:
    first = world.steering.enter(1, 0)
    world.connect()

    assert world.steering.enter(2, 0, taken=first) == ()


def test_with_a_socket_that_all_share_nothing_is_known(world: World) -> None:
    world.listener.go_on_without(1)

    assert world.steering.enter(1, 0) == ()


def test_with_too_many_generations_nothing_is_known(world: World) -> None:
    taken = {(0, mark) for mark in range(1, accept_marks.MARKS + 1)}

    assert world.steering.enter(8, 0, taken) == ()


def test_clients_at_a_generations_own_socket_are_counted_for_it(reloaded: World) -> None:
    reloaded.connect()
    reloaded.connect()
    assert [reloaded.steering.waiting(n) for n in (1, 2)] == [2, 0]

    supersede(reloaded)
    reloaded.connect()
    assert [reloaded.steering.waiting(n) for n in (1, 2)] == [2, 1]
    reloaded.steering.leave(1)
    assert [reloaded.steering.waiting(n) for n in (1, 2)] == [0, 1]


def test_at_a_socket_of_two_generations_it_is_unknown_for_which_a_client_waits(
    reloaded: World,
) -> None:
    reloaded.listener.go_on_without(1)
    reloaded.connect()
    assert [reloaded.steering.waiting(n) for n in (1, 2)] == [None, None]

    reloaded.steering.leave(1)
    assert reloaded.steering.waiting(2) == 1


# -- a hold -------------------------------------------------------------------------


def dropping(world: World) -> list[int]:
    """The sockets that leave new clients without an answer."""
    return [n for n in (0, 1) if reuseport.drops_new(world.listener.socket_for(n))]


def test_under_a_hold_new_clients_get_no_answer_and_come_in_after_it(reloaded: World) -> None:
    reloaded.connect()
    reloaded.steering.hold(True)
    with Unanswered(reloaded.listener.socket.getsockname()) as late:
        late.tries_again()
        assert reloaded.waiting() == [0]
        reloaded.accept(0)
        assert reloaded.waiting() == []

        reloaded.steering.hold(False)
        late.connects()

    assert dropping(reloaded) == []
    assert reloaded.waiting() == [0]


def test_a_reload_meanwhile_lets_no_client_in_either(reloaded: World) -> None:
    reloaded.steering.hold(True)
    supersede(reloaded)
    with Unanswered(reloaded.listener.socket.getsockname()) as late:
        late.tries_again()
        reloaded.pass_time(QUIET_S + 0.3)
        assert reloaded.quiesced == [1]
        reloaded.steering.leave(1)
        reloaded.steering.enter(3, reloaded.steering.free)
        assert reloaded.waiting() == []

        reloaded.steering.hold(False)
        late.connects()

    assert dropping(reloaded) == []
    assert reloaded.waiting() == [1]


def test_one_whose_handshakes_may_be_under_way_is_not_made_deaf(reloaded: World) -> None:
    """Who connects there would inherit it, and never be heard."""
    supersede(reloaded)
    reloaded.shaking = {b"begun before the switch"}
    reloaded.steering.hold(True)
    assert dropping(reloaded) == []

    reloaded.pass_time(QUIET_S + 0.3)
    assert reloaded.quiesced == [1]

    assert dropping(reloaded) == [0]


def test_nor_is_one_whose_generation_has_crashed(reloaded: World) -> None:
    """It is gone at once, without quiescing; handshakes with it go on."""
    reloaded.steering.enter(2, 1)
    reloaded.steering.turn_to(1)
    reloaded.shaking = {b"begun before the crash"}
    reloaded.steering.turn_to(0, again=True)
    reloaded.steering.leave(2)

    reloaded.steering.hold(True)
    reloaded.pass_time(0.5)
    assert dropping(reloaded) == []

    reloaded.shaking.clear()
    reloaded.pass_time(0.2)
    assert dropping(reloaded) == [1]


def test_a_hold_waits_for_no_handshake_that_never_ends(reloaded: World) -> None:
    reloaded.steering.turn_to(1)
    reloaded.steering.turn_to(0)
    reloaded.shaking = {b"one that only scans for ports"}

    reloaded.steering.hold(True)
    assert dropping(reloaded) == []
    reloaded.pass_time(LAST_S + 0.2)

    assert dropping(reloaded) == [1]


def test_nor_for_any_long_after_a_switch(reloaded: World) -> None:
    reloaded.pass_time(LAST_S)
    reloaded.shaking = {b"of the socket that goes on"}

    reloaded.steering.hold(True)

    assert dropping(reloaded) == [1]


def test_a_hold_outlives_a_socket_that_is_shut_down(reloaded: World) -> None:
    reloaded.steering.hold(True)
    for number in (1, 0):
        reloaded.listener.socket_for(number).shutdown(socket.SHUT_RDWR)
        reloaded.pass_time(0.3)

    with Unanswered(reloaded.listener.socket.getsockname()) as late:
        late.tries_again()
        assert reloaded.waiting() == []
        reloaded.steering.hold(False)
        late.connects()
    assert reloaded.waiting() == [0]


def test_another_program_ends_a_hold_of_which_it_knows_no_more(reloaded: World) -> None:
    reloaded.steering.hold(True)
    runtime = Runtime(reloaded.loop, cast("Any", reloaded.log), reloaded.post, lambda: True)
    other = SocketSteering(
        lambda: reloaded.listeners,
        runtime,
        bound=lambda listener: None,
        lost=lambda listener, why: None,
        untaken=lambda *said: None,
    )
    other.adopt_record(reloaded.steering.record())

    other.turn_to(0, again=True)

    reloaded.connect()
    assert (dropping(reloaded), reloaded.waiting()) == ([], [0])


def test_what_has_no_second_socket_of_ours_cannot_be_held(world: World, tmp_path: Path) -> None:
    assert world.steering.cannot_hold() is None
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        settings = ListenerSettings(f"unix:{tmp_path / 's'}")
        world.listeners.append(Listener(os.dup(unix.fileno()), 1, settings, shared=True))
    assert world.steering.cannot_hold() == (
        f"unix:{tmp_path / 's'} has one socket for all, from which workers accept directly"
    )
    world.listener.settings = replace(world.listener.settings, foreign=True)
    cannot = f"{world.listener.settings.address} was passed in, and its owner goes on listening"
    assert (world.steering.cannot_hold() or "").startswith(cannot)
