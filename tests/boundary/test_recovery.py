"""What a program does with descriptors of an earlier one that the state does not mention."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.core.decide import decide
from socketprotector.core.events import Event, OpenFailed, WorkerExited
from socketprotector.core.fleet import Fleet, Generation, Phase, Policy, State, Worker
from socketprotector.core.snapshot import Snapshot
from socketprotector.daemon.recovery import Recovery
from socketprotector.model.lazy_dataclass import replace
from socketprotector.model.records import (
    GenerationRecord,
    Program,
    SettingsRecord,
    WorkerRecord,
)
from socketprotector.model.settings import Settings
from socketprotector.system.inherited import Inherited

KILLED = "it was starting when the protector was killed"
PHASES = (Phase.SERVING, Phase.STARTING)
_WAITS = "import signal; signal.pause()"


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", _WAITS]) as made:
        yield made
        made.kill()


def recovery(worker: int, pidfd: int, *records: WorkerRecord, handoff: str) -> Recovery:
    """One that is left a worker, with only these in the state."""
    settings = Settings(
        name="x", command=("x",), directory="/", listeners=(), handoff=handoff, drain_signal=15
    )
    effects = SimpleNamespace(live_settings=SimpleNamespace(settings=settings))
    return Recovery(
        cast("Any", effects),
        Snapshot(Fleet(), SettingsRecord(settings), workers=records),
        Inherited({f"sp.worker.{worker}.process": pidfd}),
    )


def test_a_worker_that_accepts_and_that_the_state_does_not_mention_is_told_to_finish(
    process: subprocess.Popen[bytes],
) -> None:
    """It was started while the state could not be written; then the protector was killed."""
    pidfd = os.pidfd_open(process.pid)
    known = WorkerRecord(12, 1, 4711, 0)

    recovery(13, pidfd, known, handoff="listener").dismiss_unknown()

    assert process.wait() == -signal.SIGTERM
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pidfd)


def test_it_gets_the_signal_of_the_newest_generation(process: subprocess.Popen[bytes]) -> None:
    """A reload that changes --drain-signal was starting it."""
    made = recovery(13, os.pidfd_open(process.pid), handoff="listener")
    old, new = (
        Program("/", (), "/", (), 0, (), 0, handoff="listener", drain_signal=int(each))
        for each in (signal.SIGQUIT, signal.SIGUSR1)
    )
    generations = GenerationRecord(9, new), GenerationRecord(8, old)
    made.snapshot = replace(made.snapshot, generations=generations)

    made.dismiss_unknown()

    assert process.wait() == -signal.SIGUSR1


def test_one_that_has_ended_already_is_only_forgotten(process: subprocess.Popen[bytes]) -> None:
    pidfd = os.pidfd_open(process.pid)
    process.kill()
    process.wait()

    recovery(13, pidfd, handoff="listener").dismiss_unknown()

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pidfd)


@pytest.mark.parametrize(("handoff", "number"), [("connection", 12), ("listener", 13)])
def test_one_that_is_known_or_reads_the_end_of_its_line_is_sent_no_signal(
    process: subprocess.Popen[bytes], handoff: str, number: int
) -> None:
    known = WorkerRecord(13, 1, process.pid, 0)

    recovery(number, os.pidfd_open(process.pid), known, handoff=handoff).dismiss_unknown()

    process.kill()
    assert process.wait() == -signal.SIGKILL, "a signal that was sent before comes first"


def test_a_worker_that_ran_and_was_not_stored_has_served_until_now() -> None:
    """The fd store had no room for its descriptors."""
    pool = SimpleNamespace(
        records=lambda: (),
        addresses=lambda _: (),
        leftovers=SimpleNamespace(find=lambda *_: None),
    )
    record = WorkerRecord(12, 1, 4711, 0, ready_at=time.monotonic() - 100)
    made = recovery(12, os.open(os.devnull, os.O_RDONLY), record, handoff="connection")
    made.unclaimed.close()
    made.effects = cast(
        "Any",
        SimpleNamespace(pool=pool, generations={1: None}, live_settings=made.effects.live_settings),
    )
    serving = Generation(1, Phase.SERVING, workers=(Worker(12, 0, State.READY),))
    fleet = Fleet(generations=(serving,), served=True)
    made.snapshot = replace(made.snapshot, fleet=fleet)

    [(ended,)] = made.adopt_workers()

    assert isinstance(ended, WorkerExited)
    assert "not stored" in ended.reason
    assert ended.served_s >= 100


@pytest.mark.parametrize(
    ("orphaned", "group", "state"),
    [
        (False, True, State.READY),
        (False, False, State.READY),
        (True, False, State.ORPHANED),
        (True, True, State.READY),  # the state was written before its exit was handled
        (True, False, State.READY),
    ],
)
def test_a_worker_whose_descriptors_were_stored_in_part_did_not_end_before(
    orphaned: bool, group: bool, state: State
) -> None:
    """The fd store had room for its process, and not for its notify socket."""
    pool = SimpleNamespace(
        records=lambda: (),
        addresses=lambda _: (),
        adopt_group=lambda *_: group,
        leftovers=SimpleNamespace(find=lambda *_: None),
    )
    record = WorkerRecord(12, 1, 4711, 0, orphaned=orphaned)
    made = recovery(12, os.open(os.devnull, os.O_RDONLY), record, handoff="listener")
    made.effects = cast(
        "Any",
        SimpleNamespace(pool=pool, generations={1: None}, live_settings=made.effects.live_settings),
    )
    program = SimpleNamespace(finish_signal=signal.SIGTERM)
    generation = cast("Any", SimpleNamespace(program=program))
    descriptors = made.unclaimed.take("sp.worker.", 12)
    made._workers.append((record, descriptors, generation))
    serving = Generation(1, Phase.SERVING, workers=(Worker(12, 0, state),))
    made.snapshot = replace(made.snapshot, fleet=Fleet(generations=(serving,), served=True))

    _, (ended,) = made.adopt_workers()
    os.close(descriptors["process"])

    assert isinstance(ended, WorkerExited)
    assert ("not stored" in ended.reason) == (not orphaned)
    if group:
        assert ended.lost == (not orphaned), "the worker itself may run"


@pytest.mark.parametrize("opened", [True, False])
def test_a_worker_that_was_being_started_counts_until_no_process_has_its_address(
    opened: bool,
) -> None:
    """The protector was killed after it had started the process, and before it could record it."""
    events: list[Event] = []
    ends: list[Callable[[None, None], None]] = []
    addresses = ("/notify/13", "@notify-13")
    pool = SimpleNamespace(
        records=lambda: (WorkerRecord(12, 1, 4711, 0),),
        addresses=lambda number: addresses if number == 13 else (),
        leftovers=SimpleNamespace(find=lambda number, where, *more: ends.append(more[-1])),
    )
    generations = {1: None, 2: None} if opened else {1: None}
    made = recovery(12, os.open(os.devnull, os.O_RDONLY), handoff="connection")
    made.unclaimed.close()
    made.effects = cast(
        "Any",
        SimpleNamespace(
            pool=pool,
            generations=generations,
            live_settings=made.effects.live_settings,
            runtime=SimpleNamespace(post=events.append),
        ),
    )
    workers = [(Worker(12, 0, State.READY),), (Worker(13, 0, State.STARTING),)]
    first, second = (Generation(n + 1, phase, workers=workers[n]) for n, phase in enumerate(PHASES))
    fleet = Fleet(generations=(first, second), served=True)
    made.snapshot = Snapshot(fleet, made.snapshot.settings)

    [posted] = made.adopt_workers()

    assert posted == (
        *(() if opened else (OpenFailed(2, KILLED, (13,)),)),
        WorkerExited(13, KILLED, orphans=True, lost=True),
    )
    for event in posted:
        fleet, _ = decide(fleet, event)
    assert 13 in [each.number for each in fleet.alive()]
    assert not events
    [found] = ends
    found(None, None)
    assert events == [WorkerExited(13, "orphans gone")]
    fleet, _ = decide(fleet, events[0])
    assert [each.number for each in fleet.alive()] == [12]


def unadopted(
    worker: Worker,
    *records: WorkerRecord,
    beside: tuple[Worker, ...] = (),
    orders: tuple[tuple[str, int], ...] = (),
    waiting: int = 0,
    policy: Policy | None = None,
) -> tuple[tuple[Event, ...], list[tuple[object, ...]], list[Event]]:
    """Recover without a worker's descriptors.

    Return the events, what was asked of Leftovers, and the event of the worker's end.
    """
    orders_given: list[tuple[object, ...]] = []
    gone: list[Callable[[None, None], None]] = []
    posted: list[Event] = []
    taken: list[int] = []

    def find(
        number: int,
        addresses: tuple[str, ...],
        generation: int,
        finish_signal: int,
        order: int | None,
        then: Callable[[None, None], None],
    ) -> None:
        assert (number, addresses, generation) == (worker.number, ("@notify-13",), 1)
        orders_given.append((finish_signal, order))
        gone.append(then)

    made = recovery(12, os.open(os.devnull, os.O_RDONLY), *records, handoff="listener")
    made.unclaimed.close()
    made.effects = cast(
        "Any",
        SimpleNamespace(
            pool=SimpleNamespace(
                records=lambda: beside,
                addresses=lambda number: (f"@notify-{number}",),
                leftovers=SimpleNamespace(find=find),
            ),
            live_settings=made.effects.live_settings,
            generations={1: SimpleNamespace(take_counts=taken.append)},
            delivery=SimpleNamespace(waiting=lambda _, clients_only: waiting),
            runtime=SimpleNamespace(post=posted.append),
        ),
    )
    program = Program("/", (), "/", (), 0, (), 0, handoff="listener", drain_signal=signal.SIGQUIT)
    made.snapshot = replace(
        made.snapshot,
        fleet=Fleet(
            policy or Policy(),
            generations=(Generation(1, Phase.SERVING, workers=(worker, *beside)),),
            served=True,
        ),
        generations=(GenerationRecord(1, program),),
        orders=orders,
    )
    [events] = made.adopt_workers()
    gone[0](None, None)
    assert taken == ([] if beside else [worker.slot])
    return events, orders_given, posted


def test_a_worker_that_still_finishes_after_a_second_kill_keeps_its_limit() -> None:
    """The fleet has it as an orphan already, whose timers another report would cancel."""
    events, given, _ = unadopted(Worker(13, 0, State.ORPHANED))

    assert events == ()
    assert given == [(signal.SIGQUIT, None)]


def test_the_counts_in_the_slot_of_an_orphan_are_those_of_its_successor() -> None:
    unadopted(Worker(13, 0, State.ORPHANED), beside=(Worker(14, 0, State.READY),))


def test_it_gets_the_signal_that_it_had_not_got_yet() -> None:
    order = ("@notify-13", int(signal.SIGKILL))

    _, given, _ = unadopted(Worker(13, 0, State.ORPHANED), orders=(order,))

    assert given == [(signal.SIGQUIT, signal.SIGKILL)]


@pytest.mark.parametrize(("retires", "sign"), [(True, 0), (False, signal.SIGQUIT)])
def test_an_unstored_worker_that_watches_its_line_needs_no_signal(retires: bool, sign: int) -> None:
    record = WorkerRecord(13, 1, 4711, 0, retires=retires)

    _, given, _ = unadopted(Worker(13, 0, State.READY), record)

    assert given == [(sign, None)]


def test_a_rolling_worker_needs_no_signal_for_it_watches_its_line() -> None:
    """It would close connections whose first requests it has not read."""
    rolling = Policy(workers_accept=True, surge=1, drain_timeout_s=9.0)

    _, given, _ = unadopted(Worker(13, 0, State.STARTING), policy=rolling)

    assert given == [(0, None)]


def test_events_of_a_worker_that_cannot_be_adopted_tell_who_waits() -> None:
    """For these clients another worker, or another generation, may have to start."""
    (event,), _, ended = unadopted(Worker(13, 0, State.READY), waiting=3)

    assert event == WorkerExited(13, KILLED, waiting=3, orphans=True, lost=True)
    assert ended == [WorkerExited(13, "orphans gone", waiting=3)]


def test_a_worker_whose_generation_was_not_stored_finishes_by_the_settings_signal() -> None:
    ends: list[int] = []
    pool = SimpleNamespace(
        records=lambda: (),
        addresses=lambda number: (f"@notify-{number}",),
        leftovers=SimpleNamespace(find=lambda *words: ends.append(words[3])),
    )
    made = recovery(12, os.open(os.devnull, os.O_RDONLY), handoff="listener")
    made.unclaimed.close()
    live = made.effects.live_settings
    made.effects = cast("Any", SimpleNamespace(pool=pool, generations={}, live_settings=live))
    draining = Generation(1, Phase.DRAINING, workers=(Worker(13, 0, State.ORPHANED),))
    made.snapshot = replace(made.snapshot, fleet=Fleet(generations=(draining,), served=True))

    list(made.adopt_workers())

    assert ends == [signal.SIGTERM]
