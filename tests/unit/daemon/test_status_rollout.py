"""The field `rollout` of a status: stage, share, connections, and who is waited for."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from socketprotector_client import wire

from socketprotector.core.events import (
    ChannelBroken,
    Deadline,
    DeadlinePassed,
    DryRunRequested,
    PromoteRequested,
    ReloadRequested,
    RollbackRequested,
    TimerKind,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import Policy
from socketprotector.daemon.control.rollout import leaving_connections, of_rollout
from socketprotector.daemon.effects import Effects
from socketprotector.daemon.generation import OpenGeneration
from socketprotector.model.records import Counts, WorkerRecord
from socketprotector.model.share import Canary
from socketprotector.system.scoreboard import Board
from tests.unit.conftest import Story

FIVE = Canary(500, 60.0, at_least=100)
ROLLS = Policy(surge=1, drain_timeout_s=9.0)


class Seen:
    """The effects as far as `rollout` reads them."""

    def __init__(self, story: Story) -> None:
        self._story = story
        self.is_due = False
        self.met = 123
        self.left_s = 41.0
        self.boards: dict[int, Any] = {}
        self.records: list[WorkerRecord] = []

    @property
    def found(self) -> dict[str, Any]:
        """The field; {}: there is none."""
        found: dict[str, Any] = self.all_of_it.get("rollout", {})
        return found

    @property
    def all_of_it(self) -> dict[str, Any]:
        fleet = self._story.fleet
        due = time.monotonic() + self.left_s
        opened = {each.number: self._opened(each.number) for each in fleet.generations}
        effects = SimpleNamespace(
            generations=opened,
            delivery=SimpleNamespace(met=lambda _: self.met),
            probing=SimpleNamespace(settle_check_due=self.is_due),
            pool=SimpleNamespace(records=lambda: tuple(self.records)),
            due=lambda: [(each, due) for each in fleet.timers],
        )
        found = cast("Effects", effects)
        return of_rollout(fleet, found, leaving_connections(fleet, found))

    def _opened(self, number: int) -> Any:
        return self.boards.get(number, SimpleNamespace(counts=lambda _: None, board=None))


@pytest.fixture
def seen(story: Story) -> Seen:
    return Seen(story)


def begun(story: Story, policy: Policy, *, workers: int, ready: int) -> None:
    """A reload of so many workers, of which some new ones are ready."""
    story.given_serving(policy, workers=workers).when(ReloadRequested())
    story.and_also(*(WorkerReady(workers + each) for each in range(1, ready + 1)))


def test_without_a_rollout_there_is_no_field(story: Story, seen: Seen) -> None:
    story.given_serving(Policy(settle_s=5.0))
    assert seen.all_of_it == {}
    story.when(ReloadRequested())
    assert seen.all_of_it == {}
    story.when(WorkerReady(2))
    assert story.settling
    assert seen.all_of_it == {}


def test_a_canary_has_a_share_then_all_and_then_serves(story: Story, seen: Seen) -> None:
    begun(story, Policy(canary=FIVE, settle_s=30.0), workers=1, ready=0)
    assert seen.all_of_it == {}, "it has no client yet"

    story.when(WorkerReady(2))
    first = seen.found
    assert first.pop("left_s") == pytest.approx(41, abs=1)
    canary = {"generation": 2, "kind": "canary", "met": 123, "at_least": 100}
    assert first == {**canary, "stage": "share", "share": 5.0}

    story.when(PromoteRequested(met=123))
    assert (seen.found["stage"], seen.found["share"]) == ("all", 100.0)
    story.when_over(TimerKind.SETTLE, 2)
    assert story.serving == {2}
    assert seen.all_of_it == {}


def test_a_canary_that_is_called_off_is_no_rollout(story: Story, seen: Seen) -> None:
    begun(story, Policy(canary=FIVE), workers=1, ready=1)
    assert seen.found["stage"] == "share"
    story.when(RollbackRequested())

    assert seen.all_of_it == {}


def test_a_stage_that_awaits_a_good_check_has_no_end(story: Story, seen: Seen) -> None:
    begun(story, Policy(canary=FIVE, settle_check="http:/"), workers=1, ready=1)
    assert seen.found["left_s"] is not None
    seen.is_due = True

    assert seen.found["left_s"] is None


def test_a_rolling_reload_names_its_stage_and_how_far_it_is(story: Story, seen: Seen) -> None:
    begun(story, Policy(surge=1, drain_timeout_s=9.0, settle_s=5.0), workers=3, ready=0)
    rolling = {"generation": 2, "kind": "rolling", "wanted": 3}
    assert seen.found == {
        **rolling,
        "stage": "starting",
        "share": 0.0,
        "met": 123,
        "left_s": None,
        "replaced": 0,
        "waits_for": [],
    }

    story.when(WorkerReady(4))
    first = seen.found
    assert (first["stage"], first["share"], first["replaced"]) == ("settling", 25.0, 1)
    assert first["left_s"] == pytest.approx(41, abs=1)

    story.when(DeadlinePassed(Deadline(TimerKind.SETTLE, 2)))
    later = seen.found
    assert (later["stage"], later["left_s"]) == ("replacing", None)
    assert later["waits_for"] == [{"worker": 3, "generation": 1, "active": None, "oldest_s": None}]

    story.when(WorkerExited(3, ""))
    assert seen.found["waits_for"] == [], "a new worker starts, and none is waited for"


def test_the_first_worker_waits_for_one_of_an_earlier_generation(story: Story, seen: Seen) -> None:
    begun(story, ROLLS, workers=1, ready=1)
    assert (story.draining, story.serving) == ({1}, {2})
    story.when(ReloadRequested())

    assert (seen.found["generation"], seen.found["stage"]) == (3, "starting")
    assert seen.found["waits_for"] == [
        {"worker": 1, "generation": 1, "active": None, "oldest_s": None}
    ]
    story.when(WorkerExited(1, ""))
    assert seen.found["waits_for"] == []


def test_all_clients_are_those_of_the_new_generation_once_the_old_one_has_failed(
    story: Story, seen: Seen
) -> None:
    begun(story, ROLLS, workers=3, ready=1)
    assert seen.found["share"] < 100
    story.when(ChannelBroken(1))

    assert (seen.found["share"], seen.found["stage"]) == (100.0, "replacing")
    assert [each["worker"] for each in seen.found["waits_for"]] == [1, 2, 3]


def test_a_dry_run_is_no_rollout(story: Story, seen: Seen) -> None:
    story.given_serving(ROLLS, workers=2).when(DryRunRequested())
    assert story.starting

    assert seen.all_of_it == {}


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board.make()
    yield made
    made.close()


def _counts(active: int) -> Counts:
    return Counts(accepted=active, active=active)


def accepted(board: Board, slot: int, times: dict[int, int]) -> None:
    """Write when a worker has accepted each of its descriptors."""
    for fd, ns in times.items():
        at = slot * wire.BOARD_BYTES + 8 * (wire.BOARD_ACCEPTED_AT + fd)
        os.pwrite(board.fd, struct.pack("Q", ns), at)


@pytest.mark.parametrize(
    ("active", "oldest_s"),
    [(2, 20.0), (3, None), (1, None), (0, None), (101, None)],
)
def test_the_oldest_of_the_connections_that_are_waited_for(
    story: Story, seen: Seen, board: Board, active: int, oldest_s: float | None
) -> None:
    begun(story, ROLLS, workers=2, ready=1)
    [waited_for] = seen.found["waits_for"]
    assert waited_for["worker"] == 2
    slot = story.fleet[1].worker(2).slot  # type: ignore[union-attr]
    now = time.monotonic_ns()
    ours, theirs = socket.socketpair()
    with ours, theirs, open(os.devnull, "rb") as file:
        # What ended before has left a time, too.
        times = {ours.fileno(): 1, theirs.fileno(): 20, file.fileno(): 40, 250: 60}
        accepted(board, slot, {fd: now - 10**9 * s for fd, s in times.items()})
        opened = SimpleNamespace(board=board, counts=lambda _: _counts(active))
        seen.boards = {1: cast("OpenGeneration", opened)}
        seen.records = [WorkerRecord(2, 1, os.getpid(), -1)]
        [waited_for] = seen.found["waits_for"]

    assert waited_for["active"] == active
    assert waited_for["oldest_s"] == (oldest_s and pytest.approx(oldest_s, abs=5))


@pytest.mark.parametrize(
    "first", [(), (0, 0, 0, 0), (101, 101, 101, 101)], ids=["few", "none", "many"]
)
def test_at_most_four_workers_with_few_connections_have_the_age_of_their_oldest(
    story: Story, seen: Seen, board: Board, first: tuple[int, ...]
) -> None:
    """To find the age costs a call for each of a worker's descriptors; others cost nothing."""
    active = [*first, *[1] * (9 - len(first))]
    begun(story, ROLLS, workers=9, ready=1)
    story.when(ChannelBroken(1))
    now = time.monotonic_ns()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for slot in range(9):
            accepted(board, slot, {ours.fileno(): now})

        def counts(slot: int) -> Counts:
            return _counts(active[slot])

        seen.boards = {1: cast("OpenGeneration", SimpleNamespace(board=board, counts=counts))}
        seen.records = [WorkerRecord(number, 1, os.getpid(), -1) for number in range(1, 10)]
        found = seen.found["waits_for"]

    aged = [each["worker"] for each in found if each["oldest_s"] is not None]
    assert [each["active"] for each in found] == active
    assert aged == list(range(len(first) + 1, len(first) + 5))
