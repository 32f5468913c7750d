"""Every order of events: random ones, and all short ones, in a model of the world.

What must hold after each event is in world.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from socketprotector.core.events import (
    BacklogEmptied,
    ChannelBroken,
    DeadlinePassed,
    DryRunRequested,
    Event,
    Launched,
    Quiesced,
    ReloadRequested,
    ReplaceRequested,
    ScaleRequested,
    SettingsRead,
    StopRequested,
    TimerKind,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import Phase, Policy
from tests.rounds import rounds
from tests.unit.core.world import DIED, POLICIES, ROUNDS, TURN, World

#: All orders of so many events after the first READY are tried.
DEPTH = rounds(3, 6)
#: Without a size of its own a list has five elements on average: too few to get anywhere.
choices = st.integers(0, 60).flatmap(
    lambda size: st.lists(st.integers(0, 2**20), min_size=size, max_size=size)
)
worlds = st.builds(World, st.sampled_from(POLICIES), st.integers(1, 3), st.booleans())


def live_through(world: World, orders: list[int]) -> None:
    for choice in orders:
        world.opens_fail = choice % 11 == 0
        event = world.pick(choice)
        note(f"{event!r}{' (opening fails)' if world.opens_fail else ''}")
        world.take(event)


@settings(max_examples=rounds(50, 2000), deadline=None)
@given(worlds, choices)
def test_the_promises_hold_after_every_event_in_any_order(world: World, orders: list[int]) -> None:
    live_through(world, [0, *orders])


@settings(max_examples=rounds(25, 1000), deadline=None)
@given(worlds, choices)
def test_a_quick_stop_ends_whatever_came_before_it(world: World, orders: list[int]) -> None:
    live_through(world, orders)

    world.take(StopRequested(quick=True))
    for _ in range(ROUNDS):
        world.let_time_pass()

    assert world.exited


@settings(max_examples=rounds(25, 1000), deadline=None)
@given(worlds, choices)
def test_a_graceful_stop_ends_whatever_came_before_it(world: World, orders: list[int]) -> None:
    live_through(world, orders)

    world.take(StopRequested())
    for _ in range(ROUNDS):
        world.let_time_pass()

    assert world.exited


@settings(max_examples=rounds(25, 1000), deadline=None)
@given(worlds, choices)
def test_when_all_goes_well_again_one_generation_serves_with_all_its_workers(
    world: World, orders: list[int]
) -> None:
    live_through(world, orders)

    world.take(Launched())
    for _ in range(ROUNDS):
        world.let_time_pass(all_goes_well=True)

    if world.fleet.stopping is None:
        [serving] = world.fleet.generations
        assert serving.phase is Phase.SERVING
        assert serving.ready
        assert len(serving.workers) == world.fleet.workers_wanted
        assert not world.timers


def take_all(world: World, *happened: Event) -> None:
    """Take these, and let the loop turn after each."""
    for event in happened:
        world.take(event)
        while world.runs(TimerKind.TURN):
            world.take(DeadlinePassed(TURN))


def test_a_worker_starts_without_waiting_for_room_in_a_dry_run_with_a_bound() -> None:
    """A random order that was seen once."""
    world = World(Policy(), 2, configured=True)
    take_all(
        world,
        Launched(),
        WorkerReady(1),
        WorkerReady(2),
        ReloadRequested(),
        SettingsRead(Policy(), 3),
    )
    world.take(WorkerExited(1, DIED, orphans=True))
    world.take(WorkerExited(4, DIED, orphans=True))
    take_all(
        world,
        DryRunRequested(),
        SettingsRead(Policy(surge=1, drain_timeout_s=9.0), 3),
        WorkerExited(6, DIED),
    )
    assert all(worker.alive for worker in world.fleet[1].workers)


@pytest.mark.parametrize("quiesces", [True, False])
def test_what_left_without_a_limit_gets_that_of_a_reload_with_its_generation(
    quiesces: bool,
) -> None:
    """A random order that was seen once."""
    policy = Policy(workers_accept=quiesces)
    world = World(policy, configured=True)
    take_all(
        world,
        Launched(),
        WorkerReady(1),
        WorkerExited(1, DIED, orphans=True),
        ReloadRequested(),
        SettingsRead(replace(policy, drain_timeout_s=9.0), None),
        WorkerReady(3),
    )
    if quiesces:
        assert world.fleet[1].quiescing
        world.take(Quiesced(1))

    assert world.runs(TimerKind.DRAIN, 1)


def test_what_drains_without_a_limit_goes_on_so_after_a_reload_with_one() -> None:
    world = World(Policy(), configured=True)
    limited = Policy(drain_timeout_s=9.0)
    take_all(
        world,
        Launched(),
        WorkerReady(1),
        WorkerExited(1, DIED, orphans=True),
        ReloadRequested(),
        SettingsRead(Policy(), None),
        WorkerReady(3),
        ReloadRequested(),
        SettingsRead(limited, None),
        WorkerReady(4),
    )

    assert world.fleet.policy == limited
    assert not world.runs(TimerKind.DRAIN, 1)
    assert world.runs(TimerKind.DRAIN, 2)


def test_a_dry_run_passes_with_the_scaling_that_leaves_it_as_many_as_are_ready() -> None:
    """A second worker that was wanted meanwhile has not been started yet."""
    world = World(Policy())
    take_all(world, Launched(), WorkerReady(1))
    for event in (DryRunRequested(), ScaleRequested(+1), WorkerReady(2)):
        world.take(event)
    assert world.fleet.dry_run

    world.take(ScaleRequested(-1))

    assert not world.fleet.dry_run
    assert world.fleet.workers_wanted == 1


def test_a_dry_run_passes_and_the_reload_that_waited_for_it_begins() -> None:
    """Which forgets what failed before, as each reload does."""
    world = World(Policy())
    take_all(world, Launched(), WorkerExited(1, DIED), WorkerReady(2))
    assert world.fleet.failed_starts
    take_all(world, DryRunRequested(), ReloadRequested())

    world.take(WorkerReady(3))

    assert not world.fleet.dry_run
    assert world.fleet.is_changing


def next_events(world: World) -> Iterator[Event]:
    """The twelve kinds of events that matter, about the oldest and the newest there is."""
    yield from (ReloadRequested(), StopRequested(), StopRequested(quick=True))
    yield DryRunRequested()
    yield from (ScaleRequested(+1), ScaleRequested(-1), BacklogEmptied())
    yield from world.owed
    processes = [*world.processes]
    for number in {*processes[:1], *processes[-1:]}:
        yield WorkerReady(number)
        yield WorkerExited(number, DIED, waiting=3)
        yield ReplaceRequested(number, "silent", hung=True)
    for generation in {*[*world.channels][:1], *[*world.channels][-1:]}:
        yield ChannelBroken(generation)
        yield Quiesced(generation)
    yield from map(DeadlinePassed, world.timers)


@pytest.mark.parametrize(
    "policy",
    [
        Policy(settle_s=5.0),
        Policy(stop_first=True),
        Policy(workers_accept=True),
        Policy(lame_duck_s=4.0),
    ],
    ids=["settle", "stop-first", "workers accept", "lame duck"],
)
def test_the_promises_hold_in_every_short_order(policy: Policy) -> None:
    beginning = World(policy)
    beginning.take(Launched())
    beginning.take(WorkerReady(1))

    worlds = {beginning.key(): beginning}
    for _ in range(DEPTH):
        after: dict[Hashable, World] = {}
        for world in worlds.values():
            for event in next_events(world):
                successor = world.copy()
                successor.take(event)
                # Orders that lead to the same world go on alike: one of them is enough.
                after.setdefault(successor.key(), successor)
        worlds = after
