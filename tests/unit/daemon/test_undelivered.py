"""Connections that were accepted and not sent: what is written down of them, and when."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from socketprotector_client import wire

from socketprotector.daemon.delivery.queue.undelivered import Undelivered, listener_of
from socketprotector.system.inherited import Inherited


class World:
    """What would be in the state, and in the store, at each time that it was written."""

    def __init__(self) -> None:
        self.writable = True
        self.states: list[tuple[int, tuple[tuple[int, bytes], ...]]] = []
        self.names: list[set[str]] = []
        self.kept = Undelivered(self._persist)

    def _persist(self) -> bool:
        if self.writable:
            kept = self.kept
            self.states.append((kept.number, kept.waiting))
            self.names.append(set(kept.descriptors()))
        return self.writable


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.kept.drop(any_listener)


def came_by(listener: int) -> tuple[bytes, int]:
    header = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, listener, 0, 0)
    return header, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def any_listener(index: int) -> bool:
    return True


def test_one_that_is_taken_to_be_sent_is_out_of_the_state_before(world: World) -> None:
    world.kept.keep_first(*came_by(0))
    ((_, before),) = world.states
    assert before

    taken = world.kept.take(any_listener)

    assert taken is not None
    assert (world.states[-1][1], world.names[-1]) == ((), set())
    os.close(taken[1])


def test_one_is_not_given_away_where_that_cannot_be_written_down(world: World) -> None:
    world.kept.keep_first(*came_by(3))
    names = set(world.kept.descriptors())
    world.writable = False

    assert world.kept.take(any_listener) is None

    assert set(world.kept.descriptors()) == names
    world.writable = True
    taken = world.kept.take(any_listener)
    assert taken is not None
    os.close(taken[1])


def test_one_that_failed_goes_first_and_others_wait_for_a_route_that_knows_them(
    world: World,
) -> None:
    world.kept.keep_last(*came_by(1))
    world.kept.keep_last(*came_by(0))
    world.kept.keep_first(*came_by(2))

    order = []
    for knows in ({0}.__contains__, any_listener, any_listener):
        taken = world.kept.take(knows)
        assert taken is not None
        order.append(listener_of(taken[0]))
        os.close(taken[1])

    assert order == [0, 2, 1]
    assert not world.kept.has(any_listener)


def test_those_taken_back_come_in_their_order_before_those_kept_before(world: World) -> None:
    world.kept.keep_last(*came_by(4))
    number = world.kept.number
    for listener in (1, 2):
        world.kept.keep_older(*came_by(listener), number)
    world.kept.keep_first(*came_by(0))
    world.kept.keep_last(*came_by(5))
    world.kept.keep_older(*came_by(3), number)

    assert [listener_of(header) for _, header in world.kept.waiting] == [0, 1, 2, 3, 4, 5]
    assert world.states[-1][1] == world.kept.waiting


def test_no_connection_has_the_number_of_an_earlier_one(world: World) -> None:
    numbers: dict[str, int] = {}  # name -> descriptor
    sent = []  # and left open until the end, so that no descriptor is another one's
    for _ in range(3):
        world.kept.keep_first(*came_by(0))
        world.kept.keep_last(*came_by(1))
        for name, fd in world.kept.descriptors().items():
            assert numbers.setdefault(name, fd) == fd
        taken = world.kept.take({1}.__contains__)
        assert taken is not None
        sent.append(taken[1])
    earlier = {name for each in world.names for name in each}

    after = Undelivered(lambda: True)
    after.adopt(world.kept.number, (), Inherited({}))
    after.keep_first(*came_by(0))

    assert not after.descriptors().keys() & earlier
    after.drop(any_listener)
    for fd in sent:
        os.close(fd)


def test_the_next_program_has_the_same_ones_in_the_same_order(world: World) -> None:
    for listener in (1, 2, 1):
        world.kept.keep_last(*came_by(listener))
    world.kept.keep_first(*came_by(0))
    after = Undelivered(lambda: True)

    left = Inherited({n: os.dup(fd) for n, fd in world.kept.descriptors().items()})
    assert after.adopt(*world.states[-1], left) == 0

    assert after.waiting == world.states[-1][1]
    assert after.number > world.kept.number
    assert after.descriptors().keys() == world.kept.descriptors().keys()
    assert after.drop(any_listener) == 4


def test_one_whose_descriptor_was_not_stored_in_time_is_lost(world: World) -> None:
    world.kept.keep_last(*came_by(1))
    world.kept.keep_first(*came_by(0))
    after = Undelivered(lambda: True)

    assert after.adopt(*world.states[-1], Inherited({})) == 2

    assert (after.waiting, after.descriptors()) == ((), {})
    assert after.number > world.kept.number


def test_one_that_was_sent_and_is_still_in_the_store_is_not_lost(world: World) -> None:
    world.kept.keep_last(*came_by(0))
    stored = {name: os.dup(fd) for name, fd in world.kept.descriptors().items()}
    taken = world.kept.take(any_listener)
    assert taken is not None
    os.close(taken[1])

    assert Undelivered(lambda: True).adopt(*world.states[-1], Inherited(stored)) == 0


def test_no_number_is_used_again_that_two_killed_programs_have_stored(world: World) -> None:
    world.kept.keep_last(*came_by(1))
    known = world.states[-1]
    # Each of two programs has stored a descriptor, and was killed before it wrote its state.
    killed = [world.kept.number + 1, world.kept.number + 2]
    names = {f"sp.hand.{number}": os.open(os.devnull, os.O_RDONLY) for number in killed}
    kept = {name: os.dup(fd) for name, fd in world.kept.descriptors().items()}
    after = Undelivered(lambda: True)

    assert after.adopt(*known, Inherited({**kept, **names})) == 2
    after.keep_last(*came_by(0))

    assert not after.descriptors().keys() & names.keys()
    assert after.drop(any_listener) == 2
    for fd in names.values():
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.close(fd)  # closed already
