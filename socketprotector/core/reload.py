"""From one generation to the next: open, ready, settle, promote; fail, roll back, recover.

Pure.  Two rules hold it together:

* Route before draining: at every moment some generation gets the new connections.
* A generation that fails while another serves changes nothing for clients.
"""

from __future__ import annotations

from ..model.backoff import backoff_s
from ..model.lazy_dataclass import replace
from ..model.policy import PROVEN_S, STANDBY_S
from . import stop
from .actions import Open, Probe, ReadSettings, Report, ReportKind, RouteTo
from .events import Deadline, TimerKind
from .fleet import Candidate, Fleet, Generation, Next, Phase, Policy, State
from .step import Step

#: The exit status of SocketProtector after a start that failed.
START_FAILED = 3
#: Why a dry run fails when the program is replaced.
UPGRADED = "called off: the protector is being upgraded"
#: Why a dry run is refused under stop-first.
STOP_FIRST = "with --reload-order stop-first the old workers end before the new ones start"


# -- the next generation ------------------------------------------------------


def launched(step: Step) -> None:
    """Open the first generation."""
    if step.fleet.next_generation == 1:  # a repeated event: a generation exists already
        step.fleet = replace(step.fleet, to_open=Next.FRESH)


def reload_requested(step: Step) -> None:
    """Queue a reload, which begin_if_wanted() begins."""
    if step.fleet.stop_requested:
        step.do(Report(ReportKind.REFUSED, reason="cannot reload: a stop is in progress"))
    else:
        # Queued even during a reload, so that the newest release wins without another HUP.
        step.fleet = replace(step.fleet, reload_wanted=True)


def dry_run_requested(step: Step) -> None:
    """Begin a reload that ends before its switch.

    A dry run that cannot begin is refused, not queued: its verdict is about the present.
    """
    fleet = step.fleet
    if fleet.stop_requested or fleet.is_changing or not fleet.of(Phase.SERVING):
        reason = "cannot dry-run now: a reload or stop is in progress, or nothing is serving"
        step.do(Report(ReportKind.REFUSED, reason=reason))
        return
    step.fleet = replace(fleet, dry_run=True)
    step.do(Report(ReportKind.DRY_RUN, fleet.next_generation))
    _read_or_begin(step)


def renew_requested(step: Step) -> None:
    """Replace the serving generation with the last good command, as a reload does."""
    if not renew(step):
        reason = "a replacement is already in progress, or nothing is serving; see `status`"
        step.do(Report(ReportKind.REFUSED, reason=reason))


def renew(step: Step) -> bool:
    """Replace the serving generation with the last good command; return whether this has begun.

    It cannot begin during a stop or a reload, or if no generation serves.  A queued reload follows.
    """
    fleet = step.fleet
    if not fleet.of(Phase.SERVING) or fleet.stopping or fleet.is_opening:
        return False
    step.do(Report(ReportKind.RELOADING))
    step.fleet = replace(fleet, to_open=Next.LAST_GOOD)
    _make_room(step)
    return True


def begin_if_wanted(step: Step) -> None:
    """Begin a queued reload, unless a reload or the first start is in progress."""
    fleet = step.fleet
    if fleet.incoming or fleet.to_open is Next.FRESH or fleet.reading:
        return
    if fleet.candidate:
        _begin(step)
    elif fleet.reload_wanted and fleet.stop_requested:
        # Not earlier: a caller takes the first verdict after its request for its own, and until
        # now that was the verdict of the previous reload.
        step.fleet = replace(fleet, reload_wanted=False)
        step.fail_unopened(stop.CALLED_OFF)
    elif fleet.reload_wanted and not _may_rescue(fleet):
        step.fleet = replace(fleet, reload_wanted=False)
        step.do(Report(ReportKind.RELOADING))
        _read_or_begin(step)


def _may_rescue(fleet: Fleet) -> bool:
    """Return whether a rescue is under way, or may follow the end of a failed release."""
    rescues = fleet.to_open is not None and fleet.of(Phase.SERVING) is not None
    return rescues or bool(failed_in_the_way(fleet))


def _read_or_begin(step: Step) -> None:
    if step.fleet.configured and step.fleet.served:
        step.fleet = replace(step.fleet, reading=True)
        step.do(ReadSettings(step.fleet.dry_run))
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


def try_nothing_unserved(step: Step) -> None:
    """Call off a dry run while no generation serves: the last good command must serve first."""
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
    # During a back-off no generation serves, so the reload must not wait until it is over.
    step.cancel(TimerKind.OPEN)
    step.fleet = replace(step.fleet, to_open=Next.FRESH, failed_starts=0)
    _make_room(step)


def _begin_dry_run(step: Step) -> None:
    """Open the dry run's generation beside the serving one, which stays as it is."""
    if step.fleet.policy_of(fresh=True).stop_first:
        step.forget_settings()
        step.fail_unopened(f"cannot dry-run: {STOP_FIRST}")
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
    for generation in step.fleet.all_of(Phase.DRAINING):
        # A generation that began to drain under another policy may have no limit.
        ends = (
            Deadline(TimerKind.DRAIN, generation.number) in step.fleet.timers or generation.ending
        )
        if generation.workers and not ends:
            step.start(TimerKind.DRAIN, generation.number, policy.drain_limit_s)


def in_the_way(fleet: Fleet) -> tuple[Generation, ...]:
    """Return the generations that must end before the next one opens."""
    # Under stop-first an older generation may hold a resource that the next one needs.  At a
    # first start the attempt that has failed may hold it.
    policy = fleet.policy_of(fleet.to_open is Next.FRESH)
    if policy.stop_first or not fleet.served:
        return fleet.generations
    return tuple(each for each in fleet.generations if _takes_a_place(fleet, each))


def _takes_a_place(fleet: Fleet, generation: Generation) -> bool:
    """Return whether an ending generation uses one of a listener's two sockets."""
    abandoned = fleet.policy.has_two_places and generation.phase is Phase.ABANDONED
    return generation.quiescing or abandoned


def has_failed(fleet: Fleet, generation: Generation) -> bool:
    """Return whether a generation that is leaving has failed: an older generation serves."""
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
    """Open the next generation, unless a back-off or another generation delays it."""
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


def _recover(step: Step, delay_s: float) -> None:
    """Open the last good command again, because no generation serves."""
    step.fleet = replace(step.fleet, to_open=Next.LAST_GOOD)
    if delay_s > 0:
        step.start(TimerKind.OPEN, 0, delay_s)


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


def is_probed(fleet: Fleet, starting: Generation) -> bool:
    """Return whether a starting generation is to be probed now: all of its workers run."""
    return fleet.policy_of(starting.fresh).probes and _is_complete(fleet, starting)


def probe_if_complete(step: Step) -> None:
    """Probe a starting generation once all of its workers run; repeat this if it gets more."""
    starting = step.fleet.of(Phase.STARTING)
    if starting is None or not is_probed(step.fleet, starting):
        return
    before = step.before.generation(starting.number)
    as_it_was = before is not None and len(before.workers) == len(starting.workers)
    if before is None or not (as_it_was and is_probed(step.before, before)):
        step.do(Probe(starting.number))


def answered(step: Step, number: int) -> None:
    """Let a generation that has passed its probe serve, whether its workers sent READY or not."""
    generation = step.fleet.generation(number)
    if generation is None or generation.phase is not Phase.STARTING:
        return
    if not _is_complete(step.fleet, generation):
        return  # more workers are wanted by now; once they run, the generation is probed again
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
    """Let a generation whose workers are all ready serve, or pass its dry run.

    standby_s: keep the previous generation able to take over for at least this long.
    """
    if step.fleet.dry_run:
        if standby_s > 0:  # run it so long without clients, to see whether it dies
            step.end_start(number)
            step.start(TimerKind.SETTLE, number, standby_s)
        elif Deadline(TimerKind.SETTLE, number) not in step.fleet.timers:
            _pass_dry_run(step, number)
        return
    step.end_start(number)
    step.do(RouteTo(number))
    settle_s = max(standby_s, step.fleet.policy_of(step.fleet[number].fresh).settle_s)
    if settle_s > 0 and step.fleet.of(Phase.SERVING):
        step.settle(number, settle_s)
    else:
        step.promote(number)


def settled(step: Step, number: int) -> None:
    """Promote a generation that has settled, or pass its dry run."""
    if step.fleet.dry_run:
        _pass_dry_run(step, number)
    else:
        step.promote(number)


def _pass_dry_run(step: Step, number: int) -> None:
    _abandon(step, number)
    step.fleet = replace(step.fleet, dry_run=False)
    step.do(Report(ReportKind.DRY_RUN_PASSED, number))


# -- a generation that fails ----------------------------------------------------


def open_failed(step: Step, number: int, reason: str) -> None:
    """Fail a generation that could not be opened: none of its workers was started."""
    generation = step.fleet.generation(number)
    if generation is None or generation.phase not in (Phase.STARTING, Phase.ABANDONED):
        return
    # None of its workers was ever spawned, even if a stop has abandoned it.
    step.fleet = step.fleet.with_generation(replace(generation, workers=()))
    if generation.phase is Phase.STARTING:
        fail(step, number, reason)


def fail(step: Step, number: int, reason: str, *, retry: bool = False) -> None:
    """Fail a starting or settling generation, and decide what follows.

    The route of a settling generation returns to the serving one.
    retry: a first start may try again (--start-tries).
    """
    serving, failed = step.fleet.of(Phase.SERVING), step.fleet[number]
    settles = failed.phase is Phase.SETTLING
    take_back(step, failed)
    if not step.fleet.served:
        _first_start_failed(step, number, reason, retry=retry)
    elif serving and not failed.fresh and not settles and step.fleet.reload_wanted:
        step.do(Report(ReportKind.RETRYING, number, reason))  # the queued reload brings the verdict
    elif serving or failed.fresh or settles:
        step.report_failure(number, reason)
        if not serving:  # the channel of the old generation broke during the reload
            _recover(step, 0.0)
    else:
        step.do(Report(ReportKind.RETRYING, number, reason))
        _recover(step, _count_failure(step))


def settle_failed(step: Step, number: int, reason: str) -> None:
    """Roll back to the previous generation, if it still serves."""
    generation = step.fleet.generation(number)
    if generation and generation.phase is Phase.SETTLING and step.fleet.of(Phase.SERVING):
        fail(step, number, reason)


def take_back(step: Step, incoming: Generation) -> None:
    """End a starting or settling generation; return a settling one's route to the serving one."""
    number, serving = incoming.number, step.fleet.of(Phase.SERVING)
    if incoming.phase is Phase.STARTING:
        _abandon(step, number)
        return
    step.end_settling(number)
    step.do(RouteTo(serving.number if serving else None))
    if incoming.fresh:
        step.forget_settings()
    step.drain(number, step.fleet.policy.drain_limit_s)


def _abandon(step: Step, number: int) -> None:
    """End a starting generation, which has had no client."""
    step.end_start(number)
    if step.fleet[number].fresh:
        step.forget_settings()
    step.fleet = step.fleet.moved(number, Phase.ABANDONED)
    step.end_generation(number)


def _count_failure(step: Step) -> float:
    """Count a failure while no other generation serves; return the seconds to wait after it."""
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
    """Fail a starting generation that lost a socket: it could not accept all clients."""
    generation = step.fleet.generation(number)
    if generation and generation.phase is Phase.STARTING:
        fail(step, number, "a worker shut down or broke its listening socket")


def channel_broken(step: Step, number: int, served_s: float) -> None:
    """Replace a generation whose channel no longer carries connections."""
    generation = step.fleet.generation(number)
    phase = generation.phase if generation else None
    if phase not in (Phase.STARTING, Phase.SETTLING, Phase.SERVING):
        return  # no new connections go through it
    reason = "a worker shut down the channel"
    step.do(Report(ReportKind.BROKEN, number, reason))
    if phase is Phase.SERVING:
        _serving_broken(step, number, served_s)
    else:
        fail(step, number, reason)


def _serving_broken(step: Step, number: int, served_s: float) -> None:
    if step.fleet.of(Phase.SETTLING) is None:
        step.do(RouteTo(None))
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
        _recover(step, delay_s)
