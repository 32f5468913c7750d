"""A reload with a configuration file: it is read first, and holds once what it made serves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from socketprotector.core.actions import (
    CancelTimer,
    Drain,
    ForgetSettings,
    Open,
    ReadSettings,
    Report,
    ReportKind,
    Retire,
    RouteTo,
    Spawn,
    StartTimer,
    UseSettings,
)
from socketprotector.core.decide import resume
from socketprotector.core.events import (
    ChannelBroken,
    Deadline,
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
from socketprotector.core.fleet import Candidate, Fleet, Phase, Policy
from socketprotector.model.share import Canary
from tests.unit.conftest import Story

SLOW = Policy(start_timeout_s=90.0, drain_timeout_s=7.0)
MISTAKE = "web.toml line 3: workers: 0 is not in the range 1<=x<=1000000"


@pytest.fixture
def configured(story: Story) -> Story:
    """Generation 1 serves with one worker, and there is a file."""
    story.given_serving()
    story.fleet = replace(story.fleet, configured=True)
    return story


def test_a_reload_reads_the_file_and_then_opens_what_it_says(configured: Story) -> None:
    story = configured

    assert story.when(ReloadRequested()) == [Report(ReportKind.RELOADING), ReadSettings()]
    assert story.fleet.reading
    assert story.when(SettingsRead(SLOW, 2)) == [
        Open(2, fresh=True),
        Spawn(2, 2, 0),
        Spawn(2, 3, 1),
        StartTimer(Deadline(TimerKind.START, 2), 90.0),
    ]
    assert (story.fleet.policy, story.fleet.workers_wanted) == (Policy(), 1)

    story.when(WorkerReady(2))
    assert story.when(WorkerReady(3)) == [
        CancelTimer(Deadline(TimerKind.START, 2)),
        RouteTo(2),
        UseSettings(),
        Drain(1),
        StartTimer(Deadline(TimerKind.DRAIN, 1), 7.0),
        Report(ReportKind.RELOADED, 2),
    ]
    assert (story.fleet.policy, story.fleet.workers_wanted) == (SLOW, 2)


def test_a_reload_requested_during_another_has_a_number_of_its_own(configured: Story) -> None:
    story = configured
    assert story.fleet.next_reload == 2
    story.when(ReloadRequested())

    assert story.fleet.next_reload == 3, "2 is due to the reload that reads the file"
    story.when(ReloadRequested())
    story.when(SettingsRead(Policy()))
    assert story.fleet.next_reload == 3, "2 is starting, and the queued reload follows"
    story.when(WorkerReady(2))

    assert story.fleet.reading
    assert Open(3, fresh=True) in story.when(SettingsRead(Policy()))


def test_a_reload_after_one_whose_file_has_a_mistake_has_the_next_number(
    configured: Story,
) -> None:
    story = configured
    story.when(ReloadRequested())
    number = story.fleet.next_reload
    story.when(ReloadRequested())

    actions = story.when(SettingsFailed(MISTAKE))

    assert Report(ReportKind.RELOAD_FAILED, number - 1, MISTAKE) in actions
    assert story.fleet.reading
    assert Open(number, fresh=True) in story.when(SettingsRead(Policy()))


def test_a_lost_worker_finishes_when_a_reload_brings_a_limit_on_the_processes(
    configured: Story,
) -> None:
    """The reload could otherwise wait for it without an end."""
    story = configured
    story.and_also(WorkerExited(1, "crashed", served_s=60.0), ReloadRequested())
    lost = next(each.number for each in story.fleet[1].alive)
    assert Retire(lost) not in story.when(WorkerExited(lost, "lost", orphans=True, lost=True))

    rolls = Policy(surge=1, drain_timeout_s=9.0)
    assert Retire(lost) in story.when(SettingsRead(rolls))


def test_a_lost_worker_serves_on_when_a_reload_brings_no_limit_on_the_processes(
    configured: Story,
) -> None:
    """It takes no room, and if the reload fails, its generation serves on."""
    story = configured
    story.and_also(WorkerExited(1, "crashed", served_s=60.0))
    lost = next(each.number for each in story.fleet[1].alive)
    story.and_also(WorkerExited(lost, "lost", orphans=True, lost=True), ReloadRequested())

    assert Retire(lost) not in story.when(SettingsRead(SLOW))


def test_orphans_that_finish_already_get_no_second_order_from_such_a_reload(story: Story) -> None:
    """Its signal could end them at once, and their time would begin again."""
    story.given_serving(Policy(drain_timeout_s=60.0))
    story.fleet = replace(story.fleet, configured=True)
    assert Retire(1) in story.when(WorkerExited(1, "crashed", served_s=60.0, orphans=True))
    story.and_also(WorkerReady(2), ReloadRequested())

    assert Retire(1) not in story.when(SettingsRead(Policy(surge=1, drain_timeout_s=9.0)))


def test_a_file_with_a_mistake_is_a_failed_reload_with_a_number(configured: Story) -> None:
    story = configured
    story.when(ReloadRequested())
    before = story.fleet

    assert story.when(SettingsFailed(MISTAKE)) == [Report(ReportKind.RELOAD_FAILED, 2, MISTAKE)]

    assert story.fleet == replace(before, reading=False, next_generation=3)


def test_each_reload_with_a_mistake_has_the_next_number(configured: Story) -> None:
    verdicts = [
        configured.and_also(ReloadRequested()).when(SettingsFailed(MISTAKE)) for _ in range(3)
    ]

    assert verdicts == [[Report(ReportKind.RELOAD_FAILED, n, MISTAKE)] for n in (2, 3, 4)]


def test_what_was_read_is_forgotten_when_it_never_serves(configured: Story) -> None:
    story = configured
    story.and_also(ReloadRequested(), SettingsRead(SLOW, 2))

    actions = story.when_over(TimerKind.START, 2)

    assert ForgetSettings() in actions
    assert (story.fleet.policy, story.fleet.workers_wanted) == (Policy(), 1)


def test_a_rollback_gives_up_what_was_added_before_the_queue_ends(configured: Story) -> None:
    story = configured
    story.and_also(ReloadRequested(), SettingsRead(Policy(settle_s=5.0)), WorkerReady(2))
    assert story.settling == {2}

    actions = story.when(WorkerExited(2, "exited with status 1"))

    assert actions[1:4] == [RouteTo(1), ForgetSettings(), Drain(2)]


def test_the_workers_of_what_serves_stay_as_many_while_the_next_starts(configured: Story) -> None:
    story = configured
    story.and_also(ReloadRequested(), SettingsRead(Policy(), 4))

    story.when(ScaleRequested(+1))

    serving = story.fleet.of(Phase.SERVING)
    assert serving
    assert len(serving.workers) == 2
    assert story.fleet.candidate == Candidate(Policy(), 5)
    assert [w.number for w in story.fleet.generations[1].workers] == [2, 3, 4, 5, 6]
    story.and_also(*map(WorkerReady, (2, 3, 4, 5, 6)))
    assert story.fleet.workers_wanted == 5


def test_as_many_workers_as_were_asked_for_stay_where_the_file_says_nothing_new(
    configured: Story,
) -> None:
    story = configured
    story.and_also(ScaleRequested(+2), ReloadRequested(), SettingsRead(SLOW, None))

    incoming = story.fleet.incoming
    assert incoming
    assert len(incoming.workers) == 3


def test_a_wish_while_the_file_is_read_is_remembered_once(configured: Story) -> None:
    story = configured
    story.and_also(ReloadRequested(), ReloadRequested(), ReloadRequested())

    actions = story.when(SettingsFailed(MISTAKE))

    assert actions == [
        Report(ReportKind.RELOAD_FAILED, 2, MISTAKE),
        Report(ReportKind.RELOADING),
        ReadSettings(),
    ]
    assert story.when(SettingsFailed(MISTAKE)) == [Report(ReportKind.RELOAD_FAILED, 3, MISTAKE)]


@pytest.mark.parametrize("quick", [False, True])
def test_a_stop_calls_the_reading_off(configured: Story, quick: bool) -> None:
    story = configured
    story.when(ReloadRequested())

    assert ForgetSettings() in story.when(StopRequested(quick=quick))

    assert not story.fleet.reading
    assert story.when(SettingsRead(SLOW, 2)) == []
    assert story.when(SettingsFailed(MISTAKE)) == []


def test_a_stop_lets_what_settles_serve_to_the_end_with_its_settings(configured: Story) -> None:
    story = configured
    story.and_also(ReloadRequested(), SettingsRead(Policy(settle_s=5.0)), WorkerReady(2))

    actions = story.when(StopRequested())

    assert actions.index(UseSettings()) < actions.index(Drain(1))
    assert ForgetSettings() not in actions


def test_what_was_read_waits_until_no_other_generation_starts(configured: Story) -> None:
    story = configured
    story.and_also(ReloadRequested(), ChannelBroken(1))
    assert story.starting == {2}

    assert story.when(SettingsRead(SLOW, None)) == []
    actions = story.when(WorkerReady(2))

    assert [each for each in actions if isinstance(each, Open)] == [Open(3, fresh=True)]
    assert UseSettings() not in actions


def test_the_new_order_of_a_reload_holds_for_this_one_already(configured: Story) -> None:
    story = configured
    story.and_also(ReloadRequested(), SettingsRead(Policy()), WorkerReady(2))  # 1 drains, no limit
    story.and_also(ReloadRequested())

    actions = story.when(SettingsRead(Policy(stop_first=True)))

    assert actions == [
        RouteTo(None),
        Drain(2),
        StartTimer(Deadline(TimerKind.DRAIN, 2), 30.0),
        StartTimer(Deadline(TimerKind.DRAIN, 1), 30.0),
    ]


def test_nothing_is_renewed_while_the_file_is_read(configured: Story) -> None:
    story = configured
    story.when(ReloadRequested())

    (report,) = story.when(RenewRequested())

    assert isinstance(report, Report)
    assert report.news is ReportKind.REFUSED


def test_the_first_start_has_read_the_file_already(story: Story) -> None:
    story.given(Policy())
    story.fleet = replace(story.fleet, configured=True)

    assert ReadSettings() not in story.when(ReloadRequested())


def test_a_reload_with_a_canary_reads_the_file_for_one(configured: Story) -> None:
    story, canary = configured, Canary(500, 60.0)

    assert ReadSettings(canary=True) in story.when(ReloadRequested(canary))
    assert ReadSettings(canary=True) in resume(story.fleet, {})


def test_a_canary_that_the_file_brings_is_for_the_same_reload(configured: Story) -> None:
    story = configured
    story.and_also(ReloadRequested(), SettingsRead(Policy(canary=Canary(500, 60.0))))

    assert RouteTo(1, 2, 500) in story.when(WorkerReady(2))


def test_a_program_that_resumes_reads_again_what_was_being_read() -> None:
    fleet = Fleet(configured=True, reading=True, served=True)

    assert resume(fleet, {}) == (RouteTo(None), ReadSettings())


def test_a_number_of_workers_that_the_file_leaves_out_stays_so(configured: Story) -> None:
    configured.and_also(ReloadRequested(), SettingsRead(Policy()), ScaleRequested(+1))

    assert configured.fleet.candidate == Candidate(Policy())


@pytest.mark.parametrize(
    ("scaled", "workers"),
    [(ScaleRequested(to=3), 3), (ScaleRequested(+3), 4), (ScaleRequested(-1), 1)],
)
def test_scaling_changes_what_the_file_says(
    story: Story, scaled: ScaleRequested, workers: int
) -> None:
    story.given_serving(workers=2)
    story.fleet = replace(story.fleet, configured=True)
    story.and_also(ReloadRequested(), SettingsRead(Policy(), 1), scaled)

    assert story.fleet.candidate == Candidate(Policy(), workers)


def test_scaling_to_the_present_number_changes_the_number_that_a_reload_has_read(
    story: Story,
) -> None:
    story.given_serving(workers=2)
    story.fleet = replace(story.fleet, configured=True)
    story.and_also(ReloadRequested(), SettingsRead(Policy(), 5))

    assert Report(ReportKind.SCALED, reason="2 workers") in story.when(ScaleRequested(to=2))

    candidate = story.fleet.candidate
    assert candidate
    assert (candidate.workers, story.fleet.workers_wanted) == (2, 2)
