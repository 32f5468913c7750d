"""Handles the workers of a generation: ready, exited, replaced, scaled up and down.

Pure.  Only WorkerExited removes a process from the fleet; a signal or a deadline never does.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from operator import attrgetter

from ..model.backoff import backoff_s
from ..model.lazy_dataclass import replace
from ..model.policy import PROVEN_S
from ..model.text import in_units
from . import rescue, rollout
from .actions import Report, ReportKind, Signal, Spawn, StartTimer, WorkerSignal
from .events import Deadline, TimerKind, WorkerExited
from .failure import end_stuck, fail, not_ready_reason
from .fleet import LEAVING, Fleet, Generation, Phase, State, Worker
from .step import Step

#: The most workers to start or retire in one turn of the loop: a few milliseconds' work.
AT_ONCE = 8
#: The limit on process groups that outlive their workers is twice the wanted number of workers, but
#: at least this number.  There is a limit because each group takes descriptors.
MOST_ORPHANS = 64
_NUMBER, _REPLACES, _STATE = attrgetter("number"), attrgetter("replaces"), attrgetter("state")
_UNREADY = {State.STARTING: 1, State.WAITING: 2}


def worker_ready(step: Step, number: int, retires: bool, *, alone: bool) -> None:
    """Mark a starting worker ready, and retire the worker that it replaces.

    alone: the worker has declared that it can finish alone.
    """
    found = step.fleet.find(number)
    is_killed = Deadline(TimerKind.WORKER_KILL, number) in step.fleet.timers
    if found is None or (is_killed and found[1].state is State.STARTING):
        return  # this worker is gone, or must leave because it was late: let it replace no worker
    if found[1].state is not State.STARTING:
        # The message is repeated, or the worker sent it before our signal arrived.
        if retires:
            _let_finish(step, *found)
        return
    if lacks := "" if alone else rollout.lacks_library(step.fleet, found[0]):
        fail(step, found[0].number, lacks)
        return
    step.cancel(TimerKind.WORKER_START, number)
    ready = replace(found[1], state=State.READY, retires=retires, replaces=0)
    step.fleet = step.fleet.with_worker(ready)
    _take_over(step, found[1].replaces)
    _retire_orphans(step, found[0].number, ready.slot)


def _let_finish(step: Step, generation: Generation, worker: Worker) -> None:
    """Cancel the planned KILL of a worker that was ready before we retired it as a starting worker.

    We read its READY too late, for example because we were killed.  The worker may have clients.
    """
    was_starting = worker.state is State.RETIRING and not worker.retires
    is_killed = Deadline(TimerKind.WORKER_KILL, worker.number) in step.fleet.timers
    if was_starting and is_killed and not (worker.hung or generation.ending or step.fleet.stopping):
        step.cancel(TimerKind.WORKER_KILL, worker.number)
        step.fleet = step.fleet.with_worker(ready := replace(worker, retires=True))
        step.retire(ready)


def worker_exited(step: Step, event: WorkerExited) -> None:
    """Remove an exited worker, and respawn it, fail its generation or rescue its clients."""
    found = step.fleet.find(event.worker)
    if found is None or not found[1].alive:
        return
    _remove_exited(step, event, *found)
    if event.waiting:
        rescue.rescue(step, found[0].number)


def _remove_exited(step: Step, event: WorkerExited, generation: Generation, worker: Worker) -> None:
    was_signalled = Deadline(TimerKind.WORKER_KILL, worker.number) in step.fleet.timers
    for wait in (TimerKind.WORKER_START, TimerKind.WORKER_RETIRE, TimerKind.WORKER_KILL):
        step.cancel(wait, worker.number)
    orphans = [Worker(worker.number, worker.slot, State.ORPHANED)] if event.orphans else []
    step.fleet = step.fleet.with_generation(generation.replaced(worker.number, *orphans))
    if worker.state is State.ORPHANED:
        return  # another worker has replaced it, or none was wanted
    replacement = _replacement(generation, worker.number)
    if replacement:  # another worker was to replace the exited worker
        step.fleet = step.fleet.with_worker(replace(replacement, replaces=0))
    if generation.phase is Phase.SERVING and worker.state is not State.RETIRING:
        step.do(Report(ReportKind.EXITED, generation.number, event.reason))
        is_wanted = rollout.may_respawn(step.fleet, step.fleet[generation.number])
        if replacement is None and is_wanted:
            _respawn(step, generation.number, worker, event)
        elif replacement is None:
            _end_stuck_unreplaced(step, worker.replaces)
            _retire_orphans(step, generation.number, worker.slot)
    elif event.waiting and _would_lose_queue(step.fleet, generation.number):
        _respawn(step, generation.number, worker, event)
    elif generation.phase in (Phase.STARTING, Phase.SETTLING):
        if worker.state is not State.RETIRING:
            # An upper limit: if the protector was killed or suspended, it reaps the worker late.
            within = f" within {in_units((event.served_s * 100 // 1 + 1) / 100)} of being ready"
            reason = event.reason + (within if event.served_s > 0 and not event.lost else "")
            fail(step, generation.number, reason, retry=not event.detached)
    else:
        _take_over(step, worker.replaces)  # no other replacement will come
    for orphan in orphans:  # last, so that after a rollback clients already go elsewhere
        never_served = worker.state is State.STARTING and not event.lost
        at_once = was_signalled or never_served
        _end_orphans(step, generation, orphan, at_once=at_once, lost=event.lost)


def _end_orphans(
    step: Step, generation: Generation, orphan: Worker, *, at_once: bool, lost: bool
) -> None:
    """Let the processes that a worker left behind finish, within the limits of a leaving worker.

    generation: as it was before the exit.
    at_once: the processes serve no client, or their worker had been signalled.
    lost: see WorkerExited.
    """
    ended_now = step.fleet[generation.number].ending and not generation.ending
    if generation.phase is Phase.STARTING or ended_now:
        return  # the signals to its generation include these processes
    if generation.ending:
        step.do(Signal(orphan.number, WorkerSignal.TERM))
    elif at_once:
        step.end_worker(orphan)
    else:
        if not _serves_on(step.fleet, generation.number, orphan, lost=lost):
            step.retire(orphan)
        _end_oldest_orphans(step)


def _serves_on(fleet: Fleet, number: int, orphan: Worker, *, lost: bool) -> bool:
    """Return whether an orphan may serve for now, although its worker has exited or is lost.

    In a rolling policy, the limit of processes may delay the next worker in the slot.  Orphans
    serve until that worker is ready.  In other policies only a lost worker serves, until its
    generation drains.  A signal before the drain could make this worker reset new clients.
    """
    if fleet[number].phase is not Phase.SERVING:
        return False
    if not fleet.policy.rolls:
        return lost
    to_come = (State.WAITING, State.STARTING)
    return any(w.slot == orphan.slot and w.state in to_come for w in fleet[number].workers)


def _retire_orphans(step: Step, number: int, slot: int) -> None:
    """Retire the orphans of a slot, which served until another worker was ready."""
    if not step.fleet.policy.rolls:
        return  # in other policies no orphan waits for the next worker: see _serves_on()
    # Rolling always has a drain limit, so each retired orphan has a timer.
    step.retire_orphans(each for each in step.fleet[number].workers if each.slot == slot)


def _end_oldest_orphans(step: Step) -> None:
    """End the oldest orphaned process groups if there are too many."""
    orphans = [each for each in step.fleet.alive() if each.state is State.ORPHANED]
    excess = len(orphans) - max(MOST_ORPHANS, 2 * step.fleet.workers_wanted)
    for oldest in sorted(orphans, key=_NUMBER)[: max(0, excess)]:
        if Deadline(TimerKind.WORKER_KILL, oldest.number) not in step.fleet.timers:
            step.end_worker(oldest)


def _would_lose_queue(fleet: Fleet, number: int) -> bool:
    """Return whether queued clients would be lost without another worker."""
    generation = fleet[number]
    has_another = generation.staying or any(not w.alive for w in generation.workers)
    return fleet.queue_is_last and not generation.ending and not has_another


def _respawn(step: Step, number: int, dead: Worker, event: WorkerExited) -> None:
    """Start another worker for an exited worker, at once or after a back-off.

    The new worker gets the same slot, or another slot if the exited worker is lost.
    """
    deaths = 0 if event.served_s >= PROVEN_S else dead.quick_deaths + 1
    slot = _another_slot(step, number, dead) if event.lost else dead.slot
    new = step.add(number, slot, quick_deaths=deaths, replaces=dead.replaces)
    delay_s = backoff_s(deaths)
    if delay_s > 0:
        step.start(TimerKind.WORKER_RESPAWN, new.number, delay_s)


def _another_slot(step: Step, number: int, lost: Worker) -> int:
    """Return a slot for the successor of a lost worker, which keeps its own slot.

    Other orphans of that slot move to the new slot, and serve until the successor is ready.
    """
    slot = next(_free_slots(step.fleet[number]))
    for each in step.fleet[number].workers:
        if each.slot == lost.slot and each.number != lost.number:
            step.fleet = step.fleet.with_worker(replace(each, slot=slot))
    return slot


# -- scaling -------------------------------------------------------------------


def scale_requested(step: Step, change: int, to: int | None) -> None:
    """Change the wanted number of workers; reconcile() starts or retires them."""
    wanted = step.fleet.workers_wanted + change if to is None else to
    if step.fleet.stop_requested:
        step.do(Report(ReportKind.REFUSED, reason="cannot scale: a stop is in progress"))
    elif wanted < 1:
        step.do(
            Report(
                ReportKind.REFUSED, reason="cannot go below 1 worker; to end the service use `stop`"
            )
        )
    else:
        before, candidate = step.fleet, step.fleet.candidate
        if candidate and candidate.workers:  # a reload has read another number
            more = candidate.workers + change if to is None else to
            candidate = replace(candidate, workers=max(1, more))
        step.fleet = replace(before, workers_wanted=wanted, candidate=candidate)
        if step.fleet != before:
            step.do(Report(ReportKind.SCALED, reason=f"{wanted} workers"))


def reconcile(step: Step) -> None:
    """Bring the generations to the wanted number of workers, a few per turn of the loop.

    Each start takes time, and thousands of workers may be wanted.  The missing number is computed
    in each turn, so a stop or a smaller number in the meantime takes effect at once.
    """
    if Deadline(TimerKind.TURN) in step.fleet.timers:
        return
    budget = AT_ONCE
    # Replacements first: without them there are fewer workers than before.
    budget -= _start_waiting(step, budget)
    budget -= _fill(step, budget)
    budget -= _resize(step, budget)
    if budget < AT_ONCE:
        step.start(TimerKind.TURN, 0, 0.0)


def _start_waiting(step: Step, most: int) -> int:
    """Start the workers that have a slot and no process; return how many were started."""
    before, timers = step.before, step.fleet.timers
    # While processes are limited, and when the limit ends, unchanged generations may get room.
    limited = step.fleet.newest_policy.rolls or before.newest_policy.rolls
    started = 0
    for generation in step.fleet.generations:
        as_it_was = before.timers is timers and before.generation(generation.number) is generation
        may_start = limited or not as_it_was
        if may_start and State.WAITING in map(_STATE, generation.workers):
            room = rollout.room(step.fleet, most - started, generation)
            for worker in islice(_waiting(step.fleet, generation), room):
                step.spawn(generation.number, worker)
                started += 1
    return started


def _waiting(fleet: Fleet, generation: Generation) -> Iterator[Worker]:
    """Yield the workers of a generation that may start now, if there is room."""
    waits = rollout.waits_to_replace(fleet, generation)
    for worker in generation.workers:
        if worker.alive or (worker.replaces and waits):
            continue
        if Deadline(TimerKind.WORKER_RESPAWN, worker.number) not in fleet.timers:
            yield worker


def _fill(step: Step, most: int) -> int:
    """Start missing workers of a starting generation; return how many were started."""
    fleet = step.fleet
    starting = fleet.of(Phase.STARTING)
    if starting is None:
        return 0
    slots = range(len(starting.workers), fleet.wanted_in(starting))
    slots = slots[: rollout.room(fleet, most, starting)]
    new = tuple(Worker(number, slot) for number, slot in enumerate(slots, fleet.next_worker))
    if new:
        filled = replace(starting, workers=(*starting.workers, *new))
        next_worker = fleet.next_worker + len(new)
        step.fleet = replace(fleet.with_generation(filled), next_worker=next_worker)
        step.do(*(Spawn(filled.number, worker.number, worker.slot) for worker in new))
        # The start limit runs from the last worker's start.
        policy = fleet.policy_of(starting.fresh)
        step.start_or_extend(TimerKind.START, filled.number, policy.start_timeout_s)
    return len(new)


def _resize(step: Step, most: int) -> int:
    """Grow or shrink the serving and, in a rollout, the settling generation.

    Returns how many workers were started or retired.
    """
    fleet = step.fleet
    serving, settling = fleet.of(Phase.SERVING), fleet.of(Phase.SETTLING)
    if fleet.stopping or (settling and fleet.rollout is None):
        return 0  # until --settle is over, it is undecided which generation grows
    changed = 0
    for generation in filter(None, (serving, settling)):  # first the old one, which makes room
        if not _is_as_it_was(step, generation):
            changed += _resize_one(step, generation, most - changed)
    return changed


def _is_as_it_was(step: Step, generation: Generation) -> bool:
    """Return whether an earlier step has brought a generation to its wanted size."""
    before, fleet = step.before, step.fleet
    as_it_was = before.generation(generation.number) is generation and before.timers is fleet.timers
    if not as_it_was or before.workers_wanted != fleet.workers_wanted:
        return False
    if fleet.newest_policy.rolls or before.newest_policy.rolls:
        return False
    settles = before.of(Phase.SETTLING) is fleet.of(Phase.SETTLING)
    return settles and before.rollout is fleet.rollout


def _resize_one(step: Step, generation: Generation, most: int) -> int:
    wanted = step.fleet.wanted_in(generation)
    # A replacement does not count until it has taken over; a leaving worker no longer counts.
    staying = tuple(map(_REPLACES, generation.workers)).count(0)
    staying -= sum(map(tuple(map(_STATE, generation.workers)).count, LEAVING))
    if staying > wanted:
        settled = [w for w in generation.workers if w.state not in LEAVING and not w.replaces]
        # Stuck workers first, then workers that are not ready, then the highest slots.
        settled.sort(key=lambda w: (w.hung, _UNREADY.get(w.state, 0), w.slot), reverse=True)
        excess = settled[: len(settled) - wanted][:most]
        for worker in excess:
            _retire(step, generation.number, worker)
            replacement = _replacement(generation, worker.number)
            if replacement:
                _retire(step, generation.number, replacement)
        return len(excess)
    missing = rollout.room(step.fleet, max(0, min(wanted - staying, most)), generation)
    for slot in islice(_free_slots(generation), missing):
        step.spawn(generation.number, step.add(generation.number, slot))
    return missing


def _free_slots(generation: Generation) -> Iterator[int]:
    taken = {worker.slot for worker in generation.workers}
    return (slot for slot in count() if slot not in taken)


def _retire(step: Step, number: int, worker: Worker) -> None:
    """Retire a worker without a replacement."""
    step.cancel(TimerKind.WORKER_START, worker.number)
    worker = replace(worker, replaces=0)
    if worker.state is State.WAITING:
        step.cancel(TimerKind.WORKER_RESPAWN, worker.number)
        step.fleet = step.fleet.with_generation(step.fleet[number].replaced(worker.number))
        _retire_orphans(step, number, worker.slot)
        return
    step.fleet = step.fleet.with_worker(replace(worker, state=State.RETIRING))
    if worker.state is not State.READY or worker.hung:
        step.end_worker(worker)  # it has nothing to finish, or is stuck
    else:
        step.retire(worker)
    _retire_orphans(step, number, worker.slot)


def kill_requested(step: Step, number: int) -> None:
    """Send KILL to a draining or abandoned generation; refuse any other."""
    generation = step.fleet.generation(number)
    if generation is None or generation.phase not in (Phase.DRAINING, Phase.ABANDONED):
        reason = f"kill takes only draining or abandoned generations, not {number}; see `status`"
        step.do(Report(ReportKind.REFUSED, number, reason))
        return
    step.forget_waiting(number)
    step.kill_generation(number)


# -- replacing a worker ----------------------------------------------------------


def replace_requested(step: Step, number: int, reason: str, *, hung: bool) -> None:
    """Replace a worker of the serving generation; it leaves when its replacement is ready.

    A worker of another generation is ended if it is stuck, and stays otherwise.
    """
    found = step.fleet.find(number)
    if found is None or (hung and found[1].hung):
        return  # it is gone, or is known to be stuck: another ABRT would postpone its KILL
    generation, worker = found
    if hung and worker.state in (State.READY, State.RETIRING):
        worker = replace(worker, hung=True)
        step.fleet = step.fleet.with_worker(worker)
        if worker.state is State.RETIRING:
            step.end_worker(worker)
    if worker.state is not State.READY or _replacement(generation, number):
        return  # it is leaving, or not ready yet
    if generation.phase is Phase.SERVING and not step.fleet.stopping:
        step.do(Report(ReportKind.REPLACING, generation.number, reason))
        step.add(generation.number, next(_free_slots(generation)), replaces=number)
    elif hung:
        step.do(Report(ReportKind.REPLACING, generation.number, reason))
        end_stuck(step, generation, worker, reason)


def _replacement(generation: Generation, number: int) -> Worker | None:
    """Return the worker that will replace another, if there is one."""
    if number not in map(_REPLACES, generation.workers):  # fast even with thousands of workers
        return None
    return next(worker for worker in generation.workers if worker.replaces == number)


def _take_over(step: Step, number: int) -> None:
    """Retire a worker whose replacement is ready, or end it if it is stuck."""
    found = step.fleet.find(number)
    if number and found and found[1].state is State.READY:
        generation, worker = found
        if generation.phase is Phase.SERVING:
            _retire(step, generation.number, worker)
        elif worker.hung:
            step.end_worker(worker)


def _end_stuck_unreplaced(step: Step, number: int) -> None:
    """End a stuck worker whose replacement has exited, if no other replacement starts."""
    found = step.fleet.find(number)
    if found and found[1].hung:
        step.end_worker(found[1])


# -- time ----------------------------------------------------------------------


def time_extended(step: Step, number: int, seconds: float) -> None:
    """Extend the running deadlines of a worker, its generation and the stop."""
    found = step.fleet.find(number)
    if found is None:
        return
    for deadline in (
        Deadline(TimerKind.START, found[0].number),
        Deadline(TimerKind.DRAIN, found[0].number),
        Deadline(TimerKind.WORKER_START, number),
        Deadline(TimerKind.WORKER_RETIRE, number),
        Deadline(TimerKind.STOP),
    ):
        if deadline in step.fleet.timers:
            step.do(StartTimer(deadline, seconds, extend=True))


def too_slow(step: Step, number: int) -> None:
    """End a worker that was not ready in time, or has not finished in time."""
    found = step.fleet.find(number)
    if found and not found[0].ending:  # otherwise TERM was sent already
        generation, worker = found
        if generation.phase is Phase.SETTLING and worker.state is State.STARTING:
            policy = step.fleet.policy_of(generation.fresh)
            fail(step, generation.number, not_ready_reason(policy, ""))
        step.end_worker(worker)  # last, so that clients already go elsewhere
