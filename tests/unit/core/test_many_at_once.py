"""Thousands of workers are started, or let go, a few at a time: what comes meanwhile is heard.

And what has not been started by then never is.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from socketprotector.core.actions import Action, Open, Retire, RouteTo, Signal, Spawn, StartTimer
from socketprotector.core.decide import resume
from socketprotector.core.events import (
    Deadline,
    DeadlinePassed,
    Event,
    Launched,
    ReloadRequested,
    ReplaceRequested,
    ScaleRequested,
    StopRequested,
    TimeExtended,
    TimerKind,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import Policy
from socketprotector.core.workers import AT_ONCE
from socketprotector.model.share import Canary
from tests.unit.conftest import TURN, Story

THOUSANDS = 99_999
KILLED = "killed by SIGKILL"


def count(actions: list[Action], kind: type[Action] = Spawn) -> int:
    return sum(isinstance(each, kind) for each in actions)


def turned(story: Story) -> list[Action]:
    """Let the loop turn once."""
    return story.when_at_once(DeadlinePassed(TURN))


def served_by(story: Story, workers: int) -> Story:
    """Serve with so many, each of which retires by itself."""
    story.given(Policy(), workers=workers).and_also(Launched())
    return story.and_also(*(WorkerReady(n, retires=True) for n in range(1, workers + 1)))


@pytest.mark.parametrize("event", [Launched(), ScaleRequested(to=THOUSANDS)], ids=repr)
def test_only_a_few_are_started_until_the_loop_turns(story: Story, event: Event) -> None:
    if isinstance(event, Launched):
        story.given(Policy(), workers=THOUSANDS)
    else:
        story.given_serving()

    assert 0 < count(story.when_at_once(event)) <= AT_ONCE
    assert 0 < count(turned(story)) <= AT_ONCE


def test_each_event_of_one_turn_does_not_start_a_few_more(story: Story) -> None:
    served_by(story, 40)

    gone = [story.when_at_once(WorkerExited(n, KILLED, 20.0)) for n in range(1, 41)]

    assert sum(map(count, gone)) <= AT_ONCE
    assert count(turned(story)) <= AT_ONCE


def test_workers_that_exit_in_one_turn_while_the_next_generation_settles_start_a_few_at_a_time(
    story: Story,
) -> None:
    served_by(story, 40)
    story.fleet = replace(story.fleet, policy=Policy(settle_s=5.0))
    story.and_also(ReloadRequested(), *map(WorkerReady, range(41, 81)))
    assert (story.serving, story.settling) == ({1}, {2})

    gone = [story.when_at_once(WorkerExited(n, KILLED, 20.0)) for n in range(1, 41)]

    assert 0 < sum(map(count, gone)) <= AT_ONCE
    assert 0 < count(turned(story)) <= AT_ONCE


def test_those_that_are_all_too_old_at_the_same_time_are_replaced_a_few_at_a_time(
    story: Story,
) -> None:
    served_by(story, 40)

    asked = [story.when_at_once(ReplaceRequested(n, "too old")) for n in range(1, 41)]

    assert sum(map(count, asked)) <= AT_ONCE
    story.when(DeadlinePassed(TURN))
    assert len(story.fleet.generations[0].workers) == 80


def test_all_that_are_wanted_come_in_the_end(story: Story) -> None:
    story.given(Policy(), workers=100)

    actions = story.when(Launched())

    assert [a.slot for a in actions if isinstance(a, Spawn)] == [*range(100)]
    story.and_also(*(WorkerReady(number) for number in range(1, 101)))
    assert story.serving == {1}


def test_a_start_has_its_time_from_its_last_worker_on(story: Story) -> None:
    story.given(Policy(start_timeout_s=7.0), workers=2 * AT_ONCE)

    timers = [a for a in story.when(Launched()) if isinstance(a, StartTimer)]

    start = Deadline(TimerKind.START, 1)
    assert timers == [StartTimer(start, 7.0), StartTimer(start, 7.0, extend=True)]


def test_a_generation_serves_when_its_last_worker_is_ready_not_those_started_so_far(
    story: Story,
) -> None:
    story.given(Policy(), workers=AT_ONCE + 1)
    story.when_at_once(Launched())

    for number in range(1, AT_ONCE + 1):
        assert story.when_at_once(WorkerReady(number)) == []
    turned(story)
    assert RouteTo(1) in story.when(WorkerReady(AT_ONCE + 1))


@pytest.mark.parametrize("quick", [False, True], ids=["graceful", "quick"])
def test_a_stop_calls_off_those_of_a_start_that_are_still_to_come(
    story: Story, quick: bool
) -> None:
    story.given(Policy(), workers=THOUSANDS)
    started = count(story.when_at_once(Launched()))

    actions = story.when(StopRequested(quick=quick))

    assert (count(actions), count(actions, Signal)) == (0, started)
    for number in range(1, started + 1):
        actions = story.when(WorkerExited(number, KILLED))
        assert count(actions) == 0
    assert story.fleet.exiting
    assert story.fleet.timers == set()


@pytest.mark.parametrize("quick", [False, True], ids=["graceful", "quick"])
def test_a_stop_calls_off_those_that_a_number_asked_for(story: Story, quick: bool) -> None:
    story.given_serving().when_at_once(ScaleRequested(to=THOUSANDS))

    assert count(story.when(StopRequested(quick=quick))) == 0


def test_a_smaller_number_calls_off_the_rest_of_a_larger_one(story: Story) -> None:
    story.given_serving().when_at_once(ScaleRequested(to=THOUSANDS))

    actions = story.when(ScaleRequested(to=2))

    assert count(actions) == 0
    staying = [w for w in story.fleet.generations[0].workers if w.state.value != "retiring"]
    assert len(staying) == 2


def test_a_smaller_number_has_a_start_be_over_with_those_that_there_are(story: Story) -> None:
    story.given(Policy(), workers=THOUSANDS)
    story.when_at_once(Launched())
    for number in range(1, AT_ONCE + 1):
        story.when_at_once(WorkerReady(number, retires=True))

    actions = story.when(ScaleRequested(to=2))

    assert RouteTo(1) in actions
    assert (count(actions), count(actions, Retire)) == (0, AT_ONCE - 2)


def test_a_reload_opens_its_generation_before_the_one_that_serves_has_grown(story: Story) -> None:
    story.given_serving(workers=2).when_at_once(ScaleRequested(to=THOUSANDS))

    assert Open(2, fresh=True) in story.when_at_once(ReloadRequested())
    assert {a.generation for a in turned(story) if isinstance(a, Spawn)} == {2}


def test_a_dead_worker_is_replaced_before_a_generation_that_starts_has_all(story: Story) -> None:
    served_by(story, 1)
    story.when_at_once(ScaleRequested(to=THOUSANDS))
    story.when_at_once(ReloadRequested())

    story.when_at_once(WorkerExited(1, KILLED, 20.0))

    first = next(each for each in turned(story) if isinstance(each, Spawn))
    assert (first.generation, first.slot) == (1, 0)


def test_many_are_let_go_a_few_at_a_time(story: Story) -> None:
    served_by(story, 40)

    assert count(story.when_at_once(ScaleRequested(to=1)), Retire) <= AT_ONCE
    story.when(DeadlinePassed(TURN))
    assert len(story.fleet.generations[0].staying) == 1


def test_where_one_was_killed_the_next_program_goes_on_starting_them(story: Story) -> None:
    story.given(Policy(), workers=2 * AT_ONCE)
    story.when_at_once(Launched())

    assert StartTimer(TURN, 0.0) in resume(story.fleet, {})
    assert count(turned(story)) == AT_ONCE


def test_time_that_a_worker_asks_for_is_not_shortened_by_those_that_come_after_it(
    story: Story,
) -> None:
    story.given(Policy(start_timeout_s=7.0), workers=2 * AT_ONCE)
    story.when_at_once(Launched())

    assert story.when_at_once(TimeExtended(1, 90.0)) == [
        StartTimer(Deadline(TimerKind.START, 1), 90.0, extend=True)
    ]
    later = [a for a in turned(story) if isinstance(a, StartTimer) and a.deadline != TURN]
    assert later == [StartTimer(Deadline(TimerKind.START, 1), 7.0, extend=True)]


def test_both_generations_of_a_canary_share_the_starts_of_a_turn(story: Story) -> None:
    served_by(story, 1)
    story.and_also(ReloadRequested(Canary(500, 60.0)), WorkerReady(2))

    more = AT_ONCE - 2
    actions = story.when_at_once(ScaleRequested(more))

    assert [a.generation for a in actions if isinstance(a, Spawn)] == [1] * more + [2, 2]


def test_nothing_is_left_running_when_all_are_there(story: Story) -> None:
    served_by(story, 3 * AT_ONCE)

    assert story.fleet.timers == set()
