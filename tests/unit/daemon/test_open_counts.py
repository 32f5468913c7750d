"""Which accept tags a generation gets, and what is counted by them: no socket, no process."""

from __future__ import annotations

import errno
import socket
from collections import Counter
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest

from socketprotector.daemon.delivery.shared import open_counts as module
from socketprotector.daemon.delivery.shared.accept_watch import QUERY_SHARE
from socketprotector.daemon.delivery.shared.open_counts import NO_TAG, OpenCounts
from tests.unit.daemon.shared_world import MemoryListener, MemorySocket, SharedWorld, failure

TAGS = 3


class World(SharedWorld):
    """Connections that carry the tag of the socket that accepted them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__(patch, module)
        self.open: dict[MemorySocket, Counter[int]] = {}  # by the socket at its address's number 0
        self.waiting: Counter[int] = Counter()
        self.of_paths: Counter[int] = Counter()
        self.queries = 0
        self.query_s = 0.0
        self.fails = 0
        self.passed_through: list[int] = []  # the further tag of each order to set one
        tags = SimpleNamespace(
            TAGS=TAGS, tag_of=lambda one: one.tag, tag=self._tag, connections=self._connections
        )
        files = SimpleNamespace(file_key=lambda one: one.tag, accepted_unix=self._of_path)
        patch.setattr(module, "accept_tags", tags)
        patch.setattr(module, "sock_diag", files)
        self.counts = OpenCounts(self.listeners)

    def _tag(
        self, listening: MemorySocket, number: int, exclude: Collection[int] = frozenset()
    ) -> frozenset[int]:
        before, listening.tag = listening.tag, number
        further = {self.passed_through.pop(0)} if self.passed_through else set()
        return frozenset(() if before == number else {before, *further})

    def _connections(
        self, listening: MemorySocket, exclude: object
    ) -> tuple[Counter[int], Counter[int]]:
        self._ask()
        assert exclude is self.host.own_connection
        [found] = [each for each in self.all if listening in each.sockets]
        return Counter(self.open.get(found.sockets[0], ())), Counter(self.waiting)

    def _of_path(self) -> list[tuple[int, int, int]]:
        self._ask()
        return [(tag, 0, 0) for tag in self.of_paths.elements()]

    def _ask(self) -> None:
        self.queries += 1
        self.clock.now += self.query_s
        if self.fails:
            raise failure(self.fails)

    def enter(self, number: int, *taken: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        return self.counts.tag_sockets(number, taken)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


@pytest.fixture
def pair(world: World) -> MemoryListener:
    return world.listener()


def test_each_generation_gets_a_tag_that_no_other_one_has(
    world: World, pair: MemoryListener
) -> None:
    [first] = world.enter(0)
    [second] = world.enter(1, first)
    assert first[0] == second[0] == pair.index
    assert NO_TAG not in (first[1], second[1])
    assert first != second
    assert [each.tag for each in pair.sockets] == [first[1], second[1]]
    [third] = world.enter(0, first, second)
    assert third[1] not in (first[1], second[1], NO_TAG)


def test_a_socket_keeps_its_tag_if_no_generation_and_no_connection_has_it(
    world: World, pair: MemoryListener
) -> None:
    pair.sockets[0].tag = 2
    assert world.enter(0) == ((0, 2),)
    world.open[pair.sockets[0]] = Counter({2: 1})
    [(_, tag)] = world.enter(0)
    assert tag != 2, "a released generation has connections with it"


def test_tags_of_clients_that_wait_and_of_the_other_socket_are_avoided(
    world: World, pair: MemoryListener
) -> None:
    world.waiting = Counter({1: 1})
    pair.sockets[1].tag = 2
    assert world.enter(0) == ((0, 3),)


def test_where_no_tag_is_left_a_generation_is_not_counted(
    world: World, pair: MemoryListener
) -> None:
    world.open[pair.sockets[0]] = Counter({1: 1, 2: 1, 3: 1})
    assert world.enter(0) == ((0, NO_TAG),)
    assert world.counts.active([(0, NO_TAG)]) is None


def test_without_an_answer_of_the_kernel_it_is_not_counted(
    world: World, pair: MemoryListener
) -> None:
    pair.sockets[0].tag = 1
    world.fails = errno.EMFILE
    assert world.enter(0) == ((0, NO_TAG),)
    assert pair.sockets[0].tag == NO_TAG


def test_clients_that_wait_with_the_tag_of_another_generation_keep_both_from_being_counted(
    world: World, pair: MemoryListener
) -> None:
    pair.sockets[0].tag = 1
    pair.sockets[0].line.append(b"client")
    assert world.enter(0, (0, 1)) == ()
    assert pair.sockets[0].tag == 1, "the next program comes to the same result"
    pair.sockets[0].line.clear()
    [(_, tag)] = world.enter(0, (0, 1))
    assert tag not in (1, NO_TAG)


def test_the_same_tag_at_another_listener_is_no_obstacle(
    world: World, pair: MemoryListener
) -> None:
    pair.sockets[0].tag = 1
    pair.sockets[0].line.append(b"client")
    assert world.enter(0, (5, 1)) == ((0, 1),)


def test_generations_without_a_tag_are_no_obstacle(world: World, pair: MemoryListener) -> None:
    pair.sockets[0].line.append(b"client")
    assert world.enter(0, (0, NO_TAG)) != ()


def test_clients_that_waited_before_the_tag_was_set_leave_a_generation_without_a_tag(
    world: World, pair: MemoryListener
) -> None:
    pair.sockets[0].tag = 1
    world.open[pair.sockets[0]] = Counter({1: 1})
    pair.sockets[0].line.append(b"client")
    assert world.enter(0) == ((0, NO_TAG),)


def test_clients_that_came_while_it_was_set_may_have_the_tag_of_another_generation(
    world: World, pair: MemoryListener
) -> None:
    pair.sockets[0].line.append(b"client")
    for passed_through in ([1], [3, 1]):
        world.passed_through = passed_through
        pair.sockets[0].tag = NO_TAG
        assert world.enter(0, (0, 1)) == ()
    world.passed_through = [1, 1]
    pair.sockets[0].tag = NO_TAG
    assert world.enter(0, (0, 2)) == ((0, NO_TAG),)


def test_where_all_generations_accept_from_one_socket_none_is_counted(world: World) -> None:
    world.listener()
    world.listener(count=1)
    assert world.enter(0) == ()


def test_lost_listeners_do_not_count(world: World, pair: MemoryListener) -> None:
    world.listener(count=1).lost = True
    assert len(world.enter(0)) == 1


def test_at_a_path_the_name_of_the_socket_is_the_tag(world: World) -> None:
    made = world.listener(path="/run/s")
    made.sockets[0].tag, made.sockets[1].tag = 77, 88
    assert world.enter(1) == ((0, 88),)
    assert world.enter(0, (0, 88)) == ((0, 77),)
    assert world.enter(1, (0, 88)) == (), "another generation has the socket"
    world.of_paths = Counter({77: 1})
    assert world.enter(0) == (), "a released generation has connections of that socket"


def test_open_connections_are_counted_by_tag_over_all_listeners(
    world: World, pair: MemoryListener
) -> None:
    path = world.listener(path="/run/s")
    assert path.sockets[0].family == socket.AF_UNIX
    world.open[pair.sockets[0]] = Counter({1: 2, 2: 5})
    world.of_paths = Counter({77: 4})
    assert world.counts.active([(0, 1), (1, 77)]) == 6
    assert world.counts.active([(0, 2)]) == 5
    assert world.counts.active([(0, 3)]) == 0
    assert world.counts.active([]) is None


def test_where_the_kernel_does_not_answer_the_number_is_unknown(
    world: World, pair: MemoryListener
) -> None:
    world.fails = errno.EOPNOTSUPP
    assert world.counts.active([(0, 1)]) is None
    world.fails = 0
    world.clock.pass_time(1.0)
    assert world.counts.active([(0, 1)]) == 0
    world.fails = errno.EMFILE
    world.clock.pass_time(1.0)
    assert world.counts.active([(0, 1)]) is None, "the number before is no answer"


def test_a_count_of_one_listener_alone_is_no_count(world: World, pair: MemoryListener) -> None:
    common = world.listener(count=1)
    world.open[pair.sockets[0]] = Counter({1: 2})
    assert world.counts.active([(0, 1), (common.index, 1)]) is None
    assert world.counts.active([(0, 1), (1, NO_TAG)]) is None


def test_queries_take_a_small_share_of_our_time_however_often_status_is_requested(
    world: World, pair: MemoryListener
) -> None:
    world.query_s = 0.5
    counts: list[Any] = []
    for _ in range(1000):
        world.open[pair.sockets[0]] = Counter({1: len(counts)})
        counts.append(world.counts.active([(0, 1)]))
        world.clock.pass_time(0.1)
    passed = world.clock.now - 1000.0
    assert world.queries * 0.5 <= passed * QUERY_SHARE + 0.5
    assert world.queries >= 10
    assert counts == sorted(counts), "in between, the last answer is repeated"
