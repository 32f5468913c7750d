"""A lame duck: balancers are told, and all is served as before."""

from __future__ import annotations

import pytest

from socketprotector.core.actions import (
    CancelTimer,
    CloseListeners,
    Drain,
    Hold,
    Report,
    ReportKind,
    RouteTo,
    Signal,
    Spawn,
    StartTimer,
    WorkerSignal,
)
from socketprotector.core.decide import resume
from socketprotector.core.events import (
    BacklogEmptied,
    Deadline,
    Event,
    HoldReleased,
    HoldRequested,
    LameDuckRequested,
    Launched,
    ListenersLost,
    ReloadRequested,
    ScaleRequested,
    StopRequested,
    TimerKind,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import LameDuck, Policy, Stop
from socketprotector.core.stop import CALLED_OFF, SETTLED_BY_STOP
from tests.unit.conftest import Story

POLICY = Policy(lame_duck_s=10.0)
#: What is said of a graceful stop, and how it begins.
STOPS = [
    Report(ReportKind.STOPPING),
    CloseListeners(quick=False),
    StartTimer(Deadline(TimerKind.STOP), 30.0),
]
BEGUN = Report(ReportKind.LAME_DUCK, reason="still serving; the stop begins in 10s")
LAME_DUCK = Deadline(TimerKind.LAME_DUCK)
IDLE = Deadline(TimerKind.LAME_DUCK_IDLE)


def state(story: Story) -> LameDuck:
    return story.fleet.lame_duck


def test_a_stop_comes_after_the_lame_duck_and_nothing_changes_before(story: Story) -> None:
    story.given_serving(POLICY)

    assert story.when(StopRequested()) == [BEGUN, StartTimer(LAME_DUCK, 10.0)]
    assert state(story) is LameDuck.STOPPING
    assert story.fleet.stopping is None
    assert story.serving == {1}

    assert story.when_over(TimerKind.LAME_DUCK) == STOPS
    assert story.fleet.stopping is Stop.GRACEFUL
    assert state(story) is LameDuck.OFF
    assert story.when(BacklogEmptied()) == [RouteTo(None), Drain(1)]


def test_a_worker_that_dies_meanwhile_is_replaced(story: Story) -> None:
    story.given_serving(POLICY).and_also(StopRequested())

    assert Spawn(1, worker=2, slot=0) in story.when(WorkerExited(1, "killed by SIGSEGV"))


def test_without_an_option_a_stop_begins_at_once(story: Story) -> None:
    story.given_serving(Policy())

    assert story.when(StopRequested()) == STOPS


def test_a_start_that_is_stopped_announces_nothing(story: Story) -> None:
    story.given(POLICY).and_also(Launched())

    story.when(StopRequested())

    assert story.fleet.stopping is Stop.GRACEFUL


def test_a_second_term_ends_it_and_a_third_one_is_a_quick_stop(story: Story) -> None:
    story.given_serving(POLICY).and_also(StopRequested())

    first, *others = story.when(StopRequested())
    assert (first, others) == (STOPS[0], [CancelTimer(LAME_DUCK), *STOPS[1:]])
    assert Signal(1, WorkerSignal.TERM) in story.when(StopRequested())


def test_a_quick_stop_does_not_wait_for_it(story: Story) -> None:
    story.given_serving(POLICY).and_also(StopRequested())

    assert story.when(StopRequested(quick=True)) == [
        Report(ReportKind.STOPPING),
        RouteTo(None),
        CancelTimer(LAME_DUCK),
        CloseListeners(quick=True),
        Drain(1),
        Signal(1, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.KILL, 1), 5.0),
    ]


def test_it_ends_earlier_when_no_client_comes(story: Story) -> None:
    story.given_serving(Policy(lame_duck_s=10.0, lame_duck_idle_s=2.0))

    assert story.when(StopRequested()) == [
        BEGUN,
        StartTimer(LAME_DUCK, 10.0),
        StartTimer(IDLE, 2.0),
    ]
    assert story.when_over(TimerKind.LAME_DUCK_IDLE) == [
        STOPS[0],
        CancelTimer(LAME_DUCK),
        *STOPS[1:],
    ]


def test_what_waits_on_hold_is_accepted(story: Story) -> None:
    story.given_serving(POLICY).and_also(HoldRequested(60.0))

    assert story.when(StopRequested()) == [
        CancelTimer(Deadline(TimerKind.HOLD)),
        Hold(False),
        Report(ReportKind.RELEASED),
        BEGUN,
        StartTimer(LAME_DUCK, 10.0),
    ]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (ReloadRequested(), "cannot reload: a stop is in progress"),
        (ScaleRequested(+1), "cannot scale: a stop is in progress"),
        (HoldRequested(3.0), "cannot hold: a stop is in progress"),
        (LameDuckRequested(False), "a stop is in progress"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_nothing_new_is_begun_in_that_of_a_stop(story: Story, event: Event, reason: str) -> None:
    story.given_serving(POLICY).and_also(StopRequested())

    assert story.when(event) == [Report(ReportKind.REFUSED, reason=reason)]
    assert state(story) is LameDuck.STOPPING


def test_a_reload_that_is_under_way_goes_on_and_one_that_waits_for_it_does_not_come(
    story: Story,
) -> None:
    story.given_serving(POLICY).and_also(ReloadRequested(), ReloadRequested(), StopRequested())

    actions = story.when(WorkerReady(2))

    assert Drain(1) in actions
    # Not earlier: who waits for generation 2 takes the first verdict of it, or of a later one.
    off = Report(ReportKind.RELOAD_FAILED, 3, CALLED_OFF)
    assert actions.index(Report(ReportKind.RELOADED, 2)) < actions.index(off)
    assert story.serving == {2}
    assert not story.starting


def test_a_reload_that_is_not_over_in_time_is_called_off(story: Story) -> None:
    story.given_serving(POLICY).and_also(ReloadRequested(), StopRequested())

    actions = story.when_over(TimerKind.LAME_DUCK)

    assert Signal(2, WorkerSignal.TERM) in actions
    assert Report(ReportKind.RELOAD_FAILED, 2, CALLED_OFF) in actions
    assert story.serving == {1}


@pytest.mark.parametrize(
    "event",
    [None, StopRequested(), StopRequested(quick=True)],
    ids=["its time is over", "TERM", "INT"],
)
def test_one_that_settles_longer_serves_to_the_end_unless_that_is_at_once(
    story: Story, event: StopRequested | None
) -> None:
    story.given_serving(Policy(lame_duck_s=10.0, settle_s=60.0))
    story.and_also(ReloadRequested(), WorkerReady(2), StopRequested())
    assert story.settling == {2}

    actions = story.when(event) if event else story.when_over(TimerKind.LAME_DUCK)

    good = Report(ReportKind.RELOADED, 2, SETTLED_BY_STOP)
    bad = Report(ReportKind.RELOAD_FAILED, 2, CALLED_OFF)
    at_once = event is not None and event.quick
    assert (good in actions, bad in actions) == (not at_once, at_once)


def test_where_no_client_can_connect_any_more_it_ends_as_was_asked(story: Story) -> None:
    story.given_serving(POLICY).and_also(StopRequested())

    first, *_ = story.when(ListenersLost())

    assert first == Report(ReportKind.STOPPING, reason="no listener is left")
    assert story.fleet.exit_status == 0


# -- without a stop --------------------------------------------------------------


def test_it_is_on_until_it_is_taken_back(story: Story) -> None:
    story.given_serving()

    assert story.when(LameDuckRequested(True)) == [Report(ReportKind.LAME_DUCK_ON)]
    assert state(story) is LameDuck.ON
    assert story.when(LameDuckRequested(True)) == []
    assert story.when(LameDuckRequested(False)) == [Report(ReportKind.LAME_DUCK_OFF)]
    assert story.when(LameDuckRequested(False)) == []
    assert state(story) is LameDuck.OFF


def test_a_reload_leaves_it_on(story: Story) -> None:
    story.given_serving().and_also(LameDuckRequested(True), ReloadRequested(), WorkerReady(2))

    assert story.serving == {2}
    assert state(story) is LameDuck.ON


def test_a_stop_ends_it(story: Story) -> None:
    story.given_serving().and_also(LameDuckRequested(True))
    assert story.when(StopRequested()) == STOPS
    assert state(story) is LameDuck.OFF


def test_a_stop_with_a_lame_duck_of_its_own_takes_its_whole_time(story: Story) -> None:
    story.given_serving(POLICY).and_also(LameDuckRequested(True))

    assert story.when(StopRequested()) == [BEGUN, StartTimer(LAME_DUCK, 10.0)]
    assert state(story) is LameDuck.STOPPING


# -- another program -------------------------------------------------------------


def test_another_program_goes_on_with_what_is_left_of_it(story: Story) -> None:
    story.given_serving(POLICY).and_also(StopRequested())

    assert resume(story.fleet, {LAME_DUCK: 4.0}) == (RouteTo(1), StartTimer(LAME_DUCK, 4.0))


def test_another_program_waits_anew_for_clients_that_it_does_not_know_of(story: Story) -> None:
    story.given_serving(Policy(lame_duck_s=10.0, lame_duck_idle_s=2.0)).and_also(StopRequested())

    assert StartTimer(IDLE, 2.0) in resume(story.fleet, {LAME_DUCK: 4.0, IDLE: 0.5})


def test_a_hold_is_begun_and_ended_once(story: Story) -> None:
    story.given_serving(POLICY)
    hold = Deadline(TimerKind.HOLD)
    assert story.when(HoldReleased()) == []

    assert story.when(HoldRequested(3.0)) == [
        Hold(True),
        Report(ReportKind.HELD),
        StartTimer(hold, 3.0),
    ]
    assert story.when(HoldRequested(4.0)) == [StartTimer(hold, 4.0)]
    released = [CancelTimer(hold), Hold(False), Report(ReportKind.RELEASED)]
    assert story.when(HoldReleased()) == released
