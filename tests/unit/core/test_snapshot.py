"""The state as one value: the next program reads what the previous program has written."""

from __future__ import annotations

from socketprotector.core.actions import (
    Report,
    ReportKind,
    Retire,
    Signal,
    StartTimer,
    UseSettings,
    WorkerSignal,
)
from socketprotector.core.events import Deadline, TimerKind
from socketprotector.core.snapshot import CODEC, Snapshot, due_after
from socketprotector.model.records import DeliveryRecord, ForwarderRecord, SettingsRecord
from socketprotector.model.settings import Settings
from tests.unit.conftest import Story

SETTINGS = SettingsRecord(Settings("name", ("sh",), "/"))


def test_the_next_program_reads_the_whole_state(story: Story) -> None:
    fleet = story.given_serving(workers=2).fleet
    snapshot = Snapshot(
        fleet,
        SETTINGS,
        unfinished=(Signal(1, WorkerSignal.TERM), Retire(2), UseSettings()),
        timers=((Deadline(TimerKind.WORKER_KILL, 1), 5.0),),
        orders=(("@worker-1", 15),),
        unsaid=(Report(ReportKind.READY, 1),),
    )

    assert CODEC.decode(CODEC.encode(snapshot)) == snapshot


def test_the_next_delivery_gets_its_own_records(story: Story) -> None:
    forwarder = ForwarderRecord()
    snapshot = Snapshot(story.fleet, SETTINGS, forwarder=forwarder, nonblocking=(3, 4))

    assert snapshot.delivery == DeliveryRecord(forwarder, nonblocking=(3, 4))


def test_an_extension_that_a_kill_prevents_shortens_no_timer() -> None:
    start, drain = Deadline(TimerKind.START, 2), Deadline(TimerKind.DRAIN, 1)
    running = {start: (start, 160.0), drain: (drain, 103.0)}
    extended = [StartTimer(start, 5.0, extend=True), StartTimer(drain, 5.0, extend=True)]

    assert due_after(extended, running, now=100.0) == [(start, 160.0), (drain, 105.0)]

    restarted = [StartTimer(start, 20.0), Retire(1), StartTimer(start, 5.0, extend=True)]
    assert due_after(restarted, running, now=100.0) == [(start, 120.0)]
