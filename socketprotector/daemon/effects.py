"""Carries out the actions that the lifecycle orders, and turns what comes back into events.

Where a program is killed in the middle of an action, the next one repeats it: each can be carried
out twice, but for those that make something (Open, Spawn), which are written down at once.

Generations are in generation.py, workers in worker_pool.py, connections in forwarder.py; what is
said of them, and remembered: reports.py.  How they resume where another program stopped:
recovery.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

from .. import __version__
from ..core.actions import (
    Action,
    Ask,
    CancelTimer,
    CheckSettling,
    CloseListeners,
    Drain,
    Exit,
    ForgetSettings,
    Hold,
    Open,
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
    StopAsking,
    StopChecking,
    UseSettings,
)
from ..core.events import (
    BacklogEmptied,
    ChannelBroken,
    Deadline,
    DeadlinePassed,
    ListenersLost,
    OpenFailed,
    TimerKind,
)
from ..core.fleet import Fleet
from ..core.reload import UPGRADED
from ..core.snapshot import Snapshot, Undone
from ..core.stop import CALLED_OFF
from ..model import known_servers, question
from ..model.errors import what_failed
from ..model.lazy_dataclass import replace
from ..model.question import Question
from ..model.records import Program
from ..model.settings import Settings
from ..model.text import added
from ..system.channel import Channel
from ..system.listener import Listener
from ..system.loop import SHUT
from ..system.program_spec import changed_file, program_of
from ..system.sd_notify import Systemd
from .accept_counts import AcceptCounts
from .asking import Asking
from .check_probe import CheckProbes
from .forwarder import Forwarder
from .generation import Generations, OpenGeneration
from .health import Health
from .listener_flags import ListenerFlags
from .live_settings import LiveSettings
from .log_output import Output
from .probe_port import ProbePort, Way
from .reports import Reports
from .runtime import Runtime
from .settle_check import SettleCheck
from .socket_steering import SocketSteering
from .start_report import StartReport
from .worker_pool import WorkerPool

#: Actions that another program has to know of while they are not carried out.
RECORDED = Undone | Report | StartTimer
#: Reports of a generation that has proved itself, where that is asked for.
_SUCCESS = (ReportKind.READY, ReportKind.RELOADED, ReportKind.RECOVERED)
_FAILURE = (ReportKind.RELOAD_FAILED, ReportKind.DRY_RUN_FAILED)
_CALLED_OFF = (CALLED_OFF, UPGRADED)
#: How soon to look again whether a good answer has come after --settle.
_SETTLE_AGAIN_S = 0.1
_LATE = "late"


class Effects:
    """The fleet's other half: what the numbers in it stand for."""

    def __init__(
        self,
        settings: Settings,
        listeners: list[Listener],
        runtime: Runtime,
        *,
        output: Output,
        systemd: Systemd,
        start_report: StartReport,
        command: tuple[str, ...] = (),
        stay: Callable[[Iterable[str]], bool] = lambda names: False,
    ) -> None:
        """Take ownership of the listeners.  command: executes this program again.

        `stay` says whether descriptors of these names are kept beyond our end, for the next start.
        """
        self._loop, self._log = runtime.loop, runtime.log
        self._post = runtime.post
        self._stay = stay
        self.reports = Reports(
            runtime.log, systemd, start_report, policy=lambda: self.live_settings.settings.policy
        )
        self.generations = Generations()
        self._route: int | None = None
        self.last_good: Program | None = None  # what served last
        self._due: dict[Deadline, tuple[Deadline, float]] = {}  # when each timer runs out
        self.exit_status: int | None = None
        self.forwarder = Forwarder(
            runtime,
            listeners,
            broken=self._route_broken,
            dead=lambda listener: self.steering.mend(listener, 0),
            untaken=self._say_untaken,
            ended=self._has_ended,
            accepts=not settings.mode.workers_accept,
        )
        probes = CheckProbes(runtime.loop, runtime.log, self._reach)
        self.output = output
        self.pool = WorkerPool(
            settings,
            runtime,
            output,
            remember=self.reports.remember,
            listeners=self.forwarder.shared,
            probes=probes,
        )
        self.steering = SocketSteering(
            lambda: self.forwarder.listeners,
            runtime,
            bound=lambda listener: self.live_settings.bound_anew(listener),
            lost=self._listener_lost,
            untaken=self._say_untaken,
        )
        self._counts = AcceptCounts(
            lambda: self.forwarder.listeners, lambda: self.health.tcp_connection
        )
        self.asking = Asking(
            runtime,
            reach=self._reach,
            answered=self.pool.answered,
            not_asked=self.pool.not_asked,
        )
        self.settle_check = SettleCheck(runtime, self._reach, probes)
        self.health = Health(
            runtime,
            settings=lambda: self.live_settings.settings,
            reach=self._reach_serving,
            paused=lambda: self.steering.holds and not self.forwarder.accepts,
            remember=self.reports.remember,
        )
        self._askers: tuple[WorkerPool | Asking | SettleCheck | Health, ...] = (
            *(self.pool, self.asking, self.settle_check, self.health),
        )
        self.flags = ListenerFlags(lambda: self.forwarder.listeners, runtime)
        self.live_settings = LiveSettings(
            settings,
            runtime,
            pool=self.pool,
            forwarder=self.forwarder,
            steering=self.steering,
            generations=self.generations,
            command=command,
        )

    def perform(self, action: Action) -> None:
        """Carry out one action.  What fails comes back as an event."""
        match action:
            case Open(number, fresh, dry_run):
                self._open(number, fresh, dry_run=dry_run)
            case Spawn(number, worker, slot) if number in self.generations:
                generation = self.generations[number]
                self.steering.grow(number, generation.knows)
                self.pool.spawn(worker, slot, generation)
            case Signal(worker, kind):
                self.pool.signal(worker, kind)
            case Retire(worker):
                self.pool.retire(worker)
            case Ask(number) if number in self.generations:
                self.asking.ask(self.generations[number])
            case StopAsking():
                self.asking.stop()
            case CheckSettling(number) if number in self.generations:
                self.settle_check.begin(self.generations[number])
            case StopChecking():
                self.settle_check.stop()
            case RouteTo(number):
                self._route_to(number)
            case Quiesce(number):
                if number in self.generations:
                    self.generations[number].drains()
                self.steering.quiesce(number, reads_on=self.pool.all_retire(number))
            case Drain(number) if number in self.generations:
                generation = self.generations[number]
                self._loop.unwatch(generation.channel.read.fileno())
                generation.drains()
                self.forwarder.drain(generation.channel)
                self.pool.drain(number)
                self.steering.leave(number)
            case Release(number) if number in self.generations:
                self._log.write("info", "drained", generation=number)
                generation = self.generations.release(number)
                self._loop.unwatch(generation.channel.read.fileno())
                self.forwarder.release(generation.channel)
                self.steering.gone(number)
            case Hold(on):
                self.forwarder.hold(on)
                self.steering.turn_hold(on)
            case ReadSettings(dry_run):
                self.live_settings.read(dry_run=dry_run)
            case UseSettings():
                self.live_settings.use()
                self.health.settings_are()
            case ForgetSettings():
                self.live_settings.forget()
            case CloseListeners(quick):
                self.health.serves(None)
                self._close_listeners(quick=quick)
            case StartTimer(deadline, seconds, True):
                self._loop.extend(deadline, seconds)
                self._note_due(deadline)
            case StartTimer(deadline, seconds):
                self._start_timer(deadline, seconds)
            case CancelTimer(deadline):
                self._loop.cancel(deadline)
                self._note_due(deadline)
            case Report():
                if action.news in _SUCCESS and action.generation in self.generations:
                    self.last_good = self.generations[action.generation].program
                if action.news in _FAILURE and action.reason not in _CALLED_OFF:
                    action = replace(action, reason=added(action.reason, self._same_file()))
                self.reports.write(action)
            case Exit(status):
                self.exit_status = status
                self.pool.orphans.when_ended(self._stop_running)
            case _:  # of a generation that could not be opened, and that was told
                pass

    # -- to the next program and from the one before -----------------------------

    def snapshot(self, fleet: Fleet, actions: Iterable[Action]) -> Snapshot:
        """Return all that another program needs to go on, with these actions still to be done.

        Of RECORDED alone anything is told.
        """
        now = time.monotonic()
        ordered = [(a.deadline, now + a.seconds) for a in actions if isinstance(a, StartTimer)]
        return Snapshot(
            fleet=fleet,
            unfinished=tuple(a for a in actions if isinstance(a, Undone)),
            timers=(*self._due.values(), *ordered),
            generations=self.generations.records(),
            last_good=self.last_good,
            workers=self.pool.records(),
            orphans=self.pool.orphans.left,
            forwarder=self.forwarder.record(),
            steering=self.steering.record(),
            nonblocking=self.flags.record(),
            settings=self.live_settings.record,
            run=self.reports.run,
            log_level=self._log.level,
            version=__version__,
            unsaid=tuple(a for a in actions if isinstance(a, Report)),
        )

    def descriptors(self) -> dict[str, int]:
        """Return all descriptors that the next program needs, by name."""
        return {**self.own_descriptors(), **self.pool.descriptors}

    def own_descriptors(self) -> dict[str, int]:
        """Return those that are not one worker's: as few as there are generations."""
        return {**self.forwarder.descriptors(), **self.generations.descriptors()}

    def suspend(self) -> None:
        """Ask and read nothing more in this program; the next one begins anew."""
        self.live_settings.stop_reading()
        for each in self._askers:
            each.suspend()

    def go_on(self) -> None:
        """There was no next one: ask again."""
        for each in self._askers:
            each.go_on()

    # -- generations ---------------------------------------------------------

    def _open(self, number: int, fresh: bool, *, dry_run: bool) -> None:
        try:
            live = self.live_settings
            settings = (fresh and live.record.candidate) or live.settings
            program = self.last_good if self.last_good and not fresh else program_of(settings)
            self._refuse_unless_asked(program)
            if dry_run and (cannot := self.cannot_try()):
                raise ValueError(f"cannot be tried: {cannot}")
            made = OpenGeneration.make(number, program, settings.queue, self.steering.free)
            try:
                self.watch_channel(made)
            except OSError:
                made.forget_board()
                made.channel.close()
                raise
        except (OSError, ValueError) as error:
            self._post(OpenFailed(number, what_failed(error)))
            return
        if fresh and self.last_good is not None and not dry_run:
            self.reports.remember(lambda history: history.reload_began(number, time.time()))
        self.generations.known()  # here too: without an fd store nothing else asks
        self.generations[number] = made
        if program.mode.workers_accept:
            self._enter(made, fresh=fresh)
            self.flags.watch()
        capacity = made.channel.capacity()
        if capacity < settings.queue:
            self._log.write(
                "warning",
                "queue-clamped",
                wanted=settings.queue,
                got=capacity,
                hint="raise the sysctl net.core.wmem_max",
            )

    def _enter(self, generation: OpenGeneration, *, fresh: bool) -> None:
        others = [each for each in self.generations.values() if each is not generation]
        taken = {mark for each in others for mark in each.record.marks}
        record = generation.record
        self.steering.enter(record.number, record.socket_number, fresh=fresh)
        marks = self._counts.enter(record.socket_number, taken)
        generation.update_record(marks=marks)
        if not marks:  # it may serve clients that came to another one, whose mark they have
            for each in others:
                each.update_record(marks=())

    def _refuse_unless_asked(self, program: Program) -> None:
        """Raise ValueError for one that only an answer makes ready, and that cannot be asked."""
        if program.ready in question.KINDS and program.mode.workers_accept:
            name = question.read(program.ready_question).listener
            if not self.steering.can_ask(name):
                raise ValueError(
                    question.refusal(f"--ready {program.ready_question}", name or "each listener")
                )

    def cannot_try(self) -> str | None:
        """Say why a generation cannot be started without getting clients; None: it can."""
        for each in self.forwarder.listeners:
            if each.shared and not each.has_sibling:
                address = each.settings.address
                return f"{address} has one socket for all generations, which accept directly"
        return None

    def watch_channel(self, generation: OpenGeneration) -> None:
        """See at once when a worker shuts it down: maybe none is left that takes what is queued.

        Raises OSError.
        """
        number = generation.record.number
        self._loop.watch(generation.channel.read.fileno(), lambda: self._shut_down(number), SHUT)

    def _reach(self, generation: OpenGeneration, asked: Question) -> Way | None:
        """Make a way to a generation, None where there can be none.  Raises OSError."""
        if generation.program.mode.workers_accept:
            return self.steering.ask(generation.record.number, asked.listener, generation.knows)
        beside = self.forwarder.queue if generation.record.number == self._route else None
        for each in self.forwarder.listeners:
            if asked.listener in ("", each.settings.name) and generation.knows(each.index):
                return ProbePort(self._loop, generation.channel, each.index, beside).way
        return None

    def _reach_serving(self, generation: OpenGeneration, asked: Question) -> Way | None:
        """Make a way to the one that serves, None where there can be none.  Raises OSError."""
        if generation.program.mode.workers_accept:
            return self.steering.reach(asked.listener, generation.knows)
        return self._reach(generation, asked)

    def _route_to(self, number: int | None) -> None:
        generation = self.generations.get(number) if number is not None else None
        self._route = number if generation is not None else None
        if generation is None:
            self.health.serves(None)
            self.forwarder.route_to(None)
            return
        again = generation.record.serving_since > 0.0
        if not again:
            generation.update_record(serving_since=time.monotonic(), served_at=time.time())
        self.forwarder.route_to(generation.channel)
        self.steering.turn_to(generation.record.socket_number, again=again, knows=generation.knows)
        self._log.write("info", "route", generation=number)
        self.health.serves(generation)

    def _same_file(self) -> str:
        """Say that the serving generation is affected, too, where its file was changed in place."""
        if self._route is None:
            return ""
        record = self.generations[self._route].record
        file = changed_file(record.program, record.opened_at)
        if not file:
            return ""
        if record.program.mode.pooled:
            return f"generation {self._route} runs the same changed file: {file}"
        return f"a replaced worker of generation {self._route} runs the changed file: {file}"

    def _has_ended(self, channel: Channel) -> None:
        next(each for each in self.generations.known() if each.channel is channel).ends()

    def _route_broken(self) -> None:
        if self._route is not None:
            self._shut_down(self._route)

    def _shut_down(self, number: int) -> None:
        """A worker has shut the channel down, which tells us but once."""
        generation = self.generations[number]
        self._loop.unwatch(generation.channel.read.fileno())
        since = generation.record.serving_since
        self._post(ChannelBroken(number, time.monotonic() - since if since else 0.0))

    @property
    def they_stay(self) -> bool:
        """Whether the listeners that are ours outlive a stop."""
        ours = [each for each in self.forwarder.listeners if not each.settings.foreign]
        return bool(ours) and self._stay([name for each in ours for name in each.descriptors()])

    def _close_listeners(self, *, quick: bool) -> None:
        stay, route = self.they_stay, self._route
        self._loop.cancel(_LATE)
        late_s = 0.0 if quick or stay else self._late_s
        if late_s > 0.0:
            self._loop.call_after(_LATE, late_s, lambda: self._close_listeners(quick=False))
            return
        if quick:
            self.steering.give_back()
        elif (stay or self.steering.share) and not self.forwarder.accepts and route is not None:

            def over() -> None:
                if stay:
                    self.forwarder.close_listeners(quick=True, stay=True)
                    self._post(BacklogEmptied())
                else:
                    self.steering.end()
                    self.forwarder.close_listeners(quick=False)

            self.steering.quiesce_last(route, over)
            return
        if not stay:
            self.steering.end()  # else the next start has them, though a worker shuts them
        self.forwarder.close_listeners(quick=quick, stay=stay)

    @property
    def _late_s(self) -> float:
        """For how long a graceful stop lets clients in that a hold has kept out."""
        stop_s = self.live_settings.settings.policy.stop_timeout_s
        return min(self.steering.hold.late_s, stop_s / 2 if stop_s else math.inf)

    def _listener_lost(self, listener: Listener, reason: str) -> None:
        """A listener gets no clients any more; if none does, our supervisor must act."""
        self.reports.listener_lost(listener.settings.address, reason)
        if all(each.lost for each in self.forwarder.listeners):
            self._post(ListenersLost())

    def waiting(self, number: int) -> int | None:
        """Return how many connections wait for a generation's workers; None: it is not known."""
        generation = self.generations[number]
        if generation.program.mode.workers_accept:
            return self.steering.waiting(number, generation.knows)
        return generation.channel.depth()

    def active(self, number: int) -> int | None:
        """Return how many connections a generation has accepted that are open; None: not known.

        For workers that do not count them.
        """
        return self._counts.active(self.generations[number].record.marks)

    def untaken_s(self, number: int) -> float | None:
        """Return for how long no connection of a generation was taken; None: it is not worth it."""
        generation = self.generations[number]
        if generation.program.mode.workers_accept:
            return self.steering.accept_watch.seconds if number == self._route else None
        return self.forwarder.queue.untaken_s(generation.channel)

    def _say_untaken(
        self, seconds: float, waiting: int, ever: bool, listen: str | None = None
    ) -> None:
        """ever: one was taken before.  listen: where clients wait, if not in the queue."""
        number = self._route
        if number is None:
            return
        since = f"for {seconds:.0f} s" if ever else "yet"
        self._log.write(
            "warning",
            "nobody-takes",
            generation=number,
            waiting=waiting,
            listen=listen,
            reason=f"no worker has taken a connection {since}",
            hint=known_servers.hint(
                self.generations[number].program,
                taken_from=ever,
                advice=lambda: self.pool.advice(number, passes_over=True),
            ),
        )

    # -- time, and the end ---------------------------------------------------

    def _start_timer(self, deadline: Deadline, seconds: float) -> None:
        def run(left_s: float) -> None:
            self._loop.call_after(deadline, left_s, passed)
            self._note_due(deadline)

        def passed() -> None:
            idle_s = self.forwarder.idle_s if deadline.wait is TimerKind.LAME_DUCK_IDLE else seconds
            if idle_s < seconds:
                run(seconds - idle_s)
                return
            if deadline.wait is TimerKind.SETTLE and self.settle_check.awaits(deadline.target):
                run(_SETTLE_AGAIN_S)
                return
            self._note_due(deadline)
            # Else the program speaks with us, and it is not for want of READY=1.
            silent = deadline.wait is TimerKind.START and not self.pool.spoken_with
            advice = ""
            if deadline.wait is TimerKind.START:
                advice = self.asking.last or self.pool.check_says(deadline.target)
            if silent:
                its = self.pool.advice(deadline.target, passes_over=bool(advice))
                advice = "; ".join(filter(None, (advice, its)))
            self._post(DeadlinePassed(deadline, advice))

        run(seconds)

    def _note_due(self, deadline: Deadline) -> None:
        """Note when a timer runs out, or that it does not run."""
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
        """For how long a stop still lets in clients that a hold has kept out; None: it does not."""
        due = self._loop.due(_LATE)
        return max(0.0, due - time.monotonic()) if due is not None else None

    def _stop_running(self) -> None:
        self._loop.running = False

    @property
    def forwarded(self) -> int | None:
        """How many connections were accepted and sent to workers; None where workers accept."""
        return self.forwarder.forwarded if self.forwarder.accepts else None

    @property
    def lost(self) -> int | None:
        """How many of those were lost on the way; None likewise."""
        return self.forwarder.lost if self.forwarder.accepts else None

    def close(self) -> tuple[str, ...]:
        """Close what is left when nothing is supervised any more.

        Returns the names of the sockets that live on for the next start.
        """
        self.suspend()
        self.steering.end()
        left = self.forwarder.close(self.steering.current)
        self._log.write(
            "info",
            "stopped",
            connections=self.forwarded,
            lost=self.lost or None,
        )
        return left
