"""TERM and INT: how everything ends, at whatever moment it is asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from socketprotector.core.actions import (
    Action,
    CancelTimer,
    CloseListeners,
    Drain,
    Exit,
    Open,
    Quiesce,
    ReadSettings,
    Release,
    Report,
    ReportKind,
    RouteTo,
    Signal,
    Spawn,
    StartTimer,
    UseSettings,
    WorkerSignal,
)
from socketprotector.core.events import (
    BacklogEmptied,
    ChannelBroken,
    Deadline,
    DryRunRequested,
    Event,
    Launched,
    ListenersLost,
    Quiesced,
    ReloadRequested,
    RenewRequested,
    ScaleRequested,
    SettingsRead,
    StopRequested,
    TimerKind,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import Policy
from socketprotector.core.stop import CALLED_OFF, SETTLED_BY_STOP
from tests.unit.conftest import Story

DIED = "./daemon exited with status 1"
CRASHED = "killed by SIGSEGV"
LEFT = "exited with status 0"


def called_off(number: int) -> Report:
    return Report(ReportKind.RELOAD_FAILED, number, CALLED_OFF)


def verdicts(actions: list[Action]) -> list[Action]:
    """What clients take for one."""
    kinds = (ReportKind.RELOADED, ReportKind.RECOVERED, ReportKind.RELOAD_FAILED)
    return [each for each in actions if isinstance(each, Report) and each.news in kinds]


# -- graceful --------------------------------------------------------------------


def test_a_graceful_stop_serves_what_has_connected_and_waits_for_the_workers(
    story: Story,
) -> None:
    story.given_serving()

    assert story.when(StopRequested()) == [
        Report(ReportKind.STOPPING),
        CloseListeners(quick=False),
        StartTimer(Deadline(TimerKind.STOP), 30.0),
    ]
    assert story.when(BacklogEmptied()) == [RouteTo(None), Drain(1)]
    assert story.when(WorkerExited(1, LEFT)) == [
        Release(1),
        CancelTimer(Deadline(TimerKind.STOP)),
        Exit(0),
    ]
    assert story.when(StopRequested()) == []


def test_where_no_client_can_connect_any_more_it_ends_in_order_and_as_failed(story: Story) -> None:
    story.given_serving()

    assert story.when(ListenersLost()) == [
        Report(ReportKind.STOPPING, reason="no listener is left"),
        CloseListeners(quick=False),
        StartTimer(Deadline(TimerKind.STOP), 30.0),
    ]
    assert story.when(ListenersLost()) == []
    assert story.when(BacklogEmptied()) == [RouteTo(None), Drain(1)]
    assert story.when(WorkerExited(1, LEFT))[-1] == Exit(111)


def test_a_graceful_stop_that_takes_too_long_becomes_a_quick_one(story: Story) -> None:
    story.given_serving().and_also(StopRequested(), BacklogEmptied())

    assert story.when_over(TimerKind.STOP) == [
        Signal(1, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.KILL, 1), 5.0),
    ]
    assert story.when_over(TimerKind.KILL, 1) == [Signal(1, WorkerSignal.KILL)]
    assert story.when(WorkerExited(1, "killed by SIGKILL")) == [Release(1), Exit(0)]


def test_a_worker_that_dies_while_the_backlog_is_served_is_replaced(story: Story) -> None:
    story.given_serving().and_also(StopRequested())

    assert story.when(WorkerExited(1, CRASHED)) == [
        Report(ReportKind.EXITED, 1, CRASHED),
        Spawn(1, worker=2, slot=0),
        StartTimer(Deadline(TimerKind.WORKER_START, 2), 60.0),
    ]


def test_the_last_worker_of_a_stop_is_replaced_while_connections_wait(story: Story) -> None:
    story.given_serving().and_also(StopRequested(), BacklogEmptied())

    assert story.when(WorkerExited(1, CRASHED, served_s=60.0, waiting=3)) == [
        Spawn(1, worker=2, slot=0),
        StartTimer(Deadline(TimerKind.WORKER_START, 2), 60.0),
    ]
    assert story.when(WorkerExited(2, LEFT)) == [
        CancelTimer(Deadline(TimerKind.WORKER_START, 2)),
        Release(1),
        CancelTimer(Deadline(TimerKind.STOP)),
        Exit(0),
    ]


def test_processes_that_the_last_worker_of_a_stop_left_do_not_take_what_waits(
    story: Story,
) -> None:
    story.given_serving().and_also(StopRequested(), BacklogEmptied())

    actions = story.when(WorkerExited(1, CRASHED, served_s=60.0, waiting=3, orphans=True))

    assert Spawn(1, worker=2, slot=0) in actions


def test_a_worker_of_a_stop_is_not_replaced_while_another_takes_what_waits(story: Story) -> None:
    story.given_serving(workers=2).and_also(StopRequested(), BacklogEmptied())

    assert story.when(WorkerExited(1, CRASHED, waiting=3)) == []


def test_a_generation_that_was_told_to_end_gets_no_more_workers(story: Story) -> None:
    story.given_serving(Policy(drain_timeout_s=9.0)).and_also(ReloadRequested(), WorkerReady(2))
    story.when_over(TimerKind.DRAIN, 1)
    story.and_also(StopRequested(), BacklogEmptied())

    assert story.when(WorkerExited(1, "killed by SIGTERM", waiting=3)) == [
        CancelTimer(Deadline(TimerKind.KILL, 1)),
        Release(1),
    ]


def spawned_at_once(worker: int) -> list[Action]:
    """What starts a worker in spite of its back-off."""
    return [
        CancelTimer(Deadline(TimerKind.WORKER_RESPAWN, worker)),
        Spawn(1, worker=worker, slot=0),
        StartTimer(Deadline(TimerKind.WORKER_START, worker), 60.0),
    ]


@pytest.mark.parametrize("accepts", [False, True])
def test_in_a_crash_loop_a_stop_spawns_one_worker_at_once_for_the_backlog(
    story: Story, accepts: bool
) -> None:
    """Clients that no worker takes would keep the backlog from being empty."""
    story.given_serving(Policy(workers_accept=accepts))
    story.and_also(*(WorkerExited(number, CRASHED) for number in (1, 2, 3)))

    assert story.when(StopRequested()) == [
        Report(ReportKind.STOPPING),
        CloseListeners(quick=False),
        *spawned_at_once(4),
        StartTimer(Deadline(TimerKind.STOP), 30.0),
    ]


def test_in_a_crash_loop_a_stop_spawns_another_one_for_what_is_queued(story: Story) -> None:
    story.given_serving()
    story.and_also(*(WorkerExited(number, CRASHED) for number in (1, 2, 3)), StopRequested())
    story.and_also(WorkerExited(4, CRASHED))

    assert story.when(BacklogEmptied()) == [RouteTo(None), Drain(1), *spawned_at_once(5)]


def test_in_a_crash_loop_of_workers_that_accept_a_stop_spawns_none_for_closed_listeners(
    story: Story,
) -> None:
    story.given_serving(Policy(workers_accept=True))
    story.and_also(*(WorkerExited(number, CRASHED) for number in (1, 2, 3)), StopRequested())
    story.and_also(WorkerExited(4, CRASHED))

    assert story.when(BacklogEmptied()) == [
        RouteTo(None),
        Drain(1),
        CancelTimer(Deadline(TimerKind.WORKER_RESPAWN, 5)),
        Release(1),
        CancelTimer(Deadline(TimerKind.STOP)),
        Exit(0),
    ]


def test_a_stop_does_not_wait_for_a_crashing_place_beside_a_living_worker(story: Story) -> None:
    story.given_serving(workers=2)
    story.and_also(*(WorkerExited(number, CRASHED) for number in (1, 3, 4)), StopRequested())

    assert story.when(BacklogEmptied()) == [
        RouteTo(None),
        Drain(1),
        CancelTimer(Deadline(TimerKind.WORKER_RESPAWN, 5)),
    ]


def test_a_stop_that_takes_too_long_ends_a_crash_loop_too(story: Story) -> None:
    story.given_serving().and_also(StopRequested(), BacklogEmptied())
    story.and_also(*(WorkerExited(number, CRASHED, waiting=3) for number in (1, 2, 3)))

    assert story.when_over(TimerKind.STOP) == [
        CancelTimer(Deadline(TimerKind.WORKER_RESPAWN, 4)),
        Release(1),
        Exit(0),
    ]


def test_an_older_draining_generation_leaves_what_waits_to_the_route_while_there_is_one(
    story: Story,
) -> None:
    story.given_serving().and_also(ReloadRequested(), WorkerReady(2), StopRequested())

    assert story.when(WorkerExited(1, CRASHED, waiting=3)) == [Release(1)]


def test_a_stop_waits_for_older_draining_generations_too(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested(), WorkerReady(2))
    story.and_also(StopRequested(), BacklogEmptied())

    assert story.when(WorkerExited(2, LEFT)) == [Release(2)]
    assert story.when(WorkerExited(1, LEFT))[-1] == Exit(0)


def test_a_channel_that_breaks_during_a_stop_ends_taking_connections(story: Story) -> None:
    story.given_serving().and_also(StopRequested())

    assert story.when(ChannelBroken(1)) == [
        Report(ReportKind.BROKEN, 1, "a worker shut down the channel"),
        RouteTo(None),
        Drain(1),
        CloseListeners(quick=True),
    ]
    assert story.when(BacklogEmptied()) == [], "too late"


# -- quick -----------------------------------------------------------------------


def test_a_quick_stop_sends_term_at_once_and_then_kill(story: Story) -> None:
    story.given_serving(workers=2)

    assert story.when(StopRequested(quick=True)) == [
        Report(ReportKind.STOPPING),
        RouteTo(None),
        CloseListeners(quick=True),
        Drain(1),
        Signal(1, WorkerSignal.TERM),
        Signal(2, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.KILL, 1), 5.0),
    ]
    assert story.when(WorkerExited(1, "killed by SIGTERM", waiting=3)) == []
    assert story.when_over(TimerKind.KILL, 1) == [Signal(2, WorkerSignal.KILL)]
    assert story.when(WorkerExited(2, "killed by SIGKILL")) == [Release(1), Exit(0)]


def test_a_second_term_is_a_quick_stop(story: Story) -> None:
    story.given_serving().and_also(StopRequested())

    assert story.when(StopRequested()) == [
        RouteTo(None),
        CancelTimer(Deadline(TimerKind.STOP)),
        CloseListeners(quick=True),
        Drain(1),
        Signal(1, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.KILL, 1), 5.0),
    ]
    assert story.when(BacklogEmptied()) == [], "too late"
    assert story.when(StopRequested()) == [], "a third one changes nothing"


def test_a_quick_stop_in_a_crash_loop_ends_at_once(story: Story) -> None:
    story.given_serving()
    story.and_also(*(WorkerExited(number, CRASHED) for number in (1, 2, 3)))

    assert story.when(StopRequested(quick=True)) == [
        Report(ReportKind.STOPPING),
        RouteTo(None),
        CloseListeners(quick=True),
        Drain(1),
        CancelTimer(Deadline(TimerKind.WORKER_RESPAWN, 4)),
        Release(1),
        Exit(0),
    ]


# -- at a bad moment ---------------------------------------------------------------


def test_a_stop_during_a_reload_calls_the_new_generation_off(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested(), ReloadRequested())

    assert story.when(StopRequested()) == [
        Report(ReportKind.STOPPING),
        CancelTimer(Deadline(TimerKind.START, 2)),
        called_off(2),
        Signal(2, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.KILL, 2), 5.0),
        CloseListeners(quick=False),
        StartTimer(Deadline(TimerKind.STOP), 30.0),
        called_off(3),
    ]
    assert story.when(WorkerReady(2)) == []
    assert story.when(WorkerExited(2, "killed by SIGTERM")) == [
        CancelTimer(Deadline(TimerKind.KILL, 2)),
        Release(2),
    ]
    assert story.serving == {1}


def test_a_stop_while_settling_lets_both_generations_finish(story: Story) -> None:
    story.given_serving(Policy(settle_s=5.0)).and_also(ReloadRequested(), WorkerReady(2))

    assert story.when(StopRequested()) == [
        Report(ReportKind.STOPPING),
        CancelTimer(Deadline(TimerKind.SETTLE, 2)),
        Drain(1),
        Report(ReportKind.RELOADED, 2, SETTLED_BY_STOP),
        CloseListeners(quick=False),
        StartTimer(Deadline(TimerKind.STOP), 30.0),
    ]
    assert story.when(BacklogEmptied()) == [RouteTo(None), Drain(2)]


def test_workers_asked_for_while_settling_are_not_spawned_for_a_stop(story: Story) -> None:
    story.given_serving(Policy(settle_s=5.0))
    story.and_also(ReloadRequested(), WorkerReady(2), ScaleRequested(+1))

    assert not any(isinstance(action, Spawn) for action in story.when(StopRequested()))


def test_a_quick_stop_while_settling_ends_both_generations(story: Story) -> None:
    story.given_serving(Policy(settle_s=5.0)).and_also(ReloadRequested(), WorkerReady(2))

    assert story.when(StopRequested(quick=True)) == [
        Report(ReportKind.STOPPING),
        RouteTo(None),
        called_off(2),
        CloseListeners(quick=True),
        Drain(1),
        Signal(1, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.KILL, 1), 5.0),
        CancelTimer(Deadline(TimerKind.SETTLE, 2)),
        Drain(2),
        Signal(2, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.KILL, 2), 5.0),
    ]


def test_a_stop_between_two_generations_lets_the_old_one_finish(story: Story) -> None:
    story.given_serving(Policy(stop_first=True)).and_also(ReloadRequested())

    assert story.when(StopRequested()) == [
        Report(ReportKind.STOPPING),
        called_off(2),
        CloseListeners(quick=True),
        StartTimer(Deadline(TimerKind.STOP), 30.0),
    ]
    assert story.when(WorkerExited(1, LEFT)) == [
        CancelTimer(Deadline(TimerKind.DRAIN, 1)),
        Release(1),
        CancelTimer(Deadline(TimerKind.STOP)),
        Exit(0),
    ]


def test_a_stop_during_a_back_off_ends_at_once(story: Story) -> None:
    story.given_serving(Policy(stop_first=True))
    story.and_also(ReloadRequested(), WorkerExited(1, LEFT))
    story.and_also(*(WorkerExited(number, DIED) for number in (2, 3, 4, 5)))

    assert story.when(StopRequested()) == [
        Report(ReportKind.STOPPING),
        CancelTimer(Deadline(TimerKind.OPEN)),
        CloseListeners(quick=True),
        Exit(0),
    ]


# -- the verdict of what it finds under way ------------------------------------------


@pytest.mark.parametrize("quick", [False, True])
def test_what_settles_has_one_verdict_whatever_follows(story: Story, quick: bool) -> None:
    """After a graceful stop nobody goes back: it serves to the end."""
    story.given_serving(Policy(settle_s=5.0)).and_also(ReloadRequested(), WorkerReady(2))

    said = verdicts(story.when(StopRequested(quick)))

    assert said == [
        called_off(2) if quick else Report(ReportKind.RELOADED, 2, SETTLED_BY_STOP),
    ]
    later = [WorkerExited(2, CRASHED), StopRequested(), StopRequested(quick=True)]
    assert [verdicts(story.when(each)) for each in later] == [[], [], []]


@pytest.mark.parametrize("quick", [False, True])
def test_a_replacement_is_told_as_a_reload_is(story: Story, quick: bool) -> None:
    story.given_serving(Policy(settle_s=5.0)).and_also(RenewRequested(), WorkerReady(2))

    assert verdicts(story.when(StopRequested(quick))) == [
        called_off(2) if quick else Report(ReportKind.RECOVERED, 2, SETTLED_BY_STOP),
    ]


def test_what_was_read_is_used_by_one_that_serves_to_the_end(story: Story) -> None:
    story.given_serving(Policy(settle_s=5.0))
    story.fleet = replace(story.fleet, configured=True)
    story.and_also(
        ReloadRequested(), SettingsRead(Policy(settle_s=5.0, stop_timeout_s=7.0)), WorkerReady(2)
    )

    actions = story.when(StopRequested())

    assert actions.index(UseSettings()) < actions.index(
        Report(ReportKind.RELOADED, 2, SETTLED_BY_STOP)
    )
    assert StartTimer(Deadline(TimerKind.STOP), 7.0) in actions


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("event", [ReloadRequested(), RenewRequested()], ids=["reload", "replace"])
def test_one_that_starts_is_called_off(story: Story, event: Event, quick: bool) -> None:
    story.given_serving().and_also(event)

    assert verdicts(story.when(StopRequested(quick))) == [called_off(2)]
    assert verdicts(story.when(StopRequested())) == []


@pytest.mark.parametrize("quick", [False, True])
def test_one_whose_configuration_is_being_read_is_called_off(story: Story, quick: bool) -> None:
    story.given_serving()
    story.fleet = replace(story.fleet, configured=True)
    assert ReadSettings() in story.when(ReloadRequested())

    assert verdicts(story.when(StopRequested(quick))) == [called_off(2)]


def test_one_that_waits_for_the_last_good_command_is_called_off(story: Story) -> None:
    story.given_serving()
    story.fleet = replace(story.fleet, configured=True)
    story.and_also(ReloadRequested(), ChannelBroken(1, served_s=20.0), SettingsRead(Policy()))
    assert story.starting == {2}

    assert verdicts(story.when(StopRequested())) == [called_off(3)]


def test_one_that_waits_for_those_that_still_accept_is_called_off(story: Story) -> None:
    story.given_serving(Policy(workers_accept=True))
    story.and_also(ReloadRequested(), WorkerReady(2), ReloadRequested())
    assert (story.fleet[1].quiescing, story.starting) == (True, set())

    assert verdicts(story.when(StopRequested())) == [called_off(3)]
    assert not any(isinstance(each, Open) for each in story.when(Quiesced(1)))


def test_one_that_was_to_follow_a_dry_run_is_called_off_too(story: Story) -> None:
    story.given_serving().and_also(DryRunRequested(), ReloadRequested())

    actions = story.when(StopRequested())

    assert Report(ReportKind.DRY_RUN_FAILED, 2, CALLED_OFF) in actions
    assert verdicts(actions) == [called_off(3)]


def test_one_that_was_to_follow_the_first_start_is_called_off_whatever_ends_that(
    story: Story,
) -> None:
    story.given(Policy(start_tries=1)).and_also(Launched(), ReloadRequested())

    assert verdicts(story.when(WorkerExited(1, DIED))) == [called_off(2)]


def test_what_nobody_has_requested_has_no_verdict(story: Story) -> None:
    """The first start tells its caller; and what serves again after a failure is no reload."""
    first = Story().given(Policy()).and_also(Launched())
    story.given_serving().and_also(ChannelBroken(1, served_s=20.0))
    assert story.starting == {2}

    assert [verdicts(each.when(StopRequested())) for each in (first, story)] == [[], []]


def test_a_reload_while_stopping_is_refused(story: Story) -> None:
    story.given_serving().and_also(StopRequested())

    assert story.when(ReloadRequested()) == [
        Report(ReportKind.REFUSED, reason="cannot reload: a stop is in progress")
    ]


ACCEPT = Policy(workers_accept=True, drain_timeout_s=9.0)


def test_a_quick_stop_while_settling_waits_for_no_last_clients(story: Story) -> None:
    story.given_serving(replace(ACCEPT, settle_s=5.0)).and_also(ReloadRequested(), WorkerReady(2))

    assert not any(isinstance(each, Quiesce) for each in story.when(StopRequested(quick=True)))


def test_only_the_stop_limits_what_drains_during_it(story: Story) -> None:
    story.given_serving(ACCEPT).and_also(ReloadRequested(), WorkerReady(2), StopRequested())

    assert story.when(Quiesced(1)) == [Drain(1)]
    assert story.when(Quiesced(1)) == []


def test_a_stop_ends_no_generation_for_being_one_too_many(story: Story) -> None:
    story.given_serving(Policy(max_draining=1)).and_also(ReloadRequested(), WorkerReady(2))

    assert story.and_also(StopRequested()).when(BacklogEmptied()) == [RouteTo(None), Drain(2)]


def test_without_a_hold_a_stop_does_not_wait_where_workers_accept(story: Story) -> None:
    story.given_serving(ACCEPT)

    assert CloseListeners(quick=False) in story.when_at_once(StopRequested())


def test_in_a_crash_loop_of_all_workers_a_stop_spawns_one(story: Story) -> None:
    story.given_serving(workers=2)
    while story.fleet[1].alive:
        story.and_also(WorkerExited(story.fleet[1].alive[0].number, CRASHED))

    actions = [*story.when(StopRequested()), *story.when(BacklogEmptied())]

    assert len([each for each in actions if isinstance(each, Spawn)]) == 1


def test_a_backlog_that_is_empty_after_a_quick_stop_changes_nothing(story: Story) -> None:
    story.given_serving().and_also(StopRequested(quick=True))

    assert story.when(BacklogEmptied()) == []


@pytest.mark.parametrize("lame_duck_s", [0.0, 9.0])
def test_listeners_that_are_lost_during_a_stop_are_no_failure(
    story: Story, lame_duck_s: float
) -> None:
    story.given_serving(Policy(lame_duck_s=lame_duck_s)).and_also(StopRequested(), ListenersLost())

    assert story.fleet.exit_status == 0


def test_only_the_stop_limits_a_drain_that_a_stop_began(story: Story) -> None:
    story.given_serving(Policy(drain_timeout_s=9.0))

    story.when(StopRequested())
    story.when(BacklogEmptied())

    assert story.fleet.timers == {Deadline(TimerKind.STOP)}
