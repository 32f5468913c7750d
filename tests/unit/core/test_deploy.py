"""A deploy is a reload with a release's name, which the core passes on and forgets in time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from socketprotector.core.actions import ReadSettings, Report, ReportKind, UseSettings
from socketprotector.core.decide import resume
from socketprotector.core.events import (
    DryRunRequested,
    Event,
    ReloadRequested,
    RenewRequested,
    RollbackRequested,
    SettingsFailed,
    SettingsRead,
    StopRequested,
    Stranded,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import Next, Policy
from tests.unit.conftest import Story


@pytest.fixture
def configured(story: Story) -> Story:
    """Generation 1 serves with one worker, and its options are read again."""
    story.given_serving()
    story.fleet = replace(story.fleet, configured=True)
    return story


def test_it_reads_the_options_for_the_release_and_forgets_it_when_it_is_proved(
    configured: Story,
) -> None:
    story = configured

    assert story.when(ReloadRequested(release="2")) == [
        Report(ReportKind.RELOADING),
        ReadSettings(release="2"),
    ]
    story.when(SettingsRead(Policy()))
    actions = story.when(WorkerReady(2))

    # `current` is moved by UseSettings, before the verdict.
    assert actions.index(UseSettings()) < actions.index(Report(ReportKind.RELOADED, 2))
    assert story.fleet.release == ""


def test_another_program_reads_for_the_same_release(configured: Story) -> None:
    configured.when(ReloadRequested(release="2"))
    assert ReadSettings(release="2") in resume(configured.fleet, {})


def test_a_remembered_reload_takes_what_current_names_then(configured: Story) -> None:
    story = configured
    story.when(ReloadRequested(release="2"))
    story.when(ReloadRequested())
    story.when(SettingsRead(Policy()))

    actions = story.when(WorkerReady(2))

    assert actions.index(UseSettings()) < actions.index(ReadSettings())


@pytest.mark.parametrize("how", ["reading", "starting", "called off"])
def test_a_release_that_fails_is_forgotten(configured: Story, how: str) -> None:
    story = configured
    story.when(ReloadRequested(release="2"))
    if how == "reading":
        actions = story.when(SettingsFailed("no such release"))
    else:
        story.when(SettingsRead(Policy()))
        failed = WorkerExited(2, "died") if how == "starting" else RollbackRequested()
        actions = story.when(failed)

    assert [each.news for each in actions if isinstance(each, Report)] == [ReportKind.RELOAD_FAILED]
    assert UseSettings() not in actions
    assert story.fleet.release == ""
    story.when(WorkerExited(2, "ended"))
    assert ReadSettings() in story.when(ReloadRequested())


def test_a_second_deploy_is_refused(configured: Story) -> None:
    story = configured
    story.when(ReloadRequested(release="2"))

    assert [each.news for each in story.when(ReloadRequested(release="3"))] == [  # type: ignore[attr-defined]
        ReportKind.REFUSED
    ]
    assert (story.fleet.release, story.fleet.reload_wanted) == ("2", False)
    story.when(StopRequested())
    assert ReportKind.REFUSED in [
        each.news for each in story.when(ReloadRequested(release="3")) if isinstance(each, Report)
    ]


def test_a_dry_run_of_a_release(configured: Story) -> None:
    story = configured
    assert ReadSettings(dry_run=True, release="2") in story.when(DryRunRequested("2"))
    story.when(SettingsRead(Policy()))

    actions = story.when(WorkerReady(2))

    assert Report(ReportKind.DRY_RUN_PASSED, 2) in actions
    assert UseSettings() not in actions
    assert story.fleet.release == ""


def test_a_deploy_that_a_rescue_interrupts_follows_for_the_same_release(
    configured: Story,
) -> None:
    story = configured
    story.fleet = replace(story.fleet, policy=Policy(workers_accept=True))
    story.when(ReloadRequested(release="2"))

    story.when(Stranded())  # the last good command starts again first
    assert (story.fleet.release, story.fleet.reload_wanted) == ("2", True)
    actions = story.when(WorkerReady(2))

    assert ReadSettings(release="2") in actions
    assert story.fleet.release == "2"


def test_a_deploy_ends_a_crash_loop(configured: Story) -> None:
    story = configured
    story.when(WorkerExited(1, "died", served_s=1000.0))
    story.fleet = replace(story.fleet, to_open=Next.LAST_GOOD, generations=())

    actions = story.when(ReloadRequested(release="2"))

    assert ReadSettings(release="2") in actions


def test_a_deploy_follows_a_renewal_that_is_under_way(configured: Story) -> None:
    story = configured
    story.when(RenewRequested())
    assert story.when(ReloadRequested(release="2")) == []
    assert story.fleet.release == "2"

    actions = story.when(WorkerReady(2))

    assert ReadSettings(release="2") in actions
    assert story.fleet.release == "2"


def test_a_renewal_has_no_release(configured: Story) -> None:
    story = configured
    actions = story.when(RenewRequested())
    assert not [each for each in actions if isinstance(each, ReadSettings)]


def test_a_reload_that_is_remembered_leaves_the_deploy_its_release(configured: Story) -> None:
    configured.and_also(ReloadRequested(release="2"), ReloadRequested())

    assert configured.fleet.release == "2"


@pytest.mark.parametrize(
    ("policy", "events"),
    [
        (Policy(stop_first=True), ()),
        (Policy(), ()),
        (Policy(settle_s=5.0), (WorkerReady(2),)),
    ],
    ids=["waits for the old workers", "starts", "settles"],
)
def test_a_deploy_is_refused_until_the_reload_before_it_is_over(
    story: Story, policy: Policy, events: tuple[Event, ...]
) -> None:
    story.given_serving(policy).and_also(ReloadRequested(), *events)

    reason = "cannot deploy 2: a reload is in progress"
    assert story.when(ReloadRequested(release="2")) == [Report(ReportKind.REFUSED, reason=reason)]


def test_a_deploy_and_a_dry_run_are_refused_while_a_reload_is_queued(story: Story) -> None:
    """It waits for the last process of the failed generation, and nothing has begun."""
    story.given_serving(Policy(workers_accept=True), workers=2)
    story.and_also(ReloadRequested(), WorkerExited(3, "exited with status 3"), ReloadRequested())
    assert (story.fleet.is_opening, story.fleet.reload_wanted) == (False, True)

    for event in (ReloadRequested(release="2"), DryRunRequested()):
        [refused] = story.when(event)
        assert isinstance(refused, Report)
        assert refused.news is ReportKind.REFUSED


def test_a_renewal_that_fails_leaves_the_deploy_behind_it_its_release(configured: Story) -> None:
    configured.and_also(RenewRequested(), ReloadRequested(release="2"))

    configured.and_also(WorkerExited(2, "exited with status 3"))

    assert configured.fleet.release == "2"
