"""Workers of the serving generation: replaced when they die, more of them, fewer of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from socketprotector.core import workers
from socketprotector.core.actions import (
    Action,
    CancelTimer,
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
    Deadline,
    DeadlinePassed,
    Event,
    KillRequested,
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
from socketprotector.core.fleet import Fleet, Policy, State, Worker
from socketprotector.core.snapshot import CODEC
from socketprotector.core.workers import MOST_ORPHANS
from socketprotector.model.backoff import backoff_s
from tests.together import together
from tests.unit.conftest import Story

CRASHED = "killed by SIGSEGV"
OLD = "older than 1 h"


def lost(number: int) -> WorkerExited:
    """A kill of the protector has lost the worker, which runs on."""
    return WorkerExited(number, CRASHED, served_s=60.0, orphans=True, lost=True)


def scaled(story: Story, change: int) -> list[Action]:
    """Scale, which is reported first; return what else is done."""
    told, *others = story.when(ScaleRequested(change))
    assert told == Report(ReportKind.SCALED, reason=f"{story.fleet.workers_wanted} workers")
    return others


# -- replaced --------------------------------------------------------------------


def test_a_worker_that_dies_is_replaced_at_once_in_its_slot(story: Story) -> None:
    story.given_serving(workers=2)

    assert story.when(WorkerExited(1, CRASHED, served_s=60.0)) == [
        Report(ReportKind.EXITED, 1, CRASHED),
        Spawn(1, worker=3, slot=0),
        StartTimer(Deadline(TimerKind.WORKER_START, 3), 60.0),
    ]
    assert story.when(WorkerReady(3)) == [CancelTimer(Deadline(TimerKind.WORKER_START, 3))]


def test_of_too_many_groups_of_dead_workers_the_oldest_is_ended_once(story: Story) -> None:
    story.given_serving()
    first = 1
    for number in range(first, first + MOST_ORPHANS):
        done = story.when(WorkerExited(number, CRASHED, served_s=60.0, orphans=True))
        assert Retire(number) in done
        assert not any(isinstance(each, Signal) for each in done)
        story.when(WorkerReady(number + 1))

    for number in (first + MOST_ORPHANS, first + MOST_ORPHANS + 1):
        oldest = number - MOST_ORPHANS
        done = story.when(WorkerExited(number, CRASHED, served_s=60.0, orphans=True))
        assert [each for each in done if isinstance(each, Signal)] == [
            Signal(oldest, WorkerSignal.TERM)
        ]
        assert StartTimer(Deadline(TimerKind.WORKER_KILL, oldest), 5.0) in done
        story.when(WorkerReady(number + 1))


def test_twice_as_many_groups_as_workers_may_live_on(story: Story) -> None:
    story.given_serving(workers=MOST_ORPHANS)
    dead = range(1, 1 + MOST_ORPHANS)
    for number in (*dead, *(each + MOST_ORPHANS for each in dead)):
        done = story.when(WorkerExited(number, CRASHED, served_s=60.0, orphans=True))
        assert not any(isinstance(each, Signal) for each in done)
        story.when(WorkerReady(number + MOST_ORPHANS))


def test_one_group_more_than_twice_the_workers_ends_the_oldest(story: Story) -> None:
    workers = MOST_ORPHANS // 2 + 1
    story.given_serving(workers=workers)
    for number in range(1, 1 + 2 * workers):
        story.and_also(WorkerExited(number, CRASHED, served_s=60.0, orphans=True))
        story.and_also(WorkerReady(number + workers))

    done = story.when(WorkerExited(1 + 2 * workers, CRASHED, served_s=60.0, orphans=True))

    assert [each for each in done if isinstance(each, Signal)] == [Signal(1, WorkerSignal.TERM)]


def test_from_the_third_quick_death_on_the_next_worker_waits(story: Story) -> None:
    story.given_serving()
    story.and_also(WorkerExited(1, CRASHED, served_s=9.9), WorkerReady(2))
    story.and_also(WorkerExited(2, CRASHED, served_s=0.1))

    assert story.when(WorkerExited(3, CRASHED)) == [
        CancelTimer(Deadline(TimerKind.WORKER_START, 3)),
        Report(ReportKind.EXITED, 1, CRASHED),
        StartTimer(Deadline(TimerKind.WORKER_RESPAWN, 4), 0.1),
    ]
    assert story.when_over(TimerKind.WORKER_RESPAWN, 4) == [
        Spawn(1, worker=4, slot=0),
        StartTimer(Deadline(TimerKind.WORKER_START, 4), 60.0),
    ]


def test_the_delay_grows_from_one_quick_death_to_the_next(story: Story) -> None:
    story.given_serving().and_also(*(WorkerExited(number, CRASHED) for number in (1, 2, 3)))
    story.when_over(TimerKind.WORKER_RESPAWN, 4)

    assert StartTimer(Deadline(TimerKind.WORKER_RESPAWN, 5), 0.2) in story.when(
        WorkerExited(4, CRASHED)
    )


def test_a_death_after_ten_seconds_of_service_is_no_quick_one(story: Story) -> None:
    story.given_serving()
    story.and_also(WorkerExited(1, CRASHED), WorkerExited(2, CRASHED), WorkerReady(3))
    story.and_also(WorkerExited(3, CRASHED, served_s=10.0))

    assert Spawn(1, worker=5, slot=0) in story.when(WorkerExited(4, CRASHED))
    assert Spawn(1, worker=6, slot=0) in story.when(WorkerExited(5, CRASHED))
    assert StartTimer(Deadline(TimerKind.WORKER_RESPAWN, 7), 0.1) in story.when(
        WorkerExited(6, CRASHED)
    )


def test_each_slot_counts_its_own_quick_deaths(story: Story) -> None:
    story.given_serving(workers=2)
    story.and_also(WorkerExited(1, CRASHED), WorkerExited(3, CRASHED))

    assert Spawn(1, worker=5, slot=1) in story.when(WorkerExited(2, CRASHED))


@together(
    ("deaths", "seconds"),
    [(0, 0.0), (2, 0.0), (3, 0.1), (4, 0.2), (12, 51.2), (13, 60.0), (5000, 60.0)],
)
def test_the_delay_doubles_up_to_a_minute(deaths: int, seconds: float) -> None:
    assert backoff_s(deaths) == pytest.approx(seconds)


def test_a_replacement_that_never_becomes_ready_is_ended_and_counted(story: Story) -> None:
    story.given_serving().and_also(WorkerExited(1, CRASHED), WorkerExited(2, CRASHED))

    assert story.when_over(TimerKind.WORKER_START, 3) == [
        Signal(3, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.WORKER_KILL, 3), 5.0),
    ]
    assert story.when_over(TimerKind.WORKER_KILL, 3) == [Signal(3, WorkerSignal.KILL)]
    assert story.when(WorkerExited(3, "killed by SIGKILL")) == [
        Report(ReportKind.EXITED, 1, "killed by SIGKILL"),
        StartTimer(Deadline(TimerKind.WORKER_RESPAWN, 4), 0.1),
    ]


def test_ready_after_term_does_not_save_a_replacement_from_kill(story: Story) -> None:
    story.given_serving().and_also(WorkerExited(1, CRASHED))
    story.when_over(TimerKind.WORKER_START, 2)

    assert story.when(WorkerReady(2)) == []
    assert story.when_over(TimerKind.WORKER_KILL, 2) == [Signal(2, WorkerSignal.KILL)]


# -- more and fewer ----------------------------------------------------------------


def test_one_more_worker_is_spawned_into_the_serving_generation(story: Story) -> None:
    story.given_serving()

    assert scaled(story, +1) == [
        Spawn(1, worker=2, slot=1),
        StartTimer(Deadline(TimerKind.WORKER_START, 2), 60.0),
    ]


def test_each_new_worker_gets_a_slot_of_its_own(story: Story) -> None:
    story.given_serving()

    spawned = [a for a in story.when(ScaleRequested(+2)) if isinstance(a, Spawn)]

    assert spawned == [Spawn(1, worker=2, slot=1), Spawn(1, worker=3, slot=2)]


def test_of_too_many_the_one_in_the_highest_slot_leaves_by_its_return_line(story: Story) -> None:
    story.given(Policy(), workers=2)
    story.and_also(Launched(), WorkerReady(1, retires=True), WorkerReady(2, retires=True))

    assert scaled(story, -1) == [Retire(2)]
    assert story.when(WorkerExited(2, "exited with status 0")) == []
    assert story.serving == {1}


def test_a_worker_that_cannot_retire_is_sent_term(story: Story) -> None:
    story.given_serving(workers=2)

    assert scaled(story, -1) == [Signal(2, WorkerSignal.TERM)]


def test_a_retiring_worker_has_the_drain_timeout_and_then_term_and_kill(story: Story) -> None:
    story.given(Policy(drain_timeout_s=9.0), workers=2)
    story.and_also(Launched(), WorkerReady(1), WorkerReady(2, retires=True))

    assert scaled(story, -1) == [
        Retire(2),
        StartTimer(Deadline(TimerKind.WORKER_RETIRE, 2), 9.0),
    ]
    assert story.when_over(TimerKind.WORKER_RETIRE, 2) == [
        Signal(2, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.WORKER_KILL, 2), 5.0),
    ]
    assert story.when_over(TimerKind.WORKER_KILL, 2) == [Signal(2, WorkerSignal.KILL)]
    assert story.when(WorkerExited(2, "killed by SIGKILL")) == []


def test_a_retiring_worker_that_never_became_ready_is_killed_in_the_end(story: Story) -> None:
    story.given_serving().and_also(ScaleRequested(+1))

    assert scaled(story, -1) == [
        CancelTimer(Deadline(TimerKind.WORKER_START, 2)),
        Signal(2, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.WORKER_KILL, 2), 5.0),
    ]
    assert story.when(WorkerReady(2)) == []
    assert story.when_over(TimerKind.WORKER_KILL, 2) == [Signal(2, WorkerSignal.KILL)]


def test_a_worker_whose_ready_was_read_after_it_was_retired_finishes_its_clients(
    story: Story,
) -> None:
    """Such as after a kill of the protector, which had not read it."""
    story.given_serving(Policy(drain_timeout_s=30.0)).and_also(ScaleRequested(+1))
    scaled(story, -1)

    assert story.when(WorkerReady(2, retires=True)) == [
        CancelTimer(Deadline(TimerKind.WORKER_KILL, 2)),
        Retire(2),
        StartTimer(Deadline(TimerKind.WORKER_RETIRE, 2), 30.0),
    ]
    assert story.when_over(TimerKind.WORKER_RETIRE, 2)[0] == Signal(2, WorkerSignal.TERM)
    assert story.when(WorkerReady(2, retires=True)) == [], "said again, it keeps no worker"
    assert story.when_over(TimerKind.WORKER_KILL, 2) == [Signal(2, WorkerSignal.KILL)]


def test_a_stuck_worker_whose_ready_was_read_after_it_was_retired_is_killed(story: Story) -> None:
    story.given_serving().and_also(ScaleRequested(+1), ScaleRequested(-1))
    story.and_also(ReplaceRequested(2, OLD, hung=True))

    assert story.when(WorkerReady(2, retires=True)) == []
    assert story.when_over(TimerKind.WORKER_KILL, 2) == [Signal(2, WorkerSignal.KILL)]


def test_a_stop_takes_no_kill_back(story: Story) -> None:
    story.given_serving().and_also(ScaleRequested(+1), ScaleRequested(-1), StopRequested())

    assert story.when(WorkerReady(2, retires=True)) == []
    assert story.when_over(TimerKind.WORKER_KILL, 2) == [Signal(2, WorkerSignal.KILL)]


def test_to_ask_for_as_many_workers_as_there_are_changes_nothing(story: Story) -> None:
    story.given_serving(workers=300)

    assert story.when(ScaleRequested(to=int("300"))) == []


def test_an_exit_in_a_draining_generation_makes_room_for_a_missing_worker(story: Story) -> None:
    story.given_serving(Policy(surge=2, drain_timeout_s=9.0), workers=3)
    story.and_also(ReloadRequested(), WorkerReady(4), WorkerReady(5))
    story.and_also(WorkerExited(3, "exited with status 0"), WorkerReady(6))
    assert [each.number for each in story.fleet[1].alive] == [1, 2]
    story.and_also(ScaleRequested(to=1))
    assert not [a for a in story.when(ScaleRequested(to=3)) if isinstance(a, Spawn)]

    actions = story.when(WorkerExited(1, "exited with status 0"))

    assert [a.generation for a in actions if isinstance(a, Spawn)] == [2]


def test_a_place_that_waits_for_a_back_off_is_given_up_without_a_word(story: Story) -> None:
    story.given_serving(workers=2)
    story.and_also(*(WorkerExited(number, CRASHED) for number in (2, 3, 4)))

    assert scaled(story, -1) == [CancelTimer(Deadline(TimerKind.WORKER_RESPAWN, 5))]


def test_fewer_workers_keep_the_worker_that_serves_before_one_that_does_not(story: Story) -> None:
    story.given_serving(workers=3)
    story.and_also(*(WorkerExited(number, CRASHED) for number in (1, 4, 5)))
    story.and_also(WorkerExited(2, CRASHED, served_s=60.0))
    slots = {each.slot: each.state for each in story.fleet[1].workers}
    assert slots == {0: State.WAITING, 1: State.STARTING, 2: State.READY}

    assert CancelTimer(Deadline(TimerKind.WORKER_RESPAWN, 6)) in story.when(ScaleRequested(to=2))
    assert Signal(7, WorkerSignal.TERM) in story.when(ScaleRequested(to=1))

    assert [each.number for each in story.fleet[1].staying] == [3]


def test_processes_that_waited_for_a_worker_that_is_not_to_come_finish(story: Story) -> None:
    story.given_serving(Policy(surge=1, drain_timeout_s=9.0), workers=2)
    story.and_also(WorkerExited(2, CRASHED, served_s=60.0, orphans=True))
    assert story.fleet[1].worker(3) == Worker(3, 1, State.STARTING)

    assert Retire(2) in story.when(ScaleRequested(to=1))
    assert Deadline(TimerKind.WORKER_RETIRE, 2) in story.fleet.timers


def test_processes_finish_if_a_rolling_reload_replaces_no_worker_of_their_slot(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker is retired in a turn, and this one exits before its turn."""
    monkeypatch.setattr(workers, "AT_ONCE", 1)
    story.given_serving(Policy(surge=1, drain_timeout_s=9.0), workers=3)
    turn = DeadlinePassed(Deadline(TimerKind.TURN))
    for event in (
        *(ReloadRequested(), WorkerReady(4), turn),
        *(WorkerExited(1, CRASHED, served_s=60.0, orphans=True), turn),
        *(WorkerExited(3, CRASHED, served_s=60.0), ScaleRequested(to=2)),
    ):
        story.when_at_once(event)
    assert story.fleet[1].worker(5) == Worker(5, 0, State.STARTING)

    assert Retire(1) in story.when_at_once(WorkerExited(5, CRASHED))


def test_the_slot_of_a_retiring_worker_is_not_given_away_while_it_lives(story: Story) -> None:
    story.given_serving(workers=2).and_also(ScaleRequested(-1))

    assert scaled(story, +1)[0] == Spawn(1, worker=3, slot=2)


def test_there_is_always_one_worker(story: Story) -> None:
    story.given_serving()

    assert story.when(ScaleRequested(-1)) == [
        Report(ReportKind.REFUSED, reason="cannot go below 1 worker; to end the service use `stop`")
    ]
    assert story.fleet.workers_wanted == 1


def test_scaling_during_a_reload_holds_for_both_generations(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested())

    assert scaled(story, +1) == [
        Spawn(2, worker=3, slot=1),
        StartTimer(Deadline(TimerKind.START, 2), 60.0, extend=True),
        Spawn(1, worker=4, slot=1),
        StartTimer(Deadline(TimerKind.WORKER_START, 4), 60.0),
    ]
    assert story.when(WorkerReady(2)) == []
    assert RouteTo(2) in story.when(WorkerReady(3))


def test_scaling_while_settling_waits_for_its_outcome(story: Story) -> None:
    story.given_serving(Policy(settle_s=5.0)).and_also(ReloadRequested(), WorkerReady(2))

    assert scaled(story, +1) == []
    assert story.when_over(TimerKind.SETTLE, 2)[-2] == Spawn(2, worker=3, slot=1)


def test_scaling_while_no_generation_serves_holds_for_the_next_one(story: Story) -> None:
    story.given_serving(Policy(stop_first=True)).and_also(ReloadRequested())

    assert scaled(story, +1) == []
    assert story.when(WorkerExited(1, "exited with status 0"))[3:5] == [
        Spawn(2, worker=2, slot=0),
        Spawn(2, worker=3, slot=1),
    ]


def test_scaling_while_stopping_is_refused(story: Story) -> None:
    story.given_serving().and_also(StopRequested())

    assert story.when(ScaleRequested(+1)) == [
        Report(ReportKind.REFUSED, reason="cannot scale: a stop is in progress")
    ]


# -- more time ---------------------------------------------------------------------


def test_a_request_for_time_extends_the_start_that_it_is_in(story: Story) -> None:
    story.given(Policy()).and_also(Launched())

    assert story.when(TimeExtended(1, 90.0)) == [
        StartTimer(Deadline(TimerKind.START, 1), 90.0, extend=True)
    ]


def test_a_request_for_time_never_starts_a_timer(story: Story) -> None:
    story.given_serving()

    assert story.when(TimeExtended(1, 90.0)) == []


def test_a_request_for_time_extends_the_stop(story: Story) -> None:
    story.given_serving().and_also(StopRequested())

    assert story.when(TimeExtended(1, 90.0)) == [
        StartTimer(Deadline(TimerKind.STOP), 90.0, extend=True)
    ]


def test_a_request_for_time_does_not_put_off_kill(story: Story) -> None:
    story.given_serving().and_also(StopRequested(quick=True))

    assert story.when(TimeExtended(1, 90.0)) == []


def test_so_many_in_all_may_be_asked_for_too(story: Story) -> None:
    story.given_serving()

    assert [a for a in story.when(ScaleRequested(to=3)) if isinstance(a, Spawn)] == [
        Spawn(1, worker=2, slot=1),
        Spawn(1, worker=3, slot=2),
    ]
    assert story.when(ScaleRequested(to=3)) == []


def test_of_too_many_workers_those_with_the_highest_slots_leave(story: Story) -> None:
    story.given(Policy(), workers=5).and_also(Launched())
    for number in range(1, 6):
        story.and_also(WorkerReady(number, retires=True))

    assert scaled(story, -3) == [Retire(5), Retire(4), Retire(3)]


# -- one that makes room for another ----------------------------------------------


def replaced(story: Story, *, hung: bool = False) -> list[Action]:
    return story.when(ReplaceRequested(1, OLD, hung=hung))


def test_a_worker_is_replaced_before_it_leaves(story: Story) -> None:
    story.given_serving()

    assert replaced(story) == [
        Report(ReportKind.REPLACING, 1, OLD),
        Spawn(1, worker=2, slot=1),
        StartTimer(Deadline(TimerKind.WORKER_START, 2), 60.0),
    ]
    assert story.when(WorkerReady(2, retires=True)) == [
        CancelTimer(Deadline(TimerKind.WORKER_START, 2)),
        Signal(1, WorkerSignal.TERM),
    ]
    assert story.when(WorkerExited(1, "exited with status 0", served_s=60.0)) == []


def test_a_replacement_that_was_late_and_leaves_replaces_none(story: Story) -> None:
    """It answers TERM only when its start is over, and says so."""
    story.given_serving()
    replaced(story)
    assert Signal(2, WorkerSignal.TERM) in story.when_over(TimerKind.WORKER_START, 2)

    assert story.when(WorkerReady(2, retires=True)) == []

    assert Spawn(1, worker=3, slot=1) in story.when(WorkerExited(2, "exited with status 0"))
    assert Signal(1, WorkerSignal.TERM) in story.when(WorkerReady(3))


def test_one_that_hangs_is_replaced_before_it_is_aborted_and_killed(story: Story) -> None:
    story.given_serving()
    assert Spawn(1, worker=2, slot=1) in replaced(story, hung=True)

    assert story.when(WorkerReady(2)) == [
        CancelTimer(Deadline(TimerKind.WORKER_START, 2)),
        Signal(1, WorkerSignal.ABRT),
        StartTimer(Deadline(TimerKind.WORKER_KILL, 1), 5.0),
    ]
    assert story.when_over(TimerKind.WORKER_KILL, 1) == [Signal(1, WorkerSignal.KILL)]


def test_to_ask_again_starts_no_second_replacement(story: Story) -> None:
    story.given_serving()
    replaced(story)

    assert replaced(story) == []


def test_a_worker_with_a_high_number_gets_one_replacement(story: Story) -> None:
    """The number of each request is read from another message."""
    story.given(Policy())
    story.fleet = replace(story.fleet, next_worker=1000)
    story.and_also(Launched(), WorkerReady(1000))
    first, second = (ReplaceRequested(int(text), OLD) for text in ("1000", "1000"))
    assert Spawn(1, worker=1001, slot=1) in story.when(first)

    assert story.when(second) == []


def test_one_that_dies_before_its_replacement_is_ready_has_it_already(story: Story) -> None:
    story.given_serving()
    replaced(story)

    assert story.when(WorkerExited(1, CRASHED, served_s=60.0)) == [
        Report(ReportKind.EXITED, 1, CRASHED)
    ]
    assert story.when(WorkerReady(2)) == [CancelTimer(Deadline(TimerKind.WORKER_START, 2))]


def test_a_worker_that_dies_leaves_the_replacement_of_another_as_it_is(story: Story) -> None:
    story.given_serving(workers=2)
    story.and_also(ReplaceRequested(2, OLD), ReplaceRequested(1, OLD))

    story.and_also(WorkerExited(1, CRASHED, served_s=60.0))

    assert Signal(2, WorkerSignal.TERM) in story.when(WorkerReady(3))


def test_a_replacement_that_dies_is_tried_again_while_the_old_one_serves(story: Story) -> None:
    story.given_serving()
    replaced(story)

    assert Spawn(1, worker=3, slot=1) in story.when(WorkerExited(2, CRASHED))
    assert Signal(1, WorkerSignal.TERM) in story.when(WorkerReady(3))


def test_to_scale_down_takes_the_replacement_along(story: Story) -> None:
    story.given_serving(workers=2)
    story.and_also(ReplaceRequested(2, OLD))

    assert scaled(story, -1) == [
        Signal(2, WorkerSignal.TERM),
        CancelTimer(Deadline(TimerKind.WORKER_START, 3)),
        Signal(3, WorkerSignal.TERM),
        StartTimer(Deadline(TimerKind.WORKER_KILL, 3), 5.0),
    ]


def test_one_that_hangs_while_it_drains_is_ended_at_once(story: Story) -> None:
    story.given_serving()
    story.and_also(ReloadRequested(), WorkerReady(2))

    assert replaced(story, hung=True) == [
        Report(ReportKind.REPLACING, 1, OLD),
        Signal(1, WorkerSignal.ABRT),
        StartTimer(Deadline(TimerKind.WORKER_KILL, 1), 5.0),
    ]


def test_one_that_hangs_while_it_retires_is_ended_at_once(story: Story) -> None:
    story.given_serving(workers=2)
    story.and_also(ScaleRequested(-1))

    assert story.when(ReplaceRequested(2, OLD, hung=True)) == [
        Signal(2, WorkerSignal.ABRT),
        StartTimer(Deadline(TimerKind.WORKER_KILL, 2), 5.0),
    ]


@pytest.mark.parametrize(
    "before", [[ReloadRequested(), WorkerReady(2)], []], ids=["draining", "retiring"]
)
def test_one_that_hangs_is_killed_no_later_if_it_is_late_again(
    story: Story, before: list[Event]
) -> None:
    """It survives ABRT, and still sends WATCHDOG=1 now and then."""
    story.given_serving().and_also(*before)
    replaced(story, hung=True)
    story.and_also(WorkerReady(2))
    kill = Deadline(TimerKind.WORKER_KILL, 1)
    assert kill in story.fleet.timers

    assert replaced(story, hung=True) == []
    assert story.when(DeadlinePassed(kill)) == [Signal(1, WorkerSignal.KILL)]


def test_one_that_hangs_does_not_outlive_a_replacement_that_comes_to_nothing(story: Story) -> None:
    """The generation drains meanwhile, so no other worker is started."""
    story.given_serving()
    replaced(story, hung=True)
    story.and_also(ReloadRequested())
    assert Signal(1, WorkerSignal.ABRT) not in story.when(WorkerReady(3))

    assert Signal(1, WorkerSignal.ABRT) in story.when(WorkerExited(2, "exited with status 0"))


def test_one_on_its_way_in_or_out_is_not_replaced(story: Story) -> None:
    story.given_serving(workers=2)
    story.and_also(ScaleRequested(-1))
    assert story.when(ReplaceRequested(2, OLD)) == []

    story.and_also(ScaleRequested(+1))
    assert story.when(ReplaceRequested(3, OLD)) == []
    assert story.when(ReplaceRequested(77, OLD)) == []


def test_what_drains_already_needs_no_replacement_and_is_not_reported_each_second(
    story: Story,
) -> None:
    story.given_serving().and_also(ReloadRequested(), WorkerReady(2))
    assert story.draining == {1}

    assert story.when(ReplaceRequested(1, OLD)) == []


def test_the_exit_of_a_worker_that_has_not_been_started_is_nothing(story: Story) -> None:
    story.given_serving().and_also(*(WorkerExited(number, CRASHED) for number in (1, 2, 3)))
    assert not story.fleet[1].alive

    assert story.when(WorkerExited(4, CRASHED)) == []


# -- processes that a worker has left behind -----------------------------------------


def signals(actions: list[Action]) -> list[Signal]:
    return [each for each in actions if isinstance(each, Signal)]


def test_the_end_of_what_a_worker_left_is_no_exit_of_a_worker(story: Story) -> None:
    story.given_serving()
    story.and_also(WorkerExited(1, CRASHED, served_s=60.0, orphans=True), WorkerReady(2))

    assert story.when(WorkerExited(1, "gone")) == []


def test_what_a_worker_left_amid_a_quick_stop_gets_term_too(story: Story) -> None:
    story.given_serving().and_also(StopRequested(quick=True))

    actions = story.when(WorkerExited(1, CRASHED, orphans=True))

    assert actions == [Signal(1, WorkerSignal.TERM)]


def test_what_a_worker_left_that_never_became_ready_is_ended(story: Story) -> None:
    story.given_serving().and_also(WorkerExited(1, CRASHED, served_s=60.0))

    actions = story.when(WorkerExited(2, CRASHED, orphans=True))

    assert signals(actions) == [Signal(2, WorkerSignal.TERM)]
    assert StartTimer(Deadline(TimerKind.WORKER_KILL, 2), 5.0) in actions


def test_a_worker_that_a_kill_of_the_protector_lost_serves_until_its_generation_drains(
    story: Story,
) -> None:
    """It may serve clients, and its socket gets more: many servers reset some at a signal."""
    story.given_serving(Policy(drain_timeout_s=60.0)).and_also(
        WorkerExited(1, CRASHED, served_s=60.0)
    )

    actions = story.when(WorkerExited(2, CRASHED, orphans=True, lost=True))

    assert (signals(actions), Retire(2) in actions) == ([], False)
    assert 2 in [each.number for each in story.fleet[1].alive]


def test_a_lost_worker_of_a_draining_generation_has_the_drain_timeout(story: Story) -> None:
    story.given_serving(Policy(drain_timeout_s=60.0), workers=2)
    story.and_also(ReloadRequested(), WorkerReady(3), WorkerReady(4))

    actions = story.when(WorkerExited(2, CRASHED, orphans=True, lost=True))

    assert Retire(2) in actions
    assert StartTimer(Deadline(TimerKind.WORKER_RETIRE, 2), 60.0) in actions


def test_a_lost_worker_keeps_its_slot_in_which_it_still_counts(story: Story) -> None:
    story.given_serving(workers=2)

    assert Spawn(1, worker=3, slot=2) in story.when(lost(1))
    story.and_also(WorkerReady(3), WorkerExited(1, "orphans gone"))
    assert Spawn(1, worker=4, slot=0) in story.when(lost(3))


def test_no_worker_gets_the_slot_of_a_lost_worker_that_still_runs(story: Story) -> None:
    story.given_serving(workers=2).and_also(lost(1))

    assert Spawn(1, worker=4, slot=3) in scaled(story, +1)


def test_orphans_do_not_wait_for_a_worker_in_another_slot(story: Story) -> None:
    """No worker follows in the slot of a retired worker."""
    story.given_serving(Policy(surge=1, drain_timeout_s=9.0), workers=3)
    story.and_also(ScaleRequested(-1), WorkerExited(1, CRASHED, served_s=60.0))
    assert [each.slot for each in story.fleet[1].workers if each.state is State.STARTING] == [0]

    assert Retire(3) in story.when(WorkerExited(3, CRASHED, served_s=60.0, orphans=True))


@pytest.mark.parametrize(("left", "other"), [(1, 2), (2, 1)])
def test_orphans_serve_on_when_a_worker_of_another_slot_is_ready(
    story: Story, left: int, other: int
) -> None:
    story.given_serving(Policy(surge=2, drain_timeout_s=9.0), workers=2)
    story.and_also(WorkerExited(left, CRASHED, served_s=60.0, orphans=True))
    story.and_also(WorkerExited(other, CRASHED, served_s=60.0))

    assert Retire(left) not in story.when(WorkerReady(4, retires=True))
    assert Retire(left) in story.when(WorkerReady(3, retires=True))


def test_orphans_wait_for_the_successor_of_a_lost_worker_in_their_slot(story: Story) -> None:
    """They serve until it is ready."""
    story.given_serving(Policy(surge=1, drain_timeout_s=9.0), workers=2)
    story.and_also(WorkerExited(1, CRASHED, served_s=60.0, orphans=True))

    assert Retire(1) not in story.when(lost(3))
    story.and_also(WorkerExited(3, "orphans gone"))
    assert Retire(1) in story.when(WorkerReady(4))


@pytest.fixture
def resumed(story: Story) -> Story:
    """Worker 300 has left processes in slot 299; the next program has read the state."""
    story.given_serving(Policy(surge=1, drain_timeout_s=9.0), workers=300)
    story.and_also(WorkerExited(300, CRASHED, served_s=60.0, orphans=True))
    fleet = CODEC.decode(CODEC.encode(story.fleet))
    assert isinstance(fleet, Fleet)
    story.fleet = fleet
    return story


def test_the_next_program_knows_whose_successor_is_ready(resumed: Story) -> None:
    assert Retire(300) in resumed.when(WorkerReady(301, retires=True))


def test_the_next_program_knows_which_orphans_move_with_the_slot_of_a_lost_worker(
    resumed: Story,
) -> None:
    resumed.and_also(lost(301), WorkerExited(301, "orphans gone"))

    assert Retire(300) in resumed.when(WorkerReady(302, retires=True))


def test_what_a_worker_left_that_was_signalled_is_ended(story: Story) -> None:
    story.given_serving(workers=2).and_also(ScaleRequested(-1))
    story.and_also(ReplaceRequested(2, OLD, hung=True))

    actions = story.when(WorkerExited(2, CRASHED, orphans=True))

    assert signals(actions) == [Signal(2, WorkerSignal.TERM)]
    assert StartTimer(Deadline(TimerKind.WORKER_KILL, 2), 5.0) in actions


def test_what_a_failed_generation_left_gets_the_signals_of_the_generation(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested())

    actions = story.when(WorkerExited(2, CRASHED, orphans=True))

    assert signals(actions) == [Signal(2, WorkerSignal.TERM)]
    assert Deadline(TimerKind.WORKER_KILL, 2) not in story.fleet.timers


def test_living_workers_are_no_groups_of_dead_ones(story: Story) -> None:
    story.given_serving(workers=2)
    for number in range(2, 2 + MOST_ORPHANS):
        done = story.when(WorkerExited(number, CRASHED, served_s=60.0, orphans=True))
        assert Retire(number) in done
        assert not signals(done)
        story.when(WorkerReady(number + 1))


# -- limits ---------------------------------------------------------------------------


def test_a_limit_of_one_second_is_a_limit(story: Story) -> None:
    policy = Policy(drain_timeout_s=1.0, lame_duck_s=1.0, lame_duck_idle_s=1.0)
    story.given_serving(policy, workers=2)
    assert StartTimer(Deadline(TimerKind.WORKER_RETIRE, 2), 1.0) in scaled(story, -1)

    story.and_also(ReloadRequested())
    assert StartTimer(Deadline(TimerKind.DRAIN, 1), 1.0) in story.when(WorkerReady(3))

    actions = story.when(StopRequested())
    assert StartTimer(Deadline(TimerKind.LAME_DUCK), 1.0) in actions
    assert StartTimer(Deadline(TimerKind.LAME_DUCK_IDLE), 1.0) in actions


def test_a_request_for_time_extends_the_limits_of_its_generation(story: Story) -> None:
    story.given_serving(Policy(drain_timeout_s=9.0), workers=2).and_also(ReloadRequested())
    start = Deadline(TimerKind.START, 2)
    assert story.when(TimeExtended(3, 30.0)) == [StartTimer(start, 30.0, extend=True)]

    story.and_also(WorkerReady(3), WorkerReady(4))
    drain = Deadline(TimerKind.DRAIN, 1)
    assert story.when(TimeExtended(2, 30.0)) == [StartTimer(drain, 30.0, extend=True)]


def test_a_worker_that_has_term_gets_no_second_one_when_it_is_too_slow(story: Story) -> None:
    story.given_serving().and_also(WorkerExited(1, CRASHED, served_s=60.0))
    story.and_also(StopRequested(quick=True))

    assert story.when_over(TimerKind.WORKER_START, 2) == []


# -- ended by an operator -------------------------------------------------------------


def test_an_operator_may_kill_only_what_is_leaving(story: Story) -> None:
    story.given_serving(workers=2)
    reason = "kill takes only draining or abandoned generations, not {}; see `status`"
    for number in (1, 77):
        refused = Report(ReportKind.REFUSED, number, reason.format(number))
        assert story.when(KillRequested(number)) == [refused]

    story.and_also(ReloadRequested(), WorkerExited(3, CRASHED))
    assert story.when(KillRequested(2)) == [Signal(4, WorkerSignal.KILL)]

    story.and_also(ReloadRequested(), WorkerReady(5), WorkerReady(6))
    assert story.draining == {1}
    killed = [Signal(1, WorkerSignal.KILL), Signal(2, WorkerSignal.KILL)]
    assert story.when(KillRequested(1)) == killed


# -- stuck ----------------------------------------------------------------------------


def test_one_that_starts_cannot_be_stuck_yet(story: Story) -> None:
    story.given_serving().and_also(WorkerExited(1, CRASHED, served_s=60.0))
    before = story.fleet

    assert story.when(ReplaceRequested(2, OLD, hung=True)) == []
    assert story.fleet == before


def test_in_a_stop_only_one_that_hangs_is_ended(story: Story) -> None:
    story.given_serving().and_also(StopRequested())

    assert story.when(ReplaceRequested(1, OLD)) == []
    assert Signal(1, WorkerSignal.ABRT) in story.when(ReplaceRequested(1, OLD, hung=True))


def test_a_replacement_that_is_ready_in_a_draining_generation_ends_none(story: Story) -> None:
    """The older worker finishes its connections, as all of its generation do."""
    story.given_serving()
    story.and_also(ReplaceRequested(1, OLD), ReloadRequested(), WorkerReady(3))
    assert story.draining == {1}

    assert story.when(WorkerReady(2)) == [CancelTimer(Deadline(TimerKind.WORKER_START, 2))]


@pytest.mark.parametrize("hung", [False, True])
def test_one_whose_replacement_is_never_started_is_ended_only_if_it_hangs(
    story: Story, hung: bool
) -> None:
    story.given_serving()
    replaced(story, hung=hung)
    for number in (2, 3, 4):
        story.and_also(WorkerExited(number, CRASHED))
    assert Deadline(TimerKind.WORKER_RESPAWN, 5) in story.fleet.timers
    story.and_also(ReloadRequested())

    assert (Signal(1, WorkerSignal.ABRT) in story.when(WorkerReady(6))) == hung
