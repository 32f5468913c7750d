"""What is supervised, as values: workers, generations, the fleet (the policy: model/policy.py).

Pure data.  Nothing here knows a clock, process, socket or logger; the supervisor
keeps one Fleet and replaces it by what `decide.decide` answers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from enum import Enum
from operator import attrgetter

from ..model.lazy_dataclass import field, frozen, replace
from ..model.policy import Policy as Policy
from .events import Deadline


class Phase(Enum):
    """The phase of a generation.  A generation that is gone is no longer in the fleet."""

    STARTING = "starting"
    SETTLING = "settling"  # has the route, but the one before it can still be switched back to
    SERVING = "serving"
    DRAINING = "draining"
    ABANDONED = "abandoned"


#: Each way a generation can go, and why.  `Fleet.moved` walks only these, and the
#: diagram in ARCHITECTURE.md is drawn from them.  None: the generation is gone.
PHASES: dict[Phase, dict[Phase | None, str]] = {
    Phase.STARTING: {
        Phase.SERVING: "every worker is ready, or it has answered",
        Phase.SETTLING: "the same, with --settle, or accepted and said nothing",
        Phase.ABANDONED: "a worker exited, was silent too long or broke the channel, a dry run or "
        "a hold was over, or stop",
    },
    Phase.SETTLING: {
        Phase.SERVING: "lived as long as --settle, a hold was over, or stop",
        Phase.DRAINING: "a worker exited, --settle-check failed, a hold was over, or quick stop",
    },
    Phase.SERVING: {Phase.DRAINING: "superseded, channel broken, or stop"},
    Phase.DRAINING: {None: "last worker gone"},
    Phase.ABANDONED: {None: "last worker gone"},
}


class State(Enum):
    """The state of a worker."""

    WAITING = "waiting"  # not spawned yet: a back-off timer runs, or its turn has not come
    STARTING = "starting"
    READY = "ready"
    RETIRING = "retiring"  # was asked to leave; no worker replaces it
    ORPHANED = "orphaned"  # its process has ended, and what that had started has not


#: States of workers that others replace, or have replaced.
LEAVING = (State.RETIRING, State.ORPHANED)


@frozen
class Worker:
    """One slot of a generation and the process in it; `number` is never reused."""

    number: int
    slot: int
    state: State = State.STARTING
    retires: bool = False  # leaves when its RETURN line ends
    quick_deaths: int = 0  # in a row, in this slot
    replaces: int = 0  # the number of the worker that leaves when this one is ready
    hung: bool = False  # it is to leave, and cannot be asked to

    @property
    def alive(self) -> bool:
        return self.state is not State.WAITING


_NUMBER = attrgetter("number")


@frozen
class Generation:
    """All workers started from one version of the command.

    What concerns one of a thousand workers must not look at all of them.  They stand in the order
    of their numbers, so that one is found by halves; the copy of a tuple is no work to speak of.
    """

    number: int
    phase: Phase = Phase.STARTING
    fresh: bool = True  # started from the command as it is now, not from the last good one
    ending: bool = False  # was sent TERM by a deadline or stop; KILL follows
    quiescing: bool = False  # drains, and finishes once it has accepted its clients
    workers: tuple[Worker, ...] = ()
    checked: bool = False  # settles, and is asked whether it does well

    @property
    def alive(self) -> tuple[Worker, ...]:
        return tuple(worker for worker in self.workers if worker.alive)

    @property
    def ready(self) -> bool:
        # From the end: the worker started last is mostly the last one to be ready.
        return all(worker.state is State.READY for worker in reversed(self.workers))

    def worker(self, number: int) -> Worker | None:
        at = bisect_left(self.workers, number, key=_NUMBER)
        found = self.workers[at : at + 1]
        return found[0] if found and found[0].number == number else None

    def replaced(self, number: int, *changed: Worker) -> Generation:
        """Return it with a worker, which it has, changed; or without that one."""
        at = bisect_left(self.workers, number, key=_NUMBER)
        return replace(self, workers=(*self.workers[:at], *changed, *self.workers[at + 1 :]))

    @property
    def takers(self) -> tuple[Worker, ...]:
        """The workers that take, or will take, what waits in the queue."""
        return tuple(w for w in self.alive if w.state not in LEAVING)


class Stop(Enum):
    """How the whole fleet is to end."""

    GRACEFUL = "graceful"
    QUICK = "quick"


class LameDuck(Enum):
    """Whether the lame duck asks balancers to send clients elsewhere; serving continues."""

    OFF = "off"
    ON = "on"  # until that is taken back
    STOPPING = "stopping"  # until its timer starts the graceful stop that was requested


class Next(Enum):
    """Which command the next generation is opened with, once nothing stands in its way."""

    FRESH = "fresh"
    LAST_GOOD = "last good"


@frozen
class Candidate:
    """What the configuration said when it was read again; it has not served yet."""

    policy: Policy
    workers: int | None = None  # None: as many as are wanted anyway


@frozen
class Fleet:
    """Everything the lifecycle knows.  Wishes (what is wanted) stand apart from what is."""

    policy: Policy = field(default_factory=Policy)
    workers_wanted: int = 1
    generations: tuple[Generation, ...] = ()
    next_generation: int = 1
    next_worker: int = 1

    reload_wanted: bool = False
    lame_duck: LameDuck = LameDuck.OFF
    stopping: Stop | None = None
    to_open: Next | None = None  # waits for an older generation's end or a back-off's

    configured: bool = False  # a reload begins with reading the configuration again
    reading: bool = False  # that is being done
    candidate: Candidate | None = None  # what was read, until it serves or has failed
    dry_run: bool = False  # what is read, opened or starting now is only tried, and never serves

    served: bool = False  # something has been ready once
    failed_starts: int = 0  # generations in a row that failed while nothing else served
    listeners_open: bool = True
    held: bool = False  # nothing is accepted, as was requested
    exit_status: int = 0
    exiting: bool = False

    timers: frozenset[Deadline] = frozenset()  # the running timers

    def of(self, phase: Phase) -> Generation | None:
        """The newest generation in a phase, or None."""
        return next((g for g in reversed(self.generations) if g.phase is phase), None)

    def all_of(self, phase: Phase) -> tuple[Generation, ...]:
        return tuple(g for g in self.generations if g.phase is phase)

    @property
    def incoming(self) -> Generation | None:
        """The generation that a reload (or start) in progress is about."""
        return self.of(Phase.STARTING) or self.of(Phase.SETTLING)

    @property
    def route(self) -> Generation | None:
        """The generation that gets new connections."""
        return self.of(Phase.SETTLING) or self.of(Phase.SERVING)

    @property
    def is_opening(self) -> bool:
        """Whether a reload, a dry run or a replacement is under way."""
        return bool(self.incoming or self.to_open or self.candidate or self.reading)

    @property
    def is_changing(self) -> bool:
        """Whether one is, or will be."""
        return self.is_opening or self.reload_wanted

    def policy_of(self, fresh: bool) -> Policy:
        """The policy for opening a generation, fresh or from the last good command."""
        return self.candidate.policy if fresh and self.candidate else self.policy

    def wanted_in(self, generation: Generation) -> int:
        """How many workers a generation is to have."""
        candidate = self.candidate if generation.fresh else None
        return (candidate.workers if candidate else None) or self.workers_wanted

    def generation(self, number: int) -> Generation | None:
        return next((g for g in self.generations if g.number == number), None)

    def __getitem__(self, number: int) -> Generation:
        """Return a generation that is known not to be gone."""
        (found,) = (g for g in self.generations if g.number == number)
        return found

    def find(self, worker: int) -> tuple[Generation, Worker] | None:
        """The generation and entry of a worker by its number."""
        found = ((each, each.worker(worker)) for each in self.generations)
        return next(((generation, entry) for generation, entry in found if entry), None)

    def alive(self) -> Iterator[Worker]:
        for generation in self.generations:
            yield from generation.alive

    @property
    def stop_requested(self) -> bool:
        """It ends, now or after its lame duck: nothing that is requested then is begun."""
        return self.stopping is not None or self.lame_duck is LameDuck.STOPPING

    @property
    def queue_is_last(self) -> bool:
        """What waits in a draining generation's queue can go to no other, now or later.

        Where workers accept nothing does: it would be in the backlog, which is closed by then.
        """
        stops = self.stopping is Stop.GRACEFUL and self.route is None
        return stops and self.policy.queues

    def with_generation(self, changed: Generation) -> Fleet:
        """Replace the generation with the same number."""
        number = changed.number
        generations = tuple(changed if g.number == number else g for g in self.generations)
        return replace(self, generations=generations)

    def with_worker(self, changed: Worker) -> Fleet:
        """Replace the worker in the same generation and slot."""
        found = self.find(changed.number)
        return self.with_generation(found[0].replaced(changed.number, changed)) if found else self

    def moved(self, number: int, phase: Phase) -> Fleet:
        """Move a generation to another phase along PHASES.

        Raises ValueError for a way PHASES does not have: a fault of ours.
        """
        generation = self[number]
        if phase not in PHASES[generation.phase]:
            raise ValueError(f"generation {number} cannot become {phase.value}")
        return self.with_generation(replace(generation, phase=phase))
