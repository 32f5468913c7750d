"""Which options a listening socket gets back, and when: sockets in memory, and no process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from socketprotector.daemon.delivery.shared import socket_option_restore as module
from socketprotector.daemon.delivery.shared.socket_option_restore import SocketOptionRestore
from socketprotector.system import socket_snapshot
from tests.unit.daemon.shared_world import MemoryListener, MemorySocket, SharedWorld

LINGER, BACKLOG, DEVICE = "SO_LINGER", "backlog", "SO_BINDTOIFINDEX"
assert DEVICE in socket_snapshot.KEEPS_CLIENTS_OUT


class World(SharedWorld):
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__(patch, module)
        calls = SimpleNamespace(
            take=lambda one: dict(one.options),
            restore=self._restore,
            raise_backlog=self._raise_backlog,
            as_text=socket_snapshot.as_text,
            from_text=socket_snapshot.from_text,
            KEEPS_CLIENTS_OUT=socket_snapshot.KEEPS_CLIENTS_OUT,
        )
        patch.setattr(module, "socket_snapshot", calls)
        self.restore = self.another()

    def another(self) -> SocketOptionRestore:
        return SocketOptionRestore(self.listeners, self.steering)

    @staticmethod
    def _restore(one: MemorySocket, before: dict[str, bytes]) -> list[str]:
        for name in before:
            if name not in one.stays:
                one.options[name] = before[name]
        return [name for name in before if one.options.get(name) != before[name]]

    @staticmethod
    def _raise_backlog(one: MemorySocket, made: dict[str, bytes]) -> None:
        one.options[BACKLOG] = max(one.options[BACKLOG], made[BACKLOG])

    def begin(self, generation: int, listener: Any, number: int = 0, *, alone: bool = True) -> None:
        self.restore.begin(generation, listener, number, lambda: alone)

    def replaces(self, listener: MemoryListener, number: int) -> None:
        """Bind another socket when that is ordered."""
        listener.sockets[number % len(listener.sockets)] = made(DEVICE)


def made(*stays: str) -> MemorySocket:
    one = MemorySocket()
    one.options = {LINGER: b"\0", BACKLOG: b"5", DEVICE: b"\0"}
    one.stays = stays
    return one


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


@pytest.fixture
def common(world: World) -> MemoryListener:
    """A listener with one socket for all generations."""
    listener = world.listener(count=1)
    listener.sockets = [made()]
    return listener


@pytest.fixture
def pair(world: World) -> MemoryListener:
    listener = world.listener()
    listener.sockets = [made(), made()]
    return listener


def test_a_generation_alone_on_a_socket_gets_it_as_it_was_made(
    world: World, pair: MemoryListener
) -> None:
    world.begin(1, pair)
    pair.sockets[0].options[LINGER] = b"\1"
    world.begin(2, pair)
    assert pair.sockets[0].options[LINGER] == b"\0"
    assert not world.steering.calls


def test_the_first_generation_does_not_change_the_socket(
    world: World, pair: MemoryListener
) -> None:
    pair.sockets[0].options[LINGER] = b"\7"
    world.begin(1, pair)
    assert pair.sockets[0].options[LINGER] == b"\7"


def test_what_the_serving_generation_has_set_stays_and_only_a_failed_release_is_undone(
    world: World, common: MemoryListener
) -> None:
    world.begin(1, common)
    common.socket.options[LINGER] = b"\1"  # by generation 1
    world.begin(2, common, alone=False)
    assert common.socket.options[LINGER] == b"\1"
    common.socket.options[LINGER] = b"\2"  # by generation 2
    world.restore.end(2, 0, {1}, gone=False)
    assert common.socket.options[LINGER] == b"\1"
    common.socket.options[LINGER] = b"\2"  # again, because it has workers left
    world.restore.end(2, 0, {1}, gone=True)
    assert common.socket.options[LINGER] == b"\1"
    common.socket.options[LINGER] = b"\3"
    world.restore.end(2, 0, {1}, gone=True)
    assert common.socket.options[LINGER] == b"\3", "that generation is gone"


def test_a_replaced_generation_leaves_its_successor_s_options(
    world: World, common: MemoryListener
) -> None:
    world.begin(1, common)
    world.begin(2, common, alone=False)
    common.socket.options[LINGER] = b"\2"
    world.restore.end(1, 0, {2}, gone=False)
    assert common.socket.options[LINGER] == b"\2"
    world.restore.end(2, 0, (), gone=False)
    assert common.socket.options[LINGER] == b"\2"
    assert [each[0] for each in world.restore.record] == [0], "only the new socket's options"


def test_a_release_between_two_others_is_not_undone(world: World, common: MemoryListener) -> None:
    """A newer generation may have set the options since."""
    world.begin(1, common)
    world.begin(2, common, alone=False)
    common.socket.options[LINGER] = b"\3"
    world.restore.end(2, 0, {1, 3}, gone=True)
    assert common.socket.options[LINGER] == b"\3"


def test_a_lowered_backlog_is_raised_for_the_next_generation(
    world: World, common: MemoryListener
) -> None:
    world.begin(1, common)
    common.socket.options[BACKLOG] = b"1"
    world.begin(2, common, alone=False)
    assert common.socket.options[BACKLOG] == b"5"
    common.socket.options[BACKLOG] = b"1"
    world.restore.end(2, 0, {1}, gone=True)
    assert common.socket.options[BACKLOG] == b"1", "as generation 1 had it when 2 began"


def test_all_backlogs_are_raised_while_no_generation_accepts(
    world: World, pair: MemoryListener, common: MemoryListener
) -> None:
    unknown = world.listener(count=1)
    unknown.sockets = [made()]
    unknown.socket.options[BACKLOG] = b"1"
    world.begin(1, pair)
    world.begin(1, common)
    for each in (*pair.sockets, common.socket):
        each.options[BACKLOG] = b"1"
    world.restore.end(1, 0, {2}, gone=False)
    assert common.socket.options[BACKLOG] == b"1"
    world.restore.end(1, 0, (), gone=False)
    assert [each.options[BACKLOG] for each in (*pair.sockets, common.socket)] == [b"5"] * 3
    assert unknown.socket.options[BACKLOG] == b"1"


def test_a_filter_of_a_failed_release_is_removed_from_a_common_socket(
    world: World, common: MemoryListener, pair: MemoryListener
) -> None:
    for listener in (common, pair):
        world.begin(1, listener)
        world.begin(2, listener, alone=False)
    world.restore.end(2, 0, {1}, gone=False)
    assert (common.let_in_count, pair.let_in_count) == (1, 0)


def test_a_socket_of_one_generation_that_cannot_be_restored_is_replaced(
    world: World, pair: MemoryListener
) -> None:
    world.begin(1, pair, 1)
    pair.sockets[1].stays = (LINGER,)
    pair.sockets[1].options[LINGER] = b"\1"
    world.steering.on_replace = world.replaces
    world.begin(2, pair, 1)
    assert world.steering.calls == [("replace", pair, 1)]
    assert not world.clock.lines, "the new socket has the options"


def test_where_none_can_be_bound_the_option_that_stays_is_logged(
    world: World, pair: MemoryListener
) -> None:
    world.begin(1, pair)
    pair.sockets[0].stays = (LINGER,)
    pair.sockets[0].options[LINGER] = b"\1"
    world.begin(2, pair)
    assert world.clock.lines == ["not-restored"]
    assert world.clock.fields[0]["options"] == LINGER
    assert world.clock.fields[0]["listen"] == pair.settings.address


@pytest.mark.parametrize("how", ["lost", "one left"])
def test_a_socket_that_was_lost_in_a_repair_needs_no_line(
    world: World, pair: MemoryListener, how: str
) -> None:
    world.begin(1, pair)
    pair.sockets[0].stays = (LINGER,)
    pair.sockets[0].options[LINGER] = b"\1"

    def replace(listener: MemoryListener, number: int) -> None:
        if how == "lost":
            listener.lost = True
        else:
            listener.drop_socket(number)
            listener.socket.options[LINGER] = b"\2"

    world.steering.on_replace = replace
    world.begin(2, pair)
    assert not world.clock.lines
    assert how == "lost" or pair.socket.options[LINGER] == b"\2", "it is the serving generation's"


@pytest.mark.parametrize(
    ("option", "spare", "replaced"),
    [(LINGER, True, False), (DEVICE, True, True), (DEVICE, False, False)],
)
def test_a_common_socket_is_replaced_only_where_it_keeps_clients_out_and_a_spare_is_there(
    world: World, common: MemoryListener, option: str, spare: bool, replaced: bool
) -> None:
    world.begin(1, common)
    world.begin(2, common, alone=False)
    common.spare = spare
    common.socket.stays = (option,)
    common.socket.options[option] = b"\2"
    world.restore.end(2, 0, {1}, gone=True)
    assert bool(world.steering.calls) == replaced
    assert world.clock.lines == ["not-restored"]


def test_what_stays_is_logged_once_its_last_worker_is_gone(
    world: World, common: MemoryListener
) -> None:
    world.begin(1, common)
    world.begin(2, common, alone=False)
    common.socket.stays = (LINGER,)
    common.socket.options[LINGER] = b"\2"
    world.restore.end(2, 0, {1}, gone=False)
    assert not world.clock.lines
    world.restore.end(2, 0, {1}, gone=True)
    assert world.clock.lines == ["not-restored"]


def test_if_the_replacement_failed_the_generation_begins_beside_the_other_one(
    world: World, pair: MemoryListener
) -> None:
    """It is not alone after all, so its changes must be undone if it fails."""
    world.begin(1, pair)
    pair.sockets[0].options[LINGER] = b"\1"
    answers = iter([True, False])
    accept: Any = pair
    world.restore.begin(2, accept, 0, lambda: next(answers))
    pair.sockets[0].options[LINGER] = b"\2"
    world.restore.end(2, 0, {1}, gone=True)
    assert pair.sockets[0].options[LINGER] == b"\0"


def test_a_listener_that_is_gone_or_lost_is_left_alone(
    world: World, common: MemoryListener
) -> None:
    world.begin(1, common)
    world.begin(2, common, alone=False)
    common.socket.options[LINGER] = b"\2"
    common.lost = True
    world.restore.end(2, 0, {1}, gone=True)
    world.restore.end(3, 0, (), gone=True)
    assert common.socket.options[LINGER] == b"\2"


def test_the_next_program_restores_what_an_earlier_one_has_seen(
    world: World, common: MemoryListener
) -> None:
    world.begin(1, common)
    world.begin(2, common, alone=False)
    record = world.restore.record
    common.socket.options = {LINGER: b"\2", BACKLOG: b"1", DEVICE: b"\0"}
    world.restore = world.another()
    world.restore.record = record
    assert world.restore.record == record
    world.restore.end(2, 0, {1}, gone=True)
    assert common.socket.options == {LINGER: b"\0", BACKLOG: b"5", DEVICE: b"\0"}
