"""Each invariant of ARCHITECTURE.md, in each state that decide() reaches."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from enum import Enum
from itertools import count
from pathlib import Path

import pytest

from socketprotector.core import failure, workers
from socketprotector.core.actions import (
    Drain,
    Quiesce,
    Report,
    ReportKind,
    RouteTo,
    Signal,
    StartTimer,
    WorkerSignal,
)
from socketprotector.core.decide import decide
from socketprotector.core.events import (
    ChannelBroken,
    Deadline,
    DeadlinePassed,
    Launched,
    OpenFailed,
    ReplaceRequested,
    TimerKind,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import LameDuck, Phase, Policy, Stop
from socketprotector.core.step import Step
from socketprotector.model.lazy_dataclass import replace
from tests.rounds import rounds
from tests.unit.core.states import Bounds, Check, Found, StateWorld, Taken, explore
from tests.unit.core.world import TURN

ARCHITECTURE = Path(__file__).parents[3] / "ARCHITECTURE.md"


# -- the invariants ---------------------------------------------------------------


def a_failed_reload_changes_nothing(taken: Taken) -> None:
    serving = taken.before.of(Phase.SERVING)
    news = [each.news for each in taken.actions if isinstance(each, Report)]
    if ReportKind.RELOAD_FAILED not in news or serving is None or taken.after.stop_requested:
        return
    assert taken.after.of(Phase.SERVING) is not None, "invariant 2: nothing serves any more"
    assert taken.after[serving.number].phase is Phase.SERVING, "invariant 2: another one serves"
    ended = {each.worker for each in taken.actions if isinstance(each, Signal)}
    staying = {each.number for each in serving.staying if not each.hung}
    assert not ended & staying, "invariant 2: workers that serve were ended"


def one_generation_gets_new_connections(taken: Taken) -> None:
    """The route is changed before a drain, and lost only if no generation is left."""
    before, after = taken.before, taken.after
    route = {each.number for each in (before.route, before.sharing) if each}
    for action in taken.actions:
        if isinstance(action, RouteTo):
            route = {each for each in (action.generation, action.sharing) if each}
        elif isinstance(action, Drain | Quiesce):
            assert action.generation not in route, "invariant 3: drained before the route"
    if before.route and not after.route and not after.stopping:
        # A generation that serves alone, and settles, may fail by a stuck worker.
        broken = isinstance(taken.event, ChannelBroken | WorkerExited | ReplaceRequested)
        stop_first = before.policy.stop_first or before.policy_of(fresh=True).stop_first
        stop_first = stop_first or after.policy_of(fresh=True).stop_first
        assert broken or stop_first, "invariant 3: no generation gets new connections"


def a_process_is_gone_after_its_exit(taken: Taken) -> None:
    event = taken.event
    gone = {each.number for each in taken.before.alive()}
    gone -= {each.number for each in taken.after.alive()}
    exited = {event.worker} if isinstance(event, WorkerExited) else set()
    if isinstance(event, OpenFailed) and (failed := taken.before.generation(event.generation)):
        exited = {each.number for each in failed.workers}  # no process of it was started
    assert gone <= exited, "invariant 4: a worker is forgotten that has not exited"


def each_wait_has_a_deadline(taken: Taken) -> None:
    world, fleet = taken.world, taken.after
    try:
        for generation in fleet.generations:
            world.check_generation(generation)
            for worker in generation.workers:
                world.check_worker(generation, worker)
        if fleet.served and not fleet.stopping:
            world.check_one_serves_or_will()
    except AssertionError as error:
        raise AssertionError(f"invariant 5: {error}") from error
    if fleet.stopping is Stop.GRACEFUL and not fleet.exiting:
        assert world.runs(TimerKind.STOP), "invariant 5: a stop has no end"
    assert fleet.held == world.runs(TimerKind.HOLD), "invariant 5: a hold has no end"


def decisions_are_values(taken: Taken) -> None:
    """The same fleet and event lead to the same decision, which has names and numbers only."""
    again = decide(taken.before, taken.event)
    assert again == (taken.after, taken.actions), "invariant 6: decide() knows something else"
    for action in taken.actions:
        for value in vars(action).values():
            plain = value is None or isinstance(value, int | float | str | Enum | Deadline)
            assert plain, f"invariant 6: {action} holds more than names and numbers"


def an_idle_fleet_sleeps(taken: Taken) -> None:
    if taken.event == DeadlinePassed(TURN) or TURN not in taken.before.timers:
        work = [each for each in taken.actions if each != StartTimer(TURN, 0.0)]
        assert work or TURN not in taken.after.timers, "invariant 8: it turns without work"
    fleet = taken.after
    rests = not (fleet.is_changing or fleet.held or fleet.stopping) and all(
        each.phase is Phase.SERVING and each.ready and len(each.workers) == fleet.workers_wanted
        for each in fleet.generations
    )
    if rests and fleet.served and fleet.lame_duck is not LameDuck.STOPPING:
        signalled = {each for each in fleet.timers if each.wait is TimerKind.WORKER_KILL}
        timers = fleet.timers - signalled - {TURN}
        assert not timers, f"invariant 8: an idle fleet has {timers}"


#: Of ARCHITECTURE.md, by number.
INVARIANTS: dict[int, Check] = {
    2: a_failed_reload_changes_nothing,
    3: one_generation_gets_new_connections,
    4: a_process_is_gone_after_its_exit,
    5: each_wait_has_a_deadline,
    6: decisions_are_values,
    8: an_idle_fleet_sleeps,
}
#: The invariants of deliveries and system calls, of which decide() knows nothing; their tests.
OTHERS = {
    1: "tests/boundary/test_forwarder.py",
    7: "tests/boundary/test_faults.py",
    9: "tests/scenarios/test_no_call_blocks.py",
}


def test_each_invariant_is_checked() -> None:
    text = ARCHITECTURE.read_text().partition("## Invariants")[2].partition("\n## ")[0]

    assert sorted({*INVARIANTS, *OTHERS}) == [int(n) for n in re.findall(r"(?m)^(\d+)\. ", text)]
    assert all((ARCHITECTURE.parent / test).exists() for test in OTHERS.values())


# -- the states --------------------------------------------------------------------

CHECKS = tuple(INVARIANTS.values())
POLICIES = {
    "plain": Policy(),
    "settle": Policy(settle_s=5.0, drain_timeout_s=9.0, max_draining=1),
    "stop-first": Policy(stop_first=True),
    "workers-accept": Policy(workers_accept=True),
    "lame-duck": Policy(lame_duck_s=4.0, workers_accept=True),
    "rolling": Policy(surge=1, drain_timeout_s=9.0),
}
#: How many events after the first start are tried, with 3 generations and 2 workers.
DEPTH = rounds(2, 4)
#: The same for the events of reloads, exits, timers and stops alone.
MAIN_DEPTH = rounds(6, 13)


def serving(policy: Policy) -> StateWorld:
    """Generation 1 serves with two workers."""
    world = StateWorld(policy, 2)
    for event in (Launched(), DeadlinePassed(TURN), WorkerReady(1), WorkerReady(2, retires=True)):
        world.take(event)
    return world


def show(found: Found, since_s: float) -> None:
    print(f"{found}, {time.process_time() - since_s:.0f} s of CPU")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_the_invariants_hold_whatever_happens(policy: Policy) -> None:
    begun_s = time.process_time()

    found = explore(serving(policy), StateWorld.all_events, Bounds(), DEPTH, CHECKS)

    show(found, begun_s)
    assert found.depth == DEPTH
    assert found.states > rounds(100, 10_000)


@pytest.mark.costly
@pytest.mark.timeout(1800)
def test_the_invariants_hold_after_long_orders_of_reloads_exits_and_stops() -> None:
    begun_s = time.process_time()
    bounds = Bounds(orphans=0)

    found = explore(StateWorld(Policy(), 2), StateWorld.main_events, bounds, MAIN_DEPTH, CHECKS)

    show(found, begun_s)
    assert found.depth == MAIN_DEPTH


@pytest.mark.timeout(1800)
@pytest.mark.costly
def test_the_invariants_hold_in_each_state_of_two_generations_of_a_worker() -> None:
    """No event leads to another state: the orders of any length."""
    begun_s = time.process_time()
    bounds = Bounds(generations=2, workers=1, alive=2, orphans=0)

    found = explore(StateWorld(Policy(), 1), StateWorld.main_events, bounds, 200, CHECKS)

    show(found, begun_s)
    assert found.complete


# -- mutants of decide(): each violates an invariant -----------------------------------

Patch = pytest.MonkeyPatch


def ends_the_serving_generation(patch: Patch) -> None:
    """A release that fails takes the serving generation with it."""
    real = Step.abandon

    def abandon(step: Step, number: int) -> None:
        real(step, number)
        if serving := step.fleet.of(Phase.SERVING):
            step.do(*(Signal(each.number, WorkerSignal.TERM) for each in serving.workers))

    patch.setattr(Step, "abandon", abandon)


def routes_last(patch: Patch) -> None:
    """The old generation drains before the new one gets the clients."""
    real = Step.promote

    def promote(step: Step, number: int, reason: str = "") -> None:
        real(step, number, reason)
        step.actions.sort(key=lambda each: isinstance(each, RouteTo))

    patch.setattr(Step, "promote", promote)


def forgets_killed_workers(patch: Patch) -> None:
    """KILL counts as an exit."""
    real = Step.kill_generation

    def kill_generation(step: Step, number: int) -> None:
        real(step, number)
        step.fleet = step.fleet.with_generation(replace(step.fleet[number], workers=()))

    patch.setattr(Step, "kill_generation", kill_generation)


def starts_without_a_limit(patch: Patch) -> None:
    """A generation may start for ever."""
    real = Step.start

    def start(step: Step, wait: TimerKind, target: int, seconds: float) -> None:
        if wait is not TimerKind.START:
            real(step, wait, target, seconds)

    patch.setattr(Step, "start", start)
    patch.setattr(Step, "start_or_extend", start)


def counts_by_itself(patch: Patch) -> None:
    """The time of a back-off depends on more than the fleet."""
    times = count(1.0)
    patch.setattr(failure, "backoff_s", lambda _: next(times))


def turns_for_ever(patch: Patch) -> None:
    """A turn of the loop starts another one, without work."""
    real = workers.reconcile

    def reconcile(step: Step) -> None:
        real(step)
        if step.fleet.served and not step.fleet.stopping:
            step.start(TimerKind.TURN, 0, 0.0)

    patch.setattr(workers, "reconcile", reconcile)


@pytest.mark.parametrize(
    ("invariant", "mutant"),
    [
        (2, ends_the_serving_generation),
        (3, routes_last),
        (4, forgets_killed_workers),
        (5, starts_without_a_limit),
        (6, counts_by_itself),
        (8, turns_for_ever),
    ],
)
def test_a_mutant_violates_its_invariant(
    invariant: int, mutant: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    mutant(monkeypatch)

    with pytest.raises(AssertionError, match=f"^invariant {invariant}:"):
        explore(
            StateWorld(Policy(), 1), StateWorld.main_events, Bounds(), 9, (INVARIANTS[invariant],)
        )
