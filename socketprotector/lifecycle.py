"""What follows from an event: `decide(fleet, event) -> (fleet, actions)`.

Pure: no clock, process, socket or logger.  Time comes in as events and goes out as
StartTimer.  Three rules hold it together:

* A process is gone only on WorkerExited; a signal or deadline never removes it.
* Route before draining: there is no moment in which nobody owns a new connection.
* A generation that fails while another serves changes nothing for anybody.

The order of the actions is part of the answer.
"""

from __future__ import annotations

from dataclasses import replace

from .events import (
    Action,
    BacklogEmptied,
    CancelTimer,
    ChannelBroken,
    CloseListeners,
    Deadline,
    DeadlinePassed,
    Drain,
    Event,
    Exit,
    Launched,
    News,
    Open,
    OpenFailed,
    Release,
    ReloadRequested,
    Report,
    Retire,
    RouteTo,
    ScaleRequested,
    Sign,
    Signal,
    Spawn,
    StartTimer,
    StopRequested,
    TimeExtended,
    Wait,
    WorkerExited,
    WorkerReady,
)
from .fleet import PHASES, Fleet, Generation, Next, Phase, State, Stop, Worker

#: A worker (or generation) that served this long has proved itself; its death starts a new count.
PROVEN_S = 10.0
#: Two quick deaths are forgiven at once; from the third on the delay doubles to its end.
FREE_DEATHS = 2
FIRST_DELAY_S = 0.1
LAST_DELAY_S = 60.0
#: stop-first has nobody serving while the old generation drains: never without an end.
STOP_FIRST_DRAIN_S = 30.0
#: From so many draining generations on a warning is due where nothing else ends them.
MANY_DRAINING = 4
#: The exit status of a start that failed (3: rolled back).
START_FAILED = 3


def backoff_s(quick_deaths: int) -> float:
    """Seconds to wait before the next try after so many quick deaths in a row."""
    if quick_deaths <= FREE_DEATHS:
        return 0.0
    # The exponent is bounded because a float overflows after a thousand doublings.
    doublings = min(quick_deaths - FREE_DEATHS - 1, 16)
    return float(min(LAST_DELAY_S, FIRST_DELAY_S * 2**doublings))


def decide(fleet: Fleet, event: Event) -> tuple[Fleet, tuple[Action, ...]]:
    """Say what follows from one event.  Never raises for an event that comes late."""
    step = _Step(fleet)
    step.take(event)
    return step.fleet, tuple(step.actions)


class _Step:
    """One decision in the making: the fleet so far and the actions so far."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.actions: list[Action] = []

    def take(self, event: Event) -> None:
        if self.fleet.exiting:
            return
        match event:
            case Launched() if self.fleet.next_generation == 1:
                self.open(Next.FRESH)
            case ReloadRequested():
                self.reload_requested()
            case StopRequested(quick):
                self.stop_requested(quick)
            case ScaleRequested(change):
                self.scale_requested(change)
            case WorkerReady(worker, retires):
                self.worker_ready(worker, retires)
            case WorkerExited():
                self.worker_exited(event)
            case OpenFailed(number, reason):
                self.open_failed(number, reason)
            case ChannelBroken(number, served_s):
                self.channel_broken(number, served_s)
            case TimeExtended(worker, seconds):
                self.time_extended(worker, seconds)
            case BacklogEmptied():
                self.backlog_emptied()
            case DeadlinePassed(deadline):
                self.deadline_passed(deadline)
            case _:  # a second Launched: the program stands already
                pass

    def do(self, *actions: Action) -> None:
        self.actions.extend(actions)

    # -- opening and starting ------------------------------------------------

    def open(self, which: Next) -> None:
        """Open the next generation and spawn its workers."""
        fleet = self.fleet
        number = fleet.next_generation
        workers = tuple(
            Worker(fleet.next_worker + slot, slot) for slot in range(fleet.workers_wanted)
        )
        fresh = which is Next.FRESH
        self.fleet = replace(
            fleet,
            generations=(*fleet.generations, Generation(number, fresh=fresh, workers=workers)),
            next_generation=number + 1,
            next_worker=fleet.next_worker + len(workers),
            to_open=None,
        )
        self.do(Open(number, fresh))
        self.do(*(Spawn(number, worker.number, worker.slot) for worker in workers))
        self.do(StartTimer(Deadline(Wait.START, number), fleet.policy.start_timeout_s))

    def worker_ready(self, number: int, retires: bool) -> None:
        found = self.fleet.find(number)
        if found is None or found[1].state is not State.STARTING:
            return  # said twice, or crossed our signal
        generation, worker = found
        self.fleet = self.fleet.with_worker(replace(worker, state=State.READY, retires=retires))
        if generation.phase is Phase.STARTING:
            self.ready_if_all_are(generation.number)
        else:
            self.do(CancelTimer(Deadline(Wait.WORKER_START, number)))

    def ready_if_all_are(self, number: int) -> None:
        generation = self.fleet.generation(number)
        assert generation is not None
        if not generation.ready:
            return
        self.do(CancelTimer(Deadline(Wait.START, number)))
        if self.fleet.policy.settle_s > 0 and self.fleet.of(Phase.SERVING):
            self.fleet = self.fleet.moved(number, Phase.SETTLING)
            self.do(
                RouteTo(number),
                StartTimer(Deadline(Wait.SETTLE, number), self.fleet.policy.settle_s),
            )
        else:
            self.promote(number)

    def promote(self, number: int) -> None:
        """Make a generation the serving one and let the one before it drain."""
        first = not self.fleet.served
        old = self.fleet.of(Phase.SERVING)
        routed = self.fleet.of(Phase.SETTLING) is not None
        self.fleet = self.fleet.moved(number, Phase.SERVING)
        self.fleet = replace(self.fleet, served=True, failed_starts=0)
        if not routed:
            self.do(RouteTo(number))
        if old is not None:
            self.drain(old.number, self.fleet.policy.drain_timeout_s)
        self.do(Report(News.READY if first else News.RELOADED, number))
        self.limit_draining()
        self.reconcile()
        self.reload_if_wanted()

    # -- reload --------------------------------------------------------------

    def reload_requested(self) -> None:
        fleet = self.fleet
        if fleet.stopping:
            self.do(Report(News.REFUSED, reason="no reload while stopping"))
        elif fleet.incoming or fleet.to_open is Next.FRESH:
            # Remember the wish: the newest configuration wins without a second HUP.
            self.fleet = replace(fleet, reload_wanted=True)
        else:
            self.begin_reload()

    def begin_reload(self) -> None:
        # Where a back-off runs nobody serves: whoever asks for a reload wants it now.
        self.do(CancelTimer(Deadline(Wait.OPEN)), Report(News.RELOADING))
        self.fleet = replace(self.fleet, reload_wanted=False, to_open=Next.FRESH, backing_off=False)
        old = self.fleet.of(Phase.SERVING)
        if old is not None and self.fleet.policy.stop_first:
            self.do(RouteTo(None))
            self.drain(old.number, self.fleet.policy.drain_timeout_s or STOP_FIRST_DRAIN_S)
        self.open_if_free()

    def reload_if_wanted(self) -> None:
        fleet = self.fleet
        if fleet.reload_wanted and not (fleet.stopping or fleet.incoming or fleet.to_open):
            self.begin_reload()

    def plan(self, which: Next, delay_s: float) -> None:
        """Open a generation after a delay, as soon as nothing stands in its way."""
        self.fleet = replace(self.fleet, to_open=which, backing_off=delay_s > 0)
        if delay_s > 0:
            self.do(StartTimer(Deadline(Wait.OPEN), delay_s))
        self.open_if_free()

    def open_if_free(self) -> None:
        fleet = self.fleet
        if fleet.to_open is None or fleet.backing_off or fleet.stopping:
            return
        # A generation that failed may still hold what the next one wants, and
        # under stop-first every old one may.
        blocked = fleet.of(Phase.ABANDONED) or (
            fleet.policy.stop_first and fleet.of(Phase.DRAINING)
        )
        if not blocked:
            self.open(fleet.to_open)

    # -- failures ------------------------------------------------------------

    def open_failed(self, number: int, reason: str) -> None:
        generation = self.fleet.generation(number)
        if generation is None or generation.phase is not Phase.STARTING:
            return
        # None of its workers was ever spawned.
        self.fleet = self.fleet.with_generation(replace(generation, workers=()))
        self.abandon(number, reason, retry=False)

    def abandon(self, number: int, reason: str, *, retry: bool) -> None:
        """Give up a starting generation, and say what comes instead."""
        generation = self.fleet.generation(number)
        assert generation is not None
        self.fleet = self.fleet.moved(number, Phase.ABANDONED)
        self.do(CancelTimer(Deadline(Wait.START, number)))
        self.terminate(number)
        if not self.fleet.served:
            self.first_start_failed(number, reason, retry=retry)
        elif self.fleet.of(Phase.SERVING) or generation.fresh:
            self.do(Report(News.RELOAD_FAILED, number, reason))
            if not self.fleet.of(Phase.SERVING) and not self.fleet.reload_wanted:
                self.plan(Next.LAST_GOOD, 0.0)
        else:
            failed = self.fleet.failed_starts + 1
            self.fleet = replace(self.fleet, failed_starts=failed)
            self.do(Report(News.RETRYING, number, reason))
            if not self.fleet.reload_wanted:
                self.plan(Next.LAST_GOOD, backoff_s(failed))
        self.end_if_empty(number)
        self.reload_if_wanted()

    def first_start_failed(self, number: int, reason: str, *, retry: bool) -> None:
        failed = self.fleet.failed_starts + 1
        self.fleet = replace(self.fleet, failed_starts=failed)
        if retry and failed < self.fleet.policy.start_tries:
            self.do(Report(News.RETRYING, number, reason))
            self.plan(Next.FRESH, 0.0)
        else:
            self.fleet = replace(self.fleet, exit_status=START_FAILED)
            self.do(Report(News.START_FAILED, number, reason))
            self.stop_quickly()

    def channel_broken(self, number: int, served_s: float) -> None:
        generation = self.fleet.generation(number)
        if generation is None or generation.phase not in (Phase.SETTLING, Phase.SERVING):
            return
        self.do(Report(News.BROKEN, number))
        if generation.phase is Phase.SETTLING:
            self.roll_back(number, "a worker shut down the channel")
            return
        self.do(RouteTo(None))
        self.drain(number, self.fleet.policy.drain_timeout_s)
        if self.fleet.stopping:
            self.close_listeners()
            return
        failed = 1 if served_s >= PROVEN_S else self.fleet.failed_starts + 1
        self.fleet = replace(self.fleet, failed_starts=failed)
        if self.fleet.incoming is None and self.fleet.to_open is None:
            self.plan(Next.LAST_GOOD, backoff_s(failed))

    def roll_back(self, number: int, reason: str) -> None:
        """Switch from a settling generation back to the one that still serves."""
        old = self.fleet.of(Phase.SERVING)
        self.do(
            CancelTimer(Deadline(Wait.SETTLE, number)),
            RouteTo(old.number if old else None),
        )
        self.drain(number, self.fleet.policy.drain_timeout_s)
        self.do(Report(News.RELOAD_FAILED, number, reason))
        if old is None and not self.fleet.reload_wanted:  # its channel broke meanwhile
            self.plan(Next.LAST_GOOD, 0.0)
        self.reload_if_wanted()

    # -- workers that end ----------------------------------------------------

    def worker_exited(self, event: WorkerExited) -> None:
        found = self.fleet.find(event.worker)
        if found is None:
            return
        generation, worker = found
        number = generation.number
        for wait in (Wait.WORKER_START, Wait.WORKER_RETIRE, Wait.WORKER_KILL):
            self.do(CancelTimer(Deadline(wait, worker.number)))
        expected = worker.state is State.RETIRING
        if generation.phase is Phase.SERVING and not expected:
            self.do(Report(News.EXITED, number, event.reason))
            self.respawn(generation, worker, event.served_s)
            return
        last = len(generation.workers) == 1
        stopping = self.fleet.stopping is Stop.GRACEFUL and not generation.ending
        if last and event.waiting and stopping and generation.phase is Phase.DRAINING:
            # The stop has no other generation for what waits there.
            self.respawn(generation, worker, event.served_s)
            return
        self.remove(generation, worker)
        if generation.phase is Phase.STARTING:
            self.abandon(number, event.reason, retry=not event.detached)
        elif generation.phase is Phase.SETTLING and not expected:
            self.roll_back(number, event.reason)
        self.end_if_empty(number)

    def respawn(self, generation: Generation, worker: Worker, served_s: float) -> None:
        """Fill a dead worker's place, at once or after a back-off."""
        deaths = 1 if served_s >= PROVEN_S else worker.quick_deaths + 1
        delay_s = backoff_s(deaths)
        state = State.WAITING if delay_s > 0 else State.STARTING
        new = Worker(self.fleet.next_worker, worker.slot, state, quick_deaths=deaths)
        workers = tuple(new if w.number == worker.number else w for w in generation.workers)
        self.fleet = self.fleet.with_generation(replace(generation, workers=workers))
        self.fleet = replace(self.fleet, next_worker=new.number + 1)
        if delay_s > 0:
            self.do(StartTimer(Deadline(Wait.WORKER_RESPAWN, new.number), delay_s))
        else:
            self.spawn(generation.number, new)

    def spawn(self, generation: int, worker: Worker) -> None:
        """Spawn a worker into a generation that stands already."""
        self.do(
            Spawn(generation, worker.number, worker.slot),
            StartTimer(
                Deadline(Wait.WORKER_START, worker.number), self.fleet.policy.start_timeout_s
            ),
        )

    def remove(self, generation: Generation, worker: Worker) -> None:
        workers = tuple(w for w in generation.workers if w.number != worker.number)
        self.fleet = self.fleet.with_generation(replace(generation, workers=workers))

    def end_if_empty(self, number: int) -> None:
        """Release a generation whose last worker is gone, and do what waited for that."""
        generation = self.fleet.generation(number)
        if generation is None or generation.workers or None not in PHASES[generation.phase]:
            return
        self.do(
            CancelTimer(Deadline(Wait.DRAIN, number)),
            CancelTimer(Deadline(Wait.KILL, number)),
            Release(number),
        )
        left = tuple(g for g in self.fleet.generations if g.number != number)
        self.fleet = replace(self.fleet, generations=left)
        self.open_if_free()
        self.exit_if_done()

    # -- draining and ending -------------------------------------------------

    def drain(self, number: int, timeout_s: float) -> None:
        """Let a generation finish what it has; without workers it is gone at once."""
        self.fleet = self.fleet.moved(number, Phase.DRAINING)
        self.do(Drain(number))
        if self.fleet.stopping is not Stop.GRACEFUL:
            self.forget_waiting(number)
        if timeout_s > 0:
            self.do(StartTimer(Deadline(Wait.DRAIN, number), timeout_s))
        self.end_if_empty(number)

    def terminate(self, number: int) -> None:
        """Send TERM to what is left of a generation; KILL follows by a timer."""
        self.forget_waiting(number)
        generation = self.fleet.generation(number)
        if generation is None or generation.ending or not generation.workers:
            return
        self.fleet = self.fleet.with_generation(replace(generation, ending=True))
        self.do(*(Signal(worker.number, Sign.TERM) for worker in generation.workers))
        self.do(StartTimer(Deadline(Wait.KILL, number), self.fleet.policy.kill_timeout_s))

    def forget_waiting(self, number: int) -> None:
        """Drop the places whose next process has not been spawned yet."""
        generation = self.fleet.generation(number)
        if generation is None:
            return
        for worker in generation.workers:
            if not worker.alive:
                self.do(CancelTimer(Deadline(Wait.WORKER_RESPAWN, worker.number)))
        self.fleet = self.fleet.with_generation(replace(generation, workers=generation.alive))

    def limit_draining(self) -> None:
        draining = self.fleet.all_of(Phase.DRAINING)
        limit = self.fleet.policy.max_draining
        if limit:
            for generation in draining[: max(0, len(draining) - limit)]:
                self.terminate(generation.number)
        elif len(draining) >= MANY_DRAINING and not self.fleet.policy.drain_timeout_s:
            self.do(Report(News.MANY_DRAINING, reason=f"{len(draining)} generations"))

    # -- scaling -------------------------------------------------------------

    def scale_requested(self, change: int) -> None:
        wanted = self.fleet.workers_wanted + change
        if wanted < 1 or self.fleet.stopping:
            self.do(Report(News.REFUSED, reason=f"cannot go to {max(wanted, 0)} workers"))
            return
        self.fleet = replace(self.fleet, workers_wanted=wanted)
        self.reconcile()

    def reconcile(self) -> None:
        """Bring the serving generation to as many workers as are wanted."""
        serving = self.fleet.of(Phase.SERVING)
        if serving is None or self.fleet.stopping:
            return
        staying = [w for w in serving.workers if w.state is not State.RETIRING]
        for worker in sorted(staying, key=lambda w: -w.slot)[: -self.fleet.workers_wanted]:
            self.retire(worker)
        taken = {worker.slot for worker in serving.workers}
        for _ in range(self.fleet.workers_wanted - len(staying)):
            slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)
            taken.add(slot)
            new = Worker(self.fleet.next_worker, slot)
            generation = self.fleet.generation(serving.number)
            assert generation is not None
            self.fleet = self.fleet.with_generation(
                replace(generation, workers=(*generation.workers, new))
            )
            self.fleet = replace(self.fleet, next_worker=new.number + 1)
            self.spawn(serving.number, new)

    def retire(self, worker: Worker) -> None:
        found = self.fleet.find(worker.number)
        assert found is not None
        if not worker.alive:
            self.do(CancelTimer(Deadline(Wait.WORKER_RESPAWN, worker.number)))
            self.remove(found[0], worker)
            return
        self.fleet = self.fleet.with_worker(replace(worker, state=State.RETIRING))
        if worker.retires:
            self.do(Retire(worker.number))
        else:
            self.do(Signal(worker.number, Sign.TERM))
        timeout_s = self.fleet.policy.drain_timeout_s
        if timeout_s > 0:
            self.do(StartTimer(Deadline(Wait.WORKER_RETIRE, worker.number), timeout_s))

    # -- stopping ------------------------------------------------------------

    def stop_requested(self, quick: bool) -> None:
        if self.fleet.stopping is Stop.QUICK:
            return
        if self.fleet.stopping is None:
            self.do(Report(News.STOPPING))
        if quick or self.fleet.stopping or self.fleet.route is None:
            self.stop_quickly()
        else:
            self.stop_gracefully()

    def stop_gracefully(self) -> None:
        self.call_off(Stop.GRACEFUL)
        settling = self.fleet.of(Phase.SETTLING)
        old = self.fleet.of(Phase.SERVING)
        if settling is not None:
            self.do(CancelTimer(Deadline(Wait.SETTLE, settling.number)))
            self.fleet = self.fleet.moved(settling.number, Phase.SERVING)
            if old is not None:
                self.drain(old.number, 0.0)
        self.do(
            CloseListeners(quick=False),
            StartTimer(Deadline(Wait.STOP), self.fleet.policy.stop_timeout_s),
        )

    def backlog_emptied(self) -> None:
        if self.fleet.stopping is None or not self.fleet.listeners_open:
            return
        self.fleet = replace(self.fleet, listeners_open=False)
        serving = self.fleet.of(Phase.SERVING)
        if serving is not None:
            self.drain(serving.number, 0.0)
        self.exit_if_done()

    def stop_quickly(self) -> None:
        self.call_off(Stop.QUICK)
        self.do(CancelTimer(Deadline(Wait.STOP)), RouteTo(None))
        self.close_listeners()
        for generation in self.fleet.generations:
            if generation.phase in (Phase.SERVING, Phase.SETTLING):
                self.do(CancelTimer(Deadline(Wait.SETTLE, generation.number)))
                self.drain(generation.number, 0.0)
            self.terminate(generation.number)
            self.end_if_empty(generation.number)
        self.exit_if_done()

    def call_off(self, stop: Stop) -> None:
        """Give up whatever was to come."""
        self.fleet = replace(
            self.fleet, stopping=stop, reload_wanted=False, to_open=None, backing_off=False
        )
        self.do(CancelTimer(Deadline(Wait.OPEN)))
        starting = self.fleet.of(Phase.STARTING)
        if starting is not None:
            self.fleet = self.fleet.moved(starting.number, Phase.ABANDONED)
            self.do(CancelTimer(Deadline(Wait.START, starting.number)))
            self.terminate(starting.number)

    def close_listeners(self) -> None:
        if self.fleet.listeners_open:
            self.fleet = replace(self.fleet, listeners_open=False)
            self.do(CloseListeners(quick=True))

    def exit_if_done(self) -> None:
        fleet = self.fleet
        done = fleet.stopping and not fleet.generations and not fleet.listeners_open
        if done and not fleet.exiting:
            self.fleet = replace(fleet, exiting=True)
            self.do(CancelTimer(Deadline(Wait.STOP)), Exit(fleet.exit_status))

    # -- time ----------------------------------------------------------------

    def time_extended(self, number: int, seconds: float) -> None:
        found = self.fleet.find(number)
        if found is None:
            return
        generation, worker = found
        # A timer that does not run is not started by this.
        for deadline in (
            Deadline(Wait.START, generation.number),
            Deadline(Wait.DRAIN, generation.number),
            Deadline(Wait.WORKER_START, worker.number),
            Deadline(Wait.STOP),
        ):
            self.do(StartTimer(deadline, seconds, extend=True))

    def deadline_passed(self, deadline: Deadline) -> None:
        number = deadline.target
        match deadline.wait:
            case Wait.OPEN:
                self.fleet = replace(self.fleet, backing_off=False)
                self.open_if_free()
            case Wait.STOP if self.fleet.stopping is Stop.GRACEFUL:
                self.stop_quickly()
            case Wait.START | Wait.SETTLE | Wait.DRAIN | Wait.KILL:
                generation = self.fleet.generation(number)
                if generation is not None:
                    self.generation_waited(generation, deadline.wait)
            case Wait.WORKER_START | Wait.WORKER_RETIRE | Wait.WORKER_KILL | Wait.WORKER_RESPAWN:
                found = self.fleet.find(number)
                if found is not None:
                    self.worker_waited(*found, deadline.wait)
            case _:  # a stop that has become quick already
                pass

    def generation_waited(self, generation: Generation, wait: Wait) -> None:
        number = generation.number
        match wait, generation.phase:
            case Wait.START, Phase.STARTING:
                limit = f"{self.fleet.policy.start_timeout_s:g} s"
                self.abandon(number, f"not ready within {limit}", retry=False)
            case Wait.SETTLE, Phase.SETTLING:
                self.promote(number)
            case Wait.DRAIN, Phase.DRAINING:
                self.terminate(number)
                self.end_if_empty(number)
            case Wait.KILL, _ if generation.ending:
                self.do(*(Signal(worker.number, Sign.KILL) for worker in generation.alive))
            case _:  # late: the phase has changed since
                pass

    def worker_waited(self, generation: Generation, worker: Worker, wait: Wait) -> None:
        match wait, worker.state:
            case Wait.WORKER_RESPAWN, State.WAITING:
                started = replace(worker, state=State.STARTING)
                self.fleet = self.fleet.with_worker(started)
                self.spawn(generation.number, started)
            case (Wait.WORKER_START, State.STARTING) | (Wait.WORKER_RETIRE, State.RETIRING):
                self.do(
                    Signal(worker.number, Sign.TERM),
                    StartTimer(
                        Deadline(Wait.WORKER_KILL, worker.number),
                        self.fleet.policy.kill_timeout_s,
                    ),
                )
            case Wait.WORKER_KILL, _:
                self.do(Signal(worker.number, Sign.KILL))
            case _:  # late: became ready, or was spawned already
                pass
