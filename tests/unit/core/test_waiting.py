"""What is waited for, and why: each wait has a reason, and without one there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from socketprotector.core.events import (
    Answered,
    BacklogEmptied,
    ChannelBroken,
    Deadline,
    DeadlinePassed,
    DryRunRequested,
    HoldRequested,
    Launched,
    ReloadRequested,
    ReplaceRequested,
    ScaleRequested,
    SettingsRead,
    StopRequested,
    TimerKind,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import Policy, State
from socketprotector.core.rollout import room
from socketprotector.core.waiting import Facts, Wait, waits
from socketprotector.model.share import Canary
from tests.unit.conftest import TURN, Story

ANSWER = 'GET /healthz: 500, "database gone"'
DIED = "exited with status 1"


def reasons(story: Story, **facts: object) -> list[str]:
    left_s = dict.fromkeys(story.fleet.timers, 4.0)
    return [each.reason for each in waits(story.fleet, Facts(left_s, **facts))]  # type: ignore[arg-type]


def test_where_all_is_done_nothing_is_waited_for(story: Story) -> None:
    story.given_serving(workers=2)
    assert waits(story.fleet, Facts()) == ()


def test_a_start_tells_how_many_workers_are_ready_and_what_the_last_answer_was(
    story: Story,
) -> None:
    story.given_serving(workers=2).and_also(ReloadRequested(), WorkerReady(3))
    [wait] = waits(story.fleet, Facts(dict.fromkeys(story.fleet.timers, 4.0)))
    assert wait == Wait("start", "generation 2 starts: 1 of 2 workers ready", 2, 4.0)
    assert reasons(story, answer=ANSWER) == [
        f"generation 2 starts: 1 of 2 workers ready; last answer to {ANSWER}"
    ]


def test_a_start_with_room_for_its_next_worker_waits_for_no_other(story: Story) -> None:
    """The next worker starts when the loop turns."""
    story.given(Policy(), workers=9)
    for event in (Launched(), *map(WorkerReady, range(1, 9))):
        story.when_at_once(event)

    assert reasons(story) == ["generation 1 starts: 8 of 9 workers ready"]


@pytest.mark.parametrize(
    "answer",
    [
        "GET /healthz: refused",
        "no worker accepted the probe at 127.0.0.1 port 80",
        "the check exited with status 1: 40 % of all requests fail",
    ],
)
def test_what_is_no_answer_is_not_called_one(story: Story, answer: str) -> None:
    story.given(Policy(ready="http")).and_also(Launched())
    [reason] = reasons(story, answer=answer)
    assert reason == f"generation 1 starts: last probe: {answer}"


def test_a_generation_settles_until_the_time_is_over_and_the_next_answer_good(
    story: Story,
) -> None:
    story.given_serving(Policy(settle_s=5.0, settle_check="http:/healthz"))
    story.and_also(ReloadRequested(), WorkerReady(2))
    assert reasons(story, settle_check="http:/healthz") == ["settling, checked by http:/healthz"]
    assert reasons(story, settle_check="http:/healthz", settle_check_due=True) == [
        "settling: --settle is over; --settle-check http:/healthz must pass after it"
    ]


def test_stop_first_waits_for_the_connections_of_the_one_before(story: Story) -> None:
    story.given_serving(Policy(stop_first=True)).and_also(ReloadRequested())
    left_s = dict.fromkeys(story.fleet.timers, 4.0)
    assert waits(story.fleet, Facts(left_s, {1: 1})) == (
        Wait("room", "generation 1 still has 1 connection", 1, 4.0),
    )
    assert reasons(story, active={1: 0}) == [
        "generation 1 has no connection; 1 worker has not exited"
    ]
    assert reasons(story, active={1: None}) == ["generation 1 is draining; 1 worker has not exited"]
    story.when_over(TimerKind.DRAIN, 1)
    assert reasons(story, active={1: 1}) == ["generation 1 was sent TERM; 1 worker has not exited"]


def test_where_workers_accept_the_clients_that_came_are_served_first(story: Story) -> None:
    story.given_serving(Policy(workers_accept=True)).and_also(ReloadRequested(), WorkerReady(2))
    story.when(ReloadRequested())
    assert reasons(story) == [
        "generation 1 is accepting the clients that connected before the switch"
    ]
    [wait] = waits(story.fleet, Facts())
    assert wait.kind == "room", "the next generation has no socket before that"


def test_an_older_generation_that_drains_is_a_wait_of_its_own(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested(), WorkerReady(2))
    assert waits(story.fleet, Facts(active={1: 7})) == (
        Wait("drain", "generation 1 still has 7 connections", 1),
    )


def test_a_draining_generation_says_how_many_workers_have_not_exited(story: Story) -> None:
    story.given_serving(workers=2).and_also(ReloadRequested(), WorkerReady(3), WorkerReady(4))
    assert reasons(story) == ["generation 1 is draining; 2 workers have not exited"]
    story.when(WorkerExited(1, DIED))
    assert reasons(story) == ["generation 1 is draining; 1 worker has not exited"]


def test_a_reload_that_is_remembered_waits_for_the_one_under_way(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested(), ReloadRequested())
    assert reasons(story)[-1] == "a reload begins after the current start, reload or dry run"


def test_the_configuration_is_read_first(story: Story) -> None:
    story.given_serving()
    story.fleet = replace(story.fleet, configured=True)
    story.when(ReloadRequested())
    assert reasons(story) == ["the configuration is being read"]


def test_a_reload_whose_configuration_was_read_waits_for_no_other(story: Story) -> None:
    story.given_serving()
    story.fleet = replace(story.fleet, configured=True)
    story.and_also(ReloadRequested(), SettingsRead(Policy()))
    assert reasons(story) == ["generation 2 starts: 0 of 1 worker ready"]


def test_a_reload_whose_configuration_was_read_waits_for_the_last_good_command(
    story: Story,
) -> None:
    story.given_serving()
    story.fleet = replace(story.fleet, configured=True)
    story.and_also(ReloadRequested(), ChannelBroken(1, served_s=20.0), SettingsRead(Policy()))
    assert reasons(story)[:2] == [
        "generation 2 starts: 0 of 1 worker ready",
        "a reload begins after the current start, reload or dry run",
    ]


def test_back_offs_say_after_what(story: Story) -> None:
    story.given_serving().and_also(WorkerExited(1, DIED))
    while not any(each.wait is TimerKind.WORKER_RESPAWN for each in story.fleet.timers):
        [worker] = story.fleet.generations[0].workers
        story.and_also(WorkerReady(worker.number), WorkerExited(worker.number, DIED))
    delayed = "1 worker of generation 1: restart delayed after a quick death"
    assert reasons(story) == reasons(story, last_exit=(2, "why")) == [delayed]
    assert reasons(story, last_exit=(1, "cannot start: why")) == [f"{delayed}: cannot start: why"]


def test_a_dry_run_is_watched_before_its_verdict(story: Story) -> None:
    story.given_serving(Policy(workers_accept=True, ready="any")).and_also(DryRunRequested())
    assert reasons(story) == ["generation 2 starts: 0 of 1 worker ready"]
    story.when(Answered(2))
    assert reasons(story) == ["generation 2 is watched before the verdict"]


def test_what_an_operator_has_requested_is_a_wait_too(story: Story) -> None:
    story.given_serving(Policy(lame_duck_s=9.0)).and_also(HoldRequested(3.0))
    assert reasons(story) == ["held: no client is accepted"]
    story.when(StopRequested())
    assert reasons(story) == ["lame duck: the stop begins later"]
    story.when(DeadlinePassed(next(iter(story.fleet.timers))))


def test_the_waits_of_the_whole_fleet_have_their_limits(story: Story) -> None:
    story.given_serving(Policy(lame_duck_s=9.0)).and_also(HoldRequested(3.0))
    limits = {Deadline(TimerKind.HOLD): 3.0, Deadline(TimerKind.LAME_DUCK): 9.0}
    limits[Deadline(TimerKind.STOP)] = 30.0
    found = [waits(story.fleet, Facts(limits))]
    for _ in range(2):
        story.when(StopRequested())
        found.append(waits(story.fleet, Facts(limits)))
    assert [(each.kind, each.left_s) for [each] in found] == [
        ("hold", 3.0),
        ("lame-duck", 9.0),
        ("stop", 30.0),
    ]


def test_a_stop_says_which_generation_keeps_it(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested(), WorkerReady(2), StopRequested())
    assert reasons(story, active={1: 2}) == [
        "stopping: accepting clients that have already connected",
        "generation 1 still has 2 connections",
    ]
    assert reasons(story, late_clients_s=1.0)[0] == (
        "stopping: accepting clients that waited during the hold"
    )


def test_a_stop_looks_for_what_workers_left_and_says_what_it_found(story: Story) -> None:
    story.given_serving().and_also(StopRequested(), BacklogEmptied(), WorkerExited(1, DIED))
    assert story.fleet.exiting
    assert reasons(story) == [
        "all workers have stopped; checking whether they left processes behind"
    ]
    assert reasons(story, leftovers_end=True) == [
        "all workers have stopped; ending processes that failed workers left behind"
    ]


def test_a_worker_that_is_replaced_is_waited_for(story: Story) -> None:
    story.given_serving().and_also(ReplaceRequested(1, "too old"))
    assert reasons(story) == ["1 worker of generation 1: not ready yet"]
    story.when(WorkerReady(2))
    assert reasons(story) == ["1 worker of generation 1: finishing, not exited yet"]


def test_an_upgrade_says_what_it_waits_for(story: Story) -> None:
    story.given_serving()
    assert reasons(story, upgrade="probing the new program") == ["upgrade: probing the new program"]


# -- rollouts ----------------------------------------------------------------------


def with_canary(story: Story, canary: Canary) -> Story:
    story.given_serving(Policy(settle_s=5.0)).and_also(ReloadRequested(canary), WorkerReady(2))
    return story


def test_a_canary_says_its_share_its_time_and_how_many_it_has_met(story: Story) -> None:
    with_canary(story, Canary(500, 60.0))
    [wait] = waits(story.fleet, Facts(dict.fromkeys(story.fleet.timers, 4.0), met=7))
    assert wait == Wait("canary", "5% of new connections for 1m: 7 so far", 2, 4.0)
    assert reasons(story, met=None) == ["5% of new connections for 1m"]


def test_a_canary_that_has_met_too_few_says_so_and_has_its_time_again(story: Story) -> None:
    with_canary(story, Canary(500, 60.0, at_least=3))
    assert reasons(story, met=2) == [
        "5% of new connections for 1m: 2 so far, at least 3 wanted",
    ]
    assert reasons(story, met=3) == ["5% of new connections for 1m: 3 so far"]
    story.when(DeadlinePassed(Deadline(TimerKind.SETTLE, 2), met=2))
    assert reasons(story, met=3) == ["5% of new connections for 2m: 3 so far"]


def test_a_canary_that_wants_a_single_connection_says_so_until_it_has_met_it(
    story: Story,
) -> None:
    with_canary(story, Canary(500, 60.0, at_least=1))

    assert reasons(story, met=0) == ["5% of new connections for 1m: 0 so far, at least 1 wanted"]
    assert reasons(story, met=None) == ["5% of new connections for 1m, at least 1 wanted"]
    assert reasons(story, met=1) == ["5% of new connections for 1m: 1 so far"]


def test_a_canary_that_is_checked_says_by_what(story: Story) -> None:
    story.given_serving(Policy(settle_s=5.0, settle_check="check:./good"))
    story.and_also(ReloadRequested(Canary(500, 60.0)), WorkerReady(2))
    assert reasons(story, settle_check="check:./good") == [
        "5% of new connections for 1m: 0 so far, checked by check:./good"
    ]


def rolling(story: Story, workers: int = 3, settle_s: float = 0.0) -> Story:
    policy = Policy(surge=1, drain_timeout_s=9.0, settle_s=settle_s)
    story.given_serving(policy, workers=workers).and_also(ReloadRequested())
    return story


def test_the_first_workers_of_a_rolling_reload_settle(story: Story) -> None:
    rolling(story, settle_s=5.0).when(WorkerReady(4))
    [wait] = waits(story.fleet, Facts(dict.fromkeys(story.fleet.timers, 4.0)))
    assert wait == Wait("rolling", "1 of 3 workers replaced, settling", 2, 4.0)


def test_a_rolling_reload_says_which_worker_makes_room(story: Story) -> None:
    rolling(story).when(WorkerReady(4, retires=True))
    [leaving] = [each.number for each in story.fleet[1].workers if each.state is State.RETIRING]
    start = "1 of 3 workers replaced, waiting for worker"
    rolling_reasons = [
        reasons(story, held={leaving: held})[0] for held in ((2, 240.7), (1, None), (0, None))
    ]
    assert rolling_reasons == [
        f"{start} {leaving} (2 connections, longest 4m)",
        f"{start} {leaving} (1 connection)",
        f"{start} {leaving}",
    ]
    assert reasons(story)[0] == f"{start} {leaving}"

    story.when(WorkerExited(leaving, DIED, served_s=20.0, orphans=True))
    assert reasons(story)[0] == (
        f"1 of 3 workers replaced, waiting for processes of worker {leaving}"
    )
    story.when(WorkerExited(leaving, "orphans gone"))
    assert reasons(story)[0] == "1 of 3 workers replaced, 1 starting"


def test_a_rolling_reload_without_room_says_which_workers_leave(story: Story) -> None:
    story.given_serving(Policy(surge=1, drain_timeout_s=9.0), workers=2)
    for number in (1, 2):
        story.when(WorkerExited(number, DIED, served_s=20.0, orphans=True))
    story.when(ReloadRequested())
    found = [each for each in reasons(story) if each.startswith("generation 2 starts")]
    assert found == [
        "generation 2 starts: 0 of 1 worker ready; waiting for processes of worker 1 and 1 more"
    ]


def test_a_rolling_reload_without_room_names_the_generation_that_drains(story: Story) -> None:
    story.given_serving(Policy(surge=1, drain_timeout_s=9.0), workers=2)
    story.and_also(ReloadRequested(), WorkerReady(3), WorkerExited(2, DIED), WorkerReady(4))
    assert (story.serving, story.draining) == ({2}, {1})
    story.when(ReloadRequested())

    assert reasons(story, active={1: 7})[0] == (
        "generation 3 starts: 0 of 1 worker ready; waiting for room: "
        "generation 1 still has 7 connections"
    )


def test_a_rolling_reload_without_room_may_wait_for_single_replacements(story: Story) -> None:
    """They began before the configuration limited the processes."""
    story.given_serving(workers=2)
    story.fleet = replace(story.fleet, configured=True)
    story.and_also(ReplaceRequested(1, "too old"), ReplaceRequested(2, "too old"))
    story.and_also(ReloadRequested(), SettingsRead(Policy(surge=1, drain_timeout_s=9.0)))

    assert reasons(story)[0] == (
        "generation 2 starts: 0 of 1 worker ready; "
        "waiting for room: more workers are running than wanted"
    )


def test_a_start_that_has_all_its_workers_does_not_wait_for_room(story: Story) -> None:
    rolling(story)
    assert room(story.fleet, 1, story.fleet[2]) == 0

    assert reasons(story)[0] == "generation 2 starts: 0 of 1 worker ready"


def test_a_rolling_reload_with_room_does_not_wait_for_it_until_the_loop_turns(
    story: Story,
) -> None:
    rolling(story).when_at_once(WorkerReady(4, retires=True))
    story.when_at_once(WorkerExited(3, DIED, served_s=20.0))
    assert TURN in story.fleet.timers

    assert reasons(story)[0] == "1 of 3 workers replaced"


def test_workers_that_cannot_start_for_lack_of_room_are_a_wait(story: Story) -> None:
    story.given_serving(Policy(surge=1, drain_timeout_s=9.0), workers=3)
    for number in (1, 2, 3):
        story.when(WorkerExited(number, DIED, served_s=20.0, orphans=True))

    assert reasons(story)[-1] == (
        "2 workers of generation 1: waiting for processes of worker 1 and 2 more"
    )


def test_a_replacement_says_that_it_waits_for_the_end_of_a_rolling_reload(story: Story) -> None:
    story.given_serving(Policy(surge=2, drain_timeout_s=9.0))
    story.and_also(ReloadRequested(), ReplaceRequested(1, "too old"))
    assert room(story.fleet, 1, story.fleet[1]) == 1

    assert reasons(story)[-1] == ("1 worker of generation 1: waiting for the end of the reload")


def test_a_rolling_reload_says_how_many_workers_start(story: Story) -> None:
    story.given_serving(Policy(surge=2, drain_timeout_s=9.0), workers=5)
    story.and_also(ReloadRequested(), WorkerReady(6), WorkerReady(7))
    leaving = [each.number for each in story.fleet[1].workers if each.state is State.RETIRING]
    story.and_also(*(WorkerExited(number, DIED) for number in leaving))

    assert reasons(story)[0] == "2 of 5 workers replaced, 2 starting"


def test_a_worker_that_leaves_during_a_rolling_reload_does_not_count_as_starting(
    story: Story,
) -> None:
    story.given_serving(Policy(surge=2, drain_timeout_s=9.0), workers=4)
    story.and_also(ReloadRequested(), WorkerReady(5), WorkerReady(6))
    leaving = next(each for each in story.fleet[1].workers if each.state is State.RETIRING)
    story.and_also(WorkerExited(leaving.number, DIED), ScaleRequested(to=2))
    assert [each.state for each in story.fleet[2].workers][2:] == [State.RETIRING]

    assert reasons(story)[0] == "2 of 2 workers replaced, 1 finishing"


def test_a_worker_that_starts_when_the_loop_turns_does_not_wait_for_room(story: Story) -> None:
    story.given_serving(workers=2)
    for number in (1, 2):
        story.when_at_once(WorkerExited(number, DIED, served_s=20.0))
    assert [each.state for each in story.fleet[1].workers] == [State.STARTING, State.WAITING]

    assert reasons(story) == ["1 worker of generation 1: not ready yet"]


def test_an_old_worker_that_died_in_a_rolling_reload_waits_for_room(story: Story) -> None:
    """Only replacements wait for the end of the reload."""
    rolling(story)
    story.when(WorkerExited(3, DIED, served_s=20.0, orphans=True))

    assert reasons(story)[-1] == "1 worker of generation 1: waiting for processes of worker 3"
