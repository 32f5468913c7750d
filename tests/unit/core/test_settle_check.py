"""--settle-check: a generation that has the route is asked, and loses it at a bad answer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from socketprotector.core.actions import (
    CancelTimer,
    CheckSettling,
    Drain,
    ForgetSettings,
    Quiesce,
    Release,
    Report,
    ReportKind,
    RouteTo,
    StartTimer,
    StopChecking,
)
from socketprotector.core.decide import resume
from socketprotector.core.events import (
    ChannelBroken,
    Deadline,
    ReloadRequested,
    RenewRequested,
    SettingsRead,
    SettleFailed,
    StopRequested,
    TimerKind,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import Policy
from tests.unit.conftest import Story

DIED = "./daemon exited with status 1"
BAD = 'GET /healthz: 500, "database"'
SETTLE_2 = Deadline(TimerKind.SETTLE, 2)
CHECKED = Policy(settle_s=5.0, settle_check="http:/healthz")


@pytest.fixture
def settling(story: Story) -> Story:
    """Generation 2 settles, and is asked; generation 1 stands by."""
    story.given_serving(CHECKED).and_also(ReloadRequested(), WorkerReady(2))
    assert (story.settling, story.serving) == ({2}, {1})
    return story


def test_it_is_asked_from_the_switch_on(story: Story) -> None:
    story.given_serving(CHECKED).and_also(ReloadRequested())

    assert story.when(WorkerReady(2))[1:] == [
        RouteTo(2),
        StartTimer(SETTLE_2, 5.0),
        CheckSettling(2),
    ]


def test_a_first_start_is_not_asked(story: Story) -> None:
    story.given_serving(CHECKED)

    assert (story.serving, story.settling) == ({1}, set())
    assert not story.fleet[1].checked


def test_a_bad_answer_gives_the_route_back_before_anything_else_ends(settling: Story) -> None:
    assert settling.when(SettleFailed(2, BAD)) == [
        CancelTimer(SETTLE_2),
        StopChecking(2),
        RouteTo(1),
        Drain(2),
        Report(ReportKind.RELOAD_FAILED, 2, BAD),
    ]

    assert (settling.serving, settling.draining) == ({1}, {2})


def test_where_workers_accept_it_finishes_what_has_come_to_it(story: Story) -> None:
    story.given_serving(replace(CHECKED, workers_accept=True))
    story.and_also(ReloadRequested(), WorkerReady(2))

    actions = story.when(SettleFailed(2, BAD))

    assert actions.index(RouteTo(1)) < actions.index(Quiesce(2))


def test_a_workers_death_is_as_bad(settling: Story) -> None:
    assert settling.when(WorkerExited(2, DIED)) == [
        CancelTimer(SETTLE_2),
        StopChecking(2),
        RouteTo(1),
        Drain(2),
        Report(ReportKind.RELOAD_FAILED, 2, DIED),
        Release(2),
    ]


def test_it_is_asked_no_more_when_it_serves(settling: Story) -> None:
    assert settling.when_over(TimerKind.SETTLE, 2) == [
        StopChecking(2),
        Drain(1),
        Report(ReportKind.RELOADED, 2),
    ]
    assert settling.when(SettleFailed(2, "too late")) == []
    assert settling.serving == {2}


@pytest.mark.parametrize("quick", [False, True])
def test_nor_while_stopping(settling: Story, quick: bool) -> None:
    assert StopChecking(2) in settling.when(StopRequested(quick))
    assert settling.when(SettleFailed(2, "too late")) == []


def test_without_one_to_go_back_to_a_bad_answer_changes_nothing(settling: Story) -> None:
    settling.and_also(ChannelBroken(1))

    assert settling.when(SettleFailed(2, BAD)) == []
    assert settling.settling == {2}


def test_what_a_candidate_asks_holds_for_its_own_generation(story: Story) -> None:
    story.given_serving()
    story.fleet = replace(story.fleet, configured=True)
    story.and_also(ReloadRequested(), SettingsRead(CHECKED))

    assert CheckSettling(2) in story.when(WorkerReady(2))
    actions = story.when(SettleFailed(2, BAD))

    assert actions[1:4] == [StopChecking(2), RouteTo(1), ForgetSettings()]
    assert story.fleet.policy == Policy()
    assert CheckSettling(3) not in story.and_also(RenewRequested()).when(WorkerReady(3))


def test_another_program_asks_anew(settling: Story) -> None:
    assert CheckSettling(2) in resume(settling.fleet, {})

    settling.when_over(TimerKind.SETTLE, 2)
    assert CheckSettling(2) not in resume(settling.fleet, {})


def test_one_that_serves_is_checked_no_more(settling: Story) -> None:
    settling.when_over(TimerKind.SETTLE, 2)

    assert not settling.fleet[2].checked
