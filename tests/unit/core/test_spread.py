"""The order to end connections evenly: how long, and when it is given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from socketprotector.core.actions import Action, Drain, EndEvenly, Retire, Spawn
from socketprotector.core.decide import resume
from socketprotector.core.events import (
    BacklogEmptied,
    ChannelBroken,
    Launched,
    Quiesced,
    ReloadRequested,
    ReplaceRequested,
    ScaleRequested,
    SettingsRead,
    StopRequested,
    TimerKind,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import Policy
from tests.unit.conftest import Story

CRASHED = "killed by SIGSEGV"
BOTH = Policy(drain_spread_s=6.0, stop_spread_s=3.0, drain_timeout_s=9.0)


def orders(actions: list[Action]) -> list[EndEvenly]:
    return [each for each in actions if isinstance(each, EndEvenly)]


def test_nothing_is_ordered_unless_it_is_configured(story: Story) -> None:
    story.given_serving(workers=2)

    assert not orders(story.when(ScaleRequested(-1)))
    story.when(ReloadRequested())
    assert not orders(story.when(WorkerReady(3)))
    assert not orders(story.when(StopRequested()))


def test_a_replaced_generation_is_ordered_before_it_drains(story: Story) -> None:
    story.given_serving(BOTH).when(ReloadRequested())

    actions = story.when(WorkerReady(2))

    assert actions.index(EndEvenly(1, 0, 6.0)) == actions.index(Drain(1)) - 1


def test_at_a_stop_draining_generations_have_less_time(story: Story) -> None:
    story.given_serving(BOTH).and_also(ReloadRequested(), WorkerReady(2))

    assert orders(story.when(StopRequested())) == [EndEvenly(1, 0, 3.0)]
    assert orders(story.when(BacklogEmptied())) == [EndEvenly(2, 0, 3.0)]


def test_without_a_time_for_a_stop_it_ends_nothing_more(story: Story) -> None:
    policy = Policy(drain_spread_s=6.0)
    story.given_serving(policy).and_also(ReloadRequested(), WorkerReady(2))

    assert not orders(story.when(StopRequested()))
    assert orders(story.when(BacklogEmptied())) == [EndEvenly(2, 0, 0.0)]


def test_without_a_time_for_a_drain_a_reload_ends_nothing(story: Story) -> None:
    story.given_serving(Policy(stop_spread_s=3.0)).when(ReloadRequested())

    assert orders(story.when(WorkerReady(2))) == [EndEvenly(1, 0, 0.0)]


def test_where_workers_accept_the_time_begins_with_the_drain(story: Story) -> None:
    story.given_serving(Policy(drain_spread_s=6.0, workers_accept=True)).when(ReloadRequested())

    assert not orders(story.when(WorkerReady(2)))
    assert orders(story.when(Quiesced(1))) == [EndEvenly(1, 0, 6.0)]


def test_a_single_worker_that_leaves_has_the_whole_time(story: Story) -> None:
    story.given(BOTH, workers=4)
    story.and_also(Launched(), *(WorkerReady(n, retires=True) for n in range(1, 5)))

    actions = story.when(ScaleRequested(-1))

    assert actions.index(EndEvenly(1, 4, 6.0)) == actions.index(Retire(4)) - 1


@pytest.mark.parametrize(
    ("surge", "percent", "part_s"), [(1, False, 1.5), (2, False, 3.0), (100, True, 6.0)]
)
def test_under_rolling_each_worker_has_its_part(
    story: Story, surge: int, percent: bool, part_s: float
) -> None:
    policy = Policy(surge=surge, surge_is_percent=percent, drain_spread_s=6.0, drain_timeout_s=9.0)
    assert policy.spread_part_s(1, 4) == part_s
    assert policy.spread_part_s(4, 4) == 6.0
    assert policy.spread_part_s(9, 4) == 6.0


def test_a_rolling_reload_orders_parts(story: Story) -> None:
    policy = Policy(surge=1, drain_spread_s=6.0, drain_timeout_s=9.0)
    story.given_serving(policy, workers=4).when(ReloadRequested())

    [order] = orders(story.when(WorkerReady(5)))

    assert (order.generation, order.worker > 0, order.seconds) == (1, True, 1.5)


def test_no_order_is_longer_than_the_limit_of_the_drain(story: Story) -> None:
    """A reload may have read a shorter one."""
    story.given_serving(Policy(drain_spread_s=60.0, drain_timeout_s=9.0)).when(ReloadRequested())

    assert orders(story.when(WorkerReady(2))) == [EndEvenly(1, 0, 9.0)]


def test_a_replaced_worker_is_ordered_to_end_its_connections(story: Story) -> None:
    story.given_serving(BOTH).when(ReplaceRequested(1, "old"))

    assert EndEvenly(1, 1, 6.0) in story.when(WorkerReady(2))


def test_the_next_program_orders_it_again(story: Story) -> None:
    story.given_serving(BOTH).and_also(ReloadRequested(), WorkerReady(2))

    actions = resume(story.fleet, {})

    assert orders(list(actions)) == [EndEvenly(1, 0, 6.0)]
    assert TimerKind.DRAIN in [each.wait for each in story.fleet.timers]


def test_a_generation_that_breaks_has_the_time_of_all_its_workers(story: Story) -> None:
    policy = Policy(surge=1, drain_spread_s=6.0, drain_timeout_s=9.0)
    story.given_serving(policy, workers=4)

    assert orders(story.when(ChannelBroken(1))) == [EndEvenly(1, 0, 6.0)]


def test_a_reload_may_read_the_time_for_the_workers_it_replaces(story: Story) -> None:
    story.given_serving(Policy(surge=1), workers=4)
    story.fleet = replace(story.fleet, configured=True)
    story.and_also(ReloadRequested())
    story.and_also(SettingsRead(Policy(surge=1, drain_spread_s=6.0)))

    [order] = orders(story.when(WorkerReady(5)))

    assert (order.worker > 0, order.seconds) == (True, 1.5)


def test_a_worker_that_replaces_a_crashed_one_of_a_draining_generation_is_ordered_too(
    story: Story,
) -> None:
    story.given_serving(BOTH).and_also(StopRequested(), BacklogEmptied())

    actions = story.when(WorkerExited(1, CRASHED, waiting=3))

    assert actions[actions.index(Spawn(1, worker=2, slot=0)) + 1] == EndEvenly(1, 2, 3.0)
    assert not orders(story.when(WorkerReady(2)))


def test_a_worker_that_replaces_a_crashed_one_of_a_serving_generation_is_not(
    story: Story,
) -> None:
    story.given_serving(BOTH)
    assert not orders(story.when(WorkerExited(1, CRASHED)))


def test_a_stop_within_a_second_is_spread_too(story: Story) -> None:
    story.given_serving(Policy(stop_spread_s=1.0)).and_also(ReloadRequested(), WorkerReady(2))

    assert orders(story.when(StopRequested())) == [EndEvenly(1, 0, 1.0)]


def test_a_quick_stop_gives_a_draining_generation_no_other_time(story: Story) -> None:
    story.given_serving(BOTH).and_also(ReloadRequested(), WorkerReady(2))

    assert EndEvenly(1, 0, 3.0) not in story.when(StopRequested(quick=True))
