"""HUP: from one generation to the next, and back where the next one fails."""

from __future__ import annotations

from dataclasses import replace

import pytest

from socketprotector.core.actions import (
    Action,
    CancelTimer,
    Drain,
    Open,
    Quiesce,
    Release,
    Report,
    ReportKind,
    Retire,
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
    OpenFailed,
    Quiesced,
    ReloadRequested,
    RenewRequested,
    SettingsRead,
    SocketLost,
    TimerKind,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import Next, Phase, Policy
from socketprotector.model.ready_kinds import KINDS
from tests.unit.conftest import Story

DIED = "./daemon exited with status 1"
CRASHED = "killed by SIGSEGV"


def opened(number: int, worker: int, *, fresh: bool = True) -> list[Action]:
    """What opening a generation of one worker takes."""
    return [
        Open(number, fresh),
        Spawn(number, worker, slot=0),
        StartTimer(Deadline(TimerKind.START, number), 60.0),
    ]


def test_the_new_generation_has_the_route_before_the_old_one_drains(story: Story) -> None:
    story.given_serving()

    assert story.when(ReloadRequested()) == [Report(ReportKind.RELOADING), *opened(2, worker=2)]
    assert story.serving == {1}
    assert story.when(WorkerReady(2)) == [
        CancelTimer(Deadline(TimerKind.START, 2)),
        RouteTo(2),
        Drain(1),
        Report(ReportKind.RELOADED, 2),
    ]
    assert (story.serving, story.draining) == ({2}, {1})
    assert story.when(WorkerExited(1, "exited with status 0")) == [Release(1)]


def test_the_new_generation_waits_for_each_of_its_workers(story: Story) -> None:
    story.given_serving(workers=2).and_also(ReloadRequested())

    assert story.when(WorkerReady(4)) == []
    assert story.when(WorkerReady(3))[1:3] == [RouteTo(2), Drain(1)]


# -- a reload that fails --------------------------------------------------------


def test_the_old_generation_keeps_serving_when_the_new_one_exits(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested())

    assert story.when(WorkerExited(2, DIED)) == [
        CancelTimer(Deadline(TimerKind.START, 2)),
        Report(ReportKind.RELOAD_FAILED, 2, DIED),
        Release(2),
    ]
    assert story.serving == {1}


def test_the_old_generation_keeps_serving_when_the_new_one_never_becomes_ready(
    story: Story,
) -> None:
    story.given_serving().and_also(ReloadRequested())

    assert story.when_over(TimerKind.START, 2) == [
        Signal(2, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.KILL, 2), 5.0),
        Report(
            ReportKind.RELOAD_FAILED,
            2,
            f"not ready within 1m (--start-timeout); {KINDS['notify'].hint}",
        ),
    ]
    assert story.when(WorkerReady(2)) == [], "too late"
    assert story.when_over(TimerKind.KILL, 2) == [Signal(2, WorkerSignal.KILL)]
    assert story.when(WorkerExited(2, "killed by SIGKILL")) == [Release(2)]
    assert story.serving == {1}


def test_the_old_generation_keeps_serving_when_the_new_one_cannot_be_opened(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested())

    assert story.when(OpenFailed(2, "./daemon: No such file")) == [
        CancelTimer(Deadline(TimerKind.START, 2)),
        Report(ReportKind.RELOAD_FAILED, 2, "./daemon: No such file"),
        Release(2),
    ]
    assert story.serving == {1}


def test_one_worker_that_dies_between_its_ready_and_the_switch_fails_the_reload(
    story: Story,
) -> None:
    story.given_serving(workers=2).and_also(ReloadRequested(), WorkerReady(3))

    assert story.when(WorkerExited(3, CRASHED)) == [
        CancelTimer(Deadline(TimerKind.START, 2)),
        Signal(4, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.KILL, 2), 5.0),
        Report(ReportKind.RELOAD_FAILED, 2, CRASHED),
    ]
    assert story.when(WorkerReady(4)) == [], "READY that crossed our TERM"
    assert story.when(WorkerExited(4, "killed by SIGTERM")) == [
        CancelTimer(Deadline(TimerKind.KILL, 2)),
        Release(2),
    ]
    assert story.serving == {1}


def test_a_new_generation_that_breaks_its_channel_before_ready_fails_the_reload(
    story: Story,
) -> None:
    story.given_serving().and_also(ReloadRequested())

    assert story.when(ChannelBroken(2)) == [
        Report(ReportKind.BROKEN, 2, "a worker shut down the channel"),
        CancelTimer(Deadline(TimerKind.START, 2)),
        Signal(2, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.KILL, 2), 5.0),
        Report(ReportKind.RELOAD_FAILED, 2, "a worker shut down the channel"),
    ]


def test_a_generation_that_will_not_go_does_not_hold_up_the_next_reload(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested())
    story.when_over(TimerKind.START, 2)

    assert story.when(ReloadRequested()) == [Report(ReportKind.RELOADING), *opened(3, worker=3)]


# -- HUP at a bad moment ----------------------------------------------------------


def test_however_many_reloads_are_asked_for_during_one_a_single_one_follows(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested())

    assert story.when(ReloadRequested()) == []
    assert story.when(ReloadRequested()) == []
    assert story.when(WorkerReady(2)) == [
        CancelTimer(Deadline(TimerKind.START, 2)),
        RouteTo(2),
        Drain(1),
        Report(ReportKind.RELOADED, 2),
        Report(ReportKind.RELOADING),
        *opened(3, worker=3),
    ]
    assert story.when(WorkerReady(3))[-1] == Report(ReportKind.RELOADED, 3)


def test_a_reload_asked_for_during_one_that_fails_is_made_too(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested(), ReloadRequested())

    assert story.when(WorkerExited(2, DIED)) == [
        CancelTimer(Deadline(TimerKind.START, 2)),
        Report(ReportKind.RELOAD_FAILED, 2, DIED),
        Report(ReportKind.RELOADING),
        Release(2),
        *opened(3, worker=3),
    ]


def test_a_reload_ends_a_crash_loop_of_the_old_release(story: Story) -> None:
    story.given_serving()
    story.and_also(*(WorkerExited(number, CRASHED) for number in (1, 2, 3)))

    assert story.when(ReloadRequested()) == [Report(ReportKind.RELOADING), *opened(2, worker=5)]
    assert story.when(WorkerReady(5)) == [
        CancelTimer(Deadline(TimerKind.START, 2)),
        RouteTo(2),
        Drain(1),
        CancelTimer(Deadline(TimerKind.WORKER_RESPAWN, 4)),
        Report(ReportKind.RELOADED, 2),
        Release(1),
    ]


def test_a_reload_that_fails_leaves_a_crash_loop_its_back_off(story: Story) -> None:
    story.given_serving()
    story.and_also(*(WorkerExited(number, CRASHED) for number in (1, 2, 3)), ReloadRequested())
    story.when(WorkerExited(5, DIED))

    assert story.when_over(TimerKind.WORKER_RESPAWN, 4) == [
        Spawn(1, worker=4, slot=0),
        StartTimer(Deadline(TimerKind.WORKER_START, 4), 60.0),
    ]
    assert story.serving == {1}


def test_the_old_generation_crashing_during_a_reload_is_replaced_within_itself(
    story: Story,
) -> None:
    story.given_serving().and_also(ReloadRequested())

    assert story.when(WorkerExited(1, CRASHED)) == [
        Report(ReportKind.EXITED, 1, CRASHED),
        Spawn(1, worker=3, slot=0),
        StartTimer(Deadline(TimerKind.WORKER_START, 3), 60.0),
    ]
    assert story.starting == {2}


# -- settling --------------------------------------------------------------------

SETTLE = Policy(settle_s=5.0)


def test_the_old_generation_stays_until_the_new_one_has_settled(story: Story) -> None:
    story.given_serving(SETTLE).and_also(ReloadRequested())

    assert story.when(WorkerReady(2)) == [
        CancelTimer(Deadline(TimerKind.START, 2)),
        RouteTo(2),
        StartTimer(Deadline(TimerKind.SETTLE, 2), 5.0),
    ]
    assert (story.settling, story.serving) == ({2}, {1})
    assert story.when_over(TimerKind.SETTLE, 2) == [Drain(1), Report(ReportKind.RELOADED, 2)]


def test_a_worker_that_dies_while_settling_gives_the_route_back(story: Story) -> None:
    story.given_serving(SETTLE, workers=2)
    story.and_also(ReloadRequested(), WorkerReady(3), WorkerReady(4))

    assert story.when(WorkerExited(3, CRASHED)) == [
        CancelTimer(Deadline(TimerKind.SETTLE, 2)),
        RouteTo(1),
        Drain(2),
        Report(ReportKind.RELOAD_FAILED, 2, CRASHED),
    ]
    assert (story.serving, story.draining) == ({1}, {2})
    assert story.when(WorkerExited(4, "exited with status 0")) == [Release(2)]


def test_what_a_dead_worker_has_left_is_told_to_finish_once_the_route_is_given_back(
    story: Story,
) -> None:
    story.given_serving(replace(SETTLE, workers_accept=True))
    story.and_also(ReloadRequested(), WorkerReady(2, retires=True))

    assert story.when(WorkerExited(2, CRASHED, orphans=True)) == [
        CancelTimer(Deadline(TimerKind.SETTLE, 2)),
        RouteTo(1),
        Quiesce(2),
        Report(ReportKind.RELOAD_FAILED, 2, CRASHED),
        Retire(2),
    ]


@pytest.mark.parametrize(
    ("served_s", "lost", "when"),
    [
        (0.3141, False, " within 320ms of being ready"),
        (0.001, False, " within 10ms of being ready"),
        (0.0, False, ""),
        (3.0, True, ""),
    ],
)
def test_the_reason_says_how_long_a_settling_worker_had_served(
    story: Story, served_s: float, lost: bool, when: str
) -> None:
    """The time is an upper limit; a worker whose descriptors were lost may still run."""
    story.given_serving(SETTLE).and_also(ReloadRequested(), WorkerReady(2))

    actions = story.when(WorkerExited(2, "exited with status 3", served_s=served_s, lost=lost))

    assert Report(ReportKind.RELOAD_FAILED, 2, f"exited with status 3{when}") in actions


def test_a_channel_that_breaks_while_settling_gives_the_route_back(story: Story) -> None:
    story.given_serving(SETTLE).and_also(ReloadRequested(), WorkerReady(2))

    assert story.when(ChannelBroken(2)) == [
        Report(ReportKind.BROKEN, 2, "a worker shut down the channel"),
        CancelTimer(Deadline(TimerKind.SETTLE, 2)),
        RouteTo(1),
        Drain(2),
        Report(ReportKind.RELOAD_FAILED, 2, "a worker shut down the channel"),
    ]


def test_the_old_generation_is_kept_alive_while_the_new_one_settles(story: Story) -> None:
    story.given_serving(SETTLE).and_also(ReloadRequested(), WorkerReady(2))

    assert story.when(WorkerExited(1, CRASHED)) == [
        Report(ReportKind.EXITED, 1, CRASHED),
        Spawn(1, worker=3, slot=0),
        StartTimer(Deadline(TimerKind.WORKER_START, 3), 60.0),
    ]


def test_a_channel_of_the_old_one_that_breaks_leaves_the_route_with_the_settling_one(
    story: Story,
) -> None:
    story.given_serving(SETTLE).and_also(ReloadRequested(), WorkerReady(2))

    assert story.when(ChannelBroken(1, served_s=60.0)) == [
        Report(ReportKind.BROKEN, 1, "a worker shut down the channel"),
        Drain(1),
    ]
    assert story.when(WorkerExited(2, CRASHED)) == [
        CancelTimer(Deadline(TimerKind.SETTLE, 2)),
        RouteTo(None),
        Drain(2),
        Report(ReportKind.RELOAD_FAILED, 2, CRASHED),
        Release(2),
        *opened(3, worker=3, fresh=False),
    ]


def test_a_reload_asked_for_while_settling_follows_when_that_is_over(story: Story) -> None:
    story.given_serving(SETTLE).and_also(ReloadRequested(), WorkerReady(2))

    assert story.when(ReloadRequested()) == []
    assert story.when_over(TimerKind.SETTLE, 2) == [
        Drain(1),
        Report(ReportKind.RELOADED, 2),
        Report(ReportKind.RELOADING),
        *opened(3, worker=3),
    ]


# -- stop-first ------------------------------------------------------------------

STOP_FIRST = Policy(stop_first=True)


def test_stop_first_starts_the_new_generation_when_the_old_one_is_gone(story: Story) -> None:
    story.given_serving(STOP_FIRST)

    assert story.when(ReloadRequested()) == [
        Report(ReportKind.RELOADING),
        RouteTo(None),
        Drain(1),
        StartTimer(Deadline(TimerKind.DRAIN, 1), 30.0),
    ]
    assert story.when(WorkerExited(1, "exited with status 0")) == [
        CancelTimer(Deadline(TimerKind.DRAIN, 1)),
        Release(1),
        *opened(2, worker=2),
    ]
    assert story.when(WorkerReady(2)) == [
        CancelTimer(Deadline(TimerKind.START, 2)),
        RouteTo(2),
        Report(ReportKind.RELOADED, 2),
    ]


def test_stop_first_lets_an_old_generation_read_the_clients_it_has_accepted(story: Story) -> None:
    story.given_serving(replace(STOP_FIRST, workers_accept=True))

    assert story.when(ReloadRequested()) == [
        Report(ReportKind.RELOADING),
        RouteTo(None),
        Quiesce(1),
        StartTimer(Deadline(TimerKind.DRAIN, 1), 30.0),
    ]
    assert story.when(Quiesced(1)) == [
        Drain(1),
        StartTimer(Deadline(TimerKind.DRAIN, 1), 30.0),
    ]


def test_stop_first_ends_an_old_generation_that_does_not_go(story: Story) -> None:
    story.given_serving(STOP_FIRST).and_also(ReloadRequested())

    assert story.when_over(TimerKind.DRAIN, 1) == [
        Signal(1, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.KILL, 1), 5.0),
    ]
    assert story.when_over(TimerKind.KILL, 1) == [Signal(1, WorkerSignal.KILL)]
    assert story.when(WorkerExited(1, "killed by SIGKILL")) == [
        Release(1),
        *opened(2, worker=2),
    ]


def test_stop_first_starts_the_previous_command_again_when_the_new_one_fails(
    story: Story,
) -> None:
    story.given_serving(STOP_FIRST)
    story.and_also(ReloadRequested(), WorkerExited(1, "exited with status 0"))

    assert story.when(WorkerExited(2, DIED)) == [
        CancelTimer(Deadline(TimerKind.START, 2)),
        Report(ReportKind.RELOAD_FAILED, 2, DIED),
        Release(2),
        *opened(3, worker=3, fresh=False),
    ]
    assert story.when(WorkerReady(3)) == [
        CancelTimer(Deadline(TimerKind.START, 3)),
        RouteTo(3),
        Report(ReportKind.RECOVERED, 3),
    ]


def test_the_previous_command_is_tried_again_and_again_with_a_growing_delay(
    story: Story,
) -> None:
    story.given_serving(STOP_FIRST)
    story.and_also(ReloadRequested(), WorkerExited(1, "exited with status 0"))
    story.and_also(WorkerExited(2, DIED), WorkerExited(3, DIED), WorkerExited(4, DIED))

    assert story.when(WorkerExited(5, DIED)) == [
        CancelTimer(Deadline(TimerKind.START, 5)),
        Report(ReportKind.RETRYING, 5, DIED),
        StartTimer(Deadline(TimerKind.OPEN), 0.1),
        Release(5),
    ]
    assert story.when_over(TimerKind.OPEN) == opened(6, worker=6, fresh=False)
    assert StartTimer(Deadline(TimerKind.OPEN), 0.2) in story.when(WorkerExited(6, DIED))


def test_a_reload_does_not_wait_for_the_end_of_a_back_off(story: Story) -> None:
    story.given_serving(STOP_FIRST)
    story.and_also(ReloadRequested(), WorkerExited(1, "exited with status 0"))
    story.and_also(*(WorkerExited(number, DIED) for number in (2, 3, 4, 5)))

    assert story.when(ReloadRequested()) == [
        Report(ReportKind.RELOADING),
        CancelTimer(Deadline(TimerKind.OPEN)),
        *opened(6, worker=6),
    ]


def test_a_reload_asked_for_while_the_old_generation_drains_is_made_too(story: Story) -> None:
    story.given_serving(STOP_FIRST).and_also(ReloadRequested())

    assert story.when(ReloadRequested()) == []
    story.when(WorkerExited(1, "exited with status 0"))
    assert story.when(WorkerReady(2)) == [
        CancelTimer(Deadline(TimerKind.START, 2)),
        RouteTo(2),
        Report(ReportKind.RELOADED, 2),
        Report(ReportKind.RELOADING),
        RouteTo(None),
        Drain(2),
        StartTimer(Deadline(TimerKind.DRAIN, 2), 30.0),
    ]


def test_stop_first_with_every_worker_dead_starts_the_new_generation_at_once(
    story: Story,
) -> None:
    story.given_serving(STOP_FIRST)
    story.and_also(*(WorkerExited(number, CRASHED) for number in (1, 2, 3)))

    assert story.when(ReloadRequested()) == [
        Report(ReportKind.RELOADING),
        RouteTo(None),
        Drain(1),
        StartTimer(Deadline(TimerKind.DRAIN, 1), 30.0),
        CancelTimer(Deadline(TimerKind.WORKER_RESPAWN, 4)),
        CancelTimer(Deadline(TimerKind.DRAIN, 1)),
        Release(1),
        *opened(2, worker=5),
    ]


# -- a channel that breaks ---------------------------------------------------------


def test_a_serving_generation_with_a_broken_channel_is_replaced_by_another_of_its_command(
    story: Story,
) -> None:
    story.given_serving()

    assert story.when(ChannelBroken(1, served_s=60.0)) == [
        Report(ReportKind.BROKEN, 1, "a worker shut down the channel"),
        RouteTo(None),
        Drain(1),
        *opened(2, worker=2, fresh=False),
    ]
    assert story.when(WorkerReady(2)) == [
        CancelTimer(Deadline(TimerKind.START, 2)),
        RouteTo(2),
        Report(ReportKind.RECOVERED, 2),
    ]


def test_a_release_that_breaks_each_channel_is_started_with_a_growing_delay(
    story: Story,
) -> None:
    story.given_serving()
    story.and_also(ChannelBroken(1), WorkerReady(2), ChannelBroken(2), WorkerReady(3))

    assert story.when(ChannelBroken(3)) == [
        Report(ReportKind.BROKEN, 3, "a worker shut down the channel"),
        RouteTo(None),
        Drain(3),
        StartTimer(Deadline(TimerKind.OPEN), 0.1),
    ]


@pytest.mark.parametrize("served_s", [10.0, 60.0])
def test_a_channel_that_breaks_after_ten_seconds_of_service_starts_a_new_count(
    story: Story, served_s: float
) -> None:
    story.given_serving()
    story.and_also(ChannelBroken(1), WorkerReady(2), ChannelBroken(2), WorkerReady(3))

    assert story.when(ChannelBroken(3, served_s=served_s))[3:] == opened(4, worker=4, fresh=False)


def test_a_broken_channel_during_a_reload_leaves_it_to_the_new_generation(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested())

    assert story.when(ChannelBroken(1)) == [
        Report(ReportKind.BROKEN, 1, "a worker shut down the channel"),
        RouteTo(None),
        Drain(1),
    ]
    assert story.when(WorkerExited(2, DIED)) == [
        CancelTimer(Deadline(TimerKind.START, 2)),
        Report(ReportKind.RELOAD_FAILED, 2, DIED),
        Release(2),
        *opened(3, worker=3, fresh=False),
    ]


def test_under_stop_first_a_broken_generation_is_ended_before_the_next_one(story: Story) -> None:
    story.given_serving(STOP_FIRST)

    assert story.when(ChannelBroken(1, served_s=60.0)) == [
        Report(ReportKind.BROKEN, 1, "a worker shut down the channel"),
        RouteTo(None),
        Drain(1),
        StartTimer(Deadline(TimerKind.DRAIN, 1), 30.0),
    ]
    assert story.when(WorkerExited(1, "exited with status 0"))[2:] == opened(
        2, worker=2, fresh=False
    )


# -- draining --------------------------------------------------------------------


def test_a_drain_timeout_sends_term_and_then_kill(story: Story) -> None:
    story.given_serving(Policy(drain_timeout_s=9.0)).and_also(ReloadRequested())

    assert StartTimer(Deadline(TimerKind.DRAIN, 1), 9.0) in story.when(WorkerReady(2))
    assert story.when_over(TimerKind.DRAIN, 1) == [
        Signal(1, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.KILL, 1), 5.0),
    ]
    assert story.when_over(TimerKind.KILL, 1) == [Signal(1, WorkerSignal.KILL)]


def test_without_a_drain_timeout_an_old_generation_may_take_for_ever(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested(), WorkerReady(2))

    assert story.draining == {1}
    assert story.fleet.timers == frozenset()


def test_the_oldest_draining_generation_is_ended_when_there_would_be_too_many(
    story: Story,
) -> None:
    story.given_serving(Policy(max_draining=1))
    story.and_also(ReloadRequested(), WorkerReady(2), ReloadRequested())

    assert story.when(WorkerReady(3)) == [
        CancelTimer(Deadline(TimerKind.START, 3)),
        RouteTo(3),
        Drain(2),
        Signal(1, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.KILL, 1), 5.0),
        Report(ReportKind.RELOADED, 3),
    ]


def test_only_draining_generations_above_the_limit_are_ended(story: Story) -> None:
    story.given_serving(Policy(max_draining=2))
    for number in (2, 3):
        story.and_also(ReloadRequested(), WorkerReady(number))

    actions = story.and_also(ReloadRequested()).when(WorkerReady(4))

    assert story.draining == {1, 2, 3}
    assert [each.worker for each in actions if isinstance(each, Signal)] == [1]


def test_fewer_draining_generations_than_the_limit_are_not_ended(story: Story) -> None:
    story.given_serving(Policy(max_draining=3))
    story.and_also(ReloadRequested(), WorkerReady(2), ReloadRequested(), WorkerReady(3))

    assert [g.phase for g in story.fleet.generations] == [
        Phase.DRAINING,
        Phase.DRAINING,
        Phase.SERVING,
    ]
    assert story.fleet.timers == frozenset()


def test_from_the_fourth_draining_generation_on_there_is_a_warning(story: Story) -> None:
    story.given_serving()
    warned = [
        [a for a in story.when(WorkerReady(number)) if a == many(number - 1)]
        for number in (2, 3, 4, 5, 6)
        if story.when(ReloadRequested())
    ]

    assert warned == [[], [], [], [many(4)], [many(5)]]


def many(count: int) -> Report:
    return Report(ReportKind.MANY_DRAINING, reason=f"{count} generations")


@pytest.mark.parametrize("waiting", [0, 3])
def test_what_a_draining_generation_leaves_goes_to_the_route_when_its_last_worker_dies(
    story: Story, waiting: int
) -> None:
    story.given_serving().and_also(ReloadRequested(), WorkerReady(2))

    assert story.when(WorkerExited(1, CRASHED, waiting=waiting)) == [Release(1)]


def test_one_that_waits_to_be_opened_comes_where_what_serves_fails_meanwhile(story: Story) -> None:
    """It is not forgotten for the last good command, and has a verdict."""
    story.given_serving(Policy(workers_accept=True))
    story.and_also(ReloadRequested(), WorkerReady(2), ReloadRequested())
    assert story.fleet.to_open is Next.FRESH

    story.and_also(ChannelBroken(2, served_s=20.0), Quiesced(1))
    actions = story.when(Quiesced(2))

    assert Open(3, fresh=True) in actions
    assert Report(ReportKind.RELOADED, 3) in story.when(WorkerReady(3))


def test_a_dry_run_that_waits_to_be_opened_ends_where_what_serves_fails(story: Story) -> None:
    """The last good command comes next."""
    story.given_serving(Policy(workers_accept=True))
    story.and_also(ReloadRequested(), WorkerReady(2), DryRunRequested())
    assert story.fleet.to_open is Next.FRESH

    story.and_also(ChannelBroken(2, served_s=20.0))

    assert (story.fleet.to_open, story.fleet.dry_run) == (Next.LAST_GOOD, False)


@pytest.mark.parametrize("breaks", [False, True], ids=["another serves", "no other serves"])
def test_a_replacement_that_fails_while_it_settles_has_a_verdict_unless_a_reload_waits(
    story: Story, breaks: bool
) -> None:
    """The waiting reload would be taken to have failed: its number may be that of this one."""
    story.given_serving(Policy(settle_s=5.0)).and_also(RenewRequested(), WorkerReady(2))
    if breaks:
        story.and_also(ChannelBroken(1))
    else:
        story.and_also(ReloadRequested())

    news = ReportKind.RELOAD_FAILED if breaks else ReportKind.RETRYING
    assert Report(news, 2, DIED) in story.when(WorkerExited(2, DIED))


def test_a_generation_that_breaks_its_socket_before_ready_fails(story: Story) -> None:
    story.given_serving(Policy(workers_accept=True)).and_also(ReloadRequested())

    reason = "a worker broke its listening socket, or another program removed its socket file"
    assert Report(ReportKind.RELOAD_FAILED, 2, reason) in story.when(SocketLost(2))


def test_a_channel_that_has_served_counts_as_one_failure(story: Story) -> None:
    story.given_serving().and_also(ChannelBroken(1), WorkerReady(2), ChannelBroken(2))
    assert story.fleet.failed_starts == 2

    story.and_also(WorkerReady(3), ChannelBroken(3, served_s=10.0))

    assert story.fleet.failed_starts == 1


def test_under_stop_first_a_replacement_waits_for_the_old_workers_too(story: Story) -> None:
    story.given_serving(STOP_FIRST)

    actions = story.when(RenewRequested())

    assert actions.index(RouteTo(None)) < actions.index(Drain(1))
    assert opened(2, worker=2, fresh=False)[0] not in actions


def test_stop_first_gives_no_new_time_to_what_is_ended_already(story: Story) -> None:
    story.given_serving(Policy(drain_timeout_s=9.0)).and_also(ReloadRequested(), WorkerReady(2))
    story.when_over(TimerKind.DRAIN, 1)
    story.fleet = replace(story.fleet, configured=True)

    actions = story.and_also(ReloadRequested()).when(SettingsRead(STOP_FIRST))

    drains = [each.deadline.target for each in actions if isinstance(each, StartTimer)]
    assert drains == [2]


def test_why_a_replacement_or_a_dry_run_cannot_begin(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested())

    for event, reason in (
        (
            RenewRequested(),
            "a replacement is already in progress, or nothing is serving; see `status`",
        ),
        (
            DryRunRequested(),
            "cannot dry-run now: a reload or stop is in progress, or nothing is serving",
        ),
    ):
        assert story.when(event) == [Report(ReportKind.REFUSED, reason=reason)]
