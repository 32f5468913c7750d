"""Opens the next generation and lets it serve, or gives the clients back to the previous one.

Pure.  Two rules apply throughout:

* Route before draining: a generation that gets new connections is never drained.
* A generation that fails while another serves changes nothing for clients.
"""

from __future__ import annotations

from ..model.lazy_dataclass import replace
from ..model.policy import STANDBY_S
from ..model.share import Canary
from . import rollout, stop
from .actions import Open, Probe, Report, ReportKind, RouteTo
from .events import Deadline, TimerKind
from .failure import fail, recover
from .fleet import Candidate, Fleet, Generation, Next, Phase, Policy, Rollout, State
from .step import Step

#: Why a dry run fails when the program is replaced.
UPGRADED = "called off: the protector is being upgraded"
#: The verdict of a reload that an operator has called off.
ROLLED_BACK = "rolled back: an operator called it off"
#: Why a deploy is refused.
IN_PROGRESS = "a reload is in progress"


# -- the next generation ------------------------------------------------------


def launched(step: Step) -> None:
    """Open the first generation."""
    if step.fleet.next_generation == 1:  # otherwise the event is repeated
        step.fleet = replace(step.fleet, to_open=Next.FRESH)


def reload_requested(step: Step, canary: Canary | None, release: str = "") -> None:
    """Queue a reload, which begin_if_wanted() begins; refuse a deploy that could not begin now.

    canary: the share that its generation gets first, instead of the configured share.
    release: the release of a deploy; "": no deploy.
    """
    if step.fleet.stop_requested:
        step.do(Report(ReportKind.REFUSED, reason="cannot reload: a stop is in progress"))
    elif release and step.fleet.is_releasing:
        step.do(Report(ReportKind.REFUSED, reason=f"cannot deploy {release}: {IN_PROGRESS}"))
    else:
        # Queue the request even during a reload: then the newest release wins without another HUP.
        # A later request without a share does not turn a queued canary into a plain reload.
        wanted = canary or step.fleet.canary_wanted
        step.fleet = replace(step.fleet, reload_wanted=True, canary_wanted=wanted)
        if release:
            step.fleet = replace(step.fleet, release=release)


def dry_run_requested(step: Step, release: str = "") -> None:
    """Begin a reload that ends before its switch.

    A dry run that cannot begin is refused, not queued: its verdict is about the present.
    """
    fleet = step.fleet
    if fleet.stop_requested or fleet.is_changing or not fleet.of(Phase.SERVING):
        reason = "cannot dry-run now: a reload or stop is in progress, or nothing is serving"
        step.do(Report(ReportKind.REFUSED, reason=reason))
        return
    step.fleet = replace(fleet, dry_run=True, release=release)
    step.do(Report(ReportKind.DRY_RUN, fleet.next_generation))
    _read_or_begin(step)


def renew_requested(step: Step) -> None:
    """Replace the serving generation with the last good command, as a reload does."""
    if not _may_renew(step.fleet):
        reason = "a replacement is already in progress, or nothing is serving; see `status`"
        step.do(Report(ReportKind.REFUSED, reason=reason))
    elif rollout.is_full(step.fleet):
        step.do(Report(ReportKind.REFUSED, reason=rollout.FULL))
    else:
        renew(step)


def renew(step: Step) -> bool:
    """Replace the serving generation with the last good command; return whether this has begun.

    A replacement cannot begin during a stop or a reload, or if no generation serves.  A queued
    reload follows the replacement.
    """
    if not _may_renew(step.fleet):
        return False
    step.do(Report(ReportKind.RELOADING))
    step.fleet = replace(step.fleet, to_open=Next.LAST_GOOD)
    _make_room(step)
    return True


def _may_renew(fleet: Fleet) -> bool:
    return not (fleet.of(Phase.SERVING) is None or fleet.stopping or fleet.is_opening)


def begin_if_wanted(step: Step) -> None:
    """Begin a queued reload, or fail it if a stop has been requested.

    Do nothing while a reload, a rescue or the first start is in progress.
    """
    fleet = step.fleet
    if fleet.incoming or fleet.to_open is Next.FRESH or fleet.reading:
        return
    if fleet.candidate:
        _begin(step)
    elif fleet.reload_wanted and fleet.stop_requested:
        # Fail the queued reload only after the previous reload's verdict, because each caller
        # takes the first verdict after its request for its own.
        step.fleet = replace(fleet, reload_wanted=False, canary_wanted=None)
        step.fail_unopened(stop.CALLED_OFF)
    elif fleet.reload_wanted and not _may_rescue(fleet):
        canary = Rollout(canary=fleet.canary_wanted) if fleet.canary_wanted else None
        step.fleet = replace(fleet, reload_wanted=False, canary_wanted=None, rollout=canary)
        step.do(Report(ReportKind.RELOADING))
        _read_or_begin(step)


def _may_rescue(fleet: Fleet) -> bool:
    """Return whether a rescue is under way, or may follow the end of a failed release."""
    rescues = fleet.to_open is not None and fleet.of(Phase.SERVING) is not None
    return rescues or bool(failed_in_the_way(fleet))


def _read_or_begin(step: Step) -> None:
    if step.fleet.configured and step.fleet.served:
        step.fleet = replace(step.fleet, reading=True)
        step.do(rollout.read_settings(step.fleet))
    else:
        _begin(step)


def settings_read(step: Step, policy: Policy, workers: int | None) -> None:
    """Continue a reload with the configuration: open_if_due() opens its generation.

    workers: the new number of workers, if the configuration changes it.
    """
    if step.fleet.reading:  # otherwise a stop has called it off
        step.fleet = replace(step.fleet, reading=False, candidate=Candidate(policy, workers))


def settings_failed(step: Step, reason: str) -> None:
    """Fail the reload, or dry run, whose configuration cannot be used."""
    if step.fleet.reading:
        step.fleet = replace(step.fleet, reading=False)
        step.fail_unopened(reason)


def call_off_unserved_dry_run(step: Step) -> None:
    """Call off a dry run if no generation serves: the last good command must serve first."""
    if not step.fleet.of(Phase.SERVING):
        call_off_dry_run(step, "the serving generation failed during the dry run; see `crashes`")


def call_off_dry_run(step: Step, reason: str) -> None:
    """Fail the current dry run, if there is one."""
    if not step.fleet.dry_run:
        return
    starting = step.fleet.of(Phase.STARTING)
    if starting:
        fail(step, starting.number, reason)
    else:
        step.forget_settings()
        if step.fleet.to_open is Next.FRESH:
            step.fleet = replace(step.fleet, to_open=None)
        step.fail_unopened(reason)


def _begin(step: Step) -> None:
    if step.fleet.dry_run:
        _begin_dry_run(step)
        return
    # During a back-off no generation serves, so the reload ends the back-off.
    step.cancel(TimerKind.OPEN)
    step.fleet = replace(step.fleet, to_open=Next.FRESH, failed_starts=0)
    _make_room(step)


def _begin_dry_run(step: Step) -> None:
    """Open the dry run's generation beside the serving generation, which stays as it is."""
    if cannot := step.fleet.policy_of(fresh=True).order.no_dry_run:
        step.forget_settings()
        step.fail_unopened(f"cannot dry-run: {cannot}")
    else:
        step.fleet = replace(step.fleet, to_open=Next.FRESH)


def _make_room(step: Step) -> None:
    """Under stop-first, drain the serving generation before the next is opened."""
    policy = step.fleet.policy_of(step.fleet.to_open is Next.FRESH)
    if not policy.stop_first:
        return
    old = step.fleet.of(Phase.SERVING)
    if old:
        step.do(RouteTo(None))
        step.drain(old.number, policy.drain_limit_s)
    _limit_drains(step, policy)


def _limit_drains(step: Step, policy: Policy) -> None:
    """Limit the drains that the next generation waits for.

    A generation that began to drain under another policy may have no limit.
    """
    for generation in step.fleet.all_of(Phase.DRAINING):
        ends = (
            Deadline(TimerKind.DRAIN, generation.number) in step.fleet.timers or generation.ending
        )
        if generation.workers and not ends:
            step.start(TimerKind.DRAIN, generation.number, policy.drain_limit_s)


def in_the_way(fleet: Fleet) -> tuple[Generation, ...]:
    """Return the generations that must end before the next one opens."""
    # Under stop-first, an older generation may hold a resource that the next generation needs.
    # At a first start, the failed attempt may hold such a resource.
    policy = fleet.policy_of(fleet.to_open is Next.FRESH)
    if policy.stop_first or not fleet.served:
        return fleet.generations
    return tuple(each for each in fleet.generations if _takes_a_place(fleet, each))


def _takes_a_place(fleet: Fleet, generation: Generation) -> bool:
    """Return whether an ending generation uses one of a listener's two sockets."""
    abandoned = fleet.policy.has_two_places and generation.phase is Phase.ABANDONED
    return generation.quiescing or abandoned


def has_failed(fleet: Fleet, generation: Generation) -> bool:
    """Return whether a leaving generation has failed: then an older generation serves."""
    serving = fleet.of(Phase.SERVING)
    return serving is not None and generation.number > serving.number


def failed_in_the_way(fleet: Fleet) -> tuple[Generation, ...]:
    """Return the failed generations that must end before a queued reload begins."""
    return tuple(
        each
        for each in fleet.generations
        if each.workers and _takes_a_place(fleet, each) and has_failed(fleet, each)
    )


def open_if_due(step: Step) -> None:
    """Open the next generation, if one is due and no back-off or other generation delays it."""
    fleet = step.fleet
    if fleet.to_open is None or Deadline(TimerKind.OPEN) in fleet.timers or in_the_way(fleet):
        return
    number, fresh = fleet.next_generation, fleet.to_open is Next.FRESH
    step.fleet = replace(
        fleet,
        generations=(*fleet.generations, Generation(number, fresh=fresh)),
        next_generation=number + 1,
        to_open=None,
    )
    step.do(Open(number, fresh, fleet.dry_run))  # its workers follow: workers.reconcile()
    policy, serving = fleet.policy_of(fresh), fleet.of(Phase.SERVING)
    if policy.rolls and not fleet.policy.rolls and not fleet.dry_run:
        # From now on the number of processes is limited, so leaving workers must make room.
        _limit_drains(step, policy)
        if serving is not None:
            step.retire_orphans(serving.workers)
            step.limit_retiring(serving.workers, policy)


# -- a generation that succeeds -------------------------------------------------


def serve_if_ready(step: Step) -> None:
    """Let a starting generation serve once all of its workers are ready."""
    starting = step.fleet.of(Phase.STARTING)
    if starting is None or step.fleet.policy_of(starting.fresh).answer_decides:
        return
    if _is_complete(step.fleet, starting) and starting.ready:
        _all_ready(step, starting.number)


def _is_complete(fleet: Fleet, starting: Generation) -> bool:
    return len(starting.workers) >= fleet.wanted_in(starting)


def must_probe(fleet: Fleet, starting: Generation) -> bool:
    """Return whether a starting generation must be probed now: all of its workers run."""
    return fleet.policy_of(starting.fresh).probes and _is_complete(fleet, starting)


def probe_if_complete(step: Step) -> None:
    """Probe a starting generation once all its workers run, and again if workers were added."""
    starting = step.fleet.of(Phase.STARTING)
    if starting is None or not must_probe(step.fleet, starting):
        return
    before = step.before.generation(starting.number)
    as_it_was = before is not None and len(before.workers) == len(starting.workers)
    if before is None or not (as_it_was and must_probe(step.before, before)):
        step.do(Probe(starting.number))


def answered(step: Step, number: int, alone: bool) -> None:
    """Let a generation serve because it has passed its probe, even if its workers sent no READY.

    alone: each worker has declared that it can finish alone.
    """
    generation = step.fleet.generation(number)
    if generation is None or generation.phase is not Phase.STARTING:
        return
    if not _is_complete(step.fleet, generation):
        return  # more workers are wanted by now; once they run, the generation is probed again
    if lacks := "" if alone else rollout.lacks_library(step.fleet, generation):
        fail(step, number, lacks)
        return
    policy = step.fleet.policy_of(generation.fresh)
    workers = (
        each
        if each.state is State.READY
        else replace(each, state=State.READY, retires=policy.any_worker_retires)
        for each in generation.workers
    )
    step.fleet = step.fleet.with_generation(replace(generation, workers=tuple(workers)))
    _all_ready(step, number, standby_s=0.0 if policy.answer_decides else STANDBY_S)


def _all_ready(step: Step, number: int, *, standby_s: float = 0.0) -> None:
    """Let a generation serve, or pass its dry run, because all of its workers are ready.

    standby_s: keep the previous generation able to take over for at least this long.
    """
    if step.fleet.dry_run:
        if standby_s > 0:  # the generation must survive that long without clients
            step.end_start(number)
            step.start(TimerKind.SETTLE, number, standby_s)
        elif Deadline(TimerKind.SETTLE, number) not in step.fleet.timers:
            _pass_dry_run(step, number)
        return
    step.end_start(number)
    if rollout.begin(step, number, standby_s):
        return
    step.do(RouteTo(number))
    settle_s = max(standby_s, step.fleet.policy_of(step.fleet[number].fresh).settle_s)
    if settle_s > 0 and step.fleet.of(Phase.SERVING):
        step.settle(number, settle_s)
    else:
        step.promote(number)


def settled(step: Step, number: int, met: int | None, *, stuck: bool) -> None:
    """Continue with a generation whose SETTLE timer has run out, or pass its dry run.

    met: how many connections the generation has had; None: unknown.
    stuck: clients wait for the generation, but its workers accept none.
    """
    if step.fleet.dry_run:
        _pass_dry_run(step, number)
    elif failure := rollout.stage_over(step, number, met, stuck=stuck):
        fail(step, number, failure)


def _pass_dry_run(step: Step, number: int) -> None:
    step.abandon(number)
    step.fleet = replace(step.fleet, dry_run=False, release="")
    step.do(Report(ReportKind.DRY_RUN_PASSED, number))


def cannot_call_off(fleet: Fleet) -> str:
    """Return why a rollback is impossible; "": a release under way can be called off."""
    incoming = fleet.incoming
    begun = fleet.reading or fleet.to_open is Next.FRESH or (incoming and incoming.fresh)
    # Under stop-first no generation serves during a reload.  Then a rollback starts the last good
    # command.
    replaced = fleet.served and not (fleet.of(Phase.SETTLING) or fleet.is_renewing)
    may_return = fleet.of(Phase.SERVING) or replaced
    if begun and may_return and not (fleet.stop_requested or fleet.dry_run):
        return ""
    return "nothing to roll back: no reload can be called off; see `status`"


def rollback_requested(step: Step) -> None:
    """Call off the release under way: a reload that has begun, or a settling generation."""
    incoming = step.fleet.incoming
    if refused := cannot_call_off(step.fleet):
        step.do(Report(ReportKind.REFUSED, reason=refused))
    elif incoming and incoming.fresh:
        fail(step, incoming.number, ROLLED_BACK)
    else:
        step.forget_settings()
        step.fleet = replace(step.fleet, to_open=None)
        step.fail_unopened(ROLLED_BACK)
        if not step.fleet.of(Phase.SERVING):
            recover(step, 0.0)
