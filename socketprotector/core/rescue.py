"""Rescues: start workers for clients that wait at a socket without workers.

Pure.  A rescue opens the last good command again, and its workers accept these clients.  A
requested reload waits until the rescue is over.  Rescues are needed only under --handoff listener:
after a failed release, a hold or the loss of a socket.
"""

from __future__ import annotations

from ..model.backoff import backoff_s
from ..model.lazy_dataclass import replace
from .actions import Report, ReportKind
from .events import TimerKind
from .fleet import Fleet, Phase
from .reload import call_off_dry_run, has_failed, renew
from .step import Step

#: The verdict of a starting or settling generation when clients of a hold wait.
HELD_FIRST = "called off: clients that waited during the hold come first"
#: The verdict of an unopened release when clients wait where no worker accepts.
STRANDED_FIRST = "called off: clients at a socket without workers come first"
#: Why a settling generation of the last good command is promoted early.
SETTLED_BY_HOLD = "before --settle was over: clients of a hold are waiting"


def rescue(step: Step, number: int) -> None:
    """Open the last good command to accept the clients that an ended generation left waiting.

    This is needed only after a failed release, or if an unopened release would get these clients.
    If the last good command fails, too, Stranded events follow, at growing intervals.
    """
    fleet, ended = step.fleet, step.fleet.generation(number)
    if (ended is not None and ended.workers) or not fleet.policy.has_two_places:
        return
    if ended is not None and ended.fresh and has_failed(fleet, ended):
        renew(step)
    elif _is_unopened(fleet):
        serve_stranded(step)


def serve_held(step: Step) -> None:
    """Open the last good command to accept clients of a hold, even during a reload.

    Only two generations can accept at once, so the incoming generation must make room:

    * A release is taken back, and its reload is queued again.
    * A dry run fails.
    * If the last good command is settling, its generation is promoted early.
    * If the last good command is starting, we wait until it serves.
    """
    serving, incoming = step.fleet.of(Phase.SERVING), step.fleet.incoming
    if not serving or step.fleet.stopping:
        return
    if not incoming:
        if step.fleet.stop_awaits_rescue:
            _serve_held_before_stop(step)
        return  # otherwise a Stranded event follows
    if incoming.phase is Phase.STARTING and not incoming.fresh:
        return
    if step.fleet.dry_run:
        call_off_dry_run(step, HELD_FIRST)
    elif not incoming.fresh:
        step.promote(incoming.number, SETTLED_BY_HOLD)
    else:
        canary = step.fleet.rollout.canary if step.fleet.rollout else None
        step.take_back(incoming)
        step.do(Report(ReportKind.RETRYING, incoming.number, HELD_FIRST))
        step.requeue_reload(canary)
    renew(step)


def _serve_held_before_stop(step: Step) -> None:
    """Open the last good command, after a pause if it has failed; --stop-timeout limits the tries.

    If no client waits, no HeldClientsWait event comes, and the stop continues.
    """
    pause_s = backoff_s(step.fleet.failed_starts)
    if renew(step):
        step.fleet = replace(step.fleet, failed_starts=step.fleet.failed_starts + 1)
        if pause_s > 0:
            step.start(TimerKind.OPEN, 0, pause_s)


def serve_stranded(step: Step) -> None:
    """Open the last good command to accept clients that wait at a socket without workers.

    An unopened release would get these clients before it is ready, and lose them if it fails.
    """
    fleet = step.fleet
    if _is_unopened(fleet) and fleet.of(Phase.SERVING):
        if fleet.dry_run:
            call_off_dry_run(step, STRANDED_FIRST)
        else:
            step.forget_settings()
            number = fleet.next_generation
            step.do(Report(ReportKind.RETRYING, number, STRANDED_FIRST))
            # Use up this number: the caller of a reload that was requested meanwhile awaits the
            # verdict of `number + 1` (Fleet.next_reload).
            step.fleet = replace(step.fleet, to_open=None, next_generation=number + 1)
            step.requeue_reload(fleet.rollout.canary if fleet.rollout else None)
    renew(step)


def _is_unopened(fleet: Fleet) -> bool:
    """Return whether a reload or dry run has begun, and no generation is starting or settling."""
    return fleet.has_unopened and not fleet.incoming
