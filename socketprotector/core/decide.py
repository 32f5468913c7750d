"""The one decision function: `decide(fleet, event) -> (fleet, actions)`.

Pure: no clock, process, socket or logger.  Time comes in as events and goes out as
StartTimer.  First, `_handle` calls the function that handles the event.  Then `_advance` takes
every step that has become possible.  An event changes nothing if its generation or worker is gone.

The order of the actions is part of the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..model.lazy_dataclass import replace
from . import events, failure, reload, rescue, rollout, stop, workers
from .actions import (
    Action,
    CheckSettling,
    CloseListeners,
    Drain,
    Hold,
    Probe,
    Quiesce,
    Release,
    RouteTo,
    Signal,
    StartTimer,
    UseSettings,
    WorkerSignal,
)
from .events import Deadline, Event, TimerKind
from .fleet import PHASES, Fleet, Phase, Stop
from .step import Step


def decide(fleet: Fleet, event: Event) -> tuple[Fleet, tuple[Action, ...]]:
    """Return the new fleet, and the actions that follow from one event.

    Never raises, not even for an event whose generation or worker is gone.
    """
    if fleet.exiting:
        return fleet, ()
    step = Step(fleet)
    _handle(step, event)
    _advance(step)
    return step.fleet, tuple(step.actions)


def _handle(step: Step, event: Event) -> None:
    match event:
        case events.Launched():
            reload.launched(step)
        case events.ReloadRequested(canary, release):
            reload.reload_requested(step, canary, release)
        case events.PromoteRequested(now, met):
            rollout.promote_requested(step, met, now=now)
        case events.RollbackRequested():
            reload.rollback_requested(step)
        case events.DryRunRequested(release):
            reload.dry_run_requested(step, release)
        case events.StopRequested(quick):
            stop.stop_requested(step, quick)
        case events.LameDuckRequested(on):
            stop.lame_duck_requested(step, on)
        case events.ScaleRequested(change, to):
            workers.scale_requested(step, change, to)
        case events.HoldRequested(seconds, left_s):
            stop.hold_requested(step, seconds, left_s)
        case events.HoldReleased():
            stop.end_hold(step)
        case events.RenewRequested():
            reload.renew_requested(step)
        case events.KillRequested(number):
            workers.kill_requested(step, number)
        case events.ReplaceRequested(number, reason, hung):
            workers.replace_requested(step, number, reason, hung=hung)
        case events.WorkerReady(number, retires, alone):
            workers.worker_ready(step, number, retires, alone=alone)
        case events.WorkerExited():
            workers.worker_exited(step, event)
        case events.OpenFailed(number, reason, orphans):
            failure.open_failed(step, number, reason, orphans)
        case events.Quiesced(number):
            step.quiesced(number)
        case events.Answered(number, alone):
            reload.answered(step, number, alone)
        case events.SettleFailed(number, reason):
            failure.settle_failed(step, number, reason)
        case events.Untaken(number, reason):
            failure.untaken(step, number, reason)
        case events.HandingOver():
            reload.call_off_dry_run(step, reload.UPGRADED)
        case events.Stranded():
            rescue.serve_stranded(step)
        case events.HeldClientsWait():
            rescue.serve_held(step)
        case events.SocketLost(number):
            failure.socket_lost(step, number)
        case events.ChannelBroken(number, served_s):
            failure.channel_broken(step, number, served_s)
        case events.TimeExtended(number, seconds):
            workers.time_extended(step, number, seconds)
        case events.ListenersLost():
            stop.listeners_lost(step)
        case events.BacklogEmptied():
            stop.backlog_emptied(step)
        case events.SettingsRead(policy, wanted):
            reload.settings_read(step, policy, wanted)
        case events.SettingsFailed(reason):
            reload.settings_failed(step, reason)
        case events.DeadlinePassed(deadline):
            if deadline in step.fleet.timers:  # otherwise an earlier event has cancelled it
                step.fleet = replace(step.fleet, timers=step.fleet.timers - {deadline})
                _deadline_passed(step, event)


def _deadline_passed(step: Step, passed: events.DeadlinePassed) -> None:
    deadline = passed.deadline
    number = deadline.target
    match deadline.wait:
        case TimerKind.START:
            failure.start_timed_out(step, number, passed.advice)
        case TimerKind.SETTLE:
            reload.settled(step, number, passed.met, stuck=passed.stuck)
        case TimerKind.DRAIN:
            step.end_generation(number)
        case TimerKind.KILL:
            step.kill_generation(number)
        case TimerKind.WORKER_START | TimerKind.WORKER_RETIRE:
            workers.too_slow(step, number)
        case TimerKind.WORKER_KILL:
            if step.fleet.find(number) is not None:
                step.do(Signal(number, WorkerSignal.KILL))
        case TimerKind.OPEN | TimerKind.TURN | TimerKind.WORKER_RESPAWN:
            pass  # `_advance` opens the generation or starts the workers that are due now
        case TimerKind.HOLD:
            stop.end_hold(step)
        case TimerKind.LAME_DUCK | TimerKind.LAME_DUCK_IDLE:
            stop.stop_gracefully(step)
        case TimerKind.STOP:
            stop.stop_quickly(step)


def _advance(step: Step) -> None:
    """Take every step that has become possible; if there is none, change nothing.

    The first use of a name of stop.py loads that module (system/late_modules.py).  So without a
    stop this function uses no such name.
    """
    # This comes first: if the dry run passed instead, the last good command would not start.
    reload.call_off_unserved_dry_run(step)
    reload.serve_if_ready(step)
    if step.fleet.rollout:
        rollout.advance(step)
    if step.fleet.stop_awaits_rescue:
        stop.stop_if_rescued(step)
    reload.begin_if_wanted(step)
    _release_gone_generations(step)
    reload.open_if_due(step)
    workers.reconcile(step)
    reload.probe_if_complete(step)
    if step.fleet.stopping:
        stop.exit_if_done(step)


def _release_gone_generations(step: Step) -> None:
    for generation in step.fleet.generations:
        if not generation.workers and None in PHASES[generation.phase]:
            step.cancel(TimerKind.DRAIN, generation.number)
            step.cancel(TimerKind.KILL, generation.number)
            remaining = tuple(g for g in step.fleet.generations if g.number != generation.number)
            step.fleet = replace(step.fleet, generations=remaining)
            step.do(Release(generation.number))


def route_of(fleet: Fleet) -> RouteTo:
    """Return the order that sends new connections to the generations that the fleet names."""
    route, sharing = fleet.route, fleet.sharing
    if route and sharing and fleet.rollout:
        return RouteTo(route.number, sharing.number, fleet.rollout.share)
    return RouteTo(route.number if route else None)


def resume(
    fleet: Fleet,
    left_s: Mapping[Deadline, float],
    undone: Iterable[Action] = (),
) -> tuple[Action, ...]:
    """Return the actions that make the world match a fleet, after the previous program has ended.

    Each action can be repeated without harm.
    left_s: seconds left of each timer; a timer without an entry runs out at once.
    undone: actions that the previous program ordered and perhaps did not carry out.  The state
    lists them, because we must not simply repeat TERM to all ending workers: on a second TERM many
    programs exit at once.
    """
    undone = tuple(undone)
    actions: list[Action] = [Hold(True)] if fleet.held else []
    actions += [route_of(fleet)]
    # UseSettings comes before the drains: the old generation must get the clients of a removed
    # listener before it drains.
    actions += [each for each in undone if isinstance(each, UseSettings)]
    for generation in fleet.all_of(Phase.DRAINING):
        order = Quiesce if generation.quiescing else Drain
        if order is Drain and fleet.policy.spreads:
            step = Step(fleet)
            step.end_evenly(generation)
            actions += step.actions
        actions.append(order(generation.number))
    starting = fleet.of(Phase.STARTING)
    if starting and reload.must_probe(fleet, starting):
        actions.append(Probe(starting.number))
    settling = fleet.of(Phase.SETTLING)
    if settling and settling.checked:
        actions.append(CheckSettling(settling.number))
    actions += [each for each in undone if not isinstance(each, UseSettings)]
    if fleet.reading:
        actions.append(rollout.read_settings(fleet))
    if fleet.stopping:
        quick = fleet.stopping is Stop.QUICK or not fleet.listeners_open
        actions.append(CloseListeners(quick))
    # The state does not record when the last client came, so this timer starts again.
    left_s = {**left_s, Deadline(TimerKind.LAME_DUCK_IDLE): fleet.policy.lame_duck_idle_s}
    actions += [StartTimer(each, max(0.0, left_s.get(each, 0.0))) for each in fleet.timers]
    return tuple(actions)
