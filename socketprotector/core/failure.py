"""Fails a generation, and decides which generation gets the clients instead.

Pure.  If the previous generation still serves, it keeps the clients, or gets them back.  Otherwise
the last good command starts.  At a first start there is no such command, and the start fails.
"""

from __future__ import annotations

from collections.abc import Collection

from ..model.backoff import backoff_s
from ..model.lazy_dataclass import replace
from ..model.policy import PROVEN_S, Policy
from ..model.ready_kinds import KINDS
from ..model.share import WHOLE
from ..model.text import in_units
from . import rollout, stop
from .actions import Report, ReportKind, RouteTo
from .events import TimerKind
from .fleet import Generation, Next, Phase, State, Worker
from .step import Step

#: The exit status of SocketProtector after a start that failed.
START_FAILED = 3
#: Why a worker or generation is missing.  The protector's death is to blame, not the release.
STARTING_WHEN_KILLED = "it was starting when the protector was killed"
NOT_STORED = "the worker's descriptors were not stored when the protector was killed"


def open_failed(step: Step, number: int, reason: str, orphans: Collection[int]) -> None:
    """Fail a generation that could not be opened.

    orphans: these workers may be running, but we have no descriptor to signal them.
    """
    generation = step.fleet.generation(number)
    if generation is None or generation.phase not in (Phase.STARTING, Phase.ABANDONED):
        return
    # Only `orphans` may have been spawned, even if a stop has abandoned the generation.
    running = [each for each in generation.alive if each.number in orphans]
    workers = tuple(Worker(each.number, each.slot, State.ORPHANED) for each in running)
    step.fleet = step.fleet.with_generation(replace(generation, workers=workers))
    if generation.phase is Phase.STARTING:
        fail(step, number, reason)


def start_timed_out(step: Step, number: int, advice: str) -> None:
    """Fail a generation that was not ready in time.

    If the missing workers have no room to start (rollout.lacks_room()), wait again.
    advice: the likely cause, for people.
    """
    starting = step.fleet[number]
    policy = step.fleet.policy_of(starting.fresh)
    if rollout.lacks_room(step.fleet, starting):
        step.start(TimerKind.START, number, policy.start_timeout_s)
    else:
        fail(step, number, not_ready_reason(policy, advice))


def not_ready_reason(policy: Policy, advice: str) -> str:
    """Return the reason of a start timeout.  advice: see DeadlinePassed."""
    # The reason names the missing message: a program that never sends READY looks like a slow one.
    hint = KINDS[policy.ready].hint if policy.ready in KINDS else ""
    hints = "; ".join(filter(None, (advice, hint)))
    return f"not ready within {in_units(policy.start_timeout_s)} (--start-timeout); {hints}"


def fail(step: Step, number: int, reason: str, *, retry: bool = False) -> None:
    """Fail a starting or settling generation, and decide what follows.

    If the generation was settling, the route returns to the serving generation.
    retry: a first start may try again (--start-tries).
    """
    serving, failed = step.fleet.of(Phase.SERVING), step.fleet[number]
    settles = failed.phase is Phase.SETTLING
    step.take_back(failed)
    if not step.fleet.served:
        _first_start_failed(step, number, reason, retry=retry)
    elif serving and not failed.fresh and step.fleet.reload_wanted:
        step.do(Report(ReportKind.RETRYING, number, reason))  # the queued reload brings the verdict
    elif serving or failed.fresh or settles:
        step.report_failure(number, reason)
        if not serving:  # stop-first, or the channel of the old generation broke
            recover(step, 0.0)
    else:
        step.do(Report(ReportKind.RETRYING, number, reason))
        recover(step, _count_failure(step))


def settle_failed(step: Step, number: int, reason: str) -> None:
    """Roll back to the previous generation, if it still serves."""
    generation = step.fleet.generation(number)
    if generation and generation.phase is Phase.SETTLING and step.fleet.of(Phase.SERVING):
        fail(step, number, reason)


def end_stuck(step: Step, generation: Generation, worker: Worker, reason: str) -> None:
    """End a stuck worker without a replacement; fail its generation at once if another serves.

    If none serves, the worker's exit may fail its generation.
    """
    fails = bool(step.fleet.of(Phase.SERVING) or step.fleet.rollout)
    if fails and generation.phase is Phase.SETTLING:
        fail(step, generation.number, reason)  # first, so that clients already go elsewhere
    step.end_worker(worker)
    if fails and generation.phase is Phase.STARTING:
        fail(step, generation.number, reason)  # last, so that ABRT comes before TERM


def untaken(step: Step, number: int, reason: str) -> None:
    """Roll back a rollout whose new workers accept no client; without a rollout, do nothing."""
    if step.fleet.rollout:
        settle_failed(step, number, reason)


def _count_failure(step: Step) -> float:
    """Count a failure while no other generation serves; return the pause before the next start."""
    failed = step.fleet.failed_starts + 1
    step.fleet = replace(step.fleet, failed_starts=failed)
    return backoff_s(failed)


def _first_start_failed(step: Step, number: int, reason: str, *, retry: bool) -> None:
    _count_failure(step)
    if retry and step.fleet.failed_starts < step.fleet.policy.start_tries:
        step.do(Report(ReportKind.RETRYING, number, reason))
        step.fleet = replace(step.fleet, to_open=Next.FRESH)
    else:
        step.fleet = replace(step.fleet, exit_status=START_FAILED)
        step.do(Report(ReportKind.START_FAILED, number, reason))
        stop.stop_quickly(step)


def socket_lost(step: Step, number: int) -> None:
    """Fail a starting generation that lost a socket: it could not accept all clients.

    A generation with a share of the clients fails, too: the serving generation can accept them all.
    """
    generation = step.fleet.generation(number)
    if generation and (generation.phase is Phase.STARTING or generation == step.fleet.sharing):
        reason = "a worker broke its listening socket, or another program removed its socket file"
        fail(step, number, reason)


def channel_broken(step: Step, number: int, served_s: float) -> None:
    """Replace a serving generation whose channel has broken; fail a starting or settling one."""
    generation = step.fleet.generation(number)
    phase = generation.phase if generation else None
    if phase not in (Phase.STARTING, Phase.SETTLING, Phase.SERVING):
        return  # no new connections go through this channel
    reason = "a worker shut down the channel"
    step.do(Report(ReportKind.BROKEN, number, reason))
    if phase is Phase.SERVING:
        _serving_broken(step, number, served_s)
    else:
        fail(step, number, reason)


def _serving_broken(step: Step, number: int, served_s: float) -> None:
    settling, current_rollout = step.fleet.of(Phase.SETTLING), step.fleet.rollout
    if settling is None:
        step.do(RouteTo(None))
    elif step.fleet.sharing and current_rollout:
        # The settling generation gets all clients: a canary now only settles, and a rolling reload
        # starts all workers.
        is_canary = current_rollout.canary is not None
        rollout_left = None if is_canary else replace(current_rollout, share=WHOLE)
        step.fleet = replace(step.fleet, rollout=rollout_left)
        step.do(RouteTo(settling.number))
    step.drain(number, step.fleet.policy.drain_limit_s)
    if step.fleet.stopping:
        step.close_listeners()  # no worker can serve clients still in the backlog
        return
    if served_s >= PROVEN_S:
        step.fleet = replace(step.fleet, failed_starts=0)
    delay_s = _count_failure(step)
    fleet = step.fleet
    reload_begun = fleet.to_open is Next.FRESH and not fleet.dry_run  # its caller awaits a verdict
    if fleet.incoming is None and not reload_begun:
        recover(step, delay_s)


def recover(step: Step, delay_s: float) -> None:
    """Open the last good command again, because no generation serves."""
    step.fleet = replace(step.fleet, to_open=Next.LAST_GOOD)
    if delay_s > 0:
        step.start(TimerKind.OPEN, 0, delay_s)
