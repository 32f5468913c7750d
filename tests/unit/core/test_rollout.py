"""Rollouts: a share of the clients first, and workers that are replaced a few at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from socketprotector.core.actions import (
    Action,
    CancelTimer,
    Drain,
    Open,
    Probe,
    Report,
    ReportKind,
    Retire,
    RouteTo,
    Signal,
    Spawn,
    StartTimer,
    WorkerSignal,
)
from socketprotector.core.decide import resume, route_of
from socketprotector.core.events import (
    Answered,
    BacklogEmptied,
    ChannelBroken,
    Deadline,
    DeadlinePassed,
    DryRunRequested,
    Event,
    HoldReleased,
    HoldRequested,
    Launched,
    OpenFailed,
    PromoteRequested,
    Quiesced,
    ReloadRequested,
    RenewRequested,
    ReplaceRequested,
    RollbackRequested,
    ScaleRequested,
    SettingsRead,
    SettleFailed,
    SocketLost,
    StopRequested,
    Stranded,
    TimerKind,
    Untaken,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import Next, Phase, Policy, Rollout, State, Worker
from socketprotector.core.reload import ROLLED_BACK
from socketprotector.core.rollout import FULL, NO_COUNTS, NO_LIBRARY, no_canary_under
from socketprotector.core.stop import CALLED_OFF
from socketprotector.model.policy import STANDBY_S
from socketprotector.model.share import WHOLE, Canary
from tests.unit.conftest import Story

DIED = "./daemon exited with status 1"
FIVE = Canary(500, 60.0)
SETTLE_2 = Deadline(TimerKind.SETTLE, 2)


def passed(met: int = 0) -> DeadlinePassed:
    return DeadlinePassed(SETTLE_2, met=met)


def news(actions: list[Action]) -> list[tuple[ReportKind, str]]:
    return [(each.news, each.reason) for each in actions if isinstance(each, Report)]


def with_canary(story: Story, policy: Policy | None = None, canary: Canary = FIVE) -> Story:
    """Generation 2 has a share, generation 1 the rest."""
    story.given_serving(policy or Policy(settle_s=5.0))
    story.and_also(ReloadRequested(canary), WorkerReady(2))
    assert (story.settling, story.serving) == ({2}, {1})
    return story


# -- a share first --------------------------------------------------------------


def test_a_canary_that_breaks_its_socket_fails(story: Story) -> None:
    """The old generation keeps its own socket.  With all clients, a rescue follows instead."""
    with_canary(story)
    actions = story.when(SocketLost(2))
    assert actions[0] == CancelTimer(SETTLE_2)
    assert RouteTo(1) in actions
    assert story.draining == {2}
    assert story.serving == {1}

    other = with_canary(Story())
    other.and_also(PromoteRequested())
    assert other.when(SocketLost(2)) == []


def test_a_canary_gets_its_share_and_the_old_generation_keeps_the_rest(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested(FIVE))

    actions = story.when(WorkerReady(2))

    assert RouteTo(1, 2, 500) in actions
    assert StartTimer(SETTLE_2, 60.0) in actions
    assert story.fleet.route == story.fleet[1]
    assert story.fleet.sharing == story.fleet[2]


def test_then_it_gets_all_clients_for_settle_and_is_promoted(story: Story) -> None:
    with_canary(story)

    actions = story.when(passed(met=41))
    assert actions == [RouteTo(2), StartTimer(SETTLE_2, 5.0)]
    assert story.fleet.route == story.fleet[2]
    assert story.settling == {2}

    actions = story.when(passed(met=900))
    assert news(actions) == [(ReportKind.RELOADED, "the canary had 41 connections at 5%")]
    assert RouteTo(2) not in actions
    assert Drain(1) in actions
    assert story.fleet.rollout is None


def test_a_canary_gets_all_clients_for_a_settle_of_less_than_a_second(story: Story) -> None:
    with_canary(story, Policy(settle_s=0.5))

    assert story.when(passed(met=41)) == [RouteTo(2), StartTimer(SETTLE_2, 0.5)]


def test_without_settle_all_clients_and_the_verdict_come_at_once(story: Story) -> None:
    with_canary(story, Policy())

    actions = story.when(passed(met=7))

    assert actions.index(RouteTo(2)) < actions.index(Drain(1))
    assert news(actions) == [(ReportKind.RELOADED, "the canary had 7 connections at 5%")]


def test_the_settings_may_name_the_share(story: Story) -> None:
    story.given_serving(Policy(canary=FIVE)).and_also(ReloadRequested())

    assert RouteTo(1, 2, 500) in story.when(WorkerReady(2))


def test_a_request_comes_before_the_settings(story: Story) -> None:
    story.given_serving(Policy(canary=FIVE)).and_also(ReloadRequested(Canary(100, 9.0)))

    assert RouteTo(1, 2, 100) in story.when(WorkerReady(2))


def test_the_first_start_and_the_last_good_command_get_all_clients(story: Story) -> None:
    story.given_serving(Policy(canary=FIVE))
    assert story.serving == {1}

    story.and_also(RenewRequested())

    assert RouteTo(2) in story.when(WorkerReady(2))


def test_a_canary_is_possible_under_start_first_only() -> None:
    assert no_canary_under(Policy()) is None

    for policy, order in ((Policy(stop_first=True), "stop-first"), (rolling(), "rolling")):
        why = f"it does not work with --reload-order {order}; reload without it"
        assert no_canary_under(policy) == why


def test_a_queued_reload_keeps_its_share(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested(), ReloadRequested(FIVE), ReloadRequested())

    story.and_also(WorkerReady(2))

    assert RouteTo(2, 3, 500) in story.when(WorkerReady(3))
    assert story.fleet.canary_wanted is None


@pytest.mark.parametrize("late", [False, True], ids=["read", "reading"])
def test_a_reload_keeps_its_share_if_the_last_good_command_must_serve_first(
    story: Story, late: bool
) -> None:
    story.given_serving()
    story.fleet = replace(story.fleet, configured=True)
    happened = [SettingsRead(Policy()), WorkerReady(2)]
    story.and_also(ReloadRequested(FIVE), ChannelBroken(1), *(happened[::-1] if late else happened))
    assert (story.serving, story.starting) == ({2}, {3})

    assert RouteTo(2, 3, 500) in story.when(WorkerReady(3))


def test_too_few_connections_extend_it_once_and_then_fail_it(story: Story) -> None:
    with_canary(story, canary=replace(FIVE, at_least=100))

    assert story.when(passed(met=99)) == [StartTimer(SETTLE_2, 60.0)]
    assert story.fleet.sharing

    actions = story.when(passed(met=99))
    assert RouteTo(1) in actions
    why = "the canary had 99 of at least 100 connections in 2m"
    assert news(actions) == [(ReportKind.RELOAD_FAILED, why)]


def test_connections_that_are_not_counted_are_not_reported_as_none(story: Story) -> None:
    with_canary(story, Policy(workers_accept=True))

    actions = story.when(DeadlinePassed(SETTLE_2, met=None))

    why = "the canary had 5% of new connections, which its workers do not count"
    assert news(actions) == [(ReportKind.RELOADED, why)]


def test_a_canary_whose_connections_are_not_counted_cannot_have_enough(story: Story) -> None:
    """It fails before its first client, or where its workers only seem to count."""
    enough = replace(FIVE, at_least=100)
    story.given_serving(Policy(workers_accept=True)).and_also(ReloadRequested(enough))
    actions = story.when(WorkerReady(2, alone=False))
    assert news(actions) == [(ReportKind.RELOAD_FAILED, NO_COUNTS)]
    assert not any(isinstance(each, RouteTo) for each in actions)

    other = with_canary(Story(), canary=enough)
    assert news(other.when(DeadlinePassed(SETTLE_2, met=None))) == [
        (ReportKind.RELOAD_FAILED, NO_COUNTS)
    ]


def test_only_a_canary_with_at_least_needs_counts(story: Story) -> None:
    policy = Policy(workers_accept=True, canary=replace(FIVE, at_least=100))
    story.given_serving(policy).and_also(DryRunRequested())
    assert news(story.when(WorkerReady(2, alone=False))) == [(ReportKind.DRY_RUN_PASSED, "")]

    other = Story().given_serving(Policy(workers_accept=True)).and_also(ReloadRequested(FIVE))
    assert RouteTo(1, 2, 500) in other.when(WorkerReady(2, alone=False))


def test_a_canary_that_needs_one_connection_gets_more_time_without_any(story: Story) -> None:
    with_canary(story, canary=replace(FIVE, at_least=1))

    assert story.when(passed(met=0)) == [StartTimer(SETTLE_2, 60.0)]


def test_enough_connections_in_the_second_time_promote_it(story: Story) -> None:
    with_canary(story, canary=replace(FIVE, at_least=100)).and_also(passed(met=99))

    assert RouteTo(2) in story.when(passed(met=100))


@pytest.mark.parametrize(
    "event",
    [
        WorkerExited(2, DIED),
        SettleFailed(2, "GET /: 500"),
        ChannelBroken(2),
        ReplaceRequested(2, "no WATCHDOG=1 for 5 s", hung=True),
        RollbackRequested(),
    ],
)
def test_the_old_generation_gets_its_clients_back_at_once(story: Story, event: object) -> None:
    with_canary(story)

    actions = story.when(event)  # type: ignore[arg-type]

    assert RouteTo(1) in actions
    assert ReportKind.RELOAD_FAILED in dict(news(actions))
    assert (story.settling, story.serving) == (set(), {1})
    assert story.fleet.rollout is None
    drained = [each for each in actions if each == Drain(2)]
    assert not drained or actions.index(RouteTo(1)) < actions.index(Drain(2))


def test_a_stuck_worker_gets_abrt_once_clients_go_elsewhere(story: Story) -> None:
    with_canary(story)

    actions = story.when(ReplaceRequested(2, "silent", hung=True))

    assert actions.index(RouteTo(1)) < actions.index(Signal(2, WorkerSignal.ABRT))


def test_promote_begins_the_next_stage_and_now_ends_all(story: Story) -> None:
    with_canary(story)
    assert RouteTo(2) in story.when(PromoteRequested(met=3))
    assert story.settling == {2}

    assert (ReportKind.RELOADED, "the canary had 3 connections at 5%") in news(
        story.when(PromoteRequested(met=900))
    )

    with_canary(story)
    actions = story.when(PromoteRequested(now=True, met=3))
    assert RouteTo(2) in actions
    assert ReportKind.RELOADED in dict(news(actions))


def in_the_last_stage(story: Story) -> Story:
    """An operator ended the canary's share early, and the next program took over."""
    with_canary(story, canary=replace(FIVE, at_least=100)).and_also(PromoteRequested(met=3))
    rollout = story.fleet.rollout
    assert rollout
    share = int(str(rollout.share))  # the next program reads it from the state's text
    story.fleet = replace(story.fleet, rollout=replace(rollout, share=share))
    return story


def test_the_next_program_leaves_all_clients_to_a_canary_in_its_last_stage(story: Story) -> None:
    in_the_last_stage(story)

    assert resume(story.fleet, {})[0] == RouteTo(2)


def test_the_last_stage_of_a_canary_needs_no_connections(story: Story) -> None:
    in_the_last_stage(story)

    assert (ReportKind.RELOADED, "the canary had 3 connections at 5%") in news(
        story.when(passed(met=9))
    )


def test_the_last_stage_of_a_canary_takes_the_time_of_settle_after_a_hold(story: Story) -> None:
    in_the_last_stage(story).and_also(HoldRequested(9.0))

    assert story.when(HoldReleased())[-1] == StartTimer(SETTLE_2, 5.0)


def test_promote_ends_a_plain_settling_too(story: Story) -> None:
    story.given_serving(Policy(settle_s=5.0)).and_also(ReloadRequested(), WorkerReady(2))

    assert ReportKind.RELOADED in dict(news(story.when(PromoteRequested())))


@pytest.mark.parametrize("event", [PromoteRequested(), PromoteRequested(now=True)])
def test_promote_is_refused_while_nothing_settles(story: Story, event: PromoteRequested) -> None:
    story.given_serving()

    assert [kind for kind, _ in news(story.when(event))] == [ReportKind.REFUSED]


def test_rollback_ends_a_reload_that_has_only_begun(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested())
    assert ReportKind.RELOAD_FAILED in dict(news(story.when(RollbackRequested())))
    assert story.starting == set()

    assert [kind for kind, _ in news(story.when(RollbackRequested()))] == [ReportKind.REFUSED]


def test_rollback_ends_a_reload_that_reads_its_configuration(story: Story) -> None:
    story.given_serving()
    story.fleet = replace(story.fleet, configured=True)
    story.and_also(ReloadRequested(FIVE))
    assert story.fleet.reading

    assert ReportKind.RELOAD_FAILED in dict(news(story.when(RollbackRequested())))

    assert story.fleet.rollout is None
    assert story.when(SettingsRead(Policy())) == []


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("met", [None, 5])
def test_a_stop_calls_a_rollout_off_in_each_stage(
    story: Story, met: int | None, quick: bool
) -> None:
    with_canary(story)
    if met is not None:
        story.and_also(passed(met))

    actions = story.when(StopRequested(quick=quick))

    assert (ReportKind.RELOAD_FAILED, CALLED_OFF) in news(actions)
    assert ReportKind.RELOADED not in dict(news(actions))
    assert story.fleet.sharing is None
    if not quick:
        assert RouteTo(1) in actions
        assert story.draining == {2}  # it finishes its clients
        assert story.serving == {1}


def test_a_plain_settling_is_promoted_by_a_stop_as_ever(story: Story) -> None:
    story.given_serving(Policy(settle_s=5.0)).and_also(ReloadRequested(), WorkerReady(2))

    assert ReportKind.RELOADED in dict(news(story.when(StopRequested())))


def test_if_the_old_generation_breaks_the_canary_gets_all_clients(story: Story) -> None:
    with_canary(story)

    actions = story.when(ChannelBroken(1))
    assert actions.index(RouteTo(2)) < actions.index(Drain(1))

    assert ReportKind.RELOADED in dict(news(story.when(passed(met=9))))


def test_a_hold_changes_nothing_about_the_share(story: Story) -> None:
    with_canary(story)

    actions = [*story.when(HoldRequested(3.0)), *story.when(HoldReleased())]

    assert not any(isinstance(each, RouteTo) for each in actions)
    assert story.fleet.sharing


def test_the_time_of_a_stage_stands_still_during_a_hold(story: Story) -> None:
    """Meanwhile no client reaches the canary, which proves nothing."""
    with_canary(story)

    assert story.when(HoldRequested(9.0, left_s=42.0))[-1] == StartTimer(SETTLE_2, 51.0)
    assert story.when(HoldRequested(7.0, left_s=50.0))[-1] == StartTimer(SETTLE_2, 49.0)
    assert story.when(passed(met=3)) == [StartTimer(SETTLE_2, 42.0)]
    assert story.when(HoldReleased())[-1] == StartTimer(SETTLE_2, 42.0)

    story.and_also(passed(met=3), HoldRequested(9.0, left_s=1.5))
    assert story.when_over(TimerKind.HOLD)[-1] == StartTimer(SETTLE_2, 1.5)
    assert ReportKind.RELOADED in dict(news(story.when(passed(met=3))))


def test_a_stage_that_begins_during_a_hold_has_all_of_its_time(story: Story) -> None:
    with_canary(story).and_also(HoldRequested(9.0, left_s=42.0), PromoteRequested(met=3))

    assert story.when(HoldReleased())[-1] == StartTimer(SETTLE_2, 5.0)


def test_another_reload_has_all_of_its_time_after_a_hold(story: Story) -> None:
    with_canary(story).and_also(HoldRequested(9.0, left_s=42.0), RollbackRequested())
    story.and_also(WorkerExited(2, "exited with status 0"), ReloadRequested(FIVE), WorkerReady(3))

    settle = Deadline(TimerKind.SETTLE, 3)
    assert story.when(HoldReleased())[-1] == StartTimer(settle, 60.0)


def test_a_stage_without_time_left_does_not_end_again_and_again_during_a_hold(
    story: Story,
) -> None:
    with_canary(story).and_also(HoldRequested(9.0, left_s=0.0))

    [again] = story.when(passed(met=3))

    assert isinstance(again, StartTimer)
    assert again.seconds >= 0.1


STAGES = {
    "share": (),
    "all": (PromoteRequested(met=3),),
    "first workers": (),
}


def in_stage(story: Story, stage: str) -> Story:
    if stage == "first workers":
        story.given_serving(rolling(settle_s=5.0), workers=3)
        return story.and_also(ReloadRequested(), WorkerReady(4))
    return with_canary(story).and_also(*STAGES[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_ends_well_while_clients_wait_in_vain(story: Story, stage: str) -> None:
    in_stage(story, stage)

    stuck = replace(passed(met=3), stuck=True)
    assert story.when(stuck) == [StartTimer(SETTLE_2, 0.1)]
    assert SETTLE_2 in story.fleet.timers

    actions = story.when(passed(met=3))
    assert actions != []
    assert StartTimer(SETTLE_2, 0.1) not in actions


@pytest.mark.parametrize("stage", STAGES)
def test_workers_that_accept_no_client_end_a_rollout_in_each_stage(
    story: Story, stage: str
) -> None:
    in_stage(story, stage)
    assert story.when(Untaken(1, "no worker")) == []  # of the old generation

    actions = story.when(Untaken(2, "no worker has accepted"))

    assert (ReportKind.RELOAD_FAILED, "no worker has accepted") in news(actions)
    assert RouteTo(1) in actions


def test_a_plain_reload_is_not_ended_by_clients_that_wait(story: Story) -> None:
    story.given_serving(Policy(settle_s=5.0)).and_also(ReloadRequested(), WorkerReady(2))

    assert story.when(Untaken(2, "no worker has accepted")) == []
    assert ReportKind.RELOADED in dict(news(story.when(replace(passed(), stuck=True))))


def test_a_canary_that_begins_during_a_hold_lasts_until_clients_come(story: Story) -> None:
    canary = replace(FIVE, at_least=3)
    story.given_serving(Policy(settle_s=5.0)).and_also(HoldRequested(90.0))
    story.and_also(ReloadRequested(canary), WorkerReady(2))

    assert story.when(passed(met=0)) == [StartTimer(SETTLE_2, 60.0)]
    assert story.fleet.rollout == Rollout(500, canary), "it is not extended"
    assert story.when(HoldReleased())[-1] == StartTimer(SETTLE_2, 60.0)
    assert RouteTo(2) in story.when(passed(met=3))


def test_the_time_of_a_plain_settling_stands_still_during_a_hold(story: Story) -> None:
    story.given_serving(Policy(settle_s=5.0)).and_also(ReloadRequested(), WorkerReady(2))

    assert StartTimer(SETTLE_2, 12.0) in story.when(HoldRequested(9.0, left_s=3.0))
    assert StartTimer(SETTLE_2, 3.0) in story.when(HoldReleased())


@pytest.mark.parametrize("policy", [Policy(settle_s=5.0), Policy(surge=1, settle_s=5.0)])
def test_a_reload_that_an_operator_begins_during_a_hold_ends_in_it(
    story: Story, policy: Policy
) -> None:
    """The operator may wait for its verdict before releasing the hold."""
    story.given_serving(policy).and_also(HoldRequested(90.0), ReloadRequested(), WorkerReady(2))

    assert ReportKind.RELOADED in dict(news(story.when(passed())))


def test_a_reload_during_a_hold_ends_although_the_hold_is_renewed(story: Story) -> None:
    """`socketprotectorctl hold` renews its hold each second, until the operator ends it."""
    story.given_serving(Policy(settle_s=5.0)).and_also(HoldRequested(5.0))
    story.and_also(ReloadRequested(), WorkerReady(2))

    assert story.when(HoldRequested(5.0, left_s=4.0)) == [StartTimer(Deadline(TimerKind.HOLD), 5.0)]
    assert StartTimer(SETTLE_2, 5.0) in story.when(HoldReleased())


def test_a_hold_gives_no_time_to_workers_that_are_replaced(story: Story) -> None:
    story.given_serving(rolling(), workers=3).and_also(ReloadRequested(), WorkerReady(4))

    actions = [*story.when(HoldRequested(3.0)), *story.when(HoldReleased())]

    assert SETTLE_2 not in [each.deadline for each in actions if isinstance(each, StartTimer)]


def test_a_canary_that_is_left_alone_has_a_time_after_a_hold(story: Story) -> None:
    with_canary(story, Policy()).and_also(ChannelBroken(1), HoldRequested(9.0))

    assert story.when(HoldReleased())[-1] == StartTimer(SETTLE_2, STANDBY_S)


def test_promote_ends_a_stage_during_a_hold(story: Story) -> None:
    with_canary(story, Policy()).and_also(HoldRequested(9.0))

    assert ReportKind.RELOADED in dict(news(story.when(PromoteRequested())))


def test_a_stop_that_ends_a_hold_starts_no_stage_again(story: Story) -> None:
    with_canary(story).and_also(HoldRequested(9.0))

    actions = story.when(StopRequested())

    assert (ReportKind.RELOAD_FAILED, CALLED_OFF) in news(actions)
    assert SETTLE_2 not in [each.deadline for each in actions if isinstance(each, StartTimer)]


def test_scaling_changes_both_generations(story: Story) -> None:
    with_canary(story)

    story.and_also(ScaleRequested(+1))
    assert [len(each.workers) for each in story.fleet.generations] == [2, 2]

    story.and_also(WorkerReady(3), WorkerReady(4), ScaleRequested(-1))
    assert [len(each.staying) for each in story.fleet.generations] == [1, 1]

    retiring = [w for w in story.fleet[2].workers if w.state is State.RETIRING]
    story.and_also(WorkerExited(retiring[0].number, "exited with status 0"))
    assert story.settling == {2}, "a worker that was to leave has left"


def test_the_next_program_repeats_the_share(story: Story) -> None:
    with_canary(story)

    assert RouteTo(1, 2, 500) in resume(story.fleet, {SETTLE_2: 31.0})
    assert StartTimer(SETTLE_2, 31.0) in resume(story.fleet, {SETTLE_2: 31.0})


def test_an_older_program_ends_it_at_the_new_generation(story: Story) -> None:
    """It does not know the rollout: its route is the settling generation."""
    with_canary(story)
    story.fleet = replace(story.fleet, rollout=None)

    assert route_of(story.fleet) == RouteTo(2)
    assert ReportKind.RELOADED in dict(news(story.when(passed())))


def test_a_probe_without_ready_gives_at_least_the_standby_time(story: Story) -> None:
    story.given(Policy(workers_accept=True, ready="any"))
    story.and_also(Launched(), WorkerReady(1), ReloadRequested(Canary(500, 0.1)))

    assert StartTimer(SETTLE_2, STANDBY_S) in story.when(Answered(2))


def test_a_dry_run_gives_no_share(story: Story) -> None:
    story.given_serving(Policy(canary=FIVE)).and_also(DryRunRequested())

    actions = story.when(WorkerReady(2))

    assert not any(isinstance(each, RouteTo) for each in actions)
    assert ReportKind.DRY_RUN_PASSED in dict(news(actions))


# -- workers replaced a few at a time -----------------------------------------------


def rolling(surge: int = 1, **more: float) -> Policy:
    return Policy(surge=surge, drain_timeout_s=9.0, **more)  # type: ignore[arg-type]


def spawned(actions: list[Action]) -> list[int]:
    return [each.worker for each in actions if isinstance(each, Spawn)]


def retired(actions: list[Action]) -> list[int]:
    kinds = (Retire, Signal)
    return [each.worker for each in actions if isinstance(each, kinds)]


def roll(story: Story) -> tuple[int, list[int]]:
    """Roll to the end, each worker at once ready or gone; return the peak, and the shares."""
    peak, shares = 0, []
    actions = story.when(ReloadRequested())
    for _ in range(100):
        peak = max(peak, sum(1 for _ in story.fleet.alive()))
        shares += [each.share for each in actions if isinstance(each, RouteTo)]
        leaving = [w.number for w in story.fleet.alive() if w.state is State.RETIRING]
        new = [w.number for w in story.fleet.alive() if w.state is State.STARTING]
        if leaving:
            actions = story.when(WorkerExited(leaving[0], "exited with status 0", served_s=20.0))
        elif new:
            actions = story.when(WorkerReady(new[0], retires=True))
        else:
            break
    return peak, shares


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("surge", [1, 2, 5])
def test_all_workers_are_replaced_within_the_bound(story: Story, workers: int, surge: int) -> None:
    story.given_serving(rolling(surge), workers=workers)

    peak, shares = roll(story)

    assert peak <= workers + surge
    assert story.serving == {2}
    assert len([w for w in story.fleet[2].workers if w.state is State.READY]) == workers
    assert shares[:-1] == sorted(shares[:-1]), "the share only grows"
    assert shares[-1] == 0  # the last order names one generation alone
    assert max(shares) < WHOLE


def test_the_share_passes_one_half(story: Story) -> None:
    story.given_serving(rolling(), workers=8)

    _, shares = roll(story)

    assert max(shares) > WHOLE // 2


def test_the_share_is_that_of_the_ready_workers(story: Story) -> None:
    story.given_serving(rolling(), workers=4)
    story.and_also(ReloadRequested())

    assert RouteTo(1, 2, WHOLE // 5) in story.when(WorkerReady(5))
    assert route_of(story.fleet) == RouteTo(1, 2, WHOLE // 4), "one old worker is retiring"


def test_the_share_is_that_of_several_ready_workers(story: Story) -> None:
    story.given_serving(rolling(2), workers=4)
    story.and_also(ReloadRequested(), WorkerReady(5))

    assert RouteTo(1, 2, WHOLE // 3) in story.when(WorkerReady(6))


def test_the_old_generation_keeps_a_share_while_none_of_its_workers_is_ready(story: Story) -> None:
    """Its next worker is starting, and a rollback must remain possible."""
    story.given_serving(rolling(1, settle_s=5.0)).and_also(ReloadRequested(), WorkerReady(2))

    assert RouteTo(1, 2, WHOLE - 1) in story.when(WorkerExited(1, DIED, served_s=20.0))


def test_the_first_worker_beside_ten_thousand_gets_the_smallest_share(story: Story) -> None:
    story.given_serving(rolling())
    old = tuple(Worker(number, number, State.READY) for number in range(WHOLE))
    fleet = story.fleet.with_generation(replace(story.fleet[1], workers=old))
    story.fleet = replace(fleet, workers_wanted=WHOLE, next_worker=WHOLE)
    story.when_at_once(ReloadRequested())

    assert RouteTo(1, 2, 1) in story.when_at_once(WorkerReady(WHOLE))


def test_a_percentage_is_rounded_up() -> None:
    policy = Policy(surge=25, surge_is_percent=True)

    assert [policy.surge_of(n) for n in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]


def test_the_first_workers_settle_beside_all_old_ones(story: Story) -> None:
    story.given_serving(rolling(1, settle_s=5.0), workers=3).and_also(ReloadRequested())

    actions = story.when(WorkerReady(4))
    assert StartTimer(SETTLE_2, 5.0) in actions
    assert not retired(actions)
    assert spawned(actions) == []

    assert retired(story.when(passed())) == [3]


def test_a_reload_without_room_waits(story: Story) -> None:
    """A worker of an earlier generation still has clients."""
    story.given_serving(rolling(), workers=2)
    roll(story)
    [old] = [w.number for w in story.fleet[2].workers if w.slot == 0]
    story.and_also(WorkerExited(old, DIED, served_s=20.0, orphans=True))
    assert sum(1 for _ in story.fleet.alive()) == story.fleet.most_processes == 3

    actions = story.when(ReloadRequested())
    assert spawned(actions) == []
    assert story.starting == {3}

    assert spawned(story.when(WorkerExited(old, "gone"))) != []


@pytest.mark.parametrize(
    "event",
    [OpenFailed(2, "killed", orphans=(3,)), WorkerExited(3, "killed", orphans=True, lost=True)],
)
def test_a_worker_that_a_killed_protector_may_have_started_takes_room_until_it_is_gone(
    story: Story, event: OpenFailed | WorkerExited
) -> None:
    story.given_serving(rolling(), workers=2).and_also(ReloadRequested())
    assert ReportKind.RELOAD_FAILED in dict(news(story.when(event)))
    story.and_also(
        WorkerExited(3, "killed", orphans=True, lost=True)
    )  # as for each worker without a record

    assert spawned(story.when(ReloadRequested())) == []
    assert sum(1 for _ in story.fleet.alive()) == story.fleet.most_processes == 3

    assert spawned(story.when(WorkerExited(3, "orphans gone"))) != []


def test_a_worker_that_no_protector_has_started_takes_no_room(story: Story) -> None:
    """The killed protector's state had its generation, and no worker of it."""
    story.given_serving(rolling(), workers=2).and_also(ReloadRequested())
    story.and_also(OpenFailed(2, "killed"))
    assert sum(1 for _ in story.fleet.alive()) == 2

    assert spawned(story.when(ReloadRequested())) != []


def test_orphans_serve_until_another_worker_of_their_slot_is_ready(story: Story) -> None:
    story.given_serving(rolling(), workers=2)

    actions = story.when(WorkerExited(1, DIED, served_s=20.0, orphans=True))
    assert (spawned(actions), Retire(1) in actions) == ([3], False)
    assert Retire(1) in story.when(WorkerReady(3, retires=True))

    # No room: the next orphans serve until the first are gone, and another worker is ready.
    actions = story.when(WorkerExited(3, DIED, served_s=20.0, orphans=True))
    assert (spawned(actions), Retire(3) in actions) == ([], False)
    assert sum(1 for _ in story.fleet.alive()) == story.fleet.most_processes == 3
    actions = story.when(WorkerExited(1, "orphans gone"))
    assert (spawned(actions), Retire(3) in actions) == ([4], False)
    assert Retire(3) in story.when(WorkerReady(4, retires=True))


def test_the_last_worker_is_replaced_while_others_of_its_slot_finish(story: Story) -> None:
    """The protector does not know whether orphans take new clients."""
    story.given_serving(rolling())
    story.and_also(WorkerExited(1, DIED, served_s=20.0, orphans=True), WorkerReady(2, retires=True))
    assert sum(1 for _ in story.fleet.alive()) == story.fleet.most_processes == 2

    actions = story.when(WorkerExited(2, DIED, served_s=20.0, orphans=True))

    assert (spawned(actions), Retire(2) in actions) == ([3], False)


def test_the_last_worker_is_replaced_while_many_finish(story: Story) -> None:
    """The workers that `scale` has retired may have long connections."""
    story.given_serving(rolling(), workers=4).and_also(ScaleRequested(to=1))
    assert sum(1 for _ in story.fleet.alive()) > story.fleet.most_processes

    assert spawned(story.when(WorkerExited(1, DIED, served_s=20.0))) == [5]


def test_one_of_several_dead_workers_starts_while_many_finish(story: Story) -> None:
    story.given_serving(rolling(), workers=6).and_also(ScaleRequested(to=2))

    assert spawned(story.when(WorkerExited(1, DIED, served_s=20.0))) == []
    assert spawned(story.when(WorkerExited(2, DIED, served_s=20.0))) == [7]


def test_a_stuck_last_worker_is_replaced_while_many_finish(story: Story) -> None:
    story.given_serving(rolling(), workers=4).and_also(ScaleRequested(to=1))

    assert spawned(story.when(ReplaceRequested(1, "silent", hung=True))) == [5]


def test_a_stuck_last_old_worker_is_replaced_during_a_rolling_reload(story: Story) -> None:
    """It has a share of the clients, and the reload may wait long for workers that finish."""
    story.given_serving(rolling(), workers=2).and_also(ReloadRequested(), WorkerReady(3))
    assert [w.number for w in story.fleet[1].staying] == [1]

    assert spawned(story.when(ReplaceRequested(1, "silent", hung=True))) == [4]
    assert Signal(1, WorkerSignal.ABRT) in story.when(WorkerReady(4, retires=True))


def test_a_worker_that_is_only_old_waits_for_room_for_its_replacement(story: Story) -> None:
    story.given_serving(rolling(), workers=4).and_also(ScaleRequested(to=1))

    assert spawned(story.when(ReplaceRequested(1, "too old"))) == []


def test_a_rescue_starts_while_workers_of_an_earlier_reload_finish(story: Story) -> None:
    """Clients wait at a socket that a worker has shut down."""
    story.given(replace(rolling(), workers_accept=True)).and_also(
        Launched(), WorkerReady(1, retires=True), ReloadRequested(), WorkerReady(2, retires=True)
    )
    story.and_also(Quiesced(1))
    assert sum(1 for _ in story.fleet.alive()) == story.fleet.most_processes == 2

    assert spawned(story.when(Stranded())) == [3]


def full(story: Story, policy: Policy, workers: int = 1) -> Story:
    """Workers of an earlier reload finish, so that there is no room."""
    story.given(replace(policy, workers_accept=True), workers=workers).and_also(Launched())
    story.and_also(*(WorkerReady(n + 1, retires=True) for n in range(workers)), ReloadRequested())
    for _ in range(4):
        starting = [w.number for w in story.fleet.alive() if w.state is State.STARTING]
        story.and_also(*(WorkerReady(each, retires=True) for each in starting))
    story.and_also(Quiesced(1))
    assert story.serving == {2}
    assert story.fleet.free_places == 0
    return story


def test_a_rescue_is_complete_with_the_workers_that_have_room(story: Story) -> None:
    full(story, rolling(2), workers=2)
    [rescuer] = spawned(story.when(Stranded()))

    story.when(WorkerReady(rescuer, retires=True))

    assert story.starting == set()
    assert story.fleet.sharing is story.fleet[3]


def test_a_generation_is_not_replaced_without_room(story: Story) -> None:
    """Each further replacement would add a process."""
    full(story, rolling())

    assert news(story.when(RenewRequested())) == [(ReportKind.REFUSED, FULL)]


def test_under_connection_no_generation_of_the_last_good_command_is_a_rescue(
    story: Story,
) -> None:
    """Its first worker waits for room, because no client waits for it."""
    story.given_serving(rolling()).and_also(RenewRequested())
    assert story.starting == {2}
    story.and_also(WorkerExited(2, DIED), WorkerExited(1, DIED, served_s=20.0, orphans=True))
    assert story.fleet.free_places == 0

    assert spawned(story.when(Stranded())) == []


def test_in_a_stop_queued_clients_get_a_worker_without_room(story: Story) -> None:
    story.given_serving(rolling(), workers=4)
    story.and_also(ScaleRequested(to=1), StopRequested(), BacklogEmptied())

    assert spawned(story.when(WorkerExited(1, DIED, served_s=20.0, waiting=3))) == [5]


def test_a_stop_starts_no_replacement_that_waited_for_room(story: Story) -> None:
    story.given_serving(rolling(), workers=4)
    story.and_also(*(ReplaceRequested(each, "too old") for each in (1, 2, 3, 4)))

    assert spawned(story.when(StopRequested())) == []


def test_a_rescue_keeps_its_ready_workers_when_there_is_less_room(story: Story) -> None:
    story.given(replace(rolling(2, settle_s=5.0), workers_accept=True), workers=4)
    story.and_also(Launched(), *(WorkerReady(n, retires=True) for n in (1, 2, 3, 4)))
    story.and_also(Stranded(), WorkerReady(5, retires=True), WorkerReady(6, retires=True))
    assert story.settling == {2}

    assert retired(story.when(ScaleRequested(to=3))) == [4]


def test_a_stuck_worker_waits_for_room_for_its_replacement_if_another_serves(
    story: Story,
) -> None:
    story.given_serving(rolling(), workers=4).and_also(ScaleRequested(to=2))

    assert spawned(story.when(ReplaceRequested(1, "silent", hung=True))) == []


def test_a_stuck_last_worker_is_replaced_while_a_release_waits_for_room(story: Story) -> None:
    full(story, rolling()).and_also(ReloadRequested())

    assert spawned(story.when(ReplaceRequested(2, "silent", hung=True))) == [3]


def test_a_release_waits_for_room_while_workers_of_an_earlier_reload_finish(
    story: Story,
) -> None:
    story.given_serving(rolling()).and_also(ReloadRequested(), WorkerReady(2, retires=True))
    assert sum(1 for _ in story.fleet.alive()) == story.fleet.most_processes == 2

    assert spawned(story.when(ReloadRequested())) == []


def test_orphans_of_a_slot_that_is_not_filled_finish_at_once(story: Story) -> None:
    story.given_serving(rolling(), workers=2).and_also(
        WorkerExited(1, DIED, served_s=20.0, orphans=True),
        WorkerExited(2, DIED, served_s=20.0, orphans=True),
    )
    [waiting] = [w for w in story.fleet[1].workers if w.state is State.WAITING]
    [orphan] = [w.number for w in story.fleet[1].workers if w.number < 3 and w.slot == waiting.slot]

    assert Retire(orphan) in story.when(ScaleRequested(to=1))


def test_the_start_timeout_does_not_count_waiting_for_room(story: Story) -> None:
    story.given_serving(rolling(2), workers=2)
    story.and_also(WorkerExited(1, DIED, served_s=20.0, orphans=True), WorkerReady(3))
    story.and_also(ReloadRequested(), WorkerReady(4))
    assert story.starting == {2}

    actions = story.when(DeadlinePassed(Deadline(TimerKind.START, 2)))

    assert story.starting == {2}
    assert [each for each in actions if isinstance(each, StartTimer)]


def test_the_start_timeout_does_not_count_the_wait_for_room_before_a_probe(story: Story) -> None:
    """Probes begin when all new workers run, so none of them is ready before."""
    story.given(replace(rolling(2), ready="http"), workers=2).and_also(Launched(), Answered(1))
    story.and_also(WorkerExited(1, DIED, served_s=20.0, orphans=True), ReloadRequested())
    assert len(story.fleet[2].workers) == 1

    actions = story.when(DeadlinePassed(Deadline(TimerKind.START, 2)))

    assert story.starting == {2}
    assert [each for each in actions if isinstance(each, StartTimer)]
    assert Probe(2) in story.when(WorkerExited(1, "orphans gone"))
    assert ReportKind.RELOAD_FAILED in dict(news(story.when_over(TimerKind.START, 2)))


def test_a_worker_that_starts_too_slowly_fails_a_reload_without_room(story: Story) -> None:
    story.given_serving(rolling()).and_also(ReloadRequested())
    assert sum(1 for _ in story.fleet.alive()) == story.fleet.most_processes == 2

    actions = story.when_over(TimerKind.START, 2)

    assert ReportKind.RELOAD_FAILED in dict(news(actions))


def test_a_release_with_workers_enough_does_not_wait_for_room(story: Story) -> None:
    """It fails: only its probe's answer is missing."""
    story.given(replace(rolling(2), ready="http"), workers=2)
    story.and_also(Launched(), WorkerReady(1), WorkerReady(2), Answered(1), ReloadRequested())
    story.and_also(WorkerReady(3), WorkerReady(4), ScaleRequested(to=1))
    assert sum(1 for _ in story.fleet.alive()) > story.fleet.most_processes

    actions = story.when_over(TimerKind.START, 2)

    assert ReportKind.RELOAD_FAILED in dict(news(actions))


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_a_failure_in_any_batch_brings_the_old_workers_back(story: Story, batch: int) -> None:
    story.given_serving(rolling(), workers=4).and_also(ReloadRequested())
    for _ in range(100):
        leaving = [w.number for w in story.fleet.alive() if w.state is State.RETIRING]
        new = next((w for w in story.fleet.alive() if w.state is State.STARTING), None)
        if leaving:
            story.and_also(WorkerExited(leaving[0], "exited with status 0", served_s=20.0))
        elif new and len(story.fleet[2].workers) < batch:
            story.and_also(WorkerReady(new.number, retires=True))
        else:
            break
    assert new

    actions = story.when(WorkerExited(new.number, DIED))
    assert ReportKind.RELOAD_FAILED in dict(news(actions))
    assert story.fleet.route == story.fleet[1]
    for _ in range(100):
        assert sum(1 for _ in story.fleet.alive()) <= 5
        gone = [w.number for g in story.fleet.all_of(Phase.DRAINING) for w in g.alive]
        new_old = [w.number for w in story.fleet[1].workers if w.state is State.STARTING]
        if gone:
            story.and_also(WorkerExited(gone[0], "exited with status 0", served_s=20.0))
        elif new_old:
            story.and_also(WorkerReady(new_old[0]))
        else:
            break
    assert [w.state for w in story.fleet[1].workers] == [State.READY] * 4


def test_a_later_worker_that_is_not_ready_in_time_fails_the_reload(story: Story) -> None:
    story.given_serving(rolling(), workers=2).and_also(ReloadRequested(), WorkerReady(3))
    story.and_also(WorkerExited(2, "exited with status 0", served_s=20.0))
    [new] = [w.number for w in story.fleet[2].workers if w.state is State.STARTING]

    actions = story.when_over(TimerKind.WORKER_START, new)

    [(_, reason)] = [each for each in news(actions) if each[0] is ReportKind.RELOAD_FAILED]
    assert reason.startswith("not ready within 1m")
    assert (story.settling, story.serving) == (set(), {1})
    # It may accept at its generation's socket: first, clients go elsewhere.
    assert actions.index(RouteTo(1)) < actions.index(Signal(new, WorkerSignal.TERM))


def test_a_dead_old_worker_above_the_target_is_not_replaced(story: Story) -> None:
    story.given_serving(rolling(), workers=3).and_also(ReloadRequested(), WorkerReady(4))
    assert story.fleet.wanted_in(story.fleet[1]) == 2

    story.and_also(WorkerExited(1, DIED, served_s=20.0))  # 3 is retiring; 2 is left
    staying = [w for w in story.fleet[1].workers if w.state is not State.RETIRING]
    assert len(staying) == 2, "one below the target is replaced"

    story.and_also(WorkerExited(3, "exited with status 0", served_s=20.0))
    assert len(story.fleet[1].workers) == 2


def test_scaling_changes_the_target(story: Story) -> None:
    story.given_serving(rolling(), workers=2).and_also(ReloadRequested(), WorkerReady(3))
    story.and_also(ScaleRequested(to=3))

    for _ in range(100):
        leaving = [w.number for w in story.fleet.alive() if w.state is State.RETIRING]
        new = [w.number for w in story.fleet.alive() if w.state is State.STARTING]
        assert sum(1 for _ in story.fleet.alive()) <= 4
        if leaving:
            story.and_also(WorkerExited(leaving[0], "exited with status 0", served_s=20.0))
        elif new:
            story.and_also(WorkerReady(new[0], retires=True))
        else:
            break
    assert story.serving == {2}
    assert len(story.fleet[2].workers) == 3


def test_scaling_below_the_new_workers_completes_the_reload(story: Story) -> None:
    story.given_serving(rolling(3), workers=4).and_also(ReloadRequested())
    story.and_also(WorkerReady(5), WorkerReady(6), WorkerReady(7))
    assert story.settling == {2}

    assert ReportKind.RELOADED in dict(news(story.when(ScaleRequested(to=2))))


def test_replacements_of_single_workers_wait(story: Story) -> None:
    story.given_serving(rolling(2), workers=3).and_also(ReloadRequested())

    assert spawned(story.when(ReplaceRequested(1, "too old"))) == []


def test_promote_ends_the_settling_of_the_first_workers_only(story: Story) -> None:
    story.given_serving(rolling(1, settle_s=5.0), workers=2)
    story.and_also(ReloadRequested(), WorkerReady(3))

    assert [kind for kind, _ in news(story.when(PromoteRequested(now=True)))] == [
        ReportKind.REFUSED
    ]
    assert retired(story.when(PromoteRequested())) == [2]
    assert [kind for kind, _ in news(story.when(PromoteRequested()))] == [ReportKind.REFUSED]


def test_the_share_follows_the_workers_while_the_first_ones_settle(story: Story) -> None:
    story.given_serving(rolling(1, settle_s=5.0), workers=2)
    story.and_also(ReloadRequested())
    assert RouteTo(1, 2, WHOLE // 3) in story.when(WorkerReady(3))

    story.and_also(ScaleRequested(to=3))
    assert RouteTo(1, 2, WHOLE // 4) in story.when(WorkerReady(4))


def test_a_stop_during_a_rolling_reload_calls_it_off(story: Story) -> None:
    story.given_serving(rolling(), workers=3).and_also(ReloadRequested(), WorkerReady(4))

    actions = story.when(StopRequested())

    assert (ReportKind.RELOAD_FAILED, CALLED_OFF) in news(actions)
    assert RouteTo(1) in actions


def test_a_configuration_may_begin_and_end_rolling(story: Story) -> None:
    story.given_serving(workers=2)
    story.fleet = replace(story.fleet, configured=True)
    story.and_also(ReloadRequested())
    assert len(spawned(story.when(SettingsRead(rolling(), None)))) == 1

    story.and_also(RollbackRequested())
    assert story.fleet.policy == Policy()
    story.and_also(WorkerExited(3, "exited with status 0"), ReloadRequested())
    assert len(spawned(story.when(SettingsRead(Policy(), None)))) == 2


def read_rolling(story: Story, start_timeout_s: float = 60.0) -> list[Action]:
    """Reload with a configuration that replaces the default order by the rolling one."""
    story.fleet = replace(story.fleet, configured=True)
    story.and_also(ReloadRequested())
    return story.when(SettingsRead(rolling(start_timeout_s=start_timeout_s), None))


def test_each_worker_has_the_start_timeout_that_the_reload_has_read(story: Story) -> None:
    story.given_serving(rolling(start_timeout_s=2.0), workers=3)
    read_rolling(story, 30.0)
    story.and_also(WorkerReady(4))

    actions = story.when(WorkerExited(3, "exited with status 0", served_s=20.0))

    assert StartTimer(Deadline(TimerKind.WORKER_START, 5), 30.0) in actions


def test_the_drain_timeout_that_begins_with_rolling_limits_the_replaced_workers(
    story: Story,
) -> None:
    story.given_serving(workers=2)
    read_rolling(story)

    actions = story.when(WorkerReady(3))

    assert StartTimer(Deadline(TimerKind.WORKER_RETIRE, 2), 9.0) in actions


def test_the_drain_timeout_that_begins_with_rolling_limits_who_already_leaves(
    story: Story,
) -> None:
    """Without a limit, the first new worker might wait for room without end."""
    story.given_serving(workers=2).and_also(ReloadRequested(), WorkerReady(3), WorkerReady(4))
    story.and_also(ScaleRequested(to=1))
    assert not story.fleet.timers

    actions = read_rolling(story)

    assert StartTimer(Deadline(TimerKind.DRAIN, 1), 9.0) in actions
    assert StartTimer(Deadline(TimerKind.WORKER_RETIRE, 4), 9.0) in actions


def test_a_dry_run_of_rolling_neither_ends_who_leaves_nor_waits_for_them(story: Story) -> None:
    """A dry run changes nothing for clients, and the order in force limits no processes."""
    story.given_serving(workers=2).and_also(ReloadRequested(), WorkerReady(3), WorkerReady(4))
    story.and_also(ScaleRequested(to=1))
    story.fleet = replace(story.fleet, configured=True)
    story.and_also(DryRunRequested())

    actions = story.when(SettingsRead(rolling(), None))

    assert spawned(actions) == [5]
    assert story.fleet.timers == {Deadline(TimerKind.START, 3)}
    passed = story.when(WorkerReady(5))
    assert ReportKind.DRY_RUN_PASSED in [kind for kind, _ in news(passed)]


def test_a_dry_run_that_ends_rolling_starts_a_worker_within_the_bound(story: Story) -> None:
    """Its own order allows no process more than there are, but is not in force."""
    story.given_serving(rolling(), workers=3)
    story.fleet = replace(story.fleet, configured=True)
    story.and_also(DryRunRequested())

    actions = story.when(SettingsRead(Policy(start_timeout_s=7.0), None))

    assert spawned(actions) == [4]
    assert StartTimer(Deadline(TimerKind.START, 2), 7.0) in actions
    passed = story.when(WorkerReady(4))
    assert ReportKind.DRY_RUN_PASSED in [kind for kind, _ in news(passed)]


def test_the_timeout_of_a_dry_run_of_rolling_limits_no_leaving_worker(story: Story) -> None:
    story.given_serving(workers=2)
    story.fleet = replace(story.fleet, configured=True)
    story.and_also(DryRunRequested(), SettingsRead(rolling(), None))

    actions = story.when(ScaleRequested(to=1))

    assert Signal(2, WorkerSignal.TERM) in actions
    assert Deadline(TimerKind.WORKER_RETIRE, 2) not in story.fleet.timers


def test_the_last_good_command_is_renewed_within_the_bound_too(story: Story) -> None:
    story.given_serving(rolling(), workers=4)

    assert len(spawned(story.when(RenewRequested()))) == 1


def test_nothing_but_a_value_says_how_a_rollout_goes_on(story: Story) -> None:
    with_canary(story)

    assert story.fleet.rollout == Rollout(500, FIVE)


def test_when_no_generation_serves_the_next_starts_all_that_there_is_room_for(
    story: Story,
) -> None:
    """The others follow as the workers of the broken generation end."""
    story.given_serving(rolling(), workers=3)

    story.and_also(ChannelBroken(1), DeadlinePassed(Deadline(TimerKind.OPEN)))
    assert len(story.fleet[2].workers) == 1
    story.and_also(WorkerReady(4))
    assert story.serving == {2}

    story.and_also(WorkerExited(1, "exited with status 0"), WorkerExited(2, "exited with status 0"))
    assert len(story.fleet[2].workers) == 3


def test_when_no_generation_serves_the_first_worker_of_the_next_starts_at_once(
    story: Story,
) -> None:
    story.given_serving(rolling()).and_also(WorkerExited(1, DIED, served_s=20.0, orphans=True))
    assert sum(1 for _ in story.fleet.alive()) == story.fleet.most_processes == 2

    assert spawned(story.when(ChannelBroken(1, served_s=20.0))) == [3]
    story.when(WorkerReady(3))
    assert story.serving == {2}


def test_all_start_where_the_broken_generation_has_ended(story: Story) -> None:
    story.given_serving(rolling(), workers=3)
    story.and_also(ChannelBroken(1), *(WorkerExited(n, DIED) for n in (1, 2, 3)))

    story.and_also(DeadlinePassed(Deadline(TimerKind.OPEN)))

    assert len(story.fleet[2].workers) == 3


def test_the_start_where_no_generation_serves_grows_as_others_end(story: Story) -> None:
    story.given_serving(rolling(2), workers=3)

    story.and_also(ChannelBroken(1), DeadlinePassed(Deadline(TimerKind.OPEN)))
    assert len(story.fleet[2].workers) == 2

    story.and_also(WorkerExited(1, DIED))
    assert len(story.fleet[2].workers) == 3


@pytest.mark.parametrize(("before", "after", "most"), [(2, 4, 5), (4, 2, 5)])
def test_the_bound_is_that_of_the_larger_number(
    story: Story, before: int, after: int, most: int
) -> None:
    story.given_serving(workers=before)
    story.fleet = replace(story.fleet, configured=True)
    story.and_also(ReloadRequested(), SettingsRead(rolling(), after))

    assert story.fleet.most_processes == most


def test_if_the_old_generation_breaks_a_rolling_reload_starts_all_workers(story: Story) -> None:
    story.given_serving(rolling(), workers=3).and_also(ReloadRequested(), WorkerReady(4))

    assert RouteTo(2) in story.when(ChannelBroken(1))

    assert story.fleet.rollout == Rollout(WHOLE)
    story.and_also(*(WorkerExited(n, DIED) for n in (1, 2, 3)))
    assert len(story.fleet[2].workers) == 3


def test_if_the_old_generation_breaks_beside_a_whole_canary_its_count_stays(story: Story) -> None:
    with_canary(story).and_also(passed(met=41))

    assert RouteTo(2) not in story.when(ChannelBroken(1))

    assert news(story.when(passed(met=900))) == [
        (ReportKind.RELOADED, "the canary had 41 connections at 5%")
    ]


def test_an_old_worker_that_dies_often_is_replaced_later(story: Story) -> None:
    """Beside a rolling reload, too."""
    story.given_serving(rolling(), workers=3).and_also(ReloadRequested(), WorkerReady(4))
    while not any(each.wait is TimerKind.WORKER_RESPAWN for each in story.fleet.timers):
        [first] = [w for w in story.fleet[1].workers if w.slot == 0]
        if first.state is State.STARTING:
            story.and_also(WorkerReady(first.number, retires=True))
        story.and_also(WorkerExited(first.number, DIED))

    assert [w.state for w in story.fleet[1].workers if w.slot == 0] == [State.WAITING]


def test_an_old_worker_that_is_about_to_leave_is_not_replaced(story: Story) -> None:
    """Only a few are retired in one turn of the loop."""
    story.given_serving(rolling(19), workers=20).and_also(ReloadRequested())
    for number in range(21, 40):
        story.when_at_once(WorkerReady(number, retires=True))
    over = [w.number for w in story.fleet[1].workers if w.state is State.READY]
    assert len(over) > story.fleet.wanted_in(story.fleet[1])

    actions = story.when_at_once(WorkerExited(over[1], DIED))

    assert spawned(actions) == []
    assert all(w.state is not State.WAITING for w in story.fleet[1].workers)


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.SETTLING])
def test_where_workers_accept_each_must_be_able_to_leave_alone(story: Story, phase: Phase) -> None:
    story.given_serving(replace(rolling(1, settle_s=5.0), workers_accept=True), workers=2)
    story.and_also(ReloadRequested())
    if phase is Phase.SETTLING:
        story.and_also(WorkerReady(3, retires=True), passed())
        story.and_also(WorkerExited(2, "exited with status 0", served_s=20.0))
    [new] = [w.number for w in story.fleet[2].workers if w.state is State.STARTING]

    actions = story.when(WorkerReady(new, alone=False))

    assert (ReportKind.RELOAD_FAILED, NO_LIBRARY) in news(actions)
    assert story.serving == {1}


def test_what_serves_already_may_use_no_library(story: Story) -> None:
    story.given_serving(replace(rolling(), workers_accept=True))
    story.and_also(WorkerExited(1, DIED, served_s=20.0))

    story.and_also(WorkerReady(2, alone=False))

    assert story.fleet[1].ready


def test_the_answer_does_not_replace_the_library(story: Story) -> None:
    policy = replace(rolling(), workers_accept=True, ready="any")
    story.given(policy).and_also(Launched(), WorkerReady(1), Answered(1))
    story.and_also(ReloadRequested())

    assert (ReportKind.RELOAD_FAILED, NO_LIBRARY) in news(story.when(Answered(2, alone=False)))


def test_a_queue_counts_the_clients_of_a_canary_itself(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested(replace(FIVE, at_least=1)))

    assert RouteTo(1, 2, 500) in story.when(WorkerReady(2, alone=False))


def test_why_a_stage_cannot_be_ended(story: Story) -> None:
    nothing = "nothing to promote: no generation is settling; see `status`"
    story.given_serving(rolling(), workers=2)
    assert news(story.when(PromoteRequested())) == [(ReportKind.REFUSED, nothing)]

    story.and_also(ReloadRequested(), WorkerReady(3))
    [(kind, reason)] = news(story.when(PromoteRequested()))
    assert (kind, reason[:35]) == (ReportKind.REFUSED, "cannot promote: workers are being r")

    canary = with_canary(Story(), Policy(lame_duck_s=9.0)).and_also(StopRequested())
    assert news(canary.when(PromoteRequested())) == [(ReportKind.REFUSED, nothing)]


NOTHING = "nothing to roll back: no reload can be called off; see `status`"


@pytest.mark.parametrize(
    ("policy", "events"),
    [
        (Policy(), ()),
        (Policy(), (RenewRequested(),)),
        (Policy(), (DryRunRequested(),)),
        (Policy(settle_s=5.0), (ReloadRequested(), WorkerReady(2), ChannelBroken(1))),
        (Policy(stop_first=True), (RenewRequested(),)),
        (Policy(lame_duck_s=9.0), (ReloadRequested(), StopRequested())),
    ],
    ids=["no reload", "a replacement", "a dry run", "it serves alone", "stop-first", "a stop"],
)
def test_only_a_release_that_does_not_serve_alone_is_called_off(
    story: Story, policy: Policy, events: tuple[Event, ...]
) -> None:
    story.given_serving(policy).and_also(*events)

    assert story.when(RollbackRequested()) == [Report(ReportKind.REFUSED, reason=NOTHING)]


@pytest.mark.parametrize("moment", ["the old one drains", "the new one starts"])
def test_rollback_under_stop_first_starts_the_last_good_command(story: Story, moment: str) -> None:
    story.given_serving(Policy(stop_first=True)).and_also(ReloadRequested())
    gone = WorkerExited(1, "exited with status 0")
    if moment == "the old one drains":
        said = story.when(RollbackRequested())
        actions = [*said, *story.when(gone)]
    else:
        story.and_also(gone)
        said = story.when(RollbackRequested())
        actions = [*said, *story.when(WorkerExited(2, "killed by SIGTERM"))]

    assert Report(ReportKind.RELOAD_FAILED, 2, ROLLED_BACK) in said
    assert Open(3, fresh=False) in actions
    worker = min(each.number for each in story.fleet[3].workers)
    assert Report(ReportKind.RECOVERED, 3) in story.when(WorkerReady(worker))


def test_a_reload_that_was_requested_meanwhile_follows_a_rollback_under_stop_first(
    story: Story,
) -> None:
    story.given_serving(Policy(stop_first=True)).and_also(ReloadRequested(), ReloadRequested())

    story.and_also(RollbackRequested())

    assert Open(3, fresh=True) in story.when(WorkerExited(1, "exited with status 0"))


def test_rollback_ends_a_reload_that_waits_to_be_opened(story: Story) -> None:
    story.given_serving(Policy(workers_accept=True))
    story.and_also(ReloadRequested(), WorkerReady(2), ReloadRequested())
    assert story.fleet.to_open is Next.FRESH

    assert ReportKind.RELOAD_FAILED in dict(news(story.when(RollbackRequested())))

    assert story.fleet.to_open is None


def test_a_stuck_worker_ends_if_its_replacement_dies_while_a_canary_starts(story: Story) -> None:
    story.given_serving()
    story.and_also(ReloadRequested(FIVE), ReplaceRequested(1, "silent", hung=True))
    assert story.fleet[1].workers[1].replaces == 1

    assert Signal(1, WorkerSignal.ABRT) in story.when(WorkerExited(3, DIED))
    assert Spawn(1, worker=4, slot=0) in story.when(WorkerExited(1, DIED))


def test_a_stuck_worker_ends_if_its_dead_replacement_is_not_wanted_any_more(story: Story) -> None:
    story.given_serving(workers=2)
    story.when(ReplaceRequested(1, "silent", hung=True))
    story.when_at_once(ReloadRequested(FIVE))
    story.when_at_once(ScaleRequested(-1))

    assert Signal(1, WorkerSignal.ABRT) in story.when_at_once(WorkerExited(3, DIED))


def test_a_replacement_waits_even_where_there_is_room(story: Story) -> None:
    story.given_serving(rolling(2)).and_also(ReloadRequested())
    assert sum(1 for _ in story.fleet.alive()) < story.fleet.most_processes

    assert spawned(story.when(ReplaceRequested(1, "too old"))) == []


def test_an_old_worker_that_dies_before_the_switch_is_replaced(story: Story) -> None:
    story.given_serving(rolling(2)).and_also(ReloadRequested())

    assert spawned(story.when(WorkerExited(1, DIED, served_s=20.0))) == [3]


def test_a_stuck_worker_of_an_older_generation_leaves_the_canary_alone(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested(), WorkerReady(2))
    story.and_also(ReloadRequested(FIVE), WorkerReady(3))

    actions = story.when(ReplaceRequested(1, "silent", hung=True))

    assert news(actions) == [(ReportKind.REPLACING, "silent")]
    assert story.settling == {3}


def test_a_stuck_worker_fails_a_plain_settling_at_once(story: Story) -> None:
    """Until ABRT or KILL has ended it, --settle could be over."""
    story.given_serving(Policy(settle_s=5.0)).and_also(ReloadRequested(), WorkerReady(2))

    actions = story.when(ReplaceRequested(2, "silent", hung=True))

    assert (ReportKind.RELOAD_FAILED, "silent") in news(actions)
    assert actions.index(RouteTo(1)) < actions.index(Signal(2, WorkerSignal.ABRT))
    assert SETTLE_2 not in story.fleet.timers


def test_a_stuck_worker_fails_a_start_at_once_while_another_generation_serves(story: Story) -> None:
    """Until it has ended, the last worker could become ready."""
    story.given_serving(workers=2).and_also(ReloadRequested(), WorkerReady(3))

    actions = story.when(ReplaceRequested(3, "silent", hung=True))

    assert (ReportKind.RELOAD_FAILED, "silent") in news(actions)
    abort, term = (Signal(3, each) for each in (WorkerSignal.ABRT, WorkerSignal.TERM))
    assert actions.index(abort) < actions.index(term)
    assert story.when(WorkerReady(4)) == []
    assert story.serving == {1}


def test_a_stuck_worker_fails_a_first_start_by_its_exit(story: Story) -> None:
    story.given(Policy(), workers=2).and_also(Launched(), WorkerReady(1))

    assert news(story.when(ReplaceRequested(1, "silent", hung=True))) == [
        (ReportKind.REPLACING, "silent")
    ]


def test_a_worker_that_leaves_a_canary_too_slowly_does_not_fail_it(story: Story) -> None:
    story.given_serving(Policy(settle_s=5.0, drain_timeout_s=9.0), workers=2)
    story.and_also(ReloadRequested(FIVE), WorkerReady(3), WorkerReady(4), ScaleRequested(-1))

    actions = story.when_over(TimerKind.WORKER_RETIRE, 4)

    assert (news(actions), story.settling) == ([], {2})


def test_a_canary_whose_start_fails_leaves_nothing(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested(FIVE), WorkerExited(2, DIED))

    assert story.fleet.rollout is None
