"""Stops: graceful (workers finish their connections) or quick (TERM now); lame duck and hold.

Pure.  A stop calls off all pending work.  During a stop, a worker is started only for queued
clients that no other worker or generation can serve.

A lame duck (--lame-duck) may precede a graceful stop.  Balancers are asked to send clients
elsewhere.  Serving continues, and so does a reload under way, but no new request begins.

Under --handoff listener, clients of a hold may need another generation to accept them.  So a
graceful stop first ends the hold, and waits until that generation serves (rescue.py).
"""

from __future__ import annotations

from ..model.lazy_dataclass import replace
from ..model.text import in_units
from . import rollout
from .actions import CloseListeners, Exit, Hold, Report, ReportKind, RouteTo
from .events import Deadline, TimerKind
from .fleet import Fleet, Generation, LameDuck, Next, Phase, Stop
from .step import Step

#: The exit status of a stop because no client can connect (errors.SystemRefused).
LISTENERS_LOST = 111
#: The verdict of a reload or a dry run that a stop calls off.
CALLED_OFF = "called off: the protector is stopping"
#: Why a settling generation is promoted: a rollback is no longer possible.
SETTLED_BY_STOP = "before --settle was over: the protector is stopping"


def stop_requested(step: Step, quick: bool) -> None:
    """Begin a stop, or its next stage: a lame duck, a graceful stop, a quick stop."""
    fleet = step.fleet
    if fleet.stopping or fleet.stop_awaits_rescue:
        stop_quickly(step)  # during a quick stop this changes nothing
    elif quick:
        step.do(Report(ReportKind.STOPPING))
        stop_quickly(step)
    elif fleet.policy.lame_duck_s > 0 and fleet.served and not fleet.stop_requested:
        _begin_lame_duck(step)
    else:
        stop_gracefully(step)


def _begin_lame_duck(step: Step) -> None:
    policy = step.fleet.policy
    end_hold(step)  # so that clients in the backlog are served
    step.fleet = replace(step.fleet, lame_duck=LameDuck.STOPPING)
    reason = f"still serving; the stop begins in {in_units(policy.lame_duck_s)}"
    step.do(Report(ReportKind.LAME_DUCK, reason=reason))
    step.start(TimerKind.LAME_DUCK, 0, policy.lame_duck_s)
    if policy.lame_duck_idle_s > 0:
        step.start(TimerKind.LAME_DUCK_IDLE, 0, policy.lame_duck_idle_s)


def lame_duck_requested(step: Step, on: bool) -> None:
    """Ask balancers to send clients elsewhere, or back; serving continues."""
    if step.fleet.stop_requested:
        step.do(Report(ReportKind.REFUSED, reason="a stop is in progress"))
        return
    wanted = LameDuck.ON if on else LameDuck.OFF
    if step.fleet.lame_duck is not wanted:
        step.fleet = replace(step.fleet, lame_duck=wanted)
        step.do(Report(ReportKind.LAME_DUCK_ON if on else ReportKind.LAME_DUCK_OFF))


def stop_gracefully(step: Step, reason: str = "") -> None:
    """Begin a graceful stop; reason: why, if no operator requested it."""
    step.do(Report(ReportKind.STOPPING, reason=reason))
    fleet = step.fleet
    may_wait = fleet.policy.has_two_places and (fleet.held or fleet.is_renewing)
    if may_wait and fleet.of(Phase.SERVING):
        _call_off(step, None)
        # Failures from before the serving generation became ready must not delay a rescue.
        step.fleet = replace(step.fleet, failed_starts=0)
        step.start(TimerKind.STOP, 0, fleet.policy.stop_timeout_s)
    else:
        _serve_backlog(step)


def stop_if_rescued(step: Step) -> None:
    """Continue a waiting stop once no client of a hold needs another generation.

    Such clients are reported by a HeldClientsWait event, perhaps only after a hold or a start has
    ended.  So first let the loop turn.
    """
    fleet, before = step.fleet, step.before
    if _may_renew(fleet):
        return
    if not before.stop_awaits_rescue or _may_renew(before):
        step.start(TimerKind.TURN, 0, 0.0)
    elif Deadline(TimerKind.TURN) not in fleet.timers:
        _serve_backlog(step)


def _may_renew(fleet: Fleet) -> bool:
    """Return whether the last good command starts, or has failed and may start again.

    Until the last worker of a failed start has exited, no HeldClientsWait event can come.
    """
    abandoned = fleet.all_of(Phase.ABANDONED)
    return fleet.is_renewing or any(each.workers and not each.fresh for each in abandoned)


def _serve_backlog(step: Step) -> None:
    """Accept only the clients that have already connected, and let all workers finish."""
    _call_off(step, Stop.GRACEFUL)
    if serving := step.fleet.route:
        step.do(CloseListeners(quick=False))
        step.spawn_one(serving)  # without a worker the backlog may never be empty
    else:
        # No worker can serve the waiting clients; draining workers still finish theirs.
        step.close_listeners()
    if step.fleet.generations and Deadline(TimerKind.STOP) not in step.fleet.timers:
        step.start(TimerKind.STOP, 0, step.fleet.policy.stop_timeout_s)


def listeners_lost(step: Step) -> None:
    """Stop with a failure, because no client can connect: systemd restarts us."""
    if step.fleet.stopping or step.fleet.stop_awaits_rescue:
        return
    if not step.fleet.stop_requested:
        step.fleet = replace(step.fleet, exit_status=LISTENERS_LOST)
    stop_gracefully(step, "no listener is left")


def backlog_emptied(step: Step) -> None:
    """Drain the serving generation: all clients from before the stop are delivered."""
    if step.fleet.stopping is not Stop.GRACEFUL:
        return
    step.fleet = replace(step.fleet, listeners_open=False)
    serving = step.fleet.of(Phase.SERVING)
    if serving:
        # With a route, Drain would reclaim clients and send them to the same generation again.
        step.do(RouteTo(None))
        step.drain(serving.number, 0.0)


def stop_quickly(step: Step) -> None:
    """Close the listeners and end all workers, without waiting for their connections."""
    if step.fleet.route:
        step.do(RouteTo(None))
    _call_off(step, Stop.QUICK)
    step.cancel(TimerKind.STOP)
    step.close_listeners()
    for generation in step.fleet.generations:
        if generation.phase in (Phase.SERVING, Phase.SETTLING):
            step.end_settling(generation.number)
            step.drain(generation.number, 0.0)
        step.end_generation(generation.number)


def _call_off(step: Step, stop: Stop | None) -> None:
    """Call off all pending work, with a verdict for each reload and dry run.

    stop: None while the stop waits for a rescue; then a start of the last good command continues.
    A queued reload gets its verdict later, from reload.begin_if_wanted().
    """
    for wait in (TimerKind.OPEN, TimerKind.LAME_DUCK, TimerKind.LAME_DUCK_IDLE):
        step.cancel(wait)
    _lift_hold(step)  # so that clients in the backlog are served
    before = step.fleet
    renews, incoming = stop is None and before.is_renewing, before.incoming
    step.fleet = replace(
        before,
        stopping=stop,
        lame_duck=LameDuck.OFF if stop else LameDuck.STOPPING,
        to_open=before.to_open if renews else None,
    )
    settles = bool(incoming and incoming.phase is Phase.SETTLING and stop is not Stop.QUICK)
    if incoming and settles and before.rollout and before.of(Phase.SERVING):
        step.take_back(incoming)  # only a part of its rollout is over
        step.report_failure(incoming.number, CALLED_OFF)
    elif incoming and settles:
        step.promote(incoming.number, SETTLED_BY_STOP)  # it serves the last clients
    elif incoming and not renews:
        _call_off_incoming(step, incoming)
    if stop is Stop.GRACEFUL and step.fleet.policy.stop_spread_s > 0:
        for generation in step.fleet.all_of(Phase.DRAINING):
            step.end_evenly(generation)
    step.forget_settings()
    if not renews:
        if _has_unopened(before):
            step.fail_unopened(CALLED_OFF)
        step.fleet = replace(step.fleet, rollout=None)


def _call_off_incoming(step: Step, incoming: Generation) -> None:
    number = incoming.number
    starting = incoming.phase is Phase.STARTING
    if starting:
        step.end_start(number)
        step.fleet = step.fleet.moved(number, Phase.ABANDONED)
    # A first start has its own verdict; a recovery after a failure has none.
    recovers = starting and not incoming.fresh and step.fleet.of(Phase.SERVING) is None
    if step.fleet.served and not recovers:
        step.report_failure(number, CALLED_OFF)
    if starting:
        step.end_generation(number)


def _has_unopened(fleet: Fleet) -> bool:
    """Return whether a reload, dry run or replacement has begun and has no generation yet."""
    if not fleet.served:
        return False  # only the first start, which has its own verdict
    if fleet.reading or fleet.to_open is Next.FRESH:
        return True
    if fleet.candidate:
        return not (fleet.incoming and fleet.incoming.fresh)
    return fleet.to_open is not None and fleet.of(Phase.SERVING) is not None


def hold_requested(step: Step, seconds: float, left_s: float | None) -> None:
    """Accept no client for this long; another request restarts the time.

    left_s: how much time a settling generation has left, and still has after the hold.
    """
    if step.fleet.stop_requested:
        step.do(Report(ReportKind.REFUSED, reason="cannot hold: a stop is in progress"))
        return
    # `socketprotectorctl hold` repeats its request at intervals.  Each request gives more time only
    # to a stage that began before the hold: a stage that began during the hold may end.
    delays_stage = not step.fleet.held or step.fleet.stage_left_s is not None
    if not step.fleet.held:
        step.fleet = replace(step.fleet, held=True, stage_left_s=left_s)
        step.do(Hold(True), Report(ReportKind.HELD))
    step.start(TimerKind.HOLD, 0, seconds)
    if delays_stage:
        rollout.resume_stage(step, seconds)


def end_hold(step: Step) -> None:
    """End the hold, if there is one; the time of a settling generation runs again."""
    if step.fleet.held:
        _lift_hold(step)
        rollout.resume_stage(step)


def _lift_hold(step: Step) -> None:
    if step.fleet.held:
        step.cancel(TimerKind.HOLD)
        step.fleet = replace(step.fleet, held=False)
        step.do(Hold(False), Report(ReportKind.RELEASED))


def exit_if_done(step: Step) -> None:
    """Exit once a stop has ended all generations."""
    fleet = step.fleet
    if not fleet.generations:
        step.cancel(TimerKind.STOP)
        step.cancel(TimerKind.TURN)
        step.fleet = replace(step.fleet, exiting=True)
        step.do(Exit(fleet.exit_status))
