"""When an old generation may be drained: what the kernel tells, in memory, and no process."""

from __future__ import annotations

import socket
from collections.abc import Collection
from copy import copy
from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.daemon.delivery.shared import quiescing
from socketprotector.daemon.delivery.shared.quiescing import (
    GENERATION_LAST_S,
    GENERATION_QUIET_S,
    SILENT_S,
    Quiescing,
)
from socketprotector.daemon.delivery.shared.turns import Turns
from socketprotector.system.listener import Listener
from tests.unit.daemon.clock import Clock

PORT, INDEX = 80, 3
FILE, OTHER_FILE, REPLACED = 1 << 32, 2 << 32, 3 << 32
READ, SILENT = b"has sent something", b"has sent nothing"


class World:
    """One address of two sockets; generation 1 accepts at socket 0 and gets no new clients."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.unread: dict[bytes, bool] = {}  # client -> whether it is silent
        self.shaking: set[bytes] = set()
        self.in_backlog = False
        self.is_steered = True
        self.strays = False  # whether new clients can come to its socket
        self.scarce = False
        self.queries = 0  # by port
        self.ended: list[float] = []
        listener = SimpleNamespace(
            socket=SimpleNamespace(family=socket.AF_INET),
            port=PORT,
            index=INDEX,
            has_waiting=lambda: self.in_backlog,
        )
        self.pairs = [cast("Listener", listener)]
        patch.setattr(quiescing, "unread", self._unread)
        patch.setattr(quiescing, "still_unread", self._still_unread)
        self.record = SimpleNamespace(accept_tags=())  # of generation 1
        host = SimpleNamespace(
            runtime=self.clock.use_in(patch, quiescing),
            generations={1: SimpleNamespace(record=self.record)},
        )
        self.turns = Turns()
        listeners = SimpleNamespace(host=host, awaited=self._awaited, can_stray=self._can_stray)
        self.quiescing = Quiescing(
            cast("Any", listeners),
            self.turns,
            cast("Any", SimpleNamespace(clients_wait=lambda *_: self.in_backlog)),
            cast("Any", SimpleNamespace(gets_no_client=lambda _: self.is_steered)),
        )

    def _awaited(self, _generation: int, leave_out: Collection[int]) -> list[Listener]:
        return [each for each in self.pairs if each.index not in leave_out]

    def _unread(self, _family: int, ports: set[int], *, in_handshake: bool) -> Any:
        self.queries += 1
        return {port: self._clients(in_handshake) for port in ports}

    def _still_unread(self, _family: int, clients: set[bytes], *, in_handshake: bool) -> Any:
        assert not any(each.isdigit() for each in clients), "the inode of a UNIX connection"
        found = self._clients(in_handshake)
        return {client: found[client] for client in clients if client in found}

    def _clients(self, in_handshake: bool) -> dict[bytes, bool]:
        if self.scarce:
            raise OSError(24, "Too many open files")
        assert not self.in_backlog, "a query would be useless"
        return dict.fromkeys(self.shaking, False) if in_handshake else self.unread.copy()

    def _can_stray(self, listener: Listener) -> bool:
        return self.strays and listener is self.pairs[0]

    def begin(self, **how: Any) -> None:
        self.quiescing.begin(1, 0, self._over, **how)

    def _over(self) -> None:
        self.ended.append(self.clock.now)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def add_path(world: World, patch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Add a UNIX path with one unread client; return what accepted_unix() yields."""
    listener = SimpleNamespace(
        socket=SimpleNamespace(family=socket.AF_UNIX), socket_for=lambda _: FILE, index=INDEX + 1
    )
    world.pairs.append(cast("Listener", listener))
    clients = [(FILE, 7, 1)]
    patch.setattr(quiescing, "file_key", lambda each: each)
    patch.setattr(quiescing, "accepted_unix", lambda: clients)
    return clients


def test_without_clients_it_is_quiet_after_a_second(world: World) -> None:
    """That long a worker may need for a TLS handshake, or for the rest of a request."""
    world.begin()
    world.clock.pass_time(0.8)
    assert not world.ended
    world.clock.pass_time(0.4)
    assert len(world.ended) == 1
    assert not world.clock.waits
    assert not world.clock.lines


def test_one_whose_workers_read_on_is_quiet_after_two_looks(world: World) -> None:
    world.unread = {READ: False}  # they read from it before they leave
    world.begin(reads_on=True)
    assert not world.ended
    world.clock.pass_time(0.05)
    assert len(world.ended) == 1


def test_while_its_clients_wait_no_handshake_is_looked_for(world: World) -> None:
    world.in_backlog = True
    world.begin(reads_on=True)
    world.clock.pass_time(1)
    assert not world.ended
    world.in_backlog = False
    world.clock.pass_time(0.05)
    assert len(world.ended) == 1


def test_there_a_handshake_that_is_under_way_is_waited_for(world: World) -> None:
    world.shaking = {READ}
    world.begin(reads_on=True)
    world.clock.pass_time(1)
    assert not world.ended
    world.shaking.clear()
    world.clock.pass_time(0.1)
    assert len(world.ended) == 1


@pytest.mark.parametrize("reads_on", [True, False])
def test_the_query_by_port_is_not_repeated(world: World, reads_on: bool) -> None:
    """It walks the table of all connections."""
    world.unread, world.shaking = {READ: False, SILENT: True}, {READ}
    world.begin(reads_on=reads_on)
    world.clock.pass_time(1)
    assert world.queries == 1


def test_after_clients_have_waited_the_query_by_port_is_repeated(world: World) -> None:
    world.unread = {READ: False}
    world.begin()
    world.clock.pass_time(1)
    world.in_backlog = True
    world.clock.pass_time(1)
    assert world.queries == 1
    world.in_backlog = False
    world.clock.pass_time(1)
    assert world.queries == 2


def test_a_client_that_has_sent_something_is_waited_for_to_the_end(world: World) -> None:
    world.unread = {READ: False}
    world.begin()
    world.clock.pass_time(GENERATION_LAST_S - 0.5)
    assert not world.ended
    world.clock.pass_time(1)
    assert len(world.ended) == 1


def test_a_silent_one_is_waited_for_a_while(world: World) -> None:
    world.unread = {SILENT: True}
    world.begin()
    world.clock.pass_time(SILENT_S - 0.3)
    assert not world.ended
    world.clock.pass_time(0.6)
    assert len(world.ended) == 1


@pytest.mark.parametrize(
    ("file", "tagged", "waits"),
    [
        (FILE, False, True),
        (OTHER_FILE, False, False),
        (REPLACED, False, False),
        (REPLACED, True, True),
    ],
)
def test_only_clients_of_the_generations_files_are_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch, file: int, tagged: bool, waits: bool
) -> None:
    """Its tag names the file of a socket that was replaced."""
    add_path(world, monkeypatch)[:] = [(file, 7, 1)]
    del world.pairs[0]
    world.record.accept_tags = ((INDEX, 5), (INDEX + 1, REPLACED)) if tagged else ()
    world.begin()
    world.clock.pass_time(GENERATION_LAST_S - 1.0)
    assert bool(world.ended) != waits


def test_one_whose_workers_read_on_waits_for_no_unread_client_of_a_unix_path(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_path(world, monkeypatch)
    world.begin(reads_on=True)
    world.clock.pass_time(0.05)
    assert len(world.ended) == 1


def test_a_client_counts_for_each_listener_of_its_port_until_no_listener_is_awaited(
    world: World,
) -> None:
    """Two addresses with the same port: the kernel's table is queried by port."""
    other: Any = copy(world.pairs[0])
    other.index = INDEX + 1
    world.pairs.append(other)
    world.unread = {READ: False}
    world.begin()
    world.clock.pass_time(1.5)
    del world.pairs[0]
    world.clock.pass_time(1.5)
    assert not world.ended
    world.pairs.clear()
    world.clock.pass_time(GENERATION_QUIET_S + 0.3)
    assert len(world.ended) == 1


def test_clients_of_both_families_are_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_path = add_path(world, monkeypatch)
    world.unread = {READ: False}
    world.begin()
    world.clock.pass_time(3)
    world.unread.clear()
    world.clock.pass_time(3)
    assert not world.ended
    at_path.clear()
    world.clock.pass_time(GENERATION_QUIET_S + 0.3)
    assert len(world.ended) == 1


def test_clients_of_the_next_generation_at_a_unix_path_are_none_of_its_own(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only clients that the first look has found count."""
    at_path = add_path(world, monkeypatch)
    world.begin()
    world.clock.pass_time(0.5)
    [(name, inode, unread_bytes)] = at_path
    at_path[:] = [(name, inode + 1, unread_bytes)]
    world.clock.pass_time(GENERATION_QUIET_S + 0.3)
    assert len(world.ended) == 1


def test_clients_of_the_next_generation_are_none_of_its_own(world: World) -> None:
    """Only what had come before the first look counts: others are at the other socket."""
    world.begin()
    world.clock.pass_time(0.5)
    world.unread = {b"a later one": False}
    world.clock.pass_time(0.8)
    assert len(world.ended) == 1


def test_as_long_as_clients_come_to_it_time_begins_again(world: World) -> None:
    world.is_steered = False
    world.begin()
    world.clock.pass_time(3 * GENERATION_LAST_S)
    assert not world.ended
    world.is_steered = True
    world.clock.pass_time(GENERATION_QUIET_S + 0.3)
    assert len(world.ended) == 1


def test_a_backlog_that_nobody_accepts_ends_with_a_line(world: World) -> None:
    world.in_backlog = True
    world.begin(common=world.pairs)
    world.clock.pass_time(GENERATION_LAST_S + 0.2)
    assert len(world.ended) == 1
    assert world.clock.lines == ["not-accepted"]


def test_the_clients_of_the_last_generation_are_waited_for_and_then_read_from(
    world: World,
) -> None:
    """No other generation accepts them."""
    world.in_backlog = True
    world.begin(accept_until=float("inf"))
    world.clock.pass_time(3 * GENERATION_LAST_S)
    assert not world.ended
    world.in_backlog = False
    world.unread = {READ: False}
    world.clock.pass_time(GENERATION_LAST_S - 0.5)
    assert not world.ended
    world.clock.pass_time(1)
    assert len(world.ended) == 1
    assert not world.clock.lines


@pytest.mark.parametrize("addresses", [1, 2])
def test_only_where_new_clients_can_come_the_last_generation_has_a_limited_time(
    world: World, addresses: int
) -> None:
    world.pairs *= addresses
    world.pairs[-1] = copy(world.pairs[0]) if addresses == 2 else world.pairs[0]
    world.in_backlog = world.strays = True
    world.begin(accept_until=float("inf"))
    world.clock.pass_time(GENERATION_LAST_S + 0.2)
    assert len(world.ended) == (addresses == 1)


def test_what_cannot_be_looked_up_now_is_not_taken_for_nothing(world: World) -> None:
    world.scarce = True
    world.begin()
    world.clock.pass_time(GENERATION_LAST_S - 0.5)
    assert not world.ended
    world.scarce = False
    world.unread = {READ: False}
    world.clock.pass_time(0.3)
    world.unread = {}
    world.clock.pass_time(GENERATION_LAST_S)
    assert len(world.ended) == 1


def test_one_that_has_ended_is_not_looked_at_again(world: World) -> None:
    world.begin()
    assert world.quiescing.generations == (1,)
    world.quiescing.end(1)
    assert not world.clock.waits
    world.clock.pass_time(GENERATION_LAST_S)
    assert not world.ended
