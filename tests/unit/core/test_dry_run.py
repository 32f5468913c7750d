"""A dry run: a reload up to its switch, which leaves everything as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest

from socketprotector.core.actions import (
    CancelTimer,
    ForgetSettings,
    Open,
    Probe,
    ReadSettings,
    Release,
    Report,
    ReportKind,
    RouteTo,
    Signal,
    Spawn,
    StartTimer,
    StopProbing,
    WorkerSignal,
)
from socketprotector.core.decide import resume
from socketprotector.core.events import (
    Answered,
    ChannelBroken,
    Deadline,
    DeadlinePassed,
    DryRunRequested,
    Event,
    HandingOver,
    LameDuckRequested,
    Launched,
    OpenFailed,
    Quiesced,
    ReloadRequested,
    RenewRequested,
    ScaleRequested,
    SettingsFailed,
    SettingsRead,
    StopRequested,
    TimerKind,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import Fleet, Next, Policy, State
from socketprotector.core.reload import UPGRADED
from socketprotector.core.stop import CALLED_OFF
from socketprotector.model.policy import STANDBY_S
from socketprotector.model.reload_orders import STOP_FIRST
from tests.unit.conftest import Story

DIED = "./daemon exited with status 1"
START_2 = Deadline(TimerKind.START, 2)
SETTLE_2 = Deadline(TimerKind.SETTLE, 2)
BEGUN = Report(ReportKind.DRY_RUN, 2)
PASSED = Report(ReportKind.DRY_RUN_PASSED, 2)
ENDED = [Signal(2, WorkerSignal.TERM), StartTimer(Deadline(TimerKind.KILL, 2), 5.0)]
BESIDE = Policy(workers_accept=True, ready="any")


def as_before(story: Story, before: Fleet) -> None:
    """But for numbers, which are never used again."""
    now = story.fleet
    generation, worker = now.next_generation, now.next_worker
    assert now == replace(before, next_generation=generation, next_worker=worker)


def failed(reason: str) -> Report:
    return Report(ReportKind.DRY_RUN_FAILED, 2, reason)


@pytest.fixture
def configured(story: Story) -> Story:
    """Generation 1 serves, and there is a configuration file."""
    story.given_serving()
    story.fleet = replace(story.fleet, configured=True)
    return story


def test_it_begins_as_a_reload_does(story: Story) -> None:
    story.given_serving(workers=2)

    assert story.when(DryRunRequested()) == [
        BEGUN,
        Open(2, fresh=True, dry_run=True),
        Spawn(2, 3, 0),
        Spawn(2, 4, 1),
        StartTimer(START_2, 60.0),
    ]


def test_it_passes_when_all_are_ready_and_ends_what_it_has_started(story: Story) -> None:
    before = story.given_serving().fleet
    story.and_also(DryRunRequested())

    assert story.when(WorkerReady(2)) == [CancelTimer(START_2), *ENDED, PASSED]
    assert story.serving == {1}
    assert story.when(WorkerExited(2, "exited with status 0"))[-1] == Release(2)
    as_before(story, before)


def test_it_passes_when_the_release_has_answered(story: Story) -> None:
    story.given(Policy(ready="http")).and_also(Launched(), Answered(1))

    assert Probe(2) in story.when(DryRunRequested())
    assert story.when(Answered(2)) == [CancelTimer(START_2), StopProbing(2), *ENDED, PASSED]


def test_one_that_has_only_accepted_is_awaited_for_as_long_as_a_reload_would(
    story: Story,
) -> None:
    story.given_serving(BESIDE).and_also(DryRunRequested())

    assert story.when(Answered(2)) == [
        CancelTimer(START_2),
        StopProbing(2),
        StartTimer(SETTLE_2, STANDBY_S),
    ]
    assert story.when_over(TimerKind.SETTLE, 2)[-1] == PASSED


def test_and_fails_if_it_dies_within_that(story: Story) -> None:
    story.given_serving(BESIDE).and_also(DryRunRequested(), Answered(2))

    actions = story.when(WorkerExited(2, DIED))

    assert actions == [CancelTimer(SETTLE_2), StopProbing(2), failed(DIED), Release(2)]
    assert story.serving == {1}


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (WorkerExited(2, DIED), DIED),
        (OpenFailed(2, "command not found"), "command not found"),
        (ChannelBroken(2), "a worker shut down the channel"),
    ],
)
def test_what_a_reload_would_fail_for_is_told(story: Story, event: Event, reason: str) -> None:
    story.given_serving().and_also(DryRunRequested())

    actions = story.when(event)

    assert failed(reason) in actions
    assert not any(isinstance(each, RouteTo) for each in actions)
    assert story.serving == {1}
    assert not story.fleet.dry_run


def test_what_serves_is_scaled_meanwhile(story: Story) -> None:
    story.given_serving(workers=2).and_also(DryRunRequested(), WorkerReady(3))

    story.when(ScaleRequested(-1))

    assert [each.number for each in story.fleet[1].workers if each.state is State.READY] == [1]
    assert story.fleet.workers_wanted == 1
    assert PASSED in story.when(WorkerReady(4))  # that has been started is awaited


def test_and_one_more_is_awaited(story: Story) -> None:
    story.given_serving().and_also(DryRunRequested(), ScaleRequested(+1))

    assert PASSED not in story.when(WorkerReady(2))
    assert PASSED in story.when(WorkerReady(story.fleet[2].workers[-1].number))
    assert len(story.fleet[1].workers) == 2


def test_no_back_off_is_forgotten(story: Story) -> None:
    story.given_serving()
    story.fleet = before = replace(story.fleet, failed_starts=5)

    story.and_also(DryRunRequested(), WorkerExited(2, DIED))

    as_before(story, before)


# -- with a configuration file ------------------------------------------------------


def test_what_was_read_is_forgotten(configured: Story) -> None:
    story, before = configured, configured.fleet
    assert story.when(DryRunRequested()) == [BEGUN, ReadSettings(dry_run=True)]
    assert ReadSettings(dry_run=True) in resume(story.fleet, {})

    assert Open(2, fresh=True, dry_run=True) in story.when(
        SettingsRead(Policy(drain_timeout_s=7.0), 2)
    )
    story.when(WorkerReady(2))
    actions = story.when(WorkerReady(3))

    assert ForgetSettings() in actions
    assert actions[-1] == PASSED
    story.and_also(*(WorkerExited(number, "ended") for number in (2, 3)))
    as_before(story, before)


def test_a_mistake_in_the_file_is_a_verdict_with_a_number(configured: Story) -> None:
    story, before = configured, configured.fleet
    story.and_also(DryRunRequested())

    assert story.when(SettingsFailed("line 1: no TOML")) == [failed("line 1: no TOML")]

    as_before(story, before)


def test_a_file_that_says_stop_first_cannot_be_tried(configured: Story) -> None:
    story, before = configured, configured.fleet
    story.and_also(DryRunRequested())

    assert story.when(SettingsRead(Policy(stop_first=True))) == [
        ForgetSettings(),
        failed(f"cannot dry-run: {STOP_FIRST.no_dry_run}"),
    ]

    as_before(story, before)


# -- beside other things ------------------------------------------------------------------


@pytest.mark.parametrize("event", [ReloadRequested(), DryRunRequested(), RenewRequested()])
def test_it_is_refused_beside_a_reload_or_another(story: Story, event: Event) -> None:
    story.given_serving().and_also(event)
    before = story.fleet

    [refused] = story.when(DryRunRequested())

    assert isinstance(refused, Report)
    assert refused.news is ReportKind.REFUSED
    assert story.fleet == before


@pytest.mark.parametrize("policy", [Policy(), Policy(lame_duck_s=9.0)])
def test_it_is_refused_while_stopping_and_while_nothing_serves(
    story: Story, policy: Policy
) -> None:
    story.given(policy).and_also(Launched())
    [before_ready] = story.when(DryRunRequested())
    story.and_also(WorkerReady(1), StopRequested())
    [stopping] = story.when(DryRunRequested())

    for each in (before_ready, stopping):
        assert isinstance(each, Report)
        assert each.news is ReportKind.REFUSED


def test_a_reload_that_is_requested_meanwhile_begins_after_it(story: Story) -> None:
    story.given_serving().and_also(DryRunRequested())
    assert story.when(ReloadRequested()) == []

    actions = story.when(WorkerReady(2))

    at = actions.index(PASSED)
    assert actions[at + 1 : at + 3] == [Report(ReportKind.RELOADING), Open(3, fresh=True)]
    assert RouteTo(3) in story.when(WorkerReady(3))


def test_where_workers_accept_it_begins_once_they_have_gone(story: Story) -> None:
    story.given_serving(Policy(workers_accept=True))
    story.and_also(DryRunRequested(), ReloadRequested(), WorkerReady(2))
    assert (story.fleet.to_open, story.fleet.reload_wanted) == (None, True)

    assert Open(3, fresh=True) in story.when(WorkerExited(2, "ended"))


@pytest.mark.parametrize("quick", [False, True])
def test_a_stop_calls_it_off(story: Story, quick: bool) -> None:
    actions = story.given_serving().and_also(DryRunRequested()).when(StopRequested(quick))

    assert failed(CALLED_OFF) in actions
    assert not story.fleet.dry_run
    assert failed(CALLED_OFF) not in story.when(StopRequested(quick))
    assert Signal(2, WorkerSignal.TERM) not in story.when(WorkerReady(2))
    assert not story.starting


def test_an_upgrade_calls_it_off_for_the_next_program_may_know_of_none(story: Story) -> None:
    story.given_serving().and_also(DryRunRequested())

    actions = story.when(HandingOver())

    assert actions[-1] == failed(UPGRADED)
    assert Signal(2, WorkerSignal.TERM) in actions
    assert not story.fleet.dry_run
    story.and_also(WorkerExited(2, "ended"))
    assert story.when(HandingOver()) == []
    assert story.starting == set()


def test_also_before_it_is_opened(configured: Story) -> None:
    before = configured.fleet
    configured.and_also(DryRunRequested())
    actions = configured.when(HandingOver())

    assert failed(UPGRADED) in actions
    assert ForgetSettings() in actions
    assert configured.when(SettingsRead(Policy(), 2)) == []
    as_before(configured, before)


def test_and_while_it_waits_for_those_that_still_accept(story: Story) -> None:
    story.given_serving(Policy(workers_accept=True))
    story.and_also(ReloadRequested(), WorkerReady(2), DryRunRequested())
    assert story.fleet.to_open is Next.FRESH

    assert story.when(HandingOver()) == [replace(failed(UPGRADED), generation=3)]
    assert story.fleet.to_open is None


def test_a_stop_in_its_last_second_leaves_no_timer(story: Story) -> None:
    story.given_serving(BESIDE).and_also(DryRunRequested(), Answered(2))

    assert CancelTimer(SETTLE_2) in story.when(StopRequested())


def test_it_goes_on_in_a_lame_duck(story: Story) -> None:
    story.given_serving(Policy(lame_duck_s=9.0)).and_also(DryRunRequested(), StopRequested())
    assert story.when(WorkerReady(2))[-1] == PASSED
    story.and_also(LameDuckRequested(False))


@pytest.mark.parametrize("answered", [False, True])
def test_what_serves_comes_first_if_it_fails(story: Story, answered: bool) -> None:
    story.given_serving(BESIDE).and_also(DryRunRequested(), *([Answered(2)] * answered))

    actions = story.when(ChannelBroken(1, served_s=20.0))

    assert failed("the serving generation failed during the dry run; see `crashes`") in actions
    assert story.fleet.to_open is Next.LAST_GOOD
    story.and_also(WorkerExited(2, "ended"), Quiesced(1), WorkerExited(1, "ended"))
    assert story.starting == {3}


def test_and_if_the_dry_run_waits_only_for_room_for_more_workers(story: Story) -> None:
    story.given_serving(Policy(surge=2, drain_timeout_s=9.0), workers=2)
    story.and_also(WorkerExited(1, "ended", orphans=True), WorkerReady(3), DryRunRequested())
    story.and_also(WorkerReady(4))
    assert story.fleet.dry_run

    actions = story.when(ChannelBroken(1, served_s=20.0))

    assert failed("the serving generation failed during the dry run; see `crashes`") in actions
    assert Open(3, fresh=False) in actions


def test_and_so_it_does_while_the_file_is_read(configured: Story) -> None:
    story = configured
    story.and_also(DryRunRequested())

    actions = story.when(ChannelBroken(1, served_s=20.0))

    assert failed("the serving generation failed during the dry run; see `crashes`") in actions
    assert ForgetSettings() in actions
    assert Open(3, fresh=False) in actions
    assert story.when(SettingsRead(Policy(), 2)) == []


def test_another_program_goes_on_with_it(story: Story) -> None:
    story.given(Policy(ready="http")).and_also(Launched(), Answered(1), DryRunRequested())

    actions = resume(story.fleet, {})

    assert actions[0] == RouteTo(1)
    assert Probe(2) in actions
    assert story.when(DeadlinePassed(START_2, "GET /: 500"))[-1] == failed(
        "not ready within 1m (--start-timeout); GET /: 500"
    )
