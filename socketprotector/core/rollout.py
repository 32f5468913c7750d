"""Rollouts: a new generation gets its clients, or its workers, in stages.

Pure.  A canary (`reload --canary 5% --for 60s`) has a share of the new clients first.  Under
--reload-order rolling the workers are replaced a few at a time, and the share of the new clients
follows the ready workers.  In both cases the new generation is settling: the previous one can take
the clients back.  No list of steps is stored.  The stage follows from the fleet:

* A canary with a share below WHOLE: this stage ends when the SETTLE timer runs out.
* A canary with the share WHOLE: it has all clients for --settle, measured by the same timer.
* Rolling, while the SETTLE timer runs: the first new workers settle beside all old workers.
* Rolling, without the timer: `Fleet.wanted_in` says how many workers each generation should have,
  and `room` limits the processes.

A stage proves nothing while a hold keeps clients out.  So the time of a stage that began before the
hold does not run during the hold.  A canary's stage that begins during the hold ends only after the
hold.  Any other stage that begins during the hold may end during the hold: an operator may await a
reload's verdict before releasing the hold.
"""

from __future__ import annotations

from ..model.lazy_dataclass import replace
from ..model.policy import STANDBY_S, Policy
from ..model.share import WHOLE, Canary
from ..model.text import in_units
from .actions import ReadSettings, Report, ReportKind, RouteTo
from .events import Deadline, TimerKind
from .fleet import LEAVING, Fleet, Generation, Phase, Rollout
from .step import Step

#: How soon to check again whether workers accept the waiting clients.
_LOOK_AGAIN_S = 0.1
#: Why a rolling policy refuses to replace a generation.
FULL = (
    "--workers plus --surge processes exist already; try again when some have exited, see `status`"
)
#: Why --reload-order rolling fails in listener mode.
NO_LIBRARY = (
    "--reload-order rolling needs workers on the client library: a worker sent no "
    "X_SOCKETPROTECTOR_RETIRE=1; use start-first"
)
#: Why a canary with --at-least fails in listener mode.
NO_COUNTS = (
    "--at-least needs workers on the client library: with --handoff listener no other workers "
    "count their connections; leave it out"
)


def no_canary_under(policy: Policy) -> str | None:
    """Return why a canary is impossible under the reload order; None: it is possible."""
    if "canary" not in policy.order.excludes:
        return None
    return f"it does not work with --reload-order {policy.order.name}; reload without it"


def canary_of(fleet: Fleet, generation: Generation) -> Canary | None:
    """Return the share that an incoming generation gets first; None: all clients."""
    if not generation.fresh:
        return None  # the last good command has served already
    requested = fleet.rollout.canary if fleet.rollout else None
    return requested or fleet.policy_of(fresh=True).canary


def begin(step: Step, number: int, standby_s: float) -> bool:
    """Begin the rollout of a generation that is ready; return False if it gets no rollout.

    standby_s: the first stage takes at least this long.
    """
    fleet, generation = step.fleet, step.fleet[number]
    policy, serving = fleet.policy_of(generation.fresh), fleet.of(Phase.SERVING)
    if serving is None:
        return False
    canary = canary_of(fleet, generation)
    if canary:
        first_s, share = canary.for_s, canary.share
    elif policy.rolls:
        first_s, share = policy.settle_s, _share_of_ready(generation, serving)
    else:
        return False
    step.fleet = replace(fleet, rollout=Rollout(share, canary))
    step.do(RouteTo(serving.number, number, share))
    step.settle(number, max(first_s, standby_s))
    return True


def stage_over(step: Step, number: int, met: int | None, *, stuck: bool) -> str:
    """Continue with a settling generation whose timer has run out.

    Returns why the generation fails; "" if it does not fail.
    met: how many connections the generation has had; None: unknown.
    stuck: clients wait for the generation, but its workers accept none.
    """
    fleet, rollout = step.fleet, step.fleet.rollout
    if stuck and rollout:
        # Wait until its workers accept, or until an Untaken event comes.
        step.start(TimerKind.SETTLE, number, _LOOK_AGAIN_S)
        return ""
    if fleet.held and rollout and rollout.canary:
        step.start(TimerKind.SETTLE, number, _stage_s(fleet, fleet[number]))
        return ""
    canary = rollout.canary if rollout and rollout.share < WHOLE else None
    if rollout is None or canary is None or (met or 0) >= canary.at_least:
        next_stage(step, number, met)
        return ""
    if met is None:
        return NO_COUNTS
    if rollout.extended:
        time = in_units(2 * canary.for_s)
        return f"the canary had {met} of at least {canary.at_least} connections in {time}"
    step.fleet = replace(step.fleet, rollout=replace(rollout, extended=True, met=met))
    step.start(TimerKind.SETTLE, number, canary.for_s)
    return ""


def resume_stage(step: Step, held_s: float = 0.0) -> None:
    """Restart the timer of the current stage.  held_s: how long a hold may still delay its end."""
    settling = step.fleet.of(Phase.SETTLING)
    if settling and _settle_deadline(settling.number) in step.fleet.timers:
        stage_s = _stage_s(step.fleet, settling)
        step.start(TimerKind.SETTLE, settling.number, held_s + stage_s)


def _stage_s(fleet: Fleet, settling: Generation) -> float:
    """Return how long the current stage of a settling generation takes after the hold."""
    if fleet.stage_left_s is not None:
        return max(fleet.stage_left_s, _LOOK_AGAIN_S)
    rollout = fleet.rollout
    canary = rollout.canary if rollout and rollout.share < WHOLE else None
    # settle_s may be 0: a generation also settles after a probe, or when the old generation broke.
    return max(STANDBY_S, canary.for_s if canary else fleet.policy_of(settling.fresh).settle_s)


def next_stage(step: Step, number: int, met: int | None, *, now: bool = False) -> None:
    """Begin the next stage of a settling generation.  now: skip the last stage of a canary."""
    fleet, generation = step.fleet, step.fleet[number]
    rollout = fleet.rollout
    step.cancel(TimerKind.SETTLE, number)
    if rollout is None:
        step.promote(number)
    elif not rollout.canary:
        pass  # rolling: workers.reconcile() replaces more workers, and advance() ends the reload
    elif rollout.share >= WHOLE:
        step.promote(number, _canary_result(rollout))
    else:
        rollout = replace(rollout, share=WHOLE, met=met)
        step.fleet = replace(step.fleet, rollout=rollout, stage_left_s=None)
        if fleet.of(Phase.SERVING):
            step.do(RouteTo(number))
        settle_s = fleet.policy_of(generation.fresh).settle_s
        if settle_s > 0 and not now:
            step.start(TimerKind.SETTLE, number, settle_s)
        else:
            step.promote(number, _canary_result(rollout))


def _settle_deadline(number: int) -> Deadline:
    return Deadline(TimerKind.SETTLE, number)


def _canary_result(rollout: Rollout) -> str:
    canary, met = rollout.canary, rollout.met
    if canary is None:
        return ""
    if met is None:
        return f"the canary had {canary.text} of new connections, which its workers do not count"
    return f"the canary had {met} connections at {canary.text}"


def advance(step: Step) -> None:
    """Set the share by the ready workers, and end a rolling reload that is complete."""
    fleet, settling = step.fleet, step.fleet.of(Phase.SETTLING)
    rollout = fleet.rollout
    if settling is None or rollout is None or rollout.canary:
        return
    serving = fleet.of(Phase.SERVING)
    settles = _settle_deadline(settling.number) in fleet.timers
    if not settles and settling.ready and len(settling.workers) >= fleet.full_size(settling):
        step.promote(settling.number)
        return
    share = _share_of_ready(settling, serving) if serving else WHOLE
    if share != rollout.share:
        step.fleet = replace(fleet, rollout=replace(rollout, share=share))
        if serving:
            step.do(RouteTo(serving.number, settling.number, share))


def _share_of_ready(new: Generation, old: Generation) -> int:
    """Return the new generation's part of all ready workers: above 0, and below WHOLE."""
    ready, old_ready = new.ready_workers, old.ready_workers
    share = WHOLE * ready // (ready + old_ready) if ready else 0
    return min(max(share, 1), WHOLE - 1)


def lacks_library(fleet: Fleet, generation: Generation) -> str:
    """Return why an incoming generation fails if a worker does not use the client library.

    Returns "" if the generation may serve without it.  Workers on the library declare that they
    can finish alone.
    """
    if generation.phase not in (Phase.STARTING, Phase.SETTLING):
        return ""
    policy = fleet.policy_of(generation.fresh)
    if policy.finish_alone:
        return NO_LIBRARY  # its workers will leave one after another while others serve
    canary = (
        canary_of(fleet, generation) if policy.relies_on_library and not fleet.dry_run else None
    )
    has_other = fleet.of(Phase.SERVING) is not None
    return NO_COUNTS if canary and canary.at_least and has_other else ""


def read_settings(fleet: Fleet) -> ReadSettings:
    """Return the order to read the configuration for the reload under way."""
    canary = bool(fleet.rollout and fleet.rollout.canary)
    return ReadSettings(fleet.dry_run, canary, fleet.release)


# -- requests -------------------------------------------------------------------


def cannot_promote(fleet: Fleet, *, now: bool) -> str:
    """Return why the current stage cannot be ended now; "" if it can."""
    settling = fleet.of(Phase.SETTLING)
    if settling is None or fleet.stop_requested:
        return "nothing to promote: no generation is settling; see `status`"
    rolls = fleet.rollout is not None and not fleet.rollout.canary
    if rolls and (now or _settle_deadline(settling.number) not in fleet.timers):
        return "cannot promote: workers are being replaced a few at a time; see `status`"
    return ""


def promote_requested(step: Step, met: int | None, *, now: bool) -> None:
    """End the current stage, or refuse the request."""
    refused, settling = cannot_promote(step.fleet, now=now), step.fleet.of(Phase.SETTLING)
    if refused or settling is None:
        step.do(Report(ReportKind.REFUSED, reason=refused))
    else:
        next_stage(step, settling.number, met, now=now)


# -- room: how many processes a rolling reload may use ----------------------------


def room(fleet: Fleet, most: int, generation: Generation) -> int:
    """Return how many workers of a generation may start now, at most `most`.

    If clients would otherwise find no worker, one may start although there are too many processes:
    leaving processes can take as long as --drain-timeout.
    """
    if not fleet.newest_policy.rolls:
        return most
    free = fleet.free_places
    if free < 1 and _clients_lack_worker(fleet, generation):
        free = 1
    return max(0, min(most, free))


def is_full(fleet: Fleet) -> bool:
    """Return whether a rolling policy allows no more processes."""
    return fleet.newest_policy.rolls and fleet.free_places < 1


def _clients_lack_worker(fleet: Fleet, generation: Generation) -> bool:
    """Return whether clients may wait for a generation that has no worker except stuck ones."""
    match generation.phase:
        case Phase.STARTING:
            may_rescue = not generation.fresh and fleet.policy.has_two_places
            waited_for = may_rescue or fleet.of(Phase.SERVING) is None
        case Phase.DRAINING:
            waited_for = fleet.queue_is_last
        case phase:
            waited_for = phase is Phase.SERVING
    return waited_for and all(worker.hung for worker in generation.staying)


def lacks_room(fleet: Fleet, starting: Generation) -> bool:
    """Return whether a starting generation lacks only workers for which there is no room."""
    if len(starting.workers) >= fleet.wanted_in(starting) or room(fleet, 1, starting):
        return False
    # Probes begin when no worker is missing, so the other workers may await their first probe.
    return starting.ready or fleet.policy_of(starting.fresh).probes


def rolls(fleet: Fleet) -> bool:
    """Return whether a rolling reload, or a dry run under a rolling policy, is under way."""
    incoming = fleet.incoming if fleet.of(Phase.SERVING) else None
    return incoming is not None and fleet.newest_policy.rolls


def waits_to_replace(fleet: Fleet, generation: Generation) -> bool:
    """Return whether a generation's replacements wait for the end of a rolling reload."""
    return rolls(fleet) and not _clients_lack_worker(fleet, generation)


def may_respawn(fleet: Fleet, generation: Generation) -> bool:
    """Return whether an exited worker is replaced.

    During a rollout it is replaced only if its generation has too few workers.
    """
    if fleet.rollout is None:
        return True
    staying = [w for w in generation.workers if w.state not in LEAVING and not w.replaces]
    return len(staying) < fleet.wanted_in(generation)
