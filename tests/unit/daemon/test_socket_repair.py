"""How broken sockets are repaired, and which generations that affects: no socket, no process."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import pytest

from socketprotector.core.events import SocketLost, Stranded
from socketprotector.daemon.delivery.shared import socket_option_restore, socket_repair
from socketprotector.daemon.delivery.shared.listener_hold import ListenerHold
from socketprotector.daemon.delivery.shared.socket_repair import SocketRepair
from tests.unit.daemon.shared_world import MemoryListener, MemorySocket, SharedWorld, failure


class Watch:
    """The watch of the sockets."""

    def __init__(self) -> None:
        self.later = 0
        self.unwatched: list[Any] = []

    def watch_later(self) -> None:
        self.later += 1

    def unwatch(self, listener: Any) -> None:
        self.unwatched.append(listener)


class World(SharedWorld):
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__(patch, socket_repair)
        self.restored: list[MemorySocket] = []
        snapshots = SimpleNamespace(take=lambda one: dict(one.options), restore=self._restore)
        snapshots.raise_backlog = lambda *_: None
        patch.setattr(socket_option_restore, "socket_snapshot", snapshots)
        self.reset: list[MemorySocket] = []
        copies = SimpleNamespace(
            device_is_gone=lambda one: one.device_is_gone, reset=self._reset_options
        )
        patch.setattr(socket_repair, "socket_copy", copies)
        self.watch = Watch()
        self.hold = ListenerHold(self.listeners)
        watch: Any = self.watch
        self.repairs = SocketRepair(self.listeners, self.turns, self.hold, watch, self.steering)

    def _restore(self, one: MemorySocket, _: object) -> list[str]:
        self.restored.append(one)
        return []

    def _reset_options(self, one: MemorySocket) -> None:
        if one.is_locked:
            raise failure(errno.EPERM)
        self.reset.append(one)

    def repair(self, listener: Any, number: int) -> None:
        self.repairs.repair(listener, number)

    def replace(self, listener: Any, number: int) -> None:
        self.repairs.replace(listener, number)

    def make_ready(self, listener: Any, number: int) -> None:
        self.repairs.make_ready(listener, number)

    def undo_earlier_changes(self, listener: Any, number: int, generation: int) -> None:
        self.repairs.undo_earlier_changes(listener, number, generation)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


@pytest.fixture
def pair(world: World) -> MemoryListener:
    return world.listener()


@pytest.fixture
def common(world: World) -> MemoryListener:
    return world.listener(count=1)


# -- repair ------------------------------------------------------------------------------


def test_a_socket_that_was_shut_down_listens_again_and_clients_are_steered_before_the_log(
    world: World, pair: MemoryListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.serving(1)
    lines_at_steer: list[int] = []
    monkeypatch.setattr(
        world.steering, "steer", lambda: lines_at_steer.append(len(world.clock.lines))
    )
    one = pair.sockets[0]
    one.listens = False
    world.clock.watched[one.fileno()] = lambda: None
    world.repair(pair, 0)
    assert one.listens
    assert lines_at_steer == [0]
    assert world.clock.lines == ["listens-again"]
    assert not world.clock.watched
    assert world.watch.later == 1
    assert not world.clock.posted


def test_one_that_cannot_listen_again_is_replaced_and_its_generation_needs_a_successor(
    world: World, pair: MemoryListener
) -> None:
    world.serving(1)
    one = pair.sockets[0]
    one.listens = pair.can_listen_again = False
    world.repair(pair, 0)
    assert pair.sockets[0] is not one
    assert world.clock.lines == ["socket-replaced"]
    assert world.clock.posted == [Stranded()]
    assert world.turns.unserved == {(1, pair.index)}
    assert world.steering.calls == [("steer",), ("adopt_held",)]
    assert world.host.bound == [pair]
    assert world.watch.later == 1


@pytest.mark.parametrize("how", ["ended", "lost"])
def test_after_the_end_and_where_it_is_lost_nothing_is_repaired(
    world: World, pair: MemoryListener, how: str
) -> None:
    pair.sockets[0].listens = False
    pair.lost = how == "lost"
    world.repairs.ended = how == "ended"
    world.repair(pair, 0)
    assert not pair.sockets[0].listens
    assert world.watch.later == 0


# -- replace -----------------------------------------------------------------------------


def test_a_starting_generation_that_loses_its_socket_fails_and_the_other_one_stays(
    world: World, pair: MemoryListener
) -> None:
    world.serving(1)
    world.starting(2)
    world.replace(pair, 1)
    assert world.clock.posted == [SocketLost(2)]
    assert world.turns.unserved == {(2, pair.index)}


def test_a_common_socket_is_lost_by_all_and_the_starting_one_fails_first(
    world: World, common: MemoryListener
) -> None:
    world.serving(1)
    world.starting(2)
    world.replace(common, 1)
    assert world.clock.posted == [SocketLost(2), Stranded()]
    assert world.turns.unserved == {(1, common.index), (2, common.index)}
    assert world.clock.lines == ["socket-replaced"]


def test_without_generations_no_other_one_is_needed(world: World, pair: MemoryListener) -> None:
    world.clock.watched[pair.sockets[0].fileno()] = lambda: None
    world.replace(pair, 0)
    assert not world.clock.posted
    assert world.clock.lines == ["socket-replaced"]
    assert not world.clock.watched, "a closed socket's number may be used again"


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM, errno.EBUSY])
def test_out_of_descriptors_the_socket_stays_for_a_later_repair(
    world: World, pair: MemoryListener, code: int
) -> None:
    world.serving(1)
    before = pair.sockets[0]
    pair.bind_fails = code
    world.replace(pair, 0)
    assert pair.sockets[0] is before
    assert not world.turns.unserved
    assert not world.clock.lines
    assert not world.clock.posted
    assert not pair.lost


def test_while_all_files_of_a_path_are_gone_a_sound_socket_stays(world: World) -> None:
    path = world.listener(path="/run/s")
    path.path_fault, path.is_cut_off, path.bind_fails = "gone", True, errno.ENOENT
    world.replace(path, 0)
    assert path.has_sibling
    assert world.watch.later == 1
    assert world.repairs.warnings == ("unix:/run/s: no client can connect: gone",)

    path.file_rights = None  # an earlier version has not recorded them
    world.replace(path, 0)
    assert not path.has_sibling


def test_where_none_can_be_bound_one_socket_is_left_for_all(
    world: World, pair: MemoryListener
) -> None:
    world.serving(1, 2)
    left = pair.sockets[1]
    pair.bind_fails = errno.EACCES
    world.host.generations[2] = generation = SimpleNamespace(changes={})
    generation.update_record = generation.changes.update
    world.replace(pair, 0)
    assert pair.sockets == [left]
    assert world.clock.lines == ["one-socket-left"]
    assert world.clock.fields[0]["hint"] == socket_repair.RESTART
    assert world.turns.unserved == {(1, pair.index)}
    assert world.clock.posted == [Stranded()]
    assert generation.changes == {"accept_tags": ()}, "generations cannot be counted apart now"


def test_the_last_socket_of_an_address_is_lost_with_it(
    world: World, common: MemoryListener
) -> None:
    world.serving(1)
    common.bind_fails = errno.EADDRINUSE
    world.replace(common, 0)
    assert common.lost
    assert world.host.lost == [(common, failure(errno.EADDRINUSE).strerror)]
    assert not world.clock.posted
    assert not world.steering.calls


def test_the_socket_at_which_clients_of_a_hold_wait_takes_the_place_of_the_last_one(
    world: World,
) -> None:
    path = world.listener(count=1, path="/run/s")
    world.serving(1)
    path.bind_fails = errno.EACCES
    path.reserved = held = path.made()
    path.is_reserved_for_clients = True
    world.replace(path, 0)
    assert not path.lost
    assert path.sockets == [held]
    assert world.clock.posted == [Stranded()]
    assert world.clock.lines == ["socket-replaced"]


# -- all sockets -------------------------------------------------------------------------


def test_all_sockets_that_no_client_can_reach_are_repaired(
    world: World, pair: MemoryListener
) -> None:
    other = world.listener()
    world.serving(1)
    pair.sockets[1].listens = False
    other.sockets[0].is_unreachable = True
    before = other.sockets[0]
    world.repairs.repair_all()
    assert pair.sockets[1].listens
    assert other.sockets[0] is not before
    assert world.clock.lines == ["listens-again", "socket-replaced"]


def test_a_socket_without_clients_may_be_out_of_reach(world: World, pair: MemoryListener) -> None:
    world.serving(1)
    before = list(pair.sockets)
    pair.sockets[1].is_unreachable = pair.sockets[1].device_is_gone = True
    world.repairs.repair_all()
    assert pair.sockets == before


@pytest.mark.parametrize("lacks", ["device_is_gone", "is_unreachable"])
@pytest.mark.parametrize(
    ("starts", "is_gone", "stays"), [(True, True, False), (False, True, True), (True, False, True)]
)
def test_a_starting_generation_whose_device_or_file_is_gone_cannot_be_probed(
    world: World, pair: MemoryListener, lacks: str, starts: bool, is_gone: bool, stays: bool
) -> None:
    world.serving(1)
    if starts:
        world.starting(2)
    before = pair.sockets[1]
    setattr(before, lacks, is_gone)
    world.repairs.repair_all()
    assert (pair.sockets[1] is before) == stays
    assert world.clock.posted == ([] if stays else [SocketLost(2)])


def test_without_the_interface_of_its_listener_no_other_socket_can_be_bound(
    world: World, pair: MemoryListener
) -> None:
    world.serving(1)
    world.starting(2)
    before = pair.sockets[1]
    before.device_is_gone = pair.lacks_interface = True
    world.repairs.repair_all()
    assert pair.sockets[1] is before


def test_a_listener_that_is_removed_by_the_repair_of_another_one_is_not_looked_at(
    world: World, pair: MemoryListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = world.listener()
    for each in (pair, added):
        each.sockets[0].listens = False
    repair = world.repairs.repair

    def remove(listener: Any, number: int) -> None:
        repair(listener, number)
        world.all.remove(added)

    monkeypatch.setattr(world.repairs, "repair", remove)
    world.repairs.repair_all()
    assert pair.sockets[0].listens
    assert not added.sockets[0].listens


# -- a generation is about to start ------------------------------------------------------


def test_a_new_generation_gets_a_socket_that_listens(world: World, pair: MemoryListener) -> None:
    pair.sockets[1].listens = False
    world.make_ready(pair, 1)
    assert pair.sockets[1].listens
    assert world.watch.unwatched == [pair]
    assert pair.renewed == [1]
    assert world.host.bound == []


def test_nor_one_whose_connections_are_shut_down(world: World, pair: MemoryListener) -> None:
    pair.sockets[1].sound = pair.can_listen_again = False
    before = pair.sockets[1]
    world.make_ready(pair, 1)
    assert pair.sockets[1] is not before


def test_a_new_socket_of_a_path_is_kept_for_the_next_program(world: World) -> None:
    path = world.listener(path="/run/s")
    path.renews = True
    world.make_ready(path, 0)
    assert world.host.bound == [path]


@pytest.mark.parametrize("held", [False, True])
def test_clients_of_a_hold_wait_for_the_generation_that_starts_after_it(
    world: World, held: bool
) -> None:
    path = world.listener(path="/run/s")
    path.reserved, path.is_reserved_for_clients = path.made(), True
    reserved = path.reserved
    world.hold.turn(held)
    world.make_ready(path, 1)
    assert (path.sockets[1] is reserved) == (not held)
    assert world.host.bound == ([] if held else [path])


def test_a_single_socket_stays_while_clients_wait_there_for_the_next_generation(
    world: World,
) -> None:
    path = world.listener(count=1, path="/run/s")
    other = world.listener()
    world.turns.unserved = frozenset({(1, other.index)})
    world.make_ready(path, 0)
    assert path.renewed == [0]
    world.turns.unserved |= {(1, path.index)}
    world.make_ready(path, 0)
    assert path.renewed == [0]
    world.turns.unserved |= {(1, other.index)}
    world.make_ready(other, 0)
    assert other.renewed == [0], "each generation has its own"


def test_no_generation_starts_where_no_client_can_connect(world: World) -> None:
    path = world.listener(path="/run/s")
    path.is_cut_off = True
    path.local_address = ("/run/s", 0)
    with pytest.raises(FileNotFoundError, match="socket file was removed") as raised:
        world.make_ready(path, 0)
    assert raised.value.filename == "/run/s"


def test_a_removed_file_of_an_only_socket_keeps_no_release_from_other_listeners(
    world: World, pair: MemoryListener
) -> None:
    path = world.listener(count=1, path="/run/s")
    path.is_cut_off = True
    world.make_ready(path, 0)
    world.undo_earlier_changes(path, 0, 1)
    assert world.host.lost == [(path, socket_repair.CUT_OFF)]
    assert [*world.repairs.warnings] == [f"unix:/run/s: {socket_repair.CUT_OFF}"]
    world.repairs.ended = True
    assert not world.repairs.warnings, "a stop removes the files itself"
    world.repairs.ended = False

    path.is_cut_off = False
    path.path_fault = "it has one socket, so this is no advice"
    world.undo_earlier_changes(path, 0, 2)
    world.undo_earlier_changes(pair, 0, 2)
    assert len(world.host.lost) == 1
    assert not world.repairs.warnings


def test_what_an_earlier_server_has_set_is_undone_on_a_socket_of_its_own(
    world: World, pair: MemoryListener
) -> None:
    world.undo_earlier_changes(pair, 0, 1)
    assert world.reset == [pair.sockets[0]]
    world.turns.accepting[1] = 0
    world.undo_earlier_changes(pair, 0, 2)
    assert world.reset == [pair.sockets[0]], "another generation uses the socket"
    assert pair.let_in_count == 0


def test_a_socket_whose_filter_is_locked_is_replaced(world: World, pair: MemoryListener) -> None:
    before = pair.sockets[0]
    before.is_locked = True
    world.undo_earlier_changes(pair, 0, 1)
    assert pair.sockets[0] is not before


def test_a_common_socket_lets_clients_in_again(world: World, common: MemoryListener) -> None:
    world.undo_earlier_changes(common, 0, 1)
    assert common.let_in_count == 1
    assert world.reset == []


def test_options_are_restored_where_no_other_generation_accepts(
    world: World, pair: MemoryListener
) -> None:
    world.undo_earlier_changes(pair, 0, 1)
    world.turns.accepting[1] = 0
    world.undo_earlier_changes(pair, 0, 2)
    assert world.restored == []
    del world.turns.accepting[1]
    world.undo_earlier_changes(pair, 0, 3)
    assert world.restored == [pair.sockets[0]]
