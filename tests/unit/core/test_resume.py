"""A protector that is killed between any two actions, and another one that goes on.

The model is the one of test_orders.py.  What a kill takes with it is modelled as the shell has
it: the state was written before the first action of a step, so what is made in that step
(channels, processes) is unknown to the next program; timers are gone with the old one.
"""

from __future__ import annotations

import pickle
from dataclasses import replace

from hypothesis import given, note, settings
from hypothesis import strategies as st

from socketprotector.core.actions import (
    Action,
    CheckSettling,
    CloseListeners,
    Drain,
    Hold,
    Probe,
    Quiesce,
    ReadSettings,
    Report,
    ReportKind,
    Retire,
    RouteTo,
    Signal,
    StartTimer,
    UseSettings,
    WorkerSignal,
)
from socketprotector.core.decide import decide, resume
from socketprotector.core.events import (
    BacklogEmptied,
    Deadline,
    DeadlinePassed,
    Event,
    HoldRequested,
    KillRequested,
    Launched,
    OpenFailed,
    ReloadRequested,
    ReplaceRequested,
    SettingsFailed,
    SettingsRead,
    StopRequested,
    TimerKind,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import Fleet, Phase, Policy, Stop
from tests.rounds import rounds
from tests.unit.conftest import Story
from tests.unit.core.world import POLICIES, ROUNDS, World, check_step, one_at_a_time

__all__ = ["one_at_a_time"]  # pytest uses it

KILLED = "it was starting when the protector was killed"


class KilledWorld(World):
    """A world whose protector can be killed at any action, and is started again."""

    def take_and_die(self, event: Event, at: int) -> None:
        """Tell an event, and kill the protector after so many of the actions that follow."""
        if isinstance(event, WorkerExited):
            self.processes.pop(event.worker, None)
        elif isinstance(event, DeadlinePassed):
            self.timers -= {event.deadline}
        elif isinstance(event, BacklogEmptied) and self.listeners == "closing":
            self.listeners = "closed"
        elif isinstance(event, SettingsRead | SettingsFailed) and self.reader:
            self.reader, self.read = False, isinstance(event, SettingsRead)
        channels, processes = set(self.channels), set(self.processes)
        before = self.fleet
        self.fleet, actions = decide(before, event)  # and written down
        check_step(before, event, self.fleet, actions)
        at %= len(actions) + 1
        for action in actions[:at]:
            self.perform(action)
        if at < len(actions):  # else it was written down what was made
            self.channels = {n: how for n, how in self.channels.items() if n in channels}
            self.processes = {n: p for n, p in self.processes.items() if n in processes}
        self.go_on(actions[at:])

    def go_on(self, undone: tuple[Action, ...] = ()) -> None:
        """Another program adopts what there is."""
        fleet = self.fleet
        self.reader, self.read = False, fleet.candidate is not None  # as the state has it
        if fleet.exiting:
            self.exited = True
            return
        spawned = [worker.number for worker in fleet.alive()]
        self.spawned |= set(spawned)
        self.highest_generation = fleet.next_generation - 1
        self.timers = frozenset()
        self.held = False
        self.probed = self.checked = None
        self.drained = False  # a generation, by this program
        self.owed = ()
        known = {generation.number for generation in fleet.generations}
        self.channels = {
            number: how
            for number, how in self.channels.items()
            if how != "failed" and number in known  # else it is released
        }
        for number in sorted(known - self.channels.keys()):
            self.channels[number] = "failed"
            self.owed += (OpenFailed(number, KILLED),)
        for action in self.resumed(undone):
            self.again(action)
        assert self.fleet.timers == self.timers
        assert self.route == (fleet.route.number if fleet.route else None)
        for owed in self.owed:
            self.take(owed)
        for number in spawned:
            if number not in self.processes:
                self.take(WorkerExited(number, KILLED))
        if not self.exited:
            self.check()

    def resumed(self, undone: tuple[Action, ...]) -> tuple[Action, ...]:
        told = [each for each in undone if isinstance(each, Signal | Retire | Report | UseSettings)]
        return resume(self.fleet, dict.fromkeys(self.fleet.timers, 5.0), told)

    def again(self, action: Action) -> None:
        """Carry out an action that may have been carried out before."""
        match action:
            case RouteTo(number):
                self.route = number
            case Hold(on):
                self.held = on
            case Quiesce(number):
                assert self.channels[number] in ("open", "quiescing")
                self.channels[number] = "quiescing"
            case Drain(number) if self.channels[number] in ("open", "quiescing"):
                self.channels[number] = "drained"
                self.drained = True
            case UseSettings():
                assert not self.drained, "clients of a listener that it removes are to go there"
            case Signal(worker, WorkerSignal.KILL) if worker in self.processes:
                self.killed |= {worker}
            case CloseListeners(quick):
                self.listeners = "closed" if quick else "closing"
            case ReadSettings():
                self.reader = True
            case Probe(number):
                self.probed = number
            case CheckSettling(number):
                self.checked = number
            case StartTimer(deadline):
                self.timers |= {deadline}
            case Report():
                self.perform(action)
            case Drain() | Signal() | Retire():
                pass
            case _:
                raise AssertionError(f"cannot be done twice: {action}")

    def seen(self) -> object:
        channels = dict(self.channels)
        asked = self.probed, self.checked
        return self.route, channels, self.killed, self.listeners, self.timers, asked


choices = st.integers(0, 40).flatmap(
    lambda size: st.lists(
        st.tuples(st.integers(0, 2**20), st.none() | st.integers(0, 9)),
        min_size=size,
        max_size=size,
    )
)
worlds = st.builds(KilledWorld, st.sampled_from(POLICIES), st.integers(1, 3), st.booleans())


def live_through(world: KilledWorld, orders: list[tuple[int, int | None]]) -> None:
    for choice, at in orders:
        if world.exited:
            return
        world.opens_fail = choice % 11 == 0
        event = world.pick(choice)
        if at is not None and choice % 2:  # the orders that matter most, and come up least
            last = [each for each in world.waited() if "KILL" in repr(each)]
            event = last[0] if last else event
        killed = "" if at is None else f", killed after action {at}"
        note(f"{event!r}{' (opening fails)' if world.opens_fail else ''}{killed}")
        if at is None:
            world.take(event)
        else:
            world.take_and_die(event, at)


@settings(max_examples=rounds(30, 1000), deadline=None)
@given(worlds, choices)
def test_the_promises_hold_when_the_protector_is_killed_between_any_two_actions(
    world: KilledWorld, orders: list[tuple[int, int | None]]
) -> None:
    live_through(world, [(0, None), *orders])


@settings(max_examples=rounds(20, 1000), deadline=None)
@given(worlds, choices)
def test_a_stop_ends_everything_however_often_the_protector_is_killed(
    world: KilledWorld, orders: list[tuple[int, int | None]]
) -> None:
    live_through(world, [(0, None), *orders])

    if not world.exited:
        world.take_and_die(StopRequested(), 1)
    for _ in range(ROUNDS):
        if not world.exited:
            world.let_time_pass(all_goes_well=True)

    assert world.exited


@settings(max_examples=rounds(20, 1000), deadline=None)
@given(worlds, choices)
def test_to_resume_twice_is_to_resume_once(
    world: KilledWorld, orders: list[tuple[int, int | None]]
) -> None:
    live_through(world, [(0, None), *orders])
    if world.exited:
        return

    world.go_on()
    if not world.exited:
        once = world.seen()
        for action in world.resumed(()):
            world.again(action)
        assert world.seen() == once


def test_a_kill_that_may_not_have_been_sent_is_sent_by_the_next_program() -> None:
    world = KilledWorld(Policy(), 2)
    world.take(Launched())
    world.take(DeadlinePassed(Deadline(TimerKind.TURN)))
    world.take(StopRequested(quick=True))

    world.take_and_die(DeadlinePassed(Deadline(TimerKind.KILL, 1)), at=0)

    assert world.killed == {1, 2}


def left_of(fleet: Fleet, seconds: float) -> dict[Deadline, float]:
    return dict.fromkeys(fleet.timers, seconds)


def test_what_serves_gets_the_route_and_nothing_else_happens(story: Story) -> None:
    story.given_serving(workers=2)

    assert resume(story.fleet, {}) == (RouteTo(1),)


def test_during_a_reload_the_phase_and_its_deadline_go_on(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested())

    assert resume(story.fleet, left_of(story.fleet, 7.0)) == (
        RouteTo(1),
        StartTimer(Deadline(TimerKind.START, 2), 7.0),
    )


def test_a_draining_generation_is_drained_again_and_its_workers_are_left_alone(
    story: Story,
) -> None:
    story.given(Policy(drain_timeout_s=9.0)).given_serving(Policy(drain_timeout_s=9.0))
    story.and_also(ReloadRequested(), WorkerReady(2))

    assert resume(story.fleet, left_of(story.fleet, 3.0)) == (
        RouteTo(2),
        Drain(1),
        StartTimer(Deadline(TimerKind.DRAIN, 1), 3.0),
    )


def test_a_settling_generation_keeps_the_route(story: Story) -> None:
    story.given_serving(Policy(settle_s=5.0)).and_also(ReloadRequested(), WorkerReady(2))
    assert story.numbers(Phase.SETTLING) == {2}

    assert resume(story.fleet, left_of(story.fleet, 2.0)) == (
        RouteTo(2),
        StartTimer(Deadline(TimerKind.SETTLE, 2), 2.0),
    )


def test_only_a_signal_that_may_not_have_been_sent_is_sent_again(story: Story) -> None:
    story.given_serving()
    actions = story.when(StopRequested(quick=True))
    assert story.fleet.stopping is Stop.QUICK
    told = [each for each in actions if isinstance(each, Signal)]
    assert told == [Signal(1, WorkerSignal.TERM)]

    before, after = resume(story.fleet, {}, told), resume(story.fleet, {})

    assert [each for each in before if each not in after] == told


def test_a_stop_closes_the_listeners_again(story: Story) -> None:
    story.given_serving().and_also(StopRequested())
    assert CloseListeners(quick=False) in resume(story.fleet, {})

    story.and_also(BacklogEmptied())
    assert CloseListeners(quick=True) in resume(story.fleet, {})


def test_a_timer_that_the_state_does_not_have_is_over_at_once(story: Story) -> None:
    story.given_serving().and_also(ReloadRequested())

    assert StartTimer(Deadline(TimerKind.START, 2), 0.0) in resume(story.fleet, {})
    overdue = {Deadline(TimerKind.START, 2): -3.0}
    assert StartTimer(Deadline(TimerKind.START, 2), 0.0) in resume(story.fleet, overdue)


def test_a_hold_and_the_settings_come_before_any_drain(story: Story) -> None:
    """A removed listener's clients go to the old generation, which must not drain before."""
    story.given_serving().and_also(ReloadRequested(), WorkerReady(2), HoldRequested(9.0))
    verdict = Report(ReportKind.RELOADED, 2)

    assert resume(story.fleet, left_of(story.fleet, 7.0), (verdict, UseSettings())) == (
        Hold(True),
        RouteTo(2),
        UseSettings(),
        Drain(1),
        verdict,
        StartTimer(Deadline(TimerKind.HOLD), 7.0),
    )


def test_a_generation_that_accepts_its_last_clients_is_not_drained_yet(story: Story) -> None:
    spreads = Policy(workers_accept=True, drain_spread_s=6.0)
    story.given_serving(spreads).and_also(ReloadRequested(), WorkerReady(2))

    assert resume(story.fleet, {}) == (RouteTo(2), Quiesce(1))


class ReadBack(Story):
    """Another program goes on before each event, after many generations and workers.

    It reads all numbers again, so no two of them are the same object in memory.
    """

    def given_serving(self, policy: Policy | None = None, *, workers: int = 1) -> Story:
        super().given_serving(policy, workers=workers)
        self.fleet = replace(self.fleet, next_generation=1000, next_worker=5000)
        return self

    def when_at_once(self, event: Event) -> list[Action]:
        self.fleet, event = pickle.loads(pickle.dumps((self.fleet, event)))
        return super().when_at_once(event)


def test_the_next_program_knows_a_generation_by_its_number() -> None:
    story = ReadBack().given_serving(Policy(settle_s=5.0))

    story.and_also(ReloadRequested(), WorkerReady(5000))
    assert story.numbers(Phase.SETTLING) == {1000}
    story.when_over(TimerKind.SETTLE, 1000)
    assert (story.serving, story.draining) == ({1000}, {1})

    story.and_also(ReloadRequested())
    assert Signal(5001, WorkerSignal.TERM) in story.when_over(TimerKind.START, 1001)
    assert Signal(5001, WorkerSignal.KILL) in story.when_over(TimerKind.KILL, 1001)


def test_the_next_program_knows_a_worker_by_its_number() -> None:
    story = ReadBack().given_serving().and_also(WorkerExited(1, "exited", served_s=20.0))

    story.and_also(WorkerReady(5000), ReplaceRequested(5000, "too old"))
    assert Signal(5000, WorkerSignal.TERM) in story.when(WorkerReady(5001))
    story.and_also(WorkerExited(5000, "exited", served_s=20.0))

    assert [worker.number for worker in story.fleet[1].workers] == [5001]


def test_the_next_program_kills_the_generation_that_an_operator_names() -> None:
    story = ReadBack().given_serving()
    for number in (5000, 5001):
        story.and_also(ReloadRequested(), WorkerReady(number))
    assert story.draining == {1, 1000}

    assert story.when(KillRequested(1000)) == [Signal(5000, WorkerSignal.KILL)]
