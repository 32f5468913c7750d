"""Carries out the actions that core/ orders, and turns their results into events.

After a kill, the next program carries out each action that the state does not show as done.  So the
program may repeat an action that was done just before the kill.  Therefore the supervisor writes
the state right after an action that must not be repeated.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable

from .. import __version__
from ..core import stop
from ..core.actions import (
    Action,
    CancelTimer,
    CheckSettling,
    CloseListeners,
    Drain,
    EndEvenly,
    Exit,
    ForgetSettings,
    Hold,
    Open,
    Probe,
    Quiesce,
    ReadSettings,
    Release,
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
)
from ..core.events import (
    Deadline,
    DeadlinePassed,
    ListenersLost,
    OpenFailed,
    Quiesced,
    TimerKind,
    Untaken,
)
from ..core.fleet import Fleet
from ..core.reload import UPGRADED
from ..core.snapshot import Snapshot, Undone, due_after
from ..model import known_servers, probe_spec, ready_kinds
from ..model.errors import what_failed
from ..model.records import Program
from ..model.settings import Settings
from ..model.share import percent
from ..system.leftovers import NEVER, Holder
from ..system.listener import Listener
from ..system.program_spec import program_of
from ..system.sd_notify import Systemd
from . import spread
from .check_probe import CheckProbes
from .delivery import Delivery, untaken_message
from .delivery.host import Host
from .generation import Generations, OpenGeneration
from .live_settings import LiveSettings
from .log_output import Output
from .probing import Probing
from .reports import Reports, with_notes
from .runtime import Runtime
from .start_report import StartReport
from .worker_pool import WorkerPool

#: The state lists these actions until they are done; decide.resume() derives the others.
RECORDED = Undone | Report | StartTimer
#: Reports after which a generation's program counts as the last good program.
_SUCCESS = (ReportKind.READY, ReportKind.RELOADED, ReportKind.RECOVERED)
_FAILURE = (ReportKind.RELOAD_FAILED, ReportKind.DRY_RUN_FAILED)
#: The interval at which we look for one more good answer after the time of --settle.
_SETTLE_AGAIN_S = 0.1
#: Until this timer ends, a stop accepts late clients, whose kernels may still retry after a hold.
_LATE_TIMER = "late"


class Effects(Host):
    """The real generations, workers and timers; core/fleet.py has only numbers and Deadlines."""

    def __init__(
        self,
        settings: Settings,
        build: Callable[[Host], Delivery],
        runtime: Runtime,
        *,
        output: Output,
        systemd: Systemd,
        start_report: StartReport,
        command: tuple[str, ...] = (),
        survive_exit: Callable[[Iterable[str]], bool] = lambda names: False,
    ) -> None:
        """build: makes the delivery.  command: the command line that executes this program again.

        survive_exit: returns whether the next start gets the descriptors with the given names.
        """
        self.runtime = runtime
        self._loop, self._log, self._post = runtime.loop, runtime.log, runtime.post
        self._survive_exit = survive_exit
        self.reports = Reports(
            runtime.log, systemd, start_report, policy=lambda: self.live_settings.settings.policy
        )
        self.generations: Generations = Generations()
        self._route: int | None = None
        self._sharing: int | None = None  # a second generation that gets new clients
        self.last_good: Program | None = None  # the last successful generation's program
        self._due: dict[Deadline, tuple[Deadline, float]] = {}  # each timer, and when it runs out
        self.exit_status: int | None = None
        self.delivery = build(self)
        self.output = output
        check_probes = CheckProbes(runtime.loop, runtime.log, self.delivery.reach)
        self.pool = WorkerPool(
            settings,
            runtime,
            output,
            remember=self.reports.remember,
            delivery=self.delivery,
            probes=check_probes,
            holders=self._holders,
        )
        self.probing = Probing(
            *(runtime, self.delivery, check_probes),
            settings=lambda: self.live_settings.settings,
            remember=self.reports.remember,
            pool=self.pool,
        )
        self.live_settings = LiveSettings(
            settings, runtime, pool=self.pool, delivery=self.delivery, command=command
        )

    def perform(self, action: Action) -> None:
        """Carry out one action.  A failure comes back as an event."""
        match action:
            case Open(number, fresh, dry_run):
                self._open(number, fresh, dry_run=dry_run)
            case Spawn(number, worker, slot) if number in self.generations:
                self.pool.spawn(worker, slot, self.generations[number])
            case Signal(worker, kind):
                self.pool.signal(worker, kind)
            case Retire(worker):
                self.pool.retire(worker)
            case Probe(number) if number in self.generations:
                self.probing.probe_starting(self.generations[number])
            case StopProbing():
                self.probing.stop_probing()
            case CheckSettling(number) if number in self.generations:
                self.probing.check_settling(self.generations[number])
            case StopChecking():
                self.probing.stop_checking()
            case RouteTo(number, sharing, share):
                self._route_to(number, sharing, share)
            case Quiesce(number):
                self._quiesce(number)
            case EndEvenly(number, worker, seconds) if number in self.generations:
                opened, records = self.generations[number], self.pool.records()
                spread.order(opened, records, seconds, self._log, worker=worker)
            case Drain(number) if number in self.generations:
                self.generations[number].note_draining()
                self.pool.drain(number)
                self.delivery.drain(self.generations[number])
            case Drain(number):  # a kill lost the generation's descriptors, but workers still run
                self.pool.drain(number)
            case Release(number) if number in self.generations:
                self._log.write("info", "drained", generation=number)
                self._release(number)
            case Hold(on):
                self.delivery.hold(on)
            case ReadSettings(dry_run, canary, release):
                self.live_settings.read(dry_run=dry_run, canary=canary, release=release)
            case UseSettings():
                self.live_settings.use()
                self.probing.apply_settings(self.generations.get(self._route or 0))
            case ForgetSettings():
                self.live_settings.forget()
            case CloseListeners(quick):
                self.probing.set_serving(None)
                self._close_listeners(quick=quick)
            case StartTimer(deadline, seconds, True) if self._loop.due(deadline) is not None:
                self._loop.extend(deadline, seconds)
                self._note_due(deadline)
            case StartTimer(deadline, seconds):
                self._start_timer(deadline, seconds)
            case CancelTimer(deadline):
                self._loop.cancel(deadline)
                self._note_due(deadline)
            case Report():
                self._report(action)
            case Exit(status):
                self.exit_status = status
                self.pool.leftovers.when_ended(self._stop_loop)
            case _:  # the generation was not opened, was lost in a kill, or is released already
                pass

    def _report(self, report: Report) -> None:
        program = self.generations.program_of(report.generation)
        self.last_good = (report.news in _SUCCESS and program) or self.last_good
        if report.news in _FAILURE and report.reason not in (stop.CALLED_OFF, UPGRADED):
            report = with_notes(report, self.generations.program_change(self._route))
        elif report.news is ReportKind.RELOADED:
            report = with_notes(report, *self.delivery.warnings)
        self.reports.write(*self.live_settings.reported(report, program))

    # -- for upgrades, and after crashes ------------------------------------------

    def snapshot(self, fleet: Fleet, actions: Iterable[Action]) -> Snapshot:
        """Return the state that the next program needs after an upgrade or a crash.

        actions: the RECORDED actions that are perhaps not carried out yet.
        """
        now, delivery = time.monotonic(), self.delivery.record()
        self.generations.forget_released(self.delivery.keeps)
        return Snapshot(
            fleet=fleet,
            unfinished=tuple(a for a in actions if isinstance(a, Undone)),
            timers=(*self._due.values(), *due_after(actions, self._due, now)),
            generations=self.generations.records(),
            last_good=self.last_good,
            workers=self.pool.records(),
            condemned=self.pool.leftovers.condemned,
            orders=self.pool.leftovers.orders,
            forwarder=delivery.forwarder,
            steering=delivery.steering,
            nonblocking=delivery.nonblocking,
            settings=self.live_settings.record,
            run=self.reports.run,
            log_level=self._log.level,
            version=__version__,
            unsaid=tuple(a for a in actions if isinstance(a, Report)),
            current_due=self.live_settings.current_due,
            named_at_begin=self.live_settings.named_at_begin,
        )

    def descriptors(self) -> dict[str, int]:
        """Return the descriptors of Effects that the next program needs, by name."""
        return {**self.own_descriptors(), **self.pool.descriptors}

    def own_descriptors(self) -> dict[str, int]:
        """Return the descriptors that belong to no single worker, by name.

        Descriptors that clients need come first, because the fd store may fill up.
        """
        owners = (self.delivery, self.generations, self.output)
        return {name: fd for each in owners for name, fd in each.descriptors().items()}

    def suspend(self) -> None:
        """Stop all probes and checks, the search for leftovers, and the reading of settings."""
        self.live_settings.stop_reading()
        for each in (self.pool, self.probing):
            each.suspend()

    def resume(self) -> None:
        """Restart the probes, the checks and the search for leftovers after a failed exec."""
        # The supervisor restarts the reading of settings.
        for each in (self.pool, self.probing):
            each.resume()

    # -- generations ---------------------------------------------------------

    def _open(self, number: int, fresh: bool, *, dry_run: bool) -> None:
        try:
            settings = self.live_settings.next_settings(fresh=fresh)
            program = self.last_good if self.last_good and not fresh else program_of(settings)
            self._refuse_unless_reachable(program)
            if dry_run and (cannot := self.delivery.cannot_dry_run()):
                raise ValueError(f"cannot dry-run: {cannot}")
            # snapshot() does this, too, but rarely runs if there is neither guard nor fd store.
            self.generations.forget_released(self.delivery.keeps)
            made = self.generations[number] = OpenGeneration.make(number, program)
            try:
                self.delivery.open(made, settings.queue, fresh=fresh)
            except OSError:
                del self.generations[number]
                made.forget_board()
                raise
        except (OSError, ValueError) as error:
            self._post(OpenFailed(number, what_failed(error)))
            return
        if fresh and self.last_good is not None and not dry_run:
            self.reports.reload_began(number, self.delivery.listeners)

    def _release(self, number: int) -> None:
        """Free what a generation used, and end the processes that still have its sockets."""
        _, start, sockets = self._holder(self.generations[number])
        self.delivery.release(self.generations.release(number))
        # A channel brings no more clients, but a listening socket does.
        self.pool.leftovers.end((number, start, sockets & self.delivery.worker_sockets))

    def _holder(self, generation: OpenGeneration) -> tuple[int, int, frozenset[int]]:
        record = generation.record
        return record.number, record.start, self.delivery.sockets_of(generation)

    def _holders(self) -> list[Holder]:
        """Return our sockets, and the generations whose workers may have them: see Leftovers."""
        ours = 0, NEVER, self.delivery.worker_sockets
        return [ours, *map(self._holder, self.generations.values())]

    def _refuse_unless_reachable(self, program: Program) -> None:
        """Raise ValueError if --ready needs a probe of a listener that no probe can reach."""
        if program.ready in ready_kinds.NEED_ANSWER:
            name = probe_spec.read(program.ready_question).listener
            if not self.delivery.can_probe(name):
                raise ValueError(
                    probe_spec.refusal(f"--ready {program.ready_question}", name or "each listener")
                )

    def _route_to(self, number: int | None, sharing: int | None, share: int) -> None:
        generation = self.generations.get(number) if number is not None else None
        self._route, self._sharing = number if generation is not None else None, sharing
        if generation is None:
            self.probing.set_serving(None)
            self.delivery.route_to(None)
            return
        served_before = generation.record.serving_since > 0.0
        other = self.generations.get(sharing) if sharing is not None else None
        for each in filter(None, (generation, other)):
            if not each.record.serving_since:
                each.update_record(serving_since=time.monotonic(), served_at=time.time())
            if each.program.spreads:
                spread.warn_if_unable(each, self.pool.records(), self._log)
        self.delivery.route_to(generation, served_before=served_before, sharing=other, share=share)
        part = percent(share) if other is not None else None
        self._log.write("info", "route", generation=number, sharing=part and sharing, share=part)
        self.probing.set_serving(generation)

    def met(self, number: int) -> int | None:
        """Return how many new clients a generation has got (Delivery.met()); None: unknown."""
        generation = self.generations.get(number)
        return self.delivery.met(generation) if generation is not None else None

    def _quiesce(self, number: int) -> None:
        quiet, generation = Quiesced(number), self.generations.get(number)
        if generation is None:
            self._post(quiet)
        else:
            generation.note_draining()
            reads_on = self.pool.all_retire(number)
            self.delivery.begin_drain(generation, lambda: self._post(quiet), reads_on=reads_on)

    @property
    def listeners_survive_stop(self) -> bool:
        """Return whether the listeners that we have bound survive a stop."""
        ours = [each for each in self.delivery.listeners if not each.settings.foreign]
        names = [name for each in ours for name in each.descriptors()]
        return bool(ours) and self._survive_exit(names)

    def _close_listeners(self, *, quick: bool = False, waited: bool = False) -> None:
        stay, serving = self.listeners_survive_stop, self._route
        self._loop.cancel(_LATE_TIMER)
        if not (quick or stay or waited) and (late_s := self._late_s) > 0.0:
            self._loop.call_after(_LATE_TIMER, late_s, lambda: self._close_listeners(waited=True))
            return
        generation = self.generations.get(serving) if serving is not None else None
        self.delivery.close_listeners(generation, quick=quick, stay=stay)

    @property
    def _late_s(self) -> float:
        """Return how long a graceful stop should accept late clients."""
        stop_s = self.live_settings.settings.policy.stop_timeout_s
        return min(self.delivery.late_s, stop_s / 2 if stop_s else float("inf"))

    # -- the methods of Host ---------------------------------------------

    def listener_lost(self, listener: Listener, reason: str) -> None:
        self.reports.listener_lost(listener.settings.address, reason)
        if all(each.lost for each in self.delivery.listeners):
            self._post(ListenersLost())

    def listener_bound(self, listener: Listener) -> None:
        """Record which socket file a listener has now (at a UNIX path)."""
        self.live_settings.note_rebound(listener)

    @property
    def own_connection(self) -> socket.socket | None:
        return self.probing.tcp_connection

    def report_untaken(
        self, seconds: float, waiting: int, ever: bool, listen: str | None = None
    ) -> None:
        if (number := self._route) is None:
            return
        reason = untaken_message(seconds, ever=ever)
        self._post(Untaken(number, f"{reason}; clients waiting: {waiting}"))
        self._log.write(
            "warning",
            "queue-stalled",
            generation=number,
            waiting=waiting,
            listen=listen,
            reason=reason,
            hint=known_servers.hint(
                self.generations[number].program,
                has_ready=self.pool.has_ready(number),
                taken_from=ever,
                advice=lambda: self.pool.advice(number, ignores_socket=True),
            ),
        )

    # -- time, and the end ---------------------------------------------------

    def _start_timer(self, deadline: Deadline, seconds: float) -> None:
        def set_timer(left_s: float) -> None:
            self._loop.call_after(deadline, left_s, passed)
            self._note_due(deadline)

        def passed() -> None:
            # Each new client restarts the time of --lame-duck-idle.
            idle_s = self.delivery.idle_s if deadline.wait is TimerKind.LAME_DUCK_IDLE else seconds
            if idle_s < seconds:
                return set_timer(seconds - idle_s)
            target, settles = deadline.target, deadline.wait is TimerKind.SETTLE
            if settles and self.probing.note_settle_over(target):
                return set_timer(_SETTLE_AGAIN_S)
            self._note_due(deadline)
            self.pool.messages.catch_up(deadline)
            if self._loop.due(deadline) is not None:
                return  # a message has extended the time
            advice = self._start_advice(target) if deadline.wait is TimerKind.START else ""
            met = self.met(target) if settles and target == self._sharing else 0
            stuck = settles and self.delivery.is_stuck(self.generations.get(target))
            self._post(DeadlinePassed(deadline, advice, met, stuck))

        set_timer(seconds)

    def _start_advice(self, number: int) -> str:
        """Return the likely cause of a generation's start timeout; "": unknown."""
        known = self.probing.why_not_ready or self.pool.check_result(number)
        if self.pool.proved_ready or self.probing.was_accepted:
            return known  # a worker has accepted: advice on using our sockets would mislead
        more = self.pool.advice(number, ignores_socket=bool(known))
        return "; ".join(filter(None, (known, more)))

    def _note_due(self, deadline: Deadline) -> None:
        """Record when a timer runs out; forget a timer that is not set."""
        due = self._loop.due(deadline)
        if due is None:
            self._due.pop(deadline, None)
        else:
            self._due[deadline] = deadline, due

    def due(self) -> Iterable[tuple[Deadline, float]]:
        """Return when each timer of the fleet runs out (CLOCK_MONOTONIC seconds)."""
        return self._due.values()

    @property
    def late_clients_s(self) -> float | None:
        """Return how long a stop still accepts late clients; None: it accepts none."""
        due = self._loop.due(_LATE_TIMER)
        return max(0.0, due - time.monotonic()) if due is not None else None

    def _stop_loop(self) -> None:
        self._loop.running = False

    def close(self) -> tuple[str, ...]:
        """Stop the probes, close the delivery; return the names of the sockets that survive."""
        self.suspend()
        surviving, forwarded = self.delivery.close(), self.delivery.forwarded
        self._log.write("info", "stopped", connections=forwarded, lost=self.delivery.lost or None)
        return surviving
