"""The group of an address as a value, against a model of the kernel's SO_REUSEPORT group."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from socketprotector.system import reuseport_group as group
from socketprotector.system.reuseport_group import SILENT, Group, Leave
from tests.rounds import rounds
from tests.unit.system.reuseport_group_model import EVENTS, FOREIGN, UNSEEN, World


def search(events: Collection[str] = EVENTS, *, sees: bool = True, most: int = 99) -> int:
    """Try all sequences of up to so many events; return the number of states they reach.

    It ends when no event leads to a new state: after 12 events, or 9 without sock_diag.
    """
    World.left.clear()
    first = World()
    first.sees = sees
    first.steer(first.wanted)
    reached: dict[Any, tuple[World, tuple[str, ...]]] = {first.state: (first, ())}
    seen = set(reached)
    while reached and (most := most - 1) >= 0:
        after: dict[Any, tuple[World, tuple[str, ...]]] = {}
        for world, so_far in reached.values():
            for name in events:
                next_one = world.copy()
                try:
                    next_one.happens(name)
                except Exception as error:
                    raise AssertionError(f"{[*so_far, name]}: {error}") from error
                if next_one.state not in seen:
                    seen.add(next_one.state)
                    after[next_one.state] = next_one, (*so_far, name)
        reached = after
    return len(seen)


def test_in_all_sequences_of_events_clients_come_where_the_value_says() -> None:
    """After each single step, and in the next program where this one is killed after that."""
    assert search(most=rounds(4, 99)) > rounds(600, 2000)


def test_they_do_without_sock_diag() -> None:
    assert search(EVENTS.keys() - UNSEEN, sees=False, most=rounds(5, 99)) > 500


def test_they_do_while_a_foreign_member_comes_and_leaves() -> None:
    """After each event, and in the next program; not where this one is killed after a step."""
    assert search(FOREIGN, most=rounds(4, 99)) > rounds(600, 5000)


def keeps_the_order(order: group.Order, member: int) -> group.Order:
    return tuple(each for each in order if each != member)


def believes(self: Group, listed: group.Order) -> group.Order:
    return listed


def leaves_silence(self: Group) -> group.Plan:
    yield from ()


def ends_silence_at_once(self: Group) -> group.Plan:
    if SILENT in self.listed:
        yield Leave(SILENT)
        self.left(SILENT)


def is_known(self: Group) -> group.Plan:
    self.order = self.listed
    yield from ()


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (group, "_without", keeps_the_order),
        (Group, "_order_of", believes),
        (Group, "_restore_order", is_known),
        (Group, "_end_silence", leaves_silence),
        (Group, "_end_silence", ends_silence_at_once),
        (Group, "_is_silent_placed", lambda self, *, held: True),
        (Group, "_without_silent", property(lambda self: self._order)),
    ],
)
def test_a_wrong_rule_is_found(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, wrong: Any
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError):
        search()


def test_a_next_program_without_the_record_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    unrecorded = property(lambda self: None, lambda self, record: None)
    monkeypatch.setattr(World, "record", unrecorded, raising=False)
    with pytest.raises(AssertionError, match="restart"):
        search(FOREIGN)
