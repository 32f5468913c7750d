"""The first start: one command that must get ready, or the reason why not."""

from __future__ import annotations

from socketprotector.core.actions import (
    CancelTimer,
    CloseListeners,
    Exit,
    Open,
    Release,
    Report,
    ReportKind,
    RouteTo,
    Signal,
    Spawn,
    StartTimer,
    WorkerSignal,
)
from socketprotector.core.events import (
    ChannelBroken,
    Deadline,
    DryRunRequested,
    Launched,
    OpenFailed,
    ReloadRequested,
    RenewRequested,
    StopRequested,
    TimerKind,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import Policy
from socketprotector.model.ready_kinds import KINDS
from tests.unit.conftest import Story

DIED = "./daemon exited with status 1"


def test_the_first_generation_gets_connections_when_each_of_its_workers_is_ready(
    story: Story,
) -> None:
    story.given(Policy(), workers=2)

    assert story.when(Launched()) == [
        Open(1, fresh=True),
        Spawn(1, worker=1, slot=0),
        Spawn(1, worker=2, slot=1),
        StartTimer(Deadline(TimerKind.START, 1), 60.0),
    ]
    assert story.when(WorkerReady(1)) == []
    assert story.when(WorkerReady(2)) == [
        CancelTimer(Deadline(TimerKind.START, 1)),
        RouteTo(1),
        Report(ReportKind.READY, 1),
    ]

    assert story.serving == {1}


def test_a_first_start_that_exits_is_tried_three_times_in_all(story: Story) -> None:
    story.given(Policy()).and_also(Launched())

    assert story.when(WorkerExited(1, DIED)) == [
        CancelTimer(Deadline(TimerKind.START, 1)),
        Report(ReportKind.RETRYING, 1, DIED),
        Release(1),
        Open(2, fresh=True),
        Spawn(2, worker=2, slot=0),
        StartTimer(Deadline(TimerKind.START, 2), 60.0),
    ]
    story.when(WorkerExited(2, DIED))
    assert story.when(WorkerExited(3, DIED)) == [
        CancelTimer(Deadline(TimerKind.START, 3)),
        Report(ReportKind.START_FAILED, 3, DIED),
        CloseListeners(quick=True),
        Release(3),
        Exit(3),
    ]


def test_the_next_try_waits_until_the_one_before_is_gone(story: Story) -> None:
    story.given(Policy(), workers=2).and_also(Launched(), WorkerReady(1))

    assert story.when(WorkerExited(1, DIED)) == [
        CancelTimer(Deadline(TimerKind.START, 1)),
        Signal(2, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.KILL, 1), 5.0),
        Report(ReportKind.RETRYING, 1, DIED),
    ]
    assert story.when_over(TimerKind.KILL, 1) == [Signal(2, WorkerSignal.KILL)]
    assert story.when(WorkerExited(2, "killed by SIGKILL")) == [
        Release(1),
        Open(2, fresh=True),
        Spawn(2, worker=3, slot=0),
        Spawn(2, worker=4, slot=1),
        StartTimer(Deadline(TimerKind.START, 2), 60.0),
    ]


def test_a_first_start_that_takes_too_long_is_not_tried_again(story: Story) -> None:
    story.given(Policy()).and_also(Launched())

    assert story.when_over(TimerKind.START, 1) == [
        Signal(1, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.KILL, 1), 5.0),
        Report(
            ReportKind.START_FAILED,
            1,
            f"not ready within 1m (--start-timeout); {KINDS['notify'].hint}",
        ),
        CloseListeners(quick=True),
    ]
    assert story.when(WorkerExited(1, "killed by SIGTERM")) == [
        CancelTimer(Deadline(TimerKind.KILL, 1)),
        Release(1),
        Exit(3),
    ]


def test_a_program_that_detaches_itself_is_not_tried_again(story: Story) -> None:
    story.given(Policy()).and_also(Launched())

    assert story.when(WorkerExited(1, "does it detach itself?", detached=True)) == [
        CancelTimer(Deadline(TimerKind.START, 1)),
        Report(ReportKind.START_FAILED, 1, "does it detach itself?"),
        CloseListeners(quick=True),
        Release(1),
        Exit(3),
    ]


def test_a_command_that_is_not_there_is_not_tried_again(story: Story) -> None:
    story.given(Policy(), workers=2).and_also(Launched())

    assert story.when(OpenFailed(1, "./daemon: No such file")) == [
        CancelTimer(Deadline(TimerKind.START, 1)),
        Report(ReportKind.START_FAILED, 1, "./daemon: No such file"),
        CloseListeners(quick=True),
        Release(1),
        Exit(3),
    ]


def test_a_program_that_shuts_the_channel_down_is_not_tried_again(story: Story) -> None:
    story.given(Policy()).and_also(Launched())

    assert story.when(ChannelBroken(1)) == [
        Report(ReportKind.BROKEN, 1, "a worker shut down the channel"),
        CancelTimer(Deadline(TimerKind.START, 1)),
        Signal(1, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.KILL, 1), 5.0),
        Report(ReportKind.START_FAILED, 1, "a worker shut down the channel"),
        CloseListeners(quick=True),
    ]


def test_a_stop_while_the_first_start_waits_ends_everything_with_status_0(story: Story) -> None:
    story.given(Policy()).and_also(Launched())

    assert story.when(StopRequested()) == [
        Report(ReportKind.STOPPING),
        CancelTimer(Deadline(TimerKind.START, 1)),
        Signal(1, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.KILL, 1), 5.0),
        CloseListeners(quick=True),
        StartTimer(Deadline(TimerKind.STOP), 30.0),
    ]
    assert story.when(WorkerExited(1, "killed by SIGTERM")) == [
        CancelTimer(Deadline(TimerKind.KILL, 1)),
        Release(1),
        CancelTimer(Deadline(TimerKind.STOP)),
        Exit(0),
    ]


def test_a_stop_that_comes_before_it_is_known_that_nothing_could_be_opened(story: Story) -> None:
    story.given(Policy()).and_also(Launched(), StopRequested())

    assert story.when(OpenFailed(1, "./daemon: No such file")) == [
        CancelTimer(Deadline(TimerKind.KILL, 1)),
        Release(1),
        CancelTimer(Deadline(TimerKind.STOP)),
        Exit(0),
    ]


def test_a_reload_asked_for_during_the_first_start_is_made_after_it(story: Story) -> None:
    story.given(Policy()).and_also(Launched())

    assert story.when(ReloadRequested()) == []
    assert story.when(WorkerExited(1, DIED))[1] == Report(ReportKind.RETRYING, 1, DIED)
    assert story.when(WorkerReady(2)) == [
        CancelTimer(Deadline(TimerKind.START, 2)),
        RouteTo(2),
        Report(ReportKind.READY, 2),
        Report(ReportKind.RELOADING),
        Open(3, fresh=True),
        Spawn(3, worker=3, slot=0),
        StartTimer(Deadline(TimerKind.START, 3), 60.0),
    ]


def test_a_stop_before_anything_was_started_just_ends(story: Story) -> None:
    assert story.when(StopRequested()) == [
        Report(ReportKind.STOPPING),
        CloseListeners(quick=True),
        Exit(0),
    ]
    assert story.when(Launched()) == []


def test_before_the_first_start_nothing_is_replaced_or_tried(story: Story) -> None:
    story.given(Policy())

    for event in (RenewRequested(), DryRunRequested()):
        [refused] = story.when(event)
        assert isinstance(refused, Report)
        assert refused.news is ReportKind.REFUSED
    assert story.fleet.next_generation == 1


def test_a_generation_that_serves_is_neither_opened_again_nor_fails_to_open(story: Story) -> None:
    story.given_serving()

    assert story.when(Launched()) == []
    assert story.when(OpenFailed(1, "too late")) == []


def test_news_of_the_whole_fleet_name_no_generation(story: Story) -> None:
    """The log shows a generation's number unless it is 0."""
    story.given_serving()

    for event in (ReloadRequested(), StopRequested()):
        report = story.when(event)[0]
        assert isinstance(report, Report)
        assert report.generation == 0
