"""The result of one decide() call under construction: the new fleet and the actions.

Pure.  Each method changes the fleet and orders the matching action in one place, so that the two
cannot diverge.  The fleet knows every timer that runs, and lists every worker that is spawned.  The
modules that handle events share:

* timers: start, extend, cancel
* workers: spawn, retire, end (TERM or ABRT; KILL after --kill-timeout)
* generations: drain, the limits on draining (--drain-timeout, --max-draining, the warning about
  many draining generations), end, kill
* the candidate settings: use or forget them
* verdicts: a generation is promoted, or a reload or dry run has failed
"""

from __future__ import annotations

from collections.abc import Iterable

from ..model.lazy_dataclass import replace
from ..model.policy import Policy
from ..model.share import Canary
from .actions import (
    Action,
    CancelTimer,
    CheckSettling,
    CloseListeners,
    Drain,
    EndEvenly,
    ForgetSettings,
    Quiesce,
    Report,
    ReportKind,
    Retire,
    RouteTo,
    Signal,
    Spawn,
    StartTimer,
    StopChecking,
    StopProbing,
    UseSettings,
    WorkerSignal,
)
from .events import Deadline, TimerKind
from .fleet import Fleet, Generation, Phase, State, Stop, Worker

#: Without --max-draining, warn if at least this many generations are draining.
MANY_DRAINING = 4


class Step:
    """The fleet and the actions that one event has led to so far."""

    def __init__(self, fleet: Fleet) -> None:
        self.before = fleet  # before the event, when no further step was possible
        self.fleet = fleet
        self.actions: list[Action] = []

    def do(self, *actions: Action) -> None:
        """Append actions."""
        self.actions.extend(actions)

    # -- timers --------------------------------------------------------------

    def start(self, wait: TimerKind, target: int, seconds: float) -> None:
        """Start a timer; restart it if it is running for this kind and target."""
        deadline = Deadline(wait, target)
        self.fleet = replace(self.fleet, timers=self.fleet.timers | {deadline})
        self.do(StartTimer(deadline, seconds))

    def start_or_extend(self, wait: TimerKind, target: int, seconds: float) -> None:
        """Start a timer; if it is running, let it run for at least this long."""
        deadline = Deadline(wait, target)
        if deadline in self.fleet.timers:
            self.do(StartTimer(deadline, seconds, extend=True))
        else:
            self.start(wait, target, seconds)

    def cancel(self, wait: TimerKind, target: int = 0) -> None:
        """Cancel a timer, if it runs."""
        deadline = Deadline(wait, target)
        if deadline in self.fleet.timers:
            self.fleet = replace(self.fleet, timers=self.fleet.timers - {deadline})
            self.do(CancelTimer(deadline))

    # -- workers -------------------------------------------------------------

    def add(self, number: int, slot: int, *, quick_deaths: int = 0, replaces: int = 0) -> Worker:
        """Add a new worker, not spawned yet, to a generation, and return it."""
        new, generation = self.fleet.next_worker, self.fleet[number]
        worker = Worker(new, slot, State.WAITING, quick_deaths=quick_deaths, replaces=replaces)
        generation = replace(generation, workers=(*generation.workers, worker))
        self.fleet = replace(self.fleet.with_generation(generation), next_worker=new + 1)
        return worker

    def spawn(self, number: int, worker: Worker) -> None:
        """Start the process of a worker that waits in an open generation."""
        self.cancel(TimerKind.WORKER_RESPAWN, worker.number)
        self.fleet = self.fleet.with_worker(replace(worker, state=State.STARTING))
        self.do(Spawn(number, worker.number, worker.slot))
        generation = self.fleet[number]
        if generation.phase is Phase.DRAINING and not generation.quiescing:
            # The order to the whole generation came before this worker was started.
            self.end_evenly(generation, worker.number)
        incoming = self.fleet.incoming
        is_new = incoming is not None and incoming.number == number and incoming.fresh
        policy = self.fleet.policy_of(is_new)
        self.start(TimerKind.WORKER_START, worker.number, policy.start_timeout_s)

    def spawn_one(self, generation: Generation) -> None:
        """At a stop, start a worker for the last clients if all workers wait for a back-off."""
        if not generation.staying:
            for worker in [each for each in generation.workers if not each.alive][:1]:
                self.spawn(generation.number, worker)

    def end_worker(self, worker: Worker) -> None:
        """Send TERM to one worker, or ABRT if it is stuck; KILL follows."""
        self.do(Signal(worker.number, WorkerSignal.ABRT if worker.hung else WorkerSignal.TERM))
        self.start(TimerKind.WORKER_KILL, worker.number, self.fleet.policy.kill_timeout_s)

    def retire(self, worker: Worker) -> None:
        """Make a worker finish its connections; --drain-timeout limits the time.

        A worker that cannot do so while others serve gets TERM instead.
        """
        finishes = worker.retires or worker.state is State.ORPHANED
        found = self.fleet.find(worker.number)
        if found is not None:
            self.end_evenly(found[0], worker.number)
        number = worker.number
        self.do(Retire(number) if finishes else Signal(number, WorkerSignal.TERM))
        limit_s = self._leave_policy.drain_timeout_s
        if limit_s > 0:
            self.start(TimerKind.WORKER_RETIRE, worker.number, limit_s)

    def retire_orphans(self, workers: Iterable[Worker]) -> None:
        """Among these workers, retire each orphan that no timer limits yet.

        A second order would be a second signal, and would restart --drain-timeout.
        """
        for each in workers:
            if each.state is State.ORPHANED and not self._is_limited(each):
                self.retire(each)

    def limit_retiring(self, workers: Iterable[Worker], policy: Policy) -> None:
        """Among these workers, limit the time of each retiring worker that no timer limits yet."""
        for each in workers:
            if each.state is State.RETIRING and not self._is_limited(each):
                self.start(TimerKind.WORKER_RETIRE, each.number, policy.drain_timeout_s)

    def _is_limited(self, worker: Worker) -> bool:
        waits = (TimerKind.WORKER_RETIRE, TimerKind.WORKER_KILL)
        return any(Deadline(wait, worker.number) in self.fleet.timers for wait in waits)

    # -- generations ---------------------------------------------------------

    def end_start(self, number: int) -> None:
        """Cancel the timers and probes of a start that has succeeded or failed."""
        generation = self.fleet[number]
        self.cancel(TimerKind.START, number)
        self.cancel(TimerKind.SETTLE, number)
        if self.fleet.policy_of(generation.fresh).probes:
            self.do(StopProbing(number))

    def settle(self, number: int, seconds: float) -> None:
        """Let a generation settle: keep the previous generation this long, for a rollback."""
        checked = bool(self.fleet.policy_of(self.fleet[number].fresh).settle_check)
        self.fleet = replace(self.fleet.moved(number, Phase.SETTLING), stage_left_s=None)
        if seconds > 0:
            self.start(TimerKind.SETTLE, number, seconds)
        if checked:
            self.fleet = self.fleet.with_generation(replace(self.fleet[number], checked=True))
            self.do(CheckSettling(number))

    def end_settling(self, number: int) -> None:
        """Cancel the timer and the check of a generation's settling, and end its rollout."""
        self.cancel(TimerKind.SETTLE, number)
        if not self.fleet.has_unopened:  # otherwise the rollout belongs to the unopened release
            self.fleet = replace(self.fleet, rollout=None)
        generation = self.fleet[number]
        if generation.checked:
            self.fleet = self.fleet.with_generation(replace(generation, checked=False))
            self.do(StopChecking(number))

    def drain(self, number: int, timeout_s: float) -> None:
        """Let a generation finish its connections."""
        self.fleet = self.fleet.moved(number, Phase.DRAINING)
        generation = self.fleet[number]
        # Under --handoff listener another generation accepts from its own socket, now or soon.
        other = self.fleet.route or self.fleet.to_open
        other_accepts = self.fleet.policy.quiesces and other
        if other_accepts and self.fleet.stopping is not Stop.QUICK:
            # The old workers may not have accepted all earlier clients, or read their first bytes.
            self.fleet = self.fleet.with_generation(replace(generation, quiescing=True))
            self.do(Quiesce(number))
        else:
            self._end_channel(number, timeout_s)
        if self.fleet.queue_is_last:
            self.spawn_one(generation)
        self.forget_waiting(number)
        if self.fleet.stopping is None:
            self.limit_draining()

    def quiesced(self, number: int) -> None:
        """Drain a generation that has accepted all of its clients."""
        generation = self.fleet.generation(number)
        if generation and generation.quiescing:
            self.fleet = self.fleet.with_generation(replace(generation, quiescing=False))
            self._end_channel(number, self._drain_limit_s)

    @property
    def _drain_limit_s(self) -> float:
        """How long a generation may drain from now on; 0: only a stop limits the drain."""
        return 0.0 if self.fleet.stopping else self.fleet.policy.drain_limit_s

    @property
    def _leave_policy(self) -> Policy:
        """The policy that limits how long a leaving worker may take.

        A rolling reload waits for the workers that it replaces.  So its own limit counts, although
        its policy is not in force yet: the policy in force may set no limit.
        """
        newest = self.fleet.newest_policy
        return newest if newest.rolls else self.fleet.policy

    def end_evenly(self, generation: Generation, worker: int = 0) -> None:
        """If the policy says so, order leaving workers to end their connections evenly.

        worker: 0 for all workers of the generation.
        """
        fleet = self.fleet
        policy = fleet.policy if fleet.stopping else fleet.newest_policy
        if not policy.spreads:
            return
        seconds = policy.stop_spread_s
        if not fleet.stopping:
            leaving = 1 if worker else len(generation.alive)
            part_s = policy.spread_part_s(leaving, fleet.workers_wanted)
            seconds = min(part_s, self._leave_policy.drain_limit_s or part_s)
        self.do(EndEvenly(generation.number, worker, seconds))

    def _end_channel(self, number: int, timeout_s: float) -> None:
        self.end_evenly(self.fleet[number])
        self.do(Drain(number))
        if timeout_s > 0:
            self.start(TimerKind.DRAIN, number, timeout_s)

    def limit_draining(self) -> None:
        """End the oldest draining generations above --max-draining; without a limit, only warn."""
        draining = [g for g in self.fleet.all_of(Phase.DRAINING) if g.workers]
        limit = self.fleet.policy.max_draining
        if limit:
            for generation in draining[: max(0, len(draining) - limit)]:
                self.end_generation(generation.number)
        elif len(draining) >= MANY_DRAINING:
            self.do(Report(ReportKind.MANY_DRAINING, reason=f"{len(draining)} generations"))

    def take_back(self, incoming: Generation) -> None:
        """End a starting or settling generation; the serving generation gets the clients back."""
        number, serving = incoming.number, self.fleet.of(Phase.SERVING)
        if incoming.phase is Phase.STARTING:
            self.abandon(number)
            return
        self.end_settling(number)
        self.do(RouteTo(serving.number if serving else None))
        if incoming.fresh:
            self.forget_settings()
        self.drain(number, self.fleet.policy.drain_limit_s)

    def abandon(self, number: int) -> None:
        """End a starting generation, which has had no client."""
        self.end_start(number)
        if self.fleet[number].fresh:
            self.forget_settings()
            self.fleet = replace(self.fleet, rollout=None)
        self.fleet = self.fleet.moved(number, Phase.ABANDONED)
        self.end_generation(number)

    def end_generation(self, number: int) -> None:
        """Send TERM to all workers of a generation, once; KILL follows."""
        self.forget_waiting(number)
        generation = self.fleet[number]
        if generation.ending or not generation.workers:
            return
        self.fleet = self.fleet.with_generation(replace(generation, ending=True))
        self.do(*(Signal(worker.number, WorkerSignal.TERM) for worker in generation.workers))
        self.start(TimerKind.KILL, number, self.fleet.policy.kill_timeout_s)

    def kill_generation(self, number: int) -> None:
        """Send KILL to all workers of a generation."""
        alive = self.fleet[number].alive
        self.do(*(Signal(worker.number, WorkerSignal.KILL) for worker in alive))

    def forget_waiting(self, number: int) -> None:
        """Drop the slots whose next process has not been spawned yet."""
        generation = self.fleet[number]
        gone = [worker for worker in generation.workers if not worker.alive]
        self.fleet = self.fleet.with_generation(replace(generation, workers=generation.alive))
        for worker in gone:
            self.cancel(TimerKind.WORKER_RESPAWN, worker.number)
            old = generation.worker(worker.replaces)
            if old and old.alive and old.hung and not generation.ending:
                self.end_worker(old)  # its replacement will never be spawned

    # -- settings ------------------------------------------------------------

    def requeue_reload(self, canary: Canary | None) -> None:
        """Queue again a reload that a rescue has interrupted."""
        canary = canary or self.fleet.canary_wanted
        self.fleet = replace(self.fleet, reload_wanted=True, canary_wanted=canary, rollout=None)

    def use_settings(self) -> None:
        """Apply the settings of the candidate."""
        fleet, candidate = self.fleet, self.fleet.candidate
        if candidate:
            self.fleet = replace(
                fleet,
                policy=candidate.policy,
                workers_wanted=candidate.workers or fleet.workers_wanted,
                candidate=None,
            )
            self.do(UseSettings())

    def forget_settings(self) -> None:
        """Discard the candidate settings, or stop reading them."""
        if self.fleet.reading or self.fleet.candidate:
            self.fleet = replace(self.fleet, reading=False, candidate=None)
            self.do(ForgetSettings())

    # -- verdicts ------------------------------------------------------------

    def promote(self, number: int, reason: str = "") -> None:
        """Promote a generation to serving, and drain the previous generation.

        reason: an addition to the verdict, such as why --settle ends early.
        """
        old = self.fleet.of(Phase.SERVING)
        if self.fleet.sharing:
            self.do(RouteTo(number))
        self.end_settling(number)
        self.fleet = self.fleet.moved(number, Phase.SERVING)
        fresh = self.fleet[number].fresh
        if fresh:
            self.use_settings()
        if old:
            self.drain(old.number, self._drain_limit_s)
        success = ReportKind.RELOADED if fresh else ReportKind.RECOVERED
        self.do(Report(success if self.fleet.served else ReportKind.READY, number, reason))
        release = "" if fresh else self.fleet.release
        self.fleet = replace(self.fleet, served=True, release=release)

    def report_failure(self, number: int, reason: str) -> None:
        """Report that the reload or dry run of this generation has failed."""
        dry_run, failed = self.fleet.dry_run, self.fleet.generation(number)
        # The failure of the last good command leaves a queued deploy as it is.
        release = self.fleet.release if failed and not failed.fresh else ""
        self.fleet = replace(self.fleet, dry_run=False, release=release)
        news = ReportKind.DRY_RUN_FAILED if dry_run else ReportKind.RELOAD_FAILED
        self.do(Report(news, number, reason))

    def fail_unopened(self, reason: str) -> None:
        """Report the failure of a reload or dry run that opened no generation.

        The report uses up the next generation number: control clients await a verdict for this
        number.
        """
        number = self.fleet.next_generation
        self.fleet = replace(self.fleet, next_generation=number + 1, rollout=None)
        self.report_failure(number, reason)

    # -- listeners -----------------------------------------------------------

    def close_listeners(self) -> None:
        """Close all listeners, once, without accepting the clients that wait there."""
        if self.fleet.listeners_open:
            self.fleet = replace(self.fleet, listeners_open=False)
            self.do(CloseListeners(quick=True))
