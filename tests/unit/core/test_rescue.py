"""Where workers accept: clients that a failed release has left at its socket.

The last good command accepts them, before a reload that was requested meanwhile begins.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from socketprotector.core.actions import (
    Action,
    CancelTimer,
    CloseListeners,
    ForgetSettings,
    Hold,
    Open,
    ReadSettings,
    Report,
    ReportKind,
    RouteTo,
    StartTimer,
)
from socketprotector.core.events import (
    ChannelBroken,
    Deadline,
    DeadlinePassed,
    DryRunRequested,
    Event,
    HeldClientsWait,
    HoldRequested,
    Launched,
    Quiesced,
    ReloadRequested,
    SettingsRead,
    StopRequested,
    Stranded,
    TimerKind,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import Next, Phase, Policy, Stop
from socketprotector.core.rescue import HELD_FIRST, SETTLED_BY_HOLD, STRANDED_FIRST
from socketprotector.core.stop import CALLED_OFF, SETTLED_BY_STOP
from socketprotector.core.waiting import Facts, waits
from socketprotector.model.share import Canary
from tests.unit.conftest import TURN, Story

ACCEPT = Policy(workers_accept=True)
DIED = "exited with status 3"


def died(worker: int, waiting: int = 1, *, orphans: bool = False) -> WorkerExited:
    return WorkerExited(worker, DIED, waiting=waiting, orphans=orphans)


def failed(actions: list[Action]) -> list[int]:
    reports = [each for each in actions if isinstance(each, Report)]
    return [each.generation for each in reports if each.news is ReportKind.RELOAD_FAILED]


def opened(actions: list[Action]) -> list[Open]:
    return [each for each in actions if isinstance(each, Open)]


def failing(story: Story, policy: Policy = ACCEPT, *, workers: int = 1) -> Story:
    """Generation 2 starts, and a reload is requested."""
    return story.given_serving(policy, workers=workers).and_also(*2 * [ReloadRequested()])


def test_the_last_good_command_accepts_them_and_the_requested_reload_follows(story: Story) -> None:
    actions = failing(story).when(died(2))

    assert opened(actions) == [Open(3, fresh=False)]
    assert Report(ReportKind.RELOAD_FAILED, 2, DIED) in actions
    assert story.fleet.reload_wanted
    assert Report(ReportKind.RECOVERED, 3) in story.when(WorkerReady(3))
    assert opened(story.when(Quiesced(1))) == [Open(4, fresh=True)]
    assert Report(ReportKind.RELOADED, 4) in story.when(WorkerReady(4))
    assert not story.fleet.reload_wanted


@pytest.mark.parametrize("requested", ["before it fails", "while it ends"])
def test_it_is_decided_at_the_end_of_its_last_process(story: Story, requested: str) -> None:
    story.given_serving(ACCEPT, workers=2).and_also(ReloadRequested())
    if requested == "before it fails":
        story.and_also(ReloadRequested())
    story.and_also(died(3, waiting=0))
    if requested == "while it ends":
        story.and_also(ReloadRequested())
    found = [(each.kind, each.generation) for each in waits(story.fleet, Facts({}))]
    assert found == [("room", 2), ("earlier-reload", None)]

    assert opened(story.when(died(4))) == [Open(3, fresh=False)]


def test_so_it_is_where_what_its_workers_had_started_ends_last(story: Story) -> None:
    failing(story).and_also(died(2, orphans=True))
    assert (story.numbers(Phase.ABANDONED), story.fleet.to_open) == ({2}, None)

    assert opened(story.when(WorkerExited(2, "orphans gone", waiting=2))) == [Open(3, fresh=False)]


def test_a_release_that_is_rolled_back_leaves_clients_as_well(story: Story) -> None:
    failing(story, replace(ACCEPT, settle_s=5.0), workers=2).and_also(*map(WorkerReady, (3, 4)))
    story.and_also(died(3))
    assert (story.draining, story.fleet.to_open) == ({2}, None)

    assert opened(story.when(died(4))) == [Open(3, fresh=False)]


@pytest.mark.parametrize("event", [died(2, waiting=0), died(2)], ids=["none waits", "not theirs"])
def test_otherwise_the_requested_reload_begins_at_once(story: Story, event: Event) -> None:
    """Where workers do not accept, what waits is not in the place of the next generation."""
    failing(story, ACCEPT if event == died(2, waiting=0) else Policy())

    assert opened(story.when(event)) == [Open(3, fresh=True)]


def test_one_that_fails_as_well_is_no_verdict_and_is_not_repeated_at_once(story: Story) -> None:
    """The requested reload accepts them then; its verdict is the one that was promised."""
    failing(story).and_also(died(2))

    actions = story.when(died(3))

    assert Report(ReportKind.RETRYING, 3, DIED) in actions
    assert not any(
        isinstance(each, Report) and each.news is ReportKind.RELOAD_FAILED for each in actions
    )
    assert opened(actions) == [Open(4, fresh=True)]


def test_no_other_generation_is_started_for_them(story: Story) -> None:
    failing(story).and_also(died(2))

    assert story.when(Stranded()) == []


def test_one_generation_is_opened_for_them_though_their_socket_is_found_lost_first(
    story: Story,
) -> None:
    """Where the path leads back to a lost socket, and where the release that settled is gone."""
    story.given_serving(replace(ACCEPT, settle_s=5.0)).and_also(ReloadRequested(), WorkerReady(2))

    actions = [*story.when(died(2)), *story.when(Stranded()), *story.when(Stranded())]

    assert opened(actions) == [Open(3, fresh=False)]


def test_those_that_are_found_later_come_first_as_well(story: Story) -> None:
    """At the end of another process, as long as the failed release is there."""
    failing(story, workers=2).and_also(died(3, waiting=0), Stranded(), ReloadRequested())

    assert opened(story.when(died(4, waiting=0))) == [Open(3, fresh=False)]


def test_a_dry_run_waits_only_to_be_opened(story: Story) -> None:
    story.given_serving(ACCEPT)
    story.fleet = replace(story.fleet, configured=True)
    story.and_also(ReloadRequested(), SettingsRead(ACCEPT)).when_over(TimerKind.START, 2)

    story.and_also(DryRunRequested(), SettingsRead(ACCEPT))

    assert story.fleet.to_open is Next.FRESH
    assert opened(story.when(died(2, waiting=0))) == [Open(3, fresh=True, dry_run=True)]


def test_a_stop_waits_for_one_that_starts_for_them_and_calls_the_reload_off(story: Story) -> None:
    failing(story).and_also(died(2))

    assert failed(story.when(StopRequested())) == []
    assert (story.starting, story.fleet.stopping) == ({3}, None)

    actions = story.when(WorkerReady(3))
    assert failed(actions) == [4]
    assert actions.index(RouteTo(3)) < actions.index(CloseListeners(quick=False))
    assert not story.fleet.reload_wanted


def held(story: Story, policy: Policy = ACCEPT, *events: Event, workers: int = 1) -> Story:
    """Generation 1 serves, and a hold begins."""
    return story.given_serving(policy, workers=workers).and_also(*events, HoldRequested(60.0))


def stop_while_clients_wait(story: Story) -> list[Action]:
    """Request a stop; the end of the hold shows that clients wait."""
    actions = story.when_at_once(StopRequested())
    assert Hold(False) in actions
    assert Report(ReportKind.STOPPING) in actions
    return actions + story.when(HeldClientsWait())


def test_a_stop_during_a_hold_waits_until_workers_can_accept_its_clients(story: Story) -> None:
    actions = stop_while_clients_wait(held(story))

    assert opened(actions) == [Open(2, fresh=False)]
    assert StartTimer(Deadline(TimerKind.STOP), ACCEPT.stop_timeout_s) in actions
    assert story.fleet.stopping is None
    assert {each.kind for each in waits(story.fleet, Facts({}))} == {"start", "stop"}
    assert (story.when(ReloadRequested())[0], story.fleet.reload_wanted) == (
        Report(ReportKind.REFUSED, reason="cannot reload: a stop is in progress"),
        False,
    )

    actions = story.when(WorkerReady(2))

    assert actions[:2] == [CancelTimer(Deadline(TimerKind.START, 2)), RouteTo(2)]
    assert CloseListeners(quick=False) in actions
    assert Deadline(TimerKind.STOP) in story.fleet.timers
    assert Report(ReportKind.STOPPING) not in actions  # it was reported


def test_a_stop_during_a_hold_at_which_no_client_waits_goes_on_at_once(story: Story) -> None:
    actions = held(story).when(StopRequested())

    assert actions.index(Hold(False)) < actions.index(CloseListeners(quick=False))
    assert opened(actions) == []


def test_a_stop_during_a_hold_waits_for_none_where_workers_do_not_accept(story: Story) -> None:
    assert CloseListeners(quick=False) in held(story, Policy()).when_at_once(StopRequested())


def test_a_second_stop_leaves_the_clients_of_a_hold(story: Story) -> None:
    stop_while_clients_wait(held(story))

    assert CloseListeners(quick=True) in story.when(StopRequested())
    assert story.fleet.stopping is Stop.QUICK


def test_a_stop_waits_for_the_clients_of_a_hold_up_to_its_own_limit(story: Story) -> None:
    stop_while_clients_wait(held(story))

    assert CloseListeners(quick=True) in story.when_over(TimerKind.STOP)


def test_a_stop_goes_on_as_soon_as_the_loop_has_turned(story: Story) -> None:
    stop_while_clients_wait(held(story))

    actions = story.when_at_once(WorkerReady(2))

    assert StartTimer(TURN, 0.0) in actions
    assert CloseListeners(quick=False) in story.when_at_once(DeadlinePassed(TURN))


def test_a_stop_goes_on_if_the_workers_for_the_clients_of_a_hold_fail(story: Story) -> None:
    stop_while_clients_wait(held(story))

    actions = story.when(died(2))

    assert failed(actions) == [2]
    assert CloseListeners(quick=False) in actions


def test_a_stop_tries_again_after_a_pause_while_clients_of_a_hold_wait(story: Story) -> None:
    stop_while_clients_wait(held(story))

    for number, pause_s in enumerate((0.0, 0.0, 0.1, 0.2, 0.4), 2):
        assert failed(story.when_at_once(died(number, waiting=0))) == [number]
        actions = story.when(HeldClientsWait())
        assert (StartTimer(Deadline(TimerKind.OPEN), pause_s) in actions) == bool(pause_s)
        if pause_s:
            assert story.when(Stranded()) == []  # those clients are not served sooner for it
            actions += story.when_over(TimerKind.OPEN)
        assert opened(actions) == [Open(number + 1, fresh=False)]
        assert story.fleet.stopping is None

    assert CloseListeners(quick=False) in story.when(WorkerReady(7))


def test_clients_of_a_hold_do_not_wait_for_failures_of_the_first_start(story: Story) -> None:
    story.given(replace(ACCEPT, start_tries=9)).and_also(Launched())
    story.and_also(*(died(number, waiting=0) for number in range(1, 6)), WorkerReady(6))

    actions = stop_while_clients_wait(story.and_also(HoldRequested(60.0)))

    assert opened(actions) == [Open(7, fresh=False)]


def test_a_stop_awaits_the_end_of_workers_that_failed_for_the_clients_of_a_hold(
    story: Story,
) -> None:
    """Until then it is unknown whether these clients need other workers."""
    stop_while_clients_wait(held(story, workers=2))
    story.when_at_once(died(3, waiting=0))

    assert CloseListeners(quick=False) not in story.when(ReloadRequested())
    assert story.fleet.stopping is None
    assert CloseListeners(quick=False) in story.when(died(4, waiting=0))


def test_a_stop_calls_a_release_off_before_the_clients_of_a_hold_are_served(story: Story) -> None:
    held(story, ACCEPT, ReloadRequested())

    actions = stop_while_clients_wait(story)

    assert Report(ReportKind.RELOAD_FAILED, 2, CALLED_OFF) in actions
    assert (opened(actions), story.fleet.stopping) == ([], None)
    assert opened(story.when(died(2, waiting=0))) == [Open(3, fresh=False)]
    assert CloseListeners(quick=False) in story.when(WorkerReady(3))


def test_a_release_that_settles_serves_before_a_stop_accepts_the_clients_of_a_hold(
    story: Story,
) -> None:
    held(story, replace(ACCEPT, settle_s=5.0), ReloadRequested(), WorkerReady(2))

    actions = stop_while_clients_wait(story)

    assert Report(ReportKind.RELOADED, 2, SETTLED_BY_STOP) in actions
    assert opened(story.when(Quiesced(1))) == [Open(3, fresh=False)]
    actions = story.when(WorkerReady(3))  # it need not settle
    assert Report(ReportKind.RECOVERED, 3, SETTLED_BY_STOP) in actions
    assert CloseListeners(quick=False) in actions


def test_clients_of_a_hold_that_another_generation_must_accept_get_one_more(story: Story) -> None:
    """While the first one started, its socket was not theirs."""
    stop_while_clients_wait(held(story))
    story.when_at_once(WorkerReady(2))

    story.and_also(HeldClientsWait())

    assert (story.fleet.to_open, story.fleet.stopping) == (Next.LAST_GOOD, None)
    assert opened(story.when(Quiesced(1))) == [Open(3, fresh=False)]


def test_a_lame_duck_serves_the_clients_of_a_hold_and_its_stop_waits_for_them(
    story: Story,
) -> None:
    held(story, replace(ACCEPT, lame_duck_s=5.0)).and_also(StopRequested(), Stranded())
    assert story.starting == {2}

    assert CloseListeners(quick=False) not in story.when_over(TimerKind.LAME_DUCK)
    assert CloseListeners(quick=False) in story.when(WorkerReady(2))


def test_a_stop_beside_a_failed_release_calls_the_reload_off(story: Story) -> None:
    failing(story).when_over(TimerKind.START, 2)
    assert story.fleet.reload_wanted

    actions = story.when(StopRequested())

    assert not story.fleet.reload_wanted
    assert any(isinstance(each, Report) and each.generation == 3 for each in actions)
    assert opened(story.when(died(2))) == []


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.SETTLING])
def test_clients_of_a_hold_are_served_before_a_reload_that_keeps_their_socket(
    story: Story, phase: Phase
) -> None:
    """It begins again after them, and only then has a verdict."""
    story.given_serving(replace(ACCEPT, settle_s=60.0)).and_also(ReloadRequested())
    if phase is Phase.SETTLING:
        story.and_also(WorkerReady(2))

    actions = story.when(HeldClientsWait())

    assert (RouteTo(1) in actions) == (phase is Phase.SETTLING)
    assert [each.news for each in actions if isinstance(each, Report)] == [
        ReportKind.RETRYING,
        ReportKind.RELOADING,
    ]
    assert story.when(HeldClientsWait()) == []
    actions = story.when(died(2, waiting=0))
    assert opened(actions) == [Open(3, fresh=False)]
    assert story.fleet.reload_wanted
    story.and_also(WorkerReady(3)).when_over(TimerKind.SETTLE, 3)
    assert opened(story.when(Quiesced(1))) == [Open(4, fresh=True)]


def test_clients_of_a_hold_come_before_a_dry_run(story: Story) -> None:
    story.given_serving(ACCEPT).and_also(DryRunRequested())

    actions = story.when(HeldClientsWait())

    assert Report(ReportKind.DRY_RUN_FAILED, 2, HELD_FIRST) in actions
    assert opened(story.when(died(2, waiting=0))) == [Open(3, fresh=False)]
    assert not story.fleet.reload_wanted


@pytest.mark.parametrize(
    "events",
    [(), (StopRequested(),), (Stranded(),)],
    ids=["no reload", "a stop", "a start for other clients"],
)
def test_clients_of_a_hold_call_off_nothing_else(story: Story, events: tuple[Event, ...]) -> None:
    """Their socket is free once one that drains has left it, or theirs is the next start."""
    story.given_serving(ACCEPT).and_also(*events)

    assert story.when(HeldClientsWait()) == []


def test_for_clients_of_a_hold_one_that_settles_after_a_rescue_serves_for_good(
    story: Story,
) -> None:
    story.given_serving(replace(ACCEPT, settle_s=60.0)).and_also(Stranded(), WorkerReady(2))

    assert Report(ReportKind.RECOVERED, 2, SETTLED_BY_HOLD) in story.when(HeldClientsWait())
    assert opened(story.when(Quiesced(1))) == [Open(3, fresh=False)]


def test_clients_that_wait_come_before_a_release_whose_configuration_is_read(story: Story) -> None:
    """Those of a hold, say, that ends meanwhile: the release would get them before it is ready."""
    story.given_serving(ACCEPT)
    story.fleet = replace(story.fleet, configured=True)
    story.and_also(ReloadRequested())
    assert story.fleet.reading

    actions = story.when(Stranded())

    assert opened(actions) == [Open(3, fresh=False)]
    assert Report(ReportKind.RETRYING, 2, STRANDED_FIRST) in actions
    assert ForgetSettings() in actions
    assert opened(story.when(SettingsRead(ACCEPT))) == []  # it had been on its way
    assert ReadSettings() in story.when(WorkerReady(2))
    assert opened(story.and_also(SettingsRead(ACCEPT)).when(Quiesced(1))) == [Open(4, fresh=True)]


def test_and_before_a_dry_run_whose_configuration_is_read(story: Story) -> None:
    story.given_serving(ACCEPT)
    story.fleet = replace(story.fleet, configured=True)
    story.and_also(DryRunRequested())

    actions = story.when(Stranded())

    assert Report(ReportKind.DRY_RUN_FAILED, 2, STRANDED_FIRST) in actions
    assert [each.fresh for each in opened(actions)] == [False]
    assert not story.fleet.reload_wanted


@pytest.mark.parametrize("waiting", [0, 1])
def test_what_a_replaced_generation_has_left_comes_before_the_next_release(
    story: Story, waiting: int
) -> None:
    """It was killed, or too busy to accept them within its time."""
    story.given_serving(ACCEPT).and_also(ReloadRequested(), WorkerReady(2), ReloadRequested())
    assert story.fleet.to_open is Next.FRESH

    actions = story.when(died(1, waiting=waiting))

    assert opened(actions) == [Open(3 + waiting, fresh=not waiting)]
    assert (Report(ReportKind.RETRYING, 3, STRANDED_FIRST) in actions) == bool(waiting)
    assert story.fleet.reload_wanted == bool(waiting)


@pytest.mark.parametrize("event", [HeldClientsWait(), Stranded()])
def test_a_reload_that_is_called_off_for_them_keeps_its_canary(story: Story, event: Event) -> None:
    share = Canary(500, 60.0)
    story.given_serving(ACCEPT)
    story.fleet = replace(story.fleet, configured=event == Stranded())
    story.and_also(ReloadRequested(share))

    story.when(event)

    assert story.fleet.canary_wanted == share


def test_clients_of_a_hold_call_off_no_first_start_and_no_stop(story: Story) -> None:
    story.given(ACCEPT).and_also(Launched())
    assert story.when(HeldClientsWait()) == []

    story.and_also(WorkerReady(1), ReloadRequested(), StopRequested())
    assert story.when(HeldClientsWait()) == []


def test_a_release_that_has_been_opened_is_not_called_off_for_others(story: Story) -> None:
    story.given_serving(ACCEPT)
    story.fleet = replace(story.fleet, configured=True)
    story.and_also(ReloadRequested(), SettingsRead(ACCEPT))

    assert story.when(Stranded()) == []
    assert story.starting == {2}


def test_where_no_generation_serves_a_release_is_not_called_off(story: Story) -> None:
    story.given_serving(replace(ACCEPT, stop_first=True)).and_also(ReloadRequested())

    assert story.when(Stranded()) == []
    assert story.fleet.to_open is Next.FRESH


def test_a_reload_beside_a_failed_generation_begins_where_no_generation_serves(
    story: Story,
) -> None:
    story.given_serving(ACCEPT, workers=2)
    story.and_also(ReloadRequested(), ChannelBroken(1), died(3, waiting=0))

    assert Report(ReportKind.RELOADING) in story.when(ReloadRequested())


def test_a_canary_that_is_queued_behind_what_they_call_off_stays(story: Story) -> None:
    share = Canary(500, 60.0)
    story.given_serving(ACCEPT).and_also(ReloadRequested(), ReloadRequested(share))

    story.when(HeldClientsWait())

    assert story.fleet.canary_wanted == share


def test_two_reloads_that_a_rescue_and_a_stop_end_have_a_verdict_of_their_number(
    story: Story,
) -> None:
    """The rescue makes one reload of both: it has the number that was promised last."""
    story.given_serving(ACCEPT).and_also(ReloadRequested(), WorkerReady(2))
    numbers = []
    for _ in range(2):
        numbers.append(story.fleet.next_reload)
        story.and_also(ReloadRequested())
    assert numbers == [3, 4]
    story.and_also(Stranded())

    actions = story.when(StopRequested())

    assert failures(actions) == [4]


def test_a_reload_during_a_first_start_that_a_stop_ends_has_a_verdict_of_its_number(
    story: Story,
) -> None:
    story.given(Policy(start_tries=3), workers=2).and_also(Launched(), WorkerExited(1, "it died"))
    number = story.fleet.next_reload
    story.and_also(ReloadRequested())

    actions = story.when(StopRequested(quick=True))

    assert failures(actions) == [number] == [2]


def failures(actions: list[Action]) -> list[int]:
    """The numbers of the reloads that are reported as failed."""
    reports = [each for each in actions if isinstance(each, Report)]
    return [each.generation for each in reports if each.news is ReportKind.RELOAD_FAILED]
