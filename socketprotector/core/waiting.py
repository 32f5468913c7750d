"""Says what a fleet waits for, and why, for the operator.

Pure.  `status` shows the waits.  The exporter, and commands that show progress, read `status`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..model.lazy_dataclass import field, frozen
from ..model.text import in_units
from . import rollout
from .events import Deadline, TimerKind
from .fleet import LEAVING, Fleet, Generation, LameDuck, Phase, State, Stop, Worker
from .reload import failed_in_the_way, in_the_way


@frozen
class Wait:
    """One wait: its kind, for programs, and its reason, for people."""

    kind: str
    reason: str
    generation: int | None = None
    left_s: float | None = None  # until the wait ends at the latest; None: no limit


@frozen
class Facts:
    """Facts that the reasons mention and the fleet does not record."""

    left_s: Mapping[Deadline, float] = field(default_factory=dict)  # of each running timer
    #: Open connections by generation; None: not known.
    active: Mapping[int, int | None] = field(default_factory=dict)
    answer: str = ""  # the last answer of the starting generation to its probe or check
    settle_check: str = ""  # the check of the settling generation
    met: int | None = 0  # the connections of the settling generation; None: unknown
    #: Open connections of a worker and the age of the oldest in seconds; None: not known.
    held: Mapping[int, tuple[int | None, float | None]] = field(default_factory=dict)
    settle_check_due: bool = False  # --settle is over, and the check's next success is awaited
    upgrade: str = ""  # the current step of an upgrade
    leftovers_end: bool = False  # processes of failed workers were found and signalled
    last_exit: tuple[int, str] = (0, "")  # the generation of the worker that died last; why
    late_clients_s: float | None = None  # how long a stop still accepts clients of an earlier hold


def waits(fleet: Fleet, facts: Facts) -> tuple[Wait, ...]:
    """Return all waits, beginning with an upgrade and a reload."""
    return (
        *_upgrade(facts),
        *_reload(fleet, facts),
        *_operator(fleet, facts),
        *_stop(fleet, facts),
        *_leaving(fleet, facts),
        *_workers(fleet, facts),
    )


def _time_left(facts: Facts, kind: TimerKind, target: int = 0) -> float | None:
    return facts.left_s.get(Deadline(kind, target))


def _upgrade(facts: Facts) -> Iterator[Wait]:
    if facts.upgrade:
        yield Wait("upgrade", f"upgrade: {facts.upgrade}")


# -- a reload, or a start --------------------------------------------------------


def _reload(fleet: Fleet, facts: Facts) -> Iterator[Wait]:
    if fleet.reading:
        yield Wait("configuration", "the configuration is being read")
    for generation in fleet.generations:
        if generation.phase is Phase.STARTING:
            yield _start(fleet, facts, generation)
        elif generation.phase is Phase.SETTLING:
            yield _settle(fleet, facts, generation)
    if fleet.to_open and Deadline(TimerKind.OPEN) in fleet.timers:
        failed = _count(fleet.failed_starts, "failure")
        left_s = _time_left(facts, TimerKind.OPEN)
        yield Wait("back-off", f"next start after {failed}", None, left_s)
    for generation in _awaited(fleet):
        yield _end_of("room", facts, generation)
    if fleet.reload_wanted or (fleet.candidate and fleet.incoming and not fleet.incoming.fresh):
        yield Wait("earlier-reload", "a reload begins after the current start, reload or dry run")


def _start(fleet: Fleet, facts: Facts, generation: Generation) -> Wait:
    number = generation.number
    if Deadline(TimerKind.SETTLE, number) in fleet.timers:  # a dry run: see reload._all_ready()
        left_s = _time_left(facts, TimerKind.SETTLE, number)
        return Wait("start", f"generation {number} is watched before the verdict", number, left_s)
    wanted = max(fleet.wanted_in(generation), len(generation.workers))
    ready = sum(worker.state is State.READY for worker in generation.workers)
    known = [f"{ready} of {_count(wanted, 'worker')} ready"]
    if facts.answer:
        # If only the answer decides, leave out the number of ready workers: READY=1 is ignored.
        known = known[: not fleet.policy_of(generation.fresh).answer_decides]
        known.append(_last_answer(facts.answer))
    if rollout.lacks_room(fleet, generation):
        known.append(_room(fleet, facts))
    reason = f"generation {number} starts: {'; '.join(known)}"
    return Wait("start", reason, number, _time_left(facts, TimerKind.START, number))


def _last_answer(answer: str) -> str:
    """Return a probe's result in words; `GET /x: 500` is an answer, `GET /x: refused` is none."""
    request, colon, result = answer.partition(": ")
    is_answer = request.startswith("GET ") and colon and result[:1].isdigit()
    return f"last answer to {answer}" if is_answer else f"last probe: {answer}"


def _settle(fleet: Fleet, facts: Facts, generation: Generation) -> Wait:
    number = generation.number
    shares = fleet.rollout if fleet.sharing else None
    left_s = _time_left(facts, TimerKind.SETTLE, number)
    checked = f", checked by {facts.settle_check}" if generation.checked else ""
    if shares and shares.canary:
        canary = shares.canary
        time = in_units(canary.for_s * (2 if shares.extended else 1))
        reason = f"{canary.text} of new connections for {time}"
        if facts.met is not None:
            reason += f": {facts.met} so far"
        if (facts.met or 0) < canary.at_least:
            reason += f", at least {canary.at_least} wanted"
        return Wait("canary", reason + checked, number, left_s)
    if shares:
        return Wait("rolling", _rolling(fleet, facts, generation) + checked, number, left_s)
    if generation.checked and facts.settle_check_due:
        check = facts.settle_check
        reason = f"settling: --settle is over; --settle-check {check} must pass after it"
        return Wait("settle", reason, number)
    return Wait("settle", f"settling{checked}", number, left_s)


# -- a rolling reload ----------------------------------------------------------------


def _rolling(fleet: Fleet, facts: Facts, settling: Generation) -> str:
    """Return how far a rolling reload is, and what its next workers wait for."""
    full, ready = fleet.full_size(settling), settling.ready_workers
    text = f"{ready} of {_count(full, 'worker')} replaced"
    if Deadline(TimerKind.SETTLE, settling.number) in fleet.timers:
        return f"{text}, settling"
    starting = sum(worker.state is State.STARTING for worker in settling.workers)
    if starting:
        return f"{text}, {starting} starting"
    if leaving := sum(worker.state in LEAVING for worker in settling.workers):
        return f"{text}, {leaving} finishing"
    if len(settling.workers) < full and not rollout.room(fleet, 1, settling):
        return f"{text}, {_room(fleet, facts)}"
    return text


def _room(fleet: Fleet, facts: Facts) -> str:
    """Return which processes must end before another worker may start."""
    serving = fleet.of(Phase.SERVING)
    leaving = [each for each in serving.workers if each.state in LEAVING] if serving else []
    if leaving:
        more = f" and {len(leaving) - 1} more" if len(leaving) > 1 else ""
        return f"waiting for {_leaving_worker(facts, leaving[0])}{more}"
    ends = [_end_of("room", facts, each).reason for each in fleet.generations if _is_leaving(each)]
    return f"waiting for room: {'; '.join(ends) or 'more workers are running than wanted'}"


def _is_leaving(generation: Generation) -> bool:
    return generation.phase in (Phase.DRAINING, Phase.ABANDONED)


def _leaving_worker(facts: Facts, worker: Worker) -> str:
    active, oldest_s = facts.held.get(worker.number, (None, None))
    if worker.state is State.ORPHANED:
        return f"processes of worker {worker.number}"
    if not active:
        return f"worker {worker.number}"
    age = f", longest {in_units(int(oldest_s))}" if oldest_s is not None else ""
    return f"worker {worker.number} ({_count(active, 'connection')}{age})"


# -- requests of an operator -------------------------------------------------------


def _operator(fleet: Fleet, facts: Facts) -> Iterator[Wait]:
    if fleet.held:
        yield Wait("hold", "held: no client is accepted", None, _time_left(facts, TimerKind.HOLD))
    if fleet.lame_duck is LameDuck.STOPPING and not fleet.stop_awaits_rescue:
        left_s = _time_left(facts, TimerKind.LAME_DUCK)
        yield Wait("lame-duck", "lame duck: the stop begins later", None, left_s)


def _stop(fleet: Fleet, facts: Facts) -> Iterator[Wait]:
    if fleet.exiting:
        ends = "all workers have stopped; ending processes that failed workers left behind"
        looks = "all workers have stopped; checking whether they left processes behind"
        yield Wait("stop", ends if facts.leftovers_end else looks)
        return
    if fleet.stop_awaits_rescue:
        reason = "stopping: starting workers for clients that waited during the hold"
        yield Wait("stop", reason, None, _stop_left(facts))
    if not fleet.stopping:
        return
    if fleet.stopping is Stop.GRACEFUL and fleet.listeners_open:
        late_s = facts.late_clients_s
        reason = "stopping: accepting clients that have already connected"
        if late_s is not None:
            reason = "stopping: accepting clients that waited during the hold"
        yield Wait("stop", reason, None, late_s if late_s is not None else _stop_left(facts))
    for generation in fleet.generations:
        if generation.phase in (Phase.DRAINING, Phase.ABANDONED):
            yield _end_of("stop", facts, generation, _stop_left(facts))


def _stop_left(facts: Facts) -> float | None:
    return _time_left(facts, TimerKind.STOP)


# -- generations and workers that leave --------------------------------------------


def _leaving(fleet: Fleet, facts: Facts) -> Iterator[Wait]:
    """Yield the waits that delay no reload and no stop."""
    if fleet.stopping:
        return
    named = _awaited(fleet)
    for generation in fleet.generations:
        if generation.phase in (Phase.DRAINING, Phase.ABANDONED) and generation not in named:
            yield _end_of("drain", facts, generation)


def _awaited(fleet: Fleet) -> tuple[Generation, ...]:
    """Return the generations that must end before the next one opens."""
    if fleet.to_open:
        return in_the_way(fleet)
    return failed_in_the_way(fleet) if fleet.reload_wanted else ()


def _end_of(kind: str, facts: Facts, generation: Generation, left_s: float | None = None) -> Wait:
    """Return the wait for the end of a leaving generation."""
    number, active = generation.number, facts.active.get(generation.number)
    workers = len(generation.alive)
    if generation.ending:
        reason = f"generation {number} was sent TERM; {_not_exited(workers)}"
        return Wait(kind, reason, number, _time_left(facts, TimerKind.KILL, number))
    if left_s is None:
        left_s = _time_left(facts, TimerKind.DRAIN, number)
    if generation.quiescing:
        reason = f"generation {number} is accepting the clients that connected before the switch"
    elif active:
        reason = f"generation {number} still has {_count(active, 'connection')}"
    elif active == 0:
        reason = f"generation {number} has no connection; {_not_exited(workers)}"
    else:
        reason = f"generation {number} is draining; {_not_exited(workers)}"
    return Wait(kind, reason, number, left_s)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _not_exited(workers: int) -> str:
    return f"{_count(workers, 'worker')} {'has' if workers == 1 else 'have'} not exited"


def _workers(fleet: Fleet, facts: Facts) -> Iterator[Wait]:
    """Yield waits for single workers of the serving generation, one for each kind of wait."""
    serving = fleet.of(Phase.SERVING)
    if serving is None or fleet.stopping:
        return
    number, why = facts.last_exit
    died = f": {why}" if why and number == serving.number else ""
    for kind, timer, awaited in (
        ("respawn", TimerKind.WORKER_RESPAWN, f"restart delayed after a quick death{died}"),
        ("worker", TimerKind.WORKER_START, "not ready yet"),
        ("worker", TimerKind.WORKER_KILL, "signalled, not exited yet"),
    ):
        limits = (_time_left(facts, timer, worker.number) for worker in serving.workers)
        waits_s = [left_s for left_s in limits if left_s is not None]
        if waits_s:
            reason = f"{_count(len(waits_s), 'worker')} of generation {serving.number}: {awaited}"
            yield Wait(kind, reason, serving.number, min(waits_s))
    reported = {
        d.target for d in fleet.timers if d.wait in (TimerKind.WORKER_START, TimerKind.WORKER_KILL)
    }
    finishing = [
        worker
        for worker in serving.workers  # a starting worker without a timer has been sent KILL
        if worker.state in (State.STARTING, State.RETIRING, State.ORPHANED)
        and worker.number not in reported
    ]
    if finishing:
        retire_limits = [_time_left(facts, TimerKind.WORKER_RETIRE, w.number) for w in finishing]
        known = [left_s for left_s in retire_limits if left_s is not None]
        what = _count(len(finishing), "worker")
        reason = f"{what} of generation {serving.number}: finishing, not exited yet"
        yield Wait("worker", reason, serving.number, min(known, default=None))
    waiting = [
        worker
        for worker in serving.workers
        if not worker.alive
        and Deadline(TimerKind.WORKER_RESPAWN, worker.number) not in fleet.timers
    ]
    wait_for_end = rollout.waits_to_replace(fleet, serving)
    until_end = [each for each in waiting if each.replaces and wait_for_end]
    for_room = len(waiting) - len(until_end) if not rollout.room(fleet, 1, serving) else 0
    for count, awaited in (
        (len(until_end), "waiting for the end of the reload"),
        (for_room, _room(fleet, facts)),
    ):
        if count:
            reason = f"{_count(count, 'worker')} of generation {serving.number}: {awaited}"
            yield Wait("worker", reason, serving.number)
