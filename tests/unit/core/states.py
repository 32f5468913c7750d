"""Each state that decide() reaches from the first start, within bounds and to a depth.

The code's own decide() makes every step, in the world of world.py.  Two states are the same if
they differ only in numbers whose order is the same, or in counts that change nothing any more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from operator import attrgetter

from socketprotector.core.actions import Action
from socketprotector.core.events import (
    BacklogEmptied,
    ChannelBroken,
    DeadlinePassed,
    Event,
    Launched,
    OpenFailed,
    Quiesced,
    ReloadRequested,
    StopRequested,
    TimerKind,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import Fleet, Generation, State
from socketprotector.model.backoff import FREE_DEATHS
from tests.unit.core.world import DIED, World, check_step

#: Timers whose target is a worker.
OF_WORKERS = frozenset(each for each in TimerKind if each.value.startswith("worker-"))
#: The fields of a fleet that have no numbers of generations or workers.
_OTHERS = attrgetter(
    *("policy", "workers_wanted", "reload_wanted", "lame_duck", "stopping", "to_open"),
    *("configured", "reading", "candidate", "dry_run", "canary_wanted", "rollout", "release"),
    *("served", "listeners_open", "held", "exit_status", "exiting"),
)


@dataclass(frozen=True)
class Bounds:
    """A state with more than this of something is checked, and not continued."""

    generations: int = 3
    workers: int = 2  # wanted
    alive: int = 6  # processes of all generations
    orphans: int = 1

    def allow(self, fleet: Fleet) -> bool:
        """Return whether a state is continued."""
        alive = [*fleet.alive()]
        return (
            len(fleet.generations) <= self.generations
            and fleet.workers_wanted <= self.workers
            and len(alive) <= self.alive
            and sum(each.state is State.ORPHANED for each in alive) <= self.orphans
        )


@dataclass(frozen=True)
class Taken:
    """One step: decide() has answered an event."""

    before: Fleet
    event: Event
    after: Fleet
    actions: tuple[Action, ...]
    world: World  # after the step


#: Raises AssertionError if something does not hold after a step.
Check = Callable[[Taken], None]


@dataclass
class Found:
    """What an exploration has met."""

    states: int = 1
    steps: int = 0
    depth: int = 0
    left_out: int = 0  # states beyond the bounds
    complete: bool = False  # no event leads to another state within the bounds


class StateWorld(World):
    """A world whose state is checked once, whatever number of events lead to it."""

    taken: Taken

    def stepped(self, before: Fleet, event: Event, actions: tuple[Action, ...]) -> None:
        self.taken = Taken(before, event, self.fleet, actions, self)
        check_step(before, event, self.fleet, actions)

    def key(self) -> Hashable:
        """Name the state: numbers by their order, timers by kind, counts as far as they matter."""
        fleet = self.fleet
        numbers = [each.number for each in fleet.generations]
        rank = {number: at for at, number in enumerate(numbers)}
        workers = sorted(worker.number for each in fleet.generations for worker in each.workers)
        place = {number: at for at, number in enumerate([0, *workers])}
        timers = (
            (each.wait, (place if each.wait in OF_WORKERS else rank).get(each.target, -1))
            for each in fleet.timers
        )
        gone = self.killed, self.orphaned, self.lost
        most_starts = max(FREE_DEATHS + 1, fleet.policy.start_tries)
        return (
            tuple(_named(each, place) for each in fleet.generations),
            frozenset(timers),
            fleet.next_generation == 1,
            min(fleet.failed_starts, most_starts),
            _OTHERS(fleet),
            *(frozenset(place[n] for n in s if n in place) for s in gone),
            *(frozenset(rank[n] for n in s if n in rank) for s in (self.unlimited, self.tried)),
            frozenset(bisect_left(numbers, each) for each in self.promised),
            bisect_left(numbers, self.verdict + 1),
            tuple(rank.get(n.generation, -1) for n in self.owed if isinstance(n, OpenFailed)),
            tuple(self.channels[each] for each in numbers),
            (self.listeners, self.reader, self.read, self.opens_fail),
        )

    def all_events(self) -> Iterator[Event]:
        """Yield each event that may come, and late ones."""
        for kind in (self.told, self.ready, self.died, self.waited, self.broke, self.asked):
            yield from kind()
        yield from self.stopped()
        yield from self.late()

    def main_events(self) -> Iterator[Event]:
        """Yield the events of reloads, stops, exits and timers, without operators' other orders."""
        if self.fleet.next_generation == 1:
            yield Launched()
            return
        yield from (ReloadRequested(), StopRequested(), StopRequested(quick=True))
        yield from self.owed
        for worker in self.processes:
            yield WorkerReady(worker, retires=True)
            yield WorkerExited(worker, DIED)
        for number, channel in self.channels.items():
            yield ChannelBroken(number)
            if channel == "quiescing":
                yield Quiesced(number)
        if self.listeners == "closing":
            yield BacklogEmptied()
        yield from map(DeadlinePassed, self.timers)


def _named(generation: Generation, place: dict[int, int]) -> Hashable:
    workers = tuple(
        (
            *(place[each.number], each.slot, each.state, each.retires, each.hung),
            *(place.get(each.replaces), min(each.quick_deaths, FREE_DEATHS)),
        )
        for each in generation.workers
    )
    number = generation
    return (number.phase, number.fresh, number.ending, number.quiescing, number.checked, workers)


#: Yields the events that may come in a world.
Events = Callable[[StateWorld], Iterator[Event]]


def explore(
    first: StateWorld, events: Events, bounds: Bounds, depth: int, checks: tuple[Check, ...] = ()
) -> Found:
    """Let each event happen in each state, and check each step and each state.

    Raises AssertionError, which names the events that lead to a failed check.
    """
    found = Found()
    seen = {hash(first.key())}
    layer: list[tuple[StateWorld, tuple[Event, ...]]] = [(first, ())]
    while layer and found.depth < depth:
        reached = []
        for world, so_far in layer:
            for event in dict.fromkeys(events(world)):
                successor = world.copy()
                found.steps += 1
                try:
                    successor.take(event)
                    for check in checks:
                        check(successor.taken)
                    key = hash(successor.key())
                    if key in seen:
                        continue
                    successor.check()
                except Exception as error:
                    raise AssertionError(f"{error}, after {[*so_far, event]}") from error
                seen.add(key)
                if bounds.allow(successor.fleet):
                    reached.append((successor, (*so_far, event)))
                else:
                    found.left_out += 1
        layer = reached
        found.depth += 1
        found.states = len(seen)
    found.complete = not layer
    return found
