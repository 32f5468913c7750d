"""What follows from an event: `decide(fleet, event) -> (fleet, actions)`.

Pure: no clock, process, socket or logger.  Time comes in as events and goes out as
StartTimer.  Each event is handled first (reload.py, workers.py, stop.py); then `_go_on` does
what has become possible, whatever the event was.  A late event finds its subject
gone, and changes nothing.

The order of the actions is part of the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from . import reload, stop, workers
from .events import (
    Action,
    BacklogEmptied,
    ChannelBroken,
    CloseListeners,
    Deadline,
    DeadlinePassed,
    Drain,
    Event,
    Hold,
    HoldReleased,
    HoldRequested,
    KillRequested,
    Launched,
    ListenersLost,
    OpenFailed,
    Quiesce,
    Quiesced,
    ReadSettings,
    Release,
    ReloadRequested,
    RenewRequested,
    ReplaceRequested,
    Retire,
    RouteTo,
    ScaleRequested,
    SettingsFailed,
    SettingsRead,
    Signal,
    StartTimer,
    StopRequested,
    Stranded,
    TimeExtended,
    TimerKind,
    UseSettings,
    WorkerExited,
    WorkerReady,
)
from .fleet import PHASES, Fleet, Phase, Stop
from .start_failure import not_ready
from .step import Step


def decide(fleet: Fleet, event: Event) -> tuple[Fleet, tuple[Action, ...]]:
    """Say what follows from one event.  Never raises for an event that comes late."""
    if fleet.exiting:
        return fleet, ()
    step = Step(fleet)
    _answer(step, event)
    _go_on(step)
    return step.fleet, tuple(step.actions)


def _answer(step: Step, event: Event) -> None:
    match event:
        case Launched():
            reload.launched(step)
        case ReloadRequested():
            reload.reload_requested(step)
        case StopRequested(quick):
            stop.stop_requested(step, quick)
        case ScaleRequested(change, to):
            workers.scale_requested(step, change, to)
        case HoldRequested(seconds):
            stop.hold_requested(step, seconds)
        case HoldReleased():
            stop.release_hold(step)
        case RenewRequested():
            reload.renew_requested(step)
        case KillRequested(number):
            workers.kill_requested(step, number)
        case ReplaceRequested(number, reason, hung):
            workers.replace_requested(step, number, reason, hung=hung)
        case WorkerReady(number, retires):
            workers.worker_ready(step, number, retires)
        case WorkerExited():
            workers.worker_exited(step, event)
        case OpenFailed(number, reason):
            reload.open_failed(step, number, reason)
        case Quiesced(number):
            step.quiesced(number)
        case Stranded():
            reload.stranded(step)
        case ChannelBroken(number, served_s):
            reload.channel_broken(step, number, served_s)
        case TimeExtended(number, seconds):
            workers.time_extended(step, number, seconds)
        case ListenersLost():
            stop.listeners_lost(step)
        case BacklogEmptied():
            stop.backlog_emptied(step)
        case SettingsRead(policy, wanted):
            reload.settings_read(step, policy, wanted)
        case SettingsFailed(reason):
            reload.settings_failed(step, reason)
        case DeadlinePassed(deadline, advice):
            if deadline in step.fleet.timers:  # else it crossed its CancelTimer
                step.fleet = replace(step.fleet, timers=step.fleet.timers - {deadline})
                _deadline_passed(step, deadline, advice)


def _deadline_passed(step: Step, deadline: Deadline, advice: str) -> None:
    number = deadline.target
    match deadline.wait:
        case TimerKind.START:
            policy = step.fleet.policy_of(step.fleet.is_fresh(number))
            reload.abandon(step, number, not_ready(policy, advice), retry=False)
        case TimerKind.SETTLE:
            reload.promote(step, number)
        case TimerKind.DRAIN:
            step.end_generation(number)
        case TimerKind.KILL:
            step.kill_generation(number)
        case TimerKind.OPEN | TimerKind.TURN:
            pass  # `_go_on` opens, or starts, what is due
        case TimerKind.HOLD:
            stop.release_hold(step)
        case TimerKind.STOP:
            stop.stop_quickly(step)
        case _:
            workers.worker_waited(step, deadline.wait, number)


def _go_on(step: Step) -> None:
    """Do what has become possible; wherever nothing has, this changes nothing."""
    reload.serve_if_ready(step)
    reload.begin_if_wanted(step)
    _release_what_is_gone(step)
    reload.open_if_due(step)
    workers.reconcile(step)
    stop.exit_if_done(step)


def _release_what_is_gone(step: Step) -> None:
    for generation in step.fleet.generations:
        if not generation.workers and None in PHASES[generation.phase]:
            step.cancel(TimerKind.DRAIN, generation.number)
            step.cancel(TimerKind.KILL, generation.number)
            left = tuple(g for g in step.fleet.generations if g.number != generation.number)
            step.fleet = replace(step.fleet, generations=left)
            step.do(Release(generation.number))


def resume(
    fleet: Fleet,
    left_s: Mapping[Deadline, float],
    undone: Iterable[Signal | Retire | UseSettings] = (),
) -> tuple[Action, ...]:
    """Say what brings the world to what a fleet says, when another program stopped midway.

    Every action can be done again without harm.  `left_s`: seconds left of each timer; one
    that is not known runs out at once.  `undone`: what the other program was about to do and
    the fleet does not tell; to tell all workers again that are to end would be a second TERM,
    which many programs take for "at once".
    """
    route = fleet.route
    actions: list[Action] = [Hold(True)] if fleet.held else []
    actions += [RouteTo(route.number if route else None)]
    draining = fleet.all_of(Phase.DRAINING)
    actions += [Quiesce(g.number) if g.quiescing else Drain(g.number) for g in draining]
    actions += undone
    if fleet.reading:
        actions.append(ReadSettings())
    if fleet.stopping:
        quick = fleet.stopping is Stop.QUICK or not fleet.listeners_open
        actions.append(CloseListeners(quick))
    actions += [StartTimer(each, max(0.0, left_s.get(each, 0.0))) for each in fleet.timers]
    return tuple(actions)
