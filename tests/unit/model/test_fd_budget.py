"""How many workers the limit of descriptors has room for, and what is said where it has not."""

from __future__ import annotations

from typing import Any

from socketprotector.model import fd_budget
from socketprotector.model.policy import Policy
from socketprotector.model.settings import Settings
from tests.together import together

NO_LIMIT = -1


def settings(**given: Any) -> Settings:
    command = given.pop("command", ("./daemon",))
    return Settings("web", command, "/", **given)


@together(
    ("given", "each"),
    [
        ({}, 4),
        ({"log_relay": False}, 3),
        ({"handoff": "listener"}, 4),
        ({"handoff": "listener", "ready": "any"}, 5),
        ({"ready": "ack"}, 5),
        ({"ready": "fd", "ready_fd": 3}, 5),
        ({"handoff": "listener", "ready": "any", "command": ("node", "{fd:ready}")}, 6),
    ],
)
def test_a_worker_takes_what_it_is_asked_for_by(given: dict[str, Any], each: int) -> None:
    assert fd_budget.of_a_worker(settings(**given)) == each


def test_as_many_as_there_is_room_for_are_not_refused_and_one_more_is() -> None:
    most = fd_budget.most(settings(), 1024)

    assert fd_budget.refused(settings(), most, 1024) is None
    said = fd_budget.refused(settings(), most + 1, 1024)
    assert said is not None
    assert f"{most + 1} workers need 4 descriptors each" in said
    assert f"the hard limit of 1024 has room for {most} workers;" in said
    assert "ulimit -Hn" in said


def test_with_a_relay_there_is_room_for_what_ended_workers_leave() -> None:
    with_relay, without = settings(), settings(log_relay=False, ready="ack")

    room = fd_budget.most(without, 1024) - fd_budget.most(with_relay, 1024)
    assert room * fd_budget.of_a_worker(with_relay) == fd_budget.LEFT_BEHIND


def test_one_worker_is_never_refused() -> None:
    assert fd_budget.refused(settings(), 1, 10) is None


def test_where_there_is_no_limit_nothing_is_refused() -> None:
    assert fd_budget.refused(settings(), 1_000_000, NO_LIMIT) is None
    assert fd_budget.doubtful(settings(), 1_000_000, NO_LIMIT) is None


def test_it_is_said_where_those_of_a_reload_have_no_room_beside_them() -> None:
    half = fd_budget.most(settings(), 1024) // 2

    assert fd_budget.doubtful(settings(), half, 1024) is None
    said = fd_budget.doubtful(settings(), half + 1, 1024)
    assert said is not None
    assert "a reload starts as many new ones first" in said
    assert "--reload-order rolling or stop-first" in said


def test_a_reload_that_stops_first_needs_no_room_beside_them() -> None:
    stops_first = settings(policy=Policy(stop_first=True))

    assert fd_budget.doubtful(stops_first, fd_budget.most(stops_first, 1024), 1024) is None


@together(
    ("surge", "surge_is_percent", "workers", "more"),
    [(1, False, 239, 1), (20, False, 220, 20), (100, True, 120, 121), (25, True, 192, 49)],
)
def test_a_rolling_reload_needs_room_for_its_surge(
    surge: int, surge_is_percent: bool, workers: int, more: int
) -> None:
    rolls = settings(policy=Policy(surge=surge, surge_is_percent=surge_is_percent))
    assert fd_budget.most(rolls, 1024) == 240

    assert fd_budget.doubtful(rolls, workers, 1024) is None
    said = fd_budget.doubtful(rolls, workers + 1, 1024)
    assert said is not None
    assert f"{workers + 1} workers: a reload starts {more} more first, for which" in said
    assert "lower --workers or --surge" in said
    assert "--reload-order" not in said
