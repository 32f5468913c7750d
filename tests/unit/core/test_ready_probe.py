"""A generation that is asked before it gets its first client: --ready accept, http:, any."""

from __future__ import annotations

import pytest

from socketprotector.core.actions import (
    CancelTimer,
    Drain,
    Open,
    Probe,
    Quiesce,
    Release,
    Report,
    ReportKind,
    RouteTo,
    Spawn,
    StartTimer,
    StopProbing,
)
from socketprotector.core.decide import resume
from socketprotector.core.events import (
    Answered,
    Deadline,
    DeadlinePassed,
    Launched,
    ReloadRequested,
    ScaleRequested,
    StopRequested,
    TimerKind,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import Policy, State
from socketprotector.core.rollout import room
from socketprotector.model.policy import STANDBY_S
from tests.unit.conftest import Story

DIED = "./daemon exited with status 1"
START_2 = Deadline(TimerKind.START, 2)
#: The default of --handoff listener, and what was asked for.
BESIDE = Policy(workers_accept=True, ready="any")
ALONE = Policy(ready="http")


def test_it_is_asked_once_all_of_its_workers_live(story: Story) -> None:
    story.given(ALONE, workers=2)

    assert story.when(Launched()) == [
        Open(1, fresh=True),
        Spawn(1, worker=1, slot=0),
        Spawn(1, worker=2, slot=1),
        StartTimer(Deadline(TimerKind.START, 1), 60.0),
        Probe(1),
    ]


def test_more_workers_than_are_started_at_once_are_awaited(story: Story) -> None:
    story.given(ALONE, workers=20)

    actions = story.when(Launched())

    assert actions.count(Probe(1)) == 1
    assert actions.index(Probe(1)) > actions.index(Spawn(1, worker=20, slot=19))


def test_the_answer_makes_all_of_its_workers_ready(story: Story) -> None:
    story.given_serving(BESIDE).and_also(ReloadRequested())

    assert story.when(Answered(2)) == [
        CancelTimer(START_2),
        StopProbing(2),
        RouteTo(2),
        StartTimer(Deadline(TimerKind.SETTLE, 2), STANDBY_S),
    ]

    assert [worker.state for worker in story.fleet[2].workers] == [State.READY]
    assert story.fleet[2].workers[0].retires


def test_one_that_has_only_answered_can_be_switched_back_from_for_a_second(story: Story) -> None:
    story.given_serving(BESIDE).and_also(ReloadRequested(), Answered(2))

    assert story.when(WorkerExited(2, DIED)) == [
        CancelTimer(Deadline(TimerKind.SETTLE, 2)),
        RouteTo(1),
        Quiesce(2),
        Report(ReportKind.RELOAD_FAILED, 2, DIED),
        Release(2),
    ]

    assert story.serving == {1}


def test_a_longer_settle_is_kept(story: Story) -> None:
    policy = Policy(workers_accept=True, ready="any", settle_s=30.0)
    story.given_serving(policy)
    story.when_over(TimerKind.SETTLE, 1) if story.settling else None
    story.and_also(ReloadRequested())

    assert StartTimer(Deadline(TimerKind.SETTLE, 2), 30.0) in story.when(Answered(2))


def test_words_of_all_workers_are_as_good_as_the_answer_by_default(story: Story) -> None:
    story.given_serving(BESIDE).and_also(ReloadRequested())

    assert story.when(WorkerReady(2)) == [
        CancelTimer(START_2),
        StopProbing(2),
        RouteTo(2),
        Quiesce(1),
        Report(ReportKind.RELOADED, 2),
    ]


def test_words_of_some_workers_are_not(story: Story) -> None:
    story.given_serving(BESIDE, workers=2).and_also(ReloadRequested())

    assert story.when(WorkerReady(3)) == []
    assert RouteTo(2) in story.when(Answered(2))


def test_no_word_makes_one_ready_that_is_asked_by_wish(story: Story) -> None:
    story.given(ALONE, workers=2).and_also(Launched(), Answered(1), ReloadRequested())

    assert story.when(WorkerReady(3, retires=True)) == []
    assert story.when(WorkerReady(4)) == []
    assert story.when(Answered(2)) == [
        CancelTimer(START_2),
        StopProbing(2),
        RouteTo(2),
        Drain(1),
        Report(ReportKind.RELOADED, 2),
    ]
    assert [worker.retires for worker in story.fleet[2].workers] == [True, False]


def test_the_first_start_has_none_to_go_back_to(story: Story) -> None:
    story.given(BESIDE).and_also(Launched())

    assert story.when(Answered(1)) == [
        CancelTimer(Deadline(TimerKind.START, 1)),
        StopProbing(1),
        RouteTo(1),
        Report(ReportKind.READY, 1),
    ]


def test_the_last_answer_is_told_when_it_was_not_ready_in_time(story: Story) -> None:
    story.given(ALONE).and_also(Launched(), Answered(1), ReloadRequested())
    answer = 'GET /healthz: 500, "database"'

    actions = story.when(DeadlinePassed(START_2, answer))

    reason = f"not ready within 1m (--start-timeout); {answer}"
    assert actions[0] == StopProbing(2)
    assert Report(ReportKind.RELOAD_FAILED, 2, reason) in actions
    assert story.serving == {1}


def test_a_rolling_reload_fails_if_its_first_workers_do_not_pass_the_probe_in_time(
    story: Story,
) -> None:
    """No more processes may run, but it has its workers, so it does not wait for room."""
    policy = Policy(ready="http", surge=1, drain_timeout_s=9.0)
    story.given(policy, workers=2).and_also(Launched(), Answered(1), ReloadRequested())
    story.when(WorkerReady(3))
    assert room(story.fleet, 1, story.fleet[2]) == 0
    answer = 'GET /healthz: 500, "database"'

    actions = story.when(DeadlinePassed(START_2, answer))

    reason = f"not ready within 1m (--start-timeout); {answer}"
    assert Report(ReportKind.RELOAD_FAILED, 2, reason) in actions


@pytest.mark.parametrize(
    "event", [WorkerExited(2, DIED), StopRequested(), StopRequested(quick=True)]
)
def test_it_is_asked_no_more_once_it_is_given_up(
    story: Story, event: WorkerExited | StopRequested
) -> None:
    story.given(ALONE).and_also(Launched(), Answered(1), ReloadRequested())

    assert StopProbing(2) in story.when(event)
    assert story.when(Answered(2)) == []


def test_a_worker_that_is_wanted_meanwhile_is_awaited_and_it_is_asked_again(story: Story) -> None:
    story.given(ALONE).and_also(Launched(), Answered(1), ReloadRequested())

    actions = story.when_at_once(ScaleRequested(+1))
    assert Probe(2) in actions
    assert Spawn(2, worker=3, slot=1) in actions


def test_what_serves_is_not_asked_and_a_late_answer_changes_nothing(story: Story) -> None:
    story.given(ALONE).and_also(Launched(), Answered(1))

    assert Probe(1) not in story.when(ScaleRequested(+1))
    assert story.when(Answered(1)) == []
    assert story.when(Answered(7)) == []


def test_another_program_asks_anew(story: Story) -> None:
    story.given(ALONE).and_also(Launched())
    assert Probe(1) in resume(story.fleet, {})

    story.and_also(Answered(1))
    assert Probe(1) not in resume(story.fleet, {})


def test_an_answer_before_all_of_its_workers_run_decides_nothing(story: Story) -> None:
    story.given(ALONE, workers=20)
    story.when_at_once(Launched())

    assert story.when_at_once(Answered(1)) == []
    assert story.serving == set()


def test_it_is_asked_at_once_where_fewer_workers_are_wanted_by_now(story: Story) -> None:
    story.given(ALONE, workers=20)
    assert Probe(1) not in story.when_at_once(Launched())

    assert Probe(1) in story.when_at_once(ScaleRequested(to=8))
