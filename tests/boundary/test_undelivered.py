"""Connections that were accepted and not sent: what is written down of them, and when."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from socketprotector_client import wire

from socketprotector.daemon.undelivered import Undelivered
from socketprotector.system.channel import Channel
from socketprotector.system.inherited import Inherited


class World:
    """What would be in the state, and in the store, at each time that it was written."""

    def __init__(self) -> None:
        self.writable = True
        self.states: list[tuple[bytes | None, int, tuple[tuple[int, bytes], ...]]] = []
        self.names: list[set[str]] = []
        self.kept = Undelivered(self._persist)

    def _persist(self) -> bool:
        if self.writable:
            kept = self.kept
            self.states.append((kept.pending_header, kept.number, kept.parked))
            self.names.append(set(kept.descriptors()))
        return self.writable


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.kept.close()


def came_by(listener: int) -> tuple[bytes, int]:
    header = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, listener, 0, 0)
    return header, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def route(*knows: int) -> Channel:
    made = Channel.make(1)
    made.close()
    made.knows = frozenset(knows)
    return made


def test_one_that_is_taken_to_be_sent_is_out_of_the_state_before(world: World) -> None:
    world.kept.keep(*came_by(0))
    (before,) = {header for header, _, _ in world.states}
    assert before

    taken = world.kept.take()

    assert taken is not None
    assert (world.states[-1][0], world.names[-1]) == (None, set())
    os.close(taken[1])


@pytest.mark.parametrize("parked", [False, True])
def test_one_is_not_given_away_where_that_cannot_be_written_down(
    world: World, *, parked: bool
) -> None:
    (world.kept.park if parked else world.kept.keep)(*came_by(3))
    names = set(world.kept.descriptors())
    world.writable = False

    assert (world.kept.take_parked(3) if parked else world.kept.take()) is None

    assert set(world.kept.descriptors()) == names
    world.writable = True
    taken = world.kept.take_parked(3) if parked else world.kept.take()
    assert taken is not None
    os.close(taken[1])


def test_no_connection_has_the_number_of_an_earlier_one(world: World) -> None:
    numbers: dict[str, int] = {}  # name -> descriptor
    sent = []  # and left open until the end, so that no descriptor is another one's
    for _ in range(3):
        world.kept.keep(*came_by(0))
        world.kept.park(*came_by(1))
        world.kept.choose(route(1))  # the pending one is parked, the other one has its turn
        for name, fd in world.kept.descriptors().items():
            assert numbers.setdefault(name, fd) == fd
        taken = world.kept.take()
        assert taken is not None
        sent.append(taken[1])
    earlier = {name for each in world.names for name in each}

    after = Undelivered(lambda: True)
    after.adopt(None, world.kept.number, (), Inherited({}))
    after.keep(*came_by(0))

    assert not after.descriptors().keys() & earlier
    after.close()
    for fd in sent:
        os.close(fd)


def test_the_next_program_has_the_same_ones_in_the_same_order(world: World) -> None:
    for listener in (1, 2, 1):
        world.kept.park(*came_by(listener))
    world.kept.keep(*came_by(0))
    after = Undelivered(lambda: True)

    left = Inherited({n: os.dup(fd) for n, fd in world.kept.descriptors().items()})
    after.adopt(*world.states[-1], left)

    assert (after.pending_header, after.number, after.parked) == world.states[-1]
    assert after.descriptors().keys() == world.kept.descriptors().keys()
    assert after.close() == 4


def test_one_whose_descriptor_was_not_stored_in_time_is_forgotten(world: World) -> None:
    world.kept.park(*came_by(1))
    world.kept.keep(*came_by(0))
    after = Undelivered(lambda: True)

    after.adopt(*world.states[-1], Inherited({}))

    assert (after.pending_header, after.parked, after.descriptors()) == (None, (), {})
    assert after.number > world.kept.number
