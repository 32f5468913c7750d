"""Workers, generations and the fleet, as values.  Their policy is in model/policy.py.

Pure data: no clock, process, socket or logger.  The supervisor keeps one Fleet, and replaces it
with each result of `decide.decide`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from enum import Enum
from operator import attrgetter

from ..model.lazy_dataclass import field, frozen, replace
from ..model.policy import Policy as Policy
from ..model.share import WHOLE, Canary
from .events import Deadline, TimerKind


class Phase(Enum):
    """The phase of a generation.  A generation that is gone is no longer in the fleet."""

    STARTING = "starting"
    SETTLING = "settling"  # has clients, but a rollback to the previous generation is possible
    SERVING = "serving"
    DRAINING = "draining"
    ABANDONED = "abandoned"


#: Each change of a generation's phase, and its causes.  `Fleet.moved` allows only these, and the
#: diagram in ARCHITECTURE.md is drawn from them.  None: the generation is gone.
PHASES: dict[Phase, dict[Phase | None, str]] = {
    Phase.STARTING: {
        Phase.SERVING: "every worker is ready, or the generation passed its probe",
        Phase.SETTLING: "it is ready while another serves: under --settle, in a rollout, or after "
        "merely accepting a probe (--handoff listener without --ready)",
        Phase.ABANDONED: "it could not be opened, a worker exited, was stuck, was not ready in "
        "time, broke the channel or lacks the required client library, a listening socket was "
        "lost, an operator called it off, a dry run ended, a rescue generation for held clients "
        "must start first, or a stop began",
    },
    Phase.SETTLING: {
        Phase.SERVING: "--settle or its rollout is over, an operator promoted it, a stop began, or "
        "(if clients still wait after a hold) it runs the command of the last generation that "
        "served",
        Phase.DRAINING: "a worker exited, was stuck or broke the channel, --settle-check failed, "
        "its rollout failed (a lost socket, too few clients, or workers that are late, accept "
        "nothing, or lack the client library), an operator called it off, a rescue generation for "
        "held clients must start first, a stop began during its rollout, or a quick stop began",
    },
    Phase.SERVING: {Phase.DRAINING: "replaced, channel broken, or a stop began"},
    Phase.DRAINING: {None: "last worker gone"},
    Phase.ABANDONED: {None: "last worker gone"},
}


class State(Enum):
    """The state of a worker."""

    WAITING = "waiting"  # not spawned yet: a back-off timer runs, or its turn has not come
    STARTING = "starting"
    READY = "ready"
    RETIRING = "retiring"  # finishes its connections and leaves; no worker replaces it
    #: The worker's process has ended, but processes that it started are running.  Or the worker may
    #: still run, but our descriptors of it were lost when the protector was killed.
    ORPHANED = "orphaned"


#: Workers in these states do not count toward the wanted number of workers.  A retiring worker's
#: slot is dropped; an orphan's slot may get another worker.
LEAVING = (State.RETIRING, State.ORPHANED)


@frozen
class Worker:
    """A slot of a generation, and the process in this slot; `number` is never reused."""

    number: int
    slot: int
    state: State = State.STARTING
    retires: bool = False  # on Retire it finishes, while the rest of its generation serves
    quick_deaths: int = 0  # how many workers in a row have died quickly in this slot
    replaces: int = 0  # the number of the worker that leaves when this worker is ready; 0: none
    hung: bool = False  # stuck: it must leave, and does not react to messages

    @property
    def alive(self) -> bool:
        return self.state is not State.WAITING


_NUMBER, _STATE = attrgetter("number"), attrgetter("state")


@frozen
class Generation:
    """Workers that run the same command, and that get clients and drain together.

    A generation may have a thousand workers, and an event about one worker must not visit them all.
    So `workers` is sorted by number, for a binary search.  Copying the tuple costs little.
    """

    number: int
    phase: Phase = Phase.STARTING
    fresh: bool = True  # started from the command as it is now, not from the last good command
    ending: bool = False  # a deadline or a stop sent TERM; KILL follows
    quiescing: bool = False  # draining, but its workers still accept the earlier clients
    workers: tuple[Worker, ...] = ()
    checked: bool = False  # settling, and probed by --settle-check

    @property
    def alive(self) -> tuple[Worker, ...]:
        return tuple(worker for worker in self.workers if worker.alive)

    @property
    def ready(self) -> bool:
        # Start at the end: the newest worker is usually the last to be ready.
        return all(worker.state is State.READY for worker in reversed(self.workers))

    @property
    def ready_workers(self) -> int:
        """How many workers of the generation are ready."""
        return tuple(map(_STATE, self.workers)).count(State.READY)

    def worker(self, number: int) -> Worker | None:
        at = bisect_left(self.workers, number, key=_NUMBER)
        found = self.workers[at : at + 1]
        return found[0] if found and found[0].number == number else None

    def replaced(self, number: int, *changed: Worker) -> Generation:
        """Return the generation with one of its workers changed, or without that worker."""
        at = bisect_left(self.workers, number, key=_NUMBER)
        return replace(self, workers=(*self.workers[:at], *changed, *self.workers[at + 1 :]))

    @property
    def staying(self) -> tuple[Worker, ...]:
        """The workers that are not leaving: they serve new connections, now or soon."""
        return tuple(w for w in self.alive if w.state not in LEAVING)


class Stop(Enum):
    """How the whole fleet ends."""

    GRACEFUL = "graceful"
    QUICK = "quick"


class LameDuck(Enum):
    """Whether balancers are asked to send clients elsewhere; serving continues."""

    OFF = "off"
    ON = "on"  # until an operator switches it off
    STOPPING = "stopping"  # a graceful stop is requested; see Fleet.stop_awaits_rescue, too


class Next(Enum):
    """The command of the next generation, which opens as soon as nothing delays it."""

    FRESH = "fresh"
    LAST_GOOD = "last good"


@frozen
class Rollout:
    """A reload whose generation gets its clients, or its workers, in stages.

    The current stage follows from the share and the generation's SETTLE timer; see rollout.py.
    """

    share: int = 0  # the new generation's share of the new clients, in ten-thousandths
    canary: Canary | None = None  # None: the share follows the workers that are ready
    extended: bool = False  # too few connections came, so the canary lasts twice as long
    met: int | None = 0  # how many connections the canary has had; None: unknown


@frozen
class Candidate:
    """Settings that a reload has read, before a generation serves with them."""

    policy: Policy
    workers: int | None = None  # None: as many as before


@frozen
class Fleet:
    """Everything the lifecycle knows, with wanted and actual state in separate fields."""

    policy: Policy = field(default_factory=Policy)
    workers_wanted: int = 1
    generations: tuple[Generation, ...] = ()
    next_generation: int = 1
    next_worker: int = 1

    reload_wanted: bool = False
    lame_duck: LameDuck = LameDuck.OFF
    stopping: Stop | None = None
    to_open: Next | None = None  # to be opened once older generations and a back-off have ended

    configured: bool = False  # a reload begins with reading the configuration again
    reading: bool = False  # the configuration is being read
    candidate: Candidate | None = None  # the new settings, until they are applied or discarded
    dry_run: bool = False  # the reload under way is a dry run: its generation gets no clients
    canary_wanted: Canary | None = None  # the canary of the queued reload request
    rollout: Rollout | None = None  # the rollout of the reload under way
    #: The release of the deploy under way, until its verdict; "": no deploy, so `current` decides.
    release: str = ""

    served: bool = False  # a generation has served, since the first start
    #: How many generations in a row failed while no other generation served.  While a stop waits
    #: for a rescue (rescue.py), each rescue counts, too, so that the next rescue waits longer.
    failed_starts: int = 0
    listeners_open: bool = True
    held: bool = False  # an operator's hold: no client is accepted
    #: During a hold: how much time the settling generation has left; None: a whole stage.
    stage_left_s: float | None = None
    exit_status: int = 0
    exiting: bool = False

    timers: frozenset[Deadline] = frozenset()  # the running timers

    def of(self, phase: Phase) -> Generation | None:
        """Return the newest generation in a phase, or None."""
        return next((g for g in reversed(self.generations) if g.phase is phase), None)

    def all_of(self, phase: Phase) -> tuple[Generation, ...]:
        return tuple(g for g in self.generations if g.phase is phase)

    @property
    def incoming(self) -> Generation | None:
        """The generation that the current reload or start has opened: starting or settling."""
        return self.of(Phase.STARTING) or self.of(Phase.SETTLING)

    @property
    def route(self) -> Generation | None:
        """The generation that gets new connections, except the share of `sharing`."""
        if self.sharing:
            return self.of(Phase.SERVING)
        return self.of(Phase.SETTLING) or self.of(Phase.SERVING)

    @property
    def sharing(self) -> Generation | None:
        """The settling generation that gets only a share of the new connections."""
        shares = self.rollout is not None and self.rollout.share < WHOLE
        return self.of(Phase.SETTLING) if shares and self.of(Phase.SERVING) else None

    @property
    def is_opening(self) -> bool:
        """Whether a start, a reload, a dry run or a replacement is under way."""
        return bool(self.incoming or self.to_open or self.candidate or self.reading)

    @property
    def is_renewing(self) -> bool:
        """Whether the last good command is being started again."""
        starting = self.of(Phase.STARTING)
        return self.to_open is Next.LAST_GOOD or bool(starting and not starting.fresh)

    @property
    def is_changing(self) -> bool:
        """Whether a start, a reload, a dry run or a replacement is under way or queued."""
        return self.is_opening or self.reload_wanted

    @property
    def is_releasing(self) -> bool:
        """Whether a start, reload, deploy or dry run is under way or queued.

        A start of the last good command does not count: a deploy must be possible while this
        command crashes repeatedly.
        """
        opened = self.incoming is not None and self.incoming.fresh
        return opened or self.has_unopened or self.reload_wanted

    @property
    def has_unopened(self) -> bool:
        """Whether a start, reload, deploy or dry run has begun, but has opened no generation."""
        opened = self.incoming is not None and self.incoming.fresh
        begun = self.reading or self.candidate or self.to_open is Next.FRESH
        return bool(begun and not opened)

    @property
    def next_reload(self) -> int:
        """The lowest number that the generation of a reload requested now can get.

        If an earlier reload has not opened its generation yet, that reload uses up the next number.
        But a first start uses up no number if a stop calls it off.
        """
        return self.next_generation + (self.served and self.has_unopened)

    def policy_of(self, fresh: bool) -> Policy:
        """Return the policy of a generation that is opened fresh, or from the last good command."""
        return self.candidate.policy if fresh and self.candidate else self.policy

    def full_size(self, generation: Generation) -> int:
        """Return how many workers a generation has when it serves alone."""
        incoming = self.incoming
        is_release = incoming is not None and incoming.number == generation.number
        candidate = self.candidate if is_release and generation.fresh else None
        return (candidate.workers if candidate else None) or self.workers_wanted

    @property
    def newest_policy(self) -> Policy:
        """The policy of the generation that starts or settles; otherwise the policy in force.

        A dry run's generation does not count: it does not stay, and ends no connections.
        """
        incoming = None if self.dry_run else self.incoming
        return self.policy_of(incoming.fresh) if incoming else self.policy

    @property
    def most_processes(self) -> int:
        """How many processes may live at once under --reload-order rolling.

        The number includes the workers of all generations, and orphaned process groups.  For
        exceptions see rollout.room().
        """
        wanted, incoming = self.workers_wanted, self.incoming
        if incoming:
            wanted = max(wanted, self.full_size(incoming))
        return wanted + self.newest_policy.surge_of(wanted)

    @property
    def free_places(self) -> int:
        """How many more processes may start under --reload-order rolling; may be below 0."""
        return self.most_processes - sum(1 for _ in self.alive())

    def wanted_in(self, generation: Generation) -> int:
        """Return how many workers a generation should have."""
        full, incoming, policy = self.full_size(generation), self.incoming, self.newest_policy
        if not incoming or not policy.rolls or not self.served:
            return full
        is_alone = self.of(Phase.SERVING) is None
        is_first_stage = (
            incoming.phase is Phase.STARTING
            or Deadline(TimerKind.SETTLE, incoming.number) in self.timers
        )
        if generation.number != incoming.number:
            # One old worker stays until the new generation is complete, for a rollback.
            return full if is_first_stage else max(1, full - incoming.ready_workers)
        if not is_alone and not is_first_stage:
            return full
        first = full if is_alone else min(full, policy.surge_of(full))
        if incoming.fresh and not is_alone:
            return first
        # Clients may wait for it: begin with the workers that have room; the others follow.
        return max(1, min(first, max(0, self.free_places) + len(generation.alive)))

    def generation(self, number: int) -> Generation | None:
        return next((g for g in self.generations if g.number == number), None)

    def __getitem__(self, number: int) -> Generation:
        """Return a generation by its number.  The fleet must still have it."""
        (found,) = (g for g in self.generations if g.number == number)
        return found

    def find(self, worker: int) -> tuple[Generation, Worker] | None:
        """Return a worker and its generation, by the worker's number; None: the worker is gone."""
        found = ((each, each.worker(worker)) for each in self.generations)
        return next(((generation, entry) for generation, entry in found if entry), None)

    def alive(self) -> Iterator[Worker]:
        for generation in self.generations:
            yield from generation.alive

    @property
    def stop_requested(self) -> bool:
        """Whether a stop has begun, or follows the lame duck.  Then no new request begins."""
        return self.stopping is not None or self.lame_duck is LameDuck.STOPPING

    @property
    def stop_awaits_rescue(self) -> bool:
        """Whether a graceful stop waits for a rescue: a generation that accepts clients of a hold.

        The lame duck is over by then, so only --stop-timeout limits the wait.
        """
        return self.lame_duck is LameDuck.STOPPING and Deadline(TimerKind.STOP) in self.timers

    @property
    def queue_is_last(self) -> bool:
        """Whether only a draining generation's own workers can serve the clients in its queue.

        This is so in a graceful stop without a route.  It is never so under --handoff listener:
        there, clients wait in the backlog, which a stop closes.
        """
        stops = self.stopping is Stop.GRACEFUL and self.route is None
        return stops and self.policy.queues

    def with_generation(self, changed: Generation) -> Fleet:
        """Return the fleet with this generation in place of its earlier state."""
        number = changed.number
        generations = tuple(changed if g.number == number else g for g in self.generations)
        return replace(self, generations=generations)

    def with_worker(self, changed: Worker) -> Fleet:
        """Return the fleet with this worker in place of its earlier state."""
        found = self.find(changed.number)
        return self.with_generation(found[0].replaced(changed.number, changed)) if found else self

    def moved(self, number: int, phase: Phase) -> Fleet:
        """Return the fleet with a generation in another phase.

        Raises ValueError for a change that PHASES does not list: a bug in SocketProtector.
        """
        generation = self[number]
        if phase not in PHASES[generation.phase]:
            raise ValueError(f"generation {number} cannot become {phase.value}")
        return self.with_generation(replace(generation, phase=phase))
