"""Carries out the actions that the lifecycle orders, and turns what comes back into events.

What a generation's number stands for is here: its program and its channel.  The workers
are in worker_pool.py, the connections in forwarder.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from ..core.events import (
    Action,
    BacklogEmptied,
    CancelTimer,
    ChannelBroken,
    CloseListeners,
    Deadline,
    DeadlinePassed,
    Drain,
    Event,
    Exit,
    ForgetSettings,
    Hold,
    ListenersLost,
    News,
    Open,
    OpenFailed,
    Quiesce,
    Quiesced,
    ReadSettings,
    Release,
    Report,
    Retire,
    RouteTo,
    Signal,
    Spawn,
    StartTimer,
    Stranded,
    UseSettings,
    Wait,
    WorkerExited,
)
from ..core.fleet import Fleet, Phase, State
from ..core.snapshot import Snapshot
from ..model import known_servers
from ..model.handoff import LISTENER
from ..model.history import Crash, History
from ..model.records import Program, WorkerRecord
from ..model.settings import Settings
from ..model.text import headline
from ..system import clock, inherited
from ..system.channel import Channel
from ..system.listener import Listener
from ..system.log import Log
from ..system.loop import SHUT, Loop
from ..system.program import program_of
from ..system.sd_notify import Systemd
from .forwarder import Forwarder
from .generation import Home
from .live_settings import Configuration
from .output import Output
from .socket_steering import SocketSteering
from .start_report import Launcher
from .worker_pool import WorkerPool, what_failed

_LEVELS = {
    News.RELOAD_FAILED: "error",
    News.START_FAILED: "error",
    News.RETRYING: "warning",
    News.MANY_DRAINING: "warning",
    News.REFUSED: "warning",
    News.EXITED: "warning",
    News.BROKEN: "error",
}
#: Why something is missing that the fleet knows.
_KILLED = "the protector was killed while it was being started"
_ENDED = "ended while the protector was killed"
#: Actions that another program has to know of while they are not carried out.
RECORDED = (Signal, Retire, StartTimer)
#: What is stored of each worker that can be gone on with.
_WITHOUT_CHANNEL = {"process", "notify"}
_WITH_CHANNEL = _WITHOUT_CHANNEL | {"line"}
#: News of a generation that has proved itself, where that is asked for.
_SUCCESS = (News.READY, News.RELOADED, News.RECOVERED)

#: A server that has just been started sets up its sockets: looked at after so long, then after
#: twice that, and so on, until it is this.
_FLAGS = "listeners-flags"
_FLAGS_FIRST_S = 1.0
_FLAGS_LAST_S = 64.0
#: From the last worker's end to our own, with time to spare.
_TO_END_S = 5.0


class Effects:
    """The fleet's other half: what the numbers in it stand for."""

    def __init__(
        self,
        settings: Settings,
        listeners: list[Listener],
        *,
        loop: Loop,
        log: Log,
        output: Output,
        systemd: Systemd,
        launcher: Launcher,
        post: Callable[[Event], None],
        held: Callable[[], bool],
        guarded: bool,
        command: tuple[str, ...] = (),
        stay: Callable[[Iterable[str]], bool] = lambda names: False,
    ) -> None:
        """Take ownership of the listeners.  command: executes this program again.

        `post` hands an event to the supervisor; `held` says that the state has changed without one.
        `stay` says whether somebody keeps descriptors of these names beyond our end, for the next
        start.
        """
        self._loop = loop
        self._log = log
        self._held = held
        self._stay = stay
        self._accepts = settings.handoff != LISTENER  # else workers do
        self._nonblocking: tuple[int, ...] = ()
        self._systemd = systemd
        self._launcher = launcher
        self._post = post
        self.homes: dict[int, Home] = {}
        self._released: dict[int, Home] = {}  # until their channels are empty
        self._route: int | None = None
        self._good: Program | None = None  # what served last
        self._due: dict[Deadline, tuple[Deadline, float]] = {}  # when each timer runs out
        self.exit_status: int | None = None
        #: Of the sockets that live on for the next start, once all is closed.
        self.left: tuple[str, ...] = ()
        self.history = History()
        self.restarts = 0
        self.started_at = clock.date()
        self.guarded = guarded
        self.pool = WorkerPool(
            settings,
            loop=loop,
            log=log,
            output=output,
            post=post,
            crashed=self._note_crash,
            late=self._note_last_words,
            listeners=lambda side: self.forwarder.shared(side),
        )
        self.forwarder = Forwarder(
            loop,
            listeners,
            broken=self._route_broken,
            emptied=lambda: post(BacklogEmptied()),
            trouble=self._trouble,
            persist=held,
            dead=lambda listener: self.steering.mend(listener, 0),
            untaken=self._say_untaken,
            accepts=self._accepts,
        )
        self.steering = SocketSteering(
            lambda: self.forwarder.listeners,
            loop=loop,
            log=log,
            quiesced=lambda number: post(Quiesced(number)),
            stranded=lambda: post(Stranded()),
            bound=self._bound_anew,
            lost=self._listener_lost,
            untaken=self._say_untaken,
        )
        self.configuration = Configuration(
            settings,
            pool=self.pool,
            forwarder=self.forwarder,
            steering=self.steering,
            homes=self.homes,
            command=command,
            loop=loop,
            log=log,
            post=post,
        )

    def perform(self, action: Action) -> None:
        """Carry out one action.  What fails comes back as an event."""
        match action:
            case Open(number, fresh):
                self._open(number, fresh)
            case Spawn(number, worker, slot) if number in self.homes:
                generation = self.homes[number]
                self.pool.spawn(worker, slot, number, generation)
            case Signal(worker, sign):
                self.pool.signal(worker, sign)
            case Retire(worker):
                self.pool.retire(worker)
            case RouteTo(number):
                self._route_to(number)
            case Quiesce(number):
                if number in self.homes:
                    self.homes[number].drained_at = clock.date()
                self.steering.quiesce(number)
            case Drain(number) if number in self.homes:
                home = self.homes[number]
                self._loop.unwatch(home.channel.read.fileno())
                home.drained_at = home.drained_at or clock.date()
                self.forwarder.drain(home.channel)
                self.pool.drain(number)
                self.steering.leave(number)
            case Release(number) if number in self.homes:
                self._log.write("info", "drained", generation=number)
                generation = self.homes.pop(number)
                self._released[number] = generation
                self._loop.unwatch(generation.channel.read.fileno())
                generation.forget_board()
                self.forwarder.release(generation.channel)
                self.steering.leave(number)
            case Hold(on):
                self.forwarder.hold(on)
            case ReadSettings():
                self.configuration.read()
            case UseSettings():
                self.configuration.use()
            case ForgetSettings():
                self.configuration.forget()
            case CloseListeners(quick):
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
                self._report(action)
            case Exit(status):
                self.exit_status = status
                self.pool.orphans.when_ended(self._stop_running)
            case _:  # of a generation that could not be opened, and that was told
                pass

    # -- to the next program and from the one before -----------------------------

    def snapshot(self, fleet: Fleet, actions: Iterable[Action], version: str) -> Snapshot:
        """Return all that another program needs to go on, with these actions still to be done.

        Of RECORDED alone anything is told.
        """
        now = time.monotonic()
        coming = [(a.deadline, now + a.seconds) for a in actions if isinstance(a, StartTimer)]
        self._forget_closed()
        generations = (
            *(each.record(n, released=False) for n, each in self.homes.items()),
            *(each.record(n, released=True) for n, each in self._released.items()),
        )
        settings, to_try, used = self.configuration.kept()
        undelivered = self.forwarder.undelivered
        return Snapshot(
            fleet=fleet,
            generations=generations,
            workers=self.pool.records(),
            good=self._good,
            due=(*self._due.values(), *coming),
            undone=tuple(each for each in actions if isinstance(each, Signal | Retire)),
            hand=undelivered.pending_header,
            hand_number=undelivered.number,
            aside=undelivered.parked,
            strays=self.pool.orphans.left,
            forwarded=self.forwarder.forwarded,
            lost=self.forwarder.lost,
            version=version,
            history=self.history,
            started_at=self.started_at,
            restarts=self.restarts,
            log_level=self._log.level,
            settings=settings,
            coming=to_try,
            settings_used=used,
            side=self.steering.current,
            nonblocking=self._note_flags(),
            unserved=tuple(self.steering.unserved),
        )

    def _note_flags(self) -> tuple[int, ...]:
        """Return which of the sockets that were given to us do not block.

        Whoever starts us may set that anew each time (systemd does, by NonBlocking= of the unit),
        under workers that have set it otherwise: it is put back.
        """
        given = [each for each in self.forwarder.listeners if each.shared and each.settings.foreign]
        self._nonblocking = tuple(each.index for each in given if not each.blocks)
        return self._nonblocking

    def _watch_flags(self, after_s: float = _FLAGS_FIRST_S) -> None:
        """See for a while whether workers set them: nothing tells of it."""
        if any(each.shared and each.settings.foreign for each in self.forwarder.listeners):
            if self._nonblocking != self._note_flags():
                self._held()
            if after_s <= _FLAGS_LAST_S:
                again = 2 * after_s
                self._loop.call_after(_FLAGS, after_s, lambda: self._watch_flags(again))

    def _put_back_flags(self, nonblocking: Collection[int]) -> None:
        for each in self.forwarder.listeners:
            if each.shared and each.settings.foreign:
                each.socket.setblocking(each.index not in nonblocking)

    def descriptors(self) -> dict[str, int]:
        """Return all descriptors that the next program needs, by name."""
        return {**self.own_descriptors(), **self.pool.descriptors}

    def own_descriptors(self) -> dict[str, int]:
        """Return those that are not one worker's: as few as there are generations."""
        self._forget_closed()
        found = self.forwarder.descriptors()
        for number, each in (*self.homes.items(), *self._released.items()):
            for name, fd in each.descriptors().items():
                found[f"{inherited.CHANNEL}{number}.{name}"] = fd
        return found

    def _forget_closed(self) -> None:
        self._released = {n: g for n, g in self._released.items() if not g.channel.closed}

    @property
    def exiting(self) -> bool:
        """Whether nothing is left to go on with."""
        return self.exit_status is not None

    def adopt(self, snapshot: Snapshot, descriptors: Mapping[str, int]) -> list[Event]:
        """Go on where another program stopped; takes ownership of the descriptors.

        Then there can be a route, while the workers are adopted.  Returns what it had not come to:
        events of what is in the fleet but was not made yet.
        """
        channels = inherited.under(descriptors, inherited.CHANNEL)
        self._put_back_flags(snapshot.nonblocking)  # first: who lives may be about to accept
        self.steering.current = snapshot.side
        self.steering.unserved = frozenset(snapshot.unserved)
        if snapshot.fleet.stopping and not self._they_stay:  # what is shut down, we may have
            self.steering.end()
        broken: list[Event] = []
        for record in snapshot.generations:
            if "read" not in channels.get(str(record.number), {}):
                continue  # not stored yet, so nothing was ever sent to it
            each = Home.adopt(record, channels[str(record.number)])
            if record.released or snapshot.fleet.generation(record.number) is None:
                self._released[record.number] = each
                continue
            self.homes[record.number] = each
            if record.ended:
                continue
            if record.program.handoff == LISTENER:
                self.steering.adopt(record.number, record.side)
            if each.ended:  # its write end could not be stored in time
                broken.append(ChannelBroken(record.number))
            else:
                self._watch(record.number, each.channel)
        for worker, mine, _ in self._workers_of(snapshot, descriptors):
            self.pool.expect(worker, mine)
        serving = snapshot.fleet.of(Phase.SERVING)
        proven = self.homes.get(serving.number) if serving is not None else None
        self._good = proven.program if proven is not None else snapshot.good
        for address in snapshot.strays:
            self.pool.orphans.end(address)
        self.forwarder.forwarded = snapshot.forwarded
        self.forwarder.lost = snapshot.lost
        self.history = snapshot.history
        self.started_at = snapshot.started_at or self.started_at
        self.restarts = snapshot.restarts + 1
        if snapshot.log_level:
            self._log.set_level(snapshot.log_level)
        self.forwarder.undelivered.adopt(
            snapshot.hand, snapshot.hand_number, snapshot.aside, descriptors
        )
        self._close_unknown(descriptors)
        self.configuration.adopt(snapshot)
        for each in self._released.values():
            each.forget_board()
            self.forwarder.release(each.channel)
        for number, each in self.homes.items():
            generation = snapshot.fleet.generation(number)
            if generation is not None and generation.phase is Phase.DRAINING:
                self.forwarder.adopt_drained(each.channel)
        return broken

    def _close_unknown(self, descriptors: Mapping[str, int]) -> None:
        """Close what was on its way into the store, or out of it, when the other was killed."""
        known = set(self.descriptors().values())
        for name, fd in descriptors.items():
            if (
                name.startswith((inherited.CHANNEL, inherited.WORKER, inherited.HAND))
                and fd not in known
            ):
                os.close(fd)

    def _workers_of(
        self, snapshot: Snapshot, descriptors: Mapping[str, int]
    ) -> Iterator[tuple[WorkerRecord, Mapping[str, int], Home]]:
        """Give what can be gone on with: a process, its descriptors and its generation."""
        workers = inherited.under(descriptors, inherited.WORKER)
        for record in snapshot.workers:
            home, mine = self.homes.get(record.generation), workers.get(str(record.number), {})
            if home is not None and "process" in mine:
                yield record, mine, home

    def adopt_workers(
        self, snapshot: Snapshot, descriptors: Mapping[str, int]
    ) -> Iterator[tuple[Event, ...]]:
        """Go on with the workers, one a step; gives what was not come to, as adopt() does."""
        ended: list[WorkerExited] = []
        for record, mine, home in self._workers_of(snapshot, descriptors):
            shared = home.program.handoff == LISTENER
            whole = mine.keys() >= (_WITHOUT_CHANNEL if shared else _WITH_CHANNEL)
            if whole and not record.orphaned:
                self.pool.adopt(record, mine, home)
            else:
                # The rest was given up when it had ended, and that may not have been written down.
                left = self.pool.adopt_group(record, mine, home)
                found = snapshot.fleet.find(record.number)
                if left != (found is not None and found[1].state is State.ORPHANED):
                    ended.append(WorkerExited(record.number, _ENDED, orphans=left))
            yield ()
        yield (*ended, *self._not_made(snapshot.fleet, {each.worker for each in ended}))

    def _not_made(self, fleet: Fleet, ended: Collection[int]) -> list[Event]:
        """Say what is in the fleet and could not be found; of those that ended it is said."""
        known = {record.number for record in self.pool.records()}.union(ended)
        # One that had the route, and whose channel could not be stored, must not keep it.
        lost: list[Event] = [
            OpenFailed(each.number, _KILLED)
            if each.phase in (Phase.STARTING, Phase.ABANDONED)
            else ChannelBroken(each.number)
            for each in fleet.generations
            if each.number not in self.homes
        ]
        for worker in fleet.alive():
            if worker.number not in known:
                self.pool.lost(worker.number)
                lost.append(WorkerExited(worker.number, _KILLED))
        return lost

    def unguarded(self) -> None:
        """Nobody is left who would tell that."""
        self.guarded = False
        self.pool.guarded = False

    def welcome(self, fleet: Fleet) -> None:
        """Say again what the program before may not have come to say."""
        if fleet.served and not fleet.stopping:
            self._systemd.send(
                READY="1", MAINPID=str(self._systemd.pid), STATUS="went on after a restart"
            )
            self._launcher.started()
            if fleet.incoming:
                self._systemd.reloading()
        elif fleet.stopping:
            self._say_stopping()

    # -- generations ---------------------------------------------------------

    def _open(self, number: int, fresh: bool) -> None:
        try:
            configuration = self.configuration
            settings = configuration.to_try if fresh else configuration.settings
            program = self._good if self._good and not fresh else program_of(settings)
            home = Home.make(program, settings.queue, self.steering.free)
        except (OSError, ValueError) as error:
            self._post(OpenFailed(number, what_failed(error)))
            return
        try:
            self._watch(number, home.channel)
        except OSError as error:
            home.forget_board()
            home.channel.close()
            self._post(OpenFailed(number, what_failed(error)))
            return
        if fresh and self._good is not None:
            self.history = self.history.reload_began(number, clock.date())
        self._forget_closed()  # here too: where nobody keeps descriptors nothing else asks
        self.homes[number] = home
        if program.handoff == LISTENER:
            self.steering.enter(number, home.side)
            self._watch_flags()
        capacity = home.channel.capacity()
        if capacity < settings.queue:
            self._log.write(
                "warning",
                "queue-clamped",
                wanted=settings.queue,
                got=capacity,
                hint="raise the sysctl net.core.wmem_max",
            )

    def _watch(self, number: int, channel: Channel) -> None:
        # Seen at once: what is queued may have nobody left who looks.
        self._loop.watch(channel.read.fileno(), lambda: self._shut_down(number), SHUT)

    def _route_to(self, number: int | None) -> None:
        generation = self.homes.get(number) if number is not None else None
        self._route = number if generation is not None else None
        if generation is None:
            self.forwarder.route_to(None)
            return
        again = generation.serving_since > 0.0
        generation.serving_since = generation.serving_since or time.monotonic()
        generation.served_at = generation.served_at or clock.date()
        self.forwarder.route_to(generation.channel)
        self.steering.turn_to(generation.side, again=again)
        self._log.write("info", "route", generation=number)

    def _route_broken(self) -> None:
        if self._route is not None:
            self._shut_down(self._route)

    def _shut_down(self, number: int) -> None:
        """A worker has shut the channel down, which tells us but once."""
        generation = self.homes[number]
        self._loop.unwatch(generation.channel.read.fileno())
        since = generation.serving_since
        self._post(ChannelBroken(number, time.monotonic() - since if since else 0.0))

    @property
    def _they_stay(self) -> bool:
        """Whether the listeners that are ours outlive a stop."""
        ours = [each for each in self.forwarder.listeners if not each.settings.foreign]
        return bool(ours) and self._stay([name for each in ours for name in each.descriptors()])

    def _close_listeners(self, *, quick: bool) -> None:
        stay = self._they_stay
        if quick:
            self.steering.give_back()
        elif (stay or self.steering.share) and not self._accepts and self._route is not None:

            def over() -> None:
                if stay:
                    self.forwarder.close_listeners(quick=True, stay=True)
                    self._post(BacklogEmptied())
                else:
                    self.steering.end()
                    self.forwarder.close_listeners(quick=False)

            self.steering.quiesce_last(self._route, over)
            return
        if not stay:
            self.steering.end()  # else the next start has them, whoever shuts them
        self.forwarder.close_listeners(quick=quick, stay=stay)

    def _bound_anew(self, listener: Listener) -> None:
        self.configuration.bound_anew(listener)
        self._held()

    def _listener_lost(self, listener: Listener, reason: str) -> None:
        """Nobody can come by a listener any more; if by none, whoever supervises us must act."""
        address = listener.settings.address
        hint = "a worker has shut it down; a restart is needed to have it again"
        self._log.write("error", "listener-lost", listen=address, error=reason, hint=hint)
        self._systemd.send(STATUS=f"nobody can connect to {address} any more: it was shut down")
        if all(each.lost for each in self.forwarder.listeners):
            self._post(ListenersLost())

    def _trouble(self, call: str, error: OSError) -> None:
        self._log.write(
            "error", "scarce", call=call, error=error.strerror, hint="accepting again by a timer"
        )

    def untaken_s(self, number: int) -> float | None:
        """Return for how long nobody was taken who waits for a generation; None: no wonder."""
        home = self.homes[number]
        if home.program.handoff == LISTENER:
            return self.steering.untaken_s if number == self._route else None
        return self.forwarder.untaken_s(home.channel)

    def _say_untaken(
        self, seconds: float, waiting: int, ever: bool, listen: str | None = None
    ) -> None:
        """ever: somebody was taken before.  listen: where they wait, if not in the queue."""
        number = self._route
        if number is None:
            return
        home = self.homes[number]
        since = f"for {seconds:.0f} s" if ever else "yet"
        self._log.write(
            "warning",
            "nobody-takes",
            generation=number,
            waiting=waiting,
            listen=listen,
            reason=f"no worker has taken a connection {since}",
            hint=known_servers.hint(
                home.program,
                taken_from=ever,
                advice=lambda: self.pool.advice(number, passes_over=True),
            ),
        )

    # -- what is remembered for people -----------------------------------------

    def _remember(self, report: Report) -> None:
        if report.news is News.STOPPING:
            self.history = self.history.called_off("it was told to stop", clock.date())
        result = {News.RELOADED: "reloaded", News.RELOAD_FAILED: "failed"}.get(report.news)
        if result is not None:
            self.history = self.history.reload_ended(
                report.generation, result, report.reason, clock.date()
            )

    def _note_crash(self, crash: Crash) -> None:
        self.history = self.history.with_crash(crash)

    def _note_last_words(self, worker: int, last_words: str) -> None:
        if last_words:
            self.history = self.history.with_last_words(worker, last_words)

    # -- time and news -------------------------------------------------------

    def _start_timer(self, deadline: Deadline, seconds: float) -> None:
        def passed() -> None:
            self._note_due(deadline)
            unheard = deadline.wait is Wait.START and not self.pool.spoken_with
            advice = self.pool.advice(deadline.target) if unheard else ""
            self._post(DeadlinePassed(deadline, advice))

        self._loop.call_after(deadline, seconds, passed)
        self._note_due(deadline)

    def _note_due(self, deadline: Deadline) -> None:
        """Note when a timer runs out, or that it does not run."""
        due = self._loop.due(deadline)
        if due is None:
            self._due.pop(deadline, None)
        else:
            self._due[deadline] = deadline, due

    def _report(self, report: Report) -> None:
        """Tell the log, systemd and the launcher."""
        first_line = headline(report.reason)
        _, _, last_words = report.reason.partition("\n")
        self._log.write(
            _LEVELS.get(report.news, "info"),
            report.news.value,
            generation=report.generation or None,
            reason=first_line or None,
            last_words=last_words or None,
        )
        self._remember(report)
        if report.news in _SUCCESS:
            self._good = self.homes[report.generation].program
        serves = f"generation {report.generation} serves"
        match report.news:
            case News.READY:
                self._systemd.send(READY="1", MAINPID=str(self._systemd.pid), STATUS=serves)
                self._launcher.started()
            case News.RELOADING:
                self._systemd.reloading()
            case News.RELOADED | News.RECOVERED:
                self._systemd.send(READY="1", STATUS=serves)
            case News.RELOAD_FAILED:
                # There is no word for "failed": ready again, and why in the status.
                self._systemd.send(READY="1", STATUS=f"reload failed: {first_line}")
            case News.START_FAILED:
                self._systemd.send(STATUS=f"start failed: {first_line}")
                self._launcher.failure = report.reason
            case News.STOPPING:
                self._say_stopping(first_line)

    def _stop_running(self) -> None:
        self._loop.running = False

    def _say_stopping(self, reason: str = "") -> None:
        # More time than its own TimeoutStopSec may allow: ours is the one to be kept.
        policy = self.configuration.settings.policy
        status = f"stopping: {reason}" if reason else "stopping"
        usec = int((policy.stop_timeout_s + policy.kill_timeout_s + _TO_END_S) * 1_000_000)
        self._systemd.send(STOPPING="1", STATUS=status, EXTEND_TIMEOUT_USEC=str(usec))

    @property
    def forwarded(self) -> int | None:
        """How many connections were accepted and sent to workers; None where workers accept."""
        return self.forwarder.forwarded if self._accepts else None

    @property
    def lost(self) -> int | None:
        """How many of those were lost on the way; None likewise."""
        return self.forwarder.lost if self._accepts else None

    def close(self) -> None:
        """Close what is left when nothing is supervised any more."""
        self.configuration.stop_reading()
        self.steering.end()
        self.left = self.forwarder.close(self.steering.current)
        self._log.write(
            "info",
            "stopped",
            connections=self.forwarded,
            lost=self.lost or None,
        )
