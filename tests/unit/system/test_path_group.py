"""The sockets of a UNIX path as a value, against a model of the kernel and the file system."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from socketprotector.model.lazy_dataclass import replace
from socketprotector.system import path_group
from socketprotector.system.path_group import (
    MADE,
    MISSING,
    RESERVE,
    Bind,
    PathGroup,
    RemoveFile,
    RemovePath,
)
from tests.rounds import rounds
from tests.unit.system.path_group_model import COMMON, EVENTS, World


def after(world: World, name: str, killed: set[Any]) -> Iterator[tuple[str, World]]:
    """Yield the worlds after an event: undisturbed, with a kill or a client at each call.

    killed: the states that a kill has left already.
    """
    made = world.copy()
    made.killed = []
    made.happens(name)
    yield name, made
    for at in made.moments.values():
        with_client = world.copy()
        with_client.comes_at = at
        with_client.happens(name)
        yield f"{name}, client at {at}", with_client
    for at, left in enumerate(made.killed):
        if (state := left.state) not in killed:
            killed.add(state)
            left.path_before = None
            left.happens("restart")
            yield f"{name}, killed at {at}", left
    made.killed, made.moments = None, {}


def search(events: Iterable[str], depth: int) -> int:
    """Try all sequences of events of a length; return how many states they reach."""
    first = World()
    reached: dict[Any, tuple[World, tuple[str, ...]]] = {first.state: (first, ())}
    seen, killed = set(reached), set[Any]()
    for _ in range(depth):
        found: dict[Any, tuple[World, tuple[str, ...]]] = {}
        for world, so_far in reached.values():
            for name in events:
                try:
                    for what, following in after(world, name, killed):
                        state = following.state
                        if state not in seen:
                            seen.add(state)
                            found[state] = following, (*so_far, what)
                            following.copy().check_end()
                except Exception as error:
                    raise AssertionError(f"{[*so_far, name]}: {error!r}") from error
        reached = found
    return len(seen)


@pytest.mark.costly
def test_in_all_sequences_of_common_events_no_client_is_lost() -> None:
    """The path leads where it is to lead, also in the program after a kill, and nothing is left."""
    assert len(COMMON) == 10
    assert search(COMMON, rounds(4, 6)) > rounds(900, 3000)


def test_in_all_sequences_of_fewer_events_of_all_kinds_no_client_is_lost() -> None:
    assert len(EVENTS) == 20
    assert search(EVENTS, rounds(3, 4)) > rounds(1000, 3000)


def withdraws_all(self: PathGroup, member: int) -> path_group.Plan:
    return (RemoveFile(member),)


def renews_a_busy_one(self: PathGroup, number: int) -> path_group.Plan:
    return RENEW(replace(self, waiting=frozenset()), number)


def renews_the_target(self: PathGroup, number: int) -> path_group.Plan:
    return RENEW(replace(self, leads_to=1 - number), number)


def renews_none(self: PathGroup, number: int) -> path_group.Plan:
    return ()


def binds_without_leading(self: PathGroup, number: int) -> path_group.Plan:
    return Bind(MADE), *self._put(MADE, number)


def adopts_at_once(self: PathGroup, number: int, *, led: bool = False) -> path_group.Plan:
    if RESERVE not in self.members:
        return ()
    return *self.lead_to(RESERVE), *replace(self, leads_to=RESERVE)._put(RESERVE, number)


def adopts_at_a_busy_one(self: PathGroup, number: int, *, led: bool = False) -> path_group.Plan:
    return ADOPT(replace(self, waiting=frozenset()), number, led=led)


def adopts_after_leading(self: PathGroup, number: int, *, led: bool = False) -> path_group.Plan:
    waiting = frozenset[int]() if led else self.waiting
    return ADOPT(replace(self, waiting=waiting), number, led=led)


def holds_nothing(self: PathGroup, number: int, *, held: bool) -> path_group.Plan:
    return STEER(self, number, held=False)


def removes_the_path_first(self: PathGroup, member: int) -> path_group.Plan:
    removed = (RemovePath(),) if self.leads_to != MISSING else ()
    return *removed, *LEAD(replace(self, leads_to=MISSING), member)


def removes_the_path_alone(self: PathGroup) -> path_group.Plan:
    return (RemovePath(),) if self.leads_to != MISSING else ()


RENEW, ADOPT, STEER, LEAD = (
    PathGroup.renew,
    PathGroup.adopt_reserve,
    PathGroup.steer,
    PathGroup.lead_to,
)


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (PathGroup, "withdraw", withdraws_all),
        (PathGroup, "renew", renews_a_busy_one),
        (PathGroup, "renew", renews_the_target),
        (PathGroup, "renew", renews_none),
        (PathGroup, "bind_anew", binds_without_leading),
        (PathGroup, "adopt_reserve", adopts_at_once),
        (PathGroup, "adopt_reserve", adopts_at_a_busy_one),
        pytest.param(PathGroup, "adopt_reserve", adopts_after_leading, marks=pytest.mark.costly),
        (PathGroup, "steer", holds_nothing),
        (PathGroup, "lead_to", removes_the_path_first),
        (PathGroup, "remove", removes_the_path_alone),
        (PathGroup, "keep", lambda self: ()),
        (PathGroup, "reserve_is_lost", property(lambda self: False)),
        (PathGroup, "is_out_of_reach", lambda self, number: not self.can_lead_to(number)),
        (PathGroup, "_check_path", lambda self: None),
        (PathGroup, "_remove_leftovers", lambda self: ()),
        (path_group, "undo", lambda done: ()),
    ],
)
def test_a_wrong_rule_is_found(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, wrong: Any
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError):
        search(EVENTS, 4)
