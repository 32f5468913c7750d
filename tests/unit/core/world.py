"""A model of the world around the lifecycle: processes, channels, timers, listeners.

It carries the actions out as the operating system would, and checks after each event
that the fleet and the world still say the same and that the promises hold.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Self

import pytest

from socketprotector.core import workers
from socketprotector.core.actions import (
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
    WorkerSignal,
)
from socketprotector.core.decide import decide, route_of
from socketprotector.core.events import (
    Answered,
    BacklogEmptied,
    ChannelBroken,
    Deadline,
    DeadlinePassed,
    DryRunRequested,
    Event,
    HandingOver,
    HeldClientsWait,
    HoldReleased,
    HoldRequested,
    KillRequested,
    LameDuckRequested,
    Launched,
    OpenFailed,
    PromoteRequested,
    Quiesced,
    ReloadRequested,
    RenewRequested,
    ReplaceRequested,
    RollbackRequested,
    ScaleRequested,
    SettingsFailed,
    SettingsRead,
    SettleFailed,
    SocketLost,
    StopRequested,
    Stranded,
    TimeExtended,
    TimerKind,
    Untaken,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import (
    LEAVING,
    Fleet,
    Generation,
    LameDuck,
    Next,
    Phase,
    Policy,
    State,
    Stop,
    Worker,
)
from socketprotector.core.reload import failed_in_the_way, in_the_way
from socketprotector.core.rollout import room, waits_to_replace
from socketprotector.core.waiting import Facts, waits
from socketprotector.model.share import WHOLE, Canary

CANARY = Canary(500, 60.0, at_least=10)
POLICIES = [
    Policy(),
    Policy(settle_s=5.0),
    Policy(stop_first=True),
    Policy(stop_first=True, settle_s=5.0, drain_timeout_s=9.0),
    Policy(drain_timeout_s=9.0, start_tries=1),
    Policy(max_draining=1),
    Policy(max_draining=2, settle_s=5.0, drain_timeout_s=9.0),
    Policy(workers_accept=True),
    Policy(workers_accept=True, settle_s=5.0, drain_timeout_s=9.0, max_draining=1),
    Policy(workers_accept=True, stop_first=True),
    Policy(lame_duck_s=4.0, lame_duck_idle_s=1.0, settle_s=5.0),
    Policy(lame_duck_s=4.0, workers_accept=True, stop_first=True),
    Policy(workers_accept=True, ready="any"),
    Policy(workers_accept=True, ready="any", stop_first=True),
    Policy(ready="http"),
    Policy(ready="accept", settle_s=5.0, start_tries=1),
    Policy(settle_s=5.0, settle_check="http:/"),
    Policy(workers_accept=True, ready="any", settle_s=5.0, settle_check="check:true"),
    Policy(canary=CANARY, settle_s=5.0, settle_check="http:/"),
    Policy(canary=CANARY, ready="http"),
    Policy(workers_accept=True, canary=CANARY),
    Policy(surge=1, drain_timeout_s=9.0),
    Policy(surge=2, drain_timeout_s=9.0, settle_s=5.0, settle_check="http:/"),
    Policy(surge=1, drain_timeout_s=9.0, workers_accept=True),
    Policy(surge=2, drain_timeout_s=9.0, workers_accept=True),
    Policy(surge=50, surge_is_percent=True, drain_timeout_s=9.0, workers_accept=True, ready="any"),
    Policy(drain_spread_s=6.0, stop_spread_s=3.0, drain_timeout_s=9.0),
    Policy(drain_spread_s=6.0, drain_timeout_s=9.0, surge=1),
    Policy(stop_spread_s=3.0, workers_accept=True),
]
#: Calm rounds after which everything must have come to rest: a kill follows a TERM follows
#: a drain follows a start, each a round, and a few of these one after another.
ROUNDS = 12

DIED = "exited with status 1"
TURN = Deadline(TimerKind.TURN)
OF_DRY_RUNS = (ReportKind.DRY_RUN, ReportKind.DRY_RUN_PASSED, ReportKind.DRY_RUN_FAILED)
#: What a configuration may change to.
OTHER_POLICIES = (
    Policy(settle_s=5.0),
    Policy(settle_s=5.0, settle_check="http:/"),
    Policy(stop_first=True),
    Policy(drain_timeout_s=9.0, max_draining=1),
    Policy(drain_timeout_s=9.0, surge=1),
    Policy(canary=CANARY),
)


def fleet_rolls(fleet: Fleet) -> bool:
    return fleet.rollout is not None and not fleet.rollout.canary


class World:
    """What the numbers in the fleet stand for: processes, channels, timers, listeners."""

    def __init__(self, policy: Policy, workers: int = 1, configured: bool = False) -> None:
        self.fleet = Fleet(policy=policy, workers_wanted=workers, configured=configured)
        self.processes: dict[int, Spawn] = {}
        self.killed: frozenset[int] = frozenset()
        self.orphaned: frozenset[int] = frozenset()  # of these what they had started is left
        self.lost: frozenset[int] = frozenset()  # orphaned: a kill of the protector lost them
        self.channels: dict[int, str] = {}  # of each generation: open, failed or drained
        self.unlimited: frozenset[int] = frozenset()  # may drain for ever, or until a stop is over
        self.route: int | None = None
        self.sharing: tuple[int, int] | None = None  # a generation with a share of the clients
        self.timers: frozenset[Deadline] = frozenset()
        self.listeners = "open"
        self.held = False
        self.probed: int | None = None  # the generation that is
        self.checked: int | None = None  # the settling generation that is asked
        self.tried: frozenset[int] = frozenset()  # generations that were opened by a dry run
        self.said_tried = False  # that one is being tried
        self.promised: frozenset[int] = frozenset()  # from which numbers on clients await a verdict
        self.verdict = 0  # the generation of the last verdict of a reload
        self.opens_fail = False  # from now on
        self.owed: tuple[Event, ...] = ()  # events that are still to be sent
        self.reader = False  # a reader of the configuration runs
        self.read = False  # what it says is kept, and not used yet
        self.exited = False
        self.highest_generation = 0
        self.spawned: frozenset[int] = frozenset()

    def copy(self) -> Self:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.processes, other.channels = dict(self.processes), dict(self.channels)
        return other

    def key(self) -> Hashable:
        """Two worlds with the same key go on alike; `check` holds the rest to the fleet."""
        rest = self.listeners, self.reader, self.read, self.promised
        return self.fleet, self.killed, self.owed, *rest

    # -- what happens --------------------------------------------------------

    def take(self, event: Event) -> None:
        """Tell the lifecycle an event, carry out what it orders, look whether all is well."""
        if isinstance(event, WorkerExited):
            if event.orphans and event.worker in self.processes:
                self.orphaned |= {event.worker}
                self.lost |= {event.worker} if event.lost else set()
            else:
                self.processes.pop(event.worker, None)
        elif isinstance(event, DeadlinePassed):
            self.timers -= {event.deadline}
        elif isinstance(event, BacklogEmptied) and self.listeners == "closing":
            self.listeners = "closed"
        elif isinstance(event, SettingsRead | SettingsFailed) and self.reader:
            self.reader, self.read = False, isinstance(event, SettingsRead)
        self.owed = tuple(each for each in self.owed if each != event)
        launched = self.fleet.next_generation > 1  # before, no control socket is there
        if isinstance(event, ReloadRequested) and launched and not self.fleet.stop_requested:
            self.promised |= {self.fleet.next_reload}

        before, was_over = self.fleet, self.exited
        self.fleet, actions = decide(before, event)

        assert not (was_over and actions), "nothing follows after Exit"
        for action in actions:
            assert not self.exited, "Exit is the last action"
            self.perform(action)
        self.stepped(before, event, actions)

    def stepped(self, before: Fleet, event: Event, actions: tuple[Action, ...]) -> None:
        """Check the state that a step has led to, and the step."""
        self.check()
        check_step(before, event, self.fleet, actions)

    def perform(self, action: Action) -> None:
        match action:
            case Open(number, _, dry_run):
                self.tried |= {number} if dry_run else set()
                assert number > self.highest_generation, "a generation's number is never used twice"
                assert "quiescing" not in self.channels.values(), (
                    "three would accept from two sockets"
                )
                self.highest_generation = number
                self.channels[number] = "failed" if self.opens_fail else "open"
                if self.opens_fail:
                    self.owed += (OpenFailed(number, "command not found"),)
            case Spawn(number, worker, slot):
                assert worker not in self.spawned, "a worker's number is never used twice"
                self.spawned |= {worker}
                assert number in self.channels, "spawned into a generation that is not open"
                closed = self.listeners == "closed" and self.fleet.policy.workers_accept
                assert not closed, "spawned to accept where nothing listens any more"
                others = [
                    p.slot
                    for other, p in self.processes.items()
                    if p.generation == number and other not in self.orphaned
                ]
                assert slot not in others, "two living workers in one slot"
                # A stop starts one for queued clients that no other worker can take.
                if self.fleet.newest_policy.rolls and self.fleet.stopping is None:
                    allowed = len(self.processes) < self.fleet.most_processes
                    assert allowed or self.is_first(number, worker), "more processes than allowed"
                if self.channels[number] != "failed":
                    self.processes[worker] = action
            case Signal(worker, kind):
                assert worker in self.processes or "failed" in self.channels.values()
                if kind is WorkerSignal.KILL:
                    self.killed |= {worker}
            case Retire(worker):
                assert worker in self.processes
            case RouteTo(None):
                assert self.route is not None, "an order that changes nothing"
                self.route = self.sharing = None
            case RouteTo(number, sharing, share):
                before = self.route, self.sharing
                after = number, (sharing, share) if sharing else None
                assert before != after, "an order that changes nothing"
                self.sharing = after[1]
                if sharing:
                    assert 0 < share < WHOLE
                    assert self.channels[sharing] == "open", "a share for what cannot take it"
                    assert sharing not in self.tried
                assert self.channels[number or 0] == "open", "routed to what cannot take it"
                assert number not in self.tried, "clients for what was only to be tried"
                self.route = number
            case Quiesce(number):
                assert self.fleet.policy.workers_accept
                assert self.channels[number] == "open", "quiesces twice, or what is not there"
                assert self.route != number, "quiesces, and gets new clients"
                # It may be gone, and the next one be opened, before this event is answered.
                coming = self.fleet.to_open or self.fleet.incoming
                assert self.route or coming, "quiesces, and no other generation gets new clients"
                self.channels[number] = "quiescing"
            case EndEvenly(number, worker, seconds):
                policy = self.fleet.policy
                # A quiescing generation is ordered when it drains.
                assert self.channels[number] in ("open", "quiescing", "drained")
                assert self.route != number or worker, "ends connections while it gets new ones"
                limit_s = policy.drain_limit_s or seconds
                assert seconds <= (policy.stop_timeout_s if self.fleet.stopping else limit_s)
            case Drain(number):
                assert self.channels[number] in ("open", "quiescing"), "drained twice"
                gets = self.route, self.sharing[0] if self.sharing else None
                assert number not in gets, "invariant 3: drained before the route"
                self.channels[number] = "drained"
                if self.fleet.stopping or not self.fleet.policy.drain_limit_s:
                    self.unlimited |= {number}
            case Release(number):
                assert self.route != number
                runs = number in [p.generation for p in self.processes.values()]
                assert not runs, "invariant 4: released before its workers have exited"
                del self.channels[number]
            case CloseListeners(quick):
                assert self.listeners == "open" or (quick and self.listeners == "closing")
                self.listeners = "closed" if quick else "closing"
            case Probe(number):
                assert self.channels[number] in ("open", "failed")
                assert self.route != number, "it serves, and is asked whether it may"
                self.probed = number
            case StopProbing(number):
                assert self.probed in (None, number), "another generation is probed"
                self.probed = None
            case CheckSettling(number):
                assert self.checked is None, "two are asked at once"
                has_share = self.sharing and self.sharing[0] == number
                assert self.route == number or has_share, "it has no clients, and is checked"
                self.checked = number
            case StopChecking(number):
                assert self.checked == number
                self.checked = None
            case Hold(on):
                assert self.held != on, "an order that changes nothing"
                self.held = on
            case StartTimer(deadline, seconds, extend):
                assert seconds > 0 or deadline == TURN
                assert deadline in self.timers or not extend, "a request for time started a timer"
                self.timers |= {deadline}
            case CancelTimer(deadline):
                assert deadline in self.timers, "cancelled what does not run"
                self.timers -= {deadline}
            case ReadSettings():
                assert not self.reader, "read twice at once"
                assert not self.read, "read while what was read before is tried"
                self.reader = True
            case UseSettings():
                assert self.read, "nothing was read"
                self.read = False
            case ForgetSettings():
                assert self.reader or self.read, "nothing to forget"
                self.reader = self.read = False
            case Exit():
                assert not self.reader, "a reader is still running"
                assert self.probed is None, "the probes continue"
                assert self.checked is None
                assert not self.read
                assert self.sharing is None
                left = (self.processes, self.channels, self.timers, self.route)
                assert left == ({}, {}, frozenset(), None), f"left at Exit: {left}"
                assert self.listeners == "closed"
                self.exited = True
            case Report(news) if news in OF_DRY_RUNS:
                self.said_tried = news is ReportKind.DRY_RUN
            case Report(ReportKind.RELOADED | ReportKind.RELOAD_FAILED, number):
                assert number > self.verdict, "a second verdict"
                self.verdict = number
                self.promised = frozenset(each for each in self.promised if each > number)

    # -- what holds at all times ---------------------------------------------

    def check(self) -> None:
        fleet = self.fleet
        assert fleet.timers == self.timers
        for deadline in self.timers:
            assert self.is_about_something(deadline), f"a timer for what is gone: {deadline}"
        assert [g.number for g in fleet.generations] == sorted(self.channels)
        for phase in (Phase.STARTING, Phase.SETTLING, Phase.SERVING):
            assert len(fleet.all_of(phase)) <= 1, f"two are {phase.value}"
        assert not (fleet.of(Phase.STARTING) and fleet.of(Phase.SETTLING))
        assert fleet.held == self.held == self.runs(TimerKind.HOLD)
        assert not (self.held and fleet.stop_requested), "what waits would never be taken"
        assert self.runs(TimerKind.LAME_DUCK) + fleet.stop_awaits_rescue == (
            fleet.lame_duck is LameDuck.STOPPING
        ), "a requested stop has no end"
        if fleet.stop_awaits_rescue:
            assert fleet.policy.has_two_places
            failed = (g for g in fleet.all_of(Phase.ABANDONED) if g.workers and not g.fresh)
            renews = fleet.is_renewing or self.runs(TimerKind.TURN) or any(failed)
            assert renews, "a stop waits for nothing"
            assert not (fleet.incoming and fleet.incoming.fresh), "a release comes before a stop"
        assert not (fleet.stopping and fleet.lame_duck is not LameDuck.OFF)
        assert self.route == (fleet.route.number if fleet.route else None)
        order = route_of(fleet)
        assert self.sharing == ((order.sharing, order.share) if order.sharing else None)
        self.check_rollout()

        for generation in fleet.generations:
            self.check_generation(generation)
            for worker in generation.workers:
                self.check_worker(generation, worker)
        known = {worker.number for worker in fleet.alive()}
        assert set(self.processes) <= known, "a worker is forgotten"

        self.check_waits()
        starting = fleet.of(Phase.STARTING)
        assert self.said_tried == fleet.dry_run, "who waits for a dry run's verdict waits for ever"
        if fleet.dry_run:
            self.check_dry_run(starting)
        if self.promised:
            assert self.a_reload_comes(), "who waits for a reload's verdict waits for ever"
        if starting is None or self.probed not in (None, starting.number):
            assert self.probed is None, "the probed generation does not start"
        elif self.runs(TimerKind.SETTLE, starting.number):
            pass  # it has answered
        elif fleet.policy_of(starting.fresh).probes and not (
            self.runs(TimerKind.TURN) or room(fleet, 1, starting) == 0
        ):
            assert self.probed == starting.number, "nothing probes it"
        settling = fleet.of(Phase.SETTLING)
        assert self.checked == (settling.number if settling and settling.checked else None)
        assert [g for g in fleet.generations if g.checked] in ([], [settling])
        assert fleet.reading == self.reader
        assert (fleet.candidate is not None) == self.read
        if fleet.stopping:
            assert not fleet.to_open
            assert not fleet.incoming
            assert not fleet.reload_wanted
        elif fleet.served:
            self.check_one_serves_or_will()
            self.check_clients_find_a_worker()
        if fleet.stopping is Stop.GRACEFUL and not self.exited:
            assert self.runs(TimerKind.STOP)
        if fleet.stopping is Stop.QUICK:
            assert all(generation.ending for generation in fleet.generations)
            assert self.listeners == "closed"

    def check_rollout(self) -> None:
        fleet, incoming = self.fleet, self.fleet.incoming
        if fleet.sharing:
            assert fleet.sharing.ready_workers, "a share, and no worker is ready"
        if fleet.rollout:
            assert fleet.is_opening
        assert not (fleet.canary_wanted and not fleet.reload_wanted)
        if incoming is None or not fleet.of(Phase.SERVING) or fleet.stopping:
            return
        waits = self.runs(TimerKind.TURN) or self.runs(TimerKind.SETTLE, incoming.number)
        if fleet_rolls(fleet) and incoming.phase is Phase.SETTLING and not waits:
            complete = incoming.ready and len(incoming.workers) >= fleet.full_size(incoming)
            assert not complete, "complete, and not promoted"

    def check_dry_run(self, starting: Generation | None) -> None:
        """It is one thing at a time, and beside a generation that serves."""
        fleet = self.fleet
        assert fleet.of(Phase.SERVING)
        assert not fleet.stopping
        if starting is not None:
            assert starting.number in self.tried
        else:
            assert fleet.reading or fleet.to_open is Next.FRESH
        assert bool(starting) + fleet.reading + bool(fleet.to_open) == 1

    def a_reload_comes(self) -> bool:
        """Whether one is under way, or will be; after a stop, which calls it off, none does."""
        fleet = self.fleet
        coming = fleet.reading or fleet.candidate or fleet.to_open is Next.FRESH
        begun = coming or (fleet.incoming and fleet.incoming.fresh)
        # During the first start, too; it fails, or becomes what is then replaced.
        return bool(fleet.reload_wanted or (begun and fleet.served and not fleet.dry_run))

    def is_about_something(self, deadline: Deadline) -> bool:
        match deadline.wait:
            case TimerKind.OPEN:
                return self.fleet.to_open is not None
            case TimerKind.HOLD:
                return self.held
            case TimerKind.LAME_DUCK | TimerKind.LAME_DUCK_IDLE:
                return self.fleet.lame_duck is LameDuck.STOPPING
            case TimerKind.STOP:
                return self.fleet.stopping is Stop.GRACEFUL or self.fleet.stop_awaits_rescue
            case TimerKind.START | TimerKind.SETTLE | TimerKind.DRAIN | TimerKind.KILL:
                return self.fleet.generation(deadline.target) is not None
            case TimerKind.TURN:
                return True
            case _:
                return self.fleet.find(deadline.target) is not None

    def is_first(self, number: int, worker: int) -> bool:
        """Whether clients of a generation would have no worker without this one."""
        fleet, generation = self.fleet, self.fleet[number]
        may_rescue = not generation.fresh and fleet.policy.workers_accept
        waited_for = generation.phase is Phase.SERVING or (
            generation.phase is Phase.STARTING and (may_rescue or fleet.of(Phase.SERVING) is None)
        )
        return waited_for and [w.number for w in generation.staying if not w.hung] == [worker]

    def runs(self, wait: TimerKind, target: int = 0) -> bool:
        return Deadline(wait, target) in self.timers

    def check_generation(self, generation: Generation) -> None:
        number, phase = generation.number, generation.phase
        drains = self.channels[number] in ("quiescing", "drained")
        assert drains == (phase is Phase.DRAINING)
        assert generation.quiescing == (self.channels[number] == "quiescing")
        comes = self.runs(TimerKind.TURN) or room(self.fleet, 1, generation) == 0
        begun = bool(generation.workers) or not comes
        proven = phase is Phase.STARTING and self.fleet.dry_run
        proven = proven and self.runs(TimerKind.SETTLE, number)
        starts = phase is Phase.STARTING and begun and not proven
        assert self.runs(TimerKind.START, number) == starts or (proven and begun)
        # While workers are replaced a few at a time, no timer runs.
        rolling = phase is Phase.SETTLING and fleet_rolls(self.fleet)
        settles = (phase is Phase.SETTLING or proven) and not rolling
        assert self.runs(TimerKind.SETTLE, number) == settles or rolling
        coming = phase is Phase.STARTING and comes
        assert generation.workers or coming, "no worker is left in it, and it is not released"
        slots = [w.slot for w in generation.workers if w.state is not State.ORPHANED]
        assert len(slots) == len(set(slots))
        if phase is Phase.ABANDONED:
            assert generation.ending
        if generation.ending and self.channels[number] != "failed":
            told = {worker.number for worker in generation.workers} <= self.killed
            assert self.runs(TimerKind.KILL, number) or told, "TERM without KILL after it"
        numbers = {worker.number for worker in generation.workers}
        for worker in generation.workers:
            assert worker.replaces in {0, *numbers}, "it waits for the place of one that is gone"
        staying = [w for w in generation.workers if w.state not in LEAVING and not w.replaces]
        if phase is Phase.STARTING:
            enough = len(staying) >= self.fleet.wanted_in(generation)
            assert enough or self.runs(TimerKind.TURN) or room(self.fleet, 1, generation) == 0
        if phase is Phase.SERVING and not (self.fleet.incoming or self.fleet.stopping):
            waits = self.runs(TimerKind.TURN) or room(self.fleet, 1, generation) == 0
            assert len(staying) == self.fleet.workers_wanted or waits

    def check_waits(self) -> None:
        """Each wait has its reason, once; where nothing is waited for there is none."""
        fleet = self.fleet
        found = waits(fleet, Facts(dict.fromkeys(self.timers, 1.0)))
        said = [(each.kind, each.generation) for each in found]
        assert len(said) == len(set(said)) or {"worker"} == {
            kind for kind, _ in said if said.count((kind, _)) > 1
        }, "a reason is given twice"
        of_fleet = {kind for kind, number in said if number is None}
        of_generations = [(number, kind) for kind, number in said if number is not None]
        assert ("configuration" in of_fleet) == fleet.reading
        assert ("back-off" in of_fleet) == self.runs(TimerKind.OPEN)
        assert ("hold" in of_fleet) == self.runs(TimerKind.HOLD)
        assert ("lame-duck" in of_fleet) == self.runs(TimerKind.LAME_DUCK)
        assert ("earlier-reload" in of_fleet) >= fleet.reload_wanted
        opens = fleet.listeners_open and fleet.stopping is Stop.GRACEFUL
        assert ("stop" in of_fleet) == bool(opens or fleet.exiting or fleet.stop_awaits_rescue)
        for generation in fleet.generations:
            kinds = [kind for number, kind in of_generations if number == generation.number]
            match generation.phase:
                case Phase.STARTING:
                    assert kinds == ["start"]
                case Phase.SETTLING:
                    rollout = fleet.rollout if fleet.sharing else None
                    kind = "canary" if rollout and rollout.canary else "rolling"
                    assert kinds == [kind if rollout else "settle"]
                case Phase.DRAINING | Phase.ABANDONED:
                    awaited = failed_in_the_way if fleet.to_open is None else in_the_way
                    is_next = fleet.to_open or fleet.reload_wanted
                    coming = is_next and generation in awaited(fleet)
                    assert kinds == ["stop" if fleet.stopping else "room" if coming else "drain"]
                case Phase.SERVING if not fleet.stopping:
                    moves = any(  # READY may have crossed our signal
                        worker.state is not State.READY
                        or self.runs(TimerKind.WORKER_KILL, worker.number)
                        for worker in generation.workers
                    )
                    assert (
                        bool(kinds) == moves
                        or self.runs(TimerKind.TURN)
                        or any(worker.hung for worker in generation.workers)
                    )

    def check_worker(self, generation: Generation, worker: Worker) -> None:
        """Every wait for a worker has a deadline, but those the operator chose to be endless."""
        number = worker.number
        assert worker.alive or number not in self.processes
        assert (worker.state is State.ORPHANED) == (number in self.orphaned)
        waits = self.runs(TimerKind.WORKER_RESPAWN, number)
        assert not (worker.alive and waits)
        delayed = waits or self.runs(TimerKind.TURN) or room(self.fleet, 1, generation) == 0
        delayed = delayed or (worker.replaces > 0 and waits_to_replace(self.fleet, generation))
        assert worker.alive or delayed, "no worker is ever started there"
        last_word = (
            self.runs(TimerKind.WORKER_KILL, number) or number in self.killed or generation.ending
        )
        if worker.state is State.STARTING and generation.phase is not Phase.STARTING:
            assert self.runs(TimerKind.WORKER_START, number) or last_word
        if worker.hung and not any(w.replaces == number for w in generation.workers):
            assert last_word, "it hangs, and no replacement comes"
        if worker.state in LEAVING and self.fleet.policy.drain_timeout_s:
            # One that left before a reload changed the limit has its generation's, as soon as that
            # is told to finish.
            drains = (
                self.runs(TimerKind.DRAIN, generation.number)
                or generation.quiescing
                or generation.number in self.unlimited
            )
            # Orphans under rolling serve until another worker of their slot is ready.
            serves_on = worker.state is State.ORPHANED and self.fleet.policy.rolls
            serves_on = serves_on and any(
                each.slot == worker.slot and each.state in (State.WAITING, State.STARTING)
                for each in generation.workers
            )
            if number in self.lost and generation.phase is Phase.SERVING:
                return  # it serves until its generation drains
            assert self.runs(TimerKind.WORKER_RETIRE, number) or drains or serves_on or last_word

    def check_clients_find_a_worker(self) -> None:
        """None waits only for processes that leave, which may take as long as --drain-timeout."""
        fleet = self.fleet
        if fleet.stopping or self.runs(TimerKind.TURN):
            return
        starting = fleet.of(Phase.STARTING)
        may_rescue = starting and not starting.fresh and fleet.policy.workers_accept
        if fleet.of(Phase.SERVING) and not may_rescue:
            starting = None  # clients reach the other one
        for generation in filter(None, (fleet.route, fleet.sharing, starting)):
            found = any(not worker.hung for worker in generation.staying)
            ended = any(
                self.runs(TimerKind.WORKER_KILL, w.number) or w.number in self.killed
                for w in generation.staying
            )
            comes = any(self.runs(TimerKind.WORKER_RESPAWN, w.number) for w in generation.workers)
            assert found or ended or comes, "clients wait until other processes have left"

    def is_in_the_place_of_the_next(self, generation: Generation) -> bool:
        """Whether it accepts where the next one is to accept; it has an end."""
        abandoned = self.fleet.policy.workers_accept and generation.phase is Phase.ABANDONED
        return generation.quiescing or abandoned

    def check_one_serves_or_will(self) -> None:
        fleet = self.fleet
        if fleet.route or fleet.incoming or self.runs(TimerKind.OPEN):
            return
        assert fleet.to_open, "no generation serves, and none ever will"
        policy = fleet.policy_of(fleet.to_open is Next.FRESH)
        if any(self.is_in_the_place_of_the_next(each) for each in fleet.generations):
            return
        assert policy.stop_first, "nothing stands in the way, and nothing is opened"
        for generation in fleet.generations:  # each of which has an end
            deadline = self.runs(TimerKind.DRAIN, generation.number) or generation.ending
            assert deadline, "what is to come waits for a generation that may stay for ever"

    # -- what could happen next ----------------------------------------------

    def asked(self) -> Iterator[Event]:
        yield ReloadRequested()
        yield ReloadRequested()
        yield ReloadRequested(CANARY)
        yield PromoteRequested()
        yield PromoteRequested(now=True, met=5)
        yield RollbackRequested()
        yield DryRunRequested()
        yield ScaleRequested(-1)
        if self.fleet.workers_wanted < 4:
            yield ScaleRequested(+1)
            yield ScaleRequested(to=2)
        yield HoldRequested(3.0)
        yield HoldRequested(3.0, left_s=1.0)
        yield HoldReleased()
        yield LameDuckRequested(True)
        yield LameDuckRequested(False)
        yield RenewRequested()
        yield Stranded()
        yield HeldClientsWait()
        yield HandingOver()
        yield from map(SocketLost, self.channels)
        yield from map(KillRequested, self.channels)
        for number in self.processes:
            yield ReplaceRequested(number, "too old")
            yield ReplaceRequested(number, "silent", hung=True)

    def stopped(self) -> Iterator[Event]:
        yield StopRequested()
        yield StopRequested(quick=True)

    def ready(self) -> Iterator[Event]:
        for number in self.processes:
            yield WorkerReady(number)
            yield WorkerReady(number, retires=True)
        if self.is_answering():
            yield Answered(self.probed or 0)

    def is_answering(self) -> bool:
        """Whether a generation is asked that could be opened."""
        return self.probed is not None and self.channels[self.probed] == "open"

    def died(self) -> Iterator[Event]:
        for number in self.processes:
            if number in self.orphaned:
                yield WorkerExited(number, "orphans gone")
                continue
            yield WorkerExited(number, DIED)
            yield WorkerExited(number, DIED, orphans=True)
            if number == min(self.processes):  # the others make no difference
                yield WorkerExited(number, DIED, orphans=True, lost=True)
            yield WorkerExited(number, DIED, waiting=3, orphans=True)
            yield WorkerExited(number, DIED, waiting=3)
            yield WorkerExited(number, DIED, served_s=20.0)
            yield WorkerExited(number, "exited with status 0", detached=True)

    def waited(self) -> Iterator[Event]:
        for deadline in sorted(self.timers, key=repr):
            yield DeadlinePassed(deadline, met=20)
            if deadline.wait is TimerKind.SETTLE:
                yield DeadlinePassed(deadline)

    def broke(self) -> Iterator[Event]:
        for number in self.channels:
            yield ChannelBroken(number)
            yield ChannelBroken(number, served_s=20.0)

    def told(self) -> Iterator[Event]:
        yield Launched()
        yield from self.owed
        yield from (TimeExtended(number, 7.0) for number in self.processes)
        yield from (Quiesced(n) for n, state in self.channels.items() if state == "quiescing")
        if self.listeners == "closing":
            yield BacklogEmptied()
        if self.checked is not None:
            yield SettleFailed(self.checked, "GET /: 500")
        yield from (Untaken(each.number, "no worker") for each in self.fleet.generations)
        if self.reader:
            yield from self.read_again()

    def read_again(self) -> Iterator[Event]:
        """What comes of reading the configuration."""
        for other in (self.fleet.policy, *OTHER_POLICIES):
            policy = replace(other, workers_accept=self.fleet.policy.workers_accept)
            yield SettingsRead(policy, None)
            yield SettingsRead(policy, 3)
            yield SettingsFailed("line 1: no TOML")

    def late(self) -> Iterator[Event]:
        """About what was, never was, or does not wait for it."""
        for number in range(max(self.spawned, default=0) + 2):
            found = self.fleet.find(number)
            never = found and self.channels[found[0].number] == "failed"
            if number not in self.processes and not never:
                yield from (WorkerReady(number), TimeExtended(number, 7.0))
                yield WorkerExited(number, DIED, waiting=3)
                yield ReplaceRequested(number, "silent", hung=True)
        for number in range(self.highest_generation + 2):
            if number != self.checked:
                yield SettleFailed(number, "too late")
            if number != self.probed and self.channels.get(number) != "failed":
                yield Answered(number)
            if number not in self.channels:
                yield KillRequested(number)
                yield Quiesced(number)
                yield from (ChannelBroken(number), OpenFailed(number, "command not found"))
            for wait in TimerKind:
                if not self.runs(wait, number):
                    yield DeadlinePassed(Deadline(wait, number))
        if self.listeners != "closing":
            yield BacklogEmptied()
        if not self.reader:
            yield from (SettingsRead(self.fleet.policy, 2), SettingsFailed("too late"))

    def pick(self, choice: int) -> Event:
        """Choose what happens next; the same choice in the same world is the same event."""
        kinds: list[Callable[[], Iterator[Event]]] = [
            *[self.ready] * 10,
            *[self.asked] * 5,
            *[self.waited] * 5,
            *[self.died] * 4,
            *[self.told] * 3,
            self.late,
            self.broke,
            self.stopped,
            *[self.read_again] * (2 if self.reader else 0),
        ]
        choice, kind = divmod(choice, len(kinds))
        events = list(kinds[kind]()) or list(self.told())
        return events[choice % len(events)]

    # -- how it all ends -----------------------------------------------------

    def let_time_pass(self, *, all_goes_well: bool = False) -> None:
        """Events that are due are sent, workers told to go are gone, every timer is over.

        all_goes_well: from now on commands exist, and workers are ready in time.
        """
        self.opens_fail = self.opens_fail and not all_goes_well
        while self.runs(TimerKind.TURN):
            self.take(DeadlinePassed(TURN))
        for event in self.owed:
            self.take(event)
        if self.reader:
            self.take(SettingsRead(self.fleet.policy, 2))
        for number in [n for n, state in self.channels.items() if state == "quiescing"]:
            self.take(Quiesced(number))
        if all_goes_well:
            for number in [*self.processes]:
                self.take(WorkerReady(number))
            if self.is_answering():
                self.take(Answered(self.probed or 0))
        for number in [*self.processes]:
            found = self.fleet.find(number)
            assert found
            generation, worker = found
            drained = generation.phase is Phase.DRAINING
            told = self.runs(TimerKind.WORKER_KILL, number) or worker.state in LEAVING
            if generation.ending or drained or told:
                self.take(WorkerExited(number, "exited with status 0", served_s=20.0))
        if self.listeners == "closing":
            self.take(BacklogEmptied())
        for deadline in sorted(self.timers, key=repr):
            in_time = all_goes_well and deadline.wait in (TimerKind.START, TimerKind.WORKER_START)
            if deadline in self.timers and not in_time:
                self.take(DeadlinePassed(deadline))


def check_step(before: Fleet, event: Event, after: Fleet, actions: tuple[Action, ...]) -> None:
    """What holds between before and after."""
    news = [action.news for action in actions if isinstance(action, Report)]
    serving = before.of(Phase.SERVING)
    # One that was to follow, and that a stop has called off, was nothing yet.
    wish = before.reload_wanted and not after.reload_wanted and after.stop_requested
    failed = news.count(ReportKind.RELOAD_FAILED) > wish
    if failed and serving and after.stopping is not Stop.QUICK:
        route = after.route
        assert route
        assert route.number == serving.number, "a failed reload changed what serves"
        if before.workers_wanted >= len(serving.workers):  # else some leave now for that
            # A stop may start a worker that waits for a back-off.
            assert set(serving.alive) <= set(route.workers)
            assert {each.number for each in serving.workers} <= {w.number for w in route.workers}
    if failed:
        assert before.policy == after.policy
    if ReportKind.SCALED not in news and UseSettings() not in actions:
        assert before.workers_wanted == after.workers_wanted
    check_stop(before, after, news)
    if before.dry_run:
        check_dry_run_step(before, after, news, actions)
    if UseSettings() in actions:
        assert ReportKind.RELOADED in news, "used before it serves"
    if isinstance(event, SettleFailed | Untaken) and failed:
        assert serving
        back = actions.index(RouteTo(serving.number))
        drained = (Drain(event.generation), Quiesce(event.generation))
        assert back < min(actions.index(each) for each in drained if each in actions)
    lost_route = RouteTo(None) in actions
    read = event.policy.stop_first if isinstance(event, SettingsRead) else False
    stop_first = before.policy_of(True).stop_first or before.policy.stop_first or read
    if lost_route and not stop_first:
        # A stuck or late worker fails its settling generation, even if no older one is left.
        stuck = isinstance(event, ReplaceRequested) and event.hung and serving is None
        late = isinstance(event, DeadlinePassed) and event.deadline.wait is TimerKind.WORKER_START
        late = late and serving is None
        assert stuck or late or isinstance(event, ChannelBroken | WorkerExited) or after.stopping
    if isinstance(event, WorkerExited) and lost_route:
        assert before.of(Phase.SERVING) is None or stop_first or after.stopping
    if ReportKind.START_FAILED in news:
        assert not before.served
        assert after.exit_status == 3
    assert before.served <= after.served
    if Open(after.next_generation - 1, False) in actions:
        assert before.served, "there is no last good command yet"


def check_stop(before: Fleet, after: Fleet, news: list[ReportKind]) -> None:
    """What settles serves to the end, or is ended with all others; it is said which."""
    if before.stopping or not after.stopping:
        return
    settling = before.of(Phase.SETTLING)
    unproved = before.rollout is not None and before.of(Phase.SERVING) is not None
    stays = settling if after.stopping is Stop.GRACEFUL and not unproved else None
    assert (ReportKind.RELOADED in news) == (stays is not None and stays.fresh)
    assert (ReportKind.RECOVERED in news) == (stays is not None and not stays.fresh)
    if settling and not stays:
        assert ReportKind.RELOAD_FAILED in news


def check_dry_run_step(
    before: Fleet, after: Fleet, news: list[ReportKind], actions: tuple[Action, ...]
) -> None:
    """What a dry run leaves as it was, whatever comes of it."""
    assert ReportKind.RELOADED not in news
    if ReportKind.RELOAD_FAILED in news:
        assert before.reload_wanted, "there was one to follow it"
        assert after.stop_requested
    verdicts = news.count(ReportKind.DRY_RUN_PASSED) + news.count(ReportKind.DRY_RUN_FAILED)
    assert verdicts == (before.dry_run and not after.dry_run)
    if ReportKind.DRY_RUN_PASSED in news:
        assert before.route == after.route
        assert not any(isinstance(each, RouteTo | UseSettings | Drain) for each in actions)
        begun = ReportKind.RELOADING in news  # it was wanted meanwhile, and forgets what failed
        assert before.failed_starts == after.failed_starts or begun
    if verdicts:
        assert before.policy == after.policy
        assert after.candidate is None


@pytest.fixture(autouse=True, scope="module")
def one_at_a_time() -> Iterator[None]:
    """Have the loop turn after each start of a worker, and all else come in between."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "AT_ONCE", 1)
        yield
